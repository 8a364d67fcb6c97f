"""The GAN: its losses and penalties against formulas in fp64, its keys, its turns, and what it says when it fails."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import genfast
from genfast import GAN
from genfast.random import Stream, normal, uniform
from genfast.training import EMA
from genfast.training.step import TrainStep

LOSSES = ("non_saturating", "minimax", "hinge", "lsgan", "wgan-gp")
SHAPE = (1, 4, 4)


@pytest.fixture
def x():
    return torch.rand(6, *SHAPE)


class Generator(nn.Sequential):
    def __init__(self, latent=3, pixels=16):
        super().__init__(nn.Linear(latent, 8), nn.Tanh(), nn.Linear(8, pixels), nn.Tanh())


class Discriminator(nn.Sequential):
    """Smooth, so that second derivatives exist everywhere."""

    def __init__(self, pixels=16):
        super().__init__(nn.Flatten(), nn.Linear(pixels, 8), nn.Tanh(), nn.Linear(8, 1))
        with torch.no_grad():
            # Logits of both signs, on both sides of the hinge.
            self[-1].weight.mul_(20)


def small(**options):
    return GAN(Generator(), Discriminator(), latent_dim=3, image_shape=SHAPE, **options)


class ScriptGenerator(nn.Module):
    """netG of PyTorch's DCGAN example."""

    def __init__(self, nz=100, ngf=64, nc=3):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False), nn.BatchNorm2d(ngf * 8), nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 8, ngf * 4, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf * 4), nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf * 2), nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf), nn.ReLU(True),
            nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z):
        return self.main(z)


class ScriptDiscriminator(nn.Module):
    """netD of PyTorch's DCGAN example."""

    def __init__(self, ndf=64, nc=3):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(nc, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(ndf * 2), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1, bias=False), nn.BatchNorm2d(ndf * 4), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 4, ndf * 8, 4, 2, 1, bias=False), nn.BatchNorm2d(ndf * 8), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 8, 1, 4, 1, 0, bias=False), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x):
        return self.main(x).view(-1)


def said(gan, x, seed, salt, row_offset=0):
    """The logits of real images and of those of a turn's latents, and both sets of images."""
    z = normal(seed, len(x), 3, Stream.PRIOR, row_offset, salt).to(gan.dtype)
    fake, real = gan.generator(z).view(-1, *SHAPE), 2 * x.to(gan.dtype) - 1
    return gan.discriminator(real).view(-1), gan.discriminator(fake).view(-1), real, fake


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_their_formulas(loss, x):
    gan = small(loss=loss, penalty=0.0).double()
    p = torch.sigmoid
    for_d = {
        "non_saturating": lambda r, f: -p(r).log() - (1 - p(f)).log(),
        "minimax": lambda r, f: -p(r).log() - (1 - p(f)).log(),
        "hinge": lambda r, f: (1 - r).clamp(min=0) + (1 + f).clamp(min=0),
        "lsgan": lambda r, f: ((r - 1) ** 2 + f**2) / 2,
        "wgan-gp": lambda r, f: f - r,
    }[loss]
    for_g = {
        "non_saturating": lambda f: -p(f).log(),
        "minimax": lambda f: (1 - p(f)).log(),
        "hinge": lambda f: -f,
        "lsgan": lambda f: (f - 1) ** 2 / 2,
        "wgan-gp": lambda f: -f,
    }[loss]
    parts = gan.loss(x, turn="discriminator", seed=5, row_offset=3)
    real, fake, _, _ = said(gan, x, 5, 1, 3)
    assert parts["loss"].dtype == torch.float64
    torch.testing.assert_close(parts["d_loss"], for_d(real, fake).mean())
    torch.testing.assert_close(parts["loss"], parts["d_loss"])
    shown = p if loss in ("non_saturating", "minimax") else lambda logits: logits
    torch.testing.assert_close(parts["d_real"], shown(real).mean())
    torch.testing.assert_close(parts["d_fake"], shown(fake).mean())
    _, fresh, _, _ = said(gan, x, 5, 2, 3)
    learned = gan.loss(x, turn="generator", seed=5, row_offset=3)
    assert learned.keys() == {"loss", "g_loss"}
    torch.testing.assert_close(learned["loss"], for_g(fresh).mean())
    both = gan.loss(x, seed=5, row_offset=3)
    assert not both["loss"].requires_grad
    torch.testing.assert_close(both["d_loss"], parts["d_loss"].detach())
    torch.testing.assert_close(both["g_loss"], for_g(fake).mean().detach())
    torch.testing.assert_close(both["loss"], both["d_loss"] + both["g_loss"])


@pytest.mark.parametrize("loss", ["non_saturating", "minimax"])
def test_a_discriminator_that_says_one_half(loss, x):
    gan = small(loss=loss).double()
    for parameter in gan.discriminator.parameters():
        nn.init.zeros_(parameter)
    parts = gan.loss(x)
    assert -float(parts["d_loss"]) == pytest.approx(-2 * math.log(2), abs=1e-12)
    assert float(parts["d_real"]) == float(parts["d_fake"]) == 0.5
    sign = 1 if loss == "non_saturating" else -1
    assert float(gan.loss(x, turn="generator")["loss"].detach()) == pytest.approx(sign * math.log(2), abs=1e-12)
    assert torch.equal(gan.discriminate(x), torch.full((6,), 0.5, dtype=torch.float64))


def test_logits_far_out_stay_finite(x):
    for loss in ("non_saturating", "minimax"):
        for sign in (1, -1):
            gan = small(loss=loss)
            with torch.no_grad():
                for parameter in gan.discriminator.parameters():
                    parameter.zero_()
                gan.discriminator[-1].bias.fill_(sign * 1e4)
            for turn in ("discriminator", "generator"):
                assert gan.loss(x, turn=turn)["loss"].isfinite()


def test_the_discriminator_comes_to_the_ratio_of_the_densities():
    """Of N(0.5, 1) and N(-0.5, 1) at a pixel in [-1, 1] the logit of p_r / (p_r + p_g) is v."""

    class Shift(nn.Module):
        def forward(self, z):
            return z - 0.5

    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(1, 1))
    gan = GAN(Shift(), discriminator, latent_dim=1, image_shape=(1, 1, 1))
    optimizer = torch.optim.Adam(gan.discriminator.parameters(), lr=0.05)
    for step in range(200):
        x = (normal(step, 256, 1, Stream.PIXEL) + 0.5 + 1) / 2
        optimizer.zero_grad()
        gan.loss(x.view(-1, 1, 1, 1), turn="discriminator", seed=step)["loss"].backward()
        optimizer.step()
    assert discriminator[1].weight.item() == pytest.approx(1, abs=0.1)
    assert discriminator[1].bias.item() == pytest.approx(0, abs=0.1)


def slopes_one_by_one(gan, images):
    """The norm of the gradient of each image's logit, from one backward for each image."""
    norms = []
    for image in images.detach():
        image = image.unsqueeze(0).requires_grad_()
        (slope,) = torch.autograd.grad(gan.discriminator(image).sum(), image, create_graph=True)
        norms.append(slope.flatten().norm())
    return torch.stack(norms)


def gradients(gan, loss):
    return torch.autograd.grad(loss, list(gan.discriminator.parameters()), allow_unused=True)


def test_r1_is_that_of_single_images(x):
    gan = small(r1=3.0, r1_every=4).double()
    parts = gan.loss(x, turn="discriminator_r1", seed=5)
    assert parts.keys() == {"loss", "d_loss", "d_real", "d_fake", "diversity", "covered", "r1"}
    expected = 3.0 / 2 * slopes_one_by_one(gan, 2 * x.double() - 1).square().mean()
    torch.testing.assert_close(parts["r1"], expected)
    plain = gan.loss(x, turn="discriminator", seed=5)
    torch.testing.assert_close(parts["d_loss"], plain["d_loss"])
    torch.testing.assert_close(parts["loss"], plain["loss"] + 4 * expected)
    for got, wanted in zip(gradients(gan, parts["r1"]), gradients(gan, expected), strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_gradient_penalty_is_that_of_single_images(x):
    gan = small(loss="wgan-gp", penalty=7.0).double()
    parts = gan.loss(x, turn="discriminator", seed=5, row_offset=3)
    _, _, real, fake = said(gan, x, 5, 1, 3)
    place = uniform(5, 6, 1, Stream.INTERPOLATE, 3).double().view(-1, 1, 1, 1)
    expected = 7.0 * (slopes_one_by_one(gan, place * real + (1 - place) * fake) - 1).square().mean()
    torch.testing.assert_close(parts["penalty"], expected)
    torch.testing.assert_close(parts["loss"], parts["d_loss"] + expected)
    for got, wanted in zip(gradients(gan, parts["penalty"]), gradients(gan, expected), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_discriminator_that_is_flat_is_penalised_without_nan(x):
    gan = small(loss="wgan-gp")
    for parameter in gan.discriminator.parameters():
        nn.init.zeros_(parameter)
    parts = gan.loss(x, turn="discriminator")
    assert parts["penalty"].item() == pytest.approx(10, rel=1e-4)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients(gan, parts["loss"]))


def test_diversity_is_the_distance_to_the_nearest_neighbour(x):
    gan = small()
    _, _, real, fake = said(gan, x, 5, 1)

    def apart(images):
        rows = images.detach().flatten(1).double()
        return sum(min(float((a - b).norm()) for j, b in enumerate(rows) if j != i) for i, a in enumerate(rows)) / 6

    assert float(gan.loss(x, seed=5)["diversity"]) == pytest.approx(apart(fake) / apart(real), rel=1e-4)
    assert gan.loss(x[:1], seed=5)["diversity"] == 1


@pytest.mark.parametrize("kind", ["plain", "r1", "wgan-gp"])
def test_pieces_of_a_batch_add_up(kind, x):
    options = {"plain": {}, "r1": {"r1": 2.0}, "wgan-gp": {"loss": "wgan-gp"}}[kind]
    gan = GAN(preset="mlp", width=4, image_shape=SHAPE, **options)
    for turn in ("discriminator_r1" if kind == "r1" else "discriminator", "generator"):
        whole = gan.loss(x, turn=turn, seed=2, row_offset=100)["loss"]
        pieces = [gan.loss(x[i : i + 2], turn=turn, seed=2, row_offset=100 + i)["loss"] for i in (0, 2, 4)]
        torch.testing.assert_close(torch.stack(pieces).mean(), whole)
        assert not torch.equal(gan.loss(x, turn=turn, seed=3, row_offset=100)["loss"], whole)
    # Of another seed other latents, and the two turns draw different ones.
    parts = gan.loss(x, seed=2), gan.loss(x, turn="generator", seed=2)
    assert not torch.equal(parts[0]["g_loss"], parts[1]["g_loss"])


def test_uint8_means_x_over_255(x):
    gan, pixels = small(), (x * 255).to(torch.uint8)
    torch.testing.assert_close(gan.loss(pixels, seed=0), gan.loss(pixels / 255, seed=0))
    torch.testing.assert_close(gan.discriminate(pixels[:, 0]), gan.discriminate(pixels / 255))
    torch.testing.assert_close(gan.discriminate(x), torch.sigmoid(gan.discriminate(x.flatten(1), logits=True)))


def test_turns():
    steps = range(8)
    d, g = "discriminator", "generator"
    assert [small().turns(step) for step in steps] == [(d, g)] * 8
    assert [small(r1=1.0, r1_every=3).turns(step)[0] == "discriminator_r1" for step in steps] == [
        True, False, False, True, False, False, True, False
    ]  # fmt: skip
    assert [len(small(n_critic=3).turns(step)) for step in steps] == [1, 1, 2, 1, 1, 2, 1, 1]
    assert [len(small(loss="wgan-gp").turns(step)) for step in range(5)] == [1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    "options", [{}, {"r1": 1.0, "r1_every": 2}, {"loss": "wgan-gp", "n_critic": 2}, {"spectral_norm": True}]
)
def test_each_turn_moves_its_own_network(options, x):
    gan = GAN(width=2, image_shape=(1, 8, 8), latent_dim=4, **options)
    x = torch.rand(6, 1, 8, 8)
    step = TrainStep(gan, gan.make_optimizer(1e-3), ema_decay=0.9)
    for index in range(4):
        before = copy.deepcopy({name: list(net.parameters()) for name, net in gan.named_children()})
        values = step(x, seed=index)
        moved = {
            name: any(not torch.equal(a, b) for a, b in zip(net.parameters(), before[name], strict=True))
            for name, net in gan.named_children()
        }
        assert moved == {"discriminator": True, "generator": "generator" in gan.turns(index)}
        assert ("r1" in values) == (bool(options.get("r1")) and index % 2 == 0)
        assert ("penalty" in values) == ("loss" in options)
    assert all(parameter.requires_grad for parameter in gan.parameters())
    averaged = step.ema.module
    for name, weight in gan.discriminator.named_parameters():
        assert torch.equal(averaged.discriminator.get_parameter(name), weight)
    assert not torch.equal(averaged.generator.main[0].weight, gan.generator.main[0].weight)


def test_a_script_of_its_own_trains(x):
    gan = small()
    of_d = torch.optim.Adam(gan.turn_parameters("discriminator"), lr=0.01)
    of_g = torch.optim.Adam(gan.turn_parameters("generator"), lr=0.01)
    first = gan.loss(x, seed=0)
    for _ in range(20):
        of_d.zero_grad()
        gan.loss(x, turn="discriminator", seed=0)["loss"].backward()
        of_d.step()
    assert all(parameter.grad is None for parameter in gan.generator.parameters())
    assert gan.loss(x, seed=0)["d_loss"] < first["d_loss"]
    fooled = gan.loss(x, turn="generator", seed=0)["loss"]
    for _ in range(20):
        of_g.zero_grad()
        gan.loss(x, turn="generator", seed=0)["loss"].backward()
        of_g.step()
    assert gan.loss(x, turn="generator", seed=0)["loss"] < fooled


def test_keys_and_numbers_are_those_of_the_dcgan_script():
    torch.manual_seed(1)
    their_g, their_d = ScriptGenerator(), ScriptDiscriminator()
    gan = GAN(image_shape=(3, 64, 64))
    assert list(gan.generator.state_dict()) == list(their_g.state_dict())
    assert list(gan.discriminator.state_dict()) == list(their_d.state_dict())
    gan.generator.load_state_dict(their_g.state_dict())
    gan.discriminator.load_state_dict(their_d.state_dict())
    z = torch.randn(2, 100, 1, 1)
    images = their_g(z).detach()
    torch.testing.assert_close(2 * gan(z) - 1, images)
    torch.testing.assert_close(gan.discriminate((images + 1) / 2), their_d.eval()(images))
    for change in (lambda key: key.removeprefix("main."), lambda key: f"module.{key}", lambda key: f"module.{key[5:]}"):
        other = GAN(image_shape=(3, 64, 64))
        g, d = ({change(key): value for key, value in net.state_dict().items()} for net in (their_g, their_d))
        other.load_dcgan({key: value for key, value in g.items() if "num_batches" not in key}, d)
        assert torch.equal(other.generator.main[0].weight, their_g.main[0].weight)
        assert torch.equal(other.generator.main[1].running_var, their_g.main[1].running_var)
        assert torch.equal(other.discriminator.main[8].weight, their_d.main[8].weight)


def test_the_initial_weights_are_those_of_the_script():
    gan = GAN(image_shape=(3, 64, 64))
    weight = gan.generator.main[0].weight
    assert abs(float(weight.mean())) < 1e-3
    assert float(weight.std()) == pytest.approx(0.02, rel=0.02)
    norm = gan.discriminator.main[9]
    assert float(norm.weight.mean()) == pytest.approx(1, abs=0.01)
    assert float(norm.weight.std()) == pytest.approx(0.02, rel=0.15)
    assert not norm.bias.any()


@pytest.mark.parametrize("preset", ["dcgan", "mlp"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 17, 30), (2, 1, 5), (1, 3, 4)])
def test_presets_on_any_size(shape, preset):
    gan = GAN(image_shape=shape, preset=preset, width=2, latent_dim=5)
    x = torch.rand(3, *shape)
    assert gan.sample(3).shape == x.shape
    assert gan.discriminate(x).shape == (3,)
    for turn, network in (("discriminator", gan.discriminator), ("generator", gan.generator)):
        found = torch.autograd.grad(gan.loss(x, turn=turn)["loss"], list(network.parameters()))
        assert all(gradient.abs().sum() > 0 for gradient in found[:1])


def test_sampling_does_not_depend_on_the_batch():
    gan = GAN(width=4)
    gan.loss(torch.rand(8, 1, 28, 28), turn="discriminator")
    before, modes = copy.deepcopy(gan.state_dict()), [module.training for module in gan.modules()]
    whole = gan.sample(64, seed=0)
    assert whole.shape == (64, 1, 28, 28)
    assert 0 <= whole.min() < whole.max() <= 1
    for size in (1, 16):
        pieces = [gan.sample(size, seed=0, row_offset=i) for i in range(0, 64, size)]
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=1e-6)
    assert not torch.allclose(whole, gan.sample(64, seed=1))
    torch.testing.assert_close(gan.state_dict(), before, rtol=0, atol=0)
    assert [module.training for module in gan.modules()] == modes
    codes = gan.latents(64, seed=0)
    assert codes.shape == (64, 100, 1, 1)
    torch.testing.assert_close(gan.eval()(codes), whole)
    torch.testing.assert_close(gan(codes.flatten(1)), whole)
    way = gan.interpolate(codes[:3], codes[3:6], steps=4)
    assert way.shape == (3, 4, 1, 28, 28)
    torch.testing.assert_close(way[:, 0], whole[:3])
    torch.testing.assert_close(way[:, -1], whole[3:6])
    assert gan.sample(0).shape == (0, 1, 28, 28)


@pytest.mark.parametrize("prefix", ["", "main.", "module.main."])
def test_a_scripts_weights_go_behind_spectral_norm(prefix):
    plain, gan = GAN(width=8, batch_norm=False), GAN(width=8, spectral_norm=True)
    saved = {prefix + key.removeprefix("main."): value for key, value in plain.discriminator.state_dict().items()}
    gan.load_dcgan(plain.generator.state_dict(), saved)
    layer = gan.discriminator.main[0]
    assert torch.equal(layer.parametrizations.weight.original, plain.discriminator.main[0].weight)


class Gated(nn.Module):
    """Its last module by name is not the one that it applies last."""

    def __init__(self):
        super().__init__()
        self.layer, self.gate = nn.Linear(16, 1), nn.Sigmoid()

    def forward(self, x):
        return self.layer(self.gate(x.flatten(1)))


def test_a_sigmoid_within_a_network_of_ones_own_is_fine(x):
    gan = GAN(Generator(), Gated(), latent_dim=3, image_shape=SHAPE)
    assert gan.discriminate(x).shape == (6,)


@pytest.mark.parametrize(
    ("discriminator", "reason"),
    [
        (nn.Sequential(nn.BatchNorm1d(16), nn.Flatten(), nn.Linear(16, 1)), "expected 2D or 3D input"),
        (nn.Sequential(nn.Flatten(), nn.GRU(16, 1)), "'tuple' object has no attribute"),
    ],
)
def test_networks_that_fail_in_their_own_way_are_named(discriminator, reason):
    with pytest.raises(ValueError, match=f"discriminator: expected a network that takes .*{reason}"):
        GAN(Generator(), discriminator, latent_dim=3, image_shape=SHAPE)


def test_spectral_norm(x):
    gan = small(spectral_norm=True)
    layers = [module for module in gan.discriminator.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 2
    for _ in range(40):
        gan.loss(x, turn="discriminator")
    for layer in layers:
        assert parametrize.is_parametrized(layer, "weight")
        assert float(torch.linalg.matrix_norm(layer.weight, 2)) == pytest.approx(1, abs=0.01)
    assert not any(parametrize.is_parametrized(module) for module in gan.generator.modules())
    # Those that are normalised already stay as they are.
    GAN(Generator(), gan.discriminator, latent_dim=3, image_shape=SHAPE, spectral_norm=True)
    assert len(layers[0].parametrizations.weight) == 1


def test_batch_norm_of_the_discriminator():
    def has(**options):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gan = GAN(width=2, **options)
        return any(isinstance(module, nn.BatchNorm2d) for module in gan.discriminator.modules())

    assert has()
    assert has(batch_norm=True, spectral_norm=True)
    assert not has(batch_norm=False)
    assert not has(r1=1.0)
    assert not has(loss="wgan-gp")
    assert not has(spectral_norm=True)
    with pytest.warns(UserWarning, match="discriminator: has batch norm"):
        GAN(width=2, r1=1.0, batch_norm=True)


def test_saving(tmp_path):
    gan = GAN(width=2, latent_dim=5, loss="wgan-gp", n_critic=3, spectral_norm=True, image_shape=(1, 8, 8))
    gan.loss(torch.rand(4, 1, 8, 8), turn="generator")
    gan.save_pretrained(tmp_path)
    again = genfast.models.load(tmp_path)
    assert (again.objective, again.n_critic, again.latent_shape) == ("wgan-gp", 3, (5, 1, 1))
    assert torch.equal(again.sample(3, seed=0), gan.sample(3, seed=0))
    own = small(r1=2.0)
    own.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"generator=\.\.\., discriminator=\.\.\."):
        GAN.from_pretrained(tmp_path / "own")
    again = GAN.from_pretrained(tmp_path / "own", generator=Generator(), discriminator=Discriminator())
    assert torch.equal(again.sample(3, seed=0), own.sample(3, seed=0))
    assert again.r1 == 2.0


@pytest.mark.parametrize("options", [{"r1": 1.0}, {"loss": "wgan-gp"}])
def test_compiled(options, x):
    gan = small(**options)
    turns = (*gan.turns(0)[:1], "generator")
    expected = [gan.loss(x, turn=turn, seed=0) for turn in turns]
    keys = list(gan.state_dict())
    gan.compile(backend="eager")
    assert list(gan.state_dict()) == keys
    for turn, parts in zip(turns, expected, strict=True):
        got = gan.loss(x, turn=turn, seed=0)
        torch.testing.assert_close(got, parts)
        got["loss"].backward()


def test_copies_of_a_compiled_model_have_networks_of_their_own():
    gan = small()
    gan.compile(backend="eager")
    for other in (pickle.loads(pickle.dumps(gan)), EMA(gan, 0.9).module):
        torch.testing.assert_close(other.sample(2, seed=0), gan.sample(2, seed=0))
        with torch.no_grad():
            other.generator[0].bias.add_(1)
        assert not torch.equal(other.sample(2, seed=0), gan.sample(2, seed=0))


def test_autocast_keeps_losses_and_penalties_wide(x):
    gan = small(r1=2.0)
    expected = gan.loss(x, turn="discriminator_r1", seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = gan.loss(x, turn="discriminator_r1", seed=0)
        assert gan.loss(x, turn="generator")["loss"].dtype == torch.float32
    assert {value.dtype for value in parts.values()} == {torch.float32}
    assert torch.equal(parts["r1"], expected["r1"])
    torch.testing.assert_close(parts["loss"], expected["loss"], rtol=0.02, atol=0)


class Logits(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape, self.layer = shape, nn.Linear(16, 1)

    def forward(self, x):
        return self.layer(x.flatten(1)).reshape(len(x), *self.shape)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_own_networks(shape, x):
    generator = nn.Sequential(nn.ConvTranspose2d(7, 1, 4), nn.BatchNorm2d(1), nn.Tanh())
    before = copy.deepcopy(generator.state_dict())
    gan = GAN(generator, Logits(shape), latent_dim=7, image_shape=SHAPE)
    torch.testing.assert_close(generator.state_dict(), before, rtol=0, atol=0)
    assert generator.training
    assert gan.latent_shape == (7, 1, 1)
    assert gan.loss(x, turn="discriminator")["loss"].dim() == 0
    assert gan.discriminate(x).shape == (6,)
    flattening = nn.Sequential(nn.Flatten(), Generator(6))
    assert GAN(flattening, Logits(()), latent_shape=(2, 3), image_shape=SHAPE).latents(5).shape == (5, 2, 3)


def own(generator=None, discriminator=None):
    return GAN(generator or Generator(), discriminator or Discriminator(), latent_dim=3, image_shape=SHAPE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GAN(loss="wasserstein"), "loss: expected one of 'non_saturating', 'minimax', .*, got 'wasserstein'"),
        (lambda: GAN(preset="unet"), "preset: expected one of 'dcgan', 'mlp', got 'unet'"),
        (lambda: GAN(image_shape=(28, 28)), "image_shape: expected 3 positive ints"),
        (lambda: GAN(latent_dim=0), "latent_dim: expected positive ints"),
        (lambda: GAN(width=0), "width: expected positive ints"),
        (lambda: GAN(n_critic=0), "n_critic: expected positive ints"),
        (lambda: GAN(r1_every=0), "r1_every: expected positive ints"),
        (lambda: GAN(r1=-1.0), "r1: expected a finite number >= 0, got -1.0"),
        (lambda: GAN(penalty=math.nan), "penalty: expected a finite number >= 0, got nan"),
        (lambda: GAN(latent_shape=(3,)), "latent_shape: expected None without an own generator"),
        (
            lambda: own(generator=Generator(pixels=25)),
            r"generator: expected images of shape \[2, 1, 4, 4\], which the discriminator takes, .* got \[2, 25\]",
        ),
        (
            lambda: own(discriminator=Discriminator(25)),
            r"discriminator: .* the generator's images, \[2, 1, 4, 4\], got: ",
        ),
        (lambda: own(generator=Generator(9)), r"generator: expected a network that takes codes \[2, 3\], got: .*mat1"),
        (
            lambda: own(discriminator=nn.Conv2d(1, 1, 2)),
            r"discriminator: expected logits of shape \[B\].* of images \[2, 1, 4, 4\], such as .*, got \[2, 1, 3, 3\]",
        ),
        (
            lambda: own(discriminator=nn.Sequential(Discriminator(), nn.Sigmoid())),
            "discriminator: expected logits, got",
        ),
        (lambda: own(generator=nn.Sequential(Generator(), nn.Sigmoid())), r"generator: expected images in \[-1, 1\]"),
    ],
)
def test_constructor_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda gan, x: gan.loss(x[..., 1:]),
            r"x: expected images of shape \[B, 1, 4, 4\] or \[B, 16\].*got \[6, 1, 4, 3",
        ),
        (lambda gan, x: gan.discriminate(x.long()), "x: expected floats in .* or uint8, got torch.int64"),
        (lambda gan, x: gan.loss(x, turn="both"), "turn: expected one of None, 'discriminator', .*, got 'both'"),
        (lambda gan, x: gan.turn_parameters("both"), "turn: expected one of 'discriminator'"),
        (lambda gan, x: gan(torch.zeros(2, 4)), r"z: expected codes of shape \[B, 3\], got \[2, 4\]"),
        (lambda gan, x: gan.interpolate(x, x, steps=1), "steps: expected an int of at least 2, got 1"),
        (lambda gan, x: gan.interpolate(x, x[:2]), "z1: expected the shape of z0"),
        (lambda gan, x: gan.load_dcgan({"0.weight": x}), "generator: expected the state_dict .* 0.bias is missing"),
        (
            lambda gan, x: gan.load_dcgan(gan.generator.state_dict(), {**gan.discriminator.state_dict(), "1.bias": x}),
            r"discriminator: .* 1.bias has shape \[6, 1, 4, 4\] instead of \[8\]",
        ),
    ],
)
def test_call_refusals(call, message, x):
    with pytest.raises(ValueError, match=message):
        call(small(), x)


class OneImage(nn.Module):
    """A generator that has collapsed."""

    def __init__(self):
        super().__init__()
        self.image = nn.Parameter(torch.zeros(16))

    def forward(self, z):
        return torch.tanh(self.image + 0.01 * z.mean(1, keepdim=True)).view(-1, *SHAPE)


def test_collapse_is_said_in_training(capsys, monkeypatch):
    monkeypatch.setattr("genfast.models.gan._EARLY", 5)
    images = torch.randint(256, (64, *SHAPE), dtype=torch.uint8)
    gan = GAN(OneImage(), Discriminator(), latent_dim=3, image_shape=SHAPE)
    history = genfast.fit(gan, images, epochs=2, batch_size=16, test_data=images[:16], seed=0)
    # The first four steps are too early to tell.
    assert "warning" not in history[0]
    assert history[1]["warning"].startswith("collapse: generated images are alike: 0.0")
    assert "epoch 2: collapse: generated images are alike" in capsys.readouterr().out


class Digits(nn.Module):
    """A generator that has learned some digits by heart: a code's first number says which image it draws."""

    def __init__(self, images):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.images = 2 * images.float() / 255 - 1

    def forward(self, z):
        return self.scale * self.images[(torch.special.ndtr(z[:, 0]) * len(self.images)).long()]


@pytest.mark.parametrize(
    ("digits", "warns"),
    [(range(10), False), ([8], True), ([1], True), ([7], True), ([3, 8], True), ([0, 1, 2, 3, 5, 6, 7, 8, 9], False)],
)
def test_a_generator_that_leaves_out_most_kinds_of_images_is_told(digits, warns, monkeypatch):
    monkeypatch.setattr("genfast.models.gan._EARLY", 0)
    data = genfast.training.load_dataset("digits")
    known = torch.isin(data.train_labels, torch.tensor(list(digits)))
    gan = GAN(Digits(data.train[known]), nn.Sequential(nn.Flatten(), nn.Linear(784, 1)), latent_dim=2)
    history = genfast.fit(gan, data.test, epochs=1, batch_size=100, seed=0, progress=False)
    warning = history[-1].get("warning", "")
    assert warning.startswith("collapse: kinds of images are left out") == warns
    assert history[-1]["diversity"] > 0.3
    assert not warns or history[-1]["covered"] < 0.6
    assert warns or history[-1]["covered"] == pytest.approx(0.85, abs=0.07)


def test_covered_is_the_share_of_balls_that_are_hit(x):
    gan = small().double()
    _, _, real, fake = said(gan, x, 5, 1)
    real, fake = real.flatten(1), fake.flatten(1)
    hit = 0
    for i, image in enumerate(real):
        radius = sorted(float((image - other).norm()) for j, other in enumerate(real) if j != i)[2]
        hit += min(float((image - other).norm()) for other in fake) <= radius
    assert float(gan.loss(x, seed=5)["covered"]) == hit / len(real)


def test_images_that_are_all_the_same_leave_diversity_finite():
    parts = small().loss(torch.zeros(6, *SHAPE), seed=5)
    assert float(parts["diversity"]) == 10.0
    assert bool(torch.isfinite(torch.stack(list(parts.values()))).all())


def test_a_discriminator_that_is_certain_is_said():
    certain = {"diversity": 0.9, "d_real": 0.9999, "d_fake": 0.0004}
    assert "collapse: the discriminator is certain" in small().diagnose(certain)
    assert small().diagnose({**certain, "d_fake": 0.05}) is None
    assert small().diagnose({"loss": 1.0}) is None
    assert small().diagnose(certain, steps=999) is None
    assert "collapse" in small().diagnose(certain, steps=1000)
    assert small().diagnose({"diversity": 0.9, "covered": 0.59}) is not None
    assert small().diagnose({"diversity": 0.9, "covered": 0.61}) is None
    # Outputs, not probabilities.
    assert small(loss="wgan-gp").diagnose({"diversity": 0.9, "d_real": 2.0, "d_fake": -3.0}) is None
