"""`genfast evaluate --metrics`: what it prints and writes, of each family."""

import json
import sys

import pytest
import torch

from genfast.__main__ import main
from genfast.metrics import DEFINITIONS, Estimate, Likelihood, inception_fid, likelihood, load_inception
from genfast.models import DDPM, VAE, AutoEncoder, RealNVP, registry
from genfast.training import DeviceDataset, load_dataset
from tests.commands import contents, fails, succeeds, write_images

OF_IMAGES = {"frechet_distance", "precision", "recall", "nearest_distance", "memorisation"}
OF_DIGITS = OF_IMAGES | {"coverage", "entropy", "smallest_share", "confidence"}
OF_ALL = {"sampling_speed", "parameters"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """72 + 8 images of 8 x 8 pixels that are no digits."""
    return write_images(tmp_path_factory.mktemp("small") / "images", count=80, size=(8, 8))


def written(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_a_vae_of_digits(capsys, tmp_path):
    VAE(latent_dim=2, hidden_dims=(8,)).save_pretrained(tmp_path)
    options = ("--data", "digits", "--metrics", "--samples", 40, "--limit", 30, "-k", 5, "--binarize", "threshold")
    lines = succeeds(capsys, "evaluate", tmp_path, *options).splitlines()
    result = written(tmp_path)
    found = result["metrics"]
    assert set(found) == OF_DIGITS | OF_ALL | {"linear_probe", "active_units", "elbo", "iwae"}
    assert set(found) <= set(DEFINITIONS)
    told = [line for line in lines if line.startswith("frechet_distance: 40 images and 1,000 images of the reference")]
    assert len(told) == 1
    for name in ("coverage", "memorisation"):
        assert f"{name:>16}  {Estimate.from_dict(found[name])}  n = 40" in lines
    # What is printed without --metrics is the same number.
    assert found["elbo"]["value"] == pytest.approx(result["elbo"], rel=1e-5)
    assert found["iwae"]["value"] == pytest.approx(result["log_likelihood"], rel=1e-6)
    data = DeviceDataset(load_dataset("digits").test[:30], binarize="threshold")
    bound = likelihood(registry.load(tmp_path), data, k=5, dataset="digits")
    assert Likelihood.from_dict(found["iwae"]).column == bound.column
    assert found["iwae"]["value"] == pytest.approx(bound.estimate.value, rel=1e-6)


@pytest.mark.parametrize(
    ("model", "more", "own"),
    [
        (lambda: AutoEncoder(latent_dim=2, hidden_dims=(8,), image_shape=(1, 8, 8)), (), set()),
        (lambda: RealNVP(image_shape=(1, 8, 8), preset="tiny"), (), {"bits_per_dim"}),
        (lambda: DDPM(image_shape=(1, 8, 8), preset="tiny", num_steps=4), ("--steps", 2), {"bits_per_dim"}),
    ],
    ids=["ae", "flow", "ddpm"],
)
def test_other_families_on_other_images(capsys, tmp_path, small, model, more, own):
    model().save_pretrained(tmp_path)
    printed = succeeds(capsys, "evaluate", tmp_path, "--data", small, "--metrics", "--samples", 8, *more)
    result = written(tmp_path)
    assert set(result["metrics"]) == OF_IMAGES | OF_ALL | own
    assert ("drawing 8 images in 4 steps of ddim" in printed) == ("steps" in result)
    for name in own:
        assert result["metrics"][name]["value"] == pytest.approx(result[name], rel=1e-6)
        assert result["metrics"][name]["data"] == "pixels of 256 grey levels"


def test_without_the_option_nothing_is_drawn(capsys, tmp_path, small):
    AutoEncoder(latent_dim=2, hidden_dims=(8,), image_shape=(1, 8, 8)).save_pretrained(tmp_path)
    succeeds(capsys, "evaluate", tmp_path, "--data", small)
    assert "metrics" not in written(tmp_path)
    expected = "error: --samples: expected together with --metrics, got 9 alone"
    assert fails(capsys, "evaluate", tmp_path, "--data", small, "--samples", 9) == expected


def test_fid_is_measured_with_weights_of_ones_own(capsys, tmp_path, small, inception_weights):
    model = AutoEncoder(latent_dim=2, hidden_dims=(8,), image_shape=(1, 8, 8))
    model.save_pretrained(tmp_path)
    command = ("evaluate", tmp_path, "--data", small, "--metrics", "--samples", 6, "--inception")
    printed = succeeds(capsys, *command, inception_weights)
    assert "inception_fid: 6 images and 8 images of the reference are few" in printed
    found = Estimate.from_dict(written(tmp_path)["metrics"]["inception_fid"])
    test = load_dataset(str(small)).test
    with pytest.warns(UserWarning, match="inception_fid"):
        expected = inception_fid(model.sample(6, seed=0), test, inception=load_inception(inception_weights))
    assert found.value == pytest.approx(expected.value, rel=1e-4)
    assert written(tmp_path)["inception"] == str(inception_weights)
    before = contents(tmp_path)
    assert main([str(word) for word in (*command, tmp_path / "none.pth")]) == 2
    printed = capsys.readouterr()
    assert "weights of Inception, got '" in printed.err
    # Before the minutes that the rest takes.
    assert printed.out == ""
    expected = "error: --inception: expected together with --metrics, got 'download' alone"
    assert fails(capsys, "evaluate", tmp_path, "--data", small, "--inception", "download") == expected
    assert contents(tmp_path) == before


def test_a_package_that_is_missing_is_told_at_once(capsys, tmp_path, small, monkeypatch):
    AutoEncoder(latent_dim=2, hidden_dims=(8,), image_shape=(1, 8, 8)).save_pretrained(tmp_path)
    for name in ("torchmetrics", *(name for name in sys.modules if name.startswith("torchmetrics."))):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["evaluate", str(tmp_path), "--data", str(small), "--metrics"]) == 2
    printed = capsys.readouterr()
    assert "torchmetrics, got none" in printed.err
    # Before the minutes that the likelihoods of a large model take.
    assert printed.out == ""
    assert not (tmp_path / "evaluation.json").exists()


def test_a_model_whose_samples_are_no_numbers(capsys, tmp_path, small):
    model = AutoEncoder(latent_dim=2, hidden_dims=(8,), image_shape=(1, 8, 8))
    torch.nn.init.constant_(model.fc4.bias, torch.nan)
    model.save_pretrained(tmp_path)
    line = fails(capsys, "evaluate", tmp_path, "--data", small, "--metrics", "--samples", 8)
    assert "samples: expected uint8 or finite floats in [0, 1], got values from nan" in line
