"""Run by the environment that has only the wheel: imports, data and kernels come from it, not from the checkout."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path


def main(checkout: Path) -> None:
    import torch

    import genfast

    place = Path(genfast.__file__).resolve()
    if checkout.resolve() in place.parents:
        raise SystemExit(f"genfast came from the checkout: {place}")
    modules = ("kernels.philox", "kernels.reparameterize_kl", "reference", "functional", "models", "training.data")
    for name in (*modules, "metrics"):
        importlib.import_module(f"genfast.{name}")
    if importlib.util.find_spec("kernels") is not None and not Path("kernels").exists():
        raise SystemExit("the wheel installs a top-level package 'kernels'")
    for name in ("py.typed", "data/digits.npz", "data/LICENSE-MNIST.txt", "data/digit_classifier.safetensors"):
        if not (place.parent / name).is_file():
            raise SystemExit(f"the wheel lacks {name}")
    splits = genfast.training.load_dataset("digits")
    images = splits.train
    print(f"wheel: {place.parent}, {tuple(images.shape)} digits, loss", genfast.VAE().loss(images[:8])["loss"].item())
    guesses = genfast.metrics.load_classifier()(splits.test).argmax(1)
    print("wheel: the classifier knows", int((guesses == splits.test_labels).sum()), "of", len(guesses), "test digits")
    torch.manual_seed(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
