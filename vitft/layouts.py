"""Tables: what each library calls the tensors of a ViT, beside timm's name for the same.

A layout is recognised by its anchors and read by its rules; what no image classifier needs has its
reason here too. Only tables stand in this room, `convert` reads them. Shapes: see `vit`. The forms
of tensors are those of the table's library.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

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
