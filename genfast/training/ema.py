"""The running average of a model's weights, which is what one samples from."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["EMA"]


class EMA:
    """Exponential moving average of the parameters; buffers are taken over as they are.

    A model's attribute ``averaged``, where it is not empty, names the submodules whose parameters are averaged, as the
    generator of a GAN; the others are taken over as they are, too.

    After n updates the next one moves the average ``1 - min(decay, (1 + n) / (10 + n))`` of the way to the weights, so
    that the initial weights are soon forgotten. All of it is done on the device, and can be held by a CUDA graph.

    Args:
        model: what is averaged. `module` is a copy of it in eval mode.
        decay: in (0, 1), such as 0.999.

    Raises:
        ValueError: `decay` is out of range.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> ema = EMA(model, decay=0.5)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> for _ in range(3):
        ...     ema.update()
        >>> [round(float(weight), 3) for weight in ema.module.parameters()]
        [0.995]
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay: expected a number between 0 and 1, got {decay}")
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        averaged = tuple(f"{name}." for name in getattr(model, "averaged", ()))
        names = [name for name, _ in model.named_parameters() if not averaged or name.startswith(averaged)]
        self._average, self._weights = ([of.get_parameter(name) for name in names] for of in (self.module, model))
        self._own = {id(parameter) for parameter in self._weights}
        copied = [*zip(self.module.parameters(), model.parameters(), strict=True)]
        copied = [(copy, weight) for copy, weight in copied if id(weight) not in self._own]
        self._copied = [*copied, *zip(self.module.buffers(), model.buffers(), strict=True)]
        device = self._weights[0].device if self._weights else None
        self.updates = torch.zeros((), device=device)

    @torch.no_grad()
    def update(self, accepted: Tensor | None = None) -> None:
        """Take the present weights in.

        Args:
            accepted: a bool scalar on the device; where it is False nothing changes.
        """
        move = 1 - torch.clamp((1 + self.updates) / (10 + self.updates), max=self.decay)
        if accepted is None:
            self.updates += 1
        else:
            move = move * accepted
            self.updates += accepted
        way = torch._foreach_sub(self._weights, self._average)
        torch._foreach_mul_(way, move)
        torch._foreach_add_(self._average, way)
        for taken_over, tensor in self._copied:
            taken_over.copy_(tensor)

    def averages(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether one of the model's parameters is among those that are averaged."""
        return any(id(parameter) in self._own for parameter in parameters)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Put the averaged weights into `model`."""
        model.load_state_dict(self.module.state_dict())

