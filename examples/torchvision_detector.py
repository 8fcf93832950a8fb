"""DyHead in a detector of torchvision: behind the feature pyramid of its RetinaNet.

    pip install torchvision
    python torchvision_detector.py

Any detector of torchvision that takes a backbone takes this one: FCOS, RetinaNet, Faster R-CNN, Mask R-CNN.
"""

import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from dyhead.layers import DyHead


class BackboneWithDyHead(nn.Module):
    """A backbone whose pyramid goes through DyHead: levels by name in, levels by the same names out."""

    def __init__(self, backbone: nn.Module, num_blocks: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = DyHead(backbone.out_channels, num_blocks)
        self.out_channels = backbone.out_channels  # which torchvision's detectors ask for

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.head(dict(self.backbone(images)))


def build(num_classes: int, num_blocks: int = 6) -> RetinaNet:
    """RetinaNet on ResNet-18, P3 to P7, with DyHead."""
    fpn = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return RetinaNet(BackboneWithDyHead(fpn, num_blocks), num_classes, min_size=128, max_size=192)


def main() -> None:
    model = build(num_classes=4, num_blocks=2)
    images = [torch.rand(3, 120, 160), torch.rand(3, 128, 128)]
    targets = [
        {"boxes": torch.tensor([[20.0, 30.0, 90.0, 110.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[10.0, 10.0, 60.0, 100.0]]), "labels": torch.tensor([3])},
    ]
    losses = model(images, targets)
    sum(losses.values()).backward()
    print("losses:", {name: round(loss.item(), 3) for name, loss in losses.items()})
    model.eval()
    with torch.no_grad():
        detections = model(images)
    print("detections:", [len(one["boxes"]) for one in detections])


if __name__ == "__main__":
    main()
