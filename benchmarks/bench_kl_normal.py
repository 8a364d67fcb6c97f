"""kl_normal on four full tensors."""

from __future__ import annotations

from collections.abc import Callable

from genfast.cases import Case, cases

CASES = cases("kl_normal")
SIZES = {
    "cpu": ((128, 20), (1024, 256)),
    "cuda": ((128, 20), (8192, 64), (65536, 1024)),
    "more": ((1024, 64), (8192, 256), (8192, 1024)),
}


def test_kl_normal(
    time_chain: Callable[..., None], case: Case, shape: tuple[int, ...], dtype: str, place: str, chain: str, mode: str
) -> None:
    time_chain(case, shape, dtype, place, chain, mode)
