"""GANs on the command line: training, its pictures and what it says, samples, and a resume."""

import json
import shutil

import pytest

import genfast
from genfast.models import GAN, registry
from tests.commands import contents, fails, names, rows_of, succeeds, tiles, write_images

PICTURES = {"samples.png", "interpolation.png", "curves.png"}
FILES = PICTURES | {"config.json", "model.safetensors", "checkpoints", "run.json", "metrics.jsonl"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """36 + 4 images."""
    return write_images(tmp_path_factory.mktemp("data") / "images", count=40, size=(8, 8))


def train(data, out, *options):
    sizes = ("--epochs", 2, "--batch-size", 18, "--width", 4)
    return ("train", "gan", "--data", data, "--out", out, *sizes, *options)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert genfast.__main__.main([str(word) for word in train(data, folder)]) == 0
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_train_writes_everything(trained):
    assert names(trained) == FILES
    history = rows_of(trained)
    assert {f"test_{part}" for part in ("loss", "d_loss", "g_loss", "d_real", "d_fake", "diversity")} <= set(
        history[-1]
    )
    for row in history:
        assert {"loss", "d_loss", "g_loss", "d_real", "d_fake", "diversity", "grad_norm"} <= set(row)
        # Two steps do not make a generator: that its images are still all alike is no collapse.
        assert row["diversity"] < 0.3
        assert "warning" not in row
    assert type(registry.load(trained)) is GAN
    kept = json.loads((trained / "run.json").read_text())
    defaults = dict(registry.get_family("gan").defaults)
    for name in ("batch_size", "width"):
        assert defaults.pop(name) != kept[name]
    assert defaults == {name: kept[name] for name in defaults}


def test_pictures(trained):
    samples = tiles(trained / "samples.png", 8, 8).flatten(0, 1)
    expected = 255 * registry.load(trained).sample(64, seed=0)[:, 0]
    assert (samples - expected.round()).abs().max() <= 1
    way = tiles(trained / "interpolation.png", 10, 10)
    assert (way[:, 0].int() - samples[:10].int()).abs().max() <= 1
    assert (way[:, -1].int() - samples[:10].roll(-1, 0).int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ("--gan-loss", "wgan-gp", "--n-critic", 2),
            {"objective": "wgan-gp", "n_critic": 2, "r1": 0.0},
        ),
        (
            ("--gan-loss", "non_saturating", "--r1", 0.5, "--spectral-norm", "--latent-dim", 7, "--preset", "mlp"),
            {"objective": "non_saturating", "r1": 0.5, "latent_shape": (7,)},
        ),
    ],
)
def test_options_reach_the_model(options, expected, data, tmp_path, capsys):
    folder = tmp_path / "run"
    succeeds(capsys, *train(data, folder, *options))
    gan = registry.load(folder)
    assert {name: getattr(gan, name) for name in expected} == expected
    part = "penalty" if expected["objective"] == "wgan-gp" else "r1"
    assert part in rows_of(folder)[0]
    assert ("main.1.parametrizations.weight.original" in gan.discriminator.state_dict()) == (
        "--spectral-norm" in options
    )
    succeeds(capsys, "evaluate", folder)
    assert json.loads((folder / "evaluation.json").read_text())["diversity"] > 0
    before = contents(folder)[(folder / "samples.png").relative_to(folder)]
    succeeds(capsys, "sample", folder, "--out", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == before


def test_a_run_is_resumed(data, tmp_path, capsys):
    folder = tmp_path / "run"
    options = ("--r1", 1.0)
    succeeds(capsys, *train(data, folder, *options))
    again = ("train", "gan", "--resume", "--out", folder)
    assert "--resume: --gan-loss: expected that of the run, None, got hinge" in fails(
        capsys, *again, "--gan-loss", "hinge"
    )
    succeeds(capsys, *again, "--epochs", 3)
    succeeds(capsys, *train(data, tmp_path / "whole", *options, "--epochs", 3))
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert len(rows_of(folder)) == 3


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        (
            "gan",
            ["--gan-loss", "wasserstein"],
            "--gan-loss: expected one of non-saturating, minimax, hinge, lsgan, wgan-gp",
        ),
        ("gan", ["--preset", "tiny"], "preset: expected one of 'dcgan', 'mlp', got 'tiny'"),
        ("gan", ["--r1", -1], "r1: expected a finite number >= 0, got -1"),
        ("gan", ["--beta", 1], "--beta is not an option of the family gan"),
        ("vae", ["--gan-loss", "hinge"], "--gan-loss is not an option of the family vae"),
        ("flow", ["--width", 8], "--width is not an option of the family flow"),
    ],
)
def test_mistakes_in_training(family, options, expected, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert expected in fails(capsys, "train", family, "--data", data, *options)
    assert not any(tmp_path.iterdir())


def test_mistakes_with_a_trained_gan(copied, capsys):
    before = contents(copied)
    for options, expected in (
        (("sample", copied, "--temperature", 0.5), "--temperature is not an option of the family gan"),
        (("evaluate", copied, "-k", 5), "--k is not an option of the family gan"),
    ):
        assert expected in fails(capsys, *options)
    assert contents(copied) == before
