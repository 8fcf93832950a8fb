"""Names and ids of classes, known without a dataset's pictures."""

import json

import pytest

from dyhead.data import Classes, classes_by_name


def test_cocos_classes_have_the_ids_of_its_files():
    known = classes_by_name("coco_2017_train")
    ids = dict(zip(known.names, known.ids, strict=True))
    assert len(ids) == 80
    some = {"person": 1, "fire hydrant": 11, "stop sign": 13, "dog": 18, "backpack": 27, "tv": 72, "toothbrush": 90}
    assert some.items() <= ids.items()
    assert classes_by_name("keypoints_coco_2017_val") == Classes(["person"], [1])


@pytest.mark.detectron2
def test_cocos_classes_are_detectron2s():
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    known = classes_by_name("coco_2014_minival")
    things = [(entry["id"], entry["name"]) for entry in COCO_CATEGORIES if entry["isthing"]]
    assert list(zip(known.ids, known.names, strict=True)) == things


def test_drawn_sets_need_not_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    known = classes_by_name("shapes_easy_train")
    assert (known.names, known.ids) == (["circle", "triangle", "square"], [1, 2, 3])
    assert list(tmp_path.iterdir()) == []


def test_a_registered_files_classes_are_read_without_its_pictures(tmp_path):
    categories = [{"id": 9, "name": "cell", "keypoints": ["top"]}, {"id": 4, "name": "grain"}]
    content = {"images": [{"id": 1, "file_name": "gone.png", "width": 2, "height": 2}], "categories": categories}
    (tmp_path / "data.json").write_text(json.dumps(content))
    entries = [["mine", str(tmp_path / "data.json"), str(tmp_path / "gone")]]
    assert classes_by_name("mine", entries) == Classes(["grain", "cell"], [4, 9], ["top"])
    assert classes_by_name("others", entries) is None
    (tmp_path / "data.json").write_text("{}")
    assert classes_by_name("mine", entries) is None
