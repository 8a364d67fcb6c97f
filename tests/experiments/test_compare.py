"""All families on the same images: one small run of all, and sentences that follow the numbers."""

import json
from dataclasses import replace

import pytest

from genfast import AutoEncoder
from genfast.experiments import compare, run_experiment
from genfast.experiments.base import Trained
from genfast.metrics import DEFINITIONS, Estimate, Likelihood
from tests.experiments.small import about, assert_whole_page, few

NAMES = ("AE", "VAE", "GAN", "flow", "DDPM")


@pytest.mark.filterwarnings("ignore:frechet_distance")
def test_it_finishes_in_seconds(tmp_path):
    page = run_experiment("compare", few(tmp_path, budget=5.0))
    assert_whole_page(page, tmp_path, ("samples.png",))
    found = {}
    for name in NAMES:
        run, evaluation = (json.loads((tmp_path / "runs" / name / f"{file}.json").read_text())
                           for file in ("run", "evaluation"))  # fmt: skip
        found[name] = evaluation["metrics"]
        assert (run["data"], run["time"]) == ("digits", 1.0)
        assert {"frechet_distance", "precision", "memorisation", "sampling_speed", "parameters"} <= set(found[name])
        assert found[name]["frechet_distance"]["n"] == 64
        assert "inception" not in evaluation
    assert {name for name in NAMES if "linear_probe" in found[name]} == {"AE", "VAE"}
    bits = {name: found[name]["bits_per_dim"] for name in NAMES if "bits_per_dim" in found[name]}
    assert set(bits) == {"flow", "DDPM"}
    assert bits["flow"]["data"] == bits["DDPM"]["data"] != found["VAE"]["elbo"]["data"]
    assert {"elbo", "iwae"} <= set(found["VAE"])
    assert (bits["flow"]["steps"], bits["DDPM"]["steps"]) == (None, 50)
    assert any("flow: upper bound; DDPM: upper bound in 50 steps" in said for said in page.statements)
    html = (tmp_path / "report.html").read_text()
    assert DEFINITIONS["frechet_distance"].title in html
    assert all(f">{name}</a>" in html for name in NAMES)


@pytest.mark.filterwarnings("ignore:frechet_distance", "ignore:inception_fid")
def test_fid_with_weights_of_ones_own(tmp_path, inception_weights, monkeypatch):
    # Inception takes a quarter of a second for an image, so of one model alone.
    monkeypatch.setattr(compare, "_MODELS", {"AE": compare._MODELS["AE"]})
    run_experiment("compare", replace(few(tmp_path, budget=0.5), inception=str(inception_weights)))
    kept = json.loads((tmp_path / "runs" / "AE" / "evaluation.json").read_text())
    assert kept["inception"] == str(inception_weights)
    assert kept["metrics"]["inception_fid"]["n"] == 64
    text = (tmp_path / "README.md").read_text()
    assert "| FID (n = 64) | " in text
    assert f"--inception {inception_weights}" in text
    assert DEFINITIONS["inception_fid"].title in (tmp_path / "report.html").read_text()


def measured(**changes):
    found = {
        "frechet_distance": about(10.0), "precision": about(0.5), "recall": about(0.5), "confidence": about(0.9),
        "coverage": Estimate(10.0), "memorisation": about(1.0, 0.05), "sampling_speed": about(100.0),
        "parameters": Estimate(10),
    }  # fmt: skip
    return {**found, **changes}


def bits(value, data="pixels of 256 grey levels", steps=None):
    return Likelihood(about(value), "bits_per_dim", "upper", "bits per dimension", data, steps=steps)


def page(tmp_path, found, data="digits", **history):
    settings = few(tmp_path, budget=60.0)
    models = {
        name: Trained(AutoEncoder(), history.get(name, [{"epoch": 3}]), tmp_path, 10.0, {}) for name in found
    }  # fmt: skip
    return compare._page(settings, settings.load()._replace(name=data), models, found)


def test_the_page_says_what_its_numbers_say(tmp_path):
    found = {
        "AE": measured(frechet_distance=about(50.0), linear_probe=about(0.95, 0.01), coverage=Estimate(7.0)),
        "VAE": measured(linear_probe=about(0.9, 0.01), memorisation=about(0.8, 0.05), elbo=bits(2.0, "grey pixels")),
        "flow": measured(frechet_distance=about(9.9), bits_per_dim=bits(2.0), inception_fid=about(30.0)),
        "DDPM": measured(inception_fid=about(20.0), bits_per_dim=bits(1.0, steps=50), precision=about(0.9)),
    }  # fmt: skip
    made = page(tmp_path, found, DDPM=[{"epoch": 2, "warning": "it diverges"}])
    said = "\n".join(made.statements)
    assert "flow (9.90 [9.80, 10.00]); not told apart from it: VAE, DDPM" in said
    assert "Best FID: DDPM (20.00 [19.90, 20.10])." in said
    assert "Best precision: DDPM (0.90 [0.80, 1.00])." in said
    assert "By recall no two models are told apart: AE 0.50 [0.40, 0.60], VAE 0.50 [0.40, 0.60], flow" in said
    assert "Each was stopped after 12.00 seconds, evaluations included" in said
    assert "its training took 10.00 to 10.00." in said
    assert "4% of the samples or more: VAE, flow, DDPM. Fewer: AE (7)." in said
    assert "(ratio below 1): VAE 0.80" in said
    assert "Of pixels of 256 grey levels: flow 2.00 [1.90, 2.10] bits per dimension, above DDPM" in said
    assert "(flow: upper bound; DDPM: upper bound in 50 steps)." in said
    assert "AE 0.950 [0.940, 0.960], above VAE 0.900 [0.890, 0.910]" in said
    assert "DDPM: after 1 of 1 epochs `fit` warned, last of 'it diverges'." in said
    (tmp_path / "samples.png").touch()
    made.write(tmp_path / "page")
    columns, *models = (tmp_path / "page" / "models.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in models] == list(found)
    # Of the flow and of DDPM's bound in 50 steps, with bounds and sizes.
    assert columns.count("256 grey levels") == 8
    assert columns.count("in 50 steps") == 4
    assert columns.count("grey pixels") == 4
    # One table: on the page a line for each metric.
    lines = [line for line in (tmp_path / "page" / "README.md").read_text().splitlines() if line.startswith("|")]
    assert lines[0] == "| model | AE | VAE | flow | DDPM |"
    assert all(line.count("|") == 6 for line in lines)
    probed = "0.950 [0.940, 0.960] | 0.900 [0.890, 0.910] | not measured | not measured"
    assert f"| linear probe, share (n = 100) | {probed} |" in lines


def test_and_what_other_numbers_say(tmp_path):
    found = {
        "flow": measured(bits_per_dim=bits(1.05), recall=Estimate(0.0)),
        "DDPM": measured(bits_per_dim=bits(1.0, "pixels binarized at 128"), recall=Estimate(0.0)),
    }
    said = "\n".join(page(tmp_path, found).statements)
    # Of different treatments of the pixels, numbers are not compared.
    assert "Of pixels" not in said
    assert "The recall of all models is 0." in said
    assert "(ratio below 1): no model." in said
    assert "linear probe" not in said
    assert "warned" not in said
    found["DDPM"]["bits_per_dim"] = bits(1.0)
    assert "flow 1.05 [0.95, 1.15] bits per dimension, not told apart from DDPM" in "\n".join(
        page(tmp_path, found).statements
    )


def test_bounds_in_different_numbers_of_steps_are_not_compared(tmp_path):
    found = {name: measured(bits_per_dim=bits(1.0, steps=steps)) for name, steps in (("few", 10), ("many", 20))}
    assert not any("Of pixels" in said for said in page(tmp_path, found).statements)
    found["many"]["bits_per_dim"] = bits(2.0, steps=10)
    assert "few 1.00 [0.90, 1.10] bits per dimension, below many" in "\n".join(page(tmp_path, found).statements)


def test_features_of_digits_are_named_where_the_images_are_no_digits(tmp_path):
    found = {"AE": measured(frechet_distance=about(50.0)), "VAE": measured(recall=about(0.9))}
    (tmp_path / "samples.png").touch()
    for data, count in (("fashion-mnist", 3), ("digits", 0)):
        made = page(tmp_path, found, data=data)
        assert sum("in features made for digits" in said for said in made.statements) == count
        made.write(tmp_path / data)
        table = [line for line in (tmp_path / data / "README.md").read_text().splitlines() if line.startswith("|")]
        assert sum("in features made for digits" in line for line in table) == count


def test_sizes_of_a_line_that_differ_are_both_named(tmp_path):
    found = {"AE": measured(recall=Estimate(0.5, 0.4, 0.6, 1000)), "VAE": measured()}
    (tmp_path / "samples.png").touch()
    made = page(tmp_path, found)
    made.write(tmp_path / "page")
    text = (tmp_path / "page" / "README.md").read_text()
    assert "| recall, share (n = 100 to 1,000) |" in text
    assert "| precision, share (n = 100) |" in text
    # Of what has no size, none is named.
    assert "| parameters | 10 | 10 |" in text
