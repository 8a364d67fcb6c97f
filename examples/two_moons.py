"""A flow of vectors: RealNVP learns two half moons, in about ten seconds on a CPU, and its density is drawn.

    python examples/two_moons.py --out two-moons.png
"""

from __future__ import annotations

import argparse
import math

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from genfast import RealNVP


def two_moons(n: int, noise: float = 0.08) -> Tensor:
    """Points [n, 2] of two interlocking half circles."""
    angle = math.pi * torch.rand(n)
    upper = torch.rand(n) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return torch.stack((x, y), 1) + noise * torch.randn(n, 2)


def draw(flow: RealNVP, out: str) -> None:
    """The density over the plane, and samples on top of it."""
    axis_x, axis_y = torch.linspace(-2, 2, 240), torch.linspace(-1.3, 1.3, 160)
    grid = torch.stack(torch.meshgrid(axis_x, axis_y, indexing="xy"), 2)
    with torch.no_grad():
        density = flow.log_prob(grid.flatten(0, 1)).exp().view(grid.shape[:2])
    samples = flow.sample(400, seed=1)
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    picture = axes.pcolormesh(axis_x, axis_y, density, cmap="magma", shading="gouraud")
    axes.plot(*samples.T, ".", color="white", markersize=1.5, alpha=0.6)
    axes.set(aspect="equal", title="p(x) of the flow, and 400 samples", xlim=(-2, 2), ylim=(-1.3, 1.3))
    figure.colorbar(picture, ax=axes, shrink=0.7)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--out", default="two-moons.png")
    args = parser.parse_args()
    torch.manual_seed(0)
    test = two_moons(5000)
    flow = RealNVP(dim=2, preset="tiny")
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    for step in range(1, args.steps + 1):
        loss = flow.loss(two_moons(256))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 200 == 0 or step == args.steps:
            print(f"step {step}: {loss.item():.3f} nats")
    flow.eval()
    with torch.no_grad():
        z, _ = flow(test)
        error = (flow.inverse(z) - test).abs().max()
        print(f"test: {flow.loss(test)['loss']:.3f} nats; the inverse is off by at most {error:.1e}")
    draw(flow, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
