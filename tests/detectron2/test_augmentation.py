# ruff: noqa: E402 (what needs Detectron2 is imported after the skip)
"""Test-time augmentation of dense detectors, on a detector that finds what lies where a picture is bright."""

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, Instances

from dyhead.config import ConfigError
from dyhead.detectron2 import Trainer
from dyhead.detectron2.augmentation import DenseWithTTA, with_augmentation

AUGMENTED = {"TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": (64, 128), "TEST.AUG.MAX_SIZE": 400}


class Finder(nn.Module):
    """Finds the bright box, with a score of its own for each image that it sees."""

    def __init__(self, scores):
        super().__init__()
        self.scores, self.seen = iter(scores), []

    def forward(self, inputs):
        (x,) = inputs
        self.seen.append(tuple(x["image"].shape[-2:]))
        rows, columns = torch.nonzero(x["image"][0] > 100, as_tuple=True)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        size = x["image"].shape[-2:]
        scale = [x["width"] / size[1], x["height"] / size[0]] * 2
        found = Instances((x["height"], x["width"]))
        found.pred_boxes = Boxes(torch.tensor([box], dtype=torch.float32) * torch.tensor([scale]))
        found.scores, found.pred_classes = torch.tensor([next(self.scores)]), torch.tensor([1])
        return [{"instances": found}]


def picture():
    """32 x 48 pixels of a file of 64 x 96, with a bright box at 8 to 20 of 48 columns and 4 to 12 of 32 rows."""
    image = torch.zeros(3, 32, 48, dtype=torch.uint8)
    image[:, 4:12, 8:20] = 200
    return {"image": image, "height": 64, "width": 96, "image_id": 1}


def test_boxes_of_all_sizes_and_mirrors_come_back_to_the_image(tiny_cfg):
    cfg = tiny_cfg("fcos", AUGMENTED)
    finder = Finder([0.4, 0.9, 0.5, 0.3])
    (output,) = DenseWithTTA(cfg, finder)([picture()])
    found = output["instances"]
    assert finder.seen == [(64, 96), (64, 96), (128, 192), (128, 192)]  # each as it is and mirrored
    assert found.image_size == (64, 96)
    assert len(found) == 1  # four of the same box, of which NMS leaves the best
    assert found.scores.item() == pytest.approx(0.9)
    assert found.pred_classes.tolist() == [1]
    assert found.pred_boxes.tensor[0].tolist() == pytest.approx([16, 8, 40, 24], abs=2)


def test_mirrors_are_left_out_and_detections_limited_as_configured(tiny_cfg):
    settings = AUGMENTED | {"TEST.AUG.FLIP": False, "TEST.DETECTIONS_PER_IMAGE": 1, "MODEL.FCOS.NMS_THRESH_TEST": 1.0}
    finder = Finder([0.4, 0.9])
    (output,) = DenseWithTTA(tiny_cfg("fcos", settings), finder)([picture()])
    assert finder.seen == [(64, 96), (128, 192)]
    assert output["instances"].scores.tolist() == pytest.approx([0.9])


@pytest.mark.parametrize("detector", ["fcos", "faster_rcnn"])
def test_a_detector_of_each_kind_runs_augmented(tiny_cfg, inputs, detector):
    thresholds = {"MODEL.FCOS.SCORE_THRESH_TEST": 0.0, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0}
    cfg = tiny_cfg(detector, AUGMENTED | thresholds)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).eval()
    augmented = with_augmentation(cfg, model).eval()
    assert isinstance(augmented, GeneralizedRCNNWithTTA if detector == "faster_rcnn" else DenseWithTTA)
    with torch.no_grad():
        outputs = augmented(inputs)
    for x, output in zip(inputs, outputs, strict=True):
        assert output["instances"].image_size == (x["height"], x["width"])
        assert 0 < len(output["instances"]) <= cfg.TEST.DETECTIONS_PER_IMAGE


@pytest.mark.parametrize(
    ("detector", "settings", "message"),
    [
        ("faster_rcnn", {"MODEL.KEYPOINT_ON": True}, "TEST.AUG.ENABLED: expected False with MODEL.KEYPOINT_ON True"),
        ("fcos", {"MODEL.META_ARCHITECTURE": "PanopticFPN"}, "TEST.AUG.ENABLED: expected False with .* PanopticFPN"),
        ("fcos", {"TEST.AUG.MIN_SIZES": ()}, "TEST.AUG.MIN_SIZES: expected .*at least one size in pixels"),
        ("fcos", {"TEST.AUG.MAX_SIZE": 0}, "TEST.AUG.MAX_SIZE: expected .*at least 1, got 0"),
    ],
)
def test_what_cannot_be_augmented_is_refused_before(tiny_cfg, detector, settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny_cfg(detector, AUGMENTED | settings)
