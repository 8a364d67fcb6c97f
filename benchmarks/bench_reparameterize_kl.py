"""reparameterize_kl with its own noise: from the latent of an MNIST VAE to 2^26 elements on CUDA."""

from __future__ import annotations

from collections.abc import Callable

from genfast.cases import Case, cases

CASES = [case for case in cases("reparameterize_kl") if case.setting == ""]
SIZES = {
    "cpu": ((128, 20), (1024, 256)),
    "cuda": ((128, 20), (8192, 64), (65536, 1024)),
    "more": ((1024, 64), (8192, 256), (8192, 1024)),
}


def test_reparameterize_kl(
    time_chain: Callable[..., None], case: Case, shape: tuple[int, ...], dtype: str, place: str, chain: str, mode: str
) -> None:
    time_chain(case, shape, dtype, place, chain, mode)
