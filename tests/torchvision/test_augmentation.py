"""Test-time augmentation, on a detector that finds what lies where a picture is bright, and beside Detectron2's."""

import importlib.util

import pytest
import torch
from torch import nn

from dyhead.config import ConfigError
from dyhead.detection.roi.masks import paste_masks
from dyhead.torchvision.augmentation import WithAugmentation
from dyhead.torchvision.config import check_values, get_cfg
from tests.test_contract import CONFIGS, OPTIONS, assert_same_detections, build, inputs
from tests.test_contract import configured as with_options

AUGMENTED = {"TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": (64, 128), "TEST.AUG.MAX_SIZE": 400}


class Finder(nn.Module):
    """Finds the bright box, with a score of its own for each image that it sees."""

    def __init__(self, scores):
        super().__init__()
        self.scores, self.seen = iter(scores), []

    def forward(self, images):
        (image,) = images
        self.seen.append(tuple(image.shape[-2:]))
        rows, columns = torch.nonzero(image[0] > 100, as_tuple=True)
        box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        return [{"boxes": box[None], "scores": torch.tensor([next(self.scores)]), "labels": torch.tensor([1])}]


def picture():
    """32 x 48 pixels with a bright box at 8 to 20 of 48 columns and 4 to 12 of 32 rows."""
    image = torch.zeros(3, 32, 48, dtype=torch.uint8)
    image[:, 4:12, 8:20] = 200
    return image


def augmented(model, detector="fcos", **settings):
    cfg = with_options(get_cfg(), CONFIGS / f"{detector}_dyhead_R18_shapes.yaml", AUGMENTED | settings)
    check_values(cfg)
    return WithAugmentation(cfg, model)


def test_boxes_of_all_sizes_and_mirrors_come_back_to_the_image():
    finder = Finder([0.4, 0.9, 0.5, 0.3])
    (found,) = augmented(finder)([picture()])
    assert finder.seen == [(64, 96), (64, 96), (128, 192), (128, 192)]  # each as it is and mirrored
    assert found["scores"].tolist() == pytest.approx([0.9])  # four of the same box, of which NMS leaves the best
    assert found["labels"].tolist() == [1]
    assert found["boxes"][0].tolist() == pytest.approx([8, 4, 20, 12], abs=1)


def test_sizes_are_limited_mirrors_left_out_and_detections_counted_as_configured():
    settings = {"TEST.AUG.FLIP": False, "TEST.DETECTIONS_PER_IMAGE": 1, "MODEL.FCOS.NMS_THRESH_TEST": 1.0}
    finder = Finder([0.4, 0.9])
    (found,) = augmented(finder, **settings, **{"TEST.AUG.MAX_SIZE": 144})([picture()])
    assert finder.seen == [(64, 96), (96, 144)]
    assert found["scores"].tolist() == pytest.approx([0.9])


class Halves(nn.Module):
    """Two-stage: one box in each view, and a mask whose left half, as the view shows it, is there."""

    def detect_boxes(self, images):
        sizes = [image.shape[-2:] for image in images]
        boxes = [torch.tensor([[w / 4, 0.0, w / 2, float(h)]]) for h, w in sizes]
        return [{"boxes": own, "scores": torch.tensor([0.5]), "labels": torch.tensor([0])} for own in boxes]

    def find_masks(self, images, boxes, labels):
        self.asked = [own.tolist() for own in boxes]
        return [torch.tensor([[[1.0, 0.0]] * 2]) for _ in images]


def test_masks_of_the_chosen_boxes_are_the_mean_over_views_with_mirrors_turned_back():
    settings = {"TEST.AUG.MIN_SIZES": (64,), "MODEL.ROI_MASK_HEAD.NUM_CONV": 1}
    model = Halves()
    (found,) = augmented(model, "mask_rcnn", **settings)([picture()])
    assert found["boxes"].tolist() == [[12, 0, 24, 32], [24, 0, 36, 32]]  # of the view as it is, and of the mirrored
    assert model.asked == [[[24, 0, 48, 64], [48, 0, 72, 64]], [[48, 0, 72, 64], [24, 0, 48, 64]]]
    assert found["masks"].tolist() == [[[0.5, 0.5]] * 2]  # (1 + 0) / 2


@pytest.mark.detectron2
@pytest.mark.skipif(importlib.util.find_spec("detectron2") is None, reason="Detectron2 is not installed")
@pytest.mark.parametrize("name", ["fcos", "atss", "reppoints", "faster_rcnn", "cascade_rcnn", "d2det", "mask_rcnn"])
def test_both_engines_find_the_same_in_all_views(name, tmp_path):
    from detectron2.config import get_cfg as detectron2_cfg

    from dyhead.config import add_dyhead_config
    from dyhead.detectron2.augmentation import with_augmentation

    options = AUGMENTED | {
        "TEST.AUG.MIN_SIZES": (96, 192, 144),  # of images that are made larger, both engines see the same pixels
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    }
    ours, theirs = build("torchvision", name, **options), build("detectron2", name, **options)
    ours.save(tmp_path / "w.pth")
    theirs.load(tmp_path / "w.pth")
    (image, _), _ = inputs("objects")
    file, given = CONFIGS / f"{name}_dyhead_R18_shapes.yaml", OPTIONS | options
    alone = ours.detections([image])
    ours.model = WithAugmentation(with_options(get_cfg(), file, given), ours.model)
    cfg = with_options(add_dyhead_config(detectron2_cfg()), file, given)
    augmenting = with_augmentation(cfg, theirs.model.eval()).eval()
    with torch.no_grad():
        (found,) = ours.model.eval()([image])
        (output,) = augmenting([{"image": image, "height": image.shape[1], "width": image.shape[2]}])
    expected = output["instances"]
    own = (found["boxes"], found["scores"], found["labels"])
    assert_same_detections(name, [own], [(expected.pred_boxes.tensor, expected.scores, expected.pred_classes)])
    assert not torch.equal(own[1][:10], alone[0][1][:10])
    if name == "mask_rcnn":
        pasted = paste_masks(found["masks"], found["boxes"], *image.shape[1:])
        twins = (found["boxes"][:, None] - expected.pred_boxes.tensor).abs().amax(dim=2).argmin(dim=1)
        same = [(mask == expected.pred_masks[twin]).float().mean() for mask, twin in zip(pasted, twins, strict=True)]
        assert min(same) > 0.99
        assert pasted.any()


@pytest.mark.parametrize(
    ("detector", "settings", "message"),
    [
        ("keypoint_rcnn", {}, "TEST.AUG.ENABLED: expected False with MODEL.KEYPOINT_ON True, got True"),
        ("pairedbox", {}, "TEST.AUG.ENABLED: expected False with MODEL.META_ARCHITECTURE DyHeadPairedBox, got True"),
        ("fcos", {"TEST.AUG.MIN_SIZES": ()}, "TEST.AUG.MIN_SIZES: expected .*at least one size in pixels"),
        ("fcos", {"TEST.AUG.MAX_SIZE": 0}, "TEST.AUG.MAX_SIZE: expected .*at least 1, got 0"),
    ],
)
def test_what_cannot_be_augmented_is_refused_before(detector, settings, message):
    with pytest.raises(ConfigError, match=message):
        augmented(None, detector, **settings)
