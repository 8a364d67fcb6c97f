"""The training loop: `fit`, and the `evaluate` that it runs after every epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from genfast import profiling, random
from genfast.models.base import evaluating
from genfast.training.data import ImageBatches
from genfast.training.progress import Progress
from genfast.training.step import TrainStep

__all__ = ["evaluate", "evaluation_seed", "fit"]


def fit(
    model: nn.Module,
    data: Any,
    *,
    epochs: int,
    batch_size: int = 128,
    test_data: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float = 1e-3,
    loss_options: Mapping[str, Any] | None = None,
    grad_clip: float | None = None,
    amp_dtype: torch.dtype | None = None,
    compile: bool = False,
    device: torch.device | str | None = None,
    seed: int | None = None,
    progress: bool = True,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Train a model.

    With a `seed`, the run is a function of the arguments and of the model's initial weights: the order of the images,
    binarization and all noise come from it, and torch's global generators are neither read nor changed (a `Dataset`
    or `DataLoader` may use randomness of its own).

    Args:
        model: a genfast model, or any module with its ``loss``; trained in place.
        data: a uint8 tensor [N, C, H, W] or [N, H, W]; a `genfast.training.DeviceDataset`; a torch `Dataset`; or a
            `DataLoader`, which then decides about batch size and order. Items may be images or tuples that begin with
            one (labels are ignored), uint8 or float in [0, 1]. The first three leave out a last batch that is smaller
            than the others.
        epochs: passes over the data.
        batch_size: images per step.
        test_data: like `data`; evaluated after every epoch, with the same noise each time.
        optimizer: Adam over all parameters if None.
        lr: learning rate of that Adam.
        loss_options: passed to ``model.loss`` in training, such as ``{"beta": 4.0}``; not in the evaluation.
        grad_clip, amp_dtype, compile: as for `genfast.training.TrainStep`.
        device: where to train; where the model is if None.
        seed: at most 64 bits; drawn from torch's generator if None.
        progress: show a bar on a terminal (with rich installed), or one line per epoch elsewhere.
        on_epoch: called with each new row of the history.

    Returns:
        A row per epoch: "epoch" (from 1), the means over the epoch of the parts of the loss ("loss", "nll", "kl", ...:
        nats per image), the same of the test data as "test_loss", ..., and "test_elbo" for models with a KL term,
        "seconds" and "images_per_second" of training.

    Raises:
        TypeError: `data` is of another kind, or not uint8.
        ValueError: an argument out of range, no data, or images that do not fit the model.
        FloatingPointError: the loss of an epoch is NaN or infinite. `on_epoch` has not seen that epoch.

    Example:
        >>> import genfast
        >>> images = genfast.training.load_dataset("digits").train[:256]
        >>> history = genfast.fit(genfast.VAE(), images, epochs=2, progress=False, seed=0)
        >>> history[1]["loss"] < history[0]["loss"]
        True
    """
    if epochs < 1:
        raise ValueError(f"epochs: expected a positive int, got {epochs}")
    device = _device_of(model) if device is None else torch.device(device)
    model.to(device)
    batches = ImageBatches(data, batch_size, device, train=True)
    test_batches = None if test_data is None else ImageBatches(test_data, batch_size, device, train=False)
    try:
        steps_per_epoch = len(batches)
    except TypeError:
        steps_per_epoch = None
    if optimizer is None:
        if not lr > 0:
            raise ValueError(f"lr: expected a positive number, got {lr}")
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=device.type in ("cpu", "cuda"))
    if seed is None:
        seed = int(random.new_seed("cpu"))
    step = TrainStep(
        model, optimizer, grad_clip=grad_clip, amp_dtype=amp_dtype, loss_options=loss_options, compile=compile
    )

    history: list[dict[str, float]] = []
    steps = 0
    with Progress(epochs, steps_per_epoch, progress) as shown:
        for epoch in range(1, epochs + 1):
            model.train()
            means = _Means()
            shown.start_epoch(epoch)
            started = time.perf_counter()
            for batch in profiling.each("data", batches.epoch(seed, epoch)):
                steps += 1
                values = step(batch, seed=random.derive_seed(seed, steps))
                means.add(values, len(batch))
                shown.step(values, len(batch))
            row = {"epoch": epoch, **means.read()}
            seconds = time.perf_counter() - started
            if test_batches is not None:
                row |= {f"test_{name}": value for name, value in _evaluate(model, test_batches, seed).items()}
            row |= {"seconds": seconds, "images_per_second": means.images / seconds}
            for name in ("loss", "test_loss"):
                if not math.isfinite(row.get(name, 0.0)):
                    raise FloatingPointError(
                        f"epoch {epoch}: {name.replace('_', ' ')} is {row[name]}; a smaller learning rate may help"
                    )
            history.append(row)
            # Before the row is shown, so that what a user has seen has been kept.
            if on_epoch is not None:
                on_epoch(row)
            shown.end_epoch(row)
    return history


def evaluate(
    model: nn.Module, data: Any, *, batch_size: int = 128, seed: int = 0, device: torch.device | str | None = None
) -> dict[str, float]:
    """Means over `data` of the parts of ``model.loss`` at its default options (beta = 1, no free bits), in nats.

    Args:
        model: as for `fit`; evaluated in eval mode, its mode is put back.
        data: as for `fit`, but every image counts.
        batch_size: changes neither the noise nor, but for rounding, the result.
        seed: of the noise.
        device: where to evaluate; where the model is if None.

    Returns:
        "loss", "nll", ..., and "elbo" = -(nll + kl) for models with a KL term.

    Example:
        >>> import genfast
        >>> sorted(evaluate(genfast.VAE(), genfast.training.load_dataset("digits").test))
        ['elbo', 'kl', 'loss', 'nll']
    """
    device = _device_of(model) if device is None else torch.device(device)
    model.to(device)
    return _evaluate(model, ImageBatches(data, batch_size, device, train=False), seed)


def evaluation_seed(seed: int) -> int:
    """The seed of an evaluation's noise and binarization, none of a training step's: those count from 1.

    Example:
        >>> evaluation_seed(0) == random.derive_seed(0, 0)
        True
    """
    return random.derive_seed(seed, 0)


def _evaluate(model: nn.Module, batches: ImageBatches, seed: int) -> dict[str, float]:
    seed = evaluation_seed(seed)
    noise_seed = random.as_seed(seed, batches.device)
    means = _Means()
    with evaluating(model):
        for batch in batches.epoch(seed, 0):
            means.add(model.loss(batch, seed=noise_seed, row_offset=means.images), len(batch))
    result = means.read()
    if "kl" in result:
        result["elbo"] = -(result["nll"] + result["kl"])
    return result


class _Means:
    """Averages over images, kept on the device until they are read."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.images = 0

    def add(self, values: Mapping[str, Tensor], images: int) -> None:
        for name, value in values.items():
            # fp64: sums over a large set would otherwise lose the digits that are reported.
            weighted = value.to(torch.float64) * images
            self.totals[name] = self.totals[name] + weighted if name in self.totals else weighted
        self.images += images

    def read(self) -> dict[str, float]:
        if self.images == 0:
            raise ValueError("data: no images came in a whole epoch")
        values = torch.stack(list(self.totals.values())).tolist()
        return {name: total / self.images for name, total in zip(self.totals, values, strict=True)}


def _device_of(model: nn.Module) -> torch.device:
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
