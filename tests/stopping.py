"""Ways to bring a run to an end in the middle, for tests."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.optim.optimizer import register_optimizer_step_post_hook


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes: as a full disk, an error of the write itself."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def calls_in_steps() -> Iterator[Callable[..., None]]:
    """`register(3, action, ...)` calls these one after the other within the third optimizer step from then on."""
    handles = []

    def register(step: int, *actions: Callable[[], None]) -> None:
        taken = []

        def count(*_: object) -> None:
            taken.append(1)
            if len(taken) == step:
                for action in actions:
                    action()

        handles.append(register_optimizer_step_post_hook(count))

    try:
        yield register
    finally:
        for handle in handles:
            handle.remove()
