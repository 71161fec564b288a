"""The one shape of a benchmark's JSON: rows that say what was measured, how much, and the goal.

    rows = [Row("one image predicted, against the better of timm and transformers", 1.46, goal=1.2)]
    write(args.json, rows, quick=args.quick, details={"seconds": times})
    return verdict(rows)                      # figure on the last line; exit code 1 on a miss

A file of `tools/bench/results/` then holds

    bench        the script's name, `extract`; several files may be of one script
    command      what was called, so that a second person can call it again
    quick        true for the short form, which README never shows
    machine      `machine.about()`: processor, threads, device, versions, date, commit
    rows         [{what, value, unit, spread, goal, at_most, text, met}], most important first
    not_measured what the script could have measured here and did not, as sentences
    details      everything else, in the script's own shape

`readme.py` makes README's section out of `rows`, so `what` is told to a reader who knows the
project by its README alone: "head from 600 photographs, against ten epochs of the tutorial".
Results of a GPU lie beside those of the CPU, as `extract.cuda.json`, with equal `what`.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import about

from vitft import io


@dataclass(frozen=True)
class Row:
    """One measured figure.

    Attributes:
        what: What was measured, and against what; the same text on every machine.
        value: The figure, a median where it was measured several times.
        unit: `x` for a ratio, `images/s`, `s`, `MB`, `%`, ...; empty for a bare number.
        spread: Least and most of the single measurements, in the same unit.
        goal: What it should reach; None for a figure that is only told.
        at_most: The goal is a ceiling: less is better.
        text: Said in place of value and unit where these do not tell it: "219 of 219".
    """

    what: str
    value: float
    unit: str = "x"
    spread: tuple[float, float] | None = None
    goal: float | None = None
    at_most: bool = False
    text: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached; None without one."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


def write(
    file: Path | None,
    rows: Sequence[Row],
    *,
    quick: bool = False,
    not_measured: Sequence[str] = (),
    details: dict[str, Any] | None = None,
) -> None:
    """Leaves the record of this call, in place of an earlier one; nothing without a file."""
    if file is None:
        return
    script = Path(sys.argv[0])
    record = {
        "bench": script.stem,
        "command": " ".join(["python", f"tools/bench/{script.name}", *sys.argv[1:]]),
        "quick": quick,
        "machine": about(),
        "rows": [asdict(row) | {"met": row.met} for row in rows],
        "not_measured": list(not_measured),
        "details": details or {},
    }
    io.write_text(file, json.dumps(record, indent=1) + "\n")  # whole, or the one before


def verdict(rows: Sequence[Row]) -> int:
    """Prints each figure with its goal, the most important one last; 1 where a goal was missed."""
    for row in reversed(rows):
        print(f"{row.what}: {row.text or figure(row.value, row.unit)}{_against(row)}")
    return 1 if any(row.met is False for row in rows) else 0


def figure(value: float, unit: str) -> str:
    """Three digits and the unit: `1.46 x`, `12,300 images/s`, `88 %`."""
    size = abs(value)
    if 0 < size < 0.001:
        text = f"{value:.1e}"
    else:
        text = f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 3}f}"
    return f"{text} {unit}".strip()


def _against(row: Row) -> str:
    if row.goal is None:
        return ""
    how = "at most" if row.at_most else "at least"
    return f" (goal {how} {row.goal:g}: {'met' if row.met else 'missed'})"
