"""float16 and int8 beside an ONNX file: what they save, what they cost, on real photographs.

Accuracy, its difference to PyTorch's on the same photographs, agreement and speed are measured here
and now and written to variants.json; nothing is promised from elsewhere.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitft import graph, io, product, proof
from vitft.card import Card
from vitft.console import warn
from vitft.graph import Deployed, Runner
from vitft.inputs import TransformSpec, normalise
from vitft.proof import Agreement, Evidence
from vitft.stats import Interval, paired_interval, wilson

VARIANTS = "variants.json"
ROUNDS = 5  # of a timing
BATCH = 8  # images of a timing; of 32 onnxruntime on two cores answers no more per second
WORTH = 0.8  # of the float32 file; a larger int8 file saves nothing


@dataclass(frozen=True)
class Variant:
    """One precision, measured.

    Attributes:
        name: Such as `int8`.
        megabytes: Of the file; None for PyTorch.
        agreement: With the model in PyTorch.
        ms_one: Milliseconds for one image, median.
        per_second: Images in batches of `BATCH`, median.
    """

    name: str
    megabytes: float | None
    agreement: Agreement
    ms_one: float
    per_second: float

    @property
    def accuracy(self) -> tuple[float, Interval] | None:
        """With its Wilson interval; None where labels are not known."""
        a = self.agreement
        return None if a.right is None else (a.right / a.n, wilson(a.right, a.n))

    @property
    def difference(self) -> tuple[float, Interval] | None:
        """Accuracy minus PyTorch's, photograph by photograph, and its interval; not its own."""
        a = self.agreement
        if self.megabytes is None or a.lost is None or a.gained is None:
            return None
        return (a.gained - a.lost) / a.n, paired_interval(a.lost, a.gained, a.n)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        out = {**asdict(self), "accuracy": None, "difference": None}
        for name in ("accuracy", "difference"):
            if found := getattr(self, name):
                value, bounds = found
                out[name] = {"value": value, "low": bounds.low, "high": bounds.high}
        return out


def write(
    net: nn.Module,
    card: Card,
    source: Path,
    runner: Runner,
    evidence: Evidence,
    *,
    uint8: bool,
    metadata: Mapping[str, str],
) -> None:
    """Writes `model.float16.onnx`, `model.int8.onnx` and variants.json.

    Args:
        net: In float32 on the CPU.
        card: Of the model.
        source: Its ONNX file; the others appear beside it.
        runner: This file, opened.
        evidence: Photographs to measure on.
        uint8: As the source.
        metadata: As the source.
    """
    folder = source.parent
    transform, temperature = product.transform_of(card), card.temperature or 1.0
    half = Deployed(net, transform, temperature, uint8=uint8, half=True)
    files = {name: folder / f"model.{name}.onnx" for name in ("float16", "int8")}
    graph.write_onnx(half, transform, files["float16"], metadata)
    graph.quantise(source, files["int8"])
    _require_worth(source, files["int8"])
    opened = {n: graph.open_onnx(f, transform, uint8=uint8) for n, f in files.items()}
    runners = {"PyTorch": _torch_runner(net, card), "float32": runner} | opened
    on_disk = {"float32": source} | files
    _, found = proof.compare(net, card, evidence, list(runners.values()))
    speeds = _speeds(list(runners.values()), transform)
    rows = [
        Variant(name, _megabytes(on_disk.get(name)), agreement, *speed)
        for name, agreement, speed in zip(runners, found, speeds, strict=True)
    ]
    told = {"photographs": evidence.what, "threads": torch.get_num_threads()}
    io.write_json(folder / VARIANTS, told | {"variants": [row.record() for row in rows]})


def _require_worth(source: Path, small: Path) -> None:
    """Says so where int8 saves next to nothing."""
    before, after = source.stat().st_size, small.stat().st_size
    if after > WORTH * before:
        warn(
            f"{small.name} has {after / 1e6:.1f} MB, {source.name} {before / 1e6:.1f}: int8 holds "
            "for matrix products only, and this network is hardly made of them; the float16 file "
            "is the small one"
        )


def _megabytes(file: Path | None) -> float | None:
    return None if file is None else file.stat().st_size / 1e6


def _torch_runner(net: nn.Module, card: Card) -> Runner:
    def run(pixels: torch.Tensor) -> tuple[graph.Floats, graph.Floats]:
        with torch.inference_mode():
            logits = net(normalise(pixels, product.transform_of(card)))
        return logits.numpy(), (logits / (card.temperature or 1.0)).softmax(dim=1).numpy()

    return run


def _speeds(runners: list[Runner], transform: TransformSpec) -> list[tuple[float, float]]:
    """Milliseconds for one image and images per second in batches; ways take turns."""
    one = torch.randint(0, 256, (1, 3, *transform.size), dtype=torch.uint8)
    many = one.expand(BATCH, -1, -1, -1).contiguous()
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in runners]
    for _ in range(ROUNDS):
        for runner, (single, batch) in zip(runners, times, strict=True):
            runner(one)
            single.append(_seconds(lambda run=runner: run(one)))  # type: ignore[misc]
            batch.append(_seconds(lambda run=runner: run(many)))  # type: ignore[misc]
    return [(1e3 * statistics.median(a), BATCH / statistics.median(b)) for a, b in times]


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def table(folder: Path) -> list[str]:
    """variants.json for people."""
    told: Mapping[str, Any] = json.loads((folder / VARIANTS).read_text("utf-8"))
    lines = [
        f"{'variant':<9} {'MB':>7} {'accuracy, %':>20} {'minus PyTorch':>20} {'alike':>9} "
        f"{'largest diff':>12} {'ms for 1':>9} {'images/s':>9}"
    ]
    for row in told["variants"]:
        a = row["agreement"]
        size = "-" if row["megabytes"] is None else f"{row['megabytes']:.1f}"
        lines.append(
            f"{row['name']:<9} {size:>7} {_points(row['accuracy'], missing='not known'):>20} "
            f"{_points(row['difference'], '+'):>20} {a['same']:>4}/{a['n']:<4} "
            f"{a['probability']:>12.1e} {row['ms_one']:>9.1f} {row['per_second']:>9.1f}"
        )
    return lines


def _points(found: Mapping[str, float] | None, sign: str = "", missing: str = "-") -> str:
    """`87.5 [80.4, 92.3]` in percent."""
    if found is None:
        return missing
    value, low, high = (100 * found[name] for name in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"
