"""The configuration of the torchvision engine: Detectron2's keys and defaults, and which of them it honours."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from dyhead.config import ConfigError, add_dyhead_config, get, num_classes

_log = logging.getLogger(__name__)

# Detectron2's keys with its defaults. What they mean is told by Detectron2's own documentation.
_HONOURED: dict[str, Any] = {
    "VERSION": 2,
    "MODEL": {
        "DEVICE": "cuda",
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "WEIGHTS": "",
        "PIXEL_MEAN": [103.53, 116.28, 123.675],
        "PIXEL_STD": [1.0, 1.0, 1.0],
        "BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 2},
        "FPN": {"IN_FEATURES": [], "OUT_CHANNELS": 256, "NORM": "", "FUSE_TYPE": "sum"},
        "PROPOSAL_GENERATOR": {"NAME": "RPN", "MIN_SIZE": 0},
        "ANCHOR_GENERATOR": {
            "NAME": "DefaultAnchorGenerator",
            "SIZES": [[32, 64, 128, 256, 512]],
            "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
            "OFFSET": 0.0,
        },
        "RPN": {
            "HEAD_NAME": "StandardRPNHead",
            "IN_FEATURES": ["res4"],
            "IOU_THRESHOLDS": [0.3, 0.7],
            "IOU_LABELS": [0, -1, 1],
            "BATCH_SIZE_PER_IMAGE": 256,
            "POSITIVE_FRACTION": 0.5,
            "BBOX_REG_LOSS_TYPE": "smooth_l1",
            "BBOX_REG_LOSS_WEIGHT": 1.0,
            "BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
            "SMOOTH_L1_BETA": 0.0,
            "LOSS_WEIGHT": 1.0,
            "PRE_NMS_TOPK_TRAIN": 12000,
            "PRE_NMS_TOPK_TEST": 6000,
            "POST_NMS_TOPK_TRAIN": 2000,
            "POST_NMS_TOPK_TEST": 1000,
            "NMS_THRESH": 0.7,
            "CONV_DIMS": [-1],
        },
        "ROI_HEADS": {
            "NAME": "Res5ROIHeads",
            "NUM_CLASSES": 80,
            "IN_FEATURES": ["res4"],
            "IOU_THRESHOLDS": [0.5],
            "IOU_LABELS": [0, 1],
            "BATCH_SIZE_PER_IMAGE": 512,
            "POSITIVE_FRACTION": 0.25,
            "SCORE_THRESH_TEST": 0.05,
            "NMS_THRESH_TEST": 0.5,
            "PROPOSAL_APPEND_GT": True,
        },
        "ROI_BOX_HEAD": {
            "NAME": "",
            "BBOX_REG_LOSS_TYPE": "smooth_l1",
            "BBOX_REG_LOSS_WEIGHT": 1.0,
            "BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
            "SMOOTH_L1_BETA": 0.0,
            "POOLER_RESOLUTION": 14,
            "POOLER_SAMPLING_RATIO": 0,
            "POOLER_TYPE": "ROIAlignV2",
            "NUM_FC": 0,
            "FC_DIM": 1024,
            "NUM_CONV": 0,
            "CONV_DIM": 256,
            "NORM": "",
        },
        "RETINANET": {
            "NUM_CLASSES": 80,
            "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
            "IOU_THRESHOLDS": [0.4, 0.5],
            "IOU_LABELS": [0, -1, 1],
            "PRIOR_PROB": 0.01,
            "SCORE_THRESH_TEST": 0.05,
            "TOPK_CANDIDATES_TEST": 1000,
            "NMS_THRESH_TEST": 0.5,
            "BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
            "FOCAL_LOSS_GAMMA": 2.0,
            "FOCAL_LOSS_ALPHA": 0.25,
            "SMOOTH_L1_LOSS_BETA": 0.1,
            "BBOX_REG_LOSS_TYPE": "smooth_l1",
        },
        "RESNETS": {
            "DEPTH": 50,
            "OUT_FEATURES": ["res4"],
            "NUM_GROUPS": 1,
            "NORM": "FrozenBN",
            "WIDTH_PER_GROUP": 64,
            "STRIDE_IN_1X1": True,
            "RES5_DILATION": 1,
            "RES2_OUT_CHANNELS": 256,
            "STEM_OUT_CHANNELS": 64,
        },
    },
    "INPUT": {
        "MIN_SIZE_TRAIN": (800,),
        "MIN_SIZE_TRAIN_SAMPLING": "choice",
        "MAX_SIZE_TRAIN": 1333,
        "MIN_SIZE_TEST": 800,
        "MAX_SIZE_TEST": 1333,
        "RANDOM_FLIP": "horizontal",
        "FORMAT": "BGR",
    },
    "DATASETS": {"TRAIN": (), "TEST": ()},
    "DATALOADER": {
        "NUM_WORKERS": 4,
        "ASPECT_RATIO_GROUPING": True,
        "SAMPLER_TRAIN": "TrainingSampler",
        "FILTER_EMPTY_ANNOTATIONS": True,
    },
    "SOLVER": {
        "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "MAX_ITER": 40000,
        "BASE_LR": 0.001,
        "BASE_LR_END": 0.0,
        "MOMENTUM": 0.9,
        "NESTEROV": False,
        "WEIGHT_DECAY": 0.0001,
        "WEIGHT_DECAY_NORM": 0.0,
        "GAMMA": 0.1,
        "STEPS": (30000,),
        "NUM_DECAYS": 3,
        "WARMUP_FACTOR": 0.001,
        "WARMUP_ITERS": 1000,
        "WARMUP_METHOD": "linear",
        "RESCALE_INTERVAL": False,
        "CHECKPOINT_PERIOD": 5000,
        "IMS_PER_BATCH": 16,
        "BIAS_LR_FACTOR": 1.0,
        "WEIGHT_DECAY_BIAS": None,
        "CLIP_GRADIENTS": {"ENABLED": False, "CLIP_TYPE": "value", "CLIP_VALUE": 1.0, "NORM_TYPE": 2.0},
        "AMP": {"ENABLED": False},
    },
    "TEST": {"EVAL_PERIOD": 0, "DETECTIONS_PER_IMAGE": 100},
    "OUTPUT_DIR": "./output",
    "SEED": -1,
    "CUDNN_BENCHMARK": False,
    "FLOAT32_PRECISION": "",
}

# Detectron2's keys that this engine knows and cannot honour, with the defaults, which are what it does.
_NOT_HONOURED: dict[str, Any] = {
    "MODEL": {
        "LOAD_PROPOSALS": False,
        "MASK_ON": False,
        "KEYPOINT_ON": False,
        "ANCHOR_GENERATOR": {"ANGLES": [[-90, 0, 90]]},
        "RPN": {"BOUNDARY_THRESH": -1},
        "ROI_BOX_HEAD": {
            "CLS_AGNOSTIC_BBOX_REG": False,
            "TRAIN_ON_PRED_BOXES": False,
            "USE_FED_LOSS": False,
            "USE_SIGMOID_CE": False,
            "FED_LOSS_FREQ_WEIGHT_POWER": 0.5,
            "FED_LOSS_NUM_CLASSES": 50,
        },
        "ROI_BOX_CASCADE_HEAD": {
            "BBOX_REG_WEIGHTS": ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)),
            "IOUS": (0.5, 0.6, 0.7),
        },
        "ROI_MASK_HEAD": {
            "NAME": "MaskRCNNConvUpsampleHead",
            "POOLER_RESOLUTION": 14,
            "POOLER_SAMPLING_RATIO": 0,
            "NUM_CONV": 0,
            "CONV_DIM": 256,
            "NORM": "",
            "CLS_AGNOSTIC_MASK": False,
            "POOLER_TYPE": "ROIAlignV2",
        },
        "ROI_KEYPOINT_HEAD": {
            "NAME": "KRCNNConvDeconvUpsampleHead",
            "POOLER_RESOLUTION": 14,
            "POOLER_SAMPLING_RATIO": 0,
            "CONV_DIMS": (512,) * 8,
            "NUM_KEYPOINTS": 17,
            "MIN_KEYPOINTS_PER_IMAGE": 1,
            "NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": True,
            "LOSS_WEIGHT": 1.0,
            "POOLER_TYPE": "ROIAlignV2",
        },
        "SEM_SEG_HEAD": {
            "NAME": "SemSegFPNHead",
            "IN_FEATURES": ["p2", "p3", "p4", "p5"],
            "IGNORE_VALUE": 255,
            "NUM_CLASSES": 54,
            "CONVS_DIM": 128,
            "COMMON_STRIDE": 4,
            "NORM": "GN",
            "LOSS_WEIGHT": 1.0,
        },
        "PANOPTIC_FPN": {
            "INSTANCE_LOSS_WEIGHT": 1.0,
            "COMBINE": {
                "ENABLED": True,
                "OVERLAP_THRESH": 0.5,
                "STUFF_AREA_LIMIT": 4096,
                "INSTANCES_CONFIDENCE_THRESH": 0.5,
            },
        },
        # DyHead takes the place of RetinaNet's towers.
        "RETINANET": {"NUM_CONVS": 4, "NORM": ""},
        "RESNETS": {
            "DEFORM_ON_PER_STAGE": [False, False, False, False],
            "DEFORM_MODULATED": False,
            "DEFORM_NUM_GROUPS": 1,
        },
    },
    "INPUT": {"CROP": {"ENABLED": False, "TYPE": "relative_range", "SIZE": [0.9, 0.9]}, "MASK_FORMAT": "polygon"},
    "DATASETS": {
        "PROPOSAL_FILES_TRAIN": (),
        "PRECOMPUTED_PROPOSAL_TOPK_TRAIN": 2000,
        "PROPOSAL_FILES_TEST": (),
        "PRECOMPUTED_PROPOSAL_TOPK_TEST": 1000,
    },
    "DATALOADER": {"REPEAT_THRESHOLD": 0.0, "REPEAT_SQRT": True},
    "SOLVER": {"REFERENCE_WORLD_SIZE": 0},
    "TEST": {
        "EXPECTED_RESULTS": [],
        "KEYPOINT_OKS_SIGMAS": [],
        "AUG": {
            "ENABLED": False,
            "MIN_SIZES": (400, 500, 600, 700, 800, 900, 1000, 1100, 1200),
            "MAX_SIZE": 4000,
            "FLIP": True,
        },
        "PRECISE_BN": {"ENABLED": False, "NUM_ITER": 200},
    },
    "VIS_PERIOD": 0,
    "GLOBAL": {"HACK": 1.0},
}

_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN")
_BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")

# The values that can be honoured, where not every value can.
_CHOICES: dict[str, tuple] = {
    "MODEL.BACKBONE.NAME": ("build_resnet_fpn_dyhead_backbone", "build_retinanet_resnet_fpn_dyhead_backbone"),
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
    "MODEL.RESNETS.NORM": _NORMS[1:],
    "MODEL.RESNETS.RES5_DILATION": (1,),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": (64,),
    "MODEL.FPN.FUSE_TYPE": ("sum",),
    "MODEL.FPN.NORM": _NORMS,
    "MODEL.FPN.P6P7_IN_FEATURE": ("p5", "res5"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.FORMAT": ("RGB", "BGR"),
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler",),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.OPTIMIZER": ("SGD", "ADAMW"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model"),
    "FLOAT32_PRECISION": ("", "highest", "high", "medium"),
}
_CHOICES_OF: dict[str, dict[str, tuple]] = {
    "DyHeadFCOS": {},
    "DyHeadRetinaNet": {
        "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
        "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    },
    "DyHeadRCNN": {
        "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
        "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN",),
        "MODEL.RPN.HEAD_NAME": ("StandardRPNHead",),
        "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
        "MODEL.ROI_HEADS.NAME": ("StandardROIHeads",),
        "MODEL.ROI_BOX_HEAD.NAME": ("FastRCNNConvFCHead",),
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
        "MODEL.ROI_BOX_HEAD.NORM": _NORMS,
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign"),
    },
}


def get_cfg() -> CfgNode:
    """Every key of Detectron2 and of this project, with its default."""
    cfg = CfgNode(copy.deepcopy(_HONOURED))
    _merge(cfg, CfgNode(copy.deepcopy(_NOT_HONOURED)))
    return add_dyhead_config(cfg)


def dump(cfg: CfgNode) -> str:
    """The configuration as YAML that ``load_config`` reads."""
    return yaml.safe_dump(_plain(cfg))


def not_honoured_keys() -> set[str]:
    """Full names of the keys of Detectron2 that this engine knows but cannot honour."""
    return {key for key, _ in _leaves(_NOT_HONOURED)}


def warn_not_honoured(cfg: CfgNode, given: Iterable[str]) -> None:
    """Log one warning that names the keys in ``given`` whose value in ``cfg`` this engine cannot honour, if any.

    Args:
        cfg: the configuration.
        given: full names of the keys that the user set, as ``load_config`` returns them.
    """
    defaults = dict(_leaves(_NOT_HONOURED))
    ignored = [key for key in sorted(given) if key in defaults and _plain(get(cfg, key)) != _plain(defaults[key])]
    if ignored:
        listed = ", ".join(f"{key} {get(cfg, key)!r}" for key in ignored)
        _log.warning("The torchvision engine cannot honour, and ignores: %s", listed)


def check_values(cfg: CfgNode) -> None:
    """Refuse a configuration that this engine would have to read otherwise than it is meant.

    Raises:
        ConfigError: a value that is not supported; names the key, what is supported and what came.
    """
    num_classes(cfg)  # raises unless the meta-architecture is one of ours
    for key, supported in (_CHOICES | _CHOICES_OF[cfg.MODEL.META_ARCHITECTURE]).items():
        _expect(cfg, key, lambda value, among=supported: value in among, f"one of {', '.join(map(repr, supported))}")
    _check_backbone(cfg)
    for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
        _expect(cfg, key, lambda value: len(value) == 3, f"3 values, one for each channel of {cfg.INPUT.FORMAT}")
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        _expect(cfg, "INPUT.MIN_SIZE_TRAIN", lambda v: len(v) == 2 and v[0] <= v[1], "the lowest and the highest size")
    _expect(cfg, "INPUT.MIN_SIZE_TRAIN", len, "at least one size in pixels")
    for key in ("SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH", "SOLVER.CHECKPOINT_PERIOD"):
        _expect(cfg, key, lambda value: value >= 1, "at least 1")
    base = cfg.SOLVER.BASE_LR
    _expect(cfg, "SOLVER.BASE_LR", lambda lr: lr > 0, "a learning rate above 0")
    _expect(cfg, "SOLVER.BASE_LR_END", lambda lr: 0 <= lr <= base, f"0 to SOLVER.BASE_LR, {base}")


def iou_thresholds(cfg: CfgNode, node: str) -> tuple[float, float]:
    """Below the first, an anchor or proposal of ``node`` is background; from the second on it is an object's.

    Raises:
        ConfigError: other labels than background, (ignored,) object.
    """
    thresholds = get(cfg, f"{node}.IOU_THRESHOLDS")
    labels = {1: [0, 1], 2: [0, -1, 1]}
    _expect(cfg, f"{node}.IOU_THRESHOLDS", lambda value: len(value) in labels, "one or two thresholds")
    expected = labels[len(thresholds)]
    _expect(cfg, f"{node}.IOU_LABELS", expected.__eq__, f"{expected} with IOU_THRESHOLDS {thresholds}")
    return thresholds[0], thresholds[-1]


def _check_backbone(cfg: CfgNode) -> None:
    depth, levels = cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.FPN.IN_FEATURES
    widths = {"RES2_OUT_CHANNELS": 256}
    if depth < 50:
        widths = {"RES2_OUT_CHANNELS": 64, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64}
    for key, width in widths.items():
        _expect(cfg, f"MODEL.RESNETS.{key}", width.__eq__, f"{width} with DEPTH {depth}")
    stages = ["res2", "res3", "res4", "res5"]
    _expect(cfg, "MODEL.FPN.IN_FEATURES", lambda v: v and v == stages[-len(v) :], f"the last of {', '.join(stages)}")
    _expect(cfg, "MODEL.RESNETS.OUT_FEATURES", set(levels).issubset, f"all of MODEL.FPN.IN_FEATURES, {levels}")


def _expect(cfg: CfgNode, key: str, fits: Callable[[Any], Any], expected: str) -> None:
    if not fits(get(cfg, key)):
        raise ConfigError(f"{key}: the torchvision engine expects {expected}, got {get(cfg, key)!r}")


def _merge(cfg: CfgNode, more: CfgNode) -> None:
    for name, value in more.items():
        if isinstance(value, CfgNode) and name in cfg:
            _merge(cfg[name], value)
        else:
            cfg[name] = value


def _plain(value: Any) -> Any:
    """A copy of ``value`` with dicts for nodes and lists for tuples, which YAML does not know."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
