"""Signals and kills of whole runs, as real processes: what they end with, keep, and leave behind.

A killed run that is resumed must end with the bits of an undisturbed one.
"""

import random
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import paint
from rows import contents
from runs import Process, Runs, assert_equal_runs

from vitft import io

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks processes up in /proc"),
    pytest.mark.timeout(900),  # of a machine that is busy with other things
]


Start = Callable[..., list[Process]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("signals"))
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def undisturbed(runs) -> Path:
    return runs.finish("undisturbed")


def resume_command(process: Process) -> list[str]:
    """What a stopped run tells its reader to type, without `python -m vitft.run`."""
    (line,) = re.findall(r"^stopped; go on with: (.*)$", process.said(), re.MULTILINE)
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "vitft.run"]
    return words[3:]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 143)])
def test_X6_X7_X26_a_signal_saves_says_how_to_go_on_and_the_rest_is_bit_equal(
    runs, undisturbed, name, code
):
    process = runs.start(name, pace=0.02)
    process.until("update 4\n")
    process.send(getattr(signal, name))
    assert process.wait() == code
    said = process.said()
    assert "stopping after this step; a second signal ends at once" in said
    assert "Traceback" not in said
    assert said.splitlines()[-1] == f"stopped by {'Ctrl-C' if name == 'SIGINT' else name}" or (
        said.splitlines()[-1] == f"stopped by {name}"
    )
    folder = process.folder()
    assert not (folder / "model").exists()
    assert not (folder / io.LOCK).exists()
    process.leaves_nothing(0)
    again = runs.command(resume_command(process), process.output)
    assert again.wait() == 0, again.said()
    assert "resumed from step " in again.said()
    assert_equal_runs(undisturbed, folder)


def test_X7_a_second_ctrl_c_ends_at_once_and_costs_one_step(runs, undisturbed):
    process = runs.start("twice", pace=10.0)
    process.until("update 2\n")
    process.send(signal.SIGINT)
    process.until("stopping after this step")
    started = time.monotonic()
    process.send(signal.SIGINT)
    assert process.wait(8) == 130
    assert time.monotonic() - started < 8
    folder = process.folder()
    again = runs.start("twice", "--resume", "auto")
    assert again.wait() == 0, again.said()
    assert_equal_runs(undisturbed, folder)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_X6_X7_a_signal_to_the_whole_group_leaves_no_worker_and_no_shared_memory(
    runs, undisturbed, name, code
):
    process = runs.start(f"group{name}", "train.workers=2", pace=0.05)
    process.until("update 3\n")
    process.send(getattr(signal, name), group=True)
    assert process.wait() == code, process.said()
    assert "Traceback" not in process.said()
    process.leaves_nothing(10)
    again = runs.command(resume_command(process), process.output)
    assert again.wait() == 0, again.said()
    assert_equal_runs(undisturbed, process.folder())


def test_X7_ctrl_c_before_training_ends_at_once_and_keeps_the_features(runs):
    process = runs.start("features", "head.views=60", mode="head")
    process.until("run folder ")
    process.send(signal.SIGINT)
    assert process.wait(60) == 130
    assert process.said().endswith("stopped by Ctrl-C\n")
    assert "Traceback" not in process.said()
    process.leaves_nothing(0)


def test_X26_a_reader_that_has_gone_costs_the_last_line_and_nothing_else(runs, undisturbed):
    process = runs.start("gone", hang_up=True)
    assert process.wait() == 141
    assert_equal_runs(undisturbed, process.folder())
    assert (process.folder() / "report.html").exists()


KINDS = {
    "all parameters": [],
    "kept activations": ["train.mixup=0", "train.blocks=1", "train.views=2"],
    "balanced sampling": ["train.sampling=balanced", "train.accumulate=2"],
}


def kill_and_resume(runs: Runs, start: Start, name: str, dice: random.Random, kills: int) -> Path:
    """Kills a run at random moments until so many kills were met; the folder it then ends in."""
    met, longest = 0, 1.0
    while True:
        resumable = list((runs.home / name).glob("*/2*/checkpoints/step-*"))
        processes = start(name, *(["--resume", "auto"] if resumable else []))
        if met == kills:
            assert [p.wait() for p in processes] == [0] * len(processes), processes[0].said()
            return processes[0].folder()
        processes[0].until("run folder ")
        time.sleep(dice.uniform(0, longest))
        dice.choice(processes).send(signal.SIGKILL)
        codes = [p.wait() for p in processes]
        done = any((runs.home / name).glob("*/2*/report.html"))
        if -signal.SIGKILL in codes and not done:
            met += 1
        else:  # it was done before: kill the next one earlier
            assert done
            longest /= 2
            io.remove(runs.home / name)
        for process in processes:
            process.leaves_nothing(30)


def kill_and_compare(runs: Runs, undisturbed: Path, seed: int, kills: int) -> int:
    """Kills met by one run that then ended as the undisturbed one did."""

    def start(name: str, *more: str) -> list[Process]:
        return [runs.start(name, "train.workers=1", *more, pace=0.01)]

    ended = kill_and_resume(runs, start, f"killed{seed}", random.Random(seed), kills)
    assert_equal_runs(undisturbed, ended)
    return kills


def test_X4_a_run_killed_three_times_ends_bit_equal_to_an_undisturbed_one(runs, undisturbed):
    assert kill_and_compare(runs, undisturbed, seed=0, kills=3) == 3


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_X4_runs_killed_at_random_sixty_times_end_bit_equal(runs, kind, world):
    """Ten kills of each kind, in one process and in two, of which either may be hit."""
    more = [*KINDS[kind], "train.epochs=3"]

    def start(name: str, *resume: str) -> list[Process]:
        if world > 1:
            return runs.start_ranks(name, *more, *resume, pace=0.02)
        return [runs.start(name, *more, "train.workers=1", *resume, pace=0.02)]

    calm = start(f"calm {kind} {world}")
    assert [p.wait() for p in calm] == [0] * world, calm[0].said()
    dice = random.Random(f"{kind} {world}")
    for k in range(2):
        ended = kill_and_resume(runs, start, f"killed {kind} {world} {k}", dice, 5)
        assert_equal_runs(calm[0].folder(), ended)


def test_the_photographs_are_as_they_were(runs, undisturbed):
    files = contents(runs.home / "photos")
    assert len(files) == 60
    again = Path(runs.home / "again")
    for k, (name, rgb) in enumerate(
        {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}.items()
    ):
        for i in range(20):
            paint(again / name / f"{i:02d}.jpg", rgb, seed=100 * k + i)
    assert contents(again) == files
