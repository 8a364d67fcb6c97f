"""x_t = a x0 + b eps in one pass; eps is never stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels._linear_gaussian import entry, find_entry, read_clean
from genfast.kernels.launch import TILE, launch, locate, read, tile, tile_mask, tile_rows
from genfast.kernels.philox import tile_normal
from genfast.random import Stream


@triton.jit
def _forward(
    x0, a, b, t, seed, noise, x_t, rows, units, chunks, row_offset, size, t_s, a_s, b_s,
    x0_s, x0_c, noise_s, noise_c, x_t_s, x_t_c,
    X0: tl.constexpr, NOISE: tl.constexpr, X_T: tl.constexpr,
    STREAM: tl.constexpr, INDEXED: tl.constexpr, HAS_NOISE: tl.constexpr, UINT8: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    HALF: tl.constexpr = x_t.dtype.element_ty.primitive_bitwidth == 16
    mask = tile_mask(row, rows, chunk, units, VEC, R, C)
    index, inside = find_entry(t, t_s, row // CHANNELS, row < rows, size, INDEXED)
    signal = read_clean(x0, row, chunk, mask, x0_s, x0_c, X0, UINT8, CHANNELS, VEC, C)
    if HAS_NOISE:
        eps = read(noise, row, chunk, mask, noise_s, noise_c, NOISE, CHANNELS, VEC, C)
    else:
        eps = tile_normal(tl.load(seed), row, chunk, units, row_offset, 0, STREAM, HALF, CHANNELS, VEC, R, C, FAST)
    value = tl.fma(entry(b, b_s, index, inside), eps, entry(a, a_s, index, inside) * signal)
    tl.store(x_t + locate(row, chunk, x_t_s, x_t_c, X_T, CHANNELS, VEC, C), value.to(x_t.dtype.element_ty), mask=mask)


def forward(
    x0: Tensor, a: Tensor, b: Tensor, t: Tensor | None, seed: Tensor | None, noise: Tensor | None,
    row_offset: int, dtype: torch.dtype,
) -> Tensor:
    """x_t of the given dtype, in a layout like that of x0."""
    tiling, (x0, noise) = tile(x0, noise, size=2 * TILE)
    x_t = tiling.empty(x0.shape, x0, dtype)
    given = x0 if noise is None else noise
    places = [tiling.strides(x) for x in (x0, given, x_t)]
    launch(
        _forward, tiling.grid, x0, a, b, x0 if t is None else t, x0 if seed is None else seed, given, x_t,
        tiling.rows, tiling.units, tiling.chunks, row_offset, a.shape[0],
        0 if t is None else t.stride(0), a.stride(0), b.stride(0), *(step for s, c, _ in places for step in (s, c)),
        **dict(zip(("X0", "NOISE", "X_T"), (p for _, _, p in places), strict=True)),
        STREAM=int(Stream.FORWARD_NOISE), INDEXED=t is not None, HAS_NOISE=noise is not None,
        UINT8=x0.dtype == torch.uint8, **tiling.constexprs(),
    )
    return x_t
