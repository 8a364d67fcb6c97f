"""Networks that take turns within a step: the same as a loop with an optimizer for each."""

import copy

import pytest
import torch
from torch.optim import SGD, Adam

import genfast
from genfast.cases import LOSS
from genfast.training import DeviceDataset, Interrupted, TrainStep, load_dataset
from tests.training.turns import Duel, batches


def by_hand(model, images, lr=0.01, grad_clip=None):
    """An optimizer for each network, and what the steps had for parts."""
    optimizers = {name: Adam(getattr(model, name).parameters(), lr=lr, fused=True) for name in ("first", "second")}
    rows = []
    for step, x in enumerate(images):
        row = {"loss": 0.0, "grad_norm": 0.0}
        for turn in model.turns(step):
            own = list(model.turn_parameters(turn))
            parts = model.loss(x, turn=turn, seed=torch.tensor([step]), row_offset=0)
            grads = torch.autograd.grad(parts["loss"], own)
            norm = torch.stack([grad.norm() for grad in grads]).norm()
            scale = 1.0 if grad_clip is None else min(1.0, grad_clip / float(norm))
            for parameter, grad in zip(own, grads, strict=True):
                parameter.grad = grad * scale
            optimizers[turn.split()[0]].step()
            row |= {name: float(value.detach()) for name, value in parts.items() if name != "loss"}
            row["loss"] += float(parts["loss"].detach())
            row["grad_norm"] = (row["grad_norm"] ** 2 + float(norm) ** 2) ** 0.5
        rows.append(row)
    return rows


def adam(model):
    return Adam(model.parameters(), lr=0.01, fused=True)


def assert_same(model, other, rtol=0.0):
    for (name, weight), (_, want) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(weight, want, rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("pieces", [1, 2])
def test_equals_a_loop_with_an_optimizer_each(clip, pieces):
    model, images = Duel(), batches(7)
    other = copy.deepcopy(model)
    step = TrainStep(model, adam(model), grad_clip=clip, micro_batches=pieces)
    rows = [{name: float(v) for name, v in step(x, seed=i).items()} for i, x in enumerate(images)]
    expected = by_hand(other, images, grad_clip=clip)
    for row, want in zip(rows, expected, strict=True):
        assert row == pytest.approx(want, rel=LOSS.rtol)
    assert model.asked == other.asked == list(range(7))
    for name in ("first", "second"):
        assert_same(getattr(model, name), getattr(other, name), rtol=LOSS.rtol)
    assert model.first.weight.requires_grad
    assert model.second.weight.requires_grad


def test_means_count_each_part_where_it_was():
    model = Duel()
    step = TrainStep(model, adam(model))
    rows = [step(x, seed=i) for i, x in enumerate(batches(4))] + [step(batches(1, rows=2)[0], seed=4)]
    means = step.means()
    weights = [8, 8, 8, 8, 2]
    assert means["images"] == sum(weights)
    for name in ("loss", "grad_norm", "first_error", "second_error"):
        had = [(float(row[name]), weight) for row, weight in zip(rows, weights, strict=True) if name in row]
        want = sum(value * weight for value, weight in had) / sum(weight for _, weight in had)
        assert means[name] == pytest.approx(want, rel=LOSS.rtol)
    assert "second_error" not in rows[2]


def test_a_turn_that_fails_changes_nothing_and_is_told():
    model = Duel()
    step = TrainStep(model, adam(model), ema_decay=0.5)
    good, bad = batches(2)
    bad[0, 0] = 60
    step(good, seed=0)
    before, averaged = copy.deepcopy(model), copy.deepcopy(step.ema.module.second)
    # The third batch of turns is of `first` alone, which does not mind.
    for number in (1, 2):
        step(bad, seed=number)
        assert step.failed() == 2
        assert_same(model.second, before.second)
        # Its loss came as far as the statistics of a batch norm.
        assert_same(model.norm, before.norm)
        assert bool((model.first.weight != before.first.weight).any())
        # Nor is a step without a turn of `second` an update of its average.
        assert_same(step.ema.module.second, averaged)


def test_only_what_is_named_is_averaged():
    model = Duel()
    step = TrainStep(model, adam(model), ema_decay=0.5)
    for i, x in enumerate(batches(3)):
        step(x, seed=i)
    assert_same(step.ema.module.first, model.first)
    assert_same(step.ema.module.norm, model.norm)
    assert bool((step.ema.module.second.weight != model.second.weight).any())


def test_a_resumed_run_is_bit_for_bit_the_whole_one(tmp_path):
    images = load_dataset("digits").train[:80]
    options = {"epochs": 3, "batch_size": 16, "seed": 3, "progress": False, "ema_decay": 0.9}
    whole, model = Duel(), Duel()
    history = genfast.fit(whole, images, **options)

    def stop(row):
        if row["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        genfast.fit(model, images, checkpoints=tmp_path, checkpoint_every=2, on_epoch=stop, **options)
    assert max(path.name for path in tmp_path.iterdir()) == "step-00000004"
    resumed = Duel()
    again = genfast.fit(resumed, images, checkpoints=tmp_path, checkpoint_every=2, resume=True, **options)
    assert_same(resumed, whole)
    parts = ("loss", "first_error", "second_error", "grad_norm")
    assert [[row[name] for name in parts] for row in again] == [[row[name] for name in parts] for row in history]


def test_means_go_on_where_a_run_goes_on_within_an_epoch():
    model, images = Duel(), batches(5)
    whole = TrainStep(model, adam(model))
    half_model = copy.deepcopy(model)
    for i, x in enumerate(images):
        whole(x, seed=i)
    half = TrainStep(half_model, adam(half_model))
    for i, x in enumerate(images[:3]):
        half(x, seed=i)
    rest_model = copy.deepcopy(half_model)
    optimizer = adam(rest_model)
    optimizer.load_state_dict(copy.deepcopy(half.optimizer.state_dict()))
    rest = TrainStep(rest_model, optimizer)
    rest.load_state(*half.state())
    for i, x in enumerate(images[3:], start=3):
        rest(x, seed=i)
    assert rest_model.asked[-2:] == [3, 4]
    assert rest.means() == whole.means()
    assert_same(rest_model, model)


def test_a_checkpoint_of_before_there_were_turns_goes_on():
    class One(torch.nn.Linear):
        def loss(self, x, *, seed, row_offset):
            return {"loss": self(x).square().mean()}

    model = One(784, 3)
    step = TrainStep(model, SGD(model.parameters(), lr=0.0))
    step(batches(1)[0], seed=0)
    tensors, rest = step.state()
    again = TrainStep(model, SGD(model.parameters(), lr=0.0))
    again.load_state(tensors, {**rest, "names": rest["names"][""]})
    assert again.means() == step.means()


def test_a_state_is_taken_up_where_a_graph_would_go_on_writing():
    model = Duel()
    step = TrainStep(model, adam(model))
    step(batches(1)[0], seed=0)
    begun = {turns: sums.clone() for turns, sums in step._sums.items()}
    tensors, rest = step.state()
    for i, x in enumerate(batches(3)[1:], start=1):
        step(x, seed=i)
    held = dict(step._sums)
    assert len(held) == 3
    step.load_state({name: tensor.clone() for name, tensor in tensors.items()}, rest)
    for turns, sums in held.items():
        assert step._sums[turns] is sums
        assert torch.equal(sums, begun.get(turns, torch.zeros_like(sums)))


def test_plain_optimizers_too():
    model = Duel()
    other = copy.deepcopy(model)
    images = batches(3)
    step = TrainStep(model, SGD(model.parameters(), lr=0.01, momentum=0.5))
    optimizers = {name: SGD(getattr(other, name).parameters(), lr=0.01, momentum=0.5) for name in ("first", "second")}
    for i, x in enumerate(images):
        step(x, seed=i)
        for turn in other.turns(i):
            own = other.turn_parameters(turn)
            other.zero_grad()
            loss = other.loss(x, turn=turn, seed=torch.tensor([i]), row_offset=0)["loss"]
            for parameter, grad in zip(own, torch.autograd.grad(loss, own), strict=True):
                parameter.grad = grad
            optimizers[turn.split()[0]].step()
    assert_same(model, other)


def test_what_a_model_says_of_its_training_is_shown_and_kept(capsys):
    class Worried(Duel):
        def diagnose(self, row, steps):
            assert steps == 2 * row["epoch"]
            return "too calm" if row["epoch"] == 2 else None

    history = genfast.fit(Worried(), DeviceDataset(load_dataset("digits").train[:32]), epochs=2, batch_size=16, seed=0)
    assert [row.get("warning") for row in history] == [None, "too calm"]
    assert capsys.readouterr().out.splitlines()[-1] == "epoch 2: too calm"
