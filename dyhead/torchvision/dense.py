"""The detectors of :mod:`dyhead.detection` with torchvision's interface."""

from __future__ import annotations

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from dyhead.config import ConfigError, options_of
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
        """Losses by name in training, else for each image boxes (D, 4), scores (D,) and labels (D,).

        Args:
            images: (3, H, W) each, values 0 to 255.
            targets: for each image boxes (M, 4) in its pixels and labels (M,).
        """
        batch, _ = self.transform(images)
        predictions = self.detector(self.backbone(batch.tensors))
        if self.training:
            return self.detector.losses(predictions, [Targets(t["boxes"], t["labels"]) for t in targets])
        return [found._asdict() for found in self.detector.detections(predictions, batch.image_sizes)]


def build_dense(cfg: CfgNode) -> DenseModel:
    """The registered detector of ``MODEL.META_ARCHITECTURE``, with random weights; labels are 0 to K - 1.

    Raises:
        ConfigError, ValueError: levels that are not there, or options that do not fit each other.
    """
    node = DETECTORS[cfg.MODEL.META_ARCHITECTURE].node
    options = options_of(cfg, node)
    pyramid = build_pyramid(cfg)
    unknown = [name for name in options.in_features if name not in pyramid.strides]
    if unknown:
        raise ConfigError(
            f"{node}.IN_FEATURES: expected some of the levels {', '.join(pyramid.strides)}, got {', '.join(unknown)}"
        )
    detector = options.build(
        pyramid.out_channels,
        [pyramid.strides[name] for name in options.in_features],
        anchors=options_of(cfg, "MODEL.ANCHOR_GENERATOR"),
        detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    return DenseModel(
        Normalization(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, pyramid.size_divisibility), pyramid, detector
    )
