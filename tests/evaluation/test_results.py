"""What an evaluation leaves and says, on one picture and a detector that finds what it is told to."""

import json
import logging
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dyhead.config import ConfigError, check_config, load_config
from dyhead.data import DatasetInfo, load
from dyhead.evaluation import results
from dyhead.evaluation.expected import check_expectations
from dyhead.evaluation.report import write_json
from dyhead.evaluation.results import (
    check_weights,
    detections_file,
    evaluate_detections,
    report_evaluation,
    report_losses,
)
from dyhead.torchvision import get_cfg

CAT, DOG = ([0, 0, 50, 50], [60, 10, 20, 20])


@pytest.fixture
def split(tmp_path):
    """A picture of a cat and a dog."""
    return written(tmp_path, [(3, CAT), (8, DOG)])


def written(folder, objects, name="pets"):
    Image.fromarray(np.full((64, 96, 3), 128, np.uint8)).save(folder / "1.png")
    annotations = [
        {"id": i, "image_id": 2**70, "category_id": category, "bbox": box} for i, (category, box) in enumerate(objects)
    ]
    data = {
        "images": [{"id": 2**70, "file_name": "1.png", "height": 64, "width": 96}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}],
    }
    (folder / f"{name}.json").write_text(json.dumps(data | ({"annotations": annotations} if objects else {})))
    return load(DatasetInfo(name, str(folder / f"{name}.json"), str(folder)))


def found(*boxes):
    return [{"image_id": 2**70, "category_id": category, "bbox": box, "score": 0.9} for category, box in boxes]


@pytest.fixture
def cfg(tmp_path):
    """A function of settings, for one test set."""

    def configure(**settings):
        cfg = get_cfg()
        settings = {"OUTPUT_DIR": str(tmp_path / "run"), "TEST.BENCHMARK.NUM_IMAGES": 2, **settings}
        (tmp_path / "empty.yaml").write_text("{}")
        named = {"MODEL.META_ARCHITECTURE": "DyHeadFCOS", "MODEL.DEVICE": "cpu", "DATASETS.TEST": ("pets",), **settings}
        load_config(cfg, tmp_path / "empty.yaml", [str(part) for pair in named.items() for part in pair])
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        return cfg

    return configure


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, images):
        return [self.layer(image[:, :4, :4]) for image in images]


def inputs(count):
    return [torch.ones(3, 64, 96)] * min(count, 1)


def report(cfg, split, detections, inputs=inputs):
    evaluated = evaluate_detections(split, detections, cfg.OUTPUT_DIR)
    report_evaluation(cfg, Detector(), [evaluated], "engine 1.0", inputs)


def row(cfg):
    with open(os.path.join(cfg.OUTPUT_DIR, "results.json")) as file:
        (result,) = json.load(file)["results"]
    return result


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_evaluation_leaves_its_files_and_warns_of_nothing(cfg, split, caplog):
    cfg = cfg()
    report(cfg, split, found((3, CAT), (8, DOG)))
    assert row(cfg)["metrics"]["AP"] == row(cfg)["metrics"]["AP-cat"] == pytest.approx(100)
    assert row(cfg)["timing"]["calls"] == 1
    assert row(cfg)["parameters"] == 15
    assert row(cfg)["input_size"] == [64, 96]
    files = {str(path.relative_to(cfg.OUTPUT_DIR)) for path in Path(cfg.OUTPUT_DIR).rglob("*.*")}
    assert files == {"results.json", "predictions.png", "inference/pets/coco_instances_results.json"}
    with open(detections_file(cfg.OUTPUT_DIR, "pets")) as file:
        assert json.load(file) == found((3, CAT), (8, DOG))
    assert warnings(caplog) == []


def test_nothing_is_measured_where_no_images_are_asked_for(cfg, split, caplog):
    caplog.set_level(logging.INFO)
    cfg = cfg(**{"TEST.BENCHMARK.NUM_IMAGES": 0})
    check_config(cfg)
    report(cfg, split, found((3, CAT)), inputs=None)
    assert row(cfg)["metrics"]["AP-cat"] == pytest.approx(100)
    assert row(cfg)["timing"] is row(cfg)["gflops"] is row(cfg)["input_size"] is None
    assert warnings(caplog) == []
    (table,) = [message for message in caplog.messages if message.startswith("Results:")]
    assert table.splitlines()[3].split()[8:] == ["-", "-", "-", "-", "0.00", "-"]


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        ("measure", "Measuring the detector"),
        ("count_flops", "Measuring the detector"),
        ("draw_predictions", "Drawing .*predictions.png"),
    ],
)
def test_results_are_not_lost_to_what_comes_after_them(cfg, split, caplog, monkeypatch, broken, name):
    def fail(*args, **options):
        assert row(cfg)["metrics"]["AP"] == pytest.approx(100)  # there before
        raise RuntimeError("out of memory")

    cfg = cfg()
    monkeypatch.setattr(results, broken, fail)
    report(cfg, split, found((3, CAT), (8, DOG)))
    (message,) = warnings(caplog)
    assert re.match(f"{name} failed: RuntimeError: out of memory", message)
    assert row(cfg)["metrics"]["AP"] == pytest.approx(100)


def test_a_picture_that_is_gone_and_a_folder_in_the_way_are_named(cfg, split, tmp_path, caplog):
    cfg = cfg(**{"TEST.BENCHMARK.NUM_IMAGES": 0})
    (tmp_path / "1.png").unlink()
    (tmp_path / "run" / "losses.png").mkdir()
    (tmp_path / "run" / "metrics.json").write_text('{"iteration": 1, "total_loss": 2.0}\n')
    (tmp_path / "run" / "inference").write_text("in the way")
    report_losses(cfg)
    report(cfg, split, found((3, CAT), (8, DOG)))
    losses, detections, picture = warnings(caplog)
    assert "losses.png failed: IsADirectoryError" in losses
    assert "coco_instances_results.json: the detections cannot be written" in detections
    assert "1.png: the image does not exist" in picture
    assert row(cfg)["metrics"]["AP"] == pytest.approx(100)


def test_results_that_cannot_be_written_are_told(cfg, split, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    cfg = cfg()
    (tmp_path / "run" / "results.json").mkdir()
    with pytest.raises(ConfigError, match=r"OUTPUT_DIR .*run: results\.json cannot be written \(.*directory"):
        report(cfg, split, found((3, CAT), (8, DOG)))
    assert "DyHeadFCOS  pets     100.0" in caplog.text
    assert not list((tmp_path / "run").glob("*.partial"))


def test_no_detections_are_told_with_the_key(cfg, split, caplog):
    report(cfg(**{"MODEL.FCOS.SCORE_THRESH_TEST": 0.97}), split, [])
    (message,) = warnings(caplog)
    assert (
        "Dataset 'pets': there are no detections, so that AP is 0. Look at MODEL.FCOS.SCORE_THRESH_TEST (0.97"
        in message
    )
    caplog.clear()
    report(cfg(**{"MODEL.META_ARCHITECTURE": "DyHeadRCNN"}), split, [])
    assert "MODEL.ROI_HEADS.SCORE_THRESH_TEST (0.05" in warnings(caplog)[0]
    for others, told in (("RetinaNet", "MODEL.RETINANET.SCORE_THRESH_TEST (0.05"), ("Mine", "the least score of a")):
        caplog.clear()
        report(cfg(**{"MODEL.META_ARCHITECTURE": others}), split, [])
        assert f"Look at {told}" in warnings(caplog)[0]


def test_without_annotations_there_are_detections_and_no_ap(cfg, tmp_path, caplog):
    cfg = cfg()
    for detections in (found((3, CAT)), []):
        caplog.clear()
        report(cfg, written(tmp_path, []), detections)
        (message,) = warnings(caplog)
        assert message.startswith(
            "Dataset 'pets' has no annotated objects, so that there is no AP; the detections are in "
        )
        with open(message.split()[-1]) as file:
            assert json.load(file) == detections
        assert set(row(cfg)["metrics"]) == {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-cat", "AP-dog"}
        assert set(row(cfg)["metrics"].values()) == {None}
        assert row(cfg)["timing"] is not None


def test_more_objects_than_ap_counts_are_told_once(cfg, tmp_path, caplog):
    crowd = [(3, [i % 90, i % 60, 4, 4]) for i in range(101)]
    report(cfg(), written(tmp_path, crowd[:100]), found(*crowd[:1]))
    assert warnings(caplog) == []
    report(cfg(**{"TEST.DETECTIONS_PER_IMAGE": 150}), written(tmp_path, crowd), found(*crowd[:1]))
    (message,) = warnings(caplog)
    assert "AP counts at most the 100 best detections of a class in an image" in message
    assert f"TEST.DETECTIONS_PER_IMAGE is 150; image {2**70} of dataset 'pets' has 101 objects" in message


EXPECTED = "TEST.EXPECTED_RESULTS"


@pytest.mark.parametrize(
    "entry", [["bbox", "AP", 99.0, 1.5], ["pets", "AP-cat", 100, 0.01], ["pets/bbox", "AP50", 101, 1.01]]
)
def test_expected_results_are_reached(cfg, split, entry):
    cfg = cfg(**{EXPECTED: [entry]})
    check_config(cfg)
    check_expectations(cfg)
    report(cfg, split, found((3, CAT), (8, DOG)))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["bbox", "AP", 38.5, 0.2], r"expected AP of 38\.5 \+- 0\.2 on dataset 'pets', got 50\.0000"),
        (["pets", "AP-dog", 1, 0.5], r"expected AP-dog of 1 \+- 0\.5 on dataset 'pets', got 0\.0000"),
        (["bbox", "AP-bird", 0, 100], "expected AP-bird of .* but it has no such result"),
        (["bbox", "APl", 0, 100], "expected APl of .* but it has no such result"),
    ],
)
def test_expected_results_that_are_not_reached_end_the_run_after_all_is_written(cfg, split, entry, message, tmp_path):
    cfg = cfg(**{EXPECTED: [["bbox", "AP50", 50, 0.1], entry]})
    with pytest.raises(ConfigError, match=rf"TEST\.EXPECTED_RESULTS: {message}"):
        report(cfg, split, found((3, CAT)))
    assert row(cfg)["timing"] is not None
    assert (tmp_path / "run" / "predictions.png").exists()


@pytest.mark.parametrize(
    "value", [[["bbox", "AP", 1]], [["bbox", "AP", "1", 1]], [["bbox", "AP", 1, -1]], ["AP"], [[1, 2, 3, 4]], 5]
)
def test_expected_results_of_another_form_are_refused_before(cfg, value):
    cfg = cfg()
    cfg.TEST.EXPECTED_RESULTS = value
    with pytest.raises(ConfigError, match=r"EXPECTED_RESULTS: expected a list of \[task, metric, value, tolerance\]"):
        check_config(cfg)


@pytest.mark.parametrize(
    ("sets", "entry", "message"),
    [
        (("pets",), ["segm", "AP", 1, 1], "expected as the task 'bbox', got 'segm'"),
        (("pets", "zoo"), ["bbox", "AP", 1, 1], "expected as the task one of the test sets, 'pets', 'zoo', got 'bbox'"),
        ((), ["bbox", "AP", 1, 1], "expected as the task none without a test set"),
        (("pets",), ["bbox", "mAP", 1, 1], "expected the metric AP, AP50, .* or AP-<class>, got 'mAP'"),
    ],
)
def test_expected_results_of_what_is_not_evaluated_are_refused_before(cfg, sets, entry, message):
    with pytest.raises(ConfigError, match=message):
        check_expectations(cfg(**{"DATASETS.TEST": sets, EXPECTED: [entry]}))


def test_a_test_set_stands_once(cfg):
    check_config(cfg(**{"DATASETS.TEST": ("pets", "zoo"), "DATASETS.TRAIN": ("pets", "pets")}))
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST: expected each dataset once, got \('pets', 'zoo', 'pets'\)"):
        check_config(cfg(**{"DATASETS.TEST": ("pets", "zoo", "pets")}))


NAMES = [
    "coco_2017_val",
    "a/b",
    "a%2Fb",
    "a_b",
    "..",
    ".",
    "../up",
    "/top/of/all",
    "C:\\x",
    "x" * 300,
    "x" * 299,
    "画" * 100,
    "a\nb",
    "a\0b",
    ". ",
]


def test_detections_of_any_dataset_have_a_file_of_their_own_inside_the_folder(tmp_path):
    files = [detections_file(str(tmp_path), name) for name in NAMES]
    assert files[0] == str(tmp_path / "inference/coco_2017_val/coco_instances_results.json")
    for file in files:
        assert os.path.dirname(os.path.dirname(os.path.realpath(file))) == str(tmp_path / "inference")
        os.makedirs(os.path.dirname(file))  # each anew
        write_json([], file)


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x.json"
    write_json({"a": 1}, file)
    with pytest.raises(ValueError, match="JSON"):
        write_json({"b": [2, float("nan")]}, file)
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_no_numbers_are_not_evaluated(value):
    detector = Detector()
    check_weights(detector)
    with torch.no_grad():
        detector.layer.bias[1] = value
    with pytest.raises(ConfigError, match=r"1 of 2 tensors hold NaN or infinity, the first is layer\.bias"):
        check_weights(detector)


def test_an_expected_class_that_no_test_set_has_is_refused_once_the_sets_are_known(cfg):
    cfg = cfg(**{"DATASETS.TEST": ("pets", "zoo"), EXPECTED: [["zoo", "AP-cow", 1, 1]]})
    check_expectations(cfg, {"pets": ["cat"], "zoo": ["cow"]})
    message = r"expected AP-<class> with a class of dataset 'zoo' \(cat, dog\), got 'AP-cow'"
    with pytest.raises(ConfigError, match=message):
        check_expectations(cfg, {"pets": ["cow"], "zoo": ["cat", "dog"]})
