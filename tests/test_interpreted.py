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
PARTS = [*sorted(ROOT.glob("tests/functional/test_*.py")), ROOT / "tests" / "test_philox_kernel.py"]


@pytest.mark.skipif(INTERPRETED, reason="this is the run that the test below starts")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.stem)
def test_kernels_under_the_interpreter(part):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(part)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 10
