"""Pictures that set several models beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genfast._files import replacing
from genfast.metrics import Estimate

__all__ = ["Panel", "save_panels", "save_plots"]

_GAP = 1
# Pixels of a heading, of its letters, and between panels.
_BAND, _TEXT, _BETWEEN = 20, 13, 10
_SIDE = 28
# A file of a page of documentation.
_DPI = 100


def save_panels(
    panels: Mapping[str, Tensor], path: Path, columns: int = 8, across: int | None = None, scale: int | None = None
) -> None:
    """Write grids of images, each below its heading, as one PNG.

    Args:
        panels: from heading to images [N, C, H, W], float in [0, 1] or uint8, of one shape.
        path: of the PNG.
        columns: images per row of a grid.
        across: grids per row of the picture; all if None.
        scale: whole factor by which images are enlarged; about 28 pixels a side if None.

    Raises:
        ValueError: no panels.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_panels({"a": torch.rand(4, 1, 28, 28), "b": torch.rand(4, 1, 28, 28)}, Path(folder) / "ab.png", 2)
        ...     Image.open(f"{folder}/ab.png").size
        (144, 87)
    """
    from PIL import Image, ImageDraw, ImageFont

    if not panels:
        raise ValueError("panels: expected at least one, got none")
    grids = [_grid(images, columns, scale) for images in panels.values()]
    across = min(across or len(grids), len(grids))
    font = ImageFont.load_default(_TEXT)
    width = max(*(grid.width for grid in grids), *(math.ceil(font.getlength(heading)) for heading in panels))
    height = max(grid.height for grid in grids)
    down = -(-len(grids) // across)
    size = (across * width + (across + 1) * _BETWEEN, down * (height + _BAND) + (down - 1) * _BETWEEN + _BETWEEN)
    picture = Image.new("L" if all(grid.mode == "L" for grid in grids) else "RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for index, (heading, grid) in enumerate(zip(panels, grids, strict=True)):
        row, column = divmod(index, across)
        left, top = _BETWEEN + column * (width + _BETWEEN), row * (height + _BAND + _BETWEEN)
        draw.text((left, top + (_BAND - _TEXT) // 2 - 1), heading, fill="black", font=font)
        picture.paste(grid, (left, top + _BAND))
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def _grid(images: Tensor, columns: int, scale: int | None):
    from PIL import Image

    if images.dtype != torch.uint8:
        images = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    images = images.cpu()
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    whole = torch.full((channels, rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP), 128).to(torch.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + _GAP), (index % columns) * (width + _GAP)
        whole[:, top : top + height, left : left + width] = image
    scale = scale or max(1, _SIDE // max(height, width))
    whole = whole.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return Image.fromarray((whole[0] if channels == 1 else whole.permute(1, 2, 0).contiguous()).numpy())


@dataclass(frozen=True)
class Panel:
    """One plot of `save_plots`.

    Attributes:
        title, x, y: what stands above it and at its axes.
        lines: from label to points (x, y); y may be an `Estimate`, whose interval is drawn.
        log_x, log_y: logarithmic axes.
        levels: from label to the height of a dashed horizontal line.
        names: from label to a text at each of its points.
        y_limits: of the axis, where the data would hide what there is to see.
        ticks: texts at x = 0, 1, ... instead of numbers.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, Estimate | float]]]
    log_x: bool = False
    log_y: bool = False
    levels: Mapping[str, float] = field(default_factory=dict)
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    y_limits: tuple[float, float] | None = None
    ticks: Sequence[str] = ()


def save_plots(panels: Sequence[Panel], path: Path, across: int | None = None) -> None:
    """Write plots of lines beside each other as one PNG.

    Args:
        panels: the plots.
        path: of the PNG.
        across: plots per row; all if None.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     panel = Panel("KL over its weight", "weight", "nats", {"KL": [(1, 25.0), (5, Estimate(9.0, 8.9, 9.1))]})
        ...     save_plots([panel], Path(folder) / "kl.png")
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(across or len(panels), len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.4 * across, 3.5 * down), layout="constrained")
    FigureCanvasAgg(figure)
    everywhere = figure.subplots(down, across, squeeze=False).flatten()
    for axes, panel in zip(everywhere, panels, strict=False):
        _plot(axes, panel)
    for axes in everywhere[len(panels) :]:
        axes.remove()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, format="png")


def _plot(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    for label, points in panel.lines.items():
        if not points:
            continue
        xs, ys = zip(*points, strict=True)
        middle = [y.value if isinstance(y, Estimate) else y for y in ys]
        (line,) = axes.plot(xs, middle, ".-", label=label)
        if any(isinstance(y, Estimate) for y in ys):
            low, high = ([getattr(y, end) if isinstance(y, Estimate) else y for y in ys] for end in ("low", "high"))
            axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        for x, y, name in zip(xs, middle, panel.names.get(label, ()), strict=False):
            axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    for number, (label, height) in enumerate(panel.levels.items()):
        axes.axhline(height, color="black", linestyle=("--", ":", "-.")[number % 3], linewidth=1, label=label)
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks)
    elif panel.x == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if panel.y_limits is not None:
        axes.set_ylim(panel.y_limits)
    axes.grid(alpha=0.3)
    if len(panel.lines) + len(panel.levels) > 1:
        axes.legend(fontsize=8)
