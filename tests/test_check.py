"""The preflight: its ledger, exit codes, and the one file it may write."""

import csv
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import paint
from safetensors.torch import save_file

from vitft import check
from vitft.check import Options
from vitft.cli import door
from vitft.errors import DataError, MachineError, RecipeError, WeightsError

TOY = """\
mode: full
device: cpu
data: {{root: {root}, image_size: 32}}
model:
  name: vitflower_ti16
  weights: {weights}
  options: {{embed_dim: 32, depth: 1, num_heads: 2}}
"""


@pytest.fixture
def photos(tiny_photos, monkeypatch) -> Path:
    """Three classes of 20, and another folder to stand in."""
    (tiny_photos.parent / "here").mkdir()
    monkeypatch.chdir(tiny_photos.parent / "here")
    return tiny_photos


def spoil(photos: Path, count: int = 1) -> list[Path]:
    paths = [photos / f"red/red_{i:02d}.jpg" for i in range(count)]
    for path in paths:
        path.write_bytes(path.read_bytes()[:400])
    return paths


def damage(photos: Path) -> Path:
    """Decodes in Pillow, and libjpeg had to make up its end."""
    path = photos / "blue/blue_00.jpg"
    path.write_bytes(path.read_bytes()[:-200] + b"\xff\xd9")
    return path


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as text:
        return list(csv.DictReader(text))


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_good_data_print_their_ledger_and_write_nothing(photos, capsys):
    assert door(check.main, [str(photos)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "60 files found = 60 used + 0 refused + 0 ignored + 0 dropped"
    assert re.match(r"red +14 +3 +3$", out[4])
    assert files(Path()) == []


def test_a_few_bad_files_are_listed_and_do_not_fail(photos, capsys):
    for i in range(60):  # so that one bad file is under 1 %
        paint(photos / "green" / f"more_{i}.jpg", (40, 200, 40), size=16, seed=3000 + i)
    spoil(photos)
    assert door(check.main, [str(photos)]) == 0
    (file,) = files(Path())
    assert re.fullmatch(r"runs/check-\d{8}-\d{6}/bad_images\.csv", str(file))
    (row,) = rows(file)
    assert (row["path"], row["id"]) == ("red/red_00.jpg", "data.truncated")
    assert "bytes" in row["text"]
    assert row["fix"]
    assert "1 refused" in capsys.readouterr().out


def test_too_many_bad_files_exit_3_and_are_all_listed(photos, capsys):
    spoil(photos, 12)
    before = [(p, p.read_bytes()) for p in files(photos)]
    assert door(check.main, [str(photos), "--out", "found"]) == 3
    err = capsys.readouterr().err
    assert "error[data.too_many_bad]" in err
    assert "12 of 60 photographs (20.0%)" in err
    assert "... and 4 more" in err
    assert [r["path"] for r in rows(Path("found/bad_images.csv"))] == [
        f"red/red_{i:02d}.jpg" for i in range(12)
    ]
    assert [(p, p.read_bytes()) for p in files(photos)] == before


def test_strict_makes_a_single_bad_file_an_error(photos, capsys):
    for i in range(60):
        paint(photos / "green" / f"more_{i}.jpg", (40, 200, 40), size=16, seed=3000 + i)
    (bad,) = spoil(photos)
    assert door(check.main, [str(photos), "--strict"]) == 3
    assert f"error[data.truncated] {bad}:" in capsys.readouterr().err
    assert len(files(Path())) == 1


def test_I2_deep_finds_what_decodes_and_is_damaged(photos, capsys):
    path = damage(photos)
    assert door(check.main, [str(photos)]) == 0
    assert files(Path()) == []
    assert door(check.main, [str(photos), "--deep", "--out", "found"]) == 0
    (row,) = rows(Path("found/bad_images.csv"))
    assert (row["path"], row["id"]) == ("blue/blue_00.jpg", "data.damaged")
    assert row["text"].startswith("decodes, but: ")
    assert "damaged: 1" in capsys.readouterr().out
    with pytest.raises(DataError, match=re.escape(f"error[data.damaged] {path}")):
        check.check(photos, Options(deep=True, strict=True))


@pytest.mark.timeout(60)
def test_I34_a_file_has_five_seconds(photos, monkeypatch):
    seen = {}
    scan = check.data.scan
    monkeypatch.setattr(check.data, "scan", lambda *a, **k: seen.update(k) or scan(*a, **k))
    check.check(photos)
    assert seen["seconds"] == 5.0


def test_layout_faults_exit_3_and_write_no_list(photos, capsys):
    (photos / "empty").mkdir()
    assert door(check.main, [str(photos)]) == 3
    assert "error[data.empty_class]" in capsys.readouterr().err
    assert files(Path()) == []


def test_an_empty_list_is_written_where_a_place_was_named(photos):
    check.check(photos, Options(out=Path("found")))
    assert Path("found/bad_images.csv").read_text() == "path,id,text,fix\n"


def test_nothing_is_ever_written_below_the_data(photos, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(check, "warn", told.append)
    spoil(photos, 5)
    inside = photos / "red" / "found"
    with pytest.raises(RecipeError, match=r"cli\.out_in_data.*where vitft never writes"):
        check.check(photos, Options(out=inside))
    (photos.parent / "link").symlink_to(photos / "red")
    with pytest.raises(RecipeError, match=r"cli\.out_in_data"):
        check.check(photos, Options(out=Path("../link/found")))
    monkeypatch.chdir(photos)
    before = files(photos)
    with pytest.raises(DataError):
        check.check(".")
    assert files(photos) == before
    assert len(told) == 1
    assert told[0].startswith("bad_images.csv is not written")


def test_names_with_commas_newlines_and_bad_bytes_survive_in_the_list(photos):
    names = ["a,b.jpg", 'c"\n.jpg', os.fsdecode(b"d\xe9.jpg")]
    for name in names:
        (photos / "red" / name).write_bytes(b"")
    with pytest.raises(DataError):
        check.check(photos, Options(out=Path("found")))
    assert [r["path"] for r in rows(Path("found/bad_images.csv"))] == [f"red/{n}" for n in names]


def test_a_csv_is_checked_and_its_bad_lines_are_listed(photos):
    table = photos / "t.csv"
    table.write_text("path,label\nred/red_00.jpg,red\nblue/blue_00.jpg,\n")
    with pytest.raises(DataError, match=r"data\.csv_row.*t\.csv:3: label is blank"):
        check.check(table, Options(out=Path("found")))
    (row,) = rows(Path("found/bad_images.csv"))
    assert (row["path"], row["id"]) == ("t.csv:3", "data.csv_row")


def recipe(photos: Path, weights: str = "none") -> Path:
    path = photos.parent / "r.yaml"
    path.write_text(TOY.format(root=photos, weights=weights))
    return path


def test_a_recipe_is_checked_with_its_data_and_its_model(photos, capsys):
    assert door(check.main, [str(recipe(photos))]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "device: cpu"
    assert out[1].startswith("60 files found")
    assert re.match(r"model: vitflower_ti16, [\d,]+ parameters, 0 tensors from none", out[-1])
    assert files(Path()) == []


def test_faults_of_data_and_model_are_told_together(photos, capsys):
    spoil(photos, 5)
    shutil.copy(photos / "blue/blue_00.jpg", photos.parent / "w.pth")
    path = recipe(photos, weights=str(photos.parent / "w.pth"))
    assert door(check.main, [str(path)]) == 3
    err = capsys.readouterr().err
    assert "error[data.too_many_bad]" in err
    assert err.count("error[data.truncated]") == 5
    assert "error[ckpt." in err
    assert str(photos.parent / "w.pth") in err


def test_overrides_reach_the_recipe_and_nothing_else(photos):
    with pytest.raises(RecipeError, match=r"model\.nmae"):
        check.check(recipe(photos), overrides=["model.nmae=x"])
    with pytest.raises(MachineError, match=r"env\.no_device"):
        check.check(recipe(photos), overrides=["device=cuda:7"])
    with pytest.raises(RecipeError, match=r"cli\.not_a_recipe.*changes a recipe"):
        check.check(photos, overrides=["seed=1"])


def test_bare_weights_are_read_and_described(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, file)
    lines = check.check(file)
    assert lines[0] == f"{file}: safetensors, 2 tensors, 10 numbers, all finite"
    assert lines[1] == f"sha256 {check.io.sha256_file(file)}"


@pytest.mark.parametrize(
    ("spoiled", "id"),
    [
        (lambda b: b[: len(b) // 2], "ckpt."),
        (lambda b: b"version https://git-lfs.github.com/spec/v1\n", "ckpt."),
        (lambda b: b"<!doctype html><html></html>", "ckpt."),
    ],
)
def test_spoiled_weights_exit_4(tmp_path, spoiled, id, capsys):
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(200, 3)}, file)
    file.write_bytes(spoiled(file.read_bytes()))
    assert door(check.main, [str(file)]) == 4
    assert f"error[{id}" in capsys.readouterr().err


def test_weights_that_are_not_finite_exit_4(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.tensor([1.0, float("nan")])}, file)
    with pytest.raises(WeightsError, match=str(file)):
        check.check(file)


def test_a_missing_target_is_called_missing_data(photos, capsys):
    assert door(check.main, [str(photos) + "x"]) == 3
    assert f"did you mean {photos}?" in capsys.readouterr().err
