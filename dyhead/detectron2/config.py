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
    has_resnet,
    ignore_keys,
    meta_architectures,
)
from dyhead.config_checks import BOX_HEAD_NAMES, BOX_LOSSES, CASCADE
from dyhead.detectron2.augmentation import check_augmentation
from dyhead.options import Check, above, at_least, each, of_type, one_of
from dyhead.runs.preflight import check_parts

_WHOLE, _FLAG, _NUMBER = of_type(int), of_type(bool), of_type(float)
_COUNT, _POOLER = _WHOLE & at_least(1), one_of("ROIAlignV2", "ROIAlign", "ROIPool")
_NORM = one_of("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")

#: Beside those that both engines check (:mod:`dyhead.config_checks`).
CHECKS: dict[str, Check] = {
    "MODEL.RESNETS.NORM": _NORM,
    "MODEL.RESNETS.RES5_DILATION": one_of(1, 2),
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
    "VIS_PERIOD": _WHOLE & at_least(0),
}

#: Of two-stage detectors, likewise.
TWO_STAGE_CHECKS: dict[str, Check] = {
    "MODEL.PROPOSAL_GENERATOR.NAME": one_of("RPN"),
    "MODEL.RPN.HEAD_NAME": one_of("StandardRPNHead"),
    "MODEL.RPN.BOUNDARY_THRESH": _WHOLE & at_least(-1),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": one_of(*BOX_LOSSES),
    "MODEL.ROI_HEADS.NAME": one_of("StandardROIHeads", CASCADE),
    "MODEL.ROI_BOX_HEAD.NAME": one_of(*BOX_HEAD_NAMES),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": one_of(*BOX_LOSSES),
    "MODEL.ROI_BOX_HEAD.NORM": _NORM,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _POOLER,
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": _FLAG,
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": _FLAG,
}

#: With MODEL.MASK_ON, and with MODEL.KEYPOINT_ON, beside those of both engines.
MASK_CHECKS: dict[str, Check] = {
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": _POOLER,
    "MODEL.ROI_MASK_HEAD.NORM": _NORM,
}
KEYPOINT_CHECKS: dict[str, Check] = {"MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": _POOLER}

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
    checks = dict(CHECKS)
    if cfg.MODEL.META_ARCHITECTURE == TWO_STAGE:
        checks |= TWO_STAGE_CHECKS
        for reads, more in (
            (cfg.MODEL.MASK_ON, MASK_CHECKS),
            (cfg.MODEL.KEYPOINT_ON, KEYPOINT_CHECKS),
        ):
            checks |= more if reads else {}
    return checks


def ignore_not_honoured(cfg: CfgNode, given: Iterable[str]) -> None:
    """See :func:`dyhead.config.ignore_keys`. Nothing is known of what a meta-architecture of others does not read."""
    ignored: Iterable[str] = ()
    if cfg.MODEL.META_ARCHITECTURE in meta_architectures():
        ignored = (*_NOT_HONOURED, *(TWO_STAGE_CHECKS.keys() - detectron2_checks(cfg).keys()))
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
    train = list(train)
    for name in dict.fromkeys((*train, *test)):
        records, keypoints = DatasetCatalog.get(name), MetadataCatalog.get(name).get("keypoint_names")
        check_parts(cfg, name, records, keypoints, trained=name in train)


def _check_stages(cfg: CfgNode) -> None:
    if has_resnet(cfg) and "resnet_fpn" in cfg.MODEL.BACKBONE.NAME:
        there = cfg.MODEL.RESNETS.OUT_FEATURES
        fits = set(cfg.MODEL.FPN.IN_FEATURES) <= set(there)
        expect(cfg, "MODEL.FPN.IN_FEATURES", fits, f"some of MODEL.RESNETS.OUT_FEATURES, {there}")


def _check_crop(cfg: CfgNode) -> None:
    kind, size = cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE
    if kind.startswith("relative"):
        expect(cfg, "INPUT.CROP.SIZE", max(size) <= 1, f"parts of the image, at most 1, with INPUT.CROP.TYPE {kind}")
    else:
        expect(cfg, "INPUT.CROP.SIZE", all(map(_WHOLE.fits, size)), f"pixels with INPUT.CROP.TYPE {kind}")


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
