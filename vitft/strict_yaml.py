"""Strict YAML: plain data, the place of every value, and every fault at once.

The small safe part of YAML 1.2 that a recipe needs: mappings with text keys, lists, numbers,
true/false, null and text. What YAML readers disagree about (`010`, `12:30`, `yes`, `1_000`, tags)
is refused with an explanation instead of guessed. Built on PyYAML's event stream, so that depth and
size are known before anything is expanded: a 300-byte "billion laughs" costs a millisecond.

Source: YAML 1.2.2 core schema, https://yaml.org/spec/1.2.2/#103-core-schema
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 20
MAX_NODES = 10_000  # after aliases are expanded
MAX_DIGITS = 40  # of a whole number; no key needs more

KeyPath = tuple[str | int, ...]
Spot = tuple[int, int]  # line and column, both from 1

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_OCTAL = re.compile(r"[-+]?(0[0-9_]+|0o[0-7]+|0b[01_]+|0x[0-9a-fA-F_]+)")
_BASE60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_GROUPED = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?")
_SIMPLE = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")  # never a number, date, alias or flow mark
_TAKEN = frozenset(["y", "n", "yes", "no", "on", "off", "true", "false", "null"])
_WORDS: dict[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf"), float("inf")),
    "-.inf": float("-inf"),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


@dataclass(frozen=True)
class Place:
    """Where a value stands (lines and columns from 1) and what was written there."""

    line: int
    column: int
    raw: str


@dataclass(frozen=True)
class Problem:
    """One fault of the text itself; `id` has no prefix, the caller adds its own."""

    id: str
    path: KeyPath
    line: int
    column: int
    text: str
    fix: str


@dataclass(frozen=True)
class Document:
    """What was read.

    Attributes:
        value: Fresh dicts, lists and scalars; nothing shared, aliases are copies. Values that have
            a problem are left out. None when the text could not be read at all.
        places: Key path -> place of its key (of the item in a list).
        problems: In order of appearance.
    """

    value: object
    places: dict[KeyPath, Place]
    problems: tuple[Problem, ...]


def read(text: str) -> Document:
    """Reads one document; never raises for what the text holds.

    Args:
        text: At most 1,000,000 characters, 20 levels, 10,000 values with aliases expanded.
    """
    try:
        root = _Composer(text.removeprefix("\ufeff")).document()
    except _Stop as stop:
        return Document(None, {}, (stop.problem,))
    if root is None:
        return Document(None, {}, ())
    walk = _Walk()
    value = walk.value(root, ())
    return Document(None if value is _LEFT_OUT else value, walk.places, tuple(walk.problems))


def scalar(raw: str) -> object:
    """The value of an unquoted word.

    Raises:
        ValueError: YAML readers disagree about it; the text says how.
    """
    if raw in _WORDS:
        return _WORDS[raw]
    if raw.lower() in ("yes", "no", "on", "off"):
        raise ValueError(f"{raw} is a boolean to some YAML readers and text to others")
    if _INT.fullmatch(raw):
        if len(raw) > MAX_DIGITS:
            raise ValueError(f"number of {len(raw):,} digits, at most {MAX_DIGITS}")
        return int(raw)
    if _OCTAL.fullmatch(raw):
        raise ValueError(f"{raw} is octal, binary or hexadecimal to some YAML readers")
    if _FLOAT.fullmatch(raw):
        return float(raw)
    if _BASE60.fullmatch(raw):
        raise ValueError(f"{raw} is a number in base 60 to some YAML readers")
    if _GROUPED.fullmatch(raw):
        raise ValueError(f"{raw} is a number to some YAML readers and text to others")
    return raw


def write(value: object) -> str:
    """Plain data as one line of YAML that reads back as itself, here and in YAML 1.1 readers.

    Args:
        value: None, bool, int, float, text, path, or lists, tuples and dicts of them.
    """
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write(str(k))}: {write(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(write(v) for v in value) + "]"
    if isinstance(value, float):
        text = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(value), repr(value))
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    return str(value) if isinstance(value, int) else _quoted(str(value))


def _quoted(text: str) -> str:
    """Text as it is where no reader could take it for anything else, else in double quotes."""
    if _SIMPLE.fullmatch(text) and text.lower() not in _TAKEN:
        return text
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
    body = "".join(escapes.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text)
    return f'"{body}"'


def dotted(path: KeyPath) -> str:
    """`train.lr`, `probe.strengths[3]`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")


class _Stop(Exception):  # noqa: N818  (never leaves this file)
    """The text cannot be read any further."""

    def __init__(self, id: str, spot: Spot, text: str, fix: str) -> None:
        self.problem = Problem(id, (), *spot, text, fix)
        super().__init__(text)


@dataclass
class _Node:
    """A value before its aliases are expanded; an alias is the same node met twice."""

    spot: Spot
    plain: bool = True  # unquoted scalar
    text: str = ""
    items: list["_Node"] | None = None
    pairs: list[tuple["_Node", "_Node"]] | None = None
    tag: str | None = None
    size: int = 1
    height: int = 0

    def adopt(self, child: "_Node") -> None:
        self.size += child.size
        self.height = max(self.height, child.height + 1)


@dataclass
class _Composer:
    """Events -> nodes, within the limits on depth and size."""

    text: str
    nodes: int = 0
    anchors: dict[str, _Node] = field(default_factory=dict)
    unfinished: set[str] = field(default_factory=set)

    def document(self) -> _Node | None:
        if len(self.text) > MAX_CHARACTERS:
            size = f"{len(self.text):,} characters, at most {MAX_CHARACTERS:,}"
            raise _Stop("too_large", (1, 1), size, "keep the recipe short; put lists into files")
        self.events = self._events()
        root = None
        while (event := next(self.events, None)) is not None:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    text = "a second document starts here, one is allowed"
                    raise _Stop("syntax", _spot(event), text, "remove the line ---")
                root = self._node(next(self.events), 0)
        return root

    def _events(self) -> Iterator[yaml.Event]:
        try:
            yield from yaml.parse(self.text, Loader=yaml.SafeLoader)
        except yaml.reader.ReaderError as error:
            before = self.text[: error.position]
            line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
            text = f"character U+{ord(self.text[error.position]):04X} is not allowed in YAML"
            raise _Stop("syntax", (line, column), text, "remove it") from None
        except yaml.MarkedYAMLError as error:
            raise _syntax(error, self.text) from None
        except (ValueError, OverflowError) as error:  # such as an escape beyond Unicode
            raise _Stop("syntax", (1, 1), f"not YAML: {error}", "correct the text") from None

    def _node(self, event: yaml.Event, depth: int) -> _Node:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, depth)
        self._count(1, depth, _spot(event))
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self.unfinished.add(anchor)
        node = self._fill(event, depth)
        if anchor is not None:
            self.unfinished.discard(anchor)
            self.anchors[anchor] = node
        return node

    def _fill(self, event: yaml.Event, depth: int) -> _Node:
        node = _Node(_spot(event), tag=getattr(event, "tag", None))
        if isinstance(event, yaml.ScalarEvent):
            node.plain, node.text = not event.style, event.value
        elif isinstance(event, yaml.SequenceStartEvent):
            node.items = []
            while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
                node.items.append(self._node(event, depth + 1))
                node.adopt(node.items[-1])
        else:
            node.pairs = []
            while not isinstance(event := next(self.events), yaml.MappingEndEvent):
                key = self._node(event, depth + 1)
                node.pairs.append((key, self._node(next(self.events), depth + 1)))
                node.adopt(key)
                node.adopt(node.pairs[-1][1])
        return node

    def _alias(self, event: yaml.AliasEvent, depth: int) -> _Node:
        name = event.anchor
        if name in self.unfinished:
            text = f"*{name} stands inside what it names, without end"
            raise _Stop("recursive_alias", _spot(event), text, "write the value out")
        if name not in self.anchors:
            text, fix = f"*{name} names nothing above it", f"define &{name} first, or use quotes"
            raise _Stop("syntax", _spot(event), text, fix)
        node = self.anchors[name]
        self._count(node.size, depth + node.height, _spot(event))
        return node

    def _count(self, size: int, depth: int, spot: Spot) -> None:
        self.nodes += size
        if depth > MAX_DEPTH:
            text = f"nested more than {MAX_DEPTH} levels deep"
            raise _Stop("too_deep", spot, text, "write it flat; no key needs so many levels")
        if self.nodes > MAX_NODES:
            text = f"more than {MAX_NODES:,} values with aliases expanded ({self.nodes:,} so far)"
            raise _Stop("too_large", spot, text, "keep the recipe short; use fewer aliases")


_LEFT_OUT = object()  # stands for a value that has a problem


@dataclass
class _Walk:
    """Nodes -> values, with places and problems on the way."""

    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def value(self, node: _Node, path: KeyPath) -> object:
        if node.tag is not None:
            name = node.tag.replace("tag:yaml.org,2002:", "!!")
            text = f"tags are not allowed, got {name}"
            return self._problem("tag", path, node, text, "write the plain value")
        if node.items is not None:
            return self._list(node.items, path)
        if node.pairs is not None:
            return self._mapping(node.pairs, path)
        return self._scalar(node, path)

    def _list(self, items: list[_Node], path: KeyPath) -> object:
        out: list[object] = []
        for k, item in enumerate(items):
            self._mark((*path, k), item, item)
            out.append(self.value(item, (*path, k)))
        return _LEFT_OUT if _LEFT_OUT in out else out  # positions of items must not shift

    def _mapping(self, pairs: list[tuple[_Node, _Node]], path: KeyPath) -> dict[str, object]:
        out: dict[str, object] = {}
        for key, node in pairs:
            if key.items is not None or key.pairs is not None or key.tag or _odd(key.text):
                self._problem("syntax", path, key, "a key must be one word", "write key: value")
                continue
            here = (*path, key.text)
            if here in self.places:
                self._repeated(here, key)
                continue
            self._mark(here, key, node)
            value = self.value(node, here)
            if value is not _LEFT_OUT:
                out[key.text] = value
        return out

    def _scalar(self, node: _Node, path: KeyPath) -> object:
        if _odd(node.text):
            text = f"text holds a character that no file name can, got {node.text[:80]!r}"
            return self._problem("syntax", path, node, text, "remove the escape")
        if not node.plain:
            return node.text
        try:
            return scalar(node.text)
        except ValueError as error:
            fix = 'write a decimal number or true/false; for text put it in quotes: "{}"'
            return self._problem("ambiguous", path, node, str(error), fix.format(node.text[:80]))

    def _repeated(self, path: KeyPath, key: _Node) -> None:
        first = self.places[path]
        text = f"given twice, first in line {first.line}, again in line {key.spot[0]}"
        self._problem("duplicate_key", path, key, text, "keep one of the two lines")

    def _problem(self, id: str, path: KeyPath, node: _Node, text: str, fix: str) -> object:
        place, spot = self.places.get(path), node.spot
        if place is not None and id != "duplicate_key":
            spot = place.line, place.column
        self.problems.append(Problem(id, path, *spot, text, fix))
        return _LEFT_OUT

    def _mark(self, path: KeyPath, at: _Node, node: _Node) -> None:
        self.places[path] = Place(*at.spot, _shown(node))


def _odd(text: str) -> bool:
    """NUL and halves of characters, which a quoted escape can smuggle in."""
    return any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text)


def _shown(node: _Node) -> str:
    """What a reader of the file sees there, short."""
    if node.items is not None:
        return f"a list of {len(node.items):,}"
    if node.pairs is not None:
        return f"a mapping of {len(node.pairs):,}"
    text = node.text if len(node.text) <= 80 else node.text[:77] + "..."
    return (text or "nothing") if node.plain else f'"{text}"'


def _spot(event: yaml.Event) -> Spot:
    mark = event.start_mark
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def _syntax(error: yaml.MarkedYAMLError, text: str) -> _Stop:
    mark = error.problem_mark or error.context_mark
    spot = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    if mark is not None and text[mark.index : mark.index + 1] == "\t":
        return _Stop("tab", spot, "a tab, YAML indents with spaces", "replace it by two spaces")
    what = " ".join(part for part in (error.context, error.problem) if part)
    fix = "correct the line; text with special characters belongs in quotes"
    return _Stop("syntax", spot, f"not YAML: {what}", fix)
