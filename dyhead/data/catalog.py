"""Which data sets there are: a name stands for an annotation file in COCO's format and a folder of pictures.

Three kinds of names: COCO's own (`coco_2017_train`, ...), looked for under the folder `DETECTRON2_DATASETS`; the
`shapes` sets, drawn there on first use; and those a user registers, in code or by the config key `DATASETS.REGISTER`.
"""

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dyhead.data import shapes
from dyhead.data.errors import DataError

# name: (annotation file, picture folder), both under the data sets' folder, laid out as Detectron2 wants COCO.
_COCO = {
    "coco_2014_train": ("coco/annotations/instances_train2014.json", "coco/train2014"),
    "coco_2014_val": ("coco/annotations/instances_val2014.json", "coco/val2014"),
    "coco_2014_minival": ("coco/annotations/instances_minival2014.json", "coco/val2014"),
    "coco_2014_valminusminival": ("coco/annotations/instances_valminusminival2014.json", "coco/val2014"),
    "coco_2017_train": ("coco/annotations/instances_train2017.json", "coco/train2017"),
    "coco_2017_val": ("coco/annotations/instances_val2017.json", "coco/val2017"),
    "coco_2017_val_100": ("coco/annotations/instances_val2017_100.json", "coco/val2017"),
}


@dataclass(frozen=True)
class DatasetInfo:
    """A data set: its name, its annotation file in COCO's format, and the folder that holds its pictures."""

    name: str
    json_file: str
    image_root: str


_registered: dict[str, DatasetInfo] = {}


def datasets_root() -> str:
    """The folder that holds the data sets: the environment variable `DETECTRON2_DATASETS`, or `datasets`."""
    return os.path.expanduser(os.environ.get("DETECTRON2_DATASETS") or "datasets")


def register_coco_json(name: str, json_file: str | os.PathLike, image_root: str | os.PathLike) -> None:
    """Gives a COCO-format annotation file and its folder of pictures a name.

    Nothing is read yet: `get` says whether the files are there, `dyhead.data.coco.load` whether they are sound.
    Registering the same again changes nothing.

    Raises:
        DataError: the name is taken, by a built-in data set or by other paths.
    """
    info = DatasetInfo(name, os.path.expanduser(json_file), os.path.expanduser(image_root))
    if name in _COCO or name in shapes.SPECS:
        raise DataError(f"data set name '{name}': it is the name of a built-in data set, choose another")
    known = _registered.setdefault(name, info)
    if _absolute(known) != _absolute(info):
        raise DataError(
            f"data set name '{name}': registered before with ({known.json_file}, {known.image_root}), "
            f"now with ({info.json_file}, {info.image_root})"
        )


def register_from_config(entries: Iterable[Sequence[str]]) -> None:
    """Registers what the config key `DATASETS.REGISTER` holds: a list of `[name, json file, picture folder]`.

    Raises:
        DataError: an entry is not three strings, or its name is taken.
    """
    for entry in entries:
        if isinstance(entry, str) or len(entry) != 3 or not all(isinstance(part, str) and part for part in entry):
            raise DataError(f"DATASETS.REGISTER: expected entries [name, json file, picture folder], got {entry!r}")
        register_coco_json(*entry)


def names() -> list[str]:
    """All names that `get` knows, sorted."""
    return sorted({*_COCO, *shapes.SPECS, *_registered})


def get(name: str) -> DatasetInfo:
    """Finds a data set by its name; a `shapes` set that is not there yet is drawn now (seconds to a few minutes).

    Raises:
        DataError: the name is not known (the nearest ones are named), or its files are not where they should be.
    """
    if name in shapes.SPECS:
        return DatasetInfo(name, *shapes.prepare(name, datasets_root()))
    if name in _COCO:
        json_file, image_root = (os.path.join(datasets_root(), path) for path in _COCO[name])
        info = DatasetInfo(name, json_file, image_root)
        annotations, pictures = (path.removeprefix("coco/") for path in _COCO[name])
        hint = (
            f"put {annotations} and the folder {pictures} of https://cocodataset.org into "
            f"{os.path.abspath(os.path.join(datasets_root(), 'coco'))}, "
            "or set DETECTRON2_DATASETS to the folder that holds your coco"
        )
    elif name in _registered:
        info = _registered[name]
        hint = f"it was registered with this path; relative paths start from {os.getcwd()}"
    else:
        near = difflib.get_close_matches(str(name), names(), n=3, cutoff=0.5)
        raise DataError(
            f"data set '{name}' is not known. "
            + (f"Did you mean {' or '.join(near)}? " if near else "")
            + f"Known: {', '.join(names())}; others can be registered with DATASETS.REGISTER [[name, json, folder]]"
        )
    if not os.path.isfile(info.json_file):
        raise DataError(f"data set '{name}': annotation file {info.json_file} does not exist; {hint}")
    if not os.path.isdir(info.image_root):
        raise DataError(f"data set '{name}': picture folder {info.image_root} does not exist; {hint}")
    return info


def _absolute(info: DatasetInfo) -> tuple[str, str]:
    return os.path.abspath(info.json_file), os.path.abspath(info.image_root)
