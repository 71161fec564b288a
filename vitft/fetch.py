"""Public data sets by name: cached, downloaded with resume and checksum, unpacked with suspicion.

A download grows in `<archive>.part` and goes on where it stopped, in this run or the next. Nothing
is unpacked before its sha256 is right.
`HF_HUB_OFFLINE=1` or `VITFT_OFFLINE=1` means that the network is not touched at all.
"""

import threading
import time
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

from vitft import io
from vitft.console import say, track, warn
from vitft.errors import MachineError, RecipeError, VitftError
from vitft.unpack import Bounds, unpack
from vitft.wire import connect, offline

STEP = 1_000_000  # bytes read at once, and per tick of the progress bar
TRIES = 3  # attempts in a row that bring nothing before a download is given up
PAUSE = 1.0  # seconds before the second attempt, doubled each time


@dataclass(frozen=True)
class Archive:
    """A data set to be had as one tar file.

    Attributes:
        url: Where it is.
        size: Bytes.
        sha256: Of the whole file.
        inside: The folder it holds, and how much at most.
    """

    url: str
    size: int
    sha256: str
    inside: Bounds


DATASETS = {
    "flower_photos": Archive(
        url="https://storage.googleapis.com/download.tensorflow.org/example_images/"
        "flower_photos.tgz",
        size=228_813_984,
        sha256="4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c",
        inside=Bounds(top="flower_photos", bytes=400_000_000, files=5_000),
    )
}


def dataset(name: str, *, timeout: float = 10.0) -> Path:
    """The folder of a named data set, with one folder per class; downloaded if it must be.

    Args:
        name: One of `DATASETS`.
        timeout: Seconds to decide that the server cannot be reached, and per read afterwards.

    Raises:
        MachineError: `env.unreachable`, naming the file to place and where; `env.checksum`;
            `env.disk_full`.
        DataError: `data.archive`: the archive is not what it should be.
        BusyError: Another process is fetching.
    """
    archive = _known(name)
    found = cached(name)
    if found is not None and found.is_dir():
        return found
    with io.lock(_home(), f"fetch {name}"):
        file = _home() / f"{name}.tgz"
        placed = file.is_file()
        if placed:
            _check(file, archive)
        else:
            _download(name, archive, file, timeout)
        say(f"unpacking {file}")
        unpack(file, _home() / name, archive.inside)
        if not placed:  # a file that somebody put there stays theirs
            io.remove(file)
    return _home() / name / archive.inside.top


def cached(name: str) -> Path | None:
    """Where a named data set is on this machine: its folder, else its archive, else None."""
    archive = _known(name)
    candidates = (_home() / name / archive.inside.top, _home() / name, _home() / f"{name}.tgz")
    return next((path for path in candidates if path.exists()), None)


def reachable(address: str, timeout: float = 10.0) -> bool:
    """Whether a server answers in time; honours proxies, and never outlasts the timeout.

    Args:
        address: A host, whose every answer counts, or a URL, which must exist there.
        timeout: Seconds, name resolution included.
    """
    if offline():
        return False
    url = address if "://" in address else f"https://{address}/"
    answers: list[bool] = []

    def ask() -> None:
        answers.append(_answers(url, timeout, any_status=url != address))

    # Name resolution has no timeout of its own, so it is left behind in a thread.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answers == [True]


def available(name: str, timeout: float = 10.0) -> bool:
    """Whether `dataset` can be expected to succeed."""
    return cached(name) is not None or reachable(_known(name).url, timeout)


def host(name: str) -> str:
    """The server that holds a named data set."""
    return urlsplit(_known(name).url).netloc


def how_to_place(name: str) -> str:
    """What to do by hand where there is no network."""
    archive = _known(name)
    return (
        f"download {archive.url} ({archive.size:,} bytes) elsewhere and place it as "
        f"{_home() / name}.tgz, or its unpacked folder as {_home() / name}"
    )


def _home() -> Path:
    return io.cache_dir() / "datasets"


def _known(name: str) -> Archive:
    if name not in DATASETS:
        raise RecipeError.of(
            "data.unknown_name", name, "is no data set we know", f"use one of {sorted(DATASETS)}"
        )
    return DATASETS[name]


# --- download ---


def _download(name: str, archive: Archive, file: Path, timeout: float) -> None:
    if not reachable(archive.url, timeout):
        why = "the network is switched off by the environment" if offline() else "no answer"
        text = f"{host(name)}: {why} within {timeout:g} s, and {name} is not in the cache"
        raise MachineError.of("env.unreachable", archive.url, text, how_to_place(name))
    part = file.with_name(file.name + ".part")
    have = _size(part)
    io.require_space(file.parent, archive.size - min(have, archive.size) + archive.inside.bytes)
    if have:
        say(f"going on with {part} at {have:,} of {archive.size:,} bytes")
    _fill(name, archive, part, timeout)
    try:
        _check(part, archive)
    except VitftError:
        io.remove(part)
        raise
    io.move(part, file)


def _fill(name: str, archive: Archive, part: Path, timeout: float) -> None:
    """Makes the file complete, with as many connections as bring something."""
    failures = 0
    while (have := _size(part)) < archive.size:
        try:
            _receive(archive, part, timeout)
            problem: Exception | str = "the connection ended early"
        except (OSError, HTTPException) as error:
            problem = error
        failures = 0 if _size(part) > have else failures + 1
        if failures == TRIES:
            text = f"{_size(part):,} of {archive.size:,} bytes arrived, then: {problem}"
            fix = f"run again to go on from there, or {how_to_place(name)}"
            raise MachineError.of("env.unreachable", archive.url, text, fix)
        if _size(part) < archive.size:
            warn(f"download interrupted at {_size(part):,} bytes ({problem}); trying again")
            time.sleep(PAUSE * 2**failures)


def _receive(archive: Archive, part: Path, timeout: float) -> None:
    have = _size(part)
    asked = {"Range": f"bytes={have}-"} if have else {}
    with connect(archive.url, asked, timeout=timeout) as answer:
        offered = _offered(answer)
        if offered is not None and offered != archive.size:
            raise _wrong(archive, f"the server offers {offered:,} bytes")
        if have and answer.status != 206:  # it does not know ranges and starts from the beginning
            io.remove(part)
            have = 0
        with io.appending(part) as add:
            left = archive.size - have
            what = f"{urlsplit(archive.url).path.rpartition('/')[2]}, MB"
            for data in track(_pieces(answer, left), -(-left // STEP), what):
                add(data)


def _pieces(answer: HTTPResponse, left: int) -> Iterator[bytes]:
    while left > 0 and (data := answer.read(min(STEP, left))):
        left -= len(data)
        yield data


def _offered(answer: HTTPResponse) -> int | None:
    """The size of the whole file, as the server states it."""
    text = answer.headers.get("Content-Range", "").rpartition("/")[2]
    if answer.status != 206:
        text = answer.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _check(file: Path, archive: Archive) -> None:
    if (size := _size(file)) != archive.size:
        raise _wrong(archive, f"{file} has {size:,} bytes")
    if (found := io.sha256_file(file)) != archive.sha256:
        raise _wrong(archive, f"{file} has sha256 {found[:12]}..., not {archive.sha256[:12]}...")


def _wrong(archive: Archive, text: str) -> VitftError:
    return MachineError.of(
        "env.checksum",
        archive.url,
        f"{text}; the archive has {archive.size:,}",
        "run again; if it stays so, something between here and the server changes the file: "
        "download it on another network",
    )


def _answers(url: str, timeout: float, *, any_status: bool) -> bool:
    try:
        with connect(url, method="HEAD", timeout=timeout):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return any_status
    except (OSError, HTTPException):
        return False


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
