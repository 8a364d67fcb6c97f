"""`Flow`: a density that integrates to 1, its samples, its plan of fused steps, and what it refuses."""

import copy
import json
import math
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import genfast
from genfast import Flow
from genfast.flows import (
    ActNorm,
    Coupling,
    Dequantize,
    InvertibleConv1x1,
    Logit,
    MixtureCoupling,
    Permute,
    Split,
    Squeeze,
    Transform,
)
from genfast.flows.dequantize import DequantizeLogit
from genfast.flows.linear import ActNormConv1x1
from genfast.models.base import evaluating
from genfast.random import Stream, normal
from tests.flows.networks import conv, jacobian_logdet, mlp


def vectors(dim=4, steps=3, **options):
    half = dim // 2
    transforms = []
    for index in range(steps):
        transforms += [ActNorm(dim), InvertibleConv1x1(dim, "lu" if index % 2 else "plain")]
        transforms += [Coupling(mlp(half, dim)), Coupling(mlp(half, dim), swap=True)]
    return Flow(transforms, data_shape=(dim,), **options)


def multiscale(**options):
    return Flow(
        [
            Coupling(conv(1, 2), "checkerboard"), Coupling(conv(1, 2), "checkerboard", swap=True), Squeeze(),
            ActNorm(4), InvertibleConv1x1(4), Coupling(conv(2, 4)), Permute("swap"), Coupling(conv(2, 4)),
            Split(conv(2, 4)), Squeeze(), Coupling(conv(4, 8), [True, False] * 4), Split(), Permute("reverse"),
            ActNorm(4), Coupling(conv(2, 4)),
        ],
        data_shape=(1, 4, 8), **options,
    )  # fmt: skip


def mixture(**options):
    return Flow([MixtureCoupling(mlp(2, 2 * 8), 2), MixtureCoupling(mlp(2, 2 * 8), 2, swap=True)], **options)


FLOWS = {"vectors": (vectors, (4,)), "multiscale": (multiscale, (1, 4, 8)), "mixture": (mixture, (4,))}


@pytest.fixture(params=FLOWS, ids=str)
def flow_and_data(request):
    build, shape = FLOWS[request.param]
    flow, x = build(), torch.randn(6, *shape) + 0.5
    flow(x)
    return flow, x


def test_logdet_is_that_of_the_jacobian(flow_and_data):
    flow, x = flow_and_data
    flow, x = flow.double(), x[:3].double()
    z, logdet = flow(x)
    assert logdet.dtype == torch.float64
    torch.testing.assert_close(logdet, jacobian_logdet(lambda one: flow(one)[0], x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flow.inverse(z), x, rtol=1e-8, atol=1e-8)


def test_fused_and_memory_change_nothing_but_rounding(flow_and_data):
    flow, x = flow_and_data
    found = []
    for options in ({}, {"fused": False}, {"memory": "checkpoint"}, {"memory": "reversible"}):
        twin = copy.deepcopy(flow)
        for name, value in options.items():
            setattr(twin, name, value)
        z, logdet = twin(x)
        loss = twin.loss(x)["loss"]
        grads = torch.autograd.grad(loss, list(twin.parameters()))
        found.append((z, logdet, twin.inverse(z), loss, grads))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


def test_what_neighbours_become():
    flow = vectors(steps=1)
    assert [type(step) for step in flow._steps] == [ActNormConv1x1, Coupling, Coupling]
    flow.fused = False
    assert [type(step) for step in flow._steps] == [ActNorm, InvertibleConv1x1, Coupling, Coupling]
    assert not any(module.fused for module in flow.modules() if isinstance(module, Transform))
    flow.fused, flow.memory = True, "reversible"
    assert [len(stage) for stage in flow._stages] == [3]


def test_32_layers_come_back_in_fp32():
    x = torch.randn(64, 8)
    layers = [(ActNorm(8), InvertibleConv1x1(8), Coupling(mlp(4, 8), factor=0.5, swap=i % 2 == 1)) for i in range(32)]
    flow = Flow([transform for layer in layers for transform in layer])
    z = flow(x)[0]
    assert (flow.inverse(z) - x).abs().max() <= 1e-5
    couplings = Flow([Coupling(mlp(4, 8), factor=0.5, swap=i % 2 == 1) for i in range(32)])
    assert (couplings.inverse(couplings(x)[0]) - x).abs().max() <= 1e-5


def test_the_density_integrates_to_1():
    flow = Flow(
        [t for swap in (False, True) for t in (InvertibleConv1x1(2), Coupling(mlp(1, 2), factor=0.7, swap=swap))]
    )
    mix = Flow([MixtureCoupling(mlp(1, 8), 2), MixtureCoupling(mlp(1, 8), 2, swap=True)])
    axis = torch.linspace(-12, 12, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    for model in (flow, mix):
        with torch.no_grad():
            total = model.double().log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
        assert float(total) == pytest.approx(1, abs=2e-3)


def test_log_prob_equals_normflows():
    normflows = pytest.importorskip("normflows", reason="the comparison needs normflows")
    nets, theirs, ours, x = [mlp(2, 4) for _ in range(4)], [], [], torch.randn(30, 4)
    for net in nets:
        theirs += [normflows.flows.AffineCouplingBlock(net), normflows.flows.Permute(4, mode="swap")]
        ours = [Permute("swap"), Coupling(net, scale_map="exp", layout="interleaved", order="shift_first"), *ours]
    base = normflows.distributions.DiagGaussian(4, trainable=False)
    # Their flow runs from z to x: ours is it the other way round.
    reference = normflows.NormalizingFlow(base, theirs).log_prob(x)
    flow = Flow([Backwards(transform) for transform in ours])
    torch.testing.assert_close(flow.log_prob(x), reference, rtol=1e-5, atol=1e-5)


class Backwards(Transform):
    """Another transform, the other way round."""

    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    def forward(self, y):
        x = self.transform.inverse(y)
        return x, -self.transform(x)[1]

    def inverse(self, x):
        return self.transform(x)[0]


def normalising(theirs):
    """Our ActNorm with what nflows' learned from a batch, whose standard deviation is the unbiased one."""
    norm = ActNorm(4)
    with torch.no_grad():
        norm.bias.copy_(theirs.shift / theirs.log_scale.exp())
        norm.log_scale.copy_(theirs.log_scale)
        norm.initialized.fill_(True)
    return norm


def test_log_prob_equals_nflows():
    nflows = pytest.importorskip("nflows.flows", reason="the comparison needs nflows")
    from nflows.distributions.normal import StandardNormal
    from nflows.transforms import ActNorm as TheirActNorm
    from nflows.transforms import CompositeTransform
    from nflows.transforms.coupling import AffineCouplingTransform

    class Net(nn.Module):
        def __init__(self, size_in, size_out):
            super().__init__()
            self.layers = mlp(size_in, size_out)

        def forward(self, x, context=None):
            return self.layers(x)

    masks, x = ([0, 1, 0, 1], [1, 0, 1, 0]), 2 + 3 * torch.randn(30, 4)
    parts = [part for mask in masks for part in (TheirActNorm(4), AffineCouplingTransform(mask, Net))]
    theirs = nflows.Flow(CompositeTransform(parts), StandardNormal([4]))
    expected, transforms = theirs.log_prob(x), []
    for part in parts:
        if isinstance(part, TheirActNorm):
            transforms.append(normalising(part))
        else:
            mask = torch.isin(torch.arange(4), part.transform_features)
            options = {"scale_map": "sigmoid", "min_scale": 1e-3, "order": "shift_first"}
            transforms.append(Coupling(part.transform_net, mask, **options))
    flow = Flow(transforms)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=1e-5, atol=1e-4)


def test_log_prob_is_that_of_the_code(flow_and_data):
    flow, x = flow_and_data
    z, logdet = flow(x)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) + logdet
    torch.testing.assert_close(flow.log_prob(x), expected)
    nats = flow.log_prob(x)
    torch.testing.assert_close(flow.bits_per_dim(x), -nats / (math.log(2) * x[0].numel()))
    loss = flow.loss(x)
    torch.testing.assert_close(loss["loss"], -nats.mean())
    torch.testing.assert_close(loss["bits_per_dim"], flow.bits_per_dim(x).mean())


def test_parts_factored_out_come_first():
    flow = Flow([Split(), Split(), Permute("reverse")])
    z, _ = flow(torch.arange(8.0).unsqueeze(0))
    assert z[0].tolist() == [4, 5, 6, 7, 2, 3, 1, 0]
    assert flow.inverse(z)[0].tolist() == list(range(8))


def test_samples_are_the_same_in_any_pieces(flow_and_data):
    flow, x = flow_and_data
    whole = flow.sample(7, seed=3)
    assert whole.shape == (7, *x.shape[1:])
    pieces = [flow.sample(count, seed=3, row_offset=start) for start, count in ((0, 2), (2, 4), (6, 1))]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(flow.sample(7, seed=4), whole)


def test_samples_are_the_inverse_of_the_prior(flow_and_data):
    flow, x = flow_and_data
    code = normal(5, 3, x[0].numel(), Stream.PRIOR, row_offset=2)
    with evaluating(flow):
        for temperature in (0.0, 0.7, 1.0):
            sample = flow.sample(3, seed=5, row_offset=2, temperature=temperature)
            torch.testing.assert_close(sample, flow.inverse(temperature * code))
    assert flow.training


def test_samples_have_the_density_of_the_flow():
    flow = Flow([Coupling(mlp(1, 2), factor=0.5), Coupling(mlp(1, 2), factor=0.5, swap=True)], data_shape=(2,))
    x = flow.sample(20000, seed=0)
    # E[p(x) / p(x)] over a box, by importance sampling: its area.
    inside = (x.abs() < 1).all(1)
    with torch.no_grad():
        area = (inside / flow.log_prob(x).exp()).mean()
    assert float(area) == pytest.approx(4, rel=0.05)


def test_another_flow_as_the_base():
    torch.manual_seed(1)
    inner = Flow([Coupling(mlp(2, 4))], data_shape=(4,))
    flow = Flow([Permute([3, 0, 2, 1])], inner, data_shape=(4,))
    joined = Flow([Permute([3, 0, 2, 1]), inner.transforms[0]], data_shape=(4,))
    x = torch.randn(5, 4)
    torch.testing.assert_close(flow.log_prob(x), joined.log_prob(x))
    torch.testing.assert_close(flow.sample(3, seed=2), joined.sample(3, seed=2))


def small_images(**options):
    transforms = [Squeeze(), ActNorm(4), InvertibleConv1x1(4), Coupling(conv(2, 4)), Split(conv(2, 4))]
    return Flow([Coupling(conv(1, 2), "checkerboard"), *transforms], data_shape=(1, 2, 4), **options)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("aot_eager", {}),
        ("eager", {"fused": False}),
        ("eager", {"memory": "checkpoint"}),
    ],
    ids=["ordinary", "plain", "checkpoint"],
)
def test_the_loss_is_one_graph(backend, options):
    x = 1 + 2 * torch.randn(8, 1, 2, 4)
    flow = small_images(**options)
    twin = copy.deepcopy(flow)
    twin.compile(backend=backend)
    counters.clear()
    for _ in range(2):
        losses = []
        for model in (flow, twin):
            model.zero_grad()
            losses.append(model.loss(x))
            losses[-1]["loss"].backward()
        torch.testing.assert_close(*losses)
        for parameter, other in zip(flow.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert all(module.initialized for module in twin.modules() if isinstance(module, ActNorm))
    assert list(twin.state_dict()) == list(flow.state_dict())


class Net(nn.Module):
    """torch 2.11 compiles none of its own containers."""

    def __init__(self):
        super().__init__()
        self.layers = mlp(2, 4)

    def forward(self, x):
        return self.layers(x)


def test_reversible_compiles_its_networks():
    x = torch.randn(8, 4)
    flow = Flow([Coupling(Net()), Coupling(Net(), swap=True)], memory="reversible")
    twin = copy.deepcopy(flow)
    twin.compile(backend="eager")
    counters.clear()
    for model in (flow, twin):
        model.loss(x)["loss"].backward()
    # Of the networks, in either pass.
    assert counters["stats"]["unique_graphs"] >= 2
    for parameter, other in zip(flow.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad)
    again = pickle.loads(pickle.dumps(twin))
    torch.testing.assert_close(again.loss(x), flow.loss(x))


def test_an_uninitialised_flow_in_a_graph_of_its_users():
    flow, x = vectors(steps=1), 5 + 3 * torch.randn(8, 4)
    twin = copy.deepcopy(flow)
    compiled = torch.compile(twin.loss, backend="aot_eager", fullgraph=True)
    for batch in (x, 2 * x):
        torch.testing.assert_close(compiled(batch), flow.loss(batch))
    torch.testing.assert_close(twin.state_dict(), flow.state_dict())


def test_copies_are_flows_of_their_own(flow_and_data):
    flow, x = flow_and_data
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        torch.testing.assert_close(twin(x), flow(x))
        before = flow.log_prob(x)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter += 0.1
        assert not torch.allclose(twin.log_prob(x), before)
        torch.testing.assert_close(flow.log_prob(x), before)


def test_round_trip_through_a_folder(tmp_path):
    flow, x = vectors(memory="reversible"), 3 + 2 * torch.randn(20, 4)
    flow(x)
    flow.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["own_networks"] == ["transforms"]
    assert config["memory"] == "reversible"
    again = Flow.from_pretrained(tmp_path, transforms=list(vectors().transforms))
    assert (again.memory, again.data_shape) == ("reversible", (4,))
    torch.testing.assert_close(again.loss(x), flow.loss(x), rtol=0, atol=0)
    # Nothing initialises again.
    again.train()(x + 10)
    torch.testing.assert_close(again.state_dict(), flow.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="saved with its own transforms"):
        Flow.from_pretrained(tmp_path)


def test_a_subclass_that_makes_its_transforms_saves_without_them(tmp_path):
    flow = Ready(dim=6)
    flow.save_pretrained(tmp_path)
    again = Ready.from_pretrained(tmp_path)
    assert again.own_networks == ()
    torch.testing.assert_close(again.loss(torch.ones(2, 6)), flow.loss(torch.ones(2, 6)))


class Ready(Flow):
    def __init__(self, dim=4):
        super().__init__([Coupling(mlp(dim // 2, dim))], data_shape=(dim,))


def test_images_come_in_the_shapes_that_other_models_take():
    flow, x = multiscale(), torch.randn(3, 1, 4, 8)
    flow(x)
    for view in (x.reshape(3, 32), x.reshape(3, 4, 8)):
        torch.testing.assert_close(flow.log_prob(view), flow.log_prob(x))
        torch.testing.assert_close(flow.bits_per_dim(view), flow.bits_per_dim(x))


def test_16_bit_data_and_autocast_keep_an_fp32_state():
    flow, x = vectors(), torch.randn(4, 4)
    flow(x)
    assert flow(x.bfloat16())[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert [part.dtype for part in flow(x)] == [torch.float32] * 2
        assert flow.loss(x)["loss"].dtype == torch.float32


def pixels(**options):
    couplings = [Coupling(conv(1, 2), "checkerboard", swap=swap) for swap in (False, True)]
    return Flow([Dequantize(), Logit(0.05), *couplings, Squeeze(), Coupling(conv(2, 4))], **options)


def test_images_are_dequantized_the_same_on_every_path():
    x, flow = torch.randint(256, (5, 1, 4, 4), dtype=torch.uint8), pixels(data_shape=(1, 4, 4))
    assert type(flow._steps[0]) is DequantizeLogit
    expected = flow.bits_per_dim(x, seed=3)
    for options in ({"fused": False}, {"memory": "checkpoint"}, {"memory": "reversible"}):
        twin = copy.deepcopy(flow)
        for name, value in options.items():
            setattr(twin, name, value)
        torch.testing.assert_close(twin.bits_per_dim(x, seed=3), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flow.bits_per_dim(x / 255, seed=3), expected)
    torch.testing.assert_close(flow.bits_per_dim(x[2:], seed=3, row_offset=2), expected[2:])
    assert not torch.allclose(flow.bits_per_dim(x, seed=4), expected)
    z, _ = flow(x)
    assert torch.equal(flow.inverse(z), x)
    sample = flow.sample(4, seed=1)
    assert sample.dtype == torch.float32
    assert torch.equal((sample * 255).round() / 255, sample)
    for wrong in (x.int(), x.float() / 255 + 0.1, x.float()):
        with pytest.raises((TypeError, ValueError), match="x: expected"):
            flow.log_prob(wrong)


def test_the_density_of_pixels_sums_to_1():
    torch.manual_seed(2)
    flow = Flow([Dequantize(), Logit(0.0), ActNorm(1)]).eval()
    with torch.no_grad():
        flow.transforms[2].bias.fill_(0.5)
        flow.transforms[2].log_scale.fill_(-0.7)
    x = torch.arange(256, dtype=torch.uint8).repeat(200).reshape(-1, 1, 1, 1)
    # One draw of the noise for each row: the mean over draws, the sum over values.
    assert float(flow.log_prob(x, seed=0).detach().exp().sum() / 200) == pytest.approx(1, abs=0.01)


def test_an_empty_batch():
    flow = multiscale()
    z, logdet = flow.eval()(torch.zeros(0, 1, 4, 8))
    assert z.shape == (0, 32)
    assert logdet.shape == (0,)
    assert flow.inverse(z).shape == (0, 1, 4, 8)


def test_a_flow_of_nothing_is_the_base():
    flow = Flow([], data_shape=(3,))
    torch.testing.assert_close(flow.log_prob(torch.zeros(2, 3)), torch.full((2,), -1.5 * math.log(2 * math.pi)))
    assert flow.sample(2, seed=0).shape == (2, 3)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: Flow([nn.Linear(2, 2)]), TypeError, "transforms: expected genfast.flows.Transform, got Linear"),
        (lambda: Flow([], base=3), TypeError, "base: expected None or a module with log_prob and sample, got int"),
        (lambda: Flow([], base=nn.Linear(1, 1)), TypeError, "base: expected None or a module"),
        (lambda: Flow([], memory="little"), ValueError, "memory: expected one of 'ordinary', 'checkpoint'"),
        (lambda: Flow([], data_shape=(0, 2)), ValueError, r"data_shape: expected positive ints, got \(0, 2\)"),
        (lambda: Flow([], data_shape=()), ValueError, "data_shape: expected positive ints"),
        (lambda: vectors()([1.0]), TypeError, "x: expected a tensor, got list"),
        (lambda: vectors()(torch.zeros(2, 4, dtype=torch.uint8)), TypeError, "x: expected floats, got torch.uint8"),
        (lambda: vectors()(torch.zeros(2, 5)), ValueError, r"x: expected shape \[B, 4\], got \[2, 5\]"),
        (lambda: multiscale()(torch.zeros(2, 31)), ValueError, r"x: expected shape \[B, 1, 4, 8\] or \[B, 32\] or"),
        (lambda: Flow([])(torch.zeros(2)), ValueError, r"x: expected shape \[B, ...\], got \[2\]"),
        (lambda: vectors()(torch.zeros(2, 4), row_offset=-1), ValueError, "row_offset: expected an int >= 0"),
        (lambda: vectors().inverse(torch.zeros(2, 5)), ValueError, r"z: expected shape \[B, 4\], got \[2, 5\]"),
        (lambda: vectors().inverse(torch.zeros(2, 4).long()), TypeError, "z: expected a float tensor, got torch.int64"),
        (lambda: vectors().inverse(torch.full((2, 4), torch.nan)), ValueError, "z: expected finite numbers"),
        (lambda: Flow([Permute()]).sample(2), ValueError, "data_shape: expected it, or a batch before"),
        (lambda: vectors().sample(0), ValueError, "n: expected an int of at least 1, got 0"),
        (lambda: vectors().sample(1, temperature=-1.0), ValueError, "temperature: expected a finite number >= 0"),
        (lambda: broken().sample(1), ValueError, r"transforms.2.net.0.bias: expected finite parameters"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(run, error, message):
    with pytest.raises(error, match=message):
        run()


def broken():
    flow = vectors(steps=1)
    with torch.no_grad():
        flow.transforms[2].net[0].bias[0] = torch.inf
    return flow


def test_genfast_exports_it():
    assert genfast.Flow is Flow
    assert genfast.flows.Coupling is Coupling


def test_a_list_of_transforms_that_grew_is_run_whole():
    flow = Flow([Permute("reverse")], data_shape=(2,))
    flow.transforms.append(Permute("reverse"))
    x = torch.randn(3, 2)
    assert torch.equal(flow(x)[0], x)
    assert torch.equal(flow.inverse(x), x)


def test_a_base_that_is_a_flow_runs_as_the_flow_does():
    flow = Flow([Coupling(mlp(1, 2))], Flow([ActNorm(2), Coupling(mlp(1, 2))], data_shape=(2,)), data_shape=(2,))
    flow.fused = False
    assert not flow.base.fused
    assert not flow.base.transforms[1].fused
    assert flow.sample(3, seed=0).shape == (3, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_of_another_precision_is_refused(dtype):
    flow = Flow([Coupling(mlp(1, 2))], data_shape=(2,)).to(dtype)
    other = torch.float64 if dtype == torch.float32 else torch.float32
    for call in (flow, flow.log_prob, flow.inverse):
        with pytest.raises(TypeError, match=rf"[xz]: expected the dtype of the parameters, {dtype}, got {other}"):
            call(torch.zeros(3, 2, dtype=other))
    with pytest.raises(TypeError, match="parameters: expected fp32"):
        flow.to(torch.bfloat16)(torch.zeros(3, 2))


def test_memory_of_a_compiled_flow_stays():
    flow = Flow([Coupling(mlp(1, 2))], data_shape=(2,))
    flow.compile(backend="eager")
    with pytest.raises(ValueError, match="memory: expected 'ordinary', for which this flow was compiled"):
        flow.memory = "reversible"


@pytest.mark.parametrize("net", [nn.RReLU(), nn.MultiheadAttention(4, 2, dropout=0.5), nn.GRU(4, 4, 2, dropout=0.5)])
def test_networks_that_draw_are_refused_where_they_would_run_twice(net):
    with pytest.raises(ValueError, match=f"memory: expected .* with {type(net).__name__}"):
        Flow([Coupling(net)], memory="reversible")
