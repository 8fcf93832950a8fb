"""The heads of regions: boxes, masks and keypoints.

C channels, K classes, Q proposals of all images, S side of a pooled region in cells, J keypoints of an object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from dyhead.detection.boxes import Deltas
from dyhead.detection.roi import Tap
from dyhead.detection.roi.keypoints import find_keypoints, keypoint_loss
from dyhead.detection.roi.masks import crop_masks, mask_loss, mask_probabilities
from dyhead.detection.roi.prediction import weighed
from dyhead.torchvision.rcnn.boxes import BoxCoder, BoxPredictor, RegionPredictions, class_probabilities


class Sample(NamedTuple):
    """The regions that the losses are computed of; each list has an entry per image.

    Attributes:
        boxes: (Q, 4) in pixels.
        sizes: height and width of the image.
        matched: index (Q,) of the object that a box overlaps most.
        labels: (Q,) of that object, 0 is background.
        targets: the image's objects.
    """

    boxes: list[Tensor]
    sizes: list[tuple[int, int]]
    matched: list[Tensor]
    labels: list[Tensor]
    targets: list[dict[str, Tensor]]

    @property
    def truth(self) -> list[Tensor]:
        """The object's box (Q, 4) of each; without objects, which no region is labelled as, itself."""
        each = zip(self.targets, self.matched, self.boxes, strict=True)
        return [t["boxes"][m] if len(t["boxes"]) else own for t, m, own in each]

    @property
    def positive(self) -> Sample:
        """Those that are objects."""
        where = [torch.where(own > 0)[0] for own in self.labels]
        return self._replace(
            boxes=[own[w] for own, w in zip(self.boxes, where, strict=True)],
            matched=[own[w] for own, w in zip(self.matched, where, strict=True)],
            labels=[own[w] for own, w in zip(self.labels, where, strict=True)],
        )


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
        sample = Sample(proposals, image_shapes, matched, labels, targets)
        losses = self.box_losses(features, sample)
        objects = sample.positive
        losses |= self.part_losses(features, objects)
        losses |= self._auxiliary_losses(lambda heads, maps: heads.part_losses(maps, objects))
        for tap in self.taps.values():
            tap.clear()
        return [], losses

    def part_losses(self, features: dict[str, Tensor], objects: Sample) -> dict[str, Tensor]:
        """Losses of the masks and keypoints of positive proposals."""
        losses = {}
        if self.has_mask():
            logits = self.mask_logits(features, objects.boxes, objects.sizes)
            truth = [
                crop_masks(t["masks"], own, of, logits.shape[-1])
                for t, of, own in zip(objects.targets, objects.matched, objects.boxes, strict=True)
            ]
            losses["loss_mask"] = mask_loss(logits, torch.cat(objects.labels) - 1, torch.cat(truth))
        if self.has_keypoint():
            logits = self.keypoint_logits(features, objects.boxes, objects.sizes)
            points = torch.cat([t["keypoints"][of] for t, of in zip(objects.targets, objects.matched, strict=True)])
            divisor = None if self.keypoint_divisor is None else self.keypoint_divisor * len(objects.targets)
            loss = keypoint_loss(logits, torch.cat(objects.boxes), points, divisor)
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

    def box_losses(self, features: dict[str, Tensor], sample: Sample) -> dict[str, Tensor]:
        """Losses of the boxes and classes of sampled proposals."""
        losses = self._own_box_losses(features, sample)
        return losses | self._auxiliary_losses(lambda heads, maps: heads.box_losses(maps, sample))

    def _own_box_losses(self, features: dict[str, Tensor], sample: Sample) -> dict[str, Tensor]:
        predictions = self._predict(features, sample.boxes, sample.sizes)
        return self._costs(self.box_form, self.box_predictor, predictions, sample)

    def _costs(
        self, box_form: Deltas, predictor: BoxPredictor, predictions: RegionPredictions, sample: Sample
    ) -> dict[str, Tensor]:
        labels, boxes, truth = torch.cat(sample.labels), torch.cat(sample.boxes), torch.cat(sample.truth)
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

    def _own_box_losses(self, features: dict[str, Tensor], sample: Sample) -> dict[str, Tensor]:
        # The background's label is its last one.
        labels = [torch.where(own > 0, own - 1, self.box_head.num_classes) for own in sample.labels]
        return self.box_head.losses(features, sample.boxes, labels, sample.truth, sample.sizes)

    def detect_boxes(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """The head's detections."""
        found = self.box_head.detect(features, proposals, image_shapes)
        return [{"boxes": own.boxes, "scores": own.scores, "labels": own.labels + 1} for own in found]
