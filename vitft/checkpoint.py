"""A training run's state on disk: written whole or not at all, checked before it is believed.

One folder per checkpoint, `step-00000123/`: `state.safetensors` (every tensor), `state.json` (every
number) and the manifest with their sha256. No pickle. Random numbers need no state: they are pure
functions of (seed, step), so that a resumed run draws what the undisturbed one would have.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitft import io, tensorfile
from vitft.errors import MachineError, WeightsError

FORMAT = 1
SCORE = "val_accuracy"  # of an epoch's record
NEVER = ("mode", "train.opt")  # may not differ anyway: the state would mean something else
KINDS = {"format": int, "step": int, "epoch": int, "batch": int, "identity": dict, "numbers": dict}


@dataclass(frozen=True)
class Snapshot:
    """Everything a training loop needs to go on.

    Attributes:
        step: Optimizer updates made.
        epoch: Epoch under way, from 0.
        batch: Batches of that epoch already used.
        tensors: Flat names (`model/...`, `ema/...`, `optimizer/...`, `best/...`, `sums/...`).
        numbers: JSON values: best score, history, scaler, patience.
        changed: What differs from the run that saved it, where going on was allowed anyway.
    """

    step: int
    epoch: int
    batch: int
    tensors: dict[str, Tensor]
    numbers: dict[str, Any] = field(default_factory=dict)
    changed: tuple[str, ...] = ()


def save(folder: Path, snapshot: Snapshot, *, identity: dict[str, Any], keep: int = 2) -> Path:
    """Writes a checkpoint and, once it is whole, forgets all but the newest `keep`.

    Args:
        folder: The run's `checkpoints/`.
        snapshot: Of the loop.
        identity: What must not differ for a resume to make sense (recipe, data, classes).
        keep: At least 1.
    """
    path = folder / f"step-{snapshot.step:08d}"
    meta = {
        "format": FORMAT,
        "step": snapshot.step,
        "epoch": snapshot.epoch,
        "batch": snapshot.batch,
        "identity": identity,
        "numbers": snapshot.numbers,
    }
    with io.staged_dir(path) as staged:
        io.write_tensors(staged / "state.safetensors", snapshot.tensors, {})
        io.write_text(staged / "state.json", json.dumps(meta, allow_nan=True))
    io.keep_newest(folder, "step-*", keep)
    return path


def newest(
    folder: Path, on_broken: Callable[[Path, tuple[str, ...]], None] | None = None
) -> Path | None:
    """The newest checkpoint whose manifest verifies, or None; broken ones are passed over.

    Args:
        folder: The run's `checkpoints/`.
        on_broken: Told of each newer one that does not verify, with its problems.
    """
    return io.newest_whole(folder, "step-*", on_broken)


def where(path: Path) -> dict[str, Any]:
    """How far the run was, without its tensors: `step`, `epoch` (from 0) and `numbers`.

    Raises:
        WeightsError: `ckpt.state`: not the state of a run; a manifest proves that nothing has
            changed since, not who wrote it.
    """
    try:
        state = io.read_json(path / "state.json")
        wrong = [key for key, kind in KINDS.items() if type(state.get(key)) is not kind]
        wrong = wrong or [f"numbers.{key}" for key in _wrong_records(state["numbers"])]
    except MachineError as error:
        wrong = [error.faults[0].text]
    if wrong:
        text = f"its state.json is not that of a run: {', '.join(wrong)}"
        fix = "resume from an older checkpoint beside it, or start anew"
        raise WeightsError.of("ckpt.state", path, text, fix)
    return state


def _wrong_records(numbers: dict[str, Any]) -> Iterator[str]:
    """What of the epochs' records cannot be told to a reader."""
    history, best = numbers.get("history"), numbers.get("best")
    if not (isinstance(history, list) and all(isinstance(r, dict) for r in history)):
        yield "history"
    if best is not None and not (isinstance(best, dict) and type(best.get(SCORE)) is float):
        yield "best"


def load(path: Path, *, identity: dict[str, Any], anyway: bool = False) -> Snapshot:
    """Reads a checkpoint back.

    Args:
        path: One `step-...` folder.
        identity: As given to `save`, of the run that wants to go on.
        anyway: Go on although recipe or data differ (`--resume-anyway`).

    Raises:
        WeightsError: `ckpt.corrupt` (manifest does not verify), `ckpt.state`, `ckpt.newer`
            (format), or `ckpt.other_run` listing what differs.
    """
    problems = io.verify_dir(path)
    if problems:
        raise WeightsError.of(
            "ckpt.corrupt", path, "; ".join(problems), "resume from an older checkpoint beside it"
        )
    meta = where(path)
    if meta["format"] > FORMAT:
        text = f"written in format {meta['format']}, this vitft reads up to {FORMAT}"
        raise WeightsError.of("ckpt.newer", path, text, "update vitft")
    changed = _differences(meta["identity"], identity)
    never = any(meta["identity"].get(key) != identity.get(key) for key in NEVER)
    if changed and (never or not anyway):
        text = "it belongs to a run with " + "; ".join(changed)
        fix = "resume with the run's own recipe.resolved.yaml, or "
        fix += "start anew" if never else "pass --resume-anyway"
        raise WeightsError.of("ckpt.other_run", path, text, fix)
    tensors = tensorfile.load(path / "state.safetensors", "safetensors")
    at = (meta["step"], meta["epoch"], meta["batch"])
    return Snapshot(*at, tensors, meta["numbers"], changed)


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[str, ...]:
    keys = sorted(theirs.keys() | ours.keys())
    pairs = ((k, theirs.get(k), ours.get(k)) for k in keys)
    return tuple(f"{k} {_short(a)} (now {_short(b)})" for k, a, b in pairs if a != b)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text):,} characters)"


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as tensors `optimizer/<parameter>/<name>`; numbers become 0-d.

    They are the optimizer's own: copies beside them would want room on a GPU that is full.
    """
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer/{k}/{name}": torch.as_tensor(value)
        for k, slots in state.items()
        for name, value in slots.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The way back; hyper-parameters stay those of the recipe (the schedule sets them anyway).

    Raises:
        WeightsError: `ckpt.state`: a slot that no parameter can have.
    """
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in under("optimizer", tensors).items():
        number, _, name = key.partition("/")
        k = int(number) if number.isdecimal() else len(shapes)
        if k >= len(shapes) or value.numel() > max(1, shapes[k].numel()):  # some keep row sums
            text = f"optimizer/{key} {list(value.shape)} fits none of {len(shapes):,} parameters"
            raise WeightsError.of("ckpt.state", "the checkpoint", text, "start anew")
        state.setdefault(k, {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors below `prefix/`, with it taken off."""
    cut = len(prefix) + 1
    return {name[cut:]: t for name, t in tensors.items() if name.startswith(prefix + "/")}
