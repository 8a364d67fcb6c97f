"""Training that fills the folder of a run: what `genfast train` and the experiments have in common."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from genfast import pictures, report, training
from genfast.models.base import Model
from genfast.run import CHECKPOINTS, TENSORBOARD, RunFolder

__all__ = ["evaluation_interval", "train_into"]


def evaluation_interval(train_data: training.DeviceDataset, test_data: training.DeviceDataset) -> int:
    """How many epochs lie between two evaluations, where nothing is said: they cost less than 5% of the time.

    Example:
        >>> digits = training.load_dataset("digits")
        >>> evaluation_interval(training.DeviceDataset(digits.train), training.DeviceDataset(digits.test))
        3
    """
    # An evaluated image costs up to half of one that is trained on.
    return max(1, math.ceil(15 * len(test_data) / len(train_data)))


def train_into(
    folder: Path,
    model: Model,
    train_data: training.DeviceDataset,
    test_data: training.DeviceDataset,
    settings: Mapping[str, Any],
    *,
    name: str,
    data_name: str,
    seed: int,
    title: str = "",
    resume: bool = False,
    tensorboard: bool = False,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    **fit_options: Any,
) -> tuple[str, int, list[dict[str, Any]]]:
    """Train a model with `genfast.fit`; its folder gets settings, model, checkpoints, metrics and pictures.

    Under torchrun every process calls it; the first one alone writes and speaks.

    Args:
        folder: of the run, there already; a run that it holds is replaced once the new one has saved a model.
        model: freshly made, on its device.
        train_data, test_data: what it is trained and evaluated on.
        settings: of the run, for ``run.json``.
        name, data_name: what the first line calls the run and its data.
        seed: of the training and of the pictures.
        title: of the curves.
        resume: continue the run that the folder holds.
        tensorboard: write scalars and images for it into the folder.
        on_epoch: called with each new row of the history, once it has been written.
        fit_options: further arguments of `genfast.fit`.

    Returns:
        The run's status ("finished", "stopped early", "out of time", "interrupted"), the exit code that goes with it,
        and a row per epoch.

    Raises:
        FloatingPointError: the training diverged; the message says which model is kept.
        KeyboardInterrupt: a second Ctrl-C, which ends the training at once.

    Example:
        >>> import json, tempfile
        >>> import genfast
        >>> data = training.DeviceDataset(training.load_dataset("digits").test)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     status, _, history = train_into(
        ...         Path(folder), genfast.VAE(), data, data, {}, name="vae", data_name="digits", seed=0, epochs=1,
        ...         progress=False,
        ...     )
        ...     print(status, len(history), json.loads((Path(folder) / "run.json").read_text()))
        vae: 652,824 parameters on cpu; digits: 1,000 + 1,000 images; /tmp/...
        finished 1 {'status': 'finished'}
    """
    first = training.ranks()[0] == 0
    run = RunFolder(folder, dict(settings), resume) if first else None
    # The others look into the folder once it is ready.
    training.from_first(None)
    history: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        history.append(row)
        run.copy_model()
        run.write_metrics(history)
        if on_epoch is not None:
            on_epoch(row)

    try:
        if first:
            if resume:
                history += run.history()
            run.write_settings("running")
            images = f"{data_name}: {len(train_data):,} + {len(test_data):,} images"
            _announce(name, model, images, folder, resume)
        status, code = _fit(
            model, train_data, test_data=test_data, seed=seed, checkpoints=folder / CHECKPOINTS, resume=resume,
            tensorboard=folder / TENSORBOARD if tensorboard else None, on_epoch=keep, **fit_options,
        )  # fmt: skip
        if first:
            if all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
                run.save_model(model)
                run.write_metrics(history)
            run.write_settings(status)
    except KeyboardInterrupt:
        # A second Ctrl-C: at once, with the model in the middle of a step.
        if first:
            run.give_up("interrupted")
        raise
    except FloatingPointError as error:
        if not first:
            raise
        kept = _kept(run)
        run.give_up("diverged")
        raise FloatingPointError(f"{error}; {kept}") from error
    except Exception:
        if first:
            # On a full disk this may fail too, and the first error is the one to tell.
            with suppress(OSError):
                run.give_up("failed")
        raise
    # Whoever sends SIGTERM does not wait for pictures.
    if first and not run.old and code != 128 + signal.SIGTERM:
        images, _ = next(test_data.batches(48, seed=seed, shuffle=False))
        pictures.save_pictures(model.eval(), images, folder, seed)
        if history:
            report.save_curves(history, folder / "curves.png", title)
    return status, code, history


def _announce(name: str, model: Model, images: str, folder: Path, resume: bool) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    processes = "" if training.ranks()[1] == 1 else f", {training.ranks()[1]} processes"
    latest = training.Checkpoints(folder / CHECKPOINTS).latest() if resume else None
    resumed = "" if latest is None else f", from {latest.name}"
    print(f"{name}: {parameters:,} parameters on {model.device}{processes}; {images}; {folder}{resumed}", flush=True)


def _fit(*arguments: Any, checkpoints: Path, **options: Any) -> tuple[str, int]:
    """Train; the status of the run, and the exit code."""
    try:
        result = training.fit(*arguments, checkpoints=checkpoints, **options)
    except training.Interrupted as error:
        return "interrupted", 128 + error.signal
    if result.reason == "early" and training.ranks()[0] == 0:
        print(f"the best checkpoint: {training.Checkpoints(checkpoints).path(result.best_step)}")
    return {"early": "stopped early", "time": "out of time"}.get(result.reason, "finished"), 0


def _kept(run: RunFolder) -> str:
    """Which model the folder of a run that diverged holds, in words."""
    if run.old:
        return f"{run.folder} still holds the run that it held"
    if not run.copy_model():
        return f"there is no model to keep, and --overwrite begins anew in {run.folder}"
    return f"its model is in {run.folder}"
