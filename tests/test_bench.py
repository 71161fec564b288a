"""README's figures are those of the results, and the benchmarks tell figures as they are."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "tools" / "bench"


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)


def script(name):
    return importlib.import_module(name)


def test_readme_says_what_the_results_say():
    for file, made in script("readme").tables().items():
        assert file.read_text("utf-8") == made


MACHINE = {
    "processor": "Some CPU",
    "threads": 2,
    "device": "cpu",
    "torch": "2.15",
    "timm": "1.0.31",
    "date": "2026-11-25",
    "commit": "abc",
}


def record(folder, name, *rows, machine=MACHINE, **more):
    found = {"bench": name.partition(".")[0], "quick": False, "machine": machine, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(found | more))


def row(what, value, **more):
    r = script("record").Row(what, value, **more)
    return vars(r) | {"met": r.met}


def test_the_section_shows_both_machines_misses_and_what_is_not_measured(tmp_path):
    readme, gpu = script("readme"), MACHINE | {"device": "One GPU", "commit": "def"}
    record(tmp_path, "zoo", row("a zoo", 3.0, unit="s"), row("b", 1.0), not_measured=["lions"])
    record(tmp_path, "extract", row("features", 1.5, goal=1.15, spread=(1.4, 1.6)))
    record(tmp_path, "extract.cuda", row("features", 1.1, goal=1.15), machine=gpu)
    record(tmp_path, "memory", row("growth", 7.0, unit="KiB", goal=6, at_most=True))
    part = {"what": "kills", "figure": "9 of 9", "goal": "all", "met": True}
    parts = {"kills": part | {"where": MACHINE | {"quick": False, "date": "2026-11-24"}}}
    (tmp_path / "survive.json").write_text(json.dumps({"parts": parts}))
    whole = readme.section(readme.load(tmp_path), whole=True)
    assert whole == (
        "\n"
        "| measured | 2-core CPU | One GPU | by |\n"
        "|---|---|---|---|\n"
        "| features | 1.50 x (1.40 to 1.60), goal 1.15 | **1.10 x, goal 1.15: missed** "
        "| [extract](../extract.py) |\n"
        "| growth | **7.00 KiB, goal at most 6: missed** |  | [memory](../memory.py) |\n"
        "| kills | 9 of 9, goal all |  | [survive](../survive.py) |\n"
        "| a zoo | 3.00 s |  | [zoo](../zoo.py) |\n"
        "| b | 1.00 x |  | [zoo](../zoo.py) |\n"
        "\n"
        "An empty cell was not measured. Nor were: lions.\n"
        "\n"
        "- CPU: Some CPU, 2 threads, torch 2.15, timm 1.0.31, 2026-11-25, commit abc.\n"
        "- survive: Some CPU, 2 threads, torch 2.15, timm 1.0.31, 2026-11-24, commit abc.\n"
        "- CUDA: One GPU, 2 threads, torch 2.15, timm 1.0.31, 2026-11-25, commit def.\n"
    )
    head = "An empty cell was not measured. [Every figure](tools/bench/results/README.md)."
    short = readme.section(readme.load(tmp_path), whole=False)
    told = whole.replace("(../", "(tools/bench/").replace(
        "| b | 1.00 x |  | [zoo](tools/bench/zoo.py) |\n", ""
    )
    assert short == told.replace("An empty cell was not measured. Nor were: lions.", head)


def test_readme_leads_with_chosen_rows_and_every_missed_goal(tmp_path):
    readme = script("readme")
    rows = [
        row(f"{w}, over timm", 1.0, goal=g) for w, g in (("a", 1), ("one photograph", 1), ("b", 2))
    ]
    record(tmp_path, "predict", *rows)
    whats = re.findall(
        r"^\| (.+?), over timm", readme.section(readme.load(tmp_path), whole=False), re.M
    )
    assert whats == ["one photograph", "b"]


def test_writing_twice_changes_nothing_and_the_rest_of_readme_stays():
    readme = script("readme")
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    once = readme.renewed(text, "new\n")
    assert once == f"before\n{readme.BEGIN}\nnew\n{readme.END}\nafter\n"
    assert readme.renewed(once, "new\n") == once
    with pytest.raises(ValueError, match=r"README needs one <!-- begin"):
        readme.renewed("no markers", "new\n")


def test_results_of_another_shape_or_of_a_quick_run_are_refused(tmp_path):
    readme = script("readme")
    (tmp_path / "odd.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"odd.json: no bench, quick, machine, rows"):
        readme.load(tmp_path)
    (tmp_path / "odd.json").unlink()
    record(tmp_path, "fast", row("fast", 1.0), quick=True)
    with pytest.raises(ValueError, match=r"fast.json: of a --quick run"):
        readme.load(tmp_path)


def test_a_record_holds_what_was_called_and_its_rows(tmp_path, monkeypatch, capsys):
    tool = script("record")
    file = tmp_path / "made" / "x.json"
    monkeypatch.setattr(sys, "argv", ["tools/bench/extract.py", "--quick"])
    rows = [tool.Row("first", 2.0, goal=1.0), tool.Row("second", 0.5, "s", goal=0.4, at_most=True)]
    tool.write(file, rows, quick=True, details={"n": 1})
    tool.write(None, rows)
    found = json.loads(file.read_text())
    assert (found["bench"], found["quick"]) == ("extract", True)
    assert found["command"] == "python tools/bench/extract.py --quick"
    assert [r["met"] for r in found["rows"]] == [True, False]
    assert set(found["machine"]) == set(MACHINE)
    assert tool.verdict(rows) == 1
    assert tool.verdict(rows[:1]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "second: 0.50 s (goal at most 0.4: missed)",
        "first: 2.00 x (goal at least 1: met)",
        "first: 2.00 x (goal at least 1: met)",
    ]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.456, "x", "1.46 x"),
        (12_345.6, "images/s", "12,346 images/s"),
        (88.04, "%", "88.0 %"),
        (0.0116, "", "0.012"),
        (6.5e-6, "", "6.5e-06"),
        (0.0, "s", "0.000 s"),
    ],
)
def test_figures_have_three_digits(value, unit, text):
    assert script("record").figure(value, unit) == text


class Way:
    """A way to train whose rounds take a second, and which ends the call in one of them."""

    def __init__(self, last=99, error=None):
        self.left, self.error = last, error

    def round(self):
        if not self.left:
            raise self.error
        self.left -= 1
        return 1.0, 0.5


def call_of(bench, **options):
    """A call of train_step that compiles nothing beforehand and has no photographs."""
    plain = {"photos": None, "quick": False, "rounds": 6, "compile_first": False, "cached": False}
    return bench.Call(bench.argparse.Namespace(**plain, **options), bench.torch.device("cpu"), None)


def test_a_call_that_is_cut_keeps_every_turn_before_and_names_what_failed(tmp_path, monkeypatch):
    bench, file = script("train_step"), tmp_path / "found.json"
    ways = {bench.EAGER: Way(), bench.OURS: Way(4, KeyboardInterrupt())}
    ways[bench.COMPILED] = Way(2, RuntimeError("no\nroom"))
    monkeypatch.setattr(bench, "loaders", lambda *a: (None, None, (2560, 5120)))
    monkeypatch.setattr(bench, "built", lambda *a: dict(ways))
    monkeypatch.setattr(bench, "kept", lambda way: 2**30)
    call = call_of(bench, minutes=9.0, json=file)
    with pytest.raises(KeyboardInterrupt):
        bench.every_case([bench.CASES[1], bench.CASES[0]], call)
    found = json.loads(file.read_text())
    what = "vitflower_b16, batch 256"
    assert found["not_measured"] == [
        f"{what}, photographs: no --photos given",
        f"{what}, synthetic batches, timm compiled, round 3: RuntimeError: no room",
    ]
    told = {row["what"]: (row["value"], row["unit"], row["met"]) for row in found["rows"]}
    what = f"training {what}, synthetic batches"
    assert told == {
        f"{what}, against a loop of timm's pieces, eager": (2.0, "x", True),
        what: (5120.0, "images/s", True),
        f"{what}, of 989 TFLOP/s": (pytest.approx(54.46, abs=0.01), "%", None),
        f"{what}, peak memory": (1.0, "GiB", None),
    }
    assert [len(w["seconds"]) for w in found["details"]["tables"][0]["ways"].values()] == [4, 4]


def test_a_case_without_time_is_left_out(tmp_path, monkeypatch):
    bench = script("train_step")
    call = call_of(bench, minutes=1.0, json=None)
    bench.every_case([bench.CASES[5]], call)
    assert not call.tables
    (text,) = call.left
    assert re.fullmatch(r"vitflower_l16, .*: \d\d s left, about 160 s needed", text)


def test_every_way_that_compiles_does_so_beforehand_and_never_more_than_fit(monkeypatch):
    bench, begun, running = script("train_step"), [], []

    class Process:
        returncode = 0

        def __init__(self, words):
            number, way = (
                words[words.index("--cases") + 1],
                words[words.index("--only-compile") + 1],
            )
            self.gib = bench.gib_of(bench.CASES[int(number) - 1])
            self.looks = 0
            begun.append((int(number), way))
            running.append(self)
            assert sum(p.gib for p in running) <= bench.ROOM

        def poll(self):
            self.looks += 1
            if self.looks < 3:
                return None
            if self in running:
                running.remove(self)
            return 0

    monkeypatch.setattr(bench.subprocess, "Popen", Process)
    monkeypatch.setattr(bench.time, "sleep", lambda seconds: None)
    args = bench.argparse.Namespace(quick=False, timm=None)
    bench.compile_first(list(bench.CASES), args)
    assert sorted(begun) == sorted(
        (n, way)
        for n, case in enumerate(bench.CASES, 1)
        for way in case.ways
        if way != bench.EAGER and not case.photos
    )
    assert not running
