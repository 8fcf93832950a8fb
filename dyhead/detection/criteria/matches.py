"""Places and their objects side by side, as losses need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dyhead.detection.assigners import IGNORED

if TYPE_CHECKING:
    from dyhead.detection.detector import DenseDetector, Predictions, Targets


class Matches(NamedTuple):
    """The places of N images that are an object's, P in all, image after image.

    Attributes:
        positive: (N, R), which these are.
        counted: (N, R), which places' classes cost something: all but the ignored ones.
        anchors: (P, 4), of the positive places.
        boxes: (P, 4), of their objects.
        labels: (P,), of their objects.
    """

    positive: Tensor
    counted: Tensor
    anchors: Tensor
    boxes: Tensor
    labels: Tensor


def match(detector: DenseDetector, predictions: Predictions, targets: Sequence[Targets]) -> Matches:
    """What the detector's assigner makes of the objects of each image, in the predictions' precision."""
    logits = predictions.logits
    places = detector.places(predictions)
    assigned = detector.assign(places, targets)
    positive = assigned >= 0
    owners = [own[own >= 0] for own in assigned]
    return Matches(
        positive,
        assigned != IGNORED,
        places.anchors.expand(len(logits), -1, -1)[positive],
        torch.cat([t.boxes[own] for t, own in zip(targets, owners, strict=True)]).to(logits.dtype),
        torch.cat([t.labels[own] for t, own in zip(targets, owners, strict=True)]),
    )
