"""Binary cross-entropy with logits, summed over each sample, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.reference._math import compute_dtype, per_sample, rows_like


def _parts(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A logit's sign (1 or -1), its size |l|, e^-|l|, and how far x is from what the sign says: nothing cancels."""
    logits = logits.to(compute_dtype(logits))
    x = x.to(logits.dtype) / 255 if x.dtype == torch.uint8 else x.to(logits.dtype)
    # Multiplied, since torch.where branches at each element on a CPU; and not abs(), whose derivative at 0 is 0.
    positive = (logits >= 0).to(logits.dtype)
    sign = 2 * positive - 1
    size = sign * logits
    return sign, size, torch.exp(-size), positive - sign * x


def _nll(size: Tensor, t: Tensor, miss: Tensor) -> Tensor:
    return per_sample(torch.log1p(t) + size * miss).sum(1)


def _gradient(sign: Tensor, t: Tensor, miss: Tensor) -> Tensor:
    return sign * (miss - t / (1 + t))


def forward(logits: Tensor, x: Tensor) -> Tensor:
    """nll [B] in nats, fp32 (fp64 for fp64): log(1 + e^-|l|) + |l| (1 - x if l >= 0 else x). Differentiable."""
    _, size, t, miss = _parts(logits, x)
    return _nll(size, t, miss)


def backward(logits: Tensor, x: Tensor, grad_nll: Tensor) -> Tensor:
    """The gradient of the logits: sigmoid(l) - x, without cancellation."""
    sign, _, t, miss = _parts(logits, x)
    return (rows_like(grad_nll.to(t.dtype), t) * _gradient(sign, t, miss)).to(logits.dtype)


def forward_with_grad(logits: Tensor, x: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """The sum over the whole batch, or its mean over the samples, and its gradient."""
    sign, size, t, miss = _parts(logits, x)
    total, gradient = _nll(size, t, miss).sum(), _gradient(sign, t, miss)
    if mean:
        total, gradient = total / logits.shape[0], gradient / logits.shape[0]
    return total, gradient.to(logits.dtype)
