"""The drop-in DDPMScheduler against diffusers' own: every config, their golden sums, pipelines, our noise."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import Tensor

from genfast.integrations.diffusers import DDPMScheduler

SHAPE = (4, 3, 8, 8)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _ramp(flipped: bool = False) -> Tensor:
    """The sample that diffusers' scheduler tests start from: 0, 1 / 768, ... with the batch running fastest."""
    values = torch.arange(768)
    values = values.flip(0) if flipped else values
    return (values.reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)


def _compare(t: int, learned: bool = False, steps: int | None = None, **config) -> None:
    """One step of both, from the same state of torch's generator."""
    ours, theirs = DDPMScheduler(**config), diffusers.DDPMScheduler(**config)
    for scheduler in (ours, theirs):
        if steps is not None:
            scheduler.set_timesteps(steps)
    sample = torch.randn(SHAPE, generator=_generator())
    output = torch.randn(4, 6 if learned else 3, 8, 8, generator=torch.Generator().manual_seed(8))
    # The second half may be a variance.
    output[:, 3:].abs_()
    generators = _generator(), _generator()
    got, want = (s.step(output, t, sample, generator=g) for s, g in zip((ours, theirs), generators, strict=True))
    # A predicted x0 is a difference divided by a, and what was rounded before it counts as much more.
    magnified = {
        "prev_sample": max(1.0, float(want.prev_sample.abs().max())),
        "pred_original_sample": float(theirs.alphas_cumprod[t].clamp(min=1e-9)) ** -0.5,
    }
    for name, factor in magnified.items():
        torch.testing.assert_close(got[name], want[name], rtol=2e-6, atol=1e-6 * factor)
    assert torch.equal(*(torch.randn(3, generator=g) for g in generators)), "the generator was used otherwise"
    assert torch.equal(ours.step(output, t, sample, generator=_generator(), return_dict=False)[0], got.prev_sample)


TIMES = (0, 1, 20, 500, 998, 999)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_a_step_equals_theirs(beta_schedule, clip_sample, prediction_type):
    for t in TIMES:
        _compare(t, beta_schedule=beta_schedule, clip_sample=clip_sample, prediction_type=prediction_type)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
def test_every_variance_equals_theirs(variance_type):
    for t in TIMES:
        _compare(t, learned=variance_type == "learned_range", variance_type=variance_type, clip_sample_range=1.5)


@pytest.mark.parametrize(
    "config",
    [
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "trailing", "variance_type": "fixed_large"},
        {"timestep_spacing": "linspace", "prediction_type": "v_prediction"},
        {"steps_offset": 1},
    ],
    ids=str,
)
def test_few_steps_equal_theirs(config):
    scheduler = DDPMScheduler(**config)
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps.tolist():
        _compare(t, steps=10, **config)


@pytest.mark.parametrize(
    ("config", "learned"),
    [
        ({"thresholding": True}, False),
        ({"variance_type": "learned"}, True),
        ({"beta_start": 0.1, "beta_end": 2.0}, False),
        ({"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3}, False),
        ({"num_train_timesteps": 1}, False),
    ],
    ids=str,
)
def test_what_is_not_fused_is_theirs(config, learned):
    _compare(0, learned, **config)
    if config.get("num_train_timesteps", 1000) > 500:
        _compare(2, learned, **config)


def test_no_signal_at_the_end():
    """With zero-terminal-SNR betas the first step starts from a = 0."""
    for t in (0, 500, 999):
        _compare(t, rescale_betas_zero_snr=True, prediction_type="v_prediction")


# From tests/schedulers/test_scheduler_ddpm.py of diffusers: sums of absolute values after a whole loop, and their mean.
GOLDEN = {"epsilon": (258.9606, 0.3372), "v_prediction": (202.0296, 0.2631)}


@pytest.mark.parametrize("prediction_type", GOLDEN)
def test_their_golden_sums_hold(prediction_type):
    scheduler, sample, generator = DDPMScheduler(prediction_type=prediction_type), _ramp(), torch.manual_seed(0)
    for t in reversed(range(1000)):
        sample = scheduler.step(sample * t / (t + 1), t, sample, generator=generator).prev_sample
    total, mean = GOLDEN[prediction_type]
    assert abs(float(sample.abs().sum()) - total) < 1e-2
    assert abs(float(sample.abs().mean()) - mean) < 1e-3


def test_their_golden_sum_after_adding_noise_holds():
    scheduler, generator = DDPMScheduler(), torch.manual_seed(0)
    times = scheduler.timesteps[998:]
    sample = scheduler.add_noise(_ramp(), _ramp(flipped=True), times[:1])
    for t in times:
        sample = scheduler.step(sample * t / (t + 1), t, sample, generator=generator).prev_sample
    assert abs(float(sample.abs().sum()) - 387.9466) < 1e-2
    assert abs(float(sample.abs().mean()) - 0.5051) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_noise_and_velocity_equal_theirs(dtype):
    ours, theirs = DDPMScheduler(), diffusers.DDPMScheduler()
    x0, noise = (torch.randn(1000, 5, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    t = torch.arange(1000)
    # In half precision theirs rounds alpha_bar before it is subtracted from 1.
    rtol, atol = (1e-2, 2e-2) if dtype == torch.float16 else (1e-6, 1e-6)
    for method in ("add_noise", "get_velocity"):
        got, want = getattr(ours, method)(x0, noise, t), getattr(theirs, method)(x0, noise, t)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    mixed = ours.add_noise(x0.float(), noise.to(torch.bfloat16), t)
    assert mixed.dtype == torch.float32


def test_bf16_images_get_noise_at_small_t():
    x0, noise = torch.zeros(10, 500, dtype=torch.bfloat16), torch.randn(10, 500).bfloat16()
    assert not diffusers.DDPMScheduler().add_noise(x0, noise, torch.arange(10)).any()
    assert DDPMScheduler().add_noise(x0, noise, torch.arange(10)).any(1).all()


def test_without_a_generator_the_noise_is_ours():
    """Governed by torch's seed, fresh at each step, and of unit variance."""
    scheduler, sample = DDPMScheduler(), torch.zeros(64, 3, 16, 16)
    torch.manual_seed(3)
    first, second = (scheduler.step(sample, 500, sample).prev_sample for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(scheduler.step(sample, 500, sample).prev_sample, first)
    assert not torch.equal(first, second)
    scale = scheduler._get_variance(500) ** 0.5
    assert abs(float(first.std() / scale) - 1) < 0.01


def test_config_travels(tmp_path):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path)
    for loaded in (DDPMScheduler.from_pretrained(tmp_path), diffusers.DDPMScheduler.from_pretrained(tmp_path)):
        assert loaded.config.beta_schedule == "scaled_linear"
    assert DDPMScheduler.from_config(diffusers.DDIMScheduler().config).config.clip_sample


def test_a_new_table_is_noticed():
    scheduler, theirs = DDPMScheduler(), diffusers.DDPMScheduler(beta_end=0.01)
    x0, noise, t = torch.ones(2, 3), torch.ones(2, 3), torch.tensor([10, 900])
    before = scheduler.add_noise(x0, noise, t)
    scheduler.alphas_cumprod = theirs.alphas_cumprod
    torch.testing.assert_close(scheduler.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=1e-6, atol=1e-6)
    assert not torch.equal(scheduler.add_noise(x0, noise, t), before)


def test_a_pipeline_draws_the_same_images():
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    images = []
    for scheduler in (DDPMScheduler(), diffusers.DDPMScheduler()):
        pipeline = diffusers.DDPMPipeline(unet, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        images.append(pipeline(2, generator=_generator(), num_inference_steps=12, output_type="np").images)
    torch.testing.assert_close(*map(torch.from_numpy, images), rtol=0, atol=1e-4)


def test_a_pipeline_is_saved_and_loaded(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, DDPMScheduler(beta_end=0.03)).save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is DDPMScheduler
    assert loaded.scheduler.config.beta_end == 0.03


def test_what_broadcasts_is_theirs():
    x0, noise, t = torch.ones(1, 3), torch.randn(2, 3), torch.tensor([10, 900])
    for method in ("add_noise", "get_velocity"):
        want = getattr(diffusers.DDPMScheduler(), method)(x0, noise, t)
        torch.testing.assert_close(getattr(DDPMScheduler(), method)(x0, noise, t), want)


def test_half_precision_computes_in_fp32():
    """Nearer to fp64 than theirs, which rounds every intermediate result to bf16."""
    sample, output = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2))
    errors = []
    for cls in (DDPMScheduler, diffusers.DDPMScheduler):
        scheduler = cls(clip_sample=False)
        theirs = diffusers.DDPMScheduler(clip_sample=False)
        exact = theirs.step(output.double(), 300, sample.double()).pred_original_sample
        got = scheduler.step(output, 300, sample).pred_original_sample
        assert got.dtype == torch.bfloat16
        errors.append(float((got.double() - exact).norm()))
    assert errors[0] < 0.75 * errors[1]
