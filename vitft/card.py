"""What a product says of itself in its file's header, and how a stranger's word for it is taken.

The Card is JSON in the metadata of `model.safetensors`: class names, preprocessing, options,
numbers. It is read with a bound on its size, checked against types and ranges, and never evaluated;
no value of it may name a file, an address or code.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from vitft import encode, weights
from vitft.errors import Fault, WeightsError
from vitft.images import DecodeSpec
from vitft.inputs import TransformSpec, pixels

KEY = "vitft"  # in the safetensors header
FORMAT = 1  # of the Card; a reader of format N reads all formats up to N
LIMIT = 4_000_000  # characters of JSON a Card may take
SIDE = 8192  # largest input in pixels
# What timm.create_model may be told by a file: sizes and kinds of layers, nothing that fetches,
# opens or replaces something.
FORBIDDEN = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict",
    "checkpoint_path", "cache_dir", "model_name", "num_classes", "in_chans", "features_only",
    "scriptable", "exportable", "no_jit", "device", "dtype",
}  # fmt: skip
ONLY_OURS = frozenset({"pos_embed", "representation_size", "embed"})  # what timm's ViT has not
LARGEST = 65_536  # of a whole number among the options
OURS = "use a model.safetensors written by vitft, as it was written"


@dataclass(frozen=True)
class Card:
    """What a stranger needs to use the model rightly; travels in the safetensors header.

    Attributes:
        architecture: timm name.
        classes: Names in the order of the head's rows.
        options: Keywords for `timm.create_model` beyond `num_classes`.
        transform: `TransformSpec` of evaluation, as a dict.
        decode: `DecodeSpec`, as a dict.
        temperature: Divides the logits before the softmax; None where none was fitted.
        recipe: The resolved recipe's text.
        hashes: sha256 of data (all rows of the split), of weights and of the backbone.
        metrics: The run's test numbers; fractions 0 to 1.
        precision: What it was measured in, `float32` or `bfloat16`; `auto`: not said (older Cards).
        head_precision: Of its head, which is measured in float32 on the features of a frozen
            backbone; `auto`: as `precision`.
        extras: Further JSON of later rooms (what the temperature was fitted on, threshold for "I
            don't know").
        format: Of these attributes.
    """

    architecture: str
    classes: tuple[str, ...]
    options: dict[str, Any]
    transform: dict[str, Any]
    decode: dict[str, Any]
    temperature: float | None = None
    recipe: str = ""
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    head_precision: Literal["auto", "float32", "bfloat16"] = "auto"


def text_of(card: Card) -> str:
    """As it travels: strict JSON, NaN and infinity as null."""
    return encode.json_text(card)


def transform_of(card: Card) -> TransformSpec:
    """The evaluation transform the model was measured with."""
    spec: TransformSpec = _spec(TransformSpec).validate_python(card.transform)
    return spec


def decode_of(card: Card) -> DecodeSpec:
    """How files became pixels when it was measured."""
    spec: DecodeSpec = _spec(DecodeSpec).validate_python(card.decode)
    return spec


def read(file: Path) -> Card:
    """The Card of a file, every value checked.

    Raises:
        WeightsError: `ckpt.no_card`: none, or too large; `ckpt.newer`; `ckpt.card`: values that
            cannot be, all of them. Also as `vitft.weights.read_metadata`.
    """
    return parse(weights.read_metadata(file).get(KEY, ""), file)


def parse(text: str, file: Path) -> Card:
    """The Card of a text from `file`, every value checked.

    Raises:
        WeightsError: As `read`.
    """
    if not text or len(text) > LIMIT:
        said = f"{len(text):,} characters, at most {LIMIT:,}" if text else "none"
        what = f"its header does not say classes and preprocessing (a Card of {said})"
        raise WeightsError.of("ckpt.no_card", file, what, OURS)
    _require_known_format(text, file)
    try:
        card: Card = _spec(Card).validate_json(text, strict=True)
        problems = list(_problems(card))
    except ValidationError as error:
        problems = [_told(e["loc"], e["msg"]) for e in error.errors(include_url=False)]
    if problems:
        raise WeightsError([Fault("ckpt.card", str(file), p[:300], OURS) for p in problems])
    return card


def _require_known_format(text: str, file: Path) -> None:
    try:
        found = json.loads(text)["format"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return  # the first cards had none; whatever else is wrong is told by the schema
    if isinstance(found, int) and found > FORMAT:
        text = f"its Card has format {found}, this vitft reads up to {FORMAT}"
        raise WeightsError.of("ckpt.newer", file, text, "update vitft")


@cache
def _spec(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _told(place: Sequence[object], text: str) -> str:
    return f"its Card says nothing usable at {'.'.join(map(str, place)) or 'its start'}: {text}"


def _problems(card: Card) -> Iterator[str]:
    """What types cannot say."""
    if not card.classes or len(set(card.classes)) < len(card.classes):
        yield _told(["classes"], f"{len(card.classes):,} names, all different, at least one")
    t = card.temperature
    if t is not None and not (math.isfinite(t) and t > 0):
        yield _told(["temperature"], f"must be above 0, got {t}")
    abstain = card.extras.get("abstain", {})
    limit = abstain.get("threshold", 0.0) if isinstance(abstain, dict) else abstain
    if not isinstance(limit, int | float):
        yield _told(["extras", "abstain", "threshold"], f"must be a number, got {limit!r}")
    for name, value in card.options.items():
        if why := _refused(name, value):
            yield _told(["options", name], why)
    yield from _input_problems(card)


def _refused(name: str, value: object) -> str:
    if name in FORBIDDEN:
        return "a file may not set this"
    values = value if isinstance(value, list) else [value]
    if not all(v is None or isinstance(v, str | int | float) for v in values):
        return f"must be a number, text, true, false, null or a list of these, got {value!r}"
    large = [v for v in values if isinstance(v, int | float) and not abs(v) <= LARGEST]
    return f"must be at most {LARGEST:,}, got {large[0]}" if large else ""


def _input_problems(card: Card) -> Iterator[str]:
    try:
        transform, decode = transform_of(card), decode_of(card)
    except ValidationError as error:
        yield from (_told(e["loc"], e["msg"]) for e in error.errors(include_url=False))
        return
    numbers = (*transform.mean, *transform.std, transform.crop_pct)
    sound = {
        f"kind {transform.kind!r}, must be 'plain'": transform.kind == "plain",
        f"size {transform.size}, must be 1 to {SIDE}": all(1 <= s <= SIDE for s in transform.size),
        f"numbers {numbers}, must be finite": all(map(math.isfinite, numbers)),
        f"std {transform.std}, must be above 0": all(s > 0 for s in transform.std),
        f"crop_pct {transform.crop_pct}, must be 0.01 to 1": 0.01 <= transform.crop_pct <= 1,
        f"resize {transform.resize!r}, must be pillow or fast": transform.resize
        in ("pillow", "fast"),
        f"decoding {decode}": _can_decode(decode),
    }
    yield from (_told(["input"], text) for text, good in sound.items() if not good)
    if all(sound.values()):
        try:
            pixels(transform)
        except Exception as error:  # timm looks names up and asserts
            yield _told(["transform"], f"{type(error).__name__}: {error}")


def _can_decode(spec: DecodeSpec) -> bool:
    low, high = spec.bit_range or (0.0, 1.0)
    return (
        1 <= spec.max_pixels < 2**31
        and 1 <= spec.max_aspect < math.inf
        and all(0 <= c <= 255 for c in spec.background)
        and low < high < math.inf
        and spec.icc in ("ignore", "to_srgb")
        and spec.frames in ("first", "error")
        and spec.decoder in ("pillow", "fast")
    )
