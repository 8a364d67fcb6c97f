"""Images for training: where they come from (`load_dataset`) and how they are held and batched (`DeviceDataset`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from genfast import random

__all__ = ["DATASETS", "Binarize", "DeviceDataset", "Splits", "load_dataset"]

Binarize = Literal["none", "threshold", "dynamic"]

# Name on the command line -> class in torchvision.datasets.
_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10"}
DATASETS = ("digits", *_TORCHVISION)

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
_HELD_OUT = ("test", "val", "valid", "validation")
# In a folder without such splits, every tenth image is held out.
_TEST_EVERY = 10


class Splits(NamedTuple):
    """A data set in memory: `train` and `test` are uint8 [N, C, H, W]."""

    name: str
    train: Tensor
    test: Tensor


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
    return Splits("digits", train, test)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genfast"


def _load_torchvision(name: str, root: Path) -> Splits:
    from torchvision import datasets

    kind = getattr(datasets, _TORCHVISION[name])

    def split(train: bool) -> Tensor:
        try:
            try:
                images = kind(root, train=train, download=False).data
            except RuntimeError:
                # Only what is not there is downloaded: a read-only root that has it works.
                images = kind(root, train=train, download=True).data
        except Exception as error:
            # torchvision lets whatever its parsers and urllib raise come through.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(
                f"data: {name} can be neither read from {root} nor downloaded there ({reason}); name the folder that "
                "holds it with --data-root or GENFAST_DATA"
            ) from error
        # CIFAR-10 is a numpy array [N, H, W, C], the others are tensors [N, H, W].
        return images.unsqueeze(1) if images.ndim == 3 else torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    return Splits(name, split(True), split(False))


def _resized(splits: Splits, size: int) -> Splits:
    """The square sets, scaled; in pieces, which bounds the memory."""

    def scale(images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) == (size, size):
            return images
        pieces = images.split(1024)
        resize = torch.nn.functional.interpolate
        return torch.cat([resize(piece, (size, size), mode="bilinear", antialias=True) for piece in pieces])

    return Splits(splits.name, scale(splits.train), scale(splits.test))


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


class DeviceDataset:
    """uint8 images that stay on the device, shuffled, binarized and batched there: no copies, no host sync.

    Args:
        images: uint8 [N, C, H, W], or [N, H, W] for one channel.
        device: where they are held; where they are if None.
        binarize: what a batch holds. "none": the images. "threshold": 255 where the pixel is 128 or more, else 0.
            "dynamic": 255 with probability pixel / 255, drawn anew in each epoch (Burda et al., "Importance weighted
            autoencoders", ICLR 2016).

    Raises:
        TypeError: `images` is not a uint8 tensor.
        ValueError: another number of dimensions, no images, an unknown `binarize`.

    Example:
        >>> data = DeviceDataset(load_dataset("digits").test, binarize="dynamic")
        >>> batch, rows = next(data.batches(32, seed=0, epoch=1))
        >>> batch.shape, batch.dtype, batch.unique().tolist(), rows.shape
        (torch.Size([32, 1, 28, 28]), torch.uint8, [0, 255], torch.Size([32]))
    """

    def __init__(self, images: Tensor, device: torch.device | str | None = None, binarize: Binarize = "none") -> None:
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            came = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images: expected a uint8 tensor (0 to 255), got {came}")
        if images.ndim not in (3, 4) or images.numel() == 0:
            raise ValueError(
                f"images: expected at least one, as [N, C, H, W] or [N, H, W], got shape {list(images.shape)}"
            )
        if binarize not in get_args(Binarize):
            raise ValueError(f"binarize: expected one of {', '.join(get_args(Binarize))}, got {binarize!r}")
        images = images.unsqueeze(1) if images.ndim == 3 else images
        self.images = images.to(device)
        self.binarize = binarize
        if binarize == "threshold":
            self.images = (self.images >= 128).to(torch.uint8) * 255

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def device(self) -> torch.device:
        return self.images.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return tuple(self.images.shape[1:])

    def to(self, device: torch.device | str) -> DeviceDataset:
        """The same data on `device`; itself if it is there already."""
        if torch.empty(0, device=device).device == self.device:
            return self
        return DeviceDataset(self.images, device, self.binarize)

    def permutation(self, seed: int, epoch: int) -> Tensor:
        """The order of an epoch: int64 [N] on the device, a function of (seed, epoch), the same on every device."""
        rows = torch.arange(len(self), device=self.device)
        zero = torch.zeros_like(rows)
        key = (zero + (seed & 0xFFFFFFFF), zero + (seed >> 32 & 0xFFFFFFFF))
        words = random.philox4x32(key, (zero, rows, zero, zero + (random.Stream.SHUFFLE | _salt(epoch) << 8)))
        # 63 bits, so ties hardly occur; a stable sort settles them the same way everywhere.
        return torch.argsort(words[0] << 31 | words[1] >> 1, stable=True)

    def batches(
        self, batch_size: int, *, seed: int, epoch: int = 0, shuffle: bool = True, drop_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, as (images, rows).

        Which image comes where, and its dynamic binarization, depend on `seed` and `epoch` but not on `batch_size`.

        Args:
            batch_size: images per batch; the last batch may hold fewer, unless `drop_last`.
            seed: of the order and of dynamic binarization, at most 64 bits.
            epoch: another one gives another order and other draws, for the same seed.
            shuffle: False keeps the order of the images.
            drop_last: leave a last, smaller batch out.

        Returns:
            Iterator over (uint8 [B, C, H, W], int64 [B]: which images these are), both on the device.

        Raises:
            ValueError: `batch_size` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a positive int, got {batch_size}")
        order = self.permutation(seed, epoch) if shuffle else torch.arange(len(self), device=self.device)
        noise_seed = random.as_seed(seed, self.device)
        end = len(self) - len(self) % batch_size if drop_last else len(self)
        for start in range(0, end, batch_size):
            rows = order[start : start + batch_size]
            batch = self.images.index_select(0, rows)
            if self.binarize == "dynamic":
                batch = _draw_pixels(batch, noise_seed, start, epoch)
            yield batch, rows


def _draw_pixels(images: Tensor, seed: Tensor, row_offset: int, epoch: int) -> Tensor:
    flat = images.flatten(1)
    u = random.uniform(seed, *flat.shape, random.Stream.BINARIZE, row_offset=row_offset, salt=_salt(epoch))
    return (flat > u * 255).to(torch.uint8).mul_(255).view_as(images)


def _salt(epoch: int) -> int:
    return epoch & 0xFFFFFF


class ImageBatches:
    """Every kind of data that `genfast.fit` takes, batched in one way; see `fit` for the kinds.

    Args:
        data: a uint8 tensor, a `DeviceDataset`, a torch `Dataset` or a `DataLoader`. Items and batches are image
            tensors, or tuples that begin with one.
        batch_size: images per batch; a `DataLoader` keeps its own.
        device: where the batches are wanted.
        train: shuffled and, where there are enough images, all batches of one size (a last, smaller one is left out;
            shuffling leaves out others in the next epoch). Otherwise in order, and all images.

    Raises:
        TypeError: `data` is of another kind.
        ValueError: `batch_size` is not positive, or `data` holds nothing.

    Example:
        >>> batches = ImageBatches(load_dataset("digits").train, 128, torch.device("cpu"), train=True)
        >>> len(batches), sum(len(batch) for batch in batches.epoch(seed=0, epoch=1))
        (39, 4992)
    """

    def __init__(self, data: Any, batch_size: int, device: torch.device, train: bool) -> None:
        from torch.utils.data import DataLoader, Dataset, IterableDataset

        if batch_size < 1:
            raise ValueError(f"batch_size: expected a positive int, got {batch_size}")
        if isinstance(data, Tensor):
            data = DeviceDataset(data)
        self.batch_size, self.device, self.train = batch_size, device, train
        self.order = torch.Generator()
        if isinstance(data, DeviceDataset):
            self.source = data.to(device)
            self.drop_last = train and len(data) >= batch_size
        elif isinstance(data, DataLoader):
            self.source = data
        elif isinstance(data, IterableDataset):
            self.source = DataLoader(data, batch_size, generator=self.order)
        elif isinstance(data, Dataset):
            if len(data) == 0:
                raise ValueError("data: the Dataset is empty")
            drop_last = train and len(data) >= batch_size
            self.source = DataLoader(data, batch_size, shuffle=train, drop_last=drop_last, generator=self.order)
        else:
            raise TypeError(
                "data: expected a uint8 image tensor, a DeviceDataset, a Dataset or a DataLoader, "
                f"got {type(data).__name__}"
            )

    def __len__(self) -> int:
        """The number of batches in an epoch; TypeError where it is unknown (an IterableDataset)."""
        if isinstance(self.source, DeviceDataset):
            whole, rest = divmod(len(self.source), self.batch_size)
            return whole + (rest > 0 and not self.drop_last)
        return len(self.source)

    def epoch(self, seed: int, epoch: int) -> Iterator[Tensor]:
        """The image batches of one epoch, on the device."""
        if isinstance(self.source, DeviceDataset):
            batches = self.source.batches(
                self.batch_size, seed=seed, epoch=epoch, shuffle=self.train, drop_last=self.drop_last
            )
            return (batch for batch, _ in batches)
        self.order.manual_seed(random.derive_seed(seed, epoch))
        return (_images_of(batch).to(self.device, non_blocking=True) for batch in self.source)


def _images_of(batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        raise TypeError(
            f"data: expected batches that are an image tensor or begin with one, got {type(images).__name__}"
        )
    return images
