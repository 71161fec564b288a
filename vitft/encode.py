"""Values -> the bytes of a JSON, CSV or safetensors file; the disk itself is `vitft.io`'s."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    Tensor = torch.Tensor | np.ndarray[Any, Any]

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet computes a cell that starts like this
DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32",
    "int32": "I32", "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16",
    "float32": "F32", "float64": "F64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A CSV file's text: values quoted where they need it, None empty, a newline after each."""
    return "".join(_csv_line(row) for row in (header, *rows))


def csv_cell(text: str, safe: bool) -> str:
    """Text of a CSV cell; with `safe`, one that a spreadsheet does not compute."""
    return "'" + text if safe and text.startswith(FORMULA) else text


def _csv_line(row: Sequence[object]) -> str:
    # Python's csv.writer leaves a lone \r (legal in file names) bare when lines end in \n.
    cells = ["" if value is None else str(value) for value in row]
    quoted = ['"' + c.replace('"', '""') + '"' if re.search('[",\r\n]', c) else c for c in cells]
    return (",".join(quoted) if cells != [""] else '""') + "\n"


def tensor_chunks(
    tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]
) -> tuple[int, "Iterator[bytes | memoryview]"]:
    """A safetensors file in pieces, so that no second copy of the tensors stands in memory.

    Args:
        tensors: torch tensors on any device, or numpy arrays; views are made contiguous.
        metadata: Text that travels in the header.

    Returns:
        The file's size in bytes, and its header and tensors in order.

    Raises:
        TypeError: A dtype that safetensors cannot hold.

    Source: https://github.com/huggingface/safetensors#format
    """
    for name, tensor in tensors.items():
        if _dtype(tensor) not in DTYPES:
            raise TypeError(f"{name}: safetensors cannot hold {tensor.dtype}")
    # Widest first, so that every tensor starts at a multiple of its own width.
    names = sorted(tensors, key=lambda name: (-_width(tensors[name]), name))
    header, size = _header(names, tensors, metadata)

    def chunks() -> "Iterator[bytes | memoryview]":
        yield header
        for name in names:
            yield _buffer(tensors[name])

    return size, chunks()


def json_text(obj: object, indent: int | None = None) -> str:
    """JSON text; NaN and infinity become null, arrays lists, dataclasses objects, the rest text."""
    text = json.dumps(_plain(obj), indent=indent, ensure_ascii=False, allow_nan=False)
    # Lone surrogates (file names that are not UTF-8) have no UTF-8 form, but a JSON escape.
    return re.sub("[\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", text)


def _plain(obj: Any) -> object:
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if obj is None or isinstance(obj, str | int):
        return obj
    if hasattr(obj, "model_dump"):  # pydantic, which is iterable too
        return _plain(obj.model_dump(mode="json"))
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, Iterable) and not hasattr(obj, "tolist"):
        return [_plain(value) for value in obj]
    if is_dataclass(obj) and not isinstance(obj, type):
        return _plain(asdict(obj))
    if hasattr(obj, "tolist"):  # numpy and torch, scalars too
        return _plain(obj.tolist())
    return str(obj)  # paths


def _header(
    names: Sequence[str], tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + math.prod(tensor.shape) * _width(tensor)
        entry = {"dtype": DTYPES[_dtype(tensor)], "shape": list(tensor.shape)}
        entries[name] = entry | {"data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + end


def _dtype(tensor: "Tensor") -> str:
    return str(getattr(tensor.dtype, "name", tensor.dtype)).removeprefix("torch.")


def _width(tensor: "Tensor") -> int:
    return int(tensor.dtype.itemsize)


def _is_torch(tensor: "Tensor") -> bool:
    return hasattr(tensor, "detach")


def _buffer(tensor: Any) -> memoryview:
    if _is_torch(tensor):
        import torch

        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        return memoryview(flat.view(torch.uint8).numpy())
    import numpy as np

    little = np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<"))
    return memoryview(little.reshape(-1).view(np.uint8).data)
