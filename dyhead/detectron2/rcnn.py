"""Two-stage detectors (Faster R-CNN, Mask R-CNN, ...) on a pyramid that has passed the Dynamic Head."""

from __future__ import annotations

from typing import Any

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN

from dyhead.detectron2.backbone import DyHeadBackbone, require_dyhead


@META_ARCH_REGISTRY.register()
class DyHeadRCNN(GeneralizedRCNN):
    """Detectron2's generalised R-CNN in the pyramid form: DyHead on the pyramid, before the RPN and RoI pooling.

    It is configured as GeneralizedRCNN is. All that it adds is that a backbone without a Dynamic Head is an error.

    Args:
        backbone: a :class:`~dyhead.detectron2.DyHeadBackbone`.
        **kwargs: see :class:`detectron2.modeling.GeneralizedRCNN`.

    Raises:
        ConfigError: the backbone has no Dynamic Head.
    """

    @configurable
    def __init__(self, *, backbone: DyHeadBackbone, **kwargs: Any) -> None:
        require_dyhead(backbone, type(self).__name__)
        super().__init__(backbone=backbone, **kwargs)
