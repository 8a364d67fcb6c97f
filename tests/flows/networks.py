"""Small networks, and what several tests of flows ask of a transform."""

import torch
from torch import Tensor, nn

from genfast.flows import Halves, join


def mlp(size_in, size_out, width=16, dtype=torch.float32):
    return nn.Sequential(nn.Linear(size_in, width), nn.Tanh(), nn.Linear(width, size_out)).to(dtype)


def conv(channels_in, channels_out, width=6, dtype=torch.float32):
    layers = nn.Conv2d(channels_in, width, 3, padding=1), nn.Tanh(), nn.Conv2d(width, channels_out, 3, padding=1)
    return nn.Sequential(*layers).to(dtype)


def whole(state):
    return join(state) if isinstance(state, Halves) else state


def jacobian_logdet(function, x: Tensor) -> Tensor:
    """log |det| of the Jacobian of a map of single samples, for each row of x."""
    rows = []
    for row in x:
        found = torch.autograd.functional.jacobian(lambda one: whole(function(one.unsqueeze(0))).flatten(), row)
        rows.append(torch.linalg.slogdet(found.reshape(row.numel(), row.numel()))[1])
    return torch.stack(rows)


def assert_is_a_transform(transform, x: Tensor) -> None:
    """In fp64: the log-determinant is that of the Jacobian, and the inverse is one."""
    y, logdet = transform(x)
    assert logdet.shape == x.shape[:1]
    assert logdet.dtype == torch.float64
    torch.testing.assert_close(logdet, jacobian_logdet(lambda one: transform(one)[0], x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole(transform.inverse(y)), x, rtol=1e-8, atol=1e-8)
