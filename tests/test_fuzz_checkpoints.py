"""Mutated weights, headers, Cards, products, checkpoints and shards: our own errors, or the truth.

What is sealed by a checksum must be refused whenever a byte differs; what is not must be read, or
refused by name. No case may run code, take much memory, or end in an exception of somebody else.
"""

import copy
import hashlib
import io as streams
import json
import pickle
import random
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rows import make_product, network
from safetensors.torch import save_file
from test_fuzz_images import mutate

from vitft import checkpoint, io, product, store, weights
from vitft.checkpoint import Snapshot
from vitft.errors import VitftError
from vitft.store import Space, make_key

SHORT, LONG = 200, 2000
EVIL = (
    -1, 0, 1, 2**31, 2**63, 2**64, 1e308, float("nan"), float("inf"), True, None, "", "x" * 3000,
    "../../etc/passwd", "\x1b[31m", [], [[]], [[], {}], {}, {"a": {}}, [1] * 50, "F64",
    "hf-hub:a/b", [0, 2**63], [-1, 5], ["a", "b", "c"], "\ud800", "__import__('os')",
)  # fmt: skip


class Marker:
    """A pickle of it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


def torch_bytes(content: object, **options: object) -> bytes:
    buffer = streams.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def recompressed(data: bytes) -> bytes:
    """The same zip with deflated entries, whose lengths and streams can be damaged."""
    buffer = streams.BytesIO()
    with (
        zipfile.ZipFile(streams.BytesIO(data)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[tuple[str, bytes]]:
    return make_corpus(tmp_path_factory.mktemp("seeds"))


def make_corpus(folder: Path) -> list[tuple[str, bytes]]:
    """Name and bytes of weights files of every kind, two of which would run code."""
    state = network().state_dict()
    save_file(state, folder / "a.safetensors", {"note": "x"})
    arrays = {k.replace(".", "/"): v.numpy() for k, v in state.items()}
    np.savez(folder / "a.npz", **arrays)
    plain = torch_bytes({"state_dict": state, "epoch": 3})
    return [
        ("a.safetensors", (folder / "a.safetensors").read_bytes()),
        ("a.npz", (folder / "a.npz").read_bytes()),
        ("a.pth", plain),
        ("a.pth", recompressed(plain)),
        ("a.pth", torch_bytes(state, _use_new_zipfile_serialization=False)),
        ("a.pth", torch_bytes({"w": Marker(folder / "marker")})),
        ("a.pth", pickle.dumps({"w": Marker(folder / "marker")})),
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_product(tmp_path_factory.mktemp("made") / "model")


class Bounds:
    """Counts what came out of the cases; memory and time must stay small."""

    def __init__(self) -> None:
        self.base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.refused = self.read = 0
        self.slowest = 0.0
        self.told: list[tuple[str, VitftError]] = []

    def case(self, work: Callable[[], object], told: str) -> bool:
        """Whether it was read; anything but our own error is a failure that names the case."""
        started = time.process_time()
        try:
            work()
        except VitftError as error:
            self.refused += 1
            self.told.append((told, error))
            return False
        except Exception as error:
            raise AssertionError(f"case {told}") from error
        finally:
            self.slowest = max(self.slowest, time.process_time() - started)
        self.read += 1
        return True

    def hold(self) -> None:
        for case, error in self.told:
            assert all(f.id and f.place and f.text and f.fix for f in error.faults), case
            assert len(str(error)) < 20_000, case
        assert self.slowest < 5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.base < 600_000  # kB


# --- weights of strangers ---


def header_of(data: bytes) -> tuple[dict[str, object], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: object, body: bytes, dice: random.Random) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    length = len(text) if dice.random() < 0.9 else dice.choice((0, 1, 2**31, 2**63, len(text) + 9))
    return struct.pack("<Q", length) + text + body


def spoil(value: object, dice: random.Random) -> object:
    """A JSON value with one to three places changed: replaced, dropped, doubled or moved."""
    value = copy.deepcopy(value)
    for _ in range(dice.randint(1, 3)):
        inside = value
        while isinstance(inside, dict | list) and inside:
            keys = list(inside) if isinstance(inside, dict) else range(len(inside))
            key = dice.choice(list(keys))
            deeper = inside[key]
            if dice.random() < 0.5 or not (isinstance(deeper, dict | list) and deeper):
                change(inside, key, dice)
                break
            inside = deeper
    return value


def change(inside: dict[str, object] | list[object], key: object, dice: random.Random) -> None:
    way = dice.random()
    if way < 0.7:
        inside[key] = copy.deepcopy(dice.choice(EVIL))
    elif way < 0.85:
        del inside[key]
    elif isinstance(inside, dict):
        inside[str(dice.choice(EVIL))] = inside.pop(key)
    else:
        inside.append(inside[key])


def fuzz_weights(corpus: list[tuple[str, bytes]], folder: Path, count: int, seed: str) -> Bounds:
    bounds = Bounds()
    for i in range(count):
        dice = random.Random(f"{seed} {i}")
        name, data = dice.choice(corpus)
        if name.endswith(".safetensors") and dice.random() < 0.7:
            header, body = header_of(data)
            data = with_header(spoil(header, dice), body, dice)
        else:
            data = mutate(data, dice)
        path = folder / name
        path.write_bytes(data)
        bounds.case(lambda path=path: weights.read(path), f"{seed} {i}")
    bounds.hold()
    assert not list(folder.parent.rglob("marker"))
    return bounds


@pytest.mark.parametrize("count", [SHORT, pytest.param(LONG, marks=pytest.mark.nightly)])
def test_mutated_weights_are_read_or_refused_and_run_nothing(corpus, tmp_path, count):
    found = fuzz_weights(corpus, tmp_path, count, "weights")
    assert found.refused > count / 2
    assert found.read > 0


def zip_that_begins_before_itself(corpus: list[tuple[str, bytes]]) -> bytes:
    """Its directory claims to lie 100 bytes later, which puts its first entry at -100."""
    data = bytearray(corpus[3][1])
    end = data.rindex(b"PK\x05\x06")
    (at,) = struct.unpack_from("<I", data, end + 16)
    struct.pack_into("<I", data, end + 16, at + 100)
    return bytes(data)


def npz_with(header: bytes) -> bytes:
    buffer = streams.BytesIO()
    with zipfile.ZipFile(buffer, "w") as new:
        array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
        new.writestr("a.npy", array)
    return buffer.getvalue()


FOUND = {
    "an entry before the file begins": ("a.pth", zip_that_begins_before_itself, "ckpt.corrupt"),
    "a header that never ends": (
        "a.npz",
        lambda corpus: npz_with(b"{'descr': '<f4', 'shape': (64, 16), \x7f"),
        "ckpt.corrupt",
    ),
    "an offset at infinity": (
        "a.safetensors",
        lambda corpus: with_header(
            {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, float("inf")]}},
            b"1234",
            random.Random(1),
        ),
        "ckpt.header",
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_a_mutation_once_found_is_refused_by_name(corpus, tmp_path, case):
    name, make, id = FOUND[case]
    (tmp_path / name).write_bytes(make(corpus))
    with pytest.raises(VitftError) as caught:
        weights.read(tmp_path / name)
    assert caught.value.faults[0].id == id


# --- the Card of a stranger ---


def fuzz_cards(made: Path, folder: Path, count: int, seed: str) -> Bounds:
    header, body = header_of((made / "model.safetensors").read_bytes())
    card = json.loads(header["__metadata__"]["vitft"])
    bounds, path = Bounds(), folder / "model.safetensors"
    for i in range(count):
        dice = random.Random(f"{seed} {i}")
        text = json.dumps(spoil(card, dice))
        if dice.random() < 0.2:
            text = mutate(text.encode(), dice).decode("latin-1")
        metadata = {"__metadata__": {"vitft": text}}
        data = json.dumps(header | metadata).encode()
        path.write_bytes(struct.pack("<Q", len(data)) + data + body)
        bounds.case(lambda: product.load(path), f"{seed} {i}")
    bounds.hold()
    return bounds


@pytest.mark.parametrize("count", [SHORT, pytest.param(LONG, marks=pytest.mark.nightly)])
def test_a_mutated_card_is_understood_or_refused(made, tmp_path, count):
    found = fuzz_cards(made, tmp_path, count, "cards")
    assert found.refused > count / 3
    assert found.read > 0


# --- our own, sealed ---


def wounded(data: bytes, dice: random.Random) -> bytes:
    """Bytes that differ in at least one place."""
    while (out := mutate(data, dice)) == data:
        continue
    return out


def fuzz_sealed(sealed: Path, load: Callable[[], object], count: int, seed: str) -> Bounds:
    """Every change of any file of a sealed folder must be refused."""
    files = sorted(p for p in sealed.iterdir() if p.is_file())
    whole = {path: path.read_bytes() for path in files}
    bounds = Bounds()
    for i in range(count):
        dice = random.Random(f"{seed} {i}")
        path = dice.choice(files)
        path.write_bytes(wounded(whole[path], dice))
        assert not bounds.case(load, f"{seed} {i}"), f"{seed} {i}: {path.name} was believed"
        path.write_bytes(whole[path])
    assert bounds.case(load, "whole")
    bounds.hold()
    return bounds


@pytest.mark.parametrize("count", [SHORT, pytest.param(LONG, marks=pytest.mark.nightly)])
def test_no_changed_byte_of_a_sealed_product_is_believed(tmp_path, count):
    fuzz_products(tmp_path, count)


def fuzz_products(folder: Path, count: int) -> Bounds:
    made = make_product(folder / "model")
    (made / "x").mkdir()  # an empty folder is nothing
    return fuzz_sealed(made, lambda: product.load(made), count, "product")


@pytest.mark.parametrize("count", [SHORT, pytest.param(LONG, marks=pytest.mark.nightly)])
def test_no_changed_byte_of_a_checkpoint_is_believed(tmp_path, count):
    fuzz_checkpoints(tmp_path, count)


def fuzz_checkpoints(folder: Path, count: int) -> Bounds:
    tensors = {f"model/{i}": torch.randn(20) for i in range(5)}
    numbers = {"a": 1.5, "history": []}
    path = checkpoint.save(folder, Snapshot(1, 0, 1, tensors, numbers), identity={"b": 2})
    found = fuzz_sealed(path, lambda: checkpoint.load(path, identity={"b": 2}), count, "checkpoint")
    assert checkpoint.newest(folder) == path
    return found


# --- shards of features ---


def fuzz_shards(root: Path, count: int, seed: str) -> int:
    """A damaged shard is dropped whole: a row that is still there is the row that was stored."""
    rng = np.random.default_rng(0)
    rows = {
        make_key(hashlib.sha256(bytes([k])).hexdigest(), v): rng.random(8, "f4")
        for k in range(6)
        for v in range(2)
    }
    Space({}, "float32", root).put(rows)
    (shard,) = root.rglob("*.shard")
    whole, dropped = shard.read_bytes(), 0
    for i in range(count):
        shard.write_bytes(wounded(whole, random.Random(f"{seed} {i}")))
        store.spaces(root)
        space = Space({}, "float32", root)
        assert not any(key in space for key in rows), f"{seed} {i}"
        assert not shard.exists()
        dropped += 1
    shard.write_bytes(whole)
    space = Space({}, "float32", root)
    assert all((space.get(key) == row).all() for key, row in rows.items())
    return dropped


@pytest.mark.parametrize("count", [SHORT, pytest.param(LONG, marks=pytest.mark.nightly)])
def test_a_mutated_shard_is_dropped_and_never_believed(tmp_path, count):
    assert fuzz_shards(tmp_path, count, "shards") == count


@pytest.mark.parametrize("count", [SHORT, pytest.param(LONG, marks=pytest.mark.nightly)])
def test_a_mutated_manifest_alone_is_a_problem_and_never_a_crash(tmp_path, count):
    with io.staged_dir(tmp_path / "sealed") as staged:
        io.write_text(staged / "a", "content")
    manifest = tmp_path / "sealed" / io.MANIFEST
    listed = json.loads(manifest.read_text())
    for i in range(count):
        dice = random.Random(f"manifest {i}")
        changed = spoil(listed, dice)
        if changed != listed:
            manifest.write_text(json.dumps(changed, indent=1) + "\n")
            assert io.verify_dir(tmp_path / "sealed"), f"manifest {i}"
