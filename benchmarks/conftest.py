"""Fixtures that time things: a chain of an op (`time_chain`), and any callable beside others (`time_callable`)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch._inductor import cudagraph_trees

from genfast.bench.chains import CHAINS, MODES, PLACES, Workload, build, excess, excess_between, prepare
from genfast.bench.machine import describe_run, machine_name
from genfast.bench.results import Results, Row
from genfast.bench.timing import Call, Interval, Stopwatch
from genfast.cases import DTYPES, Case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE_NAMES = ("fp32", "bf16")
# On a CPU no kernel of ours runs, graphs do not exist, and a compile takes as long as all else together.
DEFAULT_CHAINS = {"cuda": tuple(CHAINS), "cpu": ("fused", "eager", "compiled", "reference")}
DEFAULT_PLACES = {"cuda": PLACES, "cpu": ("alone",)}
SECONDS = {"cuda": 0.3, "cpu": 0.1}
ROUNDS = {"cuda": (20, 200), "cpu": (7, 200)}
WHOLE_ROUNDS = 6


class _Clock:
    """What pytest-benchmark reads as the time: it passes only while the thing to be timed runs."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


_CLOCK = _Clock()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("genfast")
    group.addoption("--results", help="add the figures to this JSON file, or to the machine's own file in this folder")
    group.addoption("--chains", help=f"all, or some of {','.join(CHAINS)}")
    group.addoption("--places", help=f"all, or some of {','.join(PLACES)}")
    group.addoption("--compile-only", action="store_true", help="time nothing: fill the compilers' caches")
    group.addoption("--resume", action="store_true", help="skip what --results has from this code and these versions")
    group.addoption("--more-sizes", action="store_true", help="also the sizes between the smallest and the largest")


def _chosen(config: pytest.Config, option: str, default: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    value = config.getoption(option)
    if value is None:
        return default
    chosen = known if value == "all" else tuple(dict.fromkeys(value.split(",")))
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise pytest.UsageError(f"{option}: expected all, or some of {', '.join(known)}, got {', '.join(unknown)}")
    return chosen


def _selection(config: pytest.Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The chains and places that were asked for."""
    chains = _chosen(config, "--chains", DEFAULT_CHAINS[DEVICE.type], tuple(CHAINS))
    return chains, _chosen(config, "--places", DEFAULT_PLACES[DEVICE.type], PLACES)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark of an op runs for each of its module's CASES and SIZES; what shares a preparation is adjacent."""
    if "chain" not in metafunc.fixturenames:
        return
    sizes = metafunc.module.SIZES[DEVICE.type]
    if metafunc.config.getoption("--more-sizes"):
        sizes = sorted({*sizes, *metafunc.module.SIZES["more"]})
    chains, places = _selection(metafunc.config)
    metafunc.parametrize("case", metafunc.module.CASES, ids=lambda case: case.setting or "default")
    metafunc.parametrize("shape", sizes, ids=lambda shape: "x".join(map(str, shape)))
    metafunc.parametrize("dtype", DTYPE_NAMES)
    metafunc.parametrize("place", places)
    metafunc.parametrize("chain", chains)
    metafunc.parametrize("mode", MODES[1:] if metafunc.config.getoption("--compile-only") else MODES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=_CLOCK))


@cache
def _stopwatch() -> Stopwatch:
    return Stopwatch(DEVICE)


@cache
def _run() -> dict[str, Any]:
    return describe_run(_stopwatch())


class _Collected:
    """The rows of this session, written whenever the chains of one size are complete."""

    def __init__(self, path: str | None) -> None:
        self.path = None if path is None else Path(path)
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        if self.rows and self.rows[-1].group[:4] != row.group[:4]:
            self.save()
        self.rows.append(row)

    @cached_property
    def results(self) -> Results:
        """What the file held before, to which the rows are added."""
        results = Results(machine_name(DEVICE), DEVICE.type)
        if self.path.suffix != ".json":
            self.path /= results.file_name
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path.parent, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.path.parent))
            held = Results.load(self.path) if self.path.exists() else results
            held.merge(results)
        except (OSError, ValueError) as error:
            raise pytest.UsageError(f"--results: {error}") from error
        return held

    def has(self, **of_row: Any) -> bool:
        """Whether the file holds this figure already, measured with this code and these versions."""
        if self.path is None:
            return False
        key, now = tuple(of_row.values()), _run()
        same = [
            index for index, run in enumerate(self.results.runs)
            if all(run.get(name) == now[name] for name in ("source", "torch", "triton"))
        ]  # fmt: skip
        return any(row.run in same and key == tuple(getattr(row, name) for name in of_row) for row in self.results.rows)

    def save(self) -> None:
        if self.path is not None and self.rows:
            self.results.merge(Results(machine_name(DEVICE), DEVICE.type, [_run()], self.rows))
            self.results.save(self.path)


_COLLECTED = pytest.StashKey[_Collected]()


def pytest_configure(config: pytest.Config) -> None:
    _selection(config)
    collected = config.stash[_COLLECTED] = _Collected(config.getoption("--results") or None)
    if collected.path is not None and not hasattr(config, "workerinput"):
        # Before anything is measured: a file that cannot be written, or is another machine's, would lose it all.
        _ = collected.results


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[_COLLECTED].save()


@pytest.fixture
def time_callable(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> Callable[..., None]:
    """Time a callable and keep its figures.

    `time_callable(prepare, kind="op", capture=True, **of_row)`: `prepare()` returns the call to be timed, with whatever
    has to be fresh each time made beforehand; `of_row` are fields of `genfast.bench.results.Row`. An "op" is timed on
    the device from a cold cache; a "step" on the wall, among others like it in a loop; a "program", like an epoch, on
    the wall and a few times only. With `capture` a call is also timed inside a CUDA graph.
    """

    def time_one(prepare: Callable[[], Call], kind: str = "op", capture: bool = True, **of_row: Any) -> None:
        if pytestconfig.getoption("--compile-only"):
            # Twice: mode="reduce-overhead" records at the second call.
            for _ in range(2):
                prepare()()
            benchmark.pedantic(lambda: None)
            return
        stopwatch = _stopwatch()
        load = os.getloadavg()[0]
        whole = kind == "program"
        expected = stopwatch.warm_up(prepare, calls=1 if whole else 4)
        low, high = (WHOLE_ROUNDS,) * 2 if whole else ROUNDS[DEVICE.type]
        timed = {"op": stopwatch.cold, "step": stopwatch.steady, "program": stopwatch.wall}[kind]
        rounds = min(max(int(SECONDS[DEVICE.type] / expected), low), high)
        samples: list[float] = []

        def one_round() -> None:
            samples.append(timed(prepare))
            _CLOCK.seconds += samples[-1]

        shape = "x".join(map(str, of_row["shape"]))
        words = [of_row["case"], shape, of_row["dtype"], of_row["mode"], of_row["place"]]
        benchmark.group = f"{' '.join(word for word in words if word)} on {DEVICE.type}"
        # The group says the rest, and the full name keeps every parameter.
        benchmark.name = of_row["chain"]
        benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=rounds // 10)
        if benchmark.stats is None:
            return
        time = Interval.of(samples[-rounds:])
        graph, no_graph, host = None, None, None
        if stopwatch.cuda and not whole:
            host = stopwatch.host(prepare)
            try:
                graph = stopwatch.graph(prepare, time.median) if capture else None
            except RuntimeError as error:
                no_graph = str(error).splitlines()[0]
        moved = of_row.get("bytes")
        share = None if moved is None else moved / time.median / _run()["copy_bandwidth"]
        row = Row(
            **of_row, time=time, graph=graph, no_graph=no_graph, host=host, copy_share=share, load=load,
            # A step frees gradients, and graphs own their memory: a peak above the inputs is an op's.
            peak_bytes=stopwatch.peak_bytes(prepare) if kind == "op" and capture else None,
        )  # fmt: skip
        benchmark.extra_info.update(_run(), device=machine_name(DEVICE), elements=row.elements, **of_row)
        benchmark.extra_info |= {"copy_share": share, "peak_bytes": row.peak_bytes, "load": load, "no_graph": no_graph}
        for name, interval in (("graph_us", graph), ("host_us", host)):
            benchmark.extra_info[name] = None if interval is None else interval.median * 1e6
        if moved is not None:
            benchmark.extra_info["GB/s"] = moved / time.median / 1e9
        pytestconfig.stash[_COLLECTED].add(row)

    return time_one


# The chains of one preparation run one after another, and both modes of one chain share what is compiled.
_prepared = lru_cache(maxsize=1)(prepare)


@lru_cache(maxsize=1)
def _built(case: Case, place: str, chain: str, work_of: tuple, check: bool) -> tuple[Callable, list[Tensor], float]:
    """A chain, the gradients that come in to it, in its outputs' dtypes, and how wrong it is if it is one of ours."""
    torch._dynamo.reset()
    if DEVICE.type == "cuda":
        # The graphs of mode="reduce-overhead" keep their memory beyond a reset of the compiler.
        cudagraph_trees.reset_cudagraph_trees()
    work, function = _prepared(case, *work_of), build(case, place, chain)
    with torch.no_grad():
        dtypes = [output.dtype for output in getattr(case, CHAINS[chain][0])(work.inputs)]
    # Beforehand: a cast in the call would be timed for the chains alone whose sums have another dtype than ours.
    upstream = [grad.to(dtype) for grad, dtype in zip(work.upstream, dtypes, strict=True)]
    error = work.error
    if check and chain.startswith("fused"):
        if place == "between":
            error = max(error, excess_between(case, function, work))
        elif chain != "fused":
            error = max(error, excess(case, function, work.inputs, work.upstream))
    return function, upstream, error


@pytest.fixture
def time_chain(time_callable: Callable[..., None], pytestconfig: pytest.Config) -> Callable[..., None]:
    """Time one chain of a case; fails untimed where what we made is wrong."""

    def time_one(case: Case, shape: tuple[int, ...], dtype: str, place: str, chain: str, mode: str) -> None:
        of_row = {
            "op": case.op, "case": case.name, "shape": shape, "dtype": dtype, "mode": mode, "place": place,
            "chain": chain,
        }  # fmt: skip
        held = pytestconfig.stash[_COLLECTED]
        # A group is replaced whole, so it is left out whole or not at all.
        chosen, _ = _selection(pytestconfig)
        if pytestconfig.getoption("--resume") and all(held.has(**{**of_row, "chain": each}) for each in chosen):
            pytest.skip("measured already, with this code and these versions")
        torch.manual_seed(0)
        check = not pytestconfig.getoption("--compile-only")
        work_of = (shape, DTYPES[dtype], DEVICE, place, check)
        work = _prepared(case, *work_of)
        if work.path == "interpreted":
            pytest.skip("TRITON_INTERPRET=1: an interpreted kernel has no speed worth a number")
        function, upstream, error = _built(case, place, chain, work_of, check)
        if check and not error <= 1:
            pytest.fail(f"no time: the error of fused {case.name} is {error:.3g} times what is allowed")
        replays = CHAINS[chain][1] == "reduce-overhead"
        time_callable(
            lambda: _call(function, work, upstream, mode, replays),
            # What replays graphs of its own cannot be captured in another.
            capture=not replays, **of_row, bytes=work.bytes[mode],
            error=error if chain.startswith("fused") else None, path=work.path,
        )  # fmt: skip

    return time_one


def _call(function: Callable, work: Workload, upstream: list[Tensor], mode: str, replays: bool) -> Call:
    """One call with leaves of its own; they require gradients in the forward pass too: what backward needs is kept."""
    leaves = {name: work.inputs[name].detach().requires_grad_() for name in work.leaves}
    inputs = {**work.inputs, **leaves}

    def call() -> None:
        if replays:
            # Without it each call would wait for a backward pass of the one before.
            torch.compiler.cudagraph_mark_step_begin()
        outputs = function(inputs)
        if mode == "forward+backward":
            torch.autograd.grad(outputs, list(leaves.values()), upstream)

    return call


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    """What an earlier size holds is given back before the next one needs it."""
    yield
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
