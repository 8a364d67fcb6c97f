"""The coupling of Flow++ and its inverse: a loop over the components whose sums are logarithms, kept in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast._environment import INTERPRETED
from genfast.kernels._math import LN2, LOG2E, exp2, log1p_unit, log2_scale, log_scale_slope, reciprocal
from genfast.kernels.launch import TILE, WARPS, Tiling, launch, locate, read, tile, tile_mask, tile_rows
from genfast.reference._math import SCALE_MAPS
from genfast.reference.mixture_logistic_coupling import STEPS

# Exponents are of 2, so rates are log2(e) / s.
LOG2_LOG2E = tl.constexpr(0.5287663729448977)
LOWEST = tl.constexpr(-3.0e38)
NOISE = tl.constexpr(4.8e-7)


@triton.jit
def _parameter(params, at, mask, index, block):
    return tl.load(params + (index * block + at), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _component(params, at, mask, k, block, x, least, K: tl.constexpr, FAST: tl.constexpr):
    """The logit and u = (x - mu) / s, both as exponents of 2; x - mu, the rate, t = exp(-|u|), 1 / (1 + t), clamped."""
    logit = _parameter(params, at, mask, k + 2, block) * LOG2E
    distance = x - _parameter(params, at, mask, k + (2 + K), block)
    log_scale = _parameter(params, at, mask, k + (2 + 2 * K), block)
    # A comparison keeps a NaN.
    clamped = log_scale < least
    rate = exp2(tl.fma(tl.where(clamped, least, log_scale), -LOG2E, LOG2_LOG2E), FAST)
    u = distance * rate
    t = exp2(-tl.abs(u), FAST)
    return logit, u, distance, rate, t, reciprocal(1.0 + t, FAST), clamped


@triton.jit
def _add(most, total, exponent, weight, FAST: tl.constexpr):
    """total 2^most + weight 2^exponent, over the larger of the two powers."""
    fade = exp2(-tl.abs(exponent - most), FAST)
    total = tl.where(exponent > most, tl.fma(total, fade, weight), tl.fma(weight, fade, total))
    return tl.maximum(most, exponent), total


@triton.jit
def _evaluate(
    x, params, at, mask, block, least,
    K: tl.constexpr, CURVED: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    """logit F, the logarithm of its derivative, that of the sum of the weights, all to base 2; and, if CURVED, the
    derivative of the second, of base e, by x."""
    m_below, below = tl.full([R, C], LOWEST, tl.float32), tl.zeros([R, C], tl.float32)
    m_above, above = m_below, below
    m_both, both, curved = m_below, below, below
    for k in range(K):
        logit, u, _, rate, t, r, _ = _component(params, at, mask, k, block, x, least, K, FAST)
        m_below, below = _add(m_below, below, logit + tl.minimum(u, 0.0), r, FAST)
        m_above, above = _add(m_above, above, logit - tl.maximum(u, 0.0), r, FAST)
        # The rate as a weight, so that in a tail the largest exponents are the very same number.
        weight = r * r * rate
        if CURVED:
            slope = weight * rate * (tl.where(u > 0.0, t - 1.0, 1.0 - t) * r)
            _, curved = _add(m_both, curved, logit - tl.abs(u), slope, FAST)
        m_both, both = _add(m_both, both, logit - tl.abs(u), weight, FAST)
    logit = (m_below - m_above) + tl.log2(below * reciprocal(above, FAST))
    lower = logit < 0.0
    t = exp2(-tl.abs(logit), FAST)
    rest = log1p_unit(t) * LOG2E
    # log f - log F - log(1 - F), the smaller of the two first.
    slope = tl.log2(both * reciprocal(tl.where(lower, below, above), FAST)) + (rest - LOG2_LOG2E)
    slope += m_both - tl.where(lower, m_below, m_above)
    total = tl.where(lower, m_above, m_below) + tl.log2(tl.where(lower, above, below)) + rest
    curvature = x
    if CURVED:
        curvature = tl.fma(curved * reciprocal(both, FAST), LN2, exp2(slope, FAST) * _tanh_half(lower, t, FAST))
    return logit, slope, total, curvature


@triton.jit
def _tanh_half(negative, t, FAST: tl.constexpr):
    """tanh(v / 2) from t = exp(-|v|)."""
    return tl.where(negative, t - 1.0, 1.0 - t) * reciprocal(1.0 + t, FAST)


@triton.jit
def _offset(block, COLUMN: tl.constexpr, VEC: tl.constexpr):
    """From one block of channels to the next, in elements: a multiple of VEC where the compiler must see that."""
    return tl.full([], block, tl.int64) * (VEC if COLUMN == 1 else 1)


@triton.jit
def _forward(
    x, params, y, stats, partials, rows, units, chunks, params_b, stats_b, factor, least,
    x_s, x_c, params_s, params_c, y_s, y_c, stats_s, stats_c,
    X: tl.constexpr, PARAMS: tl.constexpr, Y: tl.constexpr, STATS: tl.constexpr,
    K: tl.constexpr, MAP: tl.constexpr, KEEP: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    mask = tile_mask(row, rows, chunk, units, VEC, R, C)
    # From Python floats, which Inductor may pass as fp64.
    factor, least = tl.full([], factor, tl.float32), tl.full([], least, tl.float32)
    value = read(x, row, chunk, mask, x_s, x_c, X, CHANNELS, VEC, C)
    at = locate(row, chunk, params_s, params_c, PARAMS, CHANNELS, VEC, C)
    block = _offset(params_b, PARAMS, VEC)
    logit, slope, total, _ = _evaluate(value, params, at, mask, block, least, K, False, R, C, FAST)
    log = log2_scale(_parameter(params, at, mask, 0, block), factor, 0.0, MAP, False, FAST)
    out = tl.fma(exp2(log, FAST) * LN2, logit, _parameter(params, at, mask, 1, block))
    tl.store(y + locate(row, chunk, y_s, y_c, Y, CHANNELS, VEC, C), out.to(y.dtype.element_ty), mask=mask)
    if KEEP:
        to = locate(row, chunk, stats_s, stats_c, STATS, CHANNELS, VEC, C)
        step = _offset(stats_b, STATS, VEC)
        tl.store(stats + to, logit * LN2, mask=mask)
        tl.store(stats + (step + to), slope * LN2, mask=mask)
        tl.store(stats + (2 * step + to), total * LN2, mask=mask)
    logdet = tl.sum(tl.where(mask, log + slope, 0.0), axis=1, keep_dims=True) * LN2
    tl.store(partials + row * chunks + chunk, logdet, mask=row < rows)


@triton.jit
def _inverse(
    y, params, x, stats, partials, rows, units, chunks, params_b, stats_b, factor, least,
    y_s, y_c, params_s, params_c, x_s, x_c, stats_s, stats_c,
    Y: tl.constexpr, PARAMS: tl.constexpr, X: tl.constexpr, STATS: tl.constexpr,
    K: tl.constexpr, MAP: tl.constexpr, KEEP: tl.constexpr, LIMIT: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    mask = tile_mask(row, rows, chunk, units, VEC, R, C)
    factor, least = tl.full([], factor, tl.float32), tl.full([], least, tl.float32)
    at = locate(row, chunk, params_s, params_c, PARAMS, CHANNELS, VEC, C)
    block = _offset(params_b, PARAMS, VEC)
    log = log2_scale(_parameter(params, at, mask, 0, block), factor, 0.0, MAP, False, FAST)
    z = read(y, row, chunk, mask, y_s, y_c, Y, CHANNELS, VEC, C) - _parameter(params, at, mask, 1, block)
    z *= exp2(-log, FAST)
    # Each component's own solution: at the smallest F is too small, at the largest too large.
    most, total = tl.full([R, C], LOWEST, tl.float32), tl.zeros([R, C], tl.float32)
    weighted = total
    lo, hi = total + float("inf"), total - float("inf")
    for k in range(K):
        logit = _parameter(params, at, mask, k + 2, block) * LOG2E
        log_scale = _parameter(params, at, mask, k + (2 + 2 * K), block)
        scale = exp2(tl.where(log_scale < least, least, log_scale) * LOG2E, FAST)
        guess = tl.fma(z, scale, _parameter(params, at, mask, k + (2 + K), block))
        lo, hi = tl.minimum(lo, guess), tl.maximum(hi, guess)
        _, weighted = _add(most, weighted, logit, guess, FAST)
        most, total = _add(most, total, logit, 1.0, FAST)
    value = weighted / total
    before = hi - lo
    noise = tl.fma(tl.abs(z), NOISE, NOISE)
    steps, unsettled = 0, 1
    while (steps < LIMIT) & (unsettled > 0):
        logit, slope, _, _ = _evaluate(value, params, at, mask, block, least, K, False, R, C, FAST)
        error = tl.fma(LN2, logit, -z)
        lo, hi = tl.where(error < 0.0, value, lo), tl.where(error > 0.0, value, hi)
        step = error * exp2(-slope, FAST)
        newton, middle = value - step, 0.5 * lo + 0.5 * hi
        inside = (newton >= lo) & (newton <= hi)
        # More than rounding, of z or of x. NaN and infinities, of which no comparison holds, stay where they are.
        far = (tl.abs(error) > noise) & (tl.abs(step) > NOISE * tl.abs(value))
        halved = inside & (2.0 * tl.abs(step) <= before)
        following = tl.where(far, tl.where(halved, newton, middle), tl.where(inside, newton, value))
        before, value = tl.abs(following - value), following
        unsettled = tl.max(far.to(tl.int32))
        steps += 1
    tl.store(x + locate(row, chunk, x_s, x_c, X, CHANNELS, VEC, C), value.to(x.dtype.element_ty), mask=mask)
    logit, slope, total, curvature = _evaluate(value, params, at, mask, block, least, K, KEEP, R, C, FAST)
    if KEEP:
        to = locate(row, chunk, stats_s, stats_c, STATS, CHANNELS, VEC, C)
        step = _offset(stats_b, STATS, VEC)
        tl.store(stats + to, logit * LN2, mask=mask)
        tl.store(stats + (step + to), slope * LN2, mask=mask)
        tl.store(stats + (2 * step + to), total * LN2, mask=mask)
        tl.store(stats + (3 * step + to), curvature, mask=mask)
        tl.store(stats + (4 * step + to), value, mask=mask)
    logdet = tl.sum(tl.where(mask, log + slope, 0.0), axis=1, keep_dims=True) * -LN2
    tl.store(partials + row * chunks + chunk, logdet, mask=row < rows)


@triton.jit
def _backward(
    x, params, stats, grad_y, grad_logdet, grad_x, grad_params,
    rows, units, chunks, params_b, stats_b, grad_params_b, factor, least, grad_logdet_s,
    x_s, x_c, params_s, params_c, stats_s, stats_c, grad_y_s, grad_y_c, grad_x_s, grad_x_c, grad_params_s,
    grad_params_c,
    X: tl.constexpr, PARAMS: tl.constexpr, STATS: tl.constexpr, GRAD_Y: tl.constexpr, GRAD_X: tl.constexpr,
    GRAD_PARAMS: tl.constexpr,
    K: tl.constexpr, MAP: tl.constexpr, INVERSE: tl.constexpr,
    HAS_GRAD_Y: tl.constexpr, HAS_GRAD_LOGDET: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    mask = tile_mask(row, rows, chunk, units, VEC, R, C)
    factor, least = tl.full([], factor, tl.float32), tl.full([], least, tl.float32)
    at = locate(row, chunk, params_s, params_c, PARAMS, CHANNELS, VEC, C)
    block = _offset(params_b, PARAMS, VEC)
    kept = locate(row, chunk, stats_s, stats_c, STATS, CHANNELS, VEC, C)
    step = _offset(stats_b, STATS, VEC)
    logit = _parameter(stats, kept, mask, 0, step) * LOG2E
    log_slope = _parameter(stats, kept, mask, 1, step) * LOG2E
    log_total = _parameter(stats, kept, mask, 2, step) * LOG2E
    s = _parameter(params, at, mask, 0, block)
    log = log2_scale(s, factor, 0.0, MAP, False, FAST)
    to_y, to_log = tl.zeros([R, C], tl.float32), tl.zeros([R, C], tl.float32)
    if HAS_GRAD_Y:
        to_y = read(grad_y, row, chunk, mask, grad_y_s, grad_y_c, GRAD_Y, CHANNELS, VEC, C)
    if HAS_GRAD_LOGDET:
        to_log += tl.load(grad_logdet + (row // CHANNELS) * grad_logdet_s, mask=row < rows, other=0.0).to(tl.float32)
    out = locate(row, chunk, grad_x_s, grad_x_c, GRAD_X, CHANNELS, VEC, C)
    if INVERSE:
        # As x is an implicit function of y: what comes in is turned into the gradients of the forward map.
        value = _parameter(stats, kept, mask, 4, step)
        to_log = -to_log
        to_x = tl.fma(to_log, _parameter(stats, kept, mask, 3, step), to_y) * exp2(-(log + log_slope), FAST)
        tl.store(grad_x + out, to_x.to(grad_x.dtype.element_ty), mask=mask)
        to_y = -to_x
    else:
        value = read(x, row, chunk, mask, x_s, x_c, X, CHANNELS, VEC, C)
    to_logit = to_y * exp2(log, FAST)
    to_s = tl.fma(to_logit * LN2, logit, to_log) * log_scale_slope(s, factor, 0.0, MAP, False, FAST)
    to = locate(row, chunk, grad_params_s, grad_params_c, GRAD_PARAMS, CHANNELS, VEC, C)
    grad_block = _offset(grad_params_b, GRAD_PARAMS, VEC)
    tl.store(grad_params + to, to_s.to(grad_params.dtype.element_ty), mask=mask)
    tl.store(grad_params + (grad_block + to), to_y.to(grad_params.dtype.element_ty), mask=mask)
    t = exp2(-tl.abs(logit), FAST)
    rest = log1p_unit(t) * LOG2E
    small = t * reciprocal(1.0 + t, FAST)
    below = tl.where(logit < 0.0, small, 1.0 - small)
    log_below = log_total + (tl.minimum(logit, 0.0) - rest)
    log_above = log_total - (tl.maximum(logit, 0.0) + rest)
    # f is its slope times F (1 - F); the terms have the factor log2(e) of the rate.
    log_both = (log_slope + LOG2_LOG2E) + (log_total - (tl.abs(logit) + 2.0 * rest))
    common = exp2(log_slope, FAST) * tl.fma(to_log, _tanh_half(logit < 0.0, t, FAST), to_logit)
    by_below = tl.fma(to_log, below - 1.0, to_logit)
    by_above = -tl.fma(to_log, below, to_logit)
    total = tl.zeros([R, C], tl.float32)
    for k in range(K):
        weight, u, distance, rate, t, r, clamped = _component(params, at, mask, k, block, value, least, K, FAST)
        share_below = exp2(weight + (tl.minimum(u, 0.0) - log_below), FAST) * r
        share_above = exp2(weight - (tl.maximum(u, 0.0) + log_above), FAST) * r
        share = exp2(weight - (tl.abs(u) + log_both), FAST) * (r * r * rate)
        to_weight = tl.fma(share_below, by_below, tl.fma(share_above, by_above, share * to_log))
        odd = tl.where(u > 0.0, t - 1.0, 1.0 - t) * r
        to_value = share * tl.fma(to_log * LN2, odd * rate, common)
        to_log_scale = tl.where(clamped, 0.0, -tl.fma(distance, to_value, share * to_log))
        total += to_value
        here = grad_params + to
        tl.store(here + (k + 2) * grad_block, to_weight.to(grad_params.dtype.element_ty), mask=mask)
        tl.store(here + (k + (2 + K)) * grad_block, (-to_value).to(grad_params.dtype.element_ty), mask=mask)
        tl.store(here + (k + (2 + 2 * K)) * grad_block, to_log_scale.to(grad_params.dtype.element_ty), mask=mask)
    if not INVERSE:
        tl.store(grad_x + out, total.to(grad_x.dtype.element_ty), mask=mask)


def _size(params: Tensor) -> int:
    """Elements of a tile: a lane reads 16 bytes of a parameter. Interpreted, it is the number of tiles that costs."""
    return 2 * TILE if INTERPRETED else 16 // params.element_size() * 32 * WARPS


class _Blocks:
    """A tensor of blocks of `channels` channels, read in place: its first block decides about the tiling."""

    def __init__(self, packed: Tensor, channels: int) -> None:
        self.packed, self.channels = packed, channels
        self.first = packed.narrow(1, 0, channels)

    def fit(self, tiling: Tiling, first: Tensor) -> tuple[int, int, int, int]:
        """Copy where the tiling does; from one block to the next, then the strides as `Tiling.strides` gives them."""
        if first is not self.first or self._step(tiling) is None:
            self.packed = self.packed.contiguous()
            self.first = self.packed.narrow(1, 0, self.channels)
        return self._step(tiling), *tiling.strides(self.first)

    def _step(self, tiling: Tiling) -> int | None:
        step, unit = self.channels * self.packed.stride(1), tiling.vec if tiling.strides(self.first)[2] == 1 else 1
        return step // unit if step % unit == 0 else None


def forward(
    x: Tensor, params: Tensor, num_components: int, scale_map: str, factor: float, min_log_scale: float, inverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, logdet fp32 [B], and what backward needs (empty unless `keep`), as in the reference."""
    channels = x.shape[1]
    blocks = _Blocks(params, channels)
    tiling, (x, first) = tile(x, blocks.first, size=_size(params))
    params_b, *params_place = blocks.fit(tiling, first)
    y, partials = tiling.empty(x.shape, x), tiling.partials(x)
    stats, stats_b, stats_place = x.new_empty(0, dtype=torch.float32), 0, [0, 0, 1]
    if keep:
        stats = tiling.empty((x.shape[0], (5 if inverse else 3) * channels, *x.shape[2:]), x, torch.float32)
        kept = _Blocks(stats, channels)
        stats_b, *stats_place = kept.fit(tiling, kept.first)
    places = [tiling.strides(x), params_place, tiling.strides(y), stats_place]
    names = ("Y", "PARAMS", "X", "STATS") if inverse else ("X", "PARAMS", "Y", "STATS")
    launch(
        _inverse if inverse else _forward, tiling.grid, x, blocks.packed, y, stats, partials,
        tiling.rows, tiling.units, tiling.chunks, params_b, stats_b, factor, min_log_scale,
        *(step for s, c, _ in places for step in (s, c)),
        **dict(zip(names, (p for *_, p in places), strict=True)),
        K=num_components, MAP=SCALE_MAPS.index(scale_map), KEEP=keep, **({"LIMIT": STEPS} if inverse else {}),
        **tiling.constexprs(),
    )
    return y, tiling.total(partials), stats


def backward(
    x: Tensor, params: Tensor, stats: Tensor, num_components: int, scale_map: str, factor: float,
    min_log_scale: float, inverse: bool, grad_y: Tensor | None, grad_logdet: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_params); for the inverse x is what came out, and the first is the gradient of what went in."""
    channels = x.shape[1]
    blocks, kept = _Blocks(params, channels), _Blocks(stats, channels)
    tiling, (x, first, first_kept, grad_y) = tile(x, blocks.first, kept.first, grad_y, size=_size(params))
    params_b, *params_place = blocks.fit(tiling, first)
    stats_b, *stats_place = kept.fit(tiling, first_kept)
    upstream = x if grad_y is None else grad_y
    grad_x = tiling.empty(x.shape, x)
    grads = _Blocks(tiling.empty(params.shape, x, params.dtype), channels)
    grads_b, *grads_place = grads.fit(tiling, grads.first)
    places = [
        tiling.strides(x), params_place, stats_place, tiling.strides(upstream), tiling.strides(grad_x), grads_place,
    ]  # fmt: skip
    names = ("X", "PARAMS", "STATS", "GRAD_Y", "GRAD_X", "GRAD_PARAMS")
    launch(
        _backward, tiling.grid, x, blocks.packed, kept.packed, upstream, x if grad_logdet is None else grad_logdet,
        grad_x, grads.packed, tiling.rows, tiling.units, tiling.chunks, params_b, stats_b, grads_b, factor,
        min_log_scale, 0 if grad_logdet is None else grad_logdet.stride(0),
        *(step for s, c, _ in places for step in (s, c)),
        **dict(zip(names, (p for *_, p in places), strict=True)),
        K=num_components, MAP=SCALE_MAPS.index(scale_map), INVERSE=inverse,
        HAS_GRAD_Y=grad_y is not None, HAS_GRAD_LOGDET=grad_logdet is not None, **tiling.constexprs(),
    )
    return grad_x, grads.packed
