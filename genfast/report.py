"""Pictures of a model and of its training."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from genfast._files import replacing

__all__ = ["save_curves", "save_grid", "save_pairs"]

_GAP = 2
_TILE = 56


def save_grid(images: Tensor, path: str | os.PathLike[str], columns: int | None = None, gap: int = _GAP) -> None:
    """Write images as one PNG, row by row; small ones are enlarged by whole factors.

    Args:
        images: [N, C, H, W] with C = 1 or 3, float in [0, 1] or uint8.
        path: of the PNG.
        columns: images per row; about as many as there are rows if None.
        gap: pixels between images, before enlarging.

    Raises:
        ValueError: another shape, or no images.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_grid(torch.rand(6, 1, 28, 28), f"{folder}/grid.png", columns=3)
        ...     Image.open(f"{folder}/grid.png").size
        (184, 124)
    """
    from PIL import Image

    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[0] == 0:
        raise ValueError(f"images: expected [N, C, H, W] with 1 or 3 channels, got shape {list(images.shape)}")
    images = _as_uint8(images)
    count, channels, height, width = images.shape
    columns = columns or math.isqrt(count - 1) + 1
    rows = -(-count // columns)
    grid = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 128, dtype=torch.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    scale = max(1, _TILE // max(height, width))
    grid = grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    picture = Image.fromarray(grid[0].numpy() if channels == 1 else grid.permute(1, 2, 0).contiguous().numpy())
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def save_pairs(originals: Tensor, reconstructions: Tensor, path: str | os.PathLike[str], columns: int = 12) -> None:
    """Write rows of originals, each above the row of their reconstructions; a last, shorter row is left out.

    Args:
        originals, reconstructions: of one shape, as for `save_grid`.
        path: of the PNG.
        columns: images per row; fewer if there are fewer.

    Example:
        >>> import tempfile
        >>> x = torch.rand(4, 1, 8, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pairs(x, x.round(), f"{folder}/pairs.png")
    """
    whole = len(originals) - len(originals) % columns or len(originals)
    columns = min(columns, whole)
    upper, lower = (_as_uint8(images[:whole]).split(columns) for images in (originals, reconstructions))
    save_grid(torch.cat([row for pair in zip(upper, lower, strict=True) for row in pair]), path, columns)


def _as_uint8(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8:
        images = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return images.cpu()


def save_curves(history: Sequence[dict[str, float]], path: str | os.PathLike[str], title: str = "") -> None:
    """Plot the negative ELBO and its two terms over the epochs, or the loss of models without a KL; train and test.

    Args:
        history: as `genfast.fit` returns it.
        path: of the PNG.
        title: above the plots.

    Raises:
        ValueError: `history` is empty.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_curves([{"epoch": 1, "loss": 9.0}, {"epoch": 2, "loss": 7.0}], f"{folder}/curves.png")
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not history:
        raise ValueError("history: expected at least one epoch, got none")
    panels = {"loss": ("loss",)}
    if "kl" in history[0]:
        # The sum, not the loss: beta and free bits are in the loss of training, and not in that of the test.
        panels = {"negative ELBO": ("nll", "kl"), "reconstruction": ("nll",), "KL": ("kl",)}
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, parts) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for prefix, label in (("", "train"), ("test_", "test")):
            rows = [row for row in history if prefix + parts[0] in row]
            if rows:
                values = [sum(row[prefix + part] for part in parts) for row in rows]
                axes.plot([row["epoch"] for row in rows], values, ".-", label=label)
        axes.set(title=name, xlabel="epoch", ylabel="nats per image")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    if title:
        figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
