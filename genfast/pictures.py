"""Which pictures a trained model has: each kind of model says it here."""

from __future__ import annotations

import os
from functools import singledispatch
from pathlib import Path
from typing import Any

from torch import Tensor

from genfast import report
from genfast.models.base import LatentImageModel, Model
from genfast.models.diffusion import DDPM
from genfast.models.flow_presets import FlowPreset
from genfast.models.gan import GAN
from genfast.training.progress import counting

__all__ = ["draw", "save_paths", "save_pictures"]

_SAMPLES, _AT_ONCE = 64, 256
# Rows and columns of the pictures of a process.
_ROWS, _COLUMNS = 8, 10


@singledispatch
def save_pictures(model: Model, images: Tensor, folder: Path, seed: int) -> None:
    """Write what there is to see of a model into a folder.

    Of a class of your own nothing is known: ``@save_pictures.register`` a function with these arguments for it.

    Args:
        model: in eval mode.
        images: test images on the model's device, as its ``loss`` takes them.
        folder: is there already.
        seed: of the samples.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from genfast.models import VAE
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pictures(VAE(), torch.rand(12, 1, 28, 28), Path(folder), seed=0)
        ...     print(sorted(path.name for path in Path(folder).iterdir()))
        ['interpolation.png', 'reconstructions.png', 'samples.png']
    """


@save_pictures.register
def _(model: LatentImageModel, images: Tensor, folder: Path, seed: int) -> None:
    report.save_grid(model.sample(_SAMPLES, seed=seed), folder / "samples.png")
    report.save_pairs(images, model.reconstruct(images), folder / "reconstructions.png")
    if model.latent_shape == (2,):
        manifold = model.manifold()
        report.save_grid(manifold.flatten(0, 1), folder / "manifold.png", columns=manifold.shape[1], gap=0)
    else:
        paths = model.interpolate(images[:10], images[:10].roll(-1, 0))
        report.save_grid(paths.flatten(0, 1), folder / "interpolation.png", columns=paths.shape[1])


@save_pictures.register
def _(model: DDPM, images: Tensor, folder: Path, seed: int) -> None:
    times = model.schedule.timesteps(min(_COLUMNS - 1, model.schedule.num_steps or _COLUMNS)).flip(0)
    save_paths(model.forward_process(images[:_ROWS], times, seed=seed), times, folder / "forward.png")
    options = model.quick_sampling()
    frames = draw(model, _SAMPLES, seed=seed, paths=True, **options)
    report.save_grid(frames[-1], folder / "samples.png")
    save_paths(frames, model.schedule.timesteps(options["steps"]), folder / "reverse.png")


@save_pictures.register
def _(model: FlowPreset, images: Tensor, folder: Path, seed: int) -> None:
    report.save_grid(model.sample(_SAMPLES, seed=seed), folder / "samples.png")
    paths = model.interpolate(images[:10], images[:10].roll(-1, 0), seed=seed)
    report.save_grid(paths.flatten(0, 1), folder / "interpolation.png", columns=paths.shape[1])


@save_pictures.register
def _(model: GAN, images: Tensor, folder: Path, seed: int) -> None:
    report.save_grid(model.sample(_SAMPLES, seed=seed), folder / "samples.png")
    # The codes of the first samples: the picture begins with those.
    codes = model.latents(10, seed=seed)
    paths = model.interpolate(codes, codes.roll(-1, 0))
    report.save_grid(paths.flatten(0, 1), folder / "interpolation.png", columns=paths.shape[1])


def draw(
    model: DDPM, n: int, *, seed: int, paths: bool = False, sampler: str, steps: int | None = None, **options: Any
) -> Tensor:
    """Samples of a diffusion model; says what it draws, and shows how far it is.

    Args:
        n: how many.
        seed: sample i depends on it and on i alone.
        paths: return how they came about.
        sampler, steps, options: as for `DDPM.sample`.

    Returns:
        Images [n, C, H, W]; with `paths` [steps + 1, n, C, H, W].

    Example:
        >>> draw(DDPM(preset="tiny", image_shape=(1, 8, 8)), 5, seed=0, sampler="ddim", steps=3).shape
        drawing 5 images in 3 steps of ddim
        torch.Size([5, 1, 8, 8])
    """
    count = len(model.schedule.timesteps(steps)) - 1
    options |= {"sampler": sampler, "steps": steps, "seed": seed, "batch_size": _AT_ONCE, "trajectory": paths}
    calls = count * -(-n // _AT_ONCE)
    # What counts the calls of a network that is compiled would be compiled too.
    counted = model.net if model._compiled_call_impl is None else None
    with counting(counted, calls, f"drawing {n:,} images in {count:,} steps of {sampler}"):
        return model.sample(n, **options)


def save_paths(frames: Tensor, times: Tensor, path: str | os.PathLike[str]) -> None:
    """Write the first images of a process: a row for each, at about ten of its times.

    Args:
        frames: [F, N, C, H, W], as `DDPM.forward_process` and ``sample(trajectory=True)`` return it.
        times: the time of each frame, [F].
        path: of the PNG.

    Example:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_paths(torch.rand(3, 4, 1, 8, 8), torch.tensor([9, 4, -1]), f"{folder}/reverse.png")
    """
    rows = report.thin(frames, _COLUMNS)[:, :_ROWS].transpose(0, 1)
    times = report.thin(times, _COLUMNS).tolist()
    # A discrete schedule's time of the clean image.
    labels = ["image" if time == -1 else f"t = {time if isinstance(time, int) else f'{time:.2g}'}" for time in times]
    report.save_grid(rows.flatten(0, 1), path, columns=len(labels), labels=labels)
