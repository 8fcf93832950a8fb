"""Two-stage detectors (Faster R-CNN, Mask R-CNN, ...) on a pyramid that has passed the necks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    FPN,
    META_ARCH_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
    StandardROIHeads,
    build_proposal_generator,
    build_roi_heads,
)
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from dyhead.build import build_box_head, build_taps, detects
from dyhead.config import TWO_STAGE, expect, get, options_of
from dyhead.config_checks import CASCADE
from dyhead.config_options import DUAL
from dyhead.detection.heads.dense import at_least_float32
from dyhead.detection.roi import BOX_HEADS, Tap
from dyhead.detection.roi.pooling import PyramidPool
from dyhead.detection.roi.prediction import class_and_box_layers, either, loss_weights, weighed
from dyhead.detectron2.backbone import NeckBackbone, build_backbone


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
        taps = build_taps(cfg, _laterals(backbone), backbone)
        kind = DETECTING if detects(cfg) else cfg.MODEL.ROI_HEADS.NAME
        roi_heads = _build_roi_heads(cfg, shapes, SUPERVISED[kind] if taps else None)
        if taps:
            others = {name: _build_roi_heads(cfg, shapes) for name in taps}
            roi_heads.supervise(taps, others, options_of(cfg, DUAL).loss_weight)
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
                Instances(size, pred_boxes=Boxes(own.boxes), scores=own.scores, pred_classes=own.labels)
                for size, own in zip(sizes, found, strict=True)
            ]
        objects = [own.gt_boxes.tensor if own.has("gt_boxes") else own.proposal_boxes.tensor for own in proposals]
        return self.box_head.losses(features, boxes, [own.gt_classes for own in proposals], objects, sizes)


class _Supervised:
    """RoI heads of Detectron2 whose regions other heads of the same structure learn from, too, on other maps."""

    def supervise(self, taps: Mapping[str, Tap], heads: Mapping[str, nn.Module], loss_weight: float) -> None:
        """See :meth:`dyhead.torchvision.rcnn.regions.RegionHeads.supervise`."""
        self.taps, self.auxiliary, self.auxiliary_weight = dict(taps), nn.ModuleDict(heads), loss_weight
        for own in heads.values():
            own.train_on_pred_boxes = False  # regions are those of the detector's own heads

    def forward(self, *args: Any, **kwargs: Any) -> tuple[list[Instances], dict[str, Tensor]]:
        """As without other heads; in training, with their losses."""
        result = super().forward(*args, **kwargs)
        for tap in self.taps.values():
            tap.clear()
        return result

    def _auxiliary_losses(
        self, losses: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        found = {}
        for name, tap in self.taps.items():
            with get_event_storage().name_scope(name):  # Detectron2 logs how good heads are
                own = losses(self.auxiliary[name], tap.levels)
            found |= {f"{key}_{name}": self.auxiliary_weight * loss for key, loss in own.items()}
        return found

    def _forward_mask(self, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        found = super()._forward_mask(features, instances)
        if self.training:
            found |= self._auxiliary_losses(lambda heads, maps: heads._forward_mask(maps, instances))
        return found

    def _forward_keypoint(self, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        found = super()._forward_keypoint(features, instances)
        if self.training:
            found |= self._auxiliary_losses(lambda heads, maps: heads._forward_keypoint(maps, instances))
        return found


class SupervisedROIHeads(_Supervised, StandardROIHeads):
    """Detectron2's StandardROIHeads with other heads beside them in training."""

    def _forward_box(self, features: dict[str, Tensor], proposals: list[Instances]) -> Any:
        if not self.training:
            return super()._forward_box(features, proposals)
        # First: with TRAIN_ON_PRED_BOXES the detector's own head then changes the regions.
        others = self._auxiliary_losses(lambda heads, maps: heads._forward_box(maps, proposals))
        return super()._forward_box(features, proposals) | others


class SupervisedCascadeROIHeads(_Supervised, CascadeROIHeads):
    """Detectron2's CascadeROIHeads, likewise; a stage of the other heads has the regions of the detector's own."""

    def _forward_box(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances] | None = None
    ) -> Any:
        self._of_stages: dict[str, Tensor] = {}
        found = super()._forward_box(features, proposals, targets)
        others, self._of_stages = self._of_stages, {}
        return found | others if self.training else found

    def _run_stage(self, features: list[Tensor], proposals: list[Instances], stage: int) -> Any:
        if self.training:
            losses = self._auxiliary_losses(partial(_stage_losses, proposals=proposals, stage=stage))
            self._of_stages |= losses
        return super()._run_stage(features, proposals, stage)


def _stage_losses(
    heads: CascadeROIHeads, maps: dict[str, Tensor], proposals: list[Instances], stage: int
) -> dict[str, Tensor]:
    predictions = heads._run_stage([maps[name] for name in heads.box_in_features], proposals, stage)
    losses = heads.box_predictor[stage].losses(predictions, proposals)
    return {f"{key}_stage{stage}": loss for key, loss in losses.items()}


class SupervisedDetectingROIHeads(SupervisedROIHeads, DetectingROIHeads):
    """:class:`DetectingROIHeads` with other heads beside them in training."""


DETECTING = DetectingROIHeads.__name__

#: RoI heads by ``MODEL.ROI_HEADS.NAME`` that other heads may be beside.
SUPERVISED: dict[str, type] = {
    "StandardROIHeads": SupervisedROIHeads,
    CASCADE: SupervisedCascadeROIHeads,
    DETECTING: SupervisedDetectingROIHeads,
}


def _build_roi_heads(cfg: CfgNode, shapes: dict[str, ShapeSpec], cls: type | None = None) -> nn.Module:
    if detects(cfg):
        return (cls or DetectingROIHeads)(cfg, shapes)
    roi_heads = cls(cfg, shapes) if cls else build_roi_heads(cfg, shapes)
    if cfg.MODEL.ROI_BOX_HEAD.NAME in BOX_HEADS:
        _adapt(cfg, roi_heads, {name: shape.stride for name, shape in shapes.items()})
    return roi_heads


def _laterals(backbone: nn.Module) -> dict[str, nn.Module]:
    """The lateral convolutions of Detectron2's feature pyramid network, by the level that each is added to."""
    pyramid = backbone.backbone if isinstance(backbone, NeckBackbone) else backbone
    if not isinstance(pyramid, FPN):
        return {}
    name = "fpn_lateral"
    found = {key.replace(name, "p"): layer for key, layer in pyramid.named_children() if key.startswith(name)}
    return dict(sorted(found.items()))


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
    adapted = [
        OutputLayers(cfg, head, box2box_transform=predictor.box2box_transform) if _needs_layers(head) else predictor
        for head, predictor in zip(heads, predictors, strict=True)
    ]
    roi_heads.box_predictor = nn.ModuleList(adapted) if is_cascade else adapted[0]


def _needs_layers(head: nn.Module) -> bool:
    return not isinstance(head.out_features, int) or loss_weights(head) != ((1.0, 1.0),)


def _register_box_head(name: str) -> None:
    """Let ``MODEL.ROI_BOX_HEAD.NAME`` choose a box head of :mod:`dyhead.detection.roi`, in any RoI heads."""

    def build(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
        key = "MODEL.ROI_HEADS.NAME"
        expect(cfg, key, not BOX_HEADS[name].detects, f"'DetectingROIHeads' with MODEL.ROI_BOX_HEAD.NAME {name}")
        head = build_box_head(cfg, name, input_shape.channels)
        if cfg.MODEL.META_ARCHITECTURE != TWO_STAGE:
            plain = getattr(head, "scales", (1.0,)) == (1.0,) and not _needs_layers(head)
            expect(cfg, "MODEL.META_ARCHITECTURE", plain, f"{TWO_STAGE} with MODEL.ROI_BOX_HEAD.NAME {name}")
        features = head.out_features
        # What Detectron2 builds the predictors from; of a pair, _adapt builds them.
        head.output_shape = ShapeSpec(channels=features if isinstance(features, int) else sum(features))
        return head

    build.__name__ = name
    ROI_BOX_HEAD_REGISTRY.register(build)


for _name in BOX_HEADS:
    _register_box_head(_name)
