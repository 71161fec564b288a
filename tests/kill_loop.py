"""A writer that is killed at random instants, over and over, and a reader that checks what is left.

    python kill_loop.py ARTEFACT FOLDER KILLS LONGEST_SECONDS

Prints one JSON line. Every value of an artefact equals its step, so that a mixture of two saves
shows; the writer acknowledges each finished save through a pipe, so that a lost one shows. A fork
costs a millisecond here, because nothing imports torch.
"""

import errno
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from standalone import io

from vitft import answers, contents
from vitft.errors import RecipeError
from vitft.images import DecodeSpec, Header

SIZE = 60_000  # numbers per tensor


class Mixed(Exception):
    """Two saves in one artefact."""


def same(values: set[int]) -> int:
    if len(values) != 1:
        raise Mixed(sorted(values)[:5])
    return values.pop()


def read_tensors(path: Path) -> int:
    from safetensors.numpy import load_file

    return same({int(v) for array in load_file(path).values() for v in np.unique(array)})


def write_checkpoint(folder: Path, step: int) -> None:
    with io.staged_dir(folder / f"step-{step:08d}") as staged:
        fill(staged, step)
    io.keep_newest(folder, "step-*", 2)


def read_checkpoint(folder: Path) -> int:
    visible = list(folder.glob("step-*"))
    broken = [path for path in visible if io.verify_dir(path)]
    if broken:
        raise ValueError(broken)
    newest = io.newest_whole(folder, "step-*")
    return -1 if newest is None else same({read_filled(newest), int(newest.name[5:])})


def fill(folder: Path, step: int) -> None:
    arrays = {"w": np.full(SIZE, step, np.int32), "b": np.full(SIZE, step, np.float64)}
    io.write_tensors(folder / "state.safetensors", arrays, {})
    io.write_json(folder / "state.json", {"step": step})


def read_filled(folder: Path) -> int:
    state = json.loads((folder / "state.json").read_text())
    return same({state["step"], read_tensors(folder / "state.safetensors")})


def write_product(folder: Path, step: int) -> None:
    with io.staged_dir(folder / "model") as staged:
        fill(staged, step)


def read_product(folder: Path) -> int:
    if not (folder / "model").exists():
        return -1
    if problems := io.verify_dir(folder / "model"):
        raise ValueError(problems)
    return read_filled(folder / "model")


def write_export(folder: Path, step: int) -> None:
    arrays = {"w": np.full(SIZE, step, np.int32), "b": np.full(SIZE, step, np.float64)}
    io.write_tensors(folder / "m.safetensors", arrays, {})


def read_export(folder: Path) -> int:
    path = folder / "m.safetensors"
    return read_tensors(path) if path.exists() else -1


def write_metrics(folder: Path, step: int) -> None:
    io.append_line(folder / "metrics.jsonl", {"step": step, "pad": "x" * 5000})


def read_metrics(folder: Path) -> int:
    steps = [row["step"] for row in io.read_lines(folder / "metrics.jsonl")]
    if steps != list(range(len(steps))):
        raise Mixed(steps[-5:])
    return len(steps) - 1


def write_report(folder: Path, step: int) -> None:
    io.write_text(folder / "report.html", f"{step:09d}\n" * 20_000)


def read_report(folder: Path) -> int:
    path = folder / "report.html"
    if not path.exists():
        return -1
    text = path.read_text()
    if len(text) != 200_000:
        raise ValueError(f"{len(text)} characters")
    return same({int(line) for line in text.splitlines()})


def write_index(folder: Path, step: int) -> None:
    """A scan that met one new picture, as `contents` remembers it."""
    with cache_in(folder):
        memory = contents._Memory(DecodeSpec(), deep=False)
        memory.met = {name: verdict(step) for name in ("newest", f"picture {step}")}
        memory.known = {}  # another scan's memory: what stands on disk is read again
        memory.save()


def read_index(folder: Path) -> int:
    """A scan takes a damaged cache for an empty one; here that is a loss."""
    files = list((folder / "verdicts").glob("*.json")) if (folder / "verdicts").exists() else []
    if not files:
        return -1
    found = {name: v.header.width for name, v in contents.load_verdicts(files[0]).items()}
    if not found:
        raise ValueError(f"{files[0]} is damaged")
    newest = found.pop("newest")
    want = {f"picture {step}": step for step in range(newest + 1)}
    if found != want:
        raise Mixed(sorted(set(found) ^ set(want))[:5])
    return newest


def verdict(step: int) -> contents.Verdict:
    return contents.Verdict(Header("JPEG", "RGB", step, step, 1, 0, False, False, 8))


@contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    before = os.environ.pop("VITFT_CACHE", None)
    os.environ["VITFT_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["VITFT_CACHE"]
        if before is not None:
            os.environ["VITFT_CACHE"] = before


def write_answers(folder: Path, step: int) -> None:
    """A prediction in parts that goes on where the one killed before it stopped."""
    out = answers.Output(folder / "answers.csv", "csv", ("a", "b"))
    names = [f"{step}/{k}" for k in range(10 * answers.PART)]

    def predict(files: Iterable[Path]) -> Iterator[answers.Answer]:
        return (answers.Answer(path, np.array([0.25, 0.75])) for path in files)

    try:
        answers.write(out, names, predict, {"step": step})
    except RecipeError:  # the one before it was finished and killed before it was acknowledged
        answers.write(out, names, predict, {"step": step}, restart=True)


def read_answers(folder: Path) -> int:
    path = folder / "answers.csv"
    if not path.exists():
        return -1
    rows = [line.split(",")[0].split("/") for line in path.read_text().splitlines()[1:]]
    if [int(k) for _, k in rows] != list(range(10 * answers.PART)):
        raise ValueError(f"{len(rows)} rows")
    return same({int(step) for step, _ in rows})


def write_in_place(folder: Path, step: int) -> None:
    """What the door exists to prevent; without its losses the test would have no teeth."""
    (folder / "report.html").write_text(f"{step:09d}\n" * 500_000)


def read_in_place(folder: Path) -> int:
    text = (folder / "report.html").read_text()
    if len(text) != 5_000_000:
        raise ValueError(f"{len(text)} characters")
    return same({int(line) for line in text.splitlines()})


def write_trimmed(folder: Path, step: int) -> None:
    io.append_line(folder / "metrics.jsonl", {"step": step, "pad": "x" * 5000})
    io.trim_lines(folder / "metrics.jsonl", lambda row: row["step"] > step - 20)


def read_trimmed(folder: Path) -> int:
    steps = [row["step"] for row in io.read_lines(folder / "metrics.jsonl")]
    if steps and steps != list(range(steps[0], steps[-1] + 1)):
        raise Mixed(steps)
    return steps[-1] if steps else -1


ARTEFACTS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], int]]] = {
    "checkpoint": (write_checkpoint, read_checkpoint),
    "product": (write_product, read_product),
    "product_without_exchange": (write_product, read_product),
    "export": (write_export, read_export),
    "metrics": (write_metrics, read_metrics),
    "trimmed_metrics": (write_trimmed, read_trimmed),
    "report": (write_report, read_report),
    "index": (write_index, read_index),
    "answers": (write_answers, read_answers),
    "in_place": (write_in_place, read_in_place),
}


def unable(one: Path, other: Path) -> None:
    raise OSError(errno.EINVAL, "cannot exchange")


def trial(write: Callable[[Path, int], None], folder: Path, first: int, delay: float) -> int:
    """Lets a child save from step `first` on, kills it, and returns the last acknowledged step."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        with io.lock(folder, "kill test"):
            os.write(into, b"s")  # started: the fork itself is not what is tested
            for step in range(first, sys.maxsize):
                write(folder, step)
                os.write(into, b".")
        os._exit(0)
    os.close(into)
    os.read(out, 1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acknowledged = 0
    while data := os.read(out, 1 << 16):
        acknowledged += len(data)
    os.close(out)
    return first + acknowledged - 1


answers.PART = 8  # so that most kills meet an unfinished prediction


def main(name: str, folder: Path, kills: int, longest: float) -> dict[str, object]:
    write, read = ARTEFACTS[name]
    if name == "product_without_exchange":
        io.CALLS.exchange = unable
    dice = random.Random(0)
    count = {"kills": 0, "unreadable": 0, "lost": 0, "mixed": 0, "leftovers": 0, "left_for_good": 0}
    at = -1
    for _ in range(kills):
        acknowledged = trial(write, folder, at + 1, dice.uniform(0, longest))
        count["kills"] += 1
        with io.lock(folder, "reader"):  # the kernel has freed it; what the dead one left is swept
            pass
        count["left_for_good"] += sum(1 for p in folder.rglob("*") if io.TEMP.fullmatch(p.name))
        try:
            at = read(folder)
        except Mixed:
            count["mixed"] += 1
            at = acknowledged
        except Exception as error:  # whatever it is, the artefact cannot be read
            sys.stderr.write(f"{error!r}\n")
            count["unreadable"] += 1
            at = acknowledged
        if at < acknowledged:
            count["lost"] += 1
    return {"artefact": name, "saves": at + 1} | count


def counting_sweep(folder: Path, **options: float) -> tuple[Path, ...]:
    """The sweep that `lock` calls, counted: leftovers show that the kills hit unfinished writes."""
    dead = SWEEP(folder, **options)
    TALLY[0] += len(dead)
    return dead


SWEEP, TALLY = io.sweep, [0]

if __name__ == "__main__":
    io.sweep = counting_sweep
    result = main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
    sys.stdout.write(json.dumps(result | {"leftovers": TALLY[0]}) + "\n")
