"""A file of tensors: what it really is, and what it holds, without running any of it.

In: a path. Out: containers of tensors on the CPU, or `WeightsError` that names what is wrong.
The content decides, not the file's name: PyTorch zip, PyTorch before 1.6, safetensors, numpy zip.
Pickles are read with `weights_only=True` and in no other way.
"""

import argparse
import difflib
import json
import math
import pickletools
import re
import stat
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from vitft.errors import WeightsError

KINDS = {
    "torch": "PyTorch",
    "torch-legacy": "PyTorch (before 1.6)",
    "safetensors": "safetensors",
    "npz": "numpy .npz",
}
SUFFIXES = {".safetensors": ("safetensors",), ".npz": ("npz",)}  # others: either torch kind
HEADER_LIMIT = 16 << 20  # bytes of JSON; ViT-H/14 needs 0.05 MB of it
SAFE_TORCH = (2, 10)  # weights_only can be escaped below (CVE-2025-32434, CVE-2026-24747)
SAFE_COPY = (
    "get the weights as .safetensors; or, with the software that wrote this file and in an "
    "environment of its own, save its state_dict() with safetensors.torch.save_file"
)
_OTHERS = (  # first bytes of files that people take for weights
    (b"\x89HDF\r\n", "an HDF5 file (Keras)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"BZh", "a bzip2 archive"),
    (b"7z\xbc\xaf", "a 7-zip archive"),
    (b"\x93NUMPY", "a single numpy array (.npy)"),
    (b"GGUF", "a GGUF file (llama.cpp)"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG", "a PNG picture"),
    (b"%PDF", "a PDF document"),
)


def size_bound(file_bytes: int) -> int:
    """How many bytes a file may unpack to; weights hardly compress, a bomb does nothing else."""
    return 8 * file_bytes + (64 << 20)


# --- what is it ----------------------------------------------------------------------------------


def sniff(path: Path) -> str:
    """Which of `KINDS` the file is, by its content.

    Raises:
        WeightsError: Not there, not a plain file, empty, cut short, something else, or a bomb.
    """
    _require_file(path)
    size = path.stat().st_size
    if size == 0:
        raise WeightsError.of("ckpt.empty", path, "the file has 0 bytes", "copy it again")
    with path.open("rb") as f:
        head = f.read(4096)
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(path, size)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "torch-legacy"
    if head[8:9] == b"{" or path.suffix == ".safetensors" and not _is_text(head):
        return "safetensors"
    _refuse_other(path, head, size)


def misnamed(path: Path, kind: str) -> str | None:
    """A remark where the file's name promises another kind than its content is."""
    wanted = SUFFIXES.get(path.suffix.lower(), ("torch", "torch-legacy"))
    if kind in wanted:
        return None
    return f"{path.name} is {KINDS[kind]} inside; the content counts, not the name"


def _require_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except PermissionError:
        raise WeightsError.of(
            "ckpt.permission", path, "may not be read by this user", "change its permissions"
        ) from None
    except (OSError, ValueError):
        if path.is_symlink():
            text = f"is a link to {path.readlink()}, where nothing is"
            raise WeightsError.of("ckpt.missing", path, text, "name the file itself") from None
        near = _near(path)
        fix = f"did you mean {near}?" if near else "check the path"
        raise WeightsError.of("ckpt.missing", path, "there is no such file", fix) from None
    if stat.S_ISDIR(mode):
        found = [p for pattern in ("*", "*/*") for p in sorted(path.glob(pattern))]
        inside = [str(p.relative_to(path)) for p in found if p.suffix in _TENSOR_SUFFIXES]
        fix = f"name one of its files: {', '.join(inside[:5])}" if inside else "name a file"
        raise WeightsError.of("ckpt.directory", path, "is a folder, not a file", fix)
    if not stat.S_ISREG(mode):
        text = "is a pipe, socket or device, not a plain file"
        raise WeightsError.of("ckpt.not_regular", path, text, "name a plain file")


_TENSOR_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz", ".ckpt", ".tar")


def _near(path: Path) -> str:
    """The most similar name in the same folder; without the folder, the part that exists."""
    with suppress(OSError, ValueError):
        names = [p.name for p in path.parent.iterdir()]
        close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
        return str(path.parent / close[0]) if close else ""
    return ""


def _sniff_zip(path: Path, size: int) -> str:
    try:
        with zipfile.ZipFile(path) as z:
            entries = z.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        text = f"the zip archive stops early: {size:,} bytes, and no directory at its end"
        raise WeightsError.of("ckpt.truncated", path, text, "copy or download it again") from None
    names = [e.filename for e in entries]
    total, bound = sum(e.file_size for e in entries), size_bound(size)
    if total > bound:
        text = f"{size:,} bytes would unpack to {total:,}, the bound is {bound:,}"
        raise WeightsError.of("ckpt.bomb", path, text, "do not use this file; get it elsewhere")
    if any(n.endswith("/constants.pkl") for n in names):
        text = "is a TorchScript archive (a program), not weights"
        fix = f"{SAFE_COPY}; OpenAI's CLIP is on the hub as openai/clip-vit-base-patch32 and others"
        raise WeightsError.of("ckpt.torchscript", path, text, fix)
    if any(n == "data.pkl" or n.endswith("/data.pkl") for n in names):
        return "torch"
    if names and all(n.endswith(".npy") for n in names):
        return "npz"
    text = f"is a zip archive without tensors (it holds {', '.join(names[:3]) or 'nothing'})"
    raise WeightsError.of("ckpt.not_weights", path, text, "unpack it and name the weights inside")


def _is_text(head: bytes) -> bool:
    try:
        return head.decode("utf-8", "strict" if len(head) < 4096 else "ignore").isprintable() or (
            all(b >= 32 or b in b"\t\n\r\f" for b in head)
        )
    except UnicodeDecodeError:
        return False


def _refuse_other(path: Path, head: bytes, size: int) -> NoReturn:
    start = head.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        wanted = re.search(rb"size (\d+)", head)
        real = f" of a file of {int(wanted[1]):,} bytes" if wanted else ""
        text = f"is a git-lfs pointer{real}, not the weights ({size:,} bytes of text)"
        raise WeightsError.of("ckpt.lfs", path, text, "run `git lfs pull`, or download the file")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        text = f"is a web page, not weights ({size:,} bytes)"
        fix = "the download gave a login or error page; open the address in a browser"
        raise WeightsError.of("ckpt.html", path, text, fix)
    known = next((what for magic, what in _OTHERS if head.startswith(magic)), "")
    if head[257:262] == b"ustar":
        known = "a tar archive"
    if not known and _is_text(head):
        known = f"a text file that begins {head[:40].decode('utf-8', 'replace')!r}"
    text = f"is {known}" if known else f"is no kind of tensor file known here: {head[:8]!r}..."
    fix = f"weights come as {', '.join(KINDS.values())}"
    raise WeightsError.of("ckpt.not_weights", path, text, fix)


# --- what does it hold ---------------------------------------------------------------------------


def load(path: Path, kind: str) -> Any:
    """The content: a container of tensors, as deep as it was saved.

    Raises:
        WeightsError: Damaged, or it would have to run code.
    """
    if kind == "safetensors":
        return _load_safetensors(path)
    if kind == "npz":
        return _load_npz(path)
    return _load_torch(path, kind)


def _load_torch(path: Path, kind: str) -> Any:
    version = tuple(int(v) for v in re.findall(r"\d+", torch.__version__)[:2])
    if version < SAFE_TORCH:
        text = f"torch {torch.__version__} cannot open pickles safely"
        fix = f"install torch {'.'.join(map(str, SAFE_TORCH))} or newer, or use .safetensors"
        raise WeightsError.of("ckpt.old_torch", path, text, fix)
    if kind == "torch":
        _check_crc(path)
    try:
        # many research checkpoints carry their command line; a Namespace only holds values
        with (
            path.open("rb") as f,  # given a path, torch would go by its suffix
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # torch on old storages; nothing a reader can change
            return torch.load(f, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises a dozen types here; none says what the file is
        _refuse_pickle(path, kind, e)


def _check_crc(path: Path) -> None:
    """Zip entries carry a checksum that torch does not look at; 0 means written without one."""
    with zipfile.ZipFile(path) as z:
        for entry in z.infolist():
            if entry.CRC == 0:
                continue
            try:
                with z.open(entry) as f:
                    while f.read(1 << 20):
                        pass
            except Exception:  # of zipfile, its decompressors, and a seek to below 0
                text = f"{entry.filename} does not match its checksum: bytes were changed"
                raise WeightsError.of("ckpt.corrupt", path, text, "copy it again") from None


def _refuse_pickle(path: Path, kind: str, error: Exception) -> NoReturn:
    names = sorted(set(_globals(path, kind)))
    modules = [n for n in names if n.startswith("torch.nn.modules.")]
    inert = ("torch.", "collections.", "argparse.")
    foreign = [n for n in names if not n.startswith(inert)]
    if modules:
        shown = ", ".join((foreign + modules)[:3])
        text = f"this file holds a whole module, not weights ({shown})"
        raise WeightsError.of("ckpt.module", path, text, SAFE_COPY) from None
    if foreign:
        text = f"would have to run code to be read: {', '.join(foreign[:5])}"
        raise WeightsError.of("ckpt.code", path, text, SAFE_COPY) from None
    said = str(error).strip().splitlines()
    text = f"the pickle is damaged or cut short ({type(error).__name__}"
    text += f": {said[0][:100]})" if said and "weights_only" not in said[0] else ")"
    raise WeightsError.of("ckpt.truncated", path, text, "copy or download it again") from None


def _globals(path: Path, kind: str) -> Iterator[str]:
    """Dotted names that the pickle asks for, read off its opcodes; nothing is imported."""
    with suppress(Exception):  # half a pickle still names half its globals
        if kind == "torch":
            with zipfile.ZipFile(path) as z:
                name = next(n for n in z.namelist() if n.endswith("data.pkl"))
                yield from _names(z.read(name))
            return
        yield from _names(path.read_bytes())


def _names(data: bytes) -> Iterator[str]:
    start = 0
    while data[start : start + 1] == b"\x80":  # a legacy file is a row of pickles, then raw bytes
        strings: list[str] = []
        for opcode, value, position in pickletools.genops(data[start:]):
            if opcode.name == "GLOBAL":
                yield str(value).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                yield ".".join(strings[-2:])
            elif isinstance(value, str):
                strings.append(value)
            if opcode.name == "STOP":
                start += (position or 0) + 1


# --- safetensors ---------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, bounded and checked against the file's length.

    Raises:
        WeightsError: Too short, too large, no JSON, or a name twice.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length > HEADER_LIMIT:
            text = f"its header claims {length:,} bytes, the limit is {HEADER_LIMIT:,}"
            raise WeightsError.of("ckpt.header", path, text, "copy it again, or get it elsewhere")
        raw = f.read(length)
    _require_size(path, size, 8 + max(length, 2))
    try:
        header = json.loads(raw, object_pairs_hook=_no_twins)
        if not isinstance(header, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as e:
        text = f"its header is damaged: {str(e)[:100] or type(e).__name__}"
        raise WeightsError.of("ckpt.header", path, text, "copy it again") from None
    ends = [_end(entry) for name, entry in header.items() if name != "__metadata__"]
    _require_size(path, size, 8 + length + max(ends, default=0))
    return header


def _require_size(path: Path, size: int, need: int) -> None:
    if size < need:
        text = f"stops early: {size:,} bytes of {need:,}"
        raise WeightsError.of("ckpt.truncated", path, text, "copy or download it again")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twin = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twin[:80]!r} occurs twice")
    return out


def read_metadata(path: Path) -> dict[str, str]:
    """The free text that a safetensors file carries: name -> text; empty where there is none."""
    metadata = read_header(path).get("__metadata__", {})
    return {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as e:
        text = f"the header does not describe the file: {str(e)[:120]}"
        raise WeightsError.of("ckpt.header", path, text, "copy it again") from None


def _end(entry: Any) -> int:
    try:
        return int(entry["data_offsets"][1])
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):
        return 0  # safetensors itself says what is wrong with such an entry


# --- numpy ---------------------------------------------------------------------------------------


def _load_npz(path: Path) -> dict[str, Tensor]:
    import numpy as np

    out: dict[str, Tensor] = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                array = archive[name]
                if array.dtype.kind in "USMm":
                    text = f"array {name!r} holds texts or dates, not numbers"
                    fix = "save the weights alone, without it"
                    raise WeightsError.of("ckpt.kind", path, text, fix)
                out[name] = _tensor(array)
    except WeightsError:
        raise
    except Exception as e:  # of numpy, zipfile, zlib, ast and tokenize
        if "allow_pickle" in str(e):
            text = f"array {name!r} holds Python objects, which only running code can read"
            raise WeightsError.of("ckpt.code", path, text, SAFE_COPY) from None
        text = f"an array cannot be read: {str(e)[:100] or type(e).__name__}"
        raise WeightsError.of("ckpt.corrupt", path, text, "copy it again") from None
    return out


def _tensor(array: Any) -> Tensor:
    import numpy as np

    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # numpy has no bfloat16; JAX does
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))


# --- values --------------------------------------------------------------------------------------


def count_nonfinite(tensor: Tensor) -> int:
    """How many of its stored values are NaN or infinite; repeats of an expanded one count once."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return 0
    stored = tensor[tuple(slice(0, 1) if s == 0 else slice(None) for s in tensor.stride())]
    if stored.element_size() == 1:
        stored = stored.float()  # float8 has no arithmetic of its own
    if torch.isfinite(stored.sum()):  # as every one of its values is, then; it may overflow
        return 0
    return int(stored.numel() - torch.isfinite(stored).sum())


def is_plain(tensor: Tensor) -> bool:
    """Dense, real or integer, not quantised, and no wider than what was stored for it.

    A tensor may repeat itself by a stride of 0; any other overlap makes small files huge.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex():
        return False
    repeats = math.prod(n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s == 0)
    stored = tensor.untyped_storage().nbytes()
    return tensor.numel() * tensor.element_size() <= max(repeats, 1) * stored
