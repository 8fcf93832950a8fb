"""Which values of Detectron2's keys this engine takes where Detectron2 would end in an error, and what it ignores."""

from __future__ import annotations

from collections.abc import Iterable

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from fvcore.common.registry import Registry

from dyhead.config import (
    TWO_STAGE,
    ConfigError,
    add_dyhead_config,
    check_config,
    expect,
    get,
    ignore_keys,
    meta_architectures,
)
from dyhead.config_checks import BOX_LOSSES
from dyhead.data import DataError
from dyhead.detectron2.augmentation import check_augmentation
from dyhead.evaluation.coco import COCO_KEYPOINTS
from dyhead.options import Check, above, at_least, at_least_one, between, each, of_type, one_of

_WHOLE, _FLAG, _NUMBER = of_type(int), of_type(bool), of_type(float)
_COUNT, _POOLER = _WHOLE & at_least(1), one_of("ROIAlignV2", "ROIAlign", "ROIPool")
_NORM = one_of("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")

#: Beside those that both engines check (:mod:`dyhead.config_checks`).
CHECKS: dict[str, Check] = {
    "MODEL.RESNETS.NORM": _NORM,
    "MODEL.RESNETS.RES5_DILATION": one_of(1, 2),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": of_type(tuple[bool, bool, bool, bool]),
    "MODEL.RESNETS.DEFORM_MODULATED": _FLAG,
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": _COUNT,
    "MODEL.FPN.NORM": _NORM,
    "MODEL.FPN.FUSE_TYPE": one_of("sum", "avg"),
    "INPUT.FORMAT": one_of("RGB", "BGR", "L"),
    "INPUT.CROP.ENABLED": _FLAG,
    "INPUT.CROP.TYPE": one_of("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.CROP.SIZE": of_type(tuple[float, float]) & each(above(0)),
    "DATALOADER.SAMPLER_TRAIN": one_of("TrainingSampler", "RepeatFactorTrainingSampler"),
    "DATALOADER.REPEAT_THRESHOLD": _NUMBER & at_least(0),
    "DATALOADER.REPEAT_SQRT": _FLAG,
    "SOLVER.REFERENCE_WORLD_SIZE": _WHOLE & at_least(0),  # 0: as configured, on any number of devices
    "TEST.PRECISE_BN.ENABLED": _FLAG,
    "TEST.PRECISE_BN.NUM_ITER": _COUNT,
    "VIS_PERIOD": _WHOLE & at_least(0),
}

#: Of two-stage detectors, likewise.
TWO_STAGE_CHECKS: dict[str, Check] = {
    "MODEL.MASK_ON": _FLAG,
    "MODEL.KEYPOINT_ON": _FLAG,
    "MODEL.PROPOSAL_GENERATOR.NAME": one_of("RPN"),
    "MODEL.RPN.HEAD_NAME": one_of("StandardRPNHead"),
    "MODEL.RPN.BOUNDARY_THRESH": _WHOLE & at_least(-1),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": one_of(*BOX_LOSSES),
    "MODEL.ROI_HEADS.NAME": one_of("StandardROIHeads", "CascadeROIHeads"),
    "MODEL.ROI_BOX_HEAD.NAME": one_of("FastRCNNConvFCHead"),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": one_of(*BOX_LOSSES),
    "MODEL.ROI_BOX_HEAD.NORM": _NORM,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _POOLER,
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": _FLAG,
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": _FLAG,
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": _FLAG,
}

#: With the RoI heads CascadeROIHeads.
CASCADE_CHECKS: dict[str, Check] = {
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": of_type(tuple[float, ...]) & at_least_one("stage") & each(between(0, 1)),
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": Check(
        "lists of 4 numbers above 0",
        lambda stages: (
            of_type(tuple[tuple[float, ...], ...]).fits(stages)
            and all(len(stage) == 4 and min(stage) > 0 for stage in stages)
        ),
    ),
}

#: With MODEL.MASK_ON.
MASK_CHECKS: dict[str, Check] = {
    "INPUT.MASK_FORMAT": one_of("polygon", "bitmask"),
    "MODEL.ROI_MASK_HEAD.NAME": one_of("MaskRCNNConvUpsampleHead"),
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": _COUNT,
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": _WHOLE & at_least(0),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": _POOLER,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": _WHOLE  # the default, 0, is meant for detectors without a pyramid
    & Check("at least 1, as on a pyramid, where Detectron2's own files have 4", lambda value: value >= 1),
    "MODEL.ROI_MASK_HEAD.CONV_DIM": _COUNT,
    "MODEL.ROI_MASK_HEAD.NORM": _NORM,
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": _FLAG,
}

#: With MODEL.KEYPOINT_ON.
KEYPOINT_CHECKS: dict[str, Check] = {
    "MODEL.ROI_KEYPOINT_HEAD.NAME": one_of("KRCNNConvDeconvUpsampleHead"),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": _COUNT,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": _WHOLE & at_least(0),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": _POOLER,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": of_type(tuple[int, ...]) & at_least_one("convolution") & each(at_least(1)),
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": _COUNT,
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": _WHOLE & at_least(0),
    "MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": _FLAG,
    "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": _NUMBER & at_least(0),
    "TEST.KEYPOINT_OKS_SIGMAS": of_type(tuple[float, ...]) & each(above(0)),
}

#: With TEST.AUG.ENABLED.
AUGMENTATION_CHECKS: dict[str, Check] = {
    "TEST.AUG.MIN_SIZES": of_type(tuple[int, ...]) & at_least_one("size in pixels") & each(at_least(1)),
    "TEST.AUG.MAX_SIZE": _COUNT,
    "TEST.AUG.FLIP": _FLAG,
}

# What nothing reads of the configured detector's, or what needs more than annotations of objects. Patterns, as a
# shell's file names.
_NOT_HONOURED = (
    "MODEL.LOAD_PROPOSALS",
    "DATASETS.*PROPOSAL*",
    "MODEL.ANCHOR_GENERATOR.ANGLES",
    "MODEL.ROI_BOX_HEAD.*FED_LOSS*",
    "MODEL.SEM_SEG_HEAD.*",
    "MODEL.PANOPTIC_FPN.*",
    "GLOBAL.HACK",
)


def detectron2_checks(cfg: CfgNode) -> dict[str, Check]:
    """The checks, beside those of both engines, of the keys that the configured detector reads, by key."""
    checks = dict(CHECKS) | (AUGMENTATION_CHECKS if cfg.TEST.AUG.ENABLED else {})
    if cfg.MODEL.META_ARCHITECTURE == TWO_STAGE:
        checks |= TWO_STAGE_CHECKS
        for reads, more in (
            (cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads", CASCADE_CHECKS),
            (cfg.MODEL.MASK_ON, MASK_CHECKS),
            (cfg.MODEL.KEYPOINT_ON, KEYPOINT_CHECKS),
        ):
            checks |= more if reads else {}
    return checks


def ignore_not_honoured(cfg: CfgNode, given: Iterable[str]) -> None:
    """See :func:`dyhead.config.ignore_keys`. Nothing is known of what a meta-architecture of others does not read."""
    ignored: Iterable[str] = ()
    if cfg.MODEL.META_ARCHITECTURE in meta_architectures():
        optional = TWO_STAGE_CHECKS | CASCADE_CHECKS | MASK_CHECKS | KEYPOINT_CHECKS | AUGMENTATION_CHECKS
        ignored = (*_NOT_HONOURED, *(optional.keys() - detectron2_checks(cfg).keys()))
    ignore_keys(cfg, given, add_dyhead_config(get_cfg()), tuple(ignored), "The Detectron2 engine")


def check_values(cfg: CfgNode, processes: int = 1) -> None:
    """Check what can be checked before anything is built.

    Args:
        cfg: the configuration.
        processes: of the training, on all machines; ``SOLVER.REFERENCE_WORLD_SIZE`` scales the schedule to them.

    Raises:
        ConfigError: names the key, what was expected and what came.
    """
    check_config(cfg, _registered(META_ARCH_REGISTRY))
    backbones = _registered(BACKBONE_REGISTRY)
    expect(cfg, "MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME in backbones, f"one of {', '.join(backbones)}")
    for key, check in detectron2_checks(cfg).items():
        expect(cfg, key, check.fits(get(cfg, key)), check.text)
    _check_stages(cfg)
    _check_crop(cfg)
    _check_cascade(cfg)
    _check_sigmas(cfg)
    check_augmentation(cfg)
    _check_scaled(cfg, processes)


def _registered(registry: Registry) -> list[str]:
    return sorted(name for name, _ in registry)


def check_annotations(cfg: CfgNode, train: Iterable[str], test: Iterable[str] = ()) -> None:
    """Check that registered datasets have the masks and keypoints to train on, and to evaluate.

    Args:
        cfg: the configuration.
        train: names of the datasets to train on.
        test: names of those to evaluate on.

    Raises:
        ConfigError: they have none, or not in the form that the configuration says.
    """
    train, test = list(train), list(test)
    if cfg.MODEL.KEYPOINT_ON:
        for name in (*train, *test):
            _check_keypoints(cfg, name)
    if cfg.MODEL.MASK_ON:
        for name in dict.fromkeys((*train, *test)):
            _check_masks(cfg, name, trained=name in train)


def _check_keypoints(cfg: CfgNode, name: str) -> None:
    keypoints = MetadataCatalog.get(name).get("keypoint_names")
    if not keypoints:
        raise ConfigError(f"MODEL.KEYPOINT_ON: expected False, since dataset {name!r} has no keypoints, got True")
    count, key = len(keypoints), "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
    expect(cfg, key, get(cfg, key) == count, f"{count}, the number of keypoints of dataset {name!r}")


def _check_masks(cfg: CfgNode, name: str, *, trained: bool) -> None:
    for record in DatasetCatalog.get(name):
        for annotation in record.get("annotations", ()):
            mask = annotation.get("segmentation")
            if not mask:
                raise ConfigError(
                    f"MODEL.MASK_ON: expected False, since dataset {name!r} has objects without a segmentation "
                    f"({record['file_name']}), got True"
                )
            if not isinstance(mask, dict):
                continue
            size = [record["height"], record["width"]]
            if "size" in mask and list(mask["size"]) != size:
                raise DataError(
                    f"dataset {name!r}: {record['file_name']}: expected masks (segmentation) of {size[0]} x {size[1]} "
                    f"pixels, the image's height and width, got {mask['size'][0]} x {mask['size'][1]}"
                )
            if trained and not annotation.get("iscrowd", 0):
                bitmask = cfg.INPUT.MASK_FORMAT == "bitmask"
                which = f"'bitmask', since dataset {name!r} has masks as RLE, not as polygons ({record['file_name']})"
                expect(cfg, "INPUT.MASK_FORMAT", bitmask, which)


def _check_stages(cfg: CfgNode) -> None:
    if "resnet_fpn" in cfg.MODEL.BACKBONE.NAME:
        there = cfg.MODEL.RESNETS.OUT_FEATURES
        fits = set(cfg.MODEL.FPN.IN_FEATURES) <= set(there)
        expect(cfg, "MODEL.FPN.IN_FEATURES", fits, f"some of MODEL.RESNETS.OUT_FEATURES, {there}")


def _check_crop(cfg: CfgNode) -> None:
    kind, size = cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE
    if kind.startswith("relative"):
        expect(cfg, "INPUT.CROP.SIZE", max(size) <= 1, f"parts of the image, at most 1, with INPUT.CROP.TYPE {kind}")
    else:
        expect(cfg, "INPUT.CROP.SIZE", all(map(_WHOLE.fits, size)), f"pixels with INPUT.CROP.TYPE {kind}")


def _check_cascade(cfg: CfgNode) -> None:
    if cfg.MODEL.META_ARCHITECTURE != TWO_STAGE or cfg.MODEL.ROI_HEADS.NAME != "CascadeROIHeads":
        return
    ious, weights = cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS, cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS
    first = cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0]
    cascade = "MODEL.ROI_BOX_CASCADE_HEAD"
    expect(cfg, f"{cascade}.IOUS", ious[0] == first, f"MODEL.ROI_HEADS.IOU_THRESHOLDS, {first}, first")
    expect(cfg, f"{cascade}.BBOX_REG_WEIGHTS", len(weights) == len(ious), f"{len(ious)} lists, as many as IOUS")
    agnostic = "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"
    expect(cfg, agnostic, get(cfg, agnostic), "True with MODEL.ROI_HEADS.NAME CascadeROIHeads")


def _check_sigmas(cfg: CfgNode) -> None:
    if cfg.MODEL.KEYPOINT_ON:
        count, given = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
        fits = given == count or (given == 0 and count == COCO_KEYPOINTS)
        expect(cfg, "TEST.KEYPOINT_OKS_SIGMAS", fits, f"{count} numbers, as many as NUM_KEYPOINTS")


def _check_scaled(cfg: CfgNode, processes: int) -> None:
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, processes) or processes < 1:  # so few are refused elsewhere
        return
    batch = cfg.SOLVER.IMS_PER_BATCH
    expect(cfg, "SOLVER.REFERENCE_WORLD_SIZE", batch % reference == 0, f"a divisor of SOLVER.IMS_PER_BATCH, {batch}")
    try:
        check_config(DefaultTrainer.auto_scale_workers(cfg, processes), _registered(META_ARCH_REGISTRY))
    except ConfigError as error:
        raise ConfigError(
            f"SOLVER.REFERENCE_WORLD_SIZE {reference}: the schedule cannot be scaled to {processes} devices: {error}"
        ) from error
