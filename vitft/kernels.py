"""Matrix products at the processor's full speed, for any model, equal to rounding.

On CPU torch hands float32 products of `nn.Linear` to MKL, which on AMD processors leaves AVX-512
unused, and hands convolutions to oneDNN, which uses what there is. A linear layer over tokens is a
1 x 1 convolution over a picture of one column, so asking for that gets the faster library through
public functions, with the memory layout unchanged and gradients included. Where nothing is learned,
an operator of torch's compiler asks oneDNN alone, takes a GELU along and weights in oneDNN's own
layout; it is done without where there is none. `tools/bench/extract.py` and `predict.py` measure
what it gives.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

Convolve = Callable[[Tensor, Tensor], Tensor]  # a picture and a layer's weight [E, D]
Packed = dict[tuple[int, ...], tuple[Tensor, Tensor]]  # place -> a weight, and its kernel packed
WHERE = [0, 0], [1, 1], [1, 1]  # padding, stride and dilation of a product
ROWS = 8  # of one token that are computed together at least, so that none depends on their number


def fast_linear(
    device: torch.device,
    *,
    heads: bool = False,
    packed: Packed | None = None,
    asked: bool = False,
) -> AbstractContextManager[Any]:
    """While it is entered, linear layers run through oneDNN.

    The choice depends on shapes and dtype alone, never on a timing, so that a run repeats to the
    bit. A convolution works picture by picture: unlike those of a matrix product over all rows of a
    batch, the bits of a row do not depend on its place among the others.

    Args:
        device: Where the model is; elsewhere than on CPU nothing happens.
        heads: Layers whose input is [B, D] too: slower for many rows, but free of their place.
        packed: Keeps the weights as oneDNN wants them, for a model whose weights stay as they are.
            Without, it lays them out anew in every call: 13 of 80 ms for one picture. It begins
            empty, grows to the size of the weights, and changes no bit.
        asked: Only where a model asks, by `through`, as all of `VisionTransformer` does: the same
            bits, without a look at every other call of torch's, 2 of 70 ms for one picture.
    """
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if device.type != "cpu" or not has_onednn:
        return nullcontext()
    mode = _FastLinear(2 if heads else 3, packed)
    return _here(mode) if asked else mode


def through(layer: Any, *args: Any) -> Tensor:
    """`layer(*args)`, of a linear layer or what may hold one, fast where `fast_linear` is `asked`.

    Args:
        layer: A module, or `F.linear` or `linear_gelu`. A module that is more than its weight and
            its bias is called as it is, with its hooks and with whatever sits on it.
        args: What it is called with.
    """
    mode = _HERE.mode
    y: Tensor
    if mode is None:
        y = layer(*args)
    elif is_plain(layer):
        y = mode.call(F.linear, *args, layer.weight, layer.bias)
    elif isinstance(layer, nn.Module):
        with mode:
            y = layer(*args)
    else:
        y = mode.call(layer, *args)
    return y


def is_plain(layer: Any) -> bool:
    """Whether it is a linear layer that no adapter sits on and nobody listens to."""
    bare = type(layer) is nn.Linear and "forward" not in vars(layer)
    return bare and not (layer._forward_hooks or layer._forward_pre_hooks)


class _Here(threading.local):
    mode: "_FastLinear | None" = None  # of this thread, for what asks by `through`


_HERE = _Here()


@contextmanager
def _here(mode: "_FastLinear") -> Iterator[None]:
    before, _HERE.mode = _HERE.mode, mode
    try:
        yield
    finally:
        _HERE.mode = before


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer and the exact GELU; inside `fast_linear` one kernel where nothing is learned.

    The GELU then works on what is in the cache anyway: 13.2 ms for both where they take 17.3 ms
    one after the other, for 8 x 257 tokens from 384 to 1,536 channels on two Zen 4 cores.

    Args:
        x: [B, ..., D].
        weight: [E, D].
        bias: [E] or None.

    Returns:
        [B, ..., E].
    """
    if has_torch_function((x, weight)):
        given = (x, weight)
        fused: Tensor = handle_torch_function(linear_gelu, given, x, weight, bias)
        return fused
    return F.gelu(F.linear(x, weight, bias))


class _FastLinear(TorchFunctionMode):
    def __init__(self, dims: int, packed: Packed | None) -> None:
        super().__init__()
        self.dims, self.packed = dims, packed

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self.call(func, *args, **(kwargs or {}))

    def call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """`func(*args, **kwargs)`, by oneDNN where it is a product that this mode serves."""
        if func is F.linear and self._serves(*args[:2]):
            return _product(*args, **kwargs, packed=self.packed)
        if func is linear_gelu and self._serves(*args[:2]):
            return _gelu_of_product(*args, packed=self.packed)
        return func(*args, **kwargs)

    def _serves(self, x: Tensor | None = None, weight: Tensor | None = None) -> bool:
        return (
            x is not None  # by position, not by name
            and weight is not None
            and x.dim() >= self.dims
            and x.numel() > 0
            and x.dtype == weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
        )


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, packed: Packed | None = None
) -> Tensor:
    """`F.linear`: [B, ..., D] -> [B, ..., E]."""
    if torch.is_grad_enabled() and weight.requires_grad:
        y: Tensor = _Learned.apply(x, weight, bias)
        return y
    return _as_convolution(x, weight, bias, packed=packed)


class _Learned(torch.autograd.Function):
    """A layer that learns: convolutions there and back, but not for the weights.

    Their gradient is one product over all rows of the batch, which oneDNN cuts by pictures: 74
    GFLOP/s from 768 to 192 channels on a Zen 4 core, where torch's own product runs at 92.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _as_convolution(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # [N, E]
        return (
            _as_convolution(grad, weight.t()) if for_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _gelu_of_product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, packed: Packed | None = None
) -> Tensor:
    """`linear_gelu`: [B, ..., D] -> [B, ..., E]."""
    fused = _onednn("gelu", bias, packed)
    if fused is None or torch.is_grad_enabled():
        return F.gelu(_product(x, weight, bias))
    return _over_pictures(fused, x, weight)


def _as_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, packed: Packed | None = None
) -> Tensor:
    """`F.linear`: [B, ..., D] -> [B, ..., E]."""
    direct = None if torch.is_grad_enabled() else _onednn("none", bias, packed)

    def convolve(picture: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(picture, _kernel(weight), bias)

    return _over_pictures(direct or convolve, x, weight)


def _onednn(then: str, bias: Tensor | None, packed: Packed | None) -> Convolve | None:
    """oneDNN's convolution itself, which has no gradient; the operator of torch's own compiler.

    `F.conv2d` would hand a few pictures in one thread, where oneDNN is as fast, to MKL, whose sums
    are of another order.
    """
    operator = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    if operator is None:
        return None

    def convolve(picture: Tensor, weight: Tensor) -> Tensor:
        kernel = _kernel(weight) if packed is None else _packed(picture, weight, packed)
        y: Tensor = operator(picture, kernel, bias, *WHERE, 1, then, [], "none")
        return y

    return convolve


def _kernel(weight: Tensor) -> Tensor:
    """[E, D] -> [E, D, 1, 1]."""
    return weight[:, :, None, None]


def _packed(picture: Tensor, weight: Tensor, packed: Packed) -> Tensor:
    """The kernel in oneDNN's layout, made when first met; the pair keeps its address taken."""
    key = (weight.data_ptr(), *weight.shape, *weight.stride())
    if key not in packed:
        pack = torch.ops.mkldnn._reorder_convolution_weight
        packed[key] = (weight, pack(_kernel(weight), *WHERE, 1, list(picture.shape)))
    return packed[key][1]


def _over_pictures(convolve: Convolve, x: Tensor, weight: Tensor) -> Tensor:
    """[B, ..., D] -> [B, ..., E]; each of the B is a picture of one column.

    A few pictures of one row, as heads and class tokens are, go beside copies: oneDNN sums one
    such row alone in another order than `ROWS` of them.
    """
    batch, width = len(x), x.shape[-1]
    if batch < ROWS and x.numel() == batch * width:
        beside = torch.cat([x, x[:1].expand(ROWS - batch, *x.shape[1:])])
        return _over_pictures(convolve, beside, weight)[:batch]
    picture = x.reshape(batch, -1, 1, width).permute(0, 3, 1, 2)  # [B, D, T, 1], channels last
    y = convolve(picture, weight)  # [B, E, T, 1]
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))
