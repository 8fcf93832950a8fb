"""The networks of this project by name, beside each engine's own ResNet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

_Options = TypeVar("_Options", bound=type)


@dataclass(frozen=True)
class Registered:
    """A network that both engines build.

    ``build(wanted)`` of its options gives a module from images (N, 3, H, W) to maps by name, fine to coarse, with their
    ``channels`` and ``strides`` by name. The maps are called by their strides, and FPN makes a pyramid of them:
    ``res2`` at 4 pixels to ``res5`` at 32. Where ``has_pyramid``, they are the levels of a pyramid themselves, ``p3``
    at 8 pixels and so on, of equal channels, and the module has a ``size_divisibility`` in pixels.

    Where it ``may_be_plain``, a vision transformer with the one map ``res4``, ViTDet's simple pyramid may take FPN's
    place.

    Attributes:
        name: of the network in keys of weights, and of :attr:`builders`.
        node: of its options in the configuration, "MODEL.TIMM".
        options: their dataclass, with the methods ``build(wanted) -> nn.Module``, where ``wanted`` are the maps that
            are read, or None; and ``check()``, before anything is built. Both raise ValueError, "OPTION: ...". Tables
            call the network by its ``title``.
        has_pyramid: whether its maps are a pyramid.
        may_be_plain: whether it may be a plain vision transformer.
    """

    name: str
    node: str
    options: type
    has_pyramid: bool = False
    may_be_plain: bool = False

    @property
    def builders(self) -> tuple[str, ...]:
        """The values of ``MODEL.BACKBONE.NAME``; of two of a kind, the second has convolved P6 and P7."""
        if self.has_pyramid:
            return (f"build_{self.name}_backbone",)
        kinds = ("fpn", "simple_pyramid") if self.may_be_plain else ("fpn",)
        return tuple(f"build_{self.name}_{kind}{top}_backbone" for kind in kinds for top in ("", "_p6p7"))


#: All networks by name.
NETWORKS: dict[str, Registered] = {}


def register_network(
    name: str, *, has_pyramid: bool = False, may_be_plain: bool = False
) -> Callable[[_Options], _Options]:
    """Register the options dataclass below as those of the network ``name``, see :class:`Registered`.

    Raises:
        ValueError: the name is taken.
    """

    def register(options: _Options) -> _Options:
        if name in NETWORKS:
            raise ValueError(f"network {name!r}: registered before, by {NETWORKS[name]}")
        NETWORKS[name] = Registered(name, f"MODEL.{name.upper()}", options, has_pyramid, may_be_plain)
        return options

    return register
