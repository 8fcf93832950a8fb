"""Builds the CUDA operators for the host: torch.ops.dyhead_emulated, on CPU tensors, without a GPU or CUDA toolkit."""

import os
import shlex
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def load() -> None:
    """Compiles what csrc/cuda holds with the C++ compiler into build/emulation, where it changed, and loads it."""
    from torch.utils import cpp_extension

    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [ROOT / "csrc" / "cuda" / "emulation.cpp", Path(__file__).parent / "cuda_emulation.cpp"]
    # A .cu file would be given to nvcc.
    for kernel in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        if kernel.name != "library.cu":
            source = folder / f"{kernel.stem}.cpp"
            text = f'#include "{kernel}"\n'
            if not source.exists() or source.read_text() != text:
                source.write_text(text)
            sources.append(source)
    flags = shlex.split(os.environ.get("DYHEAD_CXX_FLAGS", "-O2"))
    cpp_extension.load(
        "dyhead_emulated",
        [str(source) for source in sources],
        extra_cflags=[*flags, "-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020b000000000000"],
        extra_ldflags=flags,
        build_directory=str(folder),
        is_python_module=False,
    )
    assert hasattr(torch.ops.dyhead_emulated, "pyramid_deform_conv2d")
