"""Many processes: what they agree on, and how a model's loss runs under DDP and FSDP2."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["from_first", "is_sharded", "launched", "local_rank_first", "ranks", "shard"]

_T = TypeVar("_T")


def ranks() -> tuple[int, int]:
    """(rank, number of processes): (0, 1) without torch.distributed.

    Example:
        >>> ranks()
        (0, 1)
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def launched(device: torch.device | str) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, if it did, and give this one its device.

    Tensors on a GPU go by nccl, those on the CPU by gloo. An error leaves the group as it is: taking it down would wait
    for the other processes, and torchrun ends them.

    Args:
        device: "cuda" becomes the GPU of this process's LOCAL_RANK.

    Raises:
        ValueError: there are fewer GPUs than processes on this machine, or "cuda:1" and the like were asked for.

    Example:
        >>> with launched("cpu") as device:
        ...     device
        device(type='cpu')
    """
    device = torch.device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        local, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if device.index is not None:
            raise ValueError(f"device: expected cuda, of which each process takes its own, got {device}")
        if local >= visible:
            raise ValueError(f"device: expected a GPU for each process of this machine, got {visible}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield device
    dist.destroy_process_group()


@contextmanager
def local_rank_first() -> Iterator[None]:
    """The block runs on one process of each machine first, which may download what the others then find.

    Example:
        >>> with local_rank_first():
        ...     print("loaded")
        loaded
    """
    together = ranks()[1] > 1
    ahead = os.environ.get("LOCAL_RANK", "0") == "0"
    if together and not ahead:
        dist.barrier()
    yield
    if together and ahead:
        dist.barrier()


def add_up(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if ranks()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(values: Sequence[int]) -> list[int]:
    """Each value's maximum over all processes: how they come to one decision."""
    if ranks()[1] == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int64, device=_meeting_point())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def from_first(value: _T) -> _T:
    """The value that rank 0 has; the others wait for it.

    Example:
        >>> from_first("runs/vae-digits")
        'runs/vae-digits'
    """
    if ranks()[1] == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0, device=_meeting_point())
    return values[0]


def from_all(value: _T) -> list[_T]:
    """What each process has, by rank."""
    _, world = ranks()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def share_buffers(model: nn.Module) -> None:
    """Give all processes rank 0's buffers."""
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)


def share_weights(model: nn.Module) -> None:
    """Give all processes rank 0's parameters and buffers."""
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), src=0)
    share_buffers(model)


def average(gradients: list[Tensor]) -> None:
    """Replace gradients by their means over the processes: one exchange for each dtype."""
    # In one order on every process, which that of a set is not.
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        alike = [gradient for gradient in gradients if gradient.dtype == dtype]
        together = torch.cat([gradient.flatten() for gradient in alike])
        dist.all_reduce(together)
        together /= ranks()[1]
        for gradient, mean in zip(alike, together.split([gradient.numel() for gradient in alike]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _meeting_point() -> torch.device:
    """Where a tensor must be for all processes to exchange it."""
    gloo = "gloo" in str(dist.get_backend_config())
    return torch.device("cpu") if gloo else torch.device("cuda", torch.cuda.current_device())


class LossModule(nn.Module):
    """A model whose forward is its loss: DDP averages gradients of what goes through the wrapped forward alone."""

    def __init__(self, model: nn.Module, loss: Callable[..., dict[str, Tensor]]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor, **options: Any) -> dict[str, Tensor]:
        return self.loss(x, **options)


def data_parallel(
    model: nn.Module, loss: Callable[..., dict[str, Tensor]], device: torch.device
) -> nn.parallel.DistributedDataParallel:
    """`loss`, which is that of `model`, under DDP; rank 0's weights go to all."""
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(LossModule(model, loss), device_ids=ids, gradient_as_bucket_view=True)


def shard(model: nn.Module, blocks: Iterable[nn.Module] = (), **options: Any) -> nn.Module:
    """Split a large model's parameters, gradients and optimizer state over all processes (FSDP2), in place.

    Make the optimizer afterwards: the parameters are other tensors then.

    Args:
        model: has a ``loss``, which gathers what it needs from here on.
        blocks: submodules that are gathered one at a time, such as the blocks of a transformer; everything else is
            gathered at once.
        options: of `torch.distributed.fsdp.fully_shard`, such as ``mp_policy``.

    Returns:
        The model.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if not dist.is_initialized():
        raise RuntimeError("shard: expected torch.distributed to be initialised (run under torchrun), got one process")
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "loss")
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds the parameters of `model`.

    Example:
        >>> is_sharded(nn.Linear(2, 2))
        False
    """
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    # Not by its parameters, which are whole for a while after a forward pass.
    return isinstance(model, FSDPModule)
