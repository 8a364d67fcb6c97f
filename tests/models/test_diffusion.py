"""DDPM: its loss, its samples and its likelihood against formulas written down anew, and against diffusers."""

import copy
import gc
import json
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.distributions import Normal, kl_divergence

from genfast import DDPM, UNet, schedules
from genfast.cases import LOSS
from genfast.models.diffusion import _Sampling
from genfast.models.registry import get_family, load
from genfast.random import Stream, normal
from genfast.training import TrainStep

SHAPE = (1, 8, 8)
ZERO_SNR = {"name": "linear", "num_steps": 50, "zero_terminal_snr": True}


class Net(nn.Module):
    """A small net whose output depends on all that it is given."""

    def __init__(self, channels=1, out_channels=1):
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, padding=1)
        self.time = nn.Linear(1, 8)
        self.head = nn.Conv2d(8, out_channels, 3, padding=1)

    def forward(self, x, t):
        time = self.time(t.to(x.dtype).unsqueeze(1) / 1000)
        return self.head(nn.functional.silu(self.stem(x) + time[:, :, None, None]))


class Known(nn.Module):
    """Tells the clean images, whatever it is asked, with a constant error."""

    def __init__(self, x, error=0.0):
        super().__init__()
        self.x0 = nn.Parameter(2 * x.double() / 255 - 1)
        self.error = error

    def forward(self, x_t, t):
        return (self.x0 + self.error).to(x_t.dtype)[: len(x_t)]


class Linear(nn.Module):
    """The best guess of x0 where images are N(mean, std^2) in each pixel."""

    def __init__(self, schedule, mean, std):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.std, self.schedule = std, [schedule]

    def forward(self, x_t, t):
        if self.schedule[0].continuous:
            edm = self.schedule[0].config["name"] == "edm"
            t = torch.exp(4 * t) if edm else t / 1000
            x_t = x_t / c_in(t).view(-1, 1, 1, 1) if edm else x_t
        a, b = self.schedule[0].coefficients(t)
        gain = a * self.std**2 / ((a * self.std) ** 2 + b**2)
        return self.mean + gain.view(-1, 1, 1, 1) * (x_t - (a * self.mean).view(-1, 1, 1, 1))


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    counters.clear()


@pytest.fixture
def x():
    return torch.randint(256, (8, *SHAPE), dtype=torch.uint8)


def small(schedule="linear", objective=None, num_steps=None, **options):
    learned = options.get("variance") == "learned_range"
    if schedule in ("linear", "cosine") and num_steps is None:
        num_steps = 50
    options = {"image_shape": SHAPE, "net": Net(out_channels=2 if learned else 1), **options}
    return DDPM(schedule=schedule, objective=objective, num_steps=num_steps, **options)


def scaled(x):
    return 2 * x.double() / 255 - 1


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)


# The loss.


@pytest.mark.parametrize("weighting", ["none", "min_snr", "sigma"])
@pytest.mark.parametrize(
    ("schedule", "objective", "variance"),
    [
        ("linear", None, "fixed_small"),
        ("linear", "x0", "fixed_small"),
        ("cosine", "v", "fixed_large"),
        ("linear", None, "learned_range"),
        (ZERO_SNR, None, "fixed_small"),
        ("rectified-flow", None, "fixed_small"),
        ("edm", None, "fixed_small"),
    ],
)
def test_fused_equals_the_ordinary_chain(schedule, objective, variance, weighting, x):
    model = small(schedule, objective, variance=variance, weighting=weighting)
    ordinary = copy.deepcopy(model)
    ordinary.fused = False
    for images in (x, x / 255):
        a, b = model.loss(images, seed=5, row_offset=3), ordinary.loss(images, seed=5, row_offset=3)
        assert a.keys() == b.keys() == ({"loss", "simple", "vlb"} if variance == "learned_range" else {"loss"})
        for key in a:
            assert a[key].dtype == b[key].dtype == torch.float32
            assert LOSS.excess(a[key].detach(), b[key].detach()) <= 1
        for left, right in zip(gradients(model, a["loss"]), gradients(ordinary, b["loss"]), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5 * right.abs().max().item())


@pytest.mark.parametrize(
    ("schedule", "objective", "target"),
    [
        ("linear", None, lambda a, b, x0, eps: eps),
        ("linear", "x0", lambda a, b, x0, eps: x0),
        ("cosine", "v", lambda a, b, x0, eps: a * eps - b * x0),
        ("rectified-flow", None, lambda a, b, x0, eps: eps - x0),
        ("edm", None, lambda a, b, x0, eps: (x0 - (x0 + b * eps) * 0.25 / (b**2 + 0.25)) / (0.5 * b * c_in(b))),
    ],
)
def test_loss_is_that_of_the_papers(schedule, objective, target, x):
    model = small(schedule, objective)
    t = model.schedule.draw_t(8, seed=2)
    a, b = {
        "edm": lambda: (torch.ones(8), t),
        "rectified-flow": lambda: (1 - t, t),
    }.get(schedule, lambda: (model.schedule.alpha_bar_fp64[t] ** 0.5, (1 - model.schedule.alpha_bar_fp64[t]) ** 0.5))()
    a, b = (value.double().view(-1, 1, 1, 1) for value in (a, b))
    eps = normal(2, 8, 64, Stream.FORWARD_NOISE).double().view(8, *SHAPE)
    x_t = a * scaled(x) + b * eps
    given = {"edm": (x_t * c_in(b), b.flatten().log() / 4), "rectified-flow": (x_t, 1000 * b.flatten())}
    net = model.net
    with torch.no_grad():
        out = copy.deepcopy(net).double()(*given.get(schedule, (x_t, t)))
    expected = (out - target(a, b, scaled(x), eps)).square().mean()
    torch.testing.assert_close(model.loss(x, seed=2)["loss"].double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.loss(x, seed=2, t=t)["loss"].double(), expected, rtol=1e-5, atol=0)


def c_in(sigma):
    return (sigma**2 + 0.25) ** -0.5


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, {"schedule": "edm"}, {"variance": "learned_range", "weighting": "min_snr"}])
def test_halves_of_a_batch_add_up(fused, options, x):
    model = small(fused=fused, **options)
    whole = model.loss(x, seed=2, row_offset=100)["loss"]
    halves = [model.loss(x[i : i + 4], seed=2, row_offset=100 + i)["loss"] for i in (0, 4)]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)
    assert not torch.allclose(model.loss(x[4:], seed=2, row_offset=100)["loss"], halves[1])


@pytest.mark.parametrize("fused", [True, False])
def test_torch_or_a_seed_decides_the_noise(fused, x):
    model = small(fused=fused)
    torch.manual_seed(1)
    first, second = model.loss(x)["loss"], model.loss(x)["loss"]
    torch.manual_seed(1)
    assert torch.equal(model.loss(x)["loss"], first)
    assert not torch.equal(first, second)
    assert torch.equal(model.loss(x, seed=9)["loss"], model.loss(x, seed=torch.tensor([9]))["loss"])
    # Another seed, other timesteps and other noise.
    assert not torch.allclose(model.loss(x, seed=9)["loss"], model.loss(x, seed=10)["loss"])
    assert not torch.allclose(model.loss(x, seed=9, t=3)["loss"], model.loss(x, seed=10, t=3)["loss"])


def test_without_a_seed_both_chains_agree_in_distribution(x):
    model, losses = small(), []
    for model.fused in (True, False):
        with torch.no_grad():
            losses.append(torch.stack([model.loss(x[:1].expand(200, -1, -1, -1))["loss"] for _ in range(20)]))
    error = math.sqrt((losses[0].var() + losses[1].var()) / 20)
    assert abs(losses[0].mean() - losses[1].mean()) < 4 * error


def test_images_of_every_shape(x):
    model = small()
    expected = model.loss(x, seed=0)["loss"]
    for images in (x.flatten(1), x[:, 0], x.flatten(1) / 255, (x / 255).contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(model.loss(images, seed=0)["loss"], expected)
    for images in (x[:, :, :4], x.bool(), x.long()):
        with pytest.raises(ValueError, match=r"x: expected (images of shape \[B, 1, 8, 8\]|floats)"):
            model.loss(images)
    for t in (50, -1, torch.full((8,), 50)):
        with pytest.raises(ValueError, match=r"t: expected values in 0..49"):
            model.loss(x, t=t)


# A learned variance.


def test_the_bound_trains_the_variance_alone(x):
    model = small(variance="learned_range", vlb_weight=0.3)
    parts = model.loss(x, seed=0)
    torch.testing.assert_close(parts["loss"], parts["simple"] + 0.3 * parts["vlb"])
    simple, vlb = gradients(model, parts["simple"])[-2:], gradients(model, parts["vlb"])[-2:]
    for left, right in zip(simple, vlb, strict=True):
        assert left[0].abs().sum() > 0 == left[1].abs().sum()
        assert right[1].abs().sum() > 0 == right[0].abs().sum()


def textbook(schedule, t):
    """Of Ho et al.: beta_t, the posterior's variance, and its coefficients of x0 and x_t, in fp64."""
    betas = schedule.betas_fp64
    after = torch.cumprod(1 - betas, 0)
    before = torch.cat([after.new_ones(1), after[:-1]])
    variance = betas * (1 - before) / (1 - after)
    of_x0, of_x_t = betas * before.sqrt() / (1 - after), (1 - before) * (1 - betas).sqrt() / (1 - after)
    return tuple(each[t].view(-1, 1, 1, 1) for each in (betas, variance, of_x0, of_x_t))


@pytest.mark.parametrize("fused", [True, False])
def test_the_bound_of_one_step_is_nichol_and_dhariwals(fused, x):
    model = small(variance="learned_range", fused=fused)
    t = torch.tensor([1, 2, 5, 10, 20, 30, 40, 49])
    parts = model.loss(x, seed=3, t=t)
    beta, variance, of_x0, of_x_t = textbook(model.schedule, t)
    alpha_bar = model.schedule.alpha_bar_fp64[t].view(-1, 1, 1, 1)
    eps = normal(3, 8, 64, Stream.FORWARD_NOISE).double().view(8, *SHAPE)
    x_t = alpha_bar.sqrt() * scaled(x) + (1 - alpha_bar).sqrt() * eps
    with torch.no_grad():
        said, v = copy.deepcopy(model.net).double()(x_t, t).chunk(2, 1)
    x0 = (x_t - (1 - alpha_bar).sqrt() * said) / alpha_bar.sqrt()
    fraction = (v + 1) / 2
    learned = torch.exp(fraction * beta.log() + (1 - fraction) * variance.log())
    truth = Normal(of_x0 * scaled(x) + of_x_t * x_t, variance.sqrt())
    kl = kl_divergence(truth, Normal(of_x0 * x0 + of_x_t * x_t, learned.sqrt()))
    torch.testing.assert_close(parts["vlb"].double(), 50 * kl.mean() / math.log(2), rtol=1e-4, atol=0)


def test_the_bound_of_the_last_step_is_a_likelihood(x):
    model = small(variance="learned_range")
    vlb = model.loss(x, seed=3, t=0)["vlb"]
    b = math.sqrt(model.schedule.betas_fp64[0])
    a = math.sqrt(1 - b * b)
    eps = normal(3, 8, 64, Stream.FORWARD_NOISE).double().view(8, *SHAPE)
    x_t = a * scaled(x) + b * eps
    with torch.no_grad():
        said = copy.deepcopy(model.net).double()(x_t, torch.zeros(8))[:, :1]
    nll = -grey_level_log_prob(x, (x_t - b * said) / a, b)
    torch.testing.assert_close(vlb.double(), 50 * nll.mean() / math.log(2), rtol=1e-4, atol=0)


def grey_level_log_prob(x, mean, std):
    """By the normal's distribution function, at the edges of the bins; good as long as nothing is in a tail."""
    x = x.double()
    upper = torch.where(x == 255, 1.0, Normal(mean, std).cdf((2 * x + 1) / 255 - 1))
    lower = torch.where(x == 0, 0.0, Normal(mean, std).cdf((2 * x - 1) / 255 - 1))
    return torch.log(upper - lower)


# Networks of others.


def test_a_unet_of_diffusers_trains_and_samples(x):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    model = small(net=net)
    t = torch.arange(8)
    x_t = torch.randn(8, *SHAPE)
    assert torch.equal(model(x_t, t), net(x_t, t).sample)
    step = TrainStep(model, torch.optim.Adam(model.parameters(), lr=1e-2))
    losses = [step(x, seed=0)["loss"].item() for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]
    images = model.sample(3, steps=4, seed=0)
    assert images.shape == (3, *SHAPE)
    assert 0 <= images.min() <= images.max() <= 1


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (lambda x: x[:, :, :4], r"net: expected a prediction of shape \[8, 1, 8, 8\], got \[8, 1, 4, 8\]"),
        (lambda x: (x,), r"net: expected a prediction of shape \[8, 1, 8, 8\], got tuple"),
        (lambda x: torch.cat([x, x], 1), r"net: .*got \[8, 2, 8, 8\]"),
    ],
)
def test_a_net_of_another_shape_is_refused(out, message, x):
    class Wrong(Net):
        def forward(self, x, t):
            return out(super().forward(x, t))

    with pytest.raises(ValueError, match=message):
        small(net=Wrong()).loss(x)


def test_training_learns():
    """Two images, which are then what is sampled."""
    x = torch.zeros(2, *SHAPE, dtype=torch.uint8)
    x[0, 0, :4], x[1, 0, 4:] = 255, 255
    model = DDPM(UNet(SHAPE, channels=16, channel_mults=(1,), num_res_blocks=1), "rectified-flow", image_shape=SHAPE)
    step = TrainStep(model, torch.optim.Adam(model.parameters(), lr=5e-3), ema_decay=0.9)
    batch = x.repeat(8, 1, 1, 1)
    first, *losses = [step(batch, seed=i)["loss"].item() for i in range(80)]
    assert first == pytest.approx(2, abs=0.3)
    assert sum(losses[-10:]) / 10 < 0.4
    images = step.ema.module.sample(16, steps=10, seed=0).unsqueeze(1)
    distance = (images - x / 255).abs().flatten(2).mean(2).min(1).values
    assert distance.mean() < 0.15


# What does not go together.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": ZERO_SNR, "objective": "epsilon"}, "objective: expected 'v', 'x0' or 'flow' .* got 'epsilon'"),
        ({"schedule": "rectified-flow", "objective": "epsilon"}, "objective: expected 'v', 'x0' or 'flow'"),
        ({"schedule": "rectified-flow", "objective": "edm", "weighting": "max"}, "weighting: expected one of"),
        ({"objective": "noise"}, "objective: expected one of 'epsilon', 'x0'"),
        ({"schedule": "bent"}, "schedule: expected one of 'linear', .*, got 'bent'"),
        ({"schedule": "edm", "num_steps": 5}, "num_steps: expected None for 'edm'"),
        (
            {"schedule": {"name": "linear"}, "num_steps": 5},
            "num_steps: expected None where the schedule is not given by",
        ),
        ({"variance": "learned"}, "variance: expected one of"),
        ({"variance": "learned_range", "schedule": "edm"}, "variance: expected one of .* with a continuous schedule"),
        ({"clip_x0": 0.0}, "clip_x0: expected a positive number"),
        ({"gamma": -1.0}, "gamma: expected a finite number >= 0"),
        ({"vlb_weight": math.nan}, "vlb_weight: expected a finite number >= 0"),
        ({"image_shape": (28, 28)}, "image_shape: expected 3 positive ints"),
        ({"preset": "huge", "net": None}, "preset: expected one of 'tiny'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_other_kinds_of_arguments_are_refused():
    with pytest.raises(TypeError, match="schedule: expected a name, a dict or a Schedule, got int"):
        small(1000)
    with pytest.raises((TypeError, ValueError), match=r"options: .*steps"):
        small({"name": "linear", "steps": 10})


@pytest.mark.parametrize("objective", ["x0", "v", "flow", "edm"])
def test_zero_terminal_snr_goes_with_every_other_objective(objective):
    images = small(ZERO_SNR, objective).sample(2, steps=5, seed=0)
    assert images.isfinite().all()


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        ("linear", {"sampler": "euler"}, "sampler: expected 'ddpm' or 'ddim' for a discrete schedule, got 'euler'"),
        ("edm", {"sampler": "heun"}, "sampler: expected 'euler' or 'ddim' or 'ddpm' for a continuous schedule"),
        ("linear", {"sampler": "heun"}, "sampler: expected 'ddpm' or 'ddim'"),
        ("linear", {"eta": 0.5}, "eta: expected None for the sampler 'ddpm'"),
        ("linear", {"sampler": "ddim", "eta": 1.5}, r"eta: expected a number in \[0, 1\], got 1.5"),
        ("linear", {"steps": 51}, "steps: expected an int from 1 to 50, got 51"),
        ("edm", {"steps": 0}, "steps: expected an int from 1"),
        ("linear", {"n": 0}, "n: expected an int of at least 1, got 0"),
        ("linear", {"n": 2.5}, "n: expected an int of at least 1, got 2.5"),
        ("linear", {"n": True}, "n: expected an int of at least 1, got True"),
        ("linear", {"batch_size": 0}, "batch_size: expected an int of at least 1, got 0"),
    ],
)
def test_samplers_that_do_not_fit_are_refused(schedule, options, message):
    with pytest.raises(ValueError, match=message):
        small(schedule).sample(**{"n": 2, **options})


# Sampling.


def test_ancestral_sampling_is_algorithm_2_of_ho_et_al():
    model = small(clip_x0=False)
    net = copy.deepcopy(model.net).double()
    x = normal(4, 3, 64, Stream.PRIOR, row_offset=2).double().view(3, *SHAPE)
    for t in reversed(range(50)):
        beta, variance, _, _ = textbook(model.schedule, torch.tensor([t]))
        alpha_bar = model.schedule.alpha_bar_fp64[t]
        with torch.no_grad():
            eps = net(x, torch.full((3,), t))
        x = (x - beta / (1 - alpha_bar).sqrt() * eps) / (1 - beta).sqrt()
        if t > 0:
            z = normal(4, 3, 64, Stream.REVERSE_STEP, row_offset=2, salt=t)
            x = x + variance.sqrt() * z.double().view(3, *SHAPE)
    expected = ((x + 1) / 2).clamp(0, 1)
    assert expected.std() > 0.05
    for fused in (True, False):
        model.fused = fused
        images = model.sample(3, seed=4, row_offset=2)
        torch.testing.assert_close(images.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("schedule", "objective", "sampler"),
    [("linear", "epsilon", "ddim"), ("cosine", "v", "ddim"), ("rectified-flow", "flow", "euler")],
)
def test_deterministic_samplers_are_those_of_diffusers(schedule, objective, sampler, fused):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    model = small(schedule, objective, fused=fused)
    if sampler == "euler":
        theirs = diffusers.FlowMatchEulerDiscreteScheduler()
        theirs.set_timesteps(sigmas=torch.linspace(1, 0.2, 5).tolist())
        options = {}
    else:
        theirs = diffusers.DDIMScheduler(
            num_train_timesteps=50, trained_betas=model.schedule.betas_fp64.numpy(), set_alpha_to_one=True,
            clip_sample=True, timestep_spacing="trailing",
            prediction_type={"v": "v_prediction"}.get(objective, objective),
        )  # fmt: skip
        theirs.set_timesteps(5)
        options = {"use_clipped_model_output": True}
    x = normal(4, 3, 64, Stream.PRIOR).view(3, *SHAPE)
    for t in theirs.timesteps:
        with torch.no_grad():
            x = theirs.step(model.net(x, t.expand(3)), t, x, **options).prev_sample
    images = model.sample(3, steps=5, sampler=sampler, seed=4)
    torch.testing.assert_close(images, ((x + 1) / 2).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("schedule", ["linear", ZERO_SNR])
def test_a_net_that_knows_them_samples_its_images(schedule, variance, fused, x):
    net = Known(x)
    if variance == "learned_range":
        net = Doubled(net)
    model = small(schedule, "x0", net=net, variance=variance, fused=fused)
    for options in ({}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 0.4, "steps": 7}):
        torch.testing.assert_close(model.sample(8, seed=1, **options), x / 255)


class Forgetful(Net):
    """With dropout."""

    def forward(self, x, t):
        return nn.functional.dropout(super().forward(x, t), training=self.training)


class Doubled(nn.Sequential):
    """A prediction, and a variance half way."""

    def forward(self, x, t):
        x0 = self[0](x, t)
        return torch.cat([x0, torch.zeros_like(x0)], 1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("schedule", ["rectified-flow", "edm"])
def test_continuous_schedules_sample_the_images_too(schedule, fused, x):
    model = small(schedule, "x0", net=Known(x), fused=fused)
    for options in ({}, {"steps": 3}, {"eta": 1.0}):
        torch.testing.assert_close(model.sample(8, seed=1, **options), x / 255)


def test_edm_starts_at_its_largest_sigma():
    model = small("edm", net=Net())
    sampling = _Sampling(model, 2, model.schedule.timesteps(5), 0.0, 0)
    noise = normal(3, 2, 64, Stream.PRIOR).view(2, *SHAPE)
    torch.testing.assert_close(sampling.start(torch.tensor([3])), 80 * noise)
    # For viewing it is scaled back to what an image with its noise would be at most.
    path = model.sample(2, steps=5, seed=3, trajectory=True)
    torch.testing.assert_close(path[0], (noise / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_clipping_bounds_what_the_network_says(x):
    wild = Known(x, error=3.0)
    bounded = small("linear", "x0", net=wild).sample(4, steps=10, seed=0)
    torch.testing.assert_close(bounded, torch.ones_like(bounded))
    path = small("linear", "x0", net=wild, clip_x0=0.5).sample(4, steps=10, seed=0)
    torch.testing.assert_close(path, torch.full_like(path, 0.75))
    # The bound is that of what is sampled.
    white = small("linear", "x0", net=Known(torch.full_like(x, 255)))
    bits = small("linear", "x0", net=wild).bits_per_dim(x, steps=10, seed=0)
    torch.testing.assert_close(bits, white.bits_per_dim(x, steps=10, seed=0))
    assert small("edm").clip_x0 is small("linear", clip_x0=False).clip_x0 is None
    assert small("edm", clip_x0=True).clip_x0 == small("linear").clip_x0 == 1.0


@pytest.mark.parametrize("options", [{}, {"sampler": "ddim", "eta": 0.5}])
def test_one_seed_gives_the_same_images_at_every_batch_size(options):
    model = small(num_steps=6)
    whole = model.sample(64, seed=7, row_offset=5, trajectory=True, **options)
    assert whole.shape == (7, 64, *SHAPE)
    assert whole[-1].std(0).max() > 0.05
    for batch_size in (1, 8, 60):
        pieces = model.sample(64, seed=7, row_offset=5, trajectory=True, batch_size=batch_size, **options)
        assert torch.equal(pieces[0], whole[0])
        torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)
    piece = model.sample(3, seed=7, row_offset=25, **options)
    torch.testing.assert_close(piece, whole[-1, 20:23], rtol=0, atol=1e-5)
    assert not torch.allclose(model.sample(3, seed=8, row_offset=25, **options), piece, atol=1e-2)
    assert torch.equal(model.sample(3, seed=torch.tensor([7]), row_offset=25, **options), piece)


def test_sampling_leaves_the_model_as_it_was(x):
    model = small(net=Forgetful())
    # In eval mode meanwhile: nothing is dropped.
    assert torch.equal(model.sample(2, steps=3, seed=0), model.sample(2, steps=3, seed=0))
    assert torch.equal(model.bits_per_dim(x, steps=3, seed=0), model.bits_per_dim(x, steps=3, seed=0))
    assert not torch.equal(model(x / 255, 3), model(x / 255, 3))
    model.net.stem.eval()
    torch.manual_seed(2)
    first = model.sample(2, steps=3)
    torch.manual_seed(2)
    assert torch.equal(model.sample(2, steps=3), first)
    assert model.training
    assert not model.net.stem.training
    assert not first.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_trajectory_ends_in_the_images():
    model = small("cosine")
    path = model.sample(3, steps=6, seed=0, trajectory=True)
    assert path.shape == (7, 3, *SHAPE)
    assert torch.equal(path[-1], model.sample(3, steps=6, seed=0))
    torch.testing.assert_close(path[0], (normal(0, 3, 64, Stream.PRIOR).view(3, *SHAPE) / 2 + 0.5).clamp(0, 1))
    # Each is a picture of its own, not of where the last one was written.
    assert all((path[i] - path[j]).abs().max() > 1e-3 for i in range(7) for j in range(i))


def test_a_step_stays_in_its_memory(x):
    model = small()
    times = model.schedule.timesteps(5)
    sampling = _Sampling(model, 2, times, 1.0, 3)
    for seed in (1, 2):
        memory = [sampling.start(torch.tensor([seed])).data_ptr(), sampling.at.data_ptr(), sampling.seed.data_ptr()]
        with torch.no_grad():
            for step in range(1, 6):
                assert sampling() is sampling.x
                assert sampling.at.item() == step
        assert memory == [sampling.x.data_ptr(), sampling.at.data_ptr(), sampling.seed.data_ptr()]
        expected = model.sample(2, steps=5, seed=seed, row_offset=3)
        assert torch.equal((sampling.x / 2 + 0.5).clamp(0, 1), expected)


@pytest.mark.parametrize(
    "options", [{}, {"variance": "learned_range"}, {"schedule": "rectified-flow"}, {"schedule": "edm"}]
)
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_reads_nothing_back(options, fused):
    """Tensors on the meta device have no values: what would wait for one raises an error."""
    model = small(fused=fused, **options).to("meta")
    sampling = _Sampling(model, 2, model.schedule.timesteps(5), 1.0, 0)
    with torch.no_grad():
        sampling.start(torch.empty(1, dtype=torch.int64, device="meta"))
        assert sampling().shape == (2, *SHAPE)
    assert sampling.x.device.type == "meta"


def test_a_model_is_built_without_memory():
    with torch.device("meta"):
        assert DDPM(preset="tiny").device.type == "meta"


# The likelihood.


@pytest.mark.parametrize("schedule", ["linear", "rectified-flow", "edm"])
def test_bits_of_a_net_that_knows_the_images(schedule, x):
    """No step costs anything: what is left is the noisy end, and the share of the grey level in the last Gaussian."""
    x[0, 0, 0, :3] = torch.tensor([0, 1, 255])
    model = small(schedule, "x0", net=Known(x))
    times = model.schedule.timesteps(10)
    a, b = (value.double() for value in model.schedule.coefficients(times[[0, -2]]))
    scale = b[0] if model.schedule.continuous else 1.0
    prior = Normal(a[0] * scaled(x), b[0]), Normal(torch.zeros(()).double(), scale)
    nats = kl_divergence(*prior) - grey_level_log_prob(x, scaled(x), b[1])
    expected = nats.flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(model.bits_per_dim(x, steps=10, seed=0).double(), expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(model.bits_per_dim(x / 255, steps=10, seed=0).double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(
    ("schedule", "steps"), [("linear", None), ("linear", 7), ("cosine", 10), ("rectified-flow", 8), ("edm", 9)]
)
def test_bits_of_gaussian_data(schedule, steps, variance):
    """Each Gaussian by conditioning, and each expectation in closed form or by quadrature."""
    mean, std, levels, rows = 0.1, 0.3, torch.tensor([90, 140, 200], dtype=torch.uint8), 4000
    options = {"num_steps": 20} if schedule in ("linear", "cosine") else {}
    made = schedules.get(schedule, **options)
    model = DDPM(Linear(made, mean, std), made, "x0", (1, 1, 1), variance=variance, clip_x0=False)
    times = made.timesteps(steps)
    a, b = (value.double() for value in made.coefficients(times[:-1]))
    x0 = scaled(levels)
    scale = b[0].item() if made.continuous else 1.0
    nats = kl_divergence(Normal(a[0] * x0, b[0]), Normal(torch.zeros(()).double(), scale))
    for t in range(len(a) - 1):
        s, ratio = t + 1, a[t] / a[t + 1]
        added = b[t] ** 2 - (ratio * b[s]) ** 2
        posterior = 1 / (1 / b[s] ** 2 + ratio**2 / added)
        width = posterior if variance == "fixed_small" else posterior * b[t] ** 2 / b[s] ** 2
        # x0 as guessed is gain x_t + rest, so its error is a Gaussian too.
        gain = a[t] * std**2 / ((a[t] * std) ** 2 + b[t] ** 2)
        bias = x0 - (mean + gain * (a[t] * x0 - a[t] * mean))
        error = bias**2 + (gain * b[t]) ** 2
        shift = (posterior * a[s] / b[s] ** 2) ** 2 * error
        nats = nats + 0.5 * ((posterior + shift) / width - 1 + torch.log(width / posterior))
    eps = torch.linspace(-8, 8, 2001, dtype=torch.float64)[:, None]
    gain = a[-1] * std**2 / ((a[-1] * std) ** 2 + b[-1] ** 2)
    guess = mean + gain * (a[-1] * x0 + b[-1] * eps - a[-1] * mean)
    # Twenty pieces of each grey level: a difference of two distribution functions would be 0 in the tails.
    pieces = x0 + (torch.arange(20).double()[:, None, None] - 9.5) / 20 * 2 / 255
    inside = torch.logsumexp(Normal(guess, b[-1]).log_prob(pieces), 0) + math.log(2 / 255 / 20)
    nats = nats - torch.trapezoid(inside * Normal(0.0, 1.0).log_prob(eps).exp(), eps, dim=0)
    expected = nats / math.log(2)

    draws = model.bits_per_dim(levels.repeat(rows).view(-1, 1, 1, 1), steps=steps, seed=1).double().view(rows, 3)
    error = draws.std(0) / math.sqrt(rows)
    assert ((draws.mean(0) - expected).abs() < 4 * error + 1e-4 * expected).all()
    assert (error < 0.05 * expected).all()


def test_a_worse_net_costs_more_bits(x):
    bits = [small("linear", "x0", net=Known(x, error)).bits_per_dim(x, seed=0).mean() for error in (0, 0.02, 0.1, 0.4)]
    assert bits[0] < bits[1] < bits[2] < bits[3]
    wide = [
        small("linear", "x0", net=Known(x, 0.1), variance=variance).bits_per_dim(x, seed=0).mean()
        for variance in ("fixed_small", "fixed_large")
    ]
    assert wide[0] != wide[1]


def test_bits_of_a_learned_variance_lie_at_its_ends(x):
    """v = -1 is fixed_small and v = 1 is fixed_large."""

    class Ends(Doubled):
        def forward(self, x, t):
            return torch.cat([self[0](x, t), torch.full_like(x, self.v)], 1)

    for v, variance in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        net = Ends(Known(x, 0.1))
        net.v = v
        learned = small("linear", "x0", net=net, variance="learned_range").bits_per_dim(x, seed=0)
        fixed = small("linear", "x0", net=Known(x, 0.1), variance=variance).bits_per_dim(x, seed=0)
        torch.testing.assert_close(learned, fixed)


@pytest.mark.parametrize("std", [1e-3, 0.01, 0.1, 1.0, 30.0])
def test_the_grey_levels_share_the_whole_gaussian(std):
    model = small("edm")
    levels = torch.arange(256).double().view(256, 1, 1, 1) * 2 / 255 - 1
    # Where a level is far from the mean its share is small, and still a number.
    for mean in (-3.0, -1.0, 0.1234, 1.0, 5.0):
        nll = model._grey_level_nll(levels, torch.tensor(mean).double(), torch.tensor([std]))
        assert nll.isfinite().all()
        assert torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-6 if std < 10 else 1e-5)


def test_bits_of_pieces_and_seeds(x):
    model = small()
    bits = model.bits_per_dim(x, steps=5, seed=3, row_offset=2)
    assert (bits.shape, bits.dtype) == ((8,), torch.float32)
    torch.testing.assert_close(model.bits_per_dim(x[4:], steps=5, seed=3, row_offset=6), bits[4:])
    assert not torch.allclose(model.bits_per_dim(x, steps=5, seed=4, row_offset=2), bits)
    assert model.training
    assert not bits.requires_grad


def test_each_step_of_the_bound_has_noise_of_its_own(x):
    seen = []

    class Watching(Net):
        def forward(self, x, t):
            seen.append((x, t))
            return super().forward(x, t)

    model = small(net=Watching())
    model.bits_per_dim(x, steps=3, seed=0)
    noise = []
    for x_t, t in seen:
        a, b = model.schedule.coefficients(t)
        noise.append((x_t - a.view(-1, 1, 1, 1) * scaled(x)) / b.view(-1, 1, 1, 1))
    assert [t[0].item() for _, t in seen] == [49, 32, 16]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert torch.corrcoef(torch.stack([noise[i].flatten(), noise[j].flatten()]))[0, 1].abs() < 0.15


# The forward process.


def test_the_forward_process_follows_one_path(x):
    x = 96 + x // 4
    model = small()
    pictures = model.forward_process(x, [-1, 0, 5, 20], seed=3, row_offset=4)
    assert pictures.shape == (4, 8, *SHAPE)
    torch.testing.assert_close(pictures[0], x / 255)
    eps = normal(3, 8, 64, Stream.FORWARD_NOISE, row_offset=4).view(8, *SHAPE)
    for picture, t in zip(pictures[1:], (0, 5, 20), strict=True):
        alpha_bar = model.schedule.alpha_bar[t]
        expected = alpha_bar.sqrt() * scaled(x) + (1 - alpha_bar).sqrt() * eps
        torch.testing.assert_close(picture, ((expected + 1) / 2).clamp(0, 1).float())
    torch.testing.assert_close(model.forward_process(x / 255, torch.tensor([20]), seed=3, row_offset=4)[0], pictures[3])
    with pytest.raises(ValueError, match=r"ts: expected values in -1..49, got 50"):
        model.forward_process(x, [50])
    continuous = small("edm").forward_process(x, [0.0, 80.0], seed=3, row_offset=4)
    torch.testing.assert_close(continuous[0], x / 255)
    torch.testing.assert_close(continuous[1], (eps / 2 + 0.5).clamp(0, 1), rtol=0, atol=0.01)


# As a module.


@pytest.mark.parametrize(
    "options",
    [{}, {"fused": False}, {"variance": "learned_range"}, {"schedule": "edm"}, {"schedule": "rectified-flow"}],
    ids=["fused", "ordinary", "learned", "edm", "flow"],
)
def test_compiled_loss_and_gradients_are_the_eager_ones(options, x):
    model = small(**options)
    eager = model.loss(x, seed=1)
    expected = gradients(model, eager["loss"])
    keys = list(model.state_dict())
    model.compile(backend="aot_eager")
    for seed in (1, torch.tensor([1])):
        compiled = model.loss(x, seed=seed)
        torch.testing.assert_close(compiled, eager)
    for left, right in zip(gradients(model, compiled["loss"]), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert list(model.state_dict()) == keys


def test_a_compiled_model_samples_the_same(x):
    model = small()
    sampled, bits = model.sample(2, steps=3, seed=0), model.bits_per_dim(x, steps=3, seed=0)
    model.compile(backend="eager")
    torch.testing.assert_close(model.sample(2, steps=3, seed=0), sampled)
    torch.testing.assert_close(model.bits_per_dim(x, steps=3, seed=0), bits)
    assert counters["stats"]["unique_graphs"] <= 2


def test_inductor_gives_the_eager_loss(x):
    model = small()
    eager = model.loss(x, seed=1)
    expected = gradients(model, eager["loss"])
    model.compile()
    compiled = model.loss(x, seed=1)
    torch.testing.assert_close(compiled, eager)
    for left, right in zip(gradients(model, compiled["loss"]), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_and_half_precision_models(compiled, x):
    model = small()
    full = model.loss(x, seed=1)["loss"]
    half = copy.deepcopy(model).to(torch.bfloat16)
    if compiled:
        model.compile(backend="aot_eager")
        half.compile(backend="aot_eager")
    batches = (x,) if compiled else (x, x / 255)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [model.loss(batch, seed=1)["loss"] for batch in batches]
    losses += [half.loss(batch, seed=1)["loss"] for batch in batches]
    for loss in losses:
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, full, rtol=0.02, atol=0)
    assert half.schedule.tables.dtype == torch.float32


def test_half_precision_models_sample_in_full_precision():
    model = small()
    half = copy.deepcopy(model).to(torch.bfloat16)
    images = half.sample(2, steps=3, seed=0)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, model.sample(2, steps=3, seed=0), rtol=0, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.sample(2, steps=3, seed=0), images, rtol=0, atol=0.1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_leave_the_captured_step_behind(duplicate, x):
    model = small()
    model._kept = "a graph of these very weights"
    twin = duplicate(model)
    assert twin._kept is None
    assert model._kept == "a graph of these very weights"
    torch.testing.assert_close(twin.loss(x, seed=0), model.loss(x, seed=0))


# Saving.


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 20},
        {"schedule": "rectified-flow", "weighting": "sigma"},
        {"schedule": {"name": "cosine", "num_steps": 30, "zero_terminal_snr": True}, "objective": "x0"},
        {"schedule": schedules.edm(sigma_max=50.0), "clip_x0": True},
        {"schedule": schedules.zero_terminal_snr(schedules.linear(20)), "variance": "learned_range", "fused": False},
    ],
)
def test_round_trip(options, tmp_path, x):
    model = DDPM(preset="tiny", image_shape=SHAPE, **options)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "DDPM"
    assert "own_networks" not in config
    for again in (DDPM.from_pretrained(tmp_path), load(tmp_path)):
        assert again.schedule.config == model.schedule.config
        assert (again.objective, again.variance, again.clip_x0) == (model.objective, model.variance, model.clip_x0)
        assert (again.weighting, again.fused) == (model.weighting, model.fused)
        torch.testing.assert_close(again.loss(x, seed=0), model.loss(x, seed=0), rtol=0, atol=0)
        assert torch.equal(again.sample(2, steps=2, seed=0), model.sample(2, steps=2, seed=0))


def test_own_nets_and_own_schedules_are_passed_again(tmp_path, x):
    schedule = schedules.from_betas(torch.linspace(0.01, 0.2, 10))
    model = small(schedule)
    model.save_pretrained(tmp_path)
    again = DDPM.from_pretrained(tmp_path, net=Net(), schedule=schedule)
    torch.testing.assert_close(again.loss(x, seed=0), model.loss(x, seed=0), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"saved with its own net and schedule.*net=..., schedule=..."):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"saved with its own schedule"):
        DDPM.from_pretrained(tmp_path, net=Net())


def test_the_family_on_the_command_line():
    family = get_family("ddpm")
    assert family.model is DDPM
    model = family.build(SHAPE, schedule="cosine", num_steps=20, objective="v", preset="tiny", variance="fixed_large")
    assert (model.schedule.num_steps, model.objective, model.image_shape) == (20, "v", SHAPE)
    assert {"batch_size", "lr", "ema_decay"} <= family.defaults.keys()
    with pytest.raises(ValueError, match=r"ddpm: unknown options \['latent_dim'\]"):
        family.build(SHAPE, latent_dim=2)


def test_every_sampler_of_a_continuous_schedule():
    """DDIM is Euler's method there, and ancestral steps (eta = 1) are those of the bound."""
    model = small("rectified-flow")
    euler, ddim, ddpm, noisy = (
        model.sample(3, steps=4, seed=0, **options)
        for options in ({}, {"sampler": "ddim"}, {"sampler": "ddpm"}, {"sampler": "euler", "eta": 1.0})
    )
    assert torch.equal(euler, ddim)
    assert torch.equal(ddpm, noisy)
    assert not torch.equal(euler, ddpm)


def test_the_key_of_a_kept_graph():
    """It stays over calls and optimizer steps, and changes with what a graph would not notice."""
    model = small("edm")
    key = model._graph_key(4, 11, 0.0, 0)
    model.sample(2, steps=2)
    _ = [object() for _ in range(100)]
    torch.optim.SGD(model.parameters(), lr=0.1).zero_grad()
    model.loss(torch.rand(2, 1, 8, 8))["loss"].backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model._graph_key(4, 11, 0.0, 0) == key
    model.schedule.sigma_data = 0.25
    assert model._graph_key(4, 11, 0.0, 0) != key
    model.schedule.sigma_data = 0.5
    assert model._graph_key(4, 11, 0.0, 0) == key
    next(model.parameters()).data = next(model.parameters()).data.clone()
    assert model._graph_key(4, 11, 0.0, 0) != key


def test_kept_memory_moves_to_other_times_and_rows():
    """What a graph reads is overwritten: another spacing of as many times, another piece of the rows."""
    model = small("rectified-flow")
    times = model.schedule.timesteps(5)
    sampling = _Sampling(model, 2, times, 0.0, 0)
    kept = [tensor.data_ptr() for tensor in (sampling.times, sampling.tables, sampling.salts)]
    other = times**2
    sampling.move_to(other, 7)
    assert [tensor.data_ptr() for tensor in (sampling.times, sampling.tables, sampling.salts)] == kept
    with torch.no_grad():
        sampling.start(torch.tensor([3]))
        for _ in range(5):
            moved = sampling().clone()
        fresh = _Sampling(model, 2, other, 0.0, 7)
        fresh.start(torch.tensor([3]))
        for _ in range(5):
            wanted = fresh()
    assert torch.equal(moved, wanted)


def test_a_model_that_was_sampled_from_is_freed_at_once():
    model = small("linear")
    model.sample(1, steps=2)
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_uint8_and_floats_train_a_learned_variance_alike_under_autocast():
    model = small("linear", variance="learned_range")
    x = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    t = torch.tensor([1, 2, 5, 40])
    with torch.autocast("cpu", torch.bfloat16):
        bytes_, floats = (model.loss(images, t=t, seed=0)["vlb"] for images in (x, x.float() / 255))
    torch.testing.assert_close(bytes_, floats, rtol=1e-3, atol=0)
