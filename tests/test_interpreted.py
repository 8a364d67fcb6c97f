"""The kernels on the CPU: Triton decides when it is imported whether it interprets, so pytest is started anew."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from genfast.functional._register import INTERPRETED

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(INTERPRETED, reason="this is the run that the test below starts")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "part", ["reparameterize_kl.py", "reparameterize_kl_packed.py", "kl_normal.py", "bernoulli_nll.py", "philox_kernel.py"]
)
def test_kernels_under_the_interpreter(part):
    folder = "tests" if part.startswith("philox") else "tests/functional"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{folder}/test_{part}"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 10
