"""The plain autoencoder, with the VAE's shape of API."""

from __future__ import annotations

from torch import Tensor

from genfast import profiling
from genfast.models.base import LatentImageModel

__all__ = ["AutoEncoder"]


class AutoEncoder(LatentImageModel):
    """Autoencoder: a code without noise and without a prior.

    With no arguments it is the 784-400-20 MLP with the state_dict keys fc1, fc2, fc3, fc4. Sampling it from N(0, I) is
    allowed, and shows what the VAE's prior is for. Images and arguments are as for `VAE`, except that an own encoder
    returns the code itself, [B, L] or [B, L, ...].

    Example:
        >>> import torch
        >>> model = AutoEncoder(latent_dim=2)
        >>> list(model.state_dict())[2:4]
        ['fc2.weight', 'fc2.bias']
        >>> model(torch.rand(3, 1, 28, 28)).shape
        torch.Size([3, 784])
    """

    _heads = ("fc2",)

    def encode(self, x: Tensor) -> Tensor:
        """Images to their codes [B, latent_dim] (or [B, *latent_shape])."""
        return self._mean_code(x)

    @profiling.annotate("forward")
    def forward(self, x: Tensor) -> Tensor:
        """Images to their reconstructions; see `decode` for the shape."""
        return self.decode(self.encode(x))

    def loss(self, x: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0) -> dict[str, Tensor]:
        """-log p(x | code) in nats per image, averaged over the batch: ``loss`` and ``nll``, the same fp32 scalar.

        Args:
            x: images, as for `VAE`.
            seed, row_offset: taken as every model takes them; there is no noise that they could choose.

        Raises:
            ValueError: images of another shape or dtype.

        Example:
            >>> import torch
            >>> sorted(AutoEncoder().loss(torch.rand(3, 1, 28, 28)))
            ['loss', 'nll']
        """
        x = self._check_images(x)
        with profiling.range("forward"):
            out = self._decode(self._code(x)[0])
        with profiling.range("loss"):
            nll = self._nll(out, x, "mean")
            return {"loss": nll, "nll": nll}
