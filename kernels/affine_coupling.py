"""y = scale x + t of a coupling layer and its log-determinant, in one pass; both halves of params are read in place.

All conventions come down to y = e (x + u) or e x + u, with e = exp(l), l the log-scale or minus it, and u = t or -t.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels._math import LN2, SIGMOID, TANH, exp2, log2_scale, log_scale_by_factor, log_scale_slope
from genfast.kernels.launch import TILE, Tiling, launch, locate, read, tile, tile_mask, tile_rows
from genfast.reference._math import SCALE_MAPS
from genfast.reference.affine_coupling import halves

# From this many elements on there are tiles enough for large ones, which spread each thread's fixed work further.
MANY = 2**22


@triton.jit
def _start_of_rows(chunk, BOARD: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr):
    """1 in the columns whose image row has its own pixels at odd places, else 0; rows have WIDTH of them."""
    column = (chunk * C).to(tl.int32) + tl.arange(0, C)
    return ((column // WIDTH + BOARD) & 1)[None, :]


@triton.jit
def _mask(row, rows, chunk, units, FULL: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Which elements of the tile exist: all of them where it is FULL, which spares two instructions an element."""
    return tl.full([R, C], 1, tl.int1) if FULL else tile_mask(row, rows, chunk, units, VEC, R, C)


@triton.jit
def _read_factor(
    learned, factor, row, rows, chunk, mask, learned_s, learned_c, LEARNED: tl.constexpr, IS_LEARNED: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, C: tl.constexpr,
):
    """The factor in fp32: one number, one for each row [R, 1], or one for each column."""
    if not IS_LEARNED:
        value = tl.full([], factor, tl.float32)
    elif LEARNED == 0:
        at = (row // CHANNELS) * learned_s + (row % CHANNELS) * learned_c
        value = tl.load(learned + at, mask=row < rows, other=0.0).to(tl.float32)
    else:
        value = read(learned, row, chunk, mask, learned_s, learned_c, LEARNED, CHANNELS, VEC, C)
    return value


@triton.jit
def _forward(
    x, scale, shift, learned, y, partials, rows, units, chunks, factor, min_scale, board_step,
    x_s, x_c, scale_s, scale_c, shift_s, shift_c, learned_s, learned_c, y_s, y_c,
    X: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, LEARNED: tl.constexpr, Y: tl.constexpr,
    IS_LEARNED: tl.constexpr, MAP: tl.constexpr, HAS_MIN: tl.constexpr, FLIP: tl.constexpr, INNER: tl.constexpr,
    MINUS: tl.constexpr, BOARD: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    mask = _mask(row, rows, chunk, units, FULL, VEC, R, C)
    at = locate(row, chunk, x_s, x_c, X, CHANNELS, VEC, C)
    if BOARD >= 0:
        at += _start_of_rows(chunk, BOARD, WIDTH, C) * board_step
    value = tl.load(x + at, mask=mask).to(tl.float32)
    s = read(scale, row, chunk, mask, scale_s, scale_c, SCALE, CHANNELS, VEC, C)
    u = read(shift, row, chunk, mask, shift_s, shift_c, SHIFT, CHANNELS, VEC, C)
    f = _read_factor(
        learned, factor, row, rows, chunk, mask, learned_s, learned_c, LEARNED, IS_LEARNED, CHANNELS, VEC, C
    )
    if MAP == TANH:
        log = log2_scale(s, -f if FLIP else f, min_scale, MAP, HAS_MIN, FAST)
    else:
        log = log2_scale(s, f, min_scale, MAP, HAS_MIN, FAST)
        log = -log if FLIP else log
    if MAP == SIGMOID and not FULL:
        # The other maps are 0 where masked loads return zeros.
        log = tl.where(mask, log, 0.0)
    u = -u if MINUS else u
    e = exp2(log, FAST)
    result = e * (value + u) if INNER else tl.fma(e, value, u)
    tl.store(y + locate(row, chunk, y_s, y_c, Y, CHANNELS, VEC, C), result.to(y.dtype.element_ty), mask=mask)
    tl.store(partials + row * chunks + chunk, tl.sum(log, axis=1, keep_dims=True) * LN2, mask=row < rows)


@triton.jit
def _backward(
    given, scale, shift, learned, grad_y, grad_logdet, x, grad_x, grad_params, partials,
    rows, units, chunks, factor, min_scale, board_step, out_step, offset,
    given_s, given_c, scale_s, scale_c, shift_s, shift_c, learned_s, learned_c, grad_y_s, grad_y_c, grad_logdet_s,
    out_s, out_c, packed_s, packed_c,
    GIVEN: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, LEARNED: tl.constexpr, GRAD_Y: tl.constexpr,
    OUT: tl.constexpr, PACKED: tl.constexpr, HAS_GRAD_Y: tl.constexpr, HAS_GRAD_LOGDET: tl.constexpr,
    FROM_OUTPUT: tl.constexpr, SHIFT_FIRST: tl.constexpr,
    IS_LEARNED: tl.constexpr, MAP: tl.constexpr, HAS_MIN: tl.constexpr, FLIP: tl.constexpr, INNER: tl.constexpr,
    MINUS: tl.constexpr, BOARD: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):
    row, chunk = tile_rows(rows, chunks, R)
    mask = _mask(row, rows, chunk, units, FULL, VEC, R, C)
    s = read(scale, row, chunk, mask, scale_s, scale_c, SCALE, CHANNELS, VEC, C)
    f = _read_factor(
        learned, factor, row, rows, chunk, mask, learned_s, learned_c, LEARNED, IS_LEARNED, CHANNELS, VEC, C
    )
    log = log2_scale(s, f, min_scale, MAP, HAS_MIN, FAST)
    log = -log if FLIP else log
    e = exp2(log, FAST)
    out_at = locate(row, chunk, out_s, out_c, OUT, CHANNELS, VEC, C)
    if HAS_GRAD_Y or FROM_OUTPUT:
        at = locate(row, chunk, given_s, given_c, GIVEN, CHANNELS, VEC, C)
        if BOARD >= 0:
            at += _start_of_rows(chunk, BOARD, WIDTH, C) * board_step
        value = tl.load(given + at, mask=mask, other=0.0).to(tl.float32)
        if FROM_OUTPUT or INNER:
            u = read(shift, row, chunk, mask, shift_s, shift_c, SHIFT, CHANNELS, VEC, C)
            u = -u if MINUS else u
    if FROM_OUTPUT:
        scaled = value if INNER else value - u
        before = exp2(-log, FAST) * scaled
        before = before - u if INNER else before
        tl.store(x + out_at, before.to(x.dtype.element_ty), mask=mask)
    if HAS_GRAD_Y:
        upstream = read(grad_y, row, chunk, mask, grad_y_s, grad_y_c, GRAD_Y, CHANNELS, VEC, C)
        to_x = e * upstream
        to_log = upstream * scaled if FROM_OUTPUT else to_x * (value + u if INNER else value)
        to_shift = to_x if INNER else upstream
    else:
        to_x = tl.zeros([R, C], tl.float32)
        to_log = tl.zeros([R, C], tl.float32)
        to_shift = tl.zeros([R, C], tl.float32)
    if HAS_GRAD_LOGDET:
        to_log += tl.load(grad_logdet + (row // CHANNELS) * grad_logdet_s, mask=row < rows, other=0.0).to(tl.float32)
    to_log = -to_log if FLIP else to_log
    to_shift = -to_shift if MINUS else to_shift
    if BOARD >= 0:
        odd = _start_of_rows(chunk, BOARD, WIDTH, C)
        tl.store(grad_x + out_at + (1 - odd) * out_step, tl.zeros([R, C], grad_x.dtype.element_ty), mask=mask)
        out_at += odd * out_step
    tl.store(grad_x + out_at, to_x.to(grad_x.dtype.element_ty), mask=mask)
    # From constants where they are known, so that the compiler sees how the second part is aligned.
    second = offset * (VEC if PACKED == 1 else 1)
    to_scale_at = grad_params + (second if SHIFT_FIRST else 0)
    to_shift_at = grad_params + (0 if SHIFT_FIRST else second)
    packed_at = locate(row, chunk, packed_s, packed_c, PACKED, CHANNELS, VEC, C)
    to_scale = to_log * log_scale_slope(s, f, min_scale, MAP, HAS_MIN, FAST)
    tl.store(to_scale_at + packed_at, to_scale.to(grad_params.dtype.element_ty), mask=mask)
    tl.store(to_shift_at + packed_at, to_shift.to(grad_params.dtype.element_ty), mask=mask)
    if IS_LEARNED:
        to_factor = tl.where(mask, to_log * log_scale_by_factor(s, FAST), 0.0)
        if LEARNED == 0:
            total = tl.sum(to_factor, axis=1, keep_dims=True)
            tl.store(partials + row * chunks + chunk, total, mask=row < rows)
        else:
            columns, column = tl.full([], units, tl.int64) * VEC, chunk * C + tl.arange(0, C)
            block = (tl.program_id(0) // chunks).to(tl.int64)
            tl.store(partials + block * columns + column, tl.sum(to_factor, axis=0), mask=column < columns)


def forward(
    x: Tensor, params: Tensor, learned: Tensor | None, scale_map: str, factor: float, min_scale: float,
    interleaved: bool, shift_first: bool, shift_inside: bool, reciprocal: bool, checkerboard: int, inverse: bool,
) -> tuple[Tensor, Tensor]:
    """y like x, or like its half that is transformed, and logdet fp32 [B]."""
    s, t = halves(params, interleaved, shift_first)
    size = 4 * TILE if s.numel() >= MANY else TILE
    tiling, x, (s, t, multiplier) = _tiled(x, (s, t, _like(learned, s)), checkerboard, size)
    y = _empty(tiling, s.shape, x)
    partials = tiling.partials(x)
    steps, columns = _places(tiling, X=_even(x, checkerboard), SCALE=s, SHIFT=t, LEARNED=multiplier, Y=y)
    launch(
        _forward, tiling.grid, x, s, t, s if learned is None else multiplier, y, partials,
        tiling.rows, tiling.units, tiling.chunks, factor, min_scale, x.stride(-1), *steps, **columns,
        **_flags(learned, scale_map, min_scale, shift_inside, reciprocal, inverse),
        **_board(checkerboard, s), FULL=_is_full(tiling), **tiling.constexprs(),
    )
    return y, tiling.total(partials)


def backward(
    x: Tensor, params: Tensor, learned: Tensor | None, scale_map: str, factor: float, min_scale: float,
    interleaved: bool, shift_first: bool, shift_inside: bool, reciprocal: bool, checkerboard: int, inverse: bool,
    grad_y: Tensor | None, grad_logdet: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of params, packed as they are, and of the learned factor: a tensor without elements if none."""
    flags = _flags(learned, scale_map, min_scale, shift_inside, reciprocal, inverse)
    _, *grads = _gradients(
        x, params, learned, factor, min_scale, interleaved, shift_first, checkerboard, grad_y, grad_logdet, flags, False
    )
    return tuple(grads)


def backward_from_output(
    y: Tensor, params: Tensor, learned: Tensor | None, scale_map: str, factor: float, min_scale: float,
    interleaved: bool, shift_first: bool, shift_inside: bool, reciprocal: bool, inverse: bool,
    grad_y: Tensor | None, grad_logdet: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x of `forward`'s y, and the gradients of `backward`; of a checkerboard x and its gradient are the half."""
    flags = _flags(learned, scale_map, min_scale, shift_inside, reciprocal, inverse)
    return _gradients(
        y, params, learned, factor, min_scale, interleaved, shift_first, -1, grad_y, grad_logdet, flags, True
    )


def _gradients(
    given: Tensor, params: Tensor, learned: Tensor | None, factor: float, min_scale: float, interleaved: bool,
    shift_first: bool, checkerboard: int, grad_y: Tensor | None, grad_logdet: Tensor | None, flags: dict,
    from_output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, gradient of x, of params, of the learned factor), given x or y."""
    s, t = halves(params, interleaved, shift_first)
    # What is not read does not decide about the tiling either.
    read_shift = from_output or (flags["INNER"] and grad_y is not None)
    tensors = s, t if read_shift else None, _like(learned, s), grad_y
    size = 2 * TILE if s.numel() >= MANY else TILE
    tiling, given, (s, t, multiplier, grad_y) = _tiled(given, tensors, checkerboard, size)
    grad_x, grad_params = _empty(tiling, given.shape, given), _empty(tiling, params.shape, params)
    x = _empty(tiling, given.shape, given) if from_output else grad_x
    # Channels that take turns, but are no rows of the tiling, are written apart and put together behind it.
    apart = interleaved and tiling.channels == 1 and s.dim() > 2
    channels = s.shape[1]
    partials = _factor_partials(learned, multiplier, tiling, s)
    steps, columns = _places(
        tiling, GIVEN=_even(given, checkerboard), SCALE=s, SHIFT=t, LEARNED=multiplier, GRAD_Y=grad_y,
        OUT=_even(grad_x, checkerboard), PACKED=halves(grad_params, interleaved and not apart, False)[0],
    )  # fmt: skip
    # Between the two parts of params.
    offset = grad_params.stride(1) * (1 if interleaved and not apart else channels)
    launch(
        _backward, tiling.grid, given, s, s if t is None else t, s if learned is None else multiplier,
        s if grad_y is None else grad_y, s if grad_logdet is None else grad_logdet, x, grad_x, grad_params,
        s if partials is None else partials, tiling.rows, tiling.units, tiling.chunks, factor, min_scale,
        given.stride(-1), grad_x.stride(-1), offset // (tiling.vec if columns["PACKED"] == 1 else 1),
        *steps[:10], 0 if grad_logdet is None else grad_logdet.stride(0), *steps[10:], **columns,
        HAS_GRAD_Y=grad_y is not None, HAS_GRAD_LOGDET=grad_logdet is not None, FROM_OUTPUT=from_output,
        SHIFT_FIRST=shift_first, **flags, **_board(checkerboard, s), FULL=_is_full(tiling), **tiling.constexprs(),
    )  # fmt: skip
    if apart:
        grad_params = grad_params.unflatten(1, (2, channels)).transpose(1, 2).flatten(1, 2)
    return x, grad_x, grad_params, _grad_factor(learned, partials, tiling, s)


def _like(learned: Tensor | None, s: Tensor) -> Tensor | None:
    """The learned factor as a tensor of the shape of s, without a copy."""
    return None if learned is None else learned.reshape(-1, *[1] * (s.dim() - 2)).expand(s.shape)


def _even(x: Tensor, checkerboard: int) -> Tensor:
    """The first of each two columns of an image, from which the transformed ones are found; else x."""
    return x if checkerboard < 0 else x[..., 0::2]


def _tiled(
    x: Tensor, others: tuple[Tensor | None, ...], checkerboard: int, size: int
) -> tuple[Tiling, Tensor, list[Tensor | None]]:
    """The tiling, x, and the other tensors, copied where they must be."""
    view = _even(x, checkerboard)
    tiling, (half, *rest) = tile(view, *others, size=size)
    if checkerboard >= 0 and half is not view:
        # Its half is not read in place: then a copy of the whole is.
        x = x.contiguous()
        tiling, (half, *rest) = tile(_even(x, checkerboard), *others, size=size)
    return tiling, half if checkerboard < 0 else x, rest


def _empty(tiling: Tiling, shape: torch.Size, like: Tensor) -> Tensor:
    """channels_last where `like` is; a factor for each channel, or parts that take turns, are no reason for it."""
    if tiling.channels > 1 and like.stride(1) == 1:
        return tiling.empty(shape, like)
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _places(tiling: Tiling, **tensors: Tensor | None) -> tuple[list[int], dict[str, int]]:
    """Strides of all tensors as the kernels take them; zeros where there is none."""
    places = [(0, 0, 0) if x is None else tiling.strides(x) for x in tensors.values()]
    return [step for s, c, _ in places for step in (s, c)], dict(zip(tensors, (p for *_, p in places), strict=True))


def _flags(
    learned: Tensor | None, scale_map: str, min_scale: float, shift_inside: bool, reciprocal: bool, inverse: bool
) -> dict[str, bool | int]:
    return {
        "IS_LEARNED": learned is not None, "MAP": SCALE_MAPS.index(scale_map), "HAS_MIN": min_scale > 0.0,
        "FLIP": reciprocal != inverse, "INNER": shift_inside != inverse, "MINUS": inverse,
    }  # fmt: skip


def _board(checkerboard: int, s: Tensor) -> dict[str, int]:
    return {"BOARD": checkerboard, "WIDTH": 1 if checkerboard < 0 else max(1, int(s.shape[3]))}


def _is_full(tiling: Tiling) -> bool:
    whole_rows = tiling.block_rows == 1 or tiling.rows % tiling.block_rows == 0
    return bool(whole_rows and tiling.cols % tiling.block_cols == 0)


def _factor_partials(learned: Tensor | None, multiplier: Tensor | None, tiling: Tiling, s: Tensor) -> Tensor | None:
    """Where each tile leaves its sums for the learned factor: over its columns if a row has one factor, else over its
    rows."""
    if learned is None:
        return None
    blocks = -(-tiling.rows // tiling.block_rows)
    by_row = tiling.strides(multiplier)[2] == 0
    shape = (tiling.rows, tiling.chunks) if by_row else (blocks, tiling.cols)
    return torch.empty(shape, dtype=torch.float32, device=s.device)


def _grad_factor(learned: Tensor | None, partials: Tensor | None, tiling: Tiling, s: Tensor) -> Tensor:
    if partials is None:
        return torch.empty(0, dtype=torch.float32, device=s.device)
    if learned.numel() == 1:
        total = partials.sum()
    elif tiling.channels > 1:
        total = partials.view(tiling.batch, tiling.channels, tiling.chunks).sum((0, 2))
    else:
        total = partials.sum(0).view(s.shape[1], -1).sum(1)
    return total.reshape(learned.shape).to(learned.dtype)
