"""A trained detector of this engine on pictures from anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import transforms as T
from torch import Tensor, nn

from dyhead.config import ConfigError, add_dyhead_config, load_config
from dyhead.detectron2.checkpoint import Checkpointer
from dyhead.detectron2.config import check_values, ignore_not_honoured
from dyhead.detectron2.datasets import NamingMapper, in_format
from dyhead.detectron2.trainer import Trainer
from dyhead.runs.preflight import check_device

_FIELDS = {
    "boxes": "pred_boxes",
    "scores": "scores",
    "labels": "pred_classes",
    "masks": "pred_masks",
    "keypoints": "pred_keypoints",
    "visible_boxes": "pred_visible_boxes",
}


def configuration(file: str, opts: Sequence[str]) -> CfgNode:
    """See :func:`dyhead.torchvision.prediction.configuration`."""
    cfg = add_dyhead_config(get_cfg())
    given = load_config(cfg, file, opts)
    check_values(cfg)
    check_device(cfg)
    ignore_not_honoured(cfg, given)
    cfg.freeze()
    return cfg


def trained_model(cfg: CfgNode, weights: str) -> nn.Module:
    """See :func:`dyhead.torchvision.prediction.trained_model`."""
    model = Trainer.build_model(cfg)
    Checkpointer(model).load(weights)
    return model.eval()


def detect(
    cfg: CfgNode, model: nn.Module, images: Sequence[np.ndarray], score_threshold: float
) -> list[dict[str, Tensor]]:
    """See :func:`dyhead.torchvision.prediction.detect`.

    Raises:
        ConfigError: the meta-architecture detects no objects.
    """
    mapper = NamingMapper(cfg, is_train=False)
    batch = []
    for image in images:
        seen = T.AugInput(in_format(image, mapper.image_format))
        mapper.augmentations(seen)
        tensor = torch.from_numpy(np.ascontiguousarray(seen.image.transpose(2, 0, 1)))
        batch.append({"image": tensor, "height": image.shape[0], "width": image.shape[1]})
    with torch.no_grad():
        outputs = model(batch)
    results = []
    for output in outputs:
        if "instances" not in output:
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE: expected one that detects objects, got {cfg.MODEL.META_ARCHITECTURE}, whose "
                f"results are {', '.join(output)}"
            )
        found = output["instances"]
        found = found[found.scores >= score_threshold].to("cpu")
        fields = {key: found.get(name) for key, name in _FIELDS.items() if found.has(name)}
        results.append({key: getattr(value, "tensor", value) for key, value in fields.items()})
    return results
