"""The scan: what it keeps, refuses, corrects and remembers, on small folders made here."""

import json
import os
import random
import shutil
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import paint
from PIL import Image

from vitft import contents, data, images, io, sources
from vitft.errors import DataError
from vitft.recipe import DataSpec

GREY = (120, 120, 120)


def scan(root: Path, *, seed: int = 0, deep: bool = False, **keys: object) -> data.Index:
    return data.scan(DataSpec(root=str(root), **keys), seed=seed, deep=deep)


def sides(index: data.Index) -> dict[str, str]:
    return dict(zip(index.paths, index.split, strict=True))


def cut_short(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the files whose pixels were decoded."""
    names: list[str] = []
    decode = images.decode

    def counting(data, place, spec, **more):
        names.append(Path(place).name)
        return decode(data, place, spec, **more)

    monkeypatch.setattr(images, "decode", counting)
    return names


def test_a_flat_folder_becomes_an_index_in_path_order(tiny_photos):
    index = scan(tiny_photos)
    assert index.classes == ("blue", "green", "red")
    assert list(index.paths) == sorted(index.paths)
    assert index.labels.dtype == np.int64
    assert index.labels.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert index.sha256[0] == io.sha256_file(index.file(0))
    assert index.ledger.counts == {c: {"train": 14, "val": 3, "test": 3} for c in index.classes}
    rows = {s: index.rows(s).tolist() for s in ("train", "val", "test")}
    assert sorted(sum(rows.values(), [])) == list(range(60))
    assert all(index.split[i] == s for s, mine in rows.items() for i in mine)


def test_the_ledger_adds_up_and_is_plain_json(tiny_photos):
    cut_short(tiny_photos / "red/red_00.jpg")
    (tiny_photos / "red/notes.txt").write_text("x")
    ledger = scan(tiny_photos, max_bad=0.1).ledger
    assert (ledger.found, ledger.used, len(ledger.refused)) == (61, 59, 1)
    plain = json.loads(json.dumps(ledger.as_dict()))
    assert plain["refused"][0]["id"] == "data.truncated"
    assert plain["majority"]["train"] == {"class": "blue", "share": 14 / 41}
    assert ledger.lines()[0] == ("61 files found = 59 used + 1 refused + 1 ignored + 0 dropped")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"found": 61}, "files found: 61, but the parts sum to 60"),
        ({"used": 59, "found": 59}, "files used, by class: 59, but the parts sum to 60"),
        ({"formats": {"JPEG": 61}}, "files used, by format: 60, but the parts sum to 61"),
    ],
)
def test_a_ledger_that_does_not_add_up_stops_the_run(tiny_photos, change, says):
    ledger = replace(scan(tiny_photos).ledger, **change)
    with pytest.raises(DataError, match=rf"data\.ledger.*{says}"):
        ledger.check()


def test_the_scan_itself_stops_on_a_file_that_is_not_accounted_for(tiny_photos, monkeypatch):
    def lose_one(spec):
        listing = sources.list_photographs(spec)
        return replace(listing, found=listing.found + 1)

    monkeypatch.setattr(data, "list_photographs", lose_one)
    with pytest.raises(DataError, match=r"data\.ledger.*61, but the parts sum to 60"):
        scan(tiny_photos)


# ---- split --------------------------------------------------------------------------------------


def test_the_split_follows_content_and_seed_not_names(tiny_photos, tmp_path):
    first = scan(tiny_photos)
    assert sides(scan(tiny_photos)) == sides(first)
    assert sides(scan(tiny_photos, seed=1)) != sides(first)
    renamed = tmp_path / "renamed"
    shutil.copytree(tiny_photos, renamed)
    for i, path in enumerate(sorted(renamed.glob("*/*.jpg"), reverse=True)):
        path.rename(path.with_name(f"{i}.jpeg"))
    by_content = dict(zip(first.sha256, first.split, strict=True))
    again = scan(renamed)
    assert dict(zip(again.sha256, again.split, strict=True)) == by_content


def test_bad_files_leave_before_the_split(tiny_photos, tmp_path):
    clean = tmp_path / "clean"
    shutil.copytree(tiny_photos, clean)
    (clean / "red/red_07.jpg").unlink()
    cut_short(tiny_photos / "red/red_07.jpg")
    assert sides(scan(tiny_photos, max_bad=0.1)) == sides(scan(clean))


def test_equal_files_stay_on_one_side_and_are_listed(tiny_photos):
    for i in range(5):
        shutil.copy(tiny_photos / "red/red_00.jpg", tiny_photos / f"red/copy_{i}.jpg")
    index = scan(tiny_photos)
    twins = ("red/copy_0.jpg", "red/copy_1.jpg", "red/copy_2.jpg", "red/copy_3.jpg")
    assert index.ledger.duplicates_within == ((*twins, "red/copy_4.jpg", "red/red_00.jpg"),)
    assert len({sides(index)[p] for p in index.ledger.duplicates_within[0]}) == 1
    assert index.ledger.used == 65


def test_the_tutorials_split_is_drawn_from_the_folder_as_it_lies(tiny_photos):
    paint(tiny_photos / "blue/aaa.jpeg", GREY, seed=900)  # not one of the tutorial's extensions
    paint(tiny_photos / "green/aab.PNG", GREY, seed=901)
    cut_short(tiny_photos / "red/red_03.jpg")
    index = scan(tiny_photos, split="tutorial", max_bad=0.5)
    dice, val = random.Random(0), set()
    for name in ("blue", "green", "red"):
        listed = sorted(p.name for p in (tiny_photos / name).iterdir() if p.suffix != ".jpeg")
        val |= {f"{name}/{file}" for file in dice.sample(listed, k=int(0.2 * len(listed)))}
    assert {p for p, s in sides(index).items() if s == "val"} == val - {"red/red_03.jpg"}
    assert set(index.split) == {"train", "val"}
    assert "blue/aaa.jpeg" not in index.paths
    assert any("no test set" in w for w in index.ledger.warnings)


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_split_folders_are_known_by_their_usual_names(tiny_photos, tmp_path, name):
    for split in ("train", name, "test"):
        shutil.copytree(tiny_photos, tmp_path / "r" / split)
    index = scan(tmp_path / "r")
    assert index.classes == ("blue", "green", "red")
    assert Counter(index.split) == {"train": 60, "val": 60, "test": 60}
    assert {p.split("/")[0] for p, s in sides(index).items() if s == "val"} == {name}


def test_folders_beside_the_splits_and_two_for_one_split_are_refused(tiny_photos, tmp_path):
    for split in ("train", "val", "valid", "misc"):
        shutil.copytree(tiny_photos, tmp_path / "r" / split)
    with pytest.raises(DataError, match=r"data\.layout.*two folders for val"):
        scan(tmp_path / "r", split="folders")
    shutil.rmtree(tmp_path / "r" / "valid")
    with pytest.raises(DataError, match=r"data\.layout.*beside the splits: 'misc'"):
        scan(tmp_path / "r", split="folders")


@pytest.mark.parametrize("split", ["auto", "folders", "stratified"])
def test_a_csv_may_carry_split_and_group(tiny_photos, split):
    rows = ["path,label,split,group"]
    for name in ("red", "blue"):
        for i in range(8):
            side = "train" if i < 4 else "val" if i < 6 else "test"
            rows.append(f"{name}/{name}_{i:02d}.jpg,{name},{side},g{i // 2}")
    table = tiny_photos / "t.csv"
    table.write_text("\n".join(rows))
    index = scan(table, split=split)
    assert index.root == tiny_photos
    assert index.group[:4] == ("g0", "g0", "g1", "g1")
    given = [row.split(",")[2] for row in sorted(rows[1:])]
    assert (list(index.split) == given) is (split != "stratified")


@pytest.mark.parametrize(
    ("column", "id", "says"),
    [
        (["train", "", "val", "test"], "data.no_split", "blank on 1 lines .first: 3."),
        (["train"] * 4, "data.no_val", "every line has split train"),
        (["val", "val", "test", "test"], "data.no_train", "splits here: test, val"),
        (["train", "dev", "val", "test"], "data.csv_row", "t.csv:3.*got 'dev'"),
    ],
)
def test_a_split_column_that_cannot_be_meant_is_refused(tiny_photos, column, id, says):
    rows = [f"red/red_{i:02d}.jpg,{'ab'[i % 2]},{s}" for i, s in enumerate(column)]
    table = tiny_photos / "t.csv"
    table.write_text("\n".join(["path,label,split", *rows]))
    with pytest.raises(DataError, match=says) as caught:
        scan(table)
    assert caught.value.faults[0].id == id


def test_split_csv_given_back_gives_the_same_index_for_any_seed(tiny_photos, tmp_path):
    index = scan(tiny_photos, group=r"_(?P<g>\d)\d")
    data.write_split(index, tmp_path / "split.csv")
    assert (tmp_path / "split.csv").read_text().startswith("path,sha256,label,split,group\n")
    again = scan(tiny_photos, split=str(tmp_path / "split.csv"), seed=7)
    for name in ("paths", "classes", "sha256", "split", "group"):
        assert getattr(again, name) == getattr(index, name)
    assert np.array_equal(again.labels, index.labels)


def test_a_split_csv_that_differs_from_the_files_is_refused_line_by_line(tiny_photos, tmp_path):
    table = tmp_path / "split.csv"
    data.write_split(scan(tiny_photos), table)
    paint(tiny_photos / "blue/blue_00.jpg", GREY, seed=999)
    (tiny_photos / "blue/blue_01.jpg").unlink()
    cut_short(tiny_photos / "blue/blue_02.jpg")
    (tiny_photos / "blue/blue_03.jpg").rename(tiny_photos / "red/blue_03.jpg")
    with pytest.raises(DataError) as caught:
        scan(tiny_photos, split=str(table), max_bad=0.1)
    told = [(f.place.rsplit(":", 1)[1], f.text) for f in caught.value.faults]
    assert [line for line, _ in told] == ["2", "3", "4", "5"]
    assert "'blue/blue_00.jpg' has other bytes: sha256 " in told[0][1]
    assert told[1][1] == "'blue/blue_01.jpg' is not in the data"
    assert told[2][1] == "'blue/blue_02.jpg' cannot be read as a photograph any more"
    assert {f.id for f in caught.value.faults} == {"data.split_mismatch"}


def test_a_label_that_differs_from_split_csv_is_refused(tiny_photos, tmp_path):
    table = tmp_path / "split.csv"
    data.write_split(scan(tiny_photos), table)
    table.write_text(table.read_text().replace(",red,", ",blue,", 1))
    with pytest.raises(DataError, match="has label 'blue' in the table and 'red' here"):
        scan(tiny_photos, split=str(table))


def test_files_that_split_csv_does_not_name_are_left_out_and_counted(tiny_photos, tmp_path):
    table = tmp_path / "split.csv"
    data.write_split(scan(tiny_photos), table)
    paint(tiny_photos / "red/new.jpg", GREY, seed=999)
    ledger = scan(tiny_photos, split=str(table)).ledger
    assert ledger.ignored == {"not in the split file": 1}
    assert (ledger.found, ledger.used) == (61, 60)
    assert any("red/new.jpg" in w for w in ledger.warnings)


# ---- bad files ----------------------------------------------------------------------------------


def test_more_bad_files_than_allowed_stop_the_scan_with_all_of_them_named(tiny_photos):
    for i in range(2):
        cut_short(tiny_photos / f"red/red_{i:02d}.jpg")
        (tiny_photos / f"blue/blue_{i:02d}.jpg").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        scan(tiny_photos)
    first, *rest = caught.value.faults
    assert first.id == "data.too_many_bad"
    assert first.text == ("4 of 60 photographs (6.7%) cannot be used; data.max_bad allows 1.0%")
    assert [f.id for f in rest] == ["data.empty"] * 2 + ["data.truncated"] * 2
    assert scan(tiny_photos, max_bad=0.07).ledger.used == 56


def test_a_class_may_not_lose_more_than_a_tenth(tiny_photos):
    for i in range(3):
        cut_short(tiny_photos / f"red/red_{i:02d}.jpg")
    with pytest.raises(DataError, match=r"class 'red' loses 3 of 20 photographs \(at most 10%\)"):
        scan(tiny_photos, max_bad=0.06)


def test_on_bad_error_refuses_a_single_bad_file(tiny_photos):
    bad = cut_short(tiny_photos / "red/red_00.jpg")
    with pytest.raises(DataError, match=r"data\.truncated") as caught:
        scan(tiny_photos, on_bad="error", max_bad=1.0)
    assert [f.place for f in caught.value.faults] == [str(bad)]


def test_what_is_special_about_a_photograph_is_counted(tiny_photos):
    red = tiny_photos / "red"
    upright = Image.open(red / "red_00.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(red / "red_00.jpg", exif=exif)
    Image.open(red / "red_01.jpg").save(red / "really.png", "PNG")
    shutil.move(red / "really.png", red / "red_01.jpg")
    Image.open(red / "red_02.jpg").convert("RGBA").save(red / "a.png")
    Image.open(red / "red_03.jpg").resize((4, 30)).save(red / "b.png")
    assert scan(tiny_photos).ledger.noted == {
        "turned by EXIF": 1,
        "transparent": 1,
        "side under 10 pixels": 1,
        "extension of another format": 1,
    }


def test_dark_pictures_of_16_bits_ask_for_a_bit_range(tiny_photos):
    for i in range(2):
        ramp = np.linspace(0, 1000 + i, 400).reshape(20, 20).astype(np.uint16)
        Image.fromarray(ramp).save(tiny_photos / f"red/deep_{i}.png")
    says = "2 pictures of 16 bits reach only 1,001 of 65,535"
    warnings = scan(tiny_photos).ledger.warnings
    assert any(says in w and "data.bit_range: [0, 1023]" in w for w in warnings)


@pytest.mark.timeout(30)
def test_I34_a_file_that_takes_too_long_is_refused_and_the_rest_read(tiny_photos, monkeypatch):
    for_ever = threading.Event()
    decode = images.decode

    def hanging(data, place, spec, **more):
        if Path(place).name == "red_07.jpg":
            for_ever.wait(60)
        return decode(data, place, spec, **more)

    monkeypatch.setattr(images, "decode", hanging)
    ledger = data.scan(DataSpec(root=str(tiny_photos), max_bad=0.1), seed=0, seconds=0.5).ledger
    for_ever.set()
    assert [(r.path, r.id) for r in ledger.refused] == [("red/red_07.jpg", "data.slow")]
    assert ledger.refused[0].text == "not read and decoded within 0.5 s"
    assert ledger.used == 59


def test_the_deep_check_names_files_that_decode_and_are_damaged(tiny_photos):
    path = tiny_photos / "red/red_00.jpg"
    path.write_bytes(path.read_bytes()[:-200] + b"\xff\xd9")
    assert scan(tiny_photos).ledger.damaged == ()
    ledger = scan(tiny_photos, deep=True).ledger
    ((name, text),) = ledger.damaged
    assert name == "red/red_00.jpg"
    assert "JPEG" in text or "bytes" in text
    assert any("1 files are damaged but decode" in w for w in ledger.warnings)


# ---- corrections --------------------------------------------------------------------------------


def test_fixes_relabel_drop_and_keep_without_touching_the_folder(tiny_photos, tmp_path):
    before = {p: io.sha256_file(p) for p in tiny_photos.rglob("*.jpg")}
    fixes = tmp_path / "fixes.csv"
    fixes.write_text(
        "path,action,label\nred/red_00.jpg,relabel,blue\nred/red_01.jpg,drop,\n"
        "red/red_02.jpg,keep,\n"
    )
    index = scan(tiny_photos, fixes=str(fixes))
    assert index.classes[index.labels[index.paths.index("red/red_00.jpg")]] == "blue"
    assert index.ledger.relabelled == ("red/red_00.jpg",)
    assert [(d.path, d.reason) for d in index.ledger.dropped] == [("red/red_01.jpg", "fixes.csv")]
    (told,) = [w for w in index.ledger.warnings if w.startswith("data.fixes")]
    assert told.startswith("data.fixes relabelled 1 and dropped 1 photographs")
    assert not any(w.startswith("data.fixes") for w in scan(tiny_photos).ledger.warnings)
    assert {c: sum(n.values()) for c, n in index.ledger.counts.items()} == {
        "blue": 21,
        "green": 20,
        "red": 18,
    }
    assert {p: io.sha256_file(p) for p in tiny_photos.rglob("*.jpg")} == before


def test_fixes_meet_the_split_of_the_run_they_came_from(tiny_photos, tmp_path):
    table, fixes = tmp_path / "split.csv", tmp_path / "fixes.csv"
    index = scan(tiny_photos)
    data.write_split(index, table)
    fixes.write_text("path,action,label\nred/red_00.jpg,relabel,blue\nred/red_01.jpg,drop,\n")
    again = scan(tiny_photos, split=str(table), fixes=str(fixes))
    assert sides(again) == {p: s for p, s in sides(index).items() if p != "red/red_01.jpg"}
    data.write_split(again, table)  # with the new label in it
    assert sides(scan(tiny_photos, split=str(table), fixes=str(fixes))) == sides(again)


def test_every_bad_line_of_fixes_is_listed(tiny_photos, tmp_path):
    fixes = tmp_path / "fixes.csv"
    fixes.write_text(
        "path,action,label\nred/no.jpg,drop,\nred/red_00.jpg,delete,\nred/red_01.jpg,relabel,Blu\n"
    )
    with pytest.raises(DataError) as caught:
        scan(tiny_photos, fixes=str(fixes))
    assert [f.text for f in caught.value.faults] == [
        "'red/no.jpg' is not among the 60 photographs",
        "action must be keep, relabel or drop, got 'delete'",
        "label 'Blu' is no class; the closest class is 'blue'",
    ]


def test_fixes_made_for_other_bytes_are_refused(tiny_photos, tmp_path):
    fixes = tmp_path / "fixes.csv"
    fixes.write_text(f"path,action,label,sha256\nred/red_00.jpg,drop,,{'0' * 64}\n")
    with pytest.raises(DataError, match=r"data\.fixes.*red_00\.jpg: made for other bytes"):
        scan(tiny_photos, fixes=str(fixes))


# ---- verdict cache ------------------------------------------------------------------------------


def test_a_second_scan_hashes_and_does_not_decode(tiny_photos, decoded):
    first = scan(tiny_photos)
    assert len(decoded) == 60
    again = scan(tiny_photos)
    assert len(decoded) == 60
    assert again.ledger == first.ledger


def test_other_bytes_of_the_same_size_and_time_are_decoded_again(tiny_photos, decoded):
    scan(tiny_photos)
    path = tiny_photos / "red/red_00.jpg"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[:-20] + bytes(20))
    os.utime(path, ns=times)
    decoded.clear()
    ledger = scan(tiny_photos, max_bad=0.1).ledger
    assert decoded == ["red_00.jpg"]
    assert ledger.used + len(ledger.refused) == 60


def test_another_way_to_decode_has_other_verdicts(tiny_photos, decoded):
    scan(tiny_photos)
    scan(tiny_photos, background=(0, 0, 0))
    assert len(decoded) == 120


def test_refusals_are_found_again_and_never_cached(tiny_photos, decoded):
    cut_short(tiny_photos / "red/red_00.jpg")
    first = scan(tiny_photos, max_bad=0.1)
    decoded.clear()
    assert scan(tiny_photos, max_bad=0.1).ledger.refused == first.ledger.refused
    assert decoded == ["red_00.jpg"]


def cache_file() -> Path:
    (file,) = (io.cache_dir() / "verdicts").iterdir()
    return file


def test_a_cache_with_any_byte_changed_is_not_believed(tiny_photos, decoded):
    first = scan(tiny_photos)
    good = cache_file().read_bytes()
    dice = random.Random(5)
    spots = [0, 20, 80, len(good) - 1, *(dice.randrange(len(good)) for _ in range(40))]
    for spot in spots:
        cache_file().write_bytes(good[:spot] + bytes([good[spot] ^ 1]) + good[spot + 1 :])
        assert contents.load_verdicts(cache_file()) == {}
    for cut in (0, 10, len(good) // 2, len(good) - 1):
        cache_file().write_bytes(good[:cut])
        assert contents.load_verdicts(cache_file()) == {}
    assert scan(tiny_photos).ledger == first.ledger
    assert len(decoded) == 120
    assert cache_file().read_bytes() == good


def test_verdicts_read_back_as_they_were(tmp_path):
    header = images.Header("PNG", "I;16", 3, 4, 2, 0, True, False, 16)
    told = {
        "ab" * 32: contents.Verdict(header, 99, "Corrupt\n\x00 data"),
        "c": contents.Verdict(header),
    }
    (tmp_path / "v").write_bytes(contents.dump_verdicts(told))
    assert contents.load_verdicts(tmp_path / "v") == told


def test_two_data_sets_share_the_cache(tiny_photos, tmp_path, decoded):
    other = tmp_path / "other"
    for i in range(3):
        paint(other / "a" / f"{i}.jpg", GREY, seed=700 + i)
    shutil.copytree(tiny_photos / "red", other / "b")
    scan(tiny_photos)
    decoded.clear()
    scan(other)
    assert sorted(decoded) == ["0.jpg", "1.jpg", "2.jpg"]
    decoded.clear()
    scan(tiny_photos)
    assert decoded == []


def test_a_cache_that_cannot_be_written_does_not_stop_the_scan(tiny_photos, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(contents, "warn", told.append)
    (tiny_photos.parent / "file").write_text("in the way")
    monkeypatch.setenv("VITFT_CACHE", str(tiny_photos.parent / "file"))
    assert scan(tiny_photos).ledger.used == 60
    assert len(told) == 1
    assert told[0].startswith("the next scan will decode everything again: ")


# ---- real photographs ---------------------------------------------------------------------------


@pytest.mark.shared
def test_the_real_photographs_show_their_known_duplicates(flowers):
    index = scan(flowers)
    ledger = index.ledger
    assert (ledger.found, ledger.used, ledger.refused) == (3458, 3458, ())
    assert {c: sum(n.values()) for c, n in ledger.counts.items()} == {
        "daisy": 593,
        "dandelion": 880,
        "rose": 612,
        "sunflower": 561,
        "tulip": 812,
    }
    pairs = ("15922772266_1167a06620.jpg", "17291930305_79deae6a90_n.jpg")
    assert ledger.duplicates_across == tuple((f"rose/{p}", f"tulip/{p}") for p in pairs)
    assert ledger.duplicates_within == (
        (
            "sunflower/15069459615_7e0fd61914_n.jpg",
            "sunflower/15072973261_73e2912ef2_n.jpg",
        ),
    )
    assert ledger.leaks == ()
