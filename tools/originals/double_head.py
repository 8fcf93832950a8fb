"""Double-Head of mmdetection 3.3.0 beside ours, under both engines: the same weights, features, objects and proposals.

Its record holds three cases, as that of a dense head does (:mod:`tools.originals.heads`). On torchvision all is
computed in float64; Detectron2 has boxes in float32 alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dyhead.checkpoints import convert
from dyhead.config import add_dyhead_config, load_config
from tools.originals.heads import read
from tools.originals.rows import Row, largest, of_detections, relative
from tools.originals.values import tensors

Record = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]

_NAME = "double_head"
_CONFIG = Path(__file__).parents[2] / "configs" / "doublehead_R50.yaml"
_LEVELS = ("p3", "p4", "p5", "p6")
_STAGES = ["res3", "res4", "res5"]
_BACKGROUND = 7
# The record pools from levels twice as coarse as those of a pyramid that starts at p2.
_CANONICAL_SIZE = 112
_EVERY = 8  # channel of what is pooled is in the record
_OPTIONS = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.OUT_FEATURES": _STAGES,
    "MODEL.FPN.IN_FEATURES": _STAGES,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32]],
    "MODEL.RPN.IN_FEATURES": list(_LEVELS),
    "MODEL.ROI_HEADS.IN_FEATURES": list(_LEVELS),
    "MODEL.ROI_HEADS.NUM_CLASSES": _BACKGROUND,
    "MODEL.DOUBLE_HEAD.FC_DIM": 64,
    "MODEL.DOUBLE_HEAD.NUM_CONV": 2,
    "MODEL.DOUBLE_HEAD.CONV_DIM": 32,
}


class Image(NamedTuple):
    """An image of a case: its size in pixels, objects and proposals; boxes are (M, 4) and (Q, 4) in pixels."""

    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    proposals: Tensor


class Step(NamedTuple):
    """What one training step computes.

    ``regions`` (Q, 5) are the images and boxes of the sampled proposals, ``owners`` (Q,) their objects, -1 for the
    background, ``labels`` (Q,) their classes.
    """

    losses: dict[str, Tensor]
    regions: Tensor
    owners: Tensor
    labels: Tensor


class Torchvision:
    """The RoI heads of the torchvision engine."""

    dtype = torch.float64
    outputs, losses, gradients, statistics, scores, pixels = 1e-6, 1e-6, 1e-6, 1e-6, 1e-12, 1e-9

    def __init__(self) -> None:
        from dyhead.torchvision import build_model, get_cfg

        self.model = build_model(_configured(get_cfg())).double()
        self.pool = self.model.roi_heads.box_roi_pool

    def step(self, features: Mapping[str, Tensor], images: Sequence[Image]) -> Step:
        """A training step's losses, and which regions they are of."""
        from dyhead.torchvision.rcnn.regions import Sample

        heads, sizes = self.model.roi_heads, [image.size for image in images]
        targets = [{"boxes": image.boxes, "labels": image.labels + 1} for image in images]
        sampled = heads.select_training_samples([image.proposals for image in images], targets)
        proposals, matched, labels, _ = sampled
        losses = heads.box_losses(features, Sample(proposals, sizes, matched, labels, targets))
        labels = torch.cat(labels)
        owners = torch.where(labels > 0, torch.cat(matched), -1)
        return Step(losses, _numbered(proposals), owners, (labels - 1) % (_BACKGROUND + 1))

    def predicted(self, predictions: Any) -> tuple[Tensor, Tensor]:
        """Logits, the background last, and deltas of the classes."""
        ((logits, deltas),) = predictions
        return logits.roll(-1, dims=1), deltas[:, 4:]

    def detections(self, features: Mapping[str, Tensor], images: Sequence[Image]) -> list[tuple[Tensor, ...]]:
        """Boxes, scores and labels of each image."""
        proposals, sizes = [image.proposals for image in images], [image.size for image in images]
        found = self.model.roi_heads.detect_boxes(features, proposals, sizes)
        return [(each["boxes"], each["scores"], each["labels"] - 1) for each in found]


class Detectron2:
    """The RoI heads of the Detectron2 engine."""

    dtype = torch.float32
    outputs, losses, gradients, statistics, scores, pixels = 1e-5, 1e-5, 1e-4, 1e-5, 1e-5, 1e-3

    def __init__(self) -> None:
        from detectron2 import config, modeling

        import dyhead.detectron2  # noqa: F401  registers the detector

        self.model = modeling.build_model(_configured(add_dyhead_config(config.get_cfg())))
        self.pool = self.model.roi_heads.box_pooler.pool

    def step(self, features: Mapping[str, Tensor], images: Sequence[Image]) -> Step:
        """A training step's losses, and which regions they are of."""
        from detectron2.structures import Boxes, Instances
        from detectron2.utils.events import EventStorage

        truth = [Instances(image.size, gt_boxes=Boxes(image.boxes), gt_classes=image.labels) for image in images]
        with EventStorage():
            sampled = self.model.roi_heads.label_and_sample_proposals(self._proposals(images), truth)
            losses = self.model.roi_heads._forward_box(features, sampled)
        labels = torch.cat([each.gt_classes for each in sampled])
        owners = []
        for each, image in zip(sampled, images, strict=True):
            owner = torch.full((len(each),), -1)
            for i in torch.where(each.gt_classes < _BACKGROUND)[0].tolist():
                owner[i] = (image.boxes == each.gt_boxes.tensor[i]).all(dim=1).nonzero()[0, 0]
            owners.append(owner)
        return Step(losses, _numbered([each.proposal_boxes.tensor for each in sampled]), torch.cat(owners), labels)

    def predicted(self, predictions: Any) -> tuple[Tensor, Tensor]:
        """Logits, the background last, and deltas of the classes."""
        (pair,) = predictions
        return pair

    def detections(self, features: Mapping[str, Tensor], images: Sequence[Image]) -> list[tuple[Tensor, ...]]:
        """Boxes, scores and labels of each image."""
        found = self.model.roi_heads._forward_box(features, self._proposals(images))
        return [(each.pred_boxes.tensor, each.scores, each.pred_classes) for each in found]

    @staticmethod
    def _proposals(images: Sequence[Image]) -> list:
        from detectron2.structures import Boxes, Instances

        return [
            Instances(
                image.size,
                proposal_boxes=Boxes(image.proposals),
                objectness_logits=torch.zeros(len(image.proposals)),
            )
            for image in images
        ]


ENGINES = {"torchvision": Torchvision, "detectron2": Detectron2}


def rows(folder: Path) -> Iterator[Row]:
    """The comparisons of ``folder/oracles/double_head.json``, if it is there."""
    file = folder / "oracles" / f"{_NAME}.json"
    for engine in ENGINES if file.is_file() else ():
        if engine == "detectron2" and importlib.util.find_spec("detectron2") is None:
            yield Row(_NAME, engine, remark="Detectron2 is not installed")
        else:
            yield from compare(engine, *read(file))


def compare(engine: str, record: Record, arrays: Arrays) -> Iterator[Row]:
    """Assignment, outputs (where the record has them), losses, gradients, running statistics and detections."""
    heads = ENGINES[engine]()
    values = {key: value.to(heads.dtype) for key, value in tensors(record).items()}
    features = [values.pop(f"feature.{i}") for i in range(5)][: len(_LEVELS)]
    conversion = convert({f"roi_head.{key}": value for key, value in values.items()})
    if conversion.left_over:
        raise ValueError(f"{_NAME}: expected keys that are converted, got {conversion.left_over}")
    ours = {theirs.removeprefix("roi_head."): name for theirs, name in conversion.renamed.items()}
    own = dict(heads.model.named_parameters()) | dict(heads.model.named_buffers())
    heads.pool.canonical_size = _CANONICAL_SIZE
    seen: list[Any] = []
    heads.pool.register_forward_hook(lambda module, inputs, output: seen.append(output))
    heads.model.roi_heads.box_predictor.register_forward_hook(lambda module, inputs, output: seen.append(output))

    for case, expected in record["cases"].items():
        images = [_image(each, heads.dtype) for each in expected["pictures"]]
        inputs = [x[: len(images)].clone().requires_grad_() for x in features]
        heads.model.load_state_dict(conversion.state, strict=False)  # also what the last step made of statistics
        heads.model.zero_grad()
        heads.model.train()
        seen.clear()
        step = heads.step(dict(zip(_LEVELS, inputs, strict=True)), images)
        yield Row(_NAME, f"{engine}: {case} assignment", _assignment(step, images, arrays, case), 0)
        if f"{case}.cls" in arrays:
            pooled, predictions = seen
            got = (*heads.predicted(predictions), *(view[:, ::_EVERY] for view in pooled.chunk(2, dim=1)))
            yield Row(_NAME, f"{engine}: {case} outputs", _outputs(step, got, arrays, case), heads.outputs)
        got = torch.stack([step.losses[name].detach() for name in ("loss_cls", "loss_box_reg")])
        yield Row(_NAME, f"{engine}: {case} losses", relative(got, _vector(expected["losses"].values())), heads.losses)
        sum(step.losses.values()).backward()
        norms = [
            *((own[ours[key]].grad, want) for key, want in expected["gradient_norms"].items()),
            *((x.grad, want) for x, want in zip(inputs, expected["feature_gradient_norms"], strict=False)),
        ]
        got = torch.stack([gradient.norm() for gradient, _ in norms])
        want = _vector(want for _, want in norms)
        yield Row(_NAME, f"{engine}: {case} gradients", relative(got, want, 1e-3 * float(want.max())), heads.gradients)
        after = expected["running_statistics_after"]
        got = torch.stack([own[ours[key]].norm() for key in after])
        yield Row(
            _NAME,
            f"{engine}: {case} running statistics",
            relative(got, _vector(value for (value,) in after.values())),
            heads.statistics,
        )

    heads.model.load_state_dict(conversion.state, strict=False)
    heads.model.eval()
    images = [_image(each, heads.dtype) for each in record["cases"]["A"]["pictures"]]
    with torch.no_grad():
        found = heads.detections(dict(zip(_LEVELS, features, strict=True)), images)
    pairs = [
        of_detections(each, [torch.from_numpy(arrays[f"det.{i}.{kind}"]) for kind in ("boxes", "scores", "labels")])
        for i, each in enumerate(found)
    ]
    pixels, scores = (max(column) for column in zip(*pairs, strict=True))
    yield Row(_NAME, f"{engine}: detections, pixels", pixels, heads.pixels)
    yield Row(_NAME, f"{engine}: detections, scores", scores, heads.scores)


def _configured(cfg: Any) -> Any:
    load_config(cfg, _CONFIG, [str(word) for pair in _OPTIONS.items() for word in pair])
    return cfg


def _image(record: Record, dtype: torch.dtype) -> Image:
    boxes, proposals = (torch.tensor(record[key], dtype=dtype).view(-1, 4) for key in ("boxes", "proposals"))
    labels = torch.tensor(record["labels"], dtype=torch.int64)
    return Image((record["height"], record["width"]), boxes, labels, proposals)


def _numbered(boxes: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.cat([x.new_full((len(x), 1), i), x], dim=1) for i, x in enumerate(boxes)])


def _assignment(step: Step, images: Sequence[Image], arrays: Arrays, case: str) -> int:
    """How many regions are not sampled, or have another object or label, than in the original."""
    wanted = []
    for i, image in enumerate(images):
        # Those of the proposals are in the record; objects, which are regions, too, are their own.
        owners = torch.cat([torch.arange(len(image.boxes)), torch.from_numpy(arrays[f"{case}.assigned.gt.{i}"])])
        labels = [int(image.labels[owner]) if owner >= 0 else _BACKGROUND for owner in owners]
        boxes = torch.cat([image.boxes, image.proposals]).tolist()
        wanted += [(i, *box, int(own), label) for box, own, label in zip(boxes, owners, labels, strict=True)]
    got = zip(step.regions.tolist(), step.owners.tolist(), step.labels.tolist(), strict=True)
    rows = sorted((*region, owner, label) for region, owner, label in got)
    if len(rows) != len(wanted):
        return max(len(rows), len(wanted))
    return sum(mine != theirs for mine, theirs in zip(rows, sorted(wanted), strict=True))


def _outputs(step: Step, got: Sequence[Tensor], arrays: Arrays, case: str) -> float:
    """The largest difference of logits, deltas and pooled features, in units of the largest of each."""
    mine, theirs = (
        np.lexsort(torch.round(regions.double().T * 1024).numpy())
        for regions in (step.regions, torch.from_numpy(arrays[f"{case}.rois"]))
    )
    wanted = [
        torch.from_numpy(arrays[f"{case}.{name}"]) for name in ("cls", "reg", "features_for_class", "features_for_box")
    ]
    return max(
        largest(x.detach()[mine], want[theirs]) / want.abs().max().item() for x, want in zip(got, wanted, strict=True)
    )


def _vector(values: Any) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
