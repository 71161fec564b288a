"""Fine-tuning steps on CPU against timm's own train.py: Ti/16 and S/16, batch 32, float32.

    python tools/bench/train_cpu.py [--timm CHECKOUT] [--models NAME ...] [--profile] [--quick]

CHECKOUT holds timm's repository, whose `train_one_epoch` then is the peer; without it a loop of
timm's pieces is (the table says which). Rounds of a few steps take turns; the first of each, which
warms up, is not counted. Ours is exact: its loss curve must be timm's to 1e-3. With half of the
patches left out (PatchDropout) it is another training, so only its speed is compared.

Each figure is of wall time, and beside it of CPU time, which other programs on the machine disturb
less. `--profile` prints where the time of one step goes. Goals: 1.15 times timm, 2 times with half
of the patches.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from record import Row, verdict, write
from steps import Ours, Synthetic, Timm, Way, gap, nets, script, told

GOAL, GOAL_HALF = 1.15, 2.0
HALF = "half of the patches"
CPU = torch.device("cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--timm", type=Path, metavar="CHECKOUT")
    models = ["vitflower_ti16", "vitflower_s16"]
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--side", type=int, default=224, metavar="PX")
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--rounds", type=int, default=6, help="the first is not counted")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--quick", action="store_true", help="Ti/16, 3 rounds of one step")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.quick:
        args.models, args.steps, args.rounds = ["vitflower_ti16"], 1, 4
    peer = script(args.timm)
    print(
        f"peer: {told(peer)}; batch {args.batch}, {args.side} px, {torch.get_num_threads()} threads"
    )
    results = {name: measure(name, args, peer) for name in args.models}
    rows = [row for name, found in results.items() for row in compare(name, found, peer, args)]
    write(args.json, rows, quick=args.quick, details={"peer": told(peer), "rounds": results})
    return verdict(rows)


def measure(name: str, args: argparse.Namespace, peer: Any) -> dict[str, dict[str, list[float]]]:
    """Of each way the seconds, CPU seconds and losses of its rounds, which take turns."""
    ours, theirs, half = nets(name, args.side, CPU, drop=0.5)
    batches = Synthetic(args.steps, args.batch, args.side, CPU)
    ways: dict[str, Way] = {
        "timm": Timm(theirs, batches, script=peer),
        "vitft": Ours(ours, batches),
        HALF: Ours(half, batches),
    }
    found: dict[str, dict[str, list[float]]] = {
        way: {"seconds": [], "cpu_seconds": [], "loss": []} for way in ways
    }
    for _ in range(args.rounds):
        for way, trained in ways.items():
            used = time.process_time()
            seconds, loss = trained.round()
            found[way]["cpu_seconds"].append(time.process_time() - used)
            found[way]["seconds"].append(seconds)
            found[way]["loss"].append(loss)
    if args.profile:
        for way, trained in ways.items():
            profile(f"{name}, {way}", trained)
    return found


def compare(
    name: str, found: dict[str, dict[str, list[float]]], peer: Any, args: argparse.Namespace
) -> list[Row]:
    """Prints a model's table; gives the rows of its goals."""
    images, rows = args.steps * args.batch, []
    difference = gap(found["timm"]["loss"], found["vitft"]["loss"])
    for way, f in found.items():
        speeds = [images / s for s in f["seconds"][1:]]
        cpu = statistics.median(images / s for s in f["cpu_seconds"][1:])
        ratios = [a / b for a, b in zip(found["timm"]["seconds"], f["seconds"], strict=True)][1:]
        own = [a / b for a, b in zip(found["timm"]["cpu_seconds"], f["cpu_seconds"], strict=True)]
        ratio, by_cpu = statistics.median(ratios), statistics.median(own[1:])
        print(
            f"{name:<15} {way:<20} {statistics.median(speeds):7.2f} images/s "
            f"({min(speeds):.2f} to {max(speeds):.2f}) {ratio:5.2f} x;  by CPU time "
            f"{cpu:6.2f} images/s, {by_cpu:.2f} x;  loss {f['loss'][-1]:.5f}"
        )
        if way != "timm":
            spread, goal = (min(ratios), max(ratios)), GOAL_HALF if way == HALF else GOAL
            exact = HALF if way == HALF else "exact float32"
            what = f"fine-tuning {name} on CPU, {exact}, against {told(peer)}"
            rows.append(Row(what, ratio, "x", spread, goal=goal))
    told_gap = f"largest relative difference of the loss curves, {name}"
    return [*rows, Row(told_gap, difference, "", goal=1e-3, at_most=True)]


def profile(title: str, way: Way) -> None:
    """A table of where the time of a round goes, by operation."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU]) as seen:
        way.round()
    total = sum(e.self_cpu_time_total for e in seen.key_averages())
    print(f"\n{title}: where the time goes")
    ordered = sorted(seen.key_averages(), key=lambda e: -e.self_cpu_time_total)
    for e in ordered[:14]:
        print(f"  {100 * e.self_cpu_time_total / total:5.1f} %  {e.count:>6} x  {e.key[:60]}")


if __name__ == "__main__":
    sys.exit(main())
