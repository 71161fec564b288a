"""The whole path on tiny photographs, in every mode; and what a run promises about its folder."""

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from rows import interrupted

from vitft import checkpoint, conflicts, io, keep, plan, prepare, product, recipe
from vitft.errors import BusyError, DataError, RecipeError, WeightsError
from vitft.predict import Predictor, doubts
from vitft.predict import main as predict_main
from vitft.run import _owned, main, run

FILES = {
    "recipe.yaml",
    "recipe.resolved.yaml",
    "env.json",
    "log.txt",
    "metrics.jsonl",
    "metrics.json",
    "split.csv",
    "class_indices.json",
    "predictions.csv",
    "confusion_matrix.csv",
    "report.html",
    "model",
}


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def assert_equal_tensors(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("mode", ["head", "full", "probe"])
def test_every_mode_leaves_the_whole_folder_and_learns_red_from_green(tiny_recipe, mode):
    result = run(tiny_recipe(mode))
    names = {p.name for p in result.folder.iterdir()} - {io.LOCK}
    assert names >= FILES
    assert "checkpoints" not in names
    assert result.scores.accuracy > 0.6
    assert result.scores.n == 9
    assert result.split == "test"
    stored = json.loads((result.folder / "metrics.json").read_text())
    assert stored["test"]["accuracy"] == result.scores.accuracy
    assert sum(map(sum, stored["test"]["confusion_matrix"])) == 9
    assert stored["backbone_frozen"] is (None if mode == "full" else True)
    assert json.loads((result.folder / "class_indices.json").read_text()) == {
        "0": "blue",
        "1": "green",
        "2": "red",
    }
    assert result.sentence.startswith(f"test accuracy {100 * result.scores.accuracy:.1f} % [")
    assert (result.folder.parent / "latest").resolve() == result.folder.resolve()


@pytest.mark.parametrize("mode", ["head", "full", "probe"])
def test_the_resolved_recipe_gives_the_same_tensors_bit_for_bit(tiny_recipe, mode):
    first = run(tiny_recipe(mode, "train.mixup=0.2" if mode == "full" else "seed=1"))
    again = run(recipe.load(first.folder / "recipe.resolved.yaml"))
    assert again.folder != first.folder
    assert_equal_tensors(first.folder, again.folder)
    np.testing.assert_array_equal(first.predictions.logits, again.predictions.logits)


def test_worker_processes_do_not_change_the_result(tiny_recipe):
    alone = run(tiny_recipe("full"))
    helped = run(tiny_recipe("full", "train.workers=2"))
    assert_equal_tensors(alone.folder, helped.folder)


@pytest.mark.parametrize("mode", ["head", "full", "probe"])
def test_predict_gives_the_runs_own_predictions_exactly(tiny_recipe, tmp_path, mode, capsys):
    result = run(tiny_recipe(mode))
    theirs = rows(result.folder / "predictions.csv")
    root = tmp_path / "photos"
    files = [str(root / r["path"]) for r in theirs]
    assert predict_main([str(result.folder), *files, "--csv", str(tmp_path / "p.csv")]) == 0
    ours = rows(tmp_path / "p.csv")
    assert len(ours) == len(theirs) == 9
    for a, b in zip(ours, theirs, strict=True):
        assert a["prediction"] == b["prediction"]
        columns = [k for k in b if k.startswith("p:")]
        assert [float(a[k]) for k in columns] == [float(b[k]) for k in columns]
    assert capsys.readouterr().out.count("%") == 27
    told = json.loads((result.folder / "metrics.json").read_text())
    temperature = told["trust"]["temperature"]
    assert temperature["value"] != 1
    assert temperature["interval"]["low"] <= temperature["value"] <= temperature["interval"]["high"]
    assert ("never saw" in temperature["on"]) == (mode != "full")
    assert product.load(result.folder)[1].extras["temperature"] == temperature
    loss = -np.mean([np.log(float(r[f"p:{r['label']}"])) for r in theirs])
    assert told["test"]["log_loss"] == pytest.approx(loss)  # of the probabilities that are told
    assert told["trust"]["calibration_after"]["log_loss"] == pytest.approx(loss)
    ends = told["test"]["log_loss_interval"]
    assert ends["low"] <= loss <= ends["high"]


@pytest.mark.parametrize("mode", ["head", "full"])
def test_timm_loads_the_product_and_gives_the_same_logits(tiny_recipe, mode):
    result = run(tiny_recipe(mode))
    ours, card = product.load(result.folder)
    x = torch.randn(4, 3, 32, 32)
    # weights that are made in inference mode are multiplied another way by torch 2.11
    folder = timm.create_model(f"local-dir:{result.folder / 'model'}", pretrained=True).eval()
    assert list(folder.pretrained_cfg["label_names"]) == ["blue", "green", "red"]
    by_file = timm.create_model(
        "vitflower_ti16",
        num_classes=3,
        checkpoint_path=str(result.folder / "model" / "model.safetensors"),
        **card.options,
    ).eval()
    with torch.inference_mode():
        expected = ours(x)
        assert torch.equal(folder(x), expected)
        assert torch.equal(by_file(x), expected)


def test_what_timm_has_not_is_refused_before_it_is_trained(tiny_recipe):
    options = "model.options={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, "
    spec = tiny_recipe("full", "export.as_timm=true", options + "pos_embed: sincos2d}")
    text = "vitflower_ti16 with pos_embed has no counterpart in timm"
    with pytest.raises(RecipeError, match=rf"export.as_timm.*{text}"):
        prepare.prepare(spec)


def test_a_machine_without_vitft_loads_the_as_timm_export(tiny_recipe):
    result = run(tiny_recipe("full", "export.as_timm=true"))
    net, _ = product.load(result.folder)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = net(x)
    code = (
        "import sys, torch, timm; "
        f"net = timm.create_model('local-dir:{result.folder / 'model'}', pretrained=True).eval(); "
        "assert 'vitft' not in sys.modules; assert type(net).__module__.startswith('timm'); "
        f"print(net(torch.tensor({x.tolist()})).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    torch.testing.assert_close(torch.tensor(eval(done.stdout)), expected, atol=1e-5, rtol=1e-5)


def test_the_card_says_what_is_needed_to_use_the_model(tiny_recipe):
    result = run(tiny_recipe("probe"))
    card = product.read_card(result.folder / "model" / "model.safetensors")
    assert card.classes == ("blue", "green", "red")
    assert card.metrics["accuracy"] == result.scores.accuracy
    assert card.metrics["split"] == "test"
    assert recipe.parse(card.recipe, "card.yaml", result.folder, []).mode == "probe"
    assert card.versions["torch"] == torch.__version__
    assert len(card.hashes["data"]) == 64


def test_one_flipped_byte_in_the_product_is_noticed(tiny_recipe):
    file = run(tiny_recipe("probe")).folder / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    with pytest.raises(WeightsError, match=r"ckpt.corrupt.*model.safetensors"):
        product.load(file)


def test_P7_an_unreadable_file_gets_its_row_and_exit_code_3(tiny_recipe, tmp_path, capsys):
    result = run(tiny_recipe("probe"))
    broken = tmp_path / "photos" / "red" / "broken.jpg"
    broken.write_bytes(b"<html>not found</html>")
    folder = tmp_path / "photos" / "red"
    assert predict_main([str(result.folder), str(folder), "--csv", str(tmp_path / "p.csv")]) == 3
    found = rows(tmp_path / "p.csv")
    assert len(found) == 21
    (bad,) = [r for r in found if r["error"]]
    assert bad["path"] == str(broken)
    assert bad["prediction"] == ""
    assert bad["error"].startswith("data.not_image")
    assert {r["sure"] for r in found} == {""}  # no threshold was asked for, so none is applied
    assert "error data.not_image" in capsys.readouterr().out


def test_predict_names_every_input_that_is_missing(tiny_recipe, tmp_path):
    result = run(tiny_recipe("probe"))
    with pytest.raises(DataError) as e:
        predict_main([str(result.folder), str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")])
    assert len(e.value.faults) == 2
    assert e.value.faults[0].id == "data.root_missing"


def test_P11_batch_composition_does_not_change_a_prediction(tiny_recipe, tmp_path):
    predictor = Predictor(run(tiny_recipe("probe")).folder, "cpu")
    files = sorted((tmp_path / "photos").rglob("*.jpg"))
    together = [a.probabilities for a in predictor(files)]
    alone = [next(iter(predictor([f]))).probabilities for f in files[:5]]
    for a, b in zip(together, alone, strict=False):
        np.testing.assert_array_equal(a, b)


def test_a_second_run_in_the_same_folder_is_refused(tiny_recipe):
    result = run(tiny_recipe("probe"))
    with (
        io.lock(result.folder, "test"),
        pytest.raises(BusyError, match=rf"env.busy.*{os.getpid()}"),
    ):
        run(tiny_recipe("probe"), resume=str(result.folder))


def test_the_data_are_not_touched(tiny_recipe, tmp_path):
    def state():
        return {p: p.read_bytes() for p in sorted((tmp_path / "photos").rglob("*")) if p.is_file()}

    before = state()
    run(tiny_recipe("full"))
    assert state() == before


def test_R18_what_is_refused_leaves_no_run_folder(tiny_recipe, tmp_path):
    with pytest.raises(RecipeError, match="model.unknown"):
        run(tiny_recipe("full", "model.name=vitflower_b17"))
    assert not (tmp_path / "runs").exists()


def test_nothing_to_resume_is_said(tiny_recipe, tmp_path):
    gone = tmp_path / "runs" / "gone"
    with pytest.raises(RecipeError) as caught:
        run(tiny_recipe("full"), resume=str(gone))
    assert str(caught.value) == (
        f"error[run.nothing_to_resume] {gone}: only {tmp_path} exists of it\n"
        "fix: leave out --resume to start anew; cached features are used again"
    )


def test_a_mistyped_run_to_resume_is_told_before_photographs_are_read(tiny_recipe, tmp_path):
    (tmp_path / "runs" / "lately").mkdir(parents=True)
    with pytest.raises(RecipeError, match="fix: did you mean .*lately") as caught:
        run(tiny_recipe("full", "data.root=/nowhere"), resume=str(tmp_path / "runs" / "latly"))
    assert caught.value.faults[0].id == "run.nothing_to_resume"


def test_resume_auto_starts_where_nothing_was_kept_and_says_so(tiny_recipe, tmp_path, caplog):
    caplog.set_level("INFO", logger="vitft")
    killed = tmp_path / "runs" / "tiny_full" / "20200101-000000"  # before its first checkpoint
    killed.mkdir(parents=True)
    first = run(tiny_recipe("full"), resume="auto")
    assert first.folder != killed
    assert not list(killed.iterdir())
    assert f"nothing to go on from in {killed.parent} yet, so this is a new run" in caplog.text
    with pytest.raises(RecipeError) as caught:
        run(tiny_recipe("full"), resume="auto")
    assert str(caught.value) == (
        f"error[run.nothing_to_resume] {first.folder}: this run is finished, with this recipe and "
        "these photographs\nfix: leave out --resume to start anew; cached features are used again"
    )
    (tmp_path / "photos" / "red" / "red_00.jpg").unlink()
    second = run(tiny_recipe("full"), resume="auto")  # of other photographs
    third = run(tiny_recipe("full", "seed=1"), resume="auto")
    assert len({r.folder for r in (first, second, third)}) == 3


def test_resume_auto_does_not_start_beside_a_run_under_way(tiny_recipe, tmp_path):
    young = tmp_path / "runs" / "tiny_full" / "20200101-000000"  # before its first checkpoint
    with io.lock(young, "vitft run tiny_full"):
        with pytest.raises(BusyError, match=rf"env.busy.*{os.getpid()}") as caught:
            run(tiny_recipe("full"), resume="auto")
        assert caught.value.faults[0].place == str(young)
        assert [f.name for f in young.parent.iterdir()] == [young.name]
    (young / io.LOCK).write_text('{"pid": 1, "host": "elsewhere"}')  # of one that was killed
    assert run(tiny_recipe("full"), resume="auto").folder != young


def test_keys_that_nothing_acts_on_are_warned_of(tiny_recipe, caplog, monkeypatch):
    asked, idle = [], conflicts.idle
    monkeypatch.setattr(conflicts, "idle", lambda r: asked.append(r) or idle(r))
    p = prepare.prepare(tiny_recipe("probe"))
    assert len(asked) == 1
    about_training, about_views = conflicts.idle(p.recipe)
    assert p.warnings == (about_training, about_views)
    assert about_training.startswith("nothing acts on train.epochs, train.batch_size, train.opt,")
    assert about_views.startswith("nothing acts on head.views")
    assert {about_training, about_views} <= {r.message for r in caplog.records}


@pytest.mark.parametrize("begun", [False, True])
def test_of_two_resumes_at_once_one_runs_and_one_is_told(tiny_recipe, tmp_path, monkeypatch, begun):
    """The second one asks in the midst of the first one's choice."""
    p = prepare.prepare(tiny_recipe("full"))
    base, find, got = tmp_path / "runs" / "tiny_full", keep.find, []
    if begun:
        (base / "20200101-000000" / "checkpoints" / "step-1").mkdir(parents=True)
        monkeypatch.setattr(checkpoint, "newest", lambda folder: folder if begun else None)

    def ask():
        try:
            with _owned(p, base, "auto") as (folder, _):
                got.append(folder)
        except BusyError as error:
            got.append(error)

    second = threading.Thread(target=ask)

    def with_another_in_between(*args):
        found = find(*args)
        if threading.current_thread() is not second:
            second.start()
            second.join(0.5)
        return found

    monkeypatch.setattr(keep, "find", with_another_in_between)
    with _owned(p, base, "auto") as (folder, goes_on):
        second.join(30)
        assert goes_on is begun
        assert [str(error.faults[0].place) for error in got] == [str(folder)]
        assert [f.name for f in base.iterdir()] == [folder.name]


def test_two_runs_of_one_second_get_two_folders_locked_from_the_start(
    tiny_recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(time, "strftime", lambda *_: "20200101-000000")
    base, (spec, locked) = tmp_path / "runs" / "tiny_full", (tiny_recipe("full"), [])
    replace = io.CALLS.replace

    def watched(source, target):
        if Path(target).parent == base and source.is_dir() and not source.is_symlink():
            locked.append((source / io.LOCK).is_file())
        replace(source, target)

    monkeypatch.setattr(io.CALLS, "replace", watched)
    with io.locked_dir([base / "20200101-000000"], "another"):
        assert run(spec).folder == base / "20200101-000000-2"
    assert locked == [True, True]


def test_resume_auto_does_not_start_anew_over_damaged_checkpoints(tiny_recipe, tmp_path):
    damaged = tmp_path / "runs" / "tiny_full" / "20200101-000000"
    (damaged / "checkpoints" / "step-00000004").mkdir(parents=True)
    with pytest.raises(RecipeError, match="it has checkpoints, and none of them is whole") as e:
        run(tiny_recipe("full"), resume="auto")
    assert e.value.faults[0].place == str(damaged)
    assert [f.name for f in damaged.parent.iterdir()] == [damaged.name]


def test_the_sentence_is_the_only_line_on_stdout(tiny_recipe, tmp_path, capsys):
    file = tmp_path / "r.yaml"
    file.write_text(recipe.dump(tiny_recipe("probe")))
    assert main([str(file)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1
    assert "· report: " in out[0]
    assert "· model: " in out[0]


def test_plan_measures_and_stops(tiny_recipe, tmp_path, capsys):
    file = tmp_path / "r.yaml"
    file.write_text(recipe.dump(tiny_recipe("head")))
    assert main([str(file), "--plan"]) == 0
    out = capsys.readouterr().out
    assert "trainable parameters: 99 of" in out
    assert "images/s" in out
    assert "minutes" in out
    assert not (tmp_path / "runs").exists()


def test_plan_of_a_ladder_that_augments_anew_counts_one_view_kept(tiny_recipe):
    p = prepare.prepare(tiny_recipe("ladder", "head.views=online"))
    assert "42 " in plan.plan(p)
    assert plan._seconds(p, {"train": 6, "val": 2, "test": 2}, 10.0, 0.0) == 1.0


def test_print_config_shows_every_default_and_loads_again(tiny_recipe, tmp_path, capsys):
    file = tmp_path / "r.yaml"
    file.write_text(recipe.dump(tiny_recipe("head")))
    assert main([str(file), "--print-config"]) == 0
    text = capsys.readouterr().out
    assert "label_smoothing" in text
    assert recipe.parse(text, "again.yaml", tmp_path, []) == recipe.load(file)


def test_the_tutorials_split_has_no_test_and_says_so(tiny_recipe):
    result = run(tiny_recipe("probe", "data.split=tutorial"))
    assert result.split == "val"
    assert result.scores.n == 12
    assert result.sentence.startswith("val accuracy")
    said = "The same photographs set the limit, so this says little."
    assert said in (result.folder / "report.html").read_text()
    tested = run(tiny_recipe("probe"))
    assert said not in (tested.folder / "report.html").read_text()


def test_online_views_train_the_same_head_through_the_backbone(tiny_recipe):
    result = run(tiny_recipe("head", "head.views=online"))
    assert json.loads((result.folder / "metrics.json").read_text())["backbone_frozen"] is True
    assert len(result.history) == 2


def test_a_second_run_reuses_every_feature(tiny_recipe, caplog):
    run(tiny_recipe("head"))
    again = run(tiny_recipe("head", "data.val=0.2"))
    text = (again.folder / "log.txt").read_text()
    assert "features: 0 computed" in text or "0 computed, " in text


def test_a_killed_full_run_is_resumed_to_the_same_bits(tiny_recipe, monkeypatch):
    options = ["train.checkpoint_minutes=0", "train.ema=0.9", "train.mixup=0.2"]
    whole = run(tiny_recipe("full", *options))
    stopped = interrupted(monkeypatch, tiny_recipe("full", *options), after=4)
    resumed = run(tiny_recipe("full", *options), resume="auto")
    assert resumed.folder == stopped != whole.folder
    assert_equal_tensors(whole.folder, resumed.folder)


def test_a_run_killed_before_its_report_is_finished_by_resuming(tiny_recipe, monkeypatch):
    from vitft import report

    def killed(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_recipe("full"))
    monkeypatch.undo()
    resumed = run(tiny_recipe("full"), resume="auto")
    assert [f.name for f in resumed.folder.parent.glob("2*")] == [resumed.folder.name]
    assert (resumed.folder / "report.html").exists()
    assert len(resumed.history) == 2
    assert_equal_tensors(run(tiny_recipe("full")).folder, resumed.folder)
    with pytest.raises(RecipeError, match="nothing_to_resume"):
        run(tiny_recipe("full"), resume="auto")


def test_a_run_is_never_written_below_the_data(tiny_recipe, tmp_path):
    inside = tmp_path / "photos" / "runs"
    with pytest.raises(RecipeError, match=r"run.below_data\] .*photos/runs.*\nfix: start it in"):
        run(tiny_recipe("full", f"output={inside}"))
    assert not inside.exists()


def test_the_ladder_measures_each_step_and_keeps_one(tiny_recipe):
    result = run(tiny_recipe("ladder", "ladder.stop=false"))
    stored = json.loads((result.folder / "metrics.json").read_text())
    assert [r["step"] for r in stored["ladder"]] == ["knn", "ridge", "logistic", "head"]
    assert [r["gain"] is None for r in stored["ladder"]] == [True, False, False, False]
    assert sum(r["kept"] for r in stored["ladder"]) == 1
    assert stored["backbone_frozen"] is True
    assert "The ladder" in (result.folder / "report.html").read_text()
    assert result.scores.accuracy > 0.6


def test_the_ladder_stops_where_a_gain_cannot_be_told_from_luck(tiny_recipe):
    result = run(tiny_recipe("ladder"))
    stored = json.loads((result.folder / "metrics.json").read_text())
    assert [r["step"] for r in stored["ladder"]][:2] == ["knn", "ridge"]
    assert len(stored["ladder"]) < 4
    log = (result.folder / "log.txt").read_text()
    assert "cannot be told from luck" in log
    assert "ladder.stop=false would try the rest too" in log


def test_the_ladder_measures_heads_that_have_not_learned_from_val(tiny_recipe, tmp_path):
    """Labels are noise, which a head can only know by heart; the kept one is solved again."""
    files = sorted((tmp_path / "photos").glob("*/*.jpg"))
    for i, file in enumerate(files):
        file.rename(tmp_path / "photos" / ("red", "green", "blue")[i % 3] / f"{i:02d}.jpg")
    steps = "ladder.steps=[ridge, logistic, blocks]", "ladder.stop=false", "train.blocks=1"
    told, logits = [], []
    for refit in ("false", "true"):
        options = *steps, "data.val=0.3", f"probe.refit={refit}"
        result = run(tiny_recipe("ladder", *options))
        ladder = json.loads((result.folder / "metrics.json").read_text())["ladder"]
        told.append([(r["step"], r["accuracy"], r["kept"]) for r in ladder])
        logits.append(result.predictions.logits)
    assert told[0] == told[1]
    assert told[0][0][2]  # ridge is kept
    assert not np.allclose(*logits)


def test_two_photographs_to_learn_from_leave_out_what_is_foreign(tiny_recipe, tmp_path):
    for name in ("red", "green"):
        for file in sorted((tmp_path / "photos" / name).iterdir())[3:]:
            file.unlink()
    shutil.rmtree(tmp_path / "photos" / "blue")
    found = run(tiny_recipe("probe")).findings
    assert found.foreign is None
    assert found.alarms is None
    assert "foreign pictures: 2 train photographs are too few to be unlike them" in found.left_out


def test_a_temperature_chosen_where_it_is_scored_is_said(tiny_recipe):
    result = run(tiny_recipe("full", "data.test=0"))
    assert result.split == "val"
    assert any(t.startswith("how the temperature does on other") for t in result.findings.left_out)
    page = (result.folder / "report.html").read_text()
    assert "the photographs that are scored chose it; set data.test to see" in page
    other = run(tiny_recipe("probe", "data.test=0")).findings  # folds of train
    assert not any(t.startswith("how the temperature does on other") for t in other.left_out)


def test_thresholds_of_a_head_that_knows_val_are_not_promised(tiny_recipe):
    page = (run(tiny_recipe("probe", "probe.refit=true")).folder / "report.html").read_text()
    assert "not with probe.refit" in page
    assert "too few val photographs" not in page


def test_the_ladder_may_end_with_fine_tuning(tiny_recipe):
    steps = "ladder.steps=[logistic, blocks, full]"
    result = run(tiny_recipe("ladder", steps, "ladder.stop=false", "train.blocks=1"))
    stored = json.loads((result.folder / "metrics.json").read_text())
    assert [r["step"] for r in stored["ladder"]] == ["logistic", "blocks", "full"]


def test_the_next_run_honours_the_fixes_that_a_run_proposed(tiny_recipe, tmp_path):
    """Planted: a photograph of red under blue is listed, relabelled and leaves the folder alone."""
    planted = tmp_path / "photos" / "blue" / "stranger.jpg"
    original = tmp_path / "photos" / "red" / "red_00.jpg"
    planted.write_bytes(original.read_bytes())
    original.unlink()
    before = sorted((tmp_path / "photos").rglob("*.jpg"))
    first = run(tiny_recipe("probe"))
    listed = {r["path"]: r for r in rows(first.folder / "fixes.csv")}
    assert (listed["blue/stranger.jpg"]["action"], listed["blue/stranger.jpg"]["label"]) in {
        ("relabel", "red"),
        ("drop", ""),
    }
    fixes, split = first.folder / "fixes.csv", first.folder / "split.csv"
    again = run(tiny_recipe("probe", f"data.fixes={fixes}", f"data.split={split}"))
    now = {r["path"]: r["label"] for r in rows(again.folder / "split.csv")}
    for path, fix in listed.items():
        assert now.get(path) == {"relabel": fix["label"], "drop": None}[fix["action"]]
    assert sorted((tmp_path / "photos").rglob("*.jpg")) == before
    assert len(again.folder.joinpath("fixes.csv").read_text().splitlines()) <= len(listed)


@pytest.mark.parametrize("refit", [True, False])
def test_nothing_is_promised_on_photographs_that_the_head_has_learned(tiny_recipe, tmp_path, refit):
    options = ["trust.max_error=0.45", f"probe.refit={json.dumps(refit)}", "probe.strengths=[1]"]
    result = run(tiny_recipe("probe", *options))
    trust = json.loads((result.folder / "metrics.json").read_text())["trust"]
    assert trust["abstain"]["promised"] is not refit
    assert ("probe.refit let the head learn" in trust["abstain"]["words"]) is refit
    assert any("probe.refit" in line for line in trust["left_out"]) is refit
    least = trust["abstain"]["threshold"]
    for answer in Predictor(result.folder, "cpu")(sorted((tmp_path / "photos").rglob("*.jpg"))):
        assert answer.sure is bool(answer.probabilities.max() >= least)
        assert bool(doubts(answer)) is (answer.foreign or not answer.sure)


@pytest.mark.parametrize(
    ("mode", "what"), [("head", "head seeds"), ("probe", "draws of the training photographs")]
)
def test_a_band_of_heads_stands_beside_the_interval(tiny_recipe, mode, what):
    """Bit for bit the same band each time, and as wide as what differs."""
    result = run(tiny_recipe(mode, "trust.head_seeds=3", "trust.foreign_alarms=0.2"))
    trust = json.loads((result.folder / "metrics.json").read_text())["trust"]
    band = trust["seed_band"]
    assert (band["count"], band["what"]) == (3, what)
    assert 0 <= band["low"] <= band["mean"] <= band["high"] <= 1
    assert f"3 {what}: " in (result.folder / "report.html").read_text()
    assert set(trust["seconds"]) >= {"leaks", "suspects", "seed band", "intervals", "nearest"}
    assert trust["foreign_alarms"]["n"] == 9
    again = run(tiny_recipe(mode, "trust.head_seeds=3"))
    stored = json.loads((again.folder / "metrics.json").read_text())["trust"]["seed_band"]
    assert stored == band
