"""Diffusion on the command line: training, its pictures, samples and videos, and the bound in bits per dimension."""

import json
import re
import shutil
import sys

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

import genfast
from genfast import report
from genfast.models import DDPM, VAE, registry
from genfast.schedules import EDM, RectifiedFlow
from genfast.training import DeviceDataset, evaluation_seed, load_dataset
from tests.commands import contents, fails, names, pixels, rows_of, succeeds, tiles, write_images

PICTURES = {"samples.png", "forward.png", "reverse.png", "curves.png"}
FILES = PICTURES | {"config.json", "model.safetensors", "checkpoints", "run.json", "metrics.jsonl"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """36 + 4 images."""
    return write_images(tmp_path_factory.mktemp("data") / "images", count=40, size=(8, 8))


def train(data, out, *options):
    return ("train", "ddpm", "--data", data, "--out", out, "--epochs", 2, *options)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    command = train(data, folder, "--num-steps", 12, "--batch-size", 9, "--evaluate-every", 1)
    assert genfast.__main__.main([str(word) for word in command]) == 0
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def saved(tmp_path):
    """A model without a run: as from another place."""
    folder = tmp_path / "saved"
    DDPM(image_shape=(1, 8, 8), preset="tiny", num_steps=30).save_pretrained(folder)
    return folder


def settings(folder):
    return json.loads((folder / "run.json").read_text())


def held_out(data):
    return load_dataset(str(data)).test


def test_train_writes_everything(data, tmp_path, capsys):
    printed = succeeds(capsys, *train(data, tmp_path / "run", "--num-steps", 12)).splitlines()
    folder = tmp_path / "run"
    assert names(folder) == FILES
    assert "elbo" not in "".join(printed)
    assert "test loss 1." in printed[2] or "test loss 0." in printed[2]
    assert printed[-2:] == ["drawing 64 images in 12 steps of ddim", f"finished: {folder}"]
    rows = rows_of(folder)
    assert {"loss", "test_loss", "grad_norm"} <= set(rows[-1])
    assert not {"nll", "kl", "test_elbo"} & set(rows[-1])
    model = registry.load(folder)
    assert isinstance(model, DDPM)
    assert model.schedule.num_steps == 12
    again = genfast.training.evaluate(model, held_out(data), seed=0)
    assert again["loss"] == pytest.approx(rows[-1]["test_loss"], rel=1e-5)
    for picture in PICTURES:
        assert pixels(folder / picture).float().std() > 1


def test_forward_shows_images_on_their_way_into_noise(data, trained):
    shown = tiles(trained / "forward.png", rows=4, columns=10)
    images = held_out(data)[:, 0]
    assert (shown[:, 0].int() - images.int()).abs().max() <= 1
    distance = (shown.float() - images.unsqueeze(1).float()).abs().mean((0, 2, 3))
    assert (distance.diff() > 0).all()


def test_reverse_ends_in_the_samples(trained):
    """Both are what `sample` draws by default, with the run's seed."""
    samples = tiles(trained / "samples.png", rows=8, columns=8)
    reverse = tiles(trained / "reverse.png", rows=8, columns=10)
    assert torch.equal(reverse[:, -1], samples[0])
    model = registry.load(trained)
    frames = model.sample(64, seed=0, sampler="ddim", steps=12, trajectory=True)
    assert (samples.flatten(0, 1).int() - (255 * frames[-1, :, 0]).round().int()).abs().max() <= 1
    # Of 13 frames ten are shown, the first and the last among them.
    assert (reverse[:, 0].int() - (255 * frames[0, :8, 0]).round().int()).abs().max() <= 1


def test_the_defaults_of_the_family(data, trained, tmp_path, capsys):
    defaults = dict(registry.get_family("ddpm").defaults)
    kept = settings(trained)
    assert kept["batch_size"] == 9
    assert defaults.pop("batch_size") > 36
    assert defaults == {name: kept[name] for name in defaults}
    # Of the batch size it is the most.
    succeeds(capsys, *train(data, tmp_path / "run", "--num-steps", 4, "--lr", 0.01, "--ema-decay", 0.5))
    kept = settings(tmp_path / "run")
    assert (kept["batch_size"], kept["lr"], kept["ema_decay"]) == (36, 0.01, 0.5)
    # Another schedule has its own objective, unless it is given.
    succeeds(capsys, *train(data, tmp_path / "flow", "--schedule", "rectified-flow"))
    assert registry.load(tmp_path / "flow").objective == "flow"
    # And no other family has them.
    succeeds(capsys, "train", "vae", "--data", data, "--epochs", 1, "--out", tmp_path / "vae")
    kept = settings(tmp_path / "vae")
    assert (kept["ema_decay"], kept["preset"], kept["lr"]) == (None, None, 1e-3)


def test_options_reach_the_model(data, tmp_path, capsys):
    def model(name, *options):
        succeeds(capsys, *train(data, tmp_path / name, "--epochs", 1, *options))
        return registry.load(tmp_path / name)

    options = ("--objective", "v", "--weighting", "min-snr", "--gamma", 3, "--no-fused", "--preset", "tiny")
    first = model("first", "--schedule", "scaled-linear", "--num-steps", 9, "--variance", "learned-range", *options)
    assert first.schedule.config["name"] == "scaled_linear"
    assert (first.schedule.num_steps, first.objective, first.variance) == (9, "v", "learned_range")
    assert (first.weighting, first.gamma, first.fused) == ("min_snr", 3, False)
    row = json.loads((tmp_path / "first" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss", "simple", "vlb"} <= set(row)


@pytest.mark.parametrize(("name", "kind"), [("rectified-flow", RectifiedFlow), ("edm", EDM)])
def test_continuous_schedules(name, kind, data, tmp_path, capsys):
    folder = tmp_path / "run"
    printed = succeeds(capsys, *train(data, folder, "--epochs", 1, "--schedule", name))
    assert "drawing 64 images in 50 steps of euler" in printed
    assert isinstance(registry.load(folder).schedule, kind)
    assert names(folder) == FILES
    assert (tiles(folder / "forward.png", 4, 10)[:, 0].int() - held_out(data)[:, 0].int()).abs().max() <= 1
    succeeds(capsys, "sample", folder, "-n", 2, "--sampler", "euler", "--steps", 3, "--eta", 0.5, "--video")
    assert len(list(imageio_ffmpeg.read_frames(folder / "reverse-0.mp4"))) == 1 + 4 + 20
    assert "bits_per_dim" in succeeds(capsys, "evaluate", folder, "--steps", 3)


def test_a_resumed_run_keeps_its_own_options(data, trained, tmp_path, capsys):
    """The defaults too, whatever they have become since."""
    folder = shutil.copytree(trained, tmp_path / "run")
    before = settings(folder)
    again = ("train", "ddpm", "--resume", "--out", folder)
    others = (("--schedule", "linear", "cosine"), ("--num-steps", 13, 12), ("--lr", 0.5, before["lr"]))
    for option, value, own in others:
        line = fails(capsys, *again, option, value)
        assert f"--resume: {option}: expected that of the run, {own}, got {value}" in line
    assert settings(folder) == before
    defaults = registry.get_family("ddpm").defaults
    changed = {"lr": 0.5, "ema_decay": 0.1, "preset": "base", "batch_size": 3, "schedule": "sigmoid", "objective": "x0"}
    assert set(changed) == set(defaults)
    original = dict(defaults)
    try:
        defaults.update(changed)
        succeeds(capsys, *again, "--epochs", 3)
    finally:
        defaults.update(original)
    assert settings(folder) == {**before, "epochs": 3}
    whole = ("--num-steps", 12, "--batch-size", 9, "--evaluate-every", 1, "--epochs", 3)
    succeeds(capsys, *train(data, tmp_path / "whole", *whole))
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_schedule_has_one_spelling(data, tmp_path, capsys):
    options = ("--epochs", 1, "--schedule", "scaled_linear", "--num-steps", 2)
    succeeds(capsys, *train(data, tmp_path, *options))
    assert settings(tmp_path)["schedule"] == "scaled-linear"
    for name in ("scaled-linear", "scaled_linear"):
        succeeds(capsys, "train", "ddpm", "--resume", "--out", tmp_path, "--schedule", name)


def test_a_replaced_run_leaves_no_video(data, copied, capsys):
    succeeds(capsys, "sample", copied, "-n", 2, "--steps", 2, "--seed", 5, "--video")
    succeeds(capsys, "sample", copied, "-n", 2, "--steps", 2, "--out", copied / "mine.png")
    extra = {f"{name}-5.{suffix}" for name, suffix in (("reverse", "mp4"), ("reverse", "gif"), ("reverse", "png"))}
    assert names(copied) == FILES | extra | {"samples-5.png", "mine.png"}
    succeeds(capsys, "train", "vae", "--data", data, "--epochs", 1, "--out", copied, "--overwrite")
    pictures = {"samples.png", "reconstructions.png", "interpolation.png", "curves.png", "mine.png"}
    assert names(copied) == (FILES - PICTURES) | pictures


def test_sample(copied, tmp_path, capsys):
    """By default 50 steps of DDIM, or as many as there are; the number of images changes none of them."""
    out = tmp_path / "picture.png"
    assert succeeds(capsys, "sample", copied, "--out", out).splitlines() == [
        "drawing 64 images in 12 steps of ddim", str(out),
    ]  # fmt: skip
    assert torch.equal(pixels(out), pixels(copied / "samples.png"))
    drawn = {}
    for options in ((), ("--seed", 1), ("--sampler", "ddpm"), ("--steps", 3), ("--eta", 0.7)):
        succeeds(capsys, "sample", copied, "-n", 4, *options, "--out", out)
        drawn[options] = tiles(out, 2, 2)
    assert len({picture.numpy().tobytes() for picture in drawn.values()}) == len(drawn)
    assert "in 12 steps of ddpm" in succeeds(capsys, "sample", copied, "--sampler", "ddpm", "-n", 1)
    expected = registry.load(copied).sample(4, seed=0, sampler="ddim", steps=12, eta=0.7)
    assert (drawn["--eta", 0.7].flatten(0, 1) - (255 * expected[:, 0]).round()).abs().max() <= 1


def test_fifty_steps_are_the_default(saved, capsys):
    DDPM(image_shape=(1, 8, 8), preset="tiny", num_steps=60).save_pretrained(saved)
    assert "drawing 2 images in 50 steps of ddim" in succeeds(capsys, "sample", saved, "-n", 2)
    assert "drawing 2 images in 7 steps of ddim" in succeeds(capsys, "sample", saved, "-n", 2, "--steps", 7)
    assert "drawing 2 images in 60 steps of ddpm" in succeeds(capsys, "sample", saved, "-n", 2, "--sampler", "ddpm")


def test_video(saved, tmp_path, capsys):
    printed = succeeds(capsys, "sample", saved, "-n", 66, "--steps", 5, "--seed", 3, "--video").splitlines()
    assert printed[0] == "drawing 64 images in 5 steps of ddim"
    assert printed[1] == "drawing 2 images in 5 steps of ddim"
    files = ["reverse-3.mp4", "reverse-3.gif", "reverse-3.png", "samples-3.png"]
    assert printed[2:] == [str(saved / name) for name in files]
    # The images are those that are drawn without a video; the first 64 of them are in it.
    succeeds(capsys, "sample", saved, "-n", 66, "--steps", 5, "--seed", 3, "--out", tmp_path / "plain.png")
    assert (pixels(tmp_path / "plain.png").int() - pixels(saved / "samples-3.png").int()).abs().max() <= 1
    frames = registry.load(saved).sample(64, seed=3, sampler="ddim", steps=5, trajectory=True)
    assert torch.equal(tiles(saved / "reverse-3.png", 8, 6)[:, -1], tiles(saved / "samples-3.png", 8, 9)[0, :8])
    picture = Image.open(saved / "reverse-3.gif")
    assert picture.n_frames == 6
    for index in (0, 5):
        picture.seek(index)
        report.save_grid(frames[index].repeat_interleave(6, 2).repeat_interleave(6, 3), tmp_path / "frame.png", gap=12)
        difference = pixels(tmp_path / "frame.png").int() - torch.from_numpy(np.array(picture.convert("L"))).int()
        assert difference.abs().max() <= 1
    reader = imageio_ffmpeg.read_frames(saved / "reverse-3.mp4")
    assert next(reader)["codec"] == "h264"
    assert len(list(reader)) == 6 + 20


def test_the_video_lies_beside_out(saved, tmp_path, capsys):
    before = names(saved)
    succeeds(capsys, "sample", saved, "-n", 2, "--steps", 2, "--video", "--out", tmp_path / "some.png")
    assert names(tmp_path) == {"saved", "some.png", "some-reverse.mp4", "some-reverse.gif", "some-reverse.png"}
    assert names(saved) == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--mode", "mean"], "--mode is not an option of the family ddpm"),
        (["--sampler", "euler"], "sampler: expected 'ddpm' or 'ddim' for a discrete schedule, got 'euler'"),
        (["--sampler", "ancestral"], "sampler: expected 'ddpm' or 'ddim'"),
        (["--steps", 31], "steps: expected"),
        (["--steps", 0], "--steps"),
        (["--eta", 1.5], "eta: expected a number in [0, 1], got 1.5"),
        (["--eta", 0.5, "--sampler", "ddpm"], "eta: expected None for the sampler 'ddpm'"),
        (["--video", "--out", "video.mp4"], "--out: expected a name that ends in .png, got video.mp4"),
    ],
)
@pytest.mark.parametrize("video", [False, True])
def test_mistakes_in_sampling(video, options, expected, saved, capsys):
    before = contents(saved)
    assert expected in fails(capsys, "sample", saved, *options, *(["--video"] if video else []))
    assert contents(saved) == before


def test_options_of_diffusion_are_refused_elsewhere(tmp_path, capsys):
    VAE(latent_dim=2, hidden_dims=(8,)).save_pretrained(tmp_path)
    before = contents(tmp_path)
    for options in (["--sampler", "ddim"], ["--steps", 5], ["--eta", 0.0], ["--video"]):
        line = fails(capsys, "sample", tmp_path, *options)
        assert line == f"error: {options[0]} is not an option of the family vae"
    line = fails(capsys, "evaluate", tmp_path, "--data", "digits", "--steps", 5)
    assert line == "error: --steps is not an option of the family vae"
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("ddpm", ["--schedule", "quadratic"], "--schedule: expected one of linear, scaled-linear, cosine, "),
        ("ddpm", ["--objective", "score"], "--objective: expected one of epsilon, x0, v, flow, edm, got score"),
        ("ddpm", ["--weighting", "snr"], "--weighting: expected one of none, min-snr, sigma, got snr"),
        ("ddpm", ["--variance", "none"], "--variance: expected one of fixed-small, fixed-large, learned-range, got "),
        ("ddpm", ["--num-steps", 0], "--num-steps"),
        ("ddpm", ["--num-steps", 10, "--schedule", "edm"], "num_steps"),
        ("ddpm", ["--gamma", -1], "gamma: expected"),
        ("ddpm", ["--variance", "learned-range", "--schedule", "edm"], "variance: expected one of"),
        ("ddpm", ["--preset", "mlp"], "preset: expected one of"),
        ("ddpm", ["--beta", 2], "--beta is not an option of the family ddpm"),
        ("ddpm", ["--latent-dim", 2], "--latent-dim is not an option of the family ddpm"),
        ("vae", ["--schedule", "linear"], "--schedule is not an option of the family vae"),
        ("ae", ["--num-steps", 10], "--num-steps is not an option of the family ae"),
        ("vae", ["--gamma", 5], "--gamma is not an option of the family vae"),
    ],
)
def test_mistakes_in_training(family, options, expected, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert expected in fails(capsys, "train", family, "--data", data, *options)
    assert not any(tmp_path.iterdir())


def test_a_video_without_the_package_is_refused_first(saved, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    before = contents(saved)
    assert main_prints_nothing(capsys, "sample", saved, "-n", 2, "--video") == (
        "error: mp4: expected the package imageio-ffmpeg, got none: pip install imageio-ffmpeg"
    )
    assert contents(saved) == before
    succeeds(capsys, "sample", saved, "-n", 2, "--steps", 2)


def main_prints_nothing(capsys, *arguments):
    """The error of a command that fails before it has done anything."""
    assert genfast.__main__.main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.strip()


def test_evaluate(data, copied, capsys):
    printed = succeeds(capsys, "evaluate", copied, "--limit", 3, "--steps", 6, "--seed", 2)
    result = json.loads((copied / "evaluation.json").read_text())
    assert set(result) == {
        "data", "binarize", "images", "seed", "loss", "steps", "bits_per_dim", "standard_error",
    }  # fmt: skip
    assert printed.startswith("bounding the bits per dimension of 3 images in 6 steps (--limit, --steps)\n")
    assert f"bits_per_dim  {result['bits_per_dim']:.3f}" in printed
    assert "elbo" not in printed
    model, images = registry.load(copied), DeviceDataset(held_out(data)[:3]).images
    values = model.bits_per_dim(images, steps=6, seed=evaluation_seed(2))
    assert result["bits_per_dim"] == pytest.approx(float(values.mean()), rel=1e-5)
    assert result["standard_error"] == pytest.approx(float(values.std()) / 3**0.5, rel=1e-3)
    assert result["loss"] == pytest.approx(genfast.training.evaluate(model, images, seed=2)["loss"], rel=1e-5)
    # Cut into batches the same noise.
    succeeds(capsys, "evaluate", copied, "--limit", 3, "--steps", 6, "--seed", 2, "--batch-size", 2)
    again = json.loads((copied / "evaluation.json").read_text())
    assert again["bits_per_dim"] == pytest.approx(result["bits_per_dim"], rel=1e-4)
    succeeds(capsys, "evaluate", copied, "--limit", 1)
    alone = json.loads((copied / "evaluation.json").read_text())
    assert alone["steps"] == 12
    assert "standard_error" not in alone


def test_mistakes_in_evaluating(copied, capsys):
    before = contents(copied)
    assert "--k is not an option of the family ddpm" in fails(capsys, "evaluate", copied, "-k", 5)
    assert "steps: expected" in fails(capsys, "evaluate", copied, "--steps", 13)
    assert contents(copied) == before


def test_help_names_what_a_family_has_of_its_own(capsys):
    text = " ".join(succeeds(capsys, "train", "--help").split())
    for value in registry.get_family("ddpm").defaults.values():
        assert re.search(rf"\(ddpm: {re.escape(str(value))}[,)]", text), value
