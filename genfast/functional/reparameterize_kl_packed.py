"""`reparameterize_kl` on the packed output of an encoder, h = [mu | logvar]: no chunk, no cat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from genfast.functional import _checks
from genfast.functional._register import register
from genfast.functional.reparameterize_kl import grad_eps, resolve_noise

_op = register("reparameterize_kl_packed", "reparameterize_kl_packed", "forward")
_op_backward = register("reparameterize_kl_packed_backward", "reparameterize_kl_packed", "backward")


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    h, seed, eps, ctx.row_offset, ctx.free_bits, ctx.clamp = inputs
    ctx.save_for_backward(h, seed, eps)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> tuple:
    if grad_z is None and grad_kl is None:
        return (None,) * 6
    h, seed, eps = ctx.saved_tensors
    grad_h = _op_backward(h, seed, eps, ctx.row_offset, ctx.free_bits, ctx.clamp, grad_z, grad_kl)
    logvar = h.narrow(1, h.shape[1] // 2, h.shape[1] // 2)
    return grad_h, None, grad_eps(ctx.needs_input_grad[2], logvar, ctx.clamp, grad_z), None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def reparameterize_kl_packed(
    h: Tensor,
    *,
    seed: int | Tensor | None = None,
    eps: Tensor | None = None,
    row_offset: int = 0,
    free_bits: float = 0.0,
    clamp: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """`reparameterize_kl` on h = [mu | logvar] along dimension 1, read in place; its gradient comes back packed.

    Args:
        h: [B, 2 L, ...], fp32, bf16 or fp16 (fp64 runs the reference); any strides, channels_last included.
        seed, eps, row_offset, free_bits, clamp: as for `reparameterize_kl`; eps has the shape [B, L, ...].

    Returns:
        z, [B, L, ...] of h's dtype, and kl, fp32 [B] in nats.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: dimension 1 of h is odd, seed and eps are both given, or a number is out of its range.

    Example:
        >>> import torch
        >>> moments = torch.zeros(2, 8, 32, 32)
        >>> z, kl = reparameterize_kl_packed(moments, seed=0, clamp=(-30.0, 20.0))
        >>> z.shape, kl
        (torch.Size([2, 4, 32, 32]), tensor([0., 0.]))
    """
    _checks.floating("h", h, dims=2)
    if h.shape[1] % 2:
        raise ValueError(f"h: expected an even dimension 1, [mu | logvar], got shape {list(h.shape)}")
    free_bits = _checks.non_negative("free_bits", free_bits)
    clamp = _checks.interval("clamp", clamp)
    seed, eps = resolve_noise(h.narrow(1, 0, h.shape[1] // 2), seed, eps, row_offset)
    return _op(h, seed, eps, row_offset, free_bits, clamp)
