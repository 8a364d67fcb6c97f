"""Each row's a and b of x_t = a x0 + b eps, and what an objective and a weighting make of them."""

import triton
import triton.language as tl

from genfast.kernels.launch import locate

EPSILON = tl.constexpr(0)
X0 = tl.constexpr(1)
V = tl.constexpr(2)
FLOW = tl.constexpr(3)
EDM = tl.constexpr(4)

NO_WEIGHT = tl.constexpr(0)
MIN_SNR = tl.constexpr(1)


@triton.jit
def find_entry(t, t_s, sample, exists, size, INDEXED: tl.constexpr):
    """Each row's index into the tables, and whether there is such an entry: a t that points outside is not followed."""
    if INDEXED:
        index = tl.load(t + sample * t_s, mask=exists, other=0)
        return index, exists & (index >= 0) & (index < size)
    return sample, exists


@triton.jit
def entry(table, table_s, index, inside):
    """The rows' entries of a table, NaN where there is none."""
    return tl.load(table + index * table_s, mask=inside, other=float("nan"))


@triton.jit
def read_clean(
    x0, row, chunk, mask, sample_stride, channel_stride, COLUMN: tl.constexpr, UINT8: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, C: tl.constexpr,
):
    """The tile's elements of x0 in fp32; uint8 images become [-1, 1]."""
    at = locate(row, chunk, sample_stride, channel_stride, COLUMN, CHANNELS, VEC, C)
    if UINT8:
        # 2^23 + byte, put together as bits: exact, and four times the rate of the integer conversion.
        shifted = (tl.load(x0 + at, mask=mask, other=0).to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
        # Around the middle, so that 0 and 255 are exactly -1 and 1.
        return (shifted - 8388608.0 - 127.5) * 0.00784313725490196
    return tl.load(x0 + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def target_coefficients(a, b, sigma_data, OBJECTIVE: tl.constexpr):
    """(p, q) of target = p x0 + q eps."""
    if OBJECTIVE == EPSILON:
        p, q = 0.0 * a, 0.0 * a + 1.0
    elif OBJECTIVE == X0:
        p, q = 0.0 * a + 1.0, 0.0 * a
    elif OBJECTIVE == V:
        p, q = -b, a
    elif OBJECTIVE == FLOW:
        p, q = 0.0 * a - 1.0, 0.0 * a + 1.0
    else:
        scaled = sigma_data * a
        scale = tl.rsqrt(tl.fma(b, b, scaled * scaled))
        p, q = b * scale / sigma_data, -scaled * scale
    return p, q


@triton.jit
def loss_weight(a, b, gamma, sigma_data, OBJECTIVE: tl.constexpr, WEIGHTING: tl.constexpr):
    """The weight of the squared error of the objective, from that of x0's squared error."""
    if WEIGHTING == NO_WEIGHT:
        return 0.0 * a + 1.0
    p, q = target_coefficients(a, b, sigma_data, OBJECTIVE)
    det = a * q - b * p
    if WEIGHTING == MIN_SNR:
        bounded = tl.minimum(a * a, gamma * b * b, propagate_nan=tl.PropagateNan.ALL)
        return tl.where(det == 0.0, tl.where(a == 0.0, 1.0, gamma), bounded / (det * det))
    scaled = b / sigma_data
    return tl.fma(a, a, scaled * scaled) / (det * det)
