"""Dequantize, Logit and VariationalDequantize: densities, round trips, what Flow makes of them, and bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from genfast import random
from genfast.flows import (
    ActNorm,
    ConditionalFlow,
    Coupling,
    Dequantize,
    Logit,
    Squeeze,
    Transform,
    VariationalDequantize,
)
from genfast.flows.dequantize import DequantizeLogit
from genfast.models.flow import Flow
from genfast.random import Stream
from tests.flows.networks import assert_is_a_transform, conv, jacobian_logdet, mlp


def _pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _conditional(dtype: torch.dtype = torch.float32, context: bool = False) -> ConditionalFlow:
    """Of images with one channel: couplings of both halves of a checkerboard, then a norm."""
    seen = 3 if context else 1
    couplings = [Coupling(conv(1 + 2 * seen, 2, dtype=dtype), "checkerboard", swap) for swap in (False, True)]
    return ConditionalFlow([*couplings, ActNorm(1).to(dtype)], conv(1, seen, dtype=dtype) if context else None)


class _Affine(nn.Module):
    """h = m + s noise, both of the image: a density that is known."""

    def forward(self, noise: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        scale = 1.8 + 0.2 * image
        return image + scale * noise, scale.log().flatten(1).sum(1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64], ids=str)
def test_dequantize_there_and_back(dtype):
    x = torch.arange(256, dtype=torch.uint8).repeat(8).reshape(4, 2, 16, 16)
    given = x if dtype == torch.uint8 else x.to(dtype) / 255
    v, logdet = Dequantize()(given, seed=5, row_offset=2)
    u = random.uniform(5, 4, 512, Stream.DEQUANTIZE, 2, bits=15).reshape(x.shape)
    assert v.dtype == logdet.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(v.double(), (x + u.double()) / 256)
    torch.testing.assert_close(logdet, torch.full((4,), -512 * math.log(256)).to(logdet.dtype))
    assert torch.equal(Dequantize().inverse(v), x)


def test_without_noise_each_pixel_is_in_the_middle_of_its_bin():
    x = _pixels(3, 1, 2, 2)
    dequantize = Dequantize(centred=True)
    for seed in (0, 1):
        v, logdet = dequantize(x, seed=seed)
        assert torch.equal(256 * v, x + 0.5)
    torch.testing.assert_close(logdet, torch.full((3,), -4 * math.log(256)))
    assert torch.equal(dequantize.inverse(v), x)


def test_samples_beyond_the_pixels_are_clamped():
    v = torch.tensor([[-0.1, 0.0, 0.999999, 1.0, 7.0, float("inf"), float("nan")]])
    assert Dequantize().inverse(v).tolist() == [[0, 0, 255, 255, 255, 255, 0]]


@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_logit_is_a_transform(alpha):
    assert_is_a_transform(Logit(alpha), torch.rand(3, 2, 2, dtype=torch.float64))


def test_logit_keeps_its_digits_at_both_ends():
    v = torch.tensor([[2.0**-24], [1 - 2.0**-24]])
    y, logdet = Logit(1e-6)(v)
    exact, exact_logdet = Logit(1e-6)(v.double())
    torch.testing.assert_close(y.double(), exact, rtol=2e-7, atol=0.0)
    torch.testing.assert_close(logdet.double(), exact_logdet, rtol=2e-7, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["uniform", "variational", "none"])
def test_one_op_for_both_is_the_two(kind, dtype):
    """What `Flow` runs for a dequantization and a logit: same noise, same densities, same gradients."""
    learned = kind == "variational"
    first = VariationalDequantize(_conditional(dtype)) if learned else Dequantize(centred=kind == "none")
    x = _pixels(3, 1, 6, 6) if dtype == torch.float32 else _pixels(3, 1, 6, 6).double() / 255
    flow = Flow([first, Logit(0.05)])
    assert isinstance(flow._steps[0], DequantizeLogit)
    results = []
    for fused in (True, False):
        flow.fused = fused
        assert len(flow._steps) == (1 if fused else 2)
        z, logdet = flow(x, seed=3, row_offset=4)
        assert z.dtype == logdet.dtype == dtype
        flow.zero_grad()
        if kind == "variational":
            (z.square().sum() + logdet.sum()).backward()
        results.append([z, logdet, *(parameter.grad.clone() for parameter in flow.parameters())])
        assert torch.equal(flow.inverse(z), x if x.dtype == torch.uint8 else (255 * x).round().to(torch.uint8))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-10)


def test_the_density_of_the_noise_is_that_of_a_change_of_variables():
    """-log q(u | x) from the Jacobian of noise to u, pixel images given."""
    dequantize = VariationalDequantize(_conditional(torch.float64, context=True))
    dequantize.eval()
    x = _pixels(2, 1, 2, 2)
    given = x.double() / 255
    u, surprise = dequantize.noise(given, 9, 0)
    start = random.normal(9, 2, 4, Stream.DEQUANTIZE).double()
    rows = []
    for row, image in zip(start, given, strict=True):
        condition = (image * 255 / 127.5 - 1).unsqueeze(0)
        rows.append(jacobian_logdet(
            lambda one, condition=condition: torch.sigmoid(dequantize.flow(one.reshape(1, 1, 2, 2), condition)[0]),
            row.unsqueeze(0),
        ))  # fmt: skip
    want = torch.cat(rows) + (0.5 * start.square() + 0.5 * math.log(2 * math.pi)).sum(1)
    torch.testing.assert_close(surprise, want, rtol=1e-9, atol=1e-9)
    v, logdet = dequantize(given, seed=9)
    torch.testing.assert_close(v, (x + u) / 256)
    torch.testing.assert_close(logdet, surprise - 4 * math.log(256), rtol=1e-9, atol=1e-9)


def test_the_noise_has_a_density_that_integrates_to_one():
    """E_q[f(u) / q(u | x)] is the integral of f over the unit interval."""
    x = torch.tensor([40, 128, 220], dtype=torch.uint8).repeat_interleave(40_000).unsqueeze(1)
    u, surprise = VariationalDequantize(_Affine()).noise(x, 1, 0)
    for f, want in ((lambda u: 6 * u * (1 - u), 1.0), (lambda u: 30 * (u * (1 - u)) ** 2 * u, 0.5)):
        terms = (f(u.squeeze(1)) * surprise.exp()).reshape(3, -1).double()
        error = terms.std(1) / terms.shape[1] ** 0.5
        assert ((terms.mean(1) - want).abs() < 4 * error).all(), (terms.mean(1), error)
        assert (error < 0.01).all()


@pytest.mark.parametrize("kind", ["uniform", "variational"])
def test_the_bound_lies_below_the_exact_likelihood(kind):
    """One pixel under a density that is known: E[log p(v) + logdet] <= log P(x), by the gap that KL(q || p) is."""
    base = torch.distributions.Beta(torch.tensor(2.0), torch.tensor(3.0))
    count = 50_000
    x = torch.tensor([3, 90, 250], dtype=torch.uint8).repeat_interleave(count).unsqueeze(1)
    dequantize = Dequantize() if kind == "uniform" else VariationalDequantize(_Affine())
    v, logdet = dequantize(x, seed=2)
    terms = (base.log_prob(v).sum(1) + logdet).reshape(3, count).double()
    error = terms.std(1) / count**0.5

    def cdf(k: Tensor) -> Tensor:
        t = k.double() / 256
        return 6 * t**2 - 8 * t**3 + 3 * t**4

    pixels = torch.tensor([3, 90, 250])
    exact = torch.log(cdf(pixels + 1) - cdf(pixels))
    gap = exact - terms.mean(1)
    assert (gap > -4 * error).all()
    # KL(q(u | x) || p(u | x)) on a grid, q by its known density or 1.
    u = ((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000).unsqueeze(0)
    log_q = torch.zeros_like(u)
    if kind == "variational":
        image = (pixels.double() / 127.5 - 1).unsqueeze(1)
        normal = torch.distributions.Normal(image, 1.8 + 0.2 * image)
        log_q = normal.log_prob(torch.logit(u)) - torch.log(u * (1 - u))
    t = (pixels.unsqueeze(1) + u) / 256
    log_p = torch.log(12 * t * (1 - t) ** 2 / 256) - exact.unsqueeze(1)
    kl = (log_q.exp() * (log_q - log_p)).mean(1)
    assert ((gap - kl).abs() < 4 * error + 1e-5).all(), (gap, kl, error)


def test_learning_the_noise_tightens_the_bound():
    """Pixels that are 100 or 101 under a narrow density between them: uniform noise pays for the far ends."""
    base = torch.distributions.Normal(101 / 256, 0.3 / 256)
    x = torch.tensor([[100], [101]], dtype=torch.uint8).repeat(128, 1)
    net = nn.Linear(1, 2)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, noise: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
            shift, log_scale = self.net(20 * (image + 0.21)).chunk(2, 1)
            return shift + log_scale.exp() * noise, log_scale.sum(1)

    def bound(transform: Transform, seed: int) -> Tensor:
        v, logdet = transform(x, seed=seed)
        return (base.log_prob(v).sum(1) + logdet).mean()

    learned = VariationalDequantize(Learned())
    optimizer = torch.optim.Adam(learned.parameters(), 0.1)
    for step in range(150):
        optimizer.zero_grad()
        (-bound(learned, step)).backward()
        optimizer.step()
    with torch.no_grad():
        uniform = torch.stack([bound(Dequantize(), 1000 + k) for k in range(20)]).mean()
        ours = torch.stack([bound(learned, 1000 + k) for k in range(20)]).mean()
    # Two equal pixels, and nearly no mass elsewhere.
    assert uniform < ours - 0.5
    assert -math.log(2) - 0.2 < ours < -math.log(2) + 0.02


def test_noise_depends_on_seed_and_row_alone():
    x = _pixels(6, 1, 4, 4)
    for transform in (Dequantize(), VariationalDequantize(_conditional())):
        with torch.no_grad():
            transform(x, seed=0)
            transform.eval()
            whole, logdet = transform(x, seed=8)
            part, part_logdet = transform(x[2:5], seed=8, row_offset=2)
        torch.testing.assert_close(part, whole[2:5], rtol=0.0, atol=1e-7)
        torch.testing.assert_close(part_logdet, logdet[2:5])
        assert not torch.equal(transform(x, seed=9)[0], whole)


def test_saturated_noise_stays_inside_the_pixel():
    class Far(nn.Module):
        def forward(self, noise: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
            return noise + 200 * image.sign(), noise.new_zeros(len(noise))

    flow = Flow([VariationalDequantize(Far()), Logit(0.0)])
    x = torch.tensor([[0, 100, 200, 255]], dtype=torch.uint8)
    z, logdet = flow(x, seed=0)
    assert torch.equal(flow.inverse(z), x)
    assert torch.equal(Dequantize().inverse(flow.transforms[0](x, seed=0)[0]), x)
    assert z.isfinite().all()
    assert logdet.isfinite().all()


def test_conditional_flow_sees_the_image_in_every_coupling():
    """With the noise fixed, h changes where the image does; and the two shapes of a context."""
    flow = _conditional(context=True).eval()
    noise, image = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    h, _ = flow(noise, image)
    for parameter in flow.transforms[0].parameters():
        nn.init.zeros_(parameter)
    other, _ = flow(noise, -image)
    assert not torch.allclose(h, other)
    vectors = ConditionalFlow([Coupling(mlp(2 + 4, 4), [True, False, True, False])])
    h, logdet = vectors(torch.randn(3, 4), torch.randn(3, 4))
    assert (h.shape, logdet.shape) == ((3, 4), (3,))


def test_in_a_flow():
    """Halves, loss, samples, a copy, a state_dict."""
    flow = Flow([VariationalDequantize(_conditional()), Logit(), Squeeze(), Coupling(conv(2, 4))], data_shape=(1, 6, 6))
    x = _pixels(5, 1, 6, 6)
    loss = flow.loss(x, seed=1)
    loss["loss"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in flow.transforms[0].parameters())
    z, _ = flow(x, seed=1)
    assert torch.equal(flow.inverse(z), x)
    assert torch.equal(flow.bits_per_dim(x.float() / 255, seed=1), flow.bits_per_dim(x, seed=1))
    samples = flow.sample(3, seed=2)
    assert samples.shape == (3, 1, 6, 6)
    assert torch.equal((255 * samples).round() / 255, samples)
    twin = copy.deepcopy(flow)
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    assert not torch.equal(twin.log_prob(x, seed=1), flow.log_prob(x, seed=1))


@pytest.mark.parametrize("kind", ["uniform", "variational"])
def test_compiles_as_one_graph(kind):
    first = Dequantize() if kind == "uniform" else VariationalDequantize(_Affine())
    flow, x = Flow([first, Logit()]), _pixels(4, 1, 4, 4)
    want = flow.loss(x, seed=3)["loss"]
    flow.compile(backend="eager")
    torch.testing.assert_close(flow.loss(x, seed=3)["loss"], want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t(torch.tensor([[0.0, 255.0]])), ValueError, r"x: .* floats in \[0, 1\], got floats from 0 to 255"),
        (lambda t: t(torch.tensor([[-0.1, 0.5]])), ValueError, r"got floats from -0\.1 to 0\.5"),
        (lambda t: t(torch.tensor([[0.1, float("nan")]])), ValueError, "x: expected uint8 pixels"),
        (lambda t: t(torch.zeros(1, 2, dtype=torch.int64)), TypeError, r"x: expected uint8 .* got torch\.int64"),
        (lambda t: t(_pixels(1, 2), seed="7"), TypeError, "seed: expected None, an int or an int64 tensor"),
        (lambda t: t(_pixels(1, 2), row_offset=-1), ValueError, "row_offset: expected a non-negative int"),
    ],
)
@pytest.mark.parametrize("transform", [Dequantize(), VariationalDequantize(_Affine())], ids=["uniform", "variational"])
def test_bad_input(transform, call, error, message):
    with pytest.raises(error, match=message):
        call(transform)


def test_bad_arguments():
    with pytest.raises(ValueError, match="alpha: expected a number from 0 to"):
        Logit(0.5)
    with pytest.raises(TypeError, match=r"flow: expected a module called as flow\(noise, image\), got int"):
        VariationalDequantize(3)
    with pytest.raises(TypeError, match=r"transforms: expected .* without noise, got Dequantize"):
        ConditionalFlow([Dequantize()])
    with pytest.raises(ValueError, match=r"flow: expected it to return tensors of shapes \[\[2, 1, 4, 4\], \[2\]\]"):
        VariationalDequantize(ConditionalFlow([Squeeze()]))(_pixels(2, 1, 4, 4))
