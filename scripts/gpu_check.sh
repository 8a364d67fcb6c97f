#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine: torch, triton and pytest, no installation, no network. See --help.
set -euo pipefail
export GENFAST_CHECK_FROM="$PWD"
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" scripts/gpu_check.py "$@"
