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
from detectron2.structures import Boxes
from torch import Tensor, nn

from dyhead.build import build_box_head
from dyhead.config import expect, get
from dyhead.detection.roi import BOX_HEADS
from dyhead.detection.roi.pooling import PyramidPool
from dyhead.detection.roi.prediction import class_and_box_layers
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
        roi_heads = build_roi_heads(cfg, shapes)
        if cfg.MODEL.ROI_BOX_HEAD.NAME in BOX_HEADS:
            _adapt(cfg, roi_heads, {name: shape.stride for name, shape in shapes.items()})
        return {
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, shapes),
            "roi_heads": roi_heads,
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }


class ViewPooler(nn.Module):
    """:class:`PyramidPool` in the form of Detectron2's pooler.

    Args:
        pool: the levels that it is given.
    """

    def __init__(self, pool: PyramidPool) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Levels, fine to coarse, and boxes of each image to regions (Q, V * C, S, S)."""
        levels = dict(zip(self.pool.strides, x, strict=True))
        return self.pool(levels, [boxes.tensor for boxes in box_lists])


def _adapt(cfg: CfgNode, roi_heads: nn.Module, strides: dict[str, int]) -> None:
    """Give a box head what Detectron2's RoI heads do not: several views of a region, features for boxes alone."""
    box, heads, predictors = cfg.MODEL.ROI_BOX_HEAD, roi_heads.box_head, roi_heads.box_predictor
    if not isinstance(heads, nn.ModuleList):  # of one stage
        heads, predictors = [heads], [predictors]
    scales = getattr(heads[0], "scales", (1.0,))
    if scales != (1.0,):
        key, aligned = "MODEL.ROI_BOX_HEAD.POOLER_TYPE", box.POOLER_TYPE == "ROIAlignV2"
        expect(cfg, key, box.POOLER_TYPE != "ROIPool", f"'ROIAlignV2' or 'ROIAlign' with {box.NAME}")
        levels = {name: strides[name] for name in cfg.MODEL.ROI_HEADS.IN_FEATURES}
        pool = PyramidPool(levels, box.POOLER_RESOLUTION, box.POOLER_SAMPLING_RATIO, aligned, scales)
        roi_heads.box_pooler = ViewPooler(pool)
    for head, predictor in zip(heads, predictors, strict=True):
        if isinstance(head.out_features, int):
            continue
        sizes = predictor.cls_score.out_features, predictor.bbox_pred.out_features
        predictor.cls_score, predictor.bbox_pred = class_and_box_layers(head.out_features, *sizes)


def _register_box_head(name: str) -> None:
    """Let ``MODEL.ROI_BOX_HEAD.NAME`` choose a box head of :mod:`dyhead.detection.roi`, in any RoI heads."""

    def build(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
        head = build_box_head(cfg, name, input_shape.channels)
        features = head.out_features
        # What Detectron2 builds the predictors from; of a pair, _adapt builds them.
        head.output_shape = ShapeSpec(channels=features if isinstance(features, int) else sum(features))
        return head

    build.__name__ = name
    ROI_BOX_HEAD_REGISTRY.register(build)


for _name in BOX_HEADS:
    _register_box_head(_name)
