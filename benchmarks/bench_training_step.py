"""A training step of each model (forward, loss, backward, Adam): fused, and the same model with `fused=False`.

The chains that end in "graph" hold the whole step in one CUDA graph, gather and optimizer included; for the others the
batch is there already. A step's host time is that of one call with nothing queued before it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch

from genfast.cases import LOSS
from genfast.models.base import Model
from genfast.models.registry import FAMILIES
from genfast.training import DeviceDataset, TrainStep, load_dataset

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# What each chain runs: fused or not, the mode of torch.compile if any, and the mode of `TrainStep`.
STEPS = {
    "eager": (False, None, "eager"),
    "fused": (True, None, "eager"),
    "compiled": (False, "default", "eager"),
    "fused-compiled": (True, "default", "eager"),
    "reduce-overhead": (False, "reduce-overhead", "eager"),
    "fused-reduce-overhead": (True, "reduce-overhead", "eager"),
    "graph": (False, None, "graph"),
    "fused-graph": (True, None, "graph"),
    "fused-compiled-graph": (True, "default", "graph"),
}
# The same with weights in that memory format, which convolutions alone notice.
CHANNELS_LAST = {f"{name}-channels-last": STEPS[name] for name in ("fused", "fused-compiled", "fused-compiled-graph")}
_GPU_ALONE = ("reduce-overhead", "graph")
# Of each family: the presets, the side of the images, and the batches on a CPU and on a GPU.
SIZES = {
    "vae": (("mlp", "conv"), 28, {"cpu": (128,), "cuda": (128, 4096)}),
    "ae": (("mlp", "conv"), 28, {"cpu": (128,), "cuda": (128, 4096)}),
    "ddpm": (("tiny",) if DEVICE.type == "cpu" else ("small",), 32, {"cpu": (4,), "cuda": (128,)}),
    "flow": (("tiny",) if DEVICE.type == "cpu" else ("small",), 28, {"cpu": (16,), "cuda": (128,)}),
}
# A GAN has no ops of its own: bench_gan_step.py.
assert SIZES.keys() == {name for name, family in FAMILIES.items() if "fused" in family.build_options}
CASES = [
    (family, preset, batch)
    for family, (presets, _, batches) in SIZES.items() for preset in presets for batch in batches[DEVICE.type]
]  # fmt: skip
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
DTYPES = {"cpu": ("fp32",), "cuda": ("fp32", "bf16")}


def _model(family: str, preset: str, fused: bool) -> Model:
    torch.manual_seed(0)
    side = SIZES[family][1]
    return FAMILIES[family].build((1, side, side), preset=preset, fused=fused).to(DEVICE)


@lru_cache(maxsize=1)
def _error(family: str, preset: str, batch: int) -> float:
    """How far the fused loss is from the ordinary one, over what is allowed."""
    images = _images(batch, SIZES[family][1])
    with torch.no_grad():
        fused, plain = (_model(family, preset, kind).loss(images, seed=0)["loss"] for kind in (True, False))
    return LOSS.excess(fused, plain)


@lru_cache(maxsize=1)
def _images(batch: int, side: int) -> torch.Tensor:
    digits = load_dataset("digits", image_size=side).train
    return digits.repeat(-(-batch // len(digits)), 1, 1, 1)[:batch].to(DEVICE)


def _chains(family: str) -> list[str]:
    chains = [*STEPS, *(CHANNELS_LAST if family == "ddpm" else ())]
    return [name for name in chains if DEVICE.type == "cuda" or not any(word in name for word in _GPU_ALONE)]


@pytest.mark.parametrize(
    ("family", "preset", "batch", "dtype", "step"),
    [(*case, dtype, step) for case in CASES for dtype in DTYPES[DEVICE.type] for step in _chains(case[0])],
)
def test_training_step(
    time_callable: Callable[..., None], family: str, preset: str, batch: int, dtype: str, step: str
) -> None:
    torch._dynamo.reset()
    error = _error(family, preset, batch)
    if not error <= 1:
        pytest.fail(f"no time: the fused loss differs from the ordinary one by {error:.3g} times what is allowed")
    fused, compile_mode, mode = {**STEPS, **CHANNELS_LAST}[step]
    model, images = _model(family, preset, fused), _images(batch, SIZES[family][1])
    if step in CHANNELS_LAST:
        model = model.to(memory_format=torch.channels_last)
    if compile_mode is not None:
        model.compile(mode=compile_mode, dynamic=False)
    cuda = DEVICE.type == "cuda"
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=cuda)
    train = TrainStep(model, optimizer, mode=mode, amp_dtype=AUTOCAST[dtype])
    call = _from_feed(train, images) if mode == "graph" else lambda: train(images)
    if compile_mode == "reduce-overhead":
        call = _marked(call)
    replayed = any(word in step for word in _GPU_ALONE)
    time_callable(
        # What replays graphs of its own cannot be captured in another.
        lambda: call, kind="step", capture=not replayed, op="training step", case=f"{family} {preset}",
        shape=tuple(images.shape), dtype=dtype, mode="", place="", chain=step, error=error if fused else None,
    )  # fmt: skip


def _from_feed(train: TrainStep, images: torch.Tensor) -> Callable[[], object]:
    """Steps that take their batches themselves, epoch after epoch."""
    batch, side = len(images), images.shape[3]
    data = DeviceDataset(_images(max(batch, len(load_dataset("digits").train)), side))
    train.source = data.feed(batch, seed=0)
    done = 0

    def call() -> None:
        nonlocal done
        if done % train.source.steps == 0:
            train.source.start(epoch=done // train.source.steps + 1)
        done += 1
        train()

    return call


def _marked(call: Callable[[], object]) -> Callable[[], object]:
    """Without the mark each call of mode="reduce-overhead" would wait for the one before."""

    def marked() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        call()

    return marked
