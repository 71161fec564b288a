"""Every family of timm's that looks like a ViT gives timm's logits in ours, or is refused.

A file that loads whole and answers otherwise than in its owner's hands is the worst that can
happen: nobody would notice. So each family is built small and random, and its state either comes
back as timm's own logits, to rounding, or not at all, with the reason.
"""

import pytest
import timm
import torch

import vitft  # noqa: F401  (registers the names)
from vitft import convert, fitting, inspection, kin, tally
from vitft.anatomy import anatomy
from vitft.errors import WeightsError

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}

SAME = [
    "vit_tiny_patch16_224",
    "vit_base_patch8_224",
    "vit_base_patch16_224_miil",
    "vit_base_patch16_plus_240",
    "vit_small_patch16_36x1_224",
    "deit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "flexivit_small",
    "eva_large_patch14_196",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch14_reg1_tipsv2",
    "vit_base_patch16_gap_224",
    "vit_medium_patch16_gap_240",
    "vit_wee_patch16_reg1_gap_256",
    "vit_so150m_patch16_reg4_gap_256",
    "vit_so150m2_patch16_reg1_gap_256",
    "vit_base_patch16_siglip_gap_224",
    "vit_base_patch16_clip_224",
    "test_vit",
    "test_vit2",
]
UNTOLD = {  # what no tensor shows: the user reads of it in a note, and says it
    "vit_base_patch32_siglip_gap_256": "gelu_tanh",
    "vit_so400m_patch16_siglip_gap_256": "gelu_tanh",
    "vit_base_patch32_clip_quickgelu_224": "quick_gelu",
    "vit_large_patch14_clip_quickgelu_224": "quick_gelu",
}
REFUSED = {  # words of the fault or of its remedy
    "vit_small_patch16_rope_224": "rotary positions",
    "vit_small_patch16_rope_ape_224": "DeiT-III or timm's rope_ape",
    "vit_small_patch16_rope_mixed_224": "rotary positions",
    "vit_small_patch16_rope_mixed_ape_224": "rotary positions",
    "vit_base_patch16_rope_reg1_gap_256": "rotary positions",
    "vit_mediumd_patch16_rope_reg1_gap_256": "rotary positions",
    "vit_small_patch16_dinov3": "DINOv3",
    "vit_base_patch16_dinov3_qkvb": "DINOv3",
    "vit_pe_core_tiny_patch16_384": "Perception Encoder",
    "vit_pe_lang_large_patch14_448": "Perception Encoder",
    "vit_pe_spatial_tiny_patch16_512": "no final norm",
    "vit_base_patch16_siglip_224": "attention pooling",
    "vit_so150m_patch16_reg4_map_256": "attention pooling",
    "test_vit3": "attention pooling",
    "test_vit4": "RMSNorm",
    "vit_base_patch16_rpn_224": "timm's rpn",
    "vit_base_patch16_xp_224": "",
    "vit_base_patch16_18x2_224": "",
    "vit_pwee_patch16_reg1_gap_256": "",
    "vit_dwee_patch16_reg1_gap_256": "differential attention",
    "vit_giant_patch14_dinov2": "gated",
    "vit_giant_patch14_reg4_dinov2": "gated",
    "aimv2_large_patch14_224": "SwiGLU",
    "vit_intern300m_patch14_448": "no final norm",
    "vit_base_patch16_radio_v3": "no final norm",
    "beit_base_patch16_224": "BEiT",
    "beitv2_base_patch16_224": "BEiT",
    "beit3_base_patch16_224": "BEiT 3",
    "eva_giant_patch14_224": "EVA",
    "eva02_tiny_patch14_224": "EVA",
    "eva02_base_patch16_clip_224": "EVA",
    "cait_xxs24_224": "CaiT",
    "vit_relpos_small_patch16_224": "relative positions",
    "vit_relpos_base_patch16_rpn_224": "relative positions",
    "vit_srelpos_small_patch16_224": "relative positions",
    "samvit_base_patch16": "relative positions",
}
OTHERS = [
    "xcit_nano_12_p16_224",
    "tiny_vit_5m_224",
    "naflexvit_base_patch16_gap",
    "hiera_tiny_224",
    "hieradet_small",
    "sam2_hiera_tiny",
    "qwen3_vit_88m",
    "qwen3_vit_88m_enc",
    "deepseek_vit_412m",
    "deepseek_vit_412m_enc",
    "volo_d1_224",
    "pit_ti_224",
    "convit_tiny",
    "levit_128s",
    "mvitv2_tiny",
    "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224",
    "twins_svt_small",
    "tnt_s_patch16_224",
    "crossvit_9_240",
    "coat_tiny",
    "vitamin_small_224",
    "mixer_s16_224",
    "nest_tiny",
    "mobilevit_xxs",
    "visformer_tiny",
    "poolformer_s12",
]


def small(name):
    """timm's model, 4 x 4 patches, with random values everywhere; the same shapes in the file."""
    patch = int(next((p[5:] for p in name.split("_") if p[:5] == "patch"), 16))
    net = timm.create_model(name, img_size=4 * patch, **SMALL)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    x = torch.randn(2, 3, 4 * patch, 4 * patch, generator=torch.Generator().manual_seed(1))
    return net.eval(), x


def as_inspect_says(state, size, device="cpu", **told):
    """Our model as its file describes it, and the match."""
    converted = convert.convert(state)
    sizes = anatomy(converted.state)
    options = SMALL | {"img_size": size, "patch_size": size // 4}
    if sizes is not None and sizes.patch[0]:
        options = inspection.options_for("vitflower_b16", sizes, converted)
        options |= {"embed_dim": sizes.width, "depth": sizes.depth, "patch_size": sizes.patch}
        options |= {"num_heads": SMALL["num_heads"], "img_size": size} | told
    with torch.device(device):
        ours = timm.create_model("vitflower_b16", **options).eval()
    whole, match, notes = fitting.complete(state, ours)
    ours.load_state_dict(whole)
    assert match.dropped == {}
    return ours, notes


@pytest.mark.parametrize("name", [*SAME, *UNTOLD])
def test_it_gives_timms_logits(name):
    net, x = small(name)
    told = {"act_layer": UNTOLD[name]} if name in UNTOLD else {}
    ours, notes = as_inspect_says(net.state_dict(), x.shape[-1], **told)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
        _, mine = ours.forward_intermediates(x)
        _, theirs = net.forward_intermediates(x)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if told:
        assert any(f"act_layer: {told['act_layer']}" in note for note in notes)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("order", ["as timm writes it", "sorted"])
def test_it_is_refused_with_the_reason(name, order):
    net, x = small(name)
    state = net.state_dict()
    refuse(dict(sorted(state.items())) if order == "sorted" else state, x.shape[-1], REFUSED[name])


@pytest.mark.parametrize("name", OTHERS)
def test_another_architecture_is_refused(name):
    with torch.device("meta"):
        shapes = timm.create_model(name).state_dict()
    state = {k: torch.tensor(0.1).expand(t.shape) for k, t in shapes.items()}
    refuse(state, 224, "", device="meta")


def refuse(state, size, why, **where):
    with pytest.raises(WeightsError) as caught:
        as_inspect_says(state, size, **where)
    fault = caught.value.faults[0]
    ids = "layout architecture missing_keys unexpected_keys shape"
    assert fault.id.removeprefix("ckpt.") in ids.split()
    assert why in f"{fault.text} {fault.fix}", fault
    assert fault.fix


@pytest.mark.parametrize("name", [*REFUSED, "hiera_tiny_224", "deepseek_vit_412m", "qwen3_vit_88m"])
def test_its_own_model_in_timm_takes_it(name):
    if name in REFUSED:
        net, _ = small(name)
    else:
        with torch.device("meta"):
            net = timm.create_model(name)
    fitted = fitting.fit(net.state_dict(), net)
    assert tally.check(fitted.state, net.state_dict()).new == ()


def test_a_sign_that_the_model_itself_has_tells_nothing():
    names = ["blocks.0.attn.q_norm.weight", "blocks.0.attn.qkv.weight"]
    assert kin.relative(names).what == "a ViT with normalised queries and keys"
    assert kin.relative(names, names[:1]) is None
    assert kin.relative(names[1:]) is None
