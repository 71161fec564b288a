"""From the bytes of a stranger's file to an RGB picture, or one `BadImage` that says why not.

Everything vitft ever decodes (scan, training, evaluation, prediction, report) passes through
`decode`, so a photograph means the same pixels everywhere. Three steps, each cheaper than the next:

    read_bytes   regular files only, never a pipe, never more than 512 MiB
    inspect      format by content, size and shape by header: bombs end here, in under 1 ms
    decode       all pixels, first frame, 8 bits, no alpha, upright, RGB

Pillow does the decoding. Its plugin classes are called directly, because `Image.open` would try
formats outside the allow-list, raise its own bomb errors before the size is known to us, and turn
two-picture JPEGs (MPO) into another format.
"""

import errno
import io
import json
import math
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from vitft.errors import DataError, Fault, escape

MAX_BYTES = 512 * 2**20  # of one file
LARGE = 32_000_000  # pixels; a larger picture is reduced while it is converted, to bound memory
REDUCED = 8_000_000  # pixels that a large picture keeps at most
MAX_SCANS = 100  # of one progressive JPEG; encoders write about 10, attacks thousands
TINY = 10  # pixels; a shorter side deserves a warning

# Never wait for a pipe's writer; read bytes as they are. Each system has one of the two or both.
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
FORMATS = tuple(PLUGINS)
READS = "vitft reads " + ", ".join(FORMATS)
COPY_AGAIN = "copy the file again, or set data.on_bad: skip"

# What else people keep in image folders, by its first bytes: (pattern, name, help).
FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (rb"....ftyp(heic|heix|hevc|heim|heis|mif1|msf1)", "HEIC", "pillow-heif or ImageMagick"),
    (rb"....ftyp(avif|avis)", "AVIF", "Pillow or ImageMagick"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "JPEG XL", "djxl or ImageMagick"),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000", "ImageMagick"),
    (rb"%!PS|\xc5\xd0\xd3\xc6|%PDF", "PostScript or PDF", "a PDF viewer's export"),
    (rb"\xd7\xcd\xc6\x9a|\x01\x00\x00\x00.{36} EMF", "Windows metafile", "an office program"),
    (rb"8BPS", "Photoshop", "Photoshop or GIMP"),
    (rb"\x00\x00[\x01\x02]\x00", "Windows icon", "ImageMagick"),
    (rb"P[1-7fF]\s", "Netpbm", "ImageMagick"),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "video", "ffmpeg, frame by frame"),
)
# Files that are no pictures at all: (pattern, what it looks like).
STRANGERS: tuple[tuple[bytes, str], ...] = (
    (rb"version https://git-lfs", "a git-lfs pointer: run `git lfs pull`"),
    (rb"(?i)\s*<(!doctype html|html|head|body)", "a web page"),
    (rb"\s*<svg|\s*<\?xml.{0,200}<svg", "an SVG drawing"),
    (rb"\s*<\?xml|\s*<", "XML"),
    (rb"\s*[\[{]", "JSON"),
    (rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf", "an archive"),
)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(DataError):
    """One file that cannot be used as a photograph; carries exactly one fault."""


@dataclass(frozen=True)
class DecodeSpec:
    """How every file becomes an RGB picture; part of every cache key and of the exported model.

    Attributes:
        max_pixels: Width times height that is still decoded.
        max_aspect: Long side over short side that is still decoded.
        background: RGB in 0..255 laid under transparent pixels.
        bit_range: Stored values that become 0 and 255 in pictures of 16 bits and more; `None`
            takes 0..65535 for 16 bits, 0..1 for floats, and refuses 32-bit integers.
        icc: `ignore` the embedded colour profile as all trainers do, or convert `to_srgb`.
        frames: `first` of an animation or many pages, or `error`.
    """

    max_pixels: int = 64_000_000
    max_aspect: float = 200.0
    background: tuple[int, int, int] = (255, 255, 255)
    bit_range: tuple[float, float] | None = None
    icc: str = "ignore"
    frames: str = "first"

    def key(self) -> str:
        """Canonical JSON of all that can change a pixel."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Header:
    """What a file says about itself before any pixel is decoded.

    Attributes:
        format: One of `FORMATS`, by content; the file's name plays no part.
        mode: Pillow's mode, such as `RGB`, `CMYK`, `I;16`.
        width: Pixels, as stored (before EXIF turns it).
        height: Pixels, as stored.
        frames: 1, or at least 2 for an animation or many pages. Only the second is looked for:
            walking a long file would cost what the header check must not.
        orientation: EXIF 1..8; 0 where EXIF is unreadable and therefore ignored.
        has_icc: Carries a colour profile.
        has_alpha: Carries transparency of any kind.
        bits: Per channel: 1, 8, 16 or 32.
    """

    format: str
    mode: str
    width: int
    height: int
    frames: int
    orientation: int
    has_icc: bool
    has_alpha: bool
    bits: int


def read_bytes(path: Path) -> bytes:
    """All bytes of a regular file.

    A pipe, socket or device is never read: the type is asked before opening, and again of the open
    file, because the name may have changed hands in between (the open itself cannot block).

    Raises:
        BadImage: `data.missing`, `data.broken_link`, `data.permission`, `data.not_regular`,
            `data.empty`, `data.too_large`, `data.unreadable`.
    """
    try:
        _require_regular(path, path.stat())
        handle = os.open(path, OPEN_FLAGS)
        with io.FileIO(handle) as file:
            status = os.fstat(handle)
            _require_regular(path, status)
            data = _read_all(file, status.st_size)
    except OSError as error:
        raise _unopenable(path, error) from None
    if not data:
        raise _bad("data.empty", path, "0 bytes", COPY_AGAIN)
    return data


def inspect(data: bytes, place: object, spec: DecodeSpec) -> Header:
    """Checks format, size and shape without decoding pixels.

    Args:
        data: The whole file.
        place: Named in the error, usually the path.
        spec: The bounds.

    Raises:
        BadImage: `data.empty`, `data.not_image`, `data.format`, `data.too_large`, `data.too_long`,
            `data.frames`, `data.damaged`.
    """
    with _strict_pillow:
        kind, picture = _open(data, place, spec)
        return _header(kind, picture)


def decode(
    data: bytes, place: object, spec: DecodeSpec, *, short_side: int | None = None
) -> Image.Image:
    """The picture as people see it: upright, opaque, 8 bits, RGB.

    A picture above 32 million pixels comes back reduced by a whole factor to at most 8 million, so
    that memory stays bounded by its one stored copy.

    Args:
        data: The whole file.
        place: Named in the error, usually the path.
        spec: Bounds and colour rules.
        short_side: Lets JPEGs be decoded at 1/2, 1/4 or 1/8 scale as long as the short side keeps
            at least twice this many pixels. Faster for camera-sized files, but other pixels: for
            thumbnails and for those who declare it.

    Raises:
        BadImage: Whatever `inspect` raises, and `data.truncated`, `data.damaged`,
            `data.bit_range`, `data.nonfinite`.
    """
    with _strict_pillow:
        kind, picture = _open(data, place, spec)
        try:
            if kind == "JPEG":
                _draft(picture, short_side)
            picture.load()
            return _upright(picture, _rgb_in_bounds(picture, place, spec))
        except BadImage:
            raise
        except Exception as error:  # a damaged file may raise anything from inside Pillow
            raise _undecodable(kind, data, place, error) from None


def peak(data: bytes, place: object, spec: DecodeSpec) -> int | None:
    """The largest stored value of a 16-bit picture, `None` for all others.

    A data set whose peak stays below a quarter of the range comes from a 10 or 12-bit camera and
    turns out nearly black; the scan then recommends `data.bit_range`.

    Raises:
        BadImage: As `decode`.
    """
    with _strict_pillow:
        kind, picture = _open(data, place, spec)
        if not picture.mode.startswith("I;16"):
            return None
        try:
            return int(max(_pixels(strip).max() for strip in _strips(picture, 1)))
        except Exception as error:
            raise _undecodable(kind, data, place, error) from None


# ---- opening ------------------------------------------------------------------------------------


class _StrictPillow:
    """Holds Pillow's global switches at their safe values while any thread decodes.

    `LOAD_TRUNCATED_IMAGES` (which other packages set for the whole process) would hide damage, and
    Pillow's warnings about odd metadata would reach the user once per worker. The first thread in
    saves, the last one out restores: `warnings.catch_warnings` alone is not safe among threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._load_truncated = False
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._load_truncated = ImageFile.LOAD_TRUNCATED_IMAGES
                ImageFile.LOAD_TRUNCATED_IMAGES = False
                self._warnings = warnings.catch_warnings()
                self._warnings.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._load_truncated
                self._warnings.__exit__(None, None, None)


_strict_pillow = _StrictPillow()


def _open(data: bytes, place: object, spec: DecodeSpec) -> tuple[str, ImageFile.ImageFile]:
    """Format by content, plugin, and every check that the header allows."""
    kind = _kind(data, place)
    if kind == "WEBP":  # its plugin allocates the canvas at once, so the size is read before
        _check_shape(*_webp_size(data), place, spec)
    try:
        picture = PLUGINS[kind](io.BytesIO(data))
    except Exception as error:
        raise _undecodable(kind, data, place, error) from None
    _check_shape(*picture.size, place, spec)
    if spec.frames == "error" and _frames(picture) > 1:
        fix = "keep one frame of it, or set data.frames: first"
        raise _bad("data.frames", place, f"{kind} with more than 1 frame", fix)
    if "progressive" in picture.info:
        _check_scans(data, place)
    return kind, picture


def _kind(data: bytes, place: object) -> str:
    """The format, by the first bytes."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data.startswith(b"BM") and len(data) >= 18:
        return "BMP"
    raise _foreign(data, place)


def _foreign(data: bytes, place: object) -> BadImage:
    """Says what the bytes are instead."""
    if not data:
        return _bad("data.empty", place, "0 bytes", COPY_AGAIN)
    for pattern, name, tool in FOREIGN:
        if re.match(pattern, data, re.DOTALL):
            return _bad("data.format", place, f"{name} file; {READS}", f"convert it, with {tool}")
    start = escape(data[:24].decode("latin-1"))
    names = (name for pattern, name in STRANGERS if re.match(pattern, data[:512], re.DOTALL))
    name = next(names, "damaged from its first byte")
    text = f"{len(data):,} bytes that start with '{start}' ({name}?); {READS}"
    return _bad("data.not_image", place, text, "replace or remove the file")


def _check_shape(width: int, height: int, place: object, spec: DecodeSpec) -> None:
    pixels, long, short = width * height, max(width, height), min(width, height)
    size = f"{width}x{height}"
    if short < 1:
        raise _bad("data.damaged", place, f"{size} pixels in its header", COPY_AGAIN)
    if pixels > spec.max_pixels:
        text = f"{size} = {pixels / 1e6:,.0f} MP > max_pixels {spec.max_pixels / 1e6:,.0f} MP"
        raise _bad("data.too_large", place, text, "make it smaller, or raise data.max_pixels")
    if long > spec.max_aspect * short:
        text = f"{size} has aspect {long / short:,.0f} > max_aspect {spec.max_aspect:,.0f}"
        raise _bad("data.too_long", place, text, "crop it, or raise data.max_aspect")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of a WebP's first chunk; (1, 1) where the plugin will refuse it anyway."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        sides = (int.from_bytes(data[i : i + 2], "little") & 0x3FFF for i in (26, 28))
        width, height = sides
        return max(width, 1), max(height, 1)
    return 1, 1


def _check_scans(data: bytes, place: object) -> None:
    """A progressive JPEG costs its full size once per scan, and a scan may take 10 bytes."""
    scans = len(re.findall(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]", data))
    if scans > MAX_SCANS:
        text = f"progressive JPEG with {scans:,} scans > {MAX_SCANS}"
        raise _bad("data.too_large", place, text, "save it again as a plain JPEG")


def _frames(picture: ImageFile.ImageFile) -> int:
    try:
        return 2 if getattr(picture, "is_animated", False) else 1
    except Exception:  # a damaged second frame does not harm the first
        return 1


def _header(kind: str, picture: ImageFile.ImageFile) -> Header:
    mode = picture.mode
    bits = {"1": 1, "I": 32, "F": 32}.get(mode, 16 if mode.startswith("I;16") else 8)
    if kind == "TIFF":  # Pillow turns TIFFs while it loads them
        orientation = picture.tag_v2.get(ExifTags.Base.Orientation, 1)  # type: ignore[attr-defined]
    else:
        orientation = _orientation(picture)
    has_alpha = mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info
    has_icc = bool(picture.info.get("icc_profile"))
    frames = _frames(picture)
    return Header(kind, mode, *picture.size, frames, int(orientation), has_icc, has_alpha, bits)


# ---- pixels -------------------------------------------------------------------------------------


def _draft(picture: ImageFile.ImageFile, short_side: int | None) -> None:
    """Asks libjpeg for a smaller scale where the picture is large or only a small one is wanted."""
    width, height = picture.size
    factor = _factor(width * height)
    if short_side is not None:
        factor = max(factor, min(width, height) // (2 * short_side))
    if factor > 1:
        picture.draft(None, (max(1, width // factor), max(1, height // factor)))


def _factor(pixels: int) -> int:
    """By how much a large picture is reduced on each side; 1 for all ordinary ones."""
    return math.ceil(math.sqrt(pixels / REDUCED)) if pixels > LARGE else 1


def _rgb_in_bounds(picture: Image.Image, place: object, spec: DecodeSpec) -> Image.Image:
    """RGB of the whole picture; strip by strip with reduction where it is large."""
    if picture.mode in ("I", "F"):
        _check_values(picture, place, spec)
    factor = _factor(picture.width * picture.height)
    if factor == 1:
        return _rgb(picture, spec)
    size = math.ceil(picture.width / factor), math.ceil(picture.height / factor)
    canvas = Image.new("RGB", size)
    top = 0
    for strip in _strips(picture, factor):
        part = _rgb(strip, spec).reduce(factor)
        canvas.paste(part, (0, top))
        top += part.height
    return canvas


def _strips(picture: Image.Image, factor: int) -> Iterator[Image.Image]:
    """Slices of about 1 million pixels, in whole multiples of `factor` rows (but the last)."""
    rows = factor * max(1, 2**20 // (picture.width * factor))
    for top in range(0, picture.height, rows):
        yield picture.crop((0, top, picture.width, min(top + rows, picture.height)))


def _rgb(picture: Image.Image, spec: DecodeSpec) -> Image.Image:
    """8-bit RGB: values scaled, profile applied, alpha laid on the background."""
    if picture.mode.startswith("I") or picture.mode == "F":
        return _scaled(picture, spec)
    if spec.icc == "to_srgb" and picture.info.get("icc_profile"):
        picture = _to_srgb(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")  # as Pillow converts, CMYK and YCCK too
    clear = picture if picture.mode == "RGBA" else picture.convert("RGBA")
    canvas = Image.new("RGB", picture.size, spec.background)
    canvas.paste(clear, mask=clear.getchannel("A"))
    return canvas


def _scaled(picture: Image.Image, spec: DecodeSpec) -> Image.Image:
    """Pictures of 16 and 32 bits, scaled to 0..255 (Pillow would clip most of them to white)."""
    values = _pixels(picture)  # [H, W]
    low, high = spec.bit_range or ((0.0, 1.0) if picture.mode == "F" else (0.0, 65535.0))
    scaled = (values.astype(np.float32) - low) * (255.0 / (high - low))
    grey = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _pixels(picture: Image.Image) -> np.ndarray:
    """[H, W] in the stored type."""
    return np.asarray(picture)


def _check_values(picture: Image.Image, place: object, spec: DecodeSpec) -> None:
    """32-bit pictures: all finite, and in a range that we know or were told."""
    low, high, nonfinite = math.inf, -math.inf, 0
    for strip in _strips(picture, 1):
        values = _pixels(strip)
        finite = values[np.isfinite(values)]
        nonfinite += values.size - finite.size
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if nonfinite:
        text = f"{nonfinite:,} of {picture.width * picture.height:,} pixels are NaN or infinite"
        raise _bad("data.nonfinite", place, text, "fill these pixels before use")
    if spec.bit_range is None and (picture.mode == "I" or low < 0 or high > 1):
        kind = "float" if picture.mode == "F" else "32-bit integer"
        text = f"{kind} pixels in [{low:g}, {high:g}]; only floats in [0, 1] explain themselves"
        raise _bad("data.bit_range", place, text, f"set data.bit_range: [{low:g}, {high:g}]")


def _to_srgb(picture: Image.Image) -> Image.Image:
    """Converts by the embedded profile; a broken or foreign profile is ignored."""
    from PIL import ImageCms

    if picture.mode == "P":
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    target = "RGBA" if picture.mode == "RGBA" else "RGB"
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
        srgb = ImageCms.createProfile("sRGB")
        turned = ImageCms.profileToProfile(picture, profile, srgb, outputMode=target)
    except Exception:
        return picture
    return picture if turned is None else turned


def _orientation(picture: ImageFile.ImageFile) -> int:
    """EXIF orientation 1..8; 0 where it cannot be read."""
    marks = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
    if not any(mark in picture.info for mark in marks):
        return 1
    try:
        # The base class's method: PNG's own would decode the picture in search of late chunks.
        value = Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 0
    return value if value in range(1, 9) else 0


def _upright(source: ImageFile.ImageFile, picture: Image.Image) -> Image.Image:
    """Turned as EXIF asks (a TIFF was turned by Pillow on loading)."""
    turn = None if source.format == "TIFF" else TURNS.get(_orientation(source))
    return picture if turn is None else picture.transpose(turn)


# ---- faults -------------------------------------------------------------------------------------


def _bad(id: str, place: object, text: str, fix: str) -> BadImage:
    return BadImage([Fault(id, str(place), text, fix)])


def _undecodable(kind: str, data: bytes, place: object, error: Exception) -> BadImage:
    """Pillow's complaint in our words; what it says is kept, where it says anything."""
    said = str(error).strip() or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return _bad("data.too_large", place, f"{kind}: {said}", "make the picture smaller")
    if isinstance(error, MemoryError):
        return _bad("data.too_large", place, f"{kind} does not fit in memory", "make it smaller")
    if left := re.search(r"\((\d+) bytes not processed\)", said):
        text = f"{kind} stops early ({len(data):,} bytes, decoder left {left[1]} unread)"
        return _bad("data.truncated", place, text, COPY_AGAIN)
    if "truncated" in said.lower() or _ends_early(kind, data):
        return _bad(
            "data.truncated", place, f"{kind} stops early ({len(data):,} bytes)", COPY_AGAIN
        )
    return _bad("data.damaged", place, f"{kind} of {len(data):,} bytes: {said}", COPY_AGAIN)


def _ends_early(kind: str, data: bytes) -> bool:
    """Whether the file's own end mark or length is missing."""
    if kind == "PNG":
        return b"IEND" not in data[-64:]
    if kind == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if kind == "BMP":
        return len(data) < int.from_bytes(data[2:6], "little")
    return kind == "JPEG" and b"\xff\xd9" not in data[-64:]


def _require_regular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        if status.st_size > MAX_BYTES:
            text = f"{status.st_size:,} bytes > {MAX_BYTES:,}"
            raise _bad("data.too_large", path, text, "make the picture smaller")
        return
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
    raise _bad("data.not_regular", path, f"{kind}, not a regular file", "remove it from the folder")


def _read_all(file: io.FileIO, size: int) -> bytes:
    """Reads to the end; a file that grows while it is read stops at `MAX_BYTES`."""
    parts = [file.read(size + 1)]
    while parts[-1] and sum(map(len, parts)) <= MAX_BYTES:
        parts.append(file.read(2**20))
    return b"".join(part for part in parts if part)


def _unopenable(path: Path, error: OSError) -> BadImage:
    """The system's refusal in our words."""
    if isinstance(error, PermissionError):
        return _bad("data.permission", path, _permissions(path), "make it readable: chmod u+r")
    if error.errno == errno.ELOOP:
        return _bad("data.broken_link", path, "a link that leads to itself", "remove the link")
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        text = f"broken link -> {path.readlink()}"
        return _bad("data.broken_link", path, text, "restore its target, or remove the link")
    if isinstance(error, FileNotFoundError):
        return _bad("data.missing", path, "no such file", "restore it, or scan the folder again")
    return _bad("data.unreadable", path, f"the system says: {error.strerror}", COPY_AGAIN)


def _permissions(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "a folder above it may not be entered"
    return f"not readable: owner uid {status.st_uid}, mode {stat.filemode(status.st_mode)}"
