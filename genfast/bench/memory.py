"""How much a forward pass keeps for its backward pass."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["saved_bytes"]


def saved_bytes(forward: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Bytes that are alive after a forward pass, its result held, and were not before: what it keeps for backward.

    Whatever holds them counts: the graph of autograd, or what a checkpoint keeps beside it. A call before the one that
    is measured pays for what is kept for ever, such as workspaces.

    Args:
        forward: returns what holds the graph.
        device: where it runs.

    Example:
        >>> x = torch.ones(1000, requires_grad=True)
        >>> saved_bytes(lambda: x.exp().exp())
        8000
    """
    forward()
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        held = forward()
        torch.cuda.synchronize(device)
        alive = torch.cuda.memory_allocated(device) - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            held = forward()
        alive = sum(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    del held
    return alive
