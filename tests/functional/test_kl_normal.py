"""kl_normal: the matrix, accuracy where the two Gaussians are close, broadcast priors, and bad input."""

from __future__ import annotations

import mpmath
import pytest
import torch

from genfast.cases import cases
from genfast.functional import kl_normal, reparameterize_kl
from tests.matrix import OpMatrix
from tests.oracles import gaussian


class TestKlNormal(OpMatrix):
    cases = cases("kl_normal")
    oracle = staticmethod(gaussian.kl_normal)


def test_accurate_where_the_two_are_close(device):
    gaps = torch.tensor([10.0**-power for power in (5, 4, 3, 2, 1, 0)], device=device)[:, None]
    logvar_p = torch.full_like(gaps, 0.5)
    logvar_q = logvar_p + gaps
    kl = kl_normal(torch.zeros_like(gaps), logvar_q, torch.zeros_like(gaps), logvar_p)
    with mpmath.workdps(60):
        for q, p, got in zip(logvar_q.flatten().tolist(), logvar_p.flatten().tolist(), kl.tolist(), strict=True):
            d = mpmath.mpf(q) - mpmath.mpf(p)
            want = (mpmath.expm1(d) - d) / 2
            assert abs((got - want) / want) < 1e-6


def test_standard_prior_is_the_kl_of_reparameterize(device):
    mu, logvar = torch.randn(5, 20, device=device), torch.randn(5, 20, device=device)
    zero = torch.zeros(20, device=device)
    torch.testing.assert_close(
        kl_normal(mu, logvar, zero, zero), reparameterize_kl(mu, logvar, seed=0)[1], rtol=1e-6, atol=0.0
    )


def test_broadcast_prior_gets_the_summed_gradient(device):
    mu, logvar = torch.randn(5, 3, 4, device=device), torch.randn(5, 3, 4, device=device)
    prior = [torch.randn(3, 1, device=device).requires_grad_() for _ in range(2)]
    full = [p.detach().expand(5, 3, 4).clone().requires_grad_() for p in prior]
    kl_normal(mu, logvar, *prior).square().sum().backward()
    kl_normal(mu, logvar, *full).square().sum().backward()
    for small, large in zip(prior, full, strict=True):
        torch.testing.assert_close(small.grad, large.grad.sum(0).sum(-1, keepdim=True), rtol=1e-5, atol=1e-5)


def test_equal_narrow_gaussians_have_no_divergence(device):
    mu, logvar = torch.ones(2, 3, device=device), torch.full((2, 3), -1e4, device=device)
    leaves = [x.clone().requires_grad_() for x in (mu, logvar, mu, logvar)]
    kl = kl_normal(*leaves)
    kl.sum().backward()
    assert torch.equal(kl, torch.zeros(2, device=device))
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logvar_p": torch.zeros(2, 4)}, ValueError, r"expected shapes that broadcast, got .*logvar_p \[2, 4\]"),
        ({"mu_p": 0.0}, TypeError, "mu_p: expected a tensor, got float"),
        ({"logvar_q": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "logvar_q: expected fp32, bf16, fp16 or fp64"),
    ],
)
def test_bad_input(change, error, message):
    names = ("mu_q", "logvar_q", "mu_p", "logvar_p")
    with pytest.raises(error, match=message):
        kl_normal(**{**{name: torch.zeros(2, 3) for name in names}, **change})


def test_scalars_have_no_batch():
    with pytest.raises(ValueError, match=r"mu_q: expected at least 1 dimension\(s\)"):
        kl_normal(*(torch.tensor(0.0) for _ in range(4)))
