"""diffusers' DDPMScheduler on genfast's ops; apart, because it cannot be defined without diffusers."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from genfast import schedules
from genfast.functional import forward_noising, q_sample, reverse_step

_OBJECTIVES = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
# fixed_small_log is the same number by way of its logarithm.
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}


class DDPMScheduler(diffusers.DDPMScheduler):
    """``diffusers.DDPMScheduler`` whose `add_noise`, `get_velocity` and `step` are one fused pass each.

    Config, time steps, saving and loading are theirs. Coefficients stay fp32 whatever the samples are, so `add_noise`
    in bf16 adds noise at small t, where theirs adds none. `step` with a generator draws torch's noise from it, as
    theirs does; without one, its noise comes from a genfast seed, itself drawn from torch's generator.

    ``thresholding``, the variance types "learned" and "fixed_large_log", noise added on the way to the clean image
    (trailing time steps with a variance that is not "fixed_small"), and betas outside (0, 1) run their own code.

    Example:
        >>> scheduler = DDPMScheduler(num_train_timesteps=1000)
        >>> x0, noise = torch.zeros(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
        >>> scheduler.add_noise(x0, noise, torch.tensor([10, 999])).shape
        torch.Size([2, 3, 8, 8])
    """

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise; arguments as theirs."""
        noise, dtype = noise.expand(original_samples.shape), torch.promote_types(original_samples.dtype, noise.dtype)
        t, schedule = timesteps.to(original_samples.device), self._schedule_on(original_samples.device)
        if schedule is None:
            return super().add_noise(original_samples, noise, timesteps)
        return q_sample(original_samples, t, schedule, noise=noise, dtype=dtype).x_t

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x0; arguments as theirs."""
        noise, dtype = noise.expand(sample.shape), torch.promote_types(sample.dtype, noise.dtype)
        schedule = self._schedule_on(sample.device)
        if schedule is None:
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
        learned = model_output.shape[1] == 2 * channels and self.variance_type == "learned_range"
        options = {
            "objective": _OBJECTIVES[self.config.prediction_type],
            "clip": self.config.clip_sample_range if self.config.clip_sample else None,
        }
        if t > 0 and t_prev >= 0:
            options |= {"variance": _VARIANCES[self.variance_type], "noise": self._noise(sample, model_output, generator)}
        else:
            options |= {"eta": 0.0}
        said = model_output[:, :channels] if learned else model_output
        pred = model_output if learned and "variance" in options else said
        prev_sample = reverse_step(sample, pred, t, t_prev, schedule, **options)
        x0 = prev_sample
        if t_prev >= 0:
            options = {key: options[key] for key in ("objective", "clip")}
            x0 = reverse_step(sample, said, t, -1, schedule, eta=0.0, **options)
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0) if return_dict else (prev_sample, x0)

    def _is_fused(self, t: int, t_prev: int) -> bool:
        if self.config.thresholding or self.variance_type not in _VARIANCES:
            return False
        if self.config.prediction_type not in _OBJECTIVES:
            return False
        return t == 0 or t_prev >= 0 or _VARIANCES[self.variance_type] == "fixed_small"

    def _noise(
        self, sample: Tensor, model_output: Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> Tensor | None:
        """torch's noise where a generator is given; else the op makes its own."""
        if generator is None:
            return None
        return randn_tensor(sample.shape, generator=generator, device=model_output.device, dtype=model_output.dtype)

    def _schedule_on(self, device: torch.device) -> schedules.DiscreteSchedule | None:
        """The schedule of their table, made anew if somebody changes the table; None where it is none."""
        table, schedule = getattr(self, "_made", (None, None))
        if table is not self.alphas_cumprod:
            try:
                schedule = schedules.from_alpha_bar(self.alphas_cumprod.detach().cpu().double())
            except ValueError:
                schedule = None
        if schedule is not None and schedule.tables.device != device:
            schedule = schedule.to(device)
        self._made = self.alphas_cumprod, schedule
        return schedule
