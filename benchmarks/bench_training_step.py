"""A training step of each model (forward, loss, backward, Adam): fused, and the same model with `fused=False`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch

from genfast.cases import LOSS
from genfast.models.base import Model
from genfast.models.registry import FAMILIES
from genfast.training import TrainStep, load_dataset

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# What each chain runs: fused or not, and the mode of torch.compile if any.
STEPS = {
    "eager": (False, None),
    "fused": (True, None),
    "compiled": (False, "default"),
    "fused-compiled": (True, "default"),
    "reduce-overhead": (False, "reduce-overhead"),
    "fused-reduce-overhead": (True, "reduce-overhead"),
}
CHAINS = [name for name, (_, mode) in STEPS.items() if DEVICE.type == "cuda" or mode != "reduce-overhead"]
BATCHES = {"cpu": (128,), "cuda": (128, 4096)}
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
DTYPES = {"cpu": ("fp32",), "cuda": ("fp32", "bf16")}


def _model(family: str, preset: str, fused: bool) -> Model:
    torch.manual_seed(0)
    return FAMILIES[family].build((1, 28, 28), preset=preset, fused=fused).to(DEVICE)


@lru_cache(maxsize=1)
def _error(family: str, preset: str, batch: int) -> float:
    """How far the fused loss is from the ordinary one, over what is allowed."""
    images = _images(batch)
    with torch.no_grad():
        fused, plain = (_model(family, preset, kind).loss(images, seed=0)["loss"] for kind in (True, False))
    return LOSS.excess(fused, plain)


@lru_cache(maxsize=1)
def _images(batch: int) -> torch.Tensor:
    digits = load_dataset("digits").train
    return digits.repeat(-(-batch // len(digits)), 1, 1, 1)[:batch].to(DEVICE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["mlp", "conv"])
@pytest.mark.parametrize("batch", BATCHES[DEVICE.type])
@pytest.mark.parametrize("dtype", DTYPES[DEVICE.type])
@pytest.mark.parametrize("step", CHAINS)
def test_training_step(
    time_callable: Callable[..., None], family: str, preset: str, batch: int, dtype: str, step: str
) -> None:
    torch._dynamo.reset()
    error = _error(family, preset, batch)
    if not error <= 1:
        pytest.fail(f"no time: the fused loss differs from the ordinary one by {error:.3g} times what is allowed")
    fused, mode = STEPS[step]
    model, images = _model(family, preset, fused), _images(batch)
    if mode is not None:
        model.compile(mode=mode, dynamic=False)
    cuda = DEVICE.type == "cuda"
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=cuda)
    train = TrainStep(model, optimizer, amp_dtype=AUTOCAST[dtype])

    def call() -> None:
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        train(images)

    time_callable(
        lambda: call, kind="step", capture=mode != "reduce-overhead", op="training step", case=f"{family} {preset}",
        shape=(batch, 1, 28, 28), dtype=dtype, mode="", place="", chain=step, error=error if fused else None,
    )  # fmt: skip
