"""The model families, by name: what the command line and the training loop read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from genfast.models.autoencoder import AutoEncoder
from genfast.models.base import Model, read_config
from genfast.models.diffusion import DDPM
from genfast.models.flow_presets import FlowPlusPlus, Glow, RealNVP
from genfast.models.gan import GAN
from genfast.models.vae import VAE

__all__ = ["FAMILIES", "Family", "get_family", "load"]


@dataclass(frozen=True)
class Family:
    """A kind of model, and the names of the options that it takes.

    Attributes:
        name: the name on the command line.
        summary: one line about it.
        model: its class; of several, the one that is built where none is named.
        build_options: arguments of the constructor that a user may set by name.
        loss_options: arguments of ``loss`` that a user may set by name.
        defaults: options of ``genfast train`` that this family wants otherwise than all others, where none is given.
        archs: its classes by the name of the option ``arch``, where it has several.

    Example:
        >>> get_family("vae").build((1, 28, 28), latent_dim=2).latent_dim
        2
        >>> type(get_family("flow").build((1, 8, 8), arch="glow", preset="tiny")).__name__
        'Glow'
    """

    name: str
    summary: str
    model: type[Model]
    build_options: tuple[str, ...]
    loss_options: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    archs: Mapping[str, type[Model]] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[type[Model], ...]:
        """All classes of the family."""
        return tuple(self.archs.values()) or (self.model,)

    def build(self, image_shape: Sequence[int], **options: Any) -> Model:
        """A model for images of shape (C, H, W); ValueError for an option that the family does not take."""
        unknown = sorted(set(options) - set(self.build_options))
        if unknown:
            raise ValueError(f"{self.name}: unknown options {unknown}; it takes {list(self.build_options)}")
        model, arch = self.model, options.pop("arch", None)
        if arch is not None:
            if arch not in self.archs:
                raise ValueError(f"arch: expected one of {', '.join(self.archs)}, got {arch!r}")
            model = self.archs[arch]
        foreign = sorted(set(options) - set(inspect.signature(model).parameters))
        if foreign:
            raise ValueError(f"{foreign[0]}: expected none for {model.__name__}, got {options[foreign[0]]!r}")
        return model(image_shape=tuple(image_shape), **options)


_DIFFUSION_OPTIONS = (
    "schedule", "num_steps", "objective", "preset", "weighting", "gamma", "variance", "clip_x0", "fused",
)  # fmt: skip
# Of the discrete schedules this one gave recognisable digits soonest.
_DIFFUSION_DEFAULTS = {
    "schedule": "cosine", "objective": "v", "preset": "tiny", "batch_size": 64, "lr": 1e-3, "ema_decay": 0.995,
}  # fmt: skip
_FLOWS = {"realnvp": RealNVP, "glow": Glow, "flowpp": FlowPlusPlus}
_FLOW_OPTIONS = ("arch", "dequantization", "preset", "memory", "fused")
# Clipped, since one bad batch in the first hundred steps can cost a flow its scales.
_FLOW_DEFAULTS = {
    "arch": "realnvp", "preset": "tiny", "batch_size": 32, "lr": 1e-3, "lr_schedule": "cosine", "warmup_steps": 100,
    "grad_clip": 50.0, "epochs": 50, "evaluate_every": 1,
}  # fmt: skip
_GAN_OPTIONS = (
    "latent_dim", "preset", "width", "loss", "r1", "r1_every", "penalty", "n_critic", "spectral_norm", "batch_norm",
)  # fmt: skip
_GAN_DEFAULTS = {"preset": "dcgan", "width": 32, "batch_size": 64, "lr": 4e-4, "ema_decay": 0.995}
_NETWORK_OPTIONS = ("latent_dim", "hidden_dims", "preset", "likelihood", "sigma", "fused")

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("vae", "variational autoencoder", VAE, _NETWORK_OPTIONS, ("beta", "free_bits")),
        Family("ae", "autoencoder", AutoEncoder, _NETWORK_OPTIONS, ()),
        Family("ddpm", "diffusion model", DDPM, _DIFFUSION_OPTIONS, (), _DIFFUSION_DEFAULTS),
        Family("flow", "normalizing flow", RealNVP, _FLOW_OPTIONS, (), _FLOW_DEFAULTS, _FLOWS),
        Family("gan", "generative adversarial network", GAN, _GAN_OPTIONS, (), _GAN_DEFAULTS),
    )
}


def get_family(name: str) -> Family:
    """The family of that name.

    Raises:
        ValueError: there is none; the message lists those there are.

    Example:
        >>> get_family("ae").model.__name__
        'AutoEncoder'
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown model family {name!r}: expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def load(path: str | Path, *, device: torch.device | str = "cpu", **arguments: Any) -> Model:
    """Load a saved model of any family: its ``config.json`` says which class it is.

    Args:
        path: a local folder that `save_pretrained` wrote; for a repository of the Hub, use the class's own
            `from_pretrained`.
        device, arguments: as for `Model.from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: as for `Model.from_pretrained`, or the class is of no known family.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     AutoEncoder().save_pretrained(folder)
        ...     type(load(folder)).__name__
        'AutoEncoder'
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such folder")
    config_path, config = read_config(path)
    classes = {model.__name__: model for family in FAMILIES.values() for model in family.classes}
    if config["model_type"] not in classes:
        raise ValueError(f"{config_path}: unknown model_type {config['model_type']!r}: expected one of {list(classes)}")
    return classes[config["model_type"]].from_pretrained(path, device=device, **arguments)
