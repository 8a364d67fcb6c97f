"""Elementwise functions that several references need, without the cancellation of the textbook form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# How a coupling layer makes its scale of a network's output s.
SCALE_MAPS = ("exp", "tanh", "atan", "sigmoid")


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
    near = x.clamp(-0.5, 0.5)
    terms = 16 if x.dtype == torch.float64 else 9
    series = torch.full_like(x, 1 / math.factorial(terms))
    for k in range(terms - 1, 1, -1):
        series = series * near + 1 / math.factorial(k)
    return torch.where(small, near * near * series, torch.expm1(x) - x)


def log_scale(s: Tensor, scale_map: str, factor: Tensor | float = 2.0, min_scale: float = 0.0) -> Tensor:
    """The logarithm of a coupling's scale: s, factor tanh(s), factor 0.636 atan(s / factor) (the soft clamp of FrEIA)
    or log(sigmoid(s + 2) + min_scale). Differentiable."""
    if scale_map == "exp":
        return s
    if scale_map == "tanh":
        return factor * torch.tanh(s)
    if scale_map == "atan":
        return 0.636 * factor * torch.atan(s / factor)
    if min_scale == 0.0:
        return torch.nn.functional.logsigmoid(s + 2)
    positive, t, top = _sigmoid_parts(s, min_scale)
    # log(top) by its excess over 1, which is small where the scale is all but 1.
    near = torch.log1p(min_scale * (1 + t))
    return torch.where(positive, near, torch.log(torch.where(positive, 1.0, top))) - torch.log1p(t)


def log_scale_slope(s: Tensor, scale_map: str, factor: Tensor | float = 2.0, min_scale: float = 0.0) -> Tensor:
    """The derivative of `log_scale` by s, nowhere as a difference."""
    if scale_map == "exp":
        return torch.ones_like(s)
    if scale_map == "tanh":
        return factor / torch.cosh(s).square()
    if scale_map == "atan":
        return 0.636 / (1 + (s / factor) ** 2)
    if min_scale == 0.0:
        return torch.sigmoid(-2 - s)
    _, t, top = _sigmoid_parts(s, min_scale)
    return t / ((1 + t) * top)


def _sigmoid_parts(s: Tensor, min_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Whether a = s + 2 is positive, t = exp(-|a|), and (1 + t) (sigmoid(a) + min_scale)."""
    a = s + 2
    positive = a >= 0
    # Not abs(): its derivative at 0 is 0.
    t = torch.exp(-torch.where(positive, a, -a))
    return positive, t, torch.where(positive, 1.0, t) + min_scale * (1 + t)
