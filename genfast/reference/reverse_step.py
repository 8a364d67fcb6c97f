"""One step of the reverse process from t to t_prev, stochastic or not, in plain PyTorch.

With (a, b) at t, (a_s, b_s) at t_prev and d = log(a / b) - log(a_s / b_s) <= 0, a Gaussian whose mean is linear in x_t
and the clean image x0. Every coefficient is written with expm1(2 d), so that short steps do not cancel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from genfast import random
from genfast.reference._linear_gaussian import gathered, target_coefficients, wide_rows
from genfast.reference._math import compute_dtype, per_sample, rows_like

VARIANCES = ("fixed_small", "fixed_large", "learned_range")
_CLEAN = (1.0, 0.0, math.inf, 0.0)
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class _Step(NamedTuple):
    """A sample's numbers, shaped like x_t: x0 = x0_x x_t + x0_pred pred, and mean = m_x0 x0 + m_x x_t + m_pred pred.

    Without clipping x0 is folded into the other two. sigma = scale exp(slope v).
    """

    x0_x: Tensor
    x0_pred: Tensor
    m_x0: Tensor
    m_x: Tensor
    m_pred: Tensor
    scale: Tensor
    slope: Tensor


def _previous(prev: Tensor, t_prev: Tensor | None) -> Tensor:
    """The entries at t_prev; those of the clean image at -1."""
    entries = gathered(prev, t_prev)
    if t_prev is None:
        return entries
    return torch.where(t_prev == -1, entries.new_tensor(_CLEAN)[:, None], entries)


def _deviation(b: Tensor, b_s: Tensor, kappa: Tensor, eta: float, variance: str) -> tuple[Tensor, Tensor]:
    """(scale, slope) of sigma; nothing is added on the way to a clean image."""
    low, high = {"fixed_small": (b_s, b_s), "fixed_large": (b, b), "learned_range": (b_s, b)}[variance]
    scale, slope = eta * torch.sqrt(kappa) * high, 0 * kappa
    if variance == "learned_range":
        scale, slope = eta * torch.sqrt(kappa) * torch.sqrt(low) * torch.sqrt(high), 0.5 * torch.log(high / low)
    # 0 kappa: an entry outside its table stays NaN.
    return tuple(torch.where(b_s == 0, 0 * kappa, value) for value in (scale, slope))


def _step(
    like: Tensor, now: Tensor, prev: Tensor, t: Tensor | None, t_prev: Tensor | None, objective: str,
    sigma_data: float, eta: float, clip: float | None, variance: str, recompute_eps: bool,
) -> _Step:
    dtype = compute_dtype(like)
    a, b, high, low = gathered(now, t).to(dtype)
    a_s, b_s, high_s, low_s = _previous(prev, t_prev).to(dtype)
    d = torch.where(high == high_s, 0.0, high - high_s) + (low - low_s)
    decay, kappa = torch.exp(d), -torch.expm1(2 * d)
    # Not 0 inf, where t itself is clean.
    square = (eta * decay) ** 2 if eta > 0 else torch.zeros_like(decay)
    # sqrt(1 - eta^2 kappa): what of b_s still points along eps.
    root = torch.sqrt((1 - eta) * (1 + eta) + square)
    ratio = decay * root
    gap = torch.where(d.abs() < 0.5, kappa * (1 + square) / (1 + ratio), 1 - ratio)
    direction = b_s * root
    p, q = target_coefficients(a, b, objective, sigma_data)
    det = a * q - b * p
    zero = 0 * det
    x0_x, x0_pred = q / det, -b / det
    if clip is None:
        # a_s b - direction a, without cancellation.
        towards_x0 = torch.where(b == 0, -direction * a, a_s * b * gap)
        mean = (zero, (a_s * q - direction * p) / det, -towards_x0 / det)
    elif recompute_eps:
        mean = (a_s * gap, direction / b, zero)
    else:
        mean = (a_s, -direction * p / det, direction * a / det)
    deviation = _deviation(b, b_s, kappa, eta, variance) if eta > 0 else (zero, zero)
    return _Step(*(rows_like(value, like) for value in (x0_x, x0_pred, *mean, *deviation)))


def _mean(
    x_t: Tensor, pred: Tensor, step: _Step, clip: float | None, recompute_eps: bool
) -> tuple[Tensor, Tensor | None]:
    """The mean, and where clipping stops the gradient."""
    mean = step.m_x * x_t
    if clip is None or not recompute_eps:
        mean = mean + step.m_pred * pred
    if clip is None:
        return mean, None
    x0 = step.x0_x * x_t + step.x0_pred * pred
    # Comparisons keep a NaN; on the bound the gradient passes.
    below, above = x0 < -clip, x0 > clip
    x0 = torch.where(below, -clip, torch.where(above, clip, x0))
    return step.m_x0 * x0 + mean, below | above


def _noise(like: Tensor, salt: Tensor, seed: Tensor | None, noise: Tensor | None, row_offset: int) -> Tensor:
    if noise is not None:
        return noise.to(compute_dtype(like))
    columns = math.prod(like.shape[1:])
    rows = random.normal(seed, like.shape[0], columns, random.Stream.REVERSE_STEP, row_offset, salt)
    return rows.reshape(like.shape).to(compute_dtype(like))


def _sigma(step: _Step, v: Tensor | float) -> Tensor:
    return step.scale if isinstance(v, float) else step.scale * torch.exp(step.slope * v)


def _standardized(x_prev: Tensor, mean: Tensor, step: _Step, v: Tensor | float) -> tuple[Tensor, Tensor]:
    """(x_prev - mean) / sigma, and 1 / sigma; finite where sigma is 0."""
    scale = 1 / torch.where(step.scale == 0, 1.0, _sigma(step, v))
    return (x_prev.to(mean.dtype) - mean) * scale, scale


def _halves(pred: Tensor, variance: str) -> tuple[Tensor, Tensor | float]:
    """The prediction, and v, both in the dtype that they are computed in."""
    pred = pred.to(compute_dtype(pred))
    return pred.chunk(2, 1) if variance == "learned_range" else (pred, 0.0)


def forward(
    x_t: Tensor, pred: Tensor, now: Tensor, prev: Tensor, t: Tensor | None, t_prev: Tensor | None, salt: Tensor,
    seed: Tensor | None, noise: Tensor | None, x_prev: Tensor | None, row_offset: int, objective: str,
    sigma_data: float, eta: float, clip: float | None, variance: str, recompute_eps: bool, log_prob: bool,
) -> tuple[Tensor, Tensor]:
    """x_prev (empty if it is given), and its log-probability [B] in fp32, fp64 for fp64 (empty if not wanted).

    now, prev: rows a, b and the two parts of log(a / b), at each sample's time, or [4, T] where t and t_prev point.
    Differentiable; the log-probability counts x_prev as a constant.
    """
    step = _step(x_t, now, prev, t, t_prev, objective, sigma_data, eta, clip, variance, recompute_eps)
    x, (prediction, v) = x_t.to(compute_dtype(x_t)), _halves(pred, variance)
    mean, _ = _mean(x, prediction, step, clip, recompute_eps)
    out = x_t.new_empty(0)
    if x_prev is None:
        value = mean
        if eta > 0:
            value = mean + _sigma(step, v) * _noise(x_t, salt, seed, noise, row_offset)
        out = value.to(torch.promote_types(x_t.dtype, pred.dtype))
        x_prev = out.detach()
    if not log_prob:
        return out, mean.new_empty(0)
    # The value that was rounded: a policy gradient looks it up again.
    z, scale = _standardized(x_prev, mean, step, v)
    density = torch.where(step.scale == 0, 0.0, -0.5 * z * z + torch.log(scale) - _HALF_LOG_2PI)
    return out, per_sample(density).sum(1)


def backward(
    x_t: Tensor, pred: Tensor, now: Tensor, prev: Tensor, t: Tensor | None, t_prev: Tensor | None, salt: Tensor,
    seed: Tensor | None, noise: Tensor | None, x_prev: Tensor | None, row_offset: int, objective: str,
    sigma_data: float, eta: float, clip: float | None, variance: str, recompute_eps: bool,
    grad_x_prev: Tensor | None, grad_log_prob: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x_t and pred; x_prev is what was given or what came out, if there is a gradient of its density."""
    step = _step(x_t, now, prev, t, t_prev, objective, sigma_data, eta, clip, variance, recompute_eps)
    x, (prediction, v) = x_t.to(compute_dtype(x_t)), _halves(pred, variance)
    mean, stopped = _mean(x, prediction, step, clip, recompute_eps)
    to_mean, to_v = torch.zeros_like(mean), torch.zeros_like(mean)
    if grad_x_prev is not None:
        upstream = grad_x_prev.to(mean.dtype)
        to_mean = to_mean + upstream
        if variance == "learned_range" and eta > 0:
            noise = _noise(x_t, salt, seed, noise, row_offset)
            to_v = to_v + upstream * noise * _sigma(step, v) * step.slope
    if grad_log_prob is not None:
        z, scale = _standardized(x_prev, mean, step, v)
        upstream = torch.where(step.scale == 0, 0.0, wide_rows(grad_log_prob, mean))
        to_mean = to_mean + upstream * z * scale
        to_v = to_v + upstream * (z * z - 1) * step.slope
    to_x0 = 0.0 if stopped is None else torch.where(stopped, 0.0, step.m_x0 * to_mean)
    grad_x = step.m_x * to_mean + step.x0_x * to_x0
    grad_pred = step.m_pred * to_mean + step.x0_pred * to_x0
    if variance == "learned_range":
        grad_pred = torch.cat([grad_pred, to_v], 1)
    return grad_x.to(x_t.dtype), grad_pred.to(pred.dtype)


def standard_deviation(
    pred: Tensor, like: Tensor, now: Tensor, prev: Tensor, t: Tensor | None, t_prev: Tensor | None, eta: float,
    variance: str,
) -> Tensor:
    """What the noise is multiplied by, shaped to broadcast against `like`."""
    step = _step(like, now, prev, t, t_prev, "v", 1.0, eta, None, variance, True)
    return _sigma(step, _halves(pred, variance)[1])
