"""Philox in Triton against PyTorch: integers exactly, whatever the block."""

from __future__ import annotations

import pytest
import torch

from genfast import random
from genfast.cases import TOLERANCES
from genfast.functional._register import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()),
    reason="kernels run on a GPU, or under TRITON_INTERPRET=1 (see test_interpreted.py)",
)

BLOCKS = [
    (5, 20, 2**33, 999, 0), (3, 1, 0, 0, 0), (2, 5000, 5, 2**24 - 1, 7), (130, 2, 2**32 - 3, 1, 2), (3, 7, 1, 0, 3),
]  # fmt: skip


def _torch_words(seed, rows, cols, stream, row_offset, salt, col_offset):
    first, skip = divmod(col_offset, 4)
    words = random._bits(seed, rows, first, -(-(skip + cols) // 4), stream, row_offset, salt)
    return random._lanes(words, skip, cols)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("block_cols", [None, 16, 256])
def test_same_noise_as_torch(block, block_cols):
    from genfast.kernels import philox

    rows, cols, row_offset, salt, col_offset = block
    seed = torch.tensor([-7234567890123456789])
    arguments = (rows, cols, 2, row_offset, salt, col_offset)
    here = seed.to(DEVICE)
    assert torch.equal(philox.fill_bits(here, *arguments, block_cols).cpu(), _torch_words(seed, *arguments))
    assert torch.equal(philox.fill_uniform(here, *arguments, block_cols).cpu(), random.uniform(seed, *arguments))
    coarse = philox.fill_uniform(here, *arguments, block_cols, bits=15).cpu()
    assert torch.equal(coarse, random.uniform(seed, *arguments, bits=15))
    tolerance = TOLERANCES["interpreted" if INTERPRETED else "triton"][torch.float32]
    noise = philox.fill_normal(here, *arguments, block_cols).cpu()
    assert tolerance.excess(noise, random.normal(seed, *arguments)) <= 1


@pytest.mark.parametrize("block_cols", [None, 16, 256])
def test_each_row_may_have_its_own_salt(block_cols):
    """Several rows a program, and a number of rows that no block divides."""
    from genfast.kernels import philox

    seed = torch.tensor([-7234567890123456789])
    salts = torch.arange(130) * 7919 % 2**24
    salts[::9] = 2**24 - 1
    arguments = (130, 21, 2, 2**32 - 3, salts, 6)
    here = (130, 21, 2, 2**32 - 3, salts.to(DEVICE), 6)
    got = philox.fill_bits(seed.to(DEVICE), *here, block_cols).cpu()
    assert torch.equal(got, _torch_words(seed, *arguments))
    spread = (*here[:4], salts.repeat_interleave(2).to(DEVICE)[::2], 6)
    assert torch.equal(philox.fill_bits(seed.to(DEVICE), *spread, block_cols).cpu(), got)
    assert torch.equal(philox.fill_uniform(seed.to(DEVICE), *here, block_cols).cpu(), random.uniform(seed, *arguments))
    tolerance = TOLERANCES["interpreted" if INTERPRETED else "triton"][torch.float32]
    noise = philox.fill_normal(seed.to(DEVICE), *here, block_cols).cpu()
    assert tolerance.excess(noise, random.normal(seed, *arguments)) <= 1


@pytest.mark.parametrize("high", [1, 1000, 2**31])
def test_integers_are_scaled_words(high):
    from genfast.kernels import philox

    seed = torch.tensor([-7234567890123456789])
    words = philox.fill_bits(seed.to(DEVICE), 5, 20, 4, 2**33, 9, 3).cpu()
    assert torch.equal(words * high >> 32, random.integers(seed, 5, 20, high, 4, 2**33, 9, 3))
    if not INTERPRETED:
        got = random.integers(seed.to(DEVICE), 5, 20, high, 4, 2**33, 9, 3)
        assert torch.equal(got.cpu(), words * high >> 32)


@pytest.mark.parametrize("half", [False, True])
def test_tiles_of_16_bit_data_hold_the_same_noise(half):
    """Two Philox groups a thread or one: the order of the elements is the same."""
    from genfast.functional import reparameterize_kl

    dtype = torch.bfloat16 if half else torch.float32
    zeros = torch.zeros(3, 4100, device=DEVICE, dtype=dtype)
    z, _ = reparameterize_kl(zeros, zeros, seed=9)
    want = random.normal(9, 3, 4100, random.Stream.LATENT)
    tolerance = TOLERANCES["interpreted" if INTERPRETED else "triton"][dtype]
    assert tolerance.excess(z.cpu(), want) <= 1


def test_chosen_words_reach_the_tails_and_the_middle():
    """Smallest and largest words, and those around the switch of formulas next to u = 1, as in PyTorch."""
    from tests.philox_probe import probe

    switch = int(0.99951171875 * 2**32)
    words = [0, 1, 2**31 - 1, 2**31, switch - 512, switch + 512, 2**32 - 300, 2**32 - 1]
    first = torch.tensor(words).repeat_interleave(8)
    second = torch.tensor([0, 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, 2**32 - 1]).repeat(8)
    got = [torch.empty(64, device=DEVICE) for _ in range(2)]
    probe[(1,)](first.to(DEVICE), second.to(DEVICE), *got, FAST=not INTERPRETED and torch.version.hip is None, N=64)
    tolerance = TOLERANCES["interpreted" if INTERPRETED else "triton"][torch.float32]
    for actual, want in zip(got, random.box_muller(first, second), strict=True):
        assert tolerance.excess(actual.cpu(), want) <= 1
    assert torch.hypot(*got).max() > 6.7
