"""Maps -> pictures: over a photograph, as a sheet of photographs, as the figures of the ViT paper.

Everything is drawn with Pillow and comes back as an RGB picture; nothing is written here. One scale
of colours is used throughout: from dark blue to yellow, lighter and lighter, so that it reads the
same to colour-blind eyes and in print. Pillow's own font knows ASCII alone: other letters lose
their accents or become escapes.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Floats = NDArray[np.float32]
Box = tuple[float, float, float, float]  # left, top, right, bottom
Colour = tuple[int, int, int]

SCALE: tuple[Colour, ...] = (
    (23, 20, 74),
    (42, 72, 138),
    (35, 128, 142),
    (112, 186, 108),
    (253, 231, 80),
)
PAPER, INK, SOFT, LINE = (255, 255, 255), (27, 29, 32), (86, 91, 97), (220, 219, 214)
ACCENT, MIDDLE = (28, 90, 158), (176, 74, 0)
MARGIN, GAP = 48, 24  # px
HEADING, BODY, SMALL = 34, 25, 21  # px of type
HEAD = 150  # px above the pictures
SHOWN = 16  # rows and columns of the grid of grids at most


@dataclass(frozen=True)
class Panel:
    """A photograph with the pictures made of it.

    Attributes:
        pictures: Side by side; the first is the photograph.
        labels: Below each, "" for none.
        title: Below all, large.
        note: Below the title, small.
    """

    pictures: tuple[Image.Image, ...]
    labels: tuple[str, ...]
    title: str
    note: str


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


# -- over a photograph ----------------------------------------------------------------------------


def colours(values: Floats) -> NDArray[np.uint8]:
    """Values [...] in 0 to 1 -> RGB [..., 3]."""
    stops = np.linspace(0, 1, len(SCALE))
    channels = [np.interp(values, stops, channel) for channel in np.array(SCALE, float).T]
    return np.asarray(np.rint(np.stack(channels, axis=-1)), np.uint8)


def stretched(values: Floats) -> Floats:
    """From 0 at the least value to 1 at the largest, the top 2 % drawn alike; 0 where all equal.

    Some ViTs keep notes in a few background patches, which would leave all others dark
    (Darcet et al. 2023, arXiv 2309.16588).
    """
    low, high, most = (float(v) for v in np.quantile(values, (0, 0.98, 1)))
    high = high if high > low else most
    span = high - low if high > low else 1
    return np.asarray(np.clip((values - low) / span, 0, 1), np.float32)


def overlay(image: Image.Image, values: Floats, box: Box | None = None) -> Image.Image:
    """Draws a map over a photograph, which stays visible in grey.

    The network sees a part of most photographs; a white frame shows which.

    Args:
        image: RGB.
        values: [Gh, Gw], finite; stretched from its least to its largest value.
        box: Where in the image the map lies, px; default all of it. What is outside, the
            network did not see.

    Returns:
        RGB, of the image's size.

    Raises:
        ValueError: A value is not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError("a map to draw holds values that are not finite")
    left, top, right, bottom = (round(side) for side in box or (0, 0, *image.size))
    smooth = Image.fromarray(stretched(values)).resize(
        (max(1, right - left), max(1, bottom - top)), Image.Resampling.BICUBIC
    )
    canvas = Image.new("F", image.size, 0.0)
    canvas.paste(smooth, (left, top))
    heat = np.clip(np.asarray(canvas), 0, 1)
    grey = np.asarray(image.convert("L"), np.float32)[..., None]
    share = 0.3 + 0.3 * heat[..., None]
    drawn = (1 - share) * (25 + 0.9 * grey) + share * colours(heat)
    inside = np.zeros((image.height, image.width, 1), bool)
    inside[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = True
    mixed = np.where(inside, drawn, 0.5 * grey + 70)
    picture = Image.fromarray(np.rint(mixed).astype(np.uint8))
    if not inside.all():
        frame = (left - 1, top - 1, right, bottom)
        ImageDraw.Draw(picture).rectangle(frame, outline=PAPER, width=1)
    return picture


# -- sheets ---------------------------------------------------------------------------------------


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture with its longer side at `side` pixels."""
    width, height = (max(1, round(length * side / max(picture.size))) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def sheet(title: str, note: str, panels: Sequence[Panel], *, across: int) -> Image.Image:
    """Photographs with their maps, row by row.

    Args:
        title: What the maps show.
        note: How they were made.
        panels: At least one; all with the same number of pictures, in the size they will have.
        across: Pictures in a row at most; a panel with more of them takes several rows.
    """
    pictures = [picture for panel in panels for picture in panel.pictures]
    label = SMALL + 14 if any(any(panel.labels) for panel in panels) else GAP // 2
    tile = max(p.width for p in pictures) + GAP // 3, max(p.height for p in pictures) + label
    each = min(len(panels[0].pictures), across)
    columns = min(max(1, across // each), len(panels))
    lines = -(-len(panels[0].pictures) // each)
    width, height = each * tile[0] + GAP, lines * tile[1] + 2 * BODY + 2 * GAP
    inner = max(columns * width - GAP, 960)
    rows = -(-len(panels) // columns)
    canvas = Image.new("RGB", (inner + 2 * MARGIN, HEAD + rows * height + MARGIN // 2), PAPER)
    _heading(canvas, title, note, ("least", "most"))
    for i, panel in enumerate(panels):
        x, y = MARGIN + i % columns * width, HEAD + i // columns * height
        room = width - GAP if columns > 1 else inner
        _panel(canvas, panel, (x, y), tile, each, room)
    return canvas


def _panel(
    canvas: Image.Image,
    panel: Panel,
    at: tuple[int, int],
    tile: tuple[int, int],
    each: int,
    room: int,
) -> None:
    draw = ImageDraw.Draw(canvas)
    for i, (picture, label) in enumerate(zip(panel.pictures, panel.labels, strict=True)):
        x, y = at[0] + i % each * tile[0], at[1] + i // each * tile[1]
        canvas.paste(picture, (x, y))
        _text(draw, (x, y + picture.height + 4), label, SMALL, SOFT, tile[0] - 4)
    y = at[1] + -(-len(panel.pictures) // each) * tile[1]
    _text(draw, (at[0], y), panel.title, BODY, INK, room)
    _text(draw, (at[0], y + BODY + 8), panel.note, SMALL, SOFT, room)


# -- the figures of the ViT paper -----------------------------------------------------------------


def positions(similarity: Floats, note: str) -> Image.Image:
    """A grid of grids: how alike the position embedding of each patch is to that of every other.

    Args:
        similarity: [Gh, Gw, Gh, Gw] in [-1, 1].
        note: About the model.

    Source: Dosovitskiy et al. 2021, figure 7 centre.
    """
    rows, columns = similarity.shape[:2]
    down, right = _picked(rows), _picked(columns)
    cell = max(2, 900 // max(len(down), len(right)) // max(rows, columns))  # px of a patch
    high, wide, gap = cell * rows, cell * columns, 6
    low = float(similarity.min())
    head, left = HEAD, MARGIN + 64
    size = (left + len(right) * (wide + gap) + MARGIN, head + len(down) * (high + gap) + 100)
    canvas = Image.new("RGB", (max(size[0], 1000), size[1]), PAPER)
    _heading(canvas, "Similarity of position embeddings", note, (f"{low:.2f}", "1.00"))
    draw = ImageDraw.Draw(canvas)
    for i, r in enumerate(down):
        y = head + i * (high + gap)
        _text(draw, (left - 14, y + high // 2), str(r + 1), SMALL, SOFT, 60, "rm")
        for j, c in enumerate(right):
            values = (similarity[r, c] - low) / max(1 - low, 1e-6)
            tile = Image.fromarray(colours(values)).resize((wide, high), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + j * (wide + gap), y))
    y = head + len(down) * (high + gap) + 6
    for j, c in enumerate(right):
        _text(draw, (left + j * (wide + gap) + wide // 2, y), str(c + 1), SMALL, SOFT, 60, "ma")
    middle = left + len(right) * (wide + gap) // 2
    _text(draw, (middle, y + SMALL + 12), "column of the patch", SMALL, INK, 600, "ma")
    _sideways(canvas, "row of the patch", MARGIN - 12, head + len(down) * (high + gap) // 2)
    return canvas


def _picked(count: int) -> list[int]:
    """Evenly spaced rows, the first and the last among them, at most SHOWN."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, SHOWN))})


def filters(images: Floats, shares: Floats | None, total: int, note: str) -> Image.Image:
    """The first layer's filters as small pictures, grey where they do not look.

    Args:
        images: [N, p, p, 3], signed; each is scaled by its own largest value.
        shares: [N] of variance, where these are principal components.
        total: Filters in the layer.
        note: About the model.
    """
    count, across, tile = len(images), 7, 128
    lines, label = -(-count // across), SMALL + 12 if shares is not None else GAP // 2
    head, step = 190, tile + GAP // 2
    size = (2 * MARGIN + across * step, head + lines * (tile + label) + MARGIN)
    canvas = Image.new("RGB", size, PAPER)
    if shares is None:
        what = f"The {count} strongest of {total} filters of the first layer"
        more = "each scaled by itself; grey is zero"
    else:
        what = f"First {count} principal components of the {total} patch filters"
        more = f"they hold {shares.sum():.0%} of the variance; each scaled by itself; grey is zero"
    _heading(canvas, what, note, None)
    draw = ImageDraw.Draw(canvas)
    _text(draw, (MARGIN, 120), more, SMALL, SOFT, size[0] - 2 * MARGIN)
    for i, image in enumerate(images):
        x, y = MARGIN + i % across * step, head + i // across * (tile + label)
        grey = np.rint(127.5 + 127.5 * image / max(float(np.abs(image).max()), 1e-12))
        picture = Image.fromarray(grey.astype(np.uint8))
        canvas.paste(picture.resize((tile, tile), Image.Resampling.NEAREST), (x, y))
        if shares is not None:
            at = (x + tile // 2, y + tile + 4)
            _text(draw, at, f"{shares[i]:.1%}", SMALL - 2, SOFT, tile, "ma")
    return canvas


def distance(pixels: Floats, evenly: float, note: str) -> Image.Image:
    """How far each head looks, block by block.

    Args:
        pixels: [L, H].
        evenly: Pixels, of a head that looks everywhere alike.
        note: About the model and the photographs.

    Source: Dosovitskiy et al. 2021, figure 7 right.
    """
    largest = max(float(pixels.max()), evenly)
    step = _nice(largest / 5)
    plot = _Plot(len(pixels), step * float(np.ceil(largest * 1.02 / step)))
    canvas = Image.new("RGB", (2 * plot.width, 2 * plot.height), PAPER)
    _marks(ImageDraw.Draw(canvas), plot, pixels, evenly, step)
    canvas = canvas.reduce(2)  # drawn twice as large, so that dots are round
    draw = ImageDraw.Draw(canvas)
    _heading(canvas, "How far each head looks", note, None)
    _text(draw, (plot.left + 24, 124), "one head", SMALL, INK, 200)
    _text(draw, (plot.left + 206, 124), "mean of the block", SMALL, INK, 300)
    for value in np.arange(0, plot.most + step / 2, step):
        _text(draw, (plot.left - 16, plot.y(value)), f"{value:g}", SMALL, SOFT, 90, "rm")
    for block in range(0, plot.blocks, -(-plot.blocks // 16)):
        _text(draw, (plot.x(block), plot.bottom + 12), str(block + 1), SMALL, SOFT, 60, "ma")
    middle = (plot.left + plot.right) / 2
    _text(draw, (middle, plot.bottom + 50), "block", BODY, INK, 400, "ma")
    _sideways(canvas, "mean attention distance, pixels", 34, (plot.top + plot.bottom) // 2)
    alike = (plot.right, plot.y(evenly) - 8)
    _text(draw, alike, "looking everywhere alike", SMALL, SOFT, 500, "rd")
    return canvas


@dataclass(frozen=True)
class _Plot:
    """Where values lie on the picture of distances, px."""

    blocks: int
    most: float
    width: int = 1300
    height: int = 920
    left: int = 140
    top: int = 190
    bottom: int = 800

    @property
    def right(self) -> int:
        return self.width - MARGIN

    def x(self, block: int) -> float:
        return self.left + (block + 0.5) * (self.right - self.left) / self.blocks

    def y(self, value: float) -> float:
        return self.bottom - value / self.most * (self.bottom - self.top)


def _marks(
    draw: ImageDraw.ImageDraw, plot: _Plot, pixels: Floats, evenly: float, step: float
) -> None:
    """Everything but type, at twice the size."""
    left, right = 2 * plot.left, 2 * plot.right
    for value in np.arange(0, plot.most + step / 2, step):
        draw.line((left, 2 * plot.y(value), right, 2 * plot.y(value)), LINE, 2)
    for x in range(left, right, 28):
        draw.line((x, 2 * plot.y(evenly), x + 14, 2 * plot.y(evenly)), SOFT, 4)
    for block, values in enumerate(pixels):
        across = 2 * plot.x(block)
        for value in values.tolist():
            _dot(draw, across, 2 * plot.y(value))
        y = 2 * plot.y(float(values.mean()))
        draw.line((across - 34, y, across + 34, y), MIDDLE, 8)
    _dot(draw, left + 13, 273)
    draw.line((left + 320, 273, left + 388, 273), MIDDLE, 8)


def _dot(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    draw.ellipse((x - 13, y - 13, x + 13, y + 13), ACCENT, PAPER, 3)


def _nice(step: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... that is not smaller."""
    power = 10.0 ** np.floor(np.log10(max(step, 1e-6)))
    return float(next(power * k for k in (1, 2, 5, 10) if power * k >= step * 0.999))


# -- type -----------------------------------------------------------------------------------------


def _heading(canvas: Image.Image, title: str, note: str, ends: tuple[str, str] | None) -> None:
    """Title, note (broken at its `; ` if too long), and colours with the meaning of their ends."""
    draw = ImageDraw.Draw(canvas)
    room = canvas.width - 2 * MARGIN
    if ends:
        bar = Image.fromarray(colours(np.linspace(0, 1, 220, dtype=np.float32))[None]).resize(
            (220, 20)
        )
        x = canvas.width - MARGIN - 220
        canvas.paste(bar, (x, 48))
        _text(draw, (x, 74), ends[0], SMALL, SOFT, 110)
        _text(draw, (x + 220, 74), ends[1], SMALL, SOFT, 110, "ra")
        room -= 220 + GAP
    _text(draw, (MARGIN, 40), title, HEADING, INK, room)
    lines = [note] if _font(SMALL).getlength(plain(note)) <= room else note.split("; ", 1)
    for i, line in enumerate(lines):
        _text(draw, (MARGIN, 40 + HEADING + 10 + 26 * i), line, SMALL, SOFT, room)


def _text(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    colour: Colour,
    room: int,
    anchor: str = "la",
) -> None:
    """One line, shortened in its middle to `room` pixels."""
    font, text = _font(size), plain(text)
    wide = font.getlength(text)
    if wide > room:
        keep = int(len(text) * room / wide)
        while keep > 2 and font.getlength(_shortened(text, keep)) > room:
            keep -= 1
        text = _shortened(text, keep)
    draw.text(at, text, colour, font, anchor)


def _shortened(text: str, keep: int) -> str:
    return f"{text[: -(-keep // 2)]}...{text[len(text) - keep // 2 :]}"


def _sideways(canvas: Image.Image, text: str, x: int, middle: int) -> None:
    """A line of text that runs upwards."""
    font = _font(BODY)
    strip = Image.new("RGB", (round(font.getlength(text)) + 4, BODY + 10), PAPER)
    ImageDraw.Draw(strip).text((2, 2), text, INK, font)
    turned = strip.transpose(Image.Transpose.ROTATE_90)
    canvas.paste(turned, (x - turned.width // 2, middle - turned.height // 2))


def plain(text: str) -> str:
    """Text in the characters that Pillow's own font has: accents go, the rest becomes escapes."""
    letters = "".join(
        c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)
    )
    return "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in letters)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
