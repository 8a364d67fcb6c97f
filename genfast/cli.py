"""The command line: train, sample, evaluate, report, info, check, bench."""

from __future__ import annotations

import inspect
import json
import math
import platform
import signal
import sys
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, get_args

import torch
import typer
from torch import Tensor

import genfast
from genfast import pictures, random, report, schedules, training
from genfast._files import replacing
from genfast.bench import cli as bench
from genfast.metrics import Estimate, Likelihood, evaluate_model, frechet, likelihood, load_inception
from genfast.metrics.likelihoods import describe
from genfast.metrics.models import BATCH_SIZE
from genfast.models import registry
from genfast.models.diffusion import DDPM, Variance
from genfast.models.flow_presets import Dequantization, Memory
from genfast.models.gan import Loss as GANLoss
from genfast.run import check_out, make_folder, read_settings
from genfast.train import evaluation_interval, train_into
from genfast.training import loop
from genfast.training.progress import counting, digits
from genfast.training.step import Mode

__all__ = ["ClickException", "app"]

# Older versions of typer take it from click, newer ones have their own.
ClickException = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    help="Generative models with fused kernels: train, look, measure.", add_completion=False, rich_markup_mode=None
)
app.add_typer(bench.app, name="bench")

# Without --epochs: this many images in all, within these bounds.
_IMAGES_SEEN = 250_000
_EPOCHS = (10, 100)
_BATCH_SIZE = 128
# As they are written on the command line: one of them has a hyphen in Python too.
_GAN_LOSSES = {name.replace("_", "-"): name for name in get_args(GANLoss)}
# Images in a video.
_IN_VIDEO = 64
# Samples that are measured: as many as a Frechet distance needs.
_SAMPLES = 2048


def _default(name: str, text: str) -> str:
    """The help of an option, with the defaults of the families that have their own."""
    families = [family for family in registry.FAMILIES.values() if name in family.defaults]
    own = [f"{family.name}: {family.defaults[name]}" for family in families]
    return f"{text} ({', '.join(own)})" if own else text


def _names(values: Iterable[str]) -> tuple[str, ...]:
    """As they are written on the command line."""
    return tuple(value.replace("_", "-") for value in values)


def _seed(value: int) -> int:
    if not -(2**63) <= value < 2**64:
        raise typer.BadParameter(f"expected at most 64 bits, got {value}")
    return value


Device = Annotated[str, typer.Option(help="auto (a CUDA GPU if there is one), cpu, cuda, cuda:1, ...")]
Data = Annotated[str | None, typer.Option(help=f"{', '.join(training.DATASETS)} or a folder of images.")]
DataRoot = Annotated[Path | None, typer.Option(help="Where the named sets lie; else GENFAST_DATA, else a cache.")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Scale and crop all images to this height and width.")]
Binarize = Annotated[str | None, typer.Option(help="none, threshold or dynamic (drawn anew each epoch).")]
Inception = Annotated[
    str | None, typer.Option(help="Measure FID too: a file with torch-fidelity's weights, or download.", metavar="FILE")
]
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
    context: typer.Context,
    family: Annotated[str, typer.Argument(help=f"Model family: {', '.join(registry.FAMILIES)}.", show_default=False)],
    data: Data = "digits",
    data_root: DataRoot = None,
    image_size: ImageSize = None,
    binarize: Binarize = "none",
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=_default("epochs", f"Default: about {_IMAGES_SEEN:,} images in all, {_EPOCHS[0]} to {_EPOCHS[1]}."),
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=_default("batch_size", f"Images per step, of all processes. Default: {_BATCH_SIZE}, or all if fewer."),
        ),
    ] = None,
    micro_batches: Annotated[int, typer.Option(min=1, help="Split each batch; the gradients add up.")] = 1,
    lr: Annotated[float, typer.Option(help=_default("lr", "Learning rate of Adam."))] = 1e-3,
    lr_schedule: Annotated[
        str, typer.Option(help=_default("lr_schedule", "constant; cosine or linear down to 0."))
    ] = "constant",
    warmup_steps: Annotated[
        int, typer.Option(min=0, help=_default("warmup_steps", "Steps in which the learning rate rises."))
    ] = 0,
    grad_clip: Annotated[
        float | None, typer.Option(help=_default("grad_clip", "Largest norm of the gradients."))
    ] = None,
    ema_decay: Annotated[
        float | None, typer.Option(help=_default("ema_decay", "Average the weights, as 0.999; sample from that."))
    ] = None,
    latent_dim: Annotated[int | None, typer.Option(min=1, help="Size of the latent code.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help=_default("preset", "Networks: mlp or conv, of gan dcgan or mlp; else tiny, small or base.")),
    ] = None,
    likelihood: Annotated[str | None, typer.Option(help="bernoulli or gaussian.")] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the KL term in training.")] = None,
    free_bits: Annotated[float | None, typer.Option(help="Nats per latent dimension that cost nothing.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help=_default("schedule", f"Noise over time: {', '.join(_names(schedules.NAMES))}."))
    ] = None,
    num_steps: Annotated[int | None, typer.Option(min=1, help="Steps of the noise schedule.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help=_default(
                "objective", f"What the network predicts: {', '.join(schedules.OBJECTIVES)}; of a --schedule its own."
            )
        ),
    ] = None,
    weighting: Annotated[
        str | None, typer.Option(help=f"Of the loss over time: {', '.join(_names(schedules.WEIGHTINGS))}.")
    ] = None,
    gamma: Annotated[float | None, typer.Option(help="Of min-snr: the largest signal-to-noise ratio counted.")] = None,
    variance: Annotated[
        str | None, typer.Option(help=f"Of the steps back: {', '.join(_names(get_args(Variance)))}.")
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(help=_default("arch", f"Kind of flow: {', '.join(registry.get_family('flow').archs)}.")),
    ] = None,
    dequantization: Annotated[
        str | None, typer.Option(help="Of flows: uniform; variational: learned, as of flowpp; none, to compare.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of flows: ordinary; checkpoint, or reversible: activations are computed again.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help=_default("width", "Of gan: channels of its widest maps."))
    ] = None,
    gan_loss: Annotated[str | None, typer.Option(help=f"Of gan: {', '.join(_GAN_LOSSES)}.")] = None,
    r1: Annotated[float | None, typer.Option(help=_default("r1", "Of gan: weight of the penalty R1; 0: none."))] = None,
    spectral_norm: Annotated[
        bool | None, typer.Option(help="Of gan: spectral normalization of the discriminator.")
    ] = None,
    n_critic: Annotated[
        int | None, typer.Option(min=1, help="Of gan: steps of the discriminator for one of the generator.")
    ] = None,
    fused: Annotated[bool | None, typer.Option(help="Fused ops, or the ordinary PyTorch chain.")] = None,
    seed: Annotated[int, typer.Option(callback=_seed, help="Of initial weights, order and noise.")] = 0,
    device: Device = "auto",
    mode: Annotated[str, typer.Option(help="auto, eager, compile, or graph: each step one CUDA graph.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the loss, in any mode.")] = False,
    amp: Annotated[str | None, typer.Option(help="Autocast to bf16 or fp16.")] = None,
    matmul_precision: Annotated[str | None, typer.Option(help="Of fp32 products: highest, high or medium.")] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Memory format of convolutions.")] = False,
    time: Annotated[float | None, typer.Option(help="Stop after so many seconds.")] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="Stop after evaluations without a better loss.")] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(min=1, help=_default("evaluate_every", "Epochs; default: what costs below 5%."))
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Steps; default: at a cost below 2%.")] = None,
    keep: Annotated[int, typer.Option(min=1, help="How many checkpoints are kept.")] = 2,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write scalars and samples for it.")] = False,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between the scalars of single steps there.")] = 100,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: a new one in runs/.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, with its own options.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that --out holds.")] = False,
) -> None:
    """Train a model; write it, its metrics and pictures into the run's folder. Under torchrun, on many devices."""
    options = SimpleNamespace(**{name: value for name, value in locals().items() if name != "context"})
    given = {name for name in vars(options) if context.get_parameter_source(name).name != "DEFAULT"}
    for name in _NAMED:
        # One spelling, so that a resumed run can compare them.
        if getattr(options, name) is not None:
            setattr(options, name, getattr(options, name).replace("_", "-"))
    if resume and overwrite:
        raise ValueError("--overwrite: expected none with --resume, which continues the run, got both")
    if resume:
        check_out(out, overwrite, resume)
        _take_over(options, read_settings(out), given)
    else:
        for name, value in registry.get_family(family).defaults.items():
            # A batch holds no more than there are images: that is seen later. Another schedule has an objective of its
            # own.
            if name not in given and name != "batch_size" and not (name == "objective" and "schedule" in given):
                setattr(options, name, value)
    with training.launched(_device(device)) as where:
        _train(options, where)


# What may be given anew when a run is resumed: how it is run, how long, and what it leaves.
_FREE = {
    "data_root", "epochs", "micro_batches", "device", "mode", "compile", "matmul_precision", "channels_last", "time",
    "patience", "evaluate_every", "checkpoint_every", "keep", "tensorboard", "log_every", "out", "resume", "overwrite",
}  # fmt: skip
_NOT_TAKEN_OVER = {"device", "time", "out", "resume", "overwrite"}
# Those that not every family has.
_MODEL_OPTIONS = (
    "latent_dim", "preset", "likelihood", "fused", "beta", "free_bits", "schedule", "num_steps", "objective",
    "weighting", "gamma", "variance", "arch", "dequantization", "memory", "width", "gan_loss", "r1", "spectral_norm",
    "n_critic",
)  # fmt: skip
# Those whose values are names, with hyphens here and underscores in Python.
_NAMED = ("schedule", "weighting", "variance", "gan_loss")
# Options that have another name on the command line, where a loss is one of many things.
_ARGUMENTS = {"gan_loss": "loss"}
_AMP = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
_CHOICES = {
    "lr_schedule": get_args(loop.Schedule), "mode": get_args(Mode), "amp": tuple(filter(None, _AMP)),
    "matmul_precision": get_args(loop.Precision), "schedule": _names(schedules.NAMES),
    "objective": schedules.OBJECTIVES, "weighting": _names(schedules.WEIGHTINGS),
    "variance": _names(get_args(Variance)), "arch": tuple(registry.get_family("flow").archs),
    "dequantization": get_args(Dequantization), "memory": get_args(Memory), "gan_loss": tuple(_GAN_LOSSES),
}  # fmt: skip


def _take_over(options: SimpleNamespace, saved: dict[str, Any], given: set[str]) -> None:
    """Give a resumed run the options that it had, where the command line gives none."""
    options.data = _source(options.data)
    for name, value in vars(options).items():
        if name not in saved or name in _NOT_TAKEN_OVER:
            continue
        if name not in given:
            setattr(options, name, Path(saved[name]) if name == "data_root" and saved[name] else saved[name])
        elif name not in _FREE and value != saved[name]:
            spelled = "family" if name == "family" else f"--{name.replace('_', '-')}"
            raise ValueError(f"--resume: {spelled}: expected that of the run, {saved[name]}, got {value}")


def _source(data: str) -> str:
    """A named set's location may be anywhere; a folder of images must be found again from any working directory."""
    return data if data in training.DATASETS else str(Path(data).resolve())


def _train(options: SimpleNamespace, where: torch.device) -> None:
    """What `train` does, in each of the processes; the first one alone writes and speaks."""
    first = training.ranks()[0] == 0
    chosen = registry.get_family(options.family)
    set_here = {name: getattr(options, name) for name in _MODEL_OPTIONS if getattr(options, name) is not None}
    for name in set_here:
        if _ARGUMENTS.get(name, name) not in (*chosen.build_options, *chosen.loss_options):
            raise ValueError(f"--{name.replace('_', '-')} is not an option of the family {options.family}")
    for name in _NAMED:
        if name in set_here:
            given = set_here.pop(name)
            set_here[_ARGUMENTS.get(name, name)] = _GAN_LOSSES.get(given, given.replace("-", "_"))
    build_options = {name: value for name, value in set_here.items() if name in chosen.build_options}
    loss_options = {name: value for name, value in set_here.items() if name in chosen.loss_options}
    _check_values(options)
    if options.mode == "graph" and where.type != "cuda":
        raise ValueError(f"--mode: expected a CUDA device for graph, got {where}")
    if first and not options.resume:
        check_out(options.out, options.overwrite, options.resume)

    with training.local_rank_first():
        # One process of a machine downloads what is missing.
        splits = training.load_dataset(options.data, options.data_root, options.image_size)
    train_data = training.DeviceDataset(splits.train, where, options.binarize)
    test_data = training.DeviceDataset(splits.test, where, options.binarize)
    shard = training.ranks()
    if options.batch_size is None:
        most = min(chosen.defaults.get("batch_size", _BATCH_SIZE), len(train_data))
        options.batch_size = most // shard[1] * shard[1] or shard[1]
    # Here rather than in `fit`: before anything is written.
    training.ImageBatches(train_data, options.batch_size, where, train=True, shard=shard)
    torch.manual_seed(options.seed)
    model = chosen.build(train_data.image_shape, **build_options).to(where)
    with torch.no_grad():
        # Whatever the model has against the data or the options comes out here, before anything is written.
        model.loss(train_data.images[:1].to(where), seed=0, **loss_options)
    if options.evaluate_every is None:
        options.evaluate_every = evaluation_interval(train_data, test_data)
    if options.epochs is None:
        options.epochs = min(max(math.ceil(_IMAGES_SEEN / len(train_data)), _EPOCHS[0]), _EPOCHS[1])

    folder = make_folder(options.out, f"{options.family}-{splits.name}") if first else None
    folder = training.from_first(folder)
    kept_options = {name: value for name, value in vars(options).items() if name not in ("out", "resume", "overwrite")}
    settings = {
        "genfast": genfast.__version__, "torch": torch.__version__, **kept_options, "data": _source(options.data),
        "data_root": None if options.data_root is None else str(options.data_root.resolve()), "device": str(where),
        "train_images": len(train_data), "test_images": len(test_data), "image_shape": list(train_data.image_shape),
    }  # fmt: skip
    try:
        status, code, _ = train_into(
            folder, model, train_data, test_data, settings, name=options.family, data_name=splits.name,
            title=f"{options.family}, {Path(options.data).name}", resume=options.resume,
            tensorboard=options.tensorboard, evaluate_every=options.evaluate_every, epochs=options.epochs,
            batch_size=options.batch_size, micro_batches=options.micro_batches, lr=options.lr,
            lr_schedule=options.lr_schedule, warmup_steps=options.warmup_steps, grad_clip=options.grad_clip,
            ema_decay=options.ema_decay, amp_dtype=_AMP[options.amp], matmul_precision=options.matmul_precision,
            channels_last=options.channels_last, mode=options.mode, compile=options.compile, seed=options.seed,
            loss_options=loss_options, keep=options.keep, checkpoint_every=options.checkpoint_every,
            time_limit=options.time, patience=options.patience, log_every=options.log_every,
        )  # fmt: skip
    except KeyboardInterrupt:
        if first:
            print(f"interrupted: {folder}")
        raise typer.Exit(128 + signal.SIGINT) from None
    if first:
        if status == "interrupted":
            print(f"to go on: genfast train {options.family} --out {folder} --resume")
        print(f"{status}: {folder}")
    if code:
        raise typer.Exit(code)


def _check_values(options: SimpleNamespace) -> None:
    """Here rather than in `fit`: before anything is written."""
    for name in ("lr", "grad_clip", "time"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"--{name.replace('_', '-')}: expected a positive number, got {value}")
    if options.ema_decay is not None and not 0 < options.ema_decay < 1:
        raise ValueError(f"--ema-decay: expected a number between 0 and 1, got {options.ema_decay}")
    for name, choices in _CHOICES.items():
        if getattr(options, name) not in (None, *choices):
            expected = f"expected one of {', '.join(choices)}, got {getattr(options, name)}"
            raise ValueError(f"--{name.replace('_', '-')}: {expected}")


@app.command()
def sample(
    run: Run,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="How many images.")] = 64,
    mode: Annotated[str | None, typer.Option(help="Of autoencoders: mean, or bernoulli to draw the pixels.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="Of ddpm: ddpm or ddim; of a continuous schedule euler. Default: ddim or euler.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of ddpm: how many steps. Default: 50; with --sampler ddpm all.")
    ] = None,
    eta: Annotated[float | None, typer.Option(help="Of ddpm: the noise of ddim and euler, 0 (none) to 1.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of flows: standard deviation of the latent codes. Default: 1.")
    ] = None,
    seed: Annotated[int, typer.Option(callback=_seed, help="Image i depends on the seed and i alone.")] = 0,
    video: Annotated[bool, typer.Option("--video", help="Of ddpm: how they come about: mp4, gif and png.")] = False,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="PNG to write; default: RUN/samples-SEED.png.")] = None,
) -> None:
    """Draw images from a trained model."""
    where = _device(device)
    model = _load(run).to(where)
    path = out or run / f"samples-{seed}.png"
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out: expected a name that ends in .png, got {path}")
    options = {"mode": mode, "sampler": sampler, "steps": steps, "eta": eta, "temperature": temperature}
    options = {name: value for name, value in options.items() if value is not None}
    for name in (*options, *(["video"] if video else [])):
        if ("trajectory" if name == "video" else name) not in inspect.signature(model.sample).parameters:
            raise ValueError(f"--{name} is not an option of the family {_family(model)}")
    if isinstance(model, DDPM):
        if sampler == "ddpm":
            options.setdefault("steps", None)
        _sample_diffusion(model, n, seed, path, {**model.quick_sampling(), **options}, video)
    else:
        report.save_grid(model.sample(n, seed=seed, **options), path)
    print(path)


def _sample_diffusion(model: DDPM, n: int, seed: int, path: Path, options: dict[str, Any], video: bool) -> None:
    if not video:
        report.save_grid(pictures.draw(model, n, seed=seed, **options), path)
        return
    report.find_ffmpeg()
    shown = min(n, _IN_VIDEO)
    frames = pictures.draw(model, shown, seed=seed, paths=True, **options)
    rest = [pictures.draw(model, n - shown, seed=seed, row_offset=shown, **options)] if n > shown else []
    report.save_grid(torch.cat([frames[-1], *rest]), path)
    name = path.stem.replace("samples", "reverse") if path.stem.startswith("samples-") else f"{path.stem}-reverse"
    for suffix in (".mp4", ".gif"):
        report.save_video(frames, path.with_name(name + suffix))
        print(path.with_name(name + suffix))
    pictures.save_paths(frames, model.schedule.timesteps(options["steps"]), path.with_name(f"{name}.png"))
    print(path.with_name(f"{name}.png"))


@app.command()
def evaluate(
    run: Run,
    data: Data = None,
    data_root: DataRoot = None,
    image_size: ImageSize = None,
    binarize: Binarize = None,
    k: Annotated[
        int | None,
        typer.Option("--k", "-k", min=0, help="Of a VAE: importance samples per image, 500; 0: the ELBO alone."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of ddpm: steps of the bound. Default: all of the schedule.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score only the first images of the test set (--metrics: all).")
    ] = None,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Measure samples, codes and speed too; see docs/metrics.md.")
    ] = False,
    samples: Annotated[
        int | None, typer.Option(min=4, help=f"Of --metrics: how many are drawn. Default: {_SAMPLES:,}.")
    ] = None,
    inception: Inception = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    seed: Annotated[int, typer.Option(callback=_seed, help="Of the noise.")] = 0,
    device: Device = "auto",
) -> None:
    """Score the test set, the run's own by default.

    VAE: ELBO and importance-weighted log-likelihood, in nats per image. Diffusion: loss, and the variational bound on
    the negative log-likelihood, in bits per dimension. Flows: those bits, and the error of the inverse.
    """
    if metrics:
        # Now rather than after the minutes that the rest takes.
        frechet.check_installed()
    elif samples is not None:
        raise ValueError(f"--samples: expected together with --metrics, got {samples} alone")
    elif inception is not None:
        raise ValueError(f"--inception: expected together with --metrics, got {inception!r} alone")
    where = _device(device)
    model = _load(run).to(where).eval()
    for name, method, value in (("k", "log_prob", k), ("steps", "bits_per_dim", steps)):
        if value is not None and not _takes(model, method, name):
            raise ValueError(f"--{name} is not an option of the family {_family(model)}")
    k = 500 if k is None else k
    settings = read_settings(run)
    if data is None:
        if "data" not in settings:
            raise ValueError(f"--data: {run} does not say what it was trained on, so name the data")
        data, image_size = settings["data"], image_size or settings["image_size"]
        data_root = data_root or settings["data_root"]
    binarize = binarize or settings.get("binarize", "none")
    splits = training.load_dataset(data, data_root, image_size)
    test_data = training.DeviceDataset(splits.test[:limit], where, binarize)
    # Now rather than after the minutes that the rest takes.
    network = None if inception is None else load_inception(inception, where)
    result: dict[str, Any] = {"data": splits.name, "binarize": binarize, "images": len(test_data), "seed": seed}
    result |= training.evaluate(model, test_data, batch_size=batch_size, seed=seed)
    values: dict[int | None, Tensor] = {}
    if k and _takes(model, "log_prob", "k"):
        values[k] = _log_likelihood(model, test_data, k, batch_size, seed)
        result |= {"k": k, **_mean("log_likelihood", values[k])}
    if hasattr(model, "bits_per_dim"):
        count, values[None] = _bits_per_dim(model, test_data, steps, batch_size, seed)
        result |= {} if count is None else {"steps": count}
        result |= _mean("bits_per_dim", values[None])
    for name, value in result.items():
        print(f"{name:>16}  {digits(value, 3) if isinstance(value, float) else value}")
    bernoulli = getattr(model, "likelihood", None) == "bernoulli"
    if binarize == "none" and bernoulli and "log_likelihood" in result:
        print("The pixels are grey: under a Bernoulli these nats compare with no others than such of grey pixels.")
    if inception is not None:
        result["inception"] = inception
    if metrics:
        steps = result.get("steps")
        result["metrics"] = _metrics(model, splits, test_data, values, samples or _SAMPLES, seed, steps, network)
    # After the printing: a folder that cannot be written loses nothing.
    with replacing(run / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")


@app.command()
def experiment(
    name: Annotated[str | None, typer.Argument(help="Which; if none, they are listed.", show_default=False)] = None,
    data: Data = "digits",
    data_root: DataRoot = None,
    image_size: ImageSize = None,
    budget: Annotated[
        float | None, typer.Option(help="Minutes of training, of all its models together. Default: its own.")
    ] = None,
    inception: Inception = None,
    seed: Annotated[int, typer.Option(callback=_seed, help="Of initial weights, order and noise.")] = 0,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder of its page and runs; default: experiments/NAME.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the experiment that --out holds.")] = False,
) -> None:
    """Train and compare models to answer one question; write a page with pictures and tables.

    The same command goes on where an earlier one was stopped.
    """
    from genfast.experiments import EXPERIMENTS, Settings, run_experiment

    if name is None:
        width = max(map(len, EXPERIMENTS))
        for each in EXPERIMENTS.values():
            print(f"{each.name:<{width}}  {each.summary} ({each.default_budget_minutes:g} min)")
        return
    if name not in EXPERIMENTS:
        raise ValueError(f"NAME: expected one of {', '.join(EXPERIMENTS)}, got {name!r}")
    budget = EXPERIMENTS[name].default_budget_minutes if budget is None else budget
    where = str(_device(device))
    out = out or Path("experiments") / name
    settings = Settings(
        out, 60 * budget, data=_source(data), data_root=data_root, image_size=image_size, seed=seed, device=where,
        inception=inception,
    )
    try:
        page = run_experiment(name, settings, overwrite)
    except KeyboardInterrupt:
        print(f"interrupted: {out}; the same command goes on from there")
        raise typer.Exit(128 + signal.SIGINT) from None
    for statement in page.statements:
        print(f"- {statement}")
    print(out / "README.md")


@app.command("report")
def write_report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.", show_default=False)],
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("report.html"),
    sort: Annotated[str | None, typer.Option(help="Metric that orders the tables, the best first.")] = None,
) -> None:
    """Write one HTML page about runs: tables to sort, samples side by side, curves, settings; no network is needed.

    First: genfast evaluate RUN --metrics, for each of them.
    """
    from genfast import html_report

    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out: expected a name that ends in .html, got {out}")
    for note in html_report.write_report(runs, out, sort):
        print(note)
    print(out)


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


def _family(model: torch.nn.Module) -> str:
    return next(family.name for family in registry.FAMILIES.values() if type(model) in family.classes)


def _takes(model: torch.nn.Module, method: str, argument: str) -> bool:
    return hasattr(model, method) and argument in inspect.signature(getattr(model, method)).parameters


def _load(run: Path) -> torch.nn.Module:
    if not run.is_dir():
        raise ValueError(f"RUN: expected the folder of a run, got {run}")
    return registry.load(run)


def _metrics(
    model: torch.nn.Module,
    splits: training.Splits,
    test_data: training.DeviceDataset,
    values: dict[int | None, Tensor],
    samples: int,
    seed: int,
    steps: int | None,
    inception: torch.nn.Module | None,
) -> dict[str, Any]:
    """Measure and print; what JSON can hold. `values`: of the likelihood, by the draws for each image; in `steps`."""
    options, calls = {}, nullcontext()
    if isinstance(model, DDPM):
        options = model.quick_sampling()
        what = f"drawing {samples:,} images in {options['steps']} steps of {options['sampler']} (--samples)"
        calls = counting(model.net, options["steps"] * (-(-samples // BATCH_SIZE) + 1), what)
    with calls, warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: print(message)
        measured = evaluate_model(
            model, splits, samples=samples, binarize=test_data.binarize, seed=seed, inception=inception, **options
        )
    found: dict[str, Estimate | Likelihood] = dict(measured)
    if _takes(model, "log_prob", "k"):
        found["elbo"] = likelihood(model, test_data, seed=seed, dataset=splits.name)
    for k, each in values.items():
        described = describe(model, each, test_data.binarize, k, steps, splits.name)
        found[described.kind] = described
    for name, value in found.items():
        size = f"  n = {value.n:,}" if isinstance(value, Estimate) and value.n else ""
        print(f"{name:>16}  {value}{size}")
    return {name: value.to_dict() for name, value in found.items()}


def _log_likelihood(
    model: torch.nn.Module, data: training.DeviceDataset, k: int, batch_size: int, seed: int
) -> Tensor:
    """log p(x) of each image, in nats."""
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
    return torch.cat(values)


def _bits_per_dim(
    model: torch.nn.Module, data: training.DeviceDataset, steps: int | None, batch_size: int, seed: int
) -> tuple[int | None, Tensor]:
    """-log2 p(x) per dimension of each image, or a bound, and in how many steps if there are any."""
    seed = training.evaluation_seed(seed)
    noise_seed = random.as_seed(seed, data.device)
    if not _takes(model, "bits_per_dim", "steps"):
        pieces = data.batches(batch_size, seed=seed, shuffle=False)
        with torch.no_grad():
            values = [model.bits_per_dim(x, seed=noise_seed, row_offset=int(rows[0])) for x, rows in pieces]
        return None, torch.cat(values)
    count = len(model.schedule.timesteps(steps)) - 1
    what = f"bounding the bits per dimension of {len(data):,} images in {count:,} steps (--limit, --steps)"
    values: list[Tensor] = []
    with counting(model.net, count * -(-len(data) // batch_size), what):
        for batch, rows in data.batches(batch_size, seed=seed, shuffle=False):
            values.append(model.bits_per_dim(batch, steps=steps, seed=noise_seed, row_offset=int(rows[0])))
    return count, torch.cat(values)


def _mean(name: str, values: Tensor) -> dict[str, float]:
    """The mean over all images, and its standard error where they are several."""
    values = values.double()
    result = {name: float(values.mean())}
    if len(values) > 1:
        result["standard_error"] = float(values.std()) / math.sqrt(len(values))
    return result
