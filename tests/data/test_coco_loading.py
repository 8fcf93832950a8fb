import logging
import math

import pytest

from dyhead.data import DataError, load


def test_records_are_in_detectron2s_form(small_set):
    split = load(small_set.write())
    assert split.class_names == ["dog", "cat"]
    assert split.category_ids == [4, 9]
    first, second = split.records
    assert {k: v for k, v in first.items() if k != "annotations"} == {
        "file_name": str(small_set.folder / "images" / "a.png"), "height": 30, "width": 40, "image_id": 7,
    }  # fmt: skip
    assert first["annotations"] == [
        {"bbox": [1, 2, 11, 22], "bbox_mode": 0, "category_id": 1, "iscrowd": 0, "area": 150},
        {"bbox": [0, 0, 40, 30], "bbox_mode": 0, "category_id": 0, "iscrowd": 1, "area": 1200},
    ]
    assert second["annotations"] == [
        {"bbox": [5.5, 6.5, 7.5, 9.5], "bbox_mode": 0, "category_id": 0, "iscrowd": 0, "area": 6}
    ]


def test_segmentations_are_passed_on_as_they_are(small_set):
    polygon = [[1, 2, 11, 2, 11, 22]]
    small_set.data["annotations"][0]["segmentation"] = polygon
    assert load(small_set.write()).records[0]["annotations"][0]["segmentation"] == polygon


def test_images_without_annotations_are_kept(small_set):
    small_set.data["annotations"] = []
    assert [r["annotations"] for r in load(small_set.write()).records] == [[], []]


def test_boxes_that_stick_out_by_rounding_are_clipped(small_set):
    small_set.data["annotations"][0]["bbox"] = [-0.6, 0, 41.2, 30.9]
    assert load(small_set.write()).records[0]["annotations"][0]["bbox"] == [0, 0, 40, 30]


def test_boxes_of_zero_size_are_dropped_with_one_warning(small_set, caplog):
    small_set.data["annotations"][0]["bbox"] = [3, 3, 5, 0]
    small_set.data["annotations"][2]["bbox"] = [40, 3, 0.5, 5]  # nothing is left of it when clipped
    with caplog.at_level(logging.WARNING):
        split = load(small_set.write())
    assert [len(r["annotations"]) for r in split.records] == [1, 0]
    assert [r.getMessage().endswith("2 of 3 boxes have no width or no height and were dropped (annotation ids 11, 13)")
            for r in caplog.records] == [True]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "not a JSON file"),
        ("[]", "not in COCO's format.*got a list"),
        ('{"images": [], "categories": []}', "not in COCO's format.*got a dict with images, categories"),
        ('{"images": {}, "categories": [], "annotations": []}', "'images' is not a list of dicts"),
        ('{"images": [], "categories": [], "annotations": []}', "it has no categories"),
        ('{"images": [], "categories": [{"id": 1, "name": "a"}], "annotations": []}', "it has no images"),
    ],
)
def test_a_file_that_is_not_coco_is_refused(small_set, text, message):
    with pytest.raises(DataError, match=rf"small\.json.*{message}"):
        load(small_set.write(text))


def test_a_file_that_is_missing_is_named(small_set):
    with pytest.raises(DataError, match=r"small\.json: the annotation file cannot be read"):
        load(small_set.info)


@pytest.mark.parametrize(
    ("section", "entry", "change", "message"),
    [
        ("annotations", 0, {"category_id": 5}, r"annotation 11 of image 7 .*a\.png.*no category has the id 5"),
        ("annotations", 0, {"image_id": 8}, r"annotation 11 of image 8: no image has the id 8"),
        ("annotations", 0, {"image_id": [8]}, r"annotation 11 of image \[8\]: an id is neither"),
        ("annotations", 0, {"id": 12}, r"annotation id 12 appears more than once"),
        ("annotations", 0, {"bbox": [1, 2, 3]}, r"annotation 11 of image 7 .*a\.png.*four numbers, got \[1, 2, 3\]"),
        ("annotations", 0, {"bbox": [1, 2, None, 4]}, r"annotation 11 .*four numbers"),
        ("annotations", 0, {"bbox": [1, 2, -3, 4]}, r"annotation 11 of image 7 .*a\.png, 40 x 30.*-3.*no valid size"),
        ("annotations", 0, {"bbox": [1, 2, math.nan, 4]}, r"annotation 11 .*no valid size"),
        ("annotations", 0, {"bbox": [1, 2, math.inf, 4]}, r"annotation 11 .*no valid size"),
        (
            "annotations",
            0,
            {"bbox": [30, 2, 12, 4]},
            r"annotation 11 of image 7 .*a\.png, 40 x 30.*outside the image",
        ),
        ("annotations", 2, {"bbox": [3, -2, 5, 5]}, r"annotation 13 of image 3 .*b\.png.*outside the image"),
        ("images", 1, {"id": 7}, "image id 7 appears more than once"),
        ("images", 1, {"id": None}, "image without a valid id"),
        ("images", 1, {"height": 0}, r"image 3 \(b\.png\): expected a height and a width, got 0 and 40"),
        ("images", 1, {"width": None}, r"image 3 \(b\.png\): expected a height and a width"),
        ("images", 1, {"file_name": None}, "image 3 has no file_name"),
        ("images", 1, {"file_name": "c.png"}, r"image .*images/c\.png does not exist"),
        ("images", 1, {"file_name": "sub/b.png"}, r"image .*images/sub/b\.png does not exist"),
        ("categories", 1, {"id": 9}, "category id 9 appears more than once"),
        ("categories", 1, {"id": "4"}, "category without a valid id"),
        ("categories", 1, {"name": "cat"}, "category name 'cat' appears more than once"),
        ("categories", 1, {"name": None}, "category 4 has no name"),
    ],
)
def test_a_fault_is_named_with_its_file_image_and_annotation(small_set, section, entry, change, message):
    small_set.data[section][entry].update(change)
    with pytest.raises(DataError, match=rf"(?s)small\.json.*'small'.*({message})"):
        load(small_set.write())


@pytest.mark.parametrize("key", ["id", "image_id", "category_id", "bbox"])
def test_an_incomplete_annotation_is_named(small_set, key):
    del small_set.data["annotations"][0][key]
    with pytest.raises(DataError, match=f"has no {key}"):
        load(small_set.write())


def test_many_faults_are_counted(small_set):
    small_set.data["annotations"] = [
        {"id": i, "image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1]} for i in range(20)
    ]
    with pytest.raises(DataError, match=r"(?s)annotation 4 .*and 15 more") as error:
        load(small_set.write())
    assert "annotation 5 " not in str(error.value)
