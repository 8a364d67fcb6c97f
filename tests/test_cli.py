"""The command line as a user meets it: a run from end to end, every error on one line, and Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import genfast
from genfast.__main__ import main
from genfast.models import VAE, AutoEncoder, registry
from genfast.training import Checkpoints
from tests.commands import contents, fails, names, rows_of, succeeds, write_images
from tests.stopping import calls_in_steps, full_disk

COMMAND = [sys.executable, "-m", "genfast"]
PICTURES = {"samples.png", "reconstructions.png", "curves.png"}
MODEL = {"config.json", "model.safetensors"}
RECORDS = {"checkpoints", "run.json", "metrics.jsonl"}


def environment():
    """The user's, with this checkout importable from any folder."""
    paths = [str(Path(genfast.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def genfast_command(*arguments, cwd):
    return subprocess.run([*COMMAND, *arguments], cwd=cwd, env=environment(), capture_output=True, text=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run of the default data, and what the command printed."""
    cwd = tmp_path_factory.mktemp("cwd")
    options = ("--epochs", "2", "--batch-size", "500", "--evaluate-every", "1")
    done = genfast_command("train", "vae", *options, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "runs" / "vae-digits", done


def test_train_writes_everything(run):
    folder, done = run
    assert names(folder) == PICTURES | MODEL | RECORDS | {"interpolation.png"}
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[1:3]] == ["epoch 1/2", "epoch 2/2"]
    assert "test elbo" in lines[2]
    assert lines[-1] == "finished: runs/vae-digits"
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["test_elbo"] > rows[0]["test_elbo"]
    settings = json.loads((folder / "run.json").read_text())
    assert settings["status"] == "finished"
    assert (settings["data"], settings["batch_size"], settings["epochs"], settings["seed"]) == ("digits", 500, 2, 0)
    for picture in PICTURES | {"interpolation.png"}:
        assert np.array(Image.open(folder / picture)).std() > 1


def test_the_model_loads_and_scores_as_the_metrics_say(run):
    folder, _ = run
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    test = genfast.training.load_dataset("digits").test
    assert isinstance(registry.load(folder), VAE)
    again = genfast.training.evaluate(registry.load(folder), test, seed=0)
    assert again["elbo"] == pytest.approx(last["test_elbo"], rel=1e-6)


def test_sample(run, capsys, tmp_path):
    folder, _ = run
    out = tmp_path / "picture.png"
    assert succeeds(capsys, "sample", folder, "-n", 9, "--seed", 3, "--out", out).strip() == str(out)
    assert Image.open(out).size == (2 * (3 * 30 + 2), 2 * (3 * 30 + 2))
    first = out.read_bytes()
    succeeds(capsys, "sample", folder, "-n", 9, "--seed", 3, "--out", out)
    assert out.read_bytes() == first
    succeeds(capsys, "sample", folder, "-n", 9, "--seed", 3, "--mode", "bernoulli", "--out", out)
    assert set(np.unique(Image.open(out))) == {0, 128, 255}


def test_evaluate(run, capsys):
    folder, _ = run
    out = succeeds(capsys, "evaluate", folder, "-k", 50, "--limit", 30, "--binarize", "dynamic")
    (folder / "evaluation.json").rename(folder / "first.json")
    result = json.loads((folder / "first.json").read_text())
    assert (result["data"], result["binarize"], result["images"], result["k"]) == ("digits", "dynamic", 30, 50)
    assert result["elbo"] == pytest.approx(-(result["nll"] + result["kl"]))
    # The bound tightens: far more than its noise here.
    assert result["elbo"] < result["log_likelihood"] < 0
    assert f"{result['log_likelihood']:.3f}" in out
    assert "grey" not in out
    succeeds(capsys, "evaluate", folder, "-k", 50, "--limit", 30, "--binarize", "dynamic", "--batch-size", 7)
    again = json.loads((folder / "evaluation.json").read_text())
    assert again["log_likelihood"] == pytest.approx(result["log_likelihood"], rel=1e-5)
    assert "grey" in succeeds(capsys, "evaluate", folder, "-k", 2, "--limit", 5)
    (folder / "first.json").unlink()
    (folder / "evaluation.json").unlink()


def test_autoencoder_with_two_latents_from_a_folder_of_images(images, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(images.parent)
    out = tmp_path / "run"
    options = ("--data", "images", "--image-size", 16, "--latent-dim", 2, "--epochs", 1, "--preset", "conv")
    succeeds(capsys, "train", "ae", *options, "--binarize", "threshold", "--out", out)
    assert names(out) == PICTURES | MODEL | RECORDS | {"manifold.png"}
    model = registry.load(out)
    assert isinstance(model, AutoEncoder)
    assert model.image_shape == (1, 16, 16)
    # The folder of images is found again from elsewhere, and scaled as for training.
    monkeypatch.chdir(tmp_path)
    printed = succeeds(capsys, "evaluate", out)
    assert "nll" in printed
    assert "log_likelihood" not in printed


def test_options_reach_the_model_and_the_loss(capsys, tmp_path, images):
    kls = {}
    for beta in ("1", "50"):
        out = tmp_path / beta
        options = ("--epochs", 2, "--latent-dim", 3, "--likelihood", "gaussian", "--no-fused", "--beta", beta)
        succeeds(capsys, "train", "vae", "--batch-size", 1000, *options, "--out", out)
        model = registry.load(out)
        assert (model.latent_dim, model.likelihood, model.fused) == (3, "gaussian", False)
        kls[beta] = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["kl"]
    assert kls["50"] < kls["1"]


def test_the_same_seed_gives_the_same_run(capsys, tmp_path, images):
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        succeeds(capsys, "train", "vae", "--data", images, "--epochs", 2, "--seed", seed, "--out", tmp_path / name)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    weights = Path("model.safetensors")
    assert a[weights] == b[weights] != c[weights]
    assert a[Path("samples.png")] == b[Path("samples.png")]


def test_default_folders_are_new_each_time(capsys, tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        succeeds(capsys, "train", "vae", "--data", images, "--epochs", 1)
    assert names(tmp_path / "runs") == {"vae-images", "vae-images-2", "vae-images-3"}


def test_overwrite_replaces_the_whole_run(capsys, tmp_path, images):
    succeeds(capsys, "train", "vae", "--data", images, "--epochs", 2, "--latent-dim", 2, "--out", tmp_path)
    succeeds(capsys, "sample", tmp_path, "-n", 4)
    before = contents(tmp_path)
    assert "--overwrite" in fails(capsys, "train", "vae", "--data", images, "--epochs", 1, "--out", tmp_path)
    assert contents(tmp_path) == before
    succeeds(capsys, "train", "vae", "--data", images, "--epochs", 1, "--out", tmp_path, "--overwrite")
    assert names(tmp_path) == PICTURES | MODEL | RECORDS | {"interpolation.png"}
    assert registry.load(tmp_path).latent_dim == 20
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_divergence_keeps_the_settings_and_tells(capsys, tmp_path, images):
    options = ("--epochs", 3, "--lr", 1e20, "--evaluate-every", 1, "--out", tmp_path)
    line = fails(capsys, "train", "vae", "--data", images, *options, code=1)
    assert "epoch 1" in line
    assert "no model to keep" in line
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "diverged"


def test_an_error_through_the_real_command(tmp_path):
    done = genfast_command("train", "vae", "--data", "nonesuch", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: data: expected one of digits, mnist, fashion-mnist, kmnist, cifar10 or")
    assert len(done.stderr.splitlines()) == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "ebm"], "unknown model family 'ebm': expected one of vae, ae"),
        (["train"], "family"),
        (["train", "vae", "--nonesuch"], "--nonesuch"),
        (["train", "vae", "--epochs", "0"], "--epochs"),
        (["train", "vae", "--batch-size", "many"], "--batch-size"),
        (["train", "vae", "--lr", "-1"], "--lr: expected a positive number, got -1.0"),
        (["train", "vae", "--grad-clip", "0"], "--grad-clip: expected a positive number, got 0.0"),
        (["train", "vae", "--time", "nan"], "--time: expected a positive number, got nan"),
        (["train", "vae", "--ema-decay", "1"], "--ema-decay: expected a number between 0 and 1, got 1.0"),
        (["train", "vae", "--lr-schedule", "sine"], "--lr-schedule: expected one of constant, cosine, linear"),
        (["train", "vae", "--mode", "slow"], "--mode: expected one of auto, eager, compile, graph, got slow"),
        (["train", "vae", "--mode", "graph", "--device", "cpu"], "--mode: expected a CUDA device for graph, got cpu"),
        (["train", "vae", "--amp", "fp64"], "--amp: expected one of bf16, fp16, got fp64"),
        (["train", "vae", "--matmul-precision", "low"], "--matmul-precision: expected one of highest, high, medium"),
        (["train", "vae", "--batch-size", "5001"], "batch_size: expected at most the 5000 images of data, got 5001"),
        (["train", "vae", "--warmup-steps", "-1"], "--warmup-steps"),
        (["train", "vae", "--micro-batches", "0"], "--micro-batches"),
        (["train", "vae", "--patience", "0"], "--patience"),
        (["train", "vae", "--keep", "0"], "--keep"),
        (["train", "vae", "--checkpoint-every", "0"], "--checkpoint-every"),
        (["train", "vae", "--resume"], "--resume: expected --out with the folder of a run, got none"),
        (["train", "vae", "--resume", "--out", "nonesuch"], "of a run, got nonesuch, which holds none"),
        (["train", "vae", "--resume", "--overwrite"], "--overwrite: expected none with --resume"),
        (["train", "vae", "--binarize", "perhaps"], "binarize: expected one of none, threshold, dynamic"),
        (["train", "vae", "--preset", "transformer"], "preset"),
        (["train", "vae", "--likelihood", "poisson"], "likelihood"),
        (["train", "vae", "--free-bits", "-1"], "free_bits"),
        (["train", "vae", "--free-bits", "-1", "--no-fused"], "free_bits"),
        (["train", "vae", "--beta", "nan"], "beta: expected a finite number, got nan"),
        (["train", "vae", "--beta", "inf", "--no-fused"], "beta: expected a finite number, got inf"),
        (["train", "vae", "--seed", str(2**64)], f"'--seed': expected at most 64 bits, got {2**64}"),
        (["sample", "nonesuch", "--seed", str(-(2**63) - 1)], "'--seed': expected at most 64 bits"),
        (["evaluate", "nonesuch", "--seed", str(2**64)], "'--seed': expected at most 64 bits"),
        (["train", "ae", "--beta", "2"], "--beta is not an option of the family ae"),
        (["train", "vae", "--device", "abacus"], "--device: abacus cannot be used here"),
        (["sample", "nonesuch"], "RUN: expected the folder of a run, got nonesuch"),
        (["evaluate", "nonesuch"], "RUN: expected the folder of a run, got nonesuch"),
        (["nonesuch"], "nonesuch"),
    ],
)
def test_mistakes_in_the_arguments(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in fails(capsys, *arguments)
    assert not any(tmp_path.iterdir())


def test_data_that_cannot_be_used(capsys, tmp_path):
    out = tmp_path / "run"

    def refused(data, *options):
        line = fails(capsys, "train", "vae", "--data", data, "--out", out, *options)
        assert not out.exists()
        return line

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no images" in refused(empty)
    mixed = write_images(tmp_path / "mixed")
    Image.new("L", (20, 28)).save(mixed / "05.png")
    assert "05.png is 28 x 20" in refused(mixed)
    broken = write_images(tmp_path / "broken")
    (broken / "05.png").write_bytes((broken / "05.png").read_bytes()[:100])
    assert "cannot read the image" in refused(broken)
    assert "05.png" in refused(broken, "--image-size", 14)


def test_out_that_cannot_be_written(capsys, tmp_path, images):
    file = tmp_path / "file"
    file.write_text("precious")
    assert "is a file" in fails(capsys, "train", "vae", "--data", images, "--out", file)
    below = fails(capsys, "train", "vae", "--data", images, "--out", file / "run")
    assert "--out: cannot write to" in below
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "run.json").write_text("{}")
    for more in ((), ("--overwrite",)):
        line = fails(capsys, "train", "vae", "--data", images, "--out", foreign, *more)
        assert "not empty and not a run of genfast" in line
    assert file.read_text() == "precious"
    assert contents(foreign) == {Path("run.json"): b"{}"}
    assert names(tmp_path) == {"file", "foreign"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder")
def test_out_without_permission(capsys, tmp_path, images):
    tmp_path.chmod(0o500)
    line = fails(capsys, "train", "vae", "--data", images, "--out", tmp_path / "run")
    tmp_path.chmod(0o700)
    assert "--out: cannot write to" in line


@pytest.fixture
def saved(tmp_path):
    """A run's folder, small and quickly made."""
    folder = tmp_path / "saved"
    torch.manual_seed(0)
    VAE(latent_dim=2, hidden_dims=(8,)).save_pretrained(folder)
    return folder


def damage_truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "model.safetensors"


def damage_of_another_model(folder):
    AutoEncoder(latent_dim=2, hidden_dims=(8,)).save_pretrained(folder / "ae")
    (folder / "ae" / "model.safetensors").rename(folder / "model.safetensors")
    return "does not fit"


def damage_of_an_unknown_class(folder):
    (folder / "config.json").write_text('{"model_type": "EBM"}')
    return "unknown model_type 'EBM'"


def damage_pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    return "pickles can run code and are refused"


def damage_without_config(folder):
    (folder / "config.json").unlink()
    return "config.json"


def damage_config_text(folder):
    (folder / "config.json").write_text("{")
    return "config.json"


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncated, damage_of_another_model, damage_of_an_unknown_class, damage_pickled, damage_without_config,
        damage_config_text,
    ],
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_used(damage, capsys, saved):
    expected = damage(saved)
    before = contents(saved)
    assert expected in fails(capsys, "sample", saved)
    assert expected in fails(capsys, "evaluate", saved, "--data", "digits")
    assert contents(saved) == before


def test_evaluate_with_data_of_another_size(capsys, saved, tmp_path):
    before = contents(saved)
    line = fails(capsys, "evaluate", saved, "--data", write_images(tmp_path / "other", size=(20, 20)))
    assert "28" in line
    assert "20" in line
    assert "name the data" in fails(capsys, "evaluate", saved)
    assert contents(saved) == before


def test_sample_out_must_be_a_picture_that_can_be_written(capsys, saved, tmp_path):
    assert "--out: expected a name that ends in .png" in fails(capsys, "sample", saved, "--out", tmp_path / "x.txt")
    line = fails(capsys, "sample", saved, "--out", tmp_path / "absent" / "x.png")
    assert str(tmp_path / "absent" / "x.png") in line
    assert "mode" in fails(capsys, "sample", saved, "--mode", "loud")


def test_help_and_version(capsys):
    for command in ("train", "sample", "evaluate", "info", "check"):
        assert command in succeeds(capsys)
        assert "Usage" in succeeds(capsys, command, "--help")
    assert succeeds(capsys, "--version").strip() == genfast.__version__


def test_info(capsys):
    out = succeeds(capsys, "info")
    assert genfast.__version__ in out
    assert torch.__version__ in out
    for op in genfast.functional.explain_path():
        assert f"op {op}" in out


def test_without_the_train_extra(tmp_path):
    """typer made impossible to import: what a base install has."""
    code = "import sys; sys.modules['typer'] = None; from genfast.__main__ import main; sys.exit(main(['info']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: the command line needs typer, of the [train] extra: pip install -e '.[train]'\n"
    )


def test_a_failed_run_does_not_replace_a_good_one(capsys, tmp_path, images):
    succeeds(capsys, "train", "vae", "--data", images, "--epochs", 1, "--out", tmp_path)
    before = contents(tmp_path)
    options = ("--epochs", 3, "--lr", 1e20, "--evaluate-every", 1, "--out", tmp_path, "--overwrite")
    assert "still holds the run" in fails(capsys, "train", "vae", "--data", images, *options, code=1)
    assert contents(tmp_path) == before


def test_an_existing_folder_that_cannot_be_written_is_found_first(capsys, tmp_path, monkeypatch):
    # The working folder, removed: even root can make no file in it.
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    line = fails(capsys, "train", "vae", "--data", "nonesuch", "--out", ".")
    assert "--out: cannot write to . (" in line


def test_a_folder_that_can_be_written_is_left_alone_by_the_check(capsys, tmp_path):
    for out in (tmp_path / "there", tmp_path / "not" / "yet"):
        (tmp_path / "there").mkdir(exist_ok=True)
        assert "data:" in fails(capsys, "train", "vae", "--data", "nonesuch", "--out", out)
    assert names(tmp_path) == {"there"}
    assert not names(tmp_path / "there")


def test_evaluate_scores_the_same_pixels_twice(capsys, tmp_path, images):
    """With q(z | x) = N(0, I) the ELBO of one draw and log p of one draw are the same number for the same pixels."""
    model = VAE(latent_dim=2, hidden_dims=(8,))
    for head in (model.fc21, model.fc22):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    model.save_pretrained(tmp_path)
    succeeds(capsys, "evaluate", tmp_path, "--data", images, "--binarize", "dynamic", "-k", 1)
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["kl"] == 0
    assert result["log_likelihood"] == pytest.approx(result["elbo"], rel=1e-6)


def test_evaluate_speaks_of_grey_pixels_only_where_they_matter(capsys, tmp_path, images):
    for likelihood, expected in (("bernoulli", True), ("gaussian", False)):
        VAE(latent_dim=2, hidden_dims=(8,), likelihood=likelihood).save_pretrained(tmp_path)
        assert ("grey" in succeeds(capsys, "evaluate", tmp_path, "--data", images, "-k", 2)) is expected


def test_evaluate_tells_what_it_cannot_write(capsys, saved, images):
    (saved / "evaluation.json").mkdir()
    assert main(["evaluate", str(saved), "--data", str(images), "-k", "2"]) == 2
    printed = capsys.readouterr()
    assert "log_likelihood" in printed.out
    assert "evaluation.json" in printed.err


def test_standard_error(capsys, saved, tmp_path):
    data = write_images(tmp_path / "thirty", count=30)
    options = ("--data", data, "-k", 4, "--binarize", "threshold")
    succeeds(capsys, "evaluate", saved, *options)
    result = json.loads((saved / "evaluation.json").read_text())
    images = genfast.training.DeviceDataset(genfast.training.load_dataset(data).test, binarize="threshold").images
    values = registry.load(saved).log_prob(images, 4, seed=genfast.training.evaluation_seed(0))
    assert len(values) == 3
    assert result["standard_error"] == pytest.approx(float(values.std(correction=1)) / 3**0.5, rel=1e-4)
    succeeds(capsys, "evaluate", saved, *options, "--limit", 1)
    assert "standard_error" not in json.loads((saved / "evaluation.json").read_text())


# Runs that are stopped, resumed and replaced.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """36 + 4 images: four steps an epoch with --batch-size 9."""
    return write_images(tmp_path_factory.mktemp("tiny") / "images", count=40, size=(8, 8))


def train(data, out, *options):
    return ("train", "vae", "--data", data, "--out", out, "--batch-size", 9, *options)


def status_of(folder):
    return json.loads((folder / "run.json").read_text())["status"]


def untimed_rows_of(folder):
    times = ("seconds", "images_per_second")
    return [{name: value for name, value in row.items() if name not in times} for row in rows_of(folder)]


def assert_same_run(one, other):
    for name in MODEL:
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert untimed_rows_of(one) == untimed_rows_of(other)


class Killed(BaseException):
    """As a kill: nothing catches it, so nothing more is written."""


def kill():
    raise Killed


@pytest.fixture
def in_step():
    """`in_step(3, action)` calls it within the third optimizer step from then on."""
    # Where the tests run in the background, SIGINT may be ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with calls_in_steps() as register:
        yield register
    signal.signal(signal.SIGINT, before)


def interrupt():
    signal.raise_signal(signal.SIGINT)


def terminate():
    signal.raise_signal(signal.SIGTERM)


def stopped_by(number, cwd, *arguments):
    """The real command, sent a signal once it has shown its second epoch; what it printed."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], cwd=cwd, env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        epochs = 0
        for line in process.stdout:
            epochs += line.startswith("epoch ")
            if epochs == 2:
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert err == ""
    return process.returncode, out


def test_stopped_in_every_way_and_resumed_is_the_run_itself(tiny, capsys, tmp_path):
    """Ctrl-C, then SIGTERM, then a kill, each of a command of its own."""
    arguments = train(tiny, "run", "--checkpoint-every", 3, "--ema-decay", 0.9)
    code, out = stopped_by(signal.SIGINT, tmp_path, *arguments, "--epochs", 100_000)
    folder = tmp_path / "run"
    assert code == 130
    assert out.splitlines()[-1] == "interrupted: run"
    assert status_of(folder) == "interrupted"
    first = len(rows_of(folder))
    assert first >= 2
    assert names(folder) == PICTURES | MODEL | RECORDS | {"interpolation.png"}
    assert registry.load(folder).image_shape == (1, 8, 8)

    code, out = stopped_by(signal.SIGTERM, tmp_path, "train", "vae", "--resume", "--out", "run")
    assert code == 143
    assert out.splitlines()[-1] == "interrupted: run"
    assert status_of(folder) == "interrupted"
    second = len(rows_of(folder))
    assert second >= first + 2

    code, _ = stopped_by(signal.SIGKILL, tmp_path, "train", "vae", "--resume", "--out", "run")
    assert code == -signal.SIGKILL
    assert status_of(folder) == "running"

    steps = Checkpoints(folder / "checkpoints").steps()[-1]
    epochs = max(second, steps // 4) + 2
    printed = succeeds(capsys, "train", "vae", "--resume", "--out", folder, "--epochs", epochs)
    assert printed.splitlines()[-1] == f"finished: {folder}"
    succeeds(capsys, *train(tiny, tmp_path / "whole", "--ema-decay", 0.9, "--epochs", epochs))
    assert_same_run(folder, tmp_path / "whole")


def test_ctrl_c_within_the_first_epoch_leaves_a_usable_run(capsys, tmp_path, in_step):
    in_step(3, interrupt)
    assert main(["train", "vae", "--epochs", "9", "--batch-size", "1000", "--out", str(tmp_path)]) == 130
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"interrupted: {tmp_path}"
    assert printed.err == ""
    assert names(tmp_path) == {"samples.png", "reconstructions.png", "interpolation.png"} | MODEL | RECORDS
    assert status_of(tmp_path) == "interrupted"
    assert untimed_rows_of(tmp_path) == []
    score = genfast.training.evaluate(registry.load(tmp_path), genfast.training.load_dataset("digits").test)["loss"]
    assert score < 600


def test_a_second_ctrl_c_stops_at_once(capsys, tmp_path, tiny, in_step):
    in_step(2, interrupt, interrupt)
    assert main([str(word) for word in train(tiny, tmp_path / "run", "--epochs", 3)]) == 130
    assert capsys.readouterr().out.splitlines()[-1] == f"interrupted: {tmp_path / 'run'}"
    assert status_of(tmp_path / "run") == "interrupted"
    assert names(tmp_path / "run") == {"run.json"}
    # It began no run that could be continued, so resuming begins.
    succeeds(capsys, "train", "vae", "--resume", "--out", tmp_path / "run")
    succeeds(capsys, *train(tiny, tmp_path / "whole", "--epochs", 3))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_resumed_run_has_its_own_options(capsys, tmp_path, tiny, in_step):
    options = (
        "--epochs", 4, "--lr", 1e-2, "--lr-schedule", "cosine", "--warmup-steps", 3, "--grad-clip", 30,
        "--ema-decay", 0.8, "--micro-batches", 2, "--latent-dim", 3, "--beta", 2, "--binarize", "dynamic", "--seed", 5,
        "--amp", "bf16", "--image-size", 6, "--likelihood", "gaussian", "--free-bits", 0.1, "--no-fused",
        "--tensorboard", "--evaluate-every", 1,
    )  # fmt: skip
    succeeds(capsys, *train(tiny, tmp_path / "whole", *options))
    in_step(6, terminate)
    assert main([str(word) for word in train(tiny, tmp_path / "run", *options)]) == 143
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == 6
    assert len(rows_of(tmp_path / "run")) == 1
    # Those that are given again are the same.
    succeeds(capsys, "train", "vae", "--resume", "--out", tmp_path / "run", "--data", tiny, "--lr", 0.01)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    one, other = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "whole"))
    assert one == other
    assert one["status"] == "finished"
    assert {"epochs": 4, "lr": 0.01, "binarize": "dynamic", "image_size": 6, "fused": False}.items() <= one.items()
    steps = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("test/loss")
    assert [event.step for event in steps] == [4, 8, 12, 16]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of two epochs, with all that a run may leave."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main([str(word) for word in train(tiny, folder, "--epochs", 2, "--tensorboard", "--latent-dim", 2)]) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--lr", 0.01], "--lr: expected that of the run, 0.001, got 0.01"),
        (["--batch-size", 8], "--batch-size: expected that of the run, 9, got 8"),
        (["--data", "digits"], "--data: expected that of the run, "),
        (["--seed", 1], "--seed: expected that of the run, 0, got 1"),
        (["--latent-dim", 3], "--latent-dim: expected that of the run, 2, got 3"),
        (["--binarize", "dynamic"], "--binarize: expected that of the run, none, got dynamic"),
        (["--ema-decay", 0.9], "--ema-decay: expected that of the run, None, got 0.9"),
        (["--lr-schedule", "cosine"], "--lr-schedule: expected that of the run, constant, got cosine"),
        (["--amp", "bf16"], "--amp: expected that of the run, None, got bf16"),
        (["--no-fused"], "--fused: expected that of the run, None, got False"),
        (["--overwrite"], "--overwrite: expected none with --resume"),
    ],
)
def test_a_resumed_run_refuses_other_options_by_name(options, expected, capsys, finished):
    before = contents(finished)
    assert expected in fails(capsys, "train", "vae", "--resume", "--out", finished, *options)
    assert contents(finished) == before


def test_resume_refuses_what_is_no_run_of_that_family(capsys, finished, tmp_path):
    before = contents(finished)
    line = fails(capsys, "train", "ae", "--resume", "--out", finished)
    assert "--resume: family: expected that of the run, vae, got ae" in line
    assert contents(finished) == before
    (tmp_path / "file").write_text("precious")
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "file", tmp_path / "empty", tmp_path / "file" / "below"):
        assert str(out) in fails(capsys, "train", "vae", "--resume", "--out", out)
    assert names(tmp_path) == {"file", "empty"}


def test_how_a_resumed_run_goes_on_may_be_given_anew(capsys, copied, tiny, tmp_path):
    options = ("--epochs", 5, "--micro-batches", 2, "--mode", "eager", "--keep", 1, "--evaluate-every", 1)
    succeeds(capsys, "train", "vae", "--resume", "--out", copied, *options, "--checkpoint-every", 3, "--patience", 9)
    assert [row["epoch"] for row in untimed_rows_of(copied)] == [1, 2, 3, 4, 5]
    assert Checkpoints(copied / "checkpoints").steps()[-1] == 20
    assert json.loads((copied / "run.json").read_text())["epochs"] == 5
    succeeds(capsys, *train(tiny, tmp_path / "whole", "--epochs", 5, "--latent-dim", 2))
    expected = [row["loss"] for row in untimed_rows_of(tmp_path / "whole")]
    assert [row["loss"] for row in untimed_rows_of(copied)] == pytest.approx(expected, rel=1e-5)
    assert all("test_loss" in row for row in untimed_rows_of(copied)[2:])


def test_a_finished_run_is_resumed_to_itself(capsys, copied):
    before = contents(copied)
    assert "finished" in succeeds(capsys, "train", "vae", "--resume", "--out", copied)
    after = contents(copied)
    for path in (Path("model.safetensors"), Path("metrics.jsonl"), Path("run.json"), Path("samples.png")):
        assert after[path] == before[path]


def test_time_that_runs_out(capsys, tiny, tmp_path):
    out = tmp_path / "run"
    printed = succeeds(capsys, *train(tiny, out, "--epochs", 2, "--time", 1e-9))
    assert printed.splitlines()[-1] == f"out of time: {out}"
    assert status_of(out) == "out of time"
    assert [row["epoch"] for row in untimed_rows_of(out)] == [0.25]
    assert registry.load(out).latent_dim == 20
    # Its limit was for that command alone.
    assert "finished" in succeeds(capsys, "train", "vae", "--resume", "--out", out)
    succeeds(capsys, *train(tiny, tmp_path / "whole", "--epochs", 2))
    assert_same_run(out, tmp_path / "whole")


# At this rate no weight changes.
STUCK = ("--epochs", 9, "--patience", 2, "--lr", 1e-20, "--keep", 1, "--evaluate-every", 1)


def test_the_test_images_are_evaluated_so_seldom_that_it_costs_little(capsys, tiny, tmp_path):
    # 4 images to 36: fifteen times as many as 4 are seen in two epochs.
    succeeds(capsys, *train(tiny, tmp_path, "--epochs", 5))
    assert [row["epoch"] for row in untimed_rows_of(tmp_path) if "test_loss" in row] == [2, 4, 5]


def test_patience_that_runs_out(capsys, tiny, tmp_path):
    printed = succeeds(capsys, *train(tiny, tmp_path, *STUCK))
    assert printed.splitlines()[-1] == f"stopped early: {tmp_path}"
    assert status_of(tmp_path) == "stopped early"
    assert [row["epoch"] for row in untimed_rows_of(tmp_path)] == [1, 2, 3]
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 12]


def test_the_averaged_weights_are_the_model(capsys, tiny, tmp_path, in_step):
    in_step(6, kill)
    with pytest.raises(Killed):
        main([str(word) for word in train(tiny, tmp_path, "--epochs", 2, "--ema-decay", 0.9, "--checkpoint-every", 4)])
    for _ in range(2):
        model = (tmp_path / "model.safetensors").read_bytes()
        latest = Checkpoints(tmp_path / "checkpoints").latest()
        assert model == (latest / "model.safetensors").read_bytes() != (latest / "raw.safetensors").read_bytes()
        assert registry.load(tmp_path).latent_dim == 20
        succeeds(capsys, "train", "vae", "--resume", "--out", tmp_path)
    assert latest.name == "step-00000008"


def test_fp16_and_micro_batches(capsys, tiny, tmp_path):
    for name, options in {"plain": (), "fp16": ("--amp", "fp16"), "micro": ("--micro-batches", 4)}.items():
        succeeds(capsys, *train(tiny, tmp_path / name, "--epochs", 2, *options))
    plain, fp16, micro = (untimed_rows_of(tmp_path / name)[-1]["test_loss"] for name in ("plain", "fp16", "micro"))
    assert micro == pytest.approx(plain, rel=1e-5)
    assert fp16 == pytest.approx(plain, rel=1e-2)
    assert fp16 != plain


def test_a_run_that_is_replaced_stays_until_the_new_one_has_a_model(capsys, copied, tiny, in_step):
    """Whatever the new one has written by then, be it refused, diverged, interrupted twice, out of space or killed."""
    before = contents(copied)
    again = train(tiny, copied, "--overwrite", "--epochs", 3, "--tensorboard", "--checkpoint-every", 1)
    line = fails(capsys, *again, "--lr", 1e20, code=1)
    assert "the loss or a gradient is" in line
    assert "still holds the run that it held" in line
    assert contents(copied) == before
    in_step(3, interrupt, interrupt)
    assert main([str(word) for word in again]) == 130
    assert contents(copied) == before
    with full_disk(30_000):
        assert "step-00000001" in fails(capsys, *again)
    assert contents(copied) == before
    capsys.readouterr()
    in_step(3, kill)
    with pytest.raises(Killed):
        main([str(word) for word in again])
    # Its files are where they were; the next command puts its folders back.
    assert {path: text for path, text in contents(copied).items() if path.parent == Path() and path.name[0] != "."} == {
        path: text for path, text in before.items() if path.parent == Path()
    }
    assert "--overwrite" in fails(capsys, *train(tiny, copied))
    succeeds(capsys, "train", "vae", "--resume", "--out", copied)
    after = contents(copied)
    assert {str(path) for path in after} >= {str(path) for path in before}
    assert all(after[path] == before[path] for path in before if path.suffix == ".safetensors")
    assert names(copied / "checkpoints") == {path.parts[1] for path in before if path.parts[0] == "checkpoints"}


def test_a_replaced_run_leaves_nothing(capsys, copied, tiny, in_step):
    """Interrupted or finished: what is there is the new run's."""
    again = train(tiny, copied, "--overwrite", "--epochs", 1)
    in_step(2, interrupt)
    assert main([str(word) for word in again]) == 130
    assert names(copied) == {"samples.png", "reconstructions.png", "interpolation.png"} | MODEL | RECORDS
    assert names(copied / "checkpoints") == {"step-00000002"}
    assert registry.load(copied).latent_dim == 20
    succeeds(capsys, *again)
    assert names(copied) == PICTURES | MODEL | RECORDS | {"interpolation.png"}
    assert names(copied / "checkpoints") == {"step-00000004"}


def test_a_full_disk(capsys, tiny, copied, tmp_path):
    out = tmp_path / "new"
    with full_disk(30_000):
        line = fails(capsys, *train(tiny, out, "--epochs", 1))
    assert "there is no earlier checkpoint" in line
    assert str(out / "checkpoints" / "step-00000004") in line
    assert status_of(out) == "failed"
    assert names(out) == {"run.json", "checkpoints"}
    before = contents(copied)
    with full_disk(30_000):
        line = fails(capsys, "train", "vae", "--resume", "--out", copied, "--epochs", 3)
    assert f"the last checkpoint is {copied / 'checkpoints' / 'step-00000008'}" in line
    after = contents(copied)
    assert all(after[path] == before[path] for path in before)
    assert not [path for path in set(after) - set(before) if path.parts[0] != "tensorboard"]
    succeeds(capsys, "train", "vae", "--resume", "--out", copied, "--epochs", 3)
    assert len(rows_of(copied)) == 3


def test_a_resume_that_fit_refuses_changes_nothing(capsys, copied):
    state = Checkpoints(copied / "checkpoints").latest() / "state.json"
    content = json.loads(state.read_text())
    content["state"]["genfast"] = "0.0.1"
    state.write_text(json.dumps(content))
    before = contents(copied)
    line = fails(capsys, "train", "vae", "--resume", "--out", copied, "--epochs", 3)
    assert "resume: expected a checkpoint of genfast" in line
    assert contents(copied) == before


def test_divergence_keeps_the_last_good_model(capsys, tiny, tmp_path):
    # The learning rate rises until the fourth step fails.
    line = fails(
        capsys, *train(tiny, tmp_path, "--epochs", 3, "--lr", 1e30, "--warmup-steps", 10**30, "--checkpoint-every", 1),
        code=1,
    )  # fmt: skip
    latest = Checkpoints(tmp_path / "checkpoints").latest()
    assert f"the last good checkpoint is {latest}; its model is in {tmp_path}" in line
    assert (tmp_path / "model.safetensors").read_bytes() == (latest / "model.safetensors").read_bytes()
    assert all(weight.isfinite().all() for weight in registry.load(tmp_path).parameters())
    assert status_of(tmp_path) == "diverged"


def test_tensorboard_that_is_not_installed(capsys, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    line = fails(capsys, *train(tiny, tmp_path, "--epochs", 1, "--tensorboard"))
    assert "tensorboard: expected the package tensorboard, got none: pip install tensorboard" in line
    assert status_of(tmp_path) == "failed"


def test_a_run_of_an_older_version_is_sampled_and_evaluated(capsys, copied):
    """What run.json held before runs could be resumed."""
    older = {
        "genfast", "torch", "family", "data", "data_root", "image_size", "binarize", "train_images", "test_images",
        "image_shape", "epochs", "batch_size", "lr", "seed", "device", "compile", "latent_dim", "status",
    }  # fmt: skip
    settings = json.loads((copied / "run.json").read_text())
    assert older <= set(settings)
    (copied / "run.json").write_text(json.dumps({name: settings[name] for name in older}))
    shutil.rmtree(copied / "checkpoints")
    assert "elbo" in succeeds(capsys, "evaluate", copied, "-k", 2)
    succeeds(capsys, "sample", copied, "-n", 4)
    before = contents(copied)
    line = fails(capsys, "train", "vae", "--resume", "--out", copied)
    assert f"--resume: {copied} holds a model, but no checkpoint to go on from" in line
    assert contents(copied) == before


def test_under_torchrun_one_process_writes_and_speaks(tiny, capsys, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ("--data", tiny, "--batch-size", 8, "--epochs", 2, "--evaluate-every", 1)
    done = subprocess.run(
        [*launcher, *COMMAND[1:], "train", "vae", *map(str, options)], cwd=tmp_path, capture_output=True, text=True,
        env={**environment(), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("vae: ")
    assert "on cpu, 2 processes; images: 36 + 4 images; runs/vae-images" in lines[0]
    assert [line.split("  ")[0] for line in lines[1:-1]] == ["epoch 1/2", "epoch 2/2"]
    assert lines[-1] == "finished: runs/vae-images"
    assert names(tmp_path / "runs") == {"vae-images"}
    folder = tmp_path / "runs" / "vae-images"
    assert names(folder) == PICTURES | MODEL | RECORDS | {"interpolation.png"}
    succeeds(capsys, "train", "vae", *options, "--out", tmp_path / "alone")
    expected = [row["test_loss"] for row in untimed_rows_of(tmp_path / "alone")]
    assert [row["test_loss"] for row in untimed_rows_of(folder)] == pytest.approx(expected, rel=1e-5)
