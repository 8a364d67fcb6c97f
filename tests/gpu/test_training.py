"""Training steps on a GPU: as one CUDA graph they are what they are eagerly, and neither waits for the device."""

from __future__ import annotations

import copy
import gc
import json
import time
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from genfast import random
from genfast.cases import LOSS

pytest.importorskip("huggingface_hub", reason="genfast.training needs huggingface_hub")

from genfast.models import VAE
from genfast.training import DeviceDataset, TrainStep, load_dataset
from genfast.training.checkpoint import load_optimizer_state, optimizer_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"
BATCH = 64
# The step that captures; before it the step runs as it is.
CAPTURE = 4


class Noisy(nn.Module):
    """No matrix product, whose algorithm may be another one on another stream: graph and eager agree bit for bit."""

    def __init__(self, features=784):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mean = nn.Parameter(torch.rand(features, generator=generator))
        self.scale = nn.Parameter(torch.ones(features))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(features))

    def loss(self, x, *, seed, row_offset, beta=1.0):
        x = x.flatten(1).float() / 255
        noise = random.normal(seed, *x.shape, random.Stream.LATENT, row_offset=row_offset)
        self.seen.add_(1)
        self.last.copy_((x * self.mean.detach()).mean(0))
        error = (x - self.mean - 0.1 * self.scale * noise).square().sum(1).mean()
        return {"loss": error + beta * self.scale.square().mean(), "error": error, "noise": noise.mean()}


class Waiting(Noisy):
    def loss(self, x, **options):
        parts = super().loss(x, **options)
        parts["loss"] = parts["loss"] * (2.0 if parts["loss"].item() > 0 else 1.0)
        return parts


class Refusing(Noisy):
    """What a look for waiting does not find."""

    def loss(self, x, **options):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not in a graph")
        return super().loss(x, **options)


def vae():
    torch.manual_seed(0)
    return VAE(latent_dim=8, hidden_dims=(128,)).to(DEVICE)


def noisy(kind=Noisy):
    return kind().to(DEVICE)


def adam(parameters, lr=1e-2):
    # As a tensor, for eager steps to round as a graph's do.
    return Adam(parameters, lr=torch.tensor(lr, device=DEVICE), fused=True)


@pytest.fixture(scope="module")
def images():
    return load_dataset("digits").train[:1000].to(DEVICE)


def pair(model, optimizer=adam, source=None, schedule=None, **options):
    """The step as a graph, and the same eagerly, of two copies of a model; `source()` makes each its own."""
    steps = []
    for mode in ("graph", "eager"):
        own = copy.deepcopy(model)
        plain = optimizer(own.parameters())
        scheduler = None if schedule is None else schedule(plain)
        own_source = None if source is None else source()
        steps.append(TrainStep(own, plain, mode=mode, scheduler=scheduler, source=own_source, **options))
    return steps


def batches(images, count, rows=BATCH):
    return [images[(7 * index) % 900 :][:rows] for index in range(count)]


def state(step):
    found = {**step.model.state_dict(), **optimizer_state(step.optimizer)[0]}
    if step.ema is not None:
        found |= {f"ema.{name}": tensor for name, tensor in step.ema.module.state_dict().items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def agree(graph, eager, data, first=0):
    """Take the same steps both ways, bit for bit."""
    for seed, batch in enumerate(data, first):
        got = {name: value.clone() for name, value in graph(batch, seed=seed).items()}
        want = eager(batch, seed=seed)
        same(got, want)
    same(state(graph), state(eager))
    assert graph.failed() == eager.failed()


def captured(step):
    return bool(step._captured) and all(one.graph is not None for one in step._captured.values())


OPTIMIZERS = {
    "adam": adam,
    "adamw": lambda parameters: AdamW(
        parameters, lr=torch.tensor(1e-2, device=DEVICE), weight_decay=0.1, amsgrad=True, fused=True
    ),
    "momentum": lambda parameters: SGD(
        parameters, lr=torch.tensor(1e-3, device=DEVICE), momentum=0.9, nesterov=True, fused=True
    ),
}
OPTIONS = {
    "plain": {},
    "all": {"grad_clip": 0.5, "ema_decay": 0.9, "micro_batches": 3, "loss_options": {"beta": 4.0}},
    "float16": {"amp_dtype": torch.float16, "grad_clip": 0.5, "ema_decay": 0.9},
}


class Taking(Noisy):
    """`mean` and `scale` take turns, in every third step `mean` alone."""

    averaged = ()

    def turns(self, step):
        return ("mean",) if step % 3 == 2 else ("mean", "scale")

    def turn_parameters(self, turn):
        return [getattr(self, turn)]

    def loss(self, x, *, turn, **options):
        parts = super().loss(x, **options)
        return {"loss": parts["loss"], turn: parts["error"]}


@pytest.mark.parametrize("sourced", [False, True])
@pytest.mark.parametrize("options", ["plain", "all"])
def test_turns_have_a_graph_for_each_tuple_of_them(options, sourced, images):
    if sourced:
        feed = DeviceDataset(images, DEVICE).feed
        graph, eager = pair(noisy(Taking), source=lambda: feed(BATCH, seed=3), **OPTIONS[options])
        for step in (graph, eager):
            step.source.start(1)
        for _ in range(15):
            got = {name: value.clone() for name, value in graph().items()}
            same(got, eager())
    else:
        graph, eager = pair(noisy(Taking), **OPTIONS[options])
        agree(graph, eager, batches(images, 15))
    same(state(graph), state(eager))
    assert set(graph._captured) == {"mean", "mean+scale"}
    assert captured(graph)
    assert graph.means() == eager.means()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_graph_equals_eager_steps(optimizer, options, images):
    graph, eager = pair(noisy(), OPTIMIZERS[optimizer], **OPTIONS[options])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"(?i).*captur")
        agree(graph, eager, batches(images, 50))
    assert captured(graph)
    assert graph.model.seen == 50 * OPTIONS[options].get("micro_batches", 1)
    assert graph.means() == eager.means()


@pytest.mark.parametrize(
    "options",
    [{}, {"compile": True}, {"amp_dtype": torch.bfloat16}, {"amp_dtype": torch.float16}],
    ids=["plain", "compiled", "bfloat16", "float16"],
)
def test_a_model_learns_as_graph_as_it_does_eagerly(options, images):
    # Float32 losses to the table's tolerance at first; later, and in 16 bits, roundings have grown.
    graph, eager = pair(vae(), lambda parameters: adam(parameters, 1e-3), ema_decay=0.9, **options)
    losses = [], []
    for seed, batch in enumerate(batches(images, 50)):
        for step, found in zip((graph, eager), losses, strict=True):
            found.append(step(batch, seed=seed)["loss"].clone())
    assert captured(graph)
    got, want = (torch.stack(found) for found in losses)
    if "amp_dtype" not in options:
        assert LOSS.excess(got[:CAPTURE], want[:CAPTURE]) <= 1
    assert torch.allclose(got, want, rtol=1e-2 if "amp_dtype" in options else 1e-3)
    assert want[-5:].mean() < 0.7 * want[:5].mean()
    assert graph.failed() == eager.failed() == 0


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
def test_a_source_in_a_graph(binarize, images):
    """Over the ends of epochs, and from the middle of one."""
    data = DeviceDataset(images[:420], binarize=binarize)
    graph, eager = pair(noisy(), source=lambda: data.feed(BATCH, seed=3))
    plain_model = noisy()
    plain = TrainStep(plain_model, adam(plain_model.parameters()))
    for epoch, first in ((1, 0), (2, 0), (3, 4), (4, 0)):
        for step in (graph, eager):
            step.source.start(epoch, first)
        given = data.batches(BATCH, seed=3, epoch=epoch, drop_last=True, first=first)
        for index, (batch, _) in enumerate(given, first):
            want = plain(batch, seed=random.derive_seed(3, (epoch - 1) * 6 + index + 1))
            same(eager(), want)
            same(graph(), want)
    assert captured(graph)
    same(state(graph), state(plain))
    assert graph.means() == plain.means()


def test_a_batch_beside_a_source(images):
    """The graph is the source's: a batch that is given is not passed over."""
    graph, eager = pair(noisy(), source=lambda: DeviceDataset(images).feed(BATCH, seed=3))
    for step in (graph, eager):
        step.source.start(1)
    for seed, batch in enumerate(batches(images, 8)):
        same(graph(), eager())
        same(graph(batch, seed=seed), eager(batch, seed=seed))
    assert captured(graph)


def test_each_replay_has_fresh_noise(images):
    model = noisy()
    step = TrainStep(model, adam(model.parameters(), 0.0), mode="graph")
    batch = images[:BATCH]
    noise = [float(step(batch, seed=seed)["noise"]) for seed in (*range(10), 3)]
    assert captured(step)
    assert len(set(noise)) == 10
    assert noise[10] == noise[3]
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append([float(step(batch)["noise"]) for _ in range(3)])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 3


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    "schedule",
    [lambda o: LambdaLR(o, lambda step: 0.7**step), lambda o: CosineAnnealingLR(o, 12)],
    ids=["lambda", "cosine"],
)
def test_the_learning_rate_of_a_graph_changes(schedule, lr, images):
    def optimizer(parameters):
        return Adam(parameters, lr=lr.to(DEVICE, copy=True) if isinstance(lr, torch.Tensor) else lr, fused=True)

    graph, eager = pair(noisy(), optimizer, schedule=schedule)
    moved = []
    for seed, batch in enumerate(batches(images, 12)):
        before = graph.model.mean.detach().clone()
        graph(batch, seed=seed)
        eager(batch, seed=seed)
        moved.append(float((graph.model.mean.detach() - before).abs().max()))
    assert captured(graph)
    assert moved[-1] < 0.1 * moved[0]
    for tensor, other in zip(graph.model.parameters(), eager.model.parameters(), strict=True):
        assert (tensor - other).norm() <= LOSS.rtol * other.norm()
    rate, other = (step.optimizer.param_groups[0]["lr"] for step in (graph, eager))
    assert float(rate) == pytest.approx(float(other), rel=1e-6)
    json.dumps(graph.state()[1])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("first", [1, 3, CAPTURE, 10])
def test_a_failed_step_within_a_graph_changes_nothing(optimizer, first, images):
    """Also as the step that makes the optimizer's state, and as the one that is captured."""
    graph, other = pair(noisy(), OPTIMIZERS[optimizer], ema_decay=0.9)
    data = [batch.float() for batch in batches(images, 14)]
    bad = torch.full_like(data[0], torch.nan)
    agree(graph, other, data[: first - 1])
    before = state(graph)
    values = graph(bad, seed=99)
    assert not values["loss"].isfinite()
    after = state(graph)
    # Made by this step where it was the first: nothing but zeros.
    same({name: after[name] for name in before}, before)
    assert all(not tensor.any() for name, tensor in after.items() if name not in before)
    assert graph.failed() == first
    for seed, batch in enumerate(data[first - 1 :], first - 1):
        same({name: value.clone() for name, value in graph(batch, seed=seed).items()}, other(batch, seed=seed))
    assert captured(graph)
    same(state(graph), state(other))
    assert graph.failed() == first
    assert graph.means() == other.means()


def test_float16_searches_its_scale_within_a_graph(images, monkeypatch):
    monkeypatch.setattr("genfast.training.step._GROWTH_INTERVAL", 5)
    graph, eager = pair(noisy(), amp_dtype=torch.float16, loss_options={"beta": 2e35})
    scales = []
    for seed, batch in enumerate(batches(images, 30)):
        graph(batch, seed=seed), eager(batch, seed=seed)
        scales.append(float(graph.state()[0]["scale"]))
        assert scales[-1] == float(eager.state()[0]["scale"])
    assert captured(graph)
    assert min(scales) < scales[0] or max(scales) > scales[0]
    same(state(graph), state(eager))
    assert graph.failed() == eager.failed()


def test_another_shape_runs_eagerly_in_between(images):
    graph, eager = pair(noisy(), ema_decay=0.9)
    sizes = [64, 64, 17, 64, 64, 64, 17, 5, 64, 17, 64]
    agree(graph, eager, [images[:size] for size in sizes])
    assert captured(graph)
    assert graph.means() == eager.means()
    # The results of a batch of its own shape are its own.
    own = graph(images[:17], seed=0)["loss"]
    kept = own.clone()
    graph(images[:64], seed=1)
    assert torch.equal(own, kept)


@pytest.mark.parametrize(
    ("kind", "at", "reason"),
    [(Waiting, CAPTURE - 1, "waits for the device"), (Refusing, CAPTURE, r"cannot be captured \(not in a graph\)")],
)
def test_a_loss_that_cannot_be_captured_trains_on(kind, at, reason, images):
    """One warning that says why; then torch, its random numbers and the current stream are as before."""
    graph, eager = pair(noisy(kind))
    data = batches(images, 12)
    agree(graph, eager, data[: at - 1])
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match=f"mode graph: the step {reason}") as found:
        agree(graph, eager, data[at - 1 : at], first=at - 1)
    assert len(found) == 1
    assert "previous error" not in str(found[0].message)
    assert torch.cuda.current_stream() == stream
    assert torch.rand(3, device=DEVICE).isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(graph, eager, data[at:], first=at)
        graph(data[0])
    assert not captured(graph)
    again, other = pair(noisy())
    agree(again, other, data)
    assert captured(again)


def test_what_a_graph_is_not_for(images):
    model = noisy()
    plain = Adam(model.parameters())
    with pytest.warns(UserWarning, match="mode graph: the optimizer, Adam, is not a fused one"):
        step = TrainStep(model, plain, mode="graph")
    assert step.mode == "eager"
    assert step(images[:BATCH], seed=0)["loss"].isfinite()
    assert TrainStep(model, plain, mode="auto").mode == "eager"
    # Python in somebody's own loss would stop running unasked.
    assert TrainStep(model, Adam(model.parameters(), fused=True), mode="auto").mode == "eager"
    known = vae()
    assert TrainStep(known, Adam(known.parameters(), fused=True), mode="auto").mode == "graph"


def test_a_graph_goes_on_from_a_checkpoint(images):
    def made():
        return pair(noisy(), schedule=lambda optimizer: LambdaLR(optimizer, lambda step: 0.9**step), ema_decay=0.9)[0]

    whole, begun, resumed = made(), made(), made()
    data = batches(images, 20)
    for seed, batch in enumerate(data[:9]):
        whole(batch, seed=seed), begun(batch, seed=seed)
    tensors, rest = begun.state()
    optimizer_tensors, optimizer_rest = optimizer_state(begun.optimizer)
    resumed.model.load_state_dict(begun.model.state_dict())
    resumed.ema.module.load_state_dict(begun.ema.module.state_dict())
    load_optimizer_state(resumed.optimizer, optimizer_tensors, json.loads(json.dumps(optimizer_rest)))
    resumed.load_state({name: tensor.cpu() for name, tensor in tensors.items()}, json.loads(json.dumps(rest)))
    agree(resumed, whole, data[9:], first=9)
    assert captured(resumed)
    assert resumed.means() == whole.means()


def test_a_checkpoint_is_taken_up_by_a_graph_that_runs(images):
    """State is written where the graph reads it."""
    graph, eager = pair(noisy())
    data = batches(images, 12)
    for seed, batch in enumerate(data[:6]):
        graph(batch, seed=seed)
    for step in (graph, eager):
        fresh = noisy()
        step.model.load_state_dict(fresh.state_dict())
        for tensor in optimizer_state(step.optimizer)[0].values():
            tensor.zero_()
    for seed, batch in enumerate(data[6:]):
        graph(batch, seed=seed), eager(batch, seed=seed)
    same(state(graph), state(eager))


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_device_memory_does_not_grow(mode, images, capsys):
    model = vae()
    feed = DeviceDataset(images, binarize="dynamic").feed(BATCH, seed=0)
    step = TrainStep(model, adam(model.parameters(), 1e-4), mode=mode, source=feed, grad_clip=1.0, ema_decay=0.99)

    def run(steps):
        torch.cuda.synchronize()
        asked = 0.0
        for index in range(steps):
            if index % feed.steps == 0:
                feed.start(1 + index // feed.steps)
            before = time.perf_counter()
            step()
            asked += time.perf_counter() - before
        torch.cuda.synchronize()
        return asked / steps

    run(100)
    gc.collect()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    per_step = run(1000)
    gc.collect()
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.memory_reserved() == reserved
    assert step.failed() == 0
    with capsys.disabled():
        print(f"\n{mode}: the host takes {1e6 * per_step:.0f} us a step")


@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("make", [noisy, vae])
def test_steps_do_not_wait_for_the_device(make, options, mode, images):
    model = make()
    optimizer = adam(model.parameters(), 1e-4)
    scheduler = LambdaLR(optimizer, lambda step: 0.99**step)
    step = TrainStep(model, optimizer, mode=mode, scheduler=scheduler, **OPTIONS[options])
    data = batches(images, 10)
    for seed, batch in enumerate(data):
        # Tables are made, kernels compiled and the graph captured before.
        torch.cuda.set_sync_debug_mode("error" if seed > CAPTURE else "default")
        try:
            step(batch, seed=seed)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert captured(step) == (mode == "graph")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            step.failed()
    finally:
        torch.cuda.set_sync_debug_mode("default")
