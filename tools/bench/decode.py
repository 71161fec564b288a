"""What the guarded decoder costs over a plain Pillow decode, and the deep check beside them.

    python tools/bench/decode.py [FOLDER] [--quick] [--json FILE]

FOLDER defaults to the bundled photographs. Each file is decoded by each way in turn, so that a busy
machine slows all of them alike; the figure is the median over files of each file's best time.
Goal: at most 25 % over `Image.open(...).convert("RGB")`.
"""

import argparse
import hashlib
import io
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from record import Row, write

from vitft.images import DecodeSpec, decode, deep_warnings, inspect
from vitft.inputs import InputConfig, pixels, plain, seeded

SAMPLE = Path(__file__).resolve().parents[2] / "vitft" / "bundled"
GOAL = 0.25
CONFIG = InputConfig((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SAMPLE)
    parser.add_argument("--quick", action="store_true", help="100 files, under 60 s")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    files = sorted(p for p in args.folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        parser.error(f"{args.folder}: no JPEG found; name a folder of photographs")
    random.Random(0).shuffle(files)
    data = [path.read_bytes() for path in files[: 100 if args.quick else 400]]
    times = measure(data, rounds=5 if args.quick else 11)
    overhead = times["vitft decode"] / times["plain Pillow"] - 1
    show(times, overhead, len(data))
    what = "a photograph decoded with every guard, over plain Pillow"
    row = Row(what, 100 * overhead, "% more", goal=100 * GOAL, at_most=True)
    found = {"files": len(data), "ms": times, "overhead": overhead, "goal": GOAL}
    write(args.json, [row], quick=args.quick, details=found)
    return 0 if overhead <= GOAL else 1


def ways() -> dict[str, Callable[[bytes], object]]:
    """What is timed, by the name in the table."""
    spec, transform = DecodeSpec(), pixels(plain(CONFIG, "tutorial"))
    return {
        "plain Pillow": lambda data: Image.open(io.BytesIO(data)).convert("RGB"),
        "vitft decode": lambda data: decode(data, "bench", spec),
        "vitft header check": lambda data: inspect(data, "bench", spec),
        "vitft deep check": deep_warnings,
        "sha256": lambda data: hashlib.sha256(data).hexdigest(),
        "seeding": lambda data: _seed(len(data)),
        "decode, resize, crop": lambda data: transform(decode(data, "bench", spec)),
    }


def _seed(seed: int) -> None:
    with seeded(seed):
        pass


def measure(data: list[bytes], rounds: int) -> dict[str, float]:
    """Milliseconds by way: median over files of the best of `rounds`, ways interleaved."""
    table = ways()
    best = {name: [float("inf")] * len(data) for name in table}
    for _ in range(rounds):
        for i, item in enumerate(data):
            for name, way in table.items():
                started = time.perf_counter()
                way(item)
                best[name][i] = min(best[name][i], (time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in best.items()}


def show(times: dict[str, float], overhead: float, files: int) -> None:
    print(f"{'way':<24} {'ms per image':>12} {'per plain':>10}   ({files} files, 1 thread)")
    for name, value in times.items():
        print(f"{name:<24} {value:>12.3f} {value / times['plain Pillow']:>10.2f}")
    verdict = "met" if overhead <= GOAL else "missed"
    print(f"decode overhead {overhead:+.1%} (goal at most {GOAL:+.0%}: {verdict})")


if __name__ == "__main__":
    sys.exit(main())
