"""Few parameters are trained, no other one moves, and the product is a model like any other."""

import importlib

import pytest
import timm
import torch
from rows import interrupted
from safetensors.torch import load_file
from torch import nn

import vitft  # noqa: F401  (registers the names)
from vitft import learn, model, product, tune
from vitft.errors import RecipeError, VitftError
from vitft.learn import Hooks
from vitft.plan import plan
from vitft.prepare import prepare
from vitft.recipe import TrainSpec
from vitft.run import run

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def net_of(name="vitflower_ti16"):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **TINY).eval()


def trainable(net):
    return {n for n, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["vitflower_ti16", "vit_tiny_patch16_224"])
def test_lora_starts_as_the_model_and_merges_to_what_it_became(name):
    net = net_of(name)
    keys, before = list(net.state_dict()), net(X).detach()
    tune.apply(net, TrainSpec(tune="lora", lora_rank=4), seed=0)
    torch.testing.assert_close(net(X), before, rtol=0, atol=1e-6)  # B is zero
    assert trainable(net) == {
        f"blocks.{i}.{layer}.lora_{half}"
        for i in range(2) for layer in tune.LAYERS.values() for half in "ab"
    } | {"head.weight", "head.bias"}  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    trained = net(X).detach()
    assert (trained - before).abs().max() > 0.1
    assert tune.merge(net, X) < 1e-5
    torch.testing.assert_close(net(X), trained, rtol=1e-5, atol=1e-5)
    assert list(net.state_dict()) == keys
    assert all(type(m) is not tune.LoraLinear for m in net.modules())
    assert tune.merge(net, X) == 0.0


def test_lora_by_hand_and_its_gradients():
    net = net_of()
    layer = net.blocks[0].mlp.fc1
    tune.apply(net, TrainSpec(tune="lora", lora_rank=2, lora_alpha=6.0, lora_on=("fc1",)), seed=3)
    assert type(net.blocks[0].attn.qkv) is nn.Linear
    nn.init.ones_(layer.lora_b)
    x = torch.randn(5, 32)
    expected = x @ layer.weight.T + layer.bias + 3.0 * (x @ layer.lora_a.T) @ layer.lora_b.T
    torch.testing.assert_close(layer(x), expected)
    net(X).sum().backward()
    assert layer.weight.grad is None
    assert layer.lora_a.grad.abs().sum() > 0
    again = net_of()
    tune.apply(again, TrainSpec(tune="lora", lora_rank=2, lora_on=("fc1",)), seed=3)
    assert torch.equal(again.blocks[0].mlp.fc1.lora_a, layer.lora_a)


@pytest.mark.parametrize("kind", ["bitfit", "norm"])
@pytest.mark.parametrize("blocks", [None, 1])
def test_biases_or_norms_and_the_head_are_trainable_and_nothing_else(kind, blocks):
    net = net_of()
    tune.apply(net, TrainSpec(tune=kind, blocks=blocks), seed=0)
    names = [n for n, _ in net.named_parameters()]
    if kind == "bitfit":
        wanted = {n for n in names if n.endswith(".bias")}
    else:
        wanted = {n for n in names if "norm" in n}
    if blocks:
        wanted = {n for n in wanted if n.startswith(("blocks.1.", "norm.", "head."))}
    assert trainable(net) == wanted | {"head.weight", "head.bias"}


@pytest.mark.parametrize("kind", ["lora", "bitfit", "norm"])
@pytest.mark.parametrize("blocks", [None, 1])
def test_what_is_planned_is_what_is_trained(kind, blocks):
    net, spec = net_of(), TrainSpec(tune=kind, blocks=blocks, lora_rank=3)
    count = tune.planned(net, spec)
    tune.apply(net, spec, seed=0)
    assert count == model.trainable(net)
    every = sum(p.numel() for p in net.parameters())
    assert tune.sentence(net, kind).startswith(f"{kind}: {count:,} of {every:,} parameters are")


def test_models_without_a_vits_layers_are_refused_by_name():
    with pytest.raises(RecipeError, match=r"model.tune.*ResNet has no blocks"):
        tune.apply(timm.create_model("resnet10t"), TrainSpec(tune="lora"), seed=0)
    with torch.device("meta"):
        net = timm.create_model("tf_efficientnet_lite0")
    with pytest.raises(RecipeError, match=r"EfficientNet has no linear layer blocks.0.attn.qkv"):
        tune.planned(net, TrainSpec(tune="norm"))


def test_a_merge_that_changes_the_answers_is_refused():
    net = net_of()
    tune.apply(net, TrainSpec(tune="lora"), seed=0)
    layer = net.blocks[0].attn.qkv
    nn.init.ones_(layer.lora_b)
    layer.register_forward_hook(lambda m, i, out: out * (2 if hasattr(m, "lora_a") else 1))
    with pytest.raises(VitftError, match="train.merge"):
        tune.merge(net, X)


# --- in a run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "bitfit", "norm"])
@pytest.mark.parametrize("views", ["online", "1"])
def test_training_changes_what_was_named_and_no_other_bit(tiny_recipe, kind, views):
    cut = ["train.blocks=1", "train.views=1", "train.augment=plain"] if views == "1" else []
    p = prepare(tiny_recipe("full", f"train.tune={kind}", *cut))
    start = {k: v.clone() for k, v in p.net.state_dict().items()}
    learn.learn(p, Hooks())
    end = p.net.state_dict()
    assert list(end) == list(start)
    changed = {k for k in end if not torch.equal(end[k], start[k])}
    if kind == "lora":
        may = {k for k in end if k.endswith((".qkv.weight", ".proj.weight", "fc1.weight",
                                             "fc2.weight")) and k.startswith("blocks")}  # fmt: skip
    else:
        may = {k for k in end if (k.endswith(".bias") if kind == "bitfit" else "norm" in k)}
    if views == "1":
        may = {k for k in may if k.startswith(("blocks.1.", "norm."))}
    assert changed == may | {"head.weight", "head.bias"}


def test_a_frozen_part_that_moves_is_told(tiny_recipe, monkeypatch):
    p = prepare(tiny_recipe("full", "train.tune=bitfit"))
    merge = tune.merge
    fit = learn.fit

    def spoil(p, *args, **kwargs):
        result = fit(p, *args, **kwargs)
        p.net.blocks[0].attn.qkv.weight.data[0, 0] += 1
        return result

    monkeypatch.setattr(learn, "fit", spoil)
    with pytest.raises(VitftError, match="train.not_frozen"):
        learn.learn(p, Hooks())
    assert tune.merge is merge


@pytest.mark.parametrize("blocks", ["null", "1"])
def test_a_killed_lora_run_is_resumed_to_the_same_bits_and_its_product_is_ordinary(
    tiny_recipe, monkeypatch, blocks
):
    options = ["train.checkpoint_minutes=0", "train.ema=0.9", "train.tune=lora"]
    options.append(f"train.blocks={blocks}")
    whole = run(tiny_recipe("full", *options))
    interrupted(monkeypatch, tiny_recipe("full", *options), after=4)
    resumed = run(tiny_recipe("full", *options), resume="auto")
    a, b = (load_file(r.folder / "model" / "model.safetensors") for r in (whole, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a)
    net, _ = product.load(whole.folder)
    assert list(net.state_dict()) == list(net_of().state_dict())
    start = prepare(tiny_recipe("full", *options)).net.state_dict()
    changed = {
        k.split(".")[1] for k in a if k.startswith("blocks.") and not torch.equal(a[k], start[k])
    }
    assert changed == ({"0", "1"} if blocks == "null" else {"1"})
    log = (whole.folder / "log.txt").read_text()
    assert "train.tune lora: " in log
    assert "adapters merged into the weights; logits differ by" in log


def test_the_plan_counts_what_tuning_trains(tiny_recipe):
    p = prepare(tiny_recipe("full", "train.tune=norm"))
    every = sum(q.numel() for q in p.net.parameters())
    count = 2 * 5 * 32 + 3 * 32 + 3  # five norms and the head
    assert f"trainable parameters: {count:,} of {every:,}\n" in plan(p)


HYBRID = ("model.name=vitflower_ti16", "model.options={depth: 2, embed_dim: 32, num_heads: 2}",
          "model.embed.backbone=resnet10t", "model.embed.frozen=true")  # fmt: skip


@pytest.mark.parametrize(
    "keys",
    [("train.blocks=1",), ("train.blocks=1", "train.tune=lora"), HYBRID,
     (*HYBRID, "train.tune=bitfit"), (*HYBRID, "train.tune=lora")],
)  # fmt: skip
def test_the_plan_counts_what_will_be_trained(tiny_recipe, keys):
    p = prepare(tiny_recipe("full", *keys, "train.epochs=1"))
    said = next(line for line in plan(p).splitlines() if line.startswith("trainable parameters"))
    trained = learn.learn(p, Hooks()).trained
    assert said.split()[2] == trained.split(": ")[1].split()[0]


def test_the_plan_of_kept_activations_runs_the_last_blocks_alone(tiny_recipe, monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("vitft.plan"), "_speed", lambda prepared: (0.1, 0.05)
    )
    cut = ("train.blocks=1", "train.views=1", "train.augment=plain", "train.init_head=probe")
    p = prepare(tiny_recipe("full", "train.epochs=4", *cut))
    n = {split: len(p.index.rows(split)) for split in ("train", "val", "test")}
    once = (2 * n["train"] + 2 * n["val"] + n["test"]) / 0.1  # probe and activations; test
    step = 1 / 0.05 - 0.5 / 0.1  # one of two blocks is not run through
    seconds = once + 4 * (n["train"] * step + n["val"] * 0.5 / 0.1)
    assert f"expected: {seconds / 60:.1f} minutes" in plan(p)


def test_adapters_that_would_be_ignored_are_a_conflict(tiny_recipe):
    with pytest.raises(RecipeError, match=r"train.tune: lora cannot go with mode: probe"):
        tiny_recipe("probe", "train.tune=lora")
    with pytest.raises(RecipeError, match=r"train.lora_rank: 4 cannot go with train.tune: all"):
        tiny_recipe("full", "train.lora_rank=4")
    with pytest.raises(RecipeError, match="a list of qkv, proj, fc1, fc2, each once"):
        tiny_recipe("full", "train.tune=lora", "train.lora_on=[qkv, qkv]")


def test_dropout_works_inside_blocks_that_are_trained_in_part():
    from vitft.regime import set_train_mode

    net = timm.create_model("vitflower_ti16", drop_path_rate=0.5, drop_rate=0.1, **TINY)
    tune.apply(net, TrainSpec(tune="lora", blocks=1), seed=0)
    set_train_mode(net)
    assert net.blocks[1].drop_path1.training
    assert net.head_drop.training
    assert not net.blocks[0].attn.attn_drop.training
    assert not net.blocks[1].norm1.training
    assert not net.pos_drop.training
