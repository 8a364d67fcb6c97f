"""One step of the reverse process in one pass: mean, noise and log-probability; the noise is never stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels._linear_gaussian import entry, find_entry, target_coefficients
from genfast.kernels._math import exp, exp2, expm1
from genfast.kernels.launch import TILE, launch, locate, read, tile, tile_mask, tile_rows
from genfast.kernels.philox import tile_normal
from genfast.random import Stream
from genfast.reference._linear_gaussian import OBJECTIVES
from genfast.reference.reverse_step import VARIANCES

FIXED_LARGE = tl.constexpr(1)
LEARNED = tl.constexpr(2)
LN2 = tl.constexpr(0.6931471805599453)
HALF_LOG_2PI = tl.constexpr(0.9189385332046727)


@triton.jit
def _step(
    now, prev, t, t_prev, sample, exists, now_size, now_row, now_col, prev_size, prev_row, prev_col, t_s, t_prev_s,
    sigma_data, eta,
    INDEXED: tl.constexpr, OBJECTIVE: tl.constexpr, STOCHASTIC: tl.constexpr, VARIANCE: tl.constexpr,
    HAS_CLIP: tl.constexpr, RECOMPUTE: tl.constexpr, FAST: tl.constexpr,
):
    """Each row's numbers, as in the reference; the slope is that of log2(sigma)."""
    # From Python floats, which Inductor may pass as fp64.
    sigma_data, eta = tl.full([], sigma_data, tl.float32), tl.full([], eta, tl.float32)
    index, inside = find_entry(t, t_s, sample, exists, now_size, INDEXED)
    a, b = entry(now, now_col, index, inside), entry(now + now_row, now_col, index, inside)
    high = entry(now + 2 * now_row, now_col, index, inside)
    low = entry(now + 3 * now_row, now_col, index, inside)
    index, inside = find_entry(t_prev, t_prev_s, sample, exists, prev_size, INDEXED)
    a_s, b_s = entry(prev, prev_col, index, inside), entry(prev + prev_row, prev_col, index, inside)
    high_s = entry(prev + 2 * prev_row, prev_col, index, inside)
    low_s = entry(prev + 3 * prev_row, prev_col, index, inside)
    if INDEXED:
        clean = exists & (index == -1)
        a_s, b_s = tl.where(clean, 1.0, a_s), tl.where(clean, 0.0, b_s)
        high_s, low_s = tl.where(clean, float("inf"), high_s), tl.where(clean, 0.0, low_s)
    d = tl.where(high == high_s, 0.0, high - high_s) + (low - low_s)
    decay = exp(d, FAST)
    kappa = -expm1(2.0 * d, decay * decay)
    if STOCHASTIC:
        square = (eta * decay) * (eta * decay)
        root = tl.sqrt((1.0 - eta) * (1.0 + eta) + square)
    else:
        square, root = 0.0 * eta, 1.0 + 0.0 * eta
    ratio = decay * root
    gap = tl.where(tl.abs(d) < 0.5, kappa * (1.0 + square) / (1.0 + ratio), 1.0 - ratio)
    direction = b_s * root
    p, q = target_coefficients(a, b, sigma_data, OBJECTIVE)
    det = a * q - b * p
    x0_x, x0_pred = q / det, -b / det
    if not HAS_CLIP:
        m_x0 = 0.0 * det
        m_x = (a_s * q - direction * p) / det
        m_pred = -tl.where(b == 0.0, -direction * a, a_s * b * gap) / det
    elif RECOMPUTE:
        m_x0, m_x, m_pred = a_s * gap, direction / b, 0.0 * det
    else:
        m_x0, m_x, m_pred = a_s, -direction * p / det, direction * a / det
    scale, slope = 0.0 * det, 0.0 * det
    if STOCHASTIC:
        scale = eta * tl.sqrt(kappa)
        if VARIANCE == LEARNED:
            scale *= tl.sqrt(b_s) * tl.sqrt(b)
            slope = tl.where(b_s == 0.0, 0.0 * kappa, 0.5 * tl.log2(b / b_s))
        elif VARIANCE == FIXED_LARGE:
            scale *= b
        else:
            scale *= b_s
        # 0 kappa: an entry outside its table stays NaN.
        scale = tl.where(b_s == 0.0, 0.0 * kappa, scale)
    return x0_x, x0_pred, m_x0, m_x, m_pred, scale, slope


@triton.jit
def _mean(x, prediction, x0_x, x0_pred, m_x0, m_x, m_pred, clip, HAS_CLIP: tl.constexpr, RECOMPUTE: tl.constexpr):
    """The mean, and where clipping stops the gradient."""
    if not HAS_CLIP:
        return tl.fma(m_x, x, m_pred * prediction), x != x
    bound = tl.full([], clip, tl.float32)
    x0 = tl.fma(x0_x, x, x0_pred * prediction)
    clipped = tl.maximum(x0, -bound, propagate_nan=tl.PropagateNan.ALL)
    clipped = tl.minimum(clipped, bound, propagate_nan=tl.PropagateNan.ALL)
    mean = tl.fma(m_x0, clipped, m_x * x)
    if not RECOMPUTE:
        mean = tl.fma(m_pred, prediction, mean)
    return mean, tl.abs(x0) > bound


@triton.jit
def _forward(
    x_t, pred, v, now, prev, t, t_prev, salt, seed, noise, x_prev, partials,
    rows, units, chunks, row_offset, now_size, now_row, now_col, prev_size, prev_row, prev_col, t_s, t_prev_s, salt_s,
    sigma_data, eta, clip, x_t_s, x_t_c, pred_s, pred_c, noise_s, noise_c, x_prev_s, x_prev_c,
    X_T: tl.constexpr, PRED: tl.constexpr, NOISE: tl.constexpr, X_PREV: tl.constexpr,
    STREAM: tl.constexpr, INDEXED: tl.constexpr, OBJECTIVE: tl.constexpr, STOCHASTIC: tl.constexpr,
    VARIANCE: tl.constexpr, HAS_CLIP: tl.constexpr, RECOMPUTE: tl.constexpr, HAS_NOISE: tl.constexpr,
    GIVEN: tl.constexpr, LOG_PROB: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    HALF: tl.constexpr = x_t.dtype.element_ty.primitive_bitwidth == 16 or pred.dtype.element_ty.primitive_bitwidth == 16
    mask = tile_mask(row, rows, chunk, units, VEC, R, C)
    sample, exists = row // CHANNELS, row < rows
    x0_x, x0_pred, m_x0, m_x, m_pred, scale, slope = _step(
        now, prev, t, t_prev, sample, exists, now_size, now_row, now_col, prev_size, prev_row, prev_col, t_s, t_prev_s,
        sigma_data, eta, INDEXED, OBJECTIVE, STOCHASTIC, VARIANCE, HAS_CLIP, RECOMPUTE, FAST,
    )
    x = read(x_t, row, chunk, mask, x_t_s, x_t_c, X_T, CHANNELS, VEC, C)
    prediction = read(pred, row, chunk, mask, pred_s, pred_c, PRED, CHANNELS, VEC, C)
    mean, _ = _mean(x, prediction, x0_x, x0_pred, m_x0, m_x, m_pred, clip, HAS_CLIP, RECOMPUTE)
    exponent = tl.zeros([R, C], tl.float32)
    if STOCHASTIC and VARIANCE == LEARNED:
        exponent = slope * read(v, row, chunk, mask, pred_s, pred_c, PRED, CHANNELS, VEC, C)
    at = locate(row, chunk, x_prev_s, x_prev_c, X_PREV, CHANNELS, VEC, C)
    if GIVEN:
        value = tl.load(x_prev + at, mask=mask, other=0.0).to(tl.float32)
    else:
        value = mean
        if STOCHASTIC:
            if HAS_NOISE:
                eps = read(noise, row, chunk, mask, noise_s, noise_c, NOISE, CHANNELS, VEC, C)
            else:
                key, salted = tl.load(seed), tl.load(salt + sample * salt_s, mask=exists, other=0)
                eps = tile_normal(
                    key, row, chunk, units, row_offset, salted, STREAM, HALF, CHANNELS, VEC, R, C, FAST
                )
            sigma = scale * exp2(exponent, FAST) if VARIANCE == LEARNED else scale
            value = tl.fma(sigma, eps, mean)
        rounded = value.to(x_prev.dtype.element_ty)
        tl.store(x_prev + at, rounded, mask=mask)
        # The value that was rounded: a policy gradient looks it up again.
        value = rounded.to(tl.float32)
    if LOG_PROB:
        none = scale == 0.0
        scale = tl.where(none, 1.0, scale)
        z = (value - mean) / scale
        if VARIANCE == LEARNED:
            z *= exp2(-exponent, FAST)
        terms = tl.where(mask, tl.fma(0.5 * z, z, exponent * LN2), 0.0)
        columns = tl.minimum(tl.full([], units, tl.int64) * VEC - chunk * C, C).to(tl.float32)
        density = -tl.sum(terms, axis=1, keep_dims=True) - columns * (tl.log(scale) + HALF_LOG_2PI)
        tl.store(partials + row * chunks + chunk, tl.where(none, 0.0, density), mask=exists)


@triton.jit
def _backward(
    x_t, pred, v, now, prev, t, t_prev, salt, seed, noise, x_prev, grad_x_prev, grad_log_prob, grad_x, grad_pred,
    rows, units, chunks, row_offset, now_size, now_row, now_col, prev_size, prev_row, prev_col, t_s, t_prev_s, salt_s,
    sigma_data, eta, clip, packed_offset, grad_log_prob_s,
    x_t_s, x_t_c, pred_s, pred_c, noise_s, noise_c, x_prev_s, x_prev_c, grad_x_prev_s, grad_x_prev_c,
    grad_x_s, grad_x_c, grad_pred_s, grad_pred_c,
    X_T: tl.constexpr, PRED: tl.constexpr, NOISE: tl.constexpr, X_PREV: tl.constexpr, GRAD_X_PREV: tl.constexpr,
    GRAD_X: tl.constexpr, GRAD_PRED: tl.constexpr,
    STREAM: tl.constexpr, INDEXED: tl.constexpr, OBJECTIVE: tl.constexpr, STOCHASTIC: tl.constexpr,
    VARIANCE: tl.constexpr, HAS_CLIP: tl.constexpr, RECOMPUTE: tl.constexpr, HAS_NOISE: tl.constexpr,
    HAS_GRAD_X_PREV: tl.constexpr, HAS_GRAD_LOG_PROB: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    HALF: tl.constexpr = x_t.dtype.element_ty.primitive_bitwidth == 16 or pred.dtype.element_ty.primitive_bitwidth == 16
    mask = tile_mask(row, rows, chunk, units, VEC, R, C)
    sample, exists = row // CHANNELS, row < rows
    x0_x, x0_pred, m_x0, m_x, m_pred, scale, slope = _step(
        now, prev, t, t_prev, sample, exists, now_size, now_row, now_col, prev_size, prev_row, prev_col, t_s, t_prev_s,
        sigma_data, eta, INDEXED, OBJECTIVE, STOCHASTIC, VARIANCE, HAS_CLIP, RECOMPUTE, FAST,
    )
    if HAS_CLIP or HAS_GRAD_LOG_PROB:
        x = read(x_t, row, chunk, mask, x_t_s, x_t_c, X_T, CHANNELS, VEC, C)
        prediction = read(pred, row, chunk, mask, pred_s, pred_c, PRED, CHANNELS, VEC, C)
        mean, stopped = _mean(x, prediction, x0_x, x0_pred, m_x0, m_x, m_pred, clip, HAS_CLIP, RECOMPUTE)
    exponent = tl.zeros([R, C], tl.float32)
    if STOCHASTIC and VARIANCE == LEARNED:
        exponent = slope * read(v, row, chunk, mask, pred_s, pred_c, PRED, CHANNELS, VEC, C)
    to_mean = tl.zeros([R, C], tl.float32)
    to_log2_sigma = tl.zeros([R, C], tl.float32)
    if HAS_GRAD_X_PREV:
        upstream = read(grad_x_prev, row, chunk, mask, grad_x_prev_s, grad_x_prev_c, GRAD_X_PREV, CHANNELS, VEC, C)
        to_mean += upstream
        if STOCHASTIC and VARIANCE == LEARNED:
            if HAS_NOISE:
                eps = read(noise, row, chunk, mask, noise_s, noise_c, NOISE, CHANNELS, VEC, C)
            else:
                key, salted = tl.load(seed), tl.load(salt + sample * salt_s, mask=exists, other=0)
                eps = tile_normal(
                    key, row, chunk, units, row_offset, salted, STREAM, HALF, CHANNELS, VEC, R, C, FAST
                )
            to_log2_sigma += upstream * eps * (scale * exp2(exponent, FAST))
    if HAS_GRAD_LOG_PROB:
        value = read(x_prev, row, chunk, mask, x_prev_s, x_prev_c, X_PREV, CHANNELS, VEC, C)
        g = tl.load(grad_log_prob + sample * grad_log_prob_s, mask=exists, other=0.0).to(tl.float32)
        none = scale == 0.0
        g = tl.where(none, 0.0, g)
        precision = 1.0 / tl.where(none, 1.0, scale)
        if VARIANCE == LEARNED:
            precision *= exp2(-exponent, FAST)
        z = (value - mean) * precision
        to_mean += g * z * precision
        to_log2_sigma += g * tl.fma(z, z, -1.0)
    to_x, to_pred = m_x * to_mean, m_pred * to_mean
    if HAS_CLIP:
        to_x0 = tl.where(stopped, 0.0, m_x0 * to_mean)
        to_x = tl.fma(x0_x, to_x0, to_x)
        to_pred = tl.fma(x0_pred, to_x0, to_pred)
    at = locate(row, chunk, grad_x_s, grad_x_c, GRAD_X, CHANNELS, VEC, C)
    tl.store(grad_x + at, to_x.to(grad_x.dtype.element_ty), mask=mask)
    at = locate(row, chunk, grad_pred_s, grad_pred_c, GRAD_PRED, CHANNELS, VEC, C)
    tl.store(grad_pred + at, to_pred.to(grad_pred.dtype.element_ty), mask=mask)
    if VARIANCE == LEARNED:
        to_v = to_log2_sigma * (slope * LN2)
        # From constants where they are known, so that the compiler sees how the second half is aligned.
        grad_v = grad_pred + (packed_offset * VEC if CHANNELS == 1 else CHANNELS * grad_pred_c)
        tl.store(grad_v + at, to_v.to(grad_pred.dtype.element_ty), mask=mask)


class _Arguments:
    """What both launches take, in the kernels' order: a step's tensors and numbers, and how they are tiled."""

    def __init__(
        self, x_t, pred, now, prev, t, t_prev, salt, seed, noise, row_offset, objective, sigma_data, eta, clip,
        variance, recompute_eps, *others, size=TILE,
    ):
        learned = variance == "learned_range"
        pred, v = pred.chunk(2, 1) if learned else (pred, None)
        self.tiling, (x_t, pred, v, noise, *self.others) = tile(x_t, pred, v, noise, *others, size=size)
        tiling = self.tiling
        self.x_t, self.pred = x_t, pred
        self.tensors = (
            x_t, pred, pred if v is None else v, now, prev, x_t if t is None else t, x_t if t_prev is None else t_prev,
            salt, x_t if seed is None else seed, x_t if noise is None else noise,
        )
        self.scalars = (
            tiling.rows, tiling.units, tiling.chunks, row_offset,
            *(number for table in (now, prev) for number in _table(table)),
            0 if t is None else t.stride(0), 0 if t_prev is None else t_prev.stride(0), salt.stride(0),
            sigma_data, eta, 0.0 if clip is None else clip,
        )
        self.places = [tiling.strides(x) for x in (x_t, pred, self.tensors[-1])]
        self.flags = {
            "STREAM": int(Stream.REVERSE_STEP), "INDEXED": t is not None, "OBJECTIVE": OBJECTIVES.index(objective),
            "STOCHASTIC": eta > 0, "VARIANCE": VARIANCES.index(variance), "HAS_CLIP": clip is not None,
            "RECOMPUTE": recompute_eps, "HAS_NOISE": noise is not None, **tiling.constexprs(),
        }

    def strides(self, *others: Tensor) -> tuple[int, ...]:
        """Steps of all tensors, `others` last, as the kernels take them."""
        return tuple(step for s, c, _ in (*self.places, *map(self.tiling.strides, others)) for step in (s, c))

    def columns(self, **others: Tensor) -> dict[str, int]:
        """The same for the steps between columns."""
        columns = dict(zip(("X_T", "PRED", "NOISE"), (p for *_, p in self.places), strict=True))
        return columns | {name: self.tiling.strides(x)[2] for name, x in others.items()}


def _table(table: Tensor) -> tuple[int, int, int]:
    """Its length, and the steps between its rows and entries; one entry serves all samples."""
    return table.shape[1], table.stride(0), 0 if table.shape[1] == 1 else table.stride(1)


def forward(
    x_t: Tensor, pred: Tensor, now: Tensor, prev: Tensor, t: Tensor | None, t_prev: Tensor | None, salt: Tensor,
    seed: Tensor | None, noise: Tensor | None, x_prev: Tensor | None, row_offset: int, objective: str,
    sigma_data: float, eta: float, clip: float | None, variance: str, recompute_eps: bool, log_prob: bool,
) -> tuple[Tensor, Tensor]:
    """x_prev (empty if it is given), and its log-probability fp32 [B] (empty if not wanted)."""
    arguments = _Arguments(
        x_t, pred, now, prev, t, t_prev, salt, seed, noise, row_offset, objective, sigma_data, eta, clip, variance,
        recompute_eps, x_prev, size=2 * TILE,
    )
    tiling, (given,) = arguments.tiling, arguments.others
    out = given
    if given is None:
        dtype = torch.promote_types(x_t.dtype, pred.dtype)
        out = tiling.empty(x_t.shape, arguments.x_t, dtype)
    partials = tiling.partials(x_t) if log_prob else torch.empty(0, device=x_t.device)
    launch(
        _forward, tiling.grid, *arguments.tensors, out, partials, *arguments.scalars, *arguments.strides(out),
        **arguments.columns(X_PREV=out), GIVEN=given is not None, LOG_PROB=log_prob, **arguments.flags,
    )
    return out if given is None else x_t.new_empty(0), tiling.total(partials) if log_prob else partials


def backward(
    x_t: Tensor, pred: Tensor, now: Tensor, prev: Tensor, t: Tensor | None, t_prev: Tensor | None, salt: Tensor,
    seed: Tensor | None, noise: Tensor | None, x_prev: Tensor | None, row_offset: int, objective: str,
    sigma_data: float, eta: float, clip: float | None, variance: str, recompute_eps: bool,
    grad_x_prev: Tensor | None, grad_log_prob: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(grad_x_t, grad_pred); the halves of a prediction with a learned variance are written side by side."""
    arguments = _Arguments(
        x_t, pred, now, prev, t, t_prev, salt, seed, noise, row_offset, objective, sigma_data, eta, clip, variance,
        recompute_eps, x_prev, grad_x_prev,
    )
    tiling, x = arguments.tiling, arguments.x_t
    value, upstream = (x if other is None else other for other in arguments.others)
    grad_x = tiling.empty(x.shape, x)
    grad_pred = tiling.empty(pred.shape, x, pred.dtype)
    first = grad_pred.narrow(1, 0, x.shape[1]) if variance == "learned_range" else grad_pred
    launch(
        _backward, tiling.grid, *arguments.tensors, value, upstream, x if grad_log_prob is None else grad_log_prob,
        grad_x, grad_pred, *arguments.scalars, tiling.units, 0 if grad_log_prob is None else grad_log_prob.stride(0),
        *arguments.strides(value, upstream, grad_x, first),
        **arguments.columns(X_PREV=value, GRAD_X_PREV=upstream, GRAD_X=grad_x, GRAD_PRED=first),
        HAS_GRAD_X_PREV=grad_x_prev is not None, HAS_GRAD_LOG_PROB=grad_log_prob is not None, **arguments.flags,
    )
    return grad_x, grad_pred
