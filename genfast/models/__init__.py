"""Ready models: plain `nn.Module`s on genfast's fused ops."""

from genfast.models.autoencoder import AutoEncoder
from genfast.models.base import Model
from genfast.models.diffusion import DDPM
from genfast.models.flow import Flow
from genfast.models.flow_presets import FlowPlusPlus, Glow, RealNVP
from genfast.models.gan import GAN
from genfast.models.registry import FAMILIES, Family, get_family, load
from genfast.models.unet import UNet
from genfast.models.vae import VAE

__all__ = [
    "DDPM",
    "FAMILIES",
    "GAN",
    "VAE",
    "AutoEncoder",
    "Family",
    "Flow",
    "FlowPlusPlus",
    "Glow",
    "Model",
    "RealNVP",
    "UNet",
    "get_family",
    "load",
]
