"""FCOS whose towers are the Dynamic Head, configurable from YAML."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS

from dyhead.detectron2.backbone import DyHeadBackbone, require_dyhead
from dyhead.detectron2.head import DenseHead


@META_ARCH_REGISTRY.register()
class DyHeadFCOS(FCOS):
    """Detectron2's FCOS (Tian et al., ICCV 2019) with its predictors directly on the unified branch of DyHead.

    Losses, targets and decoding are Detectron2's. ``MODEL.FCOS`` configures it.

    Args:
        backbone: a :class:`~dyhead.detectron2.DyHeadBackbone`.
        **kwargs: see :class:`detectron2.modeling.meta_arch.fcos.FCOS`; the ``head`` is a
            :class:`~dyhead.detectron2.DenseHead` with ``quality``.

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
        fcos = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "head": DenseHead(
                backbone.output_shape()[fcos.IN_FEATURES[0]].channels,
                fcos.NUM_CLASSES,
                quality=True,
                prior_prob=fcos.PRIOR_PROB,
            ),
            "head_in_features": fcos.IN_FEATURES,
            "num_classes": fcos.NUM_CLASSES,
            "center_sampling_radius": fcos.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": fcos.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": fcos.FOCAL_LOSS_GAMMA,
            "test_score_thresh": fcos.SCORE_THRESH_TEST,
            "test_topk_candidates": fcos.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": fcos.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }
