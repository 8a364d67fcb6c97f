"""KL divergence between two diagonal Gaussians, per sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genfast.functional import _checks
from genfast.functional._register import register

_op = register("kl_normal", "kl_normal", "forward")
_op_backward = register("kl_normal_backward", "kl_normal", "backward")


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_kl: Tensor) -> tuple:
    return _op_backward(*ctx.saved_tensors, grad_kl)


_op.register_autograd(_backward, setup_context=_setup_context)


def kl_normal(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Tensor:
    """KL(N(mu_q, exp(logvar_q)) || N(mu_p, exp(logvar_p))) of diagonal Gaussians, summed over each sample.

    ``0.5 * sum((mu_q - mu_p)^2 / exp(logvar_p) + exp(d) - 1 - d)`` with ``d = logvar_q - logvar_p``; it does not
    cancel where the two are close, and needs no division.

    Args:
        mu_q, logvar_q, mu_p, logvar_p: broadcastable to one shape [B, ...], fp32, bf16 or fp16 (fp64 runs the
            reference); any strides. A prior that is broadcast over the batch is read in place.

    Returns:
        fp32 [B] in nats.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: the shapes do not broadcast, or the devices differ.

    A second derivative is not implemented and says so.

    Example:
        >>> zero = torch.zeros(3, 4)
        >>> kl_normal(zero + 1, zero, zero, zero)
        tensor([2., 2., 2.])
    """
    named = {"mu_q": mu_q, "logvar_q": logvar_q, "mu_p": mu_p, "logvar_p": logvar_p}
    for name, x in named.items():
        _checks.floating(name, x, dims=0)
        if x.device != mu_q.device:
            raise ValueError(f"{name}: expected the device of mu_q, {mu_q.device}, got {x.device}")
    try:
        shape = torch.broadcast_shapes(*(x.shape for x in named.values()))
    except RuntimeError:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in named.items())
        raise ValueError(f"mu_q, logvar_q, mu_p, logvar_p: expected shapes that broadcast, got {shapes}") from None
    if len(shape) == 0:
        raise ValueError("mu_q: expected at least 1 dimension(s) [B, ...], got shape []")
    return _op(*(x.expand(shape) for x in _checks.promoted(*named.values())))
