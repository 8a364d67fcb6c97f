"""Likelihoods of each family, and which of them compare."""

import json
from dataclasses import replace

import pytest
import torch

from genfast.flows import ActNorm
from genfast.metrics import Estimate, Likelihood, comparable, likelihood
from genfast.models import DDPM, VAE, AutoEncoder, Flow, RealNVP
from genfast.training import DeviceDataset, evaluate, evaluation_seed

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (20, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def vae(**options):
    return VAE(latent_dim=2, hidden_dims=(8,), image_shape=SHAPE, **options)


def test_elbo_is_that_of_the_evaluation(images):
    model, data = vae(), DeviceDataset(images, binarize="dynamic")
    found = likelihood(model, data, seed=3, batch_size=7)
    assert found.estimate.value == pytest.approx(evaluate(model, data, seed=3)["elbo"], rel=1e-5)
    assert (found.kind, found.bound, found.unit, found.k) == ("elbo", "lower", "nats per image", None)
    assert "drawn as 0 or 1" in found.data
    assert found.estimate.n == 20
    assert found.estimate.low < found.estimate.value < found.estimate.high
    at_once = likelihood(model, data, seed=3, batch_size=20)
    assert at_once.estimate.value == pytest.approx(found.estimate.value, rel=1e-6)
    assert model.training


def test_importance_weighted_bound(images):
    model, data = vae(), DeviceDataset(images, binarize="threshold")
    found = likelihood(model, data, k=30)
    expected = model.log_prob(data.images, 30, seed=evaluation_seed(0)).double().mean()
    assert found.estimate.value == pytest.approx(float(expected), rel=1e-6)
    assert (found.kind, found.k) == ("iwae", 30)
    assert found.estimate.value > likelihood(model, data).estimate.value


def test_bits_of_flows_and_diffusion_models_compare(images):
    flow, ddpm = RealNVP(image_shape=SHAPE, preset="tiny"), DDPM(image_shape=SHAPE, preset="tiny", num_steps=20)
    of_flow, of_ddpm = likelihood(flow, images, batch_size=6), likelihood(ddpm, images, steps=4)
    seed = evaluation_seed(0)
    with torch.no_grad():
        expected = flow.eval().bits_per_dim(images, seed=seed).double().mean()
    assert of_flow.estimate.value == pytest.approx(float(expected), rel=1e-5)
    expected = ddpm.bits_per_dim(images, steps=4, seed=seed).double().mean()
    assert of_ddpm.estimate.value == pytest.approx(float(expected), rel=1e-5)
    assert (of_flow.kind, of_flow.bound, of_flow.unit) == ("bits_per_dim", "upper", "bits per dimension")
    assert comparable(of_flow, of_ddpm)
    assert not comparable(of_flow, likelihood(flow, DeviceDataset(images, binarize="threshold")))


def test_bounds_in_different_numbers_of_steps_do_not_compare(images):
    flow, ddpm = RealNVP(image_shape=SHAPE, preset="tiny"), DDPM(image_shape=SHAPE, preset="tiny", num_steps=6)
    two, five, whole = (likelihood(ddpm, images[:4], steps=steps) for steps in (2, 5, None))
    assert (two.steps, five.steps, whole.steps) == (2, 5, 6)
    assert len({two.column, five.column, whole.column}) == 3
    assert "in 2 steps" in two.column
    assert "in 2 steps" in str(two)
    assert not comparable(two, five)
    assert not comparable(whole, five)
    assert comparable(two, likelihood(ddpm, images[4:8], steps=2))
    # A flow has no steps, and bounds the probability of the same pixels.
    of_flow = likelihood(flow, images[:4])
    assert of_flow.steps is None
    assert comparable(of_flow, two)
    assert comparable(five, of_flow)


def test_a_continuous_schedule_counts_its_own_steps(images):
    model = DDPM(image_shape=SHAPE, preset="tiny", schedule="edm")
    assert likelihood(model, images[:2]).steps == 50


def test_images_of_different_data_do_not_compare(images):
    model = vae()
    of = {name: likelihood(model, images, dataset=name) for name in ("digits", "things", "")}
    assert of["digits"].dataset == "digits"
    assert of["digits"].column.endswith(", digits")
    assert str(of["digits"]).endswith(", digits)")
    for one in of:
        assert [comparable(of[one], of[other]) for other in of] == [one == other for other in of]
    flow = RealNVP(image_shape=SHAPE, preset="tiny")
    digits, things = (likelihood(flow, images, dataset=name) for name in ("digits", "things"))
    assert not comparable(digits, replace(things, steps=5))


def test_a_density_of_real_numbers_is_none_of_grey_levels(images):
    flow = Flow([ActNorm(1)], data_shape=SHAPE).eval()
    found = likelihood(flow, images)
    z = images.double() / 255
    nats = 0.5 * (z.square() + torch.log(torch.tensor(2 * torch.pi))).flatten(1).sum(1).mean()
    bits = float(nats) / (64 * torch.log(torch.tensor(2.0)).item())
    assert found.estimate.value == pytest.approx(bits, rel=1e-5)
    assert (found.bound, found.data) == ("exact", "pixels as real numbers in [0, 1]")
    assert not comparable(found, likelihood(RealNVP(image_shape=SHAPE, preset="tiny"), images))


def test_different_treatments_of_the_pixels_do_not_compare(images):
    model = vae()
    every = [likelihood(model, DeviceDataset(images, binarize=how)) for how in ("none", "threshold", "dynamic")]
    every.append(likelihood(vae(likelihood="gaussian"), images))
    every += [likelihood(model, images, k=k) for k in (2, 3)]
    for index, one in enumerate(every):
        assert [comparable(one, other) for other in every] == [index == other for other in range(len(every))]
    assert not comparable(every[0], None)


def test_families_without_a_likelihood(images):
    assert likelihood(AutoEncoder(latent_dim=2, image_shape=SHAPE), images) is None


def test_through_json_and_as_text(images):
    found = likelihood(vae(), DeviceDataset(images, binarize="threshold"), k=5)
    assert Likelihood.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert str(found).endswith("nats per image (iwae, lower bound; pixels binarized at 128)")
    full = replace(found, steps=50, dataset="digits")
    assert Likelihood.from_dict(json.loads(json.dumps(full.to_dict()))) == full
    # Files that were written before there were these two.
    older = {name: value for name, value in found.to_dict().items() if name not in ("steps", "dataset")}
    assert Likelihood.from_dict(older) == found
    assert "exact" in str(Likelihood(Estimate(1.0), "bits_per_dim", "exact", "bits per dimension", "reals"))


def test_images_that_do_not_fit(images):
    with pytest.raises(TypeError, match="images: expected a uint8 tensor"):
        likelihood(vae(), images.float())
    with pytest.raises(ValueError, match="x: expected"):
        likelihood(vae(), images[:, :, :4])
