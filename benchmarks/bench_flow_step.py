"""A training step of the RealNVP preset (noise, flow, backward, Adam), and of the same flow written with normflows.

Both have the same networks, number of couplings, scale map and levels; "normflows-exp" leaves the bound of the scales
out, which saves normflows a pass. Before any time is taken, both must give the same log-density in fp64, to 1e-8 nats
a dimension, with the same weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

import genfast
from genfast.flows import ActNorm, Coupling, Split, Squeeze
from genfast.training import TrainStep, load_dataset

nf = pytest.importorskip("normflows", reason="normflows is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRESET, BATCHES = {"cpu": ("tiny", (16,)), "cuda": ("small", (128, 1024))}[DEVICE.type]
CHAINS = ["fused", "eager", "fused-compiled", "normflows", "normflows-exp"] + ["fused-graph"] * (DEVICE.type == "cuda")
ALPHA = 0.05


class _Params(nn.Module):
    """What normflows' coupling wants of a network: shifts and log-scales in turns."""

    def __init__(self, net: nn.Module, bounded: bool) -> None:
        super().__init__()
        self.net, self.bounded = net, bounded

    def forward(self, half: Tensor) -> Tensor:
        s, t = self.net(half).chunk(2, 1)
        return torch.stack((t, 2 * torch.tanh(s) if self.bounded else s), 2).flatten(1, 2)


class _Nothing(nn.Module):
    """For log-densities of what is no image: theirs must begin with a log-determinant [B]."""

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(len(x))


class _Theirs(nn.Module):
    """The flow of a preset in normflows' classes, with copies of its networks."""

    def __init__(self, preset: genfast.RealNVP, bounded: bool = True, noise: bool = True) -> None:
        super().__init__()
        self.noise = noise
        shape = list(preset.image_shape)
        levels: list[list[nn.Module]] = [[]]
        bases: list[nn.Module] = []
        for transform in preset.transforms:
            if isinstance(transform, ActNorm):
                levels[-1].append(_act_norm(transform))
            elif isinstance(transform, Coupling):
                net = copy.deepcopy(transform.net)
                _negate(net)
                # Their first half is the odd squares of a checkerboard, and conditions.
                inverted = transform.swap != (transform.split == "checkerboard")
                mode = f"{transform.split}_inv" if inverted else transform.split
                block = nf.flows.AffineCouplingBlock(_Params(net, bounded), split_mode=mode)
                levels[-1].append(block)
            elif isinstance(transform, Squeeze):
                levels[-1].append(nf.flows.Squeeze())
                shape = [4 * shape[0], shape[1] // 2, shape[2] // 2]
            elif isinstance(transform, Split):
                shape[0] //= 2
                bases.append(nf.distributions.DiagGaussian(tuple(shape), trainable=False))
                levels.append([])
        bases.append(nf.distributions.DiagGaussian(tuple(shape), trainable=False))
        # Theirs run from the latent side.
        flows = [level[::-1] for level in reversed(levels)]
        merges = [nf.flows.Merge() for _ in flows[1:]]
        transform = nf.transforms.Logit(ALPHA) if noise else _Nothing()
        self.flow = nf.MultiscaleFlow(bases[::-1], flows, merges, transform, class_cond=False)

    def loss(self, x: Tensor, *, seed: object = None, row_offset: int = 0) -> dict[str, Tensor]:
        if self.noise:
            x = (x.float() + torch.rand(x.shape, device=x.device)) / 256
        return {"loss": -self.flow.log_prob(x, None).mean()}


def _act_norm(ours: ActNorm) -> nn.Module:
    theirs = nf.flows.ActNorm((ours.channels, 1, 1))
    with torch.no_grad():
        theirs.s.copy_(-ours.log_scale.view_as(theirs.s))
        theirs.t.copy_(-ours.bias.view_as(theirs.t))
    # Their first standard deviation is over n - 1, ours over n.
    theirs.data_dep_init_done = ours.initialized.float()
    return theirs


def _negate(net: nn.Module) -> None:
    """Theirs is (y - shift) exp(-log-scale): the same map with the signs of both."""
    last = getattr(net, "net", net).last
    with torch.no_grad():
        last.weight.neg_()
        last.bias.neg_()


def _preset(**options: object) -> genfast.RealNVP:
    torch.manual_seed(0)
    return genfast.RealNVP((1, 28, 28), preset=PRESET, alpha=ALPHA, **options)


@lru_cache(maxsize=1)
def _error() -> float:
    """How far the two flows' log-densities are apart, over what is allowed; of one level (see `_Theirs`)."""
    # Their checkerboard of two channels is another one: there the second channel has the other colour.
    ours = _preset(levels=1)
    for transform in ours.transforms:
        if isinstance(transform, Coupling):
            transform.options["shift_inside"] = True
            nn.init.normal_(getattr(transform.net, "net", transform.net).last.weight, std=0.02)
    ours = ours.double()
    # From behind dequantization and logit on: theirs draws other noise.
    pixels = next(index for index, transform in enumerate(ours.transforms) if isinstance(transform, ActNorm))
    x = torch.randn(8, 1, 28, 28, dtype=torch.float64)
    y, logdet = x, 0.0
    for transform in ours.transforms[pixels:]:
        y, part = transform(y)
        logdet = logdet + part
    theirs = _Theirs(ours, noise=False).double()
    dim = x[0].numel()
    log_prob = logdet - 0.5 * (y.square().flatten(1).sum(1) + dim * math.log(2 * math.pi))
    return float((log_prob - theirs.flow.log_prob(x, None)).detach().abs().max()) / (1e-8 * dim)


def _model(chain: str) -> nn.Module:
    if chain.startswith("normflows"):
        return _Theirs(_preset(), bounded=chain == "normflows")
    return _preset(fused=chain != "eager")


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("step", CHAINS)
def test_flow_step(time_callable: Callable[..., None], batch: int, step: str) -> None:
    torch._dynamo.reset()
    error = _error()
    if not error <= 1:
        pytest.fail(f"no time: the log-densities differ by {error:.3g} times what is allowed")
    images = load_dataset("digits").train[:batch].to(DEVICE)
    model = _model(step).to(DEVICE)
    model.loss(images)
    if step == "fused-compiled":
        model.compile(dynamic=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True, capturable=DEVICE.type == "cuda")
    train = TrainStep(model, optimizer, mode="graph" if step == "fused-graph" else "eager")
    time_callable(
        lambda: lambda: train(images), kind="step", capture=False, op="training step", case=f"realnvp {PRESET}",
        shape=tuple(images.shape), dtype="fp32", mode="", place="", chain=step,
        error=error if step.startswith("fused") else None,
    )  # fmt: skip
