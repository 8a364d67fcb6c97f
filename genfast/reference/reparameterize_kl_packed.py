"""`genfast.reference.reparameterize_kl` on h = [mu | logvar] along dimension 1, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.reference import reparameterize_kl


def forward(
    h: Tensor, seed: Tensor | None, eps: Tensor | None,
    row_offset: int = 0, free_bits: float = 0.0, clamp: list[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """z like half of h, and kl [B] in fp32 (fp64 for fp64). Differentiable."""
    mu, logvar = h.chunk(2, 1)
    return reparameterize_kl.forward(mu, logvar, seed, eps, row_offset, free_bits, clamp)


def backward(
    h: Tensor, seed: Tensor | None, eps: Tensor | None, row_offset: int, free_bits: float, clamp: list[float] | None,
    grad_z: Tensor | None, grad_kl: Tensor | None,
) -> Tensor:
    """The gradient of h, packed as h is."""
    mu, logvar = h.chunk(2, 1)
    grads = reparameterize_kl.backward(mu, logvar, seed, eps, row_offset, free_bits, clamp, grad_z, grad_kl)
    return torch.cat(grads, 1)
