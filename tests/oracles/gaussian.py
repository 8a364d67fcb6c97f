"""Truth for the Gaussian ops from torch.distributions in fp64; only the noise is genfast's own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from genfast.cases import SEED, Case, Inputs, Outputs
from genfast.random import Stream, normal


def _posterior(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    mu, logvar = inputs["h"].tensor_split(2, 1) if "h" in inputs else (inputs["mu"], inputs["logvar"])
    if case.setting == "clamp":
        lo, hi = -1.0, 1.25
        inside = (logvar >= lo) & (logvar <= hi)
        logvar = torch.where(inside, logvar, logvar.detach().clip(lo, hi))
    return mu, logvar


def reparameterize_kl(case: Case, inputs: Inputs) -> Outputs:
    mu, logvar = _posterior(case, inputs)
    eps = inputs["eps"] if case.setting == "eps" else normal(SEED, *mu.shape, Stream.LATENT).double()
    kl = kl_divergence(Normal(mu, logvar.exp().sqrt()), Normal(torch.zeros_like(mu), torch.ones_like(mu)))
    if case.setting == "free_bits":
        kl = torch.where(kl > 0.25, kl, torch.full_like(kl, 0.25))
    return mu + logvar.exp().sqrt() * eps, kl.sum(-1)


def kl_normal(case: Case, inputs: Inputs) -> Outputs:
    q = Normal(inputs["mu_q"], inputs["logvar_q"].exp().sqrt())
    p = Normal(inputs["mu_p"], inputs["logvar_p"].exp().sqrt())
    return (kl_divergence(q, p).sum(-1),)
