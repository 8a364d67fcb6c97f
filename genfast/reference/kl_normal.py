"""KL(N(mu_q, e^logvar_q) || N(mu_p, e^logvar_p)) of diagonal Gaussians in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.reference._math import compute_dtype, expm1_minus, per_sample, rows_like


def _terms(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mu_q - mu_p) / std_p, 1 / std_p, and logvar_q - logvar_p."""
    mu_q, logvar_q, mu_p, logvar_p = (x.to(compute_dtype(x)) for x in (mu_q, logvar_q, mu_p, logvar_p))
    inverse_std = torch.exp(-0.5 * logvar_p)
    gap = mu_q - mu_p
    # Equal means stay equal however narrow the prior: 0 * inf would be NaN.
    return torch.where(gap == 0.0, 0.0, gap * inverse_std), inverse_std, logvar_q - logvar_p


def forward(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Tensor:
    """kl [B] in fp32 (fp64 for fp64): 0.5 ((gap / std_p)^2 + e^d - 1 - d), d = logvar_q - logvar_p. Differentiable."""
    scaled, _, d = _terms(mu_q, logvar_q, mu_p, logvar_p)
    return per_sample(0.5 * (scaled * scaled + expm1_minus(d))).sum(1)


def backward(
    mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor, grad_kl: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four inputs, in their order."""
    scaled, inverse_std, d = _terms(mu_q, logvar_q, mu_p, logvar_p)
    g = rows_like(grad_kl.to(d.dtype), d)
    to_mu = g * torch.where(scaled == 0.0, 0.0, scaled * inverse_std)
    to_logvar = 0.5 * g * torch.expm1(d)
    grads = (to_mu, to_logvar, -to_mu, -to_logvar - 0.5 * g * scaled * scaled)
    return tuple(grad.to(mu_q.dtype) for grad in grads)
