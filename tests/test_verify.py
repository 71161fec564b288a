"""A run is verified against itself, and everything that changed is named."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import timm
from safetensors.torch import save_file

from vitft import io, recipe
from vitft.errors import DataError, RecipeError
from vitft.predict import Predictor
from vitft.run import run
from vitft.verify import _still, _weights, main, verify


@pytest.fixture
def finished(tiny_recipe):
    return run(tiny_recipe("head", "train.epochs=1")).folder


def named(folder):
    return {c.name: c for c in verify(folder, "cpu")}


def test_an_untouched_run_is_what_it_says(finished, capsys):
    assert main([str(finished), "--device", "cpu"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in out] == [
        ["same", "photographs:"],
        ["same", "weights:"],
        ["same", "model:"],
        ["same", "predictions:"],
        ["same", "accuracy:"],
    ]
    assert "largest difference of a probability 0.0e+00" in out[3]


def test_a_run_whose_keys_are_refused_together_by_now_is_still_verified(finished):
    """It was accepted once, and says what was done."""
    file = finished / "recipe.resolved.yaml"
    before = file.read_text()
    file.write_text(re.sub(r"sampling: \w+", "sampling: balanced", before))
    assert file.read_text() != before
    file.write_text(re.sub(r"class_weights: \w+", "class_weights: balanced", file.read_text()))
    with pytest.raises(RecipeError, match="count twice over"):
        recipe.load(file)
    assert recipe.of_run(finished).train.sampling == "balanced"
    assert all(c.ok for c in verify(finished, "cpu"))


def test_a_changed_and_a_missing_photograph_are_named(finished, tmp_path, capsys):
    red = tmp_path / "photos" / "red"
    (red / "red_00.jpg").write_bytes((red / "red_01.jpg").read_bytes())
    (red / "red_02.jpg").unlink()
    assert main([str(finished), "--device", "cpu"]) == 3
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("CHANGED photographs: 60 photographs")
    assert "1 changed: red/red_00.jpg" in line
    assert "1 missing: red/red_02.jpg" in line


def test_a_flipped_byte_in_the_product_ends_the_comparison(finished):
    file = finished / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    checks = named(finished)
    assert not checks["model"].ok
    assert "model.safetensors" in checks["model"].text
    assert "predictions" not in checks


def test_the_weights_of_a_hybrid_are_its_cnns(tiny_recipe, tmp_path):
    file = tmp_path / "cnn.safetensors"
    save_file(timm.create_model("resnet10t").state_dict(), file)
    keys = ("model.embed.backbone=resnet10t", f"model.embed.weights={file}", "train.epochs=1")
    keys += ("model.options={depth: 1, embed_dim: 32, num_heads: 2}",)
    folder = run(tiny_recipe("full", *keys)).folder
    checks = named(folder)
    assert all(check.ok for check in checks.values()), checks
    assert f"cnn.safetensors has sha256 {io.sha256_file(file)[:12]}" in checks["weights"].text
    page = (folder / "report.html").read_text()
    said = "vitflower_ti16 · weights none · on resnet10t with weights cnn.safetensors · mode full"
    assert said in page


def test_one_changed_byte_of_the_starting_weights_is_named(tiny_recipe, tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes((run(tiny_recipe("probe")).folder / "model/model.safetensors").read_bytes())
    was = io.sha256_file(file)
    spec = tiny_recipe("probe", f"model.weights={file}")
    assert _weights(spec, was).ok
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    changed = _weights(spec, was)
    assert not changed.ok
    assert changed.text == (f"{file} has sha256 {io.sha256_file(file)[:12]}, it was {was[:12]}")
    file.unlink()
    assert not _weights(spec, was).ok


def test_numbers_that_were_changed_by_hand_are_found(finished):
    file = finished / "metrics.json"
    stored = json.loads(file.read_text())
    stored["test"]["accuracy"] = 0.985
    file.write_text(json.dumps(stored))
    check = named(finished)["accuracy"]
    assert not check.ok
    assert "metrics.json says 0.9850" in check.text


def test_a_changed_prediction_is_named(finished):
    file = finished / "predictions.csv"
    lines = file.read_text().splitlines()
    cells = lines[1].split(",")
    cells[2] = next(c for c in ("red", "green", "blue") if c != cells[2])
    file.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n")
    check = named(finished)["predictions"]
    assert not check.ok
    assert f"1 now answered otherwise: {cells[0]}" in check.text


def test_a_folder_that_is_no_run_is_refused(finished, tmp_path):
    (tmp_path / "flowers").mkdir()
    with pytest.raises(
        DataError, match=r"no finished run: it has no metrics.json, rec.*\nfix: name"
    ):
        verify(tmp_path / "flowers")
    (tmp_path / "flowers/latest").symlink_to(finished)
    with pytest.raises(DataError, match=r"is a folder of runs.*\nfix: name one, such as .*latest"):
        verify(tmp_path / "flowers")
    with pytest.raises(DataError, match=f"only {tmp_path} exists of it") as e:
        verify(tmp_path / "flowrs" / "latest")
    assert e.value.faults[0].fix == f"did you mean {tmp_path / 'flowers/latest'}?"
    with pytest.raises(DataError, match=r"fix: name the folder of a finished run, such as runs/"):
        verify(tmp_path / "zzz")


@pytest.mark.parametrize(("precision", "allowed"), [("bfloat16", 0.04), ("float32", 9e-6)])
def test_rounding_of_what_was_measured_in_bfloat16_is_no_change(
    finished, monkeypatch, precision, allowed
):
    """On a GPU it was computed by other kernels, or is now computed in float32."""
    off = [0.0]

    class Rounded(Predictor):
        def __init__(self, path, device):
            super().__init__(path, device)
            self.card = replace(self.card, precision=precision)

        def __call__(self, files):
            for answer in super().__call__(files):
                p = answer.probabilities.copy()
                p[int(p.argmax())] -= off[0]
                yield replace(answer, probabilities=p)

    monkeypatch.setattr("vitft.verify.Predictor", Rounded)
    for off[0], ok in ((allowed, True), (3 * allowed, False)):
        check = named(finished)["predictions"]
        assert check.ok is ok, check
    told = "(0.05 allowed: it was measured in bfloat16)"
    assert (told in check.text) == (precision == "bfloat16")


@pytest.mark.parametrize(
    ("said", "still"), [("red", True), ("blue", True), ("green", False), ("grey", False)]
)
def test_an_answer_that_rounding_decides_is_not_another_one(said, still):
    now = np.array([0.47, 0.03, 0.50])
    assert _still(said, now, ("blue", "green", "red"), 0.05) is still
    assert _still("blue", now, ("blue", "green", "red"), 1e-5) is False
