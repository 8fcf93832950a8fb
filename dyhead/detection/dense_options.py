"""The options that every dense detector has, and how they become a detector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from dyhead.detection.anchors import AnchorOptions, Anchors, Places
from dyhead.detection.criteria import standard
from dyhead.detection.detector import BoxForm, BoxLoss, Criterion, DenseDetector, Inference
from dyhead.detection.heads.dense import NORMS, DenseHead
from dyhead.detection.losses import CLASS_LOSSES
from dyhead.detection.normalizer import KINDS, LossNormalizer
from dyhead.detection.scores import Score
from dyhead.options import at_least, at_least_one, between, choice, inside, odd, one_of, option


@dataclass(frozen=True)
class DenseOptions:
    """What every dense detector has. A detector's own options inherit from it, with its defaults."""

    #: Whether the detector reads the anchors of ``MODEL.ANCHOR_GENERATOR``.
    has_anchors: ClassVar[bool] = True
    #: Whether it learns the boxes of the visible parts of objects (:attr:`dyhead.detection.Targets.visible`), too.
    reads_visible_boxes: ClassVar[bool] = False
    #: What the losses are called, in the criterion's order.
    loss_names: ClassVar[tuple[str, ...]] = ("loss_cls", "loss_box_reg")
    #: What a moving average of the positives starts at.
    first_average: ClassVar[float] = 100.0

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
        one_of(*KINDS),
    )
    score_thresh_test: float = option(0.05, "detections have a score above it", between(0, 1))
    topk_candidates_test: int = option(1000, "so many best of every level go to NMS", at_least(1))
    nms_thresh_test: float = option(0.6, "largest IoU of two detections of a class; 1: no NMS", between(0, 1))
    clip_boxes: str = option(
        "after_nms",
        "when boxes are cut to the image: after NMS and the limit of detections (Detectron2), or before",
        one_of("after_nms", "before_nms"),
    )

    # The parts. A detector overrides one by a field, whose options are then keys of its node; by another constant; or,
    # where it depends on more, by the method that builds it.
    assigner: ClassVar[Callable[[Places, Tensor], Tensor] | None] = None
    box_form: ClassVar[BoxForm]
    box_loss: ClassVar[BoxLoss] = BoxLoss()
    score: ClassVar[Score] = Score("class")
    criterion: ClassVar[Criterion] = staticmethod(standard)

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
            anchors: their sizes, or :meth:`default_anchors`; anchor-free detectors do not read them.
            detections_per_image: at most so many.

        Raises:
            ValueError: options that do not fit each other.
        """
        anchors = anchors or self.default_anchors(strides)
        grid = self.build_anchors(strides, anchors)
        return DenseDetector(
            head=self.build_head(channels, grid),
            in_features=self.in_features,
            anchors=grid,
            box_form=self.build_box_form(),
            assigner=self.build_assigner(strides, anchors),
            class_loss=self.class_loss,
            score=self.score,
            normalizer=self.build_normalizer(),
            box_loss=self.box_loss,
            inference=self.inference(detections_per_image),
            loss_names=self.loss_names,
            criterion=self.build_criterion(),
        )

    def default_anchors(self, strides: Sequence[int]) -> AnchorOptions:
        """The anchors where none are given."""
        return AnchorOptions()

    def build_anchors(self, strides: Sequence[int], anchors: AnchorOptions) -> Anchors:
        """The boxes or points that predictions are relative to."""
        return anchors_of(anchors, strides)

    def build_head(self, channels: int, anchors: Anchors) -> nn.Module:
        """The head for levels of so many channels, with a prediction for each of the anchors."""
        return self.head(channels, anchors)

    def build_box_form(self) -> BoxForm:
        """What the head's box numbers mean."""
        return self.box_form

    def build_assigner(
        self, strides: Sequence[int], anchors: AnchorOptions
    ) -> Callable[[Places, Tensor], Tensor] | None:
        """Which place is which object's; None where the criterion weighs places instead."""
        return self.assigner

    def build_normalizer(self) -> LossNormalizer | None:
        """What losses are divided by; None where the criterion counts itself."""
        return None if self.loss_normalizer is None else LossNormalizer(self.loss_normalizer, self.first_average)

    def build_criterion(self) -> Criterion:
        """What predictions cost."""
        return self.criterion

    def head(self, channels: int, anchors: Anchors, **more: Any) -> DenseHead:
        """The standard head that the options describe; ``more`` are arguments of :class:`DenseHead`."""
        return DenseHead(
            channels,
            self.num_classes,
            anchors.per_cell,
            num_levels=len(anchors.strides),
            box_numbers=self.box_form.per_place,
            **self.head_arguments(),
            **more,
        )

    def head_arguments(self) -> dict[str, Any]:
        """What the options say of every head, as arguments of :class:`DenseHead` and the heads that inherit from it."""
        return {
            "num_convs": self.num_convs,
            "norm": self.norm,
            "kernel_size": self.predictor_kernel,
            "prior_prob": self.prior_prob,
        }

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


def square_anchors(strides: Sequence[int], offset: float) -> AnchorOptions:
    """One anchor a cell, a square whose sides are 8 strides, as ATSS has; ``offset`` is as for :func:`points_of`."""
    return AnchorOptions(tuple((8 * stride,) for stride in strides), ((1.0,),), offset)
