"""What a result depends on besides the code: the machine, its clocks, and the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from typing import Any

import torch

from genfast.bench.timing import Stopwatch
from genfast.functional._register import digest

__all__ = ["describe_run", "machine_name"]

_CLOCKS = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "temperature.gpu": "celsius", "driver_version": "driver"}
_INDUCTOR = ("max_autotune", "coordinate_descent_tuning", "fallback_random", "use_fast_math", "combo_kernels")


def machine_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        import cpuinfo

        return cpuinfo.get_cpu_info().get("brand_raw") or platform.machine()
    except ImportError:
        return platform.machine()


def describe_run(stopwatch: Stopwatch) -> dict[str, Any]:
    """The copy bandwidth (bytes/s), measured now, and all that the figures of a run depend on.

    Example:
        >>> run = describe_run(Stopwatch("cpu"))
        >>> run["copy_bandwidth"] > 0, "torch" in run
        (True, True)
    """
    run: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "copy_bandwidth": float(f"{stopwatch.copy_bandwidth():.4g}"),
        "source": digest(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "inductor": _inductor_flags(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if stopwatch.cuda:
        # Right after the copies, so that these are the clocks of a busy device.
        run |= _nvidia_smi(stopwatch.device)
    return run


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _inductor_flags() -> dict[str, Any]:
    from torch._inductor import config

    flags = {name: getattr(config, name) for name in _INDUCTOR if hasattr(config, name)}
    # Switches alone: a path to a cache changes no figure.
    switches = {name: value for name, value in os.environ.items() if name.startswith("TORCHINDUCTOR_")}
    return flags | {name: value for name, value in sorted(switches.items()) if os.sep not in value}


def _nvidia_smi(device: torch.device) -> dict[str, Any]:
    # By its own name: CUDA_VISIBLE_DEVICES gives other numbers than nvidia-smi has.
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={name}", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = dict(zip(_CLOCKS.values(), (value.strip() for value in printed.strip().split(",")), strict=False))
    return {name: int(value) if value.isdecimal() else value for name, value in values.items()}
