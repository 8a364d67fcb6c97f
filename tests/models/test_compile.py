"""`Model.compile`: forward and loss as one graph each, nothing else changed, copies on their own."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from genfast import VAE, AutoEncoder
from tests.models.vae_tutorial import blobs


@pytest.fixture(autouse=True)
def fresh_counters():
    counters.clear()


@pytest.fixture
def x():
    return blobs(8)


def graphs():
    return counters["stats"]["unique_graphs"]


def small(**options):
    return VAE(latent_dim=4, hidden_dims=(16,), **options)


@pytest.mark.parametrize("options", [{}, {"preset": "conv"}, {"likelihood": "gaussian"}], ids=["mlp", "conv", "sigma"])
def test_inductor_gives_the_eager_loss_and_gradients(options, x):
    torch.manual_seed(0)
    model = VAE(latent_dim=4, hidden_dims=(8,), **options)
    keys, pixels = list(model.state_dict()), (x * 255).to(torch.uint8)
    eager = model.loss(pixels, seed=1, beta=2.0)
    expected = torch.autograd.grad(eager["loss"], list(model.parameters()))
    torch.manual_seed(5)
    recon = model(x)[0]
    model.compile()
    compiled = model.loss(pixels, seed=1, beta=2.0)
    torch.testing.assert_close(compiled, eager)
    compiled["loss"].backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)
    torch.manual_seed(5)
    torch.testing.assert_close(model(x)[0], recon)
    assert list(model.state_dict()) == keys


def test_one_graph_each_whatever_the_seed(x):
    model = small()
    model.compile(backend="eager")
    for seed in (0, 1, 2**63, -5, torch.tensor([4])):
        torch.testing.assert_close(model.loss(x, seed=seed), VAE.loss(model, x, seed=seed))
    assert graphs() == 1
    model(x)
    model(x)
    assert graphs() == 2


def test_own_networks_and_the_autoencoder_compile(x):
    encoder, decoder = nn.Conv2d(1, 8, 4, stride=4), nn.ConvTranspose2d(4, 1, 4, stride=4)
    for model in (VAE(encoder=encoder, decoder=decoder), AutoEncoder(hidden_dims=(16,)), small(fused=False)):
        eager = model.loss(x, seed=0)
        model.compile(backend="aot_eager")
        torch.testing.assert_close(model.loss(x, seed=0), eager)
        model(x)


def test_a_sweep_over_sizes_compiles(x):
    if "isolate_recompiles" not in torch.compile.__kwdefaults__:
        pytest.skip(f"torch {torch.__version__} has one limit of eight graphs for all models of a process")
    for latent_dim in range(1, 12):
        model = VAE(latent_dim=latent_dim, hidden_dims=(8,))
        model.compile(backend="eager")
        model.loss(x)
        model(x)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_trains_its_own_weights(duplicate, x):
    model = small()
    model.compile(backend="eager")
    model.loss(x)
    model(x)
    before = copy.deepcopy(model.state_dict())
    twin = duplicate(model)
    compiled_so_far = graphs()
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3)
    twin.loss(x, seed=0)["loss"].backward()
    assert graphs() == compiled_so_far + 1
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not torch.equal(twin.fc4.weight, model.fc4.weight)
    torch.testing.assert_close(twin.loss(x, seed=0), VAE.loss(twin, x, seed=0))
    twin(x)[0].sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_compiling_again_replaces_the_options(x):
    model = small()
    model.compile(backend="eager")
    model.compile(backend="aot_eager", fullgraph=False)
    torch.testing.assert_close(model.loss(x, seed=0), VAE.loss(model, x, seed=0))


def test_further_positional_arguments_reach_the_loss(x):
    class Weighted(VAE):
        def loss(self, x, weight=1.0, *, seed=None, row_offset=0):
            return {"loss": weight * super().loss(x, seed=seed, row_offset=row_offset)["loss"]}

    model = Weighted(latent_dim=4, hidden_dims=(16,))
    eager = model.loss(x, 3.0, seed=0)
    model.compile(backend="eager")
    torch.testing.assert_close(model.loss(x, 3.0, seed=0), eager)


@pytest.mark.parametrize("fused", [True, False])
def test_a_changing_beta_and_free_bits_compile(fused, x):
    model = small(fused=fused)
    model.compile(backend="aot_eager")
    for beta, free_bits in ((1.0, 0.0), (0.5, 0.1), (0.25, 0.2), (0, 0.3)):
        options = {"beta": beta, "free_bits": free_bits, "seed": 0}
        torch.testing.assert_close(model.loss(x, **options), VAE.loss(model, x, **options))


@pytest.mark.parametrize("fused", [True, False])
def test_compiled_forward_takes_a_seed(fused, x):
    model = small(fused=fused)
    expected = [model(x, seed=seed, row_offset=3) for seed in (1, 2, 3)]
    model.compile(backend="aot_eager")
    for seed, values in zip((1, 2, 3), expected, strict=True):
        torch.testing.assert_close(model(x, seed=seed, row_offset=3), values)
        torch.testing.assert_close(model(x, seed=torch.tensor([seed]), row_offset=3), values)
