"""The ViT equals timm's own, name by name, and answers to everything timm asks of one."""

import json
import pickle

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.models import GraphExtractNet, save_for_hf
from timm.optim import create_optimizer_v2
from timm.utils import AttentionExtract
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitft import vitflower
from vitft.blocks import Attention, Block
from vitft.errors import RecipeError
from vitft.patches import PatchConv
from vitft.positions import sincos2d
from vitft.vit import VisionTransformer

TINY = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 5,
}
TWINS = {  # ours -> the same architecture in timm
    "vitflower_ti16": "vit_tiny_patch16_224",
    "vitflower_s16": "vit_small_patch16_224",
    "vitflower_s14": "vit_small_patch14_dinov2",
    "vitflower_b16": "vit_base_patch16_224",
    "vitflower_b32": "vit_base_patch32_224",
    "vitflower_l16": "vit_large_patch16_224",
    "vitflower_l32": "vit_large_patch32_224",
    "vitflower_h14": "vit_huge_patch14_224",
}


def shuffle(model, seed=0):
    """Random values everywhere, so that zeros and ones hide nothing."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.state_dict().values():
            p.copy_(torch.randn(p.shape, generator=gen) * 0.1)
    return model


def tiny(**options):
    return shuffle(timm.create_model("vitflower_b16", **(TINY | options))).eval()


def tiny_twin(ours, **options):
    """timm's model of the same options with the weights of ours."""
    twin = timm.create_model("vit_base_patch16_224", **(TINY | options)).eval()
    assert list(twin.state_dict()) == list(ours.state_dict())
    twin.load_state_dict(ours.state_dict())
    return twin


def images(n=2, size=32, chans=3):
    return torch.randn(n, chans, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TWINS)
def test_every_name_has_timms_keys_shapes_and_order_at_full_size(name):
    with torch.device("meta"):
        ours = timm.create_model(name, num_classes=7, img_size=224)
        twin = timm.create_model(TWINS[name], num_classes=7, img_size=224)
    shapes = [(k, tuple(v.shape)) for k, v in ours.state_dict().items()]
    assert shapes == [(k, tuple(v.shape)) for k, v in twin.state_dict().items()]
    assert ours.blocks[0].attn.num_heads == twin.blocks[0].attn.num_heads


def test_a_twin_eats_images_of_the_same_size():
    assert TWINS.items() <= vitflower.TWINS.items()
    sides = {
        name: [timm.get_pretrained_cfg(n).input_size[-1] for n in (name, theirs)]
        for name, theirs in vitflower.TWINS.items()
    }
    assert sides.pop("vitflower_s14") == [224, 518]  # timm has DINOv2's under one name alone
    assert set(map(tuple, sides.values())) == {(224, 224)}


@pytest.mark.parametrize("name", TWINS)
def test_every_name_gives_timms_outputs_at_full_width(name):
    small = {"img_size": 4 * int(name[-2:]), "depth": 2, "num_classes": 7}
    ours = shuffle(timm.create_model(name, **small)).eval()
    twin = timm.create_model(TWINS[name], **small).eval()
    twin.load_state_dict(ours.state_dict())
    x = images(2, small["img_size"])
    with torch.no_grad():
        torch.testing.assert_close(ours(x), twin(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": 1e-5},
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False},
        {"global_pool": "avg", "class_token": False},
        {"global_pool": ""},
        {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},
        {"reg_tokens": 1},
        {"no_embed_class": True},
        {"pre_norm": True, "act_layer": "quick_gelu"},
        {"act_layer": "gelu_tanh"},
        {"qkv_bias": False},
        {"pos_embed": "none"},
        {"in_chans": 1},
        {"img_size": (16, 32)},
        {"img_size": (32, 64), "patch_size": (8, 16)},
        {"mlp_ratio": 2.5},
        {"num_classes": 0},
        {"dynamic_img_size": True},
        {"drop_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5},
        {"patch_drop_rate": 0.5, "pos_drop_rate": 0.5},
    ],
    ids=str,
)
def test_every_option_gives_timms_keys_outputs_and_gradients(options):
    ours = tiny(**options)
    twin = tiny_twin(ours, **options)
    height, width = ours.patch_embed.img_size
    x = torch.randn(2, ours.in_chans, height, width, generator=torch.Generator().manual_seed(1))
    for model in (ours, twin):
        model(x).square().sum().backward()
    torch.testing.assert_close(ours(x), twin(x), atol=1e-5, rtol=1e-5)
    for (name, p), (_, q) in zip(ours.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_dropout_and_stochastic_depth_draw_like_timms_in_training():
    options = {"drop_rate": 0.2, "proj_drop_rate": 0.1, "drop_path_rate": 0.5, "pos_drop_rate": 0.1}
    ours = tiny(**options)
    twin = tiny_twin(ours, **options)
    outputs = []
    for model in (ours.train(), twin.train()):
        torch.manual_seed(3)
        outputs.append(model(images(4)))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 12])
def test_drop_path_grows_from_block_to_block_as_timms_does(depth):
    options = TINY | {"depth": depth, "drop_path_rate": 0.3}
    rates = [
        [
            getattr(path, "drop_prob", 0.0)
            for b in net.blocks
            for path in (b.drop_path1, b.drop_path2)
        ]
        for net in (
            timm.create_model("vitflower_b16", **options),
            timm.create_model("vit_base_patch16_224", **options),
        )
    ]
    assert rates[0] == pytest.approx(rates[1], abs=1e-7)
    assert rates[0][:2] == [0, 0]
    assert rates[0][-2:] == ([0.3, 0.3] if depth > 1 else [0, 0])


@pytest.mark.parametrize("way", ["forward", "first_token"])
def test_drop_path_leaves_out_whole_branches_of_single_images_and_keeps_the_mean(way):
    """By hand: for all tokens of an image a branch counts 0 or 1 / (1 - rate) times."""
    torch.manual_seed(0)
    rate, n, block = 0.4, 4000, Block(8, 2, drop_path=0.4)
    image = torch.randn(1, 3, 8)

    def by_hand(x, attention, mlp):
        x = x + attention * block.attn(block.norm1(x))
        x = x + mlp * block.mlp(block.norm2(x))
        return x if way == "forward" else x[:, :1]

    def with_gradient(function):
        x = image.repeat(n, 1, 1).requires_grad_()
        out = function(x)
        out.square().sum().backward()
        return torch.cat([out.detach(), x.grad], 1).flatten(1)  # [n, values]

    drawn = with_gradient(getattr(block.train(), way))
    factors = [(a / (1 - rate), m / (1 - rate)) for a in (0, 1) for m in (0, 1)]
    kinds = torch.stack([with_gradient(lambda x, f=f: by_hand(x, *f))[0] for f in factors])
    gaps = (drawn[:, None] - kinds).abs().amax(2)  # [n, 4]
    assert float(gaps.amin(1).max()) < 1e-5
    shares = torch.bincount(gaps.argmin(1), minlength=4) / n
    wanted = torch.tensor([rate * rate, rate * (1 - rate), rate * (1 - rate), (1 - rate) ** 2])
    torch.testing.assert_close(shares, wanted, atol=0.03, rtol=0)  # 4 standard errors: 0.03
    whole = with_gradient(lambda x: by_hand(x, 1, 1))
    torch.testing.assert_close(with_gradient(getattr(block.eval(), way)), whole)


def test_base_backbone_has_the_papers_parameter_count():
    with torch.device("meta"):
        ours = timm.create_model("vitflower_b16", num_classes=0)
        full = timm.create_model("vitflower_b16", num_classes=21843, representation_size=768)
    assert sum(p.numel() for p in ours.parameters()) == 85_798_656
    assert len(ours.state_dict()) == 150
    assert sum(p.numel() for p in full.parameters()) == 103_186_515
    assert len(full.state_dict()) == 154
    assert list(full.state_dict())[-6:] == [
        "norm.weight",
        "norm.bias",
        "pre_logits.fc.weight",
        "pre_logits.fc.bias",
        "head.weight",
        "head.bias",
    ]


def test_representation_layer_is_linear_then_tanh_between_features_and_head():
    ours = tiny(representation_size=24)
    x = images()
    plain = tiny()
    plain.load_state_dict(
        {k: v for k, v in ours.state_dict().items() if not k.startswith(("pre_logits", "head"))},
        strict=False,
    )
    with torch.no_grad():
        features = plain.forward_head(plain.forward_features(x), pre_logits=True)
        fc = ours.pre_logits.fc
        represented = torch.tanh(features @ fc.weight.T + fc.bias)
        tokens = ours.forward_features(x)
        torch.testing.assert_close(ours.forward_head(tokens, pre_logits=True), represented)
        torch.testing.assert_close(ours(x), ours.head(represented))
    assert ours.head_hidden_size == 24
    assert ours.num_features == 32
    ours.reset_classifier(3)
    assert ours(x).shape == (2, 3)


def test_attention_weights_are_the_fused_path_made_visible():
    attention = shuffle(Attention(32, 4)).eval()
    x = torch.randn(2, 17, 32)
    with torch.no_grad():
        weights = attention.weights(x)  # [B, H, T, T]
        v = attention.qkv(x).reshape(2, 17, 3, 4, 8)[:, :, 2].transpose(1, 2)  # [B, H, T, K]
        by_hand = attention.proj((weights @ v).transpose(1, 2).flatten(2))
        assert attention.fused_attn
        torch.testing.assert_close(attention(x), by_hand, atol=1e-6, rtol=1e-5)
        attention.fused_attn = False
        torch.testing.assert_close(attention(x), by_hand, atol=1e-6, rtol=1e-5)
    assert weights.shape == (2, 4, 17, 17)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 17))


def test_timms_switch_for_fused_attention_is_honoured():
    set_fused_attn(False)
    try:
        assert not tiny().blocks[0].attn.fused_attn
    finally:
        set_fused_attn(True)
    assert tiny().blocks[0].attn.fused_attn


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"representation_size": 24},
        {"init_values": 0.3, "reg_tokens": 2},
        {"qkv_bias": False},
        {"global_pool": "avg"},
        {"depth": 1},
    ],
    ids=str,
)
def test_class_token_shortcut_equals_the_whole_last_block(options):
    ours = tiny(**options)
    x = images(3)
    whole = ours.forward_head(ours.forward_features(x), pre_logits=True)
    short = ours.forward_class_token(x)
    assert short.shape == (3, ours.head_hidden_size)
    torch.testing.assert_close(short, whole, atol=1e-6, rtol=1e-6)
    grads = [
        torch.autograd.grad(y.square().sum(), ours.blocks[-1].attn.qkv.weight)[0]
        for y in (short, whole)
    ]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_class_token_shortcut_does_not_go_past_an_adapter_on_qkv():
    class Adapter(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 0.1 * x.repeat(1, 1, 3)

    ours = tiny()
    ours.blocks[-1].attn.qkv = Adapter(ours.blocks[-1].attn.qkv)
    x = images()
    whole = ours.forward_head(ours.forward_features(x), pre_logits=True)
    torch.testing.assert_close(ours.forward_class_token(x), whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"indices": 1},
        {"indices": [0, -1], "norm": True},
        {"output_fmt": "NLC", "return_prefix_tokens": True},
        {"indices": [0], "stop_early": True, "intermediates_only": True},
        {"output_dict": True, "return_prefix_tokens": True},
        {"output_dict": True, "intermediates_only": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"global_pool": "avg", "reg_tokens": 2}], ids=str)
def test_intermediates_equal_timms(options, kwargs):
    ours = tiny(**options)
    x = images()
    with torch.no_grad():
        got = ours.forward_intermediates(x, **kwargs)
        want = tiny_twin(ours, **options).forward_intermediates(x, **kwargs)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_intermediates_refuse_an_unknown_format():
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NLC, got 'BCHW'"):
        tiny().forward_intermediates(images(), output_fmt="BCHW")


def test_dinos_name_for_intermediates_equals_timms():
    ours = tiny()
    x = images()
    with torch.no_grad():
        for kwargs in ({"n": 2}, {"n": [0], "reshape": True, "return_prefix_tokens": True}):
            torch.testing.assert_close(
                ours.get_intermediate_layers(x, **kwargs),
                tiny_twin(ours).get_intermediate_layers(x, **kwargs),
                atol=1e-5,
                rtol=1e-5,
            )


def test_features_only_gives_maps_of_the_blocks():
    model = timm.create_model("vitflower_b16", features_only=True, out_indices=(0, 1), **TINY)
    assert [tuple(f.shape) for f in model(images())] == [(2, 32, 4, 4)] * 2
    assert model.feature_info.reduction() == [8, 8]
    assert model.feature_info.channels() == [32, 32]
    one = timm.create_model("vitflower_b16", features_only=True, out_indices=(0,), **TINY)
    assert len(one.model.blocks) == 1
    assert isinstance(one.model.head, nn.Identity)


def test_the_graph_can_be_traced_by_timms_extractor():
    ours = tiny()
    graph = GraphExtractNet(ours, ["blocks.0.norm2", "norm"]).eval()
    with torch.no_grad():
        torch.testing.assert_close(graph(images())[1], ours.forward_features(images()))


def test_attention_can_be_read_by_timms_extractor():
    ours = tiny()
    for block in ours.blocks:
        block.attn.fused_attn = False
    maps = AttentionExtract(ours, method="hook")(images())
    tokens = ours._embed(images())
    torch.testing.assert_close(
        maps["blocks.0.attn.attn_drop"], ours.blocks[0].attn.weights(ours.blocks[0].norm1(tokens))
    )


def test_pruning_keeps_what_intermediates_need():
    ours = tiny(depth=3, representation_size=16)
    x = images()
    with torch.no_grad():
        before = ours.forward_intermediates(x, [1], intermediates_only=True)
        assert ours.prune_intermediate_layers([-2]) == [1]
        torch.testing.assert_close(
            ours.forward_intermediates(x, 1, intermediates_only=True), before
        )
        assert ours(x).shape == (2, 17, 32)
    assert len(ours.blocks) == 2


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "no_embed_class": True}], ids=str)
def test_changing_the_input_size_resamples_like_timm(options):
    ours = tiny(**options)
    twin = tiny_twin(ours, **options)
    for model in (ours, twin):
        model.set_input_size((48, 32), patch_size=(4, 8))
    x = torch.randn(1, 3, 48, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), twin(x), atol=1e-5, rtol=1e-5)
    assert ours.patch_embed.grid_size == (12, 4)


@pytest.mark.parametrize("size", [(32, 48), (37, 50)])
def test_the_product_that_a_gpu_computes_is_the_convolution(size):
    """Forward and gradients, for oblong patches and for an image that they do not tile."""
    torch.manual_seed(0)
    conv = PatchConv(3, 24, (8, 16), (8, 16)).double()
    images = torch.randn(2, 3, *size, dtype=torch.double, requires_grad=True)
    inputs = (images, conv.weight, conv.bias)
    want, got = conv(images), conv.product(images)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    weighing = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((got * weighing).sum(), inputs),
        torch.autograd.grad((want * weighing).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_dynamic_image_size_equals_timms_and_the_resized_model():
    ours = tiny(dynamic_img_size=True)
    twin = tiny_twin(ours, dynamic_img_size=True)
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        got = ours(x)
        torch.testing.assert_close(got, twin(x), atol=1e-5, rtol=1e-5)
        ours.set_input_size((48, 64))
        torch.testing.assert_close(ours(x), got, atol=1e-5, rtol=1e-5)
    with pytest.raises(RecipeError, match="side 50 px is not a multiple of the patch size 8 px"):
        ours(torch.zeros(1, 3, 50, 48))


def test_sincos_table_by_hand():
    table = sincos2d((2, 3), 8)
    assert table.shape == (1, 6, 8)
    x, y, w0, w1 = 2.0, 1.0, 1.0, 1e-4  # last patch: column 2, row 1
    angles = torch.tensor([x * w0, x * w1, y * w0, y * w1], dtype=torch.float64)
    s, c = angles.sin(), angles.cos()
    by_hand = torch.stack([s[0], s[1], c[0], c[1], s[2], s[3], c[2], c[3]]).float()
    torch.testing.assert_close(table[0, 5], by_hand)


def test_sincos_positions_are_saved_but_never_trained():
    ours = tiny(pos_embed="sincos2d")
    assert list(ours.state_dict()) == list(tiny().state_dict())
    assert "pos_embed" not in dict(ours.named_parameters())
    fresh = timm.create_model("vitflower_b16", pos_embed="sincos2d", **TINY)
    torch.testing.assert_close(fresh.pos_embed[:, 1:], sincos2d((4, 4), 32))
    assert not fresh.pos_embed[:, 0].any()
    fresh.set_input_size(16)
    assert fresh.pos_embed.shape == (1, 5, 32)
    assert not isinstance(fresh.pos_embed, nn.Parameter)
    with pytest.raises(RecipeError, match="sincos2d needs a width that is a multiple of 4"):
        sincos2d((2, 2), 10)


def test_classifier_is_replaced_on_request_only():
    ours = tiny(dtype=torch.float64)
    assert ours.get_classifier() is ours.head
    ours.reset_classifier(9, "avg")
    assert ours.head.weight.shape == (9, 32)
    assert not ours.head.bias.any()
    assert ours.head.weight.abs().max() < 0.1  # std 0.02; torch's own start would reach 0.17
    assert ours.head.weight.dtype is torch.float64
    assert isinstance(ours.norm, nn.LayerNorm)  # the norm stays before the pooling
    assert ours(images().double()).shape == (2, 9)
    ours.reset_classifier(0)
    assert ours(images().double()).shape == (2, 32)
    with pytest.raises(RecipeError, match="must be one of '', 'token', 'avg', got 'max'"):
        ours.reset_classifier(3, "max")


def test_initial_weights_are_small_normals_and_zero_biases():
    torch.manual_seed(0)
    model = timm.create_model("vitflower_ti16", depth=2)
    state = model.state_dict()
    for name in ("pos_embed", "blocks.0.attn.qkv.weight", "head.weight", "cls_token"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.2), name
        assert state[name].abs().max() < 0.12
    assert not state["blocks.1.mlp.fc1.bias"].any()
    assert state["norm.weight"].eq(1).all()


def test_layer_decay_groups_and_decay_free_names_equal_timms():
    ours = tiny(reg_tokens=1)
    twin = tiny_twin(ours, reg_tokens=1)
    groups = []
    for model in (ours, twin):
        names = {id(p): n for n, p in model.named_parameters()}
        made = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
        groups.append(
            [
                (g["lr_scale"], g["weight_decay"], [names[id(p)] for p in g["params"]])
                for g in made.param_groups
            ]
        )
    assert groups[0] == groups[1]
    assert groups[0][0][0] < groups[0][-1][0]


def test_checkpointing_changes_memory_not_gradients():
    grads = []
    for enable in (False, True):
        ours = tiny()
        ours.set_grad_checkpointing(enable)
        ours(images()).sum().backward()
        grads.append(ours.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*grads)


def test_export_and_reload_through_timm_is_bit_equal(tmp_path):
    ours = tiny(img_size=(32, 48), pos_embed="learned", init_values=0.1)
    save_for_hf(ours, str(tmp_path / "out"), safe_serialization=True)
    x = torch.randn(2, 3, 32, 48)
    again = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
    assert isinstance(again, VisionTransformer)
    with torch.no_grad():
        assert torch.equal(again(x), ours(x))
    rehead = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True, num_classes=3)
    assert rehead.head.weight.shape == (3, 32)
    assert torch.equal(rehead.blocks[1].mlp.fc2.weight, ours.blocks[1].mlp.fc2.weight)
    direct = timm.create_model(
        "vitflower_b16",
        checkpoint_path=str(tmp_path / "out" / "model.safetensors"),
        **(TINY | {"img_size": (32, 48), "init_values": 0.1}),
    ).eval()
    with torch.no_grad():
        assert torch.equal(direct(x), ours(x))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "vitflower_b16"


def test_a_pickled_model_comes_back_the_same():
    ours = tiny(reg_tokens=2, pos_embed="learned2d")
    again = pickle.loads(pickle.dumps(ours))
    with torch.no_grad():
        assert torch.equal(again(images()), ours(images()))


def test_names_carry_the_preprocessing_of_their_weights():
    s14 = timm.create_model("vitflower_s14")
    assert s14.num_classes == 0
    assert s14.patch_embed.img_size == (224, 224)
    assert s14.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert s14.pretrained_cfg["std"] == (0.229, 0.224, 0.225)
    b16 = timm.get_pretrained_cfg("vitflower_b16")
    assert b16.num_classes == 21843
    assert (b16.mean, b16.std, b16.interpolation) == ((0.5,) * 3, (0.5,) * 3, "bicubic")
    assert set(TWINS) <= set(timm.list_models("vitflower_*"))
    assert timm.list_models("vitflower_*", pretrained=True) == []
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("vitflower_ti16", pretrained=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"img_size": 230}, "side 230 px is not a multiple of the patch size 8 px"),
        ({"img_size": 4}, "side 4 px is not a multiple of the patch size 8 px"),
        ({"global_pool": "map"}, "must be one of '', 'token', 'avg', got 'map'"),
        ({"pos_embed": "rope"}, "model.pos_embed: must be one of"),
        ({"act_layer": "relu"}, "must be one of 'gelu', 'gelu_tanh', 'quick_gelu', got 'relu'"),
        ({"num_heads": 5}, "width 32 does not split into 5 heads"),
        ({"class_token": False}, "'token' needs the class token"),
    ],
)
def test_impossible_options_are_refused_with_the_way_out(options, text):
    with pytest.raises(RecipeError, match=text) as caught:
        timm.create_model("vitflower_b16", **(TINY | options))
    assert caught.value.faults[0].fix


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="depht"):
        timm.create_model("vitflower_b16", depht=3)


def test_an_image_of_the_wrong_size_is_refused_in_words():
    with pytest.raises(ValueError, match=r"image is 48 x 48 px, the model was built for 32 x 32"):
        tiny()(images(1, 48))


def test_compiled_export_follows_the_batch_size():
    ours = tiny()
    batch = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(ours, (images(2),), dynamic_shapes=batch)
    x = images(5)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), ours(x), atol=1e-6, rtol=1e-5)


def test_eval_logits_are_those_of_the_head_on_its_cached_features_bit_for_bit():
    torch.manual_seed(0)
    net = timm.create_model(
        "vitflower_s16", img_size=32, depth=2, num_classes=5, init_values=1e-1
    ).eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(net(x), net.head(net.forward_class_token(x)))
        torch.testing.assert_close(
            net(x), net.forward_head(net.forward_features(x)), atol=1e-6, rtol=1e-6
        )


def test_a_hook_on_the_last_block_is_shown_every_token():
    net = timm.create_model("vitflower_s16", img_size=32, depth=2, num_classes=5).eval()
    seen = []
    net.blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    net(torch.randn(2, 3, 32, 32))
    assert seen == [(2, 5, 384)]


def test_training_takes_the_short_way_with_timms_gradients():
    options = {"drop_path_rate": 0.3, "drop_rate": 0.2, "num_classes": 4}
    ours = tiny(**options)
    twin = tiny_twin(ours, **options)
    x, work = images(4), []
    for model in (ours.train(), twin.train()):
        torch.manual_seed(3)
        with FlopCounterMode(display=False) as counter:
            model(x).square().sum().backward()
        work.append(counter.get_total_flops())
    for (name, p), (_, q) in zip(ours.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4, msg=name)
    assert work[0] < 0.75 * work[1]  # of two blocks, most of the second is left out


def test_the_short_way_in_training_is_compiled_to_the_same_gradients():
    ours = tiny().train()
    ours(images(2)).sum().backward()
    wanted = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    torch.compile(ours, backend="aot_eager", fullgraph=True)(images(2)).sum().backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_shortened_it_is_its_first_and_last_block_and_nothing_is_copied(depth):
    net = tiny(depth=depth)
    short, x = net.shortened().eval(), torch.randn(2, 3, 32, 32)
    assert len(net.blocks) == depth
    assert list(short.blocks) == [net.blocks[0], net.blocks[-1]][: min(depth, 2)]
    twin = tiny(depth=min(depth, 2))
    twin.load_state_dict(short.state_dict())
    assert torch.equal(short(x), twin(x))


@torch.no_grad()
@pytest.mark.parametrize(
    ("half", "between"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
)
@pytest.mark.parametrize(
    "options", [{}, {"init_values": 0.5}, {"pre_norm": True}, {"no_embed_class": True}], ids=str
)
def test_under_autocast_tokens_stay_in_bfloat16_between_blocks(options, half, between):
    """In float32 every sum over them takes twice the memory; in float16 sums could overflow."""
    net, seen = tiny(**options), []

    def listen(module, args, out):
        seen.append((args[0].dtype, out.dtype))

    for block in net.blocks:
        block.register_forward_hook(listen)
    exact = net(images())
    assert set(seen) == {(torch.float32, torch.float32)}
    seen.clear()
    with torch.autocast("cpu", half):
        close = net(images())
    assert set(seen) == {(between, between)}
    assert float((close - exact).abs().max()) < 0.03 * float(exact.abs().max())
