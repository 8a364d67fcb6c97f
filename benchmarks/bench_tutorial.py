"""An epoch of the script that every tutorial prints: as it is, with `genfast.VAE` swapped in, and what comes next.

Each line of the table goes one step on from the line before, so that a speed-up has a cause; "alone" lines are parts of
the script or of ours. Of full MNIST if GENFAST_DATA names a folder that holds it, else of the 5,000 bundled digits.
`genfast.fit` leaves out a last, smaller batch. Every line but the parts must come to the same loss.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import genfast
from genfast.training import DeviceDataset, load_dataset
from tests.models.vae_tutorial import TutorialVAE, loss_function

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 128
# Two epochs of the same model, with other orders and other noise, end this near one another.
SAME_LOSS = 0.03


@cache
def _images() -> Tensor:
    root = os.environ.get("GENFAST_DATA")
    there = root is not None and (Path(root) / "MNIST" / "raw" / "train-images-idx3-ubyte").exists()
    return load_dataset("mnist" if there else "digits", root).train


class _Pictures(Dataset):
    """The digits as torchvision gives MNIST: a PIL image through ToTensor each time."""

    def __init__(self) -> None:
        from torchvision import transforms

        self.images = _images().squeeze(1).numpy()
        self.transform = transforms.ToTensor()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), 0


def _loader() -> Iterator[Tensor]:
    for data, _ in DataLoader(_Pictures(), batch_size=BATCH, shuffle=True):
        yield data.to(DEVICE)


@cache
def _resident() -> DeviceDataset:
    return DeviceDataset(_images(), DEVICE)


def _indexed() -> Iterator[Tensor]:
    for images, _ in _resident().batches(BATCH, seed=0):
        yield images.float() / 255


Epoch = Callable[[], float | None]


def _script(model: nn.Module, batches: Callable[[], Iterator[Tensor]]) -> Epoch:
    """The tutorial's loop, its `loss.item()` included; returns the epoch's mean loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def epoch() -> float:
        model.train()
        train_loss, seen = 0.0, 0
        for data in batches():
            optimizer.zero_grad()
            recon_batch, mu, logvar = model(data)
            loss = loss_function(recon_batch, data, mu, logvar)
            loss.backward()
            train_loss, seen = train_loss + loss.item(), seen + len(data)
            optimizer.step()
        return train_loss / seen

    return epoch


def _compiled_resident() -> Epoch:
    """What one writes without us: resident images, and the script's loss compiled with reduce-overhead."""
    model, data = TutorialVAE().to(DEVICE), _resident().images
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    @torch.compile(mode="reduce-overhead")
    def loss_of(images: Tensor) -> Tensor:
        x = images.float() / 255
        recon, mu, logvar = model(x)
        return loss_function(recon, x, mu, logvar)

    def epoch() -> float:
        total, steps = torch.zeros((), device=DEVICE), len(data) // BATCH
        order = torch.randperm(len(data), device=DEVICE)
        for step in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            loss = loss_of(data[order[step * BATCH : (step + 1) * BATCH]])
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return float(total) / (steps * BATCH)

    return epoch


def _fit(fused_adam: bool = True, compile: bool = False, mode: str = "eager") -> Epoch:
    model = genfast.VAE().to(DEVICE)
    if compile:
        model.compile()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused_adam or None)

    def epoch() -> float:
        options = {"batch_size": BATCH, "optimizer": optimizer, "mode": mode, "progress": False}
        return genfast.fit(model, _resident(), epochs=1, **options)[0]["loss"]

    return epoch


def _loader_alone() -> Epoch:
    def epoch() -> None:
        for _ in _loader():
            pass

    return epoch


def _gather_alone() -> Epoch:
    def epoch() -> None:
        for _ in _indexed():
            pass

    return epoch


def _products_alone() -> Epoch:
    """The matrix products of the forward and the backward pass, with nothing between them."""
    steps, sizes = len(_images()) // BATCH, ((784, 400), (400, 40), (20, 400), (400, 784))
    layers = [(torch.randn(BATCH, n, device=DEVICE), torch.randn(m, n, device=DEVICE)) for n, m in sizes]
    grads = [torch.randn(BATCH, m, device=DEVICE) for _, m in sizes]

    def epoch() -> None:
        for _ in range(steps):
            for index, ((x, weight), grad) in enumerate(zip(layers, grads, strict=True)):
                x @ weight.T
                grad.T @ x
                if index:
                    grad @ weight

    return epoch


EPOCHS = {
    "the script with its own VAE": lambda: _script(TutorialVAE().to(DEVICE), _loader),
    "its loader alone": _loader_alone,
    "genfast.VAE swapped in": lambda: _script(genfast.VAE().to(DEVICE), _loader),
    "and images resident on the device": lambda: _script(genfast.VAE().to(DEVICE), _indexed),
    "gathering those alone": _gather_alone,
    "and genfast.fit: the fused loss, no .item()": lambda: _fit(fused_adam=False),
    "and the optimizer's fused step": lambda: _fit(),
    "and compiled": lambda: _fit(compile=True),
    "the matrix products alone": _products_alone,
}
if DEVICE.type == "cuda":
    EPOCHS |= {
        "without genfast: resident, reduce-overhead": _compiled_resident,
        "genfast.fit, the step one CUDA graph": lambda: _fit(mode="graph"),
        "that, and compiled": lambda: _fit(mode="graph", compile=True),
    }


@cache
def _script_loss() -> float:
    """What the script itself comes to in an epoch."""
    torch.manual_seed(0)
    return _script(TutorialVAE().to(DEVICE), _loader)()


@pytest.mark.parametrize("what", EPOCHS)
def test_tutorial(time_callable: Callable[..., None], what: str) -> None:
    pytest.importorskip("torchvision", reason="the tutorial reads its images through torchvision")
    torch._dynamo.reset()
    torch.manual_seed(0)
    loss = EPOCHS[what]()()
    if loss is not None and not abs(loss / _script_loss() - 1) < SAME_LOSS:
        pytest.fail(f"no time: a loss of {loss:.2f} nats after the first epoch, {_script_loss():.2f} in the script")
    epoch, case = EPOCHS[what](), f"epoch of {len(_images()):,} digits"
    of_row = {"op": "tutorial", "case": case, "shape": (BATCH, 1, 28, 28), "dtype": "fp32", "mode": "", "place": ""}
    time_callable(lambda: epoch, kind="program", chain=what, **of_row)
