"""ATSS with DyHead on ResNet-50 (configs/atss_dyhead_R50.yaml)."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet

from .atss import model
from .coco_1x import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model.backbone.backbone.bottom_up = L(ResNet)(
    stem=L(BasicStem)(norm="FrozenBN"),
    stages=L(ResNet.make_default_stages)(depth=50, norm="FrozenBN"),
    out_features=["res3", "res4", "res5"],
    freeze_at=2,
)
dataloader.train.mapper.image_format = "RGB"
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
