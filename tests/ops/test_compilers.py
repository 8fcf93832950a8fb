"""That the sources are C++ for compilers other than the one that builds them here."""

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++")
def test_clang_takes_the_cpu_sources():
    major, minor = runpy.run_path(str(ROOT / "dyhead/ops/torch_version.py"))["TORCH_MINIMUM"]
    target = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"
    includes = [f"-isystem{path}" for path in include_paths()]
    sources = map(str, sorted(ROOT.glob("csrc/cpu/*.cpp")))
    command = ["clang++", "-std=c++20", "-fsyntax-only", target, *includes, *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
