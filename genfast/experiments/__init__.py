"""Experiments: each one command, each leaving pictures, tables and a page that says what was observed.

    genfast experiment kl-weight --budget 7 --out experiments/kl-weight

Every sentence of a page about what was observed is chosen by comparing the numbers that were measured.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import genfast
from genfast._files import replacing
from genfast.experiments.base import Experiment, Page, Settings
from genfast.metrics import load_inception

__all__ = ["EXPERIMENTS", "Experiment", "Page", "Settings", "run_experiment"]

_MARKER = "experiment.json"


def _of(module: str) -> Callable[[Settings], Page]:
    """The `run` of a module that is imported when it is called."""

    def run(settings: Settings) -> Page:
        return importlib.import_module(f"genfast.experiments.{module}").run(settings)

    return run


EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment("kl-weight", "VAE: what the weight of the KL term trades for what", 10.0, _of("kl_weight")),
        Experiment("latent-size", "VAE: how many latent dimensions are used, and for what", 6.0, _of("latent_size")),
        Experiment("manifold", "VAE: the plane of a two-dimensional latent space", 6.0, _of("manifold")),
        Experiment("ae-vs-vae", "what the prior adds to an autoencoder", 4.0, _of("ae_vs_vae")),
        Experiment("likelihood", "VAE: two estimates of log p(x); its bound over the epochs", 4.0, _of("likelihood")),
        Experiment("gan-dynamics", "GAN: losses, penalties, and what each does over time", 40.0, _of("gan_dynamics")),
        Experiment("dequantization", "flow: what noise below the grey levels is for", 30.0, _of("dequantization")),
        Experiment("forward-diffusion", "noise in one step or in many; all schedules", 1.0, _of("forward_diffusion")),
        Experiment("compare", "AE, VAE, GAN, flow and DDPM, trained equally long", 60.0, _of("compare")),
    )
}


def run_experiment(name: str, settings: Settings, overwrite: bool = False) -> Page:
    """Do an experiment and write its page; after an interruption the same call goes on.

    Args:
        name: one of `EXPERIMENTS`.
        settings: ``out`` is a folder that is free, or holds this experiment with the same settings.
        overwrite: replace an experiment that ``out`` holds.

    Returns:
        The page, which has been written to ``out``.

    Raises:
        ValueError: an unknown experiment, a budget out of range, ``inception`` where nothing asks for it, or ``out``
            holds something else.
        ImportError, OSError: as of `genfast.metrics.load_inception`.
        FloatingPointError: a training diverged.
        KeyboardInterrupt: SIGTERM or Ctrl-C.

    Example:
        >>> run_experiment("kl-wait", Settings(Path("experiments/kl-weight"), budget=60.0))
        Traceback (most recent call last):
        ValueError: experiment: expected one of kl-weight, ..., got 'kl-wait'
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment: expected one of {', '.join(EXPERIMENTS)}, got {name!r}")
    if not 0 < settings.budget < float("inf"):
        raise ValueError(f"budget: expected a positive number of minutes, got {settings.budget / 60:g}")
    if settings.inception is not None and name != "compare":
        raise ValueError(f"inception: expected with compare alone, got {settings.inception!r} with {name}")
    default = 60 * EXPERIMENTS[name].default_budget_minutes
    settings = replace(settings, portion=min(1.0, settings.budget / default))
    # Whatever is wrong with the data, or with weights, comes out here, before anything is written or deleted.
    settings.load()
    if settings.inception is not None:
        load_inception(settings.inception)
    _claim(name, settings, overwrite)
    page = EXPERIMENTS[name].run(settings)
    page.write(settings.out, _facts(name, settings))
    return page


def _claim(name: str, settings: Settings, overwrite: bool) -> None:
    """Make the folder, and note in it what it is for."""
    # Without `inception`, which changes what is measured, not what is trained: a page may have its FID later.
    wanted = {
        "experiment": name, "data": settings.data, "image_size": settings.image_size,
        "budget_minutes": settings.budget / 60, "seed": settings.seed, "device": settings.device,
    }  # fmt: skip
    out, marker = settings.out, settings.out / _MARKER
    if out.is_dir() and any(out.iterdir()):
        if not marker.is_file():
            raise ValueError(f"--out: {out} is not empty and holds no experiment of genfast")
        there = json.loads(marker.read_text())
        if overwrite:
            _clear(out)
        elif there != wanted:
            different = [key for key in wanted if there.get(key) != wanted[key]]
            words = "; ".join(f"{key} {there.get(key)!r} there, {wanted[key]!r} here" for key in different)
            raise ValueError(
                f"--out: {out} holds an experiment with other settings ({words}); name another, or add --overwrite"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(marker) as temporary:
            temporary.write_text(json.dumps(wanted, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"--out: cannot write to {error.filename} ({error.strerror})") from error


def _clear(out: Path) -> None:
    """Delete what an experiment leaves; the marker last, or half of it could not be deleted by a second attempt."""
    shutil.rmtree(out / "runs", ignore_errors=True)
    for pattern in ("*.png", "*.gif", "*.mp4", "*.csv", "README.md", "*.html", "results.json", "plan.json", _MARKER):
        for path in out.glob(pattern):
            path.unlink()


def _facts(name: str, settings: Settings) -> dict[str, str]:
    """How a page was made, for its end."""
    default = EXPERIMENTS[name].default_budget_minutes
    words = ["genfast", "experiment", name, "--data", settings.data]
    if settings.image_size is not None:
        words += ["--image-size", str(settings.image_size)]
    words += ["--budget", f"{settings.budget / 60:g}", "--seed", str(settings.seed)]
    if settings.inception is not None:
        words += ["--inception", settings.inception]
    facts = {"Command": f"`{shlex.join(words)}`"}
    trained = (settings.out / "runs").is_dir()
    budget = f"{settings.budget / 60:g} minutes for all models together" if trained else "nothing is trained"
    if settings.portion < 1:
        budget += f"; a reduced form (default: {default:g}): fewer images are evaluated, as the tables count them"
    facts["Budget of training"] = budget
    device = torch.device(settings.device)
    if device.type == "cuda":
        facts["Device"] = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        facts["Device"] = f"{device}, {threads} thread{'' if threads == 1 else 's'} of {os.cpu_count()}"
    facts["Versions"] = f"genfast {genfast.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    if not trained:
        facts["Intervals"] = "95%, by the central limit theorem, over the images that were measured"
        return facts
    facts["Intervals"] = (
        "95%, by a bootstrap over the images that were evaluated, of shares Wilson's. Two numbers are told apart where "
        "their intervals do not meet, or, of the same images, where that of their difference is without 0; intervals "
        "may then overlap. "
        "There is one training of each model (one seed), so they do not hold the spread between trainings"
    )
    return facts
