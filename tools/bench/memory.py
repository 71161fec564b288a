"""Peak memory of a whole run against the number of photographs: it must not grow with them.

    python tools/bench/memory.py [--images N N ...] [--quick] [--json FILE]

Synthetic JPEGs of 32 pixels, ten classes, through `vitft.run` in mode probe (ViT-Ti/16 at 32
pixels, random weights, every part of the report on), each count in a process of its own with an
empty cache. What must be kept of a photograph is its row of features (768 bytes), its path and its
hash; the figure is the growth per photograph beyond the smallest count. Goal: at most 6 KiB, so
that a million photographs need 6 GiB where their pixels would need 600 GiB at 224 pixels.
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

GOAL = 6.0  # KiB per photograph
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "flowers_probe.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--quick", action="store_true", help="200 and 2,000 photographs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    counts = [200, 2_000] if args.quick else sorted(args.images)
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as scratch:
            draw(Path(scratch) / "photos", count)
            rows.append(measure(count, Path(scratch)))
        print(
            f"{count:>9,} photographs: peak {rows[-1]['peak_mb']:,.0f} MB, "
            f"{rows[-1]['seconds']:.0f} s",
            flush=True,
        )
    return show(rows, args)


def draw(folder: Path, count: int) -> None:
    """Pictures whose colour tells the class, more or less, each with its own noise."""
    rng = np.random.default_rng(0)
    for i in range(count):
        target = folder / f"class{i % 10}" / f"{i:07}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        level = 20 * (i % 10) + rng.integers(0, 60, (32, 32, 3))
        Image.fromarray(level.astype(np.uint8)).save(target, quality=80)


def measure(count: int, scratch: Path) -> dict[str, Any]:
    """Peak resident memory of the run, in MB of 2**20 bytes, and its time."""
    environment = dict(os.environ, VITFT_CACHE=str(scratch / "cache"))
    command = [sys.executable, __file__, "--child", str(scratch / "photos"), str(scratch / "runs")]
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2_000:])
    peak = json.loads(done.stdout.splitlines()[-1])
    return {"images": count, "seconds": time.perf_counter() - started, "peak_mb": peak}


def child(data: Path, runs: Path) -> int:
    """One run in this process; its peak on the last line."""
    from vitft import run

    overrides = [f"data.root={data}", f"output={runs}", "model.name=vitflower_ti16"]
    overrides += ["model.weights=none", "data.image_size=32", "data.transform=timm"]
    code = run.main([str(RECIPE), *overrides])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return code


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> int:
    """Growth per photograph, from the smallest count to the largest."""
    first, last = rows[0], rows[-1]
    growth = (last["peak_mb"] - first["peak_mb"]) * 1024 / (last["images"] - first["images"])
    what = f"memory of a whole run, growth per photograph up to {last['images']:,}"
    told = [
        Row(what, growth, "KiB", goal=GOAL, at_most=True),
        Row(f"memory of a whole run of {last['images']:,} photographs", last["peak_mb"], "MB"),
    ]
    write(args.json, told, quick=args.quick, details={"runs": rows})
    return verdict(told)


if __name__ == "__main__":
    sys.exit(main())
