#!/usr/bin/env bash
# Everything that needs a GPU, in one command of eight minutes: builds the operator in place, runs its tests, the
# benchmarks and the sanitizers, and leaves gpu_check.json and gpu_check.txt in a folder; they tell everything, what the
# parts printed and wrote is in its folder parts. Needs nvcc, a C++ compiler, and a Python with torch, setuptools and
# pytest (what PYTHONPATH names counts); no network. Says what else is absent, or had too little time, and goes on.
#
# Usage: tools/gpu_check.sh [FOLDER]        (default: $OUT, or output/gpu_check; $PYTHON names another Python)
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" tools/gpu_check.py "${1:-${OUT:-output/gpu_check}}"
