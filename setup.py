"""Builds the operator. The package's metadata is in pyproject.toml.

Two libraries: dyhead/_C (CPU; needs a C++ compiler only) and dyhead/_C_cuda (CUDA; needs nvcc as well). Both use the
stable ABIs of PyTorch and Python, so that a build runs with the PyTorch that dyhead/ops/torch_version.py names, with
Python 3.10, and with all newer ones. Without a C++ compiler neither is built, and a wheel is one for any machine, on
which plain PyTorch computes the operator and a warning says so. Environment variables, as PyTorch's extensions have
them:

    DYHEAD_PURE_PYTHON=1   build no library although there is a compiler
    FORCE_CUDA=1 / 0       build the CUDA library although no CUDA device is found / do not, although one is
    CUDA_HOME              the CUDA toolkit (default: the one that the nvcc on PATH belongs to)
    TORCH_CUDA_ARCH_LIST   compute capabilities to compile for (default: 8.0+PTX;9.0a)
    MAX_JOBS               compilers at a time
    DYHEAD_CXX_FLAGS       more flags for the C++ compiler and linker, for example -fsanitize=address

`python setup.py compile_cuda` compiles and links all of csrc/cuda into build/ and installs nothing: a check for
machines that have an nvcc and no GPU. It prints what every kernel takes, and fails where one spills registers, or waits
before a product for loads that should arrive while it multiplies (tools/machine_code.py).
"""

import contextlib
import glob
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def find_cuda_home() -> str | None:
    """The CUDA toolkit, seen through a wrapper script: the folder above such a one, PyTorch's own guess, is none."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    if named or nvcc is None:
        return named or None
    listing = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", listing.stderr, re.MULTILINE)
    return os.path.normpath(top.group(1).strip()) if top else None


# Before torch.utils.cpp_extension is imported, which reads both once.
if CUDA_HOME := find_cuda_home():
    os.environ["CUDA_HOME"] = CUDA_HOME
# 9.0a, because products of warp groups belong to that machine alone.
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")

import torch  # noqa: E402
from setuptools import Extension, setup  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths  # noqa: E402

TORCH_TARGET = runpy.run_path("dyhead/ops/torch_version.py")["TORCH_MINIMUM"]
TARGET_MACRO = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
EXTRA = shlex.split(os.environ.get("DYHEAD_CXX_FLAGS", ""))
CXX_FLAGS = ["-O3", "-fvisibility=hidden", "-Wno-psabi", TARGET_MACRO, *EXTRA]
NVCC_FLAGS = ["-O3", "-lineinfo", "-DUSE_CUDA", TARGET_MACRO, "--compiler-options", "-fvisibility=hidden"]


def cpu_extension() -> Extension:
    """dyhead._C: the operator's schema, its CPU kernels and build_info()."""
    return Extension(
        "dyhead._C",
        ["csrc/library.cpp", *sorted(glob.glob("csrc/cpu/**/*.cpp", recursive=True))],
        depends=glob.glob("csrc/**/*.h", recursive=True),
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["c10", "torch", "torch_cpu"],
        extra_compile_args={"cxx": [*CXX_FLAGS, f'-DDYHEAD_FLAGS="{" ".join(["-O3", *EXTRA])}"']},
        extra_link_args=EXTRA,
        language="c++",
        py_limited_api=True,
    )


def cuda_extension(*flags: str) -> Extension:
    """dyhead._C_cuda: the CUDA kernels; `flags` are more ones for nvcc."""
    torch_libraries = library_paths(device_type="cuda")
    found = {os.path.basename(file) for folder in torch_libraries for file in glob.glob(f"{folder}/lib*.so")}
    return Extension(
        "dyhead._C_cuda",
        cuda_kernels(),
        depends=glob.glob("csrc/**/*.h", recursive=True),
        include_dirs=include_paths(device_type="cuda"),
        library_dirs=torch_libraries,
        # A PyTorch without CUDA has no libtorch_cuda to link with, but can still compile for one that has.
        libraries=["c10", "torch", "torch_cpu", *(["c10_cuda", "torch_cuda"] if "libtorch_cuda.so" in found else [])],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": [*NVCC_FLAGS, *flags]},
        # By name, because a toolkit from pip holds only the versioned library.
        extra_link_args=[f"-l:{cuda_runtime(torch_libraries)}"],
        language="c++",
        py_limited_api=True,
    )


def cuda_runtime(folders: list[str]) -> str:
    """The file name of the CUDA runtime library to link with."""
    for pattern in ("libcudart.so", "libcudart.so.*"):
        for folder in folders:
            if found := sorted(glob.glob(os.path.join(folder, pattern))):
                return os.path.basename(found[0])
    return "libcudart.so"


def cuda_kernels() -> list[str]:
    """The CUDA sources of the operator."""
    return sorted(glob.glob("csrc/cuda/*.cu"))


def with_cuda() -> bool:
    """Whether to build the CUDA library."""
    wish = os.environ.get("FORCE_CUDA")
    if wish == "0":
        return False
    return CUDA_HOME is not None and (wish == "1" or torch.cuda.is_available())


def with_libraries() -> bool:
    """Whether to build any library."""
    if os.environ.get("DYHEAD_PURE_PYTHON", "0") != "0":
        return False
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if shutil.which(compiler) or shutil.which("g++") or shutil.which("clang++"):
        return True
    print(f"dyhead: no C++ compiler ({compiler}) found: plain PyTorch will compute the operator", file=sys.stderr)
    return False


class BuildPython(build_py):
    """Puts the config files into the package, where commands find them that do not run in a checkout."""

    def run(self) -> None:
        """Copies the package, and configs/ into it."""
        super().run()
        if not self.editable_mode:
            for source, target in self._configs():
                self.mkpath(os.path.dirname(target))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """The files that are written."""
        return super().get_outputs(include_bytecode) + [target for _, target in self._configs()]

    def _configs(self) -> list[tuple[str, str]]:
        """Where each file is, and where it goes."""
        files = [file for kind in ("yaml", "py") for file in glob.glob(f"configs/**/*.{kind}", recursive=True)]
        return [(file, os.path.join(self.build_lib, "dyhead", file)) for file in sorted(files)]


class Build(BuildExtension):
    """Says once what is built and with what."""

    def run(self) -> None:
        """Builds the extensions."""
        names = ", ".join(extension.name for extension in self.extensions)
        cuda = f"CUDA {CUDA_HOME}, architectures {os.environ['TORCH_CUDA_ARCH_LIST']}"
        reason = "no CUDA toolkit and device, or FORCE_CUDA=0"
        has_cuda = any(extension.name.endswith("cuda") for extension in self.extensions)
        print(
            f"dyhead: building {names} for PyTorch >= {TORCH_TARGET[0]}.{TORCH_TARGET[1]} with the headers of "
            f"{torch.__version__}, Python {platform.python_version()}, flags {' '.join(CXX_FLAGS)}; "
            + (cuda if has_cuda else f"without CUDA ({reason})"),
            file=sys.stderr,
        )
        super().run()
        if self.inplace:
            self._remove_others()

    def _remove_others(self) -> None:
        """Removes earlier builds under other names, which Python or dyhead.ops might load instead."""
        built = {os.path.basename(self.get_ext_filename(extension.name)) for extension in self.extensions}
        for stem in {file.partition(".")[0] for file in built}:
            for path in glob.glob(f"dyhead/{stem}.*.so"):
                if os.path.basename(path) not in built:
                    print(f"dyhead: removing the earlier build {path}", file=sys.stderr)
                    os.remove(path)


class CompileCuda(Build):
    """Compiles and links all of csrc/cuda into build/, whatever devices there are, and installs nothing."""

    description = "compile and link the CUDA sources into build/, as a check"

    def finalize_options(self) -> None:
        """Replaces the extensions and the folder to build into."""
        if CUDA_HOME is None:
            sys.exit("compile_cuda: expected an nvcc on PATH or CUDA_HOME, found neither")
        self.build_lib, self.build_temp, self.inplace = "build/cuda", "build/cuda/objects", False
        self.code = Path(self.build_temp, "code").absolute()
        self.distribution.ext_modules = [cuda_extension("-Xptxas=-v", "--keep", f"--keep-dir={self.code}")]
        super().finalize_options()

    def run(self) -> None:
        """Compiles everything anew, and reads the compiler's report and the machine code."""
        shutil.rmtree(self.build_temp, ignore_errors=True)
        self.code.mkdir(parents=True)
        with tempfile.TemporaryFile("w+") as log:
            try:
                with redirected_output(log):
                    super().run()
            finally:
                log.seek(0)
                text = log.read()
                rows = resources(text)
                if sys.exc_info()[0] is not None or not rows:
                    print(text, file=sys.stderr)
        widths = [max(map(len, column)) for column in zip(*[RESOURCES, *rows], strict=True)]
        for row in [RESOURCES, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        spilling = [row for row in rows if row[4] != "0"]
        if spilling or not rows:
            sys.exit(f"compile_cuda: expected kernels without spills, got {len(spilling)} of {len(rows)} that spill")
        waiting = runpy.run_path("tools/machine_code.py")["problems"](self.code)
        shutil.rmtree(self.code)  # what a compiler keeps is large
        if waiting:
            sys.exit(
                "compile_cuda: expected no product that waits for loads of the next samples, got\n" + "\n".join(waiting)
            )


@contextlib.contextmanager
def redirected_output(file):
    """Sends what this process and its children print to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)


RESOURCES = ("kernel", "architecture", "registers", "stack bytes", "spilled bytes", "shared bytes")


def resources(log: str) -> list[tuple[str, ...]]:
    """What each kernel takes, from the assembler's report (-Xptxas=-v), as RESOURCES says."""
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    found = re.findall(pattern, log, re.DOTALL)
    names = [name for name, *_ in found]
    if found and shutil.which("c++filt"):
        names = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
        names = names.splitlines()
    rows = []
    for name, (_, architecture, stack, stores, loads, registers) in zip(names, found, strict=True):
        # run_kernel<Kernel<...>, shared bytes>(...): shared memory is the launch's, which the assembler does not know.
        launch = re.search(r"run_kernel<(?:dyhead::cuda::)?(.*), (\d+)>\(", name)
        kernel, shared = launch.groups() if launch else (name, "?")
        rows.append(
            (
                kernel.replace("c10::", "").rstrip(),
                architecture,
                registers,
                stack,
                str(int(stores) + int(loads)),
                shared,
            )
        )
    return sorted(rows)


libraries = [cpu_extension(), *([cuda_extension()] if with_cuda() else [])] if with_libraries() else []
setup(
    ext_modules=libraries,
    cmdclass={"build_py": BuildPython, "build_ext": Build, "compile_cuda": CompileCuda},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if libraries else {},
)
