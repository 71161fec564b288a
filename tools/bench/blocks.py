"""An epoch of the last K blocks on kept activations, against the whole model on photographs.

    python tools/bench/blocks.py [FOLDER] [--blocks K ...] [--rounds N] [--quick] [--json FILE]

FOLDER holds class folders (default: the bundled photographs); ViT-S/14 at 224 px with the bundled
weights, batch 16, AdamW, the plain transform, so that both ways see the same pixels in the same
order and must have the same loss curve (to 1e-4, which is checked). Both read from the disk as a
run does: the one photographs, the other rows of the store. What filling the store takes is told
beside it, in epochs of the whole model. Ways take turns, each epoch from the same weights; ratios
are of medians. Goal: the share of the work that is left, where a block's way back costs two of its
ways there, 3 K / (12 + 2 K), and a tenth for reading the rows: 0.24, 0.41 and 0.66.
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import Row, verdict, write
from torch import nn

from vitft import boundary, model, prepare, recipe
from vitft.kernels import fast_linear
from vitft.prepare import Prepared

SAMPLE = Path(__file__).resolve().parents[2] / "vitft" / "bundled" / "flowers"
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "finetune_small_cpu.yaml"
DEPTH, SLACK, EQUAL = 12, 1.1, 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SAMPLE)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4], metavar="K")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="K = 1, one round, 112 px")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.quick:
        args.blocks, args.rounds = [1], 1
    found = [measure(args.folder, k, args.rounds, 112 if args.quick else 224) for k in args.blocks]
    rows = [figure_of(each) for each in found]
    write(args.json, rows, quick=args.quick, details={"blocks": found})
    return verdict(rows)


def measure(folder: Path, blocks: int, rounds: int, side: int) -> dict[str, Any]:
    """Seconds of an epoch both ways, of filling the store, and how far the losses are apart."""
    wanted = (f"data.root={folder}", f"train.blocks={blocks}", f"data.image_size={side}")
    p = prepare.prepare(recipe.load(RECIPE, list(wanted)))
    model.train_last_blocks(p.net, blocks)
    with tempfile.TemporaryDirectory() as store, fast_linear(p.device):
        os.environ["VITFT_CACHE"] = store
        started = time.perf_counter()
        kept = boundary.keep(p, "train", views=1)
        fill = time.perf_counter() - started
        times: dict[str, list[float]] = {"whole": [], "kept": []}
        losses: dict[str, list[float]] = {}
        for _ in range(rounds):
            for way in times:
                net = copy.deepcopy(p.net)
                cached = way == "kept"
                part = boundary.tail(net, blocks) if cached else net
                photos = p.batches(p.photos("train"), train=True)
                batches = boundary.batches(p, kept) if cached else photos
                started = time.perf_counter()
                losses[way] = epoch(part, batches, p)
                times[way].append(time.perf_counter() - started)
                print(f"K = {blocks}, {way}: {times[way][-1]:.1f} s", flush=True)
    gap = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    if gap > EQUAL:
        raise SystemExit(f"K = {blocks}: losses differ by {gap:.1e}, so times are not comparable")
    about = {"blocks": blocks, "photographs": len(kept.photos), "side": side}
    return {**about, "seconds": times, "fill": fill, "largest_loss_difference": gap}


def epoch(net: nn.Module, batches: Any, p: Prepared) -> list[float]:
    """One epoch of AdamW; the loss of each step."""
    net.eval()  # no dropout: both ways compute the same
    spec = p.recipe.train
    learning = [q for q in net.parameters() if q.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, weight_decay=spec.weight_decay)
    losses = []
    for x, y, _ in batches.epoch(0):
        loss: Any = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def figure_of(found: dict[str, Any]) -> Row:
    """The share of an epoch."""
    whole, kept = found["seconds"]["whole"], found["seconds"]["kept"]
    ratios = [b / a for a, b in zip(whole, kept, strict=True)]
    value = statistics.median(kept) / statistics.median(whole)
    k, fill = found["blocks"], found["fill"] / statistics.median(whole)
    what = f"epoch of the last {k} of {DEPTH} blocks on kept activations, over the whole model's"
    text = f"{value:.2f} x, after {fill:.2f} epochs to keep them"
    goal = SLACK * 3 * k / (DEPTH + 2 * k)
    return Row(what, value, "x", (min(ratios), max(ratios)), goal=goal, at_most=True, text=text)


if __name__ == "__main__":
    sys.exit(main())
