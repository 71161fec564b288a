"""Weights as a file holds them: read safely, checked for damage, taken out of their wrappings.

In: a file of any known kind. Out: tensors by name as they were saved, all plain and finite, with
notes on what was peeled off; else `WeightsError`. `tensorfile` reads the kinds, `fitting` brings
the tensors to a model.

    python -m vitft.weights inspect FILE
    python -m vitft.weights check FILE --model vitflower_b16
"""

import hashlib
import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitft import tensorfile
from vitft.errors import Fault, WeightsError
from vitft.tally import cut

NESTED = 4  # containers within containers; a pickle may hold itself
BUNDLED = "vit_s14.fp16.safetensors"

# containers that training scripts wrap weights in; averaged weights are what they evaluate
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "target_encoder")
RAW = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "module", "encoder")
RAW_LAST = ("student",)  # only where no teacher is


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
    """The tensors of a file by name; see `open_file`. Hashed only where a sum was promised."""
    path = Path(path)
    kind = tensorfile.sniff(path)
    if _promised(path, sha256):
        _check_sum(path, sha256)
    return _sound(path, kind)[0]


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
    tensors, peeled = _sound(path, kind, key=key, ema=ema)
    metadata = tensorfile.read_metadata(path) if kind == "safetensors" else {}
    return Checkpoint(path, kind, digest, tensors, (*notes, *peeled), metadata)


def _sound(
    path: Path, kind: str, *, key: str | None = None, ema: bool = True
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors by name, each one plain and finite, and notes on what was peeled off."""
    tensors, peeled = unwrap(tensorfile.load(path, kind), key=key, ema=ema, place=path)
    _require_sound(tensors, path)
    return tensors, peeled


def _promised(path: Path, wanted: str | None) -> list[tuple[str, str, str]]:
    """Who promised which beginning of the sum, and the remedy."""
    # a name of decimal digits alone is more often a date or a step than a checksum
    named = re.search(r"-(?=[0-9a-f]*[a-f])([0-9a-f]{8,64})(?:\.[a-z]+)+$", path.name)
    promises = (
        ("the recipe", (wanted or "").lower(), "get that file, or correct the recipe's sha256"),
        ("its name", named[1] if named else "", "download it again, or rename it"),
    )
    return [promise for promise in promises if promise[1]]


def _check_sum(path: Path, wanted: str | None) -> str:
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    for who, promised, fix in _promised(path, wanted):
        if not digest.startswith(promised):
            text = f"sha256 begins {digest[: max(len(promised), 8)]}, {who} promises {promised}"
            raise WeightsError.of("ckpt.sha256", path, text, fix)
    return digest


# --- out of their wrappings ----------------------------------------------------------------------


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
        notes.append(f"took {chosen!r} out of {', '.join(cut(k) for k in content)[:200]}")
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
    return f", only {', '.join(cut(k) for k in content)[:200]}" if content else ": it is empty"


def _only(held: list[str], place: object) -> str:
    if len(held) == 1:
        return held[0]
    text = f"holds weights in {', '.join(cut(k) for k in held)}"
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


# --- what they are worth -------------------------------------------------------------------------


def _require_sound(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Every tensor is a plain one, and every value of it a number."""
    faults = []
    for name, tensor in tensors.items():
        if not tensorfile.is_plain(tensor):
            text = f"{cut(name)} is sparse, quantised, complex or overlaps itself"
            faults.append(Fault("ckpt.kind", str(path), text, "save it as a plain dense tensor"))
        elif bad := tensorfile.count_nonfinite(tensor):
            text = f"{cut(name)} is not finite ({bad:,} of {tensor.numel():,} values)"
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


def _a(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m vitft.weights`; the work is `vitft.twin`'s, far above this floor."""
    code: int = importlib.import_module("vitft.twin").main(argv)
    return code


if __name__ == "__main__":
    sys.exit(importlib.import_module("vitft.cli").door(main))
