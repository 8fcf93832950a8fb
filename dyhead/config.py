"""Configuration that both engines share: the keys this project adds to Detectron2's, and how a YAML file is read.

Keys and their meaning are Detectron2's wherever Detectron2 has one. The added keys, their defaults and the checks of
their values are the options of the parts that read them (:mod:`dyhead.config_options` lists them); the checks of
Detectron2's own keys stand in :mod:`dyhead.config_checks`. docs/config.md is made from both.
"""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from dyhead.config_checks import CHECKS, FPN_CHECKS, RESNET_CHECKS, TWO_STAGE_CHECKS
from dyhead.config_options import OPTIONS, TWO_STAGE
from dyhead.detection import DETECTORS
from dyhead.detection.assigners import MaxIoUAssigner
from dyhead.options import Check, leaves, read


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file or key, what was expected and what came."""


def add_dyhead_config(cfg: CfgNode) -> CfgNode:
    """Add this project's keys, with their defaults, to ``cfg`` in place and return it.

    ``cfg`` is a tree that already holds Detectron2's keys (``detectron2.config.get_cfg()`` or
    ``dyhead.torchvision.get_cfg()``). docs/config.md lists the keys.
    """
    for name, options in OPTIONS.items():
        node = cfg
        for part in name.split("."):
            if part not in node:
                node[part] = type(cfg)()
            node = node[part]
        for leaf in leaves(options):
            if leaf.key not in node:
                node[leaf.key] = _as_lists(leaf.default)
    return cfg


def check_config(cfg: CfgNode) -> None:
    """Check what can be checked before anything is built: every value that the configured detector's runs read.

    Raises:
        ConfigError: names the key, what was expected and what came.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    num_classes(cfg)  # the meta-architecture is one of ours
    unread = {detector.node for other, detector in DETECTORS.items() if other != name}
    for node in OPTIONS:
        if node not in unread:
            options_of(cfg, node)
    for key, check in detectron2_checks(cfg).items():
        expect(cfg, key, check.fits(get(cfg, key)), check.text)
    _check_together(cfg)


def detectron2_checks(cfg: CfgNode) -> dict[str, Check]:
    """The checks of Detectron2's own keys that the configured detector reads, by key."""
    checks = dict(CHECKS)
    if "resnet" in cfg.MODEL.BACKBONE.NAME:
        checks |= RESNET_CHECKS
    if "fpn" in cfg.MODEL.BACKBONE.NAME:
        checks |= FPN_CHECKS
    if cfg.MODEL.META_ARCHITECTURE == TWO_STAGE:
        checks |= TWO_STAGE_CHECKS
    return checks


def expect(cfg: CfgNode, key: str, fits: Any, expected: str) -> None:
    """Raise :class:`ConfigError` unless the value of ``key`` fits; ``expected`` says what would."""
    if not fits:
        raise ConfigError(f"{key}: expected {expected}, got {get(cfg, key)!r}")


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
    if solver.OPTIMIZER == "SGD" and solver.NESTEROV:
        expect(cfg, "SOLVER.MOMENTUM", solver.MOMENTUM > 0, "above 0 with SOLVER.NESTEROV True")
    if cfg.MODEL.META_ARCHITECTURE == TWO_STAGE:
        for node in ("MODEL.RPN", "MODEL.ROI_HEADS"):
            _read(cfg, node, MaxIoUAssigner)
        box = cfg.MODEL.ROI_BOX_HEAD
        if box.NAME == "FastRCNNConvFCHead" and box.NUM_CONV == 0:
            expect(cfg, "MODEL.ROI_BOX_HEAD.NUM_FC", box.NUM_FC > 0, "at least 1 with NUM_CONV 0")


def options_of(cfg: CfgNode, node: str) -> Any:
    """The options dataclass of a node, from the values in ``cfg``.

    Raises:
        ConfigError: a value out of its range, or values that do not fit each other.
    """
    check_options(cfg, node)
    return _read(cfg, node, OPTIONS[node])


def _read(cfg: CfgNode, node: str, options: type) -> Any:
    try:
        return read(options, lambda key: get(cfg, f"{node}.{key}"))
    except ValueError as error:
        raise ConfigError(f"{node}: {error}") from error


def check_options(cfg: CfgNode, node: str) -> None:
    """Raise :class:`ConfigError`, naming the key, if a value of a node's options is out of its range."""
    for leaf in leaves(OPTIONS[node]):
        key = f"{node}.{leaf.key}"
        expected = leaf.expected(get(cfg, key))
        expect(cfg, key, expected is None, expected)


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
    """Raise :class:`ConfigError` unless the model predicts exactly the classes of dataset ``dataset``."""
    key, expected = _num_classes_key(cfg), len(class_names)
    if get(cfg, key) != expected:
        some = ", ".join(class_names[:8]) + (", ..." if expected > 8 else "")
        raise ConfigError(
            f"{key}: expected {expected}, the number of classes of dataset {dataset!r} ({some}), got {get(cfg, key)}"
        )


def get(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def meta_architectures() -> list[str]:
    """All values of ``MODEL.META_ARCHITECTURE`` that are this project's."""
    return [*DETECTORS, TWO_STAGE]


def _num_classes_key(cfg: CfgNode) -> str:
    name = cfg.MODEL.META_ARCHITECTURE
    if name in DETECTORS:
        return f"{DETECTORS[name].node}.NUM_CLASSES"
    if name == TWO_STAGE:
        return "MODEL.ROI_HEADS.NUM_CLASSES"
    raise ConfigError(f"MODEL.META_ARCHITECTURE: expected one of {', '.join(meta_architectures())}, got {name!r}")


def _as_lists(value: Any) -> Any:
    return list(map(_as_lists, value)) if isinstance(value, tuple) else value


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


def _may_be_null() -> set[str]:
    """Options whose default is not null, but that may be."""
    return {
        f"{node}.{leaf.key}" for node, options in OPTIONS.items() for leaf in leaves(options) if leaf.type.fits(None)
    }


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
    may_be_null = default is None or key in _may_be_null()
    if not (value is None and may_be_null) and default is not None and type(value) is not type(default):
        got = "null" if value is None else f"{type(value).__name__} {value!r}"
        raise ConfigError(f"{origin}: {key}: expected {type(default).__name__} (its default is {default!r}), got {got}")
    node[name] = value
