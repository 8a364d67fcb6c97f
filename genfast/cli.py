"""The command line: train, sample, evaluate, info, check, bench."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import genfast
from genfast import random, report, training
from genfast._files import replacing
from genfast.bench import cli as bench
from genfast.models import registry

__all__ = ["ClickException", "app"]

# Older versions of typer take it from click, newer ones have their own.
ClickException = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    help="Generative models with fused kernels: train, look, measure.", add_completion=False, rich_markup_mode=None
)
app.add_typer(bench.app, name="bench")

_RUN_FILES = (
    "run.json", "config.json", "model.safetensors", "metrics.jsonl", "samples.png", "reconstructions.png",
    "curves.png", "manifold.png", "interpolation.png", "evaluation.json", "samples-*.png",
)  # fmt: skip
# Without --epochs: this many images in all, within these bounds.
_IMAGES_SEEN = 250_000
_EPOCHS = (10, 100)


def _seed(value: int) -> int:
    if not -(2**63) <= value < 2**64:
        raise typer.BadParameter(f"expected at most 64 bits, got {value}")
    return value


Device = Annotated[str, typer.Option(help="auto (a CUDA GPU if there is one), cpu, cuda, cuda:1, ...")]
Data = Annotated[str | None, typer.Option(help=f"{', '.join(training.DATASETS)} or a folder of images.")]
DataRoot = Annotated[Path | None, typer.Option(help="Where the named sets lie; else GENFAST_DATA, else a cache.")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Scale and crop all images to this height and width.")]
Binarize = Annotated[str | None, typer.Option(help="none, threshold or dynamic (drawn anew each epoch).")]
Run = Annotated[Path, typer.Argument(help="Folder of a run, as train writes it.", show_default=False)]


@app.callback(invoke_without_command=True)
def root(context: typer.Context, show_version: Annotated[bool, typer.Option("--version")] = False) -> None:
    """Without a command: the help, or the version."""
    if show_version:
        print(genfast.__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def train(
    family: Annotated[str, typer.Argument(help=f"Model family: {', '.join(registry.FAMILIES)}.", show_default=False)],
    data: Data = "digits",
    data_root: DataRoot = None,
    image_size: ImageSize = None,
    binarize: Binarize = "none",
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help=f"Default: about {_IMAGES_SEEN:,} images in all, {_EPOCHS[0]} to {_EPOCHS[1]}."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    latent_dim: Annotated[int | None, typer.Option(min=1, help="Size of the latent code.")] = None,
    preset: Annotated[str | None, typer.Option(help="Networks: mlp or conv.")] = None,
    likelihood: Annotated[str | None, typer.Option(help="bernoulli or gaussian.")] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the KL term in training.")] = None,
    free_bits: Annotated[float | None, typer.Option(help="Nats per latent dimension that cost nothing.")] = None,
    fused: Annotated[bool | None, typer.Option(help="Fused ops, or the ordinary PyTorch chain.")] = None,
    seed: Annotated[int, typer.Option(callback=_seed, help="Of initial weights, order and noise.")] = 0,
    device: Device = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the forward pass and the loss.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: a new one in runs/.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that --out holds.")] = False,
) -> None:
    """Train a model; write it, its metrics and pictures into the run's folder."""
    chosen = registry.get_family(family)
    options = {
        "latent_dim": latent_dim, "preset": preset, "likelihood": likelihood, "fused": fused, "beta": beta,
        "free_bits": free_bits,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in (*chosen.build_options, *chosen.loss_options):
            raise ValueError(f"--{name.replace('_', '-')} is not an option of the family {family}")
    build_options = {name: value for name, value in options.items() if name in chosen.build_options}
    loss_options = {name: value for name, value in options.items() if name in chosen.loss_options}
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"--lr: expected a positive number, got {lr}")
    where = _device(device)
    _check_out(out, overwrite)

    splits = training.load_dataset(data, data_root, image_size)
    train_data = training.DeviceDataset(splits.train, where, binarize)
    test_data = training.DeviceDataset(splits.test, where, binarize)
    torch.manual_seed(seed)
    model = chosen.build(train_data.image_shape, **build_options).to(where)
    with torch.no_grad():
        # Whatever the model has against the data or the options comes out here, before anything is written.
        model.loss(train_data.images[:1], seed=0, **loss_options)
    if epochs is None:
        epochs = min(max(math.ceil(_IMAGES_SEEN / len(train_data)), _EPOCHS[0]), _EPOCHS[1])

    folder = _make_folder(out, f"{family}-{splits.name}")
    # A named set's location may be anywhere; a folder of images must be found again from any working directory.
    source = data if data in training.DATASETS else str(Path(data).resolve())
    settings = {
        "genfast": genfast.__version__, "torch": torch.__version__, "family": family, "data": source,
        "data_root": None if data_root is None else str(data_root.resolve()), "image_size": image_size,
        "binarize": binarize, "train_images": len(train_data), "test_images": len(test_data),
        "image_shape": list(train_data.image_shape), "epochs": epochs, "batch_size": batch_size, "lr": lr,
        "seed": seed, "device": str(where), "compile": compile, **options,
    }  # fmt: skip
    run = _RunFolder(folder, settings)
    run.write_settings("running")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    images = f"{len(train_data):,} + {len(test_data):,} images"

    history: list[dict[str, float]] = []

    def keep(row: dict[str, float]) -> None:
        history.append(row)
        run.save(model, history)

    status = "finished"
    try:
        print(f"{family}: {parameters:,} parameters on {where}; {splits.name}: {images}; {folder}", flush=True)
        training.fit(
            model, train_data, test_data=test_data, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed,
            loss_options=loss_options, compile=compile, on_epoch=keep,
        )  # fmt: skip
    except KeyboardInterrupt:
        status = "interrupted"
        if all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            run.save(model, history)
    except FloatingPointError as error:
        kept = f"the model after epoch {len(history)} is in {folder}" if history else "there is no model to keep"
        if run.old:
            kept = f"{folder} still holds the run that it held"
        run.write_settings("diverged")
        raise FloatingPointError(f"{error}; {kept}") from error
    run.write_settings(status)
    if not run.old:
        _write_pictures(model, test_data, folder, history, title=f"{family}, {splits.name}", seed=seed)
    print(f"{status}: {folder}")
    if status == "interrupted":
        raise typer.Exit(130)


@app.command()
def sample(
    run: Run,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="How many images.")] = 64,
    mode: Annotated[str, typer.Option(help="mean, or bernoulli to draw the pixels.")] = "mean",
    seed: Annotated[int, typer.Option(callback=_seed, help="Image i depends on the seed and i alone.")] = 0,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="PNG to write; default: RUN/samples-SEED.png.")] = None,
) -> None:
    """Draw images from a trained model."""
    where = _device(device)
    model = _load(run).to(where)
    path = out or run / f"samples-{seed}.png"
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out: expected a name that ends in .png, got {path}")
    report.save_grid(model.sample(n, mode=mode, seed=seed), path)
    print(path)


@app.command()
def evaluate(
    run: Run,
    data: Data = None,
    data_root: DataRoot = None,
    image_size: ImageSize = None,
    binarize: Binarize = None,
    k: Annotated[int, typer.Option("--k", "-k", min=0, help="Importance samples per image; 0: the ELBO alone.")] = 500,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first images of the test set.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    seed: Annotated[int, typer.Option(callback=_seed, help="Of the noise.")] = 0,
    device: Device = "auto",
) -> None:
    """ELBO and importance-weighted log-likelihood of the test set, in nats per image; the run's own data by default."""
    where = _device(device)
    model = _load(run).to(where).eval()
    settings = _settings(run)
    if data is None:
        if "data" not in settings:
            raise ValueError(f"--data: {run} does not say what it was trained on, so name the data")
        data, image_size = settings["data"], image_size or settings["image_size"]
        data_root = data_root or settings["data_root"]
    binarize = binarize or settings.get("binarize", "none")
    splits = training.load_dataset(data, data_root, image_size)
    test_data = training.DeviceDataset(splits.test[:limit], where, binarize)
    result: dict[str, Any] = {"data": splits.name, "binarize": binarize, "images": len(test_data), "seed": seed}
    result |= training.evaluate(model, test_data, batch_size=batch_size, seed=seed)
    if k and hasattr(model, "log_prob"):
        result |= {"k": k, **_log_likelihood(model, test_data, k, batch_size, seed)}
    for name, value in result.items():
        print(f"{name:>16}  {f'{value:.3f}' if isinstance(value, float) else value}")
    bernoulli = getattr(model, "likelihood", None) == "bernoulli"
    if binarize == "none" and bernoulli and "log_likelihood" in result:
        print("The pixels are grey: under a Bernoulli these nats compare with no others than such of grey pixels.")
    # After the printing: a folder that cannot be written loses nothing.
    with replacing(run / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")


@app.command()
def info() -> None:
    """Show the device, versions, and which path each op takes and why."""
    from genfast import functional

    rows = [("genfast", genfast.__version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    rows += [(name, _version(name)) for name in ("triton", "torchvision")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"sm_{properties.major}{properties.minor}"
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            rows.append((f"cuda:{index}", f"{properties.name}, {capability}, {memory}"))
    else:
        rows.append(("cuda", "not available"))
    rows.append(("cpu", f"{torch.get_num_threads()} threads"))
    rows += [(f"op {name}", f"{path} ({why})") for name, (path, why) in functional.explain_path().items()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


@app.command()
def check(
    ops: Annotated[list[str] | None, typer.Argument(help="Names of ops; all if none.", show_default=False)] = None,
    device: Device = "auto",
) -> None:
    """Compare fused and eager numerics with fp64, op by op."""
    from genfast import check as checks

    raise typer.Exit(checks.main(ops or [], str(_device(device))) or 0)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: {name} cannot be used here ({reason})") from error


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _check_out(out: Path | None, overwrite: bool) -> None:
    """Raise unless `out` can be written, and is free or a run that may be replaced."""
    _check_writable(out or Path("runs"))
    if out is None or not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out: {out} is a file")
    if not any(out.iterdir()):
        return
    if "genfast" not in _settings(out):
        raise ValueError(f"--out: {out} is not empty and not a run of genfast")
    if not overwrite:
        raise ValueError(f"--out: {out} holds a run; name another folder, or add --overwrite")


def _check_writable(folder: Path) -> None:
    """Raise unless a file can be made in `folder`, or in what there is of the way to it."""
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if nearest.is_dir():
            tempfile.TemporaryFile(dir=nearest).close()
        elif nearest != folder:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as error:
        raise ValueError(f"--out: cannot write to {folder} ({error.strerror})") from error


def _make_folder(out: Path | None, name: str) -> Path:
    """The run's folder: `out`, or a new one in runs/."""
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            return out
        for number in count(1):
            folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
            if not folder.exists():
                folder.mkdir(parents=True)
                return folder
    except OSError as error:
        raise ValueError(f"--out: cannot write to {error.filename} ({error.strerror})") from error
    raise AssertionError("unreachable")


class _RunFolder:
    """The files of a run that change while it trains; a run that the folder held stays whole until the first `save`."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.old = [path for pattern in _RUN_FILES for path in folder.glob(pattern)]

    def write_settings(self, status: str) -> None:
        if self.old:
            return
        with replacing(self.folder / "run.json") as temporary:
            temporary.write_text(json.dumps({**self.settings, "status": status}, indent=2) + "\n")

    def save(self, model: torch.nn.Module, history: list[dict[str, float]]) -> None:
        model.save_pretrained(self.folder)
        if self.old:
            for path in self.old:
                if path.name not in ("config.json", "model.safetensors"):
                    path.unlink(missing_ok=True)
            self.old = []
            self.write_settings("running")
        with replacing(self.folder / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in history))


def _settings(run: Path) -> dict[str, Any]:
    """What run.json holds; empty if there is none, or none of ours."""
    try:
        settings = json.loads((run / "run.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _load(run: Path) -> torch.nn.Module:
    if not run.is_dir():
        raise ValueError(f"RUN: expected the folder of a run, got {run}")
    return registry.load(run)


def _write_pictures(
    model: torch.nn.Module,
    data: training.DeviceDataset,
    folder: Path,
    history: list[dict[str, float]],
    title: str,
    seed: int,
) -> None:
    model.eval()
    images, _ = next(data.batches(48, seed=seed, shuffle=False))
    report.save_grid(model.sample(64, seed=seed), folder / "samples.png")
    report.save_pairs(images, model.reconstruct(images), folder / "reconstructions.png")
    if getattr(model, "latent_dim", None) == 2:
        manifold = model.manifold()
        report.save_grid(manifold.flatten(0, 1), folder / "manifold.png", columns=manifold.shape[1], gap=0)
    else:
        paths = model.interpolate(images[:10], images[:10].roll(-1, 0))
        report.save_grid(paths.flatten(0, 1), folder / "interpolation.png", columns=paths.shape[1])
    if history:
        report.save_curves(history, folder / "curves.png", title)


def _log_likelihood(
    model: torch.nn.Module, data: training.DeviceDataset, k: int, batch_size: int, seed: int
) -> dict[str, float]:
    """Mean of log p(x) over the images, and its standard error over them if they are several."""
    # That of the ELBO: both are of the same pixels.
    seed = training.evaluation_seed(seed)
    noise_seed = random.as_seed(seed, data.device)
    values: list[Tensor] = []
    done = 0
    for batch, _ in data.batches(batch_size, seed=seed, shuffle=False):
        values.append(model.log_prob(batch, k, seed=noise_seed, row_offset=done))
        done += len(batch)
        if sys.stdout.isatty():
            print(f"\r{done:,} / {len(data):,} images", end="\r" if done < len(data) else "\n", flush=True)
    log_prob = torch.cat(values).double()
    result = {"log_likelihood": float(log_prob.mean())}
    if len(log_prob) > 1:
        result["standard_error"] = float(log_prob.std()) / math.sqrt(len(log_prob))
    return result
