"""Names of the same ResNet and the same pyramid in different projects, beside the canonical ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from dyhead.checkpoints.source import Row

BACKBONE = "backbone.backbone."
BOTTOM_UP = BACKBONE + "bottom_up."

LAST_STAGE = 5


def torchvision_resnet(prefix: str = "") -> list[Row]:
    """A ResNet with torchvision's names, which mmdetection has, too, under ``prefix``, a regular expression."""
    block = prefix + r"layer(?P<layer>[1-4])\.(?P<block>\d+)\."

    def inside(part: str) -> Callable[[re.Match], str]:
        return lambda m: f"{BOTTOM_UP}res{int(m['layer']) + 1}.{m['block']}.{m.expand(part)}"

    return [
        Row(prefix + r"conv1\.(.+)", BOTTOM_UP + r"stem.conv1.\1"),
        Row(prefix + r"bn1\.(.+)", BOTTOM_UP + r"stem.conv1.norm.\1"),
        # mmdetection's name of what predicts offsets, and this project's.
        Row(block + r"conv2\.(?:conv_)?offset\.(?P<rest>.+)", inside(r"conv2_offset.\g<rest>")),
        Row(block + r"conv(?P<conv>\d)\.(?P<rest>.+)", inside(r"conv\g<conv>.\g<rest>")),
        Row(block + r"bn(?P<conv>\d)\.(?P<rest>.+)", inside(r"conv\g<conv>.norm.\g<rest>")),
        Row(block + r"downsample\.0\.(?P<rest>.+)", inside(r"shortcut.\g<rest>")),
        Row(block + r"downsample\.1\.(?P<rest>.+)", inside(r"shortcut.norm.\g<rest>")),
    ]


def first_stage(keys: Iterable[str], lateral: str) -> int:
    """The stage of the finest level of a pyramid that ends at the last one.

    Args:
        keys: of a model or a checkpoint.
        lateral: a regular expression of the lateral convolutions' keys whose group 1 counts them from 0.
    """
    counts = [int(match[1]) for match in (re.match(lateral, key) for key in keys) if match]
    return LAST_STAGE - max(counts, default=0)
