import json
import math

import pytest
import torch

from dyhead.data import DataError
from dyhead.evaluation import coco_results, evaluate_coco


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


@pytest.mark.parametrize("seed", range(4))
def test_ap_is_that_of_pycocotools(busy, pycocotools_ap, tmp_path, seed):
    data, found = busy(seed)
    expected, by_class = pycocotools_ap(data, found, tmp_path)
    assert 5 < expected[0] < 95
    metrics = evaluate_coco(data, found)
    assert list(metrics.values())[:6] == expected
    assert [metrics[f"AP-class {key}"] for key in by_class] == list(by_class.values())


IDS = {
    "beyond 64 bits": lambda i: 2**100 + i,
    "beyond 63 bits beside small ones": lambda i: 2**63 + i if i % 3 else i,
    "neighbours that are one number as float64": lambda i: 2**53 + i,
    "negative": lambda i: i - 500,
    "text": lambda i: f"{i:03d}",
    "text of numbers of any length": str,
    "any script": lambda i: f"画像 {i}",
    "numbers and their text": lambda i: i if i % 2 else str(i - 1),
    "floats": float,
}


@pytest.mark.parametrize("kind", IDS)
def test_ids_of_any_kind_and_size_give_the_same_ap(busy, kind):
    data, found = busy()
    for i, d in enumerate(found):
        d["score"] += 1e-6 * i  # where scores are equal, the order of the images decides, which is the ids'
    expected = evaluate_coco(data, found)
    change = IDS[kind]
    for section, key in (("images", "id"), ("annotations", "image_id")):
        for entry in data[section]:
            entry[key] = change(entry[key])
    found = [{**d, "image_id": change(d["image_id"])} for d in found]
    assert evaluate_coco(data, found) == expected


def test_categories_ids_of_any_kind_too(busy):
    data, found = busy()
    expected = evaluate_coco(data, found)
    for section, key in (("categories", "id"), ("annotations", "category_id")):
        for entry in data[section]:
            entry[key] += 2**64
    assert evaluate_coco(data, [{**d, "category_id": d["category_id"] + 2**64} for d in found]) == expected


def test_without_annotations_nothing_is_defined(truth):
    data = json.loads(truth.read_text())
    for none in ({}, {"annotations": []}, {"annotations": None}):
        metrics = evaluate_coco(
            {"images": data["images"], "categories": data["categories"]} | none, [detection(1, 5, CAT)]
        )
        assert list(metrics) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP-cat", "AP-bird", "AP-dog"]
        assert all(map(math.isnan, metrics.values()))


def test_classes_that_are_called_like_metrics_or_like_each_other_keep_their_results(truth):
    data = json.loads(truth.read_text())
    for category, name in zip(data["categories"], ("50", "AP50", "50"), strict=True):
        category["name"] = name
    metrics = evaluate_coco(data, [detection(1, 5, CAT), detection(2, 5, KITTEN)])
    assert list(metrics)[6:] == ["AP-AP50", "AP-50 (6)", "AP-50 (7)"]
    assert metrics["AP-AP50"] == pytest.approx(100)
    assert metrics["AP50"] == pytest.approx(50)
    assert metrics["AP-50 (7)"] == 0


def test_the_101st_detection_of_a_class_does_not_count(truth):
    wrong = [detection(1, 7, CAT, 0.9)] * 99
    assert evaluate_coco(truth, [*wrong, detection(2, 7, DOG, 0.5)])["AP-dog"] == pytest.approx(1)
    elsewhere = [detection(2, 7, KITTEN, 0.9)] * 100
    assert evaluate_coco(truth, [*elsewhere, detection(2, 7, DOG, 0.5)])["AP-dog"] == 0


@pytest.mark.parametrize(
    "broken",
    [
        {"images": [{}]},
        {"annotations": [{"image_id": 1, "category_id": 5}]},
        {"annotations": [{"image_id": 1, "category_id": 5, "bbox": [0, 0, 5, 5], "iscrowd": "no"}]},
        {"annotations": [{"image_id": 1, "category_id": 5, "bbox": [0, 0, 5, 5], "iscrowd": math.inf}]},
        {"annotations": [{"image_id": 1, "category_id": 5, "bbox": [0, 0, 5, 5], "area": "large"}]},
    ],
)
def test_annotations_of_another_form_are_an_error(truth, broken):
    with pytest.raises(DataError, match="the annotations: not in COCO's format"):
        evaluate_coco(json.loads(truth.read_text()) | broken, [])


def test_result_dicts_have_the_ids_of_the_file_and_no_empty_boxes():
    boxes = torch.tensor([[1.0, 2.0, 11.0, 22.0], [5.0, 5.0, 5.0, 9.0], [5.0, 9.0, 8.0, 5.0], [0.5, 0.0, 1.0, 1.0]])
    scores, labels = torch.tensor([0.5, 0.75, 0.25, 1.0]), torch.tensor([1, 0, 0, 0])
    assert coco_results(2**70, [2**65, "b"], boxes, scores, labels) == [
        {"image_id": 2**70, "category_id": "b", "bbox": [1.0, 2.0, 10.0, 20.0], "score": 0.5},
        {"image_id": 2**70, "category_id": 2**65, "bbox": [0.5, 0.0, 0.5, 1.0], "score": 1.0},
    ]
    assert coco_results(1, [1], torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)) == []


def test_a_box_that_is_not_a_number_is_not_dropped_in_silence(truth):
    boxes = torch.tensor([[0.0, math.nan, 50.0, 50.0]])
    found = coco_results(1, [5], boxes, torch.ones(1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(DataError, match="detection 0 of image 1: expected a finite box"):
        evaluate_coco(truth, found)


def square(x, y, side):
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def rle(x, y, w, h, height=100, width=200):
    """Uncompressed RLE of a box: runs of 0 and 1 in turn, column by column."""
    mask = [x <= column < x + w and y <= row < y + h for column in range(width) for row in range(height)]
    counts, last, run = [], False, 0
    for value in mask:
        if value != last:
            counts, last, run = [*counts, run], value, 0
        run += 1
    return {"size": [height, width], "counts": [*counts, run]}


@pytest.fixture
def masked(truth):
    """The truth of `truth` with masks: a polygon that fills the box, RLE of the same, and RLE of half the dog's box."""
    data = json.loads(truth.read_text())
    data["annotations"][0]["segmentation"] = square(0, 0, 50)
    data["annotations"][1]["segmentation"] = rle(100, 0, 20, 20)
    data["annotations"][2]["segmentation"] = rle(10, 10, 40, 20)
    return data


def mask(x, y, w, h):
    grid = torch.zeros(1, 100, 200, dtype=torch.bool)
    grid[0, y : y + h, x : x + w] = True
    return grid


def found(image, category, box, grid):
    x, y, w, h = box
    boxes, scores, labels = torch.tensor([[x, y, x + w, y + h]]), torch.tensor([0.9]), torch.tensor([0])
    return coco_results(image, [category], boxes, scores, labels, masks=grid)


def test_masks_are_compared_whatever_the_boxes(masked):
    right = found(1, 5, (3, 3, 9, 9), mask(0, 0, 50, 50)) + found(2, 5, KITTEN, mask(100, 0, 20, 20))
    metrics = evaluate_coco(masked, right + found(2, 7, DOG, mask(10, 10, 40, 20)), "segm")
    assert metrics["AP"] == pytest.approx(100)
    assert list(metrics)[:6] == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    # The dog's whole box is twice its mask: an overlap of 0.5 reaches one of ten thresholds.
    metrics = evaluate_coco(masked, right + found(2, 7, DOG, mask(10, 10, 40, 40)), "segm")
    assert (metrics["AP-cat"], metrics["AP-dog"]) == pytest.approx((100, 10))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, r"annotation 2 of image 2: expected polygons or RLE"),
        ([], r"annotation 2 of image 2: expected polygons or RLE"),
        (rle(0, 0, 4, 4, height=90), r"annotation 2 of image 2: expected RLE of the size of its image, \(100, 200\)"),
    ],
)
def test_objects_without_a_mask_are_named_where_masks_are_evaluated(masked, segmentation, message):
    masked["annotations"][2]["segmentation"] = segmentation
    with pytest.raises(DataError, match=message):
        evaluate_coco(masked, [], "segm")
    assert evaluate_coco(masked, [])["AP"] == 0


def test_detections_without_a_mask_are_named(masked):
    with pytest.raises(DataError, match="detection 0: expected image_id, .* and segmentation, got no segmentation"):
        evaluate_coco(masked, [detection(1, 5, CAT)], "segm")


def test_keypoints_count_by_their_distance_and_sigmas(truth):
    data = json.loads(truth.read_text())
    data["annotations"] = data["annotations"][2:]  # the dog, of 1600 pixels
    data["annotations"][0]["keypoints"] = [20, 20, 2, 30, 40, 1, 0, 0, 0]  # two that are there
    sigmas = (0.1, 0.2, 0.05)

    def average(dx, dy):
        points = torch.tensor([[[20.5 + dx, 20.5, 0.3], [30.5, 40.5 + dy, 0.4], [90.0, 90.0, 0.1]]])
        boxes = torch.tensor([[10.0, 10.0, 50.0, 50.0]])
        results = coco_results(2, [7], boxes, torch.tensor([0.9]), torch.tensor([0]), keypoints=points)
        metrics = evaluate_coco(data, results, "keypoints", sigmas=sigmas)
        assert list(metrics) == ["AP", "AP50", "AP75", "APm", "APl", "AP-cat", "AP-bird", "AP-dog"]
        return metrics["AP-dog"]

    assert average(0, 0) == pytest.approx(100)
    for dx, dy in ((4, 0), (0, 12), (5, 9)):
        # COCO's object keypoint similarity, of the points that are there.
        similarity = sum(
            math.exp(-(d**2) / (2 * 1600 * (2 * s) ** 2)) / 2 for d, s in zip((dx, dy), sigmas[:2], strict=True)
        )
        reached = sum(similarity >= 0.5 + 0.05 * t for t in range(10))
        assert average(dx, dy) == pytest.approx(10 * reached)
        assert 0 < reached < 10
    with pytest.raises(DataError, match="expected keypoints of 17 times x, y and visibility, got 9 numbers"):
        evaluate_coco(data, [], "keypoints")
