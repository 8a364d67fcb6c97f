"""Noise schedules: what a and b are at time t in x_t = a x0 + b eps, and what follows from them.

A schedule is a small module without parameters. Discrete ones hold tables over t = 0 .. T - 1, computed in fp64 and
stored as fp32; continuous ones compute a and b from a float t. Objectives, weights and the reverse step only use a, b
and half the log of the signal-to-noise ratio, log(a / b), so they are the same formulas for every schedule.

Example:
    >>> schedule = linear(1000)
    >>> a, b = schedule.coefficients(torch.tensor([0, 500, 999]))
    >>> bool((a * a + b * b - 1).abs().max() < 1e-6)
    True
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genfast.random import Stream, as_seed, integers, is_plain, normal, uniform
from genfast.reference import _linear_gaussian
from genfast.reference._linear_gaussian import OBJECTIVES, WEIGHTINGS

__all__ = [
    "EDM",
    "NAMES",
    "OBJECTIVES",
    "SPACINGS",
    "WEIGHTINGS",
    "ContinuousSchedule",
    "DiscreteSchedule",
    "RectifiedFlow",
    "Schedule",
    "cosine",
    "edm",
    "from_alpha_bar",
    "from_betas",
    "get",
    "linear",
    "rectified_flow",
    "scaled_linear",
    "sigmoid",
    "sigmoid_beta",
    "zero_terminal_snr",
]

SPACINGS = ("trailing", "leading", "linspace")
# The salt of the noise that a step draws is t, and has 24 bits.
_MOST_STEPS = 1 << 24


class Schedule(nn.Module):
    """What every schedule offers. Make your own from `DiscreteSchedule` or `ContinuousSchedule`.

    Attributes:
        continuous: whether t is a float; otherwise it is an int in 0 .. num_steps - 1.
        num_steps: T of a discrete schedule, None of a continuous one.
        default_objective: what a network on this schedule usually predicts, one of `OBJECTIVES`.
        sigma_data: the standard deviation of the data that the objective "edm" and the weighting "sigma" assume.
        config: what `get` rebuilds the schedule from; None where the tables are your own.
    """

    continuous: bool
    num_steps: int | None = None
    default_objective: str = "epsilon"
    sigma_data: float = 1.0
    config: dict[str, Any] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the schedule lives, and what it draws."""
        return self._place.device

    def extra_repr(self) -> str:
        if self.config is None:
            return f"num_steps={self.num_steps}"
        return ", ".join(f"{key}={value!r}" for key, value in self.config.items())

    def table(self, t: Tensor | float) -> Tensor:
        """a, b, and log(a / b) as the sum of two floats, at given times.

        Args:
            t: int64 [n] (discrete: -1 is the clean image, a = 1 and b = 0) or float [n] (continuous), or a number.

        Returns:
            fp32 [4, n]: rows a, b, hi, lo; hi + lo is log(a / b) to about 48 bits, and lo is 0 where it is infinite.
            A column of NaN where t is outside the schedule.

        Raises:
            TypeError: a float t for a discrete schedule, or an int tensor for a continuous one.
        """
        raise NotImplementedError

    def coefficients(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """(a, b) of x_t = a x0 + b eps.

        Args:
            t: as for `table`.

        Returns:
            Two fp32 tensors [n] on t's device.
        """
        return tuple(self.table(t)[:2].unbind(0))

    def target_coefficients(self, t: Tensor | float, objective: str | None = None) -> tuple[Tensor, Tensor]:
        """(p, q) of the network's target p x0 + q eps.

        Args:
            t: as for `table`.
            objective: one of `OBJECTIVES`; the schedule's own if None.

        Returns:
            Two fp32 tensors [n].

        Raises:
            ValueError: an unknown objective.
        """
        objective = self._objective(objective)
        return _linear_gaussian.target_coefficients(*self.coefficients(t), objective, self.sigma_data)

    def snr(self, t: Tensor | float) -> Tensor:
        """The signal-to-noise ratio (a / b)^2, fp32 [n]; t as for `table`."""
        a, b = self.coefficients(t)
        return (a / b).square()

    def weight(
        self, t: Tensor | float, objective: str | None = None, weighting: str = "none", gamma: float = 5.0
    ) -> Tensor:
        """How much the squared error of each sample counts.

        Args:
            t: as for `table`.
            objective: one of `OBJECTIVES`; the schedule's own if None.
            weighting: "none": 1. "min_snr": min(SNR, gamma) times the squared error of x0, expressed for the objective
                (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy"); defined at SNR 0.
                "sigma": (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 times that error, sigma = b / a
                (Karras et al. 2022, Table 1).
            gamma: where "min_snr" cuts.

        Returns:
            fp32 [n].

        Raises:
            ValueError: an unknown objective or weighting, or a negative gamma.

        Example:
            >>> linear(1000).weight(torch.tensor([0, 999]), "epsilon", "min_snr")
            tensor([5.0005e-04, 1.0000e+00])
        """
        objective = self._objective(objective)
        _check_choice("weighting", weighting, WEIGHTINGS)
        if not 0 <= gamma < math.inf:
            raise ValueError(f"gamma: expected a finite number >= 0, got {gamma}")
        a, b = self.coefficients(t)
        weight = _linear_gaussian.loss_weight(a, b, objective, weighting, gamma, self.sigma_data)
        return torch.ones_like(a) if weight is None else weight

    def draw_t(self, n: int, *, seed: int | Tensor | None = None, row_offset: int = 0) -> Tensor:
        """Draw a time for each of n samples, from `Stream.TIMESTEP`.

        Args:
            n: how many.
            seed: None (drawn), an int, or an int64 tensor of one element; the device of a tensor is the result's.
            row_offset: global index of the first sample.

        Returns:
            [n]: int64, uniform over 0 .. T - 1, or fp32 where the schedule is continuous.
        """
        raise NotImplementedError

    def timesteps(self, steps: int | None = None, spacing: str = "trailing") -> Tensor:
        """The times that a sampler visits, from noise to the clean image.

        Args:
            steps: how many steps; all T of a discrete schedule if None, 50 of a continuous one.
            spacing: which of the T a discrete schedule visits, exactly as diffusers does: "trailing" ends its steps
                at T - 1, "leading" starts them at 0, "linspace" does both (Lin et al. 2023, Table 2). Continuous
                schedules have one spacing, "trailing".

        Returns:
            [steps + 1] descending, the last being the clean image: int64 and -1, or fp32 and 0.

        Raises:
            ValueError: an unknown spacing, steps below 1 or above T.

        Example:
            >>> linear(1000).timesteps(4)
            tensor([999, 749, 499, 249,  -1])
        """
        raise NotImplementedError

    def check_t(
        self,
        t: Tensor | float,
        batch: int,
        device: torch.device | str,
        *,
        name: str = "t",
        clean: bool = False,
    ) -> Tensor:
        """Bring any accepted spelling of t to one time for each sample.

        Values are looked at on the CPU only: a GPU would have to wait, and gives NaN for a sample whose t is outside.

        Args:
            t: a number, or a tensor of one element or of shape [batch] on `device`: int64 or int32 where the schedule
                is discrete, any float dtype where it is continuous.
            batch: how many samples.
            device: where they are.
            name: what error messages call it.
            clean: whether the clean image (-1, or 0.0) counts as a time.

        Returns:
            int64 or fp32 [batch] on `device`; one time for all has stride 0.

        Raises:
            TypeError: a float for a discrete schedule, ints for a continuous one, another dtype, a bool.
            ValueError: another shape or device, or a value outside the schedule.
        """
        device = torch.device(device)
        if not isinstance(t, Tensor):
            self._check_number(t, name)
            if not self._inside(t, clean):
                raise ValueError(f"{name}: expected {self._range(clean)}, got {t}")
            dtype = torch.float32 if self.continuous else torch.int64
            return torch.full((1,), t, dtype=dtype, device=device).expand(batch)
        self._check_dtype(t, name)
        if t.device.type != device.type or device.index not in (None, t.device.index):
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {t.device}")
        if t.numel() != 1 and t.shape != (batch,):
            raise ValueError(f"{name}: expected one element or shape [{batch}], got shape {list(t.shape)}")
        t = t.to(torch.float32 if self.continuous else torch.int64)
        if t.device.type == "cpu":
            inside = self._inside(t, clean)
            if not is_plain(t):
                # torch 2.11 cannot put a symbolic float into a string.
                wanted = "times of the schedule" if self.continuous else self._range(clean)
                torch._assert_async(inside.all(), f"{name}: expected {wanted}")
            elif not inside.all():
                raise ValueError(f"{name}: expected {self._range(clean)}, got {t[~inside].flatten()[0].item():g}")
        return t.reshape(1).expand(batch) if t.numel() == 1 else t

    def salt(self, t: Tensor) -> Tensor:
        """24 bits for each sample that tell the noise of one step from that of another: int64 [n]."""
        if not self.continuous:
            return t.to(torch.int64)
        # The exponent and 16 bits of the mantissa.
        return (t.to(torch.float32).view(torch.int32) >> 7).to(torch.int64) & (_MOST_STEPS - 1)

    def time_input(self, t: Tensor) -> Tensor:
        """What the network gets as its time."""
        return t

    def input_scale(self, t: Tensor) -> Tensor | None:
        """What the network's input x_t is multiplied by, fp32 [n]; None: nothing."""
        return None

    def _objective(self, objective: str | None) -> str:
        if objective is None:
            return self.default_objective
        _check_choice("objective", objective, OBJECTIVES)
        return objective

    def _inside(self, t: Any, clean: bool) -> Any:
        """Whether a number, or each element of a tensor, is a time of this schedule."""
        raise NotImplementedError

    def _range(self, clean: bool) -> str:
        raise NotImplementedError

    def _check_number(self, t: float, name: str) -> None:
        wanted = "a float" if self.continuous else "an int"
        kinds = (int, np.integer, torch.SymInt)
        if self.continuous:
            kinds = (*kinds, float, np.floating, torch.SymFloat)
        if isinstance(t, bool) or not isinstance(t, kinds):
            raise TypeError(f"{name}: expected {wanted} or a tensor, got {type(t).__name__}")

    def _check_dtype(self, t: Tensor, name: str) -> None:
        if self.continuous and not t.is_floating_point():
            raise TypeError(f"{name}: expected a float tensor, since the schedule is continuous, got {t.dtype}")
        if not self.continuous and t.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected an int64 tensor, since the schedule is discrete, got {t.dtype}")

    def _as_tensor(self, t: Tensor | float) -> Tensor:
        if isinstance(t, Tensor):
            self._check_dtype(t, "t")
            return t.to(torch.float32 if self.continuous else torch.int64)
        return self.check_t(t, 1, self.device, clean=True)


class DiscreteSchedule(Schedule):
    """A schedule over t = 0 .. T - 1, given by its alpha_bar or by its betas.

    alpha_bar_t is the product of 1 - beta_s over s <= t; a = sqrt(alpha_bar), b = sqrt(1 - alpha_bar)
    (Ho et al. 2020, eq. 4).

    Args:
        alpha_bar: [T], decreasing, inside (0, 1); the last may be 0 (no signal is left).
        betas: [T] inside (0, 1) instead; the last may be 1.
        config: what `get` rebuilds the schedule from.

    Attributes:
        tables: fp32 [4, T], what `table` gives for every t.
        alpha_bar, betas: fp32 [T].
        alpha_bar_fp64, betas_fp64: the same in fp64, on the CPU.

    The buffers are not saved with a model's weights, move with it, and stay fp32 when it is cast.

    Raises:
        TypeError: not exactly one of alpha_bar and betas is given.
        ValueError: a shape that is not [T], or values that no schedule has.
    """

    continuous = False

    def __init__(
        self,
        alpha_bar: Tensor | Sequence[float] | None = None,
        *,
        betas: Tensor | Sequence[float] | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (alpha_bar is None) == (betas is None):
            raise TypeError(f"alpha_bar: expected it or betas, got {'none' if betas is None else 'both'}")
        if betas is not None:
            self.betas_fp64 = _fp64("betas", betas)
            _check_betas(self.betas_fp64)
            log_alpha_bar = torch.log1p(-self.betas_fp64).cumsum(0)
            self.alpha_bar_fp64 = log_alpha_bar.exp()
        else:
            self.alpha_bar_fp64 = _fp64("alpha_bar", alpha_bar)
            _check_alpha_bar(self.alpha_bar_fp64)
            log_alpha_bar = self.alpha_bar_fp64.log()
            self.betas_fp64 = -torch.expm1(log_alpha_bar.diff(prepend=log_alpha_bar.new_zeros(1)))
        self._rest_fp64 = -torch.expm1(log_alpha_bar)
        self._half_log_snr_fp64 = (log_alpha_bar - self._rest_fp64.log()) / 2
        self.num_steps = len(self.alpha_bar_fp64)
        self.config = config
        if log_alpha_bar[-1] == -math.inf:
            # Where no signal is left x_t is eps, and predicting it teaches nothing.
            self.default_objective = "v"
        device = torch.get_default_device()
        for name, values in self._exact().items():
            self.register_buffer(name, values.to(device), persistent=False)

    def _exact(self) -> dict[str, Tensor]:
        """The buffers, from fp64, on the CPU."""
        hi, lo = _split(self._half_log_snr_fp64)
        a, b = self.alpha_bar_fp64.sqrt().float(), self._rest_fp64.sqrt().float()
        tables = torch.stack([a, b, hi, lo])
        clean = torch.tensor([1.0, 0.0, math.inf, 0.0], device="cpu")
        outside = torch.full((4,), math.nan, device="cpu")
        return {
            "tables": tables,
            "alpha_bar": self.alpha_bar_fp64.float(),
            "betas": self.betas_fp64.float(),
            "_padded": torch.cat([tables, clean[:, None], outside[:, None]], 1),
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiscreteSchedule:
        """Follow the model to another device, but not to another dtype; memory that came empty is filled again."""
        super()._apply(fn, recurse)
        for name, values in self._exact().items():
            moved = self._buffers[name]
            if moved.dtype != torch.float32:
                self._buffers[name] = values.to(moved.device)
            elif not moved.is_meta:
                moved.copy_(values)
        return self

    def table(self, t: Tensor | int) -> Tensor:
        t = self._as_tensor(t)
        index = torch.where(self._inside(t, False), t, torch.where(t == -1, self.num_steps, self.num_steps + 1))
        return self._padded.to(t.device)[:, index]

    def draw_t(self, n: int, *, seed: int | Tensor | None = None, row_offset: int = 0) -> Tensor:
        return integers(_seed_here(seed, self.device), n, 1, self.num_steps, Stream.TIMESTEP, row_offset).reshape(n)

    def timesteps(self, steps: int | None = None, spacing: str = "trailing") -> Tensor:
        steps = self.num_steps if steps is None else steps
        _check_choice("spacing", spacing, SPACINGS)
        _check_int("steps", steps, 1, self.num_steps)
        if spacing == "trailing":
            # Rounding makes some of diffusers' lists one step longer, with -1 at their end already.
            visited = np.round(np.arange(self.num_steps, 0, -self.num_steps / steps))[:steps] - 1
        elif spacing == "leading":
            visited = np.arange(steps)[::-1] * (self.num_steps // steps)
        else:
            visited = np.linspace(0, self.num_steps - 1, steps).round()[::-1]
        return torch.tensor([*visited.astype(np.int64).tolist(), -1], device=self.device)

    def _inside(self, t: Any, clean: bool) -> Any:
        return (t >= (-1 if clean else 0)) & (t < self.num_steps)

    def _range(self, clean: bool) -> str:
        return f"values in {-1 if clean else 0}..{self.num_steps - 1}"


class ContinuousSchedule(Schedule):
    """A schedule over a float t that falls to 0 at the clean image.

    A subclass defines `path`, and `draw_t` and `timesteps` where uniform ones over 0 .. 1 do not do.

    Attributes:
        highest: the end of the range of t.
        lowest_is_clean: whether t = 0 is the clean image only, and no time to train at.

    Example:
        >>> class Circle(ContinuousSchedule):
        ...     def path(self, t):
        ...         return torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
        >>> Circle().coefficients(torch.tensor([0.5]))
        (tensor([0.7071]), tensor([0.7071]))
    """

    continuous = True
    highest: float = 1.0
    lowest_is_clean: bool = False

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) at t, fp64 [n] from fp64 [n]."""
        raise NotImplementedError

    def table(self, t: Tensor | float) -> Tensor:
        a, b = self._path(t)
        return torch.stack([a.float(), b.float(), *_split(a.log() - b.log())])

    def coefficients(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        a, b = self._path(t)
        return a.float(), b.float()

    def _path(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        t = self._as_tensor(t)
        return self.path(torch.where(self._inside(t, True), _wide(t), math.nan))

    def draw_t(self, n: int, *, seed: int | Tensor | None = None, row_offset: int = 0) -> Tensor:
        return uniform(_seed_here(seed, self.device), n, 1, Stream.TIMESTEP, row_offset).reshape(n)

    def timesteps(self, steps: int | None = None, spacing: str = "trailing") -> Tensor:
        steps = _continuous_steps(steps, spacing)
        return self._times(np.linspace(1, 0, steps + 1))

    def _times(self, times: np.ndarray) -> Tensor:
        return torch.tensor(times.tolist(), dtype=torch.float32, device=self.device)

    def _inside(self, t: Any, clean: bool) -> Any:
        low = t > 0 if self.lowest_is_clean and not clean else t >= 0
        return low & (t <= self.highest) & (t < math.inf)

    def _range(self, clean: bool) -> str:
        if self.highest < math.inf:
            return f"values in [0, {self.highest:g}]"
        return "finite values of at least 0" if clean else "finite values above 0"


class RectifiedFlow(ContinuousSchedule):
    """The straight path x_t = (1 - t) x0 + t eps, t in [0, 1]; see `rectified_flow`."""

    default_objective = "flow"

    def __init__(self, shift: float = 1.0, draw: str = "logit_normal", mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        _check_positive("shift", shift)
        _check_choice("draw", draw, ("logit_normal", "uniform"))
        _check_finite("mean", mean)
        _check_positive("std", std)
        self.shift, self.draw, self.mean, self.std = float(shift), draw, float(mean), float(std)
        self.config = {"name": "rectified_flow", "shift": shift, "draw": draw, "mean": mean, "std": std}

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def draw_t(self, n: int, *, seed: int | Tensor | None = None, row_offset: int = 0) -> Tensor:
        if self.draw == "uniform":
            return super().draw_t(n, seed=seed, row_offset=row_offset)
        z = normal(_seed_here(seed, self.device), n, 1, Stream.TIMESTEP, row_offset).reshape(n)
        # Not torch.sigmoid: on a CPU its value depends on where in the batch a sample is.
        return (1 / (1 + torch.exp(-self.mean - self.std * _wide(z)))).float()

    def timesteps(self, steps: int | None = None, spacing: str = "trailing") -> Tensor:
        t = np.linspace(1, 0, _continuous_steps(steps, spacing) + 1)
        return self._times(self.shift * t / (1 + (self.shift - 1) * t))

    def time_input(self, t: Tensor) -> Tensor:
        """1000 t: networks embed times of that size."""
        return 1000 * t


class EDM(ContinuousSchedule):
    """x_t = x0 + sigma eps with t = sigma itself, and the preconditioning of Karras et al.; see `edm`."""

    default_objective = "edm"
    highest = math.inf
    lowest_is_clean = True

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.5,
        mean: float = -1.2,
        std: float = 1.2,
    ) -> None:
        super().__init__()
        _check_positive("sigma_min", sigma_min)
        _check_positive("sigma_max", sigma_max)
        if sigma_max <= sigma_min:
            raise ValueError(f"sigma_max: expected a number above sigma_min = {sigma_min}, got {sigma_max}")
        _check_positive("rho", rho)
        _check_positive("sigma_data", sigma_data)
        _check_finite("mean", mean)
        _check_positive("std", std)
        self.sigma_min, self.sigma_max, self.rho = float(sigma_min), float(sigma_max), float(rho)
        self.sigma_data, self.mean, self.std = float(sigma_data), float(mean), float(std)
        self.config = {
            "name": "edm", "sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho, "sigma_data": sigma_data,
            "mean": mean, "std": std,
        }  # fmt: skip

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(t.isnan(), t, torch.ones_like(t)), t

    def draw_t(self, n: int, *, seed: int | Tensor | None = None, row_offset: int = 0) -> Tensor:
        z = normal(_seed_here(seed, self.device), n, 1, Stream.TIMESTEP, row_offset).reshape(n)
        return torch.exp(self.mean + self.std * _wide(z)).float()

    def timesteps(self, steps: int | None = None, spacing: str = "trailing") -> Tensor:
        """Karras et al. 2022, eq. 5, and 0 at the end."""
        ramp = np.linspace(0, 1, _continuous_steps(steps, spacing))
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return self._times(np.append((high + ramp * (low - high)) ** self.rho, 0.0))

    def time_input(self, t: Tensor) -> Tensor:
        """c_noise."""
        return self.c_noise(t)

    def input_scale(self, t: Tensor) -> Tensor:
        """c_in."""
        return self.c_in(t)

    def c_in(self, sigma: Tensor) -> Tensor:
        """1 / sqrt(sigma^2 + sigma_data^2): the network's input has unit variance."""
        return torch.rsqrt(sigma.square() + self.sigma_data**2)

    def c_skip(self, sigma: Tensor) -> Tensor:
        """sigma_data^2 / (sigma^2 + sigma_data^2): the estimate of x0 is c_skip x_t + c_out F."""
        return self.sigma_data**2 / (sigma.square() + self.sigma_data**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        """sigma sigma_data / sqrt(sigma^2 + sigma_data^2)."""
        return sigma * self.sigma_data * self.c_in(sigma)

    def c_noise(self, sigma: Tensor) -> Tensor:
        """ln(sigma) / 4."""
        return torch.log(sigma) / 4


def linear(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteSchedule:
    """beta rises evenly from beta_start to beta_end (Ho et al. 2020, "Denoising Diffusion Probabilistic Models").

    The defaults belong to 1000 steps: with fewer, larger betas are needed to reach noise.

    Args:
        num_steps: T.
        beta_start, beta_end: inside (0, 1).

    Raises:
        ValueError: num_steps below 1, or a beta outside (0, 1).

    Example:
        >>> linear(1000).betas[[0, -1]]
        tensor([1.0000e-04, 2.0000e-02])
    """
    _check_beta_range(num_steps, beta_start, beta_end)
    betas = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64, device="cpu")
    return DiscreteSchedule(betas=betas, config=_beta_config("linear", num_steps, beta_start, beta_end))


def scaled_linear(num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> DiscreteSchedule:
    """sqrt(beta) rises evenly (Rombach et al. 2022, latent diffusion; the defaults are those of Stable Diffusion).

    Arguments and errors as for `linear`.

    Example:
        >>> scaled_linear().betas[[0, 500, -1]]
        tensor([0.0009, 0.0048, 0.0120])
    """
    _check_beta_range(num_steps, beta_start, beta_end)
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64, device="cpu")
    return DiscreteSchedule(betas=roots**2, config=_beta_config("scaled_linear", num_steps, beta_start, beta_end))


def sigmoid_beta(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteSchedule:
    """beta rises from beta_start to beta_end along a sigmoid over -6 .. 6 (Xu et al. 2022, GeoDiff).

    This is what diffusers calls "sigmoid"; `sigmoid` here is a sigmoid of alpha_bar, something else.
    Arguments and errors as for `linear`.

    Example:
        >>> sigmoid_beta(1000).betas[[0, 499, -1]]
        tensor([0.0001, 0.0100, 0.0200])
    """
    _check_beta_range(num_steps, beta_start, beta_end)
    ramp = torch.linspace(-6, 6, num_steps, dtype=torch.float64, device="cpu")
    betas = torch.sigmoid(ramp) * (beta_end - beta_start) + beta_start
    return DiscreteSchedule(betas=betas, config=_beta_config("sigmoid_beta", num_steps, beta_start, beta_end))


def cosine(num_steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> DiscreteSchedule:
    """alpha_bar falls as cos^2, with each beta cut at max_beta (Nichol and Dhariwal 2021, "Improved DDPM", eq. 17).

    Args:
        num_steps: T.
        offset: the paper's s, which keeps the first betas from vanishing.
        max_beta: inside (0, 1).

    Raises:
        ValueError: num_steps below 1, a negative offset, or max_beta outside (0, 1).

    Example:
        >>> cosine(1000).alpha_bar[499]
        tensor(0.4938)
    """
    num_steps = _check_int("num_steps", num_steps, 1, _MOST_STEPS)
    _check_fraction("max_beta", max_beta)
    _check_finite("offset", offset)
    if offset < 0:
        raise ValueError(f"offset: expected a number of at least 0, got {offset}")
    angle = torch.arange(num_steps + 1, dtype=torch.float64, device="cpu") / num_steps
    angle = (angle + offset) / (1 + offset) * (math.pi / 2)
    before, after = angle[:-1], angle[1:]
    # 1 - cos^2(after) / cos^2(before), without the cancellation.
    betas = torch.sin(after - before) * torch.sin(after + before) / torch.cos(before) ** 2
    config = {"name": "cosine", "num_steps": num_steps, "offset": offset, "max_beta": max_beta}
    return DiscreteSchedule(betas=betas.clamp(max=max_beta), config=config)


def sigmoid(num_steps: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> DiscreteSchedule:
    """alpha_bar falls along a sigmoid (Jabri et al. 2022; Chen 2023, "On the Importance of Noise Scheduling").

    alpha_bar at u = (t + 1) / T is (S(end) - S(start + u (end - start))) / (S(end) - S(start)) with
    S(x) = sigmoid(x / tau), and at least 1e-9. What diffusers calls "sigmoid" is `sigmoid_beta`.

    Args:
        num_steps: T.
        start, end, tau: which piece of the sigmoid; start below end, tau positive.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> sigmoid(1000).alpha_bar[499]
        tensor(0.5000)
    """
    num_steps = _check_int("num_steps", num_steps, 1, _MOST_STEPS)
    _check_finite("start", start)
    _check_finite("end", end)
    if end <= start:
        raise ValueError(f"end: expected a number above start = {start}, got {end}")
    _check_positive("tau", tau)
    u = torch.arange(1, num_steps + 1, dtype=torch.float64, device="cpu") / num_steps
    low, high = torch.sigmoid(torch.tensor([start / tau, end / tau], dtype=torch.float64, device="cpu"))
    alpha_bar = ((high - torch.sigmoid((start + u * (end - start)) / tau)) / (high - low)).clamp(min=1e-9)
    flat = (alpha_bar.diff(prepend=alpha_bar.new_ones(1)) >= 0).nonzero()
    if len(flat):
        reason = f"between start = {start} and end = {end} the step to t = {int(flat[0])} would add no noise"
        raise ValueError(f"tau: expected another one than {tau}, since {reason}")
    config = {"name": "sigmoid", "num_steps": num_steps, "start": start, "end": end, "tau": tau}
    return DiscreteSchedule(alpha_bar, config=config)


def zero_terminal_snr(schedule: DiscreteSchedule) -> DiscreteSchedule:
    """The schedule with a shifted and scaled so that its last is exactly 0 and its first as before.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", Algorithm 1. The default objective
    becomes "v", since eps says nothing where no signal is left.

    Args:
        schedule: a discrete schedule of at least 2 steps.

    Raises:
        TypeError: a schedule that is not discrete.
        ValueError: a schedule of one step.

    Example:
        >>> zero_terminal_snr(linear(1000)).alpha_bar[-1]
        tensor(0.)
    """
    if not isinstance(schedule, DiscreteSchedule):
        raise TypeError(f"schedule: expected a DiscreteSchedule, got {type(schedule).__name__}")
    if schedule.num_steps < 2:
        raise ValueError(f"schedule: expected at least 2 steps, got {schedule.num_steps}")
    a = schedule.alpha_bar_fp64.sqrt()
    a = (a - a[-1]) * (a[0] / (a[0] - a[-1]))
    config = None if schedule.config is None else {**schedule.config, "zero_terminal_snr": True}
    return DiscreteSchedule(a * a, config=config)


def from_betas(betas: Tensor | Sequence[float]) -> DiscreteSchedule:
    """A schedule from your own betas.

    Args:
        betas: [T] inside (0, 1); the last may be 1.

    Raises:
        ValueError: another shape, or a beta outside.

    Example:
        >>> from_betas([0.1, 0.2]).alpha_bar
        tensor([0.9000, 0.7200])
    """
    return DiscreteSchedule(betas=betas)


def from_alpha_bar(alpha_bar: Tensor | Sequence[float]) -> DiscreteSchedule:
    """A schedule from your own alpha_bar, for example a diffusers scheduler's `alphas_cumprod`.

    Args:
        alpha_bar: [T], decreasing, inside (0, 1); the last may be 0.

    Raises:
        ValueError: another shape, or values that do not fall or are outside.

    Example:
        >>> from_alpha_bar([0.9, 0.72]).betas
        tensor([0.1000, 0.2000])
    """
    return DiscreteSchedule(alpha_bar)


def rectified_flow(
    shift: float = 1.0, draw: str = "logit_normal", mean: float = 0.0, std: float = 1.0
) -> RectifiedFlow:
    """The straight path x_t = (1 - t) x0 + t eps; the network predicts its velocity eps - x0.

    Liu et al. 2022, "Flow Straight and Fast"; Esser et al. 2024 (Stable Diffusion 3) for the options.

    Args:
        shift: sampling visits s t / (1 + (s - 1) t) instead of t: above 1, more of the steps at high noise.
        draw: how training draws t: "logit_normal", or "uniform" over (0, 1).
        mean, std: of logit(t).

    Raises:
        ValueError: a shift or std that is not positive, an unknown draw.

    Example:
        >>> rectified_flow(shift=3.0).timesteps(4)
        tensor([1.0000, 0.9000, 0.7500, 0.5000, 0.0000])
    """
    return RectifiedFlow(shift, draw, mean, std)


def edm(
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    sigma_data: float = 0.5,
    mean: float = -1.2,
    std: float = 1.2,
) -> EDM:
    """x_t = x0 + sigma eps with t = sigma, and its preconditioned network.

    Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", Table 1.

    Args:
        sigma_min, sigma_max, rho: what sampling visits: sigma^(1 / rho) falls evenly.
        sigma_data: the standard deviation of the data.
        mean, std: of ln(sigma), as training draws it.

    Raises:
        ValueError: a number that is not positive, or sigma_max not above sigma_min.

    Example:
        >>> edm().timesteps(3)
        tensor([8.0000e+01, 2.5152e+00, 2.0000e-03, 0.0000e+00])
    """
    return EDM(sigma_min, sigma_max, rho, sigma_data, mean, std)


_MAKERS: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "sigmoid_beta": sigmoid_beta,
    "sigmoid": sigmoid,
    "rectified_flow": rectified_flow,
    "edm": edm,
}
NAMES = tuple(_MAKERS)


def get(name: str, *, zero_terminal_snr: bool = False, **options: Any) -> Schedule:
    """A schedule by its name: ``get(**schedule.config)`` makes the same one again.

    Args:
        name: one of `NAMES`; hyphens do for underscores.
        zero_terminal_snr: rescale it, see the function of that name.
        options: the arguments of the function of that name.

    Raises:
        ValueError: an unknown name or option, or a value that the function refuses.

    Example:
        >>> get("rectified-flow", shift=3.0).shift
        3.0
    """
    known = name.replace("-", "_") if isinstance(name, str) else name
    _check_choice("name", known, NAMES)
    for option in options:
        _check_choice("options", option, tuple(inspect.signature(_MAKERS[known]).parameters))
    schedule = _MAKERS[known](**options)
    return _rescaled(schedule) if zero_terminal_snr else schedule


# `get` has an argument of that name.
_rescaled = zero_terminal_snr


def _seed_here(seed: int | Tensor | None, device: torch.device) -> Tensor:
    return as_seed(seed) if isinstance(seed, Tensor) else as_seed(seed, device)


def _wide(x: Tensor) -> Tensor:
    """fp64, but for Apple's GPUs, which have none."""
    return x if x.device.type == "mps" else x.double()


def _split(value: Tensor) -> tuple[Tensor, Tensor]:
    """An fp64 value as the sum of two fp32 ones; an infinite one is all in the first."""
    hi = value.float()
    return hi, torch.where(hi.isinf(), torch.zeros_like(value), value - hi).float()


def _fp64(name: str, values: Tensor | Sequence[float]) -> Tensor:
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64, copy=True)
    else:
        values = torch.tensor(values, dtype=torch.float64, device="cpu")
    if values.dim() != 1 or not 1 <= len(values) <= _MOST_STEPS:
        raise ValueError(f"{name}: expected shape [T] with T from 1 to 2^24, got shape {list(values.shape)}")
    return values


def _check_betas(betas: Tensor) -> None:
    inside = (betas > 0) & (betas < 1)
    inside[-1] |= betas[-1] == 1
    if not inside.all():
        at = int((~inside).nonzero()[0])
        raise ValueError(f"betas: expected values inside (0, 1), the last at most 1, got {betas[at]:g} at {at}")


def _check_alpha_bar(alpha_bar: Tensor) -> None:
    inside = (alpha_bar > 0) & (alpha_bar < 1)
    inside[-1] |= alpha_bar[-1] == 0
    if not inside.all():
        at = int((~inside).nonzero()[0])
        raise ValueError(
            f"alpha_bar: expected values inside (0, 1), the last at least 0, got {alpha_bar[at]:g} at {at}"
        )
    rising = alpha_bar.diff() >= 0
    if rising.any():
        at = int(rising.nonzero()[0])
        raise ValueError(
            f"alpha_bar: expected decreasing values, got {alpha_bar[at]:g} and {alpha_bar[at + 1]:g} from {at} on"
        )


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_int(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected an int from {low} to {high}, got {value}")
    # JSON, which configs are saved in, has no numbers of numpy's.
    return int(value)


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a positive number, got {value}")


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name}: expected a number inside (0, 1), got {value}")


def _check_beta_range(num_steps: int, beta_start: float, beta_end: float) -> None:
    num_steps = _check_int("num_steps", num_steps, 1, _MOST_STEPS)
    _check_fraction("beta_start", beta_start)
    _check_fraction("beta_end", beta_end)


def _beta_config(name: str, num_steps: int, beta_start: float, beta_end: float) -> dict[str, Any]:
    return {"name": name, "num_steps": num_steps, "beta_start": beta_start, "beta_end": beta_end}


def _continuous_steps(steps: int | None, spacing: str) -> int:
    _check_choice("spacing", spacing, ("trailing",))
    steps = 50 if steps is None else steps
    _check_int("steps", steps, 1, _MOST_STEPS)
    return steps
