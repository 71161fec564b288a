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
from test_shards import CLASSES, samples, write_parquet, write_tar, write_wds

from vitft import (
    addresses,
    afar,
    ahead,
    columns,
    containers,
    data,
    images,
    offline,
    recipe,
    verify,
    wire,
)
from vitft.containers import Piece
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
    monkeypatch.setattr(wire, "PAUSE", 0.01)
    write_wds(tmp_path / "shards", tiny_photos)
    with serving(tmp_path / "shards") as found:
        yield found


@pytest.fixture
def small(monkeypatch):
    """Pieces of 4 KiB, which hold about four photographs, and two of them in a window."""
    monkeypatch.setattr(afar, "PIECE", 4096)
    monkeypatch.setattr(ahead, "WINDOW", 2 * 4096)


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
    room = 10 * afar.PIECE  # a window, what is fetched before it is wanted, and some to spare
    monkeypatch.setattr(afar, "ROOM", room)
    monkeypatch.setattr(ahead, "AHEAD", 2 * 4096)
    server.asked.clear()
    batches = Batches(photos, batch_size=4, seed=0, shuffle=True, device=torch.device("cpu"))
    rows = [row for _, _, which in batches.epoch(0) for row in which.tolist()]
    assert sorted(rows) == list(range(60))
    assert rows != list(epoch_rows(photos.labels, 0, 0))  # more than a window
    spans = [(path, *map(int, span[6:].split("-"))) for path, span in fetched(server)]
    whole = [s for s in spans if s[1] % afar.PIECE == 0 and (s[2] + 1) % afar.PIECE == 0]
    assert len(whole) == len(set(whole))
    kept = sum(f.stat().st_size for f in (afar._home() / "pieces").glob("*.bytes"))
    at_once = ahead.CONNECTIONS + 1  # each may write when all have made room
    assert 0 < kept <= room + at_once * (afar.PIECE + afar.TAIL)


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


def held_of(places: list[int], size: int = 1) -> ahead.Pieces:
    """Photographs of one file, by the number of the piece of each."""
    numbers, of = np.unique(np.array(places), return_inverse=True)
    where = tuple(Piece(Path("a.tar"), int(k), size) for k in numbers)
    return ahead.Pieces(of.astype(np.int64), where)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=400), st.integers(0, 9), st.booleans())
def test_windows_keep_the_rows_and_part_no_piece(places, epoch, twice):
    """Compared with the definition: pieces by turns, and the given order within a window."""
    held = held_of(places)
    order = np.random.default_rng(epoch).permutation(len(places)).astype(np.int64)
    if twice:
        order = np.concatenate([order, order[::-1]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "WINDOW", 16)
        found = ahead.in_windows(order, held, 5, epoch)
    assert sorted(found) == sorted(order)
    pieces = list(dict.fromkeys(held.of[found].tolist()))  # by first use
    windows = [pieces[k : k + 16] for k in range(0, len(pieces), 16)]
    wanted = [row for inside in windows for row in order if held.of[row] in set(inside)]
    assert found.tolist() == wanted


def test_windows_draw_their_pieces_from_everywhere_and_anew():
    held = held_of(list(range(640)) * 3)
    order = np.arange(1920)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "WINDOW", 64)
        firsts = [ahead.in_windows(order, held, 0, epoch)[: 3 * 64] for epoch in range(2)]
    one, two = (set(held.of[rows].tolist()) for rows in firsts)
    assert len(one) == len(two) == 64
    assert len(one & two) < 20  # 6.4 expected
    assert min(one) < 64
    assert max(one) >= 576


def test_windows_are_measured_in_bytes():
    """Sizes 5 of 10: two a window, however they are drawn."""
    held = held_of([0, 1, 2, 3, 4], size=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "WINDOW", 10)
        found = ahead.in_windows(np.array([4, 3, 2, 1, 0]), held, 0, 0)
    assert all(found[k] > found[k + 1] for k in (0, 2))


def test_pieces_come_in_the_order_in_which_steps_want_them():
    held = held_of([2, 0, 1, 0, 2, 3])
    steps = [np.array([1, 3]), np.array([], np.int64), np.array([0, 2]), np.array([5, 4])]
    pieces, wanted = ahead._plan(held, steps)
    assert pieces.tolist() == [0, 2, 1, 3]
    assert wanted.tolist() == [0, 2, 2, 3]


def test_no_more_is_fetched_than_will_soon_be_wanted(monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(containers, "fetch", lambda piece: calls.append(piece.number))
    monkeypatch.setattr(ahead, "AHEAD", 20)
    held = held_of(list(range(9)), size=10)
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


# -- tables ---------------------------------------------------------------------------------------


@pytest.fixture
def tables(tmp_path, tiny_photos, monkeypatch):
    """Two Parquet files of 40 and 20 photographs, in groups of 7, served like the hub's."""
    pytest.importorskip("pyarrow")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(wire, "PAUSE", 0.01)
    found = samples(tiny_photos)
    order = np.random.default_rng(0).permutation(len(found))
    rows = [(found[i][0], CLASSES.index(found[i][1])) for i in order]
    home = tmp_path / "hub" / "datasets" / "me" / "plants" / "resolve" / "main" / "data"
    write_parquet(home / "train-00000-of-00001.parquet", rows[:40])
    write_parquet(home / "test-00000-of-00001.parquet", rows[40:])
    with serving(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url("").rstrip("/"))
        server.home = home
        yield server


@pytest.mark.parametrize("mode", ["probe", "full"])
def test_a_run_on_tables_of_the_hub_is_that_on_the_folder(tables, tiny_recipe, tmp_path, mode):
    """The order goes by contents and splits alone; named files, so that no listing is asked for."""
    named = "{train,test}-00000-of-00001.parquet"
    root = f"hf://datasets/me/plants/data/{named}"
    more = ["data.split=stratified", *(["train.epochs=2"] if mode == "full" else [])]
    there = run(tiny_recipe(mode, f"data.root={root}", *more))
    here = run(tiny_recipe(mode, f"data.root={tables.home}", "data.source=hfds", *more))
    workers = "train.workers=2"
    again = run(tiny_recipe(mode, f"data.root={tables.home}", "data.source=hfds", workers, *more))
    for other in (here, again):
        a, b = tensors(there.folder), tensors(other.folder)
        assert all(torch.equal(a[k], b[k]) for k in a)
    said = [(r.folder / "predictions.csv").read_bytes() for r in (there, here, again)]
    assert said[0] == said[1] == said[2]
    assert [check for check in verify.verify(there.folder) if not check.ok] == []
    assert "data:image/" in (there.folder / "report.html").read_text()


def test_tables_hold_the_data_set_of_the_folder(tables, tiny_photos):
    spec = DataSpec(root=str(tables.home), source="hfds", split="stratified")
    found, folder = data.scan(spec, seed=0), scan(tiny_photos)
    rows = zip(found.sha256, found.labels.tolist(), found.split, strict=True)
    assert sorted(rows) == sorted(
        zip(folder.sha256, folder.labels.tolist(), folder.split, strict=True)
    )
    assert found.classes == CLASSES


def test_the_hub_is_asked_for_the_files_of_a_data_set(tables, monkeypatch):
    def listed(self, repo, **asked):
        assert (repo, asked["repo_type"], asked["revision"]) == ("me/plants", "dataset", "main")
        return ["README.md", *(f"data/{f.name}" for f in sorted(tables.home.iterdir()))]

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", listed)
    index = scan(offline.data_root("hf://datasets/me/plants"))
    assert (len(index.rows("train")) + len(index.rows("val")), len(index.rows("test"))) == (40, 20)


@pytest.mark.parametrize(
    ("files", "words", "remedy"),
    [
        (["a/train.parquet", "b/train.parquet"], "several sets: a, b", "hf://datasets/me/plants/a"),
        (["README.md"], "neither .parquet nor .tar", "download it"),
    ],
)
def test_a_data_set_of_the_hub_that_is_unclear_is_refused(
    tables, monkeypatch, files, words, remedy
):
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *a, **k: files)
    with pytest.raises(RecipeError) as caught:
        offline.data_root("hf://datasets/me/plants")
    id, text, fix = refusal(caught.value)
    assert id == "data.address"
    assert words in text
    assert remedy in fix


def test_a_hub_without_an_answer_is_said(tables, monkeypatch):
    def silent(*args, **asked):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", silent)
    with pytest.raises(MachineError, match="no route to host") as caught:
        offline.data_root("hf://datasets/me/plants")
    assert refusal(caught.value)[0] == "env.unreachable"


def test_a_data_set_that_the_hub_has_not_is_said(tables, monkeypatch):
    """The hub's own library meets the server's 404."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(DataError) as caught:
        offline.data_root("hf://datasets/me/trees")
    assert refusal(caught.value)[0] == "data.root_missing"


def test_a_group_is_read_once_and_holds_every_picture(tables, tiny_photos):
    file = tables.home / "train-00000-of-00001.parquet"
    index = data.scan(DataSpec(root=str(file)), seed=0)
    places = [containers.piece(path) for path in map(index.file, range(40))]
    assert [p.number for p in places] == [k // 7 for k in range(40)]
    known = {images.read_bytes(path) for path in tiny_photos.rglob("*.jpg")}
    assert {images.read_bytes(index.file(k)) for k in range(40)} < known
    assert containers.exists(index.file(0))
    assert not containers.exists(file / "40")
    assert columns.read(file, "3", 10) is None
    with pytest.raises(FileNotFoundError):
        columns.read(file, "40", 10**6)


def test_rows_and_files_that_hold_no_picture_are_said(tmp_path, tiny_photos, tables):
    found = samples(tiny_photos)
    rows = [(None if k == 1 else b"" if k == 2 else found[k][0], k % 3) for k in range(6)]
    file = write_parquet(tmp_path / "odd.parquet", rows)
    with pytest.raises(DataError, match="row 1 holds no picture") as caught:
        images.read_bytes(file / "1")
    assert refusal(caught.value)[0] == "data.shard"
    with pytest.raises(DataError, match="0 bytes"):
        images.read_bytes(file / "2")
    whole = file.read_bytes()
    for cut in (whole[:-5], whole[: len(whole) // 2], b"no table at all" * 20):
        (tmp_path / "cut.parquet").write_bytes(cut)
        with pytest.raises(DataError) as caught:
            scan(tmp_path / "cut.parquet")
        id, text, fix = refusal(caught.value)
        assert (id, fix) == ("data.shard", "copy the file again, or write it anew")
        assert "is no whole Parquet file" in text
    damaged = bytearray(whole)
    damaged[100:400] = bytes(300)
    (tmp_path / "cut.parquet").write_bytes(damaged)
    with pytest.raises(DataError):
        scan(tmp_path / "cut.parquet")


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
    assert addresses.expand(text, "here") == said.stdout.split()


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
        ("hf://me/plants/a.tar", "names no data set of the hub", "hf://datasets/OWNER/NAME"),
    ],
)
def test_addresses_that_are_none_are_said_without_a_network(root, words, remedy, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(RecipeError) as caught:
        offline.data_root(root)
    id, text, fix = refusal(caught.value)
    assert id == "data.address"
    assert words in text
    assert remedy in fix
    assert "secret" not in str(caught.value)


def test_a_recipe_keeps_an_address_as_it_is(tiny_recipe):
    assert tiny_recipe("probe", "data.root=https://host/a.tar").data.root == "https://host/a.tar"
