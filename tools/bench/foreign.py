"""Pictures of other subjects: how many `predict` calls foreign, on pictures that chose nothing.

    python tools/bench/foreign.py [FOLDER] [--model NAME=WEIGHTS ...] [--quick] [--json FILE]

The score of `doubt.Foreign` is the best of about thirty that were tried on flowers, and the 72
pictures that chose it praise it too much. So it is measured here on others, named by the rules of
`SOURCES` before one was scored. (Which the 72 were was not kept: a few of opencv-doc's may be among
them, the stamps are too many to be.) FOLDER holds class folders (default: the bundled photographs);
a head is solved on the train photographs as a run does it, three seeds, and the limit is the one
that a run sets on val. They are files of two Debian packages:

    opencv-doc              examples/data: photographs, drawings and scans. Of numbered series the
                            first is taken (left01.jpg, right01.jpg); 16 pixels a side at least
    tuxpaint-stamps-default cut-out photographs and drawings on white; animals, food, household,
                            hobbies, medical, space, sports, town, vehicles
    other flowers           its plants/flowers: cut-out flowers of many kinds, the hard case

The parts of the score, and the probability of the likeliest class, stand beside it, each with a
limit set on val in the same way. AUROC is against the scored flowers. `--quick` draws 60 pictures
itself (noise, gradients, checkers, text, charts) and takes the bundled flowers and model.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from record import Row, verdict, write
from sklearn.metrics import roc_auc_score

from vitft import doubt, features, io, learn, model, prepare, recipe, stats
from vitft.findings import all_features
from vitft.learn import Hooks
from vitft.photos import Photos
from vitft.prepare import Prepared
from vitft.run import predict_split

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "vitft" / "bundled" / "flowers"
STAMPS = Path("/usr/share/tuxpaint/stamps")
SUBJECTS = ("animals", "food", "hobbies", "household", "medical", "space", "sports", "town")
SOURCES = {
    "opencv-doc": [Path("/usr/share/doc/opencv-doc/examples/data")],
    "tuxpaint-stamps-default": [STAMPS / name for name in (*SUBJECTS, "vehicles")],
    "other flowers": [STAMPS / "plants" / "flowers"],
}
NUMBER = re.compile(r"\d+$")
LEAST = 16  # pixels
SCORES = ("vitft", "distance alone", "energy alone", "largest probability")
QUICK_GOAL = 90.0  # AUROC in percent

Floats = NDArray[np.float64]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SAMPLE)
    parser.add_argument("--model", action="append", metavar="NAME=WEIGHTS", help="repeatable")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where packages are unpacked")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="drawn pictures, bundled flowers")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows: list[Row] = []
    details: dict[str, Any] = {}
    missing: list[str] = []
    with TemporaryDirectory() as scratch:
        if args.quick:
            given = {"drawn": list(drawn(Path(scratch)))}
        else:
            given, missing = found(args.root)
        folder, models, seeds = args.folder, args.model or ["vitflower_s14=bundled"], args.seeds
        if args.quick:
            folder, models, seeds = SAMPLE, models[:1], 1
        for text in models:
            name, _, weights = text.partition("=")
            several = [measure(folder, name, weights or "none", given, k) for k in range(seeds)]
            details[name] = several
            rows += told(name, several, quick=args.quick)
    write(args.json, rows, quick=args.quick, not_measured=missing, details=details)
    return verdict(rows)


def found(root: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The pictures of each source, and what is not installed."""
    given, missing = {}, []
    for name, folders in SOURCES.items():
        here = [root / f.relative_to("/") for f in folders]
        files = sorted(f for h in here for f in h.rglob("*") if f.suffix in (".jpg", ".png"))
        if name == "opencv-doc":
            files = list({NUMBER.sub("", f.stem): f for f in reversed(files)}.values())[::-1]
        files = [f for f in files if "cartoon" not in f.parts and min(_size(f)) >= LEAST]
        if files:
            given[name] = files
            print(f"{name}: {len(files)} pictures")
        else:
            missing.append(f"foreign pictures of {name}: not installed")
    return given, missing


def _size(file: Path) -> tuple[int, int]:
    with Image.open(file) as picture:
        return picture.size


def measure(
    folder: Path, name: str, weights: str, given: dict[str, list[Path]], seed: int
) -> dict[str, Any]:
    """AUROC and share called foreign of each source and score, and the alarms on flowers."""
    changes = [f"data.root={folder}", f"model.name={name}", f"model.weights={weights}"]
    base = ROOT / "recipes" / "flowers_probe.yaml"
    p = prepare.prepare(recipe.load(base, [*changes, f"seed={seed}"]), fallback=False)
    learned = learn.learn(p, Hooks())
    x = all_features(p, learned, [])
    if x is None:
        raise ValueError("the recipe trains the backbone")
    val, test = (predict_split(p, learned, split) for split in ("val", "test"))
    train_x, val_x, test_x = (x[p.index.rows(split)] for split in ("train", "val", "test"))
    ours = doubt.fit_foreign(train_x, val_x, val.logits, seed=seed)
    ways = dict(zip(SCORES, scores(ours), strict=True))
    limits = {way: doubt.limit_of(score(val_x, val.logits)) for way, score in ways.items()}
    out: dict[str, Any] = {"flowers": len(test_x), "accuracy": _accuracy(test), "sources": {}}
    out["alarms"] = {w: _above(s(test_x, test.logits), limits[w]) for w, s in ways.items()}
    for source, files in given.items():
        rows, logits = of_pictures(p, files)
        out["sources"][source] = {"pictures": len(files)} | {
            way: {
                "auroc": auroc(score(rows, logits), score(test_x, test.logits)),
                "called": _above(score(rows, logits), limits[way]),
            }
            for way, score in ways.items()
        }
    return out


def scores(ours: doubt.Foreign) -> Iterator[Any]:
    """(features, logits) -> [N] strangeness, in the order of `SCORES`."""
    yield ours.score
    yield lambda x, _: ours.distance(x)
    yield lambda _, logits: -np.logaddexp.reduce(logits.astype(np.float64), axis=1)
    yield lambda _, logits: -stats.softmax(logits).max(axis=1)


def of_pictures(p: Prepared, files: list[Path]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features [N, D] and logits [N, C] of files that are in no index."""
    sums, labels = [io.sha256_file(f) for f in files], np.zeros(len(files), np.int64)
    photos = Photos(files, labels, sums, decode=p.decode, transform=p.plain_transform, seed=0)
    key = f"{p.recipe.model.name} {model.backbone_fingerprint(p.net)}"
    x = features.extract(p.net, photos, views=1, device=p.device, backbone_key=key).x[0]
    return x, features.head_logits(model.classifier(p.net), x, p.device)


def auroc(strange: Floats, ordinary: Floats) -> float:
    """Chance that a foreign picture scores higher than a flower; a draw counts half."""
    foreign = np.repeat([1, 0], [len(strange), len(ordinary)])
    return float(roc_auc_score(foreign, np.concatenate([strange, ordinary])))


def _above(values: Floats, bar: float) -> float:
    return float((np.asarray(values) > bar).mean())


def _accuracy(predictions: Any) -> float:
    return float((predictions.logits.argmax(axis=1) == predictions.labels).mean())


def told(name: str, several: list[dict[str, Any]], *, quick: bool) -> list[Row]:
    """A table of all, and the rows of the score that predict uses."""
    rows: list[Row] = []
    alarms = {way: [100 * one["alarms"][way] for one in several] for way in SCORES}
    print(
        f"{name}: flowers by mistake " + ", ".join(f"{w} {_mean(v)} %" for w, v in alarms.items())
    )
    for source in several[0]["sources"]:
        each = [one["sources"][source] for one in several]
        n = each[0]["pictures"]
        for way in SCORES:
            area = [e[way]["auroc"] for e in each]
            called = [100 * e[way]["called"] for e in each]
            line = f"AUROC {statistics.fmean(area):.3f}  called foreign {_mean(called):>5} %"
            print(f"  {source:<24} {n:>4}  {way:<20} {line}")
            if way != SCORES[0]:
                continue
            what = f"pictures of other subjects called foreign ({source}, {n}), {name} features"
            rows.append(_row(what, called))
            if quick:
                what = f"{source} told from flowers, {name} features, area under the ROC curve"
                rows.append(_row(what, [100 * a for a in area], QUICK_GOAL))
    mistakes = alarms[SCORES[0]]
    what = f"test flowers called foreign, {name} features, of 5 % allowed"
    rows.append(_row(what, mistakes))
    return rows


def _row(what: str, percents: list[float], goal: float | None = None) -> Row:
    mean, spread = round(statistics.fmean(percents), 1), (min(percents), max(percents))
    return Row(what, mean, "%", spread, goal=goal)


def _mean(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1f}"


def drawn(folder: Path) -> Iterator[Path]:
    """Twelve pictures each of noise, gradients, checkers, text and charts."""
    rng = np.random.default_rng(0)
    for k in range(12):
        for name, picture in _five(rng):
            file = folder / f"{name}{k}.png"
            picture.save(file)
            yield file


def _five(rng: np.random.Generator) -> Iterator[tuple[str, Image.Image]]:
    side = 240
    yield "noise", Image.fromarray(rng.integers(0, 256, (side, side, 3)).astype(np.uint8))
    ramp = np.linspace(0, 1, side)[:, None, None] * rng.integers(0, 256, 3)
    ramp = np.broadcast_to(ramp, (side, side, 3)).astype(np.uint8)
    yield "gradient", Image.fromarray(ramp).rotate(90 * int(rng.integers(4)))
    cell = int(rng.integers(5, 40))
    odd = np.add.outer(np.arange(side) // cell, np.arange(side) // cell) % 2
    yield "checkers", Image.fromarray((odd[..., None] * rng.integers(0, 256, 3)).astype(np.uint8))
    page = Image.new("RGB", (side, side), "white")
    for y in range(10, side - 10, 14):
        words = (
            "".join(chr(97 + c) for c in rng.integers(0, 26, n)) for n in rng.integers(2, 9, 7)
        )
        ImageDraw.Draw(page).text((8, y), " ".join(words), fill="black")
    yield "text", page
    chart = Image.new("RGB", (side, side), "white")
    for i, height in enumerate(rng.integers(10, side - 20, 8).tolist()):
        box = (12 + 28 * i, side - 10 - height, 32 + 28 * i, side - 10)
        ImageDraw.Draw(chart).rectangle(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
    yield "chart", chart


if __name__ == "__main__":
    sys.exit(main())
