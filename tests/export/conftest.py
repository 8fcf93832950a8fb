"""A detector small enough to export in seconds, with DyHead in it."""

import pytest
import torch
from torch import nn

from dyhead.detection import DETECTORS
from dyhead.layers import DyHead
from dyhead.torchvision.dense import DenseModel
from dyhead.torchvision.normalization import Normalization

LEVELS = {"p3": 8, "p4": 16}


class Backbone(nn.Module):
    """Two levels."""

    def __init__(self):
        super().__init__()
        self.strides = LEVELS
        self.first, self.second = nn.Conv2d(3, 16, 8, stride=8), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.head = DyHead(16, 1)

    def forward(self, images):
        finer = self.first(images)
        return self.head({"p3": finer, "p4": self.second(finer)})


@pytest.fixture
def model():
    """In the torchvision engine's form; every image has tens of detections, of which NMS drops some."""
    torch.manual_seed(0)
    options = DETECTORS["DyHeadFCOS"].options(num_classes=3, in_features=tuple(LEVELS))
    detector = options.build(channels=16, strides=list(LEVELS.values()), detections_per_image=20)
    model = DenseModel(Normalization([100.0, 110.0, 120.0], [50.0, 60.0, 70.0], 16), Backbone(), detector)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head.offset" in name or "spatial_attention.offset" in name:
                nn.init.normal_(parameter, std=0.3)
        nn.init.normal_(detector.head.logits.weight, std=0.3)
        nn.init.constant_(detector.head.logits.bias, -2.0)
        nn.init.constant_(detector.head.deltas.bias, 1.5)
    return model.eval()


@pytest.fixture
def images():
    """`images(batch, height, width)`."""

    def make(batch, height, width):
        generator = torch.Generator().manual_seed(1)
        return 255 * torch.rand(batch, 3, height, width, generator=generator)

    return make
