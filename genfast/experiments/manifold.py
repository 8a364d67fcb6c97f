"""The plane of codes of VAEs with two latent dimensions, by the weight of the KL term."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genfast import training
from genfast._files import replacing
from genfast.experiments.base import Page, Settings, best, equal_epochs, train_run, trend
from genfast.experiments.figures import save_panels
from genfast.experiments.measures import ABOUT_LIKELIHOODS, are_digits, bound, codes, headings, log_likelihood
from genfast.metrics import active_units, class_shares, confidence, linear_probe
from genfast.metrics.estimate import of_share

WEIGHTS = (1.0, 5.0, 10.0, 40.0)
_EXTENT, _POINTS = 4.0, 16
# Within this radius lies 95% of a standard normal of the plane.
_RADIUS = math.sqrt(-2 * math.log(0.05))
_SCATTERED = 2000


def run(settings: Settings) -> Page:
    """Train a VAE with each weight, decode a grid over its plane, and see where the test images lie in it."""
    splits = settings.load()
    options = {"splits": splits, "binarize": "dynamic", "build_options": {"latent_dim": 2}}
    epochs, options["splits"] = equal_epochs(settings, "vae", **options, seconds=settings.budget / len(WEIGHTS))
    k = settings.reduced(100, least=10)
    rows, means = [], {}
    for weight in WEIGHTS:
        trained = train_run(
            settings, "vae", f"weight-{weight:g}", epochs=epochs, loss_options={"beta": weight}, evaluate_every=1,
            title=f"VAE in two dimensions, KL weight {weight:g}, {splits.name}", **options,
        )  # fmt: skip
        print(f"measuring weight {weight:g}", flush=True)
        model, test = trained.model, training.DeviceDataset(splits.test, settings.device, "dynamic")
        some = training.DeviceDataset(splits.test[: settings.reduced(1000, least=100)], settings.device, "dynamic")
        grid = model.manifold(_POINTS, _EXTENT).flatten(0, 1)
        save_panels({f"weight {weight:g}": grid}, _picture(settings, weight), columns=_POINTS)
        mu, _ = codes(model, test, settings.seed)
        means[f"weight {weight:g}"] = mu
        rows.append({
            "weight": f"{weight:g}", **bound(model, test, settings.seed),
            "log_likelihood": log_likelihood(model, some, k, settings.seed), "active_units": active_units(mu),
            "inside": of_share((mu.abs() <= _EXTENT).all(1)),
            "spread": float(mu.double().var(0).mean().sqrt()), **_of_grid(grid, splits),
            "linear_probe": _probe(settings, model, options["splits"], mu, splits), "seconds": trained.seconds,
        })  # fmt: skip
    _scatter(means, splits.test_labels, settings.out / "codes.png")
    return _page(settings, options["splits"], epochs, k, rows)


def _picture(settings: Settings, weight: float) -> Path:
    return settings.out / f"manifold-{weight:g}.png"


def _of_grid(grid: Tensor, splits: training.Splits) -> dict[str, Any]:
    if not are_digits(splits):
        return {"digits": None, "confidence": None}
    # A single image of the grid may be a misreading.
    return {"digits": int((class_shares(grid) >= 0.01).sum()), "confidence": confidence(grid)}


def _probe(settings: Settings, model: Any, few: training.Splits, mu: Tensor, splits: training.Splits) -> Any:
    if few.train_labels is None or splits.test_labels is None:
        return None
    count = settings.reduced(10_000, least=500)
    chosen = torch.randperm(len(few.train), generator=torch.Generator().manual_seed(0))[:count]
    train = training.DeviceDataset(few.train[chosen], settings.device, "dynamic")
    found = codes(model, train, settings.seed)[0]
    return linear_probe(found, few.train_labels[chosen], mu, splits.test_labels)


def _scatter(means: dict[str, Tensor], labels: Tensor | None, path: Path) -> None:
    """Where the test images lie, a colour for each label."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, Rectangle

    figure = Figure(figsize=(2.9 * len(means), 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (heading, mu) in zip(figure.subplots(1, len(means), squeeze=False)[0], means.items(), strict=True):
        x, y = mu[:_SCATTERED].T.tolist()
        shown = None if labels is None else labels[:_SCATTERED].tolist()
        points = axes.scatter(x, y, c=shown, cmap=None if shown is None else "tab10", s=2, linewidths=0)
        axes.add_patch(Rectangle((-_EXTENT, -_EXTENT), 2 * _EXTENT, 2 * _EXTENT, fill=False, linewidth=0.8))
        axes.add_patch(Circle((0, 0), _RADIUS, fill=False, linewidth=0.8, linestyle="--"))
        axes.set(title=heading, xlim=(-1.3 * _EXTENT, 1.3 * _EXTENT), ylim=(-1.3 * _EXTENT, 1.3 * _EXTENT))
        axes.set_aspect("equal")
    if labels is not None and int(labels.max()) < 10:
        figure.colorbar(points, ax=figure.axes, ticks=range(int(labels.max()) + 1), fraction=0.02)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")


def _page(settings: Settings, splits: training.Splits, epochs: int, k: int, rows: list[dict[str, Any]]) -> Page:
    page = Page(
        "The plane of a two-dimensional latent space",
        "What do VAEs with two latent dimensions put where, if the KL is weighted "
        f"{', '.join(row['weight'] for row in rows)}?",
    )
    by = {column: {row["weight"]: row[column] for row in rows} for column in rows[0]}
    page.section("What was observed")
    page.say(f"The nll {trend(by['nll'], 'nats')}; the KL {trend(by['kl'], 'nats')}.")
    page.say(f"The ELBO is highest at weight {best(by['elbo'], 'higher', 'nats')}.")
    page.say(
        f"Along each axis the means of the test images spread, as a standard deviation, over "
        f"{_listed(by['spread'])}; N(0, 1) has 1."
    )
    outside = {weight: 1 - value.value for weight, value in by["inside"].items()}
    page.say(f"Share of the test images that lie outside the square from -4 to 4: {_listed(outside)}.")
    collapsed = [weight for weight, units in by["active_units"].items() if units < 2]
    if collapsed:
        words = ", ".join(f"{by['active_units'][weight]} with weight {weight}" for weight in collapsed)
        page.say(f"Not both dimensions are in use everywhere: active are {words}.")
    else:
        page.say("Both dimensions are active with every weight.")
    if rows[0]["digits"] is not None:
        page.say(
            f"Digits in the square, each in at least 1% of its {_POINTS**2} points: {_listed(by['digits'])}; the "
            f"classifier's confidence {trend(by['confidence'])}."
        )
    if rows[0]["linear_probe"] is not None:
        page.say(f"How much of the label a linear probe reads off the plane {trend(by['linear_probe'])}.")
    page.section("Pictures")
    for weight in WEIGHTS:
        page.picture(
            _picture(settings, weight), f"KL weight {weight:g}: the decoder's means over the square from -4 to 4."
        )
    page.picture(
        settings.out / "codes.png",
        "Posterior means of test images, a colour for each label; the square of the pictures above, and the circle "
        "that holds 95% of the prior.",
    )
    page.section("Numbers")
    page.table(
        rows,
        f"{len(WEIGHTS)} VAEs (mlp, 784-400-2), {epochs} epochs of {len(splits.train):,} images for each.",
        {
            "weight": "KL weight", "nll": "nll, nats", "kl": "KL, nats", "elbo": "ELBO, nats",
            "log_likelihood": f"log p(x) at least (k = {k}), nats", "spread": "spread of the means",
            "inside": "within the square", "digits": "digits in it",
            **headings("confidence", "active_units", "linear_probe", "seconds"),
        },
    )  # fmt: skip
    share = math.pi * _RADIUS**2 / (2 * _EXTENT) ** 2
    page.text(
        f"The points of the square are equally far apart: most of them are unlikely under the prior, 95% of which "
        f"lies in the circle of radius {_RADIUS:.2f}, {100 * share:.0f}% of the square's area. {ABOUT_LIKELIHOODS}"
    )
    return page


def _listed(values: dict[str, Any]) -> str:
    shown = {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return ", ".join(f"{value} with weight {name}" for name, value in shown.items())
