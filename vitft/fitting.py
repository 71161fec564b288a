"""A file's weights in the names and sizes of one model, whole: nothing is half-loaded.

In: tensors as `weights` read them, and a model. Out: tensors under the model's names, with a reason
for every one left out and a note for every change. `convert` knows other people's names, `adapt`
other sizes; `tally` then accounts for every tensor, which `complete` does at once.
"""

import json
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitft import adapt, convert
from vitft.errors import WeightsError
from vitft.tally import Match, check, listed
from vitft.weights import open_file, read_metadata, unwrap

_STAGE = re.compile(r"patch_embed\.backbone\.blocks\.(\d+)\.")


@dataclass(frozen=True)
class Fitted:
    """A file's tensors in the names and sizes of one model; `check` has not seen them yet.

    Attributes:
        state: The model's name -> tensor.
        dropped: The file's name -> why it was left out.
        notes: What was converted.
        layout: Whose names the file had; "" where they were the model's own.
    """

    state: dict[str, Tensor]
    dropped: dict[str, str]
    notes: tuple[str, ...]
    layout: str


def fit(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    *,
    pos_grid: tuple[int, int] | None = None,
    place: object = "checkpoint",
) -> Fitted:
    """Renames and resizes a checkpoint for one model.

    Args:
        tensors: Name -> tensor, as `read` gives them.
        model: A ViT (ours or timm's), for which every table in `layouts` is known; for any
            other model only a common prefix is taken off.
        pos_grid: The file's position grid (height, width), where it is not square.
        place: For messages.

    Raises:
        WeightsError: `ckpt.layout`, `ckpt.ambiguous`, `ckpt.options` or `ckpt.pos_grid`.
    """
    own = set(model.state_dict())
    kept, unasked = asked(tensors, own)
    found = _fitted(kept, own, model, pos_grid, place)
    return replace(found, dropped=found.dropped | unasked)


def asked(
    tensors: Mapping[str, Tensor], own: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Without stages of a hybrid's CNN behind its map, which earlier versions kept unused.

    Args:
        tensors: Of the file.
        own: Names of the model.

    Returns:
        The rest, and name -> why for what was left out.
    """
    last = max((int(found[1]) for found in map(_STAGE.match, own) if found), default=None)
    behind = {
        name: "a stage of the CNN behind the map that the model reads"
        for name in tensors
        if last is not None and (found := _STAGE.match(name)) and int(found[1]) > last
    }
    return {name: t for name, t in tensors.items() if name not in behind}, behind


def _fitted(
    tensors: Mapping[str, Tensor],
    own: set[str],
    model: nn.Module,
    pos_grid: tuple[int, int] | None,
    place: object,
) -> Fitted:
    if not adapt.is_vit(model):
        return _strip(tensors, own)
    named = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", ""))
    found = convert.convert(tensors, own, place=place, says=own_words(place), model=named)
    if not found.layout:
        return _strip(tensors, own)
    _require_alike(found, model, place)
    adapted = adapt.adapt(
        found.state,
        model,
        pos_grid=pos_grid,
        no_embed_class=found.options.get("no_embed_class", False),
        place=place,
    )
    notes = (*_prefix_note(found.prefix), *adapted.notes, *_untold(found, model))
    if any(found.prefix + name not in tensors for name in found.state):
        notes = (f"names converted from {found.layout}", *notes)
    return Fitted(adapted.state, found.dropped | adapted.dropped, notes, found.layout)


def own_words(place: object) -> str:
    """What a file says of itself beside its tensors: its name, its header, its folder's config."""
    path, words = Path(str(place)), []
    if path.is_dir():  # as timm's local-dir: names it
        path = path / "model.safetensors"
        words.append(_architecture(path.with_name("config.json")))
    with suppress(WeightsError, OSError, ValueError):  # told where it is read
        words.append(str(read_metadata(path)) if path.is_file() else "")
    return " ".join((path.name, *words))


def _architecture(config: Path) -> str:
    """That timm's config.json names; "" where there is none."""
    try:
        found = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError):
        return ""
    return str(found.get("architecture", "")) if isinstance(found, dict) else ""


def _require_alike(found: convert.Converted, model: Any, place: object) -> None:
    """Refuses what would load whole and answer otherwise: heads and activation show in no tensor.

    Raises:
        WeightsError: `ckpt.options`.
    """
    block = model.blocks[0]
    for option, of_block in (("num_heads", _heads), ("act_layer", _activation)):
        wanted = found.options.get(option)
        if wanted is not None and wanted != (mine := of_block(block)):
            text = f"{found.layout} has {option} {wanted}, which no tensor shows; the model {mine}"
            raise WeightsError.of("ckpt.options", place, text, f"build it with {option}: {wanted}")


def _heads(block: Any) -> int:
    return int(block.attn.num_heads)


def _activation(block: Any) -> str:
    """As `blocks.ACTIVATIONS` calls it; for others the name of the class."""
    act = getattr(block.mlp, "act", None)
    kind = type(act).__name__
    if kind == "GELU" and getattr(act, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh"}.get(kind, kind)


def _untold(found: convert.Converted, model: Any) -> tuple[str, ...]:
    """What the file's owner has to know, for no tensor shows it."""
    block, out = model.blocks[0], []
    eps = found.options.get("norm_eps")
    own = getattr(block.norm1, "eps", eps)
    if eps is not None and own != eps:
        out.append(f"a CLIP tower's norm_eps is {eps:g}, the model's {own:g}")
    if asked := convert.untold_activation(found):
        out.append(f"no tensor shows the activation, {_activation(block)} in this model: {asked}")
    return tuple(out)


def _prefix_note(prefix: str) -> tuple[str, ...]:
    return (f"took the prefix {prefix!r} off the names",) if prefix else ()


def _strip(tensors: Mapping[str, Tensor], own: set[str]) -> Fitted:
    """Takes off the prefix that makes most names the model's."""
    counts = {"": sum(name in own for name in tensors)}
    for name in tensors:
        parts = name.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in own:
                prefix = ".".join(parts[:i]) + "."
                counts[prefix] = counts.get(prefix, 0) + 1
    best = max(counts, key=lambda p: (counts[p], -len(p)))
    inside = {n.removeprefix(best): t for n, t in tensors.items() if n.startswith(best)}
    outside = {n: f"outside {best}" for n in tensors if not n.startswith(best)}
    return Fitted(inside, outside, _prefix_note(best), "")


def load_for(
    model: nn.Module,
    path: Path,
    *,
    sha256: str | None = None,
    pos_grid: tuple[int, int] | None = None,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Reads a file and fits it to a model; `check` is the next step.

    Returns:
        The model's name -> tensor, and notes on everything that was peeled, converted, resized
        or left out on the way.

    Raises:
        WeightsError: As `open_file` and `fit`.
    """
    found = open_file(path, sha256=sha256)
    fitted = fit(found.tensors, model, pos_grid=pos_grid, place=path)
    left_out: dict[str, list[str]] = {}
    for name, why in fitted.dropped.items():
        left_out.setdefault(why, []).append(name)
    lines = [f"left out {listed(names)}: {why}" for why, names in left_out.items()]
    held = {t.dtype for t in fitted.state.values()} - {t.dtype for t in model.state_dict().values()}
    if held:
        kinds = ", ".join(sorted(str(d).removeprefix("torch.") for d in held))
        lines.append(f"values stored as {kinds} are converted to the model's type")
    return fitted.state, (*found.notes, *fitted.notes, *lines)


def complete(
    tensors: Mapping[str, Any], model: nn.Module, *, place: object = "checkpoint"
) -> tuple[dict[str, Tensor], Match, tuple[str, ...]]:
    """A whole state for a model: the file's tensors, and the model's own where they may be new.

    This is what timm needs to load strictly, whatever became of the head.

    Args:
        tensors: As read, or as a caller has them; containers are peeled off.
        model: A model with `get_classifier`.
        place: For messages.

    Returns:
        Name -> tensor for every name of the model, the match, and notes.

    Raises:
        WeightsError: As `unwrap`, `fit` and `check`.
    """
    peeled, notes = unwrap(tensors, place=place)
    fitted = fit(peeled, model, place=place)
    own = model.state_dict()
    head = [name for name in own if name.startswith("head.")]
    match = check(fitted.state, own, new=head, drop=("head.weight", "head.bias"), place=place)
    taken = {k: v for k, v in fitted.state.items() if k not in match.dropped}
    match = Match(match.loaded, fitted.dropped | match.dropped, match.new)
    return own | taken, match, (*notes, *fitted.notes)
