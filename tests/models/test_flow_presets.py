"""The ready flows, and the networks within their couplings."""

import dataclasses
import math
import re

import pytest
import torch
from torch import nn

import genfast
from genfast.cases import LOSS
from genfast.flows import Coupling, Dequantize, MixtureCoupling, VariationalDequantize, divide
from genfast.models import FlowPlusPlus, Glow, RealNVP, get_family, load
from genfast.models.flow import Flow
from genfast.models.flow_networks import MLP, FoldRows, GatedAttentionNet, GlowNet, ResidualNet
from genfast.models.flow_presets import _OF_PIXELS, NormalToLogistic
from genfast.training import TrainStep, evaluate

PRESETS = (RealNVP, Glow, FlowPlusPlus)
SMALL = {RealNVP: {"hidden": 8, "blocks": 1, "couplings": 2}, Glow: {"hidden": 8, "couplings": 2},
         FlowPlusPlus: {"hidden": 8, "blocks": 1, "couplings": 2, "components": 3}}  # fmt: skip
EVERY = pytest.mark.parametrize("preset", PRESETS)


def make(preset, *shape, **options):
    """A small flow, whose networks say something."""
    torch.manual_seed(1)
    flow = preset(*shape, **{**SMALL[preset], "preset": "tiny", **options})
    with torch.no_grad():
        for module in flow.modules():
            last = getattr(module, "last", None)
            if last is not None:
                last.weight.normal_(std=0.05)
                last.bias += 0.05 * torch.randn_like(last.bias)
    return flow


def pixels(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def assert_same_pixels(found, x):
    """But for a few whose noise was at the edge of a grey level: a rounding of the flow brings them over it."""
    off = (found.float() - x.float()).abs()
    assert off.max() <= 1
    assert off.mean() < 2e-3


def behind_pixels(flow):
    """The flow of real numbers within a flow of images."""
    rest = [transform for transform in flow.transforms if not isinstance(transform, _OF_PIXELS)]
    return Flow(rest, data_shape=flow.data_shape)


@EVERY
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 6, 4)])
def test_images_there_and_back(preset, shape):
    flow = make(preset, shape)
    x = pixels(4, *shape)
    z, logdet = flow(x, seed=3)
    assert z.shape == (4, x[0].numel())
    assert logdet.dtype == torch.float32
    assert_same_pixels(flow.inverse(z), x)
    assert flow.inverse_error(x, seed=3) < 1e-3
    assert torch.allclose(flow.loss(x / 255, seed=3)["loss"], flow.loss(x, seed=3)["loss"])
    samples = flow.sample(2, seed=0)
    assert samples.shape == (2, *shape)
    assert 0 <= samples.min() <= samples.max() <= 1


@EVERY
@pytest.mark.parametrize("dim", [2, 5])
def test_vectors_there_and_back(preset, dim):
    flow = make(preset, dim=dim)
    x = torch.randn(7, dim)
    z, _ = flow(x)
    assert torch.allclose(flow.inverse(z), x, atol=1e-4)
    assert flow.inverse_error(x) < 1e-4
    assert flow.sample(3, temperature=0.5, seed=1).shape == (3, dim)


@EVERY
@pytest.mark.parametrize("shape", [(1, 4, 4), (2,)])
def test_the_log_determinant_is_that_of_the_jacobian(preset, shape):
    flow = make(preset, shape) if len(shape) == 3 else make(preset, dim=shape[0])
    inner = behind_pixels(flow).double().eval()
    x = torch.randn(1, *shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: inner(x)[0], x).reshape(x.numel(), x.numel())
    assert torch.allclose(inner(x)[1], torch.linalg.slogdet(jacobian)[1], atol=1e-9)


@EVERY
def test_a_new_image_flow_has_the_density_of_its_noise_alone(preset):
    """Nothing conditions yet: bits per dimension that no image changes but through dequantization and logit."""
    flow = preset((1, 8, 8), **SMALL[preset]).eval()
    assert all(not net.any() for module in flow.modules() if hasattr(module, "last") for net in [module.last.weight])
    assert 0 < float(flow.loss(pixels(4, 1, 8, 8), seed=0)["bits_per_dim"].detach()) < 20


@EVERY
def test_training_lowers_the_loss_and_every_parameter_learns(preset):
    flow = make(preset, (1, 8, 8))
    x = (pixels(32, 1, 1, 8) // 4).expand(-1, 1, 8, 8).contiguous()
    before = {name: value.clone() for name, value in flow.named_parameters()}
    step = TrainStep(flow, torch.optim.Adam(flow.parameters(), lr=5e-3))
    losses = [float(step(x, seed=index)["loss"]) for index in range(12)]
    assert losses[-1] < losses[0] - 10
    same = [name for name, value in flow.named_parameters() if torch.equal(value, before[name])]
    # A softmax does not see the bias of its keys' part, nor torch the strict triangle of LU.
    assert not [name for name in same if not name.endswith((".lower", ".upper"))]


@EVERY
@pytest.mark.parametrize("data", ["images", "vectors"])
def test_fused_and_plain_agree(preset, data):
    shape, x = ((1, 8, 8), pixels(4, 1, 8, 8)) if data == "images" else (None, torch.randn(4, 3))
    flow = make(preset, shape, 3 if shape is None else None)
    values = {}
    for fused in (True, False):
        flow.fused = fused
        flow.zero_grad()
        loss = flow.loss(x, seed=5)["loss"]
        loss.backward()
        values[fused] = loss.detach(), {name: value.grad for name, value in flow.named_parameters()}
    assert LOSS.excess(values[True][0], values[False][0]) <= 1
    for name, grad in values[True][1].items():
        assert torch.allclose(grad, values[False][1][name], atol=1e-4 * float(grad.abs().max()) + 1e-5), name


@EVERY
def test_memory_changes_no_gradient(preset):
    flow = make(preset, (1, 8, 8))
    x = pixels(4, 1, 8, 8)
    flow.loss(x, seed=0)
    grads = {}
    for memory in ("ordinary", "checkpoint", "reversible"):
        flow.memory = memory
        flow.zero_grad()
        flow.loss(x, seed=5)["loss"].backward()
        grads[memory] = {name: value.grad.clone() for name, value in flow.named_parameters()}
    for memory in ("checkpoint", "reversible"):
        for name, grad in grads["ordinary"].items():
            assert (grads[memory][name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-6, (memory, name)


@EVERY
def test_pieces_are_the_whole(preset):
    """Dequantization's noise is that of the row, also where it is learned."""
    flow = make(preset, (1, 8, 8), dequantization="variational").eval()
    x = pixels(6, 1, 8, 8)
    whole = flow.log_prob(x, seed=4)
    pieces = [flow.log_prob(x[i : i + 2], seed=4, row_offset=i) for i in (0, 2, 4)]
    assert torch.allclose(torch.cat(pieces), whole, rtol=1e-4)
    assert not torch.allclose(flow.log_prob(x, seed=5), whole, rtol=1e-4)


@EVERY
@pytest.mark.parametrize("dequantization", ["uniform", "variational", "none"])
def test_dequantization(preset, dequantization):
    flow = make(preset, (1, 8, 8), dequantization=dequantization)
    kind = {"uniform": Dequantize, "variational": VariationalDequantize, "none": Dequantize}[dequantization]
    assert isinstance(flow.transforms[0], kind)
    assert getattr(flow.transforms[0], "centred", False) == (dequantization == "none")
    x = pixels(4, 1, 8, 8)
    assert_same_pixels(flow.inverse(flow(x, seed=0)[0]), x)


def test_the_default_dequantization():
    kinds = [type(preset((1, 8, 8), preset="tiny", **SMALL[preset]).transforms[0]) for preset in PRESETS]
    assert kinds == [Dequantize, Dequantize, VariationalDequantize]


@EVERY
def test_saving(preset, tmp_path):
    flow = make(preset, (1, 8, 8), memory="checkpoint", alpha=0.01)
    x = pixels(4, 1, 8, 8)
    flow.loss(x)
    flow.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is preset
    assert (loaded.memory, loaded.image_shape) == ("checkpoint", (1, 8, 8))
    assert torch.equal(loaded.log_prob(x, seed=1), flow.eval().log_prob(x, seed=1))


@EVERY
@pytest.mark.parametrize("options", [{}, {"dim": 2}], ids=["default", "vectors"])
def test_saving_what_was_not_given(preset, options, tmp_path):
    flow = make(preset, **options)
    flow.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert (loaded.image_shape, loaded.dim) == ((None, 2) if options else ((1, 28, 28), None))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in flow.state_dict().items())


def test_one_graph():
    flow = make(Glow, (1, 8, 8))
    x = pixels(4, 1, 8, 8)
    flow.loss(x)
    expected = flow.loss(x, seed=3)["loss"]
    flow.compile(backend="eager")
    assert torch.allclose(flow.loss(x, seed=3)["loss"], expected, rtol=1e-5)


def test_the_family():
    family = get_family("flow")
    assert family.classes == PRESETS
    for arch, preset in zip(("realnvp", "glow", "flowpp"), PRESETS, strict=True):
        assert type(family.build((1, 8, 8), arch=arch, preset="tiny")) is preset
    assert type(family.build((1, 8, 8), preset="tiny")) is RealNVP
    narrow = dataclasses.replace(family, build_options=("arch", "conv"))
    assert type(narrow.build((1, 28, 28), arch="glow", conv="plain")) is Glow
    for arch, name in ((None, "RealNVP"), ("flowpp", "FlowPlusPlus")):
        with pytest.raises(ValueError, match=f"conv: expected none for {name}, got 'plain'"):
            narrow.build((1, 28, 28), arch=arch, conv="plain")
    with pytest.raises(ValueError, match="arch: expected one of realnvp, glow, flowpp, got 'nice'"):
        family.build((1, 8, 8), arch="nice")
    assert genfast.RealNVP is RealNVP
    assert genfast.FlowPlusPlus is FlowPlusPlus


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_shape": (1, 7, 8)}, "image_shape: expected an even height and width"),
        ({"image_shape": (1, 8)}, "image_shape: expected"),
        ({"dim": 1}, "dim: expected an int of at least 2, got 1"),
        ({"dim": 2}, "image_shape: expected None for vectors, where dim is given, got (1, 8, 8)"),
        ({"image_shape": None, "dim": 2, "dequantization": "uniform"}, "dequantization: expected None for vectors"),
        ({"image_shape": None, "dim": 2, "alpha": 7.0}, "alpha: expected None for vectors, where dim is"),
        ({"alpha": 7.0}, "alpha: expected a number from 0 to 0.45, got 7.0"),
        ({"dequantization": "normal"}, "dequantization: expected"),
        ({"preset": "large"}, "preset: expected"),
        ({"hidden": 0}, "hidden: expected"),
        ({"memory": "none"}, "memory: expected"),
    ],
)
@EVERY
def test_bad_arguments(preset, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        preset(**{"preset": "tiny", "image_shape": (1, 8, 8), **options})


def test_bad_arguments_of_some():
    with pytest.raises(ValueError, match=re.escape("levels: expected 1 to 3 for images of 8 x 8, got 4")):
        RealNVP((1, 8, 8), preset="tiny", levels=4)
    with pytest.raises(ValueError, match="levels: expected 1 to 3 for images of 8 x 8, got '2'"):
        RealNVP((1, 8, 8), preset="tiny", levels="2")
    for preset in (RealNVP, Glow):
        with pytest.raises(ValueError, match="levels: expected None for vectors, where dim is given, got 99"):
            preset(dim=2, preset="tiny", levels=99)
    with pytest.raises(ValueError, match="hidden: expected a multiple of the 4 heads"):
        FlowPlusPlus((1, 8, 8), preset="tiny", hidden=6)


@pytest.mark.parametrize("steps", [1, 2.5, "3", None])
def test_interpolation_refuses_steps(steps):
    with pytest.raises(ValueError, match=re.escape(f"steps: expected an int of at least 2, got {steps!r}")):
        make(RealNVP, dim=2).interpolate(torch.zeros(1, 2), torch.ones(1, 2), steps=steps)


@pytest.mark.parametrize("rows", [1, 2])
def test_interpolation_refuses_batches_of_different_sizes(rows):
    message = f"x1: expected the shape of x0, [3, 2], got [{rows}, 2]"
    with pytest.raises(ValueError, match=re.escape(message)):
        make(RealNVP, dim=2).interpolate(torch.zeros(3, 2), torch.ones(rows, 2))


@EVERY
def test_interpolation_begins_and_ends_at_the_images(preset):
    flow = make(preset, (1, 8, 8))
    x = pixels(3, 1, 8, 8)
    paths = flow.interpolate(x, x.flip(0), steps=4, seed=0)
    assert paths.shape == (3, 4, 1, 8, 8)
    assert_same_pixels((255 * paths[:, 0]).round(), x)
    assert_same_pixels((255 * paths[:, -1]).round(), x.flip(0))
    # The middle image is between itself.
    assert torch.equal(paths[1], paths[1, :1].expand(4, -1, -1, -1))


def test_interpolation_stays_on_the_sphere():
    flow = make(RealNVP, dim=6).eval()
    z = nn.functional.normalize(torch.randn(2, 4, 6), dim=-1)
    paths = flow.interpolate(*flow.inverse(z.flatten(0, 1)).unflatten(0, (2, 4)), steps=5)
    codes = flow(paths.flatten(0, 1))[0].view(4, 5, 6)
    assert torch.allclose(codes.norm(dim=2), torch.ones(4, 5), atol=1e-4)
    turns = nn.functional.cosine_similarity(codes[:, 1:], codes[:, :-1], dim=2)
    assert torch.allclose(turns, turns[:, :1].expand(-1, 4), atol=1e-4)


def test_evaluation_tells_the_error_of_the_inverse(tmp_path):
    flow = make(RealNVP, (1, 8, 8)).eval()
    x = pixels(40, 1, 8, 8)
    values = evaluate(flow, x, batch_size=20, seed=1)
    assert set(values) == {"loss", "bits_per_dim", "inverse_error"}
    assert 0 < values["inverse_error"] < 1e-3
    # One coupling that is not undone shows.
    coupling = next(transform for transform in flow.transforms if isinstance(transform, Coupling))
    coupling.inverse = lambda y: y
    assert evaluate(flow, x, batch_size=20, seed=1)["inverse_error"] > 10 * values["inverse_error"]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_parameters_in_the_docstring(preset):
    rows = re.findall(r"^\s*``(\w+)``.* ([\d,]+)$", preset.__doc__, re.MULTILINE)
    assert [name for name, _ in rows] == ["tiny", "small", "base"]
    for name, count in rows:
        flow = preset(preset=name)
        assert sum(parameter.numel() for parameter in flow.parameters()) == int(count.replace(",", "")), name


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (MLP(3, 4, 8), torch.randn(2, 3)),
        (ResidualNet(2, 4, 8, 2), torch.randn(2, 2, 6, 5)),
        (GlowNet(2, 4, 8), torch.randn(2, 2, 6, 5)),
        (GatedAttentionNet(2, 4, 8, 1, (6, 5)), torch.randn(2, 2, 6, 5)),
    ],
)
def test_networks_start_with_zeros(net, x):
    out = net(x)
    assert out.shape[:2] == (2, 4)
    assert not out.any()


def test_components_of_a_mixture_differ_at_the_start():
    flow = FlowPlusPlus(dim=2, preset="tiny")
    coupling = next(transform for transform in flow.transforms if isinstance(transform, MixtureCoupling))
    means = coupling.net.last.bias.detach().view(2 + 3 * 4, -1)[6:10]
    assert torch.equal(means[:, 0], torch.linspace(-2, 2, 4))
    assert coupling.net.last.bias.count_nonzero() == means.numel()


def test_folded_rows_see_the_neighbours_of_every_place():
    """A shift of the image by two rows or columns shifts what the network says of each place."""
    torch.manual_seed(0)
    net = FoldRows(nn.Conv2d(2, 4, 3, padding=1))
    image = torch.randn(1, 1, 16, 16)
    out = net(divide(image, "checkerboard").a)
    moved = net(divide(image.roll((2, 4), (2, 3)), "checkerboard").a)
    assert torch.allclose(moved[:, :, 6:-4, 4:-2], out.roll((2, 2), (2, 3))[:, :, 6:-4, 4:-2], atol=1e-6)
    image = torch.randn(1, 2, 8, 8)
    assert torch.equal(FoldRows(nn.Identity())(image), image)


def test_learned_noise_starts_as_logistic_noise_whose_sigmoid_is_uniform():
    """So a new variational flow bounds the likelihood as the uniform one does."""
    logistic = NormalToLogistic()
    x = torch.linspace(-5, 5, 50, dtype=torch.float64)[:, None].requires_grad_()
    y, logdet = logistic(x)
    assert torch.allclose(torch.sigmoid(y), torch.special.ndtr(x))
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(slope.log()[:, 0], logdet)
    assert torch.allclose(logistic.inverse(y), x)
    dequantize = RealNVP((1, 8, 8), preset="tiny", dequantization="variational").transforms[0]
    pixels_in_noise, logdet = dequantize(pixels(1024, 1, 8, 8), seed=0)
    assert torch.allclose(logdet, torch.tensor(-64 * math.log(256)), atol=1e-2)
    noise = (256 * pixels_in_noise) % 1
    assert (noise.mean() - 0.5).abs() < 0.01
    assert (noise.var() - 1 / 12).abs() < 0.005
