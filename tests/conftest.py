"""Fixtures of the whole suite: the device each op test runs on, and memory that is never silently zero."""

from __future__ import annotations

import os

import pytest
import torch

pytest.register_assert_rewrite("tests.matrix")

from tests import matrix  # noqa: E402

# GENFAST_TEST_DEVICES=cuda leaves out what needs no GPU: its time is short.
DEVICES = os.environ.get("GENFAST_TEST_DEVICES", "cpu,cuda" if torch.cuda.is_available() else "cpu").split(",")
# GENFAST_TEST_SETTINGS=first: one setting of each op, where another torch is what is tested.
SETTINGS = {"all": None, "first": 1}[os.environ.get("GENFAST_TEST_SETTINGS", "all")]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _fresh_state():
    """Each test starts from the same global seed and leaves no compiled code behind."""
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture
def poisoned():
    """`torch.empty` returns NaN: an element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file of weights as torch-fidelity reads them: of the real network, but never trained."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        network = FeatureExtractorInceptionV3("inception", ["2048"], str(path))
    for parameter in network.parameters():
        if parameter.ndim == 4:
            # What is seen must reach the last features.
            torch.nn.init.kaiming_normal_(parameter)
    torch.save(network.state_dict(), path)
    return path


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A class with `cases` runs each test that asks for a `case` once for each; `graded`: those with gradients."""
    if metafunc.cls is None or not hasattr(metafunc.cls, "cases"):
        return
    cases = metafunc.cls.cases[:SETTINGS]
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases, ids=lambda case: case.name)
    if "graded" in metafunc.fixturenames:
        metafunc.parametrize("graded", [case for case in cases if case.differentiable], ids=lambda case: case.name)
    for name, every in (("sized", 3), ("planar", 2)):
        if name in metafunc.fixturenames:
            # The settings of an op share its tiles: the first of them meets all shapes.
            shapes = {"sized": matrix.SHAPES, "planar": matrix.PLANAR}[name]
            pairs = [(case, shape) for case in cases[:1] for shape in shapes]
            pairs += [(case, shape) for case in cases[1:] for shape in shapes[::every]]
            metafunc.parametrize(name, pairs, ids=lambda pair: f"{pair[0].name}-{pair[1]}")
    if "base" in metafunc.fixturenames:
        metafunc.parametrize("base", cases[:1], ids=lambda case: case.name)
