"""What a configuration stands for and both engines share: networks, necks, dense detectors and box heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from dyhead.backbones import SimplePyramid
from dyhead.config import ConfigError, check_options, expect, get, network_of, options_of
from dyhead.config_options import DUAL
from dyhead.detection import DETECTORS, DenseDetector, Registered
from dyhead.detection.roi import BOX_HEADS, Tap, dually_supervised
from dyhead.layers import P6P7
from dyhead.necks import NECKS, Stack


def build_network(cfg: CfgNode) -> nn.Module:
    """The network of ``MODEL.BACKBONE.NAME``, one of :data:`dyhead.backbones.NETWORKS`, with random weights.

    Raises:
        ConfigError: it cannot be built as configured, or does not have the maps of ``MODEL.FPN.IN_FEATURES``.
    """
    registered = network_of(cfg)
    wanted = None if registered.has_pyramid else cfg.MODEL.FPN.IN_FEATURES
    try:
        network = options_of(cfg, registered.node).build(wanted)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{registered.node}.{error}") from error
    if wanted is not None:
        there = list(network.strides)
        some = f"some of the maps of {registered.node}, {there}"
        expect(cfg, "MODEL.FPN.IN_FEATURES", set(wanted) <= set(there), some)
    return network


def simple_pyramid_arguments(cfg: CfgNode, network: nn.Module) -> dict[str, Any]:
    """The arguments of :class:`dyhead.backbones.SimplePyramid` on a network."""
    channels, out_channels = network.channels[SimplePyramid.in_feature], cfg.MODEL.FPN.OUT_CHANNELS
    arguments: dict[str, Any] = {"in_channels": channels, "out_channels": out_channels}
    if "p6p7" in cfg.MODEL.BACKBONE.NAME:
        relu = options_of(cfg, "MODEL.FPN").p7_relu
        arguments |= {"finest": 3, "top_block": P6P7(out_channels, out_channels, relu=relu)}
    return arguments


def build_necks(cfg: CfgNode, names: Sequence[str], channels: int, strides: Sequence[int]) -> Stack:
    """Necks by name, in their order, for levels of so many channels and these strides, in pixels.

    Raises:
        ConfigError: ``MODEL.NECKS`` is not sound, or options do not fit each other, or what follows.
    """
    check_options(cfg, "MODEL")
    options = {name: options_of(cfg, NECKS[name].node) for name in names}
    follows = [*names[1:], cfg.MODEL.META_ARCHITECTURE] if names else []
    for name, reader in zip(names, follows, strict=True):
        if reader not in DETECTORS:  # these say for themselves, once their heads are built
            _check_reader(options[name], NECKS[name].node, reader, takes_task_levels=False)
    try:
        necks = {name.lower(): option.build(channels, len(strides)) for name, option in options.items()}
    except ValueError as error:
        raise ConfigError(f"MODEL.NECKS {list(names)} cannot be built as configured: {error}") from error
    return Stack(necks, [option.size_divisibility(strides) for option in options.values()])


def _check_reader(options: Any, node: str, reader: str, takes_task_levels: bool) -> None:
    if getattr(options, "task_levels", False) and not takes_task_levels:
        raise ConfigError(
            f"{node}.TASK_CONVS: expected 'none' before {reader}, which reads one pyramid for classes and boxes, got "
            f"{options.task_convs!r}"
        )


def necks_with_dyhead(cfg: CfgNode) -> list[str]:
    """``MODEL.NECKS``, with DyHead in front if it is not among them: for backbones with DyHead in their name."""
    names = list(cfg.MODEL.NECKS)
    return names if "DyHead" in names else ["DyHead", *names]


def build_detector(cfg: CfgNode, detector: Registered, channels: int, strides: Mapping[str, int]) -> DenseDetector:
    """A registered detector with the options of its node.

    Args:
        cfg: the configuration.
        detector: which.
        channels: channels C of the pyramid's levels.
        strides: of the levels by name, in pixels.

    Raises:
        ConfigError: levels that are not there, or options that do not fit.
    """
    node = detector.node
    options = options_of(cfg, node)
    unknown = [name for name in options.in_features if name not in strides]
    if unknown:
        raise ConfigError(
            f"{node}.IN_FEATURES: expected some of the levels {', '.join(strides)}, got {', '.join(unknown)}"
        )
    try:
        built = options.build(
            channels,
            [strides[name] for name in options.in_features],
            anchors=options_of(cfg, "MODEL.ANCHOR_GENERATOR"),
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        )
    except ValueError as error:
        raise ConfigError(f"{node} cannot be built as configured: {error}") from error
    for name in cfg.MODEL.NECKS[-1:]:
        neck = NECKS[name].node
        takes_task_levels = getattr(built.head, "takes_task_levels", False)
        _check_reader(options_of(cfg, neck), neck, cfg.MODEL.META_ARCHITECTURE, takes_task_levels)
    return built


def detects(cfg: CfgNode) -> bool:
    """Whether the box head is one that has losses and detections of its own."""
    name = cfg.MODEL.ROI_BOX_HEAD.NAME
    return name in BOX_HEADS and BOX_HEADS[name].detects


def build_box_head(cfg: CfgNode, name: str, channels: int, strides: Mapping[str, int] | None = None) -> nn.Module:
    """A box head of this project, with the options of its node.

    Args:
        cfg: the configuration.
        name: of :data:`dyhead.detection.roi.BOX_HEADS`.
        channels: channels C of the pooled regions.
        strides: of the levels that regions are pooled from, by name; a head that :func:`detects` needs them.

    Raises:
        ConfigError: options that do not fit.
    """
    node, box, heads = BOX_HEADS[name].node, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_HEADS
    of_engine: dict[str, Any] = {}
    if BOX_HEADS[name].detects:
        expect(cfg, "MODEL.ROI_BOX_HEAD.POOLER_TYPE", box.POOLER_TYPE != "ROIPool", f"a kind of ROIAlign with {name}")
        of_engine = {
            "strides": strides,
            "num_classes": heads.NUM_CLASSES,
            "sampling_ratio": box.POOLER_SAMPLING_RATIO,
            "aligned": box.POOLER_TYPE == "ROIAlignV2",
            "score_thresh": heads.SCORE_THRESH_TEST,
            "nms_thresh": heads.NMS_THRESH_TEST,
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }
    try:
        return options_of(cfg, node).build(channels, box.POOLER_RESOLUTION, **of_engine)
    except ValueError as error:
        raise ConfigError(f"{node} cannot be built as configured: {error}") from error


def build_taps(cfg: CfgNode, laterals: Mapping[str, nn.Module], backbone: nn.Module) -> dict[str, Tap]:
    """The maps that further RoI heads read in training (``MODEL.DSFPN``), by the names of these heads.

    Args:
        cfg: the configuration.
        laterals: the pyramid's lateral convolutions, by the level that each is added to.
        backbone: with the necks.

    Raises:
        ConfigError: the network does not have these maps.
    """
    levels = tuple(get(cfg, "MODEL.ROI_HEADS.IN_FEATURES"))
    try:
        return dually_supervised.build_taps(options_of(cfg, DUAL), levels, laterals, getattr(backbone, "dyhead", None))
    except ValueError as error:
        raise ConfigError(f"{DUAL}.{error}") from error
