"""Linear probes against another solver, and active units."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize, special

from genfast.metrics import active_units, linear_probe
from genfast.metrics.codes import _fit_and_guess


def three_classes(count, dimensions=4, spread=1.5):
    labels = torch.arange(count) % 3
    centres = spread * torch.eye(3, dimensions)
    return torch.randn(count, dimensions) + centres[labels], labels


def test_the_same_guesses_as_those_of_scipy():
    codes, labels = (part.numpy() for part in three_classes(150))
    codes = codes.astype(np.float64)
    hot = np.eye(3)[labels]

    def objective(flat):
        weight, bias = flat[:12].reshape(3, 4), flat[12:]
        logits = codes @ weight.T + bias
        return (special.logsumexp(logits, axis=1) - (logits * hot).sum(1)).sum() + 0.5 * (weight**2).sum()

    best = optimize.minimize(objective, np.zeros(15), options={"gtol": 1e-6}).x
    test = torch.randn(2000, 4, dtype=torch.float64) * 2
    expected = (test.numpy() @ best[:12].reshape(3, 4).T + best[12:]).argmax(1)
    found = _fit_and_guess(torch.from_numpy(codes), torch.from_numpy(labels), test).numpy()
    assert (found == expected).mean() > 0.998


def test_accuracy_of_two_gaussians_is_that_of_bayes():
    """Two unit Gaussians at a distance of 2: the best rule is linear, and right with probability Phi(1)."""
    labels = torch.arange(6000) % 2
    codes = torch.randn(6000, 3)
    codes[:, 1] += 2 * labels
    found = linear_probe(codes[:3000], labels[:3000], codes[3000:], labels[3000:])
    bayes = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    assert found.value == pytest.approx(bayes, abs=0.02)
    assert found.low < bayes < found.high
    assert found.n == 3000


def test_scales_shifts_and_shapes_of_codes_do_not_matter():
    (train, train_labels), (test, test_labels) = three_classes(300), three_classes(200)
    plain = linear_probe(train, train_labels, test, test_labels)
    scale, shift = torch.tensor([1e-3, 1.0, 50.0, 1e4]), torch.tensor([5.0, 0.0, -1e3, 2.0])
    assert linear_probe(train * scale + shift, train_labels, test * scale + shift, test_labels) == plain
    maps = (train.reshape(-1, 2, 2), train_labels.to(torch.uint8), test.reshape(-1, 2, 2), test_labels.int())
    assert linear_probe(*maps) == plain
    constant = [torch.cat([codes, torch.full((len(codes), 1), 7.0)], 1) for codes in (train, test)]
    assert linear_probe(constant[0], train_labels, constant[1], test_labels) == plain


def test_a_probe_that_is_always_right_is_not_certain():
    labels = torch.arange(60) % 2
    codes = torch.randn(60, 2) + 100 * labels[:, None]
    found = linear_probe(codes[:30], labels[:30], codes[30:], labels[30:])
    assert found.value == found.high == 1
    assert 0.85 < found.low < 0.95


def test_what_no_line_separates_is_not_found():
    codes = torch.randn(2000, 2)
    labels = (codes[:, 0] * codes[:, 1] > 0).long()
    assert linear_probe(codes[:1000], labels[:1000], codes[1000:], labels[1000:]).value < 0.6


def test_the_probe_leaves_gradients_as_they_are():
    codes, labels = three_classes(60)
    codes.requires_grad_()
    with torch.no_grad():
        assert linear_probe(codes, labels, codes, labels).value > 0.5
        assert not torch.is_grad_enabled()
    assert codes.grad is None


def test_bad_codes_and_labels():
    codes, labels = three_classes(9)
    with pytest.raises(ValueError, match=r"train_labels: expected at least 2 classes, got \[1\]"):
        linear_probe(codes, torch.ones(9, dtype=torch.int64), codes, labels)
    with pytest.raises(ValueError, match=r"test_labels: expected shape \[9\], got \[8\]"):
        linear_probe(codes, labels, codes, labels[:8])
    with pytest.raises(ValueError, match="test_codes: expected 4 numbers each, as in train_codes, got 3"):
        linear_probe(codes, labels, codes[:, :3], labels)
    with pytest.raises(ValueError, match="train_labels: expected ints from 0 on, got -1"):
        linear_probe(codes, labels - 1, codes, labels)
    with pytest.raises(TypeError, match=r"test_labels: expected a tensor of ints, got torch\.float32"):
        linear_probe(codes, labels, codes, labels.float())
    with pytest.raises(TypeError, match=r"train_codes: expected a tensor of floats, got torch\.int64"):
        linear_probe(labels[:, None], labels, codes, labels)
    with pytest.raises(ValueError, match="test_codes: expected finite numbers, got NaN or infinity"):
        linear_probe(codes, labels, codes / 0, labels)
    with pytest.raises(ValueError, match=r"train_codes: expected shape \[N, \.\.\.\], got \[9\]"):
        linear_probe(codes[:, 0], labels, codes, labels)


def test_active_units_are_those_that_vary():
    mu = torch.randn(5000, 6) * torch.tensor([1.0, 0.2, 0.11, 0.09, 0.01, 0.0]) + 3
    assert active_units(mu) == 3
    assert active_units(mu, threshold=0.5) == 1
    assert active_units(mu.reshape(-1, 2, 3)) == 3
    with pytest.raises(ValueError, match="mu: expected means of at least 2 images, got 1"):
        active_units(mu[:1])
