"""The metrics of a model: what its samples, its codes and its speed are worth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genfast.metrics.classifier import load_classifier
from genfast.metrics.codes import active_units, linear_probe
from genfast.metrics.estimate import Estimate
from genfast.metrics.frechet import check_installed
from genfast.metrics.samples import evaluate_samples
from genfast.metrics.speed import timed_samples
from genfast.models.autoencoder import AutoEncoder
from genfast.models.base import LatentImageModel, evaluating
from genfast.models.vae import VAE
from genfast.training import DeviceDataset, Splits, evaluation_seed
from genfast.training.data import Binarize

__all__ = ["are_digits", "evaluate_model"]

# What the classifier was trained on.
_DIGITS = ("digits", "mnist")
BATCH_SIZE = 256


def are_digits(splits: Splits) -> bool:
    """Whether the classifier of `load_classifier` knows such images.

    Example:
        >>> from genfast.training import load_dataset
        >>> are_digits(load_dataset("digits"))
        True
    """
    return splits.name in _DIGITS and splits.train.shape[1] == 1


def evaluate_model(
    model: nn.Module,
    splits: Splits,
    *,
    samples: int = 2048,
    binarize: Binarize = "none",
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    inception: nn.Module | None = None,
    **options: Any,
) -> dict[str, Estimate]:
    """Draw samples from a model and measure them, with its codes and its speed; its likelihood is `likelihood`'s.

    Args:
        model: of any family, on the device where all is to be computed.
        splits: the data that it was trained on; the samples are compared with the test images.
        samples: how many.
        binarize: as in its training: the images that the samples are compared with, and those that are encoded, are
            binarized like that. The means of a Bernoulli decoder that was trained on drawn pixels are compared with the
            grey images, which are the means of those draws.
        batch_size: images at a time; it changes the result by rounding only.
        seed: of the samples and of drawn pixels.
        inception: of `load_inception`, for "inception_fid"; without it there is none.
        options: of ``model.sample``, such as a diffusion model's ``**model.quick_sampling()``.

    Returns:
        By the names of `DEFINITIONS`: what `evaluate_samples` returns, "sampling_speed" and "parameters"; of an
        autoencoder whose data has labels "linear_probe", of a VAE "active_units".

    Raises:
        TypeError, ValueError, ImportError: as of `evaluate_samples`.

    Warns:
        UserWarning: as of `frechet_distance`.

    Example:
        >>> import warnings
        >>> from genfast.training import load_dataset
        >>> digits = load_dataset("digits")
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", UserWarning)
        ...     found = evaluate_model(VAE(latent_dim=2), digits, samples=100)
        >>> found["parameters"].value, found["frechet_distance"].n
        (631188, 100)
    """
    # Now rather than after the minutes that drawing may take.
    check_installed()
    device = model.device
    drawn, speed = timed_samples(model, samples, batch_size=batch_size, seed=seed, **options)
    train, test = (_binarized(images.to(device), binarize, seed) for images in (splits.train, splits.test))
    means = binarize == "dynamic" and getattr(model, "likelihood", None) == "bernoulli"
    training, reference = (splits.train.to(device), splits.test.to(device)) if means else (train, test)
    found = evaluate_samples(
        # An own decoder, or a flow without bounds, may leave [0, 1]; pictures of it do not.
        drawn.clamp(0, 1), reference, training, classifier=load_classifier(device), digits=are_digits(splits),
        inception=inception,
    )  # fmt: skip
    found["sampling_speed"] = speed
    found["parameters"] = Estimate(sum(parameter.numel() for parameter in model.parameters()))
    if isinstance(model, (VAE, AutoEncoder)):
        codes = [_codes(model, images, batch_size) for images in (train, test)]
        if splits.train_labels is not None and len(splits.train_labels.unique()) > 1:
            found["linear_probe"] = linear_probe(codes[0], splits.train_labels, codes[1], splits.test_labels)
        if isinstance(model, VAE):
            found["active_units"] = Estimate(active_units(codes[1]), n=len(codes[1]))
    return found


def _binarized(images: Tensor, binarize: Binarize, seed: int) -> Tensor:
    data = DeviceDataset(images, binarize=binarize)
    return torch.cat([batch for batch, _ in data.batches(4096, seed=evaluation_seed(seed), shuffle=False)])


def _codes(model: LatentImageModel, images: Tensor, batch_size: int) -> Tensor:
    """The (mean) code of each image: [N, L]."""
    with evaluating(model):
        codes = [model.encode(batch) for batch in images.split(batch_size)]
    return torch.cat([(code[0] if isinstance(code, tuple) else code).flatten(1) for code in codes])
