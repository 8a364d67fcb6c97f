"""Pictures of a model and of its training, and videos of how samples come about."""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from genfast._files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["find_ffmpeg", "save_curves", "save_grid", "save_pairs", "save_video", "thin"]

_GAP = 2
# Sides in pixels that enlarging aims at: at least that of one image, and about that of a video.
_TILE, _VIDEO = 56, 480
_FRAMES = 120
_BAND, _TEXT = 18, 12


def save_grid(
    images: Tensor,
    path: str | os.PathLike[str],
    columns: int | None = None,
    gap: int = _GAP,
    labels: Sequence[str] | None = None,
) -> None:
    """Write images as one PNG, row by row; small ones are enlarged by whole factors.

    Args:
        images: [N, C, H, W] with C = 1 or 3, float in [0, 1] or uint8.
        path: of the PNG.
        columns: images per row; about as many as there are rows if None.
        gap: pixels between images, before enlarging.
        labels: a short heading for each column; none if None.

    Raises:
        ValueError: another shape, no images, or another number of labels than of columns.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_grid(torch.rand(6, 1, 28, 28), f"{folder}/grid.png", columns=3)
        ...     Image.open(f"{folder}/grid.png").size
        (184, 124)
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[0] == 0:
        raise ValueError(f"images: expected [N, C, H, W] with 1 or 3 channels, got shape {list(images.shape)}")
    columns = columns or _columns(len(images))
    if labels is not None and len(labels) != columns:
        raise ValueError(f"labels: expected one for each of {columns} columns, got {len(labels)}")
    scale = max(1, _TILE // max(images.shape[2:]))
    picture = _picture(_enlarged(_grid(_as_uint8(images), columns, gap), scale))
    if labels is not None:
        picture = _with_labels(picture, labels, offset=gap * scale, step=(images.shape[3] + gap) * scale)
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


def save_video(
    frames: Tensor,
    path: str | os.PathLike[str],
    fps: float = 20.0,
    columns: int | None = None,
    hold: float = 1.0,
    gap: int = _GAP,
) -> None:
    """Write a video in which each frame is a grid of images, as in `save_grid`, enlarged by whole factors.

    A ``.mp4`` is H.264 as browsers play it, written by the ffmpeg that the package imageio-ffmpeg carries. A ``.gif``
    has 256 colours in each frame, and times that are multiples of 10 ms. Of more than 120 frames about that many are
    kept, evenly, the first and the last among them.

    Args:
        frames: [F, N, C, H, W] with C = 1 or 3, float in [0, 1] or uint8, as ``sample(trajectory=True)`` returns it.
        path: of the video; its ending, ``.mp4`` or ``.gif``, says which.
        fps: frames per second.
        columns: images per row of a frame; about as many as there are rows if None.
        hold: seconds for which the last frame stays.
        gap: pixels between images, before enlarging.

    Raises:
        ValueError: another shape, no frames, another ending, or a rate or time out of range.
        ImportError: for mp4, the package imageio-ffmpeg is not installed.
        OSError: the file cannot be written; one of that name stays as it was.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_video(torch.rand(5, 4, 1, 8, 8), f"{folder}/noise.gif")
        ...     os.listdir(folder)
        ['noise.gif']
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".mp4", ".gif"):
        raise ValueError(f"path: expected a name that ends in .mp4 or .gif, got {path}")
    if frames.ndim != 5 or frames.shape[2] not in (1, 3) or 0 in frames.shape:
        raise ValueError(f"frames: expected [F, N, C, H, W] with 1 or 3 channels, got shape {list(frames.shape)}")
    if not 0 < fps <= 100:
        raise ValueError(f"fps: expected a rate above 0 and up to 100, got {fps}")
    if not 0 <= hold < math.inf:
        raise ValueError(f"hold: expected a finite number of seconds, got {hold}")
    frames = _as_uint8(thin(frames, _FRAMES))
    columns = columns or _columns(frames.shape[1])
    grids = [_grid(frame, columns, gap) for frame in frames]
    scale = max(1, round(_VIDEO / max(grids[0].shape[1:])))
    with replacing(path) as temporary:
        if suffix == ".mp4":
            _write_mp4(grids, scale, temporary, fps, hold)
        else:
            _write_gif(grids, scale, temporary, fps, hold)


def thin(values: Tensor, most: int) -> Tensor:
    """At most `most` (at least 2) entries along the first dimension, evenly spaced, the first and the last among them.

    Example:
        >>> thin(torch.arange(11), 5)
        tensor([ 0,  2,  5,  8, 10])
    """
    if len(values) <= most:
        return values
    return values[torch.linspace(0, len(values) - 1, most, dtype=torch.float64).round().long().to(values.device)]


def _write_gif(grids: list[Tensor], scale: int, path: Path, fps: float, hold: float) -> None:
    pictures = [_picture(_enlarged(grid, scale)) for grid in grids]
    # A browser shows a frame of less than 20 ms for 100.
    frame_ms = max(20, 10 * round(100 / fps))
    last_ms = max(frame_ms, 10 * round(100 * hold))
    durations = [frame_ms] * (len(pictures) - 1) + [last_ms]
    pictures[0].save(path, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def _write_mp4(grids: list[Tensor], scale: int, path: Path, fps: float, hold: float) -> None:
    channels, height, width = _even(_enlarged(grids[0], scale)).shape
    command = [
        find_ffmpeg(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "gray" if channels == 1 else "rgb24",
        "-s", f"{width}x{height}", "-r", str(fps), "-i", "-",
        # Unless the file names the colours, each player guesses them from the size of the picture.
        "-vf", f"tpad=stop_mode=clone:stop_duration={hold},scale=out_color_matrix=bt709:out_range=tv,"
        "setparams=color_primaries=bt709:color_trc=bt709",
        "-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p", "-movflags", "+faststart", "-f", "mp4", str(path),
    ]  # fmt: skip
    # Rather than by ffmpeg: where this is impossible, Python's own error says why.
    path.touch()
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log) as ffmpeg,
    ):
        # Where it has stopped, it says why.
        with suppress(BrokenPipeError):
            for grid in grids:
                ffmpeg.stdin.write(_pixels(_even(_enlarged(grid, scale))).tobytes())
            ffmpeg.stdin.close()
        if ffmpeg.wait():
            log.seek(0)
            words = log.read().decode(errors="replace").strip().splitlines()
            why = words[-1] if words else f"exit code {ffmpeg.returncode}"
            raise OSError(f"ffmpeg cannot write the video: {why}")


def find_ffmpeg() -> str:
    """The path of the ffmpeg that writes mp4: that of the package imageio-ffmpeg, or what IMAGEIO_FFMPEG_EXE names.

    Raises:
        ImportError: the package is not installed, or has no ffmpeg for this machine.

    Example:
        >>> os.access(find_ffmpeg(), os.X_OK)
        True
    """
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        message = "mp4: expected the package imageio-ffmpeg, got none: pip install imageio-ffmpeg"
        raise ImportError(message) from error


def _columns(count: int) -> int:
    return math.isqrt(count - 1) + 1


def _grid(images: Tensor, columns: int, gap: int) -> Tensor:
    """uint8 images [N, C, H, W] as one, [C, rows * (H + gap) + gap, columns * (W + gap) + gap]."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    grid = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 128, dtype=torch.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    return grid


def _enlarged(grid: Tensor, scale: int) -> Tensor:
    return grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def _even(grid: Tensor) -> Tensor:
    """With a last row and column repeated where their number is odd: colours have half the resolution in H.264."""
    _, height, width = grid.shape
    rows, columns = torch.arange(height + height % 2), torch.arange(width + width % 2)
    return grid[:, rows.clamp(max=height - 1)][:, :, columns.clamp(max=width - 1)]


def _pixels(grid: Tensor) -> np.ndarray:
    return (grid[0] if len(grid) == 1 else grid.permute(1, 2, 0).contiguous()).numpy()


def _picture(grid: Tensor) -> Image:
    from PIL import Image

    return Image.fromarray(_pixels(grid))


def _with_labels(picture: Image, labels: Sequence[str], offset: int, step: int) -> Image:
    """The picture below a white band with a heading above each column."""
    from PIL import Image, ImageDraw, ImageFont

    labelled = Image.new(picture.mode, (picture.width, picture.height + _BAND), "white")
    labelled.paste(picture, (0, _BAND))
    draw, font = ImageDraw.Draw(labelled), ImageFont.load_default(_TEXT)
    for index, label in enumerate(labels):
        draw.text((offset + index * step, (_BAND - _TEXT) // 2), label, fill="black", font=font)
    return labelled


def _as_uint8(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8:
        images = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return images.cpu()


def save_curves(history: Sequence[dict[str, float]], path: str | os.PathLike[str], title: str = "") -> None:
    """Plot the negative ELBO and its two terms over the epochs, else bits per dimension, else the loss; train and test.

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
    if "bits_per_dim" in history[0]:
        panels = {"bits per dimension": ("bits_per_dim",)}
    # A loss without a likelihood in it has a unit of its own.
    unit = "nats per image" if "nll" in history[0] else ""
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, parts) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for prefix, label in (("", "train"), ("test_", "test")):
            rows = [row for row in history if prefix + parts[0] in row]
            if rows:
                values = [sum(row[prefix + part] for part in parts) for row in rows]
                axes.plot([row["epoch"] for row in rows], values, ".-", label=label)
        axes.set(title=name, xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    if title:
        figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
