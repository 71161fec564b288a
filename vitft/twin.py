"""Proof that a weights file means the same in our ViT and in timm's; the door of `vitft.weights`.

    python -m vitft.weights inspect FILE [--json]
    python -m vitft.weights check FILE --model NAME [--img-size PX] [--with key=value ...]

`inspect` says what a file is (`inspection`); `check` builds the named model twice, here and in
timm, loads the file into both and prints the largest difference of the logits and of every block's
output.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from vitft import convert, fitting, model, tally, weights
from vitft.anatomy import anatomy
from vitft.errors import RecipeError, escape
from vitft.inspection import inspect, options_for, side
from vitft.vitflower import SIZES, TWINS


@dataclass(frozen=True)
class Parity:
    """Ours against timm's on the same file and images.

    Attributes:
        model: Name of ours.
        twin: Name in timm.
        options: Both were built with.
        blocks: Largest absolute difference of each block's output.
        features: The same of what the head reads.
        logits: The same of the output, [2, C], or of the features without a head.
        scale: Largest absolute output, to compare with.
        by: Whose code put the file into timm's model: "timm" or "vitft".
        loaded: How many tensors the model took.
        left_over: The file's names that it did not.
        notes: Conversions made.
    """

    model: str
    twin: str
    options: dict[str, Any]
    blocks: tuple[float, ...]
    features: float
    logits: float
    scale: float
    by: str
    loaded: int
    left_over: dict[str, str]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people."""
        built = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        both = f"{self.model} and timm's {self.twin}"
        if self.model == self.twin:
            both = f"timm's {self.model}, filled by vitft and by timm"
        out = [f"{both}, built with {built}" if built else both]
        if self.by != "timm":
            out.append("timm cannot read these names; its model was given the converted tensors")
        out += [f"note: {note}" for note in self.notes]
        out += [f"block {i:2d}: largest difference {d:.2e}" for i, d in enumerate(self.blocks)]
        out.append(f"features: largest difference {self.features:.2e}")
        out.append(f"logits: largest difference {self.logits:.2e} (values up to {self.scale:.2e})")
        out.append(f"{self.loaded} tensors loaded, {len(self.left_over)} left over")
        return out + [f"left over: {name}: {why}" for name, why in self.left_over.items()]


def compare(
    path: Path, name: str, *, img_size: int | None = None, options: Mapping[str, Any] | None = None
) -> Parity:
    """Loads a file into our model and into timm's, and both see the same two images.

    Args:
        path: A ViT's weights.
        name: `vitflower_...`, or timm's name of the same architecture.
        img_size: Image side, px; None: the one that the positions were trained for.
        options: Further arguments of both models, over those that the file's names show.

    Raises:
        RecipeError: The name is no ViT of ours.
        WeightsError: The file does not fit.
    """
    ours_name = name if name in TWINS else {v: k for k, v in TWINS.items()}.get(name, "")
    if not ours_name:
        return _two_ways(path, name, dict(options or {}) | _sized(img_size))
    found = weights.open_file(path)
    converted = convert.convert(found.tensors, place=path, says=fitting.own_words(path))
    sizes = anatomy(converted.state)
    built = {} if sizes is None else options_for(ours_name, sizes, converted)
    built.setdefault("num_classes", 0)
    built["img_size"] = img_size or (side(sizes) if sizes else 0) or 224
    built |= options or {}
    ours = timm.create_model(ours_name, **built).eval()
    whole, match, notes = fitting.complete(found.tensors, ours, place=path)
    ours.load_state_dict(whole)
    theirs, by = _theirs(ours_name, built, found, ours)
    return _measure(ours, theirs, ours_name, built, by, match, (*found.notes, *notes))


def _sized(img_size: int | None) -> dict[str, Any]:
    return {} if img_size is None else {"img_size": img_size}


def _two_ways(path: Path, name: str, options: dict[str, Any]) -> Parity:
    """A model that is timm's alone, filled by our loader and by timm's."""
    if name.startswith("vitflower_") or not timm.is_model(name):
        fix = f"use one of {', '.join(TWINS)}, or a name of timm's"
        raise RecipeError.of("model.unknown", "--model", f"{name!r} has no twin here", fix)
    found = weights.open_file(path)
    classes = _classes(found.tensors, name)
    options = {"num_classes": classes} | options if classes is not None else options
    ours = timm.create_model(name, **options).eval()
    state, notes = fitting.load_for(ours, path)
    head = model.classifier_names(ours)
    match = tally.check(state, ours.state_dict(), new=head, drop=head, place=path)
    taken = {k: v for k, v in state.items() if k not in match.dropped}
    ours.load_state_dict(ours.state_dict() | taken)
    overlay: dict[str, Any] = {"file": str(path), "custom_load": found.kind == "npz"}
    if classes is not None:  # else timm takes the file's head for a foreign one
        overlay["num_classes"] = classes
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    if match.new or match.dropped:  # a fresh head is another one in each
        theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k in head}, False)
    return _measure(ours, theirs.eval(), name, options, "timm", match, notes)


def _classes(tensors: Mapping[str, Tensor], name: str) -> int | None:
    """Rows of the file's classifier, by the name that timm gives it."""
    cfg = timm.get_pretrained_cfg(name)
    head = cfg.classifier if cfg and isinstance(cfg.classifier, str) else "head"
    rows = tensors.get(f"{head}.weight")
    return None if rows is None else int(rows.shape[0])


def _theirs(
    name: str, options: dict[str, Any], found: weights.Checkpoint, ours: nn.Module
) -> tuple[Any, str]:
    """timm's model with the file in it, by timm's own code where that can read the file."""
    made = dict(SIZES[name]) | options
    for only_ours in ("representation_size", "embed", "embed_stage"):  # its name says the CNN
        made.pop(only_ours, None)
    if eps := made.pop("norm_eps", None):
        made["norm_layer"] = partial(nn.LayerNorm, eps=eps)
    if "pos_embed" in made:
        made["pos_embed"] = {"learned": "learn"}.get(made["pos_embed"], made["pos_embed"])
    theirs: Any = timm.create_model(TWINS[name], **made).eval()
    backbone = {n for n in theirs.state_dict() if not n.startswith("head.")}
    try:
        if found.kind == "npz":
            theirs.load_pretrained(str(found.path))
            return theirs, "timm"
        read = checkpoint_filter_fn(dict(found.tensors), theirs)
        if backbone <= set(read):
            theirs.load_state_dict(_fitting_of(read, theirs), strict=False)
            return theirs, "timm"
    except (RuntimeError, KeyError, ValueError, AssertionError, AttributeError):
        pass  # not a layout of timm's, or not in these sizes
    theirs.load_state_dict(_fitting_of(ours.state_dict(), theirs), strict=False)
    return theirs, "vitft"


def _fitting_of(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """All but a head that reads another layer than timm's does; names were compared before."""
    own = model.state_dict()
    other = {k for k in state if k.startswith("head.") and k in own}
    other = {k for k in other if state[k].shape != own[k].shape}
    return {k: v for k, v in state.items() if k in own and k not in other}


@torch.no_grad()
def _measure(
    ours: Any,
    theirs: Any,
    name: str,
    options: dict[str, Any],
    by: str,
    match: tally.Match,
    notes: tuple[str, ...],
) -> Parity:
    images = _images(ours)
    ours_last, ours_blocks = _intermediates(ours, images)
    last, blocks = _intermediates(theirs, images)
    features = ours.forward_head(ours_last, pre_logits=True)
    logits = ours(images)
    if options.get("representation_size"):  # timm has no such layer: compare what it reads
        reference, features = theirs.forward_head(last, pre_logits=True), ours.pool(ours_last)
        expected = ours.head(torch.tanh(ours.pre_logits.fc(reference)))
    else:
        reference = theirs.forward_head(last, pre_logits=True)
        expected = theirs(images)
    return Parity(
        model=name,
        twin=TWINS.get(name, name),
        options=options,
        blocks=tuple(_apart(a, b) for a, b in zip(ours_blocks, blocks, strict=True)),
        features=_apart(features, reference),
        logits=_apart(logits, expected),
        scale=float(expected.abs().max()),
        by=by,
        loaded=match.loaded,
        left_over=match.dropped,
        notes=notes,
    )


def _images(net: Any) -> Tensor:
    """Two random images, [2, 3, S, S], of the size that the model was built for."""
    embed = getattr(net, "patch_embed", None)
    size = getattr(embed, "img_size", None) or net.pretrained_cfg["input_size"][1:]
    channels = getattr(net, "in_chans", 3)
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


def _intermediates(net: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Last features and those of every block or stage; of few models timm gives none."""
    if not hasattr(net, "forward_intermediates"):
        return net.forward_features(images), []
    try:
        last, blocks = net.forward_intermediates(images, output_fmt="NLC")
    except (AssertionError, ValueError):  # a CNN's maps have no token form
        last, blocks = net.forward_intermediates(images)
    return last, blocks


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# --- door ----------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m vitft.weights`."""
    p = argparse.ArgumentParser(
        prog="vitft weights",
        description="Says what a weights file is, and which model it fits.",
        epilog="example: python -m vitft.weights inspect weights.safetensors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(dest="command", required=True)
    one = commands.add_parser("inspect", help="what it is, and what to build for it")
    one.add_argument("file", type=Path, metavar="FILE")
    one.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    two = commands.add_parser("check", help="load it here and in timm, and compare the outputs")
    two.add_argument("file", type=Path, metavar="FILE")
    two.add_argument("--model", required=True, metavar="NAME", help="vitflower_b16, or timm's name")
    two.add_argument("--img-size", type=int, metavar="PX", help="default: as it was trained")
    two.add_argument(
        "--with", dest="options", nargs="*", default=[], metavar="key=value", help="model options"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; results go to stdout."""
    args = parser().parse_args(argv)
    if args.command == "inspect":
        found = inspect(args.file)
        text = json.dumps(asdict(found), indent=1)
        lines = text.splitlines() if args.json else found.lines()
    else:
        options = dict(_option(text) for text in args.options)
        lines = compare(args.file, args.model, img_size=args.img_size, options=options).lines()
    for line in lines:
        print(escape(line))  # noqa: T201
    return 0


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError.of("cli.option", text, "is no key=value", "such as reg_tokens=4")
    return key, yaml.safe_load(value)
