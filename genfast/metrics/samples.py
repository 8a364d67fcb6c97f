"""All metrics of a set of samples at once."""

from __future__ import annotations

from torch import Tensor, nn

from genfast.metrics._images import check_images
from genfast.metrics.classes import confidence_of_logits, coverage_of_logits
from genfast.metrics.classifier import DigitClassifier, features_and_logits
from genfast.metrics.estimate import Estimate, of_mean
from genfast.metrics.frechet import frechet_of_features, inception_fid
from genfast.metrics.neighbours import nearest_distances, precision_recall_of_features, ratio_of_distances

__all__ = ["evaluate_samples"]

# Of as many samples the nearest training image is sought: with 60,000 of them, a second or two of one CPU core.
_SOUGHT = 2000
_NEIGHBOUR = 3


def evaluate_samples(
    samples: Tensor,
    reference: Tensor,
    training: Tensor,
    *,
    classifier: DigitClassifier | None = None,
    digits: bool = True,
    inception: nn.Module | None = None,
) -> dict[str, Estimate]:
    """The metrics of images: of samples against test images, with the training images for copies.

    Args:
        samples: [N, C, H, W], uint8 or floats in [0, 1].
        reference: test images [M, C, H, W].
        training: training images [L, C, H, W].
        classifier: of `load_classifier`, on the device where it is to compute; the bundled one on the CPU if None.
        digits: whether the images are of digits; else what asks for their class is left out.
        inception: of `load_inception`, for "inception_fid"; without it there is none.

    Returns:
        By the names of `DEFINITIONS`: "frechet_distance", "precision", "recall"; of digits also "coverage", "entropy",
        "smallest_share" and "confidence"; "nearest_distance" and "memorisation" of the first 2,000 samples;
        "inception_fid" with `inception`. Images in colour have the last three alone, since the classifier is of grey
        images.

    Raises:
        TypeError, ValueError: a set has another dtype or range, images of different shape, or fewer than 4 images.
        ImportError: torchmetrics is not installed.

    Warns:
        UserWarning: as of `frechet_distance`.

    Example:
        >>> from genfast.training import load_dataset
        >>> digits = load_dataset("digits")
        >>> found = evaluate_samples(digits.train[:2500], digits.train[2500:], digits.train[:2500])
        >>> str(found["coverage"]), found["memorisation"].value
        ('10 [10, 10]', 0.0)
    """
    for name, images in (("samples", samples), ("reference", reference), ("training", training)):
        check_images(name, images, least=_NEIGHBOUR + 1)
    found: dict[str, Estimate] = {}
    if samples.shape[1] == 1:
        features, logits = features_and_logits("samples", samples, classifier)
        reference_features, _ = features_and_logits("reference", reference, classifier)
        found["frechet_distance"] = frechet_of_features(features, reference_features)
        found |= precision_recall_of_features(features, reference_features, _NEIGHBOUR)
        if digits:
            found |= coverage_of_logits(logits)
            found["confidence"] = confidence_of_logits(logits)
    if inception is not None:
        found["inception_fid"] = inception_fid(samples, reference, inception=inception)
    own = nearest_distances("samples", samples[:_SOUGHT], training)
    found["nearest_distance"] = of_mean(own, 0.0)
    found["memorisation"] = ratio_of_distances(own, nearest_distances("reference", reference[:_SOUGHT], training))
    return found
