"""What a run shows while it trains: a bar on a terminal, one line per epoch elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from torch import Tensor, nn

__all__ = ["Progress", "counting", "describe", "digits"]

_REFRESH_SECONDS = 0.25
# Between the lines about one long computation, where there is no terminal.
_LINE_SECONDS = 30.0
_SHOWN = ("loss", "nll", "kl", "bits_per_dim")


def describe(row: dict[str, float], epochs: int) -> str:
    """An epoch's row of the history as one line.

    Example:
        >>> describe({"epoch": 2, "loss": 110.25, "nll": 90.0, "kl": 20.25, "test_loss": 108.0, "seconds": 0.5,
        ...           "images_per_second": 9984.0}, epochs=10)
        'epoch  2/10  loss 110.25  nll 90.00  kl 20.25  test loss 108.00  9,984 images/s'
    """
    words = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"]
    words += [_word(name, row[name]) for name in _SHOWN if name in row]
    tests = ("test_bits_per_dim", "test_elbo", "test_loss")
    test = next((name for name in tests if name in row), None)
    if test is not None:
        words.append(_word(test, row[test]))
    return "  ".join([*words, f"{row['images_per_second']:,.0f} images/s"])


def _word(name: str, value: float) -> str:
    # Bits per dimension differ by hundredths.
    return f"{name.replace('_', ' ')} {digits(value, 3 if name.endswith('bits_per_dim') else 2)}"


def digits(value: float, decimals: int = 2) -> str:
    """A number with so many decimals, with four where its size is below 1, and with two digits where it is tiny.

    Example:
        >>> digits(110.25), digits(0.03127), digits(1.1082e-05)
        ('110.25', '0.0313', '1.1e-05')
    """
    if 0 < abs(value) < 0.0005:
        return f"{value:.1e}"
    return f"{value:.{decimals if abs(value) >= 1 else 4}f}"


class Progress:
    """Shows the epochs of one run.

    Reads values off the device a few times a second, and only where a bar shows them.

    Args:
        epochs: how many there will be.
        batches: batches per epoch; None if unknown.
        show: False shows nothing.
    """

    def __init__(self, epochs: int, batches: int | None, show: bool) -> None:
        self.epochs, self.batches, self.show = epochs, batches, show
        self.bar = _make_bar() if show and sys.stdout.isatty() else None
        self.started = self.refreshed = time.perf_counter()
        self.images = 0

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("", total=self.batches, values="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def start_epoch(self, epoch: int, first: int = 0) -> None:
        self.started, self.images = time.perf_counter(), 0
        if self.bar is not None:
            at = f"epoch {epoch}/{self.epochs}"
            self.bar.reset(self.task, total=self.batches, completed=first, description=at)

    def step(self, values: dict[str, Tensor], images: int) -> None:
        self.images += images
        if self.bar is None:
            return
        self.bar.advance(self.task)
        now = time.perf_counter()
        if now - self.refreshed >= _REFRESH_SECONDS:
            shown = [_word(name, float(values[name])) for name in _SHOWN if name in values]
            rate = f"{self.images / (now - self.started):,.0f} images/s"
            self.bar.update(self.task, values="  ".join([*shown, rate]))
            self.refreshed = now

    def end_epoch(self, row: dict[str, float]) -> None:
        lines = [describe(row, self.epochs)]
        if "warning" in row:
            lines.append(f"epoch {row['epoch']}: {row['warning']}")
        for line in lines:
            if self.bar is not None:
                self.bar.console.print(line, highlight=False)
            elif self.show:
                print(line, flush=True)


@contextmanager
def counting(module: nn.Module | None, total: int, what: str) -> Iterator[None]:
    """Show how many of `total` calls of a module are done: in a bar on a terminal, else in a line now and then.

    Replays of a CUDA graph call no module: there the bar stands still for the seconds that they take, as without one.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with counting(layer, 1, "one call"):
        ...     _ = layer(layer.weight)
        one call
    """
    bar = _make_bar() if sys.stdout.isatty() else None
    if bar is None:
        print(what, flush=True)
    else:
        bar.start()
        task = bar.add_task(what, total=total, values="")
    started = said = time.perf_counter()
    done = 0

    def count(*_: object) -> None:
        nonlocal done, said
        done += 1
        now = time.perf_counter()
        if bar is not None:
            bar.update(task, completed=done, values=f"{done:,} / {total:,}")
        elif now - said >= _LINE_SECONDS:
            said = now
            print(f"{done:,} / {total:,} in {now - started:.0f} s", flush=True)

    hook = None if module is None else module.register_forward_hook(count)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        if bar is not None:
            bar.stop()


def _make_bar():
    try:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
    except ModuleNotFoundError:
        # rich comes with the [train] extra; without it, a terminal gets the plain lines.
        return None
    return Bar(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[values]}"), transient=True)
