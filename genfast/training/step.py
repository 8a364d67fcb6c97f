"""One optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genfast import profiling, random

__all__ = ["TrainStep"]


class TrainStep:
    """Loss, backward and optimizer step on one batch, without waiting for the device.

    Args:
        model: has ``loss(x, *, seed, row_offset, ...) -> {"loss": scalar, ...parts}``, as every genfast model.
        optimizer: over the model's parameters.
        grad_clip: largest norm of all gradients together; None leaves them as they are.
        amp_dtype: dtype for `torch.autocast` of the forward pass, such as torch.bfloat16; None for no autocast. (fp16
            would need loss scaling, and is refused.)
        loss_options: passed to ``model.loss`` at every step, such as ``{"beta": 4.0}``.
        compile: ``model.compile()`` first.

    Raises:
        ValueError: `grad_clip` is not positive, or `amp_dtype` is torch.float16.

    Example:
        >>> class Mean(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mean = nn.Parameter(torch.zeros(3))
        ...     def loss(self, x, *, seed=None, row_offset=0):
        ...         return {"loss": (x - self.mean).square().mean()}
        >>> model = Mean()
        >>> step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.5))
        >>> [round(float(step(torch.ones(8, 3))["loss"]), 3) for _ in range(3)]
        [1.0, 0.444, 0.198]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        grad_clip: float | None = None,
        amp_dtype: torch.dtype | None = None,
        loss_options: Mapping[str, Any] | None = None,
        compile: bool = False,
    ) -> None:
        if grad_clip is not None and not grad_clip > 0:
            raise ValueError(f"grad_clip: expected a positive number or None, got {grad_clip}")
        if amp_dtype is torch.float16:
            raise ValueError("amp_dtype: float16 needs loss scaling, which TrainStep has not; use torch.bfloat16")
        self.model = model
        self.optimizer = optimizer
        self.grad_clip = grad_clip
        self.amp_dtype = amp_dtype
        self.loss_options = dict(loss_options or {})
        if compile:
            model.compile()

    @profiling.annotate("step")
    def __call__(
        self, batch: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0
    ) -> dict[str, Tensor]:
        """Take one step.

        Args:
            batch: what ``model.loss`` takes, on the model's device.
            seed: of the step's noise: None (drawn from torch's generator), an int, or an int64 tensor [1].
            row_offset: global index of the batch's first row.

        Returns:
            The parts of the loss, and "grad_norm" (before clipping) where gradients are clipped: detached scalars on
            the device.
        """
        # A tensor, because a compiled loss would be specialised to each int.
        seed = random.as_seed(seed, batch.device)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            parts = self.model.loss(batch, seed=seed, row_offset=row_offset, **self.loss_options)
        profiling.backward(parts["loss"])
        values = {name: value.detach() for name, value in parts.items()}
        with profiling.range("optimizer"):
            if self.grad_clip is not None:
                values["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
            self.optimizer.step()
        return values
