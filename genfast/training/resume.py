"""Where a run of `fit` stands, written to checkpoints and taken up again."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import genfast
from genfast.models.base import Model
from genfast.training import distributed
from genfast.training.checkpoint import (
    Checkpoint,
    Checkpoints,
    load_optimizer_state,
    load_random_state,
    optimizer_state,
    random_state,
    read,
)
from genfast.training.step import TrainStep

if TYPE_CHECKING:
    from genfast.training.loop import _Run

__all__ = ["Saver"]

# A save is due once this many times its own duration has passed: 2% of the time at most.
_SAVE_BUDGET = 50
# Within an epoch at least this many seconds lie between two saves.
_WITHIN_EPOCH = 600.0
_SHARDS = "shards"
_PLACE = ("epoch", "batch", "steps", "elapsed", "best", "best_step", "evaluations_since")


class Saver:
    """The checkpoints of one run of `fit`, and when to write them.

    Rank 0 writes; of a sharded model every process writes its part, by torch.distributed.checkpoint. All processes
    read, so the folder is one that all of them see.

    Args:
        folder: of the checkpoints.
        keep: how many of the last ones are kept.
        settings: what a resumed run must have in common with the one that wrote.
        every: steps between checkpoints; None leaves it to `due`.
    """

    def __init__(
        self, folder: str | os.PathLike[str], keep: int, settings: Mapping[str, Any], every: int | None = None
    ) -> None:
        self.checkpoints = Checkpoints(folder, keep)
        # As they come back from a file.
        self.settings, self.every = json.loads(json.dumps(settings, default=repr)), every
        self.rank, _ = distributed.ranks()
        self.loaded: Checkpoint | None = None
        self.saved_at, self.duration = time.perf_counter(), 0.0
        self.saved_step = 0

    def open(self, resume: bool) -> None:
        """Read the last checkpoint, or see that there is none in a fresh run's way.

        Raises:
            ValueError: a fresh run's folder holds checkpoints, or the last one is damaged or of another version.
        """
        if self.rank == 0:
            self.checkpoints.clean()
        latest = distributed.from_first(self.checkpoints.latest() if self.rank == 0 else None)
        if latest is None:
            return
        if not resume:
            raise ValueError(
                f"checkpoints: expected a folder without any for a new run, got {self.checkpoints.folder} with "
                f"{latest.name}; resume that run, or name another folder"
            )
        loaded = read(latest)
        version = loaded.state.get("genfast")
        if version != genfast.__version__:
            raise ValueError(
                f"resume: expected a checkpoint of genfast {genfast.__version__}, got {latest} of genfast {version}: "
                "its noise or arithmetic may differ"
            )
        if loaded.state["torch"] != torch.__version__ and self.rank == 0:
            warnings.warn(
                f"resume: {latest} is of torch {loaded.state['torch']}, this is {torch.__version__}: the run goes on, "
                "but not bit for bit", stacklevel=3,
            )  # fmt: skip
        there = loaded.state["settings"]
        different = [
            f"{name} {there.get(name)!r} there, {self.settings.get(name)!r} here"
            for name in {**there, **self.settings}
            if there.get(name) != self.settings.get(name)
        ]
        if different:
            raise ValueError(f"resume: {latest} is of a run with other settings: {'; '.join(different)}")
        self.loaded = loaded

    def seed(self, seed: int | None) -> int | None:
        """The seed of the run that is resumed; `seed` if none is."""
        if self.loaded is None:
            return seed
        saved = self.loaded.state["seed"]
        if seed not in (None, saved):
            path = self.loaded.path
            raise ValueError(f"resume: {path} is of a run with other settings: seed {saved} there, {seed} here")
        return saved

    def restore(self, step: TrainStep, run: _Run) -> None:
        """Bring a run that has just been set up to where the checkpoint was written.

        Raises:
            ValueError: the model or the optimizer is another one; it says what differs.
        """
        if self.loaded is None:
            return
        path, _, state, tensors = self.loaded
        kinds = {True: "sharded", False: "whole"}
        sharded, there = distributed.is_sharded(step.model), (path / _SHARDS).is_dir()
        if sharded != there:
            raise ValueError(
                f"resume: expected a checkpoint of a {kinds[sharded]} model, got {path} of a {kinds[there]} one"
            )
        if sharded:
            self._read_shards(step)
        else:
            weights = tensors.get("raw", tensors["model"])
            _check_model(path, state["model"], step.model, weights)
            step.model.load_state_dict(weights)
            load_optimizer_state(step.optimizer, tensors["optimizer"], state["optimizer"])
        if step.ema is not None:
            step.ema.module.load_state_dict(tensors["model"])
        step.load_state(tensors["step"], state["step"])
        own = f"rank{self.rank}."
        states = {name.removeprefix(own): state for name, state in tensors["random"].items() if name.startswith(own)}
        load_random_state(states)
        run.loader_random = tensors.get("loader", {}).get("random")
        for name in _PLACE:
            setattr(run, name, state["place"][name])
        run.history.extend(state["history"])
        run.history.best_step = run.best_step or None
        run.next_look = run.steps + 1
        run.looked_at = self.saved_step = run.steps
        self.loaded = None

    def due(self, steps: int, within_epoch: bool) -> bool:
        """Whether it is time for a checkpoint."""
        if steps == self.saved_step:
            return False
        if self.every is not None:
            return steps % self.every == 0
        wait = max(_SAVE_BUDGET * self.duration, _WITHIN_EPOCH if within_epoch else 0.0)
        return time.perf_counter() - self.saved_at >= wait

    def save(self, step: TrainStep, run: _Run) -> None:
        """Write a checkpoint of the present moment, and delete what is not to be kept."""
        started = time.perf_counter()
        step_tensors, step_rest = step.state()
        state = {
            "genfast": genfast.__version__, "torch": torch.__version__, "settings": self.settings, "seed": run.seed,
            "model": _model_name(step.model), "step": step_rest, "history": list(run.history),
            "place": {name: getattr(run, name) for name in _PLACE},
        }  # fmt: skip
        # A generator for each process: dropout draws from it.
        states = enumerate(distributed.from_all(random_state()))
        random = {f"rank{rank}.{name}": state for rank, named in states for name, state in named.items()}
        tensors = {"step": step_tensors, "random": random}
        if run.loader_random is not None:
            tensors["loader"] = {"random": run.loader_random}
        if step.ema is not None:
            # The averaged weights are the model's, for whoever loads it.
            tensors |= {"model": step.ema.module.state_dict(), "raw": step.model.state_dict()}
        if distributed.is_sharded(step.model):
            self._write_sharded(run.steps, step, state, tensors)
        elif self.rank == 0:
            optimizer_tensors, state["optimizer"] = optimizer_state(step.optimizer)
            tensors = {"model": step.model.state_dict(), "optimizer": optimizer_tensors, **tensors}
            texts = {"config.json": step.model.config_json()} if isinstance(step.model, Model) else {}
            self.checkpoints.save(run.steps, state, tensors, texts)
        if self.rank == 0:
            self.checkpoints.prune(protect={run.best_step} if run.patience is not None else ())
        # A process that ended before would have torchrun end the one that writes.
        distributed.from_first(None)
        self.saved_at, self.saved_step = time.perf_counter(), run.steps
        self.duration = self.saved_at - started

    def latest(self) -> Path | None:
        """The folder of the last checkpoint."""
        return self.checkpoints.latest()

    def _write_sharded(self, steps: int, step: TrainStep, state: dict[str, Any], tensors: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(step.model, step.optimizer)
        with self.checkpoints.writing(steps) if self.rank == 0 else nullcontext() as folder:
            shards = Path(distributed.from_first(folder)) / _SHARDS
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=shards)
            if self.rank == 0:
                self.checkpoints.fill(folder, steps, state, tensors)

    def _read_shards(self, step: TrainStep) -> None:
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        model, optimizer = get_state_dict(step.model, step.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=self.loaded.path / _SHARDS)
        set_state_dict(step.model, step.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def _model_name(model: nn.Module) -> str:
    return type(model).__name__


def _check_model(path: Path, name: str, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    def described(named: Mapping[str, torch.Tensor]) -> dict[str, str]:
        return {key: f"{list(tensor.shape)} {tensor.dtype}" for key, tensor in named.items()}

    if name != _model_name(model):
        raise ValueError(f"resume: {path} is of another model: {name} there, {_model_name(model)} here")
    there, here = described(tensors), described(model.state_dict())
    different = [
        f"{key} {there.get(key, 'absent')} there, {here.get(key, 'absent')} here"
        for key in {**here, **there}
        if there.get(key) != here.get(key)
    ]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise ValueError(f"resume: {path} is of another model: {'; '.join(different[:3])}{more}")

