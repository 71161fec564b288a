"""The Vision Transformer, in the order data flows: from normalised images to tokens to logits.

In: images [B, 3, S, S]. Out: tokens [B, T, D], features [B, D] or logits [B, C].

    patches    images to tokens; `hybrid` does so behind a CNN
    positions  what tells a token its place
    blocks     attention, MLP, and the block of both
    vit        here: the model of these parts, and the way of the data through it
    hosted     what timm asks of a ViT beside its answer
    vitflower  the names under which timm knows it

Shapes, here and everywhere in vitft: B batch, S image side, G = S / patch, P = G*G patches,
R prefix tokens (the class token, then registers), T = R + P tokens, D width, H heads, K = D / H,
C classes. Attributes are named so that their dotted names are the keys of timm's checkpoints.

Source: Dosovitskiy et al., An Image is Worth 16x16 Words, 2021 (arXiv 2010.11929).
"""

from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.patch_dropout import PatchDropout
from timm.models import checkpoint_seq
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from vitft import positions
from vitft.blocks import ACTIVATIONS, Block, dropout
from vitft.errors import RecipeError
from vitft.hosted import POOLS, Hosted, choose
from vitft.hybrid import HybridEmbed
from vitft.kernels import through
from vitft.patches import Pair, PatchEmbed, pair


class VisionTransformer(Hosted):
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
        choose("global_pool", global_pool, POOLS)
        choose("pos_embed", pos_embed, tuple(positions.KINDS))
        choose("act_layer", act_layer, tuple(ACTIVATIONS))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.embed_dim = self.num_features = embed_dim
        self.head_hidden_size = representation_size or embed_dim
        self.has_class_token, self.num_reg_tokens = class_token, reg_tokens
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.no_embed_class, self.dynamic_img_size = no_embed_class, dynamic_img_size
        self.pos_embed_kind = positions.KINDS[pos_embed]
        self.grad_checkpointing = False
        self.drops_inside = bool(proj_drop_rate or attn_drop_rate)
        self._check_pool(global_pool)

        self.cls_token = _tokens(1, embed_dim, factory) if class_token else None
        self.reg_token = _tokens(reg_tokens, embed_dim, factory) if reg_tokens else None
        cut = {"bias": not pre_norm, "strict_img_size": not dynamic_img_size} | factory
        sizes = (img_size, patch_size, in_chans, embed_dim)
        self.patch_embed = _patch_embed(embed, embed_stage, *sizes, **cut)
        self._add_positions(factory)
        self.pos_drop = dropout(pos_drop_rate)
        self.patch_drop = _patch_drop(patch_drop_rate, self.num_prefix_tokens)
        norm = partial(_norm, embed_dim, norm_eps, factory)
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
        prefix = self._prefix_rows
        if self.pos_embed_kind == "none":
            self.pos_embed: Tensor | None = None
        elif self.pos_embed_kind == "learned":
            self.pos_embed = _tokens(prefix + self.patch_embed.num_patches, self.embed_dim, factory)
        elif self.pos_embed_kind == "learned2d":
            self.pos_embed = None
            self._add_axes(factory)
        else:  # a buffer: saved like timm's parameter, so plain timm can load it, never trained
            table = positions.sincos2d(self.patch_embed.grid_size, self.embed_dim)
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
        x = through(self.head, self.forward_class_token(x))  # [B, D] -> [B, C]
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
        x = self.head_drop(through(self.pre_logits, self.fc_norm(self.pool(x))))  # [B, D]
        if not pre_logits:
            x = through(self.head, x)
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
        """[B, 3, S, S] -> tokens [B, T, D]; in bfloat16 where patches are computed in it.

        Under autocast positions would raise them, and every sum of the blocks after them, to
        float32: on an H100 the kernels of a step then take 72 ms (ViT-B/16, batch 256), where the
        whole step takes 67. Features are off by 1.1 % instead of 0.9 (bfloat16, ViT-S/14). Those of
        float16 are raised: sums of large models pass 65,504, where it ends.
        """
        x: Tensor = self.patch_embed(images)  # [B, 3, S, S] -> [B, P, D]
        precision = x.dtype
        table = self._positions((images.shape[-2], images.shape[-1]))  # [1, T or P, D]
        prefix = [
            token.expand(x.shape[0], -1, -1)
            for token in (self.cls_token, self.reg_token)
            if token is not None
        ]
        if table is not None and self.no_embed_class:
            x = x + table
        x = torch.cat([*prefix, x], dim=1)  # [B, T, D]; token 0 is the class token
        if table is not None and not self.no_embed_class:
            x = x + table
        x = self.norm_pre(self.patch_drop(self.pos_drop(x)))
        return x.to(precision) if precision is torch.bfloat16 else x

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, T, D] -> [B, D]; all tokens where the pooling is ""."""
        kind = self.global_pool if pool_type is None else pool_type
        if kind == "token":
            return x[:, 0]
        return x[:, self.num_prefix_tokens :].mean(dim=1) if kind == "avg" else x

    def shortened(self) -> "VisionTransformer":
        """Another model of the same tensors, with the first and the last block alone.

        The blocks are of one shape, so what kernels make of it shows in those two.
        """
        short = copy(self)
        short._modules = dict(self._modules)
        short.blocks = nn.Sequential(*list(self.blocks)[:1], *list(self.blocks)[1:][-1:])
        return short

    # --- positions, and another size ---------------------------------------------------------

    def _positions(self, img_size: Pair) -> Tensor | None:
        if self.pos_embed_kind == "learned2d":
            grid = self.patch_embed.grid_size
            if self.dynamic_img_size:
                grid = self.patch_embed.dynamic_feat_size(img_size)
            return positions.crossed(self.pos_embed_y, self.pos_embed_x, grid, self._prefix_rows)
        if self.pos_embed is None or not self.dynamic_img_size:
            return self.pos_embed
        return self._resampled(self.pos_embed, self.patch_embed.dynamic_feat_size(img_size))

    def position_table(self) -> Tensor | None:
        """What is added to the tokens, [1, T or P, D]; None without positions."""
        return self._positions(self.patch_embed.img_size)

    def _resampled(self, table: Tensor, grid: positions.Grid) -> Tensor:
        return positions.resampled(table, self.patch_embed.grid_size, grid, self._prefix_rows)

    @property
    def _prefix_rows(self) -> int:
        """Prefix tokens that have a row among the positions."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def set_input_size(
        self,
        img_size: int | Sequence[int] | None = None,
        patch_size: int | Sequence[int] | None = None,
    ) -> None:
        """Changes image or patch size in place; positions and kernel are resampled."""
        old = self.patch_embed.grid_size
        table = self.pos_embed
        new = self.patch_embed.grid_of(
            self.patch_embed.img_size if img_size is None else pair(img_size),
            self.patch_embed.patch_size if patch_size is None else pair(patch_size),
        )
        if self.pos_embed_kind == "learned2d" and new != old:
            for name, rows in zip(("pos_embed_y", "pos_embed_x"), new, strict=True):
                axis = getattr(self, name)
                longer = positions.stretched(axis.detach(), rows)
                setattr(self, name, nn.Parameter(longer, requires_grad=axis.requires_grad))
        if table is not None and new != old:
            resampled = self._resampled(table.detach(), new)
            if isinstance(table, nn.Parameter):
                resampled = nn.Parameter(resampled, requires_grad=table.requires_grad)
            self.pos_embed = resampled
        self.patch_embed.set_input_size(img_size, patch_size)
        size = None if patch_size is None else self.patch_embed.patch_size
        update_model_input_size(self, self.patch_embed.img_size, patch_size=size)


def _patch_embed(
    cnn: str | None, stage: int | None, *sizes: Any, **cut: Any
) -> PatchEmbed | HybridEmbed:
    """Patches of the image, or of a CNN's feature map."""
    return (
        PatchEmbed(*sizes, **cut) if cnn is None else HybridEmbed(cnn, *sizes, stage=stage, **cut)
    )


def _patch_drop(rate: float, prefix: int) -> nn.Module:
    return PatchDropout(rate, num_prefix_tokens=prefix) if rate > 0 else nn.Identity()


def _pre_logits(width: int, size: int | None, factory: dict[str, Any]) -> nn.Module:
    if not size:
        return nn.Identity()
    layers = nn.Sequential()
    layers.add_module("fc", nn.Linear(width, size, **factory))
    layers.add_module("act", nn.Tanh())
    return layers


def _tokens(count: int, width: int, factory: dict[str, Any]) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, count, width, **factory))


def _norm(width: int, eps: float, factory: dict[str, Any], wanted: bool) -> nn.Module:
    return nn.LayerNorm(width, eps, **factory) if wanted else nn.Identity()
