"""The box heads by name: what makes a file in this folder a box head that both engines know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

_Options = TypeVar("_Options", bound=type)


@dataclass(frozen=True)
class Registered:
    """A box head.

    Attributes:
        name: what ``MODEL.ROI_BOX_HEAD.NAME`` calls it.
        node: of its options in the configuration. Of ``MODEL.ROI_BOX_HEAD`` it reads nothing: pooling and losses,
            which do not depend on the head, are the engine's, and the rest is Detectron2's own head's.
        options: their dataclass, with the method ``build(channels, side) -> nn.Module``. The module maps pooled regions
            (Q, V * C, S, S) to features (Q, D), from which the engine predicts classes and boxes. Its ``out_features``
            are D, or a pair of numbers, of the features for classes and, behind them, of those for boxes. It pools a
            region V times where it has ``scales``, V factors by which the region is enlarged around its center. Where
            it has ``loss_weights``, these are what the losses of classes and boxes are multiplied by, ((1.4, 2.0),).
            With a second pair, ((1.4, 2.0), (0.5, 0.6)), classes are also predicted from the features for boxes and
            boxes from those for classes, at these weights; a class's score is then that of either prediction.
        detects: the module is given the pyramid and regions instead, and has their losses and detections: see
            :class:`dyhead.detection.roi.d2det.D2DetHead` for ``losses`` and ``detect``, and its options for ``build``.
            Masks and keypoints are the engine's; a cascade of such heads there is not.
    """

    name: str
    node: str
    options: type
    detects: bool = False


#: All box heads by name, but for Detectron2's.
BOX_HEADS: dict[str, Registered] = {}


def register_box_head(name: str, node: str, *, detects: bool = False) -> Callable[[_Options], _Options]:
    """Register the options dataclass below as those of the box head ``name``, in the configuration's ``node``.

    ``detects``: see :class:`Registered`.

    Raises:
        ValueError: the name is taken.
    """

    def register(options: _Options) -> _Options:
        if name in BOX_HEADS:
            raise ValueError(f"box head {name!r}: registered before, by {BOX_HEADS[name]}")
        BOX_HEADS[name] = Registered(name, node, options, detects)
        return options

    return register
