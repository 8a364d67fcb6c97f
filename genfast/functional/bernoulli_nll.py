"""Negative log-likelihood of pixels under independent Bernoullis given by logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genfast.functional import _checks
from genfast.functional._register import is_traced, register

_op = register("bernoulli_nll", "bernoulli_nll", "forward")
_op_backward = register("bernoulli_nll_backward", "bernoulli_nll", "backward")
_op_with_grad = register("bernoulli_nll_with_grad", "bernoulli_nll", "forward_with_grad")
_op_rescale = register("bernoulli_nll_rescale", "bernoulli_nll", "rescale", mutates=("x",))


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


def _setup_context_with_grad(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, x, ctx.mean = inputs
    ctx.save_for_backward(logits, x)
    ctx.set_materialize_grads(False)
    # Detached, or this node would hold its own output, and only the cyclic collector would free it.
    ctx.stored = output[1].detach()


def _backward_with_grad(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple:
    if grad_loss is None:
        return None, None, None
    logits, x = ctx.saved_tensors
    if torch.is_grad_enabled():
        # A graph of the gradient is wanted: let it end in an op which says that it has no derivative.
        per_sample = grad_loss / logits.shape[0] if ctx.mean else grad_loss
        return _op_backward(logits, x, per_sample.expand(logits.shape[0])), None, None
    stored = ctx.stored
    if stored is not None and not is_traced(grad_loss):
        ctx.stored = None
        _op_rescale(stored, grad_loss)
        return stored, None, None
    if stored is None:
        # The buffer went out with the first backward and may by now be somebody's .grad: compute it afresh.
        stored = _op_with_grad(logits, x, ctx.mean)[1]
    return (stored * grad_loss).to(stored.dtype), None, None


_op_with_grad.register_autograd(_backward_with_grad, setup_context=_setup_context_with_grad)


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
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'reduction: expected "none", "mean" or "sum", got {reduction!r}')
    if x.dtype == torch.bool:
        x = x.to(logits.dtype)
    if reduction == "none":
        return _op(logits, x)
    wanted = torch.is_grad_enabled() and logits.requires_grad and not x.requires_grad and logits.shape[0] > 0
    # In fp16 a gradient divided by the batch size, and not yet times the loss scale, would underflow.
    if wanted and logits.dtype != torch.float16:
        return _op_with_grad(logits, x, reduction == "mean")[0]
    nll = _op(logits, x)
    return nll.sum() if reduction == "sum" else nll.mean()
