"""What torch.compile would launch: really lowered, and held against what was counted by hand."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from genfast.bench import cost
from genfast.bench.inductor import chains

# Where the kernels of the chains below were read and their bytes counted by hand.
VERIFIED = ("2.11.", "2.15.")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
lowers = pytest.mark.skipif(
    not torch.__version__.startswith(VERIFIED) or torch.version.cuda is None,
    reason="the figures hold for the CUDA builds of torch 2.11 and 2.15",
)


@lowers
def test_kernels_and_bytes_are_those_counted_by_hand():
    report = chains(["bernoulli_nll-uint8", "reparameterize_kl"], ["bf16"])
    assert report.problems == []
    passes = {(each.case, each.phase): each for each in report.passes}
    assert list(passes) == [
        (case, phase) for case in ("reparameterize_kl", "bernoulli_nll-uint8") for phase in ("forward", "backward")
    ]
    # Forward reads mu and logvar, writes z and eps; backward reads them, eps and the gradient of z, writes two.
    forward, backward = passes["reparameterize_kl", "forward"], passes["reparameterize_kl", "backward"]
    assert (len(forward.kernels), len(backward.kernels)) == (2, 1)
    assert forward.bytes == pytest.approx(2 * 4, rel=1e-3)
    assert backward.bytes == pytest.approx(2 * 6, rel=1e-3)
    # A seed that costs an element nothing, then one kernel that makes four numbers to use one.
    seed, fused = forward.kernels
    assert (round(seed.bytes, 3), seed.instructions) == (0, 0)
    assert 140 < fused.instructions < 200
    assert (forward.limit, backward.limit) == ("issue", "memory")
    # Logits and a byte; the same and the gradient.
    forward, backward = passes["bernoulli_nll-uint8", "forward"], passes["bernoulli_nll-uint8", "backward"]
    assert (len(forward.kernels), len(backward.kernels)) == (1, 1)
    assert forward.bytes == pytest.approx(3, rel=1e-3)
    assert backward.bytes == pytest.approx(5, rel=1e-3)
    assert None not in (forward.instructions, backward.instructions)


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """New processes meet a Triton that fails, as they would a torch whose private parts are elsewhere."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('broken on purpose')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return f"not available on torch {torch.__version__}: ImportError: broken on purpose"


def test_a_process_that_fails_is_one_line(broken):
    report = chains(["kl_normal"], ["fp32", "bf16"])
    assert report.passes == []
    assert report.problems == [broken]


@pytest.mark.skipif(cost.INTERPRETED, reason="interpreted kernels are not compiled")
def test_the_command_prints_that_line_and_ours(broken, capsys):
    assert cost.main(["kl_normal"], ["fp32"], "sm_90", True, None, None) == 0
    printed = capsys.readouterr().out.splitlines()
    assert broken in printed
    assert sum(line.startswith("kl_normal") for line in printed) == 2


@lowers
def test_a_chain_that_cannot_be_traced_leaves_the_others(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import genfast.cases as cases\n"
        "from dataclasses import replace\n"
        "def eager(inputs):\n"
        "    raise RuntimeError('no such chain')\n"
        "first, *rest = cases.cases('bernoulli_nll')\n"
        "cases.CASES = (replace(first, eager=eager), *rest)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = chains(["bernoulli_nll", "bernoulli_nll-uint8"], ["fp32"])
    assert {each.case for each in report.passes} == {"bernoulli_nll-uint8"}
    (line,) = report.problems
    assert line.startswith(f"bernoulli_nll: not available on torch {torch.__version__}: ")
