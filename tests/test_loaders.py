"""Batches are functions of seed, epoch and content; workers fail with the file they held."""

import hashlib
import multiprocessing
import os
import pickle
import random
import re
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data.loader import PrefetchLoader
from timm.data.mixup import Mixup

from vitft import workers as crew
from vitft.errors import DataError, MachineError
from vitft.images import DecodeSpec
from vitft.inputs import InputConfig, augmented, derive_seed, erase, permutation, plain, seeded
from vitft.loaders import Batches
from vitft.photos import Photos
from vitft.workers import times_before, worker_count

CPU = torch.device("cpu")
CONFIG = InputConfig((16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.9)
STRONG = SimpleNamespace(augment="rand-m9-mstd0.5-inc1", reprob=0.5)
N = 22


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """22 small photographs of random colours."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    paths = []
    for i in range(N):
        noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        paths.append(root / f"{i:02d}.jpg")
        noise.resize((60, 45), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def sums(files):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


def photos(files, transform=None, kind=Photos, seed=3):
    transform = augmented(CONFIG, STRONG) if transform is None else transform
    labels = np.arange(len(files)) % 5
    return kind(files, labels, sums(files), decode=DecodeSpec(), transform=transform, seed=seed)


def batches(source, **options):
    defaults = {"batch_size": 4, "seed": 3, "shuffle": True, "device": CPU, "workers": 0}
    return Batches(source, **(defaults | options))


MIXED = {"mixup": 0.8, "cutmix": 1.0, "classes": 5}


def equal(a, b):
    a, b = list(a), list(b)
    same = (torch.equal(p, q) for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True))
    return all(same)


def by_row(loaded):
    return {int(row): image for x, _, rows in loaded for image, row in zip(x, rows, strict=True)}


@pytest.fixture
def no_child_left():
    """Every worker process is gone when the test is over."""
    before = set(multiprocessing.active_children())
    yield
    deadline = time.monotonic() + 10
    while set(multiprocessing.active_children()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(multiprocessing.active_children()) - before


# ---- content ------------------------------------------------------------------------------------


def test_a_batch_is_images_labels_and_rows_in_the_epochs_order(files):
    source = photos(files, plain(CONFIG))
    loaded = list(batches(source).epoch(2))
    order = permutation(N, 3, 2)
    assert [len(y) for _, y, _ in loaded] == [4, 4, 4, 4, 4, 2]
    assert torch.cat([rows for *_, rows in loaded]).tolist() == order.tolist()
    assert torch.cat([y for _, y, _ in loaded]).tolist() == (order % 5).tolist()
    for x, y, rows in loaded:
        assert x.shape == (len(y), 3, 16, 16)
        assert (x.dtype, y.dtype, rows.dtype) == (torch.float32, torch.int64, torch.int64)
    in_order = list(batches(source, shuffle=False))
    assert torch.cat([rows for *_, rows in in_order]).tolist() == list(range(N))


def test_pixels_equal_timms_own_loader(files):
    source = photos(files, plain(CONFIG))
    host = [(torch.stack([source[0, i][0] for i in range(N)]), torch.zeros(N))]
    ((want, _),) = list(PrefetchLoader(host, CONFIG.mean, CONFIG.std, device=CPU))
    ((got, _, _),) = list(batches(source, batch_size=N, shuffle=False))
    assert (got - want).abs().max() <= 1e-6


def test_only_the_rows_asked_for_are_loaded_and_look_as_ever(files):
    loaded = batches(photos(files))
    everything = by_row(loaded.epoch(1))
    some = list(loaded.epoch(1, rows=np.asarray([7, 2, 9, 4, 11])))
    assert torch.cat([rows for *_, rows in some]).tolist() == [7, 2, 9, 4, 11]
    assert all(torch.equal(image, everything[row]) for row, image in by_row(some).items())
    assert list(loaded.epoch(1, rows=np.zeros(0, np.int64))) == []


def test_names_are_the_files_behind_rows(files):
    assert batches(photos(files)).names(torch.tensor([3, 0])) == [str(files[3]), str(files[0])]


# ---- determinism --------------------------------------------------------------------------------


def test_X21_workers_0_1_and_2_give_the_same_batches(files, no_child_left):
    want = [list(batches(photos(files), **MIXED).epoch(e)) for e in (0, 1)]
    assert not equal(want[0], want[1])
    for workers in (1, 2):
        loaded = batches(photos(files), workers=workers, **MIXED)
        assert equal(loaded.epoch(0), want[0])
        assert equal(loaded.epoch(1), want[1])
        loaded.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_any_first_step_gives_the_rest_of_the_epoch(files, workers, no_child_left):
    want = list(batches(photos(files), **MIXED).epoch(1))
    loaded = batches(photos(files), workers=workers, **MIXED)
    for start in range(7):
        assert equal(loaded.epoch(1, start=start), want[start:])
    loaded.close()


def test_nothing_before_the_first_step_is_decoded(files):
    class Counting(Photos):
        asked = 0

        def __getitem__(self, key):
            type(self).asked += 1
            return super().__getitem__(key)

    assert len(list(batches(photos(files, kind=Counting)).epoch(0, start=4))) == 2
    assert Counting.asked == 6


def test_the_batch_size_changes_no_image_not_even_an_erased_one(files):
    want = by_row(batches(photos(files), batch_size=4).epoch(1))
    for size in (1, 7, 22, 50):
        got = by_row(batches(photos(files), batch_size=size).epoch(1))
        assert all(torch.equal(got[row], want[row]) for row in range(N))


def test_names_order_and_neighbours_change_no_image(files, tmp_path):
    want = by_row(batches(photos(files)).epoch(1))
    moved = [tmp_path / f"{i}-renamed.jpeg" for i in range(N)]
    for old, new in zip(files, moved, strict=True):
        new.write_bytes(old.read_bytes())
    got = by_row(batches(photos(moved[::-1])).epoch(1))
    assert all(torch.equal(got[N - 1 - row], want[row]) for row in range(N))


def test_erasing_is_drawn_from_run_epoch_and_content(files):
    source = photos(files, augmented(CONFIG, SimpleNamespace(augment="plain", reprob=0.7)))
    whole = by_row(batches(photos(files, plain(CONFIG))))
    for epoch in (0, 1):
        for row, image in by_row(batches(source).epoch(epoch)).items():
            want = whole[row].clone()
            erase(want, 0.7, derive_seed(3, "erase", epoch, source.sha256[row]))
            assert torch.equal(image, want)


def test_seed_and_epoch_change_every_view(files):
    want = by_row(batches(photos(files)).epoch(1))
    for other in (photos(files, seed=4), photos(files)):
        epoch = 1 if other.seed == 4 else 2
        got = by_row(batches(other).epoch(epoch))
        assert sum(torch.equal(got[row], want[row]) for row in range(N)) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_the_callers_generators_neither_matter_nor_move(files, workers):
    def run(disturb):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        drawn, loaded = [], []
        batcher = batches(photos(files), workers=workers, **MIXED)
        for batch in batcher.epoch(0) if disturb else ():
            loaded.append(batch)
        batcher.close()
        drawn += [random.random(), np.random.rand(), float(torch.rand(1))]
        return drawn, loaded

    assert run(True)[0] == run(False)[0]
    noisy = []
    for batch in batches(photos(files), workers=workers, **MIXED).epoch(0):
        draw = random.random(), np.random.rand(), torch.rand(1)  # as dropout would
        assert len(draw) == 3
        noisy.append(batch)
    assert equal(noisy, run(True)[1])


def test_an_epoch_left_early_does_not_disturb_the_next(files, no_child_left):
    want = list(batches(photos(files)).epoch(1))
    for workers in (0, 2):
        loaded = batches(photos(files), workers=workers)
        next(loaded.epoch(0))
        next(loaded.epoch(0, start=3))
        assert equal(loaded.epoch(1), want)
        loaded.close()


# ---- mixing -------------------------------------------------------------------------------------


def test_mixing_is_timms_with_the_seed_of_the_step(files):
    source = photos(files, plain(CONFIG))
    plain_batches = list(batches(source).epoch(1))
    mixed = list(batches(source, **MIXED).epoch(1))
    peer = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=5)
    for step, ((x, y, _), (got, targets, _)) in enumerate(zip(plain_batches, mixed, strict=True)):
        with seeded(derive_seed(3, "mix", 1, step)):
            want, want_targets = peer(x.clone(), y)
        assert torch.equal(got, want)
        assert torch.equal(targets, want_targets)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_an_odd_batch_leaves_its_last_image_alone(files, size):
    source = photos(files, plain(CONFIG))
    for (x, y, _), (got, targets, _) in zip(
        batches(source, batch_size=size), batches(source, batch_size=size, **MIXED), strict=True
    ):
        assert targets.shape == (len(y), 5)
        assert torch.allclose(targets.sum(1), torch.ones(len(y)))
        if len(y) % 2:
            assert torch.equal(got[-1], x[-1])
            assert targets[-1].tolist() == [float(k == int(y[-1])) for k in range(5)]


# ---- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "drop", "steps"), [(4, False, 6), (4, True, 5), (50, False, 1)])
def test_the_length_is_the_number_of_batches(files, size, drop, steps):
    loaded = batches(photos(files, plain(CONFIG)), batch_size=size, drop_last=drop)
    assert len(loaded) == steps == len(list(loaded.epoch(0)))


def test_no_batch_at_all_is_an_error_not_an_empty_epoch(files):
    with pytest.raises(DataError, match=r"data.no_batches\].*22 images make no batch of 50"):
        batches(photos(files), batch_size=50, drop_last=True)


def test_auto_workers_leave_two_cores_to_the_model(monkeypatch):
    for cores, cpu, cuda in ((1, 0, 1), (2, 0, 2), (4, 4, 4), (64, 8, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)))
        assert worker_count("auto", CPU) == cpu
        assert worker_count("auto", torch.device("cuda")) == cuda
    assert worker_count(3, CPU) == 3


def test_photos_survive_the_way_into_a_fresh_process(files):
    source = photos(files)
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again[1, 5][0], source[1, 5][0])


@pytest.mark.parametrize(
    ("mebibytes", "workers"), [(64, 0), (110, 0), (111, 1), (640, 8), (1212, 15), (1213, 16)]
)
def test_auto_takes_as_many_workers_as_shared_memory_holds_and_says_so(
    monkeypatch, caplog, mebibytes, workers
):
    spec = plain(InputConfig((224, 224), CONFIG.mean, CONFIG.std, "bicubic", 0.9))
    usage = SimpleNamespace(free=2 * mebibytes * 2**20)
    monkeypatch.setattr(crew.shutil, "disk_usage", lambda path: usage)
    crew._tell.cache_clear()
    for _ in range(2):
        assert crew.fitting(16, 256, spec) == workers
    needed = (2 * workers + 1) * 256 * 3 * 224 * 224
    assert workers == 0 or needed <= mebibytes * 2**20
    text = f"train.workers: auto is {workers} instead of 16, as /dev/shm is too small "
    assert caplog.text.count(text) == (workers < 16)
    caplog.clear()
    usage.free = 0
    assert crew.fitting(0, 256, spec) == 0  # none are to have been given up
    assert not caplog.text


def test_X25_too_little_shared_memory_is_said_before_a_worker_dies_of_it(files, monkeypatch):
    usage = SimpleNamespace(free=5 * 4 * 3 * 16 * 16 - 1)
    monkeypatch.setattr(crew.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        MachineError, match=r"env.shared_memory\].*2 workers need 0 MiB of /dev/shm"
    ):
        batches(photos(files), workers=2)
    batches(photos(files), workers=0)
    usage.free += 1
    batches(photos(files), workers=2)


# ---- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_I27_a_file_that_changed_or_vanished_since_the_scan_is_named(
    files, tmp_path, workers, no_child_left
):
    copies = [tmp_path / path.name for path in files]
    for old, new in zip(files, copies, strict=True):
        new.write_bytes(old.read_bytes())
    source = photos(copies, plain(CONFIG))
    healthy = list(batches(source).epoch(0))
    copies[5].write_bytes(copies[6].read_bytes())
    copies[9].unlink()
    loaded = batches(source, workers=workers, batch_size=N)
    with pytest.raises(DataError) as caught:
        list(loaded.epoch(0))
    assert {fault.id for fault in caught.value.faults} == {"data.changed", "data.missing"}
    text = str(caught.value)
    size = copies[5].stat().st_size
    assert f"error[data.changed] {copies[5]}: changed since the scan ({size:,} bytes now)" in text
    assert f"error[data.missing] {copies[9]}: no such file" in text
    assert text.count("\nfix: ") == 2
    for old, new in zip(files, copies, strict=True):
        new.write_bytes(old.read_bytes())
    assert equal(batches(source, workers=workers).epoch(0), healthy)  # repaired, it goes on


class Failing(Photos):
    """Does something else than loading when it comes to some rows."""

    act = staticmethod(lambda: None)
    rows = (7,)

    def __getitem__(self, key):
        if key[1] in self.rows:
            self.act()
        return super().__getitem__(key)


def failing(files, act, rows=(7,), **options):
    kind = type("FailingNow", (Failing,), {"act": staticmethod(act), "rows": rows})
    return batches(photos(files, plain(CONFIG), kind=kind), shuffle=False, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_X10_an_exception_of_a_worker_names_the_file_and_shows_no_traceback(files, workers):
    def act():
        raise ZeroDivisionError("boom")

    with pytest.raises(DataError) as caught:
        list(failing(files, act, workers=workers).epoch(0))
    assert (
        f"data.transform] {files[7]}: cannot be made into an input: ZeroDivisionError: boom"
        in str(caught.value)
    )
    assert "Traceback" not in str(caught.value)


def kill_a_worker():
    """What an out-of-memory killer does, to a worker; the run itself is spared."""
    if torch.utils.data.get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2])
def test_X9_the_batches_of_a_killed_worker_are_made_once_more_without_workers(
    files, workers, caplog, no_child_left
):
    handler = signal.getsignal(signal.SIGCHLD)
    loaded = failing(files, kill_a_worker, workers=workers)
    want = batches(photos(files, plain(CONFIG)), shuffle=False)
    assert equal(loaded.epoch(0), want.epoch(0))
    (said,) = [r.getMessage() for r in caplog.records if "exited unexpectedly" in r.getMessage()]
    assert said.endswith("trying these batches once more without workers")
    assert str(files[7]) in said
    assert signal.getsignal(signal.SIGCHLD) == handler
    loaded.close()


def test_X9_workers_killed_twice_are_a_fault_of_the_machine_that_names_the_file(
    files, no_child_left
):
    loaded = failing(files, kill_a_worker, rows=(7, 20), workers=1)
    started = time.monotonic()
    with pytest.raises(MachineError) as caught:
        list(loaded.epoch(0))
    assert time.monotonic() - started < 30
    (fault,) = caught.value.faults
    assert (fault.id, caught.value.exit_code) == ("env.worker_died", 5)
    assert re.search(r"worker .*exited unexpectedly.*; the workers held ", fault.text)
    assert str(files[20]) in fault.text
    assert "MiB free" in fault.text
    assert "train.workers: 0" in fault.fix


def test_X9_a_bad_photograph_met_without_workers_is_told_as_ever(files, no_child_left):
    def act():
        kill_a_worker()
        raise ZeroDivisionError("boom")

    with pytest.raises(DataError, match="ZeroDivisionError: boom"):
        list(failing(files, act, workers=1).epoch(0))


def test_a_workers_death_never_surfaces_in_the_midst_of_a_training_step(
    files, monkeypatch, no_child_left
):
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        loaded = batches(photos(files, plain(CONFIG)), workers=2, batch_size=1)
        steps = loaded.epoch(0)
        next(steps)
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        time.sleep(0.5)  # the step, in which torch would raise
        want = batches(photos(files, plain(CONFIG)), batch_size=1).epoch(0, start=1)
        assert equal(steps, want)
        loaded.close()
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_X11_a_hanging_worker_is_given_up_with_the_file_it_reads(files, monkeypatch, no_child_left):
    monkeypatch.setattr(crew, "POLL", 0.2)
    loaded = failing(files, lambda: time.sleep(600), workers=2, timeout=1.0)
    with pytest.raises(MachineError) as caught:
        list(loaded.epoch(0))
    (fault,) = caught.value.faults
    assert fault.id == "env.worker_hangs"
    assert re.search(r"no batch for [1-9]\d* s; the loader's workers are reading ", fault.text)
    assert str(files[7]) in fault.text


def test_a_slow_worker_is_waited_for(files, monkeypatch, no_child_left):
    monkeypatch.setattr(crew, "POLL", 0.1)
    loaded = failing(files, lambda: time.sleep(1.0), workers=1, timeout=20.0)
    assert len(list(loaded.epoch(0))) == 6
    loaded.close()


def test_after_two_deaths_the_next_epoch_starts_new_workers(files, tmp_path, no_child_left):
    def act():
        worker = torch.utils.data.get_worker_info() is not None
        if worker and len(list(tmp_path.glob("died*"))) < 2:
            (tmp_path / f"died{os.getpid()}").touch()
            kill_a_worker()

    loaded = failing(files, act, rows=(7, 20), workers=1)
    with pytest.raises(MachineError, match="env.worker_died"):
        list(loaded.epoch(0))
    want = batches(photos(files, plain(CONFIG)), shuffle=False)
    assert equal(loaded.epoch(0), want.epoch(0))
    loaded.close()


def test_workers_killed_between_epochs_are_replaced(files, no_child_left):
    want = batches(photos(files, plain(CONFIG)))
    loaded = batches(photos(files, plain(CONFIG)), workers=2)
    assert equal(loaded.epoch(0), want.epoch(0))
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    assert equal(loaded.epoch(1), want.epoch(1))
    loaded.close()


def test_workers_busy_with_an_epoch_left_early_are_replaced(files, monkeypatch, no_child_left):
    monkeypatch.setattr(crew, "POLL", 0.2)
    loaded = failing(files, lambda: time.sleep(2), workers=1, timeout=20.0)
    next(loaded.epoch(0))
    want = batches(photos(files, plain(CONFIG)), shuffle=False)
    rows = np.arange(8, 16)
    assert equal(loaded.epoch(0, rows=rows), want.epoch(0, rows=rows))
    loaded.close()


def _start_and_end(files, way, pipe):
    """A run of its own: starts workers, says who they are, and ends without closing anything."""
    steps = batches(photos(files, plain(CONFIG)), batch_size=2, workers=2).epoch(0)
    next(steps)
    pipe.send([child.pid for child in multiprocessing.active_children()])
    if way == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("way", ["SIGKILL", "exit"])
def test_no_worker_outlives_its_run_however_it_ends(files, way):
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    run = fork.Process(target=_start_and_end, args=(files, way, send))
    run.start()
    pids = receive.recv()
    run.join(30)
    assert len(pids) == 2
    deadline = time.monotonic() + 20  # torch's workers look for their parent every 5 s
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and ") Z" not in status.read_text()


# ---- speed --------------------------------------------------------------------------------------


def test_lending_a_seed_costs_little_beside_a_decode():
    best = min(_lend() for _ in range(200))
    assert best < 1.2e-4  # 5 % of the 2.4 ms of an ordinary photograph


def _lend():
    started = time.perf_counter()
    with seeded(derive_seed(3, "view", 1, "a" * 64)):
        return time.perf_counter() - started


class Sent:
    """A tensor of which only its way to the device is known."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def to(self, device, non_blocking):
        assert non_blocking
        self.log.append(f"copy {self.name}")
        return self

    def record_stream(self, stream):
        self.log.append(f"{self.name} until {stream.name}")


def test_a_step_on_cuda_waits_for_the_copy_of_its_own_batch_alone(files, monkeypatch):
    """The next one is on its way by then; torch's streams are played here."""
    log = []
    side = SimpleNamespace(record_event=lambda: log.append("event") or len(log))
    main = SimpleNamespace(name="main", wait_event=lambda event: log.append(f"wait {event}"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    loader = batches(photos(files))
    loader._side = side
    for k, (_, _, rows) in enumerate(
        loader._ahead((Sent(f"x{k}", log), Sent(f"y{k}", log), k) for k in range(3))
    ):
        assert rows == k
        log.append(f"step {k}")
    first, second, third = (k + 1 for k, what in enumerate(log) if what == "event")
    assert log == [
        *("copy x0", "copy y0", "event", "copy x1", "copy y1", "event"),
        *(f"wait {first}", "x0 until main", "y0 until main", "step 0"),
        *("copy x2", "copy y2", "event"),
        *(f"wait {second}", "x1 until main", "y1 until main", "step 1"),
        *(f"wait {third}", "x2 until main", "y2 until main", "step 2"),
    ]


def test_a_photograph_shown_twice_in_an_epoch_is_shown_in_two_views(files):
    source = photos(files)
    source.labels[:] = [0] + [1] * (len(source) - 1)  # one photograph for half of the epoch
    loader = batches(source, balanced=True)
    pairs = [p for xs, _, rows in loader.epoch(0) for p in zip(xs, rows, strict=True)]
    shown = [image for image, row in pairs if int(row) == 0]
    assert len(shown) >= len(source) // 2
    assert all(not torch.equal(a, b) for k, a in enumerate(shown) for b in shown[:k])
    whole, rest = list(loader.epoch(0)), list(loader.epoch(0, start=1))
    assert equal(whole[1:], rest)


@given(order=st.lists(st.integers(0, 5), max_size=30))
def test_times_before_counts(order):
    expected = [order[:k].count(row) for k, row in enumerate(order)]
    assert times_before(np.array(order, np.int64)).tolist() == expected
