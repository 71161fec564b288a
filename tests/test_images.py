"""The guarded decoder: Pillow's pixels for good files, one named fault for all others.

The rows I1 ... I36 are those of the project's table of bad inputs.
"""

import hashlib
import io
import json
import os
import socket
import struct
import subprocess
import sys
import time
import unicodedata
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps

from vitft import images
from vitft.errors import MachineError
from vitft.images import BadImage, DecodeSpec, decode, inspect, peak, read_bytes

SPEC = DecodeSpec()


# ---- material -----------------------------------------------------------------------------------


def photo(width=120, height=80, seed=0, mode="RGB"):
    """Smooth colours with some noise, which every format keeps recognisable."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([255 * x / width, 255 * y / height, 255 - 255 * x / width], 2)
    rgb = np.clip(rgb + rng.normal(0, 8, rgb.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


def encode(picture, kind="JPEG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(picture):
    return np.asarray(picture).astype(int)


def png_header_bomb(width, height, bits=1):
    """A whole, valid, black, grey PNG of any size, compressed row by row."""
    packer, row = zlib.compressobj(9), bytes(1 + (width * bits + 7) // 8)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", body), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        for name, part in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tree_hash(folder):
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(os.fsencode(p) + p.read_bytes() for p in paths)).hexdigest()


@pytest.fixture
def refused(tmp_path):
    """Puts bytes into a data folder, decodes the file, hands back the text of the refusal."""

    def check(data, id, name="cat/0012.jpg", spec=SPEC):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        before = tree_hash(tmp_path / "data")
        with pytest.raises(BadImage) as caught:
            decode(read_bytes(path), path, spec)
        assert tree_hash(tmp_path / "data") == before
        assert caught.value.exit_code == 3
        (fault,) = caught.value.faults
        assert fault.id == id
        text = str(caught.value)
        assert text.startswith(f"error[{id}] {path}: ")
        assert "\nfix: " in text
        return text

    return check


# ---- good files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:2:0"}])
def test_a_jpeg_has_exactly_pillows_pixels(mode, options):
    data = encode(photo(mode=mode), **options)
    want = Image.open(io.BytesIO(data)).convert("RGB")
    got = decode(data, "x", SPEC)
    assert type(got) is Image.Image
    assert got.mode == "RGB"
    assert np.array_equal(pixels(got), pixels(want))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_lossless_formats_and_opaque_modes_have_exactly_pillows_pixels(kind, mode):
    data = encode(photo(mode=mode), kind)
    want = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(pixels(decode(data, "x", SPEC)), pixels(want))


def test_real_photographs_have_exactly_pillows_pixels(flowers):
    for path in sorted(flowers.glob("*/*.jpg"))[::173]:
        want = pixels(Image.open(path).convert("RGB"))
        assert np.array_equal(pixels(decode(read_bytes(path), path, SPEC)), want)


def test_the_fast_decoder_has_pillows_pixels_for_every_kind_of_jpeg():
    pytest.importorskip("simplejpeg", reason="the fast decoder needs it")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [{"subsampling": s, "quality": q} for s in (0, 1, 2) for q in (5, 50, 95)]
    kinds += [{"progressive": True}, {"restart_marker_rows": 1}, {"keep_rgb": True}]
    kinds += [{"exif": exif}, {"icc_profile": profile}]
    modes = [(width, mode) for width in (1, 7, 16, 121) for mode in ("RGB", "L", "CMYK")]
    files = [
        encode(photo(width, 83, mode=mode), **options)
        for options in kinds
        for width, mode in modes
        if mode == "RGB" or not {"keep_rgb", "subsampling"} & set(options)
    ]
    arrays = 0
    for icc in ("ignore", "to_srgb"):
        fast = DecodeSpec(decoder="fast", icc=icc)
        for data in files:
            found = images.decoded(data, "x", fast)
            arrays += isinstance(found, np.ndarray)
            want = decode(data, "x", DecodeSpec(icc=icc))
            np.testing.assert_array_equal(np.asarray(found), np.asarray(want))
            assert decode(data, "x", fast).mode == "RGB"
    assert arrays > len(files)  # of twice as many


def test_the_fast_decoder_has_pillows_pixels_for_real_photographs(flowers):
    pytest.importorskip("simplejpeg", reason="the fast decoder needs it")
    for path in sorted(flowers.glob("*/*.jpg"))[::60]:
        found = images.decoded(read_bytes(path), path, DecodeSpec(decoder="fast"))
        assert isinstance(found, np.ndarray)
        assert np.array_equal(found, pixels(decode(read_bytes(path), path, SPEC)))


def test_the_fast_decoder_leaves_every_fault_to_pillow(refused):
    pytest.importorskip("simplejpeg", reason="the fast decoder needs it")
    data, fast = encode(photo(400, 300)), DecodeSpec(decoder="fast")
    for broken, id in (
        (data[: len(data) // 2], "data.truncated"),
        (data[:-2], "data.truncated"),
        (data[:700], "data.truncated"),
    ):
        assert refused(broken, id, spec=fast) == refused(broken, id)
    mended = data[: len(data) // 2] + b"\xff\xd9"  # Pillow sees nothing
    want = np.asarray(decode(mended, "x", SPEC))
    np.testing.assert_array_equal(np.asarray(decode(mended, "x", fast)), want)


def test_a_decoder_that_is_not_installed_is_no_fault_of_the_photograph(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(MachineError, match="data.decoder: fast needs the package simplejpeg"):
        decode(encode(photo()), "x", DecodeSpec(decoder="fast"))
    decode(encode(photo(), "PNG"), "x", DecodeSpec(decoder="fast"))


def test_a_two_picture_jpeg_is_a_jpeg_and_its_first_picture_counts():
    first, second = photo(seed=1), photo(seed=2)
    buffer = io.BytesIO()
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    data = buffer.getvalue()
    assert Image.open(io.BytesIO(data)).format == "MPO"
    header = inspect(data, "x", DecodeSpec(frames="error"))
    assert (header.format, header.frames) == ("JPEG", 1)
    assert np.array_equal(
        pixels(decode(data, "x", SPEC)), pixels(Image.open(buffer).convert("RGB"))
    )


def test_the_header_says_what_the_file_holds():
    exif = Image.Exif()
    exif[0x112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encode(photo(mode="RGBA"), "PNG", exif=exif, icc_profile=profile)
    want = images.Header("PNG", "RGBA", 120, 80, 1, 6, True, True, 8)
    assert inspect(data, "x", SPEC) == want


def test_a_header_costs_under_a_millisecond():
    data = encode(photo(800, 600))
    best = min(_seconds(lambda: inspect(data, "x", SPEC)) for _ in range(20))
    assert best < 1e-3


def _seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def test_a_spec_has_one_key_and_every_field_changes_it():
    changes = {
        "max_pixels": 1,
        "max_aspect": 2.0,
        "background": (0, 0, 0),
        "bit_range": (0.0, 4095.0),
        "icc": "to_srgb",
        "frames": "error",
        "decoder": "fast",
    }
    keys = {DecodeSpec(**{name: value}).key() for name, value in changes.items()}
    assert set(changes) - {"decoder"} == set(json.loads(SPEC.key()))  # as keys were before it
    assert len(keys | {SPEC.key()}) == 8
    assert SPEC.key() == (
        '{"background":[255,255,255],"bit_range":null,"frames":"first","icc":"ignore",'
        '"max_aspect":200.0,"max_pixels":64000000}'
    )


def test_a_short_side_lets_a_jpeg_shrink_while_it_decodes_but_never_below_twice_that():
    data = encode(photo(1000, 800))
    assert decode(data, "x", SPEC).size == (1000, 800)
    assert decode(data, "x", SPEC, short_side=160).size == (500, 400)
    assert decode(data, "x", SPEC, short_side=401).size == (1000, 800)
    assert decode(encode(photo(1000, 800), "PNG"), "x", SPEC, short_side=50).size == (1000, 800)


def test_a_large_picture_comes_back_reduced_like_pillow_reduces(monkeypatch):
    monkeypatch.setattr(images, "LARGE", 32_000)
    monkeypatch.setattr(images, "REDUCED", 8_000)
    monkeypatch.setattr(images, "STRIP", 1_000)
    big = photo(250, 131)
    for mode in ("RGB", "L", "P", "1"):
        got = decode(encode(big.convert(mode), "PNG"), "x", SPEC)
        want = big.convert(mode).convert("RGB").reduce(3)
        assert got.size == (84, 44)
        assert np.array_equal(pixels(got), pixels(want))
    assert decode(encode(big), "x", SPEC).size == (125, 66)  # by libjpeg, at half scale


def test_converting_strip_by_strip_changes_no_pixel(monkeypatch):
    exif = Image.Exif()
    exif[0x112] = 6
    data = encode(photo(mode="RGBA"), "PNG", exif=exif)
    whole = pixels(decode(data, "x", SPEC))
    monkeypatch.setattr(images, "STRIP", 1_000)
    assert np.array_equal(pixels(decode(data, "x", SPEC)), whole)


# ---- reading ------------------------------------------------------------------------------------


def test_a_fifo_is_refused_at_once_and_so_is_one_that_takes_a_files_place(tmp_path, monkeypatch):
    fifo = tmp_path / "x.jpg"
    os.mkfifo(fifo)
    with pytest.raises(BadImage, match=r"error\[data.not_regular\] .*x.jpg: a pipe, not a regular"):
        read_bytes(fifo)
    file = tmp_path / "y.jpg"
    file.write_bytes(b"1")
    regular = file.stat()
    monkeypatch.setattr(Path, "stat", lambda self: regular)  # what was true a moment ago
    with pytest.raises(BadImage, match=r"data.not_regular"):
        read_bytes(fifo)


def test_sockets_folders_and_devices_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.jpg")
        for place, what in (("s.jpg", "a socket"), (".", "a folder"), ("/dev/zero", "a device")):
            with pytest.raises(BadImage, match=rf"data.not_regular.*{what}"):
                read_bytes(Path(place))


def test_broken_and_circular_links_say_where_they_lead(tmp_path):
    (tmp_path / "a.jpg").symlink_to("/nope.jpg")
    with pytest.raises(BadImage, match=r"data.broken_link\] .*a.jpg: broken link -> /nope.jpg"):
        read_bytes(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to("b.jpg")
    with pytest.raises(BadImage, match=r"data.broken_link\] .*b.jpg: a link that leads to itself"):
        read_bytes(tmp_path / "b.jpg")


def test_a_file_that_vanished_and_one_the_disk_cannot_read_are_told_apart(tmp_path, monkeypatch):
    with pytest.raises(BadImage, match=r"data.missing\] .*gone.jpg: no such file"):
        read_bytes(tmp_path / "gone.jpg")
    (tmp_path / "x.jpg").write_bytes(b"1")
    monkeypatch.setattr(os, "open", _raiser(OSError(5, "Input/output error")))
    with pytest.raises(BadImage, match=r"data.unreadable\] .*x.jpg: .* Input/output error"):
        read_bytes(tmp_path / "x.jpg")


def _raiser(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_a_file_too_large_for_a_photograph_is_not_read(tmp_path):
    path = tmp_path / "x.jpg"
    with path.open("wb") as file:
        file.truncate(600 * 2**20)  # sparse
    with pytest.raises(BadImage, match=r"data.too_large\] .*629,145,600 bytes > 536,870,912"):
        read_bytes(path)


# ---- the rows -----------------------------------------------------------------------------------


def test_I1_a_truncated_jpeg_is_named_with_its_size_and_what_was_left(refused):
    data = encode(photo(400, 300))
    text = refused(data[: len(data) // 2], "data.truncated")
    assert f"JPEG stops early ({len(data) // 2:,} bytes, decoder left " in text


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_I1_other_formats_cut_in_half_are_refused_too(refused, kind):
    data = encode(photo(400, 300), kind)
    text = refused(data[: len(data) // 2], "data.truncated", name="cat/x." + kind.lower())
    assert f"{len(data) // 2:,} bytes" in text


def test_I2_a_jpeg_cut_and_closed_again_is_found_by_the_deep_check():
    pytest.importorskip("simplejpeg", reason="the deep check needs it")
    data = encode(photo(400, 300))
    damaged = data[: len(data) // 2] + b"\xff\xd9"
    decode(damaged, "x", SPEC)  # Pillow sees nothing
    assert images.deep_warnings(damaged) == "Corrupt JPEG data: premature end of data segment"
    assert images.deep_warnings(data) is None


def test_I3_bit_rot_in_the_scan_is_found_by_the_deep_check_without_false_alarms():
    pytest.importorskip("simplejpeg", reason="the deep check needs it")
    rng = np.random.default_rng(0)
    found = 0
    for seed in range(40):
        data = bytearray(encode(photo(200, 150, seed), progressive=seed % 2 == 0))
        assert images.deep_warnings(bytes(data)) is None
        start = data.rindex(b"\xff\xda") + 14
        for _ in range(32):
            data[rng.integers(start, len(data) - 2)] = rng.integers(256)
        found += images.deep_warnings(bytes(data)) is not None
    assert found >= 34  # 85 %


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_I3_the_deep_check_is_silent_about_whole_jpegs_of_every_kind(mode):
    pytest.importorskip("simplejpeg", reason="the deep check needs it")
    for options in ({}, {"progressive": True}, {"restart_marker_rows": 1}, {"quality": 100}):
        assert images.deep_warnings(encode(photo(mode=mode), **options)) is None
    assert images.deep_warnings(encode(photo(), keep_rgb=True)) is None
    assert images.deep_warnings(encode(photo(), "PNG")) is None


def test_I4_only_the_last_two_bytes_missing_is_said_with_the_number_left(refused):
    data = encode(photo(400, 300))
    text = refused(data[:-2], "data.truncated")
    assert f"JPEG stops early ({len(data) - 2:,} bytes, decoder left " in text


def test_I5_zero_bytes(refused, tmp_path):
    assert "0012.jpg: 0 bytes" in refused(b"", "data.empty")
    with pytest.raises(BadImage, match="data.empty"):
        decode(b"", "x", SPEC)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<html><body>404</body></html>", "'<html><body>404</body></' (a web page?)"),
        (b"\n <!DOCTYPE html><html>", "(a web page?)"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "git-lfs pointer: run `git lfs",
        ),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "(XML?)"),
        (b"<?xml version='1.0'?><svg></svg>", "(an SVG drawing?)"),
        (b'{"error": "rate limit"}', "(JSON?)"),
        (b"PK\x03\x04aaaa", "(an archive?)"),
        (b"\0" * 100, "(damaged from its first byte?)"),
        (b"BM", "2 bytes that start with 'BM'"),
    ],
)
def test_I6_what_is_no_image_is_recognised(refused, data, what):
    text = refused(data, "data.not_image")
    assert what in text
    assert f"{len(data):,} bytes" in text


def test_I7_the_content_decides_not_the_name(tmp_path):
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encode(photo(), "PNG"))
    assert inspect(read_bytes(path), path, SPEC).format == "PNG"
    assert decode(read_bytes(path), path, SPEC).size == (120, 80)


def test_I9_upper_case_names_are_read(tmp_path):
    path = tmp_path / "A.JPG"
    path.write_bytes(encode(photo()))
    assert decode(read_bytes(path), path, SPEC).size == (120, 80)


def test_I10_cmyk_and_ycck_jpegs_are_rgb_as_pillow_converts():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    cmyk = encode(red, quality=100)
    assert np.abs(pixels(decode(cmyk, "x", SPEC)) - [255, 0, 0]).max() <= 2
    marker = cmyk.index(b"Adobe") + 11
    ycck = cmyk[:marker] + b"\x02" + cmyk[marker + 1 :]  # same bytes, other declared colours
    want = pixels(Image.open(io.BytesIO(ycck)).convert("RGB"))
    assert np.array_equal(pixels(decode(ycck, "x", SPEC)), want)
    assert not np.array_equal(want, pixels(decode(cmyk, "x", SPEC)))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_I11_sixteen_bits_are_scaled_not_clipped(kind):
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    data = encode(Image.fromarray(ramp), kind)
    grey = pixels(decode(data, "x", SPEC))[..., 0]
    assert np.array_equal(grey, np.rint(ramp / 257).astype(int))
    assert inspect(data, "x", SPEC).bits == 16
    assert peak(data, "x", SPEC) == 65520


def test_I11_a_twelve_bit_camera_shows_by_its_peak_and_bit_range_mends_it():
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    data = encode(Image.fromarray(ramp), "PNG")
    assert peak(data, "x", SPEC) == 4095
    assert pixels(decode(data, "x", SPEC)).max() == 16
    mended = pixels(decode(data, "x", DecodeSpec(bit_range=(0, 4095))))[..., 0]
    assert np.array_equal(mended, np.rint(ramp / 4095 * 255).astype(int))
    assert peak(encode(photo(), "PNG"), "x", SPEC) is None


def test_I12_floats_from_0_to_1_are_scaled_and_other_ranges_refused_with_their_numbers(refused):
    ramp = np.linspace(0, 1, 4096, dtype=np.float32).reshape(64, 64)
    grey = pixels(decode(encode(Image.fromarray(ramp), "TIFF"), "x", SPEC))[..., 0]
    assert np.array_equal(grey, np.rint(ramp * 255).astype(int))

    wide = encode(Image.fromarray(ramp * 3000 - 1000), "TIFF")
    text = refused(wide, "data.bit_range", name="a.tif")
    assert "float pixels in [-1000, 2000]" in text
    assert "set data.bit_range: [-1000, 2000]" in text
    mended = pixels(decode(wide, "x", DecodeSpec(bit_range=(-1000, 2000))))[..., 0]
    assert np.array_equal(mended, grey)

    integers = encode(Image.fromarray(np.full((8, 8), 70_000, np.int32)), "TIFF")
    assert "32-bit integer pixels in [70000, 70000]" in refused(integers, "data.bit_range")


def test_I12_nan_pixels_are_counted_and_refused(refused):
    values = np.zeros((8, 8), np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    text = refused(encode(Image.fromarray(values), "TIFF"), "data.nonfinite", name="a.tif")
    assert "3 of 64 pixels are NaN or infinite" in text


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 20, 30)])
def test_I13_transparent_pixels_show_the_declared_background(background):
    spec = DecodeSpec(background=background)
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[..., 0] = 200  # the hidden colour
    clear[:4, :, 3] = 255
    clear[4, :, 3] = 51  # a fifth
    for kind in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        got = pixels(decode(encode(Image.fromarray(clear), kind, **options), "x", spec))
        assert (got[:4] == [200, 0, 0]).all()
        mixed = np.asarray([200, 0, 0]) * 0.2 + np.asarray(background) * 0.8
        assert np.abs(got[4] - mixed).max() <= 1
        assert (got[5:] == background).all()


def test_I13_palette_grey_and_colour_key_transparency_are_composited_too():
    grey = np.full((8, 8), 90, np.uint8)
    grey[:4] = 7
    palette = Image.fromarray(grey).convert("P")
    cases = [
        encode(palette, "PNG", transparency=7),
        encode(palette, "GIF", transparency=7),
        encode(Image.fromarray(grey), "PNG", transparency=7),
        encode(Image.fromarray(grey).convert("RGB"), "PNG", transparency=(7, 7, 7)),
        encode(
            Image.merge(
                "LA", [Image.fromarray(grey), Image.fromarray((grey == 90) * np.uint8(255))]
            ),
            "PNG",
        ),
    ]
    for data in cases:
        assert inspect(data, "x", SPEC).has_alpha
        got = pixels(decode(data, "x", SPEC))
        assert (got[:4] == 255).all()
        assert (got[4:] == 90).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_I14_exif_orientation_is_applied_as_pillow_applies_it(kind, turn):
    exif = Image.Exif()
    exif[0x112] = turn
    data = encode(photo(), kind, exif=exif)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    got = decode(data, "x", SPEC)
    assert got.size == ((80, 120) if turn > 4 else (120, 80))
    assert np.array_equal(pixels(got), pixels(want))
    assert inspect(data, "x", SPEC).orientation == turn


def test_I14_unreadable_exif_is_ignored_and_reported_as_0():
    nine = Image.Exif()
    nine[0x112] = 9
    broken = (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", nine.tobytes())
    plain = encode(photo())
    for exif, orientation in zip(broken, (0, 1, 0), strict=True):
        data = encode(photo(), exif=exif)
        assert np.array_equal(pixels(decode(data, "x", SPEC)), pixels(decode(plain, "x", SPEC)))
        assert inspect(data, "x", SPEC).orientation == orientation


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_I15_the_first_frame_counts_or_an_error_is_asked_for(refused, kind):
    first, second = Image.new("RGB", (20, 20), (255, 0, 0)), Image.new("RGB", (20, 20), (0, 255, 0))
    data = encode(first, kind, save_all=True, append_images=[second])
    assert inspect(data, "x", SPEC).frames == 2
    assert np.abs(pixels(decode(data, "x", SPEC)) - [255, 0, 0]).max() <= 3
    text = refused(data, "data.frames", spec=DecodeSpec(frames="error"))
    assert f"{kind} with more than 1 frame" in text
    single = encode(first, kind)
    assert inspect(single, "x", DecodeSpec(frames="error")).frames == 1


def test_I16_a_bomb_is_refused_on_its_header_in_under_a_millisecond(refused):
    bomb = png_header_bomb(20_000, 20_000)
    assert len(bomb) < 60_000
    text = refused(bomb, "data.too_large", name="bomb.png")
    assert "20000x20000 = 400 MP > max_pixels 64 MP" in text

    def refuse():
        with pytest.raises(BadImage):
            decode(bomb, "x", SPEC)

    assert min(_seconds(refuse) for _ in range(10)) < 1e-3


def test_I17_a_bomb_just_under_pillows_own_limit_is_refused(refused):
    text = refused(png_header_bomb(13_000, 13_000), "data.too_large")
    assert "13000x13000 = 169 MP > max_pixels 64 MP" in text
    assert inspect(png_header_bomb(13_000, 13_000), "x", DecodeSpec(max_pixels=2 * 10**8)).bits == 1


def test_I17_a_webp_counts_four_times_since_its_decoder_does(refused):
    data = encode(Image.new("RGB", (5000, 4000)), "WEBP", lossless=True, method=0)
    text = refused(data, "data.too_large", name="a.webp")
    assert "5000x4000 = 20 MP > max_pixels 64 MP / 4" in text
    small = DecodeSpec(max_pixels=4 * 120 * 80)
    for options in ({"lossless": True}, {"quality": 50}, {"quality": 50, "exif": b"Exif\0\0"}):
        data = encode(photo(), "WEBP", **options)
        assert decode(data, "x", small).size == (120, 80)
        with pytest.raises(BadImage, match="120x80 = 0 MP"):
            decode(data, "x", DecodeSpec(max_pixels=4 * 120 * 80 - 1))


def test_I17_a_progressive_jpeg_with_a_thousand_scans_is_refused_before_it_decodes(refused):
    data = encode(photo(1000, 800), progressive=True, quality=5)
    scan = data[data.rindex(b"\xff\xda") :][:12]
    text = refused(data[:-2] + scan * 2000 + b"\xff\xd9", "data.too_large")
    assert "0.8 MP in 2,010 scans > 1,000 MP to decode" in text
    assert decode(data, "x", SPEC).size == (1000, 800)


def test_I18_an_extreme_aspect_is_refused_whichever_way_it_lies(refused):
    assert "1x60000 has aspect 60,000 > max_aspect 200" in refused(
        png_header_bomb(1, 60_000), "data.too_long"
    )
    assert "402x2 has aspect 201 >" in refused(png_header_bomb(402, 2), "data.too_long")
    assert decode(png_header_bomb(400, 2), "x", SPEC).size == (400, 2)


def test_I19_a_single_pixel_is_a_picture_and_its_size_is_known():
    data = encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")
    assert inspect(data, "x", SPEC).width == 1 < images.TINY
    assert pixels(decode(data, "x", SPEC)).tolist() == [[[9, 8, 7]]]


def _swapped_profile():
    """sRGB with its red and green primaries exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {data[i : i + 4].decode(): i for i in range(132, 132 + 12 * data[131], 12)}
    red, green = tags["rXYZ"] + 4, tags["gXYZ"] + 4
    data[red : red + 8], data[green : green + 8] = data[green : green + 8], data[red : red + 8]
    return bytes(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_I20_a_colour_profile_is_ignored_or_converted_as_declared(mode):
    red = Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode)
    data = encode(red, "PNG", icc_profile=_swapped_profile())
    assert inspect(data, "x", SPEC).has_icc
    assert (pixels(decode(data, "x", SPEC)) == [255, 0, 0]).all()
    converted = pixels(decode(data, "x", DecodeSpec(icc="to_srgb")))
    assert np.abs(converted - [0, 255, 0]).max() <= 2


def test_I20_a_broken_profile_is_never_fatal():
    for profile in (b"garbage", _swapped_profile()[:200]):
        data = encode(photo(), icc_profile=profile)
        got = pixels(decode(data, "x", DecodeSpec(icc="to_srgb")))
        assert np.array_equal(got, pixels(decode(data, "x", SPEC)))


def test_I21_an_unreadable_file_is_named_with_owner_and_mode(tmp_path, monkeypatch):
    path = tmp_path / "x.jpg"
    path.write_bytes(b"1")
    path.chmod(0o000)
    monkeypatch.setattr(os, "open", _raiser(PermissionError(13, "Permission denied")))
    text = rf"data.permission\] .*x.jpg: not readable: owner uid {os.getuid()}, mode ----------"
    with pytest.raises(BadImage, match=text):
        read_bytes(path)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_I28_any_unicode_name_can_be_read(tmp_path, form):
    path = tmp_path / unicodedata.normalize(form, "café été 🌷.jpg")
    path.write_bytes(encode(photo()))
    assert decode(read_bytes(path), path, SPEC).size == (120, 80)


def test_I29_control_characters_of_a_name_are_escaped_in_the_text(tmp_path):
    path = tmp_path / 'a\nb\t\x1b[31m,"c.jpg'
    path.write_bytes(b"")
    with pytest.raises(BadImage) as caught:
        read_bytes(path)
    assert 'a\\nb\\t\\x1b[31m,"c.jpg: 0 bytes' in str(caught.value)


def test_I30_names_that_are_not_unicode_can_be_read_and_printed(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))
    path.write_bytes(encode(photo()))
    assert decode(read_bytes(path), path, SPEC).size == (120, 80)
    path.write_bytes(b"")
    with pytest.raises(BadImage) as caught:
        read_bytes(path)
    assert "caf\\udce9.jpg" in str(caught.value).encode("utf-8").decode()


@pytest.mark.parametrize(
    "start", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.7"]
)
def test_I33_postscript_in_a_photos_name_never_reaches_ghostscript(
    refused, tmp_path, monkeypatch, start
):
    fake = tmp_path / "bin" / "gs"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=os.pathsep)
    text = refused(start + b"showpage", "data.format", name="photo.jpg")
    assert "PostScript or PDF file; vitft reads JPEG, PNG, WEBP, GIF, BMP, TIFF" in text
    assert not (tmp_path / "ran").exists()


def test_I33_only_the_allowed_formats_are_ever_opened(refused):
    for kind in ("PPM", "TGA", "ICO", "SGI", "PCX", "JPEG2000"):
        data = encode(Image.new("RGB", (32, 32)), kind)
        with pytest.raises(BadImage, match=r"data\.(format|not_image)"):
            decode(data, "x", SPEC)


def test_I34_compressed_text_and_endless_chunks_cost_under_two_seconds():
    def chunk(name, part):
        return (
            struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        )

    png = encode(photo(), "PNG")
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000), 9))
    many = chunk(b"tEXt", b"k\0v") * 20_000
    gif = encode(photo().convert("P"), "GIF")
    comments = b"\x21\xfe\x01a\x00" * 200_000
    for data in (
        png[:33] + text + png[33:],
        png[:33] + many + png[33:],
        gif[:-1] + comments + b";",
    ):
        started = time.process_time()
        with suppress(BadImage):
            decode(data, "x", SPEC)
        assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("start", "name", "tool"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC", "pillow-heif"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "AVIF", "Pillow"),
        (b"\xff\x0a\0\0", "JPEG XL", "djxl"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", "djxl"),
        (b"8BPS\0\1", "Photoshop", "GIMP"),
        (b"\0\0\0\x18ftypmp42", "video", "ffmpeg"),
    ],
)
def test_I35_pictures_of_other_formats_are_named_with_a_way_out(refused, start, name, tool):
    text = refused(start + bytes(40), "data.format")
    assert f"{name} file; vitft reads JPEG" in text
    assert "fix: convert it, with " in text
    assert tool in text


def test_I36_a_global_switch_for_truncated_images_masks_nothing_and_is_left_as_it_was(
    refused, monkeypatch
):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(photo(400, 300))
    refused(data[: len(data) // 2], "data.truncated")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


# ---- together -----------------------------------------------------------------------------------


def test_threads_decode_under_hostile_switches_and_leave_them_as_they_were(monkeypatch):
    import warnings
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    filters = list(warnings.filters)
    good, cut = encode(photo(300, 200)), encode(photo(300, 200))[:5000]

    def work(i):
        try:
            return decode(cut if i % 2 else good, "x", SPEC).size
        except BadImage as error:
            return error.faults[0].id

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(work, range(200)))
    assert got == [(300, 200), "data.truncated"] * 100
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    assert list(warnings.filters) == filters


def test_a_refusal_crosses_a_process_border_whole():
    import pickle

    with pytest.raises(BadImage) as caught:
        decode(b"", "x.jpg", SPEC)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is BadImage
    assert again.faults == caught.value.faults


MEASURE = """
import json, os, resource, sys, time
from pathlib import Path
from vitft import images
from vitft.inputs import InputConfig, pixels, plain

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024

transform = pixels(plain(InputConfig((224, 224), (.5,) * 3, (.5,) * 3)))
transform(images.decode(Path(sys.argv[1], "0.png").read_bytes(), "x", images.DecodeSpec()))
base, rows = peak(), {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    started = time.process_time()
    try:
        transform(images.decode(images.read_bytes(path), path, images.DecodeSpec()))
        said = "decoded"
    except images.BadImage as error:
        said = error.faults[0].id
    rows[path.name] = said, time.process_time() - started, peak() - base
print(json.dumps(rows))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_no_file_costs_more_than_2_s_or_300_mb_to_become_an_input(tmp_path):
    rows = cost_of_the_bad_set(tmp_path)
    assert {name: row[0] for name, row in rows.items()} == {
        "0.png": "decoded",
        "1_bomb.png": "data.too_large",
        "2_line.png": "data.too_long",
        "3_near.png": "data.too_large",
        "4_limit.png": "decoded",
        "5_thin.png": "decoded",
        "6_sliver.png": "decoded",
        "7_jpeg.jpg": "decoded",
        "8_alpha.png": "data.truncated",
    }
    assert max(row[1] for row in rows.values()) < 2
    assert max(row[2] for row in rows.values()) < 300


def cost_of_the_bad_set(folder):
    """File -> (what became of it, seconds, peak memory above base in MB), in a process apart."""
    (folder / "0.png").write_bytes(png_header_bomb(64, 64))
    files = {
        "1_bomb.png": png_header_bomb(20_000, 20_000),
        "2_line.png": png_header_bomb(1, 60_000),
        "3_near.png": png_header_bomb(13_000, 13_000),
        "4_limit.png": png_header_bomb(8_000, 8_000, bits=8),
        "5_thin.png": png_header_bomb(560, 112_000),
        "6_sliver.png": png_header_bomb(200, 1),
        "7_jpeg.jpg": encode(Image.new("L", (8000, 8000))),
        "8_alpha.png": encode(Image.new("LA", (5600, 5600)), "PNG", compress_level=0)[:20_000_000],
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(images.__file__).parents[1],
    )
    return json.loads(run.stdout)
