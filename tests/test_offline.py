"""What the kernels compile to, without a GPU: no spill, no narrow access, the traffic that was designed.

That their instructions stay as agreed is checked by `genfast bench cost --check`, which CI runs.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from genfast.cases import DTYPES
from genfast.functional._register import INTERPRETED
from genfast.offline import TARGETS, _executed, compile_launch, cost, every_launch

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
ROOT = Path(__file__).parents[1]
AGREED = json.loads((ROOT / "benchmarks" / "kernel_costs.json").read_text())
# A dtype for each target: compiling all of both takes many minutes, and `genfast bench cost` has all dtypes on sm_90.
NVIDIA = zip((name for name, (backend, *_) in TARGETS.items() if backend == "cuda"), DTYPES, strict=True)


@pytest.mark.parametrize(("target", "dtype"), NVIDIA)
def test_no_spills_and_16_byte_accesses(target, dtype):
    from genfast.kernels.launch import WARPS

    for name, kernel in every_launch(DTYPES[dtype]).items():
        counted = cost(kernel.launch, target)
        assert counted.spills == 0, f"{name}: {counted}"
        narrow = sum(count for bits, count in counted.widths.items() if bits < 128)
        assert narrow <= kernel.scalars, f"{name}: {counted}"
        # The wide accesses are those of the tile, so they are what the kernel was designed to move.
        moved = sum(bits // 8 * count for bits, count in counted.widths.items() if bits >= 128)
        assert moved * 32 * WARPS / kernel.launch.elements == kernel.bytes, f"{name}: {counted}"


@pytest.mark.parametrize("dtype", ["bf16"])
def test_rocm_takes_the_portable_branch(dtype):
    """Compiles without a word; inline PTX would not."""
    for name, kernel in every_launch(DTYPES[dtype]).items():
        compiled, printed = compile_launch(kernel.launch, "gfx942")
        assert not printed, f"{name}: {printed}"
        assert len(compiled.asm["hsaco"]) > 0


def test_narrow_rows_stay_as_wide_as_their_length_allows():
    """20 bf16 are 40 bytes: every row starts on 8 bytes, so accesses have 64 bits, and not fewer."""
    kernel = every_launch(torch.bfloat16, (128, 20))["reparameterize_kl"]
    widths = cost(kernel.launch).widths
    assert sum(count for bits, count in widths.items() if bits < 64) <= kernel.scalars - 1, widths


def test_the_forward_pass_in_16_bits_is_not_bound_by_instructions():
    import triton

    if triton.__version__ != AGREED["triton"]:
        pytest.skip(f"the ceiling holds for triton {AGREED['triton']}, this is {triton.__version__}")
    assert cost(every_launch(torch.bfloat16)["reparameterize_kl"].launch).instructions <= 44


def test_the_path_goes_round_a_loop_once_and_past_slow_paths():
    sass = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   BSSY B0, 0x60 ;
        /*0030*/               @!P0 BRA 0x50 ;
        /*0040*/                   DMUL R4, R4, R4 ;
        /*0050*/                   BSYNC B0 ;
        /*0060*/                   NOP ;
        /*0070*/                   FADD R4, R4, R5 ;
        /*0080*/               @P1 BRA 0x10 ;
        /*0090*/                   STG.E.U16 [R2.64], R4 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0 ;
    """
    opcodes, loops = _executed(sass)
    assert opcodes == ["MOV", "LDG.E.128", "BSSY", "BRA", "BSYNC", "FADD", "BRA", "STG.E.U16", "EXIT"]
    assert [opcodes[loop] for loop in loops] == [["LDG.E.128", "BSSY", "BRA", "BSYNC", "FADD", "BRA"]]


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
