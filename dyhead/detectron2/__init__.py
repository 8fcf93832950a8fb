"""The Dynamic Head in Detectron2: backbones, detectors and the trainer. Importing it registers them with Detectron2.

The ``shapes`` sets are then in its catalogs, and its ``build_optimizer`` takes ``SOLVER.OPTIMIZER ADAMW`` and the
clipping ``full_model`` where :func:`add_dyhead_config` has added these keys (:mod:`dyhead.detectron2.solver`).

In a Detectron2 project of one's own:

    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from dyhead.detectron2 import add_dyhead_config

    cfg = add_dyhead_config(get_cfg())
    cfg.merge_from_file("configs/fcos_dyhead_R50.yaml")
    model = build_model(cfg)

``DyHeadBackbone(backbone)`` gives the head to any other backbone with a pyramid; every class also takes plain keyword
arguments, as LazyConfig wants them.
"""

from dyhead.config import add_dyhead_config
from dyhead.detectron2.backbone import (
    DyHeadBackbone,
    NeckBackbone,
    NetworkBackbone,
    NetworkPyramid,
    SimplePyramidBackbone,
    build_backbone,
    build_resnet_fpn_dyhead_backbone,
    build_resnet_fpn_p6p7_backbone,
    build_retinanet_resnet_fpn_dyhead_backbone,
)
from dyhead.detectron2.checkpoint import Checkpointer
from dyhead.detectron2.datasets import NamingMapper, register_datasets, register_shapes
from dyhead.detectron2.deform_conv import use_own_deform_conv
from dyhead.detectron2.dense import META_ARCHITECTURES, DenseMetaArchitecture, dense_detector
from dyhead.detectron2.engine import main, setup
from dyhead.detectron2.rcnn import DyHeadRCNN
from dyhead.detectron2.solver import except_necks
from dyhead.detectron2.trainer import Trainer
from dyhead.ops.flops import register_with_fvcore

register_with_fvcore()
register_shapes()
globals().update(META_ARCHITECTURES)  # DyHeadFCOS, DyHeadRetinaNet, ...

__all__ = [
    "Checkpointer",
    "DenseMetaArchitecture",
    "DyHeadBackbone",
    "DyHeadRCNN",
    "NamingMapper",
    "NeckBackbone",
    "NetworkBackbone",
    "NetworkPyramid",
    "SimplePyramidBackbone",
    "Trainer",
    "add_dyhead_config",
    "build_backbone",
    "build_resnet_fpn_dyhead_backbone",
    "build_resnet_fpn_p6p7_backbone",
    "build_retinanet_resnet_fpn_dyhead_backbone",
    "dense_detector",
    "except_necks",
    "main",
    "register_datasets",
    "setup",
    "use_own_deform_conv",
]
__all__ += META_ARCHITECTURES
