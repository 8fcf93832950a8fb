"""COCO average precision, computed by pycocotools."""

import contextlib
import io
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dyhead.data.catalog import DatasetInfo
from dyhead.data.coco import area, is_crowd, read_json
from dyhead.data.errors import DataError

if TYPE_CHECKING:
    from pycocotools.coco import COCO

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
LIMIT = 100  # detections of a class in an image that count, pycocotools' own
_log = logging.getLogger(__name__)


def evaluate_coco(
    truth: DatasetInfo | str | os.PathLike | dict[str, Any], detections: Iterable[dict[str, Any]]
) -> dict[str, float]:
    """COCO's average precision of boxes over all images of a dataset.

    At most 100 detections of a class count in an image, the best.

    Args:
        truth: a dataset, its annotation file in COCO's format, or the content of one.
        detections: COCO's result dicts: image_id and category_id (both as in the file), bbox [x, y, width, height] in
            pixels, score.

    Returns:
        AP, AP50, AP75, APs, APm, APl, then `AP-<class>` for every class, all in percent; NaN where the dataset has no
        object of that class or size, which is everywhere if it has no annotations. Without detections all others are 0.
        Of classes of one name, each has its id as well: `AP-<class> (<id>)`.

    Raises:
        DataError: the file is not in COCO's format; or a detection is incomplete, not finite, or of an image or a
            category that is not in the file.
    """
    # Imported here, so that speed can be measured without pycocotools.
    from pycocotools.cocoeval import COCOeval

    if isinstance(truth, dict):
        path, data = "the annotations", truth
    else:
        path = truth.json_file if isinstance(truth, DatasetInfo) else os.fspath(truth)
        data = read_json(path)
    try:
        images, categories = (_places(data[section]) for section in ("images", "categories"))
        annotations = [
            {"bbox": a["bbox"], "area": area(a), "iscrowd": is_crowd(a)} | _place(a, images, categories)
            for a in data.get("annotations") or ()
            if a["image_id"] in images and a["category_id"] in categories
        ]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not in COCO's format ({type(error).__name__}: {error})") from error
    found = _checked(detections, images, categories, path)

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        truth_index, found_index = (_index(len(images), len(categories), boxes) for boxes in (annotations, found))
        evaluator = COCOeval(truth_index, found_index, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    _log.debug("%s", printed.getvalue())

    percent = [100 * value if value >= 0 else math.nan for value in evaluator.stats[: len(METRICS)].tolist()]
    metrics = dict(zip(METRICS, percent, strict=True))
    for k, name in enumerate(_class_names(data["categories"], categories)):
        # precision: thresholds of overlap, recalls, classes, sizes (0: all), detections per image (last: 100)
        precision = evaluator.eval["precision"][:, :, k, 0, -1]
        known = precision[precision >= 0]
        metrics[f"AP-{name}"] = 100 * float(np.mean(known)) if known.size else math.nan
    return metrics


def coco_results(
    image_id: Any, category_ids: Sequence[Any], boxes: Tensor, scores: Tensor, labels: Tensor
) -> list[dict[str, Any]]:
    """COCO's result dicts of the detections in one image; boxes without width or height are none.

    Args:
        image_id: the file's.
        category_ids: the ids in the file, by class.
        boxes: (D, 4) as x0, y0, x1, y1 in pixels of the image as it is in its file.
        scores: (D,).
        labels: (D,), 0 to K - 1.
    """
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for box, label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist(), strict=True)
        if not (box[2] <= 0 or box[3] <= 0)  # but what is NaN is an error of evaluate_coco
    ]


def _places(entries: list[dict[str, Any]]) -> dict[Any, int]:
    """0, 1, ... by the ids of images or categories, in their order: numbers first, then text.

    pycocotools sorts ids in NumPy's arrays, where those from 2^63 on are rounded and text changes numbers into text.
    """
    ids = sorted((entry["id"] for entry in entries), key=lambda key: (isinstance(key, str), key))
    return {key: place for place, key in enumerate(ids)}


def _place(entry: dict[str, Any], images: dict[Any, int], categories: dict[Any, int]) -> dict[str, int]:
    return {"image_id": images[entry["image_id"]], "category_id": categories[entry["category_id"]]}


def _index(images: int, categories: int, boxes: list[dict[str, Any]]) -> "COCO":
    """pycocotools' index of annotations or detections, whose images and categories are numbered from 0.

    Ids start at 1, because pycocotools takes an object of id 0 for "no match".
    """
    from pycocotools.coco import COCO

    index = COCO()
    index.dataset = {"images": [{"id": i} for i in range(images)], "categories": [{"id": i} for i in range(categories)]}
    index.dataset["annotations"] = [{**box, "id": i} for i, box in enumerate(boxes, 1)]
    index.createIndex()
    return index


def _class_names(entries: list[dict[str, Any]], categories: dict[Any, int]) -> list[str]:
    """The names of the classes in the order of their ids; those that are not unique with their id."""
    names = {entry["id"]: str(entry.get("name", entry["id"])) for entry in entries}
    count = Counter(names.values())
    return [names[key] if count[names[key]] == 1 else f"{names[key]} ({key})" for key in categories]


def _checked(
    detections: Iterable[dict], images: dict[Any, int], categories: dict[Any, int], path: str
) -> list[dict[str, Any]]:
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
        found = {"bbox": box, "score": float(d["score"]), "area": box[2] * box[3], "iscrowd": 0}
        kept.append(found | _place(d, images, categories))
    return kept
