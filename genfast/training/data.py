"""Images for training: how they are held (`DeviceDataset`), batched, brought to the device and given to CUDA graphs."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count, islice
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from genfast import random

__all__ = ["Binarize", "DeviceDataset", "Feed", "ImageBatches", "prefetch"]

Binarize = Literal["none", "threshold", "dynamic"]

_T = TypeVar("_T")

# Pixels at a time where a whole set is worked through: bounds the memory (fp32 noise: 64 MiB).
_CHUNK = 1 << 24


class DeviceDataset:
    """uint8 images that stay on the device, shuffled, binarized and batched there: no copies, no host sync.

    Images that do not fit stay in host memory, which may be a memory-mapped file, and each batch is gathered there and
    copied ahead of its use. Both give the same batches, bit for bit.

    Args:
        images: uint8 [N, C, H, W], or [N, H, W] for one channel.
        device: where the batches are wanted; where the images are if None.
        binarize: what a batch holds. "none": the images. "threshold": 255 where the pixel is 128 or more, else 0.
            "dynamic": 255 with probability pixel / 255, drawn anew in each epoch (Burda et al., "Importance weighted
            autoencoders", ICLR 2016).
        resident: whether the images are held on the device (True) or in host memory (False). None: on the device,
            unless it is a CUDA device and they would take more than half of its free memory.

    Attributes:
        images: all of them, on the device if `resident` (and binarized, if that is "threshold"), else in host memory.
        device: where the batches are made.
        resident: whether `images` are on the device.

    Raises:
        TypeError: `images` is not a uint8 tensor.
        ValueError: another number of dimensions, no images, an unknown `binarize`.

    Example:
        >>> from genfast.training import load_dataset
        >>> data = DeviceDataset(load_dataset("digits").test, binarize="dynamic")
        >>> batch, rows = next(data.batches(32, seed=0, epoch=1))
        >>> batch.shape, batch.dtype, batch.unique().tolist(), rows.shape
        (torch.Size([32, 1, 28, 28]), torch.uint8, [0, 255], torch.Size([32]))
    """

    def __init__(
        self,
        images: Tensor,
        device: torch.device | str | None = None,
        binarize: Binarize = "none",
        resident: bool | None = None,
    ) -> None:
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
        self.device = images.device if device is None else _with_index(device)
        self.binarize = binarize
        self._resident_wish = resident
        self.resident = _fits(images, self.device) if resident is None else resident
        self.images = images.to(self.device) if self.resident else images.cpu()
        if self.resident and binarize == "threshold":
            self.images = _threshold(self.images)
        self._digest: str | None = None

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return tuple(self.images.shape[1:])

    def to(self, device: torch.device | str) -> DeviceDataset:
        """The same data for `device`; itself if it is there already."""
        if _with_index(device) == self.device:
            return self
        return DeviceDataset(self.images, device, self.binarize, self._resident_wish)

    def digest(self) -> str:
        """16 hex digits that another data set will not have: of a SHA-256 over shape, `binarize` and every byte.

        The same wherever the images are held. Computed once.

        Example:
            >>> images = torch.zeros(2, 4, 4, dtype=torch.uint8)
            >>> DeviceDataset(images).digest() == DeviceDataset(images, binarize="dynamic").digest()
            False
        """
        if self._digest is None:
            digest = hashlib.sha256(f"{list(self.images.shape)} {self.binarize}".encode())
            for chunk in self.images.split(_rows_at_a_time(self.images)):
                # Held on the device, they are binarized already.
                chunk = _threshold(chunk) if self.binarize == "threshold" else chunk
                digest.update(chunk.cpu().contiguous().numpy())
            self._digest = digest.hexdigest()[:16]
        return self._digest

    def permutation(self, seed: int, epoch: int) -> Tensor:
        """The order of an epoch: int64 [N] beside the images, a function of (seed, epoch), the same on every device."""
        rows = torch.arange(len(self), device=self.images.device)
        zero = torch.zeros_like(rows)
        key = (zero + (seed & 0xFFFFFFFF), zero + (seed >> 32 & 0xFFFFFFFF))
        words = random.philox4x32(key, (zero, rows, zero, zero + (random.Stream.SHUFFLE | _salt(epoch) << 8)))
        # 63 bits, so ties hardly occur; a stable sort settles them the same way everywhere.
        return torch.argsort(words[0] << 31 | words[1] >> 1, stable=True)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        first: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, as (images, rows).

        Which image comes where, and its dynamic binarization, depend on `seed` and `epoch` but not on `batch_size`
        or `shard`.

        Args:
            batch_size: images per batch, over all processes; the last batch may hold fewer, unless `drop_last`.
            seed: of the order and of dynamic binarization, at most 64 bits.
            epoch: another one gives another order and other draws, for the same seed.
            shuffle: False keeps the order of the images.
            drop_last: leave a last, smaller batch out.
            first: batches to leave out at the start; they are not loaded.
            shard: (rank, world): only the rank-th of `world` equal ranges of each batch. Every process gets the same
                number of batches, though its part of a last, smaller one may be empty.

        Returns:
            Iterator over (uint8 [B, C, H, W], int64 [B]: which images these are), both on the device.

        Raises:
            ValueError: `batch_size` is not positive or no multiple of `world`, `first` is negative, or there is no
                such `shard`.
        """
        offset, share = _share_of(batch_size, shard)
        _check_first(first)
        end = len(self) - len(self) % batch_size if drop_last else len(self)
        starts = [start + offset for start in range(first * batch_size, end, batch_size)]
        return self._batches(starts, share, seed, epoch, shuffle)

    def _batches(
        self, starts: list[int], share: int, seed: int, epoch: int, shuffle: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.permutation(seed, epoch) if shuffle else torch.arange(len(self), device=self.images.device)
        noise_seed = random.as_seed(seed, self.device)
        gather = _Gather(self.images)
        shares = (order[start : start + share] for start in starts)
        if self.resident:
            gathered = map(gather.__getitem__, shares)
        else:
            # A generator of its own, or the loader would draw from torch's.
            loader = DataLoader(
                gather, batch_size=None, sampler=shares, collate_fn=tuple, generator=torch.Generator()
            )
            gathered = prefetch(loader, self.device)
        for start, (batch, rows) in zip(starts, gathered, strict=True):
            if self.binarize == "dynamic":
                batch = _draw_pixels(batch, noise_seed, start, epoch)
            elif self.binarize == "threshold" and not self.resident:
                batch = _threshold(batch)
            yield batch, rows

    def feed(self, batch_size: int, *, seed: int, shard: tuple[int, int] = (0, 1)) -> Feed:
        """The whole batches of one epoch after another, for a CUDA graph; see `Feed`.

        Args:
            batch_size, seed, shard: as for `batches`.

        Raises:
            ValueError: the images are not held on the device, or are fewer than `batch_size`; or as for `batches`.
        """
        return Feed(self, batch_size, seed=seed, shard=shard)


class Feed:
    """The batches of ``data.batches(..., drop_last=True)`` taken by the device alone, so that a CUDA graph can do it.

    All that `take` reads lies in memory whose addresses never change: the images, a table of every batch's rows and
    seed, and a counter on the device, which tells it the batch. With dynamic binarization there are an epoch's pixels
    besides, as many bytes as the images divided by the number of processes.

    Args:
        data: images that are held on the device.
        batch_size: images per batch, over all processes.
        seed: of the run: of the orders, of dynamic binarization and of the steps.
        shard: (rank, world), as for `DeviceDataset.batches`.

    Attributes:
        steps: batches per epoch.
        row_offset: place of this process's first row in each batch.
        left: batches of this epoch that `TrainStep` has not taken yet.

    Raises:
        ValueError: `data` is not resident or smaller than a batch; or as for `DeviceDataset.batches`.

    Example:
        >>> from genfast.training import load_dataset
        >>> feed = DeviceDataset(load_dataset("digits").train).feed(128, seed=0)
        >>> feed.start(epoch=1)
        >>> images, seed = feed.take()
        >>> feed.steps, images.shape, int(seed) == random.derive_seed(0, 1)
        (39, torch.Size([128, 1, 28, 28]), True)
    """

    def __init__(self, data: DeviceDataset, batch_size: int, *, seed: int, shard: tuple[int, int] = (0, 1)) -> None:
        self.row_offset, share = _share_of(batch_size, shard)
        if not data.resident:
            raise ValueError("data: expected images that are held on the device (resident), got some in host memory")
        _check_enough(len(data), batch_size)
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.steps = len(data) // batch_size
        # A row for each batch: its seed, then which images it holds.
        self._table = torch.zeros(self.steps, 1 + share, dtype=torch.int64, device=data.device)
        self.left = 0
        # Out of range, so that nothing can be taken before `start`.
        self._counter = torch.full((1,), self.steps, dtype=torch.int64, device=data.device)
        self._pixels: Tensor | None = None
        if data.binarize == "dynamic":
            self._pixels = data.images.new_empty(self.steps, share, *data.image_shape)

    def start(self, epoch: int, first: int = 0) -> None:
        """Prepare an epoch; it comes before the first `take`.

        Step s of the run, counted from 1 over all epochs, has the seed ``derive_seed(seed, s)``.

        Args:
            epoch: counts from 1.
            first: the batch that `take` begins with.

        Raises:
            ValueError: `epoch` is below 1, or there is no batch `first`.
        """
        if epoch < 1:
            raise ValueError(f"epoch: expected an int of at least 1, got {epoch}")
        if not 0 <= first < self.steps:
            raise ValueError(f"first: expected an int from 0 to {self.steps - 1}, got {first}")
        share = self._table.shape[1] - 1
        order = self.data.permutation(self.seed, epoch)[: self.steps * self.batch_size]
        rows = order.view(self.steps, self.batch_size)[:, self.row_offset : self.row_offset + share]
        self._table[:, 0].copy_(random.derive_seeds(self.seed, (epoch - 1) * self.steps + 1, self.steps))
        self._table[:, 1:].copy_(rows)
        self._counter.fill_(first)
        self.left = self.steps - first
        if self._pixels is not None:
            self._draw(self._pixels, epoch)

    def _draw(self, pixels: Tensor, epoch: int) -> None:
        noise_seed = random.as_seed(self.seed, self.data.device)
        # Several batches at once are neighbours in the epoch's order only where this process has all of it.
        whole = pixels.shape[1] == self.batch_size
        chunk = _rows_at_a_time(pixels) if whole else 1
        for start in range(0, self.steps, chunk):
            rows = self._table[start : start + chunk, 1:].flatten()
            place = start * self.batch_size + self.row_offset
            drawn = _draw_pixels(self.data.images.index_select(0, rows), noise_seed, place, epoch)
            pixels[start : start + chunk].copy_(drawn.view(-1, *pixels.shape[1:]))

    def take(self) -> tuple[Tensor, Tensor]:
        """The next batch; at most ``steps - first`` times after a `start`.

        Returns:
            (uint8 [b, C, H, W]: this process's images, int64 [1]: the step's seed), both on the device.
        """
        entry = self._table.index_select(0, self._counter).squeeze(0)
        if self._pixels is None:
            images = self.data.images.index_select(0, entry[1:])
        else:
            images = self._pixels.index_select(0, self._counter).squeeze(0)
        self._counter.add_(1)
        return images, entry[:1]


class _Gather(Dataset):
    """A whole batch as one item."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.images.index_select(0, rows), rows


def _with_index(device: torch.device | str) -> torch.device:
    return torch.empty(0, device=device).device


def _fits(images: Tensor, device: torch.device) -> bool:
    if device.type != "cuda" or images.device == device:
        return True
    return images.numel() <= torch.cuda.mem_get_info(device)[0] // 2


def _share_of(batch_size: int, shard: tuple[int, int]) -> tuple[int, int]:
    """This process's part of a batch: (its first row, its rows)."""
    rank, world = shard
    if batch_size < 1:
        raise ValueError(f"batch_size: expected a positive int, got {batch_size}")
    if not 0 <= rank < world:
        raise ValueError(f"shard: expected (rank, world) with 0 <= rank < world, got {tuple(shard)}")
    if batch_size % world:
        raise ValueError(f"batch_size: expected a multiple of the {world} processes, got {batch_size}")
    share = batch_size // world
    return rank * share, share


def _check_first(first: int) -> None:
    if first < 0:
        raise ValueError(f"first: expected a non-negative int, got {first}")


def _check_enough(images: int, batch_size: int) -> None:
    if batch_size > images:
        raise ValueError(f"batch_size: expected at most the {images} images of data, got {batch_size}")


def _rows_at_a_time(images: Tensor) -> int:
    return max(1, _CHUNK // images[0].numel())


def _threshold(images: Tensor) -> Tensor:
    return (images >= 128).to(torch.uint8) * 255


def _draw_pixels(images: Tensor, seed: Tensor, row_offset: int, epoch: int) -> Tensor:
    flat = images.flatten(1)
    u = random.uniform(seed, *flat.shape, random.Stream.BINARIZE, row_offset=row_offset, salt=_salt(epoch))
    return (flat > u * 255).to(torch.uint8).mul_(255).view_as(images)


def _salt(epoch: int) -> int:
    return epoch & 0xFFFFFF


class ImageBatches:
    """Every kind of data that `genfast.fit` takes, batched in one way; see `fit` for the kinds.

    A `DataLoader` decides about its batches and, with several processes, about the part of the data that each gets
    (bring a `DistributedSampler`); what is said of `batch_size` and `train` does not hold for it.

    Args:
        data: a uint8 tensor, a `DeviceDataset`, a torch `Dataset` or a `DataLoader`. Items and batches are image
            tensors, or tuples that begin with one.
        batch_size: images per batch, over all processes.
        device: where the batches are wanted.
        train: shuffled, and a last, smaller batch is left out (shuffling leaves out others in the next epoch).
            Otherwise in order, and all images. An `IterableDataset` is never shuffled.
        shard: (rank, world): each process gets the rank-th of `world` equal ranges of each batch; its part of a last,
            smaller one may be empty.

    Attributes:
        dataset: the `DeviceDataset`, if the data is held on the device as one; else None.

    Raises:
        TypeError: `data` is of another kind.
        ValueError: `batch_size` is not positive, no multiple of `world`, or in training more than the images; there is
            no such `shard`; or `data` holds nothing.

    Example:
        >>> from genfast.training import load_dataset
        >>> batches = ImageBatches(load_dataset("digits").train, 128, torch.device("cpu"), train=True)
        >>> len(batches), sum(len(batch) for batch, row in batches.epoch(seed=0, epoch=1))
        (39, 4992)
    """

    def __init__(
        self, data: Any, batch_size: int, device: torch.device, train: bool, shard: tuple[int, int] = (0, 1)
    ) -> None:
        if isinstance(data, Tensor):
            data = DeviceDataset(data)
        if not isinstance(data, (DeviceDataset, DataLoader, Dataset)):
            raise TypeError(
                "data: expected a uint8 image tensor, a DeviceDataset, a Dataset or a DataLoader, "
                f"got {type(data).__name__}"
            )
        self.batch_size, self.device, self.train, self.shard = batch_size, device, train, shard
        if not isinstance(data, DataLoader):
            self._offset, self._share = _share_of(batch_size, shard)
        if _is_sized(data):
            if len(data) == 0:
                raise ValueError("data: the Dataset is empty")
            if train:
                _check_enough(len(data), batch_size)
        self.data = data.to(device) if isinstance(data, DeviceDataset) else data
        self.dataset = self.data if isinstance(data, DeviceDataset) and self.data.resident else None

    def __len__(self) -> int:
        """The number of batches in an epoch; TypeError where it is unknown (an IterableDataset)."""
        if _is_sized(self.data):
            whole, rest = divmod(len(self.data), self.batch_size)
            return whole + (rest > 0 and not self.train)
        return len(self.data if isinstance(self.data, DataLoader) else self._stream())

    def epoch(self, seed: int, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, int]]:
        """The batches of one epoch.

        Args:
            seed: of the order and of dynamic binarization.
            epoch: another one gives another order; told to a loader's sampler that has ``set_epoch``.
            first: batches to leave out at the start. Those of an `IterableDataset` or a `DataLoader` are read and
                dropped (what the loader does at random is its own affair), others are not loaded.

        Returns:
            Iterator over (this process's images on the device, index of the first of them in the epoch's order over
            all processes; with a `DataLoader`, rank * 2^40 + the images that came before from it).

        Raises:
            ValueError: `first` is negative.
        """
        _check_first(first)
        if isinstance(self.data, DeviceDataset):
            return self._from_device_dataset(seed, epoch, first)
        if isinstance(self.data, DataLoader):
            batches = self._from_loader(epoch, first)
        elif isinstance(self.data, IterableDataset):
            batches = self._from_stream(first)
        else:
            batches = self._from_dataset(seed, epoch, first)
        return prefetch(batches, self.device)

    @property
    def decides_itself(self) -> bool:
        """Whether the data is a `DataLoader`."""
        return isinstance(self.data, DataLoader)

    @property
    def images(self) -> int | None:
        """How many images there are; None where that is unknown."""
        return _count(self.data.dataset if isinstance(self.data, DataLoader) else self.data)

    def describe(self) -> dict[str, Any]:
        """What a resumed run must find again: kind, images, shape, digest, binarize; None where unknown."""
        data = self.data
        found = dict.fromkeys(("kind", "images", "shape", "digest", "binarize"))
        found |= {"kind": type(data).__name__, "images": self.images}
        if isinstance(data, DeviceDataset):
            found |= {"shape": list(data.image_shape), "digest": data.digest(), "binarize": data.binarize}
        return found

    def _from_device_dataset(self, seed: int, epoch: int, first: int) -> Iterator[tuple[Tensor, int]]:
        batches = self.data.batches(
            self.batch_size, seed=seed, epoch=epoch, shuffle=self.train, drop_last=self.train, first=first,
            shard=self.shard,
        )  # fmt: skip
        for index, (images, _) in enumerate(batches, first):
            yield images, index * self.batch_size + self._offset

    def _from_dataset(self, seed: int, epoch: int, first: int) -> Iterator[tuple[Tensor, int]]:
        generator = torch.Generator().manual_seed(random.derive_seed(seed, epoch))
        images = len(self.data)
        order = (torch.randperm(images, generator=generator) if self.train else torch.arange(images)).tolist()
        starts = [index * self.batch_size + self._offset for index in range(first, len(self))]
        shares = [order[start : start + self._share] for start in starts]
        # An empty part gets its shape from an image that is loaded for it.
        loader = DataLoader(self.data, batch_sampler=[rows or order[-1:] for rows in shares], generator=generator)
        for start, rows, batch in zip(starts, shares, loader, strict=True):
            yield _images_of(batch)[: len(rows)], start

    def _from_stream(self, first: int) -> Iterator[tuple[Tensor, int]]:
        places = count(first * self.batch_size + self._offset, self.batch_size)
        for place, batch in zip(places, islice(self._stream(), first, None), strict=False):
            yield _images_of(batch)[self._offset : self._offset + self._share], place

    def _stream(self) -> DataLoader:
        # A generator of its own, or the loader would draw from torch's.
        return DataLoader(self.data, self.batch_size, drop_last=self.train, generator=torch.Generator())

    def _from_loader(self, epoch: int, first: int) -> Iterator[tuple[Tensor, int]]:
        for sampler in (self.data.sampler, self.data.batch_sampler):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        place = self.shard[0] << 40
        for index, batch in enumerate(self.data):
            images = _images_of(batch)
            if index >= first:
                yield images, place
            place += len(images)


def _is_sized(data: Any) -> bool:
    """Whether its images can be counted and taken by number."""
    return not isinstance(data, (DataLoader, IterableDataset))


def _count(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _images_of(batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        raise TypeError(
            f"data: expected batches that are an image tensor or begin with one, got {type(images).__name__}"
        )
    return images


def prefetch(
    batches: Iterable[tuple[Any, ...]], device: torch.device, depth: int = 2
) -> Iterator[tuple[Any, ...]]:
    """Batches brought to the device; to a CUDA device ahead of their use, by a thread and on a stream of its own.

    Args:
        batches: tuples; the tensors among their elements are moved.
        device: where to.
        depth: how many batches are made ready ahead.

    Returns:
        Iterator over the batches, in their order. What `batches` raises, it raises; closed early, it stops the thread.

    Example:
        >>> for images, row in prefetch([(torch.zeros(2, 3), 0), (torch.zeros(2, 3), 2)], torch.device("cpu")):
        ...     print(images.device, row)
        cpu 0
        cpu 2
    """
    if device.type != "cuda":
        # No thread: it would race with the model for torch's global generator.
        for batch in batches:
            yield _moved(batch, device)
        return
    source = iter(batches)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))

    def copy_next() -> tuple[tuple[Any, ...], torch.cuda.Event] | None:
        # Around all of it, since `batches` may work on the device too.
        with torch.cuda.stream(stream):
            batch = next(source, None)
            return None if batch is None else (_moved(batch, device), stream.record_event())

    with closing(_ahead(copy_next, depth)) as copies:
        for batch, copied in copies:
            consumer = torch.cuda.current_stream(device)
            consumer.wait_event(copied)
            for item in batch:
                if isinstance(item, Tensor):
                    # Else its memory could be given away while the consumer still reads it.
                    item.record_stream(consumer)
            yield batch


def _moved(batch: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    def move(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        if device.type == "cuda" and item.device.type == "cpu":
            item = item.pin_memory()
        # Towards the host nothing would wait for the copy.
        return item.to(device, non_blocking=device.type == "cuda")

    return tuple(map(move, batch))


def _ahead(pull: Callable[[], _T | None], depth: int) -> Iterator[_T]:
    """What `pull` returns until it returns None; a thread calls it, up to `depth` times ahead of the consumer."""
    with ThreadPoolExecutor(1, "genfast-prefetch") as thread:
        pulled = deque(thread.submit(pull) for _ in range(depth))
        try:
            while (item := pulled.popleft().result()) is not None:
                pulled.append(thread.submit(pull))
                yield item
        finally:
            for future in pulled:
                future.cancel()
