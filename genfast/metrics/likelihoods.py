"""What a model says of how likely test images are, and which of these numbers may stand in one column."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genfast import random
from genfast.metrics.estimate import Estimate, of_mean
from genfast.models.base import evaluating
from genfast.training import DeviceDataset, evaluation_seed
from genfast.training.data import Binarize

__all__ = ["Likelihood", "comparable", "describe", "likelihood"]

Kind = Literal["elbo", "iwae", "bits_per_dim"]

_GREY = "grey pixels, of which a Bernoulli has no likelihood"
_BERNOULLI = {
    "none": _GREY,
    "threshold": "pixels binarized at 128",
    "dynamic": "pixels drawn as 0 or 1, the grey value being the probability",
}
_DENSITY = {
    "none": "pixels as real numbers in [0, 1]",
    "threshold": "pixels binarized at 128, as real numbers",
    "dynamic": "pixels drawn as 0 or 1, as real numbers",
}
_DISCRETE = {
    "none": "pixels of 256 grey levels",
    "threshold": "pixels binarized at 128, as two of 256 grey levels",
    "dynamic": "pixels drawn as 0 or 1, as two of 256 grey levels",
}


_OWN_FIELDS = ("kind", "bound", "unit", "data", "k")
# Missing in older files.
_NEWER_FIELDS = {"steps": None, "dataset": ""}


@dataclass(frozen=True)
class Likelihood:
    """An estimate of log p(x), and what it is of.

    Attributes:
        estimate: the mean over the images.
        kind: ``"elbo"``: the evidence lower bound; ``"iwae"``: the importance-weighted bound of `k` draws;
            ``"bits_per_dim"``: -log2 p(x) for each dimension.
        bound: ``"lower"`` or ``"upper"`` where the number is a bound, ``"exact"`` where it is the model's own.
        unit: of the estimate.
        data: what the pixels were to the model.
        k: draws of an importance-weighted bound.
        steps: of a diffusion model's bound, which is that of sampling in as many steps.
        dataset: name of the data set that the images are of; empty if unknown.

    Example:
        >>> elbo = Likelihood(Estimate(-98.1, -99.0, -97.2, 1000), "elbo", "lower", "nats per image", "grey pixels")
        >>> str(elbo)
        '-98.1 [-99.0, -97.2] nats per image (elbo, lower bound; grey pixels)'
    """

    estimate: Estimate
    kind: Kind
    bound: Literal["lower", "upper", "exact"]
    unit: str
    data: str
    k: int | None = None
    steps: int | None = None
    dataset: str = ""

    def __str__(self) -> str:
        bound = "exact" if self.bound == "exact" else f"{self.bound} bound"
        return f"{self.estimate} {self.unit} ({self.kind}{self._in_steps}, {bound}; {self._images})"

    @property
    def column(self) -> str:
        """Equal where two numbers may stand in one column.

        Example:
            >>> Likelihood(Estimate(-98.1), "iwae", "lower", "nats per image", "grey pixels", k=500).column
            'iwae of 500 draws, nats per image, grey pixels'
        """
        kind = self.kind if self.k is None else f"{self.kind} of {self.k:,} draws"
        return f"{kind.replace('_', ' ')}{self._in_steps}, {self.unit}, {self._images}"

    @property
    def _in_steps(self) -> str:
        return "" if self.steps is None else f" in {self.steps:,} steps"

    @property
    def _images(self) -> str:
        return f"{self.data}, {self.dataset}" if self.dataset else self.data

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: the fields of the estimate, and the others.

        Example:
            >>> sorted(Likelihood(Estimate(1.5), "bits_per_dim", "upper", "bits per dimension", "grey").to_dict())
            ['bound', 'data', 'dataset', 'high', 'k', 'kind', 'low', 'n', 'steps', 'unit', 'value']
        """
        return {**self.estimate.to_dict(), **{name: getattr(self, name) for name in (*_OWN_FIELDS, *_NEWER_FIELDS)}}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Likelihood:
        """The likelihood that `to_dict` wrote.

        Example:
            >>> bits = Likelihood(Estimate(1.5, 1.4, 1.6, 100), "bits_per_dim", "upper", "bits per dimension", "grey")
            >>> Likelihood.from_dict(bits.to_dict()) == bits
            True
        """
        own = {name: fields[name] for name in _OWN_FIELDS}
        own |= {name: fields.get(name, default) for name, default in _NEWER_FIELDS.items()}
        return cls(Estimate.from_dict(fields), **own)


def comparable(a: Likelihood | None, b: Likelihood | None) -> bool:
    """Whether two numbers are of the same kind and data, in the same unit, and of pixels treated the same way.

    These have one column, and stand in it together. Besides, a diffusion model's bound in any number of steps compares
    with a number that has no steps, such as a flow's; of two such bounds, only those in as many steps do.

    Example:
        >>> a = Likelihood(Estimate(-98.1), "elbo", "lower", "nats per image", "grey pixels")
        >>> b = Likelihood(Estimate(-80.0), "elbo", "lower", "nats per image", "pixels binarized at 128")
        >>> comparable(a, a), comparable(a, b), comparable(a, None)
        (True, False, False)
    """
    if a is None or b is None:
        return False
    if a.steps is None or b.steps is None:
        a, b = replace(a, steps=None), replace(b, steps=None)
    return a.column == b.column


def likelihood(
    model: nn.Module,
    data: Tensor | DeviceDataset,
    *,
    k: int | None = None,
    steps: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    dataset: str = "",
) -> Likelihood | None:
    """The likelihood of test images under a model, where its family has one.

    Args:
        model: a `VAE` gives nats per image; a `Flow` or a `DDPM` gives bits per dimension; others None.
        data: uint8 images [N, C, H, W], or a `DeviceDataset`, which binarizes them as it says.
        k: of a VAE: draws of the importance-weighted bound; None: the ELBO from one draw.
        steps: of a diffusion model: of its bound; None: all, each of which runs the network on every image.
        batch_size: images at a time; it changes the result by rounding only.
        seed: of the draws, and of binarization.
        dataset: name of the data set, such as ``splits.name``, since numbers of different ones do not compare.

    Returns:
        None for a model without a likelihood: an autoencoder, a GAN.

    Raises:
        TypeError, ValueError: the images are not uint8, or do not fit the model; k or steps is out of range.

    Example:
        >>> from genfast.models import VAE, AutoEncoder
        >>> images = torch.randint(256, (8, 1, 28, 28), dtype=torch.uint8)
        >>> likelihood(VAE(), DeviceDataset(images, binarize="threshold")).column
        'elbo, nats per image, pixels binarized at 128'
        >>> likelihood(AutoEncoder(), images) is None
        True
    """
    if not hasattr(model, "log_prob") and not hasattr(model, "bits_per_dim"):
        return None
    device = model.device
    data = data.to(device) if isinstance(data, DeviceDataset) else DeviceDataset(data, device)
    noise = random.as_seed(evaluation_seed(seed), device)
    if hasattr(model, "bits_per_dim"):
        if hasattr(model, "schedule"):
            steps = len(model.schedule.timesteps(steps)) - 1
        measure, options = model.bits_per_dim, {} if steps is None else {"steps": steps}
    else:
        measure, options = (model.elbo, {}) if k is None else (model.log_prob, {"k": k})
    values = []
    with evaluating(model):
        for batch, rows in data.batches(batch_size, seed=evaluation_seed(seed), shuffle=False):
            x = batch if _of_grey_levels(model) else batch.float() / 255
            values.append(measure(x, seed=noise, row_offset=int(rows[0]), **options))
    return describe(model, torch.cat(values), data.binarize, k, steps, dataset)


def describe(
    model: nn.Module,
    values: Tensor,
    binarize: Binarize = "none",
    k: int | None = None,
    steps: int | None = None,
    dataset: str = "",
) -> Likelihood:
    """What the numbers of the single images mean.

    Args:
        model: whose numbers they are: with a method ``bits_per_dim``, or a VAE.
        values: [N], of ``bits_per_dim``, or of ``elbo`` (k None) or ``log_prob`` with k draws.
        binarize: what was done to the pixels, as in `DeviceDataset`.
        k: see values.
        steps: of a diffusion model's bound, how many there were.
        dataset: name of the data set; empty if unknown.

    Example:
        >>> from genfast.models import VAE
        >>> describe(VAE(), torch.tensor([-99.0, -97.0]), "dynamic").data
        'pixels drawn as 0 or 1, the grey value being the probability'
    """
    if not hasattr(model, "bits_per_dim"):
        data = (_BERNOULLI if model.likelihood == "bernoulli" else _DENSITY)[binarize]
        kind = "elbo" if k is None else "iwae"
        return Likelihood(of_mean(values), kind, "lower", "nats per image", data, k, dataset=dataset)
    bound, data = ("upper", _DISCRETE[binarize]) if _of_grey_levels(model) else ("exact", _DENSITY[binarize])
    found = of_mean(values)
    return Likelihood(found, "bits_per_dim", bound, "bits per dimension", data, steps=steps, dataset=dataset)


def _of_grey_levels(model: nn.Module) -> bool:
    """Whether the model takes uint8 images as they are: all but a flow that does not begin with `Dequantize`."""
    transforms = getattr(model, "transforms", None)
    return transforms is None or (len(transforms) > 0 and transforms[0].stochastic)
