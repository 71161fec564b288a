"""The hybrid equals timm's, takes Google's and timm's files, and refuses what is no CNN."""

import re
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
from rows import card
from safetensors.torch import save_file

import vitft  # noqa: F401  (registers the names)
from vitft import (
    convert,
    fitting,
    graph,
    inspection,
    maps,
    model,
    product,
    twin,
    vitflower,
    weights,
)
from vitft.card import KEY, text_of
from vitft.errors import RecipeError, WeightsError
from vitft.hybrid import build_cnn, cnn_state
from vitft.inputs import InputConfig, normalise, plain
from vitft.learn import Hooks, learn
from vitft.prepare import prepare
from vitft.run import run

SMALL = {"depth": 2, "img_size": 64, "num_classes": 5}
HYBRIDS = {k: v for k, v in vitflower.TWINS.items() if "hybrid" in k}
ON_LITE = {"embed": "tf_efficientnet_lite0", "patch_size": 1, "embed_dim": 32, "num_heads": 2}


def scatter(model, seed=0):
    """Random values everywhere, so that no zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    return model.eval()


def images(size=64, channels=3):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", HYBRIDS)
def test_every_hybrid_has_timms_names_and_shapes_at_full_size(name):
    with torch.device("meta"):
        ours = timm.create_model(name, num_classes=7)
        theirs = timm.create_model(HYBRIDS[name], num_classes=7)
    shapes = [(k, tuple(v.shape)) for k, v in ours.state_dict().items()]
    assert shapes == [(k, tuple(v.shape)) for k, v in theirs.state_dict().items()]


@pytest.mark.parametrize("name", ["vitflower_hybrid_r_ti16", "vitflower_hybrid_r26_s32",
                                  "vitflower_hybrid_r50_b16"])  # fmt: skip
def test_hybrids_give_timms_outputs(name):
    ours = scatter(timm.create_model(name, **SMALL))
    theirs = timm.create_model(HYBRIDS[name], **SMALL).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), theirs(images()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [("r_ti16", 32), ("r26_s32", 32), ("r50_b16", 16), ("r50_b32", 32), ("r50_l16", 16),
     ("r50_l32", 32)],
)  # fmt: skip
def test_the_grid_is_the_papers(name, pixels):
    with torch.device("meta"):
        embed = timm.create_model(f"vitflower_hybrid_{name}", depth=1).patch_embed
    assert embed.feat_ratio() == pixels
    assert embed.grid_size == (224 // pixels, 224 // pixels)


def test_any_timm_cnn_gives_the_map_that_timms_own_hybrid_reads():
    ours = scatter(timm.create_model("vitflower_b16", patch_size=1, embed="resnet26d", **SMALL))
    theirs = timm.create_model("vit_base_resnet26d_224", **SMALL).eval()
    assert list(theirs.state_dict()) == list(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), theirs(images()), atol=1e-5, rtol=1e-5)


def test_a_stage_chooses_the_map():
    cells = {}
    for stage in (None, 2, 3):
        model = timm.create_model("vitflower_b16", embed_stage=stage, **(SMALL | ON_LITE))
        cells[stage] = (model.patch_embed.stride, model.patch_embed.feature_dim)
        assert model(images()).shape == (2, 5)
    assert cells == {None: (32, 320), 2: (8, 40), 3: (16, 112)}


@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenetv3_small_050", "resnet10t"])
@pytest.mark.parametrize("stage", [0, 2, None])
def test_no_stage_behind_the_map_is_kept_and_the_map_is_timms(name, stage):
    timms = timm.create_model(name, features_only=True).eval()
    cnn = build_cnn(name, 3, stage).eval()
    state, _ = cnn_state(timms.state_dict(), cnn, name, place="test")
    cnn.load_state_dict(state)
    (found,) = cnn(images())
    torch.testing.assert_close(found, timms(images())[-1 if stage is None else stage])
    found.sum().backward()
    assert all(p.grad is not None for p in cnn.parameters())


def test_a_product_that_still_has_the_stages_behind_the_map_opens_without_them(tmp_path):
    """As versions wrote it that kept what no answer asked for."""
    now = timm.create_model("vitflower_b16", embed_stage=2, **(SMALL | ON_LITE)).eval()
    whole = timm.create_model("vitflower_b16", **(SMALL | ON_LITE)).state_dict()
    last = len(now.patch_embed.backbone.blocks) - 1
    behind = {
        name: t
        for name, t in whole.items()
        if (found := re.match(r"patch_embed\.backbone\.blocks\.(\d+)", name))
        and int(found[1]) > last
    }
    assert behind
    options = SMALL | ON_LITE | {"embed_stage": 2}
    del options["num_classes"]
    spec = {"architecture": "vitflower_b16", "classes": tuple("abcde"), "options": options}
    header = {KEY: text_of(card(**spec))}
    file = tmp_path / "model.safetensors"
    save_file(now.state_dict() | behind, file, metadata=header)
    again, _ = product.load(file)
    with torch.no_grad():
        assert torch.equal(again(images()), now(images()))
    _, match, _ = fitting.complete(now.state_dict() | behind, now)
    assert match.dropped.keys() == behind.keys()
    odd = now.state_dict() | {"patch_embed.backbone.blocks.0.9.odd": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"blocks\.0\.9\.odd"):
        fitting.complete(odd, now)


def test_patches_of_the_map_images_of_another_size_and_sizes_on_the_fly():
    model = timm.create_model("vitflower_b16", embed_stage=2, **(SMALL | ON_LITE)).eval()
    model.set_input_size(96, patch_size=2)
    assert model.patch_embed.grid_size == (6, 6)
    assert model.patch_embed.num_patches == 36
    assert model(images(96)).shape == (2, 5)
    with pytest.raises(ValueError, match="image is 64 x 64 px, the model was built for 96 x 96"):
        model(images())
    moving = timm.create_model("vitflower_b16", dynamic_img_size=True, **(SMALL | ON_LITE)).eval()
    assert moving(images(128)).shape == (2, 5)
    with pytest.raises(RecipeError, match="side 80 px is not a multiple of the 32 px"):
        moving(images(80))


def test_what_cannot_be_an_embedding_is_refused_with_the_remedy():
    def build(**options):
        return timm.create_model("vitflower_b16", **(SMALL | ON_LITE | options))

    with pytest.raises(RecipeError, match=r"no CNN 'resnet26e'.*\n.*resnet26"):
        build(embed="resnet26e")
    with pytest.raises(RecipeError, match="knows no CNN 'local-dir:/tmp'"):
        build(embed="local-dir:/tmp")
    with pytest.raises(RecipeError, match="no feature map 9 of tf_efficientnet_lite0"):
        build(embed_stage=9)
    with pytest.raises(RecipeError, match="'r26' has one feature map"):
        build(embed="r26", embed_stage=1)
    with pytest.raises(RecipeError, match=r"side 80 px is not .* 32 px.*\n.*use 64 or 96 px"):
        build(img_size=80)


FAMILIES = {  # the smallest of five families of CNNs: pixels per cell of each of its maps
    "resnet10t": (2, 4, 8, 16, 32),
    "efficientnet_lite0": (2, 4, 8, 16, 32),
    "convnext_atto": (4, 8, 16, 32),
    "regnetx_002": (2, 4, 8, 16, 32),
    "mobilenetv3_small_050": (2, 4, 8, 16, 32),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_cnns_embeds_learns_and_is_exported(tmp_path, name):
    options = {"embed": name, "patch_size": 1, "embed_dim": 32, "num_heads": 2, "depth": 1}
    options |= {"img_size": 64}
    for stage, pixels in enumerate(FAMILIES[name]):
        with torch.device("meta"):
            embed = timm.create_model("vitflower_ti16", embed_stage=stage, **options).patch_embed
        assert (embed.stride, embed.grid_size) == (pixels, (64 // pixels, 64 // pixels))
    past = len(FAMILIES[name])
    with pytest.raises(RecipeError, match=f"no feature map {past} of {name}"):
        timm.create_model("vitflower_ti16", embed_stage=past, **options)
    net = timm.create_model("vitflower_ti16", num_classes=3, **options)
    net(images()).square().sum().backward()
    still = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert still == []
    first = next(p for p in net.patch_embed.backbone.parameters() if p.ndim == 4)
    assert first.grad.abs().sum() > 0
    net.eval()
    config = InputConfig((64, 64), (0.5,) * 3, (0.25,) * 3)
    spec = {"options": options, "transform": asdict(plain(config))}
    product.save(net, tmp_path / "model", card(**spec), config, as_timm=False)
    again, _ = product.load(tmp_path / "model")
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = net(normalise(pixels, plain(config)))
        torch.testing.assert_close(again(normalise(pixels, plain(config))), expected)
    if name != "mobilenetv3_small_050":
        return  # seconds each
    file = tmp_path / "model.pt2"
    deployed = graph.Deployed(net, plain(config), 1.0, uint8=True)
    graph.write_pt2(deployed, plain(config), file, {graph.META: "{}"})
    logits, _ = graph.open_pt2(file, plain(config), uint8=True)(pixels)
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)


# --- files ---------------------------------------------------------------------------------------


def google_arrays(model):
    """A model of timm's under Google's names, written from timm's reader of those files."""
    out = {}
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    for name, value in state.items():
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        parts = name.split(".")
        if name.startswith("patch_embed.backbone."):
            kind = {"weight": "kernel" if value.ndim == 4 else "scale", "bias": "bias"}[parts[-1]]
            value = value if value.ndim == 4 else value.reshape(1, 1, 1, -1)
            if "stages" not in name:
                layer = {"conv": "conv_root", "norm": "gn_root"}[parts[-2]]
            else:
                layer = parts[-2].replace("norm", "gn")
                layer = {"conv": "conv_proj", "gn": "gn_proj"}.get(layer, layer)
                layer = f"block{int(parts[3]) + 1}/unit{int(parts[5]) + 1}/{layer}"
            out[f"{layer}/{kind}"] = value
        elif parts[0] == "blocks":
            _block(out, f"Transformer/encoderblock_{parts[1]}/", parts[2:], value)
        else:
            kind = {"weight": "scale" if value.ndim == 1 else "kernel"}.get(parts[-1], parts[-1])
            where = {"cls_token": "cls", "patch_embed": f"embedding/{kind}",
                     "pos_embed": "Transformer/posembed_input/pos_embedding",
                     "norm": f"Transformer/encoder_norm/{kind}",
                     "head": f"head/{kind}"}[parts[0]]  # fmt: skip
            out[where] = value.T if parts[0] == "head" else value
    return {k: np.ascontiguousarray(v) for k, v in out.items()}


def _block(out, where, parts, value):
    kind = "bias" if parts[-1] == "bias" else "kernel"
    if parts[0] in ("norm1", "norm2"):
        norm = {"norm1": 0, "norm2": 2}[parts[0]]
        out[f"{where}LayerNorm_{norm}/{'bias' if kind == 'bias' else 'scale'}"] = value
    elif parts[0] == "mlp":
        out[f"{where}MlpBlock_3/Dense_{int(parts[1][-1]) - 1}/{kind}"] = value.T
    elif parts[1] == "proj":
        heads = (2, -1) if kind == "kernel" else (-1,)
        value = value.T.reshape(*heads, value.shape[0]) if kind == "kernel" else value
        out[f"{where}MultiHeadDotProductAttention_1/out/{kind}"] = value
    else:
        for name, piece in zip(("query", "key", "value"), np.split(value, 3), strict=True):
            shaped = piece.T.reshape(piece.shape[1], 2, -1) if kind == "kernel" else piece
            shaped = shaped if kind == "kernel" else shaped.reshape(2, -1)
            out[f"{where}MultiHeadDotProductAttention_1/{name}/{kind}"] = shaped


@pytest.mark.parametrize("name", ["vitflower_hybrid_r_ti16", "vitflower_hybrid_r26_s32"])
@pytest.mark.parametrize("channels", [3, 1])
def test_google_npz_of_a_hybrid_equals_timms_reader(tmp_path, name, channels):
    tiny = SMALL | {"embed_dim": 32, "num_heads": 2, "in_chans": channels}
    source = scatter(timm.create_model(HYBRIDS[name], **(tiny | {"in_chans": 3})))
    np.savez(tmp_path / "w.npz", **google_arrays(source))
    theirs = timm.create_model(HYBRIDS[name], **tiny).eval()
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    ours = timm.create_model(name, **tiny).eval()
    whole, match, notes = fitting.complete(weights.read(tmp_path / "w.npz"), ours)
    ours.load_state_dict(whole)
    assert (match.dropped, match.new) == ({}, ())
    assert any("1 colour channels" in note for note in notes) is (channels == 1)
    x = images(channels=channels)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    title = "Google JAX (vision_transformer or big_vision), hybrid"
    assert convert.convert(weights.read(tmp_path / "w.npz")).layout == title


@pytest.mark.parametrize("name", [k for k in vitflower.SIZES if "hybrid" in k])
def test_inspect_knows_every_hybrid_from_its_file(tmp_path, name):
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=7).state_dict()
    torch.save({k: torch.tensor(0.1).expand(v.shape) for k, v in state.items()}, tmp_path / "w.pth")
    found = inspection.inspect(tmp_path / "w.pth")
    assert (found.model, found.twin) == (name, HYBRIDS.get(name, ""))
    assert (found.img_size, found.options) == (224, {"num_classes": 7})
    assert found.layout == "timm, hybrid"


def test_check_measures_a_hybrid_against_timms(tmp_path):
    tiny = {"embed_dim": 32, "num_heads": 2, "depth": 2}
    source = scatter(timm.create_model("vit_small_r26_s32_224", **SMALL | tiny))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    found = twin.compare(tmp_path / "w.pth", "vitflower_hybrid_r26_s32", options=tiny)
    assert (found.by, found.left_over, len(found.blocks)) == ("timm", {}, 2)
    assert max(*found.blocks, found.logits) < 1e-5


def test_a_hybrids_file_in_a_plain_vit_is_refused_with_the_cause():
    hybrid = timm.create_model("vitflower_b16", **(SMALL | ON_LITE))
    plain = timm.create_model("vitflower_b16", **(SMALL | {"embed_dim": 32, "num_heads": 2}))
    with pytest.raises(
        WeightsError, match="patch 1 of a CNN's map; the model has 2 blocks of width 32, patch 16"
    ):
        fitting.complete(hybrid.state_dict(), plain)
    with pytest.raises(WeightsError, match="the model has 2 blocks of width 32, patch 1 of a CNN"):
        fitting.complete(plain.state_dict(), hybrid)


def test_check_fills_a_model_of_timms_alone_in_both_ways(tmp_path):
    net = timm.create_model("resnet10t", num_classes=4)
    save_file(net.state_dict(), tmp_path / "mine.safetensors")
    found = twin.compare(tmp_path / "mine.safetensors", "resnet10t")
    assert (found.logits, found.left_over, len(found.blocks)) == (0.0, {}, 5)
    lines = found.lines()
    assert lines[0] == "timm's resnet10t, filled by vitft and by timm, built with num_classes=4"
    with pytest.raises(RecipeError, match="'no_such_net' has no twin here"):
        twin.compare(tmp_path / "mine.safetensors", "no_such_net")


# --- positions -----------------------------------------------------------------------------------


def test_two_dimensional_positions_are_a_row_half_and_a_column_half():
    model = timm.create_model(
        "vitflower_b16", pos_embed="learned2d", patch_size=16, embed_dim=8, num_heads=2,
        **(SMALL | {"img_size": (32, 48)}),
    )  # fmt: skip
    table = model.position_table()[0]  # [1 + 2 * 3, 8]
    assert table.shape == (7, 8)
    assert not table[0].any()  # the class token is its own position
    for row in range(2):
        for column in range(3):
            token = table[1 + 3 * row + column]
            torch.testing.assert_close(token[:4], model.pos_embed_y[0, row])
            torch.testing.assert_close(token[4:], model.pos_embed_x[0, column])
    similarity = maps.positions(model)
    assert similarity.shape == (2, 3, 2, 3)
    assert similarity[0, 0, 0, 0] == pytest.approx(1, abs=1e-5)
    model(torch.randn(1, 3, 32, 48)).sum().backward()
    assert model.pos_embed_x.grad.abs().sum() > 0
    assert {"pos_embed_x", "pos_embed_y"} <= model.no_weight_decay()


def test_two_dimensional_positions_stretch_with_the_image():
    options = {"pos_embed": "learned2d", "patch_size": 16, "embed_dim": 8, "num_heads": 2}
    model = timm.create_model("vitflower_b16", **(SMALL | options | {"dynamic_img_size": True}))
    x = torch.randn(1, 3, 96, 64)
    moving = model.eval()(x)
    model.set_input_size((96, 64))
    assert model.pos_embed_y.shape == (1, 6, 4)
    torch.testing.assert_close(model(x), moving)
    with pytest.raises(RecipeError, match="learned2d halves the width, got 9"):
        timm.create_model("vitflower_b16", **(SMALL | options | {"embed_dim": 9, "num_heads": 3}))


# --- in a recipe ---------------------------------------------------------------------------------

ON = ["model.embed.backbone=resnet10t", "model.embed.stage=2", "model.options={embed_dim: 32, "
      "depth: 2, num_heads: 2}"]  # fmt: skip


def cnn_file(folder, name="resnet10t"):
    torch.manual_seed(5)
    net = timm.create_model(name, num_classes=11)
    save_file(net.state_dict(), folder / "cnn.safetensors")
    return net, f"model.embed.weights={folder / 'cnn.safetensors'}"


def test_a_recipe_fills_the_cnn_and_says_what_is_random(tiny_recipe, tmp_path):
    cnn, weights_at = cnn_file(tmp_path)
    spec = tiny_recipe("full", *ON, weights_at)
    built = model.build(spec.model, classes=3, image_size=32)
    assert built.net.patch_embed.grid_size == (4, 4)
    torch.testing.assert_close(built.net.patch_embed.backbone.layer2[0].conv1.weight,
                               cnn.layer2[0].conv1.weight)  # fmt: skip
    assert built.input.mean == (0.485, 0.456, 0.406)  # the CNN's, not the ViT's
    assert set(built.report.dropped.values()) == {"comes after the feature map"}
    assert "fc.weight" in built.report.dropped
    assert "the CNN resnet10t is filled, the encoder on it is RANDOM" in built.report.notes


@pytest.mark.parametrize("frozen", [True, False])
def test_a_hybrid_is_trained_end_to_end_with_its_cnn_frozen_or_not(tiny_recipe, tmp_path, frozen):
    _, weights_at = cnn_file(tmp_path)
    p = prepare(tiny_recipe("full", *ON, weights_at, f"model.embed.frozen={str(frozen).lower()}"))
    start = {k: v.clone() for k, v in p.net.state_dict().items()}
    learn(p, Hooks())
    changed = {k for k, v in p.net.state_dict().items() if not torch.equal(v, start[k])}
    assert any(k.startswith("patch_embed.backbone.") for k in changed) is not frozen
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= changed


def test_a_hybrids_run_gives_a_product_that_loads(tiny_recipe, tmp_path):
    _, weights_at = cnn_file(tmp_path)
    result = run(tiny_recipe("full", *ON, weights_at, "train.epochs=1"))
    net, card = product.load(result.folder)
    assert net.patch_embed.stride == 8
    assert card.options["embed"] == "resnet10t"
    file = result.folder / "model" / "model.safetensors"
    found = inspection.inspect(file)
    assert (found.layout, found.model, found.twin) == (inspection.OWN, "vitflower_ti16", "")
    again = timm.create_model(found.model, **found.options)
    assert fitting.complete(weights.read(file), again)[1].new == ()


def test_what_a_recipe_cannot_mean_is_refused(tiny_recipe, tmp_path):
    _, weights_at = cnn_file(tmp_path)

    def refused(*overrides, kind=RecipeError):
        with pytest.raises(kind) as caught:
            model.build(tiny_recipe("full", *overrides).model, classes=3, image_size=32)
        return str(caught.value)

    assert "model.embed" in refused(*ON, "model.name=vit_tiny_patch16_224")
    assert "would be overwritten" in refused(*ON, weights_at, "model.weights=bundled")
    wrong = refused(*ON[1:], "model.embed.backbone=resnet18", weights_at, kind=WeightsError)
    assert "tensors of resnet18 are not in it or of another shape" in wrong
    with pytest.raises(RecipeError, match=r"model.options.patch_size: 8 cannot go with"):
        tiny_recipe("full", "model.embed.backbone=r26")
    with pytest.raises(RecipeError, match=r"model.embed.stage"):
        tiny_recipe("full", *ON, "model.options={embed_stage: 1}")
