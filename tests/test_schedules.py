"""Schedules: tables against 50 digits and diffusers, formulas against the papers, draws, checks, and as modules."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from genfast import schedules
from genfast.random import Stream, integers, new_seed, normal

DISCRETE = {
    "linear": schedules.linear,
    "scaled_linear": schedules.scaled_linear,
    "cosine": schedules.cosine,
    "sigmoid_beta": schedules.sigmoid_beta,
    "sigmoid": schedules.sigmoid,
    "zero_snr": lambda *a: schedules.zero_terminal_snr(schedules.linear(*a)),
}
EVERY = {**DISCRETE, "rectified_flow": schedules.rectified_flow, "edm": schedules.edm}
# (a, b) = (1, 0), and no more than nothing at all of the other.
SOME_TIMES = {"rectified_flow": [0.0, 1e-4, 0.3, 0.5, 0.9999, 1.0], "edm": [1e-6, 0.002, 0.5, 1.0, 80.0, 1e5]}


def times_of(name: str) -> torch.Tensor:
    return torch.tensor(SOME_TIMES.get(name, [0, 1, 500, 998, 999]))


def diffusers_of(name: str, scheduler=DDPMScheduler, **options):
    kind = {"cosine": "squaredcos_cap_v2", "sigmoid_beta": "sigmoid"}.get(name, name)
    betas = {"beta_start": 0.00085, "beta_end": 0.012} if name == "scaled_linear" else {}
    return scheduler(beta_schedule=kind, **betas, **options)


# ---- tables


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid_beta"])
def test_tables_are_those_of_diffusers(name, zero_snr):
    """Within the rounding of their fp32 cumulative product."""
    theirs = diffusers_of(name, rescale_betas_zero_snr=zero_snr)
    ours = schedules.get(name, zero_terminal_snr=zero_snr)
    torch.testing.assert_close(ours.betas, theirs.betas, rtol=3e-7, atol=1e-5 if zero_snr else 0)
    torch.testing.assert_close(ours.alpha_bar, theirs.alphas_cumprod, rtol=0, atol=1e-6)
    assert (ours.alpha_bar[-1] == 0) == zero_snr


@pytest.mark.parametrize("name", ["linear", "cosine", "zero_snr"])
def test_tables_are_exact(name):
    """Every entry is 50-digit arithmetic rounded once, and the log of a / b has 45 bits."""
    mpmath.mp.dps = 50
    schedule = DISCRETE[name](1000)
    mp, pi = mpmath.mpf, mpmath.pi
    if name == "cosine":
        f = [mpmath.cos((mp(i) / 1000 + mp("0.008")) / mp("1.008") * pi / 2) ** 2 for i in range(1001)]
        betas = [min(1 - f[i + 1] / f[i], mp("0.999")) for i in range(1000)]
    else:
        betas = [mp("1e-4") + (mp("0.02") - mp("1e-4")) * i / 999 for i in range(1000)]
    alpha_bar, product = [], mp(1)
    for beta in betas:
        product *= 1 - beta
        alpha_bar.append(product)
    if name == "zero_snr":
        roots = [mpmath.sqrt(value) for value in alpha_bar]
        scale = roots[0] / (roots[0] - roots[-1])
        alpha_bar = [((root - roots[-1]) * scale) ** 2 for root in roots]
    a, b, hi, lo = schedule.tables
    for t, value in enumerate(alpha_bar):
        assert a[t] == np.float32(mpmath.sqrt(value))
        assert b[t] == np.float32(mpmath.sqrt(1 - value))
        assert schedule.alpha_bar[t] == np.float32(value)
        if value > 0:
            log_ratio = (mpmath.log(value) - mpmath.log(1 - value)) / 2
            # A rescaled alpha_bar is known to 1e-16 itself, which 1 - alpha_bar feels where it is small.
            bound = 2e-12 if name == "zero_snr" else 2.0**-45 * max(1, abs(log_ratio))
            assert abs(mp(hi[t].item()) + mp(lo[t].item()) - log_ratio) < bound
    if name == "zero_snr":
        assert [row[-1].item() for row in (a, b, hi, lo)] == [0, 1, -math.inf, 0]


def test_the_sigmoid_of_alpha_bar_is_the_papers():
    """Chen 2023, Algorithm 1, at t = 1 / T .. 1."""
    got = schedules.sigmoid(50, start=-2.0, end=4.0, tau=0.7).alpha_bar_fp64

    def s(x):
        return 1 / (1 + math.exp(-x / 0.7))

    want = [max((s(4) - s(i / 50 * 6 - 2)) / (s(4) - s(-2)), 1e-9) for i in range(1, 51)]
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_a_and_b_are_the_tables_rows(name):
    schedule, t = EVERY[name](), times_of(name)
    a, b = schedule.coefficients(t)
    table = schedule.table(t)
    assert (a.dtype, a.shape, table.shape) == (torch.float32, t.shape, (4, len(t)))
    assert torch.equal(table[:2], torch.stack([a, b]))
    if not schedule.continuous:
        assert torch.equal(table, schedule.tables[:, t])
        torch.testing.assert_close(a * a + b * b, torch.ones(len(t)))
    want = torch.log(a.double() / b.double())
    torch.testing.assert_close(table[2].double() + table[3].double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(schedule.snr(t), (2 * want).exp().float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["rectified_flow", "edm"])
def test_continuous_tables_are_exact(name):
    t = times_of(name)
    a, b, hi, lo = EVERY[name]().table(t)
    mpmath.mp.dps = 50
    for i, time in enumerate(t.tolist()):
        signal = mpmath.mpf(1) - time if name == "rectified_flow" else mpmath.mpf(1)
        assert a[i] == np.float32(signal)
        assert b[i] == np.float32(time)
        if time > 0 and signal > 0:
            want = mpmath.log(signal / time)
            assert abs(mpmath.mpf(hi[i].item()) + lo[i].item() - want) < 2.0**-45 * max(1, abs(want))
        else:
            assert (hi[i].item(), lo[i].item()) == (math.inf if time == 0 else -math.inf, 0)


def test_the_clean_image_and_what_is_outside():
    schedule = schedules.linear(10)
    columns = schedule.table(torch.tensor([-1, 10, -2, 3]))
    assert columns[:, 0].tolist() == [1, 0, math.inf, 0]
    assert columns[:, 1:3].isnan().all()
    assert torch.equal(columns[:, 3], schedule.tables[:, 3])
    flow = schedules.rectified_flow().table(torch.tensor([0.0, -0.01, 1.01, math.nan]))
    assert flow[:, 0].tolist() == [1, 0, math.inf, 0]
    assert flow[:, 1:].isnan().all()
    edm = schedules.edm().table(torch.tensor([0.0, -1.0, math.inf, math.nan]))
    assert edm[:, 0].tolist() == [1, 0, math.inf, 0]
    assert edm[:, 1:].isnan().all()


def test_numbers_do_for_tensors():
    for schedule, t in ((schedules.linear(), 7), (schedules.rectified_flow(), 0.25), (schedules.edm(), 3.0)):
        assert torch.equal(schedule.table(t), schedule.table(torch.tensor([t])))


def test_own_tables():
    betas = [0.1, 0.2, 0.5]
    alpha_bar = [0.9, 0.72, 0.36]
    for schedule in (
        schedules.from_betas(betas),
        schedules.from_betas(np.array(betas)),
        schedules.from_alpha_bar(alpha_bar),
        schedules.from_alpha_bar(torch.tensor(alpha_bar, dtype=torch.float64)),
    ):
        assert schedule.num_steps == 3
        assert schedule.config is None
        np.testing.assert_allclose(schedule.betas_fp64, betas, rtol=1e-14)
        np.testing.assert_allclose(schedule.alpha_bar_fp64, alpha_bar, rtol=1e-14)
    theirs = DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    assert torch.equal(schedules.from_alpha_bar(theirs).alpha_bar, theirs)
    given = torch.tensor(betas, dtype=torch.float64)
    schedule = schedules.from_betas(given)
    given.zero_()
    assert schedule.betas_fp64[0] == 0.1


@pytest.mark.parametrize("name", [name for name in DISCRETE if name != "zero_snr"])
def test_one_step_is_enough(name):
    schedule = DISCRETE[name](1)
    assert schedule.tables.shape == (4, 1)
    assert schedule.tables.isfinite().all()
    assert schedule.timesteps().tolist() == [0, -1]
    assert schedule.draw_t(5, seed=0).tolist() == [0] * 5
    assert schedule.weight(0, "epsilon", "min_snr").isfinite().all()


def test_a_last_beta_of_one():
    """What zero-terminal-SNR tables have, and no other step may."""
    schedule = schedules.from_betas([0.1, 1.0])
    assert schedule.tables[:, 1].tolist() == [0, 1, -math.inf, 0]
    assert schedule.default_objective == "v"
    assert schedules.from_betas([0.1, 0.5]).default_objective == "epsilon"
    again = schedules.from_betas(schedules.zero_terminal_snr(schedules.linear(100)).betas_fp64)
    assert again.tables[0, -1] == 0


def test_zero_terminal_snr_keeps_the_first_step_and_may_be_repeated():
    once = schedules.zero_terminal_snr(schedules.linear(100))
    assert torch.equal(once.tables[:3, 0], schedules.linear(100).tables[:3, 0])
    twice = schedules.zero_terminal_snr(once)
    torch.testing.assert_close(twice.tables, once.tables)
    assert twice.config == once.config


# ---- what follows from a and b


def v_prediction(a, b, x0, eps):
    return a * eps - b * x0


@pytest.mark.parametrize("name", EVERY)
def test_targets_give_back_the_image_and_the_noise(name):
    schedule, t = EVERY[name](), times_of(name)
    a, b = (c.double() for c in schedule.coefficients(t))
    x0, eps = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-1.3, dtype=torch.float64)
    wants = {
        "epsilon": eps.expand_as(a),
        "x0": x0.expand_as(a),
        "v": v_prediction(a, b, x0, eps),
        "flow": (eps - x0).expand_as(a),
    }
    assert set(schedules.OBJECTIVES) == {*wants, "edm"}
    for objective, want in wants.items():
        p, q = schedule.target_coefficients(t, objective)
        torch.testing.assert_close(p.double() * x0 + q.double() * eps, want, rtol=1e-6, atol=1e-6)
    default = schedule.target_coefficients(t)
    for got, want in zip(default, schedule.target_coefficients(t, schedule.default_objective), strict=True):
        assert torch.equal(got, want)


def test_edm_is_the_papers_table():
    """Karras et al. 2022, Table 1, and eq. 8: F's target is (x0 - c_skip x) / c_out, its weight lambda c_out^2 = 1."""
    schedule = schedules.edm(sigma_data=0.6)
    sigma = torch.tensor([0.002, 0.1, 0.6, 3.0, 80.0])
    s, d = sigma.double(), 0.6
    c_skip, c_out = d**2 / (s**2 + d**2), s * d / (s**2 + d**2).sqrt()
    c_in, c_noise = 1 / (s**2 + d**2).sqrt(), s.log() / 4
    tolerance = {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(schedule.c_skip(sigma).double(), c_skip, **tolerance)
    torch.testing.assert_close(schedule.c_out(sigma).double(), c_out, **tolerance)
    torch.testing.assert_close(schedule.input_scale(sigma).double(), c_in, **tolerance)
    torch.testing.assert_close(schedule.time_input(sigma).double(), c_noise, **tolerance)
    p, q = schedule.target_coefficients(sigma)
    torch.testing.assert_close(p.double(), (1 - c_skip) / c_out, **tolerance)
    torch.testing.assert_close(q.double(), -c_skip * s / c_out, **tolerance)
    weighting = (s**2 + d**2) / (s * d) ** 2
    torch.testing.assert_close(schedule.weight(sigma, "x0", "sigma").double(), weighting, **tolerance)
    torch.testing.assert_close(schedule.weight(sigma, "edm", "sigma"), torch.ones(5), rtol=1e-6, atol=0)


def test_edm_agrees_with_diffusers_preconditioning():
    schedule, theirs = schedules.edm(), EDMEulerScheduler()
    sigma = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0])
    x, out = torch.randn(2, 5)
    torch.testing.assert_close(x * schedule.c_in(sigma), theirs.precondition_inputs(x, sigma))
    torch.testing.assert_close(schedule.c_noise(sigma), theirs.precondition_noise(sigma))
    ours = schedule.c_skip(sigma) * x + schedule.c_out(sigma) * out
    torch.testing.assert_close(ours, theirs.precondition_outputs(x, out, sigma))


@pytest.mark.parametrize("name", EVERY)
def test_min_snr_weights_are_the_papers(name):
    """Hang et al. 2023, eq. 9 and 10: min(SNR, gamma) on x0, / SNR on epsilon, / (SNR + 1) on v where a^2 + b^2 = 1."""
    schedule, t = EVERY[name](), times_of(name)
    t = t[t > 0]
    a, b = (c.double() for c in schedule.coefficients(t))
    snr = (a / b) ** 2
    x0 = snr.clamp(max=5)
    wants = {"x0": x0, "epsilon": torch.where(snr == 0, 1.0, x0 / snr)}
    if not schedule.continuous:
        wants["v"] = x0 / (snr + 1)
    if name == "rectified_flow":
        # x0's error is t times that of the velocity.
        wants["flow"] = x0 * t.double() ** 2
    for objective, want in wants.items():
        got = schedule.weight(t, objective, "min_snr")
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)
    torch.testing.assert_close(schedule.weight(t, "x0", "min_snr", 0.3).double(), snr.clamp(max=0.3), rtol=2e-6, atol=0)
    assert schedule.weight(t, "v").tolist() == [1.0] * len(t)


def test_weights_where_no_signal_is_left():
    schedule = schedules.zero_terminal_snr(schedules.linear())
    assert schedule.snr(999).item() == 0
    weights = {objective: schedule.weight(999, objective, "min_snr").item() for objective in schedules.OBJECTIVES}
    # The v, flow and edm targets hold x0 there, and its weight is the SNR.
    assert weights == {"epsilon": 1.0, "x0": 0.0, "v": 0.0, "flow": 0.0, "edm": 0.0}


# ---- sampling times


@pytest.mark.parametrize("spacing", schedules.SPACINGS)
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("num_steps", [1, 7, 1000])
def test_timesteps_are_those_of_diffusers(scheduler, spacing, num_steps):
    """For every number of steps; where rounding makes theirs end with a step more, at -1, ours goes without it."""
    theirs = scheduler(num_train_timesteps=num_steps, timestep_spacing=spacing, steps_offset=0)
    ours = schedules.linear(num_steps)
    extra = 0
    for steps in range(1, num_steps + 1):
        theirs.set_timesteps(steps)
        t = ours.timesteps(steps, spacing)
        assert (t.dtype, len(t)) == (torch.int64, steps + 1)
        assert torch.equal(t[: len(theirs.timesteps)], theirs.timesteps)
        assert t[-1] == -1
        extra += len(theirs.timesteps) - steps
    assert extra == (62 if (spacing, num_steps) == ("trailing", 1000) else 0)


def test_all_timesteps_by_default():
    assert schedules.linear(5).timesteps().tolist() == [4, 3, 2, 1, 0, -1]
    assert len(schedules.rectified_flow().timesteps()) == len(schedules.edm().timesteps()) == 51


@pytest.mark.parametrize("steps", [1, 2, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_times_are_those_of_diffusers(shift, steps):
    """Given the even sigmas that its pipelines pass."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    ours = schedules.rectified_flow(shift=shift)
    t = ours.timesteps(steps)
    torch.testing.assert_close(t, theirs.sigmas, rtol=2e-7, atol=0)
    assert (t.dtype, t[0].item(), t[-1].item()) == (torch.float32, 1.0, 0.0)
    torch.testing.assert_close(ours.time_input(t[:-1]), theirs.timesteps)
    assert ours.input_scale(t) is None


@pytest.mark.parametrize("options", [{}, {"sigma_min": 0.01, "sigma_max": 20.0, "rho": 5.0}], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 18])
def test_edm_times_are_those_of_diffusers(options, steps):
    theirs = EDMEulerScheduler(**options)
    theirs.set_timesteps(steps)
    t = schedules.edm(**options).timesteps(steps)
    torch.testing.assert_close(t, theirs.sigmas, rtol=2e-7, atol=0)
    assert t[-1] == 0


# ---- draws


@pytest.mark.parametrize("name", EVERY)
def test_a_sample_draws_the_same_time_in_any_batch(name):
    schedule = EVERY[name]()
    whole = schedule.draw_t(64, seed=3)
    assert whole.dtype == (torch.float32 if schedule.continuous else torch.int64)
    for size in (1, 7, 32):
        parts = [schedule.draw_t(min(size, 64 - i), seed=3, row_offset=i) for i in range(0, 64, size)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(schedule.draw_t(64, seed=torch.tensor([3])), whole)
    assert not torch.equal(schedule.draw_t(64, seed=4), whole)
    torch.manual_seed(9)
    drawn = schedule.draw_t(64)
    torch.manual_seed(9)
    assert torch.equal(schedule.draw_t(64, seed=new_seed()), drawn)
    assert schedule.draw_t(0, seed=0).shape == (0,)


def test_discrete_times_are_the_documented_bits():
    """(bits * T) >> 32 at position 0 of the rows: uniform, and each value comes."""
    schedule = schedules.linear(1000)
    t = schedule.draw_t(200_000, seed=11)
    assert torch.equal(t, integers(11, 200_000, 1, 1000, Stream.TIMESTEP)[:, 0])
    counts = torch.bincount(t, minlength=1000)
    assert len(counts) == 1000
    assert counts.min() > 0
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-4


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.7)])
def test_flow_times_are_logit_normal(mean, std):
    t = schedules.rectified_flow(mean=mean, std=std).draw_t(200_000, seed=11)
    assert 0 < t.min() < t.max() < 1
    assert scipy.stats.kstest(torch.logit(t.double()).numpy(), "norm", args=(mean, std)).pvalue > 1e-4
    z = normal(11, 5, 1, Stream.TIMESTEP)[:, 0]
    torch.testing.assert_close(t[:5], torch.sigmoid(mean + std * z))


def test_flow_times_may_be_uniform():
    t = schedules.rectified_flow(draw="uniform").draw_t(200_000, seed=11)
    assert scipy.stats.kstest(t.double().numpy(), "uniform").pvalue > 1e-4


def test_edm_times_are_log_normal():
    for schedule, (mean, std) in ((schedules.edm(), (-1.2, 1.2)), (schedules.edm(mean=-0.4, std=1.7), (-0.4, 1.7))):
        sigma = schedule.draw_t(200_000, seed=11)
        assert scipy.stats.kstest(sigma.double().log().numpy(), "norm", args=(mean, std)).pvalue > 1e-4


def test_salts():
    t = torch.tensor([0, 1, 999])
    assert schedules.linear().salt(t).tolist() == [0, 1, 999]
    assert schedules.linear().salt(t.int()).dtype == torch.int64
    for schedule in (schedules.rectified_flow(shift=3.0), schedules.edm()):
        times = schedule.timesteps(500)
        salts = schedule.salt(times)
        bits = torch.from_numpy(times.numpy().view(np.int32)).long()
        assert torch.equal(salts, bits // 128 % 2**24)
        assert salts.dtype == torch.int64
        assert len(set(salts.tolist())) == 501
        assert torch.equal(schedule.salt(times[:1].expand(4)), salts[:1].expand(4))


# ---- check_t


@pytest.mark.parametrize(
    "t", [3, np.int64(3), torch.tensor(3), torch.tensor([3]), torch.tensor([[3]]), torch.tensor([3], dtype=torch.int32)]
)
def test_one_time_for_all_is_not_copied(t):
    got = schedules.linear(10).check_t(t, 4, "cpu")
    assert got.tolist() == [3] * 4
    assert (got.dtype, got.stride()) == (torch.int64, (0,))


def test_a_time_for_each():
    schedule = schedules.linear(10)
    t = torch.tensor([0, 9, 4])
    assert schedule.check_t(t, 3, "cpu").data_ptr() == t.data_ptr()
    assert schedule.check_t(t.int(), 3, "cpu").dtype == torch.int64
    assert schedule.check_t(torch.tensor([-1, 9]), 2, "cpu", clean=True).tolist() == [-1, 9]
    assert schedule.check_t(torch.tensor([], dtype=torch.int64), 0, "cpu").shape == (0,)
    flow, edm = schedules.rectified_flow(), schedules.edm()
    assert flow.check_t(torch.tensor([0.0, 1.0], dtype=torch.bfloat16), 2, "cpu").dtype == torch.float32
    assert flow.check_t(1, 2, "cpu").tolist() == [1.0, 1.0]
    assert edm.check_t(80.0, 2, "cpu").tolist() == [80.0, 80.0]
    assert edm.check_t(torch.tensor([0.0]), 2, "cpu", clean=True).tolist() == [0.0, 0.0]


BAD_TIMES = [
    ("linear", 1000, ValueError, "s: expected values in 0..999, got 1000"),
    ("linear", -1, ValueError, "s: expected values in 0..999, got -1"),
    ("linear", torch.tensor([5, 1000]), ValueError, "s: expected values in 0..999, got 1000"),
    ("linear", torch.tensor([-1, 5]), ValueError, "s: expected values in 0..999, got -1"),
    ("linear", torch.tensor(-7), ValueError, "s: expected values in 0..999, got -7"),
    ("linear", 0.5, TypeError, "s: expected an int or a tensor, got float"),
    ("linear", True, TypeError, "s: expected an int or a tensor, got bool"),
    ("linear", [1, 2], TypeError, "s: expected an int or a tensor, got list"),
    ("linear", torch.rand(2), TypeError, "s: expected an int64 tensor, .* discrete, got torch.float32"),
    ("linear", torch.tensor([True, False]), TypeError, "s: expected an int64 tensor, .*, got torch.bool"),
    ("linear", torch.tensor([1, 2], dtype=torch.uint8), TypeError, "s: expected an int64 tensor, .*, got torch.uint8"),
    ("linear", torch.arange(3), ValueError, r"s: expected one element or shape \[2\], got shape \[3\]"),
    ("linear", torch.ones(2, 1).long(), ValueError, r"s: expected one element or shape \[2\], got shape \[2, 1\]"),
    ("linear", torch.arange(2, device="meta"), ValueError, "s: expected a tensor on cpu, got one on meta"),
    ("rectified_flow", 1.5, ValueError, r"s: expected values in \[0, 1\], got 1.5"),
    ("rectified_flow", torch.tensor([0.5, -0.5]), ValueError, r"s: expected values in \[0, 1\], got -0.5"),
    ("rectified_flow", torch.tensor([0.5, math.nan]), ValueError, r"s: expected values in \[0, 1\], got nan"),
    ("rectified_flow", torch.tensor([0, 1]), TypeError, "s: expected a float tensor, .* continuous, got torch.int64"),
    ("rectified_flow", "x", TypeError, "s: expected a float or a tensor, got str"),
    ("edm", 0.0, ValueError, "s: expected finite values above 0, got 0.0"),
    ("edm", torch.tensor([0.0, 1.0]), ValueError, "s: expected finite values above 0, got 0"),
    ("edm", math.inf, ValueError, "s: expected finite values above 0, got inf"),
]


@pytest.mark.parametrize(("name", "t", "error", "message"), BAD_TIMES)
def test_bad_times_say_what_was_expected(name, t, error, message):
    with pytest.raises(error, match=message):
        EVERY[name]().check_t(t, 2, "cpu", name="s")


def test_the_clean_time_is_one_step_below():
    with pytest.raises(ValueError, match=r"t: expected values in -1..999, got -2"):
        schedules.linear().check_t(-2, 2, "cpu", clean=True)
    with pytest.raises(ValueError, match="t: expected finite values of at least 0, got -1"):
        schedules.edm().check_t(torch.tensor([-1.0]), 2, "cpu", clean=True)


def test_a_float_time_has_no_column():
    with pytest.raises(TypeError, match="t: expected an int64 tensor"):
        schedules.linear().coefficients(torch.rand(2))
    with pytest.raises(TypeError, match="t: expected a float tensor"):
        schedules.edm().coefficients(torch.arange(2))


# ---- compiled, exported, cast, moved, saved


class Weighted(nn.Module):
    """A user of every method on tensors."""

    def __init__(self, schedule: schedules.Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        t = self.schedule.check_t(t, t.shape[0], t.device)
        rows = [
            *self.schedule.table(t), *self.schedule.coefficients(t), *self.schedule.target_coefficients(t),
            self.schedule.snr(t), self.schedule.weight(t, "v", "min_snr"), self.schedule.salt(t),
            self.schedule.time_input(t),
        ]  # fmt: skip
        scale = self.schedule.input_scale(t)
        return torch.stack([row.float() for row in rows] + ([] if scale is None else [scale]))


@pytest.mark.parametrize(
    ("name", "backend"), [("linear", "inductor"), ("edm", "inductor"), ("rectified_flow", "aot_eager")]
)
def test_compiled_without_a_break(name, backend):
    model, t = Weighted(EVERY[name]()), times_of(name)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(t), model(t))
    draw = torch.compile(lambda s: model.schedule.draw_t(9, seed=s, row_offset=5), fullgraph=True, backend=backend)
    seed = torch.tensor([6])
    torch.testing.assert_close(draw(seed), model.schedule.draw_t(9, seed=seed, row_offset=5))


def test_compiled_code_checks_times_too():
    check = torch.compile(lambda t: schedules_of_ten.check_t(t, 2, t.device) + 1, fullgraph=True, backend="aot_eager")
    schedules_of_ten = schedules.linear(10)
    assert check(torch.tensor([0, 9])).tolist() == [1, 10]
    with pytest.raises(RuntimeError, match=r"t: expected values in 0\.\.9"):
        check(torch.tensor([0, 10]))


@pytest.mark.parametrize("name", ["linear", "rectified_flow", "edm"])
def test_exported_with_any_batch(name):
    model, t = Weighted(EVERY[name]()), times_of(name)
    exported = torch.export.export(model, (t,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(exported.module()(t[1:]), model(t[1:]))
    with pytest.raises(RuntimeError, match="t: expected"):
        exported.module()(-t - 1)


def test_nothing_is_looked_at_on_fake_tensors():
    schedule = schedules.linear(10)
    with FakeTensorMode(allow_non_fake_inputs=True):
        t = schedule.check_t(torch.empty(3, dtype=torch.int64), 3, "cpu")
        assert schedule.table(t).shape == (4, 3)


CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
    "float": lambda model: model.float(),
    "cpu": lambda model: model.to("cpu", torch.float16),
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "shared": lambda model: model.share_memory(),
    "emptied": lambda model: model.to_empty(device="cpu"),
    "from meta": lambda model: model.to("meta").to_empty(device="cpu"),
    "half on meta": lambda model: model.to("meta").half().to_empty(device="cpu"),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", ["linear", "rectified_flow", "edm"])
def test_tables_stay_what_they_are(name, cast):
    schedule, t = EVERY[name](), times_of(name)
    model = nn.Sequential(nn.Linear(2, 2), EVERY[name]())
    moved = CASTS[cast](model)[1]
    assert torch.equal(moved.table(t), schedule.table(t))
    assert torch.equal(moved.draw_t(5, seed=2), schedule.draw_t(5, seed=2))
    if not schedule.continuous:
        for buffer in ("tables", "alpha_bar", "betas"):
            got = getattr(moved, buffer)
            assert got.dtype == torch.float32
            assert torch.equal(got, getattr(schedule, buffer))
            assert dict(moved.named_buffers())[buffer] is got
    if cast == "shared":
        assert all(buffer.is_shared() for buffer in moved.buffers())


def test_made_on_the_meta_device():
    with torch.device("meta"):
        schedule = schedules.linear()
    assert schedule.tables.is_meta
    assert torch.equal(schedule.to_empty(device="cpu").tables, schedules.linear().tables)


def test_on_the_tests_device(device):
    for name, make in EVERY.items():
        schedule, t = make().to(device), times_of(name).to(device)
        assert schedule.device.type == device
        for values in (schedule.table(t), schedule.draw_t(4, seed=1), schedule.timesteps(5), schedule.weight(t)):
            assert values.device.type == device
        torch.testing.assert_close(schedule.table(t).cpu(), make().table(t.cpu()))
        torch.testing.assert_close(schedule.draw_t(99, seed=1).cpu(), make().draw_t(99, seed=1), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_not_waited_for():
    schedule, t = schedules.linear(10).cuda(), torch.tensor([0, 10], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        a, _ = schedule.coefficients(schedule.check_t(t, 2, "cuda"))
        weight = schedule.weight(schedule.draw_t(8, seed=torch.full((1,), 3, device="cuda")), "v", "min_snr")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert a.isnan().tolist() == [False, True]
    assert weight.isfinite().all()


def test_nothing_is_saved_or_trained():
    for make in EVERY.values():
        schedule = make()
        assert schedule.state_dict() == {}
        assert list(schedule.parameters()) == []
        schedule.load_state_dict({})
        stream = io.BytesIO()
        torch.save(schedule, stream)
        stream.seek(0)
        assert repr(torch.load(stream, weights_only=False)) == repr(schedule)


# ---- names


@pytest.mark.parametrize("name", schedules.NAMES)
def test_a_schedule_is_rebuilt_from_its_config(name):
    """Through JSON, and with values of its own."""
    options = {
        "linear": {"num_steps": 20, "beta_start": 1e-3, "beta_end": 0.3},
        "scaled_linear": {"num_steps": 20, "beta_start": 1e-3, "beta_end": 0.3},
        "sigmoid_beta": {"num_steps": 20, "beta_start": 1e-3, "beta_end": 0.3},
        "cosine": {"num_steps": 20, "offset": 0.01, "max_beta": 0.9},
        "sigmoid": {"num_steps": 20, "start": 0.0, "end": 3.0, "tau": 0.5},
        "rectified_flow": {"shift": 3.0, "draw": "logit_normal", "mean": 0.5, "std": 2.0},
        "edm": {
            "sigma_min": 0.01, "sigma_max": 50.0, "rho": 5.0, "sigma_data": 0.3, "mean": -1.0, "std": 1.5,
        },
    }[name]  # fmt: skip
    assert schedules.get(name.replace("_", "-")).config == schedules.get(name).config
    for extra in ({}, {"zero_terminal_snr": True}) if "num_steps" in options else ({},):
        schedule = schedules.get(name, **options, **extra)
        assert schedule.config == {"name": name, **options, **extra}
        again = schedules.get(**json.loads(json.dumps(schedule.config)))
        assert repr(again) == repr(schedule)
        assert type(again) is type(schedule)
        assert torch.equal(again.draw_t(9, seed=1), schedule.draw_t(9, seed=1))
        assert torch.equal(again.timesteps(5), schedule.timesteps(5))
        assert again.sigma_data == schedule.sigma_data == options.get("sigma_data", 1.0)
        if not schedule.continuous:
            assert torch.equal(again.tables, schedule.tables)
            assert (schedule.tables[0, -1] == 0) == bool(extra)
            assert not torch.equal(schedule.tables, schedules.get(name, num_steps=20, **extra).tables)


def test_default_objectives():
    wanted = {"rectified_flow": "flow", "edm": "edm", "zero_snr": "v"}
    for name, make in EVERY.items():
        assert make().default_objective == wanted.get(name, "epsilon")


def test_an_own_continuous_schedule():
    """Only the path is given: the rest follows."""

    class Circle(schedules.ContinuousSchedule):
        def path(self, t):
            return torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)

    schedule = Circle()
    t = schedule.draw_t(2000, seed=0)
    assert scipy.stats.kstest(t.numpy(), "uniform").pvalue > 1e-4
    a, b = schedule.coefficients(t)
    torch.testing.assert_close(a.square() + b.square(), torch.ones(2000))
    assert schedule.timesteps(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert schedule.table(0.5)[2:].abs().max() < 1e-7
    p, q = schedule.target_coefficients(t, "v")
    torch.testing.assert_close(torch.stack([p, q]), torch.stack([-b, a]))


# ---- bad input


BAD_SCHEDULES = [
    (lambda: schedules.linear(0), ValueError, "num_steps: expected an int from 1 to 16777216, got 0"),
    (lambda: schedules.linear(2.0), TypeError, "num_steps: expected an int, got float"),
    (lambda: schedules.linear(True), TypeError, "num_steps: expected an int, got bool"),
    (lambda: schedules.cosine(-3), ValueError, "num_steps: expected an int from 1"),
    (lambda: schedules.sigmoid(0), ValueError, "num_steps: expected an int from 1"),
    (lambda: schedules.linear(10, 0.0), ValueError, r"beta_start: expected a number inside \(0, 1\), got 0.0"),
    (lambda: schedules.scaled_linear(10, 0.1, 1.0), ValueError, r"beta_end: expected a number inside \(0, 1\), got 1"),
    (lambda: schedules.sigmoid_beta(10, math.nan), ValueError, r"beta_start: expected .*, got nan"),
    (lambda: schedules.cosine(10, -0.1), ValueError, "offset: expected a number of at least 0, got -0.1"),
    (lambda: schedules.cosine(10, max_beta=1.5), ValueError, "max_beta: expected a number inside"),
    (lambda: schedules.sigmoid(10, 3.0, -3.0), ValueError, "end: expected a number above start = 3.0, got -3.0"),
    (lambda: schedules.sigmoid(10, tau=0.0), ValueError, "tau: expected a positive number, got 0.0"),
    (lambda: schedules.from_betas([0.1, 1.2]), ValueError, r"betas: expected values inside \(0, 1\), .* got 1.2 at 1"),
    (lambda: schedules.from_betas([1.0, 0.1]), ValueError, r"betas: expected .* got 1 at 0"),
    (lambda: schedules.from_betas([0.1, 0.0, 0.1]), ValueError, r"betas: expected .* got 0 at 1"),
    (lambda: schedules.from_betas([0.1, math.nan]), ValueError, r"betas: expected .* got nan at 1"),
    (lambda: schedules.from_betas([]), ValueError, r"betas: expected shape \[T\] .*, got shape \[0\]"),
    (lambda: schedules.from_betas([[0.1]]), ValueError, r"betas: expected shape \[T\] .*, got shape \[1, 1\]"),
    (lambda: schedules.from_alpha_bar([0.5, 0.6]), ValueError, "alpha_bar: expected decreasing .* 0.5 and 0.6 from 0"),
    (lambda: schedules.from_alpha_bar([0.5, 0.5]), ValueError, "alpha_bar: expected decreasing values"),
    (lambda: schedules.from_alpha_bar([1.0, 0.5]), ValueError, r"alpha_bar: expected values inside .* got 1 at 0"),
    (lambda: schedules.from_alpha_bar([0.5, 0.0, 0.1]), ValueError, r"alpha_bar: expected .* got 0 at 1"),
    (lambda: schedules.from_alpha_bar([0.5, -0.1]), ValueError, r"alpha_bar: expected .* got -0.1 at 1"),
    (lambda: schedules.DiscreteSchedule(), TypeError, "alpha_bar: expected it or betas, got none"),
    (lambda: schedules.DiscreteSchedule([0.5], betas=[0.5]), TypeError, "alpha_bar: expected it or betas, got both"),
    (lambda: schedules.zero_terminal_snr(schedules.linear(1)), ValueError, "schedule: expected at least 2 steps"),
    (lambda: schedules.zero_terminal_snr(schedules.edm()), TypeError, "schedule: expected a DiscreteSchedule, got EDM"),
    (lambda: schedules.rectified_flow(0.0), ValueError, "shift: expected a positive number, got 0.0"),
    (lambda: schedules.rectified_flow(draw="normal"), ValueError, "draw: expected one of 'logit_normal', .*'normal'"),
    (lambda: schedules.rectified_flow(mean=math.inf), ValueError, "mean: expected a finite number, got inf"),
    (lambda: schedules.edm(sigma_min=-1.0), ValueError, "sigma_min: expected a positive number, got -1.0"),
    (lambda: schedules.edm(sigma_max=0.001), ValueError, "sigma_max: expected a number above sigma_min = 0.002, got"),
    (lambda: schedules.edm(rho=0), ValueError, "rho: expected a positive number, got 0"),
    (lambda: schedules.edm(sigma_data=math.nan), ValueError, "sigma_data: expected a positive number, got nan"),
    (lambda: schedules.get("lineal"), ValueError, "name: expected one of 'linear', .*, got 'lineal'"),
    (lambda: schedules.get(["linear"]), ValueError, r"name: expected one of .*, got \['linear'\]"),
    (lambda: schedules.get("linear", sigma_max=3), ValueError, "options: expected one of 'num_steps', .*'sigma_max'"),
    (lambda: schedules.get("edm", zero_terminal_snr=True), TypeError, "schedule: expected a DiscreteSchedule, got EDM"),
    (lambda: schedules.linear(10).timesteps(11), ValueError, "steps: expected an int from 1 to 10, got 11"),
    (lambda: schedules.linear(10).timesteps(0), ValueError, "steps: expected an int from 1 to 10, got 0"),
    (lambda: schedules.linear(10).timesteps(5.0), TypeError, "steps: expected an int, got float"),
    (lambda: schedules.linear(10).timesteps(5, "even"), ValueError, "spacing: expected one of 'trailing', .*'even'"),
    (lambda: schedules.edm().timesteps(5, "leading"), ValueError, "spacing: expected one of 'trailing', got 'leading'"),
    (lambda: schedules.rectified_flow().timesteps(0), ValueError, "steps: expected an int from 1"),
    (lambda: schedules.linear().weight(0, "eps"), ValueError, "objective: expected one of 'epsilon', .*, got 'eps'"),
    (lambda: schedules.linear().target_coefficients(0, "X0"), ValueError, "objective: expected one of .*, got 'X0'"),
    (lambda: schedules.linear().weight(0, "v", "snr"), ValueError, "weighting: expected one of 'none', .* got 'snr'"),
    (lambda: schedules.linear().weight(0, "v", gamma=-1.0), ValueError, "gamma: expected a finite number >= 0, got"),
    (lambda: schedules.linear().draw_t(-1, seed=0), ValueError, "rows: expected a non-negative int, got -1"),
    (lambda: schedules.linear().draw_t(2, seed=0.5), TypeError, "seed: expected None, an int or an int64 tensor"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_SCHEDULES)
def test_bad_input_says_what_was_expected(make, error, message):
    with pytest.raises(error, match=message):
        make()
