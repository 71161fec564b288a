"""That an exported file is the model: on real photographs now, and on three wherever it goes.

The photographs are the run's own test photographs, or those the reader names, or the bundled sample
where neither is at hand. Every one goes through the guarded decoder and the Card's preprocessing,
then through the model in PyTorch on the CPU and through the file. Three golden images with their
logits travel in the folder, so that whoever receives it can check it again.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitft import card as cards
from vitft import containers, images, io, offline, product, recipe, stats
from vitft.card import Card
from vitft.console import track, warn
from vitft.errors import DataError, VitftError, WeightsError
from vitft.evaluate import fixed_batch, in_fixed_shape
from vitft.folders import EXTENSIONS
from vitft.graph import Runner
from vitft.images import BadImage, DecodeSpec
from vitft.inputs import TransformSpec, normalise, pixels
from vitft.table import read_table

TOLERANCE = 1e-4  # of a probability; of a logit, times 1 + the largest
STAND_IN = 64  # bundled photographs, where the run's are not here
GOLDEN = 3
FOLDER, LIST = "golden", "golden.json"
SAMPLE = offline.BUNDLED / "flowers"


@dataclass(frozen=True)
class Evidence:
    """Photographs to compare on.

    Attributes:
        files: At least one.
        what: Such as `the run's 35 test photographs`.
        labels: Names of the true classes, or None.
        stored: [N, C] probabilities of the run's predictions.csv, or None.
    """

    files: tuple[Path, ...]
    what: str
    labels: tuple[str, ...] | None = None
    stored: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Answers:
    """What the model in PyTorch says of the photographs that could be read.

    Attributes:
        rows: [n] into the evidence.
        logits: [n, C] float32.
        probabilities: [n, C] float64, calibrated.
    """

    rows: NDArray[np.int64]
    logits: NDArray[np.float32]
    probabilities: NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """A file against the model.

    Attributes:
        n: Photographs compared.
        probability: Largest difference of a probability.
        logit: Largest difference of a logit.
        scale: Largest logit.
        same: Photographs with the same answer.
        stored: Largest difference to predictions.csv, or None.
        stored_same: Photographs with the answer of predictions.csv, or None.
        right: Correct answers, or None where labels are not known.
        lost: Photographs that the model in PyTorch alone has right, or None.
        gained: Photographs that the file alone has right, or None.
    """

    n: int
    probability: float
    logit: float
    scale: float
    same: int
    stored: float | None = None
    stored_same: int | None = None
    right: int | None = None
    lost: int | None = None
    gained: int | None = None

    @property
    def good(self) -> bool:
        """Within the tolerance."""
        return self.probability <= TOLERANCE and self.logit <= TOLERANCE * (1 + self.scale)

    def line(self) -> str:
        """For people."""
        text = (
            f"largest difference to PyTorch on {self.n:,} photographs: {self.probability:.1e} of a "
            f"probability, {self.logit:.1e} of a logit; {self.same:,} of {self.n:,} answers alike"
        )
        if self.stored is not None:
            text += (
                f"; predictions.csv: {self.stored_same:,} of {self.n:,} answers alike, largest "
                f"difference of a probability {self.stored:.1e}"
            )
        return text


# --- what to compare on --------------------------------------------------------------------------


def gather(model: Path, given: Sequence[Path], limit: int) -> Evidence:
    """The photographs to compare on.

    Args:
        model: Run folder, `model/` folder or file.
        given: Photographs that the reader named; they go first.
        limit: At most so many, evenly over the list.

    Raises:
        DataError: `export.photographs`: a table of the run that cannot be read.
    """
    if given:
        files = _spread(tuple(given), limit)
        return Evidence(files, f"the {len(files):,} photographs given")
    file = product.find_file(model)
    run, classes = file.parent.parent, cards.read(file).classes
    found = _of_run(run, classes) if (run / "predictions.csv").is_file() else None
    if found is None:
        warn("the run's test photographs are not here; the bundled flowers are used to compare")
        files = _spread(tuple(sorted(SAMPLE.rglob("*.jpg"))), min(limit, STAND_IN))
        return Evidence(files, f"{len(files):,} bundled photographs")
    rows = _spread(tuple(range(len(found.files))), limit)
    files = tuple(found.files[i] for i in rows)
    labels = tuple((found.labels or ())[i] for i in rows)
    stored = None if found.stored is None else found.stored[list(rows)]
    return Evidence(files, f"{len(files):,} of the run's scored photographs", labels, stored)


def _spread(items: tuple[Any, ...], limit: int) -> tuple[Any, ...]:
    if len(items) <= limit:
        return items
    return tuple(items[i] for i in np.linspace(0, len(items) - 1, limit).astype(int))


def _of_run(run: Path, classes: Sequence[str]) -> Evidence | None:
    """The photographs of predictions.csv; None if the first of them has gone."""
    try:
        rows = read_table(run / "predictions.csv", required=("path", "label"))
        root = offline.base(recipe.of_run(run).data.root)
        stored = [[float(row.get(f"p:{name}")) for name in classes] for row in rows]
        files = tuple(root / row.get("path") for row in rows)
        labels = tuple(row.get("label") for row in rows)
    except (OSError, ValueError) as error:  # a VitftError is a ValueError
        text = f"its predictions.csv or recipe cannot be read ({type(error).__name__}: {error})"
        fix = "name photographs with --images"
        raise DataError.of("export.photographs", run, text[:300], fix) from None
    if not files or not containers.exists(files[0]):
        return None
    return Evidence(files, "", labels, np.asarray(stored))


def _read(
    files: Sequence[Path], decode: DecodeSpec, transform: TransformSpec
) -> Iterator[tuple[int, Tensor]]:
    """Row and uint8 [3, S, S] of each file that can be read; the others are said."""
    turn = pixels(transform)
    for row, file in enumerate(files):
        try:
            yield row, turn(images.decode(images.read_bytes(file), file, decode))
        except BadImage as error:
            warn(str(error))


def chunks(evidence: Evidence, card: Card) -> Iterator[tuple[list[int], Tensor]]:
    """Rows and pixels uint8 [n, 3, S, S], as many as PyTorch takes at a time.

    More would not be faster, and onnxruntime keeps the memory of its largest batch: 0.87 GB for 32
    photographs through a ViT-S/14, 0.23 GB for 8, of every file that is open.
    """
    size = fixed_batch(torch.device("cpu"))
    rows: list[int] = []
    stack: list[Tensor] = []
    read = _read(evidence.files, product.decode_of(card), product.transform_of(card))
    for row, picture in track(read, len(evidence.files), "comparing"):
        rows.append(row)
        stack.append(picture)
        if len(rows) == size:
            yield rows, torch.stack(stack)
            rows, stack = [], []
    if rows:
        yield rows, torch.stack(stack)


# --- comparing -----------------------------------------------------------------------------------


@torch.inference_mode()
def logits_of(net: nn.Module, batch: Tensor, transform: TransformSpec) -> NDArray[np.float32]:
    """Uint8 [n, 3, S, S] -> [n, C] by the model in PyTorch, as predict computes it."""
    parts = torch.split(normalise(batch, transform), fixed_batch(torch.device("cpu")))
    return np.asarray(torch.cat([in_fixed_shape(net, x).float() for x in parts]).numpy())


def compare(
    net: nn.Module, card: Card, evidence: Evidence, runners: Sequence[Runner]
) -> tuple[Answers, list[Agreement]]:
    """Every photograph through the model and through each file.

    Raises:
        DataError: `export.photographs`: none can be read.
    """
    transform, rows, ours = product.transform_of(card), [], []
    theirs: list[list[tuple[Any, Any]]] = [[] for _ in runners]
    for numbers, batch in chunks(evidence, card):
        rows += numbers
        ours.append(logits_of(net, batch, transform))
        for runner, said in zip(runners, theirs, strict=True):
            said.append(runner(batch))
    if not rows:
        text = "none of the photographs can be read"
        fix = "name others with --images"
        raise DataError.of("export.photographs", evidence.files[0], text, fix)
    logits = np.concatenate(ours)
    p = stats.softmax(logits, card.temperature or 1.0)
    answers = Answers(np.asarray(rows, np.int64), logits, p)
    return answers, [
        _agreement(
            answers,
            np.concatenate([a for a, _ in said]),
            np.concatenate([b for _, b in said]),
            evidence,
            card,
        )
        for said in theirs
    ]


def _agreement(
    ours: Answers,
    logits: NDArray[np.float32],
    probabilities: NDArray[np.float32],
    evidence: Evidence,
    card: Card,
) -> Agreement:
    said = probabilities.argmax(axis=1)
    stored = None if evidence.stored is None else evidence.stored[ours.rows]
    right = lost = gained = None
    if evidence.labels is not None:
        labels = np.array([card.classes.index(evidence.labels[i]) for i in ours.rows])
        here, there = said == labels, ours.probabilities.argmax(axis=1) == labels
        right, lost, gained = (int(m.sum()) for m in (here, there & ~here, here & ~there))
    return Agreement(
        n=len(said),
        probability=_largest(probabilities - ours.probabilities),
        logit=_largest(logits - ours.logits),
        scale=float(np.abs(ours.logits).max()),
        same=int((said == ours.probabilities.argmax(axis=1)).sum()),
        stored=None if stored is None else _largest(probabilities - stored),
        stored_same=None if stored is None else int((said == stored.argmax(axis=1)).sum()),
        right=right,
        lost=lost,
        gained=gained,
    )


def _largest(difference: NDArray[Any]) -> float:
    """NaN counts as the largest."""
    value = float(np.abs(difference).max())
    return value if np.isfinite(value) else float("inf")


# --- golden images -------------------------------------------------------------------------------


def write_golden(folder: Path, card: Card, evidence: Evidence, answers: Answers) -> None:
    """Copies three photographs, as they are, with the logits that PyTorch gave.

    Args:
        folder: Of the export.
        card: Its transform made the pixels.
        evidence: Where the photographs are.
        answers: On these photographs.
    """
    listed = []
    for k, i in enumerate(_spread(tuple(range(len(answers.rows))), GOLDEN)):
        file = evidence.files[int(answers.rows[i])]
        suffix = file.suffix.lower() if file.suffix.lower() in EXTENSIONS else ".img"
        data = images.read_bytes(file)
        io.write_bytes(folder / FOLDER / f"{k}{suffix}", data)
        best = int(answers.probabilities[i].argmax())
        listed.append(
            {
                "file": f"{k}{suffix}",
                "sha256": io.sha256_bytes(data),
                "pixels_sha256": _pixel_sum(data, file, card),
                "logits": answers.logits[i].tolist(),
                "probabilities": answers.probabilities[i].tolist(),
                "answer": card.classes[best],
            }
        )
    about = {"tolerance": TOLERANCE, "images": listed}
    io.write_json(folder / FOLDER / LIST, about)


def _pixel_sum(data: bytes, place: Path, card: Card) -> str:
    picture = images.decode(data, place, product.decode_of(card))
    return io.sha256_bytes(pixels(product.transform_of(card))(picture).numpy().tobytes())


def check_golden(folder: Path, card: Card, runner: Runner) -> Iterator[tuple[str, bool]]:
    """One line per golden image and whether it holds.

    Raises:
        WeightsError: `export.golden`: the list is missing or damaged.
        BadImage: An image cannot be read.
    """
    for entry in _golden(folder, len(card.classes)):
        file = folder / FOLDER / Path(entry["file"]).name
        data = images.read_bytes(file)
        picture = images.decode(data, file, product.decode_of(card))
        x = pixels(product.transform_of(card))(picture)
        same = io.sha256_bytes(x.numpy().tobytes()) == entry["pixels_sha256"]
        logits, p = runner(x.unsqueeze(0))
        gap = _largest(p[0] - np.asarray(entry["probabilities"]))
        apart = _largest(logits[0] - np.asarray(entry["logits"], np.float32))
        scale = float(np.abs(entry["logits"]).max())
        good = gap <= TOLERANCE and apart <= TOLERANCE * (1 + scale)
        said = card.classes[int(p[0].argmax())]
        text = f"{file.name}: {said}, differs by {gap:.1e} of a probability, {apart:.1e} of a logit"
        if not same:
            text += "; its pixels differ, so this machine decodes or resizes otherwise"
        yield text, good


def _golden(folder: Path, classes: int) -> list[dict[str, Any]]:
    file = folder / FOLDER / LIST
    try:
        listed: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["images"]
        for entry in listed:
            sizes = {len(entry["logits"]), len(entry["probabilities"])}
            numbers = np.asarray([entry["logits"], entry["probabilities"]], np.float64)
            if sizes != {classes} or not np.isfinite(numbers).all():
                raise ValueError("a row does not fit the classes")
            Path(entry["file"]), entry["pixels_sha256"] + ""
        if not listed:
            raise ValueError("it is empty")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        text = f"cannot be read ({type(error).__name__}: {error})"
        raise WeightsError.of("export.golden", file, text[:200], "export the model again") from None
    return listed


def refuse(file: Path, found: Agreement) -> None:
    """Ends an export that is not the model.

    Raises:
        VitftError: `export.differs`.
    """
    if not found.good:
        text = f"{found.line()}; at most {TOLERANCE:.0e} is allowed"
        raise VitftError.of(
            "export.differs", file, text, "use another format, and please report this as a bug"
        )
