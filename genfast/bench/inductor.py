"""What torch.compile would launch on an H200 for the eager chains, found on a machine that has none.

A chain is traced on the CPU as in training. Its forward and backward graphs are then told that they live on a GPU, and
Inductor writes its kernels for a driver that is made up; its own code compiles them for sm_90, and they are counted as
ours are. Nothing is launched. All of this rests on private parts of torch and replaces functions of torch.cuda, so it
happens in a process of its own, ``python -m genfast.bench.inductor``, and where that fails the reason is the result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import genfast
from genfast import offline
from genfast.bench.cost import Row, aligned, issue_floor, memory_floor
from genfast.cases import CASES, DTYPES, Case, differentiable

__all__ = ["Launched", "Pass", "Report", "chains", "describe", "main"]

# Far past the 60 MB of an H200's L2, in every dtype.
SHAPE = (8192, 4096)
_ELEMENTS = math.prod(SHAPE)
_SECONDS = 1800
# Our kernels for the forward and backward pass of a case. The rescaling of a stored gradient is launched too, but
# touches no memory where the loss receives 1.
_OURS = {
    "reparameterize_kl": ("reparameterize_kl", "reparameterize_kl backward"),
    "reparameterize_kl_packed": ("reparameterize_kl_packed", "reparameterize_kl_packed backward"),
    "kl_normal": ("kl_normal", "kl_normal backward"),
    "bernoulli_nll": ("bernoulli_nll", "bernoulli_nll backward"),
    "bernoulli_nll-uint8": ("bernoulli_nll, uint8", "bernoulli_nll backward, uint8"),
    "bernoulli_nll-mean": ("bernoulli_nll with gradient",),
    "bernoulli_nll-sum-uint8": ("bernoulli_nll with gradient, uint8",),
}


@dataclass(frozen=True)
class Launched:
    """One kernel: bytes and instructions of one lane, per element of the chain's main tensor.

    `bytes` counts every buffer once, whatever else the kernel does to it. `instructions` is None where they could not
    be counted.
    """

    name: str
    bytes: float
    instructions: float | None

    @property
    def floor(self) -> float:
        """Picoseconds per element that an H200 takes at least."""
        return max(memory_floor(self.bytes), issue_floor(self.instructions or 0.0))

    @property
    def limit(self) -> str:
        """What it is bound by: "memory", "issue", or "memory only" where instructions could not be counted."""
        if self.instructions is None:
            return "memory only"
        return "memory" if memory_floor(self.bytes) >= issue_floor(self.instructions) else "issue"


@dataclass(frozen=True)
class Pass:
    """The forward or backward graph of a case's eager chain.

    Example:
        >>> seed, fused = Launched("seed", 0.0, 0.0), Launched("fused", 8.0, 180.0)
        >>> one = Pass("reparameterize_kl", "bf16", "forward", (seed, fused))
        >>> len(one.kernels), one.bytes, round(one.floor, 2), one.limit
        (2, 8.0, 5.38, 'issue')
    """

    case: str
    dtype: str
    phase: str
    kernels: tuple[Launched, ...]

    @property
    def bytes(self) -> float:
        """Read and written by all kernels."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def instructions(self) -> float | None:
        """Of all kernels; None if one could not be counted."""
        counts = [kernel.instructions for kernel in self.kernels]
        return None if None in counts else sum(counts)

    @property
    def floor(self) -> float:
        """Picoseconds per element of the kernels one after another; launches cost nothing here."""
        return sum(kernel.floor for kernel in self.kernels)

    @property
    def limit(self) -> str:
        """What the longest kernel is bound by."""
        return max(self.kernels, key=lambda kernel: kernel.floor).limit


@dataclass(frozen=True)
class Report:
    """What was found, and a line for each thing that was not."""

    passes: list[Pass]
    problems: list[str]


def chains(cases: Sequence[str] = (), dtypes: Sequence[str] = tuple(DTYPES), workers: int = 1) -> Report:
    """Lower the eager chains of some cases (all if empty), in a process for each dtype.

    Args:
        cases: names of `genfast.cases.CASES`.
        dtypes: "fp32", "bf16", "fp16".
        workers: how many of the processes run at once.
    """
    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(lambda dtype: _ask(cases, dtype), dtypes))
    passes = [each for answer in answers for each in answer.passes]
    order = {case.name: index for index, case in enumerate(CASES)}
    passes.sort(key=lambda each: order[each.case])
    return Report(passes, list(dict.fromkeys(line for answer in answers for line in answer.problems)))


def _ask(cases: Sequence[str], dtype: str) -> Report:
    command = [sys.executable, "-P", "-m", "genfast.bench.inductor", dtype, *cases]
    place = str(Path(genfast.__file__).parents[1])
    missing = f"not available on torch {torch.__version__}"
    # What is made for a GPU that does not exist must not stay in a cache; a real one is left alone.
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (place, os.environ.get("PYTHONPATH")))),
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "CUDA_VISIBLE_DEVICES": "",
        }
        environment.pop("TRITON_INTERPRET", None)
        try:
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS)
            if run.returncode:
                return Report([], [f"{missing}: {(run.stderr.strip().splitlines() or ['no reason given'])[-1]}"])
            answer = json.loads(run.stdout.splitlines()[-1])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            return Report([], [f"{missing}: {error}"])
    passes = [
        Pass(**{**each, "kernels": tuple(Launched(**kernel) for kernel in each["kernels"])})
        for each in answer["passes"]
    ]
    return Report(passes, [f"{case}: {missing}: {reason}" for case, reason in answer["problems"].items()])


def describe(report: Report, rows: Sequence[Row]) -> str:
    """The kernels of every pass, and Inductor's floor over that of our kernels where `rows` has them.

    Example:
        >>> theirs = Pass("bernoulli_nll-mean", "fp32", "forward", (Launched("fused", 24.0, 50.0),))
        >>> ours = Row("bernoulli_nll with gradient", "fp32", "sm_90", "3.9.0", 31.4, 70, 0, {128: 12}, 12)
        >>> print(describe(Report([theirs], ["kl_normal: not available on torch 9.9: why"]), [ours]))
        torch.compile on torch ...
        case                dtype  pass     kernels  bytes  instr  memory ps  issue ps  floor ps  bound by
        bernoulli_nll-mean  fp32   forward        1   24.0   50.0       5.58      1.49      5.58  memory
        kl_normal: not available on torch 9.9: why
        <BLANKLINE>
        computed ceilings, not measurements: Inductor's floor over ours, both passes, ps per element
        case                dtype  Inductor  ours  ratio
        bernoulli_nll-mean  fp32       5.58  2.79  2.00x
        <BLANKLINE>
    """
    header = ["case", "dtype", "pass", "kernels", "bytes", "instr", "memory ps", "issue ps", "floor ps", "bound by"]
    body = []
    for each in report.passes:
        counted = ["-", "-"]
        if each.instructions is not None:
            counted = [f"{each.instructions:.1f}", f"{issue_floor(each.instructions):.2f}"]
        body.append([
            each.case, each.dtype, each.phase, str(len(each.kernels)), f"{each.bytes:.1f}", counted[0],
            f"{memory_floor(each.bytes):.2f}", counted[1], f"{each.floor:.2f}", each.limit,
        ])  # fmt: skip
    size = " x ".join(map(str, SHAPE))
    text = f"torch.compile on torch {torch.__version__}: what it would launch on an H200, {size} elements\n"
    text += aligned(header, body) if body else ""
    text += "".join(f"{problem}\n" for problem in report.problems)
    ours = {(row.dtype, row.name): row.floor for row in rows if row.target == "sm_90"}
    body = []
    for case, kernels in _OURS.items():
        for dtype in DTYPES:
            passes = [each for each in report.passes if (each.case, each.dtype) == (case, dtype)]
            if passes and all((dtype, kernel) in ours for kernel in kernels):
                one, other = sum(each.floor for each in passes), sum(ours[dtype, kernel] for kernel in kernels)
                body.append([case, dtype, f"{one:.2f}", f"{other:.2f}", f"{one / other:.2f}x"])
    if body:
        text += "\ncomputed ceilings, not measurements: Inductor's floor over ours, both passes, ps per element\n"
        text += aligned(["case", "dtype", "Inductor", "ours", "ratio"], body)
    return text


def main(arguments: Sequence[str]) -> None:
    """Print as one line of JSON what is found for one dtype; this process is of no use for anything else afterwards."""
    parser = argparse.ArgumentParser(prog="python -m genfast.bench.inductor", description=__doc__)
    parser.add_argument("dtype", choices=list(DTYPES))
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all if none")
    options = parser.parse_args(arguments)
    known = {case.name: case for case in CASES}
    if unknown := set(options.cases) - known.keys():
        parser.error(f"CASE: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")

    from torch._inductor import config

    config.force_disable_caches = True
    config.compile_threads = 1
    # The static launcher keeps no machine code.
    config.use_static_cuda_launcher = False
    traced, passes, problems = {}, [], {}
    # All are traced before the GPU is made up: tracing looks at the devices that there are.
    for name in options.cases or known:
        with _noting(problems, name):
            traced[name] = _graphs(known[name], options.dtype)
    _make_up_a_gpu()
    for name, graphs in traced.items():
        with _noting(problems, name):
            lowered = [
                Pass(name, options.dtype, "backward" if backward else "forward", tuple(_lowered(graph, args, backward)))
                for graph, args, backward in graphs
            ]
            passes += map(asdict, lowered)
    print(json.dumps({"passes": passes, "problems": problems}))


@contextlib.contextmanager
def _noting(problems: dict[str, str], name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        problems[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class _Stop(Exception):
    """Seen enough."""


def _graphs(case: Case, dtype: str) -> list[tuple[torch.fx.GraphModule, list[Any], bool]]:
    """(graph, inputs, is it backward) as Inductor receives them, forward first."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    small = case.inputs((2, *SHAPE[1:]), DTYPES[dtype], "cpu", torch.Generator())
    # Never written, so they take no memory.
    inputs = {name: torch.empty(SHAPE[0], *x.shape[1:], dtype=x.dtype) for name, x in small.items()}
    for name in differentiable(inputs):
        inputs[name].requires_grad_()
    graphs = []

    def keep(graph: torch.fx.GraphModule, args: Sequence[Any], **options: Any):
        graphs.append((graph, list(args), options.get("is_backward", False)))

        def stop(_):
            raise _Stop

        stop._boxed_call = True
        return stop

    def backend(graph: torch.fx.GraphModule, args: Sequence[Any]):
        return compile_fx(graph, args, inner_compile=keep)

    torch._dynamo.reset()
    patch = config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False)
    with patch, contextlib.suppress(_Stop):
        torch.compile(case.eager, backend=backend, fullgraph=True, dynamic=False)(inputs)
    return sorted(graphs, key=lambda each: each[2])


def _make_up_a_gpu() -> None:
    """Put an H200 that cannot run anything in place of CUDA, for torch and for Triton."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses import fake_tensor
    from torch.utils._triton import has_triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    h200 = types.SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, regs_per_multiprocessor=65536, warp_size=32, total_memory=141 * 2**30,
        shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
        L2_cache_size=60 * 2**20, gcnArchName="", is_integrated=0, uuid="", pci_bus_id=0,
    )  # fmt: skip

    def always(value: Any):
        return lambda *args, **kwargs: value

    no_state = torch.zeros(1)
    for name, value in {
        "is_available": True, "is_initialized": False, "device_count": 1, "current_device": 0, "_lazy_init": None,
        "get_device_properties": h200, "get_device_capability": (9, 0), "is_bf16_supported": True,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "set_device": None, "synchronize": None,
        "is_current_stream_capturing": False, "get_rng_state": no_state, "set_rng_state": None,
    }.items():  # fmt: skip
        setattr(torch.cuda, name, always(value))
    torch.cuda.random.get_rng_state, torch.cuda.random.set_rng_state = always(no_state), always(None)
    for owner, name, value in (
        (CudaInterface, "is_available", True),
        (CudaInterface, "is_triton_capable", True),
        (CudaInterface, "raise_if_triton_unavailable", None),
        (CudaInterface, "get_compute_capability", 90),
        (CudaInterface, "get_device_properties", h200),
        (CudaInterface, "current_device", 0),
        (CudaInterface.Worker, "get_device_properties", h200),
        (CudaInterface.Worker, "current_device", 0),
    ):
        setattr(owner, name, staticmethod(always(value)))
    # Both would start CUDA.
    fake_tensor.init_gpu_context = always(None)
    triton_helpers.set_driver_to_gpu = always(None)

    limits = {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536}
    driver.set_active(
        types.SimpleNamespace(
            get_current_target=always(GPUTarget("cuda", 90, 32)),
            get_current_device=always(0),
            get_active_torch_device=always(torch.device("cuda", 0)),
            utils=types.SimpleNamespace(get_device_properties=always(limits)),
        )
    )
    has_triton.cache_clear()


def _moved(graph: torch.fx.GraphModule, args: Sequence[Any]) -> list[Any]:
    """Tell a traced graph that it lives on the GPU; returns inputs there."""
    import torch.utils._pytree as pytree
    from torch._dynamo.utils import detect_fake_mode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp
    from torch.fx.passes.shape_prop import _extract_tensor_metadata

    gpu = torch.device("cuda", 0)

    def on_gpu(value: Any) -> Any:
        return gpu if isinstance(value, torch.device) else value

    for node in graph.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(on_gpu, node.args), pytree.tree_map(on_gpu, dict(node.kwargs))
    graph.recompile()
    mode = detect_fake_mode(args)
    with mode:
        moved = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=gpu) if isinstance(x, torch.Tensor) else x
            for x in args
        ]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
    for node in graph.graph.nodes:
        if isinstance(node.meta.get("val"), torch.Tensor):
            node.meta["tensor_meta"] = _extract_tensor_metadata(node.meta["val"])
    return moved


def _lowered(graph: torch.fx.GraphModule, args: Sequence[Any], backward: bool) -> list[Launched]:
    """The kernels that Inductor schedules for a graph."""
    from torch._dynamo.utils import detect_fake_mode
    from torch._guards import TracingContext, tracing
    from torch._inductor import ir
    from torch._inductor.codegen.triton import TritonScheduling
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    written: dict[Any, tuple[str, str, dict[str, int]]] = {}
    launched: list[Launched] = []
    write = TritonScheduling.define_kernel

    def define_kernel(self, source: str, schedule: Sequence[Any], kernel: Any) -> str:
        name = write(self, source, schedule, kernel)
        first = next(node for node in schedule if hasattr(node, "get_name"))
        numels = {prefix: int(numel) for prefix, numel in kernel.numels.items()}
        written[self.scheduler.name_to_fused_node[first.get_name()]] = (name, source, numels)
        return name

    def generate(self) -> None:
        self.codegen()
        for node in self.scheduler.nodes:
            moved = node.get_read_write_buffers_sizes() / _ELEMENTS
            if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
                continue
            if isinstance(node, ExternKernelSchedulerNode):
                # A seed is one number, and costs an element nothing.
                name, count = str(node.node.op_overload or node.get_name()), 0.0 if moved * _ELEMENTS < 1024 else None
            else:
                name, source, numels = written[node]
                count = _instructions(source, numels, moved)
            launched.append(Launched(name, moved, count))
        raise _Stop

    moved = _moved(graph, args)
    with (
        _replaced(TritonScheduling, "define_kernel", define_kernel),
        _replaced(GraphLowering, "compile_to_module", generate),
        tracing(TracingContext(detect_fake_mode(moved))),
    ):
        try:
            compile_fx_inner(graph, moved, is_backward=backward, cudagraphs=False)
        except Exception as error:
            # Inductor wraps what comes out of it.
            if not (launched and "_Stop" in repr(error)):
                raise
    return launched


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def _instructions(source: str, numels: dict[str, int], moved: float) -> float | None:
    """Of one lane, per element of the chain's main tensor, for a kernel whose index ranges are `numels`.

    Inductor's heuristics name one configuration, or a few to be timed on the device: then it is the one with the fewest
    instructions. None where they cannot be counted.
    """
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.utils import Placeholder

    name = "kernel"
    for placeholder in (Placeholder.KERNEL_NAME, Placeholder.DESCRIPTIVE_NAME):
        source = source.replace(str(placeholder), name)
    try:
        tuner = getattr(PyCodeCache.load(source), name)
        tuner.precompile(warm_cache_only=True)
        if tuner.inductor_meta["grid_type"] not in ("Grid1D", "Grid2D", "Grid3D"):
            return None
        counts = [_counted(result.kernel, result.config, numels, moved) for result in tuner.compile_results]
    except Exception:
        return None
    return min((count for count in counts if count is not None), default=None)


def _counted(compiled: Any, config: Any, numels: dict[str, int], moved: float) -> float | None:
    code = offline.disassemble(compiled)
    # A range that has no block of its own is covered by every program whole.
    blocks = {prefix: config.kwargs.get(f"{prefix.upper()}BLOCK") for prefix in numels}
    times = {prefix: math.ceil(numels[prefix] / block) if block else 1 for prefix, block in blocks.items()}
    programs = math.prod(count for prefix, count in times.items() if not prefix.startswith("r"))
    rounds = math.prod(count for prefix, count in times.items() if prefix.startswith("r"))
    lanes = 32 * config.num_warps
    executed = len(code.opcodes)
    if code.loops:
        if len(code.loops) > 1:
            return None
        (loop,) = code.loops
        # The loop goes round as often as the source says if it moves one block a time, and was not unrolled.
        block = math.prod(block or numels[prefix] for prefix, block in blocks.items())
        expected = moved * _ELEMENTS / math.prod(numels.values()) * block
        body = sum(bits // 8 * count for bits, count in code.widths(loop).items()) * lanes
        if not 0.9 < body / expected < 1.5:
            return None
        executed += (rounds - 1) * (loop.stop - loop.start)
    return executed * lanes * programs / _ELEMENTS


if __name__ == "__main__":
    main(sys.argv[1:])
