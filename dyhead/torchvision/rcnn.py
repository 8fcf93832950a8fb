"""Faster, Mask, Keypoint and Cascade R-CNN: torchvision's, with DyHead on the pyramid before proposals and RoI pooling.

N batch, C channels, K classes, Q proposals of all images, S side of a pooled region in cells, J keypoints of an object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes

from dyhead.build import build_box_head, build_taps, detects
from dyhead.config import ConfigError, get, options_of
from dyhead.config_checks import CASCADE
from dyhead.config_options import DUAL
from dyhead.detection import Anchors
from dyhead.detection.boxes import Deltas
from dyhead.detection.heads.dense import at_least_float32
from dyhead.detection.roi import BOX_HEADS, Tap
from dyhead.detection.roi.keypoints import find_keypoints, keypoint_loss
from dyhead.detection.roi.masks import crop_masks, mask_loss, mask_probabilities
from dyhead.detection.roi.pooling import PyramidPool
from dyhead.detection.roi.prediction import LossWeights, class_and_box_layers, either, loss_weights, weighed
from dyhead.torchvision.anchors import PyramidAnchors
from dyhead.torchvision.backbone import build_norm, build_pyramid
from dyhead.torchvision.config import iou_thresholds
from dyhead.torchvision.normalization import Normalization

#: Class logits (Q, 1 + K) and deltas (Q, 4 + 4K) of regions, and, if there are any, crossed ones.
RegionPredictions = list[tuple[Tensor, Tensor]]


class FasterRCNN(GeneralizedRCNN):
    """torchvision's Faster R-CNN with labels as in its one-stage detectors: 0 to K - 1, without a background class.

    Its own class of this name builds parts whose losses and pooling are fixed; here the parts come ready.
    """

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        """As in :class:`torchvision.models.detection.FCOS`: losses by name in training, else detections."""
        if self.training:
            return super().forward(images, [t | {"labels": t["labels"] + 1} for t in targets])
        return [found | {"labels": found["labels"] - 1} for found in super().forward(images)]


class BoxCoder:
    """A box form with the interface of torchvision's coder of boxes.

    Args:
        form: what the numbers mean.
    """

    def __init__(self, form: Deltas) -> None:
        self.form = form

    def encode(self, boxes: list[Tensor], anchors: list[Tensor]) -> list[Tensor]:
        """Deltas (Q, 4) of each image's boxes from its anchors."""
        return [self.form.encode(own, from_) for own, from_ in zip(boxes, anchors, strict=True)]

    def decode(self, numbers: Tensor, anchors: list[Tensor]) -> Tensor:
        """Boxes (Q, X, 4) from X deltas (Q, X*4) of the anchors of all images."""
        count = numbers.shape[1] // 4
        places = torch.cat(anchors).repeat_interleave(count, dim=0)
        return self.form.decode(numbers.reshape(-1, 4), places).view(len(numbers), count, 4)


class BoxPredictor(nn.Module):
    """Class logits and deltas of regions, with the parameters of Detectron2's and the outputs of torchvision's.

    Detectron2's last class is the background, which has no deltas; torchvision's class 0 is, with deltas that are never
    read.

    Args:
        features: of a region, see :attr:`dyhead.detection.roi.Registered.options`.
        num_classes: classes K.
        class_agnostic: predict the same deltas for all classes.
        loss_weights: of what is predicted; a second pair is of crossed predictions.
    """

    def __init__(
        self,
        features: int | tuple[int, int],
        num_classes: int,
        *,
        class_agnostic: bool = False,
        loss_weights: LossWeights = ((1.0, 1.0),),
    ) -> None:
        super().__init__()
        self.repeats = num_classes if class_agnostic else 1
        self.loss_weights = loss_weights
        sizes = num_classes + 1, 4 * num_classes // self.repeats
        self.cls_score, self.bbox_pred = class_and_box_layers(features, *sizes)
        if len(loss_weights) > 1:
            self.crossed_cls_score, self.crossed_bbox_pred = class_and_box_layers(features, *sizes, crossed=True)

    def forward(self, x: Tensor) -> RegionPredictions:
        """Regions (Q, C, ...) to logits and deltas in float32 at least, the background first."""
        x = x.flatten(1)
        layers = [(self.cls_score, self.bbox_pred)]
        if len(self.loss_weights) > 1:
            layers.append((self.crossed_cls_score, self.crossed_bbox_pred))
        return [
            (
                at_least_float32(classes(x)).roll(1, dims=1),
                F.pad(at_least_float32(boxes(x)).repeat(1, self.repeats), (4, 0)),
            )
            for classes, boxes in layers
        ]


def class_probabilities(predictions: RegionPredictions) -> Tensor:
    """(Q, 1 + K), of either prediction; where there are crossed ones, the background's is no rest of the others."""
    return either([logits.softmax(dim=1) for logits, _ in predictions])


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's region proposal network on some levels of the pyramid, with the losses of the configuration.

    Args:
        levels: names of the levels it works on.
        box_form: what the deltas mean, and what they cost.
        loss_weights: of the objectness and of the boxes.
        args, kwargs: torchvision's.
    """

    def __init__(
        self,
        *args,
        levels: Sequence[str],
        box_form: Deltas,
        loss_weights: tuple[float, float],
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.levels = tuple(levels)
        self.box_form = box_form
        self.box_coder = BoxCoder(box_form)
        self.loss_weights = loss_weights

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals of each image (x0, y0, x1, y1 in pixels), and in training the losses by Detectron2's names."""
        levels = [features[name] for name in self.levels]
        logits, deltas = self.head(levels)
        anchors = self.anchor_generator(images, levels)
        counts = [level[0].numel() for level in logits]
        # (N, A*X, H, W) to (N, H*W*A, X), in float32: positions in pixels do not fit half types.
        logits = torch.cat([x.float().permute(0, 2, 3, 1).flatten(1) for x in logits], dim=1)
        deltas = torch.cat([x.float().permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in deltas], dim=1)
        boxes = self.box_coder.decode(deltas.detach().reshape(-1, 4), anchors).view(len(deltas), -1, 4)
        proposals, _ = self.filter_proposals(boxes, logits.detach(), images.image_sizes, counts)
        if not self.training:
            return proposals, {}
        labels, matched = self.assign_targets_to_anchors(anchors, targets)
        return proposals, self.compute_losses(logits, deltas, anchors, labels, matched)

    def compute_losses(
        self, logits: Tensor, deltas: Tensor, anchors: list[Tensor], labels: list[Tensor], matched: list[Tensor]
    ) -> dict[str, Tensor]:
        """Losses of a random sample of the anchors, by the size that the sample should have.

        Args:
            logits: objectness (N, R).
            deltas: (N, R, 4).
            anchors: for each image (R, 4) in pixels.
            labels: for each image (R,): 1 object, 0 background, -1 ignored.
            matched: for each image the box (R, 4) that each anchor is compared with.
        """
        positive, negative = (torch.stack(chosen).bool() for chosen in self.fg_bg_sampler(labels))
        sample = positive | negative
        count = len(labels) * self.fg_bg_sampler.batch_size_per_image
        loss_cls = F.binary_cross_entropy_with_logits(logits[sample], torch.stack(labels)[sample], reduction="sum")
        loss_loc = self.box_form.loss(
            deltas[positive], torch.stack(anchors)[positive], torch.stack(matched)[positive]
        ).sum()
        weight_cls, weight_loc = self.loss_weights
        return {"loss_rpn_cls": weight_cls * loss_cls / count, "loss_rpn_loc": weight_loc * loss_loc / count}


class RegionHeads(RoIHeads):
    """torchvision's heads of boxes, masks and keypoints, with the losses of the configuration.

    Args:
        box_form: what the deltas mean, and what they cost.
        loss_weight: of the boxes.
        append_truth: add the true boxes to the proposals in training.
        keypoint_loss_weight: of the keypoints.
        keypoint_divisor: what an image adds to the number that the keypoints' loss is divided by; None: the number of
            keypoints that are in their regions.
        args, kwargs: torchvision's.
    """

    def __init__(
        self,
        *args,
        box_form: Deltas,
        loss_weight: float,
        append_truth: bool,
        keypoint_loss_weight: float = 1.0,
        keypoint_divisor: float | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.box_form = box_form
        self.box_coder = BoxCoder(box_form)
        self.loss_weight = loss_weight
        self.append_truth = append_truth
        self.keypoint_loss_weight = keypoint_loss_weight
        self.keypoint_divisor = keypoint_divisor
        self.taps: dict[str, Tap] = {}

    def supervise(self, taps: Mapping[str, Tap], heads: Mapping[str, RegionHeads], loss_weight: float) -> None:
        """In training, let other heads learn from the same regions on other maps.

        Args:
            taps: the maps, by name.
            heads: of the same names and the same structure.
            loss_weight: what their losses are multiplied by.
        """
        self.taps, self.auxiliary, self.auxiliary_weight = dict(taps), nn.ModuleDict(heads), loss_weight

    def _auxiliary_losses(
        self, losses: Callable[[RegionHeads, dict[str, Tensor]], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What ``losses`` gives for each of the other heads and its maps, by names that end with the heads'."""
        return {
            f"{key}_{name}": self.auxiliary_weight * loss
            for name, tap in self.taps.items()
            for key, loss in losses(self.auxiliary[name], tap.levels).items()
        }

    def add_gt_proposals(self, proposals: list[Tensor], gt_boxes: list[Tensor]) -> list[Tensor]:
        """The proposals, with the true boxes if so configured."""
        return super().add_gt_proposals(proposals, gt_boxes) if self.append_truth else list(proposals)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of each image or, in training, the losses by Detectron2's names; label 0 is background.

        Detections have boxes (D, 4), scores and labels (D,), masks (D, S, S) as probabilities of the boxes' cells
        where there is a mask head, and keypoints (D, J, 3) as x, y and score where there is a keypoint head.
        """
        if not self.training:
            found = self.detect_boxes(features, proposals, image_shapes)
            return self._with_parts(found, features, image_shapes), {}
        proposals, matched, labels, _ = self.select_training_samples(proposals, targets)
        losses = self.box_losses(features, proposals, image_shapes, matched, labels, targets)
        positive = [torch.where(own > 0)[0] for own in labels]
        boxes = [own[where] for own, where in zip(proposals, positive, strict=True)]
        objects = [own[where] for own, where in zip(matched, positive, strict=True)]
        classes = [own[where] - 1 for own, where in zip(labels, positive, strict=True)]
        losses |= self.part_losses(features, boxes, image_shapes, objects, classes, targets)
        losses |= self._auxiliary_losses(
            lambda heads, maps: heads.part_losses(maps, boxes, image_shapes, objects, classes, targets)
        )
        for tap in self.taps.values():
            tap.clear()
        return [], losses

    def part_losses(
        self,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]],
        objects: list[Tensor],
        classes: list[Tensor],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Losses of masks and keypoints of positive proposals, each with its object and that one's class, from 0."""
        losses = {}
        if self.has_mask():
            logits = self.mask_logits(features, boxes, image_shapes)
            truth = [
                crop_masks(t["masks"], own, of, logits.shape[-1])
                for t, of, own in zip(targets, objects, boxes, strict=True)
            ]
            losses["loss_mask"] = mask_loss(logits, torch.cat(classes), torch.cat(truth))
        if self.has_keypoint():
            logits = self.keypoint_logits(features, boxes, image_shapes)
            points = torch.cat([t["keypoints"][of] for t, of in zip(targets, objects, strict=True)])
            divisor = None if self.keypoint_divisor is None else self.keypoint_divisor * len(targets)
            loss = keypoint_loss(logits, torch.cat(boxes), points, divisor)
            losses["loss_keypoint"] = self.keypoint_loss_weight * loss
        return losses

    def detect_boxes(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Boxes, scores and labels of each image."""
        predictions = self._predict(features, proposals, image_shapes)
        boxes = self.box_coder.decode(predictions[0][1], proposals)
        return self._choose(boxes, class_probabilities(predictions), image_shapes, [len(own) for own in proposals])

    def _choose(
        self, boxes: Tensor, scores: Tensor, image_shapes: list[tuple[int, int]], counts: list[int]
    ) -> list[dict[str, Tensor]]:
        """What is left of boxes (Q, 1 + K, 4) with scores (Q, 1 + K) after NMS, for each image.

        torchvision's own takes logits, whose probabilities add up to 1.
        """
        found = []
        for own, own_scores, size in zip(boxes.split(counts), scores.split(counts), image_shapes, strict=True):
            place, label = torch.nonzero(own_scores[:, 1:] > self.score_thresh, as_tuple=True)
            label = label + 1
            chosen, score = clip_boxes_to_image(own[place, label], size), own_scores[place, label]
            there = remove_small_boxes(chosen, min_size=1e-2)
            chosen, score, label = chosen[there], score[there], label[there]
            best = batched_nms(chosen, score, label, self.nms_thresh)[: self.detections_per_img]
            found.append({"boxes": chosen[best], "scores": score[best], "labels": label[best]})
        return found

    def box_losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        matched: list[Tensor],
        labels: list[Tensor],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Losses of sampled proposals, each with the object that it overlaps most and its label."""
        sample = proposals, image_shapes, matched, labels, targets
        losses = self._own_box_losses(features, *sample)
        return losses | self._auxiliary_losses(lambda heads, maps: heads.box_losses(maps, *sample))

    def _own_box_losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        matched: list[Tensor],
        labels: list[Tensor],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        predictions = self._predict(features, proposals, image_shapes)
        return self._costs(self.box_form, self.box_predictor, predictions, proposals, matched, labels, targets)

    def _costs(
        self,
        box_form: Deltas,
        predictor: BoxPredictor,
        predictions: RegionPredictions,
        proposals: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        truth = torch.cat(_truth(proposals, matched, targets))
        labels, boxes = torch.cat(labels), torch.cat(proposals)
        positive = torch.where(labels > 0)[0]
        losses = []
        for logits, deltas in predictions:
            own_class = deltas.view(*logits.shape, 4)[positive, labels[positive]]
            loss_box = box_form.loss(own_class, boxes[positive], truth[positive]).sum()
            losses.append(
                {
                    # Summed and divided, not averaged: the mean of no proposals would be NaN.
                    "loss_cls": F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1),
                    "loss_box_reg": self.loss_weight * loss_box / max(len(labels), 1),
                }
            )
        return weighed(losses, predictor.loss_weights)

    def mask_logits(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Of the boxes of all images, (Q, K, S, S), in float32."""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))).float()

    def keypoint_logits(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Of the boxes of all images, (Q, J, S, S), in float32."""
        regions = self.keypoint_roi_pool(features, boxes, image_shapes)
        return self.keypoint_predictor(self.keypoint_head(regions)).float()

    def _predict(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> RegionPredictions:
        return self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))

    def _with_parts(
        self,
        found: list[dict[str, Tensor]],
        features: dict[str, Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        boxes = [each["boxes"] for each in found]
        counts, parts = [len(own) for own in boxes], {}
        if self.has_mask():
            labels = torch.cat([each["labels"] for each in found]) - 1
            parts["masks"] = mask_probabilities(self.mask_logits(features, boxes, image_shapes), labels)
        if self.has_keypoint():
            logits = self.keypoint_logits(features, boxes, image_shapes)
            parts["keypoints"] = find_keypoints(logits, torch.cat(boxes))
        for key, values in parts.items():
            found = [each | {key: own} for each, own in zip(found, values.split(counts), strict=True)]
        return found


class DetectingHeads(RegionHeads):
    """Heads whose box head has losses and detections of its own: :attr:`dyhead.detection.roi.Registered.detects`."""

    def _own_box_losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        matched: list[Tensor],
        labels: list[Tensor],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        # The background's label is its last one.
        labels = [torch.where(own > 0, own - 1, self.box_head.num_classes) for own in labels]
        return self.box_head.losses(features, proposals, labels, _truth(proposals, matched, targets), image_shapes)

    def detect_boxes(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """The head's detections."""
        found = self.box_head.detect(features, proposals, image_shapes)
        return [{"boxes": own.boxes, "scores": own.scores, "labels": own.labels + 1} for own in found]


class CascadeStage(nn.Module):
    """One stage of a cascade.

    Args:
        head: of the boxes.
        predictor: of classes and deltas, the same deltas for all classes.
        box_form: what the deltas mean, and what they cost.
        threshold: IoU from which on a box is an object's.
    """

    def __init__(self, head: nn.Module, predictor: BoxPredictor, box_form: Deltas, threshold: float) -> None:
        super().__init__()
        self.head = head
        self.predictor = predictor
        self.box_form = box_form
        self.threshold = threshold

    def forward(self, regions: Tensor) -> RegionPredictions:
        """Of regions (Q, V * C, S, S)."""
        return self.predictor(self.head(regions))

    def label(self, boxes: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """For each box the object that it overlaps most, and that one's label, or 0 below the threshold."""
        if not len(target["boxes"]):
            nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
            return nothing, nothing
        overlap, index = box_iou(target["boxes"], boxes).max(dim=0)
        return index, target["labels"][index] * (overlap >= self.threshold)


class CascadeHeads(RegionHeads):
    """Cascade R-CNN (Cai and Vasconcelos, CVPR 2018): each stage starts from the boxes of the one before.

    Args:
        stages: in their order; the first one's boxes are the sampled proposals.
        args, kwargs: of :class:`RegionHeads`, whose own box head and predictor are None.
    """

    def __init__(self, *args, stages: Sequence[CascadeStage], **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.stages = nn.ModuleList(stages)
        self.box_coder = BoxCoder(stages[-1].box_form)

    def box_losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        matched: list[Tensor],
        labels: list[Tensor],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """The losses of all stages, see :class:`RegionHeads`."""
        losses = {}
        for number, stage in enumerate(self.stages):
            if number:
                # What has become empty is no proposal.
                proposals = [boxes[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)] for boxes in proposals]
                pairs = [stage.label(boxes, t) for boxes, t in zip(proposals, targets, strict=True)]
                matched, labels = (list(part) for part in zip(*pairs, strict=True))
            arguments = number, proposals, image_shapes, matched, labels, targets
            predictions, own = self.stage_losses(features, *arguments)
            losses |= own | self._auxiliary_losses(lambda heads, maps, a=arguments: heads.stage_losses(maps, *a)[1])
            proposals = self._refined(stage, predictions, proposals, image_shapes)
        return losses

    def stage_losses(
        self,
        features: dict[str, Tensor],
        number: int,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        matched: list[Tensor],
        labels: list[Tensor],
        targets: list[dict[str, Tensor]],
    ) -> tuple[RegionPredictions, dict[str, Tensor]]:
        """The predictions and losses of a stage, from the proposals that it starts from."""
        stage = self.stages[number]
        predictions = self._run(stage, features, proposals, image_shapes)
        costs = self._costs(stage.box_form, stage.predictor, predictions, proposals, matched, labels, targets)
        return predictions, {f"{name}_stage{number}": loss for name, loss in costs.items()}

    def detect_boxes(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """The last stage's boxes, with the mean of all stages' probabilities as scores."""
        probabilities = 0.0
        for stage in self.stages:
            before = proposals
            predictions = self._run(stage, features, before, image_shapes)
            probabilities = probabilities + class_probabilities(predictions) / len(self.stages)
            proposals = self._refined(stage, predictions, before, image_shapes)
        boxes = BoxCoder(stage.box_form).decode(predictions[0][1], before)
        return self._choose(boxes, probabilities, image_shapes, [len(own) for own in before])

    def _run(
        self,
        stage: CascadeStage,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> RegionPredictions:
        regions = self.box_roi_pool(features, boxes, image_shapes)
        if regions.requires_grad:  # the stages' losses are added up for the heads, and averaged for what is below
            regions.register_hook(lambda gradient: gradient / len(self.stages))
        return stage(regions)

    @staticmethod
    @torch.no_grad()
    def _refined(
        stage: CascadeStage, predictions: RegionPredictions, boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[Tensor]:
        deltas = predictions[0][1][:, -4:]  # of all classes alike
        refined = stage.box_form.decode(deltas, torch.cat(boxes)).split([len(own) for own in boxes])
        return [clip_boxes_to_image(own, size) for own, size in zip(refined, image_shapes, strict=True)]


def _truth(proposals: list[Tensor], matched: list[Tensor], targets: list[dict[str, Tensor]]) -> list[Tensor]:
    """The object of each proposal; without objects, which no proposal is labelled as, itself."""
    return [t["boxes"][m] if len(t["boxes"]) else p for t, m, p in zip(targets, matched, proposals, strict=True)]


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
