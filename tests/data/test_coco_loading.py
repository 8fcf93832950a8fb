import json
import logging
import math
import os

import numpy as np
import pytest
from PIL import Image

from dyhead.data import DataError, DatasetInfo, load, train_records
from dyhead.data.coco import area, flip_pairs, is_crowd, read_json


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
        ('{"images": [], "annotations": []}', "not in COCO's format.*got a dict with images, annotations"),
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
        ("annotations", 2, {"bbox": [0, 0, 1e6, 1e6]}, r"annotation 13 .*has more than 1e\+10 pixels \(bbox\)"),
        ("images", 1, {"id": 7}, "image id 7 appears more than once"),
        ("images", 1, {"id": None}, "image without a valid id"),
        ("images", 1, {"height": 0}, r"image 3 \(b\.png\): expected a height and a width, got 0 and 40"),
        ("images", 1, {"width": None}, r"image 3 \(b\.png\): expected a height and a width"),
        ("images", 1, {"file_name": None}, "image 3 has no file_name"),
        ("images", 1, {"file_name": "c.png"}, r"image .*images/c\.png does not exist"),
        ("images", 1, {"file_name": "sub/b.png"}, r"image .*images/sub/b\.png does not exist"),
        ("categories", 1, {"id": 9}, "category id 9 appears more than once"),
        ("categories", 1, {"id": "4"}, "ids of two kinds: expected all numbers or all text, got 9 and '4'"),
        ("categories", 1, {"id": True}, r"category without a valid id: .*got True"),
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


def warnings_of(caplog, load_set):
    with caplog.at_level(logging.WARNING):
        loaded = load_set()
    return loaded, [record.getMessage().partition(".json: ")[2] for record in caplog.records]


@pytest.mark.parametrize("image_id", [0, -3, 2**63, 2**63 + 1, 2**100, 10**400, "", "7", "\u00e9\u732b", 1.5e300])
@pytest.mark.parametrize("category_ids", [[9, 4], [2**70, -1], ["b", "a"], [9.0, 4.0]])
def test_ids_of_any_size_and_kind_come_back_as_they_were(small_set, image_id, category_ids):
    for entry in (small_set.data["images"][0], *small_set.data["annotations"][:2]):
        entry["id" if "file_name" in entry else "image_id"] = image_id
    for entry in (*small_set.data["categories"], *small_set.data["annotations"]):
        key = "id" if "name" in entry else "category_id"
        entry[key] = category_ids[[9, 4].index(entry[key])]
    split = load(small_set.write())
    assert [r["image_id"] for r in split.records] == [image_id, 3]
    assert not isinstance(split.records[0]["image_id"], float)
    assert split.category_ids == category_ids[::-1]
    assert split.class_names == ["dog", "cat"]
    assert [[a["category_id"] for a in r["annotations"]] for r in split.records] == [[1, 0], [0]]


def test_whole_numbers_written_as_fractions_are_whole_numbers(small_set):
    plain = load(small_set.write())
    text = json.dumps(small_set.data)
    for key in ("id", "image_id", "category_id", "width", "height", "iscrowd"):
        for number in (0, 1, 3, 4, 7, 9, 11, 12, 13, 30, 40):
            text = text.replace(f'"{key}": {number},', f'"{key}": {number}.0,')
            text = text.replace(f'"{key}": {number}}}', f'"{key}": {number}.0}}')
    assert text.count(".0") == 19
    split = load(small_set.write(text))
    assert repr(split) == repr(plain)  # 3 == 3.0, but not their text


def test_a_number_and_its_text_are_different_ids(small_set):
    small_set.data["images"][1]["id"] = "7"
    with pytest.raises(DataError, match=r"annotation 13 of image 3: no image has the id 3 \(image_id\)"):
        load(small_set.write())
    small_set.data["annotations"][2]["image_id"] = "7"
    assert [(r["image_id"], len(r["annotations"])) for r in load(small_set.write()).records] == [(7, 2), ("7", 1)]
    small_set.data["images"][1]["id"] = 7.0
    with pytest.raises(DataError, match="image id 7 appears more than once"):
        load(small_set.write())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("area", v) for v in ("12", "", [], {}, True, math.nan, math.inf, -math.inf, 10**400, 2e10)),
        *(("iscrowd", v) for v in (-1, 2, 0.5, "0", "", [], {}, math.nan, math.inf, 10**400)),
        *(("id", v) for v in (True, None, 1.5, math.nan, math.inf, [1], {})),
        *(("image_id", v) for v in (True, None, 7.5, math.nan, [7], {}, "7")),
        *(("category_id", v) for v in (True, None, 9.5, math.nan, [9], {}, "9")),
        *(("bbox", v) for v in (None, "1234", {}, [1, 2, 3, True], [1, 2, 3, "4"], [1, 2, 3, 10**400], [[1], 2, 3, 4])),
    ],
)
def test_what_the_evaluation_reads_is_checked_and_named(small_set, key, value):
    small_set.data["annotations"][0][key] = value
    with pytest.raises(DataError, match=rf"(?s)small\.json.*annotation (11|{key}|None|True|\S*).*{key}"):
        load(small_set.write())


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *(("images", "file_name", v) for v in (5, "", ["b.png"], "b.png\0", "\ud800.png", ".", "x" * 5000)),
        *(("images", k, v) for k in ("width", "height") for v in (True, "40", 40.5, 1e400, math.nan, 2**40, 10**400)),
        *(("categories", "name", v) for v in (5, "", ["dog"], "\ud800")),
    ],
)
def test_what_images_and_classes_cannot_be_is_named(small_set, section, key, value):
    small_set.data[section][1][key] = value
    with pytest.raises(DataError, match=f"small.json(?s:.*){key}") as error:
        load(small_set.write())
    str(error.value).encode()


def test_areas_and_crowds_are_as_the_evaluation_takes_them(small_set, caplog):
    first, second, third = small_set.data["annotations"]
    first.update(area=-150, iscrowd=None)
    second.update(area=None, iscrowd=True)
    third.update(area=0, iscrowd=0.0)
    split, warnings = warnings_of(caplog, lambda: load(small_set.write()))
    loaded = [a for record in split.records for a in record["annotations"]]
    assert [(a["area"], a["iscrowd"]) for a in loaded] == [(200, 0), (1200, 1), (0, 0)]
    assert [(area(a), is_crowd(a)) for a in read_json(small_set.info.json_file)["annotations"]] == [
        (200, 0), (1200, 1), (0, 0),
    ]  # fmt: skip
    assert warnings == ["1 of 3 areas are negative and became width x height (annotation ids 11)"]


def test_boxes_beyond_the_image_are_clipped_where_asked_and_counted_once(small_set, caplog):
    first, second, third = small_set.data["annotations"]
    first["bbox"] = [-5, 10, 30, 1e12]  # extends beyond
    second["bbox"] = [50, 10, 5, 5]  # wholly outside
    third["bbox"] = [39, 29, 1.5, 1.5]  # rounding
    with pytest.raises(DataError, match=r"annotation 11 .*DATASETS\.CLIP_BOXES True.*\n.*annotation 12 "):
        load(small_set.write())
    for _ in range(2):
        split, warnings = warnings_of(caplog, lambda: load(small_set.info, clip_boxes=True))
        assert [[a["bbox"] for a in r["annotations"]] for r in split.records] == [[[0, 10, 25, 30]], [[39, 29, 40, 30]]]
        assert warnings == [
            "1 of 3 boxes extend beyond their image and were clipped (annotation ids 11)",
            "1 of 3 boxes lie outside their image and were dropped (annotation ids 12)",
        ]


def test_a_file_without_annotations_can_be_detected_on_but_not_trained_on(small_set):
    assert load(small_set.write()).annotated
    small_set.data["annotations"] = []
    empty = load(small_set.write())
    assert empty.annotated
    assert len(train_records([empty], filter_empty=False)) == 2
    del small_set.data["annotations"]
    split = load(small_set.write())
    assert not split.annotated
    assert "annotations" not in read_json(small_set.info.json_file)
    assert [(r["image_id"], r["annotations"]) for r in split.records] == [(7, []), (3, [])]
    for filter_empty in (False, True):
        with pytest.raises(DataError, match=r"small\.json \(dataset 'small'\): it has no annotations.*not trained on"):
            train_records([empty, split], filter_empty=filter_empty)


def test_sets_of_crowds_alone_are_nothing_to_train_on(small_set):
    for annotation in small_set.data["annotations"]:
        annotation["iscrowd"] = 1
    with pytest.raises(DataError, match="dataset small: no image with an annotation that is not a crowd"):
        train_records([load(small_set.write())], filter_empty=True)


def test_a_byte_order_mark_is_read_over_and_utf_16_is_named(small_set):
    plain = load(small_set.write())
    small_set.data["categories"][0]["name"] = "\u732b"
    text = json.dumps(small_set.data, ensure_ascii=False)
    path = small_set.folder / "small.json"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load(small_set.info).class_names == ["dog", "\u732b"]
    assert load(small_set.info).records == plain.records
    path.write_text(text, encoding="utf-16")
    with pytest.raises(DataError, match=r"small\.json: not a JSON file \(expected UTF-8, got UTF-16\)"):
        load(small_set.info)
    path.write_text(text, encoding="utf-16-le")  # without the mark
    with pytest.raises(DataError, match=r"small\.json: not a JSON file"):
        load(small_set.info)


@pytest.mark.parametrize(
    "text", ["", "nul", '{"images": ' + "[" * 100_000, '{"info": ' + "[" * 9999 + "]" * 9999 + "}", "9" * 5000, "\0"]
)
def test_a_file_that_no_parser_takes_is_named(small_set, text):
    with pytest.raises(DataError, match=r"^\S*small\.json: not "):
        load(small_set.write(text))


def test_what_is_not_a_file_is_named_and_not_waited_for(small_set):
    os.mkfifo(small_set.folder / "pipe")
    for path in (small_set.folder, small_set.folder / "pipe", "a\0b"):
        with pytest.raises(DataError, match="cannot be read"):
            load(DatasetInfo("small", str(path), str(small_set.folder)))


def test_an_entry_that_is_not_a_dict_is_named(small_set):
    small_set.data["annotations"][1] = [1, 2]
    with pytest.raises(
        DataError, match=r"small\.json: .*'annotations' is not a list of dicts: annotations\[1\] is \[1, 2"
    ):
        load(small_set.write())


def test_segmentations_that_are_no_masks_are_left_out_with_one_warning(small_set, caplog):
    first, second, third = small_set.data["annotations"]
    first["segmentation"] = [1, 2, 11, 2, 11, 22]  # a list less than COCO has
    second["segmentation"] = {"counts": "abc", "size": [30, 40]}
    third["segmentation"] = [[[[1]]]]
    split, warnings = warnings_of(caplog, lambda: load(small_set.write()))
    kept = [a.get("segmentation") for record in split.records for a in record["annotations"]]
    assert kept == [None, second["segmentation"], None]
    assert warnings == ["2 of 3 segmentations are neither polygons nor RLE and were left out (annotation ids 11, 13)"]


@pytest.mark.parametrize("counts", [[0, 1200], [600, 600]])
def test_runs_that_do_not_fill_the_image_are_no_mask(small_set, counts):
    first = small_set.data["annotations"][0]
    first["segmentation"] = {"counts": counts, "size": [30, 40]}
    assert "segmentation" in load(small_set.write()).records[0]["annotations"][0]
    for wrong in (counts[:1], [*counts, 1], [-1, *counts, 1]):
        first["segmentation"]["counts"] = wrong
        assert "segmentation" not in load(small_set.write()).records[0]["annotations"][0]


def test_keypoints_are_passed_on_with_the_names_that_all_categories_share(small_set, caplog):
    names = ["nose", "left_eye", "right_eye"]
    cat, dog = small_set.data["categories"]
    assert load(small_set.write()).keypoint_names == []
    cat["keypoints"] = names
    first, second, third = small_set.data["annotations"]
    first["keypoints"] = [1, 2, 2, 3, 4, 1, 0, 0, 0]
    second["keypoints"] = [1, 2, 2]
    third["keypoints"] = [1, 2, 2, "3", 4, 1, 0, 0, 0]
    split, warnings = warnings_of(caplog, lambda: load(small_set.write()))
    assert split.keypoint_names == names
    kept = [a.get("keypoints") for record in split.records for a in record["annotations"]]
    assert kept == [first["keypoints"], None, None]
    assert warnings == [
        "2 of 3 lists of keypoints do not fit the categories' and were left out (annotation ids 12, 13)"
    ]
    dog["keypoints"] = ["tail"]
    assert load(small_set.write()).keypoint_names == []


def test_keypoints_that_change_places_in_a_mirror_are_known_by_their_names():
    names = ["nose", "left_eye", "right_eye", "lefthand", "a_left_b", "a_right_b"]
    assert flip_pairs(names) == [("left_eye", "right_eye"), ("a_left_b", "a_right_b")]


def test_paths_of_images_may_be_absolute_or_lead_elsewhere_and_be_no_unicode(small_set):
    first, second = small_set.data["images"]
    first["file_name"] = str(small_set.folder / "images" / "a.png")
    second["file_name"] = "../images/b.png"
    assert [r["file_name"] for r in load(small_set.write()).records] == [
        first["file_name"], str(small_set.folder / "images" / "../images/b.png"),
    ]  # fmt: skip
    name = os.fsdecode(b"caf\xe9.png")  # as Python lists it
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(small_set.folder / "images" / name)
    second["file_name"] = name
    assert load(small_set.write()).records[1]["file_name"].endswith(name)
    second["width"] = 0
    with pytest.raises(DataError, match=r"caf\\udce9\.png"):
        load(small_set.write())


def test_a_folder_is_no_image(small_set):
    (small_set.folder / "images" / "sub").mkdir()
    small_set.data["images"][1]["file_name"] = "sub"
    with pytest.raises(DataError, match=r"images/sub does not exist"):
        load(small_set.write())


def test_images_that_share_a_file_are_named_once(small_set, caplog):
    small_set.data["images"][1]["file_name"] = "a.png"
    split, warnings = warnings_of(caplog, lambda: load(small_set.write()))
    assert len(split.records) == 2
    assert warnings == ["2 of 2 images share their file_name with another one (image ids 7, 3)"]


def test_class_names_may_differ_in_case_alone(small_set):
    small_set.data["categories"][1]["name"] = "Cat"
    assert load(small_set.write()).class_names == ["Cat", "cat"]
