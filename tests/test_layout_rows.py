"""Rows D1 to D23 and I8, I9, I21 to I32 of the bad-input matrix: what `scan` says and keeps.

Each refusal is checked for its id, place, measured number, remedy and exit code; after every scan
the data tree holds the same bytes as before.
"""

import hashlib
import os
import shutil
import socket
import tarfile
import tempfile
import unicodedata
import zipfile
from pathlib import Path

import pytest
from conftest import paint
from PIL import Image
from rows import tree

from vitft import data, sources
from vitft.errors import DataError, RecipeError
from vitft.folders import instead, no_run
from vitft.recipe import DataSpec

RED, BLUE = (200, 40, 40), (40, 40, 200)


def scan(root: Path, *, seed: int = 0, **keys: object) -> data.Index:
    """Scans, and proves that the data lie untouched."""
    below = root if root.is_dir() else next(p for p in root.parents if p.is_dir())
    before = tree(below)
    try:
        return data.scan(DataSpec(root=str(root), **keys), seed=seed)
    finally:
        assert tree(below) == before


def refused(root: Path, id: str, *says: str, fix: str, **keys: object) -> DataError:
    """The error of a scan, whose first fault has this id, these words and this remedy."""
    with pytest.raises(DataError) as caught:
        scan(root, **keys)
    error = caught.value
    assert error.exit_code == 3
    assert error.faults[0].id == id
    assert str(error).startswith(f"error[{id}] ")
    for text in says:
        assert text in str(error)
    assert fix in error.faults[0].fix
    assert "\nfix: " in str(error)
    return error


def fill(folder: Path, n: int, colour: tuple[int, int, int], seed: int = 0) -> list[Path]:
    return [paint(folder / f"{i:03d}.jpg", colour, size=16, seed=seed + i) for i in range(n)]


@pytest.fixture
def two(tmp_path) -> Path:
    """Two classes, `cat` and `dog`, of 10 photographs each."""
    root = tmp_path / "two"
    fill(root / "cat", 10, RED)
    fill(root / "dog", 10, BLUE, seed=100)
    return root


@pytest.fixture
def three_sides(tmp_path) -> Path:
    """train/ val/ test/ with classes a, b, c."""
    root = tmp_path / "sides"
    for s, split in enumerate(("train", "val", "test")):
        for k, name in enumerate("abc"):
            fill(root / split / name, 4, RED, seed=100 * s + 10 * k)
    return root


@pytest.fixture
def stranger():
    """A folder in which the test then acts as a user without rights (root passes every check)."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    user = os.geteuid()
    yield folder, (lambda: os.seteuid(65534)) if user == 0 else (lambda: None)
    os.seteuid(user)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_D1_an_empty_class_folder_is_an_error_unless_allowed(two):
    (two / "bird").mkdir()
    refused(two, "data.empty_class", str(two), "'bird' holds 0", fix="data.allow_empty: true")
    index = scan(two, allow_empty=True)
    assert index.classes == ("bird", "cat", "dog")
    assert set(index.labels.tolist()) == {1, 2}
    assert index.ledger.empty_classes == ("bird",)
    assert data.class_indices(index) == {"0": "bird", "1": "cat", "2": "dog"}


def test_D2_a_class_with_one_photograph_is_trained_on_never_measured(two):
    fill(two / "yak", 1, BLUE, seed=900)
    ledger = scan(two).ledger
    assert ledger.counts["yak"] == {"train": 1, "val": 0, "test": 0}
    assert any("1 classes have 1 photograph" in w and "yak" in w for w in ledger.warnings)


def test_D3_a_class_missing_in_val_keeps_every_number(three_sides):
    shutil.rmtree(three_sides / "val" / "b")
    index = scan(three_sides)
    assert index.classes == ("a", "b", "c")
    val = {index.paths[i]: int(index.labels[i]) for i in index.rows("val")}
    assert {p.split("/")[1]: k for p, k in val.items()} == {"a": 0, "c": 2}
    assert "1 classes have no photograph in val (support 0): b" in index.ledger.warnings


def test_D4_a_class_only_in_val_is_an_error_with_the_closest_name(three_sides):
    fill(three_sides / "train" / "daisy", 3, RED, seed=500)
    fill(three_sides / "val" / "Daisies", 3, RED, seed=600)
    says = "'Daisies' has 3 photographs in val and none in train; the closest class is 'daisy'"
    refused(three_sides, "data.unknown_class", says, fix="rename it")


def test_D5_training_photographs_never_serve_as_val(two, tmp_path):
    only_train = tmp_path / "only"
    shutil.copytree(two, only_train / "train")
    refused(only_train, "data.no_val", str(only_train), fix=f"data.root: {only_train / 'train'}")
    refused(two, "data.no_train", "'cat', 'dog'", fix="data.split: stratified", split="folders")
    refused(two, "data.no_val", "val 0 and test 0", fix="data.val: 0.15", val=0.0, test=0.0)
    index = scan(two)
    assert not set(index.rows("train")) & set(index.rows("val"))


def test_D5_val_is_cut_out_of_train_where_only_test_is_given(three_sides):
    shutil.rmtree(three_sides / "val")
    index = scan(three_sides, val=0.25)
    assert [index.ledger.total(s) for s in ("train", "val", "test")] == [9, 3, 12]
    assert all(index.paths[i].startswith("test/") for i in index.rows("test"))
    assert "no val photographs were given: 25% of train serve as val" in index.ledger.warnings


def test_D6_nested_folders_are_refused_with_both_readings(tmp_path):
    for place in ("eu", "us"):
        for k, name in enumerate(("cat", "dog")):
            fill(tmp_path / "r" / place / name, 3, RED, seed=hash_of(place) + 10 * k)
    error = refused(
        tmp_path / "r",
        "data.nested",
        "12 images lie deeper than one folder, such as eu/cat/000.jpg",
        "leaf gives 2 classes ('cat', 'dog')",
        "path gives 4 classes ('eu/cat', 'eu/dog', 'us/cat' and 1 more)",
        fix="data.class_from: top, leaf or path",
    )
    assert len(error.faults) == 1
    assert scan(tmp_path / "r", class_from="leaf").classes == ("cat", "dog")
    assert scan(tmp_path / "r", class_from="path").classes[0] == "eu/cat"
    assert scan(tmp_path / "r", class_from="top").classes == ("eu", "us")


def hash_of(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:6], 16)


def test_D7_images_outside_class_folders_are_refused(two):
    fill(two, 3, RED, seed=50)
    says = "3 images lie outside any class folder: '000.jpg', '001.jpg', '002.jpg'"
    refused(two, "data.image_in_root", str(two), says, fix="move each into the folder of its class")
    fix = f"or name the folder above if this is one class: {two}"
    refused(two / "cat", "data.image_in_root", str(two / "cat"), "lie outside", fix=fix)


def test_D8_equal_bytes_across_the_split_are_listed_dropped_or_refused(three_sides):
    shutil.copy(three_sides / "train/a/000.jpg", three_sides / "test/a/copy.jpg")
    pair = ("test/a/copy.jpg", "train/a/000.jpg")
    index = scan(three_sides)
    assert index.ledger.leaks == (pair,)
    assert any("1 set of equal files on both sides" in w for w in index.ledger.warnings)
    cured = scan(three_sides, duplicates="drop_from_train")
    assert [d.path for d in cured.ledger.dropped] == ["train/a/000.jpg"]
    assert cured.ledger.leaks == ()
    assert cured.ledger.used == index.ledger.used - 1
    refused(
        three_sides,
        "data.leak",
        "stand in test and train: test/a/copy.jpg, train/a/000.jpg",
        fix="data.duplicates: drop_from_train",
        duplicates="error",
    )


def test_D9_equal_bytes_in_two_classes_are_contradicting_labels(two):
    shutil.copy(two / "cat/000.jpg", two / "dog/same.jpg")
    index = scan(two)
    assert index.ledger.duplicates_across == (("cat/000.jpg", "dog/same.jpg"),)
    a, b = index.paths.index("cat/000.jpg"), index.paths.index("dog/same.jpg")
    assert index.split[a] == index.split[b]
    assert any("1 set of equal files with contradicting" in w for w in index.ledger.warnings)
    refused(
        two,
        "data.contradiction",
        "labels 'cat', 'dog' for the same bytes: cat/000.jpg, dog/same.jpg",
        fix="relabel or drop it in data.fixes",
        duplicates="error",
    )


def test_D10_near_duplicates_are_never_dropped_by_the_scan(two):
    Image.open(two / "cat/000.jpg").save(two / "cat/again.jpg", quality=40)
    index = scan(two, duplicates="drop_from_train")
    assert {"cat/000.jpg", "cat/again.jpg"} <= set(index.paths)
    assert index.ledger.duplicates_within == ()


def test_D11_a_group_is_never_split_apart(tmp_path):
    root = tmp_path / "r"
    rows = ["path,label,group"]
    for k, name in enumerate(("cat", "dog")):
        for path in fill(root / name, 12, RED, seed=100 * k):
            rows.append(f"{name}/{path.name},{name},{name}-{int(path.stem) // 3}")
    table = root / "t.csv"
    table.write_text("\n".join(rows))
    by_column = scan(table)
    by_pattern = scan(root, group=r"(?P<g>^[^/]+/\d\d)")
    for index in (by_column, by_pattern):
        sides = {}
        for group, side in zip(index.group, index.split, strict=True):
            sides.setdefault(group, set()).add(side)
        assert len(sides) > 2
        assert all(len(s) == 1 for s in sides.values())
    matches_nothing = r"patient(?P<g>\d+)"
    refused(root, "data.group", "matches none of 24", fix="data.group", group=matches_nothing)
    refused(root, "data.group", "a single group", fix="finer data.group", group="parent")


def test_D11_a_group_that_given_folders_cut_is_reported(three_sides):
    index = scan(three_sides, group=r"/(?P<g>a)/")
    assert any("1 group on both sides" in w for w in index.ledger.warnings)


def test_D12_a_single_class_is_refused(tmp_path):
    fill(tmp_path / "r" / "cat", 5, RED)
    refused(tmp_path / "r", "data.one_class", "only one class, 'cat'", fix="another class")


def test_D13_five_thousand_classes_of_two_stay_small_and_readable(tmp_path):
    for k in range(5000):
        folder = tmp_path / "r" / f"c{k:04d}"
        folder.mkdir(parents=True)
        for i in range(2):
            (folder / f"{i}.bmp").write_bytes(bmp(2 * k + i))
    index = data.scan(DataSpec(root=str(tmp_path / "r")), seed=0)
    assert len(index.classes) == 5000
    assert [index.ledger.total(s) for s in ("train", "val", "test")] == [5000, 0, 5000]
    lines = index.ledger.lines()
    assert len(lines) < 60
    assert max(map(len, lines)) < 300
    assert "(5,000 classes; the 10 largest and 10 smallest are shown)" in lines


def bmp(number: int) -> bytes:
    """A 1x1 BMP whose colour spells a number."""
    head = b"BM" + (58).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    info = (40).to_bytes(4, "little") + (1).to_bytes(4, "little") * 2 + b"\1\0\x18\0" + bytes(24)
    return head + info + number.to_bytes(3, "little") + b"\0"


def test_D14_shares_outside_their_range_are_refused(two):
    from vitft import recipe

    for value in ("1", "1.2", "-0.1", '"20%"'):
        with pytest.raises(RecipeError, match=r"data\.val"):
            recipe.parse("mode: head", "r.yaml", Path(), [f"data.val={value}"])
    says = "together below 1, got val 0.6 and test 0.4"
    refused(two, "data.fractions", says, fix="share for training", val=0.6, test=0.4)


def test_D15_a_share_that_rounds_to_none_still_gives_one(two):
    fill(two / "yak", 3, BLUE, seed=700)
    ledger = scan(two).ledger
    assert ledger.counts["yak"] == {"train": 1, "val": 1, "test": 1}
    assert any("share rounds to 0" in w and "'yak' (3)" in w for w in ledger.warnings)


def test_D16_names_that_read_alike_are_pointed_out(tmp_path):
    cafe = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
    for k, name in enumerate(("Cat", "cat", "cat ", *cafe, "dog")):
        fill(tmp_path / "r" / name, 3, RED, seed=10 * k)
    index = scan(tmp_path / "r")
    assert len(index.classes) == 6
    assert "classes that read alike: 'Cat', 'cat', 'cat '" in index.ledger.warnings
    assert sum("read alike" in w for w in index.ledger.warnings) == 2


def test_D17_class_order_is_fixed_by_name_and_saved(tmp_path):
    for k, name in enumerate(("9", "10", "a", "B")):
        fill(tmp_path / "r" / name, 3, RED, seed=10 * k)
    index = scan(tmp_path / "r")
    assert data.class_indices(index) == {"0": "10", "1": "9", "2": "B", "3": "a"}
    data.write_split(index, tmp_path / "split.csv")
    again = scan(tmp_path / "r", split=str(tmp_path / "split.csv"))
    assert again.classes == index.classes


CSV_ROWS = {
    "blank label": ("cat/000.jpg,", "label is blank"),
    "two labels": ("cat/001.jpg,dog", "has label 'dog' here and 'cat' on line 3"),
    "duplicate row": ("cat/001.jpg,cat", "stands on line 3 already"),
    "outside": ("../x.jpg,cat", "leads outside the folder"),
    "absolute": ("/etc/passwd,cat", "leads outside the folder"),
    "too many cells": ("cat/002.jpg,cat,1", "3 cells where the header names 2"),
    "line break in label": ('cat/003.jpg,"ca\nt"', "holds a line break"),
    "Latin-1": ("cat/004.jpg,caf\udce9", "is not UTF-8; is the file saved as Latin-1"),
    "Latin-1 path": ("caf\udce9.jpg,cat", "is not UTF-8; is the file saved as Latin-1"),
    "blank path": (",cat", "path is blank"),
}


def write_csv(file: Path, text: str) -> Path:
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    return file


def test_D18_every_bad_line_of_a_csv_is_listed_with_its_number(two):
    good = "path,label\ndog/000.jpg,dog\ncat/001.jpg,cat\n"
    bad = "".join(line + "\n" for line, _ in CSV_ROWS.values())
    table = write_csv(two / "t.csv", good + bad + "dog/001.jpg,dog\n")
    error = refused(table, "data.csv_row", str(table), fix="correct or remove the line")
    number = 4
    for fault, (line, text) in zip(error.faults, CSV_ROWS.values(), strict=True):
        assert fault.place == f"{table}:{number}"
        assert text in fault.text
        number += 1 + line.count("\n")


@pytest.mark.parametrize(
    ("content", "id", "says", "fix"),
    [
        (b"file;label\na;b\n", "data.csv_columns", "separator looks like ';'", "with commas"),
        (b"path\nx.jpg\n", "data.csv_columns", "no column 'label'", "path,label"),
        (b"path,label,label\nx,a,a\n", "data.csv_columns", "'label' twice", "path,label"),
        (b"path,label\n", "data.csv_empty", "no rows", "one line per photograph"),
        (b"", "data.csv_columns", "columns here: none", "path,label"),
        ("path,label\nx,a".encode("utf-16"), "data.csv_encoding", "UTF-16", "CSV UTF-8"),
        (b'path,label\ncat/000.jpg,"cat\n', "data.csv_row", "t.csv:2: not CSV", "correct"),
        (b"path,label\nx,1\ny,1.0\n", "data.csv_row", "'1.0' beside label '1'", "both alike"),
    ],
)
def test_D18_a_csv_of_another_form_is_refused(two, content, id, says, fix):
    (two / "t.csv").write_bytes(content)
    refused(two / "t.csv", id, says, str(two / "t.csv"), fix=fix)


def test_D18_a_byte_order_mark_and_quoted_names_are_fine(two):
    shutil.move(two / "cat/000.jpg", two / 'cat/a, "b"\nc.jpg')
    lines = ["path,label", '"cat/a, ""b""\nc.jpg",cat', "cat/001.jpg,cat", "dog/000.jpg,dog"]
    table = write_csv(two / "t.csv", "\ufeff" + "\r\n".join(lines))
    assert scan(table).paths == ("cat/001.jpg", 'cat/a, "b"\nc.jpg', "dog/000.jpg")


def test_D18_a_file_that_a_csv_names_and_nobody_has_is_refused(two):
    table = write_csv(two / "t.csv", "path,label\ncat/000.jpg,cat\ndog/000.jpg,dog\nno.jpg,dog\n")
    error = refused(table, "data.too_many_bad", "1 of 3 photographs (33.3%)", fix="data.max_bad")
    assert [f.id for f in error.faults if f.place == str(two / "no.jpg")] == ["data.missing"]


def test_D19_names_that_other_readers_turn_into_nothing_stay_names(two):
    names = ["NA", "null", "None", "NaN", "nan"]
    rows = [f"cat/{i:03d}.jpg,{name}" for i, name in enumerate(names)]
    table = write_csv(two / "t.csv", "\n".join(["path,label", *rows]))
    assert scan(table).classes == ("NA", "NaN", "None", "nan", "null")


def test_D20_names_that_yaml_would_read_as_something_else_stay_text(tmp_path):
    names = ("1e3", "no", "yes")
    for k, name in enumerate(names):
        fill(tmp_path / "r" / name, 3, RED, seed=10 * k)
    index = scan(tmp_path / "r")
    assert index.classes == names
    assert data.class_indices(index) == {"0": "1e3", "1": "no", "2": "yes"}


def test_D21_labels_that_look_like_several_are_pointed_out(two):
    rows = ["cat/000.jpg,cat", 'cat/001.jpg,"cat,dog"', "dog/000.jpg,dog|cat", "dog/001.jpg,dog"]
    index = scan(write_csv(two / "t.csv", "\n".join(["path,label", *rows])))
    assert any(
        "2 of 4 labels hold a separator, such as 'cat,dog'" in w for w in index.ledger.warnings
    )


def test_D22_a_root_that_is_no_folder_of_photographs_is_named_for_what_it_is(two, tmp_path):
    refused(
        tmp_path / "twoo", "data.root_missing", "no such file or folder", fix=f"did you mean {two}?"
    )
    refused(tmp_path / "x/y/z", "data.root_missing", f"only {tmp_path} exists", fix="data.root")
    text, near = instead(tmp_path / ("x" * 300) / "y")
    assert (text, near) == (f"only {tmp_path} exists of it", None)
    assert no_run(tmp_path / ("x" * 300), "no run", "name one")[1] == "name one"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x", "y")
    with tarfile.open(tmp_path / "a.tgz", "w:gz"):
        pass
    for name in ("a.zip", "a.tgz"):
        refused(tmp_path / name, "data.root_archive", "is an archive of", fix="unpack it")
    photo = two / "cat/000.jpg"
    refused(photo, "data.root_file", f"a file of {photo.stat().st_size:,} bytes", fix="path,label")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "data.root_empty", "0 folders; met no files", fix="name the folder")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "link", "data.root_missing", "a link to", "not there", fix="data.root")
    refused(tmp_path / "no.csv", "data.root_missing", "no such file or folder", fix="data.root")
    (two / "d.csv").mkdir()
    refused(two / "d.csv", "data.root_file", "is a folder", fix=".csv inside")


def test_D22_a_root_without_permission_is_named_with_its_mode(stranger):
    folder, become = stranger
    fill(folder / "r" / "a", 2, RED)
    (folder / "r").chmod(0o000)
    become()
    with pytest.raises(DataError, match=r"data\.root_permission.*mode 0000") as caught:
        data.scan(DataSpec(root=str(folder / "r")), seed=0)
    assert caught.value.exit_code == 3


def test_D23_extreme_imbalance_shows_the_baseline(two):
    fill(two / "rare", 1, RED, seed=600)
    fill(two / "cat", 100, RED, seed=1000)
    ledger = scan(two).ledger
    assert ledger.majority("train") == ("cat", 70 / 78)
    assert any("uneven, 1 to 100 photographs" in w for w in ledger.warnings)
    assert "always answering 'cat' would score 89.7% on train" in ledger.lines()


# ---- listing rows of the image table ------------------------------------------------------------


def test_I8_files_of_other_extensions_are_counted_and_the_top_three_named(two):
    for name in ("a.jpeg_large", "b.jpeg_large", "c", "d.txt", "e.txt", "f.txt", "g.pdf"):
        shutil.copy(two / "cat/000.jpg", two / "cat" / name)
    ledger = scan(two).ledger
    assert ledger.ignored == {
        "extension .jpeg_large": 2,
        "extension none": 1,
        "extension .txt": 3,
        "extension .pdf": 1,
    }
    assert ledger.warnings[0] == (
        "7 files ignored by extension: .txt (3), .jpeg_large (2), none (1); "
        "where photographs are among them: data.extensions: [.jpeg_large, .txt]"
    )
    assert (ledger.found, ledger.used) == (27, 20)


def test_I8_files_without_an_extension_are_told_without_a_hint(two):
    shutil.copy(two / "cat/000.jpg", two / "cat" / "c")
    assert scan(two).ledger.warnings[0] == "1 file ignored by extension: none (1)"


def test_I8_data_extensions_adds_to_what_is_read(two):
    shutil.copy(two / "cat/000.jpg", two / "cat/x.photo")
    assert scan(two, extensions=(".photo",)).ledger.used == 21


def test_I9_upper_case_extensions_are_read(two):
    for path in list((two / "cat").iterdir())[:4]:
        path.rename(path.with_suffix(".JPG"))
    assert scan(two).ledger.used == 20


def test_I21_an_unreadable_file_is_refused_with_owner_and_mode(stranger):
    folder, become = stranger
    fill(folder / "r" / "a", 3, RED)
    fill(folder / "r" / "b", 3, BLUE, seed=50)
    (folder / "r/a/001.jpg").chmod(0o000)
    become()
    ledger = data.scan(DataSpec(root=str(folder / "r"), max_bad=0.5), seed=0).ledger
    assert [(r.path, r.id) for r in ledger.refused] == [("a/001.jpg", "data.permission")]
    assert f"owner uid {os.lstat(folder / 'r').st_uid}" in ledger.refused[0].text
    assert "----------" in ledger.refused[0].text


def test_I22_an_unreadable_folder_is_an_error_not_a_missing_class(stranger):
    folder, become = stranger
    for k, name in enumerate("abc"):
        fill(folder / "r" / name, 3, RED, seed=10 * k)
    (folder / "r/b").chmod(0o000)
    become()
    with pytest.raises(DataError, match=r"data\.unreadable_folder.*/b: .*mode 0000, owner \d+"):
        data.scan(DataSpec(root=str(folder / "r")), seed=0)


def test_I23_a_broken_link_is_refused_with_its_target(two):
    (two / "cat/x.jpg").symlink_to("/nope.jpg")
    (two / "cat/y.jpg").symlink_to("y.jpg")
    ledger = scan(two, max_bad=0.5).ledger
    assert [(r.path, r.id) for r in ledger.refused] == [
        ("cat/x.jpg", "data.broken_link"),
        ("cat/y.jpg", "data.broken_link"),
    ]
    assert "/nope.jpg" in ledger.refused[0].text


def test_I24_a_link_loop_gives_each_photograph_once(two):
    (two / "cat/loop").symlink_to(two)
    (two / "dog/up").symlink_to("..")
    index = scan(two)
    assert index.ledger.used == 20
    assert index.ledger.not_entered == {"reached before through another path": 2}
    assert any("2 folders are links to folders read already" in w for w in index.ledger.warnings)


def test_I24_a_link_never_takes_the_place_of_the_real_folder(two):
    (two / "aaa").symlink_to(two / "dog")
    index = scan(two)
    assert index.classes == ("cat", "dog")
    assert sum(p.startswith("dog/") for p in index.paths) == 10
    assert any("not read again: 'aaa'" in w for w in index.ledger.warnings)


def test_I25_links_that_leave_the_root_are_followed_and_counted(two, tmp_path):
    fill(tmp_path / "elsewhere", 5, RED, seed=300)
    (two / "eel").symlink_to(tmp_path / "elsewhere")
    (two / "cat/one.jpg").symlink_to(tmp_path / "elsewhere/000.jpg")
    index = scan(two)
    assert index.classes == ("cat", "dog", "eel")
    assert any("2 symbolic links lead outside" in w for w in index.ledger.warnings)
    assert index.ledger.duplicates_across == (("cat/one.jpg", "eel/000.jpg"),)
    closed = scan(two, follow_links=False).ledger
    assert closed.ignored == {"symbolic link": 1}
    assert closed.not_entered == {"symbolic link": 1}


@pytest.mark.timeout(20)
def test_I26_pipes_and_sockets_are_refused_and_never_read(two):
    os.mkfifo(two / "cat/pipe.jpg")
    (two / "dog/null.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(two)
        server.bind("cat/socket.jpg")
        ledger = scan(two, max_bad=0.5).ledger
    found = {r.path: (r.id, r.text) for r in ledger.refused}
    assert {id for id, _ in found.values()} == {"data.not_regular"}
    assert "a pipe" in found["cat/pipe.jpg"][1]
    assert "a device" in found["dog/null.jpg"][1]
    assert "a socket" in found["cat/socket.jpg"][1]


def test_I27_a_file_that_vanishes_while_scanning_is_named(two, monkeypatch):
    def list_then_lose(spec):
        listing = sources.list_photographs(spec)
        (two / "cat/003.jpg").unlink()
        return listing

    monkeypatch.setattr(data, "list_photographs", list_then_lose)
    index = data.scan(DataSpec(root=str(two), max_bad=0.5), seed=0)
    assert [(r.path, r.id) for r in index.ledger.refused] == [("cat/003.jpg", "data.missing")]
    assert "cat/003.jpg" not in index.paths


NAMES = {
    "I28 spaces": "a photo of mine.jpg",
    "I28 emoji": "🌻.jpg",
    "I28 NFC": unicodedata.normalize("NFC", "é.jpg"),
    "I28 NFD": unicodedata.normalize("NFD", "é.jpg"),
    "I29 newline": "a\nb.jpg",
    "I29 tab, comma, quote": 'a\t,";b.jpg',
    "I29 carriage return": "a\rb.jpg",
    "I29 escape": "\x1b[31mred.jpg",
    "I29 formula": "=1+1.jpg",
    "I30 not UTF-8": os.fsdecode(b"caf\xe9.jpg"),
}


def test_I28_I29_I30_every_name_survives_the_way_to_split_csv_and_back(two, tmp_path):
    for k, name in enumerate(NAMES.values()):
        paint(two / "cat" / name, RED, size=16, seed=2000 + k)
    index = scan(two)
    assert {f"cat/{name}" for name in NAMES.values()} <= set(index.paths)
    data.write_split(index, tmp_path / "split.csv")
    again = scan(two, split=str(tmp_path / "split.csv"), seed=99)
    assert (again.paths, again.split) == (index.paths, index.split)
    assert b"cat/caf\xe9.jpg" in (tmp_path / "split.csv").read_bytes()
    assert all(index.file(i).is_file() for i in range(len(index.paths)))


def test_I29_control_characters_are_escaped_on_the_console(two):
    shutil.copy(two / "cat/000.jpg", two / "dog/\x1b[31m\nred.jpg")
    text = "".join(scan(two).ledger.lines())
    assert r"\x1b[31m\nred.jpg" in text
    assert "\x1b" not in text
    assert "\n" not in text


def test_I31_hidden_and_system_files_are_ignored_and_counted(two):
    for name in ("._000.jpg", ".DS_Store", ".hidden.jpg", "Thumbs.db"):
        (two / "cat" / name).write_bytes(b"x")
    fill(two / "__MACOSX" / "cat", 2, RED)
    ledger = scan(two).ledger
    assert ledger.ignored == {"AppleDouble (._*)": 1, "hidden": 2, "system file": 1}
    assert ledger.not_entered == {"__MACOSX": 1}
    assert (ledger.found, ledger.used) == (24, 20)


def test_I32_hidden_folders_are_never_classes(two):
    for name in (".ipynb_checkpoints", ".thumbs"):
        fill(two / name, 2, RED)
    fill(two / "cat" / ".thumbs", 2, RED)
    index = scan(two)
    assert index.classes == ("cat", "dog")
    assert index.ledger.used == 20
    assert index.ledger.not_entered == {"hidden": 3}
