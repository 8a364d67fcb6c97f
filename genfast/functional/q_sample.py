"""Noisy images of a schedule, with all that a loss needs to make their noise again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from genfast import random
from genfast.functional.forward_noising import check_images, noised, resolve_noise
from genfast.schedules import Schedule

__all__ = ["Noised", "q_sample"]


class Noised(NamedTuple):
    """What `q_sample` returns, and `denoising_loss` takes: it makes the noise of x_t again, so they cannot differ.

    Attributes:
        x_t: noisy images [B, ...].
        t: timesteps [B].
        x0: the clean images as they were given, not a copy.
        seed, noise, row_offset: what the noise was made of: a seed, or the noise that was given.
    """

    x_t: Tensor
    t: Tensor
    x0: Tensor
    seed: Tensor | None
    noise: Tensor | None
    row_offset: int


def q_sample(
    x0: Tensor,
    t: int | float | Tensor | None,
    schedule: Schedule,
    *,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    row_offset: int = 0,
    dtype: torch.dtype | None = None,
) -> Noised:
    """Draw from q(x_t | x0): x_t = a(t) x0 + b(t) eps, whose noise never exists in memory.

    The coefficients are read in fp32 from the schedule's tables inside the kernel, never in half precision: in bf16,
    1 - abar is 0 for the first ten steps of the usual schedule.

    Args:
        x0: clean images [B, ...], floats in [-1, 1], or uint8, which means 2 x / 255 - 1.
        t: int64 [B] in 0..T-1 for discrete schedules, fp32 [B] for continuous ones; a single one serves all samples.
            None draws one for each sample from the seed. Out of range: an error on the CPU, NaN for that sample on a
            GPU, where looking would wait for the device.
        schedule: of `genfast.schedules`, on the device of x0.
        seed: None (drawn from torch's generator), an int, or an int64 tensor [1] on the device of x0.
        noise: of x0's shape; it replaces the generator (and then t=None draws its timesteps from torch's).
        row_offset: global index of the first sample, so that ranks and micro-batches draw their own noise and t.
        dtype: of x_t; None: that of x0, and fp32 for uint8.

    Returns:
        `Noised`.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: shapes or devices differ, seed and noise are both given, or t is out of range.

    Example:
        >>> from genfast import schedules
        >>> x0 = torch.rand(4, 1, 28, 28) * 2 - 1
        >>> x_t, t, *_ = q_sample(x0, None, schedules.linear(1000), seed=0)
        >>> x_t.shape, t.shape
        (torch.Size([4, 1, 28, 28]), torch.Size([4]))
    """
    check_images("x0", x0, dtype)
    seed, noise = resolve_noise("x0", x0, seed, noise, row_offset)
    batch = x0.shape[0]
    if t is None:
        drawn_from = random.as_seed(None, x0.device) if seed is None else seed
        t = schedule.draw_t(batch, seed=drawn_from, row_offset=row_offset)
    else:
        t = schedule.check_t(t, batch, x0.device)
    a, b, index = entries(schedule, t)
    return Noised(noised(x0, a, b, index, seed, noise, row_offset, dtype), t, x0, seed, noise, row_offset)


def entries(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(a, b, index): tables and what points into them, or, for a continuous schedule, each sample's own."""
    if schedule.continuous:
        a, b = schedule.coefficients(t)
        check_constant(schedule, t, a)
        return a, b, None
    check_constant(schedule, t, schedule.tables)
    return schedule.tables[0], schedule.tables[1], t


def check_constant(schedule: Schedule, t: Tensor, coefficients: Tensor) -> None:
    """The schedule is where t is, and neither waits for a gradient, which no op here gives to it."""
    if coefficients.device != t.device:
        raise ValueError(f"schedule: expected one on the device of the images, {t.device}, got {coefficients.device}")
    for name, value in (("t", t), ("schedule", coefficients)):
        if value.requires_grad:
            raise ValueError(f"{name}: expected no need of a gradient, as learned schedules are not supported")
