"""`genfast experiment`: what it lists, refuses, goes on with and replaces."""

import json
import signal

import pytest

from genfast import experiments
from genfast.experiments import EXPERIMENTS, Experiment, Page
from genfast.experiments.base import train_run
from tests.commands import contents, fails, succeeds

TRAINED, INTERRUPT = [], []


def tiny(settings):
    """An experiment of one small model."""
    splits = settings.load()
    few = splits._replace(train=splits.train[::50], test=splits.test[::50])

    def count(row):
        TRAINED.append(row["epoch"])
        if len(TRAINED) == 2 and INTERRUPT:
            signal.raise_signal(INTERRUPT[0])

    options = {"build_options": {"hidden_dims": [8], "latent_dim": 2}, "batch_size": 50, "checkpoint_every": 1}
    trained = train_run(settings, "vae", "only", splits=few, epochs=3, on_epoch=count, **options)
    page = Page("Tiny", "Does it run?")
    page.say(f"It ran for {trained.epochs} epochs.")
    return page


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(experiments.EXPERIMENTS, "tiny", Experiment("tiny", "one small model", 0.5, tiny))
    TRAINED.clear()
    INTERRUPT.clear()


def test_without_a_name_they_are_listed(capsys):
    lines = succeeds(capsys, "experiment").splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)
    assert lines[-1].split(maxsplit=1)[1] == "one small model (0.5 min)"


def test_a_page_is_written_and_its_statements_are_shown(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = succeeds(capsys, "experiment", "tiny", "--seed", 3).splitlines()
    assert lines[-2:] == ["- It ran for 3 epochs.", "experiments/tiny/README.md"]
    text = (tmp_path / "experiments" / "tiny" / "README.md").read_text()
    assert "- Command: `genfast experiment tiny --data digits --budget 0.5 --seed 3`" in text
    assert "reduced form" not in text
    run = json.loads((tmp_path / "experiments" / "tiny" / "runs" / "only" / "run.json").read_text())
    assert (run["seed"], run["status"]) == (3, "finished")


def test_the_same_command_takes_what_is_there(capsys, tmp_path):
    command = ("experiment", "tiny", "--budget", "0.1", "--out", tmp_path)
    succeeds(capsys, *command)
    before = contents(tmp_path / "runs")
    succeeds(capsys, *command)
    assert TRAINED == [1, 2, 3]
    assert contents(tmp_path / "runs") == before
    assert "a reduced form (default: 0.5)" in (tmp_path / "README.md").read_text()


def test_weights_of_inception_are_looked_at_first(capsys, tmp_path):
    line = fails(capsys, "experiment", "tiny", "--inception", "download", "--out", tmp_path / "none")
    assert line == "error: inception: expected with compare alone, got 'download' with tiny"
    command = ("experiment", "compare", "--inception", tmp_path / "no.pth", "--overwrite", "--out")
    assert "got '" in fails(capsys, *command, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    # What another one left would go with --overwrite.
    (tmp_path / "old" / "runs").mkdir(parents=True)
    for name in ("experiment.json", "report.html", "runs/run.json"):
        (tmp_path / "old" / name).write_text("{}")
    before = contents(tmp_path / "old")
    assert "no.pth' (" in fails(capsys, *command, tmp_path / "old")
    assert contents(tmp_path / "old") == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_one_goes_on(number, capsys, tmp_path):
    from genfast.__main__ import main

    INTERRUPT.append(number)
    assert main(["experiment", "tiny", "--out", str(tmp_path)]) == 130
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"interrupted: {tmp_path}; the same command goes on from there"
    assert TRAINED == [1, 2]
    assert not (tmp_path / "README.md").exists()
    assert "- It ran for 3 epochs." in succeeds(capsys, "experiment", "tiny", "--out", tmp_path)
    assert TRAINED == [1, 2, 3]


def test_other_settings_need_overwrite(capsys, tmp_path):
    succeeds(capsys, "experiment", "tiny", "--out", tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "old.png").write_text("of an earlier version")
    before = contents(tmp_path)
    line = fails(capsys, "experiment", "tiny", "--out", tmp_path, "--seed", 1)
    assert f"--out: {tmp_path} holds an experiment with other settings (seed 0 there, 1 here)" in line
    line = fails(capsys, "experiment", "kl-weight", "--out", tmp_path)
    assert "experiment 'tiny' there, 'kl-weight' here" in line
    assert contents(tmp_path) == before
    succeeds(capsys, "experiment", "tiny", "--out", tmp_path, "--seed", 1, "--overwrite")
    assert json.loads((tmp_path / "runs" / "only" / "run.json").read_text())["seed"] == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "old.png").exists()


def test_a_folder_of_something_else_is_left_alone(capsys, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for flags in ((), ("--overwrite",)):
        line = fails(capsys, "experiment", "tiny", "--out", tmp_path, *flags)
        assert f"--out: {tmp_path} is not empty and holds no experiment of genfast" in line
    assert contents(tmp_path).keys() == {(tmp_path / "thesis.tex").relative_to(tmp_path)}
    file = tmp_path / "thesis.tex"
    assert "cannot write to" in fails(capsys, "experiment", "tiny", "--out", file)
    assert file.read_text() == "mine"


def test_what_is_out_of_range(capsys, tmp_path):
    line = fails(capsys, "experiment", "tinny", "--out", tmp_path / "out")
    assert line.startswith("error: NAME: expected one of kl-weight, ")
    assert line.endswith(", got 'tinny'")
    line = fails(capsys, "experiment", "tiny", "--budget", 0, "--out", tmp_path / "out")
    assert "budget: expected a positive number of minutes, got 0" in line
    line = fails(capsys, "experiment", "tiny", "--data", "nowhere", "--out", tmp_path / "out")
    assert "data: expected one of" in line
    assert not (tmp_path / "out").exists()
