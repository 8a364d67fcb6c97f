"""w mean((pred - (p x0 + q eps))^2) of each sample; the noise is made again where it is used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels._linear_gaussian import (
    EPSILON,
    X0,
    entry,
    find_entry,
    loss_weight,
    read_clean,
    target_coefficients,
)
from genfast.kernels._math import reciprocal
from genfast.kernels.launch import TILE, launch, locate, read, tile, tile_mask, tile_rows
from genfast.kernels.philox import tile_normal
from genfast.random import Stream
from genfast.reference._linear_gaussian import OBJECTIVES, WEIGHTINGS


@triton.jit
def _error(
    pred, x0, a, b, t, seed, noise, row, rows, chunk, mask, units, row_offset, size, t_s, a_s, b_s, gamma, sigma_data,
    pred_s, pred_c, x0_s, x0_c, noise_s, noise_c,
    PRED: tl.constexpr, CLEAN: tl.constexpr, NOISE: tl.constexpr,
    STREAM: tl.constexpr, INDEXED: tl.constexpr, HAS_NOISE: tl.constexpr, UINT8: tl.constexpr,
    OBJECTIVE: tl.constexpr, WEIGHTING: tl.constexpr, HALF: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    """The error pred - target, zero outside the tile, and the factor of each row's sum of squares."""
    index, inside = find_entry(t, t_s, row // CHANNELS, row < rows, size, INDEXED)
    a_t, b_t = entry(a, a_s, index, inside), entry(b, b_s, index, inside)
    # From Python floats, which Inductor may pass as fp64.
    sigma_data = tl.full([], sigma_data, tl.float32)
    p, q = target_coefficients(a_t, b_t, sigma_data, OBJECTIVE)
    error = read(pred, row, chunk, mask, pred_s, pred_c, PRED, CHANNELS, VEC, C)
    if OBJECTIVE != EPSILON:
        signal = read_clean(x0, row, chunk, mask, x0_s, x0_c, CLEAN, UINT8, CHANNELS, VEC, C)
        error = tl.fma(-p, signal, error)
    if OBJECTIVE != X0:
        if HAS_NOISE:
            eps = read(noise, row, chunk, mask, noise_s, noise_c, NOISE, CHANNELS, VEC, C)
        else:
            eps = tile_normal(tl.load(seed), row, chunk, units, row_offset, 0, STREAM, HALF, CHANNELS, VEC, R, C, FAST)
        error = tl.fma(-q, eps, error)
    # 0 a: a timestep outside the tables makes the sample NaN whatever the objective reads of them.
    weight = 0.0 * a_t + loss_weight(a_t, b_t, tl.full([], gamma, tl.float32), sigma_data, OBJECTIVE, WEIGHTING)
    elements = (tl.full([], units, tl.int64) * VEC * CHANNELS).to(tl.float32)
    return tl.where(mask, error, 0.0), weight * reciprocal(elements, FAST)


@triton.jit
def _forward(
    pred, x0, a, b, t, seed, noise, partials, grad,
    rows, units, chunks, row_offset, size, t_s, a_s, b_s, gamma, sigma_data,
    pred_s, pred_c, x0_s, x0_c, noise_s, noise_c, grad_s, grad_c,
    PRED: tl.constexpr, CLEAN: tl.constexpr, NOISE: tl.constexpr, GRAD: tl.constexpr,
    STREAM: tl.constexpr, INDEXED: tl.constexpr, HAS_NOISE: tl.constexpr, UINT8: tl.constexpr,
    OBJECTIVE: tl.constexpr, WEIGHTING: tl.constexpr, WITH_GRAD: tl.constexpr, MEAN: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    HALF: tl.constexpr = pred.dtype.element_ty.primitive_bitwidth == 16
    mask = tile_mask(row, rows, chunk, units, VEC, R, C)
    error, factor = _error(
        pred, x0, a, b, t, seed, noise, row, rows, chunk, mask, units, row_offset, size, t_s, a_s, b_s,
        gamma, sigma_data, pred_s, pred_c, x0_s, x0_c, noise_s, noise_c, PRED, CLEAN, NOISE, STREAM, INDEXED,
        HAS_NOISE, UINT8, OBJECTIVE, WEIGHTING, HALF, CHANNELS, VEC, R, C, FAST,
    )
    squares = tl.sum(error * error, axis=1, keep_dims=True)
    tl.store(partials + row * chunks + chunk, factor * squares, mask=row < rows)
    if WITH_GRAD:
        slope = 2.0 * factor
        if MEAN:
            # From the number of rows: Inductor types a scalar that depends on a symbolic batch as an integer.
            slope *= reciprocal(tl.full([], rows // CHANNELS, tl.float32), FAST)
        at = locate(row, chunk, grad_s, grad_c, GRAD, CHANNELS, VEC, C)
        tl.store(grad + at, (slope * error).to(grad.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    pred, x0, a, b, t, seed, noise, grad_loss, grad,
    rows, units, chunks, row_offset, size, t_s, a_s, b_s, gamma, sigma_data, grad_loss_s,
    pred_s, pred_c, x0_s, x0_c, noise_s, noise_c, grad_s, grad_c,
    PRED: tl.constexpr, CLEAN: tl.constexpr, NOISE: tl.constexpr, GRAD: tl.constexpr,
    STREAM: tl.constexpr, INDEXED: tl.constexpr, HAS_NOISE: tl.constexpr, UINT8: tl.constexpr,
    OBJECTIVE: tl.constexpr, WEIGHTING: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    HALF: tl.constexpr = pred.dtype.element_ty.primitive_bitwidth == 16
    mask = tile_mask(row, rows, chunk, units, VEC, R, C)
    error, factor = _error(
        pred, x0, a, b, t, seed, noise, row, rows, chunk, mask, units, row_offset, size, t_s, a_s, b_s,
        gamma, sigma_data, pred_s, pred_c, x0_s, x0_c, noise_s, noise_c, PRED, CLEAN, NOISE, STREAM, INDEXED,
        HAS_NOISE, UINT8, OBJECTIVE, WEIGHTING, HALF, CHANNELS, VEC, R, C, FAST,
    )
    upstream = tl.load(grad_loss + (row // CHANNELS) * grad_loss_s, mask=row < rows, other=0.0).to(tl.float32)
    at = locate(row, chunk, grad_s, grad_c, GRAD, CHANNELS, VEC, C)
    tl.store(grad + at, (2.0 * upstream * factor * error).to(grad.dtype.element_ty), mask=mask)


class _Arguments:
    """What all three launches take, in the kernels' order; `pred` and `tiling` decide about what they write."""

    def __init__(self, pred, x0, a, b, t, seed, noise, row_offset, objective, weighting, gamma, sigma_data):
        objective_index, weighting_index = OBJECTIVES.index(objective), WEIGHTINGS.index(weighting)
        # What the objective does not read does not decide about the tiling either.
        x0 = None if objective == "epsilon" else x0
        noise = None if objective == "x0" else noise
        self.tiling, (self.pred, x0, noise) = tile(pred, x0, noise, size=2 * TILE)
        tiling, pred = self.tiling, self.pred
        clean, given = pred if x0 is None else x0, pred if noise is None else noise
        self.tensors = (pred, clean, a, b, pred if t is None else t, pred if seed is None else seed, given)
        self.scalars = (
            tiling.rows, tiling.units, tiling.chunks, row_offset, a.shape[0],
            0 if t is None else t.stride(0), a.stride(0), b.stride(0), gamma, sigma_data,
        )
        self.places = [tiling.strides(x) for x in (pred, clean, given)]
        self.flags = {
            "STREAM": int(Stream.FORWARD_NOISE), "INDEXED": t is not None, "HAS_NOISE": noise is not None,
            "UINT8": clean.dtype == torch.uint8, "OBJECTIVE": objective_index, "WEIGHTING": weighting_index,
            **tiling.constexprs(),
        }

    def strides(self, out: Tensor) -> tuple[list[int], dict[str, int]]:
        """Strides of all tensors, `out` the last, as the kernels take them."""
        places = [*self.places, self.tiling.strides(out)]
        names = ("PRED", "CLEAN", "NOISE", "GRAD")
        return [step for s, c, _ in places for step in (s, c)], dict(zip(names, (p for *_, p in places), strict=True))


def _start(arguments: _Arguments, with_grad: bool, mean: bool) -> tuple[Tensor, Tensor]:
    tiling, pred = arguments.tiling, arguments.pred
    partials = tiling.partials(pred)
    grad = tiling.empty(pred.shape, pred) if with_grad else pred
    steps, columns = arguments.strides(grad)
    launch(
        _forward, tiling.grid, *arguments.tensors, partials, grad, *arguments.scalars, *steps, **columns,
        WITH_GRAD=with_grad, MEAN=mean, **arguments.flags,
    )
    return partials, grad


def forward(
    pred: Tensor, x0: Tensor | None, a: Tensor, b: Tensor, t: Tensor | None, seed: Tensor | None,
    noise: Tensor | None, row_offset: int, objective: str, weighting: str, gamma: float, sigma_data: float,
) -> Tensor:
    """loss fp32 [B]."""
    arguments = _Arguments(pred, x0, a, b, t, seed, noise, row_offset, objective, weighting, gamma, sigma_data)
    return arguments.tiling.total(_start(arguments, False, False)[0])


def backward(
    pred: Tensor, x0: Tensor | None, a: Tensor, b: Tensor, t: Tensor | None, seed: Tensor | None,
    noise: Tensor | None, row_offset: int, objective: str, weighting: str, gamma: float, sigma_data: float,
    grad_loss: Tensor,
) -> Tensor:
    """The gradient of pred."""
    arguments = _Arguments(pred, x0, a, b, t, seed, noise, row_offset, objective, weighting, gamma, sigma_data)
    grad = arguments.tiling.empty(pred.shape, arguments.pred)
    steps, columns = arguments.strides(grad)
    launch(
        _backward, arguments.tiling.grid, *arguments.tensors, grad_loss, grad, *arguments.scalars,
        grad_loss.stride(0), *steps, **columns, **arguments.flags,
    )
    return grad


def forward_with_grad(
    pred: Tensor, x0: Tensor | None, a: Tensor, b: Tensor, t: Tensor | None, seed: Tensor | None,
    noise: Tensor | None, row_offset: int, objective: str, weighting: str, gamma: float, sigma_data: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """The sum over the whole batch or its mean over the samples (fp32 scalar), and its gradient, in one pass."""
    arguments = _Arguments(pred, x0, a, b, t, seed, noise, row_offset, objective, weighting, gamma, sigma_data)
    partials, grad = _start(arguments, True, mean)
    total = partials.sum()
    return total / pred.shape[0] if mean else total, grad
