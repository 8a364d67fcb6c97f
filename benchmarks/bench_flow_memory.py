"""A stack of couplings over its depth: a training step's time, and what its forward pass keeps for the backward.

"checkpoint" is torch.utils.checkpoint around each coupling. What is kept is in the column saved_bytes of
pytest-benchmark's JSON, and in the picture that scripts/picture_of_flow_memory.py draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from genfast import Flow
from genfast.bench.memory import saved_bytes
from genfast.flows import Coupling
from genfast.models.flow_networks import GlowNet

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEPTHS = {"cpu": (8, 32), "cuda": (4, 8, 16, 32, 64)}[DEVICE.type]
# Batch, channels, height, width; and the channels within the networks.
SHAPE = {"cpu": (8, 8, 14, 14), "cuda": (64, 12, 16, 16)}[DEVICE.type]
HIDDEN = {"cpu": 32, "cuda": 256}[DEVICE.type]
MEMORY = ("ordinary", "checkpoint", "reversible")


def make_flow(depth: int, memory: str) -> Flow:
    """Affine couplings of channel halves, in turns, that do not start as the identity."""
    torch.manual_seed(0)
    channels = SHAPE[1]
    nets = [GlowNet(channels // 2, channels, HIDDEN) for _ in range(depth)]
    for net in nets:
        torch.nn.init.normal_(net.last.weight, std=0.01)
    transforms = [Coupling(net, "channel", swap=index % 2 == 1) for index, net in enumerate(nets)]
    return Flow(transforms, memory=memory, data_shape=SHAPE[1:]).to(DEVICE)


def make_step(flow: Flow) -> Callable[[], Any]:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def step() -> None:
        flow.zero_grad(set_to_none=True)
        flow.loss(x)["loss"].backward()

    return step


def kept(flow: Flow) -> int:
    """Bytes that a forward pass keeps."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return saved_bytes(lambda: flow.loss(x), DEVICE)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("depth", DEPTHS)
def test_flow_memory(time_callable: Callable[..., None], benchmark: Any, depth: int, memory: str) -> None:
    flow, ordinary = make_flow(depth, memory), make_flow(depth, "ordinary")
    make_step(flow)(), make_step(ordinary)()
    # To 1e-5 of the largest gradient of each parameter.
    pairs = [(a.grad, b.grad) for a, b in zip(flow.parameters(), ordinary.parameters(), strict=True)]
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs) / 1e-5
    if not error <= 1:
        pytest.fail(f"no time: the gradients of {memory} differ by {error:.3g} times what is allowed")
    step = make_step(flow)
    benchmark.extra_info["saved_bytes"] = kept(flow)
    time_callable(
        lambda: step, kind="step", capture=False, op="flow memory", case=f"{depth} couplings", shape=SHAPE,
        dtype="fp32", mode="", place="", chain=memory, error=error if memory == "reversible" else None,
    )  # fmt: skip
