"""Draw docs/gan-optimal-discriminator.png and docs/gan-gradients.png: what the theory of GANs says, measured.

The first: a discriminator trained between two known densities, against p_r / (p_r + p_g). The second: the gradient of
a new generator under the saturating and the non-saturating loss, while the discriminator learns.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from genfast import GAN
from genfast._files import replacing
from genfast.random import Stream, normal, uniform
from genfast.training import load_dataset

DOCS = Path(__file__).parents[1] / "docs"
# Of real values: weight, mean and standard deviation of each Gaussian; of generated ones a single Gaussian.
REAL = ((0.6, -0.4, 0.15), (0.4, 0.5, 0.1))
GENERATED = (0.1, 0.35)
STEPS, BATCH, DISCRIMINATOR_STEPS, EVERY = 6000, 2048, 200, 10
BLUE, ORANGE, GREY = "#2f7fd1", "#d9822b", "#8a94a6"


class Shift(nn.Module):
    """A generator whose density is known."""

    def forward(self, z: Tensor) -> Tensor:
        mean, std = GENERATED
        return mean + std * z


def gaussian(v: Tensor, mean: float, std: float) -> Tensor:
    return torch.exp(-0.5 * ((v - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


def real_density(v: Tensor) -> Tensor:
    return sum(weight * gaussian(v, mean, std) for weight, mean, std in REAL)


def draw_real(rows: int, seed: int) -> Tensor:
    """Values in the model's [0, 1], whose networks see 2 x - 1."""
    first = uniform(seed, rows, 1, Stream.BINARIZE) < REAL[0][0]
    eps = normal(seed, rows, 1, Stream.PIXEL)
    (_, mean0, std0), (_, mean1, std1) = REAL
    values = torch.where(first, mean0 + std0 * eps, mean1 + std1 * eps)
    return ((values + 1) / 2).view(-1, 1, 1, 1)


def optimal_discriminator() -> None:
    torch.manual_seed(0)
    layers = (nn.Flatten(), nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    gan = GAN(Shift(), nn.Sequential(*layers), latent_dim=1, image_shape=(1, 1, 1))
    optimizer = torch.optim.Adam(gan.discriminator.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        gan.loss(draw_real(BATCH, step), turn="discriminator", seed=step)["loss"].backward()
        optimizer.step()
        schedule.step()

    v = torch.linspace(-1.2, 1.2, 961, dtype=torch.float64)
    p_r, p_g = real_density(v), gaussian(v, *GENERATED)
    truth = p_r / (p_r + p_g)
    learned = gan.discriminate(((v + 1) / 2).float().view(-1, 1, 1, 1)).double()
    seen = p_r + p_g > 0.05
    error = (learned - truth).abs()[seen]
    # V at the optimum is -2 log 2 + 2 JSD(p_r, p_g).
    terms = torch.xlogy(p_r, truth) + torch.xlogy(p_g, 1 - truth)
    value = float(torch.trapezoid(torch.nan_to_num(terms), v))
    batches = [gan.loss(draw_real(20000, STEPS + i), seed=STEPS + i)["d_loss"] for i in range(10)]
    reached = -float(torch.stack(batches).mean())
    print(
        f"optimal discriminator: largest error {error.max():.3f}, mean {error.mean():.3f}; "
        f"V {reached:.4f}, optimum {value:.4f}, -2 log 2 {-2 * math.log(2):.4f}"
    )

    figure, axes = plt.subplots(figsize=(7.0, 3.6), layout="constrained")
    axes.fill_between(v, p_r / p_r.max(), color=BLUE, alpha=0.15, label="$p_r$, scaled")
    axes.fill_between(v, p_g / p_r.max(), color=ORANGE, alpha=0.2, label="$p_g$, scaled")
    axes.plot(v, truth, color=GREY, lw=4, alpha=0.7, label="$p_r / (p_r + p_g)$")
    axes.plot(v, learned, color=BLUE, lw=1.5, label="trained discriminator")
    axes.set(xlabel="value", ylabel="D", xlim=(-1.2, 1.2), ylim=(0, 1.05))
    axes.set_title(
        f"largest error {error.max():.3f} where $p_r + p_g$ > 0.05; V = {reached:.3f}, optimum {value:.3f}", fontsize=10
    )
    axes.legend(fontsize=8, loc="upper right")
    axes.grid(alpha=0.3)
    save(figure, "gan-optimal-discriminator.png")


def gradient_of_the_generator() -> None:
    images = load_dataset("digits").train
    torch.manual_seed(0)
    gan = GAN(width=16)
    optimizer = torch.optim.Adam(gan.turn_parameters("discriminator"), lr=2e-4, betas=(0.5, 0.999))
    norms: dict[str, list[float]] = {"non_saturating": [], "minimax": []}
    steps, fooled = [], []
    for step in range(DISCRIMINATOR_STEPS + 1):
        batch = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(step))[:64]]
        if step % EVERY == 0:
            steps.append(step)
            for loss, measured in norms.items():
                gan.objective = loss
                value = gan.loss(batch, turn="generator", seed=0)["loss"]
                found = torch.autograd.grad(value, gan.turn_parameters("generator"))
                measured.append(float(torch.nn.utils.get_total_norm(found)))
        optimizer.zero_grad()
        parts = gan.loss(batch, turn="discriminator", seed=step)
        parts["loss"].backward()
        optimizer.step()
        if step % EVERY == 0:
            fooled.append(float(parts["d_fake"]))
    last = norms["non_saturating"][-1], norms["minimax"][-1]
    print(
        f"gradients: D(G(z)) from {fooled[0]:.2f} to {fooled[-1]:.2g} in {steps[-1]} steps; norm of the generator's "
        f"gradient then: non-saturating {last[0]:.3g}, saturating {last[1]:.3g}, {last[0] / last[1]:.0f} times less"
    )

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.4), layout="constrained")
    left.plot(steps, norms["non_saturating"], "o-", ms=3, color=BLUE, label="non-saturating, $-\\log D(G(z))$")
    left.plot(steps, norms["minimax"], "o-", ms=3, color=ORANGE, label="saturating, $\\log(1 - D(G(z)))$")
    left.set(ylabel="norm of the generator's gradient", yscale="log")
    left.legend(fontsize=8)
    right.plot(steps, fooled, "o-", ms=3, color=GREY)
    right.set(ylabel="D(G(z))", yscale="log")
    for axes in (left, right):
        axes.set_xlabel("steps of the discriminator alone")
        axes.grid(alpha=0.3)
    save(figure, "gan-gradients.png")


def save(figure: plt.Figure, name: str) -> None:
    with replacing(DOCS / name) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    print(DOCS / name)


def main() -> None:
    optimal_discriminator()
    gradient_of_the_generator()


if __name__ == "__main__":
    main()
