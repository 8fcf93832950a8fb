"""Loads annotations in COCO's format and checks the whole file first, so that no run fails hours later.

A valid file has the sections images, annotations and categories; unique ids; annotations of known images and
categories; boxes [x, y, width, height] in pixels, finite, not negative, inside the image; and every image file exists.
Real files need some tolerance:

* A box that extends beyond its image by at most `TOLERANCE` pixels, as rounding may cause, is clipped. A larger excess
  is an error.
* A box of exactly zero width or height (COCO train2017 has a few) is dropped; one warning gives their number and ids.
* Images without annotations and crowd annotations (iscrowd 1) are valid and kept.
"""

import json
import logging
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from dyhead.data.catalog import DatasetInfo
from dyhead.data.errors import DataError

TOLERANCE = 1.0
_NAMED = 5  # an error names this many of a file's faults and counts the rest
_XYXY_ABS = 0  # detectron2.structures.BoxMode.XYXY_ABS
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoSplit:
    """A loaded dataset.

    Attributes:
        info: where the dataset came from.
        class_names: names of the classes, ordered by their id in the file.
        category_ids: the ids in the file; `category_ids[i]` is the id of class i.
        records: one dict per image, in Detectron2's standard form: file_name (with the folder), height, width,
            image_id (the file's) and annotations, a list of dicts with bbox [x0, y0, x1, y1] in pixels, bbox_mode 0
            (BoxMode.XYXY_ABS), category_id (the class 0, 1, ...), iscrowd, area in pixels, and segmentation as in
            the file, if it has one.
    """

    info: DatasetInfo
    class_names: list[str]
    category_ids: list[int]
    records: list[dict[str, Any]]


def read_json(json_file: str | os.PathLike) -> dict[str, Any]:
    """Reads an annotation file and checks COCO's format: a dict whose three sections are lists of dicts.

    Raises:
        DataError: the file is missing, is not JSON, or lacks a section.
    """
    try:
        with open(json_file, encoding="utf-8") as file:
            data = json.load(file)
    except OSError as error:
        raise DataError(f"{json_file}: the annotation file cannot be read ({error.strerror})") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DataError(f"{json_file}: not a JSON file ({error})") from error
    for section in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or section not in data:
            got = f"a dict with {', '.join(map(str, data))}" if isinstance(data, dict) else f"a {type(data).__name__}"
            raise DataError(
                f"{json_file}: not in COCO's format: expected a dict with images, annotations and categories, got {got}"
            )
        if not isinstance(data[section], list) or not all(isinstance(entry, dict) for entry in data[section]):
            raise DataError(f"{json_file}: not in COCO's format: '{section}' is not a list of dicts")
    return data


def area(annotation: dict[str, Any]) -> float:
    """The area of an object in pixels as the evaluation takes it: the file's, or width x height where that has none."""
    given = annotation.get("area")
    return annotation["bbox"][2] * annotation["bbox"][3] if given is None else given


def is_crowd(annotation: dict[str, Any]) -> int:
    """1 for a crowd, 0 for an object: `iscrowd`, which may be missing or null."""
    return int(annotation.get("iscrowd") or 0)


def load(info: DatasetInfo) -> CocoSplit:
    """Loads and checks a dataset; the module's docstring says what makes it valid.

    COCO train2017 (118,000 images, 860,000 annotations) takes 15 to 30 seconds, two thirds of it in the JSON parser.

    Raises:
        DataError: the file or its content is not valid. Names the file, the ids of the first faults, and their number.
    """
    data = read_json(info.json_file)
    categories = _by_id(data["categories"], "category", info)
    category_ids = sorted(categories)
    _fail(info, [f"category {i} has no name" for i, c in categories.items() if not isinstance(c.get("name"), str)])
    class_names = [categories[i]["name"] for i in category_ids]
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    _fail(info, [f"category name '{name}' appears more than once" for name in repeated])
    if not categories:
        raise DataError(f"{info.json_file} (dataset '{info.name}'): it has no categories")
    records = _records(data["images"], info)
    _attach_annotations(records, data["annotations"], {c: i for i, c in enumerate(category_ids)}, info)
    return CocoSplit(info, class_names, category_ids, list(records.values()))


def _records(images: list[dict], info: DatasetInfo) -> dict[int, dict[str, Any]]:
    records, faults = {}, []
    for image_id, image in _by_id(images, "image", info).items():
        name, height, width = image.get("file_name"), image.get("height"), image.get("width")
        if not isinstance(name, str) or not name:
            faults.append(f"image {image_id} has no file_name")
        elif not all(isinstance(n, (int, float)) and n >= 1 for n in (height, width)):
            faults.append(f"image {image_id} ({name}): expected a height and a width, got {height!r} and {width!r}")
        else:
            records[image_id] = {
                "file_name": os.path.join(info.image_root, name),
                "height": int(height),
                "width": int(width),
                "image_id": image_id,
                "annotations": [],
            }
    _fail(info, faults)
    if not records:
        raise DataError(f"{info.json_file} (dataset '{info.name}'): it has no images")
    missing = _missing_files([record["file_name"] for record in records.values()])
    _fail(info, [f"image {path} does not exist" for path in missing])
    return records


def _missing_files(paths: list[str]) -> list[str]:
    """Lists each folder once: checking 118,000 files one by one takes minutes on a network disk."""
    folders: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        folders[os.path.dirname(path)].append(path)
    missing = []
    for folder, files in folders.items():
        try:
            with os.scandir(folder or ".") as entries:
                present = {entry.name for entry in entries}
        except OSError:
            present = set()
        missing += [path for path in files if os.path.basename(path) not in present]
    return missing


def _attach_annotations(
    records: dict[int, dict], annotations: list[dict], classes: dict[int, int], info: DatasetInfo
) -> None:
    ids, faults = set(), []
    for a in annotations:
        fault = _annotation_fault(a, ids, records, classes)
        if fault:
            faults.append(fault)
    _fail(info, faults)
    if not annotations:
        return

    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64)
    size = np.array([(records[a["image_id"]]["width"], records[a["image_id"]]["height"]) for a in annotations])
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    bad = ~np.isfinite(boxes).all(axis=1) | (boxes[:, 2:] < 0).any(axis=1)
    outside = ~bad & ((low < -TOLERANCE) | (high > size + TOLERANCE)).any(axis=1)
    for i in np.flatnonzero(bad | outside):
        a, record = annotations[i], records[annotations[i]["image_id"]]
        what = "lies outside the image" if outside[i] else "has no valid size"
        faults.append(
            f"annotation {a['id']} of image {a['image_id']} ({record['file_name']}, {record['width']} x "
            f"{record['height']}): box [x, y, width, height] = {a['bbox']} {what}"
        )
    _fail(info, faults)

    corners = np.concatenate([np.clip(low, 0, size), np.clip(high, 0, size)], axis=1)
    empty = (corners[:, 2:] <= corners[:, :2]).any(axis=1)
    if empty.any():
        first = ", ".join(str(annotations[i]["id"]) for i in np.flatnonzero(empty)[:_NAMED])
        _log.warning(
            "%s: %d of %d boxes have no width or no height and were dropped (annotation ids %s%s)",
            info.json_file, empty.sum(), len(boxes), first, ", ..." if empty.sum() > _NAMED else "",
        )  # fmt: skip
    for a, box, skip in zip(annotations, corners.tolist(), empty.tolist(), strict=True):
        if skip:
            continue
        entry = {
            "bbox": box,
            "bbox_mode": _XYXY_ABS,
            "category_id": classes[a["category_id"]],
            "iscrowd": is_crowd(a),
            "area": area(a),
        }
        if a.get("segmentation"):
            entry["segmentation"] = a["segmentation"]
        records[a["image_id"]]["annotations"].append(entry)


def _annotation_fault(a: dict, ids: set, records: dict, classes: dict) -> str | None:
    """The fault of an annotation other than the position of its box, or None. Adds its id to `ids`."""
    missing = [key for key in ("id", "image_id", "category_id", "bbox") if key not in a]
    if missing:
        return f"annotation {a.get('id', '')} has no {' and no '.join(missing)}: {str(a)[:100]}"
    name = f"annotation {a['id']} of image {a['image_id']}"
    try:
        if a["id"] in ids:
            return f"annotation id {a['id']} appears more than once"
        ids.add(a["id"])
        if a["image_id"] not in records:
            return f"{name}: no image has the id {a['image_id']!r}"
        if a["category_id"] not in classes:
            return f"{name} ({records[a['image_id']]['file_name']}): no category has the id {a['category_id']!r}"
    except TypeError:  # a list or a dict where an id should be
        return f"{name}: an id is neither a number nor a string"
    box = a["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
        return f"{name} ({records[a['image_id']]['file_name']}): expected a box of four numbers, got {box!r}"
    return None


def _by_id(entries: list[dict], kind: str, info: DatasetInfo) -> dict[int, dict]:
    found, faults = {}, []
    for entry in entries:
        key = entry.get("id")
        if not isinstance(key, int if kind == "category" else (int, str)):
            faults.append(f"{kind} without a valid id: {str(entry)[:100]}")
        elif key in found:
            faults.append(f"{kind} id {key!r} appears more than once")
        else:
            found[key] = entry
    _fail(info, faults)
    return found


def _fail(info: DatasetInfo, faults: list[str]) -> None:
    if faults:
        more = f"\n  ... and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        listed = "\n  ".join(faults[:_NAMED])
        raise DataError(f"{info.json_file} (dataset '{info.name}'):\n  {listed}{more}")
