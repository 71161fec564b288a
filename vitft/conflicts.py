"""Keys of a recipe that are right one by one and cannot go together.

Only what cannot be: an option that would be ignored in silence, or that chooses from nothing. What
is merely unwise is the reader's to try. A section that another mode would use is no fault, since
one recipe may serve several modes; that nothing acts on it is said.
"""

from collections.abc import Iterator
from typing import Any

from vitft.errors import Fault
from vitft.schema import Recipe, TrainSpec
from vitft.strict_yaml import write

OURS = {  # keywords of timm.create_model that vitft sets -> where a recipe says the same
    "num_classes": "the classes found in data.root",
    "in_chans": "photographs have three channels",
    "pretrained": "model.weights",
    "pretrained_cfg": "model.weights",
    "pretrained_cfg_overlay": "model.weights",
    "pretrained_strict": "loading is always strict",
    "checkpoint_path": "model.weights",
    "model_name": "model.name",
    "drop_rate": "model.drop_rate",
    "drop_path_rate": "model.drop_path_rate",
    "global_pool": "model.global_pool",
    "embed": "model.embed.backbone",
    "embed_stage": "model.embed.stage",
}
Clash = tuple[str, str, str, str]  # key, other key, why, fix


def found(r: Recipe) -> Iterator[Fault]:
    """A fault for every pair that cannot go together, at the place of its first key."""
    for a, b, why, fix in (
        *_frozen(r),
        *_views(r),
        *_tail(r),
        *_splits(r),
        *_balance(r),
        *_others(r),
    ):
        text = f"{_told(r, a)} cannot go with {_told(r, b)}: {why}"
        yield Fault("recipe.conflict", r.place(a), text, fix)


def idle(r: Recipe) -> tuple[str, ...]:
    """A sentence for every section of which keys that are not at their defaults act on nothing.

    A default may be written anywhere, as in the recipe that a run leaves behind.
    """
    told = []
    for section, busy, why, fix in _unread(r):
        own = getattr(r, section)
        fields = type(own).model_fields.items()
        keys = [k for k, f in fields if k not in busy and getattr(own, k) != f.default]
        if keys:
            names = ", ".join(f"{section}.{k}" for k in keys)
            told.append(
                f"nothing acts on {names} in mode: {r.mode}, where {why}; "
                f"set {fix}, or remove {'it' if len(keys) == 1 else 'them'}"
            )
    return tuple(told)


def _unread(r: Recipe) -> Iterator[tuple[str, set[str], str, str]]:
    """Section, its keys that act in any case, why the others do not, and where they would."""
    steps = set(r.ladder.steps) if r.mode == "ladder" else {r.mode}
    if not steps & {"head", "blocks", "full"}:
        yield "train", {"workers"}, "no head is trained", "mode: head"
    if r.mode in ("probe", "full"):
        yield "head", {"feature_dtype", "precision"}, "a head learns from no views", "mode: head"
    if r.mode in ("head", "full") and r.train.init_head != "probe":
        yield "probe", set(), "no head is solved", "mode: probe, or train.init_head: probe"
    if r.mode != "ladder":
        yield "ladder", set(), "there are no steps", "mode: ladder"


def _told(r: Recipe, key: str) -> str:
    value: Any = r
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return f"{key}: {write(value)}"


def _frozen(r: Recipe) -> Iterator[Clash]:
    """Backbone options in a mode that leaves the backbone alone."""
    tuned = {"blocks", "full"} & set(r.ladder.steps) if r.mode == "ladder" else r.mode == "full"
    backbone = (
        ("train.blocks", r.train.blocks),
        ("train.layer_decay", r.train.layer_decay),
        ("train.grad_checkpointing", r.train.grad_checkpointing),
        ("train.patch_drop", r.train.patch_drop),
        ("train.tune", r.train.tune != "all"),
        ("model.drop_path_rate", r.model.drop_path_rate),
    )
    for key, value in backbone:
        if value and not tuned:
            yield key, "mode", "the backbone is frozen", f"set mode: full, or remove {key}"
    if r.mode == "ladder" and "blocks" in r.ladder.steps and r.train.blocks is None:
        yield "ladder.steps", "train.blocks", "how many blocks is not said", "set train.blocks: 2"


def _views(r: Recipe) -> Iterator[Clash]:
    """Augmentation of photographs where the head sees cached features only."""
    views, t = r.head.views, r.train
    if r.mode == "head" and views != "online":
        yield from _kept("head.views", views, t)


def _tail(r: Recipe) -> Iterator[Clash]:
    """The same where the last blocks see kept activations only."""
    t = r.train
    if t.views == "online":
        return
    if t.blocks is None:
        why = "only activations before the last blocks can be kept"
        yield "train.views", "train.blocks", why, "set train.blocks: 2, or train.views: online"
    if t.patch_drop:
        why = "the patches of kept activations are all there"
        yield "train.patch_drop", "train.views", why, "set train.patch_drop: 0"
    if t.grad_checkpointing:
        why = "the few blocks behind kept activations are run as they are"
        fix = "set train.grad_checkpointing: false"
        yield "train.grad_checkpointing", "train.views", why, fix
    yield from _kept("train.views", t.views, t)


def _kept(name: str, views: int, t: TrainSpec) -> Iterator[Clash]:
    """What kept views of single photographs cannot have."""
    for key, value in (("train.mixup", t.mixup), ("train.cutmix", t.cutmix)):
        if value:
            what = "features" if name == "head.views" else "activations"
            why = f"cached {what} come from one photograph each"
            yield key, name, why, f"set {name}: online, or {key}: 0"
    policy = t.augment not in ("tutorial", "plain")
    for key, active in (("train.reprob", t.reprob > 0), ("train.augment", policy)):
        if views == 1 and active:
            why = "one view is the plain transform, nothing is random"
            yield key, name, why, f"set {name}: 4, or online"
    if views > 1 and t.augment == "plain" and t.reprob == 0:
        yield name, "train.augment", "all views would be equal", f"set {name}: 1"


def _splits(r: Recipe) -> Iterator[Clash]:
    """Shares that leave nothing to learn from or to choose on."""
    d = r.data
    if d.split in ("auto", "stratified") and d.val + d.test >= 1:
        yield "data.val", "data.test", "nothing is left to learn from", "let them sum to below 1"
    if d.split == "tutorial" and d.group is not None:
        fix = "set data.split: stratified, or data.group: null"
        yield "data.group", "data.split", "its draw by file name cannot keep groups together", fix
    if d.split == "stratified" and d.val == 0:
        chooses = (
            ("train.patience", r.mode in ("head", "full") and r.train.patience is not None),
            ("mode", r.mode == "ladder"),
            ("probe.strengths", r.mode == "probe" and len(r.probe.strengths) > 1),
        )
        for key, wrong in chooses:
            if wrong:
                yield key, "data.val", "it chooses on validation photographs", "set data.val: 0.15"


def _balance(r: Recipe) -> Iterator[Clash]:
    """Rare classes made to count more, twice over or where nothing listens."""
    t = r.train
    if t.sampling == t.class_weights == "balanced":
        why = "rare classes would count twice over"
        yield "train.sampling", "train.class_weights", why, "keep one of the two"
    for key, value in (("sampling", t.sampling), ("class_weights", t.class_weights)):
        if r.mode == "probe" and value == "balanced":
            fix = f"set mode: head, or remove train.{key}"
            yield f"train.{key}", "mode", "a solved head counts every photograph alike", fix


def _others(r: Recipe) -> Iterator[Clash]:
    t, options, size = r.train, r.model.options, r.data.image_size
    if t.warmup_epochs > t.epochs:
        fix = "let the warm-up be shorter than the run"
        yield "train.warmup_epochs", "train.epochs", "the peak rate would never come", fix
    if r.model.sha256 is not None and r.model.weights == "none":
        yield "model.sha256", "model.weights", "there is no file to check", "remove model.sha256"
    for key in ("lora_rank", "lora_alpha", "lora_on"):
        if getattr(t, key) != TrainSpec.model_fields[key].default and t.tune != "lora":
            fix = f"set train.tune: lora, or remove train.{key}"
            yield f"train.{key}", "train.tune", "there are no adapters", fix
    if r.model.embed is not None and "patch_size" in options:
        fix = "keep model.embed.patch, in cells of the map"
        yield "model.options.patch_size", "model.embed.patch", "they are one thing", fix
    for key in sorted(options.keys() & OURS):
        fix = f"remove it; say it by the keys of model: and data: ({OURS[key]})"
        yield f"model.options.{key}", "model.name", "vitft sets this keyword itself", fix
    if size is not None and options.get("img_size", size) != size:
        fix = "keep data.image_size alone"
        yield "model.options.img_size", "data.image_size", "they differ", fix
