"""mixture_logistic_coupling: 4 and 32 components against the eager code of Flow++, and the inverse against bisection.

Public code inverts on the host: it halves a bracket until the largest error in the whole batch is small, and asks the
device after every step.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genfast.cases import DTYPES, Case, cases, mixture_logistic_coupling
from genfast.check import path_taken
from genfast.functional import mixture_logistic_coupling as fused

COMPONENTS = 32
CASES = [case for case in cases("mixture_logistic_coupling") if not case.setting]
CASES += [mixture_logistic_coupling(str(count), count) for count in (4, COMPONENTS)]
SIZES = {
    "cpu": ((32, 784),),
    "cuda": ((128, 6, 16, 16), (2048, 4096)),
    "more": ((512, 24, 16, 16),),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INVERSES = {"cpu": ((16, 784),), "cuda": ((128, 6, 16, 16), (512, 24, 16, 16))}
# Of x.
PRECISION = 1e-6


def test_mixture_logistic_coupling(
    time_chain: Callable[..., None], case: Case, shape: tuple[int, ...], dtype: str, place: str, chain: str, mode: str
) -> None:
    time_chain(case, shape, dtype, place, chain, mode)


def _bisection(y: Tensor, params: Tensor) -> Tensor:
    """As public code of Flow++ has it, with a bracket as narrow as ours."""
    params = params.unflatten(1, (2 + 3 * COMPONENTS, y.shape[1]))
    s, t = params[:, 0], params[:, 1]
    logits, means, log_scales = params[:, 2:].chunk(3, 1)
    log_scales = log_scales.clamp(min=-7.0)
    z = (y - t) * torch.exp(-2.0 * torch.tanh(s))
    guesses = means + torch.exp(log_scales) * z.unsqueeze(1)
    lo, hi = guesses.amin(1), guesses.amax(1)
    while True:
        x = (lo + hi) / 2
        u = (x.unsqueeze(1) - means) * torch.exp(-log_scales)
        weights = F.log_softmax(logits, 1)
        logit = torch.logsumexp(weights + F.logsigmoid(u), 1) - torch.logsumexp(weights + F.logsigmoid(-u), 1)
        above = logit > z
        lo, hi = torch.where(above, lo, x), torch.where(above, x, hi)
        # fp32 knows no bracket narrower than this.
        if ((hi - lo) / x.abs().clamp(min=1)).max() <= PRECISION:
            return x


@pytest.mark.parametrize("shape", INVERSES[DEVICE.type], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", ["fused", "eager"])
def test_inverse(time_callable: Callable[..., None], shape: tuple[int, ...], name: str) -> None:
    case = mixture_logistic_coupling("32-inverse", COMPONENTS, inverse=True)
    inputs = case.inputs(shape, DTYPES["fp32"], str(DEVICE), torch.Generator().manual_seed(0))
    y, params = inputs["half"], inputs["params"]
    call = _bisection
    if name == "fused":
        def call(y: Tensor, params: Tensor) -> Tensor:
            return fused(y, params, num_components=COMPONENTS, inverse=True)[0]

    # Both have to be right: the error of x in fp64, where a few are known no better because the map is flat.
    exact = fused(y.double(), params.double(), num_components=COMPONENTS, inverse=True)[0]
    error = ((call(y, params) - exact).abs() / exact.abs().clamp(min=1)).flatten().quantile(0.99).item()
    if not error <= 5 * PRECISION:
        pytest.fail(f"no time: the inverse is wrong by {error:.3g}")
    # y and x, and the parameters once.
    moved = (2 + 2 + 3 * COMPONENTS) * y.numel() * y.element_size()
    time_callable(
        lambda: lambda: call(y, params), op=case.op, case="mixture_logistic_coupling-32-inverse", shape=shape,
        dtype="fp32", mode="forward", place="alone", chain=name, bytes=moved, path=path_taken(DEVICE, y.dtype),
        # The host is asked after every step.
        capture=name == "fused",
    )  # fmt: skip
