"""dequantize_logit on images: with noise of its own, which has no backward, and with noise that takes a gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from genfast.cases import Case, cases

CASES = [case for case in cases("dequantize_logit") if case.setting != "inverse"]
SIZES = {
    "cpu": ((128, 784), (64, 3072)),
    "cuda": ((128, 784), (256, 3072), (16384, 4096)),
    "more": ((1024, 784), (4096, 3072)),
}


def test_dequantize_logit(
    time_chain: Callable[..., None], case: Case, shape: tuple[int, ...], dtype: str, place: str, chain: str, mode: str
) -> None:
    if not case.differentiable and (mode, dtype, place) != ("forward", "fp32", "alone"):
        pytest.skip("uint8 goes in and fp32 comes out: there is no backward, no other dtype, and no producer")
    time_chain(case, shape, dtype, place, chain, mode)
