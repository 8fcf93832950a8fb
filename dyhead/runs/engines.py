"""Which engine runs: Detectron2 or torchvision."""

from __future__ import annotations

import importlib.util

from dyhead.config import ConfigError

ENGINES = ("detectron2", "torchvision")


def choose_engine(name: str) -> str:
    """The engine to run on: ``name``, or for ``auto`` Detectron2 where it is installed, else torchvision."""
    if name != "auto":
        return name
    return "detectron2" if is_installed("detectron2") else "torchvision"


def is_installed(engine: str) -> bool:
    """Whether the package that an engine has its name from is there."""
    return importlib.util.find_spec(engine) is not None


def check_installed(engine: str) -> None:
    """Raise :class:`ConfigError`, which says how to get it, unless an engine's package is there."""
    if is_installed(engine):
        return
    how = {
        "detectron2": "Detectron2 is not installed; pip install 'git+https://github.com/facebookresearch/detectron2.git'"
        ", or --engine torchvision",
        "torchvision": "torchvision is not installed; pip install 'dyhead[train]'",
    }
    raise ConfigError(f"--engine {engine}: {how[engine]}")
