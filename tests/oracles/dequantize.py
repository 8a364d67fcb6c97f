"""Truth for dequantization and logit from the transforms of torch.distributions in fp64."""

from __future__ import annotations

from torch import Tensor
from torch.distributions.transforms import AffineTransform, ComposeTransform, SigmoidTransform, Transform

from genfast.cases import SEED, Case, Inputs, Outputs
from genfast.random import Stream, uniform


def pixels_to_logits(alpha: float) -> Transform:
    """x + u in [0, 256) to y."""
    scaled = AffineTransform(0.0, 1 / 256), AffineTransform(alpha, 1 - 2 * alpha)
    return ComposeTransform([*scaled, SigmoidTransform().inv])


def dequantize_logit(case: Case, inputs: Inputs) -> Outputs:
    transform = pixels_to_logits(0.05)
    if case.setting == "inverse":
        y = inputs["logit"]
        x = transform.inv(y)
        return x.floor(), _summed(-transform.log_abs_det_jacobian(x, y))
    x = inputs["x"]
    u = inputs["u"] if "u" in inputs else uniform(SEED, *x.shape, Stream.DEQUANTIZE, bits=15).double()
    y = transform(x + u)
    return y, _summed(transform.log_abs_det_jacobian(x + u, y))


def _summed(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)
