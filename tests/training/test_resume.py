"""Checkpoints of `fit`: a run that was stopped and resumed is the run that was not, bit for bit."""

import copy
import json
import math
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import genfast
from genfast import random
from genfast.models import VAE, AutoEncoder
from genfast.training import Checkpoints, DeviceDataset, Interrupted, evaluate, read
from genfast.training.resume import Saver
from tests.stopping import full_disk

TIMES = {"seconds", "images_per_second"}
# 5 steps an epoch and 3 images that are left out; of the stream these are a sixth batch.
IMAGES = torch.randint(0, 256, (43, 1, 6, 6), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
TEST = torch.randint(0, 256, (11, 1, 6, 6), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
BATCH, STEPS, EPOCHS = 8, 5, 3


class Denoiser(nn.Module):
    """Has what a VAE has not: batch norm's buffers, and dropout, which draws from torch's own generator."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(36, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 36)
        )

    def loss(self, x, *, seed=None, row_offset=0):
        x = (x / 255 if x.dtype == torch.uint8 else x).flatten(1)
        noise = random.normal(seed, *x.shape, random.Stream.LATENT, row_offset)
        return {"loss": (self.layers(x + 0.1 * noise) - x).square().sum(1).mean()}


class Stream(IterableDataset):
    """Of unknown length."""

    def __init__(self, images):
        self.images = images

    def __iter__(self):
        yield from self.images.float() / 255


class Failure(Exception):
    """As sudden as a kill: the run cannot save anything any more."""


def vae(width=8, family=VAE):
    return family(latent_dim=2, hidden_dims=(width,), image_shape=(1, 6, 6))


def with_optimizer(make):
    return lambda model: {"optimizer": make(model.parameters())}


SCHEDULED = {"lr_schedule": "cosine", "warmup_steps": 3, "grad_clip": 50.0, "ema_decay": 0.9, "micro_batches": 3}
# A model, its data, and the options of the run; those that need the model are functions of it.
RUNS = {
    "dynamic binarization, all options": (vae, DeviceDataset(IMAGES, binarize="dynamic"), SCHEDULED),
    "dropout and batch norm": (Denoiser, TensorDataset(IMAGES), {"ema_decay": 0.9, "lr_schedule": "linear"}),
    "stream": (Denoiser, Stream(IMAGES), {"warmup_steps": 7}),
    "loader that shuffles": (
        Denoiser, DataLoader(TensorDataset(IMAGES), BATCH, shuffle=True, drop_last=True), {"ema_decay": 0.9},
    ),
    "no seed": (vae, IMAGES, {"seed": None}),
    "bfloat16": (vae, IMAGES, {"amp_dtype": torch.bfloat16}),
    "float16": (vae, IMAGES, {"amp_dtype": torch.float16}),
    "own optimizer that is not fused": (
        Denoiser, IMAGES, with_optimizer(lambda weights: torch.optim.RMSprop(weights, lr=1e-3, momentum=0.9)),
    ),
    "own optimizer of two groups": (
        vae, IMAGES,
        with_optimizer(
            lambda weights: torch.optim.AdamW(
                [{"params": [weight], "lr": lr} for weight, lr in zip(weights, (1e-2, 1e-3), strict=False)], fused=True
            )
        ),
    ),
}  # fmt: skip


def fit(make, data, options, folder, **more):
    """The model after a run, and its history."""
    model = make()
    options = options(model) if callable(options) else options
    settings = {"epochs": EPOCHS, "batch_size": BATCH, "seed": 5, "test_data": TEST, "progress": False, "keep": 100}
    settings |= {"evaluate_every": 1}
    return model, genfast.fit(model, data, checkpoints=folder, **{**settings, **options, **more})


@contextmanager
def after_step(step, action):
    """`action` is called within a step, the count of which begins with this block."""
    taken = 0

    def count(*_):
        nonlocal taken
        taken += 1
        if taken == step:
            action()

    handle = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        handle.remove()


def terminate():
    signal.raise_signal(signal.SIGTERM)


def fail():
    raise Failure


def without_times(history):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in history]


def outcome(folder):
    """All that the last checkpoint holds, but for times."""
    checkpoint = read(Checkpoints(folder).latest())
    state = {**checkpoint.state, "history": without_times(checkpoint.state["history"])}
    tensors = {
        f"{key}.{name}": (tensor.dtype, tensor.shape, tensor.flatten().view(torch.uint8).tolist())
        for key, named in checkpoint.tensors.items()
        for name, tensor in named.items()
    }
    return {"steps": checkpoint.step, **state, **tensors}


def assert_same(one, other):
    assert set(one) == set(other)
    assert [name for name in one if one[name] != other[name]] == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a run comes to without an interruption: made once for each name."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("uninterrupted")
            torch.manual_seed(7)
            model, history = fit(*RUNS[name], folder)
            made[name] = outcome(folder), without_times(history), copy.deepcopy(model.state_dict())
        return made[name]

    return make


@pytest.mark.parametrize("stops", [(3,), (5,), (7, 11), (10, 15)], ids=str)
@pytest.mark.parametrize("name", RUNS)
def test_stopped_and_resumed_is_the_run_itself(name, stops, uninterrupted, tmp_path):
    """SIGTERM within an epoch, in an epoch's last step, twice, and in the very last step."""
    torch.manual_seed(7)
    done = 0
    for stop in stops:
        with after_step(stop - done, terminate), pytest.raises(Interrupted, match="SIGTERM") as stopped:
            fit(*RUNS[name], tmp_path, resume=True)
        assert stopped.value.signal == signal.SIGTERM
        assert Checkpoints(tmp_path).steps()[-1] == stop
        done = stop
        # Neither the weights that the next attempt begins with nor its random numbers count.
        torch.manual_seed(stop)
    model, history = fit(*RUNS[name], tmp_path, resume=True)
    expected, rows, weights = uninterrupted(name)
    assert history.reason == "finished"
    assert without_times(history) == rows
    assert_same(outcome(tmp_path), expected)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_failed_goes_on_from_its_last_checkpoint(name, uninterrupted, tmp_path):
    torch.manual_seed(7)
    with after_step(8, fail), pytest.raises(Failure):
        fit(*RUNS[name], tmp_path, checkpoint_every=2)
    assert Checkpoints(tmp_path).steps() == [2, 4, 6]
    torch.manual_seed(0)
    fit(*RUNS[name], tmp_path, checkpoint_every=4, resume=True)
    expected = uninterrupted(name)[0]
    assert Checkpoints(tmp_path).steps() == [2, 4, 6, *range(8, expected["steps"], 4), expected["steps"]]
    assert_same(outcome(tmp_path), expected)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_run_that_failed_as_an_epoch_was_shown(epoch, uninterrupted, tmp_path):
    """What `on_epoch` has seen has been saved: the resumed run begins with the next epoch."""
    name = "dynamic binarization, all options"

    def stop(row):
        if row["epoch"] == epoch:
            fail()

    torch.manual_seed(7)
    with pytest.raises(Failure):
        fit(*RUNS[name], tmp_path, checkpoint_every=STEPS, on_epoch=stop)
    assert Checkpoints(tmp_path).steps()[-1] == epoch * STEPS
    seen = []
    _, history = fit(*RUNS[name], tmp_path, resume=True, on_epoch=seen.append)
    assert [row["epoch"] for row in seen] == list(range(epoch + 1, EPOCHS + 1))
    assert seen == history[epoch:]
    assert_same(outcome(tmp_path), uninterrupted(name)[0])


def test_the_time_of_an_epoch_is_that_of_all_its_parts(tmp_path):
    with after_step(3, terminate), pytest.raises(Interrupted):
        fit(vae, IMAGES, {}, tmp_path)
    latest = Checkpoints(tmp_path).latest() / "state.json"
    content = json.loads(latest.read_bytes())
    assert 0 < content["state"]["place"]["elapsed"] < 600
    content["state"]["place"]["elapsed"] = 1e6
    latest.write_text(json.dumps(content))
    _, history = fit(vae, IMAGES, {}, tmp_path, resume=True)
    assert history[0]["seconds"] > 1e6
    assert history[0]["images_per_second"] == pytest.approx(STEPS * BATCH / history[0]["seconds"])
    assert history[1]["seconds"] < 1e5


def test_how_it_runs_may_change(uninterrupted, tmp_path):
    name = "no seed"
    torch.manual_seed(7)
    with after_step(7, terminate), pytest.raises(Interrupted):
        fit(*RUNS[name], tmp_path)
    other = {"micro_batches": 2, "mode": "eager", "keep": 1, "checkpoint_every": 3, "matmul_precision": "high"}
    _, history = fit(*RUNS[name], tmp_path, resume=True, **other)
    rows = uninterrupted(name)[1]
    assert [row["test_loss"] for row in history] == pytest.approx([row["test_loss"] for row in rows], rel=1e-5)


def test_a_finished_run_is_resumed_with_more_epochs(uninterrupted, tmp_path):
    name = "bfloat16"
    torch.manual_seed(7)
    fit(*RUNS[name], tmp_path, epochs=1)
    _, again = fit(*RUNS[name], tmp_path, epochs=1, resume=True, on_epoch=lambda row: fail())
    assert [row["epoch"] for row in again] == [1]
    assert again.reason == "finished"
    fit(*RUNS[name], tmp_path, resume=True)
    assert_same(outcome(tmp_path), uninterrupted(name)[0])


def test_resume_begins_where_there_is_no_checkpoint(uninterrupted, tmp_path):
    name = "dropout and batch norm"
    torch.manual_seed(7)
    fit(*RUNS[name], tmp_path / "not" / "yet", resume=True)
    assert_same(outcome(tmp_path / "not" / "yet"), uninterrupted(name)[0])


def test_a_fresh_run_leaves_checkpoints_alone(tmp_path):
    fit(vae, IMAGES, {}, tmp_path, epochs=1)
    before = outcome(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoints: expected a folder without any .* step-00000005; resume that"):
        fit(vae, IMAGES, {}, tmp_path)
    assert_same(outcome(tmp_path), before)
    with pytest.raises(ValueError, match="resume: expected the folder of checkpoints with it, got checkpoints=None"):
        fit(vae, IMAGES, {}, None, resume=True)


OTHER = {
    "class": ({"make": lambda: vae(family=AutoEncoder)}, "another model: VAE there, AutoEncoder here"),
    "width": (
        {"make": lambda: vae(width=9)}, r"model: fc1\.weight \[8, 36\].* there, \[9, 36\].* here; .* and 4 more",
    ),
    "images": ({"data": DeviceDataset(255 - IMAGES)}, "settings: data .*'digest'.* there"),
    "binarization": ({"data": DeviceDataset(IMAGES, binarize="dynamic")}, "data .*'none'.* there, .*'dynamic'.* here"),
    "kind of data": ({"data": TensorDataset(IMAGES)}, "data .*DeviceDataset.* there, .*TensorDataset.* here"),
    "batch_size": ({"batch_size": 4}, "settings: batch_size 8 there, 4 here$"),
    "seed": ({"seed": 6}, "settings: seed 5 there, 6 here$"),
    "lr": ({"lr": 1e-2}, r"settings: lr 0\.001 there, 0\.01 here$"),
    "lr_schedule": (
        {"lr_schedule": "cosine"}, "lr_schedule 'constant' there, 'cosine' here; epochs None there, 3 here$",
    ),
    "two": ({"warmup_steps": 1, "grad_clip": 1.0}, r"settings: warmup_steps 0 .*, 1 here; grad_clip None .* here$"),
    "amp_dtype": ({"amp_dtype": torch.bfloat16}, r"settings: amp_dtype 'None' there, 'torch\.bfloat16' here$"),
    "ema_decay": ({"ema_decay": 0.9}, r"settings: ema_decay None there, 0\.9 here$"),
    "loss_options": ({"loss_options": {"beta": 2.0}}, r"loss_options \{\} there, \{'beta': 2\.0\} here$"),
    "optimizer": (
        with_optimizer(lambda weights: torch.optim.SGD(weights, lr=0.1)), "optimizer None there, .*'SGD'.* here$",
    ),
    "parameters": (
        with_optimizer(lambda weights: torch.optim.Adam(list(weights)[:3])), "optimizer None there, .*'Adam'.* here$",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The checkpoints of a run that was stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    with after_step(7, terminate), pytest.raises(Interrupted):
        fit(vae, IMAGES, {}, folder)
    return folder


@pytest.mark.parametrize("name", OTHER)
def test_another_run_is_refused_and_told_what_differs(name, stopped):
    options, message = OTHER[name]
    changes = {"make": vae, "data": IMAGES, "options": options if callable(options) else {}}
    if isinstance(options, dict):
        changes |= options
    before = outcome(stopped)
    started = []
    with after_step(1, lambda: started.append(1)), pytest.raises(ValueError, match=message) as refused:
        fit(folder=stopped, resume=True, **changes)
    assert str(refused.value).startswith(("resume: ", "optimizer: "))
    assert not started
    assert_same(outcome(stopped), before)


def edited(stopped, tmp_path, **changes):
    """A copy of the last checkpoint alone, with other entries in what `fit` has saved of itself."""
    path = shutil.copytree(Checkpoints(stopped).latest(), tmp_path / "step-00000007")
    content = json.loads((path / "state.json").read_bytes())
    content["state"] |= changes
    (path / "state.json").write_text(json.dumps(content))
    return path


def test_a_checkpoint_of_another_version_is_refused(stopped, tmp_path):
    edited(stopped, tmp_path, genfast="0.0.1")
    expected = rf"resume: expected a checkpoint of genfast {genfast.__version__}, got .*07 of genfast 0\.0\.1"
    with pytest.raises(ValueError, match=expected):
        fit(vae, IMAGES, {}, tmp_path, resume=True)


def test_a_checkpoint_of_another_torch_goes_on_with_a_warning(stopped, tmp_path):
    edited(stopped, tmp_path, torch="2.0.0")
    with pytest.warns(UserWarning, match=r"is of torch 2\.0\.0, .*: the run goes on, but not bit for bit"):
        _, history = fit(vae, IMAGES, {}, tmp_path, resume=True)
    assert [row["epoch"] for row in history] == [1, 2, 3]


def test_a_checkpoint_that_fit_did_not_write_is_refused(tmp_path):
    Checkpoints(tmp_path).save(7, {"epoch": 1}, {"model": vae().state_dict()})
    with pytest.raises(ValueError, match="resume: expected a checkpoint of genfast"):
        fit(vae, IMAGES, {}, tmp_path, resume=True)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused(name, stopped, tmp_path):
    path = edited(stopped, tmp_path) / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"step-00000007/{name}: "):
        fit(vae, IMAGES, {}, tmp_path, resume=True)


def test_checkpoints_come_every_so_many_steps_and_at_the_end(tmp_path):
    fit(vae, IMAGES, {}, tmp_path / "4", checkpoint_every=4)
    assert Checkpoints(tmp_path / "4").steps() == [4, 8, 12, 15]
    fit(vae, IMAGES, {}, tmp_path / "5", checkpoint_every=5)
    assert Checkpoints(tmp_path / "5").steps() == [5, 10, 15]
    # With the evaluation of the epoch that ends there.
    assert len(read(tmp_path / "5" / "step-00000005").state["history"]) == 1
    fit(vae, IMAGES, {}, tmp_path / "kept", checkpoint_every=4, keep=2)
    assert Checkpoints(tmp_path / "kept").steps() == [12, 15]
    with pytest.raises(ValueError, match="keep: expected a positive int, got 0"):
        fit(vae, IMAGES, {}, tmp_path / "none", keep=0)
    assert not (tmp_path / "none").exists()


def test_saving_takes_two_percent_of_the_time(tmp_path):
    saver = Saver(tmp_path, keep=1, settings={})
    assert saver.due(5, within_epoch=False)
    assert not saver.due(5, within_epoch=True)
    saver.duration = 10.0
    saver.saved_at -= 490.0
    assert not saver.due(5, within_epoch=False)
    saver.saved_at -= 20.0
    assert saver.due(5, within_epoch=False)
    # Ten minutes at least.
    assert not saver.due(5, within_epoch=True)
    saver.saved_at -= 100.0
    assert saver.due(5, within_epoch=True)
    saver.saved_step = 5
    assert not saver.due(5, within_epoch=False)


def test_a_checkpoint_loads_as_a_model(tmp_path):
    model, history = fit(vae, IMAGES, {}, tmp_path)
    loaded = VAE.from_pretrained(Checkpoints(tmp_path).latest())
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert evaluate(loaded, TEST, batch_size=8 * BATCH, seed=5)["loss"] == history[-1]["test_loss"]


def test_a_full_disk_keeps_the_checkpoint_before(uninterrupted, tmp_path):
    name = "dynamic binarization, all options"
    torch.manual_seed(7)
    fit(*RUNS[name], tmp_path, epochs=1, lr_schedule="constant", warmup_steps=0)
    before = outcome(tmp_path)
    changed = {"resume": True, "lr_schedule": "constant", "warmup_steps": 0}
    with full_disk(1000), pytest.raises(OSError, match="the last checkpoint is") as full:
        fit(*RUNS[name], tmp_path, **changed)
    assert full.value.filename == str(tmp_path / "step-00000010")
    assert str(tmp_path / "step-00000005") in str(full.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert_same(outcome(tmp_path), before)
    _, history = fit(*RUNS[name], tmp_path, **changed)
    assert all(math.isfinite(row["test_loss"]) for row in history)
    assert len(history) == EPOCHS


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match="there is no earlier checkpoint") as refused:
        fit(vae, IMAGES, {}, tmp_path / "file" / "checkpoints")
    assert str(tmp_path / "file") in str(refused.value)
    assert (tmp_path / "file").read_text() == "precious"
