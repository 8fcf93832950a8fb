"""COCO average precision, computed by pycocotools."""

import contextlib
import io
import logging
import math
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from dyhead.data.catalog import DatasetInfo
from dyhead.data.coco import area, is_crowd, read_json
from dyhead.data.errors import DataError

if TYPE_CHECKING:
    from pycocotools.coco import COCO

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_log = logging.getLogger(__name__)


def evaluate_coco(truth: DatasetInfo | str | os.PathLike, detections: Iterable[dict[str, Any]]) -> dict[str, float]:
    """COCO's average precision of boxes over all images of a dataset.

    Args:
        truth: a dataset, or its annotation file in COCO's format.
        detections: COCO's result dicts: image_id and category_id (both as in the file), bbox [x, y, width, height] in
            pixels, score.

    Returns:
        AP, AP50, AP75, APs, APm, APl, then `AP-<class>` for every class, all in percent; NaN where the dataset has no
        object of that class or size. Without detections all others are 0.

    Raises:
        DataError: the file is not in COCO's format; or a detection is incomplete, not finite, or of an image or a
            category that is not in the file.
    """
    # Imported here, so that speed can be measured without pycocotools.
    from pycocotools.cocoeval import COCOeval

    path = truth.json_file if isinstance(truth, DatasetInfo) else os.fspath(truth)
    data = read_json(path)
    categories = sorted(data["categories"], key=lambda category: category["id"])
    detections = _checked(detections, {i["id"] for i in data["images"]}, {c["id"] for c in categories}, path)

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        evaluator = COCOeval(_index(data, data["annotations"]), _index(data, detections), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    _log.debug("%s", printed.getvalue())

    percent = [100 * value if value >= 0 else math.nan for value in evaluator.stats[: len(METRICS)].tolist()]
    metrics = dict(zip(METRICS, percent, strict=True))
    for k, category in enumerate(categories):
        # precision: thresholds of overlap, recalls, classes, sizes (0: all), detections per image (last: 100)
        precision = evaluator.eval["precision"][:, :, k, 0, -1]
        known = precision[precision >= 0]
        metrics[f"AP-{category['name']}"] = 100 * float(np.mean(known)) if known.size else math.nan
    return metrics


def _index(data: dict[str, Any], annotations: list[dict[str, Any]]) -> "COCO":
    """pycocotools' index of copies of the annotations, with the fields that files other than COCO's own often lack.

    Ids start at 1, because pycocotools takes an object of id 0 for "no match".
    """
    from pycocotools.coco import COCO

    index = COCO()
    index.dataset = {key: data[key] for key in ("images", "categories")}
    index.dataset["annotations"] = [
        {**a, "area": area(a), "iscrowd": is_crowd(a), "id": i} for i, a in enumerate(annotations, 1)
    ]
    index.createIndex()
    return index


def _checked(detections: Iterable[dict], images: set, categories: set, path: str) -> list[dict[str, Any]]:
    kept = []
    for i, d in enumerate(detections):
        missing = [key for key in ("image_id", "category_id", "bbox", "score") if key not in d]
        if missing:
            raise DataError(f"detection {i}: expected image_id, category_id, bbox and score, got no {missing[0]}: {d}")
        if d["image_id"] not in images:
            raise DataError(f"detection {i}: {path} has no image with the id {d['image_id']!r}")
        if d["category_id"] not in categories:
            raise DataError(
                f"detection {i} of image {d['image_id']}: {path} has no category with the id {d['category_id']!r}"
            )
        box = [float(v) for v in d["bbox"]]
        if len(box) != 4 or not all(map(math.isfinite, [*box, d["score"]])):
            raise DataError(
                f"detection {i} of image {d['image_id']}: expected a finite box of 4 numbers and a finite score, "
                f"got {d['bbox']} and {d['score']}"
            )
        kept.append({key: d[key] for key in ("image_id", "category_id")} | {"bbox": box, "score": float(d["score"])})
    return kept
