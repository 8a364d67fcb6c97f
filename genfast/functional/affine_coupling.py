"""The transformation of a coupling layer, forth and back, with the log-determinant of its Jacobian, in one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genfast.functional import _checks
from genfast.functional._register import register
from genfast.reference._math import SCALE_MAPS

_op = register("affine_coupling", "affine_coupling", "forward")
_op_backward = register("affine_coupling_backward", "affine_coupling", "backward")
_op_from_output = register("affine_coupling_from_output_backward", "affine_coupling", "backward_from_output")

LAYOUTS = ("blocked", "interleaved")
ORDERS = ("scale_first", "shift_first")


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, params, learned, *ctx.options = inputs
    ctx.save_for_backward(x, params, learned)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_logdet: Tensor | None) -> tuple:
    rest = (None,) * len(ctx.options)
    if grad_y is None and grad_logdet is None:
        return None, None, None, *rest
    x, params, learned = ctx.saved_tensors
    grad_x, grad_params, grad_learned = _op_backward(x, params, learned, *ctx.options, grad_y, grad_logdet)
    return grad_x, grad_params, None if learned is None else grad_learned, *rest


_op.register_autograd(_backward, setup_context=_setup_context)


def affine_coupling(
    x: Tensor,
    params: Tensor,
    *,
    scale_map: str = "tanh",
    factor: float | Tensor = 2.0,
    min_scale: float = 0.0,
    layout: str = "blocked",
    order: str = "scale_first",
    shift_inside: bool = False,
    reciprocal: bool = False,
    checkerboard: int | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """y = scale x + t and log|det dy/dx| for the half x of a coupling layer; scale and t come from a network.

    Dinh et al., "Density estimation using Real NVP", 2017, equations 7 and 8. The network's output holds s and t for
    each element of x, and the scale is, by `scale_map`:

    - "tanh": exp(factor tanh(s)), within exp(-factor) and exp(factor); Real NVP, with its learned factor
    - "atan": exp(0.636 factor atan(s / factor)), the soft clamp of FrEIA, within the same bounds
    - "sigmoid": sigmoid(s + 2) + min_scale; Glow and normflows (without a least scale), nflows (1e-3)
    - "exp": exp(s), which has no bound and may overflow

    The halves of a channel split, every second column `x[:, ::2]` and channels_last are read in place, and the gradient
    of params comes back packed.

    Args:
        x: the half that is transformed, [B, C, ...], fp32, bf16 or fp16 (fp64 runs the reference); any strides. With
            `checkerboard` the whole image.
        params: [B, 2 C, ...], the network's output, in a dtype of its own: bf16 beside x in fp32 under autocast.
        scale_map: one of the above.
        factor: a finite number above 0; for "tanh" also a learned tensor, [] or [C].
        min_scale: a finite number from 0, for "sigmoid".
        layout: "blocked": the first half of the channels of params is one of s and t, the second the other;
            "interleaved": they take turns.
        order: "scale_first": s, then t; "shift_first" (nflows and normflows).
        shift_inside: y = scale (x + t) instead (Glow).
        reciprocal: divides by the scale instead (the "sigmoid" of normflows).
        checkerboard: 0 or 1: x is an image [B, C, H, W] of even sides, of which the pixels at (h + w) % 2 ==
            checkerboard are transformed; y is [B, C, H, W / 2], and so is each part of params.
        inverse: x from y, which then comes in the place of x, and the log-determinant of the inverse.

    Returns:
        y, of x's shape (or half of the image) and dtype, and logdet, fp32 [B] in nats (fp64 for fp64).

    Raises:
        TypeError: an argument is no tensor, of an unsupported dtype, or no number.
        ValueError: shapes or devices do not match, one of x and params is fp64 and the other not, a learned factor
            where none is expected, an unknown name, a number out of its range, or an image of odd sides.

    A second derivative is not implemented and says so.

    Example:
        >>> x, params = torch.randn(4, 3, 8, 8), torch.randn(4, 6, 8, 8)
        >>> y, logdet = affine_coupling(x, params)
        >>> again, minus = affine_coupling(y, params, inverse=True)
        >>> torch.allclose(again, x, atol=1e-5), torch.allclose(minus, -logdet)
        (True, True)
    """
    board = _board(x, checkerboard)
    shape = x.shape if board < 0 else (*x.shape[:3], x.shape[3] // 2)
    options = _options(x, shape, params, scale_map, factor, min_scale, layout, order, shift_inside, reciprocal)
    return _op(x, params, *options, board, bool(inverse))


def backward_from_output(
    y: Tensor, params: Tensor, grad_y: Tensor | None, grad_logdet: Tensor | None, *,
    scale_map: str = "tanh", factor: float | Tensor = 2.0, min_scale: float = 0.0, layout: str = "blocked",
    order: str = "scale_first", shift_inside: bool = False, reciprocal: bool = False,
    checkerboard: int | None = None, inverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The backward of `affine_coupling` for one who kept y alone: (x, grad_x, grad_params, grad_factor or None).

    Of a checkerboard, y, x and grad_x are the halves [B, C, H, W / 2], since the rest of the image is not known here.
    """
    _checks.floating("y", y, dims=2)
    options = _options(y, y.shape, params, scale_map, factor, min_scale, layout, order, shift_inside, reciprocal)
    if grad_y is None and grad_logdet is None:
        raise ValueError("grad_y: expected a tensor where grad_logdet is None, got None")
    x, grad_x, grad_params, grad_factor = _op_from_output(y, params, *options, bool(inverse), grad_y, grad_logdet)
    return x, grad_x, grad_params, grad_factor if isinstance(factor, Tensor) else None


def _board(x: Tensor, checkerboard: int | None) -> int:
    """-1 for none."""
    _checks.floating("x", x, dims=2)
    if checkerboard is None:
        return -1
    if isinstance(checkerboard, bool) or checkerboard not in (0, 1):
        raise ValueError(f"checkerboard: expected None, 0 or 1, got {checkerboard!r}")
    if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"x: expected an image [B, C, H, W] with even H and W, got shape {list(x.shape)}")
    return checkerboard


def _options(
    x: Tensor, shape: tuple[int, ...], params: Tensor, scale_map: str, factor: float | Tensor, min_scale: float,
    layout: str, order: str, shift_inside: bool, reciprocal: bool,
) -> tuple:
    """What the ops take after params, but for the checkerboard and the direction."""
    _checks.choice("scale_map", scale_map, SCALE_MAPS)
    _checks.choice("layout", layout, LAYOUTS)
    _checks.choice("order", order, ORDERS)
    _check_params(x, shape, params)
    learned = None
    if isinstance(factor, Tensor):
        _check_learned(x, factor, scale_map)
        learned, factor = factor, 1.0
    elif isinstance(factor, bool) or not isinstance(factor, (int, float)):
        raise TypeError(f"factor: expected a number or a tensor, got {type(factor).__name__}")
    elif not 0 < factor < math.inf:
        raise ValueError(f"factor: expected a finite number > 0, got {factor}")
    min_scale = _checks.non_negative("min_scale", min_scale)
    if min_scale and scale_map != "sigmoid":
        raise ValueError(f"min_scale: expected 0 for scale_map {scale_map!r}, got {min_scale}")
    layouts = layout == "interleaved", order == "shift_first"
    return learned, scale_map, float(factor), min_scale, *layouts, bool(shift_inside), bool(reciprocal)


def _check_params(x: Tensor, shape: tuple[int, ...], params: Tensor) -> None:
    _checks.floating("params", params, dims=2)
    wanted = [shape[0], 2 * shape[1], *shape[2:]]
    if list(params.shape) != wanted:
        raise ValueError(f"params: expected s and t for x, shape {wanted}, got {list(params.shape)}")
    if params.device != x.device:
        raise ValueError(f"params: expected the device of x, {x.device}, got {params.device}")
    if (params.dtype == torch.float64) != (x.dtype == torch.float64):
        raise ValueError(f"params: expected fp64 beside x in fp64 and only there, got {params.dtype} beside {x.dtype}")


def _check_learned(x: Tensor, factor: Tensor, scale_map: str) -> None:
    _checks.floating("factor", factor, dims=0)
    if scale_map != "tanh":
        raise ValueError(f"factor: expected a number for scale_map {scale_map!r}, got a tensor")
    if factor.shape not in ((), (x.shape[1],)):
        raise ValueError(f"factor: expected shape [] or [{x.shape[1]}], got {list(factor.shape)}")
    if factor.device != x.device:
        raise ValueError(f"factor: expected the device of x, {x.device}, got {factor.device}")
