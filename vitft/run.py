"""The main door: a recipe in, a run folder with classifier, report and numbers out.

    python -m vitft.run RECIPE [key.sub=value ...]
    torchrun --standalone --nproc-per-node 4 -m vitft.run RECIPE        # one process per GPU

    result = vitft.run.run(vitft.recipe.load("recipes/flowers_head.yaml"))     # the same in Python

The folder `runs/<recipe>/<time>/` holds recipe.yaml, recipe.resolved.yaml (running it again gives
the same run), env.json, log.txt, metrics.jsonl, metrics.json, split.csv, class_indices.json,
predictions.csv, confusion_matrix.csv, report.html, checkpoints/ while training, and model/.
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, cast

from vitft import (
    console,
    data,
    evaluate,
    findings,
    io,
    keep,
    model,
    offline,
    plan,
    prepare,
    product,
    recipe,
    report,
    summary,
    writeup,
)
from vitft.card import Card
from vitft.checkpoint import Snapshot
from vitft.console import say
from vitft.errors import DivergedError, RecipeError
from vitft.evaluate import Predictions, Scores
from vitft.findings import Findings
from vitft.ladder import climb
from vitft.learn import (
    Hooks,
    Learned,
    extract,
    head_predictions,
    learn,
    predictions,
    share_features,
)
from vitft.prepare import Prepared
from vitft.ranks import ALONE, Ranks, joined
from vitft.recipe import Recipe
from vitft.train import Stopped


@dataclass(frozen=True)
class Result:
    """What a run gives to a notebook.

    Attributes:
        folder: The run's folder.
        split: The split that was scored: `test`, or `val` where there is no test.
        sentence: The last line on stdout.
    """

    folder: Path
    scores: Scores
    split: str
    predictions: Predictions
    history: tuple[dict[str, Any], ...]
    findings: Findings
    sentence: str


def run(
    spec: Recipe,
    *,
    fallback: bool = True,
    resume: str | None = None,
    resume_anyway: bool = False,
    ranks: Ranks = ALONE,
) -> Result:
    """Runs a recipe from photographs to report.

    Args:
        spec: From `vitft.recipe.load` or `parse`.
        fallback: Whether the recipe's `offline:` block may be used.
        resume: `auto` (the newest unfinished run of this recipe, or a new one where none has kept
            anything yet) or a run folder.
        resume_anyway: Go on although recipe or data have changed; recorded in `metrics.json`.
        ranks: From `vitft.ranks.joined`; a process that is not the first ends (SystemExit) when
            there is nothing left to share.

    Returns:
        Result; everything in it is also in its folder.

    Raises:
        VitftError: With every fault found, before time was spent where it could be known.
    """
    started = time.monotonic()
    base = Path(spec.output or "runs") / spec.name
    ranks.first_does(lambda: keep.require_output(base))
    if resume not in (None, "auto"):
        ranks.first_does(lambda: keep.named(Path(str(resume))))
    # what is refused here leaves no folder behind
    p = prepare.prepare(spec, fallback=fallback, ranks=ranks)
    with ExitStack() as held:
        owned = _owned(p, base, resume)
        folder, goes_on = ranks.first_does(lambda: held.enter_context(owned))
        held.enter_context(ranks.together())
        snapshot = keep.open_newest(p, folder, anyway=resume_anyway) if goes_on else None
        return _run(p, spec, folder, snapshot, started)


@contextmanager
def _owned(p: Prepared, base: Path, resume: str | None) -> Iterator[tuple[Path, bool]]:
    """The run's folder, and whether it goes on there; locked, and its log open."""
    _require_place(p, base)
    purpose = f"vitft run {p.recipe.name}"
    with ExitStack() as held:
        # else two that look at once would both find nothing under way, and both start
        with io.in_turn(base, purpose) if resume == "auto" else nullcontext():
            goes_on = _unfinished(p, base, resume)
            if goes_on is None:
                stamp = time.strftime("%Y%m%d-%H%M%S")
                names = [base / stamp, *(base / f"{stamp}-{k}" for k in range(2, 100))]
                folder = held.enter_context(io.locked_dir(names, purpose))
            else:
                held.enter_context(io.lock(goes_on, purpose))
                folder = goes_on
        console.setup(log_file=folder / "log.txt")
        held.callback(console.close_log)
        yield folder, goes_on is not None


def _run(
    p: Prepared, spec: Recipe, folder: Path, snapshot: Snapshot | None, started: float
) -> Result:
    say(f"run folder {folder}, seed {p.recipe.seed}")
    if p.ranks.first:
        _write_inputs(p, spec, folder)
    p = share_features(p)
    climb_or_learn = climb if p.recipe.mode == "ladder" else learn
    learned = climb_or_learn(p, _hooks(p, folder, snapshot))
    split = p.test_split
    answers = predict_split(p, learned, split)
    val = answers if split == "val" else predict_split(p, learned, "val")
    p = replace(p, ranks=p.ranks.alone())
    found = findings.find(p, learned, answers, val)
    scores = evaluate.score(answers, p.index.classes, found.applied)
    for line in summary.lines(scores, found.intervals, found.after or found.before):
        say(line)
    _write_product(p, learned, scores, found, folder)
    seconds = time.monotonic() - started
    changed = snapshot.changed if snapshot else ()
    _write_numbers(p, learned, scores, found, folder, seconds, changed)
    page = writeup.page(p, learned, answers, scores, found, folder, seconds)
    report.write(folder, page, csv_safe=p.recipe.report.csv_safe)
    io.remove(folder / "checkpoints")
    io.link_latest(folder)
    sentence = _sentence(scores, split, folder)
    return Result(folder, scores, split, answers, learned.history, found, sentence)


# -- the folder -----------------------------------------------------------------------------------


def _require_place(p: Prepared, base: Path) -> None:
    """Refuses what would be written among the photographs, or not fit."""
    root = offline.owned(p.recipe.data.root)  # a CSV only names files, and owns no folder
    if root.is_dir() and io.lies_in(base, root):
        text = f"the run would be written below the data, {root}"
        fix = "start it in another folder, or set output"
        raise RecipeError.of("run.below_data", base, text, fix)
    keep.require_room(p, base)


def _unfinished(p: Prepared, base: Path, resume: str | None) -> Path | None:
    """The folder that the run goes on in; None for a new one."""
    if resume is not None and resume != "auto":
        return keep.named(Path(resume))
    if resume == "auto":
        found = keep.find(p, base)
        if found is not None:
            say(f"--resume auto: going on in {found}")
            return found
        say(f"--resume auto: nothing to go on from in {base} yet, so this is a new run")
    return None


def _write_inputs(p: Prepared, spec: Recipe, folder: Path) -> None:
    """What the run starts from; `recipe.resolved.yaml` names the data and split it really used."""
    io.write_text(folder / "recipe.yaml", spec.text or recipe.dump(spec))
    io.write_text(folder / "recipe.resolved.yaml", recipe.dump(p.recipe))
    io.write_json(folder / "env.json", prepare.environment(p))
    data.write_split(p.index, folder / "split.csv")
    io.write_json(folder / "class_indices.json", data.class_indices(p.index))


def _hooks(p: Prepared, folder: Path, snapshot: Snapshot | None) -> Hooks:
    if not p.ranks.first:
        return Hooks(resume=snapshot, listen=lambda: _polite_stop(folder))
    log = folder / "metrics.jsonl"
    done = len(snapshot.numbers["history"]) if snapshot else 0
    io.trim_lines(log, lambda record: record.get("epoch", 0) <= done)
    if snapshot and snapshot.changed:
        io.append_line(log, {"resumed_at": snapshot.step, "changed": snapshot.changed})

    def on_record(record: dict[str, Any]) -> None:
        io.append_line(log, record)
        if "epoch" in record:
            say(
                f"epoch {record['epoch']}: train loss {record['train_loss']:.4f}, "
                f"val accuracy {100 * record['val_accuracy']:.1f} %"
            )

    save = keep.Keeper(folder, keep.identity(p)) if p.recipe.mode == "full" else None
    return Hooks(on_record, save, snapshot, lambda: _polite_stop(folder))


@contextmanager
def _polite_stop(folder: Path) -> Iterator[Callable[[], int | None]]:
    """The first signal is noted and obeyed after the update under way; the second ends at once."""
    asked: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)
        with suppress(RuntimeError):  # the signal came in the midst of another line
            say("stopping after this step; a second signal ends at once")

    signals = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
    wanted = [s for s in signals if signal.getsignal(s) != signal.SIG_IGN]  # nohup stays nohup
    try:
        before = {s: signal.signal(s, note) for s in wanted}
    except ValueError:  # not the main thread: a notebook's own rules hold
        yield lambda: None
        return
    try:
        yield lambda: asked[0] if asked else None
    except Stopped:
        say(keep.how_to_go_on(folder))
        raise
    except DivergedError:
        say(keep.last_good(folder))
        raise
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


# -- numbers out ----------------------------------------------------------------------------------


def predict_split(p: Prepared, learned: Learned, split: str) -> Predictions:
    """Logits of a split: through cached features where the backbone stayed frozen."""
    if learned.backbone_frozen:
        rows = learned.features.get(split) or extract(p, split)
        return head_predictions(model.classifier(p.net), rows, p.device)
    return predictions(p, p.net, split)


def _write_product(
    p: Prepared, learned: Learned, scores: Scores, found: Findings, folder: Path
) -> None:
    """The model folder, with what predict needs besides the weights."""
    tables = {} if found.foreign is None else found.foreign.tensors()
    card = make_card(p, learned, scores, found)
    product.save(
        p.net, folder / "model", card, p.config, as_timm=p.recipe.export.as_timm, tables=tables
    )


def make_card(p: Prepared, learned: Learned, scores: Scores, found: Findings) -> Card:
    """The product's self-description."""
    options = dict(cast(Any, p.net)._model_args)  # what timm's factory recorded for its exports
    options.pop("num_classes", None)
    extras: dict[str, Any] = {}
    if found.temperature is not None:
        extras["temperature"] = asdict(found.temperature)
    if found.abstain is not None:  # a threshold that accepts nothing is infinite, JSON is not
        extras["abstain"] = asdict(found.abstain) | {"threshold": min(found.abstain.threshold, 2.0)}
    return Card(
        architecture=p.recipe.model.name,
        classes=p.index.classes,
        options=options,
        transform=asdict(p.plain_transform),
        decode=asdict(p.decode),
        temperature=found.temperature.value if found.temperature else None,
        recipe=recipe.dump(p.recipe),
        seed=p.recipe.seed,
        versions=prepare.environment(p)["versions"],
        hashes={"data": prepare.data_hash(p.index), "weights": p.report.sha256},
        metrics={"split": p.test_split, **_headline(scores, found)},
        extras=extras,
        precision="bfloat16" if p.half else "float32",
        head_precision="float32" if learned.backbone_frozen else "auto",
    )


def _headline(scores: Scores, found: Findings) -> dict[str, Any]:
    return summary.headline(scores, found.intervals, found.after or found.before)


def _write_numbers(
    p: Prepared,
    learned: Learned,
    scores: Scores,
    found: Findings,
    folder: Path,
    seconds: float,
    changed: tuple[str, ...],
) -> None:
    io.write_json(
        folder / "metrics.json",
        {
            "recipe": p.recipe.name,
            "mode": p.recipe.mode,
            p.test_split: _headline(scores, found)
            | {"per_class": [asdict(c) for c in scores.per_class]}
            | {"confusion_matrix": scores.confusion.tolist()},
            "trust": found.as_dict(),
            "best": learned.best,
            "trained": learned.trained,
            "probe_start": learned.probe_start,
            "ladder": list(learned.rungs),
            "backbone_frozen": learned.backbone_frozen,
            "warnings": list(p.warnings),
            "changed_before_resuming": list(changed),
            "ledger": p.index.ledger.as_dict(),
            "data_sha256": prepare.data_hash(p.index),
            "weights": asdict(p.report),
            "seconds": seconds,
        },
    )
    if found.doubted is not None:
        rows = found.doubted.fixes(p.index.paths, p.index.sha256, p.index.classes)
        io.write_csv(folder / "fixes.csv", ("path", "action", "label", "sha256"), rows)


def _sentence(scores: Scores, split: str, folder: Path) -> str:
    return (
        f"{split} accuracy {100 * scores.accuracy:.1f} % {scores.accuracy_interval.percent()} "
        f"(n={scores.n:,}) · report: {folder / 'report.html'} · model: {folder / 'model'}"
    )


# -- the command line -----------------------------------------------------------------------------


EPILOG = """several GPUs of one machine, and several machines under Slurm (one torchrun on each):
  torchrun --standalone --nproc-per-node 4 -m vitft.run RECIPE

  #SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=4 --signal=TERM@120 --requeue
  host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  srun torchrun --nnodes 2 --nproc-per-node 4 --rdzv-id "$SLURM_JOB_ID" \\
    --rdzv-backend c10d --rdzv-endpoint "$host:29500" \\
    -m vitft.run RECIPE --resume auto      # starts, and after a requeue goes on

  train.batch_size is that of all processes together, so a recipe gives the same result on any
  number of them, but for rounding, and for dropout and drop path, which draw per process.
  Photographs, weights and output lie on disks that all machines see; so should the cache
  (VITFT_CACHE), or each machine computes features of its own, and reads through shards on servers
  by itself. Batch normalisation is joined over processes (CUDA only). Probes, heads on kept
  features and ladders share the features; the rest is the first process's. A signal to torchrun
  saves a checkpoint, for which it gives 30 s; the same command with --resume auto goes on from
  it, starts where nothing was kept yet, and refuses a run that is finished or under way. torchrun
  itself ends with 1, whatever its processes end with.

example:
  python -m vitft.run recipes/flowers_head.yaml data.root=photos/ seed=1
"""


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m vitft.run`."""
    p = argparse.ArgumentParser(
        prog="vitft run",
        description="Trains a classifier as a recipe says, and reports how good it is.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML recipe")
    p.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the recipe")
    p.add_argument("--plan", action="store_true", help="check everything, measure, then stop")
    p.add_argument("--print-config", action="store_true", help="show every key and stop")
    p.add_argument("--no-fallback", action="store_true", help="never use the offline block")
    p.add_argument(
        "--resume", metavar="auto|FOLDER", help="go on with an unfinished run; auto: or start one"
    )
    p.add_argument("--resume-anyway", action="store_true", help="although recipe or data changed")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; results go to stdout, all else to stderr."""
    with joined() as ranks:
        if not ranks.first:
            console.silence()
        return _main(argv, ranks)


def _main(argv: Sequence[str] | None, ranks: Ranks) -> int:
    args = ranks.first_does(lambda: parser().parse_intermixed_args(argv))
    spec = ranks.first_does(lambda: recipe.load(args.recipe, args.overrides))
    if args.print_config or args.plan:
        ranks = ranks.alone()
    if args.print_config:
        print(recipe.dump(spec, explain=True), end="")  # noqa: T201
        return 0
    if ranks.first:
        console.setup()
    if args.plan:
        print(plan.plan(prepare.prepare(spec, fallback=not args.no_fallback)))  # noqa: T201
        return 0
    result = run(
        spec,
        fallback=not args.no_fallback,
        resume=args.resume,
        resume_anyway=args.resume_anyway,
        ranks=ranks,
    )
    print(result.sentence)  # noqa: T201
    return 0


if __name__ == "__main__":
    from vitft.cli import door

    sys.exit(door(main))
