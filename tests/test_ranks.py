"""Several processes as one run: the same result, one voice, one end.

Two processes on the CPU, joined by gloo as torchrun would join them.
"""

import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import ALL, Process, Runs, assert_equal_runs, records, tensors

from vitft import checkpoint, io, keep, prepare
from vitft.errors import MachineError, RecipeError
from vitft.inputs import seeded
from vitft.loaders import _mix, _mixup
from vitft.ranks import ALONE, Ranks, launched

PLAIN = ["train.opt=sgd", "train.lr=0.05", "model.drop_path_rate=0"]  # no dropout to differ in


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("ranks"))
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def undisturbed(runs) -> Path:
    return finish(runs.start_ranks("undisturbed"))


def finish(processes: list[Process]) -> Path:
    """The folder of a run of several processes that all ended well, the others in silence."""
    codes = [p.wait() for p in processes]
    assert codes == [0] * len(processes), "\n".join(p.said() for p in processes)
    assert_one_voice(processes)
    return processes[0].folder()


def assert_one_voice(processes: list[Process]) -> None:
    said = [line for p in processes[1:] for line in p.said().splitlines()]
    assert [line for line in said if not line.startswith("update ")] == []
    told = [line for p in processes[1:] for line in p.out.read_text().splitlines()]
    assert [line for line in told if not line.startswith("[Gloo] ")] == []  # torch 2.10's own word


def assert_close(one: Path, other: Path) -> None:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-5)
    for x, y in zip(records(one), records(other), strict=True):
        assert x.keys() == y.keys()
        assert [x[k] for k in x if "accuracy" in k] == [y[k] for k in x if "accuracy" in k]
        assert x["train_loss"] == pytest.approx(y["train_loss"], abs=1e-5)
        assert x["val_loss"] == pytest.approx(y["val_loss"], abs=1e-5)
    table = "confusion_matrix.csv"
    assert (one / table).read_bytes() == (other / table).read_bytes()


# -- shares ---------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(1, 6), st.booleans())
def test_every_row_of_a_batch_belongs_to_one_rank(count, world, pairs):
    shares = [Ranks(k, world).share(count, pairs=pairs) for k in range(world)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(count))
    assert all((np.diff(share) > 0).all() for share in shares)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1 + pairs


@settings(deadline=None)
@given(st.integers(1, 17), st.integers(1, 4), st.floats(0, 1), st.floats(0, 1))
def test_mixing_shares_is_sharing_the_mixed_batch(count, world, mixup, cutmix):
    x, y = torch.randn(count, 3, 8, 8), torch.arange(count) % 3
    mixer = _mixup(mixup + 0.1, cutmix, 3)

    def mixed(rows):
        part = x[rows].clone()
        with seeded(5):
            return part, _mix(mixer, part, y[rows])

    whole = mixed(np.arange(count))
    for k in range(world):
        rows = Ranks(k, world).share(count, pairs=True)
        if len(rows):
            part, targets = mixed(rows)
            assert torch.equal(part, whole[0][rows])
            assert torch.equal(targets, whole[1][rows])


def test_a_run_of_one_process_asks_nobody():
    assert ALONE.agreed(lambda: 3) == ALONE.first_does(lambda: 3) == ALONE.meet(3) == 3
    assert ALONE.gather("x") == ["x"]
    assert ALONE.greatest(2) == 2
    assert ALONE.meet(leave=True) == -1
    assert ALONE.alone() is ALONE
    with pytest.raises(ValueError, match="as it was"):
        ALONE.meet(error=ValueError("as it was"))


def test_an_allocation_of_slurm_is_no_launch(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert not launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert launched()


# -- the same result ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        [
            *("train.mixup=0.3", "train.cutmix=0.5", "train.accumulate=2", "train.clip_grad=1.0"),
            *("train.sampling=balanced", "train.reprob=0.5"),
        ],
        ["train.mixup=0", "train.class_weights=balanced", "train.blocks=1", "train.views=2"],
    ],
    ids=["mixed", "kept activations"],
)
def test_two_processes_give_the_result_of_one(runs, more):
    """42 photographs in batches of 8: where they mix, the last two leave one rank with none."""
    name = more[0].replace("=", "_")
    two = runs.start_ranks(f"two {name}", *PLAIN, *more)
    one = runs.finish(f"one {name}", *PLAIN, *more)
    assert_close(one, finish(two))


def test_features_are_shared_and_the_probe_is_the_same_to_the_bit(runs):
    one = runs.start("one probe", mode="probe")
    assert one.wait() == 0, one.said()
    io.remove(runs.home / "cache" / "features")
    two = runs.start_ranks("two probe", mode="probe")
    assert_equal_runs(one.folder(), finish(two))
    told = [line for line in two[0].said().splitlines() if line.startswith("features: ")]
    assert any("0 computed, 42 reused" in line for line in told)  # all of it was there when alone
    shards = list((runs.home / "cache" / "features").glob("*/*.shard"))
    assert len(shards) == 6  # two ranks, three splits: each wrote its part


# -- one end --------------------------------------------------------------------------------------


def test_a_photograph_that_one_rank_cannot_read_ends_all_and_is_told_once(runs):
    two = runs.start_ranks("spoiled", "train.epochs=9", pace=0.05)
    two[0].until("update 2\n")
    spoiled = runs.home / "photos" / "red" / "03.jpg"
    before = spoiled.read_bytes()
    spoiled.write_bytes(before + b"?")
    try:
        assert [p.wait(60) for p in two] == [3, 3]
    finally:
        spoiled.write_bytes(before)
    assert_one_voice(two)
    assert two[0].said().count("error[data.changed]") == 1
    assert "red/03.jpg: changed since the scan" in two[0].said()


@pytest.mark.parametrize("to", [[0, 1], [1]], ids=["all", "one of them"])
def test_a_signal_stops_all_after_the_same_step_and_the_rest_is_bit_equal(runs, undisturbed, to):
    output = f"signalled {len(to)}"
    two = runs.start_ranks(output, pace=0.05)
    two[1].until("update 4\n")
    for k in to:
        two[k].send(signal.SIGTERM)
    assert [p.wait(60) for p in two] == [143, 143]
    assert_one_voice(two)
    assert two[0].said().count("stopped by SIGTERM\n") == 1
    assert len({p.said().splitlines().count("update 5") for p in two}) == 1
    again = runs.start_ranks(output, "--resume", "auto")
    assert_equal_runs(undisturbed, finish(again))
    assert "resumed from step " in again[0].said()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_takes_the_other_along_and_the_rest_is_bit_equal(runs, undisturbed, victim):
    two = runs.start_ranks(f"killed {victim}", pace=0.05)
    two[victim].until("update 4\n")
    two[victim].send(signal.SIGKILL)
    codes = [p.wait(60) for p in two]
    assert codes == [-signal.SIGKILL, 5] if victim == 0 else [5, -signal.SIGKILL]
    assert_one_voice(two)
    if victim:
        assert "error[env.rank_lost] rank 0 of 2: another process of this run has ended" in (
            two[0].said()
        )
        assert "then go on with --resume auto" in two[0].said()
    again = runs.start_ranks(f"killed {victim}", "--resume", "auto")
    assert_equal_runs(undisturbed, finish(again))


def test_out_of_memory_on_one_rank_halves_the_parts_of_all(runs):
    more = [*PLAIN, "train.mixup=0"]
    crowded = runs.start_ranks("crowded", *more, room=3)
    roomy = finish(runs.start_ranks("roomy", *more))
    assert_close(roomy, finish(crowded))
    assert crowded[0].said().count("out of memory: going on with parts of 2 images") == 1


def test_what_no_part_can_fit_is_told_once(runs):
    two = runs.start_ranks("hopeless", "train.mixup=0", room=0)
    assert [p.wait(60) for p in two] == [5, 5]
    assert_one_voice(two)
    assert "error[env.gpu_memory] cpu: one image of a batch of 4 does not fit" in two[0].said()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("train.batch_size=7", "batch size 7 cannot be shared evenly by 2 processes"),
        ("train.batch_size=6", "batch size 6 cannot be shared evenly by 2 processes, in pairs"),
        ("train.batch_sise=6", "train.batch_sise"),
    ],
)
def test_what_cannot_be_shared_is_refused_once(runs, more, told):
    two = runs.start_ranks("refused", more)
    assert [p.wait(60) for p in two] == [2, 2]
    assert_one_voice(two)
    assert told in two[0].said()
    assert two[0].said().count("fix: ") == 1
    assert not (runs.home / "refused").exists()


def test_batch_normalisation_is_refused_on_the_cpu(tiny_recipe):
    spec = tiny_recipe("full", "model.name=resnet18", "model.options={}")
    p = prepare.prepare(spec)
    with pytest.raises(RecipeError, match=r"train.ranks\].*20 batch-normalisation layers"):
        prepare._check_ranks(replace(p, ranks=Ranks(0, 2)))


@pytest.mark.parametrize("mode", [["head", "head.views=online"], ["full", "train.blocks=1"]])
def test_batch_normalisation_that_is_not_trained_is_no_matter_of_ranks(tiny_recipe, mode):
    if mode[0] == "head":
        mode = [*mode, "model.name=resnet18", "model.options={}"]
    p = prepare.prepare(tiny_recipe(*mode))
    if mode[0] == "full":  # before the trained block, as in a hybrid's CNN
        p.net.patch_embed.norm = torch.nn.BatchNorm2d(3)
    before = [(m, m.training) for m in p.net.modules()]
    prepare._check_ranks(replace(p, ranks=Ranks(0, 2)))
    assert [(m, m.training) for m in p.net.modules()] == before
    assert all(q.requires_grad for q in p.net.parameters())


def test_batch_normalisation_wants_photographs_on_every_rank(tiny_recipe):
    """42 in batches of 8 leave 2 for 4 processes."""
    p = prepare.prepare(tiny_recipe("full", "model.name=test_efficientnet", "model.options={}"))
    cuda = torch.device("cuda")
    with pytest.raises(RecipeError) as caught:
        prepare._check_ranks(replace(p, ranks=Ranks(0, 4), device=cuda))
    assert str(caught.value) == (
        "error[train.ranks] tiny_full.yaml:11:20: train.batch_size: the last of an epoch's batches "
        "leaves one of 4 processes with none of its 2 photographs, and joined batch normalisation "
        "needs some from each\n"
        "fix: take another train.batch_size, a multiple of 4, or fewer processes"
    )
    prepare._check_ranks(replace(p, ranks=Ranks(0, 2), device=cuda))


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_part_together_and_when_their_gpus_are_done(monkeypatch, rank):
    did = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: did.append(f"cuda:{device}"))
    monkeypatch.setattr(torch.distributed, "barrier", lambda group: did.append(group))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: did.append("gone"))
    ranks = Ranks(rank, 2, local=3, talk="all are here")
    if rank:
        with pytest.raises(SystemExit, match="0"):
            ranks.alone()
    else:
        assert ranks.alone() is ALONE
    assert did == ["cuda:3", "all are here", "gone"]


def test_who_fails_does_not_wait_for_exchanges_that_others_never_join(monkeypatch):
    from vitft import ranks

    did = []

    class Group:
        def _get_backend(self, device):
            return type("", (), {"abort": lambda self: did.append(f"abort {device.type}")})()

    place = {"global_rank": 0, "world_size": 2, "local_rank": 0}
    group = type("", (), {"WORLD": Group()})
    monkeypatch.setattr(ranks, "launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        "timm.utils.distributed.init_distributed_device_so", lambda *a, **how: place
    )
    monkeypatch.setattr(torch.distributed, "new_group", lambda **how: None)
    monkeypatch.setattr(torch.distributed, "group", group)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: did.append("gone"))
    with pytest.raises(KeyError), ranks.joined():
        raise KeyError
    assert did == ["abort cuda", "gone"]
    with ranks.joined():
        pass
    assert did == ["abort cuda", "gone", "gone"]


def test_a_rank_that_sees_another_disk_is_refused(tiny_recipe, tmp_path):
    snapshot = checkpoint.Snapshot(3, 0, 3, {"model/x": torch.ones(2)}, {"history": []})
    p = prepare.prepare(tiny_recipe("full"))
    path = checkpoint.save(tmp_path / "checkpoints", snapshot, identity=keep.identity(p))
    seal = io.sha256_file(path / io.MANIFEST)
    p = replace(p, ranks=Ranks(1, 2))
    assert keep._reread(p, path, seal, False).step == 3
    for place, wanted in ((path, "0" * 64), (tmp_path / "elsewhere", seal)):
        with pytest.raises(MachineError) as caught:
            keep._reread(p, place, wanted, False)
        assert str(caught.value) == (
            f"error[env.other_disk] {place}: process 1 does not see the checkpoint that process 0 "
            "goes on from\nfix: set output to a folder on a disk that all machines see"
        )


def test_joined_batch_normalisation_keeps_the_activation_that_timm_puts_into_it(tiny_recipe):
    p = prepare.prepare(tiny_recipe("full", "model.name=test_efficientnet", "model.options={}"))
    images, net = torch.randn(2, 3, *p.config.size), p.net.eval()
    before = net(images)
    prepare._check_ranks(replace(p, ranks=Ranks(0, 2), device=torch.device("cuda")))
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in net.modules())
    assert torch.equal(net(images), before)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_torchrun_starts_it_and_hands_signals_on(runs, undisturbed):
    """The real launcher, once: its own exit code is 1 whatever its processes ended with."""
    import os
    import subprocess

    def torchrun(*more: str) -> subprocess.Popen[str]:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        return subprocess.Popen(
            [sys.executable, *words, "vitft.run", str(runs.recipe("launched")), *ALL, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | runs.environment,
            cwd=runs.home,
        )

    first = torchrun("train.epochs=400")
    folder = runs.home / "launched"
    while not list(folder.glob("*/2*/checkpoints/step-*")):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=300)
    assert said.count("stopped; go on with: ") == 1
    again = torchrun()
    out, said = again.communicate(timeout=900)
    assert again.returncode == 0, said
    assert out.count("test accuracy") == 1
    assert_equal_runs(undisturbed, max(folder.glob("*/2*")))
