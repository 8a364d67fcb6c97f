"""What only a GPU has the memory and the time for: 2^26 elements against fp64, and more than 2^31 elements.

`scripts/gpu_check.sh --tests` runs these; with --dry-run at toy sizes, where a CPU will do.
"""

from __future__ import annotations

import os

import pytest
import torch

from genfast.cases import CASES, run
from genfast.functional import bernoulli_nll, kl_normal, reparameterize_kl, reparameterize_kl_packed
from tests.matrix import assert_close, make, upstream

TOY = os.environ.get("GENFAST_CHECK_TOY") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = (64, 32) if TOY else (2**16, 2**10)
# 2^31 elements end 16 rows before the last.
ROWS, COLS = (32, 24) if TOY else (2**15 + 16, 2**16)
BASE = [case for case in CASES if case.setting in ("", "uint8", "mean")]


def _needs(gib: int) -> None:
    if TOY:
        return
    if DEVICE == "cpu":
        pytest.skip("needs a GPU")
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


@pytest.fixture(autouse=True)
def _give_back():
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BASE, ids=lambda case: case.name)
def test_full_size_matches_fp64(case, dtype):
    _needs(24)
    inputs = make(case, FULL, dtype, DEVICE)
    grads = upstream(case, inputs)
    assert_close(case, run(case, "fused", inputs, grads), run(case, "exact", inputs, grads), dtype, DEVICE)


def _tail_is_that_of_the_whole(function, leaves, *fixed):
    """Outputs and gradients of the last 8 rows: of all rows at once, and of those alone."""
    found = []
    for first in (0, ROWS - 8):
        inputs = [x[first:].detach().requires_grad_() for x in leaves]
        outputs = function(*inputs, *(x[first:] for x in fixed), first)
        total = sum(output.float().sum() for output in outputs)
        grads = torch.autograd.grad(total, inputs)
        found.append([x[-8:].clone() for x in (*(output.detach() for output in outputs), *grads)])
        del outputs, total, grads
    for whole, alone in zip(*found, strict=True):
        assert torch.equal(whole, alone)
    assert not torch.equal(found[0][0][:4], found[0][0][4:])


def _random(cols: int = COLS) -> torch.Tensor:
    return torch.randn(ROWS, cols, device=DEVICE, dtype=torch.bfloat16)


def test_reparameterize_kl_past_2_31_elements():
    _needs(48)
    _tail_is_that_of_the_whole(
        lambda mu, logvar, row: reparameterize_kl(mu, logvar, seed=3, row_offset=row), [_random(), _random()]
    )


def test_reparameterize_kl_packed_past_2_31_elements():
    _needs(48)
    _tail_is_that_of_the_whole(
        lambda h, row: reparameterize_kl_packed(h, seed=3, row_offset=row), [_random(2 * COLS)]
    )


def test_kl_normal_past_2_31_elements():
    _needs(64)
    _tail_is_that_of_the_whole(lambda *args: (kl_normal(*args[:4]),), [_random() for _ in range(4)])


def test_bernoulli_nll_past_2_31_elements():
    _needs(32)
    pixels = torch.randint(0, 256, (ROWS, COLS), device=DEVICE, dtype=torch.uint8)
    _tail_is_that_of_the_whole(lambda logits, x, _: (bernoulli_nll(logits, x),), [_random()], pixels)
