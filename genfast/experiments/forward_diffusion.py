"""The way into noise: in one step or in many, and along each schedule. Nothing is trained."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from genfast import report, schedules
from genfast._files import replacing
from genfast.experiments.base import Page, Settings, best
from genfast.experiments.figures import save_panels
from genfast.functional import q_sample
from genfast.metrics import Estimate
from genfast.random import derive_seed
from genfast.schedules import DiscreteSchedule, Schedule

# Of these all steps are taken.
_STEPPED = ("linear", "cosine")
_TIMES = (0, 9, 99, 249, 499, 749, 999)
_CHAINS, _AT_ONCE = 1024, 256
# Rows of the pictures; columns and frames of the video.
_DIGITS, _IN_VIDEO, _FRAMES = 4, 2, 26
_SHOWN = 10
# What the two ways are compared in: attribute, name, and its value by theory at (a, b).
_QUANTITIES = (
    ("coefficient", "coefficient of the image", lambda a, b: a),
    ("variance", "variance of the noise", lambda a, b: b * b),
    ("kurtosis", "fourth moment of the noise over its variance squared", lambda a, b: 3.0),
)
# What chance alone exceeds in so many of all cases; an interval of 95% in standard errors.
_LEVEL, _HALF = 0.05, NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class _Measured:
    """x_t at one time: what each image's share and the rest are, over many draws."""

    coefficient: Estimate
    variance: Estimate
    kurtosis: Estimate


def run(settings: Settings) -> Page:
    """Take both ways along two schedules, look at all of them, and write the pictures."""
    splits = settings.load()
    chains = settings.reduced(_CHAINS, least=32)
    images = splits.test[torch.arange(chains) % len(splits.test)].to(settings.device)
    ways: dict[str, dict[str, dict[int, _Measured]]] = {}
    for name in _STEPPED:
        print(f"{name}: {chains:,} images through {max(_TIMES) + 1:,} steps", flush=True)
        schedule = schedules.get(name).to(settings.device)
        ways[name] = {"one": _in_one_step(schedule, images, settings), "many": _in_many(schedule, images, settings)}
    speeds = _speeds(settings, images)
    rows = [_described(name, splits.test, settings) for name in schedules.NAMES]
    _draw(settings, splits.test, ways)
    return _page(settings, chains, ways, speeds, rows)


def _in_one_step(schedule: DiscreteSchedule, images: Tensor, settings: Settings) -> dict[int, _Measured]:
    measured = {}
    for t in _TIMES:
        pieces = []
        for start in range(0, len(images), _AT_ONCE):
            x0 = images[start : start + _AT_ONCE]
            # A seed for each number, or all of them would have the same noise.
            seed = derive_seed(settings.seed, _STEPPED.index(schedule.config["name"]) * schedule.num_steps + t)
            pieces.append(_moments(q_sample(x0, t, schedule, seed=seed, row_offset=start).x_t, x0, schedule, t))
        measured[t] = _estimates(pieces)
    return measured


def _in_many(schedule: DiscreteSchedule, images: Tensor, settings: Settings) -> dict[int, _Measured]:
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    pieces: dict[int, list[Tensor]] = {t: [] for t in _TIMES}
    for x0 in images.split(_AT_ONCE):
        for t, x in enumerate(_steps(schedule, _scaled(x0), max(_TIMES) + 1, generator)):
            if t in pieces:
                pieces[t].append(_moments(x, x0, schedule, t))
    return {t: _estimates(found) for t, found in pieces.items()}


def _steps(schedule: DiscreteSchedule, x: Tensor, steps: int, generator: torch.Generator):
    """x_0, x_1, ...: each from the one before it by q(x_t | x_t-1), the definition; the tensor is used again."""
    x = x.clone()
    noise = torch.empty_like(x)
    for beta in schedule.betas_fp64[:steps].tolist():
        noise.normal_(generator=generator)
        yield x.mul_(math.sqrt(1 - beta)).add_(noise, alpha=math.sqrt(beta))


def _scaled(images: Tensor) -> Tensor:
    return 2 * images.float() / 255 - 1


def _moments(x: Tensor, images: Tensor, schedule: DiscreteSchedule, t: int) -> Tensor:
    """Of each image [B, 3]: its coefficient in x, and the variance and the relative fourth moment of the rest."""
    x, x0 = x.double().flatten(1), _scaled(images).double().flatten(1)
    a, b = _exact(schedule, t)
    rest = (x - a * x0).square()
    coefficient = (x * x0).sum(1) / x0.square().sum(1)
    return torch.stack([coefficient, rest.mean(1), rest.square().mean(1) / b**4], 1)


def _exact(schedule: DiscreteSchedule, t: int) -> tuple[float, float]:
    alpha_bar = float(schedule.alpha_bar_fp64[t])
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def _estimates(pieces: list[Tensor]) -> _Measured:
    return _Measured(*(_mean(values) for values in torch.cat(pieces).unbind(1)))


def _mean(values: Tensor) -> Estimate:
    """With the interval of the central limit theorem, from which a standard error can be had again."""
    middle, half = float(values.mean()), _HALF * float(values.std()) / math.sqrt(len(values))
    return Estimate(middle, middle - half, middle + half, len(values))


def _error(value: Estimate) -> float:
    return (value.high - value.low) / (2 * _HALF)


def _speeds(settings: Settings, images: Tensor) -> dict[str, float]:
    """Milliseconds for x_t of a batch at the last time, both ways."""
    schedule = schedules.get("linear").to(settings.device)
    x0, last = images[:_AT_ONCE], max(_TIMES)
    generator = torch.Generator(settings.device).manual_seed(settings.seed)

    def clock(way: Any, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            # The sum waits for a device that works on its own.
            float(way().sum())
            times.append(1000 * (time.perf_counter() - started))
        return min(times)

    def stepwise() -> Tensor:
        *_, x = _steps(schedule, _scaled(x0), last + 1, generator)
        return x

    return {"one": clock(lambda: q_sample(x0, last, schedule, seed=0).x_t, 5), "many": clock(stepwise, 1)}


def _described(name: str, images: Tensor, settings: Settings) -> dict[str, Any]:
    """What a schedule does to the images along its way."""
    schedule = schedules.get(name)
    times = _times(schedule, 1000)
    snr = schedule.snr(times).double()
    at = [float(snr[round(share * (len(snr) - 1))]) for share in (0.25, 0.5, 0.75, 1.0)]
    few = _scaled(images[: settings.reduced(1000, least=50)]).double().flatten(1)
    return {
        "schedule": name.replace("_", " "),
        "kind": "continuous" if schedule.continuous else f"{schedule.num_steps:,} steps",
        "quarter": _decibels(at[0]), "half": _decibels(at[1]), "three": _decibels(at[2]), "end": _decibels(at[3]),
        "above": float((snr > 1).double().mean()),
        "left": float(_left(schedule, times[-1:], few).mean()),
    }  # fmt: skip


def _times(schedule: Schedule, count: int) -> Tensor:
    """Evenly along the way of its samplers, from the image to the noise; the clean image is left out."""
    steps = count if schedule.num_steps is None else min(count, schedule.num_steps)
    return schedule.timesteps(steps)[:-1].flip(0)


def _decibels(snr: float) -> float:
    return 10 * math.log10(snr) if snr > 0 else -math.inf


def _left(schedule: Schedule, last: Tensor, x0: Tensor) -> Tensor:
    """KL(q(x_T | x0) || prior) of each image, bits per dimension: what the noisy end still tells of it."""
    a, b = (float(value) for value in schedule.coefficients(last))
    if schedule.continuous:
        nats = 0.5 * (a / b * x0).square()
    else:
        # b^2 - 1 = -a^2 in a schedule that keeps the variance.
        nats = 0.5 * (a * a * x0.square() - a * a - math.log1p(-a * a))
    return nats.mean(1) / math.log(2)


def _draw(settings: Settings, images: Tensor, ways: dict[str, dict[str, dict[int, _Measured]]]) -> None:
    out = settings.out
    few = images[:_DIGITS]
    generator = torch.Generator().manual_seed(settings.seed)
    linear = schedules.get("linear")
    one = [q_sample(few, t, linear, seed=derive_seed(settings.seed, t)).x_t for t in _TIMES]
    many = [x.clone() for t, x in enumerate(_steps(linear, _scaled(few), max(_TIMES) + 1, generator)) if t in _TIMES]
    headings = {"in one step": one, "step by step": many}
    label = ", ".join(map(str, _TIMES))
    grids = {f"{heading}, at t = {label}": _rows(frames) for heading, frames in headings.items()}
    save_panels(grids, out / "two-ways.png", columns=len(_TIMES), across=1, scale=2)

    along = {}
    for name in schedules.NAMES:
        schedule = schedules.get(name)
        times = report.thin(_times(schedule, 1000), _SHOWN)
        frames = [_viewed(q_sample(images[:1], t, schedule, seed=settings.seed).x_t, schedule, t) for t in times]
        along[name.replace("_", " ")] = torch.cat(frames)
    save_panels(along, out / "schedules.png", columns=_SHOWN, across=1, scale=2)
    _save_curves(ways, out / "curves.png")

    # One path of each image along each of the two schedules.
    paths = []
    for name in _STEPPED:
        start = _scaled(images[:_IN_VIDEO])
        frames = [start, *(x.clone() for x in _steps(schedules.get(name), start, max(_TIMES) + 1, generator))]
        paths.append(report.thin(torch.stack(frames), _FRAMES))
    frames = (torch.cat(paths, 1) + 1) / 2
    report.save_video(frames, out / "forward.mp4", fps=8, columns=_IN_VIDEO)


def _rows(frames: list[Tensor]) -> Tensor:
    """Frames [B, C, H, W] as a row of the grid for each image."""
    return (torch.stack(frames, 1).flatten(0, 1) + 1) / 2


def _viewed(x: Tensor, schedule: Schedule, t: Tensor) -> Tensor:
    """In [0, 1]; where the noise is larger than the image, scaled down to be seen."""
    a, b = schedule.coefficients(t.reshape(1))
    return x / (a * a + b * b).sqrt().clamp(min=1) / 2 + 0.5


def _save_curves(ways: dict[str, dict[str, dict[int, _Measured]]], path: Path) -> None:
    """Coefficient and variance, measured and by theory; below, how the schedules divide their way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.8, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    (left, right), (snr, kept) = figure.subplots(2, 2)
    for axes, (attribute, title, theory) in zip((left, right), _QUANTITIES, strict=False):
        for colour, (name, both) in zip(("C0", "C1"), ways.items(), strict=False):
            schedule = schedules.get(name)
            curve = [theory(*_exact(schedule, t)) for t in range(max(_TIMES) + 1)]
            axes.plot(curve, color=colour, linewidth=1, label=f"{name}, by theory")
            for way, words, marker in (("one", "in one step", "o"), ("many", "step by step", "x")):
                values = [getattr(both[way][t], attribute).value for t in _TIMES]
                style = {"marker": marker, "linestyle": "", "markerfacecolor": "none", "color": colour}
                axes.plot(_TIMES, values, label=f"{name}, {words}", **style)
        axes.set(title=title, xlabel="t")
    for name in schedules.NAMES:
        schedule = schedules.get(name)
        times = _times(schedule, 200)
        place = torch.arange(1, len(times) + 1) / len(times)
        a, b = schedule.coefficients(times)
        decibels = [_decibels(float(value)) for value in schedule.snr(times)]
        snr.plot(place, decibels, label=name.replace("_", " "))
        kept.plot(place, a * a / (a * a + b * b), label=name.replace("_", " "))
    snr.set(title="signal-to-noise ratio, dB", xlabel="share of the way", ylim=(-60, 60))
    kept.set(title="share of the image in the variance", xlabel="share of the way")
    for axes in (left, right, snr, kept):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")


def _page(
    settings: Settings, chains: int, ways: dict[str, dict[str, dict[int, _Measured]]], speeds: dict[str, float],
    rows: list[dict[str, Any]],
) -> Page:  # fmt: skip
    page = Page(
        "Noise in one step or in many",
        "The forward process is defined step by step, x_t = sqrt(1 - beta) x_t-1 + sqrt(beta) eps, and used in closed "
        "form, x_t = a x_0 + b eps. Do both give the same distribution? And where do the schedules put the noise?",
    )
    page.section("What was observed")
    _say_of_ways(page, chains, ways)
    faster = speeds["many"] / speeds["one"]
    page.say(
        f"x_999 of {min(_AT_ONCE, chains)} images took {speeds['one']:.1f} ms in one step and {speeds['many']:,.0f} ms "
        f"in a thousand: {faster:,.0f} times as long."
    )
    _say_of_schedules(page, rows)
    page.section("Pictures")
    page.picture(settings.out / "forward.mp4", "Video: step by step into noise, above linear, below cosine.")
    page.picture(settings.out / "two-ways.png", "The same images both ways (linear), each with its own noise.")
    page.picture(
        settings.out / "curves.png",
        "Coefficient and variance at each time, measured and by theory; the signal-to-noise ratio of all schedules.",
    )
    page.picture(
        settings.out / "schedules.png",
        "One image with one noise along each schedule, at ten times evenly along the way of its samplers; scaled down "
        "where the noise is larger than the image.",
    )
    page.section("Numbers")
    table = []
    for name, both in ways.items():
        schedule = schedules.get(name)
        for t in _TIMES:
            row: dict[str, Any] = {"schedule": name, "t": t}
            for attribute, _, theory in _QUANTITIES:
                row[attribute] = theory(*_exact(schedule, t))
                row |= {f"{attribute}_{way}": getattr(both[way][t], attribute) for way in ("one", "many")}
            table.append(row)
    titles = {"coefficient": "a", "variance": "b^2", "kurtosis": "E eps^4"}
    columns = {"schedule": "schedule", "t": "t"}
    for attribute, title in titles.items():
        ways_of = {"": title, "_one": f"{title}, one step", "_many": f"{title}, stepwise"}
        columns |= {attribute + way: heading for way, heading in ways_of.items()}
    page.table(table, f"Both ways, {chains:,} test images each; the first of three is the value by theory.", columns)
    page.table(
        rows,
        "The schedules. dB: signal-to-noise ratio at shares of the way. The last column: what the noisy end still "
        "tells of an image, KL(q(x_T | x_0) || prior); samplers begin without it.",
        {
            "schedule": "schedule", "kind": "kind", "quarter": "dB at 1/4", "half": "dB at 1/2", "three": "dB at 3/4",
            "end": "dB at the end", "above": "share above 0 dB", "left": "left at the end, bits per dimension",
        },
        name="schedules",
    )  # fmt: skip
    page.text(
        "Of each image the coefficient is that of the projection of x_t on x_0; the noise is x_t - a x_0 with the a of "
        "the theory. Pixels are scaled to [-1, 1]. Step by step in fp32, with torch's generator; in one step with "
        "`genfast.functional.q_sample`."
    )
    return page


def _say_of_ways(page: Page, chains: int, ways: dict[str, dict[str, dict[int, _Measured]]]) -> None:
    """How far the measured numbers are from the theory and from each other, in standard errors."""
    scores: dict[str, list[tuple[float, str]]] = {"one": [], "many": [], "both": []}
    for name, both in ways.items():
        schedule = schedules.get(name)
        for t in _TIMES:
            for attribute, title, theory in _QUANTITIES:
                exact = theory(*_exact(schedule, t))
                found = {way: getattr(both[way][t], attribute) for way in ("one", "many")}
                where = f"{title}, {name}, t = {t}"
                for way, value in found.items():
                    scores[way].append((abs(value.value - exact) / _error(value), where))
                spread = math.hypot(*map(_error, found.values()))
                scores["both"].append((abs(found["one"].value - found["many"].value) / spread, where))
    titles = {"one": "In one step", "many": "Step by step", "both": "Between the two ways"}
    for way, found in scores.items():
        largest, where = max(found)
        # Of so many independent standard normal numbers the largest exceeds this in 5% of all cases.
        limit = NormalDist().inv_cdf(1 - _LEVEL / (2 * len(found)))
        agrees = "no difference" if largest <= limit else "a difference"
        against = "from each other" if way == "both" else "from the theory"
        page.say(
            f"{titles[way]}: {len(found)} numbers (coefficient, variance, fourth moment) of {chains:,} images are at "
            f"most {largest:.2f} standard errors {against} ({where}); chance alone exceeds {limit:.2f} in 5% of cases: "
            f"{agrees} beyond chance."
        )


def _say_of_schedules(page: Page, rows: list[dict[str, Any]]) -> None:
    left = {row["schedule"]: row["left"] for row in rows}
    *_, second, most = sorted(left, key=left.get)
    page.say(
        f"At the end most of the image is left by {most}, {left[most]:.2g} bits per dimension, then by {second}, "
        f"{left[second]:.2g}; least by {min(left, key=left.get)}, {min(left.values()):.2g}."
    )
    above = {row["schedule"]: row["above"] for row in rows}
    page.say(
        "The share of the way in which the image outweighs the noise is largest with "
        f"{best(above, 'higher')}, smallest with {best(above, 'lower')}."
    )
