"""The detectors by name: what makes a file in this folder a detector that both engines know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

_Options = TypeVar("_Options", bound=type)


@dataclass(frozen=True)
class Registered:
    """A detector.

    Attributes:
        name: "FCOS"; ``MODEL.META_ARCHITECTURE`` is then "DyHeadFCOS".
        node: of its options in the configuration, "MODEL.FCOS".
        options: their dataclass, with a method ``build`` (:class:`dyhead.detection.dense_options.DenseOptions`).
    """

    name: str
    node: str
    options: type

    @property
    def meta_architecture(self) -> str:
        """What ``MODEL.META_ARCHITECTURE`` calls it."""
        return f"DyHead{self.name}"


#: All detectors by their meta-architecture's name.
DETECTORS: dict[str, Registered] = {}


def register_detector(name: str) -> Callable[[_Options], _Options]:
    """Register the options dataclass below as those of the detector ``name``.

    Raises:
        ValueError: the name is taken.
    """

    def register(options: _Options) -> _Options:
        detector = Registered(name, f"MODEL.{name.upper()}", options)
        if detector.meta_architecture in DETECTORS:
            raise ValueError(f"detector {name!r}: registered before, by {DETECTORS[detector.meta_architecture]}")
        DETECTORS[detector.meta_architecture] = detector
        return options

    return register
