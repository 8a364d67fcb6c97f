"""y = scale x + t of a coupling layer, and the log-determinant of its Jacobian, in plain PyTorch.

All conventions come down to y = e (x + u) or e x + u, with e = exp(l), l the log-scale or minus it, and u = t or -t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.reference._math import compute_dtype, log_scale, log_scale_slope, per_sample, rows_like


def forward(
    x: Tensor, params: Tensor, learned: Tensor | None, scale_map: str, factor: float, min_scale: float,
    interleaved: bool, shift_first: bool, shift_inside: bool, reciprocal: bool, checkerboard: int, inverse: bool,
) -> tuple[Tensor, Tensor]:
    """y like x, or like its half that is transformed, and logdet [B] in fp32 (fp64 for fp64). Differentiable.

    `checkerboard` is -1 where x is the half. A `learned` factor, of one element or [C], replaces the number.
    """
    half = own_half(x, checkerboard).to(compute_dtype(x))
    s, t = _wide_halves(params, half, interleaved, shift_first)
    log = log_scale(s, scale_map, _factor(learned, factor, s), min_scale)
    log = -log if reciprocal != inverse else log
    u, scale = -t if inverse else t, torch.exp(log)
    y = scale * (half + u) if shift_inside != inverse else scale * half + u
    return y.to(x.dtype), per_sample(log).sum(1)


def backward(
    x: Tensor, params: Tensor, learned: Tensor | None, scale_map: str, factor: float, min_scale: float,
    interleaved: bool, shift_first: bool, shift_inside: bool, reciprocal: bool, checkerboard: int, inverse: bool,
    grad_y: Tensor | None, grad_logdet: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of params, packed as they are, and of the learned factor: a tensor without elements if none."""
    _, grad_half, *grads = _gradients(
        own_half(x, checkerboard), params, learned, scale_map, factor, min_scale, interleaved, shift_first,
        shift_inside, reciprocal, inverse, grad_y, grad_logdet, False,
    )  # fmt: skip
    return _among_zeros(grad_half, checkerboard), *grads


def backward_from_output(
    y: Tensor, params: Tensor, learned: Tensor | None, scale_map: str, factor: float, min_scale: float,
    interleaved: bool, shift_first: bool, shift_inside: bool, reciprocal: bool, inverse: bool,
    grad_y: Tensor | None, grad_logdet: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x of `forward`'s y, and the gradients of `backward`; of a checkerboard x and its gradient are the half."""
    return _gradients(
        y, params, learned, scale_map, factor, min_scale, interleaved, shift_first, shift_inside, reciprocal, inverse,
        grad_y, grad_logdet, True,
    )  # fmt: skip


def halves(params: Tensor, interleaved: bool, shift_first: bool) -> tuple[Tensor, Tensor]:
    """(s, t): views of params [B, 2C, ...]."""
    channels = params.shape[1] // 2
    if interleaved:
        first, second = params[:, 0::2], params[:, 1::2]
    else:
        first, second = params.narrow(1, 0, channels), params.narrow(1, channels, channels)
    return (second, first) if shift_first else (first, second)


def own_half(x: Tensor, checkerboard: int) -> Tensor:
    """Of an image [B, C, H, W] the pixels at (h + w) % 2 == checkerboard, as [B, C, H, W / 2]."""
    return x if checkerboard < 0 else torch.where(_starts_at_1(x, checkerboard), x[..., 1::2], x[..., 0::2])


def _among_zeros(half: Tensor, checkerboard: int) -> Tensor:
    if checkerboard < 0:
        return half
    odd = _starts_at_1(half, checkerboard)
    return torch.stack([torch.where(odd, 0, half), torch.where(odd, half, 0)], -1).flatten(-2)


def _starts_at_1(x: Tensor, checkerboard: int) -> Tensor:
    return ((torch.arange(x.shape[-2], device=x.device) + checkerboard) % 2 == 1).unsqueeze(1)


def _wide_halves(params: Tensor, half: Tensor, interleaved: bool, shift_first: bool) -> tuple[Tensor, Tensor]:
    s, t = halves(params, interleaved, shift_first)
    return s.to(half.dtype), t.to(half.dtype)


def _factor(learned: Tensor | None, factor: float, s: Tensor) -> Tensor | float:
    """The factor in the dtype of s, shaped to broadcast against it."""
    return factor if learned is None else learned.to(s.dtype).reshape(1, -1, *[1] * (s.dim() - 2))


def _gradients(
    given: Tensor, params: Tensor, learned: Tensor | None, scale_map: str, factor: float, min_scale: float,
    interleaved: bool, shift_first: bool, shift_inside: bool, reciprocal: bool, inverse: bool,
    grad_y: Tensor | None, grad_logdet: Tensor | None, from_output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, gradient of x, of params, of the learned factor), given x or y."""
    wide = given.to(compute_dtype(given))
    s, t = _wide_halves(params, wide, interleaved, shift_first)
    multiplier, flip, inner = _factor(learned, factor, s), reciprocal != inverse, shift_inside != inverse
    log = log_scale(s, scale_map, multiplier, min_scale)
    log = -log if flip else log
    u, scale = -t if inverse else t, torch.exp(log)
    upstream = torch.zeros_like(wide) if grad_y is None else grad_y.to(wide.dtype)
    grad_x = scale * upstream
    if from_output:
        scaled = wide if inner else wide - u
        x, grad_log = torch.exp(-log) * scaled, upstream * scaled
        x = x - u if inner else x
    else:
        x, grad_log = wide, grad_x * (wide + u if inner else wide)
    if grad_logdet is not None:
        grad_log = grad_log + rows_like(grad_logdet.to(wide.dtype), grad_log)
    grad_log = -grad_log if flip else grad_log
    grad_s = grad_log * log_scale_slope(s, scale_map, multiplier, min_scale)
    grad_u = grad_x if inner else upstream
    grads = (grad_s, -grad_u if inverse else grad_u)
    first, second = (grad.to(params.dtype) for grad in (grads[::-1] if shift_first else grads))
    grad_params = torch.stack([first, second], 2).flatten(1, 2) if interleaved else torch.cat([first, second], 1)
    return x.to(given.dtype), grad_x.to(given.dtype), grad_params, _grad_factor(learned, grad_log, s)


def _grad_factor(learned: Tensor | None, grad_log: Tensor, s: Tensor) -> Tensor:
    if learned is None:
        return s.new_zeros(0, dtype=torch.float32)
    by_channel = (grad_log * torch.tanh(s)).transpose(0, 1).flatten(1).sum(1)
    return (by_channel if learned.numel() == s.shape[1] else by_channel.sum()).reshape(learned.shape).to(learned.dtype)
