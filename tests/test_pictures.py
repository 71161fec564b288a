"""Pictures kept in memory change no bit, whoever decodes them and however few have room."""

import hashlib
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vitft.errors import DataError
from vitft.images import DecodeSpec
from vitft.inputs import InputConfig, augmented, plain
from vitft.learn import Hooks, learn
from vitft.loaders import Batches
from vitft.photos import Photos
from vitft.pictures import Pictures
from vitft.prepare import prepare
from vitft.workers import thread_count

CPU = torch.device("cpu")
CONFIG = InputConfig((16, 16), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bicubic", 0.9)
N, SIZE = 11, 60 * 45 * 3
TRANSFORMS = {
    "crops": augmented(CONFIG, SimpleNamespace(augment="tutorial", reprob=0.3)),
    "policy": augmented(CONFIG, SimpleNamespace(augment="rand-m9-mstd0.5-inc1", reprob=0.0)),
    "fast": augmented(CONFIG, SimpleNamespace(augment="tutorial", reprob=0.0), resize="fast"),
    "plain": plain(CONFIG),
}


@pytest.fixture
def files(tmp_path):
    """11 small photographs of random colours, two of them turned by EXIF."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i:02d}.jpg" for i in range(N)]
    for i, path in enumerate(paths):
        exif = Image.Exif()
        exif[0x0112] = 6 if i in (2, 7) else 1
        noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        noise.resize((60, 45), Image.Resampling.BICUBIC).save(path, exif=exif)
    return paths


def photos(files, transform, room=None, kind=Photos, decode=None):
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    decode = decode or DecodeSpec()
    return kind(files, np.arange(N), sums, decode=decode, transform=transform, seed=3, keep=room)


def batches(source, workers=0):
    return Batches(source, batch_size=4, seed=3, shuffle=True, device=CPU, workers=workers)


def equal(a, b):
    pairs = zip(list(a), list(b), strict=True)
    return all(torch.equal(p, q) for x, y in pairs for p, q in zip(x, y, strict=True))


# ---- the places ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_rows_have_places_as_far_as_the_budget_reaches(shared):
    room = Pictures([12, 24, 6, 48], 45, shared=shared)
    assert (room.count, room.room) == (3, 42)
    arrays = [np.full(shape, k + 1, np.uint8) for k, shape in enumerate([(2, 2, 3), (2, 4, 3)])]
    assert all(room.get(row) is None for row in range(4))
    for row, array in enumerate(arrays):
        room.put(row, array)
    for row, array in enumerate(arrays):
        np.testing.assert_array_equal(room.get(row), array)
    room.put(2, np.zeros((1, 3, 3), np.uint8))  # more than was said
    room.put(3, np.zeros((4, 4, 3), np.uint8))  # past the budget
    assert room.get(2) is None
    assert room.get(3) is None
    room._shapes[2] = torch.tensor([1, 2, 0])  # as seen in the midst of another process's writing
    assert room.get(2) is None
    np.testing.assert_array_equal(room.get(1), arrays[1])
    assert Pictures([12], 11, shared=shared).get(0) is None


# ---- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("places", [N, 5])
def test_batches_are_the_same_to_the_bit_with_pictures_kept(files, name, places):
    transform = TRANSFORMS[name]
    size = 3 * 16 * 16 if name == "plain" else SIZE
    room = Pictures([size] * N, size * places, shared=False)
    kept, anew = batches(photos(files, transform, room)), batches(photos(files, transform))
    for epoch in range(3):
        assert equal(kept.epoch(epoch), anew.epoch(epoch))
        assert equal(kept.epoch(epoch, start=1), anew.epoch(epoch, start=1))
    assert [room.get(row) is not None for row in range(N)] == [row < places for row in range(N)]


def test_the_fast_decoder_fills_places_with_the_same_pixels(files):
    pytest.importorskip("simplejpeg", reason="the fast decoder needs it")
    room, fast = Pictures([SIZE] * N, SIZE * N, shared=False), DecodeSpec(decoder="fast")
    kept = batches(photos(files, TRANSFORMS["crops"], room, decode=fast))
    anew = batches(photos(files, TRANSFORMS["crops"]))
    for epoch in range(2):
        assert equal(kept.epoch(epoch), anew.epoch(epoch))


def test_what_is_kept_is_not_read_again_and_the_rest_is(files):
    room = Pictures([SIZE] * N, SIZE * 5, shared=False)
    loaded = batches(photos(files, TRANSFORMS["crops"], room))
    before = list(loaded.epoch(0))
    for path in files[:5]:
        path.unlink()
    assert equal(loaded.epoch(0), before)
    files[8].unlink()
    with pytest.raises(DataError, match=r"08.jpg"):
        list(loaded.epoch(0))


@pytest.mark.skipif(not shutil.which("true"), reason="needs POSIX")
def test_workers_share_the_places_and_one_that_dies_leaves_no_half_picture(files, tmp_path):
    class Dying(Photos):
        def __getitem__(self, key):
            if key == (1, 6) and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(key)

    mark = tmp_path / "died"
    room = Pictures([SIZE] * N, SIZE * N, shared=True)
    want = [list(batches(photos(files, TRANSFORMS["crops"])).epoch(e)) for e in range(3)]
    loaded = batches(photos(files, TRANSFORMS["crops"], room, kind=Dying), workers=2)
    assert equal(loaded.epoch(0), want[0])
    assert all(room.get(row) is not None for row in range(N))
    for path in files:
        path.unlink()
    assert equal(loaded.epoch(1), want[1])
    assert mark.exists()
    assert equal(loaded.epoch(2), want[2])
    loaded.close()


# ---- threads ------------------------------------------------------------------------------------


def test_threads_change_no_bit_and_are_not_used_where_all_would_draw_from_one_generator(
    files, monkeypatch
):
    for name, transform in TRANSFORMS.items():
        source = photos(files, transform)
        want = [list(batches(source).epoch(e)) for e in range(2)]
        monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
        assert thread_count(0, source) == (1 if name == "policy" else 5)
        assert thread_count(2, source) == 1
        for epoch in range(2):
            assert equal(batches(source).epoch(epoch), want[epoch])
        monkeypatch.undo()


def test_an_error_in_a_thread_names_its_file(files, monkeypatch):
    source = photos(files, TRANSFORMS["crops"])
    files[3].write_bytes(b"else")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with pytest.raises(DataError, match=r"data.changed\].*03.jpg"):
        list(batches(source).epoch(0))


# ---- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [("full",), ("head", "head.views=online"), ("full", "augment")])
def test_a_run_is_the_same_whatever_memory_it_may_take(tiny_recipe, caplog, mode):
    caplog.set_level("INFO")
    more = [o.replace("augment", "train.augment=plain") for o in mode[1:]]
    ends, told = [], []
    for gb in ("0", "0.0001", "2"):
        caplog.clear()
        p = prepare(tiny_recipe(mode[0], f"train.pictures_gb={gb}", *more))
        learn(p, Hooks())
        ends.append(p.net.state_dict())
        told.append([r.getMessage() for r in caplog.records if "stay decoded" in r.getMessage()])
    for end in ends[1:]:
        assert all(torch.equal(end[k], tensor) for k, tensor in ends[0].items())
    assert told[0] == []
    assert told[1][0].startswith("photographs: ")
    assert "the others are read in every epoch" in told[1][0]
    assert told[2][0].startswith("photographs: 42 of 42 stay decoded in memory (0.00 GB; train.p")
