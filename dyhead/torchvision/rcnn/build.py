"""Faster, Mask, Keypoint and Cascade R-CNN of a configuration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from dyhead.build import build_box_head, build_taps, detects
from dyhead.config import ConfigError, get, options_of
from dyhead.config_checks import CASCADE
from dyhead.config_options import DUAL
from dyhead.detection import Anchors
from dyhead.detection.boxes import Deltas
from dyhead.detection.roi import BOX_HEADS
from dyhead.detection.roi.masks import mask_probabilities
from dyhead.detection.roi.pooling import PyramidPool
from dyhead.detection.roi.prediction import loss_weights
from dyhead.torchvision.anchors import PyramidAnchors
from dyhead.torchvision.backbone import build_norm, build_pyramid
from dyhead.torchvision.config import iou_thresholds
from dyhead.torchvision.normalization import Normalization
from dyhead.torchvision.rcnn.boxes import BoxPredictor
from dyhead.torchvision.rcnn.cascade import CascadeHeads, CascadeStage
from dyhead.torchvision.rcnn.proposals import ProposalNetwork
from dyhead.torchvision.rcnn.regions import DetectingHeads, RegionHeads


class FasterRCNN(GeneralizedRCNN):
    """torchvision's Faster R-CNN with labels as in its one-stage detectors: 0 to K - 1, without a background class.

    Its own class of this name builds parts whose losses and pooling are fixed; here the parts come ready.
    """

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        """As in :class:`torchvision.models.detection.FCOS`: losses by name in training, else detections."""
        if self.training:
            return super().forward(images, [t | {"labels": t["labels"] + 1} for t in targets])
        return [found | {"labels": found["labels"] - 1} for found in super().forward(images)]

    def detect_boxes(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """The boxes, scores and labels that evaluation gives, without masks and keypoints."""
        batch, features = self._features(images)
        proposals, _ = self.rpn(batch, features)
        found = self.roi_heads.detect_boxes(features, proposals, batch.image_sizes)
        return [own | {"labels": own["labels"] - 1} for own in found]

    def find_masks(self, images: list[Tensor], boxes: list[Tensor], labels: list[Tensor]) -> list[Tensor]:
        """The masks (D, S, S) that evaluation gives, of given boxes (D, 4) and labels (D,) of each image."""
        batch, features = self._features(images)
        logits = self.roi_heads.mask_logits(features, boxes, batch.image_sizes)
        return list(mask_probabilities(logits, torch.cat(labels)).split([len(own) for own in boxes]))

    def _features(self, images: list[Tensor]) -> tuple[ImageList, dict[str, Tensor]]:
        batch, _ = self.transform(images)
        return batch, self.backbone(batch.tensors)


def build_faster_rcnn(cfg: CfgNode) -> FasterRCNN:
    """Faster R-CNN with DyHead, of ``MODEL.RPN``, ``ROI_HEADS`` and ``ROI_BOX_HEAD``; labels 0 to K - 1.

    ``MODEL.MASK_ON`` makes it Mask R-CNN, ``MODEL.KEYPOINT_ON`` Keypoint R-CNN, and ``MODEL.ROI_HEADS.NAME
    CascadeROIHeads`` Cascade R-CNN.

    Raises:
        ConfigError, ValueError: levels that are not there, labels that are not supported.
    """
    pyramid = build_pyramid(cfg)
    strides = _strides(pyramid.strides, cfg, "MODEL.ROI_HEADS")
    heads = _build_region_heads(cfg, pyramid.out_channels, strides)
    if taps := build_taps(cfg, pyramid.laterals, pyramid):
        others = {name: _build_region_heads(cfg, pyramid.out_channels, strides) for name in taps}
        heads.supervise(taps, others, options_of(cfg, DUAL).loss_weight)
    return FasterRCNN(
        pyramid,
        _build_proposal_network(cfg, pyramid.out_channels, _strides(pyramid.strides, cfg, "MODEL.RPN")),
        heads,
        Normalization(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, pyramid.size_divisibility),
    )


def _strides(strides: dict[str, int], cfg: CfgNode, node: str) -> dict[str, int]:
    names = get(cfg, f"{node}.IN_FEATURES")
    if not names or not set(names) <= set(strides):
        raise ConfigError(f"{node}.IN_FEATURES: expected some of the levels {', '.join(strides)}, got {names}")
    return {name: stride for name, stride in strides.items() if name in names}


def _build_proposal_network(cfg: CfgNode, channels: int, strides: dict[str, int]) -> ProposalNetwork:
    options, anchors = cfg.MODEL.RPN, options_of(cfg, "MODEL.ANCHOR_GENERATOR")
    if not options.CONV_DIMS or any(width not in (-1, channels) for width in options.CONV_DIMS):
        raise ConfigError(
            f"MODEL.RPN.CONV_DIMS: expected one -1 for each convolution of {channels} channels, got {options.CONV_DIMS}"
        )
    grid = Anchors(anchors.sizes, anchors.aspect_ratios, list(strides.values()), anchors.offset)
    low, high = iou_thresholds(cfg, "MODEL.RPN")
    network = ProposalNetwork(
        PyramidAnchors(grid),
        RPNHead(channels, grid.per_cell, conv_depth=len(options.CONV_DIMS)),
        high,
        low,
        options.BATCH_SIZE_PER_IMAGE,
        options.POSITIVE_FRACTION,
        {"training": options.PRE_NMS_TOPK_TRAIN, "testing": options.PRE_NMS_TOPK_TEST},
        {"training": options.POST_NMS_TOPK_TRAIN, "testing": options.POST_NMS_TOPK_TEST},
        options.NMS_THRESH,
        levels=strides,
        box_form=Deltas(tuple(options.BBOX_REG_WEIGHTS), options.BBOX_REG_LOSS_TYPE, options.SMOOTH_L1_BETA),
        loss_weights=(options.LOSS_WEIGHT, options.LOSS_WEIGHT * options.BBOX_REG_LOSS_WEIGHT),
    )
    network.min_size = max(network.min_size, cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE)
    return network


def _build_region_heads(cfg: CfgNode, channels: int, strides: dict[str, int]) -> RegionHeads:
    options, box, points = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_KEYPOINT_HEAD
    low, high = iou_thresholds(cfg, "MODEL.ROI_HEADS")
    parts: dict[str, nn.Module] = {}
    if cfg.MODEL.MASK_ON:
        parts |= _build_mask_head(cfg, channels, strides)
    if cfg.MODEL.KEYPOINT_ON:
        parts |= {
            "keypoint_roi_pool": _pool(strides, points),
            "keypoint_head": KeypointRCNNHeads(channels, points.CONV_DIMS),
            "keypoint_predictor": KeypointRCNNPredictor(points.CONV_DIMS[-1], points.NUM_KEYPOINTS),
        }
    sampled = options.BATCH_SIZE_PER_IMAGE * options.POSITIVE_FRACTION * points.NUM_KEYPOINTS
    shared = {
        "fg_iou_thresh": high,
        "bg_iou_thresh": low,
        "batch_size_per_image": options.BATCH_SIZE_PER_IMAGE,
        "positive_fraction": options.POSITIVE_FRACTION,
        "bbox_reg_weights": None,  # its own coder of boxes is not read
        "score_thresh": options.SCORE_THRESH_TEST,
        "nms_thresh": options.NMS_THRESH_TEST,
        "detections_per_img": cfg.TEST.DETECTIONS_PER_IMAGE,
        "box_form": _box_form(box, box.BBOX_REG_WEIGHTS),
        "loss_weight": box.BBOX_REG_LOSS_WEIGHT,
        "append_truth": options.PROPOSAL_APPEND_GT,
        "keypoint_loss_weight": points.LOSS_WEIGHT,
        "keypoint_divisor": None if points.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS else sampled,
        **parts,
    }
    if detects(cfg):
        return DetectingHeads(None, build_box_head(cfg, box.NAME, channels, strides), None, **shared)
    if options.NAME != CASCADE:
        head, predictor = _build_box_head(cfg, channels)
        return RegionHeads(_pool(strides, box, head), head, predictor, **shared)
    cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
    stages = [
        CascadeStage(*_build_box_head(cfg, channels), _box_form(box, weights), threshold)
        for weights, threshold in zip(cascade.BBOX_REG_WEIGHTS, cascade.IOUS, strict=True)
    ]
    return CascadeHeads(_pool(strides, box, stages[0].head), None, None, stages=stages, **shared)


def _build_mask_head(cfg: CfgNode, channels: int, strides: dict[str, int]) -> dict[str, nn.Module]:
    mask = cfg.MODEL.ROI_MASK_HEAD
    classes = 1 if mask.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES
    return {
        "mask_roi_pool": _pool(strides, mask),
        "mask_head": MaskRCNNHeads(channels, [mask.CONV_DIM] * mask.NUM_CONV, 1, build_norm(mask.NORM)),
        "mask_predictor": MaskRCNNPredictor(mask.CONV_DIM, mask.CONV_DIM, classes),
    }


def _pool(strides: dict[str, int], node: CfgNode, head: nn.Module | None = None) -> PyramidPool:
    aligned, scales = node.POOLER_TYPE == "ROIAlignV2", getattr(head, "scales", (1.0,))
    return PyramidPool(strides, node.POOLER_RESOLUTION, node.POOLER_SAMPLING_RATIO, aligned, scales)


def _box_form(box: CfgNode, weights: Sequence[float]) -> Deltas:
    return Deltas(tuple(weights), box.BBOX_REG_LOSS_TYPE, box.SMOOTH_L1_BETA)


def _build_box_head(cfg: CfgNode, channels: int) -> tuple[nn.Module, BoxPredictor]:
    """The head of ``MODEL.ROI_BOX_HEAD``, and what predicts from its features."""
    box, side = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
    if box.NAME in BOX_HEADS:
        head = build_box_head(cfg, box.NAME, channels)
        features = head.out_features
    else:
        norm = build_norm(box.NORM)
        head = FastRCNNConvFCHead(
            (channels, side, side), [box.CONV_DIM] * box.NUM_CONV, [box.FC_DIM] * box.NUM_FC, norm
        )
        features = box.FC_DIM if box.NUM_FC else (box.CONV_DIM if box.NUM_CONV else channels) * side**2
    agnostic, weights = box.CLS_AGNOSTIC_BBOX_REG, loss_weights(head)
    return head, BoxPredictor(features, cfg.MODEL.ROI_HEADS.NUM_CLASSES, class_agnostic=agnostic, loss_weights=weights)
