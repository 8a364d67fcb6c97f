"""Where images come from: sets by name, and folders."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["DATASETS", "Splits", "load_dataset"]

# Name on the command line -> class in torchvision.datasets.
_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10"}
DATASETS = ("digits", *_TORCHVISION)

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
_HELD_OUT = ("test", "val", "valid", "validation")
# In a folder without such splits, every tenth image is held out.
_TEST_EVERY = 10


class Splits(NamedTuple):
    """A data set in memory: `train` and `test` are uint8 [N, C, H, W], their labels int64 [N], or None of a folder."""

    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None


def load_dataset(
    name_or_folder: str | os.PathLike[str] = "digits",
    root: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
) -> Splits:
    """Load a data set by name, or a folder of images, as uint8 tensors on the CPU.

    Args:
        name_or_folder: "digits" (bundled: 5,000 + 1,000 images of MNIST, 500 + 100 of each digit), "mnist",
            "fashion-mnist", "kmnist", "cifar10" (read through torchvision, and downloaded if absent), or a folder. A
            folder is searched through all its levels, but for hidden files and folders. If it has a subfolder ``train``
            beside ``test`` (or else ``val``, ``valid`` or ``validation``) they are the two splits, and nothing else is
            read; without ``train``, every tenth image by path is held out. Images are grey only if all of them are.
        root: where the named sets lie, as torchvision lays them out; the environment variable GENFAST_DATA if None,
            and ``~/.cache/genfast`` without it.
        image_size: height and width to bring all images to (the shorter side is scaled, the middle cut out). If
            None, images keep their size, and those of a folder must all have the same.

    Raises:
        ValueError: an unknown name, an empty folder, ``train`` beside folders of other names alone, an unreadable
            image, images of different sizes, a bad `image_size`.
        OSError: a named set is neither there nor to be downloaded.

    Example:
        >>> digits = load_dataset("digits")
        >>> digits.train.shape, digits.test.shape, digits.train.dtype
        (torch.Size([5000, 1, 28, 28]), torch.Size([1000, 1, 28, 28]), torch.uint8)
        >>> digits.test_labels.bincount().tolist()
        [100, 100, 100, 100, 100, 100, 100, 100, 100, 100]
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected a positive int, got {image_size}")
    name = os.fspath(name_or_folder)
    if name == "digits":
        splits = _load_digits()
    elif name in _TORCHVISION:
        root = Path(root or os.environ.get("GENFAST_DATA") or _cache_folder())
        splits = _load_torchvision(name, root.expanduser())
    elif Path(name).is_dir():
        return _load_folder(Path(name), image_size)
    else:
        raise ValueError(f"data: expected one of {', '.join(DATASETS)} or a folder of images, got {name!r}")
    return splits if image_size is None else _resized(splits, image_size)


def _load_digits() -> Splits:
    with (resources.files("genfast") / "data" / "digits.npz").open("rb") as file, np.load(file) as arrays:
        train, test = (torch.from_numpy(arrays[key]).unsqueeze(1) for key in ("x_train", "x_test"))
        train_labels, test_labels = (torch.from_numpy(arrays[key]).long() for key in ("y_train", "y_test"))
    return Splits("digits", train, test, train_labels, test_labels)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genfast"


def _load_torchvision(name: str, root: Path) -> Splits:
    from torchvision import datasets

    kind = getattr(datasets, _TORCHVISION[name])

    def split(train: bool) -> tuple[Tensor, Tensor]:
        try:
            try:
                found = kind(root, train=train, download=False)
            except RuntimeError:
                # Only what is not there is downloaded: a read-only root that has it works.
                found = kind(root, train=train, download=True)
        except Exception as error:
            # torchvision lets whatever its parsers and urllib raise come through.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(
                f"data: {name} can be neither read from {root} nor downloaded there ({reason}); name the folder that "
                "holds it with --data-root or GENFAST_DATA"
            ) from error
        # CIFAR-10 is a numpy array [N, H, W, C], the others are tensors [N, H, W].
        images = found.data
        images = images.unsqueeze(1) if images.ndim == 3 else torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return images, torch.as_tensor(found.targets, dtype=torch.int64)

    (train, train_labels), (test, test_labels) = split(True), split(False)
    return Splits(name, train, test, train_labels, test_labels)


def _resized(splits: Splits, size: int) -> Splits:
    """The square sets, scaled; in pieces, which bounds the memory."""

    def scale(images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) == (size, size):
            return images
        pieces = images.split(1024)
        resize = torch.nn.functional.interpolate
        return torch.cat([resize(piece, (size, size), mode="bilinear", antialias=True) for piece in pieces])

    return splits._replace(train=scale(splits.train), test=scale(splits.test))


def _load_folder(folder: Path, image_size: int | None) -> Splits:
    inner = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    held_out_names = [name for name in _HELD_OUT if name in inner]
    if "train" in inner and held_out_names:
        train_paths, test_paths = _image_paths(folder / "train"), _image_paths(folder / held_out_names[0])
    elif "train" in inner and len(inner) > 1:
        others = ", ".join(f"{name}/" for name in inner if name != "train")
        expected = ", ".join(f"{name}/" for name in _HELD_OUT)
        raise ValueError(f"data: {folder}: expected one of {expected} beside train/, got {others}")
    else:
        paths = _image_paths(folder)
        if len(paths) < 2:
            raise ValueError(f"data: {folder} holds a single image; at least two are needed, one of them for the test")
        test_paths = paths[_TEST_EVERY - 1 :: _TEST_EVERY] or paths[-1:]
        held_out = set(test_paths)
        train_paths = [path for path in paths if path not in held_out]
    images = _read_images([*train_paths, *test_paths], image_size)
    return Splits(folder.resolve().name, images[: len(train_paths)], images[len(train_paths) :])


def _image_paths(folder: Path) -> list[Path]:
    """All images below `folder`, sorted, without what is hidden (a Mac's shadow files, .ipynb_checkpoints)."""

    def is_image(path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        return path.suffix.lower() in _SUFFIXES and not hidden and path.is_file()

    paths = sorted(path for path in folder.rglob("*") if is_image(path))
    if not paths:
        raise ValueError(f"data: {folder} holds no images ({', '.join(sorted(_SUFFIXES))})")
    return paths


def _read_images(paths: list[Path], image_size: int | None) -> Tensor:
    """Decode to uint8 [N, C, H, W]; grey if every image is."""
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image, ImageOps

    def read(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"mode {image.mode} has more than 8 bits per channel")
                upright = ImageOps.exif_transpose(image)
                upright = upright.convert("L" if upright.mode in ("1", "L", "LA") else "RGB")
                if image_size is not None:
                    upright = ImageOps.fit(upright, (image_size, image_size), Image.Resampling.BILINEAR)
                return np.asarray(upright)
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(f"data: cannot read the image {path} ({error})") from error

    with ThreadPoolExecutor() as pool:
        arrays = []
        for path, array in zip(paths, pool.map(read, paths), strict=True):
            if arrays and array.shape[:2] != arrays[0].shape[:2]:
                (height, width), (first_height, first_width) = array.shape[:2], arrays[0].shape[:2]
                raise ValueError(
                    f"data: {path} is {height} x {width} and {paths[0]} is {first_height} x {first_width} pixels; give "
                    "one size to all with --image-size"
                )
            arrays.append(array)
    if any(array.ndim == 3 for array in arrays):
        arrays = [array if array.ndim == 3 else np.repeat(array[:, :, None], 3, axis=2) for array in arrays]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return torch.from_numpy(np.stack(arrays)).unsqueeze(1)
