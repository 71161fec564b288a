"""Photographs that are read from a server in every epoch: vitft against timm's webdataset reader.

    python tools/bench/afar.py [FOLDER] [--images N] [--delay S] [--quick] [--json FILE]

The photographs are packed into tar shards and served from a process of its own, which waits
`--delay` before it answers, as a server far away does. Both loaders start each epoch with nothing
kept, make training batches (random crop to 224, mirrored half of the time) in two worker processes
and take turns. Each photograph's label is its number, so what an epoch showed can be counted.

    timm     create_dataset("wds/") and create_loader as train.py calls them, its buffer of 8,192
             samples as it comes; the reader needs `pip install webdataset`
    vitft    data.root: http://...; the pieces of the cache are removed before each epoch

Counted over the epochs: photographs that came more than once, photographs that did not come, and
bytes that the server sent per byte of the shards.
"""

import argparse
import io as memory
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from record import Row, verdict, write

from vitft import afar, io, shards, wire
from vitft.images import DecodeSpec
from vitft.inputs import InputConfig, augmented
from vitft.loaders import Batches
from vitft.photos import Photos
from vitft.raw import read_bytes

SAMPLE = Path(__file__).resolve().parents[2] / "vitft" / "bundled" / "flowers"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONFIG = InputConfig((224, 224), MEAN, STD, "bicubic")
CROPS = SimpleNamespace(augment="tutorial", reprob=0.0)
CPU, BATCH, WORKERS, SHARDS = torch.device("cpu"), 32, 2, 16

Epoch = Callable[[int], list[int]]  # number of the epoch -> the photographs that it showed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SAMPLE)
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds before each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="120 images, 2 rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.delay)
    count, rounds = (120, 2) if args.quick else (args.images, args.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["VITFT_CACHE"] = f"{scratch}/cache"
        for name in ("HF_HUB_OFFLINE", "VITFT_OFFLINE"):  # the server is this machine
            os.environ.pop(name, None)
        count, size = pack(args.folder, Path(scratch) / "shards", count)
        with serving(Path(scratch) / "shards", args.delay) as server:
            found = measure(ways(server, count), server, rounds)
    rows = figures(found, count, size)
    write(args.json, rows, quick=args.quick, details={"images": count, "bytes": size} | found)
    return verdict(rows)


def pack(folder: Path, target: Path, count: int) -> tuple[int, int]:
    """Shards of numbered photographs; how many there are, and their bytes."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    files = random.Random(0).sample(found, min(count, len(found)))
    target.mkdir()
    for k in range(SHARDS):
        with tarfile.open(target / f"train-{k:02d}.tar", "w") as tar:
            for i in range(k, len(files), SHARDS):
                for name, body in (("jpg", files[i].read_bytes()), ("cls", str(i).encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{name}")
                    member.size = len(body)
                    tar.addfile(member, memory.BytesIO(body))
    (target / "_info.json").write_text(json.dumps(timms_info(len(files))))
    return len(files), sum(f.stat().st_size for f in target.glob("*.tar"))


def timms_info(count: int) -> dict[str, Any]:
    """What timm's reader asks the server about a data set."""
    names = [f"train-{k:02d}.tar" for k in range(SHARDS)]
    lengths = [len(range(k, count, SHARDS)) for k in range(SHARDS)]
    split = {"name": "train", "filenames": names, "shard_lengths": lengths, "num_samples": count}
    return {"splits": {"train": split}}


# ---- the server ---------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Answers late, in parts, and counts what it sends."""

    server: Any

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:  # noqa: N802  (http.server's name)
        """A file, a part of one, or what was sent so far."""
        server = self.server
        file = server.folder / self.path.lstrip("/")
        if self.path == "/sent":
            self._answer(200, json.dumps(server.sent).encode(), {})
            return
        time.sleep(server.delay)
        if not file.is_file():
            self._answer(404, b"", {})
            return
        body, asked = file.read_bytes(), self.headers.get("Range", "")
        code, about = 200, {"ETag": f'"{file.stat().st_mtime_ns}"'}
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            a, b = int(first), min(int(last or len(body)), len(body) - 1)
            about["Content-Range"] = f"bytes {a}-{b}/{len(body)}"
            body, code = body[a : b + 1], 206
        server.sent += len(body)
        self._answer(code, body, about)

    def _answer(self, code: int, body: bytes, about: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in (about | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def serve(folder: Path, delay: float) -> int:
    """The server's own process; it prints its port and stays."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.folder, server.delay, server.sent = True, folder, delay, 0
    print(server.server_port, flush=True)
    server.serve_forever()
    return 0


@contextmanager
def serving(folder: Path, delay: float) -> Iterator[str]:
    """The address of a server in another process."""
    call = [sys.executable, __file__, "--serve", str(folder), "--delay", str(delay)]
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as process:
        if process.stdout is None:
            raise RuntimeError("the server says nothing")
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


# ---- the ways -----------------------------------------------------------------------------------


def ways(server: str, count: int) -> dict[str, Epoch]:
    made = {"vitft": ours(server, count)}
    try:
        made["timm"] = timms(server, count)
    except (ImportError, RuntimeError) as error:
        print(f"timm's reader is not compared: {error}")
    return made


def ours(server: str, count: int) -> Epoch:
    """A loader over the address, as a run has it once it has scanned."""
    folder, _ = afar.arrive(f"{server}/train-{{00..{SHARDS - 1:02d}}}.tar")
    listing = shards.read_shards(folder, "wds", split="stratified")
    files = [folder / entry.path for entry in listing.entries]
    numbers = np.array([int(entry.label) for entry in listing.entries])
    sums = [io.sha256_bytes(read_bytes(file)) for file in files]
    photos = Photos(
        files, np.zeros(count, np.int64), sums,
        decode=DecodeSpec(decoder="fast"), transform=augmented(CONFIG, CROPS, "timm", "pillow"),
        seed=0,
    )  # fmt: skip
    batches = Batches(photos, batch_size=BATCH, seed=0, shuffle=True, device=CPU, workers=WORKERS)

    def epoch(k: int) -> list[int]:
        shutil.rmtree(io.cache_dir() / "afar" / "pieces", ignore_errors=True)
        return [int(n) for _, _, rows in batches.epoch(k) for n in numbers[rows.numpy()]]

    return epoch


def timms(server: str, count: int) -> Epoch:
    from timm.data.dataset_factory import create_dataset
    from timm.data.loader import create_loader

    dataset = create_dataset(
        "wds/", root=server, split="train", is_training=True, batch_size=BATCH,
        num_samples=count,
    )  # fmt: skip
    loader: Any = create_loader(
        dataset, input_size=(3, 224, 224), batch_size=BATCH, is_training=True, mean=MEAN, std=STD,
        num_workers=WORKERS, device=CPU, interpolation="bicubic",
        color_jitter=None,  # type: ignore[arg-type]  # "none" to timm  # type: ignore[arg-type]  # "none" to timm
    )  # fmt: skip

    def epoch(k: int) -> list[int]:
        dataset.set_epoch(k)
        return [int(n) for _, numbers in loader for n in numbers.tolist()]

    return epoch


# ---- measuring ----------------------------------------------------------------------------------


def measure(table: dict[str, Epoch], server: str, rounds: int) -> dict[str, Any]:
    """Of each way and round: images per second by the clock, what was shown, what was sent."""
    found: dict[str, Any] = {n: {"images/s": [], "shown": [], "sent": []} for n in table}
    for k in range(rounds + 1):
        for name, epoch in table.items():
            before, started = sent(server), time.perf_counter()
            shown = epoch(k)
            if k:
                seconds = time.perf_counter() - started
                found[name]["images/s"].append(len(shown) / seconds)
                found[name]["shown"].append(shown)
                found[name]["sent"].append(sent(server) - before)
    return found


def sent(server: str) -> int:
    with wire.connect(f"{server}/sent") as answer:
        return int(answer.read())


def figures(found: dict[str, Any], count: int, size: int) -> list[Row]:
    """The ratio round by round, and what the epochs showed; the lists themselves are let go."""
    rows = []
    for name, way in found.items():
        shown = [Counter(numbers) for numbers in way.pop("shown")]
        way["given"] = [sum(each.values()) for each in shown]
        way["twice"] = [sum(n - 1 for n in each.values()) for each in shown]
        way["left out"] = [count - len(each) for each in shown]
        told = f"{name}: images/s {statistics.median(way['images/s']):,.0f}"
        print(f"{told}, twice {way['twice']}, left out {way['left out']}, sent {way['sent']}")
    for name, way in found.items():
        twice, missed = sum(way["twice"]), sum(way["left out"])
        what = f"photographs from a server that an epoch repeats and leaves out, {name}"
        text = f"{twice:,} and {missed:,} of {count * len(way['sent']):,}"
        goal = 0.0 if name == "vitft" else None
        rows.append(Row(what, twice + missed, "", None, goal, at_most=True, text=text))
    each = [bytes_ / size for bytes_ in found["vitft"]["sent"]]
    what = "bytes a server sends for an epoch, per byte of its shards"
    rows.append(Row(what, statistics.median(each), "x", (min(each), max(each)), 1.1, at_most=True))
    if "timm" in found:
        pairs = zip(found["vitft"]["images/s"], found["timm"]["images/s"], strict=True)
        each = [a / b for a, b in pairs]
        what = "batches from a server, nothing kept, over timm's webdataset reader"
        spread = (min(each), max(each))
        rows.append(Row(what, statistics.median(each), "x", spread, 1.0))
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
