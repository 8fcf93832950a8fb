"""A small data set without images, and its annotation file."""

import json

import numpy as np
import pytest


@pytest.fixture
def busy():
    """A function of seeds: content of an annotation file of 12 images and 3 classes, and detections, some of them good.

    Scores are of two digits, so that many are equal.
    """

    def make(seed=0):
        rng = np.random.default_rng(seed)
        image_ids, category_ids = (rng.permutation(900)[:n].tolist() for n in (12, 3))
        annotations, detections = [], []
        for image in image_ids:
            for _ in range(int(rng.integers(1, 9))):
                category = category_ids[int(rng.integers(3))]
                x, y, w, h = (float(v) for v in rng.uniform((0, 0, 4, 4), (150, 150, 150, 150)))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": category,
                        "bbox": [x, y, w, h],
                        "area": w * h * float(rng.uniform(0.5, 1)),
                        "iscrowd": int(rng.random() < 0.1),
                    }
                )
                for _ in range(int(rng.integers(0, 4))):
                    dx, dy, dw, dh = (float(v) for v in rng.normal(0, 3, 4))
                    other = category_ids[int(rng.integers(3))]
                    detections.append(
                        {
                            "image_id": image,
                            "category_id": category if rng.random() < 0.8 else other,
                            "bbox": [x + dx, y + dy, max(w + dw, 1.0), max(h + dh, 1.0)],
                            "score": round(float(rng.random()), 2),
                        }
                    )
        images = [{"id": i, "file_name": f"{i}.png", "width": 300, "height": 300} for i in image_ids]
        categories = [{"id": k, "name": f"class {k}"} for k in category_ids]
        return {"images": images, "annotations": annotations, "categories": categories}, detections

    return make


@pytest.fixture
def pycocotools_ap():
    """A function from annotations and detections to pycocotools' AP, AP50, ..., and its AP of each class by id."""
    COCO = pytest.importorskip("pycocotools.coco").COCO
    COCOeval = pytest.importorskip("pycocotools.cocoeval").COCOeval

    def evaluate(data, detections, tmp_path):
        (tmp_path / "reference.json").write_text(json.dumps(data))
        truth = COCO(str(tmp_path / "reference.json"))
        evaluator = COCOeval(truth, truth.loadRes(json.loads(json.dumps(detections))), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        precision = evaluator.eval["precision"]  # thresholds, recalls, classes, sizes, limits
        classes = {}
        for k, category in enumerate(evaluator.params.catIds):
            known = precision[:, :, k, 0, 2]
            known = known[known > -1]
            classes[int(category)] = 100 * known.mean() if known.size else float("nan")
        return [100 * value for value in evaluator.stats[:6]], classes

    return evaluate
