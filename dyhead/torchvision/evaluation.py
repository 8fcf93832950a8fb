"""Average precision of a detector on the test sets."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.common.config import CfgNode
from lightning.fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

from dyhead.data import CocoSplit
from dyhead.evaluation import evaluate_coco
from dyhead.torchvision.data import evaluation_loader


@dataclass(frozen=True)
class Evaluated:
    """What came out on one dataset.

    Attributes:
        split: the dataset.
        metrics: those of :func:`dyhead.evaluation.evaluate_coco`.
        detections: COCO's result dicts of all images.
    """

    split: CocoSplit
    metrics: dict[str, float]
    detections: list[dict[str, Any]]


def evaluate(fabric: Fabric, cfg: CfgNode, model: nn.Module, splits: Sequence[CocoSplit]) -> list[Evaluated]:
    """Evaluate a detector, in float32 as Detectron2 does.

    Args:
        fabric: the devices; each takes its share of the images.
        cfg: the configuration.
        model: the detector, on its device.
        splits: the datasets.

    Returns:
        The result on each dataset, in the process of rank 0; nothing in the others.

    Raises:
        DataError: an image is broken.
    """
    was_training = model.training
    model.eval()
    loaders = [evaluation_loader(cfg, s, rank=fabric.global_rank, world_size=fabric.world_size) for s in splits]
    shares: list[list[dict[str, Any]]] = [[] for _ in splits]
    hidden = not (fabric.is_global_zero and sys.stderr.isatty())
    total = sum(map(len, loaders))
    with torch.no_grad(), tqdm(desc="evaluation", total=total, leave=False, disable=hidden, dynamic_ncols=True) as bar:
        for split, loader, share in zip(splits, loaders, shares, strict=True):
            for images, indices in loader:
                found = model(fabric.to_device(images))
                for image, index, detections in zip(images, indices, found, strict=True):
                    share += coco_results(split, index, image.shape[-2:], detections)
                bar.update()
    model.train(was_training)
    gathered = [shares]
    if fabric.world_size > 1:
        gathered = [None] * fabric.world_size
        torch.distributed.all_gather_object(gathered, shares)
    if not fabric.is_global_zero:
        return []
    merged = [[d for share in of_split for d in share] for of_split in zip(*gathered, strict=True)]
    return [Evaluated(s, evaluate_coco(s.info, found), found) for s, found in zip(splits, merged, strict=True)]


def coco_results(
    split: CocoSplit, index: int, size: Sequence[int], detections: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """COCO's result dicts of one image.

    Args:
        split: its dataset.
        index: its place there.
        size: height and width of the image that the model saw, in pixels.
        detections: boxes (M, 4) as x0, y0, x1, y1 in those pixels, scores and labels (M,).
    """
    record = split.records[index]
    scale = torch.tensor([record["width"] / size[1], record["height"] / size[0]] * 2)
    boxes = detections["boxes"].cpu() * scale
    boxes[:, 2:] -= boxes[:, :2]
    columns = zip(boxes.tolist(), detections["labels"].tolist(), detections["scores"].tolist(), strict=True)
    return [
        {"image_id": record["image_id"], "category_id": split.category_ids[label], "bbox": box, "score": score}
        for box, label, score in columns
        if box[2] > 0 and box[3] > 0
    ]
