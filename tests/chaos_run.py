"""A run of twelve steps that uses nothing but the door: checkpoints, a metrics log, a last result.

    python chaos_run.py FOLDER

Killed anywhere and started again, it must go on from its newest whole checkpoint and end with the
same bytes as an undisturbed run.
"""

import json
import sys
from pathlib import Path

from standalone import io

STEPS, EVERY = 12, 4


def main(folder: Path) -> None:
    with io.lock(folder, "chaos"):
        step, state = resume(folder)
        sys.stdout.write(f"resumed from step {step}\n")
        io.trim_lines(folder / "metrics.jsonl", lambda row: row["step"] <= step)
        while step < STEPS:
            step += 1
            state = io.sha256_bytes(f"{state} {step}".encode())
            io.append_line(folder / "metrics.jsonl", {"step": step, "state": state})
            if step % EVERY == 0:
                save(folder, step, state)
        with io.staged_dir(folder / "model") as model:
            io.write_text(model / "model.txt", state)
        io.write_text(folder / "final.txt", state)
        io.link_latest(folder / "model")


def save(folder: Path, step: int, state: str) -> None:
    with io.staged_dir(folder / f"ckpt-{step:04d}") as staged:
        io.write_text(staged / "weights.txt", state * 1000)
        io.write_json(staged / "state.json", {"step": step, "state": state})


def resume(folder: Path) -> tuple[int, str]:
    newest = io.newest_whole(folder, "ckpt-*")
    if newest is None:
        return 0, ""
    kept = json.loads((newest / "state.json").read_text())
    if (newest / "weights.txt").read_text() != kept["state"] * 1000:
        raise SystemExit(f"{newest} is a mixture")
    return kept["step"], kept["state"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
