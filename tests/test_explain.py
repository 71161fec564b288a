"""The door to what a model sees: places, manners, and every way it says no."""

import re
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import paint
from PIL import Image

from vitft import explain, figures, product
from vitft.errors import DataError, RecipeError
from vitft.explain import Looker, Overlays, main, seen
from vitft.images import DecodeSpec
from vitft.inputs import InputConfig, TransformSpec, pixels, plain
from vitft.raw import bad
from vitft.run import run

OPTIONS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CONFIG = InputConfig((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def network(name="vitflower_ti16", **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **options).eval()


def save(folder, name="vitflower_ti16", options=OPTIONS, size=32):
    """A product as a run leaves it, its weights drawn at random."""
    config = InputConfig((size, size), CONFIG.mean, CONFIG.std)
    card = product.Card(
        architecture=name,
        classes=("blue", "green", "red"),
        options=options,
        transform=asdict(plain(config)),
        decode=asdict(DecodeSpec()),
    )
    product.save(network(name, **options), folder, card, config, as_timm=False)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return str(save(tmp_path_factory.mktemp("explain") / "vit"))


@pytest.fixture
def photos(tmp_path):
    colours = ((200, 40, 40), (40, 200, 40))
    return [str(paint(tmp_path / f"{k}.jpg", c, seed=k)) for k, c in enumerate(colours)]


def looker():
    return Looker(network(**OPTIONS), plain(CONFIG), torch.device("cpu"))


# -- what the network sees ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (257, 256), (640, 101)])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize(("side", "share"), [((64, 64), 0.875), ((64, 64), 1.0), ((48, 96), 0.9)])
def test_the_part_that_is_seen_is_what_timms_transform_cuts_out(size, mode, side, share):
    width, height = size
    spec = TransformSpec("plain", side, CONFIG.mean, CONFIG.std, "bilinear", share, mode)
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    ruler = Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))
    cut = pixels(spec)(ruler).numpy().astype(float)  # [3, S, S]
    left, top, right, bottom = seen(size, spec)
    for values, low, high, length in (
        (cut[0], left, right, width),
        (cut[1].T, top, bottom, height),
    ):
        across = values.shape[1]
        wanted = (low + (np.arange(across) + 0.5) * (high - low) / across) / length * 255
        inside = (wanted > 8) & (wanted < 247)  # beyond lie padding and the filter's edge
        got = np.median(values, axis=0)
        if mode == "border":  # rows of padding at the other edges would hide the ruler
            got = values[values.shape[0] // 2]
        pixel = (high - low) / across / length * 255  # timm rounds to whole ones
        np.testing.assert_allclose(got[inside], wanted[inside], atol=pixel + 2)


def test_an_overlay_has_the_size_of_its_thumbnail():
    picture = Image.new("RGB", (300, 400), (10, 120, 30))
    assert looker().over(picture, 160).size == (120, 160)
    assert looker().over(picture.resize((30, 40)), 160).size == (30, 40)


# -- overlays of a page ---------------------------------------------------------------------------


def overlays(read=None, **options):
    def flat(row):
        return Image.new("RGB", (40, 40), (row, 99, 30))

    return Overlays(looker(), read or flat, range(3), side=40, **options)


def test_only_the_photographs_that_are_wanted_get_an_overlay_and_each_once():
    ask = overlays()
    assert [ask(row) is not None for row in (0, 7, 2, 2)] == [True, False, True, False]
    assert Image.open(BytesIO(overlays()(1)), formats=["JPEG"]).size == (40, 40)


def test_a_photograph_that_has_gone_has_none_and_the_next_one_has():
    def read(row):
        if row == 0:
            raise bad("data.empty", "a.jpg", "0 bytes", "copy it again")
        return Image.new("RGB", (40, 40))

    ask = overlays(read)
    assert ask(0) is None
    assert ask(1) is not None


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), RecipeError.of("a.b", "x", "y", "z"), MemoryError()]
)
def test_no_failure_reaches_the_run_and_it_is_said_once(caplog, error):
    calls = []

    def read(row):
        calls.append(row)
        raise error

    ask = overlays(read)
    with caplog.at_level("WARNING", "vitft"):
        assert [ask(row) for row in range(3)] == [None] * 3
    assert calls == [0]
    assert re.fullmatch(
        rf"no further maps of what counted in the report: {type(error).__name__}: .*",
        caplog.messages[0], re.DOTALL,
    )  # fmt: skip
    assert len(caplog.messages) == 1


def test_ctrl_c_is_no_such_failure():
    def read(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        overlays(read)(0)


def test_the_time_is_bounded(caplog, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(explain.time, "monotonic", lambda: now[0])
    ask = overlays(seconds=60)
    now[0] = 500.0  # the clock starts with the first overlay
    assert ask(0) is not None
    now[0] = 559.0
    assert ask(1) is not None
    now[0] = 561.0
    with caplog.at_level("WARNING", "vitft"):
        assert ask(2) is None
    assert caplog.messages == ["no further maps of what counted in the report: 60 s are over"]


# -- the door -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [[], ["--method", "rollout"], ["--method", "heads"], ["--class", "red"],
     ["--figure", "positions"], ["--figure", "filters"], ["--figure", "distance"]],
)  # fmt: skip
def test_every_picture_is_written_and_its_path_printed(vit, photos, tmp_path, capsys, options):
    out = tmp_path / "new" / "out.png"
    assert main([vit, *photos, "-o", str(out), *options]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400


def test_the_same_question_gives_the_same_bytes(vit, photos, tmp_path):
    outs = [tmp_path / "a.png", tmp_path / "b.png"]
    for out in outs:
        assert main([vit, *photos, "-o", str(out)]) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_positions_and_filters_need_no_photograph(vit, tmp_path):
    for kind in ("positions", "filters"):
        assert main([vit, "-o", str(tmp_path / f"{kind}.png"), "--figure", kind]) == 0


def test_a_convolutional_network_has_gradients_and_filters(tmp_path, photos):
    model = str(save(tmp_path / "cnn", "test_efficientnet", {}, 96))
    out = str(tmp_path / "out.png")
    assert main([model, *photos, "-o", out]) == 0
    assert main([model, "-o", out, "--figure", "filters"]) == 0
    with pytest.raises(RecipeError, match=r"explain.no_attention.*\nfix: use the gradient method"):
        main([model, *photos, "-o", out, "--method", "rollout"])
    with pytest.raises(RecipeError, match=r"explain.no_positions"):
        main([model, "-o", out, "--figure", "positions"])


def captions(monkeypatch):
    """What the sheet is asked to show."""
    shown = []
    draw = figures.sheet

    def keep(title, note, panels, *, across):
        shown.extend([title, note, *panels])
        return draw(title, note, panels, across=across)

    monkeypatch.setattr(figures, "sheet", keep)
    return shown


def test_a_panel_says_answer_class_and_file(vit, photos, tmp_path, monkeypatch):
    shown = captions(monkeypatch)
    main([vit, photos[0], "-o", str(tmp_path / "a.png"), "--method", "heads"])
    answer = re.fullmatch(r"(blue|green|red) \d\d\.\d%", shown[2].title)[1]
    assert len(shown[2].pictures) == 3
    assert shown[2].labels == ("", "head 1", "head 2")
    assert shown[2].note.endswith("/0.jpg")
    assert shown[1].endswith("vitflower_ti16 in " + "/".join(vit.split("/")[-2:]))
    for other in {"blue", "green", "red"} - {answer}:
        shown.clear()
        main([vit, photos[0], "-o", str(tmp_path / "a.png"), "--class", other])
        said = rf"for {other} \(\d\d\.\d%\); the answer is {answer} \d\d\.\d%"
        assert re.fullmatch(said, shown[2].title)


def test_a_photograph_that_cannot_be_read_is_said_and_the_others_drawn(
    vit, photos, tmp_path, monkeypatch, caplog
):
    shown = captions(monkeypatch)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"<html>not found</html>")
    with caplog.at_level("WARNING", "vitft"):
        assert main([vit, photos[0], str(broken), "-o", str(tmp_path / "a.png")]) == 3
    assert len(shown) == 3
    (told,) = [line for line in caplog.messages if "broken.jpg" in line]
    assert told.startswith(f"left out: {broken}: ")
    assert "fix" not in told
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("options", [[], ["--figure", "distance"]])
def test_when_none_can_be_read_nothing_is_written(vit, tmp_path, options):
    missing = [str(tmp_path / "x.jpg"), str(tmp_path / "y.jpg")]
    with pytest.raises(DataError, match=r"x\.jpg") as e:
        main([vit, *missing, "-o", str(tmp_path / "a.png"), *options])
    assert len(e.value.faults) == 2
    assert not (tmp_path / "a.png").exists()


def test_a_mistyped_photograph_is_told_what_lies_there(vit, photos, tmp_path):
    right = Path(photos[0])
    with pytest.raises(DataError) as e:
        main([vit, str(right.with_stem(right.stem + "0")), "-o", str(tmp_path / "a.png")])
    assert e.value.faults[0].fix == f"did you mean {right}?"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["a.jpg", "-o", "x.jpg"],
         r"explain.output\] -o: x.jpg does not end in .png\nfix: write -o x.png"),
        (["-o", "x.png"], r"explain.photographs\] IMAGE: a map needs photographs\nfix: name one"),
        (["-o", "x.png", "--figure", "distance"], r"distance needs photographs\nfix: name one"),
        (["a.jpg"] * 101 + ["-o", "x.png"], r"101 photographs > 100 in one picture\nfix: name"),
        (["-o", "x.png", "--figure", "filters", "--method", "heads"],
         r"explain.option\] --figure: --figure filters takes neither .*\nfix: leave them out"),
        (["a.jpg", "-o", "x.png", "--method", "rollout", "--class", "red"],
         r"explain.option\] --class: rollout is the same for every class\nfix: leave --class out"),
    ],
)  # fmt: skip
def test_a_command_line_that_cannot_be_is_refused_before_the_model_is_read(arguments, text):
    with pytest.raises(RecipeError, match=text):
        main(["no_such_model", *arguments])


def test_all_that_is_wrong_with_a_command_line_is_said_at_once():
    with pytest.raises(RecipeError) as e:
        main(["no_such_model", "-o", "x", "--method", "heads", "--class", "red"])
    assert [f.id for f in e.value.faults] == [
        "explain.output", "explain.photographs", "explain.option",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fix"),
    [("gren", "did you mean 'green'?"), ("oak", "the model knows blue, green, red")],
)
def test_a_class_that_the_model_does_not_have_is_refused(vit, photos, tmp_path, name, fix):
    text = rf"explain.class\] --class: the model has no class '{name}'\nfix: {re.escape(fix)}"
    with pytest.raises(RecipeError, match=text):
        main([vit, *photos, "-o", str(tmp_path / "a.png"), "--class", name])


# -- the report of a run --------------------------------------------------------------------------


def overlays_in(folder):
    return (folder / "report.html").read_text("utf-8").count('<img class="overlay"')


def test_a_runs_report_shows_what_counted_in_its_first_mistakes(tiny_recipe):
    result = run(tiny_recipe("head", "train.lr=1e-9", "report.gallery=2"))
    assert (1 - result.scores.accuracy) * result.scores.n >= 3
    assert overlays_in(result.folder) == 4  # two mistakes, each in the gallery and in its drawer


def test_a_run_ends_well_though_its_network_has_no_map(tiny_recipe, monkeypatch):
    def refuse(net, images, classes=None):
        raise RecipeError.of("explain.no_map", "net", "no map", "another model")

    monkeypatch.setattr(explain.maps, "gradient", refuse)
    result = run(tiny_recipe("head", "train.lr=1e-9"))
    assert overlays_in(result.folder) == 0
    assert "no further maps of what counted" in (result.folder / "log.txt").read_text("utf-8")
