"""GANs on a GPU: alternate steps as CUDA graphs, and the penalties within them."""

from __future__ import annotations

import copy

import pytest
import torch

from genfast.cases import LOSS

pytest.importorskip("huggingface_hub", reason="genfast.training needs huggingface_hub")

from genfast.models import GAN
from genfast.training import TrainStep, load_dataset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"
# Each kind of step is captured at its fourth call: with r1_every 3 and n_critic 2 there are three kinds of them.
STEPS = 36
MODELS = {
    "r1": {"r1": 1.0, "r1_every": 3},
    "wgan-gp": {"loss": "wgan-gp", "n_critic": 2},
    "spectral norm": {"loss": "hinge", "spectral_norm": True, "preset": "mlp"},
    "all": {"r1": 1.0, "r1_every": 3, "n_critic": 2},
}


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", MODELS)
def test_alternate_steps_as_graphs_are_what_they_are_eagerly(options, amp):
    images = load_dataset("digits").train.to(DEVICE)
    torch.manual_seed(0)
    model = GAN(width=8, **MODELS[options]).to(DEVICE)
    steps = []
    for mode in ("graph", "eager"):
        own = copy.deepcopy(model)
        steps.append(TrainStep(own, own.make_optimizer(2e-4, fused=True), mode=mode, amp_dtype=amp, ema_decay=0.9))
    found = [[], []]
    for seed in range(STEPS):
        batch = images[64 * seed : 64 * seed + 64]
        for step, losses in zip(steps, found, strict=True):
            losses.append(step(batch, seed=seed)["loss"].clone())
    graph, eager = steps
    assert len(graph._captured) == len({model.turns(step) for step in range(STEPS)})
    assert all(captured.graph is not None for captured in graph._captured.values())
    got, want = (torch.stack(losses) for losses in found)
    if amp is None:
        # Before the first capture they are the same calls.
        assert LOSS.excess(got[:3], want[:3]) <= 1
    assert torch.allclose(got, want, rtol=2e-2, atol=2e-2)
    assert graph.failed() == eager.failed() == 0
    assert graph.means().keys() == eager.means().keys()
    one, other = (step.ema.module.sample(16, seed=1) for step in steps)
    assert torch.allclose(one, other, atol=5e-2)


def test_a_penalised_step_of_a_compiled_gan():
    images = load_dataset("digits").train[:64].to(DEVICE)
    torch.manual_seed(0)
    model = GAN(width=8, r1=1.0).to(DEVICE)
    plain = copy.deepcopy(model)
    model.compile()
    for turn in ("discriminator_r1", "discriminator", "generator"):
        got, want = (one.loss(images, turn=turn, seed=1)["loss"] for one in (model, plain))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        got.backward(), want.backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        error = (one.grad - other.grad).norm() / other.grad.norm()
        assert error < 1e-2, name
