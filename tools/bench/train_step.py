"""Fine-tuning steps on a CUDA card against timm's train.py, eager and compiled, in bfloat16.

    python tools/bench/train_step.py --timm CHECKOUT --photos FOLDER --json FILE   # in 10 minutes
    python tools/bench/train_step.py --tiny [--photos FOLDER]       # the wiring, on any machine

CHECKOUT holds timm's repository, FOLDER class folders of photographs. One call does all, the most
important first: ViT-B/16 with batch 256 on synthetic batches, then on photographs, with batch 8
(where kernels are too short for the processor that launches them: ours with CUDA graphs), then
S/16, Ti/16 and L/16. When `--minutes` are over the rest is left out, and the record says so.

Rounds take turns; a way's first round compiles, is told apart and not counted. MFU counts the
operations of the whole model, forward and backward, against 989 TFLOP/s; that ours leaves some of
them out in the last block is speed, not use. Peak memory is a way's own: tensors that stay, and
what comes and goes in a round. Goals: 1.15 times timm compiled, 1.4 times timm eager, 3,600
images/s.

vitft needs timm 1.0.31 and pydantic. Where a machine holds an older one and no network, carry them:
`pip install --target site timm==1.0.31 --no-deps` here, `PYTHONPATH=site:.` there.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import Row, verdict, write
from steps import Ours, Synthetic, Timm, gap, nets, script, told
from timm.data.dataset import ImageDataset
from timm.data.loader import create_loader

from vitft import prepare, recipe

PEAK = 989e12  # FLOP/s of an H100 in bfloat16, dense
FLOP = {  # of an image, forward and backward, 224 px: 12 T D^2 + 2 T^2 D a block, three times
    "vitflower_ti16": 7.46e9,
    "vitflower_s16": 27.5e9,
    "vitflower_b16": 105.2e9,
    "vitflower_l16": 369.0e9,
}
EAGER, COMPILED, OURS, GRAPHS = "timm eager", "timm compiled", "vitft", "vitft, CUDA graphs"
GOALS = {EAGER: 1.4, COMPILED: 1.15}
GOAL_SPEED = 3600.0


@dataclass(frozen=True)
class Case:
    """One table: a model, its batch, the ways that are compared."""

    name: str
    batch: int
    steps: int
    ways: tuple[str, ...]
    photos: bool = False

    def __str__(self) -> str:
        where = "photographs" if self.photos else "synthetic batches"
        return f"{self.name}, batch {self.batch}, {where}"


CASES = (
    Case("vitflower_b16", 256, 20, (EAGER, COMPILED, OURS)),
    Case("vitflower_b16", 256, 0, (COMPILED, OURS), photos=True),
    Case("vitflower_b16", 8, 100, (EAGER, COMPILED, GRAPHS)),
    Case("vitflower_s16", 256, 30, (COMPILED, OURS)),
    Case("vitflower_ti16", 256, 40, (COMPILED, OURS)),
    Case("vitflower_l16", 128, 15, (COMPILED, OURS)),
)
TINY = (
    Case("vitflower_ti16", 4, 2, (EAGER, COMPILED, OURS)),
    Case("vitflower_ti16", 4, 0, (COMPILED, OURS), photos=True),
    Case("vitflower_ti16", 2, 2, (EAGER, GRAPHS)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--timm", type=Path, metavar="CHECKOUT")
    parser.add_argument("--photos", type=Path, metavar="FOLDER")
    parser.add_argument("--workers", type=int, default=8, help="processes that decode, both sides")
    parser.add_argument("--rounds", type=int, default=6, help="the first is not counted")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument(
        "--tiny", "--quick", action="store_true", help="no figures, only the wiring"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here; --tiny shows the wiring on any machine")
    if args.tiny:
        args.rounds, args.workers = 2, 0
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True  # as timm's main does
    torch.backends.cudnn.benchmark = True
    peer = script(args.timm)
    print(f"peer: {told(peer)}", flush=True)
    tables, left = all_cases(TINY if args.tiny else CASES, args, peer, device)
    rows = [] if args.tiny else [row for table in tables for row in goals(table, peer)]
    details = {"peer": told(peer), "tables": tables}
    write(args.json, rows, quick=args.tiny, not_measured=left, details=details)
    return verdict(rows)


def all_cases(
    cases: tuple[Case, ...], args: argparse.Namespace, peer: Any, device: torch.device
) -> tuple[list[dict[str, Any]], list[str]]:
    """The tables, and what time or memory did not allow."""
    started, tables, left = time.monotonic(), [], []
    for case in cases:
        if case.photos and args.photos is None:
            left.append(f"{case}: no --photos given")
        elif time.monotonic() - started > 60 * args.minutes:
            left.append(f"{case}: no time left")
        else:
            try:
                tables.append(measure(case, args, peer, device))
                show(tables[-1])
            except torch.cuda.OutOfMemoryError as error:
                left.append(f"{case}: {str(error).splitlines()[0]}")
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for text in left:
        print(f"not measured: {text}")
    return tables, left


def measure(
    case: Case, args: argparse.Namespace, peer: Any, device: torch.device
) -> dict[str, Any]:
    """Of each way: images per second, losses, seconds of the first round, peak memory."""
    side = 32 if args.tiny else 224
    theirs, ours, images = loaders(case, args, side, device)
    ways: dict[str, Any] = {}
    for way in case.ways:
        mine, other = nets(case.name, side, device)
        if way in (OURS, GRAPHS):
            compiled = "reduce-overhead" if way == GRAPHS else True
            how = False if args.tiny else compiled
            ways[way] = Ours(mine, ours, compile=how, amp="bf16")
        else:
            compiles = way == COMPILED and not args.tiny
            ways[way] = Timm(other, theirs, script=peer, amp="bf16", compile=compiles)
        del mine, other
    seen: dict[str, dict[str, Any]] = {
        way: {"seconds": [], "loss": [], "peak": 0, "kept": kept(w)} for way, w in ways.items()
    }
    for number in range(args.rounds):
        for way, trained in ways.items():
            before = _start_counting(device)
            seconds, loss = trained.round()
            seen[way]["seconds"].append(seconds)
            seen[way]["loss"].append(loss)
            if number:
                seen[way]["peak"] = max(seen[way]["peak"], _counted(device) - before)
    counts = {way: images[way in (OURS, GRAPHS)] for way in ways}
    return {"case": str(case), "model": case.name, "images": counts, "ways": seen}


def loaders(
    case: Case, args: argparse.Namespace, side: int, device: torch.device
) -> tuple[Any, Any, tuple[int, int]]:
    """timm's loader, ours, and the images that each gives in a round."""
    if not case.photos:
        ready = Synthetic(case.steps, case.batch, side, device)
        return ready, ready, (case.steps * case.batch,) * 2
    theirs = create_loader(
        ImageDataset(str(args.photos)),  # type: ignore[no-untyped-call]
        input_size=(3, side, side),
        batch_size=case.batch,
        is_training=True,
        color_jitter=0.0,
        interpolation="bicubic",
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
        device=device,
    )
    text = f"mode: full\ndata: {{root: {args.photos.resolve()}, val: 0.01, test: 0.01}}\n"
    changes = [
        f"data.image_size={side}",
        "data.on_bad=skip",
        "data.max_bad=1.0",
        "model.name=vitflower_ti16",
        f"device={device.type}",
        f"train.batch_size={case.batch}",
        f"train.workers={args.workers}",
    ]
    p = prepare.prepare(recipe.parse(text, "bench.yaml", ".", changes))
    photos = p.photos("train", augment=True)
    return theirs, p.batches(photos, train=True), (len(theirs) * case.batch, len(photos))


def kept(way: Any) -> int:
    """Bytes that stay between rounds: parameters, and AdamW's two moments of each."""
    net = way.trainer.net if isinstance(way, Ours) else way.net
    return 3 * sum(p.numel() * p.element_size() for p in net.parameters())


def _start_counting(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _counted(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def speeds(table: dict[str, Any], way: str) -> list[float]:
    """Images per second of the rounds that count."""
    return [table["images"][way] / s for s in table["ways"][way]["seconds"][1:]]


def show(table: dict[str, Any]) -> None:
    """One case, a line for each way."""
    print(f"\n{table['case']}")
    for way, seen in table["ways"].items():
        found = speeds(table, way)
        speed = statistics.median(found)
        gib = (seen["peak"] + seen["kept"]) / 2**30
        print(
            f"  {way:<20} {speed:9.1f} images/s ({min(found):.1f} to {max(found):.1f})  MFU "
            f"{100 * speed * FLOP[table['model']] / PEAK:5.1f} %  peak {gib:5.1f} GiB  first round "
            f"{seen['seconds'][0]:5.1f} s  loss {seen['loss'][0]:.4f} to {seen['loss'][-1]:.4f}",
            flush=True,
        )


def goals(table: dict[str, Any], peer: Any) -> list[Row]:
    """Ours against each way of timm; speed and loss curve for the case that has goals."""
    ours = next(way for way in (OURS, GRAPHS) if way in table["ways"])
    first = table["case"] == str(CASES[0])
    rows, mine = [], speeds(table, ours)
    for way, goal in GOALS.items():
        if way not in table["ways"]:
            continue
        ratios = [a / b for a, b in zip(mine, speeds(table, way), strict=True)]
        what = f"training {table['case']}, against {told(peer)}, {way.split()[1]}"
        spread = (min(ratios), max(ratios))
        rows.append(Row(what, statistics.median(ratios), "x", spread, goal=goal if first else None))
    if first:
        what = f"training {table['case']}"
        speed = statistics.median(mine)
        spread = (min(mine), max(mine))
        rows.append(Row(what, speed, "images/s", spread, goal=GOAL_SPEED))
        curves = [table["ways"][way]["loss"] for way in (COMPILED, ours)]
        rows.append(Row("difference of the loss curves", gap(*curves), "", goal=0.02, at_most=True))
    return rows


if __name__ == "__main__":
    sys.exit(main())
