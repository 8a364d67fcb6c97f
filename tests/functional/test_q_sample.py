"""q_sample: the closed form against noise added step by step, diffusers' add_noise, device timesteps, and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from genfast import schedules
from genfast.functional import Noised, forward_noising, q_sample
from genfast.functional._register import INTERPRETED
from genfast.random import Stream, normal

DRAWS = (1000, 1000)
COUNT = DRAWS[0] * DRAWS[1]


def assert_moments(x: Tensor, mean: float, variance: float) -> None:
    """Within five standard errors of what so many draws can tell."""
    x = x.double()
    assert abs(x.mean() - mean) < 5 * math.sqrt(variance / COUNT)
    assert abs(x.var() - variance) < 5 * variance * math.sqrt(2 / COUNT)


@pytest.mark.skipif(INTERPRETED, reason="a million draws take the interpreter minutes, and the noise is tested apart")
@pytest.mark.parametrize("steps", [3, 40], ids=["first three", "to the last"])
def test_one_draw_is_like_noise_added_step_by_step(steps, device):
    """x_t = sqrt(1 - beta_t) x_(t-1) + sqrt(beta_t) eps_t with independent draws has the closed form's moments."""
    betas = torch.linspace(0.05, 0.3, 40, dtype=torch.float64)
    schedule = schedules.from_betas(betas).to(device)
    x0 = 0.7
    x = torch.full(DRAWS, x0, device=device)
    for beta in betas[:steps].tolist():
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn_like(x)
    at_once = q_sample(torch.full(DRAWS, x0, device=device), steps - 1, schedule, seed=0).x_t

    alpha_bar = math.prod((1 - betas[:steps]).tolist())
    for noisy in (x, at_once):
        assert_moments(noisy, math.sqrt(alpha_bar) * x0, 1 - alpha_bar)
    # What one might think the variance to be is far outside: the draws can tell.
    with pytest.raises(AssertionError):
        assert_moments(at_once, math.sqrt(alpha_bar) * x0, sum(betas[:steps].tolist()))


@pytest.mark.skipif(INTERPRETED, reason="a million draws take the interpreter minutes, and the noise is tested apart")
def test_the_usual_schedule_ends_in_noise(device):
    schedule = schedules.linear(1000).to(device)
    alpha_bar = float(schedule.alpha_bar_fp64[-1])
    x_t = q_sample(torch.full(DRAWS, 0.7, device=device), 999, schedule, seed=0).x_t
    assert_moments(x_t, math.sqrt(alpha_bar) * 0.7, 1 - alpha_bar)


@pytest.mark.parametrize("name", ["linear", "cosine", "rectified_flow", "edm"])
def test_is_a_x0_plus_b_eps_of_the_seed(name, device):
    schedule = schedules.get(name).to(device)
    x0 = torch.randn(5, 3, 8, 8, device=device)
    noised = q_sample(x0, None, schedule, seed=3)
    assert noised.t.shape == (5,)
    assert noised.x0 is x0
    assert len(set(noised.t.tolist())) > 1
    eps = normal(torch.tensor([3], device=device), 5, 192, Stream.FORWARD_NOISE).view_as(x0)
    a, b = (c.view(-1, 1, 1, 1) for c in schedule.coefficients(noised.t))
    torch.testing.assert_close(noised.x_t, a * x0 + b * eps, rtol=1e-5, atol=1e-5)


def test_rows_are_the_same_in_pieces(device):
    schedule = schedules.linear(1000).to(device)
    x0 = torch.randn(6, 50, device=device)
    whole = q_sample(x0, None, schedule, seed=1)
    pieces = [q_sample(x0[rows], None, schedule, seed=1, row_offset=rows.start) for rows in (slice(0, 2), slice(2, 6))]
    assert torch.equal(whole.x_t, torch.cat([piece.x_t for piece in pieces]))
    assert torch.equal(whole.t, torch.cat([piece.t for piece in pieces]))


def test_one_t_serves_all(device):
    schedule = schedules.linear(1000).to(device)
    x0 = torch.randn(4, 30, device=device)
    wanted = q_sample(x0, torch.full((4,), 17, device=device), schedule, seed=1).x_t
    for t in (17, torch.tensor(17, device=device), torch.tensor([17], dtype=torch.int32, device=device)):
        assert torch.equal(q_sample(x0, t, schedule, seed=1).x_t, wanted)


def test_uint8_is_scaled_to_one(device):
    schedule = schedules.linear(1000).to(device)
    x0 = torch.arange(256, dtype=torch.uint8, device=device).view(2, 1, 8, 16)
    for dtype in (torch.float32, torch.bfloat16):
        got = q_sample(x0, 500, schedule, seed=0, dtype=dtype).x_t
        want = q_sample(x0.double() / 127.5 - 1, 500, schedule, seed=0).x_t
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=5e-6)
    one, nothing = torch.ones(2, device=device), torch.zeros(2, device=device)
    ends = torch.tensor([[0], [255]], dtype=torch.uint8, device=device)
    assert forward_noising(ends, one, nothing, seed=0).tolist() == [[-1.0], [1.0]]


def test_given_noise_replaces_the_seed(device):
    schedule = schedules.linear(1000).to(device)
    x0, noise = torch.randn(3, 20, device=device), torch.randn(3, 20, device=device)
    noised = q_sample(x0, 999, schedule, noise=noise)
    torch.testing.assert_close(noised.x_t, noise, rtol=0, atol=0.05)
    assert noised.seed is None
    assert noised.noise is noise


def _their_scheduler(**options: Any) -> Any:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    return diffusers.DDPMScheduler(num_train_timesteps=1000, **options)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_equals_add_noise_of_diffusers(beta_schedule, device):
    """With diffusers' own table and noise, in fp32, to 1e-6."""
    theirs = _their_scheduler(beta_schedule=beta_schedule)
    ours = schedules.from_alpha_bar(theirs.alphas_cumprod.double()).to(device)
    t = torch.arange(1000, device=device)
    x0, noise = torch.randn(1000, 40, device=device), torch.randn(1000, 40, device=device)
    want = theirs.add_noise(x0, noise, t)
    torch.testing.assert_close(q_sample(x0, t, ours, noise=noise).x_t, want, rtol=1e-6, atol=1e-6)


def test_velocity_equals_that_of_diffusers(device):
    theirs = _their_scheduler()
    ours = schedules.from_alpha_bar(theirs.alphas_cumprod.double()).to(device)
    t = torch.arange(1000, device=device)
    x0, noise = torch.randn(1000, 40, device=device), torch.randn(1000, 40, device=device)
    p, q = (c[:, None] for c in ours.target_coefficients(t, "v"))
    torch.testing.assert_close(p * x0 + q * noise, theirs.get_velocity(x0, noise, t), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_nearer_to_fp64_than_diffusers(dtype, device):
    """Errors of the noise's part (x0 = 0) in the first ten steps, relative to its size, which in bf16 they lose."""
    t = torch.arange(10, device=device)
    noise = torch.randn(10, 1000, device=device).to(dtype)
    x0 = torch.zeros_like(noise)
    theirs = _their_scheduler().add_noise(x0, noise, t)
    schedule = schedules.linear(1000).to(device)
    ours = q_sample(x0, t, schedule, noise=noise).x_t
    exact = (-torch.log1p(-schedule.betas_fp64).cumsum(0).expm1())[:10].sqrt().to(device)[:, None] * noise.double()
    errors = [float((x.double() - exact).norm() / exact.norm()) for x in (ours, theirs)]
    if dtype == torch.bfloat16:
        assert not theirs.any(), "diffusers keeps some noise now: say so in docs/diffusion.md"
        assert errors[0] < 2**-8
        assert errors[1] == 1.0
    else:
        assert errors[0] < 1e-7
        assert errors[1] > 100 * errors[0]


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_a_model_in_half_precision_keeps_its_tables(cast, device):
    model = torch.nn.ModuleDict({"schedule": schedules.linear(1000)}).to(device)
    x0 = torch.zeros(1, 100, device=device)
    want = q_sample(x0, 3, model["schedule"], seed=0).x_t
    getattr(model, cast)()
    assert torch.equal(q_sample(x0, 3, model["schedule"], seed=0).x_t, want)


def test_gradients_of_images_and_noise(device):
    """x_t is linear in both, twice differentiable as such."""
    schedule = schedules.linear(1000).to(device)
    x0, noise = (torch.randn(4, 6, device=device, requires_grad=True) for _ in range(2))
    t = torch.tensor([0, 10, 500, 999], device=device)
    upstream = torch.randn(4, 6, device=device)
    x_t = q_sample(x0, t, schedule, noise=noise).x_t
    grads = torch.autograd.grad(x_t, (x0, noise), upstream)
    for grad, row in zip(grads, schedule.tables[:2], strict=True):
        torch.testing.assert_close(grad, row[t][:, None] * upstream, rtol=1e-6, atol=1e-6)


def test_t_outside_is_nan_in_the_kernel_alone(device):
    """A look at the values would wait for a GPU: there the sample becomes NaN, and nothing outside is read."""
    if not INTERPRETED and device == "cpu":
        pytest.skip("on the CPU t is checked, see test_bad_input; the kernel is run by the interpreter or a GPU")
    from genfast.kernels import denoising_loss, forward_noising

    schedule = schedules.linear(1000).to(device)
    a, b = schedule.tables[:2]
    t = torch.tensor([-1, 0, 999, 1000, 2**40, -(2**62)], device=device)
    outside = [True, False, False, True, True, True]
    seed, x0 = torch.tensor([0], device=device), torch.randn(6, 9, device=device)
    x_t = forward_noising.forward(x0, a, b, t, seed, None, 0, torch.float32)
    assert x_t.isnan().all(1).tolist() == outside
    assert x_t.isnan().any(1).tolist() == outside
    for objective in schedules.OBJECTIVES:
        arguments = (x0, x0, a, b, t, seed, None, 0, objective, "none", 5.0, 1.0)
        assert denoising_loss.forward(*arguments).isnan().tolist() == outside
        grad = denoising_loss.backward(*arguments, torch.ones(6, device=device))
        assert grad.isnan().any(1).tolist() == outside


X0 = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X0, 1000), {}, ValueError, r"t: expected .* got 1000"),
        ((X0, -1), {}, ValueError, r"t: expected .* got -1"),
        ((X0, torch.tensor([3, 1000])), {}, ValueError, r"t: expected .* got 1000"),
        ((X0, torch.tensor([0.5, 0.5])), {}, TypeError, r"t: expected an int64 tensor, .* got torch.float32"),
        ((X0, 0.5), {}, TypeError, "t: expected an int"),
        ((X0, torch.zeros(3, dtype=torch.int64)), {}, ValueError, r"t: expected one element or shape \[2\], got shape"),
        ((X0, torch.zeros(2, dtype=torch.int64, device="meta")), {}, ValueError, "t: expected a tensor on cpu"),
        ((X0.long(), 0), {}, TypeError, "x0: expected fp32, bf16, fp16 or fp64, got torch.int64"),
        ((X0[0, 0], 0), {}, ValueError, "x0: expected at least 1 dimension"),
        ((X0, 0), {"noise": torch.zeros(3, 2)}, ValueError, r"noise: expected the shape of x0, \[2, 3\], got \[3, 2\]"),
        ((X0, 0), {"noise": X0, "seed": 0}, ValueError, "seed: expected None when noise is given"),
        ((X0, 0), {"seed": torch.zeros(1)}, TypeError, "seed: expected an int64 tensor, got torch.float32"),
        ((X0, 0), {"seed": torch.zeros(1, dtype=torch.int64, device="meta")}, ValueError, "seed: expected a tensor on"),
        ((X0, 0), {"row_offset": -1}, ValueError, "row_offset: expected an int >= 0, got -1"),
        ((X0, 0), {"dtype": torch.int32}, TypeError, "dtype: expected None, fp32, bf16, fp16 or fp64"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        q_sample(*arguments, schedules.linear(1000), **options)


def test_a_t_that_is_traced_is_checked_when_it_runs():
    schedule = schedules.linear(10)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def noisy(x0: Tensor, t: Tensor) -> Tensor:
        return q_sample(x0, t, schedule, seed=0).x_t

    assert noisy(X0, torch.tensor([0, 9])).isfinite().all()
    with pytest.raises(RuntimeError, match="t: expected"):
        noisy(X0, torch.tensor([0, 10]))


def test_one_step_is_a_schedule(device):
    schedule = schedules.linear(1).to(device)
    noised = q_sample(torch.ones(3, 4, device=device), None, schedule, seed=0)
    assert noised.t.tolist() == [0, 0, 0]
    assert isinstance(noised, Noised)
    assert noised.x_t.isfinite().all()


def test_seeds_of_one_generator_state_are_the_same(device):
    schedule = schedules.linear(1000).to(device)
    x0 = torch.zeros(2, 5, device=device)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(q_sample(x0, None, schedule))
    assert torch.equal(results[0].x_t, results[1].x_t)
    assert not torch.equal(q_sample(x0, None, schedule).x_t, results[0].x_t)
    assert torch.equal(forward_noising(x0, torch.ones(2, device=device), torch.zeros(2, device=device)), x0)


def test_a_schedule_elsewhere_is_named():
    with pytest.raises(ValueError, match="schedule: expected one on the device of the images, cpu, got meta"):
        q_sample(X0, 3, schedules.linear(10).to("meta"))


def test_given_noise_draws_the_same_times_compiled():
    """One state of torch's generator, eager and by Inductor."""
    schedule, noise = schedules.linear(1000), torch.randn(2, 3)

    def times(x0: Tensor) -> Tensor:
        return q_sample(x0, None, schedule, noise=noise).t

    drawn = []
    for function in (times, torch.compile(times, fullgraph=True)):
        torch.manual_seed(4)
        drawn.append(function(X0).tolist())
    assert drawn[0] == drawn[1]
