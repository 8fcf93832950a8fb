"""Test-time augmentation, ``TEST.AUG``: each image in several sizes and mirrored, and what is found put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from dyhead.config import TWO_STAGE, detector_node, get
from dyhead.data import resized
from dyhead.detection.merging import merge
from dyhead.torchvision.data import Change


class WithAugmentation(nn.Module):
    """A detector on several sizes of each image, each also mirrored where ``TEST.AUG.FLIP`` says so.

    It is called as the detector is in evaluation. Boxes of all views are brought back to the image, where NMS chooses
    among them; the masks of those that are left are the means of what each view shows in them.

    Args:
        cfg: the detector's configuration.
        model: of :func:`dyhead.torchvision.build_model`, in evaluation mode.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.options = cfg.TEST.AUG
        self.nms_thresh = get(cfg, f"{detector_node(cfg)}.NMS_THRESH_TEST")
        self.limit = cfg.TEST.DETECTIONS_PER_IMAGE
        self.two_stage = cfg.MODEL.META_ARCHITECTURE == TWO_STAGE
        self.mask_on = self.two_stage and cfg.MODEL.MASK_ON
        # Views that are padded to one size see the padding, which DyHead averages over: as many as in Detectron2.
        self.batch_size = 3 if self.two_stage else 1

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """See :func:`dyhead.torchvision.build_model`."""
        return [self._detect(image) for image in images]

    def _detect(self, image: Tensor) -> dict[str, Tensor]:
        changes = self._changes(*image.shape[-2:])
        views = [change.image(image) for change in changes]
        found = self._in_batches(self.model.detect_boxes if self.two_stage else self.model, views)
        boxes = [change.inverse.boxes(own["boxes"]) for change, own in zip(changes, found, strict=True)]
        scores, labels = (torch.cat([own[key] for own in found]) for key in ("scores", "labels"))
        size = tuple(image.shape[-2:])
        merged = merge(torch.cat(boxes), scores, labels, size, self.nms_thresh, self.limit)
        detections = {"boxes": merged.boxes, "scores": merged.scores, "labels": merged.labels}
        if self.mask_on:
            seen = [change.boxes(merged.boxes) for change in changes]
            masks = self._in_batches(self.model.find_masks, views, seen, [merged.labels] * len(views))
            masks = [own.flip(2) if change.flip != "none" else own for change, own in zip(changes, masks, strict=True)]
            detections["masks"] = torch.stack(masks).mean(dim=0)
        return detections

    def _changes(self, height: int, width: int) -> list[Change]:
        flips = ["none", "horizontal"] if self.options.FLIP else ["none"]
        return [
            Change((height, width), resized(height, width, shortest, self.options.MAX_SIZE), flip)
            for shortest in self.options.MIN_SIZES
            for flip in flips
        ]

    def _in_batches(self, detect: Callable[..., list[Any]], *each: list[Any]) -> list[Any]:
        starts = range(0, len(each[0]), self.batch_size)
        return [own for i in starts for own in detect(*(part[i : i + self.batch_size] for part in each))]
