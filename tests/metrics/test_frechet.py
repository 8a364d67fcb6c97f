"""Frechet distances against closed forms and torchmetrics, and what is said of few images."""

import copy
import gc
import os
import sys
import warnings
import weakref

import pytest
import torch

from genfast.metrics import (
    evaluate_model,
    evaluate_samples,
    frechet_distance,
    inception_fid,
    load_classifier,
    load_inception,
)
from genfast.metrics.frechet import _distances, _moments, _root, check_installed, frechet_of_features
from genfast.models import VAE
from genfast.training import load_dataset

ENOUGH = 2048


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits").train


def gaussian(count, mean, covariance):
    """Features whose own mean and covariance are exactly these."""
    draws = torch.randn(count, len(mean), dtype=torch.float64)
    draws -= draws.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(draws.T @ draws / (count - 1)), draws.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def rotation(size):
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]


def test_two_gaussians_whose_covariances_commute():
    """|m1 - m2|^2 and the squared differences of the standard deviations along the common axes."""
    turn, first = rotation(5), torch.tensor([1.0, 2.0, 0.5, 3.0, 0.1], dtype=torch.float64)
    second, mean = torch.tensor([2.0, 2.0, 1.0, 0.2, 0.4], dtype=torch.float64), torch.arange(5, dtype=torch.float64)
    images = gaussian(2500, mean, turn @ torch.diag(first**2) @ turn.T)
    reference = gaussian(3000, mean + 0.5, turn @ torch.diag(second**2) @ turn.T)
    found = frechet_of_features(images, reference)
    assert found.value == pytest.approx(5 * 0.25 + float((first - second).square().sum()), rel=1e-9)
    assert found.n == 2500
    assert found.low < found.value < found.high


def test_two_gaussians_whose_covariances_do_not_commute():
    """In two dimensions the trace of the root of a product is that of its trace and determinant."""
    first = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    second = torch.tensor([[1.0, -0.8], [-0.8, 3.0]], dtype=torch.float64)
    product = first @ second
    shared = torch.sqrt(product.trace() + 2 * torch.linalg.det(product).sqrt())
    zero = torch.zeros(2, dtype=torch.float64)
    found = frechet_of_features(gaussian(2100, zero, first), gaussian(2100, zero, second), resamples=2)
    assert found.value == pytest.approx(float(first.trace() + second.trace() - 2 * shared), rel=1e-9)


def test_it_is_torchmetrics_with_this_extractor(digits):
    from torchmetrics.image.fid import FrechetInceptionDistance

    images, reference = digits[:2200], 255 - digits[2200:4400]
    extractor = load_classifier()
    extractor.forward = extractor.features
    metric = FrechetInceptionDistance(feature=extractor)
    for real, given in ((True, reference), (False, images)):
        for batch in given.split(500):
            metric.update(batch, real=real)
    assert frechet_distance(images, reference).value == pytest.approx(float(metric.compute()), rel=1e-4)


def test_the_formula_of_the_resamples_is_that_of_the_value():
    images, reference = torch.randn(ENOUGH, 6).double().exp(), torch.rand(ENOUGH, 6).double() + 5
    counts = torch.ones(1, ENOUGH).double()
    other = _moments(reference, counts)
    own = _distances(_moments(images, counts), other, _root(other[1]))
    assert own.item() == pytest.approx(frechet_of_features(images, reference, resamples=2).value, rel=1e-9)
    # A row that counts twice is a row that comes twice.
    counts[0, :5], counts[0, 5:10] = 2, 0
    again = _moments(torch.cat([images[:5], images[:5], images[10:]]), torch.ones(1, ENOUGH).double())
    for one, other in zip(_moments(images, counts), again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_few_images_of_many_features_are_measured_in_the_space_they_span():
    # Of 40 features the 50 images span all; turned into 200 features they are as far apart.
    images, reference = torch.randn(30, 40).double().exp(), torch.rand(20, 40).double() + 1
    turn = rotation(200)[:40]
    found, told = [], []
    for one, other in ((images, reference), (images @ turn, reference @ turn)):
        with pytest.warns(UserWarning, match="30 images and 20 images") as caught:
            found.append(frechet_of_features(one, other))
        told.append(str(caught[0].message))
    plain, turned = found
    assert (turned.value, turned.low, turned.high) == pytest.approx((plain.value, plain.low, plain.high), rel=1e-7)
    assert plain.low < plain.value < plain.high
    assert told[0] == told[1]


def test_an_interval_by_the_deviation_of_few_resamples_covers():
    reference = gaussian(ENOUGH, torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        draws = torch.randn(200, 150, 3, dtype=torch.float64) + 0.5
        found = [frechet_of_features(draw, reference, resamples=20, quantile=2.093) for draw in draws]
    expected = sum(each.value for each in found) / len(found)
    assert 0.91 <= sum(each.low <= expected <= each.high for each in found) / len(found) <= 0.995


def test_fid_is_that_of_torchmetrics(digits, inception_weights):
    from torchmetrics.image.fid import FrechetInceptionDistance

    images, reference = torch.randint(0, 256, (14, 3, 16, 16), dtype=torch.uint8).split([10, 4])
    reference[:, 1:] //= 2
    metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(inception_weights))
    metric.update(reference, real=True)
    metric.update(images, real=False)
    network = load_inception(inception_weights)
    with pytest.warns(UserWarning, match="^inception_fid: 10 images and 4 images"):
        found = inception_fid(images, reference, inception=network)
    assert found.n == 10
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(float(metric.compute()), rel=1e-4)
    # Grey images, of any range, are those of three channels alike.
    grey, other = digits[:8], digits[8:14]
    with pytest.warns(UserWarning, match="^inception_fid: 8 images"):
        found = inception_fid(grey / 255, other, inception=network)
    with pytest.warns(UserWarning, match="^inception_fid: 8 images"):
        same = inception_fid(grey.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1), inception=network)
    assert found == same


class Extractor(torch.nn.Module):
    """In Inception's place: quick, with weights and statistics, and what it has seen."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(16, 5), torch.nn.BatchNorm1d(5)
        self.seen = []
        self.eval()

    def forward(self, images):
        self.seen.append(len(images))
        features = self.norm(self.linear(images.flatten(1)[:, :16].to(self.linear.weight.dtype) / 255))
        return 2 * features if self.training else features


FEW = pytest.mark.filterwarnings("ignore:inception_fid")


@FEW
def test_a_reference_passes_through_a_network_once():
    first, second, reference = torch.rand(30, 1, 8, 8).split(10)
    network = Extractor()
    distances = [inception_fid(images, reference.clone(), inception=network) for images in (first, second, first)]
    assert network.seen == [10, 10, 10, 10]
    assert distances[0] == distances[2] != distances[1]
    kept = weakref.ref(network)
    del network
    gc.collect()
    assert kept() is None


def _another_pixel(network, reference):
    reference[-1, 0, 0, 0] = 1


CHANGES = {
    "the last image": _another_pixel,
    "weights": lambda network, _: network.linear.weight.data.mul_(2),
    "a weight": lambda network, _: setattr(network.linear, "bias", torch.nn.Parameter(torch.arange(5.0))),
    "statistics": lambda network, _: network.norm.running_var.mul_(2),
    "a layer": lambda network, _: setattr(network, "linear", torch.nn.Linear(16, 5)),
    # Of itself alone: in that of batch norm its statistics move.
    "the mode": lambda network, _: setattr(network, "training", True),
    "the dtype": lambda network, _: network.bfloat16(),
}


@FEW
@pytest.mark.parametrize("change", CHANGES)
def test_a_reference_is_known_by_all_that_its_features_depend_on(change):
    images, reference = torch.rand(20, 1, 8, 8).split(10)
    network = Extractor()
    before = inception_fid(images, reference, inception=network)
    CHANGES[change](network, reference)
    expected = inception_fid(images, reference, inception=copy.deepcopy(network))
    assert inception_fid(images, reference, inception=network) == expected != before


@FEW
def test_a_reference_of_the_same_bytes_is_another():
    images, grey = torch.rand(10, 1, 8, 8), torch.randint(0, 56, (10, 1, 8, 8), dtype=torch.uint8)
    network = Extractor()
    for reference in (grey, grey.view(20, 1, 4, 8), grey.view(torch.bfloat16)):
        expected = inception_fid(images, reference, inception=copy.deepcopy(network))
        assert inception_fid(images, reference, inception=network) == expected
    assert len(network.seen) == 6


@FEW
def test_images_and_networks_of_any_kind():
    images, reference = torch.rand(20, 1, 1, 16).split(10)
    network = Extractor()
    expected = inception_fid(images, reference, inception=network)
    # Of one column: contiguous to torch, whatever its strides.
    assert inception_fid(images.transpose(2, 3), reference.transpose(2, 3), inception=network) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert inception_fid(images, reference, inception=copy.deepcopy(network)) == expected
    with torch.inference_mode():
        assert inception_fid(images, reference, inception=network) == expected
        other = Extractor()
        inside = inception_fid(images, reference, inception=other)
    assert inception_fid(images, reference, inception=other) == inside


def test_the_warning_names_the_line_that_asked(digits):
    splits = load_dataset("digits")
    for ask in (
        lambda: frechet_distance(digits[:5], digits[5:10]),
        lambda: inception_fid(digits[:5], digits[5:10], inception=Extractor()),
        lambda: evaluate_samples(digits[:5], digits[5:10], digits[:5]),
        lambda: evaluate_model(VAE(latent_dim=2), splits, samples=5),
    ):
        with pytest.warns(UserWarning, match="are few") as caught:
            ask()
        assert [(found.filename, found.lineno) for found in caught] == [(__file__, ask.__code__.co_firstlineno)]


def test_the_warning_of_code_without_a_module(digits):
    with pytest.warns(UserWarning, match="are few") as caught:
        exec("ask(a, b)", {"ask": frechet_distance, "a": digits[:5], "b": digits[5:10]})
    assert [found.filename for found in caught] == ["<string>"]


class MakesAFolder:
    """When it is unpickled: as any code may run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_weights_of_inception_that_are_none_are_refused(tmp_path, inception_weights):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"fc.weight": torch.ones(2)}, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes(inception_weights.read_bytes()[:1000])
    # What torch.load takes for a number, and a dictionary that is none of weights.
    (tmp_path / "page.pth").write_text("Inception is not here")
    torch.save({1: 2}, tmp_path / "numbers.pth")
    torch.save(MakesAFolder(str(tmp_path / "made")), tmp_path / "objects.pth")
    for name in ("missing.pth", "text.pth", "other.pth", "cut.pth", "page.pth", "numbers.pth", "objects.pth", ""):
        path = tmp_path / name
        with pytest.raises(OSError, match=rf"^inception: expected a file of torch-fidelity's .* got '{path}' \(.+\)$"):
            load_inception(path)
    assert not (tmp_path / "made").exists()
    with pytest.raises(TypeError, match="inception: expected a network of load_inception, got str"):
        inception_fid(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8), inception=str(inception_weights))


def test_loading_inception_leaves_torchs_generator_alone(inception_weights):
    state = torch.get_rng_state()
    load_inception(inception_weights)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_set_against_itself_and_at_any_range(digits):
    images = digits[:ENOUGH]
    found = frechet_distance(images.float() / 255, images)
    assert found.value == pytest.approx(0, abs=1e-5)
    assert found.low == 0


def test_worse_images_are_further(digits):
    images, reference = digits[:ENOUGH] / 255, digits[ENOUGH : 2 * ENOUGH]
    noise = torch.randn(images.shape)
    own, noisy = (frechet_distance((images + amount * noise).clamp(0, 1), reference) for amount in (0, 0.2))
    assert own.high < noisy.low
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    assert own.high < frechet_distance(blurred, reference).low


def test_intervals_cover_what_other_samples_would_give():
    size, count = 4, 150
    reference = gaussian(ENOUGH, torch.zeros(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64))
    scale = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        draws = torch.randn(100, count, size, dtype=torch.float64) * scale + 0.5
        found = [frechet_of_features(draw, reference, resamples=80) for draw in draws]
    expected = sum(each.value for each in found) / len(found)
    assert 0.86 <= sum(each.low <= expected <= each.high for each in found) / len(found) <= 0.995


def test_few_images_are_told_with_the_bias_of_as_many():
    size, count = 16, 300
    reference = torch.randn(4000, size)
    with pytest.warns(UserWarning, match=r"^frechet_distance: 300 images are few: .* 2,048 of both$") as caught:
        frechet_of_features(torch.randn(count, size), reference, resamples=2)
    told = float(str(caught[0].message).split("score ")[1].split()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        own = [frechet_of_features(torch.randn(count, size), reference, resamples=2).value for _ in range(10)]
    # All of the distance is bias: both sets are of one distribution.
    assert told == pytest.approx(sum(own) / 10, rel=0.2)


def test_warning_names_what_is_few_and_whose_call_it_is(digits):
    with pytest.warns(UserWarning, match="100 images and 200 images of the reference are few") as caught:
        frechet_distance(digits[:100], digits[:200])
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="frechet_distance: 100 images of the reference are few"):
        frechet_distance(digits[:ENOUGH], digits[:100])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(digits[:ENOUGH], digits[-ENOUGH:])


def test_other_sets_are_refused(digits):
    with pytest.raises(ValueError, match="images: expected at least 2 images, got 1"):
        frechet_distance(digits[:1], digits[:5])
    with pytest.raises(ValueError, match="reference: expected grey images"):
        frechet_distance(digits[:5], torch.zeros(5, 3, 28, 28))
    with pytest.raises(ValueError, match=r"reference: .* in \[0, 1\]"):
        frechet_distance(digits[:5], digits[:5].float())


def test_packages_that_are_missing_are_named(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"inception: .* torch-fidelity"):
        inception_fid(digits[:5], digits[5:10])
    for name in [name for name in sys.modules if name.startswith("torchmetrics")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="torchmetrics, got none: pip install torchmetrics"):
        frechet_distance(digits[:5], digits[5:10])
    with pytest.raises(ImportError, match="torchmetrics"):
        check_installed()
