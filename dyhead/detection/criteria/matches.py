"""Places and their objects side by side, as losses need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dyhead.detection.assigners import IGNORED
from dyhead.detection.normalizer import divided

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
    places = detector.places(predictions)
    return matched(places.anchors, detector.assign(places, targets), targets)


def matched(anchors: Tensor, assigned: Tensor, targets: Sequence[Targets]) -> Matches:
    """The same of anchors (R, 4), and of what an assigner gave for each image, (N, R)."""
    positive = assigned >= 0
    owners = [own[own >= 0] for own in assigned]
    return Matches(
        positive,
        assigned != IGNORED,
        anchors.expand(len(assigned), -1, -1)[positive],
        torch.cat([t.boxes[own] for t, own in zip(targets, owners, strict=True)]).to(anchors.dtype),
        torch.cat([t.labels[own] for t, own in zip(targets, owners, strict=True)]),
    )


def class_cost(detector: DenseDetector, logits: Tensor, matches: Matches, divisor: Tensor) -> Tensor:
    """The class loss of all places that count; the class of a positive place is its object's.

    See :func:`dyhead.detection.normalizer.divided`.
    """
    truth = torch.zeros_like(logits)
    truth[matches.positive, matches.labels] = 1
    return divided(detector.class_loss, logits[matches.counted], truth[matches.counted], divisor)
