"""Runs `vitft run` again and again as processes of their own; torch is imported once.

    python zygote.py            one JSON object per line in, one per line out

    {"argv": [...], "out": FILE, "err": FILE}  -> {"pid": N}
    {"wait": N, "seconds": S}                  -> {"code": N, or null: still alive}

Each run is a fork with a session of its own that never used torch before, so it is what a shell
would start, minus six seconds of imports. `pace: SECONDS` stretches every update and writes its
number to stderr, so that a test can send a signal at a known step; `stop_after: N` sends SIGTERM
in the midst of that update; `hang_up: true` closes the reader of stdout; `env` adds variables.
`room: N` lets no more than N images of a batch fit into memory.
"""

import json
import os
import signal
import sys
import time
from typing import Any

import sklearn.metrics  # noqa: F401
import torch
from timm.task import ClassificationTask

from vitft import run, train
from vitft.cli import door


def paced(seconds: float, stop_after: int | None) -> None:
    update = train.Trainer._update

    def slowly(self: train.Trainer, *batches: Any) -> None:
        if self.state.step + 1 == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, *batches)
        os.write(2, f"update {self.state.step}\n".encode())
        time.sleep(seconds)

    train.Trainer._update = slowly  # type: ignore[method-assign]


def crowded(room: int) -> None:
    forward = ClassificationTask.forward

    def fitting(self: ClassificationTask, x: torch.Tensor, y: torch.Tensor) -> Any:
        if len(x) > room:
            raise torch.cuda.OutOfMemoryError("no room")
        return forward(self, x, y)

    ClassificationTask.forward = fitting  # type: ignore[method-assign]


def child(order: dict[str, Any]) -> None:
    os.setsid()
    os.environ.update(order.get("env", {}))
    # tests under nohup, or in the background of a script, would hand ignored ones down
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, number in (("out", 1), ("err", 2)):
        if name in order:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            os.dup2(os.open(order[name], flags, 0o644), number)
    if order.get("hang_up"):  # the reader of stdout leaves before the first word
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if "stop_after" in order or order.get("pace") is not None:
        paced(order.get("pace") or 0.0, order.get("stop_after"))
    if "room" in order:
        crowded(order["room"])
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    code = door(run.main, order["argv"])
    try:
        sys.stdout.flush()
    finally:
        os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer: dict[str, Any] = {"code": wait(order["wait"], order["seconds"])}
        else:
            pid = os.fork()
            if pid == 0:
                child(order)
            answer = {"pid": pid}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
