"""Make genfast/data/digit_classifier.safetensors: the classifier of genfast.metrics, trained on the whole of MNIST."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from genfast._files import replacing
from genfast.metrics.classifier import DigitClassifier
from genfast.training import load_dataset

TARGET = Path(__file__).parents[1] / "genfast" / "data" / "digit_classifier.safetensors"
BATCH_SIZE = 128
LR = 2e-3
# Of the largest random change to a training image: degrees, share of the size, and pixels.
ROTATION, SCALING, SHIFT = 10.0, 0.1, 2.0
# Of the largest damage: standard deviations of a blur in pixels and of noise, and share of the contrast that is lost.
BLUR, NOISE, FADING = 2.0, 0.15, 0.6


def changed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned, scaled and shifted a little: [B, 1, 28, 28] in [0, 1]."""
    count, _, height, _ = images.shape
    random = torch.rand(4, count, generator=generator) * 2 - 1
    angle, scale = random[0] * math.radians(ROTATION), 1 + random[1] * SCALING
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    across, down = random[2:] * SHIFT * 2 / height
    matrix = torch.stack([cos, -sin, across, sin, cos, down], 1).view(count, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def damaged(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blurred, faded and noisy as the samples of a weak model are: else it is sure of one digit for all of them."""
    blur, *_ = torch.rand(1, generator=generator).tolist()
    distance = torch.arange(-4.0, 5.0)
    weights = torch.exp(-0.5 * (distance / (0.3 + BLUR * blur)) ** 2)
    weights = (weights / weights.sum()).view(1, 1, 1, -1)
    images = F.conv2d(F.conv2d(images, weights, padding=(0, 4)), weights.transpose(2, 3), padding=(4, 0))
    fading, noise = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    images = images * (1 - FADING * fading) + NOISE * noise * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 1)


def blended(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each image mixed with the next one, and its own share [B]: what lies between two digits is neither for sure."""
    share = torch.rand(len(images), generator=generator)
    weight = share.view(-1, 1, 1, 1)
    return weight * images + (1 - weight) * images.roll(-1, 0), share


def loss(classifier: DigitClassifier, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Half of a batch as it is but for small changes, a quarter damaged, a quarter blended."""
    quarter = len(x) // 4
    x = changed(x, generator)
    mixed, share = blended(x[-quarter:], generator)
    logits = classifier(torch.cat([x[: -2 * quarter], damaged(x[-2 * quarter : -quarter], generator), mixed]))
    plain, other = F.cross_entropy(logits, y, reduction="none"), y[-quarter:].roll(-1)
    blend = share * plain[-quarter:] + (1 - share) * F.cross_entropy(logits[-quarter:], other, reduction="none")
    return (plain[:-quarter].sum() + blend.sum()) / len(x)


def accuracy(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    classifier.eval()
    with torch.no_grad():
        right = sum(
            int((classifier(x).argmax(1) == y).sum())
            for x, y in zip(images.split(1000), labels.split(1000), strict=True)
        )
    return right / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", help="folder that holds MNIST/raw, as torchvision lays it out")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=TARGET)
    arguments = parser.parse_args()

    mnist, digits = load_dataset("mnist", arguments.root), load_dataset("digits")
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    classifier = DigitClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LR, weight_decay=1e-2)
    steps = arguments.epochs * (len(mnist.train) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    started = time.perf_counter()
    for epoch in range(arguments.epochs):
        classifier.train()
        order = torch.randperm(len(mnist.train), generator=generator)
        # A last, shorter batch is left out.
        for rows in order[: steps // arguments.epochs * BATCH_SIZE].split(BATCH_SIZE):
            optimizer.zero_grad()
            loss(classifier, mnist.train[rows].float() / 255, mnist.train_labels[rows], generator).backward()
            optimizer.step()
            schedule.step()
        # What is seen here chooses nothing: the last weights are kept.
        score = accuracy(classifier, mnist.test, mnist.test_labels)
        print(f"epoch {epoch + 1}: {score:.2%} of the test images, {time.perf_counter() - started:.0f} s", flush=True)

    record = {
        "test_accuracy": score,
        "test_images": len(mnist.test),
        "bundled_test_accuracy": accuracy(classifier, digits.test, digits.test_labels),
        "bundled_test_images": len(digits.test),
        "trained_on": f"the {len(mnist.train):,} training images of MNIST, turned, scaled and shifted at random; a "
        "quarter of them blurred, faded and noisy, a quarter blended with one another",
        "features": classifier.num_features,
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
        "epochs": arguments.epochs,
        "batch_size": BATCH_SIZE,
        "lr": LR,
        "seed": arguments.seed,
        "torch": torch.__version__,
        "command": f"python scripts/train_digit_classifier.py ROOT --epochs {arguments.epochs} --seed {arguments.seed}",
    }
    with replacing(arguments.out) as temporary:
        temporary.write_bytes(safetensors.torch.save(classifier.state_dict()))
    with replacing(arguments.out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{arguments.out}: {score:.2%}, {arguments.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
