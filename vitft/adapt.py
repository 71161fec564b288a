"""A checkpoint of one size for a model of another: positions, patch kernel, colours, tokens.

In: tensors under timm's names, and the ViT that will take them. Out: the same in its sizes, with a
note for everything resampled, added or left out. Nothing is forced: what cannot be brought to the
model's size stays as it is, for the check that follows.

Source: Beyer et al., FlexiViT, 2022 (arXiv 2212.08013) for patch kernels; Dosovitskiy et al., 2021
(arXiv 2010.11929), section 3.2, for positions.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor

from vitft.errors import WeightsError
from vitft.layouts import CNN
from vitft.positions import Grid, resampled


class _Module(Protocol):
    def state_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Adapted:
    """A converted checkpoint in the sizes of one model, with what was done to it."""

    state: dict[str, Tensor]
    dropped: dict[str, str]
    notes: tuple[str, ...]


def is_vit(model: _Module) -> bool:
    """Whether the model carries timm's ViT names and says where its positions begin."""
    names = model.state_dict()
    named = "patch_embed.proj.weight" in names and "blocks.0.attn.qkv.weight" in names
    return named and hasattr(model, "no_embed_class")  # CaiT, SAM and Hiera do not


def adapt(
    state: Mapping[str, Tensor],
    model: Any,
    *,
    pos_grid: Grid | None = None,
    no_embed_class: bool = False,
    place: object = "checkpoint",
) -> Adapted:
    """Brings positions, patch kernel and channels to the sizes of a ViT, ours or timm's.

    Args:
        state: timm's name -> tensor.
        model: The ViT that will take them.
        pos_grid: Height and width of the file's position grid, where it is not square.
        no_embed_class: The file's layout has no position for the class token.
        place: For messages.

    Raises:
        WeightsError: `ckpt.pos_grid`: the position table has no such grid.
    """
    out, dropped, notes = dict(state), dict[str, str](), list[str]()
    _adapt_kernel(out, model, notes)
    _adapt_stem(out, model, notes)
    _adapt_registers(out, model, notes)
    if "pos_embed" in out:
        split = _Split(pos_grid, no_embed_class or model.no_embed_class, place)
        _adapt_positions(out, model, split, dropped, notes)
    _leave_out_representation(out, model, dropped)
    return Adapted(out, dropped, tuple(notes))


def _adapt_kernel(state: dict[str, Tensor], model: Any, notes: list[str]) -> None:
    name = "patch_embed.proj.weight"
    own, kernel = model.state_dict(), state.get(name)
    want = own[name].shape  # [D, channels, patch, patch]
    on_map = any(n.startswith(CNN) for n in own)
    if kernel is None or on_map != any(n.startswith(CNN) for n in state):
        return  # a kernel over colours is none over a CNN's map; the check will say so
    if kernel.ndim == 2 and kernel.shape[1] == math.prod(want[1:]):
        kernel = kernel.reshape(-1, *want[1:])  # before 2021 timm wrote it as a matrix
    if kernel.ndim != 4:
        return
    if kernel.shape[2:] != want[2:]:
        old, new = _size(kernel.shape[2:]), _size(want[2:])
        notes.append(f"patch kernel resampled from {old} to {new} px")
        kernel = resample_patch_embed(kernel.float(), list(want[2:])).to(kernel.dtype)
    if kernel.shape[1] != want[1] and not on_map:
        notes.append(f"patch kernel brought from {kernel.shape[1]} to {want[1]} colour channels")
        kernel = adapt_input_conv(want[1], kernel, base_chans=kernel.shape[1])
    state[name] = kernel


def _adapt_stem(state: dict[str, Tensor], model: Any, notes: list[str]) -> None:
    """A hybrid meets the colours in its CNN's first kernel."""
    own = model.state_dict()
    first = next((n for n, t in own.items() if n.startswith(CNN) and t.ndim == 4), None)
    kernel = state.get(first or "")
    if first is None or kernel is None or kernel.ndim != 4:
        return
    have, want = int(kernel.shape[1]), int(own[first].shape[1])
    if have != want:
        notes.append(f"first kernel of the CNN brought from {have} to {want} colour channels")
        state[first] = adapt_input_conv(want, kernel, base_chans=have)


def _adapt_registers(state: dict[str, Tensor], model: Any, notes: list[str]) -> None:
    """A distillation token is one more token that takes part: a register, as far as ViT goes."""
    if "dist_token" in state and getattr(model, "num_reg_tokens", 0) == 1:
        state["reg_token"] = state.pop("dist_token")
        notes.append("the distillation token became the register token")


def _adapt_positions(
    state: dict[str, Tensor],
    model: Any,
    split: "_Split",
    dropped: dict[str, str],
    notes: list[str],
) -> None:
    table = state["pos_embed"]  # [1, rows, D]
    known = model.state_dict()
    own = known.get("pos_embed")
    if own is None:
        dropped["pos_embed"] = "the model has no position embedding"
        del state["pos_embed"]
        return
    if getattr(model, "pos_embed_kind", "learned") == "sincos2d":
        dropped["pos_embed"] = "the model computes its sine-cosine positions"
        state["pos_embed"] = own
        return
    if table.ndim != 3 or table.shape[2] != own.shape[2]:
        return  # another width; the check will say so
    if ("cls_token" in state) != ("cls_token" in known):
        return  # so will it here
    new = tuple(model.patch_embed.grid_size)
    prefix, old = split.of(state, table.shape[1], new)
    want = 0 if model.no_embed_class else model.num_prefix_tokens
    rows, grid = table[:, :prefix], table[:, prefix:]
    rows = _adapt_prefix(state, rows, want, notes)
    if old != new:
        notes.append(f"positions resampled from {_size(old)} to {_size(new)} (bicubic)")
        grid = resampled(grid, old, new, 0)
    state["pos_embed"] = torch.cat([rows, grid], dim=1)


@dataclass(frozen=True)
class _Split:
    """What is known about a position table besides its number of rows."""

    pos_grid: Grid | None
    no_embed_class: bool
    place: object

    def of(self, state: Mapping[str, Tensor], rows: int, new: tuple[int, int]) -> tuple[int, Grid]:
        """How many rows belong to prefix tokens, and the grid that the others form.

        13 x 13 rows may also be a class token and 12 x 14 patches: without a word to the contrary
        the class token has a row, as in the paper.
        """
        first = int("cls_token" in state)
        extra = sum(state[k].shape[1] for k in ("reg_token", "dist_token") if k in state)
        for prefix in dict.fromkeys((first, first + extra, 0 if self.no_embed_class else first)):
            patches = rows - prefix
            side = math.isqrt(max(patches, 0))
            if self.pos_grid is not None:
                if patches == self.pos_grid[0] * self.pos_grid[1]:
                    return prefix, self.pos_grid
            elif patches == new[0] * new[1] and new[0] != new[1]:
                return prefix, new  # the model's own grid
            elif patches and side * side == patches:
                return prefix, (side, side)
        tried = "a square" if self.pos_grid is None else f"a grid of {_size(self.pos_grid)}"
        text = f"its {rows} rows of positions less {first} for the class token are not {tried}"
        fix = "say what grid it is: pos_grid=(height, width) in patches"
        if math.isqrt(rows) ** 2 == rows:
            fix += "; or, if no row is the class token's (DeiT-III): no_embed_class: true"
        raise WeightsError.of("ckpt.pos_grid", self.place, text, fix)


def _adapt_prefix(state: dict[str, Tensor], rows: Tensor, want: int, notes: list[str]) -> Tensor:
    """Positions of prefix tokens: given to the tokens themselves, or zero; exact both ways."""
    have = rows.shape[1]
    if want == 0 and have:
        state["cls_token"] = state["cls_token"] + rows[:, :1]
        if have > 1 and "reg_token" in state:
            state["reg_token"] = state["reg_token"] + rows[:, 1:]
        notes.append("positions of class and register tokens added to the tokens themselves")
        return rows[:, :0]
    if have < want:
        notes.append(f"{want - have} prefix token(s) had no position and got zero")
        return torch.cat([rows, rows.new_zeros(1, want - have, rows.shape[2])], dim=1)
    return rows


def _leave_out_representation(
    state: dict[str, Tensor], model: Any, dropped: dict[str, str]
) -> None:
    """The paper drops this layer for transfer; a head that was trained on it goes with it."""
    names = [n for n in state if n.startswith("pre_logits.")]
    if not names or any(n.startswith("pre_logits.") for n in model.state_dict()):
        return
    for name in names:
        dropped[name] = "the representation layer is left out for transfer"
        del state[name]
    head = state.get("head.weight")
    if head is not None and bool(head.any()):
        for name in ("head.weight", "head.bias"):
            if state.pop(name, None) is not None:
                dropped[name] = "the head reads the representation layer, which is left out"


def _size(size: Iterable[int]) -> str:
    return " x ".join(str(int(s)) for s in size)
