"""One optimizer step: the same as written out by hand, whatever is asked of it."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, LinearLR, SequentialLR
from torch.utils._python_dispatch import TorchDispatchMode

from genfast import random
from genfast.cases import LOSS
from genfast.models import VAE
from genfast.training import DeviceDataset, TrainStep, load_dataset
from genfast.training.checkpoint import load_optimizer_state, optimizer_state

# Those that skip on the device, then those for which the host reads a flag.
FUSED = {
    "adam": lambda parameters: Adam(parameters, lr=0.01, fused=True),
    "amsgrad": lambda parameters: Adam(parameters, lr=0.01, amsgrad=True, fused=True),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True),
    "sgd": lambda parameters: SGD(parameters, lr=0.01, fused=True),
    "momentum": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9, fused=True),
    "nesterov": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, fused=True),
    "adagrad": lambda parameters: Adagrad(parameters, lr=0.01, fused=True),
}
READ = {
    "dampened": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9, dampening=0.5, fused=True),
    "rmsprop": lambda parameters: RMSprop(parameters, lr=0.01, momentum=0.9),
    "plain adam": lambda parameters: Adam(parameters, lr=0.01),
    "plain momentum": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9),
}
OPTIMIZERS = {**FUSED, **READ}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VAE(latent_dim=3, hidden_dims=(16,))


@pytest.fixture(scope="module")
def images():
    return load_dataset("digits").train[:128]


class Net(nn.Module):
    """Batch norm, noise, and every way to fail: which one, the batch decides."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        # No bias before the norm: its gradient is rounding alone, which Adam would magnify.
        self.first, self.norm, self.last = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.ones(()))
        self.noise = []

    def loss(self, x, *, seed, row_offset):
        noise = random.normal(seed, len(x), 2, random.Stream.LATENT, row_offset=row_offset)
        self.noise.append(noise)
        error = (self.last(self.norm(self.first(x))) - noise).float().square().mean()
        # Of a zero there is a root, but no slope.
        root = (self.scale * x[:, 0]).square().sqrt().mean()
        loss = error + 0.1 * root + torch.where(x.max() == 50, torch.inf, 0.0)
        return {"loss": torch.where(x.max() == 60, torch.inf, loss), "error": error}


def batches(count, rows=8):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(rows, 4, generator=generator) for _ in range(count)]


def bad_batch(kind):
    batch = batches(1)[0]
    if kind == "a NaN image":
        batch[3, 2] = torch.nan
    if kind == "an infinite image":
        batch[0, 0] = torch.inf
    if kind == "NaN gradients of a finite loss":
        batch[:, 0] = 0.0
    if kind == "an infinite loss with finite gradients":
        batch[1, 1] = 50
    if kind == "an infinite loss with zero gradients":
        batch[1, 1] = 60
    return batch


BAD = (
    "a NaN image",
    "an infinite image",
    "NaN gradients of a finite loss",
    "an infinite loss with finite gradients",
    "an infinite loss with zero gradients",
)


def everything(step):
    """All that a step may change, but for what counts steps."""
    found = {f"model.{name}": tensor for name, tensor in step.model.state_dict().items()}
    found |= {f"optimizer.{name}": tensor for name, tensor in optimizer_state(step.optimizer)[0].items()}
    if step.ema is not None:
        found |= {f"ema.{name}": tensor for name, tensor in step.ema.module.state_dict().items()}
        found["ema updates"] = step.ema.updates
    return {name: tensor.clone() for name, tensor in found.items()}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name


def close(found, wanted):
    for tensor, other in zip(found, wanted, strict=True):
        assert (tensor - other).norm() <= LOSS.rtol * other.norm()


def test_equals_a_hand_written_step(model, images):
    by_hand = copy.deepcopy(model)
    step = TrainStep(model, Adam(model.parameters(), lr=1e-2), loss_options={"beta": 3.0})
    optimizer = Adam(by_hand.parameters(), lr=1e-2)
    for seed in range(3):
        parts = step(images, seed=seed, row_offset=5)
        optimizer.zero_grad()
        loss = by_hand.loss(images, beta=3.0, seed=seed, row_offset=5)["loss"]
        loss.backward()
        optimizer.step()
        assert torch.equal(parts["loss"], loss.detach())
        assert not any(value.requires_grad for value in parts.values())
    for parameter, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_an_int_seed_and_a_tensor_seed_are_the_same(model, images):
    other = copy.deepcopy(model)
    first = TrainStep(model, SGD(model.parameters(), lr=0.1))(images, seed=7)
    second = TrainStep(other, SGD(other.parameters(), lr=0.1))(images, seed=torch.tensor([7]))
    assert torch.equal(first["loss"], second["loss"])


def test_any_module_with_a_loss_gets_its_seed_as_a_tensor():
    class Shift(nn.Linear):
        def loss(self, x, *, seed, row_offset, scale):
            assert seed.dtype == torch.int64
            assert seed.tolist() == [7]
            return {"loss": scale * self(x).square().mean(), "rows": torch.tensor(row_offset)}

    shift = Shift(2, 2)
    step = TrainStep(shift, SGD(shift.parameters(), lr=0.1), loss_options={"scale": 2.0})
    assert set(step(torch.ones(4, 2), seed=7)) == {"loss", "rows", "grad_norm"}


def test_without_a_seed_torch_decides(model, images):
    step = TrainStep(model, SGD(model.parameters(), lr=0.0))
    torch.manual_seed(1)
    first, other = step(images)["nll"], step(images)["nll"]
    torch.manual_seed(1)
    assert torch.equal(step(images)["nll"], first)
    assert not torch.equal(other, first)


class TestFailedSteps:
    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_change_nothing(self, optimizer, bad, poisoned):
        """Nor does anything differ afterwards, also where the failed step was the first one."""
        first, second = batches(2)
        for before in ([first], []):
            nets = Net(), Net()
            steps = [TrainStep(net, OPTIMIZERS[optimizer](net.parameters()), ema_decay=0.9) for net in nets]
            for batch in before:
                for step in steps:
                    step(batch, seed=1)
            state = everything(steps[0])
            for _ in range(2):
                parts = steps[0](bad_batch(bad), seed=2)
            changed = everything(steps[0])
            if not before:
                # The optimizer has made its state by now.
                state |= {name: tensor for name, tensor in changed.items() if name not in state}
            same(changed, state)
            assert not (parts["loss"].isfinite() and parts["grad_norm"].isfinite())
            # What the other processes would learn of it.
            assert parts["grad_norm"].isnan() or bad == "an infinite loss with zero gradients"
            after = [step(second, seed=3) for step in steps]
            assert torch.equal(after[0]["loss"], after[1]["loss"])
            same(everything(steps[0]), everything(steps[1]))
            assert not torch.equal(everything(steps[0])["model.last.weight"], state["model.last.weight"])
            assert steps[0].failed() == len(before) + 1
            assert steps[1].failed() == 0
            assert steps[0].means() == steps[1].means()

    def test_the_first_one_is_named_and_stays_so(self):
        net = Net()
        step = TrainStep(net, SGD(net.parameters(), lr=0.01, fused=True))
        seen = []
        good = batches(1)[0]
        for batch in (good, good, bad_batch(BAD[0]), good, bad_batch(BAD[2])):
            step(batch, seed=0)
            seen.append(step.failed())
        assert seen == [0, 0, 3, 3, 3]

    def test_do_not_count_in_means(self):
        net = Net()
        step = TrainStep(net, SGD(net.parameters(), lr=0.01, fused=True))
        sizes, losses = (8, 4), []
        for batch, size in zip(batches(2), sizes, strict=True):
            losses.append(float(step(batch[:size], seed=0)["loss"]))
            step(bad_batch(BAD[0]), seed=0)
        means = step.means()
        assert means["images"] == 12
        assert means["loss"] == pytest.approx((8 * losses[0] + 4 * losses[1]) / 12, rel=1e-12)
        step(bad_batch(BAD[0]), seed=0)
        means = step.means()
        assert means["images"] == 0
        assert means["loss"] != means["loss"]


def test_means_begin_anew_and_want_a_step(model, images):
    step = TrainStep(model, SGD(model.parameters(), lr=0.01))
    with pytest.raises(ValueError, match="means: expected a step before it, got none"):
        step.means()
    first, second = step(images, seed=0), step(images, seed=1)
    want = {name: (float(first[name]) + float(second[name])) / 2 for name in ("loss", "nll", "kl", "grad_norm")}
    assert step.means() == pytest.approx({**want, "images": 256}, rel=1e-12)
    third = step(images[:5], seed=2)
    assert step.means() == {**{name: float(value) for name, value in third.items()}, "images": 5}


class TestMicroBatches:
    def test_draw_the_noise_of_their_rows(self):
        (batch,) = batches(1, rows=11)
        noise = {}
        for count in (1, 4, 11, 100):
            net = Net()
            net.norm = nn.Identity()
            TrainStep(net, SGD(net.parameters(), lr=0.1), micro_batches=count)(batch, seed=3, row_offset=17)
            assert len(net.noise) == min(count, 11)
            noise[count] = torch.cat(net.noise)
        assert all(torch.equal(rows, noise[1]) for rows in noise.values())
        assert torch.equal(noise[1], random.normal(3, 11, 2, random.Stream.LATENT, row_offset=17))

    @pytest.mark.parametrize(("rows", "count"), [(128, 4), (128, 3), (7, 3)])
    def test_have_the_loss_and_gradients_of_the_whole(self, model, images, rows, count):
        other = copy.deepcopy(model)
        whole = TrainStep(model, SGD(model.parameters(), lr=0.0))(images[:rows], seed=4, row_offset=9)
        step = TrainStep(other, SGD(other.parameters(), lr=0.0), micro_batches=count)
        pieces = step(images[:rows], seed=4, row_offset=9)
        assert pieces.keys() == whole.keys()
        for name, part in pieces.items():
            assert LOSS.excess(part, whole[name]) <= 1, name
        close([p.grad for p in other.parameters()], [p.grad for p in model.parameters()])
        assert step.means() == {**{name: float(part) for name, part in pieces.items()}, "images": rows}

    def test_fail_together(self):
        net = Net()
        step = TrainStep(net, Adam(net.parameters(), fused=True), micro_batches=4, ema_decay=0.9)
        (batch,) = batches(1)
        step(batch, seed=0)
        state = everything(step)
        batch[3] = torch.nan
        step(batch, seed=1)
        same(everything(step), state)
        assert step.failed() == 2


class TestClipping:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("amp_dtype", [None, torch.float16], ids=str)
    def test_equals_torchs_and_tells_the_norm(self, optimizer, amp_dtype, monkeypatch):
        monkeypatch.setattr("genfast.training.step._INITIAL_SCALE", 2.0**10)
        net, by_hand = Net(), Net()
        step = TrainStep(net, OPTIMIZERS[optimizer](net.parameters()), grad_clip=0.2, amp_dtype=amp_dtype)
        plain = OPTIMIZERS[optimizer](by_hand.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=amp_dtype is not None)
        for seed, batch in enumerate(batches(3)):
            parts = step(batch, seed=seed)
            plain.zero_grad()
            with torch.autocast("cpu", amp_dtype, enabled=amp_dtype is not None):
                loss = by_hand.loss(batch, seed=torch.tensor([seed]), row_offset=0)["loss"]
            scaler.scale(loss).backward()
            scaler.unscale_(plain)
            norm = nn.utils.clip_grad_norm_(by_hand.parameters(), 0.2)
            assert norm > 0.4
            scaler.step(plain)
            scaler.update()
            assert LOSS.excess(parts["grad_norm"], norm) <= 1
        assert step.failed() == 0
        close(net.parameters(), by_hand.parameters())

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_leaves_smaller_gradients_as_they_are(self, optimizer):
        nets = Net(), Net()
        steps = [
            TrainStep(net, OPTIMIZERS[optimizer](net.parameters()), grad_clip=clip)
            for net, clip in zip(nets, (None, 1e3), strict=True)
        ]
        for seed, batch in enumerate(batches(2)):
            first, second = (step(batch, seed=seed) for step in steps)
            assert torch.equal(first["grad_norm"], second["grad_norm"])
        same(everything(steps[0]), everything(steps[1]))


class TestAutocast:
    def test_bfloat16_equals_a_hand_written_loop(self):
        net, by_hand = Net(), Net()
        seen = []
        net.last.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        step = TrainStep(net, Adam(net.parameters(), fused=True), amp_dtype=torch.bfloat16)
        optimizer = Adam(by_hand.parameters(), fused=True)
        for seed, batch in enumerate(batches(3)):
            parts = step(batch, seed=seed)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = by_hand.loss(batch, seed=torch.tensor([seed]), row_offset=0)["loss"]
            loss.backward()
            optimizer.step()
            assert torch.equal(parts["loss"], loss.detach())
        assert seen == 3 * [torch.bfloat16]
        assert net.last.weight.dtype == torch.float32
        same(net.state_dict(), by_hand.state_dict())

    @pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "plain adam", "plain momentum", "rmsprop"])
    def test_float16_equals_torchs_scaler(self, optimizer, monkeypatch):
        """The scale is halved on overflow, when the step is skipped, and doubled after an interval without any."""
        monkeypatch.setattr("genfast.training.step._GROWTH_INTERVAL", 4)
        net, by_hand = Net(), Net()
        step = TrainStep(net, OPTIMIZERS[optimizer](net.parameters()), amp_dtype=torch.float16)
        plain = OPTIMIZERS[optimizer](by_hand.parameters())
        scaler = torch.amp.GradScaler("cpu", growth_interval=4)
        scales = [scaler.get_scale()]
        for seed, batch in enumerate(batches(24)):
            before = everything(step)
            # Large: they overflow at the scale that it begins with.
            parts = step(batch * 8, seed=seed)
            plain.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = by_hand.loss(batch * 8, seed=torch.tensor([seed]), row_offset=0)["loss"]
            scaler.scale(loss).backward()
            scaler.step(plain)
            scaler.update()
            scales.append(scaler.get_scale())
            assert step.state()[0]["scale"] == scales[-1]
            skipped = scales[-1] < scales[-2]
            assert parts["grad_norm"].isfinite() != skipped
            if skipped and seed > 0:
                same(everything(step), before)
        same(dict(net.named_parameters()), dict(by_hand.named_parameters()))
        assert {new / old for old, new in pairwise(scales)} == {0.5, 1.0, 2.0}
        assert step.failed() == 0

    def test_float16_gives_up_where_no_scale_helps(self):
        net = Net()
        step = TrainStep(net, Adam(net.parameters(), fused=True), amp_dtype=torch.float16)
        failed = []
        for seed in range(33):
            parts = step(bad_batch("NaN gradients of a finite loss"), seed=seed)
            assert parts["loss"].isfinite()
            failed.append(step.failed())
        # 2^16 halved 31 times is the first below 2^-14.
        assert failed == 30 * [0] + 3 * [31]

    def test_float16_does_not_try_a_loss_that_is_infinite_again(self):
        net = Net()
        step = TrainStep(net, Adam(net.parameters(), fused=True), amp_dtype=torch.float16)
        step(bad_batch("an infinite loss with finite gradients"), seed=0)
        assert step.failed() == 1


SCHEDULES = {
    "exponential": lambda optimizer: ExponentialLR(optimizer, 0.5),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 4),
    "two": lambda optimizer: SequentialLR(optimizer, [LinearLR(optimizer), ExponentialLR(optimizer, 0.5)], [2]),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
def test_the_scheduler_is_stepped(schedule, kind):
    net, by_hand = Net(), Net()
    optimizers = [AdamW(module.parameters(), lr=kind(0.1), fused=True) for module in (net, by_hand)]
    schedulers = [SCHEDULES[schedule](optimizer) for optimizer in optimizers]
    step = TrainStep(net, optimizers[0], scheduler=schedulers[0])
    rates = []
    for seed, batch in enumerate(batches(4)):
        rates.append(float(optimizers[0].param_groups[0]["lr"]))
        step(batch, seed=seed)
        optimizers[1].zero_grad()
        by_hand.loss(batch, seed=torch.tensor([seed]), row_offset=0)["loss"].backward()
        optimizers[1].step()
        schedulers[1].step()
    assert len(set(rates)) == 4
    same(net.state_dict(), by_hand.state_dict())


class TestState:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("lr", [float, torch.tensor], ids=["number", "tensor"])
    def test_continues_bit_for_bit(self, optimizer, lr):
        def made():
            net = Net()
            plain = OPTIMIZERS[optimizer](net.parameters())
            if plain.param_groups[0].get("fused"):
                plain.param_groups[0]["lr"] = lr(0.01)
            return TrainStep(
                net, plain, scheduler=LambdaLR(plain, lambda step: 0.9**step), ema_decay=0.9,
                amp_dtype=torch.float16, grad_clip=0.5,
            )  # fmt: skip

        def run(step, first, last):
            data = batches(8)
            data[1] = bad_batch("an infinite image")
            return [step(data[seed], seed=seed)["loss"] for seed in range(first, last)]

        whole, begun, resumed = made(), made(), made()
        run(whole, 0, 4)
        losses = run(whole, 4, 8)
        run(begun, 0, 4)
        tensors, rest = begun.state()
        optimizer_tensors, optimizer_rest = optimizer_state(begun.optimizer)
        resumed.model.load_state_dict(begun.model.state_dict())
        resumed.ema.module.load_state_dict(begun.ema.module.state_dict())
        load_optimizer_state(resumed.optimizer, optimizer_tensors, json.loads(json.dumps(optimizer_rest)))
        resumed.load_state({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(rest)))
        assert all(map(torch.equal, run(resumed, 4, 8), losses))
        same(everything(resumed), everything(whole))
        same(resumed.state()[0], whole.state()[0])
        assert resumed.failed() == 2
        assert resumed.means() == whole.means()
        assert float(resumed.optimizer.param_groups[0]["lr"]) == float(whole.optimizer.param_groups[0]["lr"])

    def test_before_the_first_step(self, model, images):
        step = TrainStep(model, SGD(model.parameters(), lr=0.1))
        step.load_state(*step.state())
        step(images, seed=0)
        assert step.means()["images"] == 128


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
def test_a_source_gives_the_batches_seeds_and_rows(model, images, binarize):
    data = DeviceDataset(images, binarize=binarize)
    feed = data.feed(48, seed=5, shard=(1, 2))
    steps = []
    for source in (feed, None):
        other = copy.deepcopy(model)
        steps.append(TrainStep(other, Adam(other.parameters(), fused=True), source=source))
    fed, plain = steps
    for epoch, first in ((1, 0), (2, 0), (3, 1)):
        feed.start(epoch, first)
        options = {"seed": 5, "epoch": epoch, "drop_last": True, "shard": (1, 2), "first": first}
        for index, (batch, _) in enumerate(data.batches(48, **options), first):
            seed = random.derive_seed(5, (epoch - 1) * 2 + index + 1)
            got, want = fed(), plain(batch, seed=seed, row_offset=24)
            assert got.keys() == want.keys()
            assert all(torch.equal(got[name], want[name]) for name in want)
    same(everything(fed), everything(plain))
    assert fed.means() == plain.means()


def test_a_batch_goes_before_the_source(model, images):
    feed = DeviceDataset(images).feed(32, seed=0)
    feed.start(1)
    step, other = TrainStep(model, SGD(model.parameters(), lr=0.0), source=feed), copy.deepcopy(model)
    want = TrainStep(other, SGD(other.parameters(), lr=0.0))(images[:7], seed=1)
    assert torch.equal(step(images[:7], seed=1)["loss"], want["loss"])
    assert torch.equal(feed.take()[0], next(DeviceDataset(images).batches(32, seed=0, epoch=1))[0])


class Asked(TorchDispatchMode):
    """The ops that wait for a device: they bring a value, or a shape that depends on one, to the host."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        tensors = [value for value in torch.utils._pytree.tree_leaves(result) if isinstance(value, torch.Tensor)]
        plain = not tensors and result is not None and any(isinstance(arg, torch.Tensor) for arg in args)
        if plain or func.overloadpacket in (torch.ops.aten.nonzero, torch.ops.aten.masked_select):
            self.asked.append(func)
        return result


class Plain(nn.Linear):
    """Its loss asks for nothing."""

    def __init__(self):
        super().__init__(4, 3)
        self.norm = nn.BatchNorm1d(3)

    def loss(self, x, *, seed, row_offset):
        return {"loss": self.norm(self(x)).float().square().mean() + self.weight.square().sum(), "x": x.mean()}


DEMANDS = {
    "nothing": {},
    "all": {"micro_batches": 2, "grad_clip": 0.1, "amp_dtype": torch.float16, "ema_decay": 0.9},
}


@pytest.mark.parametrize("demand", DEMANDS)
# Plain Adam's step counter is on the host, where reading it is no wait; fused Adagrad is for CPUs alone.
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name not in ("plain adam", "adagrad")])
def test_a_step_does_not_wait_for_the_device(optimizer, demand):
    net = Plain()
    plain = OPTIMIZERS[optimizer](net.parameters())
    step = TrainStep(net, plain, scheduler=ExponentialLR(plain, 0.9), **DEMANDS[demand])
    seed = torch.tensor([1])
    for batch in (*batches(2), torch.full((8, 4), torch.nan)):
        with Asked() as calls:
            step(batch, seed=seed)
        # Whether to step, and by what to divide.
        reads = 0 if optimizer in FUSED else 1 + (demand == "all" and batch.isfinite().all())
        assert len(calls.asked) == reads, calls.asked


class TestModes:
    def test_a_graph_needs_a_gpu(self, model):
        with pytest.raises(ValueError, match="mode: expected a model on a CUDA device for 'graph', got one on cpu"):
            TrainStep(model, Adam(model.parameters(), fused=True), mode="graph")

    def test_auto_is_eager_on_a_cpu(self, model, images):
        optimizer = Adam(model.parameters(), fused=True)
        step = TrainStep(model, optimizer, mode="auto")
        assert step.mode == "eager"
        assert isinstance(optimizer.param_groups[0]["lr"], float)
        assert step(images, seed=0)["loss"].isfinite()

    def test_a_compiled_step_is_compiled_once_for_all_seeds(self, model, images):
        eager = copy.deepcopy(model)
        step = TrainStep(model, SGD(model.parameters(), lr=1e-3), compile=True)
        reference = TrainStep(eager, SGD(eager.parameters(), lr=1e-3))
        assert step(images, seed=0)["loss"] == pytest.approx(float(reference(images, seed=0)["loss"]), rel=1e-4)
        with torch.compiler.set_stance("fail_on_recompile"):
            for seed in (1, 2):
                compiled, plain = step(images, seed=seed), reference(images, seed=seed)
                assert float(compiled["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-4)

    def test_compiles_the_loss_of_any_module_once(self):
        class Traced(nn.Linear):
            def loss(self, x, *, seed, row_offset):
                return {"loss": (self(x) - seed).float().square().mean()}

        net = Traced(4, 3)
        other = copy.deepcopy(net)
        options = {"micro_batches": 2, "amp_dtype": torch.float16}
        torch._dynamo.utils.counters.clear()
        step = TrainStep(net, Adam(net.parameters(), fused=True), mode="compile", **options)
        reference = TrainStep(other, Adam(other.parameters(), fused=True), **options)
        assert step.mode == "eager"
        data = batches(4)
        step(data[0], seed=0), reference(data[0], seed=0)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        with torch.compiler.set_stance("fail_on_recompile"):
            for seed, batch in enumerate(data[1:], 1):
                loss = float(step(batch, seed=seed)["loss"])
                assert loss == pytest.approx(float(reference(batch, seed=seed)["loss"]), rel=1e-2)
        with pytest.raises(RuntimeError, match="fail_on_recompile"), torch.compiler.set_stance("fail_on_recompile"):
            step(data[0].double(), seed=0)


def test_errors(model, images):
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="grad_clip: expected a positive number or None, got 0"):
        TrainStep(model, optimizer, grad_clip=0)
    with pytest.raises(ValueError, match="amp_dtype: expected"):
        TrainStep(model, optimizer, amp_dtype=torch.int8)
    with pytest.raises(ValueError, match="mode: expected one of auto, eager, compile, graph, got 'fast'"):
        TrainStep(model, optimizer, mode="fast")
    with pytest.raises(ValueError, match="micro_batches: expected a positive int, got 0"):
        TrainStep(model, optimizer, micro_batches=0)
    with pytest.raises(ValueError, match="ema_decay: expected a number between 0 and 1, got 1"):
        TrainStep(model, optimizer, ema_decay=1)
    step = TrainStep(model, optimizer)
    with pytest.raises(ValueError, match="batch: expected a tensor where the step has no source, got None"):
        step()
    with pytest.raises(ValueError, match=r"batch: expected at least one row, got shape \[0, 1, 28, 28\]"):
        step(images[:0])
