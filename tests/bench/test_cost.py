"""What kernels cost: the comparison with the agreed table, its files, and the command from end to end."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from genfast._environment import INTERPRETED
from genfast._files import between_markers
from genfast.bench import cost
from genfast.bench.cost import Row, as_table, compare
from genfast.cases import DTYPES
from genfast.offline import every_launch

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks" / "kernel_costs.json"
ROW = Row("kl_normal", "fp32", "sm_90", "3.9.0", 33.5, 68, 0, {128: 16, 32: 1}, 16)
OTHER = replace(ROW, name="kl_normal backward", dtype="bf16")

has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
compiles = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")


def test_floors_are_those_of_the_data_sheet():
    """By hand: 12 bytes at 4.3 TB/s; 45.5 of 132 x 128 instructions at each of 1.98e9 clocks a second."""
    row = replace(ROW, instructions=45.5, bytes=12)
    assert row.memory_floor == pytest.approx(12 / 4.3)
    assert row.issue_floor == pytest.approx(45.5e12 / 33_454_080_000_000)
    assert (row.floor, row.limit) == (row.memory_floor, "memory")
    # 7.8 instructions take the time of a byte.
    assert replace(row, instructions=12 * 7.7).limit == "memory"
    assert replace(row, instructions=12 * 7.9).limit == "issue"


def test_up_to_3_percent_more_instructions_are_agreed():
    agreed = as_table([ROW, OTHER])
    assert compare([ROW, OTHER], agreed) == []
    assert compare([replace(ROW, instructions=33.5 * 1.029), OTHER], agreed) == []
    assert compare([replace(ROW, instructions=20.0, registers=255), OTHER], agreed) == []


@pytest.mark.parametrize(
    ("rows", "problems"),
    [
        (
            [replace(ROW, instructions=33.5 * 1.04), OTHER],
            ["fp32 kl_normal: 34.84 instructions per element, agreed 33.50 (+4.0%)"],
        ),
        ([replace(ROW, spills=2), OTHER], ["fp32 kl_normal: 2 spills"]),
        ([replace(ROW, bytes=20), OTHER], ["fp32 kl_normal: 20 bytes per element, agreed 16"]),
        ([ROW], ["bf16 kl_normal backward: in the table, but not counted"]),
        ([ROW, OTHER, replace(ROW, name="new")], ["fp32 new: not in the table"]),
        ([ROW, OTHER, replace(ROW, dtype="fp16")], ["fp16 kl_normal: not in the table"]),
        (
            [replace(row, triton="3.10.0", instructions=99.0) for row in (ROW, OTHER)],
            ["triton: the table holds for 3.9.0, this is 3.10.0"],
        ),
        (
            [replace(row, target="sm_100") for row in (ROW, OTHER)],
            ["target: the table holds for sm_90, this is sm_100"],
        ),
    ],
    ids=["instructions", "spills", "bytes", "gone", "new", "new dtype", "triton", "target"],
)
def test_anything_else_is_a_problem(rows, problems):
    assert compare(rows, as_table([ROW, OTHER])) == problems


@has_triton
def test_the_agreed_table_names_every_kernel_without_spills():
    agreed = json.loads(TABLE.read_text())
    assert agreed["target"] == "sm_90"
    for name, dtype in DTYPES.items():
        kernels = every_launch(dtype)
        assert list(agreed["kernels"][name]) == list(kernels)
        for kernel, figures in agreed["kernels"][name].items():
            assert (figures["bytes"], figures["spills"]) == (kernels[kernel].bytes, 0)


def test_the_page_shows_the_agreed_table():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    agreed = json.loads(TABLE.read_text())
    assert between_markers(page, cost.START, "", cost.END) != page
    assert between_markers(page, cost.START, cost.markdown(agreed), cost.END) == page


def test_saved_tables_load_as_they_were_and_fill_the_page_beside_them(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("# Before\n<!-- costs -->\nold\n<!-- /costs -->\nafter\n")
    path = tmp_path / "costs.json"
    assert cost.save([ROW, OTHER], path) == [path, page]
    assert json.loads(path.read_text()) == as_table([ROW, OTHER])
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-2:]) == ("# Before", ["<!-- /costs -->", "after"])
    assert "| kl_normal | 33.5 | 16 | 3.72 | memory |  |  |  |  |" in lines
    assert "old" not in lines
    page.write_text("no markers\n")
    assert cost.save([ROW], path) == [path]
    assert page.read_text() == "no markers\n"


def test_times_are_shown_for_the_gpu_that_they_are_of():
    assert "bound by" in cost.table([ROW])
    assert "bound by" not in cost.table([replace(ROW, target="sm_100")])


@has_triton
@compiles
def test_the_command_checks_and_writes(tmp_path, capsys):
    rows = cost.costs(["kl_normal"], ["bf16"])
    assert [row.name for row in rows] == ["kl_normal", "kl_normal backward"]
    path = tmp_path / "costs.json"
    cost.save([*rows, replace(rows[0], name="another_op"), replace(rows[0], dtype="fp32")], path)
    assert cost.main(["kl_normal"], ["bf16"], "sm_90", False, path, None) == 0
    printed = capsys.readouterr().out
    assert cost.table(rows) in printed
    assert f"no more than 3% above {path}" in printed
    agreed = json.loads(path.read_text())
    agreed["kernels"]["bf16"]["kl_normal backward"]["instructions"] /= 1.04
    path.write_text(json.dumps(agreed))
    assert cost.main(["kl_normal"], ["bf16"], "sm_90", False, path, None) == 1
    assert "NOT AS AGREED: bf16 kl_normal backward: " in capsys.readouterr().out


@has_triton
@compiles
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((["kl"], [], "sm_90", False, None, None), "ops: expected one of reparameterize_kl, .*philox, got 'kl'"),
        (([], ["fp8"], "sm_90", False, None, None), "dtypes: expected one of fp32, bf16, fp16, got 'fp8'"),
        ((["philox"], ["bf16"], "sm_90", False, None, None), "dtypes: expected fp32, the only one of philox, got bf16"),
        (([], [], "gfx942", False, None, None), "target: expected one of sm_80, sm_90, sm_100, got 'gfx942'"),
        (([], ["bf16"], "sm_90", False, None, Path("x")), "write: expected every op and dtype"),
        (([], [], "sm_90", False, ROOT / "pyproject.toml", None), "check: expected a table as --write writes it"),
    ],
)
def test_mistakes_in_the_arguments(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        cost.main(*arguments)


@pytest.mark.parametrize(("name", "value"), [("HAS_TRITON", False), ("INTERPRETED", True)])
def test_without_a_compiler_it_says_so(name, value, monkeypatch):
    monkeypatch.setattr(cost, name, value)
    with pytest.raises(ValueError, match=r"^(triton|TRITON_INTERPRET): expected to be (installed|unset)"):
        cost.costs()
