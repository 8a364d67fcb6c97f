"""`fit` and `evaluate`."""

import copy
import io
import math
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import genfast
from genfast.models import VAE, AutoEncoder
from genfast.training import Checkpoints, DeviceDataset, History, evaluate, load_dataset, read
from genfast.training.progress import Progress

TIMES = {"seconds", "images_per_second"}


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def small(family=VAE, **options):
    torch.manual_seed(0)
    return family(latent_dim=4, hidden_dims=(64,), **options)


def values(history):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in history]


def fit(model, data, **options):
    defaults = {"epochs": 2, "batch_size": 64, "seed": 1, "progress": False, "evaluate_every": 1}
    return genfast.fit(model, data, **{**defaults, **options})


def kinds(images):
    dataset = TensorDataset(images.float() / 255, torch.zeros(len(images)))
    return {
        "tensor": images,
        "without channels": images.squeeze(1),
        "device dataset": DeviceDataset(images, binarize="dynamic"),
        "dataset": dataset,
        "dataset of uint8": TensorDataset(images),
        "loader": DataLoader(dataset, 64, shuffle=True),
    }


@pytest.mark.parametrize("kind", kinds(torch.zeros(1, 1, 2, 2, dtype=torch.uint8)))
def test_every_kind_of_data_trains(kind, digits):
    model = small()
    history = fit(model, kinds(digits.train[:512])[kind], test_data=kinds(digits.test[:100])[kind], epochs=3)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    expected = {"epoch", "loss", "nll", "kl", "test_loss", "test_nll", "test_kl", "test_elbo", "grad_norm"} | TIMES
    assert all(set(row) == expected and all(map(math.isfinite, row.values())) for row in history)
    assert history[2]["loss"] < history[1]["loss"] < history[0]["loss"] < 600
    assert history[2]["test_loss"] < history[0]["test_loss"]
    for row in history:
        assert row["loss"] == pytest.approx(row["nll"] + row["kl"], rel=1e-5)
        assert row["test_elbo"] == pytest.approx(-row["test_loss"], rel=1e-5)
    assert model.training


def test_autoencoder_trains(digits):
    history = fit(small(AutoEncoder), digits.train[:512], test_data=digits.test[:64])
    assert set(history[0]) == {"epoch", "loss", "nll", "test_loss", "test_nll", "grad_norm"} | TIMES
    assert history[1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("kind", ["tensor", "device dataset", "dataset"])
def test_the_seed_alone_decides(kind, digits):
    runs = []
    for global_seed in (5, 6):
        model = small()
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        runs.append(values(fit(model, kinds(digits.train[:256])[kind], test_data=digits.test[:64])))
        assert torch.equal(torch.get_rng_state(), state)
    assert runs[0] == runs[1]
    assert values(fit(small(), kinds(digits.train[:256])[kind], test_data=digits.test[:64], seed=2)) != runs[0]


def test_every_step_has_the_noise_of_its_number():
    seen = []

    class Seeds(nn.Linear):
        def loss(self, x, *, seed, row_offset):
            if self.training:
                seen.append((int(seed), row_offset))
            return {"loss": self(x.float().flatten(1)).square().mean()}

    images = torch.zeros(11, 1, 2, 2, dtype=torch.uint8)
    for data in (images, TensorDataset(images), DataLoader(TensorDataset(images[:9]), 3)):
        seen.clear()
        fit(Seeds(4, 1), data, batch_size=3, epochs=3, test_data=images)
        assert seen == [(genfast.random.derive_seed(1, step), 0) for step in range(1, 10)]


def test_without_a_seed_torch_decides(digits):
    def run(global_seed):
        model = small()
        torch.manual_seed(global_seed)
        return values(fit(model, digits.train[:128], epochs=1, seed=None))

    assert run(5) == run(5)
    assert run(5) != run(6)


def test_history_is_the_mean_over_the_images(digits):
    model = small()
    untouched = torch.optim.SGD(model.parameters(), lr=0.0)
    history = fit(model, DataLoader(TensorDataset(digits.train[:100]), 64), epochs=1, optimizer=untouched)
    with torch.no_grad():
        nll = model.double().loss(digits.train[:100].double() / 255, seed=0)["nll"]
    # Other noise, so only nearly the same.
    assert history[0]["nll"] == pytest.approx(float(nll), rel=1e-2)


def test_own_optimizer_and_loss_options(digits):
    model = small()
    plain = fit(copy.deepcopy(model), digits.train[:256], epochs=1)
    heavy = fit(copy.deepcopy(model), digits.train[:256], epochs=1, loss_options={"beta": 50.0})
    assert heavy[0]["kl"] < plain[0]["kl"]
    before = copy.deepcopy(model.state_dict())
    fit(model, digits.train[:256], epochs=1, optimizer=torch.optim.SGD([model.fc4.bias], lr=1e-3))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fc4.bias"}


def test_on_epoch_sees_every_row_and_may_stop(digits):
    rows = []

    def stop_after_two(row):
        rows.append(row)
        if len(rows) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(small(), digits.train[:128], epochs=5, on_epoch=stop_after_two)
    assert [row["epoch"] for row in rows] == [1, 2]


def test_divergence_names_the_epoch(digits):
    rows = []
    with pytest.raises(FloatingPointError, match=r"step 2 \(epoch 1, batch 2 of 4, images \d+, .*\): the loss or a"):
        fit(small(), digits.train[:256], lr=1e20, on_epoch=rows.append)
    assert rows == []


class Marked(nn.Module):
    """Its loss is not finite for a batch with the image whose first pixel is white."""

    def __init__(self, value=0.0):
        super().__init__()
        self.weight, self.value = nn.Parameter(torch.zeros(())), value

    def loss(self, x, *, seed=None, row_offset=0):
        marked = (x[:, 0, 0, 0] == 255).any()
        return {"loss": (x.float().mean() / 255 - self.weight).square() + torch.where(marked, self.value, 0.0)}


@pytest.mark.parametrize("every", [1, None])
@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_names_step_batch_images_and_the_last_good_checkpoint(value, epoch, every, tmp_path):
    """However many steps later it is noticed."""
    images = torch.full((41, 1, 2, 2), 100, dtype=torch.uint8)
    # The one image that the first epoch leaves out is in the second.
    first, second = (DeviceDataset(images).permutation(1, epoch).tolist() for epoch in (1, 2))
    marked = first[13] if epoch == 1 else first[40]
    images[marked, 0, 0, 0] = 255
    batch = (first if epoch == 1 else second).index(marked) // 4
    step = 10 * (epoch - 1) + batch + 1
    rows, model = [], Marked(value)
    with pytest.raises(FloatingPointError) as diverged:
        fit(model, images, batch_size=4, checkpoints=tmp_path, checkpoint_every=every, keep=100, on_epoch=rows.append)
    shown = ", ".join(map(str, (first if epoch == 1 else second)[4 * batch : 4 * batch + 4]))
    good = step - 1 if every else 10 * (epoch - 1)
    last = f"the last good checkpoint is {tmp_path / f'step-{good:08d}'}" if good else "no checkpoint was written"
    assert str(diverged.value) == (
        f"step {step} (epoch {epoch}, batch {batch + 1} of 10, images {shown}): the loss or a gradient is NaN or "
        f"infinite; a smaller learning rate may help; {last}"
    )
    assert [row["epoch"] for row in rows] == list(range(1, epoch))
    assert model.weight.isfinite()
    assert Checkpoints(tmp_path).steps() == (list(range(1, step)) if every else [good] * (epoch - 1))
    if good:
        checkpoint = read(Checkpoints(tmp_path).latest())
        assert all(tensor.isfinite().all() for named in checkpoint.tensors.values() for tensor in named.values())
        # The same data, and a loss that is finite there: the run goes on to its end.
        healed = Marked()
        history = fit(healed, images, batch_size=4, checkpoints=tmp_path, resume=True)
        assert [row["epoch"] for row in history] == [1, 2]


class Drifting(nn.Module):
    """Trained with SGD at a rate of 1 it is at n after step n, and its test loss is smallest where it is 3."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(()))

    def loss(self, x, *, seed=None, row_offset=0):
        return {"loss": -self.place if self.training else (self.place - 3).square() + 1}


def drift(folder=None, steps=1, **options):
    model = Drifting()
    images = torch.zeros(2 * steps, 1, 2, 2, dtype=torch.uint8)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"epochs": 10, "batch_size": 2, "test_data": images, "optimizer": sgd, "checkpoints": folder, **options}
    return model, fit(model, images, **options)


def test_patience_ends_the_run_and_the_best_checkpoint_stays(tmp_path):
    model, history = drift(tmp_path, patience=2, keep=1)
    assert [row["test_loss"] for row in history] == [5, 2, 1, 2, 5]
    assert (history.reason, history.best_step) == ("early", 3)
    assert Checkpoints(tmp_path).steps() == [3, 5]
    assert read(tmp_path / "step-00000003").tensors["model"]["place"] == 3
    assert model.place.item() == 5
    # It stays early as long as nothing changes, and goes on with more patience.
    _, again = drift(tmp_path, patience=2, keep=1, resume=True)
    assert (again.reason, len(again), again.best_step) == ("early", 5, 3)
    _, longer = drift(tmp_path, patience=4, keep=1, resume=True)
    assert (longer.reason, [row["epoch"] for row in longer]) == ("early", [1, 2, 3, 4, 5, 6, 7])
    assert Checkpoints(tmp_path).steps() == [3, 7]
    _, rest = drift(tmp_path, resume=True, keep=1)
    assert (rest.reason, len(rest)) == ("finished", 10)


def test_patience_counts_on_over_a_resume(tmp_path):
    drift(tmp_path, patience=3, epochs=4)
    _, history = drift(tmp_path, patience=3, resume=True)
    assert (history.reason, len(history)) == ("early", 6)


def test_patience_counts_evaluations():
    _, history = drift(patience=2, evaluate_every=2)
    assert [row.get("test_loss") for row in history] == [None, 2, None, 2, None, 10]
    assert history.reason == "early"


def test_patience_that_ends_with_the_last_epoch_is_no_early_stop():
    _, history = drift(patience=2, epochs=5)
    assert (history.reason, len(history)) == ("finished", 5)
    with pytest.raises(ValueError, match="patience: expected test_data with it, got None"):
        drift(patience=2, test_data=None)
    with pytest.raises(ValueError, match="patience: expected a positive int, got 0"):
        drift(patience=0)


def test_a_time_limit_ends_the_run_within_an_epoch_and_resuming_makes_it_whole(tmp_path):
    _, whole = drift(steps=5, epochs=3)
    rows = []
    for reached in (1, 2):
        # Time is looked at after the first step.
        model, history = drift(tmp_path, steps=5, epochs=3, time_limit=1e-9, resume=True, on_epoch=rows.append)
        assert history.reason == "time"
        assert [row["epoch"] for row in history] == [0.2 * reached]
        assert history[0]["test_loss"] == (reached - 3) ** 2 + 1
        assert Checkpoints(tmp_path).steps()[-1] == reached == model.place.item()
        assert read(Checkpoints(tmp_path).latest()).state["history"] == []
    assert [row["epoch"] for row in rows] == [0.2, 0.4]
    _, history = drift(tmp_path, steps=5, epochs=3, resume=True)
    assert history.reason == "finished"
    assert values(history) == values(whole)


def test_a_time_limit_at_the_end_of_an_epoch(tmp_path):
    _, history = drift(tmp_path, time_limit=1e-9)
    assert (history.reason, [row["epoch"] for row in history]) == ("time", [1])
    assert len(read(Checkpoints(tmp_path).latest()).state["history"]) == 1
    _, history = drift(tmp_path, time_limit=1e-9, epochs=2, resume=True)
    assert (history.reason, [row["epoch"] for row in history]) == ("finished", [1, 2])
    with pytest.raises(ValueError, match=r"time_limit: expected a positive number of seconds, got 0\.0"):
        drift(time_limit=0.0)


def test_a_time_limit_without_checkpoints():
    _, history = drift(steps=5, time_limit=1e-9)
    assert (history.reason, [row["epoch"] for row in history]) == ("time", [0.2])
    assert isinstance(history, History)


def test_the_average_is_evaluated_and_returned(digits):
    plain, averaged = small(), small()
    options = {"test_data": digits.test[:64], "epochs": 1}
    trained = fit(plain, digits.train[:256], **options)
    history = fit(averaged, digits.train[:256], ema_decay=0.9, **options)
    assert history[0]["loss"] == trained[0]["loss"]
    assert history[0]["test_loss"] != trained[0]["test_loss"]
    scores = [evaluate(model, digits.test[:64], batch_size=64, seed=1)["loss"] for model in (plain, averaged)]
    assert scores == [trained[0]["test_loss"], history[0]["test_loss"]]


def test_the_average_is_returned_by_an_interrupted_run_too(digits, tmp_path):
    def stop(row):
        raise KeyboardInterrupt

    model = small()
    with pytest.raises(KeyboardInterrupt):
        fit(model, digits.train[:256], ema_decay=0.9, checkpoints=tmp_path, on_epoch=stop)
    saved = read(Checkpoints(tmp_path).latest()).tensors
    assert all(torch.equal(value, saved["model"][name]) for name, value in model.state_dict().items())
    assert not all(torch.equal(value, saved["raw"][name]) for name, value in model.state_dict().items())


class Recording(Drifting):
    """Notes the learning rate of every step, by how far it has gone."""

    def __init__(self):
        super().__init__()
        self.places = []

    def loss(self, x, *, seed=None, row_offset=0):
        self.places.append(self.place.item())
        return super().loss(x)


def rates(**options):
    model = Recording()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    fit(model, torch.zeros(10, 1, 2, 2, dtype=torch.uint8), batch_size=2, optimizer=sgd, **options)
    places = [*model.places, model.place.item()]
    return pytest.approx([after - before for before, after in pairwise(places)], abs=1e-5)


def test_learning_rates():
    assert rates() == [1] * 10
    assert rates(lr_schedule="linear") == [1 - step / 10 for step in range(10)]
    cosine = [(1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    assert rates(lr_schedule="cosine") == cosine
    rising = [1 / 5, 2 / 5, 3 / 5, 4 / 5]
    assert rates(warmup_steps=4) == rising + [1] * 6
    assert rates(warmup_steps=4, lr_schedule="linear") == rising + [1 - step / 6 for step in range(6)]
    with pytest.raises(ValueError, match="lr_schedule: expected one of constant, cosine, linear, got 'sine'"):
        rates(lr_schedule="sine")
    with pytest.raises(ValueError, match="warmup_steps: expected a non-negative int, got -1"):
        rates(warmup_steps=-1)


def test_fp32_products_have_their_precision_during_the_run_alone():
    seen = []
    for stop in (False, True):

        def on_epoch(row, stop=stop):
            seen.append(torch.get_float32_matmul_precision())
            if stop:
                raise KeyboardInterrupt

        try:
            drift(epochs=1, matmul_precision="high", on_epoch=on_epoch)
        except KeyboardInterrupt:
            assert stop
        assert torch.get_float32_matmul_precision() == "highest"
    assert seen == ["high", "high"]
    with pytest.raises(ValueError, match="matmul_precision: expected one of highest, high, medium, got 'low'"):
        drift(matmul_precision="low")


def test_channels_last(digits):
    model = VAE(latent_dim=2, hidden_dims=(4,), preset="conv")
    plain = copy.deepcopy(model)
    options = {"epochs": 1, "test_data": digits.test[:64]}
    rows = [fit(model, digits.train[:128], channels_last=True, **options), fit(plain, digits.train[:128], **options)]
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert rows[0][0]["test_loss"] == pytest.approx(rows[1][0]["test_loss"], rel=1e-4)


def test_divergence_in_the_last_step_shows_in_the_test(digits):
    with pytest.raises(FloatingPointError, match=r"epoch 1: test loss is (nan|inf)"):
        fit(small(), digits.train[:64], test_data=digits.test[:64], lr=1e20)


def test_progress_is_one_line_per_epoch(digits, capsys):
    history = fit(small(), digits.train[:128], progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert f"loss {history[1]['loss']:.2f}" in lines[1]
    assert lines[1].endswith("images/s")
    fit(small(), digits.train[:128])
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_of_an_epoch_begins_where_the_run_stands(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    with Progress(epochs=3, batches=5, show=True) as shown:
        shown.start_epoch(2, 3)
        shown.step({"loss": torch.tensor(1.0)}, images=8)
        assert (shown.bar.tasks[0].completed, shown.bar.tasks[0].total) == (4, 5)
        shown.start_epoch(3)
        assert shown.bar.tasks[0].completed == 0


def test_without_checkpoints_the_data_are_not_read_through(digits, tmp_path):
    class Huge(DeviceDataset):
        def digest(self):
            raise AssertionError

    assert len(fit(small(), Huge(digits.train[:64]))) == 2
    with pytest.raises(AssertionError):
        fit(small(), Huge(digits.train[:64]), checkpoints=tmp_path)


def test_evaluate_does_not_depend_on_the_batch_size(digits):
    model = small()
    results = [evaluate(model, digits.test[:100], batch_size=size, seed=3) for size in (1, 7, 64, 100)]
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-6)
    binary = DeviceDataset(digits.test[:100], binarize="dynamic")
    assert evaluate(model, binary, batch_size=7) == pytest.approx(evaluate(model, binary, batch_size=100), rel=1e-6)


def test_evaluate_counts_every_image_and_leaves_the_model_as_it_was(digits):
    model = small()
    elbo = model.eval().elbo(digits.test[:100], seed=genfast.random.derive_seed(0, 0)).mean().item()
    model.train()
    result = evaluate(model, digits.test[:100], batch_size=64)
    assert result["elbo"] == pytest.approx(elbo, rel=1e-6)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_errors(digits):
    images = digits.train[:64]
    with pytest.raises(ValueError, match="epochs: expected a positive int, got 0"):
        fit(small(), images, epochs=0)
    with pytest.raises(ValueError, match="batch_size: expected a positive int, got 0"):
        fit(small(), images, batch_size=0)
    with pytest.raises(ValueError, match=r"lr: expected a positive number, got -1\.0"):
        fit(small(), images, lr=-1.0)
    with pytest.raises(TypeError, match="images: expected a uint8 tensor"):
        fit(small(), images.float())
    with pytest.raises(TypeError, match="data: expected a uint8 image tensor"):
        fit(small(), "digits")
    with pytest.raises(ValueError, match="no images came"):
        fit(small(), DataLoader(TensorDataset(torch.zeros(0, 1, 28, 28))))
    with pytest.raises(ValueError, match="28"):
        fit(small(), images[:, :, :20])
