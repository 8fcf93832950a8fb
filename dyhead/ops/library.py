"""Loads the compiled operator, and explains why it is missing if it is."""

from __future__ import annotations

import ctypes
import glob
import importlib.machinery
import os
import sys
import warnings

import torch

from .torch_version import TORCH_MINIMUM

_PACKAGE = os.path.dirname(os.path.dirname(__file__))
INSTALL = "pip install -e . --no-build-isolation  (in the repository; needs a C++ compiler)"
INSTALL_CUDA = "FORCE_CUDA=1 pip install -e . --no-build-isolation  (in the repository; needs a C++ compiler and nvcc)"

# The operator that came last: a library without it is older than these files.
NEWEST = "deform_roi_pool"


def _load() -> str | None:
    """Registers torch.ops.dyhead; returns None, or the reason for the user why that failed."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_MINIMUM:
        return (
            f"dyhead's compiled operator needs PyTorch >= {'.'.join(map(str, TORCH_MINIMUM))}, this is "
            f"{torch.__version__}. Install a newer PyTorch."
        )
    try:
        import dyhead._C  # noqa: F401
    except ImportError as error:
        built = glob.glob(os.path.join(_PACKAGE, "_C.*"))
        python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        if not built:
            return f"dyhead's compiled operator was not built. Build it: {INSTALL}"
        if isinstance(error, ModuleNotFoundError):
            files = ", ".join(os.path.basename(file) for file in built)
            return f"dyhead's compiled operator was built for another Python ({files}) than {python}. Build: {INSTALL}"
        return (
            f"dyhead's compiled operator did not load ({error}) into {python} with PyTorch {torch.__version__}. "
            f"Build it again: {INSTALL}"
        )
    if not hasattr(torch.ops.dyhead, NEWEST):
        return f"dyhead's compiled operator was built from older sources, without {NEWEST}. Build it again: {INSTALL}"
    return None


def _load_cuda() -> tuple[str | None, str | None]:
    """Adds the CUDA kernels to torch.ops.dyhead; returns what they were built with, or the reason why that failed."""
    if PROBLEM is not None:
        return None, PROBLEM
    paths = [os.path.join(_PACKAGE, "_C_cuda" + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next(filter(os.path.exists, paths), None)
    if path is None:
        others = ", ".join(os.path.basename(file) for file in glob.glob(os.path.join(_PACKAGE, "_C_cuda.*")))
        built = f"built for another Python ({others})" if others else "not built"
        return None, f"dyhead's CUDA operator was {built}. Build it: {INSTALL_CUDA}"
    if torch.version.cuda is None:
        return None, f"dyhead's CUDA operator needs a PyTorch with CUDA, this is {torch.__version__}."
    try:
        # Not a Python module, so that it need not know Python.
        torch.ops.load_library(path)
        describe = ctypes.CDLL(path).dyhead_cuda_build_info
    except (OSError, AttributeError) as error:
        return None, f"dyhead's CUDA operator did not load ({error}). Build it again: {INSTALL_CUDA}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"dyhead::{NEWEST}", "CUDA"):
        return None, f"dyhead's CUDA operator was built from older sources, without {NEWEST}. Build it: {INSTALL_CUDA}"
    describe.restype = ctypes.c_char_p
    return describe().decode(), None


#: Why the library is not there; None where it is.
PROBLEM = _load()

#: What the CUDA kernels were built with, and why they are not there; one of the two is None.
CUDA_BUILD, CUDA_PROBLEM = _load_cuda()

#: Device types that a compiled operator runs on. A meta tensor has no data: its operator tells the shape only.
DEVICES = frozenset() if PROBLEM else frozenset({"cpu", "meta"} | ({"cuda"} if CUDA_BUILD else set()))

_warned: set[str] = set()


def runs_on(device: torch.device) -> bool:
    """Whether there is a compiled operator for tensors of this device. If not, one warning says so."""
    if device.type in DEVICES:
        return True
    if device.type not in _warned and not torch.compiler.is_compiling():
        _warned.add(device.type)
        reason = PROBLEM or (CUDA_PROBLEM if device.type == "cuda" else None)
        reason = reason or f"dyhead has no compiled operator for {device.type} tensors."
        warnings.warn(f"{reason} Until then the plain PyTorch operator runs, which is slower.", stacklevel=4)
    return False
