"""The experiment about noise below the grey levels: bounds that are right, and sentences that follow them."""

import math

import pytest
import torch

from genfast.experiments import run_experiment
from genfast.experiments.base import Paired
from genfast.experiments.dequantization import _MIDDLE, _OFFSETS, _between_levels, _bits, _nats, _page, _with_uniform
from genfast.flows import Dequantize
from genfast.models import RealNVP
from tests.experiments.small import about, assert_whole_page, few


@pytest.mark.filterwarnings("ignore:frechet_distance")
def test_it_finishes_in_seconds(tmp_path, capsys):
    page = run_experiment("dequantization", few(tmp_path, budget=3.0))
    assert_whole_page(page, tmp_path, ("curves.png", "samples.png"))
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == ["none", "uniform", "variational"]


@pytest.fixture(scope="module")
def flow():
    torch.manual_seed(0)
    flow = RealNVP((1, 8, 8), preset="tiny", hidden=8, dequantization="none").eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return flow


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_bits_are_those_of_the_flow(flow, images):
    bits = _bits(_nats(flow, images, 0, 1), images)
    torch.testing.assert_close(bits.terms.float(), flow.bits_per_dim(images), rtol=1e-5, atol=1e-5)


def test_several_draws_are_an_average_of_likelihoods(flow, images):
    nats = _nats(_with_uniform(flow), images, 0, 3)
    assert nats.shape == (3, 6)
    assert (nats.diff(dim=0).abs() > 1e-3).all()
    want = -(nats.exp().mean(0).log() if nats.min() > -600 else nats.logsumexp(0) - math.log(3)) / (64 * math.log(2))
    torch.testing.assert_close(_bits(nats, images).terms, want)
    # Jensen: one draw is worse on average.
    assert (_bits(nats, images).terms < -nats.mean(0) / (64 * math.log(2))).all()


def test_the_middle_of_the_bins_is_where_a_flow_without_noise_is_trained(flow, images):
    values = _between_levels(flow, images)
    assert _OFFSETS[_MIDDLE] == 0.5
    assert len(values) == len(_OFFSETS)
    torch.testing.assert_close(values[_MIDDLE].terms.float(), flow.bits_per_dim(images), rtol=1e-4, atol=1e-4)
    assert (values[0].terms - values[_MIDDLE].terms).abs().min() > 1e-4


def test_the_noise_is_added_to_a_copy(flow):
    other = _with_uniform(flow)
    assert isinstance(other.transforms[0], Dequantize)
    assert (flow.transforms[0].centred, other.transforms[0].centred) == (True, False)


def statements(tmp_path, trained=-0.5, uniform=4.0, gaps=(0.05, 0.01), middle=-0.5, edge=5.0):
    settings = few(tmp_path, budget=3.0)
    spread = 0.01 * torch.randn(100, generator=torch.Generator().manual_seed(0)).double()

    def bits(value):
        return Paired.of(value + spread, "test")

    rows = []
    for kind in ("none", "uniform", "variational"):
        own = bits({"none": trained, "uniform": 2.0, "variational": 1.9}[kind])
        bound = bits({"none": uniform, "uniform": 2.0, "variational": 1.9}[kind])
        gap = Paired.of(gaps[kind == "variational"] + 0.1 * spread, "test")
        rows.append({
            "kind": kind, "trained": own, "uniform": bits(uniform), "bound": bound, "tighter": bound, "gap": gap,
            "frechet_distance": about(10.0), "coverage": None, "confidence": None, "parameters": 1, "seconds": 1.0,
        })  # fmt: skip
    between = {kind: [bits(edge)] * 7 + [bits(middle)] + [bits(edge)] * 7 for kind in ("none", "uniform")}
    between["variational"] = [bits(1.0)] * 15
    return _page(settings, settings.load(), 2, 16, rows, between).statements


def test_the_page_says_what_its_numbers_say(tmp_path):
    said = statements(tmp_path)
    assert "less than no bits at all" in said[0]
    assert "4.50" in said[0]
    assert said[0].endswith(" more.")
    assert "at the middle of the bins -0.4" in said[1]
    assert ", below at their edge 5.0" in said[1]
    assert "not told apart from" in said[3]
    assert "the best is dequantization variational" in said[4]
    assert said[5].endswith("variational noise leaves less to gain.")
    assert "not told apart from it: uniform, variational" in said[6]


def test_and_what_other_numbers_say(tmp_path):
    said = statements(tmp_path, trained=3.0, uniform=2.5, gaps=(0.01, 0.05), middle=6.0)
    assert "no bits at all" not in said[0]
    assert said[0].endswith(" less.")
    assert ", above at their edge 5.0" in said[1]
    assert said[5].endswith("uniform noise leaves less to gain.")
    assert statements(tmp_path, trained=2.5, uniform=2.5)[0].endswith("which is not told from none.")
    assert statements(tmp_path, gaps=(0.01, 0.01))[5].endswith("which are not told apart.")
