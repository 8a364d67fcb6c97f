"""Every family on the same images, each trained for the same time."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import torch

from genfast import html_report, training
from genfast._files import replacing
from genfast.experiments.base import Page, Settings, Trained, apart, best, number, train_run, versus
from genfast.experiments.figures import save_panels
from genfast.experiments.measures import NO_DIGITS, OF_FEATURES, are_digits, headings
from genfast.metrics import DEFINITIONS, Estimate, Likelihood, comparable, evaluate_model, likelihood, load_inception
from genfast.models import DDPM, VAE

# Name of the model -> family, options of the model, and of its training where time alone ends it.
_MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "AE": ("ae", {"preset": "conv"}, {}),
    "VAE": ("vae", {"preset": "conv"}, {}),
    "GAN": ("gan", {}, {}),
    "flow": ("flow", {}, {"ema_decay": 0.999}),
    "DDPM": ("ddpm", {}, {}),
}
_SHOWN, _SAMPLES = 36, 2048
# Of the likelihoods: images, a VAE's draws, and a diffusion model's steps.
_SCORED, _DRAWS, _STEPS = 500, 100, 50
_OF_SAMPLES = (
    "frechet_distance", "inception_fid", "precision", "recall", "coverage", "entropy", "smallest_share",
    "confidence", "nearest_distance", "memorisation", "sampling_speed",
)  # fmt: skip
_OF_CODES = ("linear_probe", "active_units")


def run(settings: Settings) -> Page:
    """Train a model of each family, measure all of them alike, and write the pictures and an HTML report."""
    splits = settings.load()
    inception = None if settings.inception is None else load_inception(settings.inception, settings.device)
    models: dict[str, Trained] = {}
    for name, (family, build_options, fit_options) in _MODELS.items():
        models[name] = train_run(
            settings, family, name, splits=splits, seconds=settings.budget / len(_MODELS),
            build_options=build_options, title=f"{name}, {splits.name}", **fit_options,
        )  # fmt: skip
    measured = {name: _measured(settings, splits, name, trained, inception) for name, trained in models.items()}
    images = {"test images": splits.test[:_SHOWN]}
    for name, trained in models.items():
        images[name] = trained.model.sample(_SHOWN, seed=settings.seed, **_sampling(trained))
    save_panels({name: each.cpu() for name, each in images.items()}, settings.out / "samples.png", columns=6, across=3)
    html_report.write_report([trained.folder for trained in models.values()], settings.out / "report.html")
    return _page(settings, splits, models, measured)


def _sampling(trained: Trained) -> dict[str, Any]:
    return trained.model.quick_sampling(_STEPS) if isinstance(trained.model, DDPM) else {}


def _measured(
    settings: Settings, splits: training.Splits, name: str, trained: Trained, inception: torch.nn.Module | None
) -> dict[str, Estimate | Likelihood]:
    """By the name of the metric; also written into the run's folder, as `genfast evaluate --metrics` does."""
    print(f"measuring {name}", flush=True)
    model = trained.model
    samples = settings.reduced(_SAMPLES, least=64)
    found: dict[str, Estimate | Likelihood] = dict(
        evaluate_model(
            model, splits, samples=samples, seed=settings.seed, inception=inception, **_sampling(trained)
        )
    )
    images = splits.test[: settings.reduced(_SCORED, least=16)]
    for options in _likelihoods(settings, model):
        said = likelihood(model, images, seed=settings.seed, **options)
        if said is not None:
            found[said.kind] = said
    kept = {"data": splits.name, "binarize": "none", "images": len(images), "seed": settings.seed}
    if settings.inception is not None:
        kept["inception"] = settings.inception
    kept["metrics"] = {metric: value.to_dict() for metric, value in found.items()}
    with replacing(trained.folder / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(kept, indent=2) + "\n")
    return found


def _likelihoods(settings: Settings, model: torch.nn.Module) -> list[dict[str, Any]]:
    """The options of each likelihood that the model is asked for."""
    if isinstance(model, VAE):
        return [{}, {"k": settings.reduced(_DRAWS, least=5)}]
    if isinstance(model, DDPM):
        return [{"steps": min(_STEPS, model.schedule.num_steps or _STEPS)}]
    return [{}]


def _page(
    settings: Settings, splits: training.Splits, models: dict[str, Trained],
    measured: dict[str, dict[str, Estimate | Likelihood]],
) -> Page:  # fmt: skip
    page = Page(
        "Five families, one budget",
        f"An autoencoder, a VAE, a GAN, a flow and a diffusion model are trained on the same {len(splits.train):,} "
        f"images ({splits.name}), each within the same time on the same device. What has each learned by then?",
    )
    by = {
        metric: {name: found[metric] for name, found in measured.items() if isinstance(found.get(metric), Estimate)}
        for metric in (*_OF_SAMPLES, *_OF_CODES)
    }
    page.section("What was observed")
    seconds = [trained.seconds for trained in models.values()]
    spent = f"{number(min(seconds))} to {number(max(seconds))}"
    passes = ", ".join(f"{name} {trained.epochs:.3g}" for name, trained in models.items())
    page.say(
        f"Each was stopped after {number(settings.budget / len(_MODELS))} seconds, evaluations included, at the next "
        f"look at the clock; its training took {spent}. It went through the images so many times: {passes}."
    )
    _say_of_samples(page, by, are_digits(splits))
    _say_of_likelihoods(page, measured)
    if len(by["linear_probe"]) == 2:
        first, second = by["linear_probe"]
        probes = [by["linear_probe"][name] for name in (first, second)]
        page.say(f"A linear probe of the codes: {versus(first, probes[0], second, probes[1])} (accuracy).")
    for name, trained in models.items():
        warned = [row for row in trained.history if "warning" in row]
        if warned:
            said = warned[-1]["warning"]
            page.say(f"{name}: after {len(warned)} of {len(trained.history)} epochs `fit` warned, last of {said!r}.")
    page.section("Pictures")
    page.picture(
        settings.out / "samples.png",
        "Test images, and samples of each model; autoencoder and VAE: the decoder's means of draws from N(0, I).",
    )
    page.section("Numbers")
    _table(page, models, measured, by, are_digits(splits))
    page.text(
        "Every metric is defined in `genfast.metrics.DEFINITIONS`; n is how many images, or codes, it was measured on. "
        "Of all models as many samples are drawn and compared with the test images; the autoencoder, which has no "
        f"prior, is given codes from N(0, I). Diffusion samples with {_STEPS} steps of DDIM, and its bound is that of "
        f"{_STEPS} steps. A likelihood stands in one line with another only where both are of the same treatment of "
        "the pixels, draws and steps; a Bernoulli of grey pixels has none, and its nats compare with nothing else. A "
        "bound in a number of steps is that of a model which samples in as many. Other sizes of the networks, or a "
        "longer training, may give another order."
    )
    return page


def _say_of_samples(page: Page, by: dict[str, dict[str, Estimate]], digits: bool) -> None:
    for metric in ("frechet_distance", "inception_fid", "precision", "recall", "confidence", "sampling_speed"):
        what, values = DEFINITIONS[metric], by[metric]
        title = what.title if digits or metric not in OF_FEATURES else f"{what.title} ({NO_DIGITS})"
        if values and all(value.value == 0 for value in values.values()):
            page.say(f"The {title} of all models is 0.")
        elif len(values) > 1 and not any(apart(a, b) for a, b in combinations(values.values(), 2)):
            listed = ", ".join(f"{name} {number(value)}" for name, value in values.items())
            page.say(f"By {title} no two models are told apart: {listed}.")
        elif len(values) > 1:
            page.say(f"Best {title}: {best(values, what.better, _unit(metric))}.")
    if by["coverage"]:
        whole = [name for name, value in by["coverage"].items() if value.value == 10]
        others = {name: value for name, value in by["coverage"].items() if name not in whole}
        missing = ", ".join(f"{name} ({value.value:.0f})" for name, value in others.items())
        page.say(
            f"All ten digits, each in 4% of the samples or more: {', '.join(whole) or 'no model'}."
            + (f" Fewer: {missing}." if others else "")
        )
    near = {name: value for name, value in by["memorisation"].items() if value.high < 1}
    if by["memorisation"]:
        listed = ", ".join(f"{name} {number(value)}" for name, value in near.items()) or "no model"
        page.say(f"Samples nearer to training images than test images are (ratio below 1): {listed}.")


def _unit(metric: str) -> str:
    unit = DEFINITIONS[metric].unit
    return "" if unit == "share" else unit


def _say_of_likelihoods(page: Page, measured: dict[str, dict[str, Estimate | Likelihood]]) -> None:
    found = [
        (name, value) for name, values in measured.items() for value in values.values() if isinstance(value, Likelihood)
    ]
    for (first, a), (second, b) in combinations(found, 2):
        # A flow's number, which has no steps, compares with a bound in any number of them: both are of the same pixels.
        if first != second and comparable(a, b):
            kinds = f"{first}: {_bound(a)}; {second}: {_bound(b)}"
            page.say(f"Of {a.data}: {versus(first, a.estimate, second, b.estimate, a.unit)} ({kinds}).")


def _bound(value: Likelihood) -> str:
    text = "exact" if value.bound == "exact" else f"{value.bound} bound"
    return text if value.steps is None else f"{text} in {value.steps:,} steps"


def _table(
    page: Page, models: dict[str, Trained], measured: dict[str, dict[str, Estimate | Likelihood]],
    by: dict[str, dict[str, Estimate]], digits: bool,
) -> None:  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    likelihoods: dict[str, str] = {}
    for name, trained in models.items():
        rows[name] = {"model": name, "seconds": trained.seconds, "epochs": trained.epochs}
        rows[name]["parameters"] = int(measured[name]["parameters"].value)
        for metric in (*_OF_SAMPLES, *_OF_CODES):
            rows[name][metric] = measured[name].get(metric)
        for value in measured[name].values():
            if isinstance(value, Likelihood):
                rows[name][value.column] = value.estimate
                likelihoods[value.column] = value.column
    some = [metric for metric in (*_OF_SAMPLES, *_OF_CODES) if by[metric]]
    columns = {**headings("seconds", "parameters", *some, digits=digits), **likelihoods}
    for metric in columns:
        columns[metric] += _sizes([row.get(metric) for row in rows.values()])
    page.table(
        list(rows.values()), "The models. What a family has not is not measured.",
        {"model": "model", "epochs": "epochs", **columns}, name="models", transposed=True,
    )  # fmt: skip


def _sizes(values: list[Any]) -> str:
    """Of how many images the numbers of a line are."""
    sizes = sorted({value.n for value in values if isinstance(value, Estimate) and value.n})
    if not sizes:
        return ""
    return f" (n = {sizes[0]:,})" if len(sizes) == 1 else f" (n = {sizes[0]:,} to {sizes[-1]:,})"
