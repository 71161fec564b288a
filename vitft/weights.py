"""Weights from a file into a model, or a plain no: nothing is half-loaded.

In: a file and a model. Out: tensors under the model's names, each one matched by name and shape,
with a reason for every one left out; else `WeightsError` with what is missing, unexpected and
misshapen, and the likely cause. `tensorfile` reads files, `convert` knows other people's names,
`adapt` other sizes, `advice` what may have gone wrong.

    python -m vitft.weights inspect FILE
    python -m vitft.weights check FILE --model vitflower_b16
"""

import hashlib
import importlib
import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitft import adapt, advice, convert, tensorfile
from vitft.errors import Fault, WeightsError

NESTED = 4  # containers within containers; a pickle may hold itself
SHOWN = 3  # names listed before the rest is only counted
BUNDLED = "vit_s14.fp16.safetensors"
_STAGE = re.compile(r"patch_embed\.backbone\.blocks\.(\d+)\.")

# containers that training scripts wrap weights in; averaged weights are what they evaluate
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "target_encoder")
RAW = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "module", "encoder")
RAW_LAST = ("student",)  # only where no teacher is


# --- read ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds.

    Attributes:
        path: Where it was read from.
        kind: A key of `tensorfile.KINDS`.
        sha256: Of the whole file, hex.
        tensors: Name -> tensor, as saved, without containers and `module.` prefixes.
        notes: What was peeled off or chosen.
        metadata: Free text of a safetensors header.
    """

    path: Path
    kind: str
    sha256: str
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]
    metadata: dict[str, str]


def read(path: Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file by name; see `open_file`."""
    return open_file(path, sha256=sha256).tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The free text of a safetensors file: name -> text; empty for other kinds.

    Raises:
        WeightsError: As `tensorfile.sniff` and `tensorfile.read_header`.
    """
    if tensorfile.sniff(path) != "safetensors":
        return {}
    return tensorfile.read_metadata(path)


def open_file(
    path: Path, *, sha256: str | None = None, key: str | None = None, ema: bool = True
) -> Checkpoint:
    """Reads a weights file of any known kind.

    Args:
        path: .pth, .pt, .bin, .safetensors or .npz; the content decides.
        sha256: Hex digits, or the first 8 and more of them, that the file must have. A name that
            ends in `-xxxxxxxx` before its suffix promises the same.
        key: Container to take where the file has several, such as `student`.
        ema: Prefer averaged weights over raw ones where both are there.

    Raises:
        WeightsError: Not weights, damaged, would run code, wrong checksum, or not finite.
    """
    path = Path(path)
    kind = tensorfile.sniff(path)
    digest = _check_sum(path, sha256)
    notes = [remark] if (remark := tensorfile.misnamed(path, kind)) else []
    tensors, peeled = unwrap(tensorfile.load(path, kind), key=key, ema=ema, place=path)
    _require_sound(tensors, path)
    metadata = tensorfile.read_metadata(path) if kind == "safetensors" else {}
    return Checkpoint(path, kind, digest, tensors, (*notes, *peeled), metadata)


def _check_sum(path: Path, wanted: str | None) -> str:
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    # a name of decimal digits alone is more often a date or a step than a checksum
    named = re.search(r"-(?=[0-9a-f]*[a-f])([0-9a-f]{8,64})(?:\.[a-z]+)+$", path.name)
    promises = (
        ("the recipe", (wanted or "").lower(), "get that file, or correct the recipe's sha256"),
        ("its name", named[1] if named else "", "download it again, or rename it"),
    )
    for who, promised, fix in promises:
        if promised and not digest.startswith(promised):
            text = f"sha256 begins {digest[: max(len(promised), 8)]}, {who} promises {promised}"
            raise WeightsError.of("ckpt.sha256", path, text, fix)
    return digest


def unwrap(
    content: Any, *, key: str | None = None, ema: bool = True, place: object = "checkpoint"
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors by name out of whatever a training script saved around them.

    Args:
        content: A mapping of tensors, or of mappings.
        key: Container to take; None: by rule.
        ema: Prefer averaged weights.
        place: For messages.

    Returns:
        Name -> tensor, and notes on what was peeled off.

    Raises:
        WeightsError: `ckpt.no_tensors`, or `ckpt.ambiguous`.
    """
    notes: list[str] = []
    for _ in range(NESTED):
        if not isinstance(content, Mapping):
            kind = type(content).__name__
            text = f"holds {_a(kind)}, not tensors by name"
            raise WeightsError.of("ckpt.no_tensors", place, text, tensorfile.SAFE_COPY)
        chosen = _container(content, key, ema, place)
        if chosen is None:
            break
        notes.append(f"took {chosen!r} out of {', '.join(_cut(k) for k in content)[:200]}")
        content, key = content[chosen], None
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        text = f"holds no tensors by name{_only_these(content)}"
        raise WeightsError.of("ckpt.no_tensors", place, text, "name the file with the weights")
    return _peel(tensors, notes)


def _container(content: Mapping[Any, Any], key: str | None, ema: bool, place: object) -> str | None:
    """The entry that holds the weights; None where the mapping itself does."""
    held = [str(k) for k, v in content.items() if _holds_tensors(v)]
    if key is not None:
        if key in held:
            return key
        fix = f"it holds {', '.join(held)}" if held else "it holds no containers: leave key out"
        raise WeightsError.of("ckpt.key", place, f"has no container {key!r}", fix)
    for group in (AVERAGED, RAW) if ema else (RAW, RAW_LAST, AVERAGED):
        if named := [k for k in group if k in held]:
            return _only(named if group is not AVERAGED else named[:1], place)
    if any(isinstance(v, Tensor) for v in content.values()) or not held:
        return None
    return _only(held, place)


def _only_these(content: Mapping[Any, Any]) -> str:
    if {"state", "param_groups"} <= content.keys():
        return ": it is the state of an optimizer"
    return f", only {', '.join(_cut(k) for k in content)[:200]}" if content else ": it is empty"


def _only(held: list[str], place: object) -> str:
    if len(held) == 1:
        return held[0]
    text = f"holds weights in {', '.join(_cut(k) for k in held)}"
    fix = f"say which: key={held[0]!r}, or save that part alone"
    raise WeightsError.of("ckpt.ambiguous", place, text, fix)


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    """A mapping of text to tensors, or one that holds such a mapping under a known name."""
    if not isinstance(value, Mapping) or depth == NESTED:
        return False
    if any(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()):
        return True
    return any(_holds_tensors(value.get(k), depth + 1) for k in (*AVERAGED, *RAW, *RAW_LAST))


def _peel(
    tensors: dict[str, Tensor], notes: list[str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Takes off what DistributedDataParallel and torch.compile put before every name."""
    for _ in range(NESTED):  # in any order
        for prefix in ("module.", "_orig_mod."):
            if all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
                notes.append(f"took the prefix {prefix!r} off every name")
    return tensors, tuple(notes)


def _require_sound(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Every tensor is a plain one, and every value of it a number."""
    faults = []
    for name, tensor in tensors.items():
        if not tensorfile.is_plain(tensor):
            text = f"{_cut(name)} is sparse, quantised, complex or overlaps itself"
            faults.append(Fault("ckpt.kind", str(path), text, "save it as a plain dense tensor"))
        elif bad := tensorfile.count_nonfinite(tensor):
            text = f"{_cut(name)} is not finite ({bad:,} of {tensor.numel():,} values)"
            fix = "the training that wrote it diverged; use an earlier checkpoint"
            faults.append(Fault("ckpt.nonfinite", str(path), text, fix))
    if faults:
        raise WeightsError(faults)


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, whatever the order.

    Args:
        state: Name -> tensor, on any device.

    Returns:
        64 hex digits.
    """
    whole = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        whole.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def bundled_file() -> Path:
    """The ViT-S/14 weights that travel with the package, float16.

    Raises:
        WeightsError: The installation lacks them.
    """
    path = Path(__file__).parent / "bundled" / BUNDLED
    if not path.is_file():
        fix = "install vitft from its source tree or wheel, which carry it"
        raise WeightsError.of("ckpt.missing", path, "this installation lacks it", fix)
    return path


# --- fit to a model ------------------------------------------------------------------------------


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


# --- check ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """Every tensor accounted for.

    Attributes:
        loaded: How many tensors the model takes from the file.
        dropped: The file's name -> why it is left out.
        new: The model's names that keep their fresh values.
    """

    loaded: int
    dropped: dict[str, str]
    new: tuple[str, ...]


def check(
    state: Mapping[str, Tensor],
    model_state: Mapping[str, Tensor],
    *,
    new: Sequence[str] = (),
    drop: Sequence[str] = (),
    place: object = "checkpoint",
) -> Match:
    """Matches a file's tensors with a model's by name and shape, all of them.

    Args:
        state: The file's name -> tensor.
        model_state: The model's name -> tensor.
        new: Names of the model that the file may lack, such as the head's.
        drop: Names of the file that may be left out where they do not fit, such as the head's.
        place: The file, for messages.

    Raises:
        WeightsError: Anything else is missing, unexpected, misshapen or of another kind.
    """
    dropped: dict[str, str] = {}
    unexpected, misshapen, kinds = [], [], []
    for name, tensor in state.items():
        own = model_state.get(name)
        if own is None:
            if name in drop:
                dropped[name] = "the model has no such tensor"
            else:
                unexpected.append(name)
        elif tensor.shape != own.shape:
            if name in drop:
                dropped[name] = _misfit(tensor, own)
            else:
                misshapen.append(name)
        elif tensor.is_floating_point() != own.is_floating_point():
            kinds.append(name)
    absent = [n for n in model_state if n not in state or n in dropped]
    missing = [n for n in absent if n not in new]
    if missing or unexpected or misshapen or kinds:
        wrong = _Mismatch(state, model_state, missing, unexpected, misshapen, kinds)
        raise WeightsError(wrong.faults(str(place)))
    return Match(len(model_state) - len(absent), dropped, tuple(absent))


def _misfit(tensor: Tensor, own: Tensor) -> str:
    empty = " (all zeros)" if not bool(tensor.any()) else ""
    rows = tensor.shape[0] if tensor.ndim else 1
    if tensor.shape[1:] == own.shape[1:]:
        return f"it is for {rows:,} classes{empty}, the model has {own.shape[0]:,}"
    return f"shape {_shape(tensor)}{empty}, the model has {_shape(own)}"


@dataclass(frozen=True)
class _Mismatch:
    state: Mapping[str, Tensor]
    model_state: Mapping[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]
    kinds: list[str]

    def faults(self, place: str) -> list[Fault]:
        """One fault per kind of mismatch; one in all where hardly anything matches."""
        cause = advice.advise(self.state, self.model_state, self.missing, self.unexpected)
        common = sum(name in self.model_state for name in self.state)
        if 2 * common < len(self.model_state):
            text = f"{common} of the model's {len(self.model_state)} tensors are in the file"
            text += f"; missing {listed(self.missing)}"
            text += f"; unexpected {listed(self.unexpected)}" if self.unexpected else ""
            fix = cause or "name the model that these weights belong to"
            return [Fault("ckpt.architecture", place, text, fix)]
        fix = cause or "use the file that belongs to this model, whole"
        return [
            Fault(id, place, text, fix)
            for id, names, text in (
                ("ckpt.missing_keys", self.missing, f"lacks {listed(self.missing)}"),
                ("ckpt.unexpected_keys", self.unexpected, f"also holds {listed(self.unexpected)}"),
                ("ckpt.shape", self.misshapen, self._shapes()),
                ("ckpt.dtype", self.kinds, self._types()),
            )
            if names
        ]

    def _shapes(self) -> str:
        rows = [
            f"{_cut(n)} is {_shape(self.state[n])}, the model has {_shape(self.model_state[n])}"
            for n in self.misshapen
        ]
        return _more("; ".join(rows[:SHOWN]), len(rows))

    def _types(self) -> str:
        rows = [
            f"{_cut(n)} is {self.state[n].dtype}, the model has {self.model_state[n].dtype}"
            for n in self.kinds
        ]
        return _more("; ".join(rows[:SHOWN]), len(rows))


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(str(n) for n in tensor.shape)}]"


def _cut(name: object) -> str:
    text = str(name)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def listed(names: Iterable[str]) -> str:
    """Such as `5 tensors (a, b, c, and 2 more)`."""
    names = list(names)
    shown = ", ".join(_cut(n) for n in names[:SHOWN])
    return _more(f"{len(names):,} tensor{'s' * (len(names) != 1)} ({shown}", len(names)) + ")"


def _more(text: str, count: int) -> str:
    return text if count <= SHOWN else f"{text}, and {count - SHOWN:,} more"


def _a(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


# --- for timm ------------------------------------------------------------------------------------


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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m vitft.weights`; the work is `vitft.twin`'s, far above this floor."""
    code: int = importlib.import_module("vitft.twin").main(argv)
    return code


if __name__ == "__main__":
    sys.exit(importlib.import_module("vitft.cli").door(main))
