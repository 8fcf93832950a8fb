"""The detector of voidrank/SaccadeNet beside ours: the same weights, feature and objects, in float64.

A record ``saccadenet.json`` and ``saccadenet.npz`` holds for each variant, a form of the aggregation, the norms of
outputs and gradients, the detections in two images, and losses in three cases: A and B, two images each, of which one
has no objects in B; C, one image without objects. Of each case there are two: with all corners in one heatmap, as the
published code draws them, and with four heatmaps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dyhead.detection import DenseDetector, Predictions, Targets
from dyhead.detection.criteria import CenterCriterion
from dyhead.detection.saccadenet import SaccadeNetOptions
from tools.originals.heads import read
from tools.originals.rows import Row, largest, relative
from tools.originals.values import tensors

Record = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]

_STRIDE, _CLASSES, _HIDDEN, _FOUND = 4, 5, 24, 20
_AGGREGATIONS = {"v1": "corners_as_published", "v1_corner_corrected": "corners", "v2": "nine", "v2_ctreg": "nine"}
_NAMES = {
    "hm.0": "class_conv",
    "hm.2": "logits",
    "reg.0": "center_conv",
    "reg.2": "centers",
    "wh.0": "box_conv",
    "wh.2": "deltas",
    "cor_att.0": "corner_conv",
    "cor_att.2": "corners",
    "agg_att": "aggregation",
    "agg_att.conv_offset_mask": "aggregation.offset",
    "agg_att.conv1x1": "aggregation.predictor",
}
# Where the numbers of each output stand.
_OUTPUTS = {"reg": slice(0, 2), "wh": slice(2, 4), "final_wh": slice(4, 6), "final_reg": slice(6, 8)}
_SCHEMES = {"corner_targets_as_written": True, "corner_targets_four_corners": False}

_FLOAT32 = 1e-6  # of the largest; outputs, and targets from which losses follow, are in float32
_NORMS = 1e-9
_CELLS, _SCORES = 1e-9, 1e-12


def rows(folder: Path) -> Iterator[Row]:
    """The comparisons of all variants of ``folder/oracles/seeds/saccadenet.json``, if it is there."""
    file = folder / "oracles" / "seeds" / "saccadenet.json"
    if file.is_file():
        yield from compare(*read(file))


def compare(record: Record, arrays: Arrays) -> Iterator[Row]:
    """Outputs (where the record has them), gradients, detections, targets and losses of each variant."""
    for variant in record["variants"]:
        yield from _Variant(variant, record, arrays).rows()


class _Variant:
    """A detector with the weights of a variant, and the feature."""

    def __init__(self, variant: str, record: Record, arrays: Arrays) -> None:
        self.variant, self.arrays, self.pictures = variant, arrays, record["pictures"]
        self.name, self.expected = f"saccadenet {variant}", record["variants"][variant]
        self.refined = variant.endswith("_ctreg")
        keys = {"feature": record["feature"], **_parameters(record, variant)}
        values = {key: value.double() for key, value in tensors({**record, "keys": keys}).items()}
        self.feature = values.pop("feature").requires_grad_()
        size = {"upstream": [len(self.feature), 2, *self.feature.shape[-2:]]}
        self.upstream = tensors({**record, "keys": size})["upstream"].double()
        self.detector = self._build(CenterCriterion(), self.feature.shape[1])
        self.renamed = {key: _renamed(key) for key in values}
        self.detector.head.load_state_dict({self.renamed[key]: value for key, value in values.items()})

    def _build(self, criterion: CenterCriterion, channels: int) -> DenseDetector:
        options = SaccadeNetOptions(
            num_classes=_CLASSES,
            head_channels=_HIDDEN,
            aggregation=_AGGREGATIONS[self.variant],
            refine_center=self.refined,
            criterion=criterion,
        )
        return options.build(channels, [_STRIDE], detections_per_image=_FOUND).double()

    def rows(self) -> Iterator[Row]:
        (logits,), (numbers,), _ = self.detector.head([self.feature])
        outputs = {"hm": logits, "cor_att": numbers[:, -4:]}
        outputs |= {key: numbers[:, part] for key, part in _OUTPUTS.items() if key != "final_reg" or self.refined}
        norms = self.expected["output_norms"]
        yield Row(self.name, "norms of outputs", _relative([outputs[key].norm() for key in norms], norms), _NORMS)
        recorded = {key: f"{self.variant if key.startswith('final') else 'raw'}.{key}" for key in outputs}
        recorded = {key: self.arrays[name] for key, name in recorded.items() if name in self.arrays}
        if recorded:
            off = [largest(outputs[key], torch.from_numpy(want)) / np.abs(want).max() for key, want in recorded.items()]
            yield Row(self.name, "outputs", max(off), _FLOAT32)
        (outputs["final_wh"] * self.upstream).sum().backward()
        yield from self._gradients("of sizes", self.expected["gradient_norms_of_final_wh_times_upstream"])
        yield from self._detections()
        for case, schemes in self.expected["cases"].items():
            for scheme, expected in schemes.items():
                yield from self._case(case, scheme, expected)

    def _gradients(self, what: str, expected: Mapping[str, float]) -> Iterator[Row]:
        mine = {theirs: self.detector.head.get_parameter(ours).grad for theirs, ours in self.renamed.items()}
        mine["feature"] = self.feature.grad
        got = [mine[key].norm() for key in expected]
        yield Row(self.name, f"gradients {what}", _relative(got, expected, floor=1e-3), _FLOAT32)
        self.feature.grad = None
        self.detector.zero_grad()

    @torch.no_grad()
    def _detections(self) -> Iterator[Row]:
        wanted = torch.from_numpy(self.arrays[f"{self.variant}.det"])
        sizes = [(10**6, 10**6)] * len(wanted)
        # The original neither cuts boxes, which here they are below 0, nor drops empty ones.
        wanted[..., :4] = wanted[..., :4].clamp(min=0)
        wanted = [each[(each[:, 2:4] > each[:, :2]).all(dim=1)] for each in wanted]
        found = self.detector.eval().detections(self.detector({"p2": self.feature}), sizes)
        self.detector.train()
        parts = {
            "boxes, cells": (_CELLS, lambda each: each.boxes / _STRIDE, lambda want: want[:, :4]),
            "scores": (_SCORES, lambda each: each.scores, lambda want: want[:, 4]),
            "labels": (0, lambda each: each.labels, lambda want: want[:, 5]),
        }
        for part, (tolerance, mine, theirs) in parts.items():
            off = max(largest(mine(each), theirs(want)) for each, want in zip(found, wanted, strict=True))
            yield Row(self.name, f"detections: {part}", off, tolerance)

    def _case(self, case: str, scheme: str, expected: Mapping[str, Any]) -> Iterator[Row]:
        pictures = self.pictures[case]
        targets = [
            Targets(torch.tensor(each["boxes"], dtype=torch.float64).view(-1, 4), torch.tensor(each["labels"]).long())
            for each in pictures
        ]
        # With refined centers the original has no loss of these, and the centers' twice.
        self.detector.criterion = criterion = CenterCriterion(
            center_loss_weight=2.0 if self.refined else 1.0,
            refined_center_loss_weight=0.0,
            corners_in_one_map=_SCHEMES[scheme],
            clip_targets=True,
        )
        predictions = self.detector({"p2": self.feature[: len(pictures)]})
        off = [
            self._targets(case, scheme, i, predictions, criterion.truth(self.detector, predictions, target))
            for i, target in enumerate(targets)
        ]
        yield Row(self.name, f"{case} {scheme}: targets", max(off), _FLOAT32)

        # The original adds 0.0001 to twice the objects.
        objects = 2 * sum(len(target.boxes) for target in targets)
        share = objects / (objects + 1e-4) if objects else 1.0
        losses = self.detector.losses(predictions, targets)
        factors = {key: 1.0 if key in ("loss_heatmap", "loss_corner") else share for key in losses}
        total = sum(factors[key] * loss for key, loss in losses.items())
        total.backward()
        mine = {
            "hm_loss": losses["loss_heatmap"],
            "cor_att_loss": losses["loss_corner"] / criterion.corner_loss_weight,
            "off_loss": share * losses["loss_center"] / criterion.center_loss_weight,
            "wh_loss": share * losses["loss_size"] / criterion.size_loss_weight,
            "final_wh_loss": share * losses["loss_refined_size"] / criterion.refined_size_loss_weight,
            "total": total,
        }
        got = _relative(mine.values(), {key: expected[key] for key in mine})
        yield Row(self.name, f"{case} {scheme}: losses", got, _FLOAT32)
        norms = {"feature": expected["feature_gradient_norm"]}
        if not isinstance(expected["gradient_norms"], str):  # not kept
            norms |= expected["gradient_norms"]
        yield from self._gradients(f"of losses, {case} {scheme}", norms)

    def _targets(self, case: str, scheme: str, image: int, predictions: Predictions, truth: Any) -> float:
        ((height, width),) = predictions.shapes
        classes = torch.from_numpy(self.arrays[f"{case}.hm"][image])
        kind = scheme.removeprefix("corner_targets_")
        at, value = (torch.from_numpy(self.arrays[f"{case}.cor_att_{kind}{part}"]) for part in ("_at", ""))
        corners = torch.zeros(4, height, width)
        own = at[:, 0] == image
        corners[tuple(at[own, 1:].long().T)] = value[own]
        count = int(self.arrays[f"{case}.reg_mask"][image].sum())
        places = torch.from_numpy(self.arrays[f"{case}.ind"][image][:count]).long()
        return max(
            largest(truth.classes.T.unflatten(1, (height, width)), classes),
            largest(truth.corners.T.unflatten(1, (height, width)), corners),
            largest(truth.places, places),
        )


def _parameters(record: Record, variant: str) -> dict[str, list[int]]:
    """Names and shapes of a variant's weights; it may say that they are those of another."""
    keys = record["variants"][variant]["parameters"]
    if not isinstance(keys, str):
        return keys
    other, outputs = re.fullmatch(r"as (\w+)(?:, but agg_att\.conv1x1 has (\d) outputs)?", keys).groups()
    keys = dict(_parameters(record, other))
    if outputs is not None:
        keys |= {f"agg_att.conv1x1.{n}": [int(outputs), *keys[f"agg_att.conv1x1.{n}"][1:]] for n in ("weight", "bias")}
    return keys


def _renamed(key: str) -> str:
    module, _, name = key.rpartition(".")
    return f"{_NAMES[module]}.{name}"


def _relative(got: Any, want: Mapping[str, float], floor: float = 1e-6) -> float:
    mine = torch.stack([torch.as_tensor(value, dtype=torch.float64).detach() for value in got])
    return relative(mine, torch.tensor(list(want.values()), dtype=torch.float64), floor)
