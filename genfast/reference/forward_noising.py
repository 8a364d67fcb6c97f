"""x_t = a x0 + b eps in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genfast import random
from genfast.reference._linear_gaussian import clean, gathered, wide_rows
from genfast.reference._math import compute_dtype


def forward_noise(like: Tensor, seed: Tensor | None, noise: Tensor | None, row_offset: int) -> Tensor:
    """The noise as given, or that of the seed, shaped like the images, in the dtype that they are computed in."""
    if noise is not None:
        return noise.to(compute_dtype(like))
    rows = random.normal(seed, like.shape[0], math.prod(like.shape[1:]), random.Stream.FORWARD_NOISE, row_offset)
    return rows.reshape(like.shape).to(compute_dtype(like))


def forward(
    x0: Tensor, a: Tensor, b: Tensor, t: Tensor | None, seed: Tensor | None, noise: Tensor | None,
    row_offset: int, dtype: torch.dtype,
) -> Tensor:
    """x_t of the given dtype; a and b are tables [T] that t points into, or [B] without t. Differentiable."""
    wide = torch.promote_types(compute_dtype(x0), compute_dtype(torch.empty(0, dtype=dtype)))
    a, b = wide_rows(gathered(a, t), x0), wide_rows(gathered(b, t), x0)
    return (a * clean(x0, wide) + b * forward_noise(x0, seed, noise, row_offset)).to(dtype)
