"""What every experiment is made of: its settings, its trained models, and its page."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import genfast
from genfast import training
from genfast._files import replacing
from genfast.metrics import Estimate
from genfast.metrics.estimate import of_mean
from genfast.models import registry
from genfast.models.base import Model
from genfast.run import CHECKPOINTS, make_folder, read_settings
from genfast.train import evaluation_interval, train_into
from genfast.training.progress import digits

__all__ = [
    "Experiment", "Page", "Paired", "Settings", "Trained", "apart", "best", "equal_epochs", "number", "some_of",
    "train_run", "trend", "versus",
]  # fmt: skip

_BATCH_SIZE = 128
# Where the time alone decides.
_MANY_EPOCHS = 10_000
_DONE = ("finished", "out of time", "stopped early")
# What the speed is measured with: a share of the time that there is, within these bounds in seconds.
_PILOT_SHARE, _PILOT_SECONDS = 0.1, (0.2, 6.0)
# Of a measured speed, since an evaluation after some epochs takes time too.
_TRAINING_SHARE = 0.9


@dataclass(frozen=True)
class Settings:
    """What one call of an experiment is given.

    Attributes:
        out: the folder for its page, its pictures and its runs.
        budget: seconds of training, of all models of the experiment together.
        data, data_root, image_size: as for `genfast.training.load_dataset`.
        seed: of initial weights, order and noise.
        device: where it computes.
        inception: for "compare", what `genfast.metrics.load_inception` takes; without it there is no FID.
        portion: how much of its default budget the experiment has, at most 1.

    Example:
        >>> Settings(Path("experiments/kl-weight"), budget=60.0, portion=0.25).reduced(1000, least=100)
        250
    """

    out: Path
    budget: float
    data: str = "digits"
    data_root: Path | None = None
    image_size: int | None = None
    seed: int = 0
    device: str = "cpu"
    inception: str | None = None
    portion: float = 1.0

    def load(self) -> training.Splits:
        """The images."""
        return training.load_dataset(self.data, self.data_root, self.image_size)

    def reduced(self, count: int, least: int = 1) -> int:
        """How many of `count` things are measured: fewer where the budget is smaller than by default."""
        return min(count, max(least, round(count * self.portion)))


@dataclass(frozen=True)
class Experiment:
    """An experiment, by name.

    Attributes:
        name: on the command line.
        summary: one line about it.
        default_budget_minutes: of training, of all its models together.
        run: does it, and returns its page.
    """

    name: str
    summary: str
    default_budget_minutes: float
    run: Callable[[Settings], Page]


@dataclass(frozen=True)
class Trained:
    """A model that `train_run` has trained.

    Attributes:
        model: in eval mode, on the experiment's device.
        history: a row per epoch.
        folder: of the run.
        seconds: of training, without evaluations.
        settings: of the run, as ``run.json`` holds them.
        snapshots: epoch (0 before the first step) and what ``snapshot`` returned then.
    """

    model: Model
    history: list[dict[str, Any]]
    folder: Path
    seconds: float
    settings: dict[str, Any]
    snapshots: list[tuple[float, dict[str, Tensor]]] = field(default_factory=list)

    @property
    def epochs(self) -> float:
        """How many passes over the training images; a fraction where the time ran out."""
        return self.history[-1]["epoch"] if self.history else 0.0


def train_run(
    settings: Settings,
    family: str,
    name: str,
    *,
    splits: training.Splits,
    seconds: float | None = None,
    epochs: int | None = None,
    build_options: Mapping[str, Any] | None = None,
    loss_options: Mapping[str, Any] | None = None,
    binarize: training.Binarize = "none",
    title: str | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    snapshot: Callable[[Model], dict[str, Tensor]] | None = None,
    **fit_options: Any,
) -> Trained:
    """Train a model in a run folder of its own, OUT/runs/NAME, as `genfast train` makes it.

    After an interruption the same call takes a finished run as it is, and goes on with one that is not.

    Args:
        settings: of the experiment.
        family: of the model; its defaults hold where nothing else is given. A learning rate that falls towards a last
            epoch needs `epochs`: where `seconds` alone end the training it is constant.
        name: of the run.
        splits: the images.
        seconds: after which the training stops, evaluations included.
        epochs: how many; until the time is over if None.
        build_options, loss_options: of the model and of its loss in training.
        binarize: as for `genfast.training.DeviceDataset`.
        title: of the curves; family and data if None.
        on_epoch: called with each new row of the history, but not for a run that is taken as it is.
        snapshot: called with the model (its weights of that moment, not their average) before the first step and after
            each epoch; the tensors are kept in the run's folder.
        fit_options: further arguments of `genfast.fit`, such as ``batch_size`` and ``lr``.

    Returns:
        The trained model and its history.

    Raises:
        ValueError: neither `seconds` nor `epochs`, unknown options, or a run of that name with other settings.
        FloatingPointError: the training diverged.
        KeyboardInterrupt: SIGTERM or Ctrl-C; the same call goes on from there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     settings = Settings(Path(folder), budget=1.0)
        ...     trained = train_run(settings, "vae", "small", splits=settings.load(), epochs=1, progress=False)
        ...     trained.folder.name, trained.epochs
        small: 652,824 parameters on cpu; digits: 5,000 + 1,000 images; ...
        ('small', 1)
    """
    if seconds is None and epochs is None:
        raise ValueError("seconds: expected a number of seconds, or epochs, got neither")
    options = _options(family, build_options, fit_options, epochs, splits)
    train_data, test_data = (training.DeviceDataset(images, settings.device, binarize) for images in splits[1:3])
    options.setdefault("evaluate_every", evaluation_interval(train_data, test_data))
    build, fit = _parted(family, options)
    wanted = _as_json({
        "genfast": genfast.__version__, "torch": torch.__version__, "family": family, **options,
        **(loss_options or {}), "data": settings.data, "data_root": settings.data_root, "image_size":
        settings.image_size, "binarize": binarize, "time": seconds, "seed": settings.seed, "device": settings.device,
        "train_images": len(train_data), "test_images": len(test_data), "image_shape": list(train_data.image_shape),
    })  # fmt: skip
    folder = make_folder(settings.out / "runs" / name, name)
    there = read_settings(folder)
    status = there.pop("status", None)
    if there and there != wanted:
        different = [key for key in {**there, **wanted} if there.get(key) != wanted.get(key)]
        words = "; ".join(f"{key} {there.get(key)!r} there, {wanted.get(key)!r} here" for key in different)
        raise ValueError(f"--out: {folder} holds a run with other settings ({words}): name another, or add --overwrite")
    where = torch.device(settings.device)
    if status in _DONE:
        print(f"{name}: {status} before; {folder}", flush=True)
        model = registry.load(folder, device=where)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return _trained(model, [json.loads(line) for line in lines], folder, wanted)
    resume = training.Checkpoints(folder / CHECKPOINTS).latest() is not None
    model = _build(settings, family, train_data.image_shape, build)
    keep = _Snapshots(folder, model, snapshot, resume)

    def after_epoch(row: dict[str, Any]) -> None:
        keep(row["epoch"])
        if on_epoch is not None:
            on_epoch(row)

    status, _, history = train_into(
        folder, model, train_data, test_data, wanted, name=name, data_name=splits.name, seed=settings.seed,
        title=title or f"{family}, {splits.name}", resume=resume, on_epoch=after_epoch, loss_options=loss_options,
        time_limit=None if seconds is None else _left(folder, seconds), **fit,
    )  # fmt: skip
    if status == "interrupted":
        raise KeyboardInterrupt
    return _trained(model, history, folder, wanted)


def equal_epochs(
    settings: Settings,
    family: str,
    *,
    splits: training.Splits,
    seconds: float,
    build_options: Mapping[str, Any] | None = None,
    binarize: training.Binarize = "none",
    **fit_options: Any,
) -> tuple[int, training.Splits]:
    """How many epochs fit into the time, so that models of one size can have the same number of steps each.

    The speed is measured once, on a model that is thrown away, and kept in the experiment's folder. If the time does
    not suffice for one epoch, the training images become fewer.

    Args:
        settings, family, splits, build_options, binarize, fit_options: as for `train_run`.
        seconds: for one model.

    Returns:
        The number of epochs, and the images.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     settings = Settings(Path(folder), budget=1.0)
        ...     epochs, splits = equal_epochs(settings, "vae", splits=settings.load(), seconds=1.0)
        >>> epochs >= 1
        True
    """
    plan = settings.out / "plan.json"
    options = _options(family, build_options, fit_options, None, splits)
    build, fit = _parted(family, options)
    wanted = _as_json({"family": family, **options, "binarize": binarize, "seconds": seconds})
    speeds = json.loads(plan.read_text()) if plan.exists() else []
    speed = next((row["images_per_second"] for row in speeds if row["of"] == wanted), None)
    if speed is None:
        data = training.DeviceDataset(splits.train, settings.device, binarize)
        model = _build(settings, family, data.image_shape, build)
        low, high = _PILOT_SECONDS
        fit["time_limit"] = min(max(_PILOT_SHARE * seconds, low), high)
        # The first steps of a process are slower than all others.
        training.fit(model, data, seed=settings.seed, progress=False, **{**fit, "time_limit": low})
        speed = training.fit(model, data, seed=settings.seed, progress=False, **fit)[-1]["images_per_second"]
        with replacing(_made(plan)) as temporary:
            temporary.write_text(json.dumps([*speeds, {"of": wanted, "images_per_second": speed}], indent=2) + "\n")
    images = max(options["batch_size"], int(_TRAINING_SHARE * speed * seconds))
    if images >= len(splits.train):
        return images // len(splits.train), splits
    return 1, some_of(splits, images)


def some_of(splits: training.Splits, count: int) -> training.Splits:
    """With at most `count` training images, drawn at random, the same ones each time.

    Example:
        >>> len(some_of(training.load_dataset("digits"), 100).train)
        100
    """
    if len(splits.train) <= count:
        return splits
    # A set may be sorted by its labels.
    chosen = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))[:count].sort().values
    labels = None if splits.train_labels is None else splits.train_labels[chosen]
    return splits._replace(train=splits.train[chosen], train_labels=labels)


def _options(
    family: str, build_options: Mapping[str, Any] | None, fit_options: Mapping[str, Any], epochs: int | None,
    splits: training.Splits,
) -> dict[str, Any]:  # fmt: skip
    """Of the model and of `fit`: those given, and else the family's."""
    options = {"batch_size": _BATCH_SIZE, "lr": 1e-3} | dict(registry.get_family(family).defaults)
    if epochs is None:
        options["lr_schedule"] = "constant"
    options |= {**fit_options, **(build_options or {}), "epochs": epochs or _MANY_EPOCHS}
    options["batch_size"] = min(options["batch_size"], len(splits.train))
    return options


def _parted(family: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's options, and those of `fit`."""
    chosen = registry.get_family(family)
    build = {name: value for name, value in options.items() if name in chosen.build_options}
    # Defaults of a family may be of its loss.
    others = (*chosen.build_options, *chosen.loss_options)
    return build, {name: value for name, value in options.items() if name not in others}


def _build(settings: Settings, family: str, image_shape: Sequence[int], options: dict[str, Any]) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return registry.get_family(family).build(image_shape, **options).to(settings.device)


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a file."""
    return json.loads(json.dumps(values, default=str))


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _left(folder: Path, seconds: float) -> float:
    """What a run that goes on has left of its time; a step at least."""
    latest = training.Checkpoints(folder / CHECKPOINTS).latest()
    if latest is None:
        return seconds
    state = training.read(latest).state
    return max(1e-3, seconds - state["place"]["elapsed"] - sum(row["seconds"] for row in state["history"]))


def _trained(model: Model, history: list[dict[str, Any]], folder: Path, settings: dict[str, Any]) -> Trained:
    seconds = sum(row["seconds"] for row in history)
    return Trained(model.eval(), history, folder, seconds, settings, _Snapshots.read(folder))


class _Snapshots:
    """What a model shows of itself along its training, one file for each time."""

    def __init__(
        self, folder: Path, model: Model, snapshot: Callable[[Model], dict[str, Tensor]] | None, resume: bool
    ) -> None:
        self.folder, self.model, self.snapshot = folder / "snapshots", model, snapshot
        if not resume:
            shutil.rmtree(self.folder, ignore_errors=True)
            self(0.0)

    def __call__(self, epoch: float) -> None:
        if self.snapshot is None:
            return
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.snapshot(self.model).items()}
        with replacing(_made(self.folder / f"{epoch:09.3f}.safetensors")) as temporary:
            temporary.write_bytes(safetensors.torch.save(tensors))

    @staticmethod
    def read(folder: Path) -> list[tuple[float, dict[str, Tensor]]]:
        paths = sorted((folder / "snapshots").glob("*.safetensors"))
        return [(float(path.stem), safetensors.torch.load(path.read_bytes())) for path in paths]


class Page:
    """What an experiment has found: a Markdown page with its tables, its pictures, and all numbers as JSON.

    Args:
        title: of the page.
        question: what was asked, in a sentence or two.

    Attributes:
        statements: what was observed, in order.

    Example:
        >>> import tempfile
        >>> page = Page("Sizes", "How large is it?")
        >>> page.say(f"It is {number(Estimate(2.0, 1.5, 2.5))} m.")
        >>> page.table([{"name": "a", "metres": Estimate(2.0, 1.5, 2.5)}], "Sizes of all.")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page.write(Path(folder))
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['README.md', 'results.json', 'table.csv']
    """

    def __init__(self, title: str, question: str) -> None:
        self.title, self.question = title, question
        self.statements: list[str] = []
        self._blocks: list[str] = []
        self._tables: dict[str, tuple[list[dict[str, Any]], dict[str, str], str]] = {}
        self._pictures: dict[Path, str] = {}

    def section(self, heading: str) -> None:
        """Begin a section."""
        self._blocks.append(f"## {heading}\n")

    def text(self, text: str) -> None:
        """A paragraph that holds whatever was measured: a definition, a caveat."""
        self._blocks.append(f"{text}\n")

    def say(self, text: str) -> None:
        """A statement about what was observed, with its numbers."""
        self.statements.append(text)
        follows = self._blocks and self._blocks[-1].startswith("- ")
        if follows:
            self._blocks[-1] = self._blocks[-1] + f"- {text}\n"
        else:
            self._blocks.append(f"- {text}\n")

    def table(
        self,
        rows: Sequence[Mapping[str, Any]],
        caption: str,
        columns: Sequence[str] | Mapping[str, str] | None = None,
        name: str | None = None,
        transposed: bool = False,
    ) -> None:
        """A table, also written as NAME.csv with bounds and sample sizes in columns of their own.

        Args:
            rows: from column to a number, an `Estimate`, a text, or None, which is shown as "not measured".
            caption: above it.
            columns: which, in this order, and their headings where they differ; those of the first row if None.
            name: of the CSV file; "table", "table-2", ... if None.
            transposed: the page has a line for each column, for a table that is wider than a page; the CSV is as ever.
        """
        if not rows:
            raise ValueError("rows: expected at least one, got none")
        if columns is None:
            columns = list(rows[0])
        headings = dict(columns) if isinstance(columns, Mapping) else {column: column for column in columns}
        count = len(self._tables) + 1
        name = name or ("table" if count == 1 else f"table-{count}")
        if name in self._tables:
            raise ValueError(f"name: expected one of its own for each table, got {name!r} twice")
        self._tables[name] = ([dict(row) for row in rows], headings, caption)
        cells = [[_cell(row.get(column)) for column in headings] for row in rows]
        if transposed:
            first, *others = zip(headings.values(), *cells, strict=True)
            lines = [first, ["---", *["--:"] * len(rows)], *others]
        else:
            numeric = [all(not isinstance(row.get(column), str) for row in rows) for column in headings]
            lines = [headings.values(), ["--:" if right else "---" for right in numeric], *cells]
        lines = ["| " + " | ".join(line) + " |" for line in lines]
        self._blocks.append(f"{caption} ([CSV]({name}.csv))\n\n" + "\n".join(lines) + "\n")

    def picture(self, path: Path, caption: str) -> None:
        """A picture or a video that was written already; one outside the page's folder is copied into it."""
        path = Path(path)
        self._pictures[path] = caption
        link = f"[{caption}]({path.name})\n"
        # Pages of a repository play no videos.
        self._blocks.append(link if path.suffix == ".mp4" else f"!{link}\n*{caption}*\n")

    def write(self, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
        """Write README.md, the tables and results.json.

        Args:
            folder: made if it is not there.
            facts: how it was made, a line for each; also in results.json.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for path in self._pictures:
            if path.resolve().parent != folder.resolve():
                with replacing(folder / path.name) as temporary:
                    shutil.copyfile(path, temporary)
        for name, (rows, headings, _) in self._tables.items():
            with replacing(folder / f"{name}.csv") as temporary, temporary.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(_csv(rows, list(headings)))
        results = {
            "title": self.title, "question": self.question, "statements": self.statements,
            "tables": {
                name: {"caption": caption, "rows": [{key: _plain(value) for key, value in row.items()} for row in rows]}
                for name, (rows, _, caption) in self._tables.items()
            },
            "pictures": {path.name: caption for path, caption in self._pictures.items()},
            "facts": _as_json(facts or {}),
        }  # fmt: skip
        with replacing(folder / "results.json") as temporary:
            temporary.write_text(json.dumps(results, indent=2) + "\n")
        made = [f"- {name}: {value}" for name, value in (facts or {}).items()]
        blocks = [f"# {self.title}\n", f"{self.question}\n", *self._blocks]
        if made:
            blocks += ["## How it was made\n", "\n".join(made) + "\n"]
        with replacing(folder / "README.md") as temporary:
            temporary.write_text("\n".join(blocks))


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, (Estimate, float)):
        return number(value)
    return f"{value:,}" if type(value) is int else str(value).replace("|", "\\|")


def _plain(value: Any) -> Any:
    """As JSON holds it: what is not finite as text."""
    if isinstance(value, Estimate):
        return {name: _plain(part) for name, part in value.to_dict().items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _csv(rows: list[dict[str, Any]], columns: list[str]) -> Iterator[list[Any]]:
    measured = {column for row in rows for column in columns if isinstance(row.get(column), Estimate)}
    parts = ("", "_low", "_high", "_n")
    yield [column + part for column in columns for part in (parts if column in measured else ("",))]
    for row in rows:
        line: list[Any] = []
        for column in columns:
            value = row.get(column)
            if isinstance(value, Estimate):
                line += [value.value, value.low, value.high, value.n]
            else:
                line += [value, *([None] * 3 if column in measured else [])]
        yield line


def number(value: Estimate | float, decimals: int | None = None) -> str:
    """A number as a page shows it; an estimate with its interval, to digits that the interval leaves sense to.

    Example:
        >>> number(Estimate(98.214, 97.92, 98.51)), number(0.03127), number(98.214)
        ('98.21 [97.92, 98.51]', '0.0313', '98.21')
    """
    if not isinstance(value, Estimate):
        return digits(value) if decimals is None else f"{value:.{decimals}f}"
    width = value.high - value.low
    if not width > 0:
        # Counts, too, come as estimates.
        return f"{value.value:.0f}" if value.value == round(value.value) else number(value.value, decimals)
    if decimals is None:
        decimals = max(0, 1 - math.floor(math.log10(width)))
        if value.value:
            # Nor to more than four digits.
            decimals = min(decimals, max(0, 3 - math.floor(math.log10(abs(value.value)))))
    return f"{value.value:.{decimals}f} [{value.low:.{decimals}f}, {value.high:.{decimals}f}]"


@dataclass(frozen=True)
class Paired(Estimate):
    """A mean over images that keeps its terms, so that two models are compared image by image.

    Attributes:
        terms: fp64 [N], in the order of the images.
        images: what says that two are of the same images, in the same order.

    Example:
        >>> a, b = (Paired.of(torch.arange(100.0) + shift, "test") for shift in (0.0, 1.0))
        >>> a.high > b.low, apart(a, b)
        (True, True)
    """

    terms: Tensor | None = field(default=None, repr=False, compare=False)
    images: str = field(default="", repr=False, compare=False)

    @classmethod
    def of(cls, terms: Tensor, images: str) -> Paired:
        """The mean of `terms`, with its bootstrap interval."""
        terms = terms.detach().double().flatten().cpu()
        whole = of_mean(terms)
        return cls(whole.value, whole.low, whole.high, whole.n, terms, images)


def _bounds(value: Estimate | float) -> tuple[float, float]:
    if isinstance(value, Estimate):
        known = math.isfinite(value.low) and math.isfinite(value.high)
        return (value.low, value.high) if known else (value.value, value.value)
    return float(value), float(value)


def apart(a: Estimate | float, b: Estimate | float) -> bool:
    """Whether two numbers differ by more than their uncertainty.

    Their intervals do not meet; of two `Paired`, which are of the same images, that of their difference is without 0.

    Example:
        >>> apart(Estimate(1.0, 0.9, 1.1), Estimate(1.15, 1.05, 1.25)), apart(1, 2)
        (False, True)
    """
    if isinstance(a, Paired) and isinstance(b, Paired) and a.images == b.images:
        a, b = of_mean(a.terms - b.terms), 0.0
    (a_low, a_high), (b_low, b_high) = _bounds(a), _bounds(b)
    return a_high < b_low or b_high < a_low


def versus(first: str, a: Estimate | float, second: str, b: Estimate | float, unit: str = "") -> str:
    """Which of two is larger, in words with their numbers, or that they cannot be told apart.

    Example:
        >>> versus("AE", Estimate(2.0, 1.9, 2.1), "VAE", Estimate(3.0, 2.9, 3.1), "nats")
        'AE 2.00 [1.90, 2.10] nats, below VAE 3.00 [2.90, 3.10] nats'
    """
    words = "not told apart from" if not apart(a, b) else "below" if _value(a) < _value(b) else "above"
    return f"{first} {_with_unit(a, unit)}, {words} {second} {_with_unit(b, unit)}"


def best(values: Mapping[str, Estimate | float], better: str, unit: str = "") -> str:
    """Which of several is best, in words with its number, and which of the others cannot be told apart from it.

    Args:
        values: by name.
        better: "higher" or "lower".
        unit: after the number.

    Example:
        >>> best({"a": Estimate(2.0, 1.9, 2.1), "b": Estimate(2.05, 1.95, 2.15), "c": Estimate(3.0, 2.9, 3.1)}, "lower")
        'a (2.00 [1.90, 2.10]); not told apart from it: b'
    """
    if better not in ("higher", "lower"):
        raise ValueError(f"better: expected higher or lower, got {better!r}")
    winner = (max if better == "higher" else min)(values, key=lambda name: _value(values[name]))
    close = [name for name in values if name != winner and not apart(values[name], values[winner])]
    others = f"; not told apart from it: {', '.join(close)}" if close else ""
    return f"{winner} ({_with_unit(values[winner], unit)}){others}"


def trend(values: Mapping[Any, Estimate | float], unit: str = "") -> str:
    """How a quantity goes along an ordered setting, in words with its numbers.

    Args:
        values: by the value of the setting, in its order; two at least.
        unit: after the numbers.

    Example:
        >>> trend({1: 2.0, 5: 3.0, 10: 5.0}, "nats")
        'rises from 2.00 nats at 1 to 5.00 nats at 10'
        >>> trend({1: 2.0, 5: 1.0, 10: 5.0})
        'falls and rises: 2.00 at 1, smallest 1.00 at 5, largest 5.00 at 10'
    """
    settings = list(values)
    if len(settings) < 2:
        raise ValueError(f"values: expected at least two, got {len(settings)}")
    first, last = settings[0], settings[-1]
    # The extreme so far: slow drifts count too, and a turn is measured from there.
    anchor, steps = first, []
    for setting in settings[1:]:
        if apart(values[setting], values[anchor]):
            step = "rises" if _value(values[setting]) > _value(values[anchor]) else "falls"
            if not steps or steps[-1] != step:
                steps.append(step)
            anchor = setting
        elif steps and (_value(values[setting]) > _value(values[anchor])) == (steps[-1] == "rises"):
            anchor = setting
    at = {setting: f"{_with_unit(values[setting], unit)} at {setting}" for setting in settings}
    if not steps:
        return f"does not change beyond its uncertainty: {at[first]}, {at[last]}"
    if len(steps) == 1:
        return f"{steps[0]} from {at[first]} to {at[last]}"
    ordered = sorted(settings, key=lambda setting: _value(values[setting]))
    at[ordered[0]] = f"smallest {at[ordered[0]]}"
    at[ordered[-1]] = f"largest {at[ordered[-1]]}"
    told = [at[setting] for setting in settings if setting in (first, ordered[0], ordered[-1], last)]
    return f"{' and '.join(steps) if len(steps) == 2 else 'goes up and down'}: {', '.join(told)}"


def _value(value: Estimate | float) -> float:
    return value.value if isinstance(value, Estimate) else float(value)


def _with_unit(value: Estimate | float, unit: str) -> str:
    text = f"{value:,}" if isinstance(value, int) else number(value)
    return f"{text} {unit}" if unit else text
