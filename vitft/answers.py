"""Answers of a model -> one CSV, JSON Lines or Parquet file, of any length, in bounded memory.

The rows are written in parts of a fixed number of files to a folder beside the output, each part
whole and journalled with its sha256; at the end the parts become the output in one step. A killed
prediction goes on at the first part that is missing: parts are taken over only if model, settings,
list of files, and size and time of every file are still the same, so that the output equals that
of a prediction that was never disturbed.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitft import encode, io
from vitft.console import say, track
from vitft.encode import csv_cell
from vitft.errors import MachineError, RecipeError

PART = 256  # files; what a kill may lose
FORMATS = ("csv", "jsonl", "parquet")
PLAN, JOURNAL = "plan.jsonl", "journal.jsonl"
IN_WORDS = {
    "model": "the model is another",
    "tables": "the model's tables are others",
    "names": "the list of files is another",
    "format": "the format is another",
    "csv_safe": "--csv-safe is set otherwise",
}


@dataclass(frozen=True)
class Answer:
    """What the model says of one file.

    Attributes:
        path: As listed.
        probabilities: [C] float64 summing to 1, or None where the file could not be read.
        sure: False where the run's threshold says that a person should look; None where it has no
            threshold (`trust.max_error`).
        foreign: Whether the picture is unlike everything in training; None where not known.
        error: "" or the fault's id and text.
    """

    path: Path
    probabilities: NDArray[np.float64] | None
    sure: bool | None = None
    foreign: bool | None = None
    error: str = ""

    @property
    def fault(self) -> str:
        """The id of what was wrong, or ""."""
        return self.error.partition(":")[0]


def top(answer: Answer, classes: Sequence[str], k: int) -> list[tuple[str, float]]:
    """The k likeliest classes, the likeliest first; ties in the order of the classes."""
    if answer.probabilities is None:
        return []
    order = np.argsort(-answer.probabilities, kind="stable")[:k]
    return [(classes[i], float(answer.probabilities[i])) for i in order]


@dataclass(frozen=True)
class Output:
    """What is written where.

    Attributes:
        file: Replaced whole at the end.
        format: One of FORMATS.
        classes: Names in the order of the probabilities.
        safe: CSV text that a spreadsheet would compute starts with `'`.
    """

    file: Path
    format: str
    classes: tuple[str, ...]
    safe: bool = False

    @property
    def parts(self) -> Path:
        """The folder of an unfinished output."""
        return self.file.with_name(self.file.name + ".parts")


Predict = Callable[[Iterable[Path]], Iterator[Answer]]


def write(
    out: Output,
    names: Sequence[str],
    predict: Predict,
    identity: Mapping[str, object],
    *,
    restart: bool = False,
    show: Callable[[Answer], None] = lambda answer: None,
) -> Counter[str]:
    """Predicts what is not there yet, and writes the whole.

    Args:
        out: The output.
        names: Paths of all files, in the order of the rows.
        predict: Files -> one answer each, in their order.
        identity: Of model and machine; parts of another identity are refused.
        restart: Throw the parts of an interrupted prediction away.
        show: Called for each new answer.

    Returns:
        How many files had which fault; readable ones are counted under "".

    Raises:
        RecipeError: `predict.other_parts`: the parts there belong to something else.
        MachineError: `env.extra`: pyarrow is missing.
    """
    require_packages(out.format)
    if restart:
        io.remove(out.parts)
    with io.lock(out.parts, "vitft predict"):
        _agree(out, names, identity)
        counts = _taken_over(out, names)
        try:
            _fill(out, names, predict, counts, show)
        except BaseException:
            done = sum(c.total() for c in counts.values())
            say(f"stopped after {done:,} of {len(names):,} files; the same command goes on there")
            raise
        _merge(out, len(_starts(names)))
    io.remove(out.parts)
    return sum(counts.values(), Counter())


def require_packages(format: str) -> None:
    """pyarrow for Parquet.

    Raises:
        MachineError: `env.extra`.
    """
    if format != "parquet":
        return
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        text, fix = "pyarrow is not installed", "pip install 'vitft[parquet]', or write .csv"
        raise MachineError.of("env.extra", "Parquet", text, fix) from None


def _agree(out: Output, names: Sequence[str], identity: Mapping[str, object]) -> None:
    """Writes the plan, or compares with the one that is there."""
    listed = "\0".join(names).encode("utf-8", "surrogateescape")
    plan = {
        **identity,
        "names": io.sha256_bytes(listed),
        "format": out.format,
        "csv_safe": out.safe,
        "part": PART,
    }
    kept = io.read_lines(out.parts / PLAN)
    before = kept[0] if kept else {}
    if not kept:
        io.append_line(out.parts / PLAN, plan)
    elif before != plan:
        keys = sorted(k for k in plan.keys() | before.keys() if plan.get(k) != before.get(k))
        text = "holds an interrupted prediction of something else: " + ", ".join(
            IN_WORDS.get(k, f"{k} was {before.get(k)}, now {plan.get(k)}") for k in keys
        )
        fix = "add --restart to throw it away, or name another output"
        raise RecipeError.of("predict.other_parts", out.parts, text, fix)


def _starts(names: Sequence[str]) -> range:
    return range(0, max(len(names), 1), PART)  # an empty list has one part: the header


def _part(out: Output, number: int) -> Path:
    return out.parts / f"{number:06d}.{out.format}"


def _stamp(names: Sequence[str]) -> str:
    """One hash over size and time of some files."""

    def told(name: str) -> str:
        try:
            status = Path(name).stat()
        except OSError as error:
            return str(error.errno)
        return f"{status.st_size} {status.st_mtime_ns}"

    return io.sha256_bytes("\n".join(map(told, names)).encode())


def _taken_over(out: Output, names: Sequence[str]) -> dict[int, Counter[str]]:
    """The parts that need not be predicted again, and what was counted in them."""
    starts = _starts(names)
    found: dict[int, Counter[str]] = {}
    for line in io.read_lines(out.parts / JOURNAL):
        number, counts = line.get("part"), line.get("counts")
        if type(number) is not int or number not in range(len(starts)) or not _is_count(counts):
            continue  # not ours: the part is predicted again
        file, start = _part(out, number), starts[number]
        whole = file.is_file() and io.sha256_file(file) == line.get("sha256")
        if whole and line.get("stamp") == _stamp(names[start : start + PART]):
            found[number] = Counter(counts)
    if found:
        rows = sum(c.total() for c in found.values())
        say(f"going on: {rows:,} of {len(names):,} files were answered before")
    return found


def _is_count(value: object) -> bool:
    return isinstance(value, dict) and all(type(n) is int for n in value.values())


def _fill(
    out: Output,
    names: Sequence[str],
    predict: Predict,
    counts: dict[int, Counter[str]],
    show: Callable[[Answer], None],
) -> None:
    starts = _starts(names)
    pending = [k for k in range(len(starts)) if k not in counts]
    stamps: dict[int, str] = {}

    def files() -> Iterator[Path]:
        for k in pending:
            chunk = names[starts[k] : starts[k] + PART]
            stamps[k] = _stamp(chunk)  # before they are read
            yield from map(Path, chunk)

    total = sum(len(names[starts[k] : starts[k] + PART]) for k in pending)
    with closing(track(predict(files()), total, "predict")) as answers:  # type: ignore[type-var]
        for k in pending:
            rows = list(islice(answers, len(names[starts[k] : starts[k] + PART])))
            for answer in rows:
                show(answer)
            counts[k] = Counter(a.fault for a in rows)
            ENCODERS[out.format](_part(out, k), rows, out, k == 0)
            line = {"part": k, "sha256": io.sha256_file(_part(out, k))}
            line |= {"stamp": stamps.get(k, _stamp([])), "counts": counts[k]}
            io.append_line(out.parts / JOURNAL, line)


def _merge(out: Output, count: int) -> None:
    """All parts, one after the other, as the output."""
    with io.staged_file(out.file) as temp:
        if out.format == "parquet":
            _merge_parquet(out, count, temp)
            return
        with io.appending(temp) as add:
            for k in range(count):
                add(_part(out, k).read_bytes())


# --- formats -------------------------------------------------------------------------------------


def _csv(file: Path, answers: Sequence[Answer], out: Output, first: bool) -> None:
    """Columns path, prediction, confidence, sure, foreign, error, p:<class>; one row per file."""
    header = ["path", "prediction", "confidence", "sure", "foreign", "error"]
    header += [f"p:{c}" for c in out.classes]

    def row(a: Answer) -> list[object]:
        path = csv_cell(str(a.path), out.safe)
        if a.probabilities is None:
            return [path, "", "", "", "", a.error, *[""] * len(out.classes)]
        name, p = top(a, out.classes, 1)[0]
        name = csv_cell(name, out.safe)
        return [path, name, p, _yes(a.sure), _yes(a.foreign), "", *a.probabilities.tolist()]

    text = encode.csv_text(header, map(row, answers))
    io.write_text(file, text if first else text[len(encode.csv_text(header, ())) :])


def _yes(value: bool | None) -> str:
    return {True: "yes", False: "no", None: ""}[value]


def _record(a: Answer, classes: Sequence[str]) -> dict[str, Any]:
    if a.probabilities is None:
        values: dict[str, Any] = dict.fromkeys(("prediction", "confidence", "sure", "foreign"))
        return {"path": str(a.path)} | values | {"error": a.error}
    name, p = top(a, classes, 1)[0]
    said = {"path": str(a.path), "prediction": name, "confidence": p, "sure": a.sure}
    return said | {"foreign": a.foreign, "error": None}


def _jsonl(file: Path, answers: Sequence[Answer], out: Output, first: bool) -> None:
    """One object per file; `probabilities` maps class to probability, null where unreadable."""
    lines = []
    for a in answers:
        p = (
            None
            if a.probabilities is None
            else dict(zip(out.classes, a.probabilities, strict=True))
        )
        lines.append(encode.json_text(_record(a, out.classes) | {"probabilities": p}))
    io.write_text(file, "".join(f"{line}\n" for line in lines))


def _parquet(file: Path, answers: Sequence[Answer], out: Output, first: bool) -> None:
    """The columns of the CSV, with types; what is not known is null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [_record(a, out.classes) for a in answers]
    kinds = {"path": pa.string(), "prediction": pa.string(), "confidence": pa.float64()}
    kinds |= {"sure": pa.bool_(), "foreign": pa.bool_(), "error": pa.string()}
    columns = [pa.array([_unicode(r[name]) for r in records], kind) for name, kind in kinds.items()]
    for k in range(len(out.classes)):
        column = [None if a.probabilities is None else float(a.probabilities[k]) for a in answers]
        columns.append(pa.array(column, pa.float64()))
    names = [*kinds, *(_unicode(f"p:{c}") for c in out.classes)]
    with io.staged_file(file) as temp:
        pq.write_table(pa.Table.from_arrays(columns, names=names), temp)


def _unicode(value: Any) -> Any:
    """File names that are no UTF-8 with escapes; Parquet holds nothing else."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _merge_parquet(out: Output, count: int, temp: Path) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(temp, pq.read_schema(_part(out, 0))) as writer:
        for k in range(count):
            writer.write_table(pq.read_table(_part(out, k), partitioning=None))


ENCODERS = {"csv": _csv, "jsonl": _jsonl, "parquet": _parquet}
