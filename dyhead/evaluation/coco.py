"""COCO average precision of boxes, masks and keypoints, computed by pycocotools."""

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
from dyhead.data.coco import COCO_KEYPOINTS, area, is_crowd, is_mask, read_json
from dyhead.data.errors import DataError

if TYPE_CHECKING:
    from pycocotools.coco import COCO

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

#: What is evaluated, by Detectron2's names, and the metrics of each before those of the classes.
TASKS = {"bbox": METRICS, "segm": METRICS, "keypoints": ("AP", "AP50", "AP75", "APm", "APl")}

#: The part of a detection that a task compares.
_PART = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
LIMIT = 100  # detections of a class in an image that count, pycocotools' own
_log = logging.getLogger(__name__)


def evaluate_coco(
    truth: DatasetInfo | str | os.PathLike | dict[str, Any],
    detections: Iterable[dict[str, Any]],
    task: str = "bbox",
    *,
    sigmas: Sequence[float] = (),
) -> dict[str, float]:
    """COCO's average precision over all images of a dataset: of boxes, of masks or of keypoints.

    At most 100 detections of a class count in an image (20 for keypoints), the best.

    Args:
        truth: a dataset, its annotation file in COCO's format, or the content of one.
        detections: COCO's result dicts: image_id and category_id (both as in the file), bbox [x, y, width, height] in
            pixels, score; for masks segmentation, as RLE, and for keypoints keypoints, [x, y, anything, x, y, ...].
        task: one of ``TASKS``.
        sigmas: one for each keypoint, how far it may be off (``TEST.KEYPOINT_OKS_SIGMAS``); by default those of COCO's
            17.

    Returns:
        AP, AP50, AP75, APs, APm, APl (keypoints: no APs), then `AP-<class>` for every class, all in percent; NaN where
        the dataset has no object of that class or size, which is everywhere if it has no annotations. Without
        detections all others are 0. Of classes of one name, each has its id as well: `AP-<class> (<id>)`.

    Raises:
        DataError: the file is not in COCO's format, or an object in it has no mask, or not as many keypoints as there
            are sigmas; or a detection is incomplete, not finite, or of an image or a category that is not in the file.
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
        sizes = {image["id"]: (image.get("height"), image.get("width")) for image in data["images"]}
        annotations = [
            {"bbox": a["bbox"], "area": area(a), "iscrowd": is_crowd(a)}
            | _place(a, images, categories)
            | _annotated(a, task, sizes[a["image_id"]], sigmas, path)
            for a in data.get("annotations") or ()
            if a["image_id"] in images and a["category_id"] in categories
        ]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not in COCO's format ({type(error).__name__}: {error})") from error
    found = _checked(detections, images, categories, path, task, len(sigmas) or COCO_KEYPOINTS)

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        truth_index, found_index = (_index(len(images), len(categories), objects) for objects in (annotations, found))
        evaluator = COCOeval(truth_index, found_index, task)
        if sigmas:
            evaluator.params.kpt_oks_sigmas = np.asarray(sigmas, dtype=float)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    _log.debug("%s", printed.getvalue())

    percent = [100 * value if value >= 0 else math.nan for value in evaluator.stats[: len(TASKS[task])].tolist()]
    metrics = dict(zip(TASKS[task], percent, strict=True))
    for k, name in enumerate(_class_names(data["categories"], categories)):
        # precision: thresholds of overlap, recalls, classes, sizes (0: all), detections per image (last: most)
        precision = evaluator.eval["precision"][:, :, k, 0, -1]
        known = precision[precision >= 0]
        metrics[f"AP-{name}"] = 100 * float(np.mean(known)) if known.size else math.nan
    return metrics


def coco_results(
    image_id: Any,
    category_ids: Sequence[Any],
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    masks: Tensor | None = None,
    keypoints: Tensor | None = None,
    visible_boxes: Tensor | None = None,
) -> list[dict[str, Any]]:
    """COCO's result dicts of the detections in one image; boxes without width or height are none.

    Args:
        image_id: the file's.
        category_ids: the ids in the file, by class.
        boxes: (D, 4) as x0, y0, x1, y1 in pixels of the image as it is in its file.
        scores: (D,).
        labels: (D,), 0 to K - 1.
        masks: (D, H, W), true where the object is, in the image as it is in its file.
        keypoints: (D, P, 3) as x, y and score. Pixel i reaches from i to i + 1, as for the boxes; COCO's keypoints
            count pixels instead, and are half a pixel less.
        visible_boxes: (D, 4), those of the visible parts of the objects; they become ``visible_bbox``.
    """
    boxes = _with_sides(boxes)
    parts: list[dict[str, Any]] = [{} for _ in range(len(boxes))]
    if masks is not None:
        for part, rle in zip(parts, encode_masks(masks), strict=True):
            part["segmentation"] = rle
    if keypoints is not None:
        shift = keypoints.new_tensor([0.5, 0.5, 0.0])
        for part, points in zip(parts, (keypoints - shift).flatten(1).tolist(), strict=True):
            part["keypoints"] = points
    if visible_boxes is not None:
        for part, box in zip(parts, _with_sides(visible_boxes).tolist(), strict=True):
            part["visible_bbox"] = box
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score} | part
        for box, label, score, part in zip(boxes.tolist(), labels.tolist(), scores.tolist(), parts, strict=True)
        if not (box[2] <= 0 or box[3] <= 0)  # but what is NaN is an error of evaluate_coco
    ]


def _with_sides(boxes: Tensor) -> Tensor:
    """x, y, width and height of boxes (D, 4) that are x0, y0, x1, y1."""
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Masks (D, H, W), true where the object is, as COCO's compressed RLE that JSON can hold."""
    from pycocotools import mask as coco_masks

    encoded = []
    for mask in masks.cpu().numpy().astype(np.uint8):
        rle = coco_masks.encode(np.asfortranarray(mask))
        encoded.append({"size": list(rle["size"]), "counts": rle["counts"].decode()})
    return encoded


def as_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """A segmentation of COCO's format, polygons or either kind of RLE, as compressed RLE."""
    from pycocotools import mask as coco_masks

    if isinstance(segmentation, list):
        return coco_masks.merge(coco_masks.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_masks.frPyObjects(segmentation, *segmentation["size"])
    return segmentation


def _places(entries: list[dict[str, Any]]) -> dict[Any, int]:
    """0, 1, ... by the ids of images or categories, in their order: numbers first, then text.

    pycocotools sorts ids in NumPy's arrays, where those from 2^63 on are rounded and text changes numbers into text.
    """
    ids = sorted((entry["id"] for entry in entries), key=lambda key: (isinstance(key, str), key))
    return {key: place for place, key in enumerate(ids)}


def _place(entry: dict[str, Any], images: dict[Any, int], categories: dict[Any, int]) -> dict[str, int]:
    return {"image_id": images[entry["image_id"]], "category_id": categories[entry["category_id"]]}


def _index(images: int, categories: int, objects: list[dict[str, Any]]) -> "COCO":
    """pycocotools' index of annotations or detections, whose images and categories are numbered from 0.

    Ids start at 1, because pycocotools takes an object of id 0 for "no match".
    """
    from pycocotools.coco import COCO

    index = COCO()
    index.dataset = {
        "images": [{"id": i, "height": 0, "width": 0} for i in range(images)],  # asked for, but not read, for masks
        "categories": [{"id": i} for i in range(categories)],
    }
    index.dataset["annotations"] = [{**entry, "id": i} for i, entry in enumerate(objects, 1)]
    index.createIndex()
    return index


def _class_names(entries: list[dict[str, Any]], categories: dict[Any, int]) -> list[str]:
    """The names of the classes in the order of their ids; those that are not unique with their id."""
    names = {entry["id"]: str(entry.get("name", entry["id"])) for entry in entries}
    count = Counter(names.values())
    return [names[key] if count[names[key]] == 1 else f"{names[key]} ({key})" for key in categories]


def _annotated(
    annotation: dict[str, Any], task: str, size: tuple[int, int], sigmas: Sequence[float], path: str
) -> dict[str, Any]:
    """What a task compares of an object beside its box, in pycocotools' form."""
    name = f"{path}: annotation {annotation.get('id')} of image {annotation['image_id']}"
    if task == "segm":
        segmentation = annotation.get("segmentation")
        if not segmentation or not is_mask(segmentation):
            raise DataError(f"{name}: expected polygons or RLE, to evaluate masks, got {segmentation!s:.80}")
        if isinstance(segmentation, dict) and tuple(segmentation["size"]) != tuple(size):
            raise DataError(f"{name}: expected RLE of the size of its image, {size}, got {segmentation['size']}")
        return {"segmentation": as_rle(segmentation, *size)}
    if task == "keypoints":
        count = len(sigmas) or COCO_KEYPOINTS
        keypoints = annotation.get("keypoints") or [0] * (3 * count)
        if len(keypoints) != 3 * count:
            raise DataError(
                f"{name}: expected keypoints of {count} times x, y and visibility, got {len(keypoints)} numbers "
                "(TEST.KEYPOINT_OKS_SIGMAS has one number for each keypoint; COCO's 17 need none)"
            )
        return {"keypoints": keypoints, "num_keypoints": sum(v > 0 for v in keypoints[2::3])}
    return {}


def _checked(
    detections: Iterable[dict],
    images: dict[Any, int],
    categories: dict[Any, int],
    path: str,
    task: str,
    num_keypoints: int,
) -> list[dict[str, Any]]:
    part, kept = _PART[task], []
    for i, d in enumerate(detections):
        expected = list(dict.fromkeys(["image_id", "category_id", "bbox", "score", part]))
        missing = [key for key in expected if key not in d]
        if missing:
            raise DataError(
                f"detection {i}: expected {', '.join(expected[:-1])} and {expected[-1]}, got no {missing[0]}: {d}"
            )
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
        found = {"bbox": box, "score": float(d["score"]), "iscrowd": 0, **_detected(d, task, box, num_keypoints)}
        kept.append(found | _place(d, images, categories))
    return kept


def _detected(detection: dict[str, Any], task: str, box: list[float], num_keypoints: int) -> dict[str, Any]:
    """The area of a detection, in pixels, and what else a task compares of it."""
    if task == "segm":
        from pycocotools import mask as coco_masks

        mask = detection["segmentation"]
        return {"segmentation": mask, "area": float(coco_masks.area(mask))}
    if task == "keypoints":
        points = [float(v) for v in detection["keypoints"]]
        if len(points) != 3 * num_keypoints or not all(map(math.isfinite, points)):
            raise DataError(
                f"detection of image {detection['image_id']}: expected {num_keypoints} finite keypoints, got {points}"
            )
        return {"keypoints": points, "area": box[2] * box[3]}  # as Detectron2 has it, not the points' extent
    return {"area": box[2] * box[3]}
