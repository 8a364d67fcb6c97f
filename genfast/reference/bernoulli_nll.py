"""Binary cross-entropy with logits, summed over each sample, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.reference._math import compute_dtype, per_sample, rows_like


def _parts(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whether a logit is positive, its size |l|, e^-|l|, and how far x is from what the sign says: nothing cancels."""
    logits = logits.to(compute_dtype(logits))
    x = x.to(logits.dtype) / 255 if x.dtype == torch.uint8 else x.to(logits.dtype)
    positive = logits >= 0
    # Not abs(): its derivative at 0 is 0.
    size = torch.where(positive, logits, -logits)
    return positive, size, torch.exp(-size), torch.where(positive, 1 - x, x)


def _nll(size: Tensor, t: Tensor, miss: Tensor) -> Tensor:
    return per_sample(torch.log1p(t) + size * miss).sum(1)


def _gradient(positive: Tensor, t: Tensor, miss: Tensor) -> Tensor:
    gap = miss - t / (1 + t)
    return torch.where(positive, gap, -gap)


def forward(logits: Tensor, x: Tensor) -> Tensor:
    """nll [B] in nats, fp32 (fp64 for fp64): log(1 + e^-|l|) + |l| (1 - x if l >= 0 else x). Differentiable."""
    _, size, t, miss = _parts(logits, x)
    return _nll(size, t, miss)


def backward(logits: Tensor, x: Tensor, grad_nll: Tensor) -> Tensor:
    """The gradient of the logits: sigmoid(l) - x, without cancellation."""
    positive, _, t, miss = _parts(logits, x)
    return (rows_like(grad_nll.to(t.dtype), t) * _gradient(positive, t, miss)).to(logits.dtype)


def forward_with_grad(logits: Tensor, x: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """The sum over the whole batch, or its mean over the samples, and its gradient."""
    positive, size, t, miss = _parts(logits, x)
    total, gradient = _nll(size, t, miss).sum(), _gradient(positive, t, miss)
    if mean:
        total, gradient = total / logits.shape[0], gradient / logits.shape[0]
    return total, gradient.to(logits.dtype)
