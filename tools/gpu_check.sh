#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than nine minutes: builds the operator in place, runs its tests,
# the sanitizers and the benchmarks, and leaves gpu_check.json and gpu_check.txt in a folder. Needs nvcc, a C++ compiler,
# and a Python with torch, setuptools and pytest; no network. Says what else is absent and goes on.
#
# Usage: tools/gpu_check.sh [FOLDER]        (default: $OUT, or output/gpu_check; $PYTHON names another Python)
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" tools/gpu_check.py "${1:-${OUT:-output/gpu_check}}"
