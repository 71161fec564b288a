"""One block of the encoder: tokens look at each other, then each is thought over by itself.

In: tokens [B, T, D]. Out: the same shape. Twice a residual branch: norm, attention or MLP, and
where the model has it a learned scale and stochastic depth. Shapes: see `vit`. Attributes are named
as in timm's checkpoints.

Source: Dosovitskiy et al., 2021 (arXiv 2010.11929), equations 2 and 3; appendix A for attention.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.layers.config import use_fused_attn
from timm.layers.drop import DropPath
from torch import Tensor, nn

from vitft.errors import RecipeError
from vitft.kernels import is_plain, linear_gelu, through

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
}


def dropout(rate: float) -> nn.Module:
    """Dropout, or nothing at all: what drops nothing would still be called for every picture."""
    return nn.Dropout(rate) if rate > 0 else nn.Identity()


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        if width % heads:
            rule = f"width {width} does not split into {heads} heads"
            raise RecipeError.of("model.num_heads", "model.num_heads", rule, "use a divisor of it")
        self.num_heads, self.head_dim = heads, width // heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = bool(use_fused_attn())
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias, **factory)
        self.attn_drop = dropout(attn_drop)
        self.proj = nn.Linear(width, width, **factory)
        self.proj_drop = dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = self._heads(through(self.qkv, x), 3)  # each [B, H, T, K]
        if self.fused_attn:
            drop = getattr(self.attn_drop, "p", 0.0) if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
        else:
            x = self.attn_drop(self._weights(q, k)) @ v
        return self._merge(x)

    def weights(self, x: Tensor) -> Tensor:
        """Who looks at whom: [B, T, D] -> [B, H, T, T], rows sum to 1; the plain, unfused path."""
        q, k, _ = self._heads(through(self.qkv, x), 3)
        return self._weights(q, k)

    def first_token(self, x: Tensor) -> Tensor:
        """The first row of `forward`: [B, T, D] -> [B, 1, D], with one query for all keys.

        Sums of products rather than the fused kernel, whose bits for a single query depend on the
        image's place in the batch.
        """
        if type(self.qkv) is not nn.Linear:  # an adapter sits on it; splitting would go past it
            return self.forward(x)[:, :1]
        d = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q_bias, kv_bias = (None, None) if bias is None else (bias[:d], bias[d:])
        (q,) = self._heads(through(F.linear, x[:, :1], weight[:d], q_bias), 1)  # [B, H, 1, K]
        k, v = self._heads(through(F.linear, x, weight[d:], kv_bias), 2)  # [B, H, T, K]
        weights = ((q * self.scale) * k).sum(-1, keepdim=True).softmax(dim=2)  # [B, H, T, 1]
        x = (self.attn_drop(weights) * v).sum(2, keepdim=True)  # [B, H, 1, K]
        return self._merge(x)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        b, t, _ = x.shape
        x = x.reshape(b, t, parts, self.num_heads, self.head_dim)
        return x.permute(2, 0, 3, 1, 4).unbind(0)  # parts of [B, H, T, K]

    def _weights(self, q: Tensor, k: Tensor) -> Tensor:
        scores: Tensor = (q * self.scale) @ k.transpose(-2, -1)  # [B, H, T, T]
        return scores.softmax(dim=-1)

    def _merge(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2).flatten(2)  # [B, H, T, K] -> [B, T, D]
        x = self.proj_drop(through(self.proj, x))
        return x


class LayerScale(nn.Module):
    """One learned factor per channel (CaiT, arXiv 2103.17239; DINOv2 has it)."""

    def __init__(self, width: int, init_values: float, **factory: Any) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.full((width,), float(init_values), **factory))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; of bfloat16 too, though gamma is float32 under autocast."""
        scaled = x * self.gamma
        return scaled.to(x.dtype) if x.dtype is torch.bfloat16 else scaled


class Mlp(nn.Module):
    """Two linear layers with GELU (the exact one, not its tanh approximation) between them."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        act: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, **factory)
        self.act = act()
        self.drop1 = dropout(drop)
        self.fc2 = nn.Linear(hidden, width, **factory)
        self.drop2 = dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = self.drop1(self._hidden(x))  # [B, T, 4 D]
        x = self.drop2(through(self.fc2, x))  # [B, T, D]
        return x

    def _hidden(self, x: Tensor) -> Tensor:
        """`act(fc1 x)`; as one kernel where nobody learns from it, listens in or sits on it."""
        exact = type(self.act) is nn.GELU and self.act.approximate == "none"
        plain = exact and is_plain(self.fc1) and not self.act._forward_hooks
        if torch.is_grad_enabled() or not plain:
            hidden: Tensor = self.act(through(self.fc1, x))
            return hidden
        return through(linear_gelu, x, self.fc1.weight, self.fc1.bias)


class Block(nn.Module):
    """Pre-norm encoder block: x + attention(norm x), then x + mlp(norm x)."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        act: Callable[[], nn.Module] = nn.GELU,
        norm_eps: float = 1e-6,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__()

        def scale() -> nn.Module:
            return LayerScale(width, init_values, **factory) if init_values else nn.Identity()

        def path() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.norm1 = nn.LayerNorm(width, eps=norm_eps, **factory)
        self.attn = Attention(
            width, heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, **factory
        )
        self.ls1, self.drop_path1 = scale(), path()
        self.norm2 = nn.LayerNorm(width, eps=norm_eps, **factory)
        self.mlp = Mlp(width, int(width * mlp_ratio), act=act, drop=proj_drop, **factory)
        self.ls2, self.drop_path2 = scale(), path()

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x

    def first_token(self, x: Tensor) -> Tensor:
        """The first row of `forward`: [B, T, D] -> [B, 1, D], everything but k and v for one token.

        Source: exact, because attention is the only place where tokens meet.
        """
        first = self.attn.first_token(self.norm1(x))  # [B, 1, D]
        x = x[:, :1] + self.drop_path1(self.ls1(first))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x
