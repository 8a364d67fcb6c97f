"""The stopwatch: intervals hold the median, and a call's time is its own."""

from __future__ import annotations

import random
import statistics

import pytest
import torch

from genfast.bench.timing import Interval, Stopwatch


def test_the_interval_holds_the_true_median_95_times_in_100():
    generator = random.Random(0)
    for rounds in (7, 20, 200):
        held = 0
        for _ in range(2000):
            interval = Interval.of([generator.expovariate(1.0) for _ in range(rounds)])
            held += interval.low <= 0.6931471805599453 <= interval.high
        assert held >= 0.945 * 2000, rounds


def test_the_interval_narrows():
    generator = random.Random(0)
    widths = []
    for rounds in (20, 2000):
        interval = Interval.of([generator.random() for _ in range(rounds)])
        assert interval.low <= interval.median <= interval.high
        widths.append(interval.high - interval.low)
    assert widths[1] < widths[0] / 4
    with pytest.raises(ValueError, match="samples: expected at least one"):
        Interval.of([])


def test_what_prepares_a_call_is_not_timed(device):
    """A call of a few microseconds behind a preparation of many milliseconds."""
    large, small = torch.randn(600, 600, device=device), torch.randn(60, 60, device=device)
    order = []

    def prepare():
        for _ in range(10):
            large @ large
        order.append("prepared")
        return lambda: (order.append("called"), small @ small)

    stopwatch = Stopwatch(device)
    stopwatch.warm_up(prepare)
    order.clear()
    ours = statistics.median(stopwatch.cold(prepare) for _ in range(9))
    alone = statistics.median(stopwatch.cold(lambda: lambda: large @ large) for _ in range(9))
    assert order == ["prepared", "called"] * 9
    assert ours < alone


def test_every_figure_is_a_positive_time(device):
    x = torch.randn(1000, device=device)
    stopwatch = Stopwatch(device)
    seconds = stopwatch.warm_up(lambda: lambda: x * 2)
    assert seconds > 0
    assert stopwatch.wall(lambda: lambda: x * 2) > 0
    assert stopwatch.host(lambda: lambda: x * 2).median > 0
    assert stopwatch.steady(lambda: lambda: x * 2) > 0
    if device == "cuda":
        assert stopwatch.graph(lambda: lambda: x * 2, seconds).median > 0
        assert stopwatch.peak_bytes(lambda: lambda: x * 2) == 4096
    else:
        assert stopwatch.peak_bytes(lambda: lambda: x * 2) is None
        with pytest.raises(RuntimeError, match="graphs need a CUDA device"):
            stopwatch.graph(lambda: lambda: x * 2, seconds)
