"""The reparameterized sample of a Gaussian posterior and its KL divergence from N(0, I), in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genfast.functional import _checks
from genfast.functional._register import register

_op = register("reparameterize_kl", "reparameterize_kl", "forward")
_op_backward = register("reparameterize_kl_backward", "reparameterize_kl", "backward")


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    mu, logvar, seed, eps, ctx.row_offset, ctx.free_bits, ctx.clamp = inputs
    ctx.save_for_backward(mu, logvar, seed, eps)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> tuple:
    if grad_z is None and grad_kl is None:
        return (None,) * 7
    mu, logvar, seed, eps = ctx.saved_tensors
    grad_mu, grad_logvar = _op_backward(
        mu, logvar, seed, eps, ctx.row_offset, ctx.free_bits, ctx.clamp, grad_z, grad_kl
    )
    return grad_mu, grad_logvar, None, grad_eps(ctx.needs_input_grad[3], logvar, ctx.clamp, grad_z), None, None, None


def grad_eps(wanted: bool, logvar: Tensor, clamp: list[float] | None, grad_z: Tensor | None) -> Tensor | None:
    """The gradient of a noise that was given: rarely asked for, so plain PyTorch."""
    if not wanted or grad_z is None:
        return None
    return grad_z * torch.exp(0.5 * (logvar if clamp is None else logvar.clamp(*clamp)))


_op.register_autograd(_backward, setup_context=_setup_context)


def resolve_noise(
    latent: Tensor, seed: int | Tensor | None, eps: Tensor | None, row_offset: int
) -> tuple[Tensor | None, Tensor | None]:
    """(seed, eps) for the op, exactly one of them not None."""
    return _checks.noise_source("eps", eps, seed, "the latent", latent, row_offset)


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    seed: int | Tensor | None = None,
    eps: Tensor | None = None,
    row_offset: int = 0,
    free_bits: float = 0.0,
    clamp: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample z = mu + exp(logvar / 2) eps and compute KL(N(mu, exp(logvar)) || N(0, I)) in one pass.

    Kingma and Welling, "Auto-Encoding Variational Bayes", 2013, equation 10 and appendix B. The noise is made in
    registers from the seed, and made again in backward: it never exists in memory. The KL does not cancel near the
    prior, where the textbook ``-0.5 * (1 + logvar - mu^2 - exp(logvar))`` loses all its digits.

    Args:
        mu, logvar: [B, ...], fp32, bf16 or fp16 (fp64 runs the reference); any strides.
        seed: None (drawn from torch's generator), an int, or an int64 tensor [1] on the device of mu.
        eps: noise of mu's shape that replaces the generator.
        row_offset: global index of the first sample, so that ranks and micro-batches draw the noise of their own rows.
        free_bits: least KL of each latent dimension in nats (Kingma et al., "Improved Variational Inference with
            Inverse Autoregressive Flow", 2016, section 5.1); no gradient below it.
        clamp: (lo, hi) that logvar is clamped to; no gradient outside.

    Returns:
        z, of mu's shape and dtype, and kl, fp32 [B] in nats, summed over the latent.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: shapes or devices differ, seed and eps are both given, or a number is out of its range.

    A second derivative is not implemented and says so.

    Example:
        >>> mu, logvar = torch.zeros(8, 20), torch.zeros(8, 20)
        >>> z, kl = reparameterize_kl(mu, logvar, seed=0)
        >>> z.shape, kl.sum()
        (torch.Size([8, 20]), tensor(0.))
    """
    _checks.floating("mu", mu)
    _checks.floating("logvar", logvar)
    _checks.same_shape("logvar", logvar, "mu", mu)
    free_bits = _checks.non_negative("free_bits", free_bits)
    clamp = _checks.interval("clamp", clamp)
    seed, eps = resolve_noise(mu, seed, eps, row_offset)
    mu, logvar = _checks.promoted(mu, logvar)
    return _op(mu, logvar, seed, eps, row_offset, free_bits, clamp)
