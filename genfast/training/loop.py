"""The training loop: `fit`, and the `evaluate` that it runs after every epoch."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from genfast import profiling, random
from genfast.models.base import Model, evaluating
from genfast.training import distributed
from genfast.training.checkpoint import optimizer_state
from genfast.training.data import ImageBatches
from genfast.training.progress import Progress
from genfast.training.resume import Saver
from genfast.training.signals import Interrupted, StopRequests
from genfast.training.step import Mode, TrainStep
from genfast.training.tensorboard import Board

__all__ = ["History", "Schedule", "evaluate", "evaluation_seed", "fit"]

Schedule = Literal["constant", "cosine", "linear"]
Precision = Literal["highest", "high", "medium"]

# Steps between two looks at the clock, the signals and the device are what a second holds, within these bounds.
_LOOK_SECONDS, _LOOK_STEPS = 1.0, 1000


class History(list[dict[str, Any]]):
    """A row per epoch, and why the run ended.

    Attributes:
        reason: "finished", "early" (`patience`) or "time" (`time_limit`).
        best_step: the step of the smallest test loss, whose checkpoint `patience` keeps; None without an evaluation.

    Example:
        >>> History([{"epoch": 1, "loss": 100.0}]).reason
        'finished'
    """

    reason: Literal["finished", "early", "time"] = "finished"
    best_step: int | None = None


def fit(
    model: nn.Module,
    data: Any,
    *,
    epochs: int,
    batch_size: int = 128,
    test_data: Any = None,
    evaluate_every: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float = 1e-3,
    lr_schedule: Schedule = "constant",
    warmup_steps: int = 0,
    loss_options: Mapping[str, Any] | None = None,
    grad_clip: float | None = None,
    micro_batches: int = 1,
    amp_dtype: torch.dtype | None = None,
    matmul_precision: Precision | None = None,
    channels_last: bool = False,
    ema_decay: float | None = None,
    mode: Mode = "auto",
    compile: bool = False,
    device: torch.device | str | None = None,
    seed: int | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    resume: bool = False,
    keep: int = 2,
    checkpoint_every: int | None = None,
    time_limit: float | None = None,
    patience: int | None = None,
    tensorboard: str | os.PathLike[str] | None = None,
    log_every: int = 100,
    progress: bool = True,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> History:
    """Train a model.

    With a `seed`, the run is a function of the arguments and of the model's initial weights: the order of the images,
    binarization and all noise come from it, and torch's global generators are neither read nor changed (a `Dataset`,
    a `DataLoader` or dropout may use randomness of its own). It does not depend on how it is run: micro-batches, the
    number of processes, a resume, `mode` and `compile` change rounding at most.

    Under `torchrun` every process calls this with the same arguments, after `torch.distributed` is initialised. A batch
    is then split over the processes, gradients are averaged (DDP, or FSDP2 for a model that `shard` has split), and
    rank 0 alone shows progress and writes.

    Args:
        model: a genfast model, or any module with its ``loss``; trained in place.
        data: a uint8 tensor [N, C, H, W] or [N, H, W]; a `genfast.training.DeviceDataset`; a torch `Dataset`, also an
            iterable one of unknown length; or a `DataLoader`, which then decides about batch size and order. Items may
            be images or tuples that begin with one (labels are ignored), uint8 or float in [0, 1]. Tensors and datasets
            leave out a last batch that is smaller than the others.
        epochs: passes over the data.
        batch_size: images per step, of all processes together.
        test_data: like `data`; evaluated with the same noise each time, in batches four times as large.
        evaluate_every: epochs between evaluations; there is one after the last epoch in any case.
        optimizer: what the model's ``make_optimizer`` gives if None: Adam over all parameters, but for a GAN's betas.
        lr: learning rate of that Adam.
        lr_schedule: "constant", or "cosine" or "linear" from `lr` down to 0 over the whole run.
        warmup_steps: steps in which the learning rate rises linearly to what the schedule says.
        loss_options: passed to ``model.loss`` in training, such as ``{"beta": 4.0}``; not in the evaluation.
        grad_clip, micro_batches, amp_dtype, mode, compile: as for `genfast.training.TrainStep`.
        matmul_precision: of fp32 matrix products, as in `torch.set_float32_matmul_precision`, during the run.
        channels_last: keep the weights of convolutions in that memory format.
        ema_decay: average the weights (`genfast.training.EMA`). Evaluation uses the averaged ones, and the model has
            them when this returns.
        device: where to train; where the model is if None.
        seed: at most 64 bits; drawn from torch's generator if None.
        checkpoints: folder for checkpoints; None for none. With it, SIGTERM and Ctrl-C write one before the run stops.
        resume: continue from the last checkpoint in `checkpoints`, or begin if there is none. In eager mode on a CPU
            the result is bit for bit that of a run without the interruption.
        keep: how many checkpoints are kept, and with `patience` the best one as well.
        checkpoint_every: steps between checkpoints. If None: after an epoch, or after ten minutes within one, if saving
            costs less than 2% of the time; always at the end.
        time_limit: seconds after which the run stops, evaluates and returns.
        patience: stop after so many evaluations in a row that brought no smaller test loss.
        tensorboard: folder for scalars and images; needs the package tensorboard.
        log_every: steps between the scalars of single steps there.
        progress: show a bar on a terminal (with rich installed), or one line per epoch elsewhere.
        on_epoch: called with each new row of the history, on rank 0.

    Returns:
        A row per epoch: "epoch" (from 1; a fraction where the time ran out within one), the means over the epoch of
        the parts of the loss ("loss", "nll", "kl", ...: nats per image) and of "grad_norm", "seconds" and
        "images_per_second" of training; where the test data was evaluated, its parts as "test_loss", ..., and
        "test_elbo" for models with a KL term; "warning" where the model's ``diagnose`` finds something to say, as that
        a GAN has collapsed.

    Raises:
        TypeError: `data` is of another kind, or not uint8.
        ValueError: an argument out of range, no data, images that do not fit the model, or a checkpoint of another
            model, data set, setting or version; it says which.
        FloatingPointError: a loss or gradient is NaN or infinite: which step, which batch, and the last good
            checkpoint. That step has changed nothing. `on_epoch` has not seen that epoch.
        OSError: a checkpoint cannot be written.
        Interrupted: SIGTERM or Ctrl-C, once the checkpoint is written. A KeyboardInterrupt.

    Example:
        >>> import genfast
        >>> images = genfast.training.load_dataset("digits").train[:256]
        >>> history = genfast.fit(genfast.VAE(), images, epochs=2, progress=False, seed=0)
        >>> history[1]["loss"] < history[0]["loss"]
        True
    """
    counts = {"epochs": epochs, "log_every": log_every}
    counts |= {"evaluate_every": evaluate_every, "checkpoint_every": checkpoint_every}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected a positive int, got {value}")
    choices_of = {"lr_schedule": (lr_schedule, Schedule), "matmul_precision": (matmul_precision, Precision)}
    for name, (value, choices) in choices_of.items():
        if value is not None and value not in get_args(choices):
            raise ValueError(f"{name}: expected one of {', '.join(get_args(choices))}, got {value!r}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps: expected a non-negative int, got {warmup_steps}")
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"time_limit: expected a positive number of seconds, got {time_limit}")
    if patience is not None and (patience < 1 or test_data is None):
        expected = "a positive int" if patience < 1 else "test_data with it"
        raise ValueError(f"patience: expected {expected}, got {patience if patience < 1 else None}")
    if resume and checkpoints is None:
        raise ValueError("resume: expected the folder of checkpoints with it, got checkpoints=None")
    with ExitStack() as stack:
        requests = StopRequests()
        # Without checkpoints there is nothing to write before stopping: signals do what they always do.
        if checkpoints is not None:
            stack.enter_context(requests)
        device = _device_of(model) if device is None else torch.device(device)
        rank, _ = shard = distributed.ranks()
        model.to(device)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        batches = ImageBatches(data, batch_size, device, train=True, shard=shard)
        if not batches.decides_itself and micro_batches > batch_size // shard[1]:
            raise ValueError(
                f"micro_batches: expected at most the {batch_size // shard[1]} images of a batch, got {micro_batches}"
            )
        test_batches = None
        if test_data is not None:
            # Without gradients there is room for more at once.
            test_batches = ImageBatches(test_data, 4 * batch_size, device, train=False, shard=shard)
        try:
            steps_per_epoch = len(batches)
        except TypeError:
            steps_per_epoch = None
        _check_lengths(steps_per_epoch)
        settings = {
            # For this every byte is read.
            "data": None if checkpoints is None else batches.describe(),
            "batch_size": batch_size, "lr_schedule": lr_schedule, "warmup_steps": warmup_steps,
            "loss_options": dict(loss_options or {}), "grad_clip": grad_clip, "amp_dtype": str(amp_dtype),
            "ema_decay": ema_decay,
        }  # fmt: skip
        if lr_schedule != "constant":
            settings["epochs"] = epochs
        if optimizer is None:
            if not (lr > 0 and math.isfinite(lr)):
                raise ValueError(f"lr: expected a positive number, got {lr}")
            settings["lr"] = lr
            optimizer = _make_optimizer(model, lr, fused=device.type in ("cpu", "cuda"))
        elif checkpoints is not None:
            settings["optimizer"] = [type(optimizer).__name__, optimizer_state(optimizer)[1]["groups"]]
        saver = None
        if checkpoints is not None:
            saver = Saver(checkpoints, keep, settings, every=checkpoint_every)
            saver.open(resume)
            # A run without a seed is continued with the one that it drew.
            seed = saver.seed(seed)
        if seed is None:
            seed = distributed.from_first(int(random.new_seed("cpu")))
        scheduler = _scheduler(optimizer, lr_schedule, warmup_steps, epochs, steps_per_epoch)
        step = TrainStep(
            model, optimizer, mode=mode, compile=compile, micro_batches=micro_batches, grad_clip=grad_clip,
            amp_dtype=amp_dtype, loss_options=loss_options, scheduler=scheduler, ema_decay=ema_decay,
        )  # fmt: skip
        if step.mode == "graph" and batches.dataset is not None:
            step.source = batches.dataset.feed(batch_size, seed=seed, shard=shard)
        run = _Run(step, batches, test_batches, seed, epochs, steps_per_epoch, saver)
        run.time_limit, run.patience, run.log_every, run.on_epoch = time_limit, patience, log_every, on_epoch
        run.requests, run.evaluate_every = requests, evaluate_every
        if saver is not None:
            saver.restore(step, run)
            if run.epoch - 1 > epochs:
                raise ValueError(f"epochs: expected at least the {run.epoch - 1} that are done, got {epochs}")
        stack.enter_context(_matmul_precision(matmul_precision))
        run.board = stack.enter_context(Board(tensorboard if rank == 0 else None, run.steps))
        run.shown = stack.enter_context(Progress(epochs, steps_per_epoch, progress and rank == 0))
        try:
            run.train()
        finally:
            if step.ema is not None:
                step.ema.copy_to(model)
            if scheduler is not None:
                _reset_lr(optimizer)
    return run.history


class _Run:
    """One run of `fit`: what it has come to, and the loop.

    Attributes:
        epoch, batch: where it is: `batch` batches of epoch `epoch` (from 1) are done.
        steps: steps done in all.
        elapsed: seconds of training in this epoch before it was resumed.
    """

    shown: Progress
    board: Board
    requests: StopRequests
    evaluate_every: int
    time_limit: float | None
    patience: int | None
    log_every: int
    on_epoch: Callable[[dict[str, float]], None] | None

    def __init__(
        self, step: TrainStep, batches: ImageBatches, test_batches: ImageBatches | None, seed: int, epochs: int,
        steps_per_epoch: int | None, saver: Saver | None,
    ) -> None:  # fmt: skip
        self.step, self.batches, self.test_batches, self.saver = step, batches, test_batches, saver
        self.seed, self.epochs, self.steps_per_epoch = seed, epochs, steps_per_epoch
        self.rank, self.world = distributed.ranks()
        self.epoch, self.batch, self.steps, self.elapsed = 1, 0, 0, 0.0
        self.history = History()
        self.best, self.best_step, self.evaluations_since = math.inf, 0, 0
        # Torch's generator at the beginning of the epoch, of data that draws from it.
        self.loader_random: Tensor | None = None
        self.started = self.epoch_started = time.perf_counter()
        self.next_look, self.looked, self.looked_at = 1, self.started, 0

    def train(self) -> None:
        while self.epoch <= self.epochs and not self._too_patient():
            self._train_epoch()
            if self.history.reason == "time":
                return
        if self.epoch <= self.epochs:
            self.history.reason = "early"

    def _too_patient(self) -> bool:
        return self.patience is not None and self.evaluations_since >= self.patience

    def _train_epoch(self) -> None:
        self.step.model.train()
        self.shown.start_epoch(self.epoch, self.batch)
        self.epoch_started = time.perf_counter() - self.elapsed
        first = self.batch
        for values, images in self._until_stopped(self._steps(first)):
            self.steps, self.batch = self.steps + 1, self.batch + 1
            self.shown.step(values, images * self.world)
            if self.steps % self.log_every == 0:
                self.board.step(self.steps, {**values, "lr": self.step.optimizer.param_groups[0]["lr"]})
            # After the last batch that is for the end of the epoch, where its row is made.
            if self.batch != self.steps_per_epoch and self._must_look() and self._look():
                # Saved first: a resumed run goes on within this epoch, without the row of its part.
                self._save()
                self._end_epoch(whole=False)
                self.history.reason = "time"
                return
        if self.batch == 0:
            size = self.batches.batch_size
            raise ValueError(f"data: no images came in a whole epoch, or fewer than a batch of {size}")
        over = self._look(epoch_ends=True)
        self._end_epoch(whole=True, last=over)
        if over and self.epoch <= self.epochs:
            self.history.reason = "time"

    def _until_stopped(self, steps: Iterator[tuple[dict[str, Tensor], int]]) -> Iterator[tuple[dict[str, Tensor], int]]:
        """The steps; an error that a signal brought about, as in a DataLoader's workers, counts as the signal."""
        try:
            yield from steps
        except RuntimeError as error:
            if self.world > 1 or not self.requests.received:
                raise
            self._save()
            raise Interrupted(self.requests.received) from error

    def _steps(self, first: int) -> Iterator[tuple[dict[str, Tensor], int]]:
        """The steps of the epoch from batch `first` on: what each returns, and the rows of this process."""
        source = self.step.source
        if source is not None:
            rows = self.batches.batch_size // self.world
            # A checkpoint written between the last batch and the evaluation leaves none.
            if first < source.steps:
                source.start(self.epoch, first)
            for _ in range(first, source.steps):
                yield self.step(), rows
            return
        for batch in profiling.each("data", self._epoch(first)):
            seed = random.derive_seed(self.seed, self.steps + 1)
            yield self.step(batch, seed=seed, row_offset=self.rank * len(batch)), len(batch)

    def _epoch(self, first: int) -> Iterator[Tensor]:
        """This process's batches of the epoch, from batch `first` on."""
        if not self.batches.decides_itself:
            for batch, _ in self.batches.epoch(self.seed, self.epoch, first):
                yield batch
            return
        # A DataLoader draws its order from torch's generator: it has to begin where it began.
        now = torch.get_rng_state()
        if first and self.loader_random is not None:
            torch.set_rng_state(self.loader_random)
        self.loader_random = torch.get_rng_state()
        batches = self.batches.epoch(self.seed, self.epoch)
        for _ in islice(batches, first):
            pass
        if first:
            torch.set_rng_state(now)
        for batch, _ in batches:
            yield batch

    def _end_epoch(self, whole: bool, last: bool = False) -> None:
        means = self.step.means()
        images = means.pop("images")
        seconds = time.perf_counter() - self.epoch_started
        epoch = self.epoch if whole else round(self.epoch - 1 + self.batch / (self.steps_per_epoch or math.inf), 3)
        row = {"epoch": epoch, **means}
        last = last or not whole or self.epoch == self.epochs
        evaluated = self.test_batches is not None and (last or self.epoch % self.evaluate_every == 0)
        self._share_buffers()
        if evaluated:
            model = self.step.model if self.step.ema is None else self.step.ema.module
            tested = _evaluate(model, self.test_batches, self.seed)
            row |= {f"test_{name}": value for name, value in tested.items()}
        row |= {"seconds": seconds, "images_per_second": images / seconds}
        if not math.isfinite(row.get("test_loss", 0.0)):
            raise FloatingPointError(f"epoch {self.epoch}: test loss is {row['test_loss']}{self._last_checkpoint()}")
        diagnose = getattr(self.step.model, "diagnose", None)
        warning = None if diagnose is None else diagnose(row, self.steps)
        if warning is not None:
            row["warning"] = warning
        self.history.append(row)
        if whole:
            self.epoch, self.batch, self.elapsed = self.epoch + 1, 0, 0.0
            improved = row.get("test_loss", math.inf) < self.best
            if improved:
                self.best, self.best_step, self.evaluations_since = row["test_loss"], self.steps, 0
                self.history.best_step = self.steps
            elif evaluated:
                self.evaluations_since += 1
            last = last or self._too_patient()
            if self.saver is not None and (last or self._save_wanted(self.patience is not None and improved)):
                self._save()
        # Before the row is shown, so that what a user has seen has been kept.
        if self.rank == 0:
            self.board.epoch(self.steps, row, self.step.model if self.step.ema is None else self.step.ema.module)
            if self.on_epoch is not None:
                self.on_epoch(row)
        self.shown.end_epoch(row)

    def _share_buffers(self) -> None:
        """DDP gives rank 0's to all before each step; after the last one each process has its own."""
        if self.world > 1:
            distributed.share_buffers(self.step.model)
            if self.step.ema is not None:
                distributed.share_buffers(self.step.ema.module)

    def _must_look(self) -> bool:
        every = None if self.saver is None else self.saver.every
        due = self.steps >= self.next_look or (every is not None and self.steps % every == 0)
        # Other processes do not see this one's signals before the next common look.
        return due or (self.world == 1 and self.requests.received != 0)

    def _look(self, epoch_ends: bool = False) -> bool:
        """Look at the device, the signals and the clock, and come to one decision with the other processes.

        Returns:
            Whether the time is over.
        """
        failed = self.step.failed()
        now = time.perf_counter()
        over = self.time_limit is not None and now - self.started >= self.time_limit
        per_step = (now - self.looked) / max(1, self.steps - self.looked_at)
        interval = min(max(1, int(_LOOK_SECONDS / max(per_step, 1e-9))), _LOOK_STEPS)
        save = self.saver is not None and not epoch_ends and self.saver.due(self.steps, within_epoch=True)
        # The clocks of the other processes differ: rank 0's counts.
        first = [over, save, interval] if self.rank == 0 else [0, 0, 0]
        # The earliest failure is the largest of -step, and -2^62 stands for none.
        worst, received, over, save, interval = distributed.largest(
            [-failed if failed else -(2**62), self.requests.received, *map(int, first)]
        )
        if worst > -(2**62):
            raise FloatingPointError(self._failure(-worst))
        self.looked, self.looked_at, self.next_look = now, self.steps, self.steps + interval
        if received:
            self._save()
            raise Interrupted(received)
        if save:
            self._save()
        return bool(over)

    def _save_wanted(self, wanted: bool) -> bool:
        due = self.rank == 0 and self.saver.due(self.steps, within_epoch=False)
        return bool(distributed.largest([wanted or due])[0])

    def _save(self) -> None:
        if self.saver is not None:
            self.elapsed = time.perf_counter() - self.epoch_started if self.batch else 0.0
            self.saver.save(self.step, self)

    def _failure(self, failed: int) -> str:
        before = failed - (self.steps - self.batch) - 1
        total = "" if self.steps_per_epoch is None else f" of {self.steps_per_epoch}"
        images = ""
        if before >= 0 and self.batches.dataset is not None:
            size = self.batches.batch_size
            rows = self.batches.dataset.permutation(self.seed, self.epoch)[before * size : (before + 1) * size].tolist()
            images = f", images {', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''}"
        return (
            f"step {failed} (epoch {self.epoch}, batch {before + 1}{total}{images}): the loss or a gradient is NaN or "
            f"infinite; a smaller learning rate may help{self._last_checkpoint()}"
        )

    def _last_checkpoint(self) -> str:
        path = None if self.saver is None else self.saver.latest()
        return "; no checkpoint was written" if path is None else f"; the last good checkpoint is {path}"


def _check_lengths(steps: int | None) -> None:
    """Processes that do not take as many steps as the others would wait for ever."""
    known = -1 if steps is None else steps
    most, fewest = distributed.largest([known, -known])
    if most != -fewest:
        raise ValueError(f"data: expected as many batches on every process, got {-fewest} to {most}")


def _scheduler(
    optimizer: torch.optim.Optimizer, schedule: Schedule, warmup: int, epochs: int, steps_per_epoch: int | None
) -> LambdaLR | None:
    if schedule == "constant" and not warmup:
        return None
    if schedule != "constant" and steps_per_epoch is None:
        raise ValueError(f"lr_schedule: expected 'constant' for data of unknown length, got {schedule!r}")
    total = epochs * steps_per_epoch if steps_per_epoch is not None else math.inf

    def factor(step: int) -> float:
        rising = min(1.0, (step + 1) / (warmup + 1))
        done = min(1.0, max(0, step - warmup) / max(1, total - warmup))
        falling = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}
        return rising * falling[schedule]

    return LambdaLR(optimizer, factor)


def _make_optimizer(model: nn.Module, lr: float, fused: bool) -> torch.optim.Optimizer:
    make = model.make_optimizer if isinstance(model, Model) else partial(torch.optim.Adam, model.parameters())
    return make(lr=lr, fused=fused)


def _reset_lr(optimizer: torch.optim.Optimizer) -> None:
    """Take the schedule back, or the optimizer's next run would begin where this one's ended."""
    for group in optimizer.param_groups:
        lr = group.pop("initial_lr")
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


@contextmanager
def _matmul_precision(precision: Precision | None) -> Iterator[None]:
    if precision is None:
        yield
        return
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError as error:
        # Torch refuses to read its older setting once the newer one was written to.
        message = f"matmul_precision: expected None where torch.backends...fp32_precision is set, got {precision!r}"
        raise ValueError(message) from error
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def evaluate(
    model: nn.Module, data: Any, *, batch_size: int = 128, seed: int = 0, device: torch.device | str | None = None
) -> dict[str, float]:
    """Means over `data` of the parts of ``model.loss`` at its default options (beta = 1, no free bits), in nats.

    A model with a method ``evaluation(x, *, seed, row_offset)``, as flows have it, is asked that instead.

    Under torch.distributed every process calls it, each takes its rows of every batch, and all get the result.

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
    return _evaluate(model, ImageBatches(data, batch_size, device, train=False, shard=distributed.ranks()), seed)


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
    # Of a sharded model its loss alone gathers the weights.
    measured = model.loss if distributed.is_sharded(model) else getattr(model, "evaluation", model.loss)
    names: list[str] = []
    sums = torch.zeros(0, dtype=torch.float64, device=batches.device)
    with evaluating(model):
        for batch, first in batches.epoch(seed, 0):
            if len(batch) == 0:
                if distributed.is_sharded(model):
                    # The other processes wait for this one's part of the weights.
                    model.loss(batch.new_zeros(1, *batch.shape[1:]), seed=noise_seed)
                continue
            values = measured(batch, seed=noise_seed, row_offset=first)
            row = torch.stack([value.to(sums.device, torch.float64) for value in values.values()] + [sums.new_ones(())])
            names, sums = list(values), row * len(batch) + (sums if names else 0.0)
    # Rank 0 has the first rows; others may have none.
    names = distributed.from_first(names)
    if not names:
        raise ValueError("data: no images came in a whole epoch")
    *totals, images = distributed.add_up(sums if len(sums) else sums.new_zeros(len(names) + 1)).tolist()
    result = {name: total / images for name, total in zip(names, totals, strict=True)}
    if "kl" in result:
        result["elbo"] = -(result["nll"] + result["kl"])
    return result


def _device_of(model: nn.Module) -> torch.device:
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
