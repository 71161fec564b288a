"""float16 and int8 beside an ONNX file: what they save, what they cost, on real photographs.

Accuracy, agreement and speed are measured here and now, next to the float32 file and PyTorch, and
written to variants.json; nothing is promised from elsewhere.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from vitft.stats import wilson

VARIANTS = "variants.json"
ROUNDS = 5  # of a timing
WORTH = 0.8  # of the float32 file; a larger int8 file saves nothing


@dataclass(frozen=True)
class Variant:
    """One precision, measured.

    Attributes:
        name: Such as `int8`.
        megabytes: Of the file; None for PyTorch.
        agreement: With the model in PyTorch.
        ms_one: Milliseconds for one image, median.
        per_second: Images in batches of 32, median.
    """

    name: str
    megabytes: float | None
    agreement: Agreement
    ms_one: float
    per_second: float


def write(
    net: nn.Module,
    card: Card,
    source: Path,
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
    if files["int8"].stat().st_size > WORTH * source.stat().st_size:
        warn("int8 holds for matrix products only, and this network is hardly made of them")
    files = {"float32": source} | files
    runners = {n: graph.open_onnx(f, transform, uint8=uint8) for n, f in files.items()}
    runners = {"PyTorch": _torch_runner(net, card)} | runners
    _, found = proof.compare(net, card, evidence, list(runners.values()))
    speeds = _speeds(list(runners.values()), transform)
    rows = [
        Variant(name, _megabytes(files.get(name)), agreement, *speed)
        for name, agreement, speed in zip(runners, found, speeds, strict=True)
    ]
    io.write_json(folder / VARIANTS, {"photographs": evidence.what, "variants": rows})


def _megabytes(file: Path | None) -> float | None:
    return None if file is None else file.stat().st_size / 1e6


def _torch_runner(net: nn.Module, card: Card) -> Runner:
    def run(pixels: torch.Tensor) -> tuple[graph.Floats, graph.Floats]:
        with torch.inference_mode():
            logits = net(normalise(pixels, product.transform_of(card)))
        return logits.numpy(), (logits / (card.temperature or 1.0)).softmax(dim=1).numpy()

    return run


def _speeds(runners: list[Runner], transform: TransformSpec) -> list[tuple[float, float]]:
    """Milliseconds for one image and images per second in batches of 32; ways take turns."""
    one = torch.randint(0, 256, (1, 3, *transform.size), dtype=torch.uint8)
    many = one.expand(32, -1, -1, -1).contiguous()
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in runners]
    for _ in range(ROUNDS):
        for runner, (single, batch) in zip(runners, times, strict=True):
            runner(one)
            single.append(_seconds(lambda run=runner: run(one)))  # type: ignore[misc]
            batch.append(_seconds(lambda run=runner: run(many)))  # type: ignore[misc]
    return [(1e3 * statistics.median(a), 32 / statistics.median(b)) for a, b in times]


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def table(folder: Path) -> list[str]:
    """variants.json for people."""
    told: Mapping[str, Any] = json.loads((folder / VARIANTS).read_text("utf-8"))
    lines = [
        f"{'variant':<9} {'MB':>7} {'accuracy':>25} {'alike':>9} {'largest diff':>12} "
        f"{'ms for 1':>9} {'images/s':>9}"
    ]
    for row in told["variants"]:
        a = row["agreement"]
        size = "-" if row["megabytes"] is None else f"{row['megabytes']:.1f}"
        lines.append(
            f"{row['name']:<9} {size:>7} {_accuracy(a):>25} {a['same']:>4}/{a['n']:<4} "
            f"{a['probability']:>12.1e} {row['ms_one']:>9.1f} {row['per_second']:>9.1f}"
        )
    return lines


def _accuracy(agreement: Mapping[str, Any]) -> str:
    right, n = agreement["right"], agreement["n"]
    if right is None:
        return "labels not known"
    bounds = wilson(right, n)
    return f"{right / n:.1%} [{100 * bounds.low:.1f}, {100 * bounds.high:.1f}]"
