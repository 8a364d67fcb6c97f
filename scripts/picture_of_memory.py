"""Draw docs/memory.png: tensors alive during noising, loss and gradient, of the usual chain and of the kernels.

Run with TRITON_INTERPRET=1: the kernels are interpreted on the CPU, and what they allocate is what they allocate on a
GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from genfast import schedules
from genfast._environment import INTERPRETED
from genfast._files import replacing
from genfast.functional import denoising_loss, q_sample

TARGET = Path(__file__).parents[1] / "docs" / "memory.png"
SHAPE = (4, 1 << 16)


def alive(step: Callable[[], None], smallest: int) -> list[float]:
    """Bytes alive after each allocation or release of at least so many, from the second call on."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return list(itertools.accumulate((size for size in sizes if abs(size) >= smallest), initial=0))


def main() -> None:
    if not INTERPRETED:
        raise SystemExit("run with TRITON_INTERPRET=1: without a GPU the reference would run, which keeps its noise")
    schedule = schedules.linear(1000)
    x0, pred = torch.randn(SHAPE), torch.randn(SHAPE, requires_grad=True)

    def fused() -> None:
        pred.grad = None
        noised = q_sample(x0, None, schedule)
        denoising_loss(pred, noised, schedule, reduction="mean").backward()
        pred.grad = None

    def usual() -> None:
        pred.grad = None
        t = torch.randint(1000, SHAPE[:1])
        noise = torch.randn_like(x0)
        x_t = schedule.alpha_bar[t].sqrt()[:, None] * x0 + (1 - schedule.alpha_bar[t]).sqrt()[:, None] * noise
        F.mse_loss(pred, noise).backward()
        pred.grad = None
        del x_t, noise

    size = x0.numel() * x0.element_size()
    figure, axes = plt.subplots(figsize=(6.4, 3.0), layout="constrained")
    for name, step, colour in (("usual chain", usual, "#8a94a6"), ("genfast", fused, "#2f7fd1")):
        values = [value / size for value in alive(step, size // 2)]
        axes.step(range(len(values)), values, where="post", label=f"{name}: at most {max(values):.0f}", color=colour)
    axes.set(xlabel="allocations and releases, in order", ylabel="tensors of the images' size")
    axes.set_title("alive above the images and the network's output", fontsize=10)
    axes.yaxis.set_major_locator(plt.MultipleLocator(1))
    axes.xaxis.set_major_locator(plt.MultipleLocator(1))
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(TARGET) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    print(TARGET)


if __name__ == "__main__":
    main()
