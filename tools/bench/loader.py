"""Real JPEGs to normalised training batches: vitft's loader against timm's `create_loader`.

    python tools/bench/loader.py [FOLDER] [--images N] [--quick] [--json FILE]

All in one process with one thread each, in turns within a round; the figure is images per second of
processor time, so that it is a core's own whatever else the machine does. FOLDER defaults to the
bundled photographs, which are small: name a folder of JPEGs as cameras or the web have them.

    timm           create_dataset and create_loader as train.py calls them, random crop to 224,
                   bicubic, mirrored half of the time, prefetcher, no workers
    timm, jitter   the same with train.py's own defaults: colour jitter 0.4, random interpolation
    reference      vitft with Pillow's decoder and resize: timm's pixels, which is checked
    exact          data.decoder: fast; the same pixels, which is checked
    fast           data.decoder: fast, data.resize: fast; how far the pixels are is printed
    ..., warm      from the second epoch on, when decoded photographs stay in memory
    ..., ten       ten epochs, one of them cold: computed from the two, what a run sees

vitft also reads every file's sha256 in a cold epoch, and seeds every crop by content and epoch.
Two more rows are told by wall clock, without a goal: a batch decoded in two threads between the
steps of the model (what vitft does on two cores) and by two worker processes, over one thread.
"""

import argparse
import hashlib
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import Row, verdict, write
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from timm.data.transforms_factory import create_transform

from vitft.images import DecodeSpec
from vitft.inputs import InputConfig, TransformSpec, augmented, derive_seed, seeded
from vitft.loaders import Batches
from vitft.photos import Photos
from vitft.pictures import Pictures

SAMPLE = Path(__file__).resolve().parents[2] / "vitft" / "bundled" / "flowers"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONFIG = InputConfig((224, 224), MEAN, STD, "bicubic")
CROPS = SimpleNamespace(augment="tutorial", reprob=0.0)
CPU, BATCH, GOAL, QUICK_GOAL = torch.device("cpu"), 32, 1.5, 1.2

Epochs = Callable[[int], Iterator[Any]]  # number of the epoch -> batches, images first


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SAMPLE)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="96 images, 3 rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    count, rounds = (96, 3) if args.quick else (args.images, args.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        files = subset(args.folder, Path(scratch), count)
        pixels = distances(files[:200])
        torch.set_num_threads(1)
        speeds = measure(ways(Path(scratch), files), rounds)
        walls = {} if args.quick else wall_clock(files, rounds)
    rows = figures(speeds, walls, pixels, goal=QUICK_GOAL if args.quick else GOAL)
    show(speeds, walls, len(files))
    details = {"images": len(files), "images/s of a core": speeds, "images/s by clock": walls}
    write(args.json, rows, quick=args.quick, details=details | {"pixels": pixels})
    return verdict(rows)


def subset(folder: Path, target: Path, count: int) -> list[Path]:
    """A seeded draw of photographs, in class folders of its own."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise SystemExit(f"{folder}: no JPEG found")
    files = []
    for file in sorted(random.Random(0).sample(found, min(count, len(found)))):
        (target / file.parent.name).mkdir(exist_ok=True)
        files.append(Path(shutil.copy(file, target / file.parent.name)))
    return files


# ---- the ways -----------------------------------------------------------------------------------


def ways(folder: Path, files: list[Path]) -> dict[str, Epochs]:
    """What is timed, by name; warm ways have been through one epoch."""
    made: dict[str, Epochs] = {
        "timm": timms(folder, color_jitter=None, interpolation="bicubic"),
        "timm, jitter": timms(folder, color_jitter=0.4, interpolation="random"),
    }
    for name, decoder, resize in (
        ("reference", "pillow", "pillow"),
        ("exact", "fast", "pillow"),
        ("fast", "fast", "fast"),
    ):
        made[name] = ours(files, decoder, resize)
        if name != "reference":
            made[f"{name}, warm"] = ours(files, decoder, resize, warm=True)
    return made


def timms(folder: Path, **options: Any) -> Epochs:
    dataset = create_dataset("", root=str(folder), is_training=True)
    loader = create_loader(
        dataset,
        input_size=(3, 224, 224),
        batch_size=BATCH,
        is_training=True,
        mean=MEAN,
        std=STD,
        num_workers=0,
        persistent_workers=False,
        device=CPU,
        **options,
    )
    return lambda epoch: iter(loader)


def ours(
    files: list[Path], decoder: str, resize: str, *, warm: bool = False, workers: int = 0
) -> Epochs:
    sums = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    sizes = [3 * pixels_of(f) for f in files] if warm else []
    photos = Photos(
        files,
        np.zeros(len(files), np.int64),
        sums,
        decode=DecodeSpec(decoder=decoder),
        transform=augmented(CONFIG, CROPS, "timm", resize),
        seed=0,
        keep=Pictures(sizes, sum(sizes), shared=False) if warm else None,
    )
    batches = Batches(
        photos, batch_size=BATCH, seed=0, shuffle=True, device=CPU, workers=workers, drop_last=True
    )
    if warm:
        for _ in batches.epoch(0):
            pass
    return batches.epoch


def pixels_of(file: Path) -> int:
    with Image.open(file) as picture:
        return picture.width * picture.height


# ---- measuring ----------------------------------------------------------------------------------


def measure(table: dict[str, Epochs], rounds: int) -> dict[str, list[float]]:
    """Images per second of processor time, each way in each round, after one round unmeasured."""
    speeds: dict[str, list[float]] = {name: [] for name in table}
    for k in range(rounds + 1):
        for name, epochs in table.items():
            started = time.process_time()
            count = sum(len(batch[0]) for batch in epochs(k + 1))
            if k:
                speeds[name].append(count / (time.process_time() - started))
    return speeds


def wall_clock(files: list[Path], rounds: int) -> dict[str, list[float]]:
    """Images per second by the clock of one thread, two threads and two workers."""
    speeds: dict[str, list[float]] = {}
    sides = {
        "one thread": (1, ours(files, "fast", "pillow")),
        "two threads": (2, ours(files, "fast", "pillow")),
        "two workers": (1, ours(files, "fast", "pillow", workers=2)),
    }
    for k in range(rounds + 1):
        for name, (threads, epochs) in sides.items():
            torch.set_num_threads(threads)
            started = time.perf_counter()
            count = sum(len(batch[0]) for batch in epochs(k + 1))
            if k:
                speeds.setdefault(name, []).append(count / (time.perf_counter() - started))
    torch.set_num_threads(1)
    return speeds


def distances(files: list[Path]) -> dict[str, dict[str, float]]:
    """How far inputs are from those of timm's own transform after the same seeding."""
    timm = create_transform(
        (3, 224, 224), is_training=True, interpolation="bicubic",
        use_prefetcher=True, color_jitter=None,  # type: ignore[arg-type]  # "none" to timm
    )  # fmt: skip
    found = {}
    for name, decoder, resize in (
        ("reference", "pillow", "pillow"),
        ("exact", "fast", "pillow"),
        ("fast", "fast", "fast"),
    ):
        gaps = [distance(f, timm, decoder, augmented(CONFIG, CROPS, "timm", resize)) for f in files]
        gap = torch.stack(gaps)
        found[name] = {
            "largest": float(gap.max()),
            "share of grey values": float((gap > 0).float().mean()),
            "mean": float(gap.mean()),
        }
        print(f"{name}: grey values from timm's: {found[name]}", flush=True)
    return found


def distance(file: Path, timm: Any, decoder: str, transform: TransformSpec) -> torch.Tensor:
    """[3, 224, 224], absolute."""
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    spec = DecodeSpec(decoder=decoder)
    photos = Photos([file], np.zeros(1, np.int64), [sha], decode=spec, transform=transform, seed=0)
    with Image.open(file) as picture, seeded(derive_seed(0, "view", 0, sha)):
        want = timm(picture.convert("RGB"))
    gap: torch.Tensor = (photos[0, 0][0].int() - want.int()).abs().float()
    return gap


# ---- the table ----------------------------------------------------------------------------------


def figures(
    speeds: dict[str, list[float]],
    walls: dict[str, list[float]],
    pixels: dict[str, dict[str, float]],
    *,
    goal: float,
) -> list[Row]:
    """Ratios round by round; the first is what the goal speaks of."""
    if pixels["exact"]["largest"] > 0:
        raise SystemExit("exact is not exact here: Pillow and simplejpeg decode differently")

    def ratio(a: list[float], b: list[float]) -> tuple[float, tuple[float, float]]:
        each = [x / y for x, y in zip(a, b, strict=True)]
        return statistics.median(each), (min(each), max(each))

    share = pixels["fast"]["share of grey values"]
    halves = zip(speeds["exact"], speeds["exact, warm"], strict=True)
    ten = {"exact, ten": [10 / (1 / cold + 9 / warm) for cold, warm in halves]}
    told = {
        "exact": ("the same pixels", goal),
        "exact, warm": ("the same pixels, second epoch on", goal),
        "exact, ten": ("the same pixels, ten epochs with the first", goal),
        "fast": (f"{100 * share:.0f} % of grey values a little off", goal),
        "fast, warm": (f"{100 * share:.0f} % of grey values a little off, second epoch on", goal),
        "reference": ("the same pixels, Pillow alone", None),
    }
    rows = []
    for name, (what, aim) in told.items():
        value, spread = ratio((speeds | ten)[name], speeds["timm"])
        rows.append(Row(f"batches from JPEGs per core, {what}, over timm", value, "x", spread, aim))
    for name in ("two threads", "two workers"):
        if name in walls:
            value, spread = ratio(walls[name], walls["one thread"])
            rows.append(Row(f"batches from JPEGs by {name}, over one thread", value, "x", spread))
    return rows


def show(speeds: dict[str, list[float]], walls: dict[str, list[float]], images: int) -> None:
    base = statistics.median(speeds["timm"])
    print(f"{images} JPEGs, batches of {BATCH}; images/s of a core")
    for name, each in speeds.items():
        middle = statistics.median(each)
        spread = f"{min(each):,.0f} to {max(each):,.0f}"
        print(f"  {name:<14} {middle:8,.0f}  ({spread})  {middle / base:5.2f} x timm")
    for name, each in walls.items():
        print(f"  {name:<14} {statistics.median(each):8,.0f}  by the clock")


if __name__ == "__main__":
    raise SystemExit(main())
