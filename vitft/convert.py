"""ViT checkpoints by others, recognised from their names and rewritten to timm's.

In: tensors by name, as read. Out: the same under timm's names, with a reason for every one left
out, and what the file's project built its model with where no tensor shows it. Nothing is guessed:
`layouts` holds a table per library, and names outside their table stay as they are, so that the
check which follows can name them.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitft.errors import WeightsError
from vitft.kin import occurs, relative
from vitft.layouts import CLIP, FORMS, JAX, LAYOUTS, PREFERRED, TIMM, Layout, Rule


@dataclass(frozen=True)
class Converted:
    """A checkpoint under timm's names.

    Attributes:
        layout: Name of the table, or "" where none applied.
        prefix: Taken off the front of every name.
        state: timm's name -> tensor.
        dropped: The file's name -> why it was left out.
        options: See `Layout`.
    """

    layout: str
    prefix: str
    state: dict[str, Tensor]
    dropped: dict[str, str]
    options: Mapping[str, Any]


def convert(
    state: Mapping[str, Tensor],
    own: Collection[str] = (),
    *,
    place: object = "checkpoint",
    says: str = "",
    model: str = "",
) -> Converted:
    """Rewrites a ViT checkpoint to timm's names; anything else comes back unchanged.

    Args:
        state: Name -> tensor, as read.
        own: Names of the model that will take them; what it has itself is never renamed.
        place: For messages.
        says: The file's name and header, where they may have to tell what names do not.
        model: timm's name of the model that will take them.

    Raises:
        WeightsError: `ckpt.layout`: a relative of ViT that this model family does not contain;
            `ckpt.ambiguous`: two backbones, and no rule to choose.
    """
    for layout in LAYOUTS:
        prefixes = _prefixes(layout, state)
        if prefixes:
            prefix = _preferred(prefixes, place)
            _refuse_relatives(state, {prefix + n for n in own}, says, model, place)
            return _rewrite(layout, prefix, state, own)
    return Converted("", "", dict(state), {}, {})


def _refuse_relatives(
    names: Iterable[str], own: Collection[str], says: str, model: str, place: object
) -> None:
    if found := relative(names, own, says=says, model=model):
        raise WeightsError.of("ckpt.layout", place, found.told, found.fix)


def _prefixes(layout: Layout, names: Iterable[str]) -> list[str]:
    first, *rest = layout.anchors
    names = set(names)
    found = sorted({m["p"] for name in names if (m := re.fullmatch(first, name))})
    return [p for p in found if all(occurs(r.replace("{p}", re.escape(p)), names) for r in rest)]


def _preferred(prefixes: list[str], place: object) -> str:
    if len(prefixes) == 1:
        return prefixes[0]
    for wanted in PREFERRED:
        chosen = [p for p in prefixes if f".{p}".endswith(f".{wanted}") or p.startswith(wanted)]
        if len(chosen) == 1:
            return chosen[0]
    text = f"holds several backbones: {', '.join(p or '(no prefix)' for p in prefixes)}"
    fix = "save the one you mean alone, without its prefix"
    raise WeightsError.of("ckpt.ambiguous", place, text, fix)


def _rewrite(
    layout: Layout, prefix: str, state: Mapping[str, Tensor], own: Collection[str]
) -> Converted:
    out: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    for name, tensor in _unstacked(prefix, state).items():
        inner = name[len(prefix) :] if name.startswith(prefix) else None
        if inner in own:
            out[str(inner)] = tensor
            continue
        reason = next((why for r, why in layout.drop if re.fullmatch(r, inner or name)), None)
        target = _apply(layout.outer, name) or (inner and _apply(layout.rules, inner))
        if reason is not None:
            dropped[name] = reason
        elif target:
            out[target[0]] = FORMS[target[1]](tensor)
        elif inner is not None:
            out[inner] = tensor
        else:
            dropped[name] = f"outside {prefix}"
    if layout is JAX:
        _count_from_zero(out)
    _fuse(out)
    if "head.weight" in out and "head.bias" not in out:  # CLIP projects without a bias
        out["head.bias"] = out["head.weight"].new_zeros(len(out["head.weight"]))
    title = _title(layout, prefix, state)
    return Converted(title, prefix, out, dropped, _untold(layout, title, state, out))


def _apply(rules: tuple[Rule, ...], name: str) -> tuple[str, str] | None:
    for pattern, target, *form in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(target), form[0] if form else ""
    return None


def _unstacked(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """big_vision may stack all blocks along a leading axis; this takes them apart."""
    stacked = f"{prefix}Transformer/encoderblock/"
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(stacked):
            out[name] = tensor
            continue
        for i, part in enumerate(tensor.unbind(0)):
            out[f"{prefix}Transformer/encoderblock_{i}/{name[len(stacked) :]}"] = part
    return out


def _fuse(state: dict[str, Tensor]) -> None:
    """Joins separate query, key and value projections to timm's one."""
    for name in [n for n in state if re.fullmatch(r"blocks\.\d+\.attn\.q\.(weight|bias)", n)]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in state for part in parts):
            fused = torch.cat([state.pop(part) for part in parts])
            state[name.replace(".attn.q.", ".attn.qkv.")] = fused


def _count_from_zero(state: dict[str, Tensor]) -> None:
    """Google counts a ResNet's stages and units from 1; a hybrid of a stem alone has neither."""
    stages = re.compile(r"(patch_embed\.backbone\.stages)\.(\d+)\.blocks\.(\d+)\.(.+)")
    found = {name: m for name in state if (m := stages.fullmatch(name))}
    stem = {n: n for n in state if n.startswith("patch_embed.backbone.stem.") and not found}
    moved = {n: f"{m[1]}.{int(m[2]) - 1}.blocks.{int(m[3]) - 1}.{m[4]}" for n, m in found.items()}
    moved |= {n: n.replace(".stem.", ".", 1) for n in stem}
    taken = {new: state.pop(old) for old, new in moved.items()}
    state.update(taken)


# --- what no tensor shows ------------------------------------------------------------------------


def _title(layout: Layout, prefix: str, names: Iterable[str]) -> str:
    """The layout's name, closer where the names tell which project wrote the file."""
    if layout is not TIMM:
        hybrid = layout is JAX and any("conv_root/" in name for name in names)
        return layout.name + ", hybrid" * hybrid
    signs = (
        (r".*visual\.trunk\..+", "OpenCLIP around a timm ViT"),
        (r".*base_encoder\..+", "MoCo-v3"),
        (r".*decoder_pred\..+", "MAE, pre-training"),
        (r".*blocks\.0\.gamma_1", "DeiT-III"),
        (r".*dist_token", "DeiT, distilled"),
        (r".*register_tokens", "DINOv2 with registers"),
        (r".*mask_token", "DINOv2"),
        (r".*(last_layer|head\.mlp)\..+", "DINO"),
        (r".*patch_embed\.backbone\..+", "timm, hybrid"),
        (r".*pre_logits\.fc\..+", "timm (historical, with pre_logits)"),
        (r".*norm_pre\..+", "timm (CLIP tower)"),
        (r".*blocks\.0\.ls1\.gamma", "timm (LayerScale, as DINOv2)"),
    )
    names = list(names)
    for pattern, title in signs:
        if any(re.fullmatch(pattern, name) for name in names):
            return title
    return layout.name


OPENAI = ("input_resolution", "context_length", "vocab_size")  # numbers in OpenAI's files alone


def _untold(
    layout: Layout, title: str, names: Collection[str], state: Mapping[str, Tensor]
) -> Mapping[str, Any]:
    """What the project that wrote the file built its model with, and no tensor shows."""
    options = dict(layout.options)
    if title == "DeiT-III":
        options["no_embed_class"] = True
    if "norm_pre.weight" in state:
        options["norm_eps"] = 1e-5  # every CLIP tower's, under whatever names
    if layout is CLIP and set(OPENAI) <= set(names):
        options["act_layer"] = "quick_gelu"
    table = state.get("pos_embed")
    small = table is not None and table.ndim == 3 and table.shape[2] == 384
    if table is not None and small and (title == "MoCo-v3" or _is_mocos(table)):
        options["num_heads"] = 12  # of 32, where DeiT's ViT-S has 6 of 64
    return options


def _is_mocos(table: Tensor) -> bool:
    """Whether positions [1, 1 + G * G, D] are MoCo-v3's, which stay as they were computed.

    Source: moco-v3 vits.py: sines and cosines of the row, then of the column, and 0 for the class.
    """
    side, quarter = math.isqrt(max(table.shape[1] - 1, 0)), table.shape[2] // 4
    if side * side + 1 != table.shape[1] or bool(table[:, 0].any()):
        return False
    steps = torch.arange(side, dtype=torch.float64).repeat_interleave(side)
    omega = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = steps[:, None] * omega, steps.view(side, side).T.reshape(-1, 1) * omega
    wanted = torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=1)
    return torch.allclose(table[0, 1:].double(), wanted, rtol=0, atol=2e-3)


def untold_activation(found: Converted) -> str:
    """What to look up where a file may have either of two activations; "" where it has GELU."""
    if "act_layer" in found.options:
        return ""
    if "norm_pre.weight" in found.state:
        return "OpenAI's weights need act_layer: quick_gelu, most of OpenCLIP's do not"
    if {"cls_token", "reg_token", "fc_norm.weight"}.isdisjoint(found.state):
        return "SigLIP 2's weights need act_layer: gelu_tanh"
    return ""
