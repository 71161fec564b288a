"""ViT checkpoints by others, recognised from their names and rewritten to timm's.

In: tensors by name, as read. Out: the same under timm's names, with a reason for every one left
out; then positions, patch kernel and colour channels adapted to one model, with a note for each.
Nothing is guessed: a layout is a table below, and names outside its table stay as they are, so
that the check which follows can name them.

Shapes: see `vit`. The forms of tensors (`how`) are those of the table's library.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor

from vitft.errors import WeightsError
from vitft.kin import OWN_MODEL, occurs, relative

Grid = tuple[int, int]  # height, width in patches
Rule = tuple[str, str] | tuple[str, str, str]  # pattern, timm's name, form of the tensor

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda t: t,
    "T": lambda t: t.T,  # [in, out] -> [out, in]
    "HWIO": lambda t: t.permute(3, 2, 0, 1),  # JAX convolution
    "DHK": lambda t: t.flatten(1).T,  # JAX query, key, value: [D, H, K] -> [H K, D]
    "HKD": lambda t: t.flatten(0, 1).T,  # JAX attention output: [H, K, D] -> [D, H K]
    "flat": lambda t: t.flatten(),  # JAX bias [H, K]
    "token": lambda t: t.reshape(1, 1, -1),
    "tokens": lambda t: t.reshape(1, -1, t.shape[-1]),
}


@dataclass(frozen=True)
class Layout:
    """How one library names a ViT's tensors.

    Attributes:
        name: Shown to people.
        anchors: Patterns that must all occur; group `p` of the first is the prefix.
        rules: Name after the prefix -> timm's name and the tensor's form.
        outer: The same for names outside the prefix, such as a classifier.
        drop: Name after the prefix -> why no image classifier needs it.
        options: What `timm.create_model` must be told because no tensor shows it.
    """

    name: str
    anchors: tuple[str, ...]
    rules: tuple[Rule, ...] = ()
    outer: tuple[Rule, ...] = ()
    drop: tuple[tuple[str, str], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Converted:
    """A checkpoint under timm's names.

    Attributes:
        layout: Name of the table, or "" where none applied.
        prefix: Taken off the front of every name.
        state: timm's name -> tensor.
        dropped: The file's name -> why it was left out.
        options: See `Layout`.
    """

    layout: str
    prefix: str
    state: dict[str, Tensor]
    dropped: dict[str, str]
    options: Mapping[str, Any]


# --- tables --------------------------------------------------------------------------------------

WB = r"\.(weight|bias)"
P = r"(?P<p>(?:.*\.)?)"
MASK = "mask token of pre-training"
DECODER = "decoder of pre-training"
PROJECTION = "projection head of self-supervised pre-training"
DISTILLED = "distillation head, whose answer DeiT averages with the head's"

TIMM = Layout(
    name="timm",
    anchors=(P + r"patch_embed\.proj\.weight", r"{p}blocks\.0\.(?:0\.)?attn\.qkv\.weight"),
    rules=(
        (r"blocks\.\d+\.(\d+)\.(.+)", r"blocks.\1.\2"),  # DINOv2 trains its blocks in chunks
        (r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),  # DeiT-III
        (r"register_tokens", "reg_token"),  # DINOv2
    ),
    outer=((r".*visual\.head\.proj\.weight", "head.weight"),),  # OpenCLIP around a timm model
    drop=(
        (r"mask_token", MASK),
        (r"decoder_.+|decoder\..+", DECODER),
        (r"head_dist\..+", DISTILLED),
        (r"head\.(mlp|last_layer|\d+)\..+|(dino|ibot)_head\..+|predictor\..+", PROJECTION),
    ),
)

_HF_BLOCK = r"(?:encoder\.layer|encoder\.layers|layers|layer)\.(\d+)\."
HUGGING_FACE = Layout(
    name="Hugging Face transformers",
    anchors=(P + r"embeddings\.cls_token", r"{p}embeddings\.patch_embeddings\.projection\.weight"),
    rules=(
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.distillation_token", "dist_token"),
        (r"embeddings\.register_tokens", "reg_token"),
        (r"embeddings\.patch_embeddings\.projection" + WB, r"patch_embed.proj.\1"),
        (_HF_BLOCK + r"(?:layernorm_before|norm1)" + WB, r"blocks.\1.norm1.\2"),
        (_HF_BLOCK + r"(?:layernorm_after|norm2)" + WB, r"blocks.\1.norm2.\2"),
        (_HF_BLOCK + r"attention\.attention\.query" + WB, r"blocks.\1.attn.q.\2"),
        (_HF_BLOCK + r"attention\.attention\.key" + WB, r"blocks.\1.attn.k.\2"),
        (_HF_BLOCK + r"attention\.attention\.value" + WB, r"blocks.\1.attn.v.\2"),
        (_HF_BLOCK + r"attention\.output\.dense" + WB, r"blocks.\1.attn.proj.\2"),
        (_HF_BLOCK + r"attention\.([qkv])_proj" + WB, r"blocks.\1.attn.\2.\3"),  # transformers 5
        (_HF_BLOCK + r"attention\.o_proj" + WB, r"blocks.\1.attn.proj.\2"),
        (_HF_BLOCK + r"(?:intermediate\.dense|mlp\.fc1)" + WB, r"blocks.\1.mlp.fc1.\2"),
        (_HF_BLOCK + r"(?:output\.dense|mlp\.fc2)" + WB, r"blocks.\1.mlp.fc2.\2"),
        (_HF_BLOCK + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        (r"layernorm" + WB, r"norm.\1"),
        (r"pooler\.dense" + WB, r"pre_logits.fc.\1"),
    ),
    outer=((r"(?:cls_)?classifier" + WB, r"head.\1"),),
    drop=(
        (r"embeddings\.mask_token", MASK),
        (r"decoder\..+", DECODER),
        (r"distillation_classifier\..+", DISTILLED),
    ),
)

_CLIP_BLOCK = r"transformer\.resblocks\.(\d+)\."
CLIP = Layout(
    name="CLIP (OpenAI or OpenCLIP)",
    anchors=(
        r"(?P<p>(?:.*\.)?)class_embedding",
        r"{p}conv1\.weight",
        r"{p}transformer\.resblocks\.0\.attn\.in_proj_weight",
    ),
    rules=(
        (r"class_embedding", "cls_token", "token"),
        (r"positional_embedding", "pos_embed", "tokens"),
        (r"conv1" + WB, r"patch_embed.proj.\1"),
        (r"ln_pre" + WB, r"norm_pre.\1"),
        (_CLIP_BLOCK + r"ln_([12])" + WB, r"blocks.\1.norm\2.\3"),
        (_CLIP_BLOCK + r"attn\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
        (_CLIP_BLOCK + r"attn\.out_proj" + WB, r"blocks.\1.attn.proj.\2"),
        (_CLIP_BLOCK + r"mlp\.c_fc" + WB, r"blocks.\1.mlp.fc1.\2"),
        (_CLIP_BLOCK + r"mlp\.c_proj" + WB, r"blocks.\1.mlp.fc2.\2"),
        (_CLIP_BLOCK + r"ls_([12])\.gamma", r"blocks.\1.ls\2.gamma"),
        (r"ln_post" + WB, r"norm.\1"),
        (r"proj", "head.weight", "T"),
    ),
    options={"norm_eps": 1e-5},
)

_HF_CLIP_BLOCK = r"encoder\.layers\.(\d+)\."
HF_CLIP = Layout(
    name="CLIP (Hugging Face transformers)",
    anchors=(P + r"embeddings\.class_embedding", r"{p}embeddings\.patch_embedding\.weight"),
    rules=(
        (r"embeddings\.class_embedding", "cls_token", "token"),
        (r"embeddings\.position_embedding\.weight", "pos_embed", "tokens"),
        (r"embeddings\.patch_embedding" + WB, r"patch_embed.proj.\1"),
        (r"pre_layrnorm" + WB, r"norm_pre.\1"),  # their spelling
        (_HF_CLIP_BLOCK + r"layer_norm([12])" + WB, r"blocks.\1.norm\2.\3"),
        (_HF_CLIP_BLOCK + r"self_attn\.([qkv])_proj" + WB, r"blocks.\1.attn.\2.\3"),
        (_HF_CLIP_BLOCK + r"self_attn\.out_proj" + WB, r"blocks.\1.attn.proj.\2"),
        (_HF_CLIP_BLOCK + r"mlp\.fc([12])" + WB, r"blocks.\1.mlp.fc\2.\3"),
        (r"post_layernorm" + WB, r"norm.\1"),
    ),
    outer=((r"visual_projection\.weight", "head.weight"),),
    drop=((r"embeddings\.position_ids", "a table of numbers 0, 1, 2, ..."),),
    options={"norm_eps": 1e-5},
)

_TV_BLOCK = r"encoder\.layers\.encoder_layer_(\d+)\."
TORCHVISION = Layout(
    name="torchvision",
    anchors=(P + r"conv_proj\.weight", r"{p}encoder\.pos_embedding"),
    rules=(
        (r"class_token", "cls_token"),
        (r"encoder\.pos_embedding", "pos_embed"),
        (r"conv_proj" + WB, r"patch_embed.proj.\1"),
        (_TV_BLOCK + r"ln_([12])" + WB, r"blocks.\1.norm\2.\3"),
        (_TV_BLOCK + r"self_attention\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
        (_TV_BLOCK + r"self_attention\.out_proj" + WB, r"blocks.\1.attn.proj.\2"),
        (_TV_BLOCK + r"mlp\.(?:0|linear_1)" + WB, r"blocks.\1.mlp.fc1.\2"),
        (_TV_BLOCK + r"mlp\.(?:3|linear_2)" + WB, r"blocks.\1.mlp.fc2.\2"),
        (r"encoder\.ln" + WB, r"norm.\1"),
        (r"heads\.pre_logits" + WB, r"pre_logits.fc.\1"),
        (r"heads\.head" + WB, r"head.\1"),
    ),
)

_JAX_BLOCK = r"Transformer/encoderblock_(\d+)/"
_JAX_UNIT = r"block(\d+)/unit(\d+)/"  # of the hybrid's ResNet; both count from 1, see `_counted`
_UNIT = r"patch_embed.backbone.stages.\1.blocks.\2."
_JAX_ATTENTION = _JAX_BLOCK + r"MultiHeadDotProductAttention_[01]/"
JAX = Layout(
    name="Google JAX (vision_transformer or big_vision)",
    anchors=(r"(?P<p>(?:opt/target/|params/img/|params/)?)embedding/kernel",),
    rules=(
        (r"cls", "cls_token"),
        (r"embedding/kernel", "patch_embed.proj.weight", "HWIO"),
        (r"embedding/bias", "patch_embed.proj.bias"),
        (r"(?:Transformer/posembed_input/)?pos_embedding", "pos_embed", "tokens"),
        (_JAX_BLOCK + r"LayerNorm_0/scale", r"blocks.\1.norm1.weight"),
        (_JAX_BLOCK + r"LayerNorm_0/bias", r"blocks.\1.norm1.bias"),
        (_JAX_BLOCK + r"LayerNorm_[12]/scale", r"blocks.\1.norm2.weight"),  # 1: big_vision
        (_JAX_BLOCK + r"LayerNorm_[12]/bias", r"blocks.\1.norm2.bias"),
        (_JAX_ATTENTION + r"(q)uery/kernel", r"blocks.\1.attn.\2.weight", "DHK"),
        (_JAX_ATTENTION + r"(k)ey/kernel", r"blocks.\1.attn.\2.weight", "DHK"),
        (_JAX_ATTENTION + r"(v)alue/kernel", r"blocks.\1.attn.\2.weight", "DHK"),
        (_JAX_ATTENTION + r"(q)uery/bias", r"blocks.\1.attn.\2.bias", "flat"),
        (_JAX_ATTENTION + r"(k)ey/bias", r"blocks.\1.attn.\2.bias", "flat"),
        (_JAX_ATTENTION + r"(v)alue/bias", r"blocks.\1.attn.\2.bias", "flat"),
        (_JAX_ATTENTION + r"out/kernel", r"blocks.\1.attn.proj.weight", "HKD"),
        (_JAX_ATTENTION + r"out/bias", r"blocks.\1.attn.proj.bias"),
        (_JAX_BLOCK + r"MlpBlock_[03]/Dense_0/kernel", r"blocks.\1.mlp.fc1.weight", "T"),
        (_JAX_BLOCK + r"MlpBlock_[03]/Dense_0/bias", r"blocks.\1.mlp.fc1.bias"),
        (_JAX_BLOCK + r"MlpBlock_[03]/Dense_1/kernel", r"blocks.\1.mlp.fc2.weight", "T"),
        (_JAX_BLOCK + r"MlpBlock_[03]/Dense_1/bias", r"blocks.\1.mlp.fc2.bias"),
        (r"Transformer/encoder_norm/scale", "norm.weight"),
        (r"Transformer/encoder_norm/bias", "norm.bias"),
        (r"pre_logits/kernel", "pre_logits.fc.weight", "T"),
        (r"pre_logits/bias", "pre_logits.fc.bias"),
        (r"head/kernel", "head.weight", "T"),
        (r"head/bias", "head.bias"),
        (r"conv_root/kernel", "patch_embed.backbone.stem.conv.weight", "HWIO"),  # hybrid
        (r"gn_root/scale", "patch_embed.backbone.stem.norm.weight", "flat"),
        (r"gn_root/bias", "patch_embed.backbone.stem.norm.bias", "flat"),
        (_JAX_UNIT + r"conv(\d)/kernel", _UNIT + r"conv\3.weight", "HWIO"),
        (_JAX_UNIT + r"gn(\d)/scale", _UNIT + r"norm\3.weight", "flat"),
        (_JAX_UNIT + r"gn(\d)/bias", _UNIT + r"norm\3.bias", "flat"),
        (_JAX_UNIT + r"conv_proj/kernel", _UNIT + "downsample.conv.weight", "HWIO"),
        (_JAX_UNIT + r"gn_proj/scale", _UNIT + "downsample.norm.weight", "flat"),
        (_JAX_UNIT + r"gn_proj/bias", _UNIT + "downsample.norm.bias", "flat"),
    ),
)

LAYOUTS = (JAX, TORCHVISION, HUGGING_FACE, HF_CLIP, CLIP, TIMM)

CNN = "patch_embed.backbone."  # of a hybrid

# of several backbones in one file, the one that its authors evaluate
PREFERRED = ("teacher.", "base_encoder.", "target_encoder.", "encoder.", "visual.", "backbone.")


# --- from their names to timm's ------------------------------------------------------------------


def convert(
    state: Mapping[str, Tensor],
    own: Collection[str] = (),
    *,
    place: object = "checkpoint",
    says: str = "",
    model: str = "",
) -> Converted:
    """Rewrites a ViT checkpoint to timm's names; anything else comes back unchanged.

    Args:
        state: Name -> tensor, as read.
        own: Names of the model that will take them; what it has itself is never renamed.
        place: For messages.
        says: The file's name and header, where they may have to tell what names do not.
        model: timm's name of the model that will take them.

    Raises:
        WeightsError: `ckpt.layout`: a relative of ViT that this model family does not contain;
            `ckpt.ambiguous`: two backbones, and no rule to choose.
    """
    for layout in LAYOUTS:
        prefixes = _prefixes(layout, state)
        if prefixes:
            prefix = _preferred(prefixes, place)
            _refuse_relatives(state, {prefix + n for n in own}, says, model, place)
            return _rewrite(layout, prefix, state, own)
    return Converted("", "", dict(state), {}, {})


def _refuse_relatives(
    names: Iterable[str], own: Collection[str], says: str, model: str, place: object
) -> None:
    if found := relative(names, own, says=says, model=model):
        raise WeightsError.of("ckpt.layout", place, found.told, found.fix)


def _prefixes(layout: Layout, names: Iterable[str]) -> list[str]:
    first, *rest = layout.anchors
    names = set(names)
    found = sorted({m["p"] for name in names if (m := re.fullmatch(first, name))})
    return [p for p in found if all(occurs(r.replace("{p}", re.escape(p)), names) for r in rest)]


def _preferred(prefixes: list[str], place: object) -> str:
    if len(prefixes) == 1:
        return prefixes[0]
    for wanted in PREFERRED:
        chosen = [p for p in prefixes if f".{p}".endswith(f".{wanted}") or p.startswith(wanted)]
        if len(chosen) == 1:
            return chosen[0]
    text = f"holds several backbones: {', '.join(p or '(no prefix)' for p in prefixes)}"
    fix = "save the one you mean alone, without its prefix"
    raise WeightsError.of("ckpt.ambiguous", place, text, fix)


def _rewrite(
    layout: Layout, prefix: str, state: Mapping[str, Tensor], own: Collection[str]
) -> Converted:
    out: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    for name, tensor in _unstacked(prefix, state).items():
        inner = name[len(prefix) :] if name.startswith(prefix) else None
        if inner in own:
            out[str(inner)] = tensor
            continue
        reason = next((why for r, why in layout.drop if re.fullmatch(r, inner or name)), None)
        target = _apply(layout.outer, name) or (inner and _apply(layout.rules, inner))
        if reason is not None:
            dropped[name] = reason
        elif target:
            out[target[0]] = FORMS[target[1]](tensor)
        elif inner is not None:
            out[inner] = tensor
        else:
            dropped[name] = f"outside {prefix}"
    if layout is JAX:
        _count_from_zero(out)
    _fuse(out)
    if "head.weight" in out and "head.bias" not in out:  # CLIP projects without a bias
        out["head.bias"] = out["head.weight"].new_zeros(len(out["head.weight"]))
    title = _title(layout, prefix, state)
    return Converted(title, prefix, out, dropped, _untold(layout, title, state, out))


OPENAI = ("input_resolution", "context_length", "vocab_size")  # numbers in OpenAI's files alone


def _untold(
    layout: Layout, title: str, names: Collection[str], state: Mapping[str, Tensor]
) -> Mapping[str, Any]:
    """What the project that wrote the file built its model with, and no tensor shows."""
    options = dict(layout.options)
    if title == "DeiT-III":
        options["no_embed_class"] = True
    if "norm_pre.weight" in state:
        options["norm_eps"] = 1e-5  # every CLIP tower's, under whatever names
    if layout is CLIP and set(OPENAI) <= set(names):
        options["act_layer"] = "quick_gelu"
    table = state.get("pos_embed")
    small = table is not None and table.ndim == 3 and table.shape[2] == 384
    if table is not None and small and (title == "MoCo-v3" or _is_mocos(table)):
        options["num_heads"] = 12  # of 32, where DeiT's ViT-S has 6 of 64
    return options


def _is_mocos(table: Tensor) -> bool:
    """Whether positions [1, 1 + G * G, D] are MoCo-v3's, which stay as they were computed.

    Source: moco-v3 vits.py: sines and cosines of the row, then of the column, and 0 for the class.
    """
    side, quarter = math.isqrt(max(table.shape[1] - 1, 0)), table.shape[2] // 4
    if side * side + 1 != table.shape[1] or bool(table[:, 0].any()):
        return False
    steps = torch.arange(side, dtype=torch.float64).repeat_interleave(side)
    omega = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = steps[:, None] * omega, steps.view(side, side).T.reshape(-1, 1) * omega
    wanted = torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=1)
    return torch.allclose(table[0, 1:].double(), wanted, rtol=0, atol=2e-3)


def untold_activation(found: Converted) -> str:
    """What to look up where a file may have either of two activations; "" where it has GELU."""
    if "act_layer" in found.options:
        return ""
    if "norm_pre.weight" in found.state:
        return "OpenAI's weights need act_layer: quick_gelu, most of OpenCLIP's do not"
    if {"cls_token", "reg_token", "fc_norm.weight"}.isdisjoint(found.state):
        return "SigLIP 2's weights need act_layer: gelu_tanh"
    return ""


def _apply(rules: tuple[Rule, ...], name: str) -> tuple[str, str] | None:
    for pattern, target, *form in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(target), form[0] if form else ""
    return None


def _unstacked(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """big_vision may stack all blocks along a leading axis; this takes them apart."""
    stacked = f"{prefix}Transformer/encoderblock/"
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(stacked):
            out[name] = tensor
            continue
        for i, part in enumerate(tensor.unbind(0)):
            out[f"{prefix}Transformer/encoderblock_{i}/{name[len(stacked) :]}"] = part
    return out


def _fuse(state: dict[str, Tensor]) -> None:
    """Joins separate query, key and value projections to timm's one."""
    for name in [n for n in state if re.fullmatch(r"blocks\.\d+\.attn\.q\.(weight|bias)", n)]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in state for part in parts):
            fused = torch.cat([state.pop(part) for part in parts])
            state[name.replace(".attn.q.", ".attn.qkv.")] = fused


def _count_from_zero(state: dict[str, Tensor]) -> None:
    """Google counts a ResNet's stages and units from 1; a hybrid of a stem alone has neither."""
    stages = re.compile(r"(patch_embed\.backbone\.stages)\.(\d+)\.blocks\.(\d+)\.(.+)")
    found = {name: m for name in state if (m := stages.fullmatch(name))}
    stem = {n: n for n in state if n.startswith("patch_embed.backbone.stem.") and not found}
    moved = {n: f"{m[1]}.{int(m[2]) - 1}.blocks.{int(m[3]) - 1}.{m[4]}" for n, m in found.items()}
    moved |= {n: n.replace(".stem.", ".", 1) for n in stem}
    taken = {new: state.pop(old) for old, new in moved.items()}
    state.update(taken)


def _title(layout: Layout, prefix: str, names: Iterable[str]) -> str:
    """The layout's name, closer where the names tell which project wrote the file."""
    if layout is not TIMM:
        hybrid = layout is JAX and any("conv_root/" in name for name in names)
        return layout.name + ", hybrid" * hybrid
    signs = (
        (r".*visual\.trunk\..+", "OpenCLIP around a timm ViT"),
        (r".*base_encoder\..+", "MoCo-v3"),
        (r".*decoder_pred\..+", "MAE, pre-training"),
        (r".*blocks\.0\.gamma_1", "DeiT-III"),
        (r".*dist_token", "DeiT, distilled"),
        (r".*register_tokens", "DINOv2 with registers"),
        (r".*mask_token", "DINOv2"),
        (r".*(last_layer|head\.mlp)\..+", "DINO"),
        (r".*patch_embed\.backbone\..+", "timm, hybrid"),
        (r".*pre_logits\.fc\..+", "timm (historical, with pre_logits)"),
        (r".*norm_pre\..+", "timm (CLIP tower)"),
        (r".*blocks\.0\.ls1\.gamma", "timm (LayerScale, as DINOv2)"),
    )
    names = list(names)
    for pattern, title in signs:
        if any(re.fullmatch(pattern, name) for name in names):
            return title
    return layout.name


# --- what the tensors say about the model --------------------------------------------------------


@dataclass(frozen=True)
class Anatomy:
    """Sizes of a ViT, read from tensors under timm's names.

    Attributes:
        gated: The MLP's first layer has twice the rows that its second reads (SwiGLU).
        patch: Height and width of the patch, px; (0, 0) for an old linear patch embedding.
        positions: Rows of the position table; 0 without one.
        registers: Tokens besides the class token that take part.
        classes: Rows of the head; 0 without one.
        cnn: Blocks per stage of a hybrid's ResNet, () for its stem alone; None without a CNN, or
            for one that is no such ResNet.
        has_cnn: The patches are cut from a CNN's feature map; `patch` counts cells then.
    """

    width: int
    depth: int
    hidden: int
    gated: bool
    patch: tuple[int, int]
    in_chans: int
    positions: int
    class_token: bool
    registers: int
    layer_scale: bool
    pre_norm: bool
    fc_norm: bool
    qkv_bias: bool
    representation: int
    classes: int
    cnn: tuple[int, ...] | None = None
    has_cnn: bool = False

    @property
    def words(self) -> str:
        """Such as `12 blocks of width 768, patch 16`."""
        on = " of a CNN's map" if self.has_cnn else ""
        return f"{self.depth} blocks of width {self.width}, patch {self.patch[0]}{on}"


def anatomy(state: Mapping[str, Any]) -> Anatomy | None:
    """Reads sizes from shapes (tensors or anything with `.shape`); None where it is no ViT."""
    kernel, fc1 = state.get("patch_embed.proj.weight"), state.get("blocks.0.mlp.fc1.weight")
    if kernel is None or fc1 is None:
        return None
    blocks = [int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))]
    flat = len(kernel.shape) != 4

    def rows(name: str, axis: int = 0) -> int:
        return int(state[name].shape[axis]) if name in state else 0

    return Anatomy(
        width=int(kernel.shape[0]),
        depth=max(blocks) + 1,
        hidden=int(fc1.shape[0]),
        gated="blocks.0.mlp.fc2.weight" in state
        and 2 * int(state["blocks.0.mlp.fc2.weight"].shape[1]) == int(fc1.shape[0]),
        patch=(0, 0) if flat else (int(kernel.shape[2]), int(kernel.shape[3])),
        in_chans=_colours(state, kernel),
        positions=rows("pos_embed", 1),
        class_token="cls_token" in state,
        registers=rows("reg_token", 1) + rows("dist_token", 1),
        layer_scale="blocks.0.ls1.gamma" in state,
        pre_norm="norm_pre.weight" in state,
        fc_norm="fc_norm.weight" in state,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        representation=rows("pre_logits.fc.weight"),
        classes=rows("head.weight"),
        cnn=_resnet(state),
        has_cnn=any(name.startswith("patch_embed.backbone.") for name in state),
    )


def _colours(state: Mapping[str, Any], kernel: Any) -> int:
    """Colour channels; 0 for an old linear patch embedding. A hybrid's CNN meets them first."""
    kernels = (t for name, t in state.items() if name.startswith(CNN) and len(t.shape) == 4)
    first = next(kernels, kernel)
    return int(first.shape[1]) if len(first.shape) == 4 else 0


def _resnet(names: Iterable[str]) -> tuple[int, ...] | None:
    """Blocks per stage of the BiT ResNet under a hybrid's patches."""
    names = [n.removeprefix(CNN) for n in names if n.startswith(CNN)]
    units = {
        m.group(1, 2) for n in names if (m := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.norm3", n))
    }
    if not units:
        return () if {"conv.weight", "norm.weight"} <= set(names) else None
    count = max(int(stage) for stage, _ in units) + 1
    return tuple(sum(int(stage) == i for stage, _ in units) for i in range(count))


# --- from one size to another --------------------------------------------------------------------


class _Module(Protocol):
    def state_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Adapted:
    """A converted checkpoint in the sizes of one model, with what was done to it."""

    state: dict[str, Tensor]
    dropped: dict[str, str]
    notes: tuple[str, ...]


def is_vit(model: _Module) -> bool:
    """Whether the model carries timm's ViT names and says where its positions begin."""
    names = model.state_dict()
    named = "patch_embed.proj.weight" in names and "blocks.0.attn.qkv.weight" in names
    return named and hasattr(model, "no_embed_class")  # CaiT, SAM and Hiera do not


def adapt(
    state: Mapping[str, Tensor],
    model: Any,
    *,
    pos_grid: Grid | None = None,
    no_embed_class: bool = False,
    place: object = "checkpoint",
) -> Adapted:
    """Brings positions, patch kernel and channels to the sizes of a ViT, ours or timm's.

    Args:
        state: timm's name -> tensor.
        model: The ViT that will take them.
        pos_grid: Height and width of the file's position grid, where it is not square.
        no_embed_class: The file's layout has no position for the class token.
        place: For messages.

    Raises:
        WeightsError: `ckpt.pos_grid`: the position table has no such grid.
    """
    out, dropped, notes = dict(state), dict[str, str](), list[str]()
    _adapt_kernel(out, model, notes)
    _adapt_stem(out, model, notes)
    _adapt_registers(out, model, notes)
    if "pos_embed" in out:
        split = _Split(pos_grid, no_embed_class or model.no_embed_class, place)
        _adapt_positions(out, model, split, dropped, notes)
    _leave_out_representation(out, model, dropped)
    return Adapted(out, dropped, tuple(notes))


def _adapt_kernel(state: dict[str, Tensor], model: Any, notes: list[str]) -> None:
    name = "patch_embed.proj.weight"
    own, kernel = model.state_dict(), state.get(name)
    want = own[name].shape  # [D, channels, patch, patch]
    on_map = any(n.startswith(CNN) for n in own)
    if kernel is None or on_map != any(n.startswith(CNN) for n in state):
        return  # a kernel over colours is none over a CNN's map; the check will say so
    if kernel.ndim == 2 and kernel.shape[1] == math.prod(want[1:]):
        kernel = kernel.reshape(-1, *want[1:])  # before 2021 timm wrote it as a matrix
    if kernel.ndim != 4:
        return
    if kernel.shape[2:] != want[2:]:
        old, new = _size(kernel.shape[2:]), _size(want[2:])
        notes.append(f"patch kernel resampled from {old} to {new} px")
        kernel = resample_patch_embed(kernel.float(), list(want[2:])).to(kernel.dtype)
    if kernel.shape[1] != want[1] and not on_map:
        notes.append(f"patch kernel brought from {kernel.shape[1]} to {want[1]} colour channels")
        kernel = adapt_input_conv(want[1], kernel, base_chans=kernel.shape[1])
    state[name] = kernel


def _adapt_stem(state: dict[str, Tensor], model: Any, notes: list[str]) -> None:
    """A hybrid meets the colours in its CNN's first kernel."""
    own = model.state_dict()
    first = next((n for n, t in own.items() if n.startswith(CNN) and t.ndim == 4), None)
    kernel = state.get(first or "")
    if first is None or kernel is None or kernel.ndim != 4:
        return
    have, want = int(kernel.shape[1]), int(own[first].shape[1])
    if have != want:
        notes.append(f"first kernel of the CNN brought from {have} to {want} colour channels")
        state[first] = adapt_input_conv(want, kernel, base_chans=have)


def _adapt_registers(state: dict[str, Tensor], model: Any, notes: list[str]) -> None:
    """A distillation token is one more token that takes part: a register, as far as ViT goes."""
    if "dist_token" in state and getattr(model, "num_reg_tokens", 0) == 1:
        state["reg_token"] = state.pop("dist_token")
        notes.append("the distillation token became the register token")


def _adapt_positions(
    state: dict[str, Tensor],
    model: Any,
    split: "_Split",
    dropped: dict[str, str],
    notes: list[str],
) -> None:
    table = state["pos_embed"]  # [1, rows, D]
    known = model.state_dict()
    own = known.get("pos_embed")
    if own is None:
        dropped["pos_embed"] = "the model has no position embedding"
        del state["pos_embed"]
        return
    if getattr(model, "pos_embed_kind", "learned") == "sincos2d":
        dropped["pos_embed"] = "the model computes its sine-cosine positions"
        state["pos_embed"] = own
        return
    if table.ndim != 3 or table.shape[2] != own.shape[2]:
        return  # another width; the check will say so
    if ("cls_token" in state) != ("cls_token" in known):
        return  # so will it here
    new = tuple(model.patch_embed.grid_size)
    prefix, old = split.of(state, table.shape[1], new)
    want = 0 if model.no_embed_class else model.num_prefix_tokens
    rows, grid = table[:, :prefix], table[:, prefix:]
    rows = _adapt_prefix(state, rows, want, notes)
    if old != new:
        notes.append(f"positions resampled from {_size(old)} to {_size(new)} (bicubic)")
        grid = resample_abs_pos_embed(grid, list(new), list(old), num_prefix_tokens=0)
    state["pos_embed"] = torch.cat([rows, grid], dim=1)


@dataclass(frozen=True)
class _Split:
    """What is known about a position table besides its number of rows."""

    pos_grid: Grid | None
    no_embed_class: bool
    place: object

    def of(self, state: Mapping[str, Tensor], rows: int, new: tuple[int, int]) -> tuple[int, Grid]:
        """How many rows belong to prefix tokens, and the grid that the others form.

        13 x 13 rows may also be a class token and 12 x 14 patches: without a word to the contrary
        the class token has a row, as in the paper.
        """
        first = int("cls_token" in state)
        extra = sum(state[k].shape[1] for k in ("reg_token", "dist_token") if k in state)
        for prefix in dict.fromkeys((first, first + extra, 0 if self.no_embed_class else first)):
            patches = rows - prefix
            side = math.isqrt(max(patches, 0))
            if self.pos_grid is not None:
                if patches == self.pos_grid[0] * self.pos_grid[1]:
                    return prefix, self.pos_grid
            elif patches == new[0] * new[1] and new[0] != new[1]:
                return prefix, new  # the model's own grid
            elif patches and side * side == patches:
                return prefix, (side, side)
        tried = "a square" if self.pos_grid is None else f"a grid of {_size(self.pos_grid)}"
        text = f"its {rows} rows of positions less {first} for the class token are not {tried}"
        fix = "say what grid it is: pos_grid=(height, width) in patches"
        if math.isqrt(rows) ** 2 == rows:
            fix += "; or, if no row is the class token's (DeiT-III): no_embed_class: true"
        raise WeightsError.of("ckpt.pos_grid", self.place, text, fix)


def _adapt_prefix(state: dict[str, Tensor], rows: Tensor, want: int, notes: list[str]) -> Tensor:
    """Positions of prefix tokens: given to the tokens themselves, or zero; exact both ways."""
    have = rows.shape[1]
    if want == 0 and have:
        state["cls_token"] = state["cls_token"] + rows[:, :1]
        if have > 1 and "reg_token" in state:
            state["reg_token"] = state["reg_token"] + rows[:, 1:]
        notes.append("positions of class and register tokens added to the tokens themselves")
        return rows[:, :0]
    if have < want:
        notes.append(f"{want - have} prefix token(s) had no position and got zero")
        return torch.cat([rows, rows.new_zeros(1, want - have, rows.shape[2])], dim=1)
    return rows


def _leave_out_representation(
    state: dict[str, Tensor], model: Any, dropped: dict[str, str]
) -> None:
    """The paper drops this layer for transfer; a head that was trained on it goes with it."""
    names = [n for n in state if n.startswith("pre_logits.")]
    if not names or any(n.startswith("pre_logits.") for n in model.state_dict()):
        return
    for name in names:
        dropped[name] = "the representation layer is left out for transfer"
        del state[name]
    head = state.get("head.weight")
    if head is not None and bool(head.any()):
        for name in ("head.weight", "head.bias"):
            if state.pop(name, None) is not None:
                dropped[name] = "the head reads the representation layer, which is left out"


def _size(size: Iterable[int]) -> str:
    return " x ".join(str(int(s)) for s in size)


# --- what went wrong -----------------------------------------------------------------------------

_ADVICE = (  # (what did not fit, pattern, what to do)
    (
        "unexpected",
        r".*\.(weight_scale(_inv)?|scales|qweight|qzeros|absmax|quant_map|SCB|zero_points?)",
        "the file is quantised, of which nothing can be loaded: take the weights from before",
    ),
    ("missing", r"blocks\.\d+\.norm1\.bias", "the file has RMSNorm: " + OWN_MODEL),
    ("unexpected", r"patch_embed\.backbone\..+", "a hybrid: see `vitft weights inspect` for it"),
    ("missing", r"patch_embed\.backbone\..+", "not a hybrid: leave model.embed out"),
    ("unexpected", r"(reg|dist)_token", "the file has extra tokens: build with reg_tokens: {n}"),
    ("unexpected", r"blocks\.\d+\.ls[12]\.gamma", "the file has LayerScale: init_values: 1e-5"),
    ("missing", r"blocks\.\d+\.ls[12]\.gamma", "no LayerScale in the file: leave init_values out"),
    ("unexpected", r"norm_pre\..+", "a CLIP tower: build with pre_norm: true, norm_eps: 1e-5"),
    ("missing", r"norm_pre\..+", "not a CLIP tower: leave pre_norm out"),
    ("missing", r"fc_norm\..+", "the file norms before pooling: build with fc_norm: false"),
    ("unexpected", r"fc_norm\..+", "the file norms after pooling: build with global_pool: avg"),
    ("missing", r"pre_logits\..+", "no such layer in the file: leave representation_size out"),
    ("missing", r"cls_token", "no class token: class_token: false and global_pool: avg"),
    ("missing", r"reg_token", "no register tokens in the file: leave reg_tokens out"),
    ("missing", r"blocks\.\d+\.attn\.qkv\.bias", "no qkv bias in the file: qkv_bias: false"),
    ("unexpected", r".*\.lora_\w+(\.\w+)*", "merge the LoRA adapters first, then save the model"),
    ("missing", r"norm\.weight", "the file has no final norm (InternViT, RADIO): " + OWN_MODEL),
)

_FAMILIES = (
    (r".*\.lora_(a|b|A|B|down|up)(\.\w+)*", "LoRA adapters, without the model they were made for"),
    (r"(?:.*\.)?layer1\.0\.(conv1|bn1)\..+", "a ResNet"),
    (r"(?:.*\.)?layers\.\d+\.blocks\.\d+\.attn\..+", "a Swin Transformer"),
    (r"(?:.*\.)?stages\.\d+\.(blocks\.)?\d+\.(conv_dw|dwconv|gamma)\b.*", "a ConvNeXt"),
    (r"(?:.*\.)?blocks\.\d+\.\d+\.(conv_dw|conv_pw|bn1)\..+", "an EfficientNet or MobileNet"),
    (r"(?:.*\.)?features\.denseblock1\..+", "a DenseNet"),
    (r"(?:.*\.)?features\.0\.(weight|bias)", "a VGG or AlexNet"),
    (r"(?:.*\.)?(word_embeddings|wte|embed_tokens)\.weight", "a language model"),
    (r"(?:.*\.)?diffusion_model\..+", "a diffusion model"),
    (r"(?:.*\.)?blocks\.\d+\.attn\.qkv\.weight", "a ViT"),
)


def family(names: Iterable[str]) -> str:
    """Such as `a ResNet`, from names alone; "" where nothing is known."""
    names = list(names)
    for pattern, what in _FAMILIES:
        if any(re.fullmatch(pattern, name) for name in names):
            return what
    return ""


def advise(
    file: Mapping[str, Any], model: Mapping[str, Any], missing: list[str], unexpected: list[str]
) -> str:
    """The likely cause of a mismatch, and what to build instead; "" where none is known.

    Args:
        file: Name -> tensor of the checkpoint, under timm's names where it is a ViT.
        model: Name -> tensor of the model.
        missing: The model's names that the file lacks.
        unexpected: The file's names that the model lacks.
    """
    theirs, ours = anatomy(file), anatomy(model)
    if theirs and ours and theirs.words != ours.words:
        said, own = theirs.words, ours.words
        # the patch is the file's, or was resampled to the model's before
        if (theirs.patch, theirs.has_cnn) == (ours.patch, ours.has_cnn):
            said, own = (words.partition(", patch")[0] for words in (said, own))
        name = "python -m vitft.weights inspect FILE names the model that fits"
        return f"the file is a ViT of {said}; the model has {own}; {name}"
    if found := relative(file):
        return f"looks like {found.what}: {found.fix}"
    if theirs and theirs.gated and not (ours and ours.gated):
        return f"the file's MLP is gated (SwiGLU, as DINOv2 giant's): {OWN_MODEL}"
    if not (theirs and ours):
        theirs_is, ours_is = family(file), family(model)
        if theirs_is != ours_is:
            is_model = f"; the model is {ours_is}" if ours_is else ""
            return f"looks like {theirs_is or 'another architecture'}{is_model}"
    whole = "patch_embed.proj.weight" in file  # what a scrap of a model lacks tells nothing
    for kind, pattern, text in _ADVICE:
        names = missing * whole if kind == "missing" else unexpected
        if any(re.fullmatch(pattern, name) for name in names):
            return text.format(n=theirs.registers if theirs else 1)
    return ""
