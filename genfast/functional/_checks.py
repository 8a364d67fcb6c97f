"""Argument checks that several ops share: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genfast import random

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(name: str, x: Tensor, *, dims: int = 1) -> None:
    """x is a tensor of a supported float dtype with at least `dims` dimensions, the first one the batch."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected fp32, bf16, fp16 or fp64, got {x.dtype}")
    if x.dim() < dims:
        raise ValueError(f"{name}: expected at least {dims} dimension(s) [B, ...], got shape {list(x.shape)}")


def same_shape(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """x has the shape of `other` and lies on its device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.shape != other.shape:
        raise ValueError(f"{name}: expected the shape of {other_name}, {list(other.shape)}, got {list(x.shape)}")
    if x.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {x.device}")


def non_negative(name: str, value: float) -> float:
    """A finite number that is not below zero, as a float: kernels are specialised by the kind of a number."""
    # numpy's numbers and tensors of one element also count.
    if value is None or isinstance(value, (bool, str)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # One chained comparison: it refuses NaN, and the compiler can guard it for a symbolic value.
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return value if isinstance(value, (float, torch.SymFloat)) else float(value)


def noise_source(
    name: str, noise: Tensor | None, seed: int | Tensor | None, like_name: str, like: Tensor, row_offset: int
) -> tuple[Tensor | None, Tensor | None]:
    """(seed, noise) for an op, exactly one of them not None."""
    row_index("row_offset", row_offset)
    if noise is None:
        return random.as_seed(seed, like.device), None
    if seed is not None:
        raise ValueError(f"seed: expected None when {name} is given, since {name} replaces the generator")
    floating(name, noise)
    same_shape(name, noise, like_name, like)
    return None, noise


def choice(name: str, value: object, choices: Sequence[str]) -> None:
    """One of a few names."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def row_index(name: str, value: int) -> None:
    """An int that is not below zero, possibly a symbolic one."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected an int >= 0, got {value}")


def interval(name: str, clamp: Sequence[float] | None) -> list[float] | None:
    """None, or (lo, hi) with lo < hi as a list of floats."""
    if clamp is None:
        return None
    if not isinstance(clamp, Sequence) or len(clamp) != 2 or not all(isinstance(x, (int, float)) for x in clamp):
        raise ValueError(f"{name}: expected None or a pair of numbers (lo, hi), got {clamp!r}")
    lo, hi = (float(bound) for bound in clamp)
    if not lo < hi:
        raise ValueError(f"{name}: expected lo < hi, got {clamp!r}")
    return [lo, hi]


def promoted(*tensors: Tensor) -> list[Tensor]:
    """The tensors in their common dtype, as pointwise operators would promote them."""
    common = tensors[0].dtype
    for x in tensors[1:]:
        common = torch.promote_types(common, x.dtype)
    return [x.to(common) for x in tensors]
