"""The names of this project's own models: the canonical ones, those of the torchvision engine's modules, earlier ones.

====================================  ================================================================================
canonical key                         what
====================================  ================================================================================
``backbone.backbone.bottom_up.*``     the network, with Detectron2's names (``stem.conv1``, ``res2.0.conv1.norm``, ...);
                                      one of timm: ``timm.network.*``, with timm's names, and ``timm.norms.res5``;
                                      others of this project likewise below their names; the backbone in
                                      ``hit_detector_pyramid`` is ``hit_detector.*``, as with FPN
``backbone.backbone.fpn_lateral3.*``  the pyramid, with Detectron2's names, too (``fpn_output3``, ``top_block.p6``)
``backbone.backbone.simfp_3.*``       ViTDet's simple pyramid, with Detectron2's names
``backbone.dyhead.blocks.I.*``        the Dynamic Head
``backbone.sepc.*``                   SEPC: ``blocks.I.finer``, ``same``, ``coarser``, ``norm``; ``class_conv``, ...
``backbone.fpt.levels.I.*``           FPT: ``itself``, ``grounding.J``, ``rendering.J``, ``fuse``
``detector.head.*``                   a dense detector: ``class_tower.I.conv``, ``class_tower.I.norm``, ``box_tower``,
                                      ``logits``, ``deltas``, ``quality``, ``delta_scale`` (one number for each level);
                                      RepPoints: ``first_conv``, ``first_points``, ``class_conv``, ``box_conv``;
                                      SaccadeNet: ``class_conv``, ``box_conv``, ``center_conv``, ``centers``,
                                      ``corner_conv``, ``corners``, ``aggregation.*``;
                                      BorderDet: ``border_logits``, ``border_deltas``, ``class_border`` and
                                      ``box_border``, each with ``point``, ``sides`` and ``out``
``detector.regions.*``                PairedBox: ``fcs.I``, ``cls_score`` (background last), ``bbox_pred``
``detector.box_form.log_scale``       RepPoints: the factors of widths and heights, as logarithms
``detector.loss_normalizer.*``         a dense detector's running mean of positives; for training
``detector.criterion.*``              what a dense detector's losses learn, for training: AutoAssign's center prior of
                                      each class, ``mean`` and ``deviation``; RepPoints' ``first_normalizer``, the mean
                                      of positives of its first points; BorderDet's ``border_normalizer``, likewise
``proposal_generator.rpn_head.*``     Faster R-CNN, with Detectron2's names: ``conv``, ``objectness_logits``, ...
``roi_heads.*``                       ``box_head.fc1``, ``box_predictor.cls_score`` (background last), ``bbox_pred``;
                                      ``box_head.attentions.I.theta`` of DyHeadBoxHead; ``box_head.fcs.I``, ``entry``
                                      and ``blocks.I`` of DoubleHead; ``box_predictor.crossed_cls_score`` and
                                      ``crossed_bbox_pred`` of DoubleHeadExt; ``box_head.class_pool``, ``fcs.I``,
                                      ``cls_score`` and ``local`` of D2Det; ``mask_head.mask_fcn1``,
                                      ``deconv``, ``predictor``; ``keypoint_head.conv_fcn1``, ``score_lowres``;
                                      of Cascade R-CNN ``box_head.I.fc1``, ``box_predictor.I.cls_score``;
                                      ``auxiliary.NAME.*``, the same of further heads in training: ``lateral``, ...
====================================  ================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from dyhead.backbones.registry import NETWORKS
from dyhead.checkpoints.pyramid import BACKBONE, BOTTOM_UP, first_stage, torchvision_resnet
from dyhead.checkpoints.source import Row, Source

#: The parts of a detector, by what its canonical keys start with, a part of another before it.
PARTS = (
    BOTTOM_UP,
    BACKBONE,
    "backbone.dyhead.",
    "backbone.sepc.",
    "backbone.fpt.",
    "detector.",
    "proposal_generator.",
    "roi_heads.",
)

_PREDICTORS = "logits|deltas|quality|delta_scale"
# Of Detectron2's own meta-architectures, where no neck wraps the backbone.
_PLAIN_BACKBONE = Row(r"backbone\.((?:bottom_up|fpn_|top_block|net|simfp_).*)", BACKBONE + r"\1")
# Of both engines: the same backbone as under FPN.
_HIT_DETECTOR = Row(
    r"backbone\.(?:body|(?:backbone\.)?bottom_up)\.hit_detector_pyramid\.backbone\.(.+)", BOTTOM_UP + r"hit_detector.\1"
)

# Of Faster R-CNN, and of a stage of Cascade R-CNN.
_BOX_HEAD = r"roi_heads\.(?:box_head|stages\.(\d+)\.head)\.(\d+)\."
_LINEAR = _BOX_HEAD + "(weight|bias)"


def canonical_names(keys: Iterable[str], first: int | None = None) -> dict[str, str]:
    """The canonical key of every key of a model of either engine.

    A checkpoint is saved under the canonical keys and loaded by the same dict the other way round.

    Args:
        keys: all keys of the model's state dict.
        first: the stage that level 0 of torchvision's pyramid is computed from, 3 for "res3". None: the pyramid ends at
            stage 5.

    Returns:
        Own key -> canonical key. Keys that are canonical, and those of modules that are not this project's, are their
        own.
    """
    keys = list(keys)
    rows = [_HIT_DETECTOR, _PLAIN_BACKBONE, *_torchvision_rows(keys, first), *_EARLIER]
    return {key: next((name for row in rows if (name := row.rename(key)) is not None), key) for key in keys}


def _torchvision_rows(keys: Iterable[str], first: int | None = None) -> list[Row]:
    """The modules of the torchvision engine, beside the canonical names; values are the same but for the predictor."""
    keys = list(keys)
    if first is None:
        first = first_stage(keys, r"backbone\.fpn\.inner_blocks\.(\d+)\.")
    convolutions = {match[1] for key in keys if (match := re.match(r"rpn\.head\.conv\.(\d+)\.", key))}
    linear = sorted({int(match[2]) for key in keys if (match := re.fullmatch(_LINEAR, key))})
    pyramid = r"backbone\.fpn\.{}_blocks\.(\d+)\.{}\.(.+)"

    def level(name: str, norm: str = "") -> Callable[[re.Match], str]:
        return lambda m: f"{BACKBONE}fpn_{name}{first + int(m[1])}.{norm}{m[2]}"

    rows = [
        Row(rf"backbone\.body\.((?:{'|'.join(NETWORKS)})\..+)", BOTTOM_UP + r"\1"),
        *torchvision_resnet(r"backbone\.body\."),
        Row(pyramid.format("inner", 0), level("lateral")),
        Row(pyramid.format("inner", 1), level("lateral", "norm.")),
        Row(pyramid.format("layer", 0), level("output")),
        Row(pyramid.format("layer", 1), level("output", "norm.")),
        Row(r"backbone\.fpn\.extra_blocks\.(.+)", BACKBONE + r"top_block.\1"),
        Row(r"backbone\.fpn\.((?:simfp_\d|top_block)\..+)", BACKBONE + r"\1"),
        # Detectron2 numbers the proposal network's convolutions where there are several.
        Row(
            r"rpn\.head\.conv\.(\d+)\.0\.(.+)",
            r"proposal_generator.rpn_head.conv.conv\1.\2"
            if len(convolutions) > 1
            else r"proposal_generator.rpn_head.conv.\2",
        ),
        Row(r"rpn\.head\.cls_logits\.(.+)", r"proposal_generator.rpn_head.objectness_logits.\1"),
        Row(r"rpn\.head\.bbox_pred\.(.+)", r"proposal_generator.rpn_head.anchor_deltas.\1"),
        # torchvision counts convolutions, the flattening, linear layers and ReLUs in one sequence.
        Row(_BOX_HEAD + r"0\.(.+)", lambda m: _box_head(m[1], f"conv{int(m[2]) + 1}.{m[3]}")),
        Row(_BOX_HEAD + r"1\.(.+)", lambda m: _box_head(m[1], f"conv{int(m[2]) + 1}.norm.{m[3]}")),
        Row(_LINEAR, lambda m: _box_head(m[1], f"fc{linear.index(int(m[2])) + 1}.{m[3]}")),
        Row(r"roi_heads\.stages\.(\d+)\.head\.(.+)", lambda m: _box_head(m[1], m[2])),
        Row(r"roi_heads\.stages\.(\d+)\.predictor\.(.+)", r"roi_heads.box_predictor.\1.\2"),
        Row(r"roi_heads\.mask_head\.(\d+)\.0\.(.+)", lambda m: f"roi_heads.mask_head.mask_fcn{int(m[1]) + 1}.{m[2]}"),
        Row(
            r"roi_heads\.mask_head\.(\d+)\.1\.(.+)",
            lambda m: f"roi_heads.mask_head.mask_fcn{int(m[1]) + 1}.norm.{m[2]}",
        ),
        Row(r"roi_heads\.mask_predictor\.conv5_mask\.(.+)", r"roi_heads.mask_head.deconv.\1"),
        Row(r"roi_heads\.mask_predictor\.mask_fcn_logits\.(.+)", r"roi_heads.mask_head.predictor.\1"),
        # Every second one is a ReLU.
        Row(
            r"roi_heads\.keypoint_head\.(\d+)\.(.+)",
            lambda m: f"roi_heads.keypoint_head.conv_fcn{int(m[1]) // 2 + 1}.{m[2]}",
        ),
        Row(r"roi_heads\.keypoint_predictor\.kps_score_lowres\.(.+)", r"roi_heads.keypoint_head.score_lowres.\1"),
    ]

    def auxiliary(match: re.Match) -> str | None:
        """The key of a head beside the detector's own, as that one's."""
        own = next((name for row in rows if (name := row.rename(f"roi_heads.{match[2]}")) is not None), None)
        return own and f"roi_heads.{match[1]}.{own.removeprefix('roi_heads.')}"

    return [*rows, Row(r"roi_heads\.(auxiliary\.\w+)\.(.+)", auxiliary)]


def _box_head(stage: str | None, name: str) -> str:
    return f"roi_heads.box_head.{name}" if stage is None else f"roi_heads.box_head.{stage}.{name}"


# The predictors of dense detectors before both engines had the same detectors.
_EARLIER = [
    Row(rf"head\.predictor\.((?:{_PREDICTORS})(?:\..+)?)", r"detector.head.\1"),
    Row(rf"head\.((?:{_PREDICTORS})(?:\..+)?)", r"detector.head.\1"),
]


def _torchvision(state: Mapping[str, Tensor]) -> list[Row]:
    rows = _torchvision_rows(state)
    scores, boxes = (state.get(f"roi_heads.box_predictor.{name}.weight") for name in ("cls_score", "bbox_pred"))
    if scores is not None and boxes is not None and len(boxes) == 4 * len(scores):
        # torchvision's own predictor: background is class 0 and has boxes, too.
        rows += [
            Row(r"(roi_heads\.box_predictor\.cls_score\..+)", r"\1", lambda x: x.roll(-1, dims=0)),
            Row(r"(roi_heads\.box_predictor\.bbox_pred\..+)", r"\1", lambda x: x[4:].clone()),
        ]
    return [_HIT_DETECTOR, *rows, *_EARLIER]


CANONICAL = Source(
    "dyhead",
    r"^(backbone\.(backbone|dyhead|sepc|fpt)|detector)\.",
    lambda state: [_HIT_DETECTOR],
    unless=rf"^backbone\.(body|fpn|dyhead_tower)\.|^head\.(predictor\.)?({_PREDICTORS})",
    remainder=None,
)
EARLIER_DETECTRON2 = Source(
    "dyhead on Detectron2, earlier names",
    rf"^head\.({_PREDICTORS})\.",
    lambda state: _EARLIER,
    unless=r"^backbone\.(body|fpn)\.",
    remainder=None,
)
TORCHVISION = Source(
    "dyhead on torchvision, the modules' own names",
    r"^backbone\.(body|fpn)\.|^head\.predictor\.",
    _torchvision,
    remainder=None,
)
