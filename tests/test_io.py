"""The door to the disk: what goes through comes out whole, and what fails changes nothing."""

import csv
import errno
import json
import logging
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from vitft import disk, encode, io
from vitft.errors import BusyError, MachineError

ROOT = Path(__file__).resolve().parents[1]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_file_is_replaced_whole_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "new" / "deep" / "report.html"
    io.write_text(path, "old")
    io.write_text(path, "grün")
    assert tree(tmp_path) == {"new/deep/report.html": "grün".encode()}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_P5_files_and_folders_honour_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        io.write_tensors(tmp_path / "model.safetensors", {"w": torch.zeros(1)}, {})
        with io.staged_dir(tmp_path / "model"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_name_of_255_bytes_can_be_written(tmp_path):
    io.write_text(tmp_path / ("x" * 255), "fits")
    with pytest.raises(MachineError, match=r"env.write_failed.*\(ENAMETOOLONG\)"):
        io.write_text(tmp_path / ("x" * 256), "too long")


def test_a_file_name_that_is_not_utf8_survives_text_csv_and_json(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    io.write_text(tmp_path / "a.txt", name)
    io.write_csv(tmp_path / "a.csv", ["path"], [[name]])
    io.write_json(tmp_path / "a.json", {name: name})
    assert (tmp_path / "a.txt").read_bytes() == b"caf\xe9.jpg"
    with (tmp_path / "a.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert list(csv.reader(file)) == [["path"], [name]]
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {name: name}


def test_P9_json_has_no_nan_and_takes_arrays_paths_and_dataclasses(tmp_path):
    @dataclass
    class Interval:
        low: float

    io.write_json(
        tmp_path / "m.json",
        {
            "loss": math.nan,
            "inf": [math.inf, np.float32("nan")],
            "counts": np.arange(3),
            "n": np.int64(7),
            "t": torch.tensor([1.5]),
            "path": Path("a/b"),
            "interval": Interval(0.25),
            3: (True, None, "é"),
        },
    )
    text = (tmp_path / "m.json").read_text("utf-8")
    assert "é" in text
    assert json.loads(text) == {
        "loss": None,
        "inf": [None, None],
        "counts": [0, 1, 2],
        "n": 7,
        "t": [1.5],
        "path": "a/b",
        "interval": {"low": 0.25},
        "3": [True, None, "é"],
    }


def test_a_pydantic_section_is_an_object_not_a_list_of_pairs():
    from pydantic import BaseModel

    class Section(BaseModel):
        lr: float = 0.1

    assert json.loads(encode.json_text(Section())) == {"lr": 0.1}


@given(st.lists(st.lists(st.text(st.characters(exclude_characters="\0")), min_size=1)))
def test_any_text_survives_a_csv(rows):
    text = encode.csv_text(["a"], rows)
    assert list(csv.reader(StringIO(text, newline="")))[1:] == rows


DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def test_tensors_of_every_dtype_come_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    tensors = {f"t.{d}": (torch.randn(3, 5) * 50).to(d) for d in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    tensors |= {"view": torch.randn(4, 6).t()[1:, ::2]}
    path = tmp_path / "model.safetensors"
    io.write_tensors(path, tensors, {"classes": '["a", "ü"]'})
    back = load_file(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        bits, wanted = (t.reshape(-1).contiguous().view(torch.uint8) for t in (back[name], tensor))
        assert torch.equal(bits, wanted)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"classes": '["a", "ü"]'}


def test_numpy_tensors_are_written_without_torch_and_in_little_endian(tmp_path):
    big = np.arange(6, dtype=">f4").reshape(2, 3)
    io.write_tensors(tmp_path / "f.safetensors", {"x": big, "y": big.astype("<f2").T}, {})
    back = load_file(tmp_path / "f.safetensors")
    assert np.array_equal(back["x"].numpy(), big)
    assert np.array_equal(back["y"].numpy(), big.T)


def test_equal_tensors_give_equal_bytes_whatever_the_order(tmp_path):
    a, b = torch.arange(3), torch.ones(2)
    io.write_tensors(tmp_path / "1", {"a": a, "b": b}, {"k": "1", "l": "2"})
    io.write_tensors(tmp_path / "2", {"b": b, "a": a}, {"k": "1", "l": "2"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_every_tensor_starts_at_a_multiple_of_its_width(tmp_path):
    tensors = {
        "a": torch.zeros(3, dtype=torch.uint8),
        "b": torch.zeros(5).half(),
        "c": torch.ones(1),
    }
    io.write_tensors(tmp_path / "m", tensors, {})
    data = (tmp_path / "m").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_a_dtype_without_a_name_in_safetensors_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="phase: safetensors cannot hold torch.complex64"):
        io.write_tensors(tmp_path / "m", {"phase": torch.zeros(1, dtype=torch.complex64)}, {})
    assert tree(tmp_path) == {}


def test_a_writer_that_insists_on_a_path_gets_one_of_the_same_ending(tmp_path):
    with io.staged_file(tmp_path / "model.onnx") as path:
        assert path.suffix == ".onnx"
        path.write_bytes(b"graph")
        assert not (tmp_path / "model.onnx").exists()
    assert tree(tmp_path) == {"model.onnx": b"graph"}


def test_a_writer_that_fails_half_way_leaves_the_old_file(tmp_path):
    io.write_text(tmp_path / "model.onnx", "good")

    def export():
        with io.staged_file(tmp_path / "model.onnx") as path:
            path.write_bytes(b"half")
            raise KeyError("exporter")

    with pytest.raises(KeyError, match="exporter"):
        export()
    assert tree(tmp_path) == {"model.onnx": b"good"}


# --- logs ---


def test_X27_lines_come_back_in_order_and_a_torn_last_line_is_dropped(tmp_path):
    log = tmp_path / "run" / "metrics.jsonl"
    assert io.read_lines(log) == []
    for step in range(3):
        io.append_line(log, {"step": step, "loss": math.inf})
    whole = log.read_bytes()
    for cut in range(len(whole)):
        log.write_bytes(whole[:cut])
        kept = io.read_lines(log)
        assert kept == [{"step": s, "loss": None} for s in range(whole[:cut].count(b"\n"))]
        io.append_line(log, {"step": 9, "loss": 0.5})
        assert io.read_lines(log) == [*kept, {"step": 9, "loss": 0.5}]


def test_a_torn_line_longer_than_the_look_back_is_cut(tmp_path):
    log = tmp_path / "m.jsonl"
    io.append_line(log, {"a": 1})
    with log.open("ab") as file:
        file.write(b"x" * 10_000)
    io.append_line(log, {"a": 2})
    assert io.read_lines(log) == [{"a": 1}, {"a": 2}]


def test_a_damaged_line_before_the_last_is_named(tmp_path):
    log = tmp_path / "m.jsonl"
    log.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(MachineError, match=r"env.damaged\] .*m.jsonl:2: is not a JSON object"):
        io.read_lines(log)


def test_trimming_keeps_what_is_asked_and_touches_nothing_else(tmp_path):
    log = tmp_path / "m.jsonl"
    io.trim_lines(log, lambda row: True)
    assert not log.exists()
    for step in range(5):
        io.append_line(log, {"step": step})
    inode = log.stat().st_ino
    io.trim_lines(log, lambda row: True)
    assert log.stat().st_ino == inode
    io.trim_lines(log, lambda row: row["step"] <= 2)
    assert io.read_lines(log) == [{"step": s} for s in range(3)]


def test_a_growing_file_keeps_what_came_before_an_interruption(tmp_path):
    def download(data: bytes, stop: bool):
        with io.appending(tmp_path / "a.part") as add:
            add(data)
            if stop:
                raise ConnectionError

    with pytest.raises(ConnectionError):
        download(b"first ", stop=True)
    download(b"second", stop=False)
    io.move(tmp_path / "a.part", tmp_path / "done" / "a.tgz")
    assert tree(tmp_path) == {"done/a.tgz": b"first second"}


def test_a_log_file_that_cannot_grow_says_so_once_and_stops_nothing(tmp_path, capsys):
    handler = io.open_log(tmp_path / "new" / "log.txt")
    record = logging.LogRecord("vitft", logging.INFO, "", 0, "line \udce9", None, None)
    handler.emit(record)

    class Full:
        def write(self, text: str):
            raise OSError(errno.ENOSPC, "No space left on device")

    handler.acquire()
    whole, handler.stream = handler.stream, Full()
    handler.release()
    handler.handle(record)
    handler.handle(record)
    handler.stream = whole
    handler.close()
    assert capsys.readouterr().err.count("No space left on device; the log has gaps") == 1
    assert (tmp_path / "new" / "log.txt").read_text() == "line \\udce9\n"


# --- sealed folders ---


def fill(final: Path, text: str, names: tuple[str, ...] = ("a.txt", "sub/b.txt")) -> Path:
    with io.staged_dir(final) as folder:
        for name in names:
            io.write_text(folder / name, text)
    return final


def test_a_sealed_folder_verifies_and_replaces_the_former_one_whole(tmp_path):
    final = fill(tmp_path / "model", "old", ("a.txt", "gone.txt"))
    fill(final, "new")
    assert io.verify_dir(final) == ()
    assert sorted(tree(tmp_path)) == ["model/a.txt", "model/manifest.json", "model/sub/b.txt"]
    assert (final / "a.txt").read_text() == "new"


def test_every_flipped_byte_in_a_sealed_folder_is_found(tmp_path):
    final = fill(tmp_path / "model", "some words")
    for path in sorted(p for p in final.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for at in range(len(whole)):
            for flip in (1, 7, 0x80):  # 7 makes a return of a newline
                path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
                assert io.verify_dir(final), f"{path.name} byte {at} flip {flip}"
        path.write_bytes(whole)
    assert io.verify_dir(final) == ()


def test_missing_extra_shortened_and_changed_files_are_told_apart(tmp_path):
    final = fill(tmp_path / "model", "words", ("a", "b", "c", "d"))
    (final / "a").unlink()
    (final / "b").write_text("word")
    (final / "c").write_text("w0rds")
    (final / "e").write_text("")
    (final / ".DS_Store").write_text("left by a file browser")
    assert io.verify_dir(final) == (
        "a: missing",
        "e: not in the manifest",
        "b: 4 bytes, should be 5",
        "c: content changed (sha256 differs)",
    )


FORGED = (
    "",
    "[]",
    "{}",
    '{"files": []}',
    '{"files": {"a": 1}}',
    '{"files": {"../x": {}}}',
    "[" * 9999,
    "\udcff",
)


@pytest.mark.parametrize("text", FORGED, ids=range(len(FORGED)))
def test_a_forged_manifest_is_a_problem_and_never_a_crash(tmp_path, text):
    final = fill(tmp_path / "model", "words")
    (final / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert io.verify_dir(final)
    (final / "manifest.json").unlink()
    assert io.verify_dir(final) == ("manifest.json: missing",)
    assert io.verify_dir(tmp_path / "nowhere") == ("manifest.json: missing",)


def test_an_error_while_filling_leaves_the_old_folder_and_passes_unchanged(tmp_path):
    final = fill(tmp_path / "model", "old")
    before = tree(tmp_path)

    def fail(error: BaseException):
        with io.staged_dir(final) as folder:
            io.write_text(folder / "half", "half")
            raise error

    for error in (FileNotFoundError("a photograph"), KeyboardInterrupt(), ValueError("x")):
        with pytest.raises(type(error)):
            fail(error)
        assert tree(tmp_path) == before
    with pytest.raises(MachineError, match=r"env.disk_full\] .*model: .* free \(ENOSPC\)"):
        fail(OSError(errno.ENOSPC, "No space left on device"))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL])
def test_where_names_cannot_be_exchanged_two_renames_do(tmp_path, monkeypatch, code):
    def unable(one, other):
        raise OSError(code, "unable")

    monkeypatch.setattr(io.CALLS, "exchange", unable)
    final = fill(tmp_path / "model", "old")
    fill(final, "new")
    assert (final / "a.txt").read_text() == "new"
    assert io.verify_dir(final) == ()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_swap_cut_between_its_two_renames_is_finished_by_the_sweep(tmp_path):
    final = fill(tmp_path / "model", "old")
    final.rename(tmp_path / ".model.0123abcd.old")
    io.sweep(tmp_path, older_than=0)
    assert (final / "a.txt").read_text() == "old"
    fill(tmp_path / ".model.89abcdef.old", "older")
    io.sweep(tmp_path, older_than=0)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (final / "a.txt").read_text() == "old"


def test_the_newest_whole_checkpoint_wins_and_broken_ones_are_reported(tmp_path):
    for step in (5, 9, 10, 100):
        fill(tmp_path / f"step-{step}", str(step))
    (tmp_path / "step-100" / "a.txt").write_text("999")
    (tmp_path / "step-200").mkdir()
    told = {}
    found = io.newest_whole(tmp_path, "step-*", lambda path, why: told.update({path.name: why}))
    assert found == tmp_path / "step-10"
    assert told == {
        "step-200": ("manifest.json: missing",),
        "step-100": ("a.txt: content changed (sha256 differs)",),
    }
    assert io.newest_whole(tmp_path, "other-*") is None
    assert io.newest_whole(tmp_path / "nowhere", "step-*") is None


def test_old_checkpoints_go_and_the_newest_stay(tmp_path):
    for step in (5, 9, 10, 100):
        fill(tmp_path / f"step-{step}", str(step))
    gone = io.keep_newest(tmp_path, "step-*", 2)
    assert [path.name for path in gone] == ["step-5", "step-9"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-100"]
    assert io.keep_newest(tmp_path, "step-*", 0) == (tmp_path / "step-10",)


# --- names ---


def test_removing_a_tree_never_follows_a_link(tmp_path):
    io.write_text(tmp_path / "photos" / "rose.jpg", "precious")
    io.write_text(tmp_path / "run" / "sub" / "x", "x")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "photos")
    io.remove(tmp_path / "run")
    io.remove(tmp_path / "run")
    assert tree(tmp_path) == {"photos/rose.jpg": b"precious"}


def test_moving_aside_deletes_nothing(tmp_path):
    for text in ("one", "two"):
        io.write_text(tmp_path / "run" / "x", text)
        io.move_aside(tmp_path / "run")
    assert tree(tmp_path) == {"run.old-1/x": b"one", "run.old-2/x": b"two"}


def test_latest_points_to_the_newest_run_and_moves_with_the_folder(tmp_path):
    for name in ("1", "2"):
        io.make_dir(tmp_path / "runs" / name)
        io.link_latest(tmp_path / "runs" / name)
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "latest").resolve() == tmp_path / "moved" / "2"
    assert sorted(p.name for p in (tmp_path / "moved").iterdir()) == ["1", "2", "latest"]


def test_without_links_latest_is_a_text_file(tmp_path, monkeypatch):
    def unable(*args, **kwargs):
        raise OSError(errno.EPERM, "no privilege")

    monkeypatch.setattr(io.CALLS, "symlink", unable)
    io.make_dir(tmp_path / "2")
    assert io.link_latest(tmp_path / "2").read_text() == "2\n"


def test_a_file_where_a_folder_should_be_is_an_error_with_a_fix(tmp_path):
    io.write_text(tmp_path / "runs", "a file")
    with pytest.raises(MachineError, match=r"env.write_failed.*runs(.|\n)*fix: check the folder"):
        io.make_dir(tmp_path / "runs" / "1")


def test_the_sweep_takes_dead_temporaries_and_leaves_live_and_young_ones(tmp_path):
    dead = tmp_path / "run" / ".model.0123abcd.tmp"
    io.write_text(dead / "half", "half")
    os.utime(dead, (0, 0))
    io.write_text(tmp_path / ".young.0123abcd.tmp", "")
    io.write_text(tmp_path / ".bashrc", "not ours")
    with io.staged_dir(tmp_path / "live") as live:
        os.utime(live, (0, 0))
        assert io.sweep(tmp_path) == (dead,)
        assert live.is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".bashrc", ".young.0123abcd.tmp", "live", "run",
    ]  # fmt: skip


# --- machine ---


def test_X13_a_second_run_in_a_folder_is_refused_with_pid_host_and_start(tmp_path):
    with io.lock(tmp_path / "run", "train"):
        with pytest.raises(BusyError, match="env.busy") as caught, io.lock(tmp_path / "run", "x"):
            pass
        text = str(caught.value)
        assert f"pid {os.getpid()}, host " in text
        assert f"start {time.strftime('%Y-')}" in text
        assert "purpose train" in text
        assert caught.value.exit_code == 7
    with io.lock(tmp_path / "run", "again"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from standalone import io
from pathlib import Path
with io.lock(Path({folder!r}), "train"):
    (Path({folder!r}) / ".model.0123abcd.tmp").mkdir()
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen:
    code = HOLDER.format(root=str(ROOT / "tests"), folder=str(folder))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    child.stdout.close()
    return child


def test_a_lock_is_freed_by_kill_9_and_the_dead_writer_is_swept(tmp_path):
    child = hold(tmp_path)
    try:
        with pytest.raises(BusyError, match=f"pid {child.pid}"), io.lock(tmp_path, "x"):
            pass
    finally:
        child.kill()
        child.wait()
    with io.lock(tmp_path, "next"):
        assert [p.name for p in tmp_path.iterdir()] == ["run.lock"]


def test_a_dead_holder_whose_workers_are_leaving_is_waited_for(tmp_path):
    code = "import os; print(os.getpid())"
    gone = int(subprocess.run([sys.executable, "-c", code], capture_output=True).stdout)
    with io.lock(tmp_path, "x"):  # the descriptor a worker would have inherited
        holder = json.loads((tmp_path / "run.lock").read_text())
        (tmp_path / "run.lock").write_text(json.dumps(holder | {"pid": gone}))
        start = time.monotonic()
        with pytest.raises(BusyError), io.lock(tmp_path, "y", patience=0.3):
            pass
        assert 0.3 <= time.monotonic() - start < 3


def test_without_file_locks_the_lock_file_itself_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "fcntl", None)
    with (
        io.lock(tmp_path, "x"),
        pytest.raises(BusyError, match="if it is surely gone: rm .*run.lock"),
        io.lock(tmp_path, "y"),
    ):
        pass
    with io.lock(tmp_path, "z"):
        pass


def test_too_little_room_is_refused_before_the_work_with_need_and_free(tmp_path):
    io.require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(
        MachineError, match=r"disk_full\] .*need 1,000,000\.0 GB, [\d.,]+ [kMG]B free"
    ):
        io.require_space(tmp_path / "not" / "yet", 10**15)


def test_X3_a_folder_is_tried_with_a_real_write(tmp_path):
    io.require_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(MachineError, match=r"env.write_failed"):
        io.require_writable(Path("/proc/vitft"))


def test_the_cache_is_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("VITFT_CACHE", str(tmp_path))
    assert io.cache_dir() == tmp_path
    monkeypatch.delenv("VITFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert io.cache_dir() == Path("/x/vitft")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert io.cache_dir() == Path.home() / ".cache" / "vitft"


def test_the_door_opens_without_torch_or_numpy():
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import standalone; "
    code += "print(sorted({'torch', 'numpy', 'timm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_file_that_another_process_removed_first_is_gone_as_wished(tmp_path, monkeypatch):
    path = tmp_path / "a.shard"
    path.write_bytes(b"rows")

    def lost(target):
        Path(target).unlink()
        raise FileNotFoundError(errno.ENOENT, "gone", str(target))

    monkeypatch.setattr(io.CALLS, "unlink", lost)
    io.remove(path)
    assert not path.exists()


def test_a_folder_is_locked_before_it_has_its_name(tmp_path, monkeypatch):
    seen, replace = [], io.CALLS.replace

    def watched(source, target):
        with pytest.raises(BusyError, match="env.busy"):
            io.require_free(Path(source))
        seen.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(io.CALLS, "replace", watched)
    (tmp_path / "a").mkdir()
    with io.locked_dir([tmp_path / "a", tmp_path / "b"], "train") as folder:
        assert folder == tmp_path / "b"
        with pytest.raises(BusyError, match="purpose train"):
            io.require_free(folder)
    assert seen == ["b"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b"]


def test_a_name_taken_between_two_lines_is_passed_over(tmp_path, monkeypatch):
    replace = io.CALLS.replace

    def beaten(source, target):
        if Path(target).name == "a":
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "run.lock").touch()
        replace(source, target)

    monkeypatch.setattr(io.CALLS, "replace", beaten)
    with io.locked_dir([tmp_path / "a", tmp_path / "b"], "train") as folder:
        assert folder.name == "b"
    with pytest.raises(MachineError, match="File exists"), io.locked_dir([folder], "train"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_half_made_folder_of_a_killed_process_goes(tmp_path):
    dead = tmp_path / ".a.0123abcd.tmp"
    dead.mkdir()
    os.utime(dead, (0, 0))
    with io.locked_dir([tmp_path / "b"], "train"):
        assert not dead.exists()


RACER = """
import sys
from contextlib import ExitStack
from pathlib import Path
from vitft import io
base = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
with ExitStack() as held:
    for k in range(40):
        names = [base / str(k), base / f"{k}-2"]
        print(held.enter_context(io.locked_dir(names, "race")).name, flush=True)
    print("done", flush=True)
    sys.stdin.readline()
"""


def test_two_processes_get_two_folders_and_none_is_ever_seen_unlocked(tmp_path):
    pipe, seen = subprocess.PIPE, set()
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    racers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    try:
        assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2
        for racer in racers:
            racer.stdin.write("go\n")
            racer.stdin.flush()
        deadline = time.monotonic() + 60
        while len(seen) < 80:
            assert time.monotonic() < deadline
            new = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} - seen
            for name in new:
                with pytest.raises(BusyError, match="env.busy"):
                    io.require_free(tmp_path / name)
            seen |= new
        told = [racer.communicate("end\n", timeout=60)[0].split() for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    assert [names.pop() for names in told] == ["done", "done"]
    assert set(told[0]) | set(told[1]) == seen
    assert not set(told[0]) & set(told[1])
    assert {p.name for p in tmp_path.rglob("*")} == seen  # no lock and no half-made folder stays
