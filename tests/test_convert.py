"""Every layout gives, in our model, the outputs of the library that owns it.

timm and torchvision are at hand; transformers and open_clip are used where they are installed, and
their names are checked against a list written from their sources where they are not.
"""

import math
from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

import vitft  # noqa: F401  (registers the names)
from vitft import convert, fitting, inspection, layouts, tally, weights
from vitft.anatomy import anatomy
from vitft.errors import WeightsError

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def scatter(model, seed=0):
    """Random values in every parameter, so that no zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def ours(**options):
    return timm.create_model("vitflower_b16", **(TINY | {"num_classes": 5} | options)).eval()


def theirs(**options):
    return scatter(
        timm.create_model("vit_base_patch16_224", **(TINY | {"num_classes": 5} | options))
    )


def fill(model, content, place="checkpoint"):
    whole, match, notes = fitting.complete(content, model, place=place)
    model.load_state_dict(whole)
    return match, notes


def same(model, reference, x=X):
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_features(x), reference.forward_features(x), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(model(x), reference(x), atol=1e-5, rtol=1e-5)
    each_block(model, reference, x)


def each_block(model, reference, x=X, **given):
    """Every block's output is the owner's, whatever its library calls blocks."""
    layers = next(
        m for m in reference.modules()
        if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) == len(model.blocks) == 2
        and any(isinstance(part, nn.LayerNorm) for part in m[0].children())
    )  # fmt: skip
    met = [[], []]
    hooks = [
        part.register_forward_hook(lambda m, i, o, out=out: out.append(o))
        for parts, out in zip((model.blocks, layers), met, strict=True)
        for part in parts
    ]
    with torch.no_grad():
        model(x), reference(x, **given)
    for hook in hooks:
        hook.remove()
    assert len(met[0]) == 2
    for a, b in zip(*met, strict=True):
        b = b[0] if isinstance(b, tuple) else b
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# --- Google JAX ----------------------------------------------------------------------------------


def jax_arrays(*, big_vision=False, stacked=False, prefix=""):
    """Random arrays with the names and shapes of vision_transformer or big_vision."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32) * 0.1

    attention, mlp, norm2 = (0, 0, 1) if big_vision else (1, 3, 2)
    block = {
        "LayerNorm_0/scale": (32,),
        "LayerNorm_0/bias": (32,),
        f"LayerNorm_{norm2}/scale": (32,),
        f"LayerNorm_{norm2}/bias": (32,),
        f"MlpBlock_{mlp}/Dense_0/kernel": (32, 128),
        f"MlpBlock_{mlp}/Dense_0/bias": (128,),
        f"MlpBlock_{mlp}/Dense_1/kernel": (128, 32),
        f"MlpBlock_{mlp}/Dense_1/bias": (32,),
    }
    for part in ("query", "key", "value"):
        block[f"MultiHeadDotProductAttention_{attention}/{part}/kernel"] = (32, 4, 8)
        block[f"MultiHeadDotProductAttention_{attention}/{part}/bias"] = (4, 8)
    block[f"MultiHeadDotProductAttention_{attention}/out/kernel"] = (4, 8, 32)
    block[f"MultiHeadDotProductAttention_{attention}/out/bias"] = (32,)
    out = {
        "cls": draw(1, 1, 32),
        "embedding/kernel": draw(8, 8, 3, 32),
        "embedding/bias": draw(32),
        "Transformer/encoder_norm/scale": draw(32),
        "Transformer/encoder_norm/bias": draw(32),
        "head/kernel": draw(32, 5),
        "head/bias": draw(5),
    }
    out["pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"] = draw(
        1, 17, 32
    )
    for name, shape in block.items():
        if stacked:
            out[f"Transformer/encoderblock/{name}"] = draw(2, *shape)
        else:
            for i in range(2):
                out[f"Transformer/encoderblock_{i}/{name}"] = draw(*shape)
    return {prefix + k: v for k, v in out.items()}


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"prefix": "opt/target/"},
        {"big_vision": True, "prefix": "params/"},
        {"big_vision": True, "prefix": "params/img/"},
        {"big_vision": True, "stacked": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("door", ["overlay", "checkpoint_path"])
def test_google_jax_npz_equals_timms_reader(tmp_path, form, door):
    path = tmp_path / "w.npz"
    np.savez(path, **jax_arrays(**form))
    reference = theirs()
    reference.load_pretrained(str(path))
    if door == "overlay":
        overlay = {"file": str(path)}
        options = TINY | {"num_classes": 5, "pretrained_cfg_overlay": overlay}
        model = timm.create_model("vitflower_b16", pretrained=True, **options).eval()
    else:
        model = timm.create_model(
            "vitflower_b16", checkpoint_path=str(path), num_classes=5, **TINY
        ).eval()
    same(model, reference)
    assert convert.convert(weights.read(path)).layout.startswith("Google JAX")


def test_google_jax_representation_layer_and_head_by_hand(tmp_path):
    arrays = jax_arrays()
    arrays |= {"pre_logits/kernel": np.ones((32, 24), np.float32), "pre_logits/bias": np.ones(24)}
    arrays |= {"head/kernel": np.random.default_rng(1).normal(size=(24, 5)).astype(np.float32)}
    path = tmp_path / "w.npz"
    np.savez(path, **{k: v.astype(np.float32) for k, v in arrays.items()})
    model = ours(representation_size=24)
    match, _ = fill(model, weights.read(path))
    assert match.loaded == len(model.state_dict())
    with torch.no_grad():
        features = model.pool(model.forward_features(X))
        by_hand = torch.tanh(features.sum(-1, keepdim=True).expand(-1, 24) + 1)
        expected = by_hand @ torch.tensor(arrays["head/kernel"]) + torch.tensor(arrays["head/bias"])
        torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)


# --- the timm family -----------------------------------------------------------------------------


def test_deit_with_distillation_is_a_register_token_and_reported():
    reference = timm.create_model("deit_base_distilled_patch16_224", num_classes=5, **TINY)
    scatter(reference)
    reference.set_distilled_training(False)
    model = ours(reg_tokens=1)
    match, notes = fill(model, {"model": reference.state_dict()})
    assert notes == (
        "took 'model' out of model",
        "the distillation token became the register token",
    )
    assert match.dropped == dict.fromkeys(("head_dist.weight", "head_dist.bias"), layouts.DISTILLED)
    with torch.no_grad():
        tokens = reference.forward_features(X)
        torch.testing.assert_close(model.forward_features(X), tokens, atol=1e-5, rtol=1e-5)
        expected = reference.head(tokens[:, 0])  # the class token's own opinion
        torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(WeightsError, match="reg_tokens: 1"):
        fill(ours(), reference.state_dict())


@pytest.mark.parametrize("no_embed_class", [True, False])
def test_deit_iii_scales_are_layer_scale_and_its_class_token_has_no_position(no_embed_class):
    reference = theirs(no_embed_class=True, init_values=0.1)
    state = {
        k.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): v
        for k, v in reference.state_dict().items()
    }
    model = ours(no_embed_class=no_embed_class, init_values=1e-5)
    _, notes = fill(model, {"model": state}, "deit_3_small_224_1k.pth")
    same(model, reference)
    assert "names converted from DeiT-III" in notes
    assert ("1 prefix token(s) had no position and got zero" in notes) is not no_embed_class


def test_dino_training_file_gives_its_teacher():
    reference, other = theirs(num_classes=0), scatter(theirs(num_classes=0), seed=9)
    head = {"head.mlp.0.weight": torch.ones(3, 32), "head.last_layer.weight_v": torch.ones(3, 3)}
    content = {
        "student": {f"module.backbone.{k}": v for k, v in other.state_dict().items()},
        "teacher": {f"backbone.{k}": v for k, v in reference.state_dict().items()} | head,
        "args": Namespace(arch="vit_small"),
        "epoch": 100,
    }
    model = ours(num_classes=0)
    match, notes = fill(model, content)
    same(model, reference)
    assert set(match.dropped.values()) == {"projection head of self-supervised pre-training"}
    assert notes[0].startswith("took 'teacher' out of student, teacher, args, epoch")


def test_dinov2_chunked_blocks_and_mask_token_equal_timms_reading():
    reference = theirs(init_values=0.1, num_classes=0)
    state = reference.state_dict() | {"mask_token": torch.zeros(1, 32)}
    chunked = {k.replace("blocks.", "blocks.0.", 1): v for k, v in state.items()}
    for content in (state, chunked, {"teacher": {f"backbone.{k}": v for k, v in chunked.items()}}):
        model = ours(init_values=1e-5, num_classes=0)
        match, _ = fill(model, content)
        same(model, reference)
        assert list(match.dropped.values()) == ["mask token of pre-training"]


@pytest.mark.parametrize("no_embed_class", [True, False])
def test_dinov2_registers_equal_timms_reading(no_embed_class):
    reference = theirs(init_values=0.1, num_classes=0, reg_tokens=4, no_embed_class=True)
    generator = torch.Generator().manual_seed(5)
    state = {k: v.clone() for k, v in reference.state_dict().items()}
    del state["reg_token"]
    state |= {
        "register_tokens": torch.randn(1, 4, 32, generator=generator),
        "pos_embed": torch.randn(1, 17, 32, generator=generator),
        "mask_token": torch.zeros(1, 32),
    }
    reference.load_state_dict(checkpoint_filter_fn(dict(state), reference))
    model = ours(init_values=0.1, num_classes=0, reg_tokens=4, no_embed_class=no_embed_class)
    match, _ = fill(model, state)
    same(model, reference)
    assert match.loaded == len(model.state_dict())
    with pytest.raises(WeightsError, match="reg_tokens: 4"):
        fill(ours(init_values=0.1, num_classes=0), state)


def test_mae_pre_training_file_loses_its_decoder_and_fine_tuned_file_its_nothing():
    reference = theirs(num_classes=0)
    decoder = {
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_embed.weight": torch.zeros(16, 32),
        "decoder_blocks.0.attn.qkv.weight": torch.zeros(48, 16),
        "decoder_pred.bias": torch.zeros(192),
    }
    model = ours(num_classes=5)
    match, notes = fill(model, {"model": reference.state_dict() | decoder})
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_features(X), reference.forward_features(X), atol=1e-5, rtol=1e-5
        )
    assert set(match.dropped) == set(decoder)
    assert match.new == ("head.weight", "head.bias")
    assert convert.convert(reference.state_dict() | decoder).layout == "MAE, pre-training"
    tuned = theirs(global_pool="avg")
    model = ours(global_pool="avg")
    assert fill(model, {"model": tuned.state_dict()})[0].dropped == {}
    same(model, tuned)


def test_moco_v3_gives_its_base_encoder():
    reference, momentum = theirs(num_classes=0), scatter(theirs(num_classes=0), seed=3)
    content = {f"module.base_encoder.{k}": v for k, v in reference.state_dict().items()}
    content |= {f"module.momentum_encoder.{k}": v for k, v in momentum.state_dict().items()}
    content |= {"module.base_encoder.head.0.weight": torch.ones(3, 32)}
    content |= {"module.predictor.0.weight": torch.ones(3, 3)}
    model = ours(num_classes=0)
    match, notes = fill(model, {"state_dict": content, "arch": "vit_base"})
    same(model, reference)
    assert "took the prefix 'base_encoder.' off the names" in notes
    assert match.dropped["base_encoder.head.0.weight"].startswith("projection head")
    assert match.dropped["momentum_encoder.norm.weight"] == "outside base_encoder."


def test_i_jepa_gives_its_target_encoder():
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    reference = theirs(**options)
    target = {f"module.{k}": v for k, v in reference.state_dict().items()}
    content = {"encoder": {k: v + 1 for k, v in target.items()}, "target_encoder": target}
    model = ours(**options)
    fill(model, content)
    same(model, reference)


def test_several_backbones_without_a_rule_are_refused():
    state = theirs().state_dict()
    content = {f"{side}.{k}": v for k, v in state.items() for side in ("left", "right")}
    with pytest.raises(WeightsError, match=r"several backbones: left\., right\."):
        fill(ours(), content)


def test_a_patch_embedding_written_as_a_matrix_is_understood():
    reference = theirs()
    state = reference.state_dict()
    flat = {k: v.flatten(1) if k == "patch_embed.proj.weight" else v for k, v in state.items()}
    model = ours()
    fill(model, flat)
    same(model, reference)


@pytest.mark.parametrize("target", [{"patch_size": 16}, {"in_chans": 1}, {"in_chans": 5}], ids=str)
def test_patch_size_and_channels_are_adapted_like_timms_with_a_note(target):
    state = theirs().state_dict()
    reference = timm.create_model(
        "vit_base_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": state, "num_classes": 5},
        **(TINY | {"num_classes": 5} | target),
    ).eval()
    model = ours(**target)
    _, notes = fill(model, state)
    same(model, reference, torch.randn(1, target.get("in_chans", 3), 32, 32))
    assert any(n.startswith("patch kernel") for n in notes)


# --- torchvision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", [None, 24])
@pytest.mark.parametrize("old_names", [False, True])
def test_torchvision_equals_torchvision(representation, old_names):
    from torchvision.models import VisionTransformer

    reference = scatter(VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5,
                                          representation_size=representation))  # fmt: skip
    state = reference.state_dict()
    if old_names:  # before torchvision 0.13
        state = {
            k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v
            for k, v in state.items()
        }
    model = ours(mlp_ratio=2, representation_size=representation)
    match, notes = fill(model, state)
    assert match.loaded == len(model.state_dict())
    assert notes == ("names converted from torchvision",)
    each_block(model, reference)
    with torch.no_grad():
        torch.testing.assert_close(model(X), reference(X), atol=1e-5, rtol=1e-5)


# --- CLIP ----------------------------------------------------------------------------------------


def clip_state(prefix="visual."):
    """Names of OpenAI's and OpenCLIP's image tower, random values, and a text tower beside it."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * 0.1

    out = {
        "class_embedding": draw(32),
        "positional_embedding": draw(17, 32),
        "proj": draw(32, 16),
        "conv1.weight": draw(32, 3, 8, 8),
    }
    for norm in ("ln_pre", "ln_post"):
        out |= {f"{norm}.weight": draw(32), f"{norm}.bias": draw(32)}
    for i in range(2):
        block = f"transformer.resblocks.{i}."
        out |= {
            f"{block}attn.in_proj_weight": draw(96, 32),
            f"{block}attn.in_proj_bias": draw(96),
            f"{block}attn.out_proj.weight": draw(32, 32),
            f"{block}attn.out_proj.bias": draw(32),
            f"{block}mlp.c_fc.weight": draw(128, 32),
            f"{block}mlp.c_fc.bias": draw(128),
            f"{block}mlp.c_proj.weight": draw(32, 128),
            f"{block}mlp.c_proj.bias": draw(32),
        }
        for norm in ("ln_1", "ln_2"):
            out |= {f"{block}{norm}.weight": draw(32), f"{block}{norm}.bias": draw(32)}
    text = {
        "text_projection": draw(8, 8),
        "transformer.resblocks.0.attn.in_proj_weight": draw(24, 8),
        "ln_final.weight": draw(8),
    }
    return {prefix + k: v for k, v in out.items()} | (text if prefix else {})


CLIP = {"pre_norm": True, "norm_eps": 1e-5, "num_classes": 16}


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("prefix", ["visual.", "module.visual."])
def test_clip_image_tower_equals_timms_reading(act, prefix):
    state = clip_state(prefix)
    reference = theirs(
        pre_norm=True, num_classes=16, act_layer=act, norm_layer=lambda d, **k: nn.LayerNorm(d, **k)
    )
    read = checkpoint_filter_fn(dict(state), reference)
    reference.load_state_dict({k: v for k, v in read.items() if k in reference.state_dict()})
    model = ours(**CLIP, act_layer=act)
    match, _ = fill(model, state)
    same(model, reference)
    text = ("text_projection", "transformer.resblocks.0.attn.in_proj_weight", "ln_final.weight")
    assert match.dropped == dict.fromkeys(text, f"outside {prefix}")


def test_clip_projection_is_a_head_only_where_the_sizes_agree():
    model = ours(**(CLIP | {"num_classes": 5}))
    match, _ = fill(model, clip_state())
    assert match.dropped["head.weight"] == "it is for 16 classes, the model has 5"
    with pytest.raises(WeightsError, match="pre_norm: true"):
        fill(ours(), clip_state())


@pytest.mark.parametrize("quick", [False, True])
def test_open_clip_equals_open_clip(quick):
    transformer = pytest.importorskip("open_clip.transformer")
    act = transformer.QuickGELU if quick else nn.GELU
    reference = transformer.VisionTransformer(32, 8, 32, 2, 4, 4.0, output_dim=16, act_layer=act)
    scatter(reference)
    model = ours(**CLIP, act_layer="quick_gelu" if quick else "gelu")
    fill(model, {f"visual.{k}": v for k, v in reference.state_dict().items()})
    each_block(model, reference)
    with torch.no_grad():
        torch.testing.assert_close(model(X), reference(X), atol=1e-5, rtol=1e-5)


def test_open_clip_around_a_timm_model_gives_its_trunk_and_projection():
    reference = theirs(num_classes=0)
    projection = torch.randn(16, 32)
    content = {f"visual.trunk.{k}": v for k, v in reference.state_dict().items()}
    content |= {"visual.head.proj.weight": projection, "logit_scale": torch.tensor(1.0)}
    model = ours(num_classes=16)
    match, _ = fill(model, content)
    with torch.no_grad():
        torch.testing.assert_close(model(X), reference(X) @ projection.T, atol=1e-5, rtol=1e-5)
    assert match.dropped == {"logit_scale": "outside visual.trunk."}


# --- Hugging Face transformers -------------------------------------------------------------------

VIT_OLD = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
VIT_NEW = VIT_OLD | {
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
DINOV2_OLD = VIT_OLD | {
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def to_hugging_face(state, names, layer, prefix):
    """A timm state under transformers' names, written from its modeling files."""
    stem = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "reg_token": "embeddings.register_tokens",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    out = {}
    for name, tensor in state.items():
        if name in stem:
            out[prefix + stem[name]] = tensor
        elif name.startswith("head."):
            out[name.replace("head", "classifier")] = tensor
        elif ".attn.qkv." in name:
            _, i, _, _, kind = name.split(".")
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{prefix}{layer}.{i}.{names[part]}.{kind}"] = piece
        elif ".ls" in name:
            _, i, ls, _ = name.split(".")
            out[f"{prefix}{layer}.{i}.layer_scale{ls[-1]}.lambda1"] = tensor
        else:
            _, i, rest = name.split(".", 2)
            part, kind = rest.rsplit(".", 1)
            out[f"{prefix}{layer}.{i}.{names[part]}.{kind}"] = tensor
    return out


@pytest.mark.parametrize(
    ("names", "layer", "prefix", "options"),
    [
        (VIT_OLD, "encoder.layer", "vit.", {}),
        (VIT_NEW, "layers", "vit.", {}),
        (VIT_OLD, "encoder.layer", "", {"num_classes": 0}),
        (DINOV2_OLD, "encoder.layer", "dinov2.", {"init_values": 0.1}),
        (DINOV2_OLD | {k: VIT_NEW[k] for k in ("q", "k", "v", "attn.proj")}, "encoder.layer", "",
         {"init_values": 0.1, "num_classes": 0}),
    ],
)  # fmt: skip
def test_hugging_face_names_give_timms_outputs(names, layer, prefix, options):
    reference = theirs(**options)
    state = to_hugging_face(reference.state_dict(), names, layer, prefix)
    model = ours(**options)
    match, notes = fill(model, state)
    same(model, reference)
    assert match.loaded == len(model.state_dict())
    assert notes[0] == "names converted from Hugging Face transformers"


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}


def both_forms(model, tmp_path):
    """The state as transformers holds it, and as it writes it."""
    from safetensors.torch import load_file

    model.save_pretrained(tmp_path)
    return model.state_dict(), load_file(tmp_path / "model.safetensors")


def test_hugging_face_vit_equals_transformers(tmp_path):
    hf = pytest.importorskip("transformers")
    reference = scatter(hf.ViTForImageClassification(hf.ViTConfig(intermediate_size=64, **SMALL)))
    for state in both_forms(reference, tmp_path):
        model = ours(mlp_ratio=2, norm_eps=1e-12)
        assert fill(model, state)[0].dropped == {}
        each_block(model, reference)
        with torch.no_grad():
            torch.testing.assert_close(model(X), reference(X).logits, atol=1e-5, rtol=1e-5)


def test_hugging_face_pooler_is_the_representation_layer(tmp_path):
    hf = pytest.importorskip("transformers")
    reference = scatter(hf.ViTModel(hf.ViTConfig(intermediate_size=64, **SMALL)))
    for state in both_forms(reference, tmp_path):
        model = ours(mlp_ratio=2, norm_eps=1e-12, num_classes=0, representation_size=32)
        fill(model, state)
        each_block(model, reference)
        with torch.no_grad():
            torch.testing.assert_close(model(X), reference(X).pooler_output, atol=1e-5, rtol=1e-5)


def test_hugging_face_deit_equals_transformers(tmp_path):
    hf = pytest.importorskip("transformers")
    config = hf.DeiTConfig(intermediate_size=64, **SMALL)
    reference = scatter(hf.DeiTForImageClassificationWithTeacher(config))
    for state in both_forms(reference, tmp_path):
        model = ours(mlp_ratio=2, norm_eps=1e-12, reg_tokens=1)
        match, _ = fill(model, state)
        assert set(match.dropped.values()) == {layouts.DISTILLED}
        each_block(model, reference)
        with torch.no_grad():
            expected = reference(X).cls_logits
            torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("registers", [0, 4])
def test_hugging_face_dinov2_equals_transformers(tmp_path, registers):
    hf = pytest.importorskip("transformers")
    small = SMALL | {"mlp_ratio": 2}
    if registers:
        config = hf.Dinov2WithRegistersConfig(num_register_tokens=registers, **small)
        reference = scatter(hf.Dinov2WithRegistersForImageClassification(config))
        inner = reference.dinov2_with_registers
    else:
        reference = scatter(hf.Dinov2ForImageClassification(hf.Dinov2Config(**small)))
        inner = reference.dinov2
    for state in both_forms(reference, tmp_path):
        model = ours(mlp_ratio=2, init_values=1e-5, reg_tokens=registers)
        match, _ = fill(model, state)
        each_block(model, reference)
        with torch.no_grad():
            expected = inner(X).last_hidden_state
            torch.testing.assert_close(model.forward_features(X), expected, atol=1e-5, rtol=1e-5)
        assert match.dropped["head.weight"] == "shape [5, 64], the model has [5, 32]"


def test_hugging_face_mae_loses_its_decoder(tmp_path):
    hf = pytest.importorskip("transformers")
    decoder = {f"decoder_{k}": 16 for k in ("hidden_size", "intermediate_size")}
    decoder |= {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = hf.ViTMAEConfig(intermediate_size=64, mask_ratio=0.0, **SMALL, **decoder)
    reference = scatter(hf.ViTMAEForPreTraining(config))
    for state in both_forms(reference, tmp_path):
        model = ours(mlp_ratio=2, norm_eps=1e-12, num_classes=0)
        match, _ = fill(model, state)
        assert match.loaded == len(model.state_dict())
        assert all(n.startswith("decoder.") for n in match.dropped)
        with torch.no_grad():
            noise = torch.arange(16.0).repeat(2, 1)  # keeps the order of patches
            each_block(model, reference.vit, noise=noise)
            expected = reference.vit(X, noise=noise).last_hidden_state
            torch.testing.assert_close(model.forward_features(X), expected, atol=1e-5, rtol=1e-5)


def test_hugging_face_clip_equals_transformers(tmp_path):
    hf = pytest.importorskip("transformers")
    small = SMALL | {"intermediate_size": 64, "projection_dim": 16}
    reference = scatter(hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**small)))
    for state in both_forms(reference, tmp_path):
        model = ours(**CLIP, mlp_ratio=2, act_layer="quick_gelu")
        fill(model, state)
        each_block(model, reference)
        with torch.no_grad():
            torch.testing.assert_close(model(X), reference(X).image_embeds, atol=1e-5, rtol=1e-5)


def test_hugging_face_dinov3_is_refused_by_name(tmp_path):
    hf = pytest.importorskip("transformers")
    reference = hf.DINOv3ViTModel(hf.DINOv3ViTConfig(intermediate_size=64, **SMALL))
    for state in both_forms(reference, tmp_path):
        with pytest.raises(WeightsError, match="DINOv3"):
            fill(ours(), state)


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["rope_embed.periods", "storage_tokens"], "DINOv3"),
        (["blocks.0.attn.qkv.bias_mask"], "DINOv3"),
        (["blocks.0.mlp.w12.weight", "blocks.0.mlp.w3.weight"], "DINOv2 giant"),
        (["blocks.0.attn.relative_position_bias_table"], "BEiT or Swin"),
        (["attn_pool.latent"], "SigLIP or CoCa"),
        (["attn_pool.latent", "norm_pre.weight"], "Perception Encoder"),
        (["rope.freqs"], "rotary positions"),
        (["blocks.0.attn.q_bias"], r"EVA \(queries and values"),
        (["blocks.0.attn.rel_pos_h"], "relative positions"),
        (["blocks.0.attn.proj_l.weight"], "CaiT"),
        (["blocks.0.attn.norm.weight"], "BEiT 3"),
        (["blocks.0.attn.lambda_q1"], "differential attention"),
        (["blocks.0.attn.q_norm.weight"], "normalised queries"),
    ],
)
def test_relatives_of_vit_are_refused_by_name(names, what):
    state = theirs().state_dict() | {n: torch.ones(1) for n in names}
    with pytest.raises(WeightsError, match=what) as caught:
        fill(ours(), state)
    assert caught.value.faults[0].id == "ckpt.layout"
    assert "timm's own model" in caught.value.faults[0].fix


def dinov3(prefix=""):
    """Names of Meta's DINOv3 ViT, and of its wrapper for training, as its source writes them."""
    block = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"]
    block += [f"attn.{n}" for n in ("qkv.weight", "qkv.bias", "qkv.bias_mask")]
    block += [f"{n}.{kind}" for n in ("attn.proj", "mlp.fc1", "mlp.fc2") for kind in WB]
    names = ["cls_token", "storage_tokens", "mask_token", "rope_embed.periods"]
    names += [f"patch_embed.proj.{kind}" for kind in WB] + [f"norm.{kind}" for kind in WB]
    names += [f"blocks.{i}.{n}" for i in range(2) for n in block]
    return {prefix + n: torch.ones(1) for n in names}


WB = ("weight", "bias")


@pytest.mark.parametrize("prefix", ["", "backbone.", "teacher.backbone."])
@pytest.mark.parametrize("without", ["", "storage_tokens", "rope_embed.periods", "bias_mask"])
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4, "init_values": 1e-5}])
def test_metas_dinov3_is_refused_by_name(prefix, without, options):
    state = {n: t for n, t in dinov3(prefix).items() if not without or not n.endswith(without)}
    with pytest.raises(WeightsError, match=r"looks like DINOv3 \(rotary positions\)"):
        fill(ours(**options), state)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb"])
@pytest.mark.parametrize("wrap", ["", "model.", "module.backbone."])
def test_timms_dinov3_is_refused_by_name_and_loads_into_its_own_model(name, wrap):
    net = scatter(timm.create_model(name, embed_dim=64, depth=2, num_heads=4, img_size=32))
    state = {wrap + n: t for n, t in net.state_dict().items()}
    every = {"pos_embed": "none", "reg_tokens": 4, "init_values": 1e-5, "qkv_bias": False}
    for options in ({}, every, {"reg_tokens": 4}):  # with what would take each of its tensors
        with pytest.raises(WeightsError, match=r"looks like DINOv3 \(rotary positions\)") as caught:
            fill(ours(embed_dim=64, **options), state)
        assert caught.value.faults[0].id == "ckpt.layout"
    assert fitting.fit(state, net).state.keys() == net.state_dict().keys()


def test_rotary_positions_without_registers_are_refused_and_deit3_is_not():
    net = timm.create_model("vit_small_patch16_rope_224", embed_dim=64, depth=2, num_heads=4)
    with pytest.raises(WeightsError, match="looks like a ViT with rotary positions"):
        fill(ours(embed_dim=64, pos_embed="none", init_values=1e-5), net.state_dict())
    own = theirs(init_values=1e-5, no_embed_class=True).state_dict()
    old = {
        n.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): own[n] for n in own
    }
    fill(ours(init_values=1e-5, no_embed_class=True), old, "deit_3_small_224_1k.pth")
    fill(timm.create_model("deit3_small_patch16_224", **TINY), old)  # the model says it, too


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("w.pth", False),
        ("rope_ape.pth", False),
        ("deit_3_base_224_1k.pth", True),
        ("deit3.pth", True),
    ],
)
def test_what_deit3_and_a_rotary_vit_both_write_needs_the_word_of_the_file(tmp_path, name, taken):
    """timm's rope_ape has every name and shape of DeiT-III's own files, and rotates besides."""
    rotary = timm.create_model("vit_small_patch16_rope_ape_224", embed_dim=32, depth=2,
                               num_heads=4, patch_size=8, img_size=32, num_classes=5)  # fmt: skip
    state = theirs(init_values=1e-5, no_embed_class=True).state_dict()
    old = {
        n.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): t
        for n, t in state.items()
    }
    assert {n: t.shape for n, t in rotary.state_dict().items()} == {
        n: t.shape for n, t in old.items()
    }
    torch.save({"model": rotary.state_dict()}, tmp_path / name)
    options = TINY | {"num_classes": 5, "init_values": 1e-5, "no_embed_class": True}
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / name)}}
    doors = (
        lambda: fill(ours(init_values=1e-5, no_embed_class=True), old, tmp_path / name),
        lambda: timm.create_model("vitflower_b16", **options, **overlay),
        lambda: fitting.load_for(ours(init_values=1e-5), tmp_path / name),
        lambda: inspection.inspect(tmp_path / name),
    )
    for door in doors:
        if taken:
            door()
            continue
        with pytest.raises(WeightsError, match="DeiT-III or timm's rope_ape") as caught:
            door()
        assert caught.value.faults[0].id == "ckpt.layout"
        assert "deit_3_....pth; rope_ape: use timm's own model" in caught.value.faults[0].fix
    if taken:
        assert inspection.inspect(tmp_path / name).layout == "DeiT-III"
    fitted = fitting.fit(rotary.state_dict(), rotary, place=tmp_path / name)
    assert tally.check(fitted.state, rotary.state_dict()).new == ()


def test_timms_rpn_is_refused_where_order_or_header_do_not_clear_it(tmp_path):
    options = {"class_token": False, "global_pool": "avg", "qkv_bias": False}
    rpn = scatter(timm.create_model("vit_base_patch16_rpn_224", num_classes=5, **TINY))
    for door in (lambda m: m, lambda m: saved(m, tmp_path)):
        with pytest.raises(WeightsError, match=r"timm's rpn \(norms after attention and MLP\)"):
            fill(ours(**options), door(rpn.state_dict()))
    plain = theirs(**options)
    fill(model := ours(**options), plain.state_dict())
    same(model, plain)
    with pytest.raises(WeightsError, match="a ViT whose names were sorted"):
        fill(ours(**options), saved(plain.state_dict(), tmp_path))
    header = {"vitft": '{"architecture": "vitflower_b16"}'}
    path = tmp_path / "w.safetensors"
    save_file(plain.state_dict(), path, metadata=header)
    fill(model := ours(**options), weights.read(path), path)
    same(model, plain)
    folder = tmp_path / "out"
    save_for_hf(ours(**options), str(folder), safe_serialization=True)
    timm.create_model(f"local-dir:{folder}", pretrained=True)
    (folder / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="a ViT whose names were sorted"):
        fill(ours(**options), saved(plain.state_dict(), tmp_path), folder)
    fitting.fit(rpn.state_dict(), rpn)


def saved(state, folder):
    """As safetensors gives it back: in another order."""
    save_file(state, folder / "sorted.safetensors")
    return weights.read(folder / "sorted.safetensors")


def test_heads_that_no_tensor_shows_are_asked_for():
    """MoCo-v3's ViT-S has 12 heads of 32 values where all others have 6 of 64."""
    small = {"embed_dim": 384, "num_classes": 0}
    reference = theirs(**small, num_heads=12)
    content = {f"module.base_encoder.{k}": v for k, v in reference.state_dict().items()}
    with pytest.raises(WeightsError, match="MoCo-v3 has num_heads 12, which no tensor shows") as e:
        fill(ours(**small, num_heads=6), {"state_dict": content})
    assert e.value.faults[0].id == "ckpt.options"
    assert e.value.faults[0].fix == "build it with num_heads: 12"
    fill(model := ours(**small, num_heads=12), {"state_dict": content})
    same(model, reference)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_mocos_linear_classifiers_are_known_by_their_positions(stored):
    """Their names are timm's; only the table of sines, which training leaves alone, tells."""
    small = {"embed_dim": 384, "num_classes": 5}
    reference = theirs(**small, num_heads=12)
    table = torch.zeros(17, 384)
    for row in range(4):
        for column in range(4):
            for k in range(96):
                omega = 10_000 ** (-k / 96)
                waves = [f(w * omega) for w in (row, column) for f in (math.sin, math.cos)]
                table[1 + 4 * row + column, k::96] = torch.tensor(waves)
    reference.pos_embed.data[0] = table
    content = {f"module.{k}": v.to(stored) for k, v in reference.state_dict().items()}
    reference.load_state_dict({k[7:]: v.float() for k, v in content.items()})
    with pytest.raises(WeightsError, match="has num_heads 12, which no tensor shows; the model 6"):
        fill(ours(**small, num_heads=6), content)
    fill(model := ours(**small, num_heads=12), content)
    same(model, reference)
    content["module.pos_embed"] = content["module.pos_embed"].roll(1, 1)
    fill(ours(**small, num_heads=6), content)  # anyone else's


def test_openais_activation_is_asked_for_and_others_are_noted():
    openai = clip_state() | {n: torch.tensor(7) for n in convert.OPENAI}
    with pytest.raises(WeightsError, match="has act_layer quick_gelu, which no tensor .* gelu"):
        fill(ours(**CLIP), openai)
    quick = ours(**CLIP, act_layer="quick_gelu")
    match, notes = fill(quick, openai)
    assert not any("activation" in note for note in notes)
    assert {match.dropped[n] for n in convert.OPENAI} == {"outside visual."}
    _, notes = fill(ours(**(CLIP | {"norm_eps": 1e-6})), clip_state())
    assert "a CLIP tower's norm_eps is 1e-05, the model's 1e-06" in notes
    assert any("no tensor shows the activation, gelu in this model" in note for note in notes)
    for act in ("gelu", "gelu_tanh", "quick_gelu"):
        bare = {"class_token": False, "global_pool": "avg", "fc_norm": False, "act_layer": act}
        reference = theirs(**bare)
        _, notes = fill(model := ours(**bare), reference.state_dict())
        same(model, reference)
        assert any(f"no tensor shows the activation, {act} in this model" in n for n in notes)


def test_a_jax_relative_is_refused_by_name():
    arrays = {k: torch.from_numpy(v) for k, v in jax_arrays().items()}
    with pytest.raises(WeightsError, match="SigLIP"):
        fill(ours(), arrays | {"MAPHead_0/probe": torch.ones(1)})


def test_a_relatives_own_model_in_timm_takes_its_own_names():
    net = timm.create_model("eva_giant_patch14_224", **TINY, num_classes=5)
    fitted = fitting.fit(net.state_dict(), net)
    match = tally.check(fitted.state, net.state_dict())
    assert match.loaded == len(net.state_dict())


def test_names_outside_the_table_stay_and_are_listed():
    state = theirs().state_dict() | {"surprise.weight": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"also holds 1 tensor \(surprise\.weight\)"):
        fill(ours(), state)


def test_anatomy_reads_sizes_from_shapes_alone():
    model = ours(reg_tokens=2, init_values=0.1, representation_size=24, img_size=48)
    sizes = anatomy(model.state_dict())
    assert (sizes.width, sizes.depth, sizes.hidden, sizes.patch) == (32, 2, 128, (8, 8))
    assert (sizes.positions, sizes.registers, sizes.classes) == (39, 2, 5)
    assert (sizes.layer_scale, sizes.pre_norm, sizes.representation) == (True, False, 24)
    assert sizes.words == "2 blocks of width 32, patch 8"
    assert anatomy({"fc.weight": torch.ones(1)}) is None
