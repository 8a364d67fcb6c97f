"""Generative adversarial networks: a generator and a discriminator that take turns, and what shows how it goes."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, parametrize

from genfast import profiling
from genfast.functional import _checks
from genfast.models.base import _ISOLATED, Model, _check_sizes, check_choice, check_images, evaluating, on_the_arc, wide
from genfast.models.gan_networks import DCGANDiscriminator, DCGANGenerator, MLPDiscriminator, MLPGenerator
from genfast.random import Stream, as_seed, normal, uniform

__all__ = ["GAN"]

Loss = Literal["non_saturating", "minimax", "hinge", "lsgan", "wgan-gp"]
Turn = Literal["discriminator", "discriminator_r1", "generator"]

# Those whose discriminator says a probability.
_PROBABILISTIC = ("non_saturating", "minimax")
# Salts of the latents: samples, the discriminator's turn, the generator's turn.
_SAMPLES, _TO_JUDGE, _TO_LEARN = 0, 1, 2
# Of a batch: each with each. For what is covered always as many, since balls shrink as a set grows.
_COMPARED, _COVERED, _NEIGHBOUR = 256, 64, 3
# Of images that are all but the same the ratio says nothing.
_LARGEST_DIVERSITY = 10.0
# `diagnose`: images this much nearer to one another than real ones are alike, so few of the real ones having one near
# means that kinds of them are left out, and this sure is certain.
_ALIKE, _LEFT_OUT, _CERTAIN = 0.3, 0.6, 0.99
# Steps before which it says nothing.
_EARLY = 1000
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class GAN(Model):
    """Generative adversarial network (Goodfellow et al., "Generative adversarial nets", NeurIPS 2014).

    The networks work with images in [-1, 1], as those of the usual DCGAN scripts do, and the discriminator says logits.
    Outside of them images are floats in [0, 1] (not checked: that would wait for the device) or uint8 (meaning
    x / 255), of shape [B, C, H, W], [B, C * H * W], or [B, H, W] where C is 1. They come out as floats in [0, 1].

    D and G being the networks and p = sigmoid, the discriminator lowers its loss and the generator its own:

    ================== =========================================== ==============================
    ``loss``           of the discriminator                        of the generator
    ================== =========================================== ==============================
    ``non_saturating`` -log p(D(x)) - log(1 - p(D(G(z))))          -log p(D(G(z)))
    ``minimax``        the same                                    log(1 - p(D(G(z))))
    ``hinge``          max(0, 1 - D(x)) + max(0, 1 + D(G(z)))      -D(G(z))
    ``lsgan``          (D(x) - 1)^2 / 2 + D(G(z))^2 / 2            (D(G(z)) - 1)^2 / 2
    ``wgan-gp``        D(G(z)) - D(x) + penalty (|D'(y)| - 1)^2    -D(G(z))
    ================== =========================================== ==============================

    (Goodfellow et al.; Lim and Ye, "Geometric GAN", 2017; Mao et al., "Least squares GANs", ICCV 2017; Gulrajani et
    al., "Improved training of Wasserstein GANs", NeurIPS 2017, where y lies between x and G(z), one place for each
    image, and |D'| is the norm over all pixels of an image.) To any of them `r1` adds r1 / 2 |D'(x)|^2 (Mescheder,
    Geiger and Nowozin, "Which training methods for GANs do actually converge?", ICML 2018).

    Args:
        generator: own network, codes to images in [-1, 1] [B, C, H, W] or [B, C * H * W].
        discriminator: own network, such images to logits [B], [B, 1] or [B, 1, 1, 1].
        latent_dim: size of the code, z from N(0, I).
        latent_shape: of the codes that an own generator takes. None: (latent_dim, 1, 1) where its first layer is a
            convolution, else (latent_dim,).
        image_shape: (C, H, W).
        preset: networks that are not given: ``"dcgan"``, or ``"mlp"``.
        width: of the preset's layers; see `genfast.models.gan_networks`.
        loss: see above.
        r1: weight of that penalty; 0: none.
        r1_every: steps between two that have it; there it counts so many times as much.
        penalty: weight of the gradient penalty of ``wgan-gp``.
        n_critic: steps of the discriminator for one of the generator. None: 1, and 5 for ``wgan-gp``.
        spectral_norm: divide each weight of the discriminator by its largest singular value (Miyato et al., "Spectral
            normalization for generative adversarial networks", ICLR 2018).
        batch_norm: of the preset ``"dcgan"``'s discriminator. None: where there is neither a penalty, whose gradient is
            one of a single image, nor spectral_norm.

    Raises:
        ValueError: an argument has a value that it cannot have, or the networks do not go together.

    Example:
        >>> gan = GAN(width=8)
        >>> sorted(gan.loss(torch.rand(4, 1, 28, 28), turn="discriminator", seed=0))
        ['covered', 'd_fake', 'd_loss', 'd_real', 'diversity', 'loss']
        >>> gan.sample(2, seed=0).shape
        torch.Size([2, 1, 28, 28])
    """

    # What an average of the weights is made of.
    averaged = ("generator",)

    def __init__(
        self,
        generator: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        *,
        latent_dim: int = 100,
        latent_shape: Sequence[int] | None = None,
        image_shape: Sequence[int] = (1, 28, 28),
        preset: Literal["dcgan", "mlp"] = "dcgan",
        width: int = 64,
        loss: Loss = "non_saturating",
        r1: float = 0.0,
        r1_every: int = 16,
        penalty: float = 10.0,
        n_critic: int | None = None,
        spectral_norm: bool = False,
        batch_norm: bool | None = None,
    ) -> None:
        super().__init__()
        check_choice("preset", preset, ("dcgan", "mlp"))
        check_choice("loss", loss, get_args(Loss))
        _check_sizes("image_shape", image_shape, count=3)
        n_critic = (5 if loss == "wgan-gp" else 1) if n_critic is None else n_critic
        for name, value in {
            "latent_dim": latent_dim, "width": width, "r1_every": r1_every, "n_critic": n_critic
        }.items():  # fmt: skip
            _check_sizes(name, [value])
        if latent_shape is not None and generator is None:
            raise ValueError(f"latent_shape: expected None without an own generator, got {latent_shape!r}")
        if latent_shape is not None:
            _check_sizes("latent_shape", latent_shape)
        self.image_shape, self.objective = tuple(image_shape), loss
        self.r1, self.r1_every = _checks.non_negative("r1", r1), r1_every
        self.penalty, self.n_critic = _checks.non_negative("penalty", penalty), n_critic
        self.own_networks = tuple(
            name for name, own in (("generator", generator), ("discriminator", discriminator)) if own is not None
        )
        penalised = self.r1 > 0 or loss == "wgan-gp"
        if batch_norm is None:
            batch_norm = not (penalised or spectral_norm)
        if generator is None:
            kind = DCGANGenerator if preset == "dcgan" else MLPGenerator
            generator = kind(latent_dim, self.image_shape, width)
        if discriminator is None and preset == "dcgan":
            discriminator = DCGANDiscriminator(self.image_shape, width, batch_norm)
        elif discriminator is None:
            discriminator = MLPDiscriminator(self.image_shape, width)
        self.generator, self.discriminator = generator, discriminator
        if latent_shape is None:
            spatial = next((p.dim() for p in generator.parameters()), 0) == 4
            latent_shape = (latent_dim, 1, 1) if spatial else (latent_dim,)
        self.latent_shape = tuple(latent_shape)
        if spectral_norm:
            _normalise(discriminator)
        if penalised and any(isinstance(module, _BatchNorm) for module in discriminator.modules()):
            warnings.warn(
                "discriminator: has batch norm, under which the penalised gradient is no longer one of a single image",
                stacklevel=2,
            )
        if self.own_networks:
            self._check_networks()

    @profiling.annotate("forward")
    def forward(self, z: Tensor) -> Tensor:
        """Codes to images: (G(z) + 1) / 2.

        Args:
            z: [B, *latent_shape], or [B, L] of as many elements.

        Returns:
            [B, C, H, W], in [0, 1] for a generator that ends in a tanh.

        Raises:
            ValueError: z has another shape, or the images have.

        Example:
            >>> GAN(width=8)(torch.randn(3, 100)).shape
            torch.Size([3, 1, 28, 28])
        """
        if z.dim() < 2 or math.prod(z.shape[1:]) != math.prod(self.latent_shape):
            expected = str(["B", *self.latent_shape]).replace("'", "")
            raise ValueError(f"z: expected codes of shape {expected}, got {list(z.shape)}")
        return (self._generate(z.reshape(-1, *self.latent_shape)) + 1) / 2

    def latents(self, n: int, *, seed: int | Tensor | None = None, row_offset: int = 0) -> Tensor:
        """The codes [n, *latent_shape] that `sample` makes images of: draws from N(0, I).

        Example:
            >>> GAN(width=8, latent_dim=5).latents(3, seed=0).shape
            torch.Size([3, 5, 1, 1])
        """
        return self._latents(n, as_seed(seed, self.device), row_offset, _SAMPLES)

    @profiling.annotate("sampling step")
    def sample(self, n: int, *, seed: int | Tensor | None = None, row_offset: int = 0) -> Tensor:
        """Draw images, in eval mode. One seed gives the same images in one call or in many.

        Args:
            n: how many.
            seed: None (drawn from torch's generator), an int, or an int64 tensor [1] on the model's device.
            row_offset: global index of the first image, so that pieces continue one another.

        Returns:
            Images [n, C, H, W], clipped to [0, 1].

        Example:
            >>> gan = GAN(width=8)
            >>> whole, piece = gan.sample(8, seed=0), gan.sample(3, seed=0, row_offset=5)
            >>> whole.shape, torch.allclose(whole[5:], piece, atol=1e-6)
            (torch.Size([8, 1, 28, 28]), True)
        """
        with evaluating(self):
            return self(self.latents(n, seed=seed, row_offset=row_offset)).clamp(0, 1)

    def interpolate(self, z0: Tensor, z1: Tensor, steps: int = 10) -> Tensor:
        """Images along the arcs between codes, ends included: codes of N(0, I) lie near a sphere, which a line leaves.

        Args:
            z0, z1: two batches of as many codes, as `latents` gives them.
            steps: images along each arc, at least 2.

        Returns:
            [B, steps, C, H, W] in [0, 1].

        Raises:
            ValueError: batches of different shape, or fewer than 2 steps.

        Example:
            >>> gan = GAN(width=8)
            >>> gan.interpolate(gan.latents(3, seed=0), gan.latents(3, seed=1), steps=5).shape
            torch.Size([3, 5, 1, 28, 28])
        """
        if not isinstance(steps, int) or steps < 2:
            raise ValueError(f"steps: expected an int of at least 2, got {steps!r}")
        _checks.same_shape("z1", z1, "z0", z0)
        start, end = z0.flatten(1), z1.flatten(1)
        codes = torch.stack([on_the_arc(start, end, step / (steps - 1)) for step in range(steps)], 1)
        with evaluating(self):
            return self(codes.flatten(0, 1)).clamp(0, 1).unflatten(0, (len(z0), steps))

    def discriminate(self, x: Tensor, *, logits: bool = False) -> Tensor:
        """How real images look to the discriminator, in eval mode: [B], 1 for real.

        Args:
            x: images, see the class.
            logits: what the discriminator says; False: its sigmoid, which the losses ``non_saturating`` and ``minimax``
                make a probability.

        Returns:
            fp32 [B] (fp64 for such a model).

        Raises:
            ValueError: images of another shape or dtype.

        Example:
            >>> GAN(width=8).discriminate(torch.rand(3, 1, 28, 28)).shape
            torch.Size([3])
        """
        with evaluating(self):
            out = self._judge(self._real(x))
        return out if logits else torch.sigmoid(out)

    def turns(self, step: int) -> tuple[Turn, ...]:
        """Whose turns a training step consists of, in order; steps count from 0.

        Example:
            >>> GAN(width=8, r1=1.0, n_critic=2).turns(0), GAN(width=8, r1=1.0, n_critic=2).turns(1)
            (('discriminator_r1',), ('discriminator', 'generator'))
        """
        first: Turn = "discriminator_r1" if self.r1 > 0 and step % self.r1_every == 0 else "discriminator"
        return (first, "generator") if (step + 1) % self.n_critic == 0 else (first,)

    def turn_parameters(self, turn: Turn) -> list[nn.Parameter]:
        """The parameters whose turn it is.

        Example:
            >>> gan = GAN(width=8)
            >>> len(gan.turn_parameters("generator")) == len(list(gan.generator.parameters()))
            True
        """
        check_choice("turn", turn, get_args(Turn))
        return list((self.generator if turn == "generator" else self.discriminator).parameters())

    def make_optimizer(self, lr: float = 2e-4, fused: bool = False) -> torch.optim.Optimizer:
        """Adam with the betas of DCGAN, (0.5, 0.999); those of WGAN-GP, (0, 0.9), for that loss.

        Example:
            >>> GAN(width=8).make_optimizer().defaults["betas"]
            (0.5, 0.999)
        """
        betas = (0.0, 0.9) if self.objective == "wgan-gp" else (0.5, 0.999)
        return torch.optim.Adam(self.parameters(), lr=lr, betas=betas, fused=fused)

    def loss(
        self,
        x: Tensor,
        *,
        turn: Turn | None = None,
        seed: int | Tensor | None = None,
        row_offset: int = 0,
    ) -> dict[str, Tensor]:
        """What the network whose turn it is lowers, averaged over the batch.

        `genfast.fit` asks for the turns of `turns`; a script of its own asks for ``"discriminator"`` and then
        ``"generator"``, each with an optimizer over `turn_parameters`. The other network's parameters get gradients
        too in the generator's turn, unless they require none.

        Args:
            x: real images, see the class; the generator's turn takes their number alone.
            turn: ``"generator"``; ``"discriminator"``; ``"discriminator_r1"``: with the penalty r1 of `r1_every` steps;
                or None: both losses without penalties and without gradients, to look at.
            seed: of the latents, each turn with its own: None (drawn from torch's generator), an int, or an int64
                tensor [1] on the model's device.
            row_offset: global index of the first row, for micro-batches, ranks and evaluation in pieces.

        Returns:
            Scalars, fp32 (fp64 for such a model): ``loss``, to be lowered; ``d_loss`` and ``g_loss`` without penalties;
            ``d_real`` and ``d_fake``, means of the discriminator's probability (its output where the loss knows none)
            for real and for generated images; ``diversity``, how far a generated image is from the nearest other one of
            its batch, relative to the same of the real ones; ``covered``, the share of 64 real images that have one of
            64 generated images no farther away than their third nearest real neighbour (the coverage of Naeem et al.,
            "Reliable fidelity and diversity metrics for generative models", ICML 2020, of pixels; 0.88 where both are
            of one distribution); ``r1`` or ``penalty``, weighted.

        Raises:
            ValueError: images of another shape or dtype, or networks that do not go together.

        Example:
            >>> parts = GAN(width=8).loss(torch.rand(4, 1, 28, 28), turn="generator", seed=0)
            >>> torch.equal(parts["loss"], parts["g_loss"])
            True
        """
        check_choice("turn", turn, (None, *get_args(Turn)))
        x = check_images("x", x, self.image_shape)
        seed = as_seed(seed, x.device)
        if turn == "generator":
            return self._generator_loss(len(x), seed, row_offset)
        if turn is not None:
            return self._discriminator_loss(x, turn == "discriminator_r1", seed, row_offset)
        with torch.no_grad():
            real, fake = self._real(x), self._generate(self._latents(len(x), seed, row_offset, _TO_JUDGE))
            said = self._judge(real), self._judge(fake)
            parts = self._judgement(*said, real, fake) | {"g_loss": self._deceit(said[1])}
            return {"loss": parts["d_loss"] + parts["g_loss"], **parts}

    def diagnose(self, row: Mapping[str, float], steps: int | None = None) -> str | None:
        """What a row of `fit`'s history shows to have gone wrong: one line, or None.

        Of the training's parts: a test set may be sorted by its classes, and then a batch of it shows few of them.

        Args:
            row: of the history.
            steps: taken so far. Images of a generator that has learned nothing yet are alike, too, so before 1,000
                steps nothing is said. None: it is late enough.

        Example:
            >>> GAN(width=8).diagnose({"diversity": 0.01, "d_real": 0.7, "d_fake": 0.3})
            'collapse: generated images are alike: 0.01 times as far from one another as real ones'
        """
        if steps is not None and steps < _EARLY:
            return None
        diversity, covered = row.get("diversity", math.nan), row.get("covered", math.nan)
        if diversity < _ALIKE:
            return f"collapse: generated images are alike: {diversity:.2g} times as far from one another as real ones"
        if covered < _LEFT_OUT:
            return (
                f"collapse: kinds of images are left out: {covered:.0%} of the real ones have a generated one near, "
                "where 88% would if none were missing"
            )
        real, fake = row.get("d_real", math.nan), row.get("d_fake", math.nan)
        if self.objective in _PROBABILISTIC and real > _CERTAIN and fake < 1 - _CERTAIN:
            return (
                f"collapse: the discriminator is certain of all images, D(x) = {real:.4f} and D(G(z)) = {fake:.2g}, "
                "and the generator learns little from it"
            )
        return None

    def load_dcgan(self, generator: Mapping[str, Tensor], discriminator: Mapping[str, Tensor] | None = None) -> None:
        """Load what a DCGAN script saved: ``torch.load("netG.pth", weights_only=True)``, and of netD likewise.

        The keys may be ``main.N`` or ``N``, behind ``module.`` (DataParallel) or not.

        Args:
            generator: state_dict of netG.
            discriminator: state_dict of netD; None leaves the discriminator as it is.

        Raises:
            ValueError: keys or shapes are not those of the networks.

        Example:
            >>> gan, other = GAN(width=8), GAN(width=8)
            >>> gan.load_dcgan({f"module.{key}": value for key, value in other.generator.state_dict().items()})
            >>> bool((gan.generator.main[0].weight == other.generator.main[0].weight).all())
            True
        """
        for name, network, given in (
            ("generator", self.generator, generator), ("discriminator", self.discriminator, discriminator)
        ):  # fmt: skip
            if given is not None:
                _load(name, network, given)

    def compile(self, **kwargs: Any) -> None:
        """Compile the networks in place, each by itself, as penalties differentiate the discriminator twice.

        `torch.compile` cannot do that: the penalised call takes the discriminator as it is.

        Args:
            kwargs: options of `torch.compile`; ``fullgraph`` is True unless given.

        Example:
            >>> gan = GAN(width=8)
            >>> gan.compile(backend="eager")
            >>> gan.sample(2, seed=0).shape
            torch.Size([2, 1, 28, 28])
        """
        self._compile_options = kwargs
        for network in (self.generator, self.discriminator):
            network.compile(**{"fullgraph": True, **_ISOLATED, **kwargs})

    def _real(self, x: Tensor) -> Tensor:
        """Real images in [-1, 1]."""
        x = check_images("x", x, self.image_shape)
        return (x.to(self.dtype) * (2 / 255) if x.dtype == torch.uint8 else 2 * x.to(self.dtype)) - 1

    def _latents(self, n: int, seed: Tensor, row_offset: int, salt: int) -> Tensor:
        z = normal(seed, n, math.prod(self.latent_shape), Stream.PRIOR, row_offset, salt)
        return z.reshape(n, *self.latent_shape).to(self.dtype)

    def _generate(self, z: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        images = self.generator(z)
        if tuple(images.shape) not in ((len(z), *self.image_shape), (len(z), math.prod(self.image_shape))):
            raise ValueError(
                f"generator: expected images of shape {[len(z), *self.image_shape]}, which the discriminator takes, "
                f"of codes {list(z.shape)}, got {list(images.shape)}"
            )
        return images.reshape(-1, *self.image_shape)

    def _judge(self, images: Tensor, eager: bool = False) -> Tensor:
        """The logit of each image, at least fp32."""
        # Past the compiled call, hooks included.
        out = (self.discriminator._call_impl if eager else self.discriminator)(images)
        if out.shape[:1] != images.shape[:1] or out.numel() != len(images):
            raise ValueError(
                "discriminator: expected logits of shape [B], [B, 1] or [B, 1, 1, 1] of images "
                f"{list(images.shape)}, such as the generator makes, got {list(out.shape)}"
            )
        return wide(out.reshape(-1))

    def _discriminator_loss(self, x: Tensor, with_r1: bool, seed: Tensor, row_offset: int) -> dict[str, Tensor]:
        with profiling.range("forward"):
            real = self._real(x)
            with torch.no_grad():
                fake = self._generate(self._latents(len(x), seed, row_offset, _TO_JUDGE))
            extra: dict[str, Tensor] = {}
            if with_r1:
                of_real, squares = self._slopes(real)
                extra["r1"] = 0.5 * self.r1 * squares.mean()
            else:
                of_real = self._judge(real)
            of_fake = self._judge(fake)
            if self.objective == "wgan-gp":
                place = uniform(seed, len(x), 1, Stream.INTERPOLATE, row_offset).to(real.dtype).view(-1, 1, 1, 1)
                _, squares = self._slopes(torch.lerp(fake, real, place))
                # The slope of a root is infinite at 0.
                extra["penalty"] = self.penalty * (torch.sqrt(squares + 1e-12) - 1).square().mean()
        with profiling.range("loss"):
            parts = self._judgement(of_real, of_fake, real, fake)
            loss = parts["d_loss"]
            if "r1" in extra:
                loss = loss + self.r1_every * extra["r1"]
            if "penalty" in extra:
                loss = loss + extra["penalty"]
            return {"loss": loss, **parts, **extra}

    def _generator_loss(self, rows: int, seed: Tensor, row_offset: int) -> dict[str, Tensor]:
        with profiling.range("forward"):
            said = self._judge(self._generate(self._latents(rows, seed, row_offset, _TO_LEARN)))
        with profiling.range("loss"):
            loss = self._deceit(said)
            return {"loss": loss, "g_loss": loss}

    def _slopes(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The logit of each image, and the squared norm of its gradient by that image's pixels."""
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            images = images.detach().requires_grad_()
            logits = self._judge(images, eager=True)
            # Each logit depends on its own image alone.
            (slopes,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return logits, wide(slopes).flatten(1).square().sum(1)

    def _judgement(self, of_real: Tensor, of_fake: Tensor, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """The discriminator's loss of logits [B], and what else there is to see of them."""
        probable = self.objective in _PROBABILISTIC
        if probable:
            each = F.softplus(-of_real) + F.softplus(of_fake)
        elif self.objective == "hinge":
            each = F.relu(1 - of_real) + F.relu(1 + of_fake)
        elif self.objective == "lsgan":
            each = 0.5 * (of_real - 1).square() + 0.5 * of_fake.square()
        else:
            each = of_fake - of_real
        with torch.no_grad():
            d_real, d_fake = ((torch.sigmoid(said) if probable else said).mean() for said in (of_real, of_fake))
            diversity = _apart(fake) / _apart(real) if len(real) > 1 else torch.ones_like(d_real)
            # 0 / 0 as well, where all real images are the same.
            diversity = diversity.nan_to_num(nan=1.0).clamp(max=_LARGEST_DIVERSITY)
            seen = {"diversity": diversity.to(d_real.dtype), "covered": _covered(real, fake).to(d_real.dtype)}
        return {"d_loss": each.mean(), "d_real": d_real, "d_fake": d_fake, **seen}

    def _deceit(self, of_fake: Tensor) -> Tensor:
        """The generator's loss of logits [B]."""
        if self.objective == "non_saturating":
            return F.softplus(-of_fake).mean()
        if self.objective == "minimax":
            return -F.softplus(of_fake).mean()
        if self.objective == "lsgan":
            return 0.5 * (of_fake - 1).square().mean()
        return -of_fake.mean()

    @torch.no_grad()
    def _check_networks(self) -> None:
        """Whether own networks go together, tried with copies, so that no running statistic is touched."""
        for name, network, wanted in (
            ("generator", self.generator, nn.Tanh), ("discriminator", self.discriminator, nn.Sigmoid)
        ):  # fmt: skip
            # What other modules apply last is not known.
            *_, last = network.modules() if isinstance(network, nn.Sequential) else (None,)
            if isinstance(last, nn.Sigmoid):
                expected = "images in [-1, 1]" if wanted is nn.Tanh else "logits"
                instead = "end it in a Tanh" if wanted is nn.Tanh else "leave it out"
                raise ValueError(f"{name}: expected {expected}, got a network that ends in a Sigmoid: {instead}")
        trial = copy.copy(self)
        trial._modules = {
            name: copy.deepcopy(network).eval() for name, network in self._modules.items() if network is not None
        }
        where = next(self.parameters(), torch.zeros(())).device
        z = torch.zeros(2, *self.latent_shape, device=where, dtype=self.dtype)
        images = torch.zeros(2, *self.image_shape, device=where, dtype=self.dtype)
        try:
            what = f"generator: expected a network that takes codes {list(z.shape)}"
            images = trial._generate(z)
            what = f"discriminator: expected a network that takes the generator's images, {list(images.shape)}"
            trial._judge(images)
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            # Ours name their network themselves.
            if reason.startswith(("generator:", "discriminator:")):
                raise
            raise ValueError(f"{what}, got: {reason}") from error


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def _apart(images: Tensor) -> Tensor:
    """The mean distance of an image of a batch to the nearest other one."""
    rows = wide(images[:_COMPARED]).flatten(1)
    return torch.cdist(rows, rows).fill_diagonal_(math.inf).min(1).values.mean()


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def _covered(real: Tensor, fake: Tensor) -> Tensor:
    """The share of real images with a generated one within the distance of their third nearest neighbour."""
    real, fake = (wide(images[:_COVERED]).flatten(1) for images in (real, fake))
    if len(real) <= _NEIGHBOUR:
        return torch.ones((), device=real.device)
    among = torch.cdist(real, real).fill_diagonal_(math.inf)
    radii = among.topk(_NEIGHBOUR, dim=1, largest=False).values[:, -1]
    return (torch.cdist(real, fake).min(1).values <= radii).to(real.dtype).mean()


def _normalise(network: nn.Module) -> None:
    """Spectral norm of every layer that has none yet."""
    for module in list(network.modules()):
        if isinstance(module, _WEIGHTED) and not parametrize.is_parametrized(module, "weight"):
            parametrizations.spectral_norm(module)


def _load(name: str, network: nn.Module, given: Mapping[str, Tensor]) -> None:
    expected = network.state_dict()
    tensors = {}
    for key, value in given.items():
        key = key.removeprefix("module.")
        # Behind spectral norm, whose estimates of the singular vectors stay as they are.
        original = re.sub(r"weight$", "parametrizations.weight.original", key)
        names = (key, f"main.{key}", original, f"main.{original}")
        tensors[next((name for name in names if name in expected), key)] = value
    # Files of before torch 0.4.1 have no counters.
    optional = {key for key in expected if key.endswith(("num_batches_tracked", "weight.0._u", "weight.0._v"))}
    problems = [f"{key} is missing" for key in expected if key not in tensors and key not in optional]
    problems += [f"{key} is unknown" for key in tensors if key not in expected]
    problems += [
        f"{key} has shape {list(tensors[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{name}: expected the state_dict of this network, got one where {', '.join(problems[:3])}{more}"
        )
    network.load_state_dict({**expected, **tensors})
