"""The second door: a model file and photographs in, names and probabilities out.

    python -m vitft.predict MODEL IMAGE_OR_FOLDER... [--csv FILE] [--top K]

It needs nothing but the model: class names, decoding rules, preprocessing and temperature are in
the file's header. Every file named or listed gets one row; an unreadable one says why, and the exit
code is then 3. Batches have the one shape that a run's own evaluation uses, so that the run's test
photographs get the run's own probabilities.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitft import console, images, io, product, stats
from vitft.console import say, track
from vitft.doubt import Foreign
from vitft.encode import csv_cell
from vitft.errors import DataError, Fault, WeightsError, escape
from vitft.evaluate import fixed_batch, in_fixed_shape
from vitft.features import backbone_of
from vitft.folders import EXTENSIONS
from vitft.images import BadImage, DecodeSpec
from vitft.inputs import TransformSpec, normalise, pixels
from vitft.model import classifier
from vitft.prepare import pick_device


@dataclass(frozen=True)
class Answer:
    """What the model says of one file.

    Attributes:
        path: As listed.
        probabilities: [C] float64 summing to 1, or None where the file could not be read.
        sure: False where the run's threshold says that a person should look.
        foreign: Whether the picture is unlike everything in training; None where not known.
        error: "" or the fault's id and text.
    """

    path: Path
    probabilities: NDArray[np.float64] | None
    sure: bool = True
    foreign: bool | None = None
    error: str = ""


class Predictor:
    """A loaded model with its own preprocessing, temperature and doubts.

    Args:
        path: A run folder, its `model/` folder, or a `model.safetensors`.
        device: As in a recipe.
    """

    def __init__(self, path: Path, device: str = "auto") -> None:
        net, self.card = product.load(path)
        self.device = pick_device(device)
        self.net: nn.Module = net.to(self.device)
        self.decode: DecodeSpec = product.decode_of(self.card)
        self.transform: TransformSpec = product.transform_of(self.card)
        self._pixels = pixels(self.transform)
        self._foreign = _foreign(path, self.net)
        self._threshold = float((self.card.extras.get("abstain") or {}).get("threshold") or 0.0)

    def __call__(self, files: Sequence[Path]) -> Iterator[Answer]:
        """One answer per file, in their order; memory does not grow with their number."""
        workers = max(1, (os.cpu_count() or 1) - 1)
        with ThreadPoolExecutor(workers) as pool:
            size = fixed_batch(self.device)
            for start in range(0, len(files), size):
                chunk = files[start : start + size]
                yield from self._answers(chunk, list(pool.map(self._read, chunk)))

    def _read(self, path: Path) -> Tensor | BadImage:
        try:
            return self._pixels(images.decode(images.read_bytes(path), path, self.decode))
        except BadImage as e:
            return e

    def _answers(self, files: Sequence[Path], read: list[Tensor | BadImage]) -> Iterator[Answer]:
        good = [r for r in read if isinstance(r, Tensor)]
        rows = iter(self._probabilities(torch.stack(good)) if good else ())
        for path, r in zip(files, read, strict=True):
            if isinstance(r, Tensor):
                p, foreign = next(rows)
                yield Answer(path, p, bool(p.max() >= self._threshold), foreign)
            else:
                yield Answer(path, None, error=f"{r.faults[0].id}: {r.faults[0].text}")

    @torch.inference_mode()
    def _probabilities(self, pictures: Tensor) -> list[tuple[NDArray[np.float64], bool | None]]:
        """Uint8 [n, 3, S, S] -> n times ([C], foreign), in the fixed batch."""
        x = normalise(pictures.to(self.device), self.transform)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            if self._foreign is None:
                logits = in_fixed_shape(self.net, x).float()
                foreign: list[bool | None] = [None] * len(x)
            else:
                rows = in_fixed_shape(backbone_of(self.net), x).float()  # [n, D]
                logits = in_fixed_shape(classifier(self.net), rows).float()
                foreign = self._foreign.is_foreign(rows.cpu().numpy()).tolist()
        p = stats.softmax(logits.cpu().numpy(), self.card.temperature or 1.0)
        return list(zip(p, foreign, strict=True))


def _foreign(path: Path, net: nn.Module) -> Foreign | None:
    """What ordinary pictures look like, where the product says so; its arrays must fit the model.

    Raises:
        WeightsError: `ckpt.tables`.
    """
    tables = product.load_tables(path)
    if not tables:
        return None
    try:
        foreign = Foreign.from_tensors(tables)
        foreign.is_foreign(np.ones((1, classifier(net).in_features), np.float32))
    except (KeyError, ValueError, TypeError, IndexError) as error:
        text = f"its {product.TABLES} does not fit the model ({type(error).__name__}: {error})"
        fix = "copy the folder again as a whole"
        raise WeightsError.of("ckpt.tables", path, text[:300], fix) from None
    return foreign


def list_files(inputs: Sequence[Path]) -> list[Path]:
    """Files as given, folders searched for photographs, hidden files left out; sorted per folder.

    Raises:
        DataError: `data.root_missing` for each input that is not there, `data.not_a_file` for
            addresses and standard input, `data.unreadable_folder`.
    """
    missing = [p for p in inputs if not os.path.lexists(p)]
    if missing:
        raise DataError([_absent(str(p)) for p in missing])
    out: list[Path] = []
    for given in inputs:
        out += _walk(given) if given.is_dir() else [given]
    return out


def _absent(given: str) -> Fault:
    if given == "-":
        text, fix = "standard input is not read", "write the picture to a file and name that"
    elif re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", given):  # pathlib made one slash of two
        text, fix = "is an address, predict opens no network", "download it and name the file"
    else:
        text, fix = "there is no such file or folder", "check the path"
        return Fault("data.root_missing", given, text, fix)
    return Fault("data.not_a_file", given, text, fix)


def _walk(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        text = f"cannot be listed ({error.strerror})"
        raise DataError.of("data.unreadable_folder", error.filename, text, "allow reading it")

    found, other = [], 0
    for top, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(d for d in folders if not d.startswith((".", "__MACOSX")))
        for name in sorted(names):
            if name.startswith(".") or not name.lower().endswith(EXTENSIONS):
                other += 1
            else:
                found.append(Path(top) / name)
    if other:
        say(f"{folder}: {other:,} files are not photographs by name and were left out")
    return found


def top(answer: Answer, classes: Sequence[str], k: int) -> list[tuple[str, float]]:
    """The k likeliest classes, the likeliest first; ties in the order of the classes."""
    if answer.probabilities is None:
        return []
    order = np.argsort(-answer.probabilities, kind="stable")[:k]
    return [(classes[i], float(answer.probabilities[i])) for i in order]


def write_csv(
    file: Path, answers: Sequence[Answer], classes: Sequence[str], *, safe: bool = False
) -> None:
    """Columns path, prediction, confidence, sure, foreign, error, p:<class>; one row per file.

    Args:
        file: Replaced whole.
        answers: In their order.
        classes: Names in the order of the probabilities.
        safe: Text that a spreadsheet would compute starts with `'`.
    """
    header = ["path", "prediction", "confidence", "sure", "foreign", "error"]
    header += [f"p:{c}" for c in classes]

    def row(a: Answer) -> list[object]:
        path = csv_cell(str(a.path), safe)
        if a.probabilities is None:
            return [path, "", "", "", "", a.error, *[""] * len(classes)]
        name, p = top(a, classes, 1)[0]
        foreign = "" if a.foreign is None else _yes(a.foreign)
        name = csv_cell(name, safe)
        return [path, name, p, _yes(a.sure), foreign, "", *a.probabilities.tolist()]

    io.write_csv(file, header, map(row, answers))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def told(answer: Answer, classes: Sequence[str], k: int) -> str:
    """One line for the terminal."""
    if answer.probabilities is None:
        return f"{escape(answer.path)}: error {escape(answer.error)}"
    said = ", ".join(f"{escape(c)} {p:.1%}" for c, p in top(answer, classes, k))
    doubts = [] if answer.sure else ["I don't know: below the run's threshold"]
    doubts += ["unlike the training pictures"] if answer.foreign else []
    return f"{escape(answer.path)}: {said}" + "".join(f" ({d})" for d in doubts)


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m vitft.predict`."""
    p = argparse.ArgumentParser(prog="vitft predict", description="Names what photographs show.")
    p.add_argument("model", type=Path, metavar="MODEL", help="run folder or model.safetensors")
    p.add_argument("inputs", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    p.add_argument("--csv", type=Path, metavar="FILE", help="write every probability here")
    p.add_argument("--csv-safe", action="store_true", help="disarm text that looks like a formula")
    p.add_argument("--top", type=int, default=3, metavar="K", help="classes shown (default 3)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line per file; exit code 3 if any could not be read."""
    args = parser().parse_args(argv)
    console.setup()
    predictor = Predictor(args.model, args.device)
    files = list_files(args.inputs)
    classes = predictor.card.classes
    answers = []
    for answer in track(predictor(files), len(files), "predict"):
        answers.append(answer)
        print(told(answer, classes, args.top))  # noqa: T201
    if args.csv:
        write_csv(args.csv, answers, classes, safe=args.csv_safe)
    bad = sum(1 for a in answers if a.error)
    say(f"{len(answers) - bad:,} of {len(answers):,} files answered, {bad:,} unreadable")
    return 3 if bad else 0


if __name__ == "__main__":
    from vitft.cli import door

    sys.exit(door(main))
