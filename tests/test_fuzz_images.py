"""Mutated images come out decoded or as `BadImage`, never as anything else, in bounded time."""

import io
import random
import resource
import time

import numpy as np
import pytest
from PIL import Image, ImageCms

from vitft import images
from vitft.images import BadImage, DecodeSpec, decode, inspect, peak

SPECS = (
    DecodeSpec(),
    DecodeSpec(icc="to_srgb", background=(0, 0, 0), bit_range=(0, 4095)),
    DecodeSpec(frames="error", max_pixels=10_000),
)
IDS = {
    "data.bit_range",
    "data.damaged",
    "data.empty",
    "data.format",
    "data.frames",
    "data.nonfinite",
    "data.not_image",
    "data.too_large",
    "data.too_long",
    "data.truncated",
}


def encode(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def corpus():
    return make_corpus()


def make_corpus():
    """27 files that reach every branch of the decoder."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (9, 11, 4), dtype=np.uint8), "RGBA")
    clear = noise.resize((110, 90), Image.Resampling.BICUBIC)
    rgb, small = clear.convert("RGB"), clear.convert("RGB").resize((40, 30))
    sixteen = Image.fromarray(rng.integers(0, 65536, (30, 40), dtype=np.uint16))
    floats = Image.fromarray(rng.random((30, 40), dtype=np.float32))
    exif = Image.Exif()
    exif[0x112] = 6
    exif[0x10E] = "a description"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    frames = {"save_all": True, "append_images": [small.rotate(180)]}
    return [
        encode(rgb, "JPEG"),
        encode(rgb, "JPEG", progressive=True, exif=exif, icc_profile=profile),
        encode(rgb, "JPEG", restart_marker_rows=1, subsampling="4:4:4"),
        encode(rgb.convert("CMYK"), "JPEG"),
        encode(rgb.convert("L"), "JPEG", comment=b"hello"),
        encode(small, "MPO", **frames),
        encode(rgb, "PNG", exif=exif, icc_profile=profile),
        encode(clear, "PNG"),
        encode(rgb.convert("P"), "PNG", transparency=3),
        encode(rgb.convert("1"), "PNG"),
        encode(rgb.convert("LA"), "PNG"),
        encode(sixteen, "PNG"),
        encode(small, "PNG", **frames),
        encode(small.convert("P"), "GIF", transparency=3),
        encode(small, "GIF", **frames),
        encode(rgb, "WEBP"),
        encode(clear, "WEBP", lossless=True, exif=exif, icc_profile=profile),
        encode(small, "WEBP", **frames),
        encode(rgb, "BMP"),
        encode(rgb.convert("P"), "BMP"),
        encode(rgb.convert("1"), "BMP"),
        encode(clear, "TIFF", compression="tiff_lzw", exif=exif),
        encode(rgb, "TIFF", compression="packbits"),
        encode(sixteen, "TIFF", compression="tiff_deflate"),
        encode(floats, "TIFF"),
        encode(rgb.convert("CMYK"), "TIFF"),
        encode(Image.new("RGB", (20, 20)), "TIFF", save_all=True, append_images=[small]),
    ]


def mutate(data, rng):
    """One file, one to four wounds: flipped bytes, a cut, a zeroed or doubled piece, a graft."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(out) or 1), rng.randint(1, 64)
        # headers steer the decoder, so half of all wounds fall there
        at = at if rng.random() < 0.5 else min(at, rng.randrange(1, 200))
        wound = rng.choice(("flip", "flip", "byte", "cut", "zero", "double", "extreme", "move"))
        piece = bytes(out[at : at + length])
        if wound == "flip" and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif wound == "byte":
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif wound == "cut":
            del out[rng.randrange(len(out) or 1) :]
        elif wound == "zero":
            out[at : at + length] = bytes(len(piece))
        elif wound == "double":
            out[at:at] = piece * rng.randint(1, 40)
        elif wound == "extreme":
            word = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
            out[at : at + 4] = word[: len(piece[:4])]
        elif wound == "move":
            out[at : at + length] = bytes(out[-length:])
    return bytes(out)


def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def try_all(data, spec):
    """Everything that reads a stranger's bytes; the ids of what was refused."""
    refused = set()
    for reader in (inspect, decode, peak):
        try:
            out = reader(data, "fuzz.jpg", spec)
        except BadImage as error:
            (fault,) = error.faults
            refused.add(fault.id)
        else:
            if reader is decode:
                assert out.mode == "RGB"
                assert out.width * out.height <= spec.max_pixels
                assert np.asarray(out).dtype == np.uint8
    return refused


def fuzz(corpus, count, seed):
    base, slowest, seen, decoded = megabytes(), 0.0, set(), 0
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        data = mutate(rng.choice(corpus), rng)
        if rng.random() < 0.1:
            data = mutate(data[: len(data) // 2] + rng.choice(corpus)[-200:], rng)
        started = time.process_time()
        try:
            refused = try_all(data, rng.choice(SPECS))
        except Exception as error:
            raise AssertionError(f"case {seed} {i}: {data[:40]!r}... {len(data)} bytes") from error
        slowest = max(slowest, time.process_time() - started)
        seen |= refused
        decoded += not refused
    assert seen <= IDS
    assert 0.1 < decoded / count < 0.9  # neither all harmless nor all destroyed
    assert {"data.truncated", "data.damaged", "data.not_image"} <= seen
    assert slowest < 2
    assert megabytes() - base < 300


def test_the_corpus_itself_decodes(corpus):
    for data in corpus:
        assert decode(data, "x", DecodeSpec()).mode == "RGB"


def test_1000_mutated_images_are_decoded_or_refused(corpus):
    fuzz(corpus, 1000, "short")


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(10))
def test_2000_mutated_images_are_decoded_or_refused(corpus, seed):
    fuzz(corpus, 2000, f"long {seed}")


def test_random_bytes_behind_every_magic_number_are_refused():
    rng = random.Random(0)
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
    starts += (b"RIFF\x64\0\0\0WEBPVP8 ", b"RIFF\x64\0\0\0WEBPVP8L", b"RIFF\x64\0\0\0WEBPVP8X", b"")
    for start in starts:
        for _ in range(15):
            try_all(start + rng.randbytes(rng.randint(0, 400)), rng.choice(SPECS))


def test_the_deep_check_never_fails_on_mutated_jpegs(corpus):
    pytest.importorskip("simplejpeg", reason="the deep check needs it")
    rng = random.Random(0)
    said = [images.deep_warnings(mutate(rng.choice(corpus[:6]), rng)) for _ in range(150)]
    assert any(said)
    assert all(text is None or text.isprintable() for text in said)
