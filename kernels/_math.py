"""Elementwise functions that several kernels need, accurate where the textbook form cancels."""

import triton
import triton.language as tl

# The scale maps of coupling layers, in the order of `genfast.reference._math.SCALE_MAPS`.
EXP = tl.constexpr(0)
TANH = tl.constexpr(1)
ATAN = tl.constexpr(2)
SIGMOID = tl.constexpr(3)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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


@triton.jit
def log2(x, FAST: tl.constexpr):
    """Base 2, within 3e-7 absolute near 1."""
    if FAST:
        return hardware(x, "lg2")
    return tl.log2(x)


@triton.jit
def atan(x, FAST: tl.constexpr):
    """Within 3e-7 relative (minimax polynomial)."""
    size = tl.abs(x)
    outside = size > 1.0
    v = tl.where(outside, reciprocal(size, FAST), size)
    v2 = v * v
    p = tl.fma(v2, 2.8498894e-03, -1.6068630e-02)
    p = tl.fma(v2, p, 4.2691525e-02)
    p = tl.fma(v2, p, -7.5042956e-02)
    p = tl.fma(v2, p, 1.0640935e-01)
    p = tl.fma(v2, p, -1.4203645e-01)
    p = tl.fma(v2, p, 1.9992620e-01)
    p = tl.fma(v2, p, -3.3333072e-01)
    p = tl.fma(v * v2, p, v)
    p = tl.where(outside, 1.5707963267948966 - p, p)
    return tl.where(x < 0.0, -p, p)


@triton.jit
def _tanh_parts(s, FAST: tl.constexpr):
    """u = e^2s, bounded so that u times r stays a number, and r = 1 / (1 + u): tanh(s) = 1 - 2 r."""
    bounded = tl.minimum(s * (2.0 * LOG2E), 100.0, propagate_nan=tl.PropagateNan.ALL)
    u = exp2(bounded, FAST)
    return u, reciprocal(1.0 + u, FAST)


@triton.jit
def _sigmoid_parts(s, min_scale, HAS_MIN: tl.constexpr, FAST: tl.constexpr):
    """a = s + 2, t = exp(-|a|), and (1 + t) (sigmoid(a) + min_scale)."""
    a = s + 2.0
    t = exp(-tl.abs(a), FAST)
    top = tl.where(a >= 0.0, 1.0, t)
    if HAS_MIN:
        top = tl.fma(tl.full([], min_scale, tl.float32), 1.0 + t, top)
    return a, t, top


@triton.jit
def log2_scale(s, factor, min_scale, MAP: tl.constexpr, HAS_MIN: tl.constexpr, FAST: tl.constexpr):
    """The logarithm, base 2, of a coupling's scale, 0 at s = 0 but for SIGMOID; `factor` is fp32, one or a tile."""
    if MAP == TANH:
        # Within 1.5e-7 factor: it is an exponent, and a term of a sum in nats.
        k = factor * LOG2E
        log = tl.fma(-2.0 * k, reciprocal(1.0 + exp2(s * (2.0 * LOG2E), FAST), FAST), k)
    elif MAP == ATAN:
        log = atan(s * (1.0 / factor), FAST) * factor * (0.636 * LOG2E)
    elif MAP == SIGMOID:
        a, t, top = _sigmoid_parts(s, min_scale, HAS_MIN, FAST)
        if HAS_MIN:
            # log(top) by its excess over 1, which is small where the scale is all but 1.
            excess = tl.full([], min_scale, tl.float32) * (1.0 + t)
            log = tl.where((a >= 0.0) & (excess <= 1.0), log1p_unit(excess) * LOG2E, log2(top, FAST))
        else:
            log = tl.where(a >= 0.0, 0.0, a * LOG2E)
        log = tl.fma(log1p_unit(t), -LOG2E, log)
    else:
        log = s * LOG2E
    return log


@triton.jit
def log_scale(s, factor, min_scale, MAP: tl.constexpr, HAS_MIN: tl.constexpr, FAST: tl.constexpr):
    """The natural logarithm of a coupling's scale."""
    return s if MAP == EXP else log2_scale(s, factor, min_scale, MAP, HAS_MIN, FAST) * LN2


@triton.jit
def log_scale_slope(s, factor, min_scale, MAP: tl.constexpr, HAS_MIN: tl.constexpr, FAST: tl.constexpr):
    """The derivative of `log_scale` by s, nowhere as a difference."""
    if MAP == TANH:
        u, r = _tanh_parts(s, FAST)
        slope = (4.0 * factor * r) * (u * r)
    elif MAP == ATAN:
        v = s * (1.0 / factor)
        slope = 0.636 / tl.fma(v, v, 1.0)
    elif MAP == SIGMOID:
        a, t, top = _sigmoid_parts(s, min_scale, HAS_MIN, FAST)
        # Without a least scale t may vanish in both.
        numerator = t / top if HAS_MIN else tl.where(a >= 0.0, t, 1.0)
        slope = numerator * reciprocal(1.0 + t, FAST)
    else:
        slope = 0.0 * s + 1.0
    return slope


@triton.jit
def log_scale_by_factor(s, FAST: tl.constexpr):
    """The derivative of the log-scale of TANH by its factor."""
    _, r = _tanh_parts(s, FAST)
    return tl.fma(-2.0, r, 1.0)
