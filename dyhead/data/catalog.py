"""The known datasets: a name stands for an annotation file in COCO's format and a folder of images.

Three kinds of names: COCO's own (`coco_2017_train`, ...), expected in the folder `DETECTRON2_DATASETS`; the
`shapes` sets, drawn there on first use; and those that a user registers, in code or with the config key
`DATASETS.REGISTER`.
"""

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dyhead.data import shapes
from dyhead.data.errors import DataError

# name: (annotation file, image folder), both in the datasets folder, laid out as Detectron2 expects COCO.
_COCO = {
    "coco_2014_train": ("coco/annotations/instances_train2014.json", "coco/train2014"),
    "coco_2014_val": ("coco/annotations/instances_val2014.json", "coco/val2014"),
    "coco_2014_minival": ("coco/annotations/instances_minival2014.json", "coco/val2014"),
    "coco_2014_valminusminival": ("coco/annotations/instances_valminusminival2014.json", "coco/val2014"),
    "coco_2017_train": ("coco/annotations/instances_train2017.json", "coco/train2017"),
    "coco_2017_val": ("coco/annotations/instances_val2017.json", "coco/val2017"),
    "coco_2017_test": ("coco/annotations/image_info_test2017.json", "coco/test2017"),
    "coco_2017_test-dev": ("coco/annotations/image_info_test-dev2017.json", "coco/test2017"),
    "coco_2017_val_100": ("coco/annotations/instances_val2017_100.json", "coco/val2017"),
    "keypoints_coco_2017_train": ("coco/annotations/person_keypoints_train2017.json", "coco/train2017"),
    "keypoints_coco_2017_val": ("coco/annotations/person_keypoints_val2017.json", "coco/val2017"),
    "keypoints_coco_2017_val_100": ("coco/annotations/person_keypoints_val2017_100.json", "coco/val2017"),
}


@dataclass(frozen=True)
class DatasetInfo:
    """A dataset: its name, its annotation file in COCO's format, and the folder that holds its images."""

    name: str
    json_file: str
    image_root: str


_registered: dict[str, DatasetInfo] = {}


def datasets_root() -> str:
    """The folder that holds the datasets: the environment variable `DETECTRON2_DATASETS`, or `datasets`."""
    return os.path.expanduser(os.environ.get("DETECTRON2_DATASETS") or "datasets")


def register_coco_json(name: str, json_file: str | os.PathLike, image_root: str | os.PathLike) -> None:
    """Gives a name to a COCO-format annotation file and its image folder.

    Nothing is read yet: `get` checks that the files exist, `dyhead.data.coco.load` that they are valid. Registering
    the same paths again changes nothing.

    Raises:
        DataError: the name is taken, by a built-in dataset or by other paths.
    """
    info = DatasetInfo(name, os.path.expanduser(json_file), os.path.expanduser(image_root))
    if name in _COCO or name in shapes.SPECS:
        raise DataError(f"dataset name '{name}': expected a name that is not a built-in dataset's, choose another")
    known = _registered.setdefault(name, info)
    if _absolute(known) != _absolute(info):
        raise DataError(
            f"dataset name '{name}': already registered with ({known.json_file}, {known.image_root}), "
            f"got ({info.json_file}, {info.image_root})"
        )


def register_from_config(entries: Iterable[Sequence[str]]) -> None:
    """Registers the entries of the config key `DATASETS.REGISTER`, each `[name, JSON file, image folder]`.

    Raises:
        DataError: an entry is not three strings, or its name is taken.
    """
    for entry in entries:
        if isinstance(entry, str) or len(entry) != 3 or not all(isinstance(part, str) and part for part in entry):
            raise DataError(f"DATASETS.REGISTER: expected entries [name, JSON file, image folder], got {entry!r}")
        register_coco_json(*entry)


def names() -> list[str]:
    """All names that `get` knows, sorted."""
    return sorted({*_COCO, *shapes.SPECS, *_registered})


def get(name: str) -> DatasetInfo:
    """Finds a dataset by its name; a `shapes` set that does not exist yet is drawn now (seconds to a few minutes).

    Raises:
        DataError: the name is unknown (similar ones are suggested), or its files are missing.
    """
    if name in shapes.SPECS:
        return DatasetInfo(name, *shapes.prepare(name, datasets_root()))
    if name in _COCO:
        json_file, image_root = (os.path.join(datasets_root(), path) for path in _COCO[name])
        info = DatasetInfo(name, json_file, image_root)
        annotations, images = (path.removeprefix("coco/") for path in _COCO[name])
        hint = (
            f"put {annotations} and the folder {images} from https://cocodataset.org into "
            f"{os.path.abspath(os.path.join(datasets_root(), 'coco'))}, "
            "or set DETECTRON2_DATASETS to the folder that contains your coco folder"
        )
    elif name in _registered:
        info = _registered[name]
        hint = f"this is the path it was registered with; relative paths start at {os.getcwd()}"
    else:
        similar = difflib.get_close_matches(str(name), names(), n=3, cutoff=0.5)
        raise DataError(
            f"dataset '{name}' is not known. "
            + (f"Did you mean {' or '.join(similar)}? " if similar else "")
            + f"Known: {', '.join(names())}; register others with DATASETS.REGISTER [[name, JSON file, image folder]]"
        )
    if not os.path.isfile(info.json_file):
        raise DataError(f"dataset '{name}': annotation file {info.json_file} does not exist; {hint}")
    if not os.path.isdir(info.image_root):
        raise DataError(f"dataset '{name}': image folder {info.image_root} does not exist; {hint}")
    return info


def _absolute(info: DatasetInfo) -> tuple[str, str]:
    return os.path.abspath(info.json_file), os.path.abspath(info.image_root)
