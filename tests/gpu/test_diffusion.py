"""Diffusion on a GPU: steps in CUDA graphs draw fresh noise, and captured sampling gives what eager sampling gives."""

from __future__ import annotations

import pytest
import torch

from genfast import schedules
from genfast.functional import denoising_loss, q_sample, reverse_step

pytest.importorskip("huggingface_hub", reason="genfast.models needs huggingface_hub")

from genfast.models import DDPM
from genfast.training import TrainStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"


def _captured(function):
    """A CUDA graph of a function, and what it returned while it was recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def test_a_captured_step_back_goes_on_in_time():
    """t is read from the device at each replay, and salts the noise."""
    schedule = schedules.linear(100).to(DEVICE)
    start = torch.randn(4, 3, 8, 8, device=DEVICE)
    x, seed = start.clone(), torch.tensor([5], device=DEVICE)
    t = torch.full((1,), 99, device=DEVICE)

    def step():
        x.copy_(reverse_step(x, 0.1 * x, t, t - 1, schedule, seed=seed, clip=1.0))
        t.sub_(1)

    graph, _ = _captured(step)
    x.copy_(start)
    t.fill_(99)
    for _ in range(100):
        graph.replay()
    replayed = x.clone()
    x.copy_(start)
    t.fill_(99)
    for _ in range(100):
        step()
    assert torch.equal(replayed, x)
    assert replayed.isfinite().all()


def test_a_captured_training_step_draws_fresh_noise_and_times():
    schedule = schedules.cosine(1000).to(DEVICE)
    x0 = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, device=DEVICE)
    weight = torch.ones((), device=DEVICE, requires_grad=True)
    grad = torch.zeros((), device=DEVICE)

    def step():
        noised = q_sample(x0, None, schedule)
        loss = denoising_loss(weight * noised.x_t, noised, schedule, objective="v", reduction="mean")
        grad.copy_(torch.autograd.grad(loss, weight)[0])
        return noised.t, loss

    graph, (t, loss) = _captured(step)
    seen = []
    for _ in range(4):
        graph.replay()
        seen.append((t.tolist(), loss.item(), grad.item()))
    assert len({tuple(times) for times, *_ in seen}) == 4
    assert len({value for _, value, _ in seen}) == 4
    assert len({value for *_, value in seen}) == 4


@pytest.mark.parametrize("options", [{}, {"schedule": "rectified-flow"}, {"schedule": "edm"}], ids=str)
def test_captured_sampling_equals_eager_sampling(options):
    torch.manual_seed(0)
    model = DDPM(image_shape=(1, 8, 8), preset="tiny", **options).to(DEVICE)
    for parameter in model.parameters():
        # The output begins at zero, where no difference would show.
        torch.nn.init.normal_(parameter, std=0.05)
    eager = model.sample(6, steps=12, seed=1, capture=False)
    for seed in (1, 1, 2):
        captured = model.sample(6, steps=12, seed=seed)
        same = torch.allclose(captured, eager, atol=1e-4)
        assert same == (seed == 1)
    # Weights that change in place are seen by the graph that was kept.
    with torch.no_grad():
        next(model.parameters()).mul_(-2.0)
    torch.testing.assert_close(
        model.sample(6, steps=12, seed=1), model.sample(6, steps=12, seed=1, capture=False), rtol=0, atol=1e-4
    )


def test_a_training_step_of_ddpm_is_captured():
    torch.manual_seed(0)
    model = DDPM(image_shape=(1, 8, 8), preset="tiny", schedule="cosine", objective="v").to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=True)
    step = TrainStep(model, optimizer, mode="graph", amp_dtype=torch.bfloat16)
    images = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8, device=DEVICE)
    losses = [float(step(images, seed=seed)["loss"]) for seed in range(12)]
    assert len(set(losses)) == 12
    assert losses[-1] < losses[0]
