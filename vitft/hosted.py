"""What timm asks of a ViT beside its answer; its registry is the host, our model a guest.

Outputs on the way for feature extraction and DINO's habits, another head, the groups of parameters
for layer-wise learning rates, files that timm has found, and memory saved in training. `vit` adds
the parts themselves and the way of the data. Shapes: see `vit`.

Source: timm's own ViT, timm/models/vision_transformer.py; tests hold the two side by side.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args
from torch import Tensor, nn

from vitft import console
from vitft.errors import RecipeError
from vitft.hybrid import HybridEmbed
from vitft.patches import PatchEmbed

POOLS = ("", "token", "avg")


def choose(key: str, value: object, allowed: Sequence[str]) -> None:
    """Refuses a value of a recipe's `model.<key>` that is none of those allowed.

    Raises:
        RecipeError: `model.<key>`.
    """
    if value not in allowed:
        rule = f"must be one of {', '.join(repr(a) for a in allowed)}, got {value!r}"
        raise RecipeError.of(f"model.{key}", f"model.{key}", rule, "write one of these names")


class Hosted(nn.Module):
    """The ViT as its host sees it; the parts named here are made by `VisionTransformer`."""

    pretrained_cfg: dict[str, Any]  # these two are timm's, set once the model is built
    _traits: dict[str, Any]

    num_classes: int
    global_pool: str
    embed_dim: int
    head_hidden_size: int
    has_class_token: bool
    num_prefix_tokens: int
    grad_checkpointing: bool
    patch_embed: PatchEmbed | HybridEmbed
    blocks: nn.Sequential
    norm: nn.Module
    fc_norm: nn.Module
    pre_logits: nn.Module
    head: nn.Module

    def _embed(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> tokens [B, T, D] before the first block."""
        raise NotImplementedError

    # --- outputs on the way --------------------------------------------------------------------

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

    # --- the head ------------------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a fresh head in place (0: none) on the device of the old weights."""
        if global_pool is not None:
            choose("global_pool", global_pool, POOLS)
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

    def _new_head(self, factory: dict[str, Any]) -> nn.Module:
        if self.num_classes <= 0:
            return nn.Identity()
        return nn.Linear(self.head_hidden_size, self.num_classes, **factory)

    def _check_pool(self, pool: str) -> None:
        if pool == "token" and not self.has_class_token:
            rule = "'token' needs the class token, which class_token: false left out"
            raise RecipeError.of("model.global_pool", "model.global_pool", rule, "use avg")

    # --- training and files --------------------------------------------------------------------

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
        from vitft import fitting, weights

        tensors = weights.read(Path(checkpoint_path))
        inner = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        whole, match, _ = fitting.complete(inner, self, place=checkpoint_path)
        for name, why in match.dropped.items():
            console.warn(f"weights: left out {name}: {why}")
        self.load_state_dict(whole)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes block activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable
        if isinstance(self.patch_embed, HybridEmbed):
            self.patch_embed.set_grad_checkpointing(enable)

    def _checkpointing(self) -> bool:
        return self.grad_checkpointing and torch.is_grad_enabled()


def _taken(depth: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    wanted = indices if indices is None or isinstance(indices, int) else list(indices)
    taken, last = feature_take_indices(depth, wanted)
    return list(taken), last
