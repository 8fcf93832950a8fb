"""Names of mmdetection's detectors, 2 and 3."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from dyhead.checkpoints.block import MMDETECTION, block_rows
from dyhead.checkpoints.psconv import network_rows
from dyhead.checkpoints.pyramid import BACKBONE, LAST_STAGE, first_stage, torchvision_resnet
from dyhead.checkpoints.source import COUNTERS, Row, Source
from dyhead.checkpoints.spinenet import port_rows
from dyhead.checkpoints.swin import POSITIONS, mmdetection_swin

_NECK = r"neck\.(?:\d+\.)?"
_RPN = "proposal_generator.rpn_head."
_REPPOINTS = {
    "reppoints_cls_conv": "class_conv",
    "reppoints_cls_out": "logits",
    "reppoints_pts_init_conv": "first_conv",
    "reppoints_pts_init_out": "first_points",
    "reppoints_pts_refine_conv": "box_conv",
    "reppoints_pts_refine_out": "deltas",
}


def _rows(state: Mapping[str, Tensor]) -> list[Row]:
    first = first_stage(state, _NECK + r"lateral_convs\.(\d+)\.")

    def output(match: re.Match) -> str | None:
        # Levels that are computed from others follow those with a stage of their own; here they have no norm.
        level = first + int(match[1])
        if level > LAST_STAGE:
            return f"{BACKBONE}top_block.p{level}.{match[3]}" if match[2] == "conv" else None
        return f"{BACKBONE}fpn_output{level}.{'' if match[2] == 'conv' else 'norm.'}{match[3]}"

    return [
        *port_rows(r"backbone\."),
        *(network_rows(state, "backbone.") or torchvision_resnet(r"backbone\.")),
        *mmdetection_swin(r"backbone\."),
        Row(_NECK + r"lateral_convs\.(\d+)\.conv\.(.+)", lambda m: f"{BACKBONE}fpn_lateral{first + int(m[1])}.{m[2]}"),
        Row(
            _NECK + r"lateral_convs\.(\d+)\.(?:bn|gn)\.(.+)",
            lambda m: f"{BACKBONE}fpn_lateral{first + int(m[1])}.norm.{m[2]}",
        ),
        Row(_NECK + r"fpn_convs\.(\d+)\.(conv|bn|gn)\.(.+)", output),
        *block_rows(rf"(?:{_NECK})?dyhead_blocks\.", MMDETECTION),
        *_sepc(),
        *_dense(state),
        Row(r"rpn_head\.rpn_conv\.(weight|bias)", _RPN + r"conv.\1"),
        Row(r"rpn_head\.rpn_cls\.(.+)", _RPN + r"objectness_logits.\1"),
        Row(r"rpn_head\.rpn_reg\.(.+)", _RPN + r"anchor_deltas.\1"),
        Row(r"roi_head\.bbox_head\.shared_fcs\.(\d+)\.(.+)", lambda m: f"roi_heads.box_head.fc{int(m[1]) + 1}.{m[2]}"),
        *_double_head(),
        Row(r"roi_head\.bbox_head\.fc_cls\.(.+)", r"roi_heads.box_predictor.cls_score.\1"),
        Row(r"roi_head\.bbox_head\.fc_reg\.(.+)", r"roi_heads.box_predictor.bbox_pred.\1"),
    ]


def _double_head() -> list[Row]:
    theirs, ours = r"roi_head\.bbox_head\.", "roi_heads.box_head."
    return [
        Row(theirs + r"fc_branch\.(\d+)\.(.+)", ours + r"fcs.\1.\2"),
        Row(theirs + r"res_block\.(conv[12])\.conv\.(.+)", ours + r"entry.\1.conv.\2"),
        Row(theirs + r"res_block\.(conv[12])\.(?:bn|gn)\.(.+)", ours + r"entry.\1.norm.\2"),
        Row(theirs + r"res_block\.conv_identity\.conv\.(.+)", ours + r"entry.shortcut.conv.\1"),
        Row(theirs + r"res_block\.conv_identity\.(?:bn|gn)\.(.+)", ours + r"entry.shortcut.norm.\1"),
        Row(theirs + r"conv_branch\.(\d+)\.conv(\d)\.(.+)", ours + r"blocks.\1.conv\2.conv.\3"),
        Row(theirs + r"conv_branch\.(\d+)\.(?:bn|gn)(\d)\.(.+)", ours + r"blocks.\1.conv\2.norm.\3"),
    ]


def _sepc() -> list[Row]:
    """SEPC of jshilong/SEPC, whose three convolutions of a block are on the coarser, the same and the finer level."""

    def inside_conv(match: re.Match) -> str:
        kind = ("coarser", "same", "finer")[int(match[2])]
        return f"backbone.sepc.blocks.{match[1]}.{kind}.{'offset.' if match[3] else ''}{match[4]}"

    block = _NECK + r"Pconvs\.(\d+)\."
    tasks = {"c": "class", "l": "box"}
    return [
        Row(block + r"Pconv\.([012])\.(conv_offset\.)?(weight|bias)", inside_conv),
        Row(block + r"bn\.(.+)", r"backbone.sepc.blocks.\1.norm.\2"),
        Row(
            _NECK + r"([cl])conv\.(conv_offset\.)?(weight|bias)",
            lambda m: f"backbone.sepc.{tasks[m[1]]}_conv.{'offset.' if m[2] else ''}{m[3]}",
        ),
        Row(_NECK + r"([cl])bn\.(.+)", lambda m: f"backbone.sepc.{tasks[m[1]]}_norm.{m[2]}"),
    ]


def _dense(state: Mapping[str, Tensor]) -> list[Row]:
    rows = [
        Row(rf"bbox_head\.{theirs}_convs\.(\d+)\.{part}\.(.+)", rf"detector.head.{ours}_tower.\1.{name}.\2")
        for theirs, ours in (("cls", "class"), ("reg", "box"))
        for part, name in (("conv", "conv"), ("(?:gn|bn)", "norm"))
    ]
    rows += [
        Row(r"bbox_head\.(?:atss_cls|gfl_cls|conv_cls)\.(.+)", r"detector.head.logits.\1"),
        Row(r"bbox_head\.(?:atss_reg|gfl_reg|conv_reg)\.(.+)", r"detector.head.deltas.\1"),
        Row(r"bbox_head\.(?:atss_centerness|conv_centerness)\.(.+)", r"detector.head.quality.\1"),
        Row(r"bbox_head\.scales\.(\d+)\.scale", r"detector.head.delta_scale[\1]"),
        *(Row(rf"bbox_head\.{theirs}\.(.+)", rf"detector.head.{ours}.\1") for theirs, ours in _REPPOINTS.items()),
        Row(r"bbox_head\.moment_transfer", "detector.box_form.log_scale"),
        Row(r"bbox_head\.center_prior\.mean", "detector.criterion.mean"),
        Row(r"bbox_head\.center_prior\.sigma", "detector.criterion.deviation"),
    ]
    boxes = state.get("bbox_head.retina_reg.bias")
    anchors = None if boxes is None else len(boxes) // 4
    # Two or three anchors differ in size or in shape, not in both, and have one order.
    if anchors in (1, 2, 3, 9):
        order = _sizes_first if anchors == 9 else None
        rows += [
            Row(r"bbox_head\.retina_cls\.(.+)", r"detector.head.logits.\1", order),
            Row(r"bbox_head\.retina_reg\.(.+)", r"detector.head.deltas.\1", order),
        ]
    return rows


def _sizes_first(x: Tensor) -> Tensor:
    """Predictions (9 * X, ...) for three shapes of three sizes each as those for three sizes of three shapes each.

    mmdetection counts sizes within a shape, Detectron2 shapes within a size.
    """
    return x.unflatten(0, (3, 3, -1)).transpose(0, 1).flatten(0, 2)


MMDETECTION_DETECTOR = Source(
    "mmdetection",
    r"^(neck|bbox_head|roi_head)\.|^dyhead_blocks\.\d+\.",
    _rows,
    unless=r"\.dyhead_tower\.",
    dropped=(COUNTERS, POSITIONS, (r"bbox_head\.integral\.project", "the whole numbers from 0 to MODEL.GFL.REG_MAX")),
    left_over=((r"bbox_head\.retina_(cls|reg)\..+", "the order of so many anchors at a place is not known"),),
    zero_biases=True,
)
