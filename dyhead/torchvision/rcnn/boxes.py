"""What is predicted of regions: class logits and deltas, and the boxes that these mean.

K classes, C channels, Q proposals of all images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyhead.detection.boxes import Deltas
from dyhead.detection.heads.dense import at_least_float32
from dyhead.detection.roi.prediction import LossWeights, class_and_box_layers, either

#: Class logits (Q, 1 + K) and deltas (Q, 4 + 4K) of regions, and, if there are any, crossed ones.
RegionPredictions = list[tuple[Tensor, Tensor]]


class BoxCoder:
    """A box form with the interface of torchvision's coder of boxes.

    Args:
        form: what the numbers mean.
    """

    def __init__(self, form: Deltas) -> None:
        self.form = form

    def encode(self, boxes: list[Tensor], anchors: list[Tensor]) -> list[Tensor]:
        """Deltas (Q, 4) of each image's boxes from its anchors."""
        return [self.form.encode(own, from_) for own, from_ in zip(boxes, anchors, strict=True)]

    def decode(self, numbers: Tensor, anchors: list[Tensor]) -> Tensor:
        """Boxes (Q, X, 4) from X deltas (Q, X*4) of the anchors of all images."""
        count = numbers.shape[1] // 4
        places = torch.cat(anchors).repeat_interleave(count, dim=0)
        return self.form.decode(numbers.reshape(-1, 4), places).view(len(numbers), count, 4)


class BoxPredictor(nn.Module):
    """Class logits and deltas of regions, with the parameters of Detectron2's and the outputs of torchvision's.

    Detectron2's last class is the background, which has no deltas; torchvision's class 0 is, with deltas that are never
    read.

    Args:
        features: of a region, see :attr:`dyhead.detection.roi.Registered.options`.
        num_classes: classes K.
        class_agnostic: predict the same deltas for all classes.
        loss_weights: of what is predicted; a second pair is of crossed predictions.
    """

    def __init__(
        self,
        features: int | tuple[int, int],
        num_classes: int,
        *,
        class_agnostic: bool = False,
        loss_weights: LossWeights = ((1.0, 1.0),),
    ) -> None:
        super().__init__()
        self.repeats = num_classes if class_agnostic else 1
        self.loss_weights = loss_weights
        sizes = num_classes + 1, 4 * num_classes // self.repeats
        self.cls_score, self.bbox_pred = class_and_box_layers(features, *sizes)
        if len(loss_weights) > 1:
            self.crossed_cls_score, self.crossed_bbox_pred = class_and_box_layers(features, *sizes, crossed=True)

    def forward(self, x: Tensor) -> RegionPredictions:
        """Regions (Q, C, ...) to logits and deltas in float32 at least, the background first."""
        x = x.flatten(1)
        layers = [(self.cls_score, self.bbox_pred)]
        if len(self.loss_weights) > 1:
            layers.append((self.crossed_cls_score, self.crossed_bbox_pred))
        return [
            (
                at_least_float32(classes(x)).roll(1, dims=1),
                F.pad(at_least_float32(boxes(x)).repeat(1, self.repeats), (4, 0)),
            )
            for classes, boxes in layers
        ]


def class_probabilities(predictions: RegionPredictions) -> Tensor:
    """(Q, 1 + K), of either prediction; where there are crossed ones, the background's is no rest of the others."""
    return either([logits.softmax(dim=1) for logits, _ in predictions])
