"""Shards on a server: the same run as from a disk, each piece fetched once, every refusal said."""

import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from far import serving
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import tensors
from test_shards import write_tar, write_wds

from vitft import afar, ahead, containers, data, images, offline, recipe
from vitft.errors import DataError, MachineError, RecipeError, VitftError
from vitft.inputs import InputConfig, epoch_rows, plain
from vitft.loaders import Batches
from vitft.photos import Photos
from vitft.run import run
from vitft.schema import DataSpec

SHARDS = "shard-{0000..0002}.tar"


@pytest.fixture
def server(tmp_path, tiny_photos, monkeypatch):
    """Three shards of 25, 25 and 10 photographs, with the network allowed."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("VITFT_OFFLINE", raising=False)
    monkeypatch.setattr(afar, "PAUSE", 0.01)
    write_wds(tmp_path / "shards", tiny_photos)
    with serving(tmp_path / "shards") as found:
        yield found


@pytest.fixture
def small(monkeypatch):
    """Pieces of 4 KiB, which hold about four photographs, and two of them in a window."""
    monkeypatch.setattr(afar, "PIECE", 4096)
    monkeypatch.setattr(ahead, "WINDOW", 2)


def scan(root: Path) -> data.Index:
    return data.scan(DataSpec(root=str(root)), seed=0)


def photos_of(index: data.Index) -> Photos:
    config = InputConfig((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
    files = [index.file(k) for k in range(len(index.paths))]
    return Photos(
        files, index.labels, index.sha256,
        decode=images.DecodeSpec(), transform=plain(config, "timm"), seed=0,
    )  # fmt: skip


def fetched(server) -> list[tuple[str, str]]:
    """The parts that were asked for, without looking files up."""
    return [(path, span) for path, span in server.asked if span not in ("", "bytes=0-0")]


def refusal(error: VitftError) -> tuple[str, str, str]:
    (fault,) = error.faults
    return fault.id, fault.text, fault.fix


# -- the same run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["probe", "full"])
def test_a_run_from_afar_is_that_from_the_disk(server, tiny_recipe, tmp_path, mode):
    """What fits into one window is in the order it would have on a disk: equal to the bit."""
    url = server.url(SHARDS)
    more = ["train.epochs=2"] if mode == "full" else []
    there = run(tiny_recipe(mode, f"data.root={url}", *more))
    assert len(fetched(server)) == 3  # each shard, whole, once
    root = f"data.root={tmp_path / 'shards'}"
    here = run(tiny_recipe(mode, root, "data.source=wds", *more))
    names = ("predictions.csv", "split.csv")
    assert all((there.folder / n).read_bytes() == (here.folder / n).read_bytes() for n in names)
    a, b = tensors(there.folder), tensors(here.folder)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert "data:image/" in (there.folder / "report.html").read_text()
    assert recipe.of_run(there.folder).data.root == url


def test_workers_and_small_pieces_change_nothing(server, small, tiny_recipe):
    more = [f"data.root={server.url(SHARDS)}", "train.epochs=2"]
    one = run(tiny_recipe("full", *more))
    two = run(tiny_recipe("full", *more, "train.workers=2"))
    a, b = tensors(one.folder), tensors(two.folder)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_second_scan_reads_no_photograph(server):
    root = server.url(SHARDS)
    first = scan(offline.data_root(root))
    shutil.rmtree(afar._home() / "pieces")
    containers._far_members.cache_clear()
    server.asked.clear()
    second = scan(offline.data_root(root))
    assert first.sha256 == second.sha256
    assert fetched(server) == []


def test_a_shard_that_changed_between_two_runs_is_read_anew(server, tmp_path):
    """Five photographs fewer, under the old name."""
    root = server.url(SHARDS)
    first = scan(offline.data_root(root))
    parts = containers.members(afar.place(root) / "shard-0002.tar").spans
    file = tmp_path / "shards" / "shard-0002.tar"
    body = file.read_bytes()
    kept = {n: body[a : a + k] for n, (a, k) in list(parts.items())[:10]}
    write_tar(file, kept)
    second = scan(offline.data_root(root))
    assert len(second.paths) == 55
    assert set(second.sha256) < set(first.sha256)


def test_class_names_beside_the_shards_are_fetched(server, tmp_path, tiny_photos):
    order = ("blue", "green", "red")
    write_wds(
        tmp_path / "shards", tiny_photos, lambda name: {"cls": str(order.index(name)).encode()}
    )
    (tmp_path / "shards" / "classes.txt").write_text("sky\ngrass\nfire\n")
    assert scan(offline.data_root(server.url(SHARDS))).classes == ("sky", "grass", "fire")


def test_the_split_is_by_the_names_of_the_shards(server, tmp_path):
    folder = tmp_path / "shards"
    for old, new in (("0000", "train/0.tar"), ("0001", "train/1.tar"), ("0002", "val/0.tar")):
        (folder / new).parent.mkdir(exist_ok=True)
        (folder / f"shard-{old}.tar").rename(folder / new)
    index = scan(offline.data_root(server.url("{train/{0,1},val/0}.tar")))
    assert (len(index.rows("train")), len(index.rows("val"))) == (50, 10)


# -- order and pieces -----------------------------------------------------------------------------


def test_an_epoch_has_every_photograph_once_and_fetches_no_piece_twice(server, small, monkeypatch):
    photos = photos_of(scan(offline.data_root(server.url(SHARDS))))
    shutil.rmtree(afar._home() / "pieces")
    room = 6 * afar.PIECE  # a window, and what is fetched before it is wanted
    monkeypatch.setattr(afar, "ROOM", room)
    monkeypatch.setattr(ahead, "AHEAD", 2)
    server.asked.clear()
    batches = Batches(photos, batch_size=4, seed=0, shuffle=True, device=torch.device("cpu"))
    rows = [row for _, _, which in batches.epoch(0) for row in which.tolist()]
    assert sorted(rows) == list(range(60))
    assert rows != list(epoch_rows(photos.labels, 0, 0))  # more than a window
    spans = [(path, *map(int, span[6:].split("-"))) for path, span in fetched(server)]
    whole = [s for s in spans if s[1] % afar.PIECE == 0 and (s[2] + 1) % afar.PIECE == 0]
    assert len(whole) == len(set(whole))
    kept = sum(f.stat().st_size for f in (afar._home() / "pieces").glob("*/data"))
    assert 0 < kept <= room


def test_an_epoch_is_entered_at_any_step(server, small):
    photos = photos_of(scan(offline.data_root(server.url(SHARDS))))
    batches = Batches(photos, batch_size=8, seed=3, shuffle=True, device=torch.device("cpu"))
    whole = [(x, rows) for x, _, rows in batches.epoch(1)]
    tail = [(x, rows) for x, _, rows in batches.epoch(1, start=5)]
    assert len(tail) == len(whole) - 5
    assert all(
        torch.equal(a, c) and torch.equal(b, d)
        for (a, b), (c, d) in zip(whole[5:], tail, strict=True)
    )


@given(st.lists(st.integers(0, 300), min_size=1, max_size=400), st.integers(0, 9), st.booleans())
def test_windows_keep_the_rows_and_part_no_piece(places, epoch, twice):
    """Compared with the definition: sorted by window, in the given order within each."""
    names, of = np.unique(np.array(places), return_inverse=True)
    held = ahead.Pieces(of.astype(np.int64), tuple((Path("a.tar"), int(k)) for k in names))
    order = np.random.default_rng(epoch).permutation(len(places)).astype(np.int64)
    if twice:
        order = np.concatenate([order, order[::-1]])
    found = ahead.in_windows(order, held, 5, epoch)
    assert sorted(found) == sorted(order)
    changes = np.flatnonzero(np.diff(found_windows := _windows(held, found, 5, epoch)))
    assert (np.diff(found_windows) >= 0).all()
    assert len(changes) < -(-len(names) // ahead.WINDOW)
    for window in set(found_windows):
        inside = set(held.of[found[found_windows == window]])
        assert list(found[found_windows == window]) == [r for r in order if held.of[r] in inside]
        assert len(inside) <= ahead.WINDOW


def _windows(held: ahead.Pieces, rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The window of each row, found by pieces' first places."""
    seen: dict[int, int] = {}
    out = []
    for piece in held.of[rows]:
        seen.setdefault(int(piece), len(seen) // ahead.WINDOW)
        out.append(seen[int(piece)])
    return np.array(out)


def test_pieces_come_in_the_order_in_which_steps_want_them():
    held = ahead.Pieces(np.array([2, 0, 1, 0, 2, 3]), tuple((Path("a.tar"), k) for k in range(4)))
    steps = [np.array([1, 3]), np.array([], np.int64), np.array([0, 2]), np.array([5, 4])]
    plan, wanted = ahead._plan(held, steps)
    assert [number for _, number in plan] == [0, 2, 1, 3]
    assert wanted.tolist() == [0, 2, 2, 3]


def test_no_more_is_fetched_than_will_soon_be_wanted(monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(afar, "fetch", lambda file, number: calls.append(number))
    monkeypatch.setattr(ahead, "AHEAD", 2)
    held = ahead.Pieces(np.arange(9), tuple((Path("a.tar"), k) for k in range(9)))
    with ahead.fetching(held, [np.array([k]) for k in range(9)]) as reached:
        _eventually(lambda: len(calls) == 2)
        reached(0)
        _eventually(lambda: len(calls) == 3)
        reached(3)
        _eventually(lambda: len(calls) == 6)
    assert sorted(calls) == [0, 1, 2, 3, 4, 5]


def _eventually(holds) -> None:
    pause = threading.Event()
    for _ in range(200):
        if holds():
            pause.wait(0.02)
            assert holds()
            return
        pause.wait(0.01)
    raise AssertionError("it did not come about")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 21_000), st.integers(0, 9_000)), max_size=6))
def test_any_span_is_the_files(tmp_path_factory, spans):
    home = tmp_path_factory.mktemp("span")
    body = np.random.default_rng(0).bytes(20_000)
    (home / "a.tar").write_bytes(body)
    with pytest.MonkeyPatch.context() as patch, serving(home) as server:
        patch.setenv("VITFT_CACHE", str(home / "cache"))
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.setattr(afar, "PIECE", 4096)
        folder, (far,) = afar.arrive(server.url("a.tar"))
        assert far.size == 20_000
        for start, length in spans:
            assert afar.read(folder / "a.tar", start, length) == body[start : start + length]
        with afar.opened(folder / "a.tar") as handle:
            for start, length in spans:
                handle.seek(start)
                assert handle.read(length) == body[start : start + length]
            assert handle.seek(0, 2) == 20_000


def test_many_who_want_one_piece_fetch_it_once(server, tmp_path):
    folder, _ = afar.arrive(server.url("shard-0000.tar"))
    server.asked.clear()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: afar.fetch(folder / "shard-0000.tar", 0), range(8)))
    assert len(server.asked) == 1


# -- bad manners ----------------------------------------------------------------------------------


def test_an_answer_that_fails_or_ends_early_is_asked_for_again(server, tmp_path):
    server.failures = 2
    folder, _ = afar.arrive(server.url("shard-0000.tar"))
    whole = (tmp_path / "shards" / "shard-0000.tar").read_bytes()
    server.failures, server.cut = 1, len(whole) // 2
    assert afar.read(folder / "shard-0000.tar", 0, len(whole)) == whole


def test_a_server_that_falls_silent_is_said_with_what_came(server):
    folder, (far,) = afar.arrive(server.url("shard-0000.tar"))
    server.failures = 99
    with pytest.raises(MachineError) as caught:
        afar.read(folder / "shard-0000.tar", 0, 100)
    id, text, fix = refusal(caught.value)
    assert id == "env.unreachable"
    assert f"0 of {far.size:,} bytes from 0 on arrived, then: HTTP Error 503" in text
    assert "--resume auto goes on where the run stopped" in fix
    with pytest.raises(MachineError, match="no answer in 4 attempts"):
        afar.arrive(server.url("shard-0000.tar"))


def test_a_file_that_changes_under_the_run_is_said(server):
    folder, _ = afar.arrive(server.url("shard-0000.tar"))
    server.salt = "new"
    with pytest.raises(DataError) as caught:
        afar.read(folder / "shard-0000.tar", 0, 100)
    id, text, fix = refusal(caught.value)
    assert (id, fix) == ("data.changed", "start a new run, which looks at it again")
    assert "is another file by now" in text


def test_without_marks_nothing_is_kept_for_the_next_run(server):
    server.marks = False
    folder, _ = afar.arrive(server.url("shard-0000.tar"))
    first = afar.meant(folder / "shard-0000.tar")
    assert first.mark.startswith("looked up at ")
    assert afar.read(folder / "shard-0000.tar", 0, 3) != b""
    afar.arrive(server.url("shard-0000.tar"))
    assert afar.meant(folder / "shard-0000.tar").mark != first.mark


@pytest.mark.parametrize(
    ("change", "id", "words", "remedy"),
    [
        ({"ranges": False}, "data.shard", "sends whole files only", "use another server"),
        ({"refuse": 404}, "data.root_missing", "answers 404", "correct data.root"),
        ({"refuse": 403}, "data.root_permission", "answers 403", "set HF_TOKEN"),
        ({"refuse": 416}, "data.shard", "is it empty?", "leave it out"),
    ],
)
def test_files_that_cannot_be_used_are_said_all_at_once(server, change, id, words, remedy):
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(DataError) as caught:
        offline.data_root(server.url(SHARDS))
    assert [fault.id for fault in caught.value.faults] == [id] * 3
    assert all(words in fault.text and remedy in fault.fix for fault in caught.value.faults)


def test_a_broken_shard_is_said_as_on_a_disk(server, tmp_path):
    file = tmp_path / "shards" / "shard-0001.tar"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(DataError) as caught:
        scan(offline.data_root(server.url(SHARDS)))
    id, text, _ = refusal(caught.value)
    assert id == "data.shard"
    assert "a damaged header" in text


def test_without_a_network_nobody_is_asked(server, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MachineError, match="switched off by the environment") as caught:
        offline.data_root(server.url(SHARDS))
    assert refusal(caught.value)[0] == "env.unreachable"
    assert server.asked == []


def test_a_token_goes_to_the_hub_alone(server, tmp_path, monkeypatch):
    """The hub sends on to a server of files, which must not learn it."""
    repo = tmp_path / "shards" / "datasets" / "me" / "plants" / "resolve" / "main"
    repo.mkdir(parents=True)
    shutil.copy(tmp_path / "shards" / "shard-0000.tar", repo / "train 0.tar")
    with serving(tmp_path / "shards") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url("").rstrip("/"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        hub.elsewhere = server.url("").rstrip("/")
        folder, (far,) = afar.arrive("hf://datasets/me/plants/train 0.tar")
        assert far.url.endswith("/datasets/me/plants/resolve/main/train%200.tar")
        assert afar.read(folder / "train 0.tar", 0, 9) == (repo / "train 0.tar").read_bytes()[:9]
        assert set(hub.tokens) == {"Bearer hf_secret"}
        assert set(server.tokens) == {None}


# -- addresses ------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash to compare with")
@pytest.mark.parametrize(
    "text",
    [
        "a", "a{b,c}d", "{00..11}", "{0..10}", "{1..010}", "x{a,b}{1..3}", "{a,{b,c}d}e", "{,x}y",
        "{train-{08..11},val-{0..1}}.tar",
    ],
)  # fmt: skip
def test_braces_expand_as_in_a_shell(text):
    said = subprocess.run(["bash", "-c", f"echo {text}"], capture_output=True, text=True)
    assert afar.expand(text, "here") == said.stdout.split()


@pytest.mark.parametrize(
    ("root", "words", "remedy"),
    [
        ("s3://bucket/a.tar", "s3:// is not read; http, https and hf are", "mount it as a folder"),
        ("https://me:secret@host/a.tar", "holds a user or password", "written into reports"),
        ("https://host/photos.zip", "this names .zip", "train-{0000..0031}.tar"),
        ("https://host/photos/", "this names no ending", "train-{0000..0031}.tar"),
        ("https://host/{a,b.tar", "left open", "train-{0000..0031}.tar"),
        ("https://host/a},b.tar", "closed twice", "train-{0000..0031}.tar"),
        ("https://host/{a,a}.tar", "names a file twice", "train-{0000..0031}.tar"),
        ("https://host/x/%2e%2e/a.tar", "leads upwards", "train-{0000..0031}.tar"),
        ("https://host/{9..3}.tar", "names no file", "train-{0000..0031}.tar"),
        ("https://host/{0..99999}{0..9}.tar", "at most 100,000", "make larger shards"),
        ("hf://me/plants/a.tar", "names no file of a data set", "hf://datasets/OWNER/NAME/"),
    ],
)
def test_addresses_that_are_none_are_said_without_a_network(root, words, remedy):
    with pytest.raises(RecipeError) as caught:
        offline.data_root(root)
    id, text, fix = refusal(caught.value)
    assert id == "data.address"
    assert words in text
    assert remedy in fix
    assert "secret" not in str(caught.value)


def test_a_recipe_keeps_an_address_as_it_is(tiny_recipe):
    assert tiny_recipe("probe", "data.root=https://host/a.tar").data.root == "https://host/a.tar"
