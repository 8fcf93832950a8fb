"""ATSS with DyHead on MViTv2-T, as Detectron2 builds it; weights of its authors are train.init_checkpoint."""

from functools import partial

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import MViT
from torch import nn

from .atss import model
from .coco_1x import dataloader, lr_multiplier, train  # noqa: F401

model.backbone.backbone.bottom_up = L(MViT)(
    embed_dim=96,
    depth=10,
    num_heads=1,
    last_block_indexes=[0, 2, 7, 9],
    residual_pooling=True,
    drop_path_rate=0.2,
    norm_layer=partial(nn.LayerNorm, eps=1e-6),
    out_features=["scale3", "scale4", "scale5"],
)
model.backbone.backbone.in_features = ["scale3", "scale4", "scale5"]
optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.lr, optimizer.weight_decay = 1e-4, 0.05
dataloader.train.mapper.image_format = "RGB"
train.init_checkpoint = "detectron2://ImageNetPretrained/mvitv2/MViTv2_T_in1k.pyth"
