"""What a weights file is: whose names, which model, what licence, and the call that builds it.

In: a file. Out: an `Inspection`, from names, shapes and the file's own words alone; no model is
built but to compare names, and that without memory.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from vitft import advice, convert, fitting, tally, tensorfile, weights
from vitft import card as cards
from vitft.anatomy import Anatomy, anatomy
from vitft.card import Card
from vitft.errors import WeightsError
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
        img_size=side(sizes) if sizes else 0,
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


def side(sizes: Anatomy) -> int:
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
