"""The elementwise map of Flow++: the distribution function of a mixture of logistics, its logit, then an affine map."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genfast.functional import _checks
from genfast.functional._register import register
from genfast.reference.mixture_logistic_coupling import SCALE_MAPS

_op = register("mixture_logistic_coupling", "mixture_logistic_coupling", "forward")
_op_backward = register("mixture_logistic_coupling_backward", "mixture_logistic_coupling", "backward")


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, params, *ctx.options, ctx.keep = inputs
    y, _, stats = output
    # Of the inverse the gradient is that at its result.
    ctx.save_for_backward(y if ctx.options[-1] else x, params, stats)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_logdet: Tensor | None, _: Tensor | None) -> tuple:
    nothing = (None,) * 8
    if grad_y is None and grad_logdet is None:
        return nothing
    if not ctx.keep:
        raise RuntimeError("mixture_logistic_coupling: expected a call with gradients enabled before its backward")
    return (*_op_backward(*ctx.saved_tensors, *ctx.options, grad_y, grad_logdet), *nothing[2:])


_op.register_autograd(_backward, setup_context=_setup_context)


def mixture_logistic_coupling(
    x: Tensor,
    params: Tensor,
    *,
    num_components: int,
    scale_map: str = "tanh",
    factor: float = 2.0,
    min_log_scale: float = -7.0,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Transform each element by a mixture of logistics of its own, given by the network on the other half.

    ``y = exp(log_scale(s)) logit(F(x)) + t`` with ``F(x) = sum_k softmax(pi)_k sigmoid((x - mu_k) / s_k)``: Ho, Chen,
    Srinivas, Duan and Abbeel, "Flow++", 2019, equations 12 to 14. One pass over the components, whose terms never
    reach memory; both tails of F are summed as logarithms, so x may lie thousands of s_k away from all of them. The
    inverse has no closed form: Newton's method within a bracket, and bisection where that would leave it, runs
    in the kernel until the tile has converged; the host waits for nothing.

    Args:
        x: [B, C, ...], the half to transform, fp32, bf16 or fp16 (fp64 runs the reference); any strides, so that a half
            of the channels is read in place.
        params: [B, (2 + 3 K) C, ...], read in place as 2 + 3 K blocks of C channels: s, t, then K blocks of logits pi,
            K of means mu and K of log-scales log(s_k). May have another dtype than x: nothing is copied.
        num_components: K; each one compiles a kernel.
        scale_map: ``"tanh"``: log_scale(s) = factor tanh(s), which keeps the scale within exp(+-factor); ``"exp"``: s.
        factor: the bound of ``"tanh"``, a finite number above 0.
        min_log_scale: log-scales below it count as it, and get no gradient.
        inverse: take y and return x.

    Returns:
        y (x with `inverse`), [B, C, ...] of the dtype of what came in, and the log-determinant of the map that was
        taken, fp32 [B] in nats (fp64 for fp64), summed over the elements.

        The inverse is as exact as fp32 knows logit(F): to 1e-6, but where F is flat, as between components that are
        many s_k apart, any x whose y differs only by rounding.

    Raises:
        TypeError: an argument is no tensor, of an unsupported dtype, or no number.
        ValueError: shapes or devices do not fit, a name is unknown, or a number is out of its range.

    Differentiable in x and params, in both directions. A second derivative is not implemented and says so.

    Example:
        >>> import torch
        >>> x, params = torch.randn(4, 3, 8, 8), torch.randn(4, (2 + 3 * 5) * 3, 8, 8)
        >>> y, logdet = mixture_logistic_coupling(x, params, num_components=5)
        >>> again, back = mixture_logistic_coupling(y, params, num_components=5, inverse=True)
        >>> y.shape, bool((again - x).abs().max() < 1e-3), torch.allclose(back, -logdet, atol=1e-2)
        (torch.Size([4, 3, 8, 8]), True, True)
    """
    _checks.floating("x", x, dims=2)
    _checks.floating("params", params, dims=2)
    if isinstance(num_components, bool) or not isinstance(num_components, int):
        raise TypeError(f"num_components: expected an int, got {type(num_components).__name__}")
    if num_components < 1:
        raise ValueError(f"num_components: expected an int >= 1, got {num_components}")
    _checks.choice("scale_map", scale_map, SCALE_MAPS)
    factor, min_log_scale = check_numbers(factor, min_log_scale)
    blocks = 2 + 3 * num_components
    wanted = [x.shape[0], blocks * x.shape[1], *x.shape[2:]]
    if list(params.shape) != wanted:
        raise ValueError(
            f"params: expected {blocks} channels for each of x's with num_components={num_components}, {wanted}, "
            f"got {list(params.shape)}"
        )
    if params.device != x.device:
        raise ValueError(f"params: expected the device of x, {x.device}, got {params.device}")
    keep = torch.is_grad_enabled() and (x.requires_grad or params.requires_grad)
    y, logdet, _ = _op(x, params, num_components, scale_map, factor, min_log_scale, bool(inverse), keep)
    return y, logdet


def check_numbers(factor: float, min_log_scale: float) -> tuple[float, float]:
    """Both as floats: factor above 0, min_log_scale finite."""
    for name, value in (("factor", factor), ("min_log_scale", min_log_scale)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 < factor < math.inf:
        raise ValueError(f"factor: expected a finite number > 0, got {factor}")
    if not -math.inf < min_log_scale < math.inf:
        raise ValueError(f"min_log_scale: expected a finite number, got {min_log_scale}")
    return float(factor), float(min_log_scale)
