"""A network and images -> maps of where it looks and what counted; numbers only, no pictures.

    rollout     what the token that the head reads gathered from each patch, through all blocks
    heads       where each head of the last block looks
    gradient    which places spoke for a class; any timm network
    distance    how far each head looks
    positions   which places a network takes for neighbours
    filters     which colours and edges its first layer answers to

The network may be in any mode, on any device, frozen or not; it is given back as it was. Equal
inputs give equal maps on one machine. Shapes as in `vitft.vit`; B images of Gh * Gw = P patches.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vitft.errors import RecipeError

Floats = NDArray[np.float32]
SWITCHES = ("fused_attn", "grad_checkpointing")  # both hide what is to be seen


@dataclass(frozen=True)
class Filters:
    """What the first layer looks for.

    Attributes:
        images: [N, p, p, 3] float32, unscaled, signed; the most telling first.
        shares: [N] of the filters' variance that each principal component holds; None where these
            are the filters themselves.
        total: How many filters the layer has.
    """

    images: Floats
    shares: Floats | None
    total: int


# -- attention ------------------------------------------------------------------------------------


def rollout(net: nn.Module, images: Tensor, *, residual: float = 0.5) -> Floats:
    """What the token that the head reads gathered from each patch, through all blocks.

    It is the same for every class, and knows attention alone: neither values nor MLPs.

    Args:
        net: A ViT, ours or timm's.
        images: [B, 3, S, S], normalised, where the network is.
        residual: What a token keeps of itself at each block, 0 to 1.

    Returns:
        [B, Gh, Gw] float32, not negative; each map sums to 1 (what stays on the prefix tokens is
        left out).

    Raises:
        RecipeError: `explain.no_attention`.

    Source: Abnar & Zuidema, Quantifying Attention Flow in Transformers, 2020 (arXiv 2005.00928).
    """
    layers = _attention(net, images, lambda w: w.mean(dim=1))  # each [B, T, T]
    row = rolled(layers, _read(net, layers[0].shape[-1]), residual)  # [B, T]
    patches = row[:, _prefix(net) :].reshape(-1, *_grid(net, images))  # [B, Gh, Gw]
    return _array(patches / patches.sum(dim=(1, 2), keepdim=True))


def rolled(layers: Sequence[Tensor], start: Tensor, residual: float = 0.5) -> Tensor:
    """Attention through all blocks: start @ A_L @ ... @ A_1, A = residual * I + (1 - residual) * W.

    Args:
        layers: L blocks' weights W [B, T, T], the first block first; rows sum to 1.
        start: [T], shares of the tokens that are read; they sum to 1.
        residual: 0 to 1.

    Returns:
        [B, T], rows sum to 1.
    """
    row = start.expand(layers[0].shape[0], 1, -1)  # [B, 1, T]
    for weights in reversed(layers):
        row = residual * row + (1 - residual) * (row @ weights)
    return row[:, 0]


def heads(net: nn.Module, images: Tensor) -> Floats:
    """Where each head of the last block looks, from the token that the network's head reads.

    Args:
        net: A ViT, ours or timm's.
        images: [B, 3, S, S], normalised, where the network is.

    Returns:
        [B, H, Gh, Gw] float32 in [0, 1]: shares of attention; what a map lacks to 1 goes to the
        prefix tokens.

    Raises:
        RecipeError: `explain.no_attention`.
    """
    last = _attention(net, images, lambda w: w)[-1]  # [B, H, T, T]
    row = _read(net, last.shape[-1]) @ last  # [B, H, T]
    return _array(row[..., _prefix(net) :].reshape(*row.shape[:2], *_grid(net, images)))


def distance(net: nn.Module, images: Tensor) -> Floats:
    """How far each head looks: the mean distance from a patch to what it attends to.

    Prefix tokens lie nowhere and are left out; the shares of the patches then sum to 1.

    Args:
        net: A ViT, ours or timm's.
        images: [B, 3, S, S], normalised, where the network is.

    Returns:
        [B, L, H] float32, pixels of the input, each the mean over all patches of an image.

    Raises:
        RecipeError: `explain.no_attention`.

    Source: Dosovitskiy et al. 2021, figure 7 right and appendix D.7.
    """
    apart = _apart(_grid(net, images), images)  # [P, P]

    def mean(weights: Tensor) -> Tensor:
        among = weights[..., _prefix(net) :, _prefix(net) :]  # [B, H, P, P]
        among = among / among.sum(dim=-1, keepdim=True)
        return (among * apart).sum(dim=-1).mean(dim=-1)  # [B, H]

    return _array(torch.stack(_attention(net, images, mean), dim=1))


def evenly(net: nn.Module, images: Tensor) -> float:
    """The `distance` of a head that looks everywhere alike, pixels.

    Raises:
        RecipeError: `explain.no_attention`.
    """
    return float(_apart(_grid(net, images), images).mean())


def _attention(net: nn.Module, images: Tensor, keep: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """`keep` of each block's weights [B, H, T, T] float32, the first block first.

    Without its fused kernel, each attention passes its weights through a dropout of its own.
    """
    kept: list[Tensor] = []
    tokens = _prefix(net) + int(np.prod(_grid(net, images)))

    def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        weights = args[0]
        if weights.shape[0] != len(images) or weights.shape[2:] != (tokens, tokens):
            raise _no_attention(net)
        kept.append(keep(weights.float()))

    with _borrowed(net), torch.no_grad(), _hooked(_dropouts(net), catch):
        net.forward_features(images)  # type: ignore[operator]  # timm's
    if not kept:
        raise _no_attention(net)
    return kept


def _dropouts(net: nn.Module) -> list[nn.Module]:
    found = [getattr(m, "attn_drop", None) for m in net.modules() if hasattr(m, "fused_attn")]
    return [drop for drop in found if isinstance(drop, nn.Module)]


def _read(net: nn.Module, tokens: int) -> Tensor:
    """[T]: the share of each token in what the head reads: the class token, or all patches."""
    prefix = _prefix(net)
    share = torch.zeros(tokens, device=next(net.parameters()).device)
    if prefix and getattr(net, "global_pool", "token") in ("token", ""):
        share[0] = 1
    else:
        share[prefix:] = 1 / (tokens - prefix)
    return share


def _apart(grid: tuple[int, int], images: Tensor) -> Tensor:
    """[P, P] pixels between the centres of patches."""
    steps = [side / count for side, count in zip(images.shape[-2:], grid, strict=True)]
    axes = [
        torch.arange(n, device=images.device) * step for n, step in zip(grid, steps, strict=True)
    ]
    places = torch.cartesian_prod(*axes).reshape(-1, 2)  # [P, 2]
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


def _no_attention(net: nn.Module) -> Exception:
    text = "has no attention of every patch to every patch"
    fix = "use the gradient method, which any network can do"
    return RecipeError.of("explain.no_attention", type(net).__name__, text, fix)


# -- gradient -------------------------------------------------------------------------------------


def gradient(net: nn.Module, images: Tensor, classes: Tensor | None = None) -> Floats:
    """Which places spoke for a class.

    At each place of the last feature map, or at each patch as the last block of a ViT reads it: the
    features times the slope of the class's logit along them, summed over channels; what spoke
    against the class is left out.

    Args:
        net: Any timm classifier.
        images: [B, 3, S, S], normalised, where the network is.
        classes: [B] int64; default the class that the network says.

    Returns:
        [B, Gh, Gw] float32 in [0, 1]; the largest value of a map is 1, unless all are 0.

    Raises:
        RecipeError: `explain.no_map`: its last features are not a map, or no class depends on them.

    Source: Draelos & Carin, HiResCAM, 2020 (arXiv 2011.08891); the same as Grad-CAM (arXiv
        1610.02391) where the features are averaged over places before the head.
    """
    with _borrowed(net), torch.inference_mode(False), torch.no_grad():  # but see _branch
        leaf, logits = _branch(net, images.clone() if images.is_inference() else images.detach())
        if classes is None:
            classes = logits.argmax(dim=1)
        with torch.enable_grad():
            score = logits.gather(1, classes.to(logits.device).unsqueeze(1)).sum()
        (slope,) = torch.autograd.grad(score, leaf, allow_unused=True)
    if slope is None:
        raise _no_map(net, "no class depends on its last features")
    spoke = _spatial(net, (slope * leaf).detach().float(), images).relu()  # [B, Gh, Gw]
    return _array(spoke / spoke.amax(dim=(1, 2), keepdim=True).clamp_min(1e-30))


def _branch(net: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """The last features with a place, as the start of a graph, and the logits [B, C] they make.

    What comes before them is as fast as any answer of the network: nothing is kept of it.
    """
    norm = getattr(net.blocks[-1], "norm1", None) if hasattr(net, "blocks") else None
    if norm is None:
        features = net.forward_features(images)
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise _no_map(net, "its last features are not a map")
        leaf = features.detach().requires_grad_()
        with torch.enable_grad():
            return leaf, net.forward_head(leaf)
    # A class token is all that the head reads: the patches count where the last block reads them.
    leaves: list[Tensor] = []

    def replace(module: nn.Module, args: object, out: Tensor) -> Tensor:
        torch.set_grad_enabled(True)  # until the end of this forward
        leaves.append(out.detach().requires_grad_())
        return leaves[-1]

    handle = norm.register_forward_hook(replace)
    try:
        logits = net(images)
    finally:
        handle.remove()
        torch.set_grad_enabled(False)
    return leaves[-1], logits


def _spatial(net: nn.Module, features: Tensor, images: Tensor) -> Tensor:
    """[B, D, Gh, Gw], [B, Gh, Gw, D] or [B, T, D] -> [B, Gh, Gw], summed over channels."""
    if features.ndim == 4:
        return features.sum(dim=-1 if getattr(net, "output_fmt", "") == "NHWC" else 1)
    tokens = features.sum(dim=-1)  # [B, T]
    count = tokens.shape[1]
    for prefix in (_prefix(net), 0):
        grid = _grid(net, images, count - prefix)
        if 1 < grid[0] * grid[1] == count - prefix:
            return tokens[:, prefix:].reshape(-1, *grid)
    raise _no_map(net, f"its {count} tokens are not a grid of patches")


def _no_map(net: nn.Module, text: str) -> Exception:
    fix = "try --method rollout, or another model"
    return RecipeError.of("explain.no_map", type(net).__name__, text, fix)


# -- weights --------------------------------------------------------------------------------------


def positions(net: nn.Module) -> Floats:
    """Cosine similarity of the position embedding of each patch with that of each other.

    Returns:
        [Gh, Gw, Gh, Gw] float32 in [-1, 1].

    Raises:
        RecipeError: `explain.no_positions`.
    """
    ask, embed = getattr(net, "position_table", None), getattr(net, "patch_embed", None)
    table = ask() if ask else getattr(net, "pos_embed", None)
    grid = getattr(embed, "grid_size", None)
    if not isinstance(table, Tensor) or table.ndim != 3 or grid is None:
        text = "has no table of absolute positions"
        fix = "choose a model that has one, such as vitflower_b16"
        raise RecipeError.of("explain.no_positions", type(net).__name__, text, fix)
    rows = table.detach()[0, -grid[0] * grid[1] :].float()  # [P, D]; prefix tokens come before
    unit = F.normalize(rows, dim=-1)
    return _array((unit @ unit.T).clamp(-1, 1).reshape(*grid, *grid))


def filters(net: nn.Module, count: int = 28) -> Filters:
    """What the first layer looks for, as small RGB images.

    Patch embeddings (no overlap) come as the principal components of all their filters, as in the
    ViT paper; the stem of a convolutional network comes as the filters themselves.

    Args:
        net: Any timm network for RGB images.
        count: Images at most.

    Raises:
        RecipeError: `explain.no_filters`.

    Source: Dosovitskiy et al. 2021, figure 7 left.
    """
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    if not convolutions or convolutions[0].in_channels != 3:
        text = "its first layer is not a convolution over RGB"
        fix = "choose another model for this figure"
        raise RecipeError.of("explain.no_filters", type(net).__name__, text, fix)
    first = convolutions[0]
    weight = first.weight.detach().double().cpu()  # [D, 3, p, p]
    if first.kernel_size != first.stride:
        strongest = weight.flatten(1).norm(dim=1).argsort(descending=True, stable=True)[:count]
        return Filters(_array(weight[strongest].permute(0, 2, 3, 1)), None, len(weight))
    flat = weight.flatten(1)  # [D, 3 p p]
    _, size, directions = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)
    size, directions = size[:count] ** 2 / (size**2).sum(), directions[:count]
    peak = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))  # signs are free
    images = (directions * peak.sign()).unflatten(1, weight.shape[1:]).permute(0, 2, 3, 1)
    return Filters(_array(images), _array(size), len(weight))


# -- the network, borrowed ------------------------------------------------------------------------


@contextmanager
def _borrowed(net: nn.Module) -> Iterator[None]:
    """In eval mode, frozen, attention and checkpointing plain; then again as it was."""
    modes = [(m, m.training) for m in net.modules()]
    learning = [p for p in net.parameters() if p.requires_grad]
    switched = [(m, s) for m in net.modules() for s in SWITCHES if getattr(m, s, False) is True]
    try:
        net.eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        for module, switch in switched:
            setattr(module, switch, False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in learning:
            parameter.requires_grad_(True)
        for module, switch in switched:
            setattr(module, switch, True)


@contextmanager
def _hooked(
    modules: Sequence[nn.Module], hook: Callable[[nn.Module, tuple[Tensor, ...]], None]
) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _prefix(net: nn.Module) -> int:
    """R, the tokens before the patches."""
    return int(getattr(net, "num_prefix_tokens", 0))


def _grid(net: nn.Module, images: Tensor, patches: int | None = None) -> tuple[int, int]:
    """Patches along height and width, as the network cuts these images; guessed where it hides it.

    Raises:
        RecipeError: `explain.no_attention`: it hides it, and how many there are is not known.
    """
    height, width = int(images.shape[-2]), int(images.shape[-1])
    ask = getattr(getattr(net, "patch_embed", None), "dynamic_feat_size", None)
    if callable(ask):
        rows, columns = ask((height, width))
        if patches in (None, rows * columns):
            return int(rows), int(columns)
    if patches is None:
        raise _no_attention(net)
    rows = max(1, round(sqrt(patches * height / width)))
    return rows, patches // rows


def _array(values: Tensor) -> Floats:
    return values.detach().float().cpu().numpy()
