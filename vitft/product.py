"""The product: one folder that others can load, and that says all it takes to use it rightly.

`model.safetensors` carries the Card in its header (class names, preprocessing, recipe, hashes,
metrics); `config.json` lets timm open the folder as `local-dir:`. Written whole or not at all.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitft import checkpoint, fitting, io, recipe, tally, weights
from vitft.card import KEY, ONLY_OURS, OURS, text_of
from vitft.card import Card as Card
from vitft.card import decode_of as decode_of
from vitft.card import read as read_card
from vitft.card import transform_of as transform_of
from vitft.errors import Fault, RecipeError, VitftError, WeightsError
from vitft.folders import no_run
from vitft.inputs import InputConfig
from vitft.patches import PatchEmbed
from vitft.vit import VisionTransformer
from vitft.vitflower import TWINS

TABLES = "tables.safetensors"  # arrays that predict uses beside the weights
NAME_A_RUN = "name a run folder or its model folder"


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
    with io.staged_dir(folder) as staged:
        fill(net, staged, card, config, as_timm=as_timm, tables=tables)


def fill(
    net: nn.Module,
    folder: Path,
    card: Card,
    config: InputConfig,
    *,
    as_timm: bool,
    tables: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Writes the product's files into a folder that the caller has staged; as `save`."""
    architecture = timm_twin(card) if as_timm else card.architecture
    if architecture != card.architecture:  # whose own default may be another size
        height, width = config.size
        size = height if height == width else [height, width]
        card = replace(card, options=card.options | {"img_size": size})
    header = {"format": "pt", KEY: text_of(replace(card, architecture=architecture))}
    tensors = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
    io.write_tensors(folder / "model.safetensors", tensors, header)
    if tables:
        io.write_tensors(folder / TABLES, tables, {})
    io.write_json(folder / "config.json", _timm_config(net, card, config, architecture))
    _prove(net, tensors, folder / "model.safetensors", config)


def timm_twin(card: Card) -> str:
    """timm's architecture with the same names and shapes.

    Raises:
        RecipeError: `export.as_timm`: the model uses what timm's class has not.
    """
    return timm_name(card.architecture, card.options)


def timm_name(architecture: str, options: Mapping[str, Any]) -> str:
    """As `timm_twin`, of a name and what it is built with."""
    ours = sorted(ONLY_OURS & options.keys())
    if not architecture.startswith("vitflower_"):
        return architecture
    twin = TWINS.get(architecture)
    if twin is None or ours:
        text = f"{architecture}{' with ' * bool(ours)}{', '.join(ours)} has no counterpart in timm"
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
        WeightsError: Not there, of an unfinished run, damaged, without Card, or not fitting it.
    """
    file = find_file(path)
    card = read_card(file)
    if file.parent.joinpath(io.MANIFEST).is_file() and (bad := io.verify_dir(file.parent)):
        raise WeightsError.of(
            "ckpt.corrupt", file.parent, "; ".join(bad), "copy the folder again, or run it again"
        )
    return _rebuilt(card, weights.read(file), file), card


def load_tables(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays saved beside the weights; {} where there are none.

    Raises:
        WeightsError: They are there, and damaged.
    """
    file = find_file(path).with_name(TABLES)
    if not file.is_file():
        return {}
    return {name: tensor.numpy() for name, tensor in weights.read(file).items()}


def find_file(path: Path) -> Path:
    """`model.safetensors` from whatever of a run the reader names."""
    for candidate in (path, path / "model.safetensors", path / "model" / "model.safetensors"):
        if candidate.is_file():
            return candidate
    raise _unfinished(path)


def sealed(path: Path) -> tuple[Path, ...]:
    """Where nothing may be written: a model's folder, if it has a manifest, and its run's data."""
    try:
        file = find_file(path)
    except WeightsError:
        return ()  # told when it is loaded
    whole = (file.parent / io.MANIFEST).is_file()
    return (file.parent if whole else file, *recipe.data_of(file.parent.parent))


def _unfinished(folder: Path) -> WeightsError:
    """Says how far a run without a product had come."""
    newest = checkpoint.newest(folder / "checkpoints")
    if newest is None:
        text, fix = no_run(folder, "no model.safetensors here", NAME_A_RUN)
        return WeightsError([Fault("ckpt.missing", str(folder), text, fix)])
    state = checkpoint.where(newest)
    history, best = state["numbers"]["history"], state["numbers"]["best"]
    told = f", best val accuracy {100 * best['val_accuracy']:.1f} %" if best else ""
    text = f"unfinished run: step {state['step']}, {len(history)} epochs done{told}; no model yet"
    fix = f"finish it: python -m vitft.run {folder / 'recipe.resolved.yaml'} --resume {folder}"
    return WeightsError([Fault("ckpt.unfinished", str(folder), text, fix)])


# -- built from its Card --------------------------------------------------------------------------


def _rebuilt(card: Card, state: Mapping[str, Tensor], file: Path) -> nn.Module:
    """The model a Card describes, filled with tensors that fit it one by one.

    A Card may come from anyone, so what it describes is compared with the tensors that are really
    there before memory is taken for it.
    """
    if not timm.is_model(card.architecture):
        text = f"its architecture {card.architecture!r} is unknown to timm {timm.__version__}"
        raise WeightsError.of("ckpt.card", file, text, "update timm")
    deepest = max(_depths(card), default=0)
    if deepest > len(state):
        text = f"it says {deepest:,} layers, the file holds {len(state):,} tensors"
        raise WeightsError.of("ckpt.card", file, text, OURS)
    sketch = _sketched(card, file)
    net = _create(card, file) if sketch is None else sketch
    own = net.state_dict()
    state, _ = fitting.asked(state, own)
    tally.check(state, own, place=file)
    if sketch is not None:
        net = sketch.to_empty(device="cpu") if _is_its_state(sketch) else _create(card, file)
    net.load_state_dict(state)
    return net.eval()


def _is_its_state(net: nn.Module) -> bool:
    """Whether its tensors make the model, so that none need be drawn before they are read.

    Others may hold some that no file has, such as tables of positions.
    """
    return isinstance(net, VisionTransformer) and isinstance(net.patch_embed, PatchEmbed)


def _depths(card: Card) -> Iterator[int]:
    for name in ("depth", "depths", "layers"):
        value = card.options.get(name, 0)
        yield from (n for n in (value if isinstance(value, list) else [value]) if type(n) is int)


def _sketched(card: Card, file: Path) -> nn.Module | None:
    """Names and shapes alone, without memory; None for the few models that cannot be built so."""
    try:
        with torch.device("meta"):
            return _create(card, file)
    except WeightsError:
        return None


def _create(card: Card, file: Path) -> nn.Module:
    try:
        net: nn.Module = timm.create_model(
            card.architecture, num_classes=len(card.classes), **card.options
        )
    except Exception as e:  # whatever timm makes of options that do not go together
        text = f"timm cannot build {card.architecture} with {card.options}: {e}"
        raise WeightsError.of("ckpt.card", file, text[:400], OURS) from e
    return net


@torch.inference_mode()
def _prove(net: nn.Module, tensors: Mapping[str, Tensor], file: Path, config: InputConfig) -> None:
    """Reads a written file back before it replaces another: every bit, and one answer.

    The answer may differ in its last digits where timm's class, or another layout of the same
    numbers in memory, computes it.

    Raises:
        VitftError: `export.differs`: the file is not the model (a bug of ours).
    """
    stored = weights.read(file)
    changed = [name for name, value in tensors.items() if not torch.equal(stored[name], value)]
    again = _rebuilt(read_card(file), stored, file)
    x = torch.linspace(-1, 1, 3 * config.size[0] * config.size[1]).view(1, 3, *config.size)
    elsewhere = next(net.parameters()).device.type != "cpu"  # where convolutions may round to TF32
    training, mine = net.training, copy.deepcopy(net).cpu() if elsewhere else net
    wanted = mine.eval()(x).float()
    gap = float((again(x).float() - wanted).abs().max())
    mine.train(training)
    if changed or not gap <= 1e-4 * (1 + float(wanted.abs().max())):
        what = f"{changed[0]} is another tensor" if changed else f"its answer differs by {gap:.1e}"
        text = f"read back, {what}; what was there before is unchanged"
        raise VitftError.of("export.differs", file, text, "please report this as a bug")
