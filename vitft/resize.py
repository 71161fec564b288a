"""A picture -> uint8 [3, H, W] of another size: the part of every transform that costs most.

A picture is a Pillow image or an array uint8 [H, W, 3]; one becomes the other only where it must.
Two ways to resize, both antialiased:

    pillow   what timm and torchvision do with images; the reference
    fast     torch's own resize of bytes, about three times as fast: rows, then columns, within 2
             grey values of Pillow in that order

Pillow took that order, too, before version 13. Now it begins with the columns of pictures that
shrink more in height, which alone moves grey values at sharp edges by up to a dozen.
"""

import math
import random
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Pixels = NDArray[np.uint8]
Picture = Image.Image | Pixels
Box = tuple[int, int, int, int]  # top, left, height, width

FAST = ("bilinear", "bicubic")  # what torch resizes with antialiasing


def as_image(picture: Picture) -> Image.Image:
    """The picture for Pillow."""
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)


def as_array(picture: Picture) -> Pixels:
    """The picture as uint8 [H, W, 3]."""
    return np.array(picture) if isinstance(picture, Image.Image) else picture


def size_of(picture: Picture) -> tuple[int, int]:
    """Height and width."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    return picture.shape[0], picture.shape[1]


def random_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draw: random.Random | ModuleType,
) -> Box:
    """A crop of a random share of the area, in a random aspect; the same draws as timm's.

    Args:
        height: Of the picture.
        width: Of the picture.
        scale: Share of the area, from and to.
        ratio: Width over height, from and to.
        draw: A generator, or the module `random` for the global one.

    Source: Szegedy et al., Going Deeper with Convolutions, 2015, section 6; draws and fallback as
        in timm's RandomResizedCropAndInterpolation.
    """
    for _ in range(10):
        area = draw.uniform(*scale) * (height * width)
        aspect = math.exp(draw.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= width and h <= height:
            return draw.randint(0, height - h), draw.randint(0, width - w), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = width, height
    if width / height < aspect:
        h = round(width / aspect)
    elif width / height > aspect:
        w = round(height * aspect)
    return (height - h) // 2, (width - w) // 2, h, w


def resized(
    picture: Picture,
    size: tuple[int, int],
    interpolation: str,
    *,
    fast: bool,
    box: Box | None = None,
    mirrored: bool = False,
) -> Tensor:
    """The picture, or a box of it, in another size: uint8 [3, H, W].

    Args:
        picture: To be resized.
        size: Height and width of the result.
        interpolation: `bilinear`, `bicubic`; Pillow's other names where not `fast`.
        fast: By torch instead of Pillow.
        box: Only this part; nothing outside it has a say.
        mirrored: Left becomes right at the end.
    """
    if box is not None and 0 in box[2:]:  # of a picture of a few pixels; black, as Pillow has it
        return torch.zeros((3, *size), dtype=torch.uint8)
    if fast:
        return _planes(_by_torch(as_array(picture), size, interpolation, box), mirrored=mirrored)
    if isinstance(picture, Image.Image):
        if box is not None:
            top, left, height, width = box
            picture = picture.crop((left, top, left + width, top + height))
    else:
        picture = Image.fromarray(_part(picture, box))
    method = Image.Resampling[interpolation.upper()]
    out = np.asarray(picture.resize((size[1], size[0]), method))
    return _planes(out, mirrored=mirrored)


def centred(
    picture: Picture, size: tuple[int, int], share: float, interpolation: str, *, squash: bool
) -> Tensor:
    """The middle of the picture, resized by torch to what timm's evaluation would: [3, H, W].

    Args:
        picture: To be resized and cropped.
        size: Height and width of the result.
        share: Of the resized sides that the crop keeps.
        interpolation: `bilinear` or `bicubic`.
        squash: Resize both sides, whatever the picture's shape; else the short one.
    """
    height, width = size_of(picture)
    grown = math.floor(size[0] / share), math.floor(size[1] / share)
    if not squash:
        short = grown[0]
        long = int(short * max(height, width) / min(height, width))
        grown = (short, long) if height <= width else (long, short)
    out = resized(picture, grown, interpolation, fast=True)
    top, left = (round((grown[i] - size[i]) / 2.0) for i in (0, 1))
    return out[:, top : top + size[0], left : left + size[1]].contiguous()


def _planes(pixels: Pixels, *, mirrored: bool) -> Tensor:
    """uint8 [H, W, 3] -> [3, H, W]; by numpy, as torch would call its threads from each of ours."""
    pixels = pixels[:, ::-1] if mirrored else pixels
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _part(pixels: Pixels, box: Box | None) -> Pixels:
    if box is None:
        return pixels
    top, left, height, width = box
    return pixels[top : top + height, left : left + width]


def _by_torch(pixels: Pixels, size: tuple[int, int], interpolation: str, box: Box | None) -> Pixels:
    """uint8 [h, w, 3]."""
    x = torch.from_numpy(_part(pixels, box)).permute(2, 0, 1).unsqueeze(0)  # [1, 3, h, w]
    out = torch.nn.functional.interpolate(x, size=size, mode=interpolation, antialias=True)
    done: Pixels = out[0].permute(1, 2, 0).numpy()
    return done
