"""What a weights file is, and proof that it means the same in our ViT and in timm's.

    python -m vitft.weights inspect FILE [--json]
    python -m vitft.weights check FILE --model NAME [--img-size PX] [--with key=value ...]

`inspect` reads names and shapes; `check` builds the named model twice, here and in timm, loads the
file into both and prints the largest difference of the logits and of every block's output.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from vitft import advice, convert, fitting, model, tally, tensorfile, weights
from vitft import card as cards
from vitft.anatomy import Anatomy, anatomy
from vitft.card import Card
from vitft.errors import RecipeError, WeightsError, escape
from vitft.hybrid import RESNETS
from vitft.vitflower import SIZES, TWINS

SPDX = re.compile(r"\b(MIT|Apache-2\.0|BSD-[23]-Clause|CC0-1\.0|CC-BY(?:-NC)?(?:-SA)?-4\.0)\b")

OWN = "vitft's own, by its Card"

# what each project says of the weights it published; the file itself seldom does
LICENCES = {
    "Google JAX": "Apache-2.0",
    "timm (historical": "Apache-2.0",
    "DeiT": "Apache-2.0",
    "DINO": "Apache-2.0",
    "MAE": "CC-BY-NC-4.0",
    "MoCo-v3": "CC-BY-NC-4.0",
}


@dataclass(frozen=True)
class Inspection:
    """What a file says of itself.

    Attributes:
        path: The file.
        kind: PyTorch, safetensors or numpy.
        bytes: Size on disk.
        sha256: Of the file, hex.
        layout: Whose names it has; a family such as `an EfficientNet`, or "".
        tensors: How many it holds.
        parameters: How many numbers they hold.
        dtypes: Type -> how many tensors have it.
        model: A vitflower name, or timm's; "" where none fits.
        twin: The same architecture in timm.
        options: What the name must be built with besides.
        img_size: Image side that the positions were trained for, px; 0 if unknown.
        tokens: Class token, registers and patches, in words.
        head: In words.
        left_out: Reason -> names that no classifier needs.
        licence: If known, and by whose word.
        notes: What was peeled off.
        metadata: Free text of a safetensors header, cut short.
    """

    path: str
    kind: str
    bytes: int
    sha256: str
    layout: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    model: str
    twin: str
    options: dict[str, Any]
    img_size: int
    tokens: str
    head: str
    left_out: dict[str, list[str]]
    licence: str
    notes: tuple[str, ...]
    metadata: dict[str, str]

    def lines(self) -> list[str]:
        """For people, one fact a line."""
        types = ", ".join(f"{n} {t}" for t, n in self.dtypes.items())
        size = f"{self.img_size} px, " if self.img_size else ""
        fits = f"{self.model} (timm: {self.twin})" if self.twin else self.model
        rows = [
            ("file", f"{self.path} ({self.kind}, {self.bytes:,} bytes)"),
            ("sha256", self.sha256),
            ("layout", self.layout or "unknown"),
            ("tensors", f"{self.tensors} ({types}), {self.parameters:,} values"),
            ("image", f"{size}{self.tokens}" if self.tokens else ""),
            ("head", self.head),
            ("fits", fits or "no model known from its names and shapes"),
            ("build", self.call),
            ("licence", self.licence or "not stated"),
            ("metadata", "; ".join(f"{k}: {v}" for k, v in self.metadata.items())),
        ]
        rows += [("note", note) for note in self.notes]
        rows += [
            (
                "left out",
                f"{len(names)} ({', '.join(names[:3])}{', ...' * (len(names) > 3)}): {why}",
            )
            for why, names in self.left_out.items()
        ]
        return [f"{key + ':':10s} {text}" for key, text in rows if text]

    @property
    def call(self) -> str:
        """The Python call that builds the model."""
        if not self.model:
            return ""
        size = {"img_size": self.img_size} if self.img_size not in (0, 224) else {}
        options = "".join(f", {k}={v!r}" for k, v in (size | self.options).items())
        return f'timm.create_model("{self.model}"{options})'


def inspect(path: Path) -> Inspection:
    """Says what a weights file is.

    Raises:
        WeightsError: As `weights.open_file`, and `ckpt.layout` for relatives of ViT.
    """
    found = weights.open_file(path)
    converted = convert.convert(found.tensors, place=path, says=fitting.own_words(path))
    sizes = anatomy(converted.state)
    model, twin, options = _fitting(found, converted, sizes)
    left_out: dict[str, list[str]] = {}
    for name, why in converted.dropped.items():
        left_out.setdefault(why, []).append(name)
    said = _own_card(found)
    if said is not None:
        model, options = said.architecture, {"num_classes": len(said.classes)} | said.options
        twin = "" if cards.ONLY_OURS & options.keys() else TWINS.get(model, "")
    dtypes: dict[str, int] = {}
    for tensor in found.tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + 1
    return Inspection(
        path=str(path),
        kind=tensorfile.KINDS[found.kind],
        bytes=path.stat().st_size,
        sha256=found.sha256,
        layout=OWN if said else converted.layout or advice.family(found.tensors),
        tensors=len(found.tensors),
        parameters=sum(t.numel() for t in found.tensors.values()),
        dtypes=dtypes,
        model=model,
        twin=twin,
        options=options,
        img_size=_side(sizes) if sizes else 0,
        tokens=_tokens(sizes) if sizes else "",
        head=_head(sizes, converted.state) if sizes else "",
        left_out=left_out,
        licence=_licence(found, converted.layout),
        notes=(*found.notes, *_notes(converted, sizes, said)),
        metadata={k[:40]: v[:80] for k, v in found.metadata.items()},
    )


def _own_card(found: weights.Checkpoint) -> Card | None:
    """What a product of a run says of itself; None where it says nothing that can be believed."""
    try:
        return cards.parse(found.metadata.get(cards.KEY, ""), found.path)
    except WeightsError:
        return None


def _notes(converted: convert.Converted, sizes: Anatomy | None, said: Card | None) -> Iterator[str]:
    if converted.prefix:
        yield f"all names begin with {converted.prefix!r}"
    if said is None and sizes is not None and (asked := convert.untold_activation(converted)):
        yield f"no tensor shows the activation: {asked}"


def _fitting(
    found: weights.Checkpoint, converted: convert.Converted, sizes: Anatomy | None
) -> tuple[str, str, dict[str, Any]]:
    """Name of ours, name in timm, and options; a model that is no ViT is sought by file name."""
    if sizes is None:
        return _named_like(found), "", {}
    for name, size in SIZES.items():
        depth, width, patch = size.get("depth", 12), size["embed_dim"], size["patch_size"]
        cnn = RESNETS[size["embed"]] if "embed" in size else None
        if sizes.has_cnn != (cnn is not None) or sizes.cnn != cnn:
            continue
        if (sizes.depth, sizes.width) == (depth, width) and sizes.patch in ((patch, patch), (0, 0)):
            return name, TWINS.get(name, ""), options_for(name, sizes, converted)
    return "", "", {}


def _named_like(found: weights.Checkpoint) -> str:
    """timm's model of the file's name, if all its tensors are in the file."""
    stem = found.path.name.split("-")[0].split(".")[0]
    if not timm.is_model(stem):
        return ""
    with torch.device("meta"):
        model = timm.create_model(stem)
    try:
        tally.check(found.tensors, model.state_dict(), place=found.path)
    except WeightsError:
        return ""
    return stem


def options_for(name: str, sizes: Anatomy, converted: convert.Converted) -> dict[str, Any]:
    """What a name must be built with so that a file of these sizes fits tensor by tensor."""
    own = SIZES[name]
    classes = 0 if sizes.classes and not _reads_width(sizes, converted.state) else sizes.classes
    wanted: dict[str, tuple[Any, Any]] = {  # option: (of the file, of the name)
        "num_classes": (classes, None),
        "in_chans": (sizes.in_chans or 3, 3),
        "init_values": (1e-5 if sizes.layer_scale else None, own.get("init_values")),
        "reg_tokens": (sizes.registers, 0),
        "no_embed_class": (_no_embed_class(sizes, converted), False),
        "class_token": (sizes.class_token, True),
        "global_pool": ("token" if sizes.class_token and not sizes.fc_norm else "avg", "token"),
        "fc_norm": (sizes.fc_norm, sizes.fc_norm or not sizes.class_token and None),
        "pre_norm": (sizes.pre_norm, False),
        "qkv_bias": (sizes.qkv_bias, True),
        "mlp_ratio": (sizes.hidden / sizes.width, 4.0),
        "representation_size": (sizes.representation or None, None),
        "norm_eps": (converted.options.get("norm_eps", 1e-6), 1e-6),
        "num_heads": (converted.options.get("num_heads"), None),
        "act_layer": (converted.options.get("act_layer"), None),
    }
    return {k: file for k, (file, named) in wanted.items() if file != named}


def _reads_width(sizes: Anatomy, state: Mapping[str, Tensor]) -> bool:
    return state["head.weight"].shape[-1] in (sizes.width, sizes.representation)


def _no_embed_class(sizes: Anatomy, converted: convert.Converted) -> bool:
    """Whether positions belong to patches alone; the table of registers goes both ways."""
    if sizes.registers:
        patches = sizes.positions - int(sizes.class_token) - sizes.registers
        return patches < 1 or math.isqrt(patches) ** 2 != patches
    if sizes.class_token and _square(sizes.positions) and not _square(sizes.positions - 1):
        return True  # DeiT-III and FlexiViT; of n * n rows none is left for the class token
    return bool(converted.options.get("no_embed_class", False))


def _square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n


def _grid(sizes: Anatomy) -> int:
    """Side of the square position grid, in patches; 0 if it is not square."""
    for prefix in (int(sizes.class_token), int(sizes.class_token) + sizes.registers, 0):
        side = math.isqrt(max(sizes.positions - prefix, 0))
        if side and side * side == sizes.positions - prefix:
            return side
    return 0


def _side(sizes: Anatomy) -> int:
    """Image side, px; 0 for an unknown CNN, whose cells may cover any number of pixels."""
    if sizes.cnn is None:
        return 0 if sizes.has_cnn else _grid(sizes) * sizes.patch[0]
    return _grid(sizes) * sizes.patch[0] * 4 * int(2 ** max(len(sizes.cnn) - 1, 0))


def _tokens(sizes: Anatomy) -> str:
    side = _grid(sizes)
    parts = ["class token"] if sizes.class_token else []
    parts += [f"{sizes.registers} register tokens"] if sizes.registers else []
    if side:
        parts.append(f"{side} x {side} patches")
    else:
        parts.append(f"{sizes.positions} positions" if sizes.positions else "no positions")
    return " + ".join(parts) + f"; {sizes.words}, MLP {sizes.hidden}"


def _head(sizes: Anatomy, state: Mapping[str, Tensor]) -> str:
    if not sizes.classes:
        return "none"
    zero = "" if bool(state["head.weight"].any()) else ", all zeros: it never classified"
    reads = "" if _reads_width(sizes, state) else ", reads more than one token: left out"
    through = f" through a layer of {sizes.representation}" if sizes.representation else ""
    return f"{sizes.classes:,} classes{through}{zero}{reads}"


def _licence(found: weights.Checkpoint, layout: str) -> str:
    if stated := found.metadata.get("license") or found.metadata.get("licence"):
        return f"{stated} (the file's own word)"
    config = found.path.parent / "config.json"
    if config.is_file() and found.path.name in ("model.safetensors", "pytorch_model.bin"):
        try:
            stated = json.loads(config.read_text("utf-8"))["pretrained_cfg"]["license"]
            return f"{stated} (config.json beside it)"
        except (OSError, ValueError, KeyError, TypeError):
            return ""
    header = " ".join(text for key, text in found.metadata.items() if key != cards.KEY)
    if named := sorted(set(SPDX.findall(header))):
        return f"{' and '.join(named)} (named in the file's header)"
    for start, name in LICENCES.items():
        if layout.startswith(start):
            return f"{name} for what this project published; the file does not say"
    return ""


# --- check ---------------------------------------------------------------------------------------


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
    built["img_size"] = img_size or (_side(sizes) if sizes else 0) or 224
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
