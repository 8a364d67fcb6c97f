"""denoising_loss on images and latents."""

from __future__ import annotations

from collections.abc import Callable

from genfast.cases import Case, cases

CASES = [case for case in cases("denoising_loss") if case.differentiable]
SIZES = {
    "cpu": ((128, 784), (64, 3072)),
    "cuda": ((128, 784), (256, 3072), (16384, 4096)),
    "more": ((1024, 784), (4096, 3072)),
}


def test_denoising_loss(
    time_chain: Callable[..., None], case: Case, shape: tuple[int, ...], dtype: str, place: str, chain: str, mode: str
) -> None:
    time_chain(case, shape, dtype, place, chain, mode)
