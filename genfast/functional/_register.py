"""How an op comes into being: one operator name over a Triton kernel and a PyTorch reference.

On CUDA the op is traced through to its kernel, so Inductor launches it without copies; on other devices it is traced
through to the reference, which Inductor fuses. Under TRITON_INTERPRET=1 it is opaque and runs the kernel on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from genfast import profiling
from genfast._environment import FORCE_REFERENCE, HAS_TRITON, INTERPRETED
from genfast.random import PLAIN, is_untraced

_OPS: dict[str, Any] = {}


def digest() -> str:
    """Of all formulas: kernels, references and the noise."""
    package = Path(__file__).parents[1]
    files = [package / "random.py", *sorted(package.glob("kernels/*.py")), *sorted(package.glob("reference/*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


# An argument of every op: torch's cache of compiled graphs knows an op by its name and arguments alone, and would go on
# running the formulas of an older version.
_SOURCE = digest()


def path(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """("triton" | "reference", why) for a tensor of this device and dtype."""
    if FORCE_REFERENCE:
        return "reference", "GENFAST_REFERENCE=1"
    if dtype == torch.float64:
        return "reference", "kernels compute in fp32, the input is fp64"
    if not HAS_TRITON:
        return "reference", "Triton is not installed"
    if device.type == "cuda":
        return "triton", "CUDA device"
    if INTERPRETED and device.type == "cpu":
        return "triton", "TRITON_INTERPRET=1: interpreted on the CPU"
    return "reference", f"{device.type} device"


def explain_path(device: torch.device | str | None = None) -> dict[str, tuple[str, str]]:
    """Which path each op takes on a device, and why.

    Example:
        >>> explain_path("cpu")["reparameterize_kl"]
        ('reference', 'cpu device')
    """
    device = torch.device(device) if device is not None else torch.get_default_device()
    parts = ("_backward", "_rescale", "_with_grad", "_given", "_inverse")
    return {name: path(device) for name in sorted(_OPS) if not name.endswith(parts)}


@contextlib.contextmanager
def _quiet_without_triton() -> Iterator[None]:
    # torch looks for kernels in the body and warns once an op where Triton is absent: there is nothing to find.
    logger = logging.getLogger("torch._library.triton")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def _shape_and_dtype(x: Tensor) -> str:
    return f"{list(x.shape)} {_DTYPE_NAMES.get(x.dtype, x.dtype)}"


def _in_plain_eager(args: tuple) -> bool:
    """Whether nothing traces, fakes, transforms or records the call, so that it may go past the dispatcher."""
    return (
        is_untraced()
        and all(type(arg) in PLAIN for arg in args if isinstance(arg, Tensor))
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


class Op:
    """A registered operator, called and differentiated with the arguments of its reference.

    In plain eager code it goes past the dispatcher, whose Python layers cost the host more than the rest of a
    small call but its launch: the same function, the same backward, as a `torch.autograd.Function`.
    """

    def __init__(self, name: str, definition: Any, body: Callable[..., Any], mutates: tuple[int, ...]) -> None:
        self._name = name
        self._definition = definition
        self._body = body
        self._mutates = mutates
        self._function: type[torch.autograd.Function] | None = None

    def __call__(self, *args: Any) -> Any:
        # In this order, or the graphs of torch.compile would depend on the switch.
        if not is_dynamo_compiling():
            call = self._direct if _in_plain_eager(args) else self._dispatched
            # Fake tensors, and those of a trace, launch nothing.
            if profiling.on and type(args[0]) in PLAIN:
                with profiling.range(f"{self._name} {_shape_and_dtype(args[0])}"):
                    return call(*args)
            return call(*args)
        return self._definition(*args, _SOURCE)

    def _dispatched(self, *args: Any) -> Any:
        return self._definition(*args, _SOURCE)

    def _direct(self, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            # An op without a backward says so when it is differentiated: that is the dispatcher's to say.
            return self._dispatched(*args) if self._function is None else self._function.apply(*args)
        for index in self._mutates:
            torch.autograd.graph.increment_version(args[index])
        return self._body(*args)

    def register_autograd(self, backward: Callable[..., tuple], setup_context: Callable[..., None]) -> None:
        """As `torch.library.register_autograd`, without the digest among inputs and gradients."""
        self._definition.register_autograd(
            lambda ctx, *grads: (*backward(ctx, *grads), None),
            setup_context=lambda ctx, inputs, output: setup_context(ctx, inputs[:-1], output),
        )

        def forward(ctx: Any, *args: Any) -> Any:
            # In one with the context: apart from it, torch binds the arguments to a signature at every call.
            output = self._body(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self._name, (torch.autograd.Function,), methods)


@functools.cache
def _kernel(module: str, function: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"genfast.kernels.{module}"), function)


def register(name: str, module: str, function: str, mutates: tuple[str, ...] = ()) -> Op:
    """Register ``genfast::name`` over ``function`` of ``genfast.kernels.module`` and of ``genfast.reference.module``.

    Both take the same arguments, and the reference's annotations are the schema; the first argument, a tensor, decides
    the path. The kernel module is imported at the first launch.
    """
    reference = getattr(importlib.import_module(f"genfast.reference.{module}"), function)

    def body(*args: Any) -> Any:
        if path(args[0].device, args[0].dtype)[0] == "reference":
            return reference(*args)
        return _kernel(module, function)(*args)

    def keyed_body(*args: Any) -> Any:
        return body(*args[:-1])

    signature = inspect.signature(reference, eval_str=True)
    # Without defaults: the dispatcher leaves out trailing arguments that equal theirs.
    arguments = [p.replace(default=inspect.Parameter.empty) for p in signature.parameters.values()]
    arguments.append(inspect.Parameter("source", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=str))
    keyed_body.__signature__ = signature.replace(parameters=arguments)
    if INTERPRETED and HAS_TRITON:
        from genfast.kernels.launch import recording

        def fake(*args: Any) -> Any:
            with recording():
                return keyed_body(*args)

        op = torch.library.custom_op(f"genfast::{name}", keyed_body, mutates_args=mutates)
        op.register_fake(fake)
    else:
        with _quiet_without_triton():
            op = torch.library.triton_op(f"genfast::{name}", keyed_body, mutates_args=mutates)
    _OPS[name] = op
    mutated = tuple(index for index, argument in enumerate(signature.parameters) if argument in mutates)
    return Op(name, op, body, mutated)


def is_traced(tensor: Tensor) -> bool:
    """Whether an op's autograd formula is being traced: what it does then must be functional."""
    return type(tensor) is not Tensor or torch.compiler.is_compiling()
