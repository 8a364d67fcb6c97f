"""Noisy images x_t = a x0 + b eps whose noise is never stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genfast.functional import _checks
from genfast.functional._register import register
from genfast.reference._linear_gaussian import gathered, wide_rows

_op = register("forward_noising", "forward_noising", "forward")


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x0, a, b, t, _, noise, _, _ = inputs
    ctx.save_for_backward(a, b, t)
    ctx.x0_dtype, ctx.noise_dtype = x0.dtype, None if noise is None else noise.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    a, b, t = ctx.saved_tensors
    wanted, grad_x0, grad_noise = ctx.needs_input_grad, None, None
    # Plain PyTorch: it is linear, and hardly anyone trains what makes x0 through its noise.
    if wanted[0]:
        grad_x0 = (wide_rows(gathered(a, t), grad) * grad).to(ctx.x0_dtype)
    if wanted[5]:
        grad_noise = (wide_rows(gathered(b, t), grad) * grad).to(ctx.noise_dtype)
    return grad_x0, None, None, None, None, grad_noise, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def resolve_noise(
    x0_name: str, x0: Tensor, seed: int | Tensor | None, noise: Tensor | None, row_offset: int
) -> tuple[Tensor | None, Tensor | None]:
    """(seed, noise) for the op, exactly one of them not None."""
    return _checks.noise_source("noise", noise, seed, x0_name, x0, row_offset)


def noised(
    x0: Tensor, a: Tensor, b: Tensor, t: Tensor | None, seed: Tensor | None, noise: Tensor | None, row_offset: int,
    dtype: torch.dtype | None,
) -> Tensor:
    """The op on checked arguments; a and b may be tables that t points into."""
    if dtype is None:
        dtype = torch.float32 if x0.dtype == torch.uint8 else x0.dtype
    return _op(x0, a, b, t, seed, noise, row_offset, dtype)


def check_images(name: str, x0: Tensor, dtype: torch.dtype | None) -> None:
    """x0 is a float or uint8 tensor [B, ...], and dtype None or a float dtype."""
    if not isinstance(x0, Tensor) or x0.dtype != torch.uint8:
        _checks.floating(name, x0)
    elif x0.dim() < 1:
        raise ValueError(f"{name}: expected at least 1 dimension(s) [B, ...], got shape []")
    if dtype is not None and dtype not in _checks.FLOATS:
        raise TypeError(f"dtype: expected None, fp32, bf16, fp16 or fp64, got {dtype}")


def _check_coefficient(name: str, value: Tensor, x0: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64):
        # In 16 bits 1 - abar would already be lost.
        raise TypeError(f"{name}: expected fp32, got {value.dtype}")
    if value.shape != x0.shape[:1]:
        raise ValueError(f"{name}: expected one number for each sample, shape [{x0.shape[0]}], got {list(value.shape)}")
    if value.device != x0.device:
        raise ValueError(f"{name}: expected the device of x0, {x0.device}, got {value.device}")
    if value.requires_grad:
        raise ValueError(f"{name}: expected a tensor that needs no gradient, as learned schedules are not supported")


def forward_noising(
    x0: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    row_offset: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x_t = a x0 + b eps with eps from N(0, I), made in registers: the noise never exists in memory.

    Ho, Jain and Abbeel, "Denoising diffusion probabilistic models", 2020, equation 4, for a = sqrt(abar), b =
    sqrt(1 - abar); Karras et al., "Elucidating the design space", 2022, for a = 1, b = sigma; rectified flow for
    a = 1 - t, b = t. `q_sample` takes a and b from a schedule.

    Args:
        x0: clean images [B, ...], fp32, bf16 or fp16 (fp64 runs the reference), or uint8, which means 2 x / 255 - 1;
            any strides.
        a, b: fp32 [B], without gradients.
        seed: None (drawn from torch's generator), an int, or an int64 tensor [1] on the device of x0.
        noise: of x0's shape; it replaces the generator.
        row_offset: global index of the first sample, so that ranks and micro-batches draw the noise of their own rows.
        dtype: of the result; None: that of x0, and fp32 for uint8.

    Returns:
        x_t [B, ...].

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: shapes or devices differ, seed and noise are both given, or a coefficient wants a gradient.

    Example:
        >>> x0 = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
        >>> forward_noising(x0, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), seed=0)[0].unique()
        tensor([-1.])
    """
    check_images("x0", x0, dtype)
    _check_coefficient("a", a, x0)
    _check_coefficient("b", b, x0)
    seed, noise = resolve_noise("x0", x0, seed, noise, row_offset)
    return noised(x0, a, b, None, seed, noise, row_offset, dtype)
