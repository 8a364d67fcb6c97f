"""Normals from a seed against `torch.randn`, at a latent's and at an image's size: eager, and compiled.

Aim on a CPU: at most 0.3 ms eager for [128, 20], and compiled not slower than torch.randn at [128, 784].
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from genfast.random import Stream, normal

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _ours(rows: int, cols: int) -> Callable[[], Tensor]:
    seed = torch.tensor([20], device=DEVICE)
    return lambda: normal(seed, rows, cols, Stream.LATENT)


def _compiled(rows: int, cols: int) -> Callable[[], Tensor]:
    seed = torch.tensor([20], device=DEVICE)
    draw = torch.compile(lambda s: normal(s, rows, cols, Stream.LATENT), fullgraph=True)
    return lambda: draw(seed)


def _torch(rows: int, cols: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(rows, cols, device=DEVICE)


@pytest.mark.parametrize("shape", [(128, 20), (128, 784)], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("source", [_ours, _compiled, _torch], ids=["genfast", "genfast compiled", "torch.randn"])
def test_noise(
    benchmark: BenchmarkFixture, source: Callable[..., Callable[[], Tensor]], shape: tuple[int, int]
) -> None:
    torch._dynamo.reset()
    draw = source(*shape)

    def finished() -> None:
        draw()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"noise {shape[0]} x {shape[1]}"
    benchmark.extra_info |= {"device": str(DEVICE), "torch": torch.__version__, "threads": torch.get_num_threads()}
    benchmark.pedantic(finished, rounds=200, warmup_rounds=10)
