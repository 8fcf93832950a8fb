"""The evaluation carries everything that is detected into the results, in pixels of the files."""

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from dyhead import data
from dyhead.torchvision.data import load_splits
from dyhead.torchvision.evaluation import evaluate


class Knowing(nn.Module):
    """A detector that finds what is annotated, in the pixels of the images that it sees."""

    def __init__(self, records):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.records = iter(records)

    def forward(self, images):
        (image,), record = images, next(self.records)
        scale = torch.tensor([image.shape[2] / record["width"], image.shape[1] / record["height"]])
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]], dtype=torch.float32)
        keypoints = torch.tensor([a["keypoints"] for a in record["annotations"]]).view(len(boxes), -1, 3)
        found = {
            "boxes": boxes * scale.repeat(2),
            "scores": torch.ones(len(boxes)),
            "labels": torch.tensor([a["category_id"] for a in record["annotations"]]),
            "masks": torch.ones(len(boxes), 28, 28),  # all of the box
            "keypoints": torch.cat([(keypoints[..., :2] + 0.5) * scale, torch.ones(len(boxes), 2, 1)], dim=2),
        }
        return [found]


def test_boxes_masks_and_keypoints_come_back_as_they_are_annotated(tiny, configured, with_parts):
    cfg = configured(tiny | with_parts | {"INPUT.MIN_SIZE_TEST": 150, "INPUT.MAX_SIZE_TEST": 400}, "keypoint_rcnn")
    data.register_from_config(cfg.DATASETS.REGISTER)
    splits = load_splits(cfg, cfg.DATASETS.TEST)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    (result,) = evaluate(fabric, cfg, Knowing(splits[0].records), splits)
    assert result.metrics["AP"] == pytest.approx(100)
    assert set(result.tasks) == {"segm", "keypoints"}
    assert all(metrics["AP"] == pytest.approx(100) for metrics in result.tasks.values())
    first = splits[0].records[0]["annotations"][0]
    (detection, *_) = result.detections
    assert detection["keypoints"][:2] == pytest.approx(first["keypoints"][:2], abs=1e-3)
