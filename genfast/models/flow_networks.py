"""The networks within couplings: what one half of an image or vector says about how the other is transformed.

All start with zeros in their last layer, so that a new flow's couplings begin as the map that they give for zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MLP", "FoldRows", "GatedAttentionNet", "GlowNet", "ResidualNet"]


class MLP(nn.Module):
    """Vectors [B, in_features] to [B, out_features], through hidden layers with leaky ReLUs.

    Args:
        in_features, out_features: sizes.
        hidden: width of the hidden layers.
        layers: how many hidden layers.

    Example:
        >>> MLP(3, 4, hidden=16)(torch.randn(2, 3)).abs().max()
        tensor(0., grad_fn=<MaxBackward1>)
    """

    def __init__(self, in_features: int, out_features: int, hidden: int, layers: int = 2) -> None:
        super().__init__()
        sizes = [in_features] + [hidden] * layers
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.last = _zeros(nn.Linear(hidden, out_features))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.leaky_relu(layer(x))
        return self.last(x)


class ResidualNet(nn.Module):
    """RealNVP's network: residual blocks of a 3x3 and a 1x1 convolution between two 3x3 convolutions.

    Args:
        in_channels, out_channels: of [B, C, H, W].
        hidden: channels within.
        blocks: how many residual blocks.

    Example:
        >>> ResidualNet(2, 4, hidden=8, blocks=1)(torch.randn(3, 2, 7, 5)).shape
        torch.Size([3, 4, 7, 5])
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, hidden, 3, padding=1)
        self.blocks = nn.ModuleList(_ResidualBlock(hidden) for _ in range(blocks))
        self.last = _zeros(nn.Conv2d(hidden, out_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(F.relu(x))


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.relu(self.wide(F.relu(x))))


class GlowNet(nn.Module):
    """Glow's network (Kingma and Dhariwal, "Glow", NeurIPS 2018, section 4): convolutions 3x3, 1x1 and 3x3.

    Args:
        in_channels, out_channels: of [B, C, H, W].
        hidden: channels within.

    Example:
        >>> GlowNet(2, 4, hidden=8)(torch.randn(3, 2, 7, 5)).shape
        torch.Size([3, 4, 7, 5])
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, hidden, 3, padding=1)
        self.mix = nn.Conv2d(hidden, hidden, 1)
        self.last = _zeros(nn.Conv2d(hidden, out_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.mix(F.relu(self.first(x)))))


class GatedAttentionNet(nn.Module):
    """Flow++'s network (Ho et al., "Flow++", ICML 2019, section 3.3): gated convolutions and self-attention.

    Args:
        in_channels, out_channels: of [B, C, H, W].
        hidden: channels within.
        blocks: how many pairs of a gated convolution and an attention.
        size: (H, W), for the embedding of positions.
        heads: of the attention, a divisor of `hidden`.

    Raises:
        ValueError: `hidden` is no multiple of `heads`.

    Example:
        >>> GatedAttentionNet(2, 4, hidden=8, blocks=1, size=(7, 5))(torch.randn(3, 2, 7, 5)).shape
        torch.Size([3, 4, 7, 5])
    """

    def __init__(
        self, in_channels: int, out_channels: int, hidden: int, blocks: int, size: Sequence[int], heads: int = 4
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"hidden: expected a multiple of the {heads} heads of the attention, got {hidden}")
        self.first = nn.Conv2d(in_channels, hidden, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(_GatedConv(hidden), _Attention(hidden, size, heads)) for _ in range(blocks)
        )
        self.last = _zeros(nn.Conv2d(hidden, out_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(F.silu(x))


class _GatedConv(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1)
        self.gate = nn.Conv2d(channels, 2 * channels, 1)
        # Over channels and places: as a layer norm, without a copy to channels last.
        self.norm = nn.GroupNorm(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + F.glu(self.gate(F.silu(self.wide(F.silu(x)))), 1))


class _Attention(nn.Module):
    def __init__(self, channels: int, size: Sequence[int], heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(0.01 * torch.randn(channels, *size))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.gate = nn.Conv2d(channels, 2 * channels, 1)
        self.norm = nn.GroupNorm(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x + self.position).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(3, 4)
        out = F.scaled_dot_product_attention(*qkv.unbind(1)).transpose(2, 3)
        return self.norm(x + F.glu(self.gate(out.reshape(x.shape)), 1))


class FoldRows(nn.Module):
    """A network of checkerboard halves, which sees each pair of rows as channels of one.

    In a half of a checkerboard, [B, C, H, W/2], even and odd rows hold columns of different parity, so what is above
    and below a pixel depends on its row. Folded to [B, 2 C, H/2, W/2] all places look alike to a convolution, which
    is on a quarter of the image's places.

    Args:
        net: [B, 2 C, H/2, W/2] to [B, 2 P, H/2, W/2].

    Example:
        >>> FoldRows(nn.Conv2d(2, 4, 1))(torch.randn(3, 1, 8, 4)).shape
        torch.Size([3, 2, 8, 4])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x.unflatten(2, (-1, 2)).transpose(2, 3).flatten(1, 2))
        return out.unflatten(1, (-1, 2)).transpose(2, 3).flatten(2, 3)


def _zeros(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
