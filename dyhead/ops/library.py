"""Loads the compiled operator, and explains itself where there is none."""

from __future__ import annotations

import glob
import os
import sys
import warnings

import torch

TORCH_MINIMUM = (2, 11)
INSTALL = "pip install -e . --no-build-isolation  (in the repository; needs a C++ compiler)"


def _load() -> str | None:
    """Registers torch.ops.dyhead; returns what to tell a user where that did not work."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_MINIMUM:
        return (
            f"dyhead's compiled operator needs PyTorch >= {'.'.join(map(str, TORCH_MINIMUM))}, this is "
            f"{torch.__version__}. Install a newer PyTorch."
        )
    try:
        import dyhead._C  # noqa: F401
    except ImportError as error:
        built = glob.glob(os.path.join(os.path.dirname(os.path.dirname(__file__)), "_C.*"))
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
    return None


#: Why the library is not there; None where it is.
PROBLEM = _load()

#: Device types that a compiled operator runs on. A meta tensor has no data: its operator tells the shape only.
DEVICES = frozenset() if PROBLEM else frozenset({"cpu", "meta"})

_warned: set[str] = set()


def runs_on(device: torch.device) -> bool:
    """Whether there is a compiled operator for tensors of this device. Where not, a warning says so, once."""
    if device.type in DEVICES:
        return True
    if device.type not in _warned and not torch.compiler.is_compiling():
        _warned.add(device.type)
        reason = PROBLEM or f"dyhead has no compiled operator for {device.type} tensors."
        warnings.warn(f"{reason} Until then the plain PyTorch operator runs, which is slower.", stacklevel=4)
    return False
