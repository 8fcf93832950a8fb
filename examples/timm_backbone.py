"""DyHead on the features of a network of timm, without a feature pyramid network between them.

    pip install timm
    python timm_backbone.py

The levels of a backbone differ in their channels: ``in_channels`` is what timm says of them, ``out_channels`` what the
predictors want.
"""

import timm
import torch
from torch import nn

from dyhead.layers import DyHead


class DenseDetector(nn.Module):
    """Class logits and box distances for every place of three levels."""

    def __init__(self, network: str, num_classes: int, channels: int = 64, num_blocks: int = 2) -> None:
        super().__init__()
        self.backbone = timm.create_model(network, pretrained=False, features_only=True, out_indices=(-3, -2, -1))
        self.head = DyHead(
            in_channels=self.backbone.feature_info.channels(), out_channels=channels, num_blocks=num_blocks
        )
        self.classes = nn.Conv2d(channels, num_classes, 1)
        self.distances = nn.Conv2d(channels, 4, 1)

    def forward(self, images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        levels = self.head(self.backbone(images))
        return [(self.classes(level), self.distances(level).exp()) for level in levels]


def main() -> None:
    for network in ("resnet18", "mobilenetv3_small_050"):
        model = DenseDetector(network, num_classes=3)
        predictions = model(torch.rand(2, 3, 150, 200))  # no multiple of the last stride
        sum(logits.mean() + distances.mean() for logits, distances in predictions).backward()
        print(network, model.head.in_channels, [tuple(logits.shape) for logits, _ in predictions])


if __name__ == "__main__":
    main()
