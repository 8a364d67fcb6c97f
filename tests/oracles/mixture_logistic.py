"""Truth for mixtures of logistics: fp64 by torch.distributions where F is neither 0 nor 1, else mpmath."""

from __future__ import annotations

from collections.abc import Sequence

import mpmath
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, TransformedDistribution, Uniform
from torch.distributions.transforms import AffineTransform, SigmoidTransform

from genfast.cases import Case, Inputs, Outputs


def _logistic(means: Tensor, scales: Tensor) -> TransformedDistribution:
    uniform = Uniform(torch.zeros_like(means), torch.ones_like(means))
    return TransformedDistribution(uniform, [SigmoidTransform().inv, AffineTransform(means, scales)])


def _coupling(case: Case, inputs: Inputs, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and the elements' log-derivatives, from the density and the distribution function themselves."""
    s, t, *blocks = inputs["params"].split(x.shape[1], 1)
    count = len(blocks) // 3
    logits, means, log_scales = (torch.stack(blocks[i * count : (i + 1) * count], -1) for i in range(3))
    bounded, least = "exp" not in case.setting, -0.25 if "exp" in case.setting else -7.0
    scales = torch.where(log_scales < least, log_scales.detach().clip(least), log_scales).exp()
    mixture = MixtureSameFamily(Categorical(logits=logits), _logistic(means, scales), validate_args=False)
    cdf, log_density = mixture.cdf(x), mixture.log_prob(x)
    log = 2 * s.tanh() if bounded else s
    return log.exp() * torch.logit(cdf) + t, log + log_density - torch.log(cdf * (1 - cdf))


def mixture_logistic_coupling(case: Case, inputs: Inputs) -> Outputs:
    x = inputs["half"]
    if "inverse" not in case.setting:
        y, terms = _coupling(case, inputs, x)
        return y, terms.flatten(1).sum(1)
    with torch.no_grad():
        lo, hi = torch.full_like(x, -30), torch.full_like(x, 30)
        for _ in range(70):
            middle = (lo + hi) / 2
            above = _coupling(case, inputs, middle)[0] > x
            lo, hi = torch.where(above, lo, middle), torch.where(above, middle, hi)
        middle = (lo + hi) / 2
        slope = _coupling(case, inputs, middle)[1].exp()
    # The derivatives of the implicit function.
    found = middle - (_coupling(case, inputs, middle)[0] - x) / slope
    return found, -_coupling(case, inputs, found)[1].flatten(1).sum(1)


class Exact:
    """One element's map in 60 digits: a scale, a shift and (weight, mean, scale) of each component."""

    def __init__(
        self, s: float, t: float, logits: Sequence[float], means: Sequence[float], log_scales: Sequence[float]
    ) -> None:
        self.log, self.shift = 2 * mpmath.tanh(mpmath.mpf(s)), mpmath.mpf(t)
        total = mpmath.fsum(map(mpmath.exp, map(mpmath.mpf, logits)))
        self.parts = [
            (mpmath.exp(mpmath.mpf(logit)) / total, mpmath.mpf(mean), mpmath.exp(mpmath.mpf(max(log_scale, -7.0))))
            for logit, mean, log_scale in zip(logits, means, log_scales, strict=True)
        ]

    def __call__(self, x: float | mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:
        """y and log(dy / dx)."""
        below = above = density = mpmath.mpf(0)
        for weight, mean, scale in self.parts:
            e = mpmath.exp(-(mpmath.mpf(x) - mean) / scale)
            below += weight / (1 + e)
            above += weight * e / (1 + e)
            density += weight * e / (1 + e) ** 2 / scale
        y = mpmath.exp(self.log) * mpmath.log(below / above) + self.shift
        return y, self.log + mpmath.log(density / (below * above))
