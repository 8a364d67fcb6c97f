"""How images are held, shuffled, binarized and batched, brought to the device and fed to graphs."""

import json
import threading
import traceback
from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from genfast import random
from genfast.training import DeviceDataset, load_dataset
from genfast.training.data import ImageBatches, _ahead, _fits, prefetch

CPU = torch.device("cpu")
BINARIZE = ("none", "threshold", "dynamic")


class Calls(TorchDispatchMode):
    """Each call of an op, with shapes in place of tensors, and how many images were gathered."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.gathered = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, tree_map_only(torch.Tensor, lambda tensor: tuple(tensor.shape), args)))
        result = func(*args, **kwargs or {})
        if func is torch.ops.aten.index_select.default and result.ndim == 4:
            self.gathered += len(result)
        return result


def numbered(images):
    return torch.arange(images, dtype=torch.uint8).view(-1, 1, 1, 1)


def grey(images, size=3):
    """Images of the middle greys, on which every binarization shows."""
    generator = torch.Generator().manual_seed(images)
    return torch.randint(64, 192, (images, 1, size, size), dtype=torch.uint8, generator=generator)


def same(got, want):
    """Pairs of tensors, in the same order."""
    got, want = list(got), list(want)
    return len(got) == len(want) and all(
        torch.equal(a, b) for pair in zip(got, want, strict=True) for a, b in zip(*pair, strict=True)
    )


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@given(count=st.integers(1, 300), seed=st.integers(-(2**63), 2**63 - 1), epoch=st.integers(0, 2**24 - 1))
def test_permutation_covers_every_row_once(count, seed, epoch):
    data = DeviceDataset(torch.zeros(count, 1, 1, dtype=torch.uint8))
    assert torch.equal(data.permutation(seed, epoch).sort().values, torch.arange(count))


def test_permutation_depends_on_seed_and_epoch():
    data = DeviceDataset(torch.zeros(100, 1, 1, dtype=torch.uint8))
    assert torch.equal(data.permutation(5, 1), data.permutation(5, 1))
    different = [(5, 1), (5, 2), (6, 1), (5 + 2**32, 1)]
    assert len({tuple(data.permutation(*key).tolist()) for key in different}) == len(different)


def test_permutations_are_uniform():
    data = DeviceDataset(torch.zeros(3, 1, 1, dtype=torch.uint8))
    orders = [tuple(data.permutation(0, epoch).tolist()) for epoch in range(3000)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 6
    # Chi-square with 5 degrees of freedom, at 1e-4.
    assert ((counts - 500) ** 2 / 500).sum() < 25.7


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_batches_hold_each_image_once_in_an_order_of_their_own(batch_size):
    images = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1)
    batches = list(DeviceDataset(images).batches(batch_size, seed=3, epoch=2))
    rows = torch.cat([rows for _, rows in batches])
    assert torch.equal(rows, DeviceDataset(images).permutation(3, 2))
    assert torch.equal(torch.cat([batch for batch, _ in batches]), images[rows])
    assert all(len(batch) == batch_size for batch, _ in batches[:-1])


def test_batches_without_shuffle_and_without_the_last():
    images = torch.arange(10, dtype=torch.uint8).view(-1, 1, 1)
    batches = [batch.flatten().tolist() for batch, _ in DeviceDataset(images).batches(4, seed=0, shuffle=False)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [len(batch) for batch, _ in DeviceDataset(images).batches(4, seed=0, drop_last=True)] == [4, 4]


def test_threshold():
    data = DeviceDataset(torch.tensor([[[0, 127, 128, 255]]], dtype=torch.uint8), binarize="threshold")
    assert next(data.batches(1, seed=0))[0].flatten().tolist() == [0, 0, 255, 255]


def dynamic(images, batch_size, seed=0, epoch=1):
    data = DeviceDataset(images, binarize="dynamic")
    return torch.cat([batch for batch, _ in data.batches(batch_size, seed=seed, epoch=epoch)])


def test_dynamic_binarization_does_not_depend_on_the_batch_size(digits):
    images = digits.test[:100]
    whole = dynamic(images, 100)
    assert whole.unique().tolist() == [0, 255]
    for batch_size in (1, 7, 64):
        assert torch.equal(dynamic(images, batch_size), whole)


def test_dynamic_binarization_is_drawn_anew():
    grey = torch.full((50, 1, 4, 4), 128, dtype=torch.uint8)
    draws = [dynamic(grey, 50, seed, epoch) for seed, epoch in ((0, 1), (0, 2), (1, 1))]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_dynamic_binarization_has_the_right_probabilities():
    levels = torch.tensor([0, 1, 64, 128, 254, 255], dtype=torch.uint8)
    shares = dynamic(levels.view(1, 1, 6).repeat(20000, 1, 1), 4096).double().div(255).mean((0, 1, 2))
    p = levels.double() / 255
    assert ((shares - p).abs() <= 5 * (p * (1 - p) / 20000).sqrt()).all()


def test_device_dataset_says_what_it_expected():
    with pytest.raises(TypeError, match=r"images: expected a uint8 tensor .*got torch\.float32"):
        DeviceDataset(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"images: expected at least one, .*\[0, 1, 2, 2\]"):
        DeviceDataset(torch.zeros(0, 1, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\[2, 2\]"):
        DeviceDataset(torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="binarize: expected one of none, threshold, dynamic, got 'yes'"):
        DeviceDataset(torch.zeros(1, 2, 2, dtype=torch.uint8), binarize="yes")
    with pytest.raises(ValueError, match="batch_size: expected a positive int, got 0"):
        next(DeviceDataset(torch.zeros(1, 2, 2, dtype=torch.uint8)).batches(0, seed=0))


@pytest.mark.parametrize("binarize", BINARIZE)
@pytest.mark.parametrize(
    "options",
    [{}, {"shuffle": False}, {"drop_last": True}, {"first": 2}, {"shard": (1, 2), "epoch": 7}],
    ids=lambda options: ",".join(options) or "default",
)
def test_images_in_host_memory_give_the_same_batches(binarize, options, device):
    held, streamed = (DeviceDataset(grey(43), device, binarize, resident) for resident in (True, False))
    assert (held.resident, streamed.resident) == (True, False)
    assert streamed.images.device.type == "cpu"
    want = list(held.batches(8, **{"seed": 4, "epoch": 3, **options}))
    got = list(streamed.batches(8, **{"seed": 4, "epoch": 3, **options}))
    assert len(want) > 2
    assert same(got, want)
    assert all(tensor.device == held.device for pair in got for tensor in pair)


def test_a_memory_mapped_file_is_not_copied(tmp_path):
    grey(20).numpy().tofile(tmp_path / "images")
    mapped = torch.from_file(str(tmp_path / "images"), shared=True, size=180, dtype=torch.uint8).view(20, 1, 3, 3)
    data = DeviceDataset(mapped, binarize="threshold", resident=False)
    assert data.images.data_ptr() == mapped.data_ptr()
    assert same(data.batches(6, seed=0), DeviceDataset(grey(20), binarize="threshold").batches(6, seed=0))
    assert torch.equal(mapped, grey(20))


def test_images_stay_in_host_memory_if_they_need_more_than_half_of_the_device(monkeypatch):
    cuda = torch.device("cuda", 0)
    for free, fits in ((1800, True), (1799, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        assert _fits(grey(100), cuda) is fits
        assert _fits(grey(100), CPU)
    assert DeviceDataset(grey(100)).resident


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_only_what_is_wanted_is_gathered(resident, shuffle):
    data = DeviceDataset(grey(43), resident=resident)
    with Calls() as calls:
        got = list(data.batches(8, seed=0, shuffle=shuffle, first=3, shard=(1, 2)))
    # Batches 3 and 4 in part; the last has 3 images, all of them the other process's.
    assert [len(rows) for _, rows in got] == [4, 4, 0]
    assert calls.gathered == 8


@given(
    images=st.integers(1, 40),
    share=st.integers(1, 7),
    world=st.integers(1, 4),
    first=st.integers(0, 4),
    resident=st.booleans(),
    drop_last=st.booleans(),
)
def test_shards_together_are_the_whole_batch(images, share, world, first, resident, drop_last):
    data = DeviceDataset(grey(images), binarize="dynamic", resident=resident)
    options = {"seed": 9, "epoch": 2, "drop_last": drop_last}
    want = list(data.batches(share * world, **options))[first:]
    parts = [list(data.batches(share * world, first=first, shard=(rank, world), **options)) for rank in range(world)]
    assert all(len(part) == len(want) for part in parts)
    assert all(len(rows) <= share for part in parts for _, rows in part)
    together = [tuple(map(torch.cat, zip(*pieces, strict=True))) for pieces in zip(*parts, strict=True)]
    assert same(together, want)


@pytest.mark.parametrize("resident", [True, False])
def test_the_global_generator_is_left_alone(resident):
    state = torch.get_rng_state()
    list(DeviceDataset(grey(10), binarize="dynamic", resident=resident).batches(4, seed=0))
    for data in (grey(10), TensorDataset(grey(10)), Stream(10)):
        list(ImageBatches(data, 4, CPU, train=True).epoch(seed=0, epoch=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_digest_tells_data_apart(device):
    images = grey(6)
    changed = images.clone()
    changed[5, 0, 2, 2] += 1
    others = [images, changed, images.flip(0), images[:5], images.view(6, 1, 1, 9)]
    digests = [DeviceDataset(other).digest() for other in others]
    digests += [DeviceDataset(images, binarize=binarize).digest() for binarize in ("threshold", "dynamic")]
    assert len(set(digests)) == 7
    assert all(len(digest) == 16 and set(digest) <= set("0123456789abcdef") for digest in digests)
    for binarize in BINARIZE:
        want = DeviceDataset(images, binarize=binarize).digest()
        for resident in (True, False):
            assert DeviceDataset(images, device, binarize, resident).digest() == want
        assert DeviceDataset(images.mT.contiguous().mT, binarize=binarize).digest() == want


def test_digest_does_not_depend_on_the_chunks(monkeypatch):
    want = DeviceDataset(grey(10)).digest()
    monkeypatch.setattr("genfast.training.data._CHUNK", 20)
    assert DeviceDataset(grey(10)).digest() == want


def test_to_keeps_binarize_and_the_wish(device):
    for resident in (True, False):
        data = DeviceDataset(grey(4), binarize="dynamic", resident=resident)
        assert data.to("cpu") is data
        moved = data.to(device)
        assert (moved.device.type, moved.binarize, moved.resident) == (device, "dynamic", resident)
        assert same(moved.to("cpu").batches(3, seed=0), data.batches(3, seed=0))
        # Stands for another device on every machine.
        assert data.to("meta").resident is resident


@pytest.mark.parametrize(
    ("batch_size", "options", "message"),
    [
        (0, {}, "batch_size: expected a positive int, got 0"),
        (7, {"shard": (0, 2)}, "batch_size: expected a multiple of the 2 processes, got 7"),
        (8, {"shard": (2, 2)}, r"shard: expected \(rank, world\) with 0 <= rank < world, got \(2, 2\)"),
        (8, {"first": -1}, "first: expected a non-negative int, got -1"),
    ],
)
def test_batches_say_what_they_expected(batch_size, options, message):
    with pytest.raises(ValueError, match=message):
        DeviceDataset(grey(10)).batches(batch_size, seed=0, **options)


def taken(feed, batches):
    return [feed.take() for _ in range(batches)]


@pytest.mark.parametrize("binarize", BINARIZE)
@pytest.mark.parametrize("shard", [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_feed_takes_the_batches_of_each_epoch(binarize, shard, chunk, device, monkeypatch):
    monkeypatch.setattr("genfast.training.data._CHUNK", chunk)
    data = DeviceDataset(grey(43), device, binarize)
    feed = data.feed(8, seed=-3, shard=shard)
    assert feed.steps == 5
    assert feed.row_offset == 4 * shard[0] * (shard[1] == 2)
    for epoch, first in ((1, 0), (2, 0), (2, 3), (9, 4), (1, 1)):
        feed.start(epoch, first)
        want = data.batches(8, seed=-3, epoch=epoch, drop_last=True, shard=shard, first=first)
        seeds = [random.derive_seed(-3, (epoch - 1) * 5 + index + 1) for index in range(first, 5)]
        got = taken(feed, 5 - first)
        assert same([(images,) for images, _ in got], [(images,) for images, _ in want])
        assert [seed.tolist() for _, seed in got] == [[seed] for seed in seeds]
        assert got[0][1].dtype == torch.int64


@pytest.mark.parametrize("binarize", BINARIZE)
def test_a_graph_can_hold_take(binarize):
    """The same ops on the same memory whatever the batch and the epoch, and none that asks the device for a value."""
    data = DeviceDataset(grey(43), binarize=binarize)
    feed = data.feed(8, seed=0)

    def addresses():
        tensors = [*vars(feed).values(), *vars(data).values()]
        return [tensor.data_ptr() for tensor in tensors if isinstance(tensor, torch.Tensor)]

    fixed = addresses()
    recorded = []
    for epoch, first in ((1, 0), (2, 3)):
        feed.start(epoch, first)
        for _ in range(2):
            with Calls() as calls:
                feed.take()
            recorded.append(calls.calls)
    assert addresses() == fixed
    assert len(fixed) == (4 if binarize == "dynamic" else 3)
    assert all(calls == recorded[0] for calls in recorded)
    names = {func.overloadpacket for func, _ in recorded[0]}
    aten = torch.ops.aten
    assert names == {aten.index_select, aten.squeeze, aten.slice, aten.add_}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("binarize", BINARIZE)
def test_a_replayed_graph_takes_the_next_batch(binarize):
    data = DeviceDataset(grey(43), "cuda", binarize)
    feed = data.feed(8, seed=5)
    feed.start(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        images, seed = feed.take()
    for epoch, first in ((1, 0), (2, 0), (2, 3)):
        feed.start(epoch, first)
        for index, (want, _) in enumerate(data.batches(8, seed=5, epoch=epoch, drop_last=True, first=first), first):
            graph.replay()
            assert torch.equal(images, want)
            assert int(seed) == random.derive_seed(5, (epoch - 1) * 5 + index + 1)


def test_feed_says_what_it_expected():
    data = DeviceDataset(grey(10))
    with pytest.raises(ValueError, match="batch_size: expected at most the 10 images of data, got 11"):
        data.feed(11, seed=0)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 3 processes, got 4"):
        data.feed(4, seed=0, shard=(0, 3))
    with pytest.raises(ValueError, match=r"data: expected images that are held on the device \(resident\)"):
        DeviceDataset(grey(10), resident=False).feed(4, seed=0)
    feed = data.feed(4, seed=0)
    with pytest.raises(ValueError, match="epoch: expected an int of at least 1, got 0"):
        feed.start(0)
    with pytest.raises(ValueError, match="first: expected an int from 0 to 1, got 2"):
        feed.start(1, 2)


def test_nothing_is_taken_before_the_start_or_beyond_the_end():
    feed = DeviceDataset(grey(10)).feed(4, seed=0)
    with pytest.raises(IndexError):
        feed.take()
    feed.start(1)
    taken(feed, 2)
    with pytest.raises(IndexError):
        feed.take()


class Stream(IterableDataset):
    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return iter(numbered(self.images))


class Recorded(Dataset):
    """Keeps which images were asked for."""

    def __init__(self, images):
        self.images = images
        self.loaded = []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.loaded.append(index)
        return self.images[index], "label"


def epoch_of(data, batch_size, train, seed=0, epoch=1, first=0, shard=(0, 1)):
    """[(pixels, row), ...]"""
    batches = ImageBatches(data, batch_size, CPU, train, shard).epoch(seed, epoch, first)
    return [(images.flatten().tolist(), row) for images, row in batches]


@pytest.mark.parametrize("train", [True, False])
def test_every_kind_of_data_gives_every_image(train):
    images = numbered(10)
    dataset = TensorDataset(images, torch.zeros(10))
    streamed = DeviceDataset(images, resident=False)
    kinds = (images, DeviceDataset(images), streamed, dataset, DataLoader(dataset, 5, shuffle=train), Stream(10))
    for data in kinds:
        batches = epoch_of(data, 5, train)
        assert [(len(pixels), row) for pixels, row in batches] == [(5, 0), (5, 5)]
        order = [value for pixels, _ in batches for value in pixels]
        assert sorted(order) == list(range(10))
        assert (order == list(range(10))) is (not train or isinstance(data, Stream))


def test_a_smaller_last_batch_counts_in_tests_and_not_in_training():
    for data in (numbered(10), TensorDataset(numbered(10))):
        for train, sizes in ((True, [4, 4]), (False, [4, 4, 2])):
            assert [len(pixels) for pixels, _ in epoch_of(data, 4, train)] == sizes
            assert len(ImageBatches(data, 4, CPU, train)) == len(sizes)
        assert [len(pixels) for pixels, _ in epoch_of(data, 64, train=False)] == [10]
    assert [len(pixels) for pixels, _ in epoch_of(Stream(10), 4, train=True)] == [4, 4]
    assert [len(pixels) for pixels, _ in epoch_of(Stream(10), 4, train=False)] == [4, 4, 2]


def test_a_training_batch_larger_than_the_set_is_refused():
    for data in (numbered(10), DeviceDataset(numbered(10), resident=False), TensorDataset(numbered(10))):
        with pytest.raises(ValueError, match="batch_size: expected at most the 10 images of data, got 11"):
            ImageBatches(data, 11, CPU, train=True)
        assert len(ImageBatches(data, 10, CPU, train=True)) == 1


def test_the_order_of_a_dataset_is_a_function_of_seed_and_epoch():
    def order(**key):
        return epoch_of(TensorDataset(numbered(50)), 10, train=True, **key)

    assert order() == order()
    assert order(seed=1) != order() != order(epoch=2)


SOURCES = {
    "tensor": numbered,
    "host memory": lambda images: DeviceDataset(numbered(images), resident=False),
    "dataset": lambda images: TensorDataset(numbered(images)),
    "stream": Stream,
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", SOURCES)
@given(images=st.integers(12, 40), share=st.integers(1, 4), world=st.integers(1, 3), first=st.integers(0, 4))
def test_processes_share_each_batch(kind, train, images, share, world, first):
    data, batch_size = SOURCES[kind](images), share * world
    want = epoch_of(data, batch_size, train)[first:]
    if train and world > 1:
        # A stream's last batch: the optimizer's step would weigh unequal parts alike.
        want = [(pixels, row) for pixels, row in want if len(pixels) == batch_size]
    parts = [epoch_of(data, batch_size, train, first=first, shard=(rank, world)) for rank in range(world)]
    together = [[pixel for pixels, _ in pieces for pixel in pixels] for pieces in zip(*parts, strict=True)]
    assert together == [pixels for pixels, _ in want]
    for index, pieces in enumerate(zip(*parts, strict=True), first):
        assert [row for _, row in pieces] == [index * batch_size + rank * share for rank in range(world)]


def test_the_length_of_a_stream_counts_what_comes():
    class Sized(Stream):
        def __len__(self):
            return self.images

    for train, world, batches in ((True, 1, 2), (True, 2, 2), (False, 2, 3)):
        sized = ImageBatches(Sized(10), 4, CPU, train, (0, world))
        assert len(sized) == len(list(sized.epoch(0, 1))) == batches


@pytest.mark.parametrize("kind", ["dataset", "stream"])
def test_an_empty_part_has_the_shape_of_an_image(kind):
    (images, row), = ImageBatches(SOURCES[kind](2), 4, CPU, train=False, shard=(1, 2)).epoch(0, 0)
    assert images.shape == (0, 1, 1, 1)
    assert row == 2


def test_a_dataset_loads_only_this_process_and_no_batches_before_the_first():
    data = Recorded(numbered(40))
    got = epoch_of(data, 8, train=True, first=3, shard=(1, 2))
    assert len(data.loaded) == 8
    assert data.loaded == [value for pixels, _ in got for value in pixels]


def test_a_loader_decides_about_its_batches():
    loader = DataLoader(TensorDataset(numbered(10)), 4)
    batches = epoch_of(loader, 7, train=True, first=1, shard=(1, 2))
    assert batches == [([4, 5, 6, 7], (1 << 40) + 4), ([8, 9], (1 << 40) + 8)]
    assert len(ImageBatches(loader, 7, CPU, train=True)) == 3
    assert epoch_of(loader, 64, train=True)[0] == ([0, 1, 2, 3], 0)


def test_the_sampler_of_a_loader_learns_the_epoch():
    dataset = TensorDataset(numbered(20))
    orders = []
    for rank in range(2):
        loader = DataLoader(dataset, 5, sampler=DistributedSampler(dataset, num_replicas=2, rank=rank, seed=3))
        orders.append([epoch_of(loader, 5, train=True, epoch=epoch, shard=(rank, 2)) for epoch in (1, 2)])
        assert loader.sampler.epoch == 2
    assert orders[0][0] != orders[0][1]
    first_epoch = [pixel for order in orders for pixels, _ in order[0] for pixel in pixels]
    assert sorted(first_epoch) == list(range(20))


def test_the_generator_of_a_loader_is_left_alone():
    def orders(run):
        loader = DataLoader(TensorDataset(numbered(20)), 5, shuffle=True, generator=torch.Generator().manual_seed(8))
        return [run(loader) for _ in range(2)]

    want = orders(lambda loader: [batch.flatten().tolist() for (batch,) in loader])
    got = orders(lambda loader: [pixels for pixels, _ in epoch_of(loader, 5, train=True)])
    assert got == want


def test_unknown_lengths():
    class Sized(Stream):
        def __len__(self):
            return self.images

    assert len(ImageBatches(Sized(10), 4, CPU, train=False)) == 3
    for data in (Stream(10), DataLoader(Stream(10), 4)):
        with pytest.raises(TypeError, match="has no len"):
            len(ImageBatches(data, 4, CPU, train=True))


def test_the_source_of_a_feed():
    held = DeviceDataset(grey(10), binarize="dynamic")
    assert ImageBatches(held, 4, CPU, train=True).dataset is held
    assert torch.equal(ImageBatches(grey(10), 4, CPU, train=True).dataset.images, grey(10))
    for data in (DeviceDataset(grey(10), resident=False), TensorDataset(grey(10)), DataLoader(TensorDataset(grey(10)))):
        assert ImageBatches(data, 4, CPU, train=True).dataset is None


def test_descriptions():
    def described(data):
        return json.loads(json.dumps(ImageBatches(data, 4, CPU, train=True).describe()))

    held = DeviceDataset(grey(10), binarize="dynamic")
    assert described(held) == {
        "kind": "DeviceDataset", "images": 10, "shape": [1, 3, 3], "digest": held.digest(), "binarize": "dynamic",
    }  # fmt: skip
    assert described(grey(10)) == described(DeviceDataset(grey(10), resident=False))
    unknown = {"shape": None, "digest": None, "binarize": None}
    assert described(TensorDataset(grey(10))) == {"kind": "TensorDataset", "images": 10, **unknown}
    assert described(DataLoader(TensorDataset(grey(10)))) == {"kind": "DataLoader", "images": 10, **unknown}
    assert described(Stream(10)) == {"kind": "Stream", "images": None, **unknown}


def test_image_batches_say_what_they_expected():
    with pytest.raises(TypeError, match=r"data: expected a uint8 image tensor, .*got list"):
        ImageBatches([1, 2], 4, CPU, train=True)
    with pytest.raises(ValueError, match="data: the Dataset is empty"):
        ImageBatches(TensorDataset(torch.zeros(0, 1)), 4, CPU, train=True)
    with pytest.raises(TypeError, match=r"data: expected batches that are an image tensor .*got dict"):
        next(ImageBatches(DataLoader([{"x": 1}]), 4, CPU, train=True).epoch(seed=0, epoch=1))
    for data in (grey(10), TensorDataset(grey(10)), Stream(10)):
        for train in (True, False):
            with pytest.raises(ValueError, match="batch_size: expected a multiple of the 2 processes, got 3"):
                ImageBatches(data, 3, CPU, train, shard=(0, 2))
        with pytest.raises(ValueError, match="first: expected a non-negative int, got -1"):
            ImageBatches(data, 4, CPU, train=True).epoch(0, 1, first=-1)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("genfast-prefetch")]


class Pulls:
    """Counts up to an end; a test can wait for the calls, which come from another thread."""

    def __init__(self, end):
        self.numbers = iter(range(end))
        self.called = threading.Semaphore(0)
        self.calls = 0
        self.threads = set()

    def __call__(self):
        self.calls += 1
        self.threads.add(threading.current_thread())
        self.called.release()
        return next(self.numbers, None)

    def wait_for(self, calls):
        for _ in range(calls):
            assert self.called.acquire(timeout=60)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("end", [0, 1, 3, 50])
def test_what_is_pulled_ahead_comes_in_order(depth, end):
    pulls = Pulls(end)
    assert list(_ahead(pulls, depth)) == list(range(end))
    assert len(pulls.threads) == 1
    assert threading.current_thread() not in pulls.threads
    assert not threads()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_is_pulled_ahead_than_asked_for(depth):
    pulls = Pulls(10**9)
    ahead = _ahead(pulls, depth)
    assert [next(ahead) for _ in range(4)] == [0, 1, 2, 3]
    pulls.wait_for(4 + depth)
    ahead.close()
    assert pulls.calls == 4 + depth


def test_leaving_early_stops_the_thread():
    pulls = Pulls(10**9)
    for number in _ahead(pulls, 2):
        if number == 3:
            break
    assert not threads()
    assert pulls.calls <= 6


def test_leaving_early_waits_for_the_call_in_progress_only():
    entered, go_on = threading.Event(), threading.Event()
    numbers = count()

    def pull():
        number = next(numbers)
        if number == 1:
            entered.set()
            assert go_on.wait(60)
        return number

    ahead = _ahead(pull, 3)
    assert next(ahead) == 0
    assert entered.wait(60)
    closing = threading.Thread(target=ahead.close)
    closing.start()
    go_on.set()
    closing.join(60)
    assert not closing.is_alive()
    assert not threads()


def test_an_error_in_the_thread_reaches_the_consumer():
    numbers = iter(range(3))

    def fails_at_the_end():
        number = next(numbers, None)
        if number is None:
            raise OSError("no more")
        return number

    ahead = _ahead(fails_at_the_end, 2)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="no more") as caught:
        next(ahead)
    assert "fails_at_the_end" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert not threads()


def test_prefetched_batches(device):
    used = set()

    def batches():
        for number in range(20):
            used.add(threading.current_thread())
            yield torch.full((1000,), number), number

    got = list(prefetch(batches(), torch.device(device)))
    assert [number for _, number in got] == list(range(20))
    assert all(tensor.device.type == device and bool((tensor == number).all()) for tensor, number in got)
    assert (threading.current_thread() in used) is (device == "cpu")


def test_nothing_runs_ahead_on_a_cpu():
    numbers = iter(range(10))
    batches = prefetch(((number,) for number in numbers), CPU)
    assert next(batches) == (0,)
    assert not threads()
    assert next(numbers) == 1


def test_an_error_while_prefetching(device):
    def batches():
        yield (torch.zeros(1),)
        raise OSError("no more")

    prefetched = prefetch(batches(), torch.device(device))
    next(prefetched)
    with pytest.raises(OSError, match="no more"):
        next(prefetched)
    assert not threads()
