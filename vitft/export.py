"""The door out: a trained model as files that need no vitft, checked before they are kept.

    python -m vitft.export MODEL -o OUT --format onnx|pt2|hf|timm
    python -m vitft.export --selftest OUT

    onnx   model.onnx for onnxruntime; batch free; logits and calibrated probabilities out
    pt2    the same as a torch.export archive
    hf     timm's and transformers' folder with a model card
    timm   the same folder without the card

All of them give calibrated probabilities: a graph divides by the temperature, in a folder it is
part of the head's weights, since timm and transformers take the plain softmax.

With --uint8 the graph normalises: it takes uint8 RGB [B, H, W, 3], as the photograph is after
decoding, resizing and cropping (export.json says to what). Those stay with the caller. OUT is a
folder: the model, export.json, and three golden images with their logits. It appears whole, after
real photographs have gone through the file and no probability differed by more than 1e-4 from
PyTorch's, or not at all.
"""

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from vitft import __version__, console, encode, graph, hubpage, io, product, proof, variants
from vitft import card as cards
from vitft.card import Card
from vitft.console import say, warn
from vitft.doubt import TIMES
from vitft.errors import Fault, RecipeError, VitftError, WeightsError, escape
from vitft.graph import Deployed, Runner
from vitft.inputs import InputConfig, TransformSpec, normalise
from vitft.proof import Agreement, Evidence

FORMATS = ("onnx", "pt2", "hf", "timm")
GRAPHS = {"onnx": "model.onnx", "pt2": "model.pt2"}
ABOUT = "export.json"
LIMIT = 1000  # photographs compared, unless told


@dataclass(frozen=True)
class Order:
    """What is wanted.

    Attributes:
        format: One of FORMATS.
        uint8: Normalising is inside the graph.
        variants: float16 and int8 beside the ONNX file.
        licence: For the model card.
        private: Golden images are bundled flowers, not photographs of the run.
    """

    format: str
    uint8: bool = False
    variants: bool = False
    licence: str = "unknown"
    private: bool = False


def export(model: Path, out: Path, order: Order, evidence: Evidence) -> Agreement:
    """Writes one folder.

    Args:
        model: Run folder, `model/` folder or file.
        out: Replaced whole, if it is an earlier export.
        order: What to write.
        evidence: Photographs to compare on.

    Raises:
        VitftError: `export.differs`: the file is not the model; whatever was there is unchanged.
        RecipeError: `export.output`: something else is there.
    """
    require_free(out)
    net, card = product.load(model)
    sent = Sent(net, card, 1.0) if order.format in GRAPHS else folded(net, card)
    with io.staged_dir(out) as staged:
        _write(sent, model, staged, order)
        io.write_json(staged / ABOUT, about(sent, order))
        runner = open_export(staged, order.format, sent.card, uint8=order.uint8)
        answers, (found,) = proof.compare(net, card, evidence, [sent.unfolded(runner)])
        proof.refuse(out, found)
        if order.private:
            evidence = proof.Evidence(tuple(sorted(proof.SAMPLE.rglob("*.jpg"))[::90]), "bundled")
            answers, _ = proof.compare(net, card, evidence, [])
        answers = replace(answers, logits=answers.logits / np.float32(sent.divided))
        proof.write_golden(staged, card, evidence, answers)
        _last_look(staged, sent.card, runner, out)
        if order.variants:
            variants.write(
                net,
                card,
                staged / GRAPHS["onnx"],
                runner,
                evidence,
                uint8=order.uint8,
                metadata=_metadata(sent, order),
            )
    return found


@dataclass(frozen=True)
class Sent:
    """What is written, beside what was measured.

    Attributes:
        net: Its logits are those of the model divided by `divided`.
        card: Its temperature is what is left to divide by.
        divided: The temperature that is part of the head's weights; 1 if none is.
    """

    net: nn.Module
    card: Card
    divided: float

    def unfolded(self, runner: Runner) -> Runner:
        """Gives the model's own logits from a file with the temperature in its head."""

        def run(pixels: torch.Tensor) -> tuple[graph.Floats, graph.Floats]:
            logits, p = runner(pixels)
            return logits * np.float32(self.divided), p

        return run


def folded(net: nn.Module, card: Card) -> Sent:
    """Divides the head by the temperature, so that the plain softmax is calibrated."""
    if card.temperature is None or card.temperature == 1:
        return Sent(net, card, 1.0)
    net = copy.deepcopy(net)
    head = cast(Any, net).get_classifier()
    if not isinstance(head, nn.Linear | nn.Conv2d):
        warn(f"the head is no one layer, so the temperature {card.temperature:.4f} is not applied")
        return Sent(net, card, 1.0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.div_(card.temperature)
    return Sent(net, replace(card, temperature=1.0), card.temperature)


def require_free(out: Path) -> None:
    """Replaces nothing but an earlier export.

    Raises:
        RecipeError: `export.output`.
    """
    taken = out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / ABOUT).is_file())
    if taken:
        text = "is there already and is no earlier export"
        raise RecipeError.of("export.output", out, text, "name a new folder with -o")


def _write(sent: Sent, model: Path, folder: Path, order: Order) -> None:
    net, card = sent.net, sent.card
    transform = product.transform_of(card)
    if order.format in GRAPHS:
        module = Deployed(net, transform, card.temperature or 1.0, uint8=order.uint8)
        write = graph.write_onnx if order.format == "onnx" else graph.write_pt2
        write(module, transform, folder / GRAPHS[order.format], _metadata(sent, order))
        return
    try:
        product.fill(
            net,
            folder,
            card,
            config_of(transform),
            as_timm=True,
            tables=_tables(model, sent),
        )
    except RecipeError as error:
        text = error.faults[0].text
        raise RecipeError.of("export.as_timm", model, text, "export it as onnx or pt2") from None
    if order.format == "hf":
        run = product.find_file(model).parent.parent
        golden = "bundled flowers" if order.private else "photographs of the comparison"
        run_or_none = run if (run / "metrics.json").is_file() else None
        text = hubpage.page(card, run_or_none, order.licence, golden=golden, divided=sent.divided)
        io.write_text(folder / "README.md", text)


def _tables(model: Path, sent: Sent) -> dict[str, NDArray[Any]]:
    """What predict uses beside the weights, told that the head was divided."""
    tables = product.load_tables(model)
    if not tables:
        return {}
    times = np.asarray(tables.get(TIMES, 1.0), np.float32).ravel() * np.float32(sent.divided)
    return tables | {TIMES: times}


def config_of(transform: TransformSpec) -> InputConfig:
    """What timm's config.json says, from the transform that the model was measured with."""
    t = transform
    return InputConfig(t.size, t.mean, t.std, t.interpolation, t.crop_pct, t.crop_mode)


def about(sent: Sent, order: Order) -> dict[str, Any]:
    """Everything that using the file rightly takes, as JSON values."""
    card = sent.card
    transform = product.transform_of(card)
    graphed = order.format in GRAPHS
    return {
        "format": order.format,
        "vitft": __version__,
        "uint8": order.uint8,
        "input": _input(transform, order),
        "outside": _outside(transform, order),
        "outputs": list(graph.OUTPUTS) if graphed else ["logits"],
        "temperature_applied": sent.divided != 1 or (graphed and card.temperature is not None),
        "temperature_in_head": sent.divided,
        "card": json.loads(encode.json_text(card)),
    }


def _input(transform: TransformSpec, order: Order) -> str:
    height, width = transform.size
    if order.uint8:
        return f"images: uint8 RGB [B, {height}, {width}, 3], 0 to 255"
    return f"images: float32 RGB [B, 3, {height}, {width}], (value / 255 - mean) / std"


def _outside(transform: TransformSpec, order: Order) -> str:
    """In words, what the caller does to a photograph."""
    (height, width), t = transform.size, transform
    grown = f"{int(height / t.crop_pct)} x {int(width / t.crop_pct)}"
    how = {
        "center": f"resize so that it just covers {grown} px, keeping its shape, crop the centre",
        "squash": f"resize to {grown} px whatever its shape, crop the centre",
        "border": f"resize to fit into {grown} px, keeping its shape, pad with the mean, crop",
    }.get(t.crop_mode, t.crop_mode)
    by = {"pillow": "Pillow", "fast": "torch (interpolate of uint8, antialias=True)"}[t.resize]
    text = (
        f"decode upright (EXIF) to 8-bit RGB on the card's background; {how} to {height} x {width} "
        f"px; {t.interpolation}, antialiased, as {by} does"
    )
    return text if order.uint8 else text + "; then normalise"


def _metadata(sent: Sent, order: Order) -> dict[str, str]:
    card, told = sent.card, about(sent, order)
    return {
        graph.META: encode.json_text(told),
        "class_names": encode.json_text(list(card.classes)),
        "temperature": str(card.temperature or 1.0),
        "transform": encode.json_text(card.transform),
    }


# --- opened again --------------------------------------------------------------------------------


def open_export(folder: Path, format: str, card: Card, *, uint8: bool) -> Runner:
    """What a folder holds, ready to be asked."""
    transform = product.transform_of(card)
    if format == "onnx":
        return graph.open_onnx(folder / GRAPHS[format], transform, uint8=uint8)
    if format == "pt2":
        return graph.open_pt2(folder / GRAPHS[format], transform, uint8=uint8)
    net: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    @torch.inference_mode()
    def run(pixels: torch.Tensor) -> tuple[graph.Floats, graph.Floats]:
        logits = net(normalise(pixels, transform))
        p = (logits / (card.temperature or 1.0)).softmax(dim=1)
        return logits.numpy(), p.numpy()

    return run


def _last_look(folder: Path, card: Card, runner: Runner, out: Path) -> None:
    bad = [text for text, good in proof.check_golden(folder, card, runner) if not good]
    if bad:
        fix = "please report this as a bug"
        raise VitftError.of("export.differs", out, "; ".join(bad), fix)


def selftest(folder: Path) -> tuple[list[str], bool]:
    """Loads an export and asks it about its golden images.

    Its values are checked; that onnxruntime and torch.export open a hostile graph safely is
    theirs to promise, so name only folders from whom you trust.

    Returns:
        One line per image, and whether all hold.

    Raises:
        WeightsError: `ckpt.corrupt`: a file has changed; `export.unreadable`; `export.golden`.
    """
    if bad := io.verify_dir(folder):
        fix = "copy the folder again, or export the model again"
        raise WeightsError.of("ckpt.corrupt", folder, "; ".join(bad), fix)
    try:
        told = json.loads((folder / ABOUT).read_text("utf-8"))
        format, uint8 = str(told["format"]), bool(told["uint8"])
        FORMATS.index(format)
        card = cards.parse(json.dumps(told["card"]), folder / ABOUT)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        text = f"cannot be read ({type(error).__name__}: {str(error)[:200]})"
        fix = "name a folder that vitft.export wrote"
        raise WeightsError.of("export.unreadable", folder / ABOUT, text, fix) from None
    found = list(proof.check_golden(folder, card, open_export(folder, format, card, uint8=uint8)))
    return [f"{'same   ' if good else 'DIFFERS'} {text}" for text, good in found], all(
        good for _, good in found
    )


# --- the command line ----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m vitft.export`."""
    p = argparse.ArgumentParser(
        prog="vitft export",
        description="Writes a model for use without vitft, and checks it.",
        epilog="example: python -m vitft.export runs/flowers_head/latest -o flowers_onnx --uint8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "model", nargs="?", type=Path, metavar="MODEL", help="run folder or model.safetensors"
    )
    p.add_argument("-o", "--out", type=Path, metavar="FOLDER", help="where to; appears whole")
    p.add_argument("--format", choices=FORMATS, default="onnx", help="default onnx")
    p.add_argument("--uint8", action="store_true", help="normalise inside the graph")
    p.add_argument("--variants", action="store_true", help="float16 and int8 too, measured")
    p.add_argument(
        "--images",
        nargs="+",
        type=Path,
        default=[],
        metavar="IMAGE",
        help="compare on these (default: the run's test photographs)",
    )
    p.add_argument(
        "--limit",
        type=int,
        default=LIMIT,
        metavar="N",
        help=f"photographs compared, default {LIMIT:,}",
    )
    p.add_argument("--licence", default="unknown", metavar="ID", help="for the model card")
    p.add_argument("--private", action="store_true", help="no photograph of the run travels")
    p.add_argument("--selftest", type=Path, metavar="FOLDER", help="check an export, and stop")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the largest difference and the folder; --selftest ends with 1 if an image differs."""
    args = parser().parse_args(argv)
    console.setup()
    if args.selftest is not None:
        lines, good = selftest(args.selftest)
        for line in lines:
            print(escape(line))  # noqa: T201
        return 0 if good else VitftError.exit_code
    _check(args)
    order = Order(args.format, args.uint8, args.variants, args.licence, args.private)
    io.require_outside(args.out, [*args.images, *product.sealed(args.model)])
    require_free(args.out)
    evidence = proof.gather(args.model, args.images, args.limit)
    say(f"comparing on {evidence.what}")
    found = export(args.model, args.out, order, evidence)
    say(found.line())
    for line in variants.table(args.out) if args.variants else []:
        print(line)  # noqa: T201
    print(args.out)  # noqa: T201
    return 0


def _check(args: argparse.Namespace) -> None:
    """Everything that the command line alone can tell, at once.

    Raises:
        RecipeError: `export.option`.
    """
    faults = []

    def fault(place: str, text: str, fix: str) -> None:
        faults.append(Fault("export.option", place, text, fix))

    if args.model is None:
        fault("MODEL", "is missing", "name a run folder or a model")
    if args.out is None:
        fault("-o", "is missing", "name the folder to write")
    if args.uint8 and args.format not in GRAPHS:
        fault("--uint8", f"{args.format} holds no graph", "leave it out, or use onnx or pt2")
    if args.variants and args.format != "onnx":
        fault("--variants", f"not for {args.format}", "use --format onnx")
    if args.licence != "unknown" and args.format != "hf":
        fault("--licence", f"{args.format} has no model card", "use --format hf")
    if args.limit < 1:
        fault("--limit", f"must be at least 1, got {args.limit}", "name how many to compare")
    if faults:
        raise RecipeError(faults)


if __name__ == "__main__":
    from vitft.cli import door

    sys.exit(door(main))
