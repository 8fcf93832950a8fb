"""Names of microsoft/DynamicHead, whose detectors are Detectron2's and an ATSS of its own."""

from __future__ import annotations

from dyhead.checkpoints.block import DYNAMIC_HEAD, block_rows
from dyhead.checkpoints.detectron2 import TWO_STAGE, dense_rows
from dyhead.checkpoints.pyramid import BACKBONE
from dyhead.checkpoints.source import ANCHORS, COUNTERS, PIXELS, Row, Source
from dyhead.checkpoints.swin import POSITIONS, authors_swin

MICROSOFT = Source(
    "microsoft/DynamicHead",
    r"^(backbone\.)?dyhead_tower\.\d+\.DyConv\.",
    lambda state: [
        *block_rows(r"(?:backbone\.)?dyhead_tower\.", DYNAMIC_HEAD),
        *authors_swin(r"backbone\.backbone\.bottom_up\."),
        Row(r"backbone\.backbone\.(.+)", BACKBONE + r"\1"),
        Row(r"head\.cls_logits\.(.+)", r"detector.head.logits.\1"),
        *dense_rows(state),
        TWO_STAGE,
    ],
    dropped=(COUNTERS, ANCHORS, PIXELS, POSITIONS),
)
