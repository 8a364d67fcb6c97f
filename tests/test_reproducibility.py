"""The table of docs/reproducibility.md holds, here and now; torch's columns too."""

import pytest

from tests import reproducibility
from tests.reproducibility import EXACT, NOT_MEASURED, WITH

PAGE = reproducibility.ROOT / "docs" / "reproducibility.md"
# Where torch.randn is called for multiples of 16 numbers, splitting a batch changes nothing on a CPU.
TORCH_AGREES = {"batches of 8, not 64", "4 x 32 rows, not 1 x 128"}
# Figures other than rounding follow from the noise; machines differ in the rounding that training magnifies.
ORDER_OF_MAGNITUDE = 10


@pytest.fixture(scope="module")
def rows():
    return reproducibility.measure()


@pytest.fixture(scope="module")
def page():
    return reproducibility.read(PAGE.read_text())


def test_the_way_it_runs_changes_rounding_at_most(rows):
    for row in rows:
        if row.genfast is not None:
            assert row.genfast.compared <= (0 if row.exact else row.kind.bound), row


def test_the_page_has_the_rows_that_are_measured(rows, page):
    assert list(page) == [(row.case, row.kind.name) for row in rows]
    for row in rows:
        assert page[row.case, row.kind.name][2].partition(WITH)[2] == (row.other[0] if row.other else "")


def test_the_page_says_what_is_measured(rows, page):
    for row in rows:
        figures = (row.genfast, row.torch, *([row.other[1]] if row.other else []))
        # A row without another way has two figures.
        for cell, figure in zip(page[row.case, row.kind.name], figures, strict=False):
            if figure is not None and not cell.startswith(NOT_MEASURED):
                assert agrees(cell, figure.compared, row.kind.bound), (row, cell)


def agrees(cell, measured, bound):
    """Nothing where the page says so, rounding where it shows rounding, else a difference of the same order."""
    if cell.startswith(EXACT):
        return measured == 0
    shown = reproducibility.compared(cell)
    if shown <= bound:
        return measured <= bound
    return measured > bound and shown / ORDER_OF_MAGNITUDE <= measured <= shown * ORDER_OF_MAGNITUDE


def test_genfast_claims_no_more_than_rounding_and_zero_where_it_is_zero(rows, page):
    for row in rows:
        cell = page[row.case, row.kind.name][0]
        if cell != NOT_MEASURED:
            assert cell != EXACT or row.exact
            assert reproducibility.compared(cell) <= (0 if row.exact else row.kind.bound)


def test_torch_differs_but_where_its_noise_agrees(rows):
    """Else the comparison would be with a straw man, or with nothing."""
    for row in rows:
        if row.torch is not None and not row.case.startswith(("one CUDA graph", "on a GPU")):
            assert (row.torch.compared <= row.kind.bound) == (row.case in TORCH_AGREES), row


def test_torch_can_be_helped_where_the_page_says_so(rows):
    sampler = "`DistributedSampler` on 1 as well"
    helped = {"`randn` for all, sliced", sampler, "`get_rng_state()` saved", "`fallback_random`"}
    others = [row for row in rows if row.other and row.other[0] in helped]
    assert {row.other[0] for row in others} == helped
    for row in others:
        assert row.other[1].compared <= row.kind.bound, row


def test_figures_are_read_as_they_are_written():
    for figure, text in (
        (reproducibility.Figure(1.5e-5, 1.1e-7), 1.1e-7),
        (reproducibility.Figure(3.2e-4), 3.2e-4),
        (reproducibility.Figure(0.0), 0.0),
    ):
        row = reproducibility.Row("case", reproducibility.LOSSES, figure, other=("a way (of three)", figure))
        [cells] = reproducibility.read(reproducibility.START + reproducibility.markdown([row])).values()
        assert [reproducibility.compared(cells[0]), reproducibility.compared(cells[2])] == [text, text]
