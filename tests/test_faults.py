"""Kills, full disks and failing calls: what was saved stays, what was not is not half there.

The short form runs always; `-m nightly` runs the long one (200 kills each, every crash point).
"""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from vitft import io
from vitft.errors import MachineError

TESTS = Path(__file__).resolve().parent
SAVED = (
    "checkpoint", "product", "product_without_exchange", "export", "metrics", "trimmed_metrics",
    "report", "index", "answers",
)  # fmt: skip


# --- kill -9 at random instants ---


def kill(artefact: str, folder: Path, kills: int, longest: float) -> dict[str, int]:
    command = [sys.executable, TESTS / "kill_loop.py", artefact, folder, str(kills), str(longest)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def harmless(count: dict[str, int], kills: int) -> None:
    bad = {k: count[k] for k in ("unreadable", "lost", "mixed", "left_for_good")}
    assert count["kills"] == kills
    assert bad == {"unreadable": 0, "lost": 0, "mixed": 0, "left_for_good": 0}, count


@pytest.mark.parametrize("artefact", SAVED)
def test_X4_no_kill_breaks_loses_or_mixes_a_save(tmp_path, artefact):
    harmless(kill(artefact, tmp_path, 20, 0.08), 20)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("artefact", SAVED)
def test_X4_none_of_200_kills_breaks_loses_or_mixes_a_save(tmp_path, artefact):
    harmless(kill(artefact, tmp_path, 200, 0.25), 200)


def test_the_kills_do_break_a_file_that_is_written_in_place(tmp_path):
    count = kill("in_place", tmp_path, 20, 0.08)
    assert count["unreadable"] + count["lost"] + count["mixed"] > 0


# --- the Nth call fails ---


def folder_state(folder: Path) -> dict[str, bytes]:
    """What a reader sees: every file that is not a temporary, links by target, logs by record."""
    seen = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not any(io.TEMP.fullmatch(part) for part in parts):
            name = "/".join(parts)
            if path.is_symlink():
                seen[name] = str(path.readlink()).encode()
            elif path.suffix == ".jsonl":  # an empty one, or a half last line, is nothing
                seen |= {f"{name}:{row['step']}": b"row" for row in io.read_lines(path)}
            elif path.is_file():
                seen[name] = path.read_bytes()
            else:
                seen[name] = b"folder"
    return seen


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if io.TEMP.fullmatch(path.name)]


def seal(folder: Path, text: str) -> None:
    with io.staged_dir(folder / "model") as staged:
        io.write_text(staged / "a", text)
        io.write_text(staged / "sub" / "b", text * 2)


def grow(folder: Path) -> None:
    with io.appending(folder / "a.part") as add:
        add(b"more")


def export(folder: Path) -> None:
    with (
        io.staged_file(folder / "m.onnx") as path,
        io.CALLS.open(path, "xb", buffering=0) as file,
    ):
        io.CALLS.write(file.fileno(), b"graph")


def hold(folder: Path) -> None:
    with io.lock(folder, "x"):
        pass


def nothing(folder: Path) -> None:
    pass


def tensors(folder: Path, step: int) -> None:
    io.write_tensors(folder / "m.safetensors", {"w": np.full(9, step), "v": np.ones(step)}, {})


def log_two(folder: Path) -> None:
    io.append_line(folder / "m.jsonl", {"step": 1})
    io.append_line(folder / "m.jsonl", {"step": 2})


def torn_log(folder: Path) -> None:
    io.write_text(folder / "m.jsonl", '{"step":1}\n{"ste')


Action = Callable[[Path], object]
SCENES: dict[str, tuple[Action, Action]] = {  # name: (what stands there, what is done)
    "first text": (nothing, lambda f: io.write_text(f / "deep" / "er" / "a", "new")),
    "next text": (lambda f: io.write_text(f / "a", "old"), lambda f: io.write_text(f / "a", "new")),
    "tensors": (lambda f: tensors(f, 1), lambda f: tensors(f, 2)),
    "first folder": (nothing, lambda f: seal(f, "new")),
    "next folder": (lambda f: seal(f, "old"), lambda f: seal(f, "new")),
    "first line": (nothing, lambda f: io.append_line(f / "m.jsonl", {"step": 1})),
    "next line": (log_two, lambda f: io.append_line(f / "m.jsonl", {"step": 3})),
    "line after a torn one": (torn_log, lambda f: io.append_line(f / "m.jsonl", {"step": 3})),
    "trim": (log_two, lambda f: io.trim_lines(f / "m.jsonl", lambda row: row["step"] < 2)),
    "grow": (lambda f: io.write_text(f / "a.part", "some"), grow),
    "move": (lambda f: io.write_text(f / "a", "x"), lambda f: io.move(f / "a", f / "d" / "b")),
    "export": (lambda f: io.write_text(f / "m.onnx", "old"), export),
    "remove": (lambda f: seal(f, "old"), lambda f: io.remove(f / "model")),
    "aside": (lambda f: seal(f, "old"), lambda f: io.move_aside(f / "model")),
    "link": (lambda f: seal(f, "old"), lambda f: io.link_latest(f / "model")),
    "lock": (nothing, hold),
    "trial": (nothing, lambda f: io.require_writable(f)),
}
ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EROFS)


class Faulty:
    """Stands in for the door's calls; the Nth one fails, or the Nth and all that follow."""

    def __init__(self, at: int, code: int, *, lasting: bool) -> None:
        self.at, self.code, self.lasting = at, code, lasting
        self.calls = self.fired = 0

    def wrap(self, call: Callable[..., object]) -> Callable[..., object]:
        def faulty(*args: object, **options: object) -> object:
            self.calls += 1
            if self.calls == self.at or (self.lasting and self.calls > self.at):
                self.fired += 1
                raise OSError(self.code, os.strerror(self.code))
            return call(*args, **options)

        return faulty

    @contextmanager
    def at_work(self) -> Iterator[None]:
        kept = vars(io.CALLS).copy()
        vars(io.CALLS).update({name: self.wrap(call) for name, call in kept.items()})
        try:
            yield
        finally:
            vars(io.CALLS).update(kept)


def expected_id(code: int) -> str:
    return "env.disk_full" if code == errno.ENOSPC else "env.write_failed"


def fails_at(
    folder: Path, scene: str, fault: Faulty, before: dict[str, bytes], after: dict[str, bytes]
) -> None:
    """Runs a scene with one fault; the reader must see before or after, and our error or none."""
    act = SCENES[scene][1]
    raised = None
    with fault.at_work():
        try:
            act(folder)
        except MachineError as error:
            raised = error
    seen = folder_state(folder)
    seen.pop("run.lock", None)  # an unheld lock file is no lock
    if raised is None:
        assert seen == after
    else:
        assert raised.faults[0].id == expected_id(fault.code)
        assert errno.errorcode[fault.code] in str(raised)
        made = {
            name: data for name, data in seen.items() if data == b"folder" and name not in before
        }
        rest = {name: data for name, data in seen.items() if name not in made}
        assert rest in (before, after) or seen == after, (fault.at, seen)


def again(folder: Path, scene: str, after: dict[str, bytes]) -> None:
    """Once the disk works again: leftovers can be swept, and the same call succeeds."""
    io.sweep(folder, older_than=0)
    assert temporaries(folder) == []
    if scene not in {"grow", "aside", "remove", "move", "next line"}:  # these are not repeatable
        SCENES[scene][1](folder)
        seen = folder_state(folder)
        seen.pop("run.lock", None)
        assert seen == after


def run_scene(tmp_path: Path, scene: str, codes: tuple[int, ...], *, lasting: bool) -> int:
    """Lets call 1, 2, ... fail, with one code after another, until none does; returns how many."""
    prepare, act = SCENES[scene]
    template, target = tmp_path / "template", tmp_path / "target"
    for folder in (template, target):
        folder.mkdir()
        prepare(folder)
    before = folder_state(template)
    act(target)
    after = folder_state(target)
    for at in range(1, 200):
        folder = tmp_path / f"{at}"
        shutil.copytree(template, folder, symlinks=True)
        fault = Faulty(at, codes[at % len(codes)], lasting=lasting)
        fails_at(folder, scene, fault, before, after)
        if not fault.fired:
            return at - 1
        if not lasting:
            again(folder, scene, after)
        shutil.rmtree(folder)
    raise AssertionError("200 calls and no end")


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("scene", SCENES)
def test_whichever_call_fails_the_reader_sees_old_or_new(tmp_path, scene, lasting):
    assert run_scene(tmp_path, scene, ERRORS, lasting=lasting) >= 1


@pytest.mark.nightly
@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("scene", SCENES)
def test_whichever_call_fails_with_each_code_the_reader_sees_old_or_new(
    tmp_path, scene, lasting, code
):
    assert run_scene(tmp_path, scene, (code,), lasting=lasting) >= 1


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_the_swap_in_two_steps_survives_every_failing_call_too(tmp_path, monkeypatch, lasting):
    def unable(one: Path, other: Path) -> None:
        raise OSError(errno.EINVAL, "cannot exchange")

    monkeypatch.setattr(io.CALLS, "exchange", unable)
    for at in range(1, 60):
        folder = tmp_path / f"{at}"
        folder.mkdir()
        seal(folder, "old")
        fault = Faulty(at, errno.EIO, lasting=lasting)
        with fault.at_work():
            try:
                seal(folder, "new")
            except MachineError:
                wanted = {"old", "new"}
            else:
                wanted = {"new"}
        io.sweep(folder, older_than=0)
        assert io.verify_dir(folder / "model") == ()
        assert (folder / "model" / "a").read_text() in wanted
        assert temporaries(folder) == []
        if not fault.fired:
            return
    raise AssertionError("60 calls and no end")


# --- power cut ---


class Witness:
    """Stands in for the door's calls and knows what a power cut would take back.

    An inode is dirty from a write (or a change of a folder's entries) to its next fsync. A name
    that is not a temporary must never come to point to something dirty.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dirty: set[int] = set()
        self.real = vars(io.CALLS).copy()
        for name in self.real:
            monkeypatch.setattr(io.CALLS, name, getattr(self, name))

    def touch(self, path: Path) -> None:
        self.dirty.add(path.stat().st_ino)

    def open(self, path: Path, mode: str, **options: object) -> object:
        fresh = not path.exists()
        file = self.real["open"](path, mode, **options)
        if fresh:
            self.touch(path.parent)
        return file

    def write(self, handle: int, data: bytes) -> int:
        self.dirty.add(os.fstat(handle).st_ino)
        return self.real["write"](handle, data)

    def fsync(self, handle: int) -> None:
        self.real["fsync"](handle)
        self.dirty.discard(os.fstat(handle).st_ino)

    def replace(self, source: Path, target: Path) -> None:
        if not any(io.TEMP.fullmatch(part) for part in target.parts):
            assert self.inside(source) == [], "would show what is not on the disk yet"
        self.real["replace"](source, target)
        self.touch(target.parent)

    def exchange(self, one: Path, other: Path) -> None:
        assert self.inside(one) == [], "would show what is not on the disk yet"
        self.real["exchange"](one, other)
        self.touch(other.parent)

    def mkdir(self, path: Path) -> None:
        self.real["mkdir"](path)
        self.touch(path)
        self.touch(path.parent)

    def symlink(self, target: str, path: Path, **options: object) -> None:
        self.real["symlink"](target, path, **options)
        self.touch(path.parent)

    def truncate(self, path: Path, size: int) -> None:
        self.real["truncate"](path, size)
        self.touch(path)

    def unlink(self, path: Path) -> None:
        self.real["unlink"](path)
        if not io.TEMP.fullmatch(path.name) and path.name != io.LOCK:
            self.touch(path.parent)

    def rmdir(self, path: Path) -> None:
        self.real["rmdir"](path)

    def inside(self, path: Path) -> list[Path]:
        """The dirty things at and below a path, links and empty folders apart."""
        every = [path, *path.rglob("*")]
        held = [p for p in every if not p.is_symlink() and (p.is_file() or any(p.iterdir()))]
        return [p for p in held if p.stat().st_ino in self.dirty]


@pytest.mark.parametrize("scene", [name for name in SCENES if name not in {"lock", "trial"}])
def test_X5_what_is_shown_or_acknowledged_is_on_the_disk(tmp_path, monkeypatch, scene):
    prepare, act = SCENES[scene]
    prepare(tmp_path)
    witness = Witness(monkeypatch)
    act(tmp_path)
    assert witness.inside(tmp_path) == []


# --- no room ---


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files of this process end at `size` bytes; Python ignores the signal, so that write fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


BIG = 100_000
WRITERS: dict[str, Action] = {
    "tensors": lambda f: io.write_tensors(f / "m", {"w": np.ones(BIG // 8), "b": np.ones(1)}, {}),
    "text": lambda f: io.write_text(f / "m", "x" * BIG),
    "line": lambda f: io.append_line(f / "m", {"x": "x" * (BIG - 100)}),
    "folder": lambda f: seal(f, "x" * (BIG // 2)),
    "trimmed": lambda f: io.trim_lines(f / "long.jsonl", lambda row: row["step"]),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_X2_a_limit_at_any_of_20_sizes_is_a_full_disk_that_changes_nothing(tmp_path, writer):
    write = WRITERS[writer]
    io.append_line(tmp_path / "m", {"old": True})
    seal(tmp_path, "old")
    io.append_line(tmp_path / "long.jsonl", {"step": 0})
    io.append_line(tmp_path / "long.jsonl", {"step": 1, "x": "x" * (BIG - 100)})
    before = folder_state(tmp_path)
    for size in np.linspace(0, BIG * 0.99, 20).astype(int):
        with (
            file_size_limit(int(size)),
            pytest.raises(
                MachineError, match=r"env.disk_full\].* free \(EFBIG\).*\nfix: make room"
            ),
        ):
            write(tmp_path)
        assert folder_state(tmp_path) == before
        assert temporaries(tmp_path) == []
    write(tmp_path)
    assert folder_state(tmp_path) != before


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 2 MB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a small disk")
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not let root mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_X1_a_disk_that_runs_full_keeps_the_old_and_works_again_with_room(small_disk):
    write_big(small_disk, 60_000)
    (small_disk / "filler").write_bytes(b"x" * 900_000)
    before = folder_state(small_disk)
    full = r"disk_full\] .*disk/model/m.safetensors: need 960.1 kB, [67]\d\d\.\d kB free \(ENOSPC\)"
    with pytest.raises(MachineError, match=full):
        write_big(small_disk, 120_000)
    assert folder_state(small_disk) == before
    assert temporaries(small_disk) == []
    (small_disk / "filler").unlink()
    write_big(small_disk, 120_000)
    assert io.verify_dir(small_disk / "model") == ()


def write_big(folder: Path, count: int) -> None:
    with io.staged_dir(folder / "model") as staged:
        io.write_tensors(staged / "m.safetensors", {"w": np.ones(count)}, {})


# --- every file event ---


def chaos(tmp_path: Path, points: int) -> tuple[int, dict[str, int]]:
    """Crashes the small run at file events and resumes it; returns points and verdicts."""
    command = [
        sys.executable, "-m", "ckpt_chaos", "run", "--modes", "before,torn,unsynced,term",
        "--checkpoint-glob", "{out}/ckpt-*", "--step-regex", r"resumed from step (\d+)",
        "--result-file", "{out}/final.txt", "--max-points", str(points), "--jobs", "2",
        "--fail-on", "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL",
        "--work", str(tmp_path / "work"), "--",
        sys.executable, str(TESTS / "chaos_run.py"), "{out}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    verdicts = {name: int(n) for name, n in re.findall(r"\b([A-Z_]{4,}): (\d+)", done.stdout)}
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "DID NOT CRASH" not in done.stdout
    return sum(verdicts.values()), verdicts


def test_X5_a_crash_at_sampled_file_events_loses_no_finished_checkpoint(tmp_path):
    pytest.importorskip("ckpt_chaos")
    tried, verdicts = chaos(tmp_path, 40)
    assert verdicts == {"PASS": tried}
    assert tried == 41


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_X5_a_crash_at_every_file_event_loses_no_finished_checkpoint(tmp_path):
    pytest.importorskip("ckpt_chaos")
    tried, verdicts = chaos(tmp_path, 10_000)
    assert verdicts == {"PASS": tried}
    assert tried > 100
