"""Which digits a set of images shows."""

import math

import pytest
import torch
from scipy import stats

from genfast.metrics import class_coverage, class_shares, confidence
from genfast.metrics.classes import confidence_of_logits, coverage_of_logits
from genfast.training import load_dataset


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def logits_of(counts):
    """Of so many images of each class, sure ones."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return 50 * torch.nn.functional.one_hot(labels, len(counts)).float()


def test_digits_that_were_chosen_are_found(digits):
    chosen = digits.test[digits.test_labels < 7]
    shares = class_shares(chosen)
    assert shares.dtype == torch.float64
    torch.testing.assert_close(shares[:7], torch.full((7,), 1 / 7, dtype=torch.float64), rtol=0, atol=0.01)
    assert shares[7:].sum() < 0.02
    found = class_coverage(chosen)
    assert (found["coverage"].value, found["coverage"].low, found["coverage"].high) == (7, 7, 7)
    assert found["entropy"].value == pytest.approx(math.log(7), abs=0.05)
    assert found["smallest_share"].value < 0.01
    assert {part.n for part in found.values()} == {700}


def test_statistics_of_known_shares():
    found = coverage_of_logits(logits_of([50, 30, 16, 4, 0, 0, 0, 0, 0, 0]))
    assert found["coverage"].value == 4
    assert (found["coverage"].low, found["coverage"].high) == (3, 4)
    entropy = -sum(share * math.log(share) for share in (0.5, 0.3, 0.16, 0.04))
    assert found["entropy"].value == pytest.approx(entropy, rel=1e-12)
    assert found["entropy"].low < entropy < found["entropy"].high
    # None of 100: Wilson's upper end at the level that holds for all ten classes.
    none = stats.binomtest(0, 100).proportion_ci(1 - 0.05 / 10, "wilson")
    assert (found["smallest_share"].value, found["smallest_share"].low) == (0, 0)
    assert found["smallest_share"].high == pytest.approx(none.high, abs=1e-12)
    even = coverage_of_logits(logits_of([20] * 10))
    assert even["entropy"].value == pytest.approx(math.log(10), rel=1e-12)
    assert even["entropy"].high == pytest.approx(math.log(10), rel=1e-12)
    assert even["smallest_share"].value == pytest.approx(0.1, rel=1e-12)


def test_a_class_that_never_appeared_may_yet_be_covered():
    # Of 40 images 4% are two.
    found = coverage_of_logits(logits_of([20, 20, 0]))
    assert (found["coverage"].value, found["coverage"].low, found["coverage"].high) == (2, 2, 3)
    assert coverage_of_logits(logits_of([400, 400, 0]))["coverage"].high == 2


def test_an_interval_of_counts_has_counts_for_ends():
    # With these the 2.5% quantile of the resamples lies between 1 and 2.
    found = coverage_of_logits(logits_of([200, 16, 3]))["coverage"]
    assert (found.low, found.value, found.high) == (1, 2, 2)


@pytest.mark.parametrize(
    "shares", [(0.5, 0.495, 0.005), (0.5, 0.48, 0.02), (0.5, 0.46, 0.04), (0.1,) * 10, (0.16, 0.04) * 5], ids=str
)
def test_intervals_of_the_smallest_share_cover(shares):
    shares = torch.tensor(shares, dtype=torch.float64)
    truth = float(shares.min())
    counts = torch.distributions.Multinomial(100, shares).sample((300,)).long().tolist()
    found = [coverage_of_logits(logits_of(each))["smallest_share"] for each in counts]
    assert sum(each.low <= truth + 1e-12 and truth <= each.high + 1e-12 for each in found) / len(found) >= 0.94


def test_least_share_is_counted_from_exactly_it_on():
    logits = logits_of([96, 4, 0])
    assert coverage_of_logits(logits, 0.04)["coverage"].value == 2
    assert coverage_of_logits(logits, 0.041)["coverage"].value == 1


def test_confidence_is_the_mean_probability_of_the_guess():
    logits = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]], dtype=torch.float64).log()
    assert confidence_of_logits(logits).value == pytest.approx((0.9 + 0.6 + 0.7) / 3, rel=1e-12)


def test_digits_between_two_classes_are_less_sure(digits):
    real, mixed = digits.test[:500], digits.test[:500].float() / 510 + digits.test[500:].float() / 510
    assert confidence(real).low > 0.97
    assert confidence(mixed).high < 0.9


@pytest.mark.parametrize("least", [0, -0.1, 1.1])
def test_least_share_is_a_share(digits, least):
    with pytest.raises(ValueError, match=f"min_share: expected a share above 0 and up to 1, got {least}"):
        class_coverage(digits.test, min_share=least)


def test_other_images_are_refused():
    for measure in (class_shares, class_coverage, confidence):
        with pytest.raises(ValueError, match=r"images: expected images \[N, C, H, W\]"):
            measure(torch.zeros(784))
        with pytest.raises(ValueError, match="images: expected grey images of digits"):
            measure(torch.zeros(2, 3, 28, 28))
