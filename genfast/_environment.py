"""What decides once, at import, whether kernels can run in this process."""

from __future__ import annotations

import importlib.util
import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORCE_REFERENCE = os.environ.get("GENFAST_REFERENCE") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
