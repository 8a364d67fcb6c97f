"""Make genfast/data/digits.npz: the first 500 training and 100 test images of each digit of MNIST, in file order."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from torchvision.datasets import MNIST

TARGET = Path(__file__).parents[1] / "genfast" / "data" / "digits.npz"


def first_of_each(root: str, train: bool, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` images of each digit, uint8 [10 count, 28, 28], and their labels, uint8 [10 count]."""
    mnist = MNIST(root, train=train, download=False)
    labels = mnist.targets.numpy().astype(np.uint8)
    keep = np.sort(np.concatenate([np.flatnonzero(labels == digit)[:count] for digit in range(10)]))
    return mnist.data.numpy()[keep], labels[keep]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", help="folder that holds MNIST/raw, as torchvision lays it out")
    parser.add_argument("--out", type=Path, default=TARGET)
    arguments = parser.parse_args()
    x_train, y_train = first_of_each(arguments.root, train=True, count=500)
    x_test, y_test = first_of_each(arguments.root, train=False, count=100)
    # A name that ends in .npz: numpy appends the ending to any other.
    temporary = arguments.out.with_name(f".{os.getpid()}-{arguments.out.name}")
    np.savez_compressed(temporary, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    os.replace(temporary, arguments.out)
    print(f"{arguments.out}: {len(x_train)} + {len(x_test)} images, {arguments.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
