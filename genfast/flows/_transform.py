"""What all transforms share: their base class, and the pair of halves that travels between couplings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Halves", "Mask", "Transform", "as_split", "divide", "join", "same_split", "shared_logdet", "wide"]

_SPLITS = ("channel", "checkerboard")


class Transform(nn.Module):
    """An invertible map of a batch, with the logarithm of its Jacobian's determinant.

    A subclass defines ``forward(x) -> (y, logdet)``, logdet being fp32 [B] in nats (fp64 for fp64), and ``inverse(y) ->
    x``. Dimension 0 is the batch. Class attributes say what more it can do:

    Attributes:
        stochastic: ``forward`` and ``inverse`` take ``seed=None, row_offset=0``.
        pairs: it takes and returns `Halves` as well as tensors: those for which `accepts` is true.
        reversible: its inverse is as exact as its forward, and neither draws noise, so that ``memory="reversible"`` may
            recompute its input from its output.
        fused: False runs a plain PyTorch chain instead of genfast's ops; `genfast.Flow` sets it.

    Example:
        >>> class Double(Transform):
        ...     def forward(self, x):
        ...         return 2 * x, x.new_full(x.shape[:1], x[:1].numel() * math.log(2))
        ...     def inverse(self, y):
        ...         return y / 2
        >>> import math
        >>> y, logdet = Double()(torch.ones(2, 3))
        >>> y[0], logdet
        (tensor([2., 2., 2.]), tensor([2.0794, 2.0794]))
    """

    stochastic: bool = False
    pairs: bool = False
    reversible: bool = False
    fused: bool = True

    def inverse(self, y: Any, **options: Any) -> Any:
        """The x of which ``forward`` made y."""
        raise NotImplementedError(f"{type(self).__name__} defines no inverse")

    def accepts(self, split: str | Mask) -> bool:
        """Whether ``forward`` and ``inverse`` take `Halves` of this split."""
        return self.pairs

    def folded(self, following: Transform) -> Any:
        """One step for this transform and the one behind it, where that saves work; else None."""
        return None


class Mask(nn.Module):
    """A split by a boolean mask over dimension 1, with what it takes to gather both sides and to put them back.

    Masks that are regular (runs, every second one) are read as views. Two masks are the same split where their
    values are; the module holds no parameters and writes nothing into a state_dict.

    Args:
        mask: bool [D]; False features are half a, True ones half b.

    Raises:
        TypeError, ValueError: mask is no boolean tensor of one dimension, or all of one value.

    Example:
        >>> mask = Mask(torch.tensor([False, True, True, False]))
        >>> mask.sizes, mask.bits
        ((2, 2), (False, True, True, False))
    """

    def __init__(self, mask: Tensor | Sequence[bool]) -> None:
        super().__init__()
        if not isinstance(mask, Tensor):
            mask = torch.tensor(mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"split: expected a boolean mask, got {mask.dtype}")
        if mask.dim() != 1:
            raise ValueError(f"split: expected a mask of shape [D], got {list(mask.shape)}")
        self.bits = tuple(mask.tolist())
        sides = [[i for i, bit in enumerate(self.bits) if bit is side] for side in (False, True)]
        if not all(sides):
            raise ValueError(f"split: expected a mask with both values, got {len(self.bits)} x {any(self.bits)}")
        self.sizes = (len(sides[0]), len(sides[1]))
        self.slices = tuple(_as_slice(side) for side in sides)
        # Where each feature lies in [a | b].
        order = torch.tensor(sides[0] + sides[1]).argsort()
        for name, value in (("index_a", sides[0]), ("index_b", sides[1]), ("order", order)):
            self.register_buffer(name, torch.as_tensor(value), persistent=False)

    def extra_repr(self) -> str:
        return f"{len(self.bits)} features, {self.sizes[1]} of them in half b"

    def divide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides along dimension 1: views where the mask is regular."""
        if x.dim() < 2 or x.shape[1] != len(self.bits):
            raise ValueError(f"x: expected shape [B, {len(self.bits)}, ...] for a mask of that length, got {_shape(x)}")
        a, b = self.slices
        return (
            x[:, a] if a is not None else x.index_select(1, self.index_a),
            x[:, b] if b is not None else x.index_select(1, self.index_b),
        )

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """What `divide` had."""
        return torch.cat((a, b), 1).index_select(1, self.order)


class Halves(NamedTuple):
    """A batch as the two halves of a split, which need not lie next to each other in memory.

    Attributes:
        a, b: the halves. ``"channel"``: [B, C / 2, ...] each; ``"checkerboard"``: [B, C, H, W / 2] each, row h holding
            its own columns in order, those with h + w even in a; a mask: its False positions of dimension 1 in a.
        split: ``"channel"``, ``"checkerboard"`` or a `Mask`.

    Example:
        >>> halves = divide(torch.arange(4.0).reshape(1, 4), "channel")
        >>> halves.a, halves.b
        (tensor([[0., 1.]]), tensor([[2., 3.]]))
        >>> join(halves)
        tensor([[0., 1., 2., 3.]])
    """

    a: Tensor
    b: Tensor
    split: str | Mask


def as_split(split: str | Mask | Tensor | Sequence[bool]) -> str | Mask:
    """Any accepted spelling of a split as ``"channel"``, ``"checkerboard"`` or a `Mask`.

    Raises:
        ValueError, TypeError: it is none.

    Example:
        >>> as_split("channel"), as_split([True, False]).sizes
        ('channel', (1, 1))
    """
    if isinstance(split, Mask) or (isinstance(split, str) and split in _SPLITS):
        return split
    if isinstance(split, (Tensor, list, tuple)):
        return Mask(split)
    raise ValueError(f"split: expected 'channel', 'checkerboard' or a boolean mask [D], got {split!r}")


def same_split(one: str | Mask, other: str | Mask) -> bool:
    """Whether halves of one split are halves of the other.

    Example:
        >>> same_split(Mask([True, False]), Mask([True, False])), same_split("channel", Mask([True, False]))
        (True, False)
    """
    if isinstance(one, Mask) and isinstance(other, Mask):
        return one.bits == other.bits
    return isinstance(one, str) and isinstance(other, str) and one == other


def divide(x: Tensor, split: str | Mask | Tensor) -> Halves:
    """The two halves of a batch.

    Args:
        x: [B, C, ...] with even C for ``"channel"``, [B, C, H, W] with even H and W for ``"checkerboard"``, [B, D, ...]
            for a mask of length D.
        split: as in `Halves`; a boolean tensor [D] also does.

    Returns:
        Halves: views of x for ``"channel"`` and for regular masks, else copies.

    Raises:
        ValueError: x cannot be split so.

    Example:
        >>> x = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> divide(x, "checkerboard").b[0, 0]
        tensor([[ 1.,  3.],
                [ 4.,  6.],
                [ 9., 11.],
                [12., 14.]])
    """
    split = as_split(split)
    if isinstance(split, Mask):
        return Halves(*split.divide(x), split)
    if split == "channel":
        if x.dim() < 2 or x.shape[1] % 2 or x.shape[1] == 0:
            raise ValueError(f"x: expected an even number of channels to split, got shape {_shape(x)}")
        half = x.shape[1] // 2
        return Halves(x[:, :half], x[:, half:], split)
    return Halves(checkered(x, 0), checkered(x, 1), split)


def join(halves: Halves) -> Tensor:
    """The batch of two halves, contiguous.

    Example:
        >>> x = torch.arange(32.0).reshape(1, 2, 4, 4)
        >>> torch.equal(join(divide(x, "checkerboard")), x)
        True
    """
    a, b, split = halves
    if isinstance(split, Mask):
        return split.join(a, b)
    if split == "channel":
        return torch.cat((a, b), 1)
    # Columns in pairs, [.., H, W / 2, 2]: even rows begin with a, odd ones with b.
    rows = a.unflatten(2, (-1, 2)), b.unflatten(2, (-1, 2))
    even = torch.stack((rows[0][:, :, :, 0], rows[1][:, :, :, 0]), -1)
    odd = torch.stack((rows[1][:, :, :, 1], rows[0][:, :, :, 1]), -1)
    return torch.stack((even, odd), 3).reshape(*a.shape[:3], 2 * a.shape[3])


def checkered(x: Tensor, parity: int) -> Tensor:
    """The elements of images [B, C, H, W] at which (h + w) % 2 is the parity: [B, C, H, W / 2], a copy."""
    if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"x: expected [B, C, H, W] with even H and W for a checkerboard, got shape {_shape(x)}")
    squares = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    # [B, C, H / 2, W / 2] of the even rows, and of the odd ones.
    pair = squares[:, :, :, 0, :, parity], squares[:, :, :, 1, :, 1 - parity]
    return torch.stack(pair, 3).flatten(2, 3)


def shared_logdet(value: Tensor, x: Tensor | Halves) -> Tensor:
    """A log-determinant that all samples of x have in common as `Transform` returns it: fp32 [B], fp64 for fp64."""
    first = x.a if isinstance(x, Halves) else x
    return value.to(torch.float64 if first.dtype == torch.float64 else torch.float32).expand(first.shape[0])


def wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x if x.dtype == torch.float64 else x.float()


def _as_slice(indices: list[int]) -> slice | None:
    """The slice that takes these ascending indices, if there is one."""
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    regular = indices == list(range(indices[0], indices[-1] + 1, step))
    return slice(indices[0], indices[-1] + 1, step) if regular else None


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
