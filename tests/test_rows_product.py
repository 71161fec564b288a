"""Rows C30 and P1 to P13 of the bad-input matrix: what leaves vitft, and how predict reads it."""

import csv
import io as streams
import json
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import paint
from rows import (
    COLOURS,
    CONFIG,
    PLAIN,
    card,
    contents,
    forged,
    interrupted,
    make_product,
    network,
    refused,
    untouched,
)
from safetensors.torch import load_file, save_file

from vitft import io, predict, product, run
from vitft.card import LIMIT, text_of
from vitft.errors import DataError, VitftError, WeightsError
from vitft.predict import Answer, Predictor, main, top
from vitft.vitflower import TWINS


@pytest.fixture
def made(tmp_path) -> Path:
    return make_product(tmp_path / "made" / "model")


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    for k, name in enumerate(COLOURS):
        paint(folder / f"{name}.jpg", tuple(200 * (i == k) for i in (2, 1, 0)), seed=k)
    return folder


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as text:
        return list(csv.DictReader(text))


# --- writing ---


def test_C30_shared_and_transposed_tensors_are_written_whole_under_each_name(tmp_path):
    net = network()
    net.norm.bias = net.blocks[0].norm1.bias  # tied
    net.head.weight.data = torch.randn(16, 3).t()  # not contiguous
    made = make_product(tmp_path / "model", net)
    stored = load_file(made / "model.safetensors")
    assert stored.keys() == net.state_dict().keys()
    assert all(torch.equal(stored[k], v) for k, v in net.state_dict().items())
    again, _ = product.load(made)
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(again(x), net(x), atol=1e-6, rtol=1e-6)


def test_P1_no_class_name_becomes_a_path(tiny_recipe, tmp_path, tiny_photos):
    names = ["../../x", "CON", "y" * 300, "/etc/passwd", "a\\..\\b", "=cmd()"]
    files = sorted(p.relative_to(tiny_photos) for p in tiny_photos.rglob("*.jpg"))
    table = tmp_path / "labels.csv"
    lines = [f"photos/{file},{names[i % len(names)]}" for i, file in enumerate(files)]
    table.write_text("path,label\n" + "\n".join(lines) + "\n")
    before = {p for p in tmp_path.rglob("*") if "vitft-cache" not in p.parts}
    with untouched(tiny_photos):
        result = run.run(tiny_recipe("probe", *PLAIN, "probe.strengths=[1]", f"data.root={table}"))
    new = {p for p in tmp_path.rglob("*") if "vitft-cache" not in p.parts} - before
    assert all(p.resolve().is_relative_to((tmp_path / "runs").resolve()) for p in new)
    assert not any(name[:50] in p.name for p in new for name in names if len(name) > 3)
    indices = json.loads((result.folder / "class_indices.json").read_text())
    assert sorted(indices.values()) == sorted(names)


def test_P2_a_product_carries_all_that_predicting_takes(tiny_recipe):
    folder = run.run(tiny_recipe("probe", *PLAIN, "probe.strengths=[1]")).folder
    found = product.read_card(folder / "model" / "model.safetensors")
    assert found.classes == COLOURS
    wanted = {"size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "kind"}
    assert wanted <= found.transform.keys()
    assert {"background", "bit_range", "icc", "frames", "max_pixels"} <= found.decode.keys()
    beside = json.loads((folder / "model" / "config.json").read_text())
    assert beside["label_names"] == list(COLOURS)
    assert beside["pretrained_cfg"]["input_size"] == [3, 32, 32]


def test_P2_weights_without_preprocessing_are_refused(tmp_path, pictures, capsys):
    file = tmp_path / "bare.safetensors"
    save_file(network().state_dict(), file)
    with untouched(pictures):
        refused(
            capsys,
            main,
            [file, pictures],
            code=4,
            id="ckpt.no_card",
            says=(str(file), "does not say classes and preprocessing (a Card of none)"),
            fix="written by vitft",
        )


@pytest.mark.parametrize("classes", [["a", "b"], ["a", "b", "c", "d"]])
def test_P3_a_class_list_of_another_length_than_the_head_is_refused(
    made, tmp_path, pictures, capsys, classes
):
    file = forged(made, tmp_path / "forged", lambda raw: raw.update(classes=classes))
    refused(
        capsys,
        main,
        [file, pictures],
        code=4,
        id="ckpt.shape",
        says=(str(file), f"head.weight is [3, 16], the model has [{len(classes)}, 16]"),
        fix="use the file that belongs to this model",
    )


def test_P4_classes_go_by_name_whatever_their_order_and_whatever_lies_beside(tmp_path, pictures):
    net, turned, order = network(), network(), [2, 0, 1]
    turned.head.weight.data = net.head.weight.data[order]
    turned.head.bias.data = net.head.bias.data[order]
    first = make_product(tmp_path / "one" / "model", net)
    names = tuple(COLOURS[i] for i in order)
    second = make_product(tmp_path / "two" / "model", turned, classes=names)
    (second.parent / "class_indices.json").write_text('{"0": "wrong", "1": "order", "2": "here"}')
    files = sorted(pictures.iterdir())
    for a, b in zip(Predictor(first, "cpu")(files), Predictor(second, "cpu")(files), strict=True):
        assert dict(zip(COLOURS, a.probabilities, strict=True)) == pytest.approx(
            dict(zip(names, b.probabilities, strict=True)), abs=1e-12
        )
        assert top(a, COLOURS, 1)[0][0] == top(b, names, 1)[0][0]


def test_P5_every_file_of_a_product_honours_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        made = make_product(tmp_path / "model")
    finally:
        os.umask(old)
    assert {oct(p.stat().st_mode & 0o777) for p in made.iterdir()} == {"0o644"}
    assert made.stat().st_mode & 0o777 == 0o755


def test_P6_a_product_replaces_the_former_one_only_after_it_has_answered_alike(made, monkeypatch):
    before = contents(made)
    real = io.write_tensors

    def wrong(path, tensors, metadata):
        changed = {k: v + 1e-3 if k == "head.bias" else v for k, v in tensors.items()}
        real(path, changed, metadata)

    monkeypatch.setattr(product.io, "write_tensors", wrong)
    with pytest.raises(VitftError, match=r"export.differs.*read back, head.bias is another tensor"):
        make_product(made, network())
    assert contents(made) == before
    monkeypatch.undo()
    other = network(act_layer="quick_gelu")  # which its Card does not say
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.mul_(10)  # out of the range where all of them are linear
    with pytest.raises(VitftError, match=r"export.differs.*its answer differs by \d\.\de"):
        make_product(made, other)
    assert contents(made) == before
    assert [p.name for p in made.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "architecture", ["vitflower_ti16", "vitflower_s14", "vitflower_b32", "vitflower_l32"]
)
def test_P6_a_product_for_plain_timm_answers_alike_too(tmp_path, architecture):
    options = {"img_size": 56, "embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 14}
    net = product.timm.create_model(architecture, num_classes=3, **options).eval()
    given = card(architecture=architecture, options={k: options[k] for k in options if k[0] != "i"})
    config = CONFIG.__class__((56, 56), (0.5,) * 3, (0.25,) * 3)
    product.save(net, tmp_path / "model", given, config, as_timm=True)
    again, found = product.load(tmp_path / "model")
    assert found.architecture == TWINS[architecture]
    plain = product.timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert type(plain).__module__ == "timm.models.vision_transformer"
    assert (plain.num_classes, plain.pretrained_cfg["input_size"]) == (3, (3, 56, 56))
    x = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        for filled in (again, plain):
            torch.testing.assert_close(filled(x), net(x), atol=1e-5, rtol=1e-5)


# --- predicting ---


def test_P7_every_file_gets_its_row_whatever_it_is(made, pictures, tmp_path, capsys):
    (pictures / "empty.jpg").write_bytes(b"")
    (pictures / "page.png").write_bytes(b"<html>gone</html>")
    half = (pictures / "red.jpg").read_bytes()
    (pictures / "half.jpg").write_bytes(half[: len(half) // 2])
    (pictures / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    out = tmp_path / "p.csv"
    with untouched(pictures):
        assert main([str(made), str(pictures), "--csv", str(out)]) == 3
    found = {Path(r["path"]).name: r for r in rows(out)}
    assert len(found) == 7
    ids = {name: r["error"].partition(":")[0] for name, r in found.items() if r["error"]}
    assert ids == {
        "empty.jpg": "data.empty",
        "page.png": "data.not_image",
        "half.jpg": "data.truncated",
        "link.jpg": "data.broken_link",
    }
    assert all(found[name]["prediction"] == "" for name in ids)
    assert "3 of 7 files answered, 4 unreadable" in capsys.readouterr().err


def test_P8_formulas_are_disarmed_on_request_and_terminals_get_escapes(
    tmp_path, pictures, capsys, monkeypatch
):
    made = make_product(tmp_path / "model", classes=("=1+1", "@x", "\x1b[31mred"))
    (pictures / "red.jpg").rename(pictures / "-2+3.jpg")
    (pictures / "blue.jpg").rename(pictures / "\x1b]0;title\x07.jpg")
    monkeypatch.chdir(pictures)
    files = sorted(p.name for p in pictures.iterdir())
    assert main([str(made), "--csv", str(tmp_path / "p.csv"), "--csv-safe", "--", *files]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "\\x1b[31mred" in out
    for row in rows(tmp_path / "p.csv"):
        assert row["path"][0] not in "=+-@\t\r"
        assert row["prediction"][0] not in "=+-@\t\r"
    assert main([str(made), "--csv", str(tmp_path / "q.csv"), "--", *files]) == 0
    assert {r["path"] for r in rows(tmp_path / "q.csv")} == set(files)


def strict(text: str) -> object:
    def no(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=no)


def test_P9_no_json_of_a_run_holds_nan(tiny_recipe, monkeypatch):
    score = run.evaluate.score

    def unlucky(*args):
        found = score(*args)
        return found.__class__(**(vars(found) | {"log_loss": float("nan"), "macro_f1": np.inf}))

    monkeypatch.setattr(run.evaluate, "score", unlucky)
    folder = run.run(tiny_recipe("probe", *PLAIN, "probe.strengths=[1]")).folder
    files = [*folder.rglob("*.json")]
    assert len(files) > 4
    for file in files:
        strict(file.read_text())
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        strict(line)
    assert strict((folder / "metrics.json").read_text())["test"]["log_loss"] is None
    found = product.read_card(folder / "model" / "model.safetensors")
    assert found.metrics["log_loss"] is None
    assert strict(text_of(card(temperature=None, metrics={"a": float("nan")})))


@pytest.mark.parametrize(
    ("given", "text", "fix"),
    [
        ("https://example.org/cat.jpg", "is an address, predict opens no network", "download it"),
        ("s3://bucket/cat.jpg", "is an address", "download it"),
        ("-", "standard input is not read", "write the picture to a file"),
    ],
)
def test_P10_addresses_and_standard_input_are_refused_in_words(
    made, capsys, monkeypatch, given, text, fix
):
    monkeypatch.setattr("sys.stdin", streams.StringIO("never read"))
    says = (given.split("/")[-1], text)
    refused(capsys, main, [made, given], code=3, id="data.not_a_file", says=says, fix=fix)


def test_P11_ties_go_to_the_first_class():
    answer = Answer(Path("x"), np.array([0.2, 0.4, 0.4]))
    assert top(answer, COLOURS, 3) == [("green", 0.4), ("red", 0.4), ("blue", 0.2)]
    many = [str(k) for k in range(1000)]
    ties = Answer(Path("x"), np.repeat([0.0005, 0.0015], 500))
    assert [name for name, _ in top(ties, many, 1000)] == [*many[500:], *many[:500]]


def deep(raw):
    return '{"a":' * 5000 + "1" + "}" * 5000


HOSTILE = {
    "no object": (lambda raw: "[1, 2]", "ckpt.card"),
    "no JSON": (lambda raw: "{'architecture': __import__('os')}", "ckpt.card"),
    "too deep": (deep, "ckpt.card"),
    "too long": (lambda raw: json.dumps(raw) + " " * LIMIT, "ckpt.no_card"),
    "a newer format": (lambda raw: raw.update(format=99), "ckpt.newer"),
    "classes as text": (lambda raw: raw.update(classes="abc"), "ckpt.card"),
    "classes of numbers": (lambda raw: raw.update(classes=[1, 2, 3]), "ckpt.card"),
    "classes twice": (lambda raw: raw.update(classes=["a", "a", "b"]), "ckpt.card"),
    "no classes": (lambda raw: raw.pop("classes"), "ckpt.card"),
    "an unknown model": (lambda raw: raw.update(architecture="os.system"), "ckpt.card"),
    "a model of the hub": (lambda raw: raw.update(architecture="hf-hub:a/b"), "ckpt.card"),
    "a file to open": (lambda raw: raw["options"].update(checkpoint_path="evil.pth"), "ckpt.card"),
    "a download": (lambda raw: raw["options"].update(pretrained=True), "ckpt.card"),
    "an address": (
        lambda raw: raw["options"].update(pretrained_cfg={"url": "http://x"}),
        "ckpt.card",
    ),
    "a nested option": (lambda raw: raw["options"].update(norm_layer={"a": 1}), "ckpt.card"),
    "an unknown option": (lambda raw: raw["options"].update(spin=1), "ckpt.card"),
    "10^9 wide": (lambda raw: raw["options"].update(embed_dim=10**9), "ckpt.card"),
    "60,000 wide": (lambda raw: raw["options"].update(embed_dim=60_000), "ckpt."),
    "60,000 deep": (lambda raw: raw["options"].update(depth=60_000), "ckpt.card"),
    "infinite": (lambda raw: raw["options"].update(qkv_bias=float("inf")), "ckpt.card"),
    "an input of 10^6 pixels": (lambda raw: raw["transform"].update(size=[10**6] * 2), "ckpt.card"),
    "an input of text": (lambda raw: raw["transform"].update(size=["a", "b"]), "ckpt.card"),
    "a deviation of 0": (lambda raw: raw["transform"].update(std=[0, 1, 1]), "ckpt.card"),
    "a mean of NaN": (lambda raw: raw["transform"].update(mean=[float("nan")] * 3), "ckpt.card"),
    "a random transform": (lambda raw: raw["transform"].update(kind="augmented"), "ckpt.card"),
    "an unknown filter": (lambda raw: raw["transform"].update(interpolation="x"), "ckpt.card"),
    "a background of text": (lambda raw: raw["decode"].update(background="white"), "ckpt.card"),
    "a range upside down": (lambda raw: raw["decode"].update(bit_range=[1, 0]), "ckpt.card"),
    "a temperature of 0": (lambda raw: raw.update(temperature=0.0), "ckpt.card"),
    "a temperature of text": (lambda raw: raw.update(temperature="hot"), "ckpt.card"),
    "a threshold of text": (
        lambda raw: raw.update(extras={"abstain": {"threshold": "low"}}),
        "ckpt.card",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_P12_a_strangers_card_is_checked_and_opens_builds_and_fetches_nothing(
    made, tmp_path, pictures, capsys, monkeypatch, name
):
    change, id = HOSTILE[name]
    file = forged(made, tmp_path / "forged", change)
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("opened a connection"))
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError) as caught:
        product.load(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base < 200_000  # kB
    fault = caught.value.faults[0]
    assert fault.id.startswith(id)
    assert fault.place == str(file)
    assert len(str(caught.value)) < 2000
    assert fault.fix


def test_P12_values_that_fit_are_taken_from_anyone(made, tmp_path):
    file = forged(made, tmp_path / "forged", lambda raw: raw.update(format=1, unknown="ignored"))
    assert product.load(file)[1].classes == COLOURS


def test_P12_tables_of_another_model_are_refused(made, pictures, capsys):
    (made / io.MANIFEST).unlink()
    save_file({"foreign.rows": torch.ones(4, 7)}, made / product.TABLES)
    refused(
        capsys,
        main,
        [made, pictures],
        code=4,
        id="ckpt.tables",
        says=(str(made), "tables.safetensors does not fit the model"),
        fix="copy the folder again",
    )


def test_P13_an_unfinished_run_says_how_far_it_came(tiny_recipe, pictures, monkeypatch, capsys):
    spec = tiny_recipe("full", *PLAIN, "train.checkpoint_minutes=0")
    folder = interrupted(monkeypatch, spec, after=8)
    err = refused(
        capsys,
        main,
        [folder, pictures],
        code=4,
        id="ckpt.unfinished",
        says=(str(folder), "unfinished run: step 7, 1 epochs done, best val accuracy"),
        fix=f"python -m vitft.run {folder / 'recipe.resolved.yaml'} --resume {folder}",
    )
    assert re.search(r"best val accuracy \d+\.\d %; no model yet", err)
    for path in (folder / "checkpoints").iterdir():
        io.remove(path)
    refused(
        capsys,
        main,
        [folder, pictures],
        code=4,
        id="ckpt.missing",
        says=("no model.safetensors here",),
        fix="name a run folder",
    )


def test_P13_data_errors_are_not_hidden_by_it(made, tmp_path):
    with pytest.raises(DataError, match="data.root_missing"):
        predict.list_files([tmp_path / "none.jpg"])
