# ruff: noqa: E402 (what needs Detectron2 is imported after the skip)
"""Detectron2's own meta-architectures in whole runs, on a set that somebody else has registered."""

import json

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN

from dyhead.config import ConfigError
from dyhead.detectron2 import Trainer, evaluation, main, setup

SMALL = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_dyhead_backbone",
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 8,
    "MODEL.SEM_SEG_HEAD.NORM": "",
    "DATASETS.REGISTER": [],
    "DATASETS.TRAIN": ("others",),
    "DATASETS.TEST": ("others",),
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.MAX_ITER": 1,
    "TEST.BENCHMARK.NUM_IMAGES": 0,
}


@pytest.fixture
def others(blocks, tmp_path):
    """The set "others", which tells its classes when it is loaded: `blocks_val` with masks, keypoints and stuff."""
    _, file, root = blocks[1]
    with open(file) as source:
        data = json.load(source)
    maps = {image["id"]: np.full((64, 96), 1, np.uint8) for image in data["images"]}
    for category in data["categories"]:
        category["keypoints"] = ["left", "right"]
    for a in data["annotations"]:
        x, y, w, h = a["bbox"]
        a["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        a["keypoints"] = [x, y + h // 2, 2, x + w - 1, y + h // 2, 2]
        maps[a["image_id"]][y : y + h, x : x + w] = 0
    (tmp_path / "others.json").write_text(json.dumps(data))
    for image_id, stuff in maps.items():
        stuff[:, 48:][stuff[:, 48:] == 1] = 2
        Image.fromarray(stuff).save(tmp_path / f"{image_id}.png")

    def load():
        records = load_coco_json(str(tmp_path / "others.json"), root, "others")
        return [record | {"sem_seg_file_name": str(tmp_path / f"{record['image_id']}.png")} for record in records]

    DatasetCatalog.register("others", load)
    metadata = MetadataCatalog.get("others")
    metadata.set(json_file=str(tmp_path / "others.json"), image_root=root, evaluator_type="coco")
    yield metadata
    DatasetCatalog.remove("others")
    MetadataCatalog.remove("others")


def tasks_of(folder):
    (result,) = json.loads((folder / "run" / "results.json").read_text())["results"]
    (line,) = [line for line in (folder / "run" / "metrics.json").read_text().splitlines() if "bbox/AP" in line]
    return result["tasks"], json.loads(line), (folder / "run" / "log.txt").read_text()


def test_masks_and_keypoints_of_generalized_rcnn_are_trained_and_reported(others, arguments, tmp_path):
    settings = SMALL | {
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.KEYPOINT_ON": True,
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 2,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (8,),
        "TEST.KEYPOINT_OKS_SIGMAS": [0.1, 0.1],
        "TEST.EXPECTED_RESULTS": [["segm", "AP", 50, 50], ["keypoints", "AP50", 50, 50]],
    }
    metrics = main(arguments(settings, "faster_rcnn"))
    tasks, line, log = tasks_of(tmp_path)
    assert list(tasks) == ["segm", "keypoints"]
    assert tasks["segm"]["AP"] == line["segm/AP"]
    assert tasks["keypoints"]["AP"] == line["keypoints/AP"]
    assert metrics["others"]["AP"] == line["bbox/AP"]
    for text in ("others/segm", "others/keypoints", "copypaste: Task: segm"):
        assert text in log
    found = json.loads((tmp_path / "run/inference/others/coco_instances_results.json").read_text())
    assert {"bbox", "segmentation", "keypoints"} <= set(found[0])


def test_mask_rcnn_is_evaluated_augmented_as_well(others, arguments, tmp_path):
    augmented = {"TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": (64,), "MODEL.META_ARCHITECTURE": "GeneralizedRCNN"}
    main(arguments(SMALL | augmented, "faster_rcnn"))
    tasks, _, log = tasks_of(tmp_path)
    assert list(tasks) == ["segm", "bbox_TTA", "segm_TTA"]
    assert "others/bbox_TTA" in log


def test_panoptic_fpn_has_its_semantic_segmentation_reported(others, arguments, tmp_path, monkeypatch):
    find = evaluation.importlib.util.find_spec
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None if "panoptic" in name else find(name))
    others.__dict__["evaluator_type"] = "coco_panoptic_seg"
    others.set(stuff_classes=["things", "left", "right"], ignore_label=255, panoptic_json="", panoptic_root="")
    main(arguments(SMALL | {"MODEL.META_ARCHITECTURE": "PanopticFPN"}, "faster_rcnn"))
    tasks, line, log = tasks_of(tmp_path)
    assert tasks["sem_seg"]["mIoU"] == line["sem_seg/mIoU"]
    assert "segm" in tasks
    assert "others/sem_seg: mIoU" in log
    assert log.count("Without panopticapi there is no panoptic quality on others; pip install git") == 1
    assert log.index("Without panopticapi") < log.index("Starting training")


@pytest.mark.parametrize(
    ("installed", "settings", "message"),
    [
        (None, {"TEST.EXPECTED_RESULTS": [["panoptic_seg", "PQ", 40.0, 1.0]]}, "EXPECTED_RESULTS: expected no panopti"),
        (True, {}, r"'others' has no panoptic segmentation to evaluate: its panoptic_root, 'nowhere', is not there"),
    ],
)
def test_panoptic_quality_that_cannot_be_had_is_named_before_the_training(
    others, arguments, tmp_path, monkeypatch, installed, settings, message
):
    others.__dict__["evaluator_type"] = "coco_panoptic_seg"
    others.set(stuff_classes=["things", "left", "right"], ignore_label=255, panoptic_root="nowhere")
    others.set(panoptic_json=others.json_file)
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: installed)
    with pytest.raises(ConfigError, match=message):
        main(arguments(SMALL | settings | {"MODEL.META_ARCHITECTURE": "PanopticFPN"}, "faster_rcnn"))
    assert not (tmp_path / "run" / "log.txt").exists()


def test_necks_that_nobody_reads_are_refused(tiny_cfg):
    plain = {"MODEL.META_ARCHITECTURE": "GeneralizedRCNN", "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone"}
    with pytest.raises(ConfigError, match=r"MODEL.NECKS \['DyHead'\]: GeneralizedRCNN does not know of necks: set"):
        Trainer.build_model(tiny_cfg("faster_rcnn", plain))
    assert isinstance(Trainer.build_model(tiny_cfg("faster_rcnn", plain | {"MODEL.NECKS": []})), GeneralizedRCNN)


def test_what_the_architecture_reads_is_left_as_it_is_and_other_detectors_keys_are_named(arguments, caplog):
    settings = SMALL | {"MODEL.META_ARCHITECTURE": "PanopticFPN", "MODEL.FCOS.NUM_CLASSES": 7}
    cfg = setup(arguments(settings, "faster_rcnn"))
    assert cfg.MODEL.MASK_ON is True
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    assert "PanopticFPN does not read: MODEL.FCOS.NUM_CLASSES 7" in caplog.text
    with pytest.raises(ConfigError, match="MODEL.META_ARCHITECTURE: expected one of .*GeneralizedRCNN.*, got 'YOLO'"):
        setup(arguments({"MODEL.META_ARCHITECTURE": "YOLO"}))


def test_an_architecture_of_a_users_own_runs(others, arguments, tmp_path):
    @META_ARCH_REGISTRY.register()
    class SomebodysRCNN(GeneralizedRCNN):
        pass

    settings = SMALL | {"MODEL.META_ARCHITECTURE": "SomebodysRCNN", "MODEL.MASK_ON": False}
    assert set(main(arguments(settings, "faster_rcnn"))) == {"others"}
    assert tasks_of(tmp_path)[0] == {}
