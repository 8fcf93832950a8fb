"""The datasets of :mod:`dyhead.data` in Detectron2's catalogs, and loaders that read images as that module does."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    detection_utils,
)
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch.utils.data import get_worker_info

from dyhead import data
from dyhead.config import ConfigError, check_num_classes, reads_visible_boxes
from dyhead.data import Classes, CocoSplit, DataError
from dyhead.data.shapes import SPECS
from dyhead.evaluation.coco import as_rle
from dyhead.runs.interruption import leave_to_main_process

# What this module has put into Detectron2's catalogs, and whether boxes were clipped.
_registered: dict[str, tuple[CocoSplit, bool]] = {}
_drawn_when_used: set[str] = set()


def register_datasets(names: Iterable[str], entries: Iterable[Sequence[str]] = (), *, clip_boxes: bool = False) -> None:
    """Put datasets of :mod:`dyhead.data` into Detectron2's ``DatasetCatalog`` and ``MetadataCatalog``.

    Each is loaded and checked as a whole first; a ``shapes`` set that is not there yet is drawn. Names that Detectron2
    knows already, such as ``coco_2017_val``, stay Detectron2's. Registering the same again changes nothing.

    Args:
        names: the datasets to register.
        entries: ``[name, json file, image folder]`` of COCO-format datasets, as in ``DATASETS.REGISTER``.
        clip_boxes: as ``DATASETS.CLIP_BOXES``, see :func:`dyhead.data.load`.

    Raises:
        DataError: a name is unknown, or is Detectron2's own and among ``entries``; a dataset's files are missing or
            not sound.
    """
    entries = list(entries)
    data.register_from_config(entries)
    for name, *_ in entries:
        if _is_of_others(name):
            raise DataError(f"dataset name '{name}': it is the name of a dataset of Detectron2, choose another")
    for name in names:
        if _is_of_others(name):
            if name in data.names():
                data.get(name)  # says what to do where COCO's files are missing
            _name_classes(name)
            continue
        info = data.get(name)
        known, clipped = _registered.get(name, (None, None))
        if known is None or known.info != info or clipped != clip_boxes:
            _register(data.load(info, clip_boxes=clip_boxes), clip_boxes)


def register_shapes() -> None:
    """Put the ``shapes`` sets into Detectron2's catalogs; one is drawn, and checked, when it is first asked for."""
    for name, spec in SPECS.items():
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, partial(_draw, name))
            MetadataCatalog.get(name).set(evaluator_type="coco", thing_classes=list(spec.classes))
            _drawn_when_used.add(name)


def _draw(name: str) -> list[dict[str, Any]]:
    register_datasets([name])
    return DatasetCatalog.get(name)


def _is_of_others(name: str) -> bool:
    return name in DatasetCatalog and name not in _registered and name not in _drawn_when_used


def name_keypoints(names: Iterable[str]) -> None:
    """Fill in the names of keypoints, and which of them mirrors exchange, of registered datasets that do not say them.

    The annotation file has the names; see :func:`dyhead.data.flip_pairs` for the mirrors.
    """
    for name in names:
        metadata = MetadataCatalog.get(name)
        keypoints = metadata.get("keypoint_names")
        if keypoints is None and metadata.get("json_file"):
            content = data.read_json(PathManager.get_local_path(metadata.json_file))
            keypoints = data.keypoint_names(content["categories"])
        for key, value in _keypoint_metadata(keypoints or ()).items():
            if metadata.get(key) is None:
                metadata.set(**{key: value})


def registered_split(name: str) -> CocoSplit | None:
    """The dataset that :func:`register_datasets` has loaded under a name, None for one of Detectron2's or a user's."""
    return _registered.get(name, (None, None))[0]


def check_trainable(cfg: CfgNode) -> None:
    """Raise :class:`DataError` unless ``DATASETS.TRAIN``, which is registered, has annotated objects to train on."""
    splits = [registered_split(name) for name in cfg.DATASETS.TRAIN]
    if None not in splits:
        data.train_records(splits, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)


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


def known_classes(name: str) -> Classes:
    """The classes of a dataset in Detectron2's catalogs, with the ids of its annotation file."""
    metadata = MetadataCatalog.get(name)
    order = metadata.get("thing_dataset_id_to_contiguous_id")
    ids = sorted(order, key=order.get) if order else list(range(len(metadata.thing_classes)))
    return Classes(list(metadata.thing_classes), ids, list(metadata.get("keypoint_names") or ()))


class NamingMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper`` with the images of :func:`dyhead.data.read_image`; its errors name the image.

    Where Detectron2 would resize or crop a side to nothing, a pixel is left. Everything else is as in Detectron2, also
    for a loader of one's own: ``build_detection_train_loader(cfg, mapper=NamingMapper(cfg, is_train=True))``.

    Args:
        is_train, kwargs: Detectron2's.
        visible_boxes: objects have ``gt_visible_boxes``, the boxes of their visible parts, those of a crop inside it;
            an object whose visible part is outside, or not annotated, has its own box.

    Raises:
        DataError: on use: the image is missing, broken, or not of the size that its annotations say.
    """

    @configurable
    def __init__(self, is_train: bool, *, visible_boxes: bool = False, **kwargs: Any) -> None:
        super().__init__(is_train, **kwargs)
        self.visible_boxes = visible_boxes

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Arguments of the constructor."""
        if not is_train and cfg.MODEL.KEYPOINT_ON:  # Detectron2 would ask for the keypoints that are trained on
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.KEYPOINT_ON = False
        arguments = super().from_config(cfg, is_train)
        arguments["augmentations"] = [_leaving_a_pixel(augmentation) for augmentation in arguments["augmentations"]]
        return arguments | {"visible_boxes": reads_visible_boxes(cfg)}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """The image and annotations of one record as the model takes them."""
        sample = copy.deepcopy(dataset_dict)
        image = _read(sample, self.image_format)
        classes = None
        if "sem_seg_file_name" in sample:
            classes = detection_utils.read_image(sample.pop("sem_seg_file_name"), "L")[:, :, 0]
        seen = T.AugInput(image, sem_seg=classes)
        transforms = self.augmentations(seen)
        shape = seen.image.shape[:2]
        sample["image"] = torch.from_numpy(seen.image.transpose(2, 0, 1).copy())
        if seen.sem_seg is not None:
            sample["sem_seg"] = torch.from_numpy(seen.sem_seg.astype(np.int64))
        if self.proposal_topk is not None:
            detection_utils.transform_proposals(sample, shape, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            sample.pop("annotations", None)
        elif "annotations" in sample:
            visible = self._visible_boxes(sample["annotations"], transforms, shape) if self.visible_boxes else None
            self._transform_annotations(sample, transforms, shape)
            if visible is not None:
                sample["instances"].gt_visible_boxes = visible
        return sample

    def _visible_boxes(
        self, annotations: Sequence[dict[str, Any]], transforms: T.Transform, shape: tuple[int, int]
    ) -> Boxes:
        """Of the objects that Detectron2 leaves over: those whose boxes are not empty after the transforms."""
        objects = [a for a in annotations if not a.get("iscrowd", 0)]
        found = {"bbox": [], "visible_bbox": []}
        for own in objects:
            whole = {"bbox": own["bbox"], "bbox_mode": own["bbox_mode"]}
            part = {"bbox": own["visible_bbox"], "bbox_mode": BoxMode.XYXY_ABS} if "visible_bbox" in own else whole
            for key, box in (("bbox", whole), ("visible_bbox", part)):
                changed = detection_utils.transform_instance_annotations(dict(box), transforms, shape)
                found[key].append(changed["bbox"])
        boxes, visible = (Boxes(np.array(own).reshape(-1, 4)) for own in found.values())
        visible.tensor = torch.where(visible.nonempty()[:, None], visible.tensor, boxes.tensor)
        _, kept = detection_utils.filter_empty_instances(Instances(shape, gt_boxes=boxes), return_mask=True)
        return visible[kept]


def evaluation_loader(cfg: CfgNode, name: str) -> _Loader:
    """Detectron2's loader of a test set; :class:`DataError` on use: an image is broken."""
    mapper = _ErrorsAsValues(NamingMapper(cfg, is_train=False))
    return _Loader(build_detection_test_loader(cfg, name, mapper=mapper))


class _Loader:
    """A loader of Detectron2's that raises the errors which :class:`_ErrorsAsValues` has put into its batches."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for batch in self.loader:
            for sample in batch:
                if "error" in sample:
                    raise sample["error"]
            yield batch


class _ErrorsAsValues:
    """A mapper in a worker process: an exception would come out of there with the whole traceback for a message."""

    def __init__(self, mapper: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.mapper = mapper

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        if get_worker_info() is not None:
            leave_to_main_process()  # here, since Detectron2 has a worker_init_fn of its own
        try:
            return self.mapper(record)
        except DataError as error:
            return {"error": error, "width": record.get("width", 1), "height": record.get("height", 1)}


class _Resize(T.ResizeShortestEdge):
    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
        return transform


class _Crop(T.RandomCrop):
    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = super().get_crop_size(image_size)
        return max(height, 1), max(width, 1)


def _leaving_a_pixel(augmentation: T.Augmentation) -> T.Augmentation:
    """The same augmentation, whose images have at least one pixel."""
    if type(augmentation) is T.ResizeShortestEdge:
        style = "range" if augmentation.is_range else "choice"
        return _Resize(augmentation.short_edge_length, augmentation.max_size, style, augmentation.interp)
    if type(augmentation) is T.RandomCrop:
        return _Crop(augmentation.crop_type, augmentation.crop_size)
    return augmentation


def _read(sample: dict[str, Any], image_format: str) -> np.ndarray:
    """The image of a record, (height, width, channels), which also completes its height and width."""
    path = os.fspath(sample["file_name"])
    if "://" in path:
        path = PathManager.get_local_path(path)
    size = (sample["height"], sample["width"]) if "height" in sample and "width" in sample else None
    image = data.read_image(path, size=size)
    sample["height"], sample["width"] = image.shape[:2]
    return in_format(image, image_format)


def in_format(image: np.ndarray, image_format: str) -> np.ndarray:
    """An image (height, width, 3), RGB, with the channels of ``INPUT.FORMAT``."""
    if image_format in ("RGB", "BGR"):
        return image if image_format == "RGB" else np.ascontiguousarray(image[:, :, ::-1])
    return detection_utils.convert_PIL_to_numpy(Image.fromarray(image), image_format)


def _register(split: CocoSplit, clip_boxes: bool) -> None:
    name = split.info.name
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
    if name in _registered:  # from other files, before
        MetadataCatalog.remove(name)
    records = [_as_detectron2s(record, 3 * len(split.keypoint_names)) for record in split.records]
    # Detectron2 hands the records out; who changes them must not change the next one's.
    DatasetCatalog.register(name, lambda: copy.deepcopy(records))
    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file") is None:  # or an evaluator of Detectron2's has made one, before the set was drawn
        metadata.set(json_file=split.info.json_file)
    metadata.set(
        image_root=split.info.image_root,
        evaluator_type="coco",
        thing_classes=split.class_names,
        thing_dataset_id_to_contiguous_id={category: i for i, category in enumerate(split.category_ids)},
        **_keypoint_metadata(split.keypoint_names),
    )
    _registered[name] = split, clip_boxes


def _as_detectron2s(record: dict[str, Any], numbers: int) -> dict[str, Any]:
    """A record whose masks are polygons or compressed RLE, and whose keypoints are those of the image's plane.

    All objects have keypoints, of which so many ``numbers`` make a list, if any has: 0 where there are none.
    """
    annotations = []
    for annotation in record["annotations"]:
        own = dict(annotation)
        if isinstance(own.get("segmentation"), dict):
            own["segmentation"] = as_rle(own["segmentation"], record["height"], record["width"])
        if numbers:  # COCO's count pixels
            points = annotation.get("keypoints") or [0] * numbers
            own["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(points)]
        annotations.append(own)
    return record | {"annotations": annotations}


def _keypoint_metadata(names: Sequence[str]) -> dict[str, Any]:
    return {"keypoint_names": list(names), "keypoint_flip_map": data.flip_pairs(names)} if names else {}


def _name_classes(name: str) -> None:
    """Load a dataset of others whose classes have no names yet, as ``register_coco_instances`` leaves it."""
    if MetadataCatalog.get(name).get("thing_classes") is None:
        try:
            DatasetCatalog.get(name)
        except (AssertionError, KeyError, OSError, TypeError, ValueError) as error:
            raise DataError(f"dataset {name!r} cannot be loaded ({type(error).__name__}: {error})") from error
