"""Between pixels and real numbers: noise that fills the gaps, uniform or learned, and the logit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast.flows._transform import Halves, Mask, Transform, divide, join
from genfast.flows.coupling import _Coupling
from genfast.functional import dequantize_logit
from genfast.functional.dequantize_logit import check_alpha
from genfast.random import Stream, as_seed, is_plain, normal, uniform

__all__ = ["ConditionalFlow", "Dequantize", "DequantizeLogit", "Logit", "VariationalDequantize"]

_LOG_2PI = math.log(2 * math.pi)
_LOG_256 = 8 * math.log(2)
# The ends of a learned noise: closer to 1, pixel plus noise would round to the next pixel.
_LEAST = 2.0**-16


class Dequantize(Transform):
    """Uniform dequantization: pixels x to (x + u) / 256 with u from U(0, 1) (Theis, van den Oord and Bethge, "A note on
    the evaluation of generative models", ICLR 2016, section 3.1).

    The log-density of the result plus the log-determinant, -log 256 a pixel, is on average over u at most that of the
    pixels. In front of a `Logit`, `genfast.Flow` makes both one op, `genfast.functional.dequantize_logit`.

    Args:
        centred: True takes u = 1/2 in place of noise: densities at points, which a flow can raise without limit and
            of which nothing follows for the pixels. To see what the noise is for.

    Example:
        >>> x = torch.tensor([[0, 255]], dtype=torch.uint8)
        >>> v, logdet = Dequantize()(x, seed=0)
        >>> bool(((v > 0) & (v < 1)).all()), logdet, Dequantize().inverse(v)
        (True, tensor([-11.0904]), tensor([[  0, 255]], dtype=torch.uint8))
        >>> 256 * Dequantize(centred=True)(x)[0]
        tensor([[  0.5000, 255.5000]])
    """

    stochastic = True

    def __init__(self, centred: bool = False) -> None:
        super().__init__()
        self.centred = centred

    def extra_repr(self) -> str:
        return "centred=True" if self.centred else ""

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0) -> tuple[Tensor, Tensor]:
        """Pixels to floats.

        Args:
            x: [B, ...], uint8, or floats in [0, 1], which are rounded to the nearest k / 255.
            seed: None (drawn from torch's generator), an int, or an int64 tensor [1] on the device of x.
            row_offset: global index of the first sample.

        Returns:
            v in (0, 1), of x's shape, fp32 (fp64 for fp64), and the log-determinant [B].

        Raises:
            TypeError: x is of another dtype.
            ValueError: floats are not in [0, 1] (seen on the CPU; elsewhere they are clamped).
        """
        pixels, dtype = _pixels(x)
        if self.centred:
            return (pixels + 0.5) / 256, _constant(x, dtype)
        u = uniform(as_seed(seed, x.device), *_rows(x), Stream.DEQUANTIZE, row_offset, bits=15).reshape(x.shape)
        return (pixels + u.to(dtype)) / 256, _constant(x, dtype)

    def inverse(self, y: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0) -> Tensor:
        """The pixels, uint8, in whose bins y lies: of y beyond [0, 1) the nearest, 0 of a NaN. It draws nothing."""
        return (256 * y).floor().clamp(0, 255).nan_to_num(0.0).to(torch.uint8)

    def noise(self, x: Tensor, seed: int | Tensor | None, row_offset: int) -> tuple[Tensor | None, Tensor | None]:
        """What `DequantizeLogit` adds to the pixels, None for the op's own, and what it adds to the log-determinant."""
        if self.centred:
            return torch.full_like(x, 0.5, dtype=_pixels(x)[1]), None
        if x.dtype != torch.float64:
            return None, None
        rows = uniform(as_seed(seed, x.device), *_rows(x), Stream.DEQUANTIZE, row_offset, bits=15)
        return rows.reshape(x.shape).double(), None

    def folded(self, following: Transform) -> DequantizeLogit | None:
        """With a `Logit` behind it, one op."""
        return DequantizeLogit(self, following) if isinstance(following, Logit) else None


class VariationalDequantize(Transform):
    """Learned dequantization: x to (x + u) / 256, u from a conditional density q(u | x) (Ho et al., "Flow++: improving
    flow-based generative models with variational dequantization and architecture design", ICML 2019, section 3.1).

    u = sigmoid(h), h made from N(0, I) by a flow that sees the image. The log-determinant is -log 256 a pixel and
    -log q(u | x): the log-density of the result plus it is on average at most that of the pixels, and the closer the
    better q fits. Trained with the rest, by the same loss.

    Args:
        flow: a module called as ``flow(noise, image)``, which returns h and its log-determinant [B]: invertible in the
            noise for each image. Both tensors have the shape of x; image is x / 127.5 - 1. For example a
            `ConditionalFlow`.

    Example:
        >>> net = nn.Conv2d(3, 2, 3, padding=1)
        >>> from genfast.flows import Coupling
        >>> dequantize = VariationalDequantize(ConditionalFlow([Coupling(net, split="checkerboard")]))
        >>> x = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
        >>> v, logdet = dequantize(x, seed=0)
        >>> v.shape, logdet.shape, torch.equal(dequantize.inverse(v), x)
        (torch.Size([5, 1, 8, 8]), torch.Size([5]), True)
    """

    stochastic = True

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        if not callable(flow):
            raise TypeError(f"flow: expected a module called as flow(noise, image), got {type(flow).__name__}")
        self.flow = flow

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0) -> tuple[Tensor, Tensor]:
        """Pixels to floats; arguments, results and errors as for `Dequantize.forward`."""
        pixels, dtype = _pixels(x)
        u, surprise = self.noise(x, seed, row_offset)
        return (pixels + u) / 256, _constant(x, dtype) + surprise

    def inverse(self, y: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0) -> Tensor:
        """As `Dequantize.inverse`."""
        return Dequantize.inverse(self, y)

    def noise(self, x: Tensor, seed: int | Tensor | None, row_offset: int) -> tuple[Tensor, Tensor]:
        """u from q(u | x), of x's shape, and -log q(u | x) in nats [B]."""
        pixels, dtype = _pixels(x)
        start = normal(as_seed(seed, x.device), *_rows(x), Stream.DEQUANTIZE, row_offset).to(dtype)
        h, logdet = self.flow(start.reshape(x.shape), pixels / 127.5 - 1)
        if h.shape != x.shape or logdet.shape != x.shape[:1]:
            wanted, came = [list(x.shape), list(x.shape[:1])], [list(h.shape), list(logdet.shape)]
            raise ValueError(f"flow: expected it to return tensors of shapes {wanted}, got {came}")
        h = h.to(dtype)
        # log of dh/dnoise and of du/dh, less the density of the noise.
        terms = F.logsigmoid(h) + F.logsigmoid(-h) + 0.5 * (start * start).reshape(x.shape)
        surprise = terms.flatten(1).sum(1) + 0.5 * _LOG_2PI * start.shape[1] + logdet
        return torch.sigmoid(h).clamp(_LEAST, 1 - _LEAST), surprise

    def folded(self, following: Transform) -> DequantizeLogit | None:
        """With a `Logit` behind it, one op."""
        return DequantizeLogit(self, following) if isinstance(following, Logit) else None


class ConditionalFlow(nn.Module):
    """A flow of couplings whose networks also see features of an image, for `VariationalDequantize`.

    Args:
        transforms: of `genfast.flows`, from the noise on, which together keep its shape. The network of a coupling gets
            its half of the noise and, along dimension 1, the features behind it: all of them for a split of channels or
            a mask, those of both halves (twice as many) for a checkerboard.
        context: the image, scaled to [-1, 1], to features of the same height and width; None: the image itself.

    Raises:
        TypeError: a transform is none, or draws noise.

    Example:
        >>> from genfast.flows import Coupling
        >>> flow = ConditionalFlow([Coupling(nn.Linear(1 + 2, 2)), Coupling(nn.Linear(1 + 2, 2), swap=True)])
        >>> h, logdet = flow(torch.randn(5, 2), torch.rand(5, 2))
        >>> h.shape, logdet.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(self, transforms: Iterable[Transform], context: nn.Module | None = None) -> None:
        super().__init__()
        transforms = list(transforms)
        for transform in transforms:
            if not isinstance(transform, Transform) or transform.stochastic:
                raise TypeError(
                    f"transforms: expected genfast.flows.Transform without noise, got {type(transform).__name__}"
                )
        self.transforms = nn.ModuleList(transforms)
        self.context = context

    def forward(self, noise: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """(noise [B, ...], image [B, ...]) to (h [B, ...], log-determinant [B])."""
        features = image if self.context is None else self.context(image)
        state: Tensor | Halves = noise
        total = noise.new_zeros(noise.shape[0])
        for transform in self.transforms:
            if isinstance(transform, _Coupling):
                state, logdet = _coupled(transform, state, features)
            else:
                if isinstance(state, Halves) and not transform.accepts(state.split):
                    state = join(state)
                state, logdet = transform(state)
            total = total + logdet
        return (join(state) if isinstance(state, Halves) else state), total


def _coupled(coupling: _Coupling, state: Tensor | Halves, features: Tensor) -> tuple[Halves, Tensor]:
    if isinstance(state, Halves) and not coupling.accepts(state.split):
        state = join(state)
    halves = state if isinstance(state, Halves) else divide(state, coupling.split)
    condition, x = coupling.parts(halves)
    seen = divide(features, halves.split)[:2] if halves.split == "checkerboard" else (features,)
    y, logdet = coupling.transform(x, coupling.net(torch.cat((condition, *seen), 1)), False)
    return coupling.put(halves, y), logdet


class Logit(Transform):
    """v in (0, 1) to y = logit(alpha + (1 - 2 alpha) v) (Dinh, Sohl-Dickstein and Bengio, "Density estimation using
    Real NVP", ICLR 2017, section 4.1).

    Args:
        alpha: from 0 to 0.45; how far the logit stays from its infinite ends.

    Raises:
        ValueError: alpha is out of its range.

    Example:
        >>> y, logdet = Logit(0.0)(torch.tensor([[0.5, 0.75]]))
        >>> y, logdet
        (tensor([[0.0000, 1.0986]]), tensor([3.0603]))
    """

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        self.alpha = check_alpha(alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """v [B, ...] to y of its shape, and the log-determinant [B]; beyond [0, 1] it may be NaN."""
        v = x if x.dtype == torch.float64 else x.float()
        slope = 1 - 2 * self.alpha
        # 1 - w from its own side: it is small where w is all but 1.
        small, large = torch.log(self.alpha + slope * v), torch.log(self.alpha + slope * (1 - v))
        return small - large, (math.log(slope) - small - large).flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        """The v of which ``forward`` made y."""
        y = y if y.dtype == torch.float64 else y.float()
        return (torch.sigmoid(y) - self.alpha) / (1 - 2 * self.alpha)


class DequantizeLogit:
    """A `Dequantize` or `VariationalDequantize` and the `Logit` behind it as one op."""

    pairs = False
    reversible = False
    stochastic = True

    def __init__(self, dequantize: Dequantize | VariationalDequantize, logit: Logit) -> None:
        self.dequantize, self.logit = dequantize, logit

    def accepts(self, split: str | Mask) -> bool:
        return False

    def parameters(self) -> list[nn.Parameter]:
        return list(self.dequantize.parameters())

    def __call__(self, x: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0) -> tuple[Tensor, Tensor]:
        u, surprise = self.dequantize.noise(x, seed, row_offset)
        noise: dict[str, Any] = {"seed": seed, "row_offset": row_offset} if u is None else {"u": u}
        y, logdet = dequantize_logit(_as_uint8(x), alpha=self.logit.alpha, **noise)
        return y, logdet if surprise is None else logdet + surprise

    def inverse(self, y: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0) -> Tensor:
        return dequantize_logit(y, alpha=self.logit.alpha, inverse=True)[0]


def _as_uint8(x: Tensor) -> Tensor:
    """uint8 pixels, or floats in [0, 1] rounded to the nearest k / 255."""
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise TypeError(f"x: expected uint8 pixels, or floats in [0, 1], got {x.dtype}")
    if x.device.type == "cpu" and x.numel() and is_plain(x):
        low, high = x.min().item(), x.max().item()
        if not 0 <= low <= high <= 1:
            raise ValueError(f"x: expected uint8 pixels, or floats in [0, 1], got floats from {low:.4g} to {high:.4g}")
    return (255 * x.detach()).round().clamp(0, 255).to(torch.uint8)


def _pixels(x: Tensor) -> tuple[Tensor, torch.dtype]:
    """Pixels 0 to 255 as floats, and their dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return _as_uint8(x).to(dtype), dtype


def _rows(x: Tensor) -> tuple[int, int]:
    return x.shape[0], math.prod(x.shape[1:])


def _constant(x: Tensor, dtype: torch.dtype) -> Tensor:
    """-log 256 for each pixel: [B]."""
    return torch.full(x.shape[:1], -_LOG_256 * math.prod(x.shape[1:]), dtype=dtype, device=x.device)
