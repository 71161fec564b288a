"""The second door: a model file and photographs in, names and probabilities out.

    python -m vitft.predict MODEL IMAGE_OR_FOLDER... [-o answers.csv|.jsonl|.parquet] [--top K]

It needs nothing but the model: class names, decoding rules, preprocessing and temperature are in
the file's header. Every file named or listed gets one row; an unreadable one says why, and the exit
code is then 3. Batches have the one shape that a run's own evaluation uses, so that the run's test
photographs get the run's own probabilities. An interrupted prediction goes on where it stopped when
the same command is given again (`vitft.answers`).
"""

import argparse
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from vitft import answers, console, containers, images, io, pace, product, stats
from vitft.answers import Answer as Answer
from vitft.answers import Output
from vitft.answers import top as top
from vitft.console import say, track
from vitft.doubt import Foreign
from vitft.errors import DataError, Fault, RecipeError, WeightsError, escape
from vitft.evaluate import fixed_batch, in_fixed_shape, whole_floats
from vitft.features import backbone_of
from vitft.folders import EXTENSIONS, instead
from vitft.images import BadImage, DecodeSpec
from vitft.inputs import TransformSpec, normalise, pixels
from vitft.kernels import Packed, fast_linear
from vitft.model import classifier
from vitft.prepare import pick_device
from vitft.vit import VisionTransformer

AHEAD = 2  # batches that are read while one is computed


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
        self._computing = pace.as_measured(self.device, self.card.precision)
        half = self._computing is torch.bfloat16
        self._head_apart = half and self.card.head_precision == "float32"
        self._pixels = pixels(self.transform)
        self._foreign = _foreign(path, self.net)
        self._packed: Packed = {}  # the weights do not change any more
        self._singles = 0
        self._unpadded: bool | None = None  # not known yet
        least = (self.card.extras.get("abstain") or {}).get("threshold")
        self._threshold = None if least is None else float(least)  # None: none was asked for

    def __call__(self, files: Iterable[Path]) -> Iterator[Answer]:
        """One answer per file, in their order; memory does not grow with their number.

        The next batches are read by all cores while one is computed.
        """
        workers = max(1, (os.cpu_count() or 1) - 1)
        size, left = fixed_batch(self.device), iter(files)
        waiting: deque[tuple[list[Path], list[Future[Tensor | BadImage]]]] = deque()
        pool = ThreadPoolExecutor(workers)
        try:
            while True:
                while len(waiting) <= AHEAD and (chunk := list(islice(left, size))):
                    waiting.append((chunk, [pool.submit(self._read, path) for path in chunk]))
                if not waiting:
                    return
                chunk, futures = waiting.popleft()
                yield from self._answers(chunk, [future.result() for future in futures])
        finally:
            pool.shutdown(cancel_futures=True)

    def of_picture(self, picture: Image.Image, name: str = "picture") -> Answer:
        """The answer to one picture from `vitft.images.decode`."""
        ((p, foreign),) = self._probabilities(self._pixels(picture).unsqueeze(0))
        return Answer(Path(name), p, self._sure(p), foreign)

    @torch.inference_mode()
    def features(self, picture: Image.Image) -> NDArray[np.float32]:
        """What the head reads of one picture, [D], as features are computed for the cache."""
        x = normalise(self._pixels(picture).unsqueeze(0).to(self.device), self.transform)
        with pace.in_precision(self._computing, self.device):
            rows = self._fixed(backbone_of(self.net), x)
        return np.asarray(rows[0].cpu().numpy())

    def _sure(self, probabilities: NDArray[np.float64]) -> bool | None:
        return None if self._threshold is None else bool(probabilities.max() >= self._threshold)

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
                yield Answer(path, p, self._sure(p), foreign)
            else:
                yield Answer(path, None, error=f"{r.faults[0].id}: {r.faults[0].text}")

    @torch.inference_mode()
    def _probabilities(self, pictures: Tensor) -> list[tuple[NDArray[np.float64], bool | None]]:
        """Uint8 [n, 3, S, S] -> n times ([C], foreign), in the fixed batch."""
        x = normalise(pictures.to(self.device), self.transform)
        with pace.in_precision(self._computing, self.device):
            rows, logits = self._single(x) if len(x) == 1 else self._batch(x, self.net)
        foreign: list[bool | None] = [None] * len(x)
        if self._foreign is not None and rows is not None:
            foreign = self._foreign.is_foreign(rows.cpu().numpy(), logits.cpu().numpy()).tolist()
        p = stats.softmax(logits.cpu().numpy(), self.card.temperature or 1.0)
        return list(zip(p, foreign, strict=True))

    def _batch(self, x: Tensor, net: nn.Module) -> tuple[Tensor | None, Tensor]:
        """Features [n, D] where they are needed, and logits [n, C], in the fixed shape."""
        if self._foreign is None and not self._head_apart:
            return None, self._fixed(net, x)
        rows = self._fixed(backbone_of(net), x)
        return rows, self._head(rows, net)

    def _head(self, rows: Tensor, net: nn.Module) -> Tensor:
        """Features [n, D] -> logits [n, C], in the head's own precision."""
        apart = torch.autocast(self.device.type, enabled=False)
        with apart if self._head_apart else nullcontext():
            return self._fixed(classifier(net), rows)

    def _fixed(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return in_fixed_shape(forward, x, self._packed).float()

    def _single(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """One picture without the padding, if that is proven to give the same bits here.

        The proof takes longer than a padded picture where the whole model has to give it, so that
        the first one goes the padded way.
        """
        self._singles += 1
        if self._unpadded is None:
            short = self.net.shortened() if isinstance(self.net, VisionTransformer) else None
            if short is not None or self._singles > 1:
                witness = self.net if short is None else short
                self._unpadded = self._is_free_of_neighbours(x, witness)
        return (self._alone if self._unpadded else self._batch)(x, self.net)

    def _is_free_of_neighbours(self, x: Tensor, net: nn.Module) -> bool:
        """Whether a picture alone and its mirror image have the bits of the padded batch.

        That depends on the kernels that model, shape and threads select, not on the picture.
        """
        if not isinstance(cast(Any, net).get_classifier(), nn.Linear):
            return False
        pair = torch.cat([x, x.flip(3)])
        rows, logits = self._batch(pair, net)
        alone = [self._alone(one, net) for one in (pair[:1], pair[1:])]
        same = torch.equal(torch.cat([b for _, b in alone]), logits)
        return same and (rows is None or torch.equal(torch.cat([a for a, _ in alone]), rows))

    def _alone(self, x: Tensor, net: nn.Module) -> tuple[Tensor, Tensor]:
        """[1, 3, S, S] through the backbone as it is, and through the head in the fixed shape."""
        asks = isinstance(net, VisionTransformer)
        fast = fast_linear(x.device, heads=True, packed=self._packed, asked=asks)
        with whole_floats(x.device), fast:
            rows = backbone_of(net)(x).float()
        return rows, self._head(rows, net)


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
        head = classifier(net)
        zeros = np.zeros((1, head.out_features), np.float32)
        foreign.is_foreign(np.ones((1, head.in_features), np.float32), zeros)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        text = f"its {product.TABLES} does not fit the model ({type(error).__name__}: {error})"
        fix = "copy the folder again as a whole"
        raise WeightsError.of("ckpt.tables", path, text[:300], fix) from None
    return foreign


def list_files(inputs: Sequence[Path]) -> list[str]:
    """Files as given, folders and .tar searched for photographs, hidden files left out; sorted.

    They come as text, since a list of a hundred thousand Paths takes memory.

    Raises:
        DataError: `data.root_missing` for each input that is not there, `data.not_a_file` for
            addresses and standard input, `data.unreadable_folder`.
    """
    missing = [p for p in inputs if not os.path.lexists(p) and containers.locate(p) is None]
    if missing:
        raise DataError([_absent(str(p)) for p in missing])
    out: list[str] = []
    for given in inputs:
        if given.suffix.lower() == ".tar" and given.is_file():
            names = containers.members(given).spans
            out += [f"{given}/{name}" for name in names if name.lower().endswith(EXTENSIONS)]
        else:
            out += _walk(given) if given.is_dir() else [str(given)]
    return out


def _absent(given: str) -> Fault:
    if given == "-":
        text, fix = "standard input is not read", "write the picture to a file and name that"
    elif re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", given):  # pathlib made one slash of two
        text, fix = "is an address, predict opens no network", "download it and name the file"
    else:
        text, near = instead(Path(given))
        fix = f"did you mean {near}?" if near else "check the path"
        return Fault("data.root_missing", given, text, fix)
    return Fault("data.not_a_file", given, text, fix)


def _walk(folder: Path) -> list[str]:
    """Every photograph below; links are followed, each folder is entered once."""

    def refuse(error: OSError) -> None:
        text = f"cannot be listed ({error.strerror})"
        raise DataError.of("data.unreadable_folder", error.filename, text, "allow reading it")

    found, other, shut, entered = [], 0, 0, set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in entered:  # a loop, or a second link
            folders[:], shut = [], shut + 1
            continue
        entered.add((status.st_dev, status.st_ino))
        open_ones = sorted(d for d in folders if not d.startswith((".", "__MACOSX")))
        shut += len(folders) - len(open_ones)
        folders[:] = open_ones
        for name in sorted(names):
            if name.startswith(".") or not name.lower().endswith(EXTENSIONS):
                other += 1
            else:
                found.append(str(Path(parent) / name))
    if other:
        say(f"{folder}: {other:,} files are not photographs by name and were left out")
    if shut:
        say(f"{folder}: {shut:,} hidden or repeated folders were left out")
    return found


def told(answer: Answer, classes: Sequence[str], k: int) -> str:
    """One line for the terminal."""
    if answer.probabilities is None:
        return f"{escape(answer.path)}: error {escape(answer.error)}"
    said = ", ".join(f"{escape(c)} {p:.1%}" for c, p in top(answer, classes, k))
    return f"{escape(answer.path)}: {said}" + "".join(f" ({d})" for d in doubts(answer))


def doubts(answer: Answer) -> list[str]:
    """Why a person should look, in words."""
    out = [] if answer.sure is not False else ["I don't know: below the run's threshold"]
    return out + (["unlike the training pictures"] if answer.foreign else [])


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m vitft.predict`."""
    p = argparse.ArgumentParser(
        prog="vitft predict",
        description="Names what photographs show.",
        epilog="example: python -m vitft.predict runs/flowers_head/latest photos/ -o answers.csv",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", type=Path, metavar="MODEL", help="run folder or model.safetensors")
    p.add_argument(
        "inputs", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER", help="folders with all below"
    )
    p.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        help="every probability, as .csv, .jsonl, .parquet",
    )
    p.add_argument("--csv", type=Path, metavar="FILE", help="the same as CSV, whatever its name")
    p.add_argument("--restart", action="store_true", help="do not go on with an interrupted output")
    p.add_argument("--csv-safe", action="store_true", help="disarm text that looks like a formula")
    p.add_argument(
        "--top", type=int, default=3, metavar="K", help="classes on each line, default 3"
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line per file; exit code 3 if any could not be read."""
    args = parser().parse_args(argv)
    console.setup()
    out = _target(args)
    if out is not None:
        io.require_outside(out[0], [*args.inputs, *product.sealed(args.model)])
    predictor = Predictor(args.model, args.device)
    files = list_files(args.inputs)
    classes = predictor.card.classes

    def show(answer: Answer) -> None:
        print(told(answer, classes, args.top))  # noqa: T201

    if out is not None:
        target = Output(*out, classes, args.csv_safe)
        identity = _identity(args.model, predictor.device)
        counts = answers.write(target, files, predictor, identity, restart=args.restart, show=show)
    else:
        counts = Counter()
        for answer in track(predictor(map(Path, files)), len(files), "predict"):
            counts[answer.fault] += 1
            show(answer)
    return _ended(counts)


def _ended(counts: Counter[str]) -> int:
    """Says how many files had which fault; 3 if any."""
    faults = {id: n for id, n in sorted(counts.items()) if id}
    bad = sum(faults.values())
    told = f" ({', '.join(f'{id} {n:,}' for id, n in faults.items())})" if bad else ""
    total = counts.total()
    say(f"{total - bad:,} of {total:,} files answered, {bad:,} unreadable{told}")
    return DataError.exit_code if bad else 0


def _target(args: argparse.Namespace) -> tuple[Path, str] | None:
    """The output and its format.

    Raises:
        RecipeError: `predict.output`.
    """
    if args.out is not None and args.csv is not None:
        text = f"both name an output: {args.out} and {args.csv}"
        raise RecipeError.of("predict.output", "-o, --csv", text, "leave one of them out")
    if args.csv is not None:
        return args.csv, "csv"
    if args.out is None:
        return None
    kind = args.out.suffix.lower().removeprefix(".")
    if kind not in answers.FORMATS:
        text = f"{args.out} must end in .csv, .jsonl or .parquet"
        raise RecipeError.of("predict.output", "-o", text, "give it one of these endings")
    answers.require_packages(kind)
    return args.out, kind


def _identity(model: Path, device: torch.device) -> dict[str, object]:
    """What must not change between the parts of one output."""
    file = product.find_file(model)
    tables = file.with_name(product.TABLES)
    return {
        "model": io.sha256_file(file),
        "tables": io.sha256_file(tables) if tables.is_file() else None,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "columns": 2,  # `sure` is empty where no threshold was asked for, no longer yes
    }


if __name__ == "__main__":
    from vitft.cli import door

    sys.exit(door(main))
