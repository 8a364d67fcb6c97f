"""reparameterize_kl_packed with its own noise; sizes are those of the latent, half of the moments."""

from __future__ import annotations

from collections.abc import Callable

from genfast.cases import Case, cases

CASES = [case for case in cases("reparameterize_kl_packed") if case.setting == ""]
SIZES = {
    "cpu": ((128, 20), (1024, 256)),
    "cuda": ((128, 20), (64, 4, 32, 32), (65536, 1024)),
    "more": ((1024, 64), (8192, 256), (8192, 1024)),
}


def test_reparameterize_kl_packed(
    time_chain: Callable[..., None], case: Case, shape: tuple[int, ...], dtype: str, place: str, chain: str, mode: str
) -> None:
    time_chain(case, shape, dtype, place, chain, mode)
