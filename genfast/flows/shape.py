"""Transforms that move elements: squeezing, permuting, and factoring half of them out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from genfast.flows._transform import Halves, Mask, Transform, divide, join
from genfast.flows.coupling import Coupling

__all__ = ["Permute", "Split", "Squeeze"]


class Squeeze(Transform):
    """Squares of 2 x 2 pixels become channels: [B, C, H, W] to [B, 4 C, H / 2, W / 2], in the order of
    `torch.nn.PixelUnshuffle`.

    Raises:
        ValueError: H or W is odd.

    Example:
        >>> y, logdet = Squeeze()(torch.arange(4.0).reshape(1, 1, 2, 2))
        >>> y.shape, logdet
        (torch.Size([1, 4, 1, 1]), tensor([0.]))
    """

    reversible = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images to smaller ones with more channels; the log-determinant is 0."""
        if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"x: expected [B, C, H, W] with even H and W to squeeze, got shape {list(x.shape)}")
        batch, channels, height, width = x.shape
        squares = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        return squares.reshape(batch, 4 * channels, height // 2, width // 2), _nothing(x)

    def inverse(self, y: Tensor) -> Tensor:
        """The x of which ``forward`` made y."""
        if y.dim() != 4 or y.shape[1] % 4:
            raise ValueError(f"y: expected [B, 4 C, H, W], got shape {list(y.shape)}")
        batch, channels, height, width = y.shape
        squares = y.reshape(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        return squares.reshape(batch, channels // 4, 2 * height, 2 * width)


class Permute(Transform):
    """The channels in another order.

    Args:
        order: the old channel at each new place; ``"reverse"``; or ``"swap"``, which exchanges the two halves, and
            moves nothing where they travel apart.

    Raises:
        ValueError: order is no permutation, or does not fit x.

    Example:
        >>> Permute([2, 0, 1])(torch.tensor([[10.0, 11.0, 12.0]]))[0]
        tensor([[12., 10., 11.]])
    """

    pairs = True
    reversible = True

    def __init__(self, order: str | Sequence[int] | Tensor = "reverse") -> None:
        super().__init__()
        if isinstance(order, str):
            if order not in ("reverse", "swap"):
                raise ValueError(f"order: expected a permutation, 'reverse' or 'swap', got {order!r}")
            self.order = order
            return
        self.order = _permutation(order)
        index = torch.tensor(self.order)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("inverse_index", index.argsort(), persistent=False)

    def extra_repr(self) -> str:
        return repr(self.order)

    def accepts(self, split: str | Mask) -> bool:
        return self.order == "swap" and split == "channel"

    def forward(self, x: Tensor | Halves) -> tuple[Tensor | Halves, Tensor]:
        """x [B, C, ...] with its channels permuted; the log-determinant is 0."""
        return self._permuted(x, "index"), _nothing(x)

    def inverse(self, y: Tensor | Halves) -> Tensor | Halves:
        """The x of which ``forward`` made y."""
        return self._permuted(y, "inverse_index")

    def _permuted(self, x: Tensor | Halves, index: str) -> Tensor | Halves:
        if isinstance(x, Halves):
            if not self.accepts(x.split):
                return divide(self._permuted(join(x), index), x.split)
            return x._replace(a=x.b, b=x.a)
        if self.order == "swap":
            a, b, _ = divide(x, "channel")
            return torch.cat((b, a), 1)
        if self.order == "reverse":
            return x.flip(1)
        if x.dim() < 2 or x.shape[1] != len(self.order):
            raise ValueError(f"x: expected {len(self.order)} channels, as many as order has, got shape {list(x.shape)}")
        return x.index_select(1, getattr(self, index))


def _permutation(order: Sequence[int] | Tensor) -> tuple[int, ...]:
    places = order.tolist() if isinstance(order, Tensor) else order
    places = list(places) if isinstance(places, Iterable) else [places]
    ints = all(isinstance(place, Integral) and not isinstance(place, bool) for place in places)
    if not places or not ints or sorted(places) != list(range(len(places))):
        raise ValueError(f"order: expected each of 0, 1, ..., C - 1 once, got {places}")
    return tuple(int(place) for place in places)


class Split(Transform):
    """Half of the channels leaves the flow (Dinh et al., "Real NVP", section 3.6): a flow of several scales.

    In a `genfast.Flow` half b becomes a part of the latent code and the rest of the flow goes on with half a. With a
    network the prior of b is a Gaussian that depends on a (Kingma and Dhariwal, "Glow", 2018): b is mapped to
    (b - mean) / std, an affine coupling the other way round, so that the latent code stays N(0, I).

    Args:
        net: half a [B, C / 2, ...] to [log-std | mean] [B, C, ...]; None: the prior is N(0, I).
        options: of `Coupling`, such as ``scale_map``, for the log-std; not ``split`` and ``swap``.

    Raises:
        TypeError, ValueError: an odd number of channels; options without a network; as in `Coupling`.

    Example:
        >>> halves, logdet = Split()(torch.randn(2, 4, 8, 8))
        >>> halves.a.shape, halves.b.shape
        (torch.Size([2, 2, 8, 8]), torch.Size([2, 2, 8, 8]))
    """

    pairs = True

    def __init__(self, net: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        for name in ("split", "swap"):
            if name in options:
                raise TypeError(f"{name}: expected none, since half b leaves given half a, got {options[name]!r}")
        if net is None and options:
            raise ValueError(f"net: expected a module for the options {sorted(options)}, got None")
        self.prior = None if net is None else Coupling(net, "channel", **options)

    def accepts(self, split: str | Mask) -> bool:
        return split == "channel"

    def forward(self, x: Tensor | Halves) -> tuple[Halves, Tensor]:
        """x [B, C, ...], or its halves, to halves (what goes on, what becomes latent), and the log-determinant [B]."""
        halves = self._divided(x)
        if self.prior is None:
            return halves, _nothing(halves)
        latent, logdet = self.prior.transform(halves.b, self.prior.net(halves.a), True)
        return halves._replace(b=latent), logdet

    def inverse(self, y: Tensor | Halves) -> Halves:
        """The halves of which ``forward`` made y; `join` puts them together."""
        halves = self._divided(y)
        if self.prior is None:
            return halves
        return halves._replace(b=self.prior.transform(halves.b, self.prior.net(halves.a), False)[0])

    def _divided(self, x: Tensor | Halves) -> Halves:
        if not isinstance(x, Halves):
            return divide(x, "channel")
        if not self.accepts(x.split):
            raise ValueError(f"x: expected halves of the split 'channel', got {x.split!r}")
        return x


def _nothing(x: Tensor | Halves) -> Tensor:
    """The log-determinant of what only moves elements."""
    first = x.a if isinstance(x, Halves) else x
    return first.new_zeros(first.shape[0], dtype=torch.float64 if first.dtype == torch.float64 else torch.float32)
