"""Pictures, pixel by pixel, and files that are whole or absent."""

import sys

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from genfast._files import replacing
from genfast.report import find_ffmpeg, save_curves, save_grid, save_pairs, save_video, thin
from tests.stopping import full_disk


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


def test_labels_stand_above_their_columns(tmp_path):
    images = torch.full((6, 1, 60, 60), 100, dtype=torch.uint8)
    save_grid(images, tmp_path / "plain.png", columns=3)
    save_grid(images, tmp_path / "labelled.png", columns=3, labels=["first", "", "last"])
    plain, labelled = pixels(tmp_path / "plain.png"), pixels(tmp_path / "labelled.png")
    band = len(labelled) - len(plain)
    assert torch.equal(labelled[band:], plain)
    inked = (labelled[:band] < 255).any(0)
    assert [bool(inked[2 + column * 62 :][:60].any()) for column in range(3)] == [True, False, True]
    with pytest.raises(ValueError, match="labels: expected one for each of 3 columns, got 2"):
        save_grid(images, tmp_path / "none.png", columns=3, labels=["first", "last"])


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


def test_the_unit_of_the_curves(tmp_path):
    """Nats, where there is a likelihood; that takes room beside the axis."""
    save_curves([{"epoch": 1, "loss": 2.0, "nll": 2.0}], tmp_path / "nats.png")
    save_curves([{"epoch": 1, "loss": 2.0}], tmp_path / "errors.png")
    dark = [(pixels(tmp_path / name)[..., 0] < 128).sum(0) for name in ("nats.png", "errors.png")]
    nats, errors = (int((column > 200).nonzero()[0]) for column in dark)
    assert nats > errors + 10


def read_mp4(path):
    """What ffmpeg says of the file, and its frames [F, H, W, 3]."""
    reader = imageio_ffmpeg.read_frames(path)
    meta = next(reader)
    width, height = meta["size"]
    frames = [torch.frombuffer(bytearray(frame), dtype=torch.uint8).view(height, width, 3) for frame in reader]
    return meta, torch.stack(frames)


def read_gif(path):
    """The frames [F, H, W, 3], and for how many milliseconds each is shown."""
    frames = ImageSequence.all_frames(Image.open(path))
    pictures = torch.stack([torch.from_numpy(np.array(frame.convert("RGB"))) for frame in frames])
    return pictures, [frame.info["duration"] for frame in frames]


def grid_of(images, tmp_path, scale, columns=None):
    """What `save_grid` makes of large images, in RGB: the truth for a frame."""
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    save_grid(large, tmp_path / "truth.png", columns=columns, gap=2 * scale)
    return torch.from_numpy(np.array(Image.open(tmp_path / "truth.png").convert("RGB")))


def clip_of(frames, count=6, channels=1, size=28):
    """From noise to smooth pictures."""
    ramp = torch.linspace(0.1, 0.9, size)
    smooth = torch.stack([ramp.expand(size, size) * (c + 1) / channels for c in range(channels)])
    weight = torch.linspace(0, 1, frames).view(-1, 1, 1, 1, 1)
    return torch.lerp(torch.rand(frames, count, channels, size, size), smooth.expand(count, -1, -1, -1), weight)


@pytest.mark.parametrize("channels", [1, 3])
def test_mp4(channels, tmp_path):
    clip = clip_of(9, channels=channels)
    save_video(clip, tmp_path / "clip.mp4", fps=12.5, hold=0.4)
    meta, frames = read_mp4(tmp_path / "clip.mp4")
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p(tv, bt709, progressive")
    assert meta["fps"] == 12.5
    # The last frame stays for five more.
    assert len(frames) == 9 + 5
    assert meta["duration"] == pytest.approx(14 / 12.5, abs=0.01)
    for index in (0, 4, 8, 13):
        truth = grid_of(clip[min(index, 8)], tmp_path, scale=5)
        assert frames[index].shape == truth.shape
        error = (frames[index].int() - truth.int()).abs().float()
        # Smooth pictures are nearly themselves; noise is what compression leaves out.
        assert error.mean() < (15 if index < 8 else 4), index
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".mp4"] == ["clip.mp4"]


def test_mp4_begins_with_its_index(tmp_path):
    """Else a browser has to load the whole file before it shows anything."""
    save_video(clip_of(3), tmp_path / "clip.mp4")
    content = (tmp_path / "clip.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("shape", [(1, 480, 481), (3, 481, 480), (1, 7, 9)])
def test_mp4_has_even_sizes(shape, tmp_path):
    clip = torch.zeros(2, 1, *shape, dtype=torch.uint8)
    clip[..., -1, :] = clip[..., :, -1] = 250
    save_video(clip, tmp_path / "clip.mp4", gap=0)
    meta, frames = read_mp4(tmp_path / "clip.mp4")
    width, height = meta["size"]
    scale = {7: 53}.get(shape[1], 1)
    assert (width, height) == tuple(side * scale + side * scale % 2 for side in (shape[2], shape[1]))
    # What is added repeats the edge, which is bright here.
    assert frames[-1, -1].min() > 200
    assert frames[-1, :, -1].min() > 200


@pytest.mark.parametrize("channels", [1, 3])
def test_gif(channels, tmp_path):
    clip = clip_of(7, channels=channels)
    save_video(clip, tmp_path / "clip.gif", fps=12.5, hold=0.4, columns=6)
    frames, times = read_gif(tmp_path / "clip.gif")
    assert times == [80] * 6 + [400]
    for index in (0, 3, 6):
        truth = grid_of(clip[index], tmp_path, scale=3, columns=6)
        error = (frames[index].int() - truth.int()).abs().float()
        if channels == 1:
            assert error.max() == 0
        else:
            assert error.mean() < 12
    assert Image.open(tmp_path / "clip.gif").info["loop"] == 0


def test_frames_of_a_gif_are_long_enough_for_browsers(tmp_path):
    for fps, expected in ((100, 20), (30, 30), (0.5, 2000)):
        save_video(clip_of(3, count=1), tmp_path / "clip.gif", fps=fps, hold=0)
        assert read_gif(tmp_path / "clip.gif")[1] == [expected] * 3


def test_frames_that_are_equal_take_their_time_all_the_same(tmp_path):
    clip = clip_of(4, count=1)
    clip[2] = clip[1]
    save_video(clip, tmp_path / "clip.gif", hold=0.5)
    assert sum(read_gif(tmp_path / "clip.gif")[1]) == 3 * 50 + 500
    clip[3] = clip[2]
    save_video(clip, tmp_path / "clip.gif", hold=0.5)
    assert sum(read_gif(tmp_path / "clip.gif")[1]) == 3 * 50 + 500


@pytest.mark.parametrize("count", [1, 2, 119, 120, 121, 1001])
def test_long_clips_are_thinned(count, tmp_path):
    shades = torch.linspace(0, 255, count).round().to(torch.uint8)
    if count == 1:
        shades = torch.tensor([255], dtype=torch.uint8)
    save_video(shades.view(-1, 1, 1, 1, 1).expand(-1, 1, 1, 8, 8), tmp_path / "clip.mp4", hold=0, gap=0)
    _, frames = read_mp4(tmp_path / "clip.mp4")
    assert len(frames) == min(count, 120)
    seen = frames[:, 200, 200, 0].int()
    assert abs(int(seen[-1]) - 255) <= 3
    assert count == 1 or int(seen[0]) <= 3
    steps = seen.diff()
    assert count < 120 or (steps.min() >= 0 and steps.max() <= 5)


def test_thin():
    assert thin(torch.arange(5), 5).tolist() == [0, 1, 2, 3, 4]
    assert thin(torch.arange(1001), 3).tolist() == [0, 500, 1000]
    kept = thin(torch.arange(1000), 120)
    assert (len(kept), int(kept[0]), int(kept[-1])) == (120, 0, 999)
    assert set(kept.diff().tolist()) == {8, 9}


@pytest.mark.parametrize("shape", [(2, 3, 2, 4, 4), (3, 1, 4, 4), (0, 3, 1, 4, 4), (2, 0, 1, 4, 4)])
def test_video_refuses_other_shapes(shape, tmp_path):
    with pytest.raises(ValueError, match="frames: expected"):
        save_video(torch.zeros(shape), tmp_path / "clip.gif")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip.avi", {}, r"path: expected a name that ends in .mp4 or .gif, got .*clip.avi"),
        ("clip", {}, "path: expected a name"),
        ("clip.gif", {"fps": 0}, "fps: expected a rate above 0 and up to 100, got 0"),
        ("clip.mp4", {"fps": 101}, "fps: expected"),
        ("clip.mp4", {"fps": float("nan")}, "fps: expected"),
        ("clip.mp4", {"hold": -1}, "hold: expected a finite number of seconds, got -1"),
        ("clip.gif", {"hold": float("inf")}, "hold: expected"),
    ],
)
def test_video_refuses_bad_arguments(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_video(clip_of(2), tmp_path / name, **options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_a_video_that_cannot_be_written_leaves_what_was_there(suffix, tmp_path):
    path = tmp_path / f"clip.{suffix}"
    path.write_bytes(b"old")
    with full_disk(1000), pytest.raises(OSError, match=r"ffmpeg cannot write the video: .|too large"):
        save_video(clip_of(30), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match=rf"clip\.{suffix}") as caught:
        save_video(clip_of(2), tmp_path / "absent" / f"clip.{suffix}")
    assert caught.value.filename == str(tmp_path / "absent" / f"clip.{suffix}")


def test_an_encoder_that_fails_says_why(tmp_path, monkeypatch):
    encoder = tmp_path / "ffmpeg"
    encoder.write_text("#!/bin/sh\necho half > $(eval echo \\${$#})\necho 'no such codec' >&2\nexit 3\n")
    encoder.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(encoder))
    with pytest.raises(OSError, match="ffmpeg cannot write the video: no such codec"):
        save_video(clip_of(60, count=36), tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == [encoder]


def test_mp4_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match="mp4: expected the package imageio-ffmpeg, got none: pip install"):
        find_ffmpeg()
    with pytest.raises(ImportError, match="imageio-ffmpeg"):
        save_video(clip_of(2), tmp_path / "clip.mp4")
    assert not any(tmp_path.iterdir())
    save_video(clip_of(2), tmp_path / "clip.gif")


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
