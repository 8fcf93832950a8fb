"""The detectors of :mod:`dyhead.detection` as meta-architectures of Detectron2, one class for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import move_device_like
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, detector_postprocess
from detectron2.modeling.meta_arch.dense_detector import DenseDetector as Detectron2DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from dyhead.build import build_detector
from dyhead.config import ConfigError
from dyhead.detection import DETECTORS, DenseDetector, Detections, Registered, Targets
from dyhead.detection.dense_options import DenseOptions
from dyhead.detectron2.backbone import build_backbone


class DenseMetaArchitecture(nn.Module):
    """A dense detector with its backbone, in Detectron2's form: lists of dicts in, losses or ``Instances`` out.

    There is a class for each registered detector, ``DyHeadFCOS``, ``DyHeadRetinaNet`` and others, which differ in
    what they are built from: ``MODEL.FCOS``, and so on.

    Args:
        backbone: of Detectron2, with a pyramid; :class:`~dyhead.detectron2.DyHeadBackbone` gives it a Dynamic Head.
        detector: what follows it, from ``dyhead.detection``.
        pixel_mean: of the channels, 0 to 255, in the order of ``input_format``.
        pixel_std: likewise.
        vis_period: iterations between two images of boxes in the event storage; 0: none.
        input_format: order of the image's channels, for these.
    """

    #: The detector that the class stands for; ``from_config`` reads its options.
    registered: Registered

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        detector: DenseDetector,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        vis_period: int = 0,
        input_format: str = "BGR",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.detector = detector
        self.vis_period = vis_period
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The keyword arguments that the config stands for.

        Raises:
            ConfigError: levels that the backbone does not have, or options that do not fit.
        """
        if cfg.MODEL.ANCHOR_GENERATOR.NAME != "DefaultAnchorGenerator":
            raise ConfigError(
                "MODEL.ANCHOR_GENERATOR.NAME: expected 'DefaultAnchorGenerator' with this meta-architecture, "
                f"got {cfg.MODEL.ANCHOR_GENERATOR.NAME!r}"
            )
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        channels, strides = next(iter(shapes.values())).channels, {name: s.stride for name, s in shapes.items()}
        detector = build_detector(cfg, cls.registered, channels, strides)
        return {
            "backbone": backbone,
            "detector": detector,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def __prepare_scriptable__(self) -> None:
        """What torch.jit.script calls first; its own error would be about annotations."""
        raise RuntimeError(
            f"torch.jit.script: expected Detectron2's own detectors or DyHeadRCNN, got {type(self).__name__}, which "
            "detectron2.export.TracingAdapter and torch.jit.trace take"
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Losses by name in training, else for each image a dict with its "instances".

        Args:
            batched_inputs: for each image a dict of ``image`` (3, H, W), in training ``instances`` with ``gt_boxes``,
                ``gt_classes`` and maybe ``gt_visible_boxes``, and in inference maybe ``height`` and ``width`` of the
                output.
        """
        images = self.preprocess_image(batched_inputs)
        predictions = self.detector(self.backbone(images.tensor))
        if not self.training:
            return self._postprocess(self._instances(predictions, images), batched_inputs)
        objects = [x["instances"].to(self.device) for x in batched_inputs]
        targets = [Targets(x.gt_boxes.tensor, x.gt_classes, _visible(x)) for x in objects]
        losses = self.detector.losses(predictions, targets)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            with torch.no_grad():
                found = self._instances(predictions, images)
            Detectron2DenseDetector.visualize_training(self, batched_inputs, found)
        return losses

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """The images normalized, padded and in one batch."""
        images = [move_device_like(x["image"], self.pixel_mean) for x in batched_inputs]
        return ImageList.from_tensors(
            [(x - self.pixel_mean) / self.pixel_std for x in images],
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )

    def _instances(self, predictions: Any, images: ImageList) -> list[Instances]:
        found = self.detector.detections(predictions, images.image_sizes)
        return [_to_instances(each, size) for each, size in zip(found, images.image_sizes, strict=True)]

    @staticmethod
    def _postprocess(found: list[Instances], inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        results = []
        for instances, x in zip(found, inputs, strict=True):
            height, width = (
                x.get(key, size) for key, size in zip(("height", "width"), instances.image_size, strict=True)
            )
            result = detector_postprocess(instances, height, width)
            if result.has("pred_visible_boxes"):  # Detectron2 resizes what it knows
                old_height, old_width = instances.image_size
                result.pred_visible_boxes.scale(width / old_width, height / old_height)
                result.pred_visible_boxes.clip(result.image_size)
            results.append({"instances": result})
        return results


def dense_detector(options: DenseOptions, **arguments: Any) -> DenseDetector:
    """What follows the backbone, for LazyConfig, in which functions and classes are called by name.

    Args:
        options: of a detector, such as :class:`dyhead.detection.atss.ATSSOptions`.
        **arguments: of ``options.build``: channels and strides of the pyramid, ...

    Example:
        >>> from dyhead.detection.atss import ATSSOptions
        >>> lazy = LazyCall(dense_detector)(                                               # doctest: +SKIP
        ...     options=LazyCall(ATSSOptions)(num_convs=0), channels=256, strides=[8, 16, 32, 64, 128]
        ... )                                                                              # doctest: +SKIP
    """
    return options.build(**arguments)


def _visible(objects: Instances) -> Tensor | None:
    return objects.gt_visible_boxes.tensor if objects.has("gt_visible_boxes") else None


def _to_instances(found: Detections, size: tuple[int, int]) -> Instances:
    instances = Instances(size, pred_boxes=Boxes(found.boxes), scores=found.scores, pred_classes=found.labels)
    if found.visible_boxes is not None:
        instances.pred_visible_boxes = Boxes(found.visible_boxes)
    return instances


def _meta_architecture(registered: Registered) -> type[DenseMetaArchitecture]:
    name = registered.meta_architecture
    body = {
        "__doc__": f"{registered.name} on a pyramid, configured by ``{registered.node}``. See DenseMetaArchitecture.",
        "__module__": __name__,
        "registered": registered,
    }
    cls = type(name, (DenseMetaArchitecture,), body)
    META_ARCH_REGISTRY.register(cls)
    return cls


#: The classes by name.
META_ARCHITECTURES = {name: _meta_architecture(registered) for name, registered in DETECTORS.items()}
globals().update(META_ARCHITECTURES)  # so that they can be pickled and imported by name
