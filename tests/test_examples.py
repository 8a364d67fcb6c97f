"""The scripts of examples/ run as they are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _run(script: str, *arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_tutorial_script_trains_with_the_swapped_model():
    losses = [float(value) for value in re.findall(r"epoch \d+: ([\d.]+)", _run("tutorial_vae.py", "--epochs", "3"))]
    assert len(losses) == 3
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 200


def test_the_script_of_diffusers_trains_with_either_loss():
    toy = ("--steps", "30", "--batch-size", "8", "--channels", "8", "--inference-steps", "2")
    for options in ((), ("--ours",)):
        printed = _run("diffusers_training_script.py", *toy, *options)
        first, *_, last = (float(value) for value in re.findall(r"step \d+: ([\d.]+)", printed))
        assert last < 0.8 * first < 0.9
        assert "16 samples between" in printed


def test_a_flow_learns_two_moons(tmp_path):
    printed = _run("two_moons.py", "--steps", "60", "--out", str(tmp_path / "moons.png"))
    # What a Gaussian of the same mean and covariance gets is about 1.9 nats.
    nats, error = re.search(r"test: ([\d.]+) nats; the inverse is off by at most (\S+)", printed).groups()
    assert float(nats) < 1.8
    assert float(error) < 1e-3
    assert (tmp_path / "moons.png").stat().st_size > 10_000


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    printed = _run("own_network.py", "--steps", "60")
    assert float(re.search(r"difference (\S+)", printed)[1]) < 1e-5
    first, last = re.findall(r"step \d+: ([\d.]+)", printed)
    assert float(last) < float(first) < 540
