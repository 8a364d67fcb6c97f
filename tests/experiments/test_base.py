"""What experiments are made of: words that follow the numbers, runs that are taken up again, pages that hold all."""

import csv
import json
import math

import pytest
import torch

from genfast.experiments.base import (
    Page,
    Paired,
    Settings,
    apart,
    best,
    equal_epochs,
    number,
    train_run,
    trend,
    versus,
)
from genfast.metrics import Estimate
from genfast.training import Splits, load_dataset


def about(value, half=0.1):
    return Estimate(value, value - half, value + half, 100)


@pytest.fixture(scope="module")
def splits():
    digits = load_dataset("digits")
    chosen = slice(None, None, 20)
    labels = digits.train_labels[chosen], digits.test_labels[chosen]
    return Splits("digits", digits.train[chosen], digits.test[chosen], *labels)


@pytest.fixture
def settings(tmp_path):
    return Settings(tmp_path / "out", budget=1.0)


def small(settings, splits, name="run", **options):
    options = {"epochs": 3, "batch_size": 50, "build_options": {"hidden_dims": [8], "latent_dim": 2}} | options
    return train_run(settings, "vae", name, splits=splits, **options)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (about(98.214, 0.295), "98.21 [97.92, 98.51]"),
        (about(98.214, 4.0), "98.2 [94.2, 102.2]"),
        (about(98.214, 40.0), "98 [58, 138]"),
        (about(0.99999, 1e-6), "1.0000 [1.0000, 1.0000]"),
        (Estimate(10.0, 10.0, 10.0, 5), "10"),
        (Estimate(0.25), "0.2500"),
        (Estimate(7.0), "7"),
        (98.2149, "98.21"),
    ],
)
def test_numbers_have_as_many_digits_as_their_interval_leaves_sense_to(value, text):
    assert number(value) == text


def test_apart_where_intervals_do_not_meet():
    assert apart(about(1.0), about(1.21))
    assert not apart(about(1.0), about(1.19))
    assert apart(1, 2)
    assert not apart(2.0, Estimate(2.0))


def test_of_the_same_images_the_difference_counts():
    terms = torch.randn(500, generator=torch.Generator().manual_seed(0)).double()
    noise = 0.01 * torch.randn(500, generator=torch.Generator().manual_seed(1))
    one, other = Paired.of(terms, "test"), Paired.of(terms + 0.02 + noise, "test")
    assert one.high > other.low
    assert apart(one, other)
    assert apart(other, one)
    assert not apart(one, Paired.of(terms + 0.02 + noise, "train"))
    assert not apart(one, Paired.of(terms + noise - noise.mean(), "test"))
    assert one.to_dict() == {"value": one.value, "low": one.low, "high": one.high, "n": 500}


def test_versus_says_which_is_larger():
    assert versus("a", about(2.0), "b", about(3.0)) == "a 2.00 [1.90, 2.10], below b 3.00 [2.90, 3.10]"
    assert versus("a", about(3.0), "b", about(2.0), "m") == "a 3.00 [2.90, 3.10] m, above b 2.00 [1.90, 2.10] m"
    assert "not told apart from" in versus("a", about(2.0), "b", about(2.1))


def test_best_names_those_that_cannot_be_told_apart_from_it():
    values = {"a": about(2.0), "b": about(2.15), "c": about(5.0)}
    assert best(values, "lower") == "a (2.00 [1.90, 2.10]); not told apart from it: b"
    assert best(values, "higher", "nats") == "c (5.00 [4.90, 5.10] nats)"
    with pytest.raises(ValueError, match="better: expected higher or lower, got 'more'"):
        best(values, "more")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, 2.0, 3.0], "rises from 1.00 [0.90, 1.10] at 0 to 3.00 [2.90, 3.10] at 2"),
        ([3.0, 2.0, 1.0], "falls from"),
        # Each step within the uncertainty, all of them together not.
        ([1.0, 1.15, 1.3], "rises from"),
        ([1.0, 1.05, 0.95], "does not change beyond its uncertainty"),
        ([1.0, 2.0, 1.9, 3.0], "rises from"),
        ([1.0, 3.0, 2.0], "rises and falls: smallest 1.00 [0.90, 1.10] at 0, largest 3.00 [2.90, 3.10] at 1, 2.00"),
        # The turn is measured from the top, not from the last step.
        ([1.0, 3.0, 2.85, 2.7], "rises and falls"),
        ([1.0, 3.0, 2.0, 4.0], "goes up and down: smallest 1.00 [0.90, 1.10] at 0, largest 4.00"),
    ],
)
def test_trend_follows_the_numbers(values, text):
    assert text in trend({index: about(value) for index, value in enumerate(values)})


def test_a_trend_needs_two_values():
    with pytest.raises(ValueError, match="values: expected at least two, got 1"):
        trend({1: 2.0})


def test_a_page_holds_its_tables_its_pictures_and_all_numbers(tmp_path):
    elsewhere = tmp_path / "elsewhere" / "dots.png"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(b"dots")
    page = Page("Sizes", "How large?")
    page.section("Seen")
    page.say("One is larger.")
    page.say("One is smaller.")
    page.text("A caveat.")
    rows = [
        {"name": "a|b", "size": about(2.0, 0.06), "count": 12345, "odd": math.nan},
        {"name": "c", "size": None, "count": 2, "odd": 1.0},
    ]
    page.table(rows, "All.", {"name": "name", "size": "size, m", "count": "count", "odd": "odd"}, name="sizes")
    page.picture(elsewhere, "Dots.")
    page.write(tmp_path / "page", {"Seed": 3})
    text = (tmp_path / "page" / "README.md").read_text()
    assert text.startswith("# Sizes\n\nHow large?\n\n## Seen\n\n- One is larger.\n- One is smaller.\n\nA caveat.\n")
    assert "| name | size, m | count | odd |\n| --- | --: | --: | --: |\n| a\\|b | 2.00 [1.94, 2.06] | 12,345 |" in text
    assert "| c | not measured | 2 | 1.00 |" in text
    assert "![Dots.](dots.png)" in text
    assert text.endswith("## How it was made\n\n- Seed: 3\n")
    assert (tmp_path / "page" / "dots.png").read_bytes() == b"dots"
    lines = list(csv.reader((tmp_path / "page" / "sizes.csv").open()))
    assert lines[0] == ["name", "size", "size_low", "size_high", "size_n", "count", "odd"]
    assert lines[1][:6] == ["a|b", "2.0", "1.94", "2.06", "100", "12345"]
    assert lines[2] == ["c", "", "", "", "", "2", "1.0"]
    # Strict: no NaN that other readers refuse.
    results = json.loads((tmp_path / "page" / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["statements"] == ["One is larger.", "One is smaller."]
    assert results["tables"]["sizes"]["rows"][0]["size"] == {"value": 2.0, "low": 1.94, "high": 2.06, "n": 100}
    assert results["pictures"] == {"dots.png": "Dots."}
    assert not list((tmp_path / "page").glob(".*"))


def test_tables_that_cannot_be_written_are_refused():
    page = Page("", "")
    with pytest.raises(ValueError, match="rows: expected at least one, got none"):
        page.table([], "None.")
    page.table([{"a": 1}], "One.", name="one")
    with pytest.raises(ValueError, match="name: expected one of its own for each table, got 'one' twice"):
        page.table([{"a": 1}], "One.", name="one")


def test_a_run_is_a_folder_as_train_makes_it(settings, splits, capsys):
    trained = small(settings, splits, loss_options={"beta": 3.0}, binarize="dynamic")
    names = {path.name for path in trained.folder.iterdir()}
    assert names >= {"run.json", "model.safetensors", "config.json", "metrics.jsonl", "samples.png", "curves.png"}
    saved = json.loads((trained.folder / "run.json").read_text())
    expected = {"family": "vae", "data": "digits", "beta": 3.0, "binarize": "dynamic", "latent_dim": 2, "seed": 0}
    assert expected.items() <= saved.items()
    assert saved["status"] == "finished"
    last = trained.history[-1]
    assert last["loss"] == pytest.approx(last["nll"] + 3 * last["kl"], rel=1e-5)
    assert trained.epochs == 3
    assert trained.seconds == sum(row["seconds"] for row in trained.history)
    assert not trained.model.training


def test_a_finished_run_is_taken_as_it_is(settings, splits, capsys):
    calls = []
    # Neither read nor changed: initial weights are of the seed alone.
    before = torch.get_rng_state()
    first = small(settings, splits, snapshot=lambda model: {"z": model.fc1.weight}, on_epoch=calls.append)
    assert torch.equal(torch.get_rng_state(), before)
    written = (first.folder / "model.safetensors").stat().st_mtime_ns
    again = small(settings, splits, snapshot=pytest.fail, on_epoch=pytest.fail)
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == written
    assert len(calls) == 3
    assert again.history == first.history
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)
    assert [epoch for epoch, _ in again.snapshots] == [0, 1, 2, 3]
    assert torch.equal(again.snapshots[-1][1]["z"], again.model.fc1.weight)
    assert not torch.equal(again.snapshots[0][1]["z"], again.model.fc1.weight)


def test_an_interrupted_run_goes_on_to_the_same_model(settings, splits, capsys):
    whole = small(settings, splits, "whole", checkpoint_every=1)

    def stop(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(settings, splits, checkpoint_every=1, snapshot=lambda model: {"z": model.fc1.weight}, on_epoch=stop)
    seen = []
    resumed = small(
        settings, splits, checkpoint_every=1, snapshot=lambda model: {"z": model.fc1.weight}, on_epoch=seen.append
    )
    assert [row["epoch"] for row in seen] == [3]
    assert [row["epoch"] for row in resumed.history] == [1, 2, 3]
    assert [epoch for epoch, _ in resumed.snapshots] == [0, 1, 2, 3]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor)


def test_a_run_with_other_settings_is_not_mixed_in(settings, splits, capsys):
    small(settings, splits)
    with pytest.raises(ValueError, match=r"--out: .*run holds a run with other settings \(lr 0.001 there, 0.01 here\)"):
        small(settings, splits, lr=0.01)
    with pytest.raises(ValueError, match="seconds: expected a number of seconds, or epochs, got neither"):
        small(settings, splits, "other", epochs=None)


def test_the_time_ends_a_run(settings, splits, capsys):
    trained = small(settings, splits, epochs=None, seconds=0.05)
    assert json.loads((trained.folder / "run.json").read_text())["status"] == "out of time"
    assert trained.epochs < 1000
    assert trained.history[-1]["epoch"] == trained.epochs
    # A falling learning rate has nothing to fall to.
    assert trained.settings["lr_schedule"] == "constant"


def test_equal_epochs_measures_once(settings, splits):
    options = {"splits": splits, "build_options": {"hidden_dims": [8], "latent_dim": 2}, "batch_size": 50}
    epochs, whole = equal_epochs(settings, "vae", seconds=1.0, **options)
    (plan,) = json.loads((settings.out / "plan.json").read_text())
    assert epochs == int(0.9 * plan["images_per_second"]) // 250
    assert whole is splits
    plan["images_per_second"] = 1000.0
    (settings.out / "plan.json").write_text(json.dumps([plan]))
    assert equal_epochs(settings, "vae", seconds=1.0, **options)[0] == 900 // 250


def test_where_no_epoch_fits_there_are_fewer_images_with_their_labels(settings, splits):
    options = {"build_options": {"hidden_dims": [8], "latent_dim": 2}, "batch_size": 50}
    equal_epochs(settings, "vae", splits=splits, seconds=0.4, **options)
    (plan,) = json.loads((settings.out / "plan.json").read_text())
    plan["images_per_second"] = 500.0
    (settings.out / "plan.json").write_text(json.dumps([plan]))
    epochs, few = equal_epochs(settings, "vae", splits=splits, seconds=0.4, **options)
    assert (epochs, len(few.train), len(few.train_labels)) == (1, 180, 180)
    assert few.test is splits.test
    # The set is sorted by its labels: a part of it must have all of them.
    assert few.train_labels.unique().tolist() == list(range(10))
    rows = [(splits.train == image).flatten(1).all(1).nonzero()[0].item() for image in few.train]
    assert torch.equal(splits.train_labels[rows], few.train_labels)
