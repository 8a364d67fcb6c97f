"""Diffusion models, from training to samples and a likelihood: one set of formulas for every schedule."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast import profiling, schedules
from genfast.capture import Captured
from genfast.functional import _checks, denoising_loss, forward_noising, q_sample
from genfast.functional.reverse_step import step_between
from genfast.models.base import Model, _check_sizes, check_choice, check_images, evaluating
from genfast.models.unet import UNet
from genfast.random import Stream, as_seed, normal
from genfast.reference._linear_gaussian import OBJECTIVES, WEIGHTINGS
from genfast.reference.reverse_step import VARIANCES
from genfast.schedules import Schedule

__all__ = ["DDPM"]

Sampler = Literal["ddpm", "ddim", "euler"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]
# Modes of torch.compile that bring graphs of their own, which no other graph can hold.
_OWN_GRAPHS = ("reduce-overhead", "max-autotune")


class DDPM(Model):
    """Denoising diffusion (Ho, Jain and Abbeel, "Denoising diffusion probabilistic models", NeurIPS 2020).

    x_t = a(t) x0 + b(t) eps, with images in [-1, 1] and eps from N(0, I): the schedule is a and b, the objective says
    what the network predicts from x_t, and one formula each gives the loss, the way back and the likelihood. So the
    same class is DDPM, v-prediction, rectified flow (``schedule="rectified-flow"``) and EDM (``schedule="edm"``).

    Images go in as floats in [0, 1] (not checked: that would wait for the device) or uint8 (meaning x / 255), of shape
    [B, C, H, W], [B, C * H * W], or [B, H, W] where C is 1. They come out as floats in [0, 1].

    Args:
        net: any module ``net(x_t, t)`` that returns [B, C, H, W] (2 C channels for a learned variance) or an object
            whose ``.sample`` that is, as diffusers' models do. t is [B]: int64 for discrete schedules; 1000 t for
            rectified flow, ln(sigma) / 4 for EDM. None: `genfast.UNet` of the preset.
        schedule: a name of `genfast.schedules`, the arguments of `genfast.schedules.get` as a dict, or a `Schedule`.
        objective: what the network predicts: ``"epsilon"``, ``"x0"``, ``"v"``, ``"flow"`` or ``"edm"``. None: the
            schedule's default.
        image_shape: (C, H, W).
        num_steps: of a discrete schedule given by its name. None: the schedule's own, 1000.
        preset: of the U-Net where no net is given: ``"tiny"``, ``"small"`` or ``"base"``.
        weighting, gamma: of the loss; see `genfast.functional.denoising_loss`.
        variance: of the steps back: ``"fixed_small"`` (that of q(x_s | x_t, x0)), ``"fixed_large"`` (beta-like), or
            ``"learned_range"``: the net's second C channels interpolate between the two (Nichol and Dhariwal, "Improved
            denoising diffusion probabilistic models", ICML 2021), and the loss is their hybrid one.
        vlb_weight: weight of the variational bound, in bits per dimension, in that hybrid loss.
        clip_x0: sampling clips each prediction of x0 to [-clip_x0, clip_x0]. None: 1 for discrete schedules, and no
            clipping for continuous ones, whose samplers are defined without. False: none.
        fused: False runs the ordinary PyTorch chain instead of genfast's ops (the baseline of every comparison).

    Raises:
        ValueError: an argument has a value that it cannot have, or the schedule and the objective do not go together.

    Example:
        >>> model = DDPM(image_shape=(1, 8, 8), num_steps=50, preset="tiny")
        >>> parts = model.loss(torch.rand(4, 1, 8, 8))
        >>> model.sample(2, sampler="ddim", steps=5).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        net: nn.Module | None = None,
        schedule: str | Mapping[str, Any] | Schedule = "linear",
        objective: Literal["epsilon", "x0", "v", "flow", "edm"] | None = None,
        image_shape: Sequence[int] = (1, 28, 28),
        *,
        num_steps: int | None = None,
        preset: Literal["tiny", "small", "base"] = "small",
        weighting: Literal["none", "min_snr", "sigma"] = "none",
        gamma: float = 5.0,
        variance: Variance = "fixed_small",
        vlb_weight: float = 0.001,
        clip_x0: float | bool | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes("image_shape", image_shape, count=3)
        check_choice("weighting", weighting, WEIGHTINGS)
        check_choice("variance", variance, VARIANCES)
        self.schedule = _make_schedule(schedule, num_steps)
        self.objective = self.schedule.default_objective if objective is None else objective
        check_choice("objective", self.objective, OBJECTIVES)
        _check_invertible(self.schedule, self.objective)
        if variance == "learned_range" and self.schedule.continuous:
            raise ValueError(f"variance: expected one of {VARIANCES[:2]} with a continuous schedule, got {variance!r}")
        self.image_shape = tuple(image_shape)
        self.weighting, self.gamma = weighting, _checks.non_negative("gamma", gamma)
        self.variance, self.vlb_weight = variance, _checks.non_negative("vlb_weight", vlb_weight)
        self.clip_x0 = _clip(clip_x0, self.schedule)
        self.fused = fused
        self.own_networks = ("net",) if net is not None else ()
        if isinstance(schedule, Schedule):
            # Saved by its config, and where it has none, passed again like a network.
            self._hub_mixin_config["schedule"] = schedule.config
            self.own_networks += ("schedule",) if schedule.config is None else ()
        self._pixels = math.prod(self.image_shape)
        self._out_shape = (self.image_shape[0] * (1 + (variance == "learned_range")), *self.image_shape[1:])
        self.net = UNet(self.image_shape, preset, out_channels=self._out_shape[0]) if net is None else net
        self._kept: tuple[Any, _Sampling, Captured[Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A captured graph belongs to the weights of this very object.
        return {**super().__getstate__(), "_kept": None}

    @profiling.annotate("forward")
    def forward(self, x_t: Tensor, t: int | float | Tensor) -> Tensor:
        """What the network says of noisy images: the objective's prediction, then the variance's channels if learned.

        Args:
            x_t: [B, C, H, W] floats, images in [-1, 1] with their noise.
            t: timesteps [B], or a single one: 0 to T - 1 for discrete schedules, in the schedule's own terms for
                continuous ones (rectified flow: 0 to 1; EDM: sigma).

        Returns:
            [B, C, H, W], or [B, 2 C, H, W] for a learned variance.

        Raises:
            ValueError: t does not fit, or the net returns another shape.

        Example:
            >>> model = DDPM(image_shape=(1, 8, 8), preset="tiny")
            >>> model(torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999])).shape
            torch.Size([3, 1, 8, 8])
        """
        return self._predict(x_t, self.schedule.check_t(t, len(x_t), x_t.device))

    def loss(
        self, x: Tensor, *, t: int | float | Tensor | None = None, seed: int | Tensor | None = None, row_offset: int = 0
    ) -> dict[str, Tensor]:
        """The weighted mean square error of the objective, averaged over elements and batch.

        Args:
            x: images, see the class; uint8 goes into the kernels as it is.
            t: timesteps [B], or a single one; None: drawn for each row as the schedule draws them.
            seed: None (drawn from torch's generator), an int, or an int64 tensor [1] on the model's device.
            row_offset: global index of the first row, for micro-batches, ranks and evaluation in pieces.

        Returns:
            fp32 scalars: ``loss``; for a learned variance ``loss`` = ``simple`` + vlb_weight ``vlb``, where ``vlb`` is
            an estimate of the variational bound in bits per dimension, from one timestep for each image.

        Raises:
            ValueError: images of another shape or dtype, or t out of range.

        Example:
            >>> model = DDPM(image_shape=(1, 8, 8), preset="tiny")
            >>> x = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
            >>> torch.allclose(model.loss(x, seed=0)["loss"], model.loss(x / 255, seed=0)["loss"])
            True
        """
        x = check_images("x", x, self.image_shape)
        if not self.fused:
            return self._ordinary_loss(x, t, seed, row_offset)
        with profiling.range("forward"):
            x0 = x if x.dtype == torch.uint8 else 2 * x - 1
            # The bound of a learned variance is that of x_t as it is, so x_t must be exact.
            narrow = x.dtype == torch.uint8 and self.variance != "learned_range"
            dtype = self._net_dtype(x.device) if narrow else None
            noised = q_sample(x0, t, self.schedule, seed=seed, row_offset=row_offset, dtype=dtype)
            out = self._predict(noised.x_t, noised.t)
        with profiling.range("loss"):
            prediction, fraction = self._parts(out)
            simple = denoising_loss(
                prediction, noised, self.schedule, objective=self.objective,
                weighting=self.weighting, gamma=self.gamma, reduction="mean",
            )  # fmt: skip
            return self._with_bound(simple, prediction, fraction, noised.x_t, x, noised.t)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        steps: int | None = None,
        sampler: Sampler | None = None,
        eta: float | None = None,
        seed: int | Tensor | None = None,
        row_offset: int = 0,
        trajectory: bool = False,
        batch_size: int | None = None,
        capture: bool = True,
    ) -> Tensor:
        """Draw images, from noise back in steps. One seed gives the same images in one call or in many.

        On a CUDA device a step (network, step back, next timestep) is captured into a CUDA graph at the fourth step and
        replayed. The graph and its memory are kept for the next call with the same sizes and options (with eta > 0 also
        the same row_offset), until the model is put into training mode.

        Args:
            n: how many.
            steps: of the schedule's `timesteps`. None: all T of a discrete schedule, a continuous one's default.
            sampler: ``"ddpm"`` (ancestral: noise in every step), ``"ddim"`` (Song, Meng and Ermon, "Denoising diffusion
                implicit models", ICLR 2021), or ``"euler"``, which is what DDIM is called for continuous schedules,
                and for them alone. None: ``"ddpm"`` for discrete schedules, ``"euler"`` for continuous ones.
            eta: in [0, 1], how much noise ``"ddim"`` and ``"euler"`` add: 0 none (None), 1 as much as ``"ddpm"``.
            seed: None (drawn from torch's generator), an int, or an int64 tensor [1] on the model's device.
            row_offset: global index of the first image, so that pieces continue one another.
            trajectory: return the whole path, from noise to images.
            batch_size: images at a time; None: all n. It changes the images by rounding only.
            capture: False runs every step eagerly. It changes nothing else.

        Returns:
            Images [n, C, H, W], floats in [0, 1]; with `trajectory` [steps + 1, n, C, H, W], each clipped to [0, 1] for
            viewing and, where the noise is larger than the image (EDM), scaled down by sqrt(a^2 + b^2).

        Raises:
            ValueError: more steps than the schedule has, or a sampler or eta that does not fit the schedule.

        Example:
            >>> model = DDPM(image_shape=(1, 8, 8), num_steps=20, preset="tiny")
            >>> whole, piece = model.sample(8, steps=5, seed=0), model.sample(3, steps=5, seed=0, row_offset=5)
            >>> whole.shape, torch.allclose(whole[5:], piece, atol=1e-5)
            (torch.Size([8, 1, 8, 8]), True)
        """
        for name, value in (("n", n), ("batch_size", n if batch_size is None else batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        eta = self._eta(sampler, eta)
        times = self.schedule.timesteps(steps).to(self.device)
        seed = as_seed(seed, self.device)
        at_once = n if batch_size is None else batch_size
        with evaluating(self):
            batches = [
                self._sample(min(at_once, n - start), times, eta, seed, row_offset + start, trajectory, capture)
                for start in range(0, n, at_once)
            ]
        return torch.cat(batches, 1 if trajectory else 0)

    def quick_sampling(self, steps: int = 50) -> dict[str, Any]:
        """Options of `sample` that give good images soon: so many steps, or all if fewer, and no noise but the first.

        Example:
            >>> DDPM(image_shape=(1, 8, 8), preset="tiny").quick_sampling()
            {'sampler': 'ddim', 'steps': 50}
        """
        most = self.schedule.num_steps
        return {
            "sampler": "euler" if self.schedule.continuous else "ddim",
            "steps": steps if most is None else min(steps, most),
        }

    @torch.no_grad()
    def bits_per_dim(
        self, x: Tensor, *, steps: int | None = None, seed: int | Tensor | None = None, row_offset: int = 0
    ) -> Tensor:
        """An upper bound on -log2 p(x) per dimension, p being what ``sample(sampler="ddpm", steps=steps)`` draws from.

        The variational bound of Ho et al. (2020), equation 5, for any schedule: the KL of the noisy end from the prior,
        of each step q(x_s | x_t, x0) from p(x_s | x_t), and a Gaussian over the last prediction of x0, with standard
        deviation b at the last noisy t, of which each of the 256 grey levels gets its share. Every term is estimated
        with one draw. A continuous schedule is bounded for its ancestral sampler (``eta=1``).

        Args:
            x: images, see the class, of 256 grey levels: floats are rounded to multiples of 1/255.
            steps: as for `sample`. None evaluates the network T times on the whole batch.
            seed, row_offset: as for `loss`; the noise of each step is its own.

        Returns:
            fp32 [B], bits per dimension.

        Raises:
            ValueError: images of another shape or dtype, or more steps than the schedule has.

        Example:
            >>> model = DDPM(image_shape=(1, 8, 8), num_steps=20, preset="tiny")
            >>> model.bits_per_dim(torch.rand(3, 1, 8, 8), steps=5).shape
            torch.Size([3])
        """
        x = check_images("x", x, self.image_shape)
        x0 = 2 / 255 * (x if x.dtype == torch.uint8 else 255 * x.float()).round().float() - 1
        seed = as_seed(seed, x.device)
        times = self.schedule.timesteps(steps).to(x.device)
        *noisy, clean = times.split(1)
        with evaluating(self):
            nats = self._prior_kl(x0, noisy[0]).double()
            for t, s in pairwise((*noisy, clean)):
                x0_hat, fraction = self._estimate(x0, t.expand(len(x)), seed, row_offset)
                if s is clean:
                    nats = nats + self._grey_level_nll(x0.double(), x0_hat.double(), t)
                else:
                    nats = nats + self._transition_kl(x0, x0_hat, fraction, t, s)
        return (nats / (self._pixels * math.log(2))).float()

    @torch.no_grad()
    def forward_process(
        self,
        x: Tensor,
        ts: Iterable[int | float] | Tensor,
        *,
        seed: int | Tensor | None = None,
        row_offset: int = 0,
    ) -> Tensor:
        """Images on their way into noise, for viewing: all times of an image share its noise, so they show one path.

        Args:
            x: images, see the class.
            ts: timesteps; -1, or 0.0 for continuous schedules, is the clean image.
            seed, row_offset: as for `loss`.

        Returns:
            [len(ts), B, C, H, W] in [0, 1], as a trajectory of `sample`: the values are clipped in the picture only.

        Raises:
            ValueError: images of another shape or dtype, or a timestep out of range.

        Example:
            >>> model = DDPM(image_shape=(1, 8, 8), preset="tiny")
            >>> model.forward_process(torch.rand(3, 1, 8, 8), [-1, 100, 999], seed=0).shape
            torch.Size([3, 3, 1, 8, 8])
        """
        x = check_images("x", x, self.image_shape)
        x0 = 2 * _unit(x) - 1
        seed = as_seed(seed, x.device)
        pictures = []
        for each in ts.tolist() if isinstance(ts, Tensor) else ts:
            t = self.schedule.check_t(each, len(x), x.device, name="ts", clean=True)
            a, b, _, _ = self.schedule.table(t)
            x_t = forward_noising(x0, a, b, seed=seed, row_offset=row_offset)
            pictures.append(self._picture(x_t, t))
        return torch.stack(pictures) if pictures else x0.new_empty(0, *x0.shape)

    def _net_dtype(self, device: torch.device) -> torch.dtype:
        """What x_t is made in: autocast would cast it anyway."""
        if device.type != "meta" and torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.dtype

    def _predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """`forward` at checked times."""
        scale = self.schedule.input_scale(t)
        x = x_t if scale is None else x_t * _rows(scale)
        out = self.net(x.to(self._net_dtype(x.device)), self.schedule.time_input(t))
        out = getattr(out, "sample", out)
        expected = (x_t.shape[0], *self._out_shape)
        if not isinstance(out, Tensor) or tuple(out.shape) != expected:
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"net: expected a prediction of shape {list(expected)}, got {got}")
        return out

    def _ordinary_loss(
        self, x: Tensor, t: int | float | Tensor | None, seed: int | Tensor | None, row_offset: int
    ) -> dict[str, Tensor]:
        """What a script does: torch's noise, or that of a seed."""
        with profiling.range("forward"):
            x0 = 2 * _unit(x) - 1
            seed = seed if seed is None else as_seed(seed, x.device)
            if t is None:
                t = self.schedule.draw_t(len(x), seed=as_seed(seed, x.device), row_offset=row_offset)
            t = self.schedule.check_t(t, len(x), x.device)
            noise = _noise_like(x0, Stream.FORWARD_NOISE, seed, row_offset)
            a, b = map(_rows, self.schedule.coefficients(t))
            x_t = a * x0 + b * noise
            out = self._predict(x_t, t)
        with profiling.range("loss"):
            prediction, fraction = self._parts(out)
            error = (
                F.mse_loss(prediction.float(), self._target(x0, noise, a, b, t), reduction="none").flatten(1).mean(1)
            )
            if self.weighting != "none":
                error = error * self.schedule.weight(t, self.objective, self.weighting, self.gamma)
            return self._with_bound(error.mean(), prediction, fraction, x_t, x, t)

    def _target(self, x0: Tensor, noise: Tensor, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        if self.objective == "epsilon":
            return noise
        if self.objective == "x0":
            return x0
        if self.objective == "v":
            return a * noise - b * x0
        if self.objective == "flow":
            return noise - x0
        p, q = map(_rows, self.schedule.target_coefficients(t, self.objective))
        return p * x0 + q * noise

    def _with_bound(
        self, simple: Tensor, prediction: Tensor, fraction: Tensor | float, x_t: Tensor, x: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        """The parts of the loss; for a learned variance with the bound, which trains the variance alone."""
        if self.variance != "learned_range":
            return {"loss": simple}
        x0 = 2 * _unit(x).float() - 1
        x0_hat = self._clean(x_t.detach().float(), prediction.detach(), t)
        kl = self._transition_kl(x0, x0_hat, fraction, t, (t - 1).clamp(min=0))
        # The last step has no q to be compared with; the width of its Gaussian is not learned.
        nats = torch.where(t == 0, self._grey_level_nll(x0, x0_hat, t), kl)
        vlb = nats.mean() * self.schedule.num_steps / (self._pixels * math.log(2))
        return {"loss": simple + self.vlb_weight * vlb, "simple": simple, "vlb": vlb}

    def _eta(self, sampler: str | None, eta: float | None) -> float:
        """The eta of a sampler, which must fit the schedule."""
        continuous = self.schedule.continuous
        fits, kind = (("euler", "ddim", "ddpm"), "continuous") if continuous else (("ddpm", "ddim"), "discrete")
        sampler = fits[0] if sampler is None else sampler
        if sampler not in fits:
            raise ValueError(f"sampler: expected {' or '.join(map(repr, fits))} for a {kind} schedule, got {sampler!r}")
        if sampler == "ddpm":
            if eta is not None:
                raise ValueError(
                    f"eta: expected None for the sampler 'ddpm', whose eta is 1 ('ddim' has any), got {eta}"
                )
            return 1.0
        eta = 0.0 if eta is None else float(eta)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: expected a number in [0, 1], got {eta}")
        return eta

    def _sample(
        self, n: int, times: Tensor, eta: float, seed: Tensor, row_offset: int, trajectory: bool, capture: bool
    ) -> Tensor:
        sampling, step = self._sampling(n, times, eta, row_offset, capture)
        x = sampling.start(seed)
        path = [self._picture(x, times[:1])] if trajectory else []
        for i in range(1, len(times)):
            with profiling.range("sampling step"):
                x = step()
            if trajectory:
                path.append(self._picture(x, times[i : i + 1]))
        return torch.stack(path) if trajectory else self._picture(x, times[-1:])

    def _sampling(
        self, n: int, times: Tensor, eta: float, row_offset: int, capture: bool
    ) -> tuple[_Sampling, Callable[[], Tensor]]:
        """Where a batch is sampled, and what takes a step there: on a GPU the graph of an earlier call, if it fits."""
        compiled = getattr(self, "_compile_options", {})
        if times.device.type != "cuda" or not capture or compiled.get("mode") in _OWN_GRAPHS:
            sampling = _Sampling(self, n, times, eta, row_offset)
            return sampling, sampling
        # Without noise in the steps a graph does not know which rows it samples.
        key = self._graph_key(n, len(times), eta, row_offset if eta > 0 else 0)
        if self._kept is None or self._kept[0] != key:
            # The memory of the old one first.
            self._kept = None
            sampling = _Sampling(self, n, times, eta, row_offset)
            self._kept = key, sampling, Captured(_without_cache(sampling), times.device, "sample: a step")
        _, sampling, step = self._kept
        sampling.move_to(times, row_offset)
        return sampling, step

    def _graph_key(self, n: int, times: int, eta: float, row_offset: int) -> tuple:
        """What a graph of a step holds fixed: the memory that it reads, every option, and what is called."""
        memory = tuple(tensor.data_ptr() for tensor in (*self.parameters(), *self.buffers()))
        options = (eta, self.objective, self.variance, self.clip_x0, self.fused, self.schedule.sigma_data)
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        # The schedule and the compiled call are compared as objects.
        return n, times, row_offset, options, autocast, self.schedule, self._compiled_call_impl, memory

    def train(self, mode: bool = True) -> Self:
        """As for any module; training lets go of the graph that sampling keeps, and of its memory."""
        if mode:
            self._kept = None
        return super().train(mode)

    def _ordinary_step(
        self, x_t: Tensor, out: Tensor, t: Tensor, s: Tensor, eta: float, seed: Tensor, row_offset: int
    ) -> Tensor:
        prediction, fraction = self._parts(out)
        x0 = self._clean(x_t, prediction, t, self.clip_x0)
        (a, b), (a_s, b_s), kappa = self._pair(t, s)
        eps = (x_t - a * x0) / b
        spread = b_s ** (1 - fraction) * b**fraction
        mean = a_s * x0 + b_s * (1 - eta**2 * kappa).sqrt() * eps
        if eta == 0:
            return mean
        sigma = torch.where(b_s > 0, eta * kappa.sqrt() * spread, 0.0)
        noise = _noise_like(x_t, Stream.REVERSE_STEP, seed, row_offset, self.schedule.salt(t))
        return mean + sigma * noise

    def _picture(self, x: Tensor, t: Tensor) -> Tensor:
        """Images in [-1, 1] with their noise to [0, 1]."""
        a, b, _, _ = self.schedule.table(t)
        spread = torch.sqrt(a * a + b * b).clamp(min=1)
        return (0.5 * x / _rows(spread) + 0.5).clamp(0, 1)

    def _clean(self, x_t: Tensor, prediction: Tensor, t: Tensor, clip: float | None = None) -> Tensor:
        """The network's x0."""
        a, b = self.schedule.coefficients(t)
        p, q = self.schedule.target_coefficients(t, self.objective)
        det = a * q - b * p
        x0 = _rows(q / det) * x_t - _rows(b / det) * prediction
        return x0 if clip is None else x0.clamp(-clip, clip)

    def _parts(self, out: Tensor) -> tuple[Tensor, Tensor | float]:
        """The prediction, and where log sigma lies between its two ends: 0 for the small one, 1 for the large one."""
        if self.variance == "learned_range":
            prediction, v = out.chunk(2, 1)
            return prediction, (v.float() + 1) / 2
        return out, float(self.variance == "fixed_large")

    def _pair(self, t: Tensor, s: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        """(a, b) at t and at the earlier s, and kappa = 1 - SNR_t / SNR_s, shaped to broadcast against images."""
        a, b, high, low = self.schedule.table(t)
        a_s, b_s, high_s, low_s = self.schedule.table(s)
        difference = torch.where(high == high_s, 0.0, high - high_s) + (low - low_s)
        kappa = -torch.expm1(2 * difference)
        return (_rows(a), _rows(b)), (_rows(a_s), _rows(b_s)), _rows(kappa)

    def _estimate(self, x0: Tensor, t: Tensor, seed: Tensor, row_offset: int) -> tuple[Tensor, Tensor | float]:
        """The network's x0 at one draw of x_t, as the sampler uses it, and where its variance lies."""
        a, b = map(_rows, self.schedule.coefficients(t))
        x_t = a * x0 + b * _noise_like(x0, Stream.FORWARD_NOISE, seed, row_offset, self.schedule.salt(t))
        prediction, fraction = self._parts(self(x_t, t))
        return self._clean(x_t, prediction, t, self.clip_x0), fraction

    def _prior_kl(self, x0: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_t | x0) || p(x_t)) at the noisy end, nats [B]."""
        a, b = map(_rows, self.schedule.coefficients(t))
        scale = _prior_scale(self.schedule, b)
        # b^2 / scale^2 - 1.
        excess = torch.zeros_like(a) if self.schedule.continuous else -a * a
        return 0.5 * ((a * x0 / scale).square() + excess - torch.log1p(excess)).flatten(1).sum(1)

    def _transition_kl(self, x0: Tensor, x0_hat: Tensor, fraction: Tensor | float, t: Tensor, s: Tensor) -> Tensor:
        """KL(q(x_s | x_t, x0) || p(x_s | x_t)), nats [B]: the means differ by a_s kappa (x0 - x0_hat)."""
        (_, b), (a_s, b_s), kappa = self._pair(t, s)
        # Of (SNR_s - SNR_t) / 2, without the difference.
        kl = 0.5 * (a_s / b_s).square() * kappa * (x0 - x0_hat).square()
        if self.variance != "fixed_small":
            wider = fraction * torch.log(b / b_s)
            kl = wider + 0.5 * torch.expm1(-2 * wider) + torch.exp(-2 * wider) * kl
        return kl.flatten(1).sum(1)

    def _grey_level_nll(self, x0: Tensor, x0_hat: Tensor, t: Tensor) -> Tensor:
        """-log of the share of each pixel's grey level in N(x0_hat, b^2), the outer ones to infinity; nats [B]."""
        b = _rows(self.schedule.coefficients(t)[1]).to(x0.dtype)
        lower = torch.where(x0 < -1 + 1 / 255, -torch.inf, (x0 - x0_hat - 1 / 255) / b)
        upper = torch.where(x0 > 1 - 1 / 255, torch.inf, (x0 - x0_hat + 1 / 255) / b)
        # Where both are in the upper tail, the same share of the lower one, whose logarithm is exact.
        lower, upper = torch.where(lower > 0, -upper, lower), torch.where(lower > 0, -lower, upper)
        log_upper = torch.special.log_ndtr(upper)
        inside = log_upper + torch.log1p(-torch.exp(torch.special.log_ndtr(lower) - log_upper))
        return -inside.flatten(1).sum(1)


class _Sampling:
    """A batch on its way from noise to images: each call takes a step, in the same memory, and waits for nothing."""

    def __init__(self, model: DDPM, n: int, times: Tensor, eta: float, row_offset: int) -> None:
        # The model keeps this, and would keep itself alive.
        self.model = weakref.proxy(model)
        self.eta, self.row_offset = eta, row_offset
        self.times, self.tables, self.salts = times.clone(), model.schedule.table(times), model.schedule.salt(times)
        self.x = torch.empty(n, *model.image_shape, device=times.device)
        self.at = torch.zeros(1, dtype=torch.int64, device=times.device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=times.device)

    def move_to(self, times: Tensor, row_offset: int) -> None:
        """Other times, as many, and other rows, in the same memory."""
        self.times.copy_(times)
        self.tables.copy_(self.model.schedule.table(times))
        self.salts.copy_(self.model.schedule.salt(times))
        self.row_offset = row_offset

    def start(self, seed: Tensor) -> Tensor:
        """Noise, from which the next call takes the first step."""
        _, b = self.model.schedule.coefficients(self.times[:1])
        noise = normal(seed, len(self.x), self.x[0].numel(), Stream.PRIOR, self.row_offset)
        self.x.copy_(noise.reshape(self.x.shape) * _prior_scale(self.model.schedule, b))
        self.at.zero_()
        self.seed.copy_(seed)
        return self.x

    def __call__(self) -> Tensor:
        model, rows, after = self.model, len(self.x), self.at + 1
        t = self.times[self.at]
        out = model(self.x, t.expand(rows))
        if model.fused:
            # The times of this way are a table of their own, and where it is on the way its index.
            x = step_between(
                self.x, out, self.tables, self.tables, self.at.expand(rows), after.expand(rows),
                self.salts[self.at].expand(rows), self.seed if self.eta > 0 else None, None, self.row_offset,
                model.objective, float(model.schedule.sigma_data), self.eta, model.clip_x0, model.variance,
            )  # fmt: skip
        else:
            x = model._ordinary_step(self.x, out, t, self.times[after], self.eta, self.seed, self.row_offset)
        self.x.copy_(x)
        self.at += 1
        return self.x


def _without_cache(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Autocast keeps the weights that it has cast until its block ends: a graph that reads those would outlive them."""

    def without() -> Tensor:
        with torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
            return step()

    return without


def _make_schedule(schedule: str | Mapping[str, Any] | Schedule, num_steps: int | None) -> Schedule:
    if isinstance(schedule, str):
        name = schedule.replace("-", "_")
        check_choice("schedule", name, schedules.NAMES)
        if num_steps is None:
            return schedules.get(name)
        if "num_steps" not in inspect.signature(getattr(schedules, name)).parameters:
            raise ValueError(
                f"num_steps: expected None for {schedule!r}, which has no number of steps, got {num_steps}"
            )
        return schedules.get(name, num_steps=num_steps)
    if num_steps is not None:
        raise ValueError(f"num_steps: expected None where the schedule is not given by its name, got {num_steps}")
    if isinstance(schedule, Mapping):
        return schedules.get(**schedule)
    if isinstance(schedule, Schedule):
        return schedule
    raise TypeError(f"schedule: expected a name, a dict or a Schedule, got {type(schedule).__name__}")


def _check_invertible(schedule: Schedule, objective: str) -> None:
    """Sampling starts from a prediction of x0 at the noisy end."""
    if schedule.device.type == "meta":
        return
    t = schedule.timesteps(1)[:1]
    a, b = schedule.coefficients(t)
    p, q = schedule.target_coefficients(t, objective)
    if a * q - b * p == 0:
        raise ValueError(
            f"objective: expected 'v', 'x0' or 'flow' with a schedule that ends at a signal-to-noise ratio of 0, where "
            f"nothing but these tells x0, got {objective!r}"
        )


def _clip(clip_x0: float | bool | None, schedule: Schedule) -> float | None:
    if clip_x0 is None or clip_x0 is True:
        return 1.0 if clip_x0 or not schedule.continuous else None
    if clip_x0 is False:
        return None
    if not 0 < clip_x0 < math.inf:
        raise ValueError(f"clip_x0: expected a positive number, True, False or None, got {clip_x0!r}")
    return float(clip_x0)


def _prior_scale(schedule: Schedule, b: Tensor) -> Tensor:
    """The standard deviation of the noise that sampling starts from: sigma_max for EDM."""
    return b if schedule.continuous else torch.ones_like(b)


def _unit(x: Tensor) -> Tensor:
    """Images as floats in [0, 1]."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def _rows(values: Tensor) -> Tensor:
    """[B] shaped to broadcast against images."""
    return values.view(-1, 1, 1, 1)


def _noise_like(x: Tensor, stream: Stream, seed: Tensor | None, row_offset: int, salt: int | Tensor = 0) -> Tensor:
    """The noise of the ordinary chain: torch's own, or that of a seed."""
    if seed is None:
        return torch.randn_like(x)
    return normal(seed, x.shape[0], x[:1].numel(), stream, row_offset, salt).reshape(x.shape).to(x.dtype)
