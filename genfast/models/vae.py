"""The variational autoencoder."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from genfast import profiling
from genfast.functional import _checks, reparameterize_kl, reparameterize_kl_packed
from genfast.models.base import LatentImageModel, check_choice, evaluating, wide
from genfast.random import Stream, as_seed, normal

__all__ = ["VAE"]

_CHUNK_ELEMENTS = 1 << 22


class VAE(LatentImageModel):
    """Variational autoencoder (Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014) with prior N(0, I).

    With no arguments it is the 784-400-20 MLP of the tutorials: ``forward(x) -> (recon, mu, logvar)``, ``encode``,
    ``reparameterize``, ``decode``, and the state_dict keys fc1, fc21, fc22, fc3, fc4, so that it replaces a script's
    own class, with the script's own loss. `loss` is the fused path.

    Images go in as floats in [0, 1] (not checked: that would wait for the device) or uint8 (meaning x / 255), of shape
    [B, C, H, W], [B, C * H * W], or [B, H, W] where C is 1; bool as well where the likelihood is Bernoulli.

    Args:
        latent_dim: size of the code; with an own encoder and decoder it follows from the encoder instead.
        hidden_dims: widths of the encoder's hidden layers, the decoder's in reverse; for ``"conv"`` the channels of its
            stages, each of which halves the image. None: (400,) for ``"mlp"``, (32, 64) for ``"conv"``.
        image_shape: (C, H, W).
        likelihood: ``"bernoulli"`` (the decoder gives logits), or ``"gaussian"`` (it gives the mean, through a sigmoid
            in the presets, as it is from an own decoder).
        sigma: standard deviation of the Gaussian likelihood; None learns one for all pixels, as the parameter
            ``log_sigma`` (Rybkin, Daniilidis and Levine, "Simple and effective VAE training with calibrated decoders",
            ICML 2021).
        encoder: own network, images [B, C, H, W] to packed [mu | logvar] along dim 1, [B, 2 L] or [B, 2 L, ...].
        decoder: own network, codes [B, L, ...] to logits or means [B, C, H, W].
        preset: networks that are not given: ``"mlp"`` or ``"conv"``.
        fused: False runs the ordinary PyTorch chain instead of genfast's ops (the baseline of every comparison).

    Raises:
        ValueError: an argument has a value that it cannot have.

    Example:
        >>> model = VAE()
        >>> list(model.state_dict())[:4]
        ['fc1.weight', 'fc1.bias', 'fc21.weight', 'fc21.bias']
        >>> recon, mu, logvar = model(torch.rand(3, 1, 28, 28))
        >>> recon.shape, mu.shape
        (torch.Size([3, 784]), torch.Size([3, 20]))
    """

    _heads = ("fc21", "fc22")

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images to mean and log-variance of q(z | x), each [B, latent_dim] (or [B, *latent_shape]).

        Example:
            >>> mu, logvar = VAE(latent_dim=2).encode(torch.rand(3, 784))
            >>> mu.shape, logvar.shape
            (torch.Size([3, 2]), torch.Size([3, 2]))
        """
        mu, logvar = self._code(self._check_images(x))
        return mu, logvar

    def reparameterize(
        self, mu: Tensor, logvar: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0
    ) -> Tensor:
        """Draw z = mu + exp(logvar / 2) eps, of the shape of mu; seed and row_offset as for `loss`.

        Example:
            >>> VAE().reparameterize(torch.zeros(3, 20), torch.zeros(3, 20)).shape
            torch.Size([3, 20])
        """
        if self.fused:
            return reparameterize_kl(mu, logvar, seed=seed, row_offset=row_offset)[0]
        return mu + _noise_like(mu, seed, row_offset) * torch.exp(0.5 * logvar)

    @profiling.annotate("forward")
    def forward(
        self, x: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images to (recon, mu, logvar), recon being `decode` of the one z that `loss` draws for this seed."""
        mu, logvar = self.encode(x)
        return self.decode(self.reparameterize(mu, logvar, seed=seed, row_offset=row_offset)), mu, logvar

    def loss(
        self,
        x: Tensor,
        *,
        beta: float = 1.0,
        free_bits: float = 0.0,
        seed: int | Tensor | None = None,
        row_offset: int = 0,
    ) -> dict[str, Tensor]:
        """The negative ELBO, nll + beta kl, in nats per image, averaged over the batch.

        Args:
            x: images, see the class.
            beta: finite weight of the KL (Higgins et al., "beta-VAE", ICLR 2017).
            free_bits: nats that each latent dimension of each sample may spend for free: its KL counts as at least
                this much (Kingma et al., "Improving variational inference with inverse autoregressive flow", 2016).
            seed: None (drawn from torch's generator), an int, or an int64 tensor [1] on the model's device.
            row_offset: global index of the first row, for micro-batches, ranks and evaluation in pieces.

        Returns:
            fp32 scalars: ``loss``, ``nll`` = E_q[-log p(x | z)], one draw, and ``kl`` = KL(q(z | x) || N(0, I)), with
            free bits where they are given.

        Raises:
            ValueError: images of another shape or dtype, beta or free_bits out of range.

        Example:
            >>> parts = VAE().loss(torch.rand(3, 1, 28, 28), seed=0)
            >>> torch.equal(parts["loss"], parts["nll"] + parts["kl"])
            True
        """
        if not -math.inf < beta < math.inf:
            raise ValueError(f"beta: expected a finite number, got {beta}")
        _checks.non_negative("free_bits", free_bits)
        x = self._check_images(x)
        with profiling.range("forward"):
            z, kl = self._draw(x, seed, row_offset, free_bits)
            out = self._decode(z)
        with profiling.range("loss"):
            nll, kl = self._nll(out, x, "mean"), kl.mean()
            return {"loss": nll + beta * kl, "nll": nll, "kl": kl}

    def elbo(self, x: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0) -> Tensor:
        """A one-draw estimate of the evidence lower bound of each image: fp32 [B], nats. Arguments as for `loss`.

        Example:
            >>> VAE().elbo(torch.rand(3, 1, 28, 28)).shape
            torch.Size([3])
        """
        x = self._check_images(x)
        z, kl = self._draw(x, seed, row_offset)
        return -(self._nll(self._decode(z), x, "none") + kl)

    def log_prob(
        self,
        x: Tensor,
        k: int = 5000,
        *,
        method: Literal["importance", "prior"] = "importance",
        chunk: int | None = None,
        seed: int | Tensor | None = None,
        row_offset: int = 0,
    ) -> Tensor:
        """Estimate log p(x) of each image from k latent draws.

        ``"importance"`` draws from q(z | x): log (1/k) sum_j p(x | z_j) p(z_j) / q(z_j | x), a lower bound in
        expectation that tightens with k (Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR
        2016, eq. 8). ``"prior"`` draws from p(z), plain Monte Carlo, and is hopeless but for tiny latents: it is there
        to compare. Grey pixels under a Bernoulli have no likelihood: binarize them first.

        Args:
            x: images, see the class.
            k: draws for each image.
            method: ``"importance"`` or ``"prior"``.
            chunk: codes decoded at once, which bounds the memory and changes the result by rounding only; None: as many
                as keep the largest tensor within the networks at 2^22 elements (own networks are unknown, and taken to
                have 64 channels at the image's size).
            seed, row_offset: as for `loss`; draw j of row i uses the positions from j * latent_dim on.

        Returns:
            fp32 [B], nats.

        Raises:
            ValueError: k, chunk or method out of range, images of another shape or dtype.

        Example:
            >>> model, x = VAE(), torch.rand(3, 1, 28, 28).round()
            >>> a, b = model.log_prob(x, k=10, seed=0), model.log_prob(x, k=10, seed=0, chunk=7)
            >>> a.shape, torch.allclose(a, b)
            (torch.Size([3]), True)
        """
        check_choice("method", method, ("importance", "prior"))
        rows = max(1, _CHUNK_ELEMENTS // self._largest) if chunk is None else chunk
        for name, value in (("k", k), ("chunk", rows)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        x = self._check_images(x)
        seed = as_seed(seed, x.device)
        offsets = range(row_offset, row_offset + max(1, x.shape[0]), rows)
        pieces = zip(x.split(rows), offsets, strict=True)
        with evaluating(self):
            return torch.cat([self._log_prob(piece, k, method, rows, seed, offset) for piece, offset in pieces])

    def _log_prob(self, x: Tensor, k: int, method: str, rows: int, seed: Tensor, row_offset: int) -> Tensor:
        batch, dim = x.shape[0], math.prod(self.latent_shape)
        if method == "importance":
            stream = Stream.LATENT
            mu, logvar = (wide(part).reshape(batch, 1, dim) for part in self._code(x))
        else:
            stream = Stream.PRIOR
            mu = logvar = torch.zeros(batch, 1, dim, device=x.device)
        std = torch.exp(0.5 * logvar)
        total = torch.full((batch,), -math.inf, device=x.device)
        draws_at_once = max(1, rows // max(1, batch))
        for start in range(0, k, draws_at_once):
            draws = min(draws_at_once, k - start)
            eps = normal(seed, batch, draws * dim, stream, row_offset, col_offset=start * dim).view(batch, draws, dim)
            z = mu + std * eps
            # log p(z) - log q(z | x): the normalising constants cancel but for logvar.
            log_ratio = 0.5 * (eps.square() - z.square() + logvar).sum(2)
            out = self._decode(z.reshape(batch * draws, *self.latent_shape))
            targets = x.unsqueeze(1).expand(-1, draws, *self.image_shape).flatten(0, 1)
            nll = self._nll(out, targets, "none").view(batch, draws)
            total = torch.logaddexp(total, torch.logsumexp(log_ratio - nll, 1))
        return total - math.log(k)

    def _draw(
        self, x: Tensor, seed: int | Tensor | None, row_offset: int, free_bits: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """One z from q(z | x) for checked images, and the KL of each row."""
        if self.fused and self.encoder is not None:
            return reparameterize_kl_packed(self._packed_code(x), seed=seed, row_offset=row_offset, free_bits=free_bits)
        mu, logvar = self._code(x)
        if self.fused:
            return reparameterize_kl(mu, logvar, seed=seed, row_offset=row_offset, free_bits=free_bits)
        z = mu + _noise_like(mu, seed, row_offset) * torch.exp(0.5 * logvar)
        kl = -0.5 * (1 + wide(logvar) - wide(mu).square() - wide(logvar).exp())
        if free_bits > 0:
            kl = kl.clamp(min=free_bits)
        return z, kl.flatten(1).sum(1)


def _noise_like(mu: Tensor, seed: int | Tensor | None, row_offset: int) -> Tensor:
    """The noise of the ordinary chain: torch's own, or that of a seed."""
    if seed is None:
        return torch.randn_like(mu)
    eps = normal(as_seed(seed, mu.device), mu.shape[0], mu[:1].numel(), Stream.LATENT, row_offset)
    return eps.reshape(mu.shape).to(mu.dtype)
