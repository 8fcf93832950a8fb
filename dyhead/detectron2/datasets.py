"""The datasets of :mod:`dyhead.data` in Detectron2's catalogs, and a mapper that names a broken image."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog

from dyhead import data
from dyhead.config import ConfigError, check_num_classes
from dyhead.data import CocoSplit, DataError, DatasetInfo

# What this module has put into Detectron2's catalogs.
_registered: dict[str, DatasetInfo] = {}


def register_datasets(names: Iterable[str], entries: Iterable[Sequence[str]] = ()) -> None:
    """Put datasets of :mod:`dyhead.data` into Detectron2's ``DatasetCatalog`` and ``MetadataCatalog``.

    Each is loaded and checked as a whole first; a ``shapes`` set that is not there yet is drawn. Names that Detectron2
    knows already, such as ``coco_2017_val``, stay Detectron2's. Registering the same again changes nothing.

    Args:
        names: the datasets to register.
        entries: ``[name, json file, image folder]`` of COCO-format datasets, as in ``DATASETS.REGISTER``.

    Raises:
        DataError: a name is unknown, or is Detectron2's own and among ``entries``; a dataset's files are missing or
            not sound.
    """
    entries = list(entries)
    data.register_from_config(entries)
    for name, *_ in entries:
        if name in DatasetCatalog and name not in _registered:
            raise DataError(f"dataset name '{name}': it is the name of a dataset of Detectron2, choose another")
    for name in names:
        if name in DatasetCatalog and name not in _registered:
            if name in data.names():
                data.get(name)  # says what to do where COCO's files are missing
            continue
        info = data.get(name)
        if _registered.get(name) != info:
            _register(data.load(info))


def check_classes(cfg: CfgNode, names: Sequence[str]) -> None:
    """Raise :class:`ConfigError` unless all these registered datasets have the same classes, as many as the model."""
    classes = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    for name in names:
        if classes[name] is None:
            raise ConfigError(f"dataset {name!r}: expected a dataset of objects with class names, got none")
        check_num_classes(cfg, name, classes[name])
        if classes[name] != classes[names[0]]:
            pairs = zip(classes[names[0]], classes[name], strict=True)
            ours, theirs = next((a, b) for a, b in pairs if a != b)
            raise ConfigError(
                f"dataset {name!r}: expected the classes of {names[0]!r} in the same order, got {theirs!r} where that "
                f"has {ours!r}"
            )


class NamingMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper``, whose errors name the image.

    Raises:
        DataError: on use: the image is missing, broken, or not of the size that its annotations say.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """The image and annotations of one record as the model takes them."""
        try:
            return super().__call__(dataset_dict)
        except Exception:
            record = dataset_dict
            size = (record["height"], record["width"]) if "height" in record and "width" in record else None
            data.read_image(record["file_name"], size=size)  # raises what is wrong with the image, if that is it
            raise


def _register(split: CocoSplit) -> None:
    name = split.info.name
    if name in _registered:  # from other files, before
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    # Detectron2 hands the records out; who changes them must not change the next one's.
    DatasetCatalog.register(name, lambda: copy.deepcopy(split.records))
    MetadataCatalog.get(name).set(
        json_file=split.info.json_file,
        image_root=split.info.image_root,
        evaluator_type="coco",
        thing_classes=split.class_names,
        thing_dataset_id_to_contiguous_id={category: i for i, category in enumerate(split.category_ids)},
    )
    _registered[name] = split.info
