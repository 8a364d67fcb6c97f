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
    """Notes SIGTERM and SIGINT inside the block; a second SIGINT (Ctrl-C) does what it did before the block.

    A second SIGTERM does no more than the first: torchrun passes on to its processes what a batch system has already
    sent to all of them. Signals reach the main thread alone: in any other one nothing is installed.

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
            # Known before anything is installed: a signal may come at any line.
            self._before = {number: signal.getsignal(number) for number in self._SIGNALS}
            for number in self._SIGNALS:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number in list(self._before):
            self._restore(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            self._restore(number)

    def _restore(self, number: int) -> None:
        handler = self._before.get(number)
        # None stands for a handler that was not installed from Python, which Python cannot put back.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.pop(number, None)
