"""Linear transforms of the channels: ActNorm, the invertible 1 x 1 convolution, and both folded into one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genfast.flows._transform import Halves, Mask, Transform, divide, join, shared_logdet, wide
from genfast.functional import _checks

__all__ = ["ActNorm", "InvertibleConv1x1"]

# A channel that varies less is taken for a constant: 1 / std would blow up whatever another batch has there.
_SMALLEST_STD = 1e-3
# That much of the mean may be the rounding of fp32.
_ROUNDING = 1e-5


class ActNorm(Transform):
    """y = (x + bias) exp(log_scale) for each channel (Kingma and Dhariwal, "Glow", NeurIPS 2018, section 3.1).

    The first batch in training mode sets both so that its y has mean 0 and standard deviation 1 in every channel; under
    torch.distributed the batches of all processes do, which must all call it then. A channel whose standard deviation
    there is below 1e-3 + 1e-5 |mean| (a constant, a single value) is shifted only. The buffer ``initialized`` says that
    it was done: it is not done again after loading, in a copy, or in eval mode, where an uninitialised ActNorm is the
    identity. A first batch that is not finite leaves everything as it was.

    Args:
        channels: size of dimension 1.

    Raises:
        ValueError: channels is not a positive int; x has another number of channels.

    Example:
        >>> norm = ActNorm(3)
        >>> y, logdet = norm(5 + 2 * torch.randn(64, 3, 8, 8))
        >>> bool(norm.initialized), bool(y.mean().abs() < 1e-3), logdet.shape
        (True, True, torch.Size([64]))
    """

    pairs = True
    reversible = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        if type(channels) is not int or channels < 1:
            raise ValueError(f"channels: expected a positive int, got {channels!r}")
        self.channels = channels
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        # What the buffer says, where it is known to be True: asking it would wait for the device.
        self._ready = False

    def extra_repr(self) -> str:
        return f"{self.channels}"

    def forward(self, x: Tensor | Halves) -> tuple[Tensor | Halves, Tensor]:
        """x [B, C, ...], or its halves, and the log-determinant [B]."""
        self.settle(x)
        logdet = shared_logdet(wide(self.log_scale).sum() * _places(x), x)
        return _each(x, self.channels, self._normalise, self.bias, self.log_scale), logdet

    def inverse(self, y: Tensor | Halves) -> Tensor | Halves:
        """The x of which ``forward`` made y."""
        return _each(y, self.channels, self._undo, self.bias, self.log_scale)

    def folded(self, following: Transform) -> ActNormConv1x1 | None:
        return ActNormConv1x1(self, following) if isinstance(following, InvertibleConv1x1) else None

    @property
    def waits(self) -> bool:
        """Whether the next batch may set bias and scale."""
        return self.training and not self._ready

    def settle(self, x: Tensor | Halves) -> None:
        """Set bias and scale from x, if that is to be done and was not."""
        if not self.waits:
            return
        # Asked again at the batch after the one that did it: a step that fails takes its buffers back.
        if torch.compiler.is_compiling() or not self.remember():
            self._initialise(join(x) if isinstance(x, Halves) else x)

    def remember(self) -> bool:
        """Whether it is initialised: waits for the device, and never again once it is."""
        self._ready = bool(self.initialized)
        return self._ready

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        _check_channels(x, self.channels)
        x = wide(x)
        axes = [0, *range(2, x.dim())]
        places = x.new_full((1,), x.numel() / self.channels)
        total, count = _of_all(torch.cat((x.sum(axes), places))).split((self.channels, 1))
        mean = total / count
        # About the mean: a difference of squares would cancel where that is large.
        centred = x - mean.view(-1, *[1] * (x.dim() - 2))
        std = (_of_all(centred.square().sum(axes)) / count).sqrt()
        finite = torch.isfinite(mean).all() & torch.isfinite(std).all()
        keep = self.initialized | ~finite
        varies = std > _SMALLEST_STD + _ROUNDING * mean.abs()
        log_scale = torch.where(varies, -torch.log(std), 0)
        self.bias.copy_(torch.where(keep, self.bias, -mean.to(self.bias.dtype)))
        self.log_scale.copy_(torch.where(keep, self.log_scale, log_scale.to(self.log_scale.dtype)))
        self.initialized.logical_or_(finite)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._ready = False

    @staticmethod
    def _normalise(x: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
        scale = torch.exp(log_scale)
        return torch.addcmul((bias * scale).to(x.dtype), x, scale.to(x.dtype))

    @staticmethod
    def _undo(y: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
        return torch.addcmul(-bias.to(y.dtype), y, torch.exp(-log_scale).to(y.dtype))


class InvertibleConv1x1(Transform):
    """A learned invertible matrix across the channels (Kingma and Dhariwal, "Glow", NeurIPS 2018, section 3.2).

    It starts as a random rotation. For vectors [B, D] it is a linear layer. Where PyTorch may round the factors of fp32
    products to TF32 (`torch.set_float32_matmul_precision`), these are computed in fp64, so that the inverse stays one.

    Args:
        channels: size of dimension 1.
        form: ``"lu"``: W = P L (U + diag(s)), whose determinant costs a sum; ``"plain"``: W itself, whose determinant
            costs C^3.

    Raises:
        ValueError: an argument has a value that it cannot have; x has another number of channels; ``inverse`` finds
            the matrix singular (on the CPU; elsewhere, and compiled, the result is not finite then).

    Example:
        >>> conv = InvertibleConv1x1(4)
        >>> x = torch.randn(2, 4, 8, 8)
        >>> y, logdet = conv(x)
        >>> logdet.shape, torch.allclose(conv.inverse(y), x, atol=1e-4)
        (torch.Size([2]), True)
    """

    pairs = True
    reversible = True

    def __init__(self, channels: int, form: str = "lu") -> None:
        super().__init__()
        if type(channels) is not int or channels < 1:
            raise ValueError(f"channels: expected a positive int, got {channels!r}")
        _checks.choice("form", form, ("lu", "plain"))
        self.channels, self.form = channels, form
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        if form == "plain":
            self.weight = nn.Parameter(rotation)
            return
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", diagonal.sign())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(diagonal.abs().log())

    def extra_repr(self) -> str:
        return f"{self.channels}, form={self.form!r}"

    def matrix(self) -> tuple[Tensor, Tensor]:
        """(W [C, C], log |det W|)."""
        if self.form == "plain":
            return self.weight, torch.linalg.slogdet(wide(self.weight))[1]
        lower = self.lower.tril(-1) + torch.eye(self.channels, dtype=self.lower.dtype, device=self.lower.device)
        upper = self.upper.triu(1) + torch.diag(self.sign * torch.exp(self.log_diagonal))
        product = _unrounded(torch.matmul, self.permutation, _unrounded(torch.matmul, lower, upper))
        return product, wide(self.log_diagonal).sum()

    def forward(self, x: Tensor | Halves) -> tuple[Tensor | Halves, Tensor]:
        """x [B, C, ...], or its halves, and the log-determinant [B]."""
        with in_full_precision(x.a if isinstance(x, Halves) else x):
            weight, logdet = self.matrix()
            y = mix(x, weight, None)
        return y, shared_logdet(logdet * _places(x), x)

    def inverse(self, y: Tensor | Halves) -> Tensor | Halves:
        """The x of which ``forward`` made y."""
        with in_full_precision(y.a if isinstance(y, Halves) else y):
            return mix(y, inverted(self.matrix()[0]), None)


class ActNormConv1x1:
    """An `ActNorm` and the `InvertibleConv1x1` behind it as one convolution."""

    pairs = True
    reversible = True
    stochastic = False

    def __init__(self, norm: ActNorm, conv: InvertibleConv1x1) -> None:
        self.norm, self.conv = norm, conv

    def accepts(self, split: str | Mask) -> bool:
        return True

    def parameters(self) -> list[nn.Parameter]:
        return [*self.norm.parameters(), *self.conv.parameters()]

    def __call__(self, x: Tensor | Halves) -> tuple[Tensor | Halves, Tensor]:
        self.norm.settle(x)
        with in_full_precision(x.a if isinstance(x, Halves) else x):
            weight, logdet = self.conv.matrix()
            weight = weight * torch.exp(self.norm.log_scale)
            y = mix(x, weight, (weight * self.norm.bias).sum(1))
        return y, shared_logdet((logdet + wide(self.norm.log_scale).sum()) * _places(x), x)

    def inverse(self, y: Tensor | Halves) -> Tensor | Halves:
        with in_full_precision(y.a if isinstance(y, Halves) else y):
            weight = torch.exp(-self.norm.log_scale).unsqueeze(1) * inverted(self.conv.matrix()[0])
            return mix(y, weight, -self.norm.bias)


def mix(x: Tensor | Halves, weight: Tensor, bias: Tensor | None) -> Tensor | Halves:
    """weight @ channels + bias; of halves without putting them together first."""
    dtype = x.a.dtype if isinstance(x, Halves) else x.dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if not isinstance(x, Halves):
        _check_channels(x, weight.shape[0])
        return _conv(x, weight, bias)
    a, b, split = x
    if split == "checkerboard":
        for half in (a, b):
            _check_channels(half, weight.shape[0])
        return Halves(_conv(a, weight, bias), _conv(b, weight, bias), split)
    if a.shape[1] + b.shape[1] != weight.shape[0]:
        raise ValueError(f"x: expected {weight.shape[0]} channels, got {a.shape[1]} + {b.shape[1]}")
    columns = divide(weight, split)
    return divide(_conv(b, columns.b, _conv(a, columns.a, bias)), split)


def inverted(weight: Tensor) -> Tensor:
    """The inverse of a matrix, rounded once; only a CPU is asked whether there is one, others would be waited for."""
    inverse, info = torch.linalg.inv_ex(_double(weight))
    if not torch.compiler.is_compiling() and weight.device.type == "cpu" and info.any():
        raise ValueError("weight: expected an invertible matrix, got a singular one")
    return inverse.to(weight.dtype)


def in_full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast: the state of a flow keeps its dtype."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _conv(x: Tensor, weight: Tensor, start: Tensor | None) -> Tensor:
    """start + weight @ channels, start being a bias [C] or of the result's shape.

    No convolution: cuDNN rounds the factors of those to TF32 unless it is told not to.
    """
    if x.dim() == 2:
        columns = weight.t()
        return _unrounded(torch.mm, x, columns) if start is None else _unrounded(torch.addmm, start, x, columns)
    weight, places = weight.expand(x.shape[0], -1, -1), x.flatten(2)
    if start is None:
        y = _unrounded(torch.bmm, weight, places)
    else:
        start = start.unsqueeze(1) if start.dim() == 1 else start.flatten(2)
        y = _unrounded(torch.baddbmm, start, weight, places)
    return y.unflatten(2, x.shape[2:])


def _unrounded(product: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``product(*tensors)``, in fp64 where PyTorch may round fp32 factors to TF32."""
    if tensors[0].dtype != torch.float32 or not _may_round():
        return product(*tensors)
    return product(*(_double(tensor) for tensor in tensors)).float()


def _may_round() -> bool:
    # Each knows what the other cannot: settings of both kinds at once, and how to be traced.
    if torch.compiler.is_compiling():
        return torch.backends.cuda.matmul.allow_tf32
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _double(x: Tensor) -> Tensor:
    """fp64, but for Apple's GPUs, which have none."""
    return wide(x) if x.device.type == "mps" else x.double()


def _of_all(sums: Tensor) -> Tensor:
    """Added up over all processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    return sums


def _each(x: Tensor | Halves, channels: int, run: Callable[..., Tensor], *parameters: Tensor) -> Tensor | Halves:
    """``run(x, *parameters)`` with the parameters [C] as they broadcast; of halves, each with its own channels'."""
    if not isinstance(x, Halves):
        _check_channels(x, channels)
        return run(x, *(_broadcast(value, x) for value in parameters))
    a, b, split = x
    if split == "checkerboard":
        return Halves(_each(a, channels, run, *parameters), _each(b, channels, run, *parameters), split)
    if a.shape[1] + b.shape[1] != channels:
        raise ValueError(f"x: expected {channels} channels, got {a.shape[1]} + {b.shape[1]}")
    halves = [divide(value.unsqueeze(0), split) for value in parameters]
    return Halves(
        run(a, *(_broadcast(half.a[0], a) for half in halves)), run(b, *(_broadcast(half.b[0], b) for half in halves)),
        split,
    )  # fmt: skip


def _broadcast(value: Tensor, x: Tensor) -> Tensor:
    return value.view(-1, *[1] * (x.dim() - 2)) if x.dim() > 2 else value


def _places(x: Tensor | Halves) -> int:
    """How many elements each channel of a sample has."""
    if not isinstance(x, Halves):
        return x.shape[2:].numel()
    places = x.a.shape[2:].numel()
    return 2 * places if x.split == "checkerboard" else places


def _check_channels(x: Tensor, channels: int) -> None:
    if x.dim() < 2 or x.shape[1] != channels:
        raise ValueError(f"x: expected shape [B, {channels}, ...], got {list(x.shape)}")
