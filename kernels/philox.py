"""Philox4x32-10 and Box-Muller in Triton: the same noise as `genfast.random`, made where it is used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels._math import hardware
from genfast.kernels.launch import TILE, block, launch


@triton.jit
def philox4x32(seed, group, row, salt, STREAM: tl.constexpr):
    """Four uint32 words for each element of `group` broadcast against `row` (int64); salt: one, or one for each row."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = group.to(tl.uint32)
    c0, c1 = tl.broadcast(c0, (row & 0xFFFFFFFF).to(tl.uint32))
    c2 = c1 * 0 + ((row >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c3 = (c1 * 0 + salt).to(tl.uint32) << 8 | STREAM
    for _ in tl.static_range(10):
        # One 64-bit product (IMAD.WIDE) gives both halves: cheaper than umulhi and a second product.
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def box_muller(first, second, FAST: tl.constexpr):
    """Two standard normals from two uint32 words."""
    u = first.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    theta = second.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    if FAST:
        # The hardware lg2 is off by 2^-23 next to 1, where -2 log(u) itself is small and 2 (1 - u) is nearer.
        log2 = hardware(u, "lg2")
        square = tl.where(u > 0.99951171875, tl.fma(u, -2.0, 2.0), log2 * -1.3862943611198906)
        radius = hardware(square, "sqrt")
        cos = hardware(theta, "cos")
        sin = hardware(theta, "sin")
    else:
        radius = tl.sqrt(-2.0 * tl.log(u))
        cos = tl.cos(theta)
        sin = tl.sin(theta)
    return radius * cos, radius * sin


@triton.jit
def _four_normals(seed, group, row, salt, STREAM: tl.constexpr, FAST: tl.constexpr):
    w0, w1, w2, w3 = philox4x32(seed, group, row, salt, STREAM)
    e0, e1 = box_muller(w0, w1, FAST)
    e2, e3 = box_muller(w2, w3, FAST)
    return e0, e1, e2, e3


@triton.jit
def interleave(e0, e1, e2, e3, R: tl.constexpr, C: tl.constexpr):
    """Put the four lanes in order along the columns: [R, C]."""
    return tl.join(tl.join(e0, e2), tl.join(e1, e3)).reshape(R, C)


@triton.jit
def tile_words(
    seed, row, chunk, units, row_offset, salt, STREAM: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):
    """The lanes of raw uint32 words, [R, C / 4] each, of a tile of `genfast.kernels.launch` of data with 8 bits."""
    if CHANNELS == 1:
        sample = row
        first = chunk * (C // 4)
    else:
        sample = row // CHANNELS
        first = chunk * (C // 4) + (row % CHANNELS) * (units * VEC // 4)
    if C >= 16:
        # A thread reads 16 neighbours of 8 bits at once: make four Philox groups in it.
        group = first + (tl.arange(0, C // 16) * 4)[None, :]
        a0, a1, a2, a3 = philox4x32(seed, group, sample + row_offset, salt, STREAM)
        b0, b1, b2, b3 = philox4x32(seed, group + 1, sample + row_offset, salt, STREAM)
        c0, c1, c2, c3 = philox4x32(seed, group + 2, sample + row_offset, salt, STREAM)
        d0, d1, d2, d3 = philox4x32(seed, group + 3, sample + row_offset, salt, STREAM)
        w0, w1 = interleave(a0, b0, c0, d0, R, C // 4), interleave(a1, b1, c1, d1, R, C // 4)
        w2, w3 = interleave(a2, b2, c2, d2, R, C // 4), interleave(a3, b3, c3, d3, R, C // 4)
    else:
        w0, w1, w2, w3 = philox4x32(seed, first + tl.arange(0, C // 4)[None, :], sample + row_offset, salt, STREAM)
    return w0, w1, w2, w3


@triton.jit
def tile_normal(
    seed, row, chunk, units, row_offset, salt, STREAM: tl.constexpr, HALF: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    """Standard normals [R, C] of a tile of `genfast.kernels.launch`; HALF: the data beside them have 16 bits."""
    if CHANNELS == 1:
        sample = row
        first = chunk * (C // 4)
    else:
        sample = row // CHANNELS
        first = chunk * (C // 4) + (row % CHANNELS) * (units * VEC // 4)
    if HALF and C >= 8:
        # A thread reads 8 neighbours of 16 bits at once: make two Philox groups in it, or they would have to be
        # exchanged through shared memory.
        even = first + (tl.arange(0, C // 8) * 2)[None, :]
        a0, a1, a2, a3 = _four_normals(seed, even, sample + row_offset, salt, STREAM, FAST)
        b0, b1, b2, b3 = _four_normals(seed, even + 1, sample + row_offset, salt, STREAM, FAST)
        return interleave(tl.join(a0, b0), tl.join(a1, b1), tl.join(a2, b2), tl.join(a3, b3), R, C)
    group = first + tl.arange(0, C // 4)[None, :]
    e0, e1, e2, e3 = _four_normals(seed, group, sample + row_offset, salt, STREAM, FAST)
    return interleave(e0, e1, e2, e3, R, C)


@triton.jit
def _fill(
    out, seed, rows, cols, row_offset, salt, col_offset,
    STREAM: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, SALTS: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    chunks = (col_offset % 4 + cols + C - 1) // C
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64) * R + tl.arange(0, R)[:, None]
    chunk = (program % chunks).to(tl.int64)
    group = col_offset // 4 + (chunk * (C // 4) + tl.arange(0, C // 4))[None, :]
    salted = tl.load(salt + row, mask=row < rows, other=0) if SALTS else tl.load(salt)
    if KIND == "normal":
        e0, e1, e2, e3 = _four_normals(tl.load(seed), group, row + row_offset, salted, STREAM, FAST)
        value = interleave(e0, e1, e2, e3, R, C)
    else:
        w0, w1, w2, w3 = philox4x32(tl.load(seed), group, row + row_offset, salted, STREAM)
        value = interleave(w0, w1, w2, w3, R, C).to(tl.int64)
        if KIND == "uniform":
            step: tl.constexpr = 1.0 / (1 << BITS)
            value = (value >> (32 - BITS)).to(tl.float32) * step + step / 2
    col = (chunk * C + tl.arange(0, C))[None, :] - col_offset % 4
    tl.store(out + row * cols + col, value, mask=(row < rows) & (col >= 0) & (col < cols))


def _fill_block(kind: str, seed, rows, cols, stream, row_offset, salt, col_offset, block_cols, bits=0) -> Tensor:
    out = torch.empty(rows, cols, dtype=torch.int64 if kind == "bits" else torch.float32, device=seed.device)
    salt = salt if isinstance(salt, Tensor) else torch.full((1,), salt, dtype=torch.int64, device=seed.device)
    salts = salt.numel() > 1
    salt = salt.contiguous() if salts else salt
    span = col_offset % 4 + cols
    block_cols = block_cols or block(span)
    block_rows = TILE // block_cols
    grid = -(-rows // block_rows) * -(-span // block_cols) if cols else 0
    launch(
        _fill, grid, out, seed, rows, cols, row_offset, salt, col_offset,
        STREAM=stream, KIND=kind, BITS=bits, SALTS=salts, R=block_rows, C=block_cols,
    )
    return out


def fill_normal(seed, rows, cols, stream, row_offset=0, salt=0, col_offset=0, block_cols=None) -> Tensor:
    """`genfast.random.normal` as one launch: fp32 [rows, cols]."""
    return _fill_block("normal", seed, rows, cols, stream, row_offset, salt, col_offset, block_cols)


def fill_uniform(seed, rows, cols, stream, row_offset=0, salt=0, col_offset=0, block_cols=None, bits=23) -> Tensor:
    """`genfast.random.uniform` as one launch: fp32 [rows, cols]."""
    return _fill_block("uniform", seed, rows, cols, stream, row_offset, salt, col_offset, block_cols, bits)


def fill_bits(seed, rows, cols, stream, row_offset=0, salt=0, col_offset=0, block_cols=None) -> Tensor:
    """The raw 32-bit words as int64 [rows, cols]; `genfast.random.integers` scales them."""
    return _fill_block("bits", seed, rows, cols, stream, row_offset, salt, col_offset, block_cols)
