"""The Frechet distance between two sets of images: between the Gaussians with the moments of their features."""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from genfast.metrics._images import batches, check_images
from genfast.metrics.classifier import DigitClassifier, features_and_logits
from genfast.metrics.estimate import RESAMPLES, Estimate, of_resamples, own_generator

__all__ = ["frechet_distance", "inception_fid", "load_inception"]

_ENOUGH = 2048
_BIAS_DRAWS = 10
# Numbers at a time: bounds the memory.
_CHUNK = 1 << 22
# Of 2,048 features a single resample of 10,000 images takes about 100 GFLOP.
_INCEPTION_RESAMPLES = 20
# Student's of 19 degrees of freedom: the outermost of 20 resamples are no 2.5% quantiles.
_INCEPTION_QUANTILE = 2.093
_INCEPTION_FEATURES = 2048
_INCEPTION_BATCH = 64
# Of each network the last reference, as its digest and features: models are compared with the same one.
_references: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Tensor]] = WeakKeyDictionary()


def frechet_distance(images: Tensor, reference: Tensor, *, classifier: DigitClassifier | None = None) -> Estimate:
    """The Frechet distance of torchmetrics, on the features of the digit classifier.

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` of the means and covariances of the 64 features (Heusel et al.,
    "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", NeurIPS 2017, eq. 6). It is
    no Inception FID, and compares with other numbers of this function alone. It is biased upwards, the more the fewer
    the images: compare numbers of as many images only.

    Args:
        images, reference: [N, 1, H, W] and [M, 1, H, W], uint8 or floats in [0, 1]; of any size.
        classifier: of `load_classifier`, on the device where it is to compute; the bundled one on the CPU if None.

    Returns:
        The distance, its interval (the images are resampled, the reference is what it is), and n, the number of images.

    Raises:
        TypeError, ValueError: a set has another shape, dtype or range, or fewer than 2 images.
        ImportError: torchmetrics is not installed.

    Warns:
        UserWarning: a set has fewer than 2,048 images; it says what so few images of the reference itself would score.

    Example:
        >>> from genfast.training import load_dataset
        >>> digits = load_dataset("digits").train
        >>> close, far = (frechet_distance(x, digits[2500:]) for x in (digits[:2500], 255 - digits[:2500]))
        >>> close.value < 10 < far.value
        True
    """
    check_images("images", images, least=2)
    check_images("reference", reference, least=2)
    features, _ = features_and_logits("images", images, classifier)
    reference_features, _ = features_and_logits("reference", reference, classifier)
    return frechet_of_features(features, reference_features)


def frechet_of_features(
    features: Tensor, reference: Tensor, *, resamples: int = RESAMPLES, quantile: float | None = None,
    name: str = "frechet_distance",
) -> Estimate:  # fmt: skip
    """Of features [N, F] and [M, F]; warns as `frechet_distance` does.

    The interval is that of the quantiles of the resamples, or `quantile` times their standard deviation to either side.
    """
    # torchmetrics adds up in the precision of the features.
    features, reference = _spanned(features.double(), reference.double())
    metric = _torchmetrics(_Features(features.shape[1])).to(features.device)
    _warn_of_bias(name, features, reference)
    metric.update(reference, real=True)
    metric.update(features, real=False)
    value = max(0.0, float(metric.compute()))
    other = _moments(reference, reference.new_ones(1, len(reference)))
    root = _root(other[1])
    pieces = (_moments(features, counts) for counts in _draws(features, len(features), resamples))
    draws = torch.cat([_distances(each, other, root) for each in pieces])
    if quantile is not None:
        half = quantile * float(draws.std())
        return Estimate(value, max(0.0, value - half), value + half, len(features))
    return of_resamples(value, draws, len(features), low=0.0)


def load_inception(weights: str | Path = "download", device: torch.device | str = "cpu") -> nn.Module:
    """The Inception network of FID, by torchmetrics and torch-fidelity.

    Args:
        weights: the file that torch-fidelity publishes, or one that its `util_convert_inception_weights.py` made;
            "download" fetches it at the first use.
        device: where it is to compute.

    Returns:
        A module from uint8 images [N, 3, H, W] of any size to features [N, 2048].

    Raises:
        ImportError: torchmetrics or torch-fidelity is not installed.
        OSError: the weights can be neither read nor downloaded.

    Example:
        >>> load_inception("weights-that-are-not-there.pth")
        Traceback (most recent call last):
        OSError: inception: expected ..., got 'weights-that-are-not-there.pth' (... No such file or directory: ...)
    """
    check_installed()
    if find_spec("torch_fidelity") is None:
        raise ImportError("inception: expected the package torch-fidelity, got none: pip install torch-fidelity")
    options = {}
    try:
        if weights != "download":
            options["feature_extractor_weights_path"] = str(weights)
            # torch-fidelity reads any Python object: what is not tensors alone is refused, and none of its code runs.
            torch.load(weights, "cpu", weights_only=True)
        # Its weights are drawn before they are read.
        with torch.random.fork_rng(devices=[]):
            metric = _torchmetrics(_INCEPTION_FEATURES, **options)
    except Exception as error:  # whatever a file makes of torch.load and load_state_dict
        reason = " ".join(str(error).split()) or type(error).__name__
        message = "inception: the weights can be neither downloaded nor read"
        if options:
            message = f"inception: expected a file of torch-fidelity's weights of Inception, got {str(weights)!r}"
        raise OSError(f"{message} ({reason[:300]})") from error
    return metric.inception.to(device).eval()


def inception_fid(images: Tensor, reference: Tensor, *, inception: nn.Module | None = None) -> Estimate:
    """The Frechet Inception distance (FID) of torchmetrics: on 2,048 features of a network trained on ImageNet.

    Args:
        images, reference: [N, C, H, W] with one or three channels, uint8 or floats in [0, 1]; grey is repeated.
        inception: of `load_inception`, on the device where it is to compute; if None it is loaded to the CPU, and its
            weights are downloaded if need be. The features of its last reference (8 KB an image) stay on its device
            until it is deleted: the same images do not pass through it again.

    Returns:
        As of `frechet_distance`, with an interval from 20 resamples.

    Raises:
        TypeError, ValueError: as of `frechet_distance`.
        ImportError, OSError: as of `load_inception`.

    Warns:
        UserWarning: as of `frechet_distance`.
    """
    check_images("images", images, least=2)
    check_images("reference", reference, least=2)
    if not isinstance(inception, nn.Module | None):
        raise TypeError(f"inception: expected a network of load_inception, got {type(inception).__name__}")
    network = load_inception() if inception is None else inception
    of_images, of_reference = _inception_features(network, "images", images), _of_reference(network, reference)
    return frechet_of_features(
        of_images, of_reference, resamples=_INCEPTION_RESAMPLES, quantile=_INCEPTION_QUANTILE, name="inception_fid"
    )


def _inception_features(network: nn.Module, name: str, images: Tensor) -> Tensor:
    device = next(network.parameters()).device
    parts = batches(name, images, device, _INCEPTION_BATCH)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return torch.cat([network((part.expand(-1, 3, -1, -1) * 255).round().byte()) for part in parts])


def _of_reference(network: nn.Module, reference: Tensor) -> Tensor:
    """Its features: those that are remembered, where nothing that they depend on has changed."""
    digest = _digest(network, reference)
    known, features = _references.get(network, (None, None))
    if known != digest:
        features = _inception_features(network, "reference", reference)
        _references[network] = digest, features
    return features


def _digest(network: nn.Module, images: Tensor) -> tuple[Any, ...]:
    """What the features of images depend on, by content: of Inception's weights in a quarter of a second."""
    state = [*network.parameters(), *network.buffers()]
    content = hashlib.blake2b()
    for tensor in (*state, *images.split(_INCEPTION_BATCH)):
        content.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    kinds = [(tensor.device, tensor.dtype, tensor.shape) for tensor in state]
    return network.training, kinds, images.dtype, images.shape, content.digest()


def check_installed() -> None:
    """Raise unless torchmetrics is installed.

    Raises:
        ImportError: it is not.

    Example:
        >>> check_installed()
    """
    _torchmetrics(_Features(1))


class _Features(nn.Module):
    """An extractor for torchmetrics that is given features: they are computed once for all metrics."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _torchmetrics(feature: nn.Module | int, **options: Any) -> nn.Module:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("torchmetrics"):
            raise
        message = "frechet_distance: expected the package torchmetrics, got none: pip install torchmetrics"
        raise ImportError(message) from error
    return FrechetInceptionDistance(feature=feature, **options)


def _spanned(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The features in the space that both sets span, where it is smaller: distances are the same, and much cheaper."""
    if len(features) + len(reference) >= features.shape[1]:
        return features, reference
    basis = torch.linalg.qr(torch.cat([features, reference]).mT).Q
    return features @ basis, reference @ basis


def _warn_of_bias(name: str, features: Tensor, reference: Tensor) -> None:
    few = [
        f"{count:,} {what}"
        for count, what in ((len(features), "images"), (len(reference), "images of the reference"))
        if count < _ENOUGH
    ]
    if not few:
        return
    counts = len(features), len(reference)
    reference, _ = _spanned(reference, reference[:0])
    # Two draws from one distribution, as many as there are: without bias their distance would be 0.
    draws = zip(
        _draws(reference, counts[0], _BIAS_DRAWS, seed=1), _draws(reference, counts[1], _BIAS_DRAWS), strict=True
    )
    pairs = ([_moments(reference, each) for each in pair] for pair in draws)
    bias = float(torch.cat([_distances(one, other, _root(other[1])) for one, other in pairs]).mean())
    warnings.warn(
        f"{name}: {' and '.join(few)} are few: as many drawn from the reference itself score "
        f"{bias:{'.2g' if bias < 10 else ',.0f'}} instead of 0; expected at least {_ENOUGH:,} of both",
        UserWarning,
        stacklevel=_levels_of_genfast(),
    )


def _levels_of_genfast() -> int:
    """The stacklevel by which a warning of its caller names the line outside of genfast that led there."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] == "genfast":
        level, frame = level + 1, frame.f_back
    return level


def _draws(features: Tensor, count: int, resamples: int, seed: int = 0) -> Iterator[Tensor]:
    """How often each row comes among `count` draws with replacement: [R, N], for `resamples` in all."""
    generator = own_generator(seed)
    rows, size = features.shape
    at_once = max(1, _CHUNK // (rows * size))
    for start in range(0, resamples, at_once):
        drawn = torch.randint(rows, (min(at_once, resamples - start), count), generator=generator)
        counts = torch.zeros(len(drawn), rows, dtype=features.dtype)
        yield counts.scatter_add_(1, drawn, counts.new_ones(()).expand(drawn.shape)).to(features.device)


def _moments(features: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Means [R, F] and covariances [R, F, F] of the rows, each counted so often [R, N]."""
    total = counts.sum(1)
    shift = features.mean(0)
    centred = features - shift
    mean = counts @ centred / total[:, None]
    second = (counts[:, :, None] * centred).transpose(1, 2) @ centred
    outer = mean[:, :, None] * mean[:, None, :]
    return mean + shift, (second - total[:, None, None] * outer) / (total - 1)[:, None, None]


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of each [..., F, F]."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2) @ vectors.mT


def _distances(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], root: Tensor) -> Tensor:
    """The distance [R] of each pair of Gaussians, given by their moments; `root` is that of the other's covariance."""
    # S1 S2 and S2^(1/2) S1 S2^(1/2) have the same eigenvalues; the second is symmetric.
    shared = torch.linalg.eigvalsh(root @ one[1] @ root).clamp(min=0).sqrt().sum(-1)
    traces = one[1].diagonal(dim1=-2, dim2=-1).sum(-1) + other[1].diagonal(dim1=-2, dim2=-1).sum(-1)
    return ((one[0] - other[0]).square().sum(-1) + traces - 2 * shared).clamp(min=0)
