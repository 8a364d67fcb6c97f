"""What every launch shares: how a tensor is cut into tiles, and how a kernel is started, traced or recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from genfast._environment import INTERPRETED
from genfast.random import is_plain

# 16 elements a thread at 4 warps: enough bytes in flight for HBM, and Philox's fixed work is shared by four lanes.
TILE = 2048
WARPS = 4
# Triton 3.10 turns the fusion of products and sums off by default.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}

_recorded: list[tuple] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[tuple]]:
    """Collect launches as (kernel, args, constexprs) instead of running them: for compiling them without a GPU."""
    global _recorded
    previous, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = previous


def launch(kernel, grid: int, *args, **constexprs) -> None:
    """Start `kernel` on a one-dimensional grid; an empty grid is not an error."""
    if _recorded is not None:
        _recorded.append((kernel, args, constexprs))
        return
    if isinstance(grid, int) and grid == 0:
        return
    if "FAST" in kernel.arg_names:
        # PTX exists on CUDA alone; the interpreter and ROCm take the portable branch.
        constexprs["FAST"] = not INTERPRETED and torch.version.hip is None
    if INTERPRETED:
        kernel[(grid,)](*args, **constexprs)
    elif is_plain(args[0]):
        # Triton launches on the current device, whatever device its arguments are on.
        elsewhere = args[0].get_device() != torch.cuda.current_device()
        with torch.cuda.device_of(args[0]) if elsewhere else contextlib.nullcontext():
            kernel[(grid,)](*args, **constexprs, **OPTIONS)
    else:
        # A traced launch does not take the other option; accuracy rests on products fused by name, in the kernels.
        wrap_triton(kernel)[(grid,)](*args, **constexprs, num_warps=WARPS)


@dataclass(frozen=True)
class Tiling:
    """A batch of samples as rows of columns, cut into tiles of `block_rows` x `block_cols`.

    A row is a sample (channels = 1) or one channel of a sample, so that channels_last is read in place. `vec` is a
    power of two that divides every stride and the row length: the widest access the shapes allow, in elements.
    """

    batch: int
    channels: int
    cols: int
    vec: int
    block_rows: int
    block_cols: int

    @property
    def rows(self) -> int:
        return self.batch * self.channels

    @property
    def chunks(self) -> int:
        return -(-self.cols // self.block_cols)

    @property
    def units(self) -> int:
        return self.cols // self.vec

    @property
    def grid(self) -> int:
        return -(-self.rows // self.block_rows) * self.chunks

    def partials(self, like: Tensor) -> Tensor:
        """Where each tile leaves its fp32 sums: one number for each row and chunk."""
        shape = (self.batch,) if self.channels * self.chunks == 1 else (self.rows, self.chunks)
        return torch.empty(shape, dtype=torch.float32, device=like.device)

    def total(self, partials: Tensor) -> Tensor:
        """The per-sample sums [B], added in a fixed order."""
        per_sample = self.channels * self.chunks
        return partials if per_sample == 1 else partials.view(self.batch, per_sample).sum(1)

    def empty(self, shape: torch.Size, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An output in the layout that this tiling writes best, contiguous or channels_last, and of `like`'s dtype."""
        dtype = like.dtype if dtype is None else dtype
        if self.channels == 1:
            return torch.empty(shape, dtype=dtype, device=like.device)
        if type(like) is not Tensor or torch.compiler.is_compiling():
            # torch 2.11 merges equal calls of empty_strided in a trace, and then copies what is written twice.
            last = torch.empty((shape[0], *shape[2:], shape[1]), dtype=dtype, device=like.device)
            return last.movedim(-1, 1)
        strides, step = [1] * len(shape), shape[1]
        for dim in range(len(shape) - 1, 1, -1):
            strides[dim], step = step, step * shape[dim]
        strides[0] = step
        return torch.empty_strided(shape, strides, dtype=dtype, device=like.device)

    def constexprs(self) -> dict[str, int]:
        return {"CHANNELS": self.channels, "VEC": self.vec, "R": self.block_rows, "C": self.block_cols}

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        """(sample, channel, column) strides as `locate` in the kernels takes them."""
        return (_steps_cached if is_plain(x) else _steps)((x.shape, x.stride()), self.channels, self.vec)


# All of a tensor that decides about its tiling: shape and strides. A trace may leave them open, as no key of a cache.
Layout = tuple[tuple[int, ...], tuple[int, ...]]


def _split(x: Layout) -> tuple[int, int, int] | None:
    """Strides of x as [B, C, P], or None where dimensions 2.. are not one run of equal steps."""
    shape, strides = x
    sample = strides[0]
    channel = strides[1] if len(shape) > 1 else 0
    column, expected = None, None
    for size, stride in zip(reversed(shape[2:]), reversed(strides[2:]), strict=True):
        if size == 1:
            continue
        if column is None:
            column, expected = stride, stride * size
        elif stride != expected:
            return None
        else:
            expected = stride * size
    return sample, channel, 1 if column is None else column


def _steps(x: Layout, channels: int, vec: int) -> tuple[int, int, int]:
    sample, channel, column = _split(x)
    if channels == 1:
        channel, column = 0, _flat(x)
    unit = vec if column == 1 else 1
    return sample // unit, channel // unit, column


# A training loop meets few layouts, and finding a tiling was half of the host time in here.
_steps_cached = lru_cache(maxsize=1024)(_steps)


def _inner(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape[2:]:
        size *= extent
    return size


def _flat(x: Layout) -> int | None:
    """The one stride between the elements of a sample in logical order, or None where there is no such."""
    split = _split(x)
    if split is None:
        return None
    _, channel, column = split
    shape, _ = x
    inner = _inner(shape)
    if len(shape) == 1 or (inner == 1 and shape[1] == 1):
        return 1
    if inner == 1:
        return channel
    return column if shape[1] == 1 or channel == inner * column else None


def _is_direct(x: Layout, by_channel: bool) -> bool:
    # Steps between columns that are neither 1 nor 2, nor broadcast, nor channels_last would read one cache line an
    # element: copying once is cheaper.
    if not by_channel:
        return _flat(x) in (0, 1, 2)
    split = _split(x)
    return split is not None and (split[2] in (0, 1, 2) or split[1] in (1, 2))


def block(cols: int, size: int = TILE) -> int:
    """The power of two from 4 to `size` that covers `cols`; found by comparing, so that a symbolic `cols` stays one."""
    covers = 4
    while covers < cols and covers < size:
        covers *= 2
    return covers


def tile(*tensors: Tensor | None, size: int = TILE) -> tuple[Tiling, list[Tensor | None]]:
    """Choose tiles of `size` elements for tensors of one shape [B, ...]; returns the tiling and the tensors, copied
    only where they must be."""
    layouts = tuple([(x.shape, x.stride()) for x in tensors if x is not None])
    tiling, direct = (_tile_cached if is_plain(tensors[0]) else _tile)(layouts, size)
    read_in_place = iter(direct)
    return tiling, [x if x is None or next(read_in_place) else x.contiguous() for x in tensors]


def _tile(layouts: tuple[Layout, ...], size: int) -> tuple[Tiling, tuple[bool, ...]]:
    """The tiling, and which of the tensors it reads as they are: the others are to be made contiguous."""
    shape, _ = layouts[0]
    batch, channels = shape[0], shape[1] if len(shape) > 1 else 1
    inner = _inner(shape)
    # Four neighbours share a Philox call, so a channel can be a row of its own only if its length is a multiple of 4.
    by_channel = inner % 4 == 0 and inner > 1 and not all(_is_direct(x, False) for x in layouts)
    direct = tuple(_is_direct(x, by_channel) for x in layouts)
    row = inner if by_channel else channels * inner
    vec = 16
    while row % vec:
        vec //= 2
    for x in (x for x, as_it_is in zip(layouts, direct, strict=True) if as_it_is):
        sample, channel, _ = _split(x)
        column = _split(x)[2] if by_channel else _flat(x)
        steps = (sample, channel) if by_channel else (sample,)
        while column == 1 and any(step % vec for step in steps):
            vec //= 2
    # By channel a tile spans up to 16 of them: neighbours in memory, where the layout is channels_last.
    block_cols = block(row, size // block(channels, 16) if by_channel else size)
    return Tiling(batch, channels if by_channel else 1, row, vec, size // block_cols, block_cols), direct


_tile_cached = lru_cache(maxsize=1024)(_tile)


@triton.jit
def tile_rows(rows, chunks, R: tl.constexpr):
    """This program's rows [R, 1] (int64: offsets pass 2^31) and its chunk of the columns."""
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64) * R + tl.arange(0, R)[:, None]
    return row, (program % chunks).to(tl.int64)


@triton.jit
def tile_mask(row, rows, chunk, units, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Which elements of the tile exist; the row length comes in units of VEC so that wide accesses stay wide."""
    inside = (chunk * C + tl.arange(0, C))[None, :] < tl.full([], units, tl.int64) * VEC
    return inside & (row < rows) if R > 1 else inside & (row >= 0)


@triton.jit
def locate(
    row, chunk, sample_stride, channel_stride,
    COLUMN: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr, C: tl.constexpr,
):
    """Offsets [R, C] of the tile's elements: 64 bits, but for 32 within contiguous columns."""
    unit: tl.constexpr = VEC if COLUMN == 1 else 1
    if CHANNELS == 1:
        start = row * sample_stride * unit
    else:
        start = (row // CHANNELS) * sample_stride * unit + (row % CHANNELS) * channel_stride * unit
    within = tl.arange(0, C) if COLUMN < 2 else tl.arange(0, C).to(tl.int64)
    return start + chunk * C * COLUMN + (within * COLUMN)[None, :]


@triton.jit
def read(
    x, row, chunk, mask, sample_stride, channel_stride,
    COLUMN: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr, C: tl.constexpr,
):
    """The tile's elements of x in fp32, zero outside the mask."""
    at = locate(row, chunk, sample_stride, channel_stride, COLUMN, CHANNELS, VEC, C)
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
