"""KL(N(mu_q, e^logvar_q) || N(mu_p, e^logvar_p)) in one pass; the prior may be broadcast over the batch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels._math import exp, expm1, expm1_minus
from genfast.kernels.launch import launch, locate, read, tile, tile_mask, tile_rows


@triton.jit
def _load(
    mu_q, logvar_q, mu_p, logvar_p, row, chunk, mask, mu_q_s, mu_q_c, logvar_q_s, logvar_q_c, mu_p_s, mu_p_c,
    logvar_p_s, logvar_p_c, MU_Q: tl.constexpr, LOGVAR_Q: tl.constexpr, MU_P: tl.constexpr, LOGVAR_P: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    """(mu_q - mu_p) / std_p, 1 / std_p, and d = logvar_q - logvar_p."""
    mq = read(mu_q, row, chunk, mask, mu_q_s, mu_q_c, MU_Q, CHANNELS, VEC, C)
    lq = read(logvar_q, row, chunk, mask, logvar_q_s, logvar_q_c, LOGVAR_Q, CHANNELS, VEC, C)
    mp = read(mu_p, row, chunk, mask, mu_p_s, mu_p_c, MU_P, CHANNELS, VEC, C)
    lp = read(logvar_p, row, chunk, mask, logvar_p_s, logvar_p_c, LOGVAR_P, CHANNELS, VEC, C)
    inverse_std = exp(-0.5 * lp, FAST)
    gap = mq - mp
    # Equal means stay equal however narrow the prior: 0 * inf would be NaN.
    scaled = tl.where(gap == 0.0, 0.0, gap * inverse_std)
    return scaled, inverse_std, lq - lp


@triton.jit
def _forward(
    mu_q, logvar_q, mu_p, logvar_p, partials, rows, units, chunks,
    mu_q_s, mu_q_c, logvar_q_s, logvar_q_c, mu_p_s, mu_p_c, logvar_p_s, logvar_p_c,
    MU_Q: tl.constexpr, LOGVAR_Q: tl.constexpr, MU_P: tl.constexpr, LOGVAR_P: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    mask = tile_mask(row, rows, chunk, units, VEC, R, C)
    scaled, _, d = _load(
        mu_q, logvar_q, mu_p, logvar_p, row, chunk, mask, mu_q_s, mu_q_c, logvar_q_s, logvar_q_c, mu_p_s, mu_p_c,
        logvar_p_s, logvar_p_c, MU_Q, LOGVAR_Q, MU_P, LOGVAR_P, CHANNELS, VEC, C, FAST,
    )
    kl = 0.5 * tl.fma(scaled, scaled, expm1_minus(d, exp(d, FAST)))
    tl.store(partials + row * chunks + chunk, tl.sum(kl, axis=1, keep_dims=True), mask=row < rows)


@triton.jit
def _backward(
    mu_q, logvar_q, mu_p, logvar_p, grad_kl, grad_mu_q, grad_logvar_q, grad_mu_p, grad_logvar_p,
    rows, units, chunks,
    mu_q_s, mu_q_c, logvar_q_s, logvar_q_c, mu_p_s, mu_p_c, logvar_p_s, logvar_p_c, grad_kl_s, out_s, out_c,
    MU_Q: tl.constexpr, LOGVAR_Q: tl.constexpr, MU_P: tl.constexpr, LOGVAR_P: tl.constexpr, OUT: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    mask = tile_mask(row, rows, chunk, units, VEC, R, C)
    scaled, inverse_std, d = _load(
        mu_q, logvar_q, mu_p, logvar_p, row, chunk, mask, mu_q_s, mu_q_c, logvar_q_s, logvar_q_c, mu_p_s, mu_p_c,
        logvar_p_s, logvar_p_c, MU_Q, LOGVAR_Q, MU_P, LOGVAR_P, CHANNELS, VEC, C, FAST,
    )
    g = tl.load(grad_kl + (row // CHANNELS) * grad_kl_s, mask=row < rows, other=0.0).to(tl.float32)
    to_mu = g * tl.where(scaled == 0.0, 0.0, scaled * inverse_std)
    to_logvar = 0.5 * g * expm1(d, exp(d, FAST))
    at = locate(row, chunk, out_s, out_c, OUT, CHANNELS, VEC, C)
    dtype = grad_mu_q.dtype.element_ty
    tl.store(grad_mu_q + at, to_mu.to(dtype), mask=mask)
    tl.store(grad_mu_p + at, (-to_mu).to(dtype), mask=mask)
    tl.store(grad_logvar_q + at, to_logvar.to(dtype), mask=mask)
    tl.store(grad_logvar_p + at, (-to_logvar - 0.5 * g * scaled * scaled).to(dtype), mask=mask)


def _arguments(tiling, inputs):
    places = [tiling.strides(x) for x in inputs]
    columns = dict(zip(("MU_Q", "LOGVAR_Q", "MU_P", "LOGVAR_P"), (p for _, _, p in places), strict=True))
    return [step for s, c, _ in places for step in (s, c)], columns


def forward(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Tensor:
    """kl fp32 [B]."""
    tiling, inputs = tile(mu_q, logvar_q, mu_p, logvar_p)
    partials = tiling.partials(mu_q)
    steps, columns = _arguments(tiling, inputs)
    launch(
        _forward, tiling.grid, *inputs, partials, tiling.rows, tiling.units, tiling.chunks, *steps,
        **columns, **tiling.constexprs(),
    )
    return tiling.total(partials)


def backward(
    mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, grad_kl: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four inputs, like mu_q."""
    tiling, inputs = tile(mu_q, logvar_q, mu_p, logvar_p)
    grads = tuple(tiling.empty(mu_q.shape, mu_q) for _ in range(4))
    out_s, out_c, out_p = tiling.strides(grads[0])
    steps, columns = _arguments(tiling, inputs)
    launch(
        _backward, tiling.grid, *inputs, grad_kl, *grads, tiling.rows, tiling.units, tiling.chunks,
        *steps, grad_kl.stride(0), out_s, out_c, **columns, OUT=out_p, **tiling.constexprs(),
    )
    return grads
