"""Last blocks on kept activations: the cut is clean, and training on it is training the model."""

import threading
import time

import numpy as np
import pytest
import torch
from timm import create_model
from torch.utils._python_dispatch import TorchDispatchMode

import vitft  # noqa: F401
from vitft import boundary, features, model
from vitft import learn as learn_room
from vitft.errors import RecipeError
from vitft.learn import Hooks, learn
from vitft.prepare import prepare
from vitft.store import make_key

TIMM = {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}


def ours(**options):
    torch.manual_seed(0)
    return create_model("vitflower_ti16", num_classes=3, **(TIMM | options)).eval()


def timms():
    torch.manual_seed(0)
    return create_model("vit_tiny_patch16_224", num_classes=3, **TIMM).eval()


@pytest.mark.parametrize("make", [ours, timms, lambda: ours(global_pool="avg")])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_tail_after_front_is_the_model(make, blocks):
    net, x = make(), torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        tokens = boundary.front(net, blocks)(x)
        assert tokens.shape == (4, 17, 32)
        torch.testing.assert_close(boundary.tail(net, blocks)(tokens), net(x), rtol=0, atol=1e-6)
    assert not net.blocks[-blocks]._forward_pre_hooks


def test_a_tail_shares_every_tensor_and_name_and_leaves_the_model_as_it_was():
    net = ours()
    kind, part = type(net), boundary.tail(net, 1)
    assert type(net) is kind
    mine, its = dict(net.named_parameters()), dict(part.named_parameters())
    assert list(mine) == list(its)
    assert all(mine[name] is its[name] for name in mine)
    model.set_head(model.classifier(part), torch.ones(3, 32), torch.zeros(3))
    assert net.head.weight.detach().sum() == 96


def prepared(tiny_recipe, *overrides):
    return prepare(tiny_recipe("full", "train.blocks=1", "train.augment=plain", *overrides))


def test_training_on_kept_activations_is_training_the_last_blocks(tiny_recipe):
    whole, kept = prepared(tiny_recipe), prepared(tiny_recipe, "train.views=1")
    start = {k: v.clone() for k, v in kept.net.state_dict().items()}
    wanted, got = learn(whole, Hooks()), learn(kept, Hooks())
    for a, b in zip(wanted.history, got.history, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        assert b["val_accuracy"] == a["val_accuracy"]
    end = whole.net.state_dict()
    changed = set()
    for name, tensor in kept.net.state_dict().items():
        torch.testing.assert_close(tensor, end[name], rtol=1e-3, atol=1e-4)
        changed |= set() if torch.equal(tensor, start[name]) else {name.split(".")[0]}
        if name.startswith(("patch_embed", "pos_embed", "cls_token", "blocks.0")):
            assert torch.equal(tensor, start[name])
    assert changed == {"blocks", "norm", "head"}


def test_views_are_computed_once_and_two_runs_are_equal_to_the_bit(tiny_recipe, caplog):
    caplog.set_level("INFO")

    def once():
        caplog.clear()
        p = prepare(tiny_recipe("full", "train.blocks=1", "train.views=3", "train.epochs=3"))
        learn(p, Hooks())
        return p.net.state_dict(), caplog.text

    first, told = once()
    assert "activations before the last 1 blocks: 126 computed, 0 reused" in told
    again, told = once()
    assert "activations before the last 1 blocks: 0 computed, 126 reused" in told
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_a_budget_too_small_is_said_before_anything_is_computed(tiny_recipe):
    p = prepared(tiny_recipe, "train.views=1", "train.activations_gb=1e-5")
    with pytest.raises(RecipeError) as caught:
        learn(p, Hooks())
    assert str(caught.value) == (
        "error[train.activations] command line: train.views: 51 activations of 17 x 32 values "
        "need 0.00 GB of disk, train.activations_gb allows 1e-05\n"
        "fix: raise train.activations_gb, lower train.views, or set train.views: online"
    )


def test_a_model_that_does_more_than_its_blocks_is_refused(tiny_recipe):
    p = prepared(tiny_recipe, "train.views=1")
    kind = type(p.net)
    p.net.__class__ = type("Odd", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    with pytest.raises(RecipeError, match=r"train.boundary.*cannot be cut .*relative difference"):
        learn(p, Hooks())


@pytest.mark.parametrize("kind", ["tokens", "features"])
def test_on_cuda_no_batch_of_kept_rows_waits_for_the_device(tiny_recipe, kind):
    """The meta device stands for CUDA: reading a number from it is an error."""
    far = torch.device("meta")
    p = prepared(tiny_recipe, "train.views=1")
    if kind == "tokens":
        kept = boundary.keep(p, "train", views=1)
        near, batches = (
            boundary.Tokens(kept, batch_size=8, seed=0, device=device)
            for device in (torch.device("cpu"), far)
        )
    else:
        rows = learn_room.extract(p, "train", views=2)
        near, batches = (
            features.Views(rows, batch_size=8, seed=0, device=device, names=())
            for device in (torch.device("cpu"), far)
        )
    with Waits() as seen:
        got = list(batches.epoch(1))
    assert not seen.waits
    assert len(got) == 6
    for (x, y, which), (x_near, y_near, which_near) in zip(got, near.epoch(1), strict=True):
        assert (x.device, y.device, which.device.type) == (far, far, "cpu")
        assert (x.shape, y.shape) == (x_near.shape, y_near.shape)
        assert torch.equal(which, which_near)


@pytest.mark.parametrize("start", [0, 4])
def test_the_next_batch_is_read_while_one_is_learned_from(tiny_recipe, monkeypatch, start):
    p = prepared(tiny_recipe, "train.views=2", "train.augment=tutorial")
    kept, begun, read = boundary.keep(p, "train", views=2), [], boundary.Kept.read

    def noted(self, room, rows, views):
        begun.append(threading.current_thread())
        read(self, room, rows, views)

    monkeypatch.setattr(boundary.Kept, "read", noted)
    tokens = boundary.Tokens(kept, batch_size=8, seed=3, device=torch.device("cpu"))
    steps = range(start, len(tokens))
    drawn = tokens.drawn(1).tolist()
    for k, (x, y, rows) in enumerate(tokens.epoch(1, start), 1):
        deadline = time.monotonic() + 10
        while len(begun) < min(k + 1, len(steps)) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(begun) == min(k + 1, len(steps))
        keys = [make_key(kept.photos.sha256[row], drawn[row]) for row in rows.tolist()]
        assert np.array_equal(x.flatten(1), [kept.space.get(key) for key in keys])
        assert np.array_equal(y, kept.photos.labels[rows])
    assert threading.main_thread() not in begun
    monkeypatch.setattr(boundary.Kept, "read", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(tokens.epoch(1))


class Waits(TorchDispatchMode):
    """Notes what on CUDA waits for the queue: copies that block, and indices on another device."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        blocks = func is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking")
        indices = args[1] if func is torch.ops.aten.index.Tensor else []
        mixed = any(i is not None and i.device != args[0].device for i in indices)
        if mixed or (blocks and kwargs.get("device") == torch.device("meta")):
            self.waits.append(str(func))
        return func(*args, **kwargs)
