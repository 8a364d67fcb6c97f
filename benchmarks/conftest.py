"""One fixture that times a chain of an op: `genfast.cases` says what the op is, a bench_<op>.py file at which sizes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import cpuinfo
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from genfast.cases import DTYPES, Case, Inputs, Outputs, differentiable, run
from genfast.check import path_taken

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHAINS = ("fused", "eager", "reference", "compiled")
BENCH_DTYPES = ("fp32", "bf16")
MODES = ("forward", "forward+backward")

COLD_BYTES = 512 * 2**20
SECONDS = {"cuda": 0.5, "cpu": 0.1}
ROUNDS = {"cuda": (20, 200), "cpu": (7, 200)}


@dataclass(frozen=True)
class Prepared:
    """The inputs of a case, the gradients that come in, and the largest error of fused over what is allowed."""

    inputs: Inputs
    upstream: list[Tensor]
    path: str
    error: float


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark runs for each of its module's CASES and SIZES; the chains vary fastest and share one preparation."""
    if "chain" not in metafunc.fixturenames:
        return
    metafunc.parametrize("case", metafunc.module.CASES, ids=lambda case: case.setting or "default")
    metafunc.parametrize("shape", metafunc.module.SIZES[DEVICE.type], ids=lambda shape: "x".join(map(str, shape)))
    metafunc.parametrize("dtype", BENCH_DTYPES)
    metafunc.parametrize("mode", MODES)
    metafunc.parametrize("chain", CHAINS)


@lru_cache(maxsize=1)
def _prepare(case: Case, shape: tuple[int, ...], dtype: str) -> Prepared:
    """Random inputs, and the fused op compared with fp64 on them."""
    generator = torch.Generator().manual_seed(0)
    inputs = case.inputs(shape, DTYPES[dtype], str(DEVICE), generator)
    with torch.no_grad():
        outputs = case.fused(inputs)
    # A scalar loss receives 1, as from `loss.backward()`.
    upstream = [
        torch.randn(output.shape, generator=generator).to(output) if output.dim() else torch.ones_like(output)
        for output in outputs
    ]
    taken = path_taken(DEVICE, DTYPES[dtype])
    exact, exact_grads = run(case, "exact", inputs, upstream)
    fused, fused_grads = run(case, "fused", inputs, upstream)
    errors = [
        case.tolerance(taken, DTYPES[dtype], name).excess(got, want)
        for name, got, want in zip(case.outputs, fused, exact, strict=True)
    ]
    allowed = case.tolerance(taken, DTYPES[dtype])
    errors += [allowed.excess(grad, exact_grads[name]) for name, grad in fused_grads.items()]
    return Prepared(inputs, upstream, taken, max(errors))


def _bytes_moved(case: Case, prepared: Prepared, shape: tuple[int, ...], mode: str) -> int:
    """What the fused op reads and writes; per-sample results are not counted."""
    size = next(iter(prepared.inputs.values())).element_size()
    # `moves` counts elements of the main dtype; a pass reads each input once, and uint8 images are narrower than that.
    narrower = sum((size - x.element_size()) * x.numel() for x in prepared.inputs.values())
    passes = [moves for moves in case.moves[: 2 if mode == "forward+backward" else 1] if moves]
    return sum(round(moves * math.prod(shape)) * size - narrower for moves in passes)


def _copies(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The same values for ever: on CUDA at addresses that come back only after COLD_BYTES, so that L2 is cold."""
    if DEVICE.type != "cuda":
        while True:
            yield tensors
    copies = math.ceil(COLD_BYTES / sum(x.numel() * x.element_size() for x in tensors))
    # One scalar for all: kernels are specialised by the alignment of what they read, and its copies would differ in it.
    pools = [x.repeat(copies, *[1] * x.dim()).view(copies, *x.shape) if x.dim() else x for x in tensors]
    for i in count():
        yield [pool[i % copies] if x.dim() else pool for pool, x in zip(pools, tensors, strict=True)]


def _synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _call(chain: Callable[[Inputs], Outputs], mode: str, inputs: Inputs, upstream: list[Tensor]) -> None:
    """What is timed."""
    outputs = chain(inputs)
    if mode == "forward+backward":
        torch.autograd.grad(outputs, [x for x in inputs.values() if x.requires_grad], upstream)
    _synchronize()


@lru_cache
def _environment() -> dict[str, str | int]:
    cuda = DEVICE.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else cpuinfo.get_cpu_info().get("brand_raw", "CPU"),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed",
        "threads": torch.get_num_threads(),
    }


@pytest.fixture
def time_chain(benchmark: BenchmarkFixture) -> Callable[[Case, tuple[int, ...], str, str, str], None]:
    """Time one chain of a case: `time_chain(case, shape, dtype, mode, chain)`; fails untimed where fused is wrong."""

    def time_one(case: Case, shape: tuple[int, ...], dtype: str, mode: str, chain: str) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        prepared = _prepare(case, shape, dtype)
        if prepared.path == "interpreted":
            pytest.skip("TRITON_INTERPRET=1: an interpreted kernel has no speed worth a number")
        if not prepared.error <= 1:
            pytest.fail(f"no time: the error of fused {case.name} is {prepared.error:.3g} times what is allowed")

        plain = {"fused": case.fused, "eager": case.eager, "reference": case.exact, "compiled": case.eager}[chain]
        with torch.no_grad():
            outputs = plain(prepared.inputs)
        upstream = [grad.to(output.dtype) for grad, output in zip(prepared.upstream, outputs, strict=True)]
        function = torch.compile(plain) if chain == "compiled" else plain
        leaves = differentiable(prepared.inputs)
        copies = _copies([*prepared.inputs.values(), *upstream])
        del outputs

        def setup() -> tuple[tuple, dict]:
            tensors = next(copies)
            inputs = dict(zip(prepared.inputs, tensors, strict=False))
            inputs.update({name: inputs[name].detach().requires_grad_() for name in leaves})
            _synchronize()
            return (function, mode, inputs, tensors[len(inputs) :]), {}

        # Compiles outside of every timing, and tells how many rounds there is time for.
        seconds = []
        for _ in range(4):
            arguments, _ = setup()
            start = time.perf_counter()
            _call(*arguments)
            seconds.append(time.perf_counter() - start)
        low, high = ROUNDS[DEVICE.type]
        rounds = min(max(int(SECONDS[DEVICE.type] / min(seconds)), low), high)

        moved = _bytes_moved(case, prepared, shape, mode)
        where = "x".join(map(str, shape))
        benchmark.group = f"{case.name} {where} {dtype} {mode} on {DEVICE.type}"
        # The group says the rest, and the full name keeps every parameter.
        benchmark.name = chain
        benchmark.extra_info.update(
            op=case.op, case=case.name, chain=chain, dtype=dtype, shape=list(shape), mode=mode,
            elements=math.prod(shape), bytes=moved, path=prepared.path, error_over_allowed=prepared.error,
            load=os.getloadavg()[0], **_environment(),
        )  # fmt: skip
        benchmark.pedantic(_call, setup=setup, rounds=rounds, warmup_rounds=rounds // 10)
        if benchmark.stats is not None:
            benchmark.extra_info["GB/s"] = moved / benchmark.stats.stats.median / 1e9

    return time_one
