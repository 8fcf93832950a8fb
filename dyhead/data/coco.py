"""Loads annotations in COCO's format and checks the whole file first, so that no run fails hours later.

A valid file has the sections images, annotations and categories; unique ids, each a whole number of any size or text;
annotations of known images and categories; boxes [x, y, width, height] in pixels, finite, not negative, inside the
image; areas and crowd flags that the evaluation can count with; and every image file exists. Real files need some
tolerance:

* A box that extends beyond its image by at most `TOLERANCE` pixels, as rounding may cause, is clipped. A larger excess
  is an error, or with `clip_boxes` clipped, too.
* A box of exactly zero width or height (COCO train2017 has a few) is dropped; with `clip_boxes` so is one that lies
  wholly outside.
* A missing, null or negative area is width x height. A segmentation that is neither polygons nor RLE is left out, and
  so are keypoints that are not three numbers for each one that the categories name.
* A visible_bbox, the box [x, y, width, height] of the part of an object that nothing hides, is optional; so much of it
  counts as is inside the image. One that is no such box, or empty, is left out.
* An id may be written 3.0; it is 3.
* Images without annotations and crowd annotations (iscrowd 1) are valid and kept. A file without the section
  annotations, such as COCO's image_info_test-dev, is a dataset to detect on only.

One warning for each kind of what was changed gives its number and the first ids.
"""

import codecs
import json
import logging
import os
import reprlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from dyhead.data.catalog import DatasetInfo
from dyhead.data.errors import DataError

TOLERANCE = 1.0
COCO_KEYPOINTS = 17  # of a person; for so many pycocotools knows how far each may be off
_NAMED = 5  # an error names this many of a file's faults and counts the rest
_XYXY_ABS = 0  # detectron2.structures.BoxMode.XYXY_ABS
_LARGEST_AREA = 1e10  # the evaluation leaves larger objects out, without a word
_FARTHEST = 1e300  # far from where sums of floats overflow
_LARGEST_SIDE = 2**31 - 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classes:
    """What a dataset's classes are called and numbered.

    Attributes:
        names: of the classes, ordered by their id in the file.
        ids: the ids in the file, whole numbers or text; `ids[i]` is the id of class i.
        keypoints: names of the keypoints of all categories that have any; none where these differ.
    """

    names: Sequence[str]
    ids: Sequence[int | str]
    keypoints: Sequence[str] = ()


@dataclass(frozen=True)
class CocoSplit:
    """A loaded dataset.

    Attributes:
        info: where the dataset came from.
        class_names: names of the classes, ordered by their id in the file.
        category_ids: the ids in the file, whole numbers or text; `category_ids[i]` is the id of class i.
        records: one dict per image, in Detectron2's standard form: file_name (with the folder), height, width,
            image_id (the file's) and annotations, a list of dicts with bbox [x0, y0, x1, y1] in pixels, bbox_mode 0
            (BoxMode.XYXY_ABS), category_id (the class 0, 1, ...), iscrowd, area in pixels, and segmentation and
            keypoints as in the file, and visible_bbox [x0, y0, x1, y1], if it has them.
        annotated: whether the file has annotations. Without, there are only detections to be had.
        keypoint_names: of all categories that have keypoints; none where these differ.
    """

    info: DatasetInfo
    class_names: list[str]
    category_ids: list[int | str]
    records: list[dict[str, Any]]
    annotated: bool = True
    keypoint_names: Sequence[str] = ()


def read_json(json_file: str | os.PathLike) -> dict[str, Any]:
    """Reads an annotation file and checks COCO's format: a dict whose sections are lists of dicts.

    The sections are images, categories and annotations; the last one may be missing (`CocoSplit.annotated`). What their
    entries hold is not checked, see `load`.

    Raises:
        DataError: the file is missing, is not JSON, or lacks a section.
    """
    if not os.path.isfile(json_file) and os.path.exists(json_file):  # to open a pipe would wait for ever
        raise DataError(f"{json_file}: the annotation file cannot be read (it is not a file)")
    try:
        with open(json_file, "rb") as file:
            content = file.read()
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or error
        raise DataError(f"{json_file}: the annotation file cannot be read ({what})") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{json_file}: not a JSON file (expected UTF-8, got UTF-16)")
    try:
        data = json.loads(content.decode("utf-8-sig"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DataError(f"{json_file}: not a JSON file ({error})") from error
    except RecursionError as error:
        raise DataError(f"{json_file}: not in COCO's format: lists or dicts are nested too deeply") from error
    for section in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or section not in data:
            if isinstance(data, dict) and section == "annotations":
                continue
            got = f"a dict with {', '.join(data)[:200]}" if isinstance(data, dict) else f"a {type(data).__name__}"
            raise DataError(
                f"{json_file}: not in COCO's format: expected a dict with images, annotations and categories, got {got}"
            )
        if not isinstance(data[section], list):
            raise DataError(f"{json_file}: not in COCO's format: '{section}' is not a list of dicts")
        for i, entry in enumerate(data[section]):
            if not isinstance(entry, dict):
                raise DataError(
                    f"{json_file}: not in COCO's format: '{section}' is not a list of dicts: {section}[{i}] is "
                    f"{_shown(entry)}"
                )
    return data


def area(annotation: dict[str, Any]) -> float:
    """The area of an object in pixels as the evaluation takes it.

    The file's, or width x height where that has none or, as from a polygon that runs the other way, a negative one.
    """
    given = annotation.get("area")
    return annotation["bbox"][2] * annotation["bbox"][3] if given is None or given < 0 else given


def is_crowd(annotation: dict[str, Any]) -> int:
    """1 for a crowd, 0 for an object: `iscrowd`, which may be missing or null."""
    return int(annotation.get("iscrowd") or 0)


def is_mask(segmentation: Any) -> bool:
    """Whether it has the form of polygons or of RLE, which is all that those who read masks rely on."""
    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), segmentation.get("size")
        return (
            isinstance(size, (list, tuple))
            and [type(n) for n in size] == [int, int]
            and (isinstance(counts, (str, bytes)) or _are_runs(counts, size[0] * size[1]))
        )
    return isinstance(segmentation, list) and all(
        isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and set(map(type, p)) <= {int, float}
        for p in segmentation
    )


def _are_runs(counts: Any, pixels: int) -> bool:
    """Whether these are the lengths of runs in an image of so many pixels; pycocotools would read past others."""
    return isinstance(counts, list) and set(map(type, counts)) == {int} and min(counts) >= 0 and sum(counts) == pixels


def flip_pairs(keypoint_names: Sequence[str]) -> list[tuple[str, str]]:
    """The keypoints that change places in a mirror: left_eye and right_eye, those alike but for "left" and "right"."""
    return [
        (name, name.replace("left", "right"))
        for name in keypoint_names
        if "left" in name and name.replace("left", "right") in keypoint_names
    ]


def load(info: DatasetInfo, *, clip_boxes: bool = False) -> CocoSplit:
    """Loads and checks a dataset; the module's docstring says what makes it valid.

    COCO train2017 (118,000 images, 860,000 annotations) takes 15 to 30 seconds, two thirds of it in the JSON parser.

    Args:
        info: the dataset.
        clip_boxes: clip boxes that extend beyond their image, however far, instead of refusing them.

    Raises:
        DataError: the file or its content is not valid. Names the file, the ids of the first faults, their fields, and
            their number.
    """
    data = read_json(info.json_file)
    known = classes_of(data, info)
    records = _records(data["images"], info)
    classes = {c: i for i, c in enumerate(known.ids)}
    _attach_annotations(records, data.get("annotations", []), classes, info, clip_boxes, len(known.keypoints))
    annotated = "annotations" in data
    return CocoSplit(info, known.names, known.ids, list(records.values()), annotated, known.keypoints)


def classes_of(data: dict[str, Any], info: DatasetInfo) -> Classes:
    """The classes of a file that `read_json` has read.

    Raises:
        DataError: it has none, or not each with an id and a name of its own.
    """
    categories = _by_id(data["categories"], "category", info)
    if not categories:
        raise DataError(f"{info.json_file} (dataset '{info.name}'): it has no categories")
    kinds = {type(i): i for i in categories}
    if len(kinds) > 1:
        got = " and ".join(map(_shown, kinds.values()))
        _fail(info, [f"categories have ids of two kinds: expected all numbers or all text, got {got}"])
    ids = sorted(categories)
    _fail(info, list(filter(None, (_name_fault(i, categories[i].get("name")) for i in ids))))
    names = [categories[i]["name"] for i in ids]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    _fail(info, [f"category name '{name}' appears more than once" for name in repeated])
    return Classes(names, ids, keypoint_names(categories.values()))


def keypoint_names(categories: Iterable[dict[str, Any]]) -> list[str]:
    """The names of the keypoints in an annotation file's categories; none where categories have different ones."""
    names = [category["keypoints"] for category in categories if isinstance(category.get("keypoints"), list)]
    same = names and all(other == names[0] for other in names) and all(isinstance(name, str) for name in names[0])
    return list(names[0]) if same else []


def train_records(splits: Sequence[CocoSplit], *, filter_empty: bool, min_keypoints: int = 0) -> list[dict[str, Any]]:
    """The records to train on.

    Args:
        splits: the datasets.
        filter_empty: leave out images that show no object but crowds.
        min_keypoints: leave out images with fewer annotated keypoints.

    Raises:
        DataError: there is none, or a dataset has no annotations.
    """
    for split in splits:
        if not split.annotated:
            raise DataError(
                f"{split.info.json_file} (dataset '{split.info.name}'): it has no annotations: it can be detected on, "
                "but not trained on"
            )
    records = [record for split in splits for record in split.records]
    if filter_empty:
        records = [record for record in records if any(not a["iscrowd"] for a in record["annotations"])]
    if min_keypoints:
        records = [record for record in records if _count_keypoints(record) >= min_keypoints]
        if not records:
            names = ", ".join(split.info.name for split in splits)
            raise DataError(f"dataset {names}: no image with {min_keypoints} annotated keypoints, nothing to train on")
    if not records:
        names = ", ".join(split.info.name for split in splits)
        raise DataError(f"dataset {names}: no image with an annotation that is not a crowd, nothing to train on")
    return records


def _count_keypoints(record: dict[str, Any]) -> int:
    return sum(v > 0 for a in record["annotations"] for v in a.get("keypoints", ())[2::3])


def _name_fault(category_id: int | str, name: Any) -> str | None:
    if not isinstance(name, str) or not name:
        return f"category {_shown(category_id)} has no name: expected text, got {_shown(name)}"
    if not _is_unicode(name):
        return f"category {_shown(category_id)}: name {_shown(name)}: expected Unicode text, got half a surrogate pair"
    return None


def _records(images: list[dict], info: DatasetInfo) -> dict[int | str, dict[str, Any]]:
    records, faults = {}, []
    for image_id, image in _by_id(images, "image", info).items():
        name, height, width = image.get("file_name"), image.get("height"), image.get("width")
        if not isinstance(name, str) or not name:
            faults.append(f"image {_shown(image_id)} has no file_name: expected text, got {_shown(name)}")
        elif not _is_side(height) or not _is_side(width):
            faults.append(
                f"image {_shown(image_id)} ({name}): expected a height and a width, got {_shown(height)} and "
                f"{_shown(width)} (whole numbers of pixels, at least 1)"
            )
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
    _fail(info, [f"image {path} does not exist (file_name)" for path in missing])
    uses = Counter(record["file_name"] for record in records.values())
    shared = [i for i, record in records.items() if uses[record["file_name"]] > 1]
    _warn(info, shared, len(records), "images", "share their file_name with another one", "image")
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
                present = {entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)}
        except (OSError, ValueError):  # ValueError: what no file can be called
            present = set()
        missing += [path for path in files if os.path.basename(path) not in present]
    return missing


def _attach_annotations(
    records: dict[int | str, dict],
    annotations: list[dict],
    classes: dict[int | str, int],
    info: DatasetInfo,
    clip_boxes: bool,
    num_keypoints: int,
) -> None:
    ids, faults = set(), []
    for i, a in enumerate(annotations):
        fault = _annotation_fault(i, a, ids, records, classes)
        if fault:
            faults.append(fault)
    _fail(info, faults)
    if not annotations:
        return

    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64)
    size = np.array([(records[a["image_id"]]["width"], records[a["image_id"]]["height"]) for a in annotations])
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    outside = ((low < -TOLERANCE) | (high > size + TOLERANCE)).any(axis=1)
    if not clip_boxes:
        for i in np.flatnonzero(outside):
            faults.append(
                f"{_described(annotations[i], records)}: box [x, y, width, height] = {_shown(annotations[i]['bbox'])} "
                "lies outside the image (bbox; DATASETS.CLIP_BOXES True clips such boxes)"
            )
        _fail(info, faults)

    corners = np.concatenate([np.clip(low, 0, size), np.clip(high, 0, size)], axis=1)
    empty = (corners[:, 2:] <= corners[:, :2]).any(axis=1)
    for chosen, what in (
        (outside & ~empty, "extend beyond their image and were clipped"),
        (outside & empty, "lie outside their image and were dropped"),
        (empty & ~outside, "have no width or no height and were dropped"),
    ):
        _warn(info, [annotations[i]["id"] for i in np.flatnonzero(chosen)], len(boxes), "boxes", what)
    negative = [a["id"] for a in annotations if a.get("area") is not None and a["area"] < 0]
    _warn(info, negative, len(boxes), "areas", "are negative and became width x height")

    not_masks, not_keypoints, not_visible = [], [], []
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
            if is_mask(a["segmentation"]):
                entry["segmentation"] = a["segmentation"]
            else:
                not_masks.append(a["id"])
        if a.get("keypoints") and num_keypoints:
            if _are_keypoints(a["keypoints"], num_keypoints):
                entry["keypoints"] = a["keypoints"]
            else:
                not_keypoints.append(a["id"])
        if a.get("visible_bbox") is not None:
            corners_of = _visible_corners(a["visible_bbox"], records[a["image_id"]])
            if corners_of is None:
                not_visible.append(a["id"])
            else:
                entry["visible_bbox"] = corners_of
        records[a["image_id"]]["annotations"].append(entry)
    _warn(info, not_masks, len(boxes), "segmentations", "are neither polygons nor RLE and were left out")
    _warn(info, not_keypoints, len(boxes), "lists of keypoints", "do not fit the categories' and were left out")
    _warn(info, not_visible, len(boxes), "values of visible_bbox", "are no boxes in their image and were left out")


def _visible_corners(box: Any, record: dict[str, Any]) -> list[float] | None:
    """A box [x, y, width, height] of a file as [x0, y0, x1, y1] inside its image; None if it is none."""
    if not isinstance(box, list) or len(box) != 4 or not set(map(type, box)) <= {int, float}:
        return None
    if not all(-_FARTHEST < v < _FARTHEST for v in box):
        return None
    x, y, width, height = map(float, box)
    x0, x1 = (min(max(v, 0.0), record["width"]) for v in (x, x + width))
    y0, y1 = (min(max(v, 0.0), record["height"]) for v in (y, y + height))
    return [x0, y0, x1, y1] if x1 > x0 and y1 > y0 else None


def _annotation_fault(position: int, a: dict, ids: set, records: dict, classes: dict) -> str | None:
    """The fault of an annotation other than the position of its box, or None. Adds its id to `ids`."""
    missing = [key for key in ("id", "image_id", "category_id", "bbox") if key not in a]
    if missing:
        name = f"annotation {_shown(a['id'])}" if "id" in a else f"annotations[{position}]"
        return f"{name} has no {' and no '.join(missing)}: {_shown(a)}"
    name = f"annotation {_shown(a['id'])} of image {_shown(a['image_id'])}"
    for key in ("id", "image_id", "category_id"):
        if _id(a[key]) is None:
            return f"{name}: an id is neither a number nor a string: {key} {_shown(a[key])}"
    if a["id"] in ids:
        return f"annotation id {_shown(a['id'])} appears more than once"
    ids.add(a["id"])
    if a["image_id"] not in records:
        return f"{name}: no image has the id {_shown(a['image_id'])} (image_id)"
    name = _described(a, records)
    if a["category_id"] not in classes:
        return f"{name}: no category has the id {_shown(a['category_id'])} (category_id)"
    box = a["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not set(map(type, box)) <= {int, float}:
        return f"{name}: expected a box of four numbers, got {_shown(box)} (bbox)"
    if not all(-_FARTHEST < v < _FARTHEST for v in box) or box[2] < 0 or box[3] < 0:
        return f"{name}: box [x, y, width, height] = {_shown(box)} has no valid size (bbox)"
    given = a.get("area")
    if given is not None and not (type(given) in (int, float) and -_LARGEST_AREA <= given <= _LARGEST_AREA):
        return f"{name}: area: expected a number of pixels up to {_LARGEST_AREA:g}, got {_shown(given)}"
    if area(a) > _LARGEST_AREA:
        return f"{name}: box [x, y, width, height] = {_shown(box)} has more than {_LARGEST_AREA:g} pixels (bbox)"
    crowd = a.get("iscrowd")
    if crowd is not None and not (type(crowd) in (bool, int, float) and crowd in (0, 1)):
        return f"{name}: iscrowd: expected 0 or 1, got {_shown(crowd)}"
    return None


def _described(a: dict, records: dict[int | str, dict]) -> str:
    record = records[a["image_id"]]
    return (
        f"annotation {_shown(a['id'])} of image {_shown(a['image_id'])} ({record['file_name']}, {record['width']} x "
        f"{record['height']})"
    )


def _by_id(entries: list[dict], kind: str, info: DatasetInfo) -> dict[int | str, dict]:
    found, faults = {}, []
    for i, entry in enumerate(entries):
        key = _id(entry.get("id"))
        if key is None:
            faults.append(
                f"{kind} without a valid id: expected a whole number or text, got {_shown(entry.get('id'))} in "
                f"{_shown(entry)}, number {i} from 0"
            )
        elif key in found:
            faults.append(f"{kind} id {_shown(key)} appears more than once")
        else:
            found[key] = entry
    _fail(info, faults)
    return found


def _id(value: Any) -> int | str | None:
    """An id as the file means it, 3.0 as 3, or None where that is neither a whole number nor text."""
    if type(value) is float and value.is_integer():
        return int(value)
    return value if type(value) in (int, str) else None  # True is an int to isinstance


def _is_side(value: Any) -> bool:
    return type(value) in (int, float) and 1 <= value <= _LARGEST_SIDE and value == int(value)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _are_keypoints(keypoints: Any, count: int) -> bool:
    return (
        isinstance(keypoints, list)
        and len(keypoints) == 3 * count
        and all(type(v) in (int, float) and abs(v) < _FARTHEST for v in keypoints)
    )


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


def _shown(value: Any) -> str:
    """What a file holds, short enough for a message, whatever it is."""
    return _short.repr(value)


def _fail(info: DatasetInfo, faults: list[str]) -> None:
    if faults:
        more = f"\n  ... and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        listed = "\n  ".join(faults[:_NAMED])
        raise DataError(f"{info.json_file} (dataset '{info.name}'):\n  {listed}{more}")


def _warn(
    info: DatasetInfo, ids: Sequence[int | str], total: int, kind: str, what: str, of: str = "annotation"
) -> None:
    """Says how many entries of a kind are not as they should be, and which come first."""
    if ids:
        first = ", ".join(map(_shown, ids[:_NAMED])) + (", ..." if len(ids) > _NAMED else "")
        _say(f"{info.json_file}: {len(ids)} of {total} {kind} {what} ({of} ids {first})")


@cache
def _say(message: str) -> None:
    """A warning, once: sets are loaded anew for another use, and in each process of a run."""
    _log.warning("%s", message)
