"""A small classifier of digits: its classes, and its features for distances between sets of images."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast.metrics._images import batches, check_images, unit_interval

__all__ = ["DigitClassifier", "classifier_record", "load_classifier"]

_SIZE = 28
# Mean and standard deviation of the training pixels of MNIST.
_MEAN, _STD = 0.1307, 0.3081
_NAME = "digit_classifier"


class DigitClassifier(nn.Module):
    """Grey images to the logits of the ten digits: three convolutions, 64 features, and one linear layer.

    Example:
        >>> DigitClassifier()(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    # As torchmetrics asks it of an extractor.
    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            # 28 x 28, 14 x 14, 7 x 7, 3 x 3.
            *_block(1, 16, kernel_size=5, padding=2),
            *_block(16, 32, kernel_size=5, padding=2),
            *_block(32, 48, kernel_size=3, padding=0),
        )
        self.hidden = nn.Linear(48 * 3 * 3, self.num_features)
        self.last = nn.Linear(self.num_features, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the ten digits.

        Args:
            x: [B, 1, H, W], uint8 or floats in [0, 1]; other sizes than 28 x 28 are scaled to it.

        Returns:
            fp32 tensor of shape [B, 10].

        Raises:
            ValueError: another shape, three channels, values outside [0, 1].
        """
        return self.last(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What the last layer reads: fp32 of shape [B, 64], none negative; arguments and errors as of `forward`."""
        check_images("x", x)
        if x.shape[1] != 1:
            raise ValueError(f"x: expected grey images [B, 1, H, W] of digits, got shape {list(x.shape)}")
        x = unit_interval("x", x)
        if tuple(x.shape[2:]) != (_SIZE, _SIZE):
            x = F.interpolate(x, (_SIZE, _SIZE), mode="bilinear", antialias=True)
        hidden = self.hidden(self.convolutions((x - _MEAN) / _STD).flatten(1))
        return F.relu(hidden)


def load_classifier(device: torch.device | str = "cpu") -> DigitClassifier:
    """The classifier that comes with genfast, in eval mode, trained on MNIST by scripts/train_digit_classifier.py.

    Args:
        device: where it computes.

    Returns:
        A `DigitClassifier` whose parameters need no gradients; `classifier_record` says how good it is.

    Example:
        >>> from genfast.training import load_dataset
        >>> digits = load_dataset("digits")
        >>> guesses = load_classifier()(digits.test[:100]).argmax(1)
        >>> bool((guesses == digits.test_labels[:100]).float().mean() > 0.95)
        True
    """
    import safetensors.torch

    classifier = DigitClassifier()
    classifier.load_state_dict(safetensors.torch.load(_data(".safetensors").read_bytes()))
    return classifier.requires_grad_(False).eval().to(device)


def classifier_record() -> dict[str, Any]:
    """How the classifier of `load_classifier` was trained, and its accuracy on images it has not seen.

    Example:
        >>> classifier_record()["test_accuracy"] >= 0.99
        True
    """
    return json.loads(_data(".json").read_text())


def features_and_logits(
    name: str, images: Tensor, classifier: DigitClassifier | None = None
) -> tuple[Tensor, Tensor]:
    """Features [N, F] and logits [N, 10] of all images, on the classifier's device; the bundled one if None."""
    check_images(name, images)
    if images.shape[1] != 1:
        raise ValueError(f"{name}: expected grey images of digits, got shape {list(images.shape)}")
    classifier = _bundled() if classifier is None else classifier
    device = next(classifier.parameters()).device
    with torch.no_grad():
        features = torch.cat([classifier.features(part) for part in batches(name, images, device)])
        return features, classifier.last(features)


@functools.cache
def _bundled() -> DigitClassifier:
    return load_classifier()


def _data(suffix: str) -> Any:
    return resources.files("genfast") / "data" / (_NAME + suffix)


def _block(channels: int, width: int, kernel_size: int, padding: int) -> list[nn.Module]:
    """Half the height and width, `width` channels."""
    convolution = nn.Conv2d(channels, width, kernel_size, stride=2, padding=padding, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU()]
