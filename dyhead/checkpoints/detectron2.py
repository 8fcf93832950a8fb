"""Names of Detectron2's own detectors: RetinaNet, FCOS, Faster R-CNN on any backbone; of cvpods' FCOS and BorderDet.

cvpods has Detectron2's names, and some more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from dyhead.checkpoints.pyramid import BACKBONE
from dyhead.checkpoints.source import ANCHORS, COUNTERS, PIXELS, Row, Source

_BORDERDET = {
    "border_cls_subnet.cur_point_conv.0": "class_border.point",
    "border_cls_subnet.ltrb_conv.0": "class_border.sides",
    "border_cls_subnet.border_conv.0": "class_border.out",
    "border_bbox_subnet.cur_point_conv.0": "box_border.point",
    "border_bbox_subnet.ltrb_conv.0": "box_border.sides",
    "border_bbox_subnet.border_conv.0": "box_border.out",
    "border_cls_score": "border_logits",
    "border_bbox_pred": "border_deltas",
}

#: Two-stage detectors have the canonical names, and so has Panoptic FPN.
TWO_STAGE = Row(r"((?:proposal_generator|roi_heads|sem_seg_head)\..+)", r"\1")


def dense_rows(state: Mapping[str, Tensor]) -> list[Row]:
    """The towers and predictors of Detectron2's RetinaNet and FCOS, and of what is built on them.

    A tower is a sequence of convolutions, norms (maybe) and ReLUs; ours are numbered by the convolution.
    """
    return [
        *_tower(state, "cls_subnet", "class_tower"),
        *_tower(state, "bbox_subnet", "box_tower"),
        Row(r"head\.cls_score\.(.+)", r"detector.head.logits.\1"),
        Row(r"head\.bbox_pred\.(.+)", r"detector.head.deltas.\1"),
        Row(r"head\.(?:ctrness|centerness)\.(.+)", r"detector.head.quality.\1"),
        Row(r"head\.scales\.(\d+)\.scale", r"detector.head.delta_scale[\1]"),
        *(Row(rf"head\.{re.escape(theirs)}\.(.+)", rf"detector.head.{ours}.\1") for theirs, ours in _BORDERDET.items()),
    ]


def _tower(state: Mapping[str, Tensor], theirs: str, ours: str) -> list[Row]:
    key = re.compile(rf"head\.{theirs}\.(\d+)\.weight")
    convolutions = sorted(int(m[1]) for name, x in state.items() if (m := key.fullmatch(name)) and x.ndim == 4)

    def name(part: str, number: int) -> Callable[[re.Match], str]:
        return lambda m: f"detector.head.{ours}.{number}.{part}.{m[1]}"

    return [
        Row(rf"head\.{theirs}\.{position + offset}\.(weight|bias|running_mean|running_var)", name(part, number))
        for number, position in enumerate(convolutions)
        for offset, part in ((0, "conv"), (1, "norm"))
    ]


DETECTRON2 = Source(
    "Detectron2",
    r"^backbone\.(bottom_up|fpn_|top_block|net\.|simfp_)|^head\.border_cls_score\.",
    lambda state: [Row(r"backbone\.(.+)", BACKBONE + r"\1"), *dense_rows(state), TWO_STAGE],
    unless=r"^backbone\.(backbone|dyhead|dyhead_tower)\.",
    dropped=(COUNTERS, ANCHORS, PIXELS),
)
