"""An epoch of the script that every tutorial prints: as it is, with `genfast.VAE` swapped in, and what comes next.

Each line of the table goes one step on from the line before, so that a speed-up has a cause. `genfast.fit` leaves out
the last batch of 8 images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import genfast
from genfast.training import DeviceDataset, load_dataset
from tests.models.vae_tutorial import TutorialVAE, loss_function

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 128


class _Pictures(Dataset):
    """The bundled digits as torchvision gives MNIST: a PIL image through ToTensor each time."""

    def __init__(self) -> None:
        from torchvision import transforms

        self.images = load_dataset("digits").train.squeeze(1).numpy()
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
    return DeviceDataset(load_dataset("digits").train, DEVICE)


def _indexed() -> Iterator[Tensor]:
    for images, _ in _resident().batches(BATCH, seed=0):
        yield images.float() / 255


def _script(model: nn.Module, batches: Callable[[], Iterator[Tensor]]) -> Callable[[], None]:
    """The tutorial's loop, its `loss.item()` included."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def epoch() -> None:
        model.train()
        train_loss = 0.0
        for data in batches():
            optimizer.zero_grad()
            recon_batch, mu, logvar = model(data)
            loss = loss_function(recon_batch, data, mu, logvar)
            loss.backward()
            train_loss += loss.item()
            optimizer.step()

    return epoch


def _fit(fused_adam: bool, compile: bool = False) -> Callable[[], None]:
    model = genfast.VAE().to(DEVICE)
    if compile:
        model.compile()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused_adam or None)
    return lambda: genfast.fit(model, _resident(), epochs=1, batch_size=BATCH, optimizer=optimizer, progress=False)


EPOCHS = {
    "the script with its own VAE": lambda: _script(TutorialVAE().to(DEVICE), _loader),
    "genfast.VAE swapped in": lambda: _script(genfast.VAE().to(DEVICE), _loader),
    "and images resident on the device": lambda: _script(genfast.VAE().to(DEVICE), _indexed),
    "and genfast.fit: the fused loss, no .item()": lambda: _fit(fused_adam=False),
    "and the optimizer's fused step": lambda: _fit(fused_adam=True),
    "and compiled": lambda: _fit(fused_adam=True, compile=True),
}


@pytest.mark.parametrize("what", EPOCHS)
def test_tutorial(time_callable: Callable[..., None], what: str) -> None:
    pytest.importorskip("torchvision", reason="the tutorial reads its images through torchvision")
    torch._dynamo.reset()
    torch.manual_seed(0)
    epoch = EPOCHS[what]()
    time_callable(
        lambda: epoch, kind="program", op="tutorial", case="epoch of 5,000 digits", shape=(BATCH, 1, 28, 28),
        dtype="fp32", mode="", place="", chain=what,
    )  # fmt: skip
