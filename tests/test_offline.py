"""What the kernels compile to, without a GPU: no spill, no narrow access, no more instructions than were agreed.

tests/kernel_costs.json holds the agreed figures; `python scripts/kernel_costs.py` writes them anew.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from genfast.cases import DTYPES
from genfast.functional._register import INTERPRETED
from genfast.offline import TARGETS, compile_launch, cost, every_launch

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
ROOT = Path(__file__).parents[1]
AGREED = json.loads(Path(__file__).with_name("kernel_costs.json").read_text())
NVIDIA = [name for name, (backend, *_) in TARGETS.items() if backend == "cuda"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", NVIDIA)
def test_no_spills_and_16_byte_accesses(dtype, target):
    for name, (launch, scalars) in every_launch(DTYPES[dtype]).items():
        counted = cost(launch, target)
        assert counted.spills == 0, f"{name}: {counted}"
        narrow = sum(count for bits, count in counted.widths.items() if bits < 128)
        assert narrow <= scalars, f"{name}: {counted}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rocm_takes_the_portable_branch(dtype):
    """Compiles without a word; inline PTX would not."""
    for name, (launch, _) in every_launch(DTYPES[dtype]).items():
        compiled, printed = compile_launch(launch, "gfx942")
        assert not printed, f"{name}: {printed}"
        assert len(compiled.asm["hsaco"]) > 0


def test_narrow_rows_stay_as_wide_as_their_length_allows():
    """20 bf16 are 40 bytes: every row starts on 8 bytes, so accesses have 64 bits, and not fewer."""
    launch, scalars = every_launch(torch.bfloat16, (128, 20))["reparameterize_kl"]
    widths = cost(launch).widths
    assert sum(count for bits, count in widths.items() if bits < 64) <= scalars - 1, widths


def test_instructions_are_within_the_agreed_table():
    """3% of slack, at the version of Triton that the table was made with; other versions schedule differently."""
    import triton

    if triton.__version__ != AGREED["triton"]:
        pytest.skip(f"the table holds for triton {AGREED['triton']}, this is {triton.__version__}")
    for dtype in DTYPES:
        for name, (launch, _) in every_launch(DTYPES[dtype]).items():
            counted = cost(launch).instructions
            print(f"{dtype} {name}: {counted:.1f} instructions per element")
            agreed = AGREED["instructions per element, sm_90"][dtype][name]
            assert counted <= 1.03 * agreed, f"{name} in {dtype}: {counted:.2f}, agreed {agreed:.2f}"


def test_the_forward_pass_in_16_bits_is_not_bound_by_instructions():
    import triton

    if triton.__version__ != AGREED["triton"]:
        pytest.skip(f"the ceiling holds for triton {AGREED['triton']}, this is {triton.__version__}")
    launch, _ = every_launch(torch.bfloat16)["reparameterize_kl"]
    assert cost(launch).instructions <= 44


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last_is_read_as_vectors(size, dtype):
    """A tile spans the channels, which are neighbours in memory: the data never come one element at a time."""
    from genfast.kernels import reparameterize_kl_packed
    from genfast.offline import recorded

    def last(channels):
        return torch.empty(8, size, size, channels, dtype=dtype, device="meta").permute(0, 3, 1, 2)

    seed, rows = torch.empty(1, dtype=torch.int64, device="meta"), torch.empty(8, device="meta")
    options = (seed, None, 0, 0.0, None)
    for call in (
        lambda: reparameterize_kl_packed.forward(last(8), *options),
        lambda: reparameterize_kl_packed.backward(last(8), *options, last(4), rows),
    ):
        (launch,) = recorded(call)
        counted = cost(launch)
        assert counted.spills == 0, counted
        narrow = sum(count for bits, count in counted.widths.items() if bits < 4 * dtype.itemsize * 8)
        assert narrow <= 6, f"{launch.name}: {counted}"


def test_the_readme_shows_the_agreed_table():
    spec = importlib.util.spec_from_file_location("kernel_costs", ROOT / "scripts" / "kernel_costs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    table = script.markdown(AGREED["instructions per element, sm_90"], AGREED["triton"])
    assert script.in_readme(table) == (ROOT / "README.md").read_text()
