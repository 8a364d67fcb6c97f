"""Images per second of `genfast.fit` on a CPU: one process with N threads, and N processes (DDP, gloo) with one each.

    python benchmarks/bench_ranks.py [--processes 2] [--batches 128 512 2048] [--repeats 5] [--write ranks.json]

The two take turns, each time in new processes, so that both meet the same load of the machine. Not for pytest: its
timings are of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import genfast
from genfast._files import replacing
from genfast.bench.machine import machine_name
from genfast.training import launched

ROOT = Path(__file__).parents[1]
# Images of an epoch: some steps at any batch size.
IMAGES, EPOCHS = 8192, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="N; one for each core of the machine")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512, 2048], help="of all processes together")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", type=Path, help="the figures as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.batches)
        return
    taken: dict[str, list[dict[str, Any]]] = {"one": [], "many": []}
    for repeat in range(options.repeats):
        print(f"repeat {repeat + 1} of {options.repeats}", file=sys.stderr)
        taken["one"].append(measure(options, processes=1))
        taken["many"].append(measure(options, processes=options.processes))
    results = {
        "machine": machine_name(torch.device("cpu")), "torch": torch.__version__, "cpus": os.cpu_count(),
        "model": "VAE 784-400-20", "processes": options.processes, "samples": taken,
        "batches": {batch: summary(taken, str(batch)) for batch in options.batches},
    }  # fmt: skip
    if options.write is not None:
        with replacing(options.write) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


def measure(options: argparse.Namespace, processes: int) -> dict[str, Any]:
    """What `work` prints, by batch size, in `processes` new processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, __file__, "--worker", "--batches", *map(str, options.batches)]
    threads = str(options.processes // processes)
    environment = {
        **os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def work(batches: list[int]) -> None:
    """Train at each batch size; the first process prints images per second, the first epoch left out."""
    with launched("cpu"):
        load = os.getloadavg()[0]
        images = torch.randint(0, 256, (IMAGES, 1, 28, 28), dtype=torch.uint8)
        found = {}
        for batch in batches:
            torch.manual_seed(0)
            rows = genfast.fit(genfast.VAE(), images, batch_size=batch, epochs=EPOCHS, seed=0, progress=False)[1:]
            whole = len(images) - len(images) % batch
            found[batch] = len(rows) * whole / sum(row["seconds"] for row in rows)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps({**found, "load": load, "threads": torch.get_num_threads()}))


def summary(taken: dict[str, list[dict[str, Any]]], batch: str) -> dict[str, Any]:
    """Medians, and of the ratios of neighbours in time also the extremes."""
    one, many = ([sample[batch] for sample in taken[name]] for name in ("one", "many"))
    ratios = [b / a for a, b in zip(one, many, strict=True)]
    return {
        "one": statistics.median(one), "many": statistics.median(many), "ratio": statistics.median(ratios),
        "lowest": min(ratios), "highest": max(ratios),
    }  # fmt: skip


def show(results: dict[str, Any]) -> None:
    n, samples = results["processes"], results["samples"]
    loads = [sample["load"] for group in samples.values() for sample in group]
    print(
        f"{results['machine']}, {results['cpus']} CPUs, torch {results['torch']}, {results['model']}, "
        f"median of {len(samples['one'])}, load {min(loads):.1f} to {max(loads):.1f}\n"
    )
    print(f"| global batch | 1 process, {n} threads: images/s | {n} processes, 1 thread each: images/s | ratio |")
    print("|---|---|---|---|")
    for batch, row in results["batches"].items():
        ratio = f"{row['ratio']:.2f} [{row['lowest']:.2f}, {row['highest']:.2f}]"
        print(f"| {batch} | {row['one']:,.0f} | {row['many']:,.0f} | {ratio} |")


if __name__ == "__main__":
    main()
