"""The options that every dense detector has, and how they become a detector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dyhead.detection import normalizer
from dyhead.detection.anchors import AnchorOptions, Anchors
from dyhead.detection.detector import DenseDetector, Inference
from dyhead.detection.heads.dense import NORMS, DenseHead
from dyhead.detection.losses import CLASS_LOSSES
from dyhead.options import at_least, at_least_one, between, choice, inside, odd, one_of, option


@dataclass(frozen=True)
class DenseOptions:
    """What every dense detector has. A detector's own options inherit from it, with its defaults."""

    #: Whether ``build`` reads its argument ``anchors``.
    has_anchors: ClassVar[bool] = True

    num_classes: int = option(80, "classes, without background", at_least(1))
    in_features: tuple[str, ...] = option(
        ("p3", "p4", "p5", "p6", "p7"), "the levels to predict on, fine to coarse", at_least_one("level")
    )
    num_convs: int = option(
        0, "convolutions before the predictors, in a tower for classes and one for boxes; 0 after DyHead", at_least(0)
    )
    norm: str = option("", "after each of these convolutions; BN has statistics for each level", one_of(*NORMS))
    predictor_kernel: int = option(3, "size of the predictors", odd())
    prior_prob: float = option(0.01, "probability of every class at the start of training", inside(0, 1))
    class_loss: object = choice("focal", "the classification loss", CLASS_LOSSES)
    loss_normalizer: str = option(
        "moving_average",
        "what losses are divided by: the moving average of the positives (Detectron2), the positives of the batch, or "
        "the same with each image counted at least once (mmdetection)",
        one_of(*normalizer.KINDS),
    )
    score_thresh_test: float = option(0.05, "detections have a score above it", between(0, 1))
    topk_candidates_test: int = option(1000, "so many best of every level go to NMS", at_least(1))
    nms_thresh_test: float = option(0.6, "largest IoU of two detections of a class; 1: no NMS", between(0, 1))
    clip_boxes: str = option(
        "after_nms",
        "when boxes are cut to the image: after NMS and the limit of detections (Detectron2), or before",
        one_of("after_nms", "before_nms"),
    )

    def build(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        anchors: AnchorOptions | None = None,
        detections_per_image: int = 100,
    ) -> DenseDetector:
        """The detector, with random weights.

        Args:
            channels: channels C of the levels.
            strides: of the levels ``in_features``, fine to coarse, in pixels of the image.
            anchors: their sizes; anchor-free detectors do not read them.
            detections_per_image: at most so many.

        Raises:
            ValueError: options that do not fit each other.
        """
        raise NotImplementedError

    def head(self, channels: int, num_levels: int, num_anchors: int = 1, **more: Any) -> DenseHead:
        """The head that the options describe; ``more`` are arguments of :class:`DenseHead`."""
        return DenseHead(
            channels,
            self.num_classes,
            num_anchors,
            num_levels=num_levels,
            num_convs=self.num_convs,
            norm=self.norm,
            kernel_size=self.predictor_kernel,
            prior_prob=self.prior_prob,
            **more,
        )

    def inference(self, detections_per_image: int) -> Inference:
        """The options that concern detections."""
        return Inference(
            self.score_thresh_test,
            self.topk_candidates_test,
            self.nms_thresh_test,
            detections_per_image,
            self.clip_boxes == "before_nms",
        )


def points_of(strides: Sequence[int], offset: float) -> Anchors:
    """A place in every cell for boxes relative to a point: the center of a square as large as the stride.

    What such boxes are measured in is that square's side.

    Args:
        strides: of the levels, in pixels of the image.
        offset: of a level's first point, in strides: 0.5 is the middle of a cell, 0 its upper left corner.
    """
    return Anchors([[stride] for stride in strides], [[1.0]], strides, offset)


def anchors_of(options: AnchorOptions, strides: Sequence[int]) -> Anchors:
    """The anchors that ``MODEL.ANCHOR_GENERATOR`` stands for."""
    return Anchors(options.sizes, options.aspect_ratios, strides, options.offset)
