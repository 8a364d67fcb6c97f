"""GANs with several losses: one small run of all, and sentences that follow the numbers."""

import json

import pytest
import torch

from genfast import GAN
from genfast.experiments import gan_dynamics, run_experiment
from genfast.experiments.base import Trained
from genfast.metrics import Estimate
from tests.experiments.small import about, assert_whole_page, few

PICTURES = ("curves.png", "over-time.png", "training.mp4", "samples.png")


@pytest.mark.filterwarnings("ignore:frechet_distance")
def test_it_finishes_in_seconds(tmp_path, capsys):
    page = run_experiment("gan-dynamics", few(tmp_path, budget=4.0))
    assert_whole_page(page, tmp_path, PICTURES)
    runs = {folder.name: json.loads((folder / "run.json").read_text()) for folder in (tmp_path / "runs").iterdir()}
    assert {name: (run["loss"], run.get("r1")) for name, run in runs.items()} == {
        "non-saturating": ("non_saturating", None), "non-saturating-r1": ("non_saturating", 1.0),
        "minimax": ("minimax", None), "wgan-gp": ("wgan-gp", None),
    }  # fmt: skip
    assert all(len(list(folder.glob("snapshots/*"))) >= 2 for folder in (tmp_path / "runs").iterdir())


def trained(tmp_path, objective="non_saturating", warnings=(False, False), full_from=1):
    """Of two epochs: which have a warning, and from which snapshot on all digits are there."""
    rows = []
    for epoch, warned in enumerate(warnings, 1):
        row = {"epoch": epoch, "d_real": 0.9 / epoch, "d_fake": 0.1 * epoch, "diversity": 0.5}
        rows.append({**row, "warning": f"collapse in {epoch}"} if warned else row)
    shares = {True: torch.full((10,), 0.1), False: torch.tensor([0.61, 0.039, *[0.05] * 7, 0.001])}
    snapshots = [(float(epoch), {"shares": shares[epoch >= full_from]}) for epoch in range(3)]
    return Trained(GAN(width=4, loss=objective, image_shape=(1, 8, 8)), rows, tmp_path, 1.0, {}, snapshots)


def statements(tmp_path, models, coverage=10.0, frechet=None):
    settings = few(tmp_path, budget=1.0)
    rows = [
        {
            "name": name, "epochs": 2, "d_real": 0.5, "d_fake": 0.5, "diversity": 0.5, "warned": 0, "seconds": 1.0,
            "frechet_distance": frechet and frechet[name], "precision": None, "recall": None,
            "coverage": None if coverage is None else Estimate(coverage), "confidence": None,
        }
        for name in models
    ]  # fmt: skip
    return gan_dynamics._page(settings, settings.load(), models, rows, 400).statements


def test_the_page_says_what_its_numbers_say(tmp_path):
    models = {
        "one": trained(tmp_path), "two": trained(tmp_path, "minimax", warnings=(True, False), full_from=2),
        "three": trained(tmp_path, "wgan-gp", warnings=(True, True), full_from=9),
    }  # fmt: skip
    said = statements(tmp_path, models, frechet={"one": about(9.0), "two": about(8.0), "three": about(8.1)})
    assert said[0] == "one: no warning of a collapse in 2 epochs."
    assert "a warning in 1 of 2 epochs, first in epoch 1, 'collapse in 1'; the last of them is 1." in said[1]
    assert "a warning in 2 of 2 epochs" in said[2]
    assert said[2].endswith("the last epoch is one of them.")
    assert "one 0.90 and 0.10, then 0.45 and 0.20; two" in said[3]
    assert "three" not in said[3]
    assert "with two (8.00 [7.90, 8.10]); not told apart from it: three" in said[5]
    assert said[6].endswith("All ten: one, two, three.")
    assert said[7].endswith("one after 200 images; two after 400 images; three never.")


def test_and_what_other_numbers_say(tmp_path):
    models = {"one": trained(tmp_path)}
    said = statements(tmp_path, models, coverage=9.0)
    assert said[3].endswith("All ten: with no loss.")
    assert not any("nearest" in statement for statement in said)
    assert not any("All ten" in statement for statement in statements(tmp_path, models, coverage=None))
