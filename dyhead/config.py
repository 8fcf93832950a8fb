"""Configuration that both engines share: the keys this project adds to Detectron2's, and how a YAML file is read.

Keys and their meaning are Detectron2's wherever Detectron2 has one. Defaults of the added keys stand in
:func:`add_dyhead_config` and nowhere else.
"""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from fvcore.common.config import CfgNode

#: For each meta-architecture of this project, the key that holds its number of classes.
NUM_CLASSES_KEYS = {
    "DyHeadFCOS": "MODEL.FCOS.NUM_CLASSES",
    "DyHeadRetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "DyHeadRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file or key, what was expected and what came."""


def add_dyhead_config(cfg: CfgNode) -> CfgNode:
    """Add this project's keys, with their defaults, to ``cfg`` in place and return it.

    ``cfg`` is a tree that already holds Detectron2's keys (``detectron2.config.get_cfg()`` or
    ``dyhead.torchvision.get_cfg()``).
    """
    node = type(cfg)

    dyhead = cfg.MODEL.DYHEAD = node()
    # Blocks stacked on the pyramid; the paper's best trade is 6. 0 leaves the pyramid as it is.
    dyhead.NUM_BLOCKS = 6
    # "paper": Eqs. 3-5 in the pyramid's own geometry. "released" (or "mmdetection"): the block of the weights that
    # microsoft/DynamicHead and mmdetection published; "mmdetection_main": that of mmdetection's main branch after 3.3.
    dyhead.BLOCK = "paper"
    # Levels on each side of a level that Eq. 4 sums over; null is the whole pyramid.
    dyhead.WINDOW = 1
    # The three attentions, each switchable (the paper's ablation).
    dyhead.SCALE_AWARE = True
    dyhead.SPATIAL_AWARE = True
    dyhead.TASK_AWARE = True
    # Offset groups of the spatial attention, and groups of its GroupNorm.
    dyhead.OFFSET_GROUPS = 1
    dyhead.NORM_GROUPS = 16

    fcos = cfg.MODEL.FCOS = node()
    fcos.NUM_CLASSES = 80
    fcos.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Positive locations lie within this many strides of a box's centre.
    fcos.CENTER_SAMPLING_RADIUS = 1.5
    fcos.FOCAL_LOSS_ALPHA = 0.25
    fcos.FOCAL_LOSS_GAMMA = 2.0
    fcos.PRIOR_PROB = 0.01
    fcos.SCORE_THRESH_TEST = 0.05
    fcos.TOPK_CANDIDATES_TEST = 1000
    fcos.NMS_THRESH_TEST = 0.6

    # The level that P6 and P7 are computed from, "p5" or "res5".
    cfg.MODEL.FPN.P6P7_IN_FEATURE = "p5"

    # COCO-format data sets to register: [[name, json file, picture folder], ...]; relative to the working folder.
    cfg.DATASETS.REGISTER = []

    # "SGD" (with SOLVER.MOMENTUM and SOLVER.NESTEROV) or "ADAMW".
    cfg.SOLVER.OPTIMIZER = "SGD"

    # What the benchmark row of the report is measured on: pictures of the first test set, and how many at a time.
    cfg.TEST.BENCHMARK = node()
    cfg.TEST.BENCHMARK.NUM_IMAGES = 50
    cfg.TEST.BENCHMARK.BATCH_SIZE = 1
    return cfg


def load_config(cfg: CfgNode, file: str | os.PathLike, opts: Sequence[str] = ()) -> set[str]:
    """Merge a YAML file (with ``_BASE_``) and then ``KEY VALUE`` overrides into ``cfg``, in place.

    Args:
        cfg: a tree that holds every legal key with its default.
        file: YAML file; tags that run Python are refused.
        opts: overrides, ``["SOLVER.BASE_LR", "0.01", ...]``.

    Returns:
        The full names of all keys that the file, its bases or the overrides set.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown (all are named, with the nearest known key),
            a value has another type than its default, or ``opts`` is not made of pairs.
    """
    settings = list(_leaves(_read_yaml(file), cfg, ""))
    settings = [(key, value, f"config file {file}") for key, value in settings]
    if len(opts) % 2:
        raise ConfigError(f"overrides: expected KEY VALUE pairs, got {len(opts)} words: {' '.join(map(str, opts))}")
    settings += [(key, _parse(value), "overrides") for key, value in zip(opts[::2], opts[1::2], strict=True)]

    known = set(_names(cfg))
    unknown = [(key, origin) for key, _, origin in settings if key not in known]
    if unknown:
        raise ConfigError("\n".join(f"{origin}: unknown key {key}{_nearest(key, known)}" for key, origin in unknown))
    for key, value, origin in settings:
        _set(cfg, key, value, origin)
    return {key for key, _, _ in settings}


def num_classes(cfg: CfgNode) -> int:
    """Number of classes of the configured meta-architecture.

    Raises:
        ConfigError: ``MODEL.META_ARCHITECTURE`` is none of this project's.
    """
    return get(cfg, _num_classes_key(cfg))


def check_num_classes(cfg: CfgNode, dataset: str, class_names: Sequence[str]) -> None:
    """Raise :class:`ConfigError` unless the model predicts exactly the classes of data set ``dataset``."""
    key, expected = _num_classes_key(cfg), len(class_names)
    if get(cfg, key) != expected:
        some = ", ".join(class_names[:8]) + (", ..." if expected > 8 else "")
        raise ConfigError(
            f"{key}: expected {expected}, the number of classes of data set {dataset!r} ({some}), got {get(cfg, key)}"
        )


def get(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _num_classes_key(cfg: CfgNode) -> str:
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in NUM_CLASSES_KEYS:
        raise ConfigError(f"MODEL.META_ARCHITECTURE: expected one of {', '.join(NUM_CLASSES_KEYS)}, got {name!r}")
    return NUM_CLASSES_KEYS[name]


def _read_yaml(file: str | os.PathLike) -> dict:
    try:
        loaded = CfgNode.load_yaml_with_base(os.fspath(file), allow_unsafe=False)
    except FileNotFoundError as error:
        missing = error.filename or file
        base = "" if os.fspath(missing) == os.fspath(file) else f" (a _BASE_ of {file})"
        raise ConfigError(f"config file {missing}{base}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {file}: not YAML that can be read safely: {error}") from error
    except (TypeError, AssertionError, AttributeError) as error:  # fvcore: the document, or a _BASE_, is no mapping
        raise ConfigError(f"config file {file}: expected a mapping of keys to values: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"config file {file}: expected a mapping of keys to values, got {type(loaded).__name__}")
    return loaded


def _leaves(loaded: dict, cfg: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in loaded.items():
        default = cfg.get(name) if isinstance(cfg, dict) else None
        if isinstance(value, dict) and (isinstance(default, dict) or default is None):
            yield from _leaves(value, default, f"{prefix}{name}.")
        else:
            # YAML 1.1 reads 1e-4 as text; the overrides' rule makes a number of it.
            yield f"{prefix}{name}", _parse(value)


def _names(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _parse(value: Any) -> Any:
    """A Python literal if ``value`` is the text of one, else ``value`` itself."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _nearest(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _set(cfg: CfgNode, key: str, value: Any, origin: str) -> None:
    *path, name = key.split(".")
    node = get(cfg, ".".join(path)) if path else cfg
    default = node[name]
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    elif isinstance(default, str) and value is not None and not isinstance(value, (str, dict, list, tuple)):
        value = str(value)  # a run named 7, say: the default tells that text is meant
    elif isinstance(default, tuple) and isinstance(value, list):
        value = tuple(value)
    elif isinstance(default, list) and isinstance(value, tuple):
        value = list(value)
    if default is not None and value is not None and type(value) is not type(default):
        raise ConfigError(
            f"{origin}: {key}: expected {type(default).__name__} (its default is {default!r}), "
            f"got {type(value).__name__} {value!r}"
        )
    node[name] = value
