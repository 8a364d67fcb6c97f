"""Flows that differ in the noise below the grey levels alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from genfast import training
from genfast.experiments.base import (
    Page,
    Paired,
    Settings,
    Trained,
    apart,
    best,
    equal_epochs,
    number,
    train_run,
    versus,
)
from genfast.experiments.figures import Panel, save_panels, save_plots
from genfast.experiments.measures import are_digits, drawn, headings, of_samples, some_of
from genfast.flows import Dequantize
from genfast.models.base import evaluating
from genfast.models.flow import Flow
from genfast.models.flow_presets import FlowPreset
from genfast.random import derive_seed

_KINDS = ("none", "uniform", "variational")
# Of so many images there are several epochs to be drawn.
_IMAGES = 10_000
_FIT = {"batch_size": 64, "lr": 2e-3, "evaluate_every": 1}
_BATCH_SIZE = 256
# Where between two grey levels the density is looked at; its middle is what a flow without noise has seen.
_OFFSETS = tuple((index + 0.5) / 15 for index in range(15))
_MIDDLE = len(_OFFSETS) // 2
_DRAWS, _SHOWN = 16, 36
_UNIT = "bits per dimension"


def run(settings: Settings) -> Page:
    """Train a flow with each kind of noise, bound the likelihood of all of them alike, and write the pictures."""
    splits = some_of(settings.load(), _IMAGES)
    # The slowest says how many epochs there are.
    epochs, splits = equal_epochs(
        settings, "flow", splits=splits, seconds=settings.budget / len(_KINDS),
        build_options={"dequantization": "variational"}, **_FIT,
    )  # fmt: skip
    models: dict[str, Trained] = {}
    for kind in _KINDS:
        models[kind] = train_run(
            settings, "flow", kind, splits=splits, epochs=epochs, build_options={"dequantization": kind},
            title=f"RealNVP, dequantization {kind}, {splits.name}", **_FIT,
        )  # fmt: skip
    draws = settings.reduced(_DRAWS, least=2)
    rows = [_measured(settings, splits, kind, trained, draws) for kind, trained in models.items()]
    images = splits.test[: settings.reduced(200, least=20)]
    between = {kind: _between_levels(trained.model, images) for kind, trained in models.items()}
    _draw(settings, models, between)
    return _page(settings, splits, epochs, draws, rows, between)


def _measured(
    settings: Settings, splits: training.Splits, kind: str, trained: Trained, draws: int
) -> dict[str, Any]:
    print(f"measuring dequantization {kind}", flush=True)
    model, images = trained.model, splits.test[: settings.reduced(1000, least=50)]
    uniform = _nats(_with_uniform(model), images, settings.seed, draws)
    # Without noise of its own a flow has a bound by the simplest one alone.
    own = uniform if kind == "none" else _nats(model, images, settings.seed, draws)
    bound, tighter = _bits(own[:1], images), _bits(own, images)
    samples = drawn(model, settings.reduced(2500, least=50), settings.seed)
    return {
        "kind": kind,
        "trained": _bits(_nats(model, images, settings.seed, 1), images),
        "uniform": _bits(uniform[:1], images),
        "bound": bound,
        "tighter": tighter,
        "gap": Paired.of(bound.terms - tighter.terms, bound.images),
        **of_samples(samples, splits),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": trained.seconds,
    }


def _with_uniform(model: FlowPreset) -> FlowPreset:
    """The same density of real numbers, asked with uniform noise."""
    model = copy.deepcopy(model)
    model.transforms[0] = Dequantize()
    return model


def _nats(model: FlowPreset, images: Tensor, seed: int, draws: int) -> Tensor:
    """log p(x + u) - log q(u | x), fp64 [draws, N], each draw with noise of its own."""
    found = []
    with evaluating(model):
        for draw in range(draws):
            noise = derive_seed(training.evaluation_seed(seed), draw)
            pieces = images.to(model.device).split(_BATCH_SIZE)
            values = [model.log_prob(x, seed=noise, row_offset=i * _BATCH_SIZE) for i, x in enumerate(pieces)]
            found.append(torch.cat(values).double().cpu())
    return torch.stack(found)


def _bits(nats: Tensor, images: Tensor) -> Paired:
    """Bits per dimension of the importance-weighted bound from all draws; from one it is the usual bound."""
    log_prob = nats.logsumexp(0) - math.log(len(nats))
    return Paired.of(-log_prob / (math.log(2) * images[0].numel()), f"first {len(images)} of the test")


def _between_levels(model: FlowPreset, images: Tensor) -> list[Paired]:
    """-log2 of the density of x + u per dimension, at each u of `_OFFSETS`, the same for all pixels."""
    of_reals = Flow(model.transforms[1:], data_shape=model.image_shape)
    pixels = images.to(model.device).float()
    found = []
    with evaluating(of_reals):
        for offset in _OFFSETS:
            log_prob = of_reals.log_prob((pixels + offset) / 256).double() - math.log(256) * images[0].numel()
            found.append(_bits(log_prob.cpu().unsqueeze(0), images))
    return found


def _draw(settings: Settings, models: dict[str, Trained], between: dict[str, list[Paired]]) -> None:
    samples = {kind: drawn(each.model, _SHOWN, settings.seed) for kind, each in models.items()}
    save_panels(samples, settings.out / "samples.png", columns=6)

    def over_epochs(kinds: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
        return {
            f"{kind}, {split}": [(row["epoch"], row[key]) for row in models[kind].history if key in row]
            for kind in kinds
            for split, key in (("train", "bits_per_dim"), ("test", "test_bits_per_dim"))
        }

    levels = {kind: list(zip(_OFFSETS, values, strict=True)) for kind, values in between.items()}
    panels = [
        Panel("as trained", "epoch", _UNIT, over_epochs(_KINDS)),
        Panel("as trained, with noise", "epoch", _UNIT, over_epochs(_KINDS[1:])),
        Panel("density between the grey levels", "u", "-log2 p(x + u) per dimension", levels),
    ]
    save_plots(panels, settings.out / "curves.png")


def _page(
    settings: Settings, splits: training.Splits, epochs: int, draws: int, rows: list[dict[str, Any]],
    between: dict[str, list[Paired]],
) -> Page:  # fmt: skip
    page = Page(
        "Dequantization",
        "Pixels are integers, and a flow is a density of real numbers. What does a flow learn whose pixels get no "
        "noise, uniform noise, or learned (variational) noise below their grey level?",
    )
    by = {column: {row["kind"]: row[column] for row in rows} for column in rows[0]}
    trained, uniform, bound = by["trained"], by["uniform"], by["bound"]
    page.section("What was observed")
    negative = "; less than no bits at all, which no code of pixels can have" if trained["none"].high < 0 else ""
    page.say(
        f"Without noise the training ends at {number(trained['none'])} {_UNIT} of the test images{negative}. It is a "
        "density at the middles of the bins: of the same flow and the same images, a bound on the pixels' own "
        f"likelihood, with uniform noise, is {number(uniform['none'])}, "
        f"{_difference(uniform['none'], trained['none'])}."
    )
    for kind in _KINDS:
        values = between[kind]
        edge = max(values[0], values[-1], key=lambda value: value.value)
        page.say(
            f"Dequantization {kind}, -log2 of the density per dimension: "
            f"{versus('at the middle of the bins', values[_MIDDLE], 'at their edge', edge)}."
        )
    page.say(f"As a bound on the likelihood of the pixels the best is dequantization {best(bound, 'lower', _UNIT)}.")
    page.say(
        f"{draws} draws in place of one tighten the bound by {number(by['gap']['uniform'])} {_UNIT} with uniform and "
        f"by {number(by['gap']['variational'])} with variational noise"
        + (
            ", which are not told apart."
            if not apart(by["gap"]["uniform"], by["gap"]["variational"])
            else f": {'variational' if _least(by['gap']) == 'variational' else 'uniform'} noise leaves less to gain."
        )
    )
    if by["frechet_distance"]["none"] is not None:
        nearest = best(by["frechet_distance"], "lower")
        page.say(f"The samples are nearest to the test images, by the Fréchet distance, with dequantization {nearest}.")
    page.section("Pictures")
    page.picture(
        settings.out / "curves.png",
        "Training and test over the epochs, each with its own noise; and the density of the test images moved within "
        "their grey levels, all pixels alike.",
    )
    page.picture(settings.out / "samples.png", "Samples of the same draws from N(0, I).")
    page.section("Numbers")
    shown = {
        "kind": "dequantization", "trained": "as trained", "uniform": "with uniform noise", "bound": "bound, 1 draw",
        "tighter": f"bound, {draws} draws", "gap": "gained by the draws",
    }  # fmt: skip
    if by["frechet_distance"]["none"] is not None:
        shown |= headings("frechet_distance", digits=are_digits(splits))
    if by["coverage"]["none"] is not None:
        shown |= headings("coverage", "confidence")
    page.table(
        rows,
        f"Three flows (RealNVP, \"tiny\"), each {epochs} epoch{'' if epochs == 1 else 's'} of {len(splits.train):,} "
        f"images of {splits.train.shape[2]} x {splits.train.shape[3]}. The first columns of numbers are {_UNIT}.",
        {**shown, **headings("parameters", "seconds")},
    )
    page.text(
        "Of one draw of noise u, log p(x + u) - log q(u | x) is on average at most log P(x), the likelihood of the "
        "pixels (Theis et al., 2016; Ho et al., 2019); so is the logarithm of the mean ratio of several draws, which "
        "is larger (Burda et al., 2016). \"As trained\" is one draw with the noise of the training; without noise it "
        "is u = 1/2, of which no bound follows, and the bound of that flow is with uniform noise. Differences are "
        "taken image by image."
    )
    return page


def _difference(a: Paired, b: Paired) -> str:
    gap = Paired.of(a.terms - b.terms, a.images)
    more = "more" if gap.low > 0 else "less" if gap.high < 0 else "more, which is not told from none"
    return f"{number(gap)} {more}"


def _least(values: dict[str, Paired]) -> str:
    return min(("uniform", "variational"), key=lambda kind: values[kind].value)
