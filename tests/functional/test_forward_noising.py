"""forward_noising: the matrix, and bad input."""

from __future__ import annotations

import pytest
import torch

from genfast.cases import cases
from genfast.functional import forward_noising
from tests.matrix import OpMatrix
from tests.oracles import linear_gaussian


class TestForwardNoising(OpMatrix):
    cases = cases("forward_noising")
    oracle = staticmethod(linear_gaussian.forward_noising)


X0, ROW = torch.zeros(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X0, ROW, 0.5), TypeError, "b: expected a tensor, got float"),
        ((X0, ROW.bfloat16(), ROW), TypeError, "a: expected fp32, got torch.bfloat16"),
        ((X0, ROW, torch.zeros(3)), ValueError, r"b: expected one number for each sample, shape \[2\], got \[3\]"),
        ((X0, ROW.to("meta"), ROW), ValueError, "a: expected the device of x0, cpu, got meta"),
        ((X0, ROW, torch.zeros(2, requires_grad=True)), ValueError, "b: expected a tensor that needs no gradient"),
        ((X0.int(), ROW, ROW), TypeError, "x0: expected fp32, bf16, fp16 or fp64, got torch.int32"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        forward_noising(*arguments)


def test_dtype_of_the_result(device):
    a, b = torch.tensor([0.6, 0.8], device=device), torch.tensor([0.8, 0.6], device=device)
    x0 = torch.randn(2, 50, device=device)
    wide = forward_noising(x0, a, b, seed=0)
    narrow = forward_noising(x0, a, b, seed=0, dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), wide, rtol=2**-7, atol=5e-6)
