"""diffusers' DDPMScheduler on genfast's ops; apart, because it cannot be defined without diffusers."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import torch

# A pipeline that is loaded looks for this name in the module of its scheduler's class.
from diffusers import SchedulerMixin  # noqa: F401
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from genfast import schedules
from genfast.functional import forward_noising, q_sample
from genfast.functional.reverse_step import step_between
from genfast.random import as_seed

_OBJECTIVES = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
# fixed_small_log is the same number by way of its logarithm.
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}


class DDPMScheduler(diffusers.DDPMScheduler):
    """``diffusers.DDPMScheduler`` whose `add_noise`, `get_velocity` and `step` run on genfast's ops, in fp32 inside.

    Config, time steps, saving and loading are theirs. The coefficients of `step` are rounded as theirs are, so that
    their golden values hold; `genfast.DDPM` has more exact ones. `add_noise` in bf16 adds noise at small t, where
    theirs adds none. `step` with a generator draws torch's noise from it, as theirs does; without one, its noise comes
    from a genfast seed, itself drawn from torch's generator.

    ``thresholding``, the variance types "learned" and "fixed_large_log", noise added on the way to the clean image
    (trailing time steps with a variance that is not "fixed_small"), shapes that broadcast, and betas outside (0, 1) run
    their own code. A saved pipeline names this class, so loading it needs genfast. `step` runs the kernel twice, since
    it also returns the predicted x0.

    Example:
        >>> scheduler = DDPMScheduler(num_train_timesteps=1000)
        >>> x0, noise = torch.zeros(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
        >>> scheduler.add_noise(x0, noise, torch.tensor([10, 999])).shape
        torch.Size([2, 3, 8, 8])
    """

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise; arguments as theirs."""
        schedule = self._schedule_on(original_samples.device)
        if schedule is None or noise.shape != original_samples.shape:
            return super().add_noise(original_samples, noise, timesteps)
        dtype, t = torch.promote_types(original_samples.dtype, noise.dtype), timesteps.to(original_samples.device)
        return q_sample(original_samples, t, schedule, noise=noise, dtype=dtype).x_t

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x0; arguments as theirs."""
        schedule, dtype = self._schedule_on(sample.device), torch.promote_types(sample.dtype, noise.dtype)
        if schedule is None or noise.shape != sample.shape:
            return super().get_velocity(sample, noise, timesteps)
        t = schedule.check_t(timesteps.to(sample.device), sample.shape[0], sample.device, name="timesteps")
        a, b = schedule.coefficients(t)
        return forward_noising(sample, -b, a, noise=noise, dtype=dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Go one step back; arguments, result and errors as theirs."""
        t = int(timestep)
        t_prev = max(-1, int(self.previous_timestep(t)))
        schedule, channels = self._schedule_on(sample.device), sample.shape[1]
        if schedule is None or not self._is_fused(t, t_prev):
            return super().step(model_output, timestep, sample, generator, return_dict)
        variance = _VARIANCES[self.variance_type]
        # As theirs: without a second half nothing was learned, and their next line says what is missing.
        if variance == "learned_range" and model_output.shape[1] != 2 * channels:
            return super().step(model_output, timestep, sample, generator, return_dict)
        said = model_output[:, :channels] if variance == "learned_range" else model_output
        objective = _OBJECTIVES[self.config.prediction_type]
        clip = float(self.config.clip_sample_range) if self.config.clip_sample else None
        now, prev, clean = (table.expand(4, len(sample)) for table in self._tables(t, t_prev, sample.device))
        salt = torch.full((1,), t, dtype=torch.int64, device=sample.device).expand(len(sample))
        fixed = (None, None, salt)
        x0 = step_between(sample, said, now, clean, *fixed, None, None, 0, objective, 1.0, 0.0, clip, "fixed_small")
        prev_sample = x0
        # Theirs draws for the last of few steps too, to add 1e-10 of it: the generator goes on from there.
        noise = self._noise(said, generator) if t > 0 else None
        if t_prev >= 0:
            seed = as_seed(None, sample.device) if noise is None else None
            options = (0, objective, 1.0, 1.0, clip, variance)
            prev_sample = step_between(sample, model_output, now, prev, *fixed, seed, noise, *options)
        if not return_dict:
            return prev_sample, x0
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _is_fused(self, t: int, t_prev: int) -> bool:
        if self.config.thresholding or self.variance_type not in _VARIANCES:
            return False
        if self.config.prediction_type not in _OBJECTIVES:
            return False
        return t == 0 or t_prev >= 0 or _VARIANCES[self.variance_type] == "fixed_small"

    def _noise(self, said: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor | None:
        """torch's noise where a generator is given; else the op makes its own."""
        if generator is None:
            return None
        return randn_tensor(said.shape, generator=generator, device=said.device, dtype=said.dtype)

    def _tables(self, t: int, t_prev: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The entries at t, at t_prev and of the clean image, as the op takes them: [4, 1] each."""
        *_, values, columns = self._made
        key = t, t_prev, device
        if key not in columns:
            columns[key] = _columns(*(values[i] if i >= 0 else 1.0 for i in (t, t_prev)), device)
        return columns[key]

    def _schedule_on(self, device: torch.device) -> schedules.DiscreteSchedule | None:
        """The schedule of their table, made anew if somebody changes the table; None where it is none."""
        table, schedule, values, columns = getattr(self, "_made", (None, None, None, None))
        if table is not self.alphas_cumprod:
            on_cpu = self.alphas_cumprod.detach().cpu()
            values, columns = on_cpu.tolist(), {}
            try:
                schedule = schedules.from_alpha_bar(on_cpu.double())
            except ValueError:
                schedule = None
        if schedule is not None and schedule.tables.device != device:
            schedule = schedule.to(device)
        self._made = self.alphas_cumprod, schedule, values, columns
        return schedule


def _columns(bar: float, bar_prev: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Columns (a, b, log(a / b), 0) whose step has the coefficients of x0 and x_t that diffusers computes in fp32.

    With c0 and c1 these coefficients, r^2 = a c1 / (c0 + a c1) is the ratio of the signal-to-noise ratios, a_s = c0 +
    a c1 and b_s = c1 b / r.
    """
    one, bar_t, bar_s = (np.float32(value) for value in (1.0, bar, bar_prev))
    alpha, rest = bar_t / bar_s, one - bar_t
    c0 = float(bar_s ** np.float32(0.5) * (one - alpha) / rest)
    c1 = float(alpha ** np.float32(0.5) * (one - bar_s) / rest)
    a, b = math.sqrt(bar), math.sqrt(1 - bar)
    now = [a, b, math.log(a / b) if a > 0 else -math.inf, 0.0]
    clean = [1.0, 0.0, math.inf, 0.0]
    if bar_prev == 1.0:
        prev = clean
    elif a == 0:
        # No signal is left at t, and x_t says nothing about x_prev.
        prev = [c0, math.sqrt(1 - bar_prev), math.log(c0) - 0.5 * math.log(1 - bar_prev), 0.0]
    else:
        ratio = a * c1 / (c0 + a * c1)
        high = np.float32(now[2])
        half = now[2] - 0.5 * math.log(ratio)
        prev = [c0 + a * c1, c1 * b / math.sqrt(ratio), float(np.float32(half)), half - float(np.float32(half))]
        now[2:] = [float(high), now[2] - float(high)]
    return torch.tensor([now, prev, clean], dtype=torch.float32).to(device)[:, :, None].unbind(0)
