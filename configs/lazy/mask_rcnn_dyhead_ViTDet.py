"""Detectron2's Mask R-CNN on ViTDet's simple pyramid with DyHead between the two."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from dyhead.detectron2 import DyHeadBackbone

vitdet = model_zoo.get_config("common/models/mask_rcnn_vitdet.py")
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.use_instance_mask = True
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
optimizer = model_zoo.get_config("common/optim.py").AdamW
train = model_zoo.get_config("common/train.py").train
train.init_checkpoint = "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"

model = vitdet.model
model.backbone = L(DyHeadBackbone)(backbone=model.backbone, num_blocks=6)
