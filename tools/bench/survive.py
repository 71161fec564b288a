"""What vitft survives, in figures: kills, crash points, bad inputs, mutations, resumes.

    python tools/bench/survive.py [--quick] [--only PART ...] [--json FILE]

It runs the long forms of the tests, through the functions they are made of, and prints a table. The
whole takes about half an hour on two cores; `--quick` takes under a minute on an idle machine and
says less. `--only` measures some parts again: in FILE they replace the earlier ones, and every part
keeps the date and commit it was measured at. Exit code 1 if any figure misses its goal.
"""

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from machine import about

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
QUICK_FILES = ("test_recipe", "test_layout_rows", "test_images", "test_weights")
SLOW_ROWS = ("_D13_", "_C13_")  # ten seconds each
MEMORY_GOAL = 300  # MB above base


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    what: str
    figure: str
    goal: str
    met: bool
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  # what measuring it took
    where: dict[str, Any] = field(default_factory=dict)  # date, commit, machine


def test(name: str) -> Any:
    """A module of the tests, with the functions that its tests are made of."""
    return importlib.import_module(name)


# -- the parts ------------------------------------------------------------------------------------


def kills(folder: Path, quick: bool) -> Figure:
    """kill -9 at random moments: of one artefact's writer over and over, and of whole runs."""
    faults, each = test("test_faults"), 4 if quick else 200
    counts: dict[str, Any] = {}
    for artefact in faults.SAVED:
        (folder / artefact).mkdir()
        counts[artefact] = faults.kill(artefact, folder / artefact, each, 0.08 if quick else 0.25)
    bad = ("unreadable", "lost", "mixed", "left_for_good")
    harmed = sum(count[k] for count in counts.values() for k in bad)
    met = sum(count["kills"] for count in counts.values())
    if not quick:
        counts["feature cache"], counts["whole run"] = _store_kills(folder), _run_kills(folder)
        met += counts["feature cache"] + counts["whole run"]
    text = f"{met - harmed} of {met} ({len(counts)} artefacts)"
    return Figure("kills survived", text, "all", harmed == 0, counts)


def _store_kills(folder: Path) -> int:
    test("test_features").test_a_killed_run_keeps_every_row_it_acknowledged(folder / "store", 200)
    return 200


def _run_kills(folder: Path) -> int:
    """Runs killed over and over until they end as an undisturbed one does, bit for bit."""
    signals = test("test_signals")
    (folder / "runs").mkdir()
    runs, total = signals.Runs(folder / "runs"), 0
    undisturbed = runs.finish("undisturbed")
    for k in range(5):
        total += signals.kill_and_compare(runs, undisturbed, seed=k, kills=4)
    runs.close()
    return total


def crashes(folder: Path, quick: bool) -> Figure:
    """A crash at file events, one by one, before, torn, unsynced and by SIGTERM."""
    tried, verdicts = test("test_faults").chaos(folder, 4 if quick else 10_000)
    passed = verdicts.get("PASS", 0)
    text = f"{passed} of {tried}" + (" (a sample)" if quick else " (every file event, 4 modes)")
    return Figure("crash points passed", text, "all", passed == tried, verdicts)


def rows(folder: Path, quick: bool) -> Figure:
    """Every row of the bad-input matrix: refused or handled as its tests demand."""
    tests: dict[str, list[str]] = test("test_rows").rows_tested(nightly=False)
    if quick:
        kept = {row: names[0] for row, names in tests.items() if _is_quick(names[0])}
        tests = {row: [name] for row, name in kept.items()}
    results = _outcomes(folder, sorted({name for names in tests.values() for name in names}))
    handled = [row for row, names in tests.items() if all(results.get(n, False) for n in names)]
    failed = sorted(set(tests) - set(handled))
    text = f"{len(handled)} of {len(tests)}" + (" (156 in the long form)" if quick else "")
    return Figure("bad inputs handled", text, "all", not failed, {"failed": failed})


def _is_quick(name: str) -> bool:
    return name.startswith(QUICK_FILES) and not any(row in name for row in SLOW_ROWS)


def _outcomes(folder: Path, names: list[str]) -> dict[str, bool]:
    """Test -> whether all its cases passed and one of them ran at all."""
    report = folder / "rows.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    subprocess.run(
        [*command, *(f"tests/{name}" for name in names)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    cases: dict[str, list[bool | None]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.attrib['classname'].rpartition('.')[2]}.py::{case.attrib['name']}"
        kinds = {child.tag for child in case}
        passed = None if "skipped" in kinds else not kinds & {"failure", "error"}
        cases.setdefault(name.partition("[")[0], []).append(passed)
    return {k: False not in v and any(p is True for p in v) for k, v in cases.items()}


def fuzz(folder: Path, quick: bool) -> Figure:
    """Mutated images, weights, Cards, sealed folders, shards, recipes, tables, logs."""
    pictures, weights = test("test_fuzz_images"), test("test_fuzz_checkpoints")
    texts, count = test("test_fuzz_texts"), 100 if quick else 2000
    made = weights.make_product(folder / "made")
    corpus = weights.make_corpus(folder)
    few = 300  # the least that shows every kind of damage
    cases: dict[str, Callable[[Path], object]] = {
        "weights": lambda home: weights.fuzz_weights(corpus, home, count, "weights"),
        "cards": lambda home: weights.fuzz_cards(made, home, count, "cards"),
        "products": lambda home: weights.fuzz_products(home, count),
        "checkpoints": lambda home: weights.fuzz_checkpoints(home, count),
        "shards": lambda home: weights.fuzz_shards(home, count, "shards"),
    }
    for kind in texts.READERS:
        cases[kind] = partial(_fuzz_text, texts, kind, count)
    for k in range(1 if quick else 10):
        cases[f"images {k}"] = partial(_fuzz_images, pictures, max(count, few), f"long {k}")
    failed = {}
    for name, work in cases.items():
        home = folder / name.replace(" ", "_")
        home.mkdir()
        try:
            work(home)
        except AssertionError as error:
            failed[name] = str(error)
    sizes = {name: max(count, few) if "images" in name else count for name in cases}
    passed = sum(size for name, size in sizes.items() if name not in failed)
    text = f"{passed:,} of {sum(sizes.values()):,} cases"
    return Figure("mutations without a foreign exception", text, "all", not failed, failed)


def _fuzz_text(texts: Any, kind: str, count: int, home: Path) -> None:
    texts.fuzz(kind, home, count, kind)


def _fuzz_images(pictures: Any, count: int, seed: str, home: Path) -> None:
    pictures.fuzz(pictures.make_corpus(), count, seed)


def resumes(folder: Path, quick: bool) -> Figure:
    """A stop after every step of the loop, and in the long form of a whole run."""
    loop = test("test_train").test_resume_after_any_step_is_bit_equal
    tried = equal = 0
    for accumulate in (1,) if quick else (1, 2):
        for step in range(1, 18):
            home = folder / f"{accumulate}-{step}"
            home.mkdir()
            tried, equal = tried + 1, equal + _passes(lambda: loop(home, step, accumulate))  # noqa: B023
    if not quick:
        whole = _whole_runs(folder)
        tried, equal = tried + len(whole), equal + sum(whole)
    text = f"{equal} of {tried} steps bit-equal"
    return Figure("resume equality (CPU)", text, "all", equal == tried)


def _passes(work: Callable[[], object]) -> bool:
    try:
        work()
    except AssertionError:
        return False
    return True


def _whole_runs(folder: Path) -> list[bool]:
    """A run with mixup, EMA and drop path, stopped after each of its updates and resumed."""
    signals = test("test_signals")
    home = folder / "whole"
    home.mkdir()
    runs = signals.Runs(home)
    undisturbed = runs.finish("undisturbed")
    results = []
    for step in range(1, 12):
        process = runs.start(f"at{step}", stop_after=step)
        process.wait()
        again = runs.start(f"at{step}", "--resume", "auto")
        same = again.wait() == 0 and _passes(
            lambda: signals.assert_equal_runs(undisturbed, again.folder())  # noqa: B023
        )
        results.append(same)
    runs.close()
    return results


def decoding(folder: Path, quick: bool) -> Figure:
    """The guarded decoder against plain Pillow."""
    out = folder / "decode.json"
    more = ["--quick"] if quick else []
    command = [sys.executable, str(ROOT / "tools/bench/decode.py"), "--json", str(out), *more]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    found = json.loads(out.read_text())["details"]
    met = found["overhead"] <= found["goal"]
    return Figure(
        "decode overhead", f"{found['overhead']:+.1%}", f"{found['goal']:+.0%} at most", met, found
    )


def memory(folder: Path, quick: bool) -> Figure:
    """Bombs, slivers, giants: what the worst of them costs."""
    costs = test("test_images").cost_of_the_bad_set(folder)
    peak = max(cost[2] for cost in costs.values())
    text = f"{peak:.0f} MB above base, {max(cost[1] for cost in costs.values()):.1f} s at most"
    return Figure(
        "peak memory over the bad set", text, f"{MEMORY_GOAL} MB", peak < MEMORY_GOAL, costs
    )


PARTS: dict[str, Callable[[Path, bool], Figure]] = {
    "decoding": decoding,
    "memory": memory,
    "kills": kills,
    "crashes": crashes,
    "rows": rows,
    "fuzz": fuzz,
    "resumes": resumes,
}


# -- the table ------------------------------------------------------------------------------------


def show(figures: dict[str, Figure]) -> None:
    print("| what | figure | goal | | date, commit |")
    print("|---|---|---|---|---|")
    for f in figures.values():
        met, form = "met" if f.met else "**missed**", ", quick" if f.where["quick"] else ""
        when = f"{f.where['date']}, {f.where['commit']}{form}"
        print(f"| {f.what} | {f.figure} | {f.goal} | {met} | {when} |")
    print(f"\n{about()['processor']}, {os.cpu_count()} cores")


def measure(part: str, home: Path, quick: bool) -> Figure:
    folder = home / part
    folder.mkdir()
    where, started = about() | {"quick": quick}, time.monotonic()
    figure = PARTS[part](folder, quick)
    seconds = round(time.monotonic() - started, 1)
    print(f"{figure.what}: {figure.figure} ({seconds:.0f} s)", file=sys.stderr, flush=True)
    return replace(figure, seconds=seconds, where=where)


def load(path: Path | None) -> dict[str, Figure]:
    """The parts of an earlier file."""
    if path is None or not path.exists():
        return {}
    parts = json.loads(path.read_text("utf-8"))["parts"]
    return {part: Figure(**parts[part]) for part in PARTS if part in parts}


def save(path: Path, figures: dict[str, Figure]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {part: asdict(figures[part]) for part in PARTS if part in figures}
    text = json.dumps({"about": about(), "parts": parts}, indent=1, default=str)
    path.write_text(text + "\n", "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a sample of each, under 60 s")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="measured parts replace its own")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(TESTS)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("vitft").setLevel(logging.ERROR)  # what damaged files make it say
    figures, path = load(args.json), args.json and args.json.resolve()
    with tempfile.TemporaryDirectory(prefix="survive-") as name:
        os.environ["VITFT_CACHE"] = str(Path(name, "cache"))
        for part in args.only:
            figures[part] = measure(part, Path(name), args.quick)
            if path:  # part by part: a break costs one
                save(path, figures)
    show(figures)
    return 0 if all(figure.met for figure in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
