"""Images as a flow wants them: pixels with noise between them, and the logit of that, with its log-determinant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genfast.functional import _checks
from genfast.functional._register import register

_op = register("dequantize_logit", "dequantize_logit", "forward")
_op_given = register("dequantize_logit_given", "dequantize_logit", "forward_given")
_op_given_backward = register("dequantize_logit_given_backward", "dequantize_logit", "backward_given")
_op_inverse = register("dequantize_logit_inverse", "dequantize_logit", "inverse")

# Beyond it a pixel is so narrow that fp32 can hardly tell its noise.
_MOST = 0.45


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    u, x, ctx.alpha = inputs
    ctx.save_for_backward(u, x)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_logdet: Tensor | None) -> tuple:
    if grad_y is None and grad_logdet is None:
        return None, None, None
    u, x = ctx.saved_tensors
    return _op_given_backward(u, x, ctx.alpha, grad_y, grad_logdet), None, None


_op_given.register_autograd(_backward, setup_context=_setup_context)


def _setup_inverse(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.set_materialize_grads(False)


def _backward_inverse(ctx: Any, grad_logdet: Tensor | None, _: Tensor | None) -> tuple:
    if grad_logdet is None:
        return None, None
    (y,) = ctx.saved_tensors
    # Of log(w (1 - w)) = -y - 2 log(1 + exp(-y)); plain PyTorch, since hardly anyone asks.
    per_sample = grad_logdet.reshape(-1, *[1] * (y.dim() - 1))
    return (-per_sample * torch.tanh(0.5 * y.to(grad_logdet.dtype))).to(y.dtype), None


_op_inverse.register_autograd(_backward_inverse, setup_context=_setup_inverse)


def check_pixels(name: str, x: Tensor) -> None:
    """x is a uint8 tensor [B, ...]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype != torch.uint8:
        raise TypeError(f"{name}: expected uint8 pixels, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"{name}: expected at least 1 dimension(s) [B, ...], got shape []")


def check_alpha(alpha: float) -> float:
    """From 0 to 0.45, as a float."""
    alpha = _checks.non_negative("alpha", alpha)
    if not alpha <= _MOST:
        raise ValueError(f"alpha: expected a number from 0 to {_MOST}, got {alpha}")
    return alpha


def dequantize_logit(
    x: Tensor,
    *,
    seed: int | Tensor | None = None,
    u: Tensor | None = None,
    row_offset: int = 0,
    alpha: float = 0.05,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """y = logit(alpha + (1 - 2 alpha) v) of v = (x + u) / 256, in one pass from uint8 to fp32; or back.

    Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP", ICLR 2017, section 4.1. A density of y plus
    logdet is one of x + u in [0, 256)^D, whose mean over u is at most the log-probability of the pixels x (Theis, van
    den Oord and Bethge, "A note on the evaluation of generative models", ICLR 2016, section 3.1). With uniform noise
    u = (k + 0.5) 2^-15, made in registers, x + u is exact, and the inverse gives x again: for every k up to
    alpha = 0.1, and beyond for all but the outermost 2^-12 of a pixel.

    Args:
        x: uint8 [B, ...] in any strides. With `inverse`: y, fp32, bf16 or fp16 (fp64 runs the reference).
        seed: None (drawn from torch's generator), an int, or an int64 tensor [1] on the device of x.
        u: noise in (0, 1) of x's shape that replaces the generator; it receives a gradient, as variational
            dequantization asks. fp32, bf16 or fp16 (fp64 runs the reference).
        row_offset: global index of the first sample, so that ranks and micro-batches draw the noise of their own rows.
        alpha: from 0 to 0.45; how far the logit stays from its infinite ends.
        inverse: from y to pixels; seed, u and row_offset are without meaning then.

    Returns:
        y, fp32 of x's shape (fp64 for an fp64 u), and logdet, fp32 [B] in nats, that of x + u to y:
        sum(log(1 - 2 alpha) - log 256 - log w - log(1 - w)) over each sample, w = alpha + (1 - 2 alpha) v.
        With `inverse`: x, uint8, the pixel whose bin y lies in (0 or 255 beyond all bins, also of an infinite y; 0 of
        a NaN), and logdet, that of y to x + u, which is NaN or -inf where y is not finite.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: shapes or devices differ, seed and u are both given, or alpha is out of its range.

    A second derivative is not implemented and says so.

    Example:
        >>> x = torch.tensor([[0, 127, 255]], dtype=torch.uint8)
        >>> y, logdet = dequantize_logit(x, seed=0)
        >>> y.dtype, logdet.shape
        (torch.float32, torch.Size([1]))
        >>> dequantize_logit(y, inverse=True)[0]
        tensor([[  0, 127, 255]], dtype=torch.uint8)
    """
    alpha = check_alpha(alpha)
    if inverse:
        for name, value in (("seed", seed), ("u", u)):
            if value is not None:
                raise ValueError(f"{name}: expected None with inverse=True, which draws no noise")
        _checks.floating("x", x)
        logdet, pixels = _op_inverse(x, alpha)
        return pixels, logdet
    check_pixels("x", x)
    seed, u = _checks.noise_source("u", u, seed, "x", x, row_offset)
    if u is None:
        return _op(x, seed, row_offset, alpha)
    return _op_given(u, x, alpha)
