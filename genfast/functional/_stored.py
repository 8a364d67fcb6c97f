"""The backward of a scalar loss whose gradient was written in the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genfast.functional._register import Op, is_traced, register

_op_rescale = register("loss_rescale", "_rescale", "rescale", mutates=("x",))


def register_stored_gradient(with_grad: Op, backward: Op) -> None:
    """Give a backward to ``with_grad(pred, *more, mean) -> (loss, gradient of pred)``.

    ``backward(pred, *more, grad [B])`` computes the gradient for each sample's own incoming gradient.
    """

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        # Where the tensors were among the arguments, and the arguments that are none.
        ctx.others = tuple(None if isinstance(value, Tensor) else (value,) for value in inputs)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        # Detached, or this node would hold its own output, and only the cyclic collector would free it.
        ctx.stored = output[1].detach()

    def backward_of(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple:
        nothing = (None,) * (len(ctx.others) - 1)
        if grad_loss is None:
            return None, *nothing
        tensors = iter(ctx.saved_tensors)
        *inputs, mean = (next(tensors) if other is None else other[0] for other in ctx.others)
        batch = inputs[0].shape[0]
        if torch.is_grad_enabled():
            # A graph of the gradient is wanted: let it end in an op which says that it has no derivative.
            per_sample = grad_loss / batch if mean else grad_loss
            return backward(*inputs, per_sample.expand(batch)), *nothing
        stored = ctx.stored
        if stored is not None and not is_traced(grad_loss):
            ctx.stored = None
            _op_rescale(stored, grad_loss)
            return stored, *nothing
        if stored is None:
            # The buffer went out with the first backward and may by now be somebody's .grad: compute it afresh.
            stored = with_grad(*inputs, mean)[1]
        return (stored * grad_loss).to(stored.dtype), *nothing

    with_grad.register_autograd(backward_of, setup_context=setup_context)


def may_store(pred: Tensor, *targets: Tensor | None) -> bool:
    """Whether the gradient of a scalar loss is to be written in the forward pass."""
    wanted = torch.is_grad_enabled() and pred.requires_grad and pred.shape[0] > 0
    # In fp16 a gradient divided by the batch size, and not yet times the loss scale, would underflow.
    return wanted and pred.dtype != torch.float16 and not any(x is not None and x.requires_grad for x in targets)


def reduced(per_sample: Tensor, reduction: str) -> Tensor:
    """Over the batch: "none", "sum" or "mean"."""
    if reduction == "none":
        return per_sample
    return per_sample.sum() if reduction == "sum" else per_sample.mean()
