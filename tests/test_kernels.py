"""Linear layers through oneDNN: torch's own answer, gradient and shape, for what they serve."""

import pytest
import torch
import torch.nn.functional as F
from timm import create_model
from torch import nn

import vitft  # noqa: F401  (registers the models)
from vitft import kernels
from vitft.evaluate import fixed_batch, in_fixed_shape

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def convolutions(monkeypatch):
    """How many linear layers went the other way."""
    calls = []
    real = kernels._product
    monkeypatch.setattr(kernels, "_product", lambda *a, **k: calls.append(a) or real(*a, **k))
    return calls


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("shape", [(16, 5, 192), (16, 1, 192), (16, 3, 4, 192), (20, 7, 192)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_torch(shape, bias, threads, convolutions):
    layer, x = nn.Linear(192, 256, bias=bias), rand(*shape).requires_grad_()
    wanted = layer(x)
    wanted.square().sum().backward()
    gradients = [x.grad.clone(), *(p.grad.clone() for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    with kernels.fast_linear(CPU):
        got = layer(x)
    got.square().sum().backward()
    assert len(convolutions) == 1
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip([x.grad, *(p.grad for p in layer.parameters())], gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_arguments_by_name_are_torchs_own_business():
    x, weight = rand(2, 5, 16), rand(8, 16)
    with kernels.fast_linear(CPU):
        got = F.linear(input=x, weight=weight)
    assert torch.equal(got, F.linear(x, weight))


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (rand(16, 192), rand(256, 192)),  # a head
        (rand(16, 5, 192).double(), rand(256, 192).double()),
        (rand(0, 5, 192), rand(256, 192)),
    ],
)
def test_what_it_does_not_serve_goes_torchs_way(x, weight, convolutions):
    with kernels.fast_linear(CPU):
        got = F.linear(x, weight)
    assert not convolutions
    assert torch.equal(got, F.linear(x, weight))


def test_heads_go_along_where_asked(convolutions):
    x, weight, bias = rand(16, 192), rand(3, 192), rand(3)
    with kernels.fast_linear(CPU, heads=True):
        got = F.linear(x, weight, bias)
    assert len(convolutions) == 1
    torch.testing.assert_close(got, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["vitflower_ti16", "vit_tiny_patch16_224", "tf_efficientnet_lite0"]
)
def test_a_rows_bits_do_not_depend_on_its_place(name, threads):
    torch.manual_seed(0)
    small = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
    small = {} if "lite" in name else small
    net = create_model(name, num_classes=3, **small).eval()
    x = rand(fixed_batch(CPU), 3, 32, 32)
    with torch.inference_mode():
        first = in_fixed_shape(net, x)
        for shift in (1, 2, 3, 5):
            assert torch.equal(in_fixed_shape(net, x.roll(shift, 0)), first.roll(shift, 0))


def test_few_rows_of_one_token_have_the_bits_of_many(threads):
    """A head, and what the last block computes for the class token, of one picture alone."""
    x, weight, bias = rand(kernels.ROWS, 1, 384), rand(1536, 384), rand(1536)
    for product in (F.linear, kernels.linear_gelu):
        for rows in (x, x[:, 0]):
            with torch.no_grad(), kernels.fast_linear(CPU, heads=True):
                every = product(rows, weight, bias)
                for n in (1, 2, kernels.ROWS - 1):
                    assert torch.equal(product(rows[:n], weight, bias), every[:n])


def test_packed_weights_change_no_bit_and_are_packed_once(threads, monkeypatch):
    net = create_model("vitflower_s16", img_size=64, depth=2, num_classes=3).eval()
    x, packed, calls = rand(fixed_batch(CPU), 3, 64, 64), {}, []
    real = torch.ops.mkldnn._reorder_convolution_weight
    monkeypatch.setattr(
        torch.ops.mkldnn, "_reorder_convolution_weight", lambda *a: calls.append(a) or real(*a)
    )
    with torch.inference_mode():
        wanted = in_fixed_shape(net, x)
        assert not calls
        for _ in range(2):
            assert torch.equal(in_fixed_shape(net, x, packed), wanted)
            assert torch.equal(in_fixed_shape(net, x[:1], packed), wanted[:1])
            with kernels.fast_linear(CPU, heads=True, packed=packed):
                assert torch.equal(net(x[:1]), wanted[:1])
    # the last block splits qkv in two; the patch embedding stays torch's
    assert len(calls) == len(packed) == 4 + 5 + 1
    assert sum(kernel.numel() for kernel, _ in packed.values()) == sum(
        m.weight.numel() for m in net.modules() if isinstance(m, nn.Linear)
    )


def test_where_something_is_learned_nothing_is_packed():
    layer, x, packed = nn.Linear(192, 256), rand(3, 5, 192), {}
    with kernels.fast_linear(CPU, packed=packed):
        layer(x).sum().backward()
    assert packed == {}


def test_gradients_of_few_rows_are_torchs_own(threads):
    x = rand(3, 1, 192).requires_grad_()
    for weight in (rand(256, 192), rand(256, 192).requires_grad_()):
        wanted = torch.autograd.grad(F.linear(x, weight).square().sum(), x)
        with kernels.fast_linear(CPU):
            got = torch.autograd.grad(F.linear(x, weight).square().sum(), x)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


def test_one_picture_through_our_backbone_has_the_bits_of_a_full_batch(threads):
    net = create_model("vitflower_s14", img_size=112, depth=2, num_classes=3).eval()
    x = rand(fixed_batch(CPU), 3, 112, 112)
    with torch.inference_mode(), kernels.fast_linear(CPU, heads=True):
        alone = net(x[:1])
        assert torch.equal(alone, in_fixed_shape(net, x)[:1])


def test_autocast_keeps_its_dtype(convolutions):
    with kernels.fast_linear(CPU), torch.autocast("cpu", torch.bfloat16):
        assert F.linear(rand(16, 5, 192), rand(256, 192)).dtype == torch.bfloat16
    assert not convolutions


def test_another_device_is_left_alone(convolutions):
    with kernels.fast_linear(torch.device("meta")):
        F.linear(rand(16, 5, 192), rand(256, 192))
    assert not convolutions


def test_a_whole_model_agrees_and_its_rows_do_not_depend_on_their_number(threads, convolutions):
    torch.manual_seed(0)
    net = create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()
    x = rand(fixed_batch(CPU), 3, 32, 32)
    with torch.inference_mode():
        wanted, got = net(x), in_fixed_shape(net, x)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(in_fixed_shape(net, x[:3]), got[:3])
    assert convolutions


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 192), (3, 2, 4, 192), (1, 257, 192)])
def test_a_layer_and_its_gelu_are_one_kernel_with_torchs_values(shape, bias, threads, monkeypatch):
    layer, x, fused = nn.Linear(192, 256, bias=bias), 4 * rand(*shape), []
    wanted = F.gelu(layer(x))
    real = torch.ops.mkldnn._convolution_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn, "_convolution_pointwise", lambda *a: fused.append(a) or real(*a)
    )
    with torch.no_grad(), kernels.fast_linear(CPU):
        got = kernels.linear_gelu(x, layer.weight, layer.bias)
    assert len(fused) == 1
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=3e-6)


def test_a_gelu_that_is_learned_through_or_listened_to_stays_apart(monkeypatch):
    real = torch.ops.mkldnn._convolution_pointwise

    def refuse(*args):
        if "gelu" in args[3:]:
            raise AssertionError("one kernel")
        return real(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise", refuse)
    net = create_model("vitflower_ti16", embed_dim=32, depth=1, num_heads=2, img_size=32)
    x = rand(2, 3, 32, 32)
    with kernels.fast_linear(CPU):
        net(x).sum().backward()
    assert net.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    for heard in (net.blocks[0].mlp.act, net.blocks[0].mlp.fc1):
        seen = []
        handle = heard.register_forward_hook(lambda *a, seen=seen: seen.append(a))
        with torch.no_grad(), kernels.fast_linear(CPU):
            net(x)
        handle.remove()
        assert len(seen) == 1
    with pytest.raises(AssertionError, match="one kernel"), torch.no_grad():
        in_fixed_shape(net.eval(), x)


def test_without_torchs_fused_operator_the_values_are_the_same(monkeypatch):
    layer, x = nn.Linear(192, 256), rand(3, 5, 192)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    with torch.no_grad(), kernels.fast_linear(CPU):
        got = kernels.linear_gelu(x, layer.weight, layer.bias)
    torch.testing.assert_close(got, F.gelu(layer(x)), rtol=1e-5, atol=1e-6)
