"""D2Det of its authors' own code beside ours: the same weights, features, regions and objects, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyhead.detection.roi.d2det import (
    DenseLocalHead,
    DiscriminativePool,
    average_boxes,
    cell_boxes,
    cell_losses,
    cell_targets,
    jitter,
    published_iou_loss,
)
from dyhead.ops import deform_roi_pool
from tools.originals.heads import read
from tools.originals.rows import Row, largest, relative
from tools.originals.values import tensors

Record = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]

_NAME = "d2det"
_STORED = 1e-6  # of the largest number; much of the record is in float32
_CLOSE, _GRADIENTS = 1e-9, 1e-7


def rows(folder: Path) -> Iterator[Row]:
    """The comparisons of ``folder/oracles/seeds/d2det.json``, if it is there."""
    file = folder / "oracles" / "seeds" / f"{_NAME}.json"
    if file.is_file():
        yield from compare(*read(file))


def compare(record: Record, arrays: Arrays) -> Iterator[Row]:
    """The pooling with its gradients, and the regression: outputs, targets, losses, gradients, boxes."""
    yield from _pooling(record, arrays)
    yield from _regression(record, arrays)


def _pooling(record: Record, arrays: Arrays) -> Iterator[Row]:
    facts, values = record["pool"], _values(record, "pool")
    feature, upstream = values.pop("feature").requires_grad_(), values.pop("upstream")
    stride = round(1 / facts["spatial_scale"])
    pool = DiscriminativePool(
        feature.shape[1], {"p": stride}, facts["out_size"], len(values["offset_fc.0.bias"]), aligned=False
    ).double()
    names = {
        "awp.weight.conv.weight": "weight_conv.weight",
        "awp.weight.bn.weight": "weight_norm.weight",
        "awp.weight.bn.bias": "weight_norm.bias",
        **{f"offset_fc.{2 * i}.{kind}": f"offset_layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")},
    }
    rois = torch.from_numpy(arrays["pool.rois"]).double()
    boxes = [rois[rois[:, 0] == i, 1:] for i in range(len(feature))]
    order = torch.cat([torch.where(rois[:, 0] == i)[0] for i in range(len(feature))])
    with torch.no_grad():
        start = pool({"p": feature}, boxes)
    yield Row(
        _NAME, "pooling as it starts", _off(start[order.argsort()], arrays, "pool.output_at_initial_values"), _STORED
    )
    pool.load_state_dict({names[key]: value for key, value in values.items()})
    first = deform_roi_pool(feature.detach(), rois, None, 3, 1 / stride, aligned=False)
    yield Row(_NAME, "first pooling", _off(first, arrays, "pool.first_3x3"), _STORED)
    offsets = pool.offsets(first)
    yield Row(_NAME, "offsets", _off(offsets.detach(), arrays, "pool.offsets"), _STORED)
    out = pool({"p": feature}, boxes)
    yield Row(_NAME, "pooling", _off(out.detach()[order.argsort()], arrays, "pool.output"), _STORED)
    (out * upstream[order]).sum().backward()
    norms = facts["gradient_norms"]
    got = [feature.grad if key == "feature" else pool.get_parameter(names[key]).grad for key in norms]
    yield Row(_NAME, "pooling's gradients", _norms(got, list(norms.values())), _GRADIENTS)


def _regression(record: Record, arrays: Arrays) -> Iterator[Row]:
    values = _values(record, "head")
    feature = values.pop("roi_feature")
    convs = sum(key.endswith("conv.weight") for key in values)
    head = DenseLocalHead(feature.shape[1], len(values["convs.0.gn.bias"]), convs, groups=6).double()
    names = {
        **{f"convs.{i}.conv.weight": f"convs.{i}.weight" for i in range(convs)},
        **{f"convs.{i}.gn.{kind}": f"norms.{i}.{kind}" for i in range(convs) for kind in ("weight", "bias")},
        **{f"D2Det_{a}.{kind}": f"{b}.{kind}" for a, b in (("reg", "sides"), ("mask", "inside"))
           for kind in ("weight", "bias")},
    }  # fmt: skip
    head.load_state_dict({names[key]: value for key, value in values.items()})
    for case, expected in record["cases"].items():
        regions, objects = (torch.tensor(expected[key], dtype=torch.float64) for key in ("positive_boxes", "objects"))
        head.zero_grad()
        distances, logits = head(feature[: len(regions)])
        targets = cell_targets(regions, objects, logits.shape[-1])
        wanted = torch.from_numpy(arrays[f"{case}.mask_target"])[:, 0] > 0.5
        yield Row(_NAME, f"{case} cells inside", float((targets.inside != wanted).sum()), 0)
        if f"{case}.targets" in arrays:
            yield Row(_NAME, f"{case} targets", _off(targets.distances, arrays, f"{case}.targets"), _STORED)
            yield Row(_NAME, f"{case} distances", _off(distances.detach(), arrays, f"{case}.regression"), _STORED)
            yield Row(_NAME, f"{case} logits", _off(logits.detach(), arrays, f"{case}.mask_logit"), _STORED)
        box, inside = cell_losses(regions, objects, distances, logits, as_published=True)
        got, want = torch.stack([2 * box, inside]).detach(), torch.tensor(list(expected["losses"].values()))
        yield Row(_NAME, f"{case} losses", relative(got, want.double()), 1e-6)
        (2 * box + inside).backward()
        norms = expected["gradient_norms"]
        grads = [head.get_parameter(names[key]).grad for key in norms]
        yield Row(_NAME, f"{case} gradients", _norms(grads, list(norms.values())), _GRADIENTS)
        if f"{case}.element_loss" in arrays:
            side = logits.shape[-1]
            truth = objects[:, None, None].expand(-1, side, side, -1).flatten(0, 2)
            loss = published_iou_loss(cell_boxes(regions, distances.detach()).flatten(0, 2), truth)
            yield Row(_NAME, f"{case} loss of each cell", _off(loss, arrays, f"{case}.element_loss"), _STORED)
    found, want = (_tensor(arrays, f"test.boxes_{side}")[:, :4] for side in ("in", "out"))
    distances, logits = _tensor(arrays, "A.regression"), _tensor(arrays, "test.mask_logit")[:, 0]
    boxes = average_boxes(found, distances, logits, as_published=True)
    yield Row(_NAME, "boxes, pixels", largest(boxes, want), 1e-4)
    offsets = _tensor(arrays, "jitter.offsets")
    regions = torch.tensor(record["cases"]["A"]["positive_boxes"], dtype=torch.float64)
    moved = jitter(regions, offsets, tuple(record["jitter"]["picture"]))
    yield Row(_NAME, "jitter", largest(moved, _tensor(arrays, "jitter.out")), _CLOSE)


def _values(record: Record, part: str) -> dict[str, Tensor]:
    return {key: value.double() for key, value in tensors({**record, "keys": record["keys"][part]}).items()}


def _off(got: Tensor, arrays: Arrays, name: str) -> float:
    """The largest difference, in units of the largest number."""
    want = _tensor(arrays, name)
    return largest(got.reshape(want.shape), want) / want.abs().max().item()


def _tensor(arrays: Arrays, name: str) -> Tensor:
    return torch.from_numpy(arrays[name]).double()


def _norms(gradients: list[Tensor | None], wanted: list[float]) -> float:
    got = torch.stack([torch.zeros((), dtype=torch.float64) if g is None else g.norm() for g in gradients])
    return relative(got, torch.tensor(wanted, dtype=torch.float64))
