"""x *= factor in place in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rescale(x: Tensor, factor: Tensor) -> None:
    """x *= factor in place."""
    x.mul_(factor.to(x.dtype) if x.dtype == torch.float64 else factor)
