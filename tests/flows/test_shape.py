"""Squeeze, Permute and Split: Jacobians, inverses, and what they refuse."""

import numpy as np
import pytest
import torch

from genfast.flows import Permute, Split, Squeeze, divide, join
from tests.flows.networks import assert_is_a_transform, conv, mlp

TRANSFORMS = {
    "squeeze": (Squeeze, (1, 4, 2)),
    "reverse": (lambda: Permute("reverse"), (5,)),
    "swap": (lambda: Permute("swap"), (4, 2)),
    "order": (lambda: Permute([2, 0, 1]), (3, 2)),
    "split": (Split, (4,)),
    "split with a prior": (lambda: Split(mlp(2, 4, dtype=torch.float64)), (4,)),
    "split of images": (lambda: Split(conv(1, 2, dtype=torch.float64), scale_map="exp"), (2, 2, 2)),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_logdet_is_that_of_the_jacobian(name, fused):
    build, shape = TRANSFORMS[name]
    transform = build()
    for module in transform.modules():
        module.fused = fused
    assert_is_a_transform(transform, torch.randn(2, *shape, dtype=torch.float64))


def test_squeeze_is_pixel_unshuffle():
    x = torch.randn(2, 3, 4, 6)
    y, _ = Squeeze()(x)
    assert torch.equal(y, torch.nn.functional.pixel_unshuffle(x, 2))
    assert torch.equal(Squeeze().inverse(y), x)
    assert Squeeze()(torch.zeros(0, 3, 4, 6))[0].shape == (0, 12, 2, 3)


def test_swapping_halves_moves_nothing():
    x = torch.randn(2, 6, 3)
    halves = divide(x, "channel")
    swapped, _ = Permute("swap")(halves)
    assert swapped.a is halves.b
    assert swapped.b is halves.a
    assert torch.equal(join(swapped), Permute("swap")(x)[0])
    assert torch.equal(join(Permute("swap").inverse(swapped)), x)


@pytest.mark.parametrize("split", ["checkerboard", [False, True, False, False, True, True]], ids=["board", "mask"])
@pytest.mark.parametrize("order", ["swap", "reverse"])
def test_permuting_halves_is_permuting_the_whole(split, order):
    x = torch.randn(2, 6, 2, 4)
    permuted, _ = Permute(order)(divide(x, split))
    assert torch.equal(join(permuted), Permute(order)(x)[0])


def test_a_split_with_a_prior_is_a_gaussian_given_what_goes_on():
    split, x = Split(mlp(2, 4), factor=1.0), torch.randn(5, 4)
    halves, logdet = split(x)
    s, mean = split.prior.net(x[:, :2]).chunk(2, 1)
    gaussian = torch.distributions.Normal(mean, torch.exp(torch.tanh(s)))
    standard = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(standard.log_prob(halves.b).sum(1) + logdet, gaussian.log_prob(x[:, 2:]).sum(1))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: Squeeze()(torch.randn(1, 1, 3, 4)),
            r"x: expected .* even H and W to squeeze, got shape \[1, 1, 3, 4\]",
        ),
        (lambda: Squeeze()(torch.randn(1, 1, 4, 3)), "x: expected .* even H and W to squeeze"),
        (lambda: Squeeze()(torch.randn(1, 4)), "x: expected .* to squeeze"),
        (lambda: Squeeze().inverse(torch.randn(1, 6, 4, 4)), r"y: expected \[B, 4 C, H, W\], got shape \[1, 6, 4, 4\]"),
        (lambda: Permute("sideways"), "order: expected a permutation, 'reverse' or 'swap', got 'sideways'"),
        (lambda: Permute([0, 0, 1]), r"order: expected each of 0, 1, ..., C - 1 once, got \[0, 0, 1\]"),
        (lambda: Permute([]), "order: expected each of"),
        (lambda: Permute([0.5, 1.9]), r"order: expected each of 0, 1, ..., C - 1 once, got \[0.5, 1.9\]"),
        (lambda: Permute([1.0, 0.0]), "order: expected each of"),
        (lambda: Permute([True, False]), "order: expected each of"),
        (lambda: Permute(torch.tensor([1.0, 0.0])), "order: expected each of"),
        (lambda: Permute(None), r"order: expected each of 0, 1, ..., C - 1 once, got \[None\]"),
        (lambda: Permute([1, 0])(torch.randn(2, 3)), "x: expected 2 channels, as many as order has"),
        (lambda: Permute("swap")(torch.randn(2, 3)), "x: expected an even number of channels"),
        (lambda: Split()(torch.randn(2, 3)), "x: expected an even number of channels"),
        (lambda: Split(scale_map="exp"), r"net: expected a module for the options \['scale_map'\], got None"),
        (lambda: Split()(divide(torch.randn(2, 2), [True, False])), "x: expected halves of the split 'channel'"),
    ],
)
def test_bad_input_names_the_argument(run, message):
    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.parametrize(("option", "value"), [("swap", True), ("split", "checkerboard")])
@pytest.mark.parametrize("net", [mlp(2, 4), None])
def test_a_split_chooses_its_halves_itself(net, option, value):
    with pytest.raises(TypeError, match=f"{option}: expected none, .* got {value!r}"):
        Split(net, **{option: value})


@pytest.mark.parametrize("order", [(2, 0, 1), torch.tensor([2, 0, 1]), np.array([2, 0, 1]), range(3)], ids=repr)
def test_an_order_may_be_any_sequence_of_ints(order):
    permute = Permute(order)
    assert permute(torch.arange(3.0)[None])[0].tolist() == [list(map(float, order))]
    assert all(type(place) is int for place in permute.order)
