"""What the value of a recipe's key may be, and the words for it.

A kind is a type with its bounds; `rule()` derives the words of errors and reference from the same
declaration, so that text and check cannot drift apart. Where a bound cannot be put into words by
itself, a `Rule` beside it says it.
"""

import re
import types
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict


@dataclass(frozen=True)
class Rule:
    """The rule of a type in words, where they cannot be derived from its constraints."""

    text: str


def _has_group(pattern: str) -> str:
    if pattern == "parent":
        return pattern
    try:
        with warnings.catch_warnings(action="ignore"):
            groups = re.compile(pattern).groupindex
    except (re.error, OverflowError, RecursionError):
        raise ValueError("not a regular expression") from None
    if "g" not in groups:
        raise ValueError("no group")
    return pattern


def _not_empty(path: object) -> object:
    if path == "":
        raise ValueError("empty")
    return path


def _folder_name(name: str) -> str:
    if re.fullmatch(r"\w[\w.+-]{0,99}", name) is None:
        raise ValueError("not a plain name")
    return name


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] >= pair[1]:
        raise ValueError("not rising")
    return pair


def _different(steps: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(steps)) < len(steps):
        raise ValueError("repeated")
    return steps


Flag = Annotated[bool, Strict()]
Integer = Annotated[int, Strict()]
Count = Annotated[int, Strict(), Field(ge=1, lt=2**31), Rule("a whole number of at least 1")]
Tally = Annotated[int, Strict(), Field(ge=0, lt=2**31), Rule("a whole number of at least 0")]
Byte = Annotated[int, Strict(), Field(ge=0, le=255)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**63), Rule("a whole number from 0 to 2^63 - 1")]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Positive = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Strict(), Field(ge=0, lt=1, allow_inf_nan=False)]
ShareOrAll = Annotated[float, Strict(), Field(ge=0, le=1, allow_inf_nan=False)]
SomeShare = Annotated[float, Strict(), Field(gt=0, lt=1, allow_inf_nan=False)]
Decay = Annotated[float, Strict(), Field(gt=0, le=1, allow_inf_nan=False)]
Aspect = Annotated[float, Strict(), Field(ge=1, allow_inf_nan=False)]
Auto = Literal["auto"]
Text = Annotated[str, Strict(), Field(min_length=1), Rule("text")]
Scalar = Flag | Integer | Number | Annotated[str, Strict()] | None
Option = Annotated[
    Scalar | list[Integer | Number | Annotated[str, Strict()]],
    Rule("a number, text, true, false, null or a list of numbers and texts"),
]
Folder = Annotated[Path, BeforeValidator(_not_empty), Rule("a path")]

# A pattern is always told to people in words, beside it.
Device = Annotated[
    str,
    Strict(),
    Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$"),
    Rule("auto, cpu, mps, cuda or cuda:N"),
]
Augment = Annotated[
    str,
    Strict(),
    Field(pattern=r"^(tutorial|plain|(rand|augmix|original|originalr|v0|v0r|3a)(-.*)?)$"),
    Rule("tutorial, plain or a timm policy such as rand-m9-mstd0.5"),
]
Suffix = Annotated[
    str, Strict(), Field(pattern=r"^\.[a-z0-9_+-]{1,16}$"), Rule("a lower-case suffix such as .jpg")
]
Sha256 = Annotated[
    str,
    Strict(),
    Field(pattern=r"^[0-9a-f]{8,64}$"),
    Rule("the first 8 to 64 hexadecimal digits of the sha256, in lower case"),
]
RunName = Annotated[
    str,
    Strict(),
    AfterValidator(_folder_name),
    Rule("a plain folder name of at most 100 characters"),
]
Csv = Annotated[str, Strict(), Field(pattern=r"(?i)\.csv$"), Rule("the path of a .csv file")]
Split = Annotated[
    str,
    Strict(),
    Field(pattern=r"^(auto|stratified|folders|tutorial)$|\.(csv|CSV)$"),
    Rule("auto, stratified, folders, tutorial or the path of a .csv file"),
]
Group = Annotated[
    str,
    Strict(),
    AfterValidator(_has_group),
    Rule("parent, or a regular expression with a group (?P<g>...)"),
]
BitRange = Annotated[
    tuple[Number, Number], AfterValidator(_rising), Rule("two numbers, the lower one first")
]
Steps = Annotated[
    tuple[Literal["knn", "ridge", "logistic", "head", "blocks", "full"], ...],
    Field(min_length=1),
    AfterValidator(_different),
    Rule("a list of knn, ridge, logistic, head, blocks, full, each once"),
]


Adapted = Annotated[
    tuple[Literal["qkv", "proj", "fc1", "fc2"], ...],
    Field(min_length=1),
    AfterValidator(_different),
    Rule("a list of qkv, proj, fc1, fc2, each once"),
]


class Section(BaseModel):
    """Frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# --- in words ------------------------------------------------------------------------------------


def section_of(annotation: Any) -> type[Section] | None:
    """The section a declared type holds, optional or not; None for a value."""
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, Section):
            return option
    return None


_WORDS: dict[Any, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
    dict: "a mapping",
    list: "a list",
}
_BOUNDS = (("ge", "of at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))


def rule(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a declared type allows, in words: `a number above 0 and at most 1 or null`."""
    flat = [m for entry in metadata for m in getattr(entry, "metadata", [entry])]
    told = next((entry.text for entry in flat if isinstance(entry, Rule)), None)
    origin, args = get_origin(annotation), get_args(annotation)
    if told is not None:
        return told
    if origin is Annotated:
        return rule(args[0], args[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(rule(arg) for arg in args))
    if origin is Literal:
        return str(args[0]) if len(args) == 1 else "one of " + ", ".join(args)
    if origin is tuple:
        many = "a list" if Ellipsis in args else f"a list of {len(args)}"
        return f"{many}, each {rule(args[0])}"
    if section_of(annotation):
        return "a section (key: value lines)"
    return _WORDS[origin or annotation] + _bounds(flat)


def _bounds(metadata: Sequence[Any]) -> str:
    limits = [(word, getattr(m, name, None)) for m in metadata for name, word in _BOUNDS]
    return " and".join(f" {word} {limit:g}" for word, limit in limits if limit is not None)
