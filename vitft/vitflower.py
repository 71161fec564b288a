"""The names: sizes, preprocessing and file guard of each `vitflower_*`, registered with timm.

In: a name and options, through `timm.create_model`. Out: a `VisionTransformer` with timm's
`pretrained_cfg`, filled from a file where an overlay names one, whole or not at all. Importing this
room registers every name, the one thing in vitft that importing does.

Source: Dosovitskiy et al., 2021 (arXiv 2010.11929), tables 1 and 5.
"""

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from vitft import console
from vitft.vit import VisionTransformer


def _cfg(**fields: Any) -> dict[str, Any]:
    """What timm should know about a name; the paper scales pixels to [-1, 1]."""
    return {
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": None,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "num_classes": 1000,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    } | fields


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

_STEM = "patch_embed.backbone.stem.conv"

# No name claims hosted weights; a file comes in by pretrained_cfg_overlay. The historical in21k
# files have a head of 21,843 classes, so the names they belong to say so.
default_cfgs = generate_default_cfgs(
    {
        "vitflower_ti16": _cfg(),
        "vitflower_s16": _cfg(),
        # DINOv2 evaluates at 224 px with a resize to 256
        "vitflower_s14": _cfg(num_classes=0, crop_pct=0.875, **_IMAGENET),
        "vitflower_b16.orig_in21k": _cfg(num_classes=21843),
        "vitflower_b32.orig_in21k": _cfg(num_classes=21843),
        "vitflower_l16.orig_in21k": _cfg(num_classes=21843),
        "vitflower_l32.orig_in21k": _cfg(num_classes=21843),
        "vitflower_h14.orig_in21k": _cfg(num_classes=21843),
        "vitflower_hybrid_r_ti16": _cfg(first_conv="patch_embed.backbone.conv"),
        "vitflower_hybrid_r26_s32": _cfg(first_conv=_STEM),
        "vitflower_hybrid_r26_b32": _cfg(first_conv=_STEM),
        "vitflower_hybrid_r50_b16.orig_in21k": _cfg(first_conv=_STEM, num_classes=21843),
        "vitflower_hybrid_r50_b32": _cfg(first_conv=_STEM),
        "vitflower_hybrid_r50_l16": _cfg(first_conv=_STEM),
        "vitflower_hybrid_r50_l32": _cfg(first_conv=_STEM),
    }
)


# width, heads, depth and patch: table 1 of the paper; Ti and S are DeiT's (arXiv 2012.12877)
SIZES: dict[str, dict[str, Any]] = {
    "vitflower_ti16": {"embed_dim": 192, "num_heads": 3, "patch_size": 16},
    "vitflower_s16": {"embed_dim": 384, "num_heads": 6, "patch_size": 16},
    "vitflower_s14": {"embed_dim": 384, "num_heads": 6, "patch_size": 14, "init_values": 1e-5},
    "vitflower_b16": {"embed_dim": 768, "num_heads": 12, "patch_size": 16},
    "vitflower_b32": {"embed_dim": 768, "num_heads": 12, "patch_size": 32},
    "vitflower_l16": {"embed_dim": 1024, "num_heads": 16, "depth": 24, "patch_size": 16},
    "vitflower_l32": {"embed_dim": 1024, "num_heads": 16, "depth": 24, "patch_size": 32},
    "vitflower_h14": {"embed_dim": 1280, "num_heads": 16, "depth": 32, "patch_size": 14},
}
# R26+S/32 and so on: table 5 of the paper and table 3 of arXiv 2106.10270; /16 and /32 are the
# pixels that a token covers (R+Ti/16 has 4 px per cell and patches of 8 cells, as published)
SIZES |= {
    f"vitflower_hybrid_{name}": {k: v for k, v in SIZES[f"vitflower_{size}"].items()}
    | {"patch_size": cells, "embed": cnn}
    for name, size, cnn, cells in (
        ("r_ti16", "ti16", "r", 8),
        ("r26_s32", "s16", "r26", 1),
        ("r26_b32", "b16", "r26", 1),
        ("r50_b16", "b16", "r50_fine", 1),
        ("r50_b32", "b16", "r50", 1),
        ("r50_l16", "l16", "r50_fine", 1),
        ("r50_l32", "l16", "r50", 1),
    )
}

# timm's architecture of the same names, shapes and image side; two hybrids have none there
TWINS = {
    "vitflower_ti16": "vit_tiny_patch16_224",
    "vitflower_s16": "vit_small_patch16_224",
    "vitflower_s14": "vit_small_patch14_dinov2",
    "vitflower_b16": "vit_base_patch16_224",
    "vitflower_b32": "vit_base_patch32_224",
    "vitflower_l16": "vit_large_patch16_224",
    "vitflower_l32": "vit_large_patch32_224",
    "vitflower_h14": "vit_huge_patch14_224",
    "vitflower_hybrid_r_ti16": "vit_tiny_r_s16_p8_224",  # 4 px per cell, 8 cells per token
    "vitflower_hybrid_r26_s32": "vit_small_r26_s32_224",
    "vitflower_hybrid_r26_b32": "vit_base_r26_s32_224",
    "vitflower_hybrid_r50_b16": "vit_base_r50_s16_224",
    "vitflower_hybrid_r50_l32": "vit_large_r50_s32_224",
}


def _read_file(pretrained: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Reads an overlay's file through our own guard, which knows more kinds than timm's."""
    from vitft import weights  # late: `python -m vitft.weights` must be its first import

    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    if not pretrained or not overlay.get("file") or overlay.get("state_dict"):
        return kwargs
    tensors = weights.read(Path(overlay["file"]))
    return kwargs | {"pretrained_cfg_overlay": overlay | {"state_dict": tensors}}


def load_filter(state: dict[str, Any], model: VisionTransformer) -> dict[str, Tensor]:
    """What timm calls between reading a checkpoint and loading it; here nothing is let through.

    timm loads leniently when the number of classes differs. It is handed a whole state instead:
    every backbone tensor from the file, the head from the file where it fits, else the fresh one.

    Args:
        state: As timm read it.
        model: The model as built.

    Raises:
        WeightsError: A backbone tensor is missing, unexpected or misshapen.
    """
    from vitft import fitting

    place = model.pretrained_cfg.get("file") or "checkpoint"
    whole, match, notes = fitting.complete(state, model, place=place)
    for note in notes:
        console.say(f"weights: {note}")
    for name, why in match.dropped.items():
        console.warn(f"weights: left out {name}: {why}")
    if "head.weight" in whole and "head.weight" not in match.new:
        model.pretrained_cfg["num_classes"] = model.num_classes  # else timm drops the file's head
    model._traits["first_conv"] = None  # channels are adapted already; timm would do it twice
    return whole


def _register(name: str) -> None:
    """Gives timm a function of that name, which is how timm knows models."""

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model: Any = build_model_with_cfg(
            VisionTransformer,
            name,
            pretrained,
            pretrained_filter_fn=load_filter,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **(SIZES[name] | _read_file(pretrained, kwargs)),
        )
        model.pretrained_cfg["state_dict"] = None  # loaded; do not hold the memory
        model._traits["first_conv"] = model.pretrained_cfg["first_conv"]
        built: nn.Module = model
        return built

    build.__name__ = build.__qualname__ = name
    globals()[name] = register_model(build)


for _name in SIZES:
    _register(_name)
