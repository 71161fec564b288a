"""The hybrid's patch embedding: a CNN's feature map, cut into patches instead of the image.

In: normalised images [B, 3, S, S]. Out: tokens [B, P, D]. The CNN halves the image several times,
to `stride` px per cell of its map; patches of the map (1 x 1 in the paper) are projected to the
width. The CNN is one of the paper's BiT ResNets by its short name, or the feature extractor of any
timm model that has one. Attributes are named so that their dotted names are the keys of timm's
hybrids.

Source: Dosovitskiy et al., 2021 (arXiv 2010.11929), section 3.1; the small ones are those of
Steiner et al., How to train your ViT?, 2021 (arXiv 2106.10270).
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
from timm.layers._fx import register_notrace_module
from timm.layers.std_conv import StdConv2dSame
from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem
from torch import Tensor, nn

from vitft.errors import RecipeError, VitftError, WeightsError
from vitft.kernels import through
from vitft.patches import Embed, Pair, PatchConv

# blocks per stage; the paper's 16-px variant has stage 4's blocks in stage 3, for a finer map
RESNETS: dict[str, tuple[int, ...]] = {
    "r": (),  # the stem alone, 4 px per cell
    "r26": (2, 2, 2, 2),  # 32 px
    "r50": (3, 4, 6, 3),  # 32 px
    "r50_fine": (3, 4, 9),  # 16 px
}


def build_cnn(name: str, in_chans: int, stage: int | None, **factory: Any) -> nn.Module:
    """The CNN alone, random: a BiT ResNet with group norm, or a timm model up to one feature map.

    Args:
        name: A key of `RESNETS`, or a timm name.
        in_chans: Colour channels.
        stage: Which of timm's feature maps, from 0; None for the last.
        factory: Device and dtype.

    Raises:
        RecipeError: `model.embed`: no such name, no such map, or no maps at all.
    """
    if name in RESNETS:
        if stage is not None:
            raise _refused(f"{name!r} has one feature map", "leave embed_stage out")
        return _resnet(RESNETS[name], in_chans, factory)
    if ":" in name or not timm.is_model(name):
        near = difflib.get_close_matches(name, [*RESNETS, *timm.list_models()], n=3)
        fix = f"did you mean {', '.join(near)}?" if near else f"use {', '.join(RESNETS)} or timm's"
        raise _refused(f"knows no CNN {name!r}", fix)
    given: dict[str, Any] = {k: v for k, v in factory.items() if v is not None}
    try:
        cnn: Any = timm.create_model(
            name, features_only=True, out_indices=[-1 if stage is None else stage],
            in_chans=in_chans, **given,
        )  # fmt: skip
        channels, pixels = cnn.feature_info.channels(), cnn.feature_info.reduction()
    except (TypeError, AssertionError, ValueError, RuntimeError, AttributeError, IndexError) as e:
        text = f"timm gives no feature map {'' if stage is None else stage} of {name}: {e}"
        raise _refused(text[:300], "choose a CNN such as resnet26d, or another stage") from e
    if len(channels) != 1 or int(pixels[0]) < 1:
        raise _refused(f"{name} does not say how many pixels a cell covers", "choose another CNN")
    _cut_after_map(cnn)
    built: nn.Module = cnn
    return built


def _cut_after_map(cnn: Any) -> None:
    """Takes off the stages behind the map, which timm's EfficientNets and MobileNets compute."""
    indices = getattr(cnn, "_stage_out_idx", None)
    if indices and cnn.feature_hooks is None:
        cnn.blocks = cnn.blocks[: max(indices)]


def _resnet(layers: tuple[int, ...], in_chans: int, factory: dict[str, Any]) -> nn.Module:
    conv = partial(StdConv2dSame, eps=1e-8)
    common: dict[str, Any] = {"stem_type": "same", "preact": False, "conv_layer": conv, **factory}
    if not layers:
        stem: nn.Module = create_resnetv2_stem(in_chans, **common)
        return stem
    return ResNetV2(list(layers), num_classes=0, global_pool="", in_chans=in_chans, **common)


def cnn_state(
    tensors: Mapping[str, Tensor], cnn: nn.Module, name: str, *, place: object
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A classifier's weights -> those of its feature extractor, every tensor accounted for.

    Args:
        tensors: Of the whole network, under timm's names.
        cnn: As `build_cnn` made it.
        name: As `build_cnn` was given it.
        place: The file, for messages.

    Returns:
        The extractor's name -> tensor, and the file's name -> why it was left out.

    Raises:
        WeightsError: `ckpt.architecture`: tensors are missing or of another shape.
    """
    own, state, used = cnn.state_dict(), dict[str, Tensor](), set()
    for key, value in own.items():
        dotted = re.sub(r"_(\d+)\.", r".\1.", key, count=1)  # timm may join `stages.0` by `_`
        source = next((n for n in (key, dotted) if n in tensors), None)
        if source is not None and tensors[source].shape == value.shape:
            state[key] = tensors[source]
            used.add(source)
    missing = [key for key in own if key not in state]
    if missing:
        text = f"{len(missing):,} of the {len(own):,} tensors of {name} are not in it or of "
        text += f"another shape, such as {missing[0]}"
        fix = f"name weights of timm's {name} as model.embed.weights"
        raise WeightsError.of("ckpt.architecture", place, text, fix)
    return state, {n: "comes after the feature map" for n in tensors if n not in used}


def map_of(cnn: Any, name: str) -> Pair:
    """Channels of the CNN's map, and pixels per cell."""
    if name not in RESNETS:
        return int(cnn.feature_info.channels()[-1]), int(cnn.feature_info.reduction()[-1])
    stages = len(RESNETS[name])
    return (256 * 2 ** (stages - 1), 4 * 2 ** (stages - 1)) if stages else (64, 4)


def _refused(rule: str, fix: str) -> VitftError:
    return RecipeError.of("model.embed", "model.embed", rule, fix)


@register_notrace_module  # its size check branches on shapes, which torch.fx cannot follow
class HybridEmbed(Embed):
    """Sends the image through a CNN and projects each cell of its last map to the width.

    Args:
        cnn: See `build_cnn`.
        img_size: Height and width, px; a multiple of the pixels per token.
        patch_size: Cells of the map per token, along height and width.
        in_chans: Colour channels.
        width: D.
        stage: See `build_cnn`.
        bias: Of the projection.
        strict_img_size: Refuse images of another size.
        factory: Device and dtype.

    Raises:
        RecipeError: `model.embed` or `model.img_size`.
    """

    step = "{} px that a token covers"

    def __init__(
        self,
        cnn: str,
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        in_chans: int,
        width: int,
        *,
        stage: int | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__(img_size, patch_size, strict_img_size)
        self.backbone: Any = build_cnn(cnn, in_chans, stage, **factory)
        self.feature_dim, self.stride = map_of(self.backbone, cnn)
        self.grid_size = self.grid_of(self.img_size, self.patch_size)
        self.proj = PatchConv(
            self.feature_dim, width, self.patch_size, self.patch_size, bias=bias, **factory
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the CNN's activations too, where it can."""
        if hasattr(self.backbone, "set_grad_checkpointing"):
            self.backbone.set_grad_checkpointing(enable=enable)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, P, D]."""
        self.require(images)
        maps: Any = through(self.backbone, images)
        x: Tensor = maps[-1] if isinstance(maps, list | tuple) else maps  # [B, feature_dim, G', G']
        x = self.proj(x)  # [B, D, G, G]
        return x.flatten(2).transpose(1, 2)  # [B, P, D]
