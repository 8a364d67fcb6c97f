"""reverse_step: the matrix, every option against its textbook form, diffusers' schedulers, sampling, policies."""

from __future__ import annotations

import math
from itertools import pairwise

import mpmath
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.utils._python_dispatch import TorchDispatchMode

from genfast import schedules
from genfast.cases import cases
from genfast.functional import q_sample, reverse_step
from genfast.functional._register import path
from genfast.random import Stream, normal
from genfast.reference import reverse_step as reference
from tests.matrix import OpMatrix
from tests.oracles import reverse

VARIANCES = ("fixed_small", "fixed_large", "learned_range")


class TestReverseStep(OpMatrix):
    cases = cases("reverse_step")
    oracle = staticmethod(reverse.reverse_step)


def _pair(shape: tuple[int, ...], device: str, learned: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An x_t and a prediction, halved in channels where its second half is v."""
    generator = torch.Generator().manual_seed(seed)
    wide = (shape[0], 2 * shape[1], *shape[2:]) if learned else shape
    return tuple(torch.randn(size, generator=generator).to(device) for size in (shape, wide))


TIMES = {
    "linear": ([990, 600, 300, 5], [970, 100, 299, 4]),
    "rectified_flow": ([0.99, 0.9, 0.5, 0.02], [0.97, 0.3, 0.499, 0.01]),
    "edm": ([80.0, 10.0, 1.0, 0.01], [60.0, 1.0, 0.99, 0.005]),
}


def _exact_coefficients(schedule: str, t: Tensor) -> tuple[Tensor, Tensor]:
    if schedule == "linear":
        bar = reverse.ALPHA_BAR[t.cpu()][:, None]
        return bar.sqrt(), (1 - bar).sqrt()
    t = t.cpu().double()[:, None]
    return (1 - t, t) if schedule == "rectified_flow" else (torch.ones_like(t), t)


def _exact_targets(objective: str, a: Tensor, b: Tensor, data: float) -> tuple[Tensor, Tensor]:
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    size = (b**2 + (data * a) ** 2).sqrt()
    return {
        "epsilon": (zero, one), "x0": (one, zero), "v": (-b, a), "flow": (-one, one),
        "edm": (b / (data * size), -data * a / size),
    }[objective]  # fmt: skip


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("objective", schedules.OBJECTIVES)
def test_every_option_is_the_textbook(objective, variance, name, device):
    """x_prev, its density and both gradients, stochastic and not, clipped and not."""
    schedule = schedules.get(name).to(device)
    times, previous = (torch.tensor(values, device=device) for values in TIMES[name])
    at, to = _exact_coefficients(name, times), _exact_coefficients(name, previous)
    target = _exact_targets(objective, *at, schedule.sigma_data)
    x_t, pred = _pair((4, 6), device, variance == "learned_range")
    x_t *= to[1].to(x_t).clamp_min(1)
    # Rounding counts by the largest term: where the objective all but hides x0 it is multiplied, and a_s takes it back.
    det = (at[0] * target[1] - at[1] * target[0]).abs()
    size = (1 + to[0] / det) * (1 + x_t.abs().amax(1, True).double().cpu())
    noise = torch.randn(4, 6, device=device)
    for eta in (0.0, 0.3, 1.0):
        for clip, recompute in ((None, True), (0.7, True), (0.7, False)):
            options = {
                "objective": objective, "variance": variance, "eta": eta, "clip": clip, "recompute_eps": recompute
            }  # fmt: skip
            leaves = [x.clone().requires_grad_() for x in (x_t, pred)]
            x_prev = reverse_step(*leaves, times, previous, schedule, noise=noise, **options)
            wide = [x.detach().double().cpu().requires_grad_() for x in (x_t, pred)]
            mean, sigma = reverse.any_step(*wide, at, to, target, eta, clip, recompute, variance)
            _assert_rows(x_prev, mean + sigma * noise.double().cpu(), size)
            upstream = torch.randn(4, 6, device=device)
            grads = torch.autograd.grad(x_prev, leaves, upstream)
            wanted = torch.autograd.grad(
                mean + sigma * noise.double().cpu(), wide, upstream.double().cpu(), retain_graph=eta > 0
            )
            for got, want in zip(grads, wanted, strict=True):
                _assert_rows(got, want, size)
            if eta == 0:
                continue
            given = (mean + sigma * noise.double().cpu()).detach().float().to(device)
            got = reverse_step(*leaves, times, previous, schedule, x_prev=given, log_prob=True, **options)
            assert got[0] is given
            density = Normal(mean, sigma).log_prob(given.double().cpu()).sum(1)
            # What is rounded is divided by sigma.
            doubt = size / sigma.detach().amin(1, True)
            _assert_rows(got[1][:, None], density[:, None], 4 * doubt)
            grads = torch.autograd.grad(got[1].sum(), leaves)
            for grad, want in zip(grads, torch.autograd.grad(density.sum(), wide), strict=True):
                _assert_rows(grad, want, doubt * (1 + want.abs().amax(1, True)))


def _assert_rows(got: Tensor, want: Tensor, size: Tensor) -> None:
    """Within 1e-6 of the value and 2e-6 of `size` [B, 1]."""
    got, want = got.detach().double().cpu(), want.detach()
    excess = (got - want).abs() / (1e-6 * want.abs() + 2e-6 * size)
    assert excess.max() <= 1, excess


def _diffusers(kind: str, prediction: str, clip: bool, **options):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    return getattr(diffusers, kind)(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, prediction_type=prediction, clip_sample=clip,
        **options,
    )  # fmt: skip


def _in_fp64(scheduler):
    """The same tables, all that follows from them in fp64."""
    scheduler.alphas_cumprod, scheduler.one = scheduler.alphas_cumprod.double(), torch.tensor(1.0).double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}


@pytest.mark.parametrize("clip", [False, True], ids=["free", "clipped"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_equals_the_ddpm_scheduler_of_diffusers(prediction, variance, clip, device):
    scheduler = _in_fp64(_diffusers("DDPMScheduler", prediction, clip, variance_type=variance))
    schedule = schedules.from_alpha_bar(scheduler.alphas_cumprod).to(device)
    x_t, pred = _pair((2, 3, 4, 4), "cpu", variance == "learned_range")
    for t in (999, 998, 500, 1, 0):
        noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        want = scheduler.step(pred.double(), t, x_t.double(), torch.Generator().manual_seed(t)).prev_sample
        got = reverse_step(
            x_t.to(device), pred.to(device), t, t - 1, schedule, objective=PREDICTIONS[prediction], variance=variance,
            clip=1.0 if clip else None, noise=noise.float().to(device),
        )  # fmt: skip
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-6, atol=1e-6, msg=lambda m, t=t: f"t = {t}: {m}")


@pytest.mark.parametrize("recompute", [False, True], ids=["as_predicted", "recomputed"])
@pytest.mark.parametrize("clip", [False, True], ids=["free", "clipped"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_equals_the_ddim_scheduler_of_diffusers(prediction, eta, clip, recompute, device):
    """With 10 of 1000 steps."""
    scheduler = _in_fp64(_diffusers("DDIMScheduler", prediction, clip, timestep_spacing="trailing"))
    scheduler.set_timesteps(10)
    schedule = schedules.from_alpha_bar(scheduler.alphas_cumprod).to(device)
    times = schedule.timesteps(10).tolist()
    assert times[:-1] == scheduler.timesteps.tolist()
    x_t, pred = _pair((2, 3, 4, 4), "cpu")
    noise = torch.randn(2, 3, 4, 4)
    for t, t_prev in pairwise(times):
        want = scheduler.step(
            pred.double(), t, x_t.double(), eta, use_clipped_model_output=recompute, variance_noise=noise.double()
        ).prev_sample
        got = reverse_step(
            x_t.to(device), pred.to(device), t, t_prev, schedule, objective=PREDICTIONS[prediction], eta=eta,
            clip=1.0 if clip else None, recompute_eps=recompute, noise=noise.to(device),
        )  # fmt: skip
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-6, atol=1e-6, msg=lambda m, t=t: f"t = {t}: {m}")


def test_equals_the_flow_matching_scheduler_of_diffusers(device):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    schedule = schedules.rectified_flow(shift=3.0).to(device)
    x_t, pred = _pair((2, 3, 4, 4), "cpu")
    for index, time in enumerate(scheduler.timesteps):
        want = scheduler.step(pred, time, x_t).prev_sample
        t, t_prev = scheduler.sigmas[index : index + 2].tolist()
        got = reverse_step(x_t.to(device), pred.to(device), t, t_prev, schedule, eta=0.0)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("steps", [1000, 50])
def test_is_nearer_to_fp64_than_diffusers(steps, dtype, device):
    """The largest error of one step with the same noise, over all steps; theirs with their own tables."""
    scheduler = _diffusers("DDPMScheduler", "epsilon", False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    schedule = schedules.linear(1000).to(device)
    x_t, eps = (x.to(dtype) for x in _pair((steps, 64), "cpu"))
    t, t_prev = (times.to(device) for times in (schedule.timesteps(steps)[:-1], schedule.timesteps(steps)[1:]))
    noise = torch.cat([torch.randn(1, 64, generator=torch.Generator().manual_seed(i), dtype=dtype) for i in t.tolist()])
    bar, bar_s = (torch.cat([reverse.ALPHA_BAR, torch.ones(1)])[times.cpu(), None] for times in (t, t_prev))
    x0 = (x_t.double() - (1 - bar).sqrt() * eps.double()) / bar.sqrt()
    mean, variance, _ = reverse.ddpm(x_t.double(), x0, bar, bar_s)
    want = mean + variance.sqrt() * noise.double()
    ours = reverse_step(x_t.to(device), eps.to(device), t, t_prev, schedule, noise=noise.to(device)).cpu()
    theirs = [
        scheduler.step(eps[i : i + 1], now, x_t[i : i + 1], torch.Generator().manual_seed(now)).prev_sample
        for i, now in enumerate(t.tolist())
    ]
    errors = [((value.double() - want).abs() / (1 + want.abs())).max().item() for value in (ours, torch.cat(theirs))]
    print(f"{steps} steps, {dtype}: ours {errors[0]:.1e}, theirs {errors[1]:.1e}")
    # In bf16 most of either error is that of the result itself.
    assert errors[0] < errors[1] / (2 if dtype == torch.float32 else 1)
    assert errors[0] < (1e-6 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("objective", schedules.OBJECTIVES)
@pytest.mark.parametrize("name", ["linear", "cosine", "rectified_flow"])
def test_the_deterministic_step_is_q_sample_with_the_same_noise(name, objective, device):
    """With what a perfect network says, from t to s, down and up again: no error of its own."""
    schedule = schedules.get(name).to(device)
    if schedule.continuous:
        # A clean image and itself would say nothing about its noise.
        times = [(0.9, 0.2), (0.5, 0.49), (0.7, 0.0), (0.3, 0.6), (0.01 if objective == "x0" else 0.0, 0.4)]
    else:
        times = [(900, 200), (500, 490), (700, -1), (300, 600), (0, 400)]
    x0 = torch.randn(2, 3, 4, 4, device=device).clamp(-1, 1)
    noise = torch.randn_like(x0)
    for t, s in times:
        x_t = q_sample(x0, t, schedule, noise=noise).x_t
        p, q = schedule.target_coefficients(torch.tensor([t], device=device), objective)
        got = reverse_step(x_t, p * x0 + q * noise, t, s, schedule, objective=objective, eta=0.0)
        a, b = schedule.coefficients(torch.tensor([s], device=device))
        torch.testing.assert_close(got, a * x0 + b * noise, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["linear", "rectified_flow"])
def test_sampling_keeps_the_marginals(name, eta, device):
    """1e5 draws: data N(0, 0.5^2), and as the prediction a draw of the true posterior of x0."""
    schedule, deviation = schedules.get(name).to(device), 0.5
    t, s = (0.7, 0.3) if schedule.continuous else (500, 150)
    rows, columns = 25_000, 4
    draws = [normal(torch.tensor([7], device=device), rows, columns, Stream.PRIOR, salt=salt) for salt in (1, 2)]
    a, b = (float(value) for value in schedule.coefficients(torch.tensor([t], device=device)))
    a_s, b_s = (float(value) for value in schedule.coefficients(torch.tensor([s], device=device)))
    marginal = a**2 * deviation**2 + b**2
    x_t = math.sqrt(marginal) * draws[0]
    x0 = a * deviation**2 / marginal * x_t + deviation * b / math.sqrt(marginal) * draws[1]
    x_s = reverse_step(x_t, x0, t, s, schedule, objective="x0", eta=eta, seed=3).double()
    wanted, count = a_s**2 * deviation**2 + b_s**2, rows * columns
    assert abs(x_s.mean().item()) < 5 * math.sqrt(wanted / count)
    assert abs(x_s.square().mean().item() / wanted - 1) < 5 * math.sqrt(2 / count)
    # What it has of the clean image.
    covariance = (x_s * x0.double()).mean().item()
    assert abs(covariance - a_s * deviation**2) < 5 * deviation * math.sqrt(2 * wanted / count)


def test_t_may_be_any_kind_of_number(device):
    schedule = schedules.linear(1000).to(device)
    x_t, pred = _pair((4, 6), device)
    want = reverse_step(x_t, pred, 500, 480, schedule, seed=1)
    per_sample = torch.full((4,), 500, device=device)
    for t in (torch.tensor(500, device=device), torch.tensor([500], device=device), per_sample, per_sample.int()):
        assert torch.equal(reverse_step(x_t, pred, t, t - 20, schedule, seed=1), want)
        assert torch.equal(reverse_step(x_t, pred, t, 480, schedule, seed=1), want)
    strided = torch.stack([per_sample, per_sample * 0], 1)[:, 0]
    assert torch.equal(reverse_step(x_t, pred, strided, strided - 20, schedule, seed=1), want)
    flow = schedules.rectified_flow().to(device)
    want = reverse_step(x_t, pred, 0.5, 0.25, flow, seed=1)
    for t in (torch.tensor(0.5, device=device), torch.full((4,), 0.5, device=device)):
        assert torch.equal(reverse_step(x_t, pred, t, 0.25, flow, seed=1), want)


@pytest.mark.parametrize("name", ["linear", "rectified_flow"])
def test_samples_step_on_their_own(name, device):
    """Each at its own t, as its row alone would, however the batch is split."""
    schedule = schedules.get(name).to(device)
    t = torch.tensor([0.9, 0.5, 0.5, 0.1, 0.7], device=device)
    t = t if schedule.continuous else (1000 * t).long()
    t_prev = t / 2 if schedule.continuous else t // 2
    x_t, pred = _pair((5, 3, 4, 4), device)
    whole = reverse_step(x_t, pred, t, t_prev, schedule, seed=5)
    for size in (1, 2, 3):
        parts = [
            reverse_step(*(x[i : i + size] for x in (x_t, pred, t, t_prev)), schedule, seed=5, row_offset=i)
            for i in range(0, 5, size)
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", ["linear", "rectified_flow"])
def test_the_noise_is_that_of_the_seed_salted_by_t(name, device):
    schedule = schedules.get(name).to(device)
    times = (700, 300, 699) if name == "linear" else (0.7, 0.3, 0.699)
    x_t = pred = torch.zeros(6, 3, 4, 4, device=device)
    drawn = {}
    for t in times:
        got = reverse_step(x_t, pred, t, t / 2 if schedule.continuous else t // 2, schedule, seed=5, row_offset=2)
        salt = schedule.salt(torch.tensor([t], device=device))
        noise = normal(torch.tensor([5], device=device), 6, 48, Stream.REVERSE_STEP, 2, salt).reshape(x_t.shape)
        sigma = (got.norm() / noise.norm()).item()
        torch.testing.assert_close(got, sigma * noise, rtol=1e-5, atol=1e-5)
        drawn[t] = got / sigma
    first, second, third = drawn.values()
    for one, other in ((first, second), (first, third)):
        assert abs((one * other).mean().item()) < 5 / math.sqrt(one.numel())
    # Not the noise that made x_t.
    made = normal(torch.tensor([5], device=device), 6, 48, Stream.FORWARD_NOISE, 2).reshape(x_t.shape)
    assert abs((made * first).mean().item()) < 5 / math.sqrt(made.numel())


def test_a_seed_comes_from_torch_where_noise_is_drawn_and_only_there(device):
    schedule = schedules.linear(1000).to(device)
    x_t, pred = _pair((4, 6), device)

    def state() -> Tensor:
        return torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()

    torch.manual_seed(3)
    first, second = (reverse_step(x_t, pred, 500, 480, schedule) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(reverse_step(x_t, pred, 500, 480, schedule), first)
    assert not torch.equal(first, second)
    before = state()
    reverse_step(x_t, pred, 500, 480, schedule, eta=0.0)
    reverse_step(x_t, pred, 500, 480, schedule, noise=x_t)
    reverse_step(x_t, pred, 500, 480, schedule, x_prev=x_t, log_prob=True)
    assert torch.equal(state(), before)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", ["linear", "rectified_flow", "edm"])
def test_the_step_to_the_clean_image_adds_nothing(name, variance, device):
    schedule = schedules.get(name).to(device)
    t, end = (300, -1) if name == "linear" else (0.6, 0.0)
    x_t, pred = _pair((4, 6), device, variance == "learned_range")
    options = {"objective": "x0", "variance": variance, "seed": 0, "log_prob": True}
    got, density = reverse_step(x_t, pred, t, end, schedule, **options)
    torch.testing.assert_close(got, pred[:, :6], rtol=1e-6, atol=1e-7)
    assert torch.equal(density, torch.zeros(4, device=device))
    for recompute in (True, False):
        got, _ = reverse_step(x_t, pred, t, end, schedule, clip=0.5, recompute_eps=recompute, **options)
        torch.testing.assert_close(got, pred[:, :6].clamp(-0.5, 0.5), rtol=1e-6, atol=1e-7)
    leaves = [x.clone().requires_grad_() for x in (x_t, pred)]
    got, density = reverse_step(*leaves, t, end, schedule, **options)
    (got.sum() + density.sum()).backward()
    torch.testing.assert_close(leaves[1].grad[:, :6], torch.ones_like(x_t), rtol=1e-6, atol=0.0)
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_starts_where_no_signal_is_left(eta, clip, device):
    """Zero terminal SNR with v: log(a / b) is -inf, x_T is noise, and the network's x0 is -v."""
    schedule = schedules.zero_terminal_snr(schedules.linear(1000)).to(device)
    assert schedule.default_objective == "v"
    x_t, pred = _pair((4, 6), device)
    noise = torch.randn_like(x_t)
    got = reverse_step(x_t, pred, 999, 900, schedule, eta=eta, clip=clip, noise=noise)
    bar = schedule.alpha_bar_fp64[900]
    x0 = -pred.double().cpu()
    x0 = x0 if clip is None else x0.clamp(-1, 1)
    rest = (1 - bar).sqrt()
    mean = bar.sqrt() * x0 + rest * math.sqrt(1 - eta**2) * x_t.double().cpu()
    want = mean + eta * rest * noise.double().cpu()
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-6, atol=1e-6)


def test_a_schedule_of_one_step(device):
    schedule = schedules.from_betas([0.5]).to(device)
    x_t, pred = _pair((4, 6), device)
    got = reverse_step(x_t, pred, 0, -1, schedule, seed=0)
    torch.testing.assert_close(got, (x_t - math.sqrt(0.5) * pred) / math.sqrt(0.5), rtol=1e-6, atol=1e-6)


def test_a_step_of_no_length_stays(device):
    x_t, pred = _pair((4, 6), device)
    for schedule, t in ((schedules.linear(1000), 500), (schedules.rectified_flow(), 1.0), (schedules.edm(), 3.0)):
        for eta in (0.0, 1.0):
            got = reverse_step(x_t, pred, t, t, schedule.to(device), eta=eta, seed=0)
            torch.testing.assert_close(got, x_t, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_shortest_step_keeps_its_digits(eta, device):
    """2^-20 down from 0.5: what pred and the noise add is as accurate as they are, though next to nothing."""
    schedule, t = schedules.rectified_flow().to(device), 0.5
    pred, zero = torch.ones(1, 4, device=device), torch.zeros(1, 4, device=device)
    options = {"eta": eta, "objective": "epsilon"}
    added = reverse_step(zero, pred, t, t - 2**-20, schedule, noise=zero, **options)
    drawn = reverse_step(zero, zero, t, t - 2**-20, schedule, noise=pred, **options)
    a, b, a_s, b_s = (mpmath.mpf(value) for value in (0.5, 0.5, 0.5 + 2**-20, 0.5 - 2**-20))
    with mpmath.workdps(40):
        sigma = eta * b_s * mpmath.sqrt(1 - (a * b_s / (a_s * b)) ** 2)
        mean = mpmath.sqrt(b_s**2 - sigma**2) - a_s * b / a
    torch.testing.assert_close(added, torch.full_like(added, float(mean)), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(drawn, torch.full_like(drawn, float(sigma)), rtol=1e-6, atol=0.0)


def test_the_flow_runs_both_ways_from_the_clean_image(device):
    """eta = 0 integrates the ODE upwards too, from t = 0 on, where log(a / b) is inf."""
    x_t, velocity = _pair((4, 6), device)
    got = reverse_step(x_t, velocity, 0.0, 0.25, schedules.rectified_flow().to(device), eta=0.0)
    torch.testing.assert_close(got, x_t + 0.25 * velocity, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("where", ["t", "t_prev"])
@pytest.mark.parametrize("outside", [-2, -1, 1000, 2**40])
def test_a_time_outside_makes_its_sample_nan(where, outside, device):
    """What a GPU does, where nobody looks at t beforehand; nothing is read out of bounds."""
    if where == "t_prev" and outside == -1:
        pytest.skip("-1 is the clean image")
    module = reference
    if path(torch.device(device))[0] == "triton":
        from genfast.kernels import reverse_step as module
    tables = schedules.linear(1000).tables.to(device)
    x_t, pred = _pair((4, 6), device)
    times = {"t": torch.full((4,), 500, device=device), "t_prev": torch.tensor([480, -1, -1, 480], device=device)}
    times[where][1] = outside
    salt, seed = times["t"], torch.tensor([1], device=device)
    for variance in VARIANCES:
        both = torch.cat([pred, pred], 1) if variance == "learned_range" else pred
        for eta in (0.0, 1.0):
            for clip in (None, 1.0):
                drawn, density = module.forward(
                    x_t, both, tables, tables, *times.values(), salt, seed, None, None, 0, "epsilon", 1.0, eta, clip,
                    variance, True, eta > 0,
                )  # fmt: skip
                bad = torch.tensor([False, True, False, False], device=device)
                assert torch.equal(drawn.isnan().all(1), bad)
                assert torch.equal(drawn.isnan().any(1), bad)
                assert torch.equal(density.isnan(), bad[: len(density)])


def test_nan_passes_the_clip(device):
    schedule = schedules.linear(1000).to(device)
    x_t, pred = _pair((4, 6), device)
    pred[1, 2], pred[2, 3] = math.nan, math.inf
    for t_prev in (480, -1):
        got = reverse_step(x_t, pred, 500, t_prev, schedule, clip=1.0, seed=0)
        bad = torch.zeros(4, 6, dtype=torch.bool, device=device)
        bad[1, 2] = True
        assert torch.equal(got.isnan(), bad)
        assert got[2].isfinite().all()


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_density_is_that_of_what_came_out(variance, device):
    """In every dtype, rounded as it is stored; looked up again it is the same, so a policy's ratio starts at 1."""
    schedule = schedules.linear(1000).to(device)
    t = torch.tensor([900, 500, 100, 40], device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x_t, pred = (x.to(dtype) for x in _pair((4, 3, 4, 4), device, variance == "learned_range"))
        options = {"variance": variance, "clip": 1.0, "log_prob": True}
        x_prev, density = reverse_step(x_t, pred, t, t - 20, schedule, seed=0, **options)
        _, again = reverse_step(x_t, pred, t, t - 20, schedule, x_prev=x_prev, **options)
        torch.testing.assert_close(density, again, rtol=1e-5, atol=1e-4)
        wide = (x.double() for x in (x_t, pred, x_prev))
        x_wide, pred_wide, given = wide
        _, want = reverse_step(x_wide, pred_wide, t, t - 20, schedule, x_prev=given, **options)
        # 48 elements, each (x_prev - mean) / sigma off by up to 1e-6 / 0.01.
        torch.testing.assert_close(density.double(), want, rtol=1e-6, atol=5e-3)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_gradient_of_a_drawn_density_is_that_of_a_given_one(variance, device):
    """Beside the gradient of x_prev itself, which the density does not pass on."""
    schedule = schedules.linear(1000).to(device)
    t = torch.tensor([900, 500, 300, 40], device=device)
    x_t, pred = _pair((4, 6), device, variance == "learned_range")
    noise, upstream = torch.randn_like(x_t), torch.randn_like(x_t)
    weights = torch.tensor([0.5, -1.0, 2.0, 0.1], device=device)
    options = {"variance": variance, "clip": 1.0}

    def grads(values, *outputs) -> list[Tensor]:
        return torch.autograd.grad(sum((out * w).sum() for out, w in outputs), values)

    leaves = [x.clone().requires_grad_() for x in (x_t, pred)]
    x_prev, density = reverse_step(*leaves, t, t - 20, schedule, noise=noise, log_prob=True, **options)
    got = grads(leaves, (x_prev, upstream), (density, weights))
    plain = reverse_step(*leaves, t, t - 20, schedule, noise=noise, **options)
    given = reverse_step(*leaves, t, t - 20, schedule, x_prev=x_prev.detach(), log_prob=True, **options)[1]
    want = [sum(parts) for parts in zip(grads(leaves, (plain, upstream)), grads(leaves, (given, weights)), strict=True)]
    times = (schedule.tables, schedule.tables, t, t - 20, t)
    defined = reference.forward(
        *leaves, *times, None, noise, None, 0, "epsilon", 1.0, 1.0, 1.0, variance, True, True
    )  # fmt: skip
    by_autograd = grads(leaves, (defined[0], upstream), (defined[1], weights))
    for one, other, third in zip(got, want, by_autograd, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(one, third, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("variance", VARIANCES)
def test_policy_gradient_of_a_stored_step(variance):
    """The density of an x_prev from an older policy, by finite differences; the ratio's own gradient is not 0."""
    schedule = schedules.linear(1000)
    t = torch.tensor([900, 500, 300])
    x_t, pred = (x.double() for x in _pair((3, 2, 3), "cpu", variance == "learned_range"))
    options = {"variance": variance, "clip": 2.0, "log_prob": True}
    x_prev, old = reverse_step(x_t, pred + 0.1, t, t - 20, schedule, seed=0, **options)

    def surrogate(x_t: Tensor, pred: Tensor) -> Tensor:
        _, new = reverse_step(x_t, pred, t, t - 20, schedule, x_prev=x_prev, **options)
        return torch.exp(0.01 * (new - old))

    assert torch.autograd.gradcheck(surrogate, (x_t.requires_grad_(), pred.requires_grad_()))
    surrogate(x_t, pred).sum().backward()
    assert pred.grad.abs().max() > 1e-3


def test_a_density_of_several_tiles(device):
    """Sums over rows longer than a tile, and over channels read in place."""
    schedule = schedules.edm().to(device)
    x_t, pred = _pair((2, 4, 40, 40), device, learned=True)
    last = [x.to(memory_format=torch.channels_last) for x in (x_t, pred)]
    results = []
    for x, said in ((x_t, pred), last, (x_t.double(), pred.double())):
        options = {"variance": "learned_range", "x_prev": x + 50, "log_prob": True}
        results.append(reverse_step(x, said, 70.0, 50.0, schedule, **options)[1].double())
    torch.testing.assert_close(results[0], results[2], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(results[1], results[2], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_dtypes_may_differ(dtypes, device):
    """A loop that keeps x in fp32 around a network in bf16: nothing is cast, and gradients have their input's dtype."""
    schedule = schedules.linear(1000).to(device)
    x_t, pred = (x.to(dtype) for x, dtype in zip(_pair((3, 4, 8, 8), device), dtypes, strict=True))
    results = []
    for cast in (False, True):
        leaves = [x.clone().requires_grad_() for x in (x_t, pred)]
        values = [leaf.float() for leaf in leaves] if cast else leaves
        got = reverse_step(*values, 500, 480, schedule, seed=0, clip=1.0)
        assert got.dtype == torch.float32
        got.sin().sum().backward()
        results.append((got.detach(), *(leaf.grad for leaf in leaves)))
        assert [leaf.grad.dtype for leaf in leaves] == list(dtypes)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if one.dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    wide = reverse_step(x_t, pred.double(), 500, 480, schedule, seed=0)
    assert wide.dtype == torch.float64


@pytest.mark.skipif(path(torch.device("cpu"))[0] == "reference", reason="the reference on a CPU may copy")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_reads_and_writes_without_copies(memory_format):
    """Neither half of a prediction with v is made contiguous, and no gradient is put together by a cat."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    seen = []
    schedule = schedules.linear(1000)
    x_t, pred = (x.to(memory_format=memory_format) for x in _pair((2, 4, 8, 8), "cpu", learned=True))
    pred = pred.bfloat16().requires_grad_()
    upstream = torch.randn(2, 4, 8, 8).to(memory_format=memory_format)
    with Seen():
        got = reverse_step(x_t, pred, 500, 480, schedule, variance="learned_range", seed=0)
        got.backward(upstream)
    assert torch.ops.genfast.reverse_step_backward in seen
    assert not {torch.ops.aten.clone, torch.ops.aten.cat, torch.ops.aten.copy_, torch.ops.aten._to_copy} & set(seen)
    assert got.is_contiguous(memory_format=memory_format)
    assert pred.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("variance", VARIANCES)
def test_given_noise_takes_a_gradient(variance, device):
    schedule = schedules.linear(1000).to(device)
    x_t, pred = _pair((3, 4), device, variance == "learned_range")
    noise = torch.randn_like(x_t).requires_grad_()
    one, none = (
        reverse_step(x_t, pred, 500, 480, schedule, variance=variance, noise=value)
        for value in (noise, torch.zeros_like(noise))
    )
    one.sum().backward()
    torch.testing.assert_close(noise.grad * noise.detach(), (one - none).detach(), rtol=1e-4, atol=1e-6)


def _times_2d(value: int) -> Tensor:
    return torch.full((2, 1), value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x_t": [1.0]}, TypeError, "x_t: expected a tensor, got list"),
        ({"x_t": torch.zeros(2, 3).long()}, TypeError, "x_t: expected fp32, bf16, fp16 or fp64, got torch.int64"),
        ({"pred": torch.zeros(2, 4)}, ValueError, r"pred: expected the shape of x_t, \[2, 3\], got \[2, 4\]"),
        (
            {"variance": "learned_range"}, ValueError,
            r"pred: expected \[prediction \| v\] of shape \[2, 6\], got \[2, 3\]",
        ),
        (
            {"variance": "learned_range", "x_t": torch.zeros(2), "pred": torch.zeros(4)}, ValueError,
            r"x_t: expected at least 2 dimension\(s\) \[B, ...\], got shape \[2\]",
        ),
        ({"t": 1000}, ValueError, r"t: expected values in 0..999, got 1000"),
        ({"t": torch.tensor([5, -1])}, ValueError, r"t: expected values in 0..999, got -1"),
        ({"t_prev": -2}, ValueError, r"t_prev: expected values in -1..999, got -2"),
        ({"t_prev": 501}, ValueError, "t_prev: expected at most t = 500 unless eta = 0, got 501"),
        ({"t_prev": torch.tensor([3, 777])}, ValueError, "t_prev: expected at most t = 500 unless eta = 0, got 777"),
        ({"t": 500.0}, TypeError, "t: expected an int or a tensor, got float"),
        ({"t": torch.tensor([0.5])}, TypeError, "t: expected an int64 tensor, since the schedule is discrete"),
        ({"t": _times_2d(500)}, ValueError, r"t: expected one element or shape \[2\], got shape \[2, 1\]"),
        ({"objective": "noise"}, ValueError, "objective: expected one of 'epsilon', 'x0', 'v', 'flow', 'edm', got"),
        ({"variance": "learned"}, ValueError, "variance: expected one of 'fixed_small', 'fixed_large', 'learned_r"),
        ({"eta": 1.5}, ValueError, "eta: expected a number from 0 to 1, got 1.5"),
        ({"eta": -0.1}, ValueError, "eta: expected a finite number >= 0, got -0.1"),
        ({"eta": math.nan}, ValueError, "eta: expected a finite number >= 0, got nan"),
        ({"clip": -1.0}, ValueError, "clip: expected a finite number >= 0, got -1.0"),
        ({"noise": torch.zeros(2, 4)}, ValueError, r"noise: expected the shape of x_t, \[2, 3\], got \[2, 4\]"),
        ({"noise": torch.zeros(2, 3), "seed": 1}, ValueError, "seed: expected None when noise is given"),
        ({"row_offset": -1}, ValueError, "row_offset: expected an int >= 0, got -1"),
        ({"seed": 1.5}, TypeError, "seed: expected None, an int or an int64 tensor, got float"),
        ({"eta": 0.0, "log_prob": True}, ValueError, "log_prob: expected eta > 0, since a deterministic step has no"),
        ({"x_prev": torch.zeros(2, 3)}, ValueError, "log_prob: expected True when x_prev is given"),
        (
            {"x_prev": torch.zeros(2, 4), "log_prob": True}, ValueError,
            r"x_prev: expected the shape of x_t, \[2, 3\], got \[2, 4\]",
        ),
        (
            {"x_prev": torch.zeros(2, 3), "log_prob": True, "seed": 0}, ValueError,
            "seed: expected None when x_prev is given, since nothing is drawn",
        ),
        (
            {"x_prev": torch.zeros(2, 3), "log_prob": True, "noise": torch.zeros(2, 3)}, ValueError,
            "noise: expected None when x_prev is given, since nothing is drawn",
        ),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    arguments = {
        "x_t": torch.zeros(2, 3), "pred": torch.zeros(2, 3), "t": 500, "t_prev": 480, **change
    }  # fmt: skip
    with pytest.raises(error, match=message):
        reverse_step(*(arguments.pop(name) for name in ("x_t", "pred", "t", "t_prev")), schedules.linear(), **arguments)


def test_a_schedule_elsewhere_is_named():
    with pytest.raises(ValueError, match="schedule: expected one on the device of the images, cpu, got meta"):
        reverse_step(torch.zeros(2, 3), torch.zeros(2, 3), 500, 480, schedules.linear().to("meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_one_captured_step_serves_a_trajectory():
    """t and t_prev are read from the device at each replay, and each t has noise of its own."""
    schedule = schedules.linear(1000).to("cuda")
    x_t, pred = _pair((8, 3, 8, 8), "cuda")
    t, t_prev = (torch.full((1,), value, device="cuda") for value in (500, 480))
    seed = torch.tensor([3], device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        reverse_step(x_t, pred, t, t_prev, schedule, seed=seed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = reverse_step(x_t, pred, t, t_prev, schedule, seed=seed)
    for now, then in ((500, 480), (480, 100), (100, -1)):
        t.fill_(now)
        t_prev.fill_(then)
        graph.replay()
        assert torch.equal(got, reverse_step(x_t, pred, now, then, schedule, seed=3))


def test_no_eps_is_recomputed_from_a_clean_image(device):
    """With clip the way from t = 0 must go by the network's own eps."""
    schedule = schedules.rectified_flow().to(device)
    x, pred = torch.full((2, 3), 0.5, device=device), torch.zeros(2, 3, device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match="recompute_eps: expected False with clip at t = 0"):
            reverse_step(x, pred, 0.0, 0.5, schedule, eta=0.0, clip=1.0)
    there = reverse_step(x, pred, 0.0, 0.5, schedule, eta=0.0, clip=1.0, recompute_eps=False)
    torch.testing.assert_close(there, reverse_step(x, pred, 0.0, 0.5, schedule, eta=0.0))


def test_what_wants_a_gradient_is_refused_where_none_would_come(device):
    class Learned(schedules.ContinuousSchedule):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def path(self, t):
            return 1 - self.w * t, self.w * t

    x = torch.zeros(2, 3, device=device)
    learned = Learned().to(device)
    with pytest.raises(ValueError, match="schedule: expected no need of a gradient"):
        q_sample(x, 0.5, learned)
    with pytest.raises(ValueError, match="schedule: expected no need of a gradient"):
        reverse_step(x, x, 0.5, 0.25, learned, eta=0.0)
    t = torch.tensor([0.5, 0.6], device=device, requires_grad=True)
    with pytest.raises(ValueError, match="t: expected no need of a gradient"):
        q_sample(x, t, schedules.rectified_flow().to(device))
