"""Two estimates of log p(x) of a VAE over the number of draws, and its bound while it trains."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genfast import training
from genfast.experiments.base import Page, Settings, Trained, equal_epochs, number, train_run, versus
from genfast.experiments.figures import Panel, save_panels, save_plots
from genfast.metrics import Estimate
from genfast.metrics.estimate import of_mean
from genfast.models import VAE
from genfast.random import derive_seed

# In two dimensions the integral over the codes can be computed.
SIZES = (2, 20)
METHODS = {"prior": "plain Monte Carlo", "importance": "importance weighting"}
_EXTENT = 6.0
_ROWS, _COLUMNS, _SHOWN = 6, 6, 36
_REPEATED = 10
_GROUPS = 4


def run(settings: Settings) -> Page:
    """Train a VAE of each size, estimate log p(x) in both ways, and show what they draw along the training."""
    splits = settings.load()
    options = {"splits": splits, "binarize": "dynamic", "build_options": {"latent_dim": max(SIZES)}}
    epochs, few = equal_epochs(settings, "vae", **options, seconds=settings.budget / len(SIZES))

    def pictures(model: VAE) -> dict[str, Tensor]:
        modes = ("mean", "bernoulli")
        return {mode: (model.sample(_SHOWN, mode=mode, seed=settings.seed) * 255).round().byte() for mode in modes}

    models = {
        size: train_run(
            settings, "vae", f"latent-{size}", splits=few, epochs=epochs, binarize="dynamic", evaluate_every=1,
            build_options={"latent_dim": size}, snapshot=pictures,
            title=f"VAE, {size} latent dimensions, {splits.name}",
        )
        for size in SIZES
    }  # fmt: skip
    images = _binary(settings, splits)
    draws = 10 ** (4 if settings.portion == 1 else 3)
    rows, truths = [], {}
    for size, trained in models.items():
        print(f"estimating log p(x) in {size} dimensions", flush=True)
        if size == 2:
            truths[size] = _integral(trained.model, images)
        for method in METHODS:
            rows += _estimates(settings, trained.model, images, method, draws, truths.get(size), size)
    _draw(settings, models, rows, truths)
    return _page(settings, few, epochs, models, rows, truths, images, draws)


def _binary(settings: Settings, splits: training.Splits) -> Tensor:
    """The first test images, binarized as in every evaluation."""
    count = settings.reduced(100, least=16)
    data = training.DeviceDataset(splits.test[:count], settings.device, "dynamic")
    images, _ = next(data.batches(count, seed=training.evaluation_seed(settings.seed), shuffle=False))
    return images


def _estimates(
    settings: Settings, model: VAE, images: Tensor, method: str, draws: int, truth: tuple[Tensor, float] | None,
    size: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each number of draws k: what the estimate is, how far it spreads, how far it is off."""
    weights = torch.cat([
        model.log_prob(images.repeat_interleave(draws, 0), 1, method=method, seed=derive_seed(settings.seed, repeat + 1))
        .double().cpu().view(len(images), draws)
        for repeat in range(_GROUPS)
    ], 1)  # fmt: skip
    # What all draws together say, by importance weighting the best guess there is.
    rows = []
    for exponent in range(int(math.log10(draws)) + 1):
        k = 10**exponent
        estimates = weights.view(len(images), -1, k).logsumexp(2) - math.log(k)
        relative = (weights.view(len(images), -1, k) - estimates.unsqueeze(2)).exp() / k
        rows.append({
            "latent": size, "method": METHODS[method], "k": k, "log_likelihood": of_mean(estimates.mean(1)),
            # Of one image's estimate, from call to call; and of the mean, where all images share no draws.
            "deviation": of_mean(estimates.var(1).sqrt(), low=0.0),
            "effective": of_mean((1 / relative.square().sum(2)).mean(1), low=0.0),
            "off": None if truth is None else of_mean(estimates.mean(1) - truth[0]),
        })  # fmt: skip
    return rows
