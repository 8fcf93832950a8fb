"""Assignment by two boxes of an object, all of it and what is visible (Huang et al., CVPR 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from dyhead.detection.assigners.labels import BACKGROUND, IGNORED
from dyhead.options import between, option

# So many overlaps are held at a time: 2^24 of them are 64 MB.
_CHUNK = 2**24


@dataclass(frozen=True)
class PairedAnchorAssigner:
    """An anchor is an object's if it overlaps all of it, and holds most of its visible part.

    Of several such objects it is the one of the largest IoU.
    """

    whole_iou: float = option(0.7, "from this IoU with the whole box on", between(0, 1))
    visible_part: float = option(
        0.7, "and with so much of the visible box inside it, an anchor is an object's", between(0, 1)
    )
    background_iou: float = option(
        0.3, "below this IoU with all whole boxes it is background; all others are ignored", between(0, 1)
    )
    best_is_positive: bool = option(
        True, "the anchors of the largest IoU with an object's whole box are that object's, whatever the thresholds"
    )

    def __call__(self, anchors: Tensor, whole: Tensor, visible: Tensor) -> Tensor:
        """The object of each anchor, (R,), or :data:`BACKGROUND` or :data:`IGNORED`.

        Args:
            anchors: (R, 4).
            whole, visible: boxes (M, 4) of the objects.
        """
        largest = anchors.new_zeros(len(anchors))
        best = anchors.new_full((len(anchors),), -1.0)
        owner = torch.full((len(anchors),), BACKGROUND, device=anchors.device)
        wanted = torch.full_like(owner, BACKGROUND)
        for first, chunk in _chunks(len(whole), len(anchors)):
            iou = box_iou(whole[chunk], anchors)
            fits = (iou >= self.whole_iou) & (_part_inside(visible[chunk], anchors) >= self.visible_part)
            best, owner = _larger(best, owner, iou.masked_fill(~fits, -1.0), first)
            largest = torch.maximum(largest, iou.amax(dim=0))
            if self.best_is_positive:
                wants = (iou == iou.amax(dim=1, keepdim=True)) & (iou > 0)
                wanted = torch.where(wants.any(dim=0), first + wants.to(torch.uint8).argmax(dim=0), wanted)
        unclear = torch.where(largest < self.background_iou, BACKGROUND, IGNORED)
        return torch.where(owner >= 0, owner, torch.where(wanted >= 0, wanted, unclear))


@dataclass(frozen=True)
class PairedRegionAssigner:
    """A pair of boxes is an object's if each overlaps its own of the object's, else background.

    Of several such objects it is the one of the largest IoU of the whole boxes.
    """

    whole_iou: float = option(0.5, "from this IoU of the whole boxes on", between(0, 1))
    visible_iou: float = option(0.5, "and this IoU of the visible ones a pair of boxes is an object's", between(0, 1))

    def __call__(self, pairs: Tensor, whole: Tensor, visible: Tensor) -> Tensor:
        """The object of each pair (Q, 8), or :data:`BACKGROUND`: (Q,).

        Args:
            pairs: whole boxes, and behind them visible ones.
            whole, visible: boxes (M, 4) of the objects.
        """
        best = pairs.new_full((len(pairs),), -1.0)
        owner = torch.full((len(pairs),), BACKGROUND, device=pairs.device)
        for first, chunk in _chunks(len(whole), len(pairs)):
            iou = box_iou(whole[chunk], pairs[:, :4])
            fits = (iou >= self.whole_iou) & (box_iou(visible[chunk], pairs[:, 4:]) >= self.visible_iou)
            best, owner = _larger(best, owner, iou.masked_fill(~fits, -1.0), first)
        return owner


def _chunks(objects: int, places: int) -> Iterator[tuple[int, slice]]:
    step = max(_CHUNK // max(places, 1), 1)
    return ((first, slice(first, first + step)) for first in range(0, objects, step))


def _larger(best: Tensor, owner: Tensor, overlap: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The largest overlap of each place, and whose it is, with those (M, R) of further objects, -1 for none."""
    value, index = overlap.max(dim=0)
    return torch.maximum(best, value), torch.where(value > best, index + first, owner)


def _part_inside(boxes: Tensor, anchors: Tensor) -> Tensor:
    """How much of each box lies inside each anchor, (M, R) from 0 to 1."""
    low = torch.maximum(boxes[:, None, :2], anchors[:, :2])
    high = torch.minimum(boxes[:, None, 2:], anchors[:, 2:])
    size = boxes[:, 2:] - boxes[:, :2]
    return (high - low).clamp(min=0).prod(dim=2) / size.prod(dim=1)[:, None]
