"""GANs that differ in their loss and its penalty: what both networks, and the samples, do over time."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from genfast import report, training
from genfast._files import replacing
from genfast.experiments.base import Page, Settings, Trained, best, number, train_run
from genfast.experiments.figures import save_panels
from genfast.experiments.measures import are_digits, drawn, headings, of_samples, some_of
from genfast.metrics import class_shares
from genfast.models import GAN

_VARIANTS: dict[str, dict[str, Any]] = {
    "non-saturating": {"loss": "non_saturating"},
    "non-saturating without batch norm": {"loss": "non_saturating", "batch_norm": False},
    "non-saturating with R1": {"loss": "non_saturating", "r1": 1.0},
    "minimax": {"loss": "minimax"},
    "WGAN-GP": {"loss": "wgan-gp"},
}
# Of so many images an epoch is short, and its means follow what happens.
_IMAGES = 10_000
# Of the same codes after each epoch; the first of them are shown.
_COUNTED, _SHOWN, _IN_VIDEO = 400, 8, 10
_TIMES, _FRAMES, _GRID = 8, 40, 36
_ENOUGH = 0.04
# In what they differ, and how the page calls it.
_SETUP = {
    "loss": "loss", "penalty": "penalty", "batch_norm": "batch norm of D", "n_critic": "steps of D for one of G",
    "betas": "betas of Adam",
}  # fmt: skip


def run(settings: Settings) -> Page:
    """Train each GAN, look at all of them after each epoch, and write the pictures and a video."""
    splits = some_of(settings.load(), _IMAGES)
    counted = settings.reduced(_COUNTED, least=50)

    def look(model: GAN) -> dict[str, Tensor]:
        samples = drawn(model, counted, settings.seed)
        shares = class_shares(samples) if are_digits(splits) else torch.zeros(0)
        return {"samples": samples[: max(_SHOWN, _IN_VIDEO)], "shares": shares.double()}

    models: dict[str, Trained] = {}
    for name, options in _VARIANTS.items():
        models[name] = train_run(
            settings, "gan", name.replace(" ", "-").lower(), splits=splits, build_options=options, snapshot=look,
            seconds=settings.budget / len(_VARIANTS), title=f"GAN, {name}, {splits.name}",
        )  # fmt: skip
    rows = [_measured(settings, splits, name, trained) for name, trained in models.items()]
    _draw(settings, splits, models)
    return _page(settings, splits, models, rows, counted)


def _measured(settings: Settings, splits: training.Splits, name: str, trained: Trained) -> dict[str, Any]:
    print(f"measuring {name}", flush=True)
    last = trained.history[-1]
    samples = drawn(trained.model, settings.reduced(10_000, least=50), settings.seed)
    missing = None
    if are_digits(splits):
        missing = [digit for digit, share in enumerate(class_shares(samples).tolist()) if share < _ENOUGH]
    return {
        "name": name,
        **_setup(trained.model),
        "epochs": trained.epochs,
        "steps": _steps(trained, trained.epochs),
        "d_real": last["d_real"],
        "d_fake": last["d_fake"],
        "diversity": last["diversity"],
        "covered": last["covered"],
        "judged": len(_judged(trained)),
        "warned": sum("warning" in row for row in trained.history),
        "missing": missing,
        **of_samples(samples, splits),
        "seconds": trained.seconds,
    }


def _setup(model: GAN) -> dict[str, Any]:
    penalty = f"R1, weight {model.r1:g}" if model.r1 else "none"
    return {
        "loss": model.objective.replace("_", "-"),
        "penalty": f"gradient penalty, weight {model.penalty:g}" if model.objective == "wgan-gp" else penalty,
        "batch_norm": "yes" if any(isinstance(each, _BatchNorm) for each in model.discriminator.modules()) else "no",
        "n_critic": model.n_critic,
        "betas": "{:g}, {:g}".format(*model.make_optimizer().defaults["betas"]),
    }


def _steps(trained: Trained, epoch: float) -> int:
    """Taken until then: a last batch that is not full is left out."""
    return round(epoch * (trained.settings["train_images"] // trained.settings["batch_size"]))


def _judged(trained: Trained) -> list[dict[str, Any]]:
    """The epochs after which `GAN.diagnose` would have told of a collapse: before them it is too early to."""
    alike, history = {"diversity": 0.0}, trained.history
    return [row for row in history if trained.model.diagnose(alike, _steps(trained, row["epoch"])) is not None]


def _draw(settings: Settings, splits: training.Splits, models: dict[str, Trained]) -> None:
    out = settings.out
    grids = {"test images": splits.test[:_GRID]}
    grids |= {name: drawn(trained.model, _GRID, settings.seed) for name, trained in models.items()}
    save_panels(grids, out / "samples.png", columns=6, across=3)
    seen = {name: torch.stack([tensors["samples"] for _, tensors in each.snapshots]) for name, each in models.items()}
    # All as long as the shortest: time runs alike in each of them.
    shortest = min(map(len, seen.values()))
    times, over_time = min(_TIMES, shortest), {}
    for name, trained in models.items():
        some = report.thin(seen[name][:, :_SHOWN], times)
        over_time[f"{name}: epochs 0 to {trained.epochs:g}"] = some.transpose(0, 1).flatten(0, 1)
    save_panels(over_time, out / "over-time.png", columns=times, across=2)
    paths = [report.thin(each[:, :_IN_VIDEO], min(_FRAMES, shortest)) for each in seen.values()]
    report.save_video(torch.cat(paths, 1), out / "training.mp4", fps=6, columns=_IN_VIDEO)
    _save_curves(models, len(splits.train), out / "curves.png")


def _save_curves(models: dict[str, Trained], images: int, path: Path) -> None:
    """A row for each GAN: the losses, what D says, how various the samples are, and which digits they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(12.5, 2.4 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(models), 4, squeeze=False)
    for (losses, said, various, digits), (name, trained) in zip(grid, models.items(), strict=True):

        def over(axes: Any, key: str, label: str, trained: Trained = trained) -> None:
            points = [(row["epoch"] * images, row[key]) for row in trained.history if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), ".-", label=label)

        over(losses, "d_loss", "D")
        over(losses, "g_loss", "G")
        over(said, "d_real", "D(x)")
        over(said, "d_fake", "D(G(z))")
        over(various, "diversity", "of a batch, real: 1")
        over(various, "covered", "real images covered")
        times = [epoch * images for epoch, _ in trained.snapshots]
        shares = torch.stack([tensors["shares"] for _, tensors in trained.snapshots])
        if shares.shape[1]:
            entropy = torch.special.entr(shares).sum(1) / math.log(shares.shape[1])
            various.plot(times, entropy, ".-", label="entropy of the digits, equal shares: 1")
            digits.stackplot(times, *shares.T, labels=range(shares.shape[1]))
        if trained.model.objective in ("non_saturating", "minimax"):
            said.axhline(0.5, color="black", linewidth=0.8, linestyle="--")
            said.set_ylim(-0.03, 1.03)
        various.set_ylim(bottom=0)
        losses.set_ylabel(name, fontsize=8)
        for axes in (losses, said, various):
            axes.legend(fontsize=7)
            axes.grid(alpha=0.3)
        for axes in (losses, said, various, digits):
            axes.tick_params(labelsize=7)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes, title in zip(grid[0], ("losses", "what D says", "diversity", "shares of the digits"), strict=True):
        axes.set_title(title)
    for axes in grid[-1]:
        axes.set_xlabel("images seen")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=80, format="png")


def _page(
    settings: Settings, splits: training.Splits, models: dict[str, Trained], rows: list[dict[str, Any]], counted: int
) -> Page:
    page = Page(
        "What GANs do while they train",
        "The same generator, images and time, and losses and penalties that differ, with what belongs to them. How do "
        "the two networks fare, which digits are drawn when, and which of the trainings collapse?",
    )
    by = {column: {row["name"]: row[column] for row in rows} for column in rows[0]}
    page.section("What differs")
    page.table(rows, "The GANs.", {"name": "GAN", **_SETUP}, name="gans")
    page.text(_alone(rows))
    page.section("What was observed")
    for row in rows:
        page.say(f"{row['name']}: {_fate(models[row['name']], row['missing'])}")
    fair = [name for name, trained in models.items() if trained.model.objective in ("non_saturating", "minimax")]
    said = {name: (models[name].history[0], models[name].history[-1]) for name in fair}
    listed = "; ".join(
        f"{name} {first['d_real']:.2f} and {first['d_fake']:.2f}, then {last['d_real']:.2f} and {last['d_fake']:.2f}"
        for name, (first, last) in said.items()
    )
    page.say(f"D(x) and D(G(z)), 1/2 where D cannot tell, in the first and in the last epoch: {listed}.")
    page.say(
        f"In the last epoch the images of a batch are most various with {best(by['diversity'], 'higher')}; most of the "
        f"real images are covered with {best(by['covered'], 'higher')}."
    )
    if by["frechet_distance"][rows[0]["name"]] is not None:
        nearest = best(by["frechet_distance"], "lower")
        page.say(f"The samples of the averaged generator are nearest to the test images with {nearest}.")
    if by["coverage"][rows[0]["name"]] is not None:
        _say_of_digits(page, models, by, len(splits.train), counted)
    page.section("Pictures")
    page.picture(
        settings.out / "curves.png",
        "Of each GAN, over the images seen: the losses, the means of what D says (of WGAN-GP its critic, without a "
        "bound), the diversity, and the shares of the digits 0 (below) to 9 among the samples.",
    )
    page.picture(settings.out / "over-time.png", "The images of eight codes over time, from left to right.")
    page.picture(settings.out / "training.mp4", "Video: the images of ten codes after each epoch, a row for each GAN.")
    page.picture(settings.out / "samples.png", "Samples at the end, of the averaged generators.")
    page.section("Numbers")
    shown = {
        "name": "GAN", "epochs": "epochs", "steps": "steps", "d_real": "D(x)", "d_fake": "D(G(z))",
        "diversity": "diversity", "covered": "covered", "judged": "epochs judged", "warned": "epochs with a warning",
    }  # fmt: skip
    known = [name for name in ("frechet_distance", "precision", "recall", "coverage") if rows[0][name] is not None]
    page.table(
        rows,
        f'GANs of the preset "dcgan", trained on {len(splits.train):,} images of {splits.name}. D(x), D(G(z)), '
        "diversity and covered are means over the last epoch.",
        {**shown, **headings(*known, "seconds", digits=are_digits(splits))},
    )
    page.text(
        "Diversity is the distance of an image to the nearest other one of its batch, relative to that of real images. "
        "Covered is the share of 64 real images with one of 64 generated ones no farther away than their third nearest "
        "real one, 0.88 where both are of one distribution. Warnings are those of `GAN.diagnose`, which `genfast.fit` "
        "shows after each epoch; it judges none before the first thousand steps. The shares over time are of "
        f"{counted} samples of the generator as it is; the numbers above of its average. A digit is covered if it is "
        "found in 4% of the samples or more."
    )
    return page


def _alone(rows: list[dict[str, Any]]) -> str:
    """Which two of them show what one setting does; every other comparison is of several at once."""
    pairs, alone = [], set()
    for a, b in combinations(rows, 2):
        different = [name for name in _SETUP if a[name] != b[name]]
        if len(different) == 1:
            pairs.append(f"{_SETUP[different[0]]} ({a['name']}; {b['name']})")
            alone |= {a["name"], b["name"]}
    others = [row["name"] for row in rows if row["name"] not in alone]
    text = f"One setting alone differs between two of them: {', '.join(pairs)}." if pairs else ""
    if others:
        text += f" From every other one {' and '.join(others)} differs in several at once, so what one of them does "
        text += "is not to be seen there."
    return text.strip() + " All times are equal, so GANs whose steps take longer take fewer."


def _fate(trained: Trained, missing: list[int] | None) -> str:
    """Whether it collapsed, by the warnings of its training, and which digits its samples lack."""
    history, judged = trained.history, len(_judged(trained))
    warned = [row for row in history if "warning" in row]
    if warned:
        first, last = warned[0], warned[-1]
        ended = "the last epoch is one of them" if last is history[-1] else f"the last of them is {last['epoch']:g}"
        fate = (
            f"a warning in {len(warned)} of {judged} judged epochs, first in epoch {first['epoch']:g}, "
            f"{first['warning']!r}; {ended}"
        )
    elif judged:
        fate = f"no warning of a collapse in the {judged} of {len(history)} epochs that were judged"
    else:
        fate = f"too short to judge whether it collapsed: {_steps(trained, trained.epochs):,} steps"
    if missing is None:
        return f"{fate}."
    return f"{fate}; digits in less than 4% of its samples at the end: {', '.join(map(str, missing)) or 'none'}."


def _say_of_digits(
    page: Page, models: dict[str, Trained], by: dict[str, dict[str, Any]], images: int, counted: int
) -> None:
    covered = {name: value.value for name, value in by["coverage"].items()}
    listed = ", ".join(f"{name} {number(value)}" for name, value in by["coverage"].items())
    whole = [name for name, value in covered.items() if value == 10]
    page.say(
        f"Digits that make up 4% of the samples or more at the end: {listed}. "
        f"All ten: {', '.join(whole) if whole else 'with none of them'}."
    )
    firsts = []
    for name, trained in models.items():
        found = (epoch for epoch, tensors in trained.snapshots if bool((tensors["shares"] >= _ENOUGH).all()))
        epoch = next(found, None)
        firsts.append(f"{name} " + ("never" if epoch is None else f"after {round(epoch * images):,} images"))
    page.say(f"All ten among {counted} samples of the generator itself for the first time: {'; '.join(firsts)}.")
