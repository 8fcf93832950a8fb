"""Configuration that both engines share: the keys this project adds to Detectron2's, and how a YAML file is read.

Keys and their meaning are Detectron2's wherever Detectron2 has one. The added keys, their defaults and the checks of
their values are the options of the parts that read them (:mod:`dyhead.options`).
"""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from dyhead.detection import DETECTORS
from dyhead.detection.anchors import AnchorOptions
from dyhead.necks import NECKS, Stack
from dyhead.options import Check, at_least, leaves, one_of, option, read

#: The meta-architecture of two-stage detectors, which are those of the engine.
TWO_STAGE = "DyHeadRCNN"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file or key, what was expected and what came."""


@dataclass(frozen=True)
class _FPNOptions:
    p6p7_in_feature: str = option("p5", "the level that P6 and P7 are computed from", one_of("p5", "res5"))
    p7_relu: bool = option(True, "apply ReLU to P6 before P7 is computed from it; mmdetection does not")


@dataclass(frozen=True)
class _BackboneOptions:
    size_divisibility: int = option(
        0,
        "images are padded to multiples of it, in pixels; 0: of what the backbone and the necks ask for",
        at_least(0),
    )


@dataclass(frozen=True)
class _ModelOptions:
    necks: tuple = option(
        (),
        "what follows the backbone's pyramid, in this order",
        Check(
            f"some of {', '.join(map(repr, NECKS))}, each once",
            lambda v: set(v) <= set(NECKS) and len(set(v)) == len(v),
        ),
    )


@dataclass(frozen=True)
class _DatasetOptions:
    register: tuple = option(
        (),
        "datasets in COCO's format to register: [[name, json file, image folder], ...]; paths from the working folder",
    )


@dataclass(frozen=True)
class _SolverOptions:
    optimizer: str = option("SGD", "SGD has MOMENTUM and NESTEROV", one_of("SGD", "ADAMW"))


@dataclass(frozen=True)
class _BenchmarkOptions:
    num_images: int = option(50, "images of the first test set that are timed", at_least(1))
    batch_size: int = option(1, "images at a time", at_least(1))


#: The options that stand in the configuration, by node; where Detectron2 has a key of the name, it is Detectron2's.
OPTIONS: dict[str, type] = {
    "MODEL": _ModelOptions,
    "MODEL.BACKBONE": _BackboneOptions,
    "MODEL.FPN": _FPNOptions,
    "MODEL.ANCHOR_GENERATOR": AnchorOptions,
    **{neck.node: neck.options for neck in NECKS.values()},
    **{detector.node: detector.options for detector in DETECTORS.values()},
    "DATASETS": _DatasetOptions,
    "SOLVER": _SolverOptions,
    "TEST.BENCHMARK": _BenchmarkOptions,
}


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
    """Check what can be checked before anything is built: the meta-architecture, and every option that it reads.

    Raises:
        ConfigError: names the key, what was expected and what came.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    num_classes(cfg)  # the meta-architecture is one of ours
    unread = {detector.node for other, detector in DETECTORS.items() if other != name}
    for node in OPTIONS:
        if node not in unread:
            options_of(cfg, node)


def options_of(cfg: CfgNode, node: str) -> Any:
    """The options dataclass of a node, from the values in ``cfg``.

    Raises:
        ConfigError: a value out of its range, or values that do not fit each other.
    """
    check_options(cfg, node)
    try:
        return read(OPTIONS[node], lambda key: get(cfg, f"{node}.{key}"))
    except ValueError as error:
        raise ConfigError(f"{node}: {error}") from error


def build_necks(cfg: CfgNode, names: Sequence[str], channels: int, strides: Sequence[int]) -> Stack:
    """Necks by name, in their order, for levels of so many channels and these strides, in pixels.

    Raises:
        ConfigError: ``MODEL.NECKS`` is not sound, or options do not fit.
    """
    check_options(cfg, "MODEL")
    options = {name: options_of(cfg, NECKS[name].node) for name in names}
    try:
        necks = {name.lower(): option.build(channels) for name, option in options.items()}
    except ValueError as error:
        raise ConfigError(f"MODEL.NECKS {list(names)} cannot be built as configured: {error}") from error
    return Stack(necks, [option.size_divisibility(strides) for option in options.values()])


def necks_with_dyhead(cfg: CfgNode) -> list[str]:
    """``MODEL.NECKS``, with DyHead in front if it is not among them: for backbones with DyHead in their name."""
    names = list(cfg.MODEL.NECKS)
    return names if "DyHead" in names else ["DyHead", *names]


def check_options(cfg: CfgNode, node: str) -> None:
    """Raise :class:`ConfigError`, naming the key, if a value of a node's options is out of its range."""
    for leaf in leaves(OPTIONS[node]):
        value = get(cfg, f"{node}.{leaf.key}")
        if leaf.check is None:
            continue
        try:
            fits = leaf.check.fits(value)
        except TypeError:  # not a value that can be compared so
            fits = False
        if not fits:
            raise ConfigError(f"{node}.{leaf.key}: expected {leaf.check.text}, got {value!r}")


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
