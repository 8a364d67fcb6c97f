"""`fit` and `evaluate`."""

import copy
import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import genfast
from genfast.models import VAE, AutoEncoder
from genfast.training import DeviceDataset, evaluate, load_dataset

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
    return genfast.fit(model, data, **{"epochs": 2, "batch_size": 64, "seed": 1, "progress": False, **options})


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
