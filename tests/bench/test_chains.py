"""The chains that are timed compute the same thing, and a wrong one is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from genfast.bench.chains import CHAINS, MODES, build, excess, excess_between, prepare
from genfast.cases import CASES, cases

GIVEN = [case for case in CASES if case.differentiable and not case.noisy]


@pytest.mark.parametrize("case", GIVEN, ids=lambda case: case.name)
@pytest.mark.parametrize("place", ["alone", "between"])
def test_chains_without_noise_agree(case, place, device):
    work = prepare(case, (16, 24), torch.float32, device, place)
    assert work.error <= 1
    want = build(case, place, "reference")(work.inputs)
    for chain in CHAINS:
        if CHAINS[chain][1] is None:
            for got, exact in zip(build(case, place, chain)(work.inputs), want, strict=True):
                torch.testing.assert_close(got, exact, rtol=2e-5, atol=2e-5)


def test_neighbours_feed_the_op_and_take_its_gradient(device):
    (case,) = cases("kl_normal")
    work = prepare(case, (16, 24), torch.float32, device, "between")
    leaves = {name: work.inputs[name].detach().requires_grad_() for name in work.leaves}
    assert sorted(leaves) == ["source", "weight_logvar_p", "weight_logvar_q", "weight_mu_p", "weight_mu_q"]
    outputs = build(case, "between", "fused")({**work.inputs, **leaves})
    grads = torch.autograd.grad(outputs, list(leaves.values()), work.upstream)
    assert all(grad.abs().max() > 0 for grad in grads)
    alone = build(case, "alone", "fused")(work.inputs)
    torch.testing.assert_close(outputs[0].detach(), 0.5 * alone[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_producer_makes_is_exact(dtype, device):
    """So it is the same by every matrix product, and as wide as what it replaces."""
    (case,) = cases("kl_normal")
    work = prepare(case, (256, 48), dtype, device, "between")
    exact = work.inputs["source"].double() @ work.inputs["weight_mu_q"].double().T
    assert torch.equal(work.inputs["mu_q"].double(), exact)
    assert 1.0 < work.inputs["mu_q"].double().std() < 2.25


def test_a_wrong_chain_is_beyond_the_tolerance(device):
    """A dropped gradient, a sign, a NaN."""
    (case,) = cases("kl_normal")
    work = prepare(case, (16, 24), torch.float32, device)

    def shifted(inputs):
        return (case.fused(inputs)[0] * (1 + 1e-4),)

    def undefined(inputs):
        return (case.fused(inputs)[0] * float("nan"),)

    def detached(inputs):
        return case.fused({**inputs, "mu_p": inputs["mu_p"].detach() + 0 * inputs["mu_p"]})

    assert excess(case, case.fused, work.inputs, work.upstream) <= 1
    for wrong in (shifted, undefined, detached):
        assert excess(case, wrong, work.inputs, work.upstream) > 1
    between = prepare(case, (16, 24), torch.float32, device, "between")
    assert excess_between(case, build(case, "between", "fused"), between) <= 1
    broken = replace(case, fused=shifted)
    assert excess_between(case, build(broken, "between", "fused"), between) > 1
    assert prepare(broken, (16, 24), torch.float32, device).error > 1


def test_bytes_are_those_of_the_design():
    """bf16, 16 x 24: 4 reads; then 4 reads and 4 writes. uint8 targets are a byte each."""
    n = 16 * 24
    (case,) = cases("kl_normal")
    assert prepare(case, (16, 24), torch.bfloat16, "cpu").bytes == dict(zip(MODES, (8 * n, 24 * n), strict=True))
    binary = next(case for case in cases("bernoulli_nll") if case.setting == "uint8")
    assert prepare(binary, (16, 24), torch.bfloat16, "cpu").bytes == dict(zip(MODES, (3 * n, 8 * n), strict=True))
    mean = next(case for case in cases("bernoulli_nll") if case.setting == "mean")
    assert prepare(mean, (16, 24), torch.float32, "cpu").bytes == dict(zip(MODES, (12 * n, 12 * n), strict=True))
