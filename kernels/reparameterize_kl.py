"""z = mu + exp(logvar / 2) eps and KL(N(mu, e^logvar) || N(0, I)) in one pass; eps is never stored."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels._math import exp, exp2, expm1, expm1_minus
from genfast.kernels.launch import TILE, launch, locate, read, tile, tile_mask, tile_rows
from genfast.kernels.philox import tile_normal
from genfast.random import Stream

HALF_LOG2E = tl.constexpr(0.7213475204444817)


@triton.jit
def _clamp(raw, lo, hi, HAS_CLAMP: tl.constexpr):
    """The logvar that counts, and where it passes no gradient."""
    if HAS_CLAMP:
        # Comparisons keep a NaN, and Inductor may pass a Python float as fp64.
        lo, hi = tl.full([], lo, tl.float32), tl.full([], hi, tl.float32)
        return tl.where(raw < lo, lo, tl.where(raw > hi, hi, raw)), (raw < lo) | (raw > hi)
    return raw, raw != raw


@triton.jit
def _forward(
    mu, logvar, eps, seed, z, partials, rows, units, chunks, row_offset, free_bits, lo, hi,
    mu_s, mu_c, logvar_s, logvar_c, eps_s, eps_c, z_s, z_c,
    MU: tl.constexpr, LOGVAR: tl.constexpr, EPS: tl.constexpr, Z: tl.constexpr,
    STREAM: tl.constexpr, HAS_EPS: tl.constexpr, HAS_FREE: tl.constexpr, HAS_CLAMP: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    HALF: tl.constexpr = mu.dtype.element_ty.primitive_bitwidth == 16
    mask = tile_mask(row, rows, chunk, units, VEC, R, C)
    m = read(mu, row, chunk, mask, mu_s, mu_c, MU, CHANNELS, VEC, C)
    raw = read(logvar, row, chunk, mask, logvar_s, logvar_c, LOGVAR, CHANNELS, VEC, C)
    lv, _ = _clamp(raw, lo, hi, HAS_CLAMP)
    if HAS_EPS:
        noise = read(eps, row, chunk, mask, eps_s, eps_c, EPS, CHANNELS, VEC, C)
    else:
        noise = tile_normal(tl.load(seed), row, chunk, units, row_offset, 0, STREAM, HALF, CHANNELS, VEC, R, C, FAST)
    sample = tl.fma(exp2(lv * HALF_LOG2E, FAST), noise, m)
    tl.store(z + locate(row, chunk, z_s, z_c, Z, CHANNELS, VEC, C), sample.to(z.dtype.element_ty), mask=mask)
    twice_kl = tl.fma(m, m, expm1_minus(lv, exp(lv, FAST)))
    if HAS_FREE:
        least = 2.0 * tl.full([], free_bits, tl.float32)
        twice_kl = tl.where(twice_kl < least, least, twice_kl)
    if HAS_FREE or HAS_CLAMP:
        # Elsewhere the zeros that masked loads return have a KL of zero.
        twice_kl = tl.where(mask, twice_kl, 0.0)
    kl = 0.5 * tl.sum(twice_kl, axis=1, keep_dims=True)
    tl.store(partials + row * chunks + chunk, kl, mask=row < rows)


@triton.jit
def _backward(
    mu, logvar, eps, seed, grad_z, grad_kl, grad_mu, grad_logvar,
    rows, units, chunks, row_offset, free_bits, lo, hi, packed_offset,
    mu_s, mu_c, logvar_s, logvar_c, eps_s, eps_c, grad_z_s, grad_z_c, grad_kl_s, out_s, out_c,
    MU: tl.constexpr, LOGVAR: tl.constexpr, EPS: tl.constexpr, GRAD_Z: tl.constexpr, OUT: tl.constexpr,
    STREAM: tl.constexpr, HAS_EPS: tl.constexpr, HAS_FREE: tl.constexpr, HAS_CLAMP: tl.constexpr,
    HAS_GRAD_Z: tl.constexpr, HAS_GRAD_KL: tl.constexpr, PACKED: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    HALF: tl.constexpr = mu.dtype.element_ty.primitive_bitwidth == 16
    mask = tile_mask(row, rows, chunk, units, VEC, R, C)
    raw = read(logvar, row, chunk, mask, logvar_s, logvar_c, LOGVAR, CHANNELS, VEC, C)
    lv, clamped = _clamp(raw, lo, hi, HAS_CLAMP)
    to_mu = tl.zeros([R, C], tl.float32)
    to_logvar = tl.zeros([R, C], tl.float32)
    if HAS_GRAD_KL:
        m = read(mu, row, chunk, mask, mu_s, mu_c, MU, CHANNELS, VEC, C)
        g = tl.load(grad_kl + (row // CHANNELS) * grad_kl_s, mask=row < rows, other=0.0).to(tl.float32)
        variance = exp(lv, FAST)
        to_mu = g * m
        to_logvar = 0.5 * g * expm1(lv, variance)
        if HAS_FREE:
            free = tl.fma(m, m, expm1_minus(lv, variance)) < 2.0 * tl.full([], free_bits, tl.float32)
            to_mu = tl.where(free, 0.0, to_mu)
            to_logvar = tl.where(free, 0.0, to_logvar)
    if HAS_GRAD_Z:
        gz = read(grad_z, row, chunk, mask, grad_z_s, grad_z_c, GRAD_Z, CHANNELS, VEC, C)
        if HAS_EPS:
            noise = read(eps, row, chunk, mask, eps_s, eps_c, EPS, CHANNELS, VEC, C)
        else:
            key = tl.load(seed)
            noise = tile_normal(key, row, chunk, units, row_offset, 0, STREAM, HALF, CHANNELS, VEC, R, C, FAST)
        to_mu += gz
        to_logvar += 0.5 * gz * noise * exp2(lv * HALF_LOG2E, FAST)
    if HAS_CLAMP:
        to_logvar = tl.where(clamped, 0.0, to_logvar)
    at = locate(row, chunk, out_s, out_c, OUT, CHANNELS, VEC, C)
    tl.store(grad_mu + at, to_mu.to(grad_mu.dtype.element_ty), mask=mask)
    if PACKED:
        # From constants where they are known, so that the compiler sees how the second half is aligned.
        grad_logvar = grad_mu + (packed_offset * VEC if CHANNELS == 1 else CHANNELS * out_c)
    tl.store(grad_logvar + at, to_logvar.to(grad_mu.dtype.element_ty), mask=mask)


def _options(free_bits: float, clamp: list[float] | None) -> tuple[tuple[float, float, float], dict[str, bool]]:
    lo, hi = clamp if clamp is not None else (0.0, 0.0)
    return (free_bits, lo, hi), {"HAS_FREE": free_bits > 0.0, "HAS_CLAMP": clamp is not None}


def forward(
    mu: Tensor, logvar: Tensor, seed: Tensor | None, eps: Tensor | None,
    row_offset: int, free_bits: float, clamp: list[float] | None,
) -> tuple[Tensor, Tensor]:
    """z like mu, and kl fp32 [B]."""
    # In 16 bits the pass is bound by instructions: a larger tile spreads each thread's fixed work further.
    tiling, (mu, logvar, eps) = tile(mu, logvar, eps, size=2 * TILE if mu.element_size() == 2 else TILE)
    z, partials = tiling.empty(mu.shape, mu), tiling.partials(mu)
    noise = mu if eps is None else eps
    places = [tiling.strides(x) for x in (mu, logvar, noise, z)]
    scalars, flags = _options(free_bits, clamp)
    launch(
        _forward, tiling.grid, mu, logvar, noise, mu if seed is None else seed, z, partials,
        tiling.rows, tiling.units, tiling.chunks, row_offset, *scalars,
        *(step for s, c, _ in places for step in (s, c)),
        **dict(zip(("MU", "LOGVAR", "EPS", "Z"), (p for _, _, p in places), strict=True)),
        STREAM=int(Stream.LATENT), HAS_EPS=eps is not None, **flags, **tiling.constexprs(),
    )
    return z, tiling.total(partials)


def backward(
    mu: Tensor, logvar: Tensor, seed: Tensor | None, eps: Tensor | None,
    row_offset: int, free_bits: float, clamp: list[float] | None, grad_z: Tensor | None, grad_kl: Tensor | None,
    packed: bool = False,
) -> tuple[Tensor, ...]:
    """(grad_mu, grad_logvar) like mu; packed: one tensor [grad_mu | grad_logvar] along dimension 1."""
    tiling, (mu, logvar, eps, grad_z) = tile(mu, logvar, eps, grad_z)
    if packed:
        grads = (tiling.empty((mu.shape[0], 2 * mu.shape[1], *mu.shape[2:]), mu),)
        first, packed_offset = grads[0].narrow(1, 0, mu.shape[1]), tiling.units
    else:
        grads = (tiling.empty(mu.shape, mu), tiling.empty(mu.shape, mu))
        first, packed_offset = grads[0], 0
    noise, upstream = mu if eps is None else eps, mu if grad_z is None else grad_z
    places = [tiling.strides(x) for x in (mu, logvar, noise, upstream)]
    out_s, out_c, out_p = tiling.strides(first)
    scalars, flags = _options(free_bits, clamp)
    launch(
        _backward, tiling.grid, mu, logvar, noise, mu if seed is None else seed, upstream,
        mu if grad_kl is None else grad_kl, grads[0], mu if packed else grads[1],
        tiling.rows, tiling.units, tiling.chunks, row_offset, *scalars,
        packed_offset,
        *(step for s, c, _ in places for step in (s, c)), 0 if grad_kl is None else grad_kl.stride(0), out_s, out_c,
        **dict(zip(("MU", "LOGVAR", "EPS", "GRAD_Z"), (p for _, _, p in places), strict=True)), OUT=out_p,
        STREAM=int(Stream.LATENT), HAS_EPS=eps is not None, HAS_GRAD_Z=grad_z is not None,
        HAS_GRAD_KL=grad_kl is not None, PACKED=packed, **flags, **tiling.constexprs(),
    )
    return grads
