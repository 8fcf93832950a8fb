"""Classification losses: logits and targets to a number. ``CLASS_LOSS`` chooses among those of targets 0 or 1.

Criteria divide what they return by the loss normalizer, unless the loss has an attribute ``normalized`` that is true:
it is divided by what it should be then (:func:`dyhead.detection.normalizer.divided`).
"""

from dyhead.detection.losses.ap import APLoss
from dyhead.detection.losses.dr import DRLoss
from dyhead.detection.losses.focal import FocalLoss
from dyhead.detection.losses.gaussian_focal import GaussianFocalLoss
from dyhead.detection.losses.quality_focal import QualityFocalLoss
from dyhead.detection.losses.soft_focal import SoftFocalLoss

#: Losses of targets 0 or 1 by the name that the configuration has for them.
CLASS_LOSSES: dict[str, type] = {"focal": FocalLoss, "ap": APLoss, "dr": DRLoss}

__all__ = ["CLASS_LOSSES", "APLoss", "DRLoss", "FocalLoss", "GaussianFocalLoss", "QualityFocalLoss", "SoftFocalLoss"]
