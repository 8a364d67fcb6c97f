"""v = (x + u) / 256 of uint8 pixels, y = logit(alpha + (1 - 2 alpha) v), and its log-determinant, in plain PyTorch.

In fp64 wherever the device has it: between the last noise of one pixel and the next pixel lie 2^-16, which fp32 keeps
in y but not on the way there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genfast import random
from genfast.reference._math import compute_dtype, per_sample, rows_like

# Of the noise: with so many, pixel plus noise has the 24 bits of an fp32.
BITS = 15


def noise(like: Tensor, seed: Tensor, row_offset: int) -> Tensor:
    """The u of the seed, shaped like the pixels."""
    columns = math.prod(like.shape[1:])
    rows = random.uniform(seed, like.shape[0], columns, random.Stream.DEQUANTIZE, row_offset, bits=BITS)
    return rows.reshape(like.shape)


def forward(x: Tensor, seed: Tensor, row_offset: int, alpha: float) -> tuple[Tensor, Tensor]:
    """y fp32 like x, and logdet fp32 [B]."""
    return forward_given(noise(x, seed, row_offset), x, alpha)


def forward_given(u: Tensor, x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The same for a noise that is given; fp64 for fp64. Differentiable."""
    dtype, small, large, _ = _sides(u, x, alpha)
    log_small, log_large = torch.log(small), torch.log(large)
    logdet = _log_slope(alpha) - log_small - log_large
    return (log_small - log_large).to(dtype), per_sample(logdet).sum(1).to(dtype)


def backward_given(u: Tensor, x: Tensor, alpha: float, grad_y: Tensor | None, grad_logdet: Tensor | None) -> Tensor:
    """The gradient of u."""
    _, w, rest, slope = _sides(u, x, alpha)
    total = torch.zeros_like(w)
    if grad_y is not None:
        total = total + grad_y
    if grad_logdet is not None:
        total = total + rows_like(grad_logdet, u) * (w - rest)
    return (slope * total / (w * rest)).to(u.dtype)


def inverse(y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The inverse's logdet at y, and the pixel whose bin y lies in: of y beyond all of them the nearest, 0 of a NaN.

    In this order since torch's opcheck adds up the outputs in the dtype of the first one.
    """
    wide = _wide(y)
    pixel = (256 / (1 - 2 * alpha) * (torch.sigmoid(wide) - alpha)).floor().clamp(0, 255)
    logdet = torch.nn.functional.logsigmoid(wide) + torch.nn.functional.logsigmoid(-wide) - _log_slope(alpha)
    return per_sample(logdet).sum(1).to(compute_dtype(y)), pixel.nan_to_num(0.0).to(torch.uint8)


def _wide(x: Tensor) -> Tensor:
    """In fp64, or fp32 on Apple's GPUs, which have none."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _log_slope(alpha: float) -> float:
    """The log of dw / dx."""
    return math.log(1 - 2 * alpha) - 8 * math.log(2)


def _sides(u: Tensor, x: Tensor, alpha: float) -> tuple[torch.dtype, Tensor, Tensor, float]:
    """The dtype of the results, w, 1 - w, and dw / du."""
    slope, wide = (1 - 2 * alpha) / 256, _wide(u)
    pixel = x.to(wide.dtype)
    # 1 - w from its own side: it is small where w is all but 1.
    return compute_dtype(u), alpha + slope * (pixel + wide), alpha + slope * ((255 - pixel) + (1 - wide)), slope
