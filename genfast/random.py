"""Noise as a pure function of (seed, stream, salt, row, position), and the seeds that select it.

Element ``j`` of sample ``i`` is lane ``j % 4`` of ``Philox4x32-10`` (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011) with the key ``seed`` (64 bits) and the counter
``(j // 4, i mod 2^32, i >> 32, stream | salt << 8)``.
Nothing else enters, so the noise of a sample is the same at any batch size, on any number of ranks, with
micro-batches, after a resume, on CPU or GPU, eager or compiled. `genfast.kernels.philox` is the same in Triton.
"""

from __future__ import annotations

import enum
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import _len_torch_dispatch_stack_pre_dispatch

from genfast._environment import FORCE_REFERENCE, HAS_TRITON

__all__ = [
    "Stream",
    "as_seed",
    "derive_seed",
    "derive_seeds",
    "integers",
    "new_seed",
    "normal",
    "philox4x32",
    "uniform",
]

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_SALT_LIMIT = 1 << 24


class Stream(enum.IntEnum):
    """What a piece of noise is for: 8 bits of the counter, so that no two uses of one seed share a draw."""

    LATENT = 1
    FORWARD_NOISE = 2
    DEQUANTIZE = 3
    TIMESTEP = 4
    REVERSE_STEP = 5
    PRIOR = 6
    PIXEL = 7
    BINARIZE = 8
    SHUFFLE = 9
    SEED = 10
    INTERPOLATE = 11


def _draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)


# Opaque to the compiler, so eager and compiled code draw the same seed; the tag keeps recomputation from drawing again.
torch.library.define("genfast::new_seed", "(Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
torch.library.impl("genfast::new_seed", "default", _draw_seed)
torch.library.register_fake(
    "genfast::new_seed", lambda device: torch.empty(1, dtype=torch.int64, device=device)
)


def new_seed(device: torch.device | str | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Draw a seed from torch's own generator, so that `torch.manual_seed` governs all noise.

    Works under `torch.compile` (same value as eager) and inside a captured CUDA graph (a fresh value at each replay).

    Args:
        device: where the seed, and the noise made from it, lives; torch's default device if None.
        generator: a generator of that device instead of the default one (eager only).

    Returns:
        int64 tensor of shape [1].

    Example:
        >>> _ = torch.manual_seed(0)
        >>> seed = new_seed("cpu")
        >>> seed.shape, seed.dtype
        (torch.Size([1]), torch.int64)
    """
    if device is None:
        device = generator.device if generator is not None else torch.get_default_device()
    device = torch.device(device)
    if generator is not None or is_untraced():
        return _draw_seed(device, generator)
    return torch.ops.genfast.new_seed(device)


def as_seed(seed: int | Tensor | None, device: torch.device | str | None = None) -> Tensor:
    """Bring any accepted spelling of a seed to an int64 tensor of shape [1] on `device`.

    Args:
        seed: None (drawn by `new_seed`), an int of at most 64 bits (signed or unsigned), or an int64 tensor of one
            element on `device`.
        device: where the noise is wanted; the tensor's own device, or torch's default one, if None.

    Raises:
        TypeError: `seed` is of another type or dtype.
        ValueError: the int has more than 64 bits, or the tensor another size or device.

    Example:
        >>> as_seed(7)
        tensor([7])
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected an int64 tensor, got {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"seed: expected a tensor of one element, got shape {list(seed.shape)}")
        wanted = seed.device if device is None else torch.device(device)
        if seed.device.type != wanted.type or wanted.index not in (None, seed.device.index):
            raise ValueError(f"seed: expected a tensor on {device}, got one on {seed.device}")
        return seed.reshape(1)
    if seed is None:
        return new_seed(device)
    if isinstance(seed, np.integer):
        seed = int(seed)
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed: expected None, an int or an int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an int of at most 64 bits, got {seed}")
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.full((1,), signed, dtype=torch.int64, device=device)


def _rounds(key: tuple[Any, Any], counter: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 on 32-bit values held in 64-bit integers: torch int64, numpy uint64 or Python ints."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(_ROUNDS):
        # A signed product wraps, but its low 64 bits are right. c1 and c3 only meet an xor before the next mask, so
        # their high halves, and the sign that the shift drags in, are dropped there.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((b >> 32) ^ c1 ^ k0) & _MASK, b, ((a >> 32) ^ c3 ^ k1) & _MASK, a
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def philox4x32(
    key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 with 10 rounds (Salmon et al., SC 2011), elementwise.

    Args:
        key: two int64 tensors holding 32-bit values, broadcastable against the counter.
        counter: four int64 tensors holding 32-bit values.

    Returns:
        Four int64 tensors of values in [0, 2^32).

    Example:
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> [hex(int(word)) for word in philox4x32((zero, zero), (zero, zero, zero, zero))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    return _rounds(key, counter)


def derive_seed(seed: int, *indices: int) -> int:
    """An independent seed for each tuple of indices, for example one for each training step; plain Python, no sync.

    Args:
        seed: any int; its low 64 bits count.
        indices: non-negative ints below 2^64.

    Returns:
        A signed 64-bit int.

    Example:
        >>> derive_seed(0, 1) == derive_seed(0, 1), derive_seed(0, 1) == derive_seed(0, 2)
        (True, False)
    """
    for index in indices:
        words = _rounds((seed & _MASK, seed >> 32 & _MASK), (index & _MASK, index >> 32 & _MASK, 0, int(Stream.SEED)))
        seed = words[0] | words[1] << 32
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed


def derive_seeds(seed: int, first: int, count: int) -> Tensor:
    """``derive_seed(seed, first + i)`` for i from 0 to count - 1, all at once.

    Args:
        seed: any int; its low 64 bits count.
        first: the first index, non-negative.
        count: how many; the last index is below 2^64.

    Returns:
        int64 tensor of shape [count] on the CPU.

    Raises:
        ValueError: `first` or `count` is negative, or an index has more than 64 bits.

    Example:
        >>> derive_seeds(0, 5, 3).tolist() == [derive_seed(0, 5), derive_seed(0, 6), derive_seed(0, 7)]
        True
    """
    if count < 0:
        raise ValueError(f"count: expected a non-negative int, got {count}")
    if not 0 <= first <= 2**64 - max(count, 1):
        raise ValueError(f"first: expected indices from 0 to 2^64 - 1, got {count} from {first} on")
    index = np.arange(count, dtype=np.uint64) + np.uint64(first)
    words = _rounds((seed & _MASK, seed >> 32 & _MASK), (index & _MASK, index >> 32, 0, int(Stream.SEED)))
    return torch.from_numpy((words[0] | words[1] << 32).view(np.int64))


# Types whose values may be handled outside torch; a subclass may hold anything.
PLAIN = (Tensor, nn.Parameter)


def is_untraced() -> bool:
    """Whether nothing traces or records what torch is asked to do."""
    # First, since the compiler cannot trace the questions that follow.
    if torch.compiler.is_compiling():
        return False
    return torch._C._len_torch_dispatch_stack() + _len_torch_dispatch_stack_pre_dispatch() == 0


def is_plain(tensor: Tensor) -> bool:
    """Whether values can be handled outside torch: nothing is tracing, faking or recording."""
    return type(tensor) in PLAIN and is_untraced()


def _has_kernel(seed: Tensor) -> bool:
    """In eager mode on a GPU one launch replaces some 200; the compiler fuses them by itself."""
    return seed.is_cuda and HAS_TRITON and not FORCE_REFERENCE and is_plain(seed)


def _bits(
    seed: Tensor, rows: int, first: int, groups: int, stream: int, row_offset: int, salt: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four int64 words for each of `groups` groups of four positions, from group `first` on: [rows, groups] each."""
    if is_plain(seed) and seed.device.type == "cpu":
        # About 100 small calls: numpy's cost a third of torch's, and unlike torch it has 64-bit unsigned integers.
        value = int(seed)
        key = (value & _MASK, value >> 32 & _MASK)
        group = np.arange(first, first + groups, dtype=np.uint64)[None, :]
        row = np.arange(row_offset, row_offset + rows, dtype=np.uint64)[:, None]
        if isinstance(salt, Tensor) and salt.numel() != 1:
            last = (stream | (salt.numpy().reshape(-1, 1) & (_SALT_LIMIT - 1)) << 8).astype(np.uint64)
        else:
            last = stream | (int(salt) & (_SALT_LIMIT - 1)) << 8
        words = _rounds(key, (group & _MASK, row & _MASK, row >> 32, last))
        return tuple(torch.from_numpy(word.view(np.int64)) for word in words)
    key = (seed & _MASK, seed >> 32 & _MASK)
    group = torch.arange(first, first + groups, dtype=torch.int64, device=seed.device).unsqueeze(0)
    row = torch.arange(rows, dtype=torch.int64, device=seed.device).unsqueeze(1) + row_offset
    if not isinstance(salt, Tensor):
        salt = torch.full((1,), salt, dtype=torch.int64, device=seed.device)
    last = stream | (salt.reshape(-1, 1) & (_SALT_LIMIT - 1)) << 8
    return _rounds(key, (group & _MASK, row & _MASK, row >> 32 & _MASK, last))


def box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals (fp32) from two 32-bit words (int64): never infinite, |x| up to 6.77."""
    u = first.to(torch.float32) * 2.0**-32 + 2.0**-33
    # The word as a signed int32: theta in [-pi, pi).
    theta = ((second ^ 2**31) - 2**31).to(torch.float32) * (math.pi / 2**31)
    radius = torch.sqrt(-2.0 * torch.log(u))
    return radius * torch.cos(theta), radius * torch.sin(theta)


def unit(word: Tensor, bits: int = 23) -> Tensor:
    """A uniform fp32 strictly between 0 and 1 from the upper bits of a 32-bit word (int64)."""
    return (word >> 32 - bits).to(torch.float32) * 2.0**-bits + 2.0 ** -(bits + 1)


def _check_block(rows: int, cols: int, stream: int, row_offset: int, salt: int | Tensor, col_offset: int) -> None:
    for name, value in (("rows", rows), ("cols", cols), ("row_offset", row_offset), ("col_offset", col_offset)):
        if value < 0:
            raise ValueError(f"{name}: expected a non-negative int, got {value}")
    if not 0 <= stream < 256:
        raise ValueError(f"stream: expected a value of genfast.random.Stream (8 bits), got {stream}")
    if not isinstance(salt, Tensor) and not 0 <= salt < _SALT_LIMIT:
        raise ValueError(f"salt: expected an int of 24 bits, got {salt}")
    if isinstance(salt, Tensor) and salt.dtype != torch.int64:
        raise TypeError(f"salt: expected an int64 tensor, got {salt.dtype}")
    if isinstance(salt, Tensor) and salt.numel() not in (1, rows):
        raise ValueError(f"salt: expected one element, or one for each of {rows} rows, got shape {list(salt.shape)}")


def _lanes(words: tuple[Tensor, ...], skip: int, cols: int) -> Tensor:
    """Interleave the four lanes and cut out the wanted columns: [rows, cols]."""
    rows, groups = words[0].shape
    return torch.stack(words, -1).reshape(rows, groups * 4)[:, skip : skip + cols]


def normal(
    seed: int | Tensor,
    rows: int,
    cols: int,
    stream: int,
    row_offset: int = 0,
    salt: int | Tensor = 0,
    col_offset: int = 0,
) -> Tensor:
    """Standard normal noise by Box-Muller over Philox, on the seed's device.

    Args:
        seed: int64 tensor of shape [1] (its device is the result's) or an int (CPU).
        rows, cols: shape of the result.
        stream: what the noise is for, a `Stream`.
        row_offset: global index of the first row: rank r or micro-batch m passes the index of its own first sample.
        salt: 24 bits that tell repeated uses of one stream apart; an int, or an int64 tensor of one element or of one
            for each row.
        col_offset: position of the first column within the sample.

    Returns:
        fp32 tensor of shape [rows, cols].

    Raises:
        ValueError: a size or offset is negative, stream or salt has too many bits, or there are not as many salts as
            rows.
        TypeError: the salt is a tensor of another dtype.

    Example:
        >>> whole = normal(7, 4, 6, Stream.LATENT)
        >>> torch.equal(whole[2:, 3:], normal(7, 2, 3, Stream.LATENT, row_offset=2, col_offset=3))
        True
    """
    stream = int(stream)
    _check_block(rows, cols, stream, row_offset, salt, col_offset)
    seed = as_seed(seed)
    if _has_kernel(seed):
        from genfast.kernels import philox

        return philox.fill_normal(seed, rows, cols, stream, row_offset, salt, col_offset)
    first, skip = divmod(col_offset, 4)
    words = _bits(seed, rows, first, -(-(skip + cols) // 4), stream, row_offset, salt)
    pairs = (*box_muller(words[0], words[1]), *box_muller(words[2], words[3]))
    return _lanes(pairs, skip, cols)


def uniform(
    seed: int | Tensor,
    rows: int,
    cols: int,
    stream: int,
    row_offset: int = 0,
    salt: int | Tensor = 0,
    col_offset: int = 0,
    bits: int = 23,
) -> Tensor:
    """Uniform noise strictly between 0 and 1: ``((word >> (32 - bits)) + 0.5) * 2^-bits``, exact on every device.

    Args:
        bits: how fine it is, from 1 to 23. With 15 a pixel plus its noise is exact in fp32 too.

    The other arguments, shape and errors are those of `normal`.

    Example:
        >>> u = uniform(7, 2, 1000, Stream.PIXEL)
        >>> bool(((u > 0) & (u < 1)).all())
        True
        >>> uniform(7, 1, 1000, Stream.DEQUANTIZE, bits=1).unique()
        tensor([0.2500, 0.7500])
    """
    stream = int(stream)
    _check_block(rows, cols, stream, row_offset, salt, col_offset)
    if not 1 <= bits <= 23:
        raise ValueError(f"bits: expected an int from 1 to 23, got {bits}")
    seed = as_seed(seed)
    if _has_kernel(seed):
        from genfast.kernels import philox

        return philox.fill_uniform(seed, rows, cols, stream, row_offset, salt, col_offset, bits=bits)
    first, skip = divmod(col_offset, 4)
    words = _bits(seed, rows, first, -(-(skip + cols) // 4), stream, row_offset, salt)
    return unit(_lanes(words, skip, cols), bits)


def integers(
    seed: int | Tensor,
    rows: int,
    cols: int,
    high: int,
    stream: int,
    row_offset: int = 0,
    salt: int | Tensor = 0,
    col_offset: int = 0,
) -> Tensor:
    """Uniform ints from 0 to high - 1: ``(bits * high) >> 32``, the same on every device.

    Args:
        high: from 1 to 2^31; how often two values come differs by high / 2^32 at most, relatively.

    The other arguments and errors are those of `normal`.

    Returns:
        int64 tensor of shape [rows, cols].

    Example:
        >>> t = integers(7, 1000, 1, 10, Stream.TIMESTEP)
        >>> t.min().item(), t.max().item()
        (0, 9)
    """
    stream = int(stream)
    _check_block(rows, cols, stream, row_offset, salt, col_offset)
    if not 1 <= high <= 1 << 31:
        raise ValueError(f"high: expected an int from 1 to 2^31, got {high}")
    seed = as_seed(seed)
    if _has_kernel(seed):
        from genfast.kernels import philox

        return philox.fill_bits(seed, rows, cols, stream, row_offset, salt, col_offset) * high >> 32
    first, skip = divmod(col_offset, 4)
    words = _bits(seed, rows, first, -(-(skip + cols) // 4), stream, row_offset, salt)
    return _lanes(words, skip, cols) * high >> 32
