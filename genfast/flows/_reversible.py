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

# By how much the mean magnitude of a sample may differ: rounding makes 1e-5 of it.
_SAME = 1e-3

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

    kinds: list[str | Mask | None] = []

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        out, logdet = advance(step, _packed(tensors, kind), fused)
        if not torch.compiler.is_compiling():
            kinds.append(_kind(out))
        return *_tensors(out), logdet

    state = _for_step(step, state, fused)
    kind = _kind(state)
    *out, logdet = checkpoint(run, *_tensors(state), use_reentrant=False)
    # A graph cannot hand on a name: of the transforms here only a coupling makes halves of a tensor.
    halved = getattr(step, "split", "channel") if kind is None else kind
    return _packed(out, kinds[0] if kinds else halved if len(out) == 2 else None), logdet


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
        # Which steps keep the half that they transform.
        self.keeps = [isinstance(step, _Coupling) and step.keeps_half for step in steps]
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
        kept = [_size(state)]
        for step, keeps in zip(run.steps, run.keeps, strict=True):
            if keeps:
                kept.append(step.parts(_as_kind(state, step.split))[1])
            state, logdet = advance(step, state, run.fused)
            total = logdet if total is None else total + logdet
            run.kinds.append(_kind(state))
        ctx.run = run
        run.versions = [parameter._version for parameter in run.parameters]
        ctx.save_for_backward(*_tensors(state), *kept)
        return *_tensors(state), total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        run: _Run = ctx.run
        if run.versions != [parameter._version for parameter in run.parameters]:
            raise RuntimeError("parameters: expected those of the forward pass, which memory='reversible' runs again")
        *grad_tensors, grad_logdet = grads
        count = len(grad_tensors)
        state, grad = _packed(ctx.saved_tensors[:count], run.kinds[-1]), _packed(grad_tensors, run.kinds[-1])
        size, *kept = ctx.saved_tensors[count:]
        sums: dict[int, Tensor] = {}
        for index in range(len(run.steps) - 1, -1, -1):
            step, kind = run.steps[index], run.kinds[index]
            half = kept.pop() if run.keeps[index] else None
            with torch.autocast(**run.autocast):
                state, grad, found = _undo(step, state, grad, grad_logdet, kind, run.fused, half)
            for parameter, value in found:
                if value is not None:
                    key = id(parameter)
                    sums[key] = value if key not in sums else sums[key] + value
        poison = _unlike(size, _size(state))
        grad = _packed([tensor + poison for tensor in _tensors(grad)], run.kinds[0])
        for key in list(sums)[:1]:
            sums[key] = sums[key] + poison.to(sums[key].dtype)
        return None, *_tensors(grad), *(sums.get(id(parameter)) for parameter in run.parameters)


def _size(state: State) -> Tensor:
    """The mean magnitude of each sample [B]: what tells whether an input came back."""
    return sum(tensor.abs().flatten(1).sum(1) for tensor in _tensors(state)) / max(1, _elements(state))


def _elements(state: State) -> int:
    return sum(tensor.shape[1:].numel() for tensor in _tensors(state))


def _unlike(size: Tensor, again: Tensor) -> Tensor:
    """0, or NaN where an input did not come back: an error on a CPU, and elsewhere a gradient that nobody overlooks."""
    # A NaN of the forward pass is its own sign.
    lost = ((again - size).abs() > _SAME * (1 + size)) | (again.isnan() & size.isfinite())
    if lost.device.type == "cpu" and lost.any():
        raise RuntimeError(
            "memory: expected inverses that give a flow's input back, which 'reversible' rests on, got one off by "
            f"{(again - size).abs().max():.2g} on average over a sample: its scales are too small, use 'checkpoint'"
        )
    return torch.where(lost.any(), torch.nan, 0.0).to(size.dtype)


def _undo(
    step: Step, state: State, grad: State, grad_logdet: Tensor, kind: str | Mask | None, fused: bool,
    half: Tensor | None,
) -> tuple[State, State, list[tuple[nn.Parameter, Tensor | None]]]:
    """The input of a step, from its output, its gradient, and those of the step's parameters.

    half: the transformed half of the input, where it was kept.
    """
    parameters = [parameter for parameter in step.parameters() if parameter.requires_grad]
    if fused and isinstance(step, Coupling) and isinstance(state, Halves):
        state, grad, found = _undo_coupling(step, state, grad, grad_logdet, parameters)
        return _as_kind(state, kind), _as_kind(grad, kind), found
    with torch.no_grad():
        before = retreat(step, state, fused) if half is None else step.put(_as_kind(state, step.split), half)
        state = _as_kind(before, kind)
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
