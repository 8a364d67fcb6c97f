"""A coupling by the distribution function of a mixture of logistics, and its inverse, in plain PyTorch.

Everything is a logarithm of a sum over the components, of both tails: logit F = log F - log(1 - F) keeps its digits
where F or 1 - F is far below the smallest float.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast.reference._math import compute_dtype, log_scale, log_scale_slope, per_sample, rows_like

SCALE_MAPS = ("exp", "tanh")
# How often the inverse evaluates the mixture at most: components 1,000 apart and e^-7 wide take 24 times, usual ones 5.
STEPS = 40


class _Mixture(NamedTuple):
    """[B, K, C, ...]; the rates are 1 / s."""

    logits: Tensor
    means: Tensor
    rates: Tensor


class _Terms(NamedTuple):
    """Of each component: u = (x - mu) / s, and the logarithms of the terms of F, 1 - F and s f up to the softmax."""

    u: Tensor
    below: Tensor
    above: Tensor
    both: Tensor


class _Point(NamedTuple):
    """logit F, the logarithm of its derivative, and that of the sum of the weights."""

    logit: Tensor
    log_slope: Tensor
    log_total: Tensor


def _unpack(
    x: Tensor, params: Tensor, num_components: int, min_log_scale: float
) -> tuple[Tensor, Tensor, _Mixture, Tensor]:
    """s, t, the mixture, and where the log-scales are clamped."""
    params = params.unflatten(1, (2 + 3 * num_components, x.shape[1])).to(compute_dtype(x))
    s, t = params[:, 0], params[:, 1]
    logits, means, raw = params[:, 2:].tensor_split((num_components, 2 * num_components), 1)
    clamped = raw < min_log_scale
    # A comparison keeps a NaN.
    log_scales = torch.where(clamped, min_log_scale, raw)
    return s, t, _Mixture(logits, means, torch.exp(-log_scales)), clamped


def _terms(x: Tensor, mixture: _Mixture) -> _Terms:
    u = (x.unsqueeze(1) - mixture.means) * mixture.rates
    log_above = F.logsigmoid(-u)
    below = mixture.logits + F.logsigmoid(u)
    return _Terms(u, below, mixture.logits + log_above, below + log_above)


def _evaluate(x: Tensor, mixture: _Mixture) -> _Point:
    terms = _terms(x, mixture)
    exponents = torch.stack([terms.below, terms.above, terms.both])
    # Where all are -inf, the sum is 0 and not NaN.
    largest = exponents.detach().amax(2).clamp_min(torch.finfo(exponents.dtype).min)
    below, above, both = torch.exp(exponents - largest.unsqueeze(2)).unbind()
    # The rates as weights, so that in a tail the largest exponents are the very same number.
    sums = torch.log(torch.stack([below.sum(1), above.sum(1), (both * mixture.rates).sum(1)]))
    # Differences of the largest exponents first: what they have in common is lost before anything is rounded.
    logit = (largest[0] - largest[1]) + (sums[0] - sums[1])
    lower = logit < 0
    # log f - log F - log(1 - F), the smaller of the two first.
    log_slope = (largest[2] - torch.where(lower, largest[0], largest[1])) + (
        sums[2] - torch.where(lower, sums[0], sums[1])
    )
    rest = F.softplus(torch.where(lower, logit, -logit))
    larger = torch.where(lower, largest[1] + sums[1], largest[0] + sums[0])
    return _Point(logit, log_slope + rest, larger + rest)


@torch.library.custom_op("genfast::mixture_logistic_root", mutates_args=())
def _root(z: Tensor, logits: Tensor, means: Tensor, rates: Tensor) -> Tensor:
    """x with logit F(x) = z: Newton's method, and bisection where it leaves its bracket or does not halve its step.

    An operator of its own, so that a trace does not hold all of its steps.
    """
    mixture = _Mixture(logits, means, rates)
    # Each component's own solution: at the smallest F is too small, at the largest too large.
    guesses = means + z.unsqueeze(1) / rates
    lo, hi = guesses.amin(1), guesses.amax(1)
    x = (torch.softmax(logits, 1) * guesses).sum(1)
    before = hi - lo
    eps = 4 * torch.finfo(z.dtype).eps
    noise = eps * (1 + z.abs())
    for _ in range(STEPS):
        point = _evaluate(x, mixture)
        error = point.logit - z
        lo, hi = torch.where(error < 0, x, lo), torch.where(error > 0, x, hi)
        step = error * torch.exp(-point.log_slope)
        newton, middle = x - step, 0.5 * lo + 0.5 * hi
        inside = (newton >= lo) & (newton <= hi)
        # More than rounding, of z or of x. NaN and infinities, of which no comparison holds, stay where they are.
        far = (error.abs() > noise) & (step.abs() > eps * x.abs())
        halved = inside & (2 * step.abs() <= before)
        following = torch.where(far, torch.where(halved, newton, middle), torch.where(inside, newton, x))
        before, x = (following - x).abs(), following
        # Elsewhere the question would wait for the device.
        if x.device.type == "cpu" and not far.any():
            break
    return x


@_root.register_fake
def _(z: Tensor, logits: Tensor, means: Tensor, rates: Tensor) -> Tensor:
    return torch.empty_like(z)


def forward(
    x: Tensor, params: Tensor, num_components: int, scale_map: str, factor: float, min_log_scale: float, inverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, the log-determinant [B] in fp32 (fp64 for fp64), and what backward needs (empty unless `keep`).

    What backward needs, side by side along dimension 1: logit F, the logarithm of its derivative and the logarithm of
    the sum of the weights; of the inverse also the derivative of the second by x, and x before it is rounded.
    Differentiable.
    """
    s, t, mixture, _ = _unpack(x, params, num_components, min_log_scale)
    log, value = log_scale(s, scale_map, factor), x.to(s.dtype)
    if inverse:
        z = (value - t) * torch.exp(-log)
        value = _implicit(z, mixture)
    point = _evaluate(value, mixture)
    logdet = per_sample(log + point.log_slope).sum(1)
    stats = x.new_empty(0, dtype=s.dtype)
    if keep:
        stats = torch.cat([*point, *([_curvature(value, mixture, point), value] if inverse else [])], 1).detach()
    if inverse:
        return value.to(x.dtype), -logdet, stats
    return (torch.exp(log) * point.logit + t).to(x.dtype), logdet, stats


def _implicit(z: Tensor, mixture: _Mixture) -> Tensor:
    """The root, with the derivatives of the implicit function."""
    root = _root(*(value.detach() for value in (z, *mixture)))
    point = _evaluate(root, mixture)
    change = (z - point.logit) * torch.exp(-point.log_slope.detach())
    # Without a graph it is 0, or NaN where the slope underflows.
    return root + (change - change.detach()) if change.requires_grad else root


def _posteriors(x: Tensor, mixture: _Mixture, point: _Point) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each component's share of F, of 1 - F and of f, and 1 - 2 sigmoid(u)."""
    logit, log_slope, log_total = (value.unsqueeze(1) for value in point)
    terms = _terms(x, mixture)
    log_below, log_above = log_total + F.logsigmoid(logit), log_total + F.logsigmoid(-logit)
    # f is slope F (1 - F).
    log_both = log_slope + log_below + F.logsigmoid(-logit)
    return (
        torch.exp(terms.below - log_below), torch.exp(terms.above - log_above),
        torch.exp(terms.both - log_both) * mixture.rates, -torch.tanh(0.5 * terms.u),
    )  # fmt: skip


def _curvature(x: Tensor, mixture: _Mixture, point: _Point) -> Tensor:
    """The derivative of log_slope by x."""
    *_, share, odd = _posteriors(x, mixture, point)
    return (share * odd * mixture.rates).sum(1) + torch.exp(point.log_slope) * torch.tanh(0.5 * point.logit)


def backward(
    x: Tensor, params: Tensor, stats: Tensor, num_components: int, scale_map: str, factor: float,
    min_log_scale: float, inverse: bool, grad_y: Tensor | None, grad_logdet: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and params; for the inverse x is what came out, and the first is the gradient of what went in."""
    s, _, mixture, clamped = _unpack(x, params, num_components, min_log_scale)
    point = _Point(*stats.tensor_split(5 if inverse else 3, 1)[:3])
    to_y = torch.zeros_like(s) if grad_y is None else grad_y.to(s.dtype)
    to_log = torch.zeros_like(s) if grad_logdet is None else rows_like(grad_logdet.to(s.dtype), s).expand(s.shape)
    log, value = log_scale(s, scale_map, factor), x.to(s.dtype)
    if inverse:
        curvature, value = stats.tensor_split(5, 1)[3:]
        to_log = -to_log
        to_input = (to_y + to_log * curvature) * torch.exp(-(log + point.log_slope))
        to_y = -to_input
    to_logit = to_y * torch.exp(log)
    to_s = (to_logit * point.logit + to_log) * log_scale_slope(s, scale_map, factor)
    share_below, share_above, share, odd = _posteriors(value, mixture, point)
    common = torch.exp(point.log_slope) * (to_logit + to_log * torch.tanh(0.5 * point.logit))
    each, whole = to_log.unsqueeze(1), to_logit.unsqueeze(1)
    below, above = (torch.sigmoid(sign * point.logit).unsqueeze(1) for sign in (1, -1))
    to_logits = share_below * (whole - each * above) - share_above * (whole + each * below) + share * each
    to_x = share * (common.unsqueeze(1) + each * odd * mixture.rates)
    to_log_scales = -(value.unsqueeze(1) - mixture.means) * to_x - share * each
    to_log_scales = torch.where(clamped, 0.0, to_log_scales)
    grad_params = torch.cat([torch.stack([to_s, to_y], 1), to_logits, -to_x, to_log_scales], 1).flatten(1, 2)
    return (to_input if inverse else to_x.sum(1)).to(x.dtype), grad_params.to(params.dtype)
