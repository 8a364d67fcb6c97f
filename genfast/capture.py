"""A step, of training or of sampling, as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

__all__ = ["Captured"]

_T = TypeVar("_T")
# Ordinary calls before the capture: libraries choose their algorithms, compilers compile, optimizers make their state.
_WARM_UP = 3


class Captured(Generic[_T]):
    """A function of fixed device memory, recorded at its fourth call and replayed from then on.

    Every call does the function's work once: the first three as they are, on the stream that will be captured. If it
    cannot be captured, one warning says why and it goes on being called as it is.

    Args:
        function: reads and writes the same tensors at every call, and never waits for the device.
        device: a CUDA device.
        name: what the warning calls it.
    """

    def __init__(
        self, function: Callable[[], _T], device: torch.device, name: str = "mode graph: the step"
    ) -> None:
        self.function = function
        self.name = name
        self.stream = torch.cuda.Stream(device)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: _T
        self.failed = False

    def __call__(self) -> _T:
        """The function's result: from the capture on, the same tensors with new values."""
        if self.graph is not None:
            self.graph.replay()
            return self.result
        self.calls += 1
        if self.calls == _WARM_UP and not self.failed:
            return self._call_watched()
        if self.calls > _WARM_UP and not self.failed and self._capture():
            return self()
        return self._call_on_stream()

    def _call_watched(self) -> _T:
        """A call that tells whether the function waits for the device: a capture that fails for it costs memory."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = self._call_on_stream()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = [warning for warning in caught if "synchronizing" in str(warning.message)]
        for warning in caught:
            if warning not in waits:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        if waits:
            self.failed = True
            at = f"{waits[0].filename}:{waits[0].lineno}"
            warnings.warn(f"{self.name} waits for the device ({at}); steps run eagerly", stacklevel=5)
        return result

    def _call_on_stream(self) -> _T:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = self.function()
        current.wait_stream(self.stream)
        return result

    def _capture(self) -> bool:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.stream.device)
        generator = torch.cuda.default_generators[self.stream.device.index]
        generator_state = generator.clone_state()
        try:
            # Of this thread alone: another one may be pinning and copying the next batches meanwhile.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = self.function()
        except Exception as error:
            # Whatever it is, the same call outside a capture has worked three times.
            self.failed = True
            # Up to torch 2.11 a capture that fails stays the current stream's and the generator's.
            torch.cuda.set_stream(current)
            generator.graphsafe_set_state(generator_state)
            torch.cuda.synchronize(self.stream.device)
            reason = _reason(error)
            warnings.warn(f"{self.name} cannot be captured ({reason}); steps run eagerly", stacklevel=4)
            return False
        self.graph = graph
        return True


def _reason(error: BaseException) -> str:
    """The first line of the first error: ending a capture that has failed raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
