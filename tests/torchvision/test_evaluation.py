"""The evaluation carries everything that is detected into the results, in pixels of the files."""

import json

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from dyhead import data
from dyhead.torchvision.data import load_splits
from dyhead.torchvision.evaluation import evaluate


@pytest.fixture
def with_parts(rectangles, tmp_path):
    """The rectangles with masks, as polygons, and two keypoints each: a corner and the middle."""
    content = json.loads(rectangles.read_text())
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        a["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        a["keypoints"] = [x, y, 2, x + w // 2, y + h // 2, 2]
    for category in content["categories"]:
        category["keypoints"] = ["corner", "middle"]
    path = tmp_path / "parts.json"
    path.write_text(json.dumps(content))
    return path


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


def test_boxes_masks_and_keypoints_come_back_as_they_are_annotated(tiny, configured, with_parts, rectangles):
    options = {
        "DATASETS.REGISTER": [["parts", str(with_parts), str(rectangles.parent)]],
        "DATASETS.TEST": ("parts",),
        "DATASETS.TRAIN": ("parts",),
        "INPUT.MIN_SIZE_TEST": 150,
        "INPUT.MAX_SIZE_TEST": 400,
        "INPUT.MASK_FORMAT": "bitmask",
        "MODEL.MASK_ON": True,
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 2,
        "TEST.KEYPOINT_OKS_SIGMAS": [0.01, 0.01],
    }
    cfg = configured(tiny | options, "keypoint_rcnn")
    data.register_from_config(cfg.DATASETS.REGISTER)
    splits = load_splits(cfg, ["parts"])
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    (result,) = evaluate(fabric, cfg, Knowing(splits[0].records), splits)
    assert result.metrics["AP"] == pytest.approx(100)
    assert set(result.tasks) == {"segm", "keypoints"}
    assert all(metrics["AP"] == pytest.approx(100) for metrics in result.tasks.values())
    first = splits[0].records[0]["annotations"][0]
    (detection, *_) = result.detections
    assert detection["keypoints"][:2] == pytest.approx(first["keypoints"][:2], abs=1e-3)
