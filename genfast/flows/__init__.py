"""Transforms of normalizing flows: invertible maps with their log-determinants, which `genfast.Flow` composes."""

from genfast.flows._transform import Halves, Mask, Transform, divide, join
from genfast.flows.coupling import Coupling, MixtureCoupling
from genfast.flows.dequantize import ConditionalFlow, Dequantize, Logit, VariationalDequantize
from genfast.flows.linear import ActNorm, InvertibleConv1x1
from genfast.flows.shape import Permute, Split, Squeeze

__all__ = [
    "ActNorm",
    "ConditionalFlow",
    "Coupling",
    "Dequantize",
    "Halves",
    "InvertibleConv1x1",
    "Logit",
    "Mask",
    "MixtureCoupling",
    "Permute",
    "Split",
    "Squeeze",
    "Transform",
    "VariationalDequantize",
    "divide",
    "join",
]
