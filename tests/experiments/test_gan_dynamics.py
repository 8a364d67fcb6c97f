"""GANs that differ in loss and penalty: one small run of all, and sentences that follow the numbers."""

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
    assert {name: (run["loss"], run.get("r1"), run.get("batch_norm")) for name, run in runs.items()} == {
        "non-saturating": ("non_saturating", None, None), "minimax": ("minimax", None, None),
        "non-saturating-without-batch-norm": ("non_saturating", None, False),
        "non-saturating-with-r1": ("non_saturating", 1.0, None), "wgan-gp": ("wgan-gp", None, None),
    }  # fmt: skip
    # A GAN of some steps has not collapsed: it was not judged.
    fates = [said for said in page.statements if "too short to judge" in said]
    assert len(fates) == 5
    assert not any("no warning" in said for said in page.statements)
    text = (tmp_path / "README.md").read_text()
    # Of images this small D has no batch norm in any of them.
    assert "| non-saturating with R1 | non-saturating | R1, weight 1 | no | 1 | 0.5, 0.999 |" in text
    assert "| WGAN-GP | wgan-gp | gradient penalty, weight 10 | no | 5 | 0, 0.9 |" in text
    assert all(len(list(folder.glob("snapshots/*"))) >= 2 for folder in (tmp_path / "runs").iterdir())


def test_it_says_in_what_they_differ():
    rows = [
        {"name": name, **gan_dynamics._setup(GAN(width=4, **options))}
        for name, options in gan_dynamics._VARIANTS.items()
    ]
    assert {row["name"]: tuple(row.values())[1:] for row in rows} == {
        "non-saturating": ("non-saturating", "none", "yes", 1, "0.5, 0.999"),
        "non-saturating without batch norm": ("non-saturating", "none", "no", 1, "0.5, 0.999"),
        "non-saturating with R1": ("non-saturating", "R1, weight 1", "no", 1, "0.5, 0.999"),
        "minimax": ("minimax", "none", "yes", 1, "0.5, 0.999"),
        "WGAN-GP": ("wgan-gp", "gradient penalty, weight 10", "no", 5, "0, 0.9"),
    }
    assert gan_dynamics._alone(rows).startswith(
        "One setting alone differs between two of them: batch norm of D (non-saturating; non-saturating without batch "
        "norm), loss (non-saturating; minimax), penalty (non-saturating without batch norm; non-saturating with R1). "
        "From every other one WGAN-GP differs in several at once"
    )


def trained(tmp_path, objective="non_saturating", warnings=(False, False), full_from=1, steps=1000):
    """Of two epochs of so many steps: which have a warning, and from which snapshot on all digits are there."""
    rows = []
    for epoch, warned in enumerate(warnings, 1):
        row = {"epoch": epoch, "d_real": 0.9 / epoch, "d_fake": 0.1 * epoch, "diversity": 0.5}
        rows.append({**row, "warning": f"collapse in {epoch}"} if warned else row)
    shares = {True: torch.full((10,), 0.1), False: torch.tensor([0.61, 0.039, *[0.05] * 7, 0.001])}
    snapshots = [(float(epoch), {"shares": shares[epoch >= full_from]}) for epoch in range(3)]
    model, settings = GAN(width=4, loss=objective, image_shape=(1, 8, 8)), {"train_images": 10 * steps + 9}
    return Trained(model, rows, tmp_path, 1.0, {**settings, "batch_size": 10}, snapshots)


def statements(tmp_path, models, coverage=10.0, frechet=None, missing=()):
    settings = few(tmp_path, budget=1.0)
    rows = [
        {
            "name": name, "epochs": 2, "d_real": 0.5, "d_fake": 0.5, "diversity": 0.5, "covered": 0.1 * number,
            "judged": 2, "warned": 0, "seconds": 1.0, "steps": 2000, "precision": None, "recall": None,
            "frechet_distance": frechet and frechet[name], "confidence": None, **gan_dynamics._setup(each.model),
            "coverage": None if coverage is None else Estimate(coverage),
            "missing": None if coverage is None else list(missing),
        }
        for number, (name, each) in enumerate(models.items())
    ]  # fmt: skip
    return gan_dynamics._page(settings, settings.load(), models, rows, 400).statements


def test_the_page_says_what_its_numbers_say(tmp_path):
    models = {
        "one": trained(tmp_path), "two": trained(tmp_path, "minimax", warnings=(True, False), full_from=2),
        "three": trained(tmp_path, "wgan-gp", warnings=(True, True), full_from=9),
    }  # fmt: skip
    said = statements(tmp_path, models, frechet={"one": about(9.0), "two": about(8.0), "three": about(8.1)})
    assert said[0] == (
        "one: no warning of a collapse in the 2 of 2 epochs that were judged; digits in less than 4% of its samples at "
        "the end: none."
    )
    assert "a warning in 1 of 2 judged epochs, first in epoch 1, 'collapse in 1'; the last of them is 1;" in said[1]
    assert "a warning in 2 of 2 judged epochs" in said[2]
    assert "the last epoch is one of them;" in said[2]
    assert "one 0.90 and 0.10, then 0.45 and 0.20; two" in said[3]
    assert "three" not in said[3]
    assert "most of the real images are covered with three (0.2000)." in said[4]
    assert "with two (8.00 [7.90, 8.10]); not told apart from it: three" in said[5]
    assert said[6].endswith("All ten: one, two, three.")
    assert said[7].endswith("one after 200 images; two after 400 images; three never.")


def test_and_what_other_numbers_say(tmp_path):
    models = {"one": trained(tmp_path)}
    said = statements(tmp_path, models, coverage=8.0, missing=[1, 9])
    assert said[0].endswith("digits in less than 4% of its samples at the end: 1, 9.")
    assert said[3].endswith("All ten: with none of them.")
    assert not any("nearest" in statement for statement in said)
    said = statements(tmp_path, models, coverage=None)
    assert not any("All ten" in statement or "digits" in statement for statement in said)


def test_epochs_that_came_too_early_are_not_said_to_be_without_a_collapse(tmp_path):
    said = statements(tmp_path, {"short": trained(tmp_path, steps=499), "late": trained(tmp_path, steps=500)})
    assert "short: too short to judge whether it collapsed: 998 steps;" in said[0]
    assert "late: no warning of a collapse in the 1 of 2 epochs that were judged;" in said[1]
