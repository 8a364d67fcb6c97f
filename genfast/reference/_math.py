"""Elementwise functions that several references need, without the cancellation of the textbook form."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 stays, everything else is computed in fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def per_sample(x: Tensor) -> Tensor:
    """[B, ...] as [B, D]."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def rows_like(values: Tensor, x: Tensor) -> Tensor:
    """[B] values shaped to broadcast against x [B, ...]."""
    return values.reshape(-1, *[1] * (x.dim() - 1))


def expm1_minus(x: Tensor) -> Tensor:
    """exp(x) - 1 - x, by its Taylor series for |x| < 0.5, where the difference would cancel."""
    small = x.abs() < 0.5
    near = torch.where(small, x, 0.0)
    terms = 16 if x.dtype == torch.float64 else 9
    series = torch.full_like(x, 1 / math.factorial(terms))
    for k in range(terms - 1, 1, -1):
        series = series * near + 1 / math.factorial(k)
    return torch.where(small, near * near * series, torch.expm1(x) - x)
