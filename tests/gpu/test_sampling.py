"""Sampling on a GPU: a step as one CUDA graph gives the images of eager steps, and neither waits for the device."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("huggingface_hub", reason="genfast.models needs huggingface_hub")

from genfast.models import DDPM, UNet
from genfast.models.diffusion import _Sampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPE = (1, 16, 16)
SCHEDULES = [
    {},
    {"schedule": "cosine", "objective": "v", "variance": "fixed_large"},
    {"variance": "learned_range"},
    {"schedule": "rectified-flow"},
    {"schedule": "edm"},
    {"fused": False},
]


def ddpm(**options):
    torch.manual_seed(0)
    learned = options.get("variance") == "learned_range"
    net = UNet(SHAPE, "tiny", channels=16, out_channels=2 if learned else 1)
    nn.init.normal_(net.head.weight, std=0.05)
    return DDPM(net, image_shape=SHAPE, **options).cuda()


def agree(model, **options):
    """Captured and eager images of one seed; the graph is there."""
    images = model.sample(8, steps=10, **options)
    assert model._kept[2].graph is not None
    eager = model.sample(8, steps=10, capture=False, **options)
    assert images.std() > 0.01
    torch.testing.assert_close(images, eager, rtol=0, atol=1e-3)
    return images


@pytest.mark.parametrize("options", SCHEDULES)
@pytest.mark.parametrize("trajectory", [False, True])
def test_a_graph_draws_the_images_of_eager_steps(options, trajectory):
    model = ddpm(**options)
    first = agree(model, seed=1, trajectory=trajectory)
    graph = model._kept[2].graph
    second = agree(model, seed=2, trajectory=trajectory)
    assert model._kept[2].graph is graph
    assert not torch.allclose(first, second, atol=0.01)
    torch.testing.assert_close(agree(model, seed=1, trajectory=trajectory), first, rtol=0, atol=0)


def test_a_graph_follows_the_weights():
    model = ddpm()
    before = agree(model, seed=1)
    graph = model._kept[2].graph
    with torch.no_grad():
        model.net.head.bias += 0.3
    assert not torch.allclose(agree(model, seed=1), before, atol=0.01)
    assert model._kept[2].graph is graph


def test_other_options_have_a_graph_of_their_own():
    model = ddpm()
    agree(model, seed=1)
    for change in ({"row_offset": 5}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 0.5}):
        graph = model._kept[2].graph
        agree(model, seed=1, **change)
        assert model._kept[2].graph is not graph
    model.clip_x0 = 0.1
    assert agree(model, seed=1).max() <= 0.56
    # Parameters at another place.
    model.net.head = nn.Conv2d(16, 1, 3, padding=1).cuda()
    agree(model, seed=1)
    # Pieces, each with its own row_offset.
    pieces = model.sample(20, steps=10, seed=1, batch_size=8)
    torch.testing.assert_close(pieces, model.sample(20, steps=10, seed=1, capture=False), rtol=0, atol=1e-3)


def test_weights_that_autocast_has_cast_are_not_in_the_graph():
    """It frees them when its block ends; what lies in their place then must not show."""
    model = ddpm()
    with torch.autocast("cuda", torch.bfloat16):
        first = model.sample(8, steps=10, seed=1)
    graph = model._kept[2].graph
    rubbish = [torch.full((1 << 16,), float("nan"), dtype=torch.bfloat16, device="cuda") for _ in range(200)]
    with torch.autocast("cuda", torch.bfloat16):
        again = model.sample(8, steps=10, seed=1)
        eager = model.sample(8, steps=10, seed=1, capture=False)
    assert model._kept[2].graph is graph
    del rubbish
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    torch.testing.assert_close(again, eager, rtol=0, atol=0.1)
    full = agree(model, seed=1)
    torch.testing.assert_close(again, full, rtol=0, atol=0.2)


@pytest.mark.parametrize("options", SCHEDULES)
def test_a_step_does_not_wait(options):
    model = ddpm(**options).eval()
    sampling = _Sampling(model, 4, model.schedule.timesteps(5), 1.0, 0)
    seed = torch.tensor([3], device="cuda")
    with torch.no_grad():
        sampling.start(seed)
        sampling()
        torch.cuda.set_sync_debug_mode("error")
        try:
            sampling.start(seed)
            for _ in range(5):
                sampling()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sampling.x.isfinite().all()


def test_a_network_that_waits_samples_eagerly():
    class Waiting(nn.Conv2d):
        def forward(self, x, t):
            return super().forward(x) * (1.0 if t[0].item() > 500 else 0.5)

    model = DDPM(Waiting(1, 1, 3, padding=1), image_shape=SHAPE).cuda()
    with pytest.warns(UserWarning, match="sample: a step waits for the device"):
        images = model.sample(8, steps=10, seed=1)
    torch.testing.assert_close(images, model.sample(8, steps=10, seed=1, capture=False), rtol=0, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sample(8, steps=10, seed=2)
