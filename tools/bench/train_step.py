"""Fine-tuning steps on a CUDA card against timm's train.py, eager and compiled, in bfloat16.

    python tools/bench/train_step.py --timm CHECKOUT --photos FOLDER --json FILE   # in 10 minutes
    python tools/bench/train_step.py --cases 5 6 --timm CHECKOUT --json FILE       # some of them
    python tools/bench/train_step.py --compile-first ...            # all programs, side by side
    python tools/bench/train_step.py --quick [--photos FOLDER]      # the wiring, on any machine

CHECKOUT holds timm's repository, FOLDER class folders of photographs. One call does all, the most
important first: ViT-B/16 with batch 256 on synthetic batches, then the same networks on
photographs, with batch 8 (where kernels are too short for the processor that launches them: ours
with CUDA graphs), then S/16, Ti/16 and L/16. A case that `--minutes` have no room for is left out,
one that they cut has fewer rounds, a way that fails is named; the record says so. It is written
anew after every turn, so that a call that is ended from outside loses one turn.

Rounds take turns; a way's first round compiles, is told apart and not counted. With
`--compile-first` processes of their own compile every way before, as many at once as the card's
memory holds, and leave what they made in torch's cache on the disk: minutes become seconds where
there are cores enough, and a first round says nothing about compiling then. MFU counts the
operations of the whole model, forward and backward, against 989 TFLOP/s; that ours leaves some of
them out in the last block is speed, not use. Peak memory is a way's own: tensors that stay, and
what comes and goes in a round. Goals: 1.15 times timm compiled, 1.4 times timm eager, 3,600
images/s. `--quick` times nothing worth telling: its goal is that both sides learn alike.

Where the time of a step goes, ViT-B/16, batch 256, on an H100, of 72 ms: matrix products 35 (at 720
TFLOP/s), attention 10, LayerNorm and sums of the residual stream 10, GELU and its gradient 8,
casts and copies 5, gradients of q, k and v laid side by side 3, AdamW 1. Tokens in bfloat16 between
blocks made that 67. Tried without gain: inductor's coordinate descent (143 s to compile, equal);
cuBLASLt instead of cuBLAS (4 % slower); split sums for the weights' gradients (equal); a kernel for
GELU's gradient and the bias's at once (equal); attention of whole heads over packed q, k, v in
Triton (on an H200 0.69 + 0.16 ms a block in place of 0.86 + 0.17, 1 % of a step, for
six hundred lines: left out). What bounds batches of 8 is Python: 4.2 of 5.6 ms are kernels.

vitft needs timm 1.0.31 and pydantic. Where a machine holds an older one and no network, carry them:
`pip install --target site timm==1.0.31 --no-deps` here, `PYTHONPATH=site:.` there.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from machine import about
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
BLOCKS = {"vitflower_l16": 2.0}  # times the blocks of the others: so much more to compile
EAGER, COMPILED, OURS, GRAPHS = "timm eager", "timm compiled", "vitft", "vitft, CUDA graphs"
GOALS = {EAGER: 1.4, COMPILED: 1.15}
GOAL_SPEED = 3600.0
GOAL_CURVE = 0.02  # largest relative difference of the rounds' mean losses
FIRST = {EAGER: 5.0, COMPILED: 40.0, OURS: 40.0, GRAPHS: 40.0}  # s of a first round, about
CACHED = 12.0  # s of one whose program lies in the cache
ROOM = 66.0  # GiB that the processes of --compile-first may have together
GIB = {  # that one of them takes, about; small batches almost nothing
    "vitflower_ti16": 6.0,
    "vitflower_s16": 11.0,
    "vitflower_b16": 20.0,
    "vitflower_l16": 27.0,
}
FEW = 8  # photographs of a class, with --quick
FEWEST = 3  # rounds that make a figure: the first, which is not counted, and two more


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


@dataclass
class Call:
    """What one call was asked, and what it has found so far."""

    args: argparse.Namespace
    device: torch.device
    peer: Any
    started: float = field(default_factory=time.monotonic)
    tables: list[dict[str, Any]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def seconds_left(self) -> float:
        """Until `--minutes` are over."""
        return float(60 * self.args.minutes - (time.monotonic() - self.started))

    def leave(self, what: str) -> None:
        """Something is not measured."""
        print(f"not measured: {what}", flush=True)
        self.left.append(what)

    def rows(self) -> list[Row]:
        """All figures so far."""
        tables = [table for table in self.tables if turns(table) >= (1 if self.args.quick else 2)]
        if self.args.quick:
            return [row for table in tables[:1] for row in curves(table)]
        return [row for table in tables for row in goals(table, self.peer)]

    def keep(self) -> None:
        """Writes all that is known now."""
        details = {"peer": told(self.peer), "tables": self.tables}
        write(
            self.args.json,
            self.rows(),
            quick=self.args.quick,
            not_measured=self.left,
            details=details,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--timm", type=Path, metavar="CHECKOUT")
    parser.add_argument("--photos", type=Path, metavar="FOLDER")
    parser.add_argument("--cases", type=int, nargs="+", metavar="N", help="from 1; all by default")
    parser.add_argument("--workers", type=int, default=8, help="processes that decode, both sides")
    parser.add_argument("--rounds", type=int, default=6, help="the first is not counted")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--compile-first", action="store_true", help="side by side, beforehand")
    parser.add_argument("--cached", action="store_true", help="a call before has compiled them")
    parser.add_argument("--only-compile", metavar="WAY", help=argparse.SUPPRESS)
    parser.add_argument("--quick", "--tiny", action="store_true", help="only the wiring")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if not args.quick and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here; --quick shows the wiring on any machine")
    with TemporaryDirectory() as few:
        if args.quick:
            args.rounds, args.workers = 2, 0
            args.photos = args.photos and some_of(args.photos, Path(few))
        return measured(args)


def some_of(photos: Path, folder: Path) -> Path:
    """A few photographs of each class: enough to see the wiring."""
    for source in sorted(photos.glob("*/")):
        (folder / source.name).mkdir()
        for file in sorted(source.glob("*.jp*g"))[:FEW]:
            (folder / source.name / file.name).symlink_to(file.resolve())
    return folder


def measured(args: argparse.Namespace) -> int:
    """All cases; 1 where a goal is missed."""
    torch.backends.cuda.matmul.allow_tf32 = True  # as timm's main does
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    call = Call(args, device, script(args.timm))
    cases = TINY if args.quick else CASES
    chosen = [cases[n - 1] for n in args.cases] if args.cases else list(cases)
    if args.only_compile:
        return compiled(chosen[0], args.only_compile, call)
    if args.compile_first:
        compile_first(chosen, args)
    here = about()
    print(f"{here['device']}, torch {here['torch']}, timm {here['timm']}; peer: {told(call.peer)}")
    every_case(chosen, call)
    call.keep()
    return verdict(call.rows())


def compile_first(cases: list[Case], args: argparse.Namespace) -> None:
    """Each way that compiles, in a process of its own; the largest first."""
    all_cases = list(TINY if args.quick else CASES)
    jobs = [(c, way) for c in cases for way in c.ways if way != EAGER and not c.photos]
    jobs.sort(key=lambda job: -gib_of(job[0]))
    running: dict[tuple[Case, str], subprocess.Popen[bytes]] = {}
    started = time.monotonic()
    while jobs or running:
        used = sum(gib_of(case) for case, _ in running)
        for case, way in list(jobs):
            if not running or used + gib_of(case) <= ROOM:
                number = str(all_cases.index(case) + 1)
                words = ["--cases", number, "--only-compile", way, *quick(args), *checkout(args)]
                running[case, way] = subprocess.Popen([sys.executable, __file__, *words])
                jobs.remove((case, way))
                used += gib_of(case)
        for job, process in list(running.items()):
            if process.poll() is not None:
                del running[job]
                told = "ready" if process.returncode == 0 else "FAILED"
                print(f"{job[0]}, {job[1]}: {told} after {time.monotonic() - started:.0f} s")
        time.sleep(0.2)


def quick(args: argparse.Namespace) -> list[str]:
    return ["--quick"] if args.quick else []


def checkout(args: argparse.Namespace) -> list[str]:
    return ["--timm", str(args.timm)] if args.timm else []


def gib_of(case: Case) -> float:
    """Memory of one way of this case while it compiles."""
    return GIB[case.name] if case.batch >= 128 else 3.0


def compiled(case: Case, way: str, call: Call) -> int:
    """One way makes one short round, for what its compiler leaves on the disk."""
    side = 32 if call.args.quick else 224
    ready = Synthetic(2, case.batch, side, call.device)
    alone = Case(case.name, case.batch, 2, (way,))
    built(alone, ready, ready, side, call)[way].round()
    return 0


def every_case(cases: list[Case], call: Call) -> None:
    """One after the other; networks stay where the next case has the same."""
    before: Case | None = None
    ways: dict[str, Any] = {}
    for case in cases:
        same = before is not None and (before.name, before.batch) == (case.name, case.batch)
        if not same:
            ways.clear()
            emptied(call.device)
        before = case
        need = 0.0 if same else sum(first_round(way, call.args) for way in case.ways)
        need *= BLOCKS.get(case.name, 1.0)
        if case.photos and call.args.photos is None:
            call.leave(f"{case}: no --photos given")
        elif call.seconds_left() < need:
            call.leave(f"{case}: {call.seconds_left():.0f} s left, about {need:.0f} s needed")
        else:
            one_case(case, ways, call)
        call.keep()


def first_round(way: str, args: argparse.Namespace) -> float:
    """Seconds, about."""
    return min(FIRST[way], CACHED) if args.compile_first or args.cached else FIRST[way]


def emptied(device: torch.device) -> None:
    """Nothing of the case before stays on the card."""
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def one_case(case: Case, ways: dict[str, Any], call: Call) -> None:
    """Of each way: images per second, losses, seconds of the first round, peak memory."""
    side = 32 if call.args.quick else 224
    try:
        theirs, ours, images = loaders(case, call.args, side, call.device)
        if ways:
            feed(ways, theirs, ours)
        else:
            ways |= built(case, theirs, ours, side, call)
    except Exception as error:  # the cases behind it are still worth their time
        call.leave(f"{case}: {_why(error)}")
        return
    seen: dict[str, dict[str, Any]] = {
        way: {"seconds": [], "loss": [], "peak": 0, "kept": kept(ways[way]), "parts": 1}
        for way in case.ways
        if way in ways
    }
    counts = {way: images[way in (OURS, GRAPHS)] for way in seen}
    table = {"case": str(case), "model": case.name, "images": counts, "ways": seen}
    call.tables.append(table)
    for number in range(call.args.rounds):
        if number >= FEWEST and call.seconds_left() < _longest_turn(seen):
            call.leave(f"{case}: rounds from {number + 1} on, no time left")
            break
        take_turns(number, case, ways, seen, call)
        call.keep()
    show(table)


def take_turns(
    number: int, case: Case, ways: dict[str, Any], seen: dict[str, dict[str, Any]], call: Call
) -> None:
    """One round of each way; a way that fails is out, and said to be."""
    turn: dict[str, tuple[float, float, int]] = {}
    for way in list(seen):
        before = _start_counting(call.device)
        try:
            seconds, loss = ways[way].round()
        except Exception as error:  # whatever a compiler or a card may raise
            call.leave(f"{case}, {way}, round {number + 1}: {_why(error)}")
            del seen[way]
            ways.pop(way)
            continue
        turn[way] = seconds, loss, _counted(call.device) - before
    for way, (seconds, loss, peak) in turn.items():
        seen[way]["seconds"].append(seconds)
        seen[way]["loss"].append(loss)
        if number:
            seen[way]["peak"] = max(seen[way]["peak"], peak)
        if isinstance(ways[way], Ours):
            seen[way]["parts"] = ways[way].trainer.state.splits


def _longest_turn(seen: dict[str, dict[str, Any]]) -> float:
    return sum(max(way["seconds"][1:], default=0.0) for way in seen.values())


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def built(case: Case, theirs: Any, ours: Any, side: int, call: Call) -> dict[str, Any]:
    """Each way with a network of its own, all of the same weights."""
    mine, other = nets(case.name, side, call.device)
    ways: dict[str, Any] = {}
    for way in case.ways:
        if way in (OURS, GRAPHS):
            compiled = "reduce-overhead" if way == GRAPHS else True
            how = False if call.args.quick else compiled
            ways[way] = Ours(mine, ours, compile=how, amp="bf16")
        else:
            compiles = way == COMPILED and not call.args.quick
            net = copy.deepcopy(other)
            ways[way] = Timm(net, theirs, script=call.peer, amp="bf16", compile=compiles)
    return ways


def feed(ways: dict[str, Any], theirs: Any, ours: Any) -> None:
    """The same networks on other batches of the same shape: nothing is compiled again."""
    for way in ways.values():
        if isinstance(way, Ours):
            way.trainer.batches = ours
        else:
            way.loader = theirs


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
        "model.weights=none",
    ]
    p = prepare.prepare(recipe.parse(text, "bench.yaml", ".", changes))
    photos = p.photos("train", augment=True, keep=True)  # as a run does
    return theirs, p.batches(photos, train=True), (len(theirs) * case.batch, len(photos))


def kept(way: Any) -> int:
    """Bytes that stay between rounds: parameters, AdamW's two moments of each, our best epoch."""
    net, copies = (way.trainer.net, 4) if isinstance(way, Ours) else (way.net, 3)
    return copies * sum(p.numel() * p.element_size() for p in net.parameters())


def _start_counting(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _counted(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def turns(table: dict[str, Any]) -> int:
    """Rounds that every way has made."""
    return min((len(seen["seconds"]) for seen in table["ways"].values()), default=0)


def speeds(table: dict[str, Any], way: str) -> list[float]:
    """Images per second of the rounds that count."""
    return [table["images"][way] / s for s in table["ways"][way]["seconds"][1:]]


def mfu(table: dict[str, Any], speed: float) -> float:
    """Percent of what the card can multiply."""
    return 100 * speed * FLOP[table["model"]] / PEAK


def gib(seen: dict[str, Any]) -> float:
    """Peak memory of a way."""
    return float(seen["peak"] + seen["kept"]) / 2**30


def show(table: dict[str, Any]) -> None:
    """One case, a line for each way, and its loss curve below."""
    print(f"\n{table['case']}")
    for way, seen in table["ways"].items():
        found = speeds(table, way)
        if not found:
            continue
        speed = statistics.median(found)
        parts = f"  in {seen['parts']} parts" if seen["parts"] > 1 else ""
        print(
            f"  {way:<20} {speed:9.1f} images/s ({min(found):.1f} to {max(found):.1f})  MFU "
            f"{mfu(table, speed):5.1f} %  peak {gib(seen):5.1f} GiB  first round "
            f"{seen['seconds'][0]:5.1f} s{parts}"
        )
        print(f"  {'':<20} loss " + " ".join(f"{loss:.4f}" for loss in seen["loss"]), flush=True)


def goals(table: dict[str, Any], peer: Any) -> list[Row]:
    """Ours: its speed and use of the card, and against each way of timm; curves of the first."""
    ours = next((way for way in (OURS, GRAPHS) if way in table["ways"]), None)
    if ours is None:
        return []
    first, what = table["case"] == str(CASES[0]), f"training {table['case']}"
    what += ", with CUDA graphs" if ours == GRAPHS else ""
    rows, mine = [], speeds(table, ours)
    for way, goal in GOALS.items():
        if way not in table["ways"]:
            continue
        ratios = [a / b for a, b in zip(mine, speeds(table, way), strict=True)]
        name = f"{what}, against {told(peer)}, {way.split()[1]}"
        spread = (min(ratios), max(ratios))
        rows.append(Row(name, statistics.median(ratios), "x", spread, goal=goal if first else None))
    speed, spread = statistics.median(mine), (min(mine), max(mine))
    rows.append(Row(what, speed, "images/s", spread, goal=GOAL_SPEED if first else None))
    rows.append(Row(f"{what}, of 989 TFLOP/s", mfu(table, speed), "%"))
    rows.append(Row(f"{what}, peak memory", gib(table["ways"][ours]), "GiB"))
    return rows + (curves(table) if first else [])


def curves(table: dict[str, Any]) -> list[Row]:
    """How far apart the losses of timm and ours are, round by round."""
    losses = [seen["loss"] for way, seen in table["ways"].items() if way in (COMPILED, OURS)]
    if len(losses) < 2:
        return []
    what = f"difference of the loss curves, {table['model']}, synthetic batches, "
    what += "relative (below 0.1 nats to that)"
    return [Row(what, gap(*losses), "", goal=GOAL_CURVE, at_most=True)]


if __name__ == "__main__":
    sys.exit(main())
