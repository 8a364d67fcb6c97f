"""Training: images that stay on the device, the step, and the loop."""

from genfast.training.data import DATASETS, DeviceDataset, Splits, load_dataset
from genfast.training.loop import evaluate, evaluation_seed, fit
from genfast.training.step import TrainStep

__all__ = ["DATASETS", "DeviceDataset", "Splits", "TrainStep", "evaluate", "evaluation_seed", "fit", "load_dataset"]
