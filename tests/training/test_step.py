"""One optimizer step: the same as written out by hand."""

import copy

import pytest
import torch

from genfast.models import VAE
from genfast.training import TrainStep, load_dataset


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VAE(latent_dim=3, hidden_dims=(16,))


@pytest.fixture(scope="module")
def images():
    return load_dataset("digits").train[:32]


def test_equals_a_hand_written_step(model, images):
    by_hand = copy.deepcopy(model)
    step = TrainStep(model, torch.optim.Adam(model.parameters(), lr=1e-2), loss_options={"beta": 3.0})
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=1e-2)
    for seed in range(3):
        parts = step(images, seed=seed, row_offset=5)
        optimizer.zero_grad()
        loss = by_hand.loss(images, beta=3.0, seed=seed, row_offset=5)["loss"]
        loss.backward()
        optimizer.step()
        assert torch.equal(parts["loss"], loss.detach())
        assert not any(value.requires_grad for value in parts.values())
    for parameter, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_an_int_seed_and_a_tensor_seed_are_the_same(model, images):
    other = copy.deepcopy(model)
    first = TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1))(images, seed=7)
    second = TrainStep(other, torch.optim.SGD(other.parameters(), lr=0.1))(images, seed=torch.tensor([7]))
    assert torch.equal(first["loss"], second["loss"])


def test_any_module_with_a_loss_gets_its_seed_as_a_tensor():
    class Shift(torch.nn.Linear):
        def loss(self, x, *, seed, row_offset, scale):
            assert seed.dtype == torch.int64
            assert seed.tolist() == [7]
            return {"loss": scale * self(x).square().mean(), "rows": torch.tensor(row_offset)}

    shift = Shift(2, 2)
    step = TrainStep(shift, torch.optim.SGD(shift.parameters(), lr=0.1), loss_options={"scale": 2.0})
    assert set(step(torch.ones(4, 2), seed=7)) == {"loss", "rows", "grad_norm"}


def test_without_a_seed_torch_decides(model, images):
    step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0))
    torch.manual_seed(1)
    first, other = step(images)["nll"], step(images)["nll"]
    torch.manual_seed(1)
    assert torch.equal(step(images)["nll"], first)
    assert not torch.equal(other, first)


def test_gradients_are_clipped(model, images):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    parts = TrainStep(model, torch.optim.SGD(model.parameters(), lr=1.0), grad_clip=0.01)(images, seed=0)
    assert parts["grad_norm"] > 1
    moved = sum((old - new.detach()).square().sum().item() for old, new in zip(before, model.parameters(), strict=True))
    assert moved**0.5 == pytest.approx(0.01, rel=1e-3)


def test_autocast(model, images):
    seen = []
    model.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.01), amp_dtype=torch.bfloat16)
    assert step(images, seed=0)["loss"].isfinite()
    assert seen == [torch.bfloat16]
    assert model.fc1.weight.dtype == torch.float32


def test_a_compiled_step_is_compiled_once_for_all_seeds(model, images):
    eager = copy.deepcopy(model)
    step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=1e-3), compile=True)
    reference = TrainStep(eager, torch.optim.SGD(eager.parameters(), lr=1e-3))
    assert step(images, seed=0)["loss"] == pytest.approx(float(reference(images, seed=0)["loss"]), rel=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in (1, 2):
            compiled, plain = step(images, seed=seed), reference(images, seed=seed)
            assert float(compiled["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-4)


def test_errors(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="grad_clip: expected a positive number or None, got 0"):
        TrainStep(model, optimizer, grad_clip=0)
    with pytest.raises(ValueError, match="amp_dtype: expected"):
        TrainStep(model, optimizer, amp_dtype=torch.int8)
