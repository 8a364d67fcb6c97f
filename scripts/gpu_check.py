"""The GPU check: tests, sanitizers, benchmarks and training on a CUDA device, in parts of less than nine minutes.

Each part writes NAME-PART.json and NAME-PART.log into the folder --out, NAME being the GPU's, and ends with a table;
--bench and --train also add their figures to NAME.json there, in the format of benchmarks/results/. --dry-run does the
same at toy sizes on a CPU, so that no typing error waits for a GPU. Without a part: all of them, one after another.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OPS = sorted(path.stem for path in (ROOT / "genfast" / "reference").glob("[!_]*.py"))
# Module, and what is missing without it.
NEEDED = {"torch": "everything", "triton": "the kernels", "numpy": "everything", "pytest": "--tests"}
WANTED = {
    "pytest_benchmark": "--bench and --train",
    "xdist": "parallel tests and compiles (pytest-xdist)",
    "mpmath": "--tests: oracles",
    "scipy": "--tests: statistics of the noise",
    "safetensors": "models: --train",
    "huggingface_hub": "models: --train",
    "torchvision": "--train: the tutorial and MNIST",
    "typer": "--train: the command line",
    "matplotlib": "--train: pictures",
    "nvtx": "ranges for Nsight (GENFAST_NVTX=1)",
}


@dataclass
class Step:
    """One command of a part, and how it ended."""

    name: str
    outcome: str = "not run"
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


class Part:
    """Runs the steps of one part within its time, keeping the log and the JSON up to date after each."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.machine = _machine()
        stem = f"{self.machine['file']}-{name}"
        self.json, self.log = options.out / f"{stem}.json", options.out / f"{stem}.log"
        self.steps: list[Step] = []
        self.end = time.monotonic() + options.limit
        self.log.write_text("")

    def run(self, name: str, command: list[str], env: dict[str, str] | None = None, tests: bool = False) -> Step:
        """Run a command, its output shown and logged; it is stopped when the part's time is over."""
        step = Step(name)
        self.steps.append(step)
        left = self.end - time.monotonic()
        if left < 5:
            step.outcome = "no time left"
            self.save()
            return step
        started = time.monotonic()
        print(f"== {name}: {' '.join(command)}", flush=True)
        with tempfile.TemporaryDirectory() as folder, self.log.open("a") as log:
            report = Path(folder) / "report.xml"
            if tests:
                command = [*command, f"--junitxml={report}"]
            print(f"== {name}: {' '.join(command)}", file=log, flush=True)
            code, output = _run(command, {**os.environ, **(env or {})}, left, log)
            step.outcome = "ok" if code == 0 else f"failed (exit code {code})"
            # 124 and 137 are what `timeout` makes of it; 137 alone may also be a lack of memory.
            if code in (124, 137) and time.monotonic() - started > left - 15:
                step.outcome = "stopped at the time limit"
            if tests and report.exists():
                step.figures |= _counts(report)
                if code == 5:
                    step.outcome = "failed (no test ran)"
        for line in output.splitlines():
            if line.startswith("FIGURES "):
                step.figures |= json.loads(line.removeprefix("FIGURES "))
        step.seconds = round(time.monotonic() - started, 1)
        self.save()
        return step

    def save(self) -> None:
        from genfast._files import replacing

        content = {"part": self.name, **self.machine, "steps": [asdict(step) for step in self.steps]}
        with replacing(self.json) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")

    def finish(self) -> int:
        """Print the table; returns the number of steps that did not end well."""
        width = max(len(step.name) for step in self.steps)
        print(f"\n{self.name} on {self.machine['machine']}, torch {self.machine['torch']}: {self.json}")
        for step in self.steps:
            figures = "  ".join(f"{name} {value}" for name, value in step.figures.items())
            print(f"  {step.name:{width}}  {step.seconds:7.1f} s  {step.outcome:28}  {figures}")
        return sum(not step.outcome.startswith(("ok", "not available")) for step in self.steps)


def _run(command: list[str], env: dict[str, str], seconds: float, log: IO[str]) -> tuple[int, str]:
    """(exit code, output), the output also shown and logged while it comes."""
    process = subprocess.Popen(
        ["timeout", "--kill-after=10", str(int(seconds)), *command], cwd=ROOT, env=env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        log.write(line)
        print(line, end="", flush=True)
    return process.wait(), "".join(lines)


def _counts(report: Path) -> dict[str, int]:
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {"passed": 2 * counts["tests"] - sum(counts.values()), **{name: counts[name] for name in list(counts)[1:]}}


def _machine() -> dict[str, str]:
    import torch

    from genfast.bench.machine import machine_name
    from genfast.bench.results import Results

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = machine_name(device)
    file = Results(name, device.type).file_name.removesuffix(".json")
    return {"machine": name, "file": file, "kind": device.type, "torch": torch.__version__}


def _missing() -> list[str]:
    found = {name: importlib.util.find_spec(name) is not None for name in (*NEEDED, *WANTED)}
    lines = [f"missing: {name}, needed for {use}" for name, use in NEEDED.items() if not found[name]]
    for line in lines + [f"missing: {name}, for {use}" for name, use in WANTED.items() if not found[name]]:
        print(line)
    return lines


def _pytest(*arguments: str, workers: int = 0) -> list[str]:
    parallel = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parallel, *arguments]


def _own(what: str) -> list[str]:
    return [sys.executable, str(Path(__file__)), "--inner", what]


def tests(options: argparse.Namespace) -> int:
    """Noise against the CPU, the op matrix on the device alone, what needs much memory, and two processes' bits."""
    part = Part("tests", options)
    # The CPU has had its turn in CI.
    env = {"GENFAST_TEST_DEVICES": "cpu" if options.dry_run else "cuda"}
    toy = ["-k", "kl_normal and matches"] if options.dry_run else []
    files = ["functional", "test_random.py", "test_philox_kernel.py", "test_register.py", "test_profiling.py"]
    files += ["bench/test_timing.py", "bench/test_chains.py", "flows/test_linear.py"]
    part.run("noise, GPU against CPU", _own("noise"), _toy(options))
    workers = min(8, (os.cpu_count() or 1) // 2)
    # What cannot be imported for want of a package is an error, and the rest runs all the same.
    matrix = _pytest(*(f"tests/{file}" for file in files), *toy, "--continue-on-collection-errors", workers=workers)
    part.run("op matrix", matrix, env, tests=True)
    part.run("full sizes", _pytest("tests/gpu", "-rs"), {**env, **_toy(options)}, tests=True)
    first, second = (part.run(f"bits of run {run}", _own("digest"), _toy(options)) for run in (1, 2))
    if first.outcome == second.outcome == "ok" and first.figures != second.figures:
        second.outcome = "failed (other bits than run 1)"
        part.save()
    return part.finish()


def sanitize(options: argparse.Namespace) -> int:
    """compute-sanitizer's memcheck and racecheck over every op at a few odd shapes."""
    part = Part("sanitize", options)
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    part.run("every op, without the tool", _own("exercise"), _toy(options))
    if tool is None:
        part.steps.append(Step("compute-sanitizer", "not available: it is not installed"))
        part.save()
        return part.finish()
    probe = part.run("does the tool work here", [tool, "--tool", "memcheck", *_own("probe")])
    if probe.outcome != "ok":
        probe.outcome = "not available: the tool does not work here (see the log)"
        part.save()
        return part.finish()
    # The caching allocator would hide an access past the end of a tensor inside its own blocks.
    for check, env in (("memcheck", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}), ("racecheck", {})):
        part.run(check, [tool, "--tool", check, "--error-exitcode", "9", *_own("exercise")], env | _toy(options))
    return part.finish()


def bench(options: argparse.Namespace) -> int:
    """The benchmarks of some ops (all if none), all chains: compiled in parallel, then timed one by one.

    What --out has from this code and these versions is not timed again, so a run that was stopped is continued.
    """
    part = Part("bench", options)
    results = _results(part, options)
    figures = [f"--results={results}", "--resume", "--benchmark-only"]
    selection = ["--benchmark-columns=median,iqr,rounds", "--chains=all", "--places=all"]
    if options.more_sizes:
        selection.append("--more-sizes")
    if options.dry_run:
        selection += ["-k", "(128x20 or 128x784) and bf16"]
    for op in options.bench or OPS:
        file = f"benchmarks/bench_{op}.py"
        _compile(part, op, [file, f"--results={results}", "--resume", *selection[1:]])
        part.run(f"{op}: times", _pytest(file, *figures, *selection), tests=True)
    _show(results)
    return part.finish()


def _compile(part: Part, name: str, selection: list[str]) -> None:
    """Fill the compilers' caches in parallel, where there are cores for it."""
    workers = min(8, (os.cpu_count() or 1) // 2)
    if workers > 1 and importlib.util.find_spec("xdist"):
        command = _pytest("--benchmark-disable", "--compile-only", *selection, workers=workers)
        part.run(f"{name}: compiles", command, tests=True)


def train(options: argparse.Namespace) -> int:
    """The tutorial, `genfast train` to the end on the bundled digits (and on MNIST if it is there), training steps.

    MNIST is looked for in $GENFAST_DATA and data/, as the four .gz files that it is published as.
    """
    part = Part("train", options)
    results = _results(part, options)
    figures = [f"--results={results}", "--benchmark-only", "--benchmark-columns=median,iqr,rounds"]
    toy = ["-k", "vae-fp32-128-mlp or eager-fp32-128-mlp-vae or own"] if options.dry_run else []
    epochs = ["--epochs", "1"] if options.dry_run else []
    with tempfile.TemporaryDirectory() as folder:
        runs = {"digits": [*epochs]}
        root = _mnist(Path(folder))
        tutorial = None if root is None or options.dry_run else {**os.environ, "GENFAST_DATA": str(root)}
        part.run("tutorial", _pytest("benchmarks/bench_tutorial.py", *figures, *toy), tutorial, tests=True)
        if root is not None:
            runs["mnist"] = ["--data", "mnist", "--data-root", str(root), *(epochs or ["--epochs", "10"])]
        for data, arguments in runs.items():
            # Mode auto is one CUDA graph a step.
            for extra in ([], ["--mode", "eager"], ["--compile"]):
                out = Path(folder) / f"{data}{len(extra)}"
                command = [sys.executable, "-m", "genfast", "train", "vae", *arguments, *extra, "--out", str(out)]
                step = part.run(" ".join(["genfast train vae,", data, *extra]), command)
                if step.outcome == "ok":
                    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                    step.figures |= {"test_loss": round(rows[-1]["test_loss"], 2)}
                    step.figures |= {"images_per_second": round(max(row["images_per_second"] for row in rows))}
                    part.save()
    part.run("noise", _pytest("benchmarks/bench_noise.py", *figures), tests=True)
    if not options.dry_run:
        # What diffusion adds to a step, a sampling loop, flows (a step beside normflows', memory over depth), and GANs.
        for name in ("noising_and_loss", "sampling", "flow_step", "flow_memory", "gan_step"):
            part.run(name, _pytest(f"benchmarks/bench_{name}.py", *figures), tests=True)
    # Last, since it compiles the most, and keeps what it has when the time is over.
    steps = ["benchmarks/bench_training_step.py", *toy]
    _compile(part, "training step", steps)
    part.run("training step", _pytest(*steps, *figures), tests=True)
    _show(results)
    return part.finish()


def _results(part: Part, options: argparse.Namespace) -> Path:
    """Where figures are added: to what is in --out already, else to what the repository has of this machine."""
    path = options.out / f"{part.machine['file']}.json"
    committed = RESULTS / path.name
    if not path.exists() and committed.exists() and not options.dry_run:
        shutil.copy(committed, path)
    return path


def _show(results: Path) -> None:
    from genfast.bench.results import Results, markdown

    if results.exists():
        print(markdown([Results.load(results)]))


def _mnist(folder: Path) -> Path | None:
    """torchvision's layout unpacked from the .gz files in GENFAST_DATA or data/, if they are there."""
    names = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    for source in (os.environ.get("GENFAST_DATA"), ROOT / "data"):
        if source is None:
            continue
        packed = [next(iter(Path(source).rglob(f"{name}.gz")), None) for name in names]
        if None in packed:
            continue
        raw = folder / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name, path in zip(names, packed, strict=True):
            with gzip.open(path) as file:
                (raw / name).write_bytes(file.read())
        return folder
    return None


def _toy(options: argparse.Namespace) -> dict[str, str]:
    return {"GENFAST_CHECK_TOY": "1"} if options.dry_run else {}


def _figures(**values: Any) -> None:
    print(f"FIGURES {json.dumps(values)}")


def inner_noise() -> None:
    """Normals and uniforms of one seed on the GPU and on the CPU."""
    import torch

    from genfast.cases import TOLERANCES
    from genfast.check import path_taken
    from genfast.random import Stream, normal, uniform

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = 64 if os.environ.get("GENFAST_CHECK_TOY") else 8192
    seed = torch.tensor([-7234567890123456789])
    exact, ours = (normal(where, rows, 4096, Stream.LATENT) for where in (seed, seed.to(device)))
    difference = (ours.cpu().double() - exact.double()).abs()
    equal = torch.equal(*(uniform(where, rows, 4096, Stream.PIXEL).cpu() for where in (seed, seed.to(device))))
    shares = {f"beyond {limit:g}": float((difference > limit).double().mean()) for limit in (1e-6, 1e-5, 1e-4)}
    excess = TOLERANCES[path_taken(device, torch.float32)][torch.float32].excess(ours.cpu(), exact)
    _figures(normals=difference.numel(), largest=float(difference.max()), **shares, uniforms_equal=equal, excess=excess)
    if not equal or excess > 1:
        sys.exit("the noise of the GPU is not that of the CPU")


def _exercised(shapes: tuple[tuple[int, ...], ...]):
    """Every op at some shapes, forward and backward; with few settings, since each combination is compiled."""
    import torch

    from genfast.cases import CASES, run

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for case in (case for case in CASES if case.setting in ("", "uint8", "mean", "clamp")):
        for dtype in (torch.float32, torch.bfloat16):
            for shape in shapes:
                inputs = case.inputs(shape, dtype, device, torch.Generator().manual_seed(0))
                yield run(case, "fused", inputs)


def inner_digest() -> None:
    """A digest of the bits of every op's outputs and gradients."""
    import torch

    digest = hashlib.sha256()
    for outputs, grads in _exercised(((33, 300), (3, 4100))):
        for tensor in (*outputs, *grads.values()):
            digest.update(tensor.reshape(-1).cpu().view(torch.uint8).numpy().tobytes())
    _figures(digest=digest.hexdigest()[:16])


def inner_exercise() -> None:
    """Odd shapes: ends of rows, ends of tiles, channels."""
    import torch

    shapes = ((1, 1), (7, 20), (3, 2049), (2, 4, 5, 5))
    count = sum(1 for _ in _exercised(shapes[: 2 if os.environ.get("GENFAST_CHECK_TOY") else None]))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    _figures(calls=count)


def inner_probe() -> None:
    import torch

    print(torch.ones(10, device="cuda").sum().item())


PARTS = {"tests": tests, "sanitize": sanitize, "bench": bench, "train": train}
INNER = {"noise": inner_noise, "digest": inner_digest, "exercise": inner_exercise, "probe": inner_probe}


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__)
    for name, function in PARTS.items():
        if name == "bench":
            parser.add_argument("--bench", nargs="*", choices=OPS, metavar="OP", help=function.__doc__)
        else:
            parser.add_argument(f"--{name}", action="store_true", help=function.__doc__)
    parser.add_argument("--more-sizes", action="store_true", help="with --bench: also sizes between the three")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of what is written (gpu-check)")
    parser.add_argument("--limit", type=int, default=520, help="seconds after which a part is stopped (520)")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, and a CPU will do")
    parser.add_argument("--inner", choices=INNER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        INNER[options.inner]()
        return 0
    if _missing():
        return 2
    import torch

    if not torch.cuda.is_available() and not options.dry_run:
        print("no CUDA device: --dry-run does the same at toy sizes on the CPU")
        return 2
    chosen = [name for name in PARTS if getattr(options, name) not in (None, False)] or list(PARTS)
    if options.limit < 10:
        parser.error(f"--limit: expected at least 10 seconds, got {options.limit}")
    options.out = Path(os.environ.get("GENFAST_CHECK_FROM", "."), options.out).resolve()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: expected a folder, got {options.out} ({error.strerror})")
    return int(sum(PARTS[name](options) for name in chosen) > 0)


if __name__ == "__main__":
    sys.exit(main())
