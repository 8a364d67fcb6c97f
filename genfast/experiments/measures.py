"""What several experiments measure of a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from genfast import training
from genfast.experiments.base import Paired, some_of
from genfast.metrics import DEFINITIONS, Estimate, are_digits, evaluate_samples
from genfast.models import VAE
from genfast.models.base import LatentImageModel, Model
from genfast.random import as_seed

__all__ = [
    "ABOUT_LIKELIHOODS", "ABOUT_SAMPLES", "NO_DIGITS", "OF_FEATURES", "are_digits", "bound", "codes", "drawn",
    "headings", "log_likelihood", "of_samples", "some_of", "squared_error",
]  # fmt: skip

ABOUT_LIKELIHOODS = (
    "Pixels are binarized: in training drawn anew in each epoch, in the test once, the same for all models. So nll, "
    "ELBO and log p(x) are of binary images, in nats; grey pixels under a Bernoulli would have no likelihood. A unit "
    "is active if the variance of its posterior mean over the test images is above 0.01 (Burda et al., 2016)."
)
ABOUT_SAMPLES = (
    "Samples are measured as the decoder's means, against grey test images, in the features of the digit classifier; "
    "Fréchet distances depend on the number of images, and compare within this table alone."
)

# Taken in the features of the digit classifier, whatever the images are.
OF_FEATURES = ("frechet_distance", "precision", "recall")
NO_DIGITS = "in features made for digits"
_BATCH_SIZE = 512


def headings(*names: str, digits: bool = True) -> dict[str, str]:
    """Headings of columns that `genfast.metrics.DEFINITIONS` defines; `digits`: whether the images are of digits.

    Example:
        >>> headings("recall", "seconds", digits=False)
        {'recall': 'recall, share, in features made for digits', 'seconds': 'training time, seconds'}
    """
    found = {}
    for name in names:
        what = DEFINITIONS[name]
        parts = (what.title, what.unit, NO_DIGITS if name in OF_FEATURES and not digits else "")
        found[name] = ", ".join(part for part in parts if part)
    return found


def _batches(data: training.DeviceDataset, seed: int) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Images in order, the number of the first one, and a seed of their noise; the same for every model."""
    seed = training.evaluation_seed(seed)
    noise = as_seed(seed, data.device)
    done = 0
    for batch, _ in data.batches(_BATCH_SIZE, seed=seed, shuffle=False):
        yield batch, done, noise
        done += len(batch)


@torch.no_grad()
def bound(model: VAE, data: training.DeviceDataset, seed: int) -> dict[str, Paired]:
    """Means over the images of ``elbo`` and its parts ``nll`` and ``kl`` (weight 1), in nats; one draw for each image.

    Example:
        >>> data = training.DeviceDataset(training.load_dataset("digits").test[:10], binarize="dynamic")
        >>> parts = bound(VAE(), data, seed=0)
        >>> parts["kl"].n, abs(parts["elbo"].value + parts["nll"].value + parts["kl"].value) < 1e-3
        (10, True)
    """
    elbos, kls = [], []
    for batch, first, noise in _batches(data, seed):
        elbos.append(model.elbo(batch, seed=noise, row_offset=first))
        mu, logvar = (head.double().flatten(1) for head in model.encode(batch))
        kls.append(0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1))
    elbo, kl = torch.cat(elbos).double(), torch.cat(kls)
    parts = {"elbo": elbo, "nll": -elbo - kl, "kl": kl}
    return {name: Paired.of(values, data.digest()) for name, values in parts.items()}


def log_likelihood(model: VAE, data: training.DeviceDataset, k: int, seed: int) -> Paired:
    """The mean over the images of the importance-weighted bound on log p(x) from `k` draws each, in nats.

    Example:
        >>> data = training.DeviceDataset(training.load_dataset("digits").test[:10], binarize="dynamic")
        >>> log_likelihood(VAE(), data, k=5, seed=0).n
        10
    """
    batches = _batches(data, seed)
    values = [model.log_prob(batch, k, seed=noise, row_offset=first) for batch, first, noise in batches]
    return Paired.of(torch.cat(values), data.digest())


@torch.no_grad()
def codes(model: LatentImageModel, images: Tensor | training.DeviceDataset, seed: int = 0) -> tuple[Tensor, ...]:
    """What the encoder says of uint8 images: (code,) of an autoencoder, (mu, logvar) of a VAE, each [N, L] on the CPU.

    Of a `DeviceDataset` its pixels as `bound` has them with that seed, binarized as it says.

    Example:
        >>> mu, logvar = codes(VAE(latent_dim=2), training.load_dataset("digits").test)
        >>> mu.shape
        torch.Size([1000, 2])
    """
    whole = isinstance(images, Tensor)
    batches = images.split(_BATCH_SIZE) if whole else (batch for batch, _, _ in _batches(images, seed))
    pieces = [model.encode(batch.to(model.device)) for batch in batches]
    heads = [piece if isinstance(piece, tuple) else (piece,) for piece in pieces]
    return tuple(torch.cat([head.flatten(1).cpu() for head in parts]) for parts in zip(*heads, strict=True))


def squared_error(model: LatentImageModel, images: Tensor) -> Paired:
    """Mean squared error of the reconstruction (from the mean code) of uint8 images, per pixel in [0, 1].

    Example:
        >>> squared_error(VAE(), training.load_dataset("digits").test[:10]).n
        10
    """
    errors = []
    for batch in images.split(_BATCH_SIZE):
        batch = batch.to(model.device)
        errors.append((model.reconstruct(batch) - batch.float() / 255).square().flatten(1).mean(1))
    return Paired.of(torch.cat(errors), training.DeviceDataset(images).digest())


def drawn(model: Model, count: int, seed: int) -> Tensor:
    """Samples of a model, uint8 on the CPU; sample i depends on the seed and on i alone.

    Example:
        >>> drawn(VAE(), 3, seed=0).shape
        torch.Size([3, 1, 28, 28])
    """
    pieces = []
    for first in range(0, count, _BATCH_SIZE):
        images = model.sample(min(_BATCH_SIZE, count - first), seed=seed, row_offset=first)
        pieces.append((images.clamp(0, 1) * 255).round().to(torch.uint8).cpu())
    return torch.cat(pieces)


def of_samples(samples: Tensor, splits: training.Splits) -> dict[str, Estimate | None]:
    """What `genfast.metrics.evaluate_samples` says of samples; None for what such images have not.

    Example:
        >>> digits = training.load_dataset("digits")
        >>> of_samples(digits.train[:2500], digits)["coverage"].value
        10.0
    """
    found = evaluate_samples(samples, splits.test, splits.train, digits=are_digits(splits))
    return {name: found.get(name) for name in ("frechet_distance", "precision", "recall", "coverage", "confidence")}
