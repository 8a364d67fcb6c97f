"""`genfast.kernels.reparameterize_kl` on h = [mu | logvar] along dimension 1, read in place, its gradient packed."""

from __future__ import annotations

from torch import Tensor

from genfast.kernels import reparameterize_kl


def forward(
    h: Tensor, seed: Tensor | None, eps: Tensor | None, row_offset: int, free_bits: float, clamp: list[float] | None
) -> tuple[Tensor, Tensor]:
    """z like half of h, and kl fp32 [B]."""
    mu, logvar = h.chunk(2, 1)
    return reparameterize_kl.forward(mu, logvar, seed, eps, row_offset, free_bits, clamp)


def backward(
    h: Tensor, seed: Tensor | None, eps: Tensor | None, row_offset: int, free_bits: float, clamp: list[float] | None,
    grad_z: Tensor | None, grad_kl: Tensor | None,
) -> Tensor:
    """The gradient of h, packed as h is."""
    mu, logvar = h.chunk(2, 1)
    (grad_h,) = reparameterize_kl.backward(
        mu, logvar, seed, eps, row_offset, free_bits, clamp, grad_z, grad_kl, packed=True
    )
    return grad_h
