"""Average precision of a detector on the test sets."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from fvcore.common.config import CfgNode
from lightning.fabric import Fabric
from torch import Tensor, nn

from dyhead.data import CocoSplit
from dyhead.detection.roi.masks import paste_masks
from dyhead.evaluation import coco_results
from dyhead.evaluation.expected import WITH_TTA, configured_tasks
from dyhead.evaluation.results import Evaluated, check_weights, evaluate_detections
from dyhead.progress import bar
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
    total = sum(map(len, loaders))
    with torch.no_grad(), bar("evaluation", total, hidden=not fabric.is_global_zero) as progress:
        for split, loader in zip(splits, loaders, strict=True):
            share = []
            for images, indices in loader:
                found = model(fabric.to_device(images))
                for image, index, detections in zip(images, indices, found, strict=True):
                    record = split.records[index]
                    of_file = on_image(detections, image.shape[-2:], (record["height"], record["width"]))
                    parts = (of_file[key] for key in ("boxes", "scores", "labels"))
                    share += coco_results(
                        record["image_id"],
                        split.category_ids,
                        *parts,
                        masks=of_file.get("masks"),
                        keypoints=of_file.get("keypoints"),
                    )
                progress.update()
            merged = _merged(fabric, share)
            if fabric.is_global_zero:
                tasks, sigmas = configured_tasks(cfg), cfg.TEST.KEYPOINT_OKS_SIGMAS
                folder = cfg.OUTPUT_DIR if output_dir is None else output_dir
                results.append(evaluate_detections(split, merged, folder, tasks=tasks, sigmas=sigmas))
    model.train(was_training)
    return results


def on_image(detections: dict[str, Tensor], seen: Sequence[int], size: Sequence[int]) -> dict[str, Tensor]:
    """Detections in the pixels of an image as it is in its file, on the CPU.

    Args:
        detections: of :func:`dyhead.torchvision.build_model`, with masks of the cells of their boxes.
        seen: height and width of the image that the detector saw.
        size: height and width of the file's.

    Returns:
        The same with masks (D, H, W) of the whole image.
    """
    (height, width), (old_height, old_width) = size, seen
    scale = torch.tensor([width / old_width, height / old_height] * 2)
    found = {key: value.cpu() for key, value in detections.items()}
    for key in ("boxes", "visible_boxes"):
        if key in found:
            found[key] = found[key] * scale
    if "masks" in found:
        found["masks"] = paste_masks(found["masks"], found["boxes"], height, width)
    if "keypoints" in found:
        found["keypoints"] = found["keypoints"] * torch.tensor([*scale[:2], 1])
    return found


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
