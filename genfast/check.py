"""`genfast check`: the largest error of the fused and the eager path against fp64, on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from genfast.cases import CASES, DTYPES, Case, cases, differentiable, run
from genfast.functional._register import INTERPRETED, path

SHAPES = ((128, 20), (16, 784), (2, 4, 32, 32))


@dataclass(frozen=True)
class Row:
    """One line of the table; errors are relative to the largest exact value of the output."""

    case: str
    dtype: str
    shape: tuple[int, ...]
    output: str
    path: str
    fused: float
    eager: float | None
    passed: bool


def path_taken(device: torch.device, dtype: torch.dtype) -> str:
    """"reference", "interpreted" or "triton": the row of `genfast.cases.TOLERANCES` that holds here."""
    name = path(device, dtype)[0]
    return "interpreted" if name == "triton" and INTERPRETED else name


def _error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    scale = exact.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((actual.double() - exact).abs().max() / scale).item()


def _rows(case: Case, dtype_name: str, shape: tuple[int, ...], device: torch.device) -> Iterator[Row]:
    dtype = DTYPES[dtype_name]
    inputs = case.inputs(shape, dtype, str(device), torch.Generator().manual_seed(0))
    taken = path_taken(device, dtype)
    exact, exact_grads = run(case, "exact", inputs)
    fused, fused_grads = run(case, "fused", inputs)
    eager, eager_grads = run(case, "eager", inputs)
    # An eager chain that draws noise of its own: only what does not depend on it can be compared.
    comparable = case.comparable
    for name, got, own, want in zip(case.outputs, fused, eager, exact, strict=True):
        eager_error = _error(own, want) if comparable or name in case.sums else None
        passed = case.tolerance(taken, dtype, name).excess(got, want) <= 1
        yield Row(case.name, dtype_name, shape, name, taken, _error(got, want), eager_error, passed)
    for name in differentiable(inputs):
        got, own, want = fused_grads[name], eager_grads[name], exact_grads[name]
        eager_error = _error(own, want) if comparable else None
        passed = case.tolerance(taken, dtype).excess(got, want) <= 1
        yield Row(case.name, dtype_name, shape, f"d {name}", taken, _error(got, want), eager_error, passed)


def check(ops: Sequence[str] = (), device: torch.device | str | None = None) -> list[Row]:
    """Run the numerics of some ops (all if empty) on a device.

    Raises:
        ValueError: an op is unknown.

    Example:
        >>> rows = check(["kl_normal"], "cpu")
        >>> all(row.passed for row in rows)
        True
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    chosen = [case for op in ops for case in cases(op)] if ops else list(CASES)
    return [row for case in chosen for dtype in DTYPES for shape in SHAPES for row in _rows(case, dtype, shape, device)]


def main(ops: Sequence[str] = (), device: str | None = None) -> int:
    """Print the table; returns 1 where an error is beyond the tolerance, else 0."""
    rows = check(ops, device)
    width = max(len(row.case) for row in rows)
    print(f"{'case':{width}}  dtype  {'shape':15}  {'output':11}  {'path':11}  fused     eager     verdict")
    for row in rows:
        eager = f"{row.eager:8.1e}" if row.eager is not None else "own noise"
        verdict = "ok" if row.passed else "BEYOND TOLERANCE"
        shape = "x".join(map(str, row.shape))
        left = f"{row.case:{width}}  {row.dtype:5}  {shape:15}  {row.output:11}  {row.path:11}"
        print(f"{left}  {row.fused:8.1e}  {eager:9} {verdict}")
    print("errors: largest difference from fp64 on the same inputs, over the largest exact value")
    return int(not all(row.passed for row in rows))
