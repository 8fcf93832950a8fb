"""Two-stage detectors (Faster R-CNN, Mask R-CNN, ...) on a pyramid that has passed the necks."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
    build_proposal_generator,
    build_roi_heads,
)
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from dyhead.build import build_box_head, detects
from dyhead.config import expect, get
from dyhead.detection.heads.dense import at_least_float32
from dyhead.detection.roi import BOX_HEADS
from dyhead.detection.roi.pooling import PyramidPool
from dyhead.detection.roi.prediction import class_and_box_layers, either, loss_weights, weighed
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
        roi_heads = DetectingROIHeads(cfg, shapes) if detects(cfg) else build_roi_heads(cfg, shapes)
        if cfg.MODEL.ROI_BOX_HEAD.NAME in BOX_HEADS and not detects(cfg):
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


@ROI_HEADS_REGISTRY.register()
class DetectingROIHeads(StandardROIHeads):
    """Heads whose box head has losses and detections of its own, see :attr:`dyhead.detection.roi.Registered.detects`.

    :class:`DyHeadRCNN` takes them by the name of the box head; other meta-architectures by ``MODEL.ROI_HEADS.NAME``.
    """

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        names, head = cfg.MODEL.ROI_HEADS.IN_FEATURES, cfg.MODEL.ROI_BOX_HEAD.NAME
        strides = {name: input_shape[name].stride for name in names}
        return {
            "box_in_features": names,
            "box_pooler": None,
            "box_head": build_box_head(cfg, head, input_shape[names[0]].channels, strides),
            "box_predictor": None,
            "train_on_pred_boxes": False,
        }

    def _forward_box(self, features: dict[str, Tensor], proposals: list[Instances]) -> Any:
        boxes, sizes = [own.proposal_boxes.tensor for own in proposals], [own.image_size for own in proposals]
        if not self.training:
            found = self.box_head.detect(features, boxes, sizes)
            return [
                Instances(size, pred_boxes=Boxes(own), scores=scores, pred_classes=labels)
                for size, (own, scores, labels) in zip(sizes, found, strict=True)
            ]
        objects = [own.gt_boxes.tensor if own.has("gt_boxes") else own.proposal_boxes.tensor for own in proposals]
        return self.box_head.losses(features, boxes, [own.gt_classes for own in proposals], objects, sizes)


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


class OutputLayers(FastRCNNOutputLayers):
    """Detectron2's, for a box head that has features for boxes alone or weights of losses, or predicts crossed.

    Predictions are a list: one pair of logits (Q, K + 1) and deltas (Q, 4K or 4), or two.

    Args:
        cfg: the configuration.
        head: see :attr:`dyhead.detection.roi.Registered.options`.
        kwargs: of Detectron2's, in place of what the configuration says.
    """

    def __init__(self, cfg: CfgNode, head: nn.Module, **kwargs: Any) -> None:
        super().__init__(cfg, head.output_shape, **kwargs)
        self.weights_of_losses = loss_weights(head)
        sizes = self.cls_score.out_features, self.bbox_pred.out_features
        self.cls_score, self.bbox_pred = class_and_box_layers(head.out_features, *sizes)
        if len(self.weights_of_losses) > 1:
            layers = class_and_box_layers(head.out_features, *sizes, crossed=True)
            self.crossed_cls_score, self.crossed_bbox_pred = layers

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Features (Q, D) to predictions in float32 at least."""
        layers = [(self.cls_score, self.bbox_pred)]
        if len(self.weights_of_losses) > 1:
            layers.append((self.crossed_cls_score, self.crossed_bbox_pred))
        return [(at_least_float32(classes(x)), at_least_float32(boxes(x))) for classes, boxes in layers]

    def losses(self, predictions: list[tuple[Tensor, Tensor]], proposals: list[Instances]) -> dict[str, Tensor]:
        """Losses by name."""
        # Detectron2 also logs how often the class is right; the last counts, and shall not be that of crossed ones.
        losses = [super(OutputLayers, self).losses(pair, proposals) for pair in reversed(predictions)]
        return weighed(losses[::-1], self.weights_of_losses)

    def predict_probs(self, predictions: list[tuple[Tensor, Tensor]], proposals: list[Instances]) -> list[Tensor]:
        """Of each image, (Q, K + 1)."""
        probabilities = [super(OutputLayers, self).predict_probs(pair, proposals) for pair in predictions]
        return [either(own) for own in zip(*probabilities, strict=True)]

    def predict_boxes(self, predictions: list[tuple[Tensor, Tensor]], proposals: list[Instances]) -> list[Tensor]:
        """Of each image, (Q, 4K or 4)."""
        return super().predict_boxes(predictions[0], proposals)

    def predict_boxes_for_gt_classes(
        self, predictions: list[tuple[Tensor, Tensor]], proposals: list[Instances]
    ) -> list[Tensor]:
        """Of each image, (Q, 4)."""
        return super().predict_boxes_for_gt_classes(predictions[0], proposals)


def _adapt(cfg: CfgNode, roi_heads: nn.Module, strides: dict[str, int]) -> None:
    """Give a box head what Detectron2's RoI heads do not: several views of a region, features for boxes alone, ..."""
    box, heads, predictors = cfg.MODEL.ROI_BOX_HEAD, roi_heads.box_head, roi_heads.box_predictor
    is_cascade = isinstance(heads, nn.ModuleList)
    if not is_cascade:
        heads, predictors = [heads], [predictors]
    scales = getattr(heads[0], "scales", (1.0,))
    if scales != (1.0,):
        key, aligned = "MODEL.ROI_BOX_HEAD.POOLER_TYPE", box.POOLER_TYPE == "ROIAlignV2"
        expect(cfg, key, box.POOLER_TYPE != "ROIPool", f"'ROIAlignV2' or 'ROIAlign' with {box.NAME}")
        levels = {name: strides[name] for name in cfg.MODEL.ROI_HEADS.IN_FEATURES}
        pool = PyramidPool(levels, box.POOLER_RESOLUTION, box.POOLER_SAMPLING_RATIO, aligned, scales)
        roi_heads.box_pooler = ViewPooler(pool)
    adapted = nn.ModuleList(
        OutputLayers(cfg, head, box2box_transform=predictor.box2box_transform)
        for head, predictor in zip(heads, predictors, strict=True)
    )
    roi_heads.box_predictor = adapted if is_cascade else adapted[0]


def _register_box_head(name: str) -> None:
    """Let ``MODEL.ROI_BOX_HEAD.NAME`` choose a box head of :mod:`dyhead.detection.roi`, in any RoI heads."""

    def build(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
        key = "MODEL.ROI_HEADS.NAME"
        expect(cfg, key, not BOX_HEADS[name].detects, f"'DetectingROIHeads' with MODEL.ROI_BOX_HEAD.NAME {name}")
        head = build_box_head(cfg, name, input_shape.channels)
        features = head.out_features
        # What Detectron2 builds the predictors from, which _adapt replaces.
        head.output_shape = ShapeSpec(channels=features if isinstance(features, int) else sum(features))
        return head

    build.__name__ = name
    ROI_BOX_HEAD_REGISTRY.register(build)


for _name in BOX_HEADS:
    _register_box_head(_name)
