"""Truth for the couplings in fp64: transformations and Jacobians of torch.distributions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions.transforms import AffineTransform, SigmoidTransform, TanhTransform

from genfast.cases import Case, Inputs, Outputs


def affine_coupling(case: Case, inputs: Inputs) -> Outputs:
    half, params = inputs["half"], inputs["params"]
    if case.setting == "normflows":
        t, s = params.unflatten(1, (-1, 2)).unbind(2)
        return _with_logdet(AffineTransform(t, 1 / SigmoidTransform()(s + 2)), half)
    s, t = params.tensor_split(2, 1)
    if case.setting == "atan-inside-inverse":
        scale = torch.exp(0.636 * 2 * torch.atan2(s, torch.full_like(s, 2.0)))
        return _with_logdet(AffineTransform(t * scale, scale).inv, half)
    return _with_logdet(AffineTransform(t, torch.exp(2 * TanhTransform()(s))), half)


def _with_logdet(transform: AffineTransform, x: Tensor) -> Outputs:
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y).sum(-1)
