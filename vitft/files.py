"""Files, replaced whole or not at all: bytes, text, JSON, CSV, tensors, and what others write.

A file is written beside its target, forced to the disk, then renamed over it. Only the rooms behind
`io` may import this one; everyone else calls `io`.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vitft import encode
from vitft.disk import (
    CALLS,
    discarding,
    explained,
    hold,
    is_staged,
    make_dir,
    sync_file,
    sync_folder,
    temp_name,
    write,
)

if TYPE_CHECKING:
    from vitft.encode import Tensor


def sha256_bytes(data: bytes) -> str:
    """The sha256 of bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """The sha256 of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file whole; parent folders are made.

    Raises:
        MachineError: `env.disk_full` or `env.write_failed`; the earlier file is then unchanged.
    """
    _replace(Path(path), [data], len(data))


def write_parts(path: Path, parts: "Iterable[bytes | memoryview]", size: int) -> None:
    """Replaces a file whole by parts that are never in memory together.

    Args:
        path: The target.
        parts: Made while they are written.
        size: About so many bytes, for the error text.

    Raises:
        MachineError: As `write_bytes`.
    """
    _replace(Path(path), parts, size)


def write_text(path: Path, text: str) -> None:
    """Replaces a text file: UTF-8; file names that are not UTF-8 come out as on disk."""
    text = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)  # not from a file name
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, obj: object) -> None:
    """Replaces a JSON file; NaN and infinity become null, arrays lists, dataclasses objects."""
    write_bytes(path, (encode.json_text(obj, indent=1) + "\n").encode())


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Replaces a CSV file; values are quoted where they need it."""
    write_text(path, encode.csv_text(header, rows))


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """Replaces a safetensors file, without a second copy of the tensors in memory.

    Equal tensors and metadata give equal bytes. Tensors that share storage are each written out.

    Args:
        path: The target.
        tensors: torch tensors on any device, or numpy arrays; views are made contiguous.
        metadata: Text that travels in the header.

    Raises:
        MachineError: As `write_bytes`.
        TypeError: A dtype that safetensors cannot hold.

    Source: https://github.com/huggingface/safetensors#format
    """
    size, chunks = encode.tensor_chunks(tensors, metadata)
    _replace(Path(path), chunks, size)


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """For writers that insist on a path of their own (an ONNX exporter): a temporary one to fill.

    When the block ends well, the file is forced to the disk and renamed to `final`.
    """
    make_dir(final.parent)
    temp = temp_name(final, ".tmp" + final.suffix)
    with explained(final), discarding(temp):
        yield temp
        sync_file(temp)
        CALLS.replace(temp, final)
        sync_folder(final.parent)


def _replace(path: Path, chunks: "Iterable[bytes | memoryview]", size: int) -> None:
    make_dir(path.parent)
    temp = temp_name(path)
    with explained(path, size), discarding(temp):
        with CALLS.open(temp, "xb", buffering=0) as file:
            hold(file.fileno())
            for chunk in chunks:
                write(file, chunk)
            if not is_staged(path):
                CALLS.fsync(file.fileno())
        CALLS.replace(temp, path)
        sync_folder(path.parent)
