"""Rows X1 to X30 of the bad-input matrix on whole runs, and R and C rows that need a whole run.

What a single room can prove (kills of the disk door, workers, shards) stands in that room's tests
under the same ids; the signals of real processes are in test_signals.py.
"""

import errno
import json
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as processes
from conftest import paint
from PIL import Image
from rows import (
    PLAIN,
    contents,
    interrupted,
    make_product,
    newest_runs,
    refused,
    untouched,
    written,
)
from safetensors.torch import load_file
from test_faults import Witness, file_size_limit, temporaries
from test_loaders import batches, equal, photos
from test_train import network, trainer

from vitft import checkpoint, disk, features, io, keep, model, prepare, product, recipe, run, store
from vitft.checkpoint import Snapshot
from vitft.errors import MachineError, RecipeError
from vitft.run import main

STEPS = ("train.checkpoint_minutes=0", *PLAIN)  # a checkpoint after every step
CUT = 4  # updates before a run is cut short: 6 make an epoch


@pytest.fixture
def full(tiny_recipe):
    """(*overrides) -> a full run with checkpoints at every step, in about a second."""
    return lambda *overrides: tiny_recipe("full", *STEPS, *overrides)


@pytest.fixture
def probe(tiny_recipe):
    return lambda *overrides: tiny_recipe("probe", *PLAIN, "probe.strengths=[1]", *overrides)


def snapshot(step: int, size: int = 1000) -> Snapshot:
    return Snapshot(step, 0, step, {"model/w": torch.full((size,), float(step))}, {"history": []})


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    one, other = weights_of(a), weights_of(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- recipes, as far as only model and data can tell ---


def test_R14_a_batch_larger_than_the_data_trains_on_all_of_them(full, tmp_path):
    with untouched(tmp_path / "photos"):
        result = run.run(full("train.batch_size=1000", "train.epochs=1"))
    assert result.history[-1]["step"] == 1
    assert result.history[-1]["train_accuracy"] * 42 == pytest.approx(
        round(result.history[-1]["train_accuracy"] * 42)
    )


def test_R15_batches_of_one_through_batch_normalisation_are_refused(full, tmp_path, capsys):
    spec = full("model.name=resnet10t", "model.options={}", "train.batch_size=1")
    file = written(spec, tmp_path / "r.yaml")
    says = ("r.yaml", "train.batch_size", "batch size 1 with", "batch-normalisation layers")
    with untouched(tmp_path / "photos"):
        refused(capsys, main, [file], code=2, id="train.batch_norm", says=says, fix="to 2 or more")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("mode", "size", "allowed"),
    [
        (["ladder", "ladder.steps=[logistic, full]"], 1, False),
        (["ladder"], 1, True),
        (["head"], 1, True),
        (["full"], 2, True),
    ],
)
def test_R15_a_ladder_that_would_end_in_batches_of_one_is_refused(tiny_recipe, mode, size, allowed):
    name = "model.name=test_efficientnet"
    spec = tiny_recipe(*mode, name, "model.options={}", f"train.batch_size={size}")
    no = pytest.raises(RecipeError, match="train.batch_norm(.|\n)*fix: set train.batch_size to 2")
    with nullcontext() if allowed else no:
        prepare.prepare(spec)


@pytest.mark.parametrize(
    ("mode", "size", "steps"),
    [
        (["full"], 41, [42]),  # 42 photographs to learn from
        (["full", "train.workers=2", "train.mixup=0.2"], 41, [42]),
        (["full"], 20, [20, 20, 2]),
        (["ladder", "ladder.steps=[logistic, blocks]", "train.blocks=1"], 41, [42]),
        (["head", "head.views=online"], 41, [41, 1]),  # which trains no normalisation
    ],
)
def test_R15_a_last_photograph_alone_joins_the_batch_before_and_none_is_lost(
    tiny_recipe, caplog, mode, size, steps
):
    caplog.set_level("INFO", logger="vitft")
    name = "model.name=test_efficientnet"
    p = prepare.prepare(tiny_recipe(*mode, name, "model.options={}", f"train.batch_size={size}"))
    if mode[0] == "head":
        model.freeze_backbone(p.net)
    batches = p.batches(p.photos("train", augment=True), train=True)
    for epoch in (0, 1):
        rows = [which for _, _, which in batches.epoch(epoch)]
        assert [len(which) for which in rows] == steps
        assert sorted(torch.cat(rows).tolist()) == list(range(42))
    assert len(batches) == len(steps)
    batches.close()
    told = "the last batch of an epoch has 42 photographs, as batch normalisation makes nothing of "
    assert (told + "the last of 42 alone" in caplog.text) is (steps == [42])


def test_R15_a_run_whose_last_photograph_would_be_alone_trains(full):
    spec = full("model.name=test_efficientnet", "model.options={}", "train.batch_size=41")
    result = run.run(spec)
    assert [record["step"] for record in result.history] == [1, 2]


def test_R15_one_photograph_alone_is_refused_with_the_only_remedy(monkeypatch, tiny_recipe):
    spec = tiny_recipe("full", "model.name=test_efficientnet", "model.options={}")
    p = prepare.prepare(spec)
    monkeypatch.setattr(type(p.index), "rows", lambda self, split: [0])
    with pytest.raises(RecipeError, match="fix: give it more photographs to learn from"):
        prepare._check_trainable(p)


def test_R18_a_model_name_is_met_with_the_nearest(full, tmp_path, capsys):
    file = written(full(), tmp_path / "r.yaml")
    refused(
        capsys,
        main,
        [file, "model.name=vit_tiny_patch16_24"],
        code=2,
        id="model.unknown",
        says=("'vit_tiny_patch16_24'",),
        fix="vit_tiny_patch16_224",
    )


def test_R19_weights_that_cannot_be_fetched_say_where_to_put_the_file(
    full, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(prepare.offline.fetch, "reachable", lambda *a, **k: False)
    name = "vit_base_patch16_224.orig_in21k"
    spec = full("model.name=vitflower_b16", "model.options={}", f"model.weights={name}")
    says = (name, "cache", "huggingface.co")
    with untouched(tmp_path / "photos"):
        refused(
            capsys,
            main,
            [written(spec, tmp_path / "r.yaml")],
            code=5,
            id="env.unreachable",
            says=says,
            fix="set model.weights to",
        )


def test_R21_an_image_size_that_patches_do_not_fill_names_the_two_next_to_it(
    full, tmp_path, capsys
):
    file = written(full(), tmp_path / "r.yaml")
    refused(
        capsys,
        main,
        [file, "data.image_size=33"],
        code=2,
        id="model.img_size",
        says=("side 33 px is not a multiple of the patch size 8 px",),
        fix="use 32 or 40 px",
    )
    refused(
        capsys,
        main,
        [file, "data.image_size=225", "model.options={}", "model.name=vit_tiny_patch16_224"],
        code=2,
        id="model.img_size",
        says=("multiple of the patch size 16 of vit_tiny_patch16_224, got 225",),
        fix="set data.image_size: 224 or 240",
    )


# --- our own checkpoints ---


def flip(path: Path, at: int = -7) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_C9_one_flipped_byte_of_a_checkpoint_sends_the_run_to_the_one_before(
    full, tmp_path, monkeypatch, capsys
):
    whole = run.run(full())
    folder = interrupted(monkeypatch, full(), after=CUT)
    copy = shutil.copytree(folder, tmp_path / "copy")
    older, newer = sorted((folder / "checkpoints").iterdir())
    flip(newer / "state.safetensors")
    resumed = run.run(full(), resume=str(folder))
    log = (folder / "log.txt").read_text()
    assert f"{newer} is passed over: state.safetensors: content changed" in log
    assert f"resumed from step {int(older.name[5:])} " in log
    assert_same_weights(whole.folder, resumed.folder)
    for path in (copy / "checkpoints").rglob("state.json"):
        flip(path)
    refused(
        capsys,
        main,
        [written(full(), tmp_path / "r.yaml"), "--resume", copy],
        code=2,
        id="run.nothing_to_resume",
        says=(str(copy), "no whole checkpoint is here"),
        fix="leave out --resume",
    )


GOLDEN = Path(__file__).with_name("golden")


@pytest.mark.parametrize("made", sorted(GOLDEN.glob("checkpoint-*")), ids=lambda p: p.name)
def test_C32_every_released_checkpoint_format_can_be_read(made):
    (newest,) = made.glob("step-*")
    identity = json.loads((newest / "state.json").read_text())["identity"]
    found = checkpoint.load(newest, identity=identity)
    assert (found.step, found.epoch, found.changed) == (4, 0, ())
    assert {name.partition("/")[0] for name in found.tensors} == {"model", "ema", "optimizer"}


@pytest.mark.parametrize("made", sorted(GOLDEN.glob("model-?")), ids=lambda p: p.name)
def test_C32_every_released_product_format_can_be_read(made):
    net, card = product.load(made)
    said = json.loads((made.parent / f"{made.name}.json").read_text())
    with torch.inference_mode():
        logits = net(torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16))[0]
    torch.testing.assert_close(logits, torch.tensor(said["logits"]), atol=1e-5, rtol=1e-5)
    assert card.classes == tuple(said["classes"])


def test_C33_a_changed_recipe_is_refused_key_by_key_and_nothing_changes(
    full, tmp_path, monkeypatch, capsys
):
    folder = interrupted(monkeypatch, full(), after=CUT)
    before = contents(folder, but=("log.txt", io.LOCK))
    file = written(full("train.lr=0.01", "seed=3"), tmp_path / "r.yaml")
    with untouched(tmp_path / "photos"):
        refused(
            capsys,
            main,
            [file, "--resume", folder],
            code=4,
            id="ckpt.other_run",
            says=(f"step-0000000{CUT}", "seed 0 (now 3)", "train.lr 0.003 (now 0.01)"),
            fix="--resume-anyway",
        )
    assert contents(folder, but=("log.txt", io.LOCK)) == before


def test_C33_what_cannot_change_the_result_may_change(full, monkeypatch, tmp_path):
    whole = run.run(full())
    folder = interrupted(monkeypatch, full(), after=CUT)
    moved = (tmp_path / "photos").rename(tmp_path / "moved")
    memory = ("train.pictures_gb=0", "train.activations_gb=1")
    spec = full("train.checkpoint_minutes=5", "report.gallery=3", f"data.root={moved}", *memory)
    resumed = run.run(spec, resume=str(folder))
    assert_same_weights(whole.folder, resumed.folder)
    assert json.loads((folder / "metrics.json").read_text())["changed_before_resuming"] == []


def test_C33_other_photographs_are_refused_and_going_on_anyway_is_recorded(
    full, tmp_path, monkeypatch, capsys
):
    folder = interrupted(monkeypatch, full(), after=CUT)
    paint(tmp_path / "photos" / "red" / "new.jpg", (200, 40, 40), seed=999)
    file = written(full(), tmp_path / "r.yaml")
    refused(
        capsys,
        main,
        [file, "--resume", "auto"],
        code=4,
        id="ckpt.other_run",
        says=("data '", "(now '"),
        fix="--resume-anyway",
    )
    assert main([str(file), "--resume", "auto", "--resume-anyway"]) == 0
    (changed,) = json.loads((folder / "metrics.json").read_text())["changed_before_resuming"]
    assert changed.startswith("data '")
    (line,) = (r for r in io.read_lines(folder / "metrics.jsonl") if "changed" in r)
    assert line == {"resumed_at": CUT, "changed": [changed]}


# --- X: disk ---


def test_X1_a_run_without_room_is_refused_before_it_starts(full, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(disk, "free", lambda path: 1_000_000)
    with untouched(tmp_path / "photos"):
        refused(
            capsys,
            main,
            [written(full(), tmp_path / "r.yaml")],
            code=5,
            id="env.disk_full",
            says=(str(tmp_path / "runs"), "need 1.", "MB, 1.0 MB free"),
            fix="make room",
        )
    assert not (tmp_path / "runs").exists()


def test_X1_a_disk_that_is_full_for_a_while_costs_a_checkpoint_and_three_times_the_run(
    tmp_path, monkeypatch, caplog
):
    keeper = keep.Keeper(tmp_path, {})
    keeper(snapshot(1))

    def full_disk(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(io.CALLS, "write", full_disk)
        with caplog.at_level("WARNING", logger="vitft"):
            keeper(snapshot(2))
            keeper(snapshot(3))
        assert "step 3 is not saved (need" in caplog.text
        assert "newest whole checkpoint: step-00000001; trying again later" in caplog.text
        with pytest.raises(MachineError) as caught:
            keeper(snapshot(4))
    text = str(caught.value)
    assert re.search(r"disk_full\] .*step-00000004.*: need [\d.]+ kB, .* free \(ENOSPC\)", text)
    assert "3 saves in a row failed; newest whole checkpoint: step-00000001" in text
    assert "\nfix: make room" in text
    assert caught.value.exit_code == 5
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert temporaries(tmp_path) == []
    keeper(snapshot(5))
    assert keeper.failed == 0
    assert checkpoint.load(checkpoint.newest(tmp_path / "checkpoints"), identity={}).step == 5


def test_X2_a_quota_that_ends_in_a_checkpoint_leaves_the_one_before(tmp_path, caplog):
    keeper = keep.Keeper(tmp_path, {})
    keeper(snapshot(1))
    before = contents(tmp_path)
    with file_size_limit(50_000), caplog.at_level("WARNING", logger="vitft"):
        keeper(snapshot(2, size=100_000))
    assert "step 2 is not saved (need 400.1 kB" in caplog.text
    assert "(EFBIG)" in caplog.text
    assert contents(tmp_path) == before
    assert temporaries(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody without rights")
def test_X3_an_output_that_may_not_be_written_is_said_before_photographs_are_read(
    probe, tmp_path, monkeypatch, capsys
):
    file = written(probe(), tmp_path / "r.yaml")
    (tmp_path / "runs").mkdir(mode=0o555)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o055)
    monkeypatch.setattr(prepare, "scan", lambda recipe: pytest.fail("photographs were read"))
    os.seteuid(65534)
    try:
        refused(
            capsys,
            main,
            [file],
            code=5,
            id="env.write_failed",
            says=(str(tmp_path / "runs"), "(EACCES)"),
            fix="check the folder",
        )
    finally:
        os.seteuid(0)
    assert list((tmp_path / "runs").iterdir()) == []


def test_X5_a_checkpoint_and_a_product_are_on_the_disk_before_they_are_shown(tmp_path, monkeypatch):
    witness = Witness(monkeypatch)
    keeper = keep.Keeper(tmp_path / "run", {})
    for step in range(4):  # the third makes the first go
        keeper(snapshot(step))
        assert witness.inside(tmp_path / "run") == []
    for _ in range(2):  # the second replaces the first
        assert witness.inside(make_product(tmp_path / "model")) == []


# --- X: memory, numbers, devices ---


def test_X8_a_single_image_that_does_not_fit_ends_with_numbers_and_a_whole_checkpoint(
    tmp_path, monkeypatch
):
    net = network()
    saved = []

    def save(snapshot):
        saved.append(checkpoint.save(tmp_path, snapshot, identity={}))

    t = trainer(net, spec={"ema": None, "checkpoint_minutes": 0.0}, save=save)
    update = t.stepper._gradients

    def gradients(*pending, **how):
        if t.state.step >= 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return update(*pending, **how)

    monkeypatch.setattr(t.stepper, "_gradients", gradients)
    with pytest.raises(MachineError) as caught:
        t.fit()
    (fault,) = caught.value.faults
    assert (caught.value.exit_code, fault.id, fault.place) == (5, "env.gpu_memory", "cpu")
    assert re.match(r"one image of a batch of 4 does not fit: \d+\.\d GiB in use", fault.text)
    assert "train.grad_checkpointing: true" in fault.fix
    assert checkpoint.load(saved[-1], identity={}).step == 3


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 274877906944 bytes."
        ),
    ],
    ids=["cuda", "cpu"],
)
def test_X8_memory_that_runs_out_anywhere_is_no_bug_of_ours(error, capsys):
    def fails(argv):
        raise error

    says = ("this machine", "allocate")
    refused(capsys, fails, [], code=5, id="env.memory", says=says, fix="train.batch_size")


def test_X12_a_run_that_diverges_names_files_rate_and_gradients_and_keeps_finite_checkpoints(
    full, tmp_path, capsys
):
    spec = full("train.opt=momentum", "train.lr=1e30", "train.clip_grad=null")
    with untouched(tmp_path / "photos"):
        err = refused(
            capsys,
            main,
            [written(spec, tmp_path / "r.yaml")],
            code=6,
            id="train.diverged",
            says=("epoch 1, step ", "learning rate 1e+30", "gradient norm", ".jpg"),
            fix="lower train.lr",
        )
    named = re.findall(r"\S+\.jpg", err[err.index("photographs of this step") :])
    assert all(Path(name).is_file() for name in named)
    (folder,) = newest_runs(spec)
    for path in (folder / "checkpoints").iterdir():
        tensors = load_file(path / "state.safetensors")
        assert all(bool(torch.isfinite(t).all()) for k, t in tensors.items() if "model/" in k)
    assert not (folder / "model").exists()
    kept = any((folder / "checkpoints").glob("step-*"))
    assert ("last good checkpoint: " if kept else "no checkpoint was written yet") in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("wanted", ["cuda", "cuda:7"])
def test_X23_X24_a_device_that_is_not_here_is_never_replaced_in_silence(
    probe, tmp_path, capsys, wanted
):
    file = written(probe(), tmp_path / "r.yaml")
    refused(
        capsys,
        main,
        [file, f"device={wanted}"],
        code=5,
        id="env.no_device",
        says=(f"device {wanted} is not here; present: ", "cpu"),
        fix="set device: auto",
    )
    refused(
        capsys, main, [file, "device=gpu"], code=2, id="recipe.choice", says=("gpu",), fix="cuda"
    )


def test_X23_the_gpu_that_is_named_is_the_one_that_nameless_memory_goes_to(monkeypatch):
    made_current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    assert prepare.pick_device("cuda:1") == torch.device("cuda:1")
    assert prepare.pick_device("cpu") == torch.device("cpu")
    assert made_current == ["cuda:1"]


def test_X23_the_automatic_choice_is_said(probe, tmp_path, capsys):
    run.run(probe("device=auto"))
    (folder,) = newest_runs(probe())
    device = json.loads((folder / "env.json").read_text())["device"]
    assert device in ("cpu", "mps", "cuda:0")


# --- X: other runs ---


def test_X13_a_live_runs_folder_is_refused_with_pid_host_and_start(
    full, tmp_path, monkeypatch, capsys
):
    folder = interrupted(monkeypatch, full(), after=CUT)
    before = contents(folder, but=(io.LOCK,))
    file = written(full(), tmp_path / "r.yaml")
    with io.lock(folder, "vitft run tiny_full"), untouched(tmp_path / "photos"):
        refused(
            capsys,
            main,
            [file, "--resume", folder],
            code=7,
            id="env.busy",
            says=(str(folder), f"pid {os.getpid()}", "host ", "start 20", "vitft run tiny_full"),
            fix="wait for it, stop it, or choose another output folder",
        )
    assert contents(folder) == before


def test_X14_runs_share_an_output_and_never_a_folder(probe, full, tmp_path, capsys):
    first = run.run(probe())
    before = contents(first.folder)
    assert run.run(probe("seed=1")).folder != first.folder
    assert run.run(full("train.epochs=1")).folder != first.folder
    file = written(full(), tmp_path / "r.yaml")
    for place, why in ((first.folder, "this run is finished"), (tmp_path / "no", "no such file")):
        refused(
            capsys,
            main,
            [file, "--resume", place],
            code=2,
            id="run.nothing_to_resume",
            says=(str(place), why),
            fix="leave out --resume",
        )
    assert contents(first.folder) == before
    assert not (tmp_path / "no").exists()


# --- X: cached features ---


def test_X15_a_damaged_cache_is_said_once_computed_again_and_changes_nothing(
    probe, tmp_path, caplog
):
    first = run.run(probe())
    shards = sorted(store.features_dir().rglob("*.shard"))
    assert shards
    flip(shards[0])
    for shard in shards[1:]:
        shard.write_bytes(shard.read_bytes()[:-1])
    half = shards[0].with_name(f".{shards[0].name}.0123abcd.tmp")
    half.write_bytes(shards[0].read_bytes()[:100])  # what a killed writer leaves
    with caplog.at_level("WARNING", logger="vitft"):
        again = run.run(probe())
    damaged = [r.message for r in caplog.records if "are damaged" in r.message]
    assert len(damaged) == len(shards)
    np.testing.assert_array_equal(again.predictions.logits, first.predictions.logits)


def test_X16_content_replaced_at_equal_size_and_time_is_computed_again(probe, tmp_path):
    file = tmp_path / "photos" / "red" / "still.bmp"
    Image.new("RGB", (40, 40), (200, 30, 30)).save(file)
    status = file.stat()
    run.run(probe())
    Image.new("RGB", (40, 40), (30, 30, 200)).save(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    folder = run.run(probe()).folder
    counts = re.findall(r"features: (\d+) computed", (folder / "log.txt").read_text())
    assert sum(map(int, counts)) == 1


def test_X17_two_images_swapped_by_rename_bring_their_features_along(probe, tmp_path):
    red, blue = tmp_path / "photos/red/red_00.jpg", tmp_path / "photos/blue/blue_00.jpg"
    first = features_by_content(prepared := prepare.prepare(probe()))
    red.rename(tmp_path / "x")
    blue.rename(red)
    (tmp_path / "x").rename(blue)
    swapped = prepare.prepare(probe())
    assert features_by_content(swapped) == first
    label = {s: int(y) for s, y in zip(swapped.index.sha256, swapped.index.labels, strict=True)}
    sha = io.sha256_file(red)
    assert swapped.index.classes[label[sha]] == "red"
    old = prepared.index.labels[prepared.index.sha256.index(sha)]
    assert prepared.index.classes[int(old)] == "blue"


def features_by_content(p: prepare.Prepared) -> dict[str, bytes]:
    found = {}
    for split in ("train", "val", "test"):
        rows = p.index.rows(split)
        extracted = run.extract(p, split).x[0]
        found |= {p.index.sha256[i]: x.tobytes() for i, x in zip(rows, extracted, strict=True)}
    return found


def test_X18_every_library_that_can_change_a_feature_is_in_its_key(probe):
    p = prepare.prepare(probe())
    about = features._about(p.photos("train"), "k", p.device)
    assert about["torch"] == torch.__version__
    assert {"timm", "torchvision", "pillow", "vitft"} <= about.keys()


# --- X: determinism ---


def test_X20_the_seed_is_printed_and_stored_and_no_clock_reaches_a_result(
    full, monkeypatch, tmp_path
):
    first = run.run(full("seed=11"))
    assert f"run folder {first.folder}, seed 11" in (first.folder / "log.txt").read_text()
    assert json.loads((first.folder / "env.json").read_text())["seed"] == 11
    assert recipe.load(first.folder / "recipe.resolved.yaml").seed == 11
    real = run.time.time
    monkeypatch.setattr(run.time, "time", lambda: real() - 400 * 86_400)  # the clock jumps back
    again = run.run(full("seed=11"))
    assert_same_weights(first.folder, again.folder)
    for name in ("predictions.csv", "split.csv", "confusion_matrix.csv"):
        assert (first.folder / name).read_bytes() == (again.folder / name).read_bytes()
    assert (
        recipe.parse("mode: full\n", "r.yaml", tmp_path, []).seed == 0
    )  # never drawn from a clock


def test_X22_another_number_of_threads_is_recorded_and_said_on_resuming(
    full, monkeypatch, tmp_path
):
    threads = torch.get_num_threads()
    folder = interrupted(monkeypatch, full(), after=CUT)
    assert json.loads((folder / "env.json").read_text())["threads"] == threads
    torch.set_num_threads(threads + 1)
    try:
        run.run(full(), resume="auto")
    finally:
        torch.set_num_threads(threads)
    text = (folder / "log.txt").read_text()
    assert f"threads was {threads}, now {threads + 1}; the result may differ" in text


# --- X: logs, best, limits of the machine ---


def test_X26_a_terminal_that_has_gone_ends_no_run(probe, monkeypatch):
    class Gone:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        flush = isatty = fileno = lambda self: False

    monkeypatch.setattr("sys.stderr", Gone())
    folder = run.run(probe()).folder
    assert "features: " in (folder / "log.txt").read_text()
    assert (folder / "report.html").exists()


def test_X27_a_log_torn_in_mid_line_and_ahead_of_the_checkpoint_is_mended(full, monkeypatch):
    def rows(folder: Path) -> list[dict[str, object]]:
        lines = io.read_lines(folder / "metrics.jsonl")
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]

    whole = run.run(full())
    folder = interrupted(monkeypatch, full(), after=CUT + 6)  # in the second epoch
    log = folder / "metrics.jsonl"
    first = log.read_bytes()
    log.write_bytes(first + json.dumps(json.loads(first) | {"epoch": 2}).encode() + b'\n{"epo')
    run.run(full(), resume=str(folder))
    assert rows(folder) == rows(whole.folder)


def test_X28_the_best_epoch_before_a_kill_is_still_the_best_after(tmp_path):
    scores = iter([(0.95, 0.1), (0.5, 1.0), (0.6, 0.9), (0.7, 0.8)])
    kept = []

    def save(snapshot):
        kept.append(checkpoint.save(tmp_path, snapshot, identity={}))

    first = trainer(network(), spec={"epochs": 4, "ema": None}, save=save)
    first.validate = lambda model: next(scores)
    first.stop = lambda: 15 if first.state.epoch == 2 else None
    with pytest.raises(BaseException, match="15"):
        first.fit()
    best = {k.removeprefix("best/"): v for k, v in load_best(kept[-1]).items()}
    second = trainer(net := network(), spec={"epochs": 4, "ema": None})
    second.validate = lambda model: next(scores)
    result = second.fit(checkpoint.load(kept[-1], identity={}))
    assert result.best["epoch"] == 1
    assert result.best["val_accuracy"] == 0.95
    assert all(torch.equal(v, best[k]) for k, v in net.state_dict().items())


def load_best(path: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(path / "state.safetensors")
    return {k: v for k, v in tensors.items() if k.startswith("best/")}


def test_X29_too_few_file_handles_are_the_machines_fault_never_a_photographs(
    probe, tmp_path, capsys, monkeypatch
):
    opened = os.open

    def exhausted(path, *args, **options):
        if str(path).endswith("red_03.jpg"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", exhausted)
    with untouched(tmp_path / "photos"):
        refused(
            capsys,
            main,
            [written(probe(), tmp_path / "r.yaml")],
            code=5,
            id="env.no_handles",
            says=("red_03.jpg", "(EMFILE)"),
            fix="ulimit -n",
        )


def test_X29_a_path_too_long_for_the_disk_is_said_before_photographs_are_read(
    probe, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(prepare, "scan", lambda recipe: pytest.fail("photographs were read"))
    deep = tmp_path / ("x" * 300)
    refused(
        capsys,
        main,
        [written(probe(f"output={deep}"), tmp_path / "r.yaml")],
        code=5,
        id="env.write_failed",
        says=("xxx", "(ENAMETOOLONG)"),
        fix="set output elsewhere",
    )


def test_X30_workers_of_a_platform_that_cannot_fork_give_the_same_batches(tiny_photos):
    source = photos(sorted(tiny_photos.rglob("*.jpg"))[:9])
    want = list(batches(source, workers=0).epoch(1))
    usual = processes.get_start_method()
    processes.set_start_method("spawn", force=True)
    try:
        spawned = batches(source, workers=1)
        got = list(spawned.epoch(1))
        spawned.close()
    finally:
        processes.set_start_method(usual, force=True)
    assert equal(got, want)
