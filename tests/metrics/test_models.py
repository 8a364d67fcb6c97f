"""The metrics of a model at once, of its samples at once, and the speed at which they are drawn."""

import math
import warnings

import pytest
import torch
from torch import nn

from genfast.experiments import measures
from genfast.metrics import DEFINITIONS, are_digits, evaluate_model, evaluate_samples, sampling_speed, timed_samples
from genfast.metrics.speed import _rate
from genfast.models import VAE, AutoEncoder
from genfast.training import Splits, load_dataset

OF_IMAGES = {"frechet_distance", "precision", "recall", "nearest_distance", "memorisation"}
OF_DIGITS = OF_IMAGES | {"coverage", "entropy", "smallest_share", "confidence"}


@pytest.fixture(scope="module")
def splits():
    digits = load_dataset("digits")
    rows = torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:600]
    return digits._replace(train=digits.train[rows], train_labels=digits.train_labels[rows], test=digits.test[::2],
                           test_labels=digits.test_labels[::2])  # fmt: skip


@pytest.fixture(autouse=True)
def _few_images_are_enough_here():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


class Copying(nn.Module):
    """A model whose samples are these images, over and over."""

    device = torch.device("cpu")

    def __init__(self, images):
        super().__init__()
        self.images = images.float() / 255

    def sample(self, n, *, seed, row_offset=0):
        rows = torch.arange(row_offset, row_offset + n) % len(self.images)
        return self.images[rows]


def test_samples_in_all_metrics(splits):
    found = evaluate_samples(splits.train[:300], splits.test, splits.train)
    assert set(found) == OF_DIGITS <= set(DEFINITIONS)
    assert found["memorisation"].value == 0
    assert found["coverage"].value == 10
    assert {name: part.n for name, part in found.items()} == dict.fromkeys(OF_DIGITS, 300)


def test_which_images_the_classifier_knows(splits):
    assert are_digits(splits)
    assert are_digits(splits._replace(name="mnist"))
    assert not are_digits(splits._replace(name="fashion-mnist"))
    assert not are_digits(splits._replace(train=splits.train.expand(-1, 3, -1, -1)))
    assert measures.are_digits is are_digits


def test_images_of_other_things(splits):
    assert set(evaluate_samples(splits.train[:50], splits.test, splits.train, digits=False)) == OF_IMAGES
    colour = torch.randint(256, (30, 3, 8, 8), dtype=torch.uint8)
    assert set(evaluate_samples(colour[:10], colour[10:20], colour[20:])) == {"nearest_distance", "memorisation"}


def test_sets_of_samples_that_do_not_fit(splits):
    with pytest.raises(ValueError, match="samples: expected at least 4 images, got 3"):
        evaluate_samples(splits.train[:3], splits.test, splits.train)
    with pytest.raises(ValueError, match="reference: expected at least 4 images, got 2"):
        evaluate_samples(splits.train, splits.test[:2], splits.train)
    with pytest.raises(ValueError, match=r"samples: expected uint8 or finite floats in \[0, 1\], got values from nan"):
        evaluate_samples(torch.full((9, 1, 28, 28), math.nan), splits.test, splits.train)


def test_a_vae_is_measured_in_all_that_it_has(splits):
    model = VAE(latent_dim=3, hidden_dims=(16,))
    found = evaluate_model(model, splits, samples=70, batch_size=32)
    assert set(found) == OF_DIGITS | {"sampling_speed", "parameters", "linear_probe", "active_units"}
    assert set(found) <= set(DEFINITIONS)
    assert found["parameters"].value == sum(parameter.numel() for parameter in model.parameters())
    assert found["linear_probe"].n == len(splits.test)
    assert (found["frechet_distance"].n, found["sampling_speed"].n) == (70, 70)
    samples = evaluate_samples(model.sample(70, seed=0), splits.test, splits.train)
    assert found["frechet_distance"].value == pytest.approx(samples["frechet_distance"].value, rel=1e-4)


def test_a_code_that_is_the_class_is_found_by_the_probe(splits):
    class Labelling(AutoEncoder):
        def encode(self, x):
            corner = x[:, 0, 0, 0].float()
            return torch.stack([corner, corner.square()], 1)

    marked = [images.clone() for images in (splits.train, splits.test)]
    for images, labels in zip(marked, (splits.train_labels, splits.test_labels), strict=True):
        images[:, 0, 0, 0] = 200 * (labels > 4)
    data = splits._replace(train=marked[0], test=marked[1], train_labels=(splits.train_labels > 4).long(),
                           test_labels=(splits.test_labels > 4).long())  # fmt: skip
    found = evaluate_model(Labelling(latent_dim=2), data, samples=10)
    assert found["linear_probe"].value == 1
    assert "active_units" not in found


def test_samples_are_compared_with_pixels_as_the_model_was_given(splits):
    black_and_white = (splits.train >= 128).to(torch.uint8) * 255
    found = evaluate_model(Copying(black_and_white), splits, samples=100, binarize="threshold")
    assert found["nearest_distance"].value == 0
    grey = evaluate_model(Copying(splits.train), splits, samples=100, binarize="threshold")
    assert grey["nearest_distance"].value > 1
    assert evaluate_model(Copying(splits.train), splits, samples=100, binarize="dynamic")["memorisation"].value > 0.3

    class OfMeans(Copying):
        likelihood = "bernoulli"

    assert evaluate_model(OfMeans(splits.train), splits, samples=100, binarize="dynamic")["memorisation"].value == 0


def test_without_labels_and_of_other_data(splits):
    folder = Splits("things", splits.train, splits.test)
    found = evaluate_model(VAE(latent_dim=2, hidden_dims=(8,)), folder, samples=10)
    assert set(found) == OF_IMAGES | {"sampling_speed", "parameters", "active_units"}


def test_timed_samples_are_the_models_own():
    model = VAE(latent_dim=2, hidden_dims=(8,))
    images, speed = timed_samples(model, 50, batch_size=16, seed=4)
    torch.testing.assert_close(images, model.sample(50, seed=4), rtol=1e-5, atol=1e-6)
    assert speed.n == 50
    assert 0 < speed.low <= speed.value <= speed.high
    assert math.isnan(timed_samples(model, 5)[1].low)
    assert sampling_speed(model, 8, repeats=3).n == 24


def test_rate_is_all_images_over_all_seconds():
    found = _rate(torch.tensor([10.0, 10.0, 5.0]).double(), torch.tensor([1.0, 2.0, 2.0]).double())
    assert (found.value, found.n) == (5.0, 25)
    assert 2.5 <= found.low < 5 < found.high <= 10


def test_bad_counts():
    model = VAE(latent_dim=2, hidden_dims=(8,))
    with pytest.raises(ValueError, match="repeats: expected at least 2, got 1"):
        sampling_speed(model, repeats=1)
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        timed_samples(model, 0)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        timed_samples(model, 4, batch_size=0)
