"""Pages: hostile text stays text, markup is sound, nothing reaches for the network."""

import base64
import re
from io import BytesIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markup import Markup
from PIL import Image

from vitft.charts import Chart, Series
from vitft.pages import (
    TEMPLATES,
    Bullets,
    Code,
    Drawer,
    Facts,
    Figure,
    Gallery,
    Link,
    Matrix,
    Photo,
    Section,
    Share,
    Table,
    clean,
    number,
    percent,
    render,
)

HOSTILE = (
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked=1">',
    "' onclick='window.hacked=1",
    "</title></style></script></template><h1>mine",
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[31mred\x1b[0m",
    "photo\u202egnp.exe",
    "broken\udcff\ud800name",
    "line\nbreak\ttab\x00null",
    "long" * 75,
    "javascript:window.hacked=1",
    "ورد",
    "バラ",
)


def jpeg(colour=(200, 40, 40), side=24) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def everything(text: str) -> str:
    """A page that prints `text` in every place that takes text."""
    near = Photo(jpeg(), text, text)
    photo = Photo(
        jpeg(), text, text, ((text, 0.5), ("b", 0.25)), text, text, (text,), jpeg(), (near,)
    )
    line = Series(text, x=[1, 2], y=[0.1, 0.2], low=[0, 0.1], high=[0.2, 0.3])
    points = Series(text, x=[1], y=[0.1], low=[0], high=[0.2], style="points")
    chart = Chart(text, (line, points), x_label=text, y_label=text, caption=text, mark=(1, 0.1))
    bars = Chart(text, (Series(text, [1, 2]),), kind="bars", names=(text, "b"), caption=text)
    blocks = (
        text,
        Bullets((text, Link(text, "#cell-0-0"))),
        Facts(((text, text),)),
        Code(text),
        Table((text, "n", "share"), ((text, 1, Share(0.5, 0.25, 0.75)),), text, sortable=True),
        Figure((chart,)),
        bars,
        Gallery((photo,), 3, text),
        Matrix((text, "b"), ((1, 0), (0, 0)), frozenset({"0-0"})),
    )
    return render(
        text,
        [Section("one", text, text, blocks), Section("two", text, text, blocks, folded=False)],
        subtitle=text,
        warnings=(text,),
        drawers=[Drawer("cell-0-0", text, (photo,), 2, text)],
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_everywhere(text):
    plain, page = Markup(everything("plain")), Markup(everything(text))
    assert page.faults == []
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert [sorted(a) for _, a in page.tags] == [sorted(a) for _, a in plain.tags]
    seen = clean(text)
    assert sum(seen.split("\n")[0] in piece for piece in page.text) >= 20


@pytest.mark.parametrize("text", HOSTILE)
def test_a_page_holds_no_character_that_hides_or_reorders(text):
    page = everything(text)
    assert page.encode("utf-8")  # a lone surrogate could not
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page)


@settings(max_examples=20, deadline=None)
@given(st.text(st.characters(), min_size=1, max_size=20))
def test_any_text_leaves_the_markup_as_it_is(text):
    page = everything(text)
    page.encode("utf-8")
    assert Markup(page).faults == []


def test_clean_keeps_words_of_every_script_and_shows_the_rest():
    assert (
        clean("rose sauvage, バラ, گل\u200cسرخ 93\u00a0%")
        == "rose sauvage, バラ, گل\u200cسرخ 93\u00a0%"
    )
    assert clean("a\x1b[0m\u202eb\udcff\n") == r"a\x1b[0m\u202eb\udcff\n"


def test_a_page_reaches_for_nothing_outside_itself():
    html = everything("plain")
    addresses = Markup(html).addresses
    assert addresses
    assert all(a.startswith(("#", "data:image/")) for a in addresses)
    assert not re.search(r"url\(|@import|https?:", html)
    assert "default-src 'none'; img-src data:;" in html


def test_the_security_policy_names_the_script_by_its_hash():
    import hashlib

    html = everything("plain")
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.937, "93.7"),
        (1.0, "100.0"),
        (0.9999, "> 99.9"),
        (0.0, "0.0"),
        (1e-5, "< 0.1"),
        (0.0005, "0.1"),
        (0.9995, "> 99.9"),
    ],
)
def test_a_share_is_never_rounded_to_certainty(share, text):
    assert percent(share) == f"{text}\u00a0%"


def test_numbers_are_grouped_or_cut_to_four_digits():
    assert [number(v) for v in (1234567, 3.0, 0.123456, float("nan"))] == [
        "1,234,567",
        "3",
        "0.1235",
        "unknown",
    ]


def test_ids_that_repeat_are_refused():
    with pytest.raises(ValueError, match=r"share an id: \['one', 'one'\]"):
        render("t", [Section("one", "a"), Section("one", "b")])


def test_an_image_that_could_run_is_refused():
    photo = Photo(b"<svg xmlns='...' onload='alert(1)'>", "x")
    with pytest.raises(ValueError, match="must be JPEG or PNG, starts with b'<svg"):
        render("t", [Section("one", "a", blocks=(Gallery((photo,)),))])


def test_a_gallery_says_how_many_of_how_many():
    photos = (Photo(None, "a"), Photo(None, "b"))
    html = render("t", [Section("one", "a", blocks=(Gallery(photos, 1234),))])
    assert "Shown: 2 of 1,234." in html
    assert "Shown" not in render("t", [Section("one", "a", blocks=(Gallery(photos, 2),))])


def test_the_size_of_a_photo_counts_all_its_images():
    near = Photo(b"1" * 300, "n")
    assert Photo(b"1" * 3000, "a", overlay=b"1" * 600, near=(near, near)).size() == 5600


# -- contrast, from the style sheet's own colours: WCAG 2.2, 1.4.3 (text) and 1.4.11 (graphics) ----


def themes() -> dict[str, dict[str, str]]:
    css = (TEMPLATES / "style.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]  # the third is for paper

    def read(text: str) -> dict[str, str]:
        return dict(re.findall(r"--([\w-]+): (#\w{6})", text))

    return {"light": read(light), "dark": read(dark)}


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def mix(a: str, b: str, share: float) -> str:
    channels = [(int(a[i : i + 2], 16), int(b[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(share * x + (1 - share) * y):02x}" for x, y in channels)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_readable_on_every_ground(theme):
    c = themes()[theme]
    for ground in ("paper", "panel"):
        for ink in ("ink", "soft", "accent"):
            assert contrast(c[ink], c[ground]) >= 4.5, (ink, ground)
    assert contrast(c["ink"], c["warn-paper"]) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_numbers_in_the_matrix_are_readable_at_every_shade(theme):
    c = themes()[theme]
    for step in range(101):
        assert contrast(c["ink"], mix(c["deep"], c["panel"], step / 100)) >= 4.5, step


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_curves_stand_out_from_the_paper(theme):
    c = themes()[theme]
    assert all(contrast(c[f"s{k}"], c["paper"]) >= 3 for k in range(6))


def test_the_matrix_scale_has_one_hue_and_gets_steadily_stronger():
    for c in themes().values():
        shades = [luminance(mix(c["deep"], c["panel"], k / 10)) for k in range(11)]
        assert shades in (sorted(shades), sorted(shades, reverse=True))
