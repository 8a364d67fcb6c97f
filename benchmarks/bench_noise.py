"""Normals from a seed against `torch.randn`, at a latent's and at an image's size: eager, and compiled.

Aim on a CPU: at most 0.3 ms eager for [128, 20], and compiled not slower than torch.randn at [128, 784].
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
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


SOURCES = {"torch.randn": _torch, "genfast": _ours, "genfast, compiled": _compiled}
SIZES = {"cpu": ((128, 20), (128, 784)), "cuda": ((128, 20), (128, 784), (65536, 1024))}


@pytest.mark.parametrize("shape", SIZES[DEVICE.type], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("source", SOURCES)
def test_noise(time_callable: Callable[..., None], source: str, shape: tuple[int, int]) -> None:
    torch._dynamo.reset()
    draw = SOURCES[source](*shape)
    time_callable(
        lambda: draw, op="noise", case="noise", shape=shape, dtype="fp32", mode="", place="", chain=source,
        bytes=4 * shape[0] * shape[1],
    )  # fmt: skip
