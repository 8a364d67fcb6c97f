"""Images as every metric takes them: checked, in batches, on a device, in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BATCH_SIZE = 512


def check_images(name: str, images: Tensor, least: int = 1) -> None:
    """Raise unless `images` is [N, C, H, W] with N >= `least`, uint8 or floats; the message begins with `name`."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"{name}: expected images [N, C, H, W] with 1 or 3 channels, got shape {list(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"{name}: expected uint8 or floats in [0, 1], got {images.dtype}")
    if len(images) < least:
        raise ValueError(f"{name}: expected at least {least} images, got {len(images)}")


def unit_interval(name: str, images: Tensor) -> Tensor:
    """fp32 in [0, 1]: uint8 divided by 255, floats as they are.

    Raises:
        ValueError: floats that are not finite, or outside [0, 1] by more than rounding.
    """
    if images.dtype == torch.uint8:
        return images.float() / 255
    images = images.detach().float()
    low, high = (float(value) for value in images.aminmax())
    # Rounding may leave the interval; images of 0 to 255, or of -1 to 1, leave it by far, and NaN is in none.
    if not (low >= -0.01 and high <= 1.01):
        raise ValueError(f"{name}: expected uint8 or finite floats in [0, 1], got values from {low:g} to {high:g}")
    return images.clamp(0, 1)


def batches(name: str, images: Tensor, device: torch.device | str, size: int = BATCH_SIZE) -> Iterator[Tensor]:
    """The images as fp32 in [0, 1] on `device`, `size` at a time."""
    for part in images.split(size):
        yield unit_interval(name, part.to(device))
