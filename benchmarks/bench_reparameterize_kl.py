"""reparameterize_kl with its own noise: from the latent of an MNIST VAE to 2^26 elements on CUDA."""

from __future__ import annotations

from collections.abc import Callable

from genfast.cases import Case, cases

CASES = [case for case in cases("reparameterize_kl") if case.setting == ""]
SIZES = {
    "cpu": ((128, 20), (1024, 256)),
    "cuda": ((128, 20), (8192, 64), (8192, 1024), (65536, 1024)),
}


def test_reparameterize_kl(
    time_chain: Callable[..., None], case: Case, shape: tuple[int, ...], dtype: str, mode: str, chain: str
) -> None:
    time_chain(case, shape, dtype, mode, chain)
