"""Two estimates of log p(x) of a VAE over the number of draws, and its bound while it trains."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from genfast import training
from genfast.experiments.base import Page, Settings, Trained, equal_epochs, number, train_run, versus
from genfast.experiments.figures import Panel, save_panels, save_plots
from genfast.experiments.measures import bound
from genfast.metrics import Estimate
from genfast.metrics.estimate import of_mean
from genfast.models import VAE
from genfast.random import derive_seed

# In two dimensions the integral over the codes can be computed.
SIZES = (2, 20)
METHODS = {"prior": "plain Monte Carlo", "importance": "importance weighting"}
_SHOWN = 36
# Calls of the estimator with the largest number of draws, at least 2: what their spread is measured by.
_CALLS = 2
# Of the integral: the square of codes, and the points along an axis, a multiple of 2.
_EXTENT, _POINTS = 6.0, 600
_DECODED_AT_ONCE = 4096


def run(settings: Settings) -> Page:
    """Train a VAE of each size, estimate log p(x) in both ways, and show what they draw along the training."""
    splits = settings.load()
    options = {"splits": splits, "binarize": "dynamic", "build_options": {"latent_dim": max(SIZES)}}
    epochs, few = equal_epochs(settings, "vae", **options, seconds=settings.budget / len(SIZES))

    def pictures(model: VAE) -> dict[str, Tensor]:
        drawn = {mode: model.sample(_SHOWN, mode=mode, seed=settings.seed) for mode in ("mean", "bernoulli")}
        return {mode: (images * 255).round().to(torch.uint8) for mode, images in drawn.items()}

    models = {
        size: train_run(
            settings, "vae", f"latent-{size}", splits=few, epochs=epochs, binarize="dynamic", evaluate_every=1,
            build_options={"latent_dim": size}, snapshot=pictures, title=f"VAE, {size} latent dimensions, {few.name}",
        )
        for size in SIZES
    }  # fmt: skip
    images = _binary(settings, splits.test[: settings.reduced(50, least=10)])
    draws = 10_000 if settings.portion == 1 else 1000
    rows, references = [], {}
    for size, trained in models.items():
        weights = {}
        for method, name in METHODS.items():
            print(f"{size} dimensions: {name}, {_CALLS} x {draws:,} draws for {len(images)} images", flush=True)
            weights[method] = _log_weights(settings, trained.model, images, method, draws)
        references[size] = _reference(settings, trained.model, images, draws)
        for method in METHODS:
            rows += [{"latent": size, **row} for row in _estimates(method, weights[method], draws, references[size][1])]
    gaps = {size: _gap(settings, trained.model, few, splits) for size, trained in models.items()}
    _draw(settings, models, rows, references)
    return _page(settings, few, epochs, models, rows, references, gaps, draws)


def _binary(settings: Settings, images: Tensor) -> Tensor:
    """Binarized as in every evaluation."""
    data = training.DeviceDataset(images, settings.device, "dynamic")
    seed = training.evaluation_seed(settings.seed)
    return next(data.batches(len(data), seed=seed, shuffle=False))[0]


def _log_weights(
    settings: Settings, model: VAE, images: Tensor, method: str, draws: int, first_call: int = 0
) -> Tensor:
    """log p(x | z) p(z) / q(z) of each single draw: fp64 [N, draws of all calls]."""
    calls = []
    for call in range(first_call, first_call + _CALLS):
        seed = derive_seed(settings.seed, call + 1)
        # One draw for each copy of an image: the estimate itself, for k = 1.
        rows = [
            model.log_prob(image.expand(draws, *image.shape), 1, method=method, seed=seed, row_offset=index * draws)
            for index, image in enumerate(images)
        ]
        calls.append(torch.stack(rows))
    return torch.cat(calls, 1).double().cpu()


def _reference(settings: Settings, model: VAE, images: Tensor, draws: int) -> tuple[str, Tensor, float]:
    """What is taken for log p(x) of each image: how it was come by, fp64 [N], and its error where that is known."""
    if model.latent_shape != (2,):
        # Of the draws that are judged by it the error would be 0 by construction.
        weights = _log_weights(settings, model, images, "importance", draws, first_call=_CALLS)
        values = weights.logsumexp(1) - math.log(weights.shape[1])
        return f"importance weighting with {weights.shape[1]:,} draws of its own", values, math.nan
    print("2 dimensions: the integral", flush=True)
    values, coarse = _integral(model, images, 2 * settings.reduced(_POINTS // 2, least=50))
    return "the integral over a grid", values, float((values - coarse).abs().max())


@torch.no_grad()
def _integral(model: VAE, images: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """log p(x) as the sum over a grid of codes, and that over every second point of each axis: fp64 [N]."""
    # Probabilities near 0 and 1 keep their logarithms in fp64.
    model = copy.deepcopy(model).double()
    axis = torch.arange(points, dtype=torch.float64, device=model.device) * (2 * _EXTENT / points) - _EXTENT
    grid = torch.cartesian_prod(axis, axis)
    even = torch.arange(points, device=model.device) % 2 == 0
    on_coarse = torch.cartesian_prod(even, even).all(1)
    x = images.flatten(1).double() / 255
    totals = [torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device) for _ in range(2)]
    for z, kept in zip(grid.split(_DECODED_AT_ONCE), on_coarse.split(_DECODED_AT_ONCE), strict=True):
        mean = model.decode(z).flatten(1).clamp(1e-300, 1 - 1e-16)
        log_joint = mean.log() @ x.T + (-mean).log1p() @ (1 - x).T
        log_joint -= (0.5 * z.square().sum(1) + math.log(2 * math.pi)).unsqueeze(1)
        for index, terms in enumerate((log_joint, log_joint[kept])):
            if len(terms):
                totals[index] = torch.logaddexp(totals[index], terms.logsumexp(0))
    step = 2 * _EXTENT / points
    return totals[0].cpu() + 2 * math.log(step), totals[1].cpu() + 2 * math.log(2 * step)


def _estimates(method: str, weights: Tensor, draws: int, reference: Tensor) -> list[dict[str, Any]]:
    """A row for each number of draws k: the estimate, its variance from call to call, and how far it is off."""
    rows = []
    for exponent in range(round(math.log10(draws)) + 1):
        k = 10**exponent
        calls = weights.view(len(weights), -1, k)
        estimates = calls.logsumexp(2) - math.log(k)
        shares = calls.softmax(2)
        rows.append({
            "method": METHODS[method], "k": k, "log_likelihood": of_mean(estimates.mean(1)),
            "variance": of_mean(estimates.var(1), 0.0), "off": of_mean(estimates.mean(1) - reference),
            "effective": of_mean((1 / shares.square().sum(2)).mean(1), 1.0),
        })  # fmt: skip
    return rows


def _gap(settings: Settings, model: VAE, few: training.Splits, splits: training.Splits) -> dict[str, Estimate]:
    """The bound of the trained model on as many training images as there are test images, and on these."""
    test = splits.test[: settings.reduced(len(splits.test), least=200)]
    sets = {"train": few.train[: len(test)], "test": test}
    return {
        name: bound(model, training.DeviceDataset(images, settings.device, "dynamic"), settings.seed)["elbo"]
        for name, images in sets.items()
    }


def _draw(
    settings: Settings, models: dict[int, Trained], rows: list[dict[str, Any]],
    references: dict[int, tuple[str, Tensor, float]],
) -> None:  # fmt: skip
    panels = {}
    for size, trained in models.items():
        for mode, what in (("mean", "means"), ("bernoulli", "draws")):
            for epoch, images in _first_middle_last(trained):
                panels[f"{size} dim., epoch {epoch:g}, {what}"] = images[mode]
    save_panels(panels, settings.out / "samples.png", columns=6, across=3)

    def lines(column: str, chosen: tuple[int, ...]) -> dict[str, list[tuple[float, Any]]]:
        found: dict[str, list[tuple[float, Any]]] = {}
        for row in rows:
            if row["latent"] in chosen:
                label = row["method"] if len(chosen) == 1 else f"{row['method']}, {row['latent']}"
                found.setdefault(label, []).append((row["k"], row[column]))
        return found

    plots = []
    for size, (how, _, _) in references.items():
        plots.append(Panel(
            f"how far log p(x) is off, {size} dimensions", "draws k", "nats per image", lines("off", (size,)),
            log_x=True, levels={how: 0.0}, y_limits=_limits(rows, size),
        ))  # fmt: skip
    plots.append(Panel(
        "variance of one image's estimate", "draws k", "nats squared", lines("variance", SIZES), log_x=True, log_y=True
    ))  # fmt: skip
    bounds = {}
    for size, trained in models.items():
        for prefix, name in (("", "train"), ("test_", "test")):
            bounds[f"{name}, {size}"] = [
                (row["epoch"], -row[f"{prefix}nll"] - row[f"{prefix}kl"])
                for row in trained.history if f"{prefix}nll" in row
            ]  # fmt: skip
    plots.append(Panel("ELBO", "epoch", "nats per image", bounds))
    save_plots(plots, settings.out / "curves.png", across=2)


def _first_middle_last(trained: Trained) -> list[tuple[float, dict[str, Tensor]]]:
    after = [snapshot for snapshot in trained.snapshots if snapshot[0] > 0]
    return [after[index] for index in sorted({0, (len(after) - 1) // 2, len(after) - 1})]


def _limits(rows: list[dict[str, Any]], size: int) -> tuple[float, float]:
    """Where both methods are seen for the most draws; a single one of the prior is far below."""
    of_size = [row for row in rows if row["latent"] == size]
    most = max(row["k"] for row in of_size)
    seen = [row for row in of_size if row["k"] == most or row["method"] == METHODS["importance"]]
    low, high = min(row["off"].low for row in seen), max(0.0, *(row["off"].high for row in seen))
    return low - 0.2 * (high - low), high + 0.1 * (high - low)


def _page(
    settings: Settings, splits: training.Splits, epochs: int, models: dict[int, Trained], rows: list[dict[str, Any]],
    references: dict[int, tuple[str, Tensor, float]], gaps: dict[int, dict[str, Estimate]], draws: int,
) -> Page:  # fmt: skip
    page = Page(
        "Estimating log p(x)",
        "How many draws does log p(x) of a VAE take, by plain Monte Carlo from the prior and by importance weighting "
        "with its encoder? And how do its bound and its samples come along while it trains?",
    )
    at = {(row["latent"], row["method"], row["k"]): row for row in rows}
    plain, weighted = METHODS.values()
    page.section("What was observed")
    for size, (how, values, error) in references.items():
        one, other = at[size, plain, draws], at[size, weighted, draws]
        known = f"half as many points along each axis differ by at most {error:.1e}"
        if math.isnan(error):
            known = "in expectation itself below log p(x), which may be further off than what follows says"
        page.say(f"With {size} latent dimensions the reference is {float(values.mean()):.2f} nats: {how}, {known}.")
        page.say(
            f"From there, with {draws:,} draws, {plain} is off by {number(one['off'])} nats, {weighted} by "
            f"{number(other['off'])}. The variance of one image's estimate, from call to call, in nats squared: "
            f"{versus(plain, one['variance'], weighted, other['variance'])}. Of the draws {number(one['effective'])} "
            f"and {number(other['effective'])} count (effective sample size)."
        )
        page.say(f"Within 1 nat comes {_within(rows, size, weighted)}; {_within(rows, size, plain)}.")
    for size, gap in gaps.items():
        page.say(
            f"The ELBO with {size} latent dimensions after {models[size].epochs:g} epochs, nats: "
            f"{versus('training images', gap['train'], 'test images', gap['test'])}."
        )
    page.section("Pictures")
    page.picture(
        settings.out / "curves.png",
        "Estimates over the number of draws (the prior's lowest ones are cut off), their variance, and the "
        "ELBO over the epochs. In training that is the mean over an epoch, while the weights change.",
    )
    page.picture(
        settings.out / "samples.png",
        "Samples of the first, the middle and the last epoch from the same codes: the decoder's means, and pixels "
        "drawn from them, which are what the likelihood is of.",
    )
    page.section("Numbers")
    count = rows[0]["log_likelihood"].n
    page.table(
        rows,
        f"VAEs (mlp, 784-400-latent), {epochs} epochs of {len(splits.train):,} images each; means over {count} "
        "binarized test images.",
        {
            "latent": "latent dimensions", "method": "estimate", "k": "draws k", "log_likelihood": "log p(x), nats",
            "off": "off by, nats", "variance": "variance of one image's, nats squared", "effective": "effective draws",
        },
    )  # fmt: skip
    page.text(
        "Both estimates average weights p(x | z) p(z) / q(z), with z from the prior (q = p) or from the encoder's "
        "q(z | x), and take the logarithm. The average is unbiased; its logarithm is not: by Jensen's inequality it is "
        "too low in expectation, by about half the variance of the average relative to its square while that is small, "
        f"so both are lower bounds that rise with k. Each is repeated with other draws, {_CALLS} times for the largest "
        "k and more often for smaller ones; the variance is between these, and intervals are over images. Where the "
        "variance is large it is itself badly known, since the few draws that matter are not among those made: the "
        "true value is then further off than it looks. Pixels are binarized, since grey ones have no likelihood under "
        "a Bernoulli."
    )
    return page


def _within(rows: list[dict[str, Any]], size: int, method: str) -> str:
    """From which number of draws on an estimate is right within 1 nat, in words."""
    off = {row["k"]: abs(row["off"].value) for row in rows if row["latent"] == size and row["method"] == method}
    good = [k for k in off if all(off[more] < 1 for more in off if more >= k)]
    return f"{method} from {good[0]:,} draws on" if good else f"{method} with none of up to {max(off):,} draws"
