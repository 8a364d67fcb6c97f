"""Draw docs/trace.png: one training step of the VAE on the CPU, from a trace that torch.profiler exported."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import genfast
from genfast import profiling
from genfast._files import replacing
from genfast.training import load_dataset

TARGET = Path(__file__).parents[1] / "docs" / "trace.png"
BATCH, STEPS = 128, 30
# A phase and the tint of what is inside it; the rest is torch's.
COLOURS = {
    "step": ("#c3c9d3", "#c3c9d3"),
    "data": ("#b9a7dd", "#b9a7dd"),
    "forward": ("#7db3e8", "#b5d4f2"),
    "loss": ("#74c7a0", "#b4e0cb"),
    "backward": ("#f2ab62", "#f8d3aa"),
    "optimizer": ("#e08bab", "#e08bab"),
}
OF_TORCH = "#e6e6e6"
FONT = 8


@dataclass
class Event:
    """A bar of the timeline: times in milliseconds, `depth` counted among the events of its kind."""

    name: str
    start: float
    length: float
    depth: int = 0

    @property
    def end(self) -> float:
        return self.start + self.length


def trace(path: Path) -> None:
    """Train for some steps under torch.profiler and export what it recorded."""
    images = load_dataset("digits").train[: BATCH * STEPS]
    model = genfast.VAE()
    genfast.fit(model, images[: BATCH * 3], epochs=1, batch_size=BATCH, progress=False, seed=0)
    with profiling.enabled(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        genfast.fit(model, images, epochs=1, batch_size=BATCH, progress=False, seed=0)
    profile.export_chrome_trace(str(path))


def read(path: Path) -> tuple[list[Event], list[Event]]:
    """genfast's ranges and torch's own events, outer ones before inner ones."""
    ours, torchs = [], []
    for entry in json.loads(path.read_text())["traceEvents"]:
        if entry.get("ph") != "X" or entry.get("cat") not in ("user_annotation", "cpu_op"):
            continue
        event = Event(entry["name"], entry["ts"] / 1000, entry["dur"] / 1000)
        # torch's optimizers annotate themselves.
        by_us = entry["cat"] == "user_annotation" and not event.name.startswith("Optimizer.")
        (ours if by_us else torchs).append(event)
    return nested(ours), nested(torchs)


def nested(events: list[Event]) -> list[Event]:
    """The events in order, each as deep as there are others around it."""
    events = sorted(events, key=lambda event: (event.start, -event.length))
    around: list[Event] = []
    for event in events:
        while around and around[-1].end <= event.start:
            around.pop()
        event.depth = len(around)
        around.append(event)
    return events


def inside(outer: Event, events: list[Event]) -> list[Event]:
    """The events within another, their times counted from its start."""
    return [
        replace(event, start=event.start - outer.start)
        for event in events
        if outer.start <= event.start and event.end <= outer.end
    ]


def draw(axes: Axes, events: list[Event], row: int, colours: dict[str, tuple[str, str]]) -> int:
    """A bar for each event, in rows by depth from `row` on, with its name; the next free row."""
    tint = OF_TORCH
    least = min(event.depth for event in events)
    rows: dict[int, list[Event]] = {}
    for event in events:
        colour, tint = colours.get(event.name, (tint, tint))
        place = row + event.depth - least
        axes.barh(place, event.length, left=event.start, height=0.9, color=colour, edgecolor="white", linewidth=0.6)
        rows.setdefault(place, []).append(event)
    for place, bars in rows.items():
        free = 0.0
        for bar, after in zip(bars, [*(bar.start for bar in bars[1:]), math.inf], strict=True):
            free = write(axes, bar, place, (free, after), beside=bool(colours))
    return max(rows) + 1


def write(axes: Axes, bar: Event, row: int, room: tuple[float, float], beside: bool) -> float:
    """A bar's name where it fits: in it, right or left of it, in one line or two; from when on its row is free."""
    name = bar.name.removeprefix("autograd::engine::evaluate_function: ")
    end = axes.get_xlim()[1]
    for label in (name, name.replace(" ", "\n", 1)):
        text = axes.text(0, row, label, ha="center", va="center", fontsize=FONT)
        width = (text.get_window_extent(axes.figure.canvas.get_renderer()).width + 8) / axes.bbox.width * end
        if width <= bar.length:
            text.set_x(bar.start + bar.length / 2)
            return bar.end
        if beside and width <= min(room[1], end) - bar.end:
            text.set_x(bar.end + width / 2)
            return bar.end + width
        if beside and width <= bar.start - room[0]:
            text.set_x(bar.start - width / 2)
            return bar.end
        text.remove()
    return bar.end


def panel(axes: Axes, outer: Event, ours: list[Event], torchs: list[Event], title: str) -> None:
    """genfast's ranges on top, torch's events below, over the time of one of them."""
    axes.set_xlim(0, outer.length)
    middle = draw(axes, inside(outer, ours), 0, COLOURS)
    last = draw(axes, [event for event in inside(outer, torchs) if event.depth < 3], middle, {})
    axes.set_ylim(last - 0.4, -0.6)
    axes.set_yticks([(middle - 1) / 2, (middle + last - 1) / 2], ["genfast's\nranges", "torch's\nevents"])
    axes.tick_params(axis="y", length=0)
    axes.axhline(middle - 0.5, color="black", linewidth=0.8)
    axes.xaxis.set_major_formatter("{x:g} ms")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11)


def picture(ours: list[Event], torchs: list[Event], target: Path) -> None:
    """The step that was disturbed least, and its backward pass at a larger scale."""
    step = min((event for event in ours if event.name == "step"), key=lambda event: event.length)
    data = [event for event in ours if event.name == "data" and event.end <= step.start][-1]
    backward = next(event for event in ours if event.name == "backward" and event.start >= step.start)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(15, 8.5), layout="constrained")
    # The layout first: what fits into a bar depends on it.
    figure.canvas.draw()
    whole = Event("", data.start, step.end - data.start)
    title = f"A training step of genfast.VAE on {BATCH} images, after its data (violet), on one CPU core"
    panel(top, whole, ours, torchs, title)
    panel(bottom, backward, ours, torchs, "Its backward pass")
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=TARGET)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace(path)
        ours, torchs = read(path)
    with replacing(arguments.out) as temporary:
        picture(ours, torchs, temporary)


if __name__ == "__main__":
    main()
