"""Shards as a folder: the same photographs, the same run, and everything broken said by name."""

import io as memory
import json
import tarfile
from collections import Counter
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import tensors

from vitft import columns, containers, data, images, verify
from vitft.errors import DataError, MachineError
from vitft.inputs import InputConfig, plain
from vitft.photos import Photos
from vitft.predict import Predictor, list_files
from vitft.run import run
from vitft.schema import DataSpec

CLASSES = ("blue", "green", "red")


def write_tar(file: Path, parts: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, body in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, memory.BytesIO(body))
    return file


def samples(photos: Path) -> list[tuple[bytes, str]]:
    return [(p.read_bytes(), p.parent.name) for p in sorted(photos.rglob("*.jpg"))]


def labelled(photos: Path) -> list[tuple[bytes, int]]:
    return [(body, CLASSES.index(name)) for body, name in samples(photos)]


def write_wds(root: Path, photos: Path, label=lambda name: {"cls": name.encode()}) -> Path:
    """Shards of 25 samples, as webdataset's ShardWriter writes them, classes in turns."""
    found = samples(photos)
    order = np.random.default_rng(0).permutation(len(found))
    for k in range(0, len(found), 25):
        parts = {}
        for i in order[k : k + 25]:
            body, name = found[i]
            parts[f"{i:06d}.jpg"] = body
            parts |= {f"{i:06d}.{ending}": text for ending, text in label(name).items()}
        write_tar(root / f"shard-{k // 25:04d}.tar", parts)
    return root


def table_of(rows, names=CLASSES):
    """Columns image and label, with the data set's own words about them."""
    pa = pytest.importorskip("pyarrow")
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(names), "_type": "ClassLabel"},
    }
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", picture), ("label", pa.int64())], metadata=about)
    pictures = [{"bytes": body, "path": None} for body, _ in rows]
    columns = [pa.array(pictures, picture), pa.array([y for _, y in rows], pa.int64())]
    return pa.table(columns, schema=schema)


def write_parquet(file: Path, rows: list[tuple[bytes | None, int]], names=CLASSES) -> Path:
    """What `datasets.Dataset.push_to_hub` writes, in groups of 7 rows."""
    pq = pytest.importorskip("pyarrow.parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table_of(rows, names), file, row_group_size=7)
    return file


def write_hfds(
    root: Path, splits: dict[str, list[tuple[bytes | None, int]]], names=CLASSES, shards: int = 1
) -> Path:
    """What `datasets.DatasetDict.save_to_disk` writes: Arrow streams of two record batches each."""
    pa = pytest.importorskip("pyarrow")
    for split, rows in splits.items():
        folder = root / split
        folder.mkdir(parents=True)
        size = -(-len(rows) // shards)
        files = {f"data-{k:05d}-of-{shards:05d}.arrow": k * size for k in range(shards)}
        for name, first in files.items():
            with pa.ipc.new_stream(str(folder / name), table_of([], names).schema) as out:
                for start, end in ((first, first + 7), (first + 7, first + size)):
                    out.write_table(table_of(rows[start : min(end, first + size)], names))
        state = {"_data_files": [{"filename": name} for name in files]}
        (folder / "state.json").write_text(json.dumps(state))
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return root


def scan(root: Path, **options) -> data.Index:
    return data.scan(DataSpec(root=str(root), **options), seed=0)


def refused(root: Path, id: str, *words: str, **options) -> None:
    with pytest.raises(DataError) as error:
        scan(root, **options)
    told = str(error.value)
    assert f"error[{id}]" in told
    assert "fix: " in told
    assert all(word in told for word in words), told


def by_content(index: data.Index) -> dict[str, tuple[str, str]]:
    return {
        sha: (index.classes[y], side)
        for sha, y, side in zip(index.sha256, index.labels, index.split, strict=True)
    }


# -- the same photographs -------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["wds", "hfds"])
def test_shards_hold_the_same_data_set_as_the_folder(tiny_photos, tmp_path, source):
    """Labels, contents and split are equal, since a split depends on contents alone."""
    if source == "wds":
        root = write_wds(tmp_path / "shards", tiny_photos)
    else:
        rows = labelled(tiny_photos)
        root = write_hfds(tmp_path / "shards", {"train": rows})
    folder, sharded = scan(tiny_photos), scan(root, source=source)
    assert by_content(sharded) == by_content(folder)
    assert sharded.classes == folder.classes == CLASSES
    assert sharded.ledger.used == 60
    assert sharded.ledger.found == 60 + sum(sharded.ledger.ignored.values())
    for row in range(60):
        data_of_row = images.read_bytes(sharded.file(row))
        assert folder.sha256.index(sharded.sha256[row]) >= 0
        assert data_of_row[:2] == b"\xff\xd8"


def test_a_run_on_shards_gives_the_result_of_the_folder(tiny_recipe, tiny_photos, tmp_path):
    """Audit, report with thumbnails, verification and prediction included; rows differ in order."""
    root = write_wds(tmp_path / "shards", tiny_photos)
    folder = run(tiny_recipe("probe"))
    sharded = run(tiny_recipe("probe", f"data.root={root}", "data.source=wds"))
    assert "features: 0 computed, 42 reused" in (sharded.folder / "log.txt").read_text()
    assert folder.scores.log_loss == pytest.approx(sharded.scores.log_loss, abs=1e-3)
    assert folder.scores.confusion.tolist() == sharded.scores.confusion.tolist()
    assert "data:image/" in (sharded.folder / "report.html").read_text()
    assert [check for check in verify.verify(sharded.folder) if not check.ok] == []
    lines = (sharded.folder / "predictions.csv").read_text().splitlines()
    path = root / lines[1].split(",")[0]
    assert list_files([path]) == [str(path)]
    assert str(path) in list_files([path.parent])
    (answer,) = Predictor(sharded.folder / "model", device="cpu")([path])
    assert answer.probabilities is not None


def test_a_run_on_a_data_set_gives_the_result_of_the_folder_bit_for_bit(
    tiny_recipe, tiny_photos, tmp_path
):
    """Its rows stand in the folder's order; audit, report, verification, prediction included."""
    root = write_hfds(tmp_path / "h", {"train": labelled(tiny_photos)}, shards=3)
    folder = run(tiny_recipe("probe"))
    arrow = run(tiny_recipe("probe", f"data.root={root}", "data.source=hfds"))
    assert "features: 0 computed, 42 reused" in (arrow.folder / "log.txt").read_text()
    assert np.array_equal(arrow.predictions.logits, folder.predictions.logits)
    assert arrow.scores.log_loss == folder.scores.log_loss
    one, other = tensors(folder.folder), tensors(arrow.folder)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "data:image/" in (arrow.folder / "report.html").read_text()
    assert [check for check in verify.verify(arrow.folder) if not check.ok] == []
    lines = (arrow.folder / "predictions.csv").read_text().splitlines()
    assert lines[1].startswith("train/data-00000-of-00003.arrow/")
    (answer,) = Predictor(arrow.folder / "model", device="cpu")([root / lines[1].split(",")[0]])
    assert answer.probabilities is not None


@pytest.mark.parametrize("source", ["wds", "hfds"])
def test_a_full_run_on_shards_trains_with_workers(tiny_recipe, tiny_photos, tmp_path, source):
    if source == "wds":
        root = write_wds(tmp_path / "shards", tiny_photos)
    else:
        root = write_hfds(tmp_path / "h", {"train": labelled(tiny_photos)}, shards=2)
    more = [f"data.root={root}", f"data.source={source}", "train.epochs=1"]
    runs = [run(tiny_recipe("full", *more, f"train.workers={n}")) for n in (0, 2)]
    if source == "hfds":  # its rows stand in the folder's order
        runs.append(run(tiny_recipe("full", "train.epochs=1")))
    first, *others = (tensors(one.folder) for one in runs)
    assert all(torch.equal(first[k], other[k]) for other in others for k in first)


def test_a_shard_that_changed_since_the_scan_is_named(tiny_photos, tmp_path):
    root = write_wds(tmp_path / "shards", tiny_photos)
    index = scan(root, source="wds")
    files = [index.file(k) for k in range(60)]
    config = InputConfig((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
    photos = Photos(
        files, index.labels, index.sha256,
        decode=images.DecodeSpec(), transform=plain(config, "timm"), seed=0,
    )  # fmt: skip
    assert photos[0, 3][0].shape == (3, 32, 32)
    with (root / "shard-0000.tar").open("r+b") as file:
        file.seek(700)
        file.write(b"?")
    hit = next(iter(containers.members(root / "shard-0000.tar").spans))
    row = index.paths.index(f"shard-0000.tar/{hit}")
    with pytest.raises(DataError, match=r"data.changed\] .*shard-0000.tar/\d+.jpg: changed since"):
        photos[0, row]


# -- labels, classes, sides -----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["number", "json", "folder", "names"])
def test_labels_come_from_where_the_format_puts_them(tmp_path, tiny_photos, way):
    found = samples(tiny_photos)[::6]
    parts = {}
    for i, (body, name) in enumerate(found):
        number = str(CLASSES.index(name) + (8 if way == "number" else 0))
        key = f"{name}/{i}" if way == "folder" else f"{i}"
        parts[f"{key}.jpg"] = body
        if way in ("number", "names"):
            parts[f"{key}.cls"] = number.encode()
        if way == "json":
            parts[f"{key}.json"] = json.dumps({"label": name, "caption": "of a flower"}).encode()
    write_tar(tmp_path / "s" / "a.tar", parts)
    if way == "names":
        (tmp_path / "s" / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    index = scan(tmp_path / "s", source="wds")
    assert index.classes == (("8", "9", "10") if way == "number" else CLASSES)  # 10 is not before 8
    told = {sha256(body).hexdigest(): CLASSES.index(name) for body, name in found}
    assert {sha: int(y) for sha, y in zip(index.sha256, index.labels, strict=True)} == told


def test_names_of_shards_and_folders_give_the_split(tmp_path, tiny_photos):
    found = samples(tiny_photos)
    for k, name in enumerate(("flowers-train-000", "flowers-train-001", "flowers-val-000")):
        part = {f"{i}.jpg": body for i, (body, _) in enumerate(found) if i % 3 == k}
        part |= {f"{i}.cls": n.encode() for i, (_, n) in enumerate(found) if i % 3 == k}
        write_tar(tmp_path / "s" / f"{name}.tar", part)
    index = scan(tmp_path / "s", source="wds")
    assert {(p.split("/")[0][8:11], s) for p, s in zip(index.paths, index.split, strict=True)} == {
        ("tra", "train"),
        ("val", "val"),
    }
    mixed = scan(tmp_path / "s", source="wds", split="stratified")
    assert set(mixed.split) == {"train", "val", "test"}
    (tmp_path / "s" / "flowers-val-000.tar").rename(tmp_path / "s" / "flowers-more.tar")
    refused(tmp_path / "s", "data.layout", "flowers-more.tar says neither", source="wds")


def test_a_data_sets_own_splits_and_class_order_are_kept(tmp_path, tiny_photos):
    order = ("red", "blue", "green")
    rows = [(body, order.index(name)) for body, name in samples(tiny_photos)]
    root = write_hfds(tmp_path / "h", {"train": rows[::2], "validation": rows[1::2]}, order)
    index = scan(root)  # known by its dataset_dict.json
    assert index.classes == order
    assert Counter(index.split) == {"train": 30, "val": 30}
    assert index.paths[0] == "train/data-00000-of-00001.arrow/00"


def test_a_label_is_the_place_of_a_name_even_where_names_are_numbers(tmp_path, tiny_photos):
    """Class folders 1, 2, 10 make the ClassLabel names 1, 10, 2: label 1 means 10."""
    rows = labelled(tiny_photos)
    index = scan(write_hfds(tmp_path / "h", {"train": rows}, ("1", "10", "2")))
    assert index.classes == ("1", "10", "2")
    told = {sha256(body).hexdigest(): label for body, label in rows}
    assert {s: int(y) for s, y in zip(index.sha256, index.labels, strict=True)} == told


def test_splits_that_number_their_classes_differently_are_refused(tmp_path, tiny_photos):
    rows = labelled(tiny_photos)
    root = write_hfds(tmp_path / "h", {"validation": rows[1::2]}, CLASSES[::-1])
    write_hfds(root, {"train": rows[::2]})
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    refused(root, "data.sample", "['red', 'green', 'blue']", "before it ['blue', 'green', 'red']")
    (root / "classes.txt").write_text("\n".join(CLASSES))  # what the user says overrules both
    assert scan(root).classes == CLASSES


@pytest.mark.parametrize("about", [b"{", b"[]", b'{"info": {"features": 1}}'])
def test_metadata_of_another_kind_is_said(tmp_path, about):
    pa = pytest.importorskip("pyarrow")
    root = write_hfds(tmp_path / "h", {"train": [(JPEG, 0)]})
    schema = pa.schema([("image", pa.int64())], metadata={b"huggingface": about})
    with pa.ipc.new_stream(str(next(root.rglob("*.arrow"))), schema):
        pass
    refused(root, "data.sample", "metadata cannot be read")


def test_classes_that_are_numbers_are_told_where_names_go(tmp_path, tiny_photos):
    root = write_wds(
        tmp_path / "shards", tiny_photos, lambda n: {"cls": str(CLASSES.index(n)).encode()}
    )
    told = "classes are numbers; classes.txt beside the shards"
    assert any(told in line for line in scan(root, source="wds").ledger.warnings)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    assert not any(told in line for line in scan(root, source="wds").ledger.warnings)


def test_a_single_tar_is_known_by_its_name(tmp_path, tiny_photos):
    parts = {f"{n}/{i}.jpg": body for i, (body, n) in enumerate(samples(tiny_photos))}
    assert scan(write_tar(tmp_path / "one.tar", parts)).ledger.used == 60


# -- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "source"), [("0.tar", "wds"), ("0.parquet", "hfds")])
def test_a_folder_of_nothing_but_shards_is_told_its_source(tmp_path, name, source):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / name).write_bytes(b"anything")
    with pytest.raises(DataError) as caught:
        scan(tmp_path / "shards")
    assert caught.value.faults[0].fix.startswith(f"set data.source: {source} if")


def test_an_unreadable_picture_is_refused_by_name_and_counted(tmp_path, tiny_photos):
    root = write_wds(tmp_path / "shards", tiny_photos)
    write_tar(root / "shard-0009.tar", {"bad.jpg": b"\xff\xd8\xff no more", "bad.cls": b"red"})
    index = scan(root, source="wds", max_bad=0.1)
    (refusal,) = index.ledger.refused
    assert refusal.path == "shard-0009.tar/bad.jpg"
    assert index.ledger.used == 60


JPEG = b"\xff\xd8\xff"


@pytest.mark.parametrize(
    ("parts", "id", "words"),
    [
        ({"1.jpg": JPEG}, "data.sample", "sample 1 has no label"),
        ({"1.jpg": JPEG, "1.png": JPEG, "1.cls": b"a"}, "data.sample", "sample 1 has 2 pictures"),
        ({"1.jpg": JPEG, "1.JPG": b"", "1.cls": b"a"}, "data.sample", "has 1.jpg and 1.JPG"),
        ({"1.jpg": JPEG, "1.json": b"[" * 99_999}, "data.sample", "has no label"),
        ({"../1.jpg": JPEG, "1.cls": b"a"}, "data.shard", "would lead out of it"),
        ({"/etc/1.jpg": JPEG}, "data.shard", "would lead out of it"),
    ],
)
def test_samples_that_are_none_are_said(tmp_path, parts, id, words):
    write_tar(tmp_path / "s" / "a.tar", parts)
    refused(tmp_path / "s", id, words, "a.tar", source="wds")


def test_broken_shards_are_said_all_at_once(tmp_path, tiny_photos):
    root = write_wds(tmp_path / "shards", tiny_photos)
    whole = (root / "shard-0000.tar").read_bytes()
    (root / "shard-0000.tar").write_bytes(whole[:5000])
    (root / "shard-0001.tar").write_bytes(b"\x1f\x8b" + whole[2:900])
    refused(root, "data.shard", "shard-0000.tar: is no whole", "shard-0001.tar", source="wds")
    twice = root / "t.tar"
    with tarfile.open(twice, "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("1.jpg"))
    with pytest.raises(DataError, match="holds 1.jpg twice"):
        containers.members(twice)


def test_nothing_behind_a_damaged_header_or_in_a_second_tar_is_lost_in_silence(tmp_path):
    parts = {f"{k}.jpg": JPEG for k in range(3)}
    whole = write_tar(tmp_path / "a.tar", parts).read_bytes()
    assert len(containers.members(tmp_path / "a.tar").spans) == 3
    spoiled = bytearray(whole)
    spoiled[1024] ^= 1  # the second member's name
    for body in (spoiled, whole + whole, whole[: 2 * 1024 + 100]):
        (tmp_path / "b.tar").write_bytes(bytes(body))
        with pytest.raises(DataError, match=r"data.shard.*has more behind byte \d"):
            containers.members(tmp_path / "b.tar")


def test_a_sparse_member_is_counted_since_its_bytes_are_no_picture(tmp_path):
    info = tarfile.TarInfo("GNUSparseFile.0/1.jpg")
    about = {"major": "1", "minor": "0", "name": "1.jpg", "realsize": "5"}
    info.pax_headers = {f"GNU.sparse.{key}": value for key, value in about.items()}
    body = b"1\n0\n5\n".ljust(512, b"\0") + b"12345"
    info.size = len(body)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, memory.BytesIO(body))
    assert containers.members(tmp_path / "a.tar") == containers.Tar({}, 1)


def test_what_is_no_folder_of_shards_is_said(tmp_path):
    (tmp_path / "s").mkdir()
    refused(tmp_path / "s", "data.root_empty", "no .tar in this folder", source="wds")
    refused(tmp_path / "s", "data.root_empty", "save_to_disk", source="hfds")
    refused(tmp_path / "no", "data.root_missing", source="wds")
    (tmp_path / "s" / "a.tar.gz").write_bytes(b"")
    refused(tmp_path / "s", "data.root_empty", "a.tar.gz is compressed", source="wds")
    refused(tmp_path / "s", "data.no_split", source="wds", split="tutorial")


def test_rows_without_a_picture_or_label_are_said(tmp_path, tiny_photos):
    rows = labelled(tiny_photos)
    refused(write_hfds(tmp_path / "a", {"train": [*rows, (JPEG, -1)]}), "data.sample", "no label")
    root = write_hfds(tmp_path / "b", {"train": [*rows, (None, 0)]})
    (refusal,) = scan(root, max_bad=0.1).ledger.refused
    assert refusal.path.endswith("arrow/60")
    assert "holds no picture" in refusal.text
    more = write_hfds(tmp_path / "c", {"train": rows}, (*CLASSES, "white"))
    refused(more, "data.empty_class", "class 'white' holds 0 photographs")
    assert scan(more, allow_empty=True).classes == (*CLASSES, "white")
    next((tmp_path / "c").rglob("*.arrow")).write_bytes(b"nothing of the kind")
    refused(more, "data.shard", "is no whole Arrow file")


def test_without_pyarrow_the_extra_is_named(tmp_path, tiny_photos, monkeypatch):
    rows = labelled(tiny_photos)
    root = write_hfds(tmp_path / "a", {"train": rows})
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    columns._mapping.cache_clear()
    with pytest.raises(MachineError, match=r"env.extra.*\n?fix: pip install 'vitft\[hfds\]'"):
        scan(root)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_damage_to_a_tar_brings_out_anybody_elses_error(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("fuzz")
    file = write_tar(root / "s" / "a.tar", {"1.jpg": JPEG * 99, "1.cls": b"a", "é" * 99: b"x"})
    body = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(body[: data.draw(st.integers(1, len(body)))]))
    with suppress(DataError):
        scan(root / "s", source="wds", max_bad=1.0)
