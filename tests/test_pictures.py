"""Pictures by the kind of model; those of the families on the command line are in its tests."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from genfast import pictures
from genfast.models import DDPM, VAE, Model, RealNVP
from genfast.pictures import draw, save_paths, save_pictures

IMAGES = torch.randint(0, 256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


class Own(Model):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))


def test_of_an_unknown_model_there_are_none(tmp_path):
    save_pictures(Own(), IMAGES, tmp_path, 0)
    assert not any(tmp_path.iterdir())


def test_a_class_of_your_own(tmp_path):
    class Mine(Own):
        pass

    class Child(Mine):
        pass

    @save_pictures.register
    def _(model: Mine, images, folder, seed):
        (folder / f"own-{seed}.png").touch()

    save_pictures(Child(), IMAGES, tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["own-3.png"]


def test_every_family_has_its_own(tmp_path, capsys):
    expected = {
        VAE(latent_dim=2, hidden_dims=(4,), image_shape=(1, 8, 8)): {"samples", "reconstructions", "manifold"},
        VAE(latent_dim=3, hidden_dims=(4,), image_shape=(1, 8, 8)): {"samples", "reconstructions", "interpolation"},
        DDPM(preset="tiny", num_steps=3, image_shape=(1, 8, 8)): {"samples", "forward", "reverse"},
        RealNVP(preset="tiny", image_shape=(1, 8, 8)): {"samples", "interpolation"},
    }
    for index, (model, names) in enumerate(expected.items()):
        folder = tmp_path / str(index)
        folder.mkdir()
        save_pictures(model, IMAGES, folder, 0)
        assert {path.stem for path in folder.iterdir()} == names


@pytest.mark.parametrize("schedule", ["linear", "rectified-flow"])
def test_a_compiled_model_is_drawn(schedule, capsys):
    model = DDPM(preset="tiny", schedule=schedule, image_shape=(1, 8, 8))
    options = {**model.quick_sampling(3), "seed": 0}
    expected = draw(model, 2, paths=True, **options)
    model.compile(backend="eager")
    assert torch.allclose(draw(model, 2, paths=True, **options), expected, atol=1e-5)
    assert expected.shape == (4, 2, 1, 8, 8)
    assert capsys.readouterr().out.count("drawing 2 images in 3 steps of ") == 2


def test_pieces_of_many_images(monkeypatch, capsys):
    model = DDPM(preset="tiny", image_shape=(1, 8, 8))
    whole = draw(model, 5, seed=0, sampler="ddim", steps=2)
    monkeypatch.setattr(pictures, "_AT_ONCE", 2)
    sizes = []
    model.net.register_forward_hook(lambda net, inputs, out: sizes.append(len(out)))
    assert torch.allclose(draw(model, 5, seed=0, sampler="ddim", steps=2), whole, atol=1e-5)
    assert sizes == [2, 2, 2, 2, 1, 1]
    rest = draw(model, 2, seed=0, sampler="ddim", steps=2, row_offset=3)
    assert torch.allclose(rest, whole[3:], atol=1e-5)


def test_paths_have_a_row_each_and_ten_columns(tmp_path):
    shade = torch.arange(21 * 9, dtype=torch.uint8).view(21, 9, 1, 1, 1).expand(-1, -1, 1, 60, 60)
    save_paths(shade, torch.arange(20, -1, -1), tmp_path / "paths.png")
    grid = np.array(Image.open(tmp_path / "paths.png"))
    below = grid[-(8 * 62 + 2) :]
    kept = [0, 2, 4, 7, 9, 11, 13, 16, 18, 20]
    assert below[32::62, 32::62].tolist() == [[frame * 9 + row for frame in kept] for row in range(8)]
    assert len(grid) > len(below)
