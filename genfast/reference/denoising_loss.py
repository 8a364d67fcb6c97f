"""w mean((pred - (p x0 + q eps))^2) of each sample in plain PyTorch."""

from __future__ import annotations

import math

from torch import Tensor

from genfast.reference._linear_gaussian import clean, gathered, loss_weight, target_coefficients, wide_rows
from genfast.reference._math import compute_dtype, per_sample
from genfast.reference.forward_noising import forward_noise


def _parts(
    pred: Tensor, x0: Tensor | None, a: Tensor, b: Tensor, t: Tensor | None, seed: Tensor | None,
    noise: Tensor | None, row_offset: int, objective: str, weighting: str, gamma: float, sigma_data: float,
) -> tuple[Tensor, Tensor]:
    """The error pred - target, and the factor of its sum of squares, shaped alike."""
    wide = compute_dtype(pred)
    a, b = gathered(a, t).to(wide), gathered(b, t).to(wide)
    p, q = target_coefficients(a, b, objective, sigma_data)
    error = pred.to(wide)
    if objective != "epsilon":
        error = error - wide_rows(p, error) * clean(x0, wide)
    if objective != "x0":
        error = error - wide_rows(q, error) * forward_noise(error, seed, noise, row_offset)
    # 0 a: a timestep outside the tables makes the sample NaN whatever the objective reads of them.
    factor = 0 * a + 1 / max(1, math.prod(pred.shape[1:]))
    weight = loss_weight(a, b, objective, weighting, gamma, sigma_data)
    return error, wide_rows(factor if weight is None else factor * weight, error)


def forward(
    pred: Tensor, x0: Tensor | None, a: Tensor, b: Tensor, t: Tensor | None, seed: Tensor | None,
    noise: Tensor | None, row_offset: int, objective: str, weighting: str, gamma: float, sigma_data: float,
) -> Tensor:
    """loss [B], fp32 (fp64 for fp64); a and b are tables [T] that t points into, or [B] without t. Differentiable."""
    error, factor = _parts(pred, x0, a, b, t, seed, noise, row_offset, objective, weighting, gamma, sigma_data)
    return per_sample(factor * error * error).sum(1)


def backward(
    pred: Tensor, x0: Tensor | None, a: Tensor, b: Tensor, t: Tensor | None, seed: Tensor | None,
    noise: Tensor | None, row_offset: int, objective: str, weighting: str, gamma: float, sigma_data: float,
    grad_loss: Tensor,
) -> Tensor:
    """The gradient of pred, the noise drawn again from the seed."""
    error, factor = _parts(pred, x0, a, b, t, seed, noise, row_offset, objective, weighting, gamma, sigma_data)
    return (2 * wide_rows(grad_loss, error) * factor * error).to(pred.dtype)


def forward_with_grad(
    pred: Tensor, x0: Tensor | None, a: Tensor, b: Tensor, t: Tensor | None, seed: Tensor | None,
    noise: Tensor | None, row_offset: int, objective: str, weighting: str, gamma: float, sigma_data: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """The sum over the batch, or its mean over the samples, and its gradient."""
    error, factor = _parts(pred, x0, a, b, t, seed, noise, row_offset, objective, weighting, gamma, sigma_data)
    total, gradient = (factor * error * error).sum(), 2 * factor * error
    if mean:
        total, gradient = total / pred.shape[0], gradient / pred.shape[0]
    return total, gradient.to(pred.dtype)
