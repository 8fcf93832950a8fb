"""Test-time augmentation, ``TEST.AUG``: each image in several sizes and mirrored, and what is found put together."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    DatasetMapperTTA,
    GeneralizedRCNN,
    GeneralizedRCNNWithTTA,
    PanopticFPN,
)
from detectron2.structures import Boxes, Instances
from torch import nn

from dyhead.config import expect, get
from dyhead.detection import DETECTORS
from dyhead.detection.merging import merge


def check_augmentation(cfg: CfgNode) -> None:
    """Raise :class:`ConfigError` if ``TEST.AUG.ENABLED`` is True of one of Detectron2's that cannot be augmented."""
    if not cfg.TEST.AUG.ENABLED:
        return
    name = cfg.MODEL.META_ARCHITECTURE
    architecture = META_ARCH_REGISTRY.get(name)
    two_stage = issubclass(architecture, GeneralizedRCNN) and not issubclass(architecture, PanopticFPN)
    expect(cfg, "TEST.AUG.ENABLED", name in DETECTORS or two_stage, f"False with MODEL.META_ARCHITECTURE {name}")


def with_augmentation(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """A detector that is called like ``model``, on the images that ``TEST.AUG`` says; two-stage ones are Detectron2's.

    Args:
        cfg: see :func:`check_augmentation`.
        model: of this project's or Detectron2's, not wrapped in DistributedDataParallel.
    """
    return (DenseWithTTA if cfg.MODEL.META_ARCHITECTURE in DETECTORS else GeneralizedRCNNWithTTA)(cfg, model)


class DenseWithTTA(nn.Module):
    """A dense detector on several sizes of each image, each also mirrored where ``TEST.AUG.FLIP`` says so.

    Boxes of all of them are brought back to the image, and NMS and the limit to the number of detections choose among
    them as they do within one.

    Args:
        cfg: the detector's configuration.
        model: the detector, in evaluation mode.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.augment = DatasetMapperTTA(cfg)
        self.nms_thresh = get(cfg, f"{DETECTORS[cfg.MODEL.META_ARCHITECTURE].node}.NMS_THRESH_TEST")
        self.limit = cfg.TEST.DETECTIONS_PER_IMAGE

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """As :meth:`dyhead.detectron2.DenseMetaArchitecture.forward` in inference."""
        return [{"instances": self._detect(x)} for x in batched_inputs]

    def _detect(self, x: dict[str, Any]) -> Instances:
        size = tuple(x.get(key, side) for key, side in zip(("height", "width"), x["image"].shape[-2:], strict=True))
        boxes, scores, classes = [], [], []
        for seen in self.augment(x | dict(zip(("height", "width"), size, strict=True))):
            transforms = seen.pop("transforms")
            # One at a time, and in the pixels of the image that is seen, whence the transforms lead back.
            seen["height"], seen["width"] = seen["image"].shape[-2:]
            found = self.model([seen])[0]["instances"]
            corners = transforms.inverse().apply_box(found.pred_boxes.tensor.cpu().numpy())
            boxes.append(torch.as_tensor(corners).to(found.scores))
            scores.append(found.scores)
            classes.append(found.pred_classes)
        merged = merge(torch.cat(boxes), torch.cat(scores), torch.cat(classes), size, self.nms_thresh, self.limit)
        return Instances(size, pred_boxes=Boxes(merged.boxes), scores=merged.scores, pred_classes=merged.labels)
