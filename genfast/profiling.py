"""Named ranges in a profile: the phases of a step, each op with its shape and dtype, each node of the backward pass.

Ranges go to the NVTX domain "genfast", which Nsight Systems and Nsight Compute show and filter by, and, while
torch.profiler records, into its trace. They are off unless GENFAST_NVTX=1 is in the environment or `enable` was called.
They belong to eager code alone: no graph of torch.compile or torch.export holds one, or depends on the switch.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ["annotate", "backward", "disable", "each", "enable", "enabled", "range"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T")

# The switch. Code that torch.compile may trace asks is_dynamo_compiling() first: a graph would be guarded by it, and
# compiled anew when it turns.
on = False
_domain: Any = None


def enable() -> None:
    """Open ranges from now on, in all threads.

    Raises:
        ImportError: the package nvtx is not installed.

    Example:
        >>> enable()
        >>> disable()
    """
    global on, _domain
    try:
        import nvtx
    except ImportError as error:
        raise ImportError("genfast.profiling: expected the package nvtx, got none: pip install nvtx") from error
    _domain = nvtx.get_domain("genfast")
    on = True


def disable() -> None:
    """Open no more ranges; those that are open close where they would have closed.

    Example:
        >>> disable()
    """
    global on
    on = False


@contextmanager
def enabled() -> Iterator[None]:
    """Ranges on inside the block, for all threads; afterwards as before.

    Raises:
        ImportError: the package nvtx is not installed.

    Example:
        >>> from genfast import VAE
        >>> with enabled():
        ...     images = VAE().sample(4)
    """
    before = on
    enable()
    try:
        yield
    finally:
        if not before:
            disable()


def range(name: str) -> AbstractContextManager[None]:
    """A range around a block.

    Args:
        name: what the profile shows.

    Example:
        >>> with range("augment"):
        ...     images = torch.rand(8, 1, 28, 28).flip(3)
    """
    return _Range(name) if _wanted() else nullcontext()


def annotate(name: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A range around each call of the decorated function.

    Args:
        name: what the profile shows.

    Example:
        >>> @annotate("augment")
        ... def augment(images):
        ...     return images.flip(3)
        >>> augment(torch.rand(8, 1, 28, 28)).shape
        torch.Size([8, 1, 28, 28])
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def annotated(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if not _wanted():
                return function(*args, **kwargs)
            with _Range(name):
                return function(*args, **kwargs)

        return annotated

    return decorate


def each(name: str, items: Iterable[_T]) -> Iterator[_T]:
    """The items, with a range around the making of each (and around finding that there are no more).

    Args:
        name: what the profile shows.
        items: such as the batches of a `DataLoader`: the range is the time that a loop waits for one.

    Example:
        >>> [len(batch) for batch in each("data", [[1, 2], [3]])]
        [2, 1]
    """
    iterator, end = iter(items), object()
    while True:
        with range(name):
            item = next(iterator, end)
        if item is end:
            return
        yield item


def backward(loss: Tensor, **kwargs: Any) -> None:
    """``loss.backward(**kwargs)`` in a range "backward", and each node of its graph in a range of its own.

    The backward of CUDA tensors runs on a thread of autograd's own, where nothing that the caller opens is open. The
    ranges of the nodes, "backward AddmmBackward0" and the like, are opened by whichever thread runs the node.

    Args:
        loss: the tensor to differentiate.
        kwargs: those of `torch.Tensor.backward`.

    Example:
        >>> x = torch.ones(3, requires_grad=True)
        >>> backward(x.square().sum())
        >>> x.grad
        tensor([2., 2., 2.])
    """
    if not _wanted():
        loss.backward(**kwargs)
        return
    with _Range("backward"), _ranges_of_nodes(loss.grad_fn):
        loss.backward(**kwargs)


def _wanted() -> bool:
    """Whether ranges are on and nothing is being traced."""
    return not is_dynamo_compiling() and on and not torch.compiler.is_compiling()


class _Range:
    """One range. It closes what it opened, whatever was switched in between."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        # record_function is an op: a dispatch mode, such as that of make_fx, would write it into its graph.
        recorded = torch.autograd._profiler_enabled() and _get_current_dispatch_mode() is None
        self.record = torch.profiler.record_function(self.name) if recorded else nullcontext()
        _domain.push_range(_attributes(self.name))
        self.record.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.record.__exit__(*error)
        _domain.pop_range()


@functools.lru_cache(maxsize=1024)
def _attributes(name: str) -> Any:
    # With the text as a registered string: Nsight Systems finds the range of --nvtx-capture among those alone.
    return _domain.get_event_attributes(message=name)


@contextmanager
def _ranges_of_nodes(root: Any) -> Iterator[None]:
    """Ranges around the nodes of the graph behind `root`, on the threads that run them, for one backward pass."""
    running = _Pass()
    handles = []
    for node in _nodes(root):
        handles.append(node.register_prehook(functools.partial(running.open, node.name().rpartition("::")[2])))
        handles.append(node.register_hook(running.close))
    try:
        yield
    finally:
        running.over = True
        _close_left_open()
        # A graph that is kept, and a parameter's AccumulateGrad, outlive the pass.
        for handle in handles:
            handle.remove()


def _nodes(root: Any) -> set[Any]:
    """All nodes of a graph, once each; a loop, for graphs are deeper than Python's stack."""
    found, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return found


class _Thread(threading.local):
    """The node ranges that are open on this thread, innermost last, each with its pass."""

    def __init__(self) -> None:
        self.open: list[tuple[_Pass, _Range]] = []


_thread = _Thread()


class _Pass:
    """The hooks of one backward pass. Compiled autograd would trace them into its graph, where they do nothing."""

    over = False

    def open(self, name: str, *_: Any) -> None:
        if is_dynamo_compiling():
            return
        _close_left_open()
        node = _Range(f"backward {name}")
        node.__enter__()
        _thread.open.append((self, node))

    def close(self, *_: Any) -> None:
        # Nothing is open where another thread's pass, through the same parameter, hooked this node while it ran.
        if not is_dynamo_compiling() and _thread.open:
            _thread.open.pop()[1].__exit__(None, None, None)


def _close_left_open() -> None:
    """A node that raises never gets to its second hook; each thread closes such ranges itself, when it is next here."""
    while _thread.open and _thread.open[-1][0].over:
        _thread.open.pop()[1].__exit__(None, None, None)


if os.environ.get("GENFAST_NVTX") == "1":
    enable()
