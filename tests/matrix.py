"""What every op must pass: an op is added by a class with its cases (`genfast.cases`) and its oracle.

The tests run on the reference (CPU), on the interpreted kernels (tests/test_interpreted.py starts pytest anew with
TRITON_INTERPRET=1) and on CUDA where there is a GPU.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from genfast.cases import DTYPES, Case, Inputs, Outputs, Tolerance, differentiable, run, wide
from genfast.check import path_taken
from genfast.functional._register import INTERPRETED

LAYOUTS = ["transposed", "sliced", "skipped", "expanded", "flat", "channels_last", "offset"]
# Around the edges of groups of 4 (Philox), of the tiles of 2048 and 4096, and shapes that users have.
SHAPES = [
    (1, 1), (2, 3), (3, 4), (2, 5), (7, 20), (128, 20), (5, 784), (2, 2047), (2, 2048), (1, 2049), (1, 4097),
    (300, 2), (4,), (2, 4, 32, 32), (3, 2, 3, 5), (2, 3, 2, 2, 6),
]  # fmt: skip
# The models' own tests compile other ops with noise.
_COMPILED_WITH_NOISE = ("reparameterize_kl",)
# Channels that are rows of their own where the layout wants it, and such that cannot be.
PLANAR = [(6, 8, 4, 4), (6, 4, 3, 5), (3, 4, 4, 5), (2, 6, 14, 14)]


def make(case: Case, shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    if len(shape) == 1 and case.op == "reparameterize_kl_packed":
        shape = (*shape, 1)
    return case.inputs(shape, dtype, device, torch.Generator().manual_seed(seed))


def upstream(case: Case, inputs: Inputs, seed: int = 1) -> list[Tensor]:
    """Incoming gradients for the outputs, in the dtype and on the device of the inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        outputs = case.fused(inputs)
    return [
        size * torch.randn(size.shape, generator=generator).to(size.device, size.dtype)
        for size in case.upstream(inputs, outputs)
    ]


Results = tuple[Outputs, dict[str, Tensor]]


def assert_close(case: Case, got: Results, want: Results, dtype: torch.dtype, device: str) -> None:
    """Outputs and gradients within the one tolerance table."""
    for name, actual, exact in zip(case.outputs, got[0], want[0], strict=True):
        check(allowed(case, dtype, device, name), actual, exact, f"{case.name}: {name}")
    for name, actual in got[1].items():
        check(allowed(case, dtype, device), actual, want[1][name], f"{case.name}: gradient of {name}")


def allowed(case: Case, dtype: torch.dtype, device: str, output: str | None = None) -> Tolerance:
    return case.tolerance(path_taken(torch.device(device), dtype), dtype, output)


def check(tolerance: Tolerance, actual: Tensor, exact: Tensor, what: str) -> None:
    excess = tolerance.excess(actual.to(exact.device), exact)
    assert excess <= 1.0, f"{what}: {excess:.3g} times the tolerance {tolerance}"


class _Recorder(TorchDispatchMode):
    """Collects calls of this library's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "genfast" and func.name() != "genfast::new_seed":
            self.calls.append((func, tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)))
        return func(*args, **(kwargs or {}))


no_kernel = pytest.mark.skipif(INTERPRETED, reason="of the reference alone")


class OpMatrix:
    """Subclasses set `cases` and `oracle(case, inputs) -> outputs` (fp64, independent of the reference)."""

    cases: ClassVar[list[Case]]
    oracle: ClassVar[Callable[[Case, Inputs], Outputs]]

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    @pytest.mark.usefixtures("poisoned")
    def test_matches_fp64(self, sized, dtype, device):
        case, shape = sized
        inputs = make(case, shape, dtype, device)
        grads = upstream(case, inputs)
        assert_close(case, run(case, "fused", inputs, grads), run(case, "exact", inputs, grads), dtype, device)

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    def test_matches_oracle(self, case, dtype, device):
        inputs = make(case, (6, 20), dtype, device)
        names = differentiable(inputs)
        leaves = {name: x.detach().cpu().requires_grad_(name in names) for name, x in wide(inputs).items()}
        outputs = type(self).oracle(case, leaves)
        grads = upstream(case, inputs)
        incoming = [g.cpu().double() for g in grads]
        wanted = torch.autograd.grad(outputs, [leaves[name] for name in names], incoming) if names else ()
        exact = tuple(out.detach() for out in outputs), dict(zip(names, wanted, strict=True))
        assert_close(case, run(case, "fused", inputs, grads), exact, dtype, device)

    def test_no_gradient_for_one_output(self, graded, device):
        """Each output alone: the other's incoming gradient is absent, not zero."""
        inputs = make(graded, (5, 20), torch.float32, device)
        for index in range(len(graded.outputs)):
            leaves = {name: inputs[name].clone().requires_grad_() for name in differentiable(inputs)}
            graded.fused({**inputs, **leaves})[index].sum().backward()
            exact = {name: x.requires_grad_(name in leaves) for name, x in wide(inputs).items()}
            total = graded.exact(exact)[index].sum()
            want = torch.autograd.grad(total, [exact[name] for name in leaves], materialize_grads=True)
            for (name, leaf), grad in zip(leaves.items(), want, strict=True):
                check(allowed(graded, torch.float32, device), leaf.grad, grad, name)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.usefixtures("poisoned")
    def test_any_strides(self, planar, layout, device):
        """Inputs and incoming gradients of every layout give what contiguous ones give."""
        case, shape = planar
        inputs = make(case, shape, torch.float32, device)
        grads = upstream(case, inputs)
        if layout == "expanded":
            inputs = {name: x[:1].expand(x.shape) for name, x in inputs.items()}
            grads = [grad.flatten()[0].expand(grad.shape) for grad in grads]
        if layout == "flat":
            inputs = {name: x[..., :1].expand(x.shape) for name, x in inputs.items()}
        plain = {name: x.contiguous() for name, x in inputs.items()}
        want = run(case, "exact", plain, [grad.contiguous() for grad in grads])
        strided = {name: _laid_out(x, layout) for name, x in inputs.items()}
        assert layout in ("expanded", "flat") or all(torch.equal(x, plain[name]) for name, x in strided.items())
        got = run(case, "fused", strided, [_laid_out(grad, layout) for grad in grads])
        assert_close(case, got, want, torch.float32, device)

    def test_gradient_after_cat_and_sum(self, graded, device):
        inputs = make(graded, (4, 8), torch.float32, device)
        results = []
        for chain, values in (("fused", inputs), ("exact", wide(inputs))):
            leaves = {name: values[name].clone().requires_grad_() for name in differentiable(inputs)}
            outputs = getattr(graded, chain)({**values, **leaves})
            joined = torch.cat([out.flatten() for out in outputs] * 2)
            (joined[::2].sum() * 0.5 + joined.sum()).backward()
            results.append({name: leaf.grad for name, leaf in leaves.items()})
        for name, grad in results[0].items():
            check(allowed(graded, torch.float32, device), grad, results[1][name], name)

    @pytest.mark.parametrize("shape", [(0, 20), (3, 0), (0, 4, 8, 8)], ids=str)
    def test_empty(self, case, shape, device):
        inputs = make(case, shape, torch.float32, device)
        outputs, grads = run(case, "fused", inputs)
        for name, out in zip(case.outputs, outputs, strict=True):
            if name in case.sums and out.dim() == 1:
                assert torch.equal(out, torch.zeros(shape[0], device=device))
        assert all(grad.shape == inputs[name].shape for name, grad in grads.items())

    @pytest.mark.usefixtures("poisoned")
    def test_more_rows_than_a_grid_dimension(self, base, device):
        inputs = make(base, (70_000, 3), torch.float32, device)
        assert_close(base, run(base, "fused", inputs), run(base, "exact", inputs), torch.float32, device)

    def test_offsets_past_2_31(self, base, device):
        """Rows that lie 2^30 elements apart: the last one starts beyond 32 bits. Only the pages touched exist."""
        small = make(base, (4, 20), torch.bfloat16, device)
        step, columns = 2**30, max(x.shape[1] for x in small.values() if x.dim() > 1)
        far = {}
        for name, x in small.items():
            if x.dtype != torch.bfloat16 or (device == "cpu" and name not in list(small)[:1]):
                far[name] = x
                continue
            storage = torch.empty(3 * step + columns, dtype=x.dtype, device=device)
            far[name] = storage.as_strided(x.shape, (step, 1)).copy_(x)
            if device == "cuda":
                break
        far = {**small, **far}
        grads = upstream(base, small)
        assert_close(base, run(base, "fused", far, grads), run(base, "exact", small, grads), torch.bfloat16, device)

    def test_two_runs_give_the_same_bits(self, case, device):
        inputs = make(case, (33, 300), torch.float32, device)
        first, second = run(case, "fused", inputs), run(case, "fused", inputs)
        assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
        assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])

    def test_arguments_are_left_alone(self, case, device):
        inputs = make(case, (5, 20), torch.float32, device)
        before = {name: x.clone() for name, x in inputs.items()}
        grads = upstream(case, inputs)
        kept = [grad.clone() for grad in grads]
        run(case, "fused", inputs, grads)
        assert all(torch.equal(inputs[name], x) for name, x in before.items())
        assert all(torch.equal(grad, copy) for grad, copy in zip(grads, kept, strict=True))

    def test_backward_twice(self, graded, device):
        """With retain_graph the second backward gives the same gradient, and leaves the first one alone."""
        inputs = make(graded, (5, 20), torch.float32, device)
        leaves = {name: inputs[name].clone().requires_grad_() for name in differentiable(inputs)}
        outputs = graded.fused({**inputs, **leaves})
        grads = [torch.full_like(out, 0.5) for out in outputs]
        first = torch.autograd.grad(outputs, list(leaves.values()), grads, retain_graph=True)
        assert not any(grad.requires_grad for grad in first)
        kept = [grad.clone() for grad in first]
        second = torch.autograd.grad(outputs, list(leaves.values()), [2 * grad for grad in grads])
        for one, copy, two in zip(first, kept, second, strict=True):
            assert torch.equal(one, copy)
            torch.testing.assert_close(two, 2 * one, rtol=1e-6, atol=1e-7)

    def test_second_derivative_says_that_there_is_none(self, graded, device):
        inputs = make(graded, (3, 4), torch.float32, device)
        leaves = {name: inputs[name].clone().requires_grad_() for name in differentiable(inputs)}
        total = graded.fused({**inputs, **leaves})[-1].sum()
        first = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
        if not any(grad.requires_grad for grad in first):
            # Linear: it is 0.
            return
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            sum(grad.square().sum() for grad in first).backward()

    @no_kernel
    def test_gradcheck_of_the_reference(self, graded):
        inputs = make(graded, (3, 2, 2), torch.float64, "cpu")
        names = differentiable(inputs)

        def function(*values: Tensor) -> Outputs:
            return graded.fused({**inputs, **dict(zip(names, values, strict=True))})

        assert torch.autograd.gradcheck(function, tuple(inputs[name].requires_grad_() for name in names))

    @no_kernel
    def test_gradcheck_of_the_definition(self, graded):
        """The reference's forward is differentiable by autograd too."""
        inputs = make(graded, (3, 2, 2), torch.float64, "cpu")
        names = differentiable(inputs)

        def function(*values: Tensor) -> Outputs:
            return graded.exact({**inputs, **dict(zip(names, values, strict=True))})

        assert torch.autograd.gradcheck(function, tuple(inputs[name].requires_grad_() for name in names))

    def test_opcheck(self, case, device):
        """Every op that a forward and backward call reaches, with the arguments it got."""
        inputs = make(case, (3, 4, 4), torch.float32, device)
        with _Recorder() as recorder:
            run(case, "fused", inputs)
        assert recorder.calls
        for op, arguments in recorder.calls:
            leaf = not op._schema.is_mutable and "backward" not in op.name()
            for argument in arguments:
                if leaf and isinstance(argument, Tensor) and argument.is_floating_point():
                    argument.requires_grad_()
            opcheck(op, arguments)

    @pytest.mark.skipif(INTERPRETED, reason="Inductor meets an opaque op; test_traces_as_one_graph traces it")
    def test_compiles_as_one_graph(self, base, device):
        """A second batch size makes the batch dynamic, as the last batch of an epoch does."""
        if device == "cpu" and base.noisy and base.op not in _COMPILED_WITH_NOISE:
            pytest.skip("the C++ of the noise takes a minute to compile, and is the same for every op")
        self._compile(base, "inductor", None, device)

    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_traces_as_one_graph(self, case, dynamic, device):
        self._compile(case, "aot_eager", dynamic, device)

    def _compile(self, case: Case, backend: str, dynamic: bool | None, device: str) -> None:
        compiled = torch.compile(case.fused, fullgraph=True, backend=backend, dynamic=dynamic)
        for batch in (6, 9):
            inputs = make(case, (batch, 20), torch.float32, device)
            want = run(case, "exact", inputs)
            leaves = {name: inputs[name].clone().requires_grad_() for name in differentiable(inputs)}
            outputs = compiled({**inputs, **leaves})
            got = tuple(out.detach() for out in outputs), {}
            if leaves:
                grads = torch.autograd.grad(outputs, list(leaves.values()), case.upstream(inputs, outputs))
                got[1].update(zip(leaves, grads, strict=True))
            assert_close(case, got, want, torch.float32, device)

    def test_exports(self, case, device):
        inputs = make(case, (6, 20), torch.float32, device)

        class Module(torch.nn.Module):
            def forward(self, inputs: Inputs) -> Outputs:
                return case.fused(inputs)

        program = torch.export.export(Module(), (inputs,))
        for got, want in zip(program.module()(inputs), case.fused(inputs), strict=True):
            torch.testing.assert_close(got, want)

    @pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "traced"])
    def test_activation_checkpointing(self, graded, backend, device):
        """Recomputation draws the same noise: the gradients are those of the plain call."""
        inputs = make(graded, (6, 20), torch.float32, device)

        def function(values: Inputs) -> Tensor:
            return sum(out.float().square().sum() for out in graded.fused(values))

        def checkpointed(values: Inputs) -> Tensor:
            return checkpoint(function, values, use_reentrant=False)

        if backend is not None:
            checkpointed = torch.compile(checkpointed, backend=backend, fullgraph=True)
        results = []
        for call in (function, checkpointed):
            leaves = {name: inputs[name].clone().requires_grad_() for name in differentiable(inputs)}
            call({**inputs, **leaves}).backward()
            results.append([leaf.grad for leaf in leaves.values()])
        for plain, again in zip(*results, strict=True):
            torch.testing.assert_close(again, plain)

    def test_autocast(self, base, device):
        """Under autocast a producer in bf16 hands its result over; sums stay fp32."""
        inputs = make(base, (6, 20), torch.float32, device)
        with torch.autocast(device, torch.bfloat16):
            eye = torch.eye(20, device=device)
            halved = dict(inputs)
            for name in differentiable(inputs):
                halved[name] = torch.cat([part @ eye for part in inputs[name].split(20, 1)], 1)
            outputs = base.fused(halved)
        assert all(halved[name].dtype == torch.bfloat16 for name in differentiable(inputs))
        for name, out in zip(base.outputs, outputs, strict=True):
            assert out.dtype == (torch.float32 if name in base.sums else torch.bfloat16)
        assert_close(base, (outputs, {}), run(base, "exact", halved), torch.bfloat16, device)

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
    def test_non_finite_inputs_are_never_hidden(self, case, value, device):
        """One bad element: its sample's sum is not a finite wrong number, the other samples do not notice."""
        clean = make(case, (4, 20), torch.float32, device)
        for name in differentiable(clean):
            inputs = {key: x.clone() for key, x in clean.items()}
            inputs[name][1, 3] = value
            outputs, _ = run(case, "fused", inputs)
            exact, _ = run(case, "exact", inputs)
            for out_name, out, want in zip(case.outputs, outputs, exact, strict=True):
                if out.dim() == 0:
                    assert out.isfinite() == want.isfinite()
                    continue
                others = [0, 2, 3]
                check(allowed(case, torch.float32, device, out_name), out[others], want[others], out_name)
                assert torch.equal(out[1].isfinite(), want[1].isfinite())

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
    def test_cuda_graph(self, case):
        inputs = make(case, (32, 20), torch.float32, "cuda")
        want = run(case, "fused", inputs)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run(case, "fused", inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run(case, "fused", inputs)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got[0], want[0], strict=True))
        assert all(torch.equal(got[1][name], want[1][name]) for name in want[1])

    def test_nothing_waits_for_the_cyclic_collector(self, graded, device):
        """A result that is dropped without a backward frees its graph at once."""
        inputs = make(graded, (6, 20), torch.float32, device)
        leaves = {name: inputs[name].clone().requires_grad_() for name in differentiable(inputs)}
        gc.collect()
        gc.disable()
        try:
            node = weakref.ref(graded.fused({**inputs, **leaves})[0].grad_fn)
            assert node() is None
        finally:
            gc.enable()


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values (but for "expanded", already so) in other strides."""
    if x.dim() < 2 or layout in ("expanded", "flat"):
        if layout == "sliced" and x.dim() == 1:
            return torch.stack([x, x + 1], 1)[:, 0]
        return x
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.cat([x + 1, x, x - 1], 1)[:, x.shape[1] : 2 * x.shape[1]]
    if layout == "skipped":
        return torch.stack([x, x + 1], 2).select(2, 0)
    if layout == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="runs under TRITON_INTERPRET=1, see test_interpreted.py")
