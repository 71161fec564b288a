"""From an image to tokens: it is cut into patches, and each is projected to the width.

In: normalised images [B, 3, S, S]. Out: tokens [B, P, D]. `PatchEmbed` cuts the image itself,
`hybrid.HybridEmbed` a CNN's feature map. What both have comes first: sizes, the grid of tokens, a
kernel that can be resampled, and a no to images that tokens do not tile. Shapes: see `vit`.

Source: Dosovitskiy et al., 2021 (arXiv 2010.11929), section 3.1, equation 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers._fx import register_notrace_module
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor, nn

from vitft.errors import RecipeError

Pair = tuple[int, int]


def pair(size: int | Sequence[int]) -> Pair:
    """Height and width from one number or two."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


class PatchConv(nn.Conv2d):
    """A convolution whose stride is its kernel: of each patch, its own projection.

    On CUDA it is computed as reshape and matrix product, equal to rounding: with three channels in
    bfloat16 a convolution depends on which of cuDNN's ways is chosen, and some are far slower. On
    CPU both take the same time, and the convolution stays.
    """

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, GH, GW]."""
        return self.product(images) if images.is_cuda else super().forward(images)

    def product(self, images: Tensor) -> Tensor:
        """The same without a convolution; [B, C, H, W] -> [B, D, GH, GW]."""
        high, wide = self.kernel_size
        rows, columns = images.shape[-2] // high, images.shape[-1] // wide
        x = images[..., : rows * high, : columns * wide]
        x = x.reshape(*x.shape[:2], rows, high, columns, wide)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, GH, GW, C * p * p]
        return F.linear(x, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Embed(nn.Module):
    """What an embedding of the image's patches and one of a CNN's cells share: sizes and the grid.

    Args:
        img_size: Height and width, px.
        patch_size: Of a token, in px or in cells of `stride` px.
        strict_img_size: Refuse images of another size.
    """

    proj: PatchConv
    stride = 1  # px per cell
    step = "patch size {} px"  # what a side must be a multiple of, for people

    def __init__(
        self,
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        strict_img_size: bool,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = pair(img_size), pair(patch_size)
        self.strict_img_size = strict_img_size
        self.grid_size: Pair = (0, 0)

    @property
    def num_patches(self) -> int:
        """P."""
        return self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | Pair:
        """Pixels per token."""
        pixels = (self.stride * self.patch_size[0], self.stride * self.patch_size[1])
        return max(pixels) if as_scalar else pixels

    def dynamic_feat_size(self, img_size: Pair) -> Pair:
        """Grid of tokens for an image of this height and width."""
        step = self.stride * self.patch_size[0], self.stride * self.patch_size[1]
        return img_size[0] // step[0], img_size[1] // step[1]

    def grid_of(self, img_size: Pair, patch_size: Pair, place: str = "model.img_size") -> Pair:
        """Grid of tokens; an image that they do not tile is refused."""
        step = self.stride * patch_size[0], self.stride * patch_size[1]
        for side, pixels in zip(img_size, step, strict=True):
            if side < pixels or side % pixels:
                low = max(side // pixels, 1) * pixels
                rule = f"side {side} px is not a multiple of the {self.step.format(pixels)}"
                fix = f"use {low} or {low + pixels} px instead"
                raise RecipeError.of("model.img_size", place, rule, fix)
        return img_size[0] // step[0], img_size[1] // step[1]

    def set_input_size(
        self,
        img_size: int | Sequence[int] | None = None,
        patch_size: int | Sequence[int] | None = None,
    ) -> None:
        """Takes images or patches of another size; the kernel is resampled to keep its answers."""
        image = self.img_size if img_size is None else pair(img_size)
        patch = self.patch_size if patch_size is None else pair(patch_size)
        self.grid_size = self.grid_of(image, patch)
        if patch != self.patch_size:
            self.proj = resampled(self.proj, patch)
        self.img_size, self.patch_size = image, patch

    def require(self, images: Tensor) -> None:
        """Refuses images that this embedding cannot cut.

        Raises:
            ValueError: Another size than the model was built for.
            RecipeError: `model.img_size`: a size that tokens do not tile.
        """
        size = (int(images.shape[-2]), int(images.shape[-1]))
        if self.strict_img_size and size != self.img_size:
            raise ValueError(
                f"image is {size[0]} x {size[1]} px, the model was built for {self.img_size[0]} x "
                f"{self.img_size[1]}; resize it, or build with img_size= or dynamic_img_size=True"
            )
        if not self.strict_img_size:
            self.grid_of(size, self.patch_size, "image")


def resampled(old: PatchConv, patch: Pair) -> PatchConv:
    """A patch kernel of another size that keeps its answers as far as it can."""
    bias = old.bias is not None
    factory: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    new = PatchConv(old.in_channels, old.out_channels, patch, patch, bias=bias, **factory)
    with torch.no_grad():
        new.weight.copy_(resample_patch_embed(old.weight, list(patch)))
    new.weight.requires_grad_(old.weight.requires_grad)
    new.bias = old.bias
    return new.train(old.training)


@register_notrace_module  # its size check branches on shapes, which torch.fx cannot follow
class PatchEmbed(Embed):
    """Cuts the image into patches and projects each to the width.

    A convolution with kernel = stride = patch, on CUDA a matrix product (`PatchConv`).
    """

    def __init__(
        self,
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        in_chans: int,
        width: int,
        *,
        bias: bool = True,
        strict_img_size: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__(img_size, patch_size, strict_img_size)
        self.grid_size = self.grid_of(self.img_size, self.patch_size)
        self.proj = PatchConv(
            in_chans, width, self.patch_size, self.patch_size, bias=bias, **factory
        )

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, P, D]."""
        self.require(images)
        x: Tensor = self.proj(images)  # [B, D, G, G]
        return x.flatten(2).transpose(1, 2)  # [B, P, D]
