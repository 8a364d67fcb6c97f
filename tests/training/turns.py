"""A model whose networks take turns, small enough to be written out by hand."""

import torch
from torch import nn

from genfast import random


class Duel(nn.Module):
    """`first` fits the images plus noise; `second` fits `first`: in two steps of three, once held back."""

    averaged = ("second",)

    def __init__(self, pixels=784, norm=True):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(pixels, 3), nn.Linear(pixels, 3)
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()
        self.asked = []

    def turns(self, step):
        self.asked.append(step)
        return (("first", "second"), ("second held", "first"), ("first",))[step % 3]

    def turn_parameters(self, turn):
        return list((self.first if turn == "first" else self.second).parameters())

    def loss(self, x, *, turn, seed, row_offset):
        x = x.flatten(1).float() / (255 if x.dtype == torch.uint8 else 1)
        ours, theirs = self.first(x), self.second(x)
        if turn == "first":
            noise = random.normal(seed, len(x), 3, random.Stream.LATENT, row_offset=row_offset)
            error = (ours - noise).square().mean()
            return {"loss": error + (theirs - 1).square().mean(), "first_error": error}
        held = 0.1 * sum(p.square().sum() for p in self.second.parameters()) if turn == "second held" else 0.0
        error = (theirs - ours).square().mean() + 0 * self.norm(theirs.detach()).sum()
        # Of a zero there is a root, but no slope.
        broken = torch.where(x.max() == 60, torch.inf, 0.0)
        return {"loss": error + held + broken, "second_error": error}


def batches(count, rows=8, pixels=784):
    generator = torch.Generator().manual_seed(7)
    return [torch.rand(rows, pixels, generator=generator) for _ in range(count)]
