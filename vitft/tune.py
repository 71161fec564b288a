"""Training few parameters of a ViT: adapters (LoRA), biases, or norms, and always the head.

    lora     W stays, W + alpha / r * B A is used: A [r, in] drawn, B [out, r] zero at the start
    bitfit   every bias
    norm     weight and bias of every LayerNorm

The adapters are ours and not peft's, which would bring transformers and accelerate for the sake of
forty lines, and wraps modules under other names. Here a layer keeps its name and its class is told
to add the product; `merge` puts the product into the weight, and nothing of an adapter is left: the
product of a run has the keys of any other. On timm's fused qkv, q, k and v share one A.

Source: Hu et al., LoRA, 2021 (arXiv 2106.09685); Ben Zaken et al., BitFit, 2021 (arXiv 2106.10199).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitft.errors import RecipeError, VitftError
from vitft.recipe import TrainSpec

LAYERS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
LIMIT = 1e-4  # relative difference of logits that merging may make; rounding gives 1e-6


class LoraLinear(nn.Linear):
    """A linear layer that stays, with a trained product of low rank beside its weight."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        low = F.linear(x, self.lora_a)  # [..., r]
        return F.linear(x, self.weight, self.bias) + F.linear(low, self.lora_b) * self.lora_scale


def apply(net: nn.Module, spec: TrainSpec, *, seed: int) -> None:
    """Leaves only what `spec.tune` names trainable, in the last `spec.blocks` blocks or in all.

    Args:
        net: A ViT under timm's names, on its device.
        spec: The recipe's `train` section, with another `tune` than `all`.
        seed: Of the adapters' A.

    Raises:
        RecipeError: `model.tune`: the model has no blocks with the layers that a ViT has.
    """
    blocks = _blocks(net)
    inside = blocks if spec.blocks is None else blocks[-spec.blocks :]
    net.requires_grad_(False)
    if spec.tune == "lora":
        generator = torch.Generator().manual_seed(seed)
        for layer in _layers(inside, spec.lora_on):
            _adapt(layer, spec.lora_rank, spec.lora_alpha, generator)
    else:
        for parameter in _small(net, inside, spec):
            parameter.requires_grad_(True)
    head: Any = net
    head.get_classifier().requires_grad_(True)


def planned(net: nn.Module, spec: TrainSpec, *, frozen_cnn: bool = False) -> int:
    """How many parameters `apply` will leave trainable; the model stays as it is.

    Args:
        net: As `apply` takes it.
        spec: The recipe's `train` section.
        frozen_cnn: Whether those of a hybrid's CNN stay as they are all the same.
    """
    blocks = _blocks(net)
    inside = blocks if spec.blocks is None else blocks[-spec.blocks :]
    head: Any = net
    trained: list[nn.Parameter] = list(head.get_classifier().parameters())
    if spec.tune != "lora":
        cnn: Any = net.get_submodule("patch_embed.backbone") if frozen_cnn else nn.Module()
        trained += _small(net, inside, spec)
        counts = {id(p): p.numel() for p in trained}
        return sum(counts.values()) - sum(counts.get(id(p), 0) for p in cnn.parameters())
    layers = _layers(inside, spec.lora_on)
    adapters = sum(spec.lora_rank * (m.in_features + m.out_features) for m in layers)
    return adapters + sum(p.numel() for p in trained)


def _blocks(net: nn.Module) -> list[nn.Module]:
    """The encoder's blocks, each with a ViT's four linear layers."""
    blocks = list(getattr(net, "blocks", None) or [])
    wanted = [f"blocks.{i}.{name}" for i in range(len(blocks)) for name in LAYERS.values()]
    missing = [name for name in wanted if not isinstance(_at(net, name), nn.Linear)]
    if not blocks or missing:
        lacks = f"has no linear layer {missing[0]}" if missing else "has no blocks"
        text = f"{type(net).__name__} {lacks}, so its parts cannot be told apart"
        fix = "set train.tune: all, or take a ViT whose blocks have attn.qkv, attn.proj and mlp.fc*"
        raise RecipeError.of("model.tune", "train.tune", text, fix)
    return blocks


def _at(module: nn.Module, path: str) -> nn.Module | None:
    found: Any = module
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part, None)
        if found is None:
            return None
    part_found: nn.Module = found
    return part_found


def _layers(blocks: list[nn.Module], names: tuple[str, ...]) -> list[nn.Linear]:
    found = [_at(block, LAYERS[name]) for block in blocks for name in names]
    return [layer for layer in found if isinstance(layer, nn.Linear)]


def _small(net: nn.Module, inside: list[nn.Module], spec: TrainSpec) -> Iterator[nn.Parameter]:
    """Biases or norms: of the whole model, or of its last blocks and the final norm."""
    after = [m for name in ("norm", "fc_norm") if (m := getattr(net, name, None)) is not None]
    for part in [net] if spec.blocks is None else [*inside, *after]:
        for module in part.modules():
            own = dict(module.named_parameters(recurse=False))
            if spec.tune == "norm" and not isinstance(module, nn.LayerNorm):
                continue
            yield from (p for name, p in own.items() if spec.tune == "norm" or name == "bias")


def _adapt(layer: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
    bound = layer.in_features**-0.5  # as torch draws a linear layer
    drawn = (torch.rand(rank, layer.in_features, generator=generator) * 2 - 1) * bound
    adapted: Any = layer
    adapted.__class__ = LoraLinear
    adapted.lora_a = nn.Parameter(drawn.to(layer.weight))
    adapted.lora_b = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
    adapted.lora_scale = alpha / rank


@torch.no_grad()
def merge(net: nn.Module, x: Tensor) -> float:
    """Puts every adapter's product into its weight and takes the adapter away.

    Args:
        net: As `apply` left it, in eval mode; without adapters it is left alone.
        x: Images that are shown before and after.

    Returns:
        Largest difference of the logits, over their largest value.

    Raises:
        VitftError: `train.merge`: the difference is no rounding (a bug of ours).
    """
    adapted = [m for m in net.modules() if isinstance(m, LoraLinear)]
    if not adapted:
        return 0.0
    before = net(x)
    for layer in adapted:
        layer.weight += layer.lora_b @ layer.lora_a * layer.lora_scale
        del layer.lora_a, layer.lora_b, layer.lora_scale
        plain: Any = layer
        plain.__class__ = nn.Linear
    gap = float((net(x) - before).abs().max() / (before.abs().max() + 1e-6))
    if not gap <= LIMIT:
        text = f"putting the adapters into the weights changed the logits by {gap:.1e}"
        raise VitftError.of("train.merge", type(net).__name__, text, "report this as a bug")
    return gap


def sentence(net: nn.Module, kind: str) -> str:
    """Such as `lora: 294,912 of 22,056,192 parameters are trained (1.34 %)`."""
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    every = sum(p.numel() for p in net.parameters())
    return (
        f"{kind}: {trained:,} of {every:,} parameters are trained ({100 * trained / every:.3g} %)"
    )
