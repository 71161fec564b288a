"""Fetching a data set: resumed, checked, unpacked within bounds; and life without a network."""

import gzip
import hashlib
import io as memory
import socket
import tarfile
import threading
import time
import urllib.error
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from far import serving

from vitft import fetch, io
from vitft.errors import BusyError, DataError, MachineError, RecipeError
from vitft.unpack import Bounds, unpack


def member(name: str, data: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tgz(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    plain = memory.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for info, data in members:
            tar.addfile(info, memory.BytesIO(data))
    return gzip.compress(plain.getvalue(), 1, mtime=0)


ROSES = [member(f"photos/roses/{i}.jpg", bytes([i]) * 9_000) for i in range(6)]
NOISE = member("photos/LICENSE.txt", hashlib.shake_256(b"noise").digest(90_000))
GOOD = tgz(member("photos", b"", type=tarfile.DIRTYPE), *ROSES, NOISE)


class Server(ThreadingHTTPServer):
    """A web server with one file and a choice of bad manners."""

    daemon_threads = True
    data = GOOD
    ranges = True  # answers Range requests with 206
    cut: int | None = None  # closes every connection after so many bytes
    status = 200
    asked: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/photos.tgz"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(f"{self.command} {wanted or ''}".strip())
        data, start = self.server.data, 0
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        if wanted and self.server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            end = None if self.server.cut is None else start + self.server.cut
            self.wfile.write(data[start:end])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    """The server, and a data set `photos` that it holds; the network is allowed."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("VITFT_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "PAUSE", 0.01)
    server = Server(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    inside = Bounds(top="photos", bytes=400_000, files=20)
    digest = hashlib.sha256(GOOD).hexdigest()
    archive = fetch.Archive(server.url, len(GOOD), digest, inside)
    monkeypatch.setitem(fetch.DATASETS, "photos", archive)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def home() -> Path:
    return io.cache_dir() / "datasets"


def kept() -> list[str]:
    """What is in the cache, a level deep."""
    return sorted(path.name for path in home().iterdir()) if home().is_dir() else []


# --- download ---


def test_a_data_set_is_fetched_once_and_then_found(server):
    assert fetch.cached("photos") is None
    assert fetch.available("photos")
    folder = fetch.dataset("photos")
    assert folder == fetch.cached("photos") == home() / "photos" / "photos"
    assert (folder / "roses" / "3.jpg").read_bytes() == bytes([3]) * 9_000
    assert len(list(folder.rglob("*.jpg"))) == 6
    assert io.verify_dir(folder.parent) == ()
    assert kept() == ["photos"]
    server.asked.clear()
    assert fetch.dataset("photos") == folder
    assert server.asked == []


def test_a_connection_that_breaks_again_and_again_goes_on_where_it_stopped(server):
    server.cut = len(GOOD) // 4 + 1
    assert (fetch.dataset("photos") / "LICENSE.txt").stat().st_size == 90_000
    step = server.cut
    assert server.asked[1:] == ["GET", *(f"GET bytes={step * n}-" for n in (1, 2, 3))]


def test_a_download_cut_off_is_resumed_by_the_next_run(server):
    io.write_bytes(home() / "photos.tgz.part", GOOD[:50_000])
    fetch.dataset("photos")
    assert server.asked == ["HEAD", "GET bytes=50000-"]


def test_a_server_without_ranges_is_asked_for_everything_again(server):
    server.ranges = False
    io.write_bytes(home() / "photos.tgz.part", GOOD[:50_000])
    fetch.dataset("photos")
    assert kept() == ["photos"]


def test_a_server_that_brings_nothing_more_is_given_up_and_the_part_stays(server):
    server.cut = 0
    io.write_bytes(home() / "photos.tgz.part", GOOD[:50_000])
    text = rf"env.unreachable.*50,000 of {len(GOOD):,} bytes arrived(.|\n)*run again to go on"
    with pytest.raises(MachineError, match=text):
        fetch.dataset("photos")
    assert (home() / "photos.tgz.part").read_bytes() == GOOD[:50_000]


def test_a_part_with_wrong_bytes_is_refused_and_removed(server):
    io.write_bytes(home() / "photos.tgz.part", bytes(50_000))
    with pytest.raises(MachineError, match=r"env.checksum\].*has sha256 \w{12}\.\.\., not \w{12}"):
        fetch.dataset("photos")
    assert kept() == []
    fetch.dataset("photos")


def test_a_part_longer_than_the_archive_is_refused_and_removed(server):
    io.write_bytes(home() / "photos.tgz.part", GOOD + b"more")
    with pytest.raises(MachineError, match=rf"has {len(GOOD) + 4:,} bytes"):
        fetch.dataset("photos")
    assert kept() == []


def test_a_login_page_in_place_of_the_file_is_refused_before_it_is_stored(server):
    server.data = b"<html>please log in</html>"
    with pytest.raises(MachineError, match=r"env.checksum\].*the server offers 26 bytes"):
        fetch.dataset("photos")
    assert kept() == []


def test_another_file_of_the_same_size_is_refused(server):
    server.data = GOOD[:-1] + b"?"
    with pytest.raises(MachineError, match=r"env.checksum"):
        fetch.dataset("photos")
    assert kept() == []


def test_too_little_room_is_said_before_the_first_byte(server, monkeypatch):
    huge = replace(fetch.DATASETS["photos"], inside=Bounds("photos", 10**16, 9))
    monkeypatch.setitem(fetch.DATASETS, "photos", huge)
    with pytest.raises(MachineError, match="env.disk_full"):
        fetch.dataset("photos")
    assert server.asked == ["HEAD"]


def test_two_processes_do_not_fetch_at_once(server):
    with io.lock(home(), "fetch photos"), pytest.raises(BusyError, match="purpose fetch photos"):
        fetch.dataset("photos")


# --- by hand ---


def test_an_archive_placed_by_hand_is_checked_unpacked_and_kept(server, monkeypatch):
    monkeypatch.setenv("VITFT_OFFLINE", "1")
    io.write_bytes(home() / "photos.tgz", GOOD)
    assert fetch.cached("photos") == home() / "photos.tgz"
    assert fetch.dataset("photos").is_dir()
    assert kept() == ["photos", "photos.tgz"]
    assert server.asked == []


def test_a_wrong_archive_placed_by_hand_is_refused_and_kept(server):
    io.write_bytes(home() / "photos.tgz", GOOD[:-5])
    with pytest.raises(MachineError, match=rf"photos.tgz has {len(GOOD) - 5:,} bytes"):
        fetch.dataset("photos")
    assert kept() == ["photos.tgz"]


@pytest.mark.parametrize("inner", ["photos/photos", "photos"])
def test_an_unpacked_folder_placed_by_hand_is_used(server, inner):
    io.write_text(home() / inner / "roses" / "1.jpg", "x")
    assert fetch.dataset("photos") == fetch.cached("photos") == home() / inner
    assert server.asked == []


# --- no network ---


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "VITFT_OFFLINE"])
def test_the_environment_can_forbid_the_network(server, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert not fetch.reachable(server.url)
    with pytest.raises(MachineError) as caught:
        fetch.dataset("photos")
    text = str(caught.value)
    assert "error[env.unreachable] " + server.url in text
    assert "switched off by the environment" in text
    assert f"fix: download {server.url} ({len(GOOD):,} bytes)" in text
    assert f"place it as {home()}/photos.tgz, or its unpacked folder as {home()}/photos" in text
    assert server.asked == []
    assert kept() == []


def test_a_server_that_never_answers_is_decided_in_time(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/photos.tgz"
        assert not fetch.reachable(url, timeout=0.3)
        assert time.monotonic() - start < 2


def test_a_name_that_cannot_be_resolved_in_time_is_unreachable(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    done = threading.Event()

    def hang(*args: object, **options: object) -> object:
        done.wait(5)
        raise OSError("no such name")

    monkeypatch.setattr(fetch, "connect", hang)
    start = time.monotonic()
    assert not fetch.reachable("example.org", timeout=0.2)
    assert time.monotonic() - start < 2
    done.set()


def test_a_host_is_reachable_whatever_it_answers_and_a_url_only_if_it_is_there(server, monkeypatch):
    server.status = 403
    assert not fetch.reachable(server.url, timeout=2)
    opened = fetch.connect

    def plain(url: str, **options: object) -> object:
        return opened(url.replace("https:", "http:"), **options)

    monkeypatch.setattr(fetch, "connect", plain)
    assert fetch.reachable(f"127.0.0.1:{server.server_port}", timeout=2)
    server.status = 200
    assert fetch.reachable(server.url, timeout=2)


def test_only_web_addresses_are_opened(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ValueError, match="not a web address: file:///etc/passwd"):
        fetch.connect("file:///etc/passwd")


def test_a_server_may_not_send_on_to_other_kinds_of_addresses(tmp_path):
    with serving(tmp_path) as sly:
        sly.elsewhere = "ftp://127.0.0.1"
        with pytest.raises(urllib.error.HTTPError, match="302") as caught:
            fetch.connect(sly.url("a.tar"))
        caught.value.close()


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match=r"data.unknown_name\] tulips.*\n.*flower_photos"):
        fetch.dataset("tulips")


def test_the_flowers_are_where_they_have_always_been():
    assert fetch.host("flower_photos") == "storage.googleapis.com"
    assert fetch.DATASETS["flower_photos"].size == 228_813_984
    assert "flower_photos.tgz" in fetch.how_to_place("flower_photos")


# --- unpack ---

SMALL = Bounds(top="photos", bytes=100_000, files=5)
LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
HARD = {"type": tarfile.LNKTYPE, "linkname": "../../x"}
TOP = member("photos/a")
BAD = {
    "upwards": ([member("../evil")], "would leave the folder"),
    "upwards inside": ([member("photos/../../evil")], "would leave the folder"),
    "absolute": ([member("/tmp/evil")], "would leave the folder"),
    "drive": ([member("C:\\evil")], "would leave the folder"),
    "symlink": ([member("photos/l", b"", **LINK)], "is neither a file nor a folder"),
    "hard link": ([member("photos/l", b"", **HARD)], "is neither a file nor a folder"),
    "pipe": ([member("photos/p", b"", type=tarfile.FIFOTYPE)], "is neither a file nor a folder"),
    "device": ([member("photos/d", b"", type=tarfile.CHRTYPE)], "is neither a file nor a folder"),
    "twice": ([TOP, TOP], "is there twice"),
    "many": ([member(f"photos/{i}") for i in range(6)], "one more than the 5 files announced"),
    "bomb": ([member("photos/zeros", bytes(200_000))], "unpacks to more bytes than announced"),
    "long name": ([member("photos/" + "x" * 200_000)], "unpacks to more bytes than announced"),
    "elsewhere": ([member("other/a")], "holds no folder photos"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_hostile_archive_is_refused_whole(tmp_path, case):
    members, text = BAD[case]
    file = tmp_path / "a.tgz"
    file.write_bytes(
        tgz(TOP, *members) if case not in {"twice", "elsewhere", "many"} else tgz(*members)
    )
    io.write_text(tmp_path / "out" / "photos" / "old", "old")
    with pytest.raises(DataError, match=r"data.archive\] .*" + text):
        unpack(file, tmp_path / "out", SMALL)
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["a.tgz", "out/photos/old"]


def test_a_bomb_of_a_gigabyte_costs_neither_memory_nor_disk(tmp_path):
    file = tmp_path / "bomb.tgz"
    info = tarfile.TarInfo("photos/zeros")
    info.size = 10**9
    with gzip.open(file, "wb", compresslevel=1) as out:
        out.write(info.tobuf())
        for _ in range(20):
            out.write(bytes(1_000_000))
    start = time.monotonic()
    with pytest.raises(DataError, match="more bytes than announced"):
        unpack(file, tmp_path / "out", SMALL)
    assert time.monotonic() - start < 2
    assert [p.name for p in tmp_path.iterdir()] == ["bomb.tgz"]


@pytest.mark.parametrize("cut", [0, 5, 30, 400, len(GOOD) - 4])
def test_a_damaged_archive_is_refused_whole(tmp_path, cut):
    file = tmp_path / "a.tgz"
    file.write_bytes(GOOD[:cut])
    with pytest.raises(DataError, match=r"data.archive\] .*a.tgz: (cannot be unpacked|holds no)"):
        unpack(file, tmp_path / "out", Bounds("photos", 400_000, 20))
    assert [p.name for p in tmp_path.iterdir()] == ["a.tgz"]
