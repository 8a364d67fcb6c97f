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
    """Blurred, faded and noisy, as samples of weak models are: a classifier of clean digits takes all those for one."""
    blur = 0.3 + BLUR * float(torch.rand((), generator=generator))
    weights = torch.exp(-0.5 * (torch.arange(-5.0, 6.0) / blur) ** 2)
    weights = (weights / weights.sum()).view(1, 1, 1, -1)
    blurred = F.conv2d(F.conv2d(images, weights, padding=(0, 5)), weights.mT, padding=(5, 0))
    faded, noisy, which = torch.rand(3, len(images), 1, 1, 1, generator=generator)
    images = torch.where(which < 0.5, blurred, images) * (1 - FADING * faded)
    noise = NOISE * noisy * torch.randn(images.shape, generator=generator)
    return torch.where(which % 0.5 < 0.25, images + noise, images).clamp(0, 1)


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
    parser.add_argument("--epochs", type=int, default=10)
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
            clean, rest = changed(mnist.train[rows].float() / 255, generator).chunk(2)
            x = torch.cat([clean, damaged(rest, generator)])
            F.cross_entropy(classifier(x), mnist.train_labels[rows]).backward()
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
        "trained_on": f"the {len(mnist.train):,} training images of MNIST, turned, scaled and shifted at random; "
        "half of them blurred, faded and noisy as well",
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
