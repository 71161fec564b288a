"""Steps on a GPU that is not there: every tensor on the right device, and no number read back.

torch's fake tensors carry shapes and devices without values. Mixing devices is an error as it is on
CUDA, and reading a number, which there would wait for the queue, cannot be done at all. What needs
the driver itself (the backward pass, fused SGD, streams) is left out or played.
"""

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    unset_fake_temporarily,
)

import vitft  # noqa: F401
from vitft import boundary, evaluate, features, inputs, loaders, model, tune
from vitft.recipe import TrainSpec
from vitft.regime import set_train_mode
from vitft.train import Trainer

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one"),
    pytest.mark.filterwarnings("ignore:.*Disabling autocast:UserWarning"),
]
GPU = torch.device("cuda:0")
SIZE, SIDE, CLASSES = 6, 32, 5
OURS = {"img_size": SIDE, "depth": 2, "embed_dim": 48, "num_heads": 2}
BATCHES = type("Batches", (), {"batch_size": SIZE, "__len__": lambda self: 10})()


@pytest.fixture
def gpu(monkeypatch):
    """While it lasts new tensors are fake, and a backward pass leaves gradients of zero."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    inputs._channels.cache_clear()
    with FakeTensorMode() as mode:
        yield mode
    inputs._channels.cache_clear()


def placed(mode, name, **options):
    """A model whose parameters and buffers are on the fake GPU."""
    with unset_fake_temporarily():
        net = timm.create_model(name, num_classes=CLASSES, **options)
    for module in net.modules():
        for k, p in module._parameters.items():
            if p is not None:
                module._parameters[k] = nn.Parameter(mode.from_tensor(p).detach().to(GPU))
        for k, b in module._buffers.items():
            if b is not None:
                module._buffers[k] = mode.from_tensor(b).to(GPU)
    return net


def steps(net, monkeypatch, spec, *, x=None, soft=False, weights=False):
    def backward(self):
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    weight = torch.rand(CLASSES, device=GPU) if weights else None
    options = {"opt": "adamw", "compile": False} | spec
    t = Trainer(
        net, BATCHES, TrainSpec(**options), seed=0, validate=None, soft=soft, class_weight=weight
    )
    set_train_mode(net)
    x = torch.randn(SIZE, 3, SIDE, SIDE, device=GPU) if x is None else x
    y = torch.zeros(SIZE, dtype=torch.int64, device=GPU)
    y = torch.rand(SIZE, CLASSES, device=GPU) if soft else y
    for _ in range(2):
        t._update([(x, y, torch.arange(SIZE))] * t.spec.accumulate, SIZE * t.spec.accumulate)
    slots = [v for slot in t.stepper.optimizer.state.values() for v in slot.values()]
    assert {v.device for v in [*net.parameters(), *slots]} == {GPU}
    assert t.state.loss_sum.device == GPU


@pytest.mark.parametrize(
    ("spec", "options", "how"),
    [
        ({"clip_grad": 1.0, "label_smoothing": 0.1}, {"drop_path_rate": 0.1}, {}),
        ({"accumulate": 2, "layer_decay": 0.7}, {"patch_drop_rate": 0.5}, {"weights": True}),
        ({"amp": "none"}, {"drop_rate": 0.1}, {"soft": True, "weights": True}),
        ({"opt": "lion"}, {"pos_embed": "sincos2d", "global_pool": "avg"}, {}),
    ],
)
def test_a_step_mixes_no_devices_and_reads_no_number(gpu, monkeypatch, spec, options, how):
    steps(placed(gpu, "vitflower_ti16", **OURS, **options), monkeypatch, spec, **how)


@pytest.mark.parametrize("name", ["test_efficientnet", "vit_tiny_patch16_224"])
def test_nor_does_one_of_timms_models(gpu, monkeypatch, name):
    options = {"img_size": SIDE, "depth": 2} if "vit" in name else {}
    steps(placed(gpu, name, **options), monkeypatch, {})


@pytest.mark.parametrize("kind", ["lora", "bitfit", "norm"])
def test_nor_do_few_parameters(gpu, monkeypatch, kind):
    net = placed(gpu, "vitflower_ti16", **OURS)
    tune.apply(net, TrainSpec(tune=kind), seed=1)
    steps(net, monkeypatch, {"tune": kind})


def test_nor_does_the_tail_on_kept_tokens(gpu, monkeypatch):
    net = placed(gpu, "vitflower_ti16", **OURS)
    with torch.inference_mode():
        tokens = boundary.front(net.eval(), 1)(torch.randn(SIZE, 3, SIDE, SIDE, device=GPU))
    assert tokens.device == GPU
    model.choose_trained(net, 1, frozen_cnn=False)
    x = torch.randn(tokens.shape, device=GPU)
    steps(boundary.tail(net, 1), monkeypatch, {"blocks": 1}, x=x)


@pytest.mark.parametrize("mixing", [{"mixup": 0.2, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}])
@pytest.mark.parametrize("size", [SIZE, SIZE - 1])
def test_nor_does_a_batch_on_its_way(gpu, mixing, size):
    pixels = torch.zeros(size, 3, SIDE, SIDE, dtype=torch.uint8, device=GPU)
    x = inputs.normalise(pixels, SimpleNamespace(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)))
    inputs.erase(x[0], 1.0, 3)
    with inputs.seeded(3):
        y = loaders._mix(
            loaders._mixup(**mixing, classes=CLASSES),
            x,
            torch.zeros(size, dtype=torch.int64, device=GPU),
        )
    assert x.device == y.device == GPU


def test_nor_do_features(gpu):
    net = placed(gpu, "vitflower_ti16", **OURS).eval()
    with torch.inference_mode():
        x = torch.randn(SIZE, 3, SIDE, SIDE, device=GPU)
        assert evaluate.in_fixed_shape(features.backbone_of(net), x).device == GPU


def test_a_number_that_is_read_would_be_noticed(gpu, monkeypatch):
    net = placed(gpu, "vitflower_ti16", **OURS)
    net.head.register_forward_hook(lambda module, given, out: float(out.sum()))
    with pytest.raises(DataDependentOutputException):
        steps(net, monkeypatch, {})
