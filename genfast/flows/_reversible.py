"""Running transforms one after another, and with one saved activation whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from genfast.flows._transform import Halves, Mask, Transform, divide, join, same_split
from genfast.flows.coupling import Coupling, _Coupling
from genfast.flows.linear import ActNormConv1x1
from genfast.functional.affine_coupling import backward_from_output

__all__ = ["State", "Step", "advance", "checkpointed", "retreat", "reversibly"]

State = Tensor | Halves
Step = Transform | ActNormConv1x1


def advance(step: Step, state: State, fused: bool = True, **noise: Any) -> tuple[State, Tensor]:
    """One transform forward: halves stay apart as long as it takes them, and only then are they put together."""
    state = _for_step(step, state, fused)
    if fused and isinstance(step, _Coupling) and not isinstance(state, Halves):
        return step.start(state)
    return step(state, **noise)


def retreat(step: Step, state: State, fused: bool = True, **noise: Any) -> State:
    """One transform back."""
    state = _for_step(step, state, fused)
    if fused and isinstance(step, _Coupling) and not isinstance(state, Halves):
        return step.start(state, inverse=True)[0]
    return step.inverse(state, **noise)


def _for_step(step: Step, state: State, fused: bool) -> State:
    if isinstance(state, Halves) and not (fused and step.accepts(state.split)):
        return join(state)
    return state


def checkpointed(step: Step, state: State, fused: bool) -> tuple[State, Tensor]:
    """`advance` that keeps its input alone, by `torch.utils.checkpoint`."""

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        out, logdet = advance(step, _packed(tensors, kind), fused)
        return *_tensors(out), logdet

    state = _for_step(step, state, fused)
    kind = _kind(state)
    *out, logdet = checkpoint(run, *_tensors(state), use_reentrant=False)
    starts = fused and isinstance(step, _Coupling)
    return _packed(out, step.split if starts else kind), logdet


def reversibly(steps: Sequence[Step], state: State, fused: bool) -> tuple[State, Tensor]:
    """`advance` over steps that are `reversible`, of which the output alone is kept."""
    # Only there: within what is disabled, compiled networks would run eagerly too.
    run = _outside_graphs if torch.compiler.is_dynamo_compiling() else _reversibly
    return run(steps, state, fused)


def _reversibly(steps: Sequence[Step], state: State, fused: bool) -> tuple[State, Tensor]:
    parameters = list({id(p): p for step in steps for p in step.parameters() if p.requires_grad}.values())
    run = _Run(steps, _kind(state), parameters, fused)
    *out, logdet = _Reversible.apply(run, *_tensors(state), *parameters)
    return _packed(out, run.kinds[-1]), logdet


_outside_graphs = torch.compiler.disable(
    _reversibly, reason="memory='reversible' cannot be part of a graph: Flow.compile compiles its networks"
)


class _Run:
    """What a run of steps is, apart from tensors: the kinds of the states between them are known once it ran."""

    def __init__(self, steps: Sequence[Step], kind: str | Mask | None, parameters: list[nn.Parameter], fused: bool):
        self.steps, self.parameters, self.fused = steps, parameters, fused
        self.kinds = [kind]
        self.versions: list[int] = []
        self.autocast: dict[str, Any] = {}


class _Reversible(torch.autograd.Function):
    """The parameters are inputs, so that hooks on them (DDP's) see their gradients."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        state = _packed(tensors[: 1 if run.kinds[0] is None else 2], run.kinds[0])
        total = None
        kind = tensors[0].device.type
        run.autocast = {
            "device_type": kind, "dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind),
        }  # fmt: skip
        for step in run.steps:
            state, logdet = advance(step, state, run.fused)
            total = logdet if total is None else total + logdet
            run.kinds.append(_kind(state))
        ctx.run = run
        run.versions = [parameter._version for parameter in run.parameters]
        ctx.save_for_backward(*_tensors(state))
        return *_tensors(state), total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        run: _Run = ctx.run
        if run.versions != [parameter._version for parameter in run.parameters]:
            raise RuntimeError("parameters: expected those of the forward pass, which memory='reversible' runs again")
        *grad_tensors, grad_logdet = grads
        state, grad = _packed(ctx.saved_tensors, run.kinds[-1]), _packed(grad_tensors, run.kinds[-1])
        sums: dict[int, Tensor] = {}
        for index in range(len(run.steps) - 1, -1, -1):
            step, kind = run.steps[index], run.kinds[index]
            with torch.autocast(**run.autocast):
                state, grad, found = _undo(step, state, grad, grad_logdet, kind, run.fused)
            for parameter, value in found:
                if value is not None:
                    key = id(parameter)
                    sums[key] = value if key not in sums else sums[key] + value
        return None, *_tensors(grad), *(sums.get(id(parameter)) for parameter in run.parameters)


def _undo(
    step: Step, state: State, grad: State, grad_logdet: Tensor, kind: str | Mask | None, fused: bool
) -> tuple[State, State, list[tuple[nn.Parameter, Tensor | None]]]:
    """The input of a step, from its output, its gradient, and those of the step's parameters."""
    parameters = [parameter for parameter in step.parameters() if parameter.requires_grad]
    if fused and isinstance(step, Coupling) and isinstance(state, Halves):
        state, grad, found = _undo_coupling(step, state, grad, grad_logdet, parameters)
        return _as_kind(state, kind), _as_kind(grad, kind), found
    with torch.no_grad():
        state = _as_kind(retreat(step, state, fused), kind)
    inputs = tuple(tensor.detach().requires_grad_() for tensor in _tensors(state))
    with torch.enable_grad():
        out, logdet = advance(step, _packed(inputs, kind), fused)
    outputs = [(tensor, value) for tensor, value in zip(_tensors(out), _tensors(grad), strict=True)]
    outputs += [(logdet, grad_logdet)] if logdet.requires_grad else []
    found = torch.autograd.grad(
        [tensor for tensor, _ in outputs], (*inputs, *parameters), [value for _, value in outputs], allow_unused=True
    )
    grads = found[: len(inputs)]
    return state, _packed(grads, kind), list(zip(parameters, found[len(inputs) :], strict=True))


def _undo_coupling(
    step: Coupling, state: Halves, grad: Halves, grad_logdet: Tensor, parameters: list[nn.Parameter]
) -> tuple[Halves, Halves, list[tuple[nn.Parameter, Tensor | None]]]:
    """The network runs once: what it says gives the half back as well as all gradients."""
    condition, y = step.parts(state)
    grad_condition, grad_y = step.parts(grad)
    condition = condition.detach().requires_grad_()
    with torch.enable_grad():
        params = step.net(condition)
    x, grad_x, grad_params, grad_factor = backward_from_output(
        y, params.detach(), grad_y, grad_logdet, factor=_detached(step.factor), **step.options
    )
    others = [parameter for parameter in parameters if parameter is not step.factor]
    if params.requires_grad:
        more, *found = torch.autograd.grad(params, (condition, *others), grad_params, allow_unused=True)
        grad_condition = grad_condition if more is None else grad_condition + more
    else:
        found = [None] * len(others)
    found = list(zip(others, found, strict=True))
    if len(others) < len(parameters):
        found.append((step.factor, grad_factor))
    return step.put(state, x), _with_halves(step, grad, grad_condition, grad_x), found


def _with_halves(step: Coupling, halves: Halves, condition: Tensor, transformed: Tensor) -> Halves:
    a, b = (transformed, condition) if step.swap else (condition, transformed)
    return halves._replace(a=a, b=b)


def _detached(factor: float | Tensor) -> float | Tensor:
    return factor.detach() if isinstance(factor, Tensor) else factor


def _kind(state: State) -> str | Mask | None:
    """The split of halves; None of a tensor."""
    return state.split if isinstance(state, Halves) else None


def _tensors(state: State) -> tuple[Tensor, ...]:
    return (state.a, state.b) if isinstance(state, Halves) else (state,)


def _packed(tensors: Sequence[Tensor], kind: str | Mask | None) -> State:
    return tensors[0] if kind is None else Halves(tensors[0], tensors[1], kind)


def _as_kind(state: State, kind: str | Mask | None) -> State:
    if isinstance(state, Halves):
        if kind is not None and same_split(state.split, kind):
            return state
        state = join(state)
    return state if kind is None else divide(state, kind)
