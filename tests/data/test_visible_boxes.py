"""Boxes of the visible parts of objects: the drawn set that has them, annotation files, and what is trained on."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dyhead import data
from dyhead.data import shapes
from dyhead.data.shapes.drawing import _place
from dyhead.torchvision.data import Augmentation, Change, Parts, TrainStream

CROWD = shapes.SPECS["shapes_crowd_val"]


def bounds(mask):
    rows, columns = np.nonzero(mask)
    x, y = columns.min(), rows.min()
    return [x, y, columns.max() + 1 - x, rows.max() + 1 - y]


def test_the_crowd_has_whole_boxes_and_visible_ones():
    hidden = 0
    for index in range(15):
        _, annotations = shapes.draw(CROWD, index)
        objects, owner, _ = _place(CROWD, index)
        for i, (a, drawn) in enumerate(zip(annotations, objects, strict=True)):
            whole = np.zeros(owner.shape, bool)
            whole[drawn.window] = drawn.distance <= 0
            assert a["bbox"] == bounds(whole)
            assert a["area"] == whole.sum()
            assert a["visible_bbox"] == bounds(owner == i)
            hidden += a["bbox"] != a["visible_bbox"]
    assert hidden > 15


def test_other_sets_are_as_they_were():
    plain = replace(shapes.SPECS["shapes_easy_val"], objects=(5, 9), visible=0.3, seed=CROWD.seed)
    for index in range(3):
        image, annotations = shapes.draw(plain, index)
        crowd_image, crowd = shapes.draw(CROWD, index)
        assert np.array_equal(image, crowd_image)
        assert all("visible_bbox" not in a for a in annotations)
        assert [a["bbox"] for a in annotations] == [a["visible_bbox"] for a in crowd]
        assert [a["segmentation"] for a in annotations] == [a["segmentation"] for a in crowd]


def split_of(folder, *boxes, name="visible"):
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(folder / "a.png")
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": [10, 5, 20, 30], "visible_bbox": box}
        for i, box in enumerate(boxes, 1)
    ]
    for a in annotations:
        if a["visible_bbox"] == "no":
            del a["visible_bbox"]
    image = {"id": 1, "file_name": "a.png", "height": 40, "width": 60}
    content = {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / f"{name}.json").write_text(json.dumps(content))
    return data.load(data.DatasetInfo(name, str(folder / f"{name}.json"), str(folder)))


def test_files_may_have_them(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        split = split_of(tmp_path, [10, 5, 8, 30], "no", None, [-4, 38, 20, 10], [12.5, 6, 3, 4])
    (record,) = split.records
    assert [a.get("visible_bbox") for a in record["annotations"]] == [
        [10, 5, 18, 35], None, None, [0, 38, 16, 40], [12.5, 6, 15.5, 10]
    ]  # fmt: skip
    assert caplog.text == ""


@pytest.mark.parametrize(
    "broken",
    ["text", {}, [1, 2, 3], [1, 2, 0, 4], [1, 2, -3, 4], [70, 2, 3, 4], [1, 2, float("nan"), 4], [1, 2, True, 4]],
)
def test_what_is_no_box_is_left_out_and_named(tmp_path, caplog, broken):
    with caplog.at_level(logging.WARNING):
        split = split_of(tmp_path, [10, 5, 8, 30], broken)
    assert ["visible_bbox" in a for a in split.records[0]["annotations"]] == [True, False]
    assert "1 of 2 values of visible_bbox are no boxes in their image and were left out (" in caplog.text


def test_they_are_resized_and_flipped_with_the_image(tmp_path):
    split = split_of(tmp_path, [10, 5, 8, 30], "no")
    stream = TrainStream(split.records, Augmentation((80,), "choice", 1000, "none"), "RGB", 0, Parts(visible=True))
    _, target = stream[0]
    assert target["boxes"].tolist() == [[20, 10, 60, 70]] * 2
    assert target["visible_boxes"].tolist() == [[20, 10, 36, 70], [20, 10, 60, 70]]
    change = Change((40, 60), (80, 120), "horizontal")
    found = Parts(visible=True).visible_of(split.records[0]["annotations"], change)
    assert found.tolist() == [[84, 10, 100, 70], [60, 10, 100, 70]]
    assert "visible_boxes" not in TrainStream(split.records, stream.augmentation, "RGB", 0)[0][1]


@pytest.mark.detectron2
def test_detectron2s_mapper_gives_the_same(tmp_path):
    from detectron2.data import transforms as T
    from detectron2.structures import BoxMode

    from dyhead.detectron2 import NamingMapper

    split = split_of(tmp_path, [10, 5, 8, 30], "no")
    change = Change((40, 60), (80, 120), "horizontal")
    steps = [T.Resize((80, 120)), T.RandomFlip(1.0)]
    (record,) = split.records
    crowd = record["annotations"][0] | {"iscrowd": 1}
    own_mode = {"bbox": [10, 5, 20, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    record = record | {"annotations": [crowd, *record["annotations"], own_mode]}
    mapper = NamingMapper(is_train=True, augmentations=steps, image_format="RGB", visible_boxes=True)
    found = mapper(record)["instances"].gt_visible_boxes.tensor
    expected = Parts(visible=True).visible_of(split.records[0]["annotations"], change)
    torch.testing.assert_close(found, torch.cat([expected, expected[1:]]))
    # A crop: objects whose boxes are cut off go, and one whose visible part is cut off has what is left of its box.
    crop = [T.CropTransform(20, 0, 40, 40)]
    found = NamingMapper(is_train=True, augmentations=crop, image_format="RGB", visible_boxes=True)(record)["instances"]
    assert found.gt_boxes.tensor.tolist() == [[0, 5, 10, 35]] * 3
    assert found.gt_visible_boxes.tensor.tolist() == [[0, 5, 10, 35]] * 3
    crop = [T.CropTransform(30, 0, 30, 40)]
    found = NamingMapper(is_train=True, augmentations=crop, image_format="RGB", visible_boxes=True)(record)["instances"]
    assert len(found) == len(found.gt_visible_boxes) == 0
    assert not NamingMapper(is_train=True, augmentations=steps, image_format="RGB")(record)["instances"].has(
        "gt_visible_boxes"
    )
