"""VAEs that differ in the number of their latent dimensions alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from genfast import training
from genfast.experiments.base import Page, Settings, best, equal_epochs, number, train_run, trend
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

SIZES = (2, 10, 25, 50)
_SHOWN, _RECONSTRUCTED = 48, 10
# Of the KL: a unit may be active and hold next to nothing.
_SHARE = 0.99


def run(settings: Settings) -> Page:
    """Train a VAE of each size, measure all of them, and write the pictures."""
    splits = settings.load()
    options = {"splits": splits, "binarize": "dynamic", "build_options": {"latent_dim": max(SIZES)}}
    epochs, few = equal_epochs(settings, "vae", **options, seconds=settings.budget / len(SIZES))
    k = settings.reduced(100, least=10)
    rows, per_unit, samples, reconstructions = [], {}, {}, {"data": splits.test[:_RECONSTRUCTED]}
    for size in SIZES:
        trained = train_run(
            settings, "vae", f"latent-{size}", splits=few, epochs=epochs, binarize="dynamic",
            build_options={"latent_dim": size}, evaluate_every=1, title=f"VAE, {size} latent dimensions, {few.name}",
        )  # fmt: skip
        print(f"measuring {size} dimensions", flush=True)
        model, test = trained.model, training.DeviceDataset(splits.test, settings.device, "dynamic")
        some = training.DeviceDataset(splits.test[: settings.reduced(1000, least=100)], settings.device, "dynamic")
        mu, logvar = codes(model, test, settings.seed)
        per_unit[size] = _kl_of_units(mu, logvar)
        images = drawn(model, settings.reduced(10_000, least=500), settings.seed)
        samples[f"{size} dimensions"] = images[:_SHOWN]
        reconstructions[str(size)] = model.reconstruct(splits.test[:_RECONSTRUCTED].to(settings.device)).cpu()
        rows.append({
            "size": size, **bound(model, test, settings.seed),
            "log_likelihood": log_likelihood(model, some, k, settings.seed), "active_units": active_units(mu),
            "holding": _holding(per_unit[size]), **of_samples(images, splits), "seconds": trained.seconds,
        })  # fmt: skip
    save_panels(samples, settings.out / "samples.png", columns=6)
    save_panels(reconstructions, settings.out / "reconstructions.png", columns=2)
    _plot(settings, rows, per_unit)
    return _page(settings, few, epochs, k, rows, per_unit)


def _kl_of_units(mu: Tensor, logvar: Tensor) -> Tensor:
    """The mean KL of each unit over the images, in nats, the largest first."""
    mu, logvar = mu.double(), logvar.double()
    return (0.5 * (mu.square() + logvar.exp() - 1 - logvar)).mean(0).sort(descending=True).values


def _holding(kl: Tensor) -> int:
    """The fewest units that hold 99% of the KL."""
    return int((kl.cumsum(0) < _SHARE * kl.sum()).sum()) + 1


def _plot(settings: Settings, rows: list[dict[str, Any]], per_unit: dict[int, Tensor]) -> None:
    sizes = [row["size"] for row in rows]
    bounds = {
        "ELBO": [(row["size"], row["elbo"]) for row in rows],
        "importance-weighted": [(row["size"], row["log_likelihood"]) for row in rows],
    }
    units = {str(size): list(enumerate(kl.tolist(), start=1)) for size, kl in per_unit.items()}
    used = {
        "active": [(row["size"], row["active_units"]) for row in rows],
        "holding 99% of the KL": [(row["size"], row["holding"]) for row in rows],
        "all": [(size, size) for size in sizes],
    }
    panels = [
        Panel("bounds on log p(x), test", "latent dimensions", "nats per image", bounds),
        Panel("KL of each unit", "unit, by its KL", "nats", units, log_y=True),
        Panel("units in use", "latent dimensions", "units", used),
    ]
    save_plots(panels, settings.out / "curves.png")


def _page(
    settings: Settings, splits: training.Splits, epochs: int, k: int, rows: list[dict[str, Any]],
    per_unit: dict[int, Tensor],
) -> Page:  # fmt: skip
    page = Page(
        "The size of the latent space",
        f"VAEs with {', '.join(map(str, SIZES))} latent dimensions: how many of them are used, and what do they bring?",
    )
    by = {column: {str(row["size"]): row[column] for row in rows} for column in rows[0]}
    page.section("What was observed")
    page.say(f"By latent dimensions, the test ELBO is highest at {best(by['elbo'], 'higher', 'nats')}.")
    page.say(
        f"The importance-weighted bound with {k} draws is highest at {best(by['log_likelihood'], 'higher', 'nats')}."
    )
    page.say(
        f"The number of active units {trend(by['active_units'])}; that of the units which hold 99% of the KL "
        f"{trend(by['holding'])}. The KL {trend(by['kl'], 'nats')}."
    )
    unused = {size: size - units for size, units in ((row["size"], row["active_units"]) for row in rows)}
    if any(unused.values()):
        words = ", ".join(f"{count} of {size}" for size, count in unused.items() if count)
        largest = max(per_unit)
        page.say(
            f"Units that are not active: {words}. With {largest} dimensions the KL of the most used unit is "
            f"{number(float(per_unit[largest][0]))} nats, of the least used one {number(float(per_unit[largest][-1]))}."
        )
    else:
        page.say("All units of all models are active.")
    if rows[0]["frechet_distance"] is not None:
        page.say(f"The Fréchet distance of the samples is smallest at {best(by['frechet_distance'], 'lower')}.")
        page.say(f"Their precision {trend(by['precision'])}; their recall {trend(by['recall'])}.")
    if rows[0]["coverage"] is not None:
        found = ", ".join(f"{value.value:.0f} with {size}" for size, value in by["coverage"].items())
        page.say(f"Digits that appear (at least 4% of the samples each): {found}.")
    page.section("Pictures")
    page.picture(settings.out / "samples.png", "Samples: the decoder's means for draws from N(0, I).")
    page.picture(settings.out / "reconstructions.png", "Ten test images, and what each model makes of them.")
    page.picture(settings.out / "curves.png", "Bounds, the KL of each unit, and how many units are active.")
    page.section("Numbers")
    page.table(
        rows,
        f"{len(SIZES)} VAEs (mlp, 784-400-latent), {epochs} epochs of {len(splits.train):,} images for each.",
        {
            "size": "latent dimensions", "nll": "nll, nats", "kl": "KL, nats", "elbo": "ELBO, nats",
            "log_likelihood": f"log p(x) at least (k = {k}), nats", "holding": "units with 99% of the KL",
            **headings(
                "active_units", "frechet_distance", "precision", "recall", "coverage", "seconds",
                digits=are_digits(splits),
            ),
        },
    )  # fmt: skip
    page.text(f"{ABOUT_LIKELIHOODS} {ABOUT_SAMPLES}")
    return page
