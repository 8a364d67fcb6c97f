"""bernoulli_nll: the matrix, confident logits, uint8 images, the stored gradient, and bad input."""

from __future__ import annotations

import functools

import mpmath
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from genfast.cases import cases
from genfast.functional import bernoulli_nll
from tests.matrix import OpMatrix
from tests.oracles import bernoulli


class TestBernoulliNll(OpMatrix):
    cases = cases("bernoulli_nll")
    oracle = staticmethod(bernoulli.bernoulli_nll)


@pytest.mark.parametrize("uint8", [False, True])
def test_confident_and_right_logits_keep_their_digits(uint8, device):
    """log(1 + e^-l) and its gradient, where a sum with 1 would leave nothing."""
    logits = torch.tensor([0.0, 0.5, 1.0, 3.0, 10.0, 17.0, 30.0, 60.0, 80.0], device=device)
    logits = torch.cat([logits, -logits])[:, None].requires_grad_()
    x = (logits.detach() >= 0).float()
    x[len(x) // 2] = 0.0
    x = (255 * x).to(torch.uint8) if uint8 else x
    nll = bernoulli_nll(logits, x)
    nll.sum().backward()
    with mpmath.workdps(60):
        for logit, target, got, grad in zip(
            logits.flatten().tolist(), x.flatten().tolist(), nll.tolist(), logits.grad.flatten().tolist(), strict=True
        ):
            signed = mpmath.mpf(logit) if target else -mpmath.mpf(logit)
            want = mpmath.log1p(mpmath.exp(-signed))
            slope = (-1 if target else 1) / (1 + mpmath.exp(signed))
            # The exponential's own argument is rounded to 24 bits: |l| 2^-24 relative.
            allowed = 1e-6 + abs(logit) * 2**-23
            assert abs((got - want) / want) < allowed, (logit, got, float(want))
            assert abs((grad - slope) / slope) < allowed, (logit, grad, float(slope))


def test_uint8_is_x_over_255(device):
    logits = torch.randn(4, 784, device=device)
    x = torch.randint(0, 256, (4, 784), dtype=torch.uint8, device=device)
    torch.testing.assert_close(bernoulli_nll(logits, x), bernoulli_nll(logits, x.float() / 255), rtol=1e-6, atol=0.0)


def test_bool_is_zero_or_one(device):
    logits = torch.randn(4, 784, device=device)
    x = torch.rand(4, 784, device=device) < 0.5
    assert torch.equal(bernoulli_nll(logits, x), bernoulli_nll(logits, x.float()))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_reductions_and_the_gradient_of_targets(reduction, dtype, device):
    logits = (3 * torch.randn(4, 30, device=device)).to(dtype).requires_grad_()
    x = torch.rand(4, 30, device=device, dtype=dtype).requires_grad_()
    ours = bernoulli_nll(logits, x, reduction=reduction)
    ours.sum().backward()
    grads = logits.grad.clone(), x.grad.clone()
    logits.grad = x.grad = None
    per_sample = F.binary_cross_entropy_with_logits(logits.float(), x.float(), reduction="none").sum(1)
    theirs = {"none": per_sample, "mean": per_sample.mean(), "sum": per_sample.sum()}[reduction]
    theirs.sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0.0)
    for got, want in zip(grads, (logits.grad, x.grad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_stored_gradient_is_scaled_by_what_comes_in(factor, device):
    logits = torch.randn(4, 5000, device=device, requires_grad=True)
    x = torch.rand(4, 5000, device=device)
    (factor * bernoulli_nll(logits, x, reduction="mean")).backward()
    stored, logits.grad = logits.grad, None
    (factor * bernoulli_nll(logits, x).mean()).backward()
    torch.testing.assert_close(stored, logits.grad, rtol=1e-6, atol=1e-9)


def test_the_mean_compiles_once_for_every_batch_size(device):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    mean = functools.partial(bernoulli_nll, reduction="mean")
    compiled = torch.compile(mean, backend=counter, fullgraph=True)
    for batch in (8, 16, 24, 40):
        compiled(torch.randn(batch, 30, device=device, requires_grad=True), torch.rand(batch, 30, device=device))
    assert counter.frame_count == 2


def test_no_gradient_is_computed_where_none_is_wanted(device):
    logits, x = torch.randn(4, 50, device=device), torch.rand(4, 50, device=device)
    want = bernoulli_nll(logits, x).mean()
    assert not bernoulli_nll(logits, x, reduction="mean").requires_grad
    with torch.no_grad():
        torch.testing.assert_close(bernoulli_nll(logits.requires_grad_(), x, reduction="mean"), want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 4)}, ValueError, r"x: expected the shape of logits, \[2, 3\], got \[2, 4\]"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x: expected a float, bool or uint8 tensor, got"),
        ({"logits": torch.zeros(2, 3, dtype=torch.uint8)}, TypeError, "logits: expected fp32, bf16, fp16 or fp64"),
        ({"reduction": "average"}, ValueError, "reduction: expected .* got 'average'"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        bernoulli_nll(**{"logits": torch.zeros(2, 3), "x": torch.zeros(2, 3), **change})
