"""Every key a recipe may hold: its type, range, default and meaning, declared once.

`vitft.recipe` reads these declarations to check a file, `vitft.kinds` holds the types and derives
the words for them. Nothing here knows about YAML or files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, Strict
from pydantic.fields import FieldInfo

from vitft.kinds import (
    Adapted,
    Aspect,
    Augment,
    Auto,
    BitRange,
    Byte,
    Count,
    Csv,
    Decay,
    Device,
    Flag,
    Folder,
    Group,
    NotNegative,
    Option,
    Positive,
    RunName,
    Section,
    Seed,
    Sha256,
    Share,
    ShareOrAll,
    SomeShare,
    Split,
    Steps,
    Suffix,
    Tally,
    Text,
    section_of,
)

SCHEMA_VERSION = 1
STRENGTHS = tuple(float(f"{10 ** (-6 + k / 4):.6g}") for k in range(45))  # 1e-6 ... 1e5, as DINOv2


class DataSpec(Section):
    """Which photographs, how they are split, what happens to bad ones."""

    root: Text = Field(
        default="sample:flowers",
        description="Folder of class folders, a .csv file (path,label[,split,group]), "
        "`flower_photos` (downloaded), `sample:flowers` (in the package), or an address of tar "
        "or Parquet files (https://host/train-{00..31}.tar, hf://datasets/OWNER/NAME).",
    )
    source: Literal["auto", "folder", "wds", "hfds"] = Field(
        default="auto",
        description="What lies at root: class folders (`folder`), tar shards of webdataset "
        "(`wds`), a Hugging Face data set, Arrow or Parquet (`hfds`, needs vitft[hfds]); `auto`: "
        "a folder or a CSV; hfds where its json says so, wds for a single .tar, either afar.",
    )
    split: Split = Field(
        default="auto",
        description="`auto` (folders train/val/test or the CSV's column where they exist, else "
        "stratified), `stratified`, `folders`, `tutorial`, or the path of a split.csv.",
    )
    val: Share = Field(
        default=0.15, description="Share of each class for choosing; stratified split."
    )
    test: Share = Field(
        default=0.15, description="Share of each class reported once; stratified split."
    )
    group: Group | None = Field(
        default=None,
        description="Files of one group stay on one side: `parent` folder or a pattern.",
    )
    image_size: Count | None = Field(
        default=None, description="Side in pixels; null: the model's own."
    )
    transform: Literal["auto", "tutorial", "timm"] = Field(
        default="auto", description="Resize and crop: the weights' own (`auto`, `timm`) or 256/224."
    )
    on_bad: Literal["skip", "error"] = Field(
        default="skip", description="Unreadable photographs: list and leave out, or stop."
    )
    max_bad: ShareOrAll = Field(
        default=0.01, description="Stop when more than this share is unreadable."
    )
    background: tuple[Byte, Byte, Byte] = Field(
        default=(255, 255, 255), description="Colour under transparent pixels, as red, green, blue."
    )
    bit_range: BitRange | None = Field(
        default=None, description="Values of 16-bit and float images that become black and white."
    )
    icc: Literal["ignore", "to_srgb"] = Field(
        default="ignore", description="Embedded colour profiles."
    )
    frames: Literal["first", "error"] = Field(
        default="first", description="Animated or multi-page files."
    )
    decoder: Literal["pillow", "fast"] = Field(
        default="pillow",
        description="`fast`: JPEGs by the package simplejpeg in half the time, to the same pixels "
        "where both stand on libjpeg-turbo.",
    )
    resize: Literal["pillow", "fast"] = Field(
        default="pillow",
        description="`fast`: torch's resize of bytes in a third of the time; most grey values "
        "are Pillow's, the others differ by 1 or 2, at sharp edges more with Pillow 13.",
    )
    max_pixels: Count = Field(default=64_000_000, description="Larger photographs are refused.")
    max_aspect: Aspect = Field(
        default=200.0, description="Longer ones (long side / short side) are refused."
    )
    extensions: tuple[Suffix, ...] = Field(
        default=(),
        description="Further suffixes of photographs, beside the usual ones, such as .jpeg_large.",
    )
    class_from: Literal["auto", "top", "leaf", "path"] = Field(
        default="auto",
        description="Class of a nested file: `top` (first folder), `leaf` (last folder) or `path` "
        "(all of it); `auto`: nested files are an error that shows these readings.",
    )
    allow_empty: Flag = Field(
        default=False, description="Accept class folders without photographs."
    )
    duplicates: Literal["warn", "drop_from_train", "error"] = Field(
        default="warn", description="Byte-identical photographs in two classes."
    )
    fixes: Csv | None = Field(
        default=None, description="A fixes.csv of label corrections to honour."
    )
    follow_links: Flag = Field(
        default=True, description="Follow symbolic links (loops are refused)."
    )


class EmbedSpec(Section):
    """A hybrid: patches of a CNN's feature map instead of the image (vitflower models)."""

    backbone: Text = Field(
        default="r26",
        description="`r26`, `r50`, `r50_fine` (the paper's ResNets) or any timm CNN by name.",
    )
    stage: Tally | None = Field(
        default=None, description="Which of its feature maps, from 0; null: the last."
    )
    patch: Count = Field(default=1, description="Side of a patch, in cells of the map.")
    weights: Text = Field(
        default="none",
        description="The CNN's own weights, as model.weights; `none`: random, or those of "
        "model.weights where that file holds a whole hybrid.",
    )
    frozen: Flag = Field(
        default=False, description="Keep the CNN as it is while all else is trained."
    )


class ModelSpec(Section):
    """Which network, which weights."""

    name: Text = Field(
        default="vitflower_b16", description="Any timm model name; vitflower_* are ours."
    )
    weights: Text = Field(
        default="none",
        description="A .pth/.safetensors path, a timm tag (vit_base_patch16_224.orig_in21k), "
        "`hf-hub:...`, `bundled` (ViT-S/14 in the package) or `none` (random).",
    )
    sha256: Sha256 | None = Field(
        default=None, description="Refuse a weights file that does not match."
    )
    global_pool: Text | None = Field(
        default=None, description="`token`, `avg` ...; null: the model's own."
    )
    drop_rate: Share = Field(default=0.0, description="Dropout before the head.")
    drop_path_rate: Share = Field(default=0.0, description="Stochastic depth at the last block.")
    options: dict[str, Option] = Field(
        default={},
        description="Further keywords for timm.create_model, such as pos_embed: sincos2d.",
    )
    embed: EmbedSpec | None = Field(
        default=None, description="Build a hybrid; null: patches of the image."
    )


class HeadSpec(Section):
    """Mode head: features of a frozen backbone."""

    views: Count | Literal["online"] = Field(
        default=1,
        description="Augmented views per photograph whose features are kept; 1: the plain "
        "transform, from which no more views could be told on flowers; `online`: augment anew in "
        "every epoch, through the backbone.",
    )
    feature_dtype: Literal["float32", "float16"] = Field(
        default="float32",
        description="How cached features are stored; float16 halves the store (flowers, "
        "EfficientNet-Lite0, five splits: 1 of 2,595 answers differed).",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="How a frozen backbone computes, and any model when it is measured and when it "
        "predicts; `auto`: bfloat16 on CUDA that has it, float32 elsewhere. On CPU bfloat16 is "
        "refused where it would be emulated.",
    )


class TrainSpec(Section):
    """Modes head and full: the training loop."""

    epochs: Count = Field(default=10, description="Passes over the training photographs.")
    batch_size: Count | Auto = Field(
        default=32, description="Photographs per step; `auto`: what fits."
    )
    opt: Text = Field(
        default="sgd",
        description="Any timm optimizer: momentum (plain SGD), sgd (Nesterov), adamw ...",
    )
    lr: Positive = Field(default=1e-3, description="Peak learning rate.")
    momentum: Share = Field(default=0.9, description="Momentum of those optimizers that have one.")
    weight_decay: NotNegative = Field(
        default=0.0, description="Decay of matrices; never of biases."
    )
    layer_decay: Decay | None = Field(
        default=None, description="Learning-rate factor per layer below the head (mode full)."
    )
    sched: Literal["cosine", "poly", "tanh", "constant"] = Field(
        default="cosine", description="Course of the learning rate."
    )
    min_lr_ratio: ShareOrAll = Field(default=0.01, description="Final over peak learning rate.")
    warmup_epochs: NotNegative = Field(
        default=0.0, description="Linear rise to the peak, in epochs."
    )
    label_smoothing: Share = Field(
        default=0.0, description="Probability mass spread over all classes."
    )
    mixup: NotNegative = Field(default=0.0, description="Mixup alpha; 0: off.")
    cutmix: NotNegative = Field(default=0.0, description="CutMix alpha; 0: off.")
    augment: Augment = Field(
        default="tutorial",
        description="`tutorial` (random crop and flip), `plain` (none), or a timm auto_augment "
        "policy on top of crop and flip, such as rand-m9-mstd0.5-inc1.",
    )
    reprob: ShareOrAll = Field(default=0.0, description="Probability of random erasing.")
    ema: SomeShare | None = Field(
        default=None,
        description="Decay of a moving average of the weights; the better one is kept.",
    )
    clip_grad: Positive | None = Field(default=None, description="Largest gradient norm.")
    accumulate: Count = Field(default=1, description="Batches per optimizer step.")
    blocks: Count | None = Field(
        default=None,
        description="Train only the last K blocks, the final norm and the head (mode full).",
    )
    views: Count | Literal["online"] = Field(
        default="online",
        description="With train.blocks: augmented views per photograph whose activations before "
        "the last K blocks are kept; 1: the plain transform; `online`: augment anew in every "
        "epoch, through the whole model.",
    )
    activations_gb: Positive = Field(
        default=8.0, description="Disk that kept activations may take, in GB of 10^9 bytes."
    )
    pictures_gb: NotNegative = Field(
        default=2.0,
        description="Memory for photographs that stay decoded from the first epoch on, where each "
        "epoch augments anew, in GB of 10^9 bytes; 0: none.",
    )
    tune: Literal["all", "lora", "bitfit", "norm"] = Field(
        default="all",
        description="What is trained beside the head (mode full): `all`, `lora` (low-rank "
        "adapters, merged into the weights at the end), `bitfit` (biases) or `norm` (LayerNorms).",
    )
    lora_rank: Count = Field(default=8, description="Rank of the adapters.")
    lora_alpha: Positive = Field(default=16.0, description="The adapters count alpha / rank times.")
    lora_on: Adapted = Field(
        default=("qkv", "proj", "fc1", "fc2"), description="Layers of a block that get adapters."
    )
    init_head: Literal["fresh", "zero", "probe"] = Field(
        default="fresh", description="The head starts at random, at zero, or from a linear probe."
    )
    workers: Tally | Auto = Field(
        default="auto", description="Processes that decode photographs; 0: none."
    )
    amp: Literal["auto", "bf16", "fp16", "none"] = Field(
        default="auto", description="Mixed precision; `auto`: bf16 where the device has it."
    )
    compile: Flag | Literal["auto", "reduce-overhead"] = Field(
        default="auto",
        description="torch.compile; `auto`: if it pays off; `reduce-overhead`: with CUDA graphs, "
        "for batches so small that the processor cannot launch their kernels fast enough.",
    )
    patience: Count | None = Field(
        default=None, description="Stop after so many epochs without gain."
    )
    class_weights: Literal["none", "balanced"] = Field(
        default="none", description="Weight of rare classes in the loss."
    )
    sampling: Literal["natural", "balanced"] = Field(
        default="natural",
        description="Photographs of an epoch: each once, or every class equally often.",
    )
    grad_checkpointing: Flag = Field(
        default=False, description="Less memory for more time (mode full)."
    )
    patch_drop: Share = Field(
        default=0.0, description="Share of patches left out in training (full)."
    )
    checkpoint_minutes: NotNegative = Field(
        default=5.0,
        description="Most time between checkpoints; each epoch ends with one, unless writing them "
        "takes over 5 % of the time; 0: after every step.",
    )


class ProbeSpec(Section):
    """Mode probe: a linear model on frozen features, its strength chosen on val."""

    kind: Literal["logistic", "ridge"] = Field(default="logistic", description="The solver.")
    strengths: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=1000)] = Field(
        default=STRENGTHS, description="Inverse regularisation strengths (C) to choose from."
    )
    refit: Flag = Field(
        default=False, description="Solve again on train + val with the chosen strength."
    )
    tol: Positive = Field(default=1e-6, description="Gradient norm at which a solve has converged.")
    max_iter: Count = Field(default=1000, description="Iterations after which a solve gives up.")


class LadderSpec(Section):
    """Mode ladder: from cheap to dear, as long as it is worth it."""

    steps: Steps = Field(
        default=("knn", "ridge", "logistic", "head"), description="Methods, in order of their cost."
    )
    stop: Flag = Field(default=True, description="Stop when a step's gain is not distinguishable.")


class TrustSpec(Section):
    """What is said about the numbers."""

    calibrate: Flag = Field(default=True, description="Fit a temperature on unseen photographs.")
    suspects: Flag = Field(default=True, description="Rank labels that look wrong.")
    learning_curve: Flag = Field(
        default=True, description="Estimate the gain from more photographs."
    )
    audit: Flag = Field(
        default=True,
        description="Tell of near-duplicates across splits; folds keep them together in any case.",
    )
    max_error: SomeShare | None = Field(
        default=None, description="Error allowed on accepted photographs; below: `I don't know`."
    )
    foreign_alarms: SomeShare = Field(
        default=0.05,
        description="Share of ordinary photographs that predict may call unlike the training ones.",
    )
    bootstrap: Count = Field(default=1000, description="Bootstrap draws for intervals.")
    head_seeds: Tally = Field(
        default=10,
        description="Heads for the seed band: trained from other seeds, or solved on other draws "
        "of train and val; 0: none.",
    )


class ReportSpec(Section):
    """How much the report page shows."""

    gallery: Tally = Field(default=24, description="Mistakes shown.")
    thumbnail: Annotated[int, Strict(), Field(ge=16, le=1024)] = Field(
        default=160, description="Side of a thumbnail in pixels."
    )
    max_images: Tally = Field(default=500, description="Photographs inside the page at most.")
    csv_safe: Flag = Field(
        default=False, description="Disarm text in CSV files that a spreadsheet would compute."
    )


class ExportSpec(Section):
    """What the model folder looks like."""

    as_timm: Flag = Field(
        default=False,
        description="Name timm's own architecture, so that plain timm loads the folder.",
    )


class OfflineModel(Section):
    """Model to use when the wanted weights are neither cached nor reachable."""

    name: Text = Field(default="vitflower_s14", description="As model.name.")
    weights: Text = Field(default="bundled", description="As model.weights.")


class OfflineData(Section):
    """Data to use when the wanted download is neither cached nor reachable."""

    root: Text = Field(default="sample:flowers", description="As data.root.")


class OfflineSpec(Section):
    """Visible fallback; a user's own folder or weights file is never replaced."""

    model: OfflineModel | None = Field(
        default=None, description="Fallback model; null: an error instead."
    )
    data: OfflineData | None = Field(
        default=None, description="Fallback data; null: an error instead."
    )


@dataclass(frozen=True)
class Origin:
    """Where a recipe came from; not part of what it says."""

    text: str = ""
    path: Path | None = None
    overrides: tuple[str, ...] = ()
    places: dict[str, str] = field(default_factory=dict)


class Recipe(Section):
    """Everything a run needs to know."""

    schema_version: Annotated[int, Strict(), Field(ge=1)] = Field(
        default=SCHEMA_VERSION, description="Version of these keys."
    )
    name: RunName = Field(
        default="recipe", description="Run folder's name; default: the file's name."
    )
    mode: Literal["head", "full", "probe", "ladder"] = Field(
        default="head",
        description="`head`: train the head on a frozen backbone; `full`: train (the last blocks "
        "of) the backbone too; `probe`: solve a linear model; `ladder`: one after the other.",
    )
    seed: Seed = Field(default=0, description="Every random choice follows from it.")
    device: Device = Field(default="auto", description="`auto`: cuda, then mps, then cpu.")
    output: Folder | None = Field(default=None, description="Folder for runs; null: runs/ here.")
    data: DataSpec = DataSpec()
    model: ModelSpec = ModelSpec()
    head: HeadSpec = HeadSpec()
    train: TrainSpec = TrainSpec()
    probe: ProbeSpec = ProbeSpec()
    ladder: LadderSpec = LadderSpec()
    trust: TrustSpec = TrustSpec()
    report: ReportSpec = ReportSpec()
    export: ExportSpec = ExportSpec()
    offline: OfflineSpec = OfflineSpec()

    _origin: Origin = PrivateAttr(default_factory=Origin)

    def __eq__(self, other: object) -> bool:
        """Equal when they say the same, wherever they came from."""
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    @property
    def text(self) -> str:
        """The file as it was written."""
        return self._origin.text

    @property
    def path(self) -> Path | None:
        """The file, absolute; None when parsed from text."""
        return self._origin.path

    @property
    def overrides(self) -> tuple[str, ...]:
        """The command line's `a.b=c`, as given."""
        return self._origin.overrides

    def place(self, key: str) -> str:
        """Where `train.lr` was set, for a fault: `file:line:col: train.lr` or `command line: ...`.

        Args:
            key: Dotted; one that was left to its default gives `default: train.lr`.
        """
        return self._origin.places.get(key, f"default: {key}")


# --- reading the declarations -------------------------------------------------------------------


def section_at(key: Sequence[str | int]) -> type[Section] | None:
    """The section at a key path such as ("offline", "data")."""
    section: type[Section] | None = Recipe
    for part in key:
        info = section.model_fields.get(str(part)) if section else None
        section = section_of(info.annotation) if info else None
    return section


def leaves(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key below a section, with its declaration, in order."""
    for name, info in section.model_fields.items():
        inner = section_of(info.annotation)
        if inner is None:
            yield prefix + name, info
        else:
            yield from leaves(inner, f"{prefix}{name}.")


@cache
def all_keys() -> tuple[str, ...]:
    """Every key of a recipe, dotted."""
    return tuple(key for key, _ in leaves(Recipe))
