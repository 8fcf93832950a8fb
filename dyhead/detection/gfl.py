"""GFL (Li et al., "Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes ...", NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dyhead.detection.anchors import AnchorOptions, Anchors, Places
from dyhead.detection.assigners import ATSSAssigner
from dyhead.detection.boxes import Distribution
from dyhead.detection.criteria import QualityCriterion
from dyhead.detection.dense_options import DenseOptions, anchors_of, points_of, square_anchors
from dyhead.detection.heads import DenseHead
from dyhead.detection.losses import QualityFocalLoss
from dyhead.detection.registry import register_detector
from dyhead.options import inherited, part


@register_detector("GFL")
@dataclass(frozen=True)
class GFLOptions(DenseOptions):
    """GFL: ATSS whose class probability is the quality, and whose boxes are distributions with a factor per level.

    The anchors, one a cell, are those of ``MODEL.ANCHOR_GENERATOR``, and serve the assignment only; the paper's have
    sides of 8 strides, and ``OFFSET`` 0. Boxes are relative to their centers, in strides.
    """

    loss_names = ("loss_cls", "loss_box_reg", "loss_dfl")

    loss_normalizer: str = inherited(DenseOptions, "loss_normalizer", "positives_per_image")
    class_loss: QualityFocalLoss = part(QualityFocalLoss(), prefix="QUALITY_FOCAL_LOSS_")
    assigner: ATSSAssigner = part(ATSSAssigner())
    box_form: Distribution = part(Distribution())
    criterion: QualityCriterion = part(QualityCriterion())

    def default_anchors(self, strides: Sequence[int]) -> AnchorOptions:
        """The paper's."""
        return square_anchors(strides, offset=0.0)

    def build_anchors(self, strides: Sequence[int], anchors: AnchorOptions) -> Anchors:
        """The anchors' centers."""
        return points_of(strides, anchors.offset)

    def build_assigner(self, strides: Sequence[int], anchors: AnchorOptions) -> _OnAnchors:
        """On the anchors themselves."""
        grid = anchors_of(anchors, strides)
        if grid.per_cell != 1:
            raise ValueError(f"MODEL.ANCHOR_GENERATOR: expected one anchor a cell, got {grid.per_cell}")
        return _OnAnchors(self.assigner, grid)

    def build_head(self, channels: int, anchors: Anchors) -> DenseHead:
        """With a factor for each level."""
        return self.head(channels, anchors, delta_scale=True)


@dataclass(frozen=True)
class _OnAnchors:
    """An assigner that gets other anchors than the boxes are relative to, around the same centers."""

    assigner: ATSSAssigner
    anchors: Anchors

    def __call__(self, places: Places, boxes: Tensor) -> Tensor:
        """See :mod:`dyhead.detection.assigners`."""
        around = places.by_level([cell for (cell,) in self.anchors.cells])
        return self.assigner(places._replace(anchors=places.centers.repeat(1, 2) + around), boxes)
