"""The autoencoder: the same shape of API as the VAE, without noise."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genfast import AutoEncoder
from tests.models.vae_tutorial import blobs


@pytest.fixture
def x():
    return blobs(8)


def test_shapes_keys_and_loss(x):
    model = AutoEncoder()
    names = [key for key in model.state_dict() if key.endswith("weight")]
    assert names == ["fc1.weight", "fc2.weight", "fc3.weight", "fc4.weight"]
    recon = model(x)
    assert recon.shape == (8, 784)
    assert model.encode(x).shape == (8, 20)
    parts = model.loss(x, seed=0, row_offset=4)
    assert parts.keys() == {"loss", "nll"}
    expected = F.binary_cross_entropy(recon, x.view(8, -1), reduction="sum") / 8
    torch.testing.assert_close(parts["loss"], expected)
    model.fused = False
    torch.testing.assert_close(model.loss(x)["loss"], expected)


def test_gaussian_and_conv(x):
    model = AutoEncoder(preset="conv", hidden_dims=(4, 8), likelihood="gaussian", sigma=0.5)
    recon = model(x)
    assert recon.shape == x.shape
    expected = -torch.distributions.Normal(recon, 0.5).log_prob(x).flatten(1).sum(1).mean()
    torch.testing.assert_close(model.loss(x)["nll"], expected)


def test_it_learns(x):
    torch.manual_seed(0)
    model = AutoEncoder(latent_dim=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(60):
        loss = model.loss(x)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model.reconstruct(x) - x).abs().mean() < 0.5 * (x - x.mean(0)).abs().mean()


def test_pictures(x):
    model = AutoEncoder(latent_dim=2)
    assert model.reconstruct(x).shape == x.shape
    assert model.interpolate(x[:2], x[2:4], steps=3).shape == (2, 3, 1, 28, 28)
    assert model.manifold(n=4).shape == (4, 4, 1, 28, 28)
    whole = model.sample(6, seed=0)
    torch.testing.assert_close(model.sample(2, seed=0, row_offset=4), whole[4:], rtol=0, atol=1e-6)


def test_own_networks_return_the_code_itself():
    model = AutoEncoder(
        image_shape=(3, 8, 8), encoder=nn.Conv2d(3, 5, 4, stride=4), decoder=nn.ConvTranspose2d(5, 3, 4, stride=4)
    )
    assert model.latent_shape == (5, 2, 2)
    assert model.sample(2).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"encoder: expected the code, of shape \[B, 20\], .* got \[1, 19\]"):
        AutoEncoder(encoder=nn.Sequential(nn.Flatten(), nn.Linear(784, 19))).sample(1)
