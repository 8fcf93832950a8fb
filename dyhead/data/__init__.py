"""Datasets by name: COCO, any COCO-format JSON file, and `shapes`, which the project draws itself. Needs no torch."""

from dyhead.data.catalog import DatasetInfo, get, names, register_coco_json, register_from_config
from dyhead.data.classes import classes_by_name
from dyhead.data.coco import Classes, CocoSplit, flip_pairs, keypoint_names, load, read_json, train_records
from dyhead.data.errors import DataError
from dyhead.data.images import read_image, resized

__all__ = [
    "Classes",
    "CocoSplit",
    "DataError",
    "DatasetInfo",
    "classes_by_name",
    "flip_pairs",
    "get",
    "keypoint_names",
    "load",
    "names",
    "read_image",
    "read_json",
    "register_coco_json",
    "register_from_config",
    "resized",
    "train_records",
]
