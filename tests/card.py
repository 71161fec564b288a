"""Where the tests of CUDA run: on a card, or elsewhere by name, to see that they are well wired.

    pytest tests/test_cuda.py tests/test_cuda_runs.py
    VITFT_TEST_DEVICE=cpu pytest tests/test_cuda.py tests/test_cuda_runs.py

On a CPU what only a card has (streams, its memory, sync warnings) is left out of each test.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

CPU = torch.device("cpu")
DEVICE = torch.device(os.environ.get("VITFT_TEST_DEVICE", "cuda:0"))
CARD = DEVICE.type == "cuda"
MARKS = [
    pytest.mark.skipif(CARD and not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # what a compiler or a driver advises is no failure
]


def busy(milliseconds: float = 5.0) -> None:
    """Keeps the current stream of the card occupied, while the host goes on."""
    if CARD:
        torch.cuda._sleep(int(milliseconds * 1.5e6))  # cycles


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the card is an error, as torch sees it."""
    if not CARD:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, as a share of the largest number of `b`."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def needs_a_compiler() -> None:
    """Of C, for what torch compiles for a card; what it compiles for a CPU is tested elsewhere."""
    if not CARD:
        pytest.skip("what torch compiles for a CPU is tested elsewhere")
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")))):
        pytest.skip("needs a C compiler: torch compiles nothing without")
