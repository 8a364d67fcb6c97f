"""What several experiments measure, against other ways to come by the same numbers."""

import pytest
import torch

from genfast import training
from genfast.experiments.measures import (
    are_digits,
    bound,
    codes,
    drawn,
    log_likelihood,
    of_samples,
    some_of,
    squared_error,
)
from genfast.models import VAE, AutoEncoder


@pytest.fixture(scope="module")
def digits():
    return training.load_dataset("digits")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VAE(latent_dim=3, hidden_dims=(16,)).eval()


def test_the_bound_is_that_of_evaluate(model, digits):
    data = training.DeviceDataset(digits.test, binarize="dynamic")
    parts, expected = bound(model, data, seed=4), training.evaluate(model, data, seed=4)
    for name in ("elbo", "nll", "kl"):
        assert parts[name].value == pytest.approx(expected[name], rel=1e-5)
        assert parts[name].low < parts[name].value < parts[name].high
        assert parts[name].n == 1000


def test_with_one_draw_the_weighted_bound_is_the_elbo_up_to_the_kls_draw(model, digits):
    data = training.DeviceDataset(digits.test, binarize="threshold")
    one, many = (log_likelihood(model, data, k, seed=4) for k in (1, 50))
    elbo = bound(model, data, seed=4)["elbo"]
    assert one.low < elbo.value < one.high
    assert many.value > one.value


def test_codes_are_what_encode_says(model, digits):
    mu, logvar = codes(model, digits.test)
    expected = model.encode(digits.test)
    torch.testing.assert_close((mu, logvar), tuple(part.detach() for part in expected), rtol=1e-5, atol=1e-5)
    (code,) = codes(AutoEncoder(latent_dim=2, hidden_dims=(4,)), digits.test)
    assert code.shape == (1000, 2)


def test_codes_of_a_data_set_are_of_the_pixels_that_the_bound_is_of(model, digits):
    data = training.DeviceDataset(digits.test, binarize="dynamic")
    mu, logvar = (part.double() for part in codes(model, data, seed=4))
    kl = float((0.5 * (mu.square() + logvar.exp() - 1 - logvar)).sum(1).mean())
    assert bound(model, data, seed=4)["kl"].value == pytest.approx(kl, rel=1e-5)
    assert not torch.allclose(mu, codes(model, digits.test)[0].double(), rtol=1e-3, atol=1e-3)


def test_the_squared_error_is_per_pixel(digits):
    model = AutoEncoder(latent_dim=2, hidden_dims=(4,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    # Every pixel is reconstructed as 1/2.
    expected = float((digits.test.double() / 255 - 0.5).square().mean())
    assert squared_error(model, digits.test).value == pytest.approx(expected, rel=1e-6)


def test_draws_continue_one_another(model):
    whole = drawn(model, 700, seed=1)
    assert whole.shape == (700, 1, 28, 28)
    assert whole.dtype == torch.uint8
    assert torch.equal(whole[:3], drawn(model, 3, seed=1))
    assert not torch.equal(whole[:100], whole[512:612])


def test_only_digits_have_digits(digits):
    assert are_digits(digits)
    other = digits._replace(name="faces")
    assert not are_digits(other)
    with pytest.warns(UserWarning, match="frechet_distance: 600 images"):
        found = of_samples(digits.train[:600], other)
    assert found["coverage"] is None
    assert found["precision"] is not None


def test_some_of_many_images_keep_their_labels():
    splits = training.load_dataset("digits")
    many = splits._replace(train=torch.arange(3000).view(-1, 1, 1, 1), train_labels=torch.arange(3000) // 300)
    some = some_of(many, 1000)
    assert len(some.train) == 1000
    assert torch.equal(some.train.flatten() // 300, some.train_labels)
    assert (some.train_labels.bincount() > 50).all()
    assert torch.equal(some_of(many, 1000).train, some.train)
    assert some_of(splits, 5000) is splits
