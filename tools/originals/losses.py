"""Classification losses of their authors' own code beside ours, on the same logits and targets, in float64.

Records ``ap_loss``, ``dr_loss`` and ``noisy_anchors``: inputs, losses and gradients of several cases; of the last one,
which is a scheme for RetinaNet, also the positive anchors, their labels and their weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from dyhead.detection import Predictions, Targets
from dyhead.detection.anchors import AnchorOptions
from dyhead.detection.assigners import TopIoUAssigner
from dyhead.detection.boxes.losses import iou
from dyhead.detection.criteria import NoisyAnchorsCriterion
from dyhead.detection.criteria.noisy_anchors import Cleanliness
from dyhead.detection.losses import APLoss, DRLoss
from dyhead.detection.noisy_anchors import NoisyAnchorsOptions
from tools.originals.heads import read
from tools.originals.rows import Row, largest, relative
from tools.originals.values import tensors

Record = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]

_ROUNDING = 1e-12
_FLOAT32, _GRADIENTS = 1e-5, 1e-7  # the original of Noisy Anchors has its anchors in float32


def rows(folder: Path) -> Iterator[Row]:
    """The comparisons of all losses in ``folder/oracles/seeds``."""
    for name in LOSSES:
        file = folder / "oracles" / "seeds" / f"{name}.json"
        if file.is_file():
            yield from compare(name, *read(file))


def compare(name: str, record: Record, arrays: Arrays) -> Iterator[Row]:
    """Losses and gradients of one record."""
    yield from LOSSES[name](record, arrays)


def _ap_loss(record: Record, arrays: Arrays) -> Iterator[Row]:
    for case, facts in record["cases"].items():
        for variant, expected in facts.items():
            if not isinstance(expected, dict):
                continue
            delta = float(variant.split("_")[1]) if variant.startswith("delta") else record["delta"]
            loss = APLoss(delta, interpolated=not variant.endswith("plain"))
            targets = torch.from_numpy(arrays[f"{case}.targets"])
            gradient = torch.from_numpy(arrays[f"{case}.{variant}.gradient"])
            yield from _same("ap_loss", f"{case} {variant}", loss, arrays, case, targets, expected["loss"], gradient)


def _dr_loss(record: Record, arrays: Arrays) -> Iterator[Row]:
    for case, expected in record["cases"].items():
        numbers = expected["hyperparameters"]
        loss = DRLoss(*(numbers[key] for key in ("lambda_positive", "lambda_negative", "L", "tau", "margin")))
        label = torch.from_numpy(arrays[f"{case}.targets"])  # of an anchor: -1 ignored, 0 background, then classes
        targets = (torch.arange(1, expected["classes"] + 1) == label[:, None]).long()
        targets[label < 0] = -1
        gradient = torch.from_numpy(arrays[f"{case}.gradient"])
        yield from _same("dr_loss", case, loss, arrays, case, targets, expected["loss"], gradient)


def _same(
    name: str,
    stage: str,
    loss: Callable[[Tensor, Tensor], Tensor],
    arrays: Arrays,
    case: str,
    targets: Tensor,
    expected: float,
    gradient: Tensor,
) -> Iterator[Row]:
    logits = torch.from_numpy(arrays[f"{case}.logits"]).clone().requires_grad_()
    costs = targets >= 0
    value = loss(logits[costs], targets[costs].double())
    value.backward()
    yield Row(name, f"{stage}: loss", abs(value.item() - expected), _ROUNDING)
    yield Row(name, f"{stage}: gradient", largest(logits.grad, gradient), _ROUNDING)


def _noisy_anchors(record: Record, arrays: Arrays) -> Iterator[Row]:
    name, strides, top = "noisy_anchors", record["strides"], record["top"]
    sizes = tuple(tuple(4 * s * 2 ** (octave / 3) for octave in range(3)) for s in strides)
    options = NoisyAnchorsOptions(
        num_classes=record["classes"],
        assigner=TopIoUAssigner(top),
        criterion=NoisyAnchorsCriterion(Cleanliness(record["alpha"])),
    )
    detector = options.build(8, strides, anchors=AnchorOptions(sizes, ((0.5, 1.0, 2.0),), 0.0)).double()
    outputs = {key: value.double() for key, value in tensors(record).items()}
    per_cell = detector.anchors.per_cell

    def by_place(kind: str, images: int) -> Tensor:
        levels = [outputs[f"{kind}.{i}"][:images].permute(0, 2, 3, 1).flatten(1) for i in range(len(strides))]
        places = sum(math.prod(size) for size in record["sizes"]) * per_cell
        return torch.cat(levels, dim=1).view(images, places, -1).requires_grad_()

    for case, expected in record["cases"].items():
        pictures = expected["pictures"]
        targets = [
            Targets(torch.tensor(each["boxes"], dtype=torch.float64).view(-1, 4), torch.tensor(each["labels"]).long())
            for each in pictures
        ]
        logits, deltas = by_place("class", len(pictures)), by_place("box", len(pictures))
        predictions = Predictions(logits, deltas, None, [tuple(size) for size in record["sizes"]])
        anchors = detector.places(predictions).anchors
        assigned = detector.assign(detector.places(predictions), targets)
        positives = [torch.nonzero(owner >= 0)[:, 0] for owner in assigned]
        for i, (owner, (boxes, labels, _)) in enumerate(zip(assigned, targets, strict=True)):
            want = torch.from_numpy(arrays[f"{case}.positive.{i}"]).long()
            yield Row(name, f"{case} {i}: positives", largest(positives[i], want), 0)
            if not len(boxes):
                continue
            # The original takes its means over what the objects chose, some anchors of it more than once.
            chosen = box_iou(boxes, anchors).topk(top, dim=1).indices.flatten()
            overlap = iou(detector.box_form.decode(deltas[i, chosen], anchors[chosen]), boxes[owner[chosen]])
            parts = overlap, logits[i, chosen, labels[owner[chosen]]].sigmoid()
            cleanliness = detector.criterion.cleanliness
            for kind, got in (("soft_label", cleanliness.labels(*parts)), ("weight", cleanliness.weights(*parts))):
                by_anchor = torch.zeros(len(anchors), dtype=torch.float64)
                by_anchor[chosen] = got
                want = torch.from_numpy(arrays[f"{case}.{kind}.{i}"])
                yield Row(name, f"{case} {i}: {kind}s", relative(by_anchor[positives[i]], want), _FLOAT32)
        losses = detector.losses(predictions, targets)
        if expected["anchors_chosen_more_than_once"]:
            continue  # the criterion counts each once
        sum(losses.values()).backward()
        # In the original's average a batch without positives counts as 0, in ours as 1.
        average = detector.loss_normalizer.average / expected["normaliser_after"]
        got = torch.stack([loss.detach() for loss in losses.values()]) * average
        want = torch.tensor([expected["losses"][key] for key in losses])
        yield Row(name, f"{case}: losses", relative(got, want), _FLOAT32)
        for kind, gradient in (("class", logits.grad), ("box", deltas.grad)):
            got = torch.cat([gradient[i, own] for i, own in enumerate(positives)])
            stored = [arrays[f"{case}.gradient_{kind}_at_positive.{i}"] for i in range(len(pictures))]
            want = torch.from_numpy(np.concatenate(stored))
            yield Row(name, f"{case}: {kind} gradients", largest(got, want), _GRADIENTS)


#: The comparison of each record.
LOSSES: dict[str, Callable[[Record, Arrays], Iterator[Row]]] = {
    "ap_loss": _ap_loss,
    "dr_loss": _dr_loss,
    "noisy_anchors": _noisy_anchors,
}
