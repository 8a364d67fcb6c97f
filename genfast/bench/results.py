"""Measured results: a JSON file per machine, the ratios in it, tables of them, and the comparison of two files."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from genfast._files import between_markers, replacing
from genfast.bench.timing import Interval

__all__ = [
    "Change", "Ratio", "Results", "Row", "compare", "describe_changes", "headline", "in_page", "load_all", "markdown",
    "ratio",
]  # fmt: skip

FORMAT = 1
START, END = "<!-- results: written by `genfast bench report --page` -->\n", "<!-- /results -->"
NOT_MEASURED = "not measured"
# Less than this is a tie: two builds of the same code differ by as much.
TIE = 0.03
BASELINES = ("eager", "compiled", "reduce-overhead")


@dataclass(frozen=True)
class Row:
    """One chain at one size.

    Attributes:
        op, case, shape, dtype, mode, place, chain: what was timed; `case` names the op and its setting.
        time: seconds of a call: device time from a cold L2 on CUDA, wall-clock time elsewhere.
        graph: seconds of a call within a replayed CUDA graph; None where there is none, and `no_graph` says why.
        host: seconds that the host spends on a call, without waiting; None off CUDA.
        bytes: what the fused op moves by design; None for what is no single op.
        peak_bytes: memory held at most above the inputs; None where the device does not tell.
        copy_share: bytes over time, over the copy bandwidth of the same run.
        error: the largest error of fused from fp64 over what is allowed; None where nothing was compared.
        load: of the machine, as the case began.
        run: index into the runs of the file.
    """

    op: str
    case: str
    shape: tuple[int, ...]
    dtype: str
    mode: str
    place: str
    chain: str
    time: Interval
    graph: Interval | None = None
    no_graph: str | None = None
    host: Interval | None = None
    bytes: int | None = None
    peak_bytes: int | None = None
    copy_share: float | None = None
    error: float | None = None
    path: str | None = None
    load: float | None = None
    run: int = 0

    @property
    def group(self) -> tuple:
        """What the rows that may be compared with each other have in common."""
        return self.op, self.case, self.shape, self.dtype, self.mode, self.place

    @property
    def elements(self) -> int:
        """Elements of the main tensor."""
        return math.prod(self.shape)


@dataclass
class Results:
    """All that was measured on one machine.

    Attributes:
        machine: the name of the GPU, or of the CPU where there is none.
        kind: "cuda" or "cpu".
        runs: versions, clocks, copy bandwidth (bytes/s) and date of each run that rows refer to.
        rows: the figures.
    """

    machine: str
    kind: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def file_name(self) -> str:
        """Named by the machine.

        Example:
            >>> Results("NVIDIA H200", "cuda").file_name
            'nvidia-h200.json'
        """
        return re.sub(r"[^a-z0-9]+", "-", self.machine.lower()).strip("-") + ".json"

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a file that `save` wrote.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no results file of this format.
        """
        try:
            content = json.loads(Path(path).read_bytes())
            if content["format"] != FORMAT:
                raise ValueError(f"{path}: expected results of format {FORMAT}, got {content['format']}")
            rows, runs = [_row(entry) for entry in content["rows"]], content["runs"]
            whole = all(run["copy_bandwidth"] > 0 for run in runs) and all(row.run < len(runs) for row in rows)
            if not (rows and whole):
                raise TypeError("no rows, a run without its copy bandwidth, or a row without its run")
            return cls(content["machine"], content["kind"], runs, rows)
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: no results file of genfast ({type(error).__name__}: {error})") from error

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all, a row a line."""
        head = {"format": FORMAT, "machine": self.machine, "kind": self.kind, "runs": self.runs}
        lines = ",\n".join(json.dumps(_compact(row)) for row in self.rows)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + lines + "\n]}\n")

    def merge(self, newer: Results) -> None:
        """Take over a newer run of the same machine: its groups replace those measured before, all chains at once.

        So the chains of a group always come from one run.

        Raises:
            ValueError: it is of another machine.
        """
        if (self.machine, self.kind) != (newer.machine, newer.kind):
            raise ValueError(f"newer: expected results of {self.machine}, got {newer.machine}")
        replaced = {row.group for row in newer.rows}
        kept = [row for row in self.rows if row.group not in replaced]
        used = sorted({row.run for row in kept})
        place = {index: at for at, index in enumerate(used)}
        rows = [replace(row, run=place[row.run]) for row in kept]
        rows += [replace(row, run=len(used) + row.run) for row in newer.rows]
        self.runs = [self.runs[index] for index in used] + newer.runs
        self.rows = sorted(rows, key=_order)


def _order(row: Row) -> tuple:
    return row.op, row.case, row.elements, row.group


def _compact(row: Row) -> dict[str, Any]:
    """Without what is None, four digits of every time."""
    entry = {name: value for name, value in asdict(row).items() if value is not None}
    for name in ("time", "graph", "host"):
        if name in entry:
            interval = entry[name]
            entry[name] = [float(f"{interval[part]:.4g}") for part in ("median", "low", "high")] + [interval["rounds"]]
    for name in ("copy_share", "error", "load"):
        if name in entry:
            entry[name] = float(f"{entry[name]:.3g}")
    return entry


def _row(entry: dict[str, Any]) -> Row:
    intervals = {name: Interval(*entry[name]) for name in ("time", "graph", "host") if name in entry}
    if not all(0 < each.low <= each.median <= each.high for each in intervals.values()):
        raise TypeError(f"times that are none: {entry}")
    return Row(**{**entry, **intervals, "shape": tuple(entry["shape"])})


def load_all(folder: str | Path) -> list[Results]:
    """Every results file of a folder, GPUs first, by name.

    Raises:
        ValueError: a file is no results file.
    """
    found = [Results.load(path) for path in sorted(Path(folder).glob("*.json"))]
    return sorted(found, key=lambda results: (results.kind != "cuda", results.machine))


@dataclass(frozen=True, order=True)
class Ratio:
    """How many times faster one chain is than another, with an interval that covers both medians'."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Two digits; a tie within 3%; with its interval where that does not say which is faster."""
        if abs(self.value - 1) <= TIE:
            return f"tie, {self.value:.2f}x"
        doubt = f" [{self.low:.2f}, {self.high:.2f}]" if self.low <= 1 <= self.high else ""
        return f"{self.value:.2f}x{doubt}" if self.value < 9.95 else f"{self.value:.0f}x{doubt}"


def ratio(baseline: Interval, ours: Interval) -> Ratio:
    """The speed of ours over that of a baseline; above 1, ours is faster.

    Example:
        >>> print(ratio(Interval(3.0, 2.9, 3.1, 20), Interval(2.0, 1.9, 2.1, 20)))
        1.50x
        >>> print(ratio(Interval(2.0, 1.9, 2.1, 20), Interval(2.02, 1.9, 2.1, 20)))
        tie, 0.99x
        >>> print(ratio(Interval(2.2, 1.9, 2.3, 20), Interval(2.0, 1.9, 2.2, 20)))
        1.10x [0.86, 1.21]
    """
    return Ratio(baseline.median / ours.median, baseline.low / ours.high, baseline.high / ours.low)


def _groups(rows: Iterable[Row]) -> dict[tuple, dict[str, Row]]:
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row.group, {})[row.chain] = row
    return groups


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _versus(chains: dict[str, Row], ours: str, baseline: str, kind: str = "time") -> str:
    one, other = chains.get(ours), chains.get(baseline)
    values = [getattr(row, kind) if row is not None else None for row in (other, one)]
    return "" if None in values else str(ratio(*values))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Without the columns that say nothing."""
    kept = [column for column in range(len(header)) if any(row[column] for row in rows)]
    lines = ["| " + " | ".join(row[column] for column in kept) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(kept), *lines[1:]]) + "\n"


def describe(results: Results) -> str:
    """The machine and its versions in one line."""
    names = ("torch", "triton", "driver") if results.kind == "cuda" else ("torch", "threads")
    values = {name: sorted({str(run[name]) for run in results.runs if run.get(name)}) for name in names}
    parts = [f"{name} {' and '.join(found)}" for name, found in values.items() if found]
    copies = [each["copy_bandwidth"] for each in results.runs]
    return f"{results.machine} ({', '.join(parts)}; device copy {statistics.median(copies) / 1e9:,.0f} GB/s)"


def markdown(all_results: Sequence[Results]) -> str:
    """Every figure: a section for each machine, a table for each op and place."""
    if not all_results:
        return f"{NOT_MEASURED}\n"
    sections = []
    for results in all_results:
        lines = [f"## {describe(results)}\n"]
        by_table: dict[tuple[str, str], list[dict[str, Row]]] = {}
        for group, chains in _groups(results.rows).items():
            by_table.setdefault((group[0], group[5]), []).append(chains)
        for (op, place), groups in by_table.items():
            lines.append(f"### {op}{', between a producer and a consumer' if place == 'between' else ''}\n")
            of_an_op = all(row.bytes for chains in groups for row in chains.values()) and "fused" in groups[0]
            lines.append(_op_table(groups) if of_an_op else _plain_table(groups))
        sections.append("\n".join(lines))
    return "\n".join(sections)


def _op_table(groups: Sequence[dict[str, Row]]) -> str:
    header = (
        "case", "shape", "dtype", "mode", "fused", "of copy", "over eager", "over compiled", "over reduce-overhead",
        "over reference", "compiled: fused over eager", "in a graph: over eager", "over compiled", "host: fused",
        "over eager", "over compiled", "over reduce-overhead", "peak: fused, eager", "error", "path",
    )  # fmt: skip
    body = []
    for chains in groups:
        ours = chains.get("fused")
        if ours is None:
            continue
        peaks = [chains[name].peak_bytes if name in chains else None for name in ("fused", "eager")]
        body.append((
            ours.case, _size(ours.shape), ours.dtype, ours.mode, _time(ours.time.median),
            "" if ours.copy_share is None else f"{ours.copy_share:.0%}",
            *(_versus(chains, "fused", baseline) for baseline in (*BASELINES, "reference")),
            _versus(chains, "fused-compiled", "compiled"),
            *(_versus(chains, "fused", baseline, "graph") for baseline in ("eager", "compiled")),
            "" if ours.host is None else _time(ours.host.median),
            *(_versus(chains, "fused", baseline, "host") for baseline in BASELINES),
            "" if None in peaks else ", ".join(f"{peak / 2**20:,.1f} MiB" for peak in peaks),
            "" if ours.error is None else f"{ours.error:.2f}", ours.path or "",
        ))  # fmt: skip
    return _table(header, body)


def _plain_table(groups: Sequence[dict[str, Row]]) -> str:
    """Chains that are not those of an op: each with its time, and the first as the baseline."""
    body = []
    for chains in groups:
        first = next(iter(chains.values()))
        for row in chains.values():
            times = [_time(row.time.median)]
            times += ["" if interval is None else _time(interval.median) for interval in (row.graph, row.host)]
            speed = "" if row is first else str(ratio(first.time, row.time))
            body.append((row.case, _size(row.shape), row.dtype, row.chain, *times, speed))
    return _table(("case", "shape", "dtype", "what", "time", "in a graph", "host", "over the first"), body)


# What the README shows, at the largest size that was measured: label, case, dtypes, mode.
_BOTH = "forward+backward"
_HEADLINES = (
    ("reparameterize + KL", "reparameterize_kl", ("fp32", "bf16"), _BOTH),
    ("the same, packed", "reparameterize_kl_packed", ("fp32", "bf16"), _BOTH),
    ("KL of two Gaussians", "kl_normal", ("fp32", "bf16"), _BOTH),
    ("cross-entropy, uint8 images", "bernoulli_nll-uint8", ("fp32", "bf16"), _BOTH),
    ("its batch mean, float images", "bernoulli_nll-mean", ("fp32", "bf16"), _BOTH),
    ("noising, diffusion", "forward_noising", ("fp32", "bf16"), _BOTH),
    ("denoising loss, its batch mean", "denoising_loss-mean", ("fp32", "bf16"), _BOTH),
    ("noising, loss and gradient", "noising_and_loss", ("fp32", "bf16"), _BOTH),
    ("step back, DDPM", "reverse_step", ("fp32", "bf16"), _BOTH),
    ("uint8 images to logits (forward)", "dequantize_logit", ("fp32",), "forward"),
    ("the same, learned noise", "dequantize_logit-given", ("fp32", "bf16"), _BOTH),
    ("affine coupling", "affine_coupling", ("fp32", "bf16"), _BOTH),
    ("mixture coupling, 32 components", "mixture_logistic_coupling-32", ("fp32", "bf16"), _BOTH),
    ("coupling as a pair of halves", "coupling_of_halves", ("fp32", "bf16"), _BOTH),
    ("training step, VAE (MLP)", "vae mlp", ("fp32", "bf16"), ""),
    ("training step, VAE (conv)", "vae conv", ("fp32", "bf16"), ""),
    ("training step, DDPM (small U-Net)", "ddpm small", ("fp32", "bf16"), ""),
)


def headline(all_results: Sequence[Results]) -> str:
    """The README's table: forward + backward of every op, and training steps, at the largest size; GPUs first.

    Where no GPU has been measured, its rows say so.
    """
    header = ("forward + backward", "size", "fused", "of copy", "over eager", "over torch.compile", "on")
    body, notes = [], []
    gpus = [results for results in all_results if results.kind == "cuda"]
    for results in gpus:
        body += _headlines(results, "GPU", NOT_MEASURED)
    if not gpus:
        body.append(("every op and training step", *[NOT_MEASURED] * 5, "GPU"))
    for results in all_results:
        where = "GPU" if results.kind == "cuda" else "CPU"
        if where == "CPU":
            body += _headlines(results, where)
        notes.append(f"{where}: {describe(results)}.")
    return _table(header, body) + "".join(f"\n{note}\n" for note in notes)


def _headlines(results: Results, where: str, missing: str | None = None) -> list[tuple[str, ...]]:
    """A line for each dtype of each headline; where nothing of it was measured, one that says `missing`."""
    groups, lines = _groups(results.rows), []
    for label, case, dtypes, mode in _HEADLINES:
        found = []
        for dtype in dtypes:
            wanted = (case, dtype, mode, "alone" if mode else "")
            sizes = [chains for (_, name, _, *rest), chains in groups.items() if (name, *rest) == wanted]
            sizes = [chains for chains in sizes if "fused" in chains]
            if sizes:
                found.append((label, *_headline(max(sizes, key=lambda chains: chains["fused"].elements)), where))
        if not found and missing is not None:
            found = [(label, *[missing] * 5, where)]
        lines += found
    return lines


def _headline(chains: dict[str, Row]) -> tuple[str, ...]:
    ours = chains["fused"]
    share = "" if ours.copy_share is None else f"{ours.copy_share:.0%}"
    # An op is called as it is; a whole step is compiled on both sides.
    compiled = "fused" if ours.mode else "fused-compiled"
    versus = _versus(chains, "fused", "eager"), _versus(chains, compiled, "compiled")
    return f"{_size(ours.shape)} {ours.dtype}", _time(ours.time.median), share, *versus


def in_page(page: str, table: str) -> str:
    """A page with the table between its markers.

    Raises:
        ValueError: the page has no such markers.

    Example:
        >>> in_page(f"before {START}old {END} after", "new ") == f"before {START}new {END} after"
        True
    """
    return between_markers(page, START, table, END)


@dataclass(frozen=True)
class Change:
    """How a chain of ours went from one file to another, in its "time", "graph" or "host" figure.

    `absolute` is new over old, `relative` the same over the baseline of the same run: eager, or for the compiled chain
    what torch.compile makes of eager.
    """

    row: Row
    figure: str
    baseline: str
    absolute: Ratio
    relative: Ratio | None
    verdict: str


def compare(old: Results, new: Results, threshold: float = TIE) -> list[Change]:
    """What got slower or faster beyond noise, of the fused chains in both files.

    Slower means: by more than the threshold even at the ends of the intervals, and so in the figure itself as well as
    relative to the eager chain of the same run, so that neither a busier machine nor a new version of torch counts as
    ours. Between two machines only the relative figure counts.

    Returns:
        A change for each common row and figure, verdict "slower", "faster" or "".

    Raises:
        ValueError: the files have no row in common.
    """
    same = old.machine == new.machine
    before, after = _groups(old.rows), _groups(new.rows)
    changes = []
    for group in before.keys() & after.keys():
        for chain, baseline in (("fused", "eager"), ("fused-compiled", "compiled")):
            for figure in ("time", "graph", "host"):
                one, two = _figure(before[group], chain, figure), _figure(after[group], chain, figure)
                if one is None or two is None:
                    continue
                absolute, relative = ratio(two, one), None
                of_one, of_two = _figure(before[group], baseline, figure), _figure(after[group], baseline, figure)
                if of_one is not None and of_two is not None:
                    was, now = ratio(of_one, one), ratio(of_two, two)
                    relative = Ratio(was.value / now.value, was.low / now.high, was.high / now.low)
                judged = [each for each in (absolute if same else None, relative) if each is not None]
                verdict = ""
                if judged and all(each.low > 1 + threshold for each in judged):
                    verdict = "slower"
                elif judged and all(each.high < 1 - threshold for each in judged):
                    verdict = "faster"
                changes.append(Change(after[group][chain], figure, baseline, absolute, relative, verdict))
    if not changes:
        raise ValueError(f"new: expected fused chains in common with the old file of {old.machine}, got none")
    return sorted(changes, key=lambda change: _order(change.row))


def _figure(chains: dict[str, Row], chain: str, figure: str) -> Interval | None:
    return getattr(chains[chain], figure) if chain in chains else None


def describe_changes(old: Results, new: Results, changes: Sequence[Change], every: bool = False) -> str:
    """A comparison as lines of text: both machines, then what changed beyond noise, or everything."""
    lines = [f"old: {describe(old)}", f"new: {describe(new)}"]
    if old.machine != new.machine:
        lines.append("two machines: only the figures relative to their baselines are judged")
    verdicts = [change.verdict for change in changes]
    for change in changes:
        if not (every or change.verdict):
            continue
        row = change.row
        what = " ".join(filter(None, (row.case, _size(row.shape), row.dtype, row.mode, row.place, row.chain)))
        against = "" if change.relative is None else f", relative to {change.baseline} {_percent(change.relative)}"
        lines.append(f"{change.verdict or 'same':6}  {what}: {change.figure} {_percent(change.absolute)}{against}")
    lines.append(f"{len(changes)} figures: {verdicts.count('slower')} slower, {verdicts.count('faster')} faster")
    return "\n".join(lines) + "\n"


def _percent(change: Ratio) -> str:
    return f"{change.value:.3f}x [{change.low:.3f}, {change.high:.3f}]"
