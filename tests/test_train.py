"""The loop: what it trains, that it is a pure function of its seed, that it resumes to the bit."""

import copy
import math
import weakref
from functools import partialmethod

import pytest
import torch
from timm.task import ClassificationTask
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitft import checkpoint, pace, progress, step
from vitft.errors import DivergedError, MachineError, RecipeError, WeightsError
from vitft.inputs import permutation
from vitft.ranks import Ranks
from vitft.recipe import TrainSpec
from vitft.regime import compiles, fast_convolutions, precision, set_train_mode
from vitft.train import Stopped, Trainer, _not_finite

N, WIDTH, CLASSES, SIZE = 22, 6, 3, 4


class Rows:
    """Batches of a fixed table, in an order that depends on (seed, epoch) alone."""

    batch_size = SIZE

    def __init__(self, seed=0, spoil=None):
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(N, WIDTH, generator=generator)
        self.y = torch.arange(N) % CLASSES
        self.x[range(N), self.y] += 2
        self.seed = seed
        if spoil is not None:
            self.x[spoil] = math.nan

    def __len__(self):
        return math.ceil(N / SIZE)

    def epoch(self, epoch, start=0):
        order = torch.as_tensor(permutation(N, self.seed, epoch))
        for rows in order.split(SIZE)[start:]:
            yield self.x[rows], self.y[rows], rows

    def names(self, rows):
        return [f"photo_{int(i)}.jpg" for i in rows]


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, CLASSES))


def on(rows):
    def validate(net):
        net.eval()
        with torch.no_grad():
            logits = net(rows.x)
            loss = nn.functional.cross_entropy(logits, rows.y)
        return float((logits.argmax(1) == rows.y).float().mean()), float(loss)

    return validate


def trainer(net, rows=None, **kwargs):
    rows = rows or Rows()
    options = {"epochs": 3, "lr": 0.05, "opt": "adamw", "ema": 0.9, "clip_grad": 1.0} | kwargs.pop(
        "spec", {}
    )
    spec = TrainSpec(**options)
    return Trainer(net, rows, spec, seed=7, validate=on(rows), **kwargs)


def test_it_learns_and_keeps_the_best_epoch_by_val():
    net, rows = network(), Rows()
    result = trainer(net, rows, spec={"epochs": 12}).fit()
    assert len(result.history) == 12
    assert result.best["val_accuracy"] == max(r["val_accuracy"] for r in result.history)
    assert on(rows)(net) == (result.best["val_accuracy"], result.best["val_loss"])
    assert result.best["val_accuracy"] > 0.9


def test_a_run_is_what_the_loop_written_out_in_torch_gives():
    """AdamW that spares biases, class weights, smoothing, clipping, an average that warms up."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, CLASSES))
    other, average, rows = copy.deepcopy(net), copy.deepcopy(net), Rows()
    weight = torch.tensor([1.0, 2.0, 0.5])
    spec = {"weight_decay": 0.1, "clip_grad": 0.3, "label_smoothing": 0.2, "sched": "constant"}
    t = trainer(net, rows, spec={**spec, "ema": 0.6, "epochs": 2}, class_weight=weight)
    t.validate = lambda m: (0.0, -float(t.state.step) if m is net else 0.0)  # the last is best
    t.fit()

    matrices = [p for p in other.parameters() if p.dim() > 1]
    biases = [p for p in other.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    optimizer, steps = torch.optim.AdamW(groups, lr=0.05), 0
    for epoch in range(2):
        for x, y, _ in rows.epoch(epoch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(other(x), y, weight, label_smoothing=0.2)
            loss.backward()
            nn.utils.clip_grad_norm_(other.parameters(), 0.3)
            optimizer.step()
            decay = min(0.6, 1 - (1 + steps) ** (-2 / 3))  # timm's ModelEmaV3
            steps += 1
            for a, p in zip(average.parameters(), other.parameters(), strict=True):
                a.data.lerp_(p.data, 1 - decay)
    for got, wanted in ((net, other), (t.stepper.moving.average, average)):
        for a, b in zip(got.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_same_seed_gives_the_same_weights_bit_for_bit():
    nets = [network(), network()]
    for net in nets:
        torch.manual_seed(id(net) % 1000)  # what the caller drew before must not matter
        trainer(net).fit()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_callers_generator_is_left_as_it_was():
    net = network()
    torch.manual_seed(99)
    expected = torch.rand(3)
    torch.manual_seed(99)
    trainer(net).fit()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop_after", range(1, 18))
def test_resume_after_any_step_is_bit_equal(tmp_path, stop_after, accumulate):
    spec = {"accumulate": accumulate, "checkpoint_minutes": 5.0}
    whole, records = network(), []
    undisturbed = trainer(whole, spec=spec, on_record=records.append).fit()

    saved, updates, first = [], [0], []

    def stop():
        updates[0] += 1
        return 15 if updates[0] == stop_after else None

    def save(snapshot):
        saved.append(checkpoint.save(tmp_path, snapshot, identity={"run": 1}))

    broken, stopped = network(), None
    try:
        trainer(broken, spec=spec, save=save, stop=stop, on_record=first.append).fit()
    except Stopped as signal:
        stopped = signal.signum
    if stopped is not None:
        assert stopped == 15
        again, second = network(), []
        snapshot = checkpoint.load(checkpoint.newest(tmp_path), identity={"run": 1})
        resumed = trainer(again, spec=spec, on_record=second.append).fit(snapshot)
        rows = [{k: v for k, v in r.items() if k != "seconds"} for r in first + second]
        assert rows == [{k: v for k, v in r.items() if k != "seconds"} for r in records]
        assert resumed.best["step"] == undisturbed.best["step"]
        broken = again
    for a, b in zip(whole.state_dict().values(), broken.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_accumulating_equals_one_large_batch():
    torch.manual_seed(0)
    one, two = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)
    two.load_state_dict(one.state_dict())

    class Wide(Rows):
        def __len__(self):
            return math.ceil(N / (2 * SIZE))

        def epoch(self, epoch, start=0):
            order = torch.as_tensor(permutation(N, self.seed, epoch))
            for rows in order.split(2 * SIZE)[start:]:
                yield self.x[rows], self.y[rows], rows

    options = {"opt": "sgd", "ema": None}
    trainer(one, Rows(), spec={**options, "accumulate": 2}).fit()
    trainer(two, Wide(), spec=options).fit()
    torch.testing.assert_close(one.weight, two.weight, atol=1e-6, rtol=1e-5)


def test_X8_out_of_memory_halves_the_parts_and_keeps_the_result(monkeypatch):
    torch.manual_seed(0)
    plain, split = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)
    split.load_state_dict(plain.state_dict())
    trainer(plain, spec={"ema": None}).fit()

    whole = split.forward

    def forward(x):
        if len(x) > 2:
            raise torch.cuda.OutOfMemoryError("no room")
        return whole(x)

    t = trainer(split, spec={"ema": None})
    monkeypatch.setattr(split, "forward", forward)
    validate = t.validate

    def roomy(net):
        monkeypatch.setattr(split, "forward", whole)
        scored = validate(net)
        monkeypatch.setattr(split, "forward", forward)
        return scored

    t.validate = roomy
    result = t.fit()
    assert result.splits == 2
    torch.testing.assert_close(plain.weight, split.weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("missing", ["memory", "something else"])
def test_X8_memory_that_runs_out_while_compiling_halves_the_parts_too(monkeypatch, missing):
    """The error is torch's own, as it comes out of its compiler."""

    def backend(graph, inputs):
        if missing != "memory":
            raise ValueError(missing)
        if any(x.shape[:1] == (4,) for x in inputs if x.dim() == 2 and not x.requires_grad):
            raise torch.cuda.OutOfMemoryError("no room")
        return graph.forward

    def compile_task(self, **kwargs):
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, dynamic=False)

    monkeypatch.setattr(ClassificationTask, "compile", compile_task)
    plain, split = network(), network()
    plain[2].p = split[2].p = 0.0
    if missing != "memory":
        with pytest.raises(MachineError) as caught:
            trainer(split, spec={"ema": None, "compile": True}).fit()
        told, fix = str(caught.value).split("\nfix: ")
        assert told.startswith("error[env.not_compiled] cpu: the model cannot be compiled: Backend")
        assert missing in told
        assert fix == (
            "give this torch what it compiles with (Triton, a C++ compiler), or set "
            "train.compile: false"
        )
        return
    assert trainer(split, spec={"ema": None, "compile": True}).fit().splits == 2
    trainer(plain, spec={"ema": None, "compile": False}).fit()
    torch.testing.assert_close(plain[3].weight, split[3].weight, atol=1e-6, rtol=1e-5)


def cramped(net, monkeypatch, room=2):
    """Lets no more than `room` rows through a network at once; says which activations live."""
    whole, made = net.forward, []

    def forward(x):
        out = whole(x)
        made.append(weakref.ref(out))
        if torch.is_grad_enabled() and len(x) > room:
            raise torch.cuda.OutOfMemoryError("no room")
        return out

    monkeypatch.setattr(net, "forward", forward)
    return lambda: [ref for ref in made if ref() is not None]


def test_X8_when_memory_is_emptied_the_activations_of_the_attempt_are_gone(monkeypatch):
    net = network()
    living, seen = cramped(net, monkeypatch), []
    monkeypatch.setattr(step, "warn", lambda text: seen.append((text, living())))
    trainer(net, spec={"ema": None}).fit()
    assert seen == [
        ("out of memory: going on with parts of 2 images, same effective batch", []),
    ]


def normalised():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))


def test_X8_a_batch_is_not_cut_where_its_images_are_normalised_together(monkeypatch):
    net = normalised()
    cramped(net, monkeypatch)
    with pytest.raises(MachineError) as caught:
        trainer(net, spec={"ema": None}).fit()
    assert str(caught.value) == (
        "error[env.gpu_memory] cpu: a batch of 4 images does not fit (0.0 GiB in use by this run, "
        "0.0 of 0.0 GiB free), and 1 batch-normalisation layers that are trained would give other "
        "results on its parts\nfix: set train.batch_size: 2 and train.accumulate: 2, or "
        "train.grad_checkpointing: true, or free the GPU"
    )


def test_X8_frozen_batch_normalisation_is_no_reason_not_to_cut(monkeypatch):
    net = normalised()
    net[:2].requires_grad_(False)
    before = net[1].running_mean.clone()
    for room, splits in ((4, 1), (2, 2)):
        with monkeypatch.context() as patch:
            cramped(net, patch, room)
            assert trainer(net, spec={"ema": None}).fit().splits == splits
    assert torch.equal(net[1].running_mean, before)


def test_X12_a_loss_that_is_not_finite_stops_before_the_weights_are_touched():
    net, rows = network(), Rows(spoil=9)
    saved = []
    t = trainer(net, rows, spec={"ema": None}, save=saved.append)
    with pytest.raises(DivergedError, match=r"error\[train.diverged\] epoch 1, step \d") as e:
        t.fit()
    assert "photo_9.jpg" in str(e.value)
    assert "learning rate" in str(e.value)
    assert "fix: lower train.lr" in str(e.value)
    assert "nothing had been saved yet" in str(e.value)
    assert e.value.exit_code == 6
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert not saved


def test_X12_where_losses_are_read_late_the_first_bad_step_is_named():
    """As on CUDA, where a look stops the queue: here the epoch ends before one is due."""
    net, rows = network(), Rows(spoil=9)
    step = next(k for k, (_, _, own) in enumerate(rows.epoch(0), 1) if 9 in own)
    assert step < len(rows)
    saved = []
    t = trainer(net, rows, spec={"ema": None}, save=saved.append)
    t.queues = True
    with pytest.raises(DivergedError, match=rf"epoch 1, step {step}: loss nan .*photo_9.jpg"):
        t.fit()
    assert not saved


@pytest.mark.parametrize("at", [1, 2, 3])
def test_X12_nan_validation_never_ranks_as_best(at):
    net, rows = network(), Rows()
    truth = on(rows)
    calls = []

    def validate(model):
        calls.append(1)
        return (math.nan, math.nan) if len(calls) == at else truth(model)

    t = trainer(net, rows, spec={"ema": None})
    t.validate = validate
    result = t.fit()
    assert len(result.history) == 3
    assert result.best["epoch"] != at


def test_patience_ends_the_run():
    net = network()
    t = trainer(net, spec={"epochs": 50, "ema": None, "patience": 2})
    t.validate = lambda model: (0.5, 1.0)
    assert len(t.fit().history) == 3


def test_layer_decay_reaches_the_learning_rates():
    import timm

    import vitft  # noqa: F401

    net = timm.create_model(
        "vitflower_ti16", img_size=32, depth=2, embed_dim=32, num_heads=2, num_classes=3
    )
    spec = TrainSpec(opt="adamw", lr=1e-3, layer_decay=0.5, epochs=2)

    class Images(Rows):
        pass

    t = Trainer(net, Images(), spec, seed=0, validate=lambda m: (0.0, 0.0))
    rates = {round(g["lr"] / 1e-3, 4) for g in t.stepper.optimizer.param_groups}
    assert rates == {0.125, 0.25, 0.5, 1.0}


def test_layer_decay_without_layers_is_refused():
    with pytest.raises(RecipeError, match="is 0.5, but timm sees no layers in Sequential") as e:
        trainer(network(), spec={"layer_decay": 0.5})
    trainer(nn.Linear(WIDTH, CLASSES), spec={"layer_decay": 0.5})  # a head has none, and needs none
    assert "set train.layer_decay: null" in str(e.value)


@pytest.mark.parametrize(("name", "fused"), [("adamw", True), ("momentum", True), ("lion", None)])
def test_torchs_own_optimizers_run_as_one_kernel(name, fused):
    t = trainer(network(), spec={"opt": name})
    assert t.stepper.optimizer.defaults.get("fused") is fused
    t.fit()


def test_compiled_code_sees_one_shape_and_is_made_once(monkeypatch):
    sizes, eager = [], network()
    trainer(eager).fit()

    def backend(graph, inputs):
        sizes.append([tuple(t.shape) for t in inputs if t.dim() == 2 and t.shape[1] == WIDTH])
        return graph.forward

    def compile_task(self, **kwargs):
        self.trainable_module = torch.compile(self.trainable_module, backend=backend)

    net = network()
    monkeypatch.setattr(ClassificationTask, "compile", compile_task)
    trainer(net, spec={"compile": True}).fit()
    assert len(sizes) == 1  # training in the usual shape; 22 rows end in a batch of 2
    assert (SIZE, WIDTH) in sizes[0]
    for a, b in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_torch_that_refuses_to_compile_what_was_asked_for_is_named(monkeypatch):
    def refuse(self, **kwargs):
        raise RuntimeError("not supported on this Python")

    monkeypatch.setattr(ClassificationTask, "compile", refuse)
    with pytest.raises(
        MachineError, match=r"env.not_compiled.*cannot be compiled: RuntimeError: n"
    ):
        trainer(network(), spec={"compile": True})


@pytest.mark.parametrize("count", [3, 5])
def test_an_epoch_of_one_batch_of_any_size_is_compiled(monkeypatch, count):
    """Two hundred photographs on a GPU, where a batch has 256; or with the last joined to it."""
    sizes = []

    def backend(graph, inputs):
        sizes.extend(len(t) for t in inputs if t.dim() == 2 and t.shape[1] == WIDTH)
        return graph.forward

    class Few(Rows):
        def __len__(self):
            return 1

        def epoch(self, epoch, start=0):
            rows = torch.arange(count)
            yield self.x[rows], self.y[rows], rows

    def compile_task(self, mode, dynamic):
        module = self.trainable_module
        self.trainable_module = torch.compile(module, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(ClassificationTask, "compile", compile_task)
    trainer(network(), Few(), spec={"compile": True}).fit()
    assert count in sizes


@pytest.mark.parametrize(("given", "mode"), [(True, None), ("reduce-overhead", "reduce-overhead")])
def test_graphs_are_asked_for_by_name(monkeypatch, given, mode):
    asked = []
    monkeypatch.setattr(ClassificationTask, "compile", lambda self, **k: asked.append(k))
    trainer(network(), spec={"compile": given})
    assert asked == [{"mode": mode, "dynamic": False}]


def test_frozen_parts_stay_in_eval_mode():
    net = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, CLASSES))
    net.requires_grad_(False)
    net[2].requires_grad_(True)
    set_train_mode(net)
    assert [m.training for m in net] == [False, False, True]
    net.requires_grad_(True)
    set_train_mode(net)
    assert all(m.training for m in net)


def test_no_forward_exchanges_buffers_since_ranks_may_make_unequally_many(monkeypatch):
    """One that ends out of memory is begun anew in smaller parts, on that rank alone."""
    said = {}
    monkeypatch.setattr(ClassificationTask, "prepare_distributed", lambda self, **k: said.update(k))
    trainer(network(), ranks=Ranks(0, 2))
    assert said["broadcast_buffers"] is False


@pytest.mark.parametrize(
    ("cost", "minutes", "kept"),
    [
        (0.9, 5, [1, 2, 3, 4, 5, 6, 7, 8]),  # so short that nobody waits for it
        (2.0, 5, [1, 6, 8]),  # an epoch takes ten seconds
        (2.0, 0.4, [1, 4, 7, 8]),
        (60.0, 5, [1, 8]),
    ],
)
def test_checkpoints_take_a_twentieth_of_the_time_at_most(monkeypatch, cost, minutes, kept):
    """On a GPU an epoch of few photographs takes a second, and writing a ViT-B longer."""
    clock, saved = [0.0], []
    monkeypatch.setattr("vitft.train.time.monotonic", lambda: clock[0])

    def save(snapshot):
        clock[0] += cost
        saved.append(snapshot.epoch)

    t = trainer(network(), save=save, spec={"epochs": 8, "checkpoint_minutes": minutes})
    scored = t.validate

    def validate(net):
        clock[0] += 5.0  # for each of the plain and the average weights
        return scored(net)

    t.validate = validate
    t.fit()
    assert saved == kept


def test_an_epoch_that_patience_ends_is_kept(monkeypatch):
    clock, saved = [0.0], []
    monkeypatch.setattr("vitft.train.time.monotonic", lambda: clock[0])

    def save(snapshot):
        clock[0] += 60
        saved.append(snapshot.epoch)

    t = trainer(network(), save=save, spec={"epochs": 9, "patience": 2})
    t.validate = lambda net: (0.5, 1.0)
    t.fit()
    assert saved == [1, 3]


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path):
    saved = []

    def save(snapshot):
        saved.append(checkpoint.save(tmp_path, snapshot, identity={"classes": ["a", "b"]}))

    trainer(network(), save=save).fit()
    with pytest.raises(WeightsError, match=r"ckpt.other_run.*classes \['a', 'b'\] \(now \['a'\]\)"):
        checkpoint.load(saved[-1], identity={"classes": ["a"]})
    assert checkpoint.load(saved[-1], identity={"classes": ["a"]}, anyway=True).epoch == 3


def test_one_flipped_byte_in_a_checkpoint_is_noticed(tmp_path):
    kept = []

    def save(snapshot):
        kept.append(checkpoint.save(tmp_path, snapshot, identity={}))

    trainer(network(), save=save).fit()
    older, newer = sorted(tmp_path.glob("step-*"))
    file = newer / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsError, match=r"ckpt.corrupt.*state.safetensors"):
        checkpoint.load(newer, identity={})
    assert checkpoint.newest(tmp_path) == older


def test_a_checkpoint_from_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    kept = []

    def save(snapshot):
        kept.append(checkpoint.save(tmp_path, snapshot, identity={}))

    trainer(network(), save=save).fit()
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(WeightsError, match=r"ckpt.newer.*format 2, this vitft reads up to 1"):
        checkpoint.load(kept[-1], identity={})


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor, which on CUDA waits for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads(steps, **kwargs):
    rows = Rows()
    rows.x, rows.y = rows.x.repeat(steps, 1), rows.y.repeat(steps)

    class Long(Rows):
        def __len__(self):
            return steps

        def epoch(self, epoch, start=0):
            for _ in range(start, steps):
                yield rows.x[:SIZE], rows.y[:SIZE], torch.arange(SIZE)

    t = trainer(network(), Long(), spec={"epochs": 1}, **kwargs)
    t.queues = True  # as on CUDA
    with Reads() as counted:
        t.fit()
    return counted.count


def test_on_cuda_no_step_waits_for_the_device():
    few, many, more = reads(4), reads(20), reads(30)
    assert few == many  # of the epoch's end alone
    assert more == many + 1  # one look in 25 steps whether the loss is finite


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}


@pytest.mark.parametrize("amp", HALF)
def test_half_precision_is_what_the_layers_compute_in(amp):
    seen, net = set(), network()
    net[0].register_forward_hook(lambda module, args, out: seen.add((module.training, out.dtype)))
    t = trainer(net, spec={"amp": amp})
    result = t.fit()
    assert (True, HALF[amp]) in seen
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert t.stepper.scaler.is_enabled() == (amp == "fp16")
    plain = trainer(network(), spec={"amp": "none"}).fit()
    losses = [[r["train_loss"] for r in run.history] for run in (result, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # scaled, clipped after it, and back


def test_X12_the_gradient_norm_of_half_precision_is_told_as_it_is_without():
    """Before the update, where it is still scaled, and behind it."""
    told = {}
    for amp in ("fp16", "none"):
        t = trainer(network(), spec={"amp": amp, "clip_grad": None})
        batch = next(t.batches.epoch(0))
        t.stepper.gradients([batch], SIZE)
        before = t.stepper.gradient_norm()
        assert f"gradient norm {before:.3g}" in str(t._diverged(1, "loss nan", "x.jpg"))
        t.stepper.apply()
        told[amp] = (before, t.stepper.gradient_norm())
    assert told["fp16"] == pytest.approx(told["none"], rel=0.01)


@pytest.mark.parametrize("to", ["fp16", "bf16"])
@pytest.mark.parametrize("of", ["fp16", "bf16"])
def test_a_run_goes_on_with_the_scale_it_had_and_on_a_gpu_that_needs_another(tmp_path, of, to):
    saved, whole = [], network()

    def save(snapshot):
        saved.append(checkpoint.save(tmp_path, snapshot, identity={}, keep=99))

    t = trainer(whole, spec={"amp": of, "checkpoint_minutes": 0.0}, save=save)
    t.stepper.scaler._init_scale, t.stepper.scaler._growth_interval = 1024.0, 4
    t.fit()
    snapshot = checkpoint.load(saved[6], identity={})
    assert snapshot.numbers["scaler"].get("scale") == (2048.0 if of == "fp16" else None)
    again = trainer(network(), spec={"amp": to})
    again.fit(snapshot)
    if of == to:
        assert again.stepper.scaler.get_scale() == t.stepper.scaler.get_scale()
        for a, b in zip(whole.parameters(), again.net.parameters(), strict=True):
            assert torch.equal(a, b)
    else:
        assert again.stepper.scaler.get_scale() == (2.0**16 if to == "fp16" else 1.0)


@pytest.mark.parametrize(("native", "half"), [(True, torch.bfloat16), (False, torch.float16)])
def test_bfloat16_that_a_gpu_only_emulates_is_not_taken(monkeypatch, native, half):
    """torch answers yes for a T4 too, where bfloat16 is slower than float32."""

    def answer(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
    assert precision(TrainSpec(), torch.device("cuda")) is half
    assert precision(TrainSpec(), torch.device("cpu")) is None


def test_several_ranks_compile_from_the_start_where_a_run_is_long_and_never_a_head_alone():
    cuda, head = torch.device("cuda"), nn.Linear(WIDTH, CLASSES)
    assert compiles(TrainSpec(), network(), cuda, 2000, 2)
    assert not compiles(TrainSpec(), network(), cuda, 1999, 2)
    assert not compiles(TrainSpec(), network(), torch.device("cpu"), 2000, 2)
    assert not compiles(TrainSpec(), head, cuda, 10**6, 2)
    assert not compiles(TrainSpec(), network(), cuda, 10**6)  # one process looks at the clock first
    assert compiles(TrainSpec(compile=True), head, torch.device("cpu"), 1)


def compiled_by(task, backend, mode, dynamic):
    """In place of timm's."""
    assert (mode, dynamic) == (None, False)
    task.trainable_module = torch.compile(task.trainable_module, backend=backend)
    task.eval_model = task.trainable_module


def watched(monkeypatch, backend, *, net=None, spec=None, left=None):
    """A run on this CPU that is timed as if it were on CUDA; compiling pays with `left` to come."""
    asked = []

    def pays(device, times, seconds, waited, gain):
        asked.append(times)
        return left is None or times == left

    def compile_task(self, mode, dynamic):
        if backend is None:
            raise RuntimeError("torch.compile is not supported on this Python")
        compiled_by(self, backend, mode, dynamic)

    monkeypatch.setattr(pace, "pays", pays)
    monkeypatch.setattr(ClassificationTask, "compile", compile_task)
    t = trainer(net or network(), spec={"compile": "auto"} | (spec or {}))
    t.stepper.watch.watching = True
    return t, t.fit(), asked


def test_a_run_is_compiled_in_its_midst_once_that_pays(monkeypatch, caplog):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    caplog.set_level("INFO", logger="vitft")
    plain = trainer(network())
    plain.fit()
    total, timed = plain.state.step, pace.WARM + pace.TIMED
    t, _, asked = watched(monkeypatch, backend)
    assert asked == [total - timed]  # once
    assert len(graphs) == 1
    assert f"compiling the model for {total - timed} more updates, about 60 s" in caplog.text
    for a, b in zip(t.net.parameters(), plain.net.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    watched(monkeypatch, backend, left=total - timed + 1)
    assert len(graphs) == 1  # it would not have paid


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_compiled_in_its_midst_is_kept_and_gone_on_with_as_any_other(
    monkeypatch, tmp_path, accumulate, soft
):
    def mixed(rows):
        rows.y = nn.functional.one_hot(rows.y, CLASSES) * 0.7 + 0.1 if soft else rows.y
        return {"rows": rows, "soft": soft}

    def save(snapshot):
        saved.append((t.stepper.compiled, checkpoint.save(tmp_path, snapshot, identity={}, keep=9)))

    spec = {"accumulate": accumulate, "epochs": 3 * accumulate, "compile": "auto"}
    plain = trainer(network(), spec=spec, **mixed(Rows()))
    plain.validate = on(Rows())
    whole, saved = plain.fit(), []
    monkeypatch.setattr(pace, "pays", lambda *given: True)
    monkeypatch.setattr(ClassificationTask, "compile", partialmethod(compiled_by, "aot_eager"))
    t = trainer(network(), spec=spec, save=save, **mixed(Rows()))
    t.validate, t.stepper.watch.watching = on(Rows()), True
    found = t.fit()
    before, after = saved[0], saved[-2]
    assert (before[0], after[0], t.stepper.compiled) == (False, True, True)
    kept = checkpoint.load(after[1], identity={})
    assert (
        kept.tensors.keys() == progress.snapshot(plain.state, plain.stepper.moving).tensors.keys()
    )
    again = trainer(network(), spec=spec, **mixed(Rows()))
    again.validate = on(Rows())
    for result, other in ((found, t), (again.fit(kept), again)):
        assert result.best["epoch"] == whole.best["epoch"]
        a, b = other.net.state_dict(), plain.net.state_dict()
        assert a.keys() == b.keys()
        torch.testing.assert_close(a, b)
        average = other.stepper.moving.average.state_dict()
        torch.testing.assert_close(average, plain.stepper.moving.average.state_dict())


def test_what_comes_between_epochs_is_no_waiting_for_photographs(monkeypatch):
    """Six updates an epoch: the eight that are timed lie on both sides of one's end."""
    clock = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock[0])
    asked, t = [], trainer(network(), spec={"compile": "auto", "epochs": 3})
    monkeypatch.setattr(pace, "pays", lambda *given: asked.append(given))
    gradients, validate, t.stepper.watch.watching = t.stepper._gradients, t.validate, True

    def slow(work, seconds):
        def slowly(*args, **kwargs):
            clock[0] += seconds
            return work(*args, **kwargs)

        return slowly

    monkeypatch.setattr(t.stepper, "_gradients", slow(gradients, 2.0))
    t.validate = slow(validate, 1000.0)
    t.batches.epoch = lambda epoch, start=0: (
        slow(lambda b: b, 0.5)(batch) for batch in Rows().epoch(epoch, start)
    )
    t.fit()
    ((_, left, seconds, waited, _),) = asked
    assert (left, seconds) == (7, pytest.approx(2.0))
    assert waited == pytest.approx(0.5 * 7 / 8)


def assert_as_before(said, caplog, t, plain):
    (told,) = [m for m in caplog.messages if "env.not_compiled" in m]
    assert told.startswith("error[env.not_compiled] cpu: the model was not compiled, and goes on")
    assert said in told
    assert not any("out of memory: going on" in m for m in caplog.messages)
    assert not t.stepper.compiled
    a, b = t.net.state_dict(), plain.net.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("at_once", [False, True])
def test_where_no_compiler_is_a_run_goes_on_without_and_says_so(monkeypatch, caplog, at_once):
    def backend(graph, inputs):
        raise RuntimeError("Failed to find C compiler")

    plain = trainer(network())
    plain.fit()
    t, _, _ = watched(monkeypatch, None if at_once else backend)
    said = "torch.compile is not supported" if at_once else "Failed to find C compiler"
    assert_as_before(said, caplog, t, plain)


def test_X8_memory_that_only_a_compiler_lacks_neither_ends_a_run_nor_cuts_its_batches(
    monkeypatch, caplog
):
    """Nobody asked for it, and the batch was fine; with batch normalisation the run would end."""

    def backend(graph, inputs):
        raise torch.cuda.OutOfMemoryError("no room to compile")

    plain = trainer(normalised())
    plain.fit()
    t, result, _ = watched(monkeypatch, backend, net=normalised())
    assert_as_before("OutOfMemoryError", caplog, t, plain)
    assert result.splits == 1


def test_a_compiler_that_fails_behind_the_forward_leaves_no_batch_in_the_statistics(
    monkeypatch, caplog
):
    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no backward")

    class Compiled(nn.Module):
        def __init__(self, net, **kwargs):
            super().__init__()
            self._orig_mod = net

        def forward(self, x):
            return Late.apply(self._orig_mod(x))

    plain = trainer(normalised())
    plain.fit()
    monkeypatch.setattr(torch, "compile", Compiled)
    t, _, _ = watched(monkeypatch, "late", net=normalised())
    assert_as_before("no backward", caplog, t, plain)


@pytest.mark.parametrize("spec", [{"compile": False}, {"compile": "auto"}])
def test_nothing_is_timed_that_may_not_be_compiled_or_is_not_on_cuda(spec):
    t = trainer(network(), spec=spec)
    t.fit()
    assert not t.stepper.watch.times


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_tensor_that_is_not_finite_is_named_and_large_numbers_are_not(bad):
    tensors = {k: torch.ones(3, 4) for k in ("a", "b", "c", "d")}
    tensors["a"][1, 2] = 3e38  # its norm overflows
    assert _not_finite(tensors) == []
    tensors["b"][0, 0] = tensors["d"][2, 3] = bad
    assert _not_finite(tensors) == ["b", "d"]


def test_convolutions_are_tried_out_on_cuda_while_training_and_no_longer():
    def validate(net):
        seen.append(torch.backends.cudnn.benchmark)
        return 0.5, 1.0

    seen, t = [], trainer(network())
    t.validate = validate
    t.fit()
    with fast_convolutions(torch.device("cuda")):
        seen.append(torch.backends.cudnn.benchmark)
    assert seen == [False] * 6 + [True]
    assert not torch.backends.cudnn.benchmark


def test_the_better_of_average_and_plain_weights_is_kept():
    for winner in ("plain", "ema"):
        net, t = network(), None
        t = trainer(net)
        t.validate = lambda m, t=t, w=winner: (0.9 if (m is t.net) == (w == "plain") else 0.5, 1.0)
        assert t.fit().weights == winner
