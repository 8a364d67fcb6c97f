"""A training step of the DCGAN preset, and of the loop that PyTorch's DCGAN example runs, on the same networks.

"script" is that loop: one forward of the generator, three of the discriminator, binary cross-entropy of labels, two
Adams; "r1" is a step that has this penalty, written as scripts write it. Ours freezes the discriminator in the
generator's turn and draws the generator new codes for it. "ours-graph" holds the step, gather included, in one CUDA
graph. Before any time is taken, both must give the same losses, and discriminators that moved alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import genfast
from genfast.random import Stream, normal
from genfast.training import DeviceDataset, TrainStep, load_dataset

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH, BATCHES = {"cpu": (16, (64,)), "cuda": (64, (128, 1024))}[DEVICE.type]
CHAINS = ["script", "ours"] + ["ours-compiled", "ours-graph"] * (DEVICE.type == "cuda")
R1 = {"none": 0.0, "r1": 1.0}


class _Script:
    """The loop of the example: its batches are there already, in [-1, 1]."""

    def __init__(self, gan: genfast.GAN) -> None:
        self.gan, self.r1 = gan, gan.r1
        adam = {"lr": 2e-4, "betas": (0.5, 0.999), "fused": True}
        self.of_d = torch.optim.Adam(gan.discriminator.parameters(), **adam)
        self.of_g = torch.optim.Adam(gan.generator.parameters(), **adam)

    def losses(self, real: Tensor, z: Tensor, penalised: bool) -> tuple[Tensor, Tensor]:
        """One step: the losses of discriminator and generator."""
        net_g, net_d = self.gan.generator, self.gan.discriminator
        ones, zeros = real.new_ones(len(real)), real.new_zeros(len(real))
        net_d.zero_grad()
        real.requires_grad_(penalised)
        said = net_d(real).view(-1)
        of_real = F.binary_cross_entropy_with_logits(said, ones)
        total = of_real
        if penalised:
            (slope,) = torch.autograd.grad(said.sum(), real, create_graph=True)
            total = total + self.r1 / 2 * slope.flatten(1).square().sum(1).mean()
        total.backward()
        real.requires_grad_(False)
        fake = net_g(z)
        of_fake = F.binary_cross_entropy_with_logits(net_d(fake.detach()).view(-1), zeros)
        of_fake.backward()
        self.of_d.step()
        net_g.zero_grad()
        of_g = F.binary_cross_entropy_with_logits(net_d(fake).view(-1), ones)
        of_g.backward()
        self.of_g.step()
        return of_real + of_fake, of_g

    def __call__(self, images: Tensor) -> None:
        real = images.float() * (2 / 255) - 1
        z = torch.randn(len(images), *self.gan.latent_shape, device=images.device)
        self.losses(real, z, penalised=self.r1 > 0)


def _gan(r1: float) -> genfast.GAN:
    torch.manual_seed(0)
    return genfast.GAN(width=WIDTH, r1=r1, r1_every=1).to(DEVICE)


@lru_cache(maxsize=1)
def _images(batch: int) -> Tensor:
    digits = load_dataset("digits").train
    return digits.repeat(-(-batch // len(digits)), 1, 1, 1)[:batch].to(DEVICE)


@lru_cache(maxsize=1)
def _error(r1: float) -> float:
    """How far the discriminators' losses of one step are apart, over what is allowed."""
    images = _images(16)
    theirs = _Script(_gan(r1))
    ours = _gan(r1)
    z = normal(torch.zeros(1, dtype=torch.int64, device=DEVICE), 16, 100, Stream.PRIOR, salt=1).view(16, 100, 1, 1)
    of_d, _ = theirs.losses(images.float() * (2 / 255) - 1, z, penalised=r1 > 0)
    parts = ours.loss(images, turn=ours.turns(0)[0], seed=0)
    optimizer = ours.make_optimizer(2e-4)
    parts["loss"].backward()
    optimizer.step()
    pairs = zip(ours.discriminator.parameters(), theirs.gan.discriminator.parameters(), strict=True)
    moved = max(float((a - b).detach().abs().max()) for a, b in pairs) / 2e-4
    # Adam's first step is the learning rate in the gradient's sign: of gradients near 0 rounding decides.
    return max(float((parts["d_loss"] - of_d).abs().detach()) / 1e-4, moved / 2.1)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("penalty", R1)
@pytest.mark.parametrize("step", CHAINS)
def test_gan_step(time_callable: Callable[..., None], batch: int, penalty: str, step: str) -> None:
    torch._dynamo.reset()
    error = _error(R1[penalty])
    if not error <= 1:
        pytest.fail(f"no time: the losses differ by {error:.3g} times what is allowed")
    images, gan = _images(batch), _gan(R1[penalty])
    if step == "script":
        script = _Script(gan)
        call = lambda: script(images)  # noqa: E731
    else:
        if step == "ours-compiled":
            gan.compile(dynamic=False)
        optimizer = gan.make_optimizer(2e-4, fused=True)
        train = TrainStep(gan, optimizer, mode="graph" if step == "ours-graph" else "eager")
        call = _from_feed(train, images) if step == "ours-graph" else lambda: train(images)
    time_callable(
        lambda: call, kind="step", capture=False, op="training step",
        case=f"dcgan of width {WIDTH}, penalty {penalty}", shape=tuple(images.shape), dtype="fp32", mode="",
        place="", chain=step, error=error if step != "script" else None,
    )  # fmt: skip


def _from_feed(train: TrainStep, images: Tensor) -> Callable[[], object]:
    """Steps that take their batches themselves, epoch after epoch."""
    train.source = DeviceDataset(images).feed(len(images), seed=0)
    done = 0

    def call() -> None:
        nonlocal done
        done += 1
        train.source.start(epoch=done)
        train()

    return call
