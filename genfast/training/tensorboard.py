"""What TensorBoard shows of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from torch import Tensor, nn

from genfast.models.base import Model
from genfast.training.distributed import is_sharded

__all__ = ["Board"]

_SAMPLES = 64
# Of a model that takes many steps: as dear as training on about 130 images.
_FEW, _STEPS = 16, 25
_NOT_SHOWN = ("epoch", "warning")


class Board:
    """Scalars and samples of a run, written for TensorBoard; nothing without a folder.

    Args:
        folder: of the event files; None for none.
        steps: steps that are done: what an interrupted run wrote beyond them is left out.

    Raises:
        ImportError: the package tensorboard is not installed.

    Example:
        >>> with Board(None) as board:
        ...     board.epoch(10, {"epoch": 1, "loss": 100.0}, nn.Identity())
    """

    def __init__(self, folder: str | os.PathLike[str] | None, steps: int = 0) -> None:
        self.writer = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            message = "tensorboard: expected the package tensorboard, got none: pip install tensorboard"
            raise ImportError(message) from error
        _wait_for_a_later_name(Path(folder))
        self.writer = SummaryWriter(os.fspath(folder), purge_step=steps + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.writer is not None:
            self.writer.close()

    def step(self, steps: int, values: Mapping[str, Tensor]) -> None:
        """The parts of one step's loss; waits for the device."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"step/{name}", float(value), steps)

    def epoch(self, steps: int, row: Mapping[str, float], model: nn.Module) -> None:
        """A row of the history, and samples of a genfast model that can draw some."""
        if self.writer is None:
            return
        for name, value in row.items():
            if name not in _NOT_SHOWN:
                group = "test" if name.startswith("test_") else "epoch"
                self.writer.add_scalar(f"{group}/{name.removeprefix('test_')}", value, steps)
        # Rank 0 alone is here, and a sharded model needs all. What others call `sample` may take other arguments.
        if isinstance(model, Model) and hasattr(model, "sample") and not is_sharded(model):
            quick = getattr(model, "quick_sampling", None)
            options = {"n": _SAMPLES} if quick is None else {"n": _FEW, **quick(_STEPS)}
            # One seed for all epochs, so that the pictures show the model's change alone.
            self.writer.add_images("samples", model.sample(**options, seed=0).clamp(0, 1), steps)
        self.writer.flush()


def _wait_for_a_later_name(folder: Path) -> None:
    """TensorBoard reads event files by name, which begins with the second: within one their order is not sure."""
    seconds = {path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")}
    while f"{int(time.time()):010d}" in seconds:
        time.sleep(0.02)
