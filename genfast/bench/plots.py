"""Pictures of measured results: speed-up over size, and bandwidth over size against the copy line."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from genfast._files import replacing
from genfast.bench.results import BASELINES, Results, Row, ratio

__all__ = ["save_plots"]

_STYLES = {"fp32": "-", "bf16": "--", "fp16": ":"}


def save_plots(results: Results, folder: str | Path) -> list[Path]:
    """Write MACHINE-speedup.png and MACHINE-bandwidth.png, a panel for each op, into a folder; returns the paths.

    Forward and backward, alone. What was measured at one size only is a point.

    Raises:
        ValueError: there is nothing to plot.
    """
    panels: dict[str, dict[tuple[str, tuple[int, ...]], dict[str, Row]]] = {}
    for row in results.rows:
        if row.mode == "forward+backward" and row.place == "alone":
            panels.setdefault(row.case, {}).setdefault((row.dtype, row.shape), {})[row.chain] = row
    if not panels:
        raise ValueError(f"results: {results.machine} has no figures of an op alone, forward and backward")
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    folder, stem = Path(folder), results.file_name.removesuffix(".json")

    def speedup(axes, sizes) -> None:
        for color, baseline in enumerate(BASELINES):
            for dtype in _STYLES:
                points = sorted(
                    (chains["fused"].elements, ratio(chains[baseline].time, chains["fused"].time))
                    for (kind, _), chains in sizes.items()
                    if kind == dtype and "fused" in chains and baseline in chains
                )  # fmt: skip
                if points:
                    x = [elements for elements, _ in points]
                    y = [value.value for _, value in points]
                    errors = [[v.value - v.low for _, v in points], [v.high - v.value for _, v in points]]
                    style = {"linestyle": _STYLES[dtype], "color": f"C{color}", "marker": ".", "capsize": 2}
                    axes.errorbar(x, y, errors, label=f"over {baseline}, {dtype}", **style)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="times faster")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())

    def bandwidth(axes, sizes) -> None:
        for color, chain in enumerate(("fused", *BASELINES)):
            for dtype in _STYLES:
                points = sorted(
                    (chains[chain].elements, chains[chain].bytes / chains[chain].time.median / 1e9)
                    for (kind, _), chains in sizes.items()
                    if kind == dtype and chain in chains and chains[chain].bytes
                )  # fmt: skip
                if points:
                    x, y = zip(*points, strict=True)
                    axes.plot(x, y, linestyle=_STYLES[dtype], color=f"C{color}", marker=".", label=f"{chain}, {dtype}")
        copy = statistics.median(run["copy_bandwidth"] for run in results.runs) / 1e9
        axes.axhline(copy, color="black", linewidth=0.8)
        axes.annotate("copy", (0.02, copy), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
        axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="GB/s of what fused moves by design")

    written = []
    for kind, draw in (("speedup", speedup), ("bandwidth", bandwidth)):
        path = folder / f"{stem}-{kind}.png"
        _draw_panels(panels, draw, f"{results.machine}: forward + backward", path)
        written.append(path)
    return written


def _draw_panels(panels: dict, draw: Callable, title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.8 * lines + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (case, sizes) in zip(grid, panels.items(), strict=False):
        draw(axes, sizes)
        axes.set_title(case)
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.remove()
    legend = {}
    for axes in grid[: len(panels)]:
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
