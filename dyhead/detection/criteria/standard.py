"""The criterion of FCOS, RetinaNet and ATSS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from dyhead.detection.criteria.matches import class_cost, match
from dyhead.detection.normalizer import divisor_of
from dyhead.detection.quality import centerness

if TYPE_CHECKING:
    from dyhead.detection.detector import BoxForm, DenseDetector, Predictions, Targets


def standard(
    detector: DenseDetector,
    predictions: Predictions,
    targets: Sequence[Targets],
    box_form: BoxForm | None = None,
) -> dict[str, Tensor]:
    """Every place has a class or none, positive places a box, and a centerness where the head predicts a quality.

    See :mod:`dyhead.detection.criteria`. The losses are those of the classes, of the boxes, and of the quality if there
    is one.

    Args:
        detector, predictions, targets: those of any criterion.
        box_form: what the box numbers mean, if it is not the detector's.
    """
    logits, numbers, quality = predictions[:3]
    box_form = detector.box_form if box_form is None else box_form
    matches = match(detector, predictions, targets)
    positive, _, anchors, boxes, _ = matches
    divisor = detector.loss_normalizer(positive.sum(dim=1)).to(logits.dtype)
    names = detector.loss_names
    losses = {names[0]: class_cost(detector, logits, matches, divisor)}

    box_losses = box_form.loss(numbers[positive], anchors, boxes)
    box_divisor = divisor
    if quality is not None:
        good = centerness((anchors[:, :2] + anchors[:, 2:]) / 2, boxes)
        quality_losses = F.binary_cross_entropy_with_logits(quality[positive], good, reduction="sum")
        losses[names[2]] = quality_losses / divisor
        if detector.box_loss.by_centerness:
            box_losses = box_losses * good
            box_divisor = divisor_of(good.sum(), detector.box_loss.smallest_sum)
    losses[names[1]] = detector.box_loss.weight * box_losses.sum() / box_divisor
    return losses
