"""Exports reproduce the run's predictions, refuse to be anything else, and check themselves."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml
from conftest import paint
from rows import COLOURS, card, contents, make_product, network, refused

from vitft import export, graph, io, product, proof
from vitft.errors import MachineError, RecipeError, VitftError, WeightsError
from vitft.export import Order, main, selftest
from vitft.hubpage import page
from vitft.run import run


@pytest.fixture
def made(tmp_path):
    return make_product(tmp_path / "made" / "model", temperature=1.7)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    sizes = {"red": 40, "green": 31, "blue": 90}
    for k, name in enumerate(COLOURS):
        colour = tuple(200 * (i == k) for i in (2, 1, 0))
        paint(folder / f"{name}.jpg", colour, seed=k, size=sizes[name])
    return sorted(folder.iterdir())


@pytest.fixture
def finished(tiny_recipe):
    spec = tiny_recipe("head", "train.epochs=1", "data.root=sample:flowers", "data.image_size=32")
    return run(spec).folder


def given(pictures):
    return proof.Evidence(tuple(pictures), "given")


def stored(folder):
    with (folder / "predictions.csv").open(newline="") as text:
        return list(csv.DictReader(text))


@pytest.mark.parametrize("format", ["onnx", "pt2", "timm", "hf"])
def test_every_export_reproduces_the_runs_test_predictions(finished, tmp_path, format, capsys):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    out = tmp_path / "out"
    assert main([str(finished), "-o", str(out), "--format", format]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == str(out)
    n = len(stored(finished))
    assert f"predictions.csv: {n} of {n} answers alike" in told.err
    _, of_run = product.load(finished)
    runner = export.open_export(out, format, of_run, uint8=False)
    _, card_now = product.load(finished)
    evidence = proof.gather(finished, [], 1000)
    pixels = torch.cat([batch for _, batch in proof.chunks(evidence, card_now)])
    _, p = runner(pixels)
    was = np.array([[float(v) for k, v in r.items() if k[:2] == "p:"] for r in stored(finished)])
    np.testing.assert_allclose(p, was, atol=1e-5)
    assert [of_run.classes[k] for k in p.argmax(1)] == [r["prediction"] for r in stored(finished)]
    lines, good = selftest(out)
    assert good
    assert len(lines) == 3
    assert io.verify_dir(out) == ()


def test_an_onnx_graph_takes_any_batch_of_bytes_and_says_what_it_is(made, pictures, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    found = export.export(made, tmp_path / "out", Order("onnx", uint8=True), given(pictures))
    assert found.good
    assert found.n == found.same == 3
    file = tmp_path / "out" / "model.onnx"
    kept = {p.key: p.value for p in onnx.load(file).metadata_props}
    assert json.loads(kept["class_names"]) == list(COLOURS)
    assert float(kept["temperature"]) == 1.7
    assert json.loads(kept["transform"])["size"] == [16, 16]
    assert json.loads(kept["vitft"])["temperature_applied"] is True
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    assert entry.type == "tensor(uint8)"
    assert entry.shape[1:] == [16, 16, 3]
    net, _ = product.load(made)
    rng = np.random.default_rng(0)
    for n in (1, 2, 7):
        x = rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
        logits, p = session.run(["logits", "probabilities"], {"images": x})
        by_hand = (torch.from_numpy(x).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        with torch.inference_mode():
            want = net(by_hand.float())
        np.testing.assert_allclose(logits, want.numpy(), atol=1e-5)
        np.testing.assert_allclose(p, (want / 1.7).softmax(1).numpy(), atol=1e-6)


def test_variants_are_written_and_measured_side_by_side(
    made, pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(export.variants, "WORTH", 0)
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    words = [str(made), "-o", str(out), "--variants", "--images", *map(str, pictures)]
    assert main(words) == 0
    rows = json.loads((out / "variants.json").read_text())["variants"]
    assert [r["name"] for r in rows] == ["PyTorch", "float32", "float16", "int8"]
    assert {p.name for p in out.glob("*.onnx")} == {
        "model.onnx", "model.float16.onnx", "model.int8.onnx",
    }  # fmt: skip
    gap = {r["name"]: r["agreement"]["probability"] for r in rows}
    assert gap["float32"] <= 1e-6 < gap["float16"] < gap["int8"] < 0.1
    assert all(r["ms_one"] > 0 and r["per_second"] > 0 for r in rows)
    printed, err = capsys.readouterr()
    assert "WARNING: int8 holds for matrix products only" in err
    assert [line.split()[0] for line in printed.splitlines()[1:5]] == list(gap)
    assert "labels not known" in printed


def test_a_pt2_archive_takes_any_batch_and_carries_its_card(made, pictures, tmp_path):
    export.export(made, tmp_path / "out", Order("pt2", uint8=True), given(pictures))
    extra = {graph.PT2_META: ""}
    program = torch.export.load(str(tmp_path / "out" / "model.pt2"), extra_files=extra).module()
    assert json.loads(extra[graph.PT2_META])["card"]["classes"] == list(COLOURS)
    for n in (1, 5):
        logits, p = program(torch.zeros(n, 16, 16, 3, dtype=torch.uint8))
        assert logits.shape == p.shape == (n, 3)
        torch.testing.assert_close(p, (logits / 1.7).softmax(1))


def test_a_folder_for_the_hub_opens_in_transformers(made, pictures, tmp_path):
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    out = tmp_path / "out"
    export.export(made, out, Order("hf", licence="apache-2.0"), given(pictures))
    pipe = transformers.pipeline("image-classification", model=str(out), top_k=3)
    golden = json.loads((out / "golden" / "golden.json").read_text())["images"]
    for entry in golden:
        with Image.open(out / "golden" / entry["file"]) as picture:
            said = {a["label"]: a["score"] for a in pipe(picture.convert("RGB"))}
        plain = torch.tensor(entry["logits"]).softmax(0)  # no temperature in this format
        assert [said[c] for c in COLOURS] == pytest.approx(plain.tolist(), abs=1e-5)


def test_the_hub_page_has_licence_numbers_with_intervals_and_says_what_is_not_applied(finished):
    _, of_run = product.load(finished)
    text = page(of_run, finished, "apache-2.0", golden="flowers")
    front = yaml.safe_load(text.split("---")[1])
    told = json.loads((finished / "metrics.json").read_text())["test"]
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "timm"
    metric = front["model-index"][0]["results"][0]["metrics"][0]
    assert metric["type"] == "accuracy"
    assert metric["value"] == pytest.approx(told["accuracy"])
    low, high = told["accuracy_interval"]["low"], told["accuracy_interval"]["high"]
    assert f"| Accuracy | {told['accuracy']:.3f} | {low:.3f} to {high:.3f} |" in text
    for key, words in (("before", "of the plain softmax"), ("after", "with the temperature")):
        found = json.loads((finished / "metrics.json").read_text())["trust"][f"calibration_{key}"]
        ends = found["ece_interval"]
        between = f"{ends['low']:.3f} to {ends['high']:.3f}"
        assert f"| Calibration error {words} | {found['ece']:.3f} | {between} |" in text
    daisy = told["per_class"][0]
    ends = daisy["recall_interval"]
    between = f"{ends['low']:.3f} to {ends['high']:.3f}"
    assert f"| daisy | {daisy['recall']:.3f} ({between}) | " in text
    assert "35 images: one image is 2.9 points." in text
    assert "A class with fewer than 30 photographs has a first impression" in text
    assert "**not applied** in this format" in text
    assert "250 photographs of 250 found were used" in text


def test_names_from_anyone_are_text_on_the_hub_page():
    hostile = ("<script>alert(1)</script>", "[x](javascript:1)", "a|b\n# c")
    text = page(card(classes=hostile), None, "unknown", golden="flowers")
    assert "<script>" not in text
    assert "\\[x\\](javascript:1)" in text
    assert "a\\|b\\\\n\\# c" in text
    assert "Not stated by who exported it" in text


def test_an_export_that_differs_is_refused_and_leaves_nothing(
    made, pictures, tmp_path, monkeypatch
):
    real = graph.Deployed.forward
    monkeypatch.setattr(graph.Deployed, "forward", lambda self, images: real(self, images + 3))
    before = contents(tmp_path)
    with pytest.raises(VitftError, match=r"export.differs.*of a probability.*at most 1e-04"):
        export.export(made, tmp_path / "out", Order("pt2"), given(pictures))
    assert contents(tmp_path) == before


def test_a_folder_that_is_no_export_is_never_replaced(made, pictures, tmp_path, capsys):
    kept = tmp_path / "holiday"
    kept.mkdir()
    (kept / "photo.jpg").write_bytes(b"precious")
    refused(
        capsys, main, [made, "-o", kept, "--format", "pt2"],
        code=2, id="export.output", says=(str(kept), "no earlier export"), fix="name a new folder",
    )  # fmt: skip
    assert contents(kept) == {"photo.jpg": b"precious"}
    for _ in range(2):  # an export replaces an export
        export.export(made, tmp_path / "out", Order("timm"), given(pictures))
    assert not list(tmp_path.glob(".out*"))


def test_the_selftest_finds_a_changed_file_a_changed_answer_and_no_export(
    made, pictures, tmp_path, capsys
):
    out = tmp_path / "out"
    export.export(made, out, Order("timm"), given(pictures))
    assert main(["--selftest", str(out)]) == 0
    assert capsys.readouterr().out.count("same    ") == 3
    listed = out / "golden" / "golden.json"
    told = json.loads(listed.read_text())
    listed.write_text(json.dumps(told | {"x": 1}))
    with pytest.raises(WeightsError, match=r"ckpt.corrupt.*golden.json"):
        selftest(out)
    told["images"][1]["probabilities"][0] += 0.01
    listed.write_text(json.dumps(told))
    (out / io.MANIFEST).unlink()
    io._seal(out)
    assert main(["--selftest", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["same", "DIFFERS", "same"]
    with pytest.raises(WeightsError, match=r"export.unreadable.*export.json"):
        selftest(made)


def test_private_exports_carry_no_photograph_of_the_run(made, pictures, tmp_path):
    export.export(made, tmp_path / "out", Order("timm", private=True), given(pictures))
    sums = {io.sha256_file(p) for p in pictures}
    flowers = {io.sha256_file(p) for p in proof.SAMPLE.rglob("*.jpg")}
    golden = {io.sha256_file(p) for p in (tmp_path / "out" / "golden").glob("*.jpg")}
    assert len(golden) == 3
    assert not golden & sums
    assert golden <= flowers


def test_what_the_command_line_asks_in_vain_is_said_at_once(capsys):
    err = refused(
        capsys, main, ["--uint8", "--variants", "--format", "timm", "--limit", "0"],
        code=2, id="export.option", says=("is missing", "holds no graph"), fix="leave it out",
    )  # fmt: skip
    for place in ("MODEL_OR_RUN", "-o", "--uint8", "--variants", "--limit"):
        assert f"error[export.option] {place}: " in err


def test_a_missing_extra_is_named(made, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(graph.importlib.util, "find_spec", lambda name: None)
    text = r"env.extra.*onnx, onnxscript, onnxruntime are not installed(.|\n)*vitft\[onnx\]"
    with pytest.raises(MachineError, match=text):
        export.export(made, tmp_path / "out", Order("onnx"), given(pictures))


def test_a_model_without_a_twin_in_timm_is_sent_to_another_format(pictures, tmp_path):
    net = network(pos_embed="sincos2d")
    options = card().options | {"pos_embed": "sincos2d"}
    made = make_product(tmp_path / "made" / "model", net, options=options)
    with pytest.raises(RecipeError, match=r"export.as_timm(.|\n)*export it as onnx or pt2"):
        export.export(made, tmp_path / "out", Order("hf"), given(pictures))
    assert export.export(made, tmp_path / "out", Order("pt2"), given(pictures)).good


def test_a_card_that_cannot_be_is_refused_by_the_selftest(made, pictures, tmp_path):
    out = tmp_path / "out"
    export.export(made, out, Order("timm"), given(pictures))
    told = json.loads((out / "export.json").read_text())
    told["card"]["transform"]["size"] = [10**6, 10**6]
    (out / "export.json").write_text(json.dumps(told))
    (out / io.MANIFEST).unlink()
    io._seal(out)
    with pytest.raises(WeightsError, match=r"export.unreadable.*size \(1000000, 1000000\)"):
        selftest(out)
