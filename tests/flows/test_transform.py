"""Halves: every split gives back what it took, and says what it cannot split."""

import copy

import pytest
import torch

from genfast.flows import Halves, Mask, Transform, divide, join
from genfast.flows._transform import same_split

MASKS = {
    "runs": [False] * 3 + [True] * 3,
    "every second": [False, True] * 3,
    "upper first": [True, True, True, False, False, False],
    "uneven": [True, False, False, True, True, True],
    "single": [False, False, True, False, False, False],
}


@pytest.mark.parametrize("bits", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 3), (2, 6, 4, 4), (0, 6)])
def test_a_mask_divides_and_joins(bits, shape):
    x, mask = torch.randn(shape), torch.tensor(bits)
    halves = divide(x, mask)
    torch.testing.assert_close(halves.a, x[:, ~mask], rtol=0, atol=0)
    torch.testing.assert_close(halves.b, x[:, mask], rtol=0, atol=0)
    assert torch.equal(join(halves), x)


@pytest.mark.parametrize("split", ["channel", "checkerboard"])
@pytest.mark.parametrize("shape", [(3, 2, 4, 6), (1, 4, 2, 2), (0, 2, 4, 4)])
def test_divide_and_join(split, shape):
    x = torch.randn(shape)
    assert torch.equal(join(divide(x, split)), x)


def test_the_checkerboard_is_one():
    x = torch.randn(2, 3, 6, 4)
    parity = (torch.arange(6)[:, None] + torch.arange(4)) % 2
    halves = divide(x, "checkerboard")
    for half, side in ((halves.a, 0), (halves.b, 1)):
        assert torch.equal(half, x[:, :, parity == side].reshape(2, 3, 6, 2))


@pytest.mark.parametrize("split", ["channel", MASKS["runs"], MASKS["every second"], MASKS["upper first"]], ids=str)
def test_regular_halves_are_views(split):
    x = torch.randn(2, 6, 4)
    assert all(half._base is x for half in divide(x, split)[:2])


def test_masks_are_compared_by_value():
    one, other = Mask([True, False]), Mask(torch.tensor([False, True]))
    assert same_split(one, copy.deepcopy(one))
    assert not same_split(one, other)
    assert not same_split(one, "channel")
    assert not one.state_dict()


@pytest.mark.parametrize(
    ("split", "error", "message"),
    [
        ("columns", ValueError, "split: expected 'channel', 'checkerboard' or a boolean mask"),
        (None, ValueError, "split: expected"),
        (torch.tensor([0, 1]), TypeError, "split: expected a boolean mask, got torch.int64"),
        (torch.ones(2, 2, dtype=torch.bool), ValueError, r"split: expected a mask of shape \[D\]"),
        (torch.ones(4, dtype=torch.bool), ValueError, "split: expected a mask with both values, got 4 x True"),
        (torch.zeros(3, dtype=torch.bool), ValueError, "split: expected a mask with both values, got 3 x False"),
    ],
)
def test_what_is_no_split(split, error, message):
    with pytest.raises(error, match=message):
        divide(torch.randn(2, 4), split)


@pytest.mark.parametrize(
    ("shape", "split", "message"),
    [
        ((2, 3), "channel", r"x: expected an even number of channels to split, got shape \[2, 3\]"),
        ((2, 2, 3, 4), "checkerboard", "x: expected .* even H and W for a checkerboard"),
        ((2, 2, 4, 3), "checkerboard", "x: expected .* even H and W for a checkerboard"),
        ((2, 4), "checkerboard", "x: expected .* for a checkerboard"),
        ((2, 4), [True, False], r"x: expected shape \[B, 2, ...\] for a mask of that length, got \[2, 4\]"),
    ],
)
def test_what_cannot_be_split(shape, split, message):
    with pytest.raises(ValueError, match=message):
        divide(torch.randn(shape), split)


def test_a_transform_without_an_inverse_says_so():
    assert not Transform().accepts("channel")
    with pytest.raises(NotImplementedError, match="Transform defines no inverse"):
        Transform().inverse(torch.ones(1))
    assert Halves._fields == ("a", "b", "split")
