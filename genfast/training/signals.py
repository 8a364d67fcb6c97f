"""Stopping a run from outside: SIGTERM and Ctrl-C as a request that is met between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

__all__ = ["Interrupted", "StopRequests"]


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has written a checkpoint.

    Attributes:
        signal: number of the signal: SIGINT for Ctrl-C, SIGTERM.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal = signal_number


class StopRequests:
    """Notes the first SIGTERM or SIGINT inside the block; a second one does what it did before the block.

    Signals reach the main thread alone: in any other one nothing is installed.

    Example:
        >>> with StopRequests() as requests:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     requests.received == signal.SIGTERM
        True
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not installed from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
