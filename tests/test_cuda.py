"""On a card: its arithmetic, batches on their way, single updates, memory that runs out.

Whole runs are in test_cuda_runs.py; both say in card.py how they are started.
"""

import copy
import gc
import math
import time

import numpy as np
import pytest
import timm
import torch
from card import CARD, CPU, DEVICE, MARKS, busy, gap, needs_a_compiler, no_waiting
from torch import nn

import vitft  # noqa: F401
from vitft import boundary, checkpoint, evaluate, features, loaders, model, pace, probe, regime
from vitft import learn as learn_room
from vitft.errors import DivergedError, MachineError
from vitft.inputs import permutation
from vitft.loaders import Batches
from vitft.prepare import pick_device, prepare
from vitft.recipe import TrainSpec
from vitft.train import CHECK_EVERY, Stopped, Trainer

pytestmark = MARKS
N, SIZE, CLASSES, SIDE = 22, 4, 3, 32
OURS = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def network(name="vitflower_ti16", device=DEVICE, **options):
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=CLASSES, **(OURS | options)).to(device)


class Pictures:
    """Batches of fixed images on a device, in an order that depends on the epoch alone."""

    batch_size = SIZE

    def __init__(self, device=DEVICE, *, n=N, size=SIZE, spoil=None, soft=False):
        self.n, self.batch_size, self.device = n, size, device
        generator = torch.Generator().manual_seed(5)
        y = torch.arange(n) % CLASSES
        x = torch.randn(n, 3, SIDE, SIDE, generator=generator)
        x[range(n), y] += 1
        if spoil is not None:
            x[spoil] = math.nan
        y = nn.functional.one_hot(y, CLASSES).float() if soft else y
        self.x, self.y = x.to(device), y.to(device)

    def __len__(self):
        return math.ceil(self.n / self.batch_size)

    def epoch(self, epoch, start=0):
        order = torch.as_tensor(permutation(self.n, 0, epoch))
        for rows in order.split(self.batch_size)[start:]:
            yield self.x[rows.to(self.device)], self.y[rows.to(self.device)], rows

    def names(self, rows):
        return [f"photo_{int(i)}.jpg" for i in rows]


def trainer(net, pictures=None, *, spec=None, **kwargs):
    pictures = pictures or Pictures(next(net.parameters()).device)

    def validate(model):
        model.eval()
        with torch.inference_mode():
            logits = model(pictures.x[:64]).float()
        y = pictures.y[:64] if pictures.y.dim() == 1 else pictures.y[:64].argmax(1)
        loss = float(nn.functional.cross_entropy(logits, y))
        return float((logits.argmax(1) == y).float().mean()), loss

    options = {"epochs": 3, "opt": "sgd", "lr": 0.02, "amp": "none", "compile": False}
    spec = TrainSpec(**(options | (spec or {})))
    made = Trainer(net, pictures, spec, seed=7, validate=validate, **kwargs)
    made.stepper.scaler._init_scale = 256.0  # of float16: from 65536 on, first updates are skipped
    return made


def losses(result):
    return [record["train_loss"] for record in result.history]


def assert_close_losses(got, wanted, rel):
    got, wanted = losses(got), losses(wanted)
    assert got == pytest.approx(wanted, rel=rel), f"{got} on {DEVICE}, {wanted} wanted"


# -- arithmetic -----------------------------------------------------------------------------------


def test_the_card_is_found_by_every_name():
    assert pick_device(DEVICE.type).type == DEVICE.type
    if CARD:
        found = pick_device("auto")
        assert found == torch.device("cuda:0")
        half = pace.precision(found), regime.precision(TrainSpec(), found)
        print(torch.cuda.get_device_name(found), torch.__version__, half)  # noqa: T201
        assert evaluate.fixed_batch(found) == evaluate.GPU_BATCH


@pytest.mark.parametrize(
    "options", [{}, {"global_pool": "avg"}, {"pos_embed": "sincos2d"}], ids=str
)
def test_logits_and_every_gradient_are_those_of_the_cpu(options):
    near = network(device=CPU, **options).train()
    far = copy.deepcopy(near).to(DEVICE)
    pictures = Pictures(CPU)
    out = {}
    for net in (near, far):
        place = next(net.parameters()).device
        logits = net(pictures.x.to(place))
        nn.functional.cross_entropy(logits, pictures.y.to(place)).backward()
        out[net] = logits
    assert gap(out[far], out[near]) < 1e-4
    apart = {
        name: gap(p.grad, q.grad)
        for (name, p), q in zip(far.named_parameters(), near.parameters(), strict=True)
        if float(q.grad.abs().max()) > 1e-6  # a key's bias has none but rounding
    }
    worst = max(apart, key=apart.get)
    assert apart[worst] < 1e-3, f"{worst}: relative difference {apart[worst]:.1e}"


def test_a_fresh_head_is_that_of_the_cpu():
    near, far = nn.Linear(8, CLASSES), nn.Linear(8, CLASSES, device=DEVICE)
    torch.manual_seed(3)
    wanted = torch.rand(3, device=DEVICE)
    torch.manual_seed(3)
    for head in (near, far):
        model.start_head(head, 11)
    assert torch.equal(torch.rand(3, device=DEVICE), wanted)
    assert torch.equal(far.weight.cpu(), near.weight)
    assert not far.bias.any()


@pytest.mark.parametrize("path", [probe.logistic_path, probe.ridge_path])
def test_solved_heads_are_those_of_the_cpu(path):
    rng = np.random.default_rng(2)
    y = np.arange(300) % CLASSES
    x = rng.normal(size=(300, 24)).astype(np.float32)
    x[:, :CLASSES] += np.eye(CLASSES, dtype=np.float32)[y]
    rows = x[:200], y[:200], x[200:], y[200:]
    far, near = (path(*rows, classes=CLASSES, device=device) for device in (DEVICE, CPU))
    pairs = zip(far.table, near.table, strict=True)
    apart = max(abs(a["val_loss"] - b["val_loss"]) for a, b in pairs)
    assert apart < 1e-3, f"val losses differ by {apart:.1e}: {far.table}, {near.table}"
    if far.strength == near.strength:
        assert gap(torch.as_tensor(far.weight), torch.as_tensor(near.weight)) < 2e-2


def test_patches_as_a_product_are_the_convolution():
    proj, x = network().patch_embed.proj, torch.randn(5, 3, SIDE, SIDE)
    wanted = nn.functional.conv2d(
        x.double(), proj.weight.detach().double().cpu(), proj.bias.detach().double().cpu(), stride=8
    )
    with torch.inference_mode():
        assert gap(proj.product(x.to(DEVICE)), wanted) < 1e-5
        assert gap(proj(x.to(DEVICE)), wanted) < 1e-5


@torch.inference_mode()
def test_a_float32_convolution_that_is_measured_is_not_rounded():
    x, w = torch.randn(4, 64, 17, 17), torch.randn(32, 64, 3, 3)
    wanted = nn.functional.conv2d(x.double(), w.double())
    near = w.to(DEVICE)
    with evaluate.whole_floats(DEVICE):
        assert gap(nn.functional.conv2d(x.to(DEVICE), near), wanted) < 1e-5


@torch.inference_mode()
def test_the_first_token_alone_is_that_of_the_whole_last_block():
    net, x = network().eval(), Pictures().x
    whole = net.forward_head(net.forward_features(x), pre_logits=True)
    assert gap(net.forward_class_token(x), whole) < 1e-5
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert gap(net.forward_class_token(x), whole) < 3e-2


@torch.inference_mode()
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(half):
    net, x = network().eval(), Pictures().x
    exact = net(x)
    with torch.autocast(DEVICE.type, half):
        found = net(x)
    assert found.dtype == half
    assert gap(found, exact) < 3e-2, (found[0], exact[0])


# -- batches --------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tiny_recipe):
    """Everything of the tiny recipe but the run, on the device."""
    keys = ("train.augment=rand-m9-mstd0.5-inc1", "train.reprob=0.5", f"device={DEVICE}")
    return lambda *more: prepare(tiny_recipe("full", *keys, *more))


def assert_same_batches(got, wanted):
    """Each batch is cloned behind a long kernel: what arrives late, or is overwritten, shows."""
    kept = []
    for x, y, rows in got:
        busy()
        kept.append((x.clone(), y.clone(), rows.clone()))
        del x, y
    wanted = list(wanted)
    assert len(kept) == len(wanted) > 2
    for k, ((x, y, rows), (x0, y0, rows0)) in enumerate(zip(kept, wanted, strict=True)):
        assert x.device == y.device == DEVICE
        assert torch.equal(rows, rows0), f"batch {k}: rows {rows} instead of {rows0}"
        apart = float((x.cpu() - x0).abs().max())
        assert apart < 1e-5, f"batch {k}: pixels differ by {apart:.1e}"
        assert torch.allclose(y.cpu(), y0), f"batch {k}: targets {y} instead of {y0}"


@pytest.mark.parametrize("slow_copies", [False, True])
@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.8, "cutmix": 1.0, "classes": CLASSES}])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_cpu(prepared, monkeypatch, workers, mixing, slow_copies):
    photos, moved = prepared().photos("train", augment=True), loaders._moved

    def slowly(batch, device):
        if device == DEVICE:
            busy()
        return moved(batch, device)

    if slow_copies:
        monkeypatch.setattr(loaders, "_moved", slowly)
    how = {"batch_size": SIZE, "seed": 3, "shuffle": True} | mixing
    far = Batches(photos, device=DEVICE, workers=workers, **how)
    near = Batches(photos, device=CPU, workers=0, **how)
    for epoch in (0, 1):
        assert_same_batches(far.epoch(epoch), near.epoch(epoch))
    far.close()


@pytest.mark.parametrize("kind", ["tokens", "features"])
def test_kept_rows_are_those_of_the_cpu(prepared, kind):
    p = prepared("train.blocks=1", "train.views=2", "head.precision=float32")
    if kind == "tokens":
        kept = boundary.keep(p, "train", views=2)
        make, source = boundary.Tokens, {}
    else:
        kept = learn_room.extract(p, "train", views=1)
        make, source = features.Views, {"names": ()}
    far, near = (make(kept, batch_size=8, seed=3, device=d, **source) for d in (DEVICE, CPU))
    for epoch in (0, 1):
        assert_same_batches(far.epoch(epoch), near.epoch(epoch))
    with no_waiting():
        assert len(list(far.epoch(2))) == len(far)


def test_no_batch_of_photographs_waits_for_the_card(prepared):
    photos = prepared().photos("train", augment=True)
    how = {"mixup": 0.8, "cutmix": 1.0, "classes": CLASSES, "workers": 0}
    batches = Batches(photos, batch_size=8, seed=3, shuffle=True, device=DEVICE, **how)
    list(batches.epoch(0))
    with no_waiting():
        assert len(list(batches.epoch(1))) == len(batches)


# -- updates --------------------------------------------------------------------------------------

SPECS = {
    "plain": {},
    "averaged and clipped": {"ema": 0.9, "clip_grad": 1.0, "label_smoothing": 0.1},
    "AdamW": {"opt": "adamw", "lr": 1e-3, "layer_decay": 0.7, "warmup_epochs": 1},
    "accumulated": {"accumulate": 2},
    "checkpointed": {"grad_checkpointing": True},
}


@pytest.mark.parametrize("spec", SPECS)
def test_float32_losses_are_those_of_the_cpu(spec):
    runs = []
    for device in (DEVICE, CPU):
        net = network(device=device)
        net.set_grad_checkpointing(SPECS[spec].get("grad_checkpointing", False))
        runs.append(trainer(net, spec=SPECS[spec]).fit())
    assert_close_losses(*runs, rel=1e-3)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_learns_as_float32_does(amp):
    half = trainer(network(), spec={"amp": amp, "clip_grad": 1.0})
    result = half.fit()
    assert half.stepper.scaler.is_enabled() == (amp == "fp16")
    assert all(p.dtype == torch.float32 for p in half.net.parameters())
    assert_close_losses(result, trainer(network(), spec={"clip_grad": 1.0}).fit(), rel=0.03)


GRAPHS = {"compile": "reduce-overhead"}


@pytest.mark.parametrize(
    "spec",
    [{"compile": True}, GRAPHS, GRAPHS | {"accumulate": 2, "ema": 0.9}],
    ids=["compiled", "graphs", "graphs accumulated"],
)
def test_compiled_code_learns_as_it_does_without(spec):
    """22 images in fours: the last two of each epoch go without it."""
    spec = {"epochs": 4, "clip_grad": 1.0} | spec
    needs_a_compiler()
    plain = trainer(network(), spec=spec | {"compile": False}).fit()
    assert_close_losses(trainer(network(), spec=spec).fit(), plain, rel=2e-3)


def test_a_run_that_is_compiled_in_its_midst_learns_as_it_does_without(monkeypatch, caplog):
    needs_a_compiler()
    caplog.set_level("INFO", logger="vitft")
    monkeypatch.setattr(pace, "pays", lambda *rest: True)
    spec = {"epochs": 4, "compile": "auto"}
    found = trainer(network(), spec=spec)
    result = found.fit()
    assert found.stepper.compiled, caplog.text
    assert "compiling the model for 13 more updates" in caplog.text
    plain = trainer(network(), spec=spec | {"compile": False}).fit()
    assert_close_losses(result, plain, rel=2e-3)


WAITLESS = {
    "bf16": {"amp": "bf16"},
    "fp16": {"amp": "fp16"},
    "exact": {"amp": "none", "opt": "sgd"},
    "compiled": {"amp": "bf16", "compile": True},
    "graphs": {"amp": "bf16", "compile": "reduce-overhead"},
}


@pytest.mark.parametrize("how", ["hard", "weighted", "soft"])
@pytest.mark.parametrize("kind", WAITLESS)
def test_no_update_waits_for_the_card(kind, how):
    if "compile" in WAITLESS[kind]:
        needs_a_compiler()
        if how != "hard":
            pytest.skip("compiling takes long; once is enough")
    spec = {"opt": "adamw", "ema": 0.9, "clip_grad": 1.0, "accumulate": 2} | WAITLESS[kind]
    weight = torch.rand(CLASSES, device=DEVICE) + 0.5 if how == "weighted" else None
    pictures = Pictures(soft=how == "soft")
    net = network(drop_path_rate=0.1)
    t = trainer(net, pictures, spec=spec, soft=how == "soft", class_weight=weight)
    regime.set_train_mode(net)
    batches = list(pictures.epoch(0))[:2]
    for _ in range(5):  # allocates, compiles, records
        t._update(batches, 2 * SIZE)
    with no_waiting():
        for _ in range(5):
            t._update(batches, 2 * SIZE)
    assert t.state.step == 10
    assert math.isfinite(float(t.state.loss_sum))


def test_a_check_of_the_losses_is_what_does_wait():
    """Else the tests above would pass whatever happens."""
    with pytest.raises(RuntimeError) if CARD else no_waiting(), no_waiting():
        float(torch.ones(3, device=DEVICE).sum())


@pytest.mark.parametrize("n", [22, 300])
def test_a_loss_that_is_nan_is_found_in_time_and_its_photographs_are_named(n):
    """Of long epochs within 25 steps, of short ones at their end; nothing is saved."""
    pictures, saved = Pictures(n=n, spoil=9), []
    first = next(k for k, (_, _, rows) in enumerate(pictures.epoch(0), 1) if 9 in rows)
    t = trainer(network(), pictures, save=saved.append)
    with pytest.raises(DivergedError) as caught:
        t.fit()
    assert f"step {first}: loss nan" in str(caught.value)
    assert "photo_9.jpg" in str(caught.value)
    assert "nothing had been saved yet" in str(caught.value)
    assert t.state.step <= first + CHECK_EVERY
    assert not saved


# -- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("first", "then"), [(DEVICE, DEVICE), (DEVICE, CPU), (CPU, DEVICE)], ids=str
)
def test_a_stopped_run_goes_on_where_it_was_on_either_device(tmp_path, first, then, amp):
    """Not to the bit on a card: its backward pass adds in an order that is not fixed."""
    spec = {"opt": "adamw", "lr": 1e-3, "ema": 0.9, "amp": amp}
    undisturbed, saved, polls = trainer(network(), spec=spec).fit(), [], []

    def save(snapshot):
        saved.append(checkpoint.save(tmp_path, snapshot, identity={}))

    def stop():
        polls.append(1)
        return 15 if len(polls) == 9 else None

    with pytest.raises(Stopped):
        trainer(network(device=first), spec=spec, save=save, stop=stop).fit()
    snapshot = checkpoint.load(saved[-1], identity={})
    assert snapshot.step == 8  # one poll was that of the first epoch's end
    again = trainer(network(device=then), spec=spec)
    result = again.fit(snapshot)
    slots = [v for slot in again.stepper.optimizer.state.values() for v in slot.values()]
    assert {v.device.type for v in slots} == {then.type}
    assert_close_losses(result, undisturbed, rel=1e-3 if amp == "none" else 0.03)


# -- memory ---------------------------------------------------------------------------------------


def test_memory_that_really_runs_out_halves_the_parts_and_keeps_the_result(caplog):
    """The process may use about 60 % of what an update took."""
    if not CARD:
        pytest.skip("a CPU's memory is not ours to bound")
    big = {"patch_size": 4, "embed_dim": 192, "num_heads": 3}
    size = 1024  # 64 tokens of 192 values: about 50 MB for each tensor of activations
    spec = {"epochs": 2}
    pictures = Pictures(n=size, size=size)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    whole = trainer(network(**big), pictures, spec=spec).fit()
    peak = torch.cuda.max_memory_allocated(DEVICE)
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(DEVICE)[1]
    net = network(**big)
    room = torch.cuda.memory_reserved(DEVICE) + 0.6 * (peak - before)
    torch.cuda.set_per_process_memory_fraction(room / total, DEVICE)
    try:
        parts = trainer(net, pictures, spec=spec).fit()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    told = f"{before / 2**20:.0f} MiB before, {peak / 2**20:.0f} at most, {room / 2**20:.0f} given"
    assert parts.splits in (2, 4, 8), told
    assert f"out of memory: going on with parts of {size // 2} images" in caplog.text, told
    assert_close_losses(parts, whole, rel=1e-3)


def no_room():
    """Raises torch's own error; where there is no card, one like it."""
    if CARD:
        torch.empty(2**50, dtype=torch.uint8, device=DEVICE)
    raise torch.cuda.OutOfMemoryError("no room")


def crowded(net, room):
    """Lets no more than so many images of a batch through, while training."""

    def check(module, given):
        if module.training and len(given[0]) > room:
            no_room()

    net.register_forward_pre_hook(check)
    return net


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_an_allocation_that_fails_halves_the_parts_and_keeps_the_result(amp, caplog):
    spec = {"amp": amp, "ema": 0.9, "clip_grad": 1.0}
    parts = trainer(crowded(network(), room=2), spec=spec).fit()
    assert parts.splits == 2
    assert caplog.text.count("out of memory: going on with parts of 2 images") == 1
    rel = 1e-3 if amp == "none" else 0.02
    assert_close_losses(parts, trainer(network(), spec=spec).fit(), rel=rel)


def test_one_image_that_does_not_fit_is_told_with_the_cards_memory():
    with pytest.raises(MachineError) as caught:
        trainer(crowded(network(), room=0)).fit()
    text = str(caught.value)
    assert text.startswith(f"error[env.gpu_memory] {DEVICE}: one image of a batch of 4"), text
    assert ("0.0 of 0.0 GiB free" not in text) or not CARD, text


# -- features -------------------------------------------------------------------------------------


def rows_of(p, device, precision, key):
    how = {"views": 1, "device": device, "backbone_key": key, "precision": precision, "workers": 0}
    net = p.net.to(device)
    return torch.as_tensor(features.extract(net, p.photos("train"), **how).x[0])


def test_features_are_close_to_the_cpus_in_float32_and_in_bfloat16(prepared):
    p = prepared()
    wanted = rows_of(p, CPU, "float32", "cpu")
    exact = rows_of(p, DEVICE, "float32", "exact")
    half = rows_of(p, DEVICE, "auto", "half")
    assert gap(exact, wanted) < 1e-4
    least = float(nn.functional.cosine_similarity(half, wanted).min())
    assert least > 0.999, f"cosine {least:.5f}"
    assert not CARD or not torch.equal(half, exact)


def test_a_backbone_that_is_compiled_in_mid_pass_gives_the_same_rows(prepared, monkeypatch, caplog):
    caplog.set_level("INFO", logger="vitft")
    needs_a_compiler()
    p = prepared()
    monkeypatch.setattr(evaluate, "GPU_BATCH", 2)  # 21 batches, of which 11 are timed
    plain = rows_of(p, DEVICE, "auto", "plain")
    monkeypatch.setattr(pace, "pays", lambda *rest: True)
    started = time.monotonic()
    compiled = rows_of(p, DEVICE, "auto", "compiled")
    said = f"{time.monotonic() - started:.1f} s; {caplog.text}"
    assert "not compiled" not in caplog.text, said
    assert "compiling the backbone for 10 more batches" in caplog.text, said
    assert gap(compiled, plain) < 3e-2, said
