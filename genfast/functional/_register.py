"""How an op comes into being: one operator name over a Triton kernel and a PyTorch reference.

On CUDA the op is traced through to its kernel, so Inductor launches it without copies; on other devices it is traced
through to the reference, which Inductor fuses. Under TRITON_INTERPRET=1 it is opaque and runs the kernel on the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_FORCE_REFERENCE = os.environ.get("GENFAST_REFERENCE") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None

_OPS: dict[str, Any] = {}


def path(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """("triton" | "reference", why) for a tensor of this device and dtype."""
    if _FORCE_REFERENCE:
        return "reference", "GENFAST_REFERENCE=1"
    if dtype == torch.float64:
        return "reference", "kernels compute in fp32, the input is fp64"
    if not _HAS_TRITON:
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
    return {name: path(device) for name in sorted(_OPS) if not name.endswith(("_backward", "_rescale"))}


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


def register(name: str, module: str, function: str, mutates: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Register ``genfast::name`` over ``function`` of ``genfast.kernels.module`` and of ``genfast.reference.module``.

    Both take the same arguments, and the reference's annotations are the schema; the first argument, a tensor, decides
    the path. The kernel module is imported at the first launch.
    """
    reference = getattr(importlib.import_module(f"genfast.reference.{module}"), function)

    def body(*args: Any) -> Any:
        if path(args[0].device, args[0].dtype)[0] == "reference":
            return reference(*args)
        return getattr(importlib.import_module(f"genfast.kernels.{module}"), function)(*args)

    signature = inspect.signature(reference, eval_str=True)
    # Without defaults: the dispatcher leaves out trailing arguments that equal theirs.
    arguments = [p.replace(default=inspect.Parameter.empty) for p in signature.parameters.values()]
    body.__signature__ = signature.replace(parameters=arguments)
    if INTERPRETED and _HAS_TRITON:
        from genfast.kernels.launch import recording

        def fake(*args: Any) -> Any:
            with recording():
                return body(*args)

        op = torch.library.custom_op(f"genfast::{name}", body, mutates_args=mutates)
        op.register_fake(fake)
    else:
        with _quiet_without_triton():
            op = torch.library.triton_op(f"genfast::{name}", body, mutates_args=mutates)
    _OPS[name] = op
    return op


def is_traced(tensor: Tensor) -> bool:
    """Whether an op's autograd formula is being traced: what it does then must be functional."""
    return type(tensor) is not Tensor or torch.compiler.is_compiling()
