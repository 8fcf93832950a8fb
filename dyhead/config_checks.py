"""Which values of Detectron2's own keys are legal, where every run reads the key; engines may narrow them down.

The checks of this project's keys stand with the options (:mod:`dyhead.options`).
"""

from __future__ import annotations

from typing import Any

from dyhead.detection.assigners import MaxIoUAssigner
from dyhead.detection.roi import BOX_HEADS
from dyhead.options import (
    Check,
    above,
    at_least,
    at_least_one,
    at_most,
    below,
    between,
    each,
    increasing,
    leaves,
    of_type,
    one_of,
    or_null,
)

_NUMBER, _WHOLE, _FLAG = of_type(float), of_type(int), of_type(bool)
_NUMBERS, _WHOLES, _STRINGS = of_type(tuple[float, ...]), of_type(tuple[int, ...]), of_type(tuple[str, ...])

_COUNT = _WHOLE & at_least(1)
_FRACTION = _NUMBER & between(0, 1)
_NOT_NEGATIVE = _NUMBER & at_least(0)
_LEVELS = _STRINGS & at_least_one("level")
_BOX_WEIGHTS = of_type(tuple[float, float, float, float]) & each(above(0))

#: Detectron2's SOLVER.STEPS.
DEFAULT_STEPS = (30000,)

#: NumPy takes no larger one.
MAX_SEED = 2**32 - 1


def _are_expected(value: Any) -> bool:
    entry_types = (of_type(str), of_type(str), _NUMBER, _NOT_NEGATIVE)
    return isinstance(value, (list, tuple)) and all(
        isinstance(entry, (list, tuple))
        and len(entry) == len(entry_types)
        and all(check.fits(part) for check, part in zip(entry_types, entry, strict=True))
        for entry in value
    )


#: Of all detectors.
CHECKS: dict[str, Check] = {
    "VERSION": Check("2, the version of Detectron2's keys that this project has", lambda value: value == 2),
    "MODEL.PIXEL_MEAN": _NUMBERS,
    "MODEL.PIXEL_STD": _NUMBERS & each(above(0)),
    "MODEL.BACKBONE.FREEZE_AT": _WHOLE & between(0, 5),
    "MODEL.FPN.OUT_CHANNELS": _COUNT,
    "MODEL.ANCHOR_GENERATOR.NAME": one_of("DefaultAnchorGenerator"),
    "INPUT.MIN_SIZE_TRAIN": _WHOLES & at_least_one("size in pixels") & each(at_least(1)),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": _COUNT,
    "INPUT.MIN_SIZE_TEST": _WHOLE & at_least(0),  # 0: images keep their size
    "INPUT.MAX_SIZE_TEST": _COUNT,
    "INPUT.RANDOM_FLIP": one_of("horizontal", "vertical", "none"),
    "DATASETS.TRAIN": _STRINGS,
    "DATASETS.TEST": _STRINGS,
    "DATALOADER.NUM_WORKERS": _WHOLE & at_least(0),
    "DATALOADER.ASPECT_RATIO_GROUPING": _FLAG,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": _FLAG,
    "SOLVER.IMS_PER_BATCH": _COUNT,
    "SOLVER.MAX_ITER": _COUNT,
    "SOLVER.CHECKPOINT_PERIOD": _COUNT,
    "SOLVER.LR_SCHEDULER_NAME": one_of("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "SOLVER.BASE_LR": _NUMBER & above(0),
    "SOLVER.BASE_LR_END": _NOT_NEGATIVE,
    "SOLVER.BIAS_LR_FACTOR": _NOT_NEGATIVE,
    "SOLVER.MOMENTUM": _NUMBER & at_least(0) & below(1),
    "SOLVER.NESTEROV": _FLAG,
    "SOLVER.WEIGHT_DECAY": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_NORM": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_BIAS": or_null(_NOT_NEGATIVE),
    "SOLVER.GAMMA": _NUMBER & above(0) & at_most(1),
    "SOLVER.STEPS": _WHOLES & each(at_least(1)) & increasing(),
    "SOLVER.NUM_DECAYS": _COUNT,
    "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
    "SOLVER.WARMUP_ITERS": _WHOLE & at_least(0),
    "SOLVER.WARMUP_FACTOR": _NOT_NEGATIVE,
    "SOLVER.RESCALE_INTERVAL": _FLAG,
    "SOLVER.CLIP_GRADIENTS.ENABLED": _FLAG,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("value", "norm", "full_model"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _NUMBER & above(0),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Check(
        "a number above 0, or infinity", lambda value: isinstance(value, (int, float)) and value > 0
    ),
    "SOLVER.AMP.ENABLED": _FLAG,
    "TEST.DETECTIONS_PER_IMAGE": _COUNT,
    "TEST.EXPECTED_RESULTS": Check("a list of [task, metric, value, tolerance]", _are_expected),
    "TEST.EVAL_PERIOD": _WHOLE & at_least(0),  # 0: only at the end
    "TEST.AUG.ENABLED": _FLAG,
    "TEST.PRECISE_BN.ENABLED": _FLAG,
    "TEST.PRECISE_BN.NUM_ITER": _COUNT,
    "CUDNN_BENCHMARK": _FLAG,
    "FLOAT32_PRECISION": one_of("", "highest", "high", "medium"),
    "SEED": _WHOLE & at_most(MAX_SEED),  # negative: a random one
}

#: With TEST.AUG.ENABLED.
AUGMENTATION_CHECKS: dict[str, Check] = {
    "TEST.AUG.MIN_SIZES": _WHOLES & at_least_one("size in pixels") & each(at_least(1)),
    "TEST.AUG.MAX_SIZE": _COUNT,
    "TEST.AUG.FLIP": _FLAG,
}

#: Of backbones with a ResNet, which have it in their builders' names.
RESNET_CHECKS: dict[str, Check] = {
    "MODEL.RESNETS.DEPTH": one_of(18, 34, 50, 101, 152),
    "MODEL.RESNETS.OUT_FEATURES": _STRINGS
    & at_least_one("stage")
    & each(one_of("stem", "res2", "res3", "res4", "res5")),
    "MODEL.RESNETS.NUM_GROUPS": _COUNT,
    "MODEL.RESNETS.WIDTH_PER_GROUP": _COUNT,
    "MODEL.RESNETS.STRIDE_IN_1X1": _FLAG,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": _COUNT,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": _COUNT,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": of_type(tuple[bool, bool, bool, bool]),  # res2 to res5
    "MODEL.RESNETS.DEFORM_MODULATED": _FLAG,
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": _COUNT,
}

#: Of backbones with a feature pyramid network, likewise.
FPN_CHECKS: dict[str, Check] = {"MODEL.FPN.IN_FEATURES": _STRINGS & at_least_one("stage")}

#: The losses of the boxes of two-stage detectors.
BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")

#: The box heads of two-stage detectors: Detectron2's, and this project's.
CONV_FC_HEAD = "FastRCNNConvFCHead"
BOX_HEAD_NAMES = (CONV_FC_HEAD, *BOX_HEADS)

#: What Detectron2's box head alone reads.
CONV_FC_KEYS = tuple(f"MODEL.ROI_BOX_HEAD.{key}" for key in ("NUM_CONV", "CONV_DIM", "NORM", "NUM_FC", "FC_DIM"))

#: What a box head that detects by itself (:class:`dyhead.detection.roi.Registered`) does not read, beside those.
BOX_LOSS_KEYS = tuple(
    f"MODEL.ROI_BOX_HEAD.{key}"
    for key in (
        "BBOX_REG_WEIGHTS",
        "BBOX_REG_LOSS_TYPE",
        "BBOX_REG_LOSS_WEIGHT",
        "SMOOTH_L1_BETA",
        "CLS_AGNOSTIC_BBOX_REG",
        "TRAIN_ON_PRED_BOXES",
        "USE_SIGMOID_CE",
    )
)

#: The RoI heads that are Cascade R-CNN's.
CASCADE = "CascadeROIHeads"

#: The nodes that two-stage detectors alone read.
TWO_STAGE_NODES = (
    "MODEL.PROPOSAL_GENERATOR",
    "MODEL.RPN",
    "MODEL.ROI_HEADS",
    "MODEL.ROI_BOX_HEAD",
    "MODEL.ROI_BOX_CASCADE_HEAD",
    "MODEL.ROI_MASK_HEAD",
    "MODEL.ROI_KEYPOINT_HEAD",
    "MODEL.DSFPN",
    *(head.node for head in BOX_HEADS.values()),
)

_MATCHING = {leaf.key: leaf.type & leaf.check for leaf in leaves(MaxIoUAssigner)}

#: Of two-stage detectors.
TWO_STAGE_CHECKS: dict[str, Check] = {
    "MODEL.MASK_ON": _FLAG,
    "MODEL.KEYPOINT_ON": _FLAG,
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": _NOT_NEGATIVE,
    "MODEL.RPN.IN_FEATURES": _LEVELS,
    **{f"MODEL.RPN.{key}": check for key, check in _MATCHING.items()},
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _COUNT,
    "MODEL.RPN.POSITIVE_FRACTION": _FRACTION,
    "MODEL.RPN.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.RPN.SMOOTH_L1_BETA": _NOT_NEGATIVE,
    "MODEL.RPN.LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": _COUNT,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": _COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": _COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TEST": _COUNT,
    "MODEL.RPN.NMS_THRESH": _FRACTION,
    "MODEL.RPN.CONV_DIMS": _WHOLES
    & at_least_one("convolution")
    & each(Check("at least 1, or -1", lambda value: value == -1 or value >= 1)),
    "MODEL.ROI_HEADS.NUM_CLASSES": _COUNT,
    "MODEL.ROI_HEADS.IN_FEATURES": _LEVELS,
    **{f"MODEL.ROI_HEADS.{key}": check for key, check in _MATCHING.items()},
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _COUNT,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _FRACTION,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _FRACTION,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _FRACTION,
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": _FLAG,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": _NOT_NEGATIVE,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": _COUNT,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": _WHOLE & at_least(0),
    "MODEL.ROI_BOX_HEAD.NUM_FC": _WHOLE & at_least(0),
    "MODEL.ROI_BOX_HEAD.FC_DIM": _COUNT,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": _WHOLE & at_least(0),
    "MODEL.ROI_BOX_HEAD.CONV_DIM": _COUNT,
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": _FLAG,
}

#: Of two-stage detectors with the RoI heads CascadeROIHeads.
CASCADE_CHECKS: dict[str, Check] = {
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": _NUMBERS & at_least_one("stage") & each(between(0, 1)),
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": Check(
        "lists of 4 numbers above 0",
        lambda stages: (
            of_type(tuple[tuple[float, ...], ...]).fits(stages)
            and all(len(stage) == 4 and min(stage) > 0 for stage in stages)
        ),
    ),
}

#: Of two-stage detectors with MODEL.MASK_ON.
MASK_CHECKS: dict[str, Check] = {
    "INPUT.MASK_FORMAT": one_of("polygon", "bitmask"),
    "MODEL.ROI_MASK_HEAD.NAME": one_of("MaskRCNNConvUpsampleHead"),
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": _COUNT,
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": _WHOLE & at_least(0),
    "MODEL.ROI_MASK_HEAD.NUM_CONV": _WHOLE  # the default, 0, is meant for detectors without a pyramid
    & Check("at least 1, as on a pyramid, where Detectron2's own files have 4", lambda value: value >= 1),
    "MODEL.ROI_MASK_HEAD.CONV_DIM": _COUNT,
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": _FLAG,
}

#: Of two-stage detectors with MODEL.KEYPOINT_ON.
KEYPOINT_CHECKS: dict[str, Check] = {
    "MODEL.ROI_KEYPOINT_HEAD.NAME": one_of("KRCNNConvDeconvUpsampleHead"),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": _COUNT,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": _WHOLE & at_least(0),
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": _WHOLES & at_least_one("convolution") & each(at_least(1)),
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": _COUNT,
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": _WHOLE & at_least(0),
    "MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": _FLAG,
    "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": _NOT_NEGATIVE,
    "TEST.KEYPOINT_OKS_SIGMAS": _NUMBERS & each(above(0)),
}
