"""Features are computed once, found by content, and never believed when damaged."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from vitft import features, store
from vitft.errors import VitftError
from vitft.evaluate import fixed_batch, in_fixed_shape
from vitft.features import Views, extract, head_logits
from vitft.images import DecodeSpec
from vitft.inputs import TransformSpec
from vitft.photos import Photos
from vitft.store import Space, make_key

PLAIN = TransformSpec("plain", (32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}
    return timm.create_model("vitflower_ti16", num_classes=3, **options).eval()


def photos(files, *, transform=PLAIN, decode=None, seed=0):
    sha = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    labels = np.arange(len(files)) % 3
    decode = decode or DecodeSpec()
    return Photos(files, labels, sha, decode=decode, transform=transform, seed=seed)


def run(net, p, *, views=1, key="k", dtype="float32"):
    return extract(net, p, views=views, device=CPU, backbone_key=key, dtype=dtype, workers=0)


@pytest.fixture
def files(tiny_photos):
    return sorted(tiny_photos.rglob("*.jpg"))


def test_the_head_on_cached_features_is_the_model(net, files):
    p = photos(files)
    rows = run(net, p)
    assert rows.x.shape == (1, 60, 32)
    images = torch.stack([p[(0, i)][0] for i in range(60)])
    x = images.float().sub(127.5).div(127.5)
    with torch.inference_mode():
        direct = torch.cat([in_fixed_shape(net, part) for part in x.split(fixed_batch(CPU))])
    logits = head_logits(net.get_classifier(), rows.x[0], CPU)
    np.testing.assert_allclose(logits, direct.numpy(), atol=1e-6)
    np.testing.assert_array_equal(run(net, p).x, rows.x)


def test_a_second_call_computes_nothing_in_any_order_or_split(net, files):
    first = run(net, photos(files))
    assert (first.computed, first.reused) == (60, 0)
    again = run(net, photos(files[::-1][:20]))
    assert (again.computed, again.reused) == (0, 20)
    np.testing.assert_array_equal(again.x[0], first.x[0][::-1][:20])


def test_a_renamed_file_is_found_and_an_edited_one_is_computed_again(net, files):
    run(net, photos(files))
    moved = files[0].with_name("renamed.jpg")
    files[0].rename(moved)
    os.utime(files[1])
    data, status = files[2].read_bytes(), files[2].stat()
    files[2].write_bytes(data + b"\0")
    os.utime(files[2], ns=(status.st_atime_ns, status.st_mtime_ns))
    again = run(net, photos([moved, *files[1:]]))
    assert again.computed == 1


def test_X17_two_images_swapped_by_rename_swap_their_features(net, files):
    before = run(net, photos(files)).x[0]
    a, b, spare = files[0], files[1], files[0].with_name("spare.jpg")
    a.rename(spare)
    b.rename(a)
    spare.rename(b)
    after = run(net, photos(files))
    assert after.computed == 0
    np.testing.assert_array_equal(after.x[0][:2], before[:2][::-1])


def test_equal_files_are_computed_once(net, files):
    twin = files[0].with_name("twin.jpg")
    twin.write_bytes(files[0].read_bytes())
    rows = run(net, photos([files[0], twin]))
    assert rows.computed == 1
    np.testing.assert_array_equal(rows.x[0][0], rows.x[0][1])


AUGMENTED = replace(PLAIN, kind="augmented")


@pytest.mark.parametrize(
    "change",
    [
        {"key": "other weights"},
        {"dtype": "float16"},
        {"transform": replace(PLAIN, size=(32, 32), crop_pct=0.9)},
        {"transform": replace(PLAIN, mean=(0.4,) * 3)},
        {"transform": replace(PLAIN, interpolation="bicubic")},
        {"decode": DecodeSpec(background=(0, 0, 0))},
        {"decode": DecodeSpec(icc="to_srgb")},
    ],
    ids=str,
)
def test_X18_whatever_can_change_a_row_is_in_its_key(net, files, change):
    run(net, photos(files[:3]))
    p = photos(files[:3], **{k: v for k, v in change.items() if k in ("transform", "decode")})
    rest = {k: v for k, v in change.items() if k in ("key", "dtype")}
    assert run(net, p, **rest).computed == 3


def test_the_seed_counts_only_where_something_is_drawn(net, files):
    run(net, photos(files[:3], seed=1))
    assert run(net, photos(files[:3], seed=2)).computed == 0
    run(net, photos(files[:3], transform=AUGMENTED, seed=1), views=2)
    assert run(net, photos(files[:3], transform=AUGMENTED, seed=1), views=3).computed == 3
    assert run(net, photos(files[:3], transform=AUGMENTED, seed=2), views=2).computed == 6


def test_views_differ_and_do_not_depend_on_the_company(net, files):
    whole = run(net, photos(files[:5], transform=AUGMENTED), views=2, key="a")
    alone = run(net, photos(files[4:5], transform=AUGMENTED), views=2, key="b")
    assert not np.array_equal(whole.x[0], whole.x[1])
    np.testing.assert_array_equal(whole.x[:, 4], alone.x[:, 0])


def test_float16_storage_comes_back_as_float32_close_by(net, files):
    exact, half = run(net, photos(files[:6])), run(net, photos(files[:6]), dtype="float16")
    assert half.x.dtype == np.float32
    np.testing.assert_allclose(half.x, exact.x, rtol=2e-3, atol=1e-3)
    assert not np.array_equal(half.x, exact.x)


@pytest.mark.parametrize("where", [0, 20, 41, 60, 200, -1])
def test_X15_a_flipped_byte_is_noticed_and_the_rows_computed_again(net, files, where, capsys):
    before = run(net, photos(files[:8])).x
    (shard,) = store.features_dir().rglob("*.shard")
    data = bytearray(shard.read_bytes())
    data[where] ^= 1
    shard.write_bytes(data)
    again = run(net, photos(files[:8]))
    assert again.computed == 8
    np.testing.assert_array_equal(again.x, before)
    assert run(net, photos(files[:8])).computed == 0


@pytest.mark.parametrize("keep", [0, 10, 50, 500])
def test_X15_a_truncated_shard_is_noticed(net, files, keep, caplog):
    run(net, photos(files[:8]))
    (shard,) = store.features_dir().rglob("*.shard")
    shard.write_bytes(shard.read_bytes()[:keep])
    with caplog.at_level("WARNING", logger="vitft"):
        assert run(net, photos(files[:8])).computed == 8
    assert f"cached features {shard} are damaged" in caplog.text


def test_many_small_shards_become_one(tmp_path):
    rng = np.random.default_rng(0)
    rows = {
        make_key(hashlib.sha256(bytes([i])).hexdigest(), 0): rng.random(4, "f4") for i in range(40)
    }
    for key, row in rows.items():
        Space({}, "float32", tmp_path).put({key: row})
    space = Space({}, "float32", tmp_path)
    space.merge()
    assert len(list(space.folder.glob("*.shard"))) == 1
    fresh = Space({}, "float32", tmp_path)
    for key, row in rows.items():
        np.testing.assert_array_equal(fresh.get(key), row)
    assert store.spaces(tmp_path)[0].rows == 40


FILL = """
import hashlib, sys, numpy as np
from pathlib import Path
from vitft.store import Space, make_key
space = Space({}, "float32", Path(sys.argv[1]))
for i in range(int(sys.argv[2]), int(sys.argv[3])):
    key = make_key(hashlib.sha256(str(i).encode()).hexdigest(), 0)
    space.put({key: np.full(256, i, dtype=np.float32)})
    print(i, flush=True)
    if i % 20 == 19:
        space.merge()
"""


def filler(root: Path, first: int, last: int) -> subprocess.Popen:
    code = "import standalone\n" + FILL
    return subprocess.Popen(
        [sys.executable, "-c", code, str(root), str(first), str(last)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )


def rows_of(root: Path) -> dict[int, bool]:
    space = Space({}, "float32", root)
    out = {}
    for i in range(400):
        key = make_key(hashlib.sha256(str(i).encode()).hexdigest(), 0)
        if key in space:
            out[i] = bool((space.get(key) == i).all())
    return out


def test_X19_two_processes_fill_one_space_at_once(tmp_path):
    both = [filler(tmp_path, 0, 60), filler(tmp_path, 30, 90)]
    for process in both:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert rows_of(tmp_path) == dict.fromkeys(range(90), True)


def test_a_shard_that_another_process_merges_away_while_it_is_opened_is_whole(
    tmp_path, monkeypatch
):
    """What was mapped stays; opening the file a second time would not find it."""
    keys = [make_key(hashlib.sha256(str(i).encode()).hexdigest(), 0) for i in range(3)]
    Space({}, "float32", tmp_path).put({k: np.full(5, i) for i, k in enumerate(keys)})
    first = np.memmap

    def gone(path, **options):
        opened = first(path, **options)
        path.unlink()
        return opened

    monkeypatch.setattr(np, "memmap", gone)
    space = Space({}, "float32", tmp_path)
    assert all((space.get(k) == i).all() for i, k in enumerate(keys))


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.nightly)])
def test_a_killed_run_keeps_every_row_it_acknowledged(tmp_path, kills):
    rng = np.random.default_rng(7)
    for trial in range(kills):
        root = tmp_path / str(trial)
        process = filler(root, 0, 400)
        process.stdout.readline()
        time.sleep(float(rng.uniform(0, 0.25)))
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[0].split()
        found = rows_of(root)
        assert all(found.values())
        assert {0, *map(int, said)} <= found.keys()


def test_a_model_whose_head_does_not_read_its_features_is_refused(net, files):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3, 2)

        def forward_features(self, x):
            return x.mean((2, 3))

        def forward_head(self, x, pre_logits=False):
            return x if pre_logits else self.head(x) + 1

        def forward(self, x):
            return self.forward_head(self.forward_features(x))

        def get_classifier(self):
            return self.head

    with pytest.raises(VitftError, match=r"model.features\] Odd: .*relative difference"):
        run(Odd(), photos(files[:2]))


def test_views_draw_one_view_per_photograph_by_seed_and_epoch(net, files):
    cached = features.Features(
        np.arange(3 * 10 * 2, dtype=np.float32).reshape(3, 10, 2), np.arange(10), 0, 30, 0.0
    )

    def epoch(seed, number, start=0):
        views = Views(cached, batch_size=4, seed=seed, device=CPU, names=files)
        assert len(views) == 3
        return [tuple(t.tolist() for t in batch) for batch in views.epoch(number, start)]

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)
    assert epoch(0, 3, start=1) == epoch(0, 3)[1:]
    rows = [r for batch in epoch(0, 0) for r in batch[2]]
    assert sorted(rows) == list(range(10))
    for x, y, which in epoch(0, 0):
        for values, label, row in zip(x, y, which, strict=True):
            assert label == row
            assert values in cached.x[:, row].tolist()


def test_the_key_of_a_space_does_not_change_by_accident(tmp_path):
    space = Space({"backbone": "b", "transform": "t"}, "float32", tmp_path)
    text = '{"backbone": "b", "dtype": "float32", "format": 1, "transform": "t"}'
    assert space.folder.name == hashlib.sha256(text.encode()).hexdigest()[:32]


@pytest.mark.parametrize("threads", [1, 2])
def test_photographs_decoded_in_threads_give_the_same_rows(net, files, threads, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = run(net, photos(files[:20]), key=f"{threads} threads")
    finally:
        torch.set_num_threads(before)
    assert rows.computed == 20
    assert np.isfinite(rows.x).all()
