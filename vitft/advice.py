"""What went wrong: the likely cause of a file that does not fit a model, and what to build instead.

In: the names and shapes of both. Out: words for the end of an error; "" where nothing is known.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from vitft.anatomy import anatomy
from vitft.kin import OWN_MODEL, relative

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
