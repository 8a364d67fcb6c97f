"""The average of the weights, against the formula in fp64."""

import pytest
import torch
from torch import nn

from genfast.training import EMA


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(5, 4), nn.BatchNorm1d(4)


def tensors(module):
    return [tensor.clone() for tensor in (*module.parameters(), *module.buffers())]


def change(model):
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn_like(tensor))
    model.norm(torch.randn(8, 4))


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_equals_the_formula(decay):
    model = Net()
    ema = EMA(model, decay)
    average = [weight.detach().double() for weight in model.parameters()]
    for update in range(60):
        change(model)
        ema.update()
        kept = min(decay, (1 + update) / (10 + update))
        average = [
            kept * old + (1 - kept) * weight.detach().double()
            for old, weight in zip(average, model.parameters(), strict=True)
        ]
        for weight, want in zip(ema.module.parameters(), average, strict=True):
            assert torch.allclose(weight.double(), want, rtol=1e-6, atol=1e-6)
    assert ema.updates == 60


def test_buffers_are_those_of_the_model():
    model = Net()
    ema = EMA(model, 0.9)
    for _ in range(2):
        change(model)
        ema.update(torch.tensor(True))
        assert all(map(torch.equal, ema.module.buffers(), model.buffers()))
    assert ema.module.norm.num_batches_tracked == 2
    # Copies, not the same memory.
    change(model)
    assert not torch.equal(ema.module.norm.running_mean, model.norm.running_mean)


def test_what_is_not_accepted_changes_nothing():
    model = Net()
    ema, other = EMA(model, 0.9), EMA(model, 0.9)
    change(model)
    ema.update()
    other.update()
    before = tensors(ema.module)
    with torch.no_grad():
        model.first.weight.add_(1)
    ema.update(torch.tensor(False))
    assert all(map(torch.equal, tensors(ema.module), before))
    assert ema.updates == 1
    change(model)
    ema.update(torch.tensor(True))
    other.update()
    assert all(map(torch.equal, tensors(ema.module), tensors(other.module)))


def test_the_average_is_for_evaluation_and_copied_back():
    model = Net()
    model.first.bias.requires_grad_(False)
    ema = EMA(model, 0.9)
    assert not any(module.training for module in ema.module.modules())
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    change(model)
    ema.update()
    want = tensors(ema.module)
    ema.copy_to(model)
    assert all(map(torch.equal, tensors(model), want))
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True, True]


@pytest.mark.parametrize("decay", [-0.1, 0.0, 1.0])
def test_a_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=f"ema_decay: expected a number between 0 and 1, got {decay}"):
        EMA(Net(), decay)
