"""The necks by name, and several of them in a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

_Options = TypeVar("_Options", bound=type)


@dataclass(frozen=True)
class Registered:
    """A neck.

    Attributes:
        name: what ``MODEL.NECKS`` calls it; in lower case it is the module's name.
        node: of its options in the configuration, "MODEL.DYHEAD".
        options: their dataclass, with the methods ``build(channels, num_levels) -> nn.Module`` and
            ``size_divisibility(strides) -> int``, and the attribute ``task_levels`` where the neck may put out levels
            that are pairs, for classes and for boxes; such a neck is the last.
    """

    name: str
    node: str
    options: type


#: All necks by name.
NECKS: dict[str, Registered] = {}


def register_neck(name: str) -> Callable[[_Options], _Options]:
    """Register the options dataclass below as those of the neck ``name``.

    Raises:
        ValueError: the name is taken.
    """

    def register(options: _Options) -> _Options:
        if name in NECKS:
            raise ValueError(f"neck {name!r}: registered before, by {NECKS[name]}")
        NECKS[name] = Registered(name, f"MODEL.{name.upper()}", options)
        return options

    return register


class Necked(nn.Module):
    """A module that necks follow: each is a child of its own name, so that DyHead's keys are ``dyhead.blocks...``."""

    def attach(self, necks: Iterable[tuple[str, nn.Module]]) -> None:
        """Let necks follow, by name, in their order; each takes and returns a pyramid."""
        self._necks = []
        for name, neck in necks:
            self.add_module(name, neck)
            self._necks.append(name)

    def through_necks(self, pyramid: dict[str, Tensor]) -> dict[str, Tensor]:
        """Levels (N, C, H, W) by name, fine to coarse, through all of them.

        Those of the last may be pairs, see :attr:`Registered.options`.
        """
        if torch.jit.is_scripting():
            return self.dyhead(pyramid)  # the only neck that it takes, see `__prepare_scriptable__`
        else:
            for name in self._necks:
                pyramid = getattr(self, name)(pyramid)
            return pyramid

    def __prepare_scriptable__(self) -> Necked:
        """What torch.jit.script calls first."""
        if self._necks != ["dyhead"]:
            raise RuntimeError(f"torch.jit.script: expected DyHead and no other neck, got {', '.join(self._necks)}")
        return self


class Stack(Necked):
    """Necks one after the other.

    Args:
        necks: by name, in their order; each takes and returns a pyramid.
        divisors: what they ask of the image's height and width, in pixels.
    """

    def __init__(self, necks: Mapping[str, nn.Module], divisors: Sequence[int] = ()) -> None:
        super().__init__()
        self.attach(necks.items())
        self.size_divisibility = math.lcm(1, *divisors)

    def forward(self, pyramid: dict[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`through_necks`."""
        return self.through_necks(pyramid)
