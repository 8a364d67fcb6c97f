"""Measures what docs/reproducibility.md says: `python -m tests.reproducibility --page docs/reproducibility.md`.

Each row runs one thing in two ways, with genfast and then as a careful script does it with torch: the same VAE and
loss, its noise from torch.randn. The figure is the largest difference between the two ways.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import itertools
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

import genfast
from genfast import cases, functional
from genfast._files import between_markers, replacing
from genfast.bench.machine import machine_name
from genfast.capture import Captured
from genfast.random import as_seed
from genfast.training import DeviceDataset, TrainStep, evaluate, fit, launched, load_dataset, ranks
from genfast.training.distributed import add_up, data_parallel

ROOT = Path(__file__).parents[1]
START, END = "<!-- reproducibility: start -->\n", "<!-- reproducibility: end -->"
HEAD = ("run", "figure", "genfast", "torch", "torch, another way")
WITH = " with "
NOT_MEASURED = "not measured: needs a GPU"
EXACT = "0, bit for bit"

# A process that hangs shows where, and ends.
PATIENCE = 300

SEED = 3
SHOWN, TRAINED = 64, 1280
BATCH, EPOCHS, LATENT = 64, 2, 20
# In the middle of the second epoch: a checkpoint every five steps, and the end in between.
SAVED_AT, DIED_AT = 25, 28

_REFERENCE = cases.TOLERANCES["reference"][torch.float32]
_ON_GPU = cases.TOLERANCES["triton"][torch.float32]


@dataclass(frozen=True)
class Kind:
    """What a figure counts.

    Attributes:
        name: as the page calls it.
        unit: of `Figure.value`.
        bound: what is rounding and not another result: of `Figure.relative` if there is one, else of `Figure.value`.
    """

    name: str
    unit: str
    bound: float


# Pixels are at most 1.
IMAGES = Kind("images", "", _REFERENCE.rtol + _REFERENCE.atol)
IMAGES_ON_GPU = Kind("images", "", _ON_GPU.rtol + _ON_GPU.atol)
NOISE = Kind("noise", "", _REFERENCE.atol)
LOSSES = Kind("losses", " nats", cases.LOSS.rtol)
GRADIENTS = Kind("gradients, relative", "", cases.LOSS.rtol)
WEIGHTS = Kind("weights", "", 0.0)
REPEATED = Kind("repeated images", f" of {SHOWN}", 0.0)
ORDER = Kind("batches of other images", f" of {TRAINED // BATCH}", 0.0)


@dataclass(frozen=True)
class Figure:
    """The largest difference between two runs; `relative` to the size of what is compared, if that may be any."""

    value: float
    relative: float | None = None

    @property
    def compared(self) -> float:
        """What `Kind.bound` is about."""
        return self.value if self.relative is None else self.relative


@dataclass(frozen=True)
class Row:
    """One thing run in two ways.

    Attributes:
        case: the two ways.
        kind: what is compared.
        genfast, torch: None where this machine cannot run it.
        other: what torch can be told to do instead, and the figure then.
        exact: genfast's difference is zero by construction.
    """

    case: str
    kind: Kind
    genfast: Figure | None = None
    torch: Figure | None = None
    other: tuple[str, Figure | None] | None = None
    exact: bool = False


def measure() -> list[Row]:
    """Every row of the page, in its order."""
    images = DeviceDataset(load_dataset("digits").train[:TRAINED], binarize="threshold").images
    torch.manual_seed(SEED)
    model = genfast.VAE(latent_dim=LATENT)
    fit(model, images, epochs=1, seed=SEED, progress=False)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return [
        *_batch_sizes(weights, images),
        *_many_ranks(weights, images),
        *_micro_batches(weights, images),
        *_resumed(weights, images),
        *_compiled(weights, images),
        *_graph(weights, images),
        *_on_gpu(weights, images),
    ]


def _batch_sizes(weights: dict[str, Tensor], images: Tensor) -> Iterator[Row]:
    ours, theirs = _model(weights), _model(weights, fused=False)
    shown = images[:SHOWN]

    def noise(size: int) -> Tensor:
        zeros = torch.zeros(size, LATENT)
        starts = range(0, SHOWN, size)
        return torch.cat([functional.reparameterize_kl(zeros, zeros, seed=SEED, row_offset=i)[0] for i in starts])

    def samples(size: int) -> Tensor:
        return torch.cat([ours.sample(size, seed=SEED, row_offset=i) for i in range(0, SHOWN, size)])

    def torch_noise(size: int) -> Tensor:
        torch.manual_seed(SEED)
        return torch.cat([torch.randn(size, LATENT) for _ in range(0, SHOWN, size)])

    def torch_samples(noise: Tensor, size: int) -> Tensor:
        with torch.no_grad():
            return torch.cat([theirs.decode(codes) for codes in noise.split(size)])

    def loss(size: int) -> list[float]:
        return [evaluate(ours, DeviceDataset(shown), batch_size=size, seed=SEED)["loss"]]

    def torch_loss(size: int) -> list[float]:
        torch.manual_seed(SEED)
        with torch.no_grad():
            parts = [float(theirs.loss(piece)["loss"]) for piece in shown.split(size)]
        return [sum(parts) / len(parts)]

    at_once = torch_noise(SHOWN)
    torch_shown = torch_samples(at_once, SHOWN)
    how = "`randn` for all, sliced"
    for size in (8, 1):
        case = f"batches of {size}, not {SHOWN}"
        apart = torch_noise(size)
        yield Row(case, NOISE, _furthest(noise(size), noise(SHOWN)), _furthest(apart, at_once), exact=True)
        yield Row(
            case, IMAGES, _furthest(samples(size), samples(SHOWN)),
            _furthest(torch_samples(apart, size), torch_shown),
            (how, _furthest(torch_samples(at_once, size), torch_shown)),
        )  # fmt: skip
        yield Row(case, LOSSES, _losses(loss(size), loss(SHOWN)), _losses(torch_loss(size), torch_loss(SHOWN)))


def _many_ranks(weights: dict[str, Tensor], images: Tensor) -> Iterator[Row]:
    one = _on_these_ranks(weights, images)
    with tempfile.TemporaryDirectory() as folder:
        torch.save((weights, images), Path(folder, "input.pt"))
        for world in (2, 4):
            subprocess.run(
                [
                    sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
                    "-m", "tests.reproducibility", "--ranks", folder,
                ],
                cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True,
            )  # fmt: skip
            many = torch.load(Path(folder, f"{world}.pt"))
            case, how = f"{world} ranks, not 1", "`manual_seed(seed + rank)`"

            def compared(kind: Kind, way: str, many: dict[str, Any] = many) -> Figure:
                if kind is IMAGES:
                    return _furthest(many[way]["images"], one[way]["images"])
                if kind is LOSSES:
                    return _losses(many[way]["losses"], one[way]["losses"])
                distinct = torch.unique(many[way]["images"].flatten(1), dim=0)
                return Figure(SHOWN - len(distinct))

            for kind in (IMAGES, REPEATED, LOSSES):
                ours, theirs, other = (compared(kind, way) for way in ("genfast", "one seed", "seed + rank"))
                yield Row(case, kind, ours, theirs, (how, other), exact=kind is REPEATED)
            how = "`DistributedSampler` on 1 as well"
            yield Row(
                case, ORDER, _other_batches(_our_batches(images, world), _our_batches(images, 1)),
                _other_batches(_sampler_batches(world), _shuffled_batches()),
                (how, _other_batches(_sampler_batches(world), _sampler_batches(1))), exact=True,
            )  # fmt: skip


def _on_these_ranks(weights: dict[str, Tensor], images: Tensor) -> dict[str, dict[str, Any]]:
    """Images and losses of all ranks together, in each of three ways."""
    rank, world = ranks()
    share = SHOWN // world
    ours, theirs = _model(weights), _model(weights, fused=False)
    result = {
        "genfast": {
            "images": _gathered(ours.sample(share, seed=SEED, row_offset=rank * share)),
            "losses": _our_training(weights, images)[0],
        }
    }
    for way, seed in (("one seed", SEED), ("seed + rank", SEED + rank)):
        torch.manual_seed(seed)
        with torch.no_grad():
            samples = theirs.decode(torch.randn(share, LATENT)).reshape(-1, *theirs.image_shape)
        losses = _means(_torch_training(weights, images, seed=seed)[0])
        result[way] = {"images": _gathered(samples), "losses": losses}
    return result


def _gathered(tensor: Tensor) -> Tensor:
    _, world = ranks()
    if world == 1:
        return tensor
    pieces = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(pieces, tensor)
    return torch.cat(pieces)


def _our_batches(images: Tensor, world: int) -> list[set[int]]:
    data = DeviceDataset(images)
    parts = [data.batches(BATCH, seed=SEED, epoch=1, shard=(rank, world)) for rank in range(world)]
    return [{int(row) for _, rows in batch for row in rows} for batch in zip(*parts, strict=True)]


def _sampler_batches(world: int) -> list[set[int]]:
    """Which images all ranks together see at each step."""
    samplers = [DistributedSampler(range(TRAINED), world, rank, seed=SEED) for rank in range(world)]
    parts = [DataLoader(range(TRAINED), BATCH // world, sampler=sampler) for sampler in samplers]
    return [set(torch.cat(batch).tolist()) for batch in zip(*parts, strict=True)]


def _shuffled_batches() -> list[set[int]]:
    torch.manual_seed(SEED)
    return [set(batch.tolist()) for batch in DataLoader(range(TRAINED), BATCH, shuffle=True)]


def _other_batches(some: list[set[int]], others: list[set[int]]) -> Figure:
    return Figure(sum(one != other for one, other in zip(some, others, strict=True)))


def _micro_batches(weights: dict[str, Tensor], images: Tensor) -> Iterator[Row]:
    size = 2 * BATCH

    def gradients(pieces: int) -> list[Tensor]:
        model = _model(weights)
        step = TrainStep(model, torch.optim.Adam(model.parameters()), micro_batches=pieces)
        step(images[:size], seed=SEED)
        return [parameter.grad for parameter in model.parameters()]

    def torch_gradients(pieces: int) -> list[Tensor]:
        model = _model(weights, fused=False)
        torch.manual_seed(SEED)
        _torch_backward(model.loss, images[:size], pieces)
        return [parameter.grad for parameter in model.parameters()]

    def losses(pieces: int) -> list[float]:
        return _our_training(weights, images, batch_size=size, micro_batches=pieces)[0]

    def torch_losses(pieces: int) -> list[float]:
        return _means(_torch_training(weights, images, batch_size=size, micro_batches=pieces)[0])

    whole, torch_whole = gradients(1), torch_gradients(1)
    whole_losses, torch_whole_losses = losses(1), torch_losses(1)
    for pieces, sizes in ((4, "4 x 32 rows"), (5, "5 x 25 or 26 rows")):
        case = f"{sizes}, not 1 x {size}"
        ours, theirs = _gradients(gradients(pieces), whole), _gradients(torch_gradients(pieces), torch_whole)
        yield Row(case, GRADIENTS, ours, theirs)
        ours, theirs = _losses(losses(pieces), whole_losses), _losses(torch_losses(pieces), torch_whole_losses)
        yield Row(case, LOSSES, ours, theirs)


class _Killed(Exception):
    """What happens to a run in the middle of an epoch."""


class _Mortal:
    """A loss that counts its calls, and kills the run at one of them."""

    def __init__(self, model: genfast.VAE, dies_at: int | None = None) -> None:
        self.loss, self.dies_at, self.calls = model.loss, dies_at, 0
        model.loss = self

    def __call__(self, *arguments: Any, **options: Any) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == self.dies_at:
            raise _Killed
        return self.loss(*arguments, **options)


def _resumed(weights: dict[str, Tensor], images: Tensor) -> Iterator[Row]:
    case = "resumed in mid-epoch, not in one go"
    whole_losses, whole = _our_training(weights, images)
    dying, resumed = _model(weights), _model(weights)
    _Mortal(dying, DIED_AT)
    rest = _Mortal(resumed)
    with tempfile.TemporaryDirectory() as folder:
        options = {"checkpoints": folder, "checkpoint_every": 5}
        with suppress(_Killed):
            _our_training(weights, images, dying, **options)
        losses, _ = _our_training(weights, images, resumed, resume=True, **options)
    if rest.calls != EPOCHS * TRAINED // BATCH - SAVED_AT:
        raise RuntimeError(f"resume: expected a run that goes on after step {SAVED_AT}, got one of {rest.calls} steps")

    torch_whole_losses, torch_whole, saved = _torch_training(weights, images, save_at=SAVED_AT)
    usual_losses, usual, _ = _torch_training(weights, images, saved=saved | {"random": None})
    other_losses, other, _ = _torch_training(weights, images, saved=saved)
    how = "`get_rng_state()` saved"
    yield Row(
        case, LOSSES, _losses(losses, whole_losses), _losses(_means(usual_losses), _means(torch_whole_losses)),
        (how, _losses(_means(other_losses), _means(torch_whole_losses))), exact=True,
    )  # fmt: skip
    yield Row(
        case, WEIGHTS, _furthest(_flat(resumed), _flat(whole)), _furthest(_flat(usual), _flat(torch_whole)),
        (how, _furthest(_flat(other), _flat(torch_whole))), exact=True,
    )  # fmt: skip


def _compiled(weights: dict[str, Tensor], images: Tensor) -> Iterator[Row]:
    case, how = "compiled (Inductor, CPU), not eager", "`fallback_random`"
    # A tensor, as `Model.compile` makes of it: an int is a constant, which takes the C++ compiler five times as long.
    zeros, seed = torch.zeros(SHOWN, LATENT), as_seed(SEED)

    def noise(zeros: Tensor, seed: Tensor) -> Tensor:
        return functional.reparameterize_kl(zeros, zeros, seed=seed)[0]

    def draw(zeros: Tensor) -> Tensor:
        return torch.randn_like(zeros)

    def seeded(function: Any) -> Tensor:
        torch.manual_seed(SEED)
        return function(zeros)

    eager = _our_training(weights, images)[0]
    torch_eager_losses = _means(_torch_training(weights, images)[0])
    torch_eager = seeded(draw)
    compiled = _our_training(weights, images, compile=True)[0]
    usual_losses = _means(_torch_training(weights, images, compiled=True)[0])
    usual = seeded(torch.compile(draw))
    torch._dynamo.reset()
    with torch._inductor.config.patch(fallback_random=True):
        other_losses = _means(_torch_training(weights, images, compiled=True)[0])
        other = seeded(torch.compile(draw))
    torch._dynamo.reset()
    yield Row(
        case, NOISE, _furthest(torch.compile(noise)(zeros, seed), noise(zeros, seed)), _furthest(usual, torch_eager),
        (how, _furthest(other, torch_eager)),
    )  # fmt: skip
    yield Row(
        case, LOSSES, _losses(compiled, eager), _losses(usual_losses, torch_eager_losses),
        (how, _losses(other_losses, torch_eager_losses)),
    )  # fmt: skip


def _graph(weights: dict[str, Tensor], images: Tensor) -> Iterator[Row]:
    case = "one CUDA graph, not eager"
    if not torch.cuda.is_available():
        yield Row(case, LOSSES)
        return
    ours, theirs = [], []
    for graph in (True, False):
        ours.append(_our_training(weights, images, device="cuda", mode="graph" if graph else "eager")[0])
        theirs.append(_means(_torch_on_gpu(weights, images, graph)))
    yield Row(case, LOSSES, _losses(*ours), _losses(*theirs))


def _torch_on_gpu(weights: dict[str, Tensor], images: Tensor, graph: bool) -> list[float]:
    """The usual recipe: three ordinary steps, then the fourth is captured and replayed."""
    model = _model(weights, fused=False).to("cuda")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=True)
    place = torch.empty_like(images[:BATCH], device="cuda")

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = _torch_backward(model.loss, place, 1)
        optimizer.step()
        return loss

    captured = Captured(step, place.device) if graph else step
    torch.manual_seed(SEED)
    losses = []
    for _, batch in itertools.product(range(EPOCHS), images.split(BATCH)):
        place.copy_(batch)
        losses.append(float(captured()))
    return losses


def _on_gpu(weights: dict[str, Tensor], images: Tensor) -> Iterator[Row]:
    case, how = "on a GPU, not on a CPU", "`randn` on the CPU"
    if not torch.cuda.is_available():
        yield Row(case, IMAGES_ON_GPU, other=(how, None))
        yield Row(case, LOSSES)
        return
    ours, theirs, other, losses, torch_losses = [], [], [], [], []
    for device in ("cuda", "cpu"):
        ours.append(_model(weights).to(device).sample(SHOWN, seed=SEED).cpu())
        decode = _model(weights, fused=False).to(device).decode
        torch.manual_seed(SEED)
        theirs.append(decode(torch.randn(SHOWN, LATENT, device=device)).detach().cpu())
        torch.manual_seed(SEED)
        other.append(decode(torch.randn(SHOWN, LATENT).to(device)).detach().cpu())
        losses.append(_our_training(weights, images, device=device)[0])
        torch_losses.append(_means(_torch_training(weights, images, device=device)[0]))
    yield Row(case, IMAGES_ON_GPU, _furthest(*ours), _furthest(*theirs), (how, _furthest(*other)))
    yield Row(case, LOSSES, _losses(*losses), _losses(*torch_losses))


def _model(weights: dict[str, Tensor], fused: bool = True) -> genfast.VAE:
    model = genfast.VAE(latent_dim=LATENT, fused=fused)
    model.load_state_dict(weights)
    return model


def _our_training(
    weights: dict[str, Tensor],
    images: Tensor,
    model: genfast.VAE | None = None,
    batch_size: int = BATCH,
    **options: Any,
) -> tuple[list[float], genfast.VAE]:
    """The mean loss of each epoch, and the trained model."""
    model = _model(weights) if model is None else model
    history = fit(model, images, epochs=EPOCHS, batch_size=batch_size, seed=SEED, progress=False, **options)
    return [row["loss"] for row in history], model


def _torch_training(
    weights: dict[str, Tensor],
    images: Tensor,
    *,
    seed: int = SEED,
    batch_size: int = BATCH,
    micro_batches: int = 1,
    compiled: bool = False,
    device: str = "cpu",
    save_at: int | None = None,
    saved: dict[str, Any] | None = None,
) -> tuple[list[float], genfast.VAE, dict[str, Any] | None]:
    """The loop of a careful script, with the order of a `DistributedSampler` so that only the noise is torch's own.

    Returns:
        The loss of each step over all ranks, the trained model, and the checkpoint after step `save_at`.
    """
    rank, world = ranks()
    model = _model(weights, fused=False).to(device)
    if compiled:
        model.compile()
    loss_of = data_parallel(model, model.loss, torch.device(device)) if world > 1 else model.loss
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    sampler = DistributedSampler(images, world, rank, seed=SEED)
    loader = DataLoader(images, batch_size // world, sampler=sampler)
    torch.manual_seed(seed)
    losses, checkpoint = [], None
    if saved is not None:
        model.load_state_dict(saved["model"])
        # It takes the tensors as its own.
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        losses = list(saved["losses"])
    done = len(losses)
    for epoch in range(done // len(loader), EPOCHS):
        sampler.set_epoch(epoch)
        for index, batch in enumerate(loader, epoch * len(loader)):
            if index < done:
                continue
            if saved is not None and index == done and saved["random"] is not None:
                torch.set_rng_state(saved["random"])
            optimizer.zero_grad()
            loss = _torch_backward(loss_of, batch.to(device), micro_batches)
            optimizer.step()
            losses.append(float(add_up(loss) / world))
            if len(losses) == save_at:
                checkpoint = {
                    "model": {name: tensor.clone() for name, tensor in model.state_dict().items()},
                    "optimizer": copy.deepcopy(optimizer.state_dict()),
                    "losses": list(losses), "random": torch.get_rng_state(),
                }  # fmt: skip
    return losses, model, checkpoint


def _torch_backward(loss_of: Any, batch: Tensor, micro_batches: int) -> Tensor:
    total = torch.zeros((), device=batch.device)
    for piece in batch.tensor_split(micro_batches):
        loss = loss_of(piece)["loss"] * (len(piece) / len(batch))
        loss.backward()
        total += loss.detach()
    return total


def _means(losses: list[float]) -> list[float]:
    """Of each epoch."""
    return [sum(part) / len(part) for part in torch.tensor(losses, dtype=torch.float64).view(EPOCHS, -1).tolist()]


def _flat(model: genfast.VAE) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def _furthest(some: Tensor, others: Tensor) -> Figure:
    return Figure((some - others).abs().max().item())


def _losses(some: list[float], others: list[float]) -> Figure:
    differences = [abs(one - other) for one, other in zip(some, others, strict=True)]
    return Figure(max(differences), max(abs(d / other) for d, other in zip(differences, others, strict=True)))


def _gradients(some: list[Tensor], others: list[Tensor]) -> Figure:
    """The length of the difference beside that of the gradient."""
    one, other = (torch.cat([grad.double().flatten() for grad in grads]) for grads in (some, others))
    return Figure(((one - other).norm() / other.norm()).item())


def markdown(rows: list[Row]) -> str:
    """The table, and what it was measured on."""
    threads = torch.get_num_threads()
    on = [machine_name(torch.device("cpu")), f"{threads} thread{'s' * (threads > 1)}"]
    on += [torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"]
    on += [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for row in rows:
        how, other = row.other or ("", None)
        cells = [_text(row, row.genfast), _text(row, row.torch), f"{_text(row, other)}{WITH}{how}" if how else "-"]
        lines.append(f"| {row.case} | {row.kind.name} | {' | '.join(cells)} |")
    rounding = (
        f"Rounding: up to {NOISE.bound:.1g} of noise, {IMAGES.bound:.1g} of a pixel ({IMAGES_ON_GPU.bound:.1g} against "
        f"a GPU), {LOSSES.bound:.1g} of the size of a loss or gradient."
    )
    return "\n".join([f"Measured on: {', '.join(on)}.", rounding, "", *lines, ""])


def _text(row: Row, figure: Figure | None) -> str:
    if figure is None:
        return NOT_MEASURED
    if figure.value == 0 and row.exact and not row.kind.unit.startswith(" of"):
        return EXACT
    relative = "" if figure.relative is None else f" ({figure.relative:.2g})"
    return f"{figure.value:.2g}{row.kind.unit}{relative}"


def read(page: str) -> dict[tuple[str, str], list[str]]:
    """The cells of a page's table with figures, by case and by what differs."""
    _, _, rest = page.partition(START)
    lines = [line for line in rest.partition(END)[0].splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {(case, kind): figures for case, kind, *figures in rows}


def compared(cell: str) -> float:
    """What `Figure.compared` was when the cell was written."""
    found = re.search(r"\((.*)\)", cell.partition(WITH)[0])
    return float(found.group(1) if found else re.match(r"[^ ,]*", cell).group())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, help="write the table into this page, instead of showing it")
    parser.add_argument("--ranks", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ranks is not None:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        with launched("cpu"):
            result = _on_these_ranks(*torch.load(options.ranks / "input.pt"))
            rank, world = ranks()
            if rank == 0:
                torch.save(result, options.ranks / f"{world}.pt")
        return
    text = markdown(measure())
    if options.page is None:
        print(text)
        return
    page = between_markers(options.page.read_text(), START, text, END)
    with replacing(options.page) as temporary:
        temporary.write_text(page)


if __name__ == "__main__":
    main()
