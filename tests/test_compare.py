"""Run folders written by hand: the right answer, in the right words, or a refusal that says how."""

import csv
import json

import numpy as np
import pytest
from conftest import paint
from markup import Markup
from rows import contents

from vitft import compare, fetch, io, offline, recipe, stats
from vitft.cli import door
from vitft.errors import DataError, RecipeError

CLASSES = ("daisy", "rose")


def write_run(
    folder, right, *, photos=None, name="head", kind="test", labels=None, shas=None, paths=None
):
    """A finished run: photograph i is named correctly where right[i]; half of each class."""
    right = np.asarray(right, bool)
    n = len(right)
    labels = labels or [CLASSES[i % 2] for i in range(n)]
    shas = shas or [f"{i:064x}" for i in range(n)]
    paths = paths or [f"{label}/{i:03d}.jpg" for i, label in enumerate(labels)]
    split = [[p, s, la, kind, ""] for p, s, la in zip(paths, shas, labels, strict=True)]
    split.append(["daisy/trained.jpg", "f" * 64, "daisy", "train", ""])
    said = []
    for path, label, good in zip(paths, labels, right, strict=True):
        guess = label if good else CLASSES[1 - CLASSES.index(label)]
        probs = [0.8 if c == guess else 0.2 for c in CLASSES]
        said.append([path, label, guess, 0.8, *probs])
    order = np.random.default_rng(n).permutation(n)  # the order in the file means nothing
    io.write_csv(folder / "split.csv", ("path", "sha256", "label", "split", "group"), split)
    header = ("path", "label", "prediction", "confidence", *(f"p:{c}" for c in CLASSES))
    io.write_csv(folder / "predictions.csv", header, [said[i] for i in order])
    io.write_json(folder / "metrics.json", {"recipe": name})
    if photos is not None:
        spec = recipe.parse(
            f"mode: head\ndata: {{root: {json.dumps(str(photos))}}}", "r.yaml", photos
        )
        io.write_text(folder / "recipe.resolved.yaml", recipe.dump(spec))
    return folder


def marks(n, both, only_a, only_b):
    a = np.arange(n) < both + only_a
    b = (np.arange(n) < both) | (
        (np.arange(n) >= both + only_a) & (np.arange(n) < both + only_a + only_b)
    )
    return a, b


def cells(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.fixture
def two(tmp_path):
    a, b = marks(430, 380, 10, 16)
    return write_run(tmp_path / "a", a), write_run(tmp_path / "b", b, name="full")


def test_two_runs_are_compared_in_one_sentence(two, capsys):
    assert compare.main([str(f) for f in two]) == 0
    out = capsys.readouterr().out.splitlines()
    i = compare.compare([compare.read_run(f, x) for f, x in zip(two, "AB", strict=True)]).pairs[0]
    assert out[0].startswith("A  head   90.7 % [87.6, 93.1]  (390/430 test)  log loss 0.352")
    assert out[1].startswith("B  full   92.1 % [89.2, 94.3]  (396/430 test)  log loss 0.333")
    assert out[2] == (
        f"B better than A by 1.4 points {i.difference.interval.percent()}: not distinguishable on "
        "430 images (p = 0.33); about 2,500 would be needed"
    )
    assert len(out) == 3


def test_the_numbers_are_those_of_the_statistics_room(two):
    a, b = marks(430, 380, 10, 16)
    pair = compare.compare([compare.read_run(f, x) for f, x in zip(two, "AB", strict=True)]).pairs[
        0
    ]
    expected = stats.difference(a, b, strata=np.arange(430) % 2)
    assert (pair.difference.only_a, pair.difference.only_b) == (10, 16)
    assert pair.difference.p == expected.p
    assert pair.difference.interval.low == pytest.approx(expected.interval.low, abs=0.003)
    # six photographs more at ln .8 and not ln .2
    assert pair.loss == pytest.approx(-6 / 430 * np.log(4))
    assert pair.loss_interval.low < pair.loss < pair.loss_interval.high


def test_rows_are_matched_by_content_and_not_by_name(tmp_path, two):
    a, b = marks(430, 380, 10, 16)
    moved = write_run(tmp_path / "moved", b)
    for file, column in (("split.csv", 0), ("predictions.csv", 0)):
        rows = cells(moved / file)
        for row in rows[1:]:
            row[column] = "elsewhere/" + row[column]
        io.write_csv(moved / file, rows[0], rows[1:])
    runs = [compare.read_run(two[0], "A"), compare.read_run(moved, "B")]
    d = compare.compare(runs).pairs[0].difference
    assert (d.only_a, d.only_b) == (10, 16)


def test_other_test_photographs_are_refused_with_counts(tmp_path):
    one = write_run(tmp_path / "one", [1] * 10)
    shas = [f"{i:064x}" for i in range(4, 13)] + ["f" * 64]
    two = write_run(tmp_path / "two", [1] * 10, shas=shas)
    with pytest.raises(DataError, match="compare.other_test") as error:
        compare.main([str(one), str(two)])
    said = str(error.value)
    assert "tested on 10 photographs, A (" in said
    assert "6 are the same by content, 4 only in A, 4 only in B" in said
    assert "1 test photographs of one were trained on by the other" in said
    assert f"data.split={one / 'split.csv'}" in said


def test_runs_of_quite_other_photographs_are_told_so(tmp_path):
    one = write_run(tmp_path / "one", [1] * 3)
    two = write_run(tmp_path / "two", [1] * 3, shas=[f"{i:064x}" for i in range(700, 703)])
    with pytest.raises(DataError, match="0 are the same by content") as error:
        compare.main([str(one), str(two)])
    assert "fix: run one again on the photographs of the other: data.root" in str(error.value)


def test_other_labels_are_refused(tmp_path):
    one = write_run(tmp_path / "one", [1] * 6)
    labels = ["daisy", "rose", "daisy", "rose", "daisy", "daisy"]
    two = write_run(tmp_path / "two", [1] * 6, labels=labels)
    with pytest.raises(DataError, match="compare.other_labels") as error:
        compare.main([str(one), str(two)])
    assert "labels 1 of the same 6 photographs otherwise" in str(error.value)
    assert "daisy/005.jpg is 'daisy', not 'rose'" in str(error.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path, two):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"no finished run: it has no predictions\.csv, split\.csv"):
        compare.main([str(two[0]), str(tmp_path / "nothing")])


def test_a_damaged_run_is_refused(tmp_path, two):
    rows = cells(two[0] / "predictions.csv")
    rows[3][3] = "1.5"
    io.write_csv(two[0] / "predictions.csv", rows[0], rows[1:])
    with pytest.raises(DataError, match=r"probability is outside \[0, 1\]"):
        compare.read_run(two[0], "A")
    rows[3][3] = "high"
    io.write_csv(two[0] / "predictions.csv", rows[0], rows[1:])
    with pytest.raises(DataError, match="could not convert string to float: 'high'"):
        compare.read_run(two[0], "A")
    rows[3][0] = "daisy/unknown.jpg"
    io.write_csv(two[1] / "predictions.csv", rows[0], rows[1:])
    with pytest.raises(DataError, match=r"1 photographs that split\.csv lacks, such as daisy/unk"):
        compare.read_run(two[1], "B")


def test_one_run_is_not_enough(two, capsys):
    with pytest.raises(RecipeError, match="takes 2 to 26 run folders, got 1"):
        compare.main([str(two[0])])
    assert door(compare.main, [str(two[0])]) == 2
    assert door(compare.main, [str(two[0]), str(two[0] / "x")]) == 3
    assert "error[compare.not_a_run]" in capsys.readouterr().err


def test_a_run_against_itself_is_level(two, capsys):
    compare.main([str(two[0]), str(two[0])])
    assert "A and B are level: 0.0 points [-0.6, 0.6] on 430 images" in capsys.readouterr().out


def test_several_runs_pay_for_their_number(tmp_path, two):
    third = write_run(tmp_path / "c", np.arange(430) < 360)
    runs = [compare.read_run(f, x) for f, x in zip((*two, third), "ABC", strict=True)]
    result = compare.compare(runs)
    raw = [
        stats.difference(x.right, y.right).p
        for x, y in ((0, 1), (0, 2), (1, 2))
        for x, y in [(runs[x], runs[y])]
    ]
    assert [v.difference.p for v in result.pairs] == pytest.approx(list(stats.holm(raw)))
    assert [(v.a, v.b) for v in result.pairs] == [("A", "B"), ("A", "C"), ("B", "C")]
    assert "p is adjusted for 3 comparisons (Holm)" in result.notes[0]
    assert "A better than C by 7.0 points" in compare.text(result)


def test_the_reader_is_told_what_weakens_the_answer(tmp_path):
    a = write_run(tmp_path / "a", [1] * 20, kind="val")
    b = write_run(tmp_path / "b", [1] * 19 + [0], kind="val")
    rows = cells(b / "split.csv")
    rows[-1][1] = "e" * 64
    io.write_csv(b / "split.csv", rows[0], rows[1:])
    notes = compare.compare([compare.read_run(a, "A"), compare.read_run(b, "B")]).notes
    assert notes[0].startswith("only 20 images: one image is 5.0 points")
    assert notes[1].startswith("compared on val")
    assert notes[2] == "B and A were trained on different photographs"


def test_the_page_shows_the_disagreements(tmp_path):
    photos = tmp_path / "photos"
    n = 12
    files = [photos / CLASSES[i % 2] / f"{i:03d}.jpg" for i in range(n)]
    for i, file in enumerate(files):
        paint(file, (20 * i, 90, 90), seed=i)
    shas = [io.sha256_file(file) for file in files]
    a, b = marks(n, 6, 1, 3)
    runs = [
        write_run(tmp_path / "a", a, photos=photos, shas=shas),
        write_run(tmp_path / "b", b, photos=photos, shas=shas, name="<i>full"),
    ]
    files[7].write_bytes(files[8].read_bytes())  # changed since: its picture would be a lie
    target = tmp_path / "out" / "page.html"
    assert compare.main([*map(str, runs), "--html", str(target)]) == 0
    markup = Markup(target.read_text(encoding="utf-8"))
    assert markup.faults == []
    said = " ".join(" ".join(markup.text).split())
    assert "B better than A by 16.7 points" in said
    assert "Only A is right" in said
    assert "Only B is right" in said
    assert "<i>full" in said  # escaped in the source, whole for the reader
    assert "A: daisy 80 % B: rose 80 %" in said
    pictures = [v["src"] for tag, v in markup.tags if tag == "img"]
    assert len(pictures) == 3  # four photographs; one has other bytes now
    assert all(src.startswith("data:image/jpeg;base64,") for src in pictures)
    assert {f"{CLASSES[i % 2]}/{i:03d}.jpg" for i in range(n) if f"/{i:03d}.jpg" in said} == {
        f"{CLASSES[i % 2]}/{i:03d}.jpg" for i in (6, 7, 8, 9)
    }


def test_pictures_of_the_bundled_sample_are_on_the_page_and_none_is_downloaded(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(fetch, "dataset", lambda *a, **k: pytest.fail("asked the network"))
    files = sorted(offline.data_root("sample:flowers").rglob("*.jpg"))[:6]
    paths = [f"{f.parent.name}/{f.name}" for f in files]
    shas = [io.sha256_file(f) for f in files]
    for root, shown in (("sample:flowers", 6), ("flower_photos", 0)):
        home = tmp_path / root.replace(":", "-")
        runs = []
        for k, name in enumerate("ab"):
            marks_ = [k == 0] * 6
            folder = write_run(home / name, marks_, labels=["daisy"] * 6, shas=shas, paths=paths)
            spec = recipe.parse(f'mode: head\ndata: {{root: "{root}"}}', "r.yaml", home)
            io.write_text(folder / "recipe.resolved.yaml", recipe.dump(spec))
            runs.append(compare.read_run(folder, "AB"[k]))
        text = compare.page(compare.compare(runs))
        assert text.count("data:image/jpeg;base64,") == shown


def test_a_page_never_lies_in_the_data_nor_replaces_what_was_read(tmp_path):
    photos, right = tmp_path / "photos", np.arange(12) < 8
    for i in range(12):
        paint(photos / CLASSES[i % 2] / f"{i:03d}.jpg", (20 * i, 90, 90), seed=i)
    table = tmp_path / "list" / "photos.csv"
    io.write_text(table, "path,label\n")
    elsewhere = tmp_path / "list" / "daisy" / "000.jpg"  # a CSV names files and owns no folder
    paint(elsewhere, (90, 90, 90), seed=0)
    runs = [
        write_run(tmp_path / "a", right, photos=photos),
        write_run(tmp_path / "b", right, photos=table),
    ]
    refused = (
        photos / "page.html", photos / "daisy" / "000.jpg", table, elsewhere,
        runs[0] / "split.csv", runs[1] / "model" / "x.html",
    )  # fmt: skip
    (runs[1] / "model").mkdir()
    before = contents(tmp_path)
    for target in refused:
        with pytest.raises(RecipeError, match=r"cli\.out_in_data") as caught:
            compare.main([*map(str, runs), "--html", str(target)])
        assert str(target) in str(caught.value)
    assert contents(tmp_path) == before
    assert compare.main([*map(str, runs), "--html", str(tmp_path / "list" / "page.html")]) == 0


def test_the_page_needs_no_photographs(tmp_path, two):
    runs = [compare.read_run(f, x) for f, x in zip(two, "AB", strict=True)]
    third = compare.read_run(write_run(tmp_path / "c", np.arange(430) < 360), "C")
    for result in (compare.compare(runs), compare.compare([*runs, third])):
        markup = Markup(compare.page(result))
        assert markup.faults == []
        assert not [tag for tag, _ in markup.tags if tag == "img"]
    assert "Some runs are right" in " ".join(markup.text)
    level = compare.compare([runs[0], compare.read_run(two[0], "B")])
    assert "No photograph." in compare.page(level)
