"""Findings -> parts of the report page, in plain words, with the evidence folded below.

One function per part; each returns a `Section` that stands by its summary alone. Photographs come
through a function that gives a thumbnail for a row of the index.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from vitft import trust
from vitft.charts import Chart, Series
from vitft.curve import TRIED, Curve
from vitft.doubt import Abstain, Accepted
from vitft.findings import UNSURE, Findings
from vitft.pages import (
    Block,
    Bullets,
    Figure,
    Gallery,
    Link,
    Photo,
    Section,
    Share,
    Table,
    percent,
)
from vitft.prepare import Prepared

SHOWN = 24  # photographs of suspects, pairs of copies

Thumbnail = Callable[[int], bytes | None]


def chapters(
    p: Prepared, rungs: Sequence[dict[str, Any]], found: Findings, thumbnail: Thumbnail
) -> tuple[Section, ...]:
    """Every part that there is something to say in."""
    ladder = (_ladder(rungs),) if rungs else ()
    return (*ladder, *_chapters(p, found, thumbnail))


def steps(found: Findings) -> tuple[Link, ...]:
    """What to do next, as far as these findings tell."""
    out = []
    if found.doubted is not None and len(found.doubted.rows):
        n = len(found.doubted.rows)
        out.append(
            Link(f"Look at {n:,} labels that may be wrong; fixes.csv lists them.", "#labels")
        )
    if found.honest is not None and found.honest.linked.n:
        n = found.honest.linked.n
        out.append(Link(f"{n:,} scored photographs have a copy in train or val.", "#copies"))
    best = found.gains[0] if found.gains else None
    if best is not None and best.interval.low > 0:
        out.append(
            Link(
                f"Photograph {best.name} first: half of its photographs are worth "
                f"{100 * best.loss:.1f} points {best.interval.percent()} of balanced accuracy.",
                "#growth",
            )
        )
    return tuple(out)


def figures(found: Findings) -> tuple[tuple[str, str, str], ...]:
    """(name, value, meaning) that stand beside the accuracy."""
    shown = found.after or found.before
    value = f"{100 * shown.ece:.1f} points {shown.ece_interval.percent()}"
    meaning = "said probability against share right; perfect ones would show "
    meaning += f"{100 * shown.ece_floor:.1f} on as many photographs"
    return (("Calibration error", value, meaning),)


def notes(found: Findings) -> tuple[str, ...]:
    """Sentences below the headline."""
    out = []
    if found.band is not None:
        out.append(f"The spread from chance in training: {found.band.sentence()}.")
    if found.clean is not None and found.doubted is not None and len(found.doubted.rows):
        out.append(
            "Without the photographs whose label looks wrong, "
            f"{percent(found.clean.value)} {found.clean.interval.percent()}; that flatters, since "
            "heads of the same kind raised the doubt."
        )
    return tuple(out)


def _chapters(p: Prepared, found: Findings, thumbnail: Thumbnail) -> Iterator[Section]:
    yield _calibration(found)
    yield _doubt(p, found)
    if found.doubted is not None:
        yield _labels(p, found, thumbnail)
    if found.links is not None:
        yield _copies(p, found, thumbnail)
    if found.growth is not None:
        yield _growth(p, found, found.growth)
    if found.left_out:
        yield Section("left-out", "What was not looked at", "", (Bullets(tuple(found.left_out)),))


def _ladder(rungs: Sequence[dict[str, Any]]) -> Section:
    """The steps of mode ladder, as they were tried."""
    rows = []
    for r in rungs:
        share = Share(r["accuracy"], r["interval"]["low"], r["interval"]["high"])
        rows.append((r["step"], share, _gain(r["gain"]), f"{r['seconds']:.1f} s", _mark(r)))
    header = ("step", "right on val", "gain over the step kept before", "cost", "")
    last = rungs[-1]
    kept = next((r["step"] for r in rungs if r["kept"]), last["step"])
    summary = f"Each step against the cheaper one, on the same val photographs; {kept} is kept."
    return Section("ladder", "The ladder", summary, (Table(header, tuple(rows)),), folded=False)


def _gain(gain: dict[str, Any] | None) -> str:
    if gain is None:
        return "the first step"
    low, high = gain["interval"]["low"], gain["interval"]["high"]
    told = "distinguishable" if gain["p"] < 1 - gain["level"] else "not distinguishable"
    return f"{100 * gain['estimate']:+.1f} points [{100 * low:.1f}, {100 * high:.1f}], {told}"


def _mark(rung: dict[str, Any]) -> str:
    return "kept" if rung["kept"] else ""


def _calibration(found: Findings) -> Section:
    shown = found.after or found.before
    error = f"{100 * shown.ece:.1f} points {shown.ece_interval.percent()}"
    summary = f"On average a probability is off by {error}"
    summary += f"; perfect ones would show {100 * shown.ece_floor:.1f} on as many photographs."
    charts = [_reliability("As trained" if found.after else "Probabilities", found.before)]
    if found.after is not None and found.temperature is not None:
        charts.append(_reliability(f"At temperature {found.temperature.value:.2f}", found.after))
    rows = [("as trained", *_figures(found.before))]
    if found.after is not None:
        rows.append(("with the temperature", *_figures(found.after)))
    header = ("probabilities", "calibration error", "Brier score", "log loss")
    blocks: list[Block] = [Figure(tuple(charts)), Table(header, tuple(rows))]
    if found.temperature is not None:
        t = found.temperature
        blocks.append(
            f"{t.sentence().replace('t', 'T', 1)}. It travels in the model file and predict "
            "applies it. It changes no answer, only how sure it sounds. Loaded through plain timm "
            "the model gives logits without it."
        )
    return Section("calibration", "Can the probabilities be believed?", summary, tuple(blocks))


def _figures(c: trust.Calibration) -> tuple[str, str, str]:
    return (
        f"{100 * c.ece:.1f} {c.ece_interval.percent()}",
        f"{c.brier:.3f} [{c.brier_interval.low:.3f}, {c.brier_interval.high:.3f}]",
        f"{c.log_loss:.3f} [{c.log_loss_interval.low:.3f}, {c.log_loss_interval.high:.3f}]",
    )


def _reliability(title: str, c: trust.Calibration) -> Chart:
    points = Series(
        "photographs",
        [b.accuracy for b in c.bins],
        x=[b.confidence for b in c.bins],
        low=[b.interval.low for b in c.bins],
        high=[b.interval.high for b in c.bins],
        style="points",
    )
    return Chart(
        title,
        (points,),
        kind="reliability",
        x_label="said probability",
        y_label="share right",
        percent=True,
        caption="On the diagonal, 80 % means right in 80 of 100.",
    )


def _doubt(p: Prepared, found: Findings) -> Section:
    offers = dict(found.offers)
    if found.abstain is not None and found.accepted is not None:
        offers[found.abstain.max_error] = (found.abstain, found.accepted)
    why_not = "not with probe.refit" if UNSURE in found.left_out else "too few val photographs"
    rows = tuple(_offer(e, *offers[e], why_not) for e in sorted(offers))
    header = ("errors allowed", "answers above", "answered", "wrong among them", "promised")
    table = Table(header, rows, caption="Thresholds chosen on val, measured on the scored split.")
    if found.abstain is not None:
        summary = found.abstain.words
    else:
        summary = "If unsure answers are left to a person, the rest are right more often."
    blocks: list[Block] = [table]
    if found.abstain is None:
        blocks.append(
            "None of these is in the model: predict leaves it open whether an answer is sure. With "
            "trust.max_error=0.05 the run keeps that threshold, and predict says which are not."
        )
    if found.alarms is not None:
        a = found.alarms
        blocks.append(
            "Predict also says when a picture is unlike everything it was trained on. The limit "
            f"allows {percent(p.recipe.trust.foreign_alarms, 0)} of ordinary photographs to be "
            f"called so by mistake; of the scored ones {a.right:,} of {a.n:,} were, "
            f"{percent(a.value)} {a.interval.percent()}."
            + " The same photographs set the limit, so this says little."
            * (p.test_split == "val")
        )
    return Section("doubt", "When it should say “I don't know”", summary, tuple(blocks))


def _offer(target: float, chosen: Abstain, got: Accepted, why_not: str) -> tuple[str | Share, ...]:
    error = Share(got.error, got.error_interval.low, got.error_interval.high)
    return (
        f"{100 * target:g} %",
        percent(chosen.threshold) if chosen.threshold <= 1 else "never",
        Share(got.coverage, got.coverage_interval.low, got.coverage_interval.high),
        error if got.accepted else "none answered",
        "yes" if chosen.promised else why_not,
    )


def _labels(p: Prepared, found: Findings, thumbnail: Thumbnail) -> Section:
    doubted = found.doubted
    if doubted is None or not len(doubted.rows):
        return Section("labels", "Labels that look wrong", "None was found.")
    classes, index = p.index.classes, p.index
    photos = []
    for i in doubted.rows[:SHOWN].tolist():
        label, other = classes[index.labels[i]], classes[doubted.suggested[i]]
        photos.append(
            Photo(
                thumbnail(i),
                alt=f"filed as {label}, looks like {other}",
                title=f"filed as {label}, looks like {other}",
                top=tuple(_top(doubted.probs[i], classes)),
                label=label,
                path=index.paths[i],
                tags=(index.split[i],),
            )
        )
    n, total = len(doubted.rows), len(index.paths)
    summary = (
        f"{n:,} of {total:,} photographs look wrongly labelled; these heads put the share of wrong "
        f"labels at about {percent(doubted.share)}."
    )
    text = (
        "Judged by heads that did not see the photograph or its copies. The file fixes.csv in the "
        "run folder proposes what to do; edit it, then give it back with data.fixes=fixes.csv. The "
        "photographs themselves are never touched."
    )
    unknown = _unknown_classes(classes, index.labels.tolist(), doubted.rows.tolist())
    blocks: list[Block] = [text, *([Bullets(unknown)] if unknown else [])]
    blocks.append(Gallery(tuple(photos), n))
    return Section("labels", "Labels that look wrong", summary, tuple(blocks))


def _unknown_classes(
    classes: Sequence[str], labels: Sequence[int], rows: Iterable[int]
) -> tuple[str, ...]:
    """Says of which classes a third or more is doubted, which may be the heads' fault."""
    held, listed = Counter(labels), Counter(labels[i] for i in rows)
    return tuple(
        f"{n:,} of {held[k]:,} photographs of {classes[k]} are listed: either its labels are mixed "
        "up, or the heads do not know this class yet. Look before you drop any."
        for k, n in sorted(listed.items())
        if 3 * n >= held[k]
    )


def _top(probabilities: object, classes: tuple[str, ...]) -> list[tuple[str, float]]:
    import numpy as np

    p = np.asarray(probabilities)
    return [(classes[k], float(p[k])) for k in np.argsort(-p, kind="stable")[:3]]


def _growth(p: Prepared, found: Findings, growth: Curve) -> Section:
    points = growth.points
    sizes = [float(q.n) for q in points]
    measured = Series("measured", [q.accuracy for q in points], x=sizes, style="points")
    law = Series(
        "law and its band",
        [q.fitted for q in points],
        x=sizes,
        low=[q.band.low for q in points],
        high=[q.band.high for q in points],
    )
    chart = Chart(
        "Accuracy on val against training photographs",
        (measured, law),
        x_label="training photographs",
        y_label="accuracy",
        x_log=True,
        percent=True,
        caption="Each point is the mean of several draws; the band is for planning, not a promise.",
    )
    rows = [
        (g.name, g.n, f"{100 * g.loss:+.1f} points {g.interval.percent()}") for g in found.gains
    ]
    header = ("class", "train photographs", "balanced accuracy lost without half of them")
    caption = "The class that costs most is worth most."
    if len(p.index.classes) > TRIED:
        caption += f" Tried: the {TRIED} classes with the most mistakes on val."
    table = Table(header, tuple(rows), caption=caption)
    return Section("growth", "How many more photographs?", growth.more.sentence(), (chart, table))


def _copies(p: Prepared, found: Findings, thumbnail: Thumbnail) -> Section:
    links, honest = found.links, found.honest
    if links is None or honest is None or not links.found:
        return Section("copies", "Copies and near-copies", "None was found in or across splits.")
    index = p.index
    across = [q for q in links.pairs if index.split[q.a] != index.split[q.b]]
    classes = [q for q in links.pairs if index.labels[q.a] != index.labels[q.b]]
    first = {id(q): q for q in (*classes, *across, *links.pairs)}
    photos = []
    for pair in list(first.values())[: SHOWN // 2]:
        kind = "same bytes" if pair.identical else "nearly the same"
        for i in (pair.a, pair.b):
            photos.append(
                Photo(
                    thumbnail(i),
                    alt=f"{kind}, filed as {index.classes[index.labels[i]]}",
                    title=f"{index.classes[index.labels[i]]} · {index.split[i]}",
                    path=index.paths[i],
                    tags=(kind,),
                )
            )
    summary = f"{links.found:,} pairs; {len(across):,} across splits, "
    summary += f"{len(classes):,} with two labels. {_sentence(honest.sentence())}"
    caption = "Pairs side by side: first those with two labels, then those across splits."
    gallery = Gallery(tuple(photos), 2 * links.found, caption, paired=True)
    return Section("copies", "Copies and near-copies", summary, (gallery,))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
