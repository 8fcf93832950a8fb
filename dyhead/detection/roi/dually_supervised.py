"""Dually Supervised FPN (Yang et al., 2019): in training, further RoI heads on maps before the detector's own.

They have weights of their own and the structure of the detector's RoI heads, and learn from the same regions, labels
and targets. At test time nothing is left of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dyhead.detection.roi.registry import register_box_head
from dyhead.layers import DyHead
from dyhead.options import at_least, one_of, option

#: What ``MODEL.DSFPN.MAPS`` may be, but for "none".
MAPS = ("laterals", "dyhead_input", "dyhead_blocks")


@dataclass(frozen=True)
class DuallySupervisedOptions:
    """In training, further RoI heads on maps before those that the detector reads (Dually Supervised FPN).

    Each set of them has the structure of the detector's RoI heads, weights of its own, and the same regions, labels and
    targets, those of each stage in a cascade. Its losses are added to the detector's. At test time it is not run.
    """

    maps: str = option(
        "none",
        "what they read: laterals, the pyramid's lateral convolutions, before the sum from above, as in the paper's "
        "code; dyhead_input, what DyHead reads; dyhead_blocks, what its blocks put out, each with a set of its own; "
        "none: there are none",
        one_of("none", *MAPS),
    )
    every: int = option(
        1, "with MAPS dyhead_blocks: each so-many-th block; the last block's are the detector's own maps", at_least(1)
    )
    loss_weight: float = option(1.0, "what their losses are multiplied by", at_least(0))


class Tap:
    """What modules read or put out in the last forward pass in training, as levels (N, C, H, W) by name."""

    def __init__(self) -> None:
        self.levels: dict[str, Tensor] = {}

    @classmethod
    def of_modules(cls, modules: Mapping[str, nn.Module]) -> Tap:
        """Of modules that put out one level each."""
        tap = cls()
        for name, module in modules.items():
            module.register_forward_hook(partial(tap._keep_level, name))
        return tap

    @classmethod
    def of_input(cls, module: nn.Module) -> Tap:
        """Of a module that reads a pyramid."""
        tap = cls()
        module.register_forward_pre_hook(tap._keep_input)
        return tap

    @classmethod
    def of_output(cls, module: nn.Module) -> Tap:
        """Of a module that puts out a pyramid."""
        tap = cls()
        module.register_forward_hook(tap._keep_output)
        return tap

    def clear(self) -> None:
        """Let go of the levels."""
        self.levels = {}

    # Methods, not functions inside others: a copy of the model then has a copy of the tap.
    def _keep_level(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if module.training:
            self.levels[name] = output

    def _keep_input(self, module: nn.Module, args: tuple[Mapping[str, Tensor]]) -> None:
        if module.training:
            self.levels = dict(args[0])

    def _keep_output(self, module: nn.Module, args: Any, output: Mapping[str, Tensor]) -> None:
        if module.training:
            self.levels = dict(output)


def build_taps(
    options: DuallySupervisedOptions, levels: tuple[str, ...], laterals: Mapping[str, nn.Module], dyhead: DyHead | None
) -> dict[str, Tap]:
    """The taps that the options describe, by the names that their heads and losses have.

    Args:
        options: what is asked for.
        levels: that RoI heads read.
        laterals: the pyramid's lateral convolutions, by the level that each is added to.
        dyhead: the Dynamic Head, if there is one.

    Raises:
        ValueError: the network does not have what is asked for.
    """
    if options.maps == "none":
        return {}
    if options.maps == "laterals":
        missing = [name for name in levels if name not in laterals]
        if missing:
            raise ValueError(
                "MAPS: expected laterals only for levels that a feature pyramid network adds up, "
                f"{', '.join(laterals) or 'of which there are none'}, but RoI heads read {', '.join(missing)}"
            )
        return {"lateral": Tap.of_modules({name: laterals[name] for name in levels})}
    if dyhead is None:
        raise ValueError(f"MAPS: expected DyHead among MODEL.NECKS with {options.maps}, got none")
    if options.maps == "dyhead_input":
        return {"input": Tap.of_input(dyhead)}
    inner = list(dyhead.blocks)[:-1]
    if options.every > len(inner):
        raise ValueError(
            f"EVERY: expected fewer than the {len(dyhead.blocks)} blocks of DyHead, whose last one the detector itself "
            f"reads, got {options.every}"
        )
    chosen = range(options.every - 1, len(inner), options.every)
    return {f"block{number}": Tap.of_output(inner[number]) for number in chosen}


class DecoupledBoxHead(nn.Module):
    """Two branches of fully connected layers with ReLU, one for classes and one for boxes.

    Args:
        channels: channels C of a region.
        side: cells S along each side of a region.
        num_fc: layers of each branch.
        fc_dim: features of each layer.

    Attributes:
        out_features: those for classes, and those for boxes.

    Example:
        >>> import torch
        >>> head = DecoupledBoxHead(16, side=7, fc_dim=32)
        >>> tuple(head(torch.randn(5, 16, 7, 7)).shape), head.out_features
        ((5, 64), (32, 32))
    """

    def __init__(self, channels: int, side: int, num_fc: int = 2, fc_dim: int = 1024) -> None:
        super().__init__()
        widths = [channels * side**2, *[fc_dim] * num_fc]
        self.class_fcs, self.box_fcs = (
            nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths)) for _ in ("classes", "boxes")
        )
        for layer in (*self.class_fcs, *self.box_fcs):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        self.out_features = (widths[-1], widths[-1])

    def forward(self, regions: Tensor) -> Tensor:
        """Regions (Q, C, S, S) to features (Q, 2 * ``fc_dim``); Q may be 0."""
        branches = []
        for layers in (self.class_fcs, self.box_fcs):
            x = regions.flatten(1)
            for layer in layers:
                x = layer(x).relu()
            branches.append(x)
        return torch.cat(branches, dim=1)


@register_box_head("DecoupledBoxHead", "MODEL.DECOUPLED_BOX_HEAD")
@dataclass(frozen=True)
class DecoupledBoxHeadOptions:
    """Fully connected layers for classes, and others for boxes, with ``MODEL.ROI_BOX_HEAD.NAME DecoupledBoxHead``.

    They are part of Dually Supervised FPN, and take the place of Detectron2's own head, whose layers serve both.
    """

    num_fc: int = option(2, "fully connected layers of each branch", at_least(1))
    fc_dim: int = option(1024, "features of each of them", at_least(1))

    def build(self, channels: int, side: int) -> DecoupledBoxHead:
        """The module for regions (Q, channels, side, side), with random weights."""
        return DecoupledBoxHead(channels, side, self.num_fc, self.fc_dim)
