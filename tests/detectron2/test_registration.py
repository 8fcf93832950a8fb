# ruff: noqa: E402 (what needs Detectron2 is imported after the skip)
import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from dyhead.config import ConfigError
from dyhead.data import DataError
from dyhead.data.shapes import SPECS
from dyhead.detectron2 import Trainer, register_datasets
from dyhead.detectron2.datasets import NamingMapper, check_classes, name_keypoints, register_shapes

import torch  # isort: skip


@pytest.fixture
def own_set(tmp_path):
    """`own_set(name, change)`: registers one picture with two boxes after `change` has altered its json's dict."""

    def build(name, change=lambda data: None):
        Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
        data = {
            "images": [{"id": 7, "file_name": "a.png", "height": 40, "width": 60}],
            "annotations": [
                {"id": 0, "image_id": 7, "category_id": 9, "bbox": [10, 5, 20, 30]},
                {"id": 1, "image_id": 7, "category_id": 4, "bbox": [30, 0, 30, 20]},
            ],
            "categories": [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}],
        }
        change(data)
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(data))
        register_datasets([name], [[name, str(file), str(tmp_path)]])
        return file

    return build


def test_a_json_becomes_a_data_set_of_detectron2(own_set, tmp_path):
    file = own_set("own_plain")
    metadata = MetadataCatalog.get("own_plain")
    assert metadata.json_file == str(file)
    assert metadata.image_root == str(tmp_path)
    assert metadata.evaluator_type == "coco"
    assert metadata.thing_classes == ["dog", "cat"]
    assert metadata.thing_dataset_id_to_contiguous_id == {4: 0, 9: 1}
    (record,) = DatasetCatalog.get("own_plain")
    assert record["file_name"] == str(tmp_path / "a.png")
    assert [(a["bbox"], a["category_id"]) for a in record["annotations"]] == [
        ([10, 5, 30, 35], 1),
        ([30, 0, 60, 20], 0),
    ]
    record["annotations"].clear()  # a user's change stays his
    assert len(DatasetCatalog.get("own_plain")[0]["annotations"]) == 2


def test_registering_again_changes_nothing(blocks):
    for _ in range(2):
        register_datasets(["blocks_train", "blocks_val"], blocks)
    assert len(DatasetCatalog.get("blocks_train")) == 8


def test_names_of_detectron2_are_not_taken(tmp_path):
    with pytest.raises(DataError, match=r"'voc_2007_val'.*dataset of Detectron2"):
        register_datasets([], [["voc_2007_val", str(tmp_path / "a.json"), str(tmp_path)]])


def test_detectron2s_own_sets_stay_as_they_are_and_missing_files_are_explained(monkeypatch, tmp_path):
    before = DatasetCatalog["coco_2017_val"]
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(DataError, match=r"coco_2017_val.*instances_val2017.json does not exist"):
        register_datasets(["coco_2017_val"])
    assert DatasetCatalog["coco_2017_val"] is before


def test_an_unknown_data_set_is_named():
    with pytest.raises(DataError, match="'blocks_tren' is not known"):
        register_datasets(["blocks_tren"])


def test_an_unsound_json_is_refused_before_anything_runs(own_set):
    def move_out(data):
        data["annotations"][1]["bbox"] = [30, 0, 300, 20]

    with pytest.raises(DataError, match=r"annotation 1 of image 7.*lies outside the image"):
        own_set("own_outside", move_out)
    assert "own_outside" not in DatasetCatalog


def test_the_number_of_classes_is_checked(own_set, tiny_cfg):
    own_set("own_two")
    check_classes(tiny_cfg(), ["own_two"])
    with pytest.raises(ConfigError, match=r"MODEL.FCOS.NUM_CLASSES: expected 2.*'own_two'.*got 3"):
        check_classes(tiny_cfg("fcos", {"MODEL.FCOS.NUM_CLASSES": 3}), ["own_two"])


def test_data_sets_of_a_run_have_the_same_classes(own_set, blocks, tiny_cfg):
    own_set("own_animals")
    register_datasets(["blocks_train"], blocks)
    with pytest.raises(ConfigError, match=r"'own_animals': expected the classes of 'blocks_train'.*'dog'.*'red'"):
        check_classes(tiny_cfg(), ["blocks_train", "own_animals"])


def test_a_broken_picture_is_named(own_set, tiny_cfg, tmp_path):
    own_set("own_broken")
    (record,) = DatasetCatalog.get("own_broken")
    mapper = NamingMapper(tiny_cfg(), is_train=True)
    assert mapper(record)["image"].shape[0] == 3

    picture = Path(record["file_name"])
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.png: the image cannot be read"):
        mapper(record)
    picture.unlink()
    with pytest.raises(DataError, match=r"a\.png: the image does not exist"):
        mapper(record)
    Image.new("RGB", (40, 60)).save(picture)
    with pytest.raises(DataError, match=r"a\.png: the image is 40 x 60 .*annotations say 60 x 40"):
        mapper(record)


def test_errors_that_are_not_the_pictures_pass_through(own_set, tiny_cfg):
    own_set("own_other")
    (record,) = DatasetCatalog.get("own_other")
    record["annotations"][0]["bbox_mode"] = None
    with pytest.raises(Exception, match="BoxMode|NoneType") as error:
        NamingMapper(tiny_cfg(), is_train=True)(record)
    assert not isinstance(error.value, DataError)


def test_the_evaluator_takes_files_without_area_and_iscrowd(own_set, tiny_cfg):
    own_set("own_scored")
    found = Instances((40, 60))
    found.pred_boxes = Boxes(torch.tensor([[10.0, 5.0, 30.0, 35.0], [30.0, 0.0, 60.0, 20.0]]))
    found.pred_classes = torch.tensor([1, 0])
    found.scores = torch.tensor([0.9, 0.8])
    evaluator = Trainer.build_evaluator(tiny_cfg(), "own_scored")
    evaluator.reset()
    evaluator.process([{"image_id": 7}], [{"instances": found}])
    metrics = evaluator.evaluate()["bbox"]
    assert metrics["AP"] == pytest.approx(100)
    assert metrics["AP-cat"] == pytest.approx(100)


POINTS = ["left_ear", "right_ear", "tail"]


def with_parts(data):
    """Masks of all kinds, and keypoints of the first object."""
    data["categories"][0]["keypoints"] = POINTS
    first, second = data["annotations"]
    first["segmentation"] = {"size": [40, 60], "counts": [405, 30, 1965]}  # a column of 30 pixels
    first["keypoints"] = [10, 5, 2, 29, 5, 1, 0, 0, 0]
    second["segmentation"] = [[30, 0, 60, 0, 60, 20]]


def test_masks_and_keypoints_have_detectron2s_form(own_set, tiny_cfg):
    own_set("own_parts", with_parts)
    metadata = MetadataCatalog.get("own_parts")
    assert metadata.keypoint_names == POINTS
    assert metadata.keypoint_flip_map == [("left_ear", "right_ear")]
    first, second = DatasetCatalog.get("own_parts")[0]["annotations"]
    assert first["keypoints"] == [10.5, 5.5, 2, 29.5, 5.5, 1, 0.5, 0.5, 0]
    assert len(second["keypoints"]) == 9
    assert not any(second["keypoints"][2::3])
    settings = {
        "MODEL.MASK_ON": True,
        "MODEL.KEYPOINT_ON": True,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 3,
        "TEST.KEYPOINT_OKS_SIGMAS": [0.1, 0.1, 0.1],
        "INPUT.MASK_FORMAT": "bitmask",
        "INPUT.MIN_SIZE_TRAIN": (40,),
        "INPUT.RANDOM_FLIP": "none",
        "DATASETS.TRAIN": ("own_parts",),
    }
    (record,) = DatasetCatalog.get("own_parts")
    instances = NamingMapper(tiny_cfg("faster_rcnn", settings), is_train=True)(record)["instances"]
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[5:35, 10] = True
    assert torch.equal(instances.gt_masks.tensor[0], mask)
    assert instances.gt_keypoints.tensor[0].tolist() == [[10.5, 5.5, 2], [29.5, 5.5, 1], [0, 0, 0]]
    # To evaluate, nothing is asked of the sets that were trained on.
    settings["DATASETS.TRAIN"] = ("not_registered",)
    assert "instances" not in NamingMapper(tiny_cfg("faster_rcnn", settings), is_train=False)(record)


def test_sets_that_others_register_have_names_once_they_are_needed(own_set, tiny_cfg, tmp_path):
    file = own_set("own_file", with_parts)
    for name, metadata in (("others_plain", {}), ("others_told", {"keypoint_names": ["a", "b", "c"]})):
        register_coco_instances(name, metadata, str(file), str(tmp_path))
        assert MetadataCatalog.get(name).get("thing_classes") is None
        register_datasets([name])
        check_classes(tiny_cfg(), [name, "own_file"])
    name_keypoints(["others_plain", "others_told"])
    plain, told = (MetadataCatalog.get(name) for name in ("others_plain", "others_told"))
    assert (plain.keypoint_names, plain.keypoint_flip_map) == (POINTS, [("left_ear", "right_ear")])
    assert (told.keypoint_names, told.keypoint_flip_map) == (["a", "b", "c"], [])
    register_coco_instances("others_gone", {}, str(tmp_path / "gone.json"), str(tmp_path))
    with pytest.raises(DataError, match=r"dataset 'others_gone' cannot be loaded .*gone.json"):
        register_datasets(["others_gone"])


def test_shapes_are_in_the_catalogs_and_drawn_when_they_are_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    spec = dataclasses.replace(SPECS["shapes_easy_val"], images=2, side=(64, 64), size=(16, 24))
    monkeypatch.setitem(SPECS, "shapes_tiny", spec)
    assert set(SPECS) - {"shapes_tiny"} <= set(DatasetCatalog.list())
    register_shapes()
    assert MetadataCatalog.get("shapes_tiny").thing_classes == ["circle", "triangle", "square"]
    assert not (tmp_path / "shapes").exists()
    evaluator = COCOEvaluator("shapes_tiny", output_dir=str(tmp_path / "evaluated"))  # before anything has loaded it
    assert len(evaluator._coco_api.imgs) == 2
    records = DatasetCatalog.get("shapes_tiny")
    assert len(records) == 2
    assert all(Path(record["file_name"]).is_file() for record in records)
    assert MetadataCatalog.get("shapes_tiny").thing_dataset_id_to_contiguous_id == {1: 0, 2: 1, 3: 2}
    DatasetCatalog.remove("shapes_tiny")
    MetadataCatalog.remove("shapes_tiny")
