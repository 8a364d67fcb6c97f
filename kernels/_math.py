"""Elementwise functions that several kernels need, accurate where the textbook form cancels."""

import triton
import triton.language as tl


@triton.jit
def hardware(x, NAME: tl.constexpr):
    """An approximate function of NVIDIA's special function unit: ex2, lg2, sin, cos, sqrt, rcp."""
    ASM: tl.constexpr = NAME + ".approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(ASM, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exp2(x, FAST: tl.constexpr):
    """2^x to 2 ulp; below 2^-126 the fast one gives zero, and spares the five instructions that denormals cost."""
    if FAST:
        return hardware(x, "ex2")
    return tl.exp2(x)


@triton.jit
def exp(x, FAST: tl.constexpr):
    """e^x."""
    return exp2(x * 1.4426950408889634, FAST)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x for normal x, to 1 ulp."""
    if FAST:
        return hardware(x, "rcp")
    return 1.0 / x


@triton.jit
def _series(x):
    """exp(x) - 1 - x for |x| < 1, within 2e-7 relative (minimax polynomial)."""
    p = tl.fma(x, 2.496078e-05, 2.0325487e-04)
    p = tl.fma(x, p, 1.3891336e-03)
    p = tl.fma(x, p, 8.33093e-03)
    p = tl.fma(x, p, 4.1666515e-02)
    p = tl.fma(x, p, 1.6666695e-01)
    p = tl.fma(x, p, 0.5)
    return x * x * p


@triton.jit
def expm1_minus(x, exp_x):
    """exp(x) - 1 - x, given exp(x)."""
    return tl.where(tl.abs(x) < 1.0, _series(x), (exp_x - 1.0) - x)


@triton.jit
def expm1(x, exp_x):
    """exp(x) - 1, given exp(x)."""
    return tl.where(tl.abs(x) < 1.0, x + _series(x), exp_x - 1.0)


@triton.jit
def log1p_unit(t):
    """log(1 + t) for t in [0, 1], within 2e-7 relative down to the smallest t (minimax polynomial)."""
    p = tl.fma(t, 5.2326294e-03, -2.9504986e-02)
    p = tl.fma(t, p, 7.822556e-02)
    p = tl.fma(t, p, -1.3663214e-01)
    p = tl.fma(t, p, 1.9105993e-01)
    p = tl.fma(t, p, -2.4842979e-01)
    p = tl.fma(t, p, 3.3319098e-01)
    p = tl.fma(t, p, -4.9999493e-01)
    p = tl.fma(t, p, 9.9999994e-01)
    return t * p
