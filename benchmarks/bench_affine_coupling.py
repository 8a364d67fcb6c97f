"""affine_coupling: the transformation of one half alone, and a whole coupling of Real NVP as a pair of halves.

A coupling that takes and gives whole tensors cuts its input and puts its result together again, and autograd does both
once more. Halves that stay a pair between couplings never do. The network's output is given in all chains.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from genfast.cases import DTYPES, TOLERANCES, Case, cases
from genfast.check import path_taken
from genfast.functional import affine_coupling

CASES = [case for case in cases("affine_coupling") if case.setting == ""]
SIZES = {
    "cpu": ((128, 784), (1024, 1024)),
    "cuda": ((128, 392), (128, 24, 16, 16), (16384, 4096)),
    "more": ((1024, 1024), (8192, 1024)),
}

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of one half.
COUPLINGS = {"cpu": ((128, 6, 16, 16),), "cuda": ((128, 6, 16, 16), (4096, 24, 32, 32))}
CHAINS = {"fused": None, "eager": None, "compiled": "default"}


def test_affine_coupling(
    time_chain: Callable[..., None], case: Case, shape: tuple[int, ...], dtype: str, place: str, chain: str, mode: str
) -> None:
    time_chain(case, shape, dtype, place, chain, mode)


def _whole(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """As flows are written: cut, transform, put together."""
    still, moved = x.chunk(2, 1)
    s, t = params.chunk(2, 1)
    log = 2.0 * torch.tanh(s)
    return torch.cat([still, moved * torch.exp(log) + t], 1), log.flatten(1).sum(1)


def _check(x: Tensor, params: Tensor) -> None:
    """The pair against the whole in fp64; no time where it is wrong."""
    still, moved = x.chunk(2, 1)
    y, logdet = affine_coupling(moved, params)
    exact, exact_logdet = _whole(x.double(), params.double())
    allowed = TOLERANCES[path_taken(DEVICE, x.dtype)]
    error = max(
        allowed[x.dtype].excess(torch.cat([still, y], 1), exact), allowed["logdets"].excess(logdet, exact_logdet)
    )
    if not error <= 1:
        pytest.fail(f"no time: the fused coupling is wrong by {error:.3g} times what is allowed")


@pytest.mark.parametrize("shape", COUPLINGS[DEVICE.type], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CHAINS)
def test_coupling_of_halves(
    time_callable: Callable[..., None], shape: tuple[int, ...], dtype: str, name: str
) -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    batch, channels, *image = shape
    x, params, grad = (
        torch.randn(batch, 2 * channels, *image, generator=generator).to(DEVICE, DTYPES[dtype]) for _ in range(3)
    )
    # Of one sign, so that the log-det is as well known as its terms.
    params = torch.cat([params[:, :channels].abs(), params[:, channels:]], 1)
    grad_logdet = torch.ones(batch, device=DEVICE)
    if name == "fused":
        _check(x, params)
    whole = _whole
    if CHAINS[name] is not None:
        whole = torch.compile(_whole, mode=CHAINS[name], fullgraph=True, dynamic=False)

    def prepare() -> Callable[[], None]:
        if name == "fused":
            leaves = x[:, channels:].contiguous().requires_grad_(), params.detach().requires_grad_()
            upstream = [grad[:, channels:].contiguous(), grad_logdet]

            def call() -> None:
                torch.autograd.grad(affine_coupling(*leaves), leaves, upstream)
        else:
            leaves = x.detach().requires_grad_(), params.detach().requires_grad_()

            def call() -> None:
                y, logdet = whole(*leaves)
                torch.autograd.grad([y, logdet], leaves, [grad, grad_logdet.to(logdet.dtype)])

        return call

    # What the transformed half moves: 4 elements forward and 6 backward for each of its own.
    moved = 10 * x[:, :channels].numel() * x.element_size()
    time_callable(
        prepare, op="coupling_of_halves", case="coupling_of_halves", shape=shape, dtype=dtype,
        mode="forward+backward", place="alone", chain=name, bytes=moved, path=path_taken(DEVICE, x.dtype),
    )  # fmt: skip
