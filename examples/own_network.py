"""The ops in a model of your own: a convolutional encoder whose packed output goes straight into the fused op.

    python examples/own_network.py --steps 200

The noise depends on the seed and on the row alone: four micro-batches give the gradient of the whole batch.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from genfast.functional import bernoulli_nll, reparameterize_kl_packed
from genfast.training import load_dataset


class SpatialVAE(nn.Module):
    """28 x 28 images, a latent of 4 x 7 x 7."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 8, 4, stride=2, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(4, 32, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        )

    def loss(self, images: Tensor, *, seed: Tensor | int | None = None, row_offset: int = 0) -> Tensor:
        """Negative ELBO in nats per image; images uint8 [B, 1, 28, 28]."""
        h = self.encoder(images.float() / 255)
        z, kl = reparameterize_kl_packed(h, seed=seed, row_offset=row_offset, clamp=(-30.0, 20.0))
        return bernoulli_nll(self.decoder(z), images, reduction="mean") + kl.mean()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(0)
    images = load_dataset("digits").train
    model = SpatialVAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    batch = images[:128]
    model.loss(batch, seed=7).backward()
    whole = model.encoder[0].weight.grad.clone()
    optimizer.zero_grad()
    for start in range(0, 128, 32):
        (model.loss(batch[start : start + 32], seed=7, row_offset=start) / 4).backward()
    difference = (model.encoder[0].weight.grad - whole).abs().max() / whole.abs().max()
    print(f"gradient of 4 x 32 against 1 x 128: largest relative difference {difference.item():.1e}")

    for step in range(1, args.steps + 1):
        batch = images[torch.randint(len(images), (128,))]
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == args.steps:
            print(f"step {step}: {loss.item():.2f} nats per image")


if __name__ == "__main__":
    main()
