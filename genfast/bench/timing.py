"""How long a callable takes: on CUDA on the device with a cold cache, in a replayed graph, and on the host; else by the
clock."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Interval", "Stopwatch"]

Call = Callable[[], Any]

# Past any L2 by a factor of eight.
COLD_BYTES = 512 * 2**20
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
_HOST_CALLS = 70
_STEADY_CALLS = 10
_GRAPH_SECONDS = 0.01
_GRAPH_CALLS = 20


@dataclass(frozen=True)
class Interval:
    """A median in seconds with a 95% confidence interval, by order statistics: no assumption about the distribution.

    Example:
        >>> Interval.of([3.0, 1.0, 2.0])
        Interval(median=2.0, low=1.0, high=3.0, rounds=3)
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Interval:
        """The interval of some samples, at least one."""
        if not samples:
            raise ValueError("samples: expected at least one, got none")
        ordered, n = sorted(samples), len(samples)
        # The number of samples below the median is binomial(n, 1/2): its normal approximation, rounded outwards.
        reach = 1.96 * math.sqrt(n) / 2
        low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
        return cls(statistics.median(ordered), ordered[low], ordered[high], n)


class Stopwatch:
    """Times calls on one device.

    Example:
        >>> seconds = Stopwatch("cpu").cold(lambda: lambda: sum(range(1000)))
        >>> 0 < seconds < 1
        True
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self._flushes = 1
        if self.cuda:
            self._evicting = torch.ones(COLD_BYTES // 4, device=self.device)
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush_seconds = statistics.median(self._elapsed(self._flush) for _ in range(5))

    def _flush(self) -> None:
        # By reading: what is written would have to be written back within the time of the call.
        self._evicting.amax()

    def _elapsed(self, call: Call, lead: Call | None = None) -> float:
        """Between two events around a call; behind a lead that is not timed, and keeps the device from waiting."""
        if lead is not None:
            lead()
        self._start.record()
        result = call()
        self._end.record()
        self._end.synchronize()
        del result
        return self._start.elapsed_time(self._end) / 1e3

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def warm_up(self, prepare: Callable[[], Call], calls: int = 4) -> float:
        """Call some times, so that all is compiled; returns the seconds of the fastest call, host and device."""
        fastest = min(self.wall(prepare) for _ in range(calls))
        if self.cuda:
            # The device is kept busy for longer than the host needs to queue the call: no launch shows as a gap.
            self._flushes = 1 + math.ceil(1.5 * min(self._queueing(prepare) for _ in range(3)) / self._flush_seconds)
        return fastest

    def _queueing(self, prepare: Callable[[], Call]) -> float:
        """Seconds until a call returns, with nothing queued before it."""
        call = prepare()
        self.synchronize()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def cold(self, prepare: Callable[[], Call]) -> float:
        """Seconds of one call of what `prepare` returns: on CUDA device time from a cold L2, else wall-clock time."""
        call = prepare()
        if self.cuda:
            self.synchronize()
            for _ in range(self._flushes):
                self._flush()
            return self._elapsed(call)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def wall(self, prepare: Callable[[], Call]) -> float:
        """Seconds on the wall of one call and of all that it leaves the device to do."""
        call = prepare()
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def steady(self, prepare: Callable[[], Call]) -> float:
        """Seconds on the wall of a call among many, as in a loop that never waits: the slower of host and device."""
        calls = [prepare() for _ in range(_STEADY_CALLS)]
        self.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        self.synchronize()
        return (time.perf_counter() - start) / _STEADY_CALLS

    def graph(self, prepare: Callable[[], Call], seconds: float, replays: int = 20) -> Interval:
        """Seconds of one call inside a replayed CUDA graph that holds several: without launches, the cache warm.

        Args:
            prepare: as for `cold`; called once.
            seconds: what one call is expected to take.
            replays: how many replays are timed.

        Raises:
            RuntimeError: the call cannot be captured, or there is no CUDA device.
        """
        if not self.cuda:
            raise RuntimeError("graphs need a CUDA device")
        call = prepare()
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        calls = max(1, min(_GRAPH_CALLS, int(_GRAPH_SECONDS / seconds)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        return Interval.of([self._elapsed(graph.replay, lead=graph.replay) / calls for _ in range(replays)])

    def host(self, prepare: Callable[[], Call], calls: int = _HOST_CALLS) -> Interval:
        """Seconds that the host spends on one call; on CUDA with the queue empty, so that nothing is waited for."""
        samples = [self._queueing(prepare) for _ in range(calls)]
        self.synchronize()
        return Interval.of(samples)

    def peak_bytes(self, prepare: Callable[[], Call]) -> int | None:
        """The most memory that a call holds above what was there before it; None where the device does not tell."""
        if not self.cuda:
            return None
        call = prepare()
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        return torch.cuda.max_memory_allocated(self.device) - before

    def copy_bandwidth(self, rounds: int = 20) -> float:
        """Bytes read and written per second by a large copy within the device: the ceiling of what moves memory."""
        size = _COPY_BYTES[self.device.type]
        source = torch.rand(size // 4, device=self.device)
        target = torch.empty_like(source)

        def prepare() -> Call:
            return lambda: target.copy_(source)

        self.warm_up(prepare)
        return 2 * size / statistics.median(self.cold(prepare) for _ in range(rounds))
