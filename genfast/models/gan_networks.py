"""Networks of GANs: DCGAN's pair for images of any size, and a pair of MLPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

__all__ = ["DCGANDiscriminator", "DCGANGenerator", "MLPDiscriminator", "MLPGenerator"]

_SLOPE = 0.2
# The first layer of a generator makes maps of at most this height and width out of a code.
_SMALLEST = 4


class DCGANGenerator(nn.Module):
    """Codes [B, L, 1, 1] to images in [-1, 1] [B, C, H, W] (Radford, Metz and Chintala, "DCGAN", ICLR 2016).

    Transposed convolutions, each with batch norm and a ReLU, double the size up to the image's; the last one ends in a
    tanh. For (3, 64, 64), width 64 and 100 latent dimensions it is the ``netG`` of PyTorch's DCGAN example, key by key
    (``main.0.weight``, ...). Other sizes have as many layers as it takes to come down to 4 x 4.

    Args:
        latent_dim: L.
        image_shape: (C, H, W).
        width: channels before the last layer; each layer before has twice as many.

    Example:
        >>> import torch
        >>> DCGANGenerator(100, (1, 28, 28))(torch.randn(3, 100, 1, 1)).shape
        torch.Size([3, 1, 28, 28])
    """

    def __init__(self, latent_dim: int, image_shape: Sequence[int], width: int = 64) -> None:
        super().__init__()
        sizes, channels = _stages(image_shape, width)
        layers: list[nn.Module] = []
        before, kernels = latent_dim, [(sizes[-1], 1, 0)]
        kernels += [(_kernel(size), 2, 1) for size in reversed(sizes[:-1])]
        for after, (kernel, stride, padding) in zip([*reversed(channels), image_shape[0]], kernels, strict=True):
            layers += [nn.ConvTranspose2d(before, after, kernel, stride, padding, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
            before = after
        self.main = nn.Sequential(*layers[:-2], nn.Tanh())
        self.apply(_initialise)

    def forward(self, z: Tensor) -> Tensor:
        """The images of codes."""
        return self.main(z)


class DCGANDiscriminator(nn.Module):
    """Images [B, C, H, W] to logits [B, 1, 1, 1]: the generator's sizes in reverse, with leaky ReLUs.

    For (3, 64, 64) and width 64 it is the ``netD`` of PyTorch's DCGAN example, key by key, without its last sigmoid.

    Args:
        image_shape: (C, H, W).
        width: channels behind the first layer; each layer after has twice as many.
        batch_norm: of all layers but the first and the last. Without it the convolutions have biases.

    Example:
        >>> import torch
        >>> DCGANDiscriminator((1, 28, 28))(torch.randn(3, 1, 28, 28)).shape
        torch.Size([3, 1, 1, 1])
    """

    def __init__(self, image_shape: Sequence[int], width: int = 64, batch_norm: bool = True) -> None:
        super().__init__()
        sizes, channels = _stages(image_shape, width)
        layers: list[nn.Module] = []
        before = image_shape[0]
        for index, (after, size) in enumerate(zip(channels, sizes[:-1], strict=True)):
            layers += [nn.Conv2d(before, after, _kernel(size), 2, 1, bias=not batch_norm)]
            layers += [nn.BatchNorm2d(after)] * (batch_norm and index > 0)
            layers += [nn.LeakyReLU(_SLOPE, inplace=True)]
            before = after
        self.main = nn.Sequential(*layers, nn.Conv2d(before, 1, sizes[-1], bias=not batch_norm))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of images."""
        return self.main(x)


class MLPGenerator(nn.Module):
    """Codes [B, L] to images in [-1, 1] [B, C, H, W]: hidden layers of 4, 8 and 16 times `width`, with leaky ReLUs.

    Example:
        >>> import torch
        >>> MLPGenerator(100, (1, 28, 28))(torch.randn(3, 100)).shape
        torch.Size([3, 1, 28, 28])
    """

    def __init__(self, latent_dim: int, image_shape: Sequence[int], width: int = 64) -> None:
        super().__init__()
        sizes = (latent_dim, 4 * width, 8 * width, 16 * width, math.prod(image_shape))
        self.main = nn.Sequential(*_linear(sizes), nn.Tanh(), nn.Unflatten(1, tuple(image_shape)))

    def forward(self, z: Tensor) -> Tensor:
        """The images of codes."""
        return self.main(z)


class MLPDiscriminator(nn.Module):
    """Images [B, C, H, W] to logits [B, 1]: hidden layers of 8 and 4 times `width`, with leaky ReLUs.

    Example:
        >>> import torch
        >>> MLPDiscriminator((1, 28, 28))(torch.randn(3, 1, 28, 28)).shape
        torch.Size([3, 1])
    """

    def __init__(self, image_shape: Sequence[int], width: int = 64) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Flatten(), *_linear((math.prod(image_shape), 8 * width, 4 * width, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """The logits of images."""
        return self.main(x)


def _stages(image_shape: Sequence[int], width: int) -> tuple[list[tuple[int, int]], list[int]]:
    """(H, W) and what each halving leaves of it, and the channels behind each halving."""
    sizes = [(image_shape[1], image_shape[2])]
    while max(sizes[-1]) > _SMALLEST:
        sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
    return sizes, [width * 2**index for index in range(len(sizes) - 1)]


def _kernel(size: tuple[int, int]) -> tuple[int, ...]:
    """What halves a size with stride 2 and padding 1, and in reverse brings it back exactly."""
    return tuple(4 if side % 2 == 0 else 3 for side in size)


def _linear(sizes: Sequence[int]) -> list[nn.Module]:
    layers = [(nn.Linear(before, after), nn.LeakyReLU(_SLOPE, inplace=True)) for before, after in pairwise(sizes)]
    return [layer for pair in layers for layer in pair][:-1]


def _initialise(module: nn.Module) -> None:
    """As in the example: small normal weights, without which the pair often does not begin to learn."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
