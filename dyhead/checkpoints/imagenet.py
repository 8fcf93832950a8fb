"""Names of ResNets that were trained to classify ImageNet: torchvision's, Detectron2's, Caffe2's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from dyhead.checkpoints.pyramid import BOTTOM_UP, torchvision_resnet
from dyhead.checkpoints.source import COUNTERS, Row, Source

#: Why it is left over.
CLASSIFIER = "ImageNet's classifier"

_CAFFE2_CONVOLUTIONS = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_CAFFE2_PARAMETERS = {"w": "weight", "b": "bias", "s": "weight", "rm": "running_mean", "riv": "running_var"}


def _caffe2(state: Mapping[str, Tensor]) -> list[Row]:
    def inside(match: re.Match) -> str:
        convolution = f"{BOTTOM_UP}res{match[1]}.{match[2]}.{_CAFFE2_CONVOLUTIONS[match[3]]}"
        return f"{convolution}.{'norm.' if match[4] else ''}{_CAFFE2_PARAMETERS[match[5]]}"

    return [
        Row(r"conv1_w", BOTTOM_UP + "stem.conv1.weight"),
        Row(r"res_conv1_bn_(s|b|rm|riv)", lambda m: f"{BOTTOM_UP}stem.conv1.norm.{_CAFFE2_PARAMETERS[m[1]]}"),
        Row(r"res(\d)_(\d+)_branch(1|2a|2b|2c)_(bn_)?(w|b|s|rm|riv)", inside),
    ]


TORCHVISION_RESNET = Source(
    "a ResNet of torchvision",
    r"^layer1\.0\.conv1\.weight$",
    lambda state: torchvision_resnet(),
    unless=r"^layer1\.0\.conv2\.(conv2_|gwconv)",  # which PyConv's and PSConv's have
    dropped=(COUNTERS,),
    left_over=((r"fc\.(weight|bias)", CLASSIFIER),),
)
DETECTRON2_RESNET = Source(
    "a ResNet of Detectron2",
    r"^res2\.0\.conv1\.weight$",
    lambda state: [Row(r"((?:stem\.conv1|res[2-5])\..+)", BOTTOM_UP + r"\1")],
    dropped=(COUNTERS,),
    left_over=((r"stem\.fc\.(weight|bias)", CLASSIFIER),),
)
CAFFE2_RESNET = Source(
    "a ResNet of Caffe2 (MSRA)",
    r"^res2_0_branch2a_w$",
    _caffe2,
    dropped=((r".+_momentum", "the optimizer's"),),
    left_over=((r"(fc1000|pred)_[wb]", CLASSIFIER), (r"conv1_b", "the first convolution has no bias")),
)
