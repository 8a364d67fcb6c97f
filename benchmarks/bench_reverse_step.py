"""reverse_step, stochastic and deterministic, from a batch of small images to 2^26 elements on CUDA."""

from __future__ import annotations

from collections.abc import Callable

from genfast.cases import Case, cases

CASES = cases("reverse_step")
SIZES = {
    "cpu": ((64, 784), (64, 3072)),
    "cuda": ((64, 3072), (256, 3072), (16384, 4096)),
    "more": ((1024, 784), (4096, 3072)),
}


def test_reverse_step(
    time_chain: Callable[..., None], case: Case, shape: tuple[int, ...], dtype: str, place: str, chain: str, mode: str
) -> None:
    time_chain(case, shape, dtype, place, chain, mode)
