"""Normalizing flows: transforms composed into a density that can be evaluated, trained and sampled."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genfast import profiling
from genfast.flows import ActNorm, Halves, Split, Transform, join
from genfast.flows._reversible import State, Step, advance, checkpointed, retreat, reversibly
from genfast.flows.coupling import _Coupling
from genfast.functional import _checks
from genfast.models.base import _ISOLATED, Model, evaluating, wide
from genfast.random import Stream, as_seed, is_plain, normal

__all__ = ["Flow"]

_MEMORIES = ("ordinary", "checkpoint", "reversible")
_NOT_REPEATABLE = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm, nn.RReLU)
_WITH_DROPOUT = (nn.MultiheadAttention, nn.RNNBase)


class Flow(Model):
    """A normalizing flow: transforms from data x to a latent code z whose density is known.

    log p(x) = log p(z) + log |det dz/dx|. Images whose flow begins with `genfast.flows.Dequantize` go in as uint8 or as
    floats in [0, 1], and their density is that of the uint8 data (for uniform dequantization a lower bound of it, from
    one draw); without it x is taken as it is. Flow states and log-determinants stay fp32 under autocast.

    Args:
        transforms: of `genfast.flows`, data first. Adjacent ones are run together where that saves work: the halves of
            couplings stay apart, `Dequantize` and `Logit` become one op, `ActNorm` and `InvertibleConv1x1` one
            convolution.
        base: density of z; None: N(0, I). Else a module with ``log_prob(z [B, D]) -> [B]`` and
            ``sample(n, *, temperature, seed, row_offset) -> [n, D]``, such as another Flow.
        data_shape: shape of one x, without the batch; None: that of the first batch.
        memory: ``"ordinary"``; ``"checkpoint"``: `torch.utils.checkpoint` for each transform; ``"reversible"``: runs of
            invertible transforms keep their output alone, and the backward pass computes their inputs again from it
            (Gomez et al., "The reversible residual network", NeurIPS 2017).
        fused: False runs the ordinary PyTorch chain instead of genfast's ops (the baseline of every comparison).

    ``memory="reversible"`` runs each network twice, so those must be functions of their input: dropout and batch norm
    are refused. A `MixtureCoupling` keeps the half that it transforms, since it has flat stretches; of the others the
    inverse must have the digits: where an input does not come back the backward pass raises on a CPU and has NaN
    gradients elsewhere. It composes with autocast and DDP (not with FSDP), has no second derivative, and cannot be part
    of a graph of `torch.compile`: `compile` compiles the networks of the couplings one by one instead.

    Raises:
        TypeError, ValueError: an argument has a value that it cannot have.

    Example:
        >>> from genfast.flows import Coupling
        >>> flow = Flow([Coupling(nn.Linear(1, 2)), Coupling(nn.Linear(1, 2), swap=True)], data_shape=(2,))
        >>> x = torch.randn(5, 2)
        >>> z, logdet = flow(x)
        >>> z.shape, logdet.shape, torch.allclose(flow.inverse(z), x, atol=1e-5)
        (torch.Size([5, 2]), torch.Size([5]), True)
        >>> flow.sample(3).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        transforms: Iterable[Transform],
        base: nn.Module | None = None,
        *,
        data_shape: Sequence[int] | None = None,
        memory: Literal["ordinary", "checkpoint", "reversible"] = "ordinary",
        fused: bool = True,
    ) -> None:
        super().__init__()
        transforms = list(transforms)
        for transform in transforms:
            if not isinstance(transform, Transform):
                raise TypeError(f"transforms: expected genfast.flows.Transform, got {type(transform).__name__}")
        _check_base(base)
        _checks.choice("memory", memory, _MEMORIES)
        if data_shape is not None:
            sizes = list(data_shape)
            if not sizes or not all(type(size) is int and size > 0 for size in sizes):
                raise ValueError(f"data_shape: expected positive ints, got {data_shape!r}")
            data_shape = tuple(sizes)
        self.transforms = nn.ModuleList(transforms)
        self.base = base
        self.data_shape = data_shape
        self._latent_shapes: list[torch.Size] | None = None
        self._memory, self._fused = memory, bool(fused)
        given = {"transforms": transforms, "base": base}
        takes = inspect.signature(type(self)).parameters
        self.own_networks = tuple(name for name in given if name in takes and given[name] is not None)
        self._plan()

    @property
    def fused(self) -> bool:
        """Whether genfast's ops run, rather than the ordinary PyTorch chain."""
        return self._fused

    @fused.setter
    def fused(self, fused: bool) -> None:
        self._fused = bool(fused)
        self._plan()

    @property
    def memory(self) -> str:
        """What the backward pass finds in memory: ``"ordinary"``, ``"checkpoint"`` or ``"reversible"``."""
        return self._memory

    @memory.setter
    def memory(self, memory: str) -> None:
        _checks.choice("memory", memory, _MEMORIES)
        if hasattr(self, "_compile_options") and "reversible" in (memory, self._memory) and memory != self._memory:
            raise ValueError(f"memory: expected {self._memory!r}, for which this flow was compiled, got {memory!r}")
        self._memory = memory
        self._plan()

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self._any_tensor().device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self._any_tensor().dtype

    @profiling.annotate("forward")
    def forward(self, x: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0) -> tuple[Tensor, Tensor]:
        """Data to the latent code.

        Args:
            x: [B, *data_shape]; see the class.
            seed: of dequantization: None (drawn from torch's generator), an int, or an int64 tensor [1] on the model's
                device.
            row_offset: global index of the first row, for micro-batches, ranks and evaluation in pieces.

        Returns:
            z [B, D], the parts that `Split` factored out first, and the log-determinant, fp32 [B], in nats.

        Raises:
            TypeError, ValueError: x has another shape or dtype.

        Example:
            >>> from genfast.flows import Permute
            >>> Flow([Permute("reverse")])(torch.tensor([[1.0, 2.0]]))
            (tensor([[2., 1.]]), tensor([0.]))
        """
        latents, logdet = self._encode(x, seed, row_offset)
        return _flat(latents), logdet

    def inverse(self, z: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0) -> Tensor:
        """The x of a latent code z [B, D]: [B, *data_shape]; uint8 where the flow begins with `Dequantize`.

        Raises:
            TypeError, ValueError: z has another shape or dtype, or (on the CPU) is not finite; nothing tells the shape
                of x.

        Example:
            >>> from genfast.flows import Permute
            >>> Flow([Permute("reverse")], data_shape=(2,)).inverse(torch.tensor([[2.0, 1.0]]))
            tensor([[1., 2.]])
        """
        self._follow()
        shapes = self._shapes()
        sizes = [shape.numel() for shape in shapes]
        if not isinstance(z, Tensor) or not z.is_floating_point():
            raise TypeError(f"z: expected a float tensor, got {z.dtype if isinstance(z, Tensor) else type(z).__name__}")
        self._check_dtype("z", z)
        if z.dim() != 2 or z.shape[1] != sum(sizes):
            raise ValueError(f"z: expected shape [B, {sum(sizes)}], got {list(z.shape)}")
        # Elsewhere it would wait for the device.
        if z.device.type == "cpu" and is_plain(z) and not torch.isfinite(z).all():
            raise ValueError("z: expected finite numbers, since no x has another code, got NaN or infinity")
        parts = [part.unflatten(1, shape) for part, shape in zip(wide(z).split(sizes, 1), shapes, strict=True)]
        noise = self._noise(seed, z.device, row_offset)
        state: State = parts.pop()
        for step in reversed(self._steps):
            if isinstance(step, Split):
                kept = join(state) if isinstance(state, Halves) else state
                state = Halves(kept, parts.pop(), "channel")
            state = retreat(step, state, self._fused, **(noise if step.stochastic else {}))
        return join(state) if isinstance(state, Halves) else state

    def log_prob(self, x: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0) -> Tensor:
        """log p(x) of each sample: fp32 [B], nats; arguments as for `forward`.

        Example:
            >>> from genfast.flows import Permute
            >>> Flow([Permute("reverse")]).log_prob(torch.zeros(1, 2))
            tensor([-1.8379])
        """
        latents, logdet = self._encode(x, seed, row_offset)
        if self.base is not None:
            return self.base.log_prob(_flat(latents)) + logdet
        tensors = [tensor for part in latents for tensor in (part[:2] if isinstance(part, Halves) else (part,))]
        dimensions = sum(tensor.shape[1:].numel() for tensor in tensors)
        for tensor in tensors:
            logdet = logdet - 0.5 * tensor.square().flatten(1).sum(1)
        return logdet - 0.5 * math.log(2 * math.pi) * dimensions

    def bits_per_dim(self, x: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0) -> Tensor:
        """-log2 p(x) for each dimension of x: fp32 [B]; of uint8 images where the flow begins with `Dequantize`.

        Example:
            >>> from genfast.flows import Dequantize
            >>> Flow([Dequantize()]).bits_per_dim(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)).shape
            torch.Size([1])
        """
        return self.log_prob(x, seed=seed, row_offset=row_offset) / (-math.log(2) * x.shape[1:].numel())

    def loss(self, x: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0) -> dict[str, Tensor]:
        """The negative log-likelihood, averaged over the batch; arguments as for `forward`.

        Returns:
            fp32 scalars: ``loss`` in nats per sample, and ``bits_per_dim``, the same per dimension in bits.

        Example:
            >>> from genfast.flows import Permute
            >>> parts = Flow([Permute("reverse")]).loss(torch.zeros(4, 2))
            >>> {name: round(float(value), 4) for name, value in parts.items()}
            {'loss': 1.8379, 'bits_per_dim': 1.3257}
        """
        nats = -self.log_prob(x, seed=seed, row_offset=row_offset).mean()
        return {"loss": nats, "bits_per_dim": nats / (math.log(2) * x.shape[1:].numel())}

    @torch.no_grad()
    def sample(
        self, n: int, *, temperature: float = 1.0, seed: int | Tensor | None = None, row_offset: int = 0
    ) -> Tensor:
        """Draw from the flow. One seed gives the same samples in one call or in many.

        Args:
            n: how many.
            temperature: standard deviation of z, at least 0: below 1 the samples are more typical, and less various.
            seed: None (drawn from torch's generator), an int, or an int64 tensor [1] on the model's device.
            row_offset: global index of the first sample, so that pieces continue one another.

        Returns:
            [n, *data_shape]; images of a flow that begins with `Dequantize` as floats in [0, 1].

        Raises:
            ValueError: n or temperature is out of range, a parameter is not finite, or nothing tells the shape of x.

        Example:
            >>> from genfast.flows import Permute
            >>> flow = Flow([Permute("reverse")], data_shape=(2,))
            >>> whole, piece = flow.sample(8, seed=0), flow.sample(3, seed=0, row_offset=5)
            >>> torch.equal(whole[5:], piece)
            True
        """
        if type(n) is not int or n < 1:
            raise ValueError(f"n: expected an int of at least 1, got {n!r}")
        temperature = _checks.non_negative("temperature", temperature)
        self._check_finite()
        seed = as_seed(seed, self.device)
        with evaluating(self):
            if self.base is None:
                sizes = [shape.numel() for shape in self._shapes()]
                z = temperature * normal(seed, n, sum(sizes), Stream.PRIOR, row_offset)
            else:
                z = self.base.sample(n, temperature=temperature, seed=seed, row_offset=row_offset)
            z = z.to(torch.float64 if self.dtype == torch.float64 else torch.float32)
            x = self.inverse(z, seed=seed, row_offset=row_offset)
        return x.float() / 255 if x.dtype == torch.uint8 else x

    def compile(self, **kwargs: Any) -> None:
        """Compile ``forward`` and ``loss`` in place, one full graph each; see `Model.compile`.

        With ``memory="reversible"`` the networks of the couplings are compiled, one full graph each, and what runs them
        stays eager. An `ActNorm` that waits for its first batch gets it eagerly.

        Args:
            kwargs: options of `torch.compile`; ``fullgraph`` is True unless given.

        Example:
            >>> from genfast.flows import Coupling
            >>> flow = Flow([Coupling(nn.Linear(1, 2))])
            >>> flow.compile(backend="eager")
            >>> sorted(flow.loss(torch.randn(4, 2)))
            ['bits_per_dim', 'loss']
        """
        if self._memory == "reversible":
            self._compile_options = kwargs
            for module in self.modules():
                if isinstance(module, _Coupling):
                    module.net.compile(**{"fullgraph": True, **_ISOLATED, **kwargs})
            run = type(self).loss.__get__(self)
        else:
            super().compile(**kwargs)
            run = self.loss

        @functools.wraps(run)
        def loss(x: Tensor, *more: Any, **rest: Any) -> dict[str, Tensor]:
            self._settle(x, **{name: rest[name] for name in ("seed", "row_offset") if name in rest})
            return run(x, *more, **rest)

        self.loss = loss

    @torch.no_grad()
    def _settle(self, x: Tensor, seed: int | Tensor | None = None, row_offset: int = 0) -> None:
        """What an `ActNorm` learns from its first batch, it learns here."""
        waiting = [module for module in self.modules() if isinstance(module, ActNorm) and module.waits]
        if waiting:
            # Not one of torch's own generator, whose other draws do not depend on this.
            self._encode(x, as_seed(0 if seed is None else seed, self.device), row_offset)
            for norm in waiting:
                norm.remember()

    def _plan(self) -> None:
        """`_steps`: the transforms, neighbours together; `_stages`: the same, with runs of reversible ones as lists."""
        for module in self.transforms.modules():
            if isinstance(module, Transform):
                module.fused = self._fused
        if isinstance(self.base, Flow):
            self.base.fused = self._fused
        self._planned = list(self.transforms)
        self._steps: list[Step] = []
        for transform in self.transforms:
            last = self._steps[-1] if self._steps and self._fused else None
            folded = last.folded(transform) if isinstance(last, Transform) else None
            if folded is None:
                self._steps.append(transform)
            else:
                self._steps[-1] = folded
        self._stages: list[Step | list[Step]] = list(self._steps)
        if self._memory == "reversible":
            _check_repeatable(self.transforms)
            self._stages = []
            for reversible, group in itertools.groupby(self._steps, lambda step: step.reversible):
                run = list(group)
                self._stages += [run] if reversible else run

    def _follow(self) -> None:
        """Plan anew where somebody has changed the list of transforms."""
        if not torch.compiler.is_compiling() and self._planned != list(self.transforms):
            self._latent_shapes = None
            self._plan()

    def _encode(self, x: Tensor, seed: int | Tensor | None, row_offset: int) -> tuple[list[State], Tensor]:
        """The parts of the latent code as they come, and the log-determinant."""
        self._follow()
        state: State = self._check_data(x)
        noise = self._noise(seed, x.device, row_offset)
        latents: list[State] = []
        total = None
        saves = torch.is_grad_enabled()
        for stage in self._stages:
            if isinstance(stage, list):
                state, logdet = reversibly(stage, state, self._fused)
            elif self._memory == "checkpoint" and saves and not stage.stochastic and not isinstance(stage, Split):
                state, logdet = checkpointed(stage, state, self._fused)
            else:
                state, logdet = advance(stage, state, self._fused, **(noise if stage.stochastic else {}))
            if isinstance(stage, Split):
                latents.append(state.b)
                state = state.a
            total = logdet if total is None else total + logdet
        if total is None:
            total = wide(state).new_zeros(state.shape[0])
        return [*latents, state], total

    def _noise(self, seed: int | Tensor | None, device: torch.device, row_offset: int) -> dict[str, Any]:
        _checks.row_index("row_offset", row_offset)
        if not any(step.stochastic for step in self._steps):
            return {}
        return {"seed": as_seed(seed, device), "row_offset": row_offset}

    def _check_data(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        dequantizes = len(self._steps) > 0 and self._steps[0].stochastic
        if not x.is_floating_point() and not (dequantizes and x.dtype == torch.uint8):
            raise TypeError(f"x: expected floats{' or uint8' if dequantizes else ''}, got {x.dtype}")
        if not torch.compiler.is_compiling():
            self._check_dtype("x", x)
        if x.dim() < 2:
            raise ValueError(f"x: expected shape [B, ...], got {list(x.shape)}")
        if self.data_shape is None:
            # Not in a graph, where it would count as a change and be compiled for.
            if not torch.compiler.is_compiling():
                self.data_shape = tuple(x.shape[1:])
        elif tuple(x.shape[1:]) != self.data_shape:
            accepted = [self.data_shape]
            if len(self.data_shape) == 3:
                accepted += [(math.prod(self.data_shape),), self.data_shape[1:] if self.data_shape[0] == 1 else ()]
            if tuple(x.shape[1:]) not in accepted:
                shapes = " or ".join(str(["B", *shape]).replace("'", "") for shape in accepted if shape)
                raise ValueError(f"x: expected shape {shapes}, got {list(x.shape)}")
            x = x.reshape(-1, *self.data_shape)
        return x if x.dtype == torch.uint8 else wide(x)

    def _check_dtype(self, name: str, x: Tensor) -> None:
        if next(self._float_tensors(), None) is None:
            return
        if self.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"parameters: expected fp32 (autocast runs the networks in 16 bits), got {self.dtype}")
        if x.is_floating_point() and wide(x).dtype != self.dtype:
            raise TypeError(f"{name}: expected the dtype of the parameters, {self.dtype}, got {x.dtype}")

    def _check_finite(self) -> None:
        finite = {name: torch.isfinite(parameter).all() for name, parameter in self.named_parameters()}
        if finite and not torch.stack(list(finite.values())).all():
            name = next(name for name, value in finite.items() if not value)
            raise ValueError(f"{name}: expected finite parameters, got NaN or infinity")

    def _shapes(self) -> list[torch.Size]:
        """The shapes of the latent parts of one sample; found once, with zeros."""
        if self._latent_shapes is None:
            if self.data_shape is None:
                raise ValueError("data_shape: expected it, or a batch before, to know the shape of x; got None")
            zeros = torch.zeros(1, *self.data_shape, device=self.device)
            with evaluating(self):
                zeros = zeros.to(torch.float64 if self.dtype == torch.float64 else torch.float32)
                latents, _ = self._encode(zeros, as_seed(0, self.device), 0)
            self._latent_shapes = [(join(part) if isinstance(part, Halves) else part).shape[1:] for part in latents]
        return self._latent_shapes

    def _any_tensor(self) -> Tensor:
        return next(self._float_tensors(), torch.empty(0, dtype=torch.float32))

    def _float_tensors(self) -> Iterator[Tensor]:
        return itertools.chain(self.parameters(), (b for b in self.buffers() if b.is_floating_point()))


def _flat(latents: list[State]) -> Tensor:
    flat = [(join(part) if isinstance(part, Halves) else part).flatten(1) for part in latents]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)


def _check_base(base: nn.Module | None) -> None:
    if base is None:
        return
    able = all(callable(getattr(base, name, None)) for name in ("log_prob", "sample"))
    if not isinstance(base, nn.Module) or not able:
        raise TypeError(f"base: expected None or a module with log_prob and sample, got {type(base).__name__}")


def _check_repeatable(transforms: Iterable[Transform]) -> None:
    for transform in transforms:
        for module in transform.modules() if transform.reversible else ():
            drops = isinstance(module, _WITH_DROPOUT) and module.dropout
            if drops or (isinstance(module, _NOT_REPEATABLE) and getattr(module, "p", 1.0)):
                raise ValueError(
                    "memory: expected 'ordinary' or 'checkpoint' with networks that are not functions of their input "
                    f"alone, got 'reversible' with {type(module).__name__}"
                )
