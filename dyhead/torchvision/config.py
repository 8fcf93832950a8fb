"""The configuration of the torchvision engine: Detectron2's keys and defaults, and which of them it honours."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from dyhead.config import (
    TWO_STAGE,
    ConfigError,
    add_dyhead_config,
    check_config,
    get,
    has_simple_pyramid,
    ignore_keys,
    network_of,
    values,
)
from dyhead.config_checks import BOX_HEAD_NAMES, BOX_LOSSES, CASCADE
from dyhead.config_files import shown
from dyhead.torchvision.backbone import BACKBONES

_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN")
_POOLERS = ("ROIAlignV2", "ROIAlign")

# The values that can be honoured, where not every value can.
_CHOICES: dict[str, tuple] = {
    "MODEL.BACKBONE.NAME": tuple(BACKBONES),
    "MODEL.RESNETS.NORM": _NORMS[1:],
    "MODEL.RESNETS.RES5_DILATION": (1,),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": (64,),
    "MODEL.FPN.FUSE_TYPE": ("sum",),
    "MODEL.FPN.NORM": _NORMS,
    "INPUT.FORMAT": ("RGB", "BGR"),
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler",),
}
_TWO_STAGE_CHOICES: dict[str, tuple] = {
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN",),
    "MODEL.RPN.HEAD_NAME": ("StandardRPNHead",),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": BOX_LOSSES,
    "MODEL.ROI_HEADS.NAME": ("StandardROIHeads", CASCADE),
    "MODEL.ROI_BOX_HEAD.NAME": BOX_HEAD_NAMES,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.NORM": _NORMS,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _POOLERS,
}
_MASK_CHOICES: dict[str, tuple] = {
    "INPUT.MASK_FORMAT": ("bitmask",),
    "MODEL.ROI_MASK_HEAD.NORM": _NORMS,
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": _POOLERS,
}
_KEYPOINT_CHOICES: dict[str, tuple] = {"MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": _POOLERS}


def get_cfg() -> CfgNode:
    """Every key of Detectron2 and of this project, with its default."""
    defaults, _ = _detectron2()
    return add_dyhead_config(CfgNode(defaults))  # of a copy


def not_honoured_keys() -> set[str]:
    """Full names of the keys of Detectron2 that this engine knows but cannot honour."""
    defaults, patterns = _detectron2()
    return {key for key, _ in values(defaults) if any(fnmatchcase(key, pattern) for pattern in patterns)}


def ignore_not_honoured(cfg: CfgNode, given: Iterable[str]) -> None:
    """See :func:`dyhead.config.ignore_keys`."""
    ignore_keys(cfg, given, get_cfg(), _detectron2()[1], "The torchvision engine")


def check_values(cfg: CfgNode) -> None:
    """Refuse a configuration that this engine would have to read otherwise than it is meant.

    Raises:
        ConfigError: a value that is not supported; names the key, what is supported and what came.
    """
    check_config(cfg)
    choices = dict(_CHOICES)
    if cfg.MODEL.META_ARCHITECTURE == TWO_STAGE:
        choices |= _TWO_STAGE_CHOICES
        choices |= _MASK_CHOICES if cfg.MODEL.MASK_ON else {}
        choices |= _KEYPOINT_CHOICES if cfg.MODEL.KEYPOINT_ON else {}
    if has_simple_pyramid(cfg):
        choices["MODEL.FPN.NORM"] = ("LN",)
        del choices["MODEL.FPN.FUSE_TYPE"]
    for key, supported in choices.items():
        _expect(cfg, key, lambda value, among=supported: value in among, f"one of {', '.join(map(repr, supported))}")
    if network_of(cfg) is None:
        _check_resnet(cfg)


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


def _check_resnet(cfg: CfgNode) -> None:
    depth, levels = cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.FPN.IN_FEATURES
    widths = {"RES2_OUT_CHANNELS": 256}
    if depth < 50:
        widths = {"RES2_OUT_CHANNELS": 64, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64}
    for key, width in widths.items():
        _expect(cfg, f"MODEL.RESNETS.{key}", width.__eq__, f"{width} with DEPTH {depth}")
    stages = ["res2", "res3", "res4", "res5"]
    _expect(cfg, "MODEL.FPN.IN_FEATURES", lambda v: v == stages[-len(v) :], f"the last of {', '.join(stages)}")
    _expect(cfg, "MODEL.RESNETS.OUT_FEATURES", set(levels).issubset, f"all of MODEL.FPN.IN_FEATURES, {levels}")


def _expect(cfg: CfgNode, key: str, fits: Callable[[Any], Any], expected: str) -> None:
    if not fits(get(cfg, key)):
        raise ConfigError(f"{key}: the torchvision engine expects {expected}, got {shown(get(cfg, key))}")


@cache
def _detectron2() -> tuple[dict[str, Any], list[str]]:
    """Detectron2's defaults, and patterns of the keys that are not honoured."""
    text = resources.files(__package__).joinpath("detectron2_defaults.yaml").read_text(encoding="utf-8")
    defaults, not_honoured = yaml.safe_load_all(text)
    return _with_tuples(defaults), not_honoured


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(part) for key, part in value.items()}
    return ast.literal_eval(value) if isinstance(value, str) and value.startswith("(") else value
