"""Numbers with intervals: what is printed, and whether the intervals cover."""

import json
import math

import pytest
import torch

from genfast.metrics import Estimate
from genfast.metrics.estimate import of_mean, of_ratio, of_resamples, of_shares, own_generator, resampled_rows


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
