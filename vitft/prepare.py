"""Everything a run needs before the first gradient: device, photographs, model, batches.

All that can be wrong is found here, before time is spent, and said at once where it can be.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from vitft import __version__, data, model, offline, pace, product
from vitft.addresses import is_far
from vitft.console import say, warn
from vitft.errors import DataError, MachineError, RecipeError
from vitft.evaluate import fixed_batch
from vitft.images import DecodeSpec
from vitft.inputs import InputConfig, TransformSpec, augmented, plain
from vitft.loaders import Batches
from vitft.photos import Photos
from vitft.pictures import Pictures
from vitft.ranks import ALONE, Ranks, shares
from vitft.recipe import DataSpec, Recipe, TrainSpec
from vitft.regime import batch_norms, set_train_mode
from vitft.workers import shared_memory_free, worker_count

TUNED = ("blocks", "full")  # a ladder's steps that train the backbone


@dataclass(frozen=True)
class Prepared:
    """What the modes work with.

    Attributes:
        recipe: As settled for this machine.
        index: Photographs, labels, split, ledger.
        net: On `device`, head [C, D] fresh, backbone filled.
        config: What the model eats.
        report: Where its weights came from.
        plain_transform: Of evaluation and prediction.
        train_transform: Of training, where it is augmented.
        warnings: For console, report and `metrics.json`.
        ranks: The processes of this run.
    """

    recipe: Recipe
    index: data.Index
    net: nn.Module
    config: InputConfig
    report: model.LoadReport
    device: torch.device
    decode: DecodeSpec
    plain_transform: TransformSpec
    train_transform: TransformSpec
    warnings: tuple[str, ...]
    ranks: Ranks = ALONE

    def photos(self, split: str, *, augment: bool = False, keep: bool = False) -> Photos:
        """The photographs of a split, plain or augmented.

        Args:
            split: Its name.
            augment: By the transform of training.
            keep: Every epoch comes back to them; they stay in memory as far as the recipe allows.
        """
        rows = self.index.rows(split)
        transform = self.train_transform if augment else self.plain_transform
        return Photos(
            [self.index.file(int(i)) for i in rows],
            self.index.labels[rows],
            [self.index.sha256[i] for i in rows],
            decode=self.decode,
            transform=transform,
            seed=self.recipe.seed,
            keep=self._room(split, transform) if keep and self.recipe.train.epochs > 1 else None,
        )

    def _room(self, split: str, transform: TransformSpec) -> Pictures | None:
        """Memory for a split's pictures, or for its inputs where nothing is random.

        The inputs of val come first, as they are small and wanted whole; train has what is left.
        """
        spec, rows = self.recipe.train, self.index.rows(split)
        shared = worker_count(spec.workers, self.device, self.ranks.here) > 0
        budget = int(spec.pictures_gb * 1e9)
        if shared:
            budget = min(budget, shared_memory_free(default=budget) // 2)
        budget //= self.ranks.here
        one = 3 * transform.size[0] * transform.size[1]
        if split == "train":
            budget = max(0, budget - one * len(self.index.rows("val")))
        plain_inputs = transform.kind == "plain"
        sizes = [one] * len(rows) if plain_inputs else (3 * self.index.pixels[rows]).tolist()
        if budget == 0:
            return None
        room = Pictures(sizes, budget, shared=shared)
        if split == "train":
            _tell_room(room, sizes, spec.pictures_gb)
        return room

    def batches(self, photos: Photos, *, train: bool = False) -> Batches:
        """Normalised batches on the device: shuffled for training, in order otherwise."""
        spec = self.recipe.train
        return Batches(
            photos,
            batch_size=batch_size(spec, self.device) if train else fixed_batch(self.device),
            seed=self.recipe.seed,
            shuffle=train,
            device=self.device,
            workers=spec.workers,
            mixup=spec.mixup if train else 0.0,
            cutmix=spec.cutmix if train else 0.0,
            classes=len(self.index.classes),
            balanced=train and spec.sampling == "balanced",
            joins_last=train and _norms_in_training(self.net) > 0,
            ranks=self.ranks if train else Ranks(here=self.ranks.here),
        )

    @property
    def computing(self) -> torch.dtype:
        """What a model is measured in, and its product will predict in: float32 or bfloat16."""
        return pace.precision(self.device, self.recipe.head.precision)

    @property
    def half(self) -> bool:
        """Whether that is bfloat16."""
        return self.computing is torch.bfloat16

    @property
    def test_split(self) -> str:
        """`test`, or `val` where the split has no test photographs (the tutorial's)."""
        return "test" if len(self.index.rows("test")) else "val"


def _tell_room(room: Pictures, sizes: Sequence[int], allowed: float) -> None:
    """How many photographs are decoded once, and what would hold the others."""
    text = f"photographs: {room.count:,} of {len(sizes):,} stay decoded in memory "
    text += f"({room.room / 1e9:.2f} GB; train.pictures_gb: {allowed:g})"
    if room.count < len(sizes):
        text += f", all would take {sum(sizes) / 1e9:.2f} GB; the others are read in every epoch"
    say(text)


def prepare(recipe: Recipe, *, fallback: bool = True, ranks: Ranks = ALONE) -> Prepared:
    """Settles, scans, builds.

    Args:
        recipe: As asked for.
        fallback: Whether its `offline` block may be used.
        ranks: The first one settles and scans for all.

    Raises:
        VitftError: Whatever is wrong with recipe, data, weights or machine.
    """
    device = ranks.agreed(lambda: pick_device(recipe.device, ranks))
    ranks.agreed(lambda: pace.precision(device, recipe.head.precision))
    settled, index = ranks.first_does(lambda: _settled(recipe, fallback))
    ranks.agreed(lambda: _look_afar(settled.recipe, ranks))
    return ranks.agreed(lambda: _build(settled, index, device, ranks))


def _look_afar(recipe: Recipe, ranks: Ranks) -> None:
    """Each machine has stand-ins of its own for files on a server."""
    if ranks.local == 0 and not ranks.first and is_far(recipe.data.root):
        offline.data_root(recipe.data.root)


def _settled(recipe: Recipe, fallback: bool) -> tuple[offline.Settled, data.Index]:
    settled = offline.settle(recipe, fallback=fallback)
    for text in settled.warnings:
        warn(text)
    for spec in model.sources(settled.recipe.model):
        model.locate(spec)  # a missing file is said before photographs are read
    return settled, scan(settled.recipe)


def _build(
    settled: offline.Settled, index: data.Index, device: torch.device, ranks: Ranks
) -> Prepared:
    recipe = settled.recipe
    built = model.build(
        recipe.model,
        classes=len(index.classes),
        image_size=recipe.data.image_size,
        seed=recipe.seed,
    )
    kind = transform_kind(recipe.data)
    prepared = Prepared(
        recipe=recipe,
        index=index,
        net=built.net.to(device),
        config=built.input,
        report=built.report,
        device=device,
        decode=data.decode_spec(recipe.data),
        plain_transform=plain(built.input, kind, recipe.data.resize),
        train_transform=augmented(built.input, recipe.train, kind, recipe.data.resize),
        warnings=(*settled.warnings, *index.ledger.warnings),
        ranks=ranks,
    )
    _check_trainable(prepared)
    _check_ranks(prepared)
    if recipe.export.as_timm:  # said now rather than after the training
        product.timm_name(recipe.model.name, cast(Any, built.net)._model_args)
    return prepared


def scan(recipe: Recipe) -> data.Index:
    """The photographs behind the recipe, with some to train and some to choose on."""
    root = offline.data_root(recipe.data.root)
    spec = recipe.data.model_copy(update={"root": str(root)})
    index = data.scan(spec, seed=recipe.seed)
    for line in index.ledger.lines():
        say(line)
    for split in ("train", "val"):
        if not len(index.rows(split)):
            raise DataError.of(
                "data.empty_split",
                root,
                f"no photograph is left for {split}",
                "raise data.val and data.test, or add photographs",
            )
    return index


def transform_kind(spec: DataSpec) -> str:
    """`auto` means what the weights were trained with."""
    return "timm" if spec.transform == "auto" else spec.transform


def pick_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device asked for, or the best there is; of several ranks each has a GPU of its own.

    A GPU becomes the process's current one, for whatever else it does.

    Raises:
        MachineError: `env.no_device`: asked for by name and not here; never a silent CPU.
    """
    present = ["cpu"]
    if torch.backends.mps.is_available():
        present.insert(0, "mps")
    if torch.cuda.is_available():
        present = [f"cuda:{k}" for k in range(torch.cuda.device_count())] + present
    if name == "auto":
        name = present[0]
        say(f"device: {name}")
    wanted = "cuda:0" if name == "cuda" else name
    if ranks.world > 1 and wanted.startswith("cuda"):
        wanted = f"cuda:{ranks.local}"
    if wanted not in present:
        text = f"device {name} is not here; present: {', '.join(present)}"
        raise MachineError.of("env.no_device", "device", text, "set device: auto")
    if wanted.startswith("cuda"):  # pinned memory, too, belongs to the current one
        torch.cuda.set_device(wanted)
    return torch.device(wanted)


def batch_size(spec: TrainSpec, device: torch.device) -> int:
    """`auto`: large on a GPU, where running out of memory splits it, small elsewhere."""
    if spec.batch_size != "auto":
        return int(spec.batch_size)
    return 256 if device.type == "cuda" else 32


def _check_trainable(prepared: Prepared) -> None:
    """What only model and data together can tell.

    Raises:
        RecipeError: `train.batch_norm`: batches of one through batch normalisation that is trained.
            A last one alone is none: it belongs to the batch before (`Batches`).
    """
    size = batch_size(prepared.recipe.train, prepared.device)
    count = len(prepared.index.rows("train"))
    norms = max((_trained_norms(prepared, k) for k in _fine_tunings(prepared.recipe)), default=0)
    if norms and size > 1 and count > 1 and count % size == 1:
        say(
            f"the last batch of an epoch has {size + 1} photographs, as batch normalisation makes "
            f"nothing of the last of {count:,} alone"
        )
    if not norms or (size > 1 and count > 1):
        return
    text = f"batch size {size} with {norms} batch-normalisation layers that are trained"
    fix = "set train.batch_size to 2 or more"
    if size > 1:
        text = f"one photograph to learn from, with {norms} batch-normalisation layers to train"
        fix = "give it more photographs to learn from"
    place = prepared.recipe.place("train.batch_size")
    raise RecipeError.of("train.batch_norm", place, text, fix)


def _fine_tunings(recipe: Recipe) -> list[int | None]:
    """`train.blocks` of each time that the recipe trains a backbone; a ladder may do it twice."""
    if recipe.mode == "full":
        return [recipe.train.blocks]
    steps = recipe.ladder.steps if recipe.mode == "ladder" else ()
    return [None if step == "full" else recipe.train.blocks for step in steps if step in TUNED]


def _trained_norms(prepared: Prepared, blocks: int | None) -> int:
    """How many batch normalisations training will put in train mode; the model is left as it is.

    They stay in eval mode where the backbone is frozen, and where `train.tune` trains a few
    parameters only.
    """
    if prepared.recipe.train.tune != "all":
        return 0
    with chosen(prepared, blocks):
        return _norms_in_training(prepared.net)


def _norms_in_training(net: nn.Module) -> int:
    """How many batch normalisations train mode puts there, as parameters are chosen now."""
    modes = [(module, module.training) for module in net.modules()]
    set_train_mode(net)
    found = len(batch_norms(net))
    for module, mode in modes:
        module.training = mode
    return found


@contextmanager
def chosen(prepared: Prepared, blocks: int | None) -> Iterator[None]:
    """What training would leave trainable is trainable for a while, and all of it where few is."""
    before = [(parameter, parameter.requires_grad) for parameter in prepared.net.parameters()]
    model.choose_trained(prepared.net, blocks, frozen_cnn=frozen_cnn(prepared.recipe))
    try:
        yield
    finally:
        for parameter, trained in before:
            parameter.requires_grad_(trained)


def frozen_cnn(recipe: Recipe) -> bool:
    """Whether a hybrid's CNN stays as it is."""
    return recipe.model.embed is not None and recipe.model.embed.frozen


def _check_ranks(prepared: Prepared) -> None:
    """What several processes need beyond one; batch normalisation is joined over them.

    Raises:
        RecipeError: `train.ranks`.
    """
    recipe, ranks = prepared.recipe, prepared.ranks
    if ranks.world == 1 or not trains_model(recipe):
        return
    spec, size = recipe.train, batch_size(recipe.train, prepared.device)
    mixes = recipe.mode == "full" and bool(spec.mixup or spec.cutmix) and spec.views == "online"
    unit, why = ranks.world * (1 + mixes), ", in pairs that are mixed" if mixes else ""
    if size % unit:
        text = f"batch size {size} cannot be shared evenly by {ranks.world} processes{why}"
        fix = f"set train.batch_size to a multiple of {unit}, such as {-(-size // unit) * unit}"
        raise RecipeError.of("train.ranks", recipe.place("train.batch_size"), text, fix)
    norms = _trained_norms(prepared, spec.blocks) if recipe.mode == "full" else 0
    if norms and prepared.device.type != "cuda":
        text = f"{recipe.model.name} has {norms} batch-normalisation layers to train, which "
        text += f"torch joins over {ranks.world} processes on CUDA only"
        fix = "start one process, or take a model without batch normalisation"
        raise RecipeError.of("train.ranks", recipe.place("model.name"), text, fix)
    last = len(prepared.index.rows("train")) % size
    if norms and last > 1 and any(not len(part) for part in shares(last, ranks.world, pairs=mixes)):
        text = f"the last of an epoch's batches leaves one of {ranks.world} processes with none of "
        text += f"its {last} photographs, and joined batch normalisation needs some from each"
        fix = f"take another train.batch_size, a multiple of {unit}, or fewer processes"
        raise RecipeError.of("train.ranks", recipe.place("train.batch_size"), text, fix)
    if norms:
        convert_sync_batchnorm(prepared.net)  # type: ignore[no-untyped-call]  # timm's: keeps act


def trains_model(recipe: Recipe) -> bool:
    """Whether the loop runs photographs through the model, so that it pays to share its steps."""
    online = recipe.mode == "head" and recipe.head.views == "online"
    return recipe.mode == "full" or online


def class_weight(prepared: Prepared) -> torch.Tensor | None:
    """[C] float32 with mean 1 over the train photographs, or None.

    A class without any has weight 0: label smoothing would else pull towards it, harder than
    towards the rarest that is there.
    """
    if prepared.recipe.train.class_weights == "none":
        return None
    labels = prepared.index.labels[prepared.index.rows("train")]
    counts = np.bincount(labels, minlength=len(prepared.index.classes))
    there = counts > 0
    weight = np.where(there, len(labels) / (there.sum() * np.maximum(counts, 1)), 0.0)
    return torch.as_tensor(weight, dtype=torch.float32, device=prepared.device)


def kept_views(recipe: Recipe) -> int:
    """Views per training photograph whose features are kept."""
    views = recipe.head.views if recipe.mode in ("head", "ladder") else 1
    return 1 if views == "online" else int(views)


def environment(prepared: Prepared) -> dict[str, Any]:
    """What a second person needs to make the run again: versions, device, threads."""
    import platform
    from importlib.metadata import version

    packages = ("torch", "timm", "torchvision", "numpy", "scikit-learn", "pillow")
    return {
        "versions": {"python": platform.python_version(), "vitft": __version__}
        | {p: version(p) for p in packages}
        | {"torch": torch.__version__},  # which build, too
        "platform": platform.platform(),
        "device": str(prepared.device),
        "device_name": torch.cuda.get_device_name(prepared.device)
        if prepared.device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": prepared.ranks.world,
        "seed": prepared.recipe.seed,
    }


def data_hash(index: data.Index) -> str:
    """One sha256 over class names and each row's content, label and split, in any order."""
    from vitft.io import sha256_bytes

    rows = sorted(
        f"{s} {index.classes[int(y)]!r} {where}"
        for s, y, where in zip(index.sha256, index.labels, index.split, strict=True)
    )
    return sha256_bytes("\n".join([repr(index.classes), *rows]).encode("utf-8", "surrogatepass"))
