"""How fast a model draws images."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from genfast.metrics.estimate import Estimate, of_resamples, own_generator, resampled_rows

__all__ = ["sampling_speed", "timed_samples"]


def sampling_speed(model: nn.Module, n: int = 64, *, repeats: int = 5, seed: int = 0, **options: Any) -> Estimate:
    """Images per second of ``model.sample``, after one call that is not counted.

    Args:
        model: with ``sample(n, *, seed, row_offset, ...)``.
        n: images in each call.
        repeats: calls that are timed, at least 2.
        seed: of the images.
        options: of ``model.sample``, such as a diffusion model's ``**model.quick_sampling()``.

    Returns:
        All images over all seconds, with an interval from the single calls; n is the number of images.

    Raises:
        ValueError: n is below 1, or repeats below 2.

    Example:
        >>> from genfast.models import VAE
        >>> sampling_speed(VAE(), 16).value > 0
        True
    """
    if repeats < 2:
        raise ValueError(f"repeats: expected at least 2, got {repeats}")
    return timed_samples(model, n * repeats, batch_size=n, seed=seed, **options)[1]


def timed_samples(
    model: nn.Module, n: int, *, batch_size: int = 256, seed: int = 0, **options: Any
) -> tuple[Tensor, Estimate]:
    """Draw images, a batch at a time, and measure how fast that is: what `sampling_speed` says, and the images.

    Args:
        model, seed, options: as for `sampling_speed`.
        n: how many in all.
        batch_size: at a time; it changes the images by rounding only.

    Returns:
        The images [n, C, H, W], and images per second, with an interval from the single batches if they are several.

    Raises:
        ValueError: n or batch_size is below 1.

    Example:
        >>> from genfast.models import VAE
        >>> images, speed = timed_samples(VAE(), 10, batch_size=4)
        >>> images.shape, speed.n
        (torch.Size([10, 1, 28, 28]), 10)
    """
    for name, value in (("n", n), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    # Whatever is made once, as a CUDA graph, is made here.
    _drawn(model, min(batch_size, n), seed, 0, options)
    batches, seconds = [], []
    for start in range(0, n, batch_size):
        started = time.perf_counter()
        batches.append(_drawn(model, min(batch_size, n - start), seed, start, options))
        seconds.append(time.perf_counter() - started)
    counts = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
    return torch.cat(batches), _rate(counts, torch.tensor(seconds, dtype=torch.float64))


def _drawn(model: nn.Module, n: int, seed: int, row_offset: int, options: dict[str, Any]) -> Tensor:
    images = model.sample(n, seed=seed, row_offset=row_offset, **options)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return images


def _rate(counts: Tensor, seconds: Tensor) -> Estimate:
    """All images over all seconds of calls with so many images and seconds each; the calls are resampled."""
    rows = torch.cat(list(resampled_rows(len(counts), own_generator())))
    value, images = float(counts.sum() / seconds.sum()), int(counts.sum())
    if len(counts) < 2:
        return Estimate(value, n=images)
    return of_resamples(value, counts[rows].sum(1) / seconds[rows].sum(1), images, centred=False)
