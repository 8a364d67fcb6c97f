"""A number that was measured on a sample: its value, its interval, and the size of the sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

__all__ = ["Estimate"]

RESAMPLES = 200
_LEVEL = 0.95
# Numbers drawn at a time: bounds the memory.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A measured number.

    Attributes:
        value: what was measured.
        low, high: the ends of a 95% interval: what other samples of the same size would give, by a bootstrap, or of
            a share of the items by Wilson's formula (of the rarest class's the upper end); NaN where there is none.
        n: sample size: how many images, codes or repetitions; 0 where that means nothing.

    Example:
        >>> str(Estimate(12.3456, 11.93, 12.81, n=1000)), str(Estimate(7))
        ('12.3 [11.9, 12.8]', '7')
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0

    def __str__(self) -> str:
        if math.isnan(self.low):
            return _plain(self.value)
        numbers, width = (self.value, self.low, self.high), self.high - self.low
        if width == 0 or all(number == round(number) for number in numbers):
            value, low, high = map(_plain, numbers)
        else:
            # One or two digits of the width.
            decimals = max(0, math.ceil(-math.log10(width / 3)))
            value, low, high = (f"{number:.{decimals}f}" for number in numbers)
        return f"{value} [{low}, {high}]"

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: None stands for a missing interval.

        Example:
            >>> Estimate(0.5, n=10).to_dict()
            {'value': 0.5, 'low': None, 'high': None, 'n': 10}
        """
        low, high = (None if math.isnan(number) else number for number in (self.low, self.high))
        return {"value": self.value, "low": low, "high": high, "n": self.n}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Estimate:
        """The estimate that `to_dict` wrote.

        Example:
            >>> Estimate.from_dict(Estimate(0.5, 0.4, 0.6, n=10).to_dict())
            Estimate(value=0.5, low=0.4, high=0.6, n=10)
        """
        low, high = (math.nan if fields[name] is None else fields[name] for name in ("low", "high"))
        return cls(fields["value"], low, high, fields["n"])


def _plain(number: float) -> str:
    if not math.isfinite(number):
        return str(number)
    return f"{number:.0f}" if number == round(number) or abs(number) >= 1e4 else f"{number:.4g}"


def own_generator(seed: int = 0) -> torch.Generator:
    """Of every bootstrap: the same numbers give the same interval, and torch's own generator is left alone."""
    return torch.Generator().manual_seed(seed)


def resampled_rows(n: int, generator: torch.Generator, resamples: int = RESAMPLES) -> Iterator[Tensor]:
    """Rows 0 to n - 1 drawn with replacement: int64 [R, n], for `resamples` in all."""
    at_once = max(1, _CHUNK // n)
    for start in range(0, resamples, at_once):
        yield torch.randint(n, (min(at_once, resamples - start), n), generator=generator)


def of_mean(values: Tensor, low: float = -math.inf, high: float = math.inf) -> Estimate:
    """The mean of one number for each item; the interval stays within [low, high]."""
    values = values.detach().double().cpu()
    means = torch.cat([values[rows].mean(1) for rows in resampled_rows(len(values), own_generator())])
    return of_resamples(float(values.mean()), means, len(values), low, high)


def of_share(hits: Tensor) -> Estimate:
    """The share of the items that are True: bool [N].

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927: resamples of items
    that are all alike are all alike too, though one more item might have been another.
    """
    return of_known_share(float(hits.double().mean()), len(hits))


def of_known_share(share: float, n: int, among: int = 1) -> Estimate:
    """As `of_share`, of a share of n items; the ends hold for each of `among` shares, so for the smallest of them."""
    if n < 2:
        return Estimate(share, n=n)
    quantile = NormalDist().inv_cdf(1 - (1 - _LEVEL) / 2 / among)
    extra = quantile**2 / n
    middle = (share + extra / 2) / (1 + extra)
    half = math.sqrt(extra * (share * (1 - share) + extra / 4)) / (1 + extra)
    # At 0 and 1 one end is the share itself, but for rounding.
    return Estimate(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)), n)


def of_ratio(above: Tensor, below: Tensor) -> Estimate:
    """The mean of one set of non-negative numbers over that of another; both are resampled."""
    above, below = above.detach().double().cpu(), below.detach().double().cpu()
    generator = own_generator()
    means = [
        torch.cat([values[rows].mean(1) for rows in resampled_rows(len(values), generator)])
        for values in (above, below)
    ]
    return of_resamples(float(above.mean() / below.mean()), means[0] / means[1], len(above), 0.0)


def of_shares(
    shares: Tensor, n: int, statistic: Callable[[Tensor], Tensor], *, high: float, centred: bool = True
) -> Estimate:
    """A statistic of the shares [K] of the classes among n items; `statistic` takes [..., K]."""
    # Half an item more of each class: of one that never appeared, plain resamples would have none either.
    weights = shares + 0.5 / n
    drawn = torch.multinomial(weights, RESAMPLES * n, replacement=True, generator=own_generator()).view(RESAMPLES, n)
    counts = torch.zeros(RESAMPLES, len(shares), dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones((), dtype=torch.float64).expand(RESAMPLES, n)
    )
    return of_resamples(float(statistic(shares)), statistic(counts / n), n, 0.0, high, centred)


def of_resamples(
    value: float,
    resamples: Tensor,
    n: int,
    low: float = -math.inf,
    high: float = math.inf,
    centred: bool = True,
) -> Estimate:
    """The value, and the spread of the resamples [R], within [low, high]; no interval from a single item.

    `centred`: a distance or an entropy is biased, and that of a resample twice, so the interval lies around the value.
    """
    if n < 2:
        return Estimate(value, n=n)
    resamples = resamples.double().cpu()
    tails = torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=torch.float64)
    lower, upper = resamples.quantile(tails).tolist()
    if centred:
        shift = value - float(resamples.mean())
        lower, upper = lower + shift, upper + shift
    return Estimate(value, min(value, max(low, lower)), max(value, min(high, upper)), n)
