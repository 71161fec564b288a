"""Whole runs of one recipe as processes of their own: started, signalled, waited for, compared."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from conftest import TINY as TINY_RECIPE
from conftest import paint
from safetensors.torch import load_file

from vitft import io

TESTS = Path(__file__).resolve().parent
STRICT = ["trust.audit=false", "trust.suspects=false", "trust.calibrate=false"]
ALL = [
    *STRICT,
    "train.mixup=0.2",
    "train.ema=0.9",
    "model.drop_path_rate=0.2",
    "train.checkpoint_minutes=0",
]


class Runs:
    """Starts runs of one recipe and sends them signals."""

    def __init__(self, home: Path) -> None:
        self.home, self.number = home, 0
        self.environment = {
            "VITFT_CACHE": str(home / "cache"),
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
            "OMP_NUM_THREADS": "1",
        }
        self.zygote = subprocess.Popen(
            [sys.executable, TESTS / "zygote.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | self.environment,
            cwd=home,
        )
        for k, (name, rgb) in enumerate(
            {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}.items()
        ):
            for i in range(20):
                paint(home / "photos" / name / f"{i:02d}.jpg", rgb, seed=100 * k + i)

    def ask(self, **order: object) -> dict[str, int]:
        self.zygote.stdin.write(json.dumps(order) + "\n")
        self.zygote.stdin.flush()
        return json.loads(self.zygote.stdout.readline())

    def close(self) -> None:
        self.zygote.stdin.close()
        self.zygote.wait(timeout=30)
        self.zygote.stdout.close()

    def recipe(self, output: str, mode: str = "full") -> Path:
        """The tiny recipe with an output of its own."""
        file = self.home / "recipes" / output / f"{mode}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        text = TINY_RECIPE.format(mode=mode, output=self.home / output, root=self.home / "photos")
        file.write_text(text)
        return file

    def start(
        self,
        output: str,
        *more: str,
        mode: str = "full",
        pace: float | None = None,
        **order: object,
    ) -> "Process":
        keys = ALL if mode == "full" else STRICT
        words = [str(self.recipe(output, mode)), *keys, *more]
        return self.command(words, self.home / output, pace, **order)

    def start_ranks(
        self, output: str, *more: str, world: int = 2, room: int | None = None, **order: object
    ) -> "list[Process]":
        """One run of several processes, as torchrun would start them; `room` is the last one's."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        return [
            self.start(
                output,
                *more,
                **order,
                **({"room": room} if room is not None and k == world - 1 else {}),
                env={**where, "RANK": str(k), "LOCAL_RANK": str(k), "LOCAL_WORLD_SIZE": str(world)},
            )
            for k in range(world)
        ]

    def command(
        self, argv: list[str], output: Path, pace: float | None = None, **order: object
    ) -> "Process":
        self.number += 1
        out, err = (self.home / f"{self.number}.{name}" for name in ("out", "err"))
        pid = self.ask(argv=argv, out=str(out), err=str(err), pace=pace, **order)["pid"]
        return Process(self, pid, output, out, err)

    def finish(self, output: str, *more: str) -> Path:
        process = self.start(output, *more)
        assert process.wait() == 0, process.err.read_text()
        return process.folder()


class Process:
    """One run, in a session of its own."""

    def __init__(self, runs: Runs, pid: int, output: Path, out: Path, err: Path) -> None:
        self.runs, self.pid, self.output, self.out, self.err = runs, pid, output, out, err

    def folder(self) -> Path:
        return max(p for p in self.output.glob("*/2*") if p.is_dir())

    def said(self) -> str:
        return self.err.read_text() if self.err.exists() else ""

    def until(self, text: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.said():
            assert time.monotonic() < deadline, self.said()
            assert self.runs.ask(wait=self.pid, seconds=0)["code"] is None, self.said()
            time.sleep(0.01)

    def send(self, number: int, *, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, seconds: float = 240) -> int:
        code = self.runs.ask(wait=self.pid, seconds=seconds)["code"]
        assert code is not None, self.said()
        return code

    def leftovers(self) -> list[str]:
        """Living processes of its session, and shared memory of its processes."""
        alive = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.pid and fields[0] != "Z":
                alive.append(status.parent.name)
        return alive + [p.name for p in Path("/dev/shm").glob(f"torch_{self.pid}_*")]

    def leaves_nothing(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.leftovers():
            assert time.monotonic() < deadline, self.leftovers()
            time.sleep(0.05)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    assert io.verify_dir(folder / "model") == ()
    return load_file(folder / "model" / "model.safetensors")


def records(folder: Path) -> list[dict[str, object]]:
    lines = io.read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Weights bit for bit, every epoch's numbers, every prediction."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert records(one) == records(other)
    for name in ("predictions.csv", "confusion_matrix.csv", "split.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
