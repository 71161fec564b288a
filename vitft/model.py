"""A timm model by name: built, filled with weights that were checked, frozen where the recipe says.

Nothing is half-loaded: every backbone tensor is matched by name and shape, or `WeightsError`.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data.model_config import resolve_input_data_config
from timm.layers.patch_dropout import PatchDropout
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from vitft import fitting, hybrid, io, tally, weights
from vitft.console import say, warn
from vitft.errors import MachineError, RecipeError, VitftError, WeightsError
from vitft.inputs import InputConfig, derive_seed
from vitft.recipe import ModelSpec
from vitft.remedies import nearest_sizes

HUB = "huggingface.co"
START = 0.02  # deviation of a fresh head's weights, as the ViT paper's code draws them


@dataclass(frozen=True)
class LoadReport:
    """Where the weights came from and what became of every tensor.

    Attributes:
        source: As the recipe named it.
        sha256: Of the file, or "" for random weights.
        loaded: How many tensors the model took.
        dropped: Tensor name -> why it was left out.
        new: Names initialised from the seed.
        notes: Conversions made, such as a resampled position grid.
    """

    source: str
    sha256: str
    loaded: int
    dropped: dict[str, str]
    new: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Built:
    """A model with its head for the recipe's classes, what it eats, and where it came from."""

    net: nn.Module
    input: InputConfig
    report: LoadReport


# -- build ----------------------------------------------------------------------------------------


def build(spec: ModelSpec, *, classes: int, image_size: int | None = None, seed: int = 0) -> Built:
    """Creates the model with a fresh head and fills the backbone with the named weights.

    Args:
        spec: The recipe's `model` section.
        classes: Rows of the head.
        image_size: Pixels; None keeps the model's own.
        seed: Of everything that is initialised.

    Raises:
        RecipeError: `model.unknown`, `model.option`, `model.img_size`.
        WeightsError: The weights do not fit, or their file is not what it claims to be.
        MachineError: `env.unreachable`, when they must be fetched and cannot be.
    """
    net = create(spec, classes=classes, image_size=image_size, seed=seed)
    report = _fill(net, spec)
    return Built(net, input_config(net, image_size), report)


def create(spec: ModelSpec, *, classes: int, image_size: int | None, seed: int) -> nn.Module:
    """The architecture alone, initialised from the seed."""
    require_known(spec.name)
    if spec.embed is not None and not spec.name.startswith("vitflower_"):
        text = f"{spec.name} is timm's, which cuts patches from the image"
        raise RecipeError.of("model.embed", "model.name", text, "choose a vitflower model")
    options = create_options(spec, image_size)
    with torch.random.fork_rng([]):
        torch.manual_seed(derive_seed(seed, "init"))
        try:
            net: nn.Module = timm.create_model(spec.name, num_classes=classes, **options)
        except VitftError:
            raise
        except (TypeError, AssertionError, ValueError, RuntimeError, KeyError) as e:
            raise RecipeError.of(
                "model.option",
                f"model.name={spec.name}",
                f"timm cannot build it with {options}: {e}",
                "check model.options and data.image_size (a multiple of the patch size)",
            ) from e
    _require_whole_patches(net, spec.name, image_size)
    if not isinstance(classifier(net), nn.Linear):
        kind = type(classifier(net)).__name__
        text = f"its classifier is {kind}, only a linear head can be trained here"
        raise RecipeError.of("model.head", spec.name, text, "choose another timm model")
    return net


def _require_whole_patches(net: nn.Module, name: str, size: int | None) -> None:
    """Raises RecipeError `model.img_size` where timm would cut off what fills no patch."""
    embed = getattr(net, "patch_embed", None)
    if size is None or not isinstance(embed, PatchEmbed) or embed.dynamic_img_pad:
        return
    patch = max(embed.patch_size)
    if size % patch:
        low, high = nearest_sizes(size, patch)
        near = f"{low} or {high}" if low < high else f"{low}"
        text = f"must be a multiple of the patch size {patch} of {name}, got {size}"
        fix = f"set data.image_size: {near}"
        raise RecipeError.of("model.img_size", "data.image_size", text, fix)


def _fill_cnn(net: nn.Module, spec: ModelSpec) -> LoadReport:
    """A hybrid's CNN from its own weights; the encoder on top of it starts at random."""
    embed = spec.embed
    if embed is None:
        raise ValueError("the model is no hybrid")
    if spec.weights != "none":
        text = f"model.weights {spec.weights} would be overwritten by model.embed.weights"
        fix = "set one of the two to none"
        raise RecipeError.of("model.embed", "model.embed.weights", text, fix)
    path = locate(_of_cnn(spec))
    found = weights.open_file(path)
    cnn: nn.Module = cast(Any, net).patch_embed.backbone
    state, left = hybrid.cnn_state(found.tensors, cnn, embed.backbone, place=path)
    cnn.load_state_dict(state)
    _eat_like(net, embed.backbone)
    new = tuple(n for n in net.state_dict() if not n.startswith("patch_embed.backbone."))
    notes = (*found.notes, f"the CNN {embed.backbone} is filled, the encoder on it is RANDOM")
    report = LoadReport(embed.weights, found.sha256, len(state), left, new, notes)
    _tell(report, path)
    return report


def _of_cnn(spec: ModelSpec) -> ModelSpec:
    """The CNN under a hybrid, as if it were the model."""
    name, weights = (spec.embed.backbone, spec.embed.weights) if spec.embed else ("", "none")
    return spec.model_copy(update={"name": name, "weights": weights})


def _eat_like(net: nn.Module, cnn: str) -> None:
    """Images are prepared as the filled CNN's authors prepared them."""
    theirs, ours = timm.get_pretrained_cfg(cnn), cast(Any, net).pretrained_cfg
    if theirs is not None:
        ours |= {"mean": theirs.mean, "std": theirs.std, "interpolation": theirs.interpolation}


def create_options(spec: ModelSpec, image_size: int | None) -> dict[str, Any]:
    """Keywords for `timm.create_model`: only what the recipe sets."""
    options: dict[str, Any] = dict(spec.options)
    if spec.global_pool is not None:
        options["global_pool"] = spec.global_pool
    if spec.drop_rate:
        options["drop_rate"] = spec.drop_rate
    if spec.drop_path_rate:
        options["drop_path_rate"] = spec.drop_path_rate
    if spec.embed is not None:
        options |= {"embed": spec.embed.backbone, "patch_size": spec.embed.patch}
        if spec.embed.stage is not None:
            options["embed_stage"] = spec.embed.stage
    cfg = timm.get_pretrained_cfg(spec.name, allow_unregistered=True)
    if image_size is not None and cfg is not None and cfg.fixed_input_size:
        options.setdefault("img_size", image_size)
    return options


def require_known(name: str) -> None:
    """Raises RecipeError `model.unknown` with the nearest names, unless timm can build it."""
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
    raise RecipeError.of("model.unknown", "model.name", f"timm knows no model {name!r}", hint)


def input_config(net: nn.Module, image_size: int | None = None) -> InputConfig:
    """How images must be prepared: size as built, the rest as the weights were trained."""
    args = {} if image_size is None else {"img_size": image_size}
    config = resolve_input_data_config(net, args=args)
    _, height, width = config["input_size"]
    return InputConfig(
        size=(height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=float(config["crop_pct"]),
        crop_mode=config["crop_mode"],
    )


# -- weights --------------------------------------------------------------------------------------


def _fill(net: nn.Module, spec: ModelSpec) -> LoadReport:
    if spec.embed is not None and spec.embed.weights != "none":
        return _fill_cnn(net, spec)
    if spec.weights == "none":
        warn(f"{spec.name} starts from RANDOM weights (model.weights: none)")
        return LoadReport("none", "", 0, {}, tuple(net.state_dict()), ())
    path = locate(spec)
    state, notes = fitting.load_for(net, path, sha256=spec.sha256)
    head = classifier_names(net)
    match = tally.check(state, net.state_dict(), new=head, drop=head, place=path)
    dropped = {k: "the recipe's classes get a head of their own" for k in head if k in state}
    dropped |= match.dropped
    net.load_state_dict({k: v for k, v in state.items() if k not in dropped}, strict=False)
    loaded = len(net.state_dict()) - len(head)
    report = LoadReport(spec.weights, io.sha256_file(path), loaded, dropped, head, notes)
    _tell(report, path)
    return report


def _tell(report: LoadReport, path: Path) -> None:
    say(f"weights: {report.loaded} tensors from {path.name} (sha256 {report.sha256[:12]})")
    for note in report.notes:
        say(f"weights: {note}")
    reasons: dict[str, list[str]] = {}
    for name, why in report.dropped.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        few = len(names) <= tally.SHOWN
        say(f"weights: left out {', '.join(names) if few else tally.listed(names)}: {why}")


def classifier_names(net: nn.Module) -> tuple[str, ...]:
    """Names of the head's tensors in the state dict, such as `head.weight`."""
    head = classifier(net)
    for name, module in net.named_modules():
        if module is head:
            return tuple(f"{name}.{k}" for k in head.state_dict())
    return ()


def locate(spec: ModelSpec) -> Path:
    """The weights' file on this disk, fetched where it must and can be.

    Raises:
        WeightsError: `ckpt.missing`.
        MachineError: `env.unreachable`.
    """
    if spec.weights == "bundled":
        return weights.bundled_file()
    if _is_path(spec.weights):
        path = Path(spec.weights).expanduser()
        if path.is_file():
            return path
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        )
        base = "the recipe, or to the folder you are in if given on the command line"
        hint = f"did you mean {near[0]}?" if near else f"check the path; it is relative to {base}"
        raise WeightsError.of("ckpt.missing", path, "there is no such file", hint)
    return _from_hub(spec)


def sources(spec: ModelSpec) -> list[ModelSpec]:
    """The recipe's model, and a hybrid's CNN, where weights are named for them."""
    named = [spec] if spec.weights != "none" else []
    return named + [_of_cnn(spec)] * (spec.embed is not None and spec.embed.weights != "none")


def cached(spec: ModelSpec) -> bool:
    """Whether the weights are here already, so that no network is needed."""
    if spec.embed is not None and spec.embed.weights != "none":
        spec = _of_cnn(spec)
    if spec.weights in ("none", "bundled") or _is_path(spec.weights):
        return True
    from huggingface_hub import try_to_load_from_cache

    repo, revision, names = _hub_files(spec)
    found = [try_to_load_from_cache(repo, name, revision=revision) for name in names]
    return any(isinstance(f, str) for f in found)


def hub_repository(spec: ModelSpec) -> str:
    """Where on the hub the weights lie, such as `timm/vit_base_patch16_224.orig_in21k`."""
    return _hub_files(spec)[0]


def _is_path(text: str) -> bool:
    suffix = Path(text).suffix
    return not text.startswith("hf-hub:") and (
        suffix in {".pth", ".pt", ".bin", ".safetensors", ".npz", ".tar"} or Path(text).is_file()
    )


def _hub_files(spec: ModelSpec) -> tuple[str, str | None, tuple[str, ...]]:
    """(repository, revision, file names to try) of a timm tag or an `hf-hub:` id."""
    names = ("model.safetensors", "pytorch_model.bin")
    if spec.weights.startswith("hf-hub:"):
        repo, _, revision = spec.weights.removeprefix("hf-hub:").partition("@")
        return repo, revision or None, names
    cfg = timm.get_pretrained_cfg(spec.weights, allow_unregistered=False) if _tagged(spec) else None
    if cfg is None or not cfg.hf_hub_id:
        known = timm.list_pretrained()
        near = difflib.get_close_matches(spec.weights, known, n=3)
        hint = (
            f"did you mean {', '.join(near)}?"
            if near
            else "name a file, hf-hub:ID, bundled or none"
        )
        text = f"timm has no weights {spec.weights!r} on the hub, and no such file is here"
        raise RecipeError.of("model.weights", "model.weights", text, hint)
    repo = cfg.hf_hub_id if cfg.hf_hub_id != "timm/" else f"timm/{spec.weights}"
    return repo, None, (cfg.hf_hub_filename, *names) if cfg.hf_hub_filename else names


def _tagged(spec: ModelSpec) -> bool:
    return timm.is_model(spec.weights.split(".")[0])


def _from_hub(spec: ModelSpec) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repo, revision, names = _hub_files(spec)
    error: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(repo, name, revision=revision))
        except EntryNotFoundError as e:  # this file name is not there; LocalEntryNotFound included
            error = e
        except OSError as e:
            error = e
            break
    raise MachineError.of(
        "env.unreachable",
        f"model.weights={spec.weights}",
        f"cannot be fetched from {HUB}/{repo} and is not in the cache ({type(error).__name__})",
        f"download {names[0]} from https://{HUB}/{repo} and set model.weights to its path",
    )


# -- what is trained ------------------------------------------------------------------------------


def freeze_backbone(net: nn.Module) -> None:
    """Leaves only the head trainable."""
    net.requires_grad_(False)
    classifier(net).requires_grad_(True)


def choose_trained(net: nn.Module, blocks: int | None, *, frozen_cnn: bool) -> None:
    """Leaves everything trainable, or the last `blocks` blocks; a hybrid's CNN perhaps not."""
    net.requires_grad_(True)
    if blocks is not None:
        train_last_blocks(net, blocks)
    if frozen_cnn:
        freeze_cnn(net)


def freeze_cnn(net: nn.Module) -> None:
    """Leaves a hybrid's CNN as it is."""
    cast(Any, net).patch_embed.backbone.requires_grad_(False)


def train_last_blocks(net: nn.Module, count: int) -> None:
    """Leaves the last `count` blocks, what follows them, and the head trainable.

    Raises:
        RecipeError: `model.blocks`: the model has no `blocks`, or fewer.
    """
    blocks = getattr(net, "blocks", None)
    if blocks is None or count > len(blocks):
        have = "no blocks" if blocks is None else f"{len(blocks)} blocks"
        text = f"train.blocks is {count}, the model has {have}"
        raise RecipeError.of("model.blocks", "train.blocks", text, "lower it, or leave it out")
    net.requires_grad_(False)
    after = [m for name in ("norm", "fc_norm") if (m := getattr(net, name, None)) is not None]
    for module in [*blocks[-count:], *after, classifier(net)]:
        module.requires_grad_(True)


def drop_patches(net: nn.Module, share: float) -> None:
    """Leaves out this share of the patches, drawn anew for each image, whenever it trains.

    Args:
        net: A timm ViT; class and register tokens always stay.
        share: 0 puts all patches back.

    Raises:
        RecipeError: `model.patch_drop`: the model has no place where patches can be left out.

    Source: Liu et al., PatchDropout, 2022 (arXiv 2208.07220).
    """
    place = getattr(net, "patch_drop", None)
    if not isinstance(place, nn.Identity | PatchDropout):
        if share:
            text = f"train.patch_drop is {share:g}, {type(net).__name__} cannot leave out patches"
            fix = "choose a vit_* or vitflower_* model, or set train.patch_drop: 0"
            raise RecipeError.of("model.patch_drop", "train.patch_drop", text, fix)
        return
    prefix = int(getattr(net, "num_prefix_tokens", 1))
    net.patch_drop = PatchDropout(share, num_prefix_tokens=prefix) if share else nn.Identity()


def backbone_fingerprint(net: nn.Module) -> str:
    """sha256 over every tensor but the head's."""
    head = set(classifier_names(net))
    return weights.fingerprint({k: v for k, v in net.state_dict().items() if k not in head})


def frozen_fingerprint(net: nn.Module) -> str:
    """sha256 over every parameter that training cannot change."""
    frozen = {k: p.detach() for k, p in net.named_parameters() if not p.requires_grad}
    return weights.fingerprint(frozen)


def trainable(net: nn.Module) -> int:
    """How many parameters training can change."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


# -- the head -------------------------------------------------------------------------------------


def classifier(net: nn.Module) -> nn.Linear:
    """The head of a timm model."""
    head: nn.Linear = cast(Any, net).get_classifier()
    return head


def start_head(head: nn.Linear, seed: int) -> None:
    """A fresh head: weights from a narrow normal distribution, biases zero.

    Args:
        head: Changed in place.
        seed: Of the draw; torch's own generator goes on undisturbed.
    """
    drawn = torch.empty(head.weight.shape)  # on the CPU, so that every device starts alike
    nn.init.trunc_normal_(drawn, std=START, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        head.weight.copy_(drawn)
        head.bias.zero_()


def starts_wide(head: nn.Linear) -> bool:
    """Whether timm's family draws its head so widely that training first has to unlearn it.

    EfficientNets draw from +-1 / sqrt(C): five classes start at a loss of 4.8 rather than 1.6.
    """
    return float(head.weight.detach().square().mean().sqrt()) > 2 * START


def set_head(head: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Puts a solved head in its place: weight [C, D], bias [C]."""
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
