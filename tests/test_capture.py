"""What there is to graphs without a GPU: which batches one takes, and why there is none. The rest is in tests/gpu."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from genfast.capture import _reason
from genfast.training import TrainStep


class Net(nn.Linear):
    def loss(self, x, *, seed, row_offset):
        return {"loss": self(x).mean()}


def step():
    net = Net(3, 1)
    return TrainStep(net, SGD(net.parameters(), lr=0.1, fused=True))


def test_the_first_batch_decides_which_ones_a_graph_takes():
    taken = step()
    first, seed = torch.ones(4, 3), torch.tensor([1])
    assert taken._fits(first, seed, 0)
    batch, fixed_seed, _ = taken._fixed
    assert taken._fits(2 * first, torch.tensor([5]), 0)
    # In the memory that the graph reads, which is not the caller's.
    assert taken._fixed[0] is batch
    assert torch.equal(batch, 2 * first)
    assert fixed_seed.tolist() == [5]
    assert first.eq(1).all()
    assert seed.tolist() == [1]
    others = (torch.ones(3, 3), 0), (torch.ones(4, 3, dtype=torch.float64), 0), (torch.ones(4, 3), 4)
    assert not any(taken._fits(other, seed, row_offset) for other, row_offset in others)
    assert torch.equal(batch, 2 * first)
    assert fixed_seed.tolist() == [5]


class _Ending:
    def __enter__(self):
        pass

    def __exit__(self, *error):
        raise RuntimeError("operation failed due to a previous error during capture")


def test_the_reason_is_the_first_error():
    """Where a capture was broken, ending it raises an error that says no more than that."""
    with pytest.raises(RuntimeError) as raised, _Ending():
        raise RuntimeError("operation not permitted when stream is capturing\nand so on")
    assert str(raised.value) == "operation failed due to a previous error during capture"
    assert _reason(raised.value) == "operation not permitted when stream is capturing"
    assert _reason(ValueError()) == "ValueError"
