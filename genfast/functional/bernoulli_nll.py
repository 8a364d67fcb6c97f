"""Negative log-likelihood of pixels under independent Bernoullis given by logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genfast.functional import _checks
from genfast.functional._register import register
from genfast.functional._stored import may_store, reduced, register_stored_gradient

_op = register("bernoulli_nll", "bernoulli_nll", "forward")
_op_backward = register("bernoulli_nll_backward", "bernoulli_nll", "backward")
_op_with_grad = register("bernoulli_nll_with_grad", "bernoulli_nll", "forward_with_grad")


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_nll: Tensor) -> tuple:
    logits, x = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[1]:
        per_sample = grad_nll.reshape(-1, *[1] * (logits.dim() - 1))
        grad_x = (-logits.to(grad_nll.dtype) * per_sample).to(x.dtype)
    return (_op_backward(logits, x, grad_nll) if ctx.needs_input_grad[0] else None), grad_x


_op.register_autograd(_backward, setup_context=_setup_context)


register_stored_gradient(_op_with_grad, _op_backward)


def bernoulli_nll(logits: Tensor, x: Tensor, *, reduction: str = "none") -> Tensor:
    """-log p(x | logits) of independent Bernoullis, summed over each sample: binary cross-entropy with logits.

    For grey pixels this is the cross-entropy that VAE scripts minimise, not a likelihood; for binary x it is one.
    Neither the loss nor its gradient cancels where the logits are confident and right.

    Args:
        logits: [B, ...], fp32, bf16 or fp16 (fp64 runs the reference); any strides.
        x: the same shape; floats in [0, 1], bool, or uint8, which means x / 255.
        reduction: "none" gives [B]; "mean" and "sum", over the batch, give a scalar and, where logits need a gradient,
            write it in the same pass (backward then moves nothing when the incoming gradient is 1).

    Returns:
        fp32 [B] or scalar, in nats.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: shapes or devices differ, or the reduction is unknown.

    A second derivative is not implemented and says so.

    Example:
        >>> bernoulli_nll(torch.zeros(2, 4), torch.ones(2, 4))
        tensor([2.7726, 2.7726])
    """
    _checks.floating("logits", logits)
    _checks.same_shape("x", x, "logits", logits)
    if x.dtype not in (*_checks.FLOATS, torch.uint8, torch.bool):
        raise TypeError(f"x: expected a float, bool or uint8 tensor, got {x.dtype}")
    _checks.choice("reduction", reduction, ("none", "mean", "sum"))
    if x.dtype == torch.bool:
        x = x.to(logits.dtype)
    if reduction != "none" and may_store(logits, x):
        return _op_with_grad(logits, x, reduction == "mean")[0]
    return reduced(_op(logits, x), reduction)
