"""Two-stage detectors (Faster R-CNN, Mask R-CNN, ...) on a pyramid that has passed the necks."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    GeneralizedRCNN,
    build_proposal_generator,
    build_roi_heads,
)
from torch import nn

from dyhead.build import build_box_head
from dyhead.config import expect, get
from dyhead.detection.roi import BOX_HEADS
from dyhead.detectron2.backbone import build_backbone


@META_ARCH_REGISTRY.register()
class DyHeadRCNN(GeneralizedRCNN):
    """Detectron2's generalized R-CNN with the necks of ``MODEL.NECKS`` before the RPN and RoI pooling.

    It is configured as GeneralizedRCNN is; see :class:`detectron2.modeling.GeneralizedRCNN` for its arguments.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The keyword arguments that the config stands for.

        Raises:
            ConfigError: levels that the backbone does not have.
        """
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        for key in ("MODEL.RPN.IN_FEATURES", "MODEL.ROI_HEADS.IN_FEATURES"):
            expect(cfg, key, set(get(cfg, key)) <= set(shapes), f"some of the levels {', '.join(shapes)}")
        return {
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, shapes),
            "roi_heads": build_roi_heads(cfg, shapes),
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }


def _register_box_head(name: str) -> None:
    """Let ``MODEL.ROI_BOX_HEAD.NAME`` choose a box head of :mod:`dyhead.detection.roi`, in any RoI heads."""

    def build(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
        head = build_box_head(cfg, name, input_shape.channels)
        head.output_shape = ShapeSpec(channels=head.out_features)  # what Detectron2 builds the predictors from
        return head

    build.__name__ = name
    ROI_BOX_HEAD_REGISTRY.register(build)


for _name in BOX_HEADS:
    _register_box_head(_name)
