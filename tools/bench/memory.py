"""Peak memory of a run, and of predicting, against the number of photographs: it must not grow.

    python tools/bench/memory.py [--images N N ...] [--quick] [--json FILE]

Synthetic JPEGs of 32 pixels, ten classes, through `vitft.run` in mode probe (ViT-Ti/16 at 32
pixels, random weights, every part of the report on), each count in a process of its own with an
empty cache; then all of them through `vitft.predict` into a CSV. What a run must keep of a
photograph is its row of features (768 bytes), its path and its hash, and predicting its path alone;
the figures are the growth per photograph beyond the smallest count. Goals: at most 6 KiB, so that a
million photographs need 6 GiB where their pixels would need 600 GiB at 224 pixels, and 1 KiB.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from record import Row, verdict, write

GOALS = {"run": 6.0, "predict": 1.0}  # KiB per photograph
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "flowers_probe.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--quick", action="store_true", help="200 and 2,000 photographs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, photos, runs = args.child
        return child(what, Path(photos), Path(runs))
    counts = [200, 2_000] if args.quick else sorted(args.images)
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as scratch:
            draw(Path(scratch) / "photos", count)
            rows.append(measure(count, Path(scratch)))
        for what in GOALS:
            peak, seconds = rows[-1][what]["peak_mb"], rows[-1][what]["seconds"]
            text = f"{count:>9,} photographs, {what}: peak {peak:,.0f} MB, {seconds:.0f} s"
            print(text, flush=True)
    return show(rows, args)


def draw(folder: Path, count: int) -> None:
    """Pictures whose brightness tells the class, more or less, each with its own noise."""
    rng = np.random.default_rng(0)
    for i in range(count):
        target = folder / f"class{i % 10}" / f"{i:07}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        level = 20 * (i % 10) + rng.normal(0, 15) + rng.integers(0, 60, (32, 32, 3))
        Image.fromarray(level.clip(0, 255).astype(np.uint8)).save(target, quality=80)


def measure(count: int, scratch: Path) -> dict[str, Any]:
    """Peak resident memory of a run and of predicting, in MB of 2**20 bytes, and their time."""
    environment = dict(os.environ, VITFT_CACHE=str(scratch / "cache"))
    found: dict[str, Any] = {"images": count}
    for what in GOALS:
        folders = [str(scratch / name) for name in ("photos", "runs")]
        command = [sys.executable, __file__, "--child", what, *folders]
        started = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2_000:])
        seconds, peak = time.perf_counter() - started, json.loads(done.stdout.splitlines()[-1])
        found[what] = {"seconds": seconds, "peak_mb": peak}
    return found


def child(what: str, data: Path, runs: Path) -> int:
    """One run, or one call of predict, in this process; its peak on the last line."""
    from vitft import predict, run

    if what == "run":
        overrides = [f"data.root={data}", f"output={runs}", "model.name=vitflower_ti16"]
        overrides += ["model.weights=none", "data.image_size=32", "data.transform=timm"]
        code = run.main([str(RECIPE), *overrides])
    else:
        latest = runs / RECIPE.stem / "latest"
        code = predict.main([str(latest), str(data), "--csv", str(runs / "answers.csv")])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return code


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> int:
    """Growth per photograph, from the smallest count to the largest."""
    first, last = rows[0], rows[-1]
    words = {"run": "memory of a whole run", "predict": "memory of predicting"}
    told = []
    for what, name in words.items():
        growth = (last[what]["peak_mb"] - first[what]["peak_mb"]) * 1024
        growth /= last["images"] - first["images"]
        text = f"{name}, growth per photograph up to {last['images']:,}"
        told.append(Row(text, growth, "KiB", goal=GOALS[what], at_most=True))
        text = f"{name}, {last['images']:,} photographs"
        told.append(Row(text, last[what]["peak_mb"], "MB"))
    write(args.json, told, quick=args.quick, details={"runs": rows})
    return verdict(told)


if __name__ == "__main__":
    sys.exit(main())
