"""What every kernel costs, counted in machine code that is compiled without a GPU, and the least time that it leaves.

`genfast bench cost` prints it. `compare` holds it against a table that was agreed on for one version of Triton.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from genfast import offline
from genfast._environment import HAS_TRITON, INTERPRETED
from genfast._files import between_markers, replacing
from genfast.cases import CASES, DTYPES

__all__ = [
    "H200_BYTES", "H200_INSTRUCTIONS", "Row", "aligned", "as_table", "compare", "costs", "issue_floor", "main",
    "markdown", "memory_floor", "save", "table",
]  # fmt: skip

# Bytes a second of a device copy, read and written: measured on an H200, whose data sheet says 4.8e12.
H200_BYTES = 4.3e12
# Lane-instructions a second, by data sheet: SMs, lanes that issue in each at every clock, and the boost clock in Hz.
H200_INSTRUCTIONS = 132 * 128 * 1.98e9

# How much worse than agreed a kernel may get.
SLACK = 0.03
START, END = "<!-- costs -->\n", "<!-- /costs -->"


def memory_floor(moved: float) -> float:
    """Picoseconds in which an H200 moves so many bytes.

    Example:
        >>> round(memory_floor(12), 2)
        2.79
    """
    return moved / H200_BYTES * 1e12


def issue_floor(instructions: float) -> float:
    """Picoseconds in which an H200 issues so many instructions of one lane.

    Example:
        >>> round(issue_floor(45.5), 2)
        1.36
    """
    return instructions / H200_INSTRUCTIONS * 1e12


@dataclass(frozen=True)
class Row:
    """What one kernel costs per element of its main tensor.

    Attributes:
        name, dtype, target, triton: which kernel, compiled for what and by which version.
        instructions: executed by one lane.
        registers: of a lane.
        spills: accesses to the memory that stands in for registers.
        widths: for each width in bits the number of accesses to global memory in a lane's share of a tile.
        bytes: read and written by design; single numbers per row are not counted.
    """

    name: str
    dtype: str
    target: str
    triton: str
    instructions: float
    registers: int
    spills: int
    widths: dict[int, int]
    bytes: int

    @property
    def memory_floor(self) -> float:
        """Picoseconds per element on an H200, were memory all that counts."""
        return memory_floor(self.bytes)

    @property
    def issue_floor(self) -> float:
        """Picoseconds per element on an H200, were the issue of instructions all that counts."""
        return issue_floor(self.instructions)

    @property
    def floor(self) -> float:
        """The larger of the two: no run on an H200 takes less time."""
        return max(self.memory_floor, self.issue_floor)

    @property
    def limit(self) -> str:
        """Which of the two it is: "memory" or "issue"."""
        return "memory" if self.memory_floor >= self.issue_floor else "issue"


def costs(
    ops: Sequence[str] = (), dtypes: Sequence[str] = tuple(DTYPES), target: str = "sm_90", workers: int = 1
) -> list[Row]:
    """Compile the kernels of some ops (all if empty) and count what they cost; a second for each kernel and dtype.

    Args:
        ops: names of ops; "philox" is the noise alone.
        dtypes: "fp32", "bf16", "fp16"; all if empty.
        target: "sm_80", "sm_90" or "sm_100".
        workers: processes that compile. Beyond one, a script must guard its main part by ``__name__ == "__main__"``.

    Raises:
        ValueError: an argument is none of those, Triton is not installed, or it interprets the kernels.
        RuntimeError: the compiler printed something.
    """
    return list(_counted(_tasks(ops, dtypes, target), workers))


def _tasks(ops: Sequence[str], dtypes: Sequence[str], target: str) -> list[tuple[str, str, str]]:
    """(dtype, name, target) of every kernel that was asked for."""
    if not HAS_TRITON:
        raise ValueError("triton: expected to be installed, since it compiles the kernels; it is not")
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET: expected to be unset, since interpreted kernels are not compiled; it is 1")
    targets = [name for name, (backend, *_) in offline.TARGETS.items() if backend == "cuda"]
    _require("target", target, targets)
    for dtype in dtypes:
        _require("dtypes", dtype, list(DTYPES))
    for op in ops:
        _require("ops", op, list(dict.fromkeys(map(_op, _kernels("fp32")))))
    tasks = [
        (dtype, name, target)
        for dtype in dict.fromkeys(dtypes or DTYPES)
        for name in _kernels(dtype)
        if not ops or _op(name) in ops
    ]
    if not tasks:
        raise ValueError(f"dtypes: expected fp32, the only one of {', '.join(ops)}, got {', '.join(dtypes)}")
    return tasks


def _require(argument: str, value: str, expected: Sequence[str]) -> None:
    if value not in expected:
        raise ValueError(f"{argument}: expected one of {', '.join(expected)}, got {value!r}")


def _op(name: str) -> str:
    return re.match(r"\w+", name)[0]


@functools.cache
def _kernels(dtype: str) -> dict[str, offline.Kernel]:
    return offline.every_launch(DTYPES[dtype])


def _count(task: tuple[str, str, str]) -> Row:
    import triton

    dtype, name, target = task
    kernel = _kernels(dtype)[name]
    counted = offline.cost(kernel.launch, target)
    return Row(
        name, dtype, target, triton.__version__, counted.instructions, counted.registers, counted.spills,
        counted.widths, kernel.bytes,
    )  # fmt: skip


def _counted(tasks: Sequence[tuple[str, str, str]], workers: int) -> Iterator[Row]:
    if workers == 1:
        yield from map(_count, tasks)
        return
    # Started afresh rather than forked: this process may have threads, or a GPU.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(_count, tasks)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; times only for sm_90, since they are an H200's."""
    header = ["kernel", "dtype", "instr", "regs", "spills", "accesses", "bytes"]
    on_h200 = all(row.target == "sm_90" for row in rows)
    if on_h200:
        header += ["memory ps", "issue ps", "bound by"]
    body = []
    for row in rows:
        widths = " ".join(f"{count}x{bits}" for bits, count in sorted(row.widths.items(), reverse=True))
        cells = [row.name, row.dtype, f"{row.instructions:.1f}", str(row.registers), str(row.spills), widths]
        cells.append(str(row.bytes))
        if on_h200:
            cells += [f"{row.memory_floor:.2f}", f"{row.issue_floor:.2f}", row.limit]
        body.append(cells)
    return aligned(header, body)


def aligned(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Columns of text, numbers to the right.

    Example:
        >>> print(aligned(["kernel", "instr"], [["kl_normal", "9.5"]]), end="")
        kernel     instr
        kl_normal    9.5
    """
    columns = []
    for name, *cells in zip(header, *body, strict=True):
        width = max(map(len, (name, *cells)))
        right = all(re.fullmatch(r"[\d.]+x?|-|", cell) for cell in cells)
        columns.append([cell.rjust(width) if right else cell.ljust(width) for cell in (name, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True)) + "\n"


def as_table(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows as the table that `compare` and `markdown` take: of one target and one version of Triton.

    Example:
        >>> row = Row("kl_normal", "fp32", "sm_90", "3.9.0", 33.5, 68, 0, {128: 16, 32: 1}, 16)
        >>> as_table([row])["kernels"]
        {'fp32': {'kl_normal': {'instructions': 33.5, 'registers': 68, 'spills': 0, 'bytes': 16}}}
    """
    kernels: dict[str, dict[str, Any]] = {}
    for row in rows:
        figures = {"instructions": round(row.instructions, 2), "registers": row.registers, "spills": row.spills}
        kernels.setdefault(row.dtype, {})[row.name] = {**figures, "bytes": row.bytes}
    return {"triton": rows[0].triton, "target": rows[0].target, "kernels": kernels}


def compare(rows: Sequence[Row], agreed: dict[str, Any]) -> list[str]:
    """What is worse than agreed, or cannot be compared with it; empty if nothing is.

    A kernel gets worse by more than 3% more instructions, by a spill, or by other traffic; one that is missing on
    either side is a problem too. Another target or version of Triton is the only problem reported: its figures differ
    for reasons of their own.

    Args:
        rows: what `costs` returned.
        agreed: as `as_table` makes it.

    Example:
        >>> row = Row("kl_normal", "fp32", "sm_90", "3.9.0", 33.5, 68, 0, {128: 16, 32: 1}, 16)
        >>> compare([row], as_table([row]))
        []
        >>> compare([row], {**as_table([row]), "triton": "3.8.0"})
        ['triton: the table holds for 3.8.0, this is 3.9.0']
    """
    other = [
        f"{name}: the table holds for {agreed[name]}, this is {value}"
        for name in ("triton", "target")
        for value in sorted({getattr(row, name) for row in rows} - {agreed[name]})
    ]
    if other:
        return other
    problems = []
    found = {(row.dtype, row.name) for row in rows}
    for dtype, names in agreed["kernels"].items():
        problems += [f"{dtype} {name}: in the table, but not counted" for name in names if (dtype, name) not in found]
    for row in rows:
        where, allowed = f"{row.dtype} {row.name}", agreed["kernels"].get(row.dtype, {}).get(row.name)
        if row.spills:
            problems.append(f"{where}: {row.spills} spills")
        if allowed is None:
            problems.append(f"{where}: not in the table")
            continue
        worse = row.instructions / allowed["instructions"] - 1
        if worse > SLACK:
            now = f"{row.instructions:.2f} instructions per element"
            problems.append(f"{where}: {now}, agreed {allowed['instructions']:.2f} ({worse:+.1%})")
        if row.bytes != allowed["bytes"]:
            problems.append(f"{where}: {row.bytes} bytes per element, agreed {allowed['bytes']}")
    return problems


def _agreed_rows(agreed: dict[str, Any]) -> dict[tuple[str, str], Row]:
    """The rows that a table was made of, but for their widths."""
    return {
        (dtype, name): Row(name, dtype, agreed["target"], agreed["triton"], widths={}, **figures)
        for dtype, kernels in agreed["kernels"].items()
        for name, figures in kernels.items()
    }


def markdown(agreed: dict[str, Any]) -> str:
    """The table of fp32 and bf16 as Markdown, with the least time per element that an H200 takes."""
    shown, rows = ("fp32", "bf16"), _agreed_rows(agreed)
    header = [f"kernel (triton {agreed['triton']}, {agreed['target']})"]
    header += [cell for dtype in shown for cell in (f"{dtype} instr", "bytes", "floor, ps", "bound by")]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---|---|---|---|" * len(shown)]
    for name in dict.fromkeys(name for _, name in rows):
        cells = [name]
        for dtype in shown:
            row = rows.get((dtype, name))
            cells += [f"{row.instructions:.1f}", str(row.bytes), f"{row.floor:.2f}", row.limit] if row else [""] * 4
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def save(rows: Sequence[Row], path: Path) -> list[Path]:
    """Write the table as JSON, a kernel a line, and between the markers of the README.md beside it if that has any.

    Returns:
        The files that were written.
    """
    agreed = as_table(rows)
    dtypes = []
    for dtype, kernels in agreed["kernels"].items():
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(figures)}" for name, figures in kernels.items())
        dtypes.append(f'  "{dtype}": {{\n{lines}\n  }}')
    head = f' "triton": {json.dumps(agreed["triton"])},\n "target": {json.dumps(agreed["target"])},\n'
    texts = {path: "{\n" + head + ' "kernels": {\n' + ",\n".join(dtypes) + "\n }\n}\n"}
    page = path.with_name("README.md")
    if page.is_file() and START in page.read_text():
        texts[page] = between_markers(page.read_text(), START, markdown(agreed), END)
    for place, text in texts.items():
        with replacing(place) as temporary:
            temporary.write_text(text)
    return list(texts)


def main(
    ops: Sequence[str], dtypes: Sequence[str], target: str, inductor: bool, check: Path | None, write: Path | None
) -> int:
    """Print the table and what was asked for besides; what `genfast bench cost` runs.

    Args:
        ops, dtypes, target: as `costs` takes them.
        inductor: also print what torch.compile would launch for the eager chains; fp32 and bf16 unless `dtypes` says.
        check: a table that `save` wrote; of it, what was asked for is compared.
        write: where to `save` the table; it must be a whole one.

    Returns:
        1 if the check found a problem, else 0.

    Raises:
        ValueError: an argument is not one of what `costs` takes; `check` is no table; `write` would not be a whole one.
        OSError: a file cannot be read or written.
    """
    tasks = _tasks(ops, dtypes, target)
    if write is not None and (ops or dtypes):
        raise ValueError("--write: expected every op and dtype, since the table is a whole one; got a choice of them")
    if write is not None and target != "sm_90":
        raise ValueError(f"--write: expected --target sm_90, whose floors the table shows, got {target}")
    if write is not None and not write.parent.is_dir():
        raise ValueError(f"--write: expected a file in a folder that exists, got {write}")
    agreed = None if check is None else _chosen(_read(check), ops, dtypes)
    processes = min(os.cpu_count() or 1, 4)
    rows: list[Row] = []
    # A process takes as long to start as several kernels to compile.
    for row in _counted(tasks, min(processes, -(-len(tasks) // 8))):
        if not rows or rows[-1].dtype != row.dtype:
            print(f"compiling for {target}: {row.dtype}", file=sys.stderr, flush=True)
        rows.append(row)
    print(table(rows), end="")
    print("per element of the main tensor, rows of 4,096; instr: of one lane; accesses: of a lane, number x bits")
    if target == "sm_90":
        rates = f"{H200_BYTES / 1e12:.1f} TB/s of device copy, {H200_INSTRUCTIONS / 1e12:.1f}e12 lane-instructions/s"
        print(f"ps: the least that an H200 takes, at {rates}")
    problems = [] if agreed is None else compare(rows, agreed)
    for problem in problems:
        print(f"NOT AS AGREED: {problem}")
    if agreed is not None and not problems:
        print(f"no more than {SLACK:.0%} above {check}, and no spills")
    if write is not None:
        print(*save(rows, write), sep="\n")
    chosen = [case.name for case in CASES if not ops or case.op in ops]
    if inductor and target != "sm_90":
        print(f"what torch.compile would launch is found for sm_90 alone, not for {target}")
    elif inductor and chosen:
        from genfast.bench import inductor as theirs

        print("lowering the eager chains", file=sys.stderr, flush=True)
        report = theirs.chains(chosen, dtypes or ("fp32", "bf16"), processes)
        print("", theirs.describe(report, rows), sep="\n", end="")
    return int(bool(problems))


def _read(path: Path) -> dict[str, Any]:
    try:
        agreed = json.loads(path.read_text())
        _agreed_rows(agreed)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"check: expected a table as --write writes it, {path} is none") from error
    return agreed


def _chosen(agreed: dict[str, Any], ops: Sequence[str], dtypes: Sequence[str]) -> dict[str, Any]:
    kernels = {
        dtype: {name: figures for name, figures in of.items() if not ops or _op(name) in ops}
        for dtype, of in agreed["kernels"].items()
        if not dtypes or dtype in dtypes
    }
    return {**agreed, "kernels": kernels}
