"""`dyhead info`: versions, what was built, and why anything did not load. For bug reports and troubleshooting."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

import dyhead
from dyhead.ops import library


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def collect() -> dict[str, str]:
    """What `dyhead info` prints: a title and a text per line."""
    if torch.cuda.is_available():
        devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    else:
        devices = "no device"
    lines = {
        "dyhead": dyhead.__version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "PyTorch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}, {devices}",
        **{package: _version(package) for package in ("torchvision", "lightning", "detectron2")},
    }
    if library.PROBLEM is None:
        from dyhead import _C

        build = _C.build_info()
        lines |= {
            "CPU operator": f"loaded, for PyTorch >= {build['torch_minimum']}",
            "  built by": f"{build['compiler']}, {build['flags']}, PyTorch headers {build['torch_headers']}",
            "  instructions": f"{', '.join(build['cpu_paths'])}; used here: {build['cpu_path']}",
        }
    else:
        lines["CPU operator"] = f"NOT LOADED, the plain PyTorch operator runs. {library.PROBLEM}"
    if library.CUDA_BUILD is not None:
        lines["CUDA operator"] = f"loaded, built with {library.CUDA_BUILD}"
    else:
        lines["CUDA operator"] = f"NOT LOADED, the plain PyTorch operator runs. {library.CUDA_PROBLEM}"
    return lines


def main() -> None:
    """Prints the lines of `collect`."""
    lines = collect()
    width = max(map(len, lines))
    for title, text in lines.items():
        print(f"{title:<{width}}  {text}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit code."""
    main()
    return 0


if __name__ == "__main__":
    main()
