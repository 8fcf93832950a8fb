"""ATSS with DyHead on Swin-T, as Detectron2 builds it; its authors' file of weights is train.init_checkpoint."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import SwinTransformer

from .atss import model
from .coco_1x import dataloader, lr_multiplier, train  # noqa: F401

model.backbone.backbone.bottom_up = L(SwinTransformer)(
    depths=[2, 2, 6, 2],
    drop_path_rate=0.2,
    out_indices=[1, 2, 3],
)
model.backbone.backbone.in_features = ["p1", "p2", "p3"]  # strides 8, 16 and 32
optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.lr, optimizer.weight_decay = 1e-4, 0.05
dataloader.train.mapper.image_format = "RGB"
train.init_checkpoint = "swin_tiny_patch4_window7_224.pth?matching_heuristics=True"
