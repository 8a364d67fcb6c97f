"""Training for long takes no more memory than training for a moment."""

import gc
import os
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from genfast.models import VAE
from genfast.training import DeviceDataset, TrainStep

STEPS = 1000
WARM_UP = 50


@pytest.fixture(params=["batches", "a source"])
def run(request):
    """Takes so many steps, each as demanding as can be, and looks at the losses now and then as a loop does."""
    torch.manual_seed(0)
    model = VAE(latent_dim=2, hidden_dims=(4,), image_shape=(1, 4, 4))
    optimizer = Adam(model.parameters(), fused=True)
    images = torch.randint(0, 256, (64, 1, 4, 4), dtype=torch.uint8)
    feed = DeviceDataset(images, binarize="dynamic").feed(16, seed=0)
    step = TrainStep(
        model, optimizer, source=feed, micro_batches=2, grad_clip=1.0, ema_decay=0.9,
        scheduler=CosineAnnealingLR(optimizer, 100),
    )  # fmt: skip

    def run(steps):
        for index in range(steps):
            if request.param == "batches":
                step(images[:16], seed=index)
            else:
                if index % feed.steps == 0:
                    feed.start(1 + index // feed.steps)
                step()
            if index % 25 == 24:
                step.failed(), step.means()

    run(WARM_UP)
    return run


def live_tensors():
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def test_no_tensor_is_left_behind(run):
    before = live_tensors()
    run(STEPS)
    assert live_tensors() == before


def test_no_python_object_is_left_behind(run):
    tracemalloc.start()
    try:
        run(WARM_UP)
        gc.collect()
        before = tracemalloc.take_snapshot()
        run(STEPS)
        gc.collect()
        after = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    # What tracemalloc itself holds is not of the steps.
    without = [tracemalloc.Filter(False, tracemalloc.__file__)]
    changes = after.filter_traces(without).compare_to(before.filter_traces(without), "lineno")
    grown = sum(change.size_diff for change in changes)
    # An object of 16 bytes, the smallest there is, in each step.
    assert grown < 16 * STEPS, "\n".join(map(str, changes[:10]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, which Linux has")
def test_the_process_does_not_grow(run):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    # The allocator takes a while to settle.
    run(STEPS)
    before = resident()
    run(STEPS)
    # 1 KiB a step.
    assert resident() - before < 1024 * STEPS
