"""The chains that are timed side by side for one op: alone, and between a producer and a consumer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast.cases import Case, Inputs, Outputs, Tolerance, differentiable, run, wide
from genfast.check import path_taken

__all__ = ["CHAINS", "MODES", "PLACES", "Workload", "build", "prepare"]

# What each chain runs, and how it is compiled: None, or a mode of torch.compile.
CHAINS: dict[str, tuple[str, str | None]] = {
    "fused": ("fused", None),
    "fused-compiled": ("fused", "default"),
    "eager": ("eager", None),
    "compiled": ("eager", "default"),
    "reduce-overhead": ("eager", "reduce-overhead"),
    "reference": ("exact", None),
}
PLACES = ("alone", "between")
MODES = ("forward", "forward+backward")
_PRODUCER_WIDTH = 64


@dataclass(frozen=True)
class Workload:
    """What every chain of a case computes with, and how wrong fused is on it.

    Attributes:
        inputs: arguments of the chains; those in `leaves` take a gradient.
        leaves: their names.
        upstream: the gradients that come in.
        path: "triton", "reference" or "interpreted": which path fused takes.
        error: the largest error of the fused op from fp64, over what the tolerance table allows.
        bytes: what the fused op reads and writes by design, for each of `MODES`; per-sample results, and what the
            neighbours of the op move, are not counted.
    """

    inputs: Inputs
    leaves: list[str]
    upstream: list[Tensor]
    path: str
    error: float
    bytes: dict[str, int]


def prepare(
    case: Case,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    place: str = "alone",
    check: bool = True,
) -> Workload:
    """Random inputs for all chains of a case, on which the fused op has been compared with fp64 (unless not `check`).

    Between neighbours, the op is compared on what the producer makes.

    Example:
        >>> from genfast.cases import cases
        >>> work = prepare(cases("kl_normal")[0], (4, 8), torch.float32, "cpu")
        >>> work.leaves, work.error <= 1
        (['mu_q', 'logvar_q', 'mu_p', 'logvar_p'], True)
    """
    generator = torch.Generator().manual_seed(0)
    inputs = case.inputs(shape, dtype, str(device), generator)
    names = differentiable(inputs)
    moved = {mode: _bytes(case, inputs, shape, mode) for mode in MODES}
    leaves, neighbours = names, {}
    if place == "between":
        # Signs times -1, 0 or 1, in steps of a power of two: their sums have seven bits, so a product that is compiled
        # or padded makes the very same inputs, and the op behind it can be held to its tolerance.
        source = 2 * torch.randint(0, 2, (shape[0], _PRODUCER_WIDTH), generator=generator) - 1
        neighbours["source"] = source.to(device, dtype)
        for name in names:
            weight = torch.randint(-1, 2, (inputs[name][0].numel(), _PRODUCER_WIDTH), generator=generator)
            # About as wide as the inputs that it replaces.
            wanted = inputs[name].float().std().item() / math.sqrt(_PRODUCER_WIDTH * 2 / 3)
            neighbours[f"weight_{name}"] = (weight * 2.0 ** round(math.log2(wanted))).to(device, dtype)
        leaves = list(neighbours)
        with torch.no_grad():
            inputs |= _produced(neighbours, {name: inputs[name] for name in names})
    with torch.no_grad():
        outputs = case.fused(inputs)
    # A scalar loss receives 1, as from `loss.backward()`.
    upstream = [
        torch.randn(output.shape, generator=generator).to(output) if output.dim() else torch.ones_like(output)
        for output in outputs
    ]
    taken, error = path_taken(torch.device(device), dtype), math.inf
    if check:
        error = excess(case, case.fused, inputs, upstream)
    return Workload({**inputs, **neighbours}, leaves, upstream, taken, error, moved)


def excess(case: Case, chain: Callable[[Inputs], Outputs], inputs: Inputs, upstream: list[Tensor]) -> float:
    """The largest error of a chain of fused ops from fp64, over what the tolerance table allows."""
    dtype = next(iter(inputs.values())).dtype
    # What is made of pixels is fp32.
    dtype = dtype if dtype.is_floating_point else torch.float32
    taken = path_taken(upstream[0].device, dtype)
    exact, exact_grads = run(case, "exact", inputs, upstream)
    leaves = {name: inputs[name].detach().requires_grad_() for name in differentiable(inputs)}
    outputs = chain({**inputs, **leaves})
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream) if leaves else ()
    errors = [
        case.tolerance(taken, dtype, name).excess(got.detach(), want)
        for name, got, want in zip(case.outputs, outputs, exact, strict=True)
    ]
    allowed = case.tolerance(taken, dtype)
    errors += [allowed.excess(grad, exact_grads[name]) for name, grad in zip(leaves, grads, strict=True)]
    return max(errors)


def excess_between(case: Case, chain: Callable[[Inputs], Outputs], work: Workload) -> float:
    """The same for the outputs of a chain between neighbours; what the consumer makes of them is rounded once more."""
    dtype = next(iter(work.inputs.values())).dtype
    with torch.no_grad():
        outputs = chain(work.inputs)
        exact = _consumed(case, case.exact(wide(work.inputs)))
    errors = []
    for name, got, want in zip(case.outputs, outputs, exact, strict=True):
        one = case.tolerance(work.path, dtype, name)
        errors.append(Tolerance(2 * one.rtol, 2 * one.atol).excess(got, want))
    return max(errors)


def build(case: Case, place: str, chain: str) -> Callable[[Inputs], Outputs]:
    """The callable of one of `CHAINS`, for `Workload.inputs`; it compiles at its first call.

    Example:
        >>> from genfast.cases import cases
        >>> case = cases("kl_normal")[0]
        >>> work = prepare(case, (4, 8), torch.float32, "cpu", "between")
        >>> [out.shape for out in build(case, "between", "eager")(work.inputs)]
        [torch.Size([4])]
    """
    attribute, mode = CHAINS[chain]
    function = getattr(case, attribute)
    if place == "between":
        function = _between(case, function)
    return function if mode is None else torch.compile(function, mode=mode, fullgraph=True, dynamic=False)


def _produced(neighbours: Inputs, replaced: Inputs) -> Inputs:
    """What a linear layer without bias makes in place of each input."""
    return {
        name: F.linear(neighbours["source"], neighbours[f"weight_{name}"]).view(x.shape)
        for name, x in replaced.items()
    }


def _between(case: Case, function: Callable[[Inputs], Outputs]) -> Callable[[Inputs], Outputs]:
    def call(inputs: Inputs) -> Outputs:
        made = _produced(inputs, {name: inputs[name] for name in differentiable(inputs) if f"weight_{name}" in inputs})
        return _consumed(case, function({**inputs, **made}))

    return call


def _consumed(case: Case, outputs: Outputs) -> Outputs:
    """What a pointwise function makes of the outputs: one that magnifies no relative error, unlike GELU's tail."""
    return tuple(
        0.5 * output if name in case.sums else F.leaky_relu(output, 0.2)
        for name, output in zip(case.outputs, outputs, strict=True)
    )


def _bytes(case: Case, inputs: Inputs, shape: tuple[int, ...], mode: str) -> int:
    size = next(iter(inputs.values())).element_size()
    # `moves` counts elements of the main dtype; a pass reads each input once, and uint8 images are narrower than that.
    narrower = sum((size - x.element_size()) * x.numel() for x in inputs.values())
    passes = [moves for moves in case.moves[: 1 + MODES.index(mode)] if moves]
    return sum(round(moves * math.prod(shape)) * size - narrower for moves in passes)


