"""What predicts from the features of regions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class PartLinear(nn.Linear):
    """A linear layer that reads a part of the features: the ``in_features`` from ``start`` on.

    So classes and boxes can be predicted from features of their own, by engines whose predictors have one input.

    Args:
        start: the first feature that is read.
        in_features, out_features: of the layer.
    """

    def __init__(self, start: int, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        """Features (Q, D) to (Q, ``out_features``)."""
        return F.linear(x[:, self.start : self.start + self.in_features], self.weight, self.bias)


def class_and_box_layers(features: int | tuple[int, int], classes: int, boxes: int) -> tuple[nn.Linear, nn.Linear]:
    """The layers that predict classes and boxes, with Fast R-CNN's initial weights.

    Args:
        features: that both read, or how many are for classes and how many, behind them, for boxes.
        classes, boxes: numbers that are predicted.
    """
    if isinstance(features, int):
        layers = nn.Linear(features, classes), nn.Linear(features, boxes)
    else:
        of_classes, of_boxes = features
        layers = PartLinear(0, of_classes, classes), PartLinear(of_classes, of_boxes, boxes)
    for layer, std in zip(layers, (0.01, 0.001), strict=True):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return layers
