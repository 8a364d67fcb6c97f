"""The training loss of diffusion, with the noise of the images made again instead of read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from genfast.functional import _checks
from genfast.functional._register import register
from genfast.functional._stored import may_store, reduced, register_stored_gradient
from genfast.functional.q_sample import Noised, entries
from genfast.reference._linear_gaussian import (
    OBJECTIVES,
    WEIGHTINGS,
    gathered,
    target_coefficients,
    wide_rows,
)
from genfast.schedules import Schedule

_op = register("denoising_loss", "denoising_loss", "forward")
_op_backward = register("denoising_loss_backward", "denoising_loss", "backward")
_op_with_grad = register("denoising_loss_with_grad", "denoising_loss", "forward_with_grad")

register_stored_gradient(_op_with_grad, _op_backward)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tensors, ctx.options = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_loss: Tensor) -> tuple:
    pred, x0, a, b, t, seed, noise = ctx.saved_tensors
    grad = _op_backward(pred, x0, a, b, t, seed, noise, *ctx.options, grad_loss)
    _, wants_x0, _, _, _, _, wants_noise, *_ = ctx.needs_input_grad
    grad_x0 = grad_noise = None
    if wants_x0 or wants_noise:
        # Rare, so plain PyTorch: the target is linear in both.
        _, objective, _, _, sigma_data = ctx.options
        p, q = target_coefficients(gathered(a, t), gathered(b, t), objective, sigma_data)
        grad_x0 = (-wide_rows(p, grad) * grad).to(x0.dtype) if wants_x0 else None
        grad_noise = (-wide_rows(q, grad) * grad).to(noise.dtype) if wants_noise else None
    return (grad if ctx.needs_input_grad[0] else None), grad_x0, *(None,) * 4, grad_noise, *(None,) * len(ctx.options)


_op.register_autograd(_backward, setup_context=_setup_context)


def denoising_loss(
    pred: Tensor,
    noised: Noised,
    schedule: Schedule,
    *,
    objective: str | None = None,
    weighting: str = "none",
    gamma: float = 5.0,
    reduction: str = "none",
) -> Tensor:
    """The weighted mean square error of what a network says about `noised.x_t`: w mean((pred - (p x0 + q eps))^2).

    The noise is made again in registers, so no tensor of it exists between the two calls. With (a, b) of the schedule,
    the objectives are ``"epsilon"`` (p, q) = (0, 1), ``"x0"`` (1, 0), ``"v"`` (-b, a) (Salimans and Ho, "Progressive
    distillation", 2022), ``"flow"`` (-1, 1) (Liu, Gong and Liu, "Flow straight and fast", 2022), and ``"edm"``, the
    raw network's target in Karras et al., "Elucidating the design space", 2022, equation 8.

    Every weighting is a weight of the squared error of x0, translated to the objective by (b / det)^2, where det =
    a q - b p: ``"min_snr"`` is min(SNR, gamma) (Hang et al., "Efficient diffusion training via min-SNR weighting",
    2023; defined at SNR 0, where it gives 1 for epsilon and 0 for v), ``"sigma"`` is Karras et al.'s
    (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 with sigma = b / a (infinite for epsilon at SNR 0, and for x0 where
    there is no noise).

    Args:
        pred: the network's output, of the shape of noised.x0, fp32, bf16 or fp16 (fp64 runs the reference).
        noised: from `q_sample`.
        schedule: the one that `q_sample` had.
        objective: what pred is; None: the schedule's `default_objective`.
        weighting: ``"none"``, ``"min_snr"`` or ``"sigma"``.
        gamma: of min-SNR, at least 0.
        reduction: ``"none"`` gives [B]; ``"mean"`` and ``"sum"``, over the batch, give a scalar and, where pred needs a
            gradient, write it in the same pass (backward then moves nothing when the incoming gradient is 1).

    Returns:
        fp32 [B] or scalar.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: shapes or devices differ, or a name is unknown.

    A second derivative is not implemented and says so.

    Example:
        >>> import torch
        >>> from genfast import schedules
        >>> from genfast.functional import q_sample
        >>> schedule = schedules.linear(1000)
        >>> noised = q_sample(torch.rand(4, 1, 28, 28) * 2 - 1, None, schedule)
        >>> pred = torch.zeros(4, 1, 28, 28, requires_grad=True)
        >>> loss = denoising_loss(pred, noised, schedule, weighting="min_snr", reduction="mean")
        >>> loss.backward()
        >>> loss.shape, pred.grad.shape
        (torch.Size([]), torch.Size([4, 1, 28, 28]))
    """
    _checks.floating("pred", pred)
    if not isinstance(noised, Noised):
        raise TypeError(f"noised: expected what q_sample returns, got {type(noised).__name__}")
    _checks.same_shape("pred", pred, "noised.x0", noised.x0)
    objective = schedule.default_objective if objective is None else objective
    _checks.choice("objective", objective, OBJECTIVES)
    _checks.choice("weighting", weighting, WEIGHTINGS)
    _checks.choice("reduction", reduction, ("none", "mean", "sum"))
    gamma = _checks.non_negative("gamma", gamma)
    a, b, index = entries(schedule, noised.t)
    reads_x0, reads_noise = objective != "epsilon", objective != "x0"
    x0 = noised.x0 if reads_x0 else None
    seed, noise = (noised.seed, noised.noise) if reads_noise else (None, None)
    arguments = (
        pred, x0, a, b, index, seed, noise, noised.row_offset, objective, weighting, gamma, float(schedule.sigma_data),
    )  # fmt: skip
    if reduction != "none" and may_store(pred, x0, noise):
        return _op_with_grad(*arguments, reduction == "mean")[0]
    return reduced(_op(*arguments), reduction)
