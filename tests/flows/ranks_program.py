"""What `test_linear` has two processes do: `ranks_program.py RANK FOLDER`, a flow under DDP, each on its own images."""

import faulthandler
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from genfast.flows import ActNorm, Coupling, InvertibleConv1x1
from genfast.models.flow import Flow
from tests.flows.networks import conv

# A process that hangs shows where, and ends.
PATIENCE = 300
WORLD = 2
MEMORIES = ("ordinary", "checkpoint", "reversible")


def flow(memory):
    torch.manual_seed(0)
    couplings = [Coupling(conv(2, 4), swap=swap) for swap in (False, True)]
    return Flow([ActNorm(4), couplings[0], ActNorm(4), InvertibleConv1x1(4), couplings[1]], memory=memory)


def images():
    torch.manual_seed(3)
    return 5 + 3 * torch.randn(8, 4, 4, 4)


class Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.loss(x)["loss"]


def run(rank, memory):
    model = flow(memory)
    parallel = nn.parallel.DistributedDataParallel(Loss(model))
    own = images().chunk(WORLD)[rank]
    parallel(own)
    initialised = {name: value.clone() for name, value in model.state_dict().items()}
    parallel(own).backward()
    return {
        "initialised": initialised,
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
    }


if __name__ == "__main__":
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    torch.save({memory: run(rank, memory) for memory in MEMORIES}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
