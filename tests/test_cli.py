"""The command line as a user meets it: a run from end to end, every error on one line, and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import genfast
from genfast.__main__ import main
from genfast.models import VAE, AutoEncoder, registry

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


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(folder):
    return {path.name for path in folder.iterdir()}


def write_images(folder, count=12, size=(28, 28)):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, size[1], size[0]), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run of the default data, and what the command printed."""
    cwd = tmp_path_factory.mktemp("cwd")
    done = genfast_command("train", "vae", "--epochs", "2", "--batch-size", "500", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "runs" / "vae-digits", done


def succeeds(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def fails(capsys, *arguments, code=2):
    """The one line on stderr of a command that fails."""
    assert main([str(argument) for argument in arguments]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_train_writes_everything(run):
    folder, done = run
    assert names(folder) == PICTURES | MODEL | RECORDS | {"interpolation.png"}
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[1:3]] == ["epoch 1/2", "epoch 2/2"]
    assert "test elbo" in lines[2]
    assert lines[-1] == "finished: runs/vae-digits"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
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


@pytest.mark.parametrize("epochs", [0, 2])
def test_ctrl_c_leaves_a_usable_run(epochs, tmp_path):
    """Interrupted within the first epoch, and after the second."""
    arguments = ["train", "vae", "--epochs", "100000", "--batch-size", "1000", "--out", "run"]
    # Where the tests run in the background, SIGINT may be ignored, and that is inherited.
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=tmp_path, env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        for line in process.stdout:
            begun = line.startswith("vae:") if epochs == 0 else line.startswith(f"epoch {epochs:>6}/")
            if begun:
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out.splitlines()[-1] == "interrupted: run"
    assert err == ""
    folder = tmp_path / "run"
    done = len((folder / "metrics.jsonl").read_text().splitlines())
    curves = {"curves.png"} if done else set()
    assert names(folder) == {"samples.png", "reconstructions.png", "interpolation.png"} | MODEL | RECORDS | curves
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert done >= epochs
    model = registry.load(folder)
    score = genfast.training.evaluate(model, genfast.training.load_dataset("digits").test)["loss"]
    assert score < (450 if epochs else 600)


def test_divergence_keeps_the_settings_and_tells(capsys, tmp_path, images):
    line = fails(capsys, "train", "vae", "--data", images, "--epochs", 3, "--lr", 1e20, "--out", tmp_path, code=1)
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
        (["train", "gan"], "unknown model family 'gan': expected one of vae, ae"),
        (["train"], "family"),
        (["train", "vae", "--nonesuch"], "--nonesuch"),
        (["train", "vae", "--epochs", "0"], "--epochs"),
        (["train", "vae", "--batch-size", "many"], "--batch-size"),
        (["train", "vae", "--lr", "-1"], "--lr: expected a positive number, got -1.0"),
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
    (folder / "config.json").write_text('{"model_type": "GAN"}')
    return "unknown model_type 'GAN'"


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
    options = ("--epochs", 3, "--lr", 1e20, "--out", tmp_path, "--overwrite")
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
