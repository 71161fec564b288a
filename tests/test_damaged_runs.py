"""Whatever has become of the files of a run, every door answers in words, and with its own code."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, paint
from rows import PLAIN, contents, interrupted, refused
from safetensors.torch import load_file, save_file
from test_train import network, trainer

from vitft import checkpoint, compare, explain, hubpage, io, near, predict, product, recipe, run
from vitft import verify as verifying
from vitft.cli import door
from vitft.errors import RecipeError, WeightsError

CODES = {0, 2, 3, 4, 5}  # each class of errors has its own; 1 is a bug of ours


def other_types(path: Path) -> None:
    """The same keys with values of another kind."""
    known = json.loads(path.read_text()) if path.suffix == ".json" else {}
    path.write_text(json.dumps(dict.fromkeys(known, "x")))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda p: p.write_bytes(b""),
    "cut": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "bytes": lambda p: p.write_bytes(random.Random(1).randbytes(2000)),
    "zeros": lambda p: p.write_bytes(bytes(300)),
    "a list": lambda p: p.write_bytes(b"[1, 2]" if p.suffix == ".json" else b"a,b\n1,2\n"),
    "no end of lists": lambda p: p.write_bytes(b"[" * 100_000),
    "other types": other_types,
    "a folder": a_folder,
    "a loop": a_loop,
}
FILES = (
    "metrics.json", "predictions.csv", "split.csv", "recipe.resolved.yaml", "env.json",
    "model/manifest.json", "model/config.json", "model/model.safetensors",
    "model/tables.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished probe, with the tables that predict uses."""
    home = tmp_path_factory.mktemp("finished")
    for k, rgb in enumerate(((200, 40, 40), (40, 200, 40), (40, 40, 200))):
        for i in range(20):
            paint(home / "photos" / "abc"[k] / f"{i:02d}.jpg", rgb, seed=100 * k + i)
    text = TINY.format(mode="probe", output=home / "runs", root=home / "photos")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VITFT_CACHE", str(home / "cache"))
        spec = recipe.parse(
            text, "tiny.yaml", home, ["probe.strengths=[1]", "trust.suspects=false"]
        )
        return run.run(spec).folder


@pytest.mark.parametrize("kind", DAMAGE)
def test_no_damage_of_a_finished_run_brings_out_a_foreign_error(finished, tmp_path, capsys, kind):
    photo = finished.parents[2] / "photos/a/00.jpg"
    wrong = []
    for number, name in enumerate(FILES):
        made = tmp_path / str(number)
        shutil.copytree(finished, made)
        DAMAGE[kind](made / name)
        for main, argv in (
            (compare.main, [finished, made]),
            (verifying.main, [made, "--device", "cpu"]),
            (predict.main, [made, photo, "--device", "cpu"]),
        ):
            code = door(main, [str(a) for a in argv])
            said = capsys.readouterr().err
            if code not in CODES or "Traceback" in said or (code and not said):
                wrong.append((name, main.__module__, code, said[-500:]))
    assert wrong == []


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_pages_made_of_a_run_do_without_what_is_damaged(finished, tmp_path, kind):
    net, card = product.load(finished)
    for number, name in enumerate(("metrics.json", "split.csv", "recipe.resolved.yaml")):
        made = tmp_path / str(number)
        shutil.copytree(finished, made)
        DAMAGE[kind](made / name)
        assert hubpage.page(card, made, "unknown", golden="").startswith("---\n")
        found = near.of_run(made, net, card, torch.device("cpu"))
        assert found is not None or name != "metrics.json"


def test_numbers_of_another_kind_never_reach_the_hub_page(finished, tmp_path):
    _, card = product.load(finished)
    mark = "<b>1</b>"
    rows = [{"name": mark, "recall": mark, "precision": 1.0, "support": mark}, mark]
    numbers = {"accuracy": mark, "macro_f1": True, "n": mark, "accuracy_interval": {"low": mark}}
    ledger = {"counts": {mark: mark, "a": {"train": mark}}, "used": mark, "found": [mark]}
    told = {"test": numbers | {"per_class": rows}, "ledger": ledger}
    (tmp_path / "metrics.json").write_text(json.dumps(told))
    page = hubpage.page(card, tmp_path, "unknown", golden="")
    assert "<b>" not in page
    assert page.count("&lt;b&gt;") >= 6


def test_a_table_of_a_run_leads_nowhere_else(finished, tmp_path, capsys):
    made = tmp_path / "made"
    shutil.copytree(finished, made)
    table = (made / "split.csv").read_text().splitlines()
    (made / "split.csv").write_text(
        "\n".join([table[0], "/etc/passwd" + table[1][table[1].index(",") :]])
    )
    refused(
        capsys, verifying.main, [made], code=3, id="data.csv_row",
        says=(f"{made / 'split.csv'}:2", "'/etc/passwd' leads outside"), fix="correct or remove",
    )  # fmt: skip


# --- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["photos/answers.csv", "photos/a/00.jpg", "link/x.csv", "model"])
def test_answers_never_replace_a_photograph_lie_among_them_or_in_a_sealed_model(
    finished, tmp_path, capsys, out
):
    photos = shutil.copytree(finished.parents[2] / "photos", tmp_path / "photos")
    (tmp_path / "link").symlink_to(photos / "b")
    model = shutil.copytree(finished / "model", tmp_path / "model")
    target = {"model": model / "model.safetensors"}.get(out, tmp_path / out)
    before = contents(tmp_path)
    refused(
        capsys, predict.main, [model, photos, "--csv", target], code=2, id="cli.out_in_data",
        says=(str(target), "where vitft never writes"), fix="name a place elsewhere",
    )  # fmt: skip
    if out != "model":
        png = target.with_suffix(".png")
        refused(
            capsys, explain.main, [model, photos, "-o", png], code=2, id="cli.out_in_data",
            says=(str(png), "where vitft never writes"), fix="name a place elsewhere",
        )  # fmt: skip
    assert contents(tmp_path) == before


def test_a_single_photograph_is_not_replaced_by_its_answer_or_map(finished, tmp_path, capsys):
    photo = tmp_path / "x.png"
    shutil.copy(finished.parents[2] / "photos/a/00.jpg", photo)
    before = contents(tmp_path)
    for main, argv in ((predict.main, ["--csv", photo]), (explain.main, ["-o", photo])):
        refused(
            capsys, main, [finished, photo, *argv], code=2, id="cli.out_in_data",
            says=(str(photo), "is read and never written"), fix="name a place elsewhere",
        )  # fmt: skip
    assert contents(tmp_path) == before


def test_an_output_that_leads_in_circles_is_outside_and_is_no_crash(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "data").mkdir()
    io.require_outside(tmp_path / "loop", [tmp_path / "data", tmp_path / "gone"])
    with pytest.raises(RecipeError, match=r"cli\.out_in_data"):
        io.require_outside(tmp_path / "loop", [tmp_path / "loop"])


# --- checkpoints that somebody else has sealed ---------------------------------------------------


def sealed_again(folder: Path, change: Callable[[dict, dict], object]) -> Path:
    """A checkpoint of which everything is as its manifest says, and which never was written so."""
    state = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / "state.safetensors")
    change(state, tensors)
    made = folder.parent / "step-99999999"
    with io.staged_dir(made) as staged:
        io.write_text(staged / "state.json", json.dumps(state))
        save_file(tensors, staged / "state.safetensors")
    return made


STATES: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "no step": (lambda s, t: s.pop("step"), "not that of a run: step"),
    "text for numbers": (lambda s, t: s.update(numbers="x"), "not that of a run: numbers"),
    "no history": (lambda s, t: s["numbers"].pop("history"), "numbers.history"),
    "odd history": (lambda s, t: s["numbers"].update(history=[1]), "numbers.history"),
    "odd best": (lambda s, t: s["numbers"].update(best={}), "numbers.best"),
    "no sums": (lambda s, t: s["numbers"].pop("loss_sum"), "does not fit this run: loss_sum"),
    "text for a count": (lambda s, t: s["numbers"].update(splits="2"), "fit this run: splits"),
    "no scaler": (lambda s, t: s["numbers"].pop("scaler"), "does not fit this run: scaler"),
    "before the first step": (lambda s, t: s.update(step=-1), "does not fit this run"),
    "after the last epoch": (lambda s, t: s.update(epoch=10**9), "epoch 1,000,000,000 of 3"),
    "a tensor less": (lambda s, t: t.pop("model/0.weight"), "the checkpoint's model"),
    "an average less": (lambda s, t: t.pop("ema/0.weight"), "the checkpoint's ema"),
    "a best less": (lambda s, t: t.pop("best/0.weight"), "the checkpoint's best"),
    "another shape": (lambda s, t: t.update({"model/0.bias": torch.ones(9)}), "0.bias"),
    "a slot too many": (lambda s, t: t.update({"optimizer/99/m": torch.ones(1)}), "optimizer/99/m"),
    "a slot too large": (
        lambda s, t: t.update({"optimizer/1/exp_avg": torch.ones(999)}),
        "optimizer/1/exp_avg [999] fits none",
    ),
    "a slot without a number": (lambda s, t: t.update({"optimizer/x": torch.ones(1)}), "fits none"),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The checkpoint after an epoch of three, whole."""
    home, paths = tmp_path_factory.mktemp("stopped"), []

    def save(snapshot: checkpoint.Snapshot) -> None:
        paths.append(checkpoint.save(home, snapshot, identity=IDENTITY, keep=9))

    trainer(network(), save=save).fit()
    return paths[0]


IDENTITY = {"mode": "full", "train.opt": "adamw"}


@pytest.mark.parametrize("name", STATES)
def test_a_sealed_checkpoint_that_no_run_can_have_written_is_refused_unused(
    stopped, tmp_path, name
):
    change, says = STATES[name]
    folder = shutil.copytree(stopped, tmp_path / "step-00000006")
    made = sealed_again(folder, change)
    assert io.verify_dir(made) == ()
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        trainer(net).fit(checkpoint.load(made, identity=IDENTITY))
    assert says in str(caught.value)
    assert "\nfix: " in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_sealed_checkpoint_of_tensors_that_are_a_pickle_runs_nothing(stopped, tmp_path):
    made = tmp_path / "step-00000007"
    with io.staged_dir(made) as staged:
        shutil.copy(stopped / "state.json", staged)
        (staged / "state.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(WeightsError, match=r"ckpt\."):
        checkpoint.load(made, identity=IDENTITY)


@pytest.mark.parametrize("key", ["mode", "train.opt"])
def test_going_on_anyway_is_not_for_a_state_of_another_meaning(stopped, key):
    other = IDENTITY | {key: "other"}
    with pytest.raises(WeightsError, match=rf"ckpt.other_run.*{key}.*\nfix: .*start anew"):
        checkpoint.load(stopped, identity=other, anyway=True)


@pytest.mark.parametrize(
    "options", ["depth: 3, embed_dim: 32", "depth: 2, embed_dim: 64"], ids=["deeper", "wider"]
)
def test_going_on_anyway_with_another_model_is_refused_and_never_half_loaded(
    tiny_recipe, tmp_path, monkeypatch, capsys, options
):
    spec = tiny_recipe("full", *PLAIN, "train.checkpoint_minutes=0")
    folder = interrupted(monkeypatch, spec, after=4)
    argv = [folder / "recipe.resolved.yaml", "--resume", folder, "--resume-anyway"]
    argv.append(f"model.options={{patch_size: 8, num_heads: 2, {options}}}")
    code = door(run.main, [str(a) for a in argv])
    err = capsys.readouterr().err
    assert code == 4, err  # overrides may stand behind the options
    assert "the checkpoint's model" in err
    assert "Traceback" not in err
