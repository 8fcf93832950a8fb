"""ATSS with DyHead on P3 to P7 of a network that the other files choose (model.backbone.backbone.bottom_up)."""

from detectron2.config import LazyCall as L
from detectron2.modeling import FPN

from dyhead.detection.atss import ATSSOptions
from dyhead.detectron2 import DyHeadATSS, DyHeadBackbone, dense_detector
from dyhead.layers import P6P7

model = L(DyHeadATSS)(
    backbone=L(DyHeadBackbone)(
        backbone=L(FPN)(
            bottom_up=None,
            in_features=["res3", "res4", "res5"],
            out_channels=256,
            top_block=L(P6P7)(in_channels=256, out_channels=256, in_feature="p5"),
        ),
        num_blocks=6,
    ),
    # The predictors sit directly on DyHead's unified branch.
    detector=L(dense_detector)(
        options=L(ATSSOptions)(num_classes=80, num_convs=0, norm=""), channels=256, strides=[8, 16, 32, 64, 128]
    ),
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
    input_format="RGB",
)
