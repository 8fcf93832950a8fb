"""Detectron2's RetinaNet with DyHead, by the last line."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from dyhead.detectron2 import DyHeadBackbone

from .coco_1x import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model = model_zoo.get_config("common/models/retinanet.py").model
model.backbone.bottom_up.freeze_at = 2
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"

model.backbone = L(DyHeadBackbone)(backbone=model.backbone, num_blocks=6)
