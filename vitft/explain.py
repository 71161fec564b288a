"""The door to what a model sees: photographs and a model in, one picture out.

    python -m vitft.explain MODEL IMAGE... -o out.png [--method gradient|rollout|heads]
    python -m vitft.explain MODEL [IMAGE...] -o out.png --figure positions|filters|distance

    gradient   which places spoke for the answer, or for --class NAME; any network can
    rollout    what attention gathered through all blocks; the same for every class
    heads      where each head of the last block looks
    positions, filters, distance   the figures of the ViT paper; distance needs photographs

A map says where a network looked, not whether it was right to look there.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitft import console, figures, gallery, images, io, maps, product, stats
from vitft.console import say, track, warn
from vitft.errors import DataError, Fault, RecipeError, escape
from vitft.figures import Box, Panel
from vitft.folders import instead
from vitft.images import BadImage
from vitft.inputs import TransformSpec, normalise, pixels
from vitft.maps import Floats
from vitft.prepare import pick_device
from vitft.remedies import nearest

METHODS = ("gradient", "rollout", "heads")
FIGURES = ("positions", "filters", "distance")
MOST = 100  # photographs in one picture
SIDE, HEAD_SIDE = 400, 260  # px of a photograph in a sheet
ACROSS, HEADS_ACROSS = 4, 7  # pictures in a row of a sheet
SECONDS = 60.0  # that the overlays of a page may take
WORDS = {
    "gradient": ("What spoke for the class", "features times the slope of the class's logit"),
    "rollout": ("What attention gathered", "rollout through all blocks, to what the head reads"),
    "heads": ("Where the heads of the last block look", "attention of what the head reads"),
}


class Looker:
    """A network with its preprocessing, asked about one photograph at a time.

    Args:
        net: On `device`; as it was after each call.
        transform: Of evaluation.
        device: Where the network is.
    """

    def __init__(self, net: nn.Module, transform: TransformSpec, device: torch.device) -> None:
        self.net, self.transform, self.device = net, transform, device
        self._pixels: Callable[[Image.Image], Tensor] = pixels(transform)

    def input(self, picture: Image.Image) -> Tensor:
        """RGB picture -> [1, 3, S, S], as the network is fed."""
        return normalise(self._pixels(picture).unsqueeze(0).to(self.device), self.transform)

    def look(self, x: Tensor, method: str = "gradient", label: int | None = None) -> Floats:
        """[1, 3, S, S] -> [N, Gh, Gw]: one map, or one for each head.

        Args:
            x: From `input`.
            method: One of METHODS.
            label: The class that the gradient asks about; default the network's answer.

        Raises:
            RecipeError: The network cannot be asked so.
        """
        if method == "heads":
            return np.asarray(maps.heads(self.net, x)[0])
        if method == "rollout":
            return maps.rollout(self.net, x)
        return maps.gradient(self.net, x, None if label is None else torch.tensor([label]))

    def over(self, picture: Image.Image, side: int) -> Image.Image:
        """What spoke for the answer, over the picture with its longer side at most `side` px."""
        (values,) = self.look(self.input(picture))
        return self.draw(figures.fitted(picture, min(side, max(picture.size))), values)

    def draw(self, picture: Image.Image, values: Floats) -> Image.Image:
        """A map [Gh, Gw] over the part of the picture that the network was fed."""
        return figures.overlay(picture, values, seen(picture.size, self.transform))


def seen(size: tuple[int, int], transform: TransformSpec) -> Box:
    """The part of a picture that the network is fed.

    Args:
        size: Width and height of the picture.
        transform: A plain one.

    Returns:
        Left, top, right, bottom in the picture's pixels; beyond its edges where it was padded.
    """
    width, height = size
    high, wide = (int(side / transform.crop_pct) for side in transform.size)  # before the crop
    scale_x, scale_y = wide / width, high / height
    if transform.crop_mode != "squash":
        pick = min if transform.crop_mode == "border" else max
        scale_x = scale_y = pick(scale_x, scale_y)
    across, down = transform.size[1] / scale_x / 2, transform.size[0] / scale_y / 2
    return width / 2 - across, height / 2 - down, width / 2 + across, height / 2 + down


class Overlays:
    """Overlays for a page: of some photographs, for a bounded time, and never an error.

    Args:
        looker: The network.
        read: Row -> RGB picture; may raise BadImage.
        wanted: Rows that get an overlay.
        side: Pixels of the longer side.
        seconds: After which no further overlay is begun, counted from the first.
    """

    def __init__(
        self,
        looker: Looker,
        read: Callable[[int], Image.Image],
        wanted: Collection[int],
        *,
        side: int,
        seconds: float = SECONDS,
    ) -> None:
        self.looker, self.read, self.side, self.seconds = looker, read, side, seconds
        self._left = set(wanted)
        self._end: float | None = None

    def __call__(self, row: int) -> bytes | None:
        """JPEG bytes, or None where there is no overlay."""
        if row not in self._left:
            return None
        self._end = time.monotonic() + self.seconds if self._end is None else self._end
        if time.monotonic() > self._end:
            self._stop(f"{self.seconds:.0f} s are over")
            return None
        self._left.discard(row)
        try:
            return gallery.shrink(self.looker.over(self.read(row), self.side), self.side)
        except BadImage:  # its thumbnail is missing too
            return None
        except Exception as error:  # a map is a comfort; a run's numbers must not fall with it
            self._stop(f"{type(error).__name__}: {error}")
            return None

    def _stop(self, why: str) -> None:
        warn(f"no further maps of what counted in the report: {why}")
        self._left.clear()


# -- the command line -----------------------------------------------------------------------------


class Session:
    """A loaded model, and what could not be read.

    Args:
        model: Run folder, `model/` folder or `model.safetensors`.
        device: As in a recipe.
    """

    def __init__(self, model: Path, device: str) -> None:
        net, self.card = product.load(model)
        where = pick_device(device)
        self.looker = Looker(net.to(where), product.transform_of(self.card), where)
        self.about = f"{self.card.architecture} in {_short(model)}"
        self.bad: list[Fault] = []

    def read(self, files: Sequence[Path]) -> Iterator[tuple[Path, Image.Image]]:
        """The photographs that can be read; the others are kept in `bad`, and said at the end.

        Raises:
            DataError: None can be read.
        """
        decode = product.decode_of(self.card)
        for path in track(files, len(files), "explain"):
            try:
                picture = images.decode(images.read_bytes(path), path, decode)
            except BadImage as e:
                near = None if os.path.lexists(path) else instead(path)[1]  # noqa: PTH110
                fix = f"did you mean {near}?" if near else "name another, or copy it here again"
                self.bad += [replace(fault, fix=fix) for fault in e.faults]
            else:
                yield path, picture
        if len(self.bad) == len(files):
            raise DataError(self.bad)
        for fault in self.bad:
            warn(f"left out: {escape(fault.place)}: {fault.text}")

    def label(self, name: str) -> int:
        """The row of a class.

        Raises:
            RecipeError: `explain.class`.
        """
        classes = self.card.classes
        if name in classes:
            return classes.index(name)
        near = nearest(name, list(classes))
        fix = f"did you mean {near!r}?" if near else f"the model knows {', '.join(classes[:20])}"
        raise RecipeError.of("explain.class", "--class", f"the model has no class {name!r}", fix)


def photographs(
    session: Session, files: Sequence[Path], method: str, label: int | None = None
) -> Image.Image:
    """A sheet of photographs, each beside its maps.

    Raises:
        DataError: None of the files can be read.
        RecipeError: The network cannot be asked so.
    """
    side = HEAD_SIDE if method == "heads" else SIDE
    panels = [
        _panel(session, path, picture, method, label, side) for path, picture in session.read(files)
    ]
    title, how = WORDS[method]
    across = HEADS_ACROSS if method == "heads" else ACROSS
    return figures.sheet(title, f"{how}; {session.about}", panels, across=across)


def _panel(
    session: Session, path: Path, picture: Image.Image, method: str, label: int | None, side: int
) -> Panel:
    looker, classes = session.looker, session.card.classes
    x = looker.input(picture)
    with torch.inference_mode():
        logits = looker.net(x).float().cpu().numpy()
    (p,) = stats.softmax(logits, session.card.temperature or 1.0)
    best = int(p.argmax())
    title = f"{classes[best]} {p[best]:.1%}"
    if label is not None and label != best:
        title = f"for {classes[label]} ({p[label]:.1%}); the answer is {title}"
    small = figures.fitted(picture, side)
    drawn = [looker.draw(small, values) for values in looker.look(x, method, label)]
    labels = [f"head {k + 1}" for k in range(len(drawn))] if method == "heads" else [""]
    return Panel((small, *drawn), ("", *labels), title, _short(path))


def _short(path: Path) -> str:
    return "/".join(path.parts[-2:])


def figure(session: Session, files: Sequence[Path], kind: str) -> Image.Image:
    """One of the ViT paper's figures, of this model.

    Raises:
        DataError: None of the files can be read.
        RecipeError: The model has not what the figure shows.
    """
    net = session.looker.net
    if kind == "positions":
        return figures.positions(maps.positions(net), session.about)
    if kind == "filters":
        found = maps.filters(net)
        return figures.filters(found.images, found.shares, found.total, session.about)
    inputs = (session.looker.input(picture) for _, picture in session.read(files))
    per_photograph = [(maps.distance(net, x)[0], maps.evenly(net, x)) for x in inputs]
    mean = np.mean([distance for distance, _ in per_photograph], axis=0)
    note = f"mean of {len(per_photograph)} photographs; {session.about}"
    return figures.distance(mean, per_photograph[0][1], note)


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m vitft.explain`."""
    p = argparse.ArgumentParser(
        prog="vitft explain",
        description="Draws what a model looks at.",
        epilog="example: python -m vitft.explain runs/flowers_head/latest photo.jpg -o out.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", type=Path, metavar="MODEL", help="run folder or model.safetensors")
    p.add_argument("inputs", nargs="*", type=Path, metavar="IMAGE", help="photographs")
    p.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FILE.png", help="the picture to write"
    )
    p.add_argument("--method", choices=METHODS, help="of the maps (default gradient)")
    p.add_argument("--class", dest="label", metavar="NAME", help="what the gradient asks about")
    p.add_argument("--figure", choices=FIGURES, help="of the model instead of maps")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Writes one PNG and prints its path; exit code 3 if a photograph could not be read."""
    args = parser().parse_args(argv)
    _check(args)
    io.require_outside(args.out, [*args.inputs, *product.sealed(args.model)])
    console.setup()
    session = Session(args.model, args.device)
    if args.figure:
        picture = figure(session, args.inputs, args.figure)
    else:
        label = None if args.label is None else session.label(args.label)
        picture = photographs(session, args.inputs, args.method or "gradient", label)
    io.write_bytes(args.out, figures.png(picture))
    say(f"{picture.width} x {picture.height} pixels, {len(session.bad):,} photographs unreadable")
    print(args.out)  # noqa: T201
    return DataError.exit_code if session.bad else 0


def _check(args: argparse.Namespace) -> None:
    """Everything that the command line alone can tell, at once.

    Raises:
        RecipeError: `explain.output`, `explain.photographs`, `explain.option`.
    """
    faults, count = [], len(args.inputs)
    if args.out.suffix.lower() != ".png":
        fix = f"write -o {args.out.with_suffix('.png').name}"
        faults.append(Fault("explain.output", "-o", f"{args.out} does not end in .png", fix))
    if count == 0 and args.figure not in ("positions", "filters"):
        what = f"--figure {args.figure}" if args.figure else "a map"
        fix = "name one or more after the model"
        faults.append(Fault("explain.photographs", "IMAGE", f"{what} needs photographs", fix))
    if count > MOST:
        text = f"{count:,} photographs > {MOST} in one picture"
        faults.append(Fault("explain.photographs", "IMAGE", text, "name fewer of them"))
    if args.figure and (args.method or args.label is not None):
        text = f"--figure {args.figure} takes neither --method nor --class"
        faults.append(Fault("explain.option", "--figure", text, "leave them out"))
    elif args.label is not None and args.method in ("rollout", "heads"):
        text = f"{args.method} is the same for every class"
        fix = "leave --class out, or choose --method gradient"
        faults.append(Fault("explain.option", "--class", text, fix))
    if faults:
        raise RecipeError(faults)


if __name__ == "__main__":
    from vitft.cli import door

    sys.exit(door(main))
