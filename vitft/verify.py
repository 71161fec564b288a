"""Is a finished run still what it says? `python -m vitft.verify RUN`.

Hashes the photographs, the starting weights and the product again, predicts the scored split again
with the product alone, and compares with what was stored. Says what changed, file by file.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitft import console, io, model, offline, product, recipe
from vitft.console import say, track
from vitft.errors import DataError, Fault, VitftError, WeightsError, escape
from vitft.predict import Predictor

SHOWN = 5  # names of one kind before the rest is counted
TOLERANCE = 1e-5  # of a probability, on another machine or number of threads


@dataclass(frozen=True)
class Check:
    """One thing that was looked at again.

    Attributes:
        name: Such as `photographs`.
        text: What was found, with numbers.
        ok: Whether it is as it was.
    """

    name: str
    text: str
    ok: bool


def verify(folder: Path, device: str = "auto") -> tuple[Check, ...]:
    """Checks a run folder against itself.

    Args:
        folder: As `vitft.run` left it.
        device: As in a recipe.

    Raises:
        DataError: `run.not_a_run`: files of a finished run are missing.
    """
    stored = _stored(folder)
    spec = recipe.load(folder / "recipe.resolved.yaml")
    root = offline.data_root(spec.data.root)
    root = root if root.is_dir() else root.parent
    rows = _rows(folder / "split.csv")
    checks = [_photographs(root, rows), _weights(spec, stored), _product(folder)]
    if checks[2].ok:
        checks.append(_predictions(folder, root, device))
        checks.append(_accuracy(folder, stored))
    return tuple(checks)


def _stored(folder: Path) -> dict[str, Any]:
    names = ("metrics.json", "recipe.resolved.yaml", "split.csv", "predictions.csv")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        fix = "name the folder of a finished run, such as runs/flowers_head/latest"
        raise DataError(
            [Fault("run.not_a_run", str(folder / n), "is not there", fix) for n in missing]
        )
    out: dict[str, Any] = json.loads((folder / "metrics.json").read_text("utf-8"))
    return out


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as f:
        return list(csv.DictReader(f))


def _photographs(root: Path, rows: list[dict[str, str]]) -> Check:
    """Every photograph of split.csv, by content."""
    gone, changed = [], []
    for row in track(rows, len(rows), "hashing photographs"):
        try:
            if io.sha256_file(root / row["path"]) != row["sha256"]:
                changed.append(row["path"])
        except OSError:
            gone.append(row["path"])
    text = f"{len(rows):,} photographs" + _named("changed", changed) + _named("missing", gone)
    return Check("photographs", text, not gone and not changed)


def _weights(spec: recipe.Recipe, stored: dict[str, Any]) -> Check:
    was = stored["weights"]["sha256"]
    if not was:
        return Check("weights", "random from the seed, no file to compare", True)
    try:
        now = io.sha256_file(model.locate(spec.model))
    except VitftError as e:
        return Check("weights", f"{spec.model.weights}: {e.faults[0].text}", False)
    same = now == was
    text = f"{spec.model.weights} has sha256 {now[:12]}" + ("" if same else f", it was {was[:12]}")
    return Check("weights", text, same)


def _product(folder: Path) -> Check:
    bad = io.verify_dir(folder / "model")
    if bad:
        return Check("model", "; ".join(bad), False)
    try:
        _, card = product.load(folder)
    except WeightsError as e:
        return Check("model", e.faults[0].text, False)
    return Check("model", f"{card.architecture} for {len(card.classes)} classes, whole", True)


def _predictions(folder: Path, root: Path, device: str) -> Check:
    """The product's answers now against those in predictions.csv."""
    before = _rows(folder / "predictions.csv")
    predictor = Predictor(folder, device)
    files = [root / row["path"] for row in before]
    answers = list(track(predictor(files), len(files), "predicting again"))
    unreadable = [str(a.path) for a in answers if a.probabilities is None]
    flipped, gap = [], 0.0
    for row, answer in zip(before, answers, strict=True):
        if answer.probabilities is None:
            continue
        was = np.array([float(v) for k, v in row.items() if k.startswith("p:")])
        gap = max(gap, float(np.abs(was - answer.probabilities).max()))
        if predictor.card.classes[int(answer.probabilities.argmax())] != row["prediction"]:
            flipped.append(row["path"])
    text = f"{len(before):,} predicted again, largest difference of a probability {gap:.1e}"
    text += _named("now answered otherwise", flipped) + _named("unreadable", unreadable)
    return Check("predictions", text, not flipped and not unreadable and gap <= TOLERANCE)


def _accuracy(folder: Path, stored: dict[str, Any]) -> Check:
    """The stored accuracy against the stored predictions."""
    rows = _rows(folder / "predictions.csv")
    split = "test" if "test" in stored else "val"
    hits = sum(row["prediction"] == row["label"] for row in rows)
    claimed = stored[split]["accuracy"]
    text = f"{hits:,} of {len(rows):,} predictions are right; metrics.json says {claimed:.4f}"
    return Check("accuracy", text, len(rows) > 0 and abs(hits / len(rows) - claimed) < 1e-12)


def _named(what: str, paths: list[str]) -> str:
    if not paths:
        return ""
    rest = f" and {len(paths) - SHOWN:,} more" if len(paths) > SHOWN else ""
    return f"; {len(paths):,} {what}: {', '.join(paths[:SHOWN])}{rest}"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line per check; exit code 3 if anything changed."""
    parser = argparse.ArgumentParser(
        prog="vitft verify", description="Hashes and predicts a finished run again."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args(argv)
    console.setup()
    checks = verify(args.run, args.device)
    for check in checks:
        print(f"{'same   ' if check.ok else 'CHANGED'} {check.name}: {escape(check.text)}")  # noqa: T201
    good = all(check.ok for check in checks)
    say("the run is what it says" if good else "the run is not what it was")
    return 0 if good else 3


if __name__ == "__main__":
    from vitft.cli import door

    sys.exit(door(main))
