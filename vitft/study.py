"""A study: one recipe changed in one respect at a time, over seeds, with what can be concluded.

    python -m vitft.study recipes/studies/position.yaml [key=value ...] [--full] [--output DIR]

A study file names a base recipe, its arms (changes as on the command line), shares of the training
photographs, and seeds. All runs share one split, so that they are compared photograph by
photograph; smaller shares lie inside larger ones. Finished runs are found again, so that a study
goes on where it was stopped. Out come study.html with one plot, and study.csv.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field, Strict, ValidationError

from vitft import compare, console, io, pages, prepare, recipe, run, strict_yaml, trials
from vitft.assign import COLUMNS
from vitft.charts import Chart, Series
from vitft.console import say
from vitft.draft import key_of
from vitft.errors import RecipeError, escape
from vitft.folders import instead
from vitft.kinds import Section, Seed, Text
from vitft.recipe import Recipe
from vitft.table import read_table
from vitft.trials import Contrast, Mean

QUIET = (  # what a study does not look at
    "trust.suspects=false", "trust.audit=false", "trust.learning_curve=false",
    "trust.head_seeds=0", "trust.bootstrap=50", "report.gallery=0", "report.max_images=0",
)  # fmt: skip
Change = Annotated[str, Strict(), Field(pattern=r"^[\w.]+=")]
Share = Annotated[float, Strict(), Field(gt=0, le=1, allow_inf_nan=False)]


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """A run told twice would be counted as two that agree."""
    if len(set(values)) < len(values):
        raise ValueError("names one of them twice")
    return values


Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_each_once)]
Shares = Annotated[tuple[Share, ...], Field(min_length=1), AfterValidator(_each_once)]


class Plan(Section):
    """What a study file says."""

    question: Text
    base: Text
    arms: dict[Text, tuple[Change, ...]] = Field(min_length=2, max_length=6)
    shares: Shares = (1.0,)
    seeds: Seeds = (0, 1, 2)
    changes: tuple[Change, ...] = ()
    full: "Full | None" = None


class Full(Section):
    """What `--full` changes: another size of the same study, for a GPU."""

    arms: dict[Text, tuple[Change, ...]] | None = Field(default=None, min_length=2, max_length=6)
    shares: Shares | None = None
    seeds: Seeds | None = None
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Trial:
    """One run of a study, to make or made."""

    arm: str
    share: float
    seed: int
    spec: Recipe


@dataclass(frozen=True, eq=False)
class Outcome:
    """A trial's run: its test photographs in the order of their hashes, and its epochs.

    Attributes:
        right: [N] bool.
        curve: Accuracy on val after each epoch; empty where none were counted.
        trained: Photographs trained on.
        seconds: Of the run.
    """

    trial: Trial
    run: compare.Run
    right: np.ndarray
    curve: tuple[float, ...]
    trained: int
    seconds: float


# --- the plan ------------------------------------------------------------------------------------


def load(path: Path, *, full: bool = False) -> Plan:
    """Reads a study file.

    Raises:
        RecipeError: `study.file`, with every fault; `study.no_full`.
    """
    try:
        document = strict_yaml.read(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        near = None if os.path.lexists(path) else instead(path)[1]  # noqa: PTH110
        fix = f"did you mean {near}?" if near else "name a study of recipes/studies/"
        text = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise RecipeError.of("study.file", path, text, fix) from None
    problems = [f"line {p.line}: {p.text}" for p in document.problems]
    try:
        plan = Plan.model_validate(document.value) if not problems else None
    except ValidationError as error:
        told = error.errors(include_url=False)
        problems = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in told]
    if problems or plan is None:
        fix = "write question, base, arms, shares, seeds, changes and full as in recipes/studies/"
        raise RecipeError.of("study.file", path, "; ".join(problems), fix)
    if not full:
        return plan
    if plan.full is None:
        raise RecipeError.of("study.no_full", path, "has no part full", "leave --full out")
    larger = {k: v for k, v in plan.full.model_dump().items() if v is not None}
    larger["changes"] = (*plan.changes, *plan.full.changes)
    return plan.model_copy(update=larger | {"full": None})


def base_recipe(plan: Plan, path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The base with the study's changes and the user's, of which the user's count last."""
    said = {key_of(change) for change in overrides}
    ours = [change for change in lasting(plan.changes) if key_of(change) not in said]
    return recipe.load(path.parent / plan.base, [*ours, *overrides])


def lasting(changes: Sequence[str]) -> list[str]:
    """Of several for one key the last."""
    last = {key_of(change): n for n, change in enumerate(changes)}
    return [change for n, change in enumerate(changes) if last[key_of(change)] == n]


def trials_of(
    plan: Plan, path: Path, folder: Path, splits: Mapping[float, Path], overrides: Sequence[str]
) -> list[Trial]:
    """Every run, each with its whole recipe checked, cheapest first.

    Raises:
        RecipeError: An arm's recipe has a fault.
    """
    made = []
    for share in sorted(plan.shares):
        for seed in plan.seeds:
            for arm, changes in plan.arms.items():
                name = re.sub(r"[^\w.-]+", "_", f"{arm}-{share:g}-{seed}").strip("_.-")
                own = (f"name={name}", f"seed={seed}", f"output={folder / 'runs'}",
                       f"data.split={splits[share]}")  # fmt: skip
                every = lasting([*plan.changes, *changes, *QUIET, *overrides, *own])
                made.append(Trial(arm, share, seed, recipe.load(path.parent / plan.base, every)))
    return made


def write_splits(base: Recipe, shares: Sequence[float], folder: Path) -> dict[float, Path]:
    """One split.csv for each share, with the same photographs to choose and test on.

    Args:
        base: Whose data and seed decide the split.
        shares: Of each class's training photographs, at least one of each.
        folder: Where they go.
    """
    index = prepare.scan(base)
    rank = {i: sha256(f"study {index.sha256[i]}".encode()).hexdigest() for i in index.rows("train")}
    out = {}
    for share in shares:
        left_out: set[int] = set()
        for label in range(len(index.classes)):
            rows = sorted((i for i in rank if index.labels[i] == label), key=rank.__getitem__)
            left_out |= set(rows[math.ceil(share * len(rows)) :])
        rows_kept = [i for i in range(len(index.paths)) if i not in left_out]
        out[share] = folder / f"split-{share:g}.csv"
        names = [index.classes[k] for k in index.labels]
        columns = (index.paths, index.sha256, names, index.split, index.group)
        io.write_csv(out[share], COLUMNS, ([c[i] for c in columns] for i in rows_kept))
    return out


# --- the runs ------------------------------------------------------------------------------------


def carry_out(made: Sequence[Trial]) -> list[Outcome]:
    """Runs what has not been run, and reads everything; each run tells its warnings and a line."""
    out = []
    for k, trial in enumerate(made, 1):
        folder = _finished(trial)
        say(f"study: run {k} of {len(made)}, {trial.spec.name}" + (" is there" if folder else ""))
        if folder is None:
            with console.hushed():
                result = run.run(trial.spec)
            folder = result.folder
            say(f"study: {result.sentence.partition(' · ')[0]}")
        out.append(_read(trial, folder))
    return out


def _finished(trial: Trial) -> Path | None:
    """A finished run of the very same recipe on the very same photographs."""
    wanted, split = recipe.dump(trial.spec), _photographs(Path(str(trial.spec.data.split)))
    for folder in sorted((Path(str(trial.spec.output)) / trial.spec.name).glob("2*"), reverse=True):
        said = folder / "recipe.resolved.yaml"
        whole = (folder / "metrics.json").is_file() and said.read_text("utf-8") == wanted
        if whole and _photographs(folder / "split.csv") == split:
            return folder
    return None


def _photographs(split: Path) -> set[tuple[str, ...]]:
    columns = ("path", "sha256", "label", "split")
    return {tuple(row.get(c) for c in columns) for row in read_table(split, required=columns)}


def _read(trial: Trial, folder: Path) -> Outcome:
    made = compare.read_run(folder, "A")
    records = io.read_lines(folder / "metrics.jsonl")
    curve = tuple(float(r["val_accuracy"]) for r in records if "epoch" in r)
    seconds = float(json.loads((folder / "metrics.json").read_text("utf-8"))["seconds"])
    return Outcome(trial, made, made.right, curve, len(made.trained), seconds)


# --- what follows --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Findings:
    """Means of every arm at every share, and the pairs at the largest share."""

    question: str
    arms: tuple[str, ...]
    sizes: tuple[int, ...]  # photographs trained on, one for each share
    means: dict[tuple[str, int], Mean]
    pairs: tuple[Contrast, ...]
    curves: dict[str, np.ndarray]  # arm -> [S, E] accuracy on val
    outcomes: tuple[Outcome, ...]


def conclude(plan: Plan, outcomes: Sequence[Outcome]) -> Findings:
    """Gathers the runs."""
    sizes = {o.trial.share: o.trained for o in outcomes}
    largest = max(sizes)
    right = {(o.trial.arm, o.trial.share, o.trial.seed): o.right for o in outcomes}
    stacked = {
        (arm, share): np.stack([right[arm, share, seed] for seed in plan.seeds])
        for arm in plan.arms for share in sizes
    }  # fmt: skip
    curves = {arm: _curves(arm, largest, outcomes) for arm in plan.arms}
    return Findings(
        question=plan.question,
        arms=tuple(plan.arms),
        sizes=tuple(sizes[s] for s in sorted(sizes)),
        means={(arm, sizes[share]): trials.mean(v) for (arm, share), v in stacked.items()},
        pairs=trials.contrasts({arm: stacked[arm, largest] for arm in plan.arms}),
        curves={arm: c for arm, c in curves.items() if c.size},
        outcomes=tuple(outcomes),
    )


def _curves(arm: str, share: float, outcomes: Sequence[Outcome]) -> np.ndarray:
    found = [o.curve for o in outcomes if (o.trial.arm, o.trial.share) == (arm, share)]
    epochs = min(map(len, found))
    return np.array([c[:epochs] for c in found])


def chart(found: Findings) -> Chart:
    """Accuracy against training photographs; with one amount, accuracy on val against epochs."""
    of = found.outcomes[0].run
    if len(found.sizes) > 1:
        series = tuple(_by_size(found, arm) for arm in found.arms)
        caption = f"Mean over seeds; bands are 95 % intervals over {_over(found)}."
        return Chart("Accuracy by amount of data", series, x_label="training photographs",
                     y_label=f"accuracy on {of.split}", x_log=True, percent=True,
                     caption=caption)  # fmt: skip
    series = tuple(_by_epoch(arm, curve) for arm, curve in found.curves.items())
    caption = "Mean over seeds; bands reach from the worst to the best seed."
    return Chart("Accuracy while training", series, x_label="epoch", y_label="accuracy on val",
                 percent=True, caption=caption)  # fmt: skip


def _over(found: Findings) -> str:
    """What the intervals take into account."""
    return "seeds and photographs" if found.pairs[0].difference.seeds > 1 else "photographs alone"


def _by_size(found: Findings, arm: str) -> Series:
    means = [found.means[arm, n] for n in found.sizes]
    low = [max(0.0, m.interval.low) for m in means]
    high = [min(1.0, m.interval.high) for m in means]
    return Series(arm, [m.estimate for m in means], [float(n) for n in found.sizes], low, high)


def _by_epoch(arm: str, curve: np.ndarray) -> Series:
    x = [float(k) for k in range(1, curve.shape[1] + 1)]
    return Series(arm, list(curve.mean(0)), x, list(curve.min(0)), list(curve.max(0)))


def sentences(found: Findings) -> list[str]:
    """The answer, one line for each pair, and what limits it."""
    seeds = found.pairs[0].difference.seeds
    lines = [pair.sentence() for pair in found.pairs]
    if len(lines) > 1:
        lines.append(f"p is adjusted for {len(lines)} comparisons (Holm); intervals are not")
    if seeds == 1:
        lines.append("one seed: how much of this is its luck was not measured")
    if found.outcomes[0].run.split != "test":
        lines.append(compare.ON_VAL)
    return lines


def page(found: Findings) -> str:
    """study.html."""
    rows = []
    for arm in found.arms:
        for n in found.sizes:
            m = found.means[arm, n]
            cell = pages.Share(m.estimate, max(0.0, m.interval.low), min(1.0, m.interval.high))
            rows.append((arm, n, cell, m.seeds, _minutes(found, arm, n)))
    header = ("arm", "training photographs", "accuracy", "seeds", "minutes per run")
    of = found.outcomes[0].run
    caption = f"{len(of.labels):,} {of.split} photographs; 95 % intervals over {_over(found)}"
    answer = pages.Section(
        "answer", "Answer", folded=False,
        blocks=(pages.Bullets(tuple(sentences(found))), pages.Figure((chart(found),)),
                pages.Table(header, tuple(rows), caption)),
    )  # fmt: skip
    return pages.render(found.question, (answer,), subtitle="vitft study")


def _minutes(found: Findings, arm: str, n: int) -> str:
    took = [o.seconds for o in found.outcomes if (o.trial.arm, o.trained) == (arm, n)]
    return f"{float(np.mean(took)) / 60:.1f}"


def table(found: Findings) -> Iterator[tuple[object, ...]]:
    """study.csv below its header."""
    for o in found.outcomes:
        t = o.trial
        loss = f"{o.run.losses.mean():.6f}"
        accuracy = f"{o.right.mean():.6f}"
        yield (t.arm, t.share, o.trained, t.seed, accuracy, loss, f"{o.seconds:.1f}", o.run.folder)


# --- door ----------------------------------------------------------------------------------------


def study(
    path: Path, folder: Path, overrides: Sequence[str] = (), *, full: bool = False
) -> Findings:
    """Carries a study out and writes study.html and study.csv.

    Args:
        path: The study file.
        folder: For splits, runs and results.
        overrides: Changes of every arm, such as data.root=photos/.
        full: The study's larger form.

    Raises:
        RecipeError: `cli.out_in_data`: the folder lies below the data.
        VitftError: Whatever else is wrong with study, recipes, data or machine.
    """
    plan = load(path, full=full)
    base = base_recipe(plan, path, overrides)
    io.require_outside(folder, [Path(base.data.root)])
    io.make_dir(folder)
    splits = write_splits(base, plan.shares, folder)
    found = conclude(plan, carry_out(trials_of(plan, path, folder, splits, overrides)))
    columns = ("arm", "share", "trained", "seed", "accuracy", "log_loss", "seconds", "run")
    io.write_csv(folder / "study.csv", columns, table(found))
    io.write_text(folder / "study.html", page(found))
    return found


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m vitft.study`."""
    p = argparse.ArgumentParser(
        prog="vitft study",
        description="Trains variants over seeds, says which differ.",
        epilog="example: python -m vitft.study recipes/studies/position.yaml data.root=photos/",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("study", type=Path, metavar="STUDY", help="recipes/studies/NAME.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="changes of every arm")
    p.add_argument("--full", action="store_true", help="the study's larger form, for a GPU")
    p.add_argument("--output", type=Path, metavar="DIR", help="default: runs/study-NAME")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the answer goes to stdout."""
    args = parser().parse_intermixed_args(argv)
    console.setup()
    name = args.study.stem + ("-full" if args.full else "")
    folder = (args.output or Path("runs") / f"study-{name}").absolute()
    found = study(args.study, folder, args.overrides, full=args.full)
    for line in sentences(found):
        print(escape(line))  # noqa: T201
    say(f"page: {folder / 'study.html'}")
    return 0


if __name__ == "__main__":
    from vitft.cli import door

    sys.exit(door(main))
