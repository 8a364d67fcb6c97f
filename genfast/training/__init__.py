"""Training: images that stay on the device, the step, the loop, its checkpoints, and many processes."""

from genfast.training.checkpoint import Checkpoint, Checkpoints, read
from genfast.training.data import DeviceDataset, Feed, ImageBatches
from genfast.training.datasets import DATASETS, Splits, load_dataset
from genfast.training.distributed import from_first, launched, local_rank_first, ranks, shard
from genfast.training.ema import EMA
from genfast.training.loop import History, evaluate, evaluation_seed, fit
from genfast.training.signals import Interrupted
from genfast.training.step import TrainStep

__all__ = [
    "DATASETS",
    "EMA",
    "Checkpoint",
    "Checkpoints",
    "DeviceDataset",
    "Feed",
    "History",
    "ImageBatches",
    "Interrupted",
    "Splits",
    "TrainStep",
    "evaluate",
    "evaluation_seed",
    "fit",
    "from_first",
    "launched",
    "load_dataset",
    "local_rank_first",
    "ranks",
    "read",
    "shard",
]
