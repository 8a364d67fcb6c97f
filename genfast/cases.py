"""Every op described once, for `genfast check`, for the tests and for the benchmarks: inputs, chains, tolerances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast import functional, reference
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
_SUMS = Tolerance(1e-6)
TOLERANCES = {
    "reference": {
        "sums": _SUMS,
        torch.float32: Tolerance(1e-6, 2e-6),
        torch.bfloat16: Tolerance(2**-8, 2e-6),
        torch.float16: Tolerance(2**-11, 2e-6),
    },
    "interpreted": {
        "sums": _SUMS,
        torch.float32: Tolerance(1e-6, 5e-6),
        torch.bfloat16: Tolerance(2**-7, 5e-6),
        torch.float16: Tolerance(2**-11, 5e-6),
    },
    "triton": {
        "sums": _SUMS,
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
    results; `roundings` how often an element is rounded to the input's dtype.
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
    roundings: int = 1

    @property
    def noisy(self) -> bool:
        """Whether the op makes its own noise."""
        return "z" in self.outputs and self.setting != "eps"

    def tolerance(self, path: str, dtype: torch.dtype, output: str | None = None) -> Tolerance:
        """What is allowed for an output, or for a gradient if None, on a path."""
        if output in self.sums:
            return TOLERANCES[path]["sums"]
        one = TOLERANCES[path][dtype]
        return Tolerance(self.roundings * one.rtol, one.atol if self.noisy else NOISELESS_ATOL)

    @property
    def name(self) -> str:
        return self.op if not self.setting else f"{self.op}-{self.setting}"


def wide(inputs: Inputs) -> Inputs:
    """The inputs in fp64, their own values unchanged."""
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def differentiable(inputs: Inputs) -> list[str]:
    """Names of the inputs that take a gradient."""
    return [name for name, x in inputs.items() if x.is_floating_point() and name not in ("x", "eps")]


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


def _noise(like: Tensor) -> Tensor:
    columns = like[0].numel() if like.shape[0] else 0
    return normal(as_seed(SEED, like.device), like.shape[0], columns, Stream.LATENT).reshape(like.shape)


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
        moves = (3.0 + given, 5.0 + given)
        cases.append(Case(op, setting, make, fused, eager, exact, moves, ("z", "kl"), frozenset({"kl"})))
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
        "bernoulli_nll", setting, _images(binary), fused, eager, exact, moves, ("nll",), frozenset({"nll"}), roundings
    )


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
    """Outputs and gradients of one chain ("fused", "eager" or "exact") for fixed incoming gradients (ones if None)."""
    if chain == "exact":
        inputs = wide(inputs)
    leaves = {name: inputs[name].detach().requires_grad_() for name in differentiable(inputs)}
    outputs = getattr(case, chain)({**inputs, **leaves})
    if upstream is None:
        upstream = [torch.ones_like(output) for output in outputs]
    upstream = [grad.to(output.dtype) for grad, output in zip(upstream, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return tuple(output.detach() for output in outputs), dict(zip(leaves, grads, strict=True))
