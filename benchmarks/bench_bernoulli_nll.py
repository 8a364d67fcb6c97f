"""bernoulli_nll per sample on uint8 images, and its mean, which writes the gradient in the forward pass."""

from __future__ import annotations

from collections.abc import Callable

from genfast.cases import Case, cases

CASES = [case for case in cases("bernoulli_nll") if case.setting in ("uint8", "mean")]
SIZES = {
    "cpu": ((128, 784), (2048, 784)),
    "cuda": ((128, 20), (1024, 784), (65536, 1024)),
    "more": ((128, 784), (8192, 784), (8192, 1024)),
}


def test_bernoulli_nll(
    time_chain: Callable[..., None], case: Case, shape: tuple[int, ...], dtype: str, place: str, chain: str, mode: str
) -> None:
    time_chain(case, shape, dtype, place, chain, mode)
