"""The drop-in posterior against diffusers' own class: values, gradients, and inside an AutoencoderKL."""

import math

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders import autoencoder_kl
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Theirs

from genfast.integrations.diffusers import DiagonalGaussianDistribution as Ours


def moments(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(3, 8, 5, 4, generator=generator) * scale).to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["usual", "clamped"])
def test_values(scale):
    ours, theirs = Ours(moments(scale=scale)), Theirs(moments(scale=scale))
    for name in ("mean", "logvar", "std", "var", "parameters"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=0)
    assert torch.equal(ours.mode(), theirs.mode())
    torch.testing.assert_close(ours.sample(generator()), theirs.sample(generator()))
    torch.testing.assert_close(ours.kl(), theirs.kl())
    x = torch.randn(3, 4, 5, 4, generator=generator(1))
    torch.testing.assert_close(ours.nll(x), theirs.nll(x))
    torch.testing.assert_close(ours.nll(x, dims=(1, 2)), theirs.nll(x, dims=(1, 2)))


def test_kl_to_another():
    other = moments().flip(0) * 0.5
    expected = Theirs(moments()).kl(Theirs(other))
    torch.testing.assert_close(Ours(moments()).kl(Ours(other)), expected)
    torch.testing.assert_close(Ours(moments()).kl(Theirs(other)), expected)
    assert Ours(moments()).kl(Ours(other, deterministic=True)).tolist() == [math.inf] * 3


@pytest.mark.parametrize("scale", [1.0, 15.0], ids=["usual", "clamped"])
@pytest.mark.parametrize(
    "use",
    [
        lambda posterior: posterior.sample(generator()).square().sum(),
        lambda posterior: posterior.kl().sum(),
        lambda posterior: posterior.sample(generator()).sin().sum() + 0.3 * posterior.kl().mean(),
        lambda posterior: posterior.kl(type(posterior)(moments().flip(0))).sum(),
        lambda posterior: posterior.nll(torch.ones(3, 4, 5, 4)).sum(),
        lambda posterior: posterior.mode().square().sum(),
    ],
    ids=["sample", "kl", "both", "kl-other", "nll", "mode"],
)
def test_gradients(use, scale):
    parameters = [moments(scale=scale).requires_grad_() for _ in range(2)]
    values = [use(kind(h)) for kind, h in zip((Ours, Theirs), parameters, strict=True)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-5)
    for value in values:
        value.backward()
    torch.testing.assert_close(parameters[0].grad, parameters[1].grad, rtol=1e-4, atol=1e-5)


def test_without_a_generator_the_noise_is_new_and_follows_manual_seed():
    posterior = Ours(moments())
    torch.manual_seed(3)
    first, second = posterior.sample(), posterior.sample()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(posterior.sample(), first)
    wide = Ours(torch.zeros(2, 2, 100, 100)).sample()
    assert abs(wide.mean()) < 0.03
    assert abs(wide.std() - 1) < 0.03


def test_kl_draws_nothing_from_torch():
    torch.manual_seed(0)
    Ours(moments()).kl()
    drawn = torch.randn(3)
    torch.manual_seed(0)
    assert torch.equal(torch.randn(3), drawn)


def test_kl_after_a_sample_without_gradient_has_one():
    h = moments().requires_grad_()
    posterior = Ours(h)
    with torch.no_grad():
        posterior.sample()
    posterior.kl().sum().backward()
    assert h.grad.abs().sum() > 0


def test_sample_then_kl_is_one_op():
    h = moments().requires_grad_()
    posterior = Ours(h)
    z = posterior.sample()
    assert posterior.kl().grad_fn is z.grad_fn


def test_deterministic():
    ours, theirs = Ours(moments(), deterministic=True), Theirs(moments(), deterministic=True)
    for name in ("std", "var"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert torch.equal(ours.sample(), theirs.sample())
    assert torch.equal(ours.kl(), theirs.kl())
    assert torch.equal(ours.nll(ours.mode()), theirs.nll(ours.mode()))


def test_a_generator_for_each_row():
    mine = Ours(moments()).sample([generator(i) for i in range(3)])
    torch.testing.assert_close(mine, Theirs(moments()).sample([generator(i) for i in range(3)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    ours, theirs = Ours(moments(dtype)), Theirs(moments(dtype))
    assert ours.sample().dtype == dtype
    torch.testing.assert_close(ours.sample(generator()), theirs.sample(generator()), rtol=0.02, atol=0.02)
    exact = Theirs(moments(dtype).double()).kl()
    torch.testing.assert_close(ours.kl().double(), exact, rtol=1e-5, atol=1e-5)


def test_refuses_odd_moments():
    with pytest.raises(ValueError, match=r"parameters: expected moments of shape \[B, 2 L, ...\], got \[2, 7, 4, 4\]"):
        Ours(torch.zeros(2, 7, 4, 4))


def test_inside_an_autoencoder_kl(monkeypatch):
    torch.manual_seed(0)
    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x, sample_posterior=True, generator=generator()).sample
        monkeypatch.setattr(autoencoder_kl, "DiagonalGaussianDistribution", Ours)
        torch.testing.assert_close(model(x, sample_posterior=True, generator=generator()).sample, expected)
        assert isinstance(model.encode(x).latent_dist, Ours)
