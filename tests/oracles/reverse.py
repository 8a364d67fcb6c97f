"""Truth for a reverse step in fp64, as the papers write it: DDPM by its betas, DDIM by equation 12, and the ancestral
step over sigma = b / a of "Elucidating the design space", which every other schedule is brought to."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Normal

from genfast.cases import SEED, Case, Inputs, Outputs
from genfast.random import Stream, normal

ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def ddpm(x_t: Tensor, x0: Tensor, abar_t: Tensor, abar_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equation 7 of Ho et al. 2020 for the steps between s and t taken as one: mean, variance, and beta."""
    alpha = abar_t / abar_s
    beta = 1 - alpha
    mean = (abar_s.sqrt() * beta * x0 + alpha.sqrt() * (1 - abar_s) * x_t) / (1 - abar_t)
    return mean, (1 - abar_s) / (1 - abar_t) * beta, beta


def ddim(x0: Tensor, eps: Tensor, abar_t: Tensor, abar_s: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Equation 12 of Song et al. 2021, sigma from equation 16: mean and sigma."""
    sigma = eta * ((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)).sqrt()
    return abar_s.sqrt() * x0 + (1 - abar_s - sigma**2).sqrt() * eps, sigma


def ancestral(
    x_t: Tensor, x0: Tensor, at: tuple[Tensor, Tensor], to: tuple[Tensor, Tensor], eta: float
) -> tuple[Tensor, Tensor]:
    """Divide by a, go down to sigma_down, add sigma_up, multiply by a again: mean and sigma."""
    (a, b), (a_s, b_s) = at, to
    level, lower = b / a, b_s / a_s
    up = eta * lower / level * (level**2 - lower**2).sqrt()
    down = (lower**2 - up**2).sqrt()
    return a_s * (x0 + down / level * (x_t / a - x0)), a_s * up


def reverse_step(case: Case, inputs: Inputs) -> Outputs:
    x_t, pred, t, t_prev = (inputs[name] for name in ("x_t", "pred", "t", "t_prev"))
    v = None
    if case.setting in ("learned", "log_prob"):
        pred, v = pred.tensor_split(2, 1)
    if case.setting == "log_prob":
        # Karras et al. 2022, equation 7, with sigma_data = 0.5; times are fp32.
        level, lower = (time.float().double()[:, None] for time in (t, t_prev))
        total = level**2 + 0.25
        x0 = 0.25 / total * x_t + level * 0.5 / total.sqrt() * pred
        one = torch.ones_like(level)
        mean, sigma = ancestral(x_t, x0, (one, level), (one, lower), 1.0)
        sigma = sigma / lower * torch.lerp(lower.log(), level.log(), (v + 1) / 2).exp()
        return (Normal(mean, sigma).log_prob(inputs["x_prev"]).sum(-1),)
    if case.setting == "flow-noise":
        t, t_prev = (time.float().double()[:, None] for time in (t, t_prev))
        # On a straight line x0 = x_t - t velocity.
        mean, sigma = ancestral(x_t, x_t - t * pred, (1 - t, t), (1 - t_prev, t_prev), 0.5)
        # fixed_large: sigma over b_s, times b.
        return (mean + sigma / t_prev * t * inputs["eps"],)
    abar_t, abar_s = ALPHA_BAR[t][:, None], ALPHA_BAR[t_prev][:, None]
    if case.setting == "ddim":
        # Salimans and Ho 2022: x0 and eps from v.
        x0 = abar_t.sqrt() * x_t - (1 - abar_t).sqrt() * pred
        return ddim(x0, (1 - abar_t).sqrt() * x_t + abar_t.sqrt() * pred, abar_t, abar_s, 0.0)[:1]
    if case.setting == "clip":
        inside = pred.abs() <= 1
        x0 = torch.where(inside, pred, pred.detach().clip(-1, 1))
    else:
        x0 = (x_t - (1 - abar_t).sqrt() * pred) / abar_t.sqrt()
    mean, variance, beta = ddpm(x_t, x0, abar_t, abar_s)
    log_variance = variance.log() if v is None else torch.lerp(variance.log(), beta.log(), (v + 1) / 2)
    eps = normal(SEED, x_t.shape[0], math.prod(x_t.shape[1:]), Stream.REVERSE_STEP, salt=t).reshape(x_t.shape)
    return (mean + torch.exp(0.5 * log_variance) * eps,)


def any_step(
    x_t: Tensor, pred: Tensor, at: tuple[Tensor, Tensor], to: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor],
    eta: float, clip: float | None, recompute_eps: bool, variance: str,
) -> tuple[Tensor, Tensor]:
    """Mean and sigma with all that an option does; (p, q) = target, and coefficients [B, 1] in fp64."""
    v = None
    if variance == "learned_range":
        pred, v = pred.tensor_split(2, 1)
    # x_t = a x0 + b eps and pred = p x0 + q eps, solved for x0 and eps.
    system = torch.stack([torch.cat(at, 1), torch.cat(target, 1)], 1)
    x0, eps = torch.linalg.solve(system, torch.stack([x_t, pred], 1)).unbind(1)
    (a, b), (a_s, b_s) = at, to
    if clip is not None:
        inside = x0.abs() <= clip
        x0 = torch.where(inside, x0, x0.detach().clip(-clip, clip))
        eps = (x_t - a * x0) / b if recompute_eps else eps
    _, sigma = ancestral(x_t, x0, at, to, eta)
    mean = a_s * x0 + (b_s**2 - sigma**2).sqrt() * eps
    if variance == "fixed_large":
        sigma = sigma / b_s * b
    if variance == "learned_range":
        sigma = sigma / b_s * torch.lerp(b_s.log(), b.log(), (v + 1) / 2).exp()
    return mean, sigma.nan_to_num(0.0)
