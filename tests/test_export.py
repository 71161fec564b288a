"""Exports reproduce the run's predictions, refuse to be anything else, and check themselves."""

import csv
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import paint
from PIL import Image
from rows import COLOURS, CONFIG, TINY, card, contents, make_product, network, refused

from vitft import doubt, export, graph, io, product, proof, recipe, seals, variants
from vitft.errors import MachineError, RecipeError, VitftError, WeightsError
from vitft.evaluate import fixed_batch
from vitft.export import Order, main, selftest
from vitft.hubpage import page
from vitft.inputs import InputConfig, plain
from vitft.predict import Predictor
from vitft.run import run
from vitft.stats import paired_interval, wilson


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
    asked = ["--variants"] if format == "onnx" else []
    assert main([str(finished), "-o", str(out), "--format", format, *asked]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == str(out)
    n = len(stored(finished))
    assert f"predictions.csv: {n} of {n} answers alike" in told.err
    _, of_run = product.load(finished)
    sent = of_run if format in export.GRAPHS else product.load(out)[1]
    runner = export.open_export(out, format, sent, uint8=False)
    evidence = proof.gather(finished, [], 1000)
    pixels = torch.cat([batch for _, batch in proof.chunks(evidence, of_run)])
    _, p = runner(pixels)
    was = np.array([[float(v) for k, v in r.items() if k[:2] == "p:"] for r in stored(finished)])
    np.testing.assert_allclose(p, was, atol=1e-5)
    assert [of_run.classes[k] for k in p.argmax(1)] == [r["prediction"] for r in stored(finished)]
    if asked:
        measured = json.loads((out / "variants.json").read_text())["variants"]
        of_test = json.loads((finished / "metrics.json").read_text())["test"]["accuracy"]
        assert [r["accuracy"]["value"] for r in measured[:2]] == [pytest.approx(of_test)] * 2
        assert all(r["agreement"]["n"] == n for r in measured)
    if format == "hf":
        np.testing.assert_allclose(by_transformers(out, evidence.files), was, atol=1e-5)
    lines, good = selftest(out)
    assert good
    assert len(lines) == 3
    assert io.verify_dir(out) == ()


def by_transformers(folder, files):
    """Probabilities [n, C] of transformers' own pipeline, in the order of config.json's names."""
    transformers = pytest.importorskip("transformers")
    names = json.loads((folder / "config.json").read_text())["label_names"]
    pipe = transformers.pipeline("image-classification", model=str(folder), top_k=None)
    told = [{a["label"]: a["score"] for a in answers} for answers in pipe([str(f) for f in files])]
    return np.array([[one[name] for name in names] for one in told])


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


def product_of(folder, classes, size, architecture="vitflower_ti16", **options):
    """A product of any shape; a crop that is not the whole, a temperature far from 1."""
    config = InputConfig(size, (0.5,) * 3, (0.25,) * 3, crop_pct=0.9)
    names = tuple(f"class {k}" for k in range(classes))
    torch.manual_seed(3)
    net = timm.create_model(architecture, num_classes=classes, **options).eval()
    heads = net.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        for p in head.parameters():
            torch.nn.init.normal_(p)
    given = {"architecture": architecture, "options": options, "transform": asdict(plain(config))}
    of_net = card(classes=names, temperature=2.5, **given)
    product.save(net, folder, of_net, config, as_timm=False)
    return folder


SHAPES = {
    "one class": (1, (16, 16), "vitflower_ti16", TINY),
    "two classes, wide": (2, (16, 24), "vitflower_ti16", TINY | {"img_size": [16, 24]}),
    "1,000 classes": (1000, (16, 16), "vitflower_ti16", TINY),
    "convolutions, tall": (3, (48, 32), "test_efficientnet", {}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", ["onnx", "pt2", "hf"])
def test_any_shape_of_model_gives_predicts_probabilities(shape, format, pictures, tmp_path):
    """The file as a stranger opens it, next to vitft.predict's answers for the same photographs."""
    classes, size, architecture, options = SHAPES[shape]
    if format == "onnx":
        pytest.importorskip("onnxscript")
        if shape not in ("two classes, wide", "convolutions, tall"):
            pytest.skip("two shapes are enough for the slow exporter")
    made = product_of(tmp_path / "made" / "model", classes, size, architecture, **options)
    out = tmp_path / "out"
    found = export.export(made, out, Order(format, uint8=format != "hf"), given(pictures))
    assert found.good
    want = np.stack([a.probabilities for a in Predictor(made, "cpu")(pictures)])
    if format == "hf":
        got = [a.probabilities for a in Predictor(out, "cpu")(pictures)]
        np.testing.assert_allclose(got, want, atol=1e-5)
        net, golden = opened(out), json.loads((out / "golden" / "golden.json").read_text())
        with torch.inference_mode():
            p = net(by_timm(net, out)).softmax(1)[0]
        np.testing.assert_allclose(p, golden["images"][0]["probabilities"], atol=1e-5)
    pixels = torch.cat([x for _, x in proof.chunks(given(pictures), product.load(made)[1])])
    np.testing.assert_allclose(stranger(out, format, pixels), want, atol=1e-5)
    assert selftest(out)[1]


def test_a_head_of_two_layers_keeps_its_temperature_apart_and_says_so(tmp_path, pictures, capsys):
    options = TINY | {"img_size": [16, 16]}
    made = tmp_path / "made" / "model"
    product_of(made, 3, (16, 16), "deit_tiny_distilled_patch16_224", **options)
    capsys.readouterr()
    words = [made, "-o", tmp_path / "out", "--format", "timm", "--images", *pictures]
    assert main([str(word) for word in words]) == 0
    assert "temperature 2.5000 is not applied" in capsys.readouterr().err
    told = json.loads((tmp_path / "out" / "export.json").read_text())
    assert told["temperature_applied"] is False
    assert product.load(tmp_path / "out")[1].temperature == 2.5


def opened(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def by_timm(net, folder):
    """The first golden image as timm's own transform makes it for this model, [1, 3, H, W]."""
    config = timm.data.resolve_model_data_config(net)
    transform = timm.data.create_transform(**config, is_training=False)
    with Image.open(next(folder.glob("golden/0.*"))) as picture:
        return transform(picture.convert("RGB")).unsqueeze(0)


@torch.inference_mode()
def stranger(folder, format, x):
    """Probabilities of uint8 [n, 3, H, W] by nothing of ours."""
    if format == "hf":
        return opened(folder)((x / 255 - 0.5) / 0.25).softmax(1).numpy()
    x = x.permute(0, 2, 3, 1).contiguous()
    if format == "pt2":
        return torch.export.load(str(folder / "model.pt2")).module()(x)[1].numpy()
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    return session.run(["probabilities"], {"images": x.numpy()})[0]


def test_variants_are_written_and_measured_side_by_side(pictures, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    wide = {"embed_dim": 192}  # narrower, a file is mostly its graph
    options = TINY | wide
    made = make_product(tmp_path / "made" / "model", network(**wide), options=options)
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
    assert all(r["accuracy"] is None and r["difference"] is None for r in rows)
    printed, err = capsys.readouterr()
    assert "hardly made of them" not in err
    assert [line.split()[0] for line in printed.splitlines()[1:5]] == list(gap)
    assert printed.count("not known") == 4


def test_an_int8_file_that_saves_nothing_is_told_with_its_size(pictures, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    made = product_of(tmp_path / "made" / "model", 3, (32, 32), "test_efficientnet")
    out = tmp_path / "out"
    words = [str(made), "-o", str(out), "--variants", "--images", *map(str, pictures)]
    assert main(words) == 0
    told = capsys.readouterr().err
    sizes = [(out / name).stat().st_size / 1e6 for name in ("model.int8.onnx", "model.onnx")]
    assert f"WARNING: model.int8.onnx has {sizes[0]:.1f} MB, model.onnx {sizes[1]:.1f}: " in told
    assert "this network is hardly made of them; the float16 file is the small one" in told


def test_memory_does_not_grow_with_the_photographs_that_are_compared(made, pictures, tmp_path):
    """onnxruntime keeps the memory of its largest batch, so none is larger than predict's."""
    net, of_net = product.load(made)
    sizes = []

    def runner(pixels):
        sizes.append(len(pixels))
        logits = proof.logits_of(net, pixels, product.transform_of(of_net))
        return logits, torch.tensor(logits / 1.7).softmax(1).numpy()

    many = proof.Evidence(tuple(pictures) * 9, "given")
    _, (found,) = proof.compare(net, of_net, many, [runner])
    assert found.n == sum(sizes) == 27
    assert max(sizes) == fixed_batch(torch.device("cpu"))
    timed = []
    variants._speeds([lambda x: timed.append(len(x))], product.transform_of(of_net))
    assert set(timed) == {1, variants.BATCH}
    assert variants.BATCH <= 16


def test_a_variants_accuracy_stands_beside_pytorchs_on_the_same_photographs(made, pictures):
    """Three photographs: one right in both, one in PyTorch alone, one in the variant alone."""
    net, of_net = product.load(made)
    answers, _ = proof.compare(net, of_net, given(pictures), [])
    said = answers.probabilities.argmax(axis=1)
    other = (said + 1) % 3
    labels = tuple(COLOURS[k] for k in (said[0], said[1], other[2]))

    def variant(x):
        p = np.eye(3, dtype=np.float32)[[said[0], other[1], other[2]]]
        return np.log(p + 1e-3), p

    evidence = replace(given(pictures), labels=labels)
    _, (found,) = proof.compare(net, of_net, evidence, [variant])
    assert (found.right, found.lost, found.gained, found.same) == (2, 1, 1, 1)
    row = variants.Variant("int8", 1.0, found, 1.0, 1.0).record()
    right, apart = wilson(2, 3), paired_interval(1, 1, 3)
    assert row["accuracy"] == {"value": 2 / 3, "low": right.low, "high": right.high}
    assert row["difference"] == {"value": 0.0, "low": apart.low, "high": apart.high}
    assert variants.Variant("PyTorch", None, found, 1.0, 1.0).record()["difference"] is None


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
    out = tmp_path / "out"
    export.export(made, out, Order("hf", licence="apache-2.0"), given(pictures))
    pipe = transformers.pipeline("image-classification", model=str(out), top_k=3)
    golden = json.loads((out / "golden" / "golden.json").read_text())["images"]
    for entry in golden:
        with Image.open(out / "golden" / entry["file"]) as picture:
            said = {a["label"]: a["score"] for a in pipe(picture.convert("RGB"))}
        assert [said[c] for c in COLOURS] == pytest.approx(entry["probabilities"], abs=1e-5)
        plain = torch.tensor(entry["logits"]).softmax(0)  # the temperature is in the head
        assert plain.tolist() == pytest.approx(entry["probabilities"], abs=1e-6)


def test_the_hub_page_has_licence_numbers_with_intervals_and_says_what_is_not_applied(finished):
    _, of_run = product.load(finished)
    assert of_run.temperature not in (None, 1.0)
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
    for key, words in (("before", "without the temperature"), ("after", "with the temperature")):
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
    assert "trained with vitft: vitflower\\_ti16, from random weights" in text  # not in a code span
    assert "250 photographs of 250 found were used" in text
    applied = page(replace(of_run, temperature=1.0), None, "mit", golden="flowers", divided=1.25)
    assert "a temperature of 1.2500 was fitted on 215 photographs of train and val" in applied
    older = replace(of_run, extras={})
    assert "was fitted on the validation split" in page(older, None, "mit", golden="flowers")
    assert "not applied" not in applied


def test_predict_calls_the_same_pictures_foreign_after_the_head_was_divided(pictures, tmp_path):
    rng = np.random.default_rng(0)
    train, held, new = (rng.normal(1, 1, (n, 16)).astype(np.float32) for n in (40, 30, 50))
    logits = [5 * rng.normal(0, 1, (n, 3)) for n in (30, 50)]
    known = doubt.fit_foreign(train, held, logits[0])
    source = tmp_path / "made" / "model"
    of_run, tables = card(temperature=1.7), known.tensors()
    product.save(network(), source, of_run, CONFIG, as_timm=False, tables=tables)
    first, second = tmp_path / "first", tmp_path / "second"
    for model, out in ((source, first), (first, second)):  # an export of an export, too
        export.export(model, out, Order("timm"), given(pictures))
        there = doubt.Foreign.from_tensors(product.load_tables(out))
        found = there.score(new, logits[1] / 1.7)
        np.testing.assert_allclose(found, known.score(new, logits[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("out", ["photos/new", "photos/deep/new", "photos/empty", "model/new"])
def test_nothing_is_exported_below_the_data_or_into_a_model(pictures, tmp_path, capsys, out):
    photos = tmp_path / "photos"
    (photos / "empty").mkdir(parents=True)
    run_folder = tmp_path / "run"
    model = make_product(run_folder / "model")
    spec = recipe.parse(
        f"mode: head\ndata: {{root: {json.dumps(str(photos))}}}", "r.yaml", tmp_path
    )
    io.write_text(run_folder / "recipe.resolved.yaml", recipe.dump(spec))
    target = model / "new" if out == "model/new" else tmp_path / out
    before = contents(tmp_path)
    refused(
        capsys, main, [run_folder, "-o", target, "--format", "timm", "--images", *pictures],
        code=2, id="cli.out_in_data", says=(str(target), "where vitft never writes"),
        fix="name a place elsewhere",
    )  # fmt: skip
    assert contents(tmp_path) == before


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
    seals._seal(out)
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
    for place in ("MODEL", "-o", "--uint8", "--variants", "--limit"):
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
    seals._seal(out)
    with pytest.raises(WeightsError, match=r"export.unreadable.*size \(1000000, 1000000\)"):
        selftest(out)
