"""The tables of figures, made from `tools/bench/results/*.json`: none is typed by hand.

    python tools/bench/readme.py            writes both tables
    python tools/bench/readme.py --check    says whether they are what the results say; exit code 1

`results/README.md` has every row; README, between its two markers, those that `LEADS` names, the
first row of any other script, and whatever missed its goal. Rows with the same `what` share a
line: one column for CPU, one for CUDA; what was not measured
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
WHOLE = RESULTS / "README.md"
BEGIN, END = "<!-- begin: made by tools/bench/readme.py -->", "<!-- end -->"
ORDER = (
    "accuracy",
    "frozen_end_to_end",
    "extract",
    "probe_sweep",
    "train_step",
    "train_cpu",
    "predict",
    "loader",
)
LEADS = {  # script -> how the rows begin that README shows
    "afar": ("batches from a server", "photographs from a server"),
    "accuracy": ("test accuracy",),
    "frozen_end_to_end": ("600 photographs to a saved head, cold: vitft",),
    "train_step": (
        "training vitflower_b16, batch 256, synthetic batches, against",
        "training vitflower_b16, batch 256, photographs, against",
        "training vitflower_b16, batch 8, synthetic batches, with CUDA graphs, against",
        "training vitflower_s16, batch 256, synthetic batches, against",
    ),
    "train_cpu": ("fine-tuning vitflower_s16",),
    "predict": ("one photograph", "128 photographs"),
    "loader": (
        "batches from JPEGs per core, the same pixels, second",
        "batches from JPEGs per core, the same pixels, ten",
        "batches from JPEGs per core, 3 %",
    ),
    "finetune": ("fine-tuned",),
    "foreign": (
        "pictures of other subjects called foreign (tuxpaint",
        "pictures of other subjects called foreign (other",
        "test flowers",
    ),
    "memory": ("memory of a whole run, 100,000", "memory of predicting, 100,000"),
    "planted": ("recall of the labels", "precision of the labels"),
    "probe_sweep": ("45 strengths",),
    "survive": ("kills", "bad inputs", "resume"),
}
NEEDED = ("bench", "quick", "machine", "rows")
Record = dict[str, Any]


def main() -> int:
    """Writes or checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    for file, made in tables().items():
        if not args.check:
            file.write_text(made, "utf-8")
        elif not file.exists() or made != file.read_text("utf-8"):
            print(f"{file.name} differs from the results: python tools/bench/readme.py")
            return 1
    return 0


def tables() -> dict[Path, str]:
    """What the two files have to say."""
    records = load(RESULTS)
    return {
        README: renewed(README.read_text("utf-8"), section(records, whole=False)),
        WHOLE: f"# Every figure that was measured\n{section(records, whole=True)}",
    }


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


def section(records: list[Record], *, whole: bool) -> str:
    """The table, where it was measured, and, of the whole, what was not."""
    columns = {"CPU": _of(records, cuda=False), "CUDA": _of(records, cuda=True)}
    heads = [_head(name, found) for name, found in columns.items()]
    lines = ["", f"| measured | {' | '.join(heads)} | by |", "|---|---|---|---|"]
    up = "../" if whole else "tools/bench/"
    for bench, what in _whats(records):
        cells = [_cell(rows, what) for rows in columns.values()]
        if whole or _leads(records, bench, what) or any("missed**" in cell for cell in cells):
            lines.append(f"| {what} | {' | '.join(cells)} | [{bench}]({up}{bench}.py) |")
    told = _gaps(records) if whole else ["[Every figure](tools/bench/results/README.md)."]
    lines += ["", f"An empty cell was not measured. {' '.join(told)}".rstrip()]
    return "\n".join([*lines, "", *(f"- {place}" for place in _places(columns)), ""])


def _leads(records: Iterable[Record], bench: str, what: str) -> bool:
    """Whether README shows it though it met its goal."""
    whats = [w for b, w in _whats(records) if b == bench]
    leads = [w for w in whats if w.startswith(LEADS.get(bench, ()))]
    return what in (leads or whats[:1])


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
