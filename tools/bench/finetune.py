"""Ways to fine-tune against the frozen probe: same photographs, same splits, chosen on val.

    python tools/bench/finetune.py PHOTOS [--per-class N] [--size PX] [--seeds 0 1 2] [--json FILE]

PHOTOS is a folder of class folders. Each seed draws its own split; on each split every way learns
from the same photographs. Of the ways with most splits, the one with the best mean accuracy on val
is what a recipe should use; only its test accuracy is a result. The JSON is written after every
run, so that a long call may be stopped, and go on with `--add`. `--quick` takes two ways and 20
small photographs per class. On an H100 the recipe itself, 2,670 photographs at 224 px, takes less
than a minute a run: `--ways probe head flowers_full.yaml`.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import Row, verdict, write

from vitft import evaluate, learn, prepare, recipe
from vitft.prepare import Prepared

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL, FULL = "finetune_small_cpu.yaml", "flowers_full.yaml"
KEPT = ("train.views=1",)
TWO, FOUR, SIX = ((*KEPT, f"train.blocks={k}") for k in (2, 4, 6))
WHOLE = ("train.epochs=5", "train.layer_decay=0.75")
FROZEN = ("probe", "head")
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {  # name -> recipe, overrides
    "probe": ("flowers_probe.yaml", ()),
    "head": ("flowers_head.yaml", ()),
    "last 2, lr 1e-4": (SMALL, (*TWO, "train.lr=1e-4")),
    "last 2, lr 3e-5": (SMALL, (*TWO, "train.lr=3e-5")),
    "last 2, lr 3e-4": (SMALL, (*TWO, "train.lr=3e-4")),
    "last 4, lr 1e-4": (SMALL, (*FOUR, "train.lr=1e-4")),
    "last 6, lr 1e-4": (SMALL, (*SIX, "train.lr=1e-4")),
    "last 2, fresh head": (SMALL, (*TWO, "train.init_head=fresh")),
    "last 4, lr 3e-4": (SMALL, (*FOUR, "train.lr=3e-4")),
    "all, half the patches": (
        FULL,
        (*WHOLE, "train.lr=1e-4", "train.patch_drop=0.5"),
    ),
    "all, lr 1e-4": (FULL, (*WHOLE, "train.lr=1e-4")),
    "all, lr 3e-5": (FULL, (*WHOLE, "train.lr=3e-5")),
    "all, lr 1e-3": (FULL, (*WHOLE, "train.lr=1e-3")),
    "all, lr 3e-4": (FULL, (*WHOLE, "train.lr=3e-4")),
    "all, no layer decay": (FULL, (*WHOLE, "train.lr=1e-4", "train.layer_decay=null")),
    "flowers_full.yaml": (FULL, ()),  # as it is, but for the model
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photos", type=Path, metavar="PHOTOS")
    parser.add_argument("--per-class", type=int, metavar="N", help="photographs; default all")
    parser.add_argument("--size", type=int, default=224, metavar="PX", help="side; default 224")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument(
        "--add",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="JSON of earlier calls, whose runs are not repeated",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.quick:
        args.per_class, args.size, args.seeds, args.ways = 20, 56, [0], ["probe", "last 2, lr 1e-4"]
    records = [json.loads(file.read_text("utf-8")) for file in args.add]
    runs: list[dict[str, Any]] = [run for record in records for run in record["details"]["runs"]]
    with tempfile.TemporaryDirectory() as folder:
        root = subset(args.photos, args.per_class, Path(folder) / "photos")
        for seed in args.seeds:
            for way in args.ways:
                if seed in seeds(runs, way):
                    continue
                runs.append(one(way, root, seed, args.size, args.overrides))
                print(json.dumps(runs[-1]), flush=True)
                write(args.json, rows_of(runs), quick=args.quick, details={"runs": runs})
    write(args.json, rows_of(runs), quick=args.quick, details={"runs": runs})
    show(runs)
    return verdict(rows_of(runs))


def subset(photos: Path, per_class: int | None, folder: Path) -> Path:
    """The first photographs of each class by name, copied into folders of their own."""
    for kind in sorted(p for p in photos.iterdir() if p.is_dir()):
        (folder / kind.name).mkdir(parents=True)
        for photo in sorted(kind.glob("*.jpg"))[:per_class]:
            shutil.copy(photo, folder / kind.name / photo.name)
    return folder


def one(way: str, root: Path, seed: int, size: int, overrides: list[str]) -> dict[str, Any]:
    """One way on one split: accuracies in percent, seconds of training with its own validation."""
    file, own = WAYS[way]
    common = (
        f"data.root={root}",
        f"data.image_size={size}",
        "model.name=vitflower_s14",
        "model.weights=bundled",
        f"seed={seed}",
    )
    p = prepare.prepare(recipe.load(RECIPES / file, [*common, *own, *overrides]))
    started, used = time.perf_counter(), time.process_time()
    learned = learn.learn(p, learn.Hooks())
    used, seconds = time.process_time() - used, time.perf_counter() - started
    return {
        "way": way,
        "seed": seed,
        "val": 100 * learned.best["val_accuracy"],
        "test": 100 * accuracy(p, p.test_split),
        "epoch": learned.best.get("epoch"),
        "seconds": seconds,
        "cpu_seconds": used,
        "size": size,
        "photographs": [len(p.index.rows(split)) for split in ("train", "val", "test")],
    }


def accuracy(p: Prepared, split: str) -> float:
    """Of the model as it stands."""
    return evaluate.accuracy(evaluate.predict(p.net, p.batches(p.photos(split)).epoch(0)))


def rows_of(runs: list[dict[str, Any]]) -> list[Row]:
    """The way that val chose, against the frozen recipes on the same splits, in points."""
    most = max((len(seeds(runs, r["way"])) for r in runs if r["way"] not in FROZEN), default=0)
    tuned = [w for w in WAYS if w not in FROZEN and len(seeds(runs, w)) == most > 0]
    bases = [base for base in FROZEN if seeds(runs, base)]
    if not tuned or not bases:
        return []
    chosen = max(tuned, key=lambda way: mean(runs, way, "val", seeds(runs, way)))
    how = f"{chosen}, as val chose" if len(tuned) > 1 else chosen
    return [told(runs, chosen, base, how) for base in bases if shared(runs, chosen, base)]


def told(runs: list[dict[str, Any]], way: str, base: str, how: str) -> Row:
    """A line of README; `how` names the way there."""
    over = shared(runs, way, base)
    splits = f"{len(over)} split{'s' * (len(over) > 1)}"
    many = f"over {splits} of {sum(runs[0]['photographs']):,} photographs, {runs[0]['size']} px"
    what = f"fine-tuned ({how}) minus frozen {base} on test, {many}"
    found = [value(runs, way, "test", s) - value(runs, base, "test", s) for s in over]
    said = f"{statistics.mean(found):+.1f} points, to {mean(runs, way, 'test', over):.1f} %"
    spread = (min(found), max(found))
    return Row(what, statistics.mean(found), "points", spread, goal=0.0, text=said)


def shared(runs: list[dict[str, Any]], way: str, base: str) -> list[int]:
    """Seeds that both have run with."""
    return [seed for seed in seeds(runs, way) if seed in seeds(runs, base)]


def seeds(runs: list[dict[str, Any]], way: str) -> list[int]:
    """Those a way has run with."""
    return [r["seed"] for r in runs if r["way"] == way]


def value(runs: list[dict[str, Any]], way: str, key: str, seed: int) -> float:
    """One figure of one run."""
    return float(next(r[key] for r in runs if r["way"] == way and r["seed"] == seed))


def mean(runs: list[dict[str, Any]], way: str, key: str, over: list[int]) -> float:
    """A way's mean over splits."""
    return statistics.mean(value(runs, way, key, seed) for seed in over)


def show(runs: list[dict[str, Any]]) -> None:
    """The table: means over each way's own splits."""
    print(f"{'way':<24} {'splits':>6} {'val %':>7} {'test %':>7} {'seconds':>8} {'CPU s':>7}")
    for way in dict.fromkeys(r["way"] for r in runs):
        over = seeds(runs, way)
        told = [mean(runs, way, key, over) for key in ("val", "test", "seconds", "cpu_seconds")]
        print(
            f"{way:<24} {len(over):>6} {told[0]:>7.1f} {told[1]:>7.1f} {told[2]:>8.0f} "
            f"{told[3]:>7.0f}"
        )


if __name__ == "__main__":
    sys.exit(main())
