"""The folder of a run of `genfast train`: what it holds, whether it can be written, and how it changes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn

from genfast._files import replacing
from genfast.training import Checkpoints, read

__all__ = ["CHECKPOINTS", "TENSORBOARD", "RunFolder", "check_out", "make_folder", "read_settings"]

CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"
_FILES = (
    "run.json", "config.json", "model.safetensors", "metrics.jsonl", "samples.png", "reconstructions.png",
    "curves.png", "manifold.png", "interpolation.png", "forward.png", "reverse.png", "evaluation.json", "samples-*.png",
    "reverse-*.png", "reverse-*.mp4", "reverse-*.gif",
)  # fmt: skip
_MODEL = ("model.safetensors", "config.json")
# What a run that is being replaced has in folders, until the new one has saved a model.
_ASIDE = {CHECKPOINTS: ".checkpoints-before", TENSORBOARD: ".tensorboard-before"}
# Where that goes to be deleted: half of it must not come back.
_TRASH = "-deleted"
# The new run's run.json; it takes that name as the one act by which the new run replaces the old one.
_PENDING = ".run.json-new"


def check_out(out: Path | None, overwrite: bool, resume: bool) -> None:
    """Raise unless `out` can be written and is free, or a run that may be replaced or resumed.

    Raises:
        ValueError: it is not; the message begins with ``--out``.

    Example:
        >>> check_out(Path("runs/vae-of-tomorrow"), overwrite=False, resume=False)
    """
    _check_writable(out or Path("runs"))
    if resume and (out is None or "genfast" not in read_settings(out)):
        got = "none" if out is None else f"{out}, which holds none"
        raise ValueError(f"--resume: expected --out with the folder of a run, got {got}")
    checkpoints = (CHECKPOINTS, _ASIDE[CHECKPOINTS])
    # To begin anew, as where a run was killed before its first checkpoint, would cost that model.
    if resume and (out / "model.safetensors").exists() and not any(Checkpoints(out / c).steps() for c in checkpoints):
        raise ValueError(f"--resume: {out} holds a model, but no checkpoint to go on from")
    if out is None or not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out: {out} is a file")
    if not any(out.iterdir()):
        return
    if "genfast" not in read_settings(out):
        raise ValueError(f"--out: {out} is not empty and not a run of genfast")
    if not (overwrite or resume):
        raise ValueError(f"--out: {out} holds a run; name another folder, or add --resume or --overwrite")


def _check_writable(folder: Path) -> None:
    """Raise unless a file can be made in `folder`, or in what there is of the way to it."""
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if nearest.is_dir():
            tempfile.TemporaryFile(dir=nearest).close()
        elif nearest != folder:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as error:
        raise ValueError(f"--out: cannot write to {folder} ({error.strerror})") from error


def make_folder(out: Path | None, name: str) -> Path:
    """The run's folder: `out`, or a new one in runs/.

    Raises:
        ValueError: it cannot be made.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> make_folder(folder, "vae-digits") == folder
        True
    """
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            return out
        for number in count(1):
            folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
            if not folder.exists():
                folder.mkdir(parents=True)
                return folder
    except OSError as error:
        raise ValueError(f"--out: cannot write to {error.filename} ({error.strerror})") from error
    raise AssertionError("unreachable")


def read_settings(run: Path) -> dict[str, Any]:
    """What run.json holds; empty if there is none, or none of ours.

    Example:
        >>> read_settings(Path("nowhere"))
        {}
    """
    try:
        settings = json.loads((run / "run.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


class RunFolder:
    """The files of a run that change while it trains.

    A run that the folder held, and that is to be replaced, stays whole until the first `save_model`.

    Args:
        folder: is there already.
        settings: of the run, for ``run.json``.
        resume: whether the run that the folder holds goes on.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> RunFolder(folder, {"genfast": "1"}).write_settings("running")
        >>> read_settings(folder)["status"]
        'running'
    """

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool = False) -> None:
        self.folder, self.settings = folder, settings
        self.checkpoints = folder / CHECKPOINTS
        # An attempt to replace the run that was killed before it had saved a model.
        self.put_back()
        self.old = [] if resume else [path for pattern in _FILES for path in folder.glob(pattern)]
        if self.old:
            self._write(_PENDING, "running")
        for name, aside in _ASIDE.items() if self.old else ():
            # Where there is none, an empty one: what then stands in its place is the new run's.
            (folder / name).mkdir(exist_ok=True)
            (folder / name).rename(folder / aside)
        self._before = (folder / "run.json").read_bytes() if resume else None
        self._copied: Path | None = None
        self._found = self._latest()

    def put_back(self) -> None:
        """Give the run that was to be replaced its folders again, and forget what the new one wrote there."""
        replaced = not (self.folder / _PENDING).exists()
        for name, aside in _ASIDE.items():
            if replaced:
                self._delete(aside)
            shutil.rmtree(self.folder / (aside + _TRASH), ignore_errors=True)
            if not (self.folder / aside).is_dir():
                continue
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / aside).rename(self.folder / name)
            with suppress(OSError):
                # Only if it is empty.
                (self.folder / name).rmdir()
        (self.folder / _PENDING).unlink(missing_ok=True)

    def give_up(self, status: str) -> None:
        """After an error: leave what the folder held before, or `status` if this run has written a checkpoint."""
        if self.old:
            self.put_back()
        elif self._before is not None and self._latest() == self._found:
            with replacing(self.folder / "run.json") as temporary:
                temporary.write_bytes(self._before)
        else:
            self.write_settings(status)

    def write_settings(self, status: str) -> None:
        """Write run.json, unless the run that is to be replaced is still there."""
        if not self.old:
            self._write("run.json", status)

    def _write(self, name: str, status: str) -> None:
        with replacing(self.folder / name) as temporary:
            temporary.write_text(json.dumps({**self.settings, "status": status}, indent=2) + "\n")

    def save_model(self, model: nn.Module) -> None:
        """Write the model as it is."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".model-") as complete:
            model.save_pretrained(complete)
            self._take_model({name: Path(complete) / name for name in _MODEL})

    def copy_model(self) -> bool:
        """Take the model out of the last checkpoint, unless that has been done; False if there is none."""
        latest = self._latest()
        if latest is None or latest == self._copied:
            return latest is not None
        self._take_model({name: latest / name for name in _MODEL})
        self._copied = latest
        return True

    def _take_model(self, files: dict[str, Path]) -> None:
        """Copy a model's files into the folder; the first one ends the run that is to be replaced."""
        with ExitStack() as stack:
            for name, path in files.items():
                shutil.copyfile(path, stack.enter_context(replacing(self.folder / name)))
            # On a full disk the copies have failed by now, with the old run whole.
            self._replace_old()

    def history(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl that belong to the last checkpoint: those of a run that goes on."""
        latest = self._latest()
        return [] if latest is None else read(latest).state["history"]

    def write_metrics(self, history: list[dict[str, float]]) -> None:
        """Write metrics.jsonl: all rows so far."""
        if self.old:
            return
        with replacing(self.folder / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in history))

    def _latest(self) -> Path | None:
        return Checkpoints(self.checkpoints).latest()

    def _replace_old(self) -> None:
        if not self.old:
            return
        old, self.old = self.old, []
        os.replace(self.folder / _PENDING, self.folder / "run.json")
        for path in old:
            if path.name != "run.json":
                path.unlink(missing_ok=True)
        for aside in _ASIDE.values():
            self._delete(aside)

    def _delete(self, aside: str) -> None:
        trash = self.folder / (aside + _TRASH)
        shutil.rmtree(trash, ignore_errors=True)
        with suppress(FileNotFoundError):
            (self.folder / aside).rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
