"""Which digits a set of images shows, and how sure the classifier is of them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from genfast.metrics.classifier import DigitClassifier, features_and_logits
from genfast.metrics.estimate import Estimate, of_known_share, of_mean, of_shares

__all__ = ["class_coverage", "class_shares", "confidence"]


def class_shares(images: Tensor, *, classifier: DigitClassifier | None = None) -> Tensor:
    """The share of each class among the images, by the classifier.

    Args:
        images: [N, 1, H, W], uint8 or floats in [0, 1].
        classifier: of `load_classifier`, on the device where it is to compute; the bundled one on the CPU if None.

    Returns:
        fp64 tensor of shape [10] on the CPU, which sums to 1.

    Raises:
        TypeError, ValueError: the images have another shape, dtype or range.

    Example:
        >>> from genfast.training import load_dataset
        >>> digits = load_dataset("digits")
        >>> [round(share, 1) for share in class_shares(digits.test[digits.test_labels == 2]).tolist()]
        [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    return shares_of_logits(features_and_logits("images", images, classifier)[1])


def class_coverage(
    images: Tensor, *, classifier: DigitClassifier | None = None, min_share: float = 0.04
) -> dict[str, Estimate]:
    """How many of the classes the images show, and how evenly.

    Args:
        images, classifier: as for `class_shares`.
        min_share: of the images, from which on a class counts as shown.

    Returns:
        ``"coverage"``: the number of classes with at least that share; ``"entropy"`` of the shares, in nats (log 10 =
        2.303 if all are equal); ``"smallest_share"``.

    Raises:
        TypeError, ValueError: as for `class_shares`, or `min_share` is not in (0, 1].

    Example:
        >>> from genfast.training import load_dataset
        >>> str(class_coverage(load_dataset("digits").test)["coverage"])
        '10 [10, 10]'
    """
    if not 0 < min_share <= 1:
        raise ValueError(f"min_share: expected a share above 0 and up to 1, got {min_share}")
    return coverage_of_logits(features_and_logits("images", images, classifier)[1], min_share)


def confidence(images: Tensor, *, classifier: DigitClassifier | None = None) -> Estimate:
    """The mean over the images of the probability that the classifier gives its guess.

    Low where digits are between two classes; images that are no digits at all may be guessed with much confidence.

    Args:
        images, classifier: as for `class_shares`, which also says what is raised.

    Example:
        >>> from genfast.training import load_dataset
        >>> digits = load_dataset("digits").test
        >>> mixed = (digits[:500].float() + digits[500:].float()) / 2 / 255
        >>> confidence(digits).value > 0.97 > confidence(mixed).value
        True
    """
    return confidence_of_logits(features_and_logits("images", images, classifier)[1])


def shares_of_logits(logits: Tensor) -> Tensor:
    guesses = logits.argmax(1).cpu()
    return guesses.bincount(minlength=logits.shape[1]).double() / len(guesses)


def coverage_of_logits(logits: Tensor, min_share: float = 0.04) -> dict[str, Estimate]:
    shares, n, classes = shares_of_logits(logits), len(logits), logits.shape[1]

    def covered(shares: Tensor) -> Tensor:
        # 4 of 100 images are 0.04 of them, whatever the last bit.
        return (shares >= min_share - 1e-12).sum(-1).double()

    def entropy(shares: Tensor) -> Tensor:
        return torch.special.entr(shares).sum(-1)

    def smallest(shares: Tensor) -> Tensor:
        return shares.amin(-1)

    rarest = of_shares(shares, n, smallest, high=1 / classes)
    if n > 1:
        # Below every class's share, so below what bounds them all; resamples keep to the class that came out last.
        rarest = replace(rarest, high=min(1 / classes, of_known_share(rarest.value, n, among=classes).high))
    count = of_shares(shares, n, covered, high=float(classes), centred=False)
    if n > 1:
        # A quantile may lie between two counts.
        count = replace(count, low=math.floor(count.low), high=math.ceil(count.high))
    return {
        "coverage": count,
        "entropy": of_shares(shares, n, entropy, high=math.log(classes)),
        "smallest_share": rarest,
    }


def confidence_of_logits(logits: Tensor) -> Estimate:
    return of_mean(logits.double().softmax(1).amax(1), 0.0, 1.0)
