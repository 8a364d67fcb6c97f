"""What diffusion adds to a training step: noisy images before the network, the loss and its gradient behind it.

The network's output is given, and its place is kept: the two halves are called, and compiled, apart, so that no
compiler sees through the network that is not there. `peak_bytes` counts what is alive at most above images and output.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genfast import schedules
from genfast.cases import DTYPES, SEED, TOLERANCES
from genfast.check import path_taken
from genfast.functional import Noised, denoising_loss, q_sample
from genfast.random import Stream, as_seed, normal

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"cpu": ((128, 784),), "cuda": ((128, 784), (16384, 4096))}
CHAINS = {"fused": None, "eager": None, "compiled": "default"}
STEPS = 1000


def _noised(x0: Tensor, t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """As training scripts write it: coefficients in fp32, noise of the images' dtype."""
    noise = torch.randn_like(x0)
    a, b = (c.to(x0.dtype)[:, None] for c in (alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()))
    return a * x0 + b * noise, noise


def _mse(pred: Tensor, noise: Tensor) -> Tensor:
    return F.mse_loss(pred.float(), noise.float())


def _check(x0: Tensor, pred: Tensor, schedule: schedules.Schedule) -> None:
    """The fused loss against fp64 on the same noise; no time where it is wrong."""
    noised = q_sample(x0, None, schedule, seed=SEED)
    eps = normal(as_seed(SEED, DEVICE), *x0.shape, Stream.FORWARD_NOISE).double()
    exact = (pred.double() - eps).square().mean(1)
    tolerance = TOLERANCES[path_taken(DEVICE, x0.dtype)]["losses"]
    error = tolerance.excess(denoising_loss(pred, noised, schedule), exact)
    if not error <= 1:
        pytest.fail(f"no time: the fused loss is wrong by {error:.3g} times what is allowed")


@pytest.mark.parametrize("shape", SIZES[DEVICE.type], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CHAINS)
def test_noising_and_loss(time_callable: Callable[..., None], shape: tuple[int, int], dtype: str, name: str) -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    x0, pred = (torch.randn(shape, generator=generator).to(DEVICE, DTYPES[dtype]) for _ in range(2))
    schedule = schedules.linear(STEPS).to(DEVICE)
    noising, mse = _noised, _mse
    if name == "fused":
        _check(x0, pred, schedule)
    if CHAINS[name] is not None:
        noising, mse = (torch.compile(f, mode=CHAINS[name], fullgraph=True, dynamic=False) for f in (noising, mse))

    def prepare() -> Callable[[], None]:
        leaf = pred.detach().requires_grad_()

        def fused() -> None:
            noised: Noised = q_sample(x0, None, schedule)
            denoising_loss(leaf, noised, schedule, reduction="mean").backward()
            leaf.grad = None

        def plain() -> None:
            t = torch.randint(STEPS, shape[:1], device=DEVICE)
            x_t, noise = noising(x0, t, schedule.alpha_bar)
            mse(leaf, noise).backward()
            leaf.grad = None
            del x_t

        return fused if name == "fused" else plain

    # Read x0, write x_t; read the output, write its gradient.
    moved = 4 * x0.numel() * x0.element_size()
    time_callable(
        prepare, op="noising_and_loss", case="noising_and_loss", shape=shape, dtype=dtype, mode="forward+backward",
        place="alone", chain=name, bytes=moved, path=path_taken(DEVICE, x0.dtype),
    )  # fmt: skip
