"""The Vision Transformer, whole, in the order data flows; registered with timm as `vitflower_*`.

In: normalised images [B, 3, S, S]. Out: tokens [B, T, D], features [B, D] or logits [B, C].

Shapes, here and everywhere in vitft: B batch, S image side, G = S / patch, P = G*G patches,
R prefix tokens (the class token, then registers), T = R + P tokens, D width, H heads, K = D / H,
C classes. Attributes are named so that their dotted names are the keys of timm's checkpoints.

Source: Dosovitskiy et al., An Image is Worth 16x16 Words, 2021 (arXiv 2010.11929).
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.layers._fx import register_notrace_module
from timm.layers.config import use_fused_attn
from timm.layers.drop import DropPath
from timm.layers.patch_dropout import PatchDropout
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args, update_model_input_size
from torch import Tensor, nn

from vitft import console
from vitft.errors import RecipeError
from vitft.hybrid import HybridEmbed
from vitft.kernels import linear_gelu
from vitft.patches import Embed, PatchConv, pair

POOLS = ("", "token", "avg")
POSITIONS = {  # timm says "learn"; both spellings build the same model
    "learned": "learned",
    "learn": "learned",
    "learned2d": "learned2d",
    "sincos2d": "sincos2d",
    "none": "none",
    "": "none",
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
}


def _choose(key: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        rule = f"must be one of {', '.join(repr(a) for a in allowed)}, got {value!r}"
        raise RecipeError.of(f"model.{key}", f"model.{key}", rule, "write one of these names")


def sincos2d(grid: tuple[int, int], width: int) -> Tensor:
    """The fixed two-dimensional sine-cosine position table.

    Args:
        grid: Patches along height and width.
        width: D, a multiple of 4, at least 8.

    Returns:
        [1, P, D] float32: sin x, cos x, sin y, cos y, a quarter of the width each.

    Raises:
        RecipeError: The width does not split into quarters.

    Source: big_vision models/vit.py, `posemb_sincos_2d`, temperature 10,000.
    """
    if width % 4 or width < 8:
        rule = f"sincos2d needs a width that is a multiple of 4 and at least 8, got {width}"
        raise RecipeError.of("model.pos_embed", "model.embed_dim", rule, "use pos_embed: learned")
    y, x = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64),
        torch.arange(grid[1], dtype=torch.float64),
        indexing="ij",
    )
    steps = torch.arange(width // 4, dtype=torch.float64)
    omega = 10_000.0 ** (-steps / (width // 4 - 1))
    x_angle, y_angle = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega  # [P, D / 4]
    table = torch.cat([x_angle.sin(), x_angle.cos(), y_angle.sin(), y_angle.cos()], dim=1)
    return table.float().unsqueeze(0)


@register_notrace_module  # its size check branches on shapes, which torch.fx cannot follow
class PatchEmbed(Embed):
    """Cuts the image into patches and projects each to the width.

    A convolution with kernel = stride = patch, on CUDA a matrix product (`patches.PatchConv`).
    """

    def __init__(
        self,
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        in_chans: int,
        width: int,
        *,
        bias: bool = True,
        strict_img_size: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__(img_size, patch_size, strict_img_size)
        self.grid_size = self.grid_of(self.img_size, self.patch_size)
        self.proj = PatchConv(
            in_chans, width, self.patch_size, self.patch_size, bias=bias, **factory
        )

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, P, D]."""
        self.require(images)
        x: Tensor = self.proj(images)  # [B, D, G, G]
        return x.flatten(2).transpose(1, 2)  # [B, P, D]


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
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(width, width, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = self._heads(self.qkv(x), 3)  # each [B, H, T, K]
        if self.fused_attn:
            drop = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
        else:
            x = self.attn_drop(self._weights(q, k)) @ v
        return self._merge(x)

    def weights(self, x: Tensor) -> Tensor:
        """Who looks at whom: [B, T, D] -> [B, H, T, T], rows sum to 1; the plain, unfused path."""
        q, k, _ = self._heads(self.qkv(x), 3)
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
        (q,) = self._heads(F.linear(x[:, :1], weight[:d], q_bias), 1)  # [B, H, 1, K]
        k, v = self._heads(F.linear(x, weight[d:], kv_bias), 2)  # [B, H, T, K]
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
        x = self.proj_drop(self.proj(x))
        return x


class LayerScale(nn.Module):
    """One learned factor per channel (CaiT, arXiv 2103.17239; DINOv2 has it)."""

    def __init__(self, width: int, init_values: float, **factory: Any) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.full((width,), float(init_values), **factory))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return x * self.gamma


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
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, width, **factory)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = self.drop1(self._hidden(x))  # [B, T, 4 D]
        x = self.drop2(self.fc2(x))  # [B, T, D]
        return x

    def _hidden(self, x: Tensor) -> Tensor:
        """`act(fc1 x)`; as one kernel where nobody learns from it, listens in or sits on it."""
        exact = type(self.act) is nn.GELU and self.act.approximate == "none"
        heard = self.fc1._forward_hooks or self.act._forward_hooks or self.fc1._forward_pre_hooks
        if torch.is_grad_enabled() or not exact or heard or type(self.fc1) is not nn.Linear:
            hidden: Tensor = self.act(self.fc1(x))
            return hidden
        return linear_gelu(x, self.fc1.weight, self.fc1.bias)


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


def _patch_embed(
    cnn: str | None, stage: int | None, *sizes: Any, **cut: Any
) -> PatchEmbed | HybridEmbed:
    """Patches of the image, or of a CNN's feature map."""
    return (
        PatchEmbed(*sizes, **cut) if cnn is None else HybridEmbed(cnn, *sizes, stage=stage, **cut)
    )


def _patch_drop(rate: float, prefix: int) -> nn.Module:
    return PatchDropout(rate, num_prefix_tokens=prefix) if rate > 0 else nn.Identity()


class VisionTransformer(nn.Module):
    """Patches and a class token through a pre-norm transformer encoder into a linear head.

    It answers to everything that timm asks of its own ViT (layer decay, feature extraction, hub
    export, resizing). Build it with `timm.create_model("vitflower_b16", ...)`, which adds the
    preprocessing that belongs to the name; these arguments may be given there.

    Args:
        img_size: Image side, or height and width, px; a multiple of the patch.
        patch_size: Patch side, or height and width, px; with `embed`, cells of the CNN's map.
        in_chans: Colour channels.
        num_classes: C; 0 leaves the head out.
        global_pool: "token" (class token), "avg" (mean of patches) or "" (all tokens).
        embed_dim: D.
        depth: Encoder blocks.
        num_heads: H.
        mlp_ratio: MLP width over D.
        qkv_bias: Bias in the qkv projection.
        init_values: Start of LayerScale; None leaves it out.
        class_token: Prepend the class token.
        pos_embed: "learned" (one row per token; the paper's 1-D), "learned2d" (one half of the
            width per row of patches, the other per column; the paper's appendix D.4), "sincos2d"
            (fixed) or "none".
        embed: None for patches of the image; for patches of a CNN's feature map the CNN's name,
            see `hybrid.build_cnn`.
        embed_stage: Which of that CNN's maps, from 0; None for the last.
        no_embed_class: Positions are added to patches only, not to prefix tokens (DeiT-III).
        reg_tokens: Register tokens after the class token (DINOv2 with registers: 4).
        pre_norm: LayerNorm before the first block and no bias in the patch embedding (CLIP).
        fc_norm: Final norm after pooling instead of before; None: exactly when pooling is "avg".
        representation_size: Width of the `pre_logits` layer (Linear, tanh) between features and
            head, as in the paper's ImageNet-21k training; None for transfer, as there.
        act_layer: "gelu", "gelu_tanh" (SigLIP 2) or "quick_gelu" (OpenAI's CLIP).
        norm_eps: Epsilon of every LayerNorm; 1e-6, where torch has 1e-5.
        dynamic_img_size: Accept any multiple of the patch; positions are resampled on the fly.
        drop_rate: Dropout before the head.
        pos_drop_rate: Dropout after adding positions.
        patch_drop_rate: Share of patches left out in training.
        proj_drop_rate: Dropout after attention projection and in the MLP.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0.
        device: Where parameters live.
        dtype: What parameters are.

    Raises:
        RecipeError: An option has no such value, or patches do not tile the image.
    """

    pretrained_cfg: dict[str, Any]  # these two are timm's, set once the model is built
    _traits: dict[str, Any]

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        *,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        pos_embed: str = "learned",
        embed: str | None = None,
        embed_stage: int | None = None,
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        fc_norm: bool | None = None,
        representation_size: int | None = None,
        act_layer: str = "gelu",
        norm_eps: float = 1e-6,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _choose("global_pool", global_pool, POOLS)
        _choose("pos_embed", pos_embed, tuple(POSITIONS))
        _choose("act_layer", act_layer, tuple(ACTIVATIONS))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.embed_dim = self.num_features = embed_dim
        self.head_hidden_size = representation_size or embed_dim
        self.has_class_token, self.num_reg_tokens = class_token, reg_tokens
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.no_embed_class, self.dynamic_img_size = no_embed_class, dynamic_img_size
        self.pos_embed_kind = POSITIONS[pos_embed]
        self.grad_checkpointing = False
        self.drops_inside = bool(proj_drop_rate or attn_drop_rate)
        self._check_pool(global_pool)

        self.cls_token = _tokens(1, embed_dim, factory) if class_token else None
        self.reg_token = _tokens(reg_tokens, embed_dim, factory) if reg_tokens else None
        cut = {"bias": not pre_norm, "strict_img_size": not dynamic_img_size} | factory
        sizes = (img_size, patch_size, in_chans, embed_dim)
        self.patch_embed = _patch_embed(embed, embed_stage, *sizes, **cut)
        self._add_positions(factory)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.patch_drop = _patch_drop(patch_drop_rate, self.num_prefix_tokens)

        def norm(wanted: bool) -> nn.Module:
            return nn.LayerNorm(embed_dim, norm_eps, **factory) if wanted else nn.Identity()

        self.norm_pre = norm(pre_norm)
        shape: Any = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "init_values": init_values}
        drops: Any = {"proj_drop": proj_drop_rate, "attn_drop": attn_drop_rate}
        act = ACTIVATIONS[act_layer]
        block = partial(Block, embed_dim, num_heads, act=act, norm_eps=norm_eps, **shape, **drops)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(*(block(drop_path=rate, **factory) for rate in rates))
        norm_after_pool = global_pool == "avg" if fc_norm is None else fc_norm
        self.norm, self.fc_norm = norm(not norm_after_pool), norm(norm_after_pool)
        self.pre_logits = _pre_logits(embed_dim, representation_size, factory)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._new_head(factory)
        self.feature_info = self._feature_info()
        self.init_weights()

    # --- parts -------------------------------------------------------------------------------

    def _add_positions(self, factory: dict[str, Any]) -> None:
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        if self.pos_embed_kind == "none":
            self.pos_embed: Tensor | None = None
        elif self.pos_embed_kind == "learned":
            self.pos_embed = _tokens(prefix + self.patch_embed.num_patches, self.embed_dim, factory)
        elif self.pos_embed_kind == "learned2d":
            self.pos_embed = None
            self._add_axes(factory)
        else:  # a buffer: saved like timm's parameter, so plain timm can load it, never trained
            table = sincos2d(self.patch_embed.grid_size, self.embed_dim)
            table = F.pad(table, (0, 0, prefix, 0))  # prefix tokens get zero
            self.register_buffer("pos_embed", table.to(**factory))

    def _add_axes(self, factory: dict[str, Any]) -> None:
        if self.embed_dim % 2:
            rule = f"learned2d halves the width, got {self.embed_dim}"
            raise RecipeError.of("model.pos_embed", "model.embed_dim", rule, "use an even width")
        rows, columns = self.patch_embed.grid_size
        self.pos_embed_y = _tokens(rows, self.embed_dim // 2, factory)
        self.pos_embed_x = _tokens(columns, self.embed_dim // 2, factory)

    def _feature_info(self) -> list[dict[str, Any]]:
        """What timm's feature extraction asks of each block."""
        info = {"num_chs": self.embed_dim, "reduction": self.patch_embed.feat_ratio()}
        return [{"module": f"blocks.{i}"} | info for i in range(len(self.blocks))]

    def _new_head(self, factory: dict[str, Any]) -> nn.Module:
        if self.num_classes <= 0:
            return nn.Identity()
        return nn.Linear(self.head_hidden_size, self.num_classes, **factory)

    def _check_pool(self, pool: str) -> None:
        if pool == "token" and not self.has_class_token:
            rule = "'token' needs the class token, which class_token: false left out"
            raise RecipeError.of("model.global_pool", "model.global_pool", rule, "use avg")

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws tokens, positions and linear weights from a truncated normal of std 0.02."""
        drawn: list[Tensor | None] = [self.cls_token, self.reg_token]
        if self.pos_embed_kind == "learned":
            drawn.append(self.pos_embed)
        if self.pos_embed_kind == "learned2d":
            drawn += [self.pos_embed_y, self.pos_embed_x]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                drawn.append(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for tensor in drawn:
            if tensor is not None:
                nn.init.trunc_normal_(tensor, std=0.02)

    # --- the way of the data -----------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] -> logits [B, C], unnormalised; features [B, D] without a head.

        It takes the short way of `forward_class_token`, in training too: the gradients are the
        same, at 7 % less work. A model and its cached features so agree to the bit. Dropout inside
        the blocks draws for all tokens, and a hook on the last block, or torch.fx, is shown them.
        """
        if self._is_watched(x) or (self.training and self.drops_inside):
            return self.forward_head(self.forward_features(x))
        x = self.head(self.forward_class_token(x))  # [B, D] -> [B, C]
        return x

    def _is_watched(self, x: Tensor) -> bool:
        """Whether a hook on the last block, or torch.fx, wants what the short way leaves out."""
        if isinstance(x, torch.fx.Proxy):
            return True
        parts = self.blocks[-1].modules() if len(self.blocks) else ()
        return any(part._forward_hooks or part._forward_pre_hooks for part in parts)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] -> tokens [B, T, D] after the final norm."""
        x = self._embed(x)
        x = checkpoint_seq(self.blocks, x) if self._checkpointing() else self.blocks(x)
        x = self.norm(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, T, D] -> logits [B, C], or with `pre_logits` what the head would read."""
        x = self.head_drop(self.pre_logits(self.fc_norm(self.pool(x))))  # [B, D]
        if not pre_logits:
            x = self.head(x)
        return x

    def forward_class_token(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] -> what the head reads, [B, D], at 7 % less work.

        Equal to `forward_head(forward_features(x), pre_logits=True)` up to rounding: after the
        last block only the class token is read, so only it needs a query, a projection and an MLP.
        With another pooling than "token" it is that very call.
        """
        if self.global_pool != "token" or self._checkpointing():
            return self.forward_head(self.forward_features(x), pre_logits=True)
        x = self._embed(x)  # [B, T, D]
        *before, last = self.blocks
        for block in before:
            x = block(x)
        x = last.first_token(x) if isinstance(last, Block) else last(x)  # [B, 1, D]
        return self.forward_head(self.norm(x), pre_logits=True)

    def _embed(self, images: Tensor) -> Tensor:
        x: Tensor = self.patch_embed(images)  # [B, 3, S, S] -> [B, P, D]
        positions = self._positions((images.shape[-2], images.shape[-1]))  # [1, T or P, D]
        prefix = [
            token.expand(x.shape[0], -1, -1)
            for token in (self.cls_token, self.reg_token)
            if token is not None
        ]
        if positions is not None and self.no_embed_class:
            x = x + positions
        x = torch.cat([*prefix, x], dim=1)  # [B, T, D]; token 0 is the class token
        if positions is not None and not self.no_embed_class:
            x = x + positions
        x = self.norm_pre(self.patch_drop(self.pos_drop(x)))
        return x

    def _positions(self, img_size: tuple[int, int]) -> Tensor | None:
        if self.pos_embed_kind == "learned2d":
            grid = self.patch_embed.grid_size
            if self.dynamic_img_size:
                grid = self.patch_embed.dynamic_feat_size(img_size)
            return self._crossed(grid)
        if self.pos_embed is None or not self.dynamic_img_size:
            return self.pos_embed
        return self._resampled(self.pos_embed, self.patch_embed.dynamic_feat_size(img_size))

    def position_table(self) -> Tensor | None:
        """What is added to the tokens, [1, T or P, D]; None without positions."""
        return self._positions(self.patch_embed.img_size)

    def _crossed(self, grid: tuple[int, int]) -> Tensor:
        """[1, T or P, D]: half of the width says the row, half the column; prefix tokens get 0."""
        y = _stretched(self.pos_embed_y, grid[0])[:, :, None].expand(-1, -1, grid[1], -1)
        x = _stretched(self.pos_embed_x, grid[1])[:, None].expand(-1, grid[0], -1, -1)
        table = torch.cat([y, x], dim=-1).flatten(1, 2)  # [1, P, D]
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        return F.pad(table, (0, 0, prefix, 0))

    def _resampled(self, positions: Tensor, grid: tuple[int, int]) -> Tensor:
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        old = list(self.patch_embed.grid_size)
        new: Tensor = resample_abs_pos_embed(positions, list(grid), old, num_prefix_tokens=prefix)
        return new

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, T, D] -> [B, D]; all tokens where the pooling is ""."""
        kind = self.global_pool if pool_type is None else pool_type
        if kind == "token":
            return x[:, 0]
        return x[:, self.num_prefix_tokens :].mean(dim=1) if kind == "avg" else x

    def _checkpointing(self) -> bool:
        return self.grad_checkpointing and torch.is_grad_enabled()

    # --- what timm asks of a ViT -------------------------------------------------------------

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Block outputs on the way, as timm's ViT gives them.

        Args:
            x: [B, 3, S, S].
            indices: Blocks to report: the last n for a number, all for None.
            return_prefix_tokens: Add the prefix tokens [B, R, D] to each.
            norm: Apply the final norm to each.
            stop_early: Skip blocks after the last one reported.
            output_fmt: "NCHW" gives [B, D, G, G], "NLC" gives [B, P, D].
            intermediates_only: Return only the list.
            output_dict: Return a dict with timm's names.

        Returns:
            (tokens [B, T, D], list), the list, or the dict.

        Raises:
            ValueError: Unknown output format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        taken, last = _taken(len(self.blocks), indices)
        height, width = int(x.shape[-2]), int(x.shape[-1])
        grid = self.patch_embed.dynamic_feat_size((height, width))
        x = self._embed(x)
        tokens = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint_seq([block], x) if self._checkpointing() else block(x)
            if i in taken:
                tokens.append(self.norm(x) if norm else x)

        prefix = [y[:, : self.num_prefix_tokens] for y in tokens] if self.num_prefix_tokens else []
        maps = [y[:, self.num_prefix_tokens :] for y in tokens]  # [B, P, D]
        if output_fmt == "NCHW":
            maps = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in maps]
        if output_dict:
            out: dict[str, Any] = {"image_intermediates": maps}
            if prefix and return_prefix_tokens:
                out["image_intermediates_prefix"] = prefix
            return out if intermediates_only else out | {"image_features": self.norm(x)}
        listed = list(zip(maps, prefix, strict=True)) if prefix and return_prefix_tokens else maps
        return listed if intermediates_only else (self.norm(x), listed)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes what `forward_intermediates(indices)` does not need; gives absolute indices."""
        taken, last = _taken(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm, self.pre_logits = nn.Identity(), nn.Identity()
            self.head_hidden_size = self.embed_dim
            self.reset_classifier(0, "")
        return taken

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """DINO's name for `forward_intermediates`: the last n blocks, [B, P, D] each."""
        fmt = "NCHW" if reshape else "NLC"
        layers: list[Any] = self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt=fmt, intermediates_only=True
        )
        return layers

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a fresh head in place (0: none) on the device of the old weights."""
        if global_pool is not None:
            _choose("global_pool", global_pool, POOLS)
            self._check_pool(global_pool)
            self.global_pool = global_pool
            # the norm stays where it was built, whatever the new pooling would have chosen
            update_model_args(self, fc_norm=not isinstance(self.fc_norm, nn.Identity))
        self.num_classes = num_classes
        weight = self.patch_embed.proj.weight
        self.head = self._new_head({"device": weight.device, "dtype": weight.dtype})
        self.head.train(self.training)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def set_input_size(
        self,
        img_size: int | Sequence[int] | None = None,
        patch_size: int | Sequence[int] | None = None,
    ) -> None:
        """Changes image or patch size in place; positions and kernel are resampled."""
        old = self.patch_embed.grid_size
        positions = self.pos_embed
        new = self.patch_embed.grid_of(
            self.patch_embed.img_size if img_size is None else pair(img_size),
            self.patch_embed.patch_size if patch_size is None else pair(patch_size),
        )
        if self.pos_embed_kind == "learned2d" and new != old:
            for name, rows in zip(("pos_embed_y", "pos_embed_x"), new, strict=True):
                axis = getattr(self, name)
                longer = _stretched(axis.detach(), rows)
                setattr(self, name, nn.Parameter(longer, requires_grad=axis.requires_grad))
        if positions is not None and new != old:
            resampled = self._resampled(positions.detach(), new)
            if isinstance(positions, nn.Parameter):
                resampled = nn.Parameter(resampled, requires_grad=positions.requires_grad)
            self.pos_embed = resampled
        self.patch_embed.set_input_size(img_size, patch_size)
        size = None if patch_size is None else self.patch_embed.patch_size
        update_model_input_size(self, self.patch_embed.img_size, patch_size=size)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Parameters that are positions or tokens, not weights."""
        return {"pos_embed", "pos_embed_x", "pos_embed_y", "cls_token", "reg_token"}

    def load_pretrained(self, checkpoint_path: str | Path, prefix: str = "") -> None:
        """Fills the model from a file of any kind; timm calls it for .npz files."""
        from vitft import weights

        tensors = weights.read(Path(checkpoint_path))
        inner = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        whole, match, _ = weights.complete(inner, self, place=checkpoint_path)
        for name, why in match.dropped.items():
            console.warn(f"weights: left out {name}: {why}")
        self.load_state_dict(whole)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes block activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable
        if isinstance(self.patch_embed, HybridEmbed):
            self.patch_embed.set_grad_checkpointing(enable)


def _taken(depth: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    wanted = indices if indices is None or isinstance(indices, int) else list(indices)
    taken, last = feature_take_indices(depth, wanted)
    return list(taken), last


def _pre_logits(width: int, size: int | None, factory: dict[str, Any]) -> nn.Module:
    if not size:
        return nn.Identity()
    layers = nn.Sequential()
    layers.add_module("fc", nn.Linear(width, size, **factory))
    layers.add_module("act", nn.Tanh())
    return layers


def _stretched(axis: Tensor, count: int) -> Tensor:
    """Positions along one axis, [1, n, D / 2] -> [1, count, D / 2]."""
    if axis.shape[1] == count:
        return axis
    longer = F.interpolate(axis.transpose(1, 2), count, mode="linear", align_corners=False)
    return longer.transpose(1, 2)


def _tokens(count: int, width: int, factory: dict[str, Any]) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, count, width, **factory))


# --- names -----------------------------------------------------------------------------------


def _cfg(**fields: Any) -> dict[str, Any]:
    """What timm should know about a name; the paper scales pixels to [-1, 1]."""
    return {
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": None,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "num_classes": 1000,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    } | fields


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

_STEM = "patch_embed.backbone.stem.conv"

# No name claims hosted weights; a file comes in by pretrained_cfg_overlay. The historical in21k
# files have a head of 21,843 classes, so the names they belong to say so.
default_cfgs = generate_default_cfgs(
    {
        "vitflower_ti16": _cfg(),
        "vitflower_s16": _cfg(),
        # DINOv2 evaluates at 224 px with a resize to 256
        "vitflower_s14": _cfg(num_classes=0, crop_pct=0.875, **_IMAGENET),
        "vitflower_b16.orig_in21k": _cfg(num_classes=21843),
        "vitflower_b32.orig_in21k": _cfg(num_classes=21843),
        "vitflower_l16.orig_in21k": _cfg(num_classes=21843),
        "vitflower_l32.orig_in21k": _cfg(num_classes=21843),
        "vitflower_h14.orig_in21k": _cfg(num_classes=21843),
        "vitflower_hybrid_r_ti16": _cfg(first_conv="patch_embed.backbone.conv"),
        "vitflower_hybrid_r26_s32": _cfg(first_conv=_STEM),
        "vitflower_hybrid_r26_b32": _cfg(first_conv=_STEM),
        "vitflower_hybrid_r50_b16.orig_in21k": _cfg(first_conv=_STEM, num_classes=21843),
        "vitflower_hybrid_r50_b32": _cfg(first_conv=_STEM),
        "vitflower_hybrid_r50_l16": _cfg(first_conv=_STEM),
        "vitflower_hybrid_r50_l32": _cfg(first_conv=_STEM),
    }
)


# width, heads, depth and patch: table 1 of the paper; Ti and S are DeiT's (arXiv 2012.12877)
SIZES: dict[str, dict[str, Any]] = {
    "vitflower_ti16": {"embed_dim": 192, "num_heads": 3, "patch_size": 16},
    "vitflower_s16": {"embed_dim": 384, "num_heads": 6, "patch_size": 16},
    "vitflower_s14": {"embed_dim": 384, "num_heads": 6, "patch_size": 14, "init_values": 1e-5},
    "vitflower_b16": {"embed_dim": 768, "num_heads": 12, "patch_size": 16},
    "vitflower_b32": {"embed_dim": 768, "num_heads": 12, "patch_size": 32},
    "vitflower_l16": {"embed_dim": 1024, "num_heads": 16, "depth": 24, "patch_size": 16},
    "vitflower_l32": {"embed_dim": 1024, "num_heads": 16, "depth": 24, "patch_size": 32},
    "vitflower_h14": {"embed_dim": 1280, "num_heads": 16, "depth": 32, "patch_size": 14},
}
# R26+S/32 and so on: table 5 of the paper and table 3 of arXiv 2106.10270; /16 and /32 are the
# pixels that a token covers (R+Ti/16 has 4 px per cell and patches of 8 cells, as published)
SIZES |= {
    f"vitflower_hybrid_{name}": {k: v for k, v in SIZES[f"vitflower_{size}"].items()}
    | {"patch_size": cells, "embed": cnn}
    for name, size, cnn, cells in (
        ("r_ti16", "ti16", "r", 8),
        ("r26_s32", "s16", "r26", 1),
        ("r26_b32", "b16", "r26", 1),
        ("r50_b16", "b16", "r50_fine", 1),
        ("r50_b32", "b16", "r50", 1),
        ("r50_l16", "l16", "r50_fine", 1),
        ("r50_l32", "l16", "r50", 1),
    )
}


def _read_file(pretrained: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Reads an overlay's file through our own guard, which knows more kinds than timm's."""
    from vitft import weights  # late: `python -m vitft.weights` must be its first import

    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    if not pretrained or not overlay.get("file") or overlay.get("state_dict"):
        return kwargs
    tensors = weights.read(Path(overlay["file"]))
    return kwargs | {"pretrained_cfg_overlay": overlay | {"state_dict": tensors}}


def load_filter(state: dict[str, Any], model: VisionTransformer) -> dict[str, Tensor]:
    """What timm calls between reading a checkpoint and loading it; here nothing is let through.

    timm loads leniently when the number of classes differs. It is handed a whole state instead:
    every backbone tensor from the file, the head from the file where it fits, else the fresh one.

    Args:
        state: As timm read it.
        model: The model as built.

    Raises:
        WeightsError: A backbone tensor is missing, unexpected or misshapen.
    """
    from vitft import weights

    place = model.pretrained_cfg.get("file") or "checkpoint"
    whole, match, notes = weights.complete(state, model, place=place)
    for note in notes:
        console.say(f"weights: {note}")
    for name, why in match.dropped.items():
        console.warn(f"weights: left out {name}: {why}")
    if "head.weight" in whole and "head.weight" not in match.new:
        model.pretrained_cfg["num_classes"] = model.num_classes  # else timm drops the file's head
    model._traits["first_conv"] = None  # channels are adapted already; timm would do it twice
    return whole


def _register(name: str) -> None:
    """Gives timm a function of that name, which is how timm knows models."""

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model: Any = build_model_with_cfg(
            VisionTransformer,
            name,
            pretrained,
            pretrained_filter_fn=load_filter,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **(SIZES[name] | _read_file(pretrained, kwargs)),
        )
        model.pretrained_cfg["state_dict"] = None  # loaded; do not hold the memory
        model._traits["first_conv"] = model.pretrained_cfg["first_conv"]
        built: nn.Module = model
        return built

    build.__name__ = build.__qualname__ = name
    globals()[name] = register_model(build)


for _name in SIZES:
    _register(_name)
