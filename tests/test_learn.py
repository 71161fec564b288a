"""What the modes make of the keys of a recipe, seen from within the model that learns."""

import pytest
import torch
from timm.layers.patch_dropout import PatchDropout

from vitft import data, learn, model, run, train
from vitft.errors import RecipeError
from vitft.prepare import class_weight, prepare

PATCHES = 16  # of the tiny photographs: 32 px in patches of 8


class Tokens:
    """How many tokens reach the last block, with gradients and without."""

    def __init__(self, net):
        self.training, self.scoring = set(), set()
        inner = net.blocks[-1].norm1
        inner.register_forward_pre_hook(self.seen)

    def seen(self, module, args):
        (self.training if torch.is_grad_enabled() else self.scoring).add(args[0].shape[1])


@pytest.mark.parametrize("override", ["train.blocks=null", "train.blocks=1"])
def test_patches_are_left_out_in_training_and_never_in_validation(tiny_recipe, override):
    p = prepare(tiny_recipe("full", "train.patch_drop=0.5", override))
    tokens = Tokens(p.net)
    learn.learn(p, learn.Hooks())
    assert tokens.training == {1 + PATCHES // 2}
    assert tokens.scoring == {1 + PATCHES}


def test_patch_drop_works_on_timms_own_vit(tiny_recipe):
    p = prepare(tiny_recipe("full", "model.name=vit_tiny_patch16_224", "train.patch_drop=0.25"))
    tokens = Tokens(p.net)
    learn.learn(p, learn.Hooks())
    assert tokens.training == {1 + 3 * PATCHES // 4}


def test_a_model_without_patches_to_leave_out_is_refused(tiny_recipe):
    spec = ("model.name=resnet10t", "model.options={}", "train.patch_drop=0.5")
    p = prepare(tiny_recipe("full", *spec))
    text = "model.patch_drop.*train.patch_drop is 0.5, ResNet cannot leave out patches"
    with pytest.raises(RecipeError, match=text) as e:
        learn.learn(p, learn.Hooks())
    assert "set train.patch_drop: 0" in str(e.value)


def test_patches_can_be_put_back(tiny_recipe):
    net = prepare(tiny_recipe("full")).net
    model.drop_patches(net, 0.5)
    train.set_train_mode(net.requires_grad_(False))
    assert isinstance(net.patch_drop, PatchDropout)
    assert net.patch_drop.training
    model.drop_patches(net, 0.0)
    assert not isinstance(net.patch_drop, PatchDropout)


# --- the loop's other keys, on whole models ---


def weights_after(p):
    learn.learn(p, learn.Hooks())
    return {name: tensor.clone() for name, tensor in p.net.state_dict().items()}


def test_gradient_checkpointing_changes_no_weight(tiny_recipe):
    plain = weights_after(prepare(tiny_recipe("full")))
    p = prepare(tiny_recipe("full", "train.grad_checkpointing=true"))
    again = weights_after(p)
    assert p.net.grad_checkpointing
    for name, tensor in plain.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "mode", [["full"], ["head"], ["head", "head.views=online"]], ids=["full", "kept", "online"]
)
def test_a_run_may_start_from_the_probes_head_or_from_zero(tiny_recipe, mode):
    if mode == ["head"]:
        mode = ["head", "head.views=1"]  # the features that a probe sees
    still = ("train.lr=1e-12", "train.weight_decay=0", "train.epochs=1")
    solved = prepare(tiny_recipe("probe", "train.epochs=1"))
    learn.learn(solved, learn.Hooks())
    probed = prepare(tiny_recipe(*mode, "train.init_head=probe", *still))
    learn.learn(probed, learn.Hooks())
    torch.testing.assert_close(probed.net.head.weight, solved.net.head.weight, atol=1e-6, rtol=0)
    empty = prepare(tiny_recipe(*mode, "train.init_head=zero", *still))
    learn.learn(empty, learn.Hooks())
    assert float(empty.net.head.weight.detach().abs().max()) < 1e-9


@pytest.mark.parametrize("mode", ["full", "head"])
def test_the_probe_that_training_began_from_is_told(tiny_recipe, caplog, mode):
    caplog.set_level("INFO", logger="vitft")
    still = ["train.init_head=probe", "train.lr=1e-12", "train.epochs=1", "head.views=1"]
    learned = learn.learn(prepare(tiny_recipe(mode, *still)), learn.Hooks())
    assert learned.probe_start == learned.best["val_accuracy"]  # nothing has moved
    start = f"{100 * learned.probe_start:.1f} %"
    assert f"the head starts from a linear probe: val accuracy {start}\n" in caplog.text
    assert f"the model is that of epoch 1 of 1, val accuracy {start}\n" in caplog.text
    assert "no epoch came up" not in caplog.text


def test_a_training_that_falls_behind_the_probe_it_began_from_says_so(tiny_recipe, caplog):
    caplog.set_level("INFO", logger="vitft")
    wild = ["train.init_head=probe", "train.lr=3", "train.epochs=1"]
    learned = learn.learn(prepare(tiny_recipe("full", *wild)), learn.Hooks())
    assert learned.best["val_accuracy"] < learned.probe_start
    start = f"{100 * learned.probe_start:.1f} %"
    assert f"no epoch came up to the linear probe that training began from, {start}" in caplog.text


def test_what_was_trained_is_counted_in_every_mode(tiny_recipe):
    p = prepare(tiny_recipe("full", "train.epochs=1", "train.blocks=1"))
    said = learn.learn(p, learn.Hooks()).trained
    count = model.trainable(p.net)
    assert said.startswith(f"train.tune all: {count:,} of ")
    assert said.endswith(" %), in the last 1 of 2 blocks and behind them")
    for mode, kind in (("full", "train.tune all"), ("head", "head"), ("probe", "head")):
        p = prepare(tiny_recipe(mode, "train.epochs=1"))
        learned = learn.learn(p, learn.Hooks())
        every = sum(q.numel() for q in p.net.parameters())
        count = every if mode == "full" else 3 * 32 + 3
        assert learned.trained.startswith(f"{kind}: {count:,} of {every:,} parameters are trained")


@pytest.mark.parametrize("mode", [["head"], ["head", "head.views=online"], ["full"]])
def test_a_head_that_timm_draws_widely_starts_narrow(tiny_recipe, mode):
    """An EfficientNet's is drawn from +-1 / sqrt(3 classes); a ViT's stays as its seed drew it."""
    still = ("train.lr=1e-12", "train.weight_decay=0", "train.epochs=1")
    wide = prepare(tiny_recipe(*mode, "model.name=test_efficientnet", "model.options={}", *still))
    head = model.classifier(wide.net)
    assert model.starts_wide(head)
    learned = learn.learn(wide, learn.Hooks())
    assert not model.starts_wide(head)
    assert 0.01 < float(head.weight.detach().std()) < 0.03
    assert learned.history[0]["train_loss"] == pytest.approx(1.1, abs=0.25)  # ln 3
    ours = prepare(tiny_recipe(*mode, *still))
    before = model.classifier(ours.net).weight.detach().clone()
    learn.learn(ours, learn.Hooks())
    torch.testing.assert_close(model.classifier(ours.net).weight, before, atol=1e-9, rtol=0)


def test_rare_classes_weigh_more_when_they_are_told_to(tiny_recipe, tiny_photos):
    for file in sorted((tiny_photos / "red").iterdir())[10:]:
        file.unlink()
    p = prepare(tiny_recipe("full", "train.class_weights=balanced"))
    blue, green, red = class_weight(p).tolist()
    counts = p.index.labels[p.index.rows("train")]
    assert blue == green
    assert red / blue == pytest.approx((counts == 0).sum() / (counts == 2).sum())


def without_train(tiny_recipe, name, tmp_path):
    """A split.csv in which all photographs of a class are for validation and test."""
    index = prepare(tiny_recipe("full")).index
    data.write_split(index, tmp_path / "split.csv")
    lines = (tmp_path / "split.csv").read_text().splitlines()
    moved = [line.replace(",train,", ",test,") if f",{name}," in line else line for line in lines]
    (tmp_path / "split.csv").write_text("\n".join(moved) + "\n")
    return f"data.split={tmp_path / 'split.csv'}"


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_class_without_photographs_to_learn_from_weighs_nothing(tiny_recipe, tmp_path, smoothing):
    split = without_train(tiny_recipe, "green", tmp_path)
    key = f"train.label_smoothing={smoothing}"
    p = prepare(tiny_recipe("full", split, "train.class_weights=balanced", key))
    weight = class_weight(p)
    labels = p.index.labels[p.index.rows("train")]
    assert weight[1] == 0
    assert float(weight[labels].mean()) == pytest.approx(1.0)
    learned = learn.learn(p, learn.Hooks())
    answers = learn.predictions(p, p.net, "test").logits
    assert learned.history[-1]["train_loss"] < 1.1
    assert not (answers.argmax(1) == 1).any()  # smoothing would pull all towards it


@pytest.mark.parametrize("balance", ["train.class_weights", "train.sampling"])
@pytest.mark.parametrize("mode", ["head", "full", "ladder"])
def test_rare_and_missing_classes_are_balanced_to_the_end_of_the_run(
    tiny_recipe, tiny_photos, tmp_path, mode, balance
):
    """Folds for the temperature leave a rare class out of what a head learns from, too."""
    for file in sorted((tiny_photos / "red").iterdir())[3:]:
        file.unlink()
    split = without_train(tiny_recipe, "green", tmp_path)
    steps = ("ladder.steps=[logistic, head, full]", "ladder.stop=false")
    found = run.run(tiny_recipe(mode, split, f"{balance}=balanced", *steps))
    assert [row.support for row in found.scores.per_class] == [3, 17, 1]
    told = found.findings.intervals["log_loss"]  # a class unheard of may cost all there is to lose
    assert told.low - 1e-9 <= found.scores.log_loss <= told.high + 1e-9


@pytest.mark.parametrize(
    "override", [["head"], ["full"], ["full", "train.blocks=1", "train.views=1"]]
)
def test_balanced_sampling_shows_every_class_equally_often(tiny_recipe, tiny_photos, override):
    for file in sorted((tiny_photos / "red").iterdir())[6:]:
        file.unlink()
    mode, *options = override
    p = prepare(tiny_recipe(mode, "train.sampling=balanced", "train.epochs=1", *options))
    seen = []
    real = train.Trainer._update

    def update(self, pending, *args):
        seen.extend(int(y) for _, labels, _ in pending for y in labels)
        return real(self, pending, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "_update", update)
        learn.learn(p, learn.Hooks())
    counts = [seen.count(label) for label in range(3)]
    assert sum(counts) == len(p.index.rows("train"))
    assert max(counts) - min(counts) <= 1
