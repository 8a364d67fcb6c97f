"""Draw docs/flow-memory.png: what a flow's forward pass keeps for its backward, and a step's time, over depth.

Flows of affine couplings as in benchmarks/bench_flow_memory.py.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from genfast._files import replacing

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "flow-memory.png"
DEPTHS = (4, 8, 16, 32, 64)
ROUNDS = 7
COLOURS = {"ordinary": "#8a94a6", "checkpoint": "#d9822b", "reversible": "#2f7fd1"}
LABELS = {"ordinary": "ordinary", "checkpoint": "torch.utils.checkpoint", "reversible": "reversible"}


def _benchmark():
    spec = importlib.util.spec_from_file_location("bench_flow_memory", ROOT / "benchmarks" / "bench_flow_memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(bench) -> list[dict]:
    rows = []
    for depth in DEPTHS:
        flows = {memory: bench.make_flow(depth, memory) for memory in bench.MEMORY}
        steps = {memory: bench.make_step(flow) for memory, flow in flows.items()}
        times: dict[str, list[float]] = {memory: [] for memory in flows}
        # In turns, so that a busier moment meets all of them.
        for _ in range(ROUNDS + 1):
            for memory, step in steps.items():
                _wait(bench.DEVICE)
                start = time.perf_counter()
                step()
                _wait(bench.DEVICE)
                times[memory].append(time.perf_counter() - start)
        for memory, flow in flows.items():
            row = {"depth": depth, "memory": memory, "saved_bytes": bench.kept(flow)}
            rows.append({**row, "seconds": statistics.median(times[memory][1:])})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def draw(rows: list[dict], shape: tuple[int, ...]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.4), layout="constrained")
    for memory, colour in COLOURS.items():
        own = [row for row in rows if row["memory"] == memory]
        depths = [row["depth"] for row in own]
        left.plot(depths, [row["saved_bytes"] / 2**20 for row in own], "o-", color=colour, label=LABELS[memory])
        right.plot(depths, [1000 * row["seconds"] for row in own], "o-", color=colour, label=LABELS[memory])
    left.set(ylabel="MiB kept for backward", yscale="log")
    right.set(ylabel="ms per step", yscale="log")
    for axes in (left, right):
        axes.set(xlabel="couplings", xscale="log", xticks=DEPTHS)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"flows of affine couplings, batch of {'x'.join(map(str, shape))}", fontsize=10)
    with replacing(TARGET) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    print(TARGET)


def main() -> None:
    bench = _benchmark()
    rows = measure(bench)
    draw(rows, bench.SHAPE)


if __name__ == "__main__":
    main()
