"""Pictures of a model and of its training, and files that are complete or absent, never half written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["replacing", "save_curves", "save_grid", "save_pairs"]

_GAP = 2
_TILE = 56
_NAMES = {"loss": "loss", "nll": "reconstruction", "kl": "KL"}


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, with the same ending, which takes the name `path` when the block succeeds.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "note.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     print(sorted(path.name for path in Path(folder).iterdir()))
        ['note.txt']
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    """Write images in rows, each row of originals above the row of their reconstructions; as for `save_grid`."""
    whole = len(originals) - len(originals) % columns or len(originals)
    columns = min(columns, whole)
    upper, lower = (_as_uint8(images[:whole]).split(columns) for images in (originals, reconstructions))
    save_grid(torch.cat([row for pair in zip(upper, lower, strict=True) for row in pair]), path, columns)


def _as_uint8(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8:
        images = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return images.cpu()


def save_curves(history: Sequence[dict[str, float]], path: str | os.PathLike[str], title: str = "") -> None:
    """Plot loss, reconstruction term and KL over the epochs, train and test, as far as `history` holds them.

    Args:
        history: as `genfast.fit` returns it.
        path: of the PNG.
        title: above the plots.

    Raises:
        ValueError: `history` is empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not history:
        raise ValueError("history: expected at least one epoch, got none")
    names = [name for name in _NAMES if name in history[0]]
    if "kl" not in names:
        # An autoencoder's loss is its reconstruction term.
        names = names[:1]
    figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [row["epoch"] for row in history]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for key, label in ((name, "train"), (f"test_{name}", "test")):
            if key in history[0]:
                axes.plot(epochs, [row[key] for row in history], marker=".", label=label)
        axes.set(title=_NAMES[name], xlabel="epoch", ylabel="nats per image")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    if title:
        figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
