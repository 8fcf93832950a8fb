"""Names of projects whose Dynamic Head alone can be used here: GLIP and its descendants, YOLO forks, feneck."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from dyhead.checkpoints.block import DYNAMIC_HEAD, FENECK, MMDETECTION, MMDETECTION_GLIP, block_rows
from dyhead.checkpoints.errors import CheckpointError
from dyhead.checkpoints.source import ANCHORS, COUNTERS, Source

_ONLY_THE_TOWER = "of this project only the blocks of the Dynamic Head are converted"


def _block_number(keys: Iterable[str], marked: str) -> Callable[[int], int]:
    """Our number of a block from its place in GLIP's tower.

    In a model that fuses image and text, every block stands behind a fusion and a language layer, at 3 I + 2.

    Args:
        keys: of the checkpoint.
        marked: a regular expression of a key that every block has, whose group 1 is its place.
    """
    places = sorted({int(match[1]) for key in keys if (match := re.match(marked, key))})
    if places == list(range(len(places))):
        return lambda place: place
    if places == [3 * i + 2 for i in range(len(places))]:
        return lambda place: place // 3
    raise CheckpointError(
        f"DyHead blocks in a GLIP: expected them at 0, 1, 2, ... or at 2, 5, 8, ... of the tower, got {places}"
    )


GLIP = Source(
    "GLIP",
    r"^rpn\.head\.dyhead_tower\.\d+\.DyConv\.",
    lambda state: block_rows(
        r"rpn\.head\.dyhead_tower\.",
        DYNAMIC_HEAD,
        _block_number(state, r"rpn\.head\.dyhead_tower\.(\d+)\.DyConv\."),
    ),
    dropped=(COUNTERS, ANCHORS),
    remainder=_ONLY_THE_TOWER,
)
MMDETECTION_GLIP_DETECTOR = Source(
    "mmdetection's GLIP",
    r"^bbox_head\.head\.dyhead_tower\.\d+\.dyconvs\.",
    lambda state: block_rows(
        r"bbox_head\.head\.dyhead_tower\.",
        MMDETECTION_GLIP,
        _block_number(state, r"bbox_head\.head\.dyhead_tower\.(\d+)\.dyconvs\."),
    ),
    dropped=(COUNTERS,),
    remainder=_ONLY_THE_TOWER,
    zero_biases=True,
)
YOLO = Source(
    "a YOLO with mmdetection's block",
    r"^(?:model\.)*\d+\..*spatial_conv_mid\.",
    lambda state: block_rows(r"(?:model\.)*\d+\.(?:.+\.)?(?:dyhead|dyhead_blocks)\.", MMDETECTION),
    dropped=(COUNTERS,),
    remainder=_ONLY_THE_TOWER,
    zero_biases=True,
)
FENECK_HEAD = Source(
    "feneck",
    r"(^|\.)dyhead_tower\.\d+\.conv_list\.",
    lambda state: block_rows(r"(?:.+\.)?dyhead_tower\.", FENECK),
    dropped=(COUNTERS,),
    remainder=_ONLY_THE_TOWER,
    zero_biases=True,
)
