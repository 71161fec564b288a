"""`inspect` is right about every file, and `check` measures ours against timm's."""

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from rows import TINY, make_product, network
from safetensors.torch import save_file

import vitft  # noqa: F401  (registers the names)
from vitft import blocks, cli, convert, fitting, inspection, twin, vitflower, weights
from vitft.errors import RecipeError, WeightsError

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 4, "patch_size": 8, "img_size": 32}


def spread(shapes):
    """Cheap tensors of given shapes: one value each, repeated."""
    return {k: torch.tensor(0.01 * (i + 1)).expand(v) for i, (k, v) in enumerate(shapes.items())}


def file_of(path, name, *, rename=lambda k: k, extra=None, **options):
    """A file with the names and full shapes of a vitflower model, at no cost."""
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    state = spread({rename(k): v.shape for k, v in model.state_dict().items()})
    torch.save(state | spread(extra or {}), path)
    return path


@pytest.mark.parametrize("name", vitflower.SIZES)
def test_every_name_is_recognised_from_its_own_file(tmp_path, name):
    found = inspection.inspect(file_of(tmp_path / "w.pth", name, num_classes=7))
    assert found.model == name
    assert found.twin == vitflower.TWINS.get(name, "")
    assert found.img_size == 224
    assert found.options == {"num_classes": 7}
    assert found.kind == "PyTorch"
    assert found.head == "7 classes"
    assert "class token + " in found.tokens


def test_the_historical_file_is_described(tmp_path):
    path = file_of(tmp_path / "w.pth", "vitflower_b16", num_classes=21843, representation_size=768)
    found = inspection.inspect(path)
    assert found.layout == "timm (historical, with pre_logits)"
    assert found.head == "21,843 classes through a layer of 768"
    assert found.parameters == 103_186_515
    assert found.call == (
        'timm.create_model("vitflower_b16", num_classes=21843, representation_size=768)'
    )
    assert found.licence.startswith("Apache-2.0 for what this project published")
    lines = "\n".join(found.lines())
    assert "tensors:   154 (154 float32), 103,186,515 values" in lines
    assert "image:     224 px, class token + 14 x 14 patches; 12 blocks of width 768" in lines
    assert f"sha256:    {weights.open_file(path).sha256}" in lines


def test_registers_layer_scale_and_another_size_become_options(tmp_path):
    options = {"reg_tokens": 4, "no_embed_class": True, "img_size": 518, "num_classes": 0}
    path = file_of(tmp_path / "w.pth", "vitflower_s14", **options)
    found = inspection.inspect(path)
    assert found.model == "vitflower_s14"
    assert found.img_size == 518
    assert found.options == {"num_classes": 0, "reg_tokens": 4, "no_embed_class": True}
    built = timm.create_model(found.model, img_size=found.img_size, **found.options)
    assert fitting.complete(weights.read(path), built)[1].new == ()


def test_pre_training_parts_are_listed_with_their_reason(tmp_path):
    extra = {"mask_token": (1, 1, 512), "decoder_pred.weight": (768, 512)}
    found = inspection.inspect(
        file_of(tmp_path / "w.pth", "vitflower_b16", num_classes=0, extra=extra)
    )
    assert found.layout == "MAE, pre-training"
    assert found.licence.startswith("CC-BY-NC-4.0")
    assert found.left_out == {
        "mask token of pre-training": ["mask_token"],
        "decoder of pre-training": ["decoder_pred.weight"],
    }
    assert any("left out:  1 (mask_token): mask token" in line for line in found.lines())
    assert found.head == "none"


def test_a_prefix_and_a_container_are_noted(tmp_path):
    path = file_of(
        tmp_path / "w.pth", "vitflower_ti16", rename=lambda k: f"backbone.{k}", num_classes=0
    )
    torch.save({"state_dict": torch.load(path), "epoch": 3}, path)
    found = inspection.inspect(path)
    assert found.model == "vitflower_ti16"
    assert found.notes == (
        "took 'state_dict' out of state_dict, epoch",
        "all names begin with 'backbone.'",
    )


def test_what_is_no_vit_is_told_by_family_and_file_name(tmp_path):
    net = timm.create_model("resnet10t", num_classes=1000)
    save_file(net.state_dict(), tmp_path / "resnet10t.safetensors", metadata={"license": "mit"})
    found = inspection.inspect(tmp_path / "resnet10t.safetensors")
    assert (found.model, found.layout) == ("resnet10t", "a ResNet")
    assert found.licence == "mit (the file's own word)"
    other = (tmp_path / "resnet10t.safetensors").rename(tmp_path / "mine.safetensors")
    found = inspection.inspect(other)
    assert found.model == ""
    assert "fits:      no model known from its names and shapes" in found.lines()
    wrong = other.rename(tmp_path / "resnet18.safetensors")
    assert inspection.inspect(wrong).model == ""


def test_a_hub_folder_tells_its_licence(tmp_path):
    file_of(tmp_path / "pytorch_model.bin", "vitflower_ti16", num_classes=0)
    config = {"pretrained_cfg": {"license": "apache-2.0"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert inspection.inspect(tmp_path / "pytorch_model.bin").licence == (
        "apache-2.0 (config.json beside it)"
    )
    (tmp_path / "config.json").write_text("{")
    assert inspection.inspect(tmp_path / "pytorch_model.bin").licence == ""


def small(path, **options):
    torch.manual_seed(0)
    model = timm.create_model("vitflower_b16", **(SMALL | {"num_classes": 5} | options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    torch.save(model.state_dict(), path)
    return path


OVER = {k: v for k, v in SMALL.items() if k != "img_size"}


@pytest.mark.parametrize(
    ("options", "by"),
    [
        ({}, "timm"),
        ({"init_values": 0.1, "reg_tokens": 2}, "timm"),
        ({"global_pool": "avg"}, "timm"),
        ({"pre_norm": True}, "timm"),
        ({"representation_size": 24}, "timm"),
        ({"img_size": 48}, "timm"),
    ],
    ids=str,
)
def test_check_finds_no_difference_where_there_is_none(tmp_path, options, by):
    path = small(tmp_path / "w.pth", **options)
    found = twin.compare(path, "vitflower_b16", options=OVER)
    assert found.by == by
    assert len(found.blocks) == 2
    assert max(*found.blocks, found.features, found.logits) < 1e-5
    assert found.scale > 0.01
    assert found.left_over == {}
    again = twin.compare(path, "vit_base_patch16_224", options=OVER)
    assert again == found


def test_check_says_when_timm_cannot_read_the_names(tmp_path):
    from torchvision.models import VisionTransformer

    torch.save(VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5).state_dict(), tmp_path / "w")
    found = twin.compare(tmp_path / "w", "vitflower_b16", options=OVER)
    assert found.by == "vitft"
    assert found.logits < 1e-5
    lines = found.lines()
    assert "timm cannot read these names; its model was given the converted tensors" in lines
    assert "note: names converted from torchvision" in lines
    assert any(line.startswith("block  1: largest difference") for line in lines)


def test_check_measures_a_difference_where_there_is_one(tmp_path, monkeypatch):
    path = small(tmp_path / "w.pth")
    monkeypatch.setattr(blocks.Attention, "forward", lambda self, x: 0.9 * x)
    found = twin.compare(path, "vitflower_b16", options=OVER)
    assert min(found.blocks) > 0.01


def test_check_of_google_weights_goes_through_timms_reader(tmp_path):
    from test_convert import jax_arrays

    np.savez(tmp_path / "w.npz", **jax_arrays())
    found = twin.compare(tmp_path / "w.npz", "vitflower_b16", options=OVER)
    assert (found.by, found.left_over) == ("timm", {})
    assert found.logits < 1e-5


def test_check_refuses_a_name_without_a_twin_and_a_file_of_another_size(tmp_path):
    path = small(tmp_path / "w.pth")
    with pytest.raises(RecipeError, match="'vitflower_x' has no twin here"):
        twin.compare(path, "vitflower_x")
    with pytest.raises(WeightsError, match="looks like a ViT; the model is a ResNet"):
        twin.compare(path, "resnet10t")
    with pytest.raises(WeightsError, match="2 blocks of width 32"):
        twin.compare(path, "vitflower_b16")


def test_the_door_prints_lines_or_json(tmp_path, capsys):
    path = small(tmp_path / "w.pth")
    assert weights.main(["inspect", str(path)]) == 0
    assert "layout:    timm" in capsys.readouterr().out
    assert weights.main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 32
    arguments = ["check", str(path), "--model", "vitflower_b16"]
    assert weights.main([*arguments, "--with", *(f"{k}={v}" for k, v in OVER.items())]) == 0
    assert "32 tensors loaded, 0 left over" in capsys.readouterr().out
    assert cli.door(weights.main, ["inspect", str(tmp_path / "no.pth")]) == 4
    assert "error[ckpt.missing]" in capsys.readouterr().err
    assert cli.door(weights.main, [*arguments, "--with", "depth"]) == 2
    assert "error[cli.option] depth: is no key=value" in capsys.readouterr().err


def test_the_module_runs_without_a_warning(tmp_path):
    path = small(tmp_path / "w.pth")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "vitft.weights", "inspect", str(path)],
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert "fits:" in done.stdout


def test_names_from_a_file_cannot_write_to_the_terminal(tmp_path, capsys):
    torch.save({"\x1b[2Jname": torch.ones(1)}, tmp_path / "w.pth")
    assert weights.main(["inspect", str(tmp_path / "w.pth")]) == 0
    assert "\x1b" not in capsys.readouterr().out
    save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors", metadata={"\x1b[2J": "\x1b[31m"})
    assert weights.main(["inspect", str(tmp_path / "w.safetensors")]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_product_is_what_its_card_says(tmp_path):
    """Of another width than any name, with heads that no tensor shows."""
    made = make_product(tmp_path / "run" / "model", network(act_layer="gelu_tanh", depth=2),
                        options=TINY | {"act_layer": "gelu_tanh", "depth": 2})  # fmt: skip
    found = inspection.inspect(made / "model.safetensors")
    assert (found.layout, found.model, found.twin) == (
        inspection.OWN, "vitflower_ti16", "vit_tiny_patch16_224",
    )  # fmt: skip
    assert found.options["num_heads"] == 2
    built = timm.create_model(found.model, **found.options)
    whole, match, _ = fitting.complete(weights.read(made / "model.safetensors"), built)
    assert (match.new, match.dropped) == ((), {})
    assert "act_layer='gelu_tanh'" in found.call
    state = weights.read(made / "model.safetensors")
    save_file(state, tmp_path / "w.safetensors", metadata={"vitft": '{"architecture": "x"}'})
    assert (
        inspection.inspect(tmp_path / "w.safetensors").layout == "timm"
    )  # no Card that can be believed


def test_a_clip_tower_under_timms_names_is_told_its_epsilon_and_asked_its_activation(tmp_path):
    path = file_of(tmp_path / "w.pth", "vitflower_b32", pre_norm=True, num_classes=512)
    found = inspection.inspect(path)
    assert found.layout == "timm (CLIP tower)"
    assert found.options == {"num_classes": 512, "pre_norm": True, "norm_eps": 1e-5}
    assert any("act_layer: quick_gelu" in note for note in found.notes)


@pytest.mark.shared
def test_the_real_files_are_recognised(real_weights):
    found = inspection.inspect(real_weights / "dinov2_vits14_imgfocus.fp16.safetensors")
    assert (found.model, found.twin) == ("vitflower_s14", "vit_small_patch14_dinov2")
    assert (found.img_size, found.options) == (518, {"num_classes": 0})
    assert found.parameters == 22_056_192
    assert found.layout == "timm (LayerScale, as DINOv2)"
    assert found.licence == "Apache-2.0 and MIT (named in the file's header)"
    found = inspection.inspect(real_weights / "tf_efficientnet_lite0.safetensors")
    assert (found.model, found.layout) == ("tf_efficientnet_lite0", "an EfficientNet or MobileNet")
    assert found.licence == "Apache-2.0 (named in the file's header)"


@pytest.mark.shared
def test_the_real_weights_check_out_at_224_px(real_weights):
    path = real_weights / "dinov2_vits14_imgfocus.fp16.safetensors"
    found = twin.compare(path, "vitflower_s14", img_size=224)
    assert found.by == "timm"
    assert max(found.blocks) < 1e-5
    assert found.logits < 1e-5
    assert (found.loaded, found.left_over) == (174, {})


# --- files of the owners, at full size -----------------------------------------------------------


def owner_files():
    """(library, how to build it without memory, what inspect must find)."""

    def torchvision():
        from torchvision.models import vit_b_16

        return vit_b_16().state_dict()

    def hf_vit(hf):
        return hf.ViTForImageClassification(hf.ViTConfig(num_labels=1000)).state_dict()

    def hf_dinov2(hf):
        config = hf.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518,
                                 patch_size=14)  # fmt: skip
        return hf.Dinov2Model(config).state_dict()

    def hf_registers(hf):
        config = hf.Dinov2WithRegistersConfig(hidden_size=384, num_attention_heads=6,
                                              image_size=518, patch_size=14)  # fmt: skip
        return hf.Dinov2WithRegistersModel(config).state_dict()

    def hf_clip(hf):
        config = hf.CLIPVisionConfig(patch_size=32)
        return hf.CLIPVisionModelWithProjection(config).state_dict()

    def clip(open_clip):
        tower = open_clip.transformer.VisionTransformer(224, 32, 768, 12, 12, 4.0, output_dim=512)
        return {f"visual.{k}": v for k, v in tower.state_dict().items()}

    face = "Hugging Face transformers"
    clips = {"num_classes": 512, "pre_norm": True, "norm_eps": 1e-5}
    return [
        ("torchvision", lambda _: torchvision(), "torchvision", "vitflower_b16", 224,
         {"num_classes": 1000}),
        ("transformers", hf_vit, face, "vitflower_b16", 224, {"num_classes": 1000}),
        ("transformers", hf_dinov2, face, "vitflower_s14", 518, {"num_classes": 0}),
        ("transformers", hf_registers, face, "vitflower_s14", 518,
         {"num_classes": 0, "reg_tokens": 4, "no_embed_class": True}),
        ("transformers", hf_clip, "CLIP (Hugging Face transformers)", "vitflower_b32", 224, clips),
        ("open_clip", clip, "CLIP (OpenAI or OpenCLIP)", "vitflower_b32", 224, clips),
    ]  # fmt: skip


@pytest.mark.parametrize("case", owner_files(), ids=lambda c: getattr(c[1], "__name__", c[0]))
def test_inspect_knows_the_owners_files_and_its_answer_builds_a_model_that_fits(tmp_path, case):
    library, make, layout, name, side, options = case
    owner = pytest.importorskip(library)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in make(owner).items() if v.is_floating_point()}
    torch.save(spread(shapes), tmp_path / "w.pth")
    found = inspection.inspect(tmp_path / "w.pth")
    assert (found.layout, found.model, found.img_size) == (layout, name, side)
    assert {k: found.options.get(k) for k in options} == options
    assert any("quick_gelu" in note for note in found.notes) is layout.startswith("CLIP")
    with torch.device("meta"):
        built = timm.create_model(found.model, img_size=side, **found.options)
    state = convert.convert(weights.read(tmp_path / "w.pth")).state
    own = {k: v.shape for k, v in built.state_dict().items() if k != "pos_embed"}
    assert {k: state[k].shape for k in own} == own
