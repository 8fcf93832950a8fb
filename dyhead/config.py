"""Configuration that both engines share: the keys this project adds to Detectron2's, and how a YAML file is read.

Keys and their meaning are Detectron2's wherever Detectron2 has one. The added keys, their defaults and the checks of
their values are the options of the parts that read them (:mod:`dyhead.config_options` lists them); the checks of
Detectron2's own keys stand in :mod:`dyhead.config_checks`. docs/config.md is made from both.
"""

from __future__ import annotations

import difflib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from fvcore.common.config import CfgNode

from dyhead.backbones import NETWORKS
from dyhead.backbones import Registered as RegisteredNetwork
from dyhead.config_checks import (
    AUGMENTATION_CHECKS,
    BOX_LOSS_KEYS,
    CASCADE,
    CASCADE_CHECKS,
    CHECKS,
    CONV_FC_HEAD,
    CONV_FC_KEYS,
    FPN_CHECKS,
    KEYPOINT_CHECKS,
    MASK_CHECKS,
    RESNET_CHECKS,
    TWO_STAGE_CHECKS,
    TWO_STAGE_NODES,
)
from dyhead.config_files import ConfigError, Section, Setting, read_file, read_overrides, resolve, shown
from dyhead.config_options import DUAL, TWO_STAGE, option_nodes
from dyhead.data.coco import COCO_KEYPOINTS
from dyhead.detection import DETECTORS
from dyhead.detection.assigners import MaxIoUAssigner
from dyhead.detection.roi import BOX_HEADS
from dyhead.options import Check, leaves, read

_log = logging.getLogger(__name__)

# The nodes of meta-architectures that are not of the dense family, Detectron2's own with them.
_NODES = dict.fromkeys((TWO_STAGE, "GeneralizedRCNN", "PanopticFPN"), "MODEL.ROI_HEADS") | {
    "RetinaNet": "MODEL.RETINANET"
}


def add_dyhead_config(cfg: CfgNode) -> CfgNode:
    """Add this project's keys, with their defaults, to ``cfg`` in place and return it.

    ``cfg`` is a tree that already holds Detectron2's keys (``detectron2.config.get_cfg()`` or
    ``dyhead.torchvision.get_cfg()``). docs/config.md lists the keys.
    """
    for name, options in option_nodes().items():
        node = cfg
        for part in name.split("."):
            if part not in node:
                node[part] = type(cfg)()
            node = node[part]
        for leaf in leaves(options):
            if leaf.key not in node:
                node[leaf.key] = _as_lists(leaf.default)
    return cfg


def check_config(cfg: CfgNode, others: Sequence[str] = ()) -> None:
    """Check what can be checked before anything is built: every value that the configured detector's runs read.

    Args:
        cfg: the configuration.
        others: meta-architectures that are not this project's, but the engine's. What they read is theirs to check.

    Raises:
        ConfigError: names the key, what was expected and what came.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    known = list(dict.fromkeys([*meta_architectures(), *others]))
    expect(cfg, "MODEL.META_ARCHITECTURE", name in known, f"one of {', '.join(known)}")
    unread = {detector.node for other, detector in DETECTORS.items() if other != name}
    for node in option_nodes():
        if node not in unread:
            options_of(cfg, node)
    for key, check in detectron2_checks(cfg).items():
        expect(cfg, key, check.fits(get(cfg, key)), check.text)
    _check_together(cfg)


def detectron2_checks(cfg: CfgNode) -> dict[str, Check]:
    """The checks of Detectron2's own keys that the configured detector reads, by key."""
    checks = dict(CHECKS) | (AUGMENTATION_CHECKS if cfg.TEST.AUG.ENABLED else {})
    if has_resnet(cfg):
        checks |= RESNET_CHECKS
    if "fpn" in cfg.MODEL.BACKBONE.NAME:
        checks |= FPN_CHECKS
    if cfg.MODEL.META_ARCHITECTURE == TWO_STAGE:
        checks |= TWO_STAGE_CHECKS
        checks |= CASCADE_CHECKS if cfg.MODEL.ROI_HEADS.NAME == CASCADE else {}
        checks |= MASK_CHECKS if cfg.MODEL.MASK_ON else {}
        checks |= KEYPOINT_CHECKS if cfg.MODEL.KEYPOINT_ON else {}
    return checks


def ignore_keys(
    cfg: CfgNode, given: Iterable[str], defaults: CfgNode, not_honoured: Sequence[str], engine: str
) -> None:
    """Name, in one warning each, the keys that an engine cannot honour and those that the detector does not read.

    Keys that have their default are not named. Those that cannot be honoured get it: ``cfg`` says what happens.

    Args:
        cfg: the configuration, not frozen.
        given: full names of the keys that the user set, as :func:`load_config` returns them.
        defaults: of all keys.
        not_honoured: patterns of keys, as a shell's file names.
        engine: what the warning calls it.
    """
    not_honoured = [*not_honoured, *_of_absent_parts(cfg)]
    changed = [key for key in sorted(given) if _as_lists(get(cfg, key)) != _as_lists(get(defaults, key))]
    ignored = [key for key in changed if _fits_any(key, not_honoured)]
    unread = [key for key in changed if key not in ignored and _fits_any(key, _unread(cfg))]
    if ignored:
        _log.warning("%s cannot honour, and ignores: %s", engine, _listed(cfg, ignored))
    if unread:
        _log.warning("%s does not read: %s", cfg.MODEL.META_ARCHITECTURE, _listed(cfg, unread))
    for key in ignored:
        _assign(cfg, key, get(defaults, key))
    _quiet_defaults(cfg, defaults)


def _quiet_defaults(cfg: CfgNode, defaults: CfgNode) -> None:
    """Nobody asked for a value that is the default: nothing shall warn of it."""
    if cfg.DATALOADER.NUM_WORKERS == defaults.DATALOADER.NUM_WORKERS:  # on fewer processors PyTorch warns
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)


def _unread(cfg: CfgNode) -> list[str]:
    """Patterns of the keys of other networks, detectors and box heads."""
    name = cfg.MODEL.META_ARCHITECTURE
    nodes = [detector.node for other, detector in DETECTORS.items() if other != name]
    network = network_of(cfg)
    networks = [other.node for other in NETWORKS.values() if other != network]
    if network is not None:
        networks += ["MODEL.RESNETS", *(["MODEL.FPN"] if network.has_pyramid else [])]
    fusion = ("MODEL.FPN.FUSE_TYPE",) if has_simple_pyramid(cfg) else ()
    if name not in meta_architectures():  # Detectron2's own, or a user's
        return [f"{node}.*" for node in (*networks, *nodes, DUAL) if node != "MODEL.RETINANET"]
    nodes += networks
    keys: tuple[str, ...] = ()
    if name == TWO_STAGE:
        chosen = cfg.MODEL.ROI_BOX_HEAD.NAME
        nodes += [head.node for other, head in BOX_HEADS.items() if other != chosen]
        keys = CONV_FC_KEYS if chosen in BOX_HEADS else ()
        keys += BOX_LOSS_KEYS if chosen in BOX_HEADS and BOX_HEADS[chosen].detects else ()
        maps = get(cfg, f"{DUAL}.MAPS")
        keys += (f"{DUAL}.EVERY",) if maps != "dyhead_blocks" else ()
        keys += (f"{DUAL}.LOSS_WEIGHT",) if maps == "none" else ()
    else:
        nodes += TWO_STAGE_NODES
        if not DETECTORS[name].options.has_anchors:
            nodes.append("MODEL.ANCHOR_GENERATOR")
    return [*(f"{node}.*" for node in nodes), *keys, *fusion]


def _of_absent_parts(cfg: CfgNode) -> list[str]:
    """Patterns of the keys of what the configured run does not have: masks, keypoints, a cascade, augmentation."""
    if cfg.MODEL.META_ARCHITECTURE not in meta_architectures():
        return []  # nothing is known of it
    two_stage = cfg.MODEL.META_ARCHITECTURE == TWO_STAGE
    parts = (
        (two_stage, ["MODEL.MASK_ON", "MODEL.KEYPOINT_ON"]),
        (two_stage and cfg.MODEL.MASK_ON, ["INPUT.MASK_FORMAT", "MODEL.ROI_MASK_HEAD.*"]),
        (two_stage and cfg.MODEL.KEYPOINT_ON, ["MODEL.ROI_KEYPOINT_HEAD.*", "TEST.KEYPOINT_OKS_SIGMAS"]),
        (two_stage and cfg.MODEL.ROI_HEADS.NAME == CASCADE, ["MODEL.ROI_BOX_CASCADE_HEAD.*"]),
        (cfg.TEST.AUG.ENABLED, list(AUGMENTATION_CHECKS)),
    )
    return [pattern for there, patterns in parts if not there for pattern in patterns]


def _fits_any(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _listed(cfg: CfgNode, keys: Iterable[str]) -> str:
    return ", ".join(f"{key} {shown(get(cfg, key))}" for key in keys)


def expect(cfg: CfgNode, key: str, fits: Any, expected: str) -> None:
    """Raise :class:`ConfigError` unless the value of ``key`` fits; ``expected`` says what would."""
    if not fits:
        raise ConfigError(f"{key}: expected {expected}, got {shown(get(cfg, key))}")


def _check_together(cfg: CfgNode) -> None:
    """Values of Detectron2's keys, each legal by itself, that do not fit each other."""
    solver, images = cfg.SOLVER, cfg.INPUT
    channels = 1 if images.FORMAT == "L" else 3
    for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
        expected = f"{channels} value{'s' * (channels > 1)}, one for each channel of INPUT.FORMAT {images.FORMAT}"
        expect(cfg, key, len(get(cfg, key)) == channels, expected)
    names = cfg.DATASETS.TEST  # a dataset may stand several times in DATASETS.TRAIN: its images then count as often
    expect(cfg, "DATASETS.TEST", len(set(names)) == len(names), "each dataset once")
    if images.MIN_SIZE_TRAIN_SAMPLING == "range":
        sizes = images.MIN_SIZE_TRAIN
        expect(cfg, "INPUT.MIN_SIZE_TRAIN", len(sizes) == 2 and sizes[0] <= sizes[1], "the lowest and the highest size")
    base = solver.BASE_LR
    expect(cfg, "SOLVER.BASE_LR_END", solver.BASE_LR_END <= base, f"at most SOLVER.BASE_LR, {base}")
    if solver.LR_SCHEDULER_NAME == "WarmupStepWithFixedGammaLR":
        most = f"at most SOLVER.MAX_ITER, {solver.MAX_ITER}"
        expect(cfg, "SOLVER.NUM_DECAYS", solver.NUM_DECAYS <= solver.MAX_ITER, most)
    if solver.OPTIMIZER == "SGD" and solver.NESTEROV:
        expect(cfg, "SOLVER.MOMENTUM", solver.MOMENTUM > 0, "above 0 with SOLVER.NESTEROV True")
    precise = cfg.TEST.PRECISE_BN.ENABLED and solver.EMA.ENABLED  # statistics of other weights than the average
    expect(cfg, "TEST.PRECISE_BN.ENABLED", not precise, "False with SOLVER.EMA.ENABLED True")
    if cfg.TEST.AUG.ENABLED:
        _check_augmentation(cfg)
    if has_resnet(cfg):
        _check_deformable(cfg)
    if network_of(cfg) is not None:
        _check_network(cfg, network_of(cfg))
    if cfg.MODEL.META_ARCHITECTURE == TWO_STAGE:
        for node in ("MODEL.RPN", "MODEL.ROI_HEADS"):
            _read(cfg, node, MaxIoUAssigner)
        box = cfg.MODEL.ROI_BOX_HEAD
        if box.NAME == CONV_FC_HEAD and box.NUM_CONV == 0:
            expect(cfg, "MODEL.ROI_BOX_HEAD.NUM_FC", box.NUM_FC > 0, "at least 1 with NUM_CONV 0")
        if cfg.MODEL.ROI_HEADS.NAME == CASCADE:
            single = box.NAME not in BOX_HEADS or not BOX_HEADS[box.NAME].detects
            expect(cfg, "MODEL.ROI_HEADS.NAME", single, f"'StandardROIHeads' with MODEL.ROI_BOX_HEAD.NAME {box.NAME}")
            _check_cascade(cfg)
        if cfg.MODEL.KEYPOINT_ON:
            count, given = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
            fits = given == count or (given == 0 and count == COCO_KEYPOINTS)
            expect(cfg, "TEST.KEYPOINT_OKS_SIGMAS", fits, f"{count} numbers, as many as NUM_KEYPOINTS")


def network_of(cfg: CfgNode) -> RegisteredNetwork | None:
    """The backbone's network, if it is one of :data:`dyhead.backbones.NETWORKS`."""
    return next((network for network in NETWORKS.values() if cfg.MODEL.BACKBONE.NAME in network.builders), None)


def has_simple_pyramid(cfg: CfgNode) -> bool:
    """Whether the backbone's pyramid is ViTDet's, :class:`dyhead.backbones.SimplePyramid`."""
    return network_of(cfg) is not None and "_simple_pyramid_" in cfg.MODEL.BACKBONE.NAME


def has_resnet(cfg: CfgNode) -> bool:
    """Whether the backbone's network is the engine's own ResNet, which builders have in their names."""
    return "resnet" in cfg.MODEL.BACKBONE.NAME and network_of(cfg) is None


def _check_network(cfg: CfgNode, network: RegisteredNetwork) -> None:
    key, name = "MODEL.BACKBONE.FREEZE_AT", cfg.MODEL.BACKBONE.NAME
    whole = f"0 with {name}, whose network is trained whole; {network.node} says what becomes of batch normalization"
    expect(cfg, key, get(cfg, key) == 0, whole)
    try:
        options_of(cfg, network.node).check()
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{network.node}.{error}") from error
    if has_simple_pyramid(cfg):
        one = list(cfg.MODEL.FPN.IN_FEATURES) == ["res4"]
        expect(cfg, "MODEL.FPN.IN_FEATURES", one, f"['res4'], the one map of stride 16 that {name} is made of")
        expect(cfg, "MODEL.FPN.NORM", cfg.MODEL.FPN.NORM == "LN", f"'LN' with {name}, whose levels have LayerNorm")
        source = cfg.MODEL.FPN.P6P7_IN_FEATURE
        expect(cfg, "MODEL.FPN.P6P7_IN_FEATURE", source == "p5", f"'p5' with {name}")


def _check_augmentation(cfg: CfgNode) -> None:
    key, name = "TEST.AUG.ENABLED", cfg.MODEL.META_ARCHITECTURE
    paired = reads_visible_boxes(cfg)  # what comes together is compared by whole boxes
    expect(cfg, key, not paired, f"False with MODEL.META_ARCHITECTURE {name}")
    keypoints = name not in DETECTORS and cfg.MODEL.KEYPOINT_ON
    expect(cfg, key, not keypoints, "False with MODEL.KEYPOINT_ON True")


def _check_deformable(cfg: CfgNode) -> None:
    options, node = cfg.MODEL.RESNETS, "MODEL.RESNETS"
    stages = [stage for stage, deformable in enumerate(options.DEFORM_ON_PER_STAGE) if deformable]
    if stages:
        depths = "50, 101 or 152 with DEFORM_ON_PER_STAGE: smaller networks have no bottlenecks"
        expect(cfg, f"{node}.DEPTH", options.DEPTH >= 50, depths)
        width = options.NUM_GROUPS * options.WIDTH_PER_GROUP * 2 ** stages[0]  # and twice that of stage to stage
        fits = width % options.DEFORM_NUM_GROUPS == 0
        expect(cfg, f"{node}.DEFORM_NUM_GROUPS", fits, f"a divisor of the {width} channels that are convolved")


def _check_cascade(cfg: CfgNode) -> None:
    node = "MODEL.ROI_BOX_CASCADE_HEAD"
    ious, weights = (get(cfg, f"{node}.{key}") for key in ("IOUS", "BBOX_REG_WEIGHTS"))
    first = cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0]
    expect(cfg, f"{node}.IOUS", ious[0] == first, f"MODEL.ROI_HEADS.IOU_THRESHOLDS, {first}, first")
    expect(cfg, f"{node}.BBOX_REG_WEIGHTS", len(weights) == len(ious), f"{len(ious)} lists, as many as IOUS")
    agnostic = "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"
    expect(cfg, agnostic, get(cfg, agnostic), f"True with MODEL.ROI_HEADS.NAME {CASCADE}")


def options_of(cfg: CfgNode, node: str) -> Any:
    """The options dataclass of a node, from the values in ``cfg``.

    Raises:
        ConfigError: a value out of its range, or values that do not fit each other.
    """
    check_options(cfg, node)
    return _read(cfg, node, option_nodes()[node])


def _read(cfg: CfgNode, node: str, options: type) -> Any:
    try:
        return read(options, lambda key: get(cfg, f"{node}.{key}"))
    except ValueError as error:
        raise ConfigError(f"{node}: {error}") from error


def check_options(cfg: CfgNode, node: str) -> None:
    """Raise :class:`ConfigError`, naming the key, if a value of a node's options is out of its range."""
    for leaf in leaves(option_nodes()[node]):
        key = f"{node}.{leaf.key}"
        expected = leaf.expected(get(cfg, key))
        expect(cfg, key, expected is None, expected)


def load_config(cfg: CfgNode, file: str | os.PathLike, opts: Sequence[str] = ()) -> set[str]:
    """Set what a YAML file (with ``_BASE_``) and then ``KEY VALUE`` overrides say in ``cfg``, in place.

    Values are taken as the key's default says: where it is text, ``2026_11_25`` is text. A leading ``~`` of a path
    becomes the home folder.

    Args:
        cfg: a tree that holds every legal key with its default.
        file: YAML file; tags are refused.
        opts: overrides, ``["SOLVER.BASE_LR", "0.01", ...]``.

    Returns:
        The full names of all keys that the file, its bases or the overrides set.

    Raises:
        ConfigError: the file is missing or not YAML, a key stands twice in it or is unknown (all unknown ones are
            named, with the nearest known key), a value has another type than its default, ``VERSION`` is not that of
            ``cfg``, or ``opts`` is not made of pairs.
    """
    settings = read_file(file) + read_overrides(opts)
    defaults = cfg.clone()
    _check_version(cfg, settings)  # before the keys, some of which another version calls otherwise
    unknown = list(_unknown(cfg, settings))
    if unknown:
        raise ConfigError("\n".join(unknown))
    given = set()
    for setting in settings:
        if isinstance(get(cfg, setting.key), CfgNode):
            _check_section(cfg, setting)
        else:
            _set(cfg, setting, get(defaults, setting.key))
            given.add(setting.key)
    _expand_paths(cfg)
    return given


def num_classes(cfg: CfgNode) -> int:
    """Number of classes of the configured meta-architecture.

    Raises:
        ConfigError: ``MODEL.META_ARCHITECTURE`` is none whose key is known.
    """
    node = detector_node(cfg)
    known = f"one of {', '.join(dict.fromkeys([*meta_architectures(), *_NODES]))}"
    expect(cfg, "MODEL.META_ARCHITECTURE", node is not None, known)
    return get(cfg, f"{node}.NUM_CLASSES")


def check_num_classes(cfg: CfgNode, dataset: str, class_names: Sequence[str]) -> None:
    """Raise :class:`ConfigError` unless the model predicts exactly the classes of dataset ``dataset``.

    A meta-architecture that somebody else has registered may have any number.
    """
    node, expected = detector_node(cfg), len(class_names)
    key = f"{node}.NUM_CLASSES"
    if node is not None and get(cfg, key) != expected:
        some = ", ".join(class_names[:8]) + (", ..." if expected > 8 else "")
        raise ConfigError(
            f"{key}: expected {expected}, the number of classes of dataset {dataset!r} ({some}), got {get(cfg, key)}"
        )


def get(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def values(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys and values of a configuration, or of the dicts that it was written as."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def meta_architectures() -> list[str]:
    """All values of ``MODEL.META_ARCHITECTURE`` that are this project's."""
    return [*DETECTORS, TWO_STAGE]


def reads_visible_boxes(cfg: CfgNode) -> bool:
    """Whether the configured detector learns the box of the visible part of an object, too."""
    name = cfg.MODEL.META_ARCHITECTURE
    return name in DETECTORS and DETECTORS[name].options.reads_visible_boxes


def detector_node(cfg: CfgNode) -> str | None:
    """The node that holds NUM_CLASSES and SCORE_THRESH_TEST of the configured meta-architecture, "MODEL.FCOS".

    None for one that somebody else has registered.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    return DETECTORS[name].node if name in DETECTORS else _NODES.get(name)


def _as_lists(value: Any) -> Any:
    return list(map(_as_lists, value)) if isinstance(value, (list, tuple)) else value


def _check_version(cfg: CfgNode, settings: Iterable[Setting]) -> None:
    for setting in settings:
        if setting.key == "VERSION" and "VERSION" in cfg:
            _set(cfg, setting, cfg.VERSION)
            if not CHECKS["VERSION"].fits(cfg.VERSION):
                raise ConfigError(f"{setting.origin}: VERSION: expected {CHECKS['VERSION'].text}, got {cfg.VERSION}")


def _unknown(cfg: CfgNode, settings: Iterable[Setting]) -> Iterator[str]:
    """An error for each setting of no key; one for a whole section."""
    known, sections = {key for key, _ in values(cfg)}, set(_sections(cfg))
    named: tuple[str, ...] = ()
    for setting in settings:
        key, is_section = setting.key, isinstance(setting.written, Section)
        if key in sections or (key in known and not is_section) or key.startswith(named):
            continue
        if is_section:
            named += (f"{key}.",)
        if key in known:
            yield f"{setting.origin}: {key}: expected a value, got a section"
        else:
            yield f"{setting.origin}: unknown key {key}{_nearest(key, sections if is_section else known)}"


def _check_section(cfg: CfgNode, setting: Setting) -> None:
    if not isinstance(setting.written, Section):
        some = ", ".join(list(get(cfg, setting.key))[:3])
        got = "nothing" if setting.written is None else shown(resolve(setting.written, text=True, is_list=False))
        raise ConfigError(f"{setting.origin}: {setting.key}: expected a section of keys ({some}, ...), got {got}")


def _sections(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield f"{prefix}{name}"
            yield from _sections(value, f"{prefix}{name}.")


def _types() -> dict[str, Check]:
    """Which values have a key's type, for each key that is checked."""
    return _types_of(tuple(option_nodes().items()))


@cache
def _types_of(nodes: tuple[tuple[str, type], ...]) -> dict[str, Check]:
    options = {f"{node}.{leaf.key}": leaf.type for node, options in nodes for leaf in leaves(options)}
    two_stage = TWO_STAGE_CHECKS | CASCADE_CHECKS | MASK_CHECKS | KEYPOINT_CHECKS
    return options | CHECKS | AUGMENTATION_CHECKS | RESNET_CHECKS | FPN_CHECKS | two_stage


def _nearest(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key.upper(), known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _set(cfg: CfgNode, setting: Setting, default: Any) -> None:
    key = setting.key
    known = _types().get(key)
    is_text = isinstance(default, str) or (known is not None and known.strings)
    value = resolve(setting.written, text=is_text, is_list=isinstance(default, (list, tuple)))
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    elif isinstance(default, tuple) and isinstance(value, list):
        value = tuple(value)
    elif isinstance(default, list) and isinstance(value, tuple):
        value = list(value)
    may_be_null = default is None or (known is not None and known.fits(None))
    if not (value is None and may_be_null) and default is not None and type(value) is not type(default):
        got = "null" if value is None else f"{type(value).__name__} {shown(value)}"
        raise ConfigError(
            f"{setting.origin}: {key}: expected {type(default).__name__} (its default is {default!r}), got {got}"
        )
    _assign(cfg, key, value)


def _assign(cfg: CfgNode, key: str, value: Any) -> None:
    node, _, name = key.rpartition(".")
    (get(cfg, node) if node else cfg)[name] = value


def _expand_paths(cfg: CfgNode) -> None:
    """``~`` at the start of a path becomes the home folder, once, so that config.yaml says where a run wrote."""
    for node, name in ((cfg, "OUTPUT_DIR"), (cfg.get("MODEL", {}), "WEIGHTS")):
        if name in node:
            node[name] = os.path.expanduser(node[name])
    cfg.DATASETS.REGISTER = [_expanded(entry) for entry in cfg.DATASETS.REGISTER]


def _expanded(entry: Any) -> Any:
    """An entry of ``DATASETS.REGISTER``: a name and two paths. What is no entry is for the check to refuse."""
    if not isinstance(entry, (list, tuple)):
        return entry
    name, paths = entry[:1], entry[1:]
    return type(entry)((*name, *(os.path.expanduser(path) if isinstance(path, str) else path for path in paths)))
