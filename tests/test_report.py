"""The report: its words, its numbers, its CSV files, and how it behaves in a real browser."""

import csv
from dataclasses import replace
from io import BytesIO
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
from browser import browser, dump
from markup import Markup
from PIL import Image
from test_pages import HOSTILE, jpeg

from vitft import report, sections, writeup
from vitft.charts import Chart, Series
from vitft.evaluate import Predictions, score
from vitft.gallery import Answers, Source
from vitft.learn import Learned
from vitft.ledger import Ledger, Refusal
from vitft.pages import Gallery, Link, Photo, Section, Share, Table, percent
from vitft.recipe import TrainSpec
from vitft.stats import Interval

FLOWERS = ("daisy", "rose", "tulip")
EPOCHS = [
    {"epoch": e, "train_loss": 1 / e, "val_loss": 1.1 / e, "val_accuracy": 1 - 0.5 / e}
    for e in (1, 2, 3)
]


def page(classes=FLOWERS, n=60, seed=0, wrong=0.2, **keys) -> report.Page:
    """A small report: `n` photographs in turn of each class, about `wrong` of them mistaken."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % len(classes)
    logits = rng.normal(0, 0.3, (n, len(classes))).astype(np.float32)
    said = np.where(rng.random(n) < wrong, rng.integers(0, len(classes), n), labels)
    logits[np.arange(n), said] += 3
    predictions = Predictions(logits, labels)
    paths = [f"{classes[k]}/{i}.jpg" for i, k in enumerate(labels)]
    answers = Answers(paths, labels, logits.argmax(1), predictions.probabilities())
    counts = {
        c: {"train": 10, "val": 2, "test": int((labels == k).sum())} for k, c in enumerate(classes)
    }
    used = sum(sum(c.values()) for c in counts.values())
    ledger = Ledger(used, used, (), {}, (), {}, counts, {"JPEG": used}, {})
    defaults = {"history": EPOCHS, "source": Source(lambda i: jpeg((i % 256, 90, 90)))}
    return report.Page(
        "flowers_head",
        tuple(classes),
        score(predictions, classes),
        answers,
        ledger=ledger,
        **(defaults | keys),
    )


def text(p: report.Page) -> str:
    """What a reader sees, in one line."""
    markup = Markup(report.html(p))
    assert markup.faults == []
    return " ".join(" ".join(markup.text).replace("\u00a0", " ").split())


# -- words ----------------------------------------------------------------------------------------


def test_the_headline_says_the_number_its_interval_and_what_guessing_scores():
    p = page(n=300)
    hits = int(np.trace(p.scores.confusion))
    low, high = p.scores.accuracy_interval.low, p.scores.accuracy_interval.high
    head = report.headline(p)
    assert head.figure == f"{hits / 3:.1f}\u00a0%"
    assert head.what == "of 300 test photographs named correctly"
    assert text(p).count(f"expect between {100 * low:.1f} % and {100 * high:.1f} % right") == 1
    assert "Always answering “daisy”, the commonest class, would score 33.3 %." in text(p)
    assert not any("told apart" in s for s in head.sentences)


def test_few_photographs_are_called_few():
    assert "Only 12 images: one image is 8.3 points; a first impression" in text(page(n=12))
    assert "60 images: one image is 1.7 points." in text(page(n=60))
    assert "one image is" not in text(page(n=300))


def test_a_model_that_is_no_better_than_guessing_is_told_so():
    assert "The model cannot yet be told apart from that." in text(page(n=30, wrong=1.0))


def test_one_photograph_is_enough_for_a_page():
    assert "of 1 test photograph named correctly" in text(page(classes=("a", "b"), n=1, wrong=0))


def test_warnings_come_before_everything_but_the_number():
    seen = text(page(warnings=("Stand-in weights were used.",)))
    assert seen.index("named correctly") < seen.index("Read this first")
    assert seen.index("Stand-in weights were used.") < seen.index("expect between")
    assert "Read this first" not in text(page())


def test_next_steps_lead_to_what_they_speak_of():
    p = page(steps=(Link("Check the 4 suspicious labels.", "#suspects"),))
    steps = report.steps(p)
    off = p.scores.confusion - np.diag(np.diag(p.scores.confusion))
    i, j = np.unravel_index(off.argmax(), off.shape)
    assert steps[0].text == "Check the 4 suspicious labels."
    assert steps[1].href == f"#cell-{i}-{j}"
    assert f"{off[i, j]} labelled {FLOWERS[i]} and called {FLOWERS[j]}" in steps[1].text
    weakest = min(p.scores.per_class, key=lambda c: c.recall_interval.high)
    assert f"Add photographs of {weakest.name}: only" in steps[2].text


def test_a_class_that_has_most_photographs_is_not_asked_for_more():
    p = page()
    weakest = min(p.scores.per_class, key=lambda c: c.recall_interval.high).name
    counts = p.ledger.counts | {weakest: p.ledger.counts[weakest] | {"train": 90}}
    steps = report.steps(replace(p, ledger=replace(p.ledger, counts=counts)))
    assert any(
        step.text.startswith(f"Look at the mistakes among {weakest}: only") for step in steps
    )
    assert not any("Add photographs" in step.text for step in steps)


def test_a_perfect_model_is_asked_for_a_larger_test_only():
    p = page(wrong=0.0)
    assert [s.text[:24] for s in report.steps(p)] == ["Test on more photographs"]
    assert "most confident mistakes" not in text(p)


def test_the_ledger_is_told_in_full():
    ledger = replace(
        page().ledger,
        found=100,
        refused=(Refusal("a/broken.jpg", "data.truncated", "stops early", "copy again"),),
        ignored={"hidden": 3},
        duplicates_across=(("a/1.jpg", "b/1.jpg"),),
        leaks=tuple((f"a/{i}.jpg", f"b/{i}.jpg") for i in range(150)),
        empty_classes=("thistle",),
        warnings=("class rose has 2 photographs",),
    )
    seen = text(replace(page(), ledger=ledger))
    assert "100 files found: 96 used, 1 refused, 3 ignored, 0 dropped." in seen
    assert "Refused: 1. a/broken.jpg: stops early" in seen
    assert "in two classes: 1. a/1.jpg = b/1.jpg" in seen
    assert "two sides of the split: 150. The first 100 are shown." in seen
    assert "a/99.jpg = b/99.jpg" in seen
    assert "a/100.jpg" not in seen
    assert "thistle" in seen
    assert "class rose has 2 photographs" in seen
    steps = [s.text for s in report.steps(replace(page(), ledger=ledger))]
    assert "Decide which label is right: 1 photograph stands in two classes at once." in steps
    assert "Replace or remove 1 file that could not be read." in steps


def test_numbers_of_the_page_are_those_of_the_scores():
    p = page(intervals={"macro_f1": Interval(0.7, 0.9), "log_loss": Interval(0.5, 0.75)})
    seen, s = text(p), p.scores
    assert f"Balanced accuracy {100 * s.balanced_accuracy:.1f} %" in seen
    assert f"Macro F1 {100 * s.macro_f1:.1f} % [70.0, 90.0]" in seen
    assert f"Log loss {s.log_loss:.3f} [0.500, 0.750]" in seen
    assert "knowing nothing gives 1.099" in seen
    for c in s.per_class:
        low, high = 100 * c.recall_interval.low, 100 * c.recall_interval.high
        assert f"{c.name} {100 * c.recall:.1f} % {low:.1f}–{high:.1f}" in seen


def test_how_to_reproduce_flattens_what_is_nested():
    seen = text(page(reproduce={"command": "a\nb", "seed": 3, "versions": {"torch": "2.15"}}))
    assert "How to reproduce this" in seen
    assert "seed 3 versions torch 2.15" in seen
    assert "How to reproduce this" not in text(page())


# -- charts of the report -------------------------------------------------------------------------


def test_epochs_give_loss_and_accuracy_curves():
    (figure,) = sections.training(
        [*EPOCHS, {"epoch": 4, "train_loss": nan, "val_loss": inf}]
    ).blocks
    loss, accuracy = figure.charts
    assert [s.name for s in loss.series] == ["training", "validation"]
    assert list(loss.series[0].x) == [1, 2, 3]  # epoch 4 has no finite number
    assert list(accuracy.series[0].y) == [0.5, 0.75, 1 - 0.5 / 3]


def test_the_epoch_that_is_the_model_is_marked_and_both_kinds_of_weights_are_drawn():
    best = {**EPOCHS[1], "chosen": True}
    section = sections.training([EPOCHS[0], best, EPOCHS[2]], "Epoch 2.")
    accuracy = section.blocks[0].charts[1]
    assert section.summary == "Epoch 2."
    assert accuracy.mark == (2, 0.75)
    assert accuracy.caption == "The circle is the model."
    both = [{**e, "val_accuracy_plain": 0.1, "val_accuracy_ema": 0.2} for e in EPOCHS]
    series = sections.training(both).blocks[0].charts[1].series
    assert [(s.name, s.y[0]) for s in series] == [("plain weights", 0.1), ("averaged weights", 0.2)]


def told(best, done=3, epochs=3, start=None, **keys):
    history = tuple({"epoch": e} for e in range(1, done + 1))
    spec = TrainSpec(epochs=epochs, patience=2 if done < epochs else None)
    return writeup.told(Learned(history, best, {}, None, probe_start=start, **keys), spec)


def test_the_training_part_says_what_was_trained_and_which_epoch_is_the_model():
    best = {"epoch": 2, "val_accuracy": 0.75, "weights": "plain"}
    said = "The model has the weights of epoch 2 of 3, the best on validation photographs."
    assert told(best) == said
    assert told(best, trained="head: 15 of 99") == f"head: 15 of 99. {said}"
    assert "has the averaged weights of epoch 2" in told({**best, "weights": "ema"})
    early = "was to last 9 epochs, and ended as none was better for 2 (train.patience)."
    assert told(best, epochs=9).endswith(early)
    began = f" It began from a linear probe, {percent(0.75)} on the same photographs"
    assert told(best, start=0.75).endswith(f"{began}.")
    assert told(best, start=0.7501).endswith(f"{began}, which no epoch came up to.")
    assert told({"strength": 1.0}, trained="head: 15 of 99") == "head: 15 of 99."


def test_strengths_give_one_curve_with_the_chosen_one_marked():
    tried = [{"strength": 10.0**k, "val_accuracy": 0.9 - abs(k) / 50} for k in range(-3, 4)]
    (chart,) = sections.training(tried).blocks
    assert chart.x_log
    assert chart.mark == (1.0, 0.9)
    tried[1]["chosen"] = True
    (chart,) = sections.training(tried).blocks
    assert chart.mark == (0.01, tried[1]["val_accuracy"])
    assert "7 strengths were tried" in chart.caption


def test_without_history_there_is_no_empty_section():
    assert 'id="training"' not in report.html(page(history=()))


# -- confusion ------------------------------------------------------------------------------------


def test_the_matrix_holds_every_count_and_opens_every_cell_that_has_photographs():
    p = page()
    html = report.html(p)
    for (i, j), n in np.ndenumerate(p.scores.confusion):
        drawer = f'data-drawer="cell-{i}-{j}"'
        assert (drawer in html) == (n > 0)
        if n:
            share = 100 * n / p.scores.confusion[i].sum()
            assert (
                f"{n} labelled {FLOWERS[i]}, called {FLOWERS[j]}, {share:.1f}\u00a0% of the row"
                in html
            )


def test_many_classes_give_a_list_of_confusions_and_bounded_tables():
    names = [f"class {k}" for k in range(400)]
    p = page(classes=names, n=800, source=Source(lambda i: None))
    seen, html = text(p), report.html(p)
    assert 'class="matrix' not in html
    assert "400 classes are too many for a matrix." in seen
    assert "Shown: the 300 lowest recalls of 400 classes." in seen
    assert "Shown: the 20 largest and the 20 smallest." in seen
    assert html.count('<template id="cell-') == 50
    assert len(html) < 1_000_000


def test_five_thousand_classes_stay_small(tmp_path):
    names = [f"class {k}" for k in range(5000)]
    p = page(classes=names, n=100, source=Source(lambda i: None), wrong=0.5)
    report.write(tmp_path, p)
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    with (tmp_path / "confusion_matrix.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["label", "prediction", "count"]
    assert sum(int(row[2]) for row in rows[1:]) == 100


# -- size -----------------------------------------------------------------------------------------


def test_five_hundred_test_images_stay_below_10_mb():
    """Noise is the worst that a JPEG of 160 pixels can hold; overlays and neighbours are on."""
    buffer = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", quality=80)
    image = buffer.getvalue()
    near = (Photo(image, "n", "n"),) * 3
    source = Source(lambda i: image, lambda i: image, lambda i: near)
    suspects = Gallery((Photo(image, "s"),) * 24)
    p = page(n=500, wrong=1.0, source=source, extras=(Section("s", "S", blocks=(suspects,)),))
    html = report.html(p)
    assert 6_000_000 < len(html) < 10_000_000
    assert "All are in predictions.csv." in html


# -- plug-ins -------------------------------------------------------------------------------------


def test_a_section_of_another_room_needs_no_change_here():
    band = Series("fit", x=[1, 2], y=[0.1, 0.2], low=[0, 0.1], high=[0.2, 0.3])
    blocks = (
        "In words.",
        Table(("a", "b"), (("x", Share(0.5, 0.4, 0.6)),)),
        Chart("Curve", (band,)),
        Gallery((Photo(jpeg(), "p", "looks like a rose"),)),
    )
    p = page(extras=(Section("suspects", "Labels that look wrong", "4 of 96.", blocks),))
    seen = text(p)
    assert seen.index("most confident mistakes Each") < seen.index(
        "Labels that look wrong 4 of 96."
    )
    assert "looks like a rose" in seen
    assert 'class="band s0"' in report.html(p)


# -- files ----------------------------------------------------------------------------------------


def read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def test_predictions_read_back_as_they_were(tmp_path):
    p = page()
    single = replace(
        p, answers=replace(p.answers, probabilities=p.answers.probabilities.astype("f4"))
    )
    for one in (p, single):
        report.write(tmp_path, one)
        header, *rows = read(tmp_path / "predictions.csv")
        assert header == [
            "path",
            "label",
            "prediction",
            "confidence",
            "p:daisy",
            "p:rose",
            "p:tulip",
        ]
        kind = one.answers.probabilities.dtype.type
        back = np.array([[kind(v) for v in row[4:]] for row in rows])
        assert np.array_equal(back, one.answers.probabilities)
        assert [row[0] for row in rows] == one.answers.paths
        assert [FLOWERS.index(row[1]) for row in rows] == one.answers.labels.tolist()
        assert [FLOWERS.index(row[2]) for row in rows] == one.answers.guesses.tolist()
        assert all(float(row[3]) == max(map(float, row[4:])) for row in rows)


def test_the_confusion_matrix_reads_back_as_it_was(tmp_path):
    p = page()
    report.write(tmp_path, p)
    header, *rows = read(tmp_path / "confusion_matrix.csv")
    assert header[1:] == [row[0] for row in rows] == list(FLOWERS)
    assert [[int(v) for v in row[1:]] for row in rows] == p.scores.confusion.tolist()


def test_P8_hostile_names_survive_the_csv_files(tmp_path):
    names = tuple(h for h in HOSTILE if "\ud800" not in h and "\x00" not in h)
    p = page(classes=names, n=3 * len(names))
    report.write(tmp_path, p)
    _, *rows = read(tmp_path / "predictions.csv")
    assert [row[0] for row in rows] == p.answers.paths
    assert {row[1] for row in rows} == set(names)


def test_P8_formulas_are_disarmed_only_when_asked(tmp_path):
    names = ("=cmd()", "+1", "-1", "@x", "\ttab", "plain")
    p = page(classes=names, n=12)
    p = replace(p, answers=replace(p.answers, paths=["=HYPERLINK(1)", *p.answers.paths[1:]]))
    report.write(tmp_path, p)
    assert read(tmp_path / "predictions.csv")[1][0] == "=HYPERLINK(1)"
    report.write(tmp_path, p, csv_safe=True)
    cells = [
        cell
        for name in ("predictions.csv", "confusion_matrix.csv")
        for row in read(tmp_path / name)
        for cell in row
    ]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t")) for cell in cells)
    assert {"'=HYPERLINK(1)", "'@x", "plain"} <= set(cells)


def test_scores_of_other_photographs_are_refused():
    with pytest.raises(ValueError, match="not of the same photographs"):
        report.html(replace(page(), scores=page(seed=1).scores))


def test_equal_input_gives_equal_bytes(tmp_path):
    first = report.write(tmp_path, page()).read_bytes()
    assert report.write(tmp_path, page()).read_bytes() == first


# -- in chromium ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def window():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    """A report with overlays, and an extra section."""
    table = Table(("name", "n"), (("b", 2), ("a", 10), ("c", 1)), sortable=True)
    source = Source(lambda i: jpeg(), lambda i: jpeg((0, 0, 0)))
    p = page(source=source, extras=(Section("extra", "Extra", "Folded.", (table,)),))
    return report.write(tmp_path_factory.mktemp("shown"), p)


def alone(folder: Path, names: tuple[str, ...]) -> Path:
    """A report without its CSV files, which cannot hold every lone surrogate."""
    path = folder / "report.html"
    path.write_text(report.html(page(classes=names, n=4 * len(names))), encoding="utf-8")
    return path


OPEN = "return document.getElementById('drawer').open"
TITLE = "return document.getElementById('drawer-title').textContent"


@pytest.mark.browser
def test_a_click_on_a_cell_opens_its_photographs_and_escape_closes(window, shown):
    p = page()
    window.look()
    window.open(shown)
    assert window.becomes(OPEN, False)
    window.click("[data-drawer='cell-0-0']")
    assert window.becomes(OPEN, True)
    assert window.js(TITLE) == "Labelled daisy, called daisy"
    count = window.js("return document.querySelectorAll('#drawer img.plain').length")
    assert count == min(12, p.scores.confusion[0, 0])
    assert window.js("return [...document.querySelectorAll('#drawer img')].every(i => i.complete)")
    assert window.js("return document.activeElement.id") == "drawer-close"
    window.press("Escape")
    assert window.becomes(OPEN, False)
    assert window.becomes("return document.activeElement.dataset.drawer", "cell-0-0")
    assert window.becomes("return location.hash", "")
    assert window.complaints() == []


@pytest.mark.browser
def test_the_close_button_and_the_back_button_close_too(window, shown):
    window.open(shown)
    window.click("[data-drawer='cell-1-1']")
    window.click("#drawer-close")
    assert window.becomes(OPEN, False)
    window.click("[data-drawer='cell-1-1']")
    assert window.becomes(OPEN, True)
    window("POST", "/back", {})
    assert window.becomes(OPEN, False)


@pytest.mark.browser
def test_a_next_step_opens_the_confusion_it_speaks_of(window, shown):
    window.open(shown)
    window.click(".next a")
    assert window.becomes(OPEN, True)
    assert window.js("return document.querySelectorAll('#drawer .photo').length") > 0


@pytest.mark.browser
def test_an_address_opens_a_cell_without_a_click(shown, tmp_path):
    dom = dump(shown, "#cell-0-0", tmp_path)
    assert '<h2 id="drawer-title" dir="auto">Labelled daisy, called daisy</h2>' in dom
    assert '<dialog id="drawer" aria-labelledby="drawer-title" open' in dom


@pytest.mark.browser
def test_arrow_keys_move_between_cells_and_tab_stops_once(window, shown):
    window.open(shown)
    buttons = "[...document.querySelectorAll('.matrix button')]"
    assert window.js(f"return {buttons}.filter(b => b.tabIndex === 0).length") == 1
    window.js(f"{buttons}[0].focus()")
    window.press("Down")
    reached = window.js("return document.activeElement.dataset.drawer")
    assert reached.endswith("-0")
    assert reached != "cell-0-0"
    window.press("Enter")
    assert window.becomes(OPEN, True)


@pytest.mark.browser
def test_the_matrix_shows_counts_or_shares(window, shown):
    p = page()
    window.open(shown)
    cell = "document.querySelector('[data-drawer=\"cell-0-0\"]').innerText.trim()"
    assert window.js(f"return {cell}") == str(p.scores.confusion[0, 0])
    window.click("input[value=share]")
    share = 100 * p.scores.confusion[0, 0] / p.scores.confusion[0].sum()
    assert window.js(f"return {cell}") == f"{share:.1f}"


@pytest.mark.browser
def test_a_header_sorts_numbers_as_numbers_and_turns_round(window, shown):
    window.open(shown)
    window.js("document.getElementById('extra').open = true")
    names = "return [...document.querySelectorAll('#extra tbody th')].map(t => t.textContent)"
    number, name = "#extra thead th:nth-child(2)", "#extra thead th:first-child"
    window.click(f"{number} button")
    assert window.js(names) == ["a", "b", "c"]
    order = f"return document.querySelector('{number}').getAttribute('aria-sort')"
    assert window.js(order) == "descending"
    window.click(f"{number} button")
    assert window.js(names) == ["c", "b", "a"]
    window.click(f"{name} button")
    assert window.js(names) == ["a", "b", "c"]
    assert window.js(order) is None


@pytest.mark.browser
def test_one_switch_shows_the_maps_everywhere(window, shown):
    visible = "return getComputedStyle(document.querySelector('#mistakes .overlay')).display"
    window.open(shown)
    assert window.js(visible) == "none"
    window.click("#mistakes .overlay-switch input")
    assert window.js(visible) == "block"
    window.click("[data-drawer='cell-0-0']")
    assert window.js("return document.querySelector('#drawer .overlay-switch input').checked")
    window.click("#drawer .overlay-switch input")
    assert window.js(visible) == "none"


@pytest.mark.browser
def test_a_link_unfolds_the_part_it_leads_to(window, shown):
    window.open(shown)
    assert window.js("return document.getElementById('extra').open") is False
    window.click("nav a[href='#extra']")
    assert window.becomes("return document.getElementById('extra').open", True)


@pytest.mark.browser
def test_everything_is_open_on_paper(window, shown):
    window.open(shown)
    window.js("dispatchEvent(new Event('beforeprint'))")
    assert window.js("return document.querySelectorAll('details.part:not([open])').length") == 0
    window.js("dispatchEvent(new Event('afterprint'))")
    assert window.js("return document.querySelectorAll('details.part[open]').length") == 0


@pytest.mark.browser
@pytest.mark.parametrize("names", [FLOWERS, HOSTILE, tuple(f"kind {k}" for k in range(30))])
def test_a_phone_never_scrolls_sideways(window, tmp_path, names):
    window.look(width=390, height=844)
    window.open(alone(tmp_path, names))
    window.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert window.js("return document.documentElement.scrollWidth") <= 390
    window.js("location.hash = 'cell-0-0'")
    wide = "const d = document.getElementById('drawer'); return d.scrollWidth - d.clientWidth"
    assert window.js(wide) <= 0


@pytest.mark.browser
def test_hostile_names_do_nothing_in_a_browser(window, tmp_path):
    window.look()
    window.open(alone(tmp_path, HOSTILE), "#cell-0-0")
    assert window.becomes(OPEN, True)
    assert window.js(TITLE).startswith("Labelled <script>window.hacked = 1</script>, called")
    assert window.js("return window.hacked === undefined")
    assert window.js("return document.scripts.length") == 1
    assert window.complaints() == []


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_follows_the_readers_colour_scheme(window, shown, dark):
    window.look(dark=dark)
    window.open(shown)
    ground = window.js("return getComputedStyle(document.body).backgroundColor")
    light = sum(int(v) for v in ground.removeprefix("rgb(").removesuffix(")").split(","))
    assert (light < 150) == dark
    assert (
        window.js("return getComputedStyle(document.documentElement).colorScheme") == "light dark"
    )
