"""Precision, recall and nearest neighbours of sets that can be checked by hand or by a loop."""

import math

import pytest
import torch

from genfast.metrics import memorisation, nearest_neighbour_distance, precision_recall
from genfast.metrics.neighbours import nearest_distances, precision_recall_of_features
from genfast.training import load_dataset


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def values(found):
    return found["precision"].value, found["recall"].value


def by_a_loop(images, reference, k):
    def radius(points, index):
        distances = sorted(math.dist(points[index], point) for other, point in enumerate(points) if other != index)
        return distances[k - 1]

    def share(inside, balls):
        radii = [radius(balls, index) for index in range(len(balls))]
        found = [
            any(math.dist(point, ball) <= r for ball, r in zip(balls, radii, strict=True)) for point in inside
        ]
        return sum(found) / len(found)

    images, reference = images.tolist(), reference.tolist()
    return share(images, reference), share(reference, images)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [1 << 24, 7])
def test_against_a_loop(k, chunk, monkeypatch):
    monkeypatch.setattr("genfast.metrics.neighbours._CHUNK", chunk)
    images, reference = 2 * torch.randn(40, 3).double(), torch.randn(40, 3).double() + 2
    expected = by_a_loop(images, reference, k)
    assert 0.05 < min(expected) <= max(expected) < 0.99
    assert values(precision_recall_of_features(images, reference, k)) == pytest.approx(expected, rel=1e-12)


def test_sets_that_are_known():
    near, far = torch.randn(200, 4), torch.randn(200, 4) + 100
    both = torch.cat([near[100:], far[100:]])
    whole, nothing = precision_recall_of_features(both, both), precision_recall_of_features(near, far)
    assert values(whole) == (1, 1)
    assert values(nothing) == (0, 0)
    for name in ("precision", "recall"):
        assert nothing[name].low == 0 < nothing[name].high
        assert whole[name].low < 1 == whole[name].high
    # One mode of two: good and not various. A mode of its own: various and half good.
    dropped = values(precision_recall_of_features(near, both))
    assert dropped[0] > 0.8
    assert 0.4 < dropped[1] <= 0.5
    invented = values(precision_recall_of_features(both, near))
    assert (invented[0], invented[1]) == (dropped[1], dropped[0])


def test_of_the_larger_set_as_many_are_taken():
    images, reference = torch.randn(50, 2), torch.randn(400, 2)
    found = precision_recall_of_features(images, reference)
    assert (found["precision"].n, found["recall"].n) == (50, 50)
    # Any of them: in order of their classes the first ones would be of one class.
    ordered = torch.cat([torch.randn(200, 2), torch.randn(200, 2) + 100])
    assert 0.15 < precision_recall_of_features(torch.randn(100, 2), ordered)["recall"].value < 0.85


def test_digits(digits):
    halves = precision_recall(digits.train[:1000], digits.test)
    assert min(values(halves)) > 0.75
    assert halves["precision"].low < halves["precision"].value < halves["precision"].high
    noise = precision_recall(torch.rand(1000, 1, 28, 28), digits.test)
    assert noise["recall"].value < 0.05


def test_bad_arguments(digits):
    with pytest.raises(ValueError, match="images: expected more than k = 3 images, got 3"):
        precision_recall(digits.test[:3], digits.test)
    with pytest.raises(ValueError, match="reference: expected more than k = 5 images, got 4"):
        precision_recall(digits.test, digits.test[:4], k=5)
    for k in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"k: expected an int of at least 1, got {k}"):
            precision_recall(digits.test, digits.test, k=k)


@pytest.mark.parametrize("chunk", [1 << 24, 5000])
def test_nearest_against_a_loop(digits, chunk, monkeypatch):
    monkeypatch.setattr("genfast.metrics.neighbours._CHUNK", chunk)
    images, training = digits.test[::100], digits.train[::100]
    pixels, others = (given.double().flatten(1) / 255 for given in (images, training))
    expected = torch.stack([(others - image).square().sum(1).sqrt().min() for image in pixels])
    torch.testing.assert_close(nearest_distances("images", images, training), expected, rtol=1e-6, atol=0)
    found = nearest_neighbour_distance(images.float() / 255, training)
    assert found.value == pytest.approx(float(expected.mean()), rel=1e-6)
    assert (found.n, found.low < found.value < found.high) == (10, True)


def test_copies_are_at_zero_and_told_from_new_images(digits):
    copies = digits.train[torch.randperm(5000)[:200]]
    assert nearest_neighbour_distance(copies.float() / 255, digits.train).value < 1e-5
    assert memorisation(copies, digits.test, digits.train).value == 0
    again = memorisation(digits.test[:500], digits.test[500:], digits.train)
    assert again.value == pytest.approx(1, abs=0.08)
    assert again.low < again.value < again.high
    half = memorisation(torch.cat([digits.train[:100], digits.test[-100:]]), digits.test, digits.train)
    assert 0.3 < half.value < 0.7


def test_sets_that_do_not_fit(digits):
    with pytest.raises(ValueError, match=r"training: expected images of shape \[1, 28, 28\], got \[1, 14, 14\]"):
        nearest_neighbour_distance(digits.test[:2], torch.zeros(4, 1, 14, 14))
    with pytest.raises(ValueError, match="held_out: expected images that are no training images"):
        memorisation(digits.test[:5], digits.train[:5], digits.train)
    with pytest.raises(ValueError, match=r"training: .* in \[0, 1\]"):
        nearest_neighbour_distance(digits.test[:2], digits.train[:2].float())
