"""The product: one folder that others can load, and that says all it takes to use it rightly.

`model.safetensors` carries the Card in its header (class names, preprocessing, recipe, hashes,
metrics); `config.json` lets timm open the folder as `local-dir:`. Written whole or not at all.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from numpy.typing import NDArray
from torch import nn

from vitft import io, weights
from vitft.errors import RecipeError, WeightsError
from vitft.images import DecodeSpec
from vitft.inputs import InputConfig, TransformSpec
from vitft.model import require_known

CARD_KEY = "vitft"  # in the safetensors header
TABLES = "tables.safetensors"  # arrays that predict uses beside the weights
CARD_LIMIT = 4_000_000  # bytes of JSON a Card may take; one beyond it is refused

# Where vitft is not installed: timm's architecture with the same names and shapes.
TIMM_TWINS = {
    "vitflower_ti16": "vit_tiny_patch16_224",
    "vitflower_s16": "vit_small_patch16_224",
    "vitflower_s14": "vit_small_patch14_dinov2",
    "vitflower_b16": "vit_base_patch16_224",
    "vitflower_b32": "vit_base_patch32_224",
    "vitflower_l16": "vit_large_patch16_224",
    "vitflower_l32": "vit_large_patch32_384",
    "vitflower_h14": "vit_huge_patch14_224",
}


@dataclass(frozen=True)
class Card:
    """What a stranger needs to use the model rightly; travels in the safetensors header.

    Attributes:
        architecture: timm name.
        classes: Names in the order of the head's rows.
        options: Keywords for `timm.create_model` beyond `num_classes`.
        transform: `TransformSpec` of evaluation, as a dict.
        decode: `DecodeSpec`, as a dict.
        temperature: Divides the logits before the softmax; None where none was fitted.
        recipe: The resolved recipe's text.
        hashes: sha256 of data (all rows of the split), of weights and of the backbone.
        metrics: The run's test numbers; fractions 0 to 1.
        extras: Further JSON of later rooms (threshold for "I don't know", distances to train).
    """

    architecture: str
    classes: tuple[str, ...]
    options: dict[str, Any]
    transform: dict[str, Any]
    decode: dict[str, Any]
    temperature: float | None = None
    recipe: str = ""
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)


def save(
    net: nn.Module,
    folder: Path,
    card: Card,
    config: InputConfig,
    *,
    as_timm: bool,
    tables: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Writes the product: `model.safetensors` with the Card in its header, and `config.json`.

    Args:
        net: On any device; the file holds float tensors as they are.
        folder: Replaced as a whole, once the new one is complete.
        card: Its `options` must rebuild the model.
        config: What the model eats, for timm's own `config.json`.
        as_timm: Name timm's architecture instead of ours, for machines without vitft.
        tables: Further arrays for predict, kept beside the weights so that timm's strict loading
            meets the model's tensors alone.
    """
    architecture = timm_twin(card) if as_timm else card.architecture
    header = {
        "format": "pt",
        CARD_KEY: json.dumps(asdict(replace(card, architecture=architecture))),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
    with io.staged_dir(folder) as staged:
        io.write_tensors(staged / "model.safetensors", tensors, header)
        if tables:
            io.write_tensors(staged / TABLES, tables, {})
        io.write_json(staged / "config.json", _timm_config(net, card, config, architecture))


def timm_twin(card: Card) -> str:
    """timm's architecture with the same names and shapes.

    Raises:
        RecipeError: `export.as_timm`: the model uses what timm's class has not.
    """
    ours = {"pos_embed", "representation_size"} & card.options.keys()
    twin = TIMM_TWINS.get(card.architecture)
    if not card.architecture.startswith("vitflower_"):
        return card.architecture
    if twin is None or ours:
        text = f"{card.architecture} with {sorted(ours)} has no counterpart in timm"
        raise RecipeError.of("export.as_timm", "export.as_timm", text, "leave it out")
    return twin


def _timm_config(
    net: nn.Module, card: Card, config: InputConfig, architecture: str
) -> dict[str, Any]:
    """timm's `config.json`; `model_args` without `num_classes`, which transformers chokes on."""
    from timm.models._hub import save_config_for_hf

    data = {
        "input_size": (3, *config.size),
        "mean": config.mean,
        "std": config.std,
        "interpolation": config.interpolation,
        "crop_pct": config.crop_pct,
        "crop_mode": config.crop_mode,
    }
    with io.scratch_dir() as scratch:
        path = scratch / "config.json"
        save_config_for_hf(
            net, str(path), model_config={"label_names": list(card.classes)}, data_config=data
        )
        out: dict[str, Any] = json.loads(path.read_text("utf-8"))
    out["architecture"] = architecture
    if architecture != card.architecture:
        out["pretrained_cfg"].pop("tag", None)
        out.setdefault("model_args", {})["img_size"] = list(config.size)
    out.get("model_args", {}).pop("num_classes", None)
    return out


def load(path: Path) -> tuple[nn.Module, Card]:
    """The model of a run folder, a `model/` folder or a `model.safetensors`, in eval mode.

    Raises:
        WeightsError: Not there, damaged, without Card, or not fitting its own Card.
    """
    file = find_file(path)
    card = read_card(file)
    if file.parent.joinpath(io.MANIFEST).is_file() and (bad := io.verify_dir(file.parent)):
        raise WeightsError.of(
            "ckpt.corrupt", file.parent, "; ".join(bad), "copy the folder again, or run it again"
        )
    state = weights.read(file)
    require_known(card.architecture)
    net: nn.Module = timm.create_model(
        card.architecture, num_classes=len(card.classes), **card.options
    )
    weights.check(state, net.state_dict(), new=(), drop=(), place=file)
    net.load_state_dict(state)
    return net.eval(), card


def load_tables(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays saved beside the weights; {} where there are none."""
    from safetensors.numpy import load_file

    file = find_file(path).with_name(TABLES)
    return dict(load_file(file)) if file.is_file() else {}


def find_file(path: Path) -> Path:
    """`model.safetensors` from whatever of a run the reader names."""
    for candidate in (path, path / "model.safetensors", path / "model" / "model.safetensors"):
        if candidate.is_file():
            return candidate
    text = "no model.safetensors here"
    raise WeightsError.of("ckpt.missing", path, text, "name a run folder or its model folder")


def read_card(file: Path) -> Card:
    """The Card from the header: JSON with bounds and a schema, never evaluated.

    Raises:
        WeightsError: `ckpt.no_card`.
    """
    text = weights.read_metadata(file).get(CARD_KEY, "")
    try:
        if not text or len(text) > CARD_LIMIT:
            raise ValueError(f"{len(text):,} bytes of it")
        raw = json.loads(text)
        raw["classes"] = tuple(_strings(raw["classes"]))
        card = Card(**raw)
        TransformSpec(**_tuples(card.transform))
        DecodeSpec(**_tuples(card.decode))
    except (ValueError, TypeError, KeyError) as e:
        raise WeightsError.of(
            "ckpt.no_card",
            file,
            f"its header does not say classes and preprocessing ({e})",
            "use a model.safetensors written by vitft",
        ) from e
    return card


def transform_of(card: Card) -> TransformSpec:
    """The evaluation transform the model was measured with."""
    return TransformSpec(**_tuples(card.transform))


def decode_of(card: Card) -> DecodeSpec:
    """How files became pixels when it was measured."""
    return DecodeSpec(**_tuples(card.decode))


def _tuples(section: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}


def _strings(values: Sequence[Any]) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise ValueError("classes must be a list of names")
    return values
