"""The heads of Cascade R-CNN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou, clip_boxes_to_image

from dyhead.detection.boxes import Deltas
from dyhead.torchvision.rcnn.boxes import BoxCoder, BoxPredictor, RegionPredictions, class_probabilities
from dyhead.torchvision.rcnn.regions import RegionHeads, Sample


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

    def sample(self, boxes: list[Tensor], before: Sample) -> Sample:
        """Boxes refined by the stage before, without those that have become empty, labelled anew."""
        boxes = [own[(own[:, 2:] > own[:, :2]).all(dim=1)] for own in boxes]
        pairs = [self._label(own, target) for own, target in zip(boxes, before.targets, strict=True)]
        matched, labels = (list(part) for part in zip(*pairs, strict=True))
        return before._replace(boxes=boxes, matched=matched, labels=labels)

    def _label(self, boxes: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
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

    def box_losses(self, features: dict[str, Tensor], sample: Sample) -> dict[str, Tensor]:
        """The losses of all stages, see :class:`RegionHeads`."""
        losses, refined = {}, sample.boxes
        for number, stage in enumerate(self.stages):
            if number:
                sample = stage.sample(refined, sample)
            predictions, own = self.stage_losses(features, number, sample)
            losses |= own | self._auxiliary_losses(
                lambda heads, maps, a=(number, sample): heads.stage_losses(maps, *a)[1]
            )
            refined = self._refined(stage, predictions, sample.boxes, sample.sizes)
        return losses

    def stage_losses(
        self, features: dict[str, Tensor], number: int, sample: Sample
    ) -> tuple[RegionPredictions, dict[str, Tensor]]:
        """The predictions and losses of a stage, from the boxes that it starts from."""
        stage = self.stages[number]
        predictions = self._run(stage, features, sample.boxes, sample.sizes)
        costs = self._costs(stage.box_form, stage.predictor, predictions, sample)
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
