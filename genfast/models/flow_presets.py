"""Ready normalizing flows of images and of vectors: RealNVP, Glow and Flow++."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from genfast.flows import (
    ActNorm,
    ConditionalFlow,
    Coupling,
    Dequantize,
    InvertibleConv1x1,
    Logit,
    MixtureCoupling,
    Split,
    Squeeze,
    Transform,
    VariationalDequantize,
)
from genfast.functional import _checks
from genfast.models.base import _check_sizes, check_choice, evaluating, on_the_arc
from genfast.models.flow import Flow
from genfast.models.flow_networks import MLP, FoldRows, GatedAttentionNet, GlowNet, ResidualNet, _zeros

__all__ = ["FlowPlusPlus", "FlowPreset", "Glow", "RealNVP"]

Preset = Literal["tiny", "small", "base"]
Memory = Literal["ordinary", "checkpoint", "reversible"]
Dequantization = Literal["uniform", "variational", "none"]

_IMAGE_SHAPE = (1, 28, 28)
_ALPHA = 0.05
# At most so many levels unless a preset says how many: 28 -> 14 -> 7, and 32 -> 16 -> 8.
_LEVELS = 2
# These come first in flows of images.
_OF_PIXELS = (Dequantize, VariationalDequantize, Logit)
# Of vectors each preset has these sizes.
_OF_VECTORS = {
    "tiny": {"hidden": 64, "blocks": 2, "couplings": 8},
    "small": {"hidden": 128, "blocks": 2, "couplings": 12},
    "base": {"hidden": 256, "blocks": 3, "couplings": 16},
}
# Of learned dequantization.
_NOISE_COUPLINGS = 2
# Images on which an evaluation tries the inverse, of each batch.
_INVERTED = 16


class FlowPreset(Flow):
    """What the ready flows share: images of ``image_shape``, or vectors where that is None; see `RealNVP`."""

    def __init__(
        self,
        transforms: Sequence[Transform],
        image_shape: tuple[int, ...] | None,
        dim: int | None,
        memory: Memory,
        fused: bool,
    ) -> None:
        data_shape = (dim,) if image_shape is None else image_shape
        super().__init__(transforms, memory=memory, fused=fused, data_shape=data_shape)
        self.image_shape, self.dim = image_shape, dim

    def interpolate(
        self, x0: Tensor, x1: Tensor, steps: int = 10, *, seed: int | Tensor | None = None, row_offset: int = 0
    ) -> Tensor:
        """The way between images, or vectors, in latent space: along the arc between their codes, ends included.

        Codes of N(0, I) lie near a sphere; the straight line between two of them leaves it.

        Args:
            x0, x1: batches of one shape, as for `Flow.forward`.
            steps: points of each way, at least 2.
            seed, row_offset: of the dequantization, as for `Flow.forward`; x1 has that of x0.

        Returns:
            [B, steps, C, H, W] floats in [0, 1], or [B, steps, D].

        Raises:
            TypeError, ValueError: another shape, or fewer than two steps.

        Example:
            >>> flow = RealNVP(image_shape=(1, 8, 8), preset="tiny")
            >>> flow.interpolate(torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8), steps=5).shape
            torch.Size([3, 5, 1, 8, 8])
        """
        if not isinstance(steps, int) or steps < 2:
            raise ValueError(f"steps: expected an int of at least 2, got {steps!r}")
        _checks.same_shape("x1", x1, "x0", x0)
        with evaluating(self):
            z0, z1 = (self(x, seed=seed, row_offset=row_offset)[0] for x in (x0, x1))
            codes = torch.stack([on_the_arc(z0, z1, step / (steps - 1)) for step in range(steps)], 1)
            x = self.inverse(codes.flatten(0, 1)).unflatten(0, (len(z0), steps))
        return x.float() / 255 if x.dtype == torch.uint8 else x

    @torch.no_grad()
    def inverse_error(self, x: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0) -> Tensor:
        """The largest |inverse(forward(y)) - y|, of vectors y = x, of images behind dequantization and logit: a scalar.

        Rounding to grey levels hides what is below half a level; this does not.

        Example:
            >>> bool(RealNVP(dim=2).inverse_error(torch.randn(8, 2)) < 1e-4)
            True
        """
        y, first = self._check_data(x), 0
        with evaluating(self):
            noise = self._noise(seed, x.device, row_offset)
            while first < len(self.transforms) and isinstance(self.transforms[first], _OF_PIXELS):
                transform = self.transforms[first]
                y, _ = transform(y, **(noise if transform.stochastic else {}))
                first += 1
            rest = Flow(self.transforms[first:], data_shape=tuple(y.shape[1:]), fused=self.fused)
            return (rest.inverse(rest(y)[0]) - y).abs().max()

    def evaluation(self, x: Tensor, *, seed: int | Tensor | None = None, row_offset: int = 0) -> dict[str, Tensor]:
        """The parts of `loss`, and ``inverse_error``, for `genfast.training.evaluate`.

        ``inverse_error`` is that of the batch's first 16 rows; over several batches it is averaged.

        Example:
            >>> sorted(RealNVP(dim=2).evaluation(torch.randn(8, 2)))
            ['bits_per_dim', 'inverse_error', 'loss']
        """
        parts = self.loss(x, seed=seed, row_offset=row_offset)
        return {**parts, "inverse_error": self.inverse_error(x[:_INVERTED], seed=seed, row_offset=row_offset)}


class RealNVP(FlowPreset):
    """Affine couplings (Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP", ICLR 2017).

    Of images, at each of two levels: couplings of a checkerboard's halves, a squeeze to four times the channels, and
    couplings of the channels' halves; then half of the channels are done, except at the last level. Vectors: couplings
    of the even and the odd features in turn. An `ActNorm` stands before every second coupling in place of the paper's
    batch normalization; scales are exp(2 tanh(s)).

    ========= ====== ====== ========= ======================
    preset    hidden blocks couplings parameters (1, 28, 28)
    ========= ====== ====== ========= ======================
    ``tiny``  32     1      3         155,268
    ``small`` 64     2      4         1,398,940
    ``base``  96     4      6         9,054,954
    ========= ====== ====== ========= ======================

    The table is of images; for vectors the presets are 64, 128 and 256 wide, with 2, 2 and 3 hidden layers and 8, 12
    and 16 couplings in all. Images go in as uint8, or as floats in [0, 1] that are rounded to k / 255; they come out as
    floats in [0, 1]. Pixels get noise below their grey level, and then go through a logit.

    Args:
        image_shape: (C, H, W), H and W even. None: (1, 28, 28), or vectors where `dim` is given.
        dim: size of vectors [B, dim], at least 2; without `image_shape`.
        preset: ``"tiny"``, ``"small"`` or ``"base"``: the values of the sizes that are None.
        hidden: channels within the networks; width of the layers for vectors.
        blocks: residual blocks of each network; layers for vectors.
        couplings: of each kind at each level; in all, for vectors.
        levels: how many squeezes; None: two, or as many as H and W allow. Images alone have it.
        dequantization: noise of the pixels: ``"uniform"``, or ``"variational"``: learned (Ho et al., "Flow++", ICML
            2019, section 3.1). None: uniform. ``"none"`` takes the middle of each grey level: densities at points,
            from which no likelihood of images follows, to see what the noise is for. Images alone have it.
        alpha: pixels are scaled to [alpha, 1 - alpha] before the logit; None: 0.05. Images alone have it.
        memory: ``"ordinary"``, ``"checkpoint"`` or ``"reversible"``; see `Flow`.
        fused: False runs the ordinary PyTorch chain instead of genfast's ops (the baseline of every comparison).

    Raises:
        ValueError: an argument is out of range, or does not fit the others.

    Example:
        >>> flow = RealNVP(image_shape=(1, 8, 8), preset="tiny")
        >>> x = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
        >>> sorted(flow.loss(x))
        ['bits_per_dim', 'loss']
        >>> flow.sample(3, seed=0).shape, RealNVP(dim=2).sample(3).shape
        (torch.Size([3, 1, 8, 8]), torch.Size([3, 2]))
    """

    _presets: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "tiny": {"hidden": 32, "blocks": 1, "couplings": 3},
        "small": {"hidden": 64, "blocks": 2, "couplings": 4},
        "base": {"hidden": 96, "blocks": 4, "couplings": 6},
    }

    def __init__(
        self,
        image_shape: Sequence[int] | None = None,
        dim: int | None = None,
        *,
        preset: Preset = "small",
        hidden: int | None = None,
        blocks: int | None = None,
        couplings: int | None = None,
        levels: int | None = None,
        dequantization: Dequantization | None = None,
        alpha: float | None = None,
        memory: Memory = "ordinary",
        fused: bool = True,
    ) -> None:
        shape = _data(image_shape, dim, dequantization=dequantization, alpha=alpha, levels=levels)
        sizes = _sizes(self._presets, preset, shape is None, hidden=hidden, blocks=blocks, couplings=couplings)
        hidden, blocks, couplings = sizes["hidden"], sizes["blocks"], sizes["couplings"]
        if shape is None:
            transforms = _of_vectors(dim, couplings, lambda a, b: MLP(a, 2 * b, hidden, blocks), Coupling)
            super().__init__(transforms, None, dim, memory, fused)
            return
        transforms = _pixels(shape, dequantization or "uniform", alpha, hidden)
        count = _levels(shape, levels)
        channels = shape[0]
        for level in range(count):
            # Both kinds of halves have 2 C channels: rows of a checkerboard are folded.
            def net(channels: int = channels) -> nn.Module:
                return ResidualNet(2 * channels, 4 * channels, hidden, blocks)

            for index in range(couplings):
                transforms += [ActNorm(channels)] * (index % 2 == 0)
                transforms += [Coupling(FoldRows(net()), "checkerboard", swap=index % 2 == 1)]
            transforms += [Squeeze()]
            for index in range(couplings):
                transforms += [ActNorm(4 * channels)] * (index % 2 == 0)
                transforms += [Coupling(net(), "channel", swap=index % 2 == 1)]
            if level < count - 1:
                transforms += [Split()]
            channels *= 2
        super().__init__(transforms, shape, None, memory, fused)


class Glow(FlowPreset):
    """Invertible convolutions (Kingma and Dhariwal, "Glow: generative flow with invertible 1x1 convolutions", 2018).

    Of images, at each level a squeeze and then `couplings` steps of an ActNorm, an invertible 1x1 convolution and an
    affine coupling of the channels' halves, with scales sigmoid(s + 2); then half of the channels are done, with a
    Gaussian whose mean and scale depend on the other half. Vectors: the same steps, with matrices.

    ========= ====== ========= ======================
    preset    hidden couplings parameters (1, 28, 28)
    ========= ====== ========= ======================
    ``tiny``  64     8         152,268
    ``small`` 128    16        867,660
    ``base``  512    32        19,503,692
    ========= ====== ========= ======================

    Args:
        image_shape, dim, preset, dequantization, alpha, memory, fused: as for `RealNVP`.
        hidden: channels within the networks; width of the layers for vectors.
        couplings: steps of each level; in all, for vectors.
        levels: how many squeezes; None: two, or as many as H and W allow. Images alone have it.
        conv: form of the convolutions: ``"lu"`` or ``"plain"``.

    Raises:
        ValueError: an argument is out of range, or does not fit the others.

    Example:
        >>> flow = Glow(image_shape=(3, 8, 8), preset="tiny")
        >>> flow.bits_per_dim(torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)).shape
        torch.Size([4])
    """

    _presets: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "tiny": {"hidden": 64, "couplings": 8},
        "small": {"hidden": 128, "couplings": 16},
        "base": {"hidden": 512, "couplings": 32},
    }

    def __init__(
        self,
        image_shape: Sequence[int] | None = None,
        dim: int | None = None,
        *,
        preset: Preset = "small",
        hidden: int | None = None,
        couplings: int | None = None,
        levels: int | None = None,
        conv: Literal["lu", "plain"] = "lu",
        dequantization: Dequantization | None = None,
        alpha: float | None = None,
        memory: Memory = "ordinary",
        fused: bool = True,
    ) -> None:
        shape = _data(image_shape, dim, dequantization=dequantization, alpha=alpha, levels=levels)
        sizes = _sizes(self._presets, preset, shape is None, hidden=hidden, couplings=couplings)
        hidden, couplings = sizes["hidden"], sizes["couplings"]
        if shape is None:
            options = {"scale_map": "sigmoid", "conv": conv}
            transforms = _of_vectors(dim, couplings, lambda a, b: MLP(a, 2 * b, hidden), Coupling, **options)
            super().__init__(transforms, None, dim, memory, fused)
            return
        transforms = _pixels(shape, dequantization or "uniform", alpha, hidden)
        count = _levels(shape, levels)
        channels = shape[0]
        for level in range(count):
            channels *= 4
            transforms += [Squeeze()]
            for _ in range(couplings):
                net = GlowNet(channels // 2, channels, hidden)
                coupling = Coupling(net, "channel", scale_map="sigmoid")
                transforms += [ActNorm(channels), InvertibleConv1x1(channels, form=conv), coupling]
            if level < count - 1:
                channels //= 2
                transforms += [Split(_zeros(nn.Conv2d(channels, 2 * channels, 3, padding=1)))]
        super().__init__(transforms, shape, None, memory, fused)


class FlowPlusPlus(FlowPreset):
    """Mixtures of logistics (Ho et al., "Flow++: improving flow-based generative models", ICML 2019).

    Couplings whose map is the CDF of a mixture of logistics, its logit, and an affine map, with gated convolutions and
    self-attention in the networks, and learned dequantization. Of images: couplings of a checkerboard's halves, a
    squeeze, couplings of the channels' halves, and of checkerboards again. Vectors: the even and the odd features in
    turn.

    ========= ====== ====== ========= ========== ======================
    preset    hidden blocks couplings components parameters (1, 28, 28)
    ========= ====== ====== ========= ========== ======================
    ``tiny``  32     1      2         4          275,796
    ``small`` 64     2      4         8          2,728,928
    ``base``  96     10     4         32         23,999,600
    ========= ====== ====== ========= ========== ======================

    Args:
        image_shape, dim, preset, alpha, memory, fused: as for `RealNVP`.
        hidden: channels within the networks, a multiple of 4; width of the layers for vectors.
        blocks: gated convolutions, each with an attention, of each network; layers for vectors.
        couplings: of each of the three kinds; in all, for vectors.
        components: of each mixture.
        dequantization: ``"uniform"``, ``"variational"`` or ``"none"``; None: variational. Images alone have it.

    Raises:
        ValueError: an argument is out of range, or does not fit the others.

    Example:
        >>> flow = FlowPlusPlus(image_shape=(1, 8, 8), preset="tiny")
        >>> flow.log_prob(torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)).shape
        torch.Size([4])
    """

    _presets: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "tiny": {"hidden": 32, "blocks": 1, "couplings": 2, "components": 4},
        "small": {"hidden": 64, "blocks": 2, "couplings": 4, "components": 8},
        "base": {"hidden": 96, "blocks": 10, "couplings": 4, "components": 32},
    }

    def __init__(
        self,
        image_shape: Sequence[int] | None = None,
        dim: int | None = None,
        *,
        preset: Preset = "small",
        hidden: int | None = None,
        blocks: int | None = None,
        couplings: int | None = None,
        components: int | None = None,
        dequantization: Dequantization | None = None,
        alpha: float | None = None,
        memory: Memory = "ordinary",
        fused: bool = True,
    ) -> None:
        shape = _data(image_shape, dim, dequantization=dequantization, alpha=alpha)
        given = {"hidden": hidden, "blocks": blocks, "couplings": couplings, "components": components}
        sizes = _sizes(self._presets, preset, shape is None, **given)
        hidden, blocks, components = sizes["hidden"], sizes["blocks"], sizes["components"]
        each = 2 + 3 * components
        if shape is None:

            def mlp(size_in: int, size_out: int) -> nn.Module:
                net = MLP(size_in, each * size_out, hidden, blocks)
                _spread_means(net.last, components)
                return net

            options = {"num_components": components}
            transforms = _of_vectors(dim, sizes["couplings"], mlp, MixtureCoupling, **options)
            super().__init__(transforms, None, dim, memory, fused)
            return
        channels, height, width = shape
        _levels(shape, 1)

        def net(size: tuple[int, int], half: int, folded: bool) -> nn.Module:
            """Of halves with as many elements at each of (H, W) places, rows folded or not."""
            net = GatedAttentionNet(half, each * half, hidden, blocks, size)
            _spread_means(net.last, components)
            return FoldRows(net) if folded else net

        def coupling(size: tuple[int, int], half: int, split: str, index: int) -> Transform:
            return MixtureCoupling(net(size, half, split == "checkerboard"), components, split, swap=index % 2 == 1)

        transforms = _pixels(shape, dequantization or "variational", alpha, hidden)
        half_size = (height // 2, width // 2)
        for index in range(sizes["couplings"]):
            transforms += [ActNorm(channels), coupling(half_size, 2 * channels, "checkerboard", index)]
        transforms += [Squeeze()]
        channels *= 4
        for index in range(sizes["couplings"]):
            transforms += [ActNorm(channels), InvertibleConv1x1(channels)]
            transforms += [coupling(half_size, channels // 2, "channel", index)]
        if height % 4 == 0 and width % 4 == 0:
            quarter = (height // 4, width // 4)
            for index in range(sizes["couplings"]):
                transforms += [ActNorm(channels), coupling(quarter, 2 * channels, "checkerboard", index)]
        super().__init__(transforms, shape, None, memory, fused)


def _sizes(presets: Mapping[str, Mapping[str, int]], preset: str, vectors: bool, **given: int | None) -> dict[str, int]:
    check_choice("preset", preset, tuple(presets))
    sizes = {**presets[preset], **(_OF_VECTORS[preset] if vectors else {})}
    sizes = {name: sizes[name] if value is None else value for name, value in given.items()}
    for name, value in sizes.items():
        _check_sizes(name, [value])
    return sizes


def _data(image_shape: Sequence[int] | None, dim: int | None, **of_images: Any) -> tuple[int, ...] | None:
    """The shape of the images; None for vectors, which take no arguments of images."""
    if dim is None:
        if of_images["dequantization"] is not None:
            check_choice("dequantization", of_images["dequantization"], get_args(Dequantization))
        image_shape = _IMAGE_SHAPE if image_shape is None else image_shape
        _check_sizes("image_shape", image_shape, count=3)
        return tuple(image_shape)
    if not isinstance(dim, int) or dim < 2:
        raise ValueError(f"dim: expected an int of at least 2, got {dim!r}")
    for name, value in {"image_shape": image_shape, **of_images}.items():
        if value is not None:
            raise ValueError(f"{name}: expected None for vectors, where dim is given, got {value!r}")
    return None


def _levels(shape: tuple[int, ...], levels: int | None) -> int:
    """How many squeezes there are."""
    _, height, width = shape
    possible = 0
    while height % 2 ** (possible + 1) == 0 and width % 2 ** (possible + 1) == 0:
        possible += 1
    if possible == 0:
        raise ValueError(f"image_shape: expected an even height and width, got {shape}")
    if levels is None:
        return min(_LEVELS, possible)
    if type(levels) is not int or not 1 <= levels <= possible:
        raise ValueError(f"levels: expected 1 to {possible} for images of {height} x {width}, got {levels!r}")
    return levels


def _pixels(shape: tuple[int, ...], dequantization: str, alpha: float | None, hidden: int) -> list[Transform]:
    """From pixels to where couplings work."""
    learned = dequantization == "variational"
    noise = VariationalDequantize(_noise_flow(shape[0], hidden)) if learned else Dequantize(dequantization == "none")
    return [noise, Logit(_ALPHA if alpha is None else alpha)]


def _noise_flow(channels: int, hidden: int) -> ConditionalFlow:
    """The noise of pixels given the image: behind the sigmoid of `VariationalDequantize` it starts as U(0, 1)."""
    features = max(1, hidden // 4)
    transforms: list[Transform] = [NormalToLogistic()]
    for index in range(_NOISE_COUPLINGS):
        net = ResidualNet(2 * (channels + 2 * features), 4 * channels, hidden, blocks=1)
        transforms += [Coupling(FoldRows(net), "checkerboard", swap=index % 2 == 1)]
    return ConditionalFlow(transforms, context=nn.Conv2d(channels, features, 3, padding=1))


class NormalToLogistic(Transform):
    """Each element of N(0, 1) to one of the logistic distribution, whose sigmoid is uniform.

    Example:
        >>> y, logdet = NormalToLogistic()(torch.tensor([[0.0, 1.0]]))
        >>> y, torch.allclose(NormalToLogistic().inverse(y), torch.tensor([[0.0, 1.0]]), atol=1e-6)
        (tensor([[0.0000, 1.6683]]), True)
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, ...] to y of its shape, and the log-determinant [B]."""
        low, high = torch.special.log_ndtr(x), torch.special.log_ndtr(-x)
        log_slope = -0.5 * (x * x + math.log(2 * math.pi)) - low - high
        return low - high, log_slope.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        """The x of which ``forward`` made y."""
        return torch.special.ndtri(torch.sigmoid(y))


def _of_vectors(
    dim: int, couplings: int, net: Callable[[int, int], nn.Module], coupling: type[Transform],
    conv: str | None = None, **options: Any,
) -> list[Transform]:  # fmt: skip
    mask = torch.arange(dim) % 2 == 1
    sizes = (int((~mask).sum()), int(mask.sum()))
    transforms: list[Transform] = []
    for index in range(couplings):
        swap = index % 2 == 1
        if conv is not None:
            transforms += [ActNorm(dim), InvertibleConv1x1(dim, form=conv)]
        elif not swap:
            transforms += [ActNorm(dim)]
        transforms += [coupling(net(*reversed(sizes) if swap else sizes), split=mask, swap=swap, **options)]
    return transforms


def _spread_means(last: nn.Linear | nn.Conv2d, components: int) -> None:
    """Means of the mixture that differ: equal components would stay equal for ever."""
    with torch.no_grad():
        means = last.bias.view(2 + 3 * components, -1)[2 + components : 2 + 2 * components]
        means.copy_(torch.linspace(-2, 2, components).unsqueeze(1).expand_as(means) if components > 1 else means)
