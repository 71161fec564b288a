"""Every file read once: bytes -> sha256, header, and whether all its pixels can be decoded.

Decoding is what costs, so the verdict on good bytes is kept in the cache folder under their hash: a
second scan reads and hashes only. The cache is never trusted without its checksum, and a refusal
is never cached: it is cheap to find again, and the next library version may read the file. Of a
photograph afar (`vitft.afar`) the hash is kept too, beside the mark of its file, and the scan goes
without its bytes; whoever uses it later proves the hash.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import PIL
from PIL import features

from vitft import __version__, afar, containers, images, io
from vitft.console import warn
from vitft.errors import Fault, VitftError
from vitft.images import BadImage, DecodeSpec, Header
from vitft.threads import timed_map, unhurried

PATIENCE = 60.0  # seconds for one file, on a busy machine and a slow disk
KEPT = 200_000  # verdicts in one cache file; about 110 bytes each
MAGIC = b"vitft verdicts "


@dataclass(frozen=True)
class Verdict:
    """What is known about bytes that decode.

    Attributes:
        header: What the file says about itself.
        peak: Largest stored value of a 16-bit picture, else None.
        damage: What the format's library complained about while it decoded (deep check), or None.
    """

    header: Header
    peak: int | None = None
    damage: str | None = None


@dataclass(frozen=True)
class Content:
    """One file as it was read.

    Attributes:
        path: As given.
        sha256: 64 hex digits; empty where the file could not even be read.
        verdict: None exactly where `fault` stands.
        fault: Why this is no usable photograph.
    """

    path: str
    sha256: str
    verdict: Verdict | None
    fault: Fault | None = None


def examine(
    root: Path,
    paths: Sequence[str],
    spec: DecodeSpec,
    *,
    deep: bool = False,
    seconds: float = PATIENCE,
) -> Iterator[Content]:
    """Reads, hashes and decodes files in threads (Pillow decodes outside the interpreter's lock).

    Args:
        root: Folder of the paths.
        paths: Relative to it.
        spec: How photographs are decoded; another spec has other verdicts.
        deep: Also ask the format's library for what it silently repaired.
        seconds: Wall time that one file may take; beyond it stands `data.slow`. A file afar may
            take it once it is here: a slow line makes no photograph bad.

    Yields:
        One Content per path, in order.
    """
    memory = _Memory(spec, deep, root)
    try:
        yield from timed_map(
            lambda path: _examine(root, path, memory),
            paths,
            threads=_cores(),
            seconds=seconds,
            late=lambda path: _late(root, path, seconds),
        )
    finally:  # an end of the network after hours is no reason to forget them
        memory.save()


def _late(root: Path, path: str, seconds: float) -> Content:
    text = f"not read and decoded within {seconds:g} s"
    fix = "save it again as a plain picture, remove it, or look at the disk"
    return Content(path, "", None, Fault("data.slow", str(root / path), text, fix))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _examine(root: Path, path: str, memory: "_Memory") -> Content:
    mark = containers.mark(root / path) if memory.afar else ""
    if (met := memory.met_afar(mark)) is not None:
        return Content(path, *met)
    try:
        with unhurried() if memory.afar else nullcontext():
            data = images.read_bytes(root / path)
    except BadImage as error:
        return Content(path, "", None, error.faults[0])
    digest = sha256(data).hexdigest()
    memory.note(mark, digest)
    try:
        return Content(path, digest, memory.verdict(digest, data, root / path))
    except BadImage as error:
        return Content(path, digest, None, error.faults[0])


class _Memory:
    """Verdicts by content hash: those of earlier scans, and the new ones of this."""

    def __init__(self, spec: DecodeSpec, deep: bool, root: Path) -> None:
        self.spec = spec
        self.deep = deep
        libraries = [
            f"{name} {features.version(name)}" for name in ("jpg", "zlib", "webp", "libtiff")
        ]
        key = (spec.key(), f"vitft {__version__}", f"Pillow {PIL.__version__}", *libraries, deep)
        name = sha256(repr(key).encode()).hexdigest()[:16]
        self.file = io.cache_dir() / "verdicts" / f"{name}.json"
        self.known = load_verdicts(self.file)
        self.met: dict[str, Verdict] = {}
        self.afar = root / "hashes.json" if afar.holds(root) else None
        self.hashes = _load(self.afar) if self.afar else {}  # mark -> sha256
        self.noted = False

    def met_afar(self, mark: str) -> tuple[str, Verdict] | None:
        """Hash and verdict of a photograph afar that an earlier scan read."""
        digest = self.hashes.get(mark)
        if digest is None or digest not in self.known:
            return None
        self.met[digest] = self.known[digest]
        return digest, self.known[digest]

    def note(self, mark: str, digest: str) -> None:
        """Keeps the hash of a photograph afar."""
        if self.afar is not None:
            self.hashes[mark] = digest
            self.noted = True

    def verdict(self, digest: str, data: bytes, place: Path) -> Verdict:
        found = self.known.get(digest)
        if found is None:
            found = _judge(data, place, self.spec, self.deep)
        self.met[digest] = found
        return found

    def save(self) -> None:
        hashes, met = dict(self.hashes), dict(self.met)  # a thread may be at its last file
        try:
            if self.afar is not None and self.noted:
                io.write_bytes(self.afar, _dump(hashes))
            if not met.keys() <= self.known.keys():
                known = {**load_verdicts(self.file), **met}  # another scan may have written
                io.write_bytes(self.file, dump_verdicts(known if len(known) <= KEPT else met))
        except (VitftError, OSError) as error:  # a scan must not fail for want of a cache
            warn(f"the next scan will decode everything again: {error}")


def _judge(data: bytes, place: Path, spec: DecodeSpec, deep: bool) -> Verdict:
    header = images.inspect(data, place, spec)
    images.decode(data, place, spec)
    peak = images.peak(data, place, spec) if header.bits == 16 else None
    return Verdict(header, peak, images.deep_warnings(data) if deep else None)


def dump_verdicts(verdicts: dict[str, Verdict]) -> bytes:
    """The cache file: one line with the checksum, then JSON."""
    return _dump({k: [list(astuple(v.header)), v.peak, v.damage] for k, v in verdicts.items()})


def load_verdicts(file: Path) -> dict[str, Verdict]:
    """The verdicts of a cache file; none where it is missing, cut, altered or of another form."""
    try:
        rows = _load(file).items()
        return {k: Verdict(Header(*header), peak, damage) for k, (header, peak, damage) in rows}
    except (ValueError, TypeError):
        return {}


def _dump(rows: dict[str, Any]) -> bytes:
    body = json.dumps(rows, separators=(",", ":"), sort_keys=True).encode()
    return MAGIC + sha256(body).hexdigest().encode() + b"\n" + body


def _load(file: Path) -> dict[str, Any]:
    try:
        head, _, body = file.read_bytes().partition(b"\n")
        if head == MAGIC + sha256(body).hexdigest().encode():
            return dict(json.loads(body))
    except (OSError, ValueError, TypeError):
        pass
    return {}
