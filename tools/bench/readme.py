"""README's section of figures, made from `tools/bench/results/*.json`: none is typed by hand.

    python tools/bench/readme.py            writes the section between README's two markers
    python tools/bench/readme.py --check    says whether it is what the results say; exit code 1

Rows with the same `what` share a line: one column for CPU, one for CUDA; what was not measured
leaves its cell empty. A missed goal is printed as one. The shape of the files is told in
`record.py`; a file of another shape, or of a `--quick` run, is an error.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from record import figure

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "results", HERE.parents[1] / "README.md"
BEGIN, END = "<!-- begin: made by tools/bench/readme.py -->", "<!-- end -->"
ORDER = (
    "accuracy",
    "frozen_end_to_end",
    "extract",
    "probe_sweep",
    "train_cpu",
    "predict",
    "loader",
)
NEEDED = ("bench", "quick", "machine", "rows")
Record = dict[str, Any]


def main() -> int:
    """Writes or checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    text = README.read_text("utf-8")
    made = renewed(text, section(load(RESULTS)))
    if not args.check:
        README.write_text(made, "utf-8")
    elif made != text:
        print("README's section differs from the results: python tools/bench/readme.py")
        return 1
    return 0


def load(folder: Path) -> list[Record]:
    """Every result, checked, in the order of the section.

    Raises:
        ValueError: A file is of another shape, or of a quick run.
    """
    records = []
    for file in sorted(folder.glob("*.json")):
        for record in _records(json.loads(file.read_text("utf-8"))):
            missing = [k for k in NEEDED if not isinstance(record, dict) or k not in record]
            if missing:
                raise ValueError(f"{file}: no {', '.join(missing)}; see record.py for the shape")
            if record["quick"]:
                raise ValueError(f"{file}: of a --quick run; measure again without it")
            records.append(record)
    rank = {name: k for k, name in enumerate(ORDER)}
    return sorted(records, key=lambda r: (rank.get(r["bench"], len(rank)), r["bench"]))


def _records(found: Any) -> list[Record]:
    """One per file; of survive's one per part, since each was measured at its own time."""
    if not isinstance(found, dict) or "parts" not in found:
        return [found]
    records = []
    for part in found["parts"].values():
        row = {"what": part["what"], "text": part["figure"], "goal": part["goal"]}
        where = part["where"]
        record = {"bench": "survive", "quick": where["quick"], "machine": where}
        records.append(record | {"rows": [row | {"met": part["met"]}]})
    return records


def renewed(readme: str, made: str) -> str:
    """README with the text between its markers replaced.

    Raises:
        ValueError: The markers are not there, once each and in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README needs one {BEGIN} and one {END}")
    head, _, rest = readme.partition(BEGIN)
    return f"{head}{BEGIN}\n{made}{END}{rest.partition(END)[2]}"


def section(records: list[Record]) -> str:
    """The table, where it was measured, and what was not."""
    columns = {"CPU": _of(records, cuda=False), "CUDA": _of(records, cuda=True)}
    heads = [_head(name, found) for name, found in columns.items()]
    lines = ["", f"| measured | {' | '.join(heads)} | by |", "|---|---|---|---|"]
    for bench, what in _whats(records):
        cells = [_cell(rows, what) for rows in columns.values()]
        by = f"[{bench}](tools/bench/{bench}.py)"
        lines.append(f"| {what} | {' | '.join(cells)} | {by} |")
    lines += ["", "An empty cell was not measured.", *_gaps(records), *_places(columns), ""]
    return "\n".join(lines)


def _of(records: Iterable[Record], *, cuda: bool) -> list[Record]:
    return [r for r in records if (r["machine"]["device"] != "cpu") == cuda]


def _whats(records: Iterable[Record]) -> list[tuple[str, str]]:
    """(script, what) of every line, each once."""
    found = {(r["bench"], row["what"]): None for r in records for row in r["rows"]}
    return sorted(found, key=lambda pair: [r for r, _ in found].index(pair[0]))


def _cell(records: list[Record], what: str) -> str:
    """`1.46 x (1.41 to 1.50), goal 1.2`; empty where it was not measured."""
    rows = [row for r in records for row in r["rows"] if row["what"] == what]
    if not rows:
        return ""
    row = rows[-1]
    text = row.get("text") or figure(row["value"], row["unit"])
    if row.get("spread"):
        text += " ({} to {})".format(*(figure(v, "") for v in row["spread"]))
    if row.get("goal") is None:
        return text
    aim = row["goal"] if isinstance(row["goal"], str) else f"{row['goal']:g}"
    text += f", goal {'at most ' if row.get('at_most') else ''}{aim}"
    return text if row["met"] else f"**{text}: missed**"


def _head(name: str, records: list[Record]) -> str:
    if not records:
        return name
    threads = max(r["machine"]["threads"] for r in records)  # survive's parts use one each
    return f"{threads}-core CPU" if name == "CPU" else str(records[-1]["machine"]["device"])


def _places(columns: dict[str, list[Record]]) -> list[str]:
    """One sentence per machine: what it is, versions, date and commit."""
    lines = []
    for name, records in columns.items():
        if not records:
            lines.append(f"{name}: no such machine was at hand yet.")
            continue
        places: dict[str, list[str]] = {}
        for r in records:
            places.setdefault(_place(r["machine"]), []).append(r["bench"])
        most = max(places, key=lambda p: len(places[p]))
        lines.append(f"{name}: {most}.")
        rest = [(p, b) for p, b in places.items() if p != most]
        lines += [f"{', '.join(dict.fromkeys(b))}: {p}." for p, b in rest]
    return lines


def _place(m: dict[str, Any]) -> str:
    what = m["processor"] if m["device"] == "cpu" else m["device"]
    threads = f"{m['threads']} thread{'s' * (m['threads'] > 1)}"
    return (
        f"{what}, {threads}, torch {m['torch']}, timm {m['timm']}, {m['date']}, "
        f"commit {m['commit']}"
    )


def _gaps(records: Iterable[Record]) -> list[str]:
    gaps = [text for r in records for text in r.get("not_measured", [])]
    return [f"Nor were: {'; '.join(dict.fromkeys(gaps))}."] if gaps else []


if __name__ == "__main__":
    sys.exit(main())
