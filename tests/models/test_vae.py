"""The VAE: a drop-in for the tutorials' class, whose numbers are checked against truth known by other means."""

import math

import pytest
import torch
from torch import nn

from genfast import VAE
from genfast.functional import reparameterize_kl
from genfast.random import Stream, normal
from tests.models.vae_tutorial import TutorialVAE, blobs, loss_function, train


@pytest.fixture
def x():
    return blobs(8)


@pytest.fixture
def one_thread():
    """For long runs of small steps: threads that wait for each other on a busy machine make them 60 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gradients(model, parts):
    return torch.autograd.grad(parts["loss"], list(model.parameters()))


class SpatialEncoder(nn.Conv2d):
    """Images [B, 3, 16, 16] to packed moments [B, 8, 4, 4]."""

    def __init__(self):
        super().__init__(3, 8, 4, stride=4)


class SpatialDecoder(nn.ConvTranspose2d):
    """Codes [B, 4, 4, 4] to images [B, 3, 16, 16]."""

    def __init__(self):
        super().__init__(4, 3, 4, stride=4)


def spatial_vae(**options):
    return VAE(image_shape=(3, 16, 16), encoder=SpatialEncoder(), decoder=SpatialDecoder(), **options)


def test_is_the_tutorial_vae():
    torch.manual_seed(0)
    theirs = TutorialVAE()
    torch.manual_seed(0)
    ours = VAE()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    ours.load_state_dict(theirs.state_dict())


def test_unchanged_script_gives_the_same_losses(one_thread):
    data = blobs(640)
    runs = range(6)
    theirs = torch.tensor([train(TutorialVAE, data, epochs=6, seed=run)[1] for run in runs])
    fused = torch.tensor([train(VAE, data, epochs=6, seed=run)[1] for run in runs])
    ordinary = torch.tensor(train(lambda: VAE(fused=False), data, epochs=6, seed=runs[0])[1])
    assert torch.equal(ordinary, theirs[0])
    assert (theirs[:, -1] < 0.45 * theirs[:, 0]).all()
    # The noise is another, so the losses agree on average. Between two runs of one initialization the three stretches
    # differ by 0.17 %, 0.44 % and 2.7 % (standard deviation of 24): the tolerances are four standard errors of 6.
    for stretch, rtol in ((slice(0, 5), 0.003), (slice(20, 30), 0.0075), (slice(50, 60), 0.045)):
        torch.testing.assert_close(fused[:, stretch].mean(), theirs[:, stretch].mean(), rtol=rtol, atol=0)


def test_methods_of_the_script(x):
    model = VAE()
    mu, logvar = model.encode(x.view(-1, 784))
    z = model.reparameterize(mu, logvar)
    recon = model.decode(z)
    assert (mu.shape, logvar.shape, z.shape, recon.shape) == ((8, 20), (8, 20), (8, 20), (8, 784))
    assert 0 <= recon.min() <= recon.max() <= 1
    torch.manual_seed(3)
    a = model(x)
    torch.manual_seed(3)
    b = model(x.view(-1, 784))
    assert all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        VAE,
        lambda **o: VAE(hidden_dims=(50, 30), **o),
        lambda **o: VAE(hidden_dims=(), likelihood="gaussian", **o),
        lambda **o: VAE(preset="conv", hidden_dims=(4, 8), **o),
    ],
    ids=["default", "deep", "linear-gaussian", "conv"],
)
def test_fused_equals_the_ordinary_chain(make, x):
    fused, ordinary = make(), make(fused=False)
    ordinary.load_state_dict(fused.state_dict())
    options = {"seed": 5, "row_offset": 3, "beta": 2.0, "free_bits": 0.01}
    a, b = fused.loss(x, **options), ordinary.loss(x, **options)
    assert a.keys() == b.keys() == {"loss", "nll", "kl"}
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-5)
    for left, right in zip(gradients(fused, a), gradients(ordinary, b), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(fused.elbo(x, seed=5), ordinary.elbo(x, seed=5))


def test_fused_agrees_with_the_ordinary_chain_in_distribution(x):
    torch.manual_seed(0)
    model = VAE()
    with torch.no_grad():
        rows = x[:1].expand(4000, -1, -1, -1)
        fused = model.elbo(rows)
        model.fused = False
        ordinary = model.elbo(rows)
    error = math.sqrt((fused.var() + ordinary.var()) / 4000)
    assert abs(fused.mean() - ordinary.mean()) < 4 * error
    assert fused.std().item() == pytest.approx(ordinary.std().item(), rel=0.06)


def test_loss_is_the_script_loss_per_image(x):
    model = VAE()
    parts = model.loss(x, seed=4)
    mu, logvar = model.encode(x)
    z = mu + torch.exp(0.5 * logvar) * normal(4, 8, 20, Stream.LATENT)
    torch.testing.assert_close(parts["loss"], loss_function(model.decode(z), x, mu, logvar) / 8)
    torch.testing.assert_close(parts["loss"], -model.elbo(x, seed=4).mean())
    weighted = model.loss(x, seed=4, beta=3.0)
    torch.testing.assert_close(weighted["loss"], parts["nll"] + 3 * parts["kl"])
    assert model.loss(x, seed=4, free_bits=0.5)["kl"] >= 0.5 * 20


def test_seed_and_torch_generator_decide_the_noise(x):
    model = VAE()
    torch.manual_seed(1)
    first, second = model.loss(x)["loss"], model.loss(x)["loss"]
    torch.manual_seed(1)
    assert torch.equal(model.loss(x)["loss"], first)
    assert not torch.equal(first, second)
    assert torch.equal(model.loss(x, seed=9)["loss"], model.loss(x, seed=torch.tensor([9]))["loss"])


@pytest.mark.parametrize("fused", [True, False])
def test_pieces_of_a_batch_add_up(fused, x):
    model = VAE(fused=fused)
    whole = model.loss(x, seed=2, row_offset=100)["loss"]
    pieces = [model.loss(x[i : i + 2], seed=2, row_offset=100 + i)["loss"] for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(pieces).mean(), whole)
    elbo = torch.cat([model.elbo(x[i : i + 1], seed=2, row_offset=i) for i in range(8)])
    torch.testing.assert_close(elbo, model.elbo(x, seed=2))
    assert not torch.allclose(model.elbo(x, seed=2, row_offset=1), elbo)


@pytest.mark.parametrize("mode", ["mean", "bernoulli"])
def test_sampling_does_not_depend_on_the_batch(mode):
    model = VAE()
    whole = model.sample(64, mode=mode, seed=0)
    assert whole.shape == (64, 1, 28, 28)
    for size in (1, 8):
        pieces = [model.sample(size, mode=mode, seed=0, row_offset=i) for i in range(0, 64, size)]
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=1e-6)
    assert not torch.allclose(whole, model.sample(64, mode=mode, seed=1))
    assert mode == "mean" or set(whole.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(whole[0], whole[1])


def test_bernoulli_samples_follow_the_means():
    model = VAE(latent_dim=1, hidden_dims=())
    nn.init.zeros_(model.fc4.weight)
    pixels = model.sample(4000, mode="bernoulli", seed=0).mean(0).flatten()
    means = model.sample(1, seed=0).flatten()
    assert ((pixels - means).abs() < 5 * torch.sqrt(means * (1 - means) / 4000)).all()


def test_uint8_means_x_over_255(x):
    pixels = (x * 255).to(torch.uint8)
    for options in ({}, {"fused": False}, {"likelihood": "gaussian"}, {"preset": "conv"}):
        model = VAE(**options)
        torch.testing.assert_close(model.loss(pixels, seed=0)["loss"], model.loss(pixels / 255, seed=0)["loss"])
        torch.testing.assert_close(model.reconstruct(pixels[:, 0]), model.reconstruct(pixels / 255))


def test_pictures(x):
    model = VAE(latent_dim=2)
    mean = model.decode(model.encode(x)[0]).view(-1, 1, 28, 28)
    assert torch.equal(model.reconstruct(x), mean)
    line = model.interpolate(x[:3], x[3:6], steps=4)
    assert line.shape == (3, 4, 1, 28, 28)
    torch.testing.assert_close(line[:, 0], model.reconstruct(x[:3]))
    torch.testing.assert_close(line[:, -1], model.reconstruct(x[3:6]))
    grid = model.manifold(n=3, extent=2.0)
    assert grid.shape == (3, 3, 1, 28, 28)
    top_left, bottom_right = torch.tensor([[-2.0, 2.0]]), torch.tensor([[2.0, -2.0]])
    torch.testing.assert_close(grid[0, 0].view(1, -1), model.decode(top_left))
    torch.testing.assert_close(grid[2, 2].view(1, -1), model.decode(bottom_right))
    torch.testing.assert_close(grid[0, 1].view(1, -1), model.decode(torch.tensor([[0.0, 2.0]])))
    assert not line.requires_grad
    assert not grid.requires_grad


def test_own_networks_with_spatial_latents():
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    fused, ordinary = spatial_vae(), spatial_vae(fused=False)
    ordinary.load_state_dict(fused.state_dict())
    assert fused.latent_shape == (4, 4, 4)
    recon, mu, logvar = fused(x)
    assert (recon.shape, mu.shape, logvar.shape) == ((5, 3, 16, 16), (5, 4, 4, 4), (5, 4, 4, 4))
    a, b = fused.loss(x, seed=1), ordinary.loss(x, seed=1)
    torch.testing.assert_close(a, b)
    for left, right in zip(gradients(fused, a), gradients(ordinary, b), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=2e-5)
    assert fused.sample(2, seed=0).shape == (2, 3, 16, 16)
    assert fused.interpolate(x, x.flip(0), steps=3).shape == (5, 3, 3, 16, 16)
    one, other = fused.log_prob(x, k=6, seed=0), fused.log_prob(x, k=6, seed=0, chunk=4)
    torch.testing.assert_close(one, other)


def test_asking_an_own_encoder_for_its_shape_leaves_it_alone():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8))
    model = VAE(latent_dim=4, encoder=encoder)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.sample(3)
    assert model.training
    assert encoder[2].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 17, 30), (2, 1, 5)])
def test_conv_preset_on_any_size(image_shape):
    model = VAE(latent_dim=3, preset="conv", hidden_dims=(4, 6, 8), image_shape=image_shape)
    x = torch.rand(2, *image_shape)
    recon, mu, _ = model(x)
    assert recon.shape == x.shape
    assert mu.shape == (2, 3)
    assert all(gradient.abs().sum() > 0 for gradient in gradients(model, model.loss(x)))


@pytest.mark.parametrize("sigma", [None, 0.3])
def test_gaussian_likelihood_is_that_of_torch_distributions(sigma, x):
    model = VAE(likelihood="gaussian", sigma=sigma)
    if sigma is None:
        assert "log_sigma" in model.state_dict()
        nn.init.constant_(model.log_sigma, -0.7)
    mu, logvar = model.encode(x)
    z, _ = reparameterize_kl(mu, logvar, seed=6)
    pixels = torch.distributions.Normal(model.decode(z), math.exp(-0.7) if sigma is None else sigma)
    nll = -pixels.log_prob(x.view(8, -1)).sum(1)
    torch.testing.assert_close(model.loss(x, seed=6)["nll"], nll.mean())
    if sigma is None:
        model.loss(x, seed=6)["nll"].backward()
        # d nll / d log sigma = pixels - sum of squared standardised errors.
        squares = ((x.view(8, -1) - pixels.mean) / pixels.stddev).square().sum(1)
        torch.testing.assert_close(model.log_sigma.grad, (784 - squares).mean(), rtol=1e-4, atol=1e-3)


def linear_gaussian(offset=0.0, widen=0.0):
    """A linear decoder with orthogonal columns: p(x) and the posterior are Gaussians in closed form.

    The encoder is that posterior, but for `offset` on its mean and `widen` on its log-variance.
    """
    sigma, bias = 0.5, torch.tensor([0.2, -0.1, 0.4, 0.3])
    weight = torch.tensor([[1.0, 0.5], [1.0, -0.5], [-1.0, 0.5], [1.0, 0.5]]) * 0.625
    assert (weight.T @ weight).fill_diagonal_(0).abs().max() == 0
    decoder, encoder = nn.Linear(2, 4), nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    precision = 1 + weight.square().sum(0) / sigma**2
    project = weight.T / sigma**2 / precision.unsqueeze(1)
    with torch.no_grad():
        decoder.weight.copy_(weight)
        decoder.bias.copy_(bias)
        encoder[1].weight.copy_(torch.cat([project, torch.zeros(2, 4)]))
        encoder[1].bias.copy_(torch.cat([offset - project @ bias, widen - precision.log()]))
    truth = torch.distributions.MultivariateNormal(bias, weight @ weight.T + sigma**2 * torch.eye(4))
    model = VAE(image_shape=(1, 2, 2), likelihood="gaussian", sigma=sigma, encoder=encoder, decoder=decoder)
    return model, truth


def test_log_prob_of_a_linear_gaussian_model():
    x = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    model, truth = linear_gaussian()
    # With the exact posterior every importance weight is p(x) itself, and the bound is tight on average.
    torch.testing.assert_close(model.log_prob(x, k=3, seed=0), truth.log_prob(x), rtol=1e-5, atol=1e-5)
    many = model.elbo(x[:1].expand(20000, -1), seed=0)
    assert many.mean().item() == pytest.approx(truth.log_prob(x[0]).item(), abs=5 * many.std().item() / 20000**0.5)

    loose, _ = linear_gaussian(offset=0.3, widen=0.5)
    importance = loose.log_prob(x, k=20000, seed=0)
    torch.testing.assert_close(importance, truth.log_prob(x), rtol=0, atol=0.03)
    torch.testing.assert_close(loose.log_prob(x, k=20000, method="prior", seed=0), truth.log_prob(x), rtol=0, atol=0.05)
    bound = torch.stack([loose.elbo(x, seed=s) for s in range(200)]).mean(0)
    assert (importance > bound + 0.1).all()


def test_log_prob_of_a_bernoulli_model_by_quadrature():
    torch.manual_seed(0)
    model = VAE(latent_dim=1, hidden_dims=(16,), image_shape=(1, 3, 3))
    with torch.no_grad():
        model.fc4.weight.mul_(8)
    x = torch.rand(5, 9).round()
    z = torch.linspace(-8, 8, 4001).unsqueeze(1)
    with torch.no_grad():
        pixels = torch.distributions.Bernoulli(model.decode(z).double().unsqueeze(0))
    log_joint = pixels.log_prob(x.double().unsqueeze(1)).sum(2) - 0.5 * z.double().T**2 - 0.5 * math.log(2 * math.pi)
    truth = torch.logsumexp(log_joint, 1) + math.log(16 / 4000)
    for method in ("importance", "prior"):
        estimate = model.log_prob(x, k=20000, method=method, seed=0).double()
        torch.testing.assert_close(estimate, truth, rtol=0, atol=0.02)
    assert (model.log_prob(x, k=1000, seed=0) > model.elbo(x, seed=0) - 1e-3).float().mean() > 0.5
    averaged = torch.stack([model.elbo(x, seed=s) for s in range(100)]).mean(0)
    assert (model.log_prob(x, k=1000, seed=0) >= averaged).all()


@pytest.mark.parametrize("method", ["importance", "prior"])
def test_log_prob_depends_on_neither_chunk_nor_batch(method, x):
    torch.manual_seed(0)
    model, x = VAE(), x.round()
    whole = model.log_prob(x, k=50, method=method, seed=1, row_offset=10)
    assert whole.dtype == torch.float32
    assert whole.shape == (8,)
    for chunk in (1, 3, 20, 1000):
        torch.testing.assert_close(model.log_prob(x, k=50, method=method, seed=1, row_offset=10, chunk=chunk), whole)
    pieces = [model.log_prob(x[i : i + 2], k=50, method=method, seed=1, row_offset=10 + i) for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.cat(pieces), whole)
    assert not torch.allclose(model.log_prob(x, k=50, method=method, seed=2), whole)


def test_log_prob_decodes_no_more_than_chunk_codes(x):
    model = VAE()
    rows = []
    model.fc4.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    model.log_prob(x, k=40, chunk=30)
    assert max(rows) <= 30
    assert sum(rows) == 40 * 8


def test_autocast(x):
    for model in (VAE(), VAE(preset="conv"), VAE(likelihood="gaussian"), VAE(fused=False)):
        full = model.loss(x, seed=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parts = model.loss(x, seed=0)
            assert model(x)[1].dtype == torch.bfloat16
            images, log_prob = model.sample(2, seed=0), model.log_prob(x, k=4, seed=0)
        assert all(value.dtype == torch.float32 for value in parts.values())
        torch.testing.assert_close(parts["loss"], full["loss"], rtol=0.01, atol=0)
        assert torch.isfinite(images.float()).all()
        assert torch.isfinite(log_prob).all()
        parts["loss"].backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_half_and_double_models(x):
    model = VAE().bfloat16()
    assert model.loss(x)["loss"].dtype == torch.float32
    assert model.sample(2).dtype == torch.bfloat16
    model = VAE().double()
    assert model.reconstruct(x).dtype == torch.float64
    assert torch.isfinite(model.log_prob(x, k=3)).all()


def test_empty_batch():
    model = VAE()
    assert model.sample(0).shape == (0, 1, 28, 28)
    assert model.elbo(torch.rand(0, 784)).shape == (0,)
    assert model.log_prob(torch.rand(0, 784), k=3).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 0}, "latent_dim: expected positive ints"),
        ({"hidden_dims": (400, -1)}, "hidden_dims: expected positive ints"),
        ({"image_shape": (28, 28)}, "image_shape: expected 3 positive ints"),
        ({"likelihood": "poisson"}, "likelihood: expected one of 'bernoulli', 'gaussian', got 'poisson'"),
        ({"preset": "unet"}, "preset: expected one of 'mlp', 'conv', got 'unet'"),
        ({"preset": "conv", "hidden_dims": ()}, "hidden_dims: expected at least one"),
        ({"sigma": 0.1}, "sigma: expected None, or a positive float with likelihood='gaussian', got 0.1"),
        ({"sigma": -1.0, "likelihood": "gaussian"}, "sigma: expected"),
    ],
)
def test_constructor_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        VAE(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.loss(x[..., 1:]), r"x: expected images of shape \[B, 1, 28, 28\] or \[B, 784\].*got \[8,"),
        (lambda m, x: m.loss(x.expand(-1, 3, -1, -1)), r"x: expected images of shape .*, got \[8, 3, 28, 28\]"),
        (lambda m, x: m(x[0, 0, 0]), r"x: expected images of shape .*, got \[28\]"),
        (lambda m, x: m.loss(x.long()), "x: expected floats in .*, uint8 or bool, got torch.int64"),
        (lambda m, x: m.decode(torch.zeros(2, 19)), r"z: expected shape \[B, 20\], got \[2, 19\]"),
        (lambda m, x: m.sample(2, mode="mode"), "mode: expected one of 'mean', 'bernoulli', got 'mode'"),
        (lambda m, x: m.log_prob(x, k=0), "k: expected at least 1, got 0"),
        (lambda m, x: m.log_prob(x, chunk=0), "chunk: expected at least 1, got 0"),
        (lambda m, x: m.log_prob(x, method="ais"), "method: expected one of 'importance', 'prior', got 'ais'"),
        (lambda m, x: m.interpolate(x, x[:2]), "x1: expected as many images as x0, 8, got 2"),
        (lambda m, x: m.interpolate(x, x, steps=1), "steps: expected at least 2, got 1"),
        (lambda m, x: m.manifold(), r"manifold: expected a model of latent_dim 2, got latent shape \[20\]"),
    ],
)
def test_call_refusals(call, message, x):
    with pytest.raises(ValueError, match=message):
        call(VAE(), x)


def test_own_network_refusals(x):
    with pytest.raises(ValueError, match=r"encoder: expected mu and logvar .* of shape \[B, 40\], .* got \[8, 41\]"):
        VAE(encoder=nn.Sequential(nn.Flatten(), nn.Linear(784, 41))).loss(x)
    odd = VAE(encoder=nn.Conv2d(1, 3, 4, stride=4), decoder=nn.ConvTranspose2d(1, 1, 4, stride=4))
    with pytest.raises(ValueError, match=r"encoder: expected mu and logvar .* of shape \[B, 2 L, ...\], .* got \[1, 3"):
        odd.sample(2)
    with pytest.raises(ValueError, match=r"decoder: expected images of shape \[B, 1, 28, 28\], got \[8, 10\]"):
        VAE(decoder=nn.Linear(20, 10)).loss(x)
    with pytest.raises(ValueError, match="mode: expected 'mean' for a gaussian likelihood"):
        VAE(likelihood="gaussian").sample(2, mode="bernoulli")


@pytest.mark.parametrize("fused", [True, False])
def test_forward_draws_the_noise_of_its_own_rows(fused, x):
    model = VAE(fused=fused)
    recon, mu, logvar = model(x, seed=5)
    pieces = [model(x[i : i + 2], seed=5, row_offset=i)[0] for i in range(0, len(x), 2)]
    torch.testing.assert_close(torch.cat(pieces), recon)
    z = model.reparameterize(mu, logvar, seed=5)
    torch.testing.assert_close(z, mu + normal(torch.tensor([5]), *mu.shape, Stream.LATENT) * torch.exp(0.5 * logvar))
    nll = nn.functional.binary_cross_entropy(recon, x.flatten(1), reduction="sum") / len(x)
    torch.testing.assert_close(model.loss(x, seed=5)["nll"], nll)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": math.nan}, "beta: expected a finite number, got nan"),
        ({"beta": -math.inf}, "beta"),
        ({"free_bits": -0.5}, "free_bits: expected a finite number >= 0, got -0.5"),
        ({"free_bits": math.nan}, "free_bits"),
    ],
)
def test_weights_out_of_range_are_refused(options, message, fused, x):
    with pytest.raises(ValueError, match=message):
        VAE(fused=fused).loss(x, **options)


@pytest.mark.parametrize("call", ["sample", "reconstruct", "interpolate", "manifold", "log_prob"])
def test_looking_at_a_model_in_training_is_looking_in_eval_mode(call):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4))
    decoder = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16).eval(), nn.BatchNorm1d(16), nn.Unflatten(1, (1, 4, 4)))
    model = VAE(2, image_shape=(1, 4, 4), encoder=encoder, decoder=decoder)
    x = torch.rand(6, 1, 4, 4)
    look = {
        "sample": lambda: model.sample(6, seed=0),
        "reconstruct": lambda: model.reconstruct(x),
        "interpolate": lambda: model.interpolate(x, x.flip(0)),
        "manifold": lambda: model.manifold(4),
        "log_prob": lambda: model.log_prob(x, k=5, seed=0),
    }[call]
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen = look()
    assert not seen.requires_grad
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model.eval()
    torch.testing.assert_close(look(), seen, rtol=0, atol=0)


@pytest.mark.parametrize("own", [False, True])
def test_log_prob_bounds_the_largest_tensor_of_its_networks(own):
    model = VAE(preset="conv", encoder=nn.Sequential(nn.Flatten(), nn.Linear(784, 40)) if own else None)
    largest = 0

    def see(module, inputs, output):
        nonlocal largest
        largest = max(largest, output.numel())

    for module in model.decoder.modules():
        module.register_forward_hook(see)
    model.log_prob(torch.rand(2, 1, 28, 28).round(), k=400)
    assert 2**20 < largest <= 2**22


def test_bool_images_are_zeros_and_ones(x):
    for fused in (True, False):
        model = VAE(fused=fused)
        torch.testing.assert_close(model.loss(x > 0.5, seed=0), model.loss((x > 0.5).float(), seed=0))
    with pytest.raises(ValueError, match=r"x: expected floats in \[0, 1\] or uint8, got torch.bool"):
        VAE(likelihood="gaussian").loss(x > 0.5)


@pytest.mark.parametrize("options", [{"hidden_dims": 400}, {"image_shape": 28}])
def test_sizes_that_are_no_sequence(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected .*positive ints, got"):
        VAE(**options)
