"""Classification losses of their authors' own code beside ours, on the same logits and targets, in float64.

Records ``ap_loss``, ``dr_loss`` and ``noisy_anchors``: inputs, losses and gradients of several cases; of the last one,
which is a scheme for RetinaNet, also the positive anchors, their labels and their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from dyhead.detection.anchors import Anchors
from dyhead.detection.assigners import TopIoUAssigner
from dyhead.detection.boxes import Deltas
from dyhead.detection.losses import APLoss, DRLoss
from dyhead.detection.noisy_anchors import Cleanliness, reweigh, soft_focal_loss
from tools.originals.heads import read
from tools.originals.rows import Row, largest, relative
from tools.originals.values import tensors

Record = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]

_ROUNDING = 1e-12
_FLOAT32 = 1e-5  # the original of Noisy Anchors has its anchors in float32


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
    name = "noisy_anchors"
    sizes = [[4 * s * 2 ** (octave / 3) for octave in range(3)] for s in record["strides"]]
    anchors = Anchors(sizes, [[0.5, 1.0, 2.0]], record["strides"], 0.0)
    places = anchors([tuple(size) for size in record["sizes"]], dtype=torch.float64, device="cpu")
    outputs = {key: value.double() for key, value in tensors(record).items()}
    levels = range(len(record["strides"]))

    def by_place(kind: str, images: int) -> Tensor:
        rows = [outputs[f"{kind}.{i}"][:images].permute(0, 2, 3, 1).flatten(1) for i in levels]
        return torch.cat(rows, dim=1).unflatten(1, (len(places.anchors), -1)).clone().requires_grad_()

    cleanliness, form = Cleanliness(record["alpha"]), Deltas()
    for case, expected in record["cases"].items():
        pictures = expected["pictures"]
        logits, deltas = by_place("class", len(pictures)), by_place("box", len(pictures))
        labels, weights = torch.zeros_like(logits), torch.ones_like(logits[..., 0])
        positives, truth = [], []
        for i, picture in enumerate(pictures):
            boxes = torch.tensor(picture["boxes"], dtype=torch.float64).view(-1, 4)
            owner = TopIoUAssigner(record["top"])(places, boxes)
            positive = torch.nonzero(owner >= 0)[:, 0]
            positives.append(positive)
            truth.append(boxes[owner[positive]])
            want = torch.from_numpy(arrays[f"{case}.positive.{i}"]).long()
            yield Row(name, f"{case} {i}: positives", largest(positive, want), 0)
            if not len(boxes):
                continue
            # The original takes its means over what the objects chose, some anchors of it more than once.
            chosen = box_iou(boxes, places.anchors).topk(record["top"], dim=1).indices.flatten()
            label = torch.tensor(picture["labels"])[owner[chosen]]
            decoded = form.decode(deltas[i, chosen], places.anchors[chosen])
            iou = box_iou(decoded, boxes).gather(1, owner[chosen, None])[:, 0]
            confidence = logits[i, chosen, label].sigmoid()
            labels[i, chosen, label] = cleanliness.labels(iou, confidence)
            weights[i, chosen] = cleanliness.weights(iou, confidence)
            soft = torch.from_numpy(arrays[f"{case}.soft_label.{i}"])
            yield Row(name, f"{case} {i}: labels", largest(labels[i, positive].amax(dim=1), soft), _FLOAT32)
            weight = torch.from_numpy(arrays[f"{case}.weight.{i}"])
            yield Row(name, f"{case} {i}: weights", relative(weights[i, positive], weight), _FLOAT32)
        of_class = reweigh(soft_focal_loss(logits, labels), weights[..., None]).sum() / expected["normaliser_after"]
        of_boxes = torch.cat(
            [form.loss(deltas[i, own], places.anchors[own], truth[i]) for i, own in enumerate(positives)]
        )
        weight = torch.cat([weights[i, own] for i, own in enumerate(positives)])
        of_box = reweigh(of_boxes, weight).sum() / expected["normaliser_after"]
        (of_class + of_box).backward()
        losses = torch.stack([of_class.detach(), of_box.detach()])
        want = torch.tensor([expected["losses"][key] for key in ("loss_cls", "loss_box_reg")])
        yield Row(name, f"{case}: losses", relative(losses, want), _FLOAT32)
        for kind, gradient in (("class", logits.grad), ("box", deltas.grad)):
            got = torch.cat([gradient[i, own] for i, own in enumerate(positives)])
            stored = [arrays[f"{case}.gradient_{kind}_at_positive.{i}"] for i in range(len(pictures))]
            yield Row(name, f"{case}: {kind} gradients", largest(got, torch.from_numpy(np.concatenate(stored))), 1e-6)


#: The comparison of each record.
LOSSES: dict[str, Callable[[Record, Arrays], Iterator[Row]]] = {
    "ap_loss": _ap_loss,
    "dr_loss": _dr_loss,
    "noisy_anchors": _noisy_anchors,
}
