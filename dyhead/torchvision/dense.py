"""The detectors of :mod:`dyhead.detection` with torchvision's interface."""

from __future__ import annotations

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from dyhead.build import build_detector
from dyhead.detection import DETECTORS, DenseDetector, Targets
from dyhead.torchvision.backbone import Pyramid, build_pyramid
from dyhead.torchvision.normalization import Normalization


class DenseModel(nn.Module):
    """A dense detector with its backbone and what is done with images before.

    Args:
        transform: normalizes images and pads them to one size.
        backbone: images to levels by name.
        detector: what follows it.
    """

    def __init__(self, transform: Normalization, backbone: Pyramid, detector: DenseDetector) -> None:
        super().__init__()
        self.transform = transform
        self.backbone = backbone
        self.detector = detector

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses by name in training, else for each image what :class:`dyhead.detection.Detections` has.

        Args:
            images: (3, H, W) each, values 0 to 255.
            targets: for each image boxes (M, 4) in its pixels and labels (M,), and visible_boxes (M, 4) for a detector
                that reads them (:attr:`dyhead.detection.Targets.visible`).
        """
        batch, _ = self.transform(images)
        predictions = self.detector(self.backbone(batch.tensors))
        if self.training:
            return self.detector.losses(
                predictions, [Targets(t["boxes"], t["labels"], t.get("visible_boxes")) for t in targets]
            )
        found = self.detector.detections(predictions, batch.image_sizes)
        return [{key: value for key, value in own._asdict().items() if value is not None} for own in found]


def build_dense(cfg: CfgNode) -> DenseModel:
    """The registered detector of ``MODEL.META_ARCHITECTURE``, with random weights; labels are 0 to K - 1.

    Raises:
        ConfigError, ValueError: levels that are not there, or options that do not fit each other.
    """
    pyramid = build_pyramid(cfg)
    detector = build_detector(cfg, DETECTORS[cfg.MODEL.META_ARCHITECTURE], pyramid.out_channels, pyramid.strides)
    return DenseModel(
        Normalization(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, pyramid.size_divisibility), pyramid, detector
    )
