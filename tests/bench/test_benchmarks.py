"""The benchmarks and the GPU check as a user starts them, at sizes that a CPU does in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from genfast.bench.results import Results

ROOT = Path(__file__).parents[2]
KL = "benchmarks/bench_kl_normal.py"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    # As on a machine that has no installation, and one thread: two would wait for each other on a busy machine.
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A worker of pytest-xdist has variables that would make workers of the processes below: these time nothing.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    env = {**own, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def benchmark(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, **environment)


def test_the_figures_of_a_run_land_in_the_machines_file(tmp_path):
    small = [KL, "--benchmark-only", "-k", "128x20 and fp32", f"--results={tmp_path / 'results'}"]
    done = benchmark(*small, "--chains=fused,eager", "--places=all", f"--benchmark-json={tmp_path / 'plugin.json'}")
    assert done.returncode == 0, done.stdout
    assert "benchmark 'kl_normal 128x20 fp32 forward alone on cpu': 2 tests" in done.stdout
    (path,) = (tmp_path / "results").iterdir()
    results = Results.load(path)
    assert path.name == results.file_name
    assert results.kind == "cpu"
    assert {(row.mode, row.place, row.chain) for row in results.rows} == {
        (mode, place, chain)
        for mode in ("forward", "forward+backward") for place in ("alone", "between") for chain in ("fused", "eager")
    }  # fmt: skip
    assert results.runs[0]["copy_bandwidth"] > 1e8
    for row in results.rows:
        assert 1e-6 < row.time.low <= row.time.median <= row.time.high < 0.1
        assert row.path == "reference"
        assert (row.error is not None) == (row.chain == "fused")
    # pytest-benchmark shows the same time, and the rest beside it.
    told = json.loads((tmp_path / "plugin.json").read_text())["benchmarks"]
    medians = {(row.mode, row.place, row.chain): row.time.median for row in results.rows}
    for entry in told:
        info = entry["extra_info"]
        ours = medians[info["mode"], info["place"], info["chain"]]
        assert entry["stats"]["median"] == pytest.approx(ours, rel=1e-3)
        assert info["GB/s"] == pytest.approx(info["bytes"] / entry["stats"]["median"] / 1e9, rel=1e-2)
        assert {"copy_share", "torch", "triton", "inductor", "threads", "peak_bytes"} <= info.keys()

    again = benchmark(*small, "--chains=fused,eager")
    assert again.returncode == 0, again.stdout
    merged = Results.load(path)
    assert len(merged.rows) == len(results.rows)
    assert len(merged.runs) == 2


def test_what_is_wrong_gets_no_time(tmp_path):
    """Every chain of the case fails when the fused op misses fp64."""
    (tmp_path / "conftest.py").write_text(
        "import genfast.cases as cases\n"
        "from dataclasses import replace\n"
        "def wrong(case):\n"
        "    return replace(case, fused=lambda inputs: tuple(out * 1.001 for out in case.fused(inputs)))\n"
        "cases.CASES = tuple(map(wrong, cases.CASES))\n"
    )
    done = benchmark(
        "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}", str(tmp_path), KL, "--benchmark-only",
        "--chains=fused,eager", "-k", "128x20 and fp32", f"--results={tmp_path / 'results'}",
    )  # fmt: skip
    assert done.returncode == 1
    assert "4 failed" in done.stdout
    assert "no time: the error of fused kl_normal is" in done.stdout
    assert list((tmp_path / "results").iterdir()) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--chains=fast", "--chains: expected all, or some of fused, fused-compiled, eager"),
        ("--places=above", "--places: expected all, or some of alone, between, got above"),
        ("--results=tests/conftest.py/x", "--results: "),
        ("--results=benchmarks/kernel_costs.json", "no results file of genfast"),
    ],
)
def test_bad_options_are_told_before_anything_is_measured(option, message):
    done = benchmark(KL, option)
    assert done.returncode == 4
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> Path:
    """Three of the four parts in a dry run (--train trains, and takes minutes)."""
    out = tmp_path_factory.mktemp("check")
    parts = ["--tests", "--sanitize", "--bench", "kl_normal", "--dry-run", "--out", str(out)]
    done = run("bash", "scripts/gpu_check.sh", *parts, PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (out / "printed").write_text(done.stdout)
    return out


@pytest.mark.parametrize(
    ("part", "steps"),
    [
        ("tests", ["noise, GPU against CPU", "bits of run 1", "bits of run 2", "full sizes", "op matrix"]),
        ("sanitize", ["every op, without the tool"]),
        ("bench", ["kl_normal: times"]),
    ],
)
def test_every_part_of_the_gpu_check_runs_dry(checked, part, steps):
    (path,) = checked.glob(f"*-{part}.json")
    told = json.loads(path.read_text())
    found = {step["name"]: step for step in told["steps"]}
    for name in steps:
        assert found[name]["outcome"] == "ok", found[name]
    if part == "tests":
        assert found["op matrix"]["figures"]["passed"] > 10
        assert found["full sizes"]["figures"]["passed"] > 10
        assert found["noise, GPU against CPU"]["figures"]["uniforms_equal"] is True
        assert found["bits of run 1"]["figures"] == found["bits of run 2"]["figures"] != {}
    assert path.with_suffix(".log").stat().st_size > 0
    assert f"\n{part} on {told['machine']}" in (checked / "printed").read_text()


def test_the_benchmarks_of_the_gpu_check_are_results(checked):
    parts = {"tests", "sanitize", "bench"}
    (path,) = (path for path in checked.glob("*.json") if path.stem.rsplit("-", 1)[-1] not in parts)
    rows = Results.load(path).rows
    assert {row.chain for row in rows} >= {"fused", "fused-compiled", "eager", "compiled", "reference"}
    assert {row.place for row in rows} == {"alone", "between"}


def test_a_run_is_resumed_where_it_stopped(tmp_path):
    small = [KL, "--benchmark-only", "-k", "128x20 and fp32", f"--results={tmp_path}", "--chains=fused,eager"]
    assert "4 passed" in benchmark(*small).stdout
    assert "4 skipped" in benchmark(*small, "--resume").stdout
    # One chain more, and the group is measured anew: its chains are of one run.
    assert "6 passed" in benchmark(*small[:-1], "--chains=fused,eager,reference", "--resume").stdout


def test_without_a_gpu_the_check_says_so():
    done = run("bash", "scripts/gpu_check.sh", "--tests", PYTHON=sys.executable)
    assert done.returncode == 2
    assert "no CUDA device: --dry-run does the same" in done.stdout
