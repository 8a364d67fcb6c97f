"""Distances between images of two sets: whether samples are good, various, and not copies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genfast.metrics._images import check_images, unit_interval
from genfast.metrics.classifier import DigitClassifier, features_and_logits
from genfast.metrics.estimate import Estimate, of_mean, of_ratio, of_share, own_generator

__all__ = ["memorisation", "nearest_neighbour_distance", "precision_recall"]

# Distances at a time: bounds the memory (64 MiB).
_CHUNK = 1 << 24


def precision_recall(
    images: Tensor, reference: Tensor, k: int = 3, *, classifier: DigitClassifier | None = None
) -> dict[str, Estimate]:
    """Improved precision and recall (Kynkäänniemi et al., NeurIPS 2019), on the features of the digit classifier.

    A set's manifold is the union of balls around its images that reach to their k-th nearest neighbours in the set.
    Since the balls shrink as a set grows, of the larger set as many are drawn as the smaller one has.

    Args:
        images, reference: [N, 1, H, W] and [M, 1, H, W], uint8 or floats in [0, 1].
        k: which neighbour.
        classifier: of `load_classifier`, on the device where it is to compute; the bundled one on the CPU if None.

    Returns:
        ``"precision"``: the share of the images that lie in the manifold of the reference; ``"recall"``: the share of
        the reference that lies in the manifold of the images. Their intervals take the manifolds as given.

    Raises:
        TypeError, ValueError: a set has another shape, dtype or range, or no more than k images, or k is below 1.

    Example:
        >>> from genfast.training import load_dataset
        >>> digits = load_dataset("digits")
        >>> ones = digits.train[digits.train_labels == 1]
        >>> {name: part.value > 0.5 for name, part in precision_recall(ones, digits.test).items()}
        {'precision': True, 'recall': False}
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected an int of at least 1, got {k!r}")
    for name, given in (("images", images), ("reference", reference)):
        check_images(name, given)
        if len(given) <= k:
            raise ValueError(f"{name}: expected more than k = {k} images, got {len(given)}")
    features, _ = features_and_logits("images", images, classifier)
    reference_features, _ = features_and_logits("reference", reference, classifier)
    return precision_recall_of_features(features, reference_features, k)


def precision_recall_of_features(features: Tensor, reference: Tensor, k: int = 3) -> dict[str, Estimate]:
    """Of features [N, F] and [M, F]."""
    count = min(len(features), len(reference))
    features, reference = _some(features, count), _some(reference, count)
    radii, reference_radii = _radii(features, k), _radii(reference, k)
    precise, recalled = [], torch.zeros(count, dtype=torch.bool, device=features.device)
    for start, distances in _distances(features, reference):
        precise.append((distances <= reference_radii).any(1))
        recalled |= (distances <= radii[start : start + len(distances)].unsqueeze(1)).any(0)
    return {"precision": of_share(torch.cat(precise)), "recall": of_share(recalled)}


def nearest_neighbour_distance(images: Tensor, training: Tensor) -> Estimate:
    """The mean over the images of the Euclidean distance, pixels in [0, 1], to the nearest of the training images.

    Small numbers alone say little, since blurred images are near to many: see `memorisation`.

    Args:
        images, training: [N, C, H, W] and [M, C, H, W], uint8 or floats in [0, 1]; computed where the images are.

    Raises:
        TypeError, ValueError: a set has another dtype or range, or the two have images of different shape.

    Example:
        >>> black, white = torch.zeros(2, 1, 4, 4), torch.ones(3, 1, 4, 4)
        >>> str(nearest_neighbour_distance(black, white)), str(nearest_neighbour_distance(white, white))
        ('4 [4, 4]', '0 [0, 0]')
    """
    return of_mean(nearest_distances("images", images, training), 0.0)


def memorisation(images: Tensor, held_out: Tensor, training: Tensor) -> Estimate:
    """How near the images come to training images, over how near held-out images come: far below 1 for copies.

    The ratio of two `nearest_neighbour_distance`. Blurred images, which lie in the middle of many, also have less than
    1; that of copies goes to 0.

    Args:
        images, held_out, training: [N, C, H, W], [M, C, H, W] and [L, C, H, W], uint8 or floats in [0, 1].

    Raises:
        TypeError, ValueError: as of `nearest_neighbour_distance`, or all held-out images are training images.

    Example:
        >>> from genfast.training import load_dataset
        >>> digits = load_dataset("digits")
        >>> memorisation(digits.train[:50], digits.test[:50], digits.train).value
        0.0
    """
    own = nearest_distances("images", images, training)
    return ratio_of_distances(own, nearest_distances("held_out", held_out, training))


def ratio_of_distances(own: Tensor, held_out: Tensor) -> Estimate:
    if not held_out.any():
        raise ValueError("held_out: expected images that are no training images, got copies alone")
    return of_ratio(own, held_out)


def nearest_distances(name: str, images: Tensor, training: Tensor) -> Tensor:
    """The distance from each image to the nearest training image: fp64 [N]."""
    check_images(name, images)
    check_images("training", training)
    if images.shape[1:] != training.shape[1:]:
        raise ValueError(f"training: expected images of shape {list(images.shape[1:])}, got {list(training.shape[1:])}")
    rows = unit_interval(name, images).flatten(1)
    nearest = rows.new_full((len(rows),), math.inf)
    which = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    step = max(1, _CHUNK // max(len(rows), rows.shape[1]))
    for start in range(0, len(training), step):
        others = unit_interval("training", training[start : start + step].to(rows.device)).flatten(1)
        # Without the squares of the images, the same for all.
        distances, found = torch.addmm(others.square().sum(1), rows, others.T, alpha=-2).min(1)
        which = torch.where(distances < nearest, found + start, which)
        nearest = torch.minimum(nearest, distances)
    # Once more and exactly: that of a copy is 0.
    chosen = unit_interval("training", training[which.to(training.device)].to(rows.device)).flatten(1)
    return (rows.double() - chosen.double()).square().sum(1).sqrt()


def _some(features: Tensor, count: int) -> Tensor:
    if len(features) == count:
        return features
    return features[torch.randperm(len(features), generator=own_generator())[:count].to(features.device)]


def _radii(features: Tensor, k: int) -> Tensor:
    """The distance of each row to its k-th nearest other row: [N]."""
    radii = []
    for start, distances in _distances(features, features):
        distances[torch.arange(len(distances)), torch.arange(start, start + len(distances))] = math.inf
        radii.append(distances.kthvalue(k, 1).values)
    return torch.cat(radii)


def _distances(rows: Tensor, others: Tensor):
    """Pieces [R, M] of the matrix of distances, each with the index of its first row."""
    step = max(1, _CHUNK // len(others))
    for start in range(0, len(rows), step):
        yield start, torch.cdist(rows[start : start + step], others)
