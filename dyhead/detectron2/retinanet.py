"""RetinaNet whose towers are the Dynamic Head."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet

from dyhead.detectron2.backbone import DyHeadBackbone, require_dyhead
from dyhead.detectron2.head import DenseHead


@META_ARCH_REGISTRY.register()
class DyHeadRetinaNet(RetinaNet):
    """Detectron2's RetinaNet (Lin et al., ICCV 2017) with its predictors directly on the unified branch of DyHead.

    Losses, anchors and decoding are Detectron2's. ``MODEL.RETINANET`` configures it, but for ``NUM_CONVS`` and
    ``NORM``: there are no towers.

    Args:
        backbone: a :class:`~dyhead.detectron2.DyHeadBackbone`.
        **kwargs: see :class:`detectron2.modeling.RetinaNet`; the ``head`` is a :class:`~dyhead.detectron2.DenseHead`.

    Raises:
        ConfigError: the backbone has no Dynamic Head.
    """

    @configurable
    def __init__(self, *, backbone: DyHeadBackbone, **kwargs: Any) -> None:
        require_dyhead(backbone, type(self).__name__)
        super().__init__(backbone=backbone, **kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The keyword arguments that the config stands for."""
        arguments = super().from_config(cfg)
        shapes = arguments["backbone"].output_shape()
        arguments["head"] = DenseHead(
            shapes[cfg.MODEL.RETINANET.IN_FEATURES[0]].channels,
            cfg.MODEL.RETINANET.NUM_CLASSES,
            arguments["anchor_generator"].num_cell_anchors[0],
            prior_prob=cfg.MODEL.RETINANET.PRIOR_PROB,
        )
        return arguments
