"""What the tensors say about a ViT: its sizes and options, read from names and shapes.

In: tensors (or anything with `.shape`) under timm's names. Out: an `Anatomy`, or None where they
are no ViT's.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vitft.layouts import CNN


@dataclass(frozen=True)
class Anatomy:
    """Sizes of a ViT, read from tensors under timm's names.

    Attributes:
        gated: The MLP's first layer has twice the rows that its second reads (SwiGLU).
        patch: Height and width of the patch, px; (0, 0) for an old linear patch embedding.
        positions: Rows of the position table; 0 without one.
        registers: Tokens besides the class token that take part.
        classes: Rows of the head; 0 without one.
        cnn: Blocks per stage of a hybrid's ResNet, () for its stem alone; None without a CNN, or
            for one that is no such ResNet.
        has_cnn: The patches are cut from a CNN's feature map; `patch` counts cells then.
    """

    width: int
    depth: int
    hidden: int
    gated: bool
    patch: tuple[int, int]
    in_chans: int
    positions: int
    class_token: bool
    registers: int
    layer_scale: bool
    pre_norm: bool
    fc_norm: bool
    qkv_bias: bool
    representation: int
    classes: int
    cnn: tuple[int, ...] | None = None
    has_cnn: bool = False

    @property
    def words(self) -> str:
        """Such as `12 blocks of width 768, patch 16`."""
        on = " of a CNN's map" if self.has_cnn else ""
        return f"{self.depth} blocks of width {self.width}, patch {self.patch[0]}{on}"


def anatomy(state: Mapping[str, Any]) -> Anatomy | None:
    """Reads sizes from shapes (tensors or anything with `.shape`); None where it is no ViT."""
    kernel, fc1 = state.get("patch_embed.proj.weight"), state.get("blocks.0.mlp.fc1.weight")
    if kernel is None or fc1 is None:
        return None
    blocks = [int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))]
    flat = len(kernel.shape) != 4

    def rows(name: str, axis: int = 0) -> int:
        return int(state[name].shape[axis]) if name in state else 0

    return Anatomy(
        width=int(kernel.shape[0]),
        depth=max(blocks) + 1,
        hidden=int(fc1.shape[0]),
        gated="blocks.0.mlp.fc2.weight" in state
        and 2 * int(state["blocks.0.mlp.fc2.weight"].shape[1]) == int(fc1.shape[0]),
        patch=(0, 0) if flat else (int(kernel.shape[2]), int(kernel.shape[3])),
        in_chans=_colours(state, kernel),
        positions=rows("pos_embed", 1),
        class_token="cls_token" in state,
        registers=rows("reg_token", 1) + rows("dist_token", 1),
        layer_scale="blocks.0.ls1.gamma" in state,
        pre_norm="norm_pre.weight" in state,
        fc_norm="fc_norm.weight" in state,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        representation=rows("pre_logits.fc.weight"),
        classes=rows("head.weight"),
        cnn=_resnet(state),
        has_cnn=any(name.startswith("patch_embed.backbone.") for name in state),
    )


def _colours(state: Mapping[str, Any], kernel: Any) -> int:
    """Colour channels; 0 for an old linear patch embedding. A hybrid's CNN meets them first."""
    kernels = (t for name, t in state.items() if name.startswith(CNN) and len(t.shape) == 4)
    first = next(kernels, kernel)
    return int(first.shape[1]) if len(first.shape) == 4 else 0


def _resnet(names: Iterable[str]) -> tuple[int, ...] | None:
    """Blocks per stage of the BiT ResNet under a hybrid's patches."""
    names = [n.removeprefix(CNN) for n in names if n.startswith(CNN)]
    units = {
        m.group(1, 2) for n in names if (m := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.norm3", n))
    }
    if not units:
        return () if {"conv.weight", "norm.weight"} <= set(names) else None
    count = max(int(stage) for stage, _ in units) + 1
    return tuple(sum(int(stage) == i for stage, _ in units) for i in range(count))
