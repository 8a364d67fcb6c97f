"""A kernel for tests: Box-Muller of words that the test chooses. (Triton needs it at the top of a module.)"""

import triton
import triton.language as tl

from genfast.kernels.philox import box_muller


@triton.jit
def probe(first, second, cos, sin, FAST: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = box_muller(tl.load(first + at).to(tl.uint32), tl.load(second + at).to(tl.uint32), FAST)
    tl.store(cos + at, a)
    tl.store(sin + at, b)
