"""The network that Hit-Detector's authors found beside ours: backbone, neck and box head, in float64.

A record ``hit_detector.json`` and ``hit_detector.npz`` holds maps at ``every`` so many channels, ``NAME.mean`` and
``NAME.rms`` over all pixels of them, and what the box head predicts of two regions; ``hit_detector_ops`` what every
operation that was searched makes of a map of 9 x 11 pixels, of which those that were found are compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyhead.backbones import HitDetectorPyramidOptions
from dyhead.detection.roi import HitDetectorHead
from dyhead.layers.inverted_residual import InvertedResidual, SeparableConv
from tools.originals.rows import Row, largest
from tools.originals.values import tensors

_TOLERANCE = 1e-6  # of a map's largest value; the record has float32
_CLASSES = 80

_OPERATION = re.compile(
    r"(?P<space>\w+)\.(?P<op>ir|sd)_k(?P<kernel>\d)(_e(?P<expansion>\d))?(_[rd](?P<dilation>\d))?\.(?P<size>same|down)"
)

# Our names as theirs, in order.
_NAMES = (
    (r"\.norm\.", ".bn."),
    (r"^backbone\.blocks\.", "backbone.layers."),
    (r"\.expand\.", ".conv1."),
    (r"\.depthwise\.", ".conv2."),
    (r"^((?:backbone|head)\b.*)\.project\.", r"\1.conv3."),
    (r"^(neck\b.*)\.spatial\.", r"\1.conv1."),
    (r"^(neck\b.*)\.project\.", r"\1.conv2."),
    (r"^neck\.cells\.", "neck.SearchNeck.cells."),
    (r"^neck\.bottom_up\.(\d)\.", r"neck.pa_convs.\1.conv."),
    (r"^head\.cells\.", "bbox_head.SearchHead.cells."),
    (r"^head\.fc\.", "bbox_head.shared_fcs.0."),
    (r"^(classes|boxes)\.", lambda match: f"bbox_head.fc_{ {'classes': 'cls', 'boxes': 'reg'}[match[1]] }."),
)


def rows(folder: Path) -> Iterator[Row]:
    """The comparisons of ``folder/oracles/backbones/hit_detector*.json``, of what is there."""
    for name, compared in (("hit_detector", compare), ("hit_detector_ops", compare_operations)):
        file = folder / "oracles" / "backbones" / f"{name}.json"
        if file.exists():
            with np.load(file.with_suffix(".npz")) as arrays:
                yield from compared(json.loads(file.read_text()), dict(arrays))


def compare(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """Parameters, and every map that the record has of the backbone, the neck and the box head."""
    network = HitDetectorPyramidOptions(norm="BN", neck_norm="BN").build().double().eval()
    head = HitDetectorHead(256, 7, norm="BN").double().eval()
    predictors = nn.ModuleDict({"classes": nn.Linear(512, _CLASSES + 1), "boxes": nn.Linear(512, 4 * (_CLASSES + 1))})
    modules = {"backbone.": network.backbone, "neck.": network.neck, "head.": head, "": predictors.double()}
    count = sum(parameter.numel() for module in modules.values() for parameter in module.parameters())
    yield Row("hit_detector", "parameters", abs(count - sum(record["parameters"].values())), 0)
    images = _load(modules, record)
    found: dict[str, Tensor] = {}
    for i, block in enumerate(network.backbone.blocks):
        block.register_forward_hook(_keep(found, f"layer{i}"))
    for i, cell in enumerate(network.neck.cells):
        cell.register_forward_hook(_keep(found, f"neck.cell{i}"))
    for i, cell in enumerate(head.cells):
        cell.register_forward_hook(_keep(found, f"rois.head.cell{i}"))
    with torch.no_grad():
        maps = network.backbone(images["input"])
        levels = network.neck(maps)
        features = head(images["rois"])
        found |= {"rois.cls": predictors["classes"](features), "rois.reg": predictors["boxes"](features)}
    found["layer0"] = found["layer0"].relu()
    found |= {f"C{name[-1]}": x for name, x in maps.items()} | {f"N{name[-1]}": x for name, x in levels.items()}
    for stage in dict.fromkeys(re.sub(r"\.(mean|rms)$", "", name) for name in arrays):
        yield Row("hit_detector", stage, _difference(found[stage], stage, record, arrays), _TOLERANCE)


def compare_operations(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """Inverted residual blocks and separable convolutions, each of its own size."""
    for case in arrays:
        match = _OPERATION.fullmatch(case)
        if not match or (match["space"] == "neck" and match["op"] == "sd" and match["size"] == "down"):
            continue  # other operations, means, and a stride that the found neck does not have
        outputs, stride = {"same": (6, 1), "down": (10, 2)}[match["size"]]
        kernel_size, dilation = int(match["kernel"]), int(match["dilation"] or 1)
        if match["op"] == "sd":
            module = SeparableConv(6, outputs, kernel_size, "BN", dilation=dilation)
        else:
            expansion = int(match["expansion"])
            module = InvertedResidual(6, outputs, kernel_size, expansion, "BN", stride=stride, dilation=dilation)
        part = "neck." if match["op"] == "sd" else "backbone."
        theirs = {key: _their_name(part + key).replace(part, f"{case}.", 1) for key in module.state_dict()}
        shapes = {theirs[key]: list(value.shape) for key, value in module.state_dict().items()}
        values = tensors({**record, "keys": {**shapes, f"{case}.input": [1, 6, 9, 11]}})
        module.load_state_dict({key: values[name] for key, name in theirs.items()})
        with torch.no_grad():
            got = module.double().eval()(values[f"{case}.input"].double())
        want = torch.from_numpy(arrays[case])
        yield Row("hit_detector", case, largest(got, want) / want.abs().max().item(), _TOLERANCE)


def _load(modules: Mapping[str, nn.Module], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Give the modules the record's weights; returns the images."""
    theirs = {
        f"{part}{key}": _their_name(part + key) for part, module in modules.items() for key in module.state_dict()
    }
    shapes = {
        theirs[f"{part}{key}"]: list(value.shape)
        for part, module in modules.items()
        for key, value in module.state_dict().items()
    }
    images = {key: record["keys"][key] for key in ("input", "rois")}
    values = {
        key: value.double() if value.is_floating_point() else value
        for key, value in tensors({**record, "keys": shapes | images}).items()
    }
    for part, module in modules.items():
        module.load_state_dict({key: values[theirs[f"{part}{key}"]] for key in module.state_dict()})
    return {key: values[key] for key in images}


def _their_name(name: str) -> str:
    for ours, theirs in _NAMES:
        name = re.sub(ours, theirs, name)
    return name


def _keep(found: dict[str, Tensor], name: str):
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found[name] = output

    return hook


def _difference(x: Tensor, stage: str, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> float:
    """The largest, in units of the map's largest value, of what the record has of it."""
    entry = record["arrays"].get(stage, {})
    axes = tuple(range(2, x.dim()))
    found = {".mean": x.mean(dim=axes), ".rms": x.square().mean(dim=axes).sqrt()} if axes else {}
    # The record does not say of which channels the head's last map is.
    if stage in arrays:
        found[""] = x[:, :: entry.get("every", x.shape[1] // arrays[stage].shape[1])]
    kept = {name: torch.from_numpy(arrays[stage + name]) for name in found if stage + name in arrays}
    return max(largest(found[name], want) for name, want in kept.items()) / x.abs().max().item()
