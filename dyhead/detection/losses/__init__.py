"""Classification losses: logits and targets to a number. Each is chosen by its name, ``CLASS_LOSS``."""

from dyhead.detection.losses.focal import FocalLoss

#: By the name that the configuration has for them.
CLASS_LOSSES: dict[str, type] = {"focal": FocalLoss}

__all__ = ["CLASS_LOSSES", "FocalLoss"]
