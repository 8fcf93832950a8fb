"""Names of the backbone that Hit-Detector's authors trained to classify ImageNet."""

from __future__ import annotations

import re

from dyhead.checkpoints.pyramid import BOTTOM_UP
from dyhead.checkpoints.source import COUNTERS, Row, Source

_CONVOLUTIONS = {"conv1": "expand", "conv2": "depthwise", "conv3": "project"}


def _inside(match: re.Match) -> str:
    norm = "norm" if match["part"] == "bn" else "conv"
    inner = f"{_CONVOLUTIONS[match['conv']]}." if match["conv"] else ""
    return f"{BOTTOM_UP}hit_detector.blocks.{match['layer']}.{inner}{norm}.{match['rest']}"


HIT_DETECTOR = Source(
    "Hit-Detector's backbone",
    r"^(module\.)?(backbone\.)?layers\.\d+\.conv1\.conv\.weight$",
    lambda state: [
        Row(
            r"(?:module\.)?(?:backbone\.)?layers\.(?P<layer>\d+)\.(?:(?P<conv>conv[123])\.)?(?P<part>conv|bn)\.(?P<rest>\w+)",
            _inside,
        )
    ],
    dropped=(COUNTERS,),
)
