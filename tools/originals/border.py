"""BorderDet of its authors' own code beside ours: the same weights, features and objects, in float64.

Its record is made like a head's (:mod:`tools.originals.heads`), but no case has an image without objects: the original
fails there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyhead.checkpoints import convert
from dyhead.detection import DenseDetector, Detections, Predictions, Targets
from dyhead.detection.borderdet import BorderDetOptions
from tools.originals.heads import read
from tools.originals.rows import Row, largest, relative
from tools.originals.values import tensors

Record = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]

_NAME = "borderdet"
_CHANNELS, _CLASS_CHANNELS, _BOX_CHANNELS, _GROUPS = 32, 16, 8, 8
_OUTPUTS = 1e-6  # of the largest; the record has them in float32
_LOSSES, _GRADIENTS = 1e-9, 1e-7
_SCORES, _PIXELS = 1e-12, 1e-9


def rows(folder: Path) -> Iterator[Row]:
    """The comparisons of ``folder/oracles/seeds/borderdet.json``, if it is there."""
    file = folder / "oracles" / "seeds" / f"{_NAME}.json"
    if file.is_file():
        yield from compare(*read(file))


def compare(record: Record, arrays: Arrays) -> Iterator[Row]:
    """Outputs (where the record has them), assignments, losses, gradients and detections."""
    detector, features, renamed = _detector(record)
    levels = detector.in_features
    with torch.no_grad():
        predictions = detector(dict(zip(levels, features, strict=True)))
    if "raw.class.0" in arrays:
        yield Row(_NAME, "outputs", _outputs(detector, features, record["strides"], arrays), _OUTPUTS)
    for case, expected in record["cases"].items():
        targets = [
            Targets(torch.tensor(each["boxes"], dtype=torch.float64), torch.tensor(each["labels"]))
            for each in expected["pictures"]
        ]
        inputs = [x[: len(targets)].clone().requires_grad_() for x in features]
        detector.zero_grad()
        predicted = detector(dict(zip(levels, inputs, strict=True)))
        yield Row(_NAME, f"{case} assignment", _assignment(detector, predicted, targets, case, arrays), 0)
        losses = detector.losses(predicted, targets)
        got = torch.stack([losses[name].detach() for name in expected["losses"]])
        yield Row(_NAME, f"{case} losses", relative(got, _vector(expected["losses"].values())), _LOSSES)
        sum(losses.values()).backward()
        norms = [
            *((_gradient(detector, renamed[key]), want) for key, want in expected["gradient_norms"].items()),
            *zip((x.grad for x in inputs), expected["feature_gradient_norms"], strict=True),
        ]
        got = torch.stack([gradient.norm() for gradient, _ in norms])
        yield Row(_NAME, f"{case} gradients", relative(got, _vector(want for _, want in norms)), _GRADIENTS)
    sizes = [(each["height"], each["width"]) for each in record["cases"]["A"]["pictures"]]
    found, expected = detector.detections(predictions, sizes), _detections(sizes, arrays)
    for kind, tolerance in (("labels", 0), ("scores", _SCORES), ("boxes, pixels", _PIXELS)):
        name = kind.split(",")[0]
        differences = [
            largest(getattr(got, name), getattr(want, name)) for got, want in zip(found, expected, strict=True)
        ]
        yield Row(_NAME, f"detections: {kind}", max(differences), tolerance)


def _detector(record: Record) -> tuple[DenseDetector, list[Tensor], dict[str, str]]:
    """The detector with its weights, the features, and our names of its parameters by theirs."""
    values = {key: value.double() for key, value in tensors(record).items()}
    features = [values.pop(f"feature.{i}") for i in range(len(record["strides"]))]
    options = BorderDetOptions(
        num_classes=record["classes"],
        in_features=tuple(f"p{3 + i}" for i in range(len(features))),
        num_convs=2,
        norm="GN",
        border_class_channels=_CLASS_CHANNELS,
        border_box_channels=_BOX_CHANNELS,
    )
    detector = options.build(_CHANNELS, record["strides"]).double()
    for layer in (*detector.head.class_tower, *detector.head.box_tower):
        layer.norm.num_groups = _GROUPS
    conversion = convert({f"head.{key}": value for key, value in values.items()})
    if conversion.left_over:
        raise ValueError(f"{_NAME}: expected keys that are converted, got {conversion.left_over}")
    detector.load_state_dict({key.removeprefix("detector."): value for key, value in conversion.state.items()})
    renamed = {t.removeprefix("head."): ours.removeprefix("detector.") for t, ours in conversion.renamed.items()}
    return detector, features, renamed


@torch.no_grad()
def _outputs(detector: DenseDetector, features: list[Tensor], strides: list[int], arrays: Arrays) -> float:
    """The largest difference of what the head says, in units of the largest value of its kind on the level."""
    logits, boxes, quality, border_logits = detector.head(features)
    differences = []
    for i, stride in enumerate(strides):
        mine = {
            "class": logits[i],
            "distances": boxes[i][:, :4].relu() * stride,
            "centerness": quality[i],
            "border_class": border_logits[i],
            "border_deltas": boxes[i][:, 4:],
        }
        for kind, got in mine.items():
            want = torch.from_numpy(arrays[f"raw.{kind}.{i}"]).double()
            differences.append(largest(got, want) / want.abs().max().item())
    return max(differences)


def _assignment(
    detector: DenseDetector, predictions: Predictions, targets: list[Targets], case: str, arrays: Arrays
) -> int:
    """How many places, in both stages, have another label than in the original."""
    background = detector.head.num_classes
    stages = {
        "label": detector.assign(detector.places(predictions), targets),
        "border_label": detector.criterion.assign(detector, predictions, targets),
    }
    wrong = 0
    for kind, assigned in stages.items():
        for i, (owner, target) in enumerate(zip(assigned, targets, strict=True)):
            got = torch.where(owner >= 0, target.labels[owner.clamp(min=0)], background)
            wrong += int((got != torch.from_numpy(arrays[f"{case}.{kind}.{i}"])).sum())
    return wrong


def _detections(sizes: list[tuple[int, int]], arrays: Arrays) -> list[Detections]:
    """Those of the original, of which the record has the boxes before they are cut to the images."""
    expected = []
    for i, (height, width) in enumerate(sizes):
        boxes, scores, labels = (torch.from_numpy(arrays[f"det.{i}.{kind}"]) for kind in Detections._fields[:3])
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
        left = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        expected.append(Detections(boxes[left], scores[left], labels[left]))
    return expected


def _gradient(detector: DenseDetector, name: str) -> Tensor:
    """Of a parameter, or of its element ``NAME[i]``."""
    name, _, element = name.removesuffix("]").partition("[")
    gradient = detector.get_parameter(name).grad
    return gradient[int(element)] if element else gradient


def _vector(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
