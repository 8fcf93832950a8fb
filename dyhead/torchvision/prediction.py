"""A trained detector of this engine on pictures from anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from dyhead.config import load_config
from dyhead.runs.preflight import check_device
from dyhead.torchvision.checkpoint import load_weights
from dyhead.torchvision.config import check_values, get_cfg, ignore_not_honoured
from dyhead.torchvision.data import prepared
from dyhead.torchvision.detectors import build_model
from dyhead.torchvision.evaluation import on_image


def configuration(file: str, opts: Sequence[str]) -> CfgNode:
    """The frozen configuration of a detector; of a run, only what concerns the model and the machine is checked.

    Raises:
        ConfigError: it cannot be read or used.
    """
    cfg = get_cfg()
    given = load_config(cfg, file, opts)
    check_values(cfg)
    check_device(cfg)
    ignore_not_honoured(cfg, given)
    cfg.freeze()
    return cfg


def trained_model(cfg: CfgNode, weights: str) -> nn.Module:
    """The detector on ``MODEL.DEVICE``, in evaluation mode.

    Raises:
        ConfigError: the weights cannot be read, or do not all fit.
    """
    model = build_model(cfg)
    load_weights(model, weights, strict=True)
    return model.to(cfg.MODEL.DEVICE).eval()


def detect(
    cfg: CfgNode, model: nn.Module, images: Sequence[np.ndarray], score_threshold: float
) -> list[dict[str, Tensor]]:
    """What a detector finds in images, as in :func:`dyhead.torchvision.evaluation.evaluate`.

    Args:
        cfg: the configuration.
        model: of :func:`trained_model`.
        images: (H, W, 3) uint8 each, RGB. They are one batch.
        score_threshold: what has a lower score is left out.

    Returns:
        For each image on the CPU boxes (D, 4) in its pixels, scores and labels (D,), and, where the detector has
        them, masks (D, H, W) bool, keypoints (D, J, 3) as x, y and score, and visible_boxes (D, 4).
    """
    flipped = cfg.INPUT.FORMAT == "BGR"
    batch = [
        prepared(
            torch.tensor(image[:, :, ::-1].copy() if flipped else image).permute(2, 0, 1),
            cfg.INPUT.MIN_SIZE_TEST,
            cfg.INPUT.MAX_SIZE_TEST,
        )
        for image in images
    ]
    with torch.no_grad():
        found = model([image.to(cfg.MODEL.DEVICE) for image in batch])
    kept = [{key: x[own["scores"] >= score_threshold] for key, x in own.items()} for own in found]
    return [
        on_image(detections, seen.shape[-2:], image.shape[:2])
        for detections, seen, image in zip(kept, batch, images, strict=True)
    ]
