"""Drop-ins for diffusers: the posterior of its autoencoders, and its DDPM scheduler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genfast.functional import kl_normal, reparameterize_kl_packed

if TYPE_CHECKING:
    from genfast.integrations._diffusers_scheduler import DDPMScheduler

__all__ = ["DDPMScheduler", "DiagonalGaussianDistribution"]

_LOGVAR_RANGE = (-30.0, 20.0)


def __getattr__(name: str) -> Any:
    # A subclass of theirs: the posterior works without diffusers.
    if name == "DDPMScheduler":
        from genfast.integrations._diffusers_scheduler import DDPMScheduler

        return DDPMScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class DiagonalGaussianDistribution:
    """A diagonal Gaussian over packed moments, as ``diffusers.models.autoencoders.vae.DiagonalGaussianDistribution``.

    `sample` and then `kl` cost one fused pass over the moments. With a generator, the noise is torch's, as theirs is;
    without one it comes from a genfast seed, itself drawn from torch's generator. The KL is fp32 whatever the moments.

    Args:
        parameters: moments [B, 2 L, ...]: the mean, then the log-variance (clamped to [-30, 20]), along dim 1.
        deterministic: a point mass at the mean.

    Raises:
        ValueError: the moments cannot be halved along dim 1.

    Example:
        >>> posterior = DiagonalGaussianDistribution(torch.zeros(2, 8, 4, 4))
        >>> posterior.sample().shape, posterior.kl()
        (torch.Size([2, 4, 4, 4]), tensor([0., 0.]))
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        if parameters.dim() < 2 or parameters.shape[1] % 2:
            raise ValueError(f"parameters: expected moments of shape [B, 2 L, ...], got {list(parameters.shape)}")
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean = parameters.chunk(2, dim=1)[0]
        self._kl: Tensor | None = None

    @cached_property
    def logvar(self) -> Tensor:
        """The log-variance, clamped."""
        return self.parameters.chunk(2, dim=1)[1].clamp(*_LOGVAR_RANGE)

    @cached_property
    def std(self) -> Tensor:
        """The standard deviation; 0 for a point mass."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @cached_property
    def var(self) -> Tensor:
        """The variance; 0 for a point mass."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Draw mean + std * noise, [B, L, ...].

        Args:
            generator: torch's, or a list of one for each row, on the CPU or on the moments' device; None for a genfast
                seed.

        Example:
            >>> posterior = DiagonalGaussianDistribution(torch.zeros(1, 4, 1, 1))
            >>> a = posterior.sample(torch.Generator().manual_seed(0))
            >>> torch.equal(a, torch.randn(1, 2, 1, 1, generator=torch.Generator().manual_seed(0)))
            True
        """
        eps = None if generator is None else self._torch_noise(generator)
        if self.deterministic:
            return self.mean
        z, self._kl = reparameterize_kl_packed(self.parameters, eps=eps, clamp=_LOGVAR_RANGE)
        return z

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL divergence to `other`, or to N(0, I), summed over the latent: fp32 [B], nats; zeros [1] for a point mass.

        Example:
            >>> posterior = DiagonalGaussianDistribution(torch.ones(1, 2, 1, 1))
            >>> posterior.kl(posterior)
            tensor([0.])
        """
        if self.deterministic:
            return torch.zeros(1, device=self.parameters.device)
        if other is not None and other.deterministic:
            return torch.full((self.mean.shape[0],), math.inf, device=self.parameters.device)
        if other is not None:
            return kl_normal(self.mean, self.logvar, other.mean, other.logvar)
        wants_grad = torch.is_grad_enabled() and self.parameters.requires_grad
        if self._kl is None or (wants_grad and not self._kl.requires_grad):
            no_noise = self.mean.new_zeros(()).expand(self.mean.shape)
            self._kl = reparameterize_kl_packed(self.parameters, eps=no_noise, clamp=_LOGVAR_RANGE)[1]
        return self._kl

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """-log density of `sample` [B, L, ...], in nats, summed over `dims`; zeros [1] for a point mass.

        Example:
            >>> DiagonalGaussianDistribution(torch.zeros(1, 2, 1, 1)).nll(torch.zeros(1, 1, 1, 1))
            tensor([0.9189])
        """
        if self.deterministic:
            return torch.zeros(1, device=self.parameters.device)
        error = (sample - self.mean).square() / self.var
        return 0.5 * torch.sum(math.log(2 * math.pi) + self.logvar + error, dim=tuple(dims))

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def _torch_noise(self, generator: torch.Generator | list[torch.Generator]) -> Tensor:
        """Normals from torch's generators, made where each of them lives."""
        generators = generator if isinstance(generator, list) else [generator]
        shape = self.mean.shape if len(generators) == 1 else (1, *self.mean.shape[1:])
        noise = [torch.randn(shape, generator=g, device=g.device, dtype=self.mean.dtype) for g in generators]
        return torch.cat(noise).to(self.mean.device)
