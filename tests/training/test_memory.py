"""Training for long takes no more memory than training for a moment."""

import gc
import os
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from genfast import random
from genfast.training import DeviceDataset, TrainStep

STEPS = 1000
# After some hundred steps the allocators and torch's tables have what they need.
WARM_UP = 300


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(16, 4), nn.BatchNorm1d(4)

    def loss(self, x, *, seed, row_offset):
        noise = random.normal(seed, len(x), 4, random.Stream.LATENT, row_offset=row_offset)
        return {"loss": (self.norm(self.layer(x.flatten(1) / 255)) - noise).square().mean()}


@pytest.fixture
def run():
    """Takes so many steps, half of them from a source, and looks at the losses now and then as a loop does."""
    model = Net()
    optimizer = Adam(model.parameters(), fused=True)
    images = torch.randint(0, 256, (64, 1, 4, 4), dtype=torch.uint8)
    feed = DeviceDataset(images, binarize="dynamic").feed(16, seed=0)
    scheduler = CosineAnnealingLR(optimizer, 100)
    step = TrainStep(model, optimizer, source=feed, grad_clip=1.0, ema_decay=0.9, scheduler=scheduler)

    def run(steps):
        for index in range(0, steps, 2):
            if index % (2 * feed.steps) == 0:
                feed.start(1 + index // (2 * feed.steps))
            step()
            step(images[:16], seed=index)
            if index % 50 == 0:
                step.failed(), step.means(), step.state()

    run(WARM_UP)
    return run


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_no_object_is_left_behind(run):
    tracemalloc.start()
    try:
        # Free lists are full of what was allocated before the tracing, and is not in the account.
        run(WARM_UP)
        tensors, before = live_tensors(), tracemalloc.take_snapshot()
        # Twice as many: what Python keeps for reuse varies by some 40 KB, however many steps there are.
        run(2 * STEPS)
        assert live_tensors() == tensors
        after = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    # What tracemalloc itself holds is not of the steps.
    without = [tracemalloc.Filter(False, tracemalloc.__file__)]
    changes = after.filter_traces(without).compare_to(before.filter_traces(without), "lineno")
    # An object of 32 bytes in each step: a float with its place in a list.
    assert sum(change.size_diff for change in changes) < 32 * 2 * STEPS, "\n".join(map(str, changes[:10]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, which Linux has")
def test_the_process_does_not_grow(run):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    run(STEPS)
    # 1 KiB a step: a batch is 4, in the dtype of the weights.
    assert resident() - before < 1024 * STEPS
