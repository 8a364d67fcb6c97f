"""Networks that the models share: the tutorials' MLP, and a small convolutional pair for images of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["add_mlp", "conv_decoder", "conv_encoder", "largest_activation", "run_mlp"]


def add_mlp(owner: nn.Module, name: str, sizes: Sequence[int]) -> tuple[str, ...]:
    """Register linear layers ``name``, ``name_2``, ``name_3``, ... on `owner` itself, so that its keys are flat.

    Args:
        owner: the module that holds the layers.
        name: name of the first layer.
        sizes: widths, input first: n sizes make n - 1 layers.

    Returns:
        The names of the layers, in order.

    Example:
        >>> owner = nn.Module()
        >>> add_mlp(owner, "fc1", (784, 400, 200))
        ('fc1', 'fc1_2')
    """
    names = tuple(name if i == 0 else f"{name}_{i + 1}" for i in range(len(sizes) - 1))
    for layer, (size_in, size_out) in zip(names, pairwise(sizes), strict=True):
        owner.add_module(layer, nn.Linear(size_in, size_out))
    return names


def run_mlp(owner: nn.Module, names: Sequence[str], h: Tensor) -> Tensor:
    """Apply the layers of `add_mlp` to ``h`` [B, size], each followed by a ReLU.

    Example:
        >>> import torch
        >>> owner = nn.Module()
        >>> run_mlp(owner, add_mlp(owner, "fc1", (784, 400, 200)), torch.rand(3, 784)).shape
        torch.Size([3, 200])
    """
    for name in names:
        h = F.relu(getattr(owner, name)(h))
    return h


def conv_encoder(image_shape: Sequence[int], widths: Sequence[int], out_features: int) -> nn.Sequential:
    """Images [B, C, H, W] to [B, out_features]: for each width a 3x3 convolution of stride 2 and SiLU, then linear.

    Example:
        >>> import torch
        >>> conv_encoder((1, 28, 28), (32, 64), 40)(torch.rand(3, 1, 28, 28)).shape
        torch.Size([3, 40])
    """
    layers: list[nn.Module] = []
    for size_in, size_out in pairwise((image_shape[0], *widths)):
        layers += [nn.Conv2d(size_in, size_out, 3, stride=2, padding=1), nn.SiLU()]
    height, width = _halved(image_shape[1:], len(widths))[-1]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * height * width, out_features))


def conv_decoder(latent_dim: int, widths: Sequence[int], image_shape: Sequence[int]) -> nn.Sequential:
    """Codes [B, latent_dim] to images [B, C, H, W] (no final activation): the encoder's sizes in reverse.

    Upsampling by nearest neighbour before a convolution avoids the checkerboards of transposed convolutions (Odena,
    Dumoulin and Olah, "Deconvolution and checkerboard artifacts", Distill 2016) and reaches odd sizes exactly.

    Example:
        >>> import torch
        >>> conv_decoder(20, (32, 64), (1, 28, 28))(torch.rand(3, 20)).shape
        torch.Size([3, 1, 28, 28])
    """
    sizes = _halved(image_shape[1:], len(widths))
    start = (widths[-1], *sizes[-1])
    layers: list[nn.Module] = [nn.Linear(latent_dim, math.prod(start)), nn.Unflatten(1, start)]
    channels = pairwise((*reversed(widths), image_shape[0]))
    for (size_in, size_out), size in zip(channels, reversed(sizes[:-1]), strict=True):
        layers += [nn.SiLU(), nn.Upsample(size=size), nn.Conv2d(size_in, size_out, 3, padding=1)]
    return nn.Sequential(*layers)


def largest_activation(preset: str, latent_dim: int, widths: Sequence[int], image_shape: Sequence[int]) -> int:
    """Elements per image of the largest tensor within the networks of a preset.

    Example:
        >>> largest_activation("mlp", 20, (400,), (1, 28, 28)), largest_activation("conv", 20, (32, 64), (1, 28, 28))
        (784, 25088)
    """
    sizes = [latent_dim, math.prod(image_shape)]
    if preset == "mlp":
        return max(*sizes, *widths)
    # The decoder's upsampled maps: the encoder has the same channels at half the size.
    scales = _halved(image_shape[1:], len(widths))[:-1]
    return max(*sizes, *(channels * math.prod(size) for channels, size in zip(widths, scales, strict=True)))


def _halved(size: Sequence[int], times: int) -> list[tuple[int, int]]:
    """(H, W) and what each of `times` convolutions of stride 2 leaves of it."""
    height, width = size
    sizes = [(height, width)]
    for _ in range(times):
        height, width = -(-height // 2), -(-width // 2)
        sizes.append((height, width))
    return sizes
