"""Results files: written whole, merged by group, compared beyond noise, and shown in the README as they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from genfast.bench import results as measured
from genfast.bench.results import Results, Row, compare, headline, in_page, load_all, markdown, ratio
from genfast.bench.timing import Interval

ROOT = Path(__file__).parents[2]
RUN = {"copy_bandwidth": 4.3e12, "torch": "2.11.0", "triton": "3.6.0", "driver": "580", "threads": 16}


def interval(median: float, spread: float = 0.01) -> Interval:
    return Interval(median, median * (1 - spread), median * (1 + spread), 50)


def row(chain: str, seconds: float, spread: float = 0.01, **other) -> Row:
    of_row = {
        "op": "kl_normal", "case": "kl_normal", "shape": (65536, 1024), "dtype": "bf16", "mode": "forward+backward",
        "place": "alone", "bytes": 10**9, "copy_share": 0.5,
    }  # fmt: skip
    return Row(**{**of_row, **other}, chain=chain, time=interval(seconds, spread))


def gpu(*rows: Row, machine: str = "NVIDIA H200", **run) -> Results:
    return Results(machine, "cuda", [{**RUN, **run}], list(rows))


def test_a_file_holds_all_that_was_put_in(tmp_path):
    times = {name: Interval(1.234e-4, 1.2e-4, 1.3e-4, 50) for name in ("time", "graph", "host")}
    full = replace(row("fused", 1.0), **times, peak_bytes=2**30, error=0.25, path="triton", load=1.5)
    refused = replace(row("reduce-overhead", 1.0), time=times["time"], no_graph="not permitted when capturing")
    before = gpu(full, refused)
    before.save(tmp_path / before.file_name)
    after = Results.load(tmp_path / "nvidia-h200.json")
    assert after.rows == before.rows
    assert after.runs == before.runs
    assert [path.name for path in tmp_path.iterdir()] == ["nvidia-h200.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no results file of genfast"),
        ("{", "no results file of genfast"),
        ('{"format": 99, "rows": []}', "expected results of format 1, got 99"),
        ('{"format": 1, "machine": "x", "kind": "cpu", "runs": []}', "rows"),
        ('{"format": 1, "machine": "x", "kind": "cpu", "runs": [{}], "rows": []}', "copy_bandwidth"),
        ('{"format": 1, "machine": "x", "kind": "cpu", "runs": [], "rows": [{"time": [0, 0, 0, 1]}]}', "times that"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Results.load(tmp_path / "bad.json")


def test_a_group_that_is_measured_anew_is_replaced_whole():
    """The chains of one group come from one run, or their ratio would compare two days."""
    old = gpu(row("fused", 1.0), row("eager", 2.0), row("fused", 5.0, dtype="fp32"), torch="old")
    old.merge(gpu(row("fused", 0.5), torch="new"))
    found = {(r.dtype, r.chain): (r.time.median, old.runs[r.run]["torch"]) for r in old.rows}
    assert found == {("bf16", "fused"): (0.5, "new"), ("fp32", "fused"): (5.0, "old")}
    old.merge(gpu(row("fused", 0.25), row("fused", 0.75, dtype="fp32"), torch="newest"))
    assert [run["torch"] for run in old.runs] == ["newest"]
    with pytest.raises(ValueError, match="expected results of NVIDIA H200, got A100"):
        old.merge(gpu(machine="A100"))


def test_what_is_called_a_tie():
    assert str(ratio(interval(1.02), interval(1.0))) == "tie, 1.02x"
    assert str(ratio(interval(1.5), interval(1.0))) == "1.50x"
    assert str(ratio(interval(0.5), interval(1.0))) == "0.50x"
    assert str(ratio(interval(1.2, 0.2), interval(1.0, 0.2))) == "1.20x [0.80, 1.80]"
    assert str(ratio(interval(53.0), interval(1.0))) == "53x"


def verdicts(old: Results, new: Results) -> list[str]:
    return [change.verdict for change in compare(old, new)]


def test_a_regression_is_what_got_slower_beyond_noise():
    before = gpu(row("fused", 1.0), row("eager", 4.0))
    assert verdicts(before, gpu(row("fused", 1.0), row("eager", 4.0))) == [""]
    assert verdicts(before, gpu(row("fused", 1.2), row("eager", 4.0))) == ["slower"]
    assert verdicts(before, gpu(row("fused", 0.8), row("eager", 4.0))) == ["faster"]
    # The intervals of the two runs touch.
    noisy = gpu(row("fused", 1.2, spread=0.2), row("eager", 4.0))
    assert verdicts(before, noisy) == [""]


def test_a_slower_machine_or_a_faster_baseline_is_no_regression():
    before = gpu(row("fused", 1.0), row("eager", 4.0))
    assert verdicts(before, gpu(row("fused", 1.5), row("eager", 6.0))) == [""]
    assert verdicts(before, gpu(row("fused", 1.0), row("eager", 2.0))) == [""]
    other = gpu(row("fused", 3.0), row("eager", 12.0), machine="A100")
    assert verdicts(before, other) == [""]
    assert verdicts(before, gpu(row("fused", 3.0), row("eager", 6.0), machine="A100")) == ["slower"]


def test_a_comparison_names_both_machines_and_the_ratio():
    before, after = gpu(row("fused", 1.0), row("eager", 4.0)), gpu(row("fused", 3.0), row("eager", 6.0), machine="A100")
    text = measured.describe_changes(before, after, compare(before, after))
    assert "old: NVIDIA H200" in text
    assert "new: A100" in text
    assert "slower  kl_normal 65536 x 1024 bf16 forward+backward alone fused: time 3.000x" in text
    assert "relative to eager 2.000x" in text
    with pytest.raises(ValueError, match="expected fused chains in common"):
        compare(before, gpu(row("fused", 1.0, dtype="fp16"), row("eager", 1.0, dtype="fp16")))


def test_each_figure_is_judged():
    """A host that got slower hides behind the same device time."""

    def host(seconds: float) -> Results:
        fused, eager = (replace(row(chain, 1.0), host=interval(4.0)) for chain in ("fused", "eager"))
        return gpu(replace(fused, host=interval(seconds)), eager)

    assert [(change.figure, change.verdict) for change in compare(host(1.0), host(1.2))] == [
        ("time", ""), ("host", "slower"),
    ]  # fmt: skip


def test_without_a_gpu_the_table_says_not_measured():
    table = headline([])
    cells = [cell.strip() for line in table.splitlines()[2:] for cell in line.strip("|").split("|")[1:-1]]
    assert set(cells) == {"not measured"}
    cpu = Results("CPU", "cpu", [RUN], [row("fused", 1.0), row("eager", 0.5)])
    lines = headline([cpu]).splitlines()
    assert sum("not measured" in line for line in lines) == 1
    assert "| KL of two Gaussians | 65536 x 1024 bf16 | 1 s | 50% | 0.50x |  | CPU |" in lines


def test_of_a_gpu_only_what_is_missing_is_called_not_measured():
    results = gpu(row("fused", 1e-4), row("eager", 4e-4), row("compiled", 1.7e-4))
    table = headline([results])
    assert [line for line in table.splitlines() if "KL of two" in line and "not measured" in line] == []
    assert sum("not measured" in line for line in table.splitlines()) == len(measured._HEADLINES) - 1
    assert "| KL of two Gaussians | 65536 x 1024 bf16 | 100 us | 50% | 4.00x | 1.70x | GPU |" in table.splitlines()


def test_every_figure_is_in_the_long_table():
    results = gpu(
        row("fused", 1e-4), row("eager", 4e-4), row("fused-compiled", 1e-4), row("compiled", 1.5e-4),
        row("fused", 2e-4, place="between"), row("eager", 3e-4, place="between"),
        row("own", 1.0, op="tutorial", case="epoch", mode="", place="", bytes=None, copy_share=None),
        row("swapped", 0.5, op="tutorial", case="epoch", mode="", place="", bytes=None, copy_share=None),
    )  # fmt: skip
    text = markdown([results])
    assert "4.00x | 1.50x | 1.50x |" in text
    assert "### kl_normal, between a producer and a consumer" in text
    assert "| epoch | 65536 x 1024 | bf16 | swapped | 500 ms | 2.00x |" in text
    assert markdown([]) == "not measured\n"


def test_the_readme_shows_the_results():
    """`genfast bench report --page README.md` writes it."""
    page = (ROOT / "README.md").read_text()
    assert in_page(page, headline(load_all(ROOT / "benchmarks" / "results"))) == page


def test_committed_results_tell_what_they_depend_on():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        results = Results.load(path)
        assert path.name == results.file_name
        for run in results.runs:
            assert {"date", "copy_bandwidth", "torch", "triton", "inductor"} <= run.keys()
        # What is wrong has no time.
        assert all(row.error is None or row.error <= 1 for row in results.rows)
        assert json.loads(path.read_text())["format"] == measured.FORMAT


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="page: expected the markers"):
        in_page("no markers", "table")
