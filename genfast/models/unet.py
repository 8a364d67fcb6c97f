"""The usual small U-Net of diffusion models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast.models.base import _check_sizes, check_choice

__all__ = ["UNet", "time_embedding"]

_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "channels": 16,
        "channel_mults": (1, 2, 4),
        "num_res_blocks": 1,
        "attention_levels": (2,),
        "dropout": 0.0,
        "heads": 2,
    },
    "small": {
        "channels": 64,
        "channel_mults": (1, 2, 2),
        "num_res_blocks": 1,
        "attention_levels": (1,),
        "dropout": 0.0,
        "heads": 4,
    },
    "base": {
        "channels": 128,
        "channel_mults": (1, 2, 2, 2),
        "num_res_blocks": 2,
        "attention_levels": (1,),
        "dropout": 0.1,
        "heads": 1,
    },
}


class UNet(nn.Module):
    """The U-Net of Ho, Jain and Abbeel, "Denoising diffusion probabilistic models" (NeurIPS 2020), for small images.

    Residual blocks (GroupNorm, SiLU, convolution, twice) that add an embedding of the time t, self-attention at some
    resolutions and in the middle, and skip connections by concatenation. The last convolution of each block, the last
    layer of each attention and the output layer start at zero: a new net predicts 0.

    ========= ======== ============ ========== ========= ======= ===== ========== ==========
    preset    channels mults        res blocks attention dropout heads parameters (3, 32, 32)
    ========= ======== ============ ========== ========= ======= ===== ========== ==========
    ``tiny``  16       (1, 2, 4)    1          7         0       2        686,769    687,347
    ``small`` 64       (1, 2, 2)    1          14        0       4      4,435,393  4,437,699
    ``base``  128      (1, 2, 2, 2) 2          14        0.1     1     35,741,697 35,746,307
    ========= ======== ============ ========== ========= ======= ===== ========== ==========

    The first count of parameters is for (1, 28, 28), as is the attention: at 8 or 16 for images of side 32. ``tiny`` is
    for a CPU, ``small`` for MNIST on one GPU, and ``base`` is the network of Ho et al. for CIFAR-10.

    Images of any size pass: each level has half the side of the one before it, rounded up, and the way up resizes to
    the sizes of the way down. ``net.to(memory_format=torch.channels_last)`` keeps all activations in that layout, with
    no copies, save that torch's GroupNorm for CUDA returns contiguous ones where it is not compiled.

    Args:
        image_shape: (C, H, W).
        preset: ``"tiny"``, ``"small"`` or ``"base"``: the values of the arguments that are None.
        channels: width of the first level.
        channel_mults: width of each level, as a multiple of ``channels``; as many levels as multiples.
        num_res_blocks: residual blocks of each level on the way down; one more on the way up.
        attention_resolutions: levels with self-attention, by the larger side of their images: some of 28, 14, 7, ...
            for images of side 28. The middle, at the last of these, always has it.
        dropout: probability, within the residual blocks.
        out_channels: of the output. None: C; 2 C where the net predicts a variance as well.
        groups: of the GroupNorms, a divisor of ``channels``. None: at most 32, of at least 4 channels each.
        heads: of the attention, a divisor of the widths where there is attention.
        scale_shift: the time scales and shifts what the second GroupNorm of a block returns, instead of being added
            before it (Nichol and Dhariwal, "Improved denoising diffusion probabilistic models", ICML 2021).

    Raises:
        ValueError: an argument is out of range, or does not fit the others.

    Example:
        >>> net = UNet((1, 28, 28), "tiny")
        >>> net(torch.randn(2, 1, 28, 28), torch.tensor([0, 999])).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 28, 28),
        preset: Literal["tiny", "small", "base"] = "small",
        channels: int | None = None,
        channel_mults: Sequence[int] | None = None,
        num_res_blocks: int | None = None,
        attention_resolutions: Sequence[int] | None = None,
        dropout: float | None = None,
        out_channels: int | None = None,
        groups: int | None = None,
        heads: int | None = None,
        scale_shift: bool = False,
    ) -> None:
        super().__init__()
        check_choice("preset", preset, tuple(_PRESETS))
        _check_sizes("image_shape", image_shape, count=3)
        given = {
            "channels": channels,
            "channel_mults": channel_mults,
            "num_res_blocks": num_res_blocks,
            "dropout": dropout,
            "out_channels": out_channels,
            "groups": groups,
            "heads": heads,
        }
        chosen = {"out_channels": image_shape[0], **_PRESETS[preset]}
        chosen.update((name, value) for name, value in given.items() if value is not None)
        for name in ("channels", "num_res_blocks", "out_channels", "heads"):
            _check_sizes(name, [chosen[name]])
        channels, mults, dropout = chosen["channels"], chosen["channel_mults"], chosen["dropout"]
        _check_sizes("channel_mults", mults)
        if not mults:
            raise ValueError("channel_mults: expected at least one level, got none")
        groups = chosen.get("groups", _default_groups(channels))
        if type(groups) is not int or groups < 1 or channels % groups:
            raise ValueError(f"groups: expected a divisor of channels = {channels}, got {groups!r}")
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout!r}")
        if not isinstance(scale_shift, bool):
            raise ValueError(f"scale_shift: expected True or False, got {scale_shift!r}")
        attention = _attention_levels(attention_resolutions, image_shape, mults, chosen["attention_levels"])
        widths, last = [channels * mult for mult in mults], len(mults) - 1
        for level in sorted({*attention, last}):
            if widths[level] % chosen["heads"]:
                expected = f"a divisor of the width {widths[level]} at level {level}"
                raise ValueError(f"heads: expected {expected}, got {chosen['heads']}")
        self.image_shape = tuple(image_shape)
        self.out_channels = chosen["out_channels"]

        def block(size_in: int, size_out: int, attend: bool) -> _Block:
            heads = chosen["heads"] if attend else 0
            return _Block(size_in, size_out, 4 * channels, groups, dropout, heads, scale_shift)

        self.time = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, 4 * channels), nn.SiLU()
        )
        self.stem = nn.Conv2d(image_shape[0], channels, 3, padding=1)
        self.down, self.shrink, skips = nn.ModuleList(), nn.ModuleList(), [channels]
        for level, width in enumerate(widths):
            if level > 0:
                self.shrink.append(nn.Conv2d(skips[-1], skips[-1], 3, stride=2, padding=1))
                skips.append(skips[-1])
            self.down.append(nn.ModuleList())
            for _ in range(chosen["num_res_blocks"]):
                self.down[-1].append(block(skips[-1], width, level in attention))
                skips.append(width)
        size = widths[last]
        self.middle = nn.ModuleList([block(size, size, True), block(size, size, False)])
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            if level < last:
                self.grow.append(nn.Conv2d(size, size, 3, padding=1))
            self.up.append(nn.ModuleList())
            for _ in range(chosen["num_res_blocks"] + 1):
                self.up[-1].append(block(size + skips.pop(), width, level in attention))
                size = width
        self.norm = nn.GroupNorm(groups, size)
        self.head = _zeroed(nn.Conv2d(size, self.out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict from noised images and their times.

        Args:
            x: [B, C, H, W] floats.
            t: [B] times, ints or floats on the scale 0 to 1000 of discrete schedules.

        Returns:
            [B, out_channels, H, W].

        Raises:
            ValueError: a shape, a dtype or a device does not fit.
        """
        if tuple(x.shape[1:]) != self.image_shape:
            expected = str(["B", *self.image_shape]).replace("'", "")
            raise ValueError(f"x: expected shape {expected}, got {list(x.shape)}")
        if not isinstance(t, Tensor) or t.shape != x.shape[:1] or t.device != x.device:
            got = f"{list(t.shape)} on {t.device}" if isinstance(t, Tensor) else repr(t)
            raise ValueError(f"t: expected a tensor of shape [{x.shape[0]}] on {x.device}, got {got}")
        embedding = time_embedding(t, self.time[0].in_features)
        embedding = self.time(embedding.to(self.time[0].weight.dtype))
        h = self.stem(x)
        skips = [h]
        for level, blocks in enumerate(self.down):
            if level > 0:
                h = self.shrink[level - 1](h)
                skips.append(h)
            for block in blocks:
                h = block(h, embedding)
                skips.append(h)
        for block in self.middle:
            h = block(h, embedding)
        for level, blocks in enumerate(self.up):
            if level > 0:
                h = self.grow[level - 1](F.interpolate(h, size=skips[-1].shape[2:]))
            for block in blocks:
                h = block(torch.cat((h, skips.pop()), 1), embedding)
        return self.head(F.silu(self.norm(h)))


def time_embedding(t: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sines and cosines of t at dim // 2 frequencies, from 1 down to 1 / max_period in equal ratios.

    The first half are sines, as in Ho et al. (2020) and diffusers' ``get_timestep_embedding``. Computed in fp32 also
    under autocast, because t = 999 is not a number in bf16.

    Args:
        t: [B] times, ints or floats.
        dim: numbers for each time, at least 4; if odd, the last one is 0.
        max_period: the longest period, in units of 2 pi.

    Returns:
        fp32 [B, dim].

    Raises:
        ValueError: t is not [B] of ints or floats, or dim is less than 4.

    Example:
        >>> time_embedding(torch.tensor([0, 500]), 4)[0]
        tensor([0., 0., 1., 1.])
    """
    if t.dim() != 1 or t.dtype == torch.bool or t.is_complex():
        raise ValueError(f"t: expected ints or floats of shape [B], got {t.dtype} of shape {list(t.shape)}")
    if dim < 4:
        raise ValueError(f"dim: expected at least 4, got {dim}")
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float().unsqueeze(1) * torch.exp(-math.log(max_period) * steps / (half - 1))
    return F.pad(torch.cat((angles.sin(), angles.cos()), 1), (0, dim % 2))


class _Block(nn.Module):
    """A residual block, then attention where ``heads`` is not 0."""

    def __init__(
        self, size_in: int, size_out: int, time_size: int, groups: int, dropout: float, heads: int, scale_shift: bool
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, size_in)
        self.conv1 = nn.Conv2d(size_in, size_out, 3, padding=1)
        self.time = nn.Linear(time_size, size_out * (2 if scale_shift else 1))
        self.norm2 = nn.GroupNorm(groups, size_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zeroed(nn.Conv2d(size_out, size_out, 3, padding=1))
        self.skip = nn.Identity() if size_in == size_out else nn.Conv2d(size_in, size_out, 1)
        self.attention = _Attention(size_out, groups, heads) if heads else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        time = self.time(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, 1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(self.skip(x) + h)


class _Attention(nn.Module):
    """Self-attention over the positions of an image, added to it."""

    def __init__(self, size: int, groups: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, size)
        self.qkv = nn.Linear(size, 3 * size)
        self.out = _zeroed(nn.Linear(size, size))

    def forward(self, x: Tensor) -> Tensor:
        # [B, H W, C] is how channels_last lies in memory: no copy on the way in or out.
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, 2))
        tokens = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


def _zeroed(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _default_groups(channels: int) -> int:
    return max(groups for groups in range(1, 33) if channels % groups == 0 and (channels >= 4 * groups or groups == 1))


def _attention_levels(
    resolutions: Sequence[int] | None, image_shape: Sequence[int], mults: Sequence[int], default: Sequence[int]
) -> set[int]:
    """The levels of these resolutions."""
    if resolutions is None:
        return {level for level in default if level < len(mults)}
    _check_sizes("attention_resolutions", resolutions)
    halvings = itertools.accumulate(mults[1:], lambda side, _: -(-side // 2), initial=max(image_shape[1:]))
    levels = {side: level for level, side in enumerate(halvings)}
    for side in resolutions:
        if side not in levels:
            sides = ", ".join(map(str, levels))
            raise ValueError(f"attention_resolutions: expected some of {sides}, got {side}")
    return {levels[side] for side in resolutions}
