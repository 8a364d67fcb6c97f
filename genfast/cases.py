"""Every op described once, for `genfast check`, for the tests and for the benchmarks: inputs, chains, tolerances."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast import functional, reference, schedules
from genfast.functional.q_sample import Noised, entries
from genfast.random import Stream, as_seed, normal

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]

SEED = 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Tolerance:
    """|actual - exact| <= rtol |exact| + atol."""

    rtol: float
    atol: float = 0.0

    def excess(self, actual: Tensor, exact: Tensor) -> float:
        """The largest error as a multiple of what is allowed; inf where one is NaN or infinite and the other is not."""
        actual, exact = actual.double(), exact.double()
        if actual.shape != exact.shape:
            return float("inf")
        if actual.numel() == 0:
            return 0.0
        same = (actual == exact) | (actual.isnan() & exact.isnan())
        ratio = (actual - exact).abs() / (self.rtol * exact.abs() + self.atol)
        return torch.where(same, 0.0, torch.where(ratio.isfinite(), ratio, torch.inf)).max().item()


# Rows: the path an op took. Sums are per-sample results in nats, always fp32. Elements have the input's dtype: half a
# unit in the last place of 16 bits (a whole one where the interpreter truncates bf16). Their absolute part is the
# error of one normal (none, 5e-7 interpreted, 4e-6 with the sine and cosine of the hardware) times 10: the standard
# deviations and incoming gradients of the inputs below multiply it by at most that.
# Losses are means of squares of pred - target, so an error d of the noise shows as 2 d |pred - target|, no more than
# rtol loss + d^2 / rtol.
# Log-determinants are sums of terms of both signs, known no better than their terms.
_SUMS = Tolerance(1e-6)
TOLERANCES = {
    "reference": {
        "sums": _SUMS,
        "logdets": Tolerance(1e-6, 5e-6),
        "losses": Tolerance(5e-6, 1e-6),
        torch.float32: Tolerance(1e-6, 2e-6),
        torch.bfloat16: Tolerance(2**-8, 2e-6),
        torch.float16: Tolerance(2**-11, 2e-6),
    },
    "interpreted": {
        "sums": _SUMS,
        "logdets": Tolerance(1e-6, 5e-6),
        "losses": Tolerance(1e-5, 3e-6),
        torch.float32: Tolerance(1e-6, 5e-6),
        torch.bfloat16: Tolerance(2**-7, 5e-6),
        torch.float16: Tolerance(2**-11, 5e-6),
    },
    "triton": {
        "sums": _SUMS,
        "logdets": Tolerance(2e-6, 2e-5),
        "losses": Tolerance(2e-5, 1e-4),
        torch.float32: Tolerance(2e-6, 4e-5),
        torch.bfloat16: Tolerance(2**-8, 4e-5),
        torch.float16: Tolerance(2**-11, 4e-5),
    },
}


# A model's loss, fused against fused=False on one seed: the networks' own products come in another order under compile.
LOSS = Tolerance(1e-5)

# Without noise only gradients that cancel, such as lv + g(lv) near 0, have an absolute error.
NOISELESS_ATOL = 2e-6


@dataclass(frozen=True)
class Case:
    """One op in one setting.

    `inputs(shape, dtype, device, generator)` makes tensors of shape [B, ...]; `fused`, `eager` and `exact` take them.
    `eager` is the chain that open-source code uses, `exact` the reference in fp64. `moves` counts the elements read
    or written, forward and backward, for each element of the main tensor. `sums` are the outputs that are per-sample
    results, `losses` those among them that noise enters; `roundings` how often an element is rounded to the input's
    dtype. `noisy`: the op makes its own noise; `comparable`: the eager chain has the same. `differentiable`: some input
    takes a gradient. `logdets`: sums whose terms have both signs; `cancels`: how much larger than 1 the terms are of
    which gradients are sums.
    """

    op: str
    setting: str
    inputs: Callable[..., Inputs]
    fused: Callable[[Inputs], Outputs]
    eager: Callable[[Inputs], Outputs]
    exact: Callable[[Inputs], Outputs]
    moves: tuple[float, float]
    outputs: tuple[str, ...]
    sums: frozenset[str] = field(default_factory=frozenset)
    losses: frozenset[str] = field(default_factory=frozenset)
    roundings: int = 1
    noisy: bool = False
    comparable: bool = True
    differentiable: bool = True
    logdets: frozenset[str] = field(default_factory=frozenset)
    cancels: float = 1.0

    def tolerance(self, path: str, dtype: torch.dtype, output: str | None = None) -> Tolerance:
        """What is allowed for an output, or for a gradient if None, on a path."""
        if output in self.losses:
            return TOLERANCES[path]["losses"]
        if output in self.logdets:
            return TOLERANCES[path]["logdets"]
        if output in self.sums:
            return TOLERANCES[path]["sums"]
        one = TOLERANCES[path][dtype]
        atol = one.atol if self.noisy else NOISELESS_ATOL
        return Tolerance(self.roundings * one.rtol, atol * (self.cancels if output is None else 1))

    def upstream(self, inputs: Inputs, outputs: Outputs) -> list[Tensor]:
        """Incoming gradients of one size, which makes gradients of the size that the tolerances are made for."""
        elements = max(1, next(iter(inputs.values()))[:1].numel())
        return [
            torch.full_like(output, elements if name in self.losses else 1)
            for name, output in zip(self.outputs, outputs, strict=True)
        ]

    @property
    def name(self) -> str:
        return self.op if not self.setting else f"{self.op}-{self.setting}"


def wide(inputs: Inputs) -> Inputs:
    """The inputs in fp64, their own values unchanged."""
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


# Targets, noise, coefficients and times.
_CONSTANTS = ("x", "eps", "a", "b", "t", "t_prev", "x_prev", "logit")


def differentiable(inputs: Inputs) -> list[str]:
    """Names of the inputs that take a gradient."""
    return [name for name, x in inputs.items() if x.is_floating_point() and name not in _CONSTANTS]


def _gaussian(names: tuple[str, ...], channels: int = 1) -> Callable[..., Inputs]:
    def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
        if channels > 1:
            shape = (shape[0], shape[1] * channels, *shape[2:])
        # Around the prior and far from it: both branches of the series are met.
        return {name: (1.5 * torch.randn(shape, generator=generator)).to(device, dtype) for name in names}

    return make


def _with_eps(make: Callable[..., Inputs]) -> Callable[..., Inputs]:
    def extended(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
        inputs = make(shape, dtype, device, generator)
        return {**inputs, "eps": torch.randn(shape, generator=generator).to(device, dtype)}

    return extended


def _images(binary: bool) -> Callable[..., Inputs]:
    def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
        logits = (4.0 * torch.randn(shape, generator=generator)).to(device, dtype)
        if binary:
            x = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
        else:
            x = torch.rand(shape, generator=generator).to(device, dtype)
        return {"logits": logits, "x": x}

    return make


def _noise(like: Tensor, stream: Stream = Stream.LATENT, salt: int | Tensor = 0) -> Tensor:
    """What the ops draw from the seed of all cases."""
    columns = like[0].numel() if like.shape[0] else 0
    return normal(as_seed(SEED, like.device), like.shape[0], columns, stream, salt=salt).reshape(like.shape)


def _reparameterize(setting: str, **options: Any) -> list[Case]:
    """The plain and the packed op in one setting."""
    given = setting == "eps"
    free_bits, clamp = options.get("free_bits", 0.0), options.get("clamp")
    noise = {} if given else {"seed": SEED}

    def split(inputs: Inputs) -> tuple[Tensor, Tensor]:
        return inputs["h"].chunk(2, 1) if "h" in inputs else (inputs["mu"], inputs["logvar"])

    def fused(inputs: Inputs) -> Outputs:
        arguments = {**noise, **options, **({"eps": inputs["eps"]} if given else {})}
        if "h" in inputs:
            return functional.reparameterize_kl_packed(inputs["h"], **arguments)
        return functional.reparameterize_kl(inputs["mu"], inputs["logvar"], **arguments)

    def eager(inputs: Inputs) -> Outputs:
        mu, logvar = split(inputs)
        if clamp is not None:
            logvar = torch.clamp(logvar, *clamp)
        std = torch.exp(0.5 * logvar)
        z = mu + (inputs["eps"] if given else torch.randn_like(std)) * std
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp())
        if free_bits:
            kl = kl.clamp(min=free_bits)
        return z, kl.flatten(1).sum(1)

    def exact(inputs: Inputs) -> Outputs:
        mu, logvar = split(inputs)
        eps = inputs["eps"] if given else _noise(mu).double()
        return reference.reparameterize_kl.forward(mu, logvar, None, eps, 0, free_bits, clamp)

    cases = []
    for op, make in (
        ("reparameterize_kl", _gaussian(("mu", "logvar"))),
        ("reparameterize_kl_packed", _gaussian(("h",), channels=2)),
    ):
        make = _with_eps(make) if given else make
        moves, sums = (3.0 + given, 5.0 + given), frozenset({"kl"})
        case = Case(op, setting, make, fused, eager, exact, moves, ("z", "kl"), sums, noisy=not given, comparable=given)
        cases.append(case)
    return cases


def _kl_normal() -> Case:
    names = ("mu_q", "logvar_q", "mu_p", "logvar_p")

    def eager(inputs: Inputs) -> Outputs:
        mu_q, logvar_q, mu_p, logvar_p = (inputs[name] for name in names)
        kl = 0.5 * (logvar_p - logvar_q - 1 + ((mu_q - mu_p).pow(2) + logvar_q.exp()) / logvar_p.exp())
        return (kl.flatten(1).sum(1),)

    def fused(inputs: Inputs) -> Outputs:
        return (functional.kl_normal(*(inputs[name] for name in names)),)

    def exact(inputs: Inputs) -> Outputs:
        return (reference.kl_normal.forward(*(inputs[name] for name in names)),)

    return Case("kl_normal", "", _gaussian(names), fused, eager, exact, (4.0, 8.0), ("kl",), frozenset({"kl"}))


def _bernoulli_nll(setting: str, reduction: str, binary: bool) -> Case:
    def reduced(nll: Tensor) -> Tensor:
        if reduction == "none":
            return nll
        return nll.mean() if reduction == "mean" else nll.sum()

    def eager(inputs: Inputs) -> Outputs:
        logits, x = inputs["logits"], inputs["x"]
        x = x.to(logits.dtype) / 255 if binary else x
        nll = F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)
        return (reduced(nll),)

    def fused(inputs: Inputs) -> Outputs:
        return (functional.bernoulli_nll(inputs["logits"], inputs["x"], reduction=reduction),)

    def exact(inputs: Inputs) -> Outputs:
        return (reduced(reference.bernoulli_nll.forward(inputs["logits"], inputs["x"])),)

    # The scalar reductions store the gradient in the forward pass and scale it by what comes in.
    moves, roundings = ((2.0, 3.0), 1) if reduction == "none" else ((3.0, 0.0), 2)
    return Case(
        "bernoulli_nll", setting, _images(binary), fused, eager, exact, moves, ("nll",), frozenset({"nll"}),
        roundings=roundings,
    )  # fmt: skip


# By name and type of device, filled when inputs are made: within a trace a schedule cannot be built.
_SCHEDULES: dict[tuple[str, str], schedules.Schedule] = {}


def _prepare_schedule(name: str, device: str) -> None:
    key = name, torch.device(device).type
    if key not in _SCHEDULES:
        _SCHEDULES[key] = schedules.get(name).to(device)


def _pixels(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def _forward_noising(setting: str) -> Case:
    given = setting == "noise"

    def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
        # A uint8 image is a target here: it takes no gradient.
        x0 = torch.randn(shape, generator=generator).to(device, dtype)
        inputs = {"x": _pixels(shape, generator).to(device)} if setting == "uint8" else {"x0": x0}
        for name in ("a", "b"):
            inputs[name] = torch.rand(shape[:1], generator=generator).to(device)
        return {**inputs, **({"eps": torch.randn(shape, generator=generator).to(device, dtype)} if given else {})}

    def fused(inputs: Inputs) -> Outputs:
        noise = {"noise": inputs["eps"]} if given else {"seed": SEED}
        return (functional.forward_noising(inputs.get("x0", inputs.get("x")), inputs["a"], inputs["b"], **noise),)

    def eager(inputs: Inputs) -> Outputs:
        x0 = inputs["x0"] if "x0" in inputs else inputs["x"].to(torch.float32) * 2 / 255 - 1
        a, b = (inputs[name].to(x0.dtype).view(-1, *[1] * (x0.dim() - 1)) for name in ("a", "b"))
        return (a * x0 + b * (inputs["eps"] if given else torch.randn_like(x0)),)

    def exact(inputs: Inputs) -> Outputs:
        x0 = inputs.get("x0", inputs.get("x"))
        eps = inputs["eps"] if given else _noise(x0, Stream.FORWARD_NOISE).double()
        dtype = torch.float64 if x0.dtype == torch.uint8 else x0.dtype
        return (reference.forward_noising.forward(x0, inputs["a"], inputs["b"], None, None, eps, 0, dtype),)

    # The gradient of x0 is a times what comes in.
    return Case(
        "forward_noising", setting, make, fused, eager, exact, (2.0 + given, 2.0), ("x_t",), noisy=not given,
        comparable=given, differentiable=setting != "uint8",
    )  # fmt: skip


def _denoising_loss(
    setting: str, schedule: str = "linear", weighting: str = "none", reduction: str = "none", given: bool = False,
    binary: bool = False, objective: str | None = None,
) -> Case:  # fmt: skip
    """The noise under "eps" is what the op makes for itself (unless it is `given`), as eager code has stored it."""

    def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
        _prepare_schedule(schedule, device)
        pred, x = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
        x = _pixels(shape, generator).to(device) if binary else x
        t = _times(schedule, shape[:1], generator).to(device)
        eps = torch.randn(shape, generator=generator).to(device) if given else _noise(pred, Stream.FORWARD_NOISE)
        return {"pred": pred, "x": x, "t": t, "eps": eps.to(dtype)}

    def asked(inputs: Inputs) -> tuple[schedules.Schedule, str]:
        made = _SCHEDULES[schedule, inputs["pred"].device.type]
        return made, made.default_objective if objective is None else objective

    def fused(inputs: Inputs) -> Outputs:
        made, wanted = asked(inputs)
        seed, noise = (None, inputs["eps"]) if given else (as_seed(SEED, inputs["pred"].device), None)
        noised = Noised(inputs["x"], inputs["t"], inputs["x"], seed, noise, 0)
        options = {"objective": wanted, "weighting": weighting, "reduction": reduction}
        return (functional.denoising_loss(inputs["pred"], noised, made, **options),)

    def eager(inputs: Inputs) -> Outputs:
        made, wanted = asked(inputs)
        pred, x, eps = inputs["pred"], inputs["x"], inputs["eps"]
        x = x.to(pred.dtype) * 2 / 255 - 1 if binary else x
        rows = (-1, *[1] * (pred.dim() - 1))
        p, q = (c.to(pred.dtype).view(rows) for c in made.target_coefficients(inputs["t"], wanted))
        target = {"epsilon": eps, "x0": x}.get(wanted)
        if target is None:
            target = p * x + q * eps
        if weighting == "none" and reduction == "mean":
            return (F.mse_loss(pred.float(), target.float()),)
        loss = F.mse_loss(pred.float(), target.float(), reduction="none").flatten(1).mean(1)
        if weighting != "none":
            loss = loss * made.weight(inputs["t"], wanted, weighting)
        return (loss.mean() if reduction == "mean" else loss,)

    def exact(inputs: Inputs) -> Outputs:
        made, wanted = asked(inputs)
        pred = inputs["pred"]
        eps = inputs["eps"] if given else _noise(pred, Stream.FORWARD_NOISE).double()
        a, b, index = entries(made, inputs["t"].to(torch.float32) if made.continuous else inputs["t"])
        loss = reference.denoising_loss.forward(
            pred, inputs["x"], a, b, index, None, eps, 0, wanted, weighting, 5.0, made.sigma_data
        )
        return (loss.mean() if reduction == "mean" else loss,)

    reads = 2.0 + (objective not in (None, "epsilon") or schedule != "linear") + given - 1.0
    # The scalar reduction stores the gradient in the forward pass and scales it by what comes in.
    moves, roundings = ((reads, reads + 1.0), 1) if reduction == "none" else ((reads + 1.0, 0.0), 2)
    return Case(
        "denoising_loss", setting, make, fused, eager, exact, moves, ("loss",), frozenset({"loss"}),
        frozenset({"loss"}), roundings, noisy=not given,
    )  # fmt: skip


def _times(schedule: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Times at which neither image nor noise is all but gone: there the weights would be all that a test sees."""
    if schedule == "linear":
        return torch.randint(50, 800, shape, generator=generator)
    return 0.05 + 0.9 * torch.rand(shape, generator=generator)


def _reverse_step(
    setting: str, schedule: str = "linear", objective: str = "epsilon", eta: float = 1.0, clip: float | None = None,
    variance: str = "fixed_small", given: bool = False, log_prob: bool = False,
) -> Case:  # fmt: skip
    """20 of 1,000 steps, or a fifth of the way; `log_prob`: the density of an x_prev that is given."""
    learned = variance == "learned_range"
    options = {"objective": objective, "eta": eta, "clip": clip, "variance": variance}

    def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
        _prepare_schedule(schedule, device)
        shape = (*shape, 1) if learned and len(shape) == 1 else shape
        wanted = (shape[0], 2 * shape[1], *shape[2:]) if learned else shape
        x_t, eps = (1.5 * torch.randn(shape, generator=generator) for _ in range(2))
        inputs = {"x_t": x_t, "pred": torch.randn(wanted, generator=generator)}
        t = _times(schedule, shape[:1], generator)
        t_prev = t - 20 if schedule == "linear" else 0.8 * t
        if given:
            inputs["eps"] = eps
        if log_prob:
            # So wide that all terms have one sign: the sum is as well known as they are.
            t, t_prev = 100 * t, 100 * t_prev
            inputs["x_prev"] = x_t + t_prev.view(-1, *[1] * (x_t.dim() - 1)) * eps
        return {name: x.to(device, dtype) for name, x in inputs.items()} | {
            "t": t.to(device), "t_prev": t_prev.to(device)
        }

    def fused(inputs: Inputs) -> Outputs:
        made = _SCHEDULES[schedule, inputs["x_t"].device.type]
        if log_prob:
            source = {"x_prev": inputs["x_prev"], "log_prob": True}
        else:
            source = {"noise": inputs["eps"]} if given else {"seed": SEED}
        got = functional.reverse_step(
            inputs["x_t"], inputs["pred"], inputs["t"], inputs["t_prev"], made, **options, **source
        )
        return got[1:] if log_prob else (got,)

    def eager(inputs: Inputs) -> Outputs:
        x_t, pred = inputs["x_t"], inputs["pred"]
        made = _SCHEDULES[schedule, x_t.device.type]

        def columns(*values: Tensor) -> list[Tensor]:
            return [value.to(x_t.dtype).view(-1, *[1] * (x_t.dim() - 1)) for value in values]

        a, b, p, q = columns(*made.coefficients(inputs["t"]), *made.target_coefficients(inputs["t"], objective))
        a_s, b_s = columns(*made.coefficients(inputs["t_prev"]))
        v = None
        if learned:
            pred, v = pred.chunk(2, 1)
        x0 = (q * x_t - b * pred) / (a * q - b * p)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        eps = (x_t - a * x0) / b
        kappa = 1 - (a * b_s / (a_s * b)) ** 2
        mean = a_s * x0 + b_s * (1 - eta**2 * kappa) ** 0.5 * eps
        if eta == 0:
            return (mean,)
        sigma = eta * kappa**0.5 * (b if variance == "fixed_large" else b_s)
        if learned:
            fraction = (v + 1) / 2
            sigma = eta * kappa**0.5 * torch.exp(fraction * b.log() + (1 - fraction) * b_s.log())
        if log_prob:
            density = -((inputs["x_prev"] - mean) ** 2) / (2 * sigma**2) - sigma.log() - math.log(2 * math.pi) / 2
            return (density.expand_as(x_t).flatten(1).sum(1),)
        return (mean + sigma * (inputs["eps"] if given else torch.randn_like(x_t)),)

    def exact(inputs: Inputs) -> Outputs:
        x_t, t, t_prev = inputs["x_t"], inputs["t"], inputs["t_prev"]
        made = _SCHEDULES[schedule, x_t.device.type]
        eps = inputs.get("eps")
        if not given and not log_prob and eta > 0:
            eps = _noise(x_t, Stream.REVERSE_STEP, made.salt(t)).double()
        if made.continuous:
            times = (made.table(t.float()), made.table(t_prev.float()), None, None)
        else:
            times = (made.tables, made.tables, t, t_prev)
        drawn, density = reference.reverse_step.forward(
            x_t, inputs["pred"], *times, made.salt(t), None, eps, inputs.get("x_prev"), 0, objective, made.sigma_data,
            eta, clip, variance, True, log_prob,
        )
        return (density,) if log_prob else (drawn,)

    # Backward reads x_t and pred only to see what was clipped, or for the density, and v to know its own noise.
    forward, backward = 3.0 + learned + given, 3.0 + 2 * learned
    if clip is not None or log_prob:
        backward = 5.0 + 2 * learned
    name = "log_prob" if log_prob else "x_prev"
    return Case(
        "reverse_step", setting, make, fused, eager, exact, (forward, backward), (name,),
        frozenset({"log_prob"}), noisy=eta > 0 and not given and not log_prob,
        comparable=given or log_prob or eta == 0,
    )  # fmt: skip


def _affine_coupling(setting: str, **options: Any) -> Case:
    """`options` as the op takes them; in half the samples all scales are above 1, in the others below."""
    interleaved, inside = options.get("layout") == "interleaved", options.get("shift_inside", False)
    scale_map = options.get("scale_map", "tanh")
    shift_first, inverse = options.get("order") == "shift_first", options.get("inverse", False)
    flip = options.get("reciprocal", False)

    def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
        shape = (*shape, 1) if len(shape) == 1 else shape
        half, s, t = (torch.randn(shape, generator=generator) for _ in range(3))
        # A log-det of terms of one sign is as well known as they are.
        side = 1 - 2 * (torch.arange(shape[0]) % 2).float()
        parts = [s.abs() * side.view(-1, *[1] * (len(shape) - 1)), t]
        parts = parts[::-1] if shift_first else parts
        params = torch.stack(parts, 2).flatten(1, 2) if interleaved else torch.cat(parts, 1)
        return {"half": half.to(device, dtype), "params": params.to(device, dtype)}

    def fused(inputs: Inputs) -> Outputs:
        return functional.affine_coupling(inputs["half"], inputs["params"], **options)

    def eager(inputs: Inputs) -> Outputs:
        half, params = inputs["half"], inputs["params"]
        s, t = (params[:, 0::2], params[:, 1::2]) if interleaved else params.chunk(2, 1)
        s, t = (t, s) if shift_first else (s, t)
        if scale_map == "sigmoid":
            scale = torch.sigmoid(s + 2)
            log = scale.log()
        else:
            log = 2 * torch.tanh(s) if scale_map == "tanh" else 0.636 * 2 * torch.atan(s / 2)
            scale = log.exp()
        if flip:
            scale, log = 1 / scale, -log
        if inverse:
            y = half / scale - t if inside else (half - t) / scale
            log = -log
        else:
            y = (half + t) * scale if inside else half * scale + t
        return y, log.flatten(1).sum(1)

    def exact(inputs: Inputs) -> Outputs:
        return reference.affine_coupling.forward(
            inputs["half"], inputs["params"], None, scale_map, 2.0, 0.0, interleaved, shift_first, inside, flip, -1,
            inverse,
        )

    # x, s, t and y; then x, s and y's gradient, and three gradients. Where the scale takes in t, backward reads it too.
    moves = 4.0, 6.0 + (inside != inverse)
    return Case(
        "affine_coupling", setting, make, fused, eager, exact, moves, ("y", "logdet"), frozenset({"logdet"}),
        logdets=frozenset({"logdet"}),
    )  # fmt: skip


def mixture_logistic_coupling(setting: str, components: int, **options: Any) -> Case:
    """`options` as the op takes them."""
    inverse, least = options.get("inverse", False), options.get("min_log_scale", -7.0)
    options = {"scale_map": "tanh", "factor": 2.0, "min_log_scale": least, "inverse": inverse, **options}

    def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
        shape = (*shape, 1) if len(shape) == 1 else shape
        half, s, t = (torch.randn(shape, generator=generator) for _ in range(3))
        logits, means, log_scales = (
            torch.randn((shape[0], components * shape[1], *shape[2:]), generator=generator) for _ in range(3)
        )
        params = torch.cat([0.25 * s, 0.5 * t, logits, means, 0.25 * log_scales], 1)
        return {"half": half.to(device, dtype), "params": params.to(device, dtype)}

    def fused(inputs: Inputs) -> Outputs:
        return functional.mixture_logistic_coupling(
            inputs["half"], inputs["params"], num_components=components, **options
        )

    def eager(inputs: Inputs) -> Outputs:
        half = inputs["half"]
        params = inputs["params"].unflatten(1, (2 + 3 * components, half.shape[1]))
        s, t = params[:, 0], params[:, 1]
        logits, means, log_scales = params[:, 2:].chunk(3, 1)
        weights, log_scales = F.log_softmax(logits, 1), log_scales.clamp(min=least)
        log = 2 * torch.tanh(s) if options["scale_map"] == "tanh" else s

        def mixture(x: Tensor) -> tuple[Tensor, Tensor]:
            u = (x.unsqueeze(1) - means) * torch.exp(-log_scales)
            below, above = F.logsigmoid(u), F.logsigmoid(-u)
            log_cdf, log_survival = torch.logsumexp(weights + below, 1), torch.logsumexp(weights + above, 1)
            log_pdf = torch.logsumexp(weights + below + above - log_scales, 1)
            return log_cdf - log_survival, log_pdf - log_cdf - log_survival

        if not inverse:
            logit, slope = mixture(half)
            return torch.exp(log) * logit + t, (log + slope).flatten(1).sum(1)
        z = (half - t) * torch.exp(-log)
        with torch.no_grad():
            guesses = means + torch.exp(log_scales) * z.unsqueeze(1)
            lo, hi = guesses.amin(1), guesses.amax(1)
            for _ in range(24):
                middle = (lo + hi) / 2
                above = mixture(middle)[0] > z
                lo, hi = torch.where(above, lo, middle), torch.where(above, middle, hi)
        # One step of Newton's method, for the gradient.
        root = (lo + hi) / 2
        logit, slope = mixture(root)
        x = root + (z - logit) * torch.exp(-slope.detach())
        return x, -(log + mixture(x)[1]).flatten(1).sum(1)

    def exact(inputs: Inputs) -> Outputs:
        return reference.mixture_logistic_coupling.forward(
            inputs["half"], inputs["params"], components, *options.values(), False
        )[:2]

    # What backward keeps stands in for x in the inverse; t has no part in its gradient.
    kept = 5.0 if inverse else 3.0
    parameters = 2.0 + 3.0 * components
    moves = 2.0 + parameters + kept, 2.0 - inverse + 2.0 * parameters + kept
    name = "x" if inverse else "y"
    return Case(
        "mixture_logistic_coupling", setting, make, fused, eager, exact, moves, (name, "logdet"),
        frozenset({"logdet"}), logdets=frozenset({"logdet"}), cancels=6.0,
    )  # fmt: skip


_ALPHA = 0.05


def _uint8_logit(pixel: Tensor, u: Tensor) -> Outputs:
    """What flows on images have in front: y, and each pixel's part of the log-determinant."""
    w = _ALPHA + (1 - 2 * _ALPHA) * (pixel.to(u.dtype) + u) / 256
    log_w, log_rest = torch.log(w), torch.log1p(-w)
    return log_w - log_rest, math.log(1 - 2 * _ALPHA) - math.log(256) - log_w - log_rest


def _dequantize_logit(setting: str) -> Case:
    """Noise of the seed, a noise that is given, or the way back."""

    def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
        pixels, u = _pixels(shape, generator), 0.01 + 0.98 * torch.rand(shape, generator=generator)
        if setting == "":
            return {"x": pixels.to(device)}
        if setting == "given":
            return {"u": u.to(device, dtype), "x": pixels.to(device)}
        logit = _uint8_logit(pixels, u)[0].to(dtype)
        # In 16 bits some lie on a border between pixels, where rounding decides.
        place = (torch.sigmoid(logit.double()) - _ALPHA) / (1 - 2 * _ALPHA) * 256
        return {"logit": torch.where((place - place.round()).abs() < 1e-3, 0.25, logit).to(device, dtype)}

    def fused(inputs: Inputs) -> Outputs:
        if "logit" in inputs:
            return functional.dequantize_logit(inputs["logit"], alpha=_ALPHA, inverse=True)
        noise = {"u": inputs["u"]} if "u" in inputs else {"seed": SEED}
        return functional.dequantize_logit(inputs["x"], alpha=_ALPHA, **noise)

    def eager(inputs: Inputs) -> Outputs:
        if "logit" in inputs:
            y = inputs["logit"]
            logdet = math.log(256) - math.log(1 - 2 * _ALPHA) + F.logsigmoid(y) + F.logsigmoid(-y)
            v = (torch.sigmoid(y) - _ALPHA) / (1 - 2 * _ALPHA)
            return (256 * v).floor().clamp(0, 255).to(torch.uint8), logdet.flatten(1).sum(1)
        x = inputs["x"]
        u = inputs["u"] if "u" in inputs else torch.rand(x.shape, device=x.device)
        y, logdet = _uint8_logit(x, u)
        return y, logdet.flatten(1).sum(1)

    def exact(inputs: Inputs) -> Outputs:
        if "logit" in inputs:
            logdet, pixels = reference.dequantize_logit.inverse(inputs["logit"], _ALPHA)
            return pixels.double(), logdet
        x = inputs["x"]
        u = inputs["u"] if "u" in inputs else reference.dequantize_logit.noise(x, as_seed(SEED, x.device), 0).double()
        return reference.dequantize_logit.forward_given(u, x, _ALPHA)

    # In bytes where uint8 comes first, else in elements of the noise or of the logit.
    moves = {"": (5.0, 0.0), "given": (3.0, 4.0), "inverse": (1.25, 0.0)}[setting]
    names = ("x" if setting == "inverse" else "y", "logdet")
    return Case(
        "dequantize_logit", setting, make, fused, eager, exact, moves, names, frozenset({"logdet"}),
        noisy=setting == "", comparable=setting != "", differentiable=setting == "given",
    )  # fmt: skip


CASES: tuple[Case, ...] = (
    *_reparameterize(""),
    *_reparameterize("eps"),
    *_reparameterize("free_bits", free_bits=0.25),
    *_reparameterize("clamp", clamp=(-1.0, 1.25)),
    _kl_normal(),
    _bernoulli_nll("", "none", False),
    _bernoulli_nll("uint8", "none", True),
    _bernoulli_nll("mean", "mean", False),
    _bernoulli_nll("sum-uint8", "sum", True),
    _forward_noising(""),
    _forward_noising("uint8"),
    _forward_noising("noise"),
    _denoising_loss(""),
    _denoising_loss("x0-min_snr", objective="x0", weighting="min_snr"),
    _denoising_loss("v-uint8", objective="v", binary=True, weighting="min_snr"),
    _denoising_loss("flow", "rectified_flow"),
    _denoising_loss("edm-sigma", "edm", weighting="sigma"),
    _denoising_loss("mean", reduction="mean"),
    _denoising_loss("v-noise-mean", objective="v", given=True, reduction="mean"),
    _reverse_step(""),
    _reverse_step("ddim", objective="v", eta=0.0),
    _reverse_step("clip", objective="x0", clip=1.0),
    _reverse_step("learned", variance="learned_range"),
    _reverse_step("flow-noise", "rectified_flow", objective="flow", eta=0.5, variance="fixed_large", given=True),
    _reverse_step("log_prob", "edm", objective="edm", variance="learned_range", log_prob=True),
    _dequantize_logit(""),
    _dequantize_logit("given"),
    _dequantize_logit("inverse"),
    _affine_coupling(""),
    _affine_coupling("normflows", scale_map="sigmoid", layout="interleaved", order="shift_first", reciprocal=True),
    _affine_coupling("atan-inside-inverse", scale_map="atan", shift_inside=True, inverse=True),
    mixture_logistic_coupling("", 2),
    mixture_logistic_coupling("exp-inverse", 2, scale_map="exp", min_log_scale=-0.25, inverse=True),
)


def cases(op: str) -> list[Case]:
    """The cases of one op.

    Raises:
        ValueError: there is no such op.

    Example:
        >>> [case.name for case in cases("kl_normal")]
        ['kl_normal']
    """
    found = [case for case in CASES if case.op == op]
    if not found:
        known = ", ".join(sorted({case.op for case in CASES}))
        raise ValueError(f"op: expected one of {known}, got {op!r}")
    return found


def run(
    case: Case, chain: str, inputs: Inputs, upstream: list[Tensor] | None = None
) -> tuple[Outputs, dict[str, Tensor]]:
    """Outputs and gradients of one chain ("fused", "eager" or "exact"); `Case.upstream` comes in if None."""
    if chain == "exact":
        inputs = wide(inputs)
    leaves = {name: inputs[name].detach().requires_grad_() for name in differentiable(inputs)}
    outputs = getattr(case, chain)({**inputs, **leaves})
    if not leaves:
        return outputs, {}
    if upstream is None:
        upstream = case.upstream(inputs, outputs)
    upstream = [grad.to(output.dtype) for grad, output in zip(upstream, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return tuple(output.detach() for output in outputs), dict(zip(leaves, grads, strict=True))
