"""Classification losses: logits and targets to a number. ``CLASS_LOSS`` chooses among those of targets 0 or 1."""

from dyhead.detection.losses.focal import FocalLoss
from dyhead.detection.losses.quality_focal import QualityFocalLoss

#: Losses of targets 0 or 1 by the name that the configuration has for them.
CLASS_LOSSES: dict[str, type] = {"focal": FocalLoss}

__all__ = ["CLASS_LOSSES", "FocalLoss", "QualityFocalLoss"]
