"""VAEs that differ in the weight of the KL term alone."""

from __future__ import annotations

from typing import Any

from genfast import training
from genfast.experiments.base import Page, Settings, Trained, best, equal_epochs, number, train_run, trend
from genfast.experiments.figures import Panel, save_panels, save_plots
from genfast.experiments.measures import (
    ABOUT_LIKELIHOODS,
    ABOUT_SAMPLES,
    are_digits,
    bound,
    codes,
    drawn,
    headings,
    log_likelihood,
    of_samples,
)
from genfast.metrics import active_units

WEIGHTS = (0.0, 0.075, 1.0, 5.0, 10.0, 30.0, 40.0)
_LATENT_DIM = 20
_RECONSTRUCTED, _SHOWN = 10, 25


def run(settings: Settings) -> Page:
    """Train a VAE with each weight, measure all of them, and write the pictures."""
    splits = settings.load()
    options = {"splits": splits, "binarize": "dynamic", "build_options": {"latent_dim": _LATENT_DIM}}
    epochs, options["splits"] = equal_epochs(settings, "vae", **options, seconds=settings.budget / len(WEIGHTS))
    models: dict[float, Trained] = {}
    for weight in WEIGHTS:
        models[weight] = train_run(
            settings, "vae", f"weight-{weight:g}", epochs=epochs, loss_options={"beta": weight}, evaluate_every=1,
            title=f"VAE, KL weight {weight:g}, {splits.name}", **options,
        )  # fmt: skip
    k = settings.reduced(100, least=10)
    rows = [_measured(settings, splits, weight, models[weight], k) for weight in WEIGHTS]
    _draw(settings, splits, models, rows)
    return _page(settings, options["splits"], epochs, k, rows)


def _measured(settings: Settings, splits: training.Splits, weight: float, trained: Trained, k: int) -> dict[str, Any]:
    print(f"measuring weight {weight:g}", flush=True)
    test = training.DeviceDataset(splits.test, settings.device, "dynamic")
    few = training.DeviceDataset(splits.test[: settings.reduced(1000, least=100)], settings.device, "dynamic")
    samples = drawn(trained.model, settings.reduced(10_000, least=500), settings.seed)
    return {
        "weight": f"{weight:g}",
        **bound(trained.model, test, settings.seed),
        "log_likelihood": log_likelihood(trained.model, few, k, settings.seed),
        "active_units": active_units(codes(trained.model, test, settings.seed)[0]),
        **of_samples(samples, splits),
        "seconds": trained.seconds,
    }


def _draw(
    settings: Settings, splits: training.Splits, models: dict[float, Trained], rows: list[dict[str, Any]]
) -> None:
    images = splits.test[:_RECONSTRUCTED].to(settings.device)
    columns = {"data": images} | {f"{weight:g}": each.model.reconstruct(images) for weight, each in models.items()}
    save_panels(columns, settings.out / "reconstructions.png", columns=2)
    grids = {f"weight {weight:g}": drawn(each.model, _SHOWN, settings.seed) for weight, each in models.items()}
    save_panels(grids, settings.out / "samples.png", columns=5, across=4)

    def over_epochs(part: str) -> dict[str, list[tuple[float, float]]]:
        return {
            f"{weight:g}": [(row["epoch"], row[f"test_{part}"]) for row in each.history if f"test_{part}" in row]
            for weight, each in models.items()
        }

    plane = [(row["kl"].value, row["nll"]) for row in rows]
    units = [(index, row["active_units"]) for index, row in enumerate(rows)]
    names = [row["weight"] for row in rows]
    panels = [
        Panel("reconstruction, test", "epoch", "nll, nats per image", over_epochs("nll")),
        Panel("KL, test", "epoch", "nats per image", over_epochs("kl"), log_y=True),
        Panel("what is paid for what", "KL, nats", "nll, nats", {"": plane}, log_x=True, names={"": names}),
        Panel(f"active units of {_LATENT_DIM}", "KL weight", "units", {"": units}, ticks=names),
    ]
    save_plots(panels, settings.out / "curves.png", across=2)


def _page(settings: Settings, splits: training.Splits, epochs: int, k: int, rows: list[dict[str, Any]]) -> Page:
    page = Page(
        "The weight of the KL term",
        f"A VAE is trained on nll + weight x KL. What does each weight, from {rows[0]['weight']} to "
        f"{rows[-1]['weight']}, buy, and what does it cost?",
    )
    by = {column: {row["weight"]: row[column] for row in rows} for column in rows[0]}
    page.section("What was observed")
    page.say(f"The reconstruction's nll {trend(by['nll'], 'nats')}; the KL {trend(by['kl'], 'nats')}.")
    page.say(f"The bound on log p(x) itself, -(nll + KL), is highest at weight {best(by['elbo'], 'higher', 'nats')}.")
    page.say(
        f"The importance-weighted bound with {k} draws is highest at weight "
        f"{best(by['log_likelihood'], 'higher', 'nats')}."
    )
    page.say(f"Of {_LATENT_DIM} latent units the number that is active {trend(by['active_units'])}.")
    silent = [weight for weight, units in by["active_units"].items() if units == 0]
    if silent:
        kls = ", ".join(number(by["kl"][weight]) for weight in silent)
        page.say(f"At weight {' and '.join(silent)} no unit is active; the KL there is {kls} nats.")
    if by["frechet_distance"][rows[0]["weight"]] is not None:
        nearest = best(by["frechet_distance"], "lower")
        page.say(f"The samples are nearest to the test images, by the Fréchet distance, at weight {nearest}.")
    if by["coverage"][rows[0]["weight"]] is not None:
        found = ", ".join(f"{value.value:.0f} at weight {weight}" for weight, value in by["coverage"].items())
        page.say(f"Digits that appear (at least 4% of the samples each): {found}.")
    page.section("Pictures")
    page.picture(settings.out / "curves.png", "Test nll and KL over the epochs; nll against KL; active units.")
    page.picture(
        settings.out / "reconstructions.png", "Ten test images, and what each model makes of their mean codes."
    )
    page.picture(settings.out / "samples.png", "Samples: the decoder's means for the same draws from N(0, I).")
    page.section("Numbers")
    page.table(
        rows,
        f"{len(WEIGHTS)} VAEs (mlp, 784-400-{_LATENT_DIM}), {epochs} epochs of {len(splits.train):,} images for each.",
        {
            "weight": "KL weight", "nll": "nll, nats", "kl": "KL, nats", "elbo": "ELBO, nats",
            "log_likelihood": f"log p(x) at least (k = {k}), nats",
            **headings(
                "active_units", "frechet_distance", "precision", "recall", "coverage", "seconds",
                digits=are_digits(splits),
            ),
        },
    )  # fmt: skip
    page.text(
        f"{ABOUT_LIKELIHOODS} {ABOUT_SAMPLES} The ELBO is that of weight 1 whatever was trained. Other weights train "
        "an encoder that is not the one the ELBO asks for, which costs the importance-weighted bound tightness as well."
    )
    return page
