"""One step of the reverse process: DDPM's ancestral sampling, DDIM, Euler steps, and the density of what was drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genfast.functional import _checks
from genfast.functional._register import register
from genfast.functional.forward_noising import resolve_noise
from genfast.functional.q_sample import check_constant
from genfast.random import is_plain
from genfast.reference._linear_gaussian import OBJECTIVES
from genfast.reference.reverse_step import VARIANCES, standard_deviation
from genfast.schedules import Schedule

_op = register("reverse_step", "reverse_step", "forward")
_op_backward = register("reverse_step_backward", "reverse_step", "backward")


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, x_prev = inputs[:10]
    *ctx.options, ctx.log_prob = inputs[10:]
    ctx.drawn = x_prev is None
    # The density's gradient is that at the value which came out: stored anyway, and cheaper than its noise.
    ctx.save_for_backward(*tensors, output[0] if ctx.drawn and ctx.log_prob else x_prev)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_x_prev: Tensor | None, grad_log_prob: Tensor | None) -> tuple:
    nothing = (None,) * 18
    # What came out empty has no gradient.
    grad_x_prev, grad_log_prob = grad_x_prev if ctx.drawn else None, grad_log_prob if ctx.log_prob else None
    if grad_x_prev is None and grad_log_prob is None:
        return nothing
    x_t, pred, now, prev, t, t_prev, salt, seed, noise, x_prev = ctx.saved_tensors
    grad_x, grad_pred = _op_backward(
        x_t, pred, now, prev, t, t_prev, salt, seed, noise, x_prev, *ctx.options, grad_x_prev, grad_log_prob
    )
    grad_noise = None
    if ctx.needs_input_grad[8] and grad_x_prev is not None:
        # Rarely asked for, so plain PyTorch.
        _, _, _, eta, _, variance, _ = ctx.options
        sigma = standard_deviation(pred, x_t, now, prev, t, t_prev, eta, variance)
        grad_noise = (grad_x_prev * sigma).to(noise.dtype)
    return grad_x, grad_pred, *nothing[2:8], grad_noise, *nothing[9:]


_op.register_autograd(_backward, setup_context=_setup_context)


def reverse_step(
    x_t: Tensor,
    pred: Tensor,
    t: int | float | Tensor,
    t_prev: int | float | Tensor,
    schedule: Schedule,
    *,
    objective: str | None = None,
    eta: float = 1.0,
    clip: float | None = None,
    variance: str = "fixed_small",
    recompute_eps: bool = True,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    row_offset: int = 0,
    x_prev: Tensor | None = None,
    log_prob: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Go from x_t to x_prev, given what the network says about x_t; any two times of any schedule.

    With (a, b) at t, (a_s, b_s) at t_prev, x0 and eps as pred and x_t give them, and
    kappa = 1 - (a b_s / (a_s b))^2: ``x_prev = a_s x0 + b_s sqrt(1 - eta^2 kappa) eps + sigma z`` with
    ``sigma = eta b_s sqrt(kappa)``. For eta = 1 this is the posterior q(x_prev | x_t, x0) of Ho, Jain and Abbeel,
    "Denoising diffusion probabilistic models", 2020, equation 7; otherwise Song, Meng and Ermon, "Denoising diffusion
    implicit models", 2021, equation 12; eta = 0 is deterministic: DDIM, and for rectified flows and EDM Euler's step
    of the ODE. One pass: the noise is made in registers, and no coefficient is a difference of numbers that are nearly
    equal, so short steps keep their digits.

    Args:
        x_t: [B, ...], fp32, bf16 or fp16 (fp64 runs the reference); any strides.
        pred: the network's output, of x_t's shape; with a learned variance [B, 2 C, ...], the prediction and v along
            dimension 1, read in place. May have another dtype than x_t: nothing is copied.
        t: int64 [B] in 0..T-1 for discrete schedules, fp32 [B] for continuous ones; a single one serves all samples.
            Out of range: an error on the CPU, NaN for that sample on a GPU, where looking would wait for the device.
        t_prev: where to go, likewise; -1 (discrete) or 0.0 (continuous) is the clean image. Not after t, unless
            eta = 0, which runs the ODE in both directions.
        schedule: of `genfast.schedules`, on the device of x_t.
        objective: what pred is; None: the schedule's `default_objective`.
        eta: how much of the posterior's noise is added, from 0 to 1.
        clip: x0 is clamped to [-clip, clip]; no gradient outside.
        variance: ``"fixed_small"``: as above; ``"fixed_large"``: with b in the place of b_s (for eta = 1 and adjacent
            times beta_t); ``"learned_range"``: b_s^(1 - f) b^f with f = (v + 1) / 2 (Nichol and Dhariwal, "Improved
            denoising diffusion probabilistic models", 2021, equation 15).
        recompute_eps: whether the eps of the step is the one that belongs to the clipped x0, as in DDPM, or what pred
            said, as in most DDIM code. With clip, t = 0.0 of a continuous schedule has no such eps: an error on the
            CPU, NaN on a GPU.
        seed: None (drawn from torch's generator), an int, or an int64 tensor [1] on the device of x_t. One seed serves
            a whole trajectory: t salts the noise.
        noise: of x_t's shape; it replaces the generator.
        row_offset: global index of the first sample, so that ranks and micro-batches draw the noise of their own rows.
        x_prev: a stored result of x_t's shape, to have its log-probability under this prediction (for policy
            gradients); nothing is drawn.
        log_prob: also return log N(x_prev; mean, sigma^2), the density of x_prev as it was rounded to its dtype. It
            counts x_prev as a constant: its gradient goes to pred and x_t through the mean (and sigma, if learned). 0
            where nothing is added.

    Returns:
        x_prev [B, ...] in the dtype that x_t and pred promote to (with x_prev given, that very tensor). With
        ``log_prob``, also fp32 [B] in nats, summed over the elements. Where t_prev is the clean image no noise is
        added, whatever eta and the variance.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: shapes or devices differ, a name is unknown, a number is out of its range, more than one of seed,
            noise and x_prev is given, or the log-probability of a deterministic step is asked for.

    Differentiable in x_t, pred and noise. A second derivative is not implemented and says so.

    Example:
        >>> from genfast import schedules
        >>> schedule, net = schedules.cosine(1000), lambda x, t: 0.1 * x
        >>> x, times = torch.randn(4, 1, 28, 28), schedule.timesteps(10).tolist()
        >>> for t, t_prev in zip(times, times[1:]):
        ...     x = reverse_step(x, net(x, t), t, t_prev, schedule, eta=0.0, clip=1.0)
        >>> x.shape, bool(x.abs().max() <= 1)
        (torch.Size([4, 1, 28, 28]), True)
    """
    objective = schedule.default_objective if objective is None else objective
    _checks.choice("objective", objective, OBJECTIVES)
    _checks.choice("variance", variance, VARIANCES)
    eta = _checks.non_negative("eta", eta)
    if eta > 1:
        raise ValueError(f"eta: expected a number from 0 to 1, got {eta}")
    if clip is not None:
        clip = _checks.non_negative("clip", clip)
    x_t, pred = _check_prediction(x_t, pred, variance)
    t, t_prev, *tables = _times(x_t, t, t_prev, schedule, eta)
    looked_at = schedule.continuous and t.device.type == "cpu" and is_plain(t)
    if clip is not None and recompute_eps and looked_at and (t == 0).any():
        raise ValueError("recompute_eps: expected False with clip at t = 0, where x_t holds no eps to recompute")
    if x_prev is not None:
        _check_given(x_prev, x_t, log_prob, seed, noise)
        _checks.row_index("row_offset", row_offset)
        seed = noise = None
    elif eta > 0:
        seed, noise = resolve_noise("x_t", x_t, seed, noise, row_offset)
    else:
        seed = noise = None
    if log_prob and eta == 0:
        raise ValueError("log_prob: expected eta > 0, since a deterministic step has no density")
    drawn, density = _op(
        x_t, pred, *tables, schedule.salt(t), seed, noise, x_prev, row_offset, objective, float(schedule.sigma_data),
        eta, clip, variance, bool(recompute_eps), bool(log_prob),
    )
    x_prev = drawn if x_prev is None else x_prev
    return (x_prev, density) if log_prob else x_prev


def _check_prediction(x_t: Tensor, pred: Tensor, variance: str) -> tuple[Tensor, Tensor]:
    learned = variance == "learned_range"
    _checks.floating("x_t", x_t, dims=1 + learned)
    _checks.floating("pred", pred)
    if not learned:
        _checks.same_shape("pred", pred, "x_t", x_t)
    elif pred.shape != (wanted := (x_t.shape[0], 2 * x_t.shape[1], *x_t.shape[2:])):
        raise ValueError(f"pred: expected [prediction | v] of shape {list(wanted)}, got {list(pred.shape)}")
    elif pred.device != x_t.device:
        raise ValueError(f"pred: expected the device of x_t, {x_t.device}, got {pred.device}")
    # Kernels read each in its own dtype; fp64 runs the reference, which x_t decides.
    return tuple(_checks.promoted(x_t, pred)) if torch.float64 in (x_t.dtype, pred.dtype) else (x_t, pred)


def _times(
    x_t: Tensor, t: int | float | Tensor, t_prev: int | float | Tensor, schedule: Schedule, eta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """t and t_prev [B], the tables that they are looked up in, and the indices into them where they are such."""
    batch, device = x_t.shape[0], x_t.device
    t = schedule.check_t(t, batch, device)
    t_prev = schedule.check_t(t_prev, batch, device, name="t_prev", clean=True)
    if eta > 0 and device.type == "cpu" and is_plain(t) and is_plain(t_prev) and (late := t_prev > t).any():
        at = int(late.nonzero()[0])
        raise ValueError(f"t_prev: expected at most t = {t[at].item():g} unless eta = 0, got {t_prev[at].item():g}")
    if schedule.continuous:
        tables, index = (schedule.table(t), schedule.table(t_prev)), (None, None)
    else:
        tables, index = (schedule.tables, schedule.tables), (t, t_prev)
    for time, table in zip((t, t_prev), tables, strict=True):
        check_constant(schedule, time, table)
    return t, t_prev, *tables, *index


def _check_given(x_prev: Tensor, x_t: Tensor, log_prob: bool, seed: Any, noise: Any) -> None:
    _checks.floating("x_prev", x_prev)
    _checks.same_shape("x_prev", x_prev, "x_t", x_t)
    if not log_prob:
        raise ValueError("log_prob: expected True when x_prev is given, since nothing else is computed")
    for name, value in (("seed", seed), ("noise", noise)):
        if value is not None:
            raise ValueError(f"{name}: expected None when x_prev is given, since nothing is drawn")


def step_between(
    x_t: Tensor, pred: Tensor, now: Tensor, prev: Tensor, t: Tensor | None, t_prev: Tensor | None, salt: Tensor,
    seed: Tensor | None, noise: Tensor | None, row_offset: int, objective: str, sigma_data: float, eta: float,
    clip: float | None, variance: str,
) -> Tensor:
    """x_prev by tables of one's own: [4, B], or [4, T] and where t and t_prev are in them. Nothing is checked."""
    return _op(
        x_t, pred, now, prev, t, t_prev, salt, seed, noise, None, row_offset, objective, sigma_data, eta, clip,
        variance, True, False,
    )[0]
