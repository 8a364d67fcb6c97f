"""reparameterize_kl_packed: the matrix, equality with the plain op, latents of a KL autoencoder, and bad input."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genfast.cases import cases
from genfast.functional import reparameterize_kl, reparameterize_kl_packed
from genfast.functional._register import path
from tests.matrix import OpMatrix
from tests.oracles import gaussian


class TestReparameterizeKlPacked(OpMatrix):
    cases = cases("reparameterize_kl_packed")
    oracle = staticmethod(gaussian.reparameterize_kl)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_the_plain_op_on_the_moments_of_a_kl_autoencoder(memory_format, device):
    h = torch.randn(2, 8, 32, 32, device=device).to(memory_format=memory_format).requires_grad_()
    mu, logvar = (part.detach().contiguous().requires_grad_() for part in h.chunk(2, 1))
    packed = reparameterize_kl_packed(h, seed=1, clamp=(-1.0, 1.0))
    plain = reparameterize_kl(mu, logvar, seed=1, clamp=(-1.0, 1.0))
    for got, want in zip(packed, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for outputs in (packed, plain):
        (outputs[0].sin().sum() + outputs[1].sum()).backward()
    torch.testing.assert_close(h.grad, torch.cat([mu.grad, logvar.grad], 1), rtol=1e-6, atol=1e-6)
    assert h.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.skipif(path(torch.device("cpu"))[0] == "reference", reason="the reference on a CPU may copy")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_reads_and_writes_without_copies(memory_format):
    """No chunk is made contiguous, no gradient is put together by a cat."""

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    seen = []
    h = torch.randn(2, 8, 8, 8).to(memory_format=memory_format).requires_grad_()
    upstream = torch.randn(2, 4, 8, 8).to(memory_format=memory_format)
    with Copies():
        z, _ = reparameterize_kl_packed(h, seed=1)
        z.backward(upstream)
    assert torch.ops.genfast.reparameterize_kl_packed_backward in seen
    assert not {torch.ops.aten.clone, torch.ops.aten.cat, torch.ops.aten.copy_, torch.ops.aten._to_copy} & set(seen)


@pytest.mark.parametrize(
    ("h", "error", "message"),
    [
        (torch.zeros(2, 3), ValueError, r"h: expected an even dimension 1, \[mu \| logvar\], got shape \[2, 3\]"),
        (torch.zeros(4), ValueError, r"h: expected at least 2 dimension\(s\) \[B, ...\], got shape \[4\]"),
        (None, TypeError, "h: expected a tensor, got NoneType"),
        (torch.zeros(2, 4, dtype=torch.uint8), TypeError, "h: expected fp32, bf16, fp16 or fp64, got torch.uint8"),
    ],
)
def test_bad_input(h, error, message):
    with pytest.raises(error, match=message):
        reparameterize_kl_packed(h)


def test_eps_has_the_shape_of_the_latent():
    with pytest.raises(ValueError, match=r"eps: expected the shape of the latent, \[2, 4, 3\], got \[2, 8, 3\]"):
        reparameterize_kl_packed(torch.zeros(2, 8, 3), eps=torch.zeros(2, 8, 3))
