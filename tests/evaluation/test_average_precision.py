import json
import math

import pytest

from dyhead.data import DataError
from dyhead.evaluation import evaluate_coco


@pytest.fixture
def truth(tmp_path):
    """Two images, two cats (sides of 50 and 20 pixels), a dog, and a class without objects; cats' ids begin at 0."""
    data = {
        "images": [{"id": 1, "width": 200, "height": 100}, {"id": 2, "width": 200, "height": 100}],
        "categories": [{"id": 7, "name": "dog"}, {"id": 5, "name": "cat"}, {"id": 6, "name": "bird"}],
        "annotations": [
            {"id": 0, "image_id": 1, "category_id": 5, "bbox": [0, 0, 50, 50]},
            {"id": 1, "image_id": 2, "category_id": 5, "bbox": [100, 0, 20, 20], "area": 400, "iscrowd": 0},
            {"id": 2, "image_id": 2, "category_id": 7, "bbox": [10, 10, 40, 40]},
        ],
    }
    (tmp_path / "truth.json").write_text(json.dumps(data))
    return tmp_path / "truth.json"


def detection(image, category, box, score=0.9):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


CAT, KITTEN, DOG = [0, 0, 50, 50], [100, 0, 20, 20], [10, 10, 40, 40]


def test_perfect_detections_score_100(truth):
    metrics = evaluate_coco(truth, [detection(1, 5, CAT), detection(2, 5, KITTEN), detection(2, 7, DOG)])
    assert list(metrics) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP-cat", "AP-bird", "AP-dog"]
    without = {"APl", "AP-bird"}  # no object is larger than 96 x 96 pixels, and none is a bird
    assert {key for key, value in metrics.items() if math.isnan(value)} == without
    assert [value for key, value in metrics.items() if key not in without] == pytest.approx([100] * 7)


def test_no_detections_score_0(truth):
    metrics = evaluate_coco(truth, [])
    assert {value for value in metrics.values() if not math.isnan(value)} == {0.0}
    assert math.isnan(metrics["AP-bird"])


def test_a_box_counts_at_the_overlaps_it_reaches(truth):
    # The dog's box, 28 of 40 pixels wide: an overlap of 0.7 reaches 0.5, 0.55, 0.6, 0.65 and 0.7 of the ten thresholds.
    metrics = evaluate_coco(truth, [detection(2, 7, [10, 10, 28.001, 40])])
    assert metrics["AP-dog"] == pytest.approx(50)
    assert metrics["AP50"] == pytest.approx(50)  # the mean of a found dog and no cats
    assert metrics["AP75"] == 0


def test_half_of_the_objects_score_half(truth):
    # 51 of the 101 recalls from 0 to 1 are at most 0.5.
    assert evaluate_coco(truth, [detection(1, 5, CAT)])["AP-cat"] == pytest.approx(100 * 51 / 101)


def test_a_surer_false_detection_halves_the_precision(truth):
    wrong = detection(1, 7, CAT, score=0.95)
    assert evaluate_coco(truth, [wrong, detection(2, 7, DOG)])["AP-dog"] == pytest.approx(50)
    wrong["score"] = 0.1
    assert evaluate_coco(truth, [wrong, detection(2, 7, DOG)])["AP-dog"] == pytest.approx(100)


def test_crowds_are_neither_hits_nor_misses(truth):
    data = json.loads(truth.read_text())
    data["annotations"][2]["iscrowd"] = 1
    data["annotations"].append({"id": 3, "image_id": 1, "category_id": 7, "bbox": [0, 0, 30, 30]})
    truth.write_text(json.dumps(data))
    found = [detection(1, 7, [0, 0, 30, 30], 0.5), detection(2, 7, [12, 12, 8, 8]), detection(2, 7, [30, 30, 8, 8])]
    assert evaluate_coco(truth, found)["AP-dog"] == pytest.approx(100)


def test_nothing_is_printed(truth, capsys):
    evaluate_coco(truth, [detection(1, 5, CAT)])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (detection(3, 5, CAT), "detection 1: .*truth.json has no image with the id 3"),
        (detection(1, 2, CAT), "detection 1 of image 1: .*truth.json has no category with the id 2"),
        (detection(1, 5, [0, 0, math.nan, 1]), "detection 1 of image 1: expected a finite box"),
        (detection(1, 5, [0, 0, 1]), "expected a finite box of 4 numbers"),
        (detection(1, 5, CAT, math.inf), "a finite score, got .* and inf"),
        ({"image_id": 1, "category_id": 5, "bbox": CAT}, "got no score"),
    ],
)
def test_a_wrong_detection_is_named(truth, found, message):
    with pytest.raises(DataError, match=message):
        evaluate_coco(truth, [detection(1, 5, CAT), found])
