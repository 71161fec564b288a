"""In which precision a backbone runs, and when it is compiled: decided by rules, told where not."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from vitft import pace
from vitft.errors import MachineError
from vitft.predict import Predictor
from vitft.run import run

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def flags(monkeypatch):
    """Says which flags the processor has."""

    def fake(*names):
        monkeypatch.setattr(pace, "cpu_flags", lambda: frozenset(names))

    return fake


@pytest.fixture
def capability(monkeypatch):
    def fake(*pair):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: pair)

    return fake


@pytest.mark.parametrize("native", ["avx512_bf16", "amx_bf16", "bf16", ""])
def test_a_cpu_is_exact_unless_asked_and_able(native, flags):
    flags("avx2", "avx512f", native)
    assert pace.precision(CPU) is torch.float32
    assert pace.precision(CPU, "float32") is torch.float32
    if native:
        assert pace.precision(CPU, "bfloat16") is torch.bfloat16
        return
    with pytest.raises(MachineError) as caught:
        pace.precision(CPU, "bfloat16")
    assert str(caught.value) == (
        "error[env.no_bfloat16] head.precision: cpu does not compute in bfloat16; it would be "
        "slower than float32\nfix: set head.precision: auto"
    )


@pytest.mark.parametrize(("pair", "half"), [((9, 0), True), ((8, 0), True), ((7, 5), False)])
def test_cuda_runs_in_bfloat16_where_it_has_it(pair, half, capability):
    capability(*pair)
    assert pace.precision(CUDA) is (torch.bfloat16 if half else torch.float32)
    assert pace.precision(CUDA, "float32") is torch.float32


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16\nflags\t\t: fpu", {"fpu", "avx2", "avx512_bf16"}),
        ("Features\t: fp asimd bf16\n", {"fp", "asimd", "bf16"}),
        ("nothing of it", set()),
    ],
)
def test_flags_are_read_as_linux_writes_them(text, found, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: text)
    assert pace.cpu_flags.__wrapped__() == found


def test_no_flags_where_linux_does_not_tell(monkeypatch):
    def missing(self, encoding):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    assert pace.cpu_flags.__wrapped__() == frozenset()


@pytest.mark.parametrize(
    ("device", "batches", "seconds", "waited", "wanted"),
    [
        (CUDA, 40_000, 0.025, 0.0, True),  # 1,000 s of forward, 120 of them won back
        (CUDA, 40_000, 0.025, 0.03, False),  # waits for photographs
        (CUDA, 10_000, 0.025, 0.0, False),  # wins 30 s, for 60
        (CPU, 40_000, 0.025, 0.0, False),
    ],
)
def test_compiling_must_win_back_its_time(device, batches, seconds, waited, wanted):
    assert pace.pays(device, batches, seconds, waited, 0.12) is wanted


@pytest.fixture(autouse=True)
def no_card(monkeypatch):
    monkeypatch.setattr(pace.Watch, "_synchronize", lambda self: None)


class Watched(pace.Paced):
    """On this CPU, as if it were CUDA."""

    def __init__(self, forward, batches):
        super().__init__(forward, CUDA, batches)


@pytest.fixture
def compiler(monkeypatch):
    """torch.compile, replaced: what it was given, and whether it fails."""
    calls = {"fails": "", "given": []}

    def compiled(forward, dynamic):
        calls["given"].append(forward)
        if calls["fails"] == "at once":
            raise RuntimeError("torch.compile is not supported on this Python")

        def fast(x):
            if calls["fails"]:
                raise RuntimeError("Failed to find C compiler.\nPlease specify one")
            return forward(x) + 1

        return fast

    monkeypatch.setattr(torch, "compile", compiled)
    return calls


def results(paced, count):
    return [float(paced(torch.zeros(1))) for _ in range(count)]


def test_it_is_compiled_in_mid_pass_once_that_pays(compiler, monkeypatch):
    monkeypatch.setattr(pace, "COST", 0.0)
    monkeypatch.setattr(pace, "pays", lambda device, times, *rest: times == 9)
    watched = pace.WARM + pace.TIMED
    assert results(Watched(lambda x: x, watched + 9), watched + 3) == [0.0] * watched + [1.0] * 3
    assert len(compiler["given"]) == 1
    assert results(Watched(lambda x: x, watched + 8), watched + 3) == [0.0] * (watched + 3)
    assert len(compiler["given"]) == 1


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("later", "Failed to find C compiler. Please specify one"),
        ("at once", "torch.compile is not supported on this Python"),
    ],
)
def test_a_forward_that_cannot_be_compiled_goes_on_and_says_so(
    compiler, monkeypatch, caplog, fails, said
):
    compiler["fails"] = fails
    monkeypatch.setattr(pace, "pays", lambda *a: True)
    with caplog.at_level("WARNING", logger="vitft"):
        assert results(Watched(lambda x: x, 100), 14) == [0.0] * 14
    assert caplog.messages == [
        "error[env.not_compiled] cuda:0: the backbone was not compiled, and goes on as before, "
        f"slower: RuntimeError: {said}\n"
        "fix: give this torch what it compiles with (Triton, a C++ compiler), or leave it as it is"
    ]


def test_on_cpu_nothing_is_timed_or_compiled(compiler):
    paced = pace.Paced(lambda x: x, CPU, 10**9)
    assert results(paced, 20) == [0.0] * 20
    assert not compiler["given"]
    assert not paced.watch.times


def test_the_recipe_asks_and_the_machine_answers(tiny_recipe, flags):
    flags()
    with pytest.raises(MachineError, match=r"env.no_bfloat16\] head.precision"):
        run(tiny_recipe("probe", "head.precision=bfloat16"))
    flags("avx512_bf16")
    half = run(tiny_recipe("probe", "head.precision=bfloat16"))
    exact = run(tiny_recipe("probe"))
    gap = abs(half.predictions.logits - exact.predictions.logits).max()
    assert 0 < gap < 0.5


@pytest.mark.parametrize("mode", ["probe", "full"])
def test_a_product_predicts_in_what_it_was_measured_in(mode, tiny_recipe, flags):
    """The run's own photographs get the run's own probabilities, to the digit that it wrote."""
    flags("avx512_bf16")
    soft = ["probe.strengths=[0.001]", "trust.calibrate=false"]  # no probability of nearly 1
    result = run(tiny_recipe(mode, "head.precision=bfloat16", "train.epochs=1", *soft))
    gaps = {}
    with (result.folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    files = [Path(result.folder.parents[2] / "photos" / row["path"]) for row in rows]
    wanted = np.array([[float(row[f"p:{c}"]) for c in ("blue", "green", "red")] for row in rows])
    for native in ("avx512_bf16", ""):
        flags(native)
        predictor = Predictor(result.folder / "model", device="cpu")
        found = np.stack([answer.probabilities for answer in predictor(files)])
        gaps[native] = abs(found - wanted).max()
    assert predictor.card.precision == "bfloat16"
    assert predictor.card.head_precision == ("float32" if mode == "probe" else "auto")
    assert gaps["avx512_bf16"] < 1e-7
    assert 1e-5 < gaps[""] < 0.1  # in float32 where bfloat16 would be emulated


def test_what_was_measured_in_float32_stays_exact_on_a_gpu(capability):
    capability(9, 0)
    assert pace.as_measured(CUDA, "float32") is torch.float32
    assert pace.as_measured(CUDA, "bfloat16") is torch.bfloat16
    assert pace.as_measured(CUDA, "auto") is torch.bfloat16  # a Card of before
    capability(7, 5)
    assert pace.as_measured(CUDA, "bfloat16") is torch.float32
