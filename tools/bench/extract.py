"""Features per second of a frozen backbone, against timm's own forward with the same weights.

    python tools/bench/extract.py [--models NAME ...] [--quick] [--json FILE]

    timm eager       the model as timm makes it, `forward_features` and pooling
    timm compiled    torch.compile of the same, its compilation not counted
    vitft            what `vitft.features` runs: class token only in the last block, oneDNN products
    vitft compiled   on CUDA alone: what a pass goes on with once compiling pays for itself

On CPU in float32, on CUDA in bfloat16 autocast. Pictures are ready in memory; each way takes every
batch size in turn and is judged by its best one. Goal: 1.15 times the best of timm.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from record import Row, verdict, write
from torch import Tensor, nn

import vitft  # noqa: F401  (registers the models)
from vitft.evaluate import fixed_batch, in_fixed_shape
from vitft.features import backbone_of

GOAL, QUICK_GOAL = 1.15, 1.05  # three rounds of one model are noisy
PAIRS = {  # ours -> timm's, weights of one serving the other
    "vitflower_s14": "vit_small_patch14_dinov2",
    "vitflower_b16": "vit_base_patch16_224",
    "vitflower_s16": "vit_small_patch16_224",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", choices=PAIRS, default=["vitflower_s14", "vitflower_b16"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="ViT-S/16, eager only, 3 rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    names = ["vitflower_s16"] if args.quick else args.models
    rounds = 3 if args.quick else args.rounds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for name in names for row in measure(name, device, rounds, compiled=not args.quick)]
    return show(rows, args)


def sizes(device: torch.device) -> tuple[int, ...]:
    """Batches to try; the first is the one that vitft uses there."""
    return (fixed_batch(device), *((512,) if device.type == "cuda" else (32,)))


def measure(
    name: str, device: torch.device, rounds: int, *, compiled: bool
) -> list[dict[str, Any]]:
    """Images per second of each way: medians over rounds, the ways taking turns."""
    ours, theirs = pair(name)
    ours, theirs = ours.to(device), theirs.to(device)
    short = backbone_of(ours)
    ways: dict[str, Callable[[Tensor], Tensor]] = {"timm eager": theirs}
    if compiled:
        ways["timm compiled"] = torch.compile(theirs, dynamic=False)  # a shape, a program
    ways["vitft"] = lambda x: in_fixed_shape(short, x)
    if compiled and device.type == "cuda":
        fast = torch.compile(short, dynamic=False)
        ways["vitft compiled"] = lambda x: in_fixed_shape(fast, x)
    tried = sizes(device)
    x = torch.randn(max(tried), 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        gap = float((ways["vitft"](x[: tried[0]]) - theirs(x[: tried[0]])).abs().max())
        jobs = [(w, b) for w in ways for b in (tried[:1] if w.startswith("vitft") else tried)]
        for way, size in jobs:
            _once(ways[way], x, size, device)
        times: dict[tuple[str, int], list[float]] = {job: [] for job in jobs}
        for _ in range(rounds):
            for way, size in jobs:
                times[way, size].append(len(x) / _once(ways[way], x, size, device))
    return [
        {
            "model": name,
            "way": way,
            "batch": size,
            "images_per_second": statistics.median(speeds),
            "spread": [min(speeds), max(speeds)],
            "largest_difference": gap if way == "vitft" else None,
        }
        for (way, size), speeds in times.items()
    ]


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Our model and timm's with our weights, both without a head, in eval mode."""
    torch.manual_seed(0)
    ours = timm.create_model(name, num_classes=0).eval()
    theirs = timm.create_model(PAIRS[name], num_classes=0, img_size=224).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _once(forward: Callable[[Tensor], Tensor], x: Tensor, size: int, device: torch.device) -> float:
    """Seconds for all of x."""
    half = device.type == "cuda"
    started = time.perf_counter()
    with torch.autocast("cuda", torch.bfloat16) if half else nullcontext():
        for part in torch.split(x, size):
            forward(part)
    if half:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> int:
    """Prints the table; exit code 1 where a model misses the goal."""
    told, goal = [], QUICK_GOAL if args.quick else GOAL
    for name in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == name]
        best = max(r["images_per_second"] for r in mine if r["way"].startswith("timm"))
        for r in mine:
            low, high = r["spread"]
            r["ratio"] = r["images_per_second"] / best
            print(
                f"{name:<15} {r['way']:<14} batch {r['batch']:>3} "
                f"{r['images_per_second']:9.1f} images/s  ({low:.1f} to {high:.1f})  "
                f"{r['ratio']:5.2f} x the best of timm"
            )
        own = (r for r in mine if r["way"].startswith("vitft"))
        ours = max(own, key=lambda r: r["images_per_second"])
        what = f"features of {name} at 224 px"
        told += [
            Row(f"{what}, over the better of timm eager and compiled", ours["ratio"], goal=goal),
            Row(what, ours["images_per_second"], "images/s", ours["spread"]),
        ]
    write(args.json, told, quick=args.quick, details={"ways": rows})
    return verdict(told)


if __name__ == "__main__":
    sys.exit(main())
