"""ATSS with DyHead on RegNetY-4GF, as Detectron2 builds it."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import RegNet
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem

from .atss import model
from .coco_1x import dataloader, lr_multiplier, optimizer, train  # noqa: F401

model.backbone.backbone.bottom_up = L(RegNet)(
    stem_class=SimpleStem,
    stem_width=32,
    block_class=ResBottleneckBlock,
    depth=22,
    w_a=31.41,
    w_0=96,
    w_m=2.24,
    group_width=64,
    se_ratio=0.25,
    freeze_at=2,
    norm="FrozenBN",
    out_features=["s2", "s3", "s4"],
)
model.backbone.backbone.in_features = ["s2", "s3", "s4"]
# Its weights are trained on BGR images, of this deviation.
model.pixel_mean, model.pixel_std, model.input_format = [103.53, 116.28, 123.675], [57.375, 57.12, 58.395], "BGR"
train.init_checkpoint = "https://dl.fbaipublicfiles.com/pycls/dds_baselines/160906383/RegNetY-4.0GF_dds_8gpu.pyth"
