"""Pictures, pixel by pixel, and files that are whole or absent."""

import numpy as np
import pytest
import torch
from PIL import Image

from genfast._files import replacing
from genfast.report import save_curves, save_grid, save_pairs


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path)))


def test_grid_places_each_image(tmp_path):
    images = torch.arange(5).view(5, 1, 1, 1).expand(5, 1, 60, 60) / 5
    save_grid(images, tmp_path / "grid.png", columns=3, gap=1)
    grid = pixels(tmp_path / "grid.png")
    assert grid.shape == (2 * 61 + 1, 3 * 61 + 1)
    for index in range(5):
        row, column = divmod(index, 3)
        tile = grid[1 + row * 61 :, 1 + column * 61 :][:60, :60]
        assert (tile == index * 51).all()
    assert (grid[0] == 128).all()
    assert (grid[62:, 123:] == 128).all()


def test_grid_enlarges_small_images_and_keeps_colour(tmp_path):
    images = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1).repeat(4, 1, 8, 8)
    save_grid(images, tmp_path / "grid.png", gap=0)
    grid = pixels(tmp_path / "grid.png")
    assert grid.shape == (2 * 56, 2 * 56, 3)
    assert grid[5, 5].tolist() == [10, 20, 30]


@pytest.mark.parametrize("shape", [(2, 2, 4, 4), (1, 4, 4), (0, 1, 4, 4)])
def test_grid_refuses_other_shapes(tmp_path, shape):
    with pytest.raises(ValueError, match="images: expected"):
        save_grid(torch.zeros(shape), tmp_path / "grid.png")
    assert not any(tmp_path.iterdir())


def test_pairs_put_reconstructions_below(tmp_path):
    originals = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 60, 60)
    save_pairs(originals, (originals + 100).float() / 255, tmp_path / "pairs.png", columns=2)
    tiles = pixels(tmp_path / "pairs.png")[30::62, 30::62]
    assert tiles.tolist() == [[0, 1], [100, 101], [2, 3], [102, 103]]


def test_curves(tmp_path):
    rows = [{"epoch": e, "loss": 9 / e, "nll": 5 / e, "kl": 4 / e, "test_nll": 6 / e, "test_kl": 4 / e} for e in (1, 2)]
    save_curves(rows, tmp_path / "vae.png", title="vae")
    save_curves([{"epoch": 1, "loss": 2.0, "nll": 2.0}], tmp_path / "ae.png")
    assert Image.open(tmp_path / "vae.png").width > 2 * Image.open(tmp_path / "ae.png").width
    with pytest.raises(ValueError, match="history: expected at least one epoch"):
        save_curves([], tmp_path / "none.png")


def test_replacing_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write_half():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_named_as_it_was_asked_for(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "absent" / "x.png", tmp_path / "file" / "x.png"):
        with pytest.raises(OSError, match=r"x\.png") as caught:
            save_grid(torch.rand(1, 1, 4, 4), path)
        assert caught.value.filename == str(path)
