# ruff: noqa: E402 (what needs Detectron2 is imported after the skip)
"""The evaluator beside Detectron2's own, on detections that need no detector."""

import copy
import json
import math

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventWriter

from dyhead.config import ConfigError
from dyhead.detectron2.evaluation import InstanceEvaluator
from dyhead.detectron2.trainer import Dispensable

IDS = {"as usual": lambda i: i + 1, "beyond 64 bits beside small ones": lambda i: 2**63 + i if i % 2 else i}


@pytest.fixture
def catalog():
    """The catalogs, which forget what a test registers."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)


def annotated(image_id=IDS["as usual"]):
    """An annotation file's content, and for each image a model's input and output that find most of it."""
    rng = np.random.default_rng(3)
    images, annotations, inputs, outputs = [], [], [], []
    for i in range(8):
        images.append({"id": image_id(i), "file_name": f"{i}.png", "width": 200, "height": 150})
        boxes, classes = [], []
        for _ in range(6):
            x, y = rng.uniform(0, 90, 2)
            w, h = rng.uniform(5, 60, 2)
            label = int(rng.integers(2))
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id(i), "category_id": (7, 4)[label], "iscrowd": 0}
                | {"bbox": [x, y, w, h], "area": w * h}
            )
            if rng.random() < 0.8:
                boxes.append(np.array([x, y, x + w, y + h]) + rng.normal(0, 2, 4))
                classes.append(1 - label if rng.random() < 0.9 else label)  # class 0 is the one of id 4
        instances = Instances((150, 200))
        instances.pred_boxes = Boxes(torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32))
        instances.scores = torch.tensor(rng.random(len(boxes)), dtype=torch.float32)
        instances.pred_classes = torch.tensor(classes)
        inputs.append({"image_id": image_id(i), "file_name": f"{i}.png", "height": 150, "width": 200})
        outputs.append({"instances": instances})
    categories = [{"id": 7, "name": "seven"}, {"id": 4, "name": "four"}]
    return {"images": images, "annotations": annotations, "categories": categories}, inputs, outputs


def evaluated(evaluator, inputs, outputs):
    evaluator.reset()
    for start in range(0, len(inputs), 3):
        evaluator.process(inputs[start : start + 3], outputs[start : start + 3])
    return evaluator.evaluate()


def test_ap_is_that_of_detectron2_also_by_class(catalog, tmp_path):
    data, inputs, outputs = annotated()
    (tmp_path / "truth.json").write_text(json.dumps(data))
    register_coco_instances("mine", {}, str(tmp_path / "truth.json"), str(tmp_path))
    DatasetCatalog.get("mine")  # sets the classes
    theirs = COCOEvaluator("mine", distributed=False, use_fast_impl=False, output_dir=str(tmp_path / "theirs"))
    expected = evaluated(theirs, copy.deepcopy(inputs), copy.deepcopy(outputs))["bbox"]
    assert 5 < expected["AP"] < 95
    results = evaluated(InstanceEvaluator("mine", str(tmp_path)), inputs, outputs)
    assert dict(results) == {"bbox": pytest.approx(dict(expected), nan_ok=True)}
    written = json.loads((tmp_path / "inference/mine/coco_instances_results.json").read_text())
    assert written == json.loads((tmp_path / "theirs/coco_instances_results.json").read_text())
    assert results.evaluated.detections == written
    record = results.evaluated.split.records[0]
    x, y, w, h = data["annotations"][0]["bbox"]
    assert record["annotations"][0]["bbox"] == pytest.approx([x, y, x + w, y + h])
    # The classes are ordered by their ids.
    label = (4, 7).index(data["annotations"][0]["category_id"])
    assert record["annotations"][0]["category_id"] == label
    assert results.evaluated.split.class_names == ["four", "seven"]


def with_masks_and_keypoints(data, outputs, count=5):
    """Polygons and ``count`` keypoints for every object, and for every detection a mask and keypoints near to them."""
    rng = np.random.default_rng(5)
    for category in data["categories"]:
        category["keypoints"] = [f"point {k}" for k in range(count)]
    for a in data["annotations"]:
        x, y, w, h = a["bbox"]
        a["segmentation"] = [[x, y, x + w, y, x + w / 2, y + h]]  # a triangle
        points = rng.uniform((x, y), (x + w, y + h), (count, 2))
        a["keypoints"] = np.column_stack([points, rng.integers(0, 3, count)]).flatten().tolist()
        a["num_keypoints"] = sum(v > 0 for v in a["keypoints"][2::3])
    for image, output in zip(data["images"], outputs, strict=True):
        found = output["instances"]
        objects = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        masks, points = torch.zeros((len(found), 150, 200), dtype=torch.bool), torch.zeros((len(found), count, 3))
        rows, columns = torch.arange(150)[:, None] + 0.5, torch.arange(200)[None] + 0.5
        for i, (x0, y0, x1, y1) in enumerate(found.pred_boxes.tensor.tolist()):
            depth = (rows - y0) / (y1 - y0) / 2
            masks[i] = (
                (rows > y0) & (rows < y1) & (columns > x0 + depth * (x1 - x0)) & (columns < x1 - depth * (x1 - x0))
            )
            nearest = min(objects, key=lambda a: abs(a["bbox"][0] - x0) + abs(a["bbox"][1] - y0))
            own = np.array(nearest["keypoints"]).reshape(count, 3)
            own[:, :2] += 0.5 + rng.normal(0, 2, (count, 2))
            own[:, 2] = rng.random(count)
            points[i] = torch.tensor(own)
        found.pred_masks, found.pred_keypoints = masks, points


@pytest.mark.parametrize("count", [5, 17])
def test_the_ap_of_masks_and_keypoints_is_that_of_detectron2(catalog, tmp_path, count):
    data, inputs, outputs = annotated()
    with_masks_and_keypoints(data, outputs, count)
    (tmp_path / "truth.json").write_text(json.dumps(data))
    register_coco_instances("mine", {}, str(tmp_path / "truth.json"), str(tmp_path))
    DatasetCatalog.get("mine")
    sigmas = [0.05 + 0.01 * k for k in range(count)] if count != 17 else []
    theirs = COCOEvaluator("mine", distributed=False, use_fast_impl=False, kpt_oks_sigmas=sigmas)
    expected = evaluated(theirs, copy.deepcopy(inputs), copy.deepcopy(outputs))
    results = evaluated(InstanceEvaluator("mine", str(tmp_path), sigmas=sigmas), inputs, outputs)
    assert list(results) == ["bbox", "segm", "keypoints"]
    for task in results:
        assert 5 < expected[task]["AP"] < 95
        assert dict(results[task]) == pytest.approx(dict(expected[task]), nan_ok=True), task
    assert results.evaluated.tasks == {
        task: pytest.approx(results[task], nan_ok=True) for task in ("segm", "keypoints")
    }
    record = results.evaluated.split.records[0]["annotations"][0]
    assert record["keypoints"] == pytest.approx(data["annotations"][0]["keypoints"])  # Detectron2 adds half a pixel


def test_a_detector_of_no_objects_is_named(catalog, tmp_path):
    DatasetCatalog.register("none", lambda: [])
    MetadataCatalog.get("none").set(thing_classes=["seven"])
    evaluator = InstanceEvaluator("none", str(tmp_path))
    with pytest.raises(ConfigError, match=r"META_ARCHITECTURE: expected one that detects objects.*'proposals'"):
        evaluator.process([{"image_id": 1}], [{"proposals": None}])


def test_ids_of_any_size_give_the_same_ap_and_come_back(catalog, tmp_path):
    results = {}
    for kind, change in IDS.items():
        data, inputs, outputs = annotated(change)
        (tmp_path / f"{kind}.json").write_text(json.dumps(data))
        DatasetCatalog.register(kind, lambda data=data: [{**i, "image_id": i["id"]} for i in data["images"]])
        MetadataCatalog.get(kind).set(
            json_file=str(tmp_path / f"{kind}.json"),
            thing_classes=["four", "seven"],
            thing_dataset_id_to_contiguous_id={4: 0, 7: 1},
        )
        results[kind] = evaluated(InstanceEvaluator(kind, str(tmp_path)), inputs, outputs)
        found = {d["image_id"] for d in results[kind].evaluated.detections}
        assert found <= {change(i) for i in range(8)}
        assert len(found) > 4
    first, second = results.values()
    assert first == second


def test_a_set_of_records_without_a_file_is_evaluated_too(catalog, tmp_path):
    data, inputs, outputs = annotated()
    (tmp_path / "truth.json").write_text(json.dumps(data))
    records = []
    for image in data["images"]:
        own = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        objects = [
            {"bbox": a["bbox"], "bbox_mode": BoxMode.XYWH_ABS, "category_id": (4, 7).index(a["category_id"])}
            for a in own
        ]
        records.append({**image, "image_id": image["id"], "annotations": objects})
    DatasetCatalog.register("records", lambda: copy.deepcopy(records))
    MetadataCatalog.get("records").set(thing_classes=["four", "seven"])
    register_coco_instances("file", {}, str(tmp_path / "truth.json"), str(tmp_path))
    DatasetCatalog.get("file")
    found, expected = (
        evaluated(InstanceEvaluator(name, str(tmp_path)), inputs, outputs) for name in ("records", "file")
    )
    assert found["bbox"] == pytest.approx(expected["bbox"], abs=0.01, nan_ok=True)  # its boxes are rounded
    assert {d["category_id"] for d in found.evaluated.detections} == {0, 1}


def test_one_class_has_its_ap_and_no_detections_are_zero(catalog, tmp_path):
    data, inputs, outputs = annotated()
    data["categories"] = data["categories"][1:]
    data["annotations"] = [a for a in data["annotations"] if a["category_id"] == 4]
    (tmp_path / "truth.json").write_text(json.dumps(data))
    register_coco_instances("one", {}, str(tmp_path / "truth.json"), str(tmp_path))
    DatasetCatalog.get("one")
    nothing = [{"instances": output["instances"][:0]} for output in outputs]
    metrics = evaluated(InstanceEvaluator("one", str(tmp_path)), inputs, nothing)["bbox"]
    assert list(metrics) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP-four"]
    assert {value for value in metrics.values() if not math.isnan(value)} == {0.0}


def test_a_writer_that_fails_does_not_end_the_run(caplog):
    class Full(EventWriter):
        def write(self):
            raise OSError("No space left on device")

        def close(self):
            raise AssertionError("it has failed before")

    writer = Dispensable(Full())
    writer.write()
    writer.write()
    writer.close()
    (record,) = caplog.records
    assert record.getMessage() == "Full writes nothing any more (OSError: No space left on device)"
