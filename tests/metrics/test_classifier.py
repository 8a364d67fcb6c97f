"""The classifier of digits that comes with genfast."""

import os
from importlib import resources

import pytest
import torch

from genfast.metrics import DigitClassifier, classifier_record, load_classifier
from genfast.metrics.classifier import features_and_logits
from genfast.training import load_dataset


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


def accuracy(classifier, images, labels):
    guesses = features_and_logits("images", images, classifier)[1].argmax(1)
    return float((guesses == labels).double().mean())


def test_the_licence_of_the_data_names_the_weights():
    text = (resources.files("genfast") / "data" / "LICENSE-MNIST.txt").read_text(encoding="utf-8")
    for name in ("digits.npz", "digit_classifier.safetensors"):
        assert name in text


def test_accuracy_on_the_bundled_test_images_is_the_recorded_one(classifier, digits):
    record = classifier_record()
    assert record["test_images"] == 10_000
    assert record["test_accuracy"] >= 0.99
    # One image on the border may fall to the other side on another machine.
    assert accuracy(classifier, digits.test, digits.test_labels) == pytest.approx(
        record["bundled_test_accuracy"], abs=0.0011
    )
    assert record["bundled_test_accuracy"] >= 0.99


@pytest.mark.skipif("GENFAST_DATA" not in os.environ, reason="needs the whole of MNIST, in the folder GENFAST_DATA")
def test_accuracy_on_the_whole_test_set_is_the_recorded_one(classifier):
    mnist = load_dataset("mnist")
    found = accuracy(classifier, mnist.test, mnist.test_labels)
    assert found == pytest.approx(classifier_record()["test_accuracy"], abs=0.0003)


def test_accuracy_on_the_images_of_weak_models(classifier, digits):
    """A decoder's blur, grey background and noise: a classifier of sharp digits takes them all for one."""
    blurred = torch.nn.functional.avg_pool2d(digits.test.float() / 255, 5, stride=1, padding=2)
    assert accuracy(classifier, blurred, digits.test_labels) > 0.93
    noisy = (0.6 * digits.test.float() / 255 + 0.1 * torch.rand(digits.test.shape)).clamp(0, 1)
    assert accuracy(classifier, noisy, digits.test_labels) > 0.93


def test_record_describes_the_weights(classifier):
    record = classifier_record()
    assert record["parameters"] == sum(parameter.numel() for parameter in classifier.parameters())
    assert record["features"] == classifier.num_features == classifier.features(torch.zeros(1, 1, 28, 28)).shape[1]
    assert record["parameters"] * 4 < 300_000
    assert not classifier.training
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_bytes_and_floats_are_the_same_images(classifier, digits):
    images = digits.test[:20]
    assert torch.equal(classifier(images), classifier(images.float() / 255))
    assert torch.equal(classifier(images.double() / 255), classifier(images))


def test_logits_are_those_of_the_features(classifier, digits):
    features, logits = features_and_logits("images", digits.test[:600], classifier)
    torch.testing.assert_close(logits, classifier(digits.test[:600]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(classifier.last(features), logits)
    assert features.shape == (600, 64)


@pytest.mark.parametrize("size", [20, 32, 64])
def test_other_sizes_are_scaled(classifier, size):
    digits = load_dataset("digits", image_size=size)
    assert accuracy(classifier, digits.test, digits.test_labels) > 0.97


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 3, 28, 28), ValueError, r"x: expected grey images .* got shape \[2, 3, 28, 28\]"),
        (torch.zeros(2, 784), ValueError, r"x: expected images \[N, C, H, W\] .* got shape \[2, 784\]"),
        (torch.zeros(0, 1, 28, 28), ValueError, "x: expected images"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.int64), TypeError, "x: expected uint8 or floats .* torch.int64"),
        (255 * torch.ones(2, 1, 28, 28), ValueError, r"x: .* in \[0, 1\], got values from 255 to 255"),
        (-torch.ones(2, 1, 28, 28), ValueError, r"x: .* in \[0, 1\], got values from -1 to -1"),
        (torch.full((2, 1, 28, 28), torch.nan), ValueError, "x: expected uint8 or finite floats"),
        ([[0.0]], TypeError, "x: expected a tensor, got list"),
    ],
    ids=["colour", "flat", "none", "ints", "to 255", "from -1", "nan", "list"],
)
def test_other_images_are_refused(classifier, images, error, message):
    with pytest.raises(error, match=message):
        classifier(images)


def test_a_wrong_set_is_named():
    with pytest.raises(ValueError, match="samples: expected grey images of digits"):
        features_and_logits("samples", torch.zeros(2, 3, 28, 28))
    with pytest.raises(ValueError, match=r"samples: .* got values from 2 to 2"):
        features_and_logits("samples", torch.full((2, 1, 28, 28), 2.0))


def test_own_weights_can_be_given(digits):
    torch.manual_seed(1)
    own = DigitClassifier().eval()
    features, _ = features_and_logits("images", digits.test[:4], own)
    assert not torch.allclose(features, features_and_logits("images", digits.test[:4])[0])
    assert not features.requires_grad
