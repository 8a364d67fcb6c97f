"""Flows on the command line: training, its pictures and metrics, samples, and bits per dimension."""

import json
import shutil

import numpy as np
import pytest
import torch

import genfast
from genfast.models import VAE, FlowPlusPlus, Glow, RealNVP, registry
from genfast.training import DeviceDataset, evaluation_seed, load_dataset
from tests.commands import contents, fails, names, rows_of, succeeds, tiles, write_images

PICTURES = {"samples.png", "interpolation.png", "curves.png"}
FILES = PICTURES | {"config.json", "model.safetensors", "checkpoints", "run.json", "metrics.jsonl"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """36 + 4 images."""
    return write_images(tmp_path_factory.mktemp("data") / "images", count=40, size=(8, 8))


def train(data, out, *options):
    return ("train", "flow", "--data", data, "--out", out, "--epochs", 2, "--batch-size", 18, *options)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    command = train(data, folder)
    assert genfast.__main__.main([str(word) for word in command]) == 0
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def held_out(data):
    return load_dataset(str(data)).test


def test_train_writes_everything(data, trained, tmp_path, capsys):
    printed = succeeds(capsys, *train(data, tmp_path / "run")).splitlines()
    folder = tmp_path / "run"
    assert names(folder) == FILES
    assert " bits per dim " in printed[1]
    assert " test bits per dim " in printed[2]
    assert printed[-1] == f"finished: {folder}"
    assert contents(folder)[next(iter(folder.glob("samples.png"))).relative_to(folder)] == (
        (trained / "samples.png").read_bytes()
    )
    history = rows_of(folder)
    for row in history:
        assert {"loss", "bits_per_dim", "test_loss", "test_bits_per_dim", "test_inverse_error", "grad_norm"} <= set(row)
        assert row["test_bits_per_dim"] == pytest.approx(row["test_loss"] / (64 * np.log(2)))
        assert 0 < row["test_inverse_error"] < 1e-2
    model = registry.load(folder)
    assert isinstance(model, RealNVP)
    again = genfast.training.evaluate(model, held_out(data), seed=0)
    assert again["bits_per_dim"] == pytest.approx(history[-1]["test_bits_per_dim"], rel=1e-5)


def test_interpolation_begins_and_ends_at_test_images(data, trained):
    shown = tiles(trained / "interpolation.png", rows=4, columns=10)
    images = held_out(data)[:, 0]
    assert (shown[:, 0].int() - images.int()).abs().max() <= 1
    assert (shown[:, -1].int() - images.roll(-1, 0).int()).abs().max() <= 1


def test_the_defaults_of_the_family(trained):
    kept = json.loads((trained / "run.json").read_text())
    defaults = dict(registry.get_family("flow").defaults)
    for name in ("batch_size", "epochs"):
        assert defaults.pop(name) != kept[name]
    assert defaults == {name: kept[name] for name in defaults}


@pytest.mark.parametrize(("arch", "kind"), [("glow", Glow), ("flowpp", FlowPlusPlus)])
def test_other_kinds_of_flows(arch, kind, data, tmp_path, capsys):
    folder = tmp_path / "run"
    options = ("--arch", arch, "--dequantization", "variational", "--memory", "checkpoint", "--no-fused")
    succeeds(capsys, *train(data, folder, "--epochs", 1, *options))
    assert names(folder) == FILES
    model = registry.load(folder)
    assert type(model) is kind
    assert (model.memory, model.fused) == ("checkpoint", False)
    assert json.loads((folder / "config.json").read_text())["dequantization"] == "variational"
    succeeds(capsys, "evaluate", folder)
    succeeds(capsys, "sample", folder, "-n", 2)


def test_sample(copied, tmp_path, capsys):
    out = tmp_path / "picture.png"
    drawn = {}
    for options in ((), ("--seed", 1), ("--temperature", 0.5), ("--temperature", 0)):
        succeeds(capsys, "sample", copied, "-n", 4, *options, "--out", out)
        drawn[options] = tiles(out, 2, 2)
    assert len({picture.numpy().tobytes() for picture in drawn.values()}) == len(drawn)
    assert torch.equal(drawn[()].flatten(0, 1), tiles(copied / "samples.png", 8, 8).flatten(0, 1)[:4])
    expected = registry.load(copied).sample(4, seed=0, temperature=0.5)
    assert (drawn["--temperature", 0.5].flatten(0, 1) - (255 * expected[:, 0]).round()).abs().max() <= 1
    # Without noise all are one.
    cold = drawn["--temperature", 0].flatten(0, 1)
    assert torch.equal(cold, cold[:1].expand_as(cold))


def test_evaluate(data, copied, capsys):
    printed = succeeds(capsys, "evaluate", copied, "--seed", 2)
    result = json.loads((copied / "evaluation.json").read_text())
    assert set(result) == {
        "data", "binarize", "images", "seed", "loss", "bits_per_dim", "inverse_error", "standard_error",
    }  # fmt: skip
    assert f"bits_per_dim  {result['bits_per_dim']:.3f}" in printed
    model, images = registry.load(copied), DeviceDataset(held_out(data)).images
    values = model.bits_per_dim(images, seed=evaluation_seed(2))
    assert result["bits_per_dim"] == pytest.approx(float(values.mean()), rel=1e-5)
    assert result["standard_error"] == pytest.approx(float(values.std()) / 2, rel=1e-3)
    # Cut into batches the same noise.
    succeeds(capsys, "evaluate", copied, "--seed", 2, "--batch-size", 3)
    again = json.loads((copied / "evaluation.json").read_text())
    assert again["bits_per_dim"] == pytest.approx(result["bits_per_dim"], rel=1e-5)


def test_a_run_is_resumed_with_its_own_kind(data, tmp_path, capsys):
    folder = tmp_path / "run"
    # The end of a cosine is where it was said to be.
    constant = ("--lr-schedule", "constant", "--warmup-steps", 0)
    succeeds(capsys, *train(data, folder, *constant))
    again = ("train", "flow", "--resume", "--out", folder)
    line = fails(capsys, *again, "--arch", "glow")
    assert "--resume: --arch: expected that of the run, realnvp, got glow" in line
    succeeds(capsys, *again, "--epochs", 3)
    succeeds(capsys, *train(data, tmp_path / "whole", "--epochs", 3, *constant))
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert [row["test_inverse_error"] for row in rows_of(folder)] == [
        row["test_inverse_error"] for row in rows_of(tmp_path / "whole")
    ]


@pytest.mark.parametrize(
    ("command", "family", "options", "expected"),
    [
        ("train", "flow", ["--arch", "nice"], "--arch: expected one of realnvp, glow, flowpp, got nice"),
        ("train", "flow", ["--dequantization", "normal"], "--dequantization: expected one of uniform, variational"),
        ("train", "flow", ["--memory", "none"], "--memory: expected one of ordinary, checkpoint, reversible"),
        ("train", "flow", ["--preset", "mlp"], "preset: expected"),
        ("train", "flow", ["--latent-dim", 2], "--latent-dim is not an option of the family flow"),
        ("train", "flow", ["--image-size", 7], "image_shape: expected an even height and width"),
        ("train", "vae", ["--arch", "glow"], "--arch is not an option of the family vae"),
        ("train", "ddpm", ["--dequantization", "uniform"], "--dequantization is not an option of the family ddpm"),
    ],
)
def test_mistakes_in_training(command, family, options, expected, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert expected in fails(capsys, command, family, "--data", data, *options)
    assert not any(tmp_path.iterdir())


def test_mistakes_with_a_trained_flow(copied, capsys):
    before = contents(copied)
    for options, expected in (
        (("sample", copied, "--steps", 5), "--steps is not an option of the family flow"),
        (("sample", copied, "--video"), "--video is not an option of the family flow"),
        (("sample", copied, "--temperature", -1), "temperature: expected"),
        (("evaluate", copied, "-k", 5), "--k is not an option of the family flow"),
        (("evaluate", copied, "--steps", 5), "--steps is not an option of the family flow"),
    ):
        assert expected in fails(capsys, *options)
    assert contents(copied) == before


def test_the_temperature_is_refused_elsewhere(tmp_path, capsys):
    VAE(latent_dim=2, hidden_dims=(8,)).save_pretrained(tmp_path)
    line = fails(capsys, "sample", tmp_path, "--temperature", 0.5)
    assert line == "error: --temperature is not an option of the family vae"
