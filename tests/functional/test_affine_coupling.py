"""affine_coupling: the matrix, other libraries' couplings, every convention, halves in place, and bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from genfast.cases import cases
from genfast.functional import affine_coupling
from genfast.functional._register import path
from genfast.functional.affine_coupling import backward_from_output
from tests.matrix import OpMatrix
from tests.oracles import coupling


class TestAffineCoupling(OpMatrix):
    cases = cases("affine_coupling")
    oracle = staticmethod(coupling.affine_coupling)


class _Given(nn.Module):
    """A network whose output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.output


@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 6, 6)], ids=str)
def test_equals_nflows(shape, device):
    transforms = pytest.importorskip("nflows.transforms", reason="nflows is compared with where it is installed")
    x, params = torch.randn(shape, device=device), torch.randn(shape[0], *shape[1:], device=device)
    mask = torch.arange(shape[1]) % 2
    layer = transforms.AffineCouplingTransform(mask, lambda *_: _Given(params)).to(device)
    options = {"scale_map": "sigmoid", "min_scale": 1e-3, "order": "shift_first"}
    for inverse, theirs in ((False, layer.forward), (True, layer.inverse)):
        want, want_logdet = theirs(x)
        y, logdet = affine_coupling(x[:, 1::2], params, inverse=inverse, **options)
        torch.testing.assert_close(y, want[:, 1::2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logdet, want_logdet, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "options"),
    [
        ("exp", {"scale_map": "exp"}),
        ("sigmoid", {"scale_map": "sigmoid", "reciprocal": True}),
        ("sigmoid_inv", {"scale_map": "sigmoid"}),
    ],
)
def test_equals_normflows(theirs, options, device):
    flows = pytest.importorskip("normflows.flows", reason="normflows is compared with where it is installed")
    a, b, params = (torch.randn(3, channels, 6, 6, device=device) for channels in (4, 4, 8))
    layer = flows.AffineCoupling(_Given(params), scale_map=theirs)
    for inverse, call in ((False, layer.forward), (True, layer.inverse)):
        (_, want), want_logdet = call([a, b])
        y, logdet = affine_coupling(b, params, layout="interleaved", order="shift_first", inverse=inverse, **options)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logdet, want_logdet, rtol=1e-5, atol=1e-5)


def _plain(
    x: Tensor, params: Tensor, scale_map: str, factor: Tensor | float, min_scale: float, layout: str, order: str,
    inside: bool, reciprocal: bool, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the docstring says, for autograd in fp64."""
    parts = params.unflatten(1, (-1, 2)).unbind(2) if layout == "interleaved" else params.tensor_split(2, 1)
    s, t = parts if order == "scale_first" else parts[::-1]
    scale = _log_scale(s, scale_map, factor, min_scale).exp()
    scale = 1 / scale if reciprocal else scale
    logdet = scale.log().flatten(1).sum(1)
    if inverse:
        return (x / scale - t if inside else (x - t) / scale), -logdet
    return (scale * (x + t) if inside else scale * x + t), logdet


def _log_scale(s: Tensor, scale_map: str, factor: Tensor | float, min_scale: float) -> Tensor:
    if scale_map == "sigmoid":
        return ((s + 2).sigmoid() + min_scale).log()
    if scale_map == "exp":
        return s
    return factor * s.tanh() if scale_map == "tanh" else factor * 0.636 * (s / factor).atan()


def _assert_close(got: tuple[Tensor | None, ...], want: tuple[Tensor | None, ...], what: object) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(
            one, other.to(one.dtype), rtol=1e-5, atol=3e-5, msg=lambda message: f"{what}: {message}"
        )


@pytest.mark.parametrize("scale_map", ["tanh", "atan", "sigmoid", "exp"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_every_convention(scale_map, inverse, device):
    """Outputs and gradients from x, and from the output, against the formulas in fp64."""
    x, params = torch.randn(3, 2, 4, 2), torch.randn(3, 4, 4, 2)
    grads = torch.randn(3, 2, 4, 2, device=device), torch.randn(3, device=device)
    # Each two of the three options meet in all four ways.
    for inside, reciprocal in itertools.product((False, True), (False, True)):
        shift_first = inside != reciprocal
        layout, order = ("interleaved", "shift_first") if shift_first else ("blocked", "scale_first")
        least = 0.02 if shift_first and scale_map == "sigmoid" else 0.0
        leaves = [v.double().to(device).requires_grad_() for v in (x, params)]
        want = _plain(*leaves, scale_map, 1.5, least, layout, order, inside, reciprocal, inverse)
        want_grads = torch.autograd.grad(want, leaves, [grad.double() for grad in grads])
        leaves = [v.to(device, copy=True).requires_grad_() for v in (x, params)]
        options = {
            "scale_map": scale_map, "factor": 1.5, "min_scale": least, "layout": layout, "order": order,
            "shift_inside": inside, "reciprocal": reciprocal, "inverse": inverse,
        }  # fmt: skip
        got = affine_coupling(*leaves, **options)
        _assert_close((*got, *torch.autograd.grad(got, leaves, grads)), (*want, *want_grads), options)
        again = backward_from_output(got[0].detach(), leaves[1].detach(), *grads, **options)
        _assert_close(again[:3], (leaves[0], *want_grads), options)
        assert again[3] is None


@pytest.mark.parametrize("scale_map", ["tanh", "atan", "sigmoid", "exp"])
def test_scale_and_its_slope_everywhere(scale_map, device):
    """One element a sample: the log-det is the log-scale itself, from the smallest to the largest s."""
    size = torch.logspace(-6, 1.9, 300)
    s = torch.cat([-size.flip(0), torch.zeros(1), size])[:, None]
    params = torch.cat([s, torch.zeros_like(s)], 1).to(device).requires_grad_()
    least = 1e-3 if scale_map == "sigmoid" else 0.0
    for floor in {0.0, least}:
        _, logdet = affine_coupling(torch.zeros_like(s).to(device), params, scale_map=scale_map, min_scale=floor)
        leaf = s.double().requires_grad_()
        log = _log_scale(leaf, scale_map, 2.0, floor).squeeze(1)
        torch.testing.assert_close(logdet.cpu().double(), log.detach(), rtol=3e-7, atol=4e-7)
        grad = torch.autograd.grad(logdet.sum(), params)[0][:, :1].cpu().double()
        torch.testing.assert_close(grad, torch.autograd.grad(log.sum(), leaf)[0], rtol=3e-6, atol=1e-15)


def test_logdet_is_that_of_the_jacobian(device):
    x, params = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    for inverse in (False, True):
        y, logdet = affine_coupling(x.float().to(device), params.float().to(device), inverse=inverse)
        for row in range(3):
            jacobian = torch.autograd.functional.jacobian(
                lambda v, row=row, inverse=inverse: affine_coupling(v, params[row : row + 1], inverse=inverse)[0],
                x[row : row + 1],
            )
            want = torch.linalg.slogdet(jacobian.reshape(4, 4))[1]
            assert abs(logdet[row].item() - want.item()) < 1e-5
        assert y.dtype == torch.float32


def test_inverse_over_32_layers(device):
    """Halves that take turns, as in a flow; the networks' outputs depend on the other half."""
    halves = [torch.randn(4, 8, 4, 4, device=device) for _ in range(2)]
    weights = torch.randn(32, 16, 8, device=device) * 0.05

    def params_of(half: Tensor, layer: int) -> Tensor:
        return torch.einsum("oc,bchw->bohw", weights[layer], half).sin()

    state, total = list(halves), 0.0
    for layer in range(32):
        moved, still = layer % 2, 1 - layer % 2
        state[moved], logdet = affine_coupling(state[moved], params_of(state[still], layer), factor=0.5)
        total = total + logdet
    for layer in reversed(range(32)):
        moved, still = layer % 2, 1 - layer % 2
        state[moved], logdet = affine_coupling(
            state[moved], params_of(state[still], layer), factor=0.5, inverse=True
        )
        total = total + logdet
    for half, back in zip(halves, state, strict=True):
        assert (half - back).abs().max() <= 1e-5
    assert total.abs().max() <= 1e-4


@pytest.mark.parametrize("board", [0, 1])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels", "transposed"])
def test_checkerboard(board, layout, device):
    """Against pixels gathered by hand; the other pixels have no gradient."""
    image, params = torch.randn(2, 3, 4, 6, device=device), torch.randn(2, 6, 4, 3, device=device)
    if layout == "channels_last":
        image, params = (v.contiguous(memory_format=torch.channels_last) for v in (image, params))
    if layout == "channels":
        image = torch.cat([image, image + 1], 1)[:, :3]
    if layout == "transposed":
        image = image.transpose(2, 3).contiguous().transpose(2, 3)
    own = (torch.arange(4)[:, None] + torch.arange(6)) % 2 == board
    half = image[..., own].unflatten(-1, (4, 3))
    grads = torch.randn(2, 3, 4, 3, device=device), torch.randn(2, device=device)
    for options in ({}, {"shift_inside": True, "scale_map": "sigmoid", "order": "shift_first"}, {"inverse": True}):
        leaves = [half.contiguous().requires_grad_(), params.detach().requires_grad_()]
        want = affine_coupling(*leaves, **options)
        want_half, want_params = torch.autograd.grad(want, leaves, grads)
        leaves = [image.detach().requires_grad_(), params.detach().requires_grad_()]
        got = affine_coupling(*leaves, checkerboard=board, **options)
        grad_image, grad_params = torch.autograd.grad(got, leaves, grads)
        want_image = torch.zeros_like(image)
        want_image[..., own] = want_half.flatten(2)
        _assert_close((*got, grad_image, grad_params), (*want, want_image, want_params), (layout, board, options))
        if layout == "channels_last" and path(torch.device(device))[0] == "triton":
            assert grad_image.is_contiguous(memory_format=torch.channels_last)
        again = backward_from_output(got[0].detach(), params, *grads, checkerboard=board, **options)
        _assert_close(again[:3], (half, want_half, want_params), (layout, board, options))


class _Copies(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["channels", "channels_last", "even", "odd", "interleaved", "board", "interleaved_2d"])
def test_halves_are_read_in_place(kind):
    """Around the launches, which are recorded, there are no gathers, contiguous chunks, nor gradients from a cat."""
    pytest.importorskip("triton", reason="without Triton there are no kernels")
    from genfast.kernels.affine_coupling import backward, forward
    from genfast.kernels.launch import recording

    layout = torch.channels_last if kind == "channels_last" else torch.contiguous_format
    if kind in ("even", "odd", "interleaved_2d"):
        x, params = torch.randn(3, 16)[:, (kind == "odd") :: 2], torch.randn(3, 16)
    elif kind == "board":
        x, params = torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 2)
    else:
        x, params = (torch.randn(2, 8, 4, 4).contiguous(memory_format=layout) for _ in range(2))
        x = x[:, 4:]
    interleaved = kind.startswith("interleaved") or kind == "channels_last"
    options = None, "tanh", 2.0, 0.0, interleaved, False, False, False, 1 if kind == "board" else -1, False
    shape = x.shape if kind != "board" else params[:, :8].shape
    upstream = torch.randn(shape)
    upstream = upstream.contiguous(memory_format=layout) if len(shape) == 4 else upstream
    with recording() as launches, _Copies() as copies:
        y, logdet = forward(x, params, *options)
        grads = backward(x, params, *options, upstream, logdet)
    names = "clone", "cat", "stack", "copy_", "_to_copy", "index_select", "gather", "where"
    assert len(launches) == 2
    assert torch.ops.aten.empty in copies.seen
    assert not {getattr(torch.ops.aten, name) for name in names} & copies.seen
    assert y.shape == shape
    assert grads[1].stride() == params.stride()
    if kind == "interleaved":
        assert y.is_contiguous()


@pytest.mark.parametrize("shape", [(5, 6), (3, 1), (3, 4, 4, 4), (3, 4, 3, 5), (600, 5)], ids=str)
@pytest.mark.parametrize("per_channel", [False, True], ids=["one", "per_channel"])
def test_learned_factor(shape, per_channel, device):
    x, params = torch.randn(shape), torch.randn(shape[0], 2 * shape[1], *shape[2:])
    factor = torch.rand(shape[1]) + 0.5 if per_channel else torch.tensor(0.7)
    grads = torch.randn(shape, device=device), torch.randn(shape[0], device=device)
    for options in ({}, {"layout": "interleaved", "inverse": True}):
        leaves = [v.double().to(device).requires_grad_() for v in (x, params, factor)]
        spread = leaves[2].reshape(-1, *[1] * (len(shape) - 2)) if per_channel else leaves[2]
        layout = options.get("layout", "blocked")
        want = _plain(*leaves[:2], "tanh", spread, 0.0, layout, "scale_first", False, False, bool(options))
        want = *want, *torch.autograd.grad(want, leaves, [grad.double() for grad in grads])
        leaves = [v.to(device, copy=True).requires_grad_() for v in (x, params, factor)]
        got = affine_coupling(*leaves[:2], factor=leaves[2], **options)
        got = *got, *torch.autograd.grad(got, leaves, grads)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other.float(), rtol=3e-5, atol=2e-4)
        again = backward_from_output(got[0].detach(), params.to(device), *grads, factor=factor.to(device), **options)
        torch.testing.assert_close(again[3], want[-1].float(), rtol=3e-5, atol=2e-4)


@pytest.mark.parametrize("given", ["learned", "board"])
def test_learned_factor_and_checkerboard_compile(given, device):
    x, params = torch.randn(4, 2, 4, 4, device=device), torch.randn(4, 4, 4, 4, device=device)
    options = {"factor": torch.rand(2, device=device).requires_grad_()}
    if given == "board":
        params, options = params[..., ::2], {"checkerboard": 1}

    def call(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return affine_coupling(x, params, **options)

    leaves = [v.detach().requires_grad_() for v in (x, params)]
    every = [*leaves, options["factor"]] if given == "learned" else leaves
    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        y, logdet = function(*leaves)
        results.append((y, logdet, *torch.autograd.grad(y.sin().sum() + logdet.sum(), every)))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_argument_keeps_its_dtype(dtype, device):
    """The state stays fp32 beside a network's output in 16 bits, and the other way round."""
    x, params, factor = torch.randn(4, 12), torch.randn(4, 24), torch.rand(12)
    for kinds in ((torch.float32, dtype, torch.float32), (dtype, torch.float32, dtype)):
        leaves = [v.to(device, kind).requires_grad_() for v, kind in zip((x, params, factor), kinds, strict=True)]
        y, logdet = affine_coupling(*leaves[:2], factor=leaves[2])
        assert (y.dtype, logdet.dtype) == (kinds[0], torch.float32)
        grads = torch.autograd.grad([y.float(), logdet], leaves, [torch.ones(4, 12, device=device), logdet])
        assert tuple(grad.dtype for grad in grads) == kinds
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        want = affine_coupling(*wide[:2], factor=wide[2])
        _assert_close((logdet,), want[1:], kinds)
        torch.testing.assert_close(y.double(), want[0], rtol=2 * torch.finfo(kinds[0]).eps, atol=1e-5)
        for grad, exact in zip(
            grads, torch.autograd.grad(want, wide, [torch.ones_like(want[0]), want[1]]), strict=True
        ):
            torch.testing.assert_close(grad.double(), exact, rtol=2 * torch.finfo(grad.dtype).eps, atol=1e-4)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(
    "options", [{}, {"scale_map": "atan"}, {"scale_map": "sigmoid", "min_scale": 1e-3}], ids=["tanh", "atan", "sigmoid"]
)
def test_bounded_maps_stay_finite(options, inverse, device):
    """Whatever s a network says: all that comes out is finite, and so is every gradient."""
    s = torch.tensor([[0.0, 30.0, 90.0, 1e4, 3e38], [-0.0, -30.0, -90.0, -1e4, -3e38]], device=device)
    params = torch.cat([s, torch.ones_like(s)], 1).requires_grad_()
    x = torch.full_like(s, 3.0).requires_grad_()
    y, logdet = affine_coupling(x, params, inverse=inverse, **options)
    grads = torch.autograd.grad(y.sum() + logdet.sum(), [x, params])
    assert all(v.isfinite().all() for v in (y, logdet, *grads))
    back, _ = affine_coupling(y, params, inverse=not inverse, **options)
    torch.testing.assert_close(back, x, rtol=2e-3 if "min_scale" in options else 1e-5, atol=1e-5)


def test_the_unbounded_map_overflows_openly(device):
    params = torch.tensor([[200.0, 0.0]], device=device)
    y, logdet = affine_coupling(torch.ones(1, 1, device=device), params, scale_map="exp")
    assert torch.isinf(y).all()
    assert logdet.item() == pytest.approx(200.0)


X, PARAMS, IMAGE = torch.zeros(2, 3), torch.zeros(2, 6), torch.zeros(2, 1, 4, 5)


@pytest.mark.parametrize(
    ("x", "params", "options", "error", "message"),
    [
        (None, PARAMS, {}, TypeError, "x: expected a tensor, got NoneType"),
        (X.byte(), PARAMS, {}, TypeError, "x: expected fp32, bf16, fp16 or fp64, got torch.uint8"),
        (torch.zeros(3), PARAMS, {}, ValueError, r"x: expected at least 2 dimension\(s\) \[B, ...\], got shape \[3\]"),
        (X, X, {}, ValueError, r"params: expected s and t for x, shape \[2, 6\], got \[2, 3\]"),
        (X, PARAMS.long(), {}, TypeError, "params: expected fp32, bf16, fp16 or fp64, got torch.int64"),
        (X, PARAMS.double(), {}, ValueError, "params: expected fp64 beside x in fp64 and only there, got"),
        (X, PARAMS, {"scale_map": "relu"}, ValueError, "scale_map: expected one of 'exp', 'tanh', 'atan', 'sigmoid'"),
        (X, PARAMS, {"layout": "mixed"}, ValueError, "layout: expected one of 'blocked', 'interleaved', got 'mixed'"),
        (X, PARAMS, {"order": "t"}, ValueError, "order: expected one of 'scale_first', 'shift_first', got 't'"),
        (X, PARAMS, {"factor": 0.0}, ValueError, "factor: expected a finite number > 0, got 0.0"),
        (X, PARAMS, {"factor": float("nan")}, ValueError, "factor: expected a finite number > 0, got nan"),
        (X, PARAMS, {"factor": "2"}, TypeError, "factor: expected a number or a tensor, got str"),
        (X, PARAMS, {"factor": torch.ones(2)}, ValueError, r"factor: expected shape \[\] or \[3\], got \[2\]"),
        (X, PARAMS, {"factor": torch.ones(3), "scale_map": "exp"}, ValueError, "factor: expected a number for"),
        (X, PARAMS, {"min_scale": 0.1}, ValueError, "min_scale: expected 0 for scale_map 'tanh', got 0.1"),
        (X, PARAMS, {"min_scale": -1.0}, ValueError, "min_scale: expected a finite number >= 0, got -1.0"),
        (X, PARAMS, {"checkerboard": 2}, ValueError, "checkerboard: expected None, 0 or 1, got 2"),
        (X, PARAMS, {"checkerboard": 0}, ValueError, r"x: expected an image \[B, C, H, W\] with even H and W"),
        (IMAGE, PARAMS, {"checkerboard": 0}, ValueError, r"with even H and W, got shape \[2, 1, 4, 5\]"),
    ],
)  # fmt: skip
def test_bad_input(x, params, options, error, message):
    with pytest.raises(error, match=message):
        affine_coupling(x, params, **options)


def test_gradient_from_the_output_needs_one_that_comes_in():
    with pytest.raises(ValueError, match="grad_y: expected a tensor where grad_logdet is None, got None"):
        backward_from_output(X, PARAMS, None, None)
