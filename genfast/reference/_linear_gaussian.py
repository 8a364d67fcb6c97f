"""What an objective asks of the network, and how much each sample's error counts, from a and b of x_t = a x0 + b eps.

Every formula holds for any schedule: with det = a q - b p, x0 = (q x_t - b target) / det and
eps = (a target - p x_t) / det.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.reference._math import compute_dtype, rows_like

# In the order by which the kernels number them.
OBJECTIVES = ("epsilon", "x0", "v", "flow", "edm")
WEIGHTINGS = ("none", "min_snr", "sigma")


def target_coefficients(a: Tensor, b: Tensor, objective: str, sigma_data: float) -> tuple[Tensor, Tensor]:
    """(p, q) of target = p x0 + q eps."""
    if objective == "epsilon":
        return torch.zeros_like(a), torch.ones_like(a)
    if objective == "x0":
        return torch.ones_like(a), torch.zeros_like(a)
    if objective == "v":
        return -b, a
    if objective == "flow":
        return -torch.ones_like(a), torch.ones_like(a)
    # Karras et al. 2022, eq. 8: (x0 - c_skip x) / c_out for x = x0 + sigma eps and sigma = b / a.
    scale = torch.rsqrt(b * b + (sigma_data * a) ** 2)
    return b * scale / sigma_data, -sigma_data * a * scale


def loss_weight(
    a: Tensor, b: Tensor, objective: str, weighting: str, gamma: float, sigma_data: float
) -> Tensor | None:
    """The weight of the squared error of the objective, from that of x0's squared error; None: 1."""
    if weighting == "none":
        return None
    p, q = target_coefficients(a, b, objective, sigma_data)
    det = a * q - b * p
    if weighting == "min_snr":
        # min(SNR, gamma) (b / det)^2; det is 0 for epsilon at SNR 0 and for x0 without noise: there it is the limit.
        weight = torch.minimum(a * a, gamma * b * b) / (det * det)
        return torch.where(det == 0, torch.where(a == 0, 1.0, gamma), weight)
    return (a * a + (b / sigma_data) ** 2) / (det * det)


def gathered(table: Tensor, t: Tensor | None) -> Tensor:
    """Each sample's entry of a table; the table itself where there is no t. NaN for a t outside."""
    if t is None:
        return table
    size = table.shape[-1]
    inside = (t >= 0) & (t < size)
    return torch.where(inside, table[..., t.clamp(0, size - 1)], torch.nan)


def clean(x0: Tensor, dtype: torch.dtype) -> Tensor:
    """x0 in the dtype of the computation; uint8 images become [-1, 1]."""
    return (x0.to(dtype) - 127.5) * (2 / 255) if x0.dtype == torch.uint8 else x0.to(dtype)


def wide_rows(values: Tensor, x: Tensor) -> Tensor:
    """[B] values in the dtype that x is computed in, shaped to broadcast against x."""
    return rows_like(values.to(compute_dtype(x)), x)
