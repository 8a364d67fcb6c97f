"""What `test_distributed` has the processes of torchrun do: `ranks_program.py TASK FOLDER`, each task a function here.

A task runs on every process, and returns what rank r leaves in FOLDER/TASK-r.pt.
"""

import faulthandler
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

import genfast
from genfast.random import derive_seed
from genfast.training import DeviceDataset, Interrupted, TrainStep, evaluate, launched, load_dataset, ranks, shard
from tests.training.turns import Duel

# A process that hangs shows where, and ends.
PATIENCE = 300
TIMES = ("seconds", "images_per_second")
BATCH = 16


def digits(images=5 * BATCH, binarize="dynamic"):
    return DeviceDataset(load_dataset("digits").train[:images], binarize=binarize)


def small(family=genfast.VAE, **options):
    torch.manual_seed(0)
    return family(latent_dim=4, hidden_dims=(32,), **options)


def train(model, data=None, **options):
    """The history, and the weights after it."""
    options = {"epochs": 2, "batch_size": BATCH, "seed": 3, "progress": False, "evaluate_every": 1, **options}
    history = genfast.fit(model, digits() if data is None else data, **options)
    return {"history": plain(history), "reason": history.reason, "weights": weights_of(model)}


def plain(history):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in history]


def weights_of(model):
    # A sharded model's weights are DTensors.
    whole = {name: getattr(value, "full_tensor", value.clone)() for name, value in model.state_dict().items()}
    return {name: value.detach().clone() for name, value in whole.items()}


def message_of(error, function, *arguments, **options):
    """What the function raises, as text."""
    try:
        function(*arguments, **options)
    except error as raised:
        return str(raised)
    raise AssertionError(f"expected {error.__name__}, got none")


# Settings that must not make a difference between numbers of processes.
SETTINGS = {
    "plain": {},
    "grey": {"data": lambda: load_dataset("digits").train[: 5 * BATCH]},
    "in host memory": {"data": lambda: DeviceDataset(load_dataset("digits").train[: 5 * BATCH], resident=False)},
    "dataset": {"data": lambda: TensorDataset(load_dataset("digits").train[: 5 * BATCH + 3].float() / 255)},
    "clipped, in pieces, averaged": {"grad_clip": 20.0, "micro_batches": 2, "ema_decay": 0.9},
    "other optimizer": {"optimizer": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3)},
    "cosine": {"lr_schedule": "cosine", "warmup_steps": 3},
}
# 8 x 16 + 3 images: the last batch leaves an empty part to the last of two processes.
TESTED = slice(0, 8 * BATCH + 3)


def history_of(name):
    model = small()
    options = dict(SETTINGS[name])
    data = options.pop("data", digits)()
    if "optimizer" in options:
        options["optimizer"] = options["optimizer"](model)
    return train(model, data, test_data=load_dataset("digits").test[TESTED], **options)


def drawn(micro_batches=1):
    """The pixels and the noise that a VAE got: with weights of 0 its code is the noise, bit for bit."""
    model = small()
    for layer in (model.fc21, model.fc22):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    seen = {"pixels": [], "noise": []}
    model.fc1.register_forward_pre_hook(lambda _, inputs: seen["pixels"].append(inputs[0].clone()))
    model.fc3.register_forward_pre_hook(lambda _, inputs: seen["noise"].append(inputs[0].detach().clone()))
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    train(model, optimizer=still, micro_batches=micro_batches)
    rows = BATCH // ranks()[1]
    return {name: torch.cat(pieces).view(-1, rows, pieces[0].shape[1]) for name, pieces in seen.items()}


def gradients(micro_batches=1):
    """Of one step, as the optimizer got them."""
    rank, world = ranks()
    model = small()
    step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0), micro_batches=micro_batches)
    rows = BATCH // world
    batch = load_dataset("digits").train[rank * rows : (rank + 1) * rows]
    step(batch, seed=derive_seed(3, 1), row_offset=rank * rows)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def everything_equal():
    """What 1, 2 and 4 processes must have in common."""
    return {
        "histories": {name: history_of(name) for name in SETTINGS},
        "drawn": {pieces: drawn(pieces) for pieces in (1, 2)},
        "gradients": {pieces: gradients(pieces) for pieces in (1, 2)},
        "evaluated": {
            size: evaluate(small(), load_dataset("digits").test[TESTED], batch_size=size, seed=4) for size in (4, 16)
        },
        "uneven stream": train(small(), Stream(5 * BATCH), epochs=2),
        # Its statistics would be those of one process's rows.
        "turns": train(Duel(norm=False), micro_batches=2, ema_decay=0.5),
    }


class Stream(IterableDataset):
    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return iter(load_dataset("digits").train[: self.images])


class Counted(genfast.VAE):
    """Calls `then` at its loss number `at`."""

    at, then, calls = 0, None, 0

    def loss(self, x, **options):
        self.calls += 1
        if self.calls == self.at:
            self.then()
        return super().loss(x, **options)


def counted(at=0, then=None):
    model = small(Counted)
    model.at, model.then = at, then
    return model


class OneBad(Dataset):
    """Float images, one of which is NaN at every load."""

    def __init__(self, bad):
        self.images = load_dataset("digits").train[: 5 * BATCH].float() / 255
        self.images[bad] = torch.nan

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def two(folder):
    """What is checked on two processes, beside `everything_equal`."""
    return {
        **everything_equal(),
        "skipped": skipped(),
        "failures": failures(),
        "printed": printed(folder / "printed"),
        "stopped": stopped(folder / "stopped"),
        "uninterrupted": train(counted(), epochs=3, ema_decay=0.9, lr_schedule="cosine"),
        "loader": loader(),
        "shorter stream": train(small(), Stream(5 * BATCH + 1), epochs=2),
        "short stream": message_of(ValueError, train, small(), Stream(BATCH - 1)),
        "indivisible": message_of(ValueError, train, small(), batch_size=BATCH + 1),
        "indivisible tests": message_of(ValueError, evaluate, small(), digits(), batch_size=BATCH + 1),
    }


def skipped():
    """The weights after each of three steps, of which the second has a NaN in the last process's images."""
    rank, world = ranks()
    model = small()
    step = TrainStep(model, torch.optim.Adam(model.parameters(), fused=True), ema_decay=0.5)
    weights, failed = [], []
    for number in range(3):
        images = load_dataset("digits").train[rank * 8 : rank * 8 + 8].float() / 255
        if number == 1 and rank == world - 1:
            images[3, 0, 5, 5] = torch.nan
        step(images, seed=number, row_offset=rank * 8)
        weights.append({**weights_of(model), **{f"ema.{key}": w for key, w in weights_of(step.ema.module).items()}})
        failed.append(step.failed())
    return {"weights": weights, "failed": failed}


def failures():
    """Runs with an image that is NaN, one of several: the order decides which process gets it."""
    found = []
    for bad in range(0, 5 * BATCH, 9):
        model, had = small(), []
        model.fc1.register_forward_pre_hook(lambda _, inputs, had=had: had.append(bool(inputs[0].isnan().any())))
        message = message_of(FloatingPointError, train, model, OneBad(bad))
        found.append({"message": message, "had": had, "weights": weights_of(model)})
    return found


def printed(folder):
    """What this process wrote to its terminal and into the folder."""
    written = []
    sys.addaudithook(lambda event, arguments: written.append(_written(event, arguments, folder)))
    read_end, write_end = os.pipe()
    terminal = os.dup(1)
    os.dup2(write_end, 1)
    seen = []
    try:
        train(small(), progress=True, checkpoints=folder / "checkpoints", on_epoch=seen.append, test_data=digits())
        sys.stdout.flush()
    finally:
        os.dup2(terminal, 1)
        os.close(write_end)
    with os.fdopen(read_end) as pipe:
        lines = pipe.read().splitlines()
    return {"lines": lines, "written": [path for path in written if path], "rows": len(seen)}


def _written(event, arguments, folder):
    if event == "open":
        path, _, flags = arguments
        writes = flags is not None and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        path, writes = (arguments or [None])[0], event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
    return str(path) if writes and str(path).startswith(str(folder)) else None


def stopped(folder):
    """SIGTERM to the last process alone, then a resume: the whole run's history and weights."""
    rank, world = ranks()
    options = {"epochs": 3, "ema_decay": 0.9, "lr_schedule": "cosine", "checkpoints": folder, "checkpoint_every": 4}
    # A step at which all look, whatever the time.
    at = 8 if rank == world - 1 else 0
    message = message_of(Interrupted, train, counted(at, lambda: signal.raise_signal(signal.SIGTERM)), **options)
    steps = sorted(path.name for path in folder.iterdir())
    # Nobody goes on before all have listed.
    dist.barrier()
    return {"message": message, "steps": steps, **train(counted(), resume=True, **options)}


def loader():
    """An own DataLoader: the images that each process got in two epochs, and the run."""
    images = load_dataset("digits").train[: 5 * BATCH].float() / 255
    # The first pixel tells which image it is.
    images[:, 0, 0, 0] = torch.arange(len(images)) / len(images)
    rank, world = ranks()
    sampler = DistributedSampler(images, world, rank, seed=5)
    model, got = small(), []
    model.fc1.register_forward_pre_hook(lambda _, inputs: got.extend((inputs[0][:, 0] * len(images)).round().tolist()))
    return {"got": got, **train(model, DataLoader(TensorDataset(images), BATCH // world, sampler=sampler))}


def four(folder):
    """`everything_equal`, and checkpoints of two processes continued by these."""
    return {
        **everything_equal(),
        "resumed": resumed(folder / "checkpoints"),
        "resumed shards": split(epochs=3, test_data=digits(), checkpoints=folder / "shards", resume=True),
    }


def resumed(checkpoints):
    """A run that `terminated` began."""
    return train(counted(), checkpoints=checkpoints, resume=True, epochs=3)


def terminated(folder):
    """SIGTERM to all at a step of the second epoch, as batch systems send it; torchrun passes its own on to all."""
    rank, _ = ranks()
    ours, handlers = socket.socketpair()
    handlers.setblocking(False)
    signal.set_wakeup_fd(handlers.fileno())

    def tell():
        os.kill(os.getpid(), signal.SIGTERM)
        ours.recv(1)
        # Else torchrun's could come first.
        dist.barrier()
        if rank == 0:
            os.kill(os.getppid(), signal.SIGTERM)
        # The step goes on when torchrun's has come.
        ours.recv(1)
        (folder / f"twice-{rank}").touch()

    train(counted(8, tell), epochs=10**6, checkpoints=folder / "checkpoints", checkpoint_every=4)


def killed(folder):
    """The last process dies in the middle of a run."""
    rank, world = ranks()

    def die():
        if rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    train(counted(11, die), epochs=10**6, checkpoints=folder / "checkpoints", checkpoint_every=2, keep=3)


def restarted(folder):
    """The last process dies in the middle of a run, the first time; torchrun starts all again."""
    rank, world = ranks()
    marker = folder / "died"

    def die():
        if rank == world - 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return train(counted(11, die), epochs=3, checkpoints=folder / "checkpoints", checkpoint_every=4, resume=True)


SHARDED = {"plain": {}, "clipped, in pieces": {"grad_clip": 20.0, "micro_batches": 2}}


def sharded(folder):
    """FSDP2 against DDP, its checkpoints, and what it refuses."""
    rank, _ = ranks()
    found = {
        "ddp": {name: train(counted(), test_data=digits(), epochs=3, **options) for name, options in SHARDED.items()},
        "fsdp": {name: split(test_data=digits(), epochs=3, **options) for name, options in SHARDED.items()},
    }
    options = {"epochs": 3, "test_data": digits(), "checkpoints": folder / "shards", "checkpoint_every": 4}
    at = 8 if rank == 0 else 0
    found["message"] = message_of(Interrupted, split, at, lambda: signal.raise_signal(signal.SIGTERM), **options)
    found["steps"] = sorted(path.name for path in (folder / "shards").iterdir())
    if rank == 0:
        shutil.copytree(folder / "shards", folder / "for four")
    dist.barrier()
    found["resumed"] = split(resume=True, **options)
    unsplit(epochs=1, checkpoints=folder / "whole")
    found["whole resumed by shards"] = message_of(ValueError, split, checkpoints=folder / "whole", resume=True)
    found["shards resumed whole"] = message_of(ValueError, unsplit, resume=True, **options)
    found["ema"] = message_of(ValueError, split, ema_decay=0.9)
    tests, whole_model, sharded_model = load_dataset("digits").test[TESTED], small(), small()
    shard(sharded_model)
    found["evaluated"] = [evaluate(model, tests, batch_size=BATCH, seed=4) for model in (whole_model, sharded_model)]
    found["failure"] = message_of(FloatingPointError, split, data=OneBad(20))
    return found


def split(at=0, then=None, **options):
    """`train` of a model whose parameters are split over the processes."""
    model = counted(at, then)
    shard(model, [model.fc1, model.fc4])
    return train(model, optimizer=torch.optim.Adam(model.parameters(), lr=1e-3), **options)


def unsplit(**options):
    """The same of a whole model, with the optimizer of a sharded one."""
    model = counted()
    return train(model, optimizer=torch.optim.Adam(model.parameters(), lr=1e-3), **options)


TASKS = {task.__name__: task for task in (two, four, terminated, killed, restarted, sharded)}

if __name__ == "__main__":
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    task, folder = sys.argv[1], Path(sys.argv[2])
    with launched("cpu"):
        torch.save(TASKS[task](folder), folder / f"{task}-{ranks()[0]}.pt")
