"""Dynamic Head (Dai et al., CVPR 2021) for any feature-pyramid detector: operator, modules and detectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dyhead.prediction import load_detector as load_detector

__version__ = "0.1.0"
__all__ = ["load_detector"]


def __getattr__(name: str) -> Any:
    """``load_detector``, with what it needs, when it is first asked for: importing the package loads nothing."""
    if name == "load_detector":
        from dyhead.prediction import load_detector

        return load_detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
