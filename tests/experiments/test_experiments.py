"""The experiments themselves, small: each leaves a page whose sentences follow its numbers."""

import json
import math

import pytest
import torch

from genfast.experiments import (
    EXPERIMENTS,
    Settings,
    ae_vs_vae,
    kl_weight,
    latent_size,
    likelihood,
    manifold,
    run_experiment,
)
from genfast.experiments.base import Paired
from genfast.metrics import Estimate
from genfast.models import VAE
from genfast.training import load_dataset

OWN = ("kl-weight", "latent-size", "manifold", "ae-vs-vae", "likelihood")
PICTURES = {
    "kl-weight": {"curves.png", "reconstructions.png", "samples.png"},
    "latent-size": {"curves.png", "reconstructions.png", "samples.png"},
    "manifold": {"manifold-1.png", "manifold-40.png", "codes.png"},
    "ae-vs-vae": {"samples.png", "interpolation.png"},
    "likelihood": {"curves.png", "samples.png"},
}

# What the two runs of each are trained with.
RUNS = {
    "kl-weight": {"weight-0": {"beta": 0.0, "binarize": "dynamic"}, "weight-5": {"beta": 5.0, "binarize": "dynamic"}},
    "latent-size": {"latent-2": {"latent_dim": 2, "binarize": "dynamic"}, "latent-5": {"latent_dim": 5}},
    "manifold": {"weight-1": {"beta": 1.0, "latent_dim": 2}, "weight-40": {"beta": 40.0, "latent_dim": 2}},
    "ae-vs-vae": {"ae": {"family": "ae", "latent_dim": 20}, "vae": {"family": "vae", "latent_dim": 20}},
    "likelihood": {"latent-2": {"binarize": "dynamic", "latent_dim": 2}, "latent-20": {"latent_dim": 20}},
}


def about(value, half=0.1):
    return Estimate(value, value - half, value + half, 100)


@pytest.mark.filterwarnings("ignore:frechet_distance")
@pytest.mark.parametrize("name", OWN)
def test_every_experiment_finishes_in_seconds(name, tmp_path, monkeypatch):
    monkeypatch.setattr(kl_weight, "WEIGHTS", (0.0, 5.0))
    monkeypatch.setattr(latent_size, "SIZES", (2, 5))
    monkeypatch.setattr(manifold, "WEIGHTS", (1.0, 40.0))
    monkeypatch.setattr(likelihood, "_POINTS", 100)
    page = run_experiment(name, Settings(tmp_path, budget=0.6))
    assert page.statements
    assert {path.name for path in tmp_path.glob("*.png")} == PICTURES[name]
    text = (tmp_path / "README.md").read_text()
    assert all(f"({picture})" in text for picture in PICTURES[name])
    assert f"genfast experiment {name} --data digits --budget 0.01 --seed 0" in text
    assert "a reduced form" in text
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["statements"] == page.statements
    assert all(table["rows"] for table in results["tables"].values())
    assert {path.name for path in tmp_path.glob("runs/*")} == set(RUNS[name])
    saved = {run: json.loads((tmp_path / "runs" / run / "run.json").read_text()) for run in RUNS[name]}
    for run, options in RUNS[name].items():
        assert options.items() <= saved[run].items()
        assert saved[run]["status"] == "finished"
    # The same number of steps, of the same images.
    assert len({(run["epochs"], run["train_images"], run["batch_size"], run["seed"]) for run in saved.values()}) == 1


def row_of_weight(weight, **changes):
    row = {
        "weight": weight, "elbo": about(-100.0), "nll": about(80.0), "kl": about(20.0),
        "log_likelihood": about(-95.0), "active_units": 20, "frechet_distance": about(30.0),
        "precision": about(0.5, 0.01), "recall": about(0.5, 0.01), "coverage": Estimate(10.0, 10.0, 10.0, 500),
        "confidence": about(0.9, 0.01), "seconds": 60.0,
    }  # fmt: skip
    return row | changes


def kl_page(tmp_path, rows):
    splits = load_dataset("digits")
    return kl_weight._page(Settings(tmp_path, budget=1.0), splits, 3, 50, rows).statements


def test_the_page_of_kl_weights_says_what_its_numbers_say(tmp_path):
    rows = [
        row_of_weight("0", nll=about(60.0), kl=about(300.0), elbo=about(-360.0), frechet_distance=about(90.0)),
        row_of_weight("1", coverage=Estimate(9.0, 9.0, 10.0, 500)),
        row_of_weight("40", nll=about(200.0), kl=about(0.1, 0.01), elbo=about(-200.0), active_units=0),
    ]
    said = kl_page(tmp_path, rows)
    assert "nll rises from 60.00 [59.90, 60.10] nats at 0 to 200.0" in said[0]
    assert "the KL falls from 300.0" in said[0]
    assert "is highest at weight 1 (-100.0" in said[1]
    assert "not told apart from it: 1, 40" in said[2]
    assert "falls from 20 at 0 to 0 at 40" in said[3]
    assert said[4].startswith("At weight 40 no unit is active")
    assert "at weight 1 (30.00 [29.90, 30.10]); not told apart from it: 40" in said[5]
    assert "10 at weight 0, 9 at weight 1, 10 at weight 40" in said[6]


def test_and_what_other_numbers_say(tmp_path):
    rows = [row_of_weight("0", elbo=about(-50.0)), row_of_weight("1"), row_of_weight("40")]
    said = kl_page(tmp_path, rows)
    assert "nll does not change beyond its uncertainty" in said[0]
    assert "is highest at weight 0 (-50.0" in said[1]
    assert not any("no unit is active" in statement for statement in said)
    none = {"frechet_distance": None, "precision": None, "recall": None, "coverage": None}
    said = kl_page(tmp_path, [{**row, **none} for row in rows])
    assert not any("Fréchet" in statement or "Digits" in statement for statement in said)


def test_how_many_units_hold_the_kl():
    assert latent_size._holding(torch.tensor([5.0, 4.0, 0.9, 0.05, 0.05])) == 3
    assert latent_size._holding(torch.tensor([5.0, 0.0])) == 1
    assert latent_size._holding(torch.ones(10)) == 10
    mu, logvar = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 0.0]])
    assert latent_size._kl_of_units(mu, logvar).tolist() == [2.0, 0.0]


def test_estimates_of_log_normal_weights():
    """log w ~ N(m, 1): log E w = m + 1/2, and a single weight's logarithm is N(m, 1)."""
    generator = torch.Generator().manual_seed(0)
    weights = -90 + torch.randn(50, 8000, generator=generator, dtype=torch.float64)
    truth = torch.full((50,), -89.5, dtype=torch.float64)
    rows = likelihood._estimates("importance", weights, 1000, truth)
    assert [row["k"] for row in rows] == [1, 10, 100, 1000]
    assert rows[0]["log_likelihood"].value == pytest.approx(-90, abs=0.01)
    assert rows[0]["variance"].value == pytest.approx(1, rel=0.02)
    assert rows[0]["off"].value == pytest.approx(-0.5, abs=0.01)
    assert rows[0]["effective"].value == 1.0
    # The delta method: variance (e - 1) / k, bias minus half of that.
    for row in rows[2:]:
        relative = math.expm1(1) / row["k"]
        assert row["variance"].value == pytest.approx(relative, rel=0.2)
        assert row["off"].value == pytest.approx(-relative / 2, abs=0.003)
    assert rows[1]["off"].high < rows[2]["off"].low
    assert rows[3]["effective"].value == pytest.approx(1000 / math.e, rel=0.1)


def test_from_how_many_draws_on_an_estimate_is_right():
    off = {1: -5.0, 10: 0.5, 100: -2.0, 1000: 0.3}
    rows = [{"latent": 2, "method": "m", "k": k, "off": about(value)} for k, value in off.items()]
    assert likelihood._within(rows, 2, "m") == "m from 1,000 draws on"
    assert likelihood._within(rows[:3], 2, "m") == "m with none of up to 100 draws"


def steep_model():
    torch.manual_seed(0)
    model = VAE(latent_dim=2, hidden_dims=(8,)).eval()
    with torch.no_grad():
        # Codes that matter: log p(x | z) differs by tens of nats over the plane.
        model.fc4.weight.mul_(2.0)
    return model


def test_the_integral_is_what_very_many_draws_come_to():
    model = steep_model()
    images = (load_dataset("digits").test[::250] > 127).mul(255).to(torch.uint8)
    fine, coarse = likelihood._integral(model, images, 200)
    assert (fine - coarse).abs().max() < 5e-3
    drawn = model.log_prob(images, 10_000, method="prior", seed=0)
    torch.testing.assert_close(fine.float(), drawn, rtol=0, atol=0.15)
    assert next(model.parameters()).dtype == torch.float32


def test_single_draws_make_up_the_estimate_of_many(tmp_path):
    model = steep_model()
    images = (load_dataset("digits").test[::250] > 127).mul(255).to(torch.uint8)
    settings = Settings(tmp_path, budget=1.0)
    for method, tolerance in (("prior", 0.5), ("importance", 0.5)):
        weights = likelihood._log_weights(settings, model, images, method, 1000)
        assert weights.shape == (4, 2000)
        # No draw twice: not within a call, nor in the next one, nor for another image, here the same. In fp32 some of
        # the logarithms coincide.
        again = likelihood._log_weights(settings, model, images[[0, 0]], method, 1000)
        assert len(again.unique()) > 0.99 * again.numel()
        together = weights.logsumexp(1) - math.log(2000)
        torch.testing.assert_close(together.float(), model.log_prob(images, 5000, seed=9), rtol=0, atol=tolerance)


def test_fitted_gaussians_have_the_moments_of_the_codes():
    generator = torch.Generator().manual_seed(0)
    mix = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    codes = torch.randn(20_000, 2, generator=generator) @ mix.T + torch.tensor([3.0, -1.0])
    mean, covariance = ae_vs_vae._gaussian_of((codes,))
    torch.testing.assert_close(mean, torch.tensor([3.0, -1.0]).double(), rtol=0, atol=0.05)
    torch.testing.assert_close(covariance, (mix @ mix.T).double(), rtol=0, atol=0.1)
    _, wider = ae_vs_vae._gaussian_of((codes, torch.full_like(codes, math.log(4.0))))
    torch.testing.assert_close(wider - covariance, 4 * torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-5)


def test_codes_are_drawn_from_that_gaussian():
    class Shown:
        """Three pixels that say which code they are of."""

        image_shape, device = (1, 1, 3), torch.device("cpu")

        def decode(self, z):
            return (z + 8) / 16

    mean = torch.tensor([1.0, -1.0, 0.0]).double()
    # In two dimensions the matrix of eigenvectors may be its own transpose.
    covariance = torch.tensor([[2.0, 0.9, 0.0], [0.9, 1.0, -0.5], [0.0, -0.5, 1.0]]).double()
    images = ae_vs_vae._drawn_from(Shown(), mean, covariance, 20_000, seed=0)
    codes = images.flatten(1).double() / 255 * 16 - 8
    torch.testing.assert_close(codes.mean(0), mean, rtol=0, atol=0.04)
    torch.testing.assert_close(codes.T.cov(), covariance, rtol=0, atol=0.06)
    # A direction without variance, as of a unit that is switched off.
    flat = ae_vs_vae._drawn_from(Shown(), mean, torch.diag(torch.tensor([1.0, 0.0, 1.0])).double(), 100, seed=0)
    assert len(flat[:, 0, 0, 1].unique()) == 1


def test_pairs_are_of_different_digits(tmp_path):
    splits = load_dataset("digits")
    first, second = ae_vs_vae._pairs(Settings(tmp_path, budget=1.0), splits)
    assert len(first) == len(second) > 400
    assert (splits.test_labels[first] != splits.test_labels[second]).all()
    assert not set(first.tolist()) & set(second.tolist())
    unlabelled = splits._replace(train_labels=None, test_labels=None)
    assert len(ae_vs_vae._pairs(Settings(tmp_path, budget=1.0), unlabelled)[0]) == 500


def test_the_page_of_ae_and_vae_says_what_its_numbers_say(tmp_path):
    terms = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()

    def row(model, shift, probe):
        return {
            "model": model, "squared_error": Paired.of(terms + shift, "test"), "mean": 2.0, "spread": 3.0,
            "linear_probe": probe, "seconds": 1.0,
        }  # fmt: skip

    samples = [
        {
            "model": model, "codes from": source, "frechet_distance": about(distance), "precision": about(0.5),
            "recall": about(0.5), "coverage": Estimate(10.0), "confidence": about(0.9),
        }
        for model, source, distance in (("AE", "x", 90.0), ("AE", "y", 20.0), ("VAE", "x", 30.0), ("VAE", "y", 20.0))
    ]  # fmt: skip
    middles = [{"path": path, "precision": about(0.5), "confidence": about(0.8)} for path in ("pixels", "AE", "VAE")]
    rows = [row("AE", 0.0, about(0.9)), row("VAE", 0.5, about(0.5))]
    arguments = (Settings(tmp_path, budget=1.0), load_dataset("digits"), 3, rows, samples, middles, about(0.7))
    said = ae_vs_vae._page(*arguments).statements
    assert "below the VAE's" in said[0]
    assert "codes from x: AE 90.00 [89.90, 90.10], above VAE 30.00" in said[2]
    assert "codes from y: AE 20.00 [19.90, 20.10], not told apart from VAE" in said[3]
    assert "AE 0.50" in said[5]
    assert "not told apart from VAE" in said[5]
    assert "AE 0.90 [0.80, 1.00], above VAE 0.50 [0.40, 0.60]; on the pixels themselves 0.70 [0.60, 0.80]" in said[7]


def test_an_unknown_experiment_and_budgets_out_of_range(tmp_path):
    with pytest.raises(ValueError, match=r"experiment: expected one of kl-weight, .*, got 'kl'"):
        run_experiment("kl", Settings(tmp_path, budget=1.0))
    for budget in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="budget: expected a positive number of minutes"):
            run_experiment("kl-weight", Settings(tmp_path, budget=budget))
    assert not list(tmp_path.iterdir())
    assert set(OWN) <= set(EXPERIMENTS)
