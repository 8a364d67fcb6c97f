"""mixture_logistic_coupling: the matrix, far tails, the inverse, log-determinants, and bad input."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.utils._python_dispatch import TorchDispatchMode

from genfast.cases import cases
from genfast.functional import mixture_logistic_coupling
from genfast.functional._register import path
from tests.matrix import OpMatrix
from tests.oracles import mixture_logistic


class TestMixtureLogisticCoupling(OpMatrix):
    cases = cases("mixture_logistic_coupling")
    oracle = staticmethod(mixture_logistic.mixture_logistic_coupling)


def _params(shape: tuple[int, ...], components: int, device: str = "cpu", spread: float = 1.0, log_scale: float = 0.0):
    """[B, (2 + 3 K) C, ...]: means as wide as `spread`, log-scales around `log_scale`."""
    batch, channels, *rest = shape

    def block(count: int, size: float, centre: float = 0.0) -> Tensor:
        return centre + size * torch.randn(batch, count * channels, *rest)

    blocks = [block(2, 0.5), block(components, 1.0), block(components, spread), block(components, 0.5, log_scale)]
    return torch.cat(blocks, 1).to(device)


TAILS = (0.0, 1e-6, 0.3, 2.0, 17.0, 80.0, 250.0, 3e3, 1e4)


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("log_scale", [0.0, -2.0, -9.0])
def test_tails_against_60_digits(components, log_scale, device):
    """From the middle to F or 1 - F = 10^-4,000,000: no digit is lost on the way."""
    x = torch.tensor([sign * value for value in TAILS for sign in (1, -1)])[:, None]
    params = _params((len(x), 1), components, log_scale=log_scale)
    y, logdet = mixture_logistic_coupling(x.to(device), params.to(device), num_components=components)
    with mpmath.workdps(60):
        for i, point in enumerate(x.flatten().tolist()):
            s, t, *rest = params[i].tolist()
            parts = (rest[k * components : (k + 1) * components] for k in range(3))
            want, slope = mixture_logistic.Exact(s, t, *parts)(point)
            assert abs(y[i].item() - want) <= 3e-6 * abs(want) + 3e-6
            assert abs(logdet[i].item() - slope) <= 1e-6 * abs(slope) + 1e-5


@pytest.mark.parametrize(
    ("components", "spread", "log_scale"),
    [(1, 1.0, 0.0), (3, 1.0, -1.0), (32, 1.5, -1.0), (4, 100.0, -2.0)],
)
def test_inverse_in_the_middle_in_tails_and_between_components(components, spread, log_scale, device):
    """Within 1e-6, and within what the rounding of y leaves open where the map is flat."""
    shape = (24, 3)
    params = _params(shape, components, device, spread, log_scale)
    x = torch.cat([spread * torch.randn(12, 3), 1e4 * (2 * torch.rand(12, 3) - 1)]).to(device)
    options = {"num_components": components}
    y = mixture_logistic_coupling(x, params, **options)[0]
    found, logdet = mixture_logistic_coupling(y, params, inverse=True, **options)
    exact, wide = mixture_logistic_coupling(y.double(), params.double(), inverse=True, **options)
    # An element a row, so that each has its derivative.
    rows = params.double().view(24, -1, 3).transpose(1, 2).reshape(72, -1)
    again = mixture_logistic_coupling(exact, params.double(), **options)[0]
    torch.testing.assert_close(again, y.double(), rtol=1e-12, atol=1e-12)
    near = (found - exact).abs() <= 1e-6 * exact.abs().clamp(min=1)
    there, terms = mixture_logistic_coupling(found.double().view(-1, 1), rows, **options)
    s, t = rows[:, :1], rows[:, 1:2]
    z = (y.double().view(-1, 1) - t) * torch.exp(-2 * torch.tanh(s))
    rounding = 1e-6 * (1 + z.abs()) * torch.exp(2 * torch.tanh(s))
    same = (there - y.double().view(-1, 1)).abs() <= rounding
    assert (near | same.view_as(near)).all()
    # Where 1e-6 of x makes more than the rounding of y.
    steep = (terms.exp() > rounding.squeeze(1) * 1e6).view_as(near)
    assert near[steep].all()
    assert log_scale > -1 or steep.any()
    assert spread > 2 or near.float().mean() > 0.75
    rows_steep = steep.all(1)
    torch.testing.assert_close(logdet[rows_steep].double(), wide[rows_steep], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("components", "inverse"), [(1, False), (32, False), (64, False), (1, True)])
def test_any_number_of_components(components, inverse, device):
    half, params = torch.randn(3, 4, device=device), _params((3, 4), components, device)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (half, params)]
        out, logdet = mixture_logistic_coupling(*leaves, num_components=components, inverse=inverse)
        grads = torch.autograd.grad(out.sin().sum() + 0.5 * logdet.sum(), leaves)
        results.append([x.double() for x in (out.detach(), logdet.detach(), *grads)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_one_component_is_an_affine_map(device):
    """At the very middle too, where |u| has a kink."""
    x = torch.tensor([[0.5, -2.0, 3.0]], device=device).requires_grad_()
    blocks = [torch.tensor([values], device=device) for values in ([0.3, -1, 0], [1.0, 0, 2], [0.5, -3, 7])]
    mu, log_scale = x.detach().clone(), torch.tensor([[-1.0, 0, 0.5]], device=device)
    mu[0, 1] += 1
    params = torch.cat([*blocks, mu, log_scale], 1).requires_grad_()
    y, logdet = mixture_logistic_coupling(x, params, num_components=1)
    s, t, _, mean, width = params.chunk(5, 1)
    log = 2 * torch.tanh(s) - width
    wanted = (x - mean) * log.exp() + t, log.sum(1)
    for outputs in zip((y, logdet), wanted, strict=True):
        torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(a.square().sum() + b.sum(), (x, params)) for a, b in ((y, logdet), wanted)]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("scale_map", ["tanh", "exp"])
def test_gradient_of_the_inverse_is_that_of_the_implicit_function(scale_map, device):
    """d x = (d y - dY / d params) / (dY / dx), with both derivatives by autograd of the forward map in fp64."""
    y, params = torch.randn(5, 4, device=device), _params((5, 4), 3, device)
    options = {"num_components": 3, "scale_map": scale_map, "factor": 1.5}
    leaves = [value.clone().requires_grad_() for value in (y, params)]
    x, _ = mixture_logistic_coupling(*leaves, inverse=True, **options)
    upstream = torch.randn_like(x)
    got = torch.autograd.grad(x, leaves, upstream)
    point, wide = x.detach().double().requires_grad_(), params.double().requires_grad_()
    forward = mixture_logistic_coupling(point, wide, **options)[0]
    (slope,) = torch.autograd.grad(forward.sum(), point, retain_graph=True)
    to_y = upstream.double() / slope
    (to_params,) = torch.autograd.grad(forward, wide, -to_y)
    for actual, want in zip(got, (to_y, to_params), strict=True):
        torch.testing.assert_close(actual.double(), want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_logdet_is_that_of_the_jacobian(inverse):
    x, params = torch.randn(1, 2, 3, dtype=torch.float64), _params((1, 2, 3), 4).double()

    def function(x: Tensor) -> Tensor:
        return mixture_logistic_coupling(x, params, num_components=4, inverse=inverse)[0].flatten()

    (_, logdet) = mixture_logistic_coupling(x, params, num_components=4, inverse=inverse)
    _, want = torch.linalg.slogdet(jacobian(function, x).view(6, 6))
    torch.testing.assert_close(logdet[0], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(
    ("dtype", "of_params"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_dtypes_may_differ(dtype, of_params, inverse, device):
    """The state stays as it is while a network under autocast returns bf16."""
    half, params = torch.randn(4, 6, device=device).to(dtype), _params((4, 6), 2, device).to(of_params)
    leaves = [half.clone().requires_grad_(), params.clone().requires_grad_()]
    out, logdet = mixture_logistic_coupling(*leaves, num_components=2, inverse=inverse)
    grads = torch.autograd.grad(out.float().square().sum() + logdet.sum(), leaves)
    assert (out.dtype, logdet.dtype, *(grad.dtype for grad in grads)) == (dtype, torch.float32, dtype, of_params)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want, exact = mixture_logistic_coupling(*wide, num_components=2, inverse=inverse)
    step = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=step, atol=2e-6)
    torch.testing.assert_close(logdet.double(), exact, rtol=1e-5, atol=1e-5)
    exact_grads = torch.autograd.grad(want, wide, 2 * out.double().detach(), retain_graph=True)
    more = torch.autograd.grad(exact.sum(), wide)
    for grad, one, two in zip(grads, exact_grads, more, strict=True):
        torch.testing.assert_close(grad.double(), one + two, rtol=2**-6, atol=2**-6)


def test_clamped_log_scales_count_as_the_bound_and_get_no_gradient(device):
    x, params = torch.randn(4, 3, device=device), _params((4, 3), 2, device)
    clamped = torch.cat([params[:, :18], params[:, 18:].clamp(min=-0.1)], 1)
    params.requires_grad_()
    results = [
        mixture_logistic_coupling(x, values, num_components=2, min_log_scale=least)
        for values, least in ((params, -0.1), (clamped, -7.0))
    ]
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    (results[0][0].sum() + results[0][1].sum()).backward()
    assert torch.equal(params.grad[:, 18:] == 0, params[:, 18:] < -0.1)


def test_a_component_without_weight_does_not_matter(device):
    x, params = torch.randn(4, 3, device=device), _params((4, 3), 2, device)
    s_and_t, logits, means, log_scales = params.split([6, 6, 6, 6], 1)
    more = [torch.cat([logits, torch.full_like(x, -math.inf)], 1)]
    more += [torch.cat([block, block[:, :3] + 1], 1) for block in (means, log_scales)]
    y, logdet = mixture_logistic_coupling(x, params, num_components=2)
    padded = torch.cat([s_and_t, *more], 1).requires_grad_()
    wider, same = mixture_logistic_coupling(x, padded, num_components=3)
    torch.testing.assert_close((wider, same), (y, logdet))
    (wider.sum() + same.sum()).backward()
    assert padded.grad.isfinite().all()
    assert not padded.grad.view(4, 11, 3)[:, [4, 7, 10]].any()


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.skipif(path(torch.device("cpu"))[0] == "reference", reason="the reference on a CPU may copy")
def test_halves_are_read_in_place_and_nothing_of_the_components_is_stored(memory_format, inverse):
    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    seen = []
    image = torch.randn(2, 8, 4, 4).to(memory_format=memory_format)
    params = _params((2, 4, 4, 4), 2).to(memory_format=memory_format).requires_grad_()
    half = image[:, 4:].requires_grad_()
    want = mixture_logistic_coupling(half.contiguous(), params.contiguous(), num_components=2, inverse=inverse)
    with Allocations():
        out, logdet = mixture_logistic_coupling(half, params, num_components=2, inverse=inverse)
        torch.autograd.grad(out, (half, params), out.detach())
    assert torch.ops.genfast.mixture_logistic_coupling_backward in seen
    assert not {torch.ops.aten.clone, torch.ops.aten.cat, torch.ops.aten.copy_, torch.ops.aten._to_copy} & set(seen)
    torch.testing.assert_close((out, logdet), want, rtol=1e-6, atol=1e-6)


def test_the_inverse_does_not_wait_for_the_device(device):
    """Where there is a GPU any synchronisation is an error here; elsewhere the number of steps is fixed."""
    y, params = torch.randn(8, 6, device=device), _params((8, 6), 2, device)
    mixture_logistic_coupling(y, params, num_components=2, inverse=True)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        x, _ = mixture_logistic_coupling(y, params, num_components=2, inverse=True)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(mixture_logistic_coupling(x, params, num_components=2)[0], y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
def test_the_inverse_of_what_was_never_reached_ends(value, device):
    y, params = torch.zeros(2, 3, device=device), _params((2, 3), 2, device)
    y[0, 0] = value
    x, logdet = mixture_logistic_coupling(y, params, num_components=2, inverse=True)
    assert torch.equal(x.isfinite().cpu(), torch.tensor([[value == 1e30, True, True], [True] * 3]))
    assert torch.equal(logdet.isfinite().cpu(), torch.tensor([value == 1e30, True]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_components": 0}, ValueError, "num_components: expected an int >= 1, got 0"),
        ({"num_components": 2.0}, TypeError, "num_components: expected an int, got float"),
        (
            {"num_components": 3}, ValueError,
            r"params: expected 11 channels for each of x's with num_components=3, \[2, 44, 5\], got \[2, 32, 5\]",
        ),
        ({"params": torch.zeros(2, 32, 6)}, ValueError, r"params: expected 8 channels .*, got \[2, 32, 6\]"),
        ({"params": None}, TypeError, "params: expected a tensor, got NoneType"),
        ({"x": torch.zeros(2)}, ValueError, r"x: expected at least 2 dimension\(s\) \[B, ...\], got shape \[2\]"),
        ({"x": torch.zeros(2, 4, 5, dtype=torch.uint8)}, TypeError, "x: expected fp32, bf16, fp16 or fp64, got"),
        ({"scale_map": "softplus"}, ValueError, "scale_map: expected one of 'exp', 'tanh', got 'softplus'"),
        ({"factor": -1.0}, ValueError, "factor: expected a finite number > 0, got -1.0"),
        ({"factor": 0}, ValueError, "factor: expected a finite number > 0, got 0"),
        ({"factor": "learned"}, TypeError, "factor: expected a number, got str"),
        ({"factor": torch.ones(4)}, TypeError, "factor: expected a number, got Tensor"),
        ({"min_log_scale": math.nan}, ValueError, "min_log_scale: expected a finite number, got nan"),
        ({"min_log_scale": None}, TypeError, "min_log_scale: expected a number, got NoneType"),
        ({"min_log_scale": "-7"}, TypeError, "min_log_scale: expected a number, got str"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    arguments = {"x": torch.zeros(2, 4, 5), "params": torch.zeros(2, 32, 5), "num_components": 2, **change}
    with pytest.raises(error, match=message):
        mixture_logistic_coupling(arguments.pop("x"), arguments.pop("params"), **arguments)
