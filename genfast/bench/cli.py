"""`genfast bench`: tables and plots of measured results, their comparison, and what kernels cost without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genfast._files import replacing
from genfast.bench import results as measured

__all__ = ["app"]

app = typer.Typer(
    help="Tables of measured results (pytest benchmarks/ measures), and what kernels cost without a GPU.",
    rich_markup_mode=None,
)
RESULTS = Path("benchmarks/results")


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Without a command: the help."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder of results, one JSON file per machine.")] = RESULTS,
    out: Annotated[Path | None, typer.Option(help="Write the tables here instead of printing them.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Also write plots, two per machine, into this folder.")] = None,
    page: Annotated[Path | None, typer.Option(help="Put the short table between the markers of this page.")] = None,
) -> None:
    """Turn measured results into one Markdown table per op, plots, and the short table of the README."""
    if not results.is_dir():
        raise ValueError(f"--results: expected a folder, got {results}")
    found = measured.load_all(results)
    text = measured.markdown(found)
    if out is None and page is None:
        print(text, end="")
    if out is not None:
        _write(out, text)
    if page is not None:
        _write(page, measured.in_page(page.read_text(), measured.headline(found)))
    if plots is not None:
        from genfast.bench.plots import save_plots

        plots.mkdir(parents=True, exist_ok=True)
        for each in found:
            for path in save_plots(each, plots):
                print(path)


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="Results file of before.", show_default=False)],
    new: Annotated[Path, typer.Argument(help="Results file of now.", show_default=False)],
    every: Annotated[bool, typer.Option("--all", help="Also what did not change beyond noise.")] = False,
) -> None:
    """Compare two results files; exit code 1 if a fused chain got slower beyond noise."""
    before, after = measured.Results.load(old), measured.Results.load(new)
    changes = measured.compare(before, after)
    print(measured.describe_changes(before, after, changes, every), end="")
    raise typer.Exit(int(any(change.verdict == "slower" for change in changes)))


@app.command()
def cost(
    ops: Annotated[list[str] | None, typer.Argument(help="Names of ops; all if none.", show_default=False)] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32, bf16, fp16; all if none.")] = None,
    target: Annotated[str, typer.Option(help="sm_80, sm_90 or sm_100.")] = "sm_90",
    inductor: Annotated[bool, typer.Option(help="Also what torch.compile would launch for the eager chain.")] = True,
    check: Annotated[Path | None, typer.Option(help="Exit with 1 if a kernel got 3% worse than this table.")] = None,
    write: Annotated[Path | None, typer.Option(help="Write the table, and the README.md beside it.")] = None,
) -> None:
    """Count what every kernel costs, from machine code compiled without a GPU."""
    from genfast.bench import cost as costs

    raise typer.Exit(costs.main(ops or [], dtype or [], target, inductor, check, write))


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)
    print(path)
