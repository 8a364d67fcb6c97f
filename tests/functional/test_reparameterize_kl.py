"""reparameterize_kl and its KL: the matrix, the accuracy that the issue of cancellation asks for, and bad input."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch

from genfast.cases import cases
from genfast.functional import reparameterize_kl
from genfast.random import Stream, normal
from tests.matrix import OpMatrix
from tests.oracles import gaussian


class TestReparameterizeKl(OpMatrix):
    cases = cases("reparameterize_kl")
    oracle = staticmethod(gaussian.reparameterize_kl)


GRID = [sign * 10.0**power for power in (-5, -4, -3, -2, -1, -0.5, 0, 0.5, 1) for sign in (-1, 1)]


def _mp_kl(mu: float, logvar: float) -> mpmath.mpf:
    with mpmath.workdps(60):
        return (mpmath.mpf(mu) ** 2 + mpmath.expm1(mpmath.mpf(logvar)) - mpmath.mpf(logvar)) / 2


def test_kl_is_accurate_from_the_prior_to_far_away(device):
    mu = torch.tensor(GRID, device=device)[:, None].expand(-1, len(GRID)).reshape(-1, 1)
    logvar = torch.tensor(GRID, device=device).repeat(len(GRID)).reshape(-1, 1)
    _, kl = reparameterize_kl(mu, logvar, seed=0)
    for m, lv, got in zip(mu.flatten().tolist(), logvar.flatten().tolist(), kl.tolist(), strict=True):
        want = _mp_kl(m, lv)
        assert abs((got - want) / want) < 1e-6, (m, lv, got, float(want))


def test_gradient_is_accurate_from_the_prior_to_far_away(device):
    logvar = torch.linspace(-10, 10, 4001, device=device)[:, None].requires_grad_()
    _, kl = reparameterize_kl(torch.zeros_like(logvar), logvar, seed=0)
    kl.sum().backward()
    want = 0.5 * torch.expm1(logvar.detach().double())
    error = ((logvar.grad - want).abs() / want.abs()).nan_to_num(0.0)
    assert error.max() < 1e-6


def test_extreme_posteriors(device):
    mu = torch.tensor([[1e30], [0.0], [0.0], [1e30]], device=device, requires_grad=True)
    logvar = torch.tensor([[0.0], [100.0], [-1e4], [100.0]], device=device, requires_grad=True)
    z, kl = reparameterize_kl(mu, logvar, seed=0)
    assert not kl.isnan().any()
    assert (kl[[0, 1, 3]] > 1e37).all()
    assert kl[2].item() == pytest.approx(4999.5)
    z.sum().backward(retain_graph=True)
    kl[2].backward()
    assert torch.isfinite(logvar.grad[2])
    assert torch.equal(z[2], mu[2].detach())


def test_noise_is_that_of_the_seed_whatever_the_split(device):
    mu, logvar = torch.randn(64, 20, device=device), torch.randn(64, 20, device=device)
    whole, _ = reparameterize_kl(mu, logvar, seed=5)
    eps = normal(torch.tensor([5], device=device), 64, 20, Stream.LATENT)
    given, _ = reparameterize_kl(mu, logvar, eps=eps)
    torch.testing.assert_close(whole, given, rtol=1e-6, atol=2e-6)
    for size in (1, 7, 32):
        starts = range(0, 64, size)
        pieces = [(mu[i : i + size], logvar[i : i + size]) for i in starts]
        parts = [reparameterize_kl(*piece, seed=5, row_offset=i)[0] for piece, i in zip(pieces, starts, strict=True)]
        assert torch.equal(torch.cat(parts), whole)


def test_noise_follows_the_logical_order_in_every_memory_format(device):
    mu = torch.randn(2, 4, 8, 8, device=device)
    zeros = torch.zeros_like(mu)
    plain, _ = reparameterize_kl(zeros, zeros, seed=5)
    last, _ = reparameterize_kl(
        zeros.to(memory_format=torch.channels_last), zeros.to(memory_format=torch.channels_last), seed=5
    )
    assert torch.equal(plain, last)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_seed_comes_from_torch(device):
    mu, logvar = torch.zeros(4, 20, device=device), torch.zeros(4, 20, device=device)
    torch.manual_seed(3)
    first, second = reparameterize_kl(mu, logvar)[0], reparameterize_kl(mu, logvar)[0]
    torch.manual_seed(3)
    assert torch.equal(reparameterize_kl(mu, logvar)[0], first)
    assert not torch.equal(first, second)


def test_given_noise_takes_a_gradient(device):
    mu, logvar, eps = (torch.randn(3, 4, device=device) for _ in range(3))
    eps.requires_grad_()
    z, _ = reparameterize_kl(mu, logvar, eps=eps)
    z.sum().backward()
    torch.testing.assert_close(eps.grad, torch.exp(0.5 * logvar))


def test_free_bits_may_be_any_kind_of_number(device):
    mu, logvar = torch.randn(3, 4, device=device), torch.randn(3, 4, device=device)
    _, want = reparameterize_kl(mu, logvar, seed=0, free_bits=1.0)
    for same in (1, torch.tensor(1.0), np.float32(1)):
        assert torch.equal(reparameterize_kl(mu, logvar, seed=0, free_bits=same)[1], want)


def test_mixed_dtypes_are_promoted(device):
    zeros = torch.zeros(2, 4, device=device)
    z, kl = reparameterize_kl(zeros.bfloat16(), zeros, seed=0)
    assert z.dtype == torch.float32
    assert kl.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mu": [1.0]}, TypeError, "mu: expected a tensor, got list"),
        ({"mu": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "mu: expected fp32, bf16, fp16 or fp64, got"),
        ({"mu": torch.tensor(0.0)}, ValueError, r"mu: expected at least 1 dimension\(s\) \[B, ...\], got shape \[\]"),
        ({"logvar": torch.zeros(2, 4)}, ValueError, r"logvar: expected the shape of mu, \[2, 3\], got \[2, 4\]"),
        ({"eps": torch.zeros(2, 4)}, ValueError, r"eps: expected the shape of the latent, \[2, 3\], got \[2, 4\]"),
        ({"eps": torch.zeros(2, 3), "seed": 1}, ValueError, "seed: expected None when eps is given"),
        ({"seed": 1.5}, TypeError, "seed: expected None, an int or an int64 tensor, got float"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "seed: expected a tensor of one element, got"),
        ({"seed": torch.zeros(1)}, TypeError, "seed: expected an int64 tensor, got torch.float32"),
        ({"seed": 2**64}, ValueError, "seed: expected an int of at most 64 bits"),
        ({"row_offset": -1}, ValueError, "row_offset: expected an int >= 0, got -1"),
        ({"row_offset": 1.5}, TypeError, "row_offset: expected an int, got float"),
        ({"free_bits": -0.5}, ValueError, "free_bits: expected a finite number >= 0, got -0.5"),
        ({"free_bits": float("nan")}, ValueError, "free_bits: expected a finite number >= 0, got nan"),
        ({"clamp": (1.0, -1.0)}, ValueError, "clamp: expected lo < hi"),
        ({"clamp": 3.0}, ValueError, r"clamp: expected None or a pair of numbers \(lo, hi\), got 3.0"),
        ({"clamp": [1, "a"]}, ValueError, r"clamp: expected None or a pair of numbers \(lo, hi\), got \[1, 'a'\]"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"mu": torch.zeros(2, 3), "logvar": torch.zeros(2, 3), **change}
    with pytest.raises(error, match=message):
        reparameterize_kl(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_replayed_graph_draws_fresh_noise():
    mu, logvar = torch.zeros(8, 20, device="cuda"), torch.zeros(8, 20, device="cuda")
    reparameterize_kl(mu, logvar)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, _ = reparameterize_kl(mu, logvar)
    graph.replay()
    first = z.clone()
    graph.replay()
    assert not torch.equal(z, first)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_arguments():
    mu, logvar = torch.randn(8, 20, device="cuda:1"), torch.randn(8, 20, device="cuda:1")
    with torch.cuda.device(0):
        z, _ = reparameterize_kl(mu, logvar, seed=3)
    torch.testing.assert_close(z.cpu(), reparameterize_kl(mu.cpu(), logvar.cpu(), seed=3)[0], rtol=2e-6, atol=4e-5)
    with pytest.raises(ValueError, match="seed: expected a tensor on cuda:1, got one on cuda:0"):
        reparameterize_kl(mu, logvar, seed=torch.tensor([3], device="cuda:0"))


def test_columns_far_apart_do_not_wrap(device):
    """Positions of one channel 2^21 elements apart, as in a permuted [T, B, C]: the last ones start beyond 2^31."""
    storage = torch.empty(2**21 * 1030 + 2, dtype=torch.bfloat16, device=device)
    mu = storage.as_strided((1, 2, 1028), (2, 1, 2**21)).fill_(0.5)
    zeros = torch.zeros(1, 2, 1028, dtype=torch.bfloat16, device=device)
    z, kl = reparameterize_kl(mu, zeros, seed=1)
    want, want_kl = reparameterize_kl(mu.contiguous(), zeros, seed=1)
    assert torch.equal(z, want)
    torch.testing.assert_close(kl, want_kl, rtol=1e-6, atol=0.0)
