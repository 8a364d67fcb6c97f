"""Reversible memory: the gradients of ordinary training, and one saved activation whatever the depth."""

import copy

import pytest
import torch
from torch import nn

from genfast.flows import (
    ActNorm,
    Coupling,
    Halves,
    InvertibleConv1x1,
    MixtureCoupling,
    Permute,
    Split,
    Squeeze,
    Transform,
    divide,
)
from genfast.models.flow import Flow
from tests.flows.networks import conv, mlp

ALTERNATING = [False, True] * 4


def couplings(depth, **options):
    return [Coupling(mlp(4, 8), swap=index % 2 == 1, **options) for index in range(depth)]


def glow(depth, factor=1.0):
    steps = [(ActNorm(8), InvertibleConv1x1(8), Coupling(mlp(4, 8), factor=factor)) for _ in range(depth)]
    return [transform for step in steps for transform in step]


def images():
    return [
        Coupling(conv(1, 2), "checkerboard"), Coupling(conv(1, 2), "checkerboard", swap=True), Squeeze(),
        Coupling(conv(2, 4), factor="learned", channels=2), Permute("swap"), ActNorm(4), Coupling(conv(2, 4)),
        Split(conv(2, 4)), Squeeze(), InvertibleConv1x1(8, "plain"), Coupling(conv(4, 8)), Permute(),
        Coupling(conv(4, 8), ALTERNATING, swap=True),
    ]  # fmt: skip


STACKS = {
    "2 couplings": (lambda: couplings(2), (8,)),
    "32 couplings": (lambda: couplings(32, factor=0.5), (8,)),
    "exp": (lambda: couplings(4, scale_map="exp", order="shift_first", layout="interleaved"), (8,)),
    "learned factor": (lambda: couplings(3, factor="learned", channels=4), (8,)),
    "masks": (lambda: [Coupling(mlp(4, 8), ALTERNATING), Coupling(mlp(4, 8), swap=True)], (8,)),
    "glow": (lambda: glow(4), (8,)),
    "images": (images, (1, 8, 8)),
    "one net for two": (lambda: 2 * couplings(2), (8,)),
}


def pair(build, **options):
    """The same flow with ordinary and with reversible memory."""
    torch.manual_seed(0)
    ordinary = Flow(build(), **options)
    reversible = copy.deepcopy(ordinary)
    reversible.memory = "reversible"
    return ordinary, reversible


def gradients(flow, x, autocast=None):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = flow.loss(x)["loss"]
    return loss.detach(), torch.autograd.grad(loss, (x, *flow.parameters()), materialize_grads=True)


def assert_same(one, other, tolerance):
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)
    for gradient, expected in zip(one[1], other[1], strict=True):
        assert (gradient - expected).norm() <= tolerance * expected.norm().clamp(min=1e-3)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("build", "shape"), STACKS.values(), ids=STACKS)
def test_gradients_are_the_ordinary_ones(build, shape, fused):
    flows, x = pair(build, fused=fused), torch.randn(16, *shape)
    for flow in flows:
        flow.loss(x)
    ordinary, reversible = (gradients(flow, x) for flow in flows)
    assert any(isinstance(stage, list) for stage in flows[1]._stages)
    assert_same(reversible, ordinary, 1e-5)


class Sharp(nn.Module):
    """Params of well separated, narrow components: flat stretches between them, where no inverse finds its way."""

    def __init__(self, components):
        super().__init__()
        self.net = mlp(4, 4 * (2 + 3 * components))
        self.means = torch.linspace(-2, 2, components).view(1, -1, 1)

    def forward(self, half):
        s, logits, means, log_scales = self.net(half).unflatten(1, (-1, 4)).split((2, *3 * [len(self.means[0])]), 1)
        return torch.cat([s, logits, means + self.means, log_scales - 5.0], 1).flatten(1)


@pytest.mark.parametrize("sharp", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_mixtures(sharp, fused):
    net = (lambda: Sharp(8)) if sharp else (lambda: mlp(4, 4 * 11))
    build = lambda: [MixtureCoupling(net(), 8 if sharp else 3, swap=swap) for swap in (False, True, False)]  # noqa: E731
    flows, x = pair(build, fused=fused), torch.randn(16, 8)
    assert_same(gradients(flows[1], x), gradients(flows[0], x), 1e-5)


def test_inverses_without_the_digits_are_told():
    """8 couplings that shrink by e^4 each: from their output the input cannot be computed in fp32."""
    _, flow = pair(lambda: couplings(8, factor=4.0))
    for transform in flow.transforms:
        with torch.no_grad():
            transform.net[-1].bias[:4] = -5.0
    loss = flow.loss(10 * torch.randn(16, 8))["loss"]
    with pytest.raises(RuntimeError, match="memory: expected inverses that give a flow's input back"):
        loss.backward()


class Halving(Transform):
    """A tensor in, halves out."""

    pairs = True

    def forward(self, x):
        halves = x if isinstance(x, Halves) else divide(x, "channel")
        return halves, halves.a.new_zeros(len(halves.a))

    def inverse(self, y):
        return y


def test_checkpoints_keep_what_a_transform_returns():
    flows = [Flow([Halving()], memory=memory) for memory in ("ordinary", "checkpoint")]
    x = torch.randn(2, 4, requires_grad=True)
    assert torch.equal(flows[0](x)[0], x)
    assert torch.equal(flows[1](x)[0], x)


def test_gradients_under_autocast():
    flows, x = pair(lambda: couplings(6)), torch.randn(64, 8)
    assert_same(gradients(flows[1], x, torch.bfloat16), gradients(flows[0], x, torch.bfloat16), 1e-3)
    with pytest.raises(AssertionError):
        # It was on.
        assert_same(gradients(flows[1], x, torch.bfloat16), gradients(flows[0], x), 1e-4)


def test_ordinary_use_in_the_same_autocast_is_not_disturbed():
    _, flow = pair(lambda: couplings(2))
    net, x = flow.transforms[0].net, torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        flow.loss(x)
        assert net(x[:, :4]).grad_fn is not None
        (gradient,) = torch.autograd.grad(net(x[:, :4]).float().sum(), [net[0].weight])
    assert gradient.any()


def test_frozen_parameters_have_no_gradient():
    _, flow = pair(lambda: couplings(3))
    flow.transforms[1].requires_grad_(False)
    flow.loss(torch.randn(4, 8))["loss"].backward()
    assert [parameter.grad is None for parameter in flow.parameters()] == [False] * 4 + [True] * 4 + [False] * 4


def test_gradients_of_the_code_alone_and_of_the_logdet_alone():
    flows, x = pair(lambda: glow(2)), torch.randn(16, 8)
    for flow in flows:
        flow.loss(x)
    for output in (0, 1):
        found = [
            torch.autograd.grad(flow(x)[output].square().sum(), list(flow.parameters()), materialize_grads=True)
            for flow in flows
        ]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_weights_that_changed_before_the_backward_are_refused():
    _, flow = pair(lambda: couplings(2))
    loss = flow.loss(torch.randn(4, 8))["loss"]
    with torch.no_grad():
        flow.transforms[0].net[0].weight += 1
    with pytest.raises(RuntimeError, match="parameters: expected those of the forward pass"):
        loss.backward()


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(8)], ids=["dropout", "batch norm"])
def test_networks_that_do_not_repeat_are_refused(layer):
    transforms = [Coupling(nn.Sequential(nn.Linear(4, 8), layer))]
    Flow(transforms, memory="checkpoint")
    with pytest.raises(ValueError, match=f"memory: expected .* got 'reversible' with {type(layer).__name__}"):
        Flow(transforms, memory="reversible")


def saved_bytes(flow, x):
    """Bytes of the distinct storages that wait for the backward pass, but for the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in flow.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = flow.loss(x)["loss"]
    total = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return total


@pytest.mark.parametrize("build", [couplings, glow], ids=["couplings", "glow"])
def test_saved_bytes_do_not_grow_with_depth(build):
    x, saved = torch.randn(256, 8), {}
    for depth in (8, 32, 64):
        # Scales that 64 couplings do not multiply to what no inverse gets back.
        flow = Flow(build(depth, factor=0.25), memory="reversible")
        flow.loss(x)
        saved[depth] = saved_bytes(flow, x)
    ordinary = Flow(build(32))
    ordinary.loss(x)
    assert saved[32] <= saved_bytes(ordinary, x) / 20
    assert saved[64] <= 1.05 * saved[8]


def test_checkpoints_save_less_than_ordinary_and_more_than_reversible():
    x = torch.randn(256, 8)
    ordinary, checkpoint, reversible = (
        saved_bytes(Flow(couplings(16), memory=memory), x) for memory in ("ordinary", "checkpoint", "reversible")
    )
    assert reversible < checkpoint < ordinary


def test_the_backward_pass_can_be_run_twice():
    _, flow = pair(lambda: couplings(3))
    loss = flow.loss(torch.randn(4, 8))["loss"]
    first = torch.autograd.grad(loss, list(flow.parameters()), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, list(flow.parameters())), first)


def test_a_graph_that_must_be_whole_is_refused():
    _, flow = pair(lambda: couplings(2))
    compiled = torch.compile(flow.loss, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Flow\.compile compiles its networks"):
        compiled(torch.randn(4, 8))
    x = torch.randn(4, 8)
    broken = torch.compile(flow.loss, backend="eager")
    torch.testing.assert_close(broken(x), Flow.loss(flow, x))
