"""What a kernel costs, read off machine code that is compiled without a GPU.

`recorded` collects the launches that an op would make, `compile_launch` compiles one for a target, `disassemble` finds
its fall-through path, and `cost` counts the instructions on it. Needs Triton, whose package carries the assembler and
the disassembler.
"""

from __future__ import annotations

import collections
import contextlib
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# (backend, architecture, lanes of a warp)
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One kernel with the arguments it would be started with."""

    kernel: Any
    args: tuple
    constexprs: dict[str, Any]

    @property
    def name(self) -> str:
        """Module and function, as in ``reparameterize_kl._forward``."""
        return f"{self.kernel.__module__.rsplit('.', 1)[-1]}.{self.kernel.__name__}"

    @property
    def elements(self) -> int:
        """Elements of one tile."""
        return self.constexprs.get("R", 1) * self.constexprs["C"]

    @property
    def rounds(self) -> int:
        """How often its innermost loops go round: once for each component of a mixture."""
        return self.constexprs.get("K", 1)


@dataclass(frozen=True)
class Kernel:
    """A kernel of the library, as an op launches it.

    Attributes:
        launch: with meta tensors as arguments.
        scalars: how many of its memory accesses are single numbers rather than parts of the tile (the seed, a row's
            sum, a row's incoming gradient).
        bytes: what each element of the main tensor reads and writes by design; single numbers are not counted.
    """

    launch: Launch
    scalars: int
    bytes: int


@dataclass(frozen=True)
class Code:
    """What one lane executes.

    Attributes:
        opcodes: on the fall-through path, which goes round every loop once.
        loops: where among the opcodes each loop's body lies.
        registers: of a lane.
    """

    opcodes: list[str]
    loops: list[slice]
    registers: int

    def repeated(self, rounds: int) -> Code:
        """The same with every innermost loop gone round `rounds` times; the loops themselves are left out.

        Example:
            >>> Code(["LDG.E", "FADD", "BRA", "EXIT"], [slice(1, 3)], 8).repeated(2).opcodes
            ['LDG.E', 'FADD', 'BRA', 'EXIT', 'FADD', 'BRA']
        """
        starts = [loop.start for loop in self.loops]
        inner = [loop for loop in self.loops if not any(loop.start < start < loop.stop for start in starts)]
        bodies = [opcode for loop in inner for opcode in self.opcodes[loop]]
        return Code(self.opcodes + bodies * (rounds - 1), [], self.registers)

    @property
    def spills(self) -> int:
        """Accesses to the memory that stands in for registers."""
        return sum(opcode.startswith(("LDL", "STL")) for opcode in self.opcodes)

    def widths(self, part: slice = slice(None)) -> dict[int, int]:
        """How many accesses to global memory there are of each width in bits.

        Example:
            >>> Code(["LDG.E.128", "FADD", "STG.E.U16", "EXIT"], [], 8).widths()
            {16: 1, 128: 1}
        """
        accesses = [opcode for opcode in self.opcodes[part] if opcode.startswith(("LDG", "STG"))]
        return dict(sorted(collections.Counter(map(_bits, accesses)).items()))


@dataclass(frozen=True)
class Cost:
    """Per element of the tile: instructions executed by one lane. `widths` counts memory accesses by bits."""

    instructions: float
    registers: int
    spills: int
    widths: dict[int, int]


def recorded(function: Callable[[], Any]) -> list[Launch]:
    """The launches that a function of `genfast.kernels` would make; meta tensors will do as arguments."""
    from genfast.kernels.launch import recording

    with recording() as launches:
        function()
    return [Launch(*launch) for launch in launches]


def every_launch(dtype: torch.dtype, shape: tuple[int, ...] = (8192, 4096)) -> dict[str, Kernel]:
    """Every kernel of the library as it is launched for tensors of `shape` and `dtype`; a name begins with its op's."""
    from genfast.kernels import (
        _rescale,
        affine_coupling,
        bernoulli_nll,
        denoising_loss,
        dequantize_logit,
        forward_noising,
        kl_normal,
        mixture_logistic_coupling,
        philox,
        reparameterize_kl,
        reparameterize_kl_packed,
        reverse_step,
    )  # fmt: skip

    x = torch.empty(shape, dtype=dtype, device="meta")
    h = torch.empty(shape[0], 2 * shape[1], *shape[2:], dtype=dtype, device="meta")
    pixels = torch.empty(shape, dtype=torch.uint8, device="meta")
    single = torch.empty(shape, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    rows = torch.empty(shape[0], device="meta")
    plain, free = (0, 0.0, None), (0, 0.25, [-1.0, 1.0])
    # a and b of a schedule of 1,000 steps, and each row's timestep.
    table = (*torch.empty(2, 1000, device="meta"), torch.empty(shape[0], dtype=torch.int64, device="meta"))
    epsilon, v = (0, "epsilon", "none", 5.0, 1.0), (0, "v", "min_snr", 5.0, 1.0)
    tables = torch.empty(4, 1000, device="meta")
    times = (tables, tables, *(table[2],) * 3)

    def step(eta: float = 1.0, clip: float | None = None, variance: str = "fixed_small") -> tuple:
        return 0, "epsilon", 1.0, eta, clip, variance, True

    def coupling(scale_map: str = "tanh", least: float = 0.0, board: bool = True, inverse: bool = False) -> tuple:
        return scale_map, 2.0, least, False, False, False, False, *[-1] * board, inverse

    learned = step(1.0, 1.0, "learned_range")
    size = dtype.itemsize
    mixed, mixture = 2 + 3 * 32, (32, "tanh", 2.0, -7.0)

    def parts(count: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape[0], count * shape[1], *shape[2:], dtype=of, device="meta")

    # The call, its scalar accesses, its bytes.
    calls = {
        "reparameterize_kl": (lambda: reparameterize_kl.forward(x, x, seed, None, *plain), 2, 3 * size),
        "reparameterize_kl, free bits and clamp": (
            lambda: reparameterize_kl.forward(x, x, seed, None, *free), 2, 3 * size,
        ),
        "reparameterize_kl, given eps": (lambda: reparameterize_kl.forward(x, x, None, x, *plain), 1, 4 * size),
        "reparameterize_kl backward": (
            lambda: reparameterize_kl.backward(x, x, seed, None, *plain, x, rows), 2, 5 * size,
        ),
        "reparameterize_kl backward, free bits and clamp": (
            lambda: reparameterize_kl.backward(x, x, seed, None, *free, x, rows), 2, 5 * size,
        ),
        "reparameterize_kl_packed": (lambda: reparameterize_kl_packed.forward(h, seed, None, *plain), 2, 3 * size),
        "reparameterize_kl_packed backward": (
            lambda: reparameterize_kl_packed.backward(h, seed, None, *plain, x, rows), 2, 5 * size,
        ),
        "kl_normal": (lambda: kl_normal.forward(x, x, x, x), 1, 4 * size),
        "kl_normal backward": (lambda: kl_normal.backward(x, x, x, x, rows), 1, 8 * size),
        "bernoulli_nll": (lambda: bernoulli_nll.forward(x, x), 1, 2 * size),
        "bernoulli_nll, uint8": (lambda: bernoulli_nll.forward(x, pixels), 1, size + 1),
        "bernoulli_nll backward": (lambda: bernoulli_nll.backward(x, x, rows), 1, 3 * size),
        "bernoulli_nll backward, uint8": (lambda: bernoulli_nll.backward(x, pixels, rows), 1, 2 * size + 1),
        "bernoulli_nll with gradient": (lambda: bernoulli_nll.forward_with_grad(x, x, True), 1, 3 * size),
        "bernoulli_nll with gradient, uint8": (
            lambda: bernoulli_nll.forward_with_grad(x, pixels, True), 1, 2 * size + 1,
        ),
        "loss rescale": (lambda: _rescale.rescale(x, rows[0]), 1, 2 * size),
        "forward_noising": (lambda: forward_noising.forward(x, *table, seed, None, 0, dtype), 4, 2 * size),
        "forward_noising, uint8": (
            lambda: forward_noising.forward(pixels, *table, seed, None, 0, dtype), 4, size + 1,
        ),
        "forward_noising, given noise": (lambda: forward_noising.forward(x, *table, None, x, 0, dtype), 3, 3 * size),
        "denoising_loss": (lambda: denoising_loss.forward(x, None, *table, seed, None, *epsilon), 5, size),
        "denoising_loss, v and min-SNR": (lambda: denoising_loss.forward(x, x, *table, seed, None, *v), 5, 2 * size),
        "denoising_loss backward": (
            lambda: denoising_loss.backward(x, None, *table, seed, None, *epsilon, rows), 5, 2 * size,
        ),
        "denoising_loss with gradient": (
            lambda: denoising_loss.forward_with_grad(x, None, *table, seed, None, *epsilon, True), 5, 2 * size,
        ),
        "denoising_loss with gradient, v": (
            lambda: denoising_loss.forward_with_grad(x, x, *table, seed, None, *v, True), 5, 3 * size,
        ),
        "denoising_loss with gradient, v and uint8": (
            lambda: denoising_loss.forward_with_grad(x, pixels, *table, seed, None, *v, True), 5, 2 * size + 1,
        ),
        "reverse_step": (lambda: reverse_step.forward(x, x, *times, seed, None, None, *step(), False), 12, 3 * size),
        "reverse_step, deterministic and clipped": (
            lambda: reverse_step.forward(x, x, *times, None, None, None, *step(0.0, 1.0), False), 10, 3 * size,
        ),
        "reverse_step, learned variance and density": (
            lambda: reverse_step.forward(x, h, *times, seed, None, None, *learned, True), 13, 4 * size,
        ),
        "reverse_step, density of a given x_prev": (
            lambda: reverse_step.forward(x, x, *times, None, None, x, *step(), True), 11, 3 * size,
        ),
        "reverse_step backward": (
            lambda: reverse_step.backward(x, x, *times, seed, None, None, *step(), x, None), 10, 3 * size,
        ),
        "reverse_step backward, learned variance": (
            lambda: reverse_step.backward(x, h, *times, seed, None, None, *learned, x, None), 12, 7 * size,
        ),
        "reverse_step backward, density of a given x_prev": (
            lambda: reverse_step.backward(x, x, *times, None, None, x, *step(), None, rows), 11, 5 * size,
        ),
        "dequantize_logit, given noise": (lambda: dequantize_logit.forward_given(x, pixels, 0.05), 1, size + 5),
        "dequantize_logit backward, given noise": (
            lambda: dequantize_logit.backward_given(x, pixels, 0.05, single, rows), 1, 2 * size + 5,
        ),
        "dequantize_logit inverse": (lambda: dequantize_logit.inverse(x, 0.05), 1, size + 1),
        "affine_coupling": (lambda: affine_coupling.forward(x, h, None, *coupling()), 1, 4 * size),
        "affine_coupling, inverse": (lambda: affine_coupling.forward(x, h, None, *coupling(inverse=True)), 1, 4 * size),
        "affine_coupling, sigmoid": (
            lambda: affine_coupling.forward(x, h, None, *coupling("sigmoid", 1e-3)), 1, 4 * size,
        ),
        "affine_coupling backward": (
            lambda: affine_coupling.backward(x, h, None, *coupling(), x, rows), 1, 6 * size,
        ),
        "affine_coupling backward, atan": (
            lambda: affine_coupling.backward(x, h, None, *coupling("atan"), x, rows), 1, 6 * size,
        ),
        "affine_coupling backward, from the output": (
            lambda: affine_coupling.backward_from_output(x, h, None, *coupling(board=False), x, rows), 1, 8 * size,
        ),
        "mixture_logistic_coupling, 32 components": (
            lambda: mixture_logistic_coupling.forward(x, parts(mixed), *mixture, False, True),
            1, (2 + mixed) * size + 12,
        ),
        # The bracket, one step of Newton's method, and the log-determinant.
        "mixture_logistic_coupling inverse, 32 components": (
            lambda: mixture_logistic_coupling.forward(x, parts(mixed), *mixture, True, False), 1, (4 + 9 * 32) * size,
        ),
        "mixture_logistic_coupling backward, 32 components": (
            lambda: mixture_logistic_coupling.backward(
                x, parts(mixed), parts(3, torch.float32), *mixture, False, x, rows
            ),
            1, (2 + 2 * mixed) * size + 12,
        ),
    }  # fmt: skip
    if dtype == torch.float32:
        # From uint8 to fp32, whatever the model computes in.
        calls["dequantize_logit"] = (lambda: dequantize_logit.forward(pixels, seed, 0, 0.05), 2, 5)
        for kind in ("normal", "uniform"):
            fill = getattr(philox, f"fill_{kind}")
            calls[f"philox {kind}"] = (lambda fill=fill: fill(seed, shape[0], shape[1], 1, 0, seed), 2, size)
    kernels = {}
    for name, (call, scalars, moved) in calls.items():
        (launch,) = recorded(call)
        kernels[name] = Kernel(launch, scalars, moved)
    return kernels


def _typed(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_launch(launch: Launch, target: str) -> tuple[Any, str]:
    """Compile as the JIT would for these arguments; returns the compiled kernel and all that was printed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from genfast.kernels.launch import OPTIONS

    backend, architecture, lanes = TARGETS[target]
    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    aligned: dict[Any, Any] = {}
    for index, name in enumerate(names):
        value = launch.args[index] if index < len(launch.args) else launch.constexprs.get(name, backend == "cuda")
        # The JIT makes a constant of an integer 1, and knows which integers are multiples of 16.
        if index >= len(launch.args) or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name] = _typed(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), _stderr_of_libraries(printed):
        compiled = triton.compile(source, target=GPUTarget(backend, architecture, lanes), options=OPTIONS)
    return compiled, printed.getvalue()


@contextlib.contextmanager
def _stderr_of_libraries(sink: io.StringIO):
    """Also catch what the C++ side of the compiler writes to file descriptor 2."""
    with tempfile.TemporaryFile(mode="w+") as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            sink.write(file.read())


def disassemble(compiled: Any) -> Code:
    """The path through a compiled CUDA kernel."""
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = subprocess.run([tool, "-sass", "-res-usage", file.name], capture_output=True, text=True, check=True)
    printed = run.stdout + run.stderr
    opcodes, loops = _executed(printed)
    return Code(opcodes, loops, int(re.search(r"REG:(\d+)", printed)[1]))


def _executed(sass: str) -> tuple[list[str], list[slice]]:
    """Opcodes on the fall-through path: slow paths, which branch away or hide in BSSY regions, are left out."""
    code = [(int(m[1], 16), m[2], m[3], m[4]) for m in map(_INSTRUCTION.match, sass.splitlines()) if m]
    at = {address: index for index, (address, *_) in enumerate(code)}
    index, depth, path = 0, 0, []
    # Addresses that the path went through, with their place on it.
    passed: dict[int, int] = {}
    loops = []
    while index < len(code):
        address, predicate, opcode, operands = code[index]
        base = opcode.split(".")[0]
        passed[address] = len(path)
        if opcode != "NOP":
            path.append(opcode)
        depth += (base == "BSSY") - (base == "BSYNC")
        goal = int(re.search(r"0x([0-9a-f]+)", operands)[1], 16) if base == "BRA" else None
        # A branch may have its predicate as an operand; one back without any follows the call that leaves the loop.
        always = not predicate and not operands.startswith(("UP", "!UP"))
        if always and (base == "EXIT" or (base == "BRA" and (goal >= address or goal not in passed))):
            break
        if base == "BRA":
            if goal > address and depth > 0:
                index = at[goal]
                continue
            if goal in passed:
                loops.append(slice(passed[goal], len(path)))
        index += 1
    return path, loops


def _bits(opcode: str) -> int:
    for part in opcode.split("."):
        if part in ("64", "128", "256"):
            return int(part)
        if part in ("U8", "S8"):
            return 8
        if part in ("U16", "S16"):
            return 16
    return 32


def cost(launch: Launch, target: str = "sm_90") -> Cost:
    """Count a launch on a CUDA target.

    Raises:
        RuntimeError: the compiler printed something.
    """
    from genfast.kernels.launch import WARPS

    compiled, printed = compile_launch(launch, target)
    if printed:
        raise RuntimeError(f"{launch.name} on {target}: the compiler printed: {printed}")
    code = disassemble(compiled).repeated(launch.rounds)
    return Cost(
        instructions=len(code.opcodes) * 32 * WARPS / launch.elements,
        registers=code.registers,
        spills=code.spills,
        widths=code.widths(),
    )
