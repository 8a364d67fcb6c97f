"""Couplings: one half of the batch decides how the other is transformed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genfast.flows._transform import Halves, Mask, Transform, as_split, checkered, divide, join, same_split
from genfast.functional import _checks, affine_coupling, mixture_logistic_coupling
from genfast.functional.affine_coupling import LAYOUTS, ORDERS
from genfast.functional.mixture_logistic_coupling import check_numbers
from genfast.reference._math import SCALE_MAPS
from genfast.reference.mixture_logistic_coupling import SCALE_MAPS as MIXTURE_SCALE_MAPS

__all__ = ["Coupling", "MixtureCoupling"]

_LEARNED_FACTOR = 2.0


class _Coupling(Transform):
    """What couplings share: the halves, the network, and which half is which."""

    pairs = True
    # Whether ``memory="reversible"`` keeps the transformed half, as the inverse may lose its digits.
    keeps_half = False

    def __init__(self, net: nn.Module, split: str | Mask | Tensor | Sequence[bool], swap: bool) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"net: expected a module, got {type(net).__name__}")
        self.net = net
        self.split = as_split(split)
        self.swap = swap

    def accepts(self, split: str | Mask) -> bool:
        return same_split(split, self.split)

    def forward(self, x: Tensor | Halves) -> tuple[Tensor | Halves, Tensor]:
        """x [B, ...], or its halves, to what has their shapes, and the log-determinant [B]."""
        return self._run(x, False)

    def inverse(self, y: Tensor | Halves) -> Tensor | Halves:
        """The x of which ``forward`` made y: a tensor for a tensor, halves for halves."""
        return self._run(y, True)[0]

    def start(self, x: Tensor, inverse: bool = False) -> tuple[Halves, Tensor]:
        """`forward` (or the inverse and its log-determinant) of a whole batch as halves."""
        return self._halves(divide(x, self.split), inverse)

    def parts(self, halves: Halves) -> tuple[Tensor, Tensor]:
        """(the half that conditions, the half that is transformed)."""
        return (halves.b, halves.a) if self.swap else (halves.a, halves.b)

    def put(self, halves: Halves, transformed: Tensor) -> Halves:
        """The halves with the transformed one replaced."""
        return halves._replace(a=transformed) if self.swap else halves._replace(b=transformed)

    def _run(self, x: Tensor | Halves, inverse: bool) -> tuple[Tensor | Halves, Tensor]:
        if not isinstance(x, Halves):
            halves, logdet = self.start(x, inverse)
            return join(halves), logdet
        if not self.accepts(x.split):
            raise ValueError(f"x: expected halves of the split {self.split!r}, got {x.split!r}")
        return self._halves(x, inverse)

    def _halves(self, halves: Halves, inverse: bool) -> tuple[Halves, Tensor]:
        condition, x = self.parts(halves)
        y, logdet = self.transform(x, self.net(condition), inverse)
        return self.put(halves, y), logdet

    def transform(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """The half x, given what the network said of the other."""
        raise NotImplementedError


class Coupling(_Coupling):
    """Affine coupling (Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP", ICLR 2017, equation 7).

    The network reads one half and returns a log-scale and a shift for every element of the other.

    Args:
        net: half [B, C', ...] to params [B, 2 C, ...], with C the channels of the other half.
        split: ``"channel"``, ``"checkerboard"`` or a boolean mask over dimension 1; see `Halves`.
        swap: False: half a conditions b. True: b conditions a.
        scale_map, min_scale, layout, order, shift_inside, reciprocal: as in `genfast.functional.affine_coupling`.
        factor: of the scale map; ``"learned"``: one for each channel, a parameter (``scale_map="tanh"`` only).
        channels: of the transformed half, for a learned factor.

    Raises:
        TypeError, ValueError: an argument has a value that it cannot have; x does not split; params do not fit.

    Example:
        >>> coupling = Coupling(nn.Linear(2, 4))
        >>> x = torch.randn(3, 4)
        >>> y, logdet = coupling(x)
        >>> logdet.shape, torch.equal(y[:, :2], x[:, :2]), torch.allclose(coupling.inverse(y), x, atol=1e-5)
        (torch.Size([3]), True, True)
    """

    reversible = True

    def __init__(
        self,
        net: nn.Module,
        split: str | Mask | Tensor | Sequence[bool] = "channel",
        swap: bool = False,
        *,
        scale_map: str = "tanh",
        factor: float | str = 2.0,
        min_scale: float = 0.0,
        layout: str = "blocked",
        order: str = "scale_first",
        shift_inside: bool = False,
        reciprocal: bool = False,
        channels: int | None = None,
    ) -> None:
        super().__init__(net, split, swap)
        _checks.choice("scale_map", scale_map, SCALE_MAPS)
        _checks.choice("layout", layout, LAYOUTS)
        _checks.choice("order", order, ORDERS)
        if factor == "learned":
            if scale_map != "tanh":
                raise ValueError(f"factor: expected a number with scale_map={scale_map!r}, got 'learned'")
            if type(channels) is not int or channels < 1:
                raise ValueError(f"channels: expected a positive int for a learned factor, got {channels!r}")
            self.factor = nn.Parameter(torch.full((channels,), _LEARNED_FACTOR))
        elif isinstance(factor, (int, float)) and not isinstance(factor, bool) and 0 < factor < math.inf:
            self.factor = float(factor)
        else:
            raise ValueError(f"factor: expected a positive number or 'learned', got {factor!r}")
        if isinstance(min_scale, bool) or not isinstance(min_scale, (int, float)):
            raise TypeError(f"min_scale: expected a number, got {type(min_scale).__name__}")
        min_scale = _checks.non_negative("min_scale", min_scale)
        if min_scale and scale_map != "sigmoid":
            raise ValueError(f"min_scale: expected 0 for scale_map {scale_map!r}, got {min_scale}")
        self.options = {
            "scale_map": scale_map, "min_scale": min_scale, "layout": layout, "order": order,
            "shift_inside": bool(shift_inside), "reciprocal": bool(reciprocal),
        }  # fmt: skip

    def extra_repr(self) -> str:
        return f"split={self.split!r}, swap={self.swap}, scale_map={self.options['scale_map']!r}"

    def start(self, x: Tensor, inverse: bool = False) -> tuple[Halves, Tensor]:
        if self.split != "checkerboard" or not self.fused:
            return super().start(x, inverse)
        # The op reads its half out of the whole.
        parity = 0 if self.swap else 1
        condition = checkered(x, 1 - parity)
        y, logdet = affine_coupling(
            x, self.net(condition), factor=self.factor, checkerboard=parity, inverse=inverse, **self.options
        )
        return Halves(y, condition, self.split) if self.swap else Halves(condition, y, self.split), logdet

    def transform(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        run = affine_coupling if self.fused else plain_affine
        return run(x, params, factor=self.factor, inverse=inverse, **self.options)


class MixtureCoupling(_Coupling):
    """Coupling through the CDF of a mixture of logistics, then affine (Ho et al., "Flow++", ICML 2019, section 3.2).

    Its inverse is found by bisection and Newton's method, to 1e-6.

    Args:
        net: half [B, C', ...] to params [B, (2 + 3 K) C, ...]: the log-scale, the shift, and K each of logits, means
            and log-scales of the mixture; see `genfast.functional.mixture_logistic_coupling`.
        num_components: K, at least 1.
        split, swap: as in `Coupling`.
        scale_map: ``"tanh"`` or ``"exp"``.
        factor: of the scale map.
        min_log_scale: the components' log-scales are at least this.

    Raises:
        TypeError, ValueError: as in `Coupling`.

    Example:
        >>> coupling = MixtureCoupling(nn.Linear(2, 2 * (2 + 3 * 8)), num_components=8)
        >>> x = torch.randn(3, 4)
        >>> y, logdet = coupling(x)
        >>> logdet.shape, torch.allclose(coupling.inverse(y), x, atol=1e-4)
        (torch.Size([3]), True)
    """

    reversible = True
    # Where the distribution function is flat, no inverse finds the place again.
    keeps_half = True

    def __init__(
        self,
        net: nn.Module,
        num_components: int,
        split: str | Mask | Tensor | Sequence[bool] = "channel",
        swap: bool = False,
        *,
        scale_map: str = "tanh",
        factor: float = 2.0,
        min_log_scale: float = -7.0,
    ) -> None:
        super().__init__(net, split, swap)
        if type(num_components) is not int or num_components < 1:
            raise ValueError(f"num_components: expected an int of at least 1, got {num_components!r}")
        _checks.choice("scale_map", scale_map, MIXTURE_SCALE_MAPS)
        factor, min_log_scale = check_numbers(factor, min_log_scale)
        self.options = {
            "num_components": num_components, "scale_map": scale_map, "factor": factor, "min_log_scale": min_log_scale,
        }  # fmt: skip

    def extra_repr(self) -> str:
        return f"split={self.split!r}, swap={self.swap}, num_components={self.options['num_components']}"

    def transform(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        # The plain chain has no inverse: its iteration would wait for the host at every step.
        run = mixture_logistic_coupling if self.fused or inverse else plain_mixture
        return run(x, params, inverse=inverse, **self.options)


def plain_affine(
    x: Tensor,
    params: Tensor,
    *,
    scale_map: str = "tanh",
    factor: float | Tensor = 2.0,
    min_scale: float = 0.0,
    layout: str = "blocked",
    order: str = "scale_first",
    shift_inside: bool = False,
    reciprocal: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`genfast.functional.affine_coupling` of a half, as PyTorch scripts write it."""
    if layout == "blocked":
        first, second = params.to(x.dtype).chunk(2, 1)
    else:
        first, second = params.to(x.dtype).unflatten(1, (-1, 2)).unbind(2)
    s, t = (first, second) if order == "scale_first" else (second, first)
    log_scale = _plain_log_scale(s, scale_map, factor, min_scale)
    log_scale = -log_scale if reciprocal else log_scale
    if inverse and shift_inside:
        y = x * torch.exp(-log_scale) - t
    elif inverse:
        y = (x - t) * torch.exp(-log_scale)
    elif shift_inside:
        y = (x + t) * torch.exp(log_scale)
    else:
        y = x * torch.exp(log_scale) + t
    logdet = log_scale.flatten(1).sum(1)
    return y, -logdet if inverse else logdet


def _plain_log_scale(s: Tensor, scale_map: str, factor: float | Tensor, min_scale: float) -> Tensor:
    if isinstance(factor, Tensor) and factor.dim() == 1:
        factor = factor.view(-1, *[1] * (s.dim() - 2))
    if scale_map == "tanh":
        return factor * torch.tanh(s)
    if scale_map == "atan":
        return factor * 0.636 * torch.atan(s / factor)
    if scale_map == "sigmoid":
        return torch.log(torch.sigmoid(s + 2) + min_scale)
    return s


def plain_mixture(
    x: Tensor,
    params: Tensor,
    *,
    num_components: int,
    scale_map: str = "tanh",
    factor: float = 2.0,
    min_log_scale: float = -7.0,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`genfast.functional.mixture_logistic_coupling`, forward alone, as PyTorch scripts write it."""
    rows = params.to(x.dtype).unflatten(1, (2 + 3 * num_components, -1))
    s, t, (logits, means, log_scales) = rows[:, 0], rows[:, 1], rows[:, 2:].unflatten(1, (3, num_components)).unbind(1)
    log_scales = log_scales.clamp(min=min_log_scale)
    log_pi = torch.log_softmax(logits, 1)
    z = (x.unsqueeze(1) - means) * torch.exp(-log_scales)
    log_cdf = torch.logsumexp(log_pi + nn.functional.logsigmoid(z), 1)
    log_tail = torch.logsumexp(log_pi + nn.functional.logsigmoid(-z), 1)
    log_density = log_pi + nn.functional.logsigmoid(z) + nn.functional.logsigmoid(-z) - log_scales
    log_scale = factor * torch.tanh(s) if scale_map == "tanh" else s
    y = (log_cdf - log_tail) * torch.exp(log_scale) + t
    logdet = torch.logsumexp(log_density, 1) - log_cdf - log_tail + log_scale
    return y, logdet.flatten(1).sum(1)
