"""Blocks of text, tables, charts and photographs -> one self-contained HTML page.

A page is a title, warnings, sections of blocks, and drawers: photographs that stay folded until a
button or a link `#id` opens them. Rooms that have something to say build blocks; nobody but the
templates writes HTML. The page needs no network, and its content security policy forbids any.

Class names and file names are hostile: every value printed by a template goes through `clean`
(control characters, bidirectional overrides, lone surrogates) and then through autoescaping.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vitft import charts
from vitft.charts import Chart

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).with_name("templates")
# Shown as they are though Python calls them unprintable: no-break spaces, and the joiners that
# Persian words and emoji need.
KEPT = frozenset("\u00a0\u202f\u200c\u200d")
FORMATS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png"}  # first bytes -> image/...


@dataclass(frozen=True)
class Share:
    """A table cell with a fraction 0-1 and, maybe, its interval; drawn with a small strip."""

    value: float
    low: float | None = None
    high: float | None = None
    block: ClassVar[str] = "share"


@dataclass(frozen=True)
class Link:
    """A table cell or step that leads to a section or drawer of this page (`#id`)."""

    text: str
    href: str = ""
    block: ClassVar[str] = "link"


Cell = str | int | float | Share | Link


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: tuple[str | Link, ...]
    block: ClassVar[str] = "bullets"


@dataclass(frozen=True)
class Facts:
    """Names and values, side by side."""

    rows: tuple[tuple[str, str], ...]
    block: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Code:
    """Lines to copy into a terminal."""

    text: str
    block: ClassVar[str] = "code"


@dataclass(frozen=True)
class Table:
    """Rows under a header; the first cell of a row is its name.

    Attributes:
        sortable: Each header becomes a button.
        caption: What the rows are, above the table.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    sortable: bool = False
    block: ClassVar[str] = "table"


@dataclass(frozen=True)
class Figure:
    """A chart on its own, or several side by side where there is room."""

    charts: tuple[Chart, ...]
    block: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Photo:
    """One photograph with what is said about it.

    Attributes:
        image: JPEG or PNG bytes; None shows an empty frame.
        alt: For a reader who cannot see it.
        title: First line of the caption.
        top: (class, probability), likeliest first.
        label: The class in `top` that the label names.
        path: Where it lies, in small print.
        tags: A word or two each, such as `near duplicate`.
        overlay: The same picture with a map drawn over it; a switch on the page shows it.
        near: The nearest training photographs, in small.
    """

    image: bytes | None
    alt: str
    title: str = ""
    top: tuple[tuple[str, float], ...] = ()
    label: str = ""
    path: str = ""
    tags: tuple[str, ...] = ()
    overlay: bytes | None = None
    near: tuple["Photo", ...] = ()

    def size(self) -> int:
        """Bytes that the images take in the page (base64: 4 characters for 3 bytes)."""
        own = len(self.image or b"") + len(self.overlay or b"")
        return own * 4 // 3 + sum(photo.size() for photo in self.near)


@dataclass(frozen=True)
class Gallery:
    """Photographs; `total` says of how many, where not all are shown.

    Attributes:
        paired: Two that follow each other belong together and share a line.
    """

    photos: tuple[Photo, ...]
    total: int | None = None
    caption: str = ""
    paired: bool = False
    block: ClassVar[str] = "gallery"


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix to click on.

    Attributes:
        classes: C names.
        counts: C rows (true) of C counts (predicted).
        drawers: `{row}-{column}` of the cells that open the drawer `cell-{row}-{column}`.
    """

    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    drawers: frozenset[str] = frozenset()
    block: ClassVar[str] = "matrix"


Block = str | Bullets | Facts | Code | Table | Figure | Chart | Gallery | Matrix


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        id: For links: lower case letters, digits and `-`.
        summary: One sentence that stands without the blocks.
        folded: Only title and summary are seen until the reader opens it.
    """

    id: str
    title: str
    summary: str = ""
    blocks: tuple[Block, ...] = ()
    folded: bool = True


@dataclass(frozen=True)
class Drawer:
    """Photographs that a button or link `#id` opens over the page."""

    id: str
    title: str
    photos: tuple[Photo, ...]
    total: int
    note: str = ""


def render(
    title: str,
    sections: Sequence[Section],
    *,
    template: str = "page.html",
    subtitle: str = "",
    warnings: Sequence[str] = (),
    drawers: Sequence[Drawer] = (),
    **more: object,
) -> str:
    """Renders a page.

    Args:
        title: Of the page and of the browser's tab.
        sections: In the order shown.
        template: `page.html`, or one that extends it and fills its `lead`.
        subtitle: Small print beside the title.
        warnings: Shown above everything else.
        drawers: Their ids are unique among themselves and among the sections'.
        more: Values that the template's own lead needs.

    Returns:
        A whole HTML document, encodable as UTF-8.

    Raises:
        ValueError: Two ids are equal, an image is neither JPEG nor PNG, or a chart is inconsistent.
    """
    ids = [s.id for s in sections] + [d.id for d in drawers]
    if len(set(ids)) != len(ids):
        raise ValueError(f"two sections or drawers share an id: {sorted(ids)}")
    page = _environment().get_template(template)
    return page.render(
        title=title,
        sections=sections,
        subtitle=subtitle,
        warnings=warnings,
        drawers=drawers,
        **more,
    )


def clean(text: str) -> str:
    """Makes invisible and reordering characters visible as backslash escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in KEPT else ascii(c)[1:-1] for c in text)


def percent(share: float, decimals: int = 1) -> str:
    """A fraction as people read it: `93.7 %`; never `100.0 %` for what is less, nor `0.0 %`."""
    if not isfinite(share):
        return "unknown"
    text, least = f"{100 * share:.{decimals}f}", 10.0**-decimals
    if 0 < share < 1:
        if float(text) >= 100:
            return f"> {100 - least:.{decimals}f}\u00a0%"
        if float(text) <= 0:
            return f"< {least:.{decimals}f}\u00a0%"
    return f"{text}\u00a0%"


def number(value: float) -> str:
    """`1,234` for whole numbers, four digits for others."""
    if isinstance(value, int) or value.is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}" if isfinite(value) else "unknown"


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def uri(image: bytes) -> Markup:
        kind = next((k for start, k in FORMATS.items() if image.startswith(start)), None)
        if kind is None:
            raise ValueError(f"an image for a page must be JPEG or PNG, starts with {image[:8]!r}")
        # Base64 holds no character that HTML escapes; marked so that megabytes are not searched.
        return Markup(f"data:image/{kind};base64,") + Markup(base64.b64encode(image).decode())

    def lines(text: str) -> Markup:
        return Markup("\n").join(clean(line) for line in text.split("\n"))

    def finalize(value: object) -> object:
        return value if isinstance(value, Markup) else clean(str(value))

    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assets: dict[str, Any] = {
        "style": Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": Markup(f"sha256-{digest}"),
        "lay_out": charts.lay_out,
        "stack": charts.stack,
    }
    env.globals.update(assets)
    env.filters.update(percent=percent, number=number, uri=uri, lines=lines)
    return env
