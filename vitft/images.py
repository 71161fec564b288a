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

import io
import json
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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

from vitft.errors import MachineError
from vitft.raw import COPY_AGAIN, bad, kind_of, undecodable
from vitft.raw import BadImage as BadImage
from vitft.raw import read_bytes as read_bytes
from vitft.resize import Picture, Pixels, as_image

LARGE = 32_000_000  # pixels; a larger picture is reduced while it is converted, to bound memory
REDUCED = 8_000_000  # pixels that a large picture keeps at most (a JPEG twice that)
STRIP = 2**20  # pixels that are converted at a time
MAX_SCANNED = 1_000_000_000  # pixels times scans of a progressive JPEG; encoders write 10 scans
WEBP_COPIES = 4  # of all pixels that the WEBP plugin holds at once, where others hold one
HARMLESS = re.compile(
    "color conversion|subsampling type|JFIF revision|Adobe color transform|ICC marker|arithmetic"
)  # what the deep check may meet in JPEGs whose pixels are whole
TINY = 10  # pixels; a shorter side deserves a warning

PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
        decoder: `pillow`, or `fast`: JPEGs by simplejpeg, to the same pixels where both stand on
            libjpeg-turbo; what it does not take as it is remains Pillow's.
    """

    max_pixels: int = 64_000_000
    max_aspect: float = 200.0
    background: tuple[int, int, int] = (255, 255, 255)
    bit_range: tuple[float, float] | None = None
    icc: str = "ignore"
    frames: str = "first"
    decoder: str = "pillow"

    def key(self) -> str:
        """Canonical JSON of all that can change a pixel; the reference goes without saying."""
        fields = asdict(self)
        if self.decoder == "pillow":
            del fields["decoder"]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))


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

    A picture above 32 million pixels comes back reduced by a whole factor to between 7 and 16
    million, so that memory stays bounded by its one stored copy: under 300 MB for any file within
    the default bounds.

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
        MachineError: `env.package`: the decoder asked for is not installed.
    """
    return as_image(decoded(data, place, spec, short_side=short_side))


def decoded(
    data: bytes, place: object, spec: DecodeSpec, *, short_side: int | None = None
) -> Picture:
    """As `decode`, but an array uint8 [H, W, 3] where the decoder makes one."""
    with _strict_pillow:
        kind, picture = _open(data, place, spec)
        try:
            if kind == "JPEG":
                if spec.decoder == "fast" and short_side is None and _is_simple(picture, spec):
                    pixels = _by_simplejpeg(data)
                    if pixels is not None:
                        return pixels
                _draft(picture, short_side)
            picture.load()
            # A TIFF was turned by Pillow on loading.
            turn = None if kind == "TIFF" else TURNS.get(_orientation(picture))
            rgb = _rgb_in_bounds(picture, place, spec)
            del picture  # its pixels go before the turned copy comes
            return rgb if turn is None else rgb.transpose(turn)
        except (BadImage, MachineError):
            raise
        except Exception as error:  # a damaged file may raise anything from inside Pillow
            raise undecodable(kind, data, place, error) from None


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
            raise undecodable(kind, data, place, error) from None


def deep_warnings(data: bytes) -> str | None:
    """What libjpeg silently repaired in a JPEG, None for a whole one and for all other formats.

    Pillow hides these warnings. The check reads every coefficient but computes an eighth of the
    picture only, so it costs less than a decode; the other formats carry checksums or nothing.

    Raises:
        MachineError: `env.package`: simplejpeg, which hands the warnings on, is not installed.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    decoder = _simplejpeg("check", "the deep check of JPEGs")
    try:
        decoder(data, min_factor=8, strict=True)
    except ValueError as warning:
        return None if HARMLESS.search(str(warning)) else str(warning)
    return None


def _simplejpeg(place: str, what: str) -> Callable[..., Pixels]:
    """Its decoder, which stands on libjpeg-turbo as Pillow's wheels do, and tells what it mends."""
    try:
        from simplejpeg import decode_jpeg  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        text = f"{what} needs the package simplejpeg"
        raise MachineError.of("env.package", place, text, "pip install simplejpeg") from None
    decoder: Callable[..., Pixels] = decode_jpeg
    return decoder


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
    kind = kind_of(data, place)
    if kind == "WEBP":  # its plugin allocates the canvas at once, so the size is read before
        _check_shape(*_webp_size(data), place, spec, copies=WEBP_COPIES)
    try:
        picture = PLUGINS[kind](io.BytesIO(data))
    except Exception as error:
        raise undecodable(kind, data, place, error) from None
    _check_shape(*picture.size, place, spec)
    if spec.frames == "error" and _frames(picture) > 1:
        fix = "keep one frame of it, or set data.frames: first"
        raise bad("data.frames", place, f"{kind} with more than 1 frame", fix)
    if "progressive" in picture.info:
        _check_scans(data, picture.width * picture.height, place)
    return kind, picture


def _check_shape(
    width: int, height: int, place: object, spec: DecodeSpec, *, copies: int = 1
) -> None:
    """Bounds on pixels (each copy counted) and aspect."""
    pixels, long, short = width * height, max(width, height), min(width, height)
    size = f"{width}x{height}"
    if short < 1:
        raise bad("data.damaged", place, f"{size} pixels in its header", COPY_AGAIN)
    if pixels * copies > spec.max_pixels:
        text = f"{size} = {pixels / 1e6:,.0f} MP > max_pixels {spec.max_pixels / 1e6:,.0f} MP"
        if copies > 1:
            text += f" / {copies}, as its decoder holds {copies} copies"
        raise bad("data.too_large", place, text, "make it smaller, or raise data.max_pixels")
    if long > spec.max_aspect * short:
        text = f"{size} has aspect {long / short:,.0f} > max_aspect {spec.max_aspect:,.0f}"
        raise bad("data.too_long", place, text, "crop it, or raise data.max_aspect")


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


def _check_scans(data: bytes, pixels: int, place: object) -> None:
    """A progressive JPEG costs its full size once per scan, and a scan may take 10 bytes."""
    scans = len(re.findall(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]", data))
    if scans * pixels > MAX_SCANNED:
        text = f"{pixels / 1e6:,.1f} MP in {scans:,} scans > {MAX_SCANNED / 1e6:,.0f} MP to decode"
        raise bad("data.too_large", place, text, "save it again as a plain JPEG")


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


def _is_simple(picture: ImageFile.ImageFile, spec: DecodeSpec) -> bool:
    """Upright grey or colour of ordinary size, whose profile, if any, is ignored."""
    return (
        picture.mode in ("L", "RGB")
        and _factor(picture.width * picture.height) == 1
        and (spec.icc == "ignore" or not picture.info.get("icc_profile"))
        and _orientation(picture) not in TURNS
    )


def _by_simplejpeg(data: bytes) -> Pixels | None:
    """RGB [H, W, 3]; None for a file with any fault, which Pillow shall judge."""
    decoder = _simplejpeg("data.decoder", "data.decoder: fast")
    try:
        return decoder(data, colorspace="RGB")
    except ValueError:
        return None


def _factor(pixels: int) -> int:
    """By how much a large picture is reduced on each side; 1 for all ordinary ones."""
    return math.ceil(math.sqrt(pixels / REDUCED)) if pixels > LARGE else 1


def _rgb_in_bounds(picture: Image.Image, place: object, spec: DecodeSpec) -> Image.Image:
    """RGB of the whole picture, strip by strip: only the result is held beside the source."""
    if picture.mode in ("I", "F"):
        _check_values(picture, place, spec)
    factor = _factor(picture.width * picture.height)
    if factor == 1 and picture.width * picture.height <= STRIP:
        return _rgb(picture, spec)
    size = math.ceil(picture.width / factor), math.ceil(picture.height / factor)
    canvas = Image.new("RGB", size)
    top = 0
    for strip in _strips(picture, factor):
        part = _rgb(strip, spec)
        part = part if factor == 1 else part.reduce(factor)
        canvas.paste(part, (0, top))
        top += part.height
    return canvas


def _strips(picture: Image.Image, factor: int) -> Iterator[Image.Image]:
    """Slices of about `STRIP` pixels, in whole multiples of `factor` rows (but the last)."""
    rows = factor * max(1, STRIP // (picture.width * factor))
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
        raise bad("data.nonfinite", place, text, "fill these pixels before use")
    if spec.bit_range is None and (picture.mode == "I" or low < 0 or high > 1):
        kind = "float" if picture.mode == "F" else "32-bit integer"
        text = f"{kind} pixels in [{low:g}, {high:g}]; only floats in [0, 1] explain themselves"
        raise bad("data.bit_range", place, text, f"set data.bit_range: [{low:g}, {high:g}]")


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
        value = Image.Image.getexif(picture).get(ExifTags.Base.Orientation)
    except Exception:
        return 0
    exif = picture.info.get("exif", b"").removeprefix(b"Exif\0\0")
    if value is None:
        return 1 if not exif or exif.startswith((b"II", b"MM")) else 0
    return value if value in range(1, 9) else 0
