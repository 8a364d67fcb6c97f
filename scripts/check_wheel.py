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
    for name in ("kernels.philox", "kernels.reparameterize_kl", "reference", "functional", "models", "training.data"):
        importlib.import_module(f"genfast.{name}")
    if importlib.util.find_spec("kernels") is not None and not Path("kernels").exists():
        raise SystemExit("the wheel installs a top-level package 'kernels'")
    for name in ("py.typed", "data/digits.npz", "data/LICENSE-MNIST.txt"):
        if not (place.parent / name).is_file():
            raise SystemExit(f"the wheel lacks {name}")
    images = genfast.training.load_dataset("digits").train
    print(f"wheel: {place.parent}, {tuple(images.shape)} digits, loss", genfast.VAE().loss(images[:8])["loss"].item())
    torch.manual_seed(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
