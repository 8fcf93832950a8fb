#!/usr/bin/env bash
# Runs the operator's tests, those of the emulated CUDA kernels too, with the libraries built under AddressSanitizer and
# UndefinedBehaviorSanitizer, in a copy of the package in build/sanitize; and those of the emulated kernels once more,
# watched for races (csrc/emulation/races.h). Needs GCC. Usage: tools/sanitize.sh [PYTHON [PYTEST ARGUMENT ...]]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$(command -v "${1:-python3}")")
export CC=gcc CXX=g++
export OMP_WAIT_POLICY=passive  # threads that wait leave the processors to the other processes
parallel="-n auto --maxprocesses 8 --dist worksteal"

# Types that differ in little are left out, and the largest cases but for the type with the most slices.
DYHEAD_RACES=1 "$python" -m pytest -q -p no:cacheprovider $parallel tests/ops/test_races.py tests/ops/test_cuda.py -m "not cuda" \
  -k "races or agree or (emulation and ((tf32 and 264) or ((float32 or bfloat16) and not 264)))" "${@:2}"

copy=build/sanitize
rm -rf "$copy"
mkdir -p "$copy/tests"
cp -r setup.py pyproject.toml csrc dyhead "$copy"
cp -r tests/conftest.py tests/ops "$copy/tests"
cd "$copy"
rm -f dyhead/_C*

# -O1: all inner loops as vector code, at a bearable speed.
flags="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer -O1"
export DYHEAD_CXX_FLAGS=$flags
FORCE_CUDA=0 "$python" setup.py -q build_ext --inplace
"$python" -m tests.ops.emulation

# Python itself is not instrumented, so the runtime is loaded before it; what Python leaks on exit is not ours.
# test_library.py is about processes without the library, test_registration.py about compilers. The emulation's largest
# cases are left out, and types that differ in little.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
exec "$python" -m pytest -q -p no:cacheprovider $parallel tests/ops/test_kernel.py tests/ops/test_definition.py tests/ops/test_arguments.py \
  tests/ops/test_border.py tests/ops/test_regions.py tests/ops/test_cuda.py -k "not (emulation and (264 or tf32 or float64))" "${@:2}"
