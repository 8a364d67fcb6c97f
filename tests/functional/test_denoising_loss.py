"""denoising_loss: the matrix, the noise that it makes again, memory, gradients of the target, SNR 0, and bad input."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from genfast import schedules
from genfast.cases import cases
from genfast.functional import denoising_loss, q_sample
from genfast.functional._register import INTERPRETED
from genfast.random import Stream, normal
from tests.matrix import OpMatrix
from tests.oracles import linear_gaussian


class TestDenoisingLoss(OpMatrix):
    cases = cases("denoising_loss")
    oracle = staticmethod(linear_gaussian.denoising_loss)


@pytest.mark.parametrize("objective", schedules.OBJECTIVES)
@pytest.mark.parametrize("schedule", ["linear", "rectified_flow", "edm"])
def test_a_perfect_prediction_has_no_loss(objective, schedule, device):
    """The loss makes the very noise that q_sample added: with it, images and coefficients the target is met."""
    made = schedules.get(schedule).to(device)
    x0 = torch.randn(6, 3, 4, 4, device=device)
    noised = q_sample(x0, None, made, seed=4)
    eps = normal(noised.seed, 6, 48, Stream.FORWARD_NOISE).view_as(x0)
    p, q = (c.view(-1, 1, 1, 1) for c in made.target_coefficients(noised.t, objective))
    loss = denoising_loss(p * x0 + q * eps, noised, made, objective=objective)
    assert loss.max() < 1e-9
    assert denoising_loss(torch.zeros_like(x0), noised, made, objective=objective).min() > 0.01


def test_micro_batches_and_ranks_add_up(device):
    schedule = schedules.cosine(100).to(device)
    x0, pred = torch.randn(6, 40, device=device), torch.randn(6, 40, device=device)
    whole = denoising_loss(pred, q_sample(x0, None, schedule, seed=1), schedule, objective="v")
    pieces = [
        denoising_loss(pred[i : i + 2], q_sample(x0[i : i + 2], None, schedule, seed=1, row_offset=i), schedule,
                       objective="v")
        for i in (0, 2, 4)
    ]  # fmt: skip
    assert torch.equal(whole, torch.cat(pieces))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("objective", schedules.OBJECTIVES)
def test_gradients_of_images_and_noise(objective, reduction, device):
    """The target depends on both: whoever trains an encoder through it gets the gradient of the written formula."""
    schedule = schedules.linear(1000).to(device)
    x0, noise, pred = (torch.randn(4, 30, device=device, requires_grad=True) for _ in range(3))
    t = torch.tensor([10, 200, 500, 900], device=device)
    loss = denoising_loss(
        pred, q_sample(x0, t, schedule, noise=noise), schedule, objective=objective, reduction=reduction
    )
    p, q = (c[:, None] for c in schedule.target_coefficients(t, objective))
    written = (pred - (p * x0 + q * noise)).square().mean(1)
    written = {"none": written, "mean": written.mean(), "sum": written.sum()}[reduction]
    torch.testing.assert_close(loss, written, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(written.sum(), (pred, x0, noise))
    for got, want in zip(torch.autograd.grad(loss.sum(), (pred, x0, noise), allow_unused=True), wanted, strict=True):
        torch.testing.assert_close(torch.zeros_like(want) if got is None else got, want, rtol=1e-5, atol=1e-6)


def test_min_snr_at_no_signal(device):
    """At SNR 0 the weight of v and x0 is 0, and that of epsilon 1; without noise that of x0 is gamma. Never NaN."""
    schedule = schedules.zero_terminal_snr(schedules.linear(100)).to(device)
    x0, pred = torch.randn(2, 20, device=device), torch.randn(2, 20, device=device)
    noised = q_sample(x0, torch.tensor([0, 99], device=device), schedule, seed=0)
    for objective in ("v", "x0"):
        loss = denoising_loss(pred, noised, schedule, objective=objective, weighting="min_snr")
        assert loss[1] == 0
        assert loss[0] > 0
    weighted = denoising_loss(pred, noised, schedule, objective="epsilon", weighting="min_snr")
    plain = denoising_loss(pred, noised, schedule, objective="epsilon")
    assert weighted[1] == plain[1]

    flow = schedules.rectified_flow().to(device)
    noised = q_sample(x0, torch.tensor([0.0, 0.1], device=device), flow, seed=0)
    weighted = denoising_loss(pred, noised, flow, objective="x0", weighting="min_snr", gamma=3.0)
    torch.testing.assert_close(weighted, 3.0 * denoising_loss(pred, noised, flow, objective="x0"))


def test_a_nan_stays_in_its_sample(device):
    schedule = schedules.linear(1000).to(device)
    pred = torch.zeros(3, 20, device=device)
    pred[1, 7] = torch.nan
    loss = denoising_loss(pred, q_sample(torch.zeros_like(pred), None, schedule, seed=0), schedule)
    assert loss.isnan().tolist() == [False, True, False]


SCHEDULE = schedules.linear(10)
NOISED = q_sample(torch.zeros(2, 3), 3, SCHEDULE, seed=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pred": torch.zeros(2, 4)}, ValueError, r"pred: expected the shape of noised.x0, \[2, 3\], got \[2, 4\]"),
        ({"pred": torch.zeros(2, 3).int()}, TypeError, "pred: expected fp32, bf16, fp16 or fp64, got torch.int32"),
        ({"noised": NOISED.x_t}, TypeError, "noised: expected what q_sample returns, got Tensor"),
        ({"objective": "eps"}, ValueError, "objective: expected one of 'epsilon', 'x0', 'v', 'flow', 'edm', got 'eps'"),
        ({"weighting": "snr"}, ValueError, "weighting: expected one of 'none', 'min_snr', 'sigma', got 'snr'"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of 'none', 'mean', 'sum', got 'avg'"),
        ({"gamma": -1.0}, ValueError, "gamma: expected a finite number >= 0, got -1.0"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"pred": torch.zeros(2, 3), "noised": NOISED, "schedule": SCHEDULE, **change}
    with pytest.raises(error, match=message):
        denoising_loss(**arguments)


def _peak(step: Callable[[], None], device: str) -> int:
    """Most bytes of tensors alive at once in one step, above those alive before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))


def test_no_tensor_of_noise_ever_exists(device):
    """Noising, loss and gradient: x_t and the gradient are all that is allocated. (The reference keeps its noise.)"""
    if not INTERPRETED and device == "cpu":
        pytest.skip("a property of the kernels: the interpreter's run of this file tests it, or a GPU's")
    schedule = schedules.linear(1000).to(device)
    x0, pred = torch.randn(4, 1 << 16, device=device), torch.randn(4, 1 << 16, device=device, requires_grad=True)

    def ours() -> None:
        pred.grad = None
        noised = q_sample(x0, None, schedule, seed=0)
        denoising_loss(pred, noised, schedule, reduction="mean").backward()

    def usual() -> None:
        pred.grad = None
        noise = torch.randn_like(x0)
        a, b = (c[:, None] for c in schedule.coefficients(torch.tensor([1, 10, 100, 999], device=device)))
        x_t = a * x0 + b * noise
        F.mse_loss(pred, noise).backward()
        del x_t

    for step in (ours, usual):
        step()
    pred.grad = None
    images = x0.numel() * x0.element_size()
    assert 2.0 <= _peak(ours, device) / images < 2.01
    pred.grad = None
    assert _peak(usual, device) / images > 2.99
