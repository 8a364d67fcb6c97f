"""dequantize_logit: the matrix, the round trip without one wrong pixel, the noise, extreme values, and bad input."""

from __future__ import annotations

import mpmath
import pytest
import torch

from genfast import random
from genfast.cases import NOISELESS_ATOL, cases
from genfast.functional import dequantize_logit
from genfast.functional._register import INTERPRETED
from genfast.random import Stream, philox4x32
from tests.matrix import OpMatrix
from tests.oracles import dequantize

# alpha of RealNVP, of other libraries, and none.
# At the third one an inverse that rounds its difference twice takes a wrong pixel.
ALPHAS = [0.0, 1e-6, 0.05407907161220886, 0.05, 0.1]


class TestDequantizeLogit(OpMatrix):
    cases = cases("dequantize_logit")
    oracle = staticmethod(dequantize.dequantize_logit)

    def test_autocast(self, device):
        """A noise in bf16 from a layer under autocast; y and the log-determinant stay fp32."""
        x = torch.randint(0, 256, (6, 20), dtype=torch.uint8, device=device)
        with torch.autocast(device, torch.bfloat16):
            u = torch.full((6, 20), 0.75, device=device) @ torch.eye(20, device=device)
            y, logdet = dequantize_logit(x, u=u)
            back, _ = dequantize_logit(y, inverse=True)
        assert u.dtype == torch.bfloat16
        assert y.dtype == logdet.dtype == torch.float32
        assert torch.equal(back, x)


def _outermost(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pixel with the least and with the largest noise, one element a sample."""
    x = torch.arange(256, dtype=torch.uint8, device=device).repeat(2).unsqueeze(1)
    u = torch.tensor([2.0**-16, 1 - 2.0**-16], device=device).repeat_interleave(256).unsqueeze(1)
    return x, u


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_outermost_noise_of_every_pixel_comes_back(alpha, device):
    """2^-16 pixels from the next one: nothing is harder."""
    x, u = _outermost(device)
    y, logdet = dequantize_logit(x, u=u, alpha=alpha)
    back, inverse_logdet = dequantize_logit(y, alpha=alpha, inverse=True)
    assert torch.equal(back, x)
    torch.testing.assert_close(inverse_logdet, -logdet, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_round_trip_of_ten_million_pixels(alpha, device):
    # Interpreted, a pixel takes 50 us; the noise that is hardest is tested above.
    total = 20_480 if INTERPRETED else 10_240_000 if alpha in (0.0, 0.05) else 1_024_000
    x = torch.arange(256, dtype=torch.uint8, device=device).repeat(total // 256).reshape(-1, 4096)
    y, logdet = dequantize_logit(x, seed=3, alpha=alpha)
    back, inverse_logdet = dequantize_logit(y, alpha=alpha, inverse=True)
    assert torch.count_nonzero(back != x).item() == 0
    torch.testing.assert_close(inverse_logdet, -logdet, rtol=1e-5, atol=0.0)


def test_alpha_beyond_a_tenth_comes_back_too(device):
    """But for the outermost 2^-12 of a pixel: a kernel has too few digits for it."""
    x, u = _outermost(device)
    u = (u - 0.5) * (1 - 2.0**-11) + 0.5
    for alpha in (0.15, 0.25, 0.45):
        y, _ = dequantize_logit(x, u=u, alpha=alpha)
        assert torch.equal(dequantize_logit(y, alpha=alpha, inverse=True)[0], x)


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.05])
def test_accurate_from_the_least_to_the_largest(alpha, device):
    """Against 40 digits, where w or 1 - w is all but 0, and where y is."""
    pixels = [0, 0, 1, 64, 127, 127, 128, 128, 200, 254, 255, 255]
    noise = [2.0**-16, 0.5, 0.25, 0.75, 0.5, 1 - 2.0**-16, 2.0**-16, 0.5, 0.125, 0.5, 0.5, 1 - 2.0**-16]
    x = torch.tensor(pixels, dtype=torch.uint8, device=device).unsqueeze(1)
    u = torch.tensor(noise, device=device).unsqueeze(1).requires_grad_()
    y, logdet = dequantize_logit(x, u=u, alpha=alpha)
    (y.sum() + 3 * logdet.sum()).backward()
    got = zip(pixels, noise, *(each.flatten().tolist() for each in (y, logdet, u.grad)), strict=True)
    with mpmath.workdps(40):
        a = mpmath.mpf(alpha)
        for pixel, part, value, log, grad in got:
            w = a + (1 - 2 * a) * (pixel + mpmath.mpf(part)) / 256
            slope = (1 - 2 * a) / 256 / (w * (1 - w))
            # The sum of two logarithms, of which the larger one may be 17.
            scale = abs(mpmath.log(w)) + abs(mpmath.log(1 - w)) + 6
            assert abs(value - mpmath.log(w / (1 - w))) < 3e-7 * abs(value) + 1.5e-7, (pixel, part)
            assert abs(log - mpmath.log(slope)) < 4e-7 * scale, (pixel, part)
            assert abs(grad - slope * (1 + 3 * (2 * w - 1))) < 1e-6 * slope * 4, (pixel, part)


def test_the_noise_is_fifteen_bits_of_its_stream(device):
    """u of element j of row i, by hand; alpha = 0 gives it back exactly enough to read all of it."""
    seed, row = 11, 2**32 + 5
    x = torch.zeros(1, 10, dtype=torch.uint8, device=device)
    y, _ = dequantize_logit(x, seed=seed, row_offset=row, alpha=0.0)
    u = random.uniform(torch.tensor([seed], device=device), 1, 10, Stream.DEQUANTIZE, row, bits=15)
    for j in range(10):
        counter = [torch.tensor([value]) for value in (j // 4, row & 0xFFFFFFFF, row >> 32, int(Stream.DEQUANTIZE))]
        key = torch.tensor([seed]), torch.tensor([0])
        want = ((int(philox4x32(key, counter)[j % 4]) >> 17) + 0.5) * 2.0**-15
        assert u[0, j].item() == want
        assert 256 * torch.sigmoid(y[0, j].double()).item() == pytest.approx(want, rel=2e-6)


@pytest.mark.parametrize("shape", [(6, 20), (6, 3, 4, 4), (6, 7), (6, 300)], ids=str)
def test_the_noise_of_a_sample_depends_on_its_row_alone(shape, device):
    x = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    whole, logdet = dequantize_logit(x, seed=7)
    for first, last in ((0, 1), (1, 4), (4, 6)):
        y, part = dequantize_logit(x[first:last], seed=7, row_offset=first)
        assert torch.equal(y, whole[first:last])
        assert torch.equal(part, logdet[first:last])
    u = random.uniform(torch.tensor([7], device=device), shape[0], x[0].numel(), Stream.DEQUANTIZE, bits=15)
    given, _ = dequantize_logit(x, u=u.reshape(shape))
    torch.testing.assert_close(given, whole, rtol=1e-6, atol=NOISELESS_ATOL)
    if len(shape) == 4:
        last = dequantize_logit(x.contiguous(memory_format=torch.channels_last), seed=7)[0]
        assert torch.equal(last, whole)


def test_noise_differs_between_calls_without_a_seed(device):
    x = torch.zeros(2, 50, dtype=torch.uint8, device=device)
    assert not torch.equal(dequantize_logit(x)[0], dequantize_logit(x)[0])
    torch.manual_seed(4)
    first = dequantize_logit(x)[0]
    torch.manual_seed(4)
    assert torch.equal(dequantize_logit(x)[0], first)


def test_extreme_logits_are_clamped(device):
    inf = float("inf")
    y = torch.tensor([[-inf, -1e30, -90.0, -20.0, 20.0, 90.0, 1e30, inf]], device=device).T
    for alpha in (0.0, 0.05):
        x, logdet = dequantize_logit(y, alpha=alpha, inverse=True)
        assert x.flatten().tolist() == [0] * 4 + [255] * 4
        assert logdet[1:7].isfinite().all()
        assert logdet[[0, 7]].tolist() == [-inf, -inf]
        torch.testing.assert_close(logdet[[3, 4]].double(), torch.full((2,), _tail(alpha), device=device).double())
    x, logdet = dequantize_logit(torch.tensor([[float("nan"), 3.0]], device=device), inverse=True)
    assert x[0, 0].item() == 0
    assert logdet.isnan().all()


def _tail(alpha: float) -> float:
    """log(dx / dy) at |y| = 20, where 1 + exp(-20) is 1 in fp32."""
    with mpmath.workdps(30):
        return float(mpmath.log(256) - mpmath.log(1 - 2 * mpmath.mpf(alpha)) - 20 - 2 * mpmath.log1p(mpmath.exp(-20)))


@pytest.mark.parametrize("u", [0.0, 1.0, -0.5, 1.5])
def test_noise_out_of_its_range_gives_no_finite_number(u, device):
    """Where w leaves (0, 1), which it does at once for alpha = 0."""
    x = torch.tensor([[0], [255]], dtype=torch.uint8, device=device)[[0 if u < 0.5 else 1]]
    y, logdet = dequantize_logit(x, u=torch.full((1, 1), u, device=device), alpha=0.0)
    assert not y.isfinite().any()
    assert not logdet.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_the_inverse(dtype, device):
    """The log-determinant's; the pixels have none."""
    y = (3 * torch.randn(4, 30, device=device)).to(dtype).requires_grad_()
    x, logdet = dequantize_logit(y, inverse=True)
    assert not x.requires_grad
    (got,) = torch.autograd.grad(logdet, y, torch.tensor([1.0, -2.0, 0.5, 3.0], device=device))
    transform = dequantize.pixels_to_logits(0.05)
    wide = y.detach().double().requires_grad_()
    place = transform.inv(wide)
    want = -transform.log_abs_det_jacobian(place, wide).sum(1)
    (exact,) = torch.autograd.grad(want, wide, torch.tensor([1.0, -2.0, 0.5, 3.0], device=device).double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


X = torch.zeros(2, 3, dtype=torch.uint8)
Y = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1, 2]}, TypeError, "x: expected a tensor, got list"),
        ({"x": Y}, TypeError, r"x: expected uint8 pixels, got torch\.float32"),
        ({"x": X.int()}, TypeError, r"x: expected uint8 pixels, got torch\.int32"),
        ({"x": X[0, 0]}, ValueError, r"x: expected at least 1 dimension\(s\)"),
        ({"u": torch.rand(2, 4)}, ValueError, r"u: expected the shape of x, \[2, 3\], got \[2, 4\]"),
        ({"u": torch.rand(2, 3), "seed": 0}, ValueError, "seed: expected None when u is given"),
        ({"u": X}, TypeError, r"u: expected fp32, bf16, fp16 or fp64, got torch\.uint8"),
        ({"u": torch.empty(2, 3, device="meta")}, ValueError, "u: expected the device of x, cpu, got meta"),
        ({"alpha": 0.5}, ValueError, r"alpha: expected a number from 0 to 0\.45, got 0\.5"),
        ({"alpha": -0.01}, ValueError, r"alpha: expected a finite number >= 0, got -0\.01"),
        ({"alpha": float("nan")}, ValueError, "alpha: expected a finite number >= 0, got nan"),
        ({"row_offset": -1}, ValueError, "row_offset: expected an int >= 0, got -1"),
        ({"row_offset": 1.0}, TypeError, "row_offset: expected an int, got float"),
        ({"inverse": True}, TypeError, r"x: expected fp32, bf16, fp16 or fp64, got torch\.uint8"),
        ({"x": Y, "inverse": True, "seed": 0}, ValueError, "seed: expected None with inverse=True"),
        ({"x": Y, "inverse": True, "u": Y}, ValueError, "u: expected None with inverse=True"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        dequantize_logit(**{"x": X, **change})
