"""What tensorboard itself reads in the folder that `fit` writes."""

import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import genfast
from genfast.models import DDPM, VAE
from genfast.training.tensorboard import Board

IMAGES = torch.randint(0, 256, (24, 1, 6, 6), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
# 4 steps an epoch.
OPTIONS = {"epochs": 3, "batch_size": 6, "seed": 5, "test_data": IMAGES[:7], "log_every": 3, "progress": False}
OPTIONS |= {"evaluate_every": 1}


class Failure(Exception):
    """As sudden as a kill."""


class Line(nn.Module):
    """No genfast model, though it has a method of that name."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def loss(self, x, *, seed=None, row_offset=0):
        return {"loss": (x.float().mean() / 255 - self.value).square()}

    def sample(self):
        raise AssertionError


def vae():
    torch.manual_seed(0)
    return VAE(latent_dim=2, hidden_dims=(8,), image_shape=(1, 6, 6))


def fit(model, **options):
    return genfast.fit(model, IMAGES, **{**OPTIONS, **options})


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    tags = events.Tags()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    images = {
        tag: [(event.step, event.width, event.height, event.encoded_image_string) for event in events.Images(tag)]
        for tag in tags["images"]
    }
    return scalars, images


def steps(events):
    return [step for step, *_ in events]


def without_times(scalars):
    return {tag: events for tag, events in scalars.items() if "seconds" not in tag and "per_second" not in tag}


@pytest.fixture
def stop_in_step():
    """A failure in a step, the count of which begins with the call."""
    handles = []

    def stop(step):
        taken = []

        def count(*_):
            taken.append(1)
            if len(taken) == step:
                raise Failure

        handles.append(register_optimizer_step_post_hook(count))

    yield stop
    for handle in handles:
        handle.remove()


def test_scalars_and_samples(tmp_path):
    history = fit(vae(), tensorboard=tmp_path)
    scalars, images = read(tmp_path)
    parts = {"loss", "nll", "kl", "grad_norm"}
    epochs = {f"epoch/{name}" for name in (*parts, "seconds", "images_per_second")}
    tests = {f"test/{name}" for name in ("loss", "nll", "kl", "elbo")}
    assert set(scalars) == {f"step/{name}" for name in (*parts, "lr")} | epochs | tests
    assert all(steps(scalars[f"step/{name}"]) == [3, 6, 9, 12] for name in parts)
    for tag in epochs | tests:
        name = tag.removeprefix("epoch/").replace("test/", "test_")
        assert steps(scalars[tag]) == [4, 8, 12]
        assert [value for _, value in scalars[tag]] == pytest.approx([row[name] for row in history])
    assert set(images) == {"samples"}
    assert steps(images["samples"]) == [4, 8, 12]
    # 64 of 6 x 6 pixels in rows of eight.
    assert all(width >= 48 and height >= 48 for _, width, height, _ in images["samples"])
    assert len({picture for *_, picture in images["samples"]}) == 3


def test_the_samples_are_those_of_the_averaged_weights(tmp_path):
    weights = vae()
    fit(weights, tensorboard=tmp_path / "fit", ema_decay=0.9, epochs=1)
    with Board(tmp_path / "board") as board:
        board.epoch(4, {"epoch": 1}, weights)
    assert read(tmp_path / "fit")[1] == read(tmp_path / "board")[1]


def test_a_resumed_run_writes_no_step_twice(tmp_path, stop_in_step):
    """What a killed run wrote beyond its last checkpoint goes, what it wrote up to there stays."""
    fit(vae(), tensorboard=tmp_path / "whole", log_every=1)
    options = {"tensorboard": tmp_path / "parts", "checkpoints": tmp_path / "checkpoints", "log_every": 1}
    stop_in_step(7)
    with pytest.raises(Failure):
        fit(vae(), **options, checkpoint_every=5)
    assert steps(read(tmp_path / "parts")[0]["step/loss"]) == [1, 2, 3, 4, 5, 6]
    fit(vae(), **options, resume=True)
    scalars, images = read(tmp_path / "parts")
    whole_scalars, whole_images = read(tmp_path / "whole")
    assert without_times(scalars) == without_times(whole_scalars)
    assert images == whole_images
    assert steps(scalars["step/loss"]) == list(range(1, 13))
    assert steps(scalars["epoch/seconds"]) == [4, 8, 12]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path, stop_in_step):
    options = {"tensorboard": tmp_path / "parts", "checkpoints": tmp_path / "checkpoints", "log_every": 1}
    stop_in_step(3)
    with pytest.raises(Failure):
        fit(vae(), **options, checkpoint_every=4)
    fit(vae(), **options, resume=True)
    assert steps(read(tmp_path / "parts")[0]["step/loss"]) == list(range(1, 13))


def test_a_run_killed_as_an_epoch_was_shown(tmp_path):
    """The row of the epoch is in the checkpoint of its last step, and comes no second time."""

    def fail(row):
        raise Failure

    options = {"tensorboard": tmp_path / "parts", "checkpoints": tmp_path / "checkpoints"}
    with pytest.raises(Failure):
        fit(vae(), **options, checkpoint_every=2, on_epoch=fail)
    fit(vae(), **options, resume=True)
    scalars, images = read(tmp_path / "parts")
    assert steps(scalars["test/elbo"]) == steps(images["samples"]) == [4, 8, 12]


@pytest.mark.parametrize("schedule", ["linear", "rectified-flow"])
def test_samples_of_a_model_that_takes_many_steps_cost_little(schedule, tmp_path):
    model = DDPM(image_shape=(1, 8, 8), preset="tiny", schedule=schedule)
    rows = []
    model.net.register_forward_hook(lambda net, inputs, out: rows.append(len(out)))
    with Board(tmp_path) as board:
        board.epoch(4, {"epoch": 1}, model)
    assert rows == [16] * 25
    _, images = read(tmp_path)
    assert steps(images["samples"]) == [4]


def test_any_model_has_scalars(tmp_path):
    fit(Line(), tensorboard=tmp_path)
    scalars, images = read(tmp_path)
    assert steps(scalars["test/loss"]) == [4, 8, 12]
    assert not images


def test_nothing_changes_by_being_shown(tmp_path):
    shown, hidden = vae(), vae()
    state = torch.get_rng_state()
    fit(shown, tensorboard=tmp_path, log_every=1)
    assert torch.equal(torch.get_rng_state(), state)
    fit(hidden)
    assert all(torch.equal(value, hidden.state_dict()[name]) for name, value in shown.state_dict().items())


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    with pytest.raises(ImportError, match="tensorboard: expected the package tensorboard, got none: pip install"):
        fit(vae(), tensorboard=tmp_path)
    assert len(fit(vae())) == 3
    assert not any(tmp_path.iterdir())
