"""z = mu + exp(logvar / 2) eps and KL(N(mu, e^logvar) || N(0, I)) in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genfast import random
from genfast.reference._math import compute_dtype, expm1_minus, per_sample, rows_like


def noise(like: Tensor, seed: Tensor | None, eps: Tensor | None, row_offset: int) -> Tensor:
    """eps as given, or the latent noise of the seed, shaped like the latent."""
    if eps is not None:
        return eps.to(compute_dtype(like))
    rows = random.normal(seed, like.shape[0], math.prod(like.shape[1:]), random.Stream.LATENT, row_offset)
    return rows.reshape(like.shape).to(compute_dtype(like))


def clamped(logvar: Tensor, clamp: list[float] | None) -> Tensor:
    """logvar in the dtype of the computation, within [lo, hi]; a NaN stays one."""
    logvar = logvar.to(compute_dtype(logvar))
    if clamp is None:
        return logvar
    lo, hi = clamp
    # Not torch.clamp: whether a value on the bound passes its gradient depends on torch's version.
    return torch.where(logvar < lo, lo, torch.where(logvar > hi, hi, logvar))


def kl_per_dimension(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL of each latent dimension in nats: 0.5 (mu^2 + e^logvar - 1 - logvar)."""
    return 0.5 * (mu * mu + expm1_minus(logvar))


def forward(
    mu: Tensor, logvar: Tensor, seed: Tensor | None, eps: Tensor | None,
    row_offset: int = 0, free_bits: float = 0.0, clamp: list[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """z like mu, and kl [B] in fp32 (fp64 for fp64). Differentiable."""
    logvar = clamped(logvar, clamp)
    wide = mu.to(compute_dtype(mu))
    z = wide + torch.exp(0.5 * logvar) * noise(mu, seed, eps, row_offset)
    kl = kl_per_dimension(wide, logvar)
    if free_bits > 0.0:
        kl = torch.where(kl < free_bits, free_bits, kl)
    return z.to(mu.dtype), per_sample(kl).sum(1)


def backward(
    mu: Tensor, logvar: Tensor, seed: Tensor | None, eps: Tensor | None,
    row_offset: int, free_bits: float, clamp: list[float] | None, grad_z: Tensor | None, grad_kl: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of mu and logvar, the noise drawn again from the seed."""
    dtype, wide, lv = mu.dtype, mu.to(compute_dtype(mu)), clamped(logvar, clamp)
    to_mu, to_logvar = torch.zeros_like(wide), torch.zeros_like(wide)
    if grad_kl is not None:
        g = rows_like(grad_kl.to(wide.dtype), wide)
        if free_bits > 0.0:
            g = torch.where(kl_per_dimension(wide, lv) < free_bits, 0.0, g)
        to_mu = to_mu + g * wide
        to_logvar = to_logvar + 0.5 * g * torch.expm1(lv)
    if grad_z is not None:
        upstream = grad_z.to(wide.dtype)
        to_mu = to_mu + upstream
        to_logvar = to_logvar + 0.5 * upstream * torch.exp(0.5 * lv) * noise(mu, seed, eps, row_offset)
    if clamp is not None:
        raw = logvar.to(lv.dtype)
        to_logvar = torch.where((raw < clamp[0]) | (raw > clamp[1]), 0.0, to_logvar)
    return to_mu.to(dtype), to_logvar.to(dtype)
