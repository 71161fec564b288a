"""What augmented views give a frozen head, in accuracy, and what they cost, in backbone forwards.

    python tools/bench/views.py [FOLDER] [--pool N] [--others N] [--precision P] [--json FILE]

Two draws of photographs: a pool that may train (`--pool` photographs, ten augmented views each and
the plain one) and `--others`, which only ever choose and score, by their plain view. Each of five
split seeds trains on four fifths of the pool, chooses the epoch on a third of the others and is
scored on the rest. Views are keyed by (photograph, view, seed of the views), not by the split, so
every forward is made once and kept in the cache; `online` at ten epochs sees ten views of each
photograph, each once, and is just that here.

    V = 1          the plain view in every epoch
    V = 2, 4, 8    one of V augmented views of each photograph, drawn anew in each epoch
    online         another augmented view in each epoch
    jitter         frozen feature augmentation on V = 1: brightness or contrast of the features,
                   per channel, drawn anew for every row (arXiv 2403.10519)

`--quick` takes a pool of 10 of the bundled photographs, two splits and no goal: it shows that the
table can be made. A difference to V = 1 is paired by split; it is distinguishable where the t
interval over the splits leaves out zero. Splits share photographs, so that interval is rather too
narrow than too wide.

What was found (results/views.json): no number of views, and no jitter, is better than one plain
view by more than luck, at one forward per photograph. So `head.views` is 1 unless a recipe says
otherwise, and jitter is no option of vitft.
"""

import argparse
import hashlib
import random
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import Row, verdict, write
from scipy import stats as distributions
from torch import Tensor, nn

from vitft import model
from vitft.features import Features, Views, extract, head_logits
from vitft.images import DecodeSpec
from vitft.inputs import augmented, derive_seed, plain
from vitft.photos import Photos
from vitft.recipe import ModelSpec, TrainSpec
from vitft.train import Trainer

SAMPLE = Path(__file__).resolve().parents[2] / "vitft" / "bundled" / "flowers"
VIEWS = 10  # as many as `online` sees in ten epochs
CPU = torch.device("cpu")
SPEC = TrainSpec(epochs=10, batch_size=8, opt="momentum", lr=1e-3)  # recipes/flowers_head.yaml
LONG = SPEC.model_copy(update={"epochs": 50})
JITTERS = (("brightness", 0.1), ("brightness", 0.4), ("contrast", 0.2), ("contrast", 0.8))

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Table:
    """Features: `plain` [1, N, D] of all photographs, `views` [V, P, D] of the pool (rows 0..P)."""

    plain: Features
    views: Features
    files: list[Path]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SAMPLE)
    parser.add_argument("--pool", type=int, default=400, help="photographs that may train")
    parser.add_argument("--others", type=int, default=900, help="that choose and score")
    parser.add_argument("--precision", default="auto", help="head.precision of the features")
    parser.add_argument("--seeds", type=int, default=5, help="splits")
    parser.add_argument("--quick", action="store_true", help="a pool of 10 bundled photographs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    pool, others, seeds = (10, 30, 2) if args.quick else (args.pool, args.others, args.seeds)
    table = measure(args.folder, pool, others, precision=args.precision)
    specs = (SPEC,) if args.quick else (SPEC, LONG)
    found = [row for spec in specs for row in compare(table, pool, seeds, spec)]
    show(found, len(table.files), pool, seeds)
    details = {
        "photographs": len(table.files),
        "pool": pool,
        "precision": args.precision,
        "table": found,
    }
    rows = [figure_of(r) for r in found if r["epochs"] == SPEC.epochs and "," not in r["way"]]
    write(args.json, rows, quick=args.quick, details=details)
    return verdict(rows)


def figure_of(r: dict[str, Any]) -> Row:
    """A line of README."""
    way = {"V = 1": "one plain view", "online": "a new augmented view in every epoch"}
    seen = way.get(r["way"], r["way"].replace("V = ", "augmented views: "))
    what = f"test accuracy of a head on frozen features, {seen}"
    count = r["forwards"] // r["trained"]
    text = f"{what} ({count} forward{'s' * (count > 1)} per photograph)"
    each = [100 * a for a in r["accuracies"]]
    return Row(text, 100 * r["mean"], "%", (min(each), max(each)))


# ---- features -----------------------------------------------------------------------------------


def measure(folder: Path, pool: int, others: int, *, precision: str) -> Table:
    """All features the table needs, from the cache where they are there."""
    files, labels, contents = photographs(folder)
    if len(files) < pool + others:
        raise SystemExit(f"{len(files)} photographs are fewer than {pool} + {others}")
    built = model.build(ModelSpec(name="vitflower_s14", weights="bundled"), classes=5)

    def features(count: int, views: int) -> Features:
        photos = Photos(
            files[:count],
            labels[:count],
            contents[:count],
            decode=DecodeSpec(),
            transform=augmented(built.input, SPEC) if views > 1 else plain(built.input),
            seed=0,  # of the views, whatever the seed of a split
        )
        return extract(
            built.net,
            photos,
            views=views,
            device=CPU,
            backbone_key=f"vitflower_s14 {model.backbone_fingerprint(built.net)}",
            precision=precision,
        )

    return Table(features(pool + others, 1), features(pool, VIEWS), files[: pool + others])


def photographs(folder: Path) -> tuple[list[Path], Ints, list[str]]:
    """Files, labels and sha256, in an order that is even over the classes.

    Bytes that stand in two places have no place of their own and are left out.
    """
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    found = [(f, k) for k, c in enumerate(classes) for f in sorted(c.glob("*.jpg"))]
    hashes = {f: hashlib.sha256(f.read_bytes()).hexdigest() for f, _ in found}
    count = Counter(hashes.values())
    by_class: list[list[tuple[Path, int]]] = [[] for _ in classes]
    for item in found:
        if count[hashes[item[0]]] == 1:
            by_class[item[1]].append(item)
    for k, items in enumerate(by_class):
        random.Random(k).shuffle(items)
    order = [items[i] for i in range(len(found)) for items in by_class if i < len(items)]
    labels = np.array([k for _, k in order], dtype=np.int64)
    return [f for f, _ in order], labels, [hashes[f] for f, _ in order]


# ---- heads --------------------------------------------------------------------------------------


class Online(Views):
    """Another view in each epoch."""

    def drawn(self, epoch: int) -> Tensor:
        """The epoch's own."""
        return torch.full((len(self.y),), epoch % self.views)


class Jittered(Views):
    """Features whose channels are made brighter, or richer in contrast, by chance."""

    kind = "brightness"
    strength = 0.1

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As it is, with the channels of each row moved; ranges are those of the table [N, D]."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "jitter", epoch))
        low, high = self.x[0].min(0).values, self.x[0].max(0).values
        for x, y, rows in super().epoch(epoch, start):
            unit = (x - low) / (high - low).clamp_min(1e-6)  # [B, D] in 0..1
            drawn = self.strength * (2 * torch.rand(unit.shape, generator=generator) - 1)
            if self.kind == "brightness":
                moved = unit + drawn
            else:
                mean = unit.mean(1, keepdim=True)
                moved = (unit - mean) * (1 + drawn) + mean
            yield moved.clamp(0, 1) * (high - low) + low, y, rows


def compare(table: Table, pool: int, seeds: int, spec: TrainSpec) -> list[dict[str, Any]]:
    """One row per way: accuracies by split, differences to V = 1, forwards."""
    right: dict[str, list[NDArray[np.bool_]]] = {}
    for seed in range(seeds):
        train, val, test = split(table, pool, seed)
        for name, batches in ways(table, train, seed, spec).items():
            head = trained(batches, table, val, spec, seed)
            logits = head_logits(head, table.plain.x[0][test], CPU)
            right.setdefault(name, []).append(logits.argmax(1) == table.plain.y[test])
        print(f"{spec.epochs} epochs: split {seed + 1} of {seeds}", file=sys.stderr, flush=True)
    train_count = len(split(table, pool, 0)[0])
    return [
        row(name, hits, right["V = 1"], spec.epochs, train_count) for name, hits in right.items()
    ]


def split(table: Table, pool: int, seed: int) -> tuple[Ints, Ints, Ints]:
    """Rows that train (four fifths of the pool), choose and score (of the others)."""
    rng = np.random.default_rng(derive_seed(seed, "split"))
    inside, outside = rng.permutation(pool), pool + rng.permutation(len(table.files) - pool)
    chosen = len(outside) // 3
    return inside[: pool * 4 // 5], outside[:chosen], outside[chosen:]


def ways(table: Table, train: Ints, seed: int, spec: TrainSpec) -> dict[str, Views]:
    def some(x: NDArray[np.float32], kind: type[Views] = Views) -> Views:
        cached = replace(table.plain, x=x, y=table.plain.y[train])
        names = [table.files[i] for i in train]
        size = int(spec.batch_size)
        return kind(cached, batch_size=size, seed=seed, device=CPU, names=names)

    still = table.plain.x[:, train]
    found = {"V = 1": some(still)}
    found |= {f"V = {v}": some(table.views.x[:v, train]) for v in (2, 4, 8)}
    if spec.epochs <= VIEWS:
        found["online"] = some(table.views.x[:, train], Online)
    for what, strength in JITTERS:
        moved = some(still, Jittered)
        assert isinstance(moved, Jittered)  # noqa: S101 (for the type checker)
        moved.kind, moved.strength = what, strength
        found[f"V = 1, {what} {strength}"] = moved
    return found


def trained(batches: Views, table: Table, val: Ints, spec: TrainSpec, seed: int) -> nn.Module:
    """A linear head by the product's own loop."""
    x, y = table.plain.x[0][val], torch.as_tensor(table.plain.y[val])

    def validate(head: nn.Module) -> tuple[float, float]:
        logits = torch.as_tensor(head_logits(head, x, CPU))
        hits = (logits.argmax(1) == y).float().mean()
        head.train()
        return float(hits), float(nn.functional.cross_entropy(logits, y))

    head = nn.Linear(x.shape[1], int(table.plain.y.max()) + 1)
    torch.manual_seed(derive_seed(seed, "head"))
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    Trainer(head, batches, spec, seed=seed, validate=validate).fit()
    return head


# ---- the table ----------------------------------------------------------------------------------


def forwards(name: str, count: int, epochs: int) -> int:
    """Backbone forwards of the training photographs in one run."""
    if name == "online":
        return count * epochs
    return count * int(name.partition(",")[0].removeprefix("V = "))


def row(
    name: str,
    right: list[NDArray[np.bool_]],
    still: list[NDArray[np.bool_]],
    epochs: int,
    trained_on: int,
) -> dict[str, Any]:
    cost = forwards(name, trained_on, epochs)
    reached = [float(r.mean()) for r in right]
    gains = [float(a.mean() - b.mean()) for a, b in zip(right, still, strict=True)]
    low, high = interval(gains)
    return {
        "way": name,
        "epochs": epochs,
        "forwards": cost,
        "trained": trained_on,
        "accuracies": reached,
        "mean": statistics.mean(reached),
        "spread": statistics.stdev(reached),
        "gain": statistics.mean(gains),
        "interval": [low, high],
        "distinguishable": low > 0 or high < 0,
    }


def interval(gains: list[float]) -> tuple[float, float]:
    """95 % t interval of a mean of paired differences."""
    mean, spread = statistics.mean(gains), statistics.stdev(gains)
    half = float(distributions.t.ppf(0.975, len(gains) - 1)) * spread / len(gains) ** 0.5
    return mean - half, mean + half


def show(rows: list[dict[str, Any]], photographs: int, pool: int, seeds: int) -> None:
    print(f"ViT-S/14, {photographs:,} photographs, {pool * 4 // 5} train, {seeds} splits")
    print(f"{'way':<24} {'epochs':>6} {'forwards':>8} {'test accuracy':>15}   gain over V = 1")
    for r in rows:
        low, high = r["interval"]
        gain = f"{100 * r['gain']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
        gain += " *" if r["distinguishable"] else ""
        reached = f"{100 * r['mean']:.2f} +- {100 * r['spread']:.2f}"
        print(f"{r['way']:<24} {r['epochs']:>6} {r['forwards']:>8,} {reached:>15}   {gain}")
    print("* distinguishable from V = 1")


if __name__ == "__main__":
    sys.exit(main())
