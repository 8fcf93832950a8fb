"""Builds the CUDA operators for the host: torch.ops.dyhead_emulated, on CPU tensors, without a GPU or CUDA toolkit.

`python -m tests.ops.emulation` only builds them. With DYHEAD_RACES=1 in the environment all accesses to memory are
watched for races (csrc/emulation/races.h), which takes a multiple of the time.
"""

import fcntl
import hashlib
import os
import runpy
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS, EMULATION = ROOT / "csrc" / "cuda", ROOT / "csrc" / "emulation"


def build() -> Path:
    """Compiles what csrc/cuda holds with the C++ compiler into build/emulation, if anything changed."""
    from torch.utils.cpp_extension import include_paths, library_paths

    # By itself: the package would load its library, which a sanitizer may keep from loading.
    major, minor = runpy.run_path(str(ROOT / "dyhead/ops/torch_version.py"))["TORCH_MINIMUM"]
    flags = [
        "-std=c++20",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-unknown-pragmas",
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
    ]
    flags += shlex.split(os.environ.get("DYHEAD_CXX_FLAGS", "-O2"))
    flags += [f"-isystem{path}" for path in include_paths()]
    # Of kernels only: what the emulation itself does is no kernel's.
    watch = ["-fsanitize=thread"] if os.environ.get("DYHEAD_RACES") == "1" else []
    compiler = os.environ.get("CXX", "c++")
    key = hashlib.sha256(" ".join([compiler, *flags, *watch]).encode()).hexdigest()[:12]
    folder = ROOT / "build" / "emulation" / key
    folder.mkdir(parents=True, exist_ok=True)
    kernels = [*sorted(set(KERNELS.glob("*.cu")) - {KERNELS / "library.cu"}), Path(__file__).with_name("emulated.cpp")]
    sources = [*kernels, *sorted(EMULATION.glob("*.cpp"))]
    newest = max(file.stat().st_mtime for file in [*ROOT.glob("csrc/**/*.h"), *sources, Path(__file__)])
    library = folder / "libdyhead_emulated.so"
    # One process at a time, where several run the tests.
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists() and library.stat().st_mtime > newest:
            return library

        def run(*command: object) -> None:
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stderr}")

        objects = [folder / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = [
                (compiler, *flags, *(watch if source in kernels else ()), "-x", "c++", "-c", source, "-o", object)
                for source, object in zip(sources, objects, strict=True)
            ]
            list(pool.map(lambda command: run(*command), commands))
        libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
        run(compiler, "-shared", *flags, *objects, *libraries, "-o", library)
        return library


def load() -> None:
    """Registers torch.ops.dyhead_emulated."""
    import torch

    torch.ops.load_library(str(build()))


if __name__ == "__main__":
    print(build())
