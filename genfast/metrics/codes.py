"""What a latent code holds: its classes by a linear probe, and how many of its dimensions are used."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast.metrics.estimate import Estimate, of_share

__all__ = ["active_units", "linear_probe"]

_ITERATIONS = 300


def linear_probe(train_codes: Tensor, train_labels: Tensor, test_codes: Tensor, test_labels: Tensor) -> Estimate:
    """The accuracy on test codes of a logistic regression that was fitted to training codes.

    Codes are shifted and scaled to mean 0 and variance 1 of the training codes; the weights have the penalty
    ``|w|^2 / 2`` beside the sum of the cross-entropies, which L-BFGS minimises in fp64.

    Args:
        train_codes, test_codes: floats [N, ...] and [M, ...]; of a VAE, the means.
        train_labels, test_labels: ints [N] and [M], from 0 on.

    Returns:
        The share of the test codes whose class is found, with n = M.

    Raises:
        TypeError, ValueError: sizes that do not fit, codes that are not finite floats, labels that are no ints from 0
            on, fewer than 2 classes in the training labels.

    Example:
        >>> codes, labels = torch.randn(300, 2), torch.arange(300) % 2
        >>> codes[:, 0] += 6 * labels
        >>> linear_probe(codes[:200], labels[:200], codes[200:], labels[200:]).value > 0.95
        True
    """
    train_codes, train_labels = _checked("train", train_codes, train_labels)
    test_codes, test_labels = _checked("test", test_codes, test_labels)
    if train_codes.shape[1] != test_codes.shape[1]:
        expected, got = train_codes.shape[1], test_codes.shape[1]
        raise ValueError(f"test_codes: expected {expected} numbers each, as in train_codes, got {got}")
    found = train_labels.unique()
    if len(found) < 2:
        raise ValueError(f"train_labels: expected at least 2 classes, got {found.tolist()}")
    mean, std = train_codes.mean(0), train_codes.std(0, correction=0)
    # A dimension that never changes says nothing, and must not be divided by 0.
    std = torch.where(std > 0, std, torch.ones_like(std))
    right = _fit_and_guess((train_codes - mean) / std, train_labels, (test_codes - mean) / std) == test_labels
    return of_share(right)


def active_units(mu: Tensor, threshold: float = 0.01) -> int:
    """How many dimensions of a code depend on the image: the variance of their means over the images is above 0.01.

    Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016, section 5.2.

    Args:
        mu: means of q(z | x), floats [N, ...], of many images.
        threshold: of the variance.

    Raises:
        TypeError, ValueError: mu is not floats of at least 2 images, or not finite.

    Example:
        >>> active_units(torch.stack([torch.randn(1000), 0.05 * torch.randn(1000)], 1))
        1
    """
    mu = _floats("mu", mu)
    if len(mu) < 2:
        raise ValueError(f"mu: expected means of at least 2 images, got {len(mu)}")
    return int((mu.var(0) > threshold).sum())


def _fit_and_guess(codes: Tensor, labels: Tensor, test_codes: Tensor) -> Tensor:
    classes = int(labels.max()) + 1
    weight = codes.new_zeros(classes, codes.shape[1], requires_grad=True)
    bias = codes.new_zeros(classes, requires_grad=True)
    stopping = {"max_iter": _ITERATIONS, "tolerance_grad": 1e-7, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([weight, bias], **stopping)

    def objective() -> Tensor:
        optimizer.zero_grad()
        fit = F.cross_entropy(F.linear(codes, weight, bias), labels)
        loss = fit + weight.square().sum() / (2 * len(codes))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return F.linear(test_codes, weight.detach(), bias.detach()).argmax(1)


def _checked(split: str, codes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    codes = _floats(f"{split}_codes", codes)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{split}_labels: expected a tensor of ints, got {got}")
    if labels.shape != codes.shape[:1]:
        raise ValueError(f"{split}_labels: expected shape [{len(codes)}], got {list(labels.shape)}")
    if (labels < 0).any():
        raise ValueError(f"{split}_labels: expected ints from 0 on, got {int(labels.min())}")
    return codes, labels.to(codes.device, torch.int64)


def _floats(name: str, codes: Tensor) -> Tensor:
    """fp64 [N, D]."""
    if not isinstance(codes, Tensor) or not codes.is_floating_point():
        got = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        raise TypeError(f"{name}: expected a tensor of floats, got {got}")
    if codes.ndim < 2 or codes.numel() == 0:
        raise ValueError(f"{name}: expected shape [N, ...], got {list(codes.shape)}")
    if not torch.isfinite(codes).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return codes.detach().flatten(1).double()
