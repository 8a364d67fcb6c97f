"""y = logit(alpha + (1 - 2 alpha) (x + u) / 256) of uint8 pixels and its log-determinant in one pass, and back.

Between the last noise of a pixel and the next pixel lie 2^-16 pixels, which is 2 to 4 units in the last place of y.
Hence no logarithm or exponential of the hardware, q, the smaller of w and 1 - w, instead of w, and its rounding error.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels._math import LN2, LOG2E, log2, reciprocal
from genfast.kernels.launch import TILE, launch, locate, read, tile, tile_mask, tile_rows
from genfast.kernels.philox import interleave, tile_words
from genfast.random import Stream


@triton.jit
def _fma(x, y, z, FAST: tl.constexpr):
    """x y + z, rounded once on every path: the interpreter rounds twice in `tl.fma`."""
    if FAST:
        return tl.fma(x, y, z)
    return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)


@triton.jit
def _slope(alpha):
    """dw / dx, of alpha as it is rounded to fp32: else w would jump in the middle."""
    return tl.fma(alpha, -0.0078125, 0.00390625)


@triton.jit
def _inside(pixel, noise):
    """How many pixels w is from its nearer end, for a noise that is given, and whether that is the lower end."""
    low = pixel < 128
    return tl.where(low, pixel.to(tl.float32), (255 - pixel).to(tl.float32)) + tl.where(low, noise, 1.0 - noise), low


@triton.jit
def _log_ratio(q, FAST: tl.constexpr):
    """log(p / q) for q in (0, 0.5] and p = 1 - q, and p: 2 atanh of (p - 2^k q) / (p + 2^k q), plus k log(2)."""
    p = 1.0 - q
    # The k that brings the two within a factor of 1.5 of each other, times 2^23.
    shift = (p.to(tl.int32, bitcast=True) - q.to(tl.int32, bitcast=True) + 0x00400000) & -0x00800000
    power = (shift + 0x3F800000).to(tl.float32, bitcast=True)
    # p is rounded: the difference would show it.
    difference = _fma(-1.0 - power, q, tl.full([], 1.0, tl.float32), FAST)
    g = difference * reciprocal(tl.fma(power, q, p), FAST)
    g2 = g * g
    # Minimax, within 3e-9 relative for |g| < 0.2.
    series = tl.fma(g2, 0.30461034, 0.39951342)
    series = tl.fma(g2, series, 0.66667065)
    series = tl.fma(g2, series, 2.0)
    return tl.fma(shift.to(tl.float32), LN2 / 8388608.0, g * series), p


@triton.jit
def _seeded(pixel, word, slope, alpha, FAST: tl.constexpr):
    """y, and w (1 - w), for the noise of a Philox word."""
    # x + u in units of 2^-24, or less 256 where x > 127: its size is the distance from the nearer end, exact in fp32.
    if FAST:
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, 0x4320; lop3.b32 $0, t, 0xFFFFFE00, 0x100, 0xEA; }",
            "=r,r,r", [word, pixel.to(tl.uint32)], tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        bits = (((pixel.to(tl.uint32) << 24) | ((word >> 17) << 9)) | 0x100).to(tl.int32, bitcast=True)
    q = _fma(tl.abs(bits.to(tl.float32)), slope * 5.9604644775390625e-08, alpha, FAST)
    size, p = _log_ratio(q, FAST)
    # Negative where x < 128.
    value = ((~bits & -0x80000000) | size.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return value, p * q


@triton.jit
def _lanes(x, R: tl.constexpr, C: tl.constexpr):
    """Each of four neighbours of a tile [R, C]: [R, C / 4]."""
    even, odd = x.reshape(R, C // 4, 2, 2).split()
    x0, x2 = even.split()
    x1, x3 = odd.split()
    return x0, x1, x2, x3


@triton.jit
def _forward(
    x, u, seed, y, partials, rows, units, chunks, row_offset, alpha, scale, x_s, x_c, u_s, u_c, y_s, y_c,
    X: tl.constexpr, U: tl.constexpr, Y: tl.constexpr, STREAM: tl.constexpr, HAS_U: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    mask = tile_mask(row, rows, chunk, units, VEC, R, C)
    # From Python floats, which Inductor may pass as fp64.
    alpha, scale = tl.full([], alpha, tl.float32), tl.full([], scale, tl.float32)
    slope = _slope(alpha)
    pixel = tl.load(x + locate(row, chunk, x_s, x_c, X, CHANNELS, VEC, C), mask=mask, other=0)
    if HAS_U:
        noise = read(u, row, chunk, mask, u_s, u_c, U, CHANNELS, VEC, C)
        inside, low = _inside(pixel, noise)
        q = tl.fma(inside, slope, alpha)
        size, p = _log_ratio(q, FAST)
        # The bits of what is no probability are no logarithm.
        size = tl.where(q > 0.0, size, tl.where(q == 0.0, float("inf"), float("nan")))
        value = tl.where(low, -size, size)
        log = tl.where(mask, log2(p * (q * scale), FAST), 0.0)
    else:
        # By lanes of four neighbours, as Philox makes the noise.
        w0, w1, w2, w3 = tile_words(tl.load(seed), row, chunk, units, row_offset, 0, STREAM, CHANNELS, VEC, R, C)
        x0, x1, x2, x3 = _lanes(pixel, R, C)
        y0, f0 = _seeded(x0, w0, slope, alpha, FAST)
        y1, f1 = _seeded(x1, w1, slope, alpha, FAST)
        y2, f2 = _seeded(x2, w2, slope, alpha, FAST)
        y3, f3 = _seeded(x3, w3, slope, alpha, FAST)
        value = interleave(y0, y1, y2, y3, R, C)
        if VEC % 4 == 0:
            left = tl.minimum(tl.full([], units, tl.int64) * (VEC // 4) - chunk * (C // 4), C // 4).to(tl.int32)
            exists = (tl.arange(0, C // 4)[None, :] < left) & (row < rows)
        else:
            m0, m1, m2, m3 = _lanes(mask, R, C)
            f0, f1 = tl.where(m0, f0, slope), tl.where(m1, f1, slope)
            f2, f3 = tl.where(m2, f2, slope), tl.where(m3, f3, slope)
            exists = m0
        # One logarithm for four elements: their product is at least 2^-96. What does not exist adds log(1).
        log = tl.where(exists, log2((f0 * f1) * (f2 * f3) * scale, FAST), 0.0)
    tl.store(y + locate(row, chunk, y_s, y_c, Y, CHANNELS, VEC, C), value.to(y.dtype.element_ty), mask=mask)
    logdet = -LN2 * tl.sum(log, axis=1, keep_dims=True)
    tl.store(partials + row * chunks + chunk, logdet, mask=row < rows)


@triton.jit
def _backward(
    u, x, grad_y, grad_logdet, grad_u, rows, units, chunks, alpha,
    u_s, u_c, x_s, x_c, grad_y_s, grad_y_c, grad_logdet_s, grad_u_s, grad_u_c,
    U: tl.constexpr, X: tl.constexpr, GRAD_Y: tl.constexpr, GRAD_U: tl.constexpr,
    HAS_GRAD_Y: tl.constexpr, HAS_GRAD_LOGDET: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    mask = tile_mask(row, rows, chunk, units, VEC, R, C)
    alpha = tl.full([], alpha, tl.float32)
    slope = _slope(alpha)
    pixel = tl.load(x + locate(row, chunk, x_s, x_c, X, CHANNELS, VEC, C), mask=mask, other=0)
    noise = read(u, row, chunk, mask, u_s, u_c, U, CHANNELS, VEC, C)
    inside, low = _inside(pixel, noise)
    q = tl.fma(inside, slope, alpha)
    p = 1.0 - q
    total = tl.zeros([R, C], tl.float32)
    if HAS_GRAD_Y:
        total += read(grad_y, row, chunk, mask, grad_y_s, grad_y_c, GRAD_Y, CHANNELS, VEC, C)
    if HAS_GRAD_LOGDET:
        g = tl.load(grad_logdet + (row // CHANNELS) * grad_logdet_s, mask=row < rows, other=0.0).to(tl.float32)
        total = tl.fma(g, tl.where(low, q - p, p - q), total)
    value = (slope * total) * reciprocal(p * q, FAST)
    at = locate(row, chunk, grad_u_s, grad_u_c, GRAD_U, CHANNELS, VEC, C)
    tl.store(grad_u + at, value.to(grad_u.dtype.element_ty), mask=mask)


@triton.jit
def _inverse(
    y, x, partials, rows, units, chunks, alpha, scale, y_s, y_c, x_s, x_c,
    Y: tl.constexpr, X: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    mask = tile_mask(row, rows, chunk, units, VEC, R, C)
    alpha, scale = tl.full([], alpha, tl.float32), tl.full([], scale, tl.float32)
    slope = _slope(alpha)
    value = read(y, row, chunk, mask, y_s, y_c, Y, CHANNELS, VEC, C)
    size = tl.abs(value)
    # exp(-size) = power (1 + rest), power one of two and |rest| < 0.42, both exact enough apart from each other.
    bounded = tl.where(size < 87.0, size, 87.0)
    count = tl.fma(bounded, LOG2E, 12582912.0) - 12582912.0
    power = ((127 - count.to(tl.int32)) << 23).to(tl.float32, bitcast=True)
    r = _fma(count, tl.full([], LN2, tl.float32), -bounded, FAST)
    # Minimax, within 3e-10 relative for |r| < 0.347.
    series = tl.fma(r, 1.99159267e-04, 1.39411501e-03)
    series = tl.fma(r, series, 8.33326848e-03)
    series = tl.fma(r, series, 4.16663524e-02)
    series = tl.fma(r, series, 1.66666669e-01)
    series = tl.fma(r, series, 0.5)
    tail = power * tl.fma(r * r, series, r)
    q = (power + tail) * reciprocal((1.0 + power) + tail, FAST)
    # The nearest border between pixels, and on which side of it y lies: no quotient is exact enough to say.
    border = tl.fma(q - alpha, scale, 12582912.0) - 12582912.0
    at = _fma(border, slope, alpha, FAST)
    error = alpha + _fma(border, slope, -at, FAST)
    factor = -1.0 - power
    beyond = tl.fma(tail, 1.0 - at, tl.fma(factor, error, _fma(factor, at, power, FAST)))
    inside = border - tl.where(beyond < 0.0, 1.0, 0.0)
    inside = tl.where(inside > 0.0, inside, 0.0)
    pixel = tl.where(value < 0.0, inside, 255.0 - inside)
    pixel = tl.where(value == value, pixel, 0.0)
    tl.store(x + locate(row, chunk, x_s, x_c, X, CHANNELS, VEC, C), pixel.to(tl.int32).to(tl.uint8), mask=mask)
    # log(q (1 - q)) = -size - 2 log(1 + exp(-size)).
    log = tl.fma(-2.0 * LN2, log2((1.0 + power) + tail, FAST), -size) + LN2 * log2(scale, FAST)
    logdet = tl.sum(tl.where(mask, log, 0.0), axis=1, keep_dims=True)
    tl.store(partials + row * chunks + chunk, logdet, mask=row < rows)


def _start(x: Tensor, u: Tensor | None, seed: Tensor | None, row_offset: int, alpha: float) -> tuple[Tensor, Tensor]:
    tiling, (x, u) = tile(x, u, size=2 * TILE if u is None else TILE)
    y, partials = tiling.empty(x.shape, x, torch.float32), tiling.partials(x)
    given = x if u is None else u
    places = [tiling.strides(tensor) for tensor in (x, given, y)]
    scale = 256 / (1 - 2 * alpha)
    launch(
        _forward, tiling.grid, x, given, x if seed is None else seed, y, partials,
        tiling.rows, tiling.units, tiling.chunks, row_offset, alpha, scale if seed is None else scale**4,
        *(step for s, c, _ in places for step in (s, c)),
        **dict(zip(("X", "U", "Y"), (p for _, _, p in places), strict=True)),
        STREAM=int(Stream.DEQUANTIZE), HAS_U=u is not None, **tiling.constexprs(),
    )
    return y, tiling.total(partials)


def forward(x: Tensor, seed: Tensor, row_offset: int, alpha: float) -> tuple[Tensor, Tensor]:
    """y fp32, in a layout like that of x, and logdet fp32 [B]."""
    return _start(x, None, seed, row_offset, alpha)


def forward_given(u: Tensor, x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The same for a noise that is given."""
    return _start(x, u, None, 0, alpha)


def backward_given(u: Tensor, x: Tensor, alpha: float, grad_y: Tensor | None, grad_logdet: Tensor | None) -> Tensor:
    """The gradient of u."""
    tiling, (u, x, grad_y) = tile(u, x, grad_y)
    grad_u = tiling.empty(u.shape, u)
    upstream = u if grad_y is None else grad_y
    places = [tiling.strides(tensor) for tensor in (u, x, upstream)]
    out_s, out_c, out_p = tiling.strides(grad_u)
    launch(
        _backward, tiling.grid, u, x, upstream, u if grad_logdet is None else grad_logdet, grad_u,
        tiling.rows, tiling.units, tiling.chunks, alpha,
        *(step for s, c, _ in places for step in (s, c)), 0 if grad_logdet is None else grad_logdet.stride(0),
        out_s, out_c, **dict(zip(("U", "X", "GRAD_Y"), (p for _, _, p in places), strict=True)), GRAD_U=out_p,
        HAS_GRAD_Y=grad_y is not None, HAS_GRAD_LOGDET=grad_logdet is not None, **tiling.constexprs(),
    )
    return grad_u


def inverse(y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The inverse's logdet at y, fp32 [B], and the pixels, uint8."""
    tiling, (y,) = tile(y, size=2 * TILE)
    x, partials = tiling.empty(y.shape, y, torch.uint8), tiling.partials(y)
    places = [tiling.strides(tensor) for tensor in (y, x)]
    launch(
        _inverse, tiling.grid, y, x, partials, tiling.rows, tiling.units, tiling.chunks, alpha, 256 / (1 - 2 * alpha),
        *(step for s, c, _ in places for step in (s, c)),
        Y=places[0][2], X=places[1][2], **tiling.constexprs(),
    )
    return tiling.total(partials), x
