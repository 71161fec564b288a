"""Is a finished run still what it says? `python -m vitft.verify RUN`.

Hashes the photographs, the starting weights and the product again, predicts the scored split again
with the product alone, and compares with what was stored. Says what changed, file by file.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitft import console, images, io, model, offline, product, recipe
from vitft.console import say, track
from vitft.errors import DataError, MachineError, VitftError, WeightsError, escape
from vitft.folders import no_run
from vitft.images import BadImage
from vitft.predict import Predictor
from vitft.table import Row, read_table

SHOWN = 5  # names of one kind before the rest is counted
TOLERANCE = 1e-5  # of a probability, on another machine or number of threads
ROUGH = 0.05  # where it was measured in bfloat16: other kernels, and float32, round otherwise


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
        DataError: `run.not_a_run`: files of a finished run are missing; or a table is no table.
        MachineError: `env.damaged`: metrics.json does not hold a run's numbers.
    """
    _require_all(folder)
    claimed, was = _claims(folder / "metrics.json")
    spec = recipe.of_run(folder)
    root = offline.base(spec.data.root)
    rows = read_table(folder / "split.csv", required=("path", "sha256"))
    said = read_table(folder / "predictions.csv", required=("path", "label", "prediction"))
    checks = [_photographs(root, rows), _weights(spec, was), _product(folder)]
    if checks[2].ok:
        checks.append(_predictions(folder, root, device, said))
        checks.append(_accuracy(said, claimed))
    return tuple(checks)


def _require_all(folder: Path) -> None:
    names = ("metrics.json", "recipe.resolved.yaml", "split.csv", "predictions.csv")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        text = f"is no finished run: it has no {', '.join(missing)}"
        fix = "name the folder of a finished run, such as runs/flowers_head/latest"
        raise DataError.of("run.not_a_run", folder, *no_run(folder, text, fix))


def _claims(file: Path) -> tuple[float, str]:
    """The accuracy of the scored split, and the sha256 of the starting weights or ""."""
    stored = io.read_json(file)
    try:
        split = "test" if "test" in stored else "val"
        return float(stored[split]["accuracy"]), str(stored["weights"]["sha256"] or "")
    except (KeyError, TypeError, ValueError) as error:
        text = f"does not say accuracy and weights ({type(error).__name__}: {str(error)[:100]})"
        raise MachineError.of("env.damaged", file, text, "run the recipe again") from None


def _photographs(root: Path, rows: Sequence[Row]) -> Check:
    """Every photograph of split.csv, by content."""
    gone: list[str] = []
    changed: list[str] = []
    for row in track(rows, len(rows), "hashing photographs"):
        path = row.get("path")
        try:
            if io.sha256_bytes(images.read_bytes(root / path)) != row.get("sha256"):
                changed.append(path)
        except BadImage as error:
            there = error.faults[0].id not in ("data.missing", "data.broken_link")
            (changed if there else gone).append(path)
    text = f"{len(rows):,} photographs" + _named("changed", changed) + _named("missing", gone)
    return Check("photographs", text, not gone and not changed)


def _weights(spec: recipe.Recipe, was: str) -> Check:
    if not was:
        return Check("weights", "random from the seed, no file to compare", True)
    source = next(iter(model.sources(spec.model)), spec.model)  # of a hybrid perhaps the CNN's
    try:
        now = io.sha256_file(model.locate(source))
    except VitftError as e:
        return Check("weights", f"{source.weights}: {e.faults[0].text}", False)
    same = now == was
    text = f"{source.weights} has sha256 {now[:12]}" + ("" if same else f", it was {was[:12]}")
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


def _predictions(folder: Path, root: Path, device: str, before: Sequence[Row]) -> Check:
    """The product's answers now against those in predictions.csv, class by class."""
    predictor = Predictor(folder, device)
    classes = predictor.card.classes
    files = [root / row.get("path") for row in before]
    answers = list(track(predictor(files), len(files), "predicting again"))
    unreadable = [str(a.path) for a in answers if a.probabilities is None]
    rough = predictor.card.precision == "bfloat16"
    limit = ROUGH if rough else TOLERANCE
    flipped, gap = [], 0.0
    for row, answer in zip(before, answers, strict=True):
        if answer.probabilities is None:
            continue
        apart = np.abs(_probabilities(row, classes) - answer.probabilities).max()
        gap = max(gap, np.inf if np.isnan(apart) else float(apart))
        if not _still(row.get("prediction"), answer.probabilities, classes, limit):
            flipped.append(row.get("path"))
    text = f"{len(before):,} predicted again, largest difference of a probability {gap:.1e}"
    text += f" ({limit:g} allowed: it was measured in bfloat16)" if rough else ""
    text += _named("now answered otherwise", flipped) + _named("unreadable", unreadable)
    return Check("predictions", text, not flipped and not unreadable and gap <= limit)


def _still(said: str, now: NDArray[np.float64], classes: Sequence[str], limit: float) -> bool:
    """Whether a class is still the likeliest, or so close to it that rounding decides."""
    return said in classes and bool(now.max() - now[classes.index(said)] <= limit)


def _probabilities(row: Row, classes: Sequence[str]) -> NDArray[np.float64]:
    """[C] as stored; NaN where a cell is no number."""
    try:
        return np.array([float(row.get(f"p:{name}")) for name in classes])
    except ValueError:
        return np.full(len(classes), np.nan)


def _accuracy(said: Sequence[Row], claimed: float) -> Check:
    """The stored accuracy against the stored predictions."""
    hits = sum(row.get("prediction") == row.get("label") for row in said)
    text = f"{hits:,} of {len(said):,} predictions are right; metrics.json says {claimed:.4f}"
    return Check("accuracy", text, abs(hits / len(said) - claimed) < 1e-12)


def _named(what: str, paths: list[str]) -> str:
    if not paths:
        return ""
    rest = f" and {len(paths) - SHOWN:,} more" if len(paths) > SHOWN else ""
    return f"; {len(paths):,} {what}: {', '.join(paths[:SHOWN])}{rest}"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line per check; exit code 3 if anything changed."""
    parser = argparse.ArgumentParser(
        prog="vitft verify",
        description="Hashes and predicts a finished run again.",
        epilog="example: python -m vitft.verify runs/flowers_head/latest",
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
