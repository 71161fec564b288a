"""Long predictions: parts, resumption after a kill, no mixing, every format, one row per file."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import paint
from rows import COLOURS, TINY, make_product, network, refused

from vitft import answers, io, kernels, predict
from vitft.answers import Answer, Output, top
from vitft.errors import MachineError, RecipeError
from vitft.predict import Predictor, main

HERE = Path(__file__).parent


@pytest.fixture
def made(tmp_path):
    return make_product(tmp_path / "made" / "model", temperature=1.3)


@pytest.fixture
def pictures(tmp_path):
    """Twenty-one photographs and two files that are none."""
    folder = tmp_path / "pictures"
    for i in range(21):
        paint(folder / f"{i:03d}.jpg", (10 * i, 200 - 9 * i, 50), seed=i)
    (folder / "005x.jpg").write_bytes(b"")
    (folder / "017x.png").write_bytes(b"<html>")
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(answers, "PART", 4)


def rows(file):
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


def stopping(monkeypatch, after):
    """Ends the prediction after some parts, as a kill would, but in this process."""
    real, written = io.append_line, []

    def line(path, record):
        real(path, record)
        if path.name == answers.JOURNAL:
            written.append(record)
            if len(written) >= after:
                raise KeyboardInterrupt

    monkeypatch.setattr(answers.io, "append_line", line)


def seen(monkeypatch):
    """The files that were read."""
    real, found = Predictor._read, []

    def read(self, path):
        found.append(path.name)
        return real(self, path)

    monkeypatch.setattr(Predictor, "_read", read)
    return found


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_format_holds_a_row_for_every_file(made, pictures, tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"out.{kind}"
    assert main([str(made), str(pictures), "-o", str(out)]) == 3
    files = sorted(str(p) for p in pictures.iterdir())
    want = list(Predictor(made, "cpu")(map(Path, files)))
    found = read_back(out)
    assert [r["path"] for r in found] == files
    for row, answer in zip(found, want, strict=True):
        if answer.error:
            assert row["error"] == answer.error
            assert row["prediction"] is None
            assert row["p"] is None
        else:
            assert row["p"] == answer.probabilities.tolist()  # to the last bit
            assert (row["prediction"], row["confidence"]) == top(answer, COLOURS, 1)[0]
            assert row["error"] is None
    assert not list(tmp_path.glob("out*.parts"))


def read_back(file):
    """Any of the formats as rows with the same keys."""
    if file.suffix == ".jsonl":
        found = [json.loads(line) for line in file.read_text().splitlines()]
        for r in found:
            p = r.pop("probabilities")
            assert p is None or tuple(p) == COLOURS
            r["p"] = p and list(p.values())
        return found
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        found = pq.read_table(file, partitioning=None).to_pylist()
    else:
        found = [{k: v or None for k, v in r.items()} for r in rows(file)]
        for r in found:
            r["confidence"] = r["confidence"] and float(r["confidence"])
    for r in found:
        p = [r.pop(f"p:{c}") for c in COLOURS]
        r["p"] = None if p[0] is None else [float(v) for v in p]
    return found


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_an_interrupted_prediction_goes_on_and_equals_an_undisturbed_one(
    made, pictures, tmp_path, monkeypatch, capsys, kind
):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    whole, cut = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
    words = [str(made), str(pictures), "-o"]
    assert main([*words, str(whole)]) == 3
    with monkeypatch.context() as patched:
        stopping(patched, after=3)
        with pytest.raises(KeyboardInterrupt):
            main([*words, str(cut)])
    assert not cut.exists()
    assert "stopped after 12 of 23 files; the same command goes on" in capsys.readouterr().err
    read = seen(monkeypatch)
    assert main([*words, str(cut)]) == 3
    assert cut.read_bytes() == whole.read_bytes()
    assert len(read) == 23 - 12
    told = capsys.readouterr().err
    assert "going on: 12 of 23 files were answered before" in told
    assert "21 of 23 files answered, 2 unreadable (data.empty 1, data.not_image 1)" in told


def test_a_killed_prediction_goes_on_and_equals_an_undisturbed_one(made, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "PART", 16)
    for i in range(400):
        paint(tmp_path / "many" / f"{i:03d}.png", (i % 250, 40, 90), size=60, seed=i)
    words = [str(made), str(tmp_path / "many"), "--device", "cpu", "-o"]
    assert main([*words, str(tmp_path / "whole.csv")]) == 0
    code = (
        "import sys; from vitft import answers, predict; answers.PART = 16;"
        f"import torch; torch.set_num_threads({torch.get_num_threads()});"
        "sys.exit(predict.main(sys.argv[1:]))"
    )
    cut = tmp_path / "cut.csv"
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    child = subprocess.Popen(
        [sys.executable, "-c", code, *words, str(cut)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    journal = tmp_path / "cut.csv.parts" / answers.JOURNAL
    while child.poll() is None and not (journal.exists() and len(io.read_lines(journal)) >= 2):
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "it was done before it could be killed"
    assert not cut.exists()
    before = len(io.read_lines(journal))
    assert 2 <= before < 25
    read = seen(monkeypatch)
    assert main([*words, str(cut)]) == 0
    assert len(read) == 400 - 16 * before
    assert cut.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_parts_that_changed_and_files_that_changed_are_answered_again(
    made, pictures, tmp_path, monkeypatch
):
    words, cut = [str(made), str(pictures), "-o"], tmp_path / "cut.csv"
    with monkeypatch.context() as patched:
        stopping(patched, after=4)
        with pytest.raises(KeyboardInterrupt):
            main([*words, str(cut)])
    parts = sorted((tmp_path / "cut.csv.parts").glob("*.csv"))
    parts[0].write_bytes(parts[0].read_bytes().replace(b"0.", b"1.", 1))
    paint(pictures / "006.jpg", (255, 255, 255), seed=99)  # a row of the second part
    read = seen(monkeypatch)
    assert main([*words, str(cut)]) == 3
    assert sorted(read)[:5] == ["000.jpg", "001.jpg", "002.jpg", "003.jpg", "004.jpg"]
    assert len(read) == 23 - 8
    assert main([*words, str(tmp_path / "whole.csv")]) == 3
    assert cut.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_journal_that_is_not_ours_costs_time_and_nothing_else(
    made, pictures, tmp_path, monkeypatch
):
    words, cut = [str(made), str(pictures), "-o"], tmp_path / "cut.csv"
    with monkeypatch.context() as patched:
        stopping(patched, after=4)
        with pytest.raises(KeyboardInterrupt):
            main([*words, str(cut)])
    journal = tmp_path / "cut.csv.parts" / answers.JOURNAL
    odd = [{}, {"part": -1}, {"part": 10**9}, {"part": "0"}, {"part": 0, "counts": {"": "x"}}]
    journal.write_text("".join(json.dumps(line) + "\n" for line in odd))
    assert main([*words, str(cut)]) == 3
    assert main([*words, str(tmp_path / "whole.csv")]) == 3
    assert cut.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_parts_of_another_model_or_list_are_refused_and_kept(
    made, pictures, tmp_path, monkeypatch, capsys
):
    cut = tmp_path / "cut.csv"
    with monkeypatch.context() as patched:
        stopping(patched, after=2)
        with pytest.raises(KeyboardInterrupt):
            main([str(made), str(pictures), "-o", str(cut)])
    net = network()
    net.head.bias.data += 1
    other = make_product(tmp_path / "other" / "model", net)
    refused(
        capsys, main, [other, pictures, "-o", cut],
        code=2, id="predict.other_parts",
        says=(f"{cut}.parts", "something else: the model is another"), fix="add --restart",
    )  # fmt: skip
    with pytest.raises(RecipeError, match=r"the list of files is another"):
        main([str(made), str(pictures / "000.jpg"), "-o", str(cut)])
    assert len(io.read_lines(tmp_path / "cut.csv.parts" / answers.JOURNAL)) == 2
    assert main([str(other), str(pictures), "-o", str(cut), "--restart"]) == 3
    assert main([str(other), str(pictures), "-o", str(tmp_path / "whole.csv")]) == 3
    assert cut.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_results_are_written_as_they_come_and_never_held(tmp_path):
    """The generator is asked for one part at a time, and the list of files is not copied."""
    asked = []

    def endless(files):
        for file in files:
            asked.append(file)
            yield Answer(file, np.array([0.25, 0.75]))

    out = Output(tmp_path / "x.csv", "csv", ("a", "b"))
    names = [f"{i}.jpg" for i in range(11)]
    sizes = []
    counts = answers.write(out, names, endless, {}, show=lambda a: sizes.append(len(asked)))
    assert counts == {"": 11}
    assert sizes == [4] * 4 + [8] * 4 + [11] * 3
    assert [r["path"] for r in rows(out.file)] == names


def test_linked_folders_are_entered_once_and_what_is_left_out_is_said(pictures, tmp_path, capsys):
    top = tmp_path / "top"
    for folder in ("", ".hidden", "__MACOSX"):
        (top / folder).mkdir(exist_ok=True)
        (top / folder / "a.jpg").write_bytes(b"")
    (top / "notes.txt").write_text("")
    (top / "linked").symlink_to(pictures, target_is_directory=True)
    (top / "twice").symlink_to(pictures, target_is_directory=True)
    (top / "loop").symlink_to(top, target_is_directory=True)
    found = predict.list_files([top])
    linked = [str(top / "linked" / p.name) for p in sorted(pictures.iterdir())]
    assert found == [str(top / "a.jpg"), *linked]
    told = capsys.readouterr().err
    assert "1 files are not photographs by name and were left out" in told
    assert "4 hidden or repeated folders were left out" in told


def test_no_file_at_all_gives_the_header_alone(tmp_path):
    out = Output(tmp_path / "x.csv", "csv", ("a", "b"))
    assert answers.write(out, [], lambda files: iter(()), {}) == {}
    assert out.file.read_text() == "path,prediction,confidence,sure,foreign,error,p:a,p:b\n"


def test_what_cannot_be_written_is_said_before_anything_is_read(
    made, pictures, tmp_path, capsys, monkeypatch
):
    refused(
        capsys, main, [made, pictures, "-o", "x.xlsx"],
        code=2, id="predict.output", says=("x.xlsx must end in .csv, .jsonl or .parquet",),
        fix="one of these endings",
    )  # fmt: skip
    refused(
        capsys, main, [made, pictures, "-o", "a.csv", "--csv", "b.csv"],
        code=2, id="predict.output", says=("both name an output",), fix="leave one",
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MachineError, match=r"pyarrow is not installed(.|\n)*vitft\[parquet\]"):
        main([str(made), str(pictures), "-o", str(tmp_path / "x.parquet")])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_lone_picture_gets_the_bits_of_a_full_batch(made, pictures, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        files = sorted(pictures.glob("0??.jpg"))[:5]
        together = [a.probabilities for a in Predictor(made, "cpu")(files)]
        predictor = Predictor(made, "cpu")
        for file, want in zip(files, together, strict=True):
            (alone,) = predictor([file])
            np.testing.assert_array_equal(alone.probabilities, want)
        assert predictor._singles == 5
        assert predictor._unpadded
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_first_lone_picture_is_not_padded_through_the_whole_model(
    tmp_path, pictures, monkeypatch, threads
):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        deep = network(depth=4)
        made = make_product(tmp_path / "deep", deep, options=TINY | {"depth": 4})
        files = sorted(pictures.glob("0??.jpg"))[:2]
        want, _ = Predictor(made, "cpu")(files)
        predictor, seen = Predictor(made, "cpu"), []
        predictor.net.blocks[1].register_forward_hook(lambda m, args, y: seen.append(len(y)))
        (first,) = predictor(files[:1])
        np.testing.assert_array_equal(first.probabilities, want.probabilities)
        assert seen == [1]
    finally:
        torch.set_num_threads(before)


def test_opening_a_model_of_ours_draws_no_weights(made):
    state = torch.get_rng_state()
    Predictor(made, "cpu")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_lone_picture_stays_padded_where_bits_would_differ(made, pictures, monkeypatch):
    predictor = Predictor(made, "cpu")
    real = Predictor._alone

    def off(self, x, net):
        a, b = real(self, x, net)
        return a, b + 1e-6

    monkeypatch.setattr(predict.Predictor, "_alone", off)
    files = sorted(pictures.glob("0??.jpg"))[:4]
    want = [a.probabilities for a in Predictor(made, "cpu")(files)]
    for file, p in zip(files, want, strict=True):
        (alone,) = predictor([file])
        np.testing.assert_array_equal(alone.probabilities, p)
    assert predictor._unpadded is False


def test_a_lone_picture_pays_for_no_look_at_every_call_of_torchs(made, pictures, monkeypatch):
    """A mode of torch's around the whole of our network cost 2 of its 70 ms."""
    predictor, calls = Predictor(made, "cpu"), []
    file = pictures / "000.jpg"
    (want,) = predictor([file])  # here the proof is made, padded too
    real = kernels._FastLinear.__torch_function__
    monkeypatch.setattr(
        kernels._FastLinear,
        "__torch_function__",
        lambda self, *a: calls.append(a[0]) or real(self, *a),
    )
    (answer,) = predictor([file])
    np.testing.assert_array_equal(answer.probabilities, want.probabilities)
    assert calls.count(torch.nn.functional.linear) == 1
    assert len(calls) <= 2  # the head, and the rows that are kept of it


def test_a_lone_picture_goes_through_the_backbone_as_a_batch_does(made, pictures, monkeypatch):
    """Else a CNN's convolutions would be rounded otherwise on CUDA, and every picture padded."""
    predictor, inside = Predictor(made, "cpu"), []

    @contextmanager
    def noted(device):
        inside.append(device.type)
        yield

    file = pictures / "000.jpg"
    list(predictor([file]))  # the proof
    monkeypatch.setattr(predict, "whole_floats", noted)
    list(predictor([file]))
    assert predictor._unpadded
    assert inside == ["cpu"]
