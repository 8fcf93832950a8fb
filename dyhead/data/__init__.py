"""Datasets by name: COCO, any COCO-format JSON file, and `shapes`, which the project draws itself. Needs no torch."""

from dyhead.data.catalog import DatasetInfo, get, names, register_coco_json, register_from_config
from dyhead.data.coco import CocoSplit, load, train_records
from dyhead.data.errors import DataError
from dyhead.data.images import read_image

__all__ = [
    "CocoSplit",
    "DataError",
    "DatasetInfo",
    "get",
    "load",
    "names",
    "read_image",
    "register_coco_json",
    "register_from_config",
    "train_records",
]
