"""One HTML page about runs: tables to sort, pictures, curves and settings, in a file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import genfast
from genfast._files import replacing
from genfast.experiments.base import number
from genfast.metrics import DEFINITIONS, Estimate
from genfast.models import registry
from genfast.run import read_settings
from genfast.training.progress import digits

__all__ = ["write_report"]

_MIME = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4"}
_FIRST = ("samples.png", "reconstructions.png", "interpolation.png", "manifold.png", "forward.png", "reverse.png")
# What every run says of itself, and no metric does.
_OWN = {
    "family": ("family", "", "The kind of model."),
    "epochs": ("epochs", "", "Passes over the training images."),
}
# Settings that tell nothing about the model.
_NOT_SETTINGS = {
    "genfast", "torch", "family", "data", "data_root", "image_size", "binarize", "status", "time", "epochs",
    "train_images", "test_images", "image_shape", "parameters",
}  # fmt: skip
# Panels of a history: width and height of the axes, and what is around them.
_WIDE, _HIGH, _LEFT, _TOP, _BELOW = 220, 110, 44, 20, 18
# No request leaves the page, and no script runs but its own, whatever its texts hold.
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src '{style}'; script-src '{script}'"
# What depends on the number of images as much as on what they show.
_BIASED = (
    "frechet_distance", "inception_fid", "precision", "recall", "coverage", "entropy", "smallest_share",
)  # fmt: skip


def write_report(
    runs: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str], sort: str | None = None
) -> list[str]:
    """Write one HTML page about runs, which a browser shows without a network: all pictures are within it.

    Runs on different data get tables of their own, and so do likelihoods of different treatments of the pixels get
    columns of their own: such numbers do not compare.

    Args:
        runs: folders, as ``genfast train`` writes them; ``genfast evaluate --metrics`` adds what the tables show.
        path: of the page.
        sort: the name of the metric that orders the tables, the best first; None: the runs stay in order.

    Returns:
        What the reader has to know before the page is read: that runs do not compare, or have not been measured.

    Raises:
        ValueError: a folder holds no run, a file of it is damaged, or no run has the metric `sort`.
        OSError: the page cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = Path(folder) / "vae"
        ...     run.mkdir()
        ...     _ = (run / "run.json").write_text('{"genfast": "1", "family": "vae", "data": "digits"}')
        ...     write_report([run], Path(folder) / "report.html")
        []
    """
    if not runs:
        raise ValueError("runs: expected at least one folder, got none")
    records = _named([_read(folder) for folder in dict.fromkeys(Path(run).resolve() for run in runs)])
    groups = _grouped(records)
    notes = [] if len(groups) == 1 else [_apart(groups)]
    if sort is not None:
        notes += _order(groups, sort)
    with replacing(path) as temporary:
        temporary.write_text(_page(groups, notes), encoding="utf-8")
    return notes


@dataclass
class _Column:
    title: str
    better: str
    text: str
    # Unit, and of likelihoods what they are of.
    small: str = ""

    @property
    def whole(self) -> str:
        return f"{self.title} ({self.small})" if self.small else self.title


@dataclass
class _Run:
    """What the folder of a run tells."""

    folder: Path
    name: str
    settings: dict[str, Any]
    history: list[dict[str, Any]]
    evaluation: dict[str, Any]
    likelihood: str
    values: dict[str, Estimate | str] = field(default_factory=dict)
    columns: dict[str, _Column] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        """What the run was trained on, as it was named: two folders of images may end in one name."""
        return str(self.settings.get("data") or "unknown data")

    @property
    def data(self) -> tuple[str, ...]:
        """What two runs must share, beside the source, for their numbers to compare; its parts, in words."""
        settings = self.settings
        shape = " × ".join(map(str, settings.get("image_shape") or ["unknown size"]))
        counts = [settings.get(name) for name in ("train_images", "test_images")]
        images = "" if None in counts else f"{counts[0]:,} + {counts[1]:,} images"
        binarize = settings.get("binarize") or "none"
        pixels = "grey levels" if binarize == "none" else f"binarized ({binarize})"
        return tuple(filter(None, (Path(self.source).name, shape, images, pixels)))


def _read(folder: Path) -> _Run:
    settings = read_settings(folder)
    if "genfast" not in settings:
        hint = f"; the runs of an experiment are in {folder / 'runs'}" if (folder / "runs").is_dir() else ""
        raise ValueError(f"RUN: expected the folder of a run, got {folder}{hint}")
    lines = _read_text(folder / "metrics.jsonl").splitlines()
    history = [_parse(folder / "metrics.jsonl", line) for line in lines if line.strip()]
    evaluation = _parse(folder / "evaluation.json", _read_text(folder / "evaluation.json") or "{}")
    config = _parse(folder / "config.json", _read_text(folder / "config.json") or "{}")
    _check_settings(folder / "run.json", settings)
    for row in history:
        _expect(folder / "metrics.jsonl", row, "a number", "epoch", needed=True)
        _expect(folder / "metrics.jsonl", row, "a number", "seconds")
    _check_evaluation(folder / "evaluation.json", evaluation)
    run = _Run(folder, folder.name, settings, history, evaluation, config.get("likelihood", ""))
    _measure(run)
    return run


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not readable as text ({error.reason})") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected JSON objects, got {type(found).__name__}")
    return found


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    _expect(path, settings, "a text", "data", "binarize")
    _expect(path, settings, "a whole number", "train_images", "test_images")
    _expect(path, settings, "a list of whole numbers", "image_shape")


def _check_evaluation(path: Path, evaluation: Mapping[str, Any]) -> None:
    _expect(path, evaluation, "a text", "data", "binarize")
    _expect(path, evaluation, "a whole number", "images", "k", "steps")
    plain = [name for name in _PLAIN if name in evaluation and not isinstance(evaluation[name], Mapping)]
    _expect(path, evaluation, "a number", *plain, needed=True)
    _expect(path, evaluation, "a number", "standard_error")
    _expect(path, evaluation, "an object", "metrics")
    metrics = evaluation.get("metrics") or {}
    _expect(path, metrics, "an object", *(name for name in metrics if name in DEFINITIONS), needed=True)
    for name, fields in {**evaluation, **metrics}.items():
        if not isinstance(fields, Mapping) or (name not in DEFINITIONS and "kind" not in fields):
            continue
        _expect(path, fields, "a number", "value", needed=True, of=name)
        _expect(path, fields, "a number, or null,", "low", "high", needed=True, of=name)
        _expect(path, fields, "a whole number", "n", needed=True, of=name)
        if "kind" in fields:
            _expect(path, fields, f"one of {', '.join(_KINDS)}", "kind", needed=True, of=name)
            _expect(path, fields, "a text", "unit", "data", needed=True, of=name)
            _expect(path, fields, "a whole number", "k", "steps", of=name)


def _expect(
    path: Path, fields: Mapping[str, Any], what: str, *names: str, needed: bool = False, of: str = ""
) -> None:  # fmt: skip
    """Raise unless the fields of that name are what they have to be; others than `needed` may be absent or null."""
    for name in names:
        value, missing = fields.get(name), name not in fields
        if not needed and value is None:
            continue
        if missing or not _FITS[what](value):
            got = "none" if missing else json.dumps(value)
            raise ValueError(f"{path}: expected {what} for {of and of + '.'}{name}, got {got}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# Kinds of likelihoods, and the names of those that `genfast evaluate` writes without --metrics.
_KINDS = ("elbo", "iwae", "bits_per_dim")
_PLAIN = ("elbo", "log_likelihood", "bits_per_dim")
_FITS: dict[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str),
    "a number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "a number, or null,": lambda value: value is None or _FITS["a number"](value),
    "a whole number": _is_whole,
    "a list of whole numbers": lambda value: isinstance(value, list) and all(map(_is_whole, value)),
    "an object": lambda value: isinstance(value, Mapping),
    f"one of {', '.join(_KINDS)}": lambda value: isinstance(value, str) and value in _KINDS,
}


def _named(records: list[_Run]) -> list[_Run]:
    """The runs, with as much of the path in the name as tells folders apart that are called the same."""
    for run in records:
        others = [other.folder.parts for other in records if other is not run]
        parts = run.folder.parts
        count = next(n for n in range(1, len(parts) + 1) if all(other[-n:] != parts[-n:] for other in others))
        run.name = "/".join(parts[-count:])
    return records


def _grouped(records: list[_Run]) -> list[list[_Run]]:
    """The runs on each data set."""

    def data(run: _Run) -> tuple[Any, ...]:
        return run.data, run.source

    return [list(group) for _, group in groupby(sorted(records, key=data), key=data)]


def _apart(groups: list[list[_Run]]) -> str:
    sets = "; ".join(", ".join(group[0].data) for group in groups)
    return f"The runs are on {len(groups)} sets of data, whose numbers do not compare: a table for each ({sets})."


def _order(groups: list[list[_Run]], name: str) -> list[str]:
    """Sort each group by a metric, the best first; which runs have not got it."""
    known = {key: column for group in groups for run in group for key, column in run.columns.items()}
    if name not in known:
        raise ValueError(f"--sort: expected one of {', '.join(sorted(known)) or 'none'}, got {name}")
    sign = -1 if known[name].better == "higher" else 1

    def key(run: _Run) -> tuple[bool, float]:
        value = run.values.get(name)
        measured = isinstance(value, Estimate) and not math.isnan(value.value)
        return not measured, sign * value.value if measured else 0.0

    missing = []
    for group in groups:
        group.sort(key=key)
        missing += [run for run in group if name not in run.values]
    return [f"{run.name} has no {name}: genfast evaluate --metrics measures it" for run in missing]


def _measure(run: _Run) -> None:
    """Fill the values of a run's row."""
    history, evaluation = run.history, run.evaluation
    run.columns = {name: _Column(*texts) for name, texts in _OWN.items()}
    run.values["family"] = str(run.settings.get("family", "unknown"))
    if history:
        run.values["epochs"] = Estimate(history[-1]["epoch"])
        _put(run, "seconds", sum(row.get("seconds") or 0.0 for row in history))
    parameters = _parameters(run.folder)
    if parameters is not None:
        _put(run, "parameters", parameters)
    on = evaluation.get("data"), evaluation.get("binarize") or "none"
    own = Path(run.source).name, run.settings.get("binarize") or "none"
    if evaluation and on != own:
        pixels = {"none": "grey pixels"}.get(on[1], f"{on[1]} pixels")
        run.notes.append(f"Evaluated on other data than it was trained on ({on[0]}, {pixels}): not in the table.")
        return
    measured = {**evaluation, **(evaluation.get("metrics") or {})}
    measured = {name: value for name, value in measured.items() if isinstance(value, Mapping)}
    for name, value in measured.items():
        if name in DEFINITIONS and "kind" not in value:
            _put(run, name, value)
    likelihoods = [value for value in measured.values() if "kind" in value]
    for value in likelihoods or _evaluated(run):
        if value["kind"] == "bits_per_dim" and value.get("steps") is None:
            value = {**value, "steps": evaluation.get("steps")}
        _put_likelihood(run, value)


def _parameters(folder: Path) -> int | None:
    try:
        return sum(parameter.numel() for parameter in registry.load(folder).parameters())
    except (FileNotFoundError, ValueError):
        # No model has been saved yet, or one whose networks are the user's own.
        return None


def _put(run: _Run, name: str, value: Any) -> None:
    definition = DEFINITIONS[name]
    source = f" {definition.source}" if definition.source else ""
    run.columns[name] = _Column(definition.title, definition.better, definition.text + source, definition.unit)
    run.values[name] = Estimate.from_dict(value) if isinstance(value, Mapping) else Estimate(value)


def _put_likelihood(run: _Run, found: Mapping[str, Any]) -> None:
    """A number about log p(x): each kind, number of draws or steps, and treatment of the pixels is a column."""
    definition = DEFINITIONS[found["kind"]]
    draws = f", {found['k']:,} draws" if found.get("k") else ""
    steps = f", bound in {found['steps']:,} steps" if found.get("steps") else ""
    of = f"{found['unit']}{draws}{steps}; {found['data']}"
    key = f"{found['kind']}: {of}"
    run.columns[key] = _Column(definition.title, definition.better, definition.text, of)
    run.values[key] = Estimate.from_dict(found)


def _evaluated(run: _Run) -> list[dict[str, Any]]:
    """What `genfast evaluate` says of log p(x) without --metrics."""
    found, numbers = run.evaluation, []
    pixels = {"none": "grey"}.get(found.get("binarize") or "none", f"{found.get('binarize')} binarized")
    data = f"{run.likelihood} likelihood of {pixels} pixels" if run.likelihood else "pixels of 256 grey levels"
    for name, kind, unit in (
        ("elbo", "elbo", "nats per image"), ("log_likelihood", "iwae", "nats per image"),
        ("bits_per_dim", "bits_per_dim", "bits per dimension"),
    ):  # fmt: skip
        if name in found and not isinstance(found[name], Mapping):
            # The standard error is that of the estimate which was asked for.
            half = math.nan if name == "elbo" else 1.96 * (found.get("standard_error") or math.nan)
            ends = (found[name] - half, found[name] + half) if math.isfinite(half) else (None, None)
            k = found.get("k") if kind == "iwae" else None
            about = {"kind": kind, "unit": unit, "data": data, "k": k, "n": found.get("images") or 0}
            numbers.append({"value": found[name], "low": ends[0], "high": ends[1], **about})
    return numbers


def _page(groups: list[list[_Run]], notes: list[str]) -> str:
    count = sum(map(len, groups))
    title = f"genfast: {count} {'run' if count == 1 else 'runs'}"
    files = resources.files("genfast") / "data"
    style, script = ("\n" + (files / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = _POLICY.format(style=_hash(style), script=_hash(script))
    numbers = {id(run): place for place, run in enumerate((run for group in groups for run in group), 1)}
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="quiet">genfast {escape(genfast.__version__)}. Click a heading to sort.</p>',
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
        *(_group(group, numbers) for group in groups),
        "<h2>Runs</h2>",
        *(_section(run, numbers[id(run)]) for group in groups for run in group),
        _definitions(groups),
    ]
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">', '<link rel="icon" href="data:,">',
        f"<title>{title}</title>", f"<style>{style}</style>", "</head>", "<body>", *parts,
        f"<script>{script}</script>", "</body>", "</html>", "",
    ])  # fmt: skip


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _group(group: list[_Run], numbers: Mapping[int, int]) -> str:
    """The runs on one data set: their table, and their samples side by side."""
    settings = _differing(group)
    own_table = len({run.settings.get("family") for run in group}) > 1
    columns = {key: column for run in group for key, column in run.columns.items()}
    parts = [f"<h2>{escape(', '.join(group[0].data))}</h2>"]
    parts += [_table(group, numbers, columns, {} if own_table else settings)]
    if own_table and settings:
        parts += [f"<details><summary>Settings that differ</summary>{_table(group, numbers, {}, settings)}</details>"]
    pictures = [(run, run.folder / "samples.png") for run in group if (run.folder / "samples.png").exists()]
    figures = [_figure(path, run.name, f"#run-{numbers[id(run)]}") for run, path in pictures]
    if figures:
        parts += [f'<h3>Samples</h3><div class="figures samples">{"".join(figures)}</div>']
    return "\n".join(parts)


def _differing(group: list[_Run]) -> dict[str, list[Any]]:
    """The settings of the model and of its training in which the runs differ."""
    names = dict.fromkeys(name for run in group for name in run.settings if name not in _NOT_SETTINGS)
    values = {name: [run.settings.get(name) for run in group] for name in names}
    return {name: several for name, several in values.items() if any(value != several[0] for value in several)}


def _table(
    group: list[_Run], numbers: Mapping[int, int], columns: dict[str, _Column], settings: dict[str, list[Any]]
) -> str:
    best = {key: _best([run.values.get(key) for run in group], column.better) for key, column in columns.items()}
    uneven = [key for key in best if key in _BIASED and _sizes(run.values.get(key) for run in group) > 1]
    best |= {key: set() for key in uneven}
    heads = [_heading("run", "text", "ascending", "Name of the run's folder.")]
    heads += [_heading(name, _kind(values), "ascending", "A setting.") for name, values in settings.items()]
    for key, column in columns.items():
        direction = "descending" if column.better == "higher" else "ascending"
        kind = _kind([run.values.get(key) for run in group])
        heads.append(_heading(column.title, kind, direction, column.text, column.small))
    rows = []
    for index, run in enumerate(group):
        link = f'<a href="#run-{numbers[id(run)]}">{escape(run.name)}</a>'
        cells = [f'<th scope="row" data-value="{escape(run.name)}">{link}</th>']
        cells += [_setting(values[index]) for values in settings.values()]
        cells += [_cell(run.values.get(key), index in best[key]) for key in columns]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    shown = "" if not any(best.values()) else "Marked: the best, and what its interval does not tell from it. "
    if uneven:
        titles = ", ".join(escape(columns[key].title) for key in uneven)
        shown += f"Not marked, since they depend on the number of images, which differs: {titles}. "
    caption = f"<caption>{shown}Small print: 95% interval, and images measured.</caption>" if columns else ""
    return (
        f'<div class="scroll"><table class="sortable">{caption}<thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _sizes(values: Iterable[Any]) -> int:
    """How many sample sizes there are among numbers."""
    return len({value.n for value in values if isinstance(value, Estimate) and not math.isnan(value.value)})


def _kind(values: Iterable[Any]) -> str:
    texts = [value for value in values if value is not None and not _is_number(value)]
    return "text" if texts else "number"


def _is_number(value: Any) -> bool:
    return isinstance(value, Estimate) or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _heading(title: str, kind: str, first: str, text: str, small: str = "") -> str:
    more = f"<small>{escape(small)}</small>" if small else ""
    return (
        f'<th scope="col" class="{kind}" data-kind="{kind}" data-first="{first}" title="{escape(text)}">'
        f'<button type="button">{escape(title)}</button>{more}</th>'
    )


def _best(values: list[Any], better: str) -> set[int]:
    """Which of them is the best, and which have an interval that overlaps its own; none of fewer than two."""
    numbers = {index: value for index, value in enumerate(values) if isinstance(value, Estimate)}
    numbers = {index: value for index, value in numbers.items() if not math.isnan(value.value)}
    if not better or len(numbers) < 2:
        return set()
    choose = max if better == "higher" else min
    first = choose(numbers.values(), key=lambda value: value.value)
    good = {index for index, value in numbers.items() if value.value == first.value or _overlap(value, first)}
    # Where all are as good, there is nothing to mark.
    return good if len(good) < len(numbers) else set()


def _overlap(a: Estimate, b: Estimate) -> bool:
    # Comparisons with NaN are false: without an interval only the same number is as good.
    return a.low <= b.high and b.low <= a.high


def _setting(value: Any) -> str:
    if value is None:
        return '<td class="missing">none</td>'
    if isinstance(value, bool) or not _is_number(value):
        text = value if isinstance(value, str) else json.dumps(value)
        # A page is passed on, and where files lay on this machine concerns nobody.
        text = os.path.basename(text) if os.path.isabs(text) else text
        return f'<td class="text" data-value="{escape(text)}">{escape(text)}</td>'
    return f'<td data-value="{value}">{value:g}</td>'


def _cell(value: Estimate | str | None, best: bool) -> str:
    if isinstance(value, str):
        return f'<td class="text" data-value="{escape(value)}">{escape(value)}</td>'
    if value is None:
        return '<td class="missing">not measured</td>'
    if math.isnan(value.value):
        return '<td class="missing">not a number</td>'
    shown, _, interval = number(value).partition(" ") if math.isfinite(value.low) else (_number(value.value), "", "")
    small = [interval.strip("[]").replace(", ", " to ")] if interval else []
    small += [f"n = {value.n:,}"] if value.n else []
    more = f"<small>{', '.join(small)}</small>" if small else ""
    sortable = str(value.value).replace("inf", "Infinity")
    return f'<td{" class=best" if best else ""} data-value="{sortable}">{shown}{more}</td>'


def _number(value: float) -> str:
    if float(value).is_integer():
        return f"{value:,.0f}"
    if abs(value) < 1 and round(value, 3) == value:
        return f"{value:g}"
    return digits(value, 3 if abs(value) < 10 else 2 if abs(value) < 1000 else 0)


def _figure(path: Path, caption: str, link: str | None = None) -> str:
    data = f"data:{_MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    words = escape(caption)
    shown = f'<a href="{link}">{words}</a>' if link else words
    if path.suffix == ".mp4":
        return f'<figure><video controls loop muted src="{data}"></video><figcaption>{shown}</figcaption></figure>'
    return f'<figure><img src="{data}" alt="{words}"><figcaption>{shown}</figcaption></figure>'


def _section(run: _Run, place: int) -> str:
    """All that is known of one run."""
    family, status = (escape(str(run.settings.get(name, "unknown"))) for name in ("family", "status"))
    parts = [f'<h3 id="run-{place}">{escape(run.name)}</h3>', f"<p>{family}, {status}</p>"]
    notes = [*run.notes, *(f"Epoch {row['epoch']}: {row['warning']}" for row in run.history if "warning" in row)]
    parts += [f'<p class="note">{escape(note)}</p>' for note in notes]
    figures = [_figure(path, path.name) for path in _pictures(run.folder) if path.name != "samples.png"]
    if figures:
        parts.append(f'<div class="figures">{"".join(figures)}</div>')
    if run.history:
        parts.append(_curves(run.history))
        parts.append(f"<details><summary>History: {len(run.history)} epochs</summary>{_history(run.history)}</details>")
    shown = {name: value for name, value in run.settings.items() if name != "data_root"}
    settings = "".join(f"<tr><td>{escape(name)}</td>{_setting(value)}</tr>" for name, value in shown.items())
    parts.append(f"<details><summary>Settings</summary><table><tbody>{settings}</tbody></table></details>")
    if run.evaluation:
        text = escape(json.dumps(run.evaluation, indent=2))
        parts.append(f"<details><summary>evaluation.json</summary><pre>{text}</pre></details>")
    return f"<section>{''.join(parts)}</section>"


def _pictures(folder: Path) -> list[Path]:
    """What there is to see, but for the curves that the page draws itself, and for what a video shows better."""
    found = [path for path in sorted(folder.iterdir()) if path.suffix in _MIME and path.name != "curves.png"]
    found = [path for path in found if path.suffix != ".gif" or not path.with_suffix(".mp4").exists()]
    order = {name: place for place, name in enumerate(_FIRST)}
    return sorted(found, key=lambda path: order.get(path.name, len(order)))


def _curves(history: list[dict[str, Any]]) -> str:
    names = dict.fromkeys(name for row in history for name, value in row.items() if _is_number(value))
    plain = dict.fromkeys(name.removeprefix("test_") for name in names if name not in ("epoch", "seconds"))
    panels = "".join(_panel(history, name) for name in plain)
    key = '<p class="quiet"><span class="key train">training</span> <span class="key test">test</span></p>'
    return f'<div class="figures">{panels}</div>{key}'


def _panel(history: list[dict[str, Any]], name: str) -> str:
    """One number over the epochs, in training and on the test data."""
    lines = {}
    for kind, key in (("train", name), ("test", f"test_{name}")):
        points = [(row["epoch"], row[key]) for row in history if _is_number(row.get(key)) and "epoch" in row]
        lines[kind] = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    xs, ys = ([point[axis] for line in lines.values() for point in line] for axis in (0, 1))
    if not xs:
        return ""
    (left, right), (low, high) = (min(xs), max(xs)), (min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left) if right > left else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return round(_LEFT + _WIDE * across, 1), round(_TOP + _HIGH * (1 - up), 1)

    drawn = []
    for kind, line in lines.items():
        points = [place(x, y) for x, y in line]
        if len(points) == 1:
            drawn.append(f'<circle class="{kind}" cx="{points[0][0]}" cy="{points[0][1]}" r="2.5"/>')
        elif points:
            drawn.append(f'<polyline class="{kind}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>')
    title, bottom = escape(name.replace("_", " ")), _TOP + _HIGH
    ends = [(_TOP + 4, high), (bottom, low)] if high > low else [(_TOP + _HIGH / 2 + 4, low)]
    labels = [f'<text x="{_LEFT - 4}" y="{y}" text-anchor="end">{_short(value)}</text>' for y, value in ends]
    labels += [f'<text x="{_LEFT}" y="{bottom + 13}">epoch {left:g}</text>'] if right > left else []
    labels += [f'<text x="{_LEFT + _WIDE}" y="{bottom + 13}" text-anchor="end">{right:g}</text>']
    return (
        f'<svg viewBox="0 0 {_LEFT + _WIDE + 6} {bottom + _BELOW}" role="img" aria-label="{title} over the epochs">'
        f'<rect class="frame" x="{_LEFT}" y="{_TOP}" width="{_WIDE}" height="{_HIGH}"/>'
        f'<text class="name" x="{_LEFT}" y="{_TOP - 7}">{title}</text>{"".join(labels)}{"".join(drawn)}</svg>'
    )


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _history(history: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in history for name in row))
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = ["".join(_entry(row.get(name)) for name in names) for row in history]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _entry(value: Any) -> str:
    if _is_number(value) and math.isfinite(value):
        return f"<td>{_number(value)}</td>"
    return f"<td>{escape('' if value is None else str(value))}</td>"


def _definitions(groups: list[list[_Run]]) -> str:
    columns = {column.whole: column for group in groups for run in group for column in run.columns.values()}
    better = {"higher": "Higher is better.", "lower": "Lower is better.", "": ""}
    items = "".join(
        f"<dt><b>{escape(title)}</b></dt><dd>{escape(column.text)} {better[column.better]}</dd>"
        for title, column in columns.items()
    )
    return f"<h2>What the columns are</h2><dl>{items}</dl>"
