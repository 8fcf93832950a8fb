"""Heads of mmdetection 3.3.0 beside the detectors of the core: the same weights, features and objects.

A record ``HEAD.json`` and ``HEAD.npz`` holds a head's numbers for three cases: A and B, two images each, of which one
has no objects in B; C, one image without objects. All is computed in float64.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

from dyhead.checkpoints import convert
from dyhead.detection import DenseDetector, Predictions, Targets
from dyhead.detection.anchors import AnchorOptions
from dyhead.detection.assigners import BACKGROUND, CenterAssigner, PointAssigner
from dyhead.detection.atss import ATSSOptions
from dyhead.detection.autoassign import AutoAssignOptions
from dyhead.detection.boxes import Deltas, Distances, Distribution, Points
from dyhead.detection.criteria import AutoAssignCriterion, SoftAssignment, TwoStage
from dyhead.detection.detector import BoxLoss
from dyhead.detection.fcos import FCOSOptions
from dyhead.detection.gfl import GFLOptions
from dyhead.detection.reppoints import RepPointsOptions
from dyhead.detection.retinanet import RetinaNetOptions
from dyhead.detection.scores import Score
from tools.originals.rows import Row, largest, relative
from tools.originals.values import tensors

Record = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]

_LEVELS = ("p3", "p4", "p5", "p6", "p7")
_STRIDES = (8, 16, 32, 64, 128)
_CHANNELS, _GROUPS = 32, 8
_COMMON = {"num_classes": 7, "in_features": _LEVELS, "num_convs": 2, "clip_boxes": "before_nms"}

# mmdetection adds float32's epsilon, 1.2e-7, to what losses are divided by, which is 1 where there are no objects.
_LOSSES = 1e-6
_OUTPUTS = 1e-6  # of the largest; the records have them in float32
_PIXELS, _SCORES = 1e-9, 1e-12


def _atss() -> DenseDetector:
    options = ATSSOptions(
        **_COMMON,
        norm="GN",
        loss_normalizer="positives_per_image",
        box_loss=BoxLoss(2.0, by_centerness=True, smallest_sum=1.0),
        score=Score("product", score_thresh_on="class", topk_by="class"),
    )
    anchors = AnchorOptions(tuple((8 * stride,) for stride in _STRIDES), ((1.0,),), offset=0.0)
    return options.build(_CHANNELS, _STRIDES, anchors=anchors)


def _fcos(nms: float, centerness_on: str, assigner: CenterAssigner, box_form: Distances) -> DenseDetector:
    options = FCOSOptions(
        **_COMMON,
        norm="GN",
        loss_normalizer="positives",
        nms_thresh_test=nms,
        assigner=assigner,
        box_form=box_form,
        box_loss=BoxLoss(by_centerness=True),
        score=Score("product", score_thresh_on="class", topk_by="class"),
        centerness_on=centerness_on,
        scale_per_level=True,
    )
    return options.build(_CHANNELS, _STRIDES)


def _retinanet() -> DenseDetector:
    options = RetinaNetOptions(
        **_COMMON, loss_normalizer="positives_per_image", box_form=Deltas(smooth_l1_loss_beta=0.0)
    )
    sizes = tuple(tuple(4 * stride * 2 ** (octave / 3) for octave in range(3)) for stride in _STRIDES)
    return options.build(_CHANNELS, _STRIDES, anchors=AnchorOptions(sizes, ((0.5, 1.0, 2.0),), offset=0.0))


def _gfl() -> DenseDetector:
    return GFLOptions(**_COMMON, norm="GN").build(_CHANNELS, _STRIDES)


def _reppoints(points_to_box: str, norm: str) -> DenseDetector:
    return RepPointsOptions(**_COMMON, norm=norm, points_to_box=points_to_box).build(_CHANNELS, _STRIDES)


def _autoassign(force_topk: int) -> DenseDetector:
    return AutoAssignOptions(**_COMMON, norm="GN", criterion=SoftAssignment(force_topk=force_topk)).build(
        _CHANNELS, _STRIDES
    )


#: The detector that each head's record is of.
HEADS: dict[str, Callable[[], DenseDetector]] = {
    "atss": _atss,
    "fcos_plain": lambda: _fcos(0.5, "class", CenterAssigner(0.0, closed_ranges=True), Distances("exp", "iou")),
    "fcos_improved": lambda: _fcos(0.6, "box", CenterAssigner(1.5, closed_ranges=True), Distances("relu", "giou")),
    "gfl": _gfl,
    "retinanet": _retinanet,
    **{
        f"reppoints_{kind}{suffix}": partial(_reppoints, kind, norm)
        for kind in ("moment", "minmax")
        for suffix, norm in (("", ""), ("_gn", "GN"))
    },
    "autoassign": lambda: _autoassign(force_topk=0),
    "autoassign_force_topk": lambda: _autoassign(force_topk=9),
}

# Here an object lies whole in many equal anchors, which all have its largest IoU, but for rounding: the original itself
# chooses otherwise in float32. It gives them to this object; Detectron2 and the core give each to the object of the
# anchor's own largest IoU. Losses follow, and are not compared.
_OTHERWISE = {("retinanet", "A")}


def rows(folder: Path) -> Iterator[Row]:
    """The comparisons of all heads in ``folder/oracles``; heads that the core does not have are named."""
    for file in sorted((folder / "oracles").glob("*.json")):
        if file.stem in HEADS:
            yield from compare(file.stem, *read(file))
        elif file.stem != "double_head":  # see tools/originals/double_head.py
            yield Row(file.stem, remark="not in the core")


def read(file: Path) -> tuple[Record, Arrays]:
    """The two parts of a record, from the name of its JSON file."""
    record, arrays = json.loads(file.read_text()), _arrays(file)
    if (other := record.get("raw_outputs_as_in")) is not None:
        outputs = _arrays(file.with_name(f"{other}.npz"))
        arrays |= {key: value for key, value in outputs.items() if key.startswith("raw.")}
    return record, arrays


def _arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file.with_suffix(".npz")) as arrays:
        return dict(arrays)


def compare(name: str, record: Record, arrays: Arrays) -> Iterator[Row]:
    """Outputs (where the record has them), assignments, losses, gradients and detections of one head."""
    head = Head(name, record)
    if "raw.0.0" in arrays:
        yield Row(name, "outputs", head.outputs(arrays), _OUTPUTS)
    for case, expected in record["cases"].items():
        predictions, targets = head.step(case)
        if isinstance(head.detector.criterion, AutoAssignCriterion):
            yield Row(name, f"{case} assignment", head.weights(case, predictions, targets, arrays), _OUTPUTS)
        else:
            yield Row(name, f"{case} assignment", head.assignment(case, predictions, targets, arrays), 0)
        if (name, case) not in _OTHERWISE:
            yield Row(name, f"{case} losses", head.losses(predictions, targets, expected["losses"]), _LOSSES)
            yield Row(name, f"{case} gradients", head.gradients(expected), _LOSSES)
    labels, scores, boxes = head.detections(arrays)
    yield Row(name, "detections: labels", labels, 0)
    yield Row(name, "detections: scores", scores, _SCORES)
    yield Row(name, "detections: boxes, pixels", boxes, _PIXELS)


@dataclass(frozen=True)
class _Recorded(Distribution):
    """Of other distances than 0 to n: mmdetection stores these, and a record makes up all that is stored."""

    recorded: torch.Tensor | None = None

    def distances(self, numbers: torch.Tensor) -> torch.Tensor:
        """See :class:`dyhead.detection.boxes.Distribution`."""
        return self.recorded


class Head:
    """A detector with the weights, features and objects of a record.

    Args:
        name: of the head.
        record: its JSON file.
    """

    def __init__(self, name: str, record: Record) -> None:
        values = {key: value.double() for key, value in tensors(record).items()}
        self.name, self.cases = name, record["cases"]
        self.features = {level: values.pop(f"feature.{i}") for i, level in enumerate(_LEVELS)}
        self.detector = HEADS[name]().double()
        for layer in (*self.detector.head.class_tower, *self.detector.head.box_tower):
            if layer.norm is not None:
                layer.norm.num_groups = _GROUPS
        conversion = convert({f"bbox_head.{key}": value for key, value in values.items()})
        if (project := values.get("integral.project")) is not None:
            self.detector.box_form = _Recorded(len(project) - 1, recorded=project)
        if conversion.left_over:
            raise ValueError(f"{name}: expected keys that are converted, got {conversion.left_over}")
        self.renamed = {
            theirs.removeprefix("bbox_head."): ours.removeprefix("detector.")
            for theirs, ours in conversion.renamed.items()
        }
        self.detector.load_state_dict({k.removeprefix("detector."): v for k, v in conversion.state.items()})
        # Of several anchors of a cell, mmdetection counts sizes within a shape, we count shapes within a size.
        side = round(self.detector.anchors.per_cell**0.5)
        self._anchors = torch.arange(side * side).view(side, side).T.flatten()

    def step(self, case: str) -> tuple[Predictions, list[Targets]]:
        """Predictions for a case's images, and their objects; gradients start anew."""
        images = self.cases[case]["pictures"]
        self.pyramid = {key: value[: len(images)].clone().requires_grad_() for key, value in self.features.items()}
        self.detector.zero_grad()
        targets = [
            Targets(
                torch.tensor(image["boxes"], dtype=torch.float64).view(-1, 4),
                torch.tensor(image["labels"], dtype=torch.int64),
            )
            for image in images
        ]
        return self.detector.train()(self.pyramid), targets

    @torch.no_grad()
    def outputs(self, arrays: Arrays) -> float:
        """The largest difference of what the head says, in units of the largest value of its kind on the level."""
        differences = []
        mine = [part for part in self.detector.head(list(self.features.values())) if part is not None]
        if isinstance(self.detector.box_form, Points):
            mine[1:] = zip(*(level.chunk(2, dim=1) for level in mine[1]), strict=True)  # first and refined points
        for kind, levels in enumerate(mine):
            for i, got in enumerate(levels):
                want = torch.from_numpy(arrays[f"raw.{kind}.{i}"]).double()
                want = want.unflatten(1, (len(self._anchors), -1))[:, self._anchors].flatten(1, 2)
                if kind == 1 and isinstance(self.detector.box_form, Distances):  # there a part of the head
                    got = got.exp() if self.detector.box_form.distances == "exp" else got.relu()
                    if isinstance(self.detector.criterion, AutoAssignCriterion):  # in pixels also while it trains
                        got = got * _STRIDES[i]
                differences.append(largest(got, want) / want.abs().max().item())
        return max(differences)

    def assignment(self, case: str, predictions: Predictions, targets: list[Targets], arrays: Arrays) -> int:
        """How many places have another object than in the original, unless they may: see ``_OTHERWISE``."""
        if isinstance(self.detector.criterion, TwoStage):
            return self._two_assignments(case, predictions, targets, arrays)
        places = self.detector.places(predictions)
        wrong = 0
        for i, (got, target) in enumerate(zip(self.detector.assign(places, targets), targets, strict=True)):
            (name,) = {f"{case}.assigner.gt.{i}", f"{case}.assigned.gt.{i}"} & set(arrays)
            want = torch.from_numpy(arrays[name]).long().view(-1, len(self._anchors))[:, self._anchors].flatten()
            differs = got != want
            if (self.name, case) in _OTHERWISE and len(target.boxes):
                iou = box_iou(places.anchors, target.boxes)
                wanted = (iou > iou.amax(dim=0) - 1e-9).any(dim=1)
                differs &= ~(wanted & ((got == iou.argmax(dim=1)) | (got == BACKGROUND)))
            wrong += int(differs.sum())
        return wrong

    def _two_assignments(self, case: str, predictions: Predictions, targets: list[Targets], arrays: Arrays) -> int:
        """The same of both stages. Of several points equally near to an object mmdetection takes any.

        So that losses can be compared nevertheless, they are then computed with its choice.
        """
        criterion, centers = self.detector.criterion, self.detector.places(predictions).centers
        criterion.first_assigner = PointAssigner()
        stages = criterion.assign(self.detector, predictions, targets)
        first, refined = (
            torch.stack(
                [torch.from_numpy(arrays[f"{case}.{stage}_assigner.gt.{i}"]).long() for i in range(len(targets))]
            )
            for stage in ("init", "refine")
        )
        wrong = int((stages[1] != refined).sum())
        for got, want, target in zip(stages[0], first, targets, strict=True):
            for i, box in enumerate(target.boxes):
                away = ((centers - (box[:2] + box[2:]) / 2) / (box[2:] - box[:2])).norm(dim=1)
                wrong += largest(away[got == i], away[want == i]) > 1e-12
        recorded = iter(first)
        criterion.first_assigner = lambda places, boxes: next(recorded)
        return wrong

    @torch.no_grad()
    def weights(self, case: str, predictions: Predictions, targets: list[Targets], arrays: Arrays) -> float:
        """How far what AutoAssign weighs places by is from the original; infinite where it weighs other places.

        These are the center priors and, where the record has them, costs of boxes and overlaps, in units of the cost's
        factor or of one.
        """
        detector, places = self.detector, self.detector.places(predictions)
        largest_difference = 0.0
        for image, target in enumerate(targets):
            place, owner, prior, overlap = detector.criterion.candidates(detector, predictions, image, places, target)
            numbers, boxes = predictions.boxes[image][place], target.boxes[owner]
            cost = detector.box_form.loss(numbers, places.anchors[place], boxes)
            factor = detector.criterion.options.bbox_reg_loss_weight
            mine = {
                "inside": (torch.ones_like(prior), 1.0),
                "center_prior": (prior, 1.0),
                "iou": (overlap, 1.0),
                "reg_loss": (factor * cost, factor),
            }
            for kind, (values, unit) in mine.items():
                if (want := arrays.get(f"{case}.{kind}_by_location_and_object.{image}")) is None:
                    continue
                want = torch.from_numpy(want).double()
                if kind == "inside" and (len(place) != want.sum() or not want[place, owner].all()):
                    return float("inf")
                largest_difference = max(largest_difference, largest(values, want[place, owner]) / unit)
        return largest_difference

    def losses(self, predictions: Predictions, targets: list[Targets], expected: Mapping[str, float]) -> float:
        """The largest relative difference of a loss; of their sum the gradients are computed."""
        losses = self.detector.losses(predictions, targets)
        sum(losses.values()).backward()
        mine = torch.stack([loss.detach() for loss in map(losses.get, self.detector.loss_names) if loss is not None])
        names = (
            *("loss_cls", "loss_bbox", "loss_centerness", "loss_dfl", "loss_pts_init", "loss_pts_refine"),
            *("loss_pos", "loss_neg", "loss_center"),
        )
        return relative(mine, torch.tensor([expected[name] for name in names if name in expected], dtype=mine.dtype))

    def gradients(self, expected: Mapping[str, Any]) -> float:
        """The largest relative difference of the norm of a parameter's or a level's gradient."""
        norms = []
        for theirs, want in expected["gradient_norms"].items():
            name, element = re.fullmatch(r"(.+?)(?:\[(\d+)\])?", self.renamed[theirs]).groups()
            gradient = self.detector.get_parameter(name).grad
            norms.append((gradient if element is None else gradient[int(element)], want))
        norms += zip((level.grad for level in self.pyramid.values()), expected["feature_gradient_norms"], strict=True)
        mine = torch.stack([gradient.norm() for gradient, _ in norms])
        return relative(mine, torch.tensor([want or 0.0 for _, want in norms], dtype=torch.float64))

    @torch.no_grad()
    def detections(self, arrays: Arrays) -> tuple[float, float, float]:
        """How far labels, scores and boxes of the images of case A are from the original's, in its order."""
        sizes = [(image["height"], image["width"]) for image in self.cases["A"]["pictures"]]
        found = self.detector.eval().detections(self.detector(self.features), sizes)

        def difference(kind: str) -> float:
            return max(
                largest(getattr(each, kind), torch.from_numpy(arrays[f"det.{i}.{kind}"]))
                for i, each in enumerate(found)
            )

        return difference("labels"), difference("scores"), difference("boxes")
