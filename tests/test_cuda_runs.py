"""On a card: whole runs from photographs to report, stopped ones, launched ones, and other doors.

Single updates, batches and memory are in test_cuda.py; card.py says how both are started.
"""

import csv
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from card import CARD, CPU, DEVICE, MARKS, gap, needs_a_compiler
from conftest import TINY, paint
from PIL import Image
from rows import interrupted
from runs import STRICT, TESTS, tensors

from vitft import demo, explain, predict
from vitft.errors import DivergedError
from vitft.predict import Predictor
from vitft.run import run
from vitft.verify import verify

pytestmark = MARKS
EXACT = ("train.amp=none", "head.precision=float32", "train.opt=sgd", "train.lr=0.02")
HALF = 0.05  # of a probability, between bfloat16 on a card and float32


@pytest.fixture
def finished(tiny_recipe, tmp_path, monkeypatch):
    """(mode, *overrides) -> the result of a run, with a cache of its own for each device."""

    def make(mode, *keys, device=DEVICE, **how):
        monkeypatch.setenv("VITFT_CACHE", str(tmp_path / f"cache-{device.type}"))
        return run(tiny_recipe(mode, f"device={device}", *keys), **how)

    return make


def stored(folder):
    """Photographs, predictions and probabilities [N, C] of a run's predictions.csv."""
    with (folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [c for c in rows[0] if c.startswith("p:")]
    values = np.array([[float(row[c]) for c in names] for row in rows])
    photos = folder.parents[2] / "photos"
    return [photos / row["path"] for row in rows], [row["prediction"] for row in rows], values


def assert_predicts_as_stored(folder, device, limit):
    files, names, wanted = stored(folder)
    predictor = Predictor(folder, str(device))
    found = np.stack([answer.probabilities for answer in predictor(files)])
    apart = np.abs(found - wanted).max()
    assert apart <= limit, f"on {device} probabilities differ by {apart:.1e}, {limit:.0e} allowed"
    clear = np.sort(wanted)[:, -1] - np.sort(wanted)[:, -2] > 2 * limit
    now = [predictor.card.classes[k] for k in found.argmax(axis=1)]
    other = [f for f, a, b, c in zip(files, now, names, clear, strict=True) if a != b and c]
    assert not other, f"on {device} answered otherwise: {other}"


def assert_whole(result, limit=1e-4):
    """The product says what the run wrote; the report and its numbers are there."""
    folder = result.folder
    assert (folder / "report.html").stat().st_size > 10_000
    told = json.loads((folder / "env.json").read_text())
    assert told["device"] == str(DEVICE), told
    assert np.isfinite(result.predictions.logits).all()
    assert_predicts_as_stored(folder, DEVICE, limit)


def assert_verifies(folder, device):
    checks = verify(folder, str(device))
    bad = [f"{c.name}: {c.text}" for c in checks if not c.ok]
    assert not bad, f"on {device}: {bad}"


def losses(result):
    return [record["train_loss"] for record in result.history]


@pytest.mark.parametrize("precision", ["auto", "float32"])
@pytest.mark.parametrize("mode", ["head", "probe", "full"])
def test_a_run_ends_in_a_product_that_says_the_same_on_both_devices(finished, mode, precision):
    result = finished(mode, f"head.precision={precision}", "train.epochs=4")
    assert_whole(result)
    exact = precision == "float32" or not CARD
    assert_predicts_as_stored(result.folder, CPU, 1e-4 if exact else HALF)
    for device in (DEVICE, CPU):
        assert_verifies(result.folder, device)


@pytest.mark.parametrize(
    ("mode", "keys"),
    [
        ("head", ["head.views=online"]),
        ("probe", ["probe.kind=ridge"]),
        ("ladder", []),
        ("head", ["trust.head_seeds=2", "trust.learning_curve=true"]),
        ("probe", ["trust.head_seeds=2", "trust.learning_curve=true"]),
    ],
    ids=str,
)
def test_other_ways_to_a_head_end_too(finished, mode, keys):
    assert_whole(finished(mode, *keys))


# what is drawn on the card (dropout, drop path) differs from what is drawn on a CPU
SAME = {
    "plain": [],
    "averaged": ["train.ema=0.9"],
    "mixed and erased": ["train.mixup=0.3", "train.cutmix=0.5", "train.reprob=0.5"],
    "weighted": ["train.class_weights=balanced", "train.label_smoothing=0.1"],
    "balanced": ["train.sampling=balanced"],
    "accumulated and clipped": ["train.accumulate=2", "train.clip_grad=1.0"],
    "checkpointed": ["train.grad_checkpointing=true"],
    "kept tokens": ["train.blocks=1", "train.views=2"],
    "lora": ["train.tune=lora"],
    "workers": ["train.workers=2"],
    "timm": ["model.name=vit_tiny_patch16_224"],
}
ENDS = {
    "bf16": ["train.amp=bf16"],
    "fp16": ["train.amp=fp16", "train.clip_grad=1.0"],
    "fp16 and kept tokens": ["train.amp=fp16", "train.blocks=1", "train.views=2"],
    "dropped": ["model.drop_path_rate=0.2", "train.patch_drop=0.5", "model.drop_rate=0.1"],
    "all at once": [
        *("train.amp=bf16", "train.ema=0.9", "train.mixup=0.3", "train.accumulate=2"),
        *("train.reprob=0.5", "model.drop_path_rate=0.2", "train.clip_grad=1.0"),
        *("train.layer_decay=0.7", "train.opt=adamw", "train.label_smoothing=0.1"),
    ],
    "layer-wise lion": ["train.opt=lion", "train.lr=1e-4", "train.layer_decay=0.7"],
    "bitfit": ["train.tune=bitfit", "train.lr=0.01"],
    "hybrid": [
        *("model.embed.backbone=resnet10t", "model.embed.weights=none"),
        "model.options={depth: 1, embed_dim: 32, num_heads: 2}",
    ],
    "CNN": ["model.name=test_efficientnet", "model.options={}"],
}
COMPILED = {
    "compiled": ["train.compile=true", "train.amp=bf16"],
    "graphs": ["train.compile=reduce-overhead", "train.amp=bf16", "train.ema=0.9"],
    "graphs of kept tokens": ["train.compile=reduce-overhead", "train.blocks=1", "train.views=2"],
}


@pytest.mark.parametrize("how", SAME)
def test_a_fine_tuning_in_float32_has_the_losses_of_the_cpu(finished, how):
    far = finished("full", *EXACT, *SAME[how])
    assert_whole(far)
    near = finished("full", *EXACT, *SAME[how], device=CPU)
    got, wanted = losses(far), losses(near)
    assert got == pytest.approx(wanted, rel=2e-3), f"{got} on {DEVICE}, {wanted} on the CPU"
    first, second = tensors(far.folder), tensors(near.folder)
    apart = {name: gap(first[name], second[name]) for name in first}
    worst = max(apart, key=apart.get)
    assert apart[worst] < 0.05, f"{worst} differs by {apart[worst]:.1e} of its largest"


@pytest.mark.parametrize("how", ENDS)
def test_a_fine_tuning_learns(finished, how):
    result = finished("full", "train.epochs=4", *ENDS[how])
    assert_whole(result, limit=1e-3)
    assert losses(result)[-1] < losses(result)[0], losses(result)


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_fine_tuning_learns(finished, how):
    """42 photographs in eights: the last two of an epoch go without compiled code."""
    needs_a_compiler()
    result = finished("full", "train.epochs=4", *COMPILED[how])
    assert_whole(result, limit=1e-3)
    assert losses(result)[-1] < losses(result)[0], losses(result)


def test_a_run_that_diverges_says_so_and_leaves_no_product(finished, tmp_path):
    with pytest.raises(DivergedError, match=r"error\[train.diverged\] epoch 1, step \d"):
        finished("full", *EXACT, "train.lr=1e30", "train.warmup_epochs=0")
    assert not list(tmp_path.glob("runs/*/2*/model"))


@pytest.mark.parametrize("amp", ["none", "auto"])
def test_a_stopped_run_goes_on_and_ends_as_the_undisturbed_one(
    finished, tiny_recipe, monkeypatch, amp
):
    """Not to the bit: on a card the backward pass adds in an order that is not fixed."""
    keys = (*EXACT, f"train.amp={amp}", "train.ema=0.9", "train.epochs=3")
    undisturbed = finished("full", *keys)
    spec = tiny_recipe("full", f"device={DEVICE}", *keys)
    folder = interrupted(monkeypatch, spec, after=9)
    again = run(spec, resume="auto")
    assert again.folder == folder
    assert_whole(again)
    got, wanted = losses(again), losses(undisturbed)
    assert got == pytest.approx(wanted, rel=1e-3 if amp == "none" else 0.03)


# -- several processes ----------------------------------------------------------------------------

ONE = """
import sys
from vitft import ranks, run
from timm.utils import distributed


class Several(int):
    '''One process that holds itself for several, so that it makes every exchange, with itself.'''

    def __eq__(self, other):
        return False

    def __gt__(self, other):
        return other <= 1

    __hash__ = int.__hash__


init = distributed.init_distributed_device_so


def alone(device, dist_backend):
    print("BACKEND", device, dist_backend, file=sys.stderr)
    return init(device, dist_backend=dist_backend) | {"world_size": Several(1)}


distributed.is_distributed_env = ranks.launched = lambda: True
distributed.init_distributed_device_so = alone
sys.exit(run.main(sys.argv[1:]))
"""


def launched(tmp_path, output, *more, program=("-m", "vitft.run")):
    """A run through the real launcher: its folder, and what it said."""
    file = tmp_path / f"{output}.yaml"
    file.write_text(TINY.format(mode="full", output=tmp_path / output, root=tmp_path / "photos"))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", *program]
    words += [str(file), f"device={DEVICE.type}", *EXACT, *STRICT, *more]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": paths, "VITFT_CACHE": str(tmp_path / f"{output}-cache")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return next((tmp_path / output).glob("*/2*/metrics.json")).parent, done.stderr


def assert_as_plain(folder, finished, *more):
    plain = finished("full", *EXACT, *STRICT, *more).folder
    first, second = tensors(folder), tensors(plain)
    apart = {name: gap(first[name], second[name]) for name in first}
    worst = max(apart, key=apart.get)
    assert apart[worst] < 1e-3, f"{worst} differs by {apart[worst]:.1e} of its largest"
    assert_predicts_as_stored(folder, DEVICE, 1e-4)


def test_torchrun_with_one_process_is_a_plain_run(finished, tmp_path, tiny_photos):
    folder, said = launched(tmp_path, "torchrun")
    assert_as_plain(folder, finished)
    assert '"processes": 1' in (folder / "env.json").read_text(), said


@pytest.mark.parametrize("more", [[], ["train.mixup=0.3", "train.accumulate=2"]], ids=str)
def test_gradients_go_over_nccl_and_the_result_stays(finished, tmp_path, tiny_photos, more):
    """One process in a group of its own: as many cards would be needed as processes."""
    program = tmp_path / "one.py"
    program.write_text(ONE)
    folder, said = launched(tmp_path, "nccl", *more, program=(str(program),))
    backend = "BACKEND cuda cpu:gloo,cuda:nccl" if CARD else "BACKEND cpu gloo"
    assert backend in said
    assert_as_plain(folder, finished, *more)


# -- other doors ----------------------------------------------------------------------------------


def test_predict_explain_and_demo_answer(finished, tmp_path, capsys):
    folder = finished("head", "train.epochs=4").folder
    new = [paint(tmp_path / "new" / f"{k}.jpg", (200, 40, 40), seed=900 + k) for k in range(5)]
    (tmp_path / "new" / "torn.jpg").write_bytes(new[0].read_bytes()[:200])
    answers = tmp_path / "answers.csv"
    words = [str(folder), str(tmp_path / "new"), "-o", str(answers), "--device", str(DEVICE)]
    assert predict.main(words) == 3  # one cannot be read
    said = capsys.readouterr()
    assert len(answers.read_text().splitlines()) == 7, said
    assert len(re.findall(r"\d\.jpg: red", said.out)) == 5, said
    sheet, photo = tmp_path / "sheet.png", str(new[0])
    asked = [["--method", name, "x"] for name in explain.METHODS]
    asked += [["--figure", name, "x" * (name == "distance")] for name in explain.FIGURES]
    for option, name, photograph in asked:
        words = [str(folder), *([photo] if photograph else [])]
        words += ["-o", str(sheet), option, name, "--device", str(DEVICE)]
        assert explain.main(words) == 0, words
        assert Image.open(sheet).convert("L").getextrema()[1] > 100, words
    desk = demo.Desk(folder, str(DEVICE))
    told = [desk.ask(path.read_bytes()) for path in (new[0], new[0], new[0])]
    (want,) = Predictor(folder, str(DEVICE))([new[0]])
    for answer in told:  # padded, compared, alone
        assert answer["top"][0]["name"] == "red"
        assert answer["top"][0]["p"] == pytest.approx(want.probabilities.max(), abs=1e-6)
        assert len(answer["pictures"]) == 3
        assert answer["near"]


def test_one_picture_alone_has_the_features_of_a_batch(finished):
    folder = finished("head").folder
    files, _, wanted = stored(folder)
    predictor = Predictor(folder, str(DEVICE))
    one = np.stack([next(predictor([file])).probabilities for file in files[:4]])
    apart = np.abs(one - wanted[:4]).max()
    assert apart < 1e-4, f"{apart:.1e}; alone is the same: {predictor._unpadded}"
    if CARD:
        assert next(predictor.net.parameters()).device == torch.device(DEVICE)
