"""50 steps of DDIM with a U-Net: genfast's loop, diffusers' loop around the same network, and the network alone.

"net" calls the network as often as the loops do, and "net-graph" replays it as often from a CUDA graph: what any loop
must take. The loops start from the same noise, and what comes out must agree with diffusers' before any is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache

import pytest
import torch
from torch import Tensor

import genfast
from genfast.cases import Tolerance
from genfast.random import Stream, as_seed, normal

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = 50
SEED = 3
# A CPU would take minutes for a network of the usual size.
SHAPE = {"cuda": (64, 1, 32, 32), "cpu": (8, 1, 8, 8)}[DEVICE.type]
NETWORK = {"cuda": {"preset": "small"}, "cpu": {"preset": "tiny", "channels": 8, "num_res_blocks": 1}}[DEVICE.type]
LOOPS = ["eager", "fused", "diffusers", "net"] + ["fused-graph", "net-graph"] * (DEVICE.type == "cuda")
DTYPES = {"cpu": ("fp32",), "cuda": ("fp32", "bf16")}[DEVICE.type]
# 50 steps of a network in fp32, and under autocast, where every step rounds.
TOLERANCES = {"fp32": Tolerance(0.0, 1e-3), "bf16": Tolerance(0.0, 0.2)}


@lru_cache(maxsize=1)
def _model() -> genfast.DDPM:
    torch.manual_seed(0)
    model = genfast.DDPM(genfast.UNet(SHAPE[1:], **NETWORK), image_shape=SHAPE[1:])
    # A network that answers: it starts with zeros at the end.
    torch.nn.init.normal_(model.net.head.weight, std=0.02)
    return model.to(DEVICE).eval()


@torch.no_grad()
def _theirs(model: genfast.DDPM) -> Tensor:
    scheduler = diffusers.DDIMScheduler(set_alpha_to_one=True, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS, device=DEVICE)
    x = normal(as_seed(SEED, DEVICE), SHAPE[0], math.prod(SHAPE[1:]), Stream.PRIOR).reshape(SHAPE)
    for t in scheduler.timesteps:
        pred = model.net(x, t.expand(SHAPE[0]))
        x = scheduler.step(pred, t, x, use_clipped_model_output=True).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


def _ours(model: genfast.DDPM, fused: bool, capture: bool) -> Tensor:
    model.fused = fused
    return model.sample(SHAPE[0], steps=STEPS, sampler="ddim", seed=SEED, capture=capture)


def _net(model: genfast.DDPM) -> Callable[[], None]:
    x, t = torch.randn(SHAPE, device=DEVICE), torch.zeros(SHAPE[0], dtype=torch.int64, device=DEVICE)

    @torch.no_grad()
    def call() -> None:
        for _ in range(STEPS):
            model.net(x, t)

    return call


def _net_graph(model: genfast.DDPM, autocast: Callable) -> Callable[[], None]:
    x, t = torch.randn(SHAPE, device=DEVICE), torch.zeros(SHAPE[0], dtype=torch.int64, device=DEVICE)

    @torch.no_grad()
    def once() -> None:
        # The casts of the weights belong to each call, as they do in the graph of a step.
        with autocast(cache_enabled=False):
            model.net(x, t)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()

    def call() -> None:
        for _ in range(STEPS):
            graph.replay()

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loop", LOOPS)
def test_sampling(time_callable: Callable[..., None], dtype: str, loop: str) -> None:
    model = _model()

    def autocast(**options: bool) -> object:
        return torch.autocast(DEVICE.type, torch.bfloat16, **options) if dtype == "bf16" else nullcontext()

    calls = {
        "eager": lambda: _ours(model, fused=False, capture=False),
        "fused": lambda: _ours(model, fused=True, capture=False),
        "fused-graph": lambda: _ours(model, fused=True, capture=True),
        "diffusers": lambda: _theirs(model),
    }
    error = None
    if loop in calls:
        call = calls[loop]
        with autocast():
            error = TOLERANCES[dtype].excess(call(), _theirs(model))
        if not error <= 1:
            pytest.fail(f"no time: the images differ from diffusers' by {error:.3g} times what is allowed")
    else:
        call = _net_graph(model, autocast) if loop == "net-graph" else _net(model)

    def timed() -> None:
        with autocast():
            call()

    time_callable(
        lambda: timed, kind="program", op="sampling", case=f"ddpm, {STEPS} steps of DDIM", shape=SHAPE, dtype=dtype,
        mode="", place="", chain=loop, error=error if loop.startswith("fused") else None,
    )  # fmt: skip
