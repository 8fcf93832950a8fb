"""Average precision of a detector on the test sets."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from fvcore.common.config import CfgNode
from lightning.fabric import Fabric
from torch import nn
from tqdm import tqdm

from dyhead.data import CocoSplit
from dyhead.detection.roi.masks import paste_masks
from dyhead.evaluation import coco_results
from dyhead.evaluation.expected import WITH_TTA, configured_tasks
from dyhead.evaluation.results import Evaluated, check_weights, evaluate_detections
from dyhead.torchvision.augmentation import WithAugmentation
from dyhead.torchvision.data import evaluation_loader

_log = logging.getLogger(__name__)


def evaluate(
    fabric: Fabric, cfg: CfgNode, model: nn.Module, splits: Sequence[CocoSplit], *, output_dir: str | None = None
) -> list[Evaluated]:
    """Evaluate a detector, in float32 as Detectron2 does.

    Args:
        fabric: the devices; each takes its share of the images.
        cfg: the configuration.
        model: the detector, on its device.
        splits: the datasets.
        output_dir: where the detections go; None: ``OUTPUT_DIR``.

    Returns:
        The result on each dataset, in the process of rank 0; nothing in the others.

    Raises:
        ConfigError: the weights are NaN or infinite.
        DataError: an image is broken.
    """
    check_weights(model)
    was_training = model.training
    model.eval()
    loaders = [evaluation_loader(cfg, s, rank=fabric.global_rank, world_size=fabric.world_size) for s in splits]
    results = []
    hidden = not (fabric.is_global_zero and sys.stderr.isatty())
    total = sum(map(len, loaders))
    with torch.no_grad(), tqdm(desc="evaluation", total=total, leave=False, disable=hidden, dynamic_ncols=True) as bar:
        for split, loader in zip(splits, loaders, strict=True):
            share = []
            for images, indices in loader:
                found = model(fabric.to_device(images))
                for image, index, detections in zip(images, indices, found, strict=True):
                    record, (height, width) = split.records[index], image.shape[-2:]
                    scale = torch.tensor([record["width"] / width, record["height"] / height] * 2)
                    boxes, scores, labels = (detections[key].cpu() for key in ("boxes", "scores", "labels"))
                    masks, keypoints = (
                        detections[key].cpu() if key in detections else None for key in ("masks", "keypoints")
                    )
                    boxes = boxes * scale
                    if masks is not None:
                        masks = paste_masks(masks, boxes, record["height"], record["width"])
                    if keypoints is not None:
                        keypoints = keypoints * torch.tensor([*scale[:2], 1])
                    share += coco_results(
                        record["image_id"], split.category_ids, boxes, scores, labels, masks, keypoints
                    )
                bar.update()
            merged = _merged(fabric, share)
            if fabric.is_global_zero:
                tasks, sigmas = configured_tasks(cfg), cfg.TEST.KEYPOINT_OKS_SIGMAS
                folder = cfg.OUTPUT_DIR if output_dir is None else output_dir
                results.append(evaluate_detections(split, merged, folder, tasks=tasks, sigmas=sigmas))
    model.train(was_training)
    return results


def evaluate_augmented(
    fabric: Fabric, cfg: CfgNode, model: nn.Module, splits: Sequence[CocoSplit], results: Sequence[Evaluated]
) -> None:
    """Evaluate once more with ``TEST.AUG``, if it is enabled, as tasks "bbox_TTA", ... of the same datasets.

    Args:
        fabric, cfg, model, splits: of :func:`evaluate`.
        results: what it has returned; it is completed.
    """
    if not cfg.TEST.AUG.ENABLED or not splits:
        return
    _log.info("Evaluating with test-time augmentation")
    folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
    augmented = evaluate(fabric, cfg, WithAugmentation(cfg, model), splits, output_dir=folder)
    for own, more in zip(results, augmented, strict=True):
        tasks = {"bbox": more.metrics} | more.tasks
        own.tasks.update({f"{task}{WITH_TTA}": metrics for task, metrics in tasks.items()})


def _merged(fabric: Fabric, share: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The detections of all processes."""
    if fabric.world_size == 1:
        return share
    shares: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(shares, share)
    return [detection for each in shares for detection in each]
