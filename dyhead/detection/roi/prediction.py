"""What predicts from the features of regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

#: What the losses of classes and boxes weigh, and, where there is a second pair, those of the crossed predictions.
LossWeights = tuple[tuple[float, float], ...]


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


def class_and_box_layers(
    features: int | tuple[int, int], classes: int, boxes: int, *, crossed: bool = False
) -> tuple[nn.Linear, nn.Linear]:
    """The layers that predict classes and boxes, with Fast R-CNN's initial weights.

    Args:
        features: that both read, or how many are for classes and how many, behind them, for boxes.
        classes, boxes: numbers that are predicted.
        crossed: predict classes from the features for boxes, and boxes from those for classes.
    """
    if isinstance(features, int):
        layers = nn.Linear(features, classes), nn.Linear(features, boxes)
    else:
        of_classes, of_boxes = (0, features[0]), (features[0], features[1])
        if crossed:
            of_classes, of_boxes = of_boxes, of_classes
        layers = PartLinear(*of_classes, classes), PartLinear(*of_boxes, boxes)
    for layer, std in zip(layers, (0.01, 0.001), strict=True):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return layers


def loss_weights(head: nn.Module) -> LossWeights:
    """Those of a box head, see :attr:`dyhead.detection.roi.Registered.options`: 1 where it has none."""
    return getattr(head, "loss_weights", ((1.0, 1.0),))


def weighed(losses: Sequence[Mapping[str, Tensor]], weights: LossWeights) -> dict[str, Tensor]:
    """Losses by name of predictions and, if there are any, of crossed ones.

    Args:
        losses: ``loss_cls`` and ``loss_box_reg`` of each.
        weights: of these.
    """
    return {
        f"{name}{suffix}": weight * costs[name]
        for suffix, costs, pair in zip(("", "_crossed"), losses, weights, strict=False)
        for name, weight in zip(("loss_cls", "loss_box_reg"), pair, strict=True)
    }


def either(probabilities: Sequence[Tensor]) -> Tensor:
    """The probability that one or the other is true, of independent ones: 1 - (1 - p)(1 - q)."""
    first, *others = probabilities
    for other in others:
        first = 1 - (1 - first) * (1 - other)
    return first
