"""genfast: fused Triton kernels behind the generative models that people already use in PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported on first use, so that `import genfast` costs next to nothing over `import torch`.
_LAZY = {
    "VAE": "genfast.models",
    "DDPM": "genfast.models",
    "GAN": "genfast.models",
    "AutoEncoder": "genfast.models",
    "Flow": "genfast.models",
    "FlowPlusPlus": "genfast.models",
    "Glow": "genfast.models",
    "RealNVP": "genfast.models",
    "UNet": "genfast.models",
    "fit": "genfast.training",
}
_SUBMODULES = (
    "flows",
    "functional",
    "integrations",
    "metrics",
    "models",
    "profiling",
    "random",
    "reference",
    "schedules",
    "training",
)

__all__ = [
    "DDPM",
    "GAN",
    "VAE",
    "AutoEncoder",
    "Flow",
    "FlowPlusPlus",
    "Glow",
    "RealNVP",
    "UNet",
    "__version__",
    "fit",
    "flows",
    "functional",
    "integrations",
    "metrics",
    "models",
    "profiling",
    "random",
    "reference",
    "schedules",
    "training",
]

if TYPE_CHECKING:
    from genfast import (
        flows,
        functional,
        integrations,
        metrics,
        models,
        profiling,
        random,
        reference,
        schedules,
        training,
    )
    from genfast.models import DDPM, GAN, VAE, AutoEncoder, Flow, FlowPlusPlus, Glow, RealNVP, UNet
    from genfast.training import fit


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"genfast.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'genfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
