"""One optimizer step, as a whole on the device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from genfast import profiling, random
from genfast.capture import Captured
from genfast.models.base import Model
from genfast.training import distributed
from genfast.training.ema import EMA

if TYPE_CHECKING:
    from genfast.training.data import Feed

__all__ = ["Mode", "TrainStep"]

Mode = Literal["auto", "eager", "compile", "graph"]
# As torch.amp.GradScaler's.
_INITIAL_SCALE, _GROWTH_INTERVAL = 2.0**16, 2000
# Below this the fp16 gradients are not small but broken.
_SMALLEST_SCALE = 2.0**-14
# Gradients that are all 0 would let it grow for ever.
_LARGEST_SCALE = 2.0**32
# Of a model that is trained as a whole.
_ONE_TURN = ("",)


class TrainStep:
    """Loss, backward, clipping, optimizer and moving average on one batch, without waiting for the device.

    A step whose loss or gradients are NaN or infinite changes nothing: not the weights, nor the optimizer's state, the
    average, or buffers that are written to in place. That is decided on the device, where the optimizer's kernel can
    skip its update (``fused`` Adam, AdamW and SGD); with any other optimizer the host reads one flag a step. `failed`
    tells which step it was.

    Under torch.distributed the gradients are averaged over the processes: by DDP, which is set up here, or by FSDP2 for
    a model that `shard` has split. Every process takes the same number of steps with batches of one size.

    A model whose networks take turns, as those of a GAN, has ``turns(step) -> tuple[str, ...]``, the turns of the step
    of that number (from 0), and ``turn_parameters(turn)``, whose loss ``loss(x, turn=turn, ...)`` lowers. They are
    taken in that order within one step, on one batch and one seed, each with gradients, clipping and an update of its
    parameters alone; a turn whose gradients are not finite changes nothing. One optimizer holds all parameters, and
    there is one CUDA graph for each different tuple. The step's "loss" is the sum of the turns', its "grad_norm" that
    of all gradients together.

    Args:
        model: has ``loss(x, *, seed, row_offset, ...) -> {"loss": scalar, ...parts}``, as every genfast model.
        optimizer: over the model's parameters.
        mode: "eager"; "compile": the model's loss is compiled first; "graph": the whole step, optimizer included, is
            one CUDA graph, captured at the fourth step and replayed from then on for batches of the same shape; "auto":
            "graph" for a genfast model on a CUDA device where that is possible, else "eager". The Python of a captured
            loss runs four times, and what it decided at the fourth stays; of the optimizer's options only the learning
            rate, which becomes a tensor, may change afterwards.
        compile: compile the model's loss first, in whichever mode.
        source: what `DeviceDataset.feed` made: a step called without a batch takes the next one from there.
        micro_batches: split each batch into so many; their gradients add up. Each draws the noise of its own rows, so
            the loss is that of the whole batch, to rounding (not so with batch norm).
        grad_clip: largest norm of all gradients together; None leaves them as they are.
        amp_dtype: dtype for `torch.autocast` of the forward pass: torch.bfloat16, or torch.float16, whose loss is
            scaled as by `torch.amp.GradScaler`; None for no autocast.
        loss_options: passed to ``model.loss`` at every step, such as ``{"beta": 4.0}``.
        scheduler: of `torch.optim.lr_scheduler`, stepped after each step.
        ema_decay: keep a moving average of the weights in `ema`; see `EMA`.

    Raises:
        ValueError: an argument is out of range, or mode is "graph" without a CUDA device. (With several processes, an
            optimizer that is not a fused one, or a loss that waits for the device, a warning says why steps run
            eagerly.)

    Example:
        >>> class Mean(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mean = nn.Parameter(torch.zeros(3))
        ...     def loss(self, x, *, seed=None, row_offset=0):
        ...         return {"loss": (x - self.mean).square().mean()}
        >>> model = Mean()
        >>> step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.5))
        >>> [round(float(step(torch.ones(8, 3))["loss"]), 3) for _ in range(3)]
        [1.0, 0.444, 0.198]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        mode: Mode = "eager",
        compile: bool = False,
        source: Feed | None = None,
        micro_batches: int = 1,
        grad_clip: float | None = None,
        amp_dtype: torch.dtype | None = None,
        loss_options: Mapping[str, Any] | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        ema_decay: float | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}")
        if micro_batches < 1:
            raise ValueError(f"micro_batches: expected a positive int, got {micro_batches}")
        if grad_clip is not None and not grad_clip > 0:
            raise ValueError(f"grad_clip: expected a positive number or None, got {grad_clip}")
        if amp_dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"amp_dtype: expected torch.bfloat16, torch.float16 or None, got {amp_dtype}")
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError("scheduler: expected one that counts steps, got ReduceLROnPlateau, which needs a metric")
        self.model, self.optimizer, self.scheduler, self.source = model, optimizer, scheduler, source
        self.micro_batches, self.grad_clip, self.amp_dtype = micro_batches, grad_clip, amp_dtype
        self.loss_options = dict(loss_options or {})
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not {id(parameter) for parameter in self._parameters} & {id(parameter) for parameter in model.parameters()}:
            raise ValueError("optimizer: expected one over parameters of the model, got one over none of them")
        if not callable(getattr(model, "loss", None)):
            raise TypeError(f"model: expected a loss(x, *, seed, row_offset), got a {type(model).__name__} without one")
        self.device = self._parameters[0].device
        self._sharded = distributed.is_sharded(model)
        self._takes_turns = all(callable(getattr(model, name, None)) for name in ("turns", "turn_parameters"))
        if self._takes_turns and self._sharded:
            raise ValueError(f"model: expected one that is not sharded where networks take turns, got {type(model)}")
        if self._sharded and ema_decay is not None:
            raise ValueError(f"ema_decay: expected None for a model that is sharded, got {ema_decay}")
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        # With dampening a first step differs from the others, also where those before it were skipped.
        dampened = any(group.get("dampening") for group in optimizer.param_groups)
        self._skips_alone = fused and not dampened and not self._sharded
        # Each option is a constant of the graph, the learning rate aside.
        self._constants: dict[str, Any] = {}
        self._rates: list[Tensor] = []
        self.mode = self._choose(mode)

        self._loss = self._loss_of(model, compile or mode == "compile")
        self.ema = None if ema_decay is None else EMA(model, ema_decay)
        self._buffers = list(model.buffers())
        with torch.device(self.device):
            # Steps taken, and the first one that failed or 0.
            self._taken, self._failed = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
            scale = _INITIAL_SCALE if amp_dtype is torch.float16 else 1.0
            self._scale, self._growth = torch.tensor(scale), torch.zeros((), dtype=torch.int64)
            self._one = torch.ones((), dtype=torch.float64)
        # Steps of different turns have other parts, and a graph holds on to the sums that it writes.
        self._names: dict[str, list[str]] = {}
        self._sums: dict[str, Tensor] = {}
        self._captured: dict[str, Captured[dict[str, Tensor]]] = {}
        # The same as `_taken`, for the host.
        self._steps = 0
        self._fixed: tuple[Tensor, Tensor, int] | None = None

    def _choose(self, mode: Mode) -> Literal["eager", "graph"]:
        """How steps run, the loss being compiled or not."""
        if mode in ("eager", "compile"):
            return "eager"
        if self.device.type != "cuda":
            if mode == "graph":
                raise ValueError(f"mode: expected a model on a CUDA device for 'graph', got one on {self.device}")
            return "eager"
        obstacle = self._obstacle()
        if obstacle is None and mode == "auto" and not isinstance(self.model, Model):
            # Python in the loss of somebody's own model would run no more after the capture.
            return "eager"
        if obstacle is not None:
            if mode == "graph":
                warnings.warn(f"mode graph: {obstacle}; steps run eagerly", stacklevel=4)
            return "eager"
        for group in self.optimizer.param_groups:
            # A float would be a constant of the graph.
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=self.device)
            self._rates.append(group["lr"])
            if "capturable" in group:
                group["capturable"] = True
        self._constants = self._options()
        # Torch would warn that the steps before the capture are not captured.
        self.optimizer._warned_capturable_if_run_uncaptured = True
        return "graph"

    def _options(self) -> dict[str, Any]:
        """What a captured step cannot follow when it changes."""
        groups = [
            {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
            for group in self.optimizer.param_groups
        ]
        return {"groups": groups, "loss_options": dict(self.loss_options)}

    def _follow_options(self) -> None:
        """Bring changed learning rates into the graph; leave it for good if another option has changed."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if group["lr"] is not rate:
                group["lr"] = rate.fill_(group["lr"])
        if self._options() != self._constants:
            warnings.warn("mode graph: options have changed that a graph holds fixed; steps run eagerly", stacklevel=5)
            self.mode = "eager"

    def _obstacle(self) -> str | None:
        compiled = getattr(self.model, "_compile_options", {})
        if compiled.get("mode") in ("reduce-overhead", "max-autotune"):
            return f"the model is compiled with mode {compiled['mode']!r}, which has graphs of its own"
        if distributed.ranks()[1] > 1:
            return "the gradients are exchanged with other processes"
        if not self._skips_alone or not all(group.get("fused") for group in self.optimizer.param_groups):
            name = type(self.optimizer).__name__
            return f"the optimizer, {name}, is not a fused one (Adam, AdamW or SGD with fused=True, no dampening)"
        return None

    def _loss_of(self, model: nn.Module, compiled: bool) -> Callable[..., dict[str, Tensor]]:
        if compiled and isinstance(model, Model):
            model.compile()

        def loss(x: Tensor, **options: Any) -> dict[str, Tensor]:
            # Looked up each time: the model may be compiled after the step was made.
            return model.loss(x, **options)

        if compiled and not isinstance(model, Model):
            # nn.Module.compile covers forward alone.
            loss = torch.compile(model.loss)
        if distributed.ranks()[1] > 1 and not self._sharded:
            if self._takes_turns:
                # DDP expects every parameter to have a gradient at every backward.
                distributed.share_weights(model)
                return loss
            return distributed.data_parallel(model, loss, self.device)
        return loss

    @profiling.annotate("step")
    def __call__(
        self, batch: Tensor | None = None, *, seed: int | Tensor | None = None, row_offset: int = 0
    ) -> dict[str, Tensor]:
        """Take one step.

        Args:
            batch: what ``model.loss`` takes, on the model's device; None for the next one of `source`, which has its
                own seed and row_offset.
            seed: of the step's noise: None (drawn from torch's generator), an int, or an int64 tensor [1].
            row_offset: global index of the batch's first row: on rank r, r times the rows of its batch.

        Returns:
            The parts of the loss, means over this process's batch, and "grad_norm" (before clipping): detached scalars
            on the device. A replayed graph writes the next step's into the same tensors.

        Raises:
            ValueError: there is neither a batch nor a source, or an empty batch.
        """
        if self.mode == "graph":
            self._follow_options()
        turns = self.model.turns(self._steps) if self._takes_turns else _ONE_TURN
        if batch is None:
            if self.source is None:
                raise ValueError("batch: expected a tensor where the step has no source, got None")
            if self.source.left == 0:
                raise ValueError("source: expected start(epoch) before this step, got none, or no batch is left of it")
            self.source.left -= 1
            advance = partial(self._advance_from_source, turns)
            values = self._replay(turns, advance) if self.mode == "graph" else advance()
        else:
            if len(batch) == 0:
                raise ValueError(f"batch: expected at least one row, got shape {list(batch.shape)}")
            # A tensor, because a compiled loss would be specialised to each int.
            seed = random.as_seed(seed, batch.device)
            # There is one graph: that of the source, if there is one.
            if self.mode == "graph" and self.source is None and self._fits(batch, seed, row_offset):
                values = self._replay(turns, lambda: self._advance(turns, *self._fixed))
            else:
                values = self._advance(turns, batch, seed, row_offset)
        self._steps += 1
        if self.scheduler is not None:
            self.scheduler.step()
        return values

    def _fits(self, batch: Tensor, seed: Tensor, row_offset: int) -> bool:
        """Put the batch where the graph reads it, if it is of the shape that the graph was made for."""
        if self._fixed is None:
            self._fixed = (batch.clone(), seed.clone(), row_offset)
            return True
        fixed_batch, fixed_seed, fixed_offset = self._fixed
        if (batch.shape, batch.dtype, row_offset) != (fixed_batch.shape, fixed_batch.dtype, fixed_offset):
            return False
        fixed_batch.copy_(batch, non_blocking=True)
        fixed_seed.copy_(seed)
        return True

    def _replay(self, turns: tuple[str, ...], function: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        key = "+".join(turns)
        if key not in self._captured:
            self._captured[key] = Captured(function, self.device)
        return self._captured[key]()

    def _advance_from_source(self, turns: tuple[str, ...]) -> dict[str, Tensor]:
        with profiling.range("data"):
            batch, seed = self.source.take()
        return self._advance(turns, batch, seed, self.source.row_offset)

    def _advance(self, turns: tuple[str, ...], batch: Tensor, seed: Tensor, row_offset: int) -> dict[str, Tensor]:
        """The whole step: no value is read on the host, unless the optimizer cannot skip by itself."""
        taken = [self._take_turn(turn, batch, seed, row_offset) for turn in turns]
        values: dict[str, Tensor] = {}
        for parts, _, _ in taken:
            # Each network's parts have names of their own.
            values |= parts
        if len(taken) > 1:
            values["loss"] = torch.stack([parts["loss"] for parts, _, _ in taken]).sum()
            values["grad_norm"] = torch.stack([parts["grad_norm"] for parts, _, _ in taken]).norm()
        accepted = reduce(torch.logical_and, [accepted for _, accepted, _ in taken])
        with torch.no_grad():
            if self.ema is not None:
                # Counted are the updates of what is averaged.
                moved = not self._takes_turns or any(self.ema.averages(self.model.turn_parameters(t)) for t in turns)
                self.ema.update(accepted if moved else torch.zeros_like(accepted))
            finite = reduce(torch.logical_and, [finite for _, _, finite in taken])
            self._account("+".join(turns), values, len(batch), accepted, finite)
        return values

    def _take_turn(
        self, turn: str, batch: Tensor, seed: Tensor, row_offset: int
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Update the parameters whose turn it is: the loss's parts, whether that was done, whether they are finite."""
        self.optimizer.zero_grad(set_to_none=True)
        buffers = [buffer.clone() for buffer in self._buffers]
        with self._turn(turn) as options:
            values, finite = self._backward(batch, seed, row_offset, options)
        with torch.no_grad(), profiling.range("optimizer"):
            grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            if self._takes_turns and distributed.ranks()[1] > 1:
                distributed.average(grads)
            norm = _full(nn.utils.get_total_norm(grads)).float() / self._scale
            # A loss that is not finite has made the gradients NaN, those of the other processes too, unless the
            # model's backward masks them: then this process alone knows.
            accepted = norm.isfinite() & finite if distributed.ranks()[1] == 1 else norm.isfinite()
            self._update(norm, accepted)
            for buffer, before in zip(self._buffers, buffers, strict=True):
                buffer.copy_(torch.where(accepted, buffer, before))
            values["grad_norm"] = norm
        return values, accepted, finite

    @contextmanager
    def _turn(self, turn: str) -> Iterator[dict[str, Any]]:
        """The options of a turn's loss; inside the block its parameters alone require gradients."""
        if not self._takes_turns:
            yield self.loss_options
            return
        own = {id(parameter) for parameter in self.model.turn_parameters(turn)}
        frozen = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield {**self.loss_options, "turn": turn}
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _backward(
        self, batch: Tensor, seed: Tensor, row_offset: int, options: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the batch's mean loss, its parts, and whether it is finite."""
        # As few as there are rows, and none of them empty.
        pieces = batch.tensor_split(min(self.micro_batches, len(batch)))
        values: dict[str, Tensor] = {}
        for index, piece in enumerate(pieces):
            share = len(piece) / len(batch)
            with self._exchanging(last=index == len(pieces) - 1):
                # The cache would keep casts of the weights across what a graph holds.
                autocast = torch.autocast(
                    batch.device.type, self.amp_dtype, enabled=self.amp_dtype is not None,
                    cache_enabled=self.mode != "graph",
                )  # fmt: skip
                with autocast:
                    parts = self._loss(piece, seed=seed, row_offset=row_offset, **options)
                if self._steps == 0 or self._takes_turns:
                    _check_parts(parts)
                loss = parts["loss"]
                # The share of a finite loss, and NaN for any other, whose gradients might be finite.
                gradient = loss.detach() * 0 + share
                if self.amp_dtype is torch.float16:
                    gradient = gradient * self._scale
                profiling.backward(loss, gradient=gradient)
            for name, value in parts.items():
                part = value.detach() if share == 1 else value.detach() * share
                values[name] = part if index == 0 else values[name] + part
            row_offset += len(piece)
        return values, values["loss"].isfinite()

    def _exchanging(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are averaged over the processes once a step, after the last micro-batch."""
        if isinstance(self._loss, nn.parallel.DistributedDataParallel) and not last:
            return self._loss.no_sync()
        # A sharded model's are after each: kept whole until the last, they would take the memory that sharding saves.
        return nullcontext()

    def _update(self, norm: Tensor, accepted: Tensor) -> None:
        """The optimizer's step with clipped, unscaled gradients, unless they are not finite."""
        divisor = self._scale if self.amp_dtype is torch.float16 else None
        if self.grad_clip is not None:
            excess = torch.clamp(norm / self.grad_clip, min=1.0)
            divisor = excess if divisor is None else excess * divisor
        if self._skips_alone:
            # What torch.amp.GradScaler tells the fused kernels, which divide and skip on the device.
            self.optimizer.grad_scale, self.optimizer.found_inf = divisor, (~accepted).float()
            new = [parameter for parameter in self._parameters if not self.optimizer.state.get(parameter)]
            try:
                self.optimizer.step()
            finally:
                del self.optimizer.grad_scale, self.optimizer.found_inf
            # Fused SGD does not initialise the momentum in a first step that it skips.
            for parameter in new:
                for value in self.optimizer.state.get(parameter, {}).values():
                    value.copy_(torch.where(accepted, value, 0.0))
        elif accepted:
            if divisor is not None:
                number = float(divisor)
                for parameter in self._parameters:
                    if parameter.grad is not None:
                        parameter.grad.div_(number)
            self.optimizer.step()
        if self.amp_dtype is torch.float16:
            grown = self._growth + 1 == _GROWTH_INTERVAL
            self._scale.mul_(torch.where(accepted, torch.where(grown, 2.0, 1.0), 0.5)).clamp_(max=_LARGEST_SCALE)
            self._growth.copy_(torch.where(accepted & ~grown, self._growth + 1, 0))

    def _account(
        self, turns: str, values: dict[str, Tensor], rows: int, accepted: Tensor, finite: Tensor
    ) -> None:
        """Add to the sums that `means` reads, and remember the first failure."""
        if turns not in self._sums:
            self._names[turns] = list(values)
            self._sums[turns] = torch.zeros(len(values) + 1, dtype=torch.float64, device=self.device)
        # fp64: sums over a large set would otherwise lose the digits that are reported.
        row = torch.stack([value.to(self.device, torch.float64) for value in values.values()] + [self._one])
        self._sums[turns] += torch.where(accepted & finite, row, 0.0) * rows
        self._taken += 1
        # With a loss scale, gradients that overflow are part of the search for the scale.
        fine = finite & (self._scale >= _SMALLEST_SCALE if self.amp_dtype is torch.float16 else accepted)
        self._failed.copy_(torch.where(fine | (self._failed > 0), self._failed, self._taken))

    def failed(self) -> int:
        """The first step, from 1, whose loss or gradients were NaN or infinite; 0 if none. Waits for the device.

        Under float16, gradients that overflow are no failure, for the loss scale adapts, until it falls below 2^-14.

        Example:
            >>> model = nn.Linear(1, 1)
            >>> model.loss = lambda x, seed, row_offset: {"loss": model(x).mean()}
            >>> step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=1.0, fused=True))
            >>> _, _ = step(torch.ones(2, 1)), step(torch.full((2, 1), torch.inf))
            >>> step.failed(), bool(model.weight.isfinite())
            (2, True)
        """
        return int(self._failed)

    def means(self) -> dict[str, float]:
        """The parts of the loss, averaged over all images since the last call.

        Those of all processes, which call it together. Steps that failed do not count; "images" is the number of images
        that do. Waits for the device.

        Raises:
            ValueError: there was no step since the last call.
        """
        if not self._sums:
            raise ValueError("means: expected a step before it, got none")
        totals: dict[str, float] = {}
        images: dict[str, float] = {}
        for turns, sums in self._sums.items():
            *row, count = distributed.add_up(sums.clone()).tolist()
            sums.zero_()
            for name, total in zip(["images", *self._names[turns]], [count, *row], strict=True):
                totals[name] = totals.get(name, 0.0) + total
                images[name] = images.get(name, 0.0) + count
        counted = totals.pop("images")
        means = {name: total / images[name] if images[name] else math.nan for name, total in totals.items()}
        return {**means, "images": counted}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What continues the steps elsewhere, beside the states of model, average and optimizer: tensors and others.

        Of all processes, which call it together.
        """
        tensors = {"taken": self._taken, "failed": self._failed, "scale": self._scale, "growth": self._growth}
        tensors |= {f"sums{turns}": distributed.add_up(sums.clone()) for turns, sums in self._sums.items()}
        if self.ema is not None:
            tensors["ema_updates"] = self.ema.updates
        scheduler = None if self.scheduler is None else _without_tensors(self.scheduler.state_dict())
        return tensors, {"names": dict(self._names), "scheduler": scheduler}

    def load_state(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Take over what `state` gave. Before the first step."""
        self._taken.copy_(tensors["taken"])
        self._failed.copy_(tensors["failed"])
        self._scale.copy_(tensors["scale"])
        self._growth.copy_(tensors["growth"])
        self._steps = int(tensors["taken"])
        # Checkpoints of before there were turns have a list.
        names = rest["names"] if isinstance(rest["names"], Mapping) else {"": rest["names"]} if rest["names"] else {}
        self._names |= {turns: list(names) for turns, names in names.items()}
        for sums in self._sums.values():
            sums.zero_()
        for turns in names:
            if turns not in self._sums:
                self._sums[turns] = torch.zeros_like(tensors[f"sums{turns}"], device=self.device)
            # In place: a graph that runs goes on writing to them.
            self._sums[turns].copy_(tensors[f"sums{turns}"])
        if distributed.ranks()[0] > 0:
            # They are of all processes: rank 0 carries them on.
            for sums in self._sums.values():
                sums.zero_()
        if self.ema is not None:
            self.ema.updates.copy_(tensors["ema_updates"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(_with_tensors(rest["scheduler"], self.scheduler.state_dict()))


def _check_parts(parts: Any) -> None:
    named = isinstance(parts, Mapping) and "loss" in parts
    if named and all(isinstance(value, Tensor) and value.dim() == 0 for value in parts.values()):
        return
    got = _described(parts)
    if isinstance(parts, Mapping):
        got = {name: _described(value) for name, value in parts.items()}
    raise TypeError(f"model.loss: expected a dict of scalar tensors with 'loss' among them, got {got}")


def _described(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _full(tensor: Tensor) -> Tensor:
    """A sharded model's norm is a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _without_tensors(value: Any) -> Any:
    """A scheduler's state for JSON: where learning rates are tensors, it keeps some."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"scheduler: expected one whose state JSON can hold, got one with the keys {list(value)}")
        return {key: _without_tensors(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_tensors(item) for item in value]
    return value.item() if isinstance(value, Tensor) else value


def _with_tensors(value: Any, current: Any) -> Any:
    """Numbers as tensors again where the running scheduler has some, for its arithmetic to round as before."""
    if isinstance(value, dict) and isinstance(current, dict):
        return {key: _with_tensors(item, current.get(key)) for key, item in value.items()}
    if isinstance(value, list) and isinstance(current, list) and len(value) == len(current):
        return [_with_tensors(item, now) for item, now in zip(value, current, strict=True)]
    return torch.full_like(current, value) if isinstance(current, Tensor) else value
