"""Binary cross-entropy with logits, summed over each sample, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.reference._math import compute_dtype, per_sample, rows_like


def _sides(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether a logit is positive, its size, and how far x is from what its sign says: no term of the loss cancels."""
    logits = logits.to(compute_dtype(logits))
    x = x.to(logits.dtype) / 255 if x.dtype == torch.uint8 else x.to(logits.dtype)
    positive = logits >= 0
    return positive, torch.where(positive, logits, -logits), torch.where(positive, 1 - x, x)


def forward(logits: Tensor, x: Tensor) -> Tensor:
    """nll [B] in nats, fp32 (fp64 for fp64): log(1 + e^-|l|) + |l| (1 - x if l >= 0 else x). Differentiable."""
    _, size, miss = _sides(logits, x)
    return per_sample(torch.log1p(torch.exp(-size)) + size * miss).sum(1)


def backward(logits: Tensor, x: Tensor, grad_nll: Tensor) -> Tensor:
    """The gradient of the logits: sigmoid(l) - x, without cancellation."""
    positive, size, miss = _sides(logits, x)
    gap = miss - torch.sigmoid(-size)
    return (rows_like(grad_nll.to(gap.dtype), gap) * torch.where(positive, gap, -gap)).to(logits.dtype)


def forward_with_grad(logits: Tensor, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """scale times the sum over the whole batch, and its gradient."""
    nll = forward(logits, x)
    return nll.sum() * scale, backward(logits, x, torch.full_like(nll, scale))


def rescale(x: Tensor, factor: Tensor) -> None:
    """x *= factor in place."""
    x.mul_(factor.to(x.dtype) if x.dtype == torch.float64 else factor)
