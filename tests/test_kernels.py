"""Linear layers through oneDNN: torch's own answer, gradient and shape, for what they serve."""

from concurrent.futures import ThreadPoolExecutor

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


# ---- for those who ask --------------------------------------------------------------------------


@pytest.fixture
def looked_at(monkeypatch):
    """Every call of torch's that a mode had a look at."""
    calls = []
    real = kernels._FastLinear.__torch_function__
    monkeypatch.setattr(
        kernels._FastLinear,
        "__torch_function__",
        lambda self, *a: calls.append(a[0]) or real(self, *a),
    )
    return calls


def small(**options):
    torch.manual_seed(0)
    shape = {"img_size": 32, "embed_dim": 64, "num_heads": 2, "depth": 2, "num_classes": 3}
    return create_model("vitflower_ti16", **shape | options).eval()


def both_ways(net, x):
    """What a model says under the mode and where only layers ask, each with weights of its own."""
    said = []
    for asked in (False, True):
        serving = kernels.fast_linear(CPU, heads=True, packed={}, asked=asked)
        with torch.inference_mode(), serving:
            said.append(net(x))
    return said


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": 1e-5, "reg_tokens": 4, "qkv_bias": False},
        {"global_pool": "avg"},
        {"representation_size": 48},
        {"act_layer": "gelu_tanh", "pos_embed": "learned2d"},
        {"act_layer": "quick_gelu", "drop_rate": 0.1, "proj_drop_rate": 0.1},
        {"num_classes": 0, "pre_norm": True},
    ],
)
@pytest.mark.parametrize("count", [1, 8])
def test_our_model_asks_for_every_product_and_gets_the_modes_bits(
    options, count, threads, looked_at, convolutions
):
    net, x = small(**options), rand(count, 3, 32, 32)
    under, asked = both_ways(net, x)
    assert torch.equal(under, asked)
    half = len(convolutions) // 2
    assert [a[1].shape for a in convolutions[half:]] == [a[1].shape for a in convolutions[:half]]
    looked_at.clear()
    with torch.inference_mode(), kernels.fast_linear(CPU, heads=True, asked=True):
        net(x)
    assert len(looked_at) == (2 if "representation_size" in options else 0)  # linear and tanh


def test_linear_layers_inside_a_cnn_go_along(convolutions):
    net, x = small(embed="resnet10t", embed_stage=1, patch_size=2), rand(1, 3, 32, 32)
    net.patch_embed.backbone = nn.Sequential(net.patch_embed.backbone, Channelwise())
    under, asked = both_ways(net, x)
    assert torch.equal(under, asked)
    inside = net.patch_embed.backbone[1].fc.weight
    assert sum(weight is inside for _, weight, *_ in convolutions) == 2


class Channelwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, maps):
        return self.fc(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Adapted(nn.Linear):
    """Something low-rank that sits on a layer."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.state_dict())
        self.down = nn.Linear(layer.in_features, 4)
        self.up = nn.Linear(4, layer.out_features)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.up(self.down(x))


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_an_asked_layer_with_an_adapter_is_called_as_it_is(name, convolutions):
    net, x = small(), rand(1, 3, 32, 32)
    part, attribute = name.split(".")
    parents = [getattr(block, part) for block in net.blocks]
    for parent in parents:
        setattr(parent, attribute, Adapted(getattr(parent, attribute)))
    under, asked = both_ways(net, x)
    assert torch.equal(under, asked)
    for parent in parents:
        low = getattr(parent, attribute).up.weight
        assert sum(weight is low for _, weight, *_ in convolutions) == 2


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("how", ["register_forward_hook", "register_forward_pre_hook", "forward"])
def test_an_asked_layer_that_somebody_listens_to_is_called_as_it_is(name, how):
    net, x, seen = small(), rand(1, 3, 32, 32), []
    before = both_ways(net, x)[1]
    layer = net.blocks[0].get_submodule(name)
    real = layer.forward
    if how == "forward":
        layer.forward = lambda x: seen.append(x) or real(x)
    else:
        getattr(layer, how)(lambda *a: seen.append(a))
    under, asked = both_ways(net, x)
    assert len(seen) == 2
    assert torch.equal(under, asked)
    if name != "mlp.fc1":  # else GELU comes apart, and rounds otherwise
        assert torch.equal(asked, before)


def test_only_the_thread_that_asks_is_served_and_only_while_it_asks(convolutions):
    layer, x = nn.Linear(192, 256), rand(3, 5, 192)

    def served():
        convolutions.clear()
        kernels.through(layer, x)
        return bool(convolutions)

    with ThreadPoolExecutor(1) as pool:
        with kernels.fast_linear(CPU, asked=True):
            assert served()
            assert not pool.submit(served).result()
            with pytest.raises(ZeroDivisionError), kernels.fast_linear(CPU, asked=True):
                raise ZeroDivisionError
            assert served()
            layer(x)
            assert len(convolutions) == 1  # who does not ask goes torch's way
        assert not served()
    with kernels.fast_linear(torch.device("meta"), asked=True):
        assert not served()


def test_an_asked_layer_learns_as_under_the_mode():
    layer, x, gradients = nn.Linear(192, 256), rand(3, 5, 192), []
    for asked in (False, True):
        with kernels.fast_linear(CPU, asked=asked):
            kernels.through(layer, x).square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
        layer.zero_grad()
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
