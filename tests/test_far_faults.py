"""Servers, disks and addresses at their worst: said, outlived, or never let in."""

import multiprocessing
import os
import re
import shutil
import signal
import time
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from test_afar import SHARDS, fetched, photos_of, refusal, scan, server, small
from test_shards import samples, write_parquet, write_tar

from vitft import (
    addresses,
    afar,
    ahead,
    cache,
    check,
    cli,
    columns,
    containers,
    contents,
    images,
    io,
    offline,
    prepare,
    recipe,
    shards,
    threads,
    wire,
)
from vitft.errors import DataError, MachineError, RecipeError
from vitft.loaders import SLOW_LINE, TIMEOUT, Batches
from vitft.run import run

__all__ = ["server", "small"]  # fixtures
ONE = "shard-0000.tar"


def whole(server, name=ONE) -> bytes:
    return (server.folder / name).read_bytes()


# -- an answer is believed for what it is ---------------------------------------------------------


@pytest.mark.parametrize(
    ("manner", "value"),
    [("more", 500), ("whole", 2), ("cut", 70_000), ("cut", None)],
)
def test_manners_that_are_outlived(server, tmp_path, monkeypatch, manner, value):
    """Of 400 kB, 70 kB a connection are six: none of them was for nothing."""
    monkeypatch.setattr(wire, "PROGRESS", 60_000)
    body = os.urandom(400_000)
    write_tar(tmp_path / "shards" / "big.tar", {"a.jpg": body})
    folder, _ = afar.arrive(server.url("big.tar"))
    setattr(server, manner, value)
    start = containers.members(folder / "big.tar").spans["a.jpg"][0]
    assert afar.read(folder / "big.tar", start, len(body)) == body


@pytest.mark.parametrize(
    ("manner", "value", "words"),
    [
        ("shift", 7, "asked for byte 0 on, it sends bytes 7-"),
        ("whole", 99, "it answers 200 with the whole file"),
        ("headers", {"Content-Encoding": "gzip"}, "or packs it"),
        ("broken", "once", "0 of"),
        ("broken", "headers", "0 of"),
        ("cut", 9, "36 of"),
    ],
)
def test_manners_that_are_refused(server, manner, value, words):
    folder, _ = afar.arrive(server.url(ONE))
    setattr(server, manner, value)
    with pytest.raises(MachineError) as caught:
        afar.read(folder / ONE, 0, 100)
    id, text, _ = refusal(caught.value)
    assert id == "env.unreachable"
    assert words in text
    assert list(afar.pieces_dir().glob("*")) == []


def test_a_server_that_packs_is_told_from_the_start(server):
    server.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(DataError, match="packs what it sends"):
        afar.arrive(server.url(ONE))


def test_a_redirection_without_end_is_said_in_one_line(server):
    server.elsewhere = server.url("").rstrip("/")
    with pytest.raises(DataError) as caught:
        afar.arrive(server.url(ONE))
    id, text, _ = refusal(caught.value)
    assert id == "data.root_missing"
    assert "infinite loop" in text
    assert "\n" not in text


def test_a_line_that_drips_is_cut(server, monkeypatch):
    folder, _ = afar.arrive(server.url(ONE))
    monkeypatch.setattr(wire, "TIMEOUT", 0.1)
    server.drip = 0.02
    with pytest.raises(MachineError, match=r"then: \d+ bytes came in 0 s"):
        afar.read(folder / ONE, 0, 100)


def test_headers_that_drip_are_cut(server, monkeypatch):
    folder, (far,) = afar.arrive(server.url(ONE))
    monkeypatch.setitem(wire.connect.__kwdefaults__, "timeout", 0.1)
    server.drip_headers = 0.02
    fault = wire.look_up(server.url(ONE))
    assert fault.id == "env.unreachable"
    assert re.fullmatch(r"no answer in 4 attempts: \d+ bytes of headers came in 0 s", fault.text)
    with pytest.raises(MachineError, match=r"env.unreachable.*then: \d+ bytes of headers came"):
        afar.read(folder / ONE, 0, 100)
    server.drip_headers = 0.0001  # slow, and in time
    monkeypatch.setitem(wire.connect.__kwdefaults__, "timeout", 5.0)
    assert wire.look_up(server.url(ONE)) == far
    assert afar.read(folder / ONE, 0, 100) == whole(server)[:100]


def test_what_answers_otherwise_than_the_web_does_is_named_after_every_attempt(server, monkeypatch):
    def greet(handler):
        handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")

    monkeypatch.setattr(server.RequestHandlerClass, "do_GET", greet)
    monkeypatch.setattr(server.RequestHandlerClass, "do_HEAD", greet, raising=False)
    fault = wire.look_up(server.url(ONE))
    assert fault.id == "env.unreachable"
    assert fault.text.startswith("no answer in 4 attempts: SSH-2.0-OpenSSH_9.6")


@pytest.mark.parametrize(("date", "kept"), [("Thu, 01 Jan 2026 00:00:00 GMT", True), ("", False)])
def test_mirrors_may_mark_one_file_unlike_where_they_agree_on_its_date(server, date, kept):
    server.date = date
    folder, (far,) = afar.arrive(server.url(ONE))
    server.salt = "mirror"
    if not kept:
        with pytest.raises(DataError, match="another file by now"):
            afar.read(folder / ONE, 0, 100)
        return
    assert afar.read(folder / ONE, 0, 100) == whole(server)[:100]
    assert afar.arrive(server.url(ONE))[1] == (far,)


def test_a_token_is_not_sent_in_clear(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert wire.token("http://huggingface.co/datasets/me/plants/a.tar") == {}
    assert wire.token("https://huggingface.co/datasets/me/plants/a.tar") != {}


# -- what lies beside, and what lay there before --------------------------------------------------


@pytest.mark.parametrize("status", [503, 429])
def test_class_names_that_do_not_come_are_no_silence(server, status):
    """Else the same run would have numbers for names."""
    server.answers["/classes.txt"] = status
    with pytest.raises(MachineError, match=r"classes\.txt: no answer in 4 attempts"):
        afar.arrive(server.url(SHARDS))


def test_a_page_is_no_list_of_class_names(server):
    (server.folder / "classes.txt").write_text("<!doctype html><title>Not here</title>")
    assert scan(offline.data_root(server.url(SHARDS))).classes == ("blue", "green", "red")


def test_class_names_of_another_encoding_are_said(server):
    (server.folder / "classes.txt").write_bytes("blau\ngrün".encode("latin-1"))
    with pytest.raises(DataError, match="is no UTF-8 text"):
        scan(offline.data_root(server.url(SHARDS)))
    (server.folder / "classes.txt").write_bytes("blue\ngreen\nred".encode("utf-8-sig"))
    assert scan(offline.data_root(server.url(SHARDS))).classes[0] == "blue"


def test_a_shard_that_a_data_set_has_no_more_is_not_read_either(server, monkeypatch):
    """A repository of the hub is cut anew; the address stays."""
    names = ["shard-0000.tar", "shard-0001.tar", "shard-0002.tar"]
    monkeypatch.setenv("HF_ENDPOINT", server.url("").rstrip("/"))
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *a, **k: names)
    home = server.folder / "datasets/me/plants/resolve/main"
    home.mkdir(parents=True)
    for name in names:
        shutil.copy(server.folder / name, home / name)
    assert len(scan(offline.data_root("hf://datasets/me/plants")).paths) == 60
    del names[2]
    assert len(scan(offline.data_root("hf://datasets/me/plants")).paths) == 50


def test_an_ending_in_capitals_is_an_ending(server):
    (server.folder / ONE).rename(server.folder / "shard-0000.TAR")
    found = scan(offline.data_root(server.url("{shard-0000.TAR,shard-0001.tar,shard-0002.tar}")))
    assert len(found.paths) == 60


# -- without the server ---------------------------------------------------------------------------


def test_what_the_cache_holds_is_enough_for_the_same_run(server, tiny_recipe, monkeypatch):
    url = server.url(SHARDS)
    one = run(tiny_recipe("probe", f"data.root={url}"))
    server.refuse = 503
    with pytest.raises(MachineError, match="VITFT_OFFLINE=1 goes on with what the cache holds"):
        run(tiny_recipe("probe", f"data.root={url}"))
    monkeypatch.setenv("VITFT_OFFLINE", "1")
    server.asked.clear()
    two = run(tiny_recipe("probe", f"data.root={url}"))
    pair = [(r.folder / "predictions.csv").read_bytes() for r in (one, two)]
    assert pair[0] == pair[1]
    assert server.asked == []
    shutil.rmtree(afar.pieces_dir())
    with pytest.raises(MachineError, match="are not in the cache, and the network is switched off"):
        afar.read(afar.place(url) / ONE, 0, 9)
    assert server.asked == []


def test_half_an_arrival_is_none(server, monkeypatch):
    """Killed between two stand-ins."""
    folder, _ = afar.arrive(server.url(SHARDS))
    (folder / ONE).unlink()
    monkeypatch.setenv("VITFT_OFFLINE", "1")
    with pytest.raises(MachineError, match="no earlier run looked it up"):
        afar.arrive(server.url(SHARDS))


# -- slow is not bad ------------------------------------------------------------------------------


def test_a_slow_line_makes_no_photograph_bad(server, monkeypatch):
    root = offline.data_root(server.url(ONE))
    containers.members(root / ONE)
    shutil.rmtree(afar.pieces_dir())
    receive = wire.receive
    monkeypatch.setattr(wire, "receive", lambda *a: time.sleep(0.5) or receive(*a))
    paths = [f"{ONE}/{name}" for name in containers.members(root / ONE).spans][:6:2]
    found = list(contents.examine(root, paths, images.DecodeSpec(), seconds=0.2))
    assert [content.fault for content in found] == [None] * 3


def test_a_first_scan_looks_once_for_what_tells_a_photograph_from_others(server, monkeypatch):
    root, asked, mark = offline.data_root(server.url(SHARDS)), [], containers.mark
    monkeypatch.setattr(containers, "mark", lambda path: asked.append(path) or mark(path))
    assert len(scan(root).paths) == len(asked) == len(set(asked)) == 60
    assert len(scan(root).paths) == 60
    assert len(asked) == 120


def test_a_scan_that_the_network_ended_is_not_all_for_nothing(server):
    root = offline.data_root(server.url(SHARDS))
    shards.read_shards(root, "wds", split="auto")
    shutil.rmtree(afar.pieces_dir())
    server.answers["/shard-0002.tar"] = 503
    with pytest.raises(MachineError, match="503"):
        scan(root)
    shutil.rmtree(afar.pieces_dir())
    server.answers.clear()
    server.asked.clear()
    assert len(scan(root).paths) == 60
    assert {path for path, _ in fetched(server)} == {"/shard-0002.tar"}


def test_what_waits_unhurried_is_timed_afterwards():
    def work(seconds: tuple[float, float]) -> str:
        with threads.unhurried():
            time.sleep(seconds[0])
        time.sleep(seconds[1])
        return "done"

    items = [(0.4, 0.0), (0.0, 0.6)]
    told = threads.timed_map(work, items, threads=2, seconds=0.2, late=lambda item: "late")
    assert list(told) == ["done", "late"]
    with threads.unhurried():  # no crew here
        pass


def test_workers_are_waited_for_as_long_as_a_slow_line_may_take(server):
    photos = photos_of(scan(offline.data_root(server.url(SHARDS))))
    batches = Batches(photos, batch_size=8, seed=0, shuffle=True, device=torch.device("cpu"))
    assert batches._pool.timeout == SLOW_LINE * TIMEOUT


def test_fetching_goes_on_behind_a_piece_that_did_not_come(monkeypatch):
    calls: list[int] = []

    def fetch(piece: containers.Piece) -> None:
        calls.append(piece.number)
        if piece.number < 4:  # one for each connection
            raise MachineError.of("env.unreachable", "here", "away for a moment", "wait")

    monkeypatch.setattr(containers, "fetch", fetch)
    where = tuple(containers.Piece(Path("a.tar"), k, 1) for k in range(9))
    held = ahead.Pieces(torch.arange(9).numpy(), where)
    with ahead.fetching(held, [held.of]):
        for _ in range(300):
            if len(calls) == 9:
                break
            time.sleep(0.01)
    assert sorted(calls) == list(range(9))


# -- the cache ------------------------------------------------------------------------------------


def _thrash(home: str, seed: int, told: object) -> None:
    """Reads names of a store that has room for two, and has each evicted by the others."""
    os.environ["VITFT_CACHE"] = home
    afar.ROOM = 2 * 1008
    faults, end, number = [], time.monotonic() + 1.5, seed
    while time.monotonic() < end:
        number = number * 1103515245 + 12345 & 2**31 - 1
        body = bytes([number % 12]) * 1000
        try:
            with afar.keep(f"n-{body[0]}", 1000, partial(list, [body])) as file:
                if file.read(1000) != body:
                    faults.append("other bytes")
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}")
    told.put(faults)  # type: ignore[attr-defined]


def test_many_processes_with_too_little_room_all_get_on(tmp_path):
    fork = multiprocessing.get_context("fork")
    told = fork.Queue()
    crew = [fork.Process(target=_thrash, args=(str(tmp_path), k, told)) for k in range(4)]
    for process in crew:
        process.start()
    assert [told.get(timeout=30) for _ in crew] == [[]] * 4
    for process in crew:
        process.join()


def test_what_another_lets_go_of_stays_readable(monkeypatch):
    monkeypatch.setattr(afar, "ROOM", 10)
    with afar.keep("a-0", 100, lambda: [b"a" * 100]) as one:
        afar.keep("b-0", 100, lambda: [b"b" * 100]).close()
        assert [file.name for file in afar.pieces_dir().iterdir()] == ["b-0.bytes"]
        assert one.read(100) == b"a" * 100


@pytest.mark.parametrize("left", [b"", b"abc", b"x" * 50])
def test_a_piece_cut_off_is_fetched_anew(server, left):
    folder, _ = afar.arrive(server.url(ONE))
    afar.fetch(folder / ONE, 0)
    (file,) = afar.pieces_dir().iterdir()
    file.write_bytes(left)
    assert afar.read(folder / ONE, 0, 600) == whole(server)[:600]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_piece_that_the_disk_spoils_is_fetched_anew(server, tmp_path, tiny_photos, kind):
    """Its owner knows the hashes of the photographs; a spoiled file of his own stays an error."""
    if kind == "parquet":
        rows = [(body, k % 3) for k, (body, _) in enumerate(samples(tiny_photos))]
        write_parquet(server.folder / "a.parquet", rows)
    index = scan(offline.data_root(server.url(SHARDS if kind == "tar" else "a.parquet")))
    photos = photos_of(index)
    good = photos._bytes(5)
    for file in afar.pieces_dir().iterdir():
        data = file.read_bytes()
        file.write_bytes(data[:-8].replace(good[100:120], bytes(20)) + data[-8:])
    assert photos._bytes(5) == good


def test_a_lock_whose_holder_is_gone_holds_nobody_for_ever(monkeypatch):
    """As on a file system without locks."""
    monkeypatch.setattr(afar, "PATIENCE", 0.1)
    monkeypatch.setattr("vitft.disk.fcntl", None)
    guard = sha256(b"a-0").hexdigest()[:2]
    io.write_bytes(afar._home() / "locks" / guard / io.LOCK, b"{}")
    began = time.monotonic()
    with afar.keep("a-0", 3, lambda: [b"abc"]) as file:
        assert file.read(3) == b"abc"
    assert time.monotonic() - began > 0.1  # it was this one's lock


def test_what_a_killed_run_left_is_swept(monkeypatch):
    left = afar.pieces_dir() / ".a-0.bytes.0123abcd.tmp"
    io.write_bytes(left, b"half")
    os.utime(left, (1, 1))
    afar.keep("b-0", 3, lambda: [b"abc"]).close()
    assert not left.exists()


def test_a_run_that_is_killed_while_it_fetches_leaves_nothing_in_the_way(server):
    folder, _ = afar.arrive(server.url(ONE))
    server.drip = 0.01
    child = os.fork()
    if not child:
        with suppress(BaseException):
            afar.fetch(folder / ONE, 0)
        os._exit(0)
    time.sleep(0.3)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    server.drip = None
    began = time.monotonic()
    assert afar.read(folder / ONE, 0, 600) == whole(server)[:600]
    assert time.monotonic() - began < 5


def test_a_cache_that_may_not_be_written_is_said(server, monkeypatch):
    """What is in it already can be read."""
    folder, _ = afar.arrive(server.url(SHARDS))
    afar.fetch(folder / ONE, 0)

    def closed(*args: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(io.CALLS, "mkdir", closed)
    monkeypatch.setattr(io.CALLS, "open", closed)
    assert afar.read(folder / ONE, 0, 9) == whole(server)[:9]
    with pytest.raises(MachineError) as caught:
        afar.read(folder / "shard-0001.tar", 0, 9)
    assert refusal(caught.value)[0] == "env.write_failed"


def test_a_full_disk_is_said_and_what_lies_on_it_counts(server, monkeypatch):
    folder, files = afar.arrive(server.url(SHARDS))
    total = sum(far.size for far in files)
    monkeypatch.setattr("vitft.disk.free", lambda path: total - 1)
    with pytest.raises(MachineError) as caught:
        afar.arrive(server.url(SHARDS))
    assert refusal(caught.value)[0] == "env.disk_full"
    afar.fetch(folder / ONE, 0)  # as it does when it is here already
    afar.arrive(server.url(SHARDS))

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io.CALLS, "write", full)
    with pytest.raises(MachineError) as caught:
        afar.read(folder / "shard-0001.tar", 0, 9)
    assert refusal(caught.value)[0] == "env.disk_full"


def test_the_cache_is_cleared_under_a_run(server):
    folder, _ = afar.arrive(server.url(ONE))
    afar.fetch(folder / ONE, 0)
    cache.clear()
    assert afar.read(folder / ONE, 0, 9) == whole(server)[:9]


# -- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two words.tar", "münze é.tar", "50%25.tar", "a+b,c=(d).tar"])
def test_names_are_quoted_as_a_browser_would(server, name):
    decoded = name.replace("%25", "%")
    shutil.copy(server.folder / ONE, server.folder / decoded)
    folder, (far,) = afar.arrive(server.url(name))
    assert far.url.isascii()
    assert afar.read(folder / decoded, 0, 600) == whole(server)[:600]


def test_a_host_of_colons_is_a_folder_on_any_disk():
    assert afar.place("http://[::1]:8000/a.tar").name.startswith("--1-")
    assert afar.place("http://Host:8000/a.tar?v=2").name.startswith("host-")


@pytest.mark.parametrize(
    ("root", "words"),
    [
        ("http://[::1/a.tar", "is no address"),
        ("http://host:port/a.tar", "is no address"),
        ("http://host:99999/a.tar", "is no address"),
        ("https:///a.tar", "names no server"),
        ("https://host/a#1.tar", "#"),
        ("https://host/{a,A}.tar", "upper and lower case"),
        ("https://host/{a,.b}.tar", "hidden"),
        ("https://host/" + "n" * 201 + ".tar", "205 bytes"),
        ("https://host/" + "é" * 101 + ".tar", "206 bytes"),
        ("https://host/C:%5Cx.tar", "no name on every disk"),
        ("https://host/C:/x.tar", "no name on every disk"),
        ("https://host/a%00.tar", "no name on every disk"),
        ("https://host/{hashes.json/a,b}.tar", "as a file of ours"),
        ("https://host/{a.tar,a.tar/b.tar}", "as a file and as a folder"),
        ("https://host/a.tar.members.json/b.tar", "as a file of ours"),
        ("https://host/a.tar?X-Amz-Signature=hidden", "holds a secret, X-Amz-Signature"),
        ("https://host/a.tar?sv=1&sig=hidden", "holds a secret, sig"),
        ("https://host/a.tar?access_token=hidden", "holds a secret, access_token"),
        ("https://me:hidden@host:99999/a.tar", "user or password"),
    ],
)
def test_addresses_that_would_end_badly_are_refused(root, words):
    for ask in (afar.place, addresses.urls):
        with pytest.raises(RecipeError) as caught:
            ask(root)
        id, text, _ = refusal(caught.value)
        assert id == "data.address"
        assert words in text
        assert "hidden" not in str(caught.value) or "names .b" in text


@pytest.mark.parametrize("command", ["run", "check", "in Python"])
def test_braces_that_a_shell_took_apart_are_not_the_last_file_alone(tmp_path, capsys, command):
    file = tmp_path / "own.yaml"
    file.write_text("mode: probe\ndata: {root: photos}\n")
    roots = [f"data.root=https://host/{k}.tar" for k in range(3)]
    if command == "in Python":
        with pytest.raises(RecipeError) as caught:
            recipe.load(file, roots)
        said = str(caught.value)
    else:
        assert cli.main([command, str(file), *roots]) == 2
        said = capsys.readouterr().err
    assert said.strip() == (
        "error[data.address] data.root: 3 addresses, https://host/0.tar the first: a shell expands "
        "braces\nfix: put the address in quotes: 'data.root=https://host/train-{0000..0031}.tar'"
    )
    assert recipe.load(file, ["data.root=photos", roots[0]]).data.root == roots[0][10:]
    assert recipe.load(file, [*roots[:1], "data.root=sample:flowers"]).data.root == "sample:flowers"


# -- tables ---------------------------------------------------------------------------------------


def test_pictures_and_labels_of_other_types(tmp_path, tiny_photos):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    bodies = [body for body, _ in samples(tiny_photos)][:12]

    def file_of(kind, label) -> Path:
        packed = pa.array(bodies, pa.binary())
        packed = packed.dictionary_encode() if kind == "dictionary" else packed.cast(kind)
        images = pa.StructArray.from_arrays([packed], ["bytes"])
        pq.write_table(pa.table({"image": images, "label": label}), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    names = pa.array(["ab"[k % 2] for k in range(12)])
    for kind, label in (("dictionary", names), (pa.large_binary(), names.dictionary_encode())):
        file = file_of(kind, label)
        assert scan(file).classes == ("a", "b")
        assert images.read_bytes(file / "7") == bodies[7]
    listed = pa.array([list(body) for body in bodies], pa.list_(pa.uint8()))
    pictures = pa.StructArray.from_arrays([listed], ["bytes"])
    pq.write_table(pa.table({"image": pictures, "label": names}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="pictures of type list<element: uint8>"):
        images.read_bytes(tmp_path / "b.parquet" / "0")
    for odd in ([0.5] * 12, [[1]] * 12, [b"a"] * 12):
        with pytest.raises(DataError, match="give each row one label") as caught:
            scan(file_of(pa.binary(), pa.array(odd)))
        assert refusal(caught.value)[0] == "data.sample"


def test_groups_of_no_rows_and_rows_of_no_picture(tmp_path, tiny_photos):
    pq = pytest.importorskip("pyarrow.parquet")
    from test_shards import table_of

    rows = [(body, k % 3) for k, (body, _) in enumerate(samples(tiny_photos))][:20]
    table = table_of(rows)
    file = tmp_path / "a.parquet"
    with pq.ParquetWriter(file, table.schema) as out:
        for start, count in ((0, 0), (0, 10), (0, 0), (10, 10), (0, 0)):
            out.write_table(table.slice(start, count))
    assert [containers.piece(file / f"{k:02d}").number for k in (0, 9, 10, 19)] == [1, 1, 3, 3]
    assert [images.read_bytes(file / f"{k:02d}") for k in range(20)] == [body for body, _ in rows]


def test_a_group_is_unpacked_a_few_rows_at_a_time(tmp_path, monkeypatch):
    """Rows of a megabyte each; neither the group nor the column is ever in memory whole."""
    pytest.importorskip("pyarrow")
    rows = [(os.urandom(2**20), 0) for _ in range(7)]
    file = write_parquet(tmp_path / "a.parquet", rows)
    monkeypatch.setattr(columns, "ROWS", 2)
    largest = []
    write = io.CALLS.write
    monkeypatch.setattr(
        io.CALLS, "write", lambda handle, data: largest.append(len(data)) or write(handle, data)
    )
    columns.unpacked(file, 0).close()
    assert max(largest) == 2**20
    assert [images.read_bytes(file / str(k)) for k in range(7)] == [body for body, _ in rows]


# -- the doors ------------------------------------------------------------------------------------


def test_a_recipe_file_may_hold_an_address_with_braces(server, tmp_path, tiny_recipe, capsys):
    spec = tiny_recipe("probe", f"data.root={server.url(SHARDS)}")
    file = tmp_path / "far.yaml"
    file.write_text(recipe.dump(spec))
    assert recipe.load(file).data.root == server.url(SHARDS)
    file.write_text(f"mode: probe\ndata:\n  root: {server.url(SHARDS)}\n")
    assert recipe.load(file).data.root == server.url(SHARDS)
    told = check.check(server.url(SHARDS), check.Options())
    assert any("60 used" in line for line in told)
    assert len(fetched(server)) == 3
    assert prepare.scan(spec).paths == prepare.scan(spec).paths
