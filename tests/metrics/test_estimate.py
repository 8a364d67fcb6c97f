"""Numbers with intervals: what is printed, and whether the intervals cover."""

import json
import math

import pytest
import torch
from scipy import stats

from genfast.experiments.base import apart
from genfast.metrics import Estimate
from genfast.metrics.estimate import of_mean, of_ratio, of_resamples, of_share, of_shares, own_generator, resampled_rows


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(12.345, 11.9, 12.81), "12.3 [11.9, 12.8]"),
        (Estimate(0.9876, 0.9861, 0.9884), "0.9876 [0.9861, 0.9884]"),
        (Estimate(36594.3, 26427.0, 52338.2), "36594 [26427, 52338]"),
        (Estimate(10.0, 9.0, 10.0), "10 [9, 10]"),
        (Estimate(0.0, 0.0, 0.0), "0 [0, 0]"),
        (Estimate(2.5, 2.5, 2.5), "2.5 [2.5, 2.5]"),
        (Estimate(652824), "652824"),
        (Estimate(0.123456), "0.1235"),
        (Estimate(math.nan), "nan"),
        (Estimate(math.inf), "inf"),
    ],
)
def test_shown(estimate, text):
    assert str(estimate) == text


@pytest.mark.parametrize("estimate", [Estimate(1.5, 1.0, 2.0, 7), Estimate(3.0, n=1)])
def test_through_json(estimate):
    again = Estimate.from_dict(json.loads(json.dumps(estimate.to_dict(), allow_nan=False)))
    assert (again.value, again.n, str(again)) == (estimate.value, estimate.n, str(estimate))
    assert again.to_dict() == estimate.to_dict()


def covered(estimates, truth):
    return sum(estimate.low <= truth <= estimate.high for estimate in estimates) / len(estimates)


def test_intervals_of_means_cover():
    draws = torch.distributions.Exponential(torch.tensor(0.5)).sample((300, 80))
    estimates = [of_mean(draw) for draw in draws]
    # Of 300 intervals that cover with 0.95, fewer than 270 or more than 297 do in less than one of a thousand cases.
    assert 0.9 <= covered(estimates, 2.0) <= 0.99
    assert estimates[0].value == pytest.approx(float(draws[0].double().mean()), rel=1e-14)
    assert estimates[0].n == 80


def test_intervals_of_ratios_cover():
    above, below = torch.rand(300, 60) + 0.5, torch.rand(300, 90) * 0.5 + 0.25
    estimates = [of_ratio(a, b) for a, b in zip(above, below, strict=True)]
    assert 0.89 <= covered(estimates, 2.0) <= 0.99


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (5, 10, 0.23659, 0.76341), (36, 40, 0.76948, 0.96042)],
)
def test_share_against_scipy(hits, n, low, high):
    found = of_share(torch.arange(n) < hits)
    assert (found.value, found.n) == (hits / n, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-5)
    wilson = stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high), abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 7, 40, 997, 10_000])
def test_none_and_all_have_an_interval_within_0_and_1(n):
    none, every = of_share(torch.zeros(n).bool()), of_share(torch.ones(n).bool())
    assert (none.low, none.value) == (0, 0)
    assert (every.value, every.high) == (1, 1)
    # The rule of three: the other end is some 3 to 4 items away.
    assert 1.0 < none.high * (n + 4) < 4.0
    assert every.low == pytest.approx(1 - none.high, abs=1e-12)


def test_all_of_forty_are_not_told_from_thirty_six():
    every, most = of_share(torch.ones(40).bool()), of_share(torch.arange(40) < 36)
    assert every.low < most.high
    assert not apart(every, most)


@pytest.mark.parametrize("truth", [0.03, 0.5, 0.98])
def test_intervals_of_a_share_cover(truth):
    estimates = [of_share(draw < truth) for draw in torch.rand(600, 90)]
    assert 0.91 <= covered(estimates, truth) <= 0.995


def test_intervals_of_shares_cover_in_spite_of_the_bias():
    truth = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)

    def entropy(shares):
        return torch.special.entr(shares).sum(-1)

    counts = torch.distributions.Multinomial(100, truth).sample((300,))
    estimates = [of_shares(shares, 100, entropy, high=math.log(4)) for shares in counts / 100]
    expected = float(entropy(counts / 100).mean())
    assert expected < float(entropy(truth))
    assert 0.89 <= covered(estimates, expected) <= 0.99
    assert max(estimate.high for estimate in estimates) <= math.log(4)


def test_resamples_keep_to_their_bounds_and_around_the_value():
    resamples = torch.linspace(1, 3, 201)
    middle = of_resamples(1.0, resamples, 10)
    assert (middle.low, middle.high) == pytest.approx((0.05, 1.95))
    assert of_resamples(1.0, resamples, 10, low=0.5, high=1.5).low == 0.5
    assert of_resamples(1.0, resamples, 10, centred=False).high == pytest.approx(2.95)
    # The value is within its interval, whatever the resamples say.
    assert of_resamples(1.0, resamples, 10, centred=False).low == 1.0


def test_a_single_item_has_no_interval():
    assert math.isnan(of_mean(torch.ones(1)).low)
    assert math.isnan(of_share(torch.ones(1).bool()).low)


def test_own_generator_leaves_torchs_alone_and_repeats():
    state = torch.get_rng_state()
    first, second = of_mean(torch.arange(50.0)), of_mean(torch.arange(50.0))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


def test_resamples_come_in_pieces(monkeypatch):
    whole = torch.cat(list(resampled_rows(30, own_generator(), 9)))
    monkeypatch.setattr("genfast.metrics.estimate._CHUNK", 60)
    pieces = list(resampled_rows(30, own_generator(), 9))
    assert [len(piece) for piece in pieces] == [2, 2, 2, 2, 1]
    assert torch.equal(torch.cat(pieces), whole)
