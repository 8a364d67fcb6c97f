"""The command line in this process, and what it reads and writes, for tests."""

from __future__ import annotations

import json

import numpy as np
import torch
from PIL import Image

from genfast.__main__ import main


def succeeds(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def fails(capsys, *arguments, code=2):
    """The one line on stderr of a command that fails."""
    assert main([str(argument) for argument in arguments]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(folder):
    return {path.name for path in folder.iterdir()}


def rows_of(run):
    """The epochs of a run, as `metrics.jsonl` has them."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path)))


def tiles(path, rows, columns, side=8, gap=2):
    """The images [rows, columns, H, W] of a grid of grey ones; above it there may be headings."""
    scale = 56 // side
    picture = pixels(path)[-scale * (rows * (side + gap) + gap) :]
    assert picture.shape == (scale * (rows * (side + gap) + gap), scale * (columns * (side + gap) + gap))
    picture = picture[scale // 2 :: scale, scale // 2 :: scale][gap:, gap:]
    picture = picture.unflatten(0, (rows, side + gap)).unflatten(2, (columns, side + gap))
    return picture[:, :side, :, :side].transpose(1, 2)


def write_images(folder, count=12, size=(28, 28)):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, size[1], size[0]), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:02}.png")
    return folder
