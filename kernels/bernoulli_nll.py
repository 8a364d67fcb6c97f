"""Summed binary cross-entropy with logits, in nats; the images may stay uint8."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels._math import exp, log1p_unit, reciprocal
from genfast.kernels.launch import launch, locate, tile, tile_mask, tile_rows


@triton.jit
def _load(
    logits, x, row, chunk, mask, logits_s, logits_c, x_s, x_c, LOGITS: tl.constexpr, X: tl.constexpr,
    UINT8: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    """The logit, t = exp(-|logit|), and how far x is from what the sign of the logit says (0 where it is right)."""
    # What lies outside the tile is confidently and rightly 0: it adds nothing to the sum.
    at = locate(row, chunk, logits_s, logits_c, LOGITS, CHANNELS, VEC, C)
    logit = tl.load(logits + at, mask=mask, other=-60000.0).to(tl.float32)
    target = tl.load(x + locate(row, chunk, x_s, x_c, X, CHANNELS, VEC, C), mask=mask, other=0)
    if UINT8:
        # 2^23 + byte, put together as bits: exact, and four times the rate of the integer conversion. 0 and 255 miss by
        # exactly 0 or 1.
        shifted = (target.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
        miss = tl.where(logit >= 0.0, 8388863.0 - shifted, shifted - 8388608.0) * 0.00392156862745098
    else:
        target = target.to(tl.float32)
        miss = tl.where(logit >= 0.0, 1.0 - target, target)
    return logit, exp(-tl.abs(logit), FAST), miss


@triton.jit
def _gradient(logit, t, miss, FAST: tl.constexpr):
    """sigmoid(logit) - x without cancellation."""
    gap = miss - t * reciprocal(1.0 + t, FAST)
    return tl.where(logit >= 0.0, gap, -gap)


@triton.jit
def _forward(
    logits, x, partials, grad, rows, units, chunks, logits_s, logits_c, x_s, x_c, grad_s, grad_c,
    LOGITS: tl.constexpr, X: tl.constexpr, GRAD: tl.constexpr, UINT8: tl.constexpr, WITH_GRAD: tl.constexpr,
    MEAN: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    mask = tile_mask(row, rows, chunk, units, VEC, R, C)
    logit, t, miss = _load(
        logits, x, row, chunk, mask, logits_s, logits_c, x_s, x_c, LOGITS, X, UINT8, CHANNELS, VEC, C, FAST
    )
    # Every term is positive: nothing cancels.
    nll = tl.fma(tl.abs(logit), miss, log1p_unit(t))
    tl.store(partials + row * chunks + chunk, tl.sum(nll, axis=1, keep_dims=True), mask=row < rows)
    if WITH_GRAD:
        value = _gradient(logit, t, miss, FAST)
        if MEAN:
            # From the number of rows: Inductor types a scalar that depends on a symbolic batch as an integer.
            value *= 1.0 / tl.full([], rows // CHANNELS, tl.float32)
        at = locate(row, chunk, grad_s, grad_c, GRAD, CHANNELS, VEC, C)
        tl.store(grad + at, value.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    logits, x, grad_nll, grad, rows, units, chunks, logits_s, logits_c, x_s, x_c, grad_nll_s, grad_s, grad_c,
    LOGITS: tl.constexpr, X: tl.constexpr, GRAD: tl.constexpr, UINT8: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    mask = tile_mask(row, rows, chunk, units, VEC, R, C)
    logit, t, miss = _load(
        logits, x, row, chunk, mask, logits_s, logits_c, x_s, x_c, LOGITS, X, UINT8, CHANNELS, VEC, C, FAST
    )
    g = tl.load(grad_nll + (row // CHANNELS) * grad_nll_s, mask=row < rows, other=0.0).to(tl.float32)
    at = locate(row, chunk, grad_s, grad_c, GRAD, CHANNELS, VEC, C)
    tl.store(grad + at, (g * _gradient(logit, t, miss, FAST)).to(grad.dtype.element_ty), mask=mask)


def _start(logits: Tensor, x: Tensor, with_grad: bool, mean: bool):
    tiling, (logits, x) = tile(logits, x)
    partials = tiling.partials(logits)
    grad = tiling.empty(logits.shape, logits) if with_grad else logits
    places = [tiling.strides(tensor) for tensor in (logits, x, grad)]
    launch(
        _forward, tiling.grid, logits, x, partials, grad, tiling.rows, tiling.units, tiling.chunks,
        *(step for s, c, _ in places for step in (s, c)),
        **dict(zip(("LOGITS", "X", "GRAD"), (p for _, _, p in places), strict=True)),
        UINT8=x.dtype == torch.uint8, WITH_GRAD=with_grad, MEAN=mean, **tiling.constexprs(),
    )
    return tiling, partials, grad


def forward(logits: Tensor, x: Tensor) -> Tensor:
    """nll fp32 [B]."""
    tiling, partials, _ = _start(logits, x, False, False)
    return tiling.total(partials)


def backward(logits: Tensor, x: Tensor, grad_nll: Tensor) -> Tensor:
    """The gradient of the logits: recomputed, since storing it in the forward pass would move as much."""
    tiling, (logits, x) = tile(logits, x)
    grad = tiling.empty(logits.shape, logits)
    places = [tiling.strides(tensor) for tensor in (logits, x, grad)]
    (l_s, l_c, l_p), (x_s, x_c, x_p), (g_s, g_c, g_p) = places
    launch(
        _backward, tiling.grid, logits, x, grad_nll, grad, tiling.rows, tiling.units, tiling.chunks,
        l_s, l_c, x_s, x_c, grad_nll.stride(0), g_s, g_c,
        LOGITS=l_p, X=x_p, GRAD=g_p, UINT8=x.dtype == torch.uint8, **tiling.constexprs(),
    )
    return grad


def forward_with_grad(logits: Tensor, x: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """The sum over the whole batch or its mean over the samples (fp32 scalar), and its gradient, in one pass."""
    _, partials, grad = _start(logits, x, True, mean)
    total = partials.sum()
    return total / logits.shape[0] if mean else total, grad
