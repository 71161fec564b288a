"""Signals and kills of whole runs, as real processes: what they end with, keep, and leave behind.

A killed run that is resumed must end with the bits of an undisturbed one.
"""

import random
import re
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import paint
from rows import contents
from runs import Process, Runs, assert_equal_runs

from vitft import io

pytestmark = pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="looks processes up in /proc"
)


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
    process = runs.start("twice", pace=5.0)
    process.until("update 2\n")
    process.send(signal.SIGINT)
    process.until("stopping after this step")
    started = time.monotonic()
    process.send(signal.SIGINT)
    assert process.wait(4) == 130
    assert time.monotonic() - started < 4
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
    assert process.wait(20) == 130
    assert process.said().endswith("stopped by Ctrl-C\n")
    assert "Traceback" not in process.said()
    process.leaves_nothing(0)


def test_X26_a_reader_that_has_gone_costs_the_last_line_and_nothing_else(runs, undisturbed):
    process = runs.start("gone", hang_up=True)
    assert process.wait() == 141
    assert_equal_runs(undisturbed, process.folder())
    assert (process.folder() / "report.html").exists()


def kill_and_resume(
    runs: Runs, undisturbed: Path, name: str, dice: random.Random, kills: int
) -> int:
    """Kills a run at random moments until so many kills were met; it must end as the other did."""
    met = 0
    longest = 1.0
    while True:
        resumable = list((runs.home / name).glob("*/2*/checkpoints/step-*"))
        more = ["--resume", "auto"] if resumable else []
        process = runs.start(name, "train.workers=1", *more, pace=0.01)
        if met == kills:
            assert process.wait() == 0, process.said()
            assert_equal_runs(undisturbed, process.folder())
            return met
        process.until("run folder ")
        time.sleep(dice.uniform(0, longest))
        process.send(signal.SIGKILL)
        code = process.wait()
        if code == 0:  # it was done before: kill the next one earlier
            assert_equal_runs(undisturbed, process.folder())
            longest /= 2
            io.remove(runs.home / name)
        else:
            assert code == -signal.SIGKILL
            met += 1
        process.leaves_nothing(30)


def test_X4_a_run_killed_three_times_ends_bit_equal_to_an_undisturbed_one(runs, undisturbed):
    assert kill_and_resume(runs, undisturbed, "killed", random.Random(0), 3) == 3


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_X4_a_run_killed_twenty_times_ends_bit_equal_to_an_undisturbed_one(runs, undisturbed):
    dice = random.Random(1)
    assert sum(kill_and_resume(runs, undisturbed, f"k{i}", dice, 4) for i in range(5)) == 20


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
