"""Couplings: their Jacobian, their inverse, other libraries' with the same parameters, and halves that travel."""

import pytest
import torch
from torch import nn

from genfast.flows import Coupling, MixtureCoupling, divide, join
from tests.flows.networks import assert_is_a_transform, conv, mlp

WIDE = {"dtype": torch.float64}
UNEVEN = [True, False, False, True, True]
COUPLINGS = {
    "tanh": (lambda: Coupling(mlp(2, 4, **WIDE)), (4,)),
    "swapped": (lambda: Coupling(mlp(2, 4, **WIDE), swap=True, scale_map="exp"), (4,)),
    "atan": (lambda: Coupling(mlp(2, 4, **WIDE), scale_map="atan", factor=1.5, layout="interleaved"), (4,)),
    "sigmoid": (lambda: Coupling(mlp(2, 4, **WIDE), scale_map="sigmoid", min_scale=1e-3, order="shift_first"), (4,)),
    "reciprocal": (lambda: Coupling(mlp(2, 4, **WIDE), scale_map="sigmoid", reciprocal=True), (4,)),
    "shift inside": (lambda: Coupling(mlp(2, 4, **WIDE), shift_inside=True), (4,)),
    "mask": (lambda: Coupling(mlp(2, 6, **WIDE), UNEVEN), (5,)),
    "mask swapped": (lambda: Coupling(mlp(3, 4, **WIDE), torch.tensor(UNEVEN), swap=True), (5,)),
    "learned": (lambda: Coupling(mlp(2, 4, **WIDE), factor="learned", channels=2).double(), (4,)),
    "images": (lambda: Coupling(conv(1, 2, **WIDE)), (2, 2, 4)),
    "checkerboard": (lambda: Coupling(conv(1, 2, **WIDE), "checkerboard"), (1, 4, 4)),
    "checkerboard swapped": (lambda: Coupling(conv(1, 2, **WIDE), "checkerboard", swap=True), (1, 4, 4)),
    "mixture": (lambda: MixtureCoupling(mlp(2, 22, **WIDE), 3), (4,)),
    "mixture of images": (
        lambda: MixtureCoupling(conv(1, 5, **WIDE), 1, "checkerboard", True, scale_map="exp"),
        (1, 2, 4),
    ),
}


@pytest.fixture(params=COUPLINGS, ids=str)
def built(request):
    build, shape = COUPLINGS[request.param]
    return build(), torch.randn(3, *shape, dtype=torch.float64)


@pytest.mark.parametrize("fused", [True, False])
def test_logdet_is_that_of_the_jacobian(built, fused):
    coupling, x = built
    coupling.fused = fused
    assert_is_a_transform(coupling, x)


def test_the_conditioning_half_stays(built):
    coupling, x = built
    before, after = divide(x, coupling.split), divide(coupling(x)[0], coupling.split)
    assert torch.equal(coupling.parts(before)[0], coupling.parts(after)[0])
    assert not torch.equal(coupling.parts(before)[1], coupling.parts(after)[1])


def test_halves_give_what_the_whole_gives(built):
    coupling, x = built
    y, logdet = coupling(x)
    halves, same = coupling(divide(x, coupling.split))
    torch.testing.assert_close(join(halves), y)
    torch.testing.assert_close(same, logdet)
    torch.testing.assert_close(join(coupling.inverse(halves)), x)


def test_the_plain_chain_agrees_in_fp32_with_gradients(built):
    coupling, x = built
    coupling.float()
    x, found = x.float(), []
    for fused in (True, False):
        coupling.fused = fused
        y, logdet = coupling(x)
        grads = torch.autograd.grad((y * y).sum() + logdet.sum(), list(coupling.parameters()))
        found.append((y, logdet, grads))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("theirs", "options"), [
    ("exp", {"scale_map": "exp"}),
    ("sigmoid", {"scale_map": "sigmoid", "reciprocal": True}),
    ("sigmoid_inv", {"scale_map": "sigmoid"}),
])  # fmt: skip
def test_equals_normflows(theirs, options):
    normflows = pytest.importorskip("normflows", reason="the comparison needs normflows")
    net, x = mlp(3, 6), torch.randn(50, 6)
    their_block = normflows.flows.AffineCouplingBlock(net, scale_map=theirs)
    ours = Coupling(net, layout="interleaved", order="shift_first", **options)
    y, logdet = ours(x)
    torch.testing.assert_close((y, logdet), tuple(their_block(x)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.inverse(y), their_block.inverse(y)[0], rtol=1e-5, atol=1e-5)


def test_equals_nflows():
    coupling = pytest.importorskip("nflows.transforms.coupling", reason="the comparison needs nflows")
    x = torch.randn(50, 5)

    class Net(nn.Module):
        def __init__(self, size_in, size_out):
            super().__init__()
            self.layers = mlp(size_in, size_out)

        def forward(self, x, context=None):
            return self.layers(x)

    theirs = coupling.AffineCouplingTransform(UNEVEN, Net)
    ours = Coupling(theirs.transform_net, UNEVEN, scale_map="sigmoid", min_scale=1e-3, order="shift_first")
    y, logdet = ours(x)
    torch.testing.assert_close((y, logdet), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.inverse(y), theirs.inverse(y)[0], rtol=1e-5, atol=1e-5)


def test_the_state_keeps_its_dtype_under_autocast():
    coupling, x = Coupling(mlp(2, 4)), torch.randn(8, 4)
    expected = coupling(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert coupling.net(x[:, :2]).dtype == torch.bfloat16
        y, logdet = coupling(x)
    assert y.dtype == logdet.dtype == torch.float32
    torch.testing.assert_close((y, logdet), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Coupling("net"), TypeError, "net: expected a module, got str"),
        (lambda: Coupling(lambda x: x), TypeError, "net: expected a module, got function"),
        (lambda: MixtureCoupling(lambda x: x, 2), TypeError, "net: expected a module, got function"),
        (lambda: Coupling(mlp(2, 4), [True, True]), ValueError, "split: expected a mask with both values"),
        (lambda: Coupling(mlp(2, 4), scale_map="cosh"), ValueError, "scale_map: expected one of"),
        (lambda: Coupling(mlp(2, 4), layout="packed"), ValueError, "layout: expected one of"),
        (lambda: Coupling(mlp(2, 4), order="t"), ValueError, "order: expected one of"),
        (lambda: Coupling(mlp(2, 4), factor=0.0), ValueError, "factor: expected a positive number or 'learned', got 0"),
        (lambda: Coupling(mlp(2, 4), factor=float("nan")), ValueError, "factor: expected a positive number"),
        (lambda: Coupling(mlp(2, 4), factor="learned"), ValueError, "channels: expected a positive int .* got None"),
        (lambda: Coupling(mlp(2, 4), factor="learned", channels=2, scale_map="exp"), ValueError, "factor: expected"),
        (lambda: Coupling(mlp(2, 4), min_scale=-1.0), ValueError, "min_scale: expected a finite number >= 0"),
        (lambda: Coupling(mlp(2, 4), min_scale="1"), TypeError, "min_scale: expected a number, got str"),
        (lambda: Coupling(mlp(2, 4), min_scale=None), TypeError, "min_scale: expected a number, got NoneType"),
        (
            lambda: Coupling(mlp(2, 4), min_scale=1e-3), ValueError,
            "min_scale: expected 0 for scale_map 'tanh', got 0.001",
        ),
        (lambda: MixtureCoupling(mlp(2, 4), 0), ValueError, "num_components: expected an int of at least 1, got 0"),
        (lambda: MixtureCoupling(mlp(2, 4), 2, scale_map="atan"), ValueError, "scale_map: expected one of"),
        (lambda: MixtureCoupling(mlp(2, 4), 2, min_log_scale=float("inf")), ValueError, "min_log_scale: expected"),
        (lambda: MixtureCoupling(mlp(2, 4), 2, min_log_scale=None), TypeError, "min_log_scale: expected a number"),
        (lambda: MixtureCoupling(mlp(2, 4), 2, min_log_scale="-7"), TypeError, "min_log_scale: .* number, got str"),
        (lambda: MixtureCoupling(mlp(2, 4), 2, factor=0.0), ValueError, "factor: expected a finite number > 0, got 0"),
        (lambda: MixtureCoupling(mlp(2, 4), 2, factor="learned"), TypeError, "factor: expected a number, got str"),
        (lambda: Coupling(mlp(2, 4))(torch.randn(2, 3)), ValueError, "x: expected an even number of channels"),
        (lambda: Coupling(mlp(2, 6))(torch.randn(2, 4)), ValueError, r"params: expected .*\[2, 4\], got \[2, 6\]"),
        (lambda: MixtureCoupling(mlp(2, 6), 2)(torch.randn(2, 4)), ValueError, "params: expected"),
        (
            lambda: Coupling(mlp(2, 4))(divide(torch.randn(2, 4), [True, False, True, False])), ValueError,
            "x: expected halves of the split 'channel'",
        ),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_not_finite_stays_so(fused):
    coupling = Coupling(mlp(2, 4))
    coupling.fused = fused
    x = torch.randn(3, 4)
    x[1, 0] = torch.nan
    y, logdet = coupling(x)
    assert torch.isfinite(logdet).tolist() == [True, False, True]
    assert torch.isfinite(y).all(1).tolist() == [True, False, True]
