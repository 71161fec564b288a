"""A finished run -> the page that tells it: what was measured, on what, and how to do it again."""

import shlex
from pathlib import Path

import numpy as np
from PIL import Image

from vitft import images
from vitft.chapters import chapters, figures, notes, steps
from vitft.errors import VitftError
from vitft.evaluate import Predictions, Scores
from vitft.explain import Looker, Overlays
from vitft.findings import Findings, cost
from vitft.gallery import Answers, Source, shrink, worst
from vitft.learn import Learned
from vitft.pages import Photo, percent
from vitft.prepare import Prepared, environment
from vitft.recipe import ModelSpec, TrainSpec
from vitft.report import Page

SMALL = 64  # pixels of a neighbour
IN_WORDS = {"test": "test", "val": "validation"}
NO_TEST = (
    "There is no test split: these photographs also chose the model, so the number flatters it."
)


def page(
    p: Prepared,
    learned: Learned,
    predictions: Predictions,
    scores: Scores,
    found: Findings,
    folder: Path,
    seconds: float,
) -> Page:
    """Gathers what the report shows.

    Args:
        p: The run's data and model.
        learned: How the model came to be.
        predictions: Of the split that is scored.
        scores: Of these predictions.
        found: What there is to say about these numbers.
        folder: The run's.
        seconds: The whole run took.
    """
    spec = p.recipe
    answers = _answers(p, predictions, found)
    return Page(
        title=spec.name,
        subtitle=f"{_network(spec.model)} · mode {spec.mode}",
        classes=p.index.classes,
        scores=scores,
        answers=answers,
        source=_source(p, found, answers),
        ledger=p.index.ledger,
        history=tuple({"chosen": r == learned.best, **r} for r in learned.history),
        told=told(learned, spec.train),
        reproduce=_reproduce(p, learned, found, folder, seconds),
        split=IN_WORDS[p.test_split],
        notes=notes(found),
        intervals=found.intervals,
        figures=figures(found),
        steps=steps(found),
        extras=chapters(p, learned.rungs, found, lambda row: _thumbnail(p, row)),
        warnings=p.warnings if p.test_split == "test" else (*p.warnings, NO_TEST),
        mistakes=spec.report.gallery,
        max_images=spec.report.max_images,
    )


def told(learned: Learned, spec: TrainSpec) -> str:
    """What was trained, which epoch is the model, and what it began from, in sentences."""
    said = [f"{learned.trained}."] if learned.trained else []
    if "epoch" not in learned.best:
        return " ".join(said)
    done, average = len(learned.history), learned.best["weights"] == "ema"
    weights = "the averaged weights" if average else "the weights"
    chosen = f"The model has {weights} of epoch {learned.best['epoch']} of {done}"
    said.append(f"{chosen}, the best on validation photographs.")
    if done < spec.epochs:
        text = f"Training was to last {spec.epochs} epochs, and ended as none was better for "
        said.append(f"{text}{spec.patience} (train.patience).")
    if (start := learned.probe_start) is not None:
        text = f"It began from a linear probe, {percent(start)} on the same photographs"
        short = learned.best["val_accuracy"] < start
        said.append(text + (", which no epoch came up to." if short else "."))
    return " ".join(said)


def _answers(p: Prepared, predictions: Predictions, found: Findings) -> Answers:
    """What was said of every scored photograph."""
    return Answers(
        paths=[p.index.paths[i] for i in p.index.rows(p.test_split)],
        labels=predictions.labels,
        guesses=predictions.logits.argmax(axis=1).astype(np.int64),
        probabilities=predictions.probabilities(found.applied),
    )


def _source(p: Prepared, found: Findings, answers: Answers) -> Source:
    """What stands beside an answer: the photograph, where the model looked, what is near it."""
    rows, spec = p.index.rows(p.test_split), p.recipe.report
    return Source(
        thumbnail=lambda row: _thumbnail(p, int(rows[row])),
        overlay=Overlays(
            Looker(p.net, p.plain_transform, p.device),
            lambda row: _photograph(p, int(rows[row])),
            worst(answers)[: spec.gallery],
            side=spec.thumbnail,
        ),
        near=lambda row: _nearest(p, found, row, answers),
    )


def _network(spec: ModelSpec) -> str:
    """The model and its weights; of a hybrid the CNN's, too."""
    said = f"{spec.name} · weights {_weights(spec.weights)}"
    if spec.embed is None:
        return said
    held = f" with weights {_weights(spec.embed.weights)}" * (spec.embed.weights != "none")
    return f"{said} · on {spec.embed.backbone}{held}"


def _weights(name: str) -> str:
    """As a reader knows them: of a file its name, not where it lies."""
    return Path(name).name if Path(name).is_absolute() else name


def _nearest(p: Prepared, found: Findings, row: int, answers: Answers) -> tuple[Photo, ...]:
    """The closest train photographs of a mistake, in small."""
    if found.nearest is None or answers.labels[row] == answers.guesses[row]:
        return ()
    return tuple(
        Photo(
            _thumbnail(p, i, side=SMALL),
            alt=f"near in training: {p.index.classes[p.index.labels[i]]}",
            title=p.index.classes[p.index.labels[i]],
            path=p.index.paths[i],
        )
        for i in found.nearest[row].tolist()
    )


def _thumbnail(p: Prepared, row: int, side: int | None = None) -> bytes | None:
    """A small JPEG of a photograph as the model's decoder sees it; None if it has gone."""
    try:
        return shrink(_photograph(p, row), side or p.recipe.report.thumbnail)
    except VitftError:
        return None


def _photograph(p: Prepared, row: int) -> Image.Image:
    file = p.index.file(row)
    return images.decode(images.read_bytes(file), file, p.decode)


def _reproduce(
    p: Prepared, learned: Learned, found: Findings, folder: Path, seconds: float
) -> dict[str, object]:
    facts = environment(p)
    facts |= {
        "command": f"python -m vitft.run {shlex.quote(str(folder / 'recipe.resolved.yaml'))}",
        "weights": p.report.source,
        "weights sha256": p.report.sha256,
        "duration": f"{seconds:.0f} s",
        "findings": cost(found.seconds),
    }
    if learned.backbone_frozen:
        facts["backbone"] = "frozen: its sha256 was equal before and after"
    return facts
